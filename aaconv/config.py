"""What can be configured, with every key, its default and its meaning in one place.

A config file is data: a Python file with ``get_config(argument="")`` that returns an
``ml_collections.ConfigDict`` holding only the keys it sets. `load` merges it over
`default_config`, applies the command line's ``key=value`` overrides, checks names and
types, and locks the result. Nothing else in the project reads a key that is not here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_collections
from ml_collections import config_dict

from aaconv import workdirs
from aaconv.errors import close_matches

if TYPE_CHECKING:
    # ml_collections types a value as any of seven types: no key of a group could be read without a cast.
    ConfigDict: TypeAlias = Any
else:
    ConfigDict = ml_collections.ConfigDict


def _group() -> ConfigDict:
    return ml_collections.ConfigDict()


def default_config() -> ConfigDict:
    """Returns every key with its default; ``None`` means "derived", as the comment says."""
    c = _group()
    c.seed = 0  # initial parameters, data order, augmentation, mixup

    c.model = _group()
    c.model.name = config_dict.placeholder(str)  # one of aaconv.models.list_models()
    c.model.kappa = config_dict.placeholder(float)  # key depth / features (paper, 3.2)
    c.model.upsilon = config_dict.placeholder(float)  # value depth / features
    c.model.attention_ratio = config_dict.placeholder(float)  # kappa and upsilon alike, instead of both
    c.model.num_heads = config_dict.placeholder(int)  # N_h
    c.model.min_key_depth = config_dict.placeholder(int)  # channels a head, at least
    c.model.stages = config_dict.placeholder(tuple)  # augmented stages, from 1
    c.model.pooled_stages = config_dict.placeholder(tuple)  # stages attending at half size
    c.model.position_encoding = config_dict.placeholder(str)  # relative|none|sinusoid|coordconv
    c.model.strided_attention = config_dict.placeholder(str)  # subsample|average_pool
    c.model.larger_maps = config_dict.placeholder(str)  # raise|interpolate|clip
    c.model.implementation = config_dict.placeholder(str)  # of relative_attention
    c.model.recalibration = config_dict.placeholder(str)  # none|se|ge|bam|cbam
    c.model.reduction = config_dict.placeholder(int)  # channels / channels of the bottleneck
    c.model.extent = config_dict.placeholder(int)  # ge: 2, 4, 8 ..; 0: the whole map
    c.model.gather = config_dict.placeholder(str)  # ge: parameter_free|parametrised|pointwise
    c.model.recalibration_stages = config_dict.placeholder(tuple)  # stages that have it, from 1
    c.model.depth = config_dict.placeholder(int)  # Wide-ResNet: 6 n + 4
    c.model.width = config_dict.placeholder(int)  # Wide-ResNet: multiplier; ResNet: stem channels
    c.model.stem_channels = config_dict.placeholder(int)  # Wide-ResNet: of the stem; stages have width x 1, 2, 4 of it
    c.model.shortcut = config_dict.placeholder(str)  # Wide-ResNet: pad|projection
    c.model.width_multiplier = config_dict.placeholder(float)  # MnasNet: of the channels
    c.model.dropout = config_dict.placeholder(float)  # MnasNet: share of features before the last layer
    c.model.scale_positions = config_dict.placeholder(bool)  # BoTNet: whether 1/sqrt(d) reaches the relative logits
    c.model.last_stride = config_dict.placeholder(int)  # BoTNet: of the last stage, 1|2

    c.data = _group()
    c.data.name = config_dict.placeholder(str)  # TFDS name, e.g. cifar100, or "digits", "digit_pairs/far"
    c.data.data_dir = ""  # prepared TFDS sets; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    c.data.train_split = "train"  # any TFDS split expression, e.g. train[:90%]
    c.data.eval_split = "test"
    c.data.image_size = config_dict.placeholder(int)  # square side after cropping, pixels; None: as stored
    c.data.channels = 3  # 1 or 3
    c.data.mean = (0.5, 0.5, 0.5)  # of pixels scaled to 0..1, a channel each
    c.data.std = (0.5, 0.5, 0.5)
    c.data.placement = "auto"  # device | memory | workers | auto (by size)
    c.data.num_workers = 0  # decoding processes for placement="workers"; 0: in threads

    c.data.augment = _group()
    c.data.augment.crop_padding = 0  # random crop after zero padding by this many pixels
    c.data.augment.flip = False  # random horizontal flip
    c.data.augment.random_resized_crop = False  # Inception crop (photographs)
    c.data.augment.min_area = 0.08  # smallest share of the image it may take
    c.data.augment.eval_crop = 0.875  # central share kept at evaluation of photographs

    c.batch_size = 128  # examples a step, over all devices
    c.eval_batch_size = 512
    c.accumulate_steps = 1  # parts that a batch is worked through in, one after another: memory for time
    c.num_epochs = config_dict.placeholder(float)  # exactly one of num_epochs and num_steps
    c.num_steps = config_dict.placeholder(int)

    c.optimizer = _group()
    c.optimizer.name = "sgd"  # sgd | rmsprop | adamw
    c.optimizer.momentum = 0.9  # sgd, rmsprop
    c.optimizer.nesterov = False  # sgd
    c.optimizer.decay = 0.9  # rmsprop: of the squared gradients' average
    c.optimizer.b1 = 0.9  # adamw
    c.optimizer.b2 = 0.999  # adamw
    c.optimizer.eps = 1e-8  # rmsprop, adamw
    c.optimizer.weight_decay = 0.0  # sgd, rmsprop: added to the gradient; adamw: decoupled
    c.optimizer.decay_norm_and_bias = False  # whether weight decay reaches vectors too
    c.optimizer.clip_norm = 0.0  # global gradient norm; 0: none
    c.optimizer.ema_decay = 0.0  # of the weights' moving average, used in evaluation; 0: none

    c.schedule = _group()
    c.schedule.name = "cosine"  # cosine | steps | exponential | constant
    c.schedule.learning_rate = 0.1  # peak, for a batch of 256 when scale_with_batch
    c.schedule.scale_with_batch = False  # peak = learning_rate * batch_size / 256
    c.schedule.warmup_percent = 0.0  # of the run, linear from 0
    c.schedule.warmup_epochs = 0.0  # the same in epochs; at most one of the two
    c.schedule.boundaries_epochs = ()  # steps: where the rate is multiplied by factor
    c.schedule.factor = 0.1  # steps, exponential
    c.schedule.every_epochs = 1.0  # exponential: rate *= factor once in so many epochs
    c.schedule.final = 0.0  # cosine: the rate at the end, as a share of the peak

    c.loss = _group()
    c.loss.label_smoothing = 0.0
    c.loss.mixup_alpha = 0.0  # Beta(alpha, alpha); 0: no mixup

    c.dtype = "float32"  # of activations: float32 | bfloat16; parameters stay float32

    c.mesh = _group()
    c.mesh.data = -1  # devices along the batch; -1: what the other two leave
    c.mesh.fsdp = 1  # devices along the batch that divide weights and optimiser state as well
    c.mesh.spatial = 1  # devices that divide the rows of each image
    c.mesh.fsdp_min_size = 2**16  # numbers; smaller arrays lie whole on each device
    c.mesh.batch_norm_devices = -1  # whose examples share batch norm's statistics; -1: all, 1: each has its own

    c.log_every_steps = 50
    c.eval_every_epochs = 1.0

    c.checkpoint = _group()
    c.checkpoint.every_epochs = 1.0
    c.checkpoint.every_steps = 0  # > 0: instead of every_epochs
    c.checkpoint.keep_last = 2
    c.checkpoint.best_metric = "eval/accuracy"  # the best by this is kept as well; "": none

    c.profile = _group()
    c.profile.start_step = 10  # the first step in the trace; those before it warm up
    c.profile.num_steps = 0  # how many jax's profiler traces, into workdir/profile; 0: none

    c.hang_limit_seconds = 600.0  # all stacks are written when a batch, step, save or evaluation takes longer; 0: never
    return c


def keys() -> list[str]:
    """Returns every key, dotted."""
    return [key for key, _ in _leaves(default_config())]


def items(config: ConfigDict) -> list[tuple[str, Any]]:
    """Returns every key, dotted, with its value."""
    return list(_leaves(config))


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file, applies overrides and returns the locked, complete config.

    Args:
      path: ``FILE`` or ``FILE:ARGUMENT``; the file defines ``get_config(argument="")``. Or the
        ``config.json`` that a run wrote, which may be in a bucket.
      overrides: strings ``key=value`` with dotted keys, e.g. ``model.kappa=0.3``;
        tuples as ``(2, 3)`` or ``2,3``, ``None`` where a key is optional.

    Raises:
      ValueError: the file or its ``get_config`` is missing, a key is unknown, or a value
        has the wrong type; the message names the value, the constraint and the remedy.
    """
    config = default_config()
    for key, value in _leaves(_run_config_file(path)):
        _set(config, key, value, where=path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} has no value: write {key}=VALUE (true or false for a switch)")
        _set(config, key, _parse(config, key, text), where="the command line")
    validate(config)
    return config.lock()


