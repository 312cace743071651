"""Absolute position encodings: sinusoids over several axes, and coordinate channels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sinusoid(shape: Sequence[int], channels: int, *, dtype=jnp.float32) -> jax.Array:
    r"""Sinusoidal encoding of every position, the channels divided among the axes.

    Each axis gets a share of the channels, and in it sines and cosines of its coordinate ``p`` with
    wavelengths from :math:`2\pi` up towards :math:`10^4 \cdot 2\pi`, in a geometric series.

    Args:
      shape: spatial shape ``(h, w)``, any number of axes.
      channels: number of channels; at least two an axis.
      dtype: of the result.

    Returns:
      ``(h, w, channels)``; left-over channels (when the division leaves any) are 0.

    Raises:
      ValueError: fewer than two channels an axis.

    Example:
      >>> sinusoid((4, 5), 16).shape
      (4, 5, 16)

    References:
      Parmar et al., Image Transformer, ICML 2018, 3.1 (rows and columns get half of the channels
      each); Vaswani et al., Attention Is All You Need, 2017, 3.5.
    """
    ndim = len(shape)
    per_axis = channels // ndim // 2  # frequencies an axis; each gives a sine and a cosine
    if per_axis < 1:
        raise ValueError(
            f"channels={channels} for {ndim} axes: a sinusoid needs at least 2 channels an axis, {2 * ndim} in all"
        )
    frequencies = 10_000.0 ** (-np.arange(per_axis) / per_axis)
    code = np.zeros((*shape, channels))
    for axis, size in enumerate(shape):
        angle = np.arange(size)[:, None] * frequencies[None, :]
        waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
        broadcast = waves.reshape([size if a == axis else 1 for a in range(ndim)] + [2 * per_axis])
        start = axis * 2 * per_axis
        code[..., start : start + 2 * per_axis] = broadcast
    return jnp.asarray(code, dtype)


def coordinates(shape: Sequence[int], *, radius: bool = True, dtype=jnp.float32) -> jax.Array:
    r"""Coordinate channels: each axis from -1 to 1, and the distance from the centre.

    Args:
      shape: spatial shape ``(h, w)``, any number of axes.
      radius: whether the distance from the centre, :math:`\sqrt{y^2 + x^2}`, is a channel too.
      dtype: of the result.

    Returns:
      ``(h, w, 3)`` for two axes with the radius, ``(h, w, 2)`` without.

    Example:
      >>> coordinates((1, 3))[0, :, 1]
      Array([-1.,  0.,  1.], dtype=float32)

    References:
      Liu et al., An Intriguing Failing of Convolutional Neural Networks and the CoordConv Solution,
      NeurIPS 2018, 2.
    """
    lines = [np.linspace(-1.0, 1.0, size) if size > 1 else np.zeros(1) for size in shape]
    channels = list(np.meshgrid(*lines, indexing="ij"))
    if radius:
        channels.append(np.sqrt(sum(c**2 for c in channels)))
    return jnp.asarray(np.stack(channels, axis=-1), dtype)
