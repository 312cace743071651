"""What the chips of a compiled program say to each other: read off its text, with bytes and times.

Times are lower bounds: a collective sends at least the bytes below from each chip, over all links that the chip has
within the group, and takes at least as long as the way to the furthest chip and back. Thakur et al. (2005),
Optimization of Collective Communication Operations in MPICH, gives the bytes; they hold for a ring and for every
other algorithm that sends no more.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from aaconv.bench import traffic
from aaconv.pods.chips import HOP_SECONDS, Slice

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
# An order of the devices may follow the mesh: as many of them as a grid, transposed.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_SUB_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array on each device: the operand, but for an all-gather its result.
      group: positions in the mesh of the devices of one group.
      times: how often a run executes it.
      op_name: functions and layers it comes from.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends at least, once."""
        return sent_bytes(self.kind, self.bytes, len(self.group))


def sent_bytes(kind: str, size: int, devices: int) -> float:
    """Returns the bytes that each device of a group sends at least.

    Args:
      kind: one of `KINDS`.
      size: bytes of the array on each device: the operand, but for an all-gather its result.
      devices: of the group.

    Example:
      >>> sent_bytes("all-reduce", 1000, 4)
      1500.0
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return float(size) if devices > 1 else 0.0
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def read(hlo_text: str, devices: int) -> list[Collective]:
    """Lists the collective operations of a compiled program.

    Asynchronous ones count once, where they start; those of a loop count with every trip. An all-reduce that a TPU
    program fuses with the slice of its result that the device keeps is a reduce-scatter.

    Args:
      hlo_text: ``compiled.as_text()``.
      devices: of the mesh, which is a group that the program does not spell out.

    Raises:
      ValueError: the text is no program, or does not say how often a loop runs.
    """
    found = []
    for x in traffic.executed(hlo_text):
        kind = x.opcode.removesuffix("-start")
        if kind == "ragged-all-to-all":
            kind = "all-to-all"
        if kind not in KINDS:
            continue
        # What an asynchronous gather starts with is its operand beside its result.
        size = sum(map(traffic.array_bytes, x.operands))
        group = _group(x.attributes, devices)
        if kind == "all-gather":
            size *= len(group)
        elif kind == "all-reduce" and x.siblings & {"dynamic-slice", "slice"}:
            kind = "reduce-scatter"
        found.append(Collective(kind, size, group, x.times, x.op_name))
    return found


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices; of a permutation, the first that one sends to another and itself."""
    pairs = _PAIRS.search(attributes)
    if pairs:
        apart = (pair for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pair[0] != pair[1])
        return tuple(map(int, next(apart, "0")))
    mesh = _MESH.search(attributes)
    if mesh:
        order = _grid(_numbers(mesh[2]), _numbers(mesh[3])).ravel() if mesh[2] else None
        group = _mesh_group(mesh[1], mesh[4])
        return group if order is None else tuple(int(order[position]) for position in group)
    iota = _IOTA.search(attributes)
    if iota:
        groups = _grid(_numbers(iota[2]), _numbers(iota[3])).reshape(_numbers(iota[1])[0], -1)
        return tuple(map(int, groups[0]))
    lists = _LISTS.search(attributes)
    if lists and lists[1]:
        inner = re.match(r"\{([\d,]*)\}", lists[1])
        return tuple(map(int, inner[1].split(","))) if inner else (0,)
    return tuple(range(devices))


def _numbers(text: str | None) -> list[int]:
    return [int(x) for x in text.split(",")] if text else []


def _grid(sizes: list[int], order: list[int]) -> np.ndarray:
    """The numbers from 0 in a grid, transposed."""
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes)))


def _mesh_group(axes: str, named: str) -> tuple[int, ...]:
    """Groups as axes of a mesh, parts of axes as ``'name':(size before)size``."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    positions = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    for name, before, size in _SUB_AXIS.findall(named):
        axis = list(sizes).index(name)
        if size:
            before, size = int(before), int(size)
            length = positions.shape[axis]
            # Of the axis, cut into (before, size, rest), everything at the first place of the others.
            rest = sizes[name] // before // size
            positions = (
                np.take(positions, np.arange(0, size * rest, rest), axis) if length == sizes[name] else positions
            )
    whole = {name for name, _, _ in _SUB_AXIS.findall(named)}
    first = tuple(slice(None) if name in whole else 0 for name in sizes)
    return tuple(map(int, np.ravel(positions[first])))


@dataclasses.dataclass(frozen=True)
class Total:
    """The collectives of one kind together, in one run of the program.

    Attributes:
      kind: one of `KINDS`.
      count: operations executed.
      bytes: of the arrays on each device.
      sent: bytes each device sends at least.
      seconds: at least, see `seconds`.
    """

    kind: str
    count: int
    bytes: int
    sent: float
    seconds: float


def totals(found: Iterable[Collective], slice: Slice, coordinates: Sequence[Sequence[int]]) -> list[Total]:
    """Adds the collectives up by kind.

    Args:
      found: from `read`.
      slice: whose links they use.
      coordinates: of the chips, in the order of the mesh's devices.
    """
    sums: dict[str, list[Any]] = {}
    for x in found:
        entry = sums.setdefault(x.kind, [0, 0, 0.0, 0.0])
        parts = (x.times, x.times * x.bytes, x.times * x.sent, x.times * seconds(x, slice, coordinates))
        sums[x.kind] = [a + b for a, b in zip(entry, parts, strict=True)]
    return [Total(kind, *sums[kind]) for kind in KINDS if kind in sums]


def seconds(x: Collective, slice: Slice, coordinates: Sequence[Sequence[int]]) -> float:
    """Returns how long a collective takes at least: its bytes over the links, or its way, whichever is longer."""
    if x.sent == 0:
        return 0.0
    places = [tuple(coordinates[position][: len(slice.layout)]) for position in x.group]
    extent = tuple(len(set(along)) for along in zip(*places, strict=True))
    links = slice.links(extent)
    if not links:  # cores of one chip
        return 0.0
    if x.kind == "collective-permute":
        links = 1
    way = slice.hops(extent) * (2 if x.kind == "all-reduce" else 1)
    return max(x.sent / (links * slice.chip.link), way * HOP_SECONDS)
