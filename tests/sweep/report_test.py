"""The table over seeds and the pictures, of results that are made up."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from aaconv import checkpoints, cli, config as config_lib
from aaconv.sweep import description, records, report


def made_up(workdir: Path, config: str, grid: list[str], together: list[str], result, **ran) -> records.Sweep:
    """A sweep whose finished trials have the accuracy ``result(overrides)``; None: not finished."""
    base = config_lib.load(config)
    cells = description.from_flags(grid, together)
    trials = [description.Trial(description.trial_name(cell), cell, 75_002, 1_494_272) for cell in cells]
    with records.opened(checkpoints.check_writable(workdir), base, trials) as sweep:
        for trial in trials:
            value = result(trial.overrides)
            if value is not None:
                folder = sweep.folder(trial)
                folder.mkdir(parents=True)
                attempt = {"started": 1.0, "seconds": 2.0, "outcome": "finished"}
                attempt |= {name: of(trial.overrides) for name, of in ran.items()}
                values = {"step": 4, "epoch": 1.0, "eval/accuracy": value, "eval/loss": 2 - value}
                records.write_json(folder / "trial.json", {"attempts": [attempt], "values": values})
    return sweep


def test_mean_deviation_and_interval_over_seeds(config, tmp_path):
    accuracy = lambda o: 0.9 + o["model.width"] / 100 + (o["seed"] - 1) * o["seed"] / 1000
    sweep = made_up(tmp_path, config, ["model.width=1,2", "seed=0:4"], [], accuracy)
    first, second = report.groups(sweep, report.finished(sweep)[0], "eval/accuracy")
    for group, width in ((first, 1), (second, 2)):
        results = [accuracy({"model.width": width, "seed": seed}) for seed in range(4)]
        assert group.values == {"model.width": width} and group.results == tuple(results)
        low, high = stats.t.interval(0.95, 3, statistics.mean(results), stats.sem(results))
        assert group.deviation == pytest.approx(statistics.stdev(results))
        assert (group.mean - group.confidence, group.mean + group.confidence) == pytest.approx((low, high))


def test_one_seed_has_no_spread_and_nan_spoils_only_its_own_row(config, tmp_path):
    result = lambda o: math.nan if o["model.width"] == 3 else 0.5
    sweep = made_up(tmp_path, config, [], ["model.width=1,3,3", "seed=0,0,1"], result)
    header, rows = report.table(sweep, report.finished(sweep)[0], "eval/accuracy")
    assert header[:5] == ["width", "seeds", "eval/accuracy (%)", "deviation", "95% interval"]
    assert [row[:5] for row in rows] == [["1", "1", "50.00", "–", "–"], ["3", "2", "–", "–", "–"]]


def test_trials_that_override_less_have_the_values_of_the_config(config, tmp_path):
    made_up(tmp_path, config, ["seed=0,1"], [], lambda o: 0.5)
    sweep = made_up(tmp_path, config, ["model.width=2", "seed=0,1"], [], lambda o: 0.6)
    rows = report.groups(sweep, report.finished(sweep)[0], "eval/accuracy")
    assert {(row.values["model.width"], row.mean, len(row.results)) for row in rows} == {(2, 0.6, 2), (1, 0.5, 2)}


def test_a_report_says_what_is_missing_and_what_should_not_differ(config, tmp_path, sweep):
    result = lambda o: None if o["seed"] == 2 else 0.5
    made_up(tmp_path, config, ["seed=0:3"], [], result, jax=lambda o: f"0.1{o['seed']}", device=lambda o: "cpu")
    answer = sweep("report", "--workdir", tmp_path)
    assert answer.code == cli.OK, answer.err
    assert "not in the table, waiting: seed=2" in answer.out
    assert (
        "the trials differ in their jax: 0.10: seed=0; 0.11: seed=1" in answer.out
        and "in their device" not in answer.out
    )
    assert "2 of 3 trials" in (tmp_path / "report.md").read_text()


def test_quotes_commas_and_shell_characters_come_back_whole(config, tmp_path, sweep):
    import csv

    values = ["a,b", 'say "hi"', "it's", "$(touch x)|;&", "two words"]
    flag = "data.data_dir=" + ",".join(map(repr, values))
    made_up(tmp_path, config, [flag], [], lambda o: 0.5)
    assert sweep("report", "--workdir", tmp_path).code == cli.OK
    with (tmp_path / "results.csv").open() as file:
        found = [row["data.data_dir"] for row in csv.DictReader(file) if row["metric"] == "eval/accuracy"]
    assert found == values
    assert [trial.overrides["data.data_dir"] for trial in records.load(tmp_path).trials] == values


@pytest.mark.parametrize(
    ("grid", "together", "pictures"),
    [
        (["seed=0:2"], ["model.kappa=0.1,0.2", "model.upsilon=0.1,0.2"], {"against_model_kappa"}),
        (
            ["model.kappa=0.1,0.2", "model.num_heads=1,2,4", "seed=0:2"],
            [],
            {"against_model_kappa", "against_model_num_heads", "over_model_kappa_and_model_num_heads"},
        ),
        (["model.name=wrn,aa_wrn", "seed=0:2"], [], set()),
        (["model.name=wrn,aa_wrn", "model.width=1,2"], [], {"against_model_width"}),
    ],
)
def test_pictures_of_each_number_that_is_set(config, tmp_path, grid, together, pictures):
    result = lambda o: 0.5 + sum(x for x in o.values() if isinstance(x, float | int)) / 100
    sweep = made_up(tmp_path, config, grid, together, result)
    paths = report.draw(sweep, report.finished(sweep)[0], "eval/accuracy")
    assert {path.stem.removeprefix("eval_accuracy_") for path in paths} == pictures
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 200 and len(np.unique(np.asarray(picture.convert("L")))) > 10
