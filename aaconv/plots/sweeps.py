"""What came out of a sweep: against what was set, over two things that were set, against its cost, while it trained.

The functions return figures, which `aaconv.plots.png` and `aaconv.plots.svg` save.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from aaconv.plots import style
from aaconv.plots.style import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
UNBOUNDED = (-math.inf, math.inf)
EDGE = 1.2  # points, of markers: what a hollow one is drawn by
MOST_SHADED = 6  # lines of a panel whose ranges are drawn
INCH_A_LETTER = 0.075  # of the 9 points that ticks are written in


@dataclasses.dataclass(frozen=True)
class Panels(Generic[T]):
    """Small pictures in rows and columns that share their axes.

    Attributes:
      cells: what is in each, by row and column.
      rows: a title each, from above; a single one may be "".
      columns: a title each, from the left; a single one may be "".
    """

    cells: Mapping[tuple[str, str], T]
    rows: Sequence[str] = ("",)
    columns: Sequence[str] = ("",)


@dataclasses.dataclass(frozen=True)
class Lines:
    """What the colours of lines mean.

    Attributes:
      names: in the order of their colours.
      title: of the legend.
      ordered: whether the names are numbers in ascending order, whose colours are then a ramp.
    """

    names: Sequence[str] = ("",)
    title: str = ""
    ordered: bool = False

    def colour(self, name: str, theme: Theme) -> Any:
        """Returns the colour of a name's line."""
        index = self.names.index(name)
        if self.ordered and len(self.names) > 2 or len(self.names) > len(theme.lines):
            import matplotlib

            low, high = theme.ramp
            return matplotlib.colormaps[style.RAMP](low + (high - low) * index / max(1, len(self.names) - 1))
        return theme.lines[index]

    def marker(self, name: str) -> str:
        """Returns the marker of a name's points, which tells lines apart without colours."""
        return style.MARKERS[self.names.index(name) % len(style.MARKERS)]


@dataclasses.dataclass(frozen=True)
class Point:
    """Runs of one cell of a sweep.

    Attributes:
      x: what was set.
      results: what came out, a number a run.
      half: half the width of the interval around their mean; nan: there is none.
      is_whole: whether no run is missing; else its marker is hollow.
    """

    x: float
    results: Sequence[float]
    half: float = math.nan
    is_whole: bool = True

    @property
    def mean(self) -> float:
        """Of the results."""
        return float(np.mean(self.results))


