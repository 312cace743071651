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

A block is some lines of the map, along the shorter of its last two axes. Of the table of the axis across them
it needs a window of ``size + lines - 1`` rows, which moves by one from line to line (`_skew`).

The softmax is shifted by each query's largest logit, so that no exponential overflows, and finding it takes a pass
over the tile. On a CPU it is shifted by a bound instead, which takes none,

.. math:: |q_i| \max_j |k_j| + \max_y b^H_{i, y} + \max_x b^W_{i, x}

and a block whose weights then vanish is computed again with the maximum (`LEAST`).

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
TILE = {"cpu": (3 << 19, 112), "tpu": (1 << 21, 128), "gpu": (1 << 24, 128)}

# The smallest sum of weights below a bound that is still exact: the largest of up to 1e5 weights is then above
# 1e-25, and weights of a billionth of it, 1e-34, are normal numbers of float32.
LEAST = 1e-20


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
    # Lines along the shorter of the last two axes: a block is at least one.
    turned = spatial_ndim > 1 and q.shape[-3] > q.shape[-4]
    if turned:
        q, k, v = (jnp.swapaxes(x, -3, -4) for x in (q, k, v))
        rel = None if rel is None else (*rel[:-2], rel[-1], rel[-2])
    one_device: Any = lambda *arrays: _attend(*mesh.vary_alike(*arrays), options)
    each_forward: Any = functools.partial(forward, **vars(options))
    each_backward: Any = functools.partial(backward, **vars(options))
    rows = 1 if turned and spatial_ndim == 2 else 0
    arrays = q, k, v, rel, jnp.asarray(scale)
    out = mesh.by_device(one_device, each_forward, each_backward, spatial_ndim, *arrays, rows=rows).astype(dtype)
    return jnp.swapaxes(out, -3, -4) if turned else out


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
      q, k, v, rel, scale, spatial_ndim, precision: as in `aaconv.ops.relative_attention`, checked. The queries'
        map may be of another size than the keys': a table then has a row less than both sizes together, and row
        ``offset + queries - 1`` serves ``offset = key - query``, both counted from their own map's edge.
      blocks: `BlockSizes`, or None to take them from the shape and ``platform``.
      platform: a key of `TILE`.

    Returns:
      The output ``(*b, *space, n, e)`` in the inputs' dtype, and the logarithms of the softmax's
      denominators ``(*b, *space, n)`` in float32 or wider.
    """
    cut = _cut(q, k, spatial_ndim, blocks, platform, precision)
    before, after = _scales(q.dtype, scale)
    # The column of ones has the product with the values sum the denominator too.
    v1 = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    by_group = cut.queries(q if before is None else q * before), cut.keys(k), cut.values(v1)
    tables, starts = cut.tables(rel, q.dtype), cut.starts()

    def group(_, xs):
        q, k, v1 = xs
        longest_key = jnp.sqrt(jnp.max(jnp.sum(jnp.square(k), -1), -1))

        def block(_, xs):
            q, start = xs
            biases = cut.biases(q, cut.windows(tables, start))

            def sums(logits, less):
                weights = cut.flat_keys(jnp.exp(logits)).astype(v.dtype)
                return cut.einsum("bnek,bnkq->bneq", v1, weights), less

            def below_maximum():
                logits = cut.logits(q, k, biases, after)
                most = lax.stop_gradient(jnp.max(logits, axis=cut.key_axes, keepdims=True))
                return sums(logits - most, most.reshape(*most.shape[:2], 1, -1))

            def below_bound():
                bound = lax.stop_gradient(cut.bound(q, longest_key, biases))
                return sums(cut.logits(q, k, biases, after, less=bound), bound)

            if platform == "cpu":
                found = below_bound()
                enough = jnp.min(found[0][:, :, -1]) > LEAST
                out, less = lax.cond(enough, lambda: found, below_maximum)
            else:
                out, less = below_maximum()
            # Only now: where the bound was too far off, dividing by its sums would make derivatives of it NaN.
            total = out[:, :, -1:]
            return None, ((out[:, :, :-1] / total).astype(v.dtype), less + jnp.log(total))

        return None, lax.scan(block, None, (q, starts))[1]

    _, (out, log_total) = cut.over_groups(group, None, by_group)
    return cut.from_queries(out, (*q.shape[:-1], v.shape[-1])), cut.from_queries(log_total, (*q.shape[:-1], 1))[..., 0]


def backward(q, k, v, rel, scale, out, log_total, d_out, *, spatial_ndim, precision=None, blocks=None, platform="cpu"):
    """Gradients of all inputs, each block computed again, in one sweep.

    Args:
      q, k, v, rel, scale, spatial_ndim, precision, blocks, platform: as in `forward`.
      out, log_total: what `forward` returned.
      d_out: the gradient of ``out``.

    Returns:
      The gradients of ``q, k, v, rel, scale``, each in its input's shape and dtype.
    """
    cut = _cut(q, k, spatial_ndim, blocks, platform, precision)
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
    tables, starts = cut.tables(rel, q.dtype), cut.starts()

    def group(d_tables, xs):
        q, k, v, d_out, statistics = xs

        def block(carry, xs):
            dk, dv, d_tables = carry
            q, d_out, statistics, start = xs
            windows = cut.windows(tables, start)
            d_out = d_out.reshape(*d_out.shape[:3], -1)
            log_total, delta = jnp.split(statistics.reshape(*statistics.shape[:3], -1), 2, axis=2)
            logits = cut.logits(q, k, cut.biases(q, windows), after, less=log_total)
            # Above 0 only by rounding, which for very large logits can be more than an exponential bears.
            p = jnp.exp(cut.flat_keys(jnp.where(logits > 0, 0, logits)))
            t = cut.einsum("bnek,bneq->bnkq", v, d_out)
            t = p * (t if exact else t - delta)
            d_out = d_out[:, :, :e]
            narrow = t.astype(k.dtype)
            flat_q = q.reshape(*q.shape[:3], -1)
            dv += cut.einsum("bneq,bnkq->bnek", d_out, p.astype(v.dtype))
            dk += cut.einsum("bndq,bnkq->bndk", flat_q, narrow)
            dq = cut.einsum("bnkd,bnkq->bndq", k, narrow).reshape(q.shape)
            of_tables, d_windows = cut.table_gradients(t, q, windows)
            return (dk, dv, cut.add_windows(d_tables, d_windows, start)), dq + of_tables

        zeros = jnp.zeros_like(jnp.swapaxes(k, 2, 3), wide), jnp.zeros_like(v[:, :, :e], wide)
        (dk, dv, d_tables), dq = lax.scan(block, (*zeros, d_tables), (q, d_out, statistics, starts))
        return d_tables, (dq, dk, dv)

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
        _, transpose = jax.vjp(lambda rel: cut.tables(rel, wide), tuple(table.astype(wide) for table in rel))
        (d_rel,) = transpose(d_tables)
        d_rel = tuple(d.astype(table.dtype) for d, table in zip(d_rel, rel, strict=True))
    dq = (dq * scale).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_rel, d_scale.astype(scale.dtype)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How one call is cut into groups of (image, head) pairs and blocks of lines, and put together again."""

    space: tuple[int, ...]  # of the keys; a signal is given a last axis of one position
    query_space: tuple[int, ...]
    spatial_ndim: int
    lines: int  # of a block
    images: int  # of a group
    heads: int  # of a group
    precision: lax.PrecisionLike
    platform: str

    @property
    def frames(self) -> int:
        """Maps of two axes in a volume of queries."""
        return math.prod(self.query_space[:-2])

    @property
    def blocks(self) -> int:
        """Of a frame."""
        return -(-self.query_space[-2] // self.lines)

    @property
    def spare(self) -> int:
        """Lines of a frame's last block that are not there."""
        return self.blocks * self.lines - self.query_space[-2]

    @property
    def key_axes(self) -> tuple[int, ...]:
        return tuple(range(2, 2 + len(self.space)))

    def einsum(self, letters, *operands):
        dtype = relative.logits_dtype(operands[0].dtype)
        return jnp.einsum(letters, *operands, precision=self.precision, preferred_element_type=dtype)

    # Arrays of the caller -> arrays with a leading axis of groups.

    def _grouped(self, x, space):
        """``(*b, *space, n, c)`` -> ``(groups, images, heads, frames, lines, w, c)``."""
        *_, n, c = x.shape
        images = math.prod(x.shape[: x.ndim - 2 - self.spatial_ndim])
        x = x.reshape(images, math.prod(space[:-2]), *space[-2:], n, c)
        if (images, n) == (self.images, self.heads):
            return jnp.transpose(x, (0, 4, 1, 2, 3, 5))[None]
        x = x.reshape(self.images, images // self.images, *x.shape[1:4], n // self.heads, self.heads, c)
        x = jnp.transpose(x, (1, 5, 0, 6, 2, 3, 4, 7))
        return x.reshape(-1, *x.shape[2:])

    def queries(self, x):
        """-> ``(groups, blocks, images, heads, c, lines, w)``."""
        x = self._grouped(x, self.query_space)
        if self.spare:
            x = jnp.pad(x, [(0, self.spare if axis == 4 else 0) for axis in range(x.ndim)])
        x = x.reshape(*x.shape[:3], self.frames * self.blocks, self.lines, *x.shape[5:])
        return jnp.transpose(x, (0, 3, 1, 2, 6, 4, 5))

    def keys(self, x):
        """-> ``(groups, images, heads, keys, c)``."""
        x = self._grouped(x, self.space)
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
        groups, _, b, h, c, queries = x.shape
        x = jnp.transpose(x, (0, 2, 3, 1, 5, 4))
        x = x.reshape(groups, b, h, self.frames, self.blocks * queries, c)
        x = x[:, :, :, :, : math.prod(self.query_space[-2:])]
        return self._ungrouped(x.reshape(groups, b, h, math.prod(self.query_space), c), shape)

    def over_groups(self, group, carry, xs):
        """`lax.scan`, without the loop where there is one group."""
        if jax.tree.leaves(xs)[0].shape[0] != 1:
            return lax.scan(group, carry, xs)
        carry, ys = group(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda y: y[None], ys)

    # The tile.

    def tables(self, rel, dtype):
        """Tables as the blocks want them: by offset, and for the last axis ``(w, k, d)`` by query and key."""
        if rel is None:
            return ()
        tables = [table.astype(dtype) for table in rel]
        if self.spatial_ndim > 1:
            tables[-1] = relative.rows_by_query(tables[-1], self.query_space[-1])
        at = len(self.space) - 2
        tables[at] = jnp.pad(tables[at], ((self.spare, 0), (0, 0)))  # for lines that are not there
        return tuple(tables)

    def starts(self):
        """``(blocks, axes but the last)``: the first row of each table that a block needs."""
        sizes = self.query_space[:-2]
        at = np.unravel_index(np.arange(self.frames), sizes) if sizes else ()
        frames = [np.repeat(size - 1 - here, self.blocks) for size, here in zip(sizes, at, strict=True)]
        lines = np.tile(np.arange(self.blocks)[::-1] * self.lines, self.frames)
        return jnp.asarray(np.stack([*frames, lines], -1), jnp.int32)

    def _span(self, axis: int) -> int:
        """Rows of a table by offset that a block needs."""
        return self.space[axis] + (self.lines - 1 if axis == len(self.space) - 2 else 0)

    def windows(self, tables, start):
        """The rows that a block needs, and the whole of the last axis' table."""
        windows = [
            lax.dynamic_slice_in_dim(table, start[axis], self._span(axis))
            for axis, table in enumerate(tables[: len(self.space) - 1])
        ]
        return (*windows, *tables[len(windows) :])

    def add_windows(self, tables, windows, start):
        """Adds what belongs to a block's `windows` to whole tables."""
        added = []
        for axis, (table, window) in enumerate(zip(tables, windows, strict=True)):
            if axis < len(self.space) - 1:
                window = lax.dynamic_slice_in_dim(table, start[axis], self._span(axis)) + window
                added.append(lax.dynamic_update_slice_in_dim(table, window, start[axis], 0))
            else:
                added.append(table + window)
        return tuple(added)

    def biases(self, q, windows):
        """Relative logits of one block of queries ``(b, n, d, lines, w)``, an array an axis, to be added up.

        Each ``(b, n, *keys, queries)`` with one key along the other axes.
        """
        b, n, _, lines, w = q.shape
        biases = []
        for axis, window in enumerate(windows):
            if axis == len(self.space) - 1:
                bias = self.einsum("bndrw,wkd->bnkrw", q, window)
            else:
                bias = self.einsum("bndrw,md->bnwrm", q, window)
                bias = jnp.transpose(bias if axis < len(self.space) - 2 else _skew(bias), (0, 1, 4, 3, 2))
            keys = [1] * len(self.space)
            keys[axis] = self.space[axis]
            biases.append(bias.reshape(b, n, *keys, lines * w))
        return biases

    def bound(self, q, longest_key, biases):
        """No logit of a query is larger, ``(b, n, 1, queries)``: by the lengths of queries and keys."""
        b, n, d, lines, w = q.shape
        length = jnp.sqrt(jnp.sum(jnp.square(q.reshape(b, n, d, lines * w)), 2, keepdims=True))
        most = (jnp.max(bias, axis=self.key_axes).reshape(length.shape) for bias in biases)
        return sum(most, length * longest_key[..., None, None])

    def logits(self, q, k, biases, after, less=None):
        """Logits ``(b, n, *keys, queries)`` of one block of queries, with their `biases`, times ``after``.

        ``less``, a number a query ``(b, n, 1, queries)``, is subtracted.
        """
        b, n, d, lines, w = q.shape
        logits = self.einsum("bnkd,bndq->bnkq", k, q.reshape(b, n, d, lines * w))
        logits = logits.reshape(b, n, *self.space, lines * w)
        if less is not None:
            less = less.reshape(b, n, *[1] * len(self.space), lines * w)
            if biases and after is None:  # from the few numbers of an axis, not from the many of the tile
                biases, less = [biases[0] - less, *biases[1:]], None
        for bias in self._apart(q, biases):
            logits = logits + bias
        logits = logits if after is None else logits * after
        return logits if less is None else logits - less

    def _apart(self, q, biases):
        """Has XLA make the biases once, in the order of the tile, not anew within each pass over it."""
        biases = lax.optimization_barrier(biases)
        if self.platform != "cpu":
            return biases
        # Before jax 0.12 the barrier is gone when operations on a CPU are fused, which made the backward pass twice
        # as long. No fusion reaches into a conditional, and that this one is always true XLA cannot know.
        always = (q[0, 0, 0, 0, 0] == 0) | (q[0, 0, 0, 0, 0] != 0)
        return lax.cond(always, lambda: biases, lambda: jax.tree.map(jnp.zeros_like, biases))

    def flat_keys(self, tile):
        return tile.reshape(*tile.shape[:2], math.prod(self.space), tile.shape[-1])

    def table_gradients(self, t, q, windows):
        """From a tile ``(b, n, k, queries)``: what q gets through the tables, and what the windows get."""
        b, n, d, lines, w = q.shape
        tile = t.reshape(b, n, *self.space, lines * w)
        dq, d_windows = jnp.zeros((), t.dtype), []
        for axis, window in enumerate(windows):
            others = tuple(a for a in self.key_axes if a != axis + 2)
            along = jnp.sum(tile, axis=others).astype(q.dtype).reshape(b, n, -1, lines, w)
            if axis == len(self.space) - 1:
                dq = dq + self.einsum("bnkrw,wkd->bndrw", along, window)
                d_windows.append(self.einsum("bnkrw,bndrw->wkd", along, q))
            else:
                along = jnp.transpose(along, (0, 1, 4, 3, 2))
                along = along if axis < len(self.space) - 2 else _unskew(along)
                dq = dq + self.einsum("bnwrm,md->bndrw", along, window)
                d_windows.append(self.einsum("bnwrm,bndrw->md", along, q))
        return dq, tuple(d_windows)


def _skew(x):
    """``(..., r, size + r - 1)`` -> ``(..., r, size)``: row i begins at column r - 1 - i.

    A line further on in the block is nearer to every key by one offset. Read with rows that are one shorter,
    the numbers fall into place.
    """
    *lead, r, m = x.shape
    if r == 1:
        return x
    flat = x.reshape(*lead, r * m)[..., r - 1 : r * m - 1]
    return flat.reshape(*lead, r, m - 1)[..., : m - r + 1]


def _unskew(x):
    """The transpose of `_skew`."""
    *lead, r, size = x.shape
    if r == 1:
        return x
    none = [(0, 0)] * len(lead)
    flat = jnp.pad(x, [*none, (0, 0), (0, r - 2)]).reshape(*lead, r * (size + r - 2))
    return jnp.pad(flat, [*none, (r - 1, 1)]).reshape(*lead, r, size + r - 1)


def _cut(q, k, spatial_ndim, blocks, platform, precision) -> _Cut:
    sizes = blocks or BlockSizes()
    tile, queries = TILE[platform]
    batch = q.shape[: q.ndim - 2 - spatial_ndim]
    last = () if spatial_ndim > 1 else (1,)
    query_space, space = ((*x.shape[len(batch) : -2], *last) for x in (q, k))
    images, heads, (height, width) = math.prod(batch), q.shape[-2], query_space[-2:]
    if sizes.query is None:
        blocks = -(-height // max(1, queries // width))
        lines = -(-height // blocks)
    else:
        whole, line = space[-2] * space[-1], space[-1]
        if sizes.query % line or sizes.query > whole:
            raise ValueError(
                f"BlockSizes(query={sizes.query}) for maps of {space[-2]} x {line}: `blockwise` takes "
                f"whole lines of the shorter axis, a multiple of {line} and at most {whole}"
            )
        lines = min(sizes.query // width, height)  # a device may have a part of the queries' map only
    pairs = sizes.pairs or max(1, tile // (lines * width * math.prod(space)))
    if isinstance(images, int) and images and mesh.alone(q):
        heads = _divisor(heads, pairs)
        # A TPU lays a few images out badly: one, or a full 128 lanes of them, moves far less.
        images = 1 if platform == "tpu" else _divisor(images, max(1, pairs // heads))
    else:
        # All images at once: over several devices a loop would go through the parts of one after another.
        known = images if isinstance(images, int) else 1
        heads = _divisor(heads, max(1, pairs // max(1, known)))
    return _Cut(space, query_space, spatial_ndim, lines, images, heads, precision, platform)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of ``size`` that is at most ``most``."""
    return next(divisor for divisor in range(min(size, most), 0, -1) if size % divisor == 0)


def _scales(dtype, scale):
    """The factors of the queries and of the logits; bfloat16 queries would round a second time."""
    if dtype == relative.logits_dtype(dtype):
        return jnp.asarray(scale, dtype), None
    return None, jnp.asarray(scale, relative.logits_dtype(dtype))
