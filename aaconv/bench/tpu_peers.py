"""jax's own flash-attention kernel for TPUs, made to compute relative attention: what ours is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from aaconv import ops

BLOCK = 128  # the kernel wants lengths that are multiples of it
Peer = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def flash_codes(q: jax.Array, k: jax.Array, v: jax.Array, rel_h: jax.Array, rel_w: jax.Array) -> jax.Array:
    """The kernel with the axis logits appended to q, and one-hot rows and columns to k.

    Args:
      q, k: ``(b, n, h w, d)``.
      v: ``(b, n, h w, e)``.
      rel_h, rel_w: ``(2 * h - 1, d)`` and ``(2 * w - 1, d)``.

    Returns:
      ``(b, n, h w, e)``.
    """
    height, width = _space(rel_h, rel_w)
    parts = ops.axis_logits(_channels_last(q, height, width), (rel_h, rel_w))
    logits = [_heads_first(part).astype(q.dtype) for part in parts]
    rows = jnp.repeat(jnp.eye(height, dtype=k.dtype), width, axis=0)
    columns = jnp.tile(jnp.eye(width, dtype=k.dtype), (height, 1))
    codes = jnp.broadcast_to(jnp.concatenate([rows, columns], -1), (*k.shape[:-1], height + width))
    scale = q.shape[-1] ** -0.5
    return _attend(jnp.concatenate([q, *logits], -1), jnp.concatenate([k, codes], -1), v, scale=scale)


def flash_bias(q: jax.Array, k: jax.Array, v: jax.Array, rel_h: jax.Array, rel_w: jax.Array) -> jax.Array:
    """The kernel with all of the relative logits built as its additive bias; arguments as of `flash_codes`."""
    bias = ops.relative_logits(_channels_last(q, *_space(rel_h, rel_w)), (rel_h, rel_w))
    # Not scaled: the kernel scales content and bias together, as eq. 4 does.
    return _attend(q, k, v, scale=q.shape[-1] ** -0.5, bias=bias.astype(q.dtype))


PEERS: Mapping[str, tuple[str, Peer]] = {
    "tpu_flash_codes": ("jax's TPU flash kernel, row and column codes appended", flash_codes),
    "tpu_flash_bias": ("jax's TPU flash kernel, the bias built", flash_bias),
}


def _space(rel_h: jax.Array, rel_w: jax.Array) -> tuple[int, int]:
    return (rel_h.shape[0] + 1) // 2, (rel_w.shape[0] + 1) // 2


def _channels_last(x: jax.Array, height: int, width: int) -> jax.Array:
    """``(b, n, h w, d)`` -> ``(b, h, w, n, d)``; what follows turns it back, and the compiler drops both."""
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], height, width, x.shape[1], x.shape[-1])


def _heads_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[3:]), 2, 1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, bias: jax.Array | None = None) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    length, depth, value_depth = *q.shape[2:], v.shape[-1]
    missing = -length % BLOCK
    # The kernel takes values only as deep as the keys, and depths above 128 only in multiples of it. Keys that are
    # padding get a logit out of reach through one more channel, 1 in every query.
    wide = max(depth + 1, value_depth)
    wide += -wide % BLOCK if wide > BLOCK else 0
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, wide - x.shape[-1])))
    channel = (jnp.arange(wide) == depth).reshape(1, 1, 1, wide)
    absent = (jnp.arange(length + missing) >= length).reshape(1, 1, length + missing, 1)
    # Added, not set, so that nothing but a sum is differentiated.
    q, k, v = pad(q) + channel.astype(q.dtype), pad(k) - (1e9 * (absent & channel)).astype(k.dtype), pad(v)
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, missing), (0, missing)))
    return flash_attention(q, k, v, ab=bias, sm_scale=scale)[..., :length, :value_depth]
