"""The curves of a run, and where a network looks."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aaconv.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

TRAIN, TEST = "#4c78a8", "#e4572e"
HEAT = "inferno"
MARKS = ("#00c2d1", "#ff4fa3", "#7bd63b", "#ffb000", "#b48cff", "#ffffff")  # one a query; seen on dark and light
QUERIES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))


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
    with style.styled():
        figure = style.figure((7.2, 7.0))
        loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
        _line(loss, rows, "train/loss", "training", TRAIN)
        _line(loss, rows, "eval/loss", "test", TEST)
        _line(accuracy, rows, "train/accuracy", "training", TRAIN, scale=100)
        _line(accuracy, rows, "eval/accuracy", "test", TEST, scale=100)
        if len({row["eval/top5"] for row in rows if "eval/top5" in row} - {1.0}) > 1:
            _line(accuracy, rows, "eval/top5", "test, among the first five", TEST, scale=100, dashed=True)
        _line(rate, rows, "optim/learning_rate", "", style.INK)
        loss.set(ylabel="loss (nats)")
        accuracy.set(ylabel="accuracy (%)")
        rate.set(ylabel="learning rate", xlabel="epoch" if by_epoch else "step")
        for axes in (loss, accuracy, rate):
            axes.grid(color=style.GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(loc="best")
        rate.set_ylim(bottom=0)
        loss.set_title(title, pad=10)
        figure.align_ylabels()
        return style.save(figure, path)


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

    with style.styled():
        figure = style.figure(size, constrained=False)
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
        return style.save(figure, path)


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
