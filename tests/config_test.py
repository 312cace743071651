"""Config files, overrides from the command line, and every way to get them wrong."""

from __future__ import annotations

import textwrap

import pytest

from aaconv import config as config_lib

CONFIG = """
from ml_collections import ConfigDict

def get_config(argument=""):
    c = ConfigDict()
    c.model = ConfigDict({"name": argument or "wrn_28_10", "stages": [2, 3]})
    c.data = ConfigDict({"name": "cifar100"})
    c.num_epochs = 3
    return c
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str = CONFIG, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


def test_file_is_merged_over_the_defaults(write):
    config = config_lib.load(write())
    assert (config.model.name, config.num_epochs, config.batch_size) == ("wrn_28_10", 3.0, 128)
    assert type(config.num_epochs) is float and config.model.stages == (2, 3)


def test_argument_reaches_get_config(write):
    assert config_lib.load(write() + ":resnet50").model.name == "resnet50"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.kappa=0.3", "kappa", 0.3),
        ("model.kappa=1", "kappa", 1.0),
        ("model.num_heads=4", "num_heads", 4),
        ("model.stages=2,3", "stages", (2, 3)),
        ("model.stages=(2, 3)", "stages", (2, 3)),
        ("model.stages=[1]", "stages", (1,)),
        ("model.stages=3", "stages", (3,)),
        ("model.stages=()", "stages", ()),
        ("model.stages=None", "stages", None),
        ("model.recalibration_stages=2", "recalibration_stages", (2,)),
        ("model.recalibration=none", "recalibration", "none"),
        ("model.position_encoding=none", "position_encoding", "none"),
        ("model.name=2", "name", "2"),
    ],
)
def test_override_takes_the_type_of_its_key(write, override, key, value):
    got = config_lib.load(write(), [override]).model[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_switches_are_spelled_as_one_likes(write, text):
    assert config_lib.load(write(), [f"data.augment.flip={text}"]).data.augment.flip is True


def test_later_overrides_win(write):
    assert config_lib.load(write(), ["batch_size=1", "batch_size=2"]).batch_size == 2


def test_result_is_locked_and_complete(write):
    config = config_lib.load(write())
    with pytest.raises(AttributeError):
        config.new_key = 1
    assert set(config) == set(config_lib.default_config())


def test_steps_in_the_place_of_epochs(write):
    config = config_lib.load(write(), ["num_epochs=None", "num_steps=7"])
    assert (config.num_epochs, config.num_steps) == (None, 7)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modell.kappa=1", "unknown config key 'modell.kappa' in the command line; did you mean 'model.kappa'"),
        ("kappa=0.2", "did you mean 'model.kappa'"),
        ("batchsize=2", "did you mean 'batch_size'"),
        ("xyzzy=2", "`aaconv show --config FILE` lists the keys"),
        ("model=2", "is a group of keys: set one of model.attention_ratio, model.depth, model.dropout"),
        ("batch_size", "has no value: write batch_size=VALUE"),
        ("batch_size=2.5", "batch_size=2.5 in the command line is a float: it must be a whole number"),
        ("batch_size=many", "batch_size='many' in the command line is a str: it must be a whole number"),
        ("batch_size=None", "batch_size=None in the command line: it must be a whole number"),
        ("batch_size=0", "batch_size=0 must be greater than 0"),
        ("batch_size=true", "must be a whole number"),
        ("model.kappa=a lot", "model.kappa='a lot' in the command line is a str: it must be a number"),
        ("model.stages=a,b", "must be a tuple such as 2,3"),
        ("model.stages=1.5,2", r"model.stages=\(1.5, 2\) must be a tuple of whole numbers"),
        ("model.recalibration_stages=1.5,2", r"recalibration_stages=\(1.5, 2\) must be a tuple of whole numbers"),
        ("data.mean=('a', 'b', 'c')", "must be a tuple of numbers"),
        ("data.augment.flip=1", "it must be true or false"),
        ("optimizer.name=sdg", "optimizer.name='sdg' is not one of sgd, rmsprop, adamw; did you mean 'sgd'"),
        ("dtype=float16", "dtype='float16' is not one of float32, bfloat16"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0 must not be negative; 0 switches it off"),
        ("loss.label_smoothing=1", "loss.label_smoothing=1.0 must be at least 0 and below 1"),
        ("loss.label_smoothing=-0.1", "loss.label_smoothing=-0.1 must be at least 0"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay=1.0 must .* below 1; 0 switches it off"),
        ("optimizer.momentum=1", "optimizer.momentum=1.0 must .* below 1"),
        ("profile.start_step=0", "profile.start_step=0 must be greater than 0"),
        ("profile.num_steps=-1", "profile.num_steps=-1 must not be negative; 0 switches it off"),
        ("hang_limit_seconds=-1", "hang_limit_seconds=-1.0 must not be negative; 0 switches it off"),
        ("optimizer.eps=0", "optimizer.eps=0.0 must be greater than 0"),
        ("schedule.final=2", "schedule.final=2.0 must lie between 0 and 1"),
        ("seed=-1", r"seed=-1 must lie between 0 and 2\*\*32 - 1"),
        ("seed=4294967296", r"seed=4294967296 must lie between 0 and 2\*\*32 - 1"),
        ("schedule.warmup_percent=101", "schedule.warmup_percent=101.0 must lie between 0 and 100"),
        ("schedule.learning_rate=1e999", "schedule.learning_rate=inf must be finite"),
        ("num_steps=5", "num_epochs=3.0 and num_steps=5: set exactly one of the two"),
        ("model.name=None", "model.name is not set"),
    ],
)
def test_wrong_override_is_answered(write, override, words):
    with pytest.raises(ValueError, match=words):
        config_lib.load(write(), [override])


def test_both_warm_ups_are_refused(write):
    with pytest.raises(ValueError, match="set at most one of the two"):
        config_lib.load(write(), ["schedule.warmup_percent=5", "schedule.warmup_epochs=1"])


def test_missing_file_lists_the_near_ones(write):
    path = write()
    with pytest.raises(ValueError, match=r"does not exist; did you mean '.*mine\.py'"):
        config_lib.load(path.replace("mine", "mien"))
    with pytest.raises(ValueError, match="give a path such as configs/digits.py"):
        config_lib.load("/nowhere/at_all.py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "defines no get_config"),
        ("def get_config(:", "is not valid Python"),
        ("def get_config():\n    return {}", "returned dict: it must return an ml_collections.ConfigDict"),
        (CONFIG.replace("num_epochs", "num_epoch"), "unknown config key 'num_epoch' in .*did you mean 'num_epochs'"),
        (CONFIG.replace("= 3", "= 'three'"), "num_epochs='three' in .*mine.py is a str: it must be a number"),
        (CONFIG.replace('"cifar100"', "None"), "data.name is not set"),
    ],
)
def test_wrong_file_is_answered(write, text, words):
    with pytest.raises(ValueError, match=words):
        config_lib.load(write(text))


def test_unwanted_argument_is_answered(write):
    with pytest.raises(ValueError, match="takes no argument, got 'fast': leave out ':fast'"):
        config_lib.load(write("def get_config():\n    return 1") + ":fast")


def test_not_a_python_file(write):
    with pytest.raises(ValueError, match="must end in .py"):
        config_lib.load(write(name="mine.txt"))
