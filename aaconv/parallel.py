"""The device mesh and how arrays lie on it: batches split, everything else replicated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def make_mesh(data: int = -1) -> Mesh:
    """Returns a mesh with the one axis ``"data"``.

    Args:
      data: devices along it; -1 takes all.

    Raises:
      ValueError: there are fewer devices, or a run of several processes leaves some out.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if data != -1 and not 1 <= data <= len(devices):
        raise ValueError(
            f"mesh.data={data} must lie between 1 and the {len(devices)} devices of {devices[0].platform!r} here; "
            "set mesh.data=-1 to take all"
        )
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(
            f"mesh.data={data} leaves out some of the {len(devices)} devices of {jax.process_count()} processes: "
            "set mesh.data=-1"
        )
    # Auto, not the default Explicit: Linen modules do not name the shardings of their outputs.
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits an array's leading axis over the mesh."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(key: str, size: int, mesh: Mesh) -> None:
    """Checks that a global batch splits evenly.

    Args:
      key: the config key that set it, for the message.
      size: examples in the global batch.
      mesh: from `make_mesh`.

    Raises:
      ValueError: it does not; the message names the nearest sizes that do.
    """
    devices = mesh.size
    if size % devices:
        below, above = size // devices * devices, (size // devices + 1) * devices
        near = f"{below} or {above}" if below else f"{above}"
        fewer = max(n for n in range(1, devices + 1) if size % n == 0)
        raise ValueError(
            f"{key}={size} must be a multiple of the {devices} devices of the mesh: use {near}, or mesh.data={fewer}"
        )


def to_global(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on the mesh.

    Args:
      batch: arrays whose leading axis is this process's share of the batch.
      sharding: from `batch_sharding`; with `replicated`, every process must give the same.

    Returns:
      Global arrays; with several processes their leading axis is that of all shares together.
    """
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
