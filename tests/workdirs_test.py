"""Runs in folders and in buckets, which `bucket_server` keeps and the real clients read and write."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aaconv import checkpoints, cli, config, metrics, workdirs

REPOSITORY = Path(__file__).resolve().parents[1]
SERVER = importlib.util.spec_from_file_location("bucket_server", Path(__file__).with_name("bucket_server.py"))
GCSFS = importlib.util.find_spec("gcsfs") is not None
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dict(name="aa_wrn", depth=10, width=1, kappa=0.5, upsilon=0.25, num_heads=2, min_key_depth=4))
    c.data = ConfigDict(dict(name="digits", channels=1, mean=(0.3,), std=(0.4,), data_dir="{data_dir}"))
    c.batch_size, c.eval_batch_size, c.num_steps, c.log_every_steps = 64, 120, 30, 1
    c.mesh = ConfigDict(dict(data=1))
    c.checkpoint = ConfigDict(dict(every_steps=4))
    return c
"""


# Folders


def test_a_folder_is_made_absolute_and_a_home_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdirs.path("runs/one") == workdirs.path("~/runs/one") == tmp_path / "runs/one"
    assert not workdirs.in_bucket("runs/gs") and workdirs.in_bucket("gs://bucket/run")


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "config.json"
    for text in ("old", "new"):
        workdirs.write_text(file, text)
        assert file.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_is_moved_under_a_new_name(tmp_path):
    home = tmp_path / "damaged"
    for text in ("first", "second"):
        (tmp_path / "7").mkdir()
        (tmp_path / "7/file").write_text(text)
        workdirs.move_into(tmp_path / "7", home)
    assert {path.read_text() for path in home.glob("7-*/file")} == {"first", "second"}


def test_files_are_copied_to_the_same_places(tmp_path):
    (tmp_path / "trace/plugins/profile").mkdir(parents=True)
    (tmp_path / "trace/plugins/profile/x.pb").write_bytes(b"x")
    workdirs.copy_files(tmp_path / "trace", tmp_path / "run/profile")
    assert (tmp_path / "run/profile/plugins/profile/x.pb").read_bytes() == b"x"


@pytest.mark.parametrize("workdir", ["s3://bucket/run", "gs://", "gs:///", "http://host/run"])
def test_other_stores_are_refused(workdir):
    with pytest.raises(ValueError, match="must be a folder, or gs://BUCKET/FOLDER"):
        workdirs.path(workdir)


@pytest.mark.skipif(GCSFS, reason="gcsfs is installed")
def test_a_bucket_without_its_library_names_the_extra(capsys):
    assert cli.main(["eval", "--workdir", "gs://bucket/run"]) == cli.WRONG_INPUT
    assert "this needs gcsfs, which is not installed: run  pip install 'aaconv[gcs]'" in capsys.readouterr().err


# Buckets


@pytest.fixture
def buckets(monkeypatch) -> Iterator:
    if not GCSFS:
        pytest.skip("gcsfs is not installed: pip install 'aaconv[gcs]'")
    assert SERVER is not None and SERVER.loader is not None
    module = importlib.util.module_from_spec(SERVER)
    SERVER.loader.exec_module(module)
    with module.Buckets().running() as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


def aaconv(*words: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "aaconv", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out + err


@pytest.mark.by_hand
def test_a_run_in_a_bucket_is_killed_goes_on_and_gives_what_a_folder_gives(buckets, tmp_path):
    file, place = tmp_path / "digits.py", "gs://bucket/runs/one"
    file.write_text(CONFIG.format(data_dir=tmp_path / "tfds"))
    finished(aaconv("prepare", "digits", "--data-dir", tmp_path / "tfds"))
    finished(aaconv("train", "--config", file, "--workdir", tmp_path / "one"))
    killed = aaconv("train", "--config", file, "--workdir", place)
    end = time.monotonic() + 240
    # The file that orbax writes last.
    while "runs/one/checkpoints/4/commit_success.txt" not in buckets.names("bucket"):
        assert time.monotonic() < end and killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    traced = ["--config.profile.start_step=20", "--config.profile.num_steps=1"]
    said = finished(aaconv("train", "--config", file, "--workdir", place, *traced))
    assert f"continuing {place} from step " in said
    rows = [json.loads(line) for line in buckets.objects["bucket", "runs/one/metrics.jsonl"][0].splitlines()]
    updates = lambda rows: [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
    assert updates(rows) == updates(metrics.read_rows(tmp_path / "one"))
    assert json.loads(buckets.objects["bucket", "runs/one/config.json"][0])["num_steps"] == 30
    assert buckets.objects["bucket", "runs/one/curves.png"][0].startswith(b"\x89PNG")
    assert any(name.endswith(".xplane.pb") for name in buckets.names("bucket", "runs/one/profile/plugins/profile/"))
    assert "checkpoint      gs://bucket/runs/one/checkpoints/30" in finished(aaconv("eval", "--workdir", place))


@pytest.mark.slow
def test_rows_in_a_bucket_are_there_at_a_flush_and_at_the_end(buckets):
    stored = lambda: [row["step"] for row in metrics.read_rows("gs://bucket/run")]
    with metrics.Log("gs://bucket/run") as log:
        log.write(1, {"train/loss": 2.0})
        assert stored() == []
        log.flush()
        log.write(2, {"train/loss": 1.0})
        assert stored() == [1]
    assert stored() == [1, 2]
    with metrics.Log("gs://bucket/run", resume_step=1):
        assert stored() == [1]


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_whole_with_its_last_file(buckets):
    run = workdirs.path("gs://bucket/run")
    (run / "checkpoints/7/model/d").write_text("x")
    (run / "checkpoints/7/commit_success.txt").write_text("x")
    (run / "checkpoints/9/model/d").write_text("x")
    assert checkpoints.finished_steps("gs://bucket/run") == [7]


@pytest.mark.slow
def test_what_is_moved_aside_in_a_bucket_and_a_config_that_is_none(buckets):
    run = workdirs.path("gs://bucket/run")
    (run / "checkpoints/7/model/d").write_text("x")
    workdirs.move_into(run / "checkpoints/7", run / "damaged_checkpoints")
    left = buckets.names("bucket")
    assert [name.startswith("run/damaged_checkpoints/") for name in left] == [True, True]
    assert any(name.endswith("/model/d") for name in left)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="'gs://bucket/run/config.json' is not the config.json of a run"):
        config.load("gs://bucket/run/config.json")
