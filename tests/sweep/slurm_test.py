"""Sweeps on a real Slurm of this machine's own, where jobs and launchers are killed."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aaconv import cli
from aaconv.sweep import records, slurm as slurm_jobs

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@pytest.fixture(scope="module")
def long_config(tmp_path_factory, config) -> str:
    """Trials long enough to be killed within."""
    path = tmp_path_factory.mktemp("long") / "long.py"
    path.write_text(Path(config).read_text().replace("c.num_steps = 32, 360, 4", "c.num_steps = 32, 360, 40"))
    assert "360, 40" in path.read_text()
    return str(path)


@contextlib.contextmanager
def launch(environment: dict[str, str], *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "aaconv", "sweep", *map(str, words)],
        env={**environment, "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def finish(environment: dict[str, str], *words: str | Path) -> str:
    """Runs a sweep to its end; returns what it said."""
    with launch(environment, *words) as process:
        _, said = process.communicate(timeout=1500)
    assert process.returncode == cli.OK, said
    return said


def wait_for(found: Callable[[], Any], launcher: subprocess.Popen[str]) -> Any:
    for _ in range(6000):
        if result := found():
            return result
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    raise AssertionError("it never came to that")


def saved_and_running(workdir: Path) -> list[records.Status]:
    """The trials that run, and have saved a state at which they can be continued."""
    if not (workdir / "sweep.json").exists():
        return []
    sweep = records.load(workdir)
    has_saved = lambda s: any(p.name.isdecimal() for p in (sweep.folder(s.trial) / "checkpoints").glob("*"))
    return [status for status in records.statuses(sweep) if status.state == "running" and has_saved(status)]


def attempts(workdir: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((workdir / "trials" / name / "trial.json").read_text())["attempts"]


def job_of(workdir: Path, status: records.Status) -> str:
    return attempts(workdir, status.trial.name)[-1]["job"]


def submitted(workdir: Path) -> list[str]:
    return [name for file in (workdir / "slurm").glob("*.json") for name in json.loads(file.read_text())["trials"]]


def table(workdir: Path) -> list[tuple[str, str, str]]:
    """Trial, metric and value of each row of the results, but for speeds."""
    with (workdir / "results.csv").open() as file:
        rows = [(row["trial"], row["metric"], row["value"]) for row in csv.DictReader(file)]
    return [row for row in rows if not row[1].startswith("perf/")]


@pytest.mark.by_hand
def test_sixteen_trials_two_and_the_launcher_killed_give_the_table_of_an_undisturbed_sweep(
    slurm, long_config, tmp_path
):
    line = ("--config", long_config, "--grid", "schedule.learning_rate=0.05,0.1", "--grid", "seed=0:8")
    workdir = tmp_path / "slurm sweep"
    with launch(slurm.environment, *line, "--workdir", workdir, "--slurm", "--retries", "1") as launcher:
        cancelled = wait_for(lambda: saved_and_running(workdir), launcher)[0]
        slurm.call("scancel", job_of(workdir, cancelled))
        other = lambda: [s for s in saved_and_running(workdir) if s.trial != cancelled.trial]
        killed = wait_for(other, launcher)[0]
        os.kill(int(killed.process.rpartition(":")[2]), signal.SIGKILL)
        wait_for(lambda: len(submitted(workdir)) == 18, launcher)
        wait_for(lambda: saved_and_running(workdir), launcher)
        launcher.kill()
    finish(slurm.environment, *line, "--workdir", workdir, "--slurm")
    finish(slurm.environment, *line, "--workdir", tmp_path / "undisturbed")
    assert table(workdir) == table(tmp_path / "undisturbed") and len(table(workdir)) >= 16 * 5
    # The second launcher took over what the first had submitted, and nothing ran twice, at once or in all.
    assert len(submitted(workdir)) == 18
    for folder in (workdir / "trials").iterdir():
        made = attempts(workdir, folder.name)
        disturbed = folder.name in (cancelled.trial.name, killed.trial.name)
        assert [attempt["outcome"] for attempt in made] == ["killed"] * disturbed + ["finished"], folder.name
    assert "was cancelled; what it had was saved" in attempts(workdir, cancelled.trial.name)[0]["error"]
    assert "ended without a word" in attempts(workdir, killed.trial.name)[0]["error"]


@pytest.mark.by_hand
def test_a_trial_on_two_hosts_is_taken_away_queued_again_and_goes_on(slurm, long_config, tmp_path):
    line = ("--config", long_config, "--grid", "seed=0", "--config.mesh.data=-1", "--config.data.data_dir", tmp_path)
    with launch(slurm.environment, *line, "--workdir", tmp_path / "run", "--slurm", "--nodes", "2") as launcher:
        (running,) = wait_for(lambda: saved_and_running(tmp_path / "run"), launcher)
        job = job_of(tmp_path / "run", running)
        slurm.call("scancel", "--signal=TERM", job)  # as Slurm does before the time limit, and to make room
        _, said = launcher.communicate(timeout=600)
    assert launcher.returncode == cli.OK, said
    first, second = attempts(tmp_path / "run", "seed=0")
    assert (first["outcome"], second["outcome"]) == ("stopped", "finished") and first["job"] == second["job"] == job
    printed = (tmp_path / "run" / "trials" / "seed=0" / "output.txt").read_text()
    assert "on 2 devices" in printed and "continuing" in printed
    assert submitted(tmp_path / "run") == ["seed=0"]


def test_without_slurm_it_says_where_to_run(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = sweep("--config", "CONFIG", "--workdir", tmp_path / "run", "--slurm")
    assert answer.code == cli.WRONG_INPUT
    assert "there is no sbatch on the PATH" in answer.err and "login node, or leave out --slurm" in answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.by_hand  # sinfo looks for a controller for a minute
@pytest.mark.skipif(shutil.which("sinfo") is None, reason="no Slurm on this machine")
def test_a_controller_that_is_silent_is_told(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none"))
    answer = sweep("--config", "CONFIG", "--workdir", tmp_path / "run", "--slurm")
    assert answer.code == cli.WRONG_INPUT and "Slurm's controller does not answer (" in answer.err


@pytest.mark.by_hand
def test_what_slurm_refuses_is_told_in_its_words(slurm, sweep, tmp_path, monkeypatch):
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    for flags, words in (
        (["--partition", "al"], "--partition 'al' is no partition of this cluster; did you mean 'all'?"),
        (["--sbatch", "colour=red"], "Slurm refuses the jobs: sbatch: unrecognized option '--colour=red'"),
    ):
        answer = sweep("--config", "CONFIG", "--workdir", tmp_path / "run", "--slurm", *flags)
        assert answer.code == cli.WRONG_INPUT and words in answer.err.splitlines()[-1], answer.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--partition", "gpu"], "--partition is for jobs of Slurm: add --slurm, or leave it out"),
        (["--slurm", "--jobs", "2"], "did you mean --array-parallelism 2?"),
        (["--slurm", "--sbatch", "constraint"], "--sbatch constraint has no value: write --sbatch constraint=VALUE"),
        (["--slurm", "--sbatch", "time=3"], "--sbatch time=3: write --time 3"),
        (["--slurm", "--sbatch", "array=0-3"], "the sweep sets array itself"),
        (["--slurm", "--sbatch", "job_name=x"], "the sweep sets job-name itself"),
        (["--slurm", "--sbatch", "a\ntouch x=1"], "is no long option of sbatch, such as constraint"),
        (["--slurm", "--account", "a\ntouch x"], "--account holds a line break"),
        (["--slurm", "--setup", "a\nb"], "--setup holds a line break"),
        (["--slurm", "--time", "4 hours"], "--time '4 hours' must be a limit in Slurm's form"),
    ],
)
def test_wrong_flags_are_answered_before_slurm_is_asked(sweep, tmp_path, flags, words):
    answer = sweep("--config", "CONFIG", "--workdir", tmp_path / "run", *flags)
    assert answer.code == cli.WRONG_INPUT and words in answer.err.splitlines()[-1], answer.err


def test_nodes_hold_the_devices_of_the_mesh(config, tmp_path):
    from aaconv import config as config_lib
    from aaconv.sweep import description

    base = config_lib.load(config, ["mesh.data=4", "mesh.fsdp=2"])
    trials, _ = description.describe(
        base, description.from_flags(["seed=0,1"], []), check_devices=False, need_data=False
    )
    sweep = records.Sweep(tmp_path, base, tuple(trials))
    assert [slurm_jobs.nodes_for(sweep, gpus) for gpus in (0, 3, 4, 8)] == [1, 3, 2, 1]
