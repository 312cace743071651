"""Networks by name: `create` and `list_models`."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import numbers
import re
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from aaconv.errors import close_matches
from aaconv.models.botnet import botnet
from aaconv.models.mnasnet import MnasNet as MnasNet, mnasnet
from aaconv.models.recalibration import check_effect
from aaconv.models.resnet import ResNet as ResNet, resnet
from aaconv.models.wide_resnet import WideResNet as WideResNet, wide_resnet


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network that has a name.

    Attributes:
      build: makes it; its keyword arguments are those of `create`.
      source: the paper it comes from.
      image_size: side of the images in pixels that the paper gives parameters and FLOPs for.
      augmented: whether it attends: it then takes those of the arguments in `ATTENTION` that `build` has.
      fixed: arguments that the name sets.
    """

    build: partial[Any]
    source: str
    image_size: int = 224
    augmented: bool = False
    fixed: frozenset[str] = frozenset()

    def arguments(self) -> dict[str, inspect.Parameter]:
        """The arguments that `create` takes for it."""
        known = inspect.signature(self.build).parameters
        left_out = self.fixed | (frozenset() if self.augmented else set(ATTENTION))
        return {name: parameter for name, parameter in known.items() if name not in left_out}


ATTENTION = (
    "kappa upsilon attention_ratio num_heads min_key_depth stages pooled_stages position_encoding larger_maps "
    "strided_attention implementation"
).split()
"""The arguments that only the augmented networks take."""

_PAPER = {"kappa": 0.2, "upsilon": 0.1, "num_heads": 8}  # kappa = 2 upsilon = 0.2, Bello et al. 4.1 and 4.2
_BASIC = {"kappa": 0.25, "upsilon": 0.25, "num_heads": 8}  # inferred from ResNet-34's parameter count
_MOBILE = {"kappa": 0.1, "upsilon": 0.05, "num_heads": 4}  # kappa = 2 upsilon = 0.1, inferred from MnasNet's counts

_WRN = "Zagoruyko & Komodakis 2016"
_RESNET = "He et al. 2016"
_AA = "Bello et al. 2019"
_RECALIBRATED = {
    "se": "Hu, Shen & Sun 2018",
    "ge": "Hu, Shen, Albanie, Sun & Vedaldi 2018",
    "bam": "Park et al. 2018",
    "cbam": "Woo et al. 2018",
}
_MNASNET = "Tan et al. 2019"
_BOTNET = "Srinivas et al. 2021"


def _wide_resnet(*sizes: int, augmented: bool = False) -> Entry:
    """Of a depth and a width, or of any."""
    build = partial(wide_resnet, *sizes, **(_PAPER if augmented else {}))
    return Entry(build, _AA if augmented else _WRN, 32, augmented, frozenset({"depth", "width"} if sizes else ()))


def _resnet(depth: int, **arguments: Any) -> Entry:
    augmented = bool(arguments)
    build = partial(resnet, depth, **arguments)
    return Entry(build, _AA if augmented else _RESNET, 224, augmented, frozenset({"depth"}))


def _recalibrated(kind: str, plain: Entry) -> Entry:
    build = partial(plain.build, recalibration=kind)
    return dataclasses.replace(plain, build=build, source=_RECALIBRATED[kind], fixed=plain.fixed | {"recalibration"})


