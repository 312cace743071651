"""Slices of TPUs: what can be had, and what their chips are joined by."""

from __future__ import annotations

import pytest

from aaconv.pods.chips import CHIPS, parse_topology
from aaconv.slices import LAYOUTS


@pytest.mark.parametrize(
    ("topology", "chips", "hosts", "devices"),
    [
        ("v5e:1x1", 1, 1, 1),
        ("v5e:2x4", 8, 1, 8),
        ("v5e:4x4", 16, 4, 16),
        ("v5e:16x16", 256, 64, 256),
        ("v6e:8x16", 128, 32, 128),
        ("v5p:2x2x1", 4, 1, 4),
        ("v5p:4x4x12", 192, 48, 192),
        ("v4:2x2x2", 8, 2, 16),
    ],
)
def test_slices(topology, chips, hosts, devices):
    found = parse_topology(topology)
    assert (found.name, found.chips, found.hosts, found.devices) == (topology, chips, hosts, devices)


def test_axes_are_rings_where_a_pod_or_cubes_close_them():
    pod, half, small = (parse_topology(f"v5e:{layout}") for layout in ("16x16", "8x16", "8x8"))
    assert [[x.closed(axis) for axis in (0, 1)] for x in (pod, half, small)] == [[True] * 2, [False, True], [False] * 2]
    assert [parse_topology(f"v5p:{x}").closed(2) for x in ("4x4x4", "2x4x4", "4x4x8")] == [True, False, True]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_are_of_one_magnitude(chip):
    # What a program may take is what is published less what the system keeps; v5p's 96 GB are published as 95 GiB.
    assert 0.9 * chip.memory < chip.usable < 1.08 * chip.memory
    assert 100 < chip.flops / chip.bandwidth < 600 and chip.link < chip.bandwidth / 10
    assert chip.name in parse_topology(f"{chip.name}:{'x'.join(map(str, LAYOUTS[chip.name][0]))}").name
