"""TPU generations, their published figures, and how the chips of a slice are joined.

References:
  Google Cloud TPU documentation, https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, read in November 2026.
  Jouppi et al. (2023), TPU v4: links a chip and their rate, table 4. https://arxiv.org/abs/2304.01433
  Austin et al. (2025), How To Scale Your Model, chapters "TPUs" and "Sharding": which axes of a slice are closed to
    rings, and the hop of half a microsecond. https://jax-ml.github.io/scaling-book
"""

from __future__ import annotations

import dataclasses

from aaconv import slices, watch

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
    """

    name: str
    memory: int
    usable: int
    flops: float
    bandwidth: float
    link: float
    axes: int
    cores: int

    @property
    def device(self) -> str:
        """What the compiler's figures are of."""
        return "chip" if self.cores == 1 else "core"


def _chip(name: str, memory: int, usable: float, link: float, axes: int, cores: int = 1) -> Chip:
    kind = f"TPU {name}"
    bandwidth = watch.HBM_BANDWIDTH[kind]
    return Chip(name, memory, int(usable), watch.PEAK_FLOPS[kind]["bfloat16"], bandwidth, link, axes, cores)


_GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        # The links' rates: 400 and 800 GB/s over 4 ports both ways, 1200 GB/s over 6; of v4, 50 GB/s from the paper.
        # v4: two cores of half the memory each. On Cloud TPUs they are joined to one device, here they are not.
        _chip("v4", 32 * _GIB, 30.5 * _GIB, link=50e9, axes=3, cores=2),
        _chip("v5e", 16 * 10**9, 15.75 * _GIB, link=50e9, axes=2),
        _chip("v5p", 95 * _GIB, 95.73 * _GIB, link=100e9, axes=3),
        _chip("v6e", 32 * 10**9, 31.24 * _GIB, link=100e9, axes=2),
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
        return slices.Slice(self.chip.name, self.layout).name

    @property
    def chips(self) -> int:
        return slices.Slice(self.chip.name, self.layout).chips

    @property
    def hosts(self) -> int:
        """Virtual machines."""
        return slices.Slice(self.chip.name, self.layout).hosts

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
    """Reads ``GENERATION:LAYOUT``; errors as of `aaconv.slices.Slice.parse`.

    Args:
      text: e.g. ``v5e:16x16``.

    Example:
      >>> parse_topology("v4:2x2x2").devices
      16
    """
    found = slices.Slice.parse(text)
    return Slice(CHIPS[found.generation], found.layout)