MODELS: dict[str, Entry] = {
    "wrn": _wide_resnet(),
    "aa_wrn": _wide_resnet(augmented=True),
    "wrn_28_10": _wide_resnet(28, 10),
    "aa_wrn_28_10": _wide_resnet(28, 10, augmented=True),
    **{f"resnet{depth}": _resnet(depth) for depth in (18, 34, 50, 101, 152)},
    **{f"aa_resnet{depth}": _resnet(depth, **_BASIC) for depth in (18, 34)},
    **{f"aa_resnet{depth}": _resnet(depth, **_PAPER) for depth in (50, 101, 152)},
    **{f"{kind}_wrn": _recalibrated(kind, _wide_resnet()) for kind in _RECALIBRATED},
    **{f"{kind}_wrn_28_10": _recalibrated(kind, _wide_resnet(28, 10)) for kind in _RECALIBRATED},
    **{
        f"{kind}_resnet{depth}": _recalibrated(kind, _resnet(depth))
        for kind in _RECALIBRATED
        for depth in (18, 34, 50, 101, 152)
    },
    "mnasnet_a1": Entry(partial(mnasnet), _MNASNET),
    "aa_mnasnet_a1": Entry(partial(mnasnet, **_MOBILE), _AA, augmented=True),
    **{
        f"botnet{depth}": Entry(partial(botnet, depth), _BOTNET, augmented=True, fixed=frozenset({"depth"}))
        for depth in (50, 101, 152)
    },
}
"""Every network by name; ``wrn_D_K``, also with ``aa_``, ``se_``, ``ge_``, ``bam_`` or ``cbam_`` before it, exists for
any depth and width."""


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names that match a shell-like pattern, e.g. ``aa_*``."""
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern)]


def create(name: str, **overrides: Any) -> nn.Module:
    """Builds a network.

    Args:
      name: one of `list_models`, or ``wrn_D_K``, ``aa_wrn_D_K``, ``se_wrn_D_K`` .. for a Wide-ResNet of depth D and
        width K.
      **overrides: arguments of the family's builder (`resnet`, `wide_resnet`, `mnasnet` and `botnet` in
        `aaconv.models`), e.g. ``num_classes``, ``kappa``, ``upsilon``, ``num_heads``, ``stages``, ``pooled_stages``,
        ``position_encoding``, ``dtype``. Only networks that attend take those that concern attention; an ``aa_``
        network with ``upsilon=0`` is the plain one. ``recalibration`` combines with attention; ``se_resnet50``
        is ``resnet50`` with ``recalibration="se"``.

    Returns:
      A Flax module; ``module.apply(variables, images, train=False)`` gives logits.

    Raises:
      ValueError: an unknown name or argument (close ones are listed), or a value out of its range.

    Example:
      >>> create("aa_wrn_16_2", num_classes=10).width
      2
    """
    found = entry(name)
    known = found.arguments()
    ratio = overrides.get("attention_ratio")
    for argument in overrides:
        if argument in found.fixed:
            other = ""
            if argument == "recalibration":
                other = f"; use {name.partition('_')[2]} with recalibration="
            elif "wrn" in name:
                other = f"; use {name.partition('wrn')[0]}wrn with depth= and width="
            raise ValueError(f"{argument}={overrides[argument]!r} is already set by the name {name!r}{other}")
        if argument in ATTENTION and not found.augmented and (instead := _augmented(name)):
            raise ValueError(
                f"{argument}={overrides[argument]!r}: {name} does not attend; use {instead}, or leave {argument} out "
                "(None in a config)"
            )
        if argument in ("kappa", "upsilon") and ratio is not None:
            raise ValueError(
                f"{argument}={overrides[argument]!r} and attention_ratio={ratio!r}: the ratio sets kappa and upsilon; "
                f"leave {argument} out (None in a config)"
            )
        if argument not in known:
            raise ValueError(
                f"{name} has no argument {argument!r}{close_matches(argument, known)}; known: {', '.join(known)}"
            )
        _check_type(argument, overrides[argument], known[argument].annotation)
    kind = overrides.get("recalibration", found.build.keywords.get("recalibration", "none"))
    check_effect(kind, [argument for argument in overrides if known[argument].default != overrides[argument]])
    return found.build(**overrides)


_TYPES = {
    "bool": (bool, "True or False"),
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "str": (str, "a name"),
    "Sequence[int]": (tuple | list | range, "whole numbers, such as (2, 3)"),
}


def _check_type(argument: str, value: Any, annotation: str) -> None:
    """Checks a value by the annotation of the builder's argument.

    Raises:
      ValueError: it is of another type.
    """
    if argument == "dtype":
        try:
            jnp.dtype(value)
        except TypeError:
            raise ValueError(f"dtype={value!r} is not a dtype: use float32 or bfloat16, for example") from None
        return
    kind, _, optional = annotation.partition(" | ")
    if kind not in _TYPES or optional and value is None:
        return
    type_, words = _TYPES[kind]
    members = value if kind == "Sequence[int]" and isinstance(value, tuple | list | range) else ()
    if kind == "bool":
        fits = type(value) is bool
    else:
        fits = isinstance(value, type_) and type(value) is not bool
    if not fits or not all(isinstance(member, numbers.Integral) for member in members):
        raise ValueError(f"{argument}={value!r} must be {words}{', or None' if optional else ''}")


def _augmented(name: str) -> str:
    """What to use instead of a network that does not attend; "" where there is nothing."""
    kind, _, plain = name.partition("_")
    instead = f"aa_{plain if kind in _RECALIBRATED else name}"
    try:
        entry(instead)
    except ValueError:
        return ""
    return f"{instead} with recalibration={kind!r}" if kind in _RECALIBRATED else instead


def defaults(name: str) -> dict[str, Any]:
    """Returns the arguments of a network and the values that `create` gives them if they are left out.

    Raises:
      ValueError: an unknown name.
    """
    parameters = entry(name).arguments().items()
    return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}


def entry(name: str) -> Entry:
    """Returns what is known of a network.

    Raises:
      ValueError: an unknown name; close ones are listed.
    """
    if not isinstance(name, str):
        raise ValueError(f"name={name!r} must be the name of a network, e.g. 'aa_resnet50'")
    if name in MODELS:
        return MODELS[name]
    match = re.fullmatch(rf"(?:(aa|{'|'.join(_RECALIBRATED)})_)?wrn_(\d+)_(\d+)", name)
    if match is None:
        raise ValueError(f"unknown model {name!r}{close_matches(name, MODELS)}; `aaconv models --names` lists them all")
    kind, depth, width = match.groups()
    network = _wide_resnet(int(depth), int(width), augmented=kind == "aa")
    return _recalibrated(kind, network) if kind in _RECALIBRATED else network
