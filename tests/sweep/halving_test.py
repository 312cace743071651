"""Who goes on at a rung, that it is never decided twice, and that who goes on is not changed by it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from aaconv import checkpoints, cli, config as config_lib, metrics, train
from aaconv.sweep import description, halving, records, running
from aaconv.sweep.halving import Halving

GRID = ("schedule.learning_rate=0.1,0.2,0.3,0.4,0.5,0.6", "seed=0:2")


def open_sweep(workdir: Path, config: str, *grid: str, overrides=("num_steps=40",)):
    base = config_lib.load(config, overrides)
    trials, _ = description.describe(base, description.from_flags(grid, []))
    return records.opened(checkpoints.check_writable(workdir), base, trials)


def reach(part: records.Sweep, value) -> None:
    """Writes down that the trials of a part were evaluated at its rung, as ``value(overrides)`` says."""
    for trial in part.trials:
        folder = part.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        found = {"eval/accuracy": value(trial.overrides), "eval/loss": 1.0}
        attempt = {"started": 1.0, "process": "here:1", "seconds": 1.0, "outcome": "paused"}
        record = {"attempts": [attempt], "rungs": {str(part.until[trial.name]): found}}
        records.write_json(folder / "trial.json", record)


def rates(part: records.Sweep) -> list[tuple[float, int]]:
    return [(trial.overrides["schedule.learning_rate"], trial.overrides["seed"]) for trial in part.trials]


def rates_alone(part: records.Sweep) -> list[float]:
    return [trial.overrides["schedule.learning_rate"] for trial in part.trials]


def test_the_best_of_each_rung_go_on_with_all_their_seeds(config, tmp_path):
    with open_sweep(tmp_path, config, *GRID) as sweep:
        parts = Halving.parse("4steps", 2, "eval/accuracy").parts(sweep)
        first = next(parts)
        assert len(first.trials) == 12 and set(first.until.values()) == {4}
        # The mean over seeds decides: 0.1 is best with one seed and bad with the other; 0.4 has diverged.
        by_rate = {
            0.1: (0.9, 0.0),
            0.2: (0.5, 0.5),
            0.3: (0.6, 0.7),
            0.4: (None, None),
            0.5: (0.6, 0.65),
            0.6: (0.4, 0.2),
        }
        reach(first, lambda o: by_rate[o["schedule.learning_rate"]][o["seed"]])
        second = next(parts)
        assert rates(second) == [(rate, seed) for rate in (0.2, 0.3, 0.5) for seed in (0, 1)]
        assert set(second.until.values()) == {8}
        reach(second, lambda o: o["schedule.learning_rate"])
        last = next(parts)
        assert rates(last) == [(0.5, 0), (0.5, 1)] and last.until == {}
        assert list(parts) == []
        found = {status.trial.name: status.state for status in records.statuses(sweep)}
    assert list(found.values()).count("eliminated") == 10
    assert found["learning_rate=0.5,seed=0"] == "paused"
    lines = halving.describe(tmp_path)
    assert lines[0] == "successive halving from 4 steps, one in 2 by eval/accuracy"
    assert lines[1].startswith("rung 1, at 4 steps: 3 of 6 go on: learning_rate=0.3 65.00%, learning_rate=0.5 62.50%")
    assert lines[1].endswith("; not learning_rate=0.1 45.00%")
    name = "learning_rate=0.4,seed=0"
    assert lines[2] == f"rung 1, without a value: {name}: eval/accuracy is not finite" and len(lines) == 5


def test_decisions_are_honoured_and_not_made_again(config, tmp_path):
    two = ("schedule.learning_rate=0.1,0.2",)
    chosen = Halving.parse("10 steps", 2, "eval/accuracy")
    with open_sweep(tmp_path, config, *two) as sweep:
        parts = chosen.parts(sweep)
        reach(next(parts), lambda o: o["schedule.learning_rate"])
        assert [trial.name for trial in next(parts).trials] == ["learning_rate=0.2"]
        both = dict.fromkeys([trial.name for trial in sweep.trials], 10)
        reach(sweep.part(both, both), lambda o: -o["schedule.learning_rate"])
    with open_sweep(tmp_path, config, *two) as sweep:
        (last,) = chosen.parts(sweep)
        assert [trial.name for trial in last.trials] == ["learning_rate=0.2"] and not last.until
        assert halving.recorded(tmp_path) == chosen
    with (
        open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2,0.3") as sweep,
        pytest.raises(ValueError, match=r"has decided among 2 trials, and there are others now \(learning_rate=0.3\)"),
    ):
        next(chosen.parts(sweep))


def test_another_halving_in_a_workdir_is_refused_also_before_anything_was_decided(config, tmp_path):
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2") as sweep:
        next(Halving.parse("10steps", 2, "eval/accuracy").parts(sweep))
        before = (tmp_path / "halving.json").read_text()
        words = "is halved from 10 steps, one in 2 by eval/accuracy, and not from 5 steps, one in 2 by eval/loss"
        with pytest.raises(ValueError, match=words):
            next(Halving.parse("5steps", 2, "eval/loss").parts(sweep))
        assert (tmp_path / "halving.json").read_text() == before
        (tmp_path / "halving.json").write_text('{"rungs": []}')
        with pytest.raises(ValueError, match="halving.json lacks 'minimum', so it says no successive halving"):
            halving.recorded(tmp_path)


BEST = "learning_rate=0.2"


@pytest.fixture
def trained(monkeypatch) -> tuple[list[tuple[str, int | None]], list[tuple[str, int | None, str]]]:
    """Nothing is trained: the accuracy is the learning rate. Gives what was called, and takes failures to come."""
    calls: list[tuple[str, int | None]] = []
    failures: list[tuple[str, int | None, str]] = []

    def train_nothing(config, workdir, *, progress, pause_step):
        calls.append((workdir.name, pause_step))
        for failure in failures:
            if failure[:2] == calls[-1]:
                failures.remove(failure)
                raise RuntimeError(failure[2])
        row = {"step": pause_step or config.num_steps, "eval/accuracy": config.schedule.learning_rate, "eval/loss": 1.0}
        with (workdir / "metrics.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        return row

    monkeypatch.setattr(train, "train", train_nothing)
    return calls, failures


def test_a_trial_that_fails_is_tried_again_as_often_as_asked_at_each_rung(config, tmp_path, trained):
    calls, failures = trained
    failures += [(BEST, step, "out of memory") for step in (4, 4, 8, 8)]
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.2,0.1,0.05,0.01") as sweep:
        found = running.run(sweep, retries=2, parts=Halving.parse("4steps", 2, "eval/accuracy").parts)
    assert [step for name, step in calls if name == BEST] == [4, 4, 4, 8, 8, 8, None]
    assert [status.state for status in found] == ["finished", "eliminated", "eliminated", "eliminated"]
    assert not any("without a value" in line for line in halving.describe(tmp_path))


def test_a_trial_without_attempts_left_is_decided_on_with_its_reason(config, tmp_path, trained):
    _, failures = trained
    failures += [(BEST, 4, "out of memory")] * 2
    grid = "schedule.learning_rate=0.2,0.1"
    with open_sweep(tmp_path, config, grid) as sweep:
        found = running.run(sweep, retries=1, parts=Halving.parse("4steps", 2, "eval/accuracy").parts)
    assert [status.state for status in found] == ["failed", "finished"]
    _, line, reason = halving.describe(tmp_path)
    assert line.endswith("go on: learning_rate=0.1 10.00%; not learning_rate=0.2 (no value)")
    assert reason == f"rung 1, without a value: {BEST}: failed in 2 attempts: RuntimeError: out of memory"


def test_where_every_trial_failed_nothing_is_decided_and_they_are_tried_again(config, tmp_path, trained):
    calls, failures = trained
    failures += [(name, 4, "no more disk") for name in ("learning_rate=0.1", BEST)]
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2") as sweep:
        parts = Halving.parse("4steps", 2, "eval/accuracy").parts
        found = running.run(sweep, parts=parts)
        assert [status.state for status in found] == ["failed", "failed"] and len(calls) == 2
        assert halving.describe(tmp_path) == ["successive halving from 4 steps, one in 2 by eval/accuracy"]
        found = running.run(sweep, parts=parts)
    assert [status.state for status in found] == ["eliminated", "finished"]


def test_a_cell_of_which_a_seed_is_missing_comes_after_the_whole_ones(config, tmp_path):
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2,0.3", "seed=0:2") as sweep:
        parts = Halving.parse("4steps", 3, "eval/accuracy").parts(sweep)
        first = next(parts)
        accuracies = {(0.1, 0): 0.9, (0.1, 1): None, (0.2, 0): 0.5, (0.2, 1): 0.5, (0.3, 0): 0.4, (0.3, 1): 0.4}
        reach(first, lambda o: accuracies[o["schedule.learning_rate"], o["seed"]])
        assert rates(next(parts)) == [(0.2, 0), (0.2, 1)]
    decided = json.loads((tmp_path / "halving.json").read_text())["rungs"][0]
    assert list(decided["values"]) == ["learning_rate=0.2", "learning_rate=0.3", "learning_rate=0.1"]
    assert decided["seeds"]["learning_rate=0.1"] == [1, 2]
    assert decided["without"] == {"learning_rate=0.1,seed=1": "eval/accuracy is not finite"}


def test_trials_that_ran_before_and_cannot_be_judged_are_named_before_anything_runs(config, tmp_path):
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2,0.3") as sweep:
        rows = [{"step": 4, "train/loss": 1.0}, {"step": 20, "eval/accuracy": 0.5}, {"step": 40, "eval/accuracy": 0.9}]
        for trial in sweep.trials[:2]:
            folder = sweep.folder(trial)
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        # One is finished; the other was stopped on its way, behind the first rung.
        records.write_json(sweep.folder(sweep.trials[0]) / "trial.json", {"values": {"eval/accuracy": 0.9}})
        (sweep.folder(sweep.trials[1]) / "checkpoints" / "30").mkdir(parents=True)
        with pytest.raises(ValueError, match="2 of 3 ran on without being evaluated there: learning_rate=0.1 at ") as e:
            next(Halving.parse("4steps", 3, "eval/accuracy").parts(sweep))
        assert "they were evaluated at step 20, 40" in str(e.value)
        assert len(next(Halving.parse("20steps", 3, "eval/accuracy").parts(sweep)).trials) == 3


def test_a_trial_that_went_past_the_rung_meanwhile_is_named_and_nothing_is_decided(config, tmp_path):
    """As where it is run by a launcher that was started without --halving."""
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2,0.3") as sweep:
        parts = Halving.parse("4steps", 3, "eval/accuracy").parts(sweep)
        reach(next(parts), lambda o: o["schedule.learning_rate"])
        best = sweep.folder(sweep.trials[2])
        records.write_json(best / "trial.json", {"attempts": [], "values": {"eval/accuracy": 0.9}})
        row = {"step": 40, "eval/accuracy": 0.9}
        (best / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="1 of 3 ran on without being evaluated there: learning_rate=0.3 at") as e:
            next(parts)
    assert str(e.value).endswith(f"(they were evaluated at step 40), and move {tmp_path / 'halving.json'} away")
    assert json.loads((tmp_path / "halving.json").read_text())["rungs"] == []


def test_a_trial_that_was_stopped_is_run_on_before_its_rung_is_decided(config, tmp_path):
    """As where this launcher had given it up, and another took it and was stopped."""
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2,0.3") as sweep:
        parts = Halving.parse("4steps", 3, "eval/accuracy").parts(sweep)
        reach(next(parts), lambda o: o["schedule.learning_rate"])
        failed, _, stopped = (sweep.folder(trial) / "trial.json" for trial in sweep.trials)
        attempts = [{"started": 1.0, "outcome": "failed", "error": "no more disk"}]
        records.write_json(failed, {"attempts": attempts})
        records.write_json(stopped, {"attempts": [*attempts, {"started": 2.0, "outcome": "stopped"}]})
        again = next(parts)
        assert rates_alone(again) == [0.3] and again.until[again.trials[0].name] == 4
        reach(again, lambda o: o["schedule.learning_rate"])
        assert rates_alone(next(parts)) == [0.3]
    decided = json.loads((tmp_path / "halving.json").read_text())["rungs"][0]
    assert decided["without"] == {"learning_rate=0.1": "failed: no more disk"}


def test_a_cell_without_any_value_does_not_go_on_where_there_is_room(config, tmp_path):
    with open_sweep(tmp_path, config, "schedule.learning_rate=0.1,0.2,0.3,0.4") as sweep:
        parts = Halving.parse("4steps", 2, "eval/accuracy").parts(sweep)
        reach(next(parts), lambda o: 0.5 if o["schedule.learning_rate"] == 0.3 else None)
        assert rates_alone(next(parts)) == [0.3]


def test_trials_are_one_cell_by_their_values_however_they_are_described(config, tmp_path):
    base = config_lib.load(config, ["num_steps=40"])
    cells = [{"seed": 0}, {"model.width": 1, "seed": 1}, {"model.width": 2, "seed": 0}, {"model.width": 2, "seed": 1}]
    trials = [description.Trial(description.trial_name(cell), cell) for cell in cells]  # width is 1 in the config
    with records.opened(tmp_path, base, trials) as sweep:
        parts = Halving.parse("4steps", 2, "eval/accuracy").parts(sweep)
        first = next(parts)
        reach(first, lambda o: 0.5 if "model.width" not in o else 0.9 if o["model.width"] == 1 else 0.6)
        assert [trial.name for trial in next(parts).trials] == ["seed=0", "width=1,seed=1"]
    decided = json.loads((tmp_path / "halving.json").read_text())["rungs"][0]
    assert decided["values"] == {"width=1": 0.7, "width=2": 0.6}


def test_a_lower_loss_is_better_and_epochs_are_counted_by_each_trial(config, tmp_path):
    with open_sweep(tmp_path, config, "batch_size=32,64,128", overrides=("num_steps=None", "num_epochs=4.0")) as sweep:
        parts = Halving.parse("1epoch", 3, "eval/loss").parts(sweep)
        first = next(parts)
        assert first.until == {"batch_size=32": 44, "batch_size=64": 22, "batch_size=128": 11}
        for trial in first.trials:
            loss = {32: 0.5, 64: 0.4, 128: math.inf}[trial.overrides["batch_size"]]
            sweep.folder(trial).mkdir(parents=True)
            at_rung = {str(first.until[trial.name]): {"eval/loss": loss if math.isfinite(loss) else None}}
            records.write_json(sweep.folder(trial) / "trial.json", {"attempts": [], "rungs": at_rung})
        assert [trial.name for trial in next(parts).trials] == ["batch_size=64"]
    decided = json.loads((tmp_path / "halving.json").read_text())["rungs"][0]
    assert list(decided["values"]) == ["batch_size=64", "batch_size=32", "batch_size=128"]
    assert decided["eliminated"] == ["batch_size=32", "batch_size=128"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--halving", "2 days"], "--halving '2 days' must be the first rung's budget, such as 2epochs or 500steps"),
        (["--halving", "0epochs"], "must be the first rung's budget"),
        (["--halving", "1.5steps"], "steps are whole; write 2steps"),
        (["--halving", "1epoch", "--halving-factor", "1"], "--halving-factor 1 must be at least 2"),
        (["--halving", "1epoch", "--halving-metric", "eval/los"], "did you mean 'eval/loss'"),
        (["--halving-factor", "2"], "--halving-factor belongs to --halving BUDGET"),
        (["--halving", "2steps"], "there is but one trial, seeds aside, and nothing to choose from"),
        (["--halving", "9steps", "--grid", "model.width=1,2"], "the runs end after 4 steps: give a smaller budget"),
        (["--halving", "2steps", "--grid", "num_steps=4,8"], "have from 4 to 8: give all one length"),
    ],
)
def test_wrong_flags_are_answered_in_one_line(sweep, tmp_path, flags, words):
    grid = [] if "--grid" in flags else ["--grid", "seed=0,1"]
    answer = sweep("--config", "CONFIG", "--workdir", tmp_path / "run", *grid, *flags)
    assert answer.code == cli.WRONG_INPUT and words in answer.err.splitlines()[-1], answer.err


@pytest.mark.slow
def test_who_goes_on_is_what_it_is_without_halving(sweep, config, tmp_path):
    """And the trial that does not is left where it was; the flags need not be repeated."""
    line = ("--config", "CONFIG", "--grid", "schedule.learning_rate=0.1,1e-6", "--workdir", tmp_path / "halved")
    answer = sweep(*line, "--halving", "2steps", "--halving-factor", "2", "--halving-metric", "eval/loss")
    assert answer.code == cli.OK, answer.err
    kept, out = "learning_rate=0.1", "learning_rate=1e-06"
    if "not learning_rate=0.1 " in " ".join(halving.describe(tmp_path / "halved")):
        kept, out = out, kept
    assert "1/2 finished, 1 eliminated" in answer.out
    folder = tmp_path / "halved" / "trials"
    assert checkpoints.finished_steps(folder / out)[-1] == 2
    answer = sweep(*line)
    assert answer.code == cli.OK and "going on with successive halving from 2 steps" in answer.err
    answer = sweep("status", "--workdir", tmp_path / "halved")
    assert "eliminated" in answer.out and "rung 1, at 2 steps: 1 of 2 go on" in answer.out
    answer = sweep("report", "--workdir", tmp_path / "halved")
    assert "- rung 1, at 2 steps: 1 of 2 go on" in answer.out and "not in the means, eliminated" in answer.out
    attempts = json.loads((folder / kept / "trial.json").read_text())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["paused", "finished"]
    base = config_lib.load(config, [f"schedule.learning_rate={kept.partition('=')[2]}"])
    train.train(base, tmp_path / "alone", progress=metrics.Progress())
    rows = lambda workdir: [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in metrics.read_rows(workdir)
        if row["step"] == 4 or "train/loss" in row
    ]
    assert rows(folder / kept) == rows(tmp_path / "alone")
