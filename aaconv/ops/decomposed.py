r"""Decomposed relative positions, as transformers for images and video have them, through `relative_attention`.

Letters as in `aaconv.ops.attention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aaconv.ops import relative
from aaconv.ops.attention import relative_attention
from aaconv.ops.blocks import BlockSizes


def decomposed_relative_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel_h: jax.Array,
    rel_w: jax.Array,
    *,
    scale: float | jax.Array | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    r"""Attention over a map whose position terms are not scaled, with tables of any length.

    .. math:: o_i = \sum_j \mathrm{softmax}_j\big(\mathrm{scale}\, q_i^\top k_j
              + q_i^\top R^H_{i_y - j_y} + q_i^\top R^W_{i_x - j_x}\big)\, v_j

    This is `relative_attention` in three other conventions: ``scale`` reaches the content alone, a table's rows
    run by ``query - key``, and a table that was made for another size is resized to the map, see `resize_rows`.
    Tables that are turned around and divided by ``scale`` say the same in ours, so every implementation serves.

    The equation of MViTv2 in print divides both terms by :math:`\sqrt d`; its published weights and those of SAM
    come from programs that scale the content alone, and that is the form here. MViTv2 also pools the keys to a smaller
    map than the queries', which is not covered: queries and keys lie on one map, as in SAM.

    Args:
      q: queries ``(*b, h, w, n, d)``; ``*b`` any batch shape, ``n`` heads.
      k: keys ``(*b, h, w, n, d)``.
      v: values ``(*b, h, w, n, e)``.
      rel_h, rel_w: tables ``(2 * m - 1, d)`` of any ``m`` each, shared by the heads; row ``offset + m - 1`` serves
        ``offset = query - key``.
      scale: multiplies the content logits, not zero; default :math:`d^{-1/2}`.
      implementation, block_sizes, precision: as in `relative_attention`.

    Returns:
      ``(*b, h, w, n, e)`` in the inputs' dtype.

    Raises:
      ValueError: shapes or dtypes do not fit, a table with an even number of rows or of another depth, ``scale=0``, an
        unknown name.
      NotImplementedError: the named implementation cannot serve here; the message says why.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = v = jnp.ones((2, 6, 5, 1, 8))
      >>> decomposed_relative_attention(q, k, v, jnp.ones((27, 8)), jnp.ones((27, 8))).shape
      (2, 6, 5, 1, 8)

    References:
      Li et al., MViTv2: Improved Multiscale Vision Transformers, CVPR 2022, 4.1, https://arxiv.org/abs/2112.01526;
      Kirillov et al., Segment Anything, ICCV 2023, appendix A, https://arxiv.org/abs/2304.02643
    """
    relative.check_arrays({"q": q}, floating=False)
    space = relative.spatial_shape(q, 2)
    relative.check_arrays({"rel_h": rel_h, "rel_w": rel_w})
    for name, table in (("rel_h", rel_h), ("rel_w", rel_w)):
        if table.ndim != 2 or table.shape[0] % 2 == 0 or table.shape[1] != q.shape[-1]:
            raise ValueError(
                f"{name} has shape {table.shape} for key depth {q.shape[-1]}: it must be (2 * m - 1, {q.shape[-1]}), "
                "an odd number of rows, one for each offset from 1 - m to m - 1"
            )
    if scale is None:
        scale = float(q.shape[-1] ** -0.5)
    elif isinstance(scale, int | float) and scale == 0:
        raise ValueError("scale=0 leaves no content: it must not be zero, the tables are divided by it")
    elif jnp.shape(scale):
        raise ValueError(f"scale has shape {jnp.shape(scale)}: it must be one number; multiply k by anything else")
    rel = [_ours(table, size, scale).astype(q.dtype) for table, size in ((rel_h, space[0]), (rel_w, space[1]))]
    return relative_attention(
        q, k, v, rel, scale=scale, implementation=implementation, block_sizes=block_sizes, precision=precision
    )


def resize_rows(table: jax.Array, rows: int) -> jax.Array:
    """A table with another number of rows, by linear interpolation between the centres of the rows.

    Each table is a partition of one and the same interval into equal cells, with a row's values at the centre of
    its cell. A new row takes the values at the centre of its own cell, from the two old centres around it, and beyond
    the outermost old centre that row's values. Also from more rows to fewer: nothing is averaged.

    Offset zero stays in the middle. The outermost rows do not meet, unlike in `aaconv.layers.resize_table`.

    Args:
      table: ``(m, d)``.
      rows: of the result.

    Returns:
      ``(rows, d)`` in the table's dtype; the table itself where it has as many.

    Example:
      >>> import jax.numpy as jnp
      >>> resize_rows(jnp.arange(4.0)[:, None], 8)[:, 0]
      Array([0.  , 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.  ], dtype=float32)
    """
    made_for = table.shape[0]
    if rows == made_for:
        return table
    at = np.clip((np.arange(rows) + 0.5) * (made_for / rows) - 0.5, 0, made_for - 1)
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, made_for - 1)
    wide = table.astype(relative.logits_dtype(table.dtype))
    share = jnp.asarray((at - below)[:, None], wide.dtype)
    return (wide[below] * (1 - share) + wide[above] * share).astype(table.dtype)


def _ours(table: jax.Array, size: int, scale: float | jax.Array) -> jax.Array:
    """Turns rows by ``query - key`` into rows by ``key - query``, ``(2 * size - 1, d)``, that ``scale`` cancels in."""
    table = resize_rows(table, 2 * size - 1)[::-1]
    wide = relative.logits_dtype(table.dtype)
    return table.astype(wide) / jnp.asarray(scale, wide)
