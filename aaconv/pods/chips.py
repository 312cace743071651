"""TPU generations, their published figures, and the slices they come in.

References:
  Google Cloud TPU documentation, https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, read in November 2026.
  Jouppi et al. (2023), TPU v4: links a chip and their rate, table 4. https://arxiv.org/abs/2304.01433
  Austin et al. (2025), How To Scale Your Model, chapters "TPUs" and "Sharding": which axes of a slice are closed to
    rings, and the hop of half a microsecond. https://jax-ml.github.io/scaling-book
"""

from __future__ import annotations

import dataclasses
import math
import re

from aaconv import watch
from aaconv.errors import close_matches

HOP_SECONDS = 0.5e-6
"""From a chip to its neighbour, for the smallest message; the book gives it for v5e."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    Attributes:
      name: as topologies name it.
      memory: bytes of HBM as published.
      usable: bytes that a program may take: what libtpu 0.0.52 says when it refuses one.
      flops: bfloat16 FLOPs a second, peak.
      bandwidth: bytes a second between HBM and the cores, peak.
      link: bytes a second that one link to a neighbour carries each way, peak.
      axes: of the network between chips.
      cores: devices that the compiler takes a chip for.
      layouts: of slices that can be had, chips along each axis.
      cube: whether other slices, made of whole cubes of 4 x 4 x 4 chips, can be had too, up to the last layout's size.
    """

    name: str
    memory: int
    usable: int
    flops: float
    bandwidth: float
    link: float
    axes: int
    cores: int
    layouts: tuple[tuple[int, ...], ...]
    cube: bool = False

    @property
    def device(self) -> str:
        """What the compiler's figures are of."""
        return "chip" if self.cores == 1 else "core"


def _peak(kind: str) -> float:
    return watch.PEAK_FLOPS[kind]["bfloat16"]


_GIB = 2**30
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SOLID = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16))
_SOLID += ((8, 16, 16),)
CHIPS = {
    chip.name: chip
    for chip in (
        # The links' rates: 400 and 800 GB/s over 4 ports both ways, 1200 GB/s over 6; of v4, 50 GB/s from the paper.
        # v4: two cores of half the memory each. On Cloud TPUs they are joined to one device, here they are not.
        Chip(
            "v4", 32 * _GIB, int(30.5 * _GIB), _peak("TPU v4"), 1200e9, 50e9, 3, 2, (*_SOLID, (16, 16, 16)), cube=True
        ),
        Chip("v5e", 16 * 10**9, int(15.75 * _GIB), _peak("TPU v5e"), 819e9, 50e9, 2, 1, _FLAT),
        Chip(
            "v5p",
            95 * _GIB,
            int(95.73 * _GIB),
            _peak("TPU v5p"),
            2765e9,
            100e9,
            3,
            1,
            (*_SOLID, (16, 16, 24)),
            cube=True,
        ),
        Chip("v6e", 32 * 10**9, int(31.24 * _GIB), _peak("TPU v6e"), 1638e9, 100e9, 2, 1, _FLAT),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined by their own network.

    Attributes:
      chip: their generation.
      layout: chips along each axis.
    """

    chip: Chip
    layout: tuple[int, ...]

    @property
    def devices(self) -> int:
        """What the compiler compiles for."""
        return self.chips * self.chip.cores

    @property
    def device_memory(self) -> int:
        """Bytes that a program may take on one device."""
        return self.chip.usable // self.chip.cores

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.layout))}"

    @property
    def chips(self) -> int:
        return math.prod(self.layout)

    @property
    def hosts(self) -> int:
        """Virtual machines: four chips each, or all of them in slices of up to eight v5e or v6e chips."""
        if self.chip.axes == 2 and self.chips <= 8:
            return 1
        return max(1, self.chips // 4)

    def closed(self, axis: int) -> bool:
        """Whether the last chip along an axis is joined to the first: whole pods' axes, and those of whole cubes."""
        if self.chip.axes == 2:
            return self.layout[axis] == 16
        return all(size % 4 == 0 for size in self.layout)

    def links(self, extent: tuple[int, ...]) -> int:
        """Links that the chip with the fewest has to others of a group of chips.

        Args:
          extent: chips of the group along each axis.
        """
        return sum(0 if size == 1 else 1 + (size > 2 and self._ring(axis, size)) for axis, size in enumerate(extent))

    def hops(self, extent: tuple[int, ...]) -> int:
        """Links between the two chips of a group that are the furthest apart."""
        return sum(size // 2 if self._ring(axis, size) else size - 1 for axis, size in enumerate(extent))

    def _ring(self, axis: int, size: int) -> bool:
        return size == self.layout[axis] and self.closed(axis)


def parse_topology(text: str) -> Slice:
    """Reads ``GENERATION:LAYOUT``.

    Args:
      text: e.g. ``v5e:16x16``.

    Raises:
      ValueError: no such slice can be had; the message lists those that can.

    Example:
      >>> found = parse_topology("v5e:16x16")
      >>> found.chips, found.hosts
      (256, 64)
    """
    name, _, layout = text.partition(":")
    chip = CHIPS.get(name.lower())
    if chip is None:
        near = close_matches(name, CHIPS) or ";"
        raise ValueError(
            f"--topology {text!r} names no TPU that is known here{near} give one of {', '.join(CHIPS)} and a layout, "
            "e.g. v5e:2x2 or v5p:2x2x1"
        )
    sizes = tuple(map(int, layout.split("x"))) if re.fullmatch(r"\d+(x\d+)*", layout) else ()
    if sizes in chip.layouts or (chip.cube and _of_cubes(sizes, chip)):
        return Slice(chip, sizes)
    known = ", ".join("x".join(map(str, known)) for known in chip.layouts)
    cubes = ", and other multiples of 4x4x4 from small to large in between" if chip.cube else ""
    turned = tuple(sorted(sizes))
    hint = f"; did you mean {chip.name}:{'x'.join(map(str, turned))}?" if turned in chip.layouts else ""
    raise ValueError(
        f"--topology {text!r}: there is no slice of {chip.name} chips in the layout {layout!r}{hint}\n"
        f"  layouts of {chip.name}: {known}{cubes}"
    )


def _of_cubes(sizes: tuple[int, ...], chip: Chip) -> bool:
    cubes = len(sizes) == 3 and all(size and size % 4 == 0 for size in sizes)
    return cubes and list(sizes) == sorted(sizes) and math.prod(sizes) <= math.prod(chip.layouts[-1])