def override(config: ConfigDict, values: Mapping[str, Any], *, where: str) -> ConfigDict:
    """Returns a locked, checked copy of a config with other values of some keys.

    Args:
      config: a whole one, or one read from a run's ``config.json``.
      values: by dotted key.
      where: they come from, for messages.

    Raises:
      ValueError: as of `load`.
    """
    changed = default_config()
    for key, value in [*_leaves(config), *values.items()]:
        _set(changed, key, value, where=where)
    validate(changed)
    return changed.lock()


def typed(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Returns values by dotted key as a config would hold them: lists as tuples, whole numbers as floats where due.

    Raises:
      ValueError: a key is unknown, or a value has the wrong type.
    """
    config = default_config()
    for key, value in values.items():
        _set(config, key, value, where=where)
    return {key: _get(config, key) for key in values}


def value_type(key: str, *, where: str) -> type:
    """Returns the type of a key's value.

    Raises:
      ValueError: the key is unknown.
    """
    return _kind(default_config(), key, where=where)


def parse_value(key: str, text: str) -> Any:
    """Returns the value that ``key=text`` on the command line stands for; `typed` checks it."""
    return _parse(default_config(), key, text)


def sweep_function(path: str) -> Callable[[Any], None] | None:
    """Returns the function ``sweep(add)`` of a config file, None where it has none.

    Args:
      path: ``FILE`` or ``FILE:ARGUMENT``; ``sweep(add, argument)`` gets the argument as well.
    """
    file, _, argument = path.partition(":")
    function = None if file.endswith(".json") else getattr(_module(file), "sweep", None)
    if function is None or len(inspect.signature(function).parameters) < 2:
        return function
    return lambda add: function(add, argument)


def validate(config: ConfigDict) -> None:
    """Checks what does not need data or a model.

    Raises:
      ValueError: naming the key, its value, the constraint and the remedy.
    """
    if config.model.name is None or config.data.name is None:
        missing = "model.name" if config.model.name is None else "data.name"
        raise ValueError(f"{missing} is not set: name one in the config file")
    if (config.num_epochs is None) == (config.num_steps is None):
        raise ValueError(
            f"num_epochs={config.num_epochs} and num_steps={config.num_steps}: set exactly one of the two, "
            "and the other to None"
        )
    if config.schedule.warmup_percent and config.schedule.warmup_epochs:
        raise ValueError(
            f"schedule.warmup_percent={config.schedule.warmup_percent} and "
            f"schedule.warmup_epochs={config.schedule.warmup_epochs}: set at most one of the two"
        )
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must lie between 0 and 2**32 - 1")
    for key, value in _leaves(config):
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{key}={value} must be finite")
    for key, (kind, spoken) in ELEMENTS.items():
        value = _get(config, key)
        if value is not None and not all(isinstance(x, kind) and not isinstance(x, bool) for x in value):
            raise ValueError(f"{key}={value} must be a tuple of {spoken}")
    if not 0 <= config.schedule.warmup_percent <= 100:
        raise ValueError(f"schedule.warmup_percent={config.schedule.warmup_percent} must lie between 0 and 100")
    for key, known in CHOICES.items():
        value = _get(config, key)
        if value not in known:
            raise ValueError(f"{key}={value!r} is not one of {', '.join(known)}{close_matches(str(value), known)}")
    for key in POSITIVE:
        value = _get(config, key)
        if value is not None and not value > 0:
            raise ValueError(f"{key}={value} must be greater than 0")
    for key in NOT_NEGATIVE:
        value = _get(config, key)
        if value < 0:
            raise ValueError(f"{key}={value} must not be negative; 0 switches it off")
    for key in SHARES:
        value = _get(config, key)
        if not 0 <= value <= 1:
            raise ValueError(f"{key}={value} must lie between 0 and 1")
    for key in BELOW_ONE:
        value = _get(config, key)
        if not 0 <= value < 1:
            raise ValueError(f"{key}={value} must be at least 0 and below 1; 0 switches it off")


ELEMENTS = {
    "model.stages": (int, "whole numbers"),
    "model.pooled_stages": (int, "whole numbers"),
    "model.recalibration_stages": (int, "whole numbers"),
    "data.mean": ((int, float), "numbers"),
    "data.std": ((int, float), "numbers"),
    "schedule.boundaries_epochs": ((int, float), "numbers"),
}
CHOICES = {
    "data.placement": ("auto", "device", "memory", "workers"),
    "optimizer.name": ("sgd", "rmsprop", "adamw"),
    "schedule.name": ("cosine", "steps", "exponential", "constant"),
    "dtype": ("float32", "bfloat16"),
}
POSITIVE = (
    "batch_size eval_batch_size accumulate_steps num_epochs num_steps log_every_steps eval_every_epochs "
    "mesh.fsdp_min_size data.image_size data.channels optimizer.eps schedule.learning_rate schedule.every_epochs "
    "schedule.factor checkpoint.every_epochs checkpoint.keep_last profile.start_step"
).split()
NOT_NEGATIVE = (
    "data.num_workers data.augment.crop_padding optimizer.weight_decay optimizer.clip_norm schedule.warmup_epochs "
    "loss.mixup_alpha checkpoint.every_steps profile.num_steps hang_limit_seconds"
).split()
SHARES = (
    "optimizer.decay optimizer.b1 optimizer.b2 schedule.final data.augment.min_area data.augment.eval_crop"
).split()
BELOW_ONE = "optimizer.momentum optimizer.ema_decay loss.label_smoothing".split()


def _run_config_file(path: str) -> ConfigDict:
    if workdirs.in_bucket(path):
        return _read_json(path)
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        # Not below these two: an environment's thousands of files may lie in the same folder.
        known = [str(f) for folder in (Path(file).parent, Path("configs")) for f in sorted(folder.glob("*.py"))]
        near = close_matches(file, dict.fromkeys(known))
        raise ValueError(f"config file {file!r} does not exist{near or '; give a path such as configs/digits.py'}")
    if file.endswith(".json"):
        return _read_json(file)
    module = _module(file)
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {file!r} defines no get_config(argument=''): add that function")
    if argument and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"config file {file!r} takes no argument, got {argument!r}: leave out ':{argument}'")
    config = module.get_config(argument) if argument else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"get_config of {file!r} returned {type(config).__name__}: it must return an ml_collections.ConfigDict"
        )
    return config


def _module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("aaconv_config_file", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"config file {file!r} is not a Python file: it must end in .py, or be a run's config.json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {file!r} is not valid Python: {error}") from error
    return module


def _read_json(file: str) -> ConfigDict:
    try:
        return ml_collections.ConfigDict(json.loads(workdirs.path(file).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"config file {file!r} is not the config.json of a run: {error}") from error


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _set(config: ConfigDict, key: str, value: Any, *, where: str) -> None:
    kind = _kind(config, key, where=where)
    group, _, name = key.rpartition(".")
    owner = _get(config, group) if group else config
    if isinstance(value, list):
        value = tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if value is None:
        if _get(default_config(), key) is not None:
            raise ValueError(f"{key}=None in {where}: it must be {_spoken(kind)}")
    elif type(value) is not kind:
        raise ValueError(f"{key}={value!r} in {where} is a {type(value).__name__}: it must be {_spoken(kind)}")
    owner[name] = value


def _kind(config: ConfigDict, key: str, *, where: str) -> type:
    known = [k for k, _ in _leaves(config)]
    if key not in known:
        groups = {k.rpartition(".")[0] for k in known} - {""}
        if key in groups:
            inside = ", ".join(k for k in known if k.startswith(key + "."))
            raise ValueError(f"{key!r} in {where} is a group of keys: set one of {inside}")
        raise ValueError(f"unknown config key {key!r} in {where}{_near_keys(key, known)}")
    group, _, name = key.rpartition(".")
    return (_get(config, group) if group else config).get_type(name)


def _near_keys(key: str, known: Iterable[str]) -> str:
    known = list(known)
    last = key.rpartition(".")[2]
    same_name = [k for k in known if k.rpartition(".")[2] == last]
    if same_name:
        return f"; did you mean {' or '.join(map(repr, same_name))}?"
    return close_matches(key, known) or "; `aaconv show --config FILE` lists the keys"


def _parse(config: ConfigDict, key: str, text: str) -> Any:
    kind = _kind(config, key, where="the command line")
    if text == "None":
        return None
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text} on the command line: it must be true or false")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is tuple and not isinstance(value, tuple | list | str):
        value = (value,)
    return value


def _spoken(kind: type) -> str:
    return {
        str: "a string",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple: "a tuple such as 2,3",
    }[kind]
