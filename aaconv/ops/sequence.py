r"""Relative attention's ancestors, on sequences: the forms that the paper compares the memory of its own with.

Letters: ``*b`` leading batch, ``l`` positions, ``n`` heads, ``d`` key depth a head, ``e`` value depth a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from aaconv.ops import relative
from aaconv.ops.attention import check_inputs


def shaw_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_table: jax.Array,
    value_table: jax.Array | None = None,
    *,
    causal: bool = False,
    scale: float | jax.Array | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    r"""Attention with an embedding for each pair of positions, of the key and of the value.

    .. math:: o_i = \sum_j \alpha_{ij} (v_j + a^V_{ij}), \quad
              \alpha_{ij} = \mathrm{softmax}_j\big(\mathrm{scale}\, q_i^\top (k_j + a^K_{ij})\big), \quad
              a_{ij} = w_{\mathrm{clip}(j - i, -c, c)}

    Both :math:`a_{ij}` are formed, ``(l, l, d)`` and ``(l, l, e)`` numbers shared by images and heads, as in the
    paper: that is the memory which later forms save, 1.1 GB a table for l = 2048 and d = 64 in float32. For keys alone,
    without a mask, `relative_attention` with ``spatial_ndim=1`` computes the same in linear memory.

    Args:
      q: queries ``(*b, l, n, d)``.
      k: keys ``(*b, l, n, d)``.
      v: values ``(*b, l, n, e)``.
      key_table: ``(2 * c + 1, d)`` of any ``c``, shared by the heads; row ``offset + c`` serves
        ``offset = key - query``, and the outermost rows all offsets beyond.
      value_table: ``(2 * c + 1, e)``, its own ``c``; None for values without positions.
      causal: whether a query attends to keys at or before it only.
      scale: multiplies content and relative logits alike; default :math:`d^{-1/2}`.
      precision: of the matrix products, see `jax.lax.Precision`.

    Returns:
      ``(*b, l, n, e)`` in the inputs' dtype; the softmax is in float32 or wider.

    Raises:
      ValueError: shapes or dtypes do not fit, or a table with an even number of rows or of another depth.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = v = jnp.ones((2, 7, 1, 4))
      >>> shaw_attention(q, k, v, jnp.ones((5, 4)), jnp.ones((5, 4))).shape
      (2, 7, 1, 4)

    References:
      Shaw et al., Self-Attention with Relative Position Representations, NAACL 2018, 3.2, eq. 3 and 4,
      https://arxiv.org/abs/1803.02155
    """
    check_inputs(q, k, v, None, 1)
    length = q.shape[-3]
    keys = _by_offset("key_table", key_table, length, q.shape[-1])
    positions = relative.relative_logits(q, (keys,), spatial_ndim=1, form="explicit", precision=precision)
    weights = _weights(q, k, positions, causal=causal, scale=scale, precision=precision).astype(v.dtype)
    out = jnp.einsum("...nij,...jne->...ine", weights, v, precision=precision)
    if value_table is not None:
        values = _by_offset("value_table", value_table, length, v.shape[-1])
        pairs = relative.rows_by_query(values.astype(v.dtype), length)
        out = out + jnp.einsum("...nij,ije->...ine", weights, pairs, precision=precision)
    return out


def music_transformer_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    *,
    scale: float | jax.Array | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    r"""Causal attention with relative logits by skewing: no embedding of a pair is formed.

    .. math:: O = \mathrm{softmax}\big(\mathrm{scale}\, (Q K^\top + S)\big) V, \quad
              S_{ij} = q_i^\top r_{j - i} \;\text{for}\; j \le i

    Huang et al. learn a table a head; here the heads share one, as in attention augmentation. Map this function over
    the heads, with ``n = 1``, for a table each. The logits by offset and by position are ``n l^2`` numbers an image
    each, as many as there are content logits.

    Args:
      q: queries ``(*b, l, n, d)``.
      k: keys ``(*b, l, n, d)``.
      v: values ``(*b, l, n, e)``.
      table: ``(l, d)``, row ``offset + l - 1`` for offsets ``key - query`` from ``-(l - 1)`` to 0.
      scale: multiplies content and relative logits alike; default :math:`d^{-1/2}`.
      precision: of the matrix products, see `jax.lax.Precision`.

    Returns:
      ``(*b, l, n, e)`` in the inputs' dtype; the softmax is in float32 or wider.

    Raises:
      ValueError: shapes or dtypes do not fit, or the table's do not.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = v = jnp.ones((2, 7, 1, 4))
      >>> music_transformer_attention(q, k, v, jnp.ones((7, 4))).shape
      (2, 7, 1, 4)

    References:
      Huang et al., Music Transformer, ICLR 2019, eq. 3 and 3.4.1, https://arxiv.org/abs/1809.04281
    """
    check_inputs(q, k, v, None, 1)
    positions = relative.masked_relative_logits(q, table, precision=precision)
    weights = _weights(q, k, positions, causal=True, scale=scale, precision=precision).astype(v.dtype)
    return jnp.einsum("...nij,...jne->...ine", weights, v, precision=precision)


def _weights(q, k, positions, *, causal, scale, precision) -> jax.Array:
    """Softmax weights ``(*b, n, l, l)``, float32 at least."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif jnp.shape(scale):
        raise ValueError(f"scale has shape {jnp.shape(scale)}: it must be one number; multiply q by anything else")
    content = jnp.einsum(
        "...ind,...jnd->...nij", q, k, precision=precision, preferred_element_type=relative.logits_dtype(q.dtype)
    )
    logits = (content + positions) * jnp.asarray(scale, content.dtype)
    if causal:
        length = q.shape[-3]
        seen = jnp.broadcast_to(jnp.tri(length, dtype=bool), logits.shape)
        logits = jnp.where(seen, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def _by_offset(name: str, table: jax.Array, length: int, depth: int) -> jax.Array:
    """``(2 * c + 1, depth)`` -> ``(2 * length - 1, depth)``, a row for every offset, clipped."""
    relative.check_arrays({name: table})
    if table.ndim != 2 or table.shape[0] % 2 == 0 or table.shape[1] != depth:
        raise ValueError(
            f"{name} has shape {table.shape}: it must be (2 * c + 1, {depth}), an odd number of rows, one for each "
            "offset from -c to c"
        )
    furthest = table.shape[0] // 2
    return table[jnp.clip(jnp.arange(1 - length, length), -furthest, furthest) + furthest]
