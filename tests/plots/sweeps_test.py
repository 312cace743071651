"""Pictures of sweeps can be read: nothing is written over something else, nothing that came out is cut off."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from aaconv.plots import style, sweeps

PAPER = {"light": (style.LIGHT, "#ffffff"), "dark": (style.DARK, "#15181d")}


def overlapping(texts) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


def one_panel(lines) -> sweeps.Panels:
    return sweeps.Panels({("", ""): lines})


@pytest.mark.parametrize(
    "values", [[0.1, 0.2, 0.5], [round(0.125 * i, 3) for i in range(30)], [2**i for i in range(9)]]
)
def test_values_below_an_axis_have_room(values):
    points = [sweeps.Point(x, [x % 3.0, x % 3.0 + 0.1], 0.2) for x in values]
    figure = sweeps.against(one_panel({"": points}), xlabel="kappa", ylabel="accuracy (%)")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = axes.get_xticklabels()
    assert not overlapping(labels)
    assert labels[0].get_text() == f"{values[0]:g}" and len(labels) == len(values)
    assert all(axes.get_xlim()[0] < x < axes.get_xlim()[1] for x in values)


def test_every_name_below_an_axis_is_written():
    names = [*(f"train[:{share}%]+validation" for share in (1, 5, 10, 20, 50)), "$A/$B{"]  # no formula
    points = [sweeps.Point(x, [float(x)]) for x in range(len(names))]
    figure = sweeps.against(one_panel({"": points}), xlabel="split", ylabel="y", names=names, joined=False)
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == names
    assert min(label.get_window_extent().y0 for label in figure.axes[0].get_xticklabels()) > 0  # inside the picture


def test_every_run_is_shown_and_an_endless_interval_is_cut():
    points = [sweeps.Point(0, [1.0, 2.0], 6.35), sweeps.Point(1, [1.4, 1.5], 0.6)]
    figure = sweeps.against(one_panel({"": points}), xlabel="x", ylabel="y")
    low, high = figure.axes[0].get_ylim()
    assert -1 < low < 1.0 - 0.1 and 2.0 + 0.1 < high < 4
    figure = sweeps.against(one_panel({"": points}), xlabel="x", ylabel="y", bounds=(0.5, 2.0))
    low, high = figure.axes[0].get_ylim()
    assert 0.4 < low < 0.5 and 2.0 < high < 2.1


@pytest.mark.parametrize("count", [3, 60])
def test_numbers_of_a_front_lie_apart(count):
    costs = [
        sweeps.Cost(1 + i / count, 50 + 20 * np.log(1 + i), 2.0, number=1 + i // 5, in_front=i % 5 == 0)
        for i in range(count)
    ]
    names = {cost.number: f"kappa={cost.number}" for cost in costs if cost.in_front}
    figure = sweeps.fronts({"parameters (k)": costs, "MFLOPs": costs}, ylabel="accuracy (%)", names=names)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert sorted(int(text.get_text()) for text in axes.texts) == sorted(names)
        assert not overlapping(axes.texts)


def test_the_lightest_cell_of_a_heat_map_is_the_best():
    table = np.array([[1.0, 2.0], [np.nan, 3.0]])
    for higher, best in ((True, 3.0), (False, 1.0)):
        figure = sweeps.heat_maps(
            one_panel(table),
            up=["0", "1"],
            across=["0", "1"],
            xlabel="x",
            ylabel="y",
            label="z",
            higher_is_better=higher,
        )
        written = {text.get_text() for text in figure.axes[0].texts}
        picture = figure.axes[0].images[0]
        brightness = {value: sum(picture.to_rgba(value)[:3]) for value in (1.0, 2.0, 3.0)}
        assert written == {"1", "2", "3"} and max(brightness, key=lambda value: brightness[value]) == best


@pytest.mark.parametrize("theme", PAPER)
def test_lines_stand_out_from_the_paper_and_from_each_other_without_red_or_green(theme):
    colours, paper = PAPER[theme]
    rgb = lambda colour: np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = lambda colour: np.where(
        rgb(colour) <= 0.04045, rgb(colour) / 12.92, ((rgb(colour) + 0.055) / 1.055) ** 2.4
    )
    luminance = lambda colour: linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05
    for colour in (*colours.lines, colours.ink):
        contrast = luminance(colour) / luminance(paper)
        assert max(contrast, 1 / contrast) > 3, colour  # WCAG 2.1, 1.4.11: what graphics need
    # Machado, Oliveira and Fernandes (2009), table 1, severity 1: no green cones, no red cones.
    blind = [
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ]
    for matrix in blind:
        seen = [np.array(matrix) @ linear(colour) for colour in colours.lines[:4]]
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.05
