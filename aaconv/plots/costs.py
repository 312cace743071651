"""How costs grow."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from aaconv.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("#4c78a8", "#e4572e", "#2a9d57", "#9d4edd", "#b8860b", "#d6417e", "#1f9bb4", "#7a5c43", "#6b7280", "#000000")


def scaling(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    xlabel: str = "",
    dashed: Collection[str] = (),
) -> str:
    """Draws how costs grow: a panel each, logarithmic both ways, every line labelled at its end.

    Args:
      panels: ``{what it shows, with its unit: {line: points (x, y)}}``, x ascending, all above 0. A line has the
        same colour in every panel.
      path: of the PNG.
      title: above the picture.
      xlabel: what x is.
      dashed: names of the lines that are drawn so.

    Returns:
      The path.

    Raises:
      ValueError: there is nothing to draw.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    if not any(points for lines in panels.values() for points in lines.values()):
        raise ValueError("there is nothing to draw: no line has a point")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    x = sorted({at for lines in panels.values() for points in lines.values() for at, _ in points})
    with style.styled():
        figure = style.figure((6.4 * len(panels), 4.6), constrained=False)
        figure.subplots_adjust(left=0.62 / len(panels) / 6.4, right=1 - 1.5 / len(panels) / 6.4, wspace=0.42)
        figure.subplots_adjust(top=0.84 if title else 0.92, bottom=0.12)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for line, points in lines.items():
                looks = {"linestyle": "--" if line in dashed else "-", "marker": "o", "markersize": 3.5}
                axes.plot(*zip(*points, strict=True), color=_colour(names, line), linewidth=1.6, **looks)
            axes.set(xscale="log", yscale="log", xlabel=xlabel)
            axes.set_title(name, pad=8)
            axes.xaxis.set_major_locator(FixedLocator(x))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(x, [f"{at:g}" for at in x])
            axes.grid(color=style.GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            _growth(axes, lines, x)
            _label_ends(axes, lines, names)
        return style.save(figure, path)


def _colour(names: Sequence[str], line: str) -> str:
    return LINES[names.index(line) % len(LINES)]


def _growth(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], x: Sequence[float]) -> None:
    """Slopes to compare with: what grows like x, and like its square."""
    if len(x) < 2:
        return
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    start = min(y for points in lines.values() for _, y in points)
    for power, text in ((1, "linear"), (2, "quadratic")):
        end = start * (x[-1] / x[0]) ** power
        axes.plot([x[0], x[-1]], [start, end], color="#bbbbbb", linewidth=1, linestyle=":", zorder=1)
        # On the line, where it is still inside the panel.
        at = math.exp(0.12 * math.log(x[0]) + 0.88 * math.log(x[-1]))
        at = min(at, x[0] * (0.8 * high_y / start) ** (1 / power))
        axes.annotate(
            text,
            (at, start * (at / x[0]) ** power),
            (-3, 3),
            textcoords="offset points",
            color="#888888",
            fontsize=7,
            ha="right",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
    axes.set(xlim=(low_x, high_x), ylim=(low_y, high_y))


def _label_ends(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], names: Sequence[str]) -> None:
    """Writes each line's name to the right of the panel, near its last point and clear of the others."""
    to_share = lambda point: axes.transAxes.inverted().transform(axes.transData.transform(point))
    ends = [(tuple(to_share(points[-1])), line) for line, points in lines.items() if points]
    ends.sort(key=lambda end: end[0][1])
    places = _spread([y for (_, y), _ in ends], gap=0.045)
    for (end, line), place in zip(ends, places, strict=True):
        axes.annotate(
            line,
            end,
            (1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=_colour(names, line),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": _colour(names, line), "linewidth": 0.6, "alpha": 0.6},
            annotation_clip=False,
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places as little as it takes for them to lie at least `gap` apart."""
    groups: list[list[float]] = []  # [middle, count] of labels that touch, from below
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (upper, more), (lower, count) = groups.pop(), groups.pop()
            groups.append([(lower * count + upper * more) / (count + more), count + more])
    return [middle + gap * (i - (count - 1) / 2) for middle, count in groups for i in range(int(count))]
