r"""Relative attention as one TPU kernel each way: memory for the maps only, and traffic near the least.

For each (image, head) the kernels hold the whole maps of q, k and v in VMEM, the pixels on the 128
lanes, so that short depths cost nothing: :math:`d = 20` takes 24 sublanes, not 128 lanes. The logits of
all queries to all keys are walked in tiles of :math:`S^\top`, keys by queries, so that the softmax's
maxima and sums run over sublanes and each query keeps to its lane.

The relative logits are formed inside. A query's logits to all keys are H + W numbers,
:math:`b^H_{i, y} = q_i^\top r^H_{y - i_y}` and :math:`b^W_{i, x}`, so with them appended to the query and
one-hot codes of row and column appended to the key,

.. math:: S^\top = [k;\ \mathrm{onehot}(j_y);\ \mathrm{onehot}(j_x)]^\top\, [q;\ b^H;\ b^W],

one matrix product, whose depth the matrix unit pads to 128 or 256 anyway. :math:`R q` gives the numbers
by offset, and a barrel shifter, one select for each bit of the query's coordinate, moves them from
offsets to positions; the backward pass runs it in reverse. Nothing of this is ever in HBM, and neither
are the logits: a tile is 3 MB of VMEM.

In bfloat16 the numbers b are rounded to bfloat16 for that product, the content logits are not. At 28x28
with d = 20 and standard normal inputs, the result's root mean square error is 0.39% of its size beside
0.23% of ``factorised``, and the tables' gradients have 0.43% beside 0.58%, all against float64.

Forward: an online softmax over blocks of keys. Backward: one sweep, which computes each tile of weights
again from the kept logarithm of its sums and takes all five gradients from it; dq, dk and dv are written
over q, k and v.

References:
  Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, eq. 3 and 4,
  https://arxiv.org/abs/1904.09925; Dao et al., FlashAttention, NeurIPS 2022, algorithms 1 and 4.
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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aaconv.ops import mesh
from aaconv.ops.blocks import BlockSizes
from aaconv.ops.choice import device_of

LANES, SUBLANES = 128, 8
LONGEST_BLOCK = 1024
"""Queries and keys in a tile at most: its logits in float32, twice and more, have to fit into VMEM."""

_MIB = 2**20
VMEM_BYTES = {
    **dict.fromkeys(("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite"), 24 * _MIB),
    **dict.fromkeys(("TPU v5", "TPU v5p", "TPU7", "TPU7x"), 64 * _MIB),
    **dict.fromkeys(("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e", ""), 100 * _MIB),
}
"""What the kernels may take of a core's VMEM by their own reckoning (`_Plan.vmem`), by `jax.Device.device_kind`.

