"""Several processes on loopback, through the command a person types: one run, its ends and its accidents."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aaconv import checkpoints, config as configs, hosts, metrics, train
from aaconv.data import catalog

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 66  # three epochs of 22
CONFIG = f"""
from ml_collections import ConfigDict

def get_config(argument=""):
    c = ConfigDict()
    c.model = ConfigDict(dict(name="wrn", depth=10, width=1))
    c.data = ConfigDict(dict(name="digits", channels=1, mean=(0.3,), std=(0.4,), train_split="train[:1408]"))
    c.data.placement = "device"
    c.data.augment = ConfigDict(dict(crop_padding=1))
    c.batch_size, c.eval_batch_size, c.num_steps = 64, 120, {STEPS}
    c.schedule = ConfigDict(dict(learning_rate=0.05))
    c.log_every_steps = 2
    c.checkpoint = ConfigDict(dict(every_steps=10))
    return c
"""
# The command, but for a note of the examples that this process was given.
NOTING_EXAMPLES = """
import sys
from aaconv import cli
from aaconv.data import pipeline

file, take = open(sys.argv.pop(1), "a", buffering=1), pipeline.TrainIterator.__next__

def noting(self):
    batch = take(self)
    print(*batch["index"], file=file)
    return batch

pipeline.TrainIterator.__next__ = noting
cli.run()
"""


class Launched:
    """Processes of one run; what each printed lies in files."""

    def __init__(self, commands, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        self.processes = []
        for i, command in enumerate(commands):
            with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
                self.processes.append(
                    subprocess.Popen(
                        [str(word) for word in command],
                        stdout=out, stderr=err, cwd=REPOSITORY, env={**os.environ, **environment},
                    )  # fmt: skip
                )

    def wait(self, seconds: float = 240) -> list[int]:
        until = time.monotonic() + seconds
        return [process.wait(timeout=max(0.1, until - time.monotonic())) for process in self.processes]

    def out(self, i: int) -> str:
        return (self._folder / f"{i}.out").read_text()

    def err(self, i: int) -> str:
        return (self._folder / f"{i}.err").read_text()

    def said(self, i: int) -> str:
        """What the command itself said last: libraries print before it."""
        (line,) = re.findall(r"^aaconv: .*(?:\n  .*)*", self.err(i), re.MULTILINE)
        return line


@pytest.fixture
def launch(tmp_path, data_dir):
    launched = []

    def start(commands, devices: int = 1) -> Launched:
        environment = {"JAX_NUM_CPU_DEVICES": str(devices), "TFDS_DATA_DIR": str(data_dir)}
        launched.append(Launched(commands, tmp_path / f"printed{len(launched)}", environment))
        return launched[-1]

    yield start
    for one in launched:
        for process in one.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    catalog.prepare("digits", folder)  # once, not by several at the same time
    return folder


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG)
    return file


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def commands(count: int, config_file, workdir, *words, program=("-m", "aaconv"), of_each=lambda i: (), before=()):
    """The command line of each of `count` processes."""
    port = free_port()
    return [
        [
            sys.executable, *program, *before, "train", "--config", config_file, "--workdir", workdir,
            "--coordinator", f"localhost:{port}", "--processes", count, "--process", i,
            "--start-timeout", 60, *words, *of_each(i),
        ]
        for i in range(count)
    ]  # fmt: skip


def wait_for_step(workdir: Path, step: int) -> None:
    """Returns once a row of this step, or a later one, is written."""
    until = time.monotonic() + 120
    while not any(row["step"] >= step for row in metrics.read_rows(workdir)):
        assert time.monotonic() < until
        time.sleep(0.02)


def rows(workdir) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in metrics.read_rows(workdir)
    ]


def load(config_file, data_dir, **settings):
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return configs.load(str(config_file), [f"data.data_dir={data_dir}", *overrides])


def saved_state(config, workdir, devices: int) -> dict:
    """The newest checkpoint of `workdir`, restored onto so many devices of this process."""
    with config.unlocked():
        config.mesh.data = devices
    run = train.build(config, None, None, training=True)
    with checkpoints.Checkpoints(workdir, read_only=True) as saved:
        found = saved.restore(run.abstract_state().items())
    assert found is not None
    return {"step": found[0], **found[1]}


def files(workdir) -> list[str]:
    found = (str(path.relative_to(workdir)) for path in workdir.iterdir())
    return sorted(name for name in found)


# One run


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, launch, config_file, data_dir):
    """The losses of one process; each example once an epoch; process 0 alone writes and prints."""
    two, one = tmp_path / "two", tmp_path / "one"
    run = launch(
        [
            [command[0], "-c", NOTING_EXAMPLES, tmp_path / f"examples{i}", *command[3:]]
            for i, command in enumerate(commands(2, config_file, two))
        ]
    )
    train.train(load(config_file, data_dir, mesh__data=2), one, progress=metrics.Progress())
    assert run.wait() == [0, 0], run.err(0) + run.err(1)
    for of_two, of_one in zip(rows(two), rows(one), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4, abs=1e-6)
    given = [np.loadtxt(tmp_path / f"examples{i}", dtype=int) for i in range(2)]
    assert [part.shape for part in given] == [(STEPS, 32)] * 2
    epochs = np.concatenate(given, axis=1).reshape(3, -1)
    assert (np.sort(epochs, axis=1) == np.arange(1408)).all()
    assert (epochs[0] != epochs[1]).any()
    assert files(two) == sorted([*files(one), "curves.png"])  # which the command draws
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert "trained" in run.out(0)
    assert run.out(1) == ""


@pytest.mark.slow
def test_four_processes_stopped_killed_and_continued(tmp_path, launch, config_file, data_dir):
    """To the bits of a run that nothing happened to; and their checkpoint serves any number of devices."""
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"

    def start(workdir):
        return launch(commands(4, config_file, workdir, "--heartbeat-timeout", 10))

    stopped = start(disturbed)
    wait_for_step(disturbed, 4)
    stopped.processes[2].send_signal(signal.SIGTERM)
    assert stopped.wait() == [75] * 4, stopped.err(0)
    (step,) = {re.search(r"stopped by SIGTERM: saved step (\d+) of 66", stopped.said(i))[1] for i in range(4)}
    assert checkpoints.Checkpoints(disturbed, read_only=True).steps()[-1] == int(step)

    killed = start(disturbed)
    wait_for_step(disturbed, int(step) + 6)
    killed.processes[1].kill()
    began = time.monotonic()
    assert killed.wait() == [hosts.LOST, -signal.SIGKILL, hosts.LOST, hosts.LOST]
    assert time.monotonic() - began < 60
    for i in (0, 2, 3):
        assert re.search(rf"process {i} of 4 .* lost contact .* at step \d+ of 66", killed.said(i))
        assert "Run the same command again on all hosts" in killed.said(i)

    assert start(disturbed).wait() == [0] * 4
    assert start(undisturbed).wait() == [0] * 4
    assert rows(disturbed) == rows(undisturbed)
    config = load(config_file, data_dir)
    on = {devices: saved_state(config, disturbed, devices) for devices in (1, 2, 8)}
    expected = saved_state(config, undisturbed, 1)
    for devices, state in on.items():
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state["model"])} == {devices}
        jax.tree.map(np.testing.assert_array_equal, state, expected)
