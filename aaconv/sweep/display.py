"""How a sweep that runs is shown: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from aaconv.metrics import duration, higher_is_better
from aaconv.sweep import records
from aaconv.sweep.records import HALVING, Status, Sweep

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES = {
    "finished": "green",
    "running": "bold",
    "failed": "red",
    "paused": "cyan",
    "eliminated": "dim",
    "interrupted": "yellow",
    "waiting": "dim",
}
STATES = tuple(STYLES)
LOOK_SECONDS = 1.0
ROWS = 20
ERROR_WIDTH = 60  # characters of a line of an error in a table; the report has all of it


def summary(sweep: Sweep, found: Sequence[Status], most_running: int = 1) -> str:
    """Says in a line how many trials are where, which is the best so far, and how long the rest takes.

    Of a sweep that is halved the last is not said: most of what is left will never be run.

    Args:
      sweep: whose.
      found: as of `aaconv.sweep.records.statuses`.
      most_running: trials that were seen running at a time; one that has just ended leaves its place to the next.
    """
    counts = {state: sum(status.state == state for status in found) for state in STATES}
    parts = [f"{counts['finished']}/{len(found)} finished"]
    parts += [f"{count} {state}" for state, count in counts.items() if count and state != "finished"]
    best = best_of(sweep, found)
    if best is not None:
        parts.append(f"best {sweep.metric} {spell_metric(sweep.metric, best.values[sweep.metric])} {best.trial.name}")
    left = None if (sweep.workdir / HALVING).exists() else seconds_left(found, most_running)
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)


def best_of(sweep: Sweep, found: Sequence[Status]) -> Status | None:
    """Returns the finished trial with the best metric, the first of equals; None without any."""
    known = [s for s in found if s.state == "finished" and math.isfinite(s.values.get(sweep.metric, math.nan))]
    sign = 1 if higher_is_better(sweep.metric) else -1
    return max(known, key=lambda status: sign * status.values[sweep.metric], default=None)


def seconds_left(found: Sequence[Status], most_running: int = 1) -> float | None:
    """Estimates when the sweep ends: what is missing takes as long as what is done, on as many processes.

    Args:
      found: as of `aaconv.sweep.records.statuses`.
      most_running: as of `summary`.

    Returns:
      Seconds; None where nothing runs, or too little is done to say.
    """
    share = lambda s: 1.0 if s.state == "finished" else s.step / s.total_steps if s.total_steps else 0.0
    running = [s for s in found if s.state == "running"]
    left = [s for s in found if s.state not in ("failed", "eliminated")]
    known = [s for s in found if share(s) > 0.05]  # before, compiling is most of the time
    done = sum(map(share, known))
    if not running or not done:
        return None
    each = sum(s.seconds for s in known) / done
    return each * sum(1 - share(s) for s in left) / max(len(running), min(most_running, len(left)))


def table(sweep: Sweep, found: Sequence[Status], *, rows: int | None = None) -> RenderableType:
    """Returns a table of trials with the `summary` below it.

    Args:
      sweep: whose.
      found: as of `aaconv.sweep.records.statuses`.
      rows: at most so many, those that run and failed before the others; None: all.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("trial", overflow="fold")
    grid.add_column("", no_wrap=True)
    again = any(status.attempts > 1 for status in found)
    for name in ("step", sweep.metric, "time", *(["attempts"] if again else [])):
        grid.add_column(name, justify="right", no_wrap=True)
    if any(status.error for status in found):
        grid.add_column("error", overflow="ellipsis", no_wrap=True, max_width=ERROR_WIDTH)
    shown = list(found)
    if rows is not None and len(shown) > rows:
        urgency = {
            "running": 0,
            "failed": 1,
            "finished": 2,
            "paused": 3,
            "interrupted": 4,
            "waiting": 5,
            "eliminated": 6,
        }
        few = sorted(range(len(found)), key=lambda i: (urgency[found[i].state], -i))[:rows]
        shown = [found[i] for i in sorted(few)]
    for s in shown:
        value = s.values.get(sweep.metric)
        grid.add_row(
            Text(s.trial.name),
            Text(s.state, STYLES[s.state]),
            f"{s.step}/{s.total_steps}" if s.total_steps else "",
            "" if value is None else spell_metric(sweep.metric, value),
            duration(s.seconds) if s.attempts else "",
            *([str(s.attempts) if s.attempts else ""] if again else []),
            *([Text(s.error.splitlines()[-1], "red")] if s.error else []),
        )
    more = [Text(f"and {len(found) - len(shown)} more", "dim")] if len(shown) < len(found) else []
    return Group(grid, *more, Text(summary(sweep, found)))


def event(sweep: Sweep, status: Status) -> str:
    """Says in a line what a trial does now."""
    value = status.values.get(sweep.metric)
    parts = [f"{status.state} {status.trial.name}"]
    if status.state == "running":
        parts[0] = f"started {status.trial.name}"
        parts += [f"attempt {status.attempts}"] if status.attempts > 1 else []
    elif value is not None:
        parts.append(f"{sweep.metric} {spell_metric(sweep.metric, value)}")
    if status.state in ("finished", "failed"):
        parts.append(duration(status.seconds))
    if status.error:
        parts.append(status.error.splitlines()[-1])
    return "  ".join(parts)


@contextlib.contextmanager
def displayed(sweep: Sweep, stream: IO[str] | None = None) -> Iterator[None]:
    """Shows how a sweep goes for the time of the context: what its workdir says, whoever runs the trials.

    Args:
      sweep: which.
      stream: standard error by default; a terminal gets a table, anything else lines.
    """
    to: Any = stream or sys.stderr
    with _live(sweep, to) if to.isatty() else _lines(sweep, to):
        yield


@contextlib.contextmanager
def _live(sweep: Sweep, stream: IO[str]) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live

    def render() -> RenderableType:
        return table(sweep, records.statuses(sweep), rows=ROWS)

    console = Console(file=stream, highlight=False)
    with Live(get_renderable=render, console=console, refresh_per_second=1 / LOOK_SECONDS):
        yield


@contextlib.contextmanager
def _lines(sweep: Sweep, stream: IO[str]) -> Iterator[None]:
    ended = threading.Event()
    before = {status.trial.name: (status.state, status.attempts) for status in records.statuses(sweep)}
    most_running = 1

    def look() -> None:
        nonlocal most_running
        found = records.statuses(sweep)
        most_running = max(most_running, sum(status.state == "running" for status in found))
        for status in found:
            if before[status.trial.name] != (status.state, status.attempts):
                before[status.trial.name] = (status.state, status.attempts)
                line = event(sweep, status)
                if status.state != "running":
                    line += f"  [{summary(sweep, found, most_running)}]"
                print(line, file=stream, flush=True)

    thread = _repeat(look, ended)
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def _repeat(look: Callable[[], Any], ended: threading.Event) -> threading.Thread:
    def loop() -> None:
        while not ended.wait(LOOK_SECONDS):
            look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def spell_metric(name: str, value: float) -> str:
    """Returns a value as tables show it: accuracies in percent."""
    return f"{value:.2%}" if name.endswith(("accuracy", "top5")) else f"{value:.4g}"
