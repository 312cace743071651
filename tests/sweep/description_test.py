"""Which trials a description gives, what they are called, and how wrong ones are answered."""

from __future__ import annotations

import re
import shutil

import pytest

from aaconv import cli, config as config_lib, train
from aaconv.models.summary import summarise
from aaconv.sweep import description

NASTY = ["a,b", "it's", 'say "hi"', "$(touch x); rm -rf *", "a b", "../up", "", "None", "é", "A", "a", "-", "x" * 300]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=0:3", [0, 1, 2]),
        ("seed=0:10:4,7", [0, 4, 8, 7]),
        ("seed=3:0:-1", [3, 2, 1]),
        ("model.kappa=0.1, 1,None", [0.1, 1.0, None]),
        ("model.stages=(2,3),(3,),3,()", [(2, 3), (3,), (3,), ()]),
        ("data.mean=(0.5,0.25)", [(0.5, 0.25)]),
        ("optimizer.nesterov=true,False", [True, False]),
        ("data.train_split=train[:10%],train[10%:]+test", ["train[:10%]", "train[10%:]+test"]),
        ("""data.data_dir='a,b',"it's",'',it's,'None','x\\'y'""", ["a,b", "it's", "", "it's", "None", "x'y"]),
        ("data.data_dir=$(rm -rf *) && `x`;|<>&,1:2", ["$(rm -rf *) && `x`;|<>&", "1:2"]),
    ],
)
def test_values_of_a_flag(text, values):
    key, found = description.parse_flag("--grid", text)
    assert key == text.partition("=")[0] and found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["seed"], "--grid seed has no values: write --grid seed=VALUE,VALUE"),
        (["seed="], "--grid seed= has no values"),
        (["seed=3:3"], "has no values"),
        (["seed=1,,2"], "--grid seed=1,,2 has an empty value: take the comma away"),
        (["seed=0:9:0"], "0:9:0 in --grid seed=0:9:0 has step 0"),
        (["seed=0:100000000000000000000"], "has 100,000,000,000,000,000,000 values: a sweep has at most 10,000 trials"),
        (["seed=10001:0:-1"], "10001:0:-1 in --grid seed=10001:0:-1 has 10,001 values"),
        (["seed=0:5000", "model.width=1,2,3"], "--grid and --zip give 15,000 trials: a sweep has at most 10,000"),
        (["seed=0.5"], "seed=0.5 in --grid seed=0.5 is a float: it must be a whole number"),
        (["seed='1'"], "seed='1' in --grid seed='1' is a str: it must be a whole number"),
        (["seed=None"], "seed=None in --grid seed=None: it must be a whole number"),
        (
            ["model.kappa=0:1"],
            "0:1 in --grid model.kappa=0:1 is a range, which only whole numbers have: list the values",
        ),
        (["model.kappa=0.1:0.5:0.1"], "is a range, which only whole numbers have: list the values"),
        (["model.kapa=1"], "unknown config key 'model.kapa' in --grid; did you mean 'model.kappa'"),
        (["model=1"], "'model' in --grid is a group of keys"),
        (["optimizer.nesterov=1"], "must be true or false"),
        (["model.stages=(2,3"], "has brackets without an end"),
        (["data.data_dir='a"], "has a quote without an end"),
        (["data.data_dir='a'b"], "'a'b in --grid data.data_dir='a'b is no string of Python's"),
        (["seed=1", "seed=2"], "seed is swept by two flags"),
    ],
)
def test_wrong_flags_say_what_to_write(flags, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        description.from_flags(flags, [])


def test_lists_of_zip_have_one_length():
    with pytest.raises(ValueError, match="seed has 2, model.kappa has 1: give lists of one length"):
        description.from_flags([], ["seed=1,2", "model.kappa=0.1"])


def test_combinations_are_those_of_nested_loops():
    cells = description.from_flags(["seed=0:2", "model.num_heads=2,4"], [])
    assert [tuple(cell.values()) for cell in cells] == [(0, 2), (0, 4), (1, 2), (1, 4)]


def test_names_are_safe_stable_and_never_two_the_same():
    cells = [{"data.data_dir": text} for text in NASTY] + [{"model.name": None}, {"model.name": "unset"}, {}]
    names = [description.trial_name(cell) for cell in cells]
    assert all(re.fullmatch(r"[A-Za-z0-9._=,+~-]{1,120}", name) and name[-1] != "." for name in names)
    assert len({name.lower() for name in names}) == len(cells)  # also where case makes no difference
    # Stable over versions of Python and of this project, or a sweep that is started again would begin anew.
    assert names[0] == "data_dir=a_b~380e1702" and names[8] == "data_dir=_~f94be949"
    values = {"seed": 3, "model.kappa": 0.25, "optimizer.nesterov": True, "model.stages": (2, 3)}
    assert description.trial_name(values) == "kappa=0.25,stages=2+3,nesterov=true,seed=3"
    assert description.trial_name(dict(reversed(values.items()))) == description.trial_name(values)


def test_a_function_beside_get_config(sweep, config):
    answer = sweep("--config", config + ":0.5", "--dry-run")
    assert answer.code == cli.OK, answer.err
    names = [line.split()[0] for line in answer.out.splitlines()[1:]]
    assert names == ["learning_rate=0.1,seed=0", "learning_rate=0.1,seed=1", "momentum=0.5", "3"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "the sweep is empty: let sweep(add) call add() once a trial"),
        ("add(sed=1)", "unknown config key 'sed' in sweep() of"),
        ("add(seed='1')", "is a str: it must be a whole number"),
        ("add(3)", 'give a dict, such as add({"model.kappa": 0.1})'),
        ("add({'seed': 1}, seed=2)", "is given seed twice"),
        ("add(seed=1); add(seed=1)", "duplicate trials: 'seed=1' comes twice"),
        ("add(seed=0); add()", "duplicate trials: 'seed=0' and 'base' are the same run"),
        ("add(model={'kappa': 1})", "'model' in sweep() of"),
    ],
)
def test_wrong_functions_are_answered_in_one_line(sweep, config, tmp_path, body, words):
    path = tmp_path / "own.py"
    shutil.copy(config, path)
    with path.open("a") as file:
        file.write(f"\ndef sweep(add):\n    {body}\n")
    answer = sweep("--config", path, "--workdir", tmp_path / "run")
    assert answer.code == cli.WRONG_INPUT and words in answer.err.splitlines()[-1] and "Traceback" not in answer.err
    assert not (tmp_path / "run" / "trials").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "--config is missing"),
        ("--config CONFIG", "--workdir is missing"),
        ("CONFIG", "`aaconv sweep` does not know"),
        ("statsu --workdir DIR", "does not know 'statsu'; did you mean 'status'"),
        ("status --workdir DIR", "holds no sweep: name the --workdir of one"),
        ("report --workdir DIR", "holds no sweep"),
        ("report", "--workdir is missing"),
        ("report --workdir gs://bucket/sweep", "is in a bucket, which has no locks"),
        ("--config CONFIG --workdir gs://bucket/sweep", "is in a bucket, which has no locks"),
        ("--config CONFIG --workdir DIR --jobs 0", "0 must be a whole number of at least 1"),
        ("--config CONFIG --workdir DIR --retries -1", "-1 must be a whole number of at least 0"),
        ("--config CONFIG --workdir DIR --gird seed=1", "did you mean --grid"),
        ("--config CONFIG --workdir DIR --invalid ignore", "invalid choice: 'ignore'"),
        ("--config CONFIG --workdir /proc/none", "cannot be written"),
        ("--config CONFIG --workdir DIR --grid data.name=cifar100 --config.data.channels=3", "aaconv prepare cifar100"),
    ],
)
def test_wrong_command_lines_are_answered_in_one_line(sweep, config, tmp_path, line, words):
    words_of = [word.replace("DIR", str(tmp_path / "run")).replace("CONFIG", config) for word in line.split()]
    answer = sweep(*words_of)
    assert answer.code == cli.WRONG_INPUT, answer.err
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("aaconv: error: ") and words in last and "Traceback" not in answer.err


