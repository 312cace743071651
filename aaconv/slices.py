"""TPU slices: the layouts in which the chips of each generation can be had, and the hosts that hold them.

References:
  https://cloud.google.com/tpu/docs/supported-tpu-configurations and
  https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, read in November 2026.
"""

from __future__ import annotations

import dataclasses
import math
import re

from aaconv.errors import close_matches

Layout = tuple[int, ...]


def _layouts(text: str) -> tuple[Layout, ...]:
    return tuple(tuple(map(int, layout.split("x"))) for layout in text.split())


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_SOLID = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
LAYOUTS = {
    "v4": _layouts(f"{_SOLID} 16x16x16"),
    "v5e": _layouts(_FLAT),
    "v5p": _layouts(f"{_SOLID} 16x16x24"),
    "v6e": _layouts(_FLAT),
}
"""Chips along each axis, by generation. Of layouts with three axes there are more, made of whole cubes of 4 x 4 x 4
chips, up to the size of the last."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined by their own network.

    Attributes:
      generation: of `LAYOUTS`.
      layout: chips along each axis.
    """

    generation: str
    layout: Layout

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Reads ``GENERATION:LAYOUT``.

        Args:
          text: e.g. ``v5e:16x16``.

        Raises:
          ValueError: no such slice can be had; the message lists those that can.

        Example:
          >>> found = Slice.parse("v5e:16x16")
          >>> found.chips, found.hosts
          (256, 64)
        """
        name, _, layout = text.partition(":")
        name = name.lower()
        if name not in LAYOUTS:
            near = close_matches(name, LAYOUTS) or ";"
            raise ValueError(
                f"--topology {text!r} names no TPU that is known here{near} give one of {', '.join(LAYOUTS)} and a "
                "layout, e.g. v5e:2x2 or v5p:2x2x1"
            )
        known = LAYOUTS[name]
        sizes = tuple(map(int, layout.split("x"))) if re.fullmatch(r"\d+(x\d+)*", layout) else ()
        if sizes in known or (len(known[0]) == 3 and _of_cubes(sizes, known[-1])):
            return cls(name, sizes)
        turned = tuple(sorted(sizes))
        hint = f", did you mean {cls(name, turned).name}?" if turned in known else ""
        cubes = ", and other multiples of 4x4x4 from small to large in between" if len(known[0]) == 3 else ""
        raise ValueError(
            f"--topology {text!r}: there is no slice {layout!r}{hint}; layouts of {name}: "
            f"{', '.join('x'.join(map(str, one)) for one in known)}{cubes}"
        )

    @property
    def name(self) -> str:
        return f"{self.generation}:{self.topology}"

    @property
    def topology(self) -> str:
        """The layout as it is written, e.g. ``16x16``."""
        return "x".join(map(str, self.layout))

    @property
    def chips(self) -> int:
        return math.prod(self.layout)

    @property
    def chips_per_host(self) -> int:
        """4, but one host holds all of a flat slice of up to eight."""
        return self.chips if self.chips <= 8 and len(self.layout) == 2 else 4

    @property
    def hosts(self) -> int:
        """Virtual machines."""
        return self.chips // self.chips_per_host


def _of_cubes(sizes: Layout, largest: Layout) -> bool:
    cubes = len(sizes) == 3 and all(size and size % 4 == 0 for size in sizes)
    return cubes and list(sizes) == sorted(sizes) and math.prod(sizes) <= math.prod(largest)