That reckoning is about half as much again as what the compiler takes, which has 16, 64 and 128 MiB. Compiled for them
(libtpu 0.0.52): 32x32 with depths of 128, reckoned 25.0 MiB, fits a v4, 64x64 with depths of 64, 34.5 MiB, does not;
112x112 with depths of 64, 63.3 MiB, fits a v5p, 160x160 with depths of 32, 76.9 MiB, does not; 176x176 with depths of
32, 90.8 MiB, fits a v5e and a v6e. A kind that is not here gets the least; "" stands for no kind in particular."""

_MASKED = -1e30  # the logit of a key that pads the last block; finite, so that no 0 * inf can arise
_NN, _NT = ((1,), (0,)), ((1,), (1,))  # which dimensions a product contracts: a @ b, and a @ b.T


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
    interpret: bool = False,
) -> jax.Array:
    r"""Relative attention by the TPU kernel; arguments are taken as checked.

    It never asks which platform is there, so that it can be compiled for a TPU on any machine; off TPU
    the caller has to choose ``interpret=True`` or another implementation.

    **On a mesh.** A kernel is not divided by the compiler, so the call is put in `jax.shard_map` over the
    mesh that its arguments live on (`jax.typeof`; arrays on a mesh and `jax.set_mesh` both say it), which
    divides batch, heads and rows as `aaconv.ops.mesh.by_device` says. `jax.experimental.custom_partitioning`,
    which would ask for no mesh, is unknown to the TPU compiler when it compiles ahead of time.

    Args:
      q: ``(*b, *space, n, d)``, bfloat16 or float32.
      k: as `q`.
      v: ``(*b, *space, n, e)``.
      rel: tables ``(2 * size - 1, d)``, one a spatial axis, or None.
      scale: multiplies the logits: a Python number in float32 inside the kernel; an array is multiplied
        into ``q``, which in bfloat16 rounds once more.
      spatial_ndim: number of spatial axes.
      precision: of products of float32; None and DEFAULT are one pass in bfloat16, as elsewhere in jax.
        Products of bfloat16 are exact with every precision.
      blocks: ``query`` a multiple of 128 and ``key`` a multiple of 8 in float32, of 16 in bfloat16.
      interpret: run as ordinary jax operations, on any platform, to check values.

    Returns:
      ``(*b, *space, n, e)`` in the dtype of `q`.

    Raises:
      NotImplementedError: the dtype is neither bfloat16 nor float32, or the maps do not fit into VMEM.
      ValueError: a block size is not a multiple of what the hardware needs.
    """
    if not isinstance(scale, float | int) or scale < 1e-8:  # 0 or less would turn the mask's sign
        q = (q * jnp.asarray(scale, jnp.float32)).astype(q.dtype)
        scale = 1.0
    if interpret and jax.typeof(q).manual_axis_type.varying:
        raise NotImplementedError("pallas_tpu in interpret mode inside jax.shard_map needs check_vma=False there")
    device_kind = "" if interpret else device_of(q)[1]
    problem = {"spatial_ndim": spatial_ndim, "positions": rel is not None, "blocks": blocks, "precision": precision}
    reason = reason_not(q.shape, v.shape[-1], q.dtype, **problem, device_kind=device_kind)
    if reason is not None:
        raise NotImplementedError(f"pallas_tpu cannot serve: {reason}")
    tables = () if rel is None else tuple(table.astype(q.dtype) for table in rel)
    if 0 in v.shape:
        return jnp.zeros_like(v)

    def plan(q, k, v, tables) -> _Plan:
        queries, keys = (tuple(x.shape[-2 - spatial_ndim : -2]) for x in (q, k))
        return dataclasses.replace(
            _plan(keys, q.shape[-1], v.shape[-1], q.dtype, bool(tables), blocks, rows=queries[0]),
            limit=_limit(device_kind),
            scale=float(scale),
            precision=_precision(q.dtype, precision),
            interpret=interpret,
        )

    return mesh.by_device(
        lambda *inputs: _attend_maps(plan(*inputs), *inputs),
        lambda *inputs: _forward_maps(plan(*inputs), *inputs),
        lambda *saved: _backward_maps(plan(*saved[:4]), *saved),
        spatial_ndim,
        q,
        k,
        v,
        tables,
        automatic=True,
        check_vma=not interpret,  # interpret mode does not follow what varies over a mesh
    )


def reason_not(
    shape: Sequence[int],
    e: int,
    dtype: Any,
    *,
    spatial_ndim: int = 2,
    positions: bool = True,
    blocks: BlockSizes | None = None,
    precision: lax.PrecisionLike = None,
    device_kind: str = "",
) -> str | None:
    """Says why the kernels cannot serve queries of a shape and dtype, or returns None if they can.

    Args:
      shape: of the queries, ``(*b, *space, n, d)``; the batch may be left out.
      e: value depth a head.
      dtype: of queries, keys and values.
      spatial_ndim: number of spatial axes.
      positions: whether there are tables.
      blocks, precision: as in `attend`.
      device_kind: as of `jax.Device`, see `VMEM_BYTES`.

    Raises:
      ValueError: a block size is not a multiple of what the hardware needs.

    Example:
      >>> reason_not((28, 28, 8, 20), 8, jnp.float16)
      'it computes bfloat16 and float32, not float16'
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes bfloat16 and float32, not {jnp.dtype(dtype)}"
    try:
        _precision(dtype, precision)
    except NotImplementedError as error:
        return str(error)
    space = tuple(shape[-2 - spatial_ndim : -2])
    plan = _plan(space, shape[-1], e, dtype, positions, blocks)
    limit = _limit(device_kind)
    if plan.vmem(1) > limit:
        return (
            f"it holds the whole map of a head in VMEM, and {'x'.join(map(str, space))} with depths {shape[-1]} and "
            f"{e} in {plan.dtype} takes about {plan.vmem(1) / 2**20:.0f} MiB of {limit / 2**20:.0f}; "
            "pool before attending, or take 'blockwise'"
        )
    return None


