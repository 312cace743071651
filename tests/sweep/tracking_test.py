"""What TensorBoard and Weights & Biases are given of a sweep."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from aaconv import cli, metrics
from aaconv.sweep import records, tracking

REPOSITORY = Path(__file__).resolve().parents[2]
GRID = ["model.kappa=0.1,0.2", "model.name=wrn,aa_wrn", "seed=0:2"]
FINISHED, FAILED = "kappa=0.1,model.name=wrn,seed=0", "kappa=0.2,model.name=aa_wrn,seed=1"


@pytest.fixture
def swept(made_up, config, tmp_path) -> records.Sweep:
    """Eight trials: one failed, one did not begin."""

    def result(o):
        if o["seed"] and o["model.name"] == "aa_wrn":
            return "Killed" if o["model.kappa"] == 0.2 else None
        return 0.5 + o["model.kappa"]

    return made_up(tmp_path, config, GRID, [], result)


def hparams(folder: Path) -> dict:
    """The messages of the HParams plugin in a folder's file of events, by tag."""
    from tensorboardX.proto import event_pb2, plugin_hparams_pb2

    data = (folder / metrics.HPARAMS).read_bytes()
    found = {}
    while data:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "hparams"
            content = plugin_hparams_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
            found[value.tag] = content
    return found


def test_tensorboard_is_told_what_trials_differ_in_and_how_they_ended(swept):
    pytest.importorskip("tensorboardX")
    for _ in range(2):  # written anew, not twice
        tracking.write_tensorboard(swept)
    experiment = hparams(swept.workdir)["_hparams_/experiment"].experiment
    values = {info.name: [value for value in info.domain_discrete] for info in experiment.hparam_infos}
    assert values == {"kappa": [0.1, 0.2], "model.name": ["aa_wrn", "wrn"], "seed": [0, 1]}
    compared = [(info.name.group, info.name.tag) for info in experiment.metric_infos]
    assert compared[0] == ("tensorboard", "eval/accuracy")  # where a trial's own events lie
    for name, status in ((FINISHED, 1), (FAILED, 2)):  # STATUS_SUCCESS and STATUS_FAILURE
        told = hparams(swept.workdir / "trials" / name)
        start, end = told["_hparams_/session_start_info"].session_start_info, told["_hparams_/session_end_info"]
        assert start.group_name == name and start.hparams["kappa"].number_value == float(name[6:9])
        assert end.session_end_info.status == status
    begun = [trial for trial in swept.trials if (swept.folder(trial) / metrics.HPARAMS).exists()]
    assert len(begun) == 7


def test_tensorboards_own_reader_compares_the_trials(swept):
    multiplexer = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_multiplexer")
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    tracking.write_tensorboard(swept)
    for status in records.statuses(swept):
        if status.state == "finished":
            with metrics.Log(swept.folder(status.trial)) as log:
                log.write(4, status.values)
    runs = multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(swept.workdir))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(swept.workdir))
    board = base_plugin.TBContext(data_provider=provider, logdir=str(swept.workdir), multiplexer=runs)
    every = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=every)
    asked.col_params.add(metric=api_pb2.MetricName(group="tensorboard", tag="eval/accuracy"))
    view = backend_context.Context(board)
    told = list_session_groups.Handler(context.RequestContext(), view, "", asked).run().session_groups
    accuracies = {
        group.name: [value.value for value in group.metric_values if value.name.tag == "eval/accuracy"]
        for group in told
    }
    assert accuracies[FINISHED] == [pytest.approx(0.6)] and accuracies[FAILED] == [] and len(told) == 7


def test_upload_without_wandb_says_what_to_install(swept, sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    answer = sweep("upload", "--workdir", swept.workdir, "--project", "sweeps")
    assert answer.code == cli.WRONG_INPUT and "pip install 'aaconv[wandb]'" in answer.err
    answer = sweep("upload", "--workdir", swept.workdir)
    assert answer.code == cli.WRONG_INPUT and "--project is missing" in answer.err


@pytest.mark.slow  # wandb takes three seconds to begin
def test_finished_trials_are_sent_to_wandb_once(swept):
    pytest.importorskip("wandb")
    command = [sys.executable, "-m", "aaconv", "sweep", "upload", "--workdir", str(swept.workdir), "--project"]
    environment = {**os.environ, "WANDB_MODE": "offline", "HOME": str(swept.workdir)}
    environment.pop("WANDB_API_KEY", None)

    def upload(project: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, project], capture_output=True, text=True, cwd=REPOSITORY, env=environment | more
        )

    # Sent to two projects, and to the first again.
    for project, sent, before in (("one", 6, 0), ("one", 0, 6), ("two", 6, 0), ("one", 0, 6)):
        done = upload(project)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["sent", str(sent), "trials", "before", str(before), "trials"]
    written = [path.read_bytes() for path in (swept.workdir / "wandb").glob("offline-run-*/*.wandb")]
    assert len(written) == 12 and sum(FINISHED.encode() in text and b"eval/accuracy" in text for text in written) == 2
    done = upload("three", WANDB_MODE="online")  # nobody is logged in
    assert done.returncode == cli.WRONG_INPUT and "Traceback" not in done.stderr
    assert f"wandb did not take trial {FINISHED} for project 'three': " in done.stderr.splitlines()[-1]
