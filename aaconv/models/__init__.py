"""Networks by name: `create` and `list_models`."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from flax import linen as nn

from aaconv.errors import close_matches
from aaconv.models.resnet import ResNet as ResNet, resnet
from aaconv.models.wide_resnet import WideResNet as WideResNet, wide_resnet

_PAPER = {"kappa": 0.2, "upsilon": 0.1, "num_heads": 8}  # kappa = 2 upsilon = 0.2, Bello et al. 4.1 and 4.2
_BASIC = {"kappa": 0.25, "upsilon": 0.25, "num_heads": 8}  # inferred from ResNet-34's parameter count

MODELS: dict[str, Callable[..., nn.Module]] = {
    "wrn": wide_resnet,
    "aa_wrn": partial(wide_resnet, **_PAPER),
    "wrn_28_10": partial(wide_resnet, 28, 10),
    "aa_wrn_28_10": partial(wide_resnet, 28, 10, **_PAPER),
    **{f"resnet{depth}": partial(resnet, depth) for depth in (18, 34, 50, 101, 152)},
    **{f"aa_resnet{depth}": partial(resnet, depth, **_BASIC) for depth in (18, 34)},
    **{f"aa_resnet{depth}": partial(resnet, depth, **_PAPER) for depth in (50, 101, 152)},
}
"""Every network by name; ``wrn_D_K`` and ``aa_wrn_D_K`` exist for any depth and width."""


ATTENTION = (
    "kappa upsilon num_heads min_key_depth stages pooled_stages position_encoding larger_maps strided_attention "
    "implementation"
).split()
"""The arguments that only the augmented networks take."""


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names that match a shell-like pattern, e.g. ``aa_*``."""
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern)]


def create(name: str, **overrides: Any) -> nn.Module:
    """Builds a network.

    Args:
      name: one of `list_models`, or ``wrn_D_K`` / ``aa_wrn_D_K`` for a Wide-ResNet of depth D and width K.
      **overrides: arguments of the family's builder, `aaconv.models.resnet.resnet` or
        `aaconv.models.wide_resnet.wide_resnet`, e.g. ``num_classes``, ``kappa``, ``upsilon``, ``num_heads``,
        ``stages``, ``pooled_stages``, ``position_encoding``, ``dtype``. Only the augmented networks (``aa_``) take
        those that concern attention; with ``upsilon=0`` they are the plain ones.

    Returns:
      A Flax module; ``module.apply(variables, images, train=False)`` gives logits.

    Raises:
      ValueError: an unknown name or argument (close ones are listed), or a value out of its range.

    Example:
      >>> create("aa_wrn_16_2", num_classes=10).width
      2
    """
    builder = MODELS.get(name)
    fixed: set[str] = set()
    if builder is None:
        builder, fixed = _wide_resnet_by_name(name), {"depth", "width"}
    elif name in ("wrn_28_10", "aa_wrn_28_10"):
        fixed = {"depth", "width"}
    elif "resnet" in name:
        fixed = {"depth"}
    known = [p for p in inspect.signature(builder).parameters if p not in fixed]
    plain = not name.startswith("aa_")
    for argument in overrides:
        if argument in fixed:
            other = f"; use {'aa_' * name.startswith('aa_')}wrn with depth= and width=" if "wrn" in name else ""
            raise ValueError(f"{argument}={overrides[argument]!r} is already set by the name {name!r}{other}")
        if argument not in known:
            raise ValueError(
                f"{name} has no argument {argument!r}{close_matches(argument, known)}; known: {', '.join(known)}"
            )
        if plain and argument in ATTENTION:
            raise ValueError(
                f"{argument}={overrides[argument]!r}: {name} is the plain network; use aa_{name}, or leave "
                f"{argument} out (None in a config)"
            )
    return builder(**overrides)


def defaults(name: str) -> dict[str, Any]:
    """Returns the arguments of a network and the values that `create` gives them if they are left out.

    Raises:
      ValueError: an unknown name.
    """
    builder = MODELS.get(name) or _wide_resnet_by_name(name)
    plain = not name.startswith("aa_")
    return {
        argument: parameter.default
        for argument, parameter in inspect.signature(builder).parameters.items()
        if parameter.default is not inspect.Parameter.empty and not (plain and argument in ATTENTION)
    }


def _wide_resnet_by_name(name: str) -> Callable[..., nn.Module]:
    match = re.fullmatch(r"(aa_)?wrn_(\d+)_(\d+)", name)
    if match is None:
        raise ValueError(f"unknown model {name!r}{close_matches(name, MODELS)}; known: {', '.join(MODELS)}")
    augmented, depth, width = match.groups()
    return partial(wide_resnet, int(depth), int(width), **(_PAPER if augmented else {}))
