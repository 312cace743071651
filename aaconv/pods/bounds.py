"""How long a program takes at least: by its products, by HBM and by the network, whichever is longest.

Bounds, not forecasts: each assumes a peak rate that no program reaches throughout, and that all else is hidden
behind it (Williams et al. 2009, Roofline).
"""

from __future__ import annotations

import dataclasses

from aaconv.pods import collectives
from aaconv.pods.chips import Slice


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that one run of a program takes at least, by what binds it; None where it is not known.

    Attributes:
      compute: the network's own products at the bfloat16 peak.
      memory: bytes through HBM at its peak bandwidth.
      network: the collectives one after another.
    """

    compute: float
    memory: float | None
    network: float | None

    @property
    def longest(self) -> tuple[str, float]:
        """Which binds, and its seconds."""
        found = dataclasses.asdict(self)
        name = max(found, key=lambda name: found[name] or 0.0)
        return name, found[name]


def bounds(flops: float, moved: int | None, totals: list[collectives.Total] | None, slice: Slice) -> Bounds:
    """Returns the bounds of a program.

    Args:
      flops: of one device, a multiply-add as 2.
      moved: bytes between one device's HBM and its cores.
      totals: of its collectives.
      slice: that it runs on.

    Example:
      >>> from aaconv.pods.chips import parse_topology
      >>> bounds(197e12, 819 * 10**9, [], parse_topology("v5e:1x1"))
      Bounds(compute=1.0, memory=1.0, network=0)
    """
    chip = slice.chip
    return Bounds(
        compute=flops * chip.cores / chip.flops,
        memory=None if moved is None else moved * chip.cores / chip.bandwidth,
        network=None if totals is None else sum(x.seconds for x in totals),
    )
