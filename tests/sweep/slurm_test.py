"""Sweeps on a real Slurm of this machine's own, where jobs and launchers are killed."""

from __future__ import annotations

import concurrent.futures
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

from aaconv import cli, train
from aaconv.sweep import records, running, slurm as slurm_jobs

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


@pytest.mark.slow
def test_two_trials_and_the_launcher_killed_give_the_table_of_an_undisturbed_sweep(slurm, config, tmp_path):
    line = ("--config", config, "--config.num_steps=30", "--grid", "seed=0:3")
    finish(slurm.environment, *line, "--workdir", tmp_path / "undisturbed")
    workdir = tmp_path / "slurm sweep"
    with launch(slurm.environment, *line, "--workdir", workdir, "--slurm", "--retries", "1") as launcher:
        cancelled, killed = cancel_and_kill(slurm, workdir, launcher)
        wait_for(lambda: len(list(workdir.glob("slurm/*_submitted.pkl"))) == 5, launcher)
        launcher.kill()
    finish(slurm.environment, *line, "--workdir", workdir, "--slurm")
    check_disturbed(workdir, tmp_path / "undisturbed", cancelled, killed)
    assert len(submitted(workdir)) == 5


def cancel_and_kill(slurm, workdir: Path, launcher: subprocess.Popen[str]) -> tuple[records.Status, records.Status]:
    """Cancels the job of a trial in its middle, and kills the process of another."""
    cancelled = catch(workdir, launcher)
    slurm.call("scancel", job_of(workdir, cancelled))
    killed = catch(workdir, launcher, but=cancelled)
    os.kill(process_of(killed), signal.SIGKILL)
    return cancelled, killed


def catch(workdir: Path, launcher: subprocess.Popen[str], but: records.Status | None = None) -> records.Status:
    """Returns a trial in its middle, and holds its process there, which a signal of Slurm's lets go."""

    def held() -> records.Status | None:
        for status in saved_and_running(workdir):
            if but is not None and status.trial == but.trial:
                continue
            with contextlib.suppress(ProcessLookupError):  # It ended since it was looked at, or while it was stopped.
                os.kill(process_of(status), signal.SIGSTOP)
                if "outcome" not in attempts(workdir, status.trial.name)[-1]:
                    return status
                os.kill(process_of(status), signal.SIGCONT)
        return None

    return wait_for(held, launcher)


def process_of(status: records.Status) -> int:
    return int(status.process.rpartition(":")[2])


def check_disturbed(workdir: Path, undisturbed: Path, cancelled: records.Status, killed: records.Status) -> None:
    """The table is that of the other sweep, and nothing ran twice, at once or in all."""
    assert table(workdir) == table(undisturbed) and len(table(workdir)) >= len(list(workdir.glob("trials/*"))) * 5
    for folder in (workdir / "trials").iterdir():
        made = attempts(workdir, folder.name)
        disturbed = folder.name in (cancelled.trial.name, killed.trial.name)
        assert [attempt["outcome"] for attempt in made] == ["killed"] * disturbed + ["finished"], folder.name
    assert "was cancelled; what it had was saved" in attempts(workdir, cancelled.trial.name)[0]["error"]
    assert "ended without a word" in attempts(workdir, killed.trial.name)[0]["error"]


@pytest.mark.by_hand
def test_sixteen_trials_two_and_the_launcher_killed_give_the_table_of_an_undisturbed_sweep(
    slurm, long_config, tmp_path
):
    line = ("--config", long_config, "--grid", "schedule.learning_rate=0.05,0.1", "--grid", "seed=0:8")
    workdir = tmp_path / "slurm sweep"
    with launch(slurm.environment, *line, "--workdir", workdir, "--slurm", "--retries", "1") as launcher:
        cancelled, killed = cancel_and_kill(slurm, workdir, launcher)
        wait_for(lambda: len(list(workdir.glob("slurm/*_submitted.pkl"))) == 18, launcher)
        wait_for(lambda: saved_and_running(workdir), launcher)
        launcher.kill()
    finish(slurm.environment, *line, "--workdir", workdir, "--slurm")
    finish(slurm.environment, *line, "--workdir", tmp_path / "undisturbed")
    check_disturbed(workdir, tmp_path / "undisturbed", cancelled, killed)
    assert len(submitted(workdir)) == 18  # the second launcher took over what the first had submitted


