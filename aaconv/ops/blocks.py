"""How much of the attention maps an implementation in linear memory holds at once."""

from __future__ import annotations

import dataclasses
import operator

USED_BY = {
    "blockwise": ("query", "pairs"),
    "pallas_tpu": ("query", "key"),
    "pallas_tpu_interpret": ("query", "key"),
}
"""Which sizes each implementation takes; the others take none."""


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the blocks; None leaves one to the implementation, which takes it from shape and platform.

    A size that an implementation does not take is an error where that implementation was named; where it was
    chosen, the size waits for the platform that takes it.

    Attributes:
      query: query positions in a block. ``blockwise`` takes whole lines of the map, so a multiple of the
        shorter of the last two spatial axes (any number for a signal); ``pallas_tpu`` a multiple of 128.
      key: key positions in a block, ``pallas_tpu`` only: ``blockwise`` takes all keys at once.
      pairs: (image, head) pairs computed side by side, ``blockwise`` only: at most this many, a divisor of
        heads and images. Over several devices, and under a symbolic batch, all images count as one.

    Raises:
      ValueError: a size is not a positive integer.

    Example:
      >>> BlockSizes(query=56)
      BlockSizes(query=56, key=None, pairs=None)
    """

    query: int | None = None
    key: int | None = None
    pairs: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size is None:
                continue
            try:
                whole = 0 if isinstance(size, bool) else operator.index(size)
            except TypeError:
                whole = 0
            object.__setattr__(self, field.name, whole)
            if whole < 1:
                raise ValueError(
                    f"BlockSizes({field.name}={size!r}): it must be a positive integer, or None to have it chosen"
                )

    def check_used(self, implementation: str) -> None:
        """Raises ValueError where a size is given that the named implementation does not take."""
        used = USED_BY.get(implementation, ())
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        for name in given:
            if name not in used:
                takers = ", ".join(other for other, sizes in USED_BY.items() if name in sizes)
                takes = f"takes {' and '.join(used)}" if used else "takes no block sizes"
                raise ValueError(
                    f"BlockSizes({name}={getattr(self, name)}) with implementation={implementation!r}, which {takes}: "
                    f"leave it out, or name one that takes it ({takers})"
                )
