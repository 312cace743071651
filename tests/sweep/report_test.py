"""The table over seeds and the pictures, of results that are made up."""

from __future__ import annotations

import math
import re
import statistics

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from aaconv import cli
from aaconv.plots import style
from aaconv.sweep import pictures, records, report, results


def cells_of(sweep: records.Sweep, metric: str = "eval/accuracy") -> list[results.Cell]:
    found = records.statuses(sweep)
    return results.cells(sweep, found, results.finished(sweep, found)[0], metric)


def test_mean_deviation_and_interval_over_seeds(made_up, config, tmp_path):
    accuracy = lambda o: 0.9 + o["model.width"] / 100 + (o["seed"] - 1) * o["seed"] / 1000
    sweep = made_up(tmp_path, config, ["model.width=1,2", "seed=0:4"], [], accuracy)
    first, second = cells_of(sweep)
    for cell, width in ((first, 1), (second, 2)):
        several = [accuracy({"model.width": width, "seed": seed}) for seed in range(4)]
        assert cell.values == {"model.width": width} and cell.results == tuple(several)
        low, high = stats.t.interval(0.95, 3, statistics.mean(several), stats.sem(several))
        assert cell.standard_deviation == pytest.approx(statistics.stdev(several))
        assert (cell.mean - cell.confidence, cell.mean + cell.confidence) == pytest.approx((low, high))


def test_one_seed_has_no_spread_and_nan_spoils_only_its_own_row(made_up, config, tmp_path):
    result = lambda o: math.nan if o["model.width"] == 3 else 0.5
    sweep = made_up(tmp_path, config, [], ["model.width=1,3,3", "seed=0,0,1"], result)
    header, rows = report.table(cells_of(sweep), "eval/accuracy")
    assert header[:5] == ["width", "seeds", "eval/accuracy (%)", "standard deviation", "95% interval"]
    assert [row[:5] for row in rows] == [
        ["1", "1", "50.00", "–", "one seed"],
        ["3", "2", "–", "–", "2 of 2 not finite"],
    ]
    said = report.best(cells_of(sweep), "eval/accuracy")
    assert said.startswith("Best mean: 50.00% with width=1; one seed")
    assert said.endswith(" Not compared, since results are not finite: 1 cell.")


@pytest.mark.parametrize(("spread", "is_said"), [(0.01, False), (0.2, True)])
def test_an_interval_beyond_every_accuracy_is_explained_once(made_up, config, tmp_path, sweep, spread, is_said):
    made_up(tmp_path, config, ["model.width=1,2", "seed=0:2"], [], lambda o: 0.5 + spread * o["seed"])
    answer = sweep("report", "--workdir", tmp_path, "--metric", "eval/loss", "--metric", "eval/accuracy")
    assert answer.out.count("accuracies end at 0 and 100%") == is_said
    assert (tmp_path / "report.html").read_text().count("accuracies end at 0 and 100%") == is_said


UNSTABLE = {  # by width: the highest mean is of the seeds that did not diverge
    1: (0.5, 0.6, 0.55),
    2: (0.9, "NonFiniteLossError: nan in the loss", 0.8),
    3: ("NonFiniteLossError: nan in the loss",) * 3,
    4: (0.4, 0.4, 0.4),
    5: (None, None, None),
}


def test_a_cell_with_missing_seeds_says_so_and_is_neither_best_nor_in_front(made_up, config, tmp_path, sweep):
    result = lambda o: UNSTABLE[o["model.width"]][o["seed"]]
    made = made_up(tmp_path, config, ["model.width=1:6", "seed=0:3"], [], result, cost=lambda o: o["model.width"])
    cells = cells_of(made)
    _, rows = report.table(cells, "eval/accuracy")
    assert [row[:5] for row in rows[1:3]] == [
        ["2", "2 of 3", "85.00", "7.07", "21.47 to 148.53"],
        ["3", "0 of 3", "–", "–", "–"],
    ]
    assert [row[:3] for row in rows] == [
        ["1", "3", "55.00"],
        ["2", "2 of 3", "85.00"],
        ["3", "0 of 3", "–"],
        ["4", "3", "40.00"],
    ]  # of width 5 nothing is known yet
    answer = sweep("report", "--workdir", tmp_path)
    assert "Best mean: 55.00% with width=1; its interval overlaps with that of 0 of 1 other cell." in answer.out
    assert "seeds are missing: 2 cells, among them 85.00% with width=2 (2 of 3 seeds)." in answer.out
    front = results.in_front(cells, "eval/accuracy", lambda cell: cell.trial.parameters)
    assert [cell.values["model.width"] for cell in front] == [1]
    page = (tmp_path / "report.html").read_text()
    assert '<td class="lacking">2 of 3</td>' in page and "Hollow: results of some seeds are missing" in page
    # Where no cell is whole, they are compared all the same.
    lacking = [cell for cell in cells if not cell.is_whole]
    assert report.best(lacking, "eval/accuracy") == "Best mean: 85.00% with width=2 (2 of 3 seeds)."