def test_a_config_without_a_sweep_says_what_to_add(sweep, tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    c = ConfigDict()\n"
                    "    c.model, c.data = ConfigDict({'name': 'wrn'}), ConfigDict({'name': 'digits'})\n"
                    "    c.num_steps = 1\n    return c\n")  # fmt: skip
    answer = sweep("--config", path, "--dry-run")
    assert answer.code == cli.WRONG_INPUT and "describes no sweep: add a function sweep(add)" in answer.err


BAD_METRIC = "checkpoint.best_metric=eval/acuracy,eval/loss"
BAD_CELLS = ("--grid", "model.kappa=0.3", "--grid", "model.num_heads=2,7")
ATTENDING = ("--config.model.name=aa_wrn", "--config.model.upsilon=0.25")


def test_a_bad_cell_is_told_with_its_reason_and_stops_or_is_left_out(sweep, tmp_path):
    line = ("--config", "CONFIG", *ATTENDING, "--config.model.min_key_depth=1", *BAD_CELLS)
    answer = sweep(*line, "--workdir", tmp_path)
    assert answer.code == cli.WRONG_INPUT and not (tmp_path / "trials").exists()
    assert "cannot be run: kappa=0.3,num_heads=7: " in answer.err
    assert "1 of 2 trials cannot be run" in answer.err.splitlines()[-1]
    answer = sweep(*line, "--dry-run", "--invalid", "skip")
    assert answer.code == cli.OK and "kappa=0.3,num_heads=2" in answer.out and "num_heads=7" not in answer.out