def costs(
    space: Sequence[int],
    d: int,
    e: int,
    *,
    maps: int,
    dtype,
    positions: bool = True,
    blocks: BlockSizes | None = None,
) -> dict[str, dict[str, int]]:
    """What the kernels do, counted from their blocks, padding included; to set beside a chip's rates.

    Args:
      space: spatial shape.
      d: depth of queries and keys.
      e: depth of values.
      maps: images times heads.
      dtype: of the maps.
      positions: whether there are relative logits.
      blocks: as in `attend`.

    Returns:
      For ``forward`` and ``backward``: ``hbm_bytes`` between HBM and VMEM, ``macs`` in the products with
      tiles of logits (contractions padded to 128, rows to 8), ``exponentials``, and ``vmem_bytes``, about.

    Example:
      >>> costs((28, 28), 20, 8, maps=1, dtype=jnp.bfloat16)["forward"]["exponentials"] == 784 * 896
      True
    """
    plan = _plan(tuple(space), d, e, dtype, positions, blocks)
    tile = plan.lanes * plan.key * plan.key_blocks
    row = _up(plan.stored, LANES) * plan.dtype.itemsize
    deep, shallow = _up(d, SUBLANES), _up(e, SUBLANES)
    kept = _up(plan.stored, LANES) * 4  # the logarithms of the sums
    count = lambda moved, macs: {
        "hbm_bytes": maps * moved,
        "macs": maps * tile * macs,
        "exponentials": maps * tile,
        "vmem_bytes": plan.vmem(plan.maps_a_step(maps)),
    }
    logits = _up(plan.depth, LANES)
    return {
        "forward": count(row * (2 * deep + 2 * shallow) + kept, logits + _up(e + 1, SUBLANES)),
        "backward": count(row * (4 * deep + 4 * shallow) + kept, logits + _up(e, LANES) + shallow + deep + plan.depth),
    }