@pytest.mark.by_hand
def test_a_trial_on_two_hosts_is_taken_away_queued_again_and_goes_on(slurm, long_config, tmp_path):
    line = ("--config", long_config, "--grid", "seed=0", "--config.mesh.data=-1", "--config.data.data_dir", tmp_path)
    with launch(slurm.environment, *line, "--workdir", tmp_path / "run", "--slurm", "--nodes", "2") as launcher:
        running = catch(tmp_path / "run", launcher)
        job = job_of(tmp_path / "run", running)
        slurm.call("scancel", "--signal=TERM", job)  # as Slurm does before the time limit, and to make room
        os.kill(process_of(running), signal.SIGCONT)
        _, said = launcher.communicate(timeout=600)
    assert launcher.returncode == cli.OK, said
    first, second = attempts(tmp_path / "run", "seed=0")
    assert (first["outcome"], second["outcome"]) == ("stopped", "finished") and first["job"] == second["job"] == job
    printed = (tmp_path / "run" / "trials" / "seed=0" / "output.txt").read_text()
    assert "on 2 devices" in printed and "continuing" in printed
    assert submitted(tmp_path / "run") == ["seed=0"]


# Launchers of jobs that train nothing


class Until:
    """Signals of a launcher that is stopped after so many looks, or when something has come true."""

    name = "SIGTERM"

    def __init__(self, looks: int, done: Callable[[], bool] = lambda: False) -> None:
        self._looks, self._done = looks, done

    @property
    def caught(self) -> int | None:
        self._looks -= 1
        return signal.SIGTERM if self._looks < 0 or self._done() else None


@pytest.fixture
def launcher(slurm, config, made_up, tmp_path, monkeypatch) -> Iterator[Any]:
    """Makes the launcher of a sweep of two trials whose jobs run some lines of bash; it has the ``sweep``."""
    for name, value in {**slurm.environment, "SUBMITIT_LOG_LEVEL": "NOCONFIG"}.items():
        monkeypatch.setenv(name, value)
    sweep = made_up(tmp_path / "run", config, ["seed=0,1"], [], lambda overrides: None)

    def make(*setup: str, note: Callable[[str], None] = lambda text: None, **resources: Any) -> slurm_jobs.Cluster:
        return slurm_jobs.Cluster(sweep, slurm_jobs.Resources(setup=setup, **resources), note=note)

    make.sweep = sweep  # type: ignore[attr-defined]
    yield make
    slurm.call("scancel", f"--user={os.getuid()}")
    slurm.wait_for(lambda: not slurm.call("squeue", "-h"), 60, "end of the jobs")


def wrap_sbatch(folder: Path, *, before: str = "", after: str = "") -> str:
    """Puts lines of a shell around ``sbatch``; returns the PATH on which that is found."""
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\n{before}\n{shutil.which("sbatch")} "$@"\n{after}\n')
    (folder / "sbatch").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


KILLED_WHILE_IT_SUBMITS = """
import sys, types
from aaconv.sweep import records, slurm
sweep = records.load(sys.argv[1])
cluster = slurm.Cluster(sweep, slurm.Resources(setup=["exec sleep 600"]))
cluster.run(sweep, retries=0, since=0.0, signals=types.SimpleNamespace(caught=None))
"""


