"""What all pictures have in common: colours, type, size, and how they are saved."""

from __future__ import annotations

import dataclasses
import io
import os
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aaconv import workdirs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = "#333333", "#e6e6e6"


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    Attributes:
      ink: text.
      edge: axes.
      grid: behind the data.
      paper: below the picture; "none" lets a page show through.
      muted: what stands in the background.
      lines: one a name, to be told apart by eyes that see no red, no green or no blue.
      ramp: the part of the map `RAMP` that numbers in a row get, each of 0 to 1.
    """

    ink: str
    edge: str
    grid: str
    paper: str
    muted: str
    lines: tuple[str, ...]
    ramp: tuple[float, float]


# After the palette of Okabe and Ito (2008), darker on white and lighter on black.
LIGHT = Theme(
    INK,
    "#999999",
    GRID,
    "white",
    "#9aa3ad",
    ("#0072b2", "#d55e00", "#00875f", "#b5528f", "#b8860b", "#2f8fc6", "#111111"),
    (0.0, 0.78),
)
DARK = Theme(
    "#e4e4e4",
    "#8a8f98",
    "#31363f",
    "none",
    "#79818c",
    ("#56b4e9", "#ff8b3d", "#2ecc9b", "#e59ac6", "#f0c419", "#9ad1f5", "#ffffff"),
    (0.42, 1.0),
)
RAMP = "viridis"
MARKERS = "osD^vPX*"


def check_installed() -> None:
    """Raises ImportError now rather than after what is to be drawn was computed."""
    import matplotlib  # noqa: F401


def figure(size: tuple[float, float], *, constrained: bool = True) -> Figure:
    """Returns a figure of `size` in inches."""
    # Not through pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained" if constrained else None)


def styled(theme: Theme = LIGHT) -> Any:
    """Returns a context in which figures look alike."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.size": 9,
            "text.parse_math": False,  # a folder's name may hold dollars
            "figure.facecolor": theme.paper,
            "savefig.facecolor": theme.paper,
            "axes.facecolor": theme.paper,
            "axes.edgecolor": theme.edge,
            "axes.labelcolor": theme.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "grid.color": theme.grid,
            "text.color": theme.ink,
            "xtick.color": theme.ink,
            "ytick.color": theme.ink,
            "legend.frameon": False,
            "svg.hashsalt": "aaconv",  # the same picture is the same text
        }
    )


def save(figure: Figure, path: str | os.PathLike[str]) -> str:
    """Writes a figure as PNG and returns the path."""
    if workdirs.in_bucket(path):
        with workdirs.path(path).open("wb") as file:
            figure.savefig(file, dpi=150, format="png")
    else:
        figure.savefig(path, dpi=150)
    return os.fspath(path)


def png(draw: Callable[[Theme], Figure], path: str | os.PathLike[str], *, title: str = "") -> str:
    """Draws on white and writes a PNG.

    Args:
      draw: returns the figure, such as `functools.partial(aaconv.plots.sweeps.against, panels, ...)`.
      path: of the PNG.
      title: above the picture.

    Returns:
      The path.
    """
    with styled():
        drawn = draw(LIGHT)
        if title:
            width = max(20, int(11 * drawn.get_figwidth()))  # about eleven bold characters an inch
            drawn.suptitle(textwrap.fill(title, width), x=0.01, ha="left", fontsize=10, fontweight="bold")
        return save(drawn, path)


def svg(draw: Callable[[Theme], Figure], *, dark: bool = False) -> str:
    """Draws for a page, whose paper shows through, and returns the SVG.

    Args:
      draw: as for `png`.
      dark: whether the page is dark.
    """
    theme = DARK if dark else dataclasses.replace(LIGHT, paper="none")
    buffer = io.StringIO()
    with styled(theme):
        draw(theme).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