def against(
    panels: Panels[Mapping[str, Sequence[Point]]],
    theme: Theme = style.LIGHT,
    *,
    lines: Lines = Lines(),  # noqa: B008 - it cannot be changed
    xlabel: str,
    ylabel: str,
    names: Sequence[str] = (),
    joined: bool = True,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Figure:
    """Draws what came out against what was set: a dot a run, a line through the means, an interval around each mean.

    Args:
      panels: ``{name of a line: points}`` each, x ascending.
      theme: colours.
      lines: what the lines are.
      xlabel: what was set, with its unit.
      ylabel: what came out, with its unit.
      names: of what was set where that is no number: x is then a place among them.
      joined: whether lines are drawn through the means.
      bounds: that results have: intervals are cut there.
    """
    figure, axes, size = _grid(panels, theme, xlabel, ylabel)
    points = [point for cell in panels.cells.values() for line in cell.values() for point in line]
    ticks = list(range(len(names))) or sorted({point.x for point in points})
    for place, cell in panels.cells.items():
        for name, line in cell.items():
            # Beside each other, or intervals of several lines would cover each other.
            points_aside = (lines.names.index(name) - (len(lines.names) - 1) / 2) * min(4.0, 16 / len(lines.names))
            _draw_line(
                axes[place], line, lines.colour(name, theme), lines.marker(name), points_aside, "-" if joined else ""
            )
    for panel in axes.values():
        _set_ticks(panel, ticks, names or [f"{tick:g}" for tick in ticks], size[0])
        if names:
            panel.set_xlim(-0.5, len(names) - 0.5)
            if not all(label.get_text() for label in panel.get_xticklabels()):
                panel.set_xticks(ticks, names, rotation=35, ha="right", rotation_mode="anchor")
        panel.set_ylim(*_limits(points, bounds))
    _legend(figure, lines, theme, joined=joined)
    return figure


def learning(
    panels: Panels[Mapping[str, np.ndarray]],
    theme: Theme = style.LIGHT,
    *,
    lines: Lines = Lines(),  # noqa: B008 - it cannot be changed
    xlabel: str,
    ylabel: str,
    lacking: Collection[tuple[tuple[str, str], str]] = (),
) -> Figure:
    """Draws how runs went: a line through the means of a cell's runs, and the range from their lowest to their highest.

    Of more than `MOST_SHADED` lines in a panel the ranges are left out: they would cover each other.

    Args:
      panels: ``{name of a line: (4, n)}`` each: x ascending, mean, lowest, highest.
      theme: colours.
      lines: what the lines are.
      xlabel: ``epoch`` or ``step``.
      ylabel: what is drawn, with its unit.
      lacking: lines of which runs are missing, by panel and name; they are dashed.
    """
    figure, axes, _ = _grid(panels, theme, xlabel, ylabel)
    for place, cell in panels.cells.items():
        for name, (x, mean, low, high) in cell.items():
            colour = lines.colour(name, theme)
            marker = lines.marker(name) if len(x) <= 12 else None
            if len(cell) <= MOST_SHADED:
                axes[place].fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            dashes = "--" if (place, name) in lacking else "-"
            axes[place].plot(x, mean, dashes, color=colour, linewidth=1.4, marker=marker, markersize=3.5)
    few = any(len(curve[0]) <= 12 for cell in panels.cells.values() for curve in cell.values())
    _legend(figure, lines, theme, marked=few)
    return figure


def heat_maps(
    panels: Panels[np.ndarray],
    theme: Theme = style.LIGHT,
    *,
    up: Sequence[str],
    across: Sequence[str],
    xlabel: str,
    ylabel: str,
    label: str,
    form: str = "{:.4g}",
    higher_is_better: bool = True,
    notes: Mapping[tuple[str, str], Mapping[tuple[int, int], str]] = MappingProxyType({}),
) -> Figure:
    """Draws tables as colours, each number in its cell, all with one scale; the lightest colour is the best.

    Args:
      panels: ``(len(up), len(across))`` each, nan where there is nothing.
      theme: colours.
      up: values of the rows, from below.
      across: values of the columns.
      xlabel: what `across` is, with its unit.
      ylabel: what `up` is, with its unit.
      label: of the colours: what came out, with its unit.
      form: of a number in its cell.
      higher_is_better: else the lowest number has the lightest colour.
      notes: what stands below numbers, by panel, row and column; where there is no room for numbers, such cells are
        hatched.
    """
    import matplotlib
    from matplotlib.patches import Rectangle

    values = np.stack(list(panels.cells.values())).astype(np.float64)
    widest = max((len(form.format(value)) for value in values[np.isfinite(values)]), default=1)
    widest = max(widest, *(len(note) for those in notes.values() for note in those.values()), 1)
    cell = max(0.5, INCH_A_LETTER * (max(widest, *map(len, across)) + 1.5))
    written = cell * len(across) * len(panels.columns) < 15  # inches
    cell = cell if written else 14 / len(across) / len(panels.columns)
    size = cell * len(across) + 0.3, 0.42 * len(up) + 0.3
    figure, axes, _ = _grid(panels, theme, xlabel, ylabel, size=size)
    colours = matplotlib.colormaps["viridis" if higher_is_better else "viridis_r"]
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    picture: Any = None
    for place, table in panels.cells.items():
        panel = axes[place]
        picture = panel.imshow(table, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if not math.isfinite(value):
                continue
            red, green, blue, _ = picture.to_rgba(value)
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            note = notes.get(place, {}).get((row, column), "")
            if written:
                text = f"{form.format(value)}\n{note}".strip()
                panel.text(column, row, text, ha="center", va="center", color=ink, fontsize=8, linespacing=1.0)
            elif note:
                corner = column - 0.5, row - 0.5
                panel.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=ink, linewidth=0))
        _label_cells(panel, across, up, cell)
        panel.grid(False)
        panel.tick_params(length=0)
        for spine in panel.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(picture, ax=list(axes.values()), label=label, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    return figure


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a cell of a sweep costs and brings.

    Attributes:
      x: its cost.
      y: what came out.
      half: half the width of the interval around y; nan: there is none.
      number: that it is called by; 0: it has none.
      in_front: whether no other cell brings as much for less.
      is_whole: whether no run is missing; else its dot is hollow.
    """

    x: float
    y: float
    half: float = math.nan
    number: int = 0
    in_front: bool = False
    is_whole: bool = True


def fronts(
    panels: Mapping[str, Sequence[Cost]],
    theme: Theme = style.LIGHT,
    *,
    ylabel: str,
    names: Mapping[int, str],
    bounds: tuple[float, float] = UNBOUNDED,
) -> Figure:
    """Draws what came out against costs, a panel each, with the cells in front joined, numbered and named.

    Args:
      panels: ``{what the cost is, with its unit: cells}``.
      theme: colours.
      ylabel: what came out, with its unit.
      names: of the cells that have a number.
      bounds: that results have: intervals are cut there.
    """
    wide = max(map(len, names.values()), default=0) > 48
    below = 0.2 * len(names) if wide else 0.0
    width = 4.2 * len(panels) + (0 if wide else 0.6 + 0.065 * max(map(len, names.values()), default=0))
    figure = style.figure((width, max(3.8, 0.9 + 0.19 * (0 if wide else len(names))) + below))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    points = [Point(cost.x, [cost.y], cost.half) for costs in panels.values() for cost in costs]
    for axes, (xlabel, costs) in zip(row, panels.items(), strict=True):
        axes.set_xlabel(xlabel)
        axes.grid(linewidth=0.8)
        axes.set_axisbelow(True)
        if max(cost.x for cost in costs) > 5 * min(cost.x for cost in costs):
            axes.set_xscale("log")
            _plain_numbers(axes)
        else:
            axes.locator_params(axis="x", nbins=4)  # costs may differ in their last digits alone
        for cost in costs:
            colour = theme.lines[1] if cost.in_front else theme.muted
            half = cost.half if math.isfinite(cost.half) else None
            axes.errorbar(cost.x, cost.y, yerr=half, color=colour, elinewidth=0.8, alpha=0.8, zorder=2)
            inside = colour if cost.is_whole else _hollow(axes)
            size = 6 if cost.in_front else 4
            edge = {"markerfacecolor": inside, "markeredgewidth": EDGE}
            axes.plot(cost.x, cost.y, "o", color=colour, markersize=size, zorder=3, **edge)
        axes.set_ylim(*_limits(points, bounds))
        best = sorted((cost for cost in costs if cost.in_front), key=lambda cost: cost.x)
        # What the next cost buys is there only once it is paid: steps, and level after the last.
        x = [cost.x for cost in best] + [axes.get_xlim()[1]]
        y = [cost.y for cost in best] + [best[-1].y]
        axes.set_xlim(axes.get_xlim())
        axes.plot(x, y, drawstyle="steps-post", color=theme.lines[1], linewidth=1.2, alpha=0.7, zorder=1)
    row[0].set_ylabel(ylabel)
    from matplotlib.lines import Line2D

    listed = [Line2D([], [], linestyle="", label=f"{number}   {name}") for number, name in names.items()]
    figure.legend(
        handles=listed,
        loc="outside lower left" if wide else "outside right center",
        handlelength=0,
        handletextpad=0,
        title="Pareto front",
        alignment="left",
        fontsize=8,
    )
    figure.draw_without_rendering()  # where things are is known only now
    for axes, costs in zip(row, panels.values(), strict=True):
        _number(axes, costs, theme)
    return figure


def _number(axes: Axes, costs: Sequence[Cost], theme: Theme) -> None:
    """Writes numbers beside their points, where no other point or number is."""
    to_points = 72 / axes.figure.dpi
    spots = {cost: axes.transData.transform((cost.x, cost.y)) * to_points for cost in costs}
    taken = [(x, y, 4.0, 4.0) for x, y in spots.values()]  # middle, half width, half height
    around = [(-8, 6), (8, -7), (-10, 0), (9, 6), (-8, -7), (-8, 15), (8, -16), (0, 10), (0, -10), (-18, 6), (18, -7)]
    for cost in costs:
        if not cost.in_front or not cost.number:
            continue
        x, y = spots[cost]
        half = 2.6 * len(str(cost.number)) + 0.5
        free = [
            (dx, dy)
            for dx, dy in around
            if all(abs(x + dx - a) >= half + w or abs(y + dy - b) >= 4.5 + h for a, b, w, h in taken)
        ]
        dx, dy = free[0] if free else around[0]
        taken.append((x + dx, y + dy, half, 4.5))
        axes.annotate(
            str(cost.number),
            (cost.x, cost.y),
            (dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=theme.ink,
        )


def _grid(
    panels: Panels[Any], theme: Theme, xlabel: str, ylabel: str, *, size: tuple[float, float] | None = None
) -> tuple[Figure, dict[tuple[str, str], Axes], tuple[float, float]]:
    """Returns a figure, its panels, and the size of each in inches."""
    rows, columns = len(panels.rows), len(panels.columns)
    if size is None:
        size = (5.6, 3.8) if rows * columns == 1 else (max(2.0, min(3.2, 10 / columns)), 2.1 if rows > 2 else 2.6)
    figure = style.figure((size[0] * columns + 1.6, size[1] * rows + 0.7))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.supxlabel(xlabel, fontsize=9, color=theme.ink)
    figure.supylabel(ylabel, fontsize=9, color=theme.ink)
    axes = {}
    for (r, row), (c, column) in itertools.product(enumerate(panels.rows), enumerate(panels.columns)):
        panel = axes[row, column] = grid[r][c]
        panel.grid(linewidth=0.8)
        panel.set_axisbelow(True)
        if r == 0 and column:
            panel.set_title(_wrapped(column, size[0]), fontsize=9, loc="center")
        if c == columns - 1 and row:
            panel.annotate(
                _wrapped(row, size[1]),
                (1.02, 0.5),
                xycoords="axes fraction",
                rotation=270,
                ha="left",
                va="center",
            )
    return figure, axes, size


def _wrapped(text: str, inches: float) -> str:
    return "\n".join(textwrap.wrap(text, max(8, int(inches / INCH_A_LETTER))))


def _draw_line(
    axes: Axes, line: Sequence[Point], colour: Any, marker: str, points_aside: float, linestyle: str
) -> None:
    from matplotlib.transforms import ScaledTranslation

    def aside(points: float) -> Any:
        return axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)  # pyright: ignore[reportAttributeAccessIssue]

    dots = [(point.x, result) for point in line for result in point.results if len(point.results) > 1]
    if dots:  # right of the interval, which would hide them
        axes.scatter(*zip(*dots, strict=True), s=9, color=colour, alpha=0.45, lw=0, transform=aside(points_aside + 2.5))
    x, means = [point.x for point in line], [point.mean for point in line]
    halves = [point.half if math.isfinite(point.half) else 0.0 for point in line]
    looks: dict[str, Any] = {"color": colour, "transform": aside(points_aside)}
    axes.errorbar(
        x,
        means,
        halves if any(halves) else None,
        linestyle=linestyle,
        linewidth=1.5,
        capsize=2.5,
        elinewidth=0.9,
        **looks,
    )
    for is_whole, inside, size in ((True, colour, 4), (False, _hollow(axes), 5)):
        those = [(point.x, point.mean) for point in line if point.is_whole == is_whole]
        if those:
            edge = {"markerfacecolor": inside, "markeredgewidth": EDGE}
            axes.plot(*zip(*those, strict=True), marker, markersize=size, zorder=3, **edge, **looks)


def _hollow(axes: Axes) -> Any:
    """Returns what is within a hollow marker: the paper; nothing where a page shows through."""
    from matplotlib.colors import to_rgba

    colour = to_rgba(axes.get_facecolor())
    return colour if colour[3] else "none"  # with alpha 0 matplotlib 3.11 leaves out the edge as well


def _limits(points: Sequence[Point], bounds: tuple[float, float]) -> tuple[float, float]:
    """Returns limits that show every run; an interval is cut at bounds, and where it is much wider than these."""
    results = [result for point in points for result in point.results]
    halves = [(point.mean, point.half if math.isfinite(point.half) else 0.0) for point in points]
    low, high = min(results), max(results)
    room = 0.75 * (high - low) or 0.05 * abs(high) or 1.0
    low = max(low - room, min(low, *(mean - half for mean, half in halves)))
    high = min(high + room, max(high, *(mean + half for mean, half in halves)))
    low, high = max(low, bounds[0]), min(high, bounds[1])
    pad = 0.06 * (high - low) or room
    return low - pad, high + pad


def _is_logarithmic(values: Sequence[float]) -> bool:
    """Whether ascending values lie more evenly by their ratios than by their differences."""
    if len(values) < 3 or values[0] <= 0:
        return False

    def evenness(at: Sequence[float]) -> float:
        gaps = [b - a for a, b in itertools.pairwise(at)]
        return min(gaps) / max(gaps)

    return evenness([math.log(value) for value in values]) > evenness(values)


def _set_ticks(axes: Axes, values: Sequence[float], names: Sequence[str], inches: float) -> None:
    """Puts ticks at the values that were set, and writes the names of those for which there is room."""
    from matplotlib.ticker import NullLocator

    places = np.asarray(values, float)
    if _is_logarithmic(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        places = np.log(places)
    share = (places - places[0]) / (places[-1] - places[0]) if len(places) > 1 else np.full(1, 0.5)
    labels, end = [], -math.inf
    for at, name in zip(share * 0.88 * inches, names, strict=True):
        half = INCH_A_LETTER * (len(name) + 0.5) / 2
        fits = at - half >= end
        labels.append(name if fits else "")
        end = at + half if fits else end
    axes.set_xticks(values, labels)
    # Not left to matplotlib, which does not know where points that are drawn aside lie.
    margin = 0.07 * (places[-1] - places[0]) or 1.0
    low, high = places[0] - margin, places[-1] + margin
    axes.set_xlim(*(np.exp([low, high]) if axes.get_xscale() == "log" else (low, high)))


def _label_cells(axes: Axes, across: Sequence[str], up: Sequence[str], cell: float) -> None:
    every = math.ceil(INCH_A_LETTER * (max(map(len, across)) + 0.5) / cell)
    axes.set_xticks(range(0, len(across), every), across[::every])
    axes.set_yticks(range(len(up)), up)


def _plain_numbers(axes: Axes) -> None:
    """Writes a few numbers of a logarithmic axis as they are, without powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, lines: Lines, theme: Theme, *, joined: bool = True, marked: bool = True) -> None:
    from matplotlib.lines import Line2D

    if len(lines.names) < 2:
        return
    handles = [
        Line2D(
            [],
            [],
            color=lines.colour(name, theme),
            linestyle="-" if joined else "",
            marker=lines.marker(name) if marked else "",
            markersize=4,
            label=textwrap.fill(name, 40),
        )
        for name in lines.names
    ]
    figure.legend(handles=handles, loc="outside right center", title=lines.title, alignment="left", fontsize=8)
