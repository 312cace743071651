"""What a sweep is: from a ``sweep(add)`` beside ``get_config``, or from flags, to named and checked trials."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aaconv import config as config_lib

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from aaconv.config import ConfigDict

LONGEST_NAME = 120  # characters; file systems allow 255 bytes, of which files beside a folder want some
MOST_TRIALS = 10_000  # the memory that a mistyped range asks for has no end


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      overrides: values by dotted key, in the order of `order`.
      parameters: of its network.
      flops: of its network for one image, see `aaconv.models.summary.Layer`.
      memory: bytes on each device at least, see `least_memory`.
    """

    name: str
    overrides: dict[str, Any]
    parameters: int = 0
    flops: int = 0
    memory: int = 0


@dataclasses.dataclass(frozen=True)
class Invalid:
    """A cell of a sweep that cannot be run, with the reason in one line."""

    name: str
    reason: str


# Cells: which values


def from_function(function: Callable[[Any], Any], path: str) -> list[dict[str, Any]]:
    """Collects what a config file's ``sweep(add)`` adds.

    Args:
      function: calls ``add({"model.kappa": 0.1})`` or ``add(**{"model.kappa": 0.1})`` once a trial.
      path: of the file, for messages.

    Returns:
      Overrides by dotted key, one dict a trial.

    Raises:
      ValueError: a key is unknown or a value has the wrong type.
    """
    where, cells = f"sweep() of {path}", []

    def add(overrides: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        if not isinstance(overrides, Mapping | None):
            raise ValueError(f'add({overrides!r}) in {where}: give a dict, such as add({{"model.kappa": 0.1}})')
        twice = sorted((overrides or {}).keys() & more.keys())
        if twice:
            raise ValueError(f"add() in {where} is given {', '.join(twice)} twice: give each key once")
        cells.append(config_lib.typed({**(overrides or {}), **more}, where=where))

    function(add)
    return cells


def from_flags(grid: Sequence[str], together: Sequence[str]) -> list[dict[str, Any]]:
    """Expands ``--grid KEY=VALUES`` to all combinations, the last flag's values changing fastest.

    Args:
      grid: a string ``KEY=VALUES`` a flag.
      together: likewise, of ``--zip``: lists of one length, whose first values belong together, and so on. The
        combinations with ``grid`` are taken of these as a whole.

    Returns:
      Overrides by dotted key, one dict a trial.

    Raises:
      ValueError: a key is unknown or comes twice, a value has the wrong type, or lists of ``--zip`` differ in length.

    Example:
      >>> from_flags(["seed=0:2"], ["model.kappa=0.1,0.2", "model.num_heads=4,2"])[1:3]
      [{'model.kappa': 0.1, 'model.num_heads': 4, 'seed': 1}, {'model.kappa': 0.2, 'model.num_heads': 2, 'seed': 0}]
    """
    crossed, zipped = (
        [parse_flag(f"--{flag}", text) for text in texts] for flag, texts in (("grid", grid), ("zip", together))
    )
    keys = [key for key, _ in [*zipped, *crossed]]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is swept by two flags: give all its values in one")
    lengths = {key: len(values) for key, values in zipped}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ValueError(f"--zip takes one value of each list for a trial, and {said}: give lists of one length")
    trials = math.prod(len(values) for _, values in crossed) * max(lengths.values(), default=1)
    if trials > MOST_TRIALS:
        raise ValueError(f"--grid and --zip give {trials:,} trials: a sweep has at most {MOST_TRIALS:,}")
    axes = [[{key: value} for value in values] for key, values in crossed]
    if zipped:
        names = [key for key, _ in zipped]
        values = zip(*(values for _, values in zipped), strict=True)
        axes.insert(0, [dict(zip(names, row, strict=True)) for row in values])
    return [{k: v for part in cell for k, v in part.items()} for cell in itertools.product(*axes)] if axes else []


def parse_flag(flag: str, text: str) -> tuple[str, list[Any]]:
    """Reads ``KEY=VALUES``: values with commas between, each as ``--config.KEY=VALUE`` takes it, and besides

    - ``0:3`` and ``0:10:2`` for whole numbers: a range as Python's, without its end,
    - a tuple in brackets, ``(2,3),(3,)``; a number alone is a tuple of one,
    - a string that begins with a quote is one of Python's, ``'a,b'`` or ``"it's"``; other strings stand for themselves,
    - ``None`` where a key is optional, ``true`` and ``false`` for switches.

    Raises:
      ValueError: it does not follow these rules; the message says where.

    Example:
      >>> parse_flag("--grid", "model.stages=(2,3),3")
      ('model.stages', [(2, 3), (3,)])
      >>> parse_flag("--grid", "data.train_split=train[:10%],'train[:5%]+test[:5%]'")
      ('data.train_split', ['train[:10%]', 'train[:5%]+test[:5%]'])
    """
    key, equals, listed = text.partition("=")
    if not equals:
        raise ValueError(f"{flag} {text} has no values: write {flag} {key}=VALUE,VALUE")
    kind = config_lib.value_type(key, where=flag)
    values: list[Any] = []
    for item in _split(flag, text, listed):
        where = f"{flag} {text}"
        if item[0] in "'\"":
            try:
                value = ast.literal_eval(item)
            except (ValueError, SyntaxError) as error:
                raise ValueError(
                    f"{item} in {where} is no string of Python's: end it with the quote it begins with, and write a "
                    "backslash before a quote within"
                ) from error
        elif kind in (int, float) and re.fullmatch(r"-?[\d.]+:-?[\d.]+(:-?[\d.]+)?", item):
            if kind is not int or "." in item:
                raise ValueError(f"{item} in {where} is a range, which only whole numbers have: list the values")
            bounds = [int(bound) for bound in item.split(":")]
            if len(bounds) == 3 and bounds[2] == 0:
                raise ValueError(f"{item} in {where} has step 0: it must be another number")
            start, stop, step = (*bounds, 1)[:3]
            if (count := -((start - stop) // step)) > MOST_TRIALS:
                raise ValueError(f"{item} in {where} has {count:,} values: a sweep has at most {MOST_TRIALS:,} trials")
            values += range(*bounds)
            continue
        else:
            value = config_lib.parse_value(key, item)
        values.append(config_lib.typed({key: value}, where=where)[key])
    if not values:
        raise ValueError(f"{flag} {text} has no values: write {flag} {key}=VALUE,VALUE")
    return key, values


def _split(flag: str, text: str, listed: str) -> list[str]:
    """Splits at the commas that are neither in brackets nor in a string."""
    items, depth, quote, start, skip = [], 0, "", 0, False
    for at, letter in enumerate(listed):
        if skip:
            skip = False
        elif quote:
            skip = letter == "\\"
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not listed[start:at].strip():
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            items.append(listed[start:at].strip())
            start = at + 1
    if quote or depth:
        what = "a quote" if quote else "brackets"
        raise ValueError(f"{flag} {text} has {what} without an end: close it, or put the value in quotes")
    items.append(listed[start:].strip())
    if items == [""]:
        return []
    if "" in items:
        raise ValueError(f"{flag} {text} has an empty value: take the comma away, or write '' for an empty string")
    return items


# Trials: names and checks


def describe(
    base: ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    *,
    check_devices: bool = True,
    need_data: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[list[Trial], list[Invalid]]:
    """Names trials, builds each one's config and network by shapes, and counts.

    Args:
      base: what the trials override.
      cells: from `from_function` or `from_flags`.
      check_devices: whether the mesh is one of the devices that are here; else of as many as it wants.
      need_data: whether the data sets must be prepared.
      note: gets a line now and then where this takes long.

    Returns:
      The trials that can be run, and the others.

    Raises:
      ValueError: there are no cells, two are the same trial, a data set is not prepared, or ``checkpoint.best_metric``,
        which trials are ranked by, is none.
    """
    from aaconv import train

    if not cells:
        raise ValueError("the sweep is empty: let sweep(add) call add() once a trial, or give --grid KEY=VALUES")
    train.check_best_metric(base)
    checker = _Checker(need_data, check_devices)
    trials: list[Trial] = []
    invalid: list[Invalid] = []
    names: dict[str, str] = {}  # by config
    for number, cell in enumerate(cells, 1):
        overrides = {key: cell[key] for key in order(cell)}
        name = trial_name(overrides)
        if number % 100 == 0:
            note(f"checked {number} of {len(cells)} trials")
        try:
            config = config_lib.override(base, overrides, where=name)
        except ValueError as error:
            invalid.append(Invalid(name, str(error)))
            continue
        whole = config.to_json_best_effort()
        if whole in names:
            said = (
                f"{names[whole]!r} and {name!r} are the same run" if names[whole] != name else f"{name!r} comes twice"
            )
            raise ValueError(f"duplicate trials: {said}; leave one of them out")
        names[whole] = name
        try:
            counts = checker.check(config)
        except checker.not_prepared:
            raise
        except (ValueError, NotImplementedError) as error:
            invalid.append(Invalid(name, " ".join(str(error).split())))
            continue
        trials.append(Trial(name, overrides, *counts))
    return trials, invalid


def order(keys: Iterable[str]) -> list[str]:
    """Returns keys by the alphabet, the seed last: names do not depend on the order of loops."""
    return sorted(keys, key=lambda key: (key == "seed", key))


def short_key(key: str) -> str:
    """Returns the last part of a dotted key where no other key, and no group, is called so; else the key."""
    last = key.rpartition(".")[2]
    alike = [k for k in config_lib.keys() if last in k.split(".")]
    return last if len(alike) == 1 else key


def trial_name(overrides: Mapping[str, Any]) -> str:
    """Returns a readable name that any file system takes as that of a folder; other overrides have another one.

    Where letters had to be replaced, or tell nothing apart on a file system that ignores case, eight digits of a
    checksum follow.

    Example:
      >>> trial_name({"model.kappa": 0.2, "model.stages": (2, 3), "data.name": "digits", "seed": 1})
      'data.name=digits,kappa=0.2,stages=2+3,seed=1'
      >>> trial_name({"data.train_split": "train[:10%]"})
      'train_split=train__10__~49169746'
      >>> trial_name({})
      'base'
    """
    parts, exact = [], True
    for key in order(overrides):
        value = overrides[key]
        text = spell(value)
        safe = re.sub(r"[^a-zA-Z0-9._+-]", "_", text)
        exact = (
            exact
            and safe == text
            and not (isinstance(value, str) and (value in ("", "unset") or value != value.lower()))
        )
        parts.append(f"{short_key(key)}={safe}")
    name = ",".join(parts) or "base"
    if exact and len(name) <= LONGEST_NAME and name[-1] != ".":  # Windows drops a dot at the end
        return name
    digits = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}~{digits}"


def spell(value: Any) -> str:
    """Returns a value as names and tables show it: ``unset`` for None, ``2+3`` for a tuple."""
    if value is None:
        return "unset"
    if isinstance(value, tuple | list):
        return "+".join(map(spell, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Checker:
    """Builds networks by shapes, each only once."""

    def __init__(self, need_data: bool, check_devices: bool) -> None:
        from aaconv import data

        self.not_prepared = data.NotPrepared
        self._need_data, self._check_devices = need_data, check_devices
        self._infos: dict[str, Any] = {}
        self._summaries: dict[str, Any] = {}

    def check(self, config: ConfigDict) -> tuple[int, int, int]:
        """Returns parameters, FLOPs and the memory at least.

        Raises:
          NotPrepared: the data set is not there and has to be.
          ValueError: the config cannot be run.
        """
        from aaconv import optim, parallel, train
        from aaconv.models.summary import summarise

        train.check_best_metric(config)
        key = config.data.to_json_best_effort()
        if key not in self._infos:
            self._infos[key] = self._info(config)
        info = self._infos[key]
        mesh = parallel.configured_mesh(config.mesh) if self._check_devices else _mesh_elsewhere(config.mesh)
        parallel.check_batch("batch_size", config.batch_size, mesh, config.accumulate_steps)
        parallel.check_batch("eval_batch_size", config.eval_batch_size, mesh)
        parallel.check_rows(info.image_shape[0], mesh)
        key = "\n".join(
            [config.model.to_json_best_effort(), config.dtype, str(info.image_shape), str(info.num_classes)]
        )
        if key not in self._summaries:
            model = train.build_model(config, info.num_classes)
            self._summaries[key] = summarise(model, info.image_shape)
        found = self._summaries[key]
        # A set that is only declared has no examples: its length says nothing of the config.
        steps = info.num_train // config.batch_size if info.num_train else 10**6
        memory = least_memory(config, found, optim.plan(config, steps), mesh)
        return found.parameters, found.flops, memory

    def _info(self, config: ConfigDict) -> Any:
        from aaconv import data
        from aaconv.data import declared

        try:
            return data.info(config)
        except data.NotPrepared:
            if self._need_data:
                raise
            return declared.declared_info(config)


STORING = ("factorised", "skew", "explicit")
"""Implementations of attention that keep whole maps for the backward pass."""


def least_memory(config: ConfigDict, found: Any, plan: Any, mesh: Mesh) -> int:
    """Returns the memory that a training step cannot do without on each device, in bytes: a lower bound.

    It is weights, gradient, the optimiser's state and averages in float32, and for the backward pass each layer's
    output in ``config.dtype``, and attention maps where the implementation stores them. Gradients of activations, and
    what the compiler adds for the time of an operation, are not in it; nor are weights that ``mesh.fsdp`` divides
    while they are gathered.

    Args:
      config: of the run.
      found: as of `aaconv.models.summary.summarise`.
      plan: as of `aaconv.optim.plan`.
      mesh: over which examples, large weights and rows are divided.
    """
    import jax
    import jax.numpy as jnp

    from aaconv import optim, parallel

    weight = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    state = jax.eval_shape(optim.optimizer(config, plan).init, {"kernel": weight})
    slots = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) / math.prod(weight.shape)
    large = sum(layer.parameters for layer in found.layers if layer.parameters >= config.mesh.fsdp_min_size)
    parameters = found.parameters - large + -(-large // mesh.shape[parallel.FSDP])
    weights = 4 * parameters * (2 + round(slots) + bool(config.optimizer.ema_decay))
    outputs = sum(math.prod(layer.output_shape) for layer in found.layers) * jnp.dtype(config.dtype).itemsize
    maps = sum(layer.map_bytes for layer in found.attention if layer.choice.implementation in STORING)
    images = -(-config.batch_size // (config.accumulate_steps * parallel.batch_devices(mesh)))
    return weights + images * -(-(outputs + maps) // mesh.shape[parallel.SPATIAL])


def _mesh_elsewhere(config_mesh: Mapping[str, Any]) -> Mesh:
    """Returns a mesh of devices that are not here: as many as the config says, one where it leaves it open."""
    from aaconv import parallel

    sizes = {key: 1 if config_mesh[key] == -1 else config_mesh[key] for key in ("data", "fsdp", "spatial")}
    devices = parallel.imagined(math.prod(max(1, size) for size in sizes.values()), "cpu")
    shared = config_mesh["batch_norm_devices"] if config_mesh["data"] != -1 else -1
    return parallel.make_mesh(**sizes, batch_norm_devices=shared, devices=devices)
