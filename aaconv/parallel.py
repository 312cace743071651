"""The device mesh and how arrays lie on it: batches, large weights and large images, each by a named axis.

Nothing else in the project knows of it but by the axes' names. The network is written for one device; XLA divides
its work by where the inputs lie (GSPMD), except within `by_group`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

GROUP, DATA, FSDP, SPATIAL = AXES = "group", "data", "fsdp", "spatial"
BATCH = (GROUP, DATA, FSDP)
"""The axes that examples are divided over, jointly."""


@dataclasses.dataclass(frozen=True)
class Imagined:
    """A device that is not here: what a mesh asks of one. Sizes can be checked with it, and nothing compiled for it."""

    id: int
    platform: str
    process_index: int = 0
    slice_index: int = 0
    device_kind: str = ""


def imagined(count: int, platform: str, processes: int = 1, slices: int = 1) -> list[Imagined]:
    """Returns devices that are not here, for `configured_mesh`.

    Args:
      count: how many.
      platform: e.g. ``tpu``.
      processes: that share them evenly.
      slices: that they lie in, evenly.
    """
    return [Imagined(i, platform, i * processes // count, i * slices // count) for i in range(count)]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    spatial: int = 1,
    *,
    batch_norm_devices: int = -1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh with the axes ``group``, ``data``, ``fsdp`` and ``spatial``, all of type Auto.

    Examples are divided over the first three, weights and their optimiser state over ``fsdp`` (`state_sharding`), the
    rows of images over ``spatial``. ``group`` tells apart the devices that do not share batch norm's statistics: the
    ``data`` of the arguments is the product of the axes ``group`` and ``data``.

    The mesh follows the wires where jax knows them: on TPUs neighbours of an axis are neighbours in the slice, and
    with several slices, which are joined by a slower network, the first axes go between them.

    Args:
      data: devices along the batch alone; -1 takes what the others leave.
      fsdp: devices along the batch that divide the weights among them as well (Zhao et al. 2023; Rajbhandari et al.
        2020, stage 3); -1 takes what the others leave.
      spatial: devices that divide the rows of each image among them; -1 takes what the others leave.
      batch_norm_devices: devices, of those that have examples of their own, whose examples share batch norm's
        statistics; -1: all; 1: each has its own.
      devices: to take; by default all there are, of all processes.

    Raises:
      ValueError: the sizes do not match the devices, or a run of several processes leaves some out.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "spatial": spatial}
    said = ", ".join(f"mesh.{key}={size}" for key, size in sizes.items())
    here = f"the {len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
    for key, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{key}={size} must be at least 1, or -1 for what the others leave of {here}")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{said}: at most one of them can be -1, for what the others leave of {here}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if len(devices) % known:
            raise ValueError(f"{said} do not divide {here}: use sizes whose product divides {len(devices)}")
        sizes = {key: len(devices) // known if size == -1 else size for key, size in sizes.items()}
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ValueError(f"{said} need {count} devices: there are {len(devices)}; set mesh.data=-1 to take all")
    if 1 < count < len(devices) and devices[0].platform == "tpu":
        raise ValueError(f"{said} leave out some of {here}, which are one slice: set mesh.data=-1 to take all")
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ValueError(f"{said} leave out some of {here} of several processes: set mesh.data=-1")
    groups = _groups(sizes, batch_norm_devices)
    placed = _place(devices[:count], sizes)
    shape = (groups, sizes["data"] // groups, sizes["fsdp"], sizes["spatial"])
    # Auto, not jax's default Explicit: Linen modules do not name the shardings of their outputs.
    return Mesh(placed.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def configured_mesh(config_mesh: Mapping[str, Any], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a config's group ``mesh``; arguments and errors as of `make_mesh`."""
    keys = ("data", "fsdp", "spatial", "batch_norm_devices")
    return make_mesh(**{key: config_mesh[key] for key in keys}, devices=devices)


def describe(mesh: Mesh) -> str:
    """Returns what a mesh does in words, e.g. ``8 devices (data 4 x fsdp 2)``."""
    devices = f"{mesh.size} device{'s' * (mesh.size > 1)}"
    sizes = {**mesh.shape, DATA: mesh.shape[GROUP] * mesh.shape[DATA]}
    divided = [f"{axis} {size}" for axis, size in sizes.items() if axis != GROUP and size > 1]
    if divided and divided != [f"{DATA} {mesh.size}"]:
        devices += f" ({' x '.join(divided)})"
    if mesh.shape[GROUP] > 1:
        each = batch_devices(mesh) // mesh.shape[GROUP]
        devices += f", batch norm by {f'groups of {each} devices' if each > 1 else 'device'}"
    return devices