def test_an_eliminated_cell_of_which_a_seed_failed_is_left_out_as_others_are(made_up, config, tmp_path):
    result = lambda o: "Killed" if (o["model.width"], o["seed"]) == (2, 1) else 0.5 if o["model.width"] == 1 else None
    sweep = made_up(tmp_path, config, ["model.width=1:4", "seed=0:2"], [], result)
    out = [trial.name for trial in sweep.trials if trial.overrides["model.width"] > 1]
    records.write_json(tmp_path / "halving.json", {"rungs": [{"eliminated": out}]})
    assert [cell.values["model.width"] for cell in cells_of(sweep)] == [1]


def test_a_report_is_of_one_moment(made_up, config, tmp_path, monkeypatch):
    """A trial that finishes while a report is written is in all of its tables, or in none."""
    sweep = made_up(tmp_path, config, ["seed=0:2"], [], lambda o: None if o["seed"] else 0.5)
    finished = results.finished

    def and_then_another_finishes(*args):
        answer = finished(*args)
        if not (folder := sweep.folder(sweep.trials[1])).exists():
            folder.mkdir()
            (folder / "trial.json").write_bytes((sweep.folder(sweep.trials[0]) / "trial.json").read_bytes())
        return answer

    monkeypatch.setattr(results, "finished", and_then_another_finishes)
    written = report.write_report(sweep)
    assert "1 of 2 trials" in written.text and "not in the means, waiting: seed=1" in written.text
    assert "seed=1" not in (tmp_path / "results.csv").read_text()