# ---------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known when the kernels are traced, and what follows from it.

    Rows of q' and k' (sublanes): the depth and the mask, then one group for each axis but the first,
    together `fixed`; last the first axis, of which a block of keys only needs the lines it can touch,
    its `window`. Each group is padded to whole tiles of 8 rows.
    """

    space: tuple[int, ...]  # of the keys
    rows: int  # of the queries' map: its first axis, the others are the keys'
    d: int
    e: int
    dtype: np.dtype
    positions: bool
    query: int
    key: int
    limit: int = VMEM_BYTES[""]
    scale: float = 1.0
    precision: lax.Precision | None = None
    interpret: bool = False

    @property
    def pixels(self) -> int:
        """Of the keys."""
        return math.prod(self.space)

    @property
    def query_pixels(self) -> int:
        return self.rows * math.prod(self.space[1:])

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.query_pixels, self.query)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.pixels, self.key)

    @property
    def lanes(self) -> int:
        """Of the queries' maps in VMEM: whole blocks of queries."""
        return self.query_blocks * self.query

    @property
    def stored(self) -> int:
        """Of the queries' maps in HBM: a block may reach past the last pixel only as far as the last 128 lanes do."""
        return self.query_pixels if self.lanes == _up(self.query_pixels, LANES) else self.lanes

    @property
    def key_lanes(self) -> int:
        """Of the keys' maps in VMEM."""
        return _up(self.pixels, LANES)

    @property
    def tables(self) -> tuple[int, ...]:
        """Rows of the tables: an offset of each key to each query of an axis."""
        reaches = (self.rows, *self.space[1:]) if self.positions else ()
        return tuple(reach + size - 1 for reach, size in zip(reaches, self.space, strict=False))

    @property
    def groups(self) -> tuple[int, ...]:
        """First rows of the groups of the axes from the second on, and one past the last."""
        at = [_up(self.d + 1, SUBLANES)]
        for size in self.space[1:] if self.positions else ():
            at.append(at[-1] + _up(size, SUBLANES))
        return tuple(at)

    @property
    def fixed(self) -> int:
        return self.groups[-1]

    def line(self, block: Any) -> Any:
        """First line of a block's window: the line of its first key, rounded down to whole tiles."""
        lines = math.prod(self.space[1:]) * SUBLANES
        if isinstance(block, int):
            return block * self.key // lines * SUBLANES
        # Python's floor looks at the sign, for which the kernel's compiler would have to know the chip.
        return lax.div(block * self.key, jnp.int32(lines)) * SUBLANES

    @property
    def window(self) -> int:
        if not self.positions:
            return 0
        inner = math.prod(self.space[1:])
        ends = [(min((j + 1) * self.key, self.pixels) - 1) // inner + 1 for j in range(self.key_blocks)]
        return _up(max(end - self.line(j) for j, end in enumerate(ends)), SUBLANES)

    @property
    def lines(self) -> int:
        """Rows kept for the first axis: to the end of the last window."""
        return self.line(self.key_blocks - 1) + self.window if self.positions else 0

    @property
    def depth(self) -> int:
        return self.fixed + self.window

    @property
    def offsets(self) -> tuple[int, ...]:
        """First rows of the tables in one stack, each padded to whole tiles, and one past the last."""
        at = [0]
        for rows in self.tables:
            at.append(at[-1] + _up(rows, SUBLANES))
        return tuple(at)

    def maps_a_step(self, count: int) -> int:
        """How many of `count` maps a step of the grid takes: small maps together, to be worth a step."""
        want = max(1, min(16, 2**20 // (self.lanes * self.key * self.key_blocks)))
        fits = lambda m: m == 1 or self.vmem(m) <= self.limit // 2
        return max(m for m in range(1, want + 1) if count % m == 0 and fits(m))

    def vmem(self, maps: int) -> int:
        """Bytes of VMEM the backward kernel takes, about: blocks twice, scratch, and the tile's values."""
        item = self.dtype.itemsize
        keys = self.key_blocks * _up(self.key, LANES)
        rows = 3 * _up(self.d, 16) + _up(self.e, 16) * 2
        blocks = 2 * maps * ((self.lanes + self.key_lanes) * rows * item + self.lanes * 4 * SUBLANES)
        scratch = keys * (_up(self.depth, LANES) + LANES * pl.cdiv(self.e, LANES) + self.depth) * item
        scratch += 4 * keys * (_up(self.d, SUBLANES) + _up(self.e, SUBLANES))
        scratch += 8 * (self.fixed + self.lines) * self.query
        tables = 2 * 2 * self.offsets[-1] * max(LANES, _up(self.d, LANES)) * 4
        return blocks + scratch + tables + 4 * 4 * _up(self.key, SUBLANES) * self.query


def _limit(device_kind: str) -> int:
    return VMEM_BYTES.get(device_kind, min(VMEM_BYTES.values()))


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _precision(dtype, precision: lax.PrecisionLike) -> lax.Precision | None:
    if dtype == jnp.bfloat16:
        return None
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if precision is None:
        return None
    both = precision if isinstance(precision, tuple) else (precision,)
    try:
        return max((lax.Precision(p) for p in both if p is not None), key=lambda p: p.value, default=None)
    except ValueError:
        raise NotImplementedError(f"it knows the members of jax.lax.Precision, not precision={precision!r}") from None


def _plan(space, d, e, dtype, positions, blocks, rows=None) -> _Plan:
    blocks = blocks or BlockSizes()
    pixels, lines = math.prod(space), space[0] if rows is None else rows
    query_pixels = lines * math.prod(space[1:])
    rows = SUBLANES * 4 // np.dtype(dtype).itemsize
    query, key = blocks.query, blocks.key
    if query is None:
        # Narrow blocks wait for each other (a fifth more bundles at 128 than at 896), wide ones leave lanes empty;
        # the shifter's rows, 2 * size an axis, have to fit as well.
        most = min(LONGEST_BLOCK, 2**18 // (2 * sum(space) if positions else 1))
        sizes = range(LANES, max(LANES, most) + 1, LANES)
        query = min(sizes, key=lambda size: _up(query_pixels, size) * (1 + 32 / size))
    elif query % LANES:
        raise ValueError(
            f"BlockSizes(query={query}) must be a multiple of the {LANES} lanes of a TPU: "
            f"use {_up(query, LANES)}, or None to have it chosen"
        )
    if key is None:
        key = pl.cdiv(pixels, pl.cdiv(pixels, LONGEST_BLOCK))
    elif key % rows:
        raise ValueError(
            f"BlockSizes(key={key}) must be a multiple of the {rows} rows of a TPU tile of {np.dtype(dtype)}: "
            f"use {_up(key, rows)}, or None to have it chosen"
        )
    query, key = min(query, _up(query_pixels, LANES)), min(_up(key, rows), _up(pixels, rows))
    return _Plan(space, lines, d, e, np.dtype(dtype), positions, query, key)


# ---------------------------------------------------------------------------------- around the kernels


def _attend_maps(plan: _Plan, q, k, v, tables):
    """Lays the maps out as the kernels want them, ``(b * n, depth, pixels)``, and back."""
    o: Any = _attend(plan, *mesh.vary_alike(*_laid_out(plan, q, k, v), _stacked(plan, tables)))
    return _pixels_first(plan, o, v.shape)


def _forward_maps(plan: _Plan, q, k, v, tables):
    """`_attend_maps`, and the logarithms of the sums ``(*b, *space, n)``."""
    o, lse = _forward(plan, *_laid_out(plan, q, k, v), _stacked(plan, tables))
    return _pixels_first(plan, o, (*q.shape[:-1], plan.e)), _pixels_first(plan, lse, (*q.shape[:-1], 1))[..., 0]


def _backward_maps(plan: _Plan, q, k, v, tables, o, lse, do):
    """The gradients of q, k, v and the tables."""
    of_queries = (_pixels_last(plan, x, plan.stored) for x in (o, lse[..., None], do))
    dq, dk, dv, dtable = _backward(plan, *_laid_out(plan, q, k, v), _stacked(plan, tables), *of_queries)
    dtables = tuple(dtable[at : at + rows] for at, rows in zip(plan.offsets, plan.tables, strict=False))
    return *(_pixels_first(plan, dx, x.shape) for dx, x in ((dq, q), (dk, k), (dv, v))), dtables


def _laid_out(plan: _Plan, q, k, v):
    return _pixels_last(plan, q, plan.stored), _pixels_last(plan, k), _pixels_last(plan, v)


def _pixels_last(plan: _Plan, x, stored: int = 0):
    """``(*b, *space, n, depth)`` -> ``(b * n, depth, pixels)``, filled up to what is to be ``stored``."""
    *lead, n, depth = x.shape
    batch = len(lead) - len(plan.space)
    count, pixels = math.prod(lead[:batch]), math.prod(lead[batch:])
    x = x.reshape(count, pixels, n, depth)
    x = jnp.transpose(x, (0, 2, 3, 1)).reshape(count * n, depth, pixels)
    return jnp.pad(x, ((0, 0), (0, 0), (0, stored - pixels))) if stored > pixels else x


def _pixels_first(plan: _Plan, x, shape):
    """``(b * n, depth, pixels)`` -> the caller's ``shape``."""
    *lead, n, depth = shape
    batch = len(lead) - len(plan.space)
    count, pixels = math.prod(lead[:batch]), math.prod(lead[batch:])
    x = x[:, :, :pixels].reshape(count, n, depth, pixels)
    return jnp.transpose(x, (0, 3, 1, 2)).reshape(shape)


def _stacked(plan: _Plan, tables):
    """All tables in one, each padded to whole tiles."""
    padded = [jnp.pad(t, ((0, _up(len(t), SUBLANES) - len(t)), (0, 0))) for t in tables]
    return jnp.concatenate(padded) if padded else jnp.zeros((SUBLANES, plan.d), plan.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q, k, v, table) -> Any:
    return _forward(plan, q, k, v, table)[0]


def _attend_forward(plan, q, k, v, table):
    o, lse = _forward(plan, q, k, v, table)
    return o, (q, k, v, table, o, lse)


def _attend_backward(plan, saved, do):
    q, k, v, table, o, lse = saved
    return _backward(plan, q, k, v, table, o, lse, do)


_attend.defvjp(_attend_forward, _attend_backward)


def _coordinates(plan: _Plan):
    """``(8, lanes)``: each pixel's coordinates, an axis a row; -1 past the last pixel."""
    lanes = max(plan.lanes, plan.key_lanes, plan.key_blocks * plan.key)
    pixel = np.arange(lanes)
    where = np.array(np.unravel_index(np.minimum(pixel, plan.pixels - 1), plan.space))
    rows = np.where(pixel < plan.pixels, where, -1)
    return jnp.asarray(np.pad(rows, ((0, SUBLANES - len(rows)), (0, 0))), jnp.int32)


def _call(plan: _Plan, kernel, name, ins, outs, scratch, **kwargs):
    """`pl.pallas_call` over steps of a few maps; ins and outs are (array or shape, what a step sees of it)."""
    count = ins[0][0].shape[0]
    maps = plan.maps_a_step(count)
    # Chips with two cores a device take one half each; the others take both in turn.
    halves = 2 if isinstance(count, int) and count // maps % 2 == 0 else 1
    steps = count // maps // halves
    step = (lambda half, i: half * steps + i) if halves > 1 else (lambda half, i: i)
    see = {
        "queries": lambda _, rows, __: pl.BlockSpec((maps, rows, plan.lanes), lambda half, i: (step(half, i), 0, 0)),
        "keys": lambda _, rows, __: pl.BlockSpec((maps, rows, plan.key_lanes), lambda half, i: (step(half, i), 0, 0)),
        "half": lambda *shape: pl.BlockSpec((1, *shape[1:]), lambda half, i: (half, *[0] * (len(shape) - 1))),
        "all": lambda *shape: pl.BlockSpec(shape, lambda half, i: (0,) * len(shape)),
    }
    arrays = mesh.vary_alike(*[x for x, _ in ins])
    varying = jax.typeof(arrays[0]).manual_axis_type
    spec = lambda x, kind: see[kind](*x.shape)
    outs = [((halves, *s[1:]) if kind == "half" else s, t, kind) for s, t, kind in outs]
    outs = [(jax.ShapeDtypeStruct(s, t, manual_axis_type=varying), kind) for s, t, kind in outs]
    vmem = plan.vmem(maps)
    call = pl.pallas_call(
        functools.partial(kernel, plan, maps),
        # A symbolic batch is nothing but the length of the grid, known when it runs.
        grid=(halves, steps if isinstance(steps, int) else jnp.asarray(steps, jnp.int32)),
        in_specs=[spec(x, kind) for x, (_, kind) in zip(arrays, ins, strict=True)],
        out_specs=[spec(x, kind) for x, kind in outs],
        out_shape=[x for x, _ in outs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=None if vmem < 12 * 2**20 else vmem + 16 * 2**20,
        ),
        interpret=plan.interpret,
        name=name,
        **kwargs,
    )
    with jax.enable_x64(False):  # the kernel's compiler knows no 64-bit indices
        return call(*arrays)


def _forward(plan: _Plan, q, k, v, table):
    count, _, pixels = q.shape
    blocks = plan.key_blocks
    ins = [(q, "queries"), (k, "keys"), (v, "keys"), (table, "all"), (_coordinates(plan), "all")]
    outs = [((count, plan.e, pixels), v.dtype, "queries"), ((count, 1, pixels), jnp.float32, "queries")]
    scratch = [
        ((plan.fixed + plan.lines, plan.query), jnp.float32),
        ((blocks, plan.key, plan.depth), plan.dtype),
        ((blocks, _up(plan.e + 1, SUBLANES), plan.key), plan.dtype),
    ]
    return _call(plan, _forward_kernel, "relative_attention_forward", ins, outs, scratch)


def _backward(plan: _Plan, q, k, v, table, o, lse, do):
    blocks = plan.key_blocks
    maps = [(q, "queries"), (k, "keys"), (v, "keys"), *((x, "queries") for x in (o, lse, do))]
    ins = [*maps, (table, "all"), (table.T, "all"), (_coordinates(plan), "all")]
    outs = [(x.shape, x.dtype, kind) for x, kind in maps[:3]] + [((1, *table.T.shape), jnp.float32, "half")]
    scratch = [
        ((plan.fixed + plan.lines, plan.query), jnp.float32),
        ((plan.fixed + plan.lines, plan.query), jnp.float32),
        ((blocks, plan.key, plan.depth), plan.dtype),
        ((blocks, plan.depth, plan.key), plan.dtype),
        ((blocks, plan.key, plan.e), plan.dtype),
        ((blocks, plan.d, plan.key), jnp.float32),
        ((blocks, plan.e, plan.key), jnp.float32),
    ]
    # A map's gradient takes the place of the map, which nothing needs afterwards: three arrays fewer at the peak.
    aliases = {0: 0, 1: 1, 2: 2}
    dq, dk, dv, dtable = _call(
        plan, _backward_kernel, "relative_attention_backward", ins, outs, scratch, input_output_aliases=aliases
    )
    return dq, dk, dv, dtable.sum(0).T.astype(table.dtype)


# ----------------------------------------------------------------------------------------- the kernels


def _forward_kernel(plan, maps, q_ref, k_ref, v_ref, r_ref, at_ref, o_ref, lse_ref, queries, keys_t, values):
    @pl.when(pl.program_id(1) == 0)
    def _():
        _start_queries(plan, queries)
        for j in range(plan.key_blocks):
            keys_t[j, :, :] = _codes(plan, j, at_ref).T.astype(plan.dtype)
        # A row of ones among the values: the sum of the weights comes with their product.
        row = lax.broadcasted_iota(jnp.int32, values.shape[1:], 0)
        for j in range(plan.key_blocks):
            values[j] = jnp.where(row == plan.e, 1.0, 0.0).astype(plan.dtype)

    def one_map(m):
        for j, lanes, n in _key_lanes(plan):
            keys_t[j, 0:n, 0 : plan.d] = k_ref[m, :, lanes].astype(jnp.float32).T.astype(plan.dtype)
            values[j, 0 : plan.e, 0:n] = v_ref[m, :, lanes]

        def query_block(i):
            at = _lanes(plan, i)
            _load_queries(plan, q_ref[m, :, at], r_ref, at_ref[:, at], queries)

            def tile(j, carry):
                top, sums = carry
                s = _logits(plan, j, keys_t, queries)
                higher = jnp.maximum(top, jnp.max(s, axis=0, keepdims=True))
                weights = jnp.exp2(s - higher).astype(plan.dtype)
                return higher, sums * jnp.exp2(top - higher) + _dot(plan, values[j], weights, _NN)

            top = jnp.full((1, plan.query), -jnp.inf, jnp.float32)
            sums = jnp.zeros((values.shape[1], plan.query), jnp.float32)
            top, sums = _loop(plan.key_blocks, tile, (top, sums))
            total = sums[plan.e : plan.e + 1]
            o_ref[m, :, at] = (sums[: plan.e] / total).astype(o_ref.dtype)
            lse_ref[m, :, at] = top + jnp.log2(total)

        _for_each(plan.query_blocks, query_block)

    _for_each(maps, one_map)


def _backward_kernel(
    plan, maps,
    q_ref, k_ref, v_ref, o_ref, lse_ref, do_ref, r_ref, rt_ref, at_ref,
    dq_ref, dk_ref, dv_ref, dr_ref,
    queries, dqueries, keys_t, keys, values_t, dkeys, dvalues,
):  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _():
        _start_queries(plan, queries)
        for j in range(plan.key_blocks):
            codes = _codes(plan, j, at_ref)
            keys[j] = codes.astype(plan.dtype)
            keys_t[j] = codes.T.astype(plan.dtype)
        values_t[...] = jnp.zeros_like(values_t)
        dr_ref[...] = jnp.zeros_like(dr_ref)

    def one_map(m):
        for j, lanes, n in _key_lanes(plan):
            keys_t[j, 0:n, 0 : plan.d] = k_ref[m, :, lanes].astype(jnp.float32).T.astype(plan.dtype)
            keys[j, 0 : plan.d, 0:n] = k_ref[m, :, lanes]
            values_t[j, 0:n, :] = v_ref[m, :, lanes].astype(jnp.float32).T.astype(plan.dtype)
        dkeys[...] = jnp.zeros_like(dkeys)
        dvalues[...] = jnp.zeros_like(dvalues)

        def query_block(i):
            at = _lanes(plan, i)
            q, o, do, lse = (_cut(plan, i, ref[m, :, at]) for ref in (q_ref, o_ref, do_ref, lse_ref))
            delta = jnp.sum(o * do, axis=0, keepdims=True)
            q, do = q.astype(plan.dtype), do.astype(plan.dtype)
            _load_queries(plan, q, r_ref, at_ref[:, at], queries)
            dqueries[...] = jnp.zeros_like(dqueries)

            def tile(j):
                weights = jnp.exp2(_logits(plan, j, keys_t, queries) - lse)
                dweights = _dot(plan, values_t[j], do, _NN)
                dlogits = (weights * (dweights - delta)).astype(plan.dtype)
                dvalues[j] += _dot(plan, do, weights.astype(plan.dtype), _NT)
                dkeys[j] += _dot(plan, q, dlogits, _NT)
                found = _dot(plan, keys[j], dlogits, _NN)
                dqueries[0 : plan.fixed, :] += found[: plan.fixed]
                if plan.positions:
                    dqueries[_window(plan, j), :] += found[plan.fixed :]

            _for_each(plan.key_blocks, tile)
            dq = dqueries[0 : plan.d, :]
            if plan.positions:
                by_offset = _by_offset(plan, dqueries, at_ref[:, at]).astype(plan.dtype)
                dq += _dot(plan, rt_ref[...], by_offset, _NN)
                dr_ref[0] += _dot(plan, q, by_offset, _NT) * plan.scale
            dq_ref[m, :, at] = (dq * plan.scale).astype(dq_ref.dtype)

        _for_each(plan.query_blocks, query_block)
        for j, lanes, n in _key_lanes(plan):
            dk_ref[m, :, lanes] = (dkeys[j, :, 0:n] * plan.scale).astype(dk_ref.dtype)
            dv_ref[m, :, lanes] = dvalues[j, :, 0:n].astype(dv_ref.dtype)

    _for_each(maps, one_map)


def _dot(plan, a, b, dims):
    return lax.dot_general(a, b, (dims, ((), ())), precision=plan.precision, preferred_element_type=jnp.float32)


def _loop(count: int, body, carry):
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)


def _for_each(count: int, body):
    _loop(count, lambda i, carry: (body(i), carry)[1], 0)


def _lanes(plan, i):
    """The lanes of a block of queries."""
    return pl.ds(pl.multiple_of(i * plan.query, LANES), plan.query)


def _key_lanes(plan):
    """For each block of keys: its number, its lanes in the maps, and how many they are."""
    for j in range(plan.key_blocks):
        n = min(plan.key, plan.pixels - j * plan.key)
        yield j, pl.ds(j * plan.key, n), n


def _cut(plan, i, x):
    """A block of queries in float32, with 0 past the last pixel, where memory holds anything."""
    x = x.astype(jnp.float32)
    if plan.query_pixels == plan.lanes:
        return x
    lane = i * plan.query + lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane < plan.query_pixels, x, 0.0)


def _codes(plan, j, at_ref):
    """k' without the key: ``(depth, key)``, one-hot codes of the coordinates, and the mask's row."""
    at = at_ref[:, pl.ds(j * plan.key, plan.key)]
    row = lax.broadcasted_iota(jnp.int32, (plan.depth, plan.key), 0)
    codes = (row == plan.d) & (at[0:1] < 0)
    if plan.positions:
        for axis, (start, end) in enumerate(zip(plan.groups, plan.groups[1:], strict=False), 1):
            codes |= (row >= start) & (row < end) & (row - start == at[axis : axis + 1])
        codes |= (row >= plan.fixed) & (row - plan.fixed == at[0:1] - plan.line(j))
    return jnp.where(codes, 1.0, 0.0)


def _start_queries(plan, queries):
    """What of q' is the same for all queries: the mask."""
    row = lax.broadcasted_iota(jnp.int32, queries.shape, 0)
    queries[...] = jnp.where(row == plan.d, _MASKED / plan.scale, 0.0)


def _load_queries(plan, q, r_ref, at, queries):
    """Fills q' for a block of queries: q, then the relative logits to each line of each axis."""
    queries[0 : plan.d, :] = q.astype(jnp.float32)
    if not plan.positions:
        return
    by_offset = _dot(plan, r_ref[...], q, _NN)
    for axis, size in enumerate(plan.space):
        x = by_offset[plan.offsets[axis] : plan.offsets[axis + 1]]
        reach = size if axis else plan.rows
        x = _rotate_up(x, reach - 1 - at[axis : axis + 1], reach, size)
        if axis == 0:
            queries[plan.fixed :, :] = _rows(x, plan.lines)
        else:
            queries[plan.groups[axis - 1] : plan.groups[axis], :] = _rows(x, _up(size, SUBLANES))


def _by_offset(plan, dqueries, at):
    """The way back: gradients by position -> by offset, all tables in one stack."""
    parts = []
    for axis, size in enumerate(plan.space):
        if axis == 0:
            x = dqueries[plan.fixed : plan.fixed + min(plan.lines, _up(size, SUBLANES)), :]
        else:
            x = dqueries[plan.groups[axis - 1] : plan.groups[axis], :]
        reach = size if axis else plan.rows
        x = _rotate_down(x, reach - 1 - at[axis : axis + 1], reach, size)
        parts.append(_rows(x, plan.offsets[axis + 1] - plan.offsets[axis]))
    return jnp.concatenate(parts, axis=0)


def _window(plan, j):
    """The rows of q' that the codes of a block of keys choose from along the first axis."""
    start = plan.fixed + plan.line(j)
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, SUBLANES), plan.window)