@pytest.mark.slow
def test_of_all_launchers_killed_stopped_or_two_at_once_a_trial_has_one_job(slurm, launcher, tmp_path):
    sweep = launcher.sweep
    path = wrap_sbatch(tmp_path / "bin", after="kill -9 $PPID")
    words = [sys.executable, "-c", KILLED_WHILE_IT_SUBMITS, sweep.workdir]
    done = subprocess.run(words, env={**os.environ, "PATH": path}, cwd=REPOSITORY, timeout=300)
    lost = {job.number for job in slurm_jobs.queue(sweep.workdir) or []}
    assert done.returncode == -signal.SIGKILL and len(lost) == 2

    # Two at once take over from the one that was killed before submitit had said what its jobs are to do.
    said: list[str] = []
    run = lambda signals: launcher("exec sleep 600", note=said.append).run(sweep, retries=0, since=0.0, signals=signals)
    both_spoke = lambda: all(any(words in line for line in said) for words in ("submitted", "another launcher submits"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, Until(60, both_spoke)) for _ in range(2)]
        ended = [one.exception() for one in both]
    jobs = lambda: {job.number: job.trial for job in slurm_jobs.queue(sweep.workdir) or [] if job.number not in lost}
    there = jobs()
    assert sorted(there.values()) == ["seed=0", "seed=1"]
    array = min(there).partition("_")[0]
    assert all("the jobs of Slurm go on without this launcher" in str(error) for error in ended)
    assert any(f"`scancel {array}` ends them" in str(error) for error in ended)
    assert sum("another launcher submits" in line for line in said) == 1, said
    assert sum("submitted 2 trials" in line for line in said) == 1, said
    slurm.wait_for(lambda: len(slurm_jobs.queue(sweep.workdir) or []) == 2, 60, "end of the lost jobs")

    # What Slurm runs again after it was killed is waited for, though no retry is left.
    for trial in sweep.trials:
        killed = {"started": 1.0, "outcome": "killed", "job": "1"}
        sweep.folder(trial).mkdir(parents=True, exist_ok=True)
        records.write_json(sweep.folder(trial) / "trial.json", {"attempts": [killed]})
    with pytest.raises(train.Preempted, match="the jobs of Slurm go on"):
        run(Until(2))
    assert jobs() == there


@pytest.mark.slow
def test_what_fails_is_submitted_again_though_slurm_refuses_for_a_while(slurm, launcher, tmp_path, monkeypatch):
    """No more trials at a time than asked for, all arrays together, and each job's end at its own trial."""
    monkeypatch.setattr(slurm_jobs, "REFUSED_SECONDS", 1.0)
    refuse = tmp_path / "refuse"
    refusal = f'if [ -e {refuse} ]; then echo "sbatch: error: too many jobs" >&2; exit 1; fi'
    monkeypatch.setenv("PATH", wrap_sbatch(tmp_path / "bin", before=refusal))
    said: list[str] = []

    def note(line: str) -> None:
        said.append(line)
        refuse.unlink() if "too many jobs" in line else refuse.touch()

    sweep = launcher.sweep
    second_is_slow = '[ "$SLURM_ARRAY_TASK_ID" = 1 ] && sleep 5'
    earlier = {"started": 1.0, "outcome": "stopped", "job": "1"}
    for trial in sweep.trials:
        sweep.folder(trial).mkdir(parents=True, exist_ok=True)
        records.write_json(sweep.folder(trial) / "trial.json", {"attempts": [earlier]})
    cluster = launcher(second_is_slow, "echo the setup fails; exit 3", note=note, array_parallelism=1)
    cluster.run(sweep, retries=1, since=2.0, signals=Until(300))
    assert [line.partition(" ")[0] for line in said] == ["submitted", "Slurm", "submitted"], said
    for trial in sweep.trials:
        before, *made = attempts(sweep.workdir, trial.name)
        assert before == earlier and [attempt["outcome"] for attempt in made] == ["killed"] * 2
        assert len({attempt["job"] for attempt in made}) == 2
        assert all("the setup fails\nits job" in attempt["error"] for attempt in made), made


def test_a_trial_whose_job_is_queued_again_and_again_without_a_step_fails(
    config, made_up, tmp_path, monkeypatch, capfd
):
    sweep = made_up(tmp_path, config, ["seed=0"], [], lambda overrides: None)
    (trial,) = sweep.trials
    file = sweep.folder(trial) / "trial.json"
    sweep.folder(trial).mkdir(parents=True)

    def stopped(*steps: int, job: str = "7") -> None:
        ended = {"started": 1.0, "outcome": "stopped", "job": job}
        records.write_json(file, {"attempts": [{**ended, "saved_step": step} for step in steps]})

    for steps, job in (((5,), "7"), ((5, 5), "7"), ((5, 5, 6), "7"), ((5, 5, 5), "8")):
        stopped(*steps, job=job)
        assert not running.fail_if_stalled(sweep, trial, "7")
    stopped(4, 5, 5, 5)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit, match="1"):
        slurm_jobs.run_in_job(str(tmp_path), "seed=0", None)
    assert "saved no step since its job was queued again" in capfd.readouterr().out
    last = attempts(tmp_path, "seed=0")[-1]
    assert last["outcome"] == "failed" and "job 7 of Slurm was queued again three times" in last["error"]
    assert "after step 5: give a longer --time" in last["error"]


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