def _groups(sizes: Mapping[str, int], sharing: int) -> int:
    """How many groups of devices have statistics of their own."""
    batch = sizes["data"] * sizes["fsdp"]
    if sharing in (-1, batch):
        return 1
    if sharing < 1 or batch % sharing:
        fits = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0 and n % sizes["fsdp"] == 0)
        raise ValueError(
            f"mesh.batch_norm_devices={sharing} must divide the {batch} devices along the batch: use one of {fits}, "
            "or -1 for all"
        )
    if sharing % sizes["fsdp"]:
        raise ValueError(
            f"mesh.batch_norm_devices={sharing} must be a multiple of mesh.fsdp={sizes['fsdp']}, whose devices work "
            f"together: use {sizes['fsdp']}, or -1 for all"
        )
    return batch // sharing


def _place(devices: list[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Devices in the shape ``(data, fsdp, spatial)``, so that much talk goes over few and fast wires."""
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes["data"] % slices:
        raise ValueError(
            f"mesh.data={sizes['data']} must be a multiple of the {slices} slices, between which only gradients go: "
            "use smaller mesh.fsdp and mesh.spatial"
        )
    if isinstance(devices[0], Imagined):
        return np.array(devices, dtype=object).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = (sizes["data"] // slices, *shape[1:])
    between = (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


# Where arrays lie


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides an array's leading axis over the devices that have examples of their own."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, tree: Any, min_size: int = 2**16) -> Any:
    """Returns where each array of a state lies: by its shape alone, so that moments and averages follow their weights.

    An array of at least ``min_size`` numbers is divided over ``fsdp`` along its longest axis that this divides, the
    last of equals; everything else lies whole on each device.

    Args:
      mesh: from `make_mesh`.
      tree: of arrays, or of their shapes.
      min_size: numbers; smaller arrays are not worth gathering.

    Returns:
      A tree of `NamedSharding`.
    """
    parts = mesh.shape[FSDP]

    def of(x: Any) -> NamedSharding:
        dividing = [axis for axis, size in enumerate(x.shape) if size % parts == 0]
        if parts == 1 or not dividing or math.prod(x.shape) < min_size:
            return replicated(mesh)
        longest = max(dividing, key=lambda axis: (x.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, FSDP))

    return jax.tree.map(of, tree)


def with_sharding(tree: Any, shardings: Any) -> Any:
    """Returns the shapes of ``tree`` with shardings, as `jax.ShapeDtypeStruct`."""
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, tree, shardings)


def gather(weights: Any, mesh: Mesh, min_size: int = 2**16) -> Any:
    """Within jit: makes divided weights whole on each device for the time of their use; their gradients are divided.

    Without it XLA may rather gather the activations, whose batch is divided over the same devices.

    Args:
      weights: a tree, divided as `state_sharding` says.
      mesh: from `make_mesh`.
      min_size: as of `state_sharding`.
    """
    if mesh.shape[FSDP] == 1:
        return weights
    divided = state_sharding(mesh, weights, min_size)

    @jax.custom_vjp
    def whole(weights):
        return lax.with_sharding_constraint(weights, replicated(mesh))

    def divide(_, gradients):
        # First whole, which is a sum over the batch's devices, then divided: together a reduce-scatter. Divided at once
        # they were sums over pieces of convolutions that went round, in an eighth more memory (ResNet-18, v5e:2x2).
        gradients = lax.with_sharding_constraint(gradients, replicated(mesh))
        return (lax.with_sharding_constraint(gradients, divided),)

    whole.defvjp(lambda weights: (whole(weights), None), divide)
    return whole(weights)


def divide_rows(images: jax.Array, mesh: Mesh) -> jax.Array:
    """Within jit: divides the rows of images ``(b, h, w, c)`` over ``spatial``, and the batch as it was.

    What follows is divided alike: convolutions fetch the rows next to their part from the neighbours, and
    `aaconv.ops.relative_attention` divides its queries.
    """
    if mesh.shape[SPATIAL] == 1:
        return images
    return lax.with_sharding_constraint(images, NamedSharding(mesh, PartitionSpec(BATCH, SPATIAL)))


def check_rows(height: int, mesh: Mesh) -> None:
    """Checks that the rows of images divide over ``spatial``.

    Raises:
      ValueError: they do not.
    """
    parts = mesh.shape[SPATIAL]
    if height % parts:
        fewer = max(n for n in range(1, parts + 1) if height % n == 0 and parts % n == 0)
        raise ValueError(f"mesh.spatial={parts} must divide the {height} rows of the images: use {fewer}")


def check_batch(key: str, size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Checks that a global batch splits evenly.

    Args:
      key: the config key that set it, for the message.
      size: examples in the global batch.
      mesh: from `make_mesh`.
      accumulate_steps: parts that it is worked through in.

    Raises:
      ValueError: it does not; the message names the nearest sizes that do.
    """
    devices = batch_devices(mesh)
    parts = devices * accumulate_steps
    if size % parts:
        below, above = size // parts * parts, (size // parts + 1) * parts
        near = f"{below} or {above}" if below else f"{above}"
        times = f" times accumulate_steps={accumulate_steps}" if accumulate_steps > 1 else ""
        fewer = ""
        one_host = len({device.process_index for device in mesh.devices.flat}) == 1
        if not times and one_host and mesh.size == mesh.shape[DATA] and mesh.devices.flat[0].platform != "tpu":
            fewer = f", or mesh.data={max(n for n in range(1, devices + 1) if size % n == 0)}"
        raise ValueError(
            f"{key}={size} must be a multiple of the {devices} device{'s' * (devices > 1)} that examples are divided "
            f"over{times}: use {near}{fewer}"
        )


def batch_devices(mesh: Mesh) -> int:
    """Returns how many devices have examples of their own."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


# What goes in


def input_share(mesh: Mesh) -> tuple[int, int]:
    """Returns which share of each batch this process reads, and how many shares there are.

    Processes whose devices hold rows of the same images read the same share.

    Raises:
      ValueError: the parts of two processes overlap.
    """
    mine: dict[int, set[int]] = {}
    by_example = mesh.devices.reshape(batch_devices(mesh), -1)
    for part, devices in enumerate(by_example):
        for device in devices:
            mine.setdefault(device.process_index, set()).add(part)
    shares = sorted({tuple(sorted(parts)) for parts in mine.values()})
    flat = [part for share in shares for part in share]
    if flat != list(range(len(by_example))) or len({len(share) for share in shares}) > 1:
        raise ValueError(
            f"mesh.spatial={mesh.shape[SPATIAL]} divides images over parts of several hosts: use a size that divides "
            "a host's devices, or is a multiple of them"
        )
    return shares.index(tuple(sorted(mine[jax.process_index()]))), len(shares)


def to_global(batch: Mapping[str, Any], sharding: NamedSharding, shares: int | None = None) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on the mesh.

    Args:
      batch: arrays whose leading axis is this process's share of the batch.
      sharding: from `batch_sharding`; with `replicated`, every process must give the same.
      shares: how many there are, from `input_share`; by default one a process.

    Returns:
      Global arrays; with several processes their leading axis is that of all shares together.
    """
    shares = jax.process_count() if shares is None else shares
    if sharding.is_fully_replicated:
        shares = 1
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)  # all at once: a small network's step on a CPU feels each
    put = jax.make_array_from_process_local_data
    return {name: put(sharding, x, (shares * len(x), *x.shape[1:])) for name, x in batch.items()}


# How steps are cut


def by_group(apply: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Has each group of devices compute batch norm's statistics from its own examples.

    A `jax.shard_map` over the axis ``group`` alone: within a group the devices work together as ever, so that what
    a network takes for its batch is the group's part of it. Any network's batch norm is served, unchanged. With
    groups of one device this is what `jax.pmap` gave, and what the paper's runs had; the updated running statistics
    are the mean over the groups.

    Args:
      apply: ``(params, batch_stats, images, key) -> logits, batch_stats``.
      mesh: from `make_mesh`; with one group ``apply`` is returned as it is.

    Returns:
      The same function, of the whole batch. Each group has a key of its own.
    """
    if mesh.shape[GROUP] == 1:
        return apply
    whole, divided = PartitionSpec(), PartitionSpec(GROUP)

    def of_group(params, batch_stats, images, key):
        key = jax.random.fold_in(key, lax.axis_index(GROUP))
        logits, batch_stats = apply(params, batch_stats, images, key)
        return logits, lax.pmean(batch_stats, GROUP)

    return jax.shard_map(
        of_group,
        mesh=mesh,
        in_specs=(whole, whole, divided, whole),
        out_specs=(divided, whole),
        axis_names={GROUP},
    )


def in_parts(x: jax.Array, parts: int) -> jax.Array:
    """``(b, ...)`` -> ``(parts, b / parts, ...)``, so that each device's examples stay with it: every ``parts``-th."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def from_parts(x: jax.Array) -> jax.Array:
    """The inverse of `in_parts`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
