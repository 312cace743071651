"""Pictures: the curves of a run, and where a network looks. The only place that knows matplotlib."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aaconv import workdirs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

TRAIN, TEST, INK, GRID = "#4c78a8", "#e4572e", "#333333", "#e6e6e6"
HEAT = "inferno"
MARKS = ("#00c2d1", "#ff4fa3", "#7bd63b", "#ffb000", "#b48cff", "#ffffff")  # one a query; seen on dark and light
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
LINES = ("#4c78a8", "#e4572e", "#2a9d57", "#9d4edd", "#b8860b", "#d6417e", "#1f9bb4", "#7a5c43", "#6b7280", "#000000")
QUERIES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))


def check_installed() -> None:
    """Raises ImportError now rather than after what is to be drawn was computed."""
    import matplotlib  # noqa: F401


def curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "") -> str:
    """Draws loss, accuracy and learning rate against epochs.

    Args:
      rows: as of `aaconv.metrics.read_rows`: each with ``step``, most with ``epoch``, and some of
        ``train/loss``, ``train/accuracy``, ``eval/loss``, ``eval/accuracy``, ``eval/top5`` and
        ``optim/learning_rate``.
      path: of the PNG.
      title: above the picture.

    Returns:
      The path.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not any("train/loss" in row or "eval/loss" in row for row in rows):
        raise ValueError("there are no losses to draw: metrics.jsonl has no row with train/loss or eval/loss yet")
    by_epoch = all("epoch" in row for row in rows)
    with _style():
        figure = _figure((7.2, 7.0))
        loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
        _line(loss, rows, "train/loss", "training", TRAIN)
        _line(loss, rows, "eval/loss", "test", TEST)
        _line(accuracy, rows, "train/accuracy", "training", TRAIN, scale=100)
        _line(accuracy, rows, "eval/accuracy", "test", TEST, scale=100)
        if len({row["eval/top5"] for row in rows if "eval/top5" in row} - {1.0}) > 1:
            _line(accuracy, rows, "eval/top5", "test, among the first five", TEST, scale=100, dashed=True)
        _line(rate, rows, "optim/learning_rate", "", INK)
        loss.set(ylabel="loss (nats)")
        accuracy.set(ylabel="accuracy (%)")
        rate.set(ylabel="learning rate", xlabel="epoch" if by_epoch else "step")
        for axes in (loss, accuracy, rate):
            axes.grid(color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(loc="best")
        rate.set_ylim(bottom=0)
        loss.set_title(title, pad=10)
        figure.align_ylabels()
        return _save(figure, path)


def attention_maps(
    images: Sequence[np.ndarray],
    weights: np.ndarray,
    path: str | os.PathLike[str],
    *,
    captions: Sequence[str],
    queries: Sequence[tuple[float, float]] = QUERIES,
    title: str = "",
) -> str:
    """Draws where chosen pixels of each image look, one row a pixel and one column a head.

    The heat shows how often a key is looked at in comparison with its even share, ``h w`` times
    the weight; each image has a scale of its own,
    by square roots.

    Args:
      images: b images, uint8 ``(H, W, 1)`` or ``(H, W, 3)``.
      weights: ``(b, n, h, w, h, w)``: query ``[.., y, x, :, :]`` sums to 1; the map may be coarser
        than the image.
      path: of the PNG.
      captions: a line an image.
      queries: pixels to look from, as ``(down, across)`` from 0 to 1.
      title: above the picture.

    Returns:
      The path.

    Raises:
      ValueError: the weights are not maps of two spatial axes, or a query lies outside the image.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    weights = np.asarray(weights, np.float32)
    if weights.ndim != 6 or weights.shape[2:4] != weights.shape[4:]:
        raise ValueError(f"weights have shape {weights.shape}: they must be (b, n, h, w, h, w), over two axes")
    if len(images) != len(weights) or len(captions) != len(images):
        raise ValueError(
            f"{len(images)} images, {len(weights)} maps and {len(captions)} captions: give as many of each"
        )
    for down, across in queries:
        if not (0 <= down <= 1 and 0 <= across <= 1):
            raise ValueError(f"query {down},{across} lies outside the image: both numbers go from 0 to 1")
    heads, height, width = weights.shape[1:4]
    relative = weights * (height * width)
    blocks, rows = len(images), len(queries)
    cell = 1.15 if heads <= 8 else 0.9
    gap = 0.5  # inches above each image's rows, for its caption
    row = cell * _aspect(images)
    across = 2 if heads <= 4 and blocks > 1 else 1  # images beside each other
    wide, high = cell * (heads + 1) + 0.75, gap + rows * row  # of one image with its colour bar
    left = 0.15
    lines = textwrap.wrap(title, max(20, int(11 * across * wide)))  # about eleven characters an inch
    top = 0.2 + 0.2 * len(lines) if title else 0.1
    size = (left + across * wide + 0.1, top + -(-blocks // across) * high + 0.1)

    def place(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """From inches right of and below the upper left corner to matplotlib's shares of the figure."""
        return x / size[0], 1 - (y + h) / size[1], w / size[0], h / size[1]

    with _style():
        figure = _figure(size, constrained=False)
        if title:
            figure.text(*place(left, 0.12, 0, 0)[:2], "\n".join(lines), va="top", fontsize=10, fontweight="bold")
        for block, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x0, y0 = left + block % across * wide, top + block // across * high
            figure.text(*place(x0, y0 + 0.12, 0, 0)[:2], caption, va="top")
            cells = [_cell(query, height, width) for query in queries]
            # By square roots, or one strong weight would leave every other panel black.
            norm = PowerNorm(0.5, 0, max(2.0, *(float(relative[block, :, y, x].max()) for y, x in cells)))
            for r, (y, x) in enumerate(cells):
                for column in range(heads + 1):
                    corner = x0 + column * cell, y0 + gap + r * row
                    axes = figure.add_axes(place(*corner, cell - 0.06, row - 0.06))
                    heat = relative[block, column - 1, y, x] if column else None
                    _panel(axes, image, heat, norm, (y, x), (height, width), MARKS[r % len(MARKS)])
                    if r == 0 and column:
                        axes.set_title(f"head {column}", fontsize=8, pad=2, loc="center")
            bar = figure.add_axes(place(x0 + (heads + 1) * cell, y0 + gap, 0.1, rows * row - 0.06))
            # Of its own, not of a panel: the bar shows the colours without an image below them.
            figure.colorbar(ScalarMappable(norm, HEAT), cax=bar)
            bar.set_ylabel("weight / even share", fontsize=7)
            bar.tick_params(labelsize=7)
        return _save(figure, path)


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
    with _style():
        figure = _figure((6.4 * len(panels), 4.6), constrained=False)
        figure.subplots_adjust(left=0.62 / len(panels) / 6.4, right=1 - 1.5 / len(panels) / 6.4, wspace=0.42)
        figure.subplots_adjust(top=0.84 if title else 0.92, bottom=0.12)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for line, points in lines.items():
                style = {"linestyle": "--" if line in dashed else "-", "marker": "o", "markersize": 3.5}
                axes.plot(*zip(*points, strict=True), color=_colour(names, line), linewidth=1.6, **style)
            axes.set(xscale="log", yscale="log", xlabel=xlabel)
            axes.set_title(name, pad=8)
            axes.xaxis.set_major_locator(FixedLocator(x))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(x, [f"{at:g}" for at in x])
            axes.grid(color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            _growth(axes, lines, x)
            _label_ends(axes, lines, names)
        return _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> str:
    if workdirs.in_bucket(path):
        with workdirs.path(path).open("wb") as file:
            figure.savefig(file, dpi=150, format="png")
    else:
        figure.savefig(path, dpi=150)
    return os.fspath(path)


def against(
    lines: Mapping[str, Sequence[tuple[float, Sequence[float], float]]],
    path: str | os.PathLike[str],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> str:
    """Draws what came out against what was set: a dot a run, a line through the means, an interval around each mean.

    Args:
      lines: ``{name: points (x, results of the runs, half the width of the interval)}``, x ascending; half a width of
        nan draws no interval. One line needs no name.
      path: of the PNG.
      xlabel: what was set.
      ylabel: what came out.
      title: above the picture.

    Returns:
      The path.
    """
    names = list(lines)
    with _style():
        figure = _figure((6.4, 4.4))
        axes = figure.subplots()
        ticks = sorted({x for points in lines.values() for x, _, _ in points})
        step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
        for index, (name, points) in enumerate(lines.items()):
            colour = _colour(names, name)
            # Beside each other, or intervals of several lines would cover each other.
            moved = step * 0.04 * (index - (len(lines) - 1) / 2)
            x = [at + moved for at, _, _ in points]
            means = [float(np.mean(results)) for _, results, _ in points]
            halves = [half if math.isfinite(half) else 0.0 for _, _, half in points]
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.6, "capsize": 3, "elinewidth": 1}
            axes.errorbar(x, means, yerr=halves if any(halves) else None, color=colour, label=name, **style)
            dots = [(at + moved, result) for at, results, _ in points for result in results]
            axes.scatter(*zip(*dots, strict=True), s=9, color=colour, alpha=0.4, linewidths=0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(title, pad=10)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        if len(lines) > 1:
            axes.legend(loc="best")
        figure.savefig(path, dpi=150)
    return os.fspath(path)


def heat_map(
    values: np.ndarray,
    path: str | os.PathLike[str],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str = "",
    form: str = "{:.4g}",
) -> str:
    """Draws a table as colours, each number in its cell.

    Args:
      values: ``(rows, columns)``, nan where there is nothing.
      path: of the PNG.
      rows: a label each, from below.
      columns: a label each.
      xlabel: what the columns are.
      ylabel: what the rows are.
      title: above the picture.
      form: of a number in its cell.

    Returns:
      The path.
    """
    values = np.asarray(values, np.float64)
    with _style():
        figure = _figure((1.8 + 0.95 * len(columns), 1.4 + 0.6 * len(rows)))
        axes = figure.subplots()
        picture = axes.imshow(values, cmap="viridis", origin="lower", aspect="auto")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                colour = "white" if value < middle else "black"
                axes.text(column, row, form.format(value), ha="center", va="center", color=colour)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.set_title(title, pad=10)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.colorbar(picture)
        figure.savefig(path, dpi=150)
    return os.fspath(path)


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


def _panel(
    axes: Axes,
    image: np.ndarray,
    heat: np.ndarray | None,
    norm: Normalize,
    query: tuple[int, int],
    shape: tuple[int, int],
    color: str,
) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    picture = image[..., 0] if image.shape[-1] == 1 else image
    if heat is None:
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
    else:
        # The image stays recognisable below the heat, in grey so that colours mean weight alone.
        grey = image.astype(np.float32).mean(-1)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
        heat = _upsample(heat, (height, width))
        axes.imshow(heat, cmap=HEAT, norm=norm, alpha=0.72, extent=extent, interpolation="bilinear")
    y, x = query
    h, w = height / shape[0], width / shape[1]
    for thickness, edge in ((3.0, "black"), (1.6, color)):
        axes.add_patch(Rectangle((x * w, y * h), w, h, fill=False, edgecolor=edge, linewidth=thickness))
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.set_aspect("auto")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(query: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    return min(int(query[0] * height), height - 1), min(int(query[1] * width), width - 1)


def _upsample(heat: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns the map bilinearly resized to at least `shape`, cell centres aligned."""
    for axis, size in enumerate(shape):
        old = heat.shape[axis]
        size = max(size, old)
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        part = (at - low).reshape((-1, 1) if axis == 0 else (1, -1))
        heat = np.take(heat, low, axis) * (1 - part) + np.take(heat, high, axis) * part
    return heat


def _aspect(images: Sequence[np.ndarray]) -> float:
    return max(image.shape[0] / image.shape[1] for image in images)


def _line(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    label: str,
    color: str,
    *,
    scale: float = 1.0,
    dashed: bool = False,
) -> None:
    chosen = [row for row in rows if name in row]
    if not chosen:
        return
    x = [row.get("epoch", row["step"]) for row in chosen]
    y = [scale * row[name] for row in chosen]
    last = next((value for value in reversed(y) if math.isfinite(value)), math.nan)
    form = f"{last:.2f}%" if scale == 100 else f"{last:.4g}"
    axes.plot(
        x,
        y,
        color=color,
        linestyle="--" if dashed else "-",
        linewidth=1.6,
        marker="o" if len(x) < 40 and name.startswith("eval/") else None,
        markersize=3,
        label=f"{label}: {form} at the end" if label else "",
    )


def _figure(size: tuple[float, float], *, constrained: bool = True) -> Figure:
    # Not through pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained" if constrained else None, facecolor="white")


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)