def _logits(plan, j, keys_t, queries):
    """A tile of scaled logits, keys by queries, in the base of `exp2`."""
    x = queries[0 : plan.fixed, :]
    if plan.positions:
        x = jnp.concatenate([x, queries[_window(plan, j), :]], axis=0)
    return _dot(plan, keys_t[j], x.astype(plan.dtype), _NN) * (plan.scale * math.log2(math.e))


# ------------------------------------------------------------------------------------ the barrel shifter


def _rows(x, count: int):
    """The first rows, or zeros below to make them so many; both in whole tiles."""
    if count <= x.shape[0]:
        return x[:count]
    return jnp.concatenate([x, jnp.zeros((count - x.shape[0], x.shape[1]), x.dtype)], axis=0)


def _bits(reach: int) -> list[int]:
    return [1 << bit for bit in range((reach - 1).bit_length())]


def _rotate_up(x, shift, reach: int, size: int):
    """``y[j, i] = x[j + shift[i], i]`` for j < size, with 0 <= shift < reach."""
    for bit in reversed(_bits(reach)):
        left = _up(size + bit - 1, SUBLANES)  # rows that the smaller bits still need
        if bit % SUBLANES == 0:
            moved = _rows(x[bit:], left)
        else:
            moved = pltpu.roll(x, x.shape[0] - bit, axis=0)[:left]
        x = jnp.where((shift & bit) != 0, moved, x[:left])
    return x


def _rotate_down(x, shift, reach: int, size: int):
    """``y[j + shift[i], i] = x[j, i]`` for j < size and 0 elsewhere, with 0 <= shift < reach.

    From row `size` on x must be 0.
    """
    for bit in _bits(reach):
        x = _rows(x, _up(size + 2 * bit - 1, SUBLANES))
        if bit % SUBLANES == 0:
            moved = jnp.concatenate([jnp.zeros((bit, x.shape[1]), x.dtype), x[:-bit]], axis=0)
        else:
            moved = pltpu.roll(x, bit, axis=0)  # rows that come round are zeros
        x = jnp.where((shift & bit) != 0, moved, x)
    return x
