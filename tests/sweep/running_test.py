"""Sweeps as they run: what fails, what is tried again, what is left when something is killed, and who may run what."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aaconv import checkpoints, cli, config as config_lib, train
from aaconv.sweep import description, display, halving, records, running

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD, BAD = "learning_rate=0.1,seed=1", "learning_rate=1e+30,seed=0"
LINE = ("--config", "CONFIG", "--zip", "schedule.learning_rate=0.1,1e30", "--zip", "seed=1,0")


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory) -> tuple[Path, int]:
    """The workdir of a sweep of one good trial and one that fails, tried twice; and the exit code."""
    workdir = tmp_path_factory.mktemp("swept")
    words = [config if word == "CONFIG" else word for word in LINE]
    with (workdir / "printed").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "aaconv", "sweep", *words, "--workdir", str(workdir), "--retries", "1"],
            stdout=file, stderr=file, cwd=REPOSITORY,
        )  # fmt: skip
    return workdir, done.returncode


def table(workdir: Path) -> list[tuple[str, str, str]]:
    """Trial, metric and value of each row of the results, but for speeds."""
    with (workdir / "results.csv").open() as file:
        rows = [(row["trial"], row["metric"], row["value"]) for row in csv.DictReader(file)]
    return [row for row in rows if not row[1].startswith("perf/")]


def attempts(workdir: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((workdir / "trials" / name / "trial.json").read_text())["attempts"]


def test_a_failed_trial_is_tried_again_told_and_stops_no_other(swept):
    workdir, code = swept
    printed = (workdir / "printed").read_text()
    assert code == cli.TRIAL_FAILED, printed
    assert [attempt["outcome"] for attempt in attempts(workdir, BAD)] == ["failed", "failed"]
    assert [attempt["outcome"] for attempt in attempts(workdir, GOOD)] == ["finished"]
    assert f"failed: {BAD}" in printed and "NonFiniteLossError: nan or infinity in the loss" in printed
    assert "1/2 finished, 1 failed, best eval/accuracy" in printed
    assert f"finished {GOOD}" in printed  # a line, where there is no terminal


def test_results_are_a_row_a_metric_with_what_the_trial_ran_on(swept):
    workdir, _ = swept
    with (workdir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["trial"] for row in rows} == {GOOD}
    (accuracy,) = (row for row in rows if row["metric"] == "eval/accuracy")
    last = [json.loads(line) for line in (workdir / "trials" / GOOD / "metrics.jsonl").read_text().splitlines()][-1]
    assert float(accuracy["value"]) == last["eval/accuracy"] and accuracy["step"] == "4"
    assert accuracy["schedule.learning_rate"] == "0.1" and accuracy["seed"] == "1" and accuracy["attempts"] == "1"
    assert all(accuracy[column] for column in ("parameters", "flops", "seconds", "device", "cores", "jax", "python"))


def test_the_same_command_runs_only_what_is_missing(swept, sweep):
    workdir, _ = swept
    before = attempts(workdir, GOOD), table(workdir)
    answer = sweep(*LINE, "--workdir", workdir)
    assert answer.code == cli.TRIAL_FAILED
    assert (attempts(workdir, GOOD), table(workdir)) == before
    assert len(attempts(workdir, BAD)) == 3


def test_status_and_report_of_a_sweep(swept, sweep):
    workdir, _ = swept
    answer = sweep("status", "--workdir", workdir)
    assert answer.code == cli.OK and "1/2 finished, 1 failed" in answer.out and "NonFiniteLossError" in answer.out
    answer = sweep("report", "--workdir", workdir)
    assert answer.code == cli.OK and f"not in the means, diverged: {BAD}" in answer.out
    assert (workdir / "report.md").read_text().partition("\n![")[0].strip() in answer.out
    answer = sweep("report", "--workdir", workdir, "--metric", "eval/acuracy")
    assert answer.code == cli.WRONG_INPUT and "did you mean 'eval/accuracy'" in answer.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.num_steps=6"], "num_steps was 4, is 6"),
        (["--config.batch_size=16"], "batch_size was 32, is 16): name a new --workdir, or set these keys back"),
        (["--config.model.width=2"], "model.width was 1, is 2"),
    ],
)
def test_another_sweep_in_a_workdir_is_refused_and_nothing_changes(swept, sweep, flags, words):
    workdir, _ = swept
    before = (workdir / "sweep.json").read_text(), attempts(workdir, BAD)
    answer = sweep(*LINE, *flags, "--workdir", workdir)
    assert answer.code == cli.WRONG_INPUT and words in answer.err.splitlines()[-1]
    assert ((workdir / "sweep.json").read_text(), attempts(workdir, BAD)) == before
    dry = sweep(*LINE, *flags, "--workdir", workdir, "--dry-run")
    assert dry.code == cli.WRONG_INPUT and words in dry.err.splitlines()[-1]


def test_a_dry_run_says_how_many_are_finished(swept, sweep):
    workdir, _ = swept
    answer = sweep(*LINE, "--workdir", workdir, "--dry-run")
    assert answer.code == cli.OK and f"1 of 2 are finished in {workdir}" in answer.out


def test_the_workdir_of_a_run_is_no_sweeps(swept, sweep):
    answer = sweep(*LINE, "--workdir", swept[0] / "trials" / GOOD)
    assert answer.code == cli.WRONG_INPUT and "is the workdir of a single run" in answer.err


def test_a_trial_that_ran_with_another_config_is_told_and_left_out(swept, sweep):
    workdir, _ = swept
    file = workdir / "trials" / GOOD / "config.json"
    before = file.read_text()
    file.write_text(before.replace('"num_steps": 4', '"num_steps": 9'))
    try:
        answer = sweep(*LINE, "--workdir", workdir)
        assert answer.code == cli.WRONG_INPUT
        assert f"trial {GOOD} ran with another config (num_steps was 9, is 4)" in answer.err
        answer = sweep("report", "--workdir", workdir)
        assert answer.code == cli.TRIAL_FAILED and f"{GOOD} ran on: num_steps was 9, is 4" in answer.err
    finally:
        file.write_text(before)


# Without training


def open_sweep(workdir: Path, config: str, *grid: str):
    base = config_lib.load(config)
    trials, _ = description.describe(base, description.from_flags(grid, []))
    return records.opened(checkpoints.check_writable(workdir), base, trials)


def test_a_sweep_may_grow_and_what_ran_stays(config, tmp_path):
    with open_sweep(tmp_path, config, "seed=0,1,3") as sweep:
        records.write_json(make(sweep, 0) / "trial.json", {"attempts": [], "values": {"eval/accuracy": 0.5}})
        records.write_json(make(sweep, 2) / "trial.json", {"attempts": [{"started": 1.0, "outcome": "stopped"}]})
    with open_sweep(tmp_path, config, "seed=2") as sweep:
        # seed=1 never ran, and seed=3, which is asked for no more, would only be run to its end.
        assert [trial.name for trial in sweep.trials] == ["seed=2", "seed=0"]
    assert records.load(tmp_path) == sweep


def test_a_trial_described_in_another_way_keeps_its_folder(config, tmp_path):
    with open_sweep(tmp_path, config, "seed=0") as sweep:
        records.write_json(make(sweep, 0) / "trial.json", {"attempts": [], "values": {"eval/accuracy": 0.5}})
    with open_sweep(tmp_path, config, "model.width=1,2", "seed=0") as sweep:
        assert [trial.name for trial in sweep.trials] == ["seed=0", "width=2,seed=0"]
        assert [trial.overrides["model.width"] for trial in sweep.trials] == [1, 2]
        with open_sweep(tmp_path, config, "model.width=1,2", "seed=0") as joined:
            assert joined == sweep


def test_what_changes_no_result_makes_no_second_run_of_a_trial_under_another_name(config, tmp_path):
    with open_sweep(tmp_path, config, "model.width=1", "seed=0") as sweep:
        records.write_json(make(sweep, 0) / "trial.json", {"attempts": [], "values": {"eval/accuracy": 0.5}})
    base = config_lib.load(config, ["log_every_steps=1"])
    with records.opened(tmp_path, base, [description.Trial("seed=0", {"seed": 0})]) as sweep:
        assert [trial.name for trial in sweep.trials] == ["width=1,seed=0"]
    swept = [description.Trial(f"log={n}", {"log_every_steps": n, "seed": 0}) for n in (1, 4)]
    with records.opened(tmp_path, base, swept) as sweep:
        assert [trial.name for trial in sweep.trials] == ["width=1,seed=0", "log=4"]


def test_two_trials_never_have_one_folder(config, tmp_path):
    with open_sweep(tmp_path, config, "seed=0") as sweep:  # log_every_steps is 2 there
        records.write_json(make(sweep, 0) / "trial.json", {"attempts": [], "values": {"eval/accuracy": 0.5}})
    base = config_lib.load(config, ["log_every_steps=1"])
    cells = [{"log_every_steps": 2, "seed": 0}, {"seed": 0}]
    described = [description.Trial(description.trial_name(cell), cell) for cell in cells]
    with records.opened(tmp_path, base, described) as sweep:
        first, second = (trial.name for trial in sweep.trials)
    assert first == "seed=0" and second.startswith("seed=0~")
    with records.opened(tmp_path, base, described) as again:  # named alike before and after it ran
        assert again.trials == sweep.trials
        records.write_json(make(again, 1) / "trial.json", {"attempts": [], "values": {"eval/accuracy": 0.6}})
    with records.opened(tmp_path, base, described) as again:
        assert again.trials == sweep.trials


def make(sweep: records.Sweep, index: int) -> Path:
    folder = sweep.folder(sweep.trials[index])
    folder.mkdir(parents=True)
    return folder


def test_launchers_share_a_description_and_refuse_another(config, tmp_path):
    with open_sweep(tmp_path, config, "seed=0,1") as first:
        with open_sweep(tmp_path, config, "seed=0,1") as second:
            assert second == first
        with pytest.raises(ValueError, match="is running a sweep with other trials"):
            open_sweep(tmp_path, config, "seed=2").__enter__()


def test_a_description_that_comes_between_two_locks_is_not_mixed_with_this_one(config, tmp_path, monkeypatch):
    flock, others = fcntl.flock, contextlib.ExitStack()

    def slow_change(file: Any, operation: int) -> None:
        """As Linux does it: the lock there was ends, somebody else may come, then the new one begins."""
        if operation == fcntl.LOCK_SH:
            monkeypatch.setattr(fcntl, "flock", flock)
            flock(file, fcntl.LOCK_UN)
            others.enter_context(open_sweep(tmp_path, config, "seed=2"))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow_change)
    with others, pytest.raises(ValueError, match="is running a sweep with other trials"):
        open_sweep(tmp_path, config, "seed=0").__enter__()
    assert [trial.name for trial in records.load(tmp_path).trials] == ["seed=2"]


def test_a_file_system_without_locks_runs_and_halves_a_sweep_in_one_process(sweep, config, tmp_path, monkeypatch):
    def no_locks(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open_sweep(tmp_path, config, "seed=0,1") as opened, records.claim(opened.folder(opened.trials[0])) as mine:
        assert mine
        halving.Halving(1, "steps").begin(opened, [])
    assert halving.recorded(tmp_path) == halving.Halving(1, "steps")
    answer = sweep(*LINE, "--workdir", tmp_path / "several", "--jobs", 2)
    assert answer.code == cli.WRONG_INPUT and "has no locks (flock)" in answer.err
    assert not (tmp_path / "several/sweep.json").exists()


def test_how_a_trial_went_is_told_where_it_cannot_be_written(config, tmp_path, monkeypatch):
    written = records.write_json

    def full(path: Path, value: Any) -> None:
        if path.name == "trial.json" and "outcome" in value["attempts"][-1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(path, value)

    def no_device() -> None:
        raise RuntimeError("no GPU answers")

    monkeypatch.setattr("aaconv.bench.report.machine", no_device)
    with open_sweep(tmp_path, config, "seed=0,1") as sweep:
        first, second = sweep.trials
        with records.claim(sweep.folder(first)):
            assert running.run_trial(sweep, first) == "failed"
        assert "no GPU answers" in records.statuses(sweep)[0].error
        monkeypatch.setattr(records, "write_json", full)
        with records.claim(sweep.folder(second)), pytest.raises(ValueError, match=r"(?s)No space left.*no GPU answers"):
            running.run_trial(sweep, second)


def test_a_file_that_another_host_replaces_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    file, read, stale = tmp_path / "trial.json", Path.read_text, []

    def stale_at_first(path: Path) -> str:
        if path == file and len(stale) < 2:
            stale.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    records.write_json(file, {"attempts": []})
    monkeypatch.setattr(Path, "read_text", stale_at_first)
    assert records.read_json(file) == {"attempts": []} and len(stale) == 2


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_ino, os.fstat(number).st_size)))
    records.write_json(tmp_path / "halving.json", {"rungs": []})
    found = (tmp_path / "halving.json").stat()
    assert synced == [(found.st_ino, found.st_size)]


def test_of_a_broken_file_nothing_but_the_file_is_to_go(tmp_path):
    (tmp_path / "halving.json").write_text('{"rungs": [')
    with pytest.raises(ValueError, match=r"halving.json cannot be read \(.*\): move this file away$"):
        halving.recorded(tmp_path)


def test_a_trial_that_somebody_has_is_not_run(config, tmp_path):
    with open_sweep(tmp_path, config, "seed=0") as sweep:
        folder = sweep.folder(sweep.trials[0])
        with records.claim(folder) as mine:
            assert mine and records.is_claimed(folder)
            with records.claim(folder) as again:
                assert not again
            running.work(sweep, retries=0, since=time.time(), is_stopped=lambda: False, wait=False)
        assert not records.is_claimed(folder) and not (folder / "trial.json").exists()


def test_failures_count_since_the_launcher_started(config, tmp_path):
    with open_sweep(tmp_path, config, "seed=0,1") as sweep:
        tried = [{"started": 10.0, "outcome": "failed"}, {"started": 20.0, "outcome": "killed"}]
        records.write_json(make(sweep, 0) / "trial.json", {"attempts": tried})
        names = lambda retries, since: [trial.name for trial in running.unsettled(sweep, retries, since)]
        assert names(0, 5.0) == names(1, 5.0) == ["seed=1"]
        assert names(2, 5.0) == names(1, 15.0) == ["seed=1", "seed=0"]  # first what did not fail yet
        assert names(0, 30.0) == ["seed=0", "seed=1"]
        with records.claim(sweep.folder(sweep.trials[0])):  # somebody tries it, and it may yet finish
            assert names(0, 5.0) == ["seed=1", "seed=0"]


def test_the_table_shows_who_stands_how(config, tmp_path, capsys):
    from rich.console import Console

    with open_sweep(tmp_path, config, "seed=0:5") as sweep:
        states = ({"outcome": "failed", "error": "a\nb"}, {"outcome": "stopped"}, {"outcome": "finished"}, {})
        for index, state in enumerate(states):
            attempt = {"started": time.time() - 8, "process": "here:1", "seconds": 8.0, **state}
            values = {"eval/accuracy": 0.75} if state.get("outcome") == "finished" else None
            folder = make(sweep, index)
            records.write_json(folder / "trial.json", {"attempts": [attempt], "values": values})
            records.write_json(folder / "progress.json", {"step": 2, "total_steps": 4, "values": {}})
        with records.claim(sweep.folder(sweep.trials[3])):
            found = records.statuses(sweep)
            line = display.summary(sweep, found)
            records.write_json(tmp_path / "halving.json", {"rungs": []})
            halved = display.summary(sweep, found)
            Console(width=200).print(display.table(sweep, found, rows=3))
    assert [status.state for status in found] == ["failed", "interrupted", "finished", "running", "waiting"]
    assert line.startswith(
        "1/5 finished, 1 running, 1 failed, 1 interrupted, 1 waiting, best eval/accuracy 75.00% seed=2"
    )
    assert "left" in line and halved == line.rpartition(", ")[0]  # most of what is left will never be run
    printed = capsys.readouterr().out
    assert "seed=4" not in printed and "and 2 more" in printed and "2/4" in printed and " b " in printed


# Real processes


@pytest.fixture(scope="module")
def long_config(tmp_path_factory, config) -> str:
    """Trials long enough to be killed within."""
    path = tmp_path_factory.mktemp("long") / "long.py"
    text = Path(config).read_text().replace("c.num_steps = 32, 360, 4", "c.num_steps = 32, 360, 40")
    path.write_text(text + "\ndef sweep(add):\n    for seed in range(2):\n        add(seed=seed)\n")
    assert "360, 40" in path.read_text()
    return str(path)


@contextlib.contextmanager
def launch(config: str, workdir: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "aaconv", "sweep", "--config", config, "--workdir", str(workdir), "--jobs", "2"]
    with subprocess.Popen(
        [*words, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def undisturbed(long_config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    with launch(long_config, workdir) as process:
        _, said = process.communicate(timeout=900)
    assert process.returncode == cli.OK, said
    assert all(path.read_text() == "" for path in workdir.glob(".worker*.txt"))
    return workdir


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    for _ in range(6000):
        found = condition()
        if found:
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it never came to that")


def in_the_middle(workdir: Path, trained: int) -> int:
    """The process of a trial that has begun, of which so many checkpoints are there; 0 before."""
    if not (workdir / "sweep.json").exists():
        return 0
    sweep = records.load(workdir)
    for status in records.statuses(sweep):
        saved = (sweep.folder(status.trial) / "checkpoints").glob("*")
        steps = [int(path.name) for path in saved if path.name.isdecimal()]  # others are being written
        if status.state == "running" and max(steps, default=0) >= trained:
            return int(status.process.rpartition(":")[2])
    return 0


@pytest.mark.slow
def test_a_worker_and_its_launcher_are_killed_and_two_launchers_end_it_as_an_undisturbed_sweep(config, tmp_path):
    line = ("--config.num_steps=40", "--zip", "schedule.learning_rate=1e30,0.1,0.1", "--zip", "seed=0,1,2")
    with launch(config, tmp_path / "undisturbed", *line, "--jobs", "1") as process:
        _, said = process.communicate(timeout=900)
    assert process.returncode == cli.TRIAL_FAILED, said
    workdir = tmp_path / "disturbed"
    with launch(config, workdir, *line, "--retries", "1") as process:
        # A worker that a trial has failed in already, so that it could be taken for the one that it died of.
        name, worker = wait_for(lambda: held_in_the_middle_after_a_failure(workdir), process)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: "its process ended by SIGKILL" in attempts(workdir, name)[0].get("error", ""), process)
        wait_for(lambda: in_the_middle(workdir, 2), process)
        process.kill()
    one_each = (*line, "--jobs", "1")
    with launch(config, workdir, *one_each) as first, launch(config, workdir, *one_each) as second:
        for process in (first, second):
            _, said = process.communicate(timeout=900)
            assert process.returncode == cli.TRIAL_FAILED and f"failed: {BAD}" in said, said
    assert table(workdir) == table(tmp_path / "undisturbed") and len(table(workdir)) >= 2 * 5
    # What ran when the launcher was killed saved its state, and nothing ran twice, at once or in all.
    for folder in (workdir / "trials").iterdir():
        made = attempts(workdir, folder.name)
        times = [(attempt["started"], attempt["seconds"]) for attempt in made]
        assert all(start + seconds <= after for (start, seconds), (after, _) in zip(times, times[1:], strict=False))
        assert [attempt["outcome"] for attempt in made].count("finished") == (folder.name != BAD)
    assert [attempt["outcome"] for attempt in attempts(workdir, name)].count("killed") == 1


def held_in_the_middle_after_a_failure(workdir: Path) -> tuple[str, int] | None:
    """The name and the stopped process of a trial that has saved a state, and that has failed in another one before."""
    if not (workdir / "sweep.json").exists():
        return None
    sweep = records.load(workdir)
    found = records.statuses(sweep)
    failed = {status.process for status in found if status.state == "failed"}
    for status in found:
        if status.state == "running" and status.process in failed:
            if checkpoints.finished_steps(sweep.folder(status.trial)):
                process = int(status.process.rpartition(":")[2])
                os.kill(process, signal.SIGSTOP)
                if "outcome" not in attempts(workdir, status.trial.name)[-1]:
                    return status.trial.name, process
                os.kill(process, signal.SIGCONT)  # it has just ended
    return None


@pytest.mark.slow
def test_an_error_in_the_launcher_has_its_workers_save_first(config, tmp_path):
    base = config_lib.load(config, ["num_steps=60"])
    trials = [description.Trial(f"seed={seed}", {"seed": seed}) for seed in range(2)]
    with records.opened(tmp_path, base, trials) as sweep:
        other = make(sweep, 1) / "trial.json"
        records.write_json(other, {"attempts": [], "values": {"eval/accuracy": 0.5}})

        def damage() -> None:
            while not checkpoints.finished_steps(sweep.folder(trials[0])):
                time.sleep(0.05)
            other.write_text("{")

        threading.Thread(target=damage, daemon=True).start()
        with pytest.raises(ValueError, match="cannot be read"):
            running.run(sweep, jobs=2)
    (attempt,) = attempts(tmp_path, "seed=0")
    assert attempt["outcome"] == "stopped" and attempt["saved_step"] >= 2


@pytest.mark.by_hand
def test_two_launchers_share_a_sweep_and_one_is_stopped(long_config, undisturbed, tmp_path):
    with launch(long_config, tmp_path) as first:
        wait_for(lambda: in_the_middle(tmp_path, 2), first)
        with launch(long_config, tmp_path) as second:
            wait_for(lambda: in_the_middle(tmp_path, 8), second)
            first.send_signal(signal.SIGTERM)
            _, said = first.communicate(timeout=300)
            assert first.returncode == cli.STOPPED and "the same command goes on" in said, said
            assert "SIGTERM: what runs is saved first" in said
            _, said = second.communicate(timeout=900)
            assert second.returncode == cli.OK, said
    assert table(tmp_path) == table(undisturbed)
    outcomes = [[a["outcome"] for a in attempts(tmp_path, f.name)] for f in (tmp_path / "trials").iterdir()]
    assert all(found.count("finished") == 1 and set(found) <= {"finished", "stopped"} for found in outcomes)


def test_a_worker_without_work_ends_quietly_while_its_launcher_lives(config, tmp_path):
    with open_sweep(tmp_path, config, "seed=0") as sweep:
        records.write_json(make(sweep, 0) / "trial.json", {"attempts": [], "values": {"eval/accuracy": 0.5}})
    words = [sys.executable, "-m", "aaconv.sweep"]
    task = {"workdir": str(tmp_path), "trials": ["seed=0"], "until": {}, "retries": 0, "since": 0.0}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdin is not None and process.stderr is not None
        print(json.dumps(task), file=process.stdin, flush=True)
        assert process.stderr.read() == ""  # until it ends
        assert process.wait() == 0


def test_a_signal_at_the_end_of_a_trial_stops_the_sweep():
    with train.Signals() as outer, train.Signals() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        assert inner.caught == outer.caught == signal.SIGTERM


def test_gpus_are_seen_as_cuda_names_them():
    gpus = lambda **environment: running.visible_gpus(environment)
    assert gpus(CUDA_VISIBLE_DEVICES="2, GPU-8f,MIG-1/2") == ["2", "GPU-8f", "MIG-1/2"]
    assert gpus(CUDA_VISIBLE_DEVICES="-1") == gpus(CUDA_VISIBLE_DEVICES="") == []
    assert gpus(CUDA_VISIBLE_DEVICES="0", JAX_PLATFORMS="cpu") == []
    for platforms in ("", "cuda", "gpu", "cuda,cpu", "gpu,cpu"):
        assert gpus(CUDA_VISIBLE_DEVICES="0", JAX_PLATFORMS=platforms) == ["0"]


def test_every_processor_and_gpu_is_given_away_once():
    for jobs in (1, 2, 3):
        given = running.shares(jobs, range(7), list("abcd"))
        assert sorted(p for share in given for p in share.processors) == list(range(7))
        assert sorted(",".join(s.environment["CUDA_VISIBLE_DEVICES"] for s in given).split(",")) == list("abcd")
    crowded = running.shares(4, [3], ["a"])
    assert all(share.processors == (3,) for share in crowded)
    assert {share.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in crowded} == {"0.23"}
