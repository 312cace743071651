r"""Relative attention in linear memory, in plain XLA: one block of query lines at a time.

From the formula to the code, for two spatial axes. The logit of query :math:`i` and key :math:`j` is

.. math:: s_{ij} = q_i^\top k_j + b^H_{i, j_y} + b^W_{i, j_x}, \quad
          b^H_{i, y} = q_i^\top r^H_{y - i_y}, \quad b^W_{i, x} = q_i^\top r^W_{x - i_x}

(eq. 4 of Bello et al. 2019), so a block of queries needs its own rows of the attention map and, for the
positions, H + W numbers a query. Nothing else of the map exists at that moment, and nothing of it is
kept: the forward pass leaves the output and one number a query, the logarithm of the softmax's
denominator :math:`\ell_i`; the backward pass computes each block again and takes from it, with
:math:`g` the gradient of the output and :math:`\delta_i = g_i^\top o_i`,

.. math:: p_{ij} = e^{s_{ij} - \ell_i}, \quad t_{ij} = p_{ij} (g_i^\top v_j - \delta_i), \quad
          dv_j = \sum_i p_{ij} g_i, \quad dk_j = \sum_i t_{ij} q_i, \quad dq_i = \sum_j t_{ij} (k_j + r_{ij})

where the sum over the tables needs only the sums of :math:`t` over key columns and over key rows.

Memory is linear in H W for maps whose axes are of similar length. For signals and for maps with one very
long axis it is not yet: the rows of a table are gathered for every position of its axis, ``size**2 * d``
numbers, and a block is at least one line, along the last axis.

A tile of the map is held as ``(b, n, *keys, queries)``, queries last: the sums over keys then run over
whole vectors of queries, and the products with the short depths are as wide as a line. That order, not
the blocks alone, is what makes it fast on a CPU.

Letters: ``b`` images, ``n`` heads, ``d`` and ``e`` depths of keys and values, ``k`` all keys, ``r``
lines of the block, ``w`` positions of a line (the last spatial axis).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aaconv.ops import mesh, relative
from aaconv.ops.blocks import BlockSizes

# How many logits a tile holds, and for how many queries. It should stay near the cores: in the caches of a
# CPU, where that is measured, in the VMEM of a TPU, where the compiled programs' traffic was compared
# (experiments/attention_cost). On a GPU it should be worth the launch of its kernels; not measured yet.
TILE = {"cpu": (1 << 20, 112), "tpu": (1 << 21, 128), "gpu": (1 << 24, 128)}


@functools.partial(jax.jit, static_argnames=("spatial_ndim", "precision", "blocks", "platform"))
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel: Sequence[jax.Array] | None,
    scale: float | jax.Array,
    *,
    spatial_ndim: int,
    precision: lax.PrecisionLike = None,
    blocks: BlockSizes | None = None,
    platform: str = "cpu",
) -> jax.Array:
    """`aaconv.ops.relative_attention`, block by block; arguments are taken as checked.

    Args:
      q, k, v, rel, scale, spatial_ndim, precision: as there. Reverse-mode derivatives of all arrays.
      blocks: `BlockSizes`, or None to take them from the shape and ``platform``.
      platform: a key of `TILE`.

    Raises:
      ValueError: a block is not of whole lines.
    """
    options = _Options(spatial_ndim, precision, blocks, platform)
    dtype = q.dtype
    if 0 in q.shape:
        return jnp.zeros_like(v)
    if platform == "cpu":  # XLA's CPU products of 16-bit inputs are slow, and inside loops some are missing
        q, k, v, rel = jax.tree.map(lambda x: x.astype(relative.logits_dtype(dtype)), (q, k, v, rel))
    attend: Any = lambda *arrays: _attend(*mesh.vary_alike(*arrays), options)
    return mesh.by_device(attend, spatial_ndim, q, k, v, rel, jnp.asarray(scale)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Options:
    spatial_ndim: int
    precision: lax.PrecisionLike
    blocks: BlockSizes | None
    platform: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, rel, scale, options) -> Any:
    return _attend_forward(q, k, v, rel, scale, options)[0]


def _attend_forward(q, k, v, rel, scale, options):
    out, log_total = forward(q, k, v, rel, scale, **vars(options))
    return out, (q, k, v, rel, scale, out, log_total)


def _attend_backward(options, saved, d_out):
    q, k, v, rel, scale, out, log_total = saved
    return backward(q, k, v, rel, scale, out, log_total, d_out, **vars(options))


_attend.defvjp(_attend_forward, _attend_backward)


def forward(q, k, v, rel, scale, *, spatial_ndim, precision=None, blocks=None, platform="cpu"):
    """Attends block by block.

    Args:
      q, k, v, rel, scale, spatial_ndim, precision: as in `aaconv.ops.relative_attention`, checked.
      blocks: `BlockSizes`, or None to take them from the shape and ``platform``.
      platform: a key of `TILE`.

    Returns:
      The output ``(*b, *space, n, e)`` in the inputs' dtype, and the logarithms of the softmax's
      denominators ``(*b, *space, n)`` in float32 or wider.
    """
    cut = _cut(q, spatial_ndim, blocks, platform, precision)
    before, after = _scales(q.dtype, scale)
    # The column of ones has the product with the values sum the denominator too.
    v1 = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    by_group = cut.queries(q if before is None else q * before), cut.keys(k), cut.values(v1)
    tables = cut.table_rows(rel, q.dtype)

    def group(_, xs):
        q, k, v1 = xs

        def block(_, xs):
            q, lines = xs
            logits = cut.logits(q, k, (lines, tables[1]), after)
            most = jnp.max(logits, axis=cut.key_axes, keepdims=True)
            p = cut.flat_keys(jnp.exp(logits - most)).astype(v.dtype)
            out = cut.einsum("bnek,bnkq->bneq", v1, p)
            total = out[:, :, -1:]
            log_total = most.reshape(total.shape) + jnp.log(total)
            return None, ((out[:, :, :-1] / total).astype(v.dtype), log_total)

        return None, lax.scan(block, None, (q, tables[0]))[1]

    _, (out, log_total) = cut.over_groups(group, None, by_group)
    return cut.from_queries(out, v.shape), cut.from_queries(log_total, (*q.shape[:-1], 1))[..., 0]


def backward(q, k, v, rel, scale, out, log_total, d_out, *, spatial_ndim, precision=None, blocks=None, platform="cpu"):
    """Gradients of all inputs, each block computed again, in one sweep.

    Args:
      q, k, v, rel, scale, spatial_ndim, precision, blocks, platform: as in `forward`.
      out, log_total: what `forward` returned.
      d_out: the gradient of ``out``.

    Returns:
      The gradients of ``q, k, v, rel, scale``, each in its input's shape and dtype.
    """
    cut = _cut(q, spatial_ndim, blocks, platform, precision)
    wide = relative.logits_dtype(q.dtype)
    before, after = _scales(q.dtype, scale)
    e = v.shape[-1]
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), -1, keepdims=True)
    exact = q.dtype == wide
    v_and_1, d_out_and_delta = v, d_out
    if exact:  # the product with the values subtracts delta too; in bfloat16 that would round it
        v_and_1 = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
        d_out_and_delta = jnp.concatenate([d_out, -delta], -1)
    by_group = (
        cut.queries(q if before is None else q * before),
        cut.keys(k),
        cut.values(v_and_1),
        cut.queries(d_out_and_delta),
        cut.queries(jnp.concatenate([log_total[..., None], delta], -1)),
    )
    tables = cut.table_rows(rel, q.dtype)

    def group(d_tables, xs):
        q, k, v, d_out, statistics = xs

        def block(carry, xs):
            dk, dv, d_width = carry
            q, d_out, statistics, lines = xs
            d_out = d_out.reshape(*d_out.shape[:3], -1)
            log_total, delta = jnp.split(statistics.reshape(*statistics.shape[:3], -1), 2, axis=2)
            p = jnp.exp(cut.flat_keys(cut.logits(q, k, (lines, tables[1]), after, less=log_total)))
            t = cut.einsum("bnek,bneq->bnkq", v, d_out)
            t = p * (t if exact else t - delta)
            d_out = d_out[:, :, :e]
            narrow = t.astype(k.dtype)
            flat_q = q.reshape(*q.shape[:3], -1)
            dv += cut.einsum("bneq,bnkq->bnek", d_out, p.astype(v.dtype))
            dk += cut.einsum("bndq,bnkq->bndk", flat_q, narrow)
            dq = cut.einsum("bnkd,bnkq->bndq", k, narrow).reshape(q.shape)
            of_tables, d_lines, d_width_here = cut.table_gradients(t, q, (lines, tables[1]))
            d_width = jax.tree.map(jnp.add, d_width, d_width_here)
            return (dk, dv, d_width), (dq + of_tables, d_lines)

        zeros = jnp.zeros_like(jnp.swapaxes(k, 2, 3), wide), jnp.zeros_like(v[:, :, :e], wide), d_tables[1]
        (dk, dv, d_width), (dq, d_lines) = lax.scan(block, zeros, (q, d_out, statistics, tables[0]))
        return (jax.tree.map(jnp.add, d_tables[0], d_lines), d_width), (dq, dk, dv)

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, wide), tables)
    d_tables, (dq, dk, dv) = cut.over_groups(group, zeros, by_group)
    dq = cut.from_queries(dq.reshape(*dq.shape[:-2], -1), q.shape)
    dk, dv = (cut.from_values(x, shape) for x, shape in ((dk, k.shape), (dv, v.shape)))
    d_scale = jnp.sum(dq * q.astype(wide))  # the logits are the scale times what q multiplies
    if after is not None:
        dk = dk * after
        d_tables = jax.tree.map(lambda x: x * after, d_tables)
    d_rel = None
    if rel is not None:
        _, transpose = jax.vjp(lambda rel: cut.table_rows(rel, wide), tuple(table.astype(wide) for table in rel))
        (d_rel,) = transpose(d_tables)
        d_rel = tuple(d.astype(table.dtype) for d, table in zip(d_rel, rel, strict=True))
    dq = (dq * scale).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_rel, d_scale.astype(scale.dtype)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How one call is cut into groups of (image, head) pairs and blocks of lines, and put together again."""

    space: tuple[int, ...]  # a signal is given a last axis of one position
    spatial_ndim: int
    lines: int  # of a block
    images: int  # of a group
    heads: int  # of a group
    precision: lax.PrecisionLike

    @property
    def all_lines(self) -> int:
        return math.prod(self.space[:-1])

    @property
    def blocks(self) -> int:
        return -(-self.all_lines // self.lines)

    @property
    def key_axes(self) -> tuple[int, ...]:
        return tuple(range(2, 2 + len(self.space)))

    def einsum(self, letters, *operands):
        dtype = relative.logits_dtype(operands[0].dtype)
        return jnp.einsum(letters, *operands, precision=self.precision, preferred_element_type=dtype)

    # Arrays of the caller -> arrays with a leading axis of groups.

    def _grouped(self, x):
        """``(*b, *space, n, c)`` -> ``(groups, images, heads, all lines, w, c)``."""
        *_, n, c = x.shape
        images = math.prod(x.shape[: x.ndim - 2 - self.spatial_ndim])
        x = x.reshape(images, self.all_lines, self.space[-1], n, c)
        if (images, n) == (self.images, self.heads):
            return jnp.transpose(x, (0, 3, 1, 2, 4))[None]
        # A group takes every so-many-th image: where the batch is divided over devices, each has its
        # part of every group.
        x = x.reshape(self.images, images // self.images, *x.shape[1:3], n // self.heads, self.heads, c)
        x = jnp.transpose(x, (1, 4, 0, 5, 2, 3, 6))
        return x.reshape(-1, *x.shape[2:]) if images else x.reshape(n // self.heads, *x.shape[2:])

    def queries(self, x):
        """-> ``(groups, blocks, images, heads, c, lines, w)``."""
        x = self._grouped(x)
        spare = self.blocks * self.lines - self.all_lines
        if spare:
            x = jnp.pad(x, [(0, spare if axis == 3 else 0) for axis in range(x.ndim)])
        x = x.reshape(*x.shape[:3], self.blocks, self.lines, *x.shape[4:])
        return jnp.transpose(x, (0, 3, 1, 2, 6, 4, 5))

    def keys(self, x):
        """-> ``(groups, images, heads, keys, c)``."""
        x = self._grouped(x)
        return x.reshape(*x.shape[:3], math.prod(self.space), x.shape[-1])

    def values(self, x):
        """-> ``(groups, images, heads, c, keys)``."""
        return jnp.swapaxes(self.keys(x), -1, -2)

    # And back.

    def _ungrouped(self, x, shape):
        """``(groups, images, heads, positions, c)`` -> the caller's ``shape``."""
        *_, n, c = shape
        groups, b, h, positions, _ = x.shape
        if groups == 1:
            return jnp.swapaxes(x[0], 1, 2).reshape(shape)
        x = x.reshape(groups * h // n, n // h, b, h, positions, c)
        return jnp.transpose(x, (2, 0, 4, 1, 3, 5)).reshape(shape)

    def from_values(self, x, shape):
        return self._ungrouped(jnp.swapaxes(x, -1, -2), shape)

    def from_queries(self, x, shape):
        """``(groups, blocks, images, heads, c, queries)`` -> the caller's ``shape``."""
        groups, blocks, b, h, c, queries = x.shape
        x = jnp.transpose(x, (0, 2, 3, 1, 5, 4))
        x = x.reshape(groups, b, h, blocks * queries, c)
        return self._ungrouped(x[:, :, :, : math.prod(self.space)], shape)

    def over_groups(self, group, carry, xs):
        """`lax.scan`, without the loop where there is one group."""
        if jax.tree.leaves(xs)[0].shape[0] != 1:
            return lax.scan(group, carry, xs)
        carry, ys = group(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda y: y[None], ys)

    # The tile.

    def table_rows(self, rel, dtype):
        """Tables by offset -> for the axes of lines ``(blocks, lines, size, d)``, for the last ``(w, w, d)``."""
        if rel is None:
            return (), ()
        line = np.minimum(np.arange(self.blocks * self.lines), self.all_lines - 1)
        at = np.unravel_index(line, self.space[:-1])
        lines = []
        for table, size, here in zip(rel, self.space[:-1], at, strict=False):
            rows = table.astype(dtype)[np.arange(size) - here[:, None] + size - 1]
            lines.append(rows.reshape(self.blocks, self.lines, size, -1))
        width = [relative.rows_by_query(table.astype(dtype), self.space[-1]) for table in rel[len(lines) :]]
        return tuple(lines), tuple(width)

    def logits(self, q, k, tables, after, less=None):
        """Logits ``(b, n, *keys, queries)`` of one block of queries ``(b, n, d, lines, w)``, times ``after``.

        ``less``, a number a query ``(b, n, 1, queries)``, is subtracted.
        """
        b, n, d, lines, w = q.shape
        logits = self.einsum("bnkd,bndq->bnkq", k, q.reshape(b, n, d, lines * w))
        logits = logits.reshape(b, n, *self.space, lines * w)
        biases = [self.einsum("bndrw,rkd->bnkrw", q, rows) for rows in tables[0]]
        biases += [self.einsum("bndrw,wkd->bnkrw", q, rows) for rows in tables[1]]
        for axis, size in enumerate(self.space[: len(biases)]):
            keys = [1] * len(self.space)
            keys[axis] = size
            biases[axis] = biases[axis].reshape(b, n, *keys, lines * w)
        if less is not None:
            less = less.reshape(b, n, *[1] * len(self.space), lines * w)
            if biases and after is None:  # from the few numbers of an axis, not from the many of the tile
                biases[0], less = biases[0] - less, None
        # Small, and wanted in the order of the tile: without the barrier XLA reads them transposed there.
        for bias in lax.optimization_barrier(biases):
            logits = logits + bias
        logits = logits if after is None else logits * after
        return logits if less is None else logits - less

    def flat_keys(self, tile):
        return tile.reshape(*tile.shape[:2], math.prod(self.space), tile.shape[-1])

    def table_gradients(self, t, q, tables):
        """From a tile ``(b, n, k, queries)``: what q gets through the tables, and what the tables get."""
        b, n, d, lines, w = q.shape
        tile = t.reshape(b, n, *self.space, lines * w)
        dq, d_tables = jnp.zeros((), t.dtype), ([], [])
        for axis, (kind, rows) in enumerate([(0, rows) for rows in tables[0]] + [(1, rows) for rows in tables[1]]):
            others = tuple(a for a in self.key_axes if a != axis + 2)
            along = jnp.sum(tile, axis=others).astype(q.dtype).reshape(b, n, -1, lines, w)
            query = "rw"[kind]
            dq = dq + self.einsum(f"bnkrw,{query}kd->bndrw", along, rows)
            d_tables[kind].append(self.einsum(f"bnkrw,bndrw->{query}kd", along, q))
        return dq, tuple(d_tables[0]), tuple(d_tables[1])


def _cut(q, spatial_ndim, blocks, platform, precision) -> _Cut:
    sizes = blocks or BlockSizes()
    tile, queries = TILE[platform]
    batch = q.shape[: q.ndim - 2 - spatial_ndim]
    space = q.shape[len(batch) : -2]
    if spatial_ndim == 1:
        space = (*space, 1)
    images, heads, width, all_lines = math.prod(batch), q.shape[-2], space[-1], math.prod(space[:-1])
    if sizes.query is None:
        blocks = -(-all_lines // max(1, queries // width))
        lines = -(-all_lines // blocks)
    else:
        if sizes.query % width or sizes.query > width * all_lines:
            raise ValueError(
                f"BlockSizes(query={sizes.query}) for a map of {' x '.join(map(str, q.shape[len(batch) : -2]))}: "
                f"`blockwise` takes whole lines, a multiple of {width} and at most {width * all_lines}"
            )
        lines = sizes.query // width
    pairs = sizes.pairs or max(1, tile // (lines * width * width * all_lines))
    if isinstance(images, int) and images and mesh.alone(q):
        heads = _divisor(heads, pairs)
        # A TPU lays a few images out badly: one, or a full 128 lanes of them, moves far less.
        images = 1 if platform == "tpu" else _divisor(images, max(1, pairs // heads))
    else:
        # All images at once: over several devices a loop would go through the parts of one after another.
        known = images if isinstance(images, int) else 1
        heads = _divisor(heads, max(1, pairs // max(1, known)))
    return _Cut(space, spatial_ndim, lines, images, heads, precision)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of ``size`` that is at most ``most``."""
    return next(divisor for divisor in range(min(size, most), 0, -1) if size % divisor == 0)


def _scales(dtype, scale):
    """The factors of the queries and of the logits; bfloat16 queries would round a second time."""
    if dtype == relative.logits_dtype(dtype):
        return jnp.asarray(scale, dtype), None
    return None, jnp.asarray(scale, relative.logits_dtype(dtype))
