"""Relative attention on a device mesh: each device attends within its own images and heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

BATCH = ("group", "data", "fsdp")
"""The mesh axes of type Auto that divide the batch, jointly and in this order."""


def by_device(
    attend: Callable[..., jax.Array],
    spatial_ndim: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *whole: Any,
    automatic: bool = False,
    check_vma: bool = True,
) -> jax.Array:
    """Calls ``attend(q, k, v, *whole)`` in `jax.shard_map`, on each device's part of batch and heads.

    The mesh is the one that ``q`` lives on, or the one in use (`jax.set_mesh`). Its axes of type Explicit
    say themselves how batch and heads are divided; space and depth are made whole. Axes that are Manual
    belong to the caller's own shard_map. The gradients of ``whole`` are summed over the devices by the
    transpose of shard_map. Without a mesh it is a plain call.

    Args:
      attend: of the parts.
      spatial_ndim: number of spatial axes.
      q, k, v: ``(*b, *space, n, depth)``.
      *whole: trees of arrays that every device has whole.
      automatic: whether to divide the batch over axes of type Auto too, where they divide it: over `BATCH`, or the
        first in a mesh without such names; for what the compiler cannot divide by itself.
      check_vma: as in `jax.shard_map`.

    Returns:
      The result, divided as ``q`` is.
    """
    mesh = _mesh_of(q)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = [name for name, kind in kinds.items() if kind == AxisType.Explicit or automatic and kind == AxisType.Auto]
    auto = [name for name in free if kinds[name] == AxisType.Auto]
    explicit = len(auto) < len(free)
    if not explicit and math.prod(mesh.shape[name] for name in free) == 1:
        return attend(q, k, v, *whole)
    batch = q.ndim - 2 - spatial_ndim
    said = (*jax.typeof(q).sharding.spec, *[None] * q.ndim)[: q.ndim] if explicit else (None,) * q.ndim
    split = [*said[:batch], *[None] * spatial_ndim, said[-2], None]
    if explicit:
        put = lambda x, *spec: jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
        q, k, v = (put(x, *split) for x in (q, k, v))
        whole = jax.tree.map(put, whole)
    dividing = [name for name in BATCH if name in auto] or auto[:1]
    if dividing and batch and split[0] is None and q.shape[0] % math.prod(mesh.shape[x] for x in dividing) == 0:
        split[0] = tuple(dividing)
    spec = PartitionSpec(*split)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(spec, spec, spec, *(PartitionSpec() for _ in whole)),
        out_specs=spec,
        axis_names=set(free),
        check_vma=check_vma,
    )(q, k, v, *whole)


def alone(x: jax.Array) -> bool:
    """Whether ``x`` lies on one device, as far as is known while tracing: nothing of it is divided."""
    mesh = _mesh_of(x)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return math.prod(mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual) == 1


def _mesh_of(x: jax.Array) -> AbstractMesh:
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


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
