"""Augmentation and normalisation as pure functions, for use inside a jitted step.

Each takes a batch ``(b, h, w, c)`` and, where it is random, one key for the whole batch;
every example draws its own numbers from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns ``(images / 255 - mean) / std`` in float32.

    Args:
      images: ``(b, h, w, c)`` with values from 0 to 255.
      mean: a number a channel, of pixels scaled to 0..1.
      std: likewise.
    """
    scale = 1.0 / (255.0 * np.asarray(std, np.float64))
    shift = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    shape = (1,) * (images.ndim - 1) + (-1,)
    return images.astype(jnp.float32) * scale.astype(np.float32).reshape(shape) + shift.astype(np.float32).reshape(
        shape
    )


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads with zeros and cuts a random window of the original size out of each image.

    Args:
      key: a typed key.
      images: ``(b, h, w, c)``.
      padding: zero pixels added on each side; 0 returns the images.
    """
    if padding == 0:
        return images
    batch, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    # Measured on a CPU against gathers by row and column, one-hot products and chains of selects,
    # 128 to 1024 images of 32x32: this is the fastest, by 1.3 to 3 times, and it shards without
    # any communication.
    return jax.vmap(lambda image, yx: jax.lax.dynamic_slice(image, (yx[0], yx[1], 0), shape))(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half.

    Args:
      key: a typed key.
      images: ``(b, h, w, c)``.
    """
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)