def test_batches_that_do_not_divide_over_the_devices_are_found_before_anything_runs(sweep, tmp_path):
    answer = sweep("--config", "CONFIG", "--grid", "mesh.data=1,3", "--workdir", tmp_path)
    assert answer.code == cli.WRONG_INPUT and "mesh.data=3: " not in answer.out
    assert "cannot be run: mesh.data=3: batch_size=32 must be a multiple of the 3 devices" in answer.err


def test_counts_and_memory_of_a_dry_run(config):
    base = config_lib.load(config, ["optimizer.name=adamw"])
    (trial, half), invalid = description.describe(base, [{}, {"batch_size": 16}], need_data=False)
    found = summarise(train.build_model(base, 10), (8, 8, 1))
    assert not invalid and (trial.parameters, trial.flops) == (found.parameters, found.flops)
    weights = 4 * 4 * found.parameters  # with the gradient and AdamW's two moments
    assert trial.memory - weights == 2 * (half.memory - weights) > 0


def test_memory_is_that_of_one_device_of_the_mesh(config):
    meshes = ({"fsdp": 2, "data": 1}, {"spatial": 2, "data": 1}, {"data": 2}, {"data": -1})
    cells = [{}] + [{f"mesh.{key}": size for key, size in mesh.items()} for mesh in meshes]
    base = config_lib.load(config, ["mesh.fsdp_min_size=10000", "accumulate_steps=1"])
    trials, invalid = description.describe(base, cells, need_data=False, check_devices=False)
    found = summarise(train.build_model(base, 10), (8, 8, 1))
    weights = 4 * 3 * found.parameters  # with the gradient and the momentum
    large = sum(layer.parameters for layer in found.layers if layer.parameters >= 10000)
    assert not invalid and 0 < large < found.parameters
    whole, fsdp, spatial, data, left_open = (trial.memory for trial in trials)
    assert fsdp == pytest.approx(whole / 2 + 4 * 3 * (found.parameters - large) / 2)
    assert spatial == data == pytest.approx(weights + (whole - weights) / 2)
    assert left_open == whole


@pytest.mark.parametrize("flags", [["--config.checkpoint.best_metric=eval/acuracy"], ["--grid", BAD_METRIC]])
def test_an_unknown_metric_to_rank_by_is_found_before_anything_runs(sweep, tmp_path, flags):
    answer = sweep("--config", "CONFIG", "--workdir", tmp_path, *flags)
    words = (
        "checkpoint.best_metric='eval/acuracy' is not one of eval/accuracy, eval/top5, eval/loss; "
        "did you mean 'eval/accuracy'"
    )
    assert answer.code == cli.WRONG_INPUT and words in answer.err
    assert not (tmp_path / "trials").exists()
