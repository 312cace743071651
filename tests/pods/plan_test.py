"""`aaconv plan`: stages from the last one backwards, as far as memory allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aaconv import cli, config as config_lib
from aaconv.bench.ahead import Needs
from aaconv.pods import plan
from aaconv.pods.programs import TRAINING, Program

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = str(REPOSITORY / "configs/digits.py")


def program(gigabytes, refused=""):
    needs = Needs(refused=refused, required=int(gigabytes * 1e9)) if refused else Needs(int(gigabytes * 1e9), 0, 0)
    return Program(TRAINING, 8, 1, {}, 0, needs, 1.0, 1.0, (), (), 1.0)


def candidates(published, ours):
    pairs = zip(published, ours, strict=True)
    return tuple(
        plan.Candidate(tuple(range(4 - n, 5)), program(a), program(b), "blockwise") for n, (a, b) in enumerate(pairs)
    )


def test_the_largest_set_that_fits_is_chosen():
    found = plan.Plan(candidates([1, 2, 9, 40], [1, 2, 3, 4]), memory=int(5e9))
    assert found.published == (3, 4) and found.ours == (1, 2, 3, 4)
    text = plan.table(found)
    assert "| 1,2,3,4 " in text and "ours (blockwise)" in text and "10.00" in text


def test_what_comes_after_a_set_that_does_not_fit_is_not_chosen():
    found = plan.Plan(candidates([9, 9, 9, 9], [1, 9, 1, 1]), memory=int(5e9))
    assert found.published is None and found.ours == (4,)


def test_the_page_says_where_nothing_fits():
    found = plan.Plan(candidates([9, 9], [6, 7]), memory=int(5e9))
    lines = plan.verdict(found, config_lib.load(DIGITS))
    assert "not even the last stage fits" in lines[1] and "accumulate_steps" in lines[-1]
    assert "GiB too much" in plan.table(found)


def test_what_the_compiler_refuses_does_not_fit_however_much_it_needs():
    first = candidates([1], [1])[0]
    refused = dataclasses.replace(first, published=program(1, refused="needs 1 GiB"))
    assert plan.Plan((refused,), memory=int(5e9)).published is None


@pytest.mark.parametrize(
    ("pooled", "stages", "said"),
    [
        ("None", (3, 4), ["model.stages=3,4"]),
        ("2", (2, 3, 4), ["model.stages=2,3,4"]),
        ("2", (3, 4), ["model.stages=3,4", "model.pooled_stages=()"]),
        ("2,3", (3, 4), ["model.stages=3,4", "model.pooled_stages=3"]),
    ],
)
def test_the_overrides_can_be_loaded(pooled, stages, said):
    file = str(REPOSITORY / "configs/imagenet_resnet.py:aa_resnet50")
    config = config_lib.load(file, [f"model.pooled_stages={pooled}"])
    assert plan.overrides(config, stages) == said
    assert config_lib.load(file, [f"model.pooled_stages={pooled}", *said]).model.stages == stages


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either --topology"),
        (["--memory-gb", "1", "--topology", "v5e:2x2"], "either --topology"),
        (["--memory-gb", "0"], "above 0"),
        (["--topology", "v5e:2x3"], "layouts of v5e"),
        (["--memory-gb", "1", "--config.model.name=wrn"], "aa_wrn"),
        (["--memory-gb", "1", "--config.model.name=botnet50"], "no augmented stages to choose"),
        (["--memory-gb", "1", "--output", "plan.py"], "ends in .json"),
    ],
)
def test_wrong_words_are_refused(capsys, words, said):
    code = cli.main(["plan", "--config", DIGITS, *words])
    assert code == cli.WRONG_INPUT and said in capsys.readouterr().err


@pytest.mark.by_hand
def test_a_plan_for_this_machine_is_a_config_that_trains_on(capsys, tmp_path):
    file = tmp_path / "plan.json"
    small = "--config.model.width=1 --config.model.num_heads=1 --config.batch_size=256".split()
    words = ["plan", "--config", DIGITS, *small, "--output", str(file), "--memory-gb", "8"]
    assert cli.main(words) == cli.OK
    out = capsys.readouterr().out
    assert "1,2,3" in out and f"written {file}" in out
    assert config_lib.load(str(file)).model.stages == (1, 2, 3)
    # The published algorithm needs more, the more so the larger the maps are.
    ratios = [float(line.split("|")[-2]) for line in out.splitlines() if line.startswith("| ") and "MiB" in line]
    assert len(ratios) == 3 and ratios[-1] > 1


@pytest.mark.slow
def test_stages_of_too_few_channels_end_the_plan_and_lose_nothing(capsys):
    small = (
        "--config.model.width=1 --config.model.upsilon=0.1 --config.model.num_heads=4 --config.batch_size=16".split()
    )
    assert cli.main(["plan", "--config", DIGITS, *small, "--memory-gb", "8"]) == cli.OK
    answer = capsys.readouterr()
    assert "stage 2 cannot be augmented: upsilon=0.1 of features=32" in answer.out
    assert "| 3 " in answer.out and "--config.model.stages=3" in answer.out
    assert answer.err.index("cannot be augmented") < answer.err.index("compiling")  # said before the minutes


def test_a_last_stage_of_too_few_channels_is_refused_at_once(capsys):
    words = "--config.model.width=1 --config.model.upsilon=0.1 --config.model.num_heads=8 --memory-gb 8".split()
    assert cli.main(["plan", "--config", DIGITS, *words]) == cli.WRONG_INPUT
    answer = capsys.readouterr()
    assert "upsilon=0.1 of features=64" in answer.err and "compiling" not in answer.err
