"""Which TPU slices there are, and what is said of those there are not."""

from __future__ import annotations

import pytest

from aaconv import slices


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e:3x5", "layouts of v5e: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5e", "layouts of v5e"),
        ("v6e:16x8", "did you mean v6e:8x16"),
        ("v5p:2x2", "layouts of v5p: 2x2x1"),
        ("v5p:4x4x6", "multiples of 4x4x4"),
        ("v5p:16x16x28", "multiples of 4x4x4"),
        ("v7:2x2", "give one of v4, v5e, v5p, v6e"),
        ("v5lite:2x2", "did you mean 'v5e'"),
        ("4x4", "names no TPU that is known here; give one of v4, v5e, v5p, v6e and a layout, e.g. v5e:2x2"),
        ("", "names no TPU"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(topology, words):
    with pytest.raises(ValueError, match="--topology") as caught:
        slices.Slice.parse(topology)
    assert words in str(caught.value)


def test_every_slice_that_is_listed_can_be_had():
    for generation, layouts in slices.LAYOUTS.items():
        for layout in layouts:
            found = slices.Slice(generation, layout)
            assert slices.Slice.parse(f"{generation.upper()}:{found.topology}") == found
            assert found.hosts * found.chips_per_host == found.chips
