"""Where a network attends: from kappa, upsilon and a choice of stages to a convolution a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.layers import AAConv
from aaconv.layers.position import check_position_encoding
from aaconv.ops.choice import check_name

ModuleDef = Callable[..., Any]

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def stage_convs(
    num_stages: int,
    *,
    kappa: float = 0.0,
    upsilon: float = 0.0,
    attention_ratio: float | None = None,
    num_heads: int = 8,
    stages: Sequence[int],
    pooled_stages: Sequence[int] = (),
    **attention: Any,
) -> tuple[ModuleDef, ...]:
    """Returns the convolution to inject into each stage, `flax.linen.Conv` or a partial of `AAConv`.

    Args:
      num_stages: stages of the network, counted from 1.
      kappa, upsilon, num_heads: as in `aaconv.AAConv`; ``upsilon=0`` augments nothing.
      attention_ratio: kappa and upsilon alike, in the place of both.
      stages: the stages that are augmented.
      pooled_stages: those of them that attend at half their resolution.
      **attention: further arguments of `aaconv.AAConv`.

    Raises:
      ValueError: a stage that does not exist, or a pooled stage that is not augmented.
    """
    if attention_ratio is not None:
        if not 0 <= attention_ratio <= 1:
            raise ValueError(
                f"attention_ratio={attention_ratio} must lie between 0 (a plain network) and 1 (attention only)"
            )
        kappa = upsilon = attention_ratio
    if not 0 <= upsilon <= 1:
        raise ValueError(f"upsilon={upsilon} must lie between 0 (a plain network) and 1 (attention only)")
    if kappa < 0:
        raise ValueError(f"kappa={kappa} must not be negative")
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    check_position_encoding(attention.get("position_encoding", "relative"))
    check_name(attention.get("implementation"))
    for name, chosen in (("stages", stages), ("pooled_stages", pooled_stages)):
        wrong = [s for s in chosen if not 1 <= s <= num_stages]
        if wrong:
            raise ValueError(f"{name}={tuple(chosen)}: this network has stages 1 to {num_stages}, not {wrong[0]}")
    if upsilon == 0:
        return (nn.Conv,) * num_stages
    extra = sorted(set(pooled_stages) - set(stages))
    if extra:
        raise ValueError(
            f"pooled_stages={tuple(pooled_stages)} names stage {extra[0]}, which is not among the augmented "
            f"stages={tuple(stages)}: leave it out, or augment that stage"
        )
    conv = partial(AAConv, kappa=kappa, upsilon=upsilon, num_heads=num_heads, **attention)
    return tuple(
        partial(conv, pooled_attention=stage in pooled_stages) if stage in stages else nn.Conv
        for stage in range(1, num_stages + 1)
    )


def conv_and_norm(*, train: bool, dtype: Any, momentum: float) -> tuple[partial[nn.Conv], partial[nn.BatchNorm]]:
    """Returns the plain convolution (no bias, He initialisation) and the batch normalisation of a network."""
    conv = partial(nn.Conv, use_bias=False, dtype=dtype, kernel_init=he_normal)
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=momentum, epsilon=1e-5, dtype=dtype)
    return conv, norm


def check_sizes(**sizes: int) -> None:
    """Checks that every size is at least 1.

    Raises:
      ValueError: naming the one that is not.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def check_images(module: nn.Module, images: jax.Array, *, stem: str, stride: int) -> None:
    """Checks images before the first layer sees them.

    Args:
      module: the network, inside its ``__call__``.
      images: ``(*b, h, w, c)``.
      stem: name of the first convolution.
      stride: total stride of the network, and the smallest side it takes.

    Raises:
      ValueError: rank, dtype, size or channels do not fit.
    """
    if images.ndim < 3:
        raise ValueError(f"images have shape {images.shape}: they must be (*b, h, w, c)")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}: scale and normalise them to floating point first")
    if min(images.shape[-3:-1]) < stride:
        raise ValueError(
            f"images are {images.shape[-3]}x{images.shape[-2]} pixels: this network divides each side by {stride}, "
            f"so both must be at least {stride}"
        )
    if module.has_variable("params", stem):
        channels = nn.meta.unbox(module.get_variable("params", stem)["kernel"]).shape[-2]
        if images.shape[-1] != channels:
            raise ValueError(
                f"images have {images.shape[-1]} channels and the network was initialised with {channels}: "
                "convert the images, or initialise with as many channels"
            )
