"""Where a network rescales its maps: from a name and a choice of stages to a layer a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from aaconv.errors import close_matches
from aaconv.layers import BAM, CBAM, GatherExcite, SqueezeExcite
from aaconv.layers.recalibration import FORMS, check_extent
from aaconv.models.augmentation import ModuleDef, check_sizes

RECALIBRATIONS = ("none", "se", "ge", "bam", "cbam")
"""Squeeze-and-Excitation, Gather-Excite, and the bottleneck and convolutional block attention modules."""


_TAKEN = {
    "none": (),
    "se": ("reduction", "recalibration_stages"),
    "ge": ("extent", "gather", "reduction", "recalibration_stages"),
    "bam": ("reduction", "recalibration_stages"),
    "cbam": ("reduction", "recalibration_stages"),
}


def check_effect(recalibration: str, given: Sequence[str]) -> None:
    """Checks that no argument of recalibration is given that the chosen kind does not take.

    Args:
      recalibration: one of `RECALIBRATIONS`.
      given: names of arguments, others too.

    Raises:
      ValueError: naming the argument and what takes it.
    """
    taken = _TAKEN.get(recalibration, _TAKEN["ge"])
    for argument in given:
        if argument in _TAKEN["ge"] and argument not in taken:
            takers = ", ".join(kind for kind, arguments in _TAKEN.items() if argument in arguments)
            takes = f", which takes {' and '.join(taken)}" if taken else ""
            raise ValueError(
                f"{argument} has no effect with recalibration={recalibration!r}{takes}: leave it out (None in a "
                f"config), or set recalibration to one that takes it ({takers})"
            )


def identity(*, name: str, norm: ModuleDef | None = None, dtype: Any = None) -> Callable[[jax.Array], jax.Array]:
    """Stands where a layer of `aaconv.layers.recalibration` could: returns what gives the map as it is."""
    return lambda x: x


def recalibrations(
    num_stages: int,
    *,
    recalibration: str = "none",
    reduction: int = 16,
    extent: int = 0,
    gather: str = "parameter_free",
    stages: Sequence[int] | None = None,
) -> tuple[tuple[ModuleDef, ...], tuple[ModuleDef, ...]]:
    """Returns what rescales the residual branch of the blocks of each stage, and what rescales its result.

    BAM stands between stages, after the last block of one and before the stride of the next (Park et al. 2018,
    figure 1); the others stand in every block, just before the addition (Hu et al. 2018, figure 3; Woo et al. 2018,
    figure 3). The layers still take ``name``, ``norm`` and ``dtype``. Squeeze-and-Excitation and Gather-Excite
    have no biases here, which Hu et al. found better on ResNets: SE-WRN-28-10 then has the 36.5M parameters
    of Bello et al., table 1; with biases it has 36.55M, which would be printed as 36.6M.

    Args:
      num_stages: stages of the network, counted from 1.
      recalibration: one of `RECALIBRATIONS`.
      reduction: channels over channels of the bottleneck, of all but the parameter-free and the parametrised
        Gather-Excite.
      extent, gather: ``extent`` and ``form`` of `aaconv.layers.GatherExcite`.
      stages: the stages that are rescaled; None: all of them, for ``bam`` all but the last.

    Returns:
      ``(block_recalibrations, stage_recalibrations)``, one a stage each; `identity` where nothing is to be done.

    Raises:
      ValueError: an unknown name, a stage that does not exist, or a reduction or extent out of its range.
    """
    for argument, value, known in (("recalibration", recalibration, RECALIBRATIONS), ("gather", gather, FORMS)):
        if value not in known:
            raise ValueError(f"{argument}={value!r} is not one of {', '.join(known)}{close_matches(value, known)}")
    check_sizes(reduction=reduction)
    check_extent(extent)
    if stages is None:
        stages = range(1, num_stages if recalibration == "bam" else num_stages + 1)
    wrong = [s for s in stages if not 1 <= s <= num_stages]
    if wrong:
        raise ValueError(
            f"recalibration_stages={tuple(stages)}: this network has stages 1 to {num_stages}, not {wrong[0]}"
        )
    nowhere = (identity,) * num_stages
    layers: dict[str, ModuleDef] = {
        "none": identity,
        "se": partial(SqueezeExcite, reduction=reduction, use_bias=False),
        "ge": partial(GatherExcite, extent=extent, form=gather, reduction=reduction),
        "bam": partial(BAM, reduction=reduction),
        "cbam": partial(CBAM, reduction=reduction),
    }
    chosen = tuple(layers[recalibration] if stage in stages else identity for stage in range(1, num_stages + 1))
    return (nowhere, chosen) if recalibration == "bam" else (chosen, nowhere)
