"""What the commands print: pairs, tables, numbers, and remarks on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def say(text: str) -> None:
    """Prints a line of progress, or a remark."""
    print(text, file=sys.stderr, flush=True)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints results, a name and a value a line."""
    for name, value in pairs:
        print(f"{name:15} {value}")


def spoken_metrics(values: dict[str, float], split: str) -> list[tuple[str, str]]:
    """Returns an evaluation's metrics, by ``eval/NAME``, as pairs to print."""
    forms = {"accuracy": "{:.2%}", "top5": "{:.2%}", "loss": "{:.4f}"}
    return [
        (f"{split} {name.replace('top5', 'top-5')}", form.format(values[f"eval/{name}"]))
        for name, form in forms.items()
        if f"eval/{name}" in values
    ]


def percent(share: Any) -> str:
    return f"{100 * float(share):.1f}%"


def size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def make_table(*columns: str, text: int = 2) -> Table:
    """Returns a table whose first `text` columns are words and the others numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        # Where the terminal is narrow the first column folds; a number is never broken.
        table.add_column(
            name,
            justify="left" if index < text else "right",
            no_wrap=index > 0,
            overflow="fold" if index == 0 else "ellipsis",
        )
    return table


def make_console() -> Console:
    """Returns standard output, for tables and styles."""
    from rich.console import Console

    # A file or a pipe has no width: whatever reads it wants whole lines.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=1000)
