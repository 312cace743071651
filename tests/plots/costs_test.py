"""Costs are drawn, a panel each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from aaconv import plots
from aaconv.plots import costs


def _pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


PANELS = {
    "time, ms": {"ours": [(49, 1.0), (196, 3.0)], "theirs": [(49, 2.0), (196, 30.0)]},
    "memory, MB": {"ours": [(49, 0.1)]},
}


def test_costs_are_drawn_with_a_panel_each(tmp_path):
    one, two = (
        _pixels(plots.scaling(panels, tmp_path / "cost.png", title="cost", xlabel="pixels", dashed=["theirs"]))
        for panels in ({"time, ms": PANELS["time, ms"]}, PANELS)
    )
    assert two.shape[0] == one.shape[0] > 500 and two.shape[1] == 2 * one.shape[1]
    for colour in costs.LINES[:2]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (one == wanted).all(-1).sum() > 50, colour


def test_costs_without_a_point_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no line has a point"):
        plots.scaling({"time, ms": {"ours": []}}, tmp_path / "cost.png")


@pytest.mark.parametrize("places", [[], [0.5], [0.1, 0.11, 0.12, 0.9], [0.0, 0.0, 0.0], [0.2, 0.5]])
def test_labels_keep_their_distance_and_their_middle(places):
    spread = costs._spread(places, gap=0.1)
    assert all(upper - lower > 0.1 - 1e-9 for lower, upper in zip(spread, spread[1:], strict=False))
    assert sum(spread) == pytest.approx(sum(places))
