"""Relative attention on a device mesh: each device attends from its own images, heads and rows of the map."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

ROWS = "spatial"
"""The mesh axis of type Auto that divides the first spatial axis, the rows of an image."""
BATCH = ("group", "data", "fsdp")
"""The mesh axes of type Auto that divide the batch, jointly and in this order."""


def by_device(
    attend: Callable[..., jax.Array],
    forward: Callable[..., tuple[jax.Array, jax.Array]],
    backward: Callable[..., tuple[Any, ...]],
    spatial_ndim: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel: Sequence[jax.Array] | None,
    *whole: Any,
    rows: int = 0,
    automatic: bool = False,
    check_vma: bool = True,
) -> jax.Array:
    """Attends in `jax.shard_map`, on each device from its part of batch, heads and rows.

    The mesh is the one that ``q`` lives on, or the one in use (`jax.set_mesh`). What divides what:

    ========  =========================================================================================================
    type      what axes of this type do
    ========  =========================================================================================================
    Explicit  say themselves how batch, heads and rows are divided; all else is made whole
    Auto      divide by their names, for nothing says how an array lies on them: `ROWS` divides the rows and `BATCH` the
              batch, as far as they divide it; in a mesh without such names the first axis divides the batch
    Manual    belong to the caller's own shard_map
    ========  =========================================================================================================

    Where rows are divided, a device has its rows of the queries and gathers all keys and values, anew for the
    gradients, which are summed over the devices and divided again. Row ``offset + r - 1`` of the table that it gets
    for the rows serves ``offset = key - query``, with the query's row counted among the ``r`` of the device: a window
    of ``r + size - 1`` rows of the whole table. Rows that cannot be divided evenly are filled up with empty ones.

    The derivative is put around shard_map, not left to jax's derivative of it, which in jax 0.10 to 0.12 does not lower
    within the caller's shard_map over other axes of the same mesh.

    Args:
      attend: ``(q, k, v, rel, *whole)`` -> ``(*b, *space, n, e)``; called where nothing is divided.
      forward: the same -> its result and one more array ``(*b, *space, n)`` for ``backward``; called with keys that may
        have more rows than the queries.
      backward: ``(q, k, v, rel, *whole, *forward's results, d_out)`` -> gradients of all that ``attend`` takes.
      spatial_ndim: number of spatial axes.
      q, k, v: ``(*b, *space, n, depth)``.
      rel: tables ``(2 * size - 1, depth)``, one a spatial axis; None or none of them without positions.
      *whole: trees of arrays that every device has whole; their gradients and those of tables are summed.
      rows: which spatial axis the rows lie along.
      automatic: whether axes of type Auto divide the batch also where no rows are divided: for what the
        compiler cannot divide by itself.
      check_vma: as in `jax.shard_map`.

    Returns:
      The result, divided as ``q`` is.
    """
    mesh, axis = _mesh_of(q), q.ndim - 2 - spatial_ndim + rows
    split = _split(mesh, q, spatial_ndim, axis, automatic)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    used = {name for entry in split for name in _names(entry)}
    # What the compiler divides by itself may stay to it; a kernel has to be told of every axis.
    manual = used | {
        name for name, kind in kinds.items() if kind == AxisType.Explicit or automatic and kind == AxisType.Auto
    }
    explicit = AxisType.Explicit in kinds.values()
    if not explicit and math.prod(mesh.shape[name] for name in manual) == 1:
        return attend(q, k, v, rel, *whole)
    if explicit:
        put = lambda x, *spec: jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
        said = [tuple(name for name in _names(entry) if kinds[name] == AxisType.Explicit) or None for entry in split]
        q, k, v = (put(x, *said) for x in (q, k, v))
        rel, whole = jax.tree.map(put, (rel, whole))
    names, size = _names(split[axis]), q.shape[axis]
    count = math.prod(mesh.shape[name] for name in names)
    spare = -size % count
    if spare:
        q, k, v = (_pad(x, axis, 0, spare) for x in (q, k, v))
        rel = rel and (*rel[:rows], _pad(rel[rows], 0, spare, 0), *rel[rows + 1 :])

    def placed(q, k, v, rel, *whole):
        """What a device attends from and to, from what lies on it."""
        if count > 1:
            each = q.shape[axis]
            k, v = (lax.all_gather(x, names, axis=axis, tiled=True) for x in (k, v))
            if spare:
                k, v = (lax.slice_in_dim(x, 0, size, axis=axis) for x in (k, v))
            if rel:
                first = (count - 1 - lax.axis_index(names)) * each
                window = lax.dynamic_slice_in_dim(rel[rows], first, each + size - 1)
                rel = (*rel[:rows], window, *rel[rows + 1 :])
        return vary_alike(q, k, v, rel, *whole)

    def backward_placed(inputs, results, d_out):
        inputs, back = jax.vjp(placed, *inputs)
        dq, dk, dv, *d_whole = back(vary_alike(*backward(*inputs, *results, d_out)))
        if not check_vma:  # nothing has been said to vary, so that no sum has become of it
            d_whole = lax.psum(d_whole, tuple(used))
        return dq, dk, dv, *d_whole

    spec = PartitionSpec(*split)
    specs = spec, spec, spec, PartitionSpec(), *[PartitionSpec()] * len(whole)
    of_results = spec, PartitionSpec(*split[:-1])
    shard_map = functools.partial(jax.shard_map, mesh=mesh, axis_names=manual, check_vma=check_vma)
    run = shard_map(lambda *inputs: forward(*placed(*inputs)), in_specs=specs, out_specs=of_results)
    run_backward = shard_map(backward_placed, in_specs=(specs, of_results, spec), out_specs=specs)

    @jax.custom_vjp
    def divided(*inputs):
        return run(*inputs)[0]

    def divided_forward(*inputs):
        results = run(*inputs)
        return results[0], (inputs, results)

    def divided_backward(saved, d_out):
        inputs, results = saved
        return run_backward(inputs, results, d_out)

    divided.defvjp(divided_forward, divided_backward)
    out = divided(q, k, v, rel, *whole)
    return lax.slice_in_dim(out, 0, size, axis=axis) if spare else out


def row_devices(q: jax.Array, spatial_ndim: int) -> int:
    """Over how many devices the rows of ``(*b, *space, n, d)`` are divided, as far as is known while tracing."""
    mesh, rows = _mesh_of(q), q.ndim - 2 - spatial_ndim
    return math.prod(mesh.shape[name] for name in _names(_split(mesh, q, spatial_ndim, rows, False)[rows]))


def whole_space(spatial_ndim: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Gathers ``(*b, *space, n, depth)`` along space where axes of type Explicit divide it, for what holds whole maps.

    A map of pairs of positions, rows and columns divided alike, is what such axes do not admit.
    """

    def gather(x):
        mesh = _mesh_of(x)
        if AxisType.Explicit not in mesh.axis_types:
            return x
        spec = [*jax.typeof(x).sharding.spec, *[None] * x.ndim][: x.ndim]
        spec[-2 - spatial_ndim : -2] = [None] * spatial_ndim
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return tuple(map(gather, arrays))


def alone(x: jax.Array) -> bool:
    """Whether ``x`` lies on one device, as far as is known while tracing: nothing of it is divided."""
    mesh = _mesh_of(x)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return math.prod(mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual) == 1


def _mesh_of(x: jax.Array) -> AbstractMesh:
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def _split(mesh: AbstractMesh, q: jax.Array, spatial_ndim: int, rows: int, automatic: bool) -> list[Any]:
    """The entries of the partition of ``q``: names of mesh axes, or None."""
    batch = q.ndim - 2 - spatial_ndim
    split: list[Any] = [None] * q.ndim
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = [name for name, kind in kinds.items() if kind == AxisType.Auto]
    if AxisType.Explicit in kinds.values():
        said = (*jax.typeof(q).sharding.spec, *split)[: q.ndim]
        for axis in (*range(batch), rows, q.ndim - 2):
            split[axis] = said[axis]
    if ROWS in auto and mesh.shape[ROWS] > 1 and split[rows] is None:
        split[rows] = ROWS
        automatic = True
    if automatic and batch and split[0] is None:
        others = [name for name in auto if name != ROWS]
        count, dividing = 1, []
        for name in [name for name in BATCH if name in others] or others[:1]:
            if q.shape[0] % (count * mesh.shape[name]) == 0:
                count *= mesh.shape[name]
                dividing.append(name)
        split[0] = tuple(dividing) or None
    return split


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """Zeros around ``x`` along an axis."""
    width = [(0, 0)] * x.ndim
    width[axis] = (before, after)
    return jnp.pad(x, width)


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """Within `jax.shard_map`: lets all arrays vary over the same mesh axes, so that loops can add them up.

    What was the same everywhere, such as a table, gets its gradient summed over those axes.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)]
    every = frozenset().union(*axes)

    def align(x):
        missing = every - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(align, arrays) if every else arrays