def test_pictures_mark_cells_with_missing_seeds(made_up, config, tmp_path):
    result = lambda o: None if o == {"model.kappa": 0.2, "model.upsilon": 0.1, "seed": 1} else 0.5
    grid = [*BOTH, "seed=0:2"]
    sweep = made_up(tmp_path, config, grid, [], result, cost=lambda o: int(1e7 * o["model.kappa"]))
    drawn = {picture.name: picture for picture in pictures.pictures(sweep, cells_of(sweep), "eval/accuracy")}
    with style.styled():
        figures = {name.removeprefix("eval_accuracy_"): picture.draw() for name, picture in drawn.items()}
    marked = [
        line.get_xydata()
        for axes in figures["against_model_kappa"].axes
        for line in axes.lines
        if line.get_marker() != "None" and line.get_markerfacecolor() != line.get_color() and line.get_markeredgewidth()
    ]
    assert [xy.tolist() for xy in marked if len(xy) == 1] == [[[0.2, 50.0]]]
    texts = [text.get_text() for text in figures["over_model_kappa_and_model_upsilon"].axes[0].texts]
    assert sorted(texts) == ["50.00", "50.00", "50.00", "50.00\n1 of 2"]
    dashed = [line for axes in figures[CURVE].axes for line in axes.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1 and "Dashed: " in drawn[f"eval_accuracy_{CURVE}"].note


def test_hollow_markers_are_in_a_page_as_well(made_up, config, tmp_path):
    result = lambda o: None if o == {"model.kappa": 0.2, "seed": 1} else 0.5
    sweep = made_up(tmp_path, config, ["model.kappa=0.1,0.2", "seed=0:2"], [], result)
    (against, *_) = pictures.pictures(sweep, cells_of(sweep), "eval/accuracy")
    for dark in (False, True):
        drawn = style.svg(against.draw, dark=dark)
        assert re.search(r'style="fill-opacity: 0; stroke: #\w+; stroke-width: 1\.2"', drawn)


def test_an_unknown_metric_is_refused_at_once_with_close_ones(made_up, config, tmp_path, sweep):
    made_up(tmp_path, config, ["seed=0:2"], [], lambda o: "Killed")
    answer = sweep("report", "--workdir", tmp_path, "--metric", "eval/loss", "--metric", "eval/los")
    assert answer.code == cli.WRONG_INPUT
    assert answer.err.startswith("aaconv: error: no trial has the metric 'eval/los'; did you mean 'eval/loss'")


def test_trials_that_override_less_have_the_values_of_the_config(made_up, config, tmp_path):
    made_up(tmp_path, config, ["seed=0,1"], [], lambda o: 0.5)
    sweep = made_up(tmp_path, config, ["model.width=2", "seed=0,1"], [], lambda o: 0.6)
    rows = cells_of(sweep)
    assert {(row.values["model.width"], row.mean, len(row.results)) for row in rows} == {(2, 0.6, 2), (1, 0.5, 2)}


def test_a_report_says_what_is_missing_and_what_should_not_differ(made_up, config, tmp_path, sweep):
    result = lambda o: None if o["seed"] == 2 else 0.5
    made_up(tmp_path, config, ["seed=0:3"], [], result, jax=lambda o: f"0.1{o['seed']}", device=lambda o: "cpu")
    answer = sweep("report", "--workdir", tmp_path)
    assert answer.code == cli.OK, answer.err
    assert "not in the means, waiting: seed=2" in answer.out
    assert (
        "the trials differ in their jax: 0.10 ran seed=0; 0.11 ran seed=1" in answer.out
        and "in their device" not in answer.out
    )
    assert "2 of 3 trials" in (tmp_path / "report.md").read_text()


def test_quotes_commas_and_shell_characters_come_back_whole(made_up, config, tmp_path, sweep):
    import csv

    values = ["a,b", 'say "hi"', "it's", "$(touch x)|;&", "two words"]
    flag = "data.data_dir=" + ",".join(map(repr, values))
    made_up(tmp_path, config, [flag], [], lambda o: 0.5)
    assert sweep("report", "--workdir", tmp_path).code == cli.OK
    with (tmp_path / "results.csv").open() as file:
        found = [row["data.data_dir"] for row in csv.DictReader(file) if row["metric"] == "eval/accuracy"]
    assert found == values
    assert [trial.overrides["data.data_dir"] for trial in records.load(tmp_path).trials] == values


def test_failed_diverged_and_waiting_trials_are_told_apart(made_up, config, tmp_path, sweep):
    errors = {0: None, 1: "NonFiniteLossError: nan in the loss", 2: "Killed | <b>&", 3: 0.5}
    made_up(tmp_path, config, ["seed=0:4"], [], lambda o: errors[o["seed"]])
    answer = sweep("report", "--workdir", tmp_path)
    assert answer.code == cli.OK and "1 of 4 trials finished, 1 diverged, 1 failed, 1 waiting" in answer.out
    assert "diverged: seed=1: NonFiniteLossError: nan in the loss" in answer.out
    page = (tmp_path / "report.html").read_text()
    assert "Killed | &lt;b&gt;&amp;" in page and '<td class="text diverged">diverged</td>' in page


def test_a_sweep_without_a_finished_trial_is_told_and_nothing_is_written(made_up, config, tmp_path, sweep):
    tmp_path /= "my sweep"
    made_up(tmp_path, config, ["seed=0:2"], [], lambda o: "NonFiniteLossError: nan in the loss" if o["seed"] else None)
    before = sorted(path.name for path in tmp_path.iterdir())
    answer = sweep("report", "--workdir", tmp_path)
    assert answer.code == cli.TRIAL_FAILED and "0 of 2 trials finished, 1 diverged, 1 waiting" in answer.err
    assert f"`aaconv sweep status --workdir '{tmp_path}'` says how it goes" in answer.err
    assert "diverged: seed=1: NonFiniteLossError: nan in the loss" in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_parquet_table_is_the_csv_table_with_types(made_up, config, tmp_path, sweep):
    import csv

    parquet = pytest.importorskip("pyarrow.parquet")
    flags = ["model.stages=(2,3),(3,)", "optimizer.nesterov=true,false", "seed=0:2"]
    made_up(tmp_path, config, flags, [], lambda o: 0.5 + o["seed"] / 10)
    assert sweep("report", "--workdir", tmp_path, "--format", "parquet").code == cli.OK
    rows = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    with (tmp_path / "results.csv").open() as file:
        plain = list(csv.DictReader(file))
    assert list(rows[0]) == list(plain[0]) and len(rows) == len(plain) == 8 * 2
    assert [str(row["value"]) for row in rows] == [row["value"] for row in plain]
    assert rows[0]["model.stages"] == [2, 3] and rows[0]["optimizer.nesterov"] is True and rows[0]["revision"] is None
    assert plain[0]["optimizer.nesterov"] == "true" and plain[0]["revision"] == ""
    other = tmp_path / "other.parquet"
    assert results.write_results(records.load(tmp_path), other) == other
    assert parquet.read_table(other).to_pylist() == rows
    answer = sweep("report", "--workdir", tmp_path, "--table", tmp_path / "table.xlsx")
    assert answer.code == cli.WRONG_INPUT and "neither in .csv nor in .parquet" in answer.err


def test_the_front_is_what_nothing_beats_for_as_little(made_up, config, tmp_path):
    accuracies = {1: 0.5, 2: 0.4, 3: 0.7, 4: 0.7, 5: math.nan, 6: 0.8}
    sweep = made_up(
        tmp_path,
        config,
        ["model.width=1:7"],
        [],
        lambda o: accuracies[o["model.width"]],
        cost=lambda o: o["model.width"],
    )
    cost = lambda cell: cell.trial.parameters
    front = results.in_front(cells_of(sweep), "eval/accuracy", cost)
    assert [cost(cell) for cell in front] == [1, 3, 6]
    losses = cells_of(sweep, "eval/loss")  # 2 - accuracy
    assert [cost(cell) for cell in results.in_front(losses, "eval/loss", cost)] == [1, 3, 6]


KAPPA, BOTH = ["model.kappa=0.1,0.2"], ["model.kappa=0.1,0.2", "model.upsilon=0.1,0.2"]
CURVE = "while_training"


@pytest.mark.parametrize(
    ("grid", "together", "names"),
    [
        (["seed=0:2"], BOTH, {"against_model_kappa", CURVE}),
        (
            [*KAPPA, "model.num_heads=1,2,4", "seed=0:2"],
            [],
            {"against_model_kappa", "against_model_num_heads", "over_model_kappa_and_model_num_heads", CURVE},
        ),
        (
            [*BOTH, "model.num_heads=1,2,4", "seed=0:2"],
            [],
            {
                "against_model_kappa",
                "against_model_num_heads",
                "against_model_upsilon",
                "over_model_kappa_and_model_upsilon",
                CURVE,
            },
        ),
        (["model.name=wrn,aa_wrn", "seed=0:2"], [], {"against_model_name", CURVE}),
        (["seed=0:2"], [], {CURVE}),
        # At random: no two trials differ in one key alone, and neither key says the other.
        (
            [],
            ["model.kappa=0.1,0.4,0.3,0.2", "schedule.learning_rate=0.2,0.1,0.4,0.3"],
            {"against_model_kappa", "against_schedule_learning_rate", CURVE},
        ),
        (
            [*BOTH, "model.num_heads=1,2", "batch_size=8,16", "model.name=wrn,aa_wrn"],
            [],
            set(),  # five things at once are no picture
        ),
    ],
)
def test_pictures_are_those_that_the_sweep_makes_sense_of(made_up, config, tmp_path, grid, together, names):
    sweep = made_up(tmp_path, config, grid, together, lambda o: 0.5 + o.get("seed", 0) / 100)
    found = pictures.pictures(sweep, cells_of(sweep), "eval/accuracy")
    assert {picture.name.removeprefix("eval_accuracy_") for picture in found} == names


def test_what_varies_at_one_cell_of_the_rest_is_drawn_there_alone(made_up, config, tmp_path):
    together = ["model.kappa=0.1,0.2,0.4,0.2,0.2", "model.num_heads=4,4,4,1,2"]
    sweep = made_up(tmp_path, config, ["seed=0:2"], together, lambda o: 0.5)
    found = {picture.name: picture for picture in pictures.pictures(sweep, cells_of(sweep), "eval/accuracy")}
    heads = found["eval_accuracy_against_model_num_heads"]
    assert heads.title == "eval/accuracy against num_heads where kappa=0.2"
    (axes,) = heads.draw().axes
    assert [f"{tick:g}" for tick in axes.get_xticks()] == ["1", "2", "4"]


@pytest.mark.parametrize("differ", [True, False])
def test_a_front_needs_costs_that_differ(made_up, config, tmp_path, differ):
    cost = lambda o: int(1e7 * o["model.kappa"]) if differ else 10**6
    sweep = made_up(tmp_path, config, ["seed=0:2", *KAPPA], [], lambda o: 0.5, cost=cost)
    found = {picture.name for picture in pictures.pictures(sweep, cells_of(sweep), "eval/accuracy")}
    assert ("eval_accuracy_against_cost" in found) == differ


def test_the_page_needs_nothing_else_and_shows_each_picture_light_and_dark(made_up, config, tmp_path, sweep):
    result = lambda o: 0.5 + o["model.kappa"] + o["seed"] / 100
    made_up(tmp_path, config, [*KAPPA, "seed=0:2"], [], result, cost=lambda o: int(1e7 * o["model.kappa"]))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/of_an_earlier_report.png").touch()
    answer = sweep("report", "--workdir", tmp_path, "--metric", "eval/accuracy", "--metric", "eval/accuracy")
    assert answer.code == cli.OK, answer.err
    drawn = sorted(path.stem for path in (tmp_path / "pictures").iterdir())
    assert drawn == [f"eval_accuracy_{end}" for end in ("against_cost", "against_model_kappa", CURVE)]
    for path in (tmp_path / "pictures").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 200 and len(np.unique(np.asarray(picture.convert("L")))) > 10
    page = (tmp_path / "report.html").read_text()
    assert "kappa=0.1,seed=0</td>" in page  # where there is room, names are not wrapped
    assert page.count('<img src="data:image/svg+xml;base64,') == page.count('prefers-color-scheme: dark)" srcset') == 3
    assert not re.search(r"(src|srcset|href)=\"(?!data:)|https?:|@import|url\(", page)
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith(answer.out.split("\n\n")[0]) and markdown.count("](pictures/") == 3
