r"""Layers that rescale a map by what they see of it: the mechanisms that the paper compares attention with.

Each is called on a map ``(*b, h, w, c)`` and returns one of the same shape and dtype, so that a network can
inject it into its blocks. All take ``norm``, the batch normalisation of the network, whether or not they
normalise, and ``dtype``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

ModuleDef = Callable[..., Any]


class SqueezeExcite(nn.Module):
    r"""Squeeze-and-Excitation: every channel is scaled by a number that all channels' means decide.

    .. math:: y = x \cdot \sigma(W_2\, \delta(W_1\, \bar x + b_1) + b_2), \qquad
              \bar x_c = \frac{1}{H W} \sum_{i, j} x_{ijc}

    with :math:`\delta` the ReLU, :math:`W_1` of ``(c, c / r)`` and :math:`W_2` of ``(c / r, c)``.

    Attributes:
      reduction: r; ``c / r`` is rounded down.
      reduced: channels of the bottleneck instead of ``c / r``.
      norm: not used.
      dtype: of the activations; means are float32.

    Raises:
      ValueError: at the call, where ``reduction`` is larger than the channels.

    References:
      Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, eq. 2 to 4, https://arxiv.org/abs/1709.01507
    """

    reduction: int = 16
    reduced: int | None = None
    norm: ModuleDef | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*b, h, w, c)`` -> ``(*b, h, w, c)``."""
        channels = x.shape[-1]
        reduced = reduced_channels(channels, self.reduction) if self.reduced is None else self.reduced
        mean = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(-3, -2), keepdims=True)
        y = nn.relu(nn.Dense(reduced, dtype=self.dtype, name="reduce")(mean.astype(x.dtype)))
        y = nn.Dense(channels, dtype=self.dtype, name="expand")(y)
        return x * nn.sigmoid(y)


def reduced_channels(channels: int, reduction: int) -> int:
    """``channels / reduction``, rounded down.

    Raises:
      ValueError: nothing is left, or the ratio is below 1.
    """
    if reduction < 1:
        raise ValueError(f"reduction={reduction} must be at least 1")
    if reduction > channels:
        raise ValueError(
            f"reduction={reduction} is larger than the {channels} channels it divides: use at most {channels}"
        )
    return channels // reduction
