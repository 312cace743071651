"""Which pictures a sweep's results make, from what the sweep varied."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from aaconv import metrics
from aaconv.metrics import higher_is_better
from aaconv.sweep.description import short_key, spell
from aaconv.sweep.records import Sweep
from aaconv.sweep.results import Cell, in_front, in_percent

UNITS = {
    "model.kappa": "share of features",
    "model.upsilon": "share of features",
    "model.attention_ratio": "share of features",
    "batch_size": "images",
}
METRIC_UNITS = {"accuracy": "%", "top5": "%", "loss": "nats", "images_per_sec": "images / s"}
MOST_LINES, MOST_PANELS = 12, 6  # of one picture; panels in a row or a column
FEWEST_FILLED = 0.5  # of the cells of a picture that is worth its space


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that is not drawn yet.

    Attributes:
      name: of its file, without an ending.
      title: what it shows.
      note: how to read it.
      draw: returns the figure in a theme, see `aaconv.plots.png`.
    """

    name: str
    title: str
    note: str
    draw: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Factor:
    """Something that a sweep varied: a key, and those whose values go with it, as of ``--zip``.

    Attributes:
      key: the first of them.
      label: of an axis.
      values: that it has; numbers ascend, None comes last.
      is_number: whether it can be an axis.
    """

    key: str
    label: str
    values: tuple[Any, ...]
    is_number: bool

    @property
    def name(self) -> str:
        """For legends and titles of panels."""
        return self.label.partition(" (")[0]

    @property
    def numbers(self) -> list[float]:
        """The values without None."""
        return [value for value in self.values if value is not None]

    def spell(self, cell: Cell) -> str:
        """Returns a cell's value."""
        return spell(cell.values[self.key])


def factors(cells: Sequence[Cell]) -> list[Factor]:
    """Returns what differs between cells: numbers first, then the rest, each in the order of the table."""
    keys = [key for key in cells[0].values if len({repr(cell.values[key]) for cell in cells}) > 1]
    values_of = {key: [cell.values[key] for cell in cells] for key in keys}
    numbers = {key for key in keys if _are_numbers(values_of[key])}
    together: list[list[str]] = []
    for key in sorted(keys, key=lambda key: key not in numbers):
        for tied in together:
            if _tied(values_of[key], values_of[tied[0]], key in numbers and tied[0] in numbers):
                tied.append(key)
                break
        else:
            together.append([key])
    found = []
    for first, *others in together:
        distinct = list(dict.fromkeys(values_of[first]))
        if first in numbers:
            distinct.sort(key=lambda value: (value is None, value))
        same = [key for key in others if values_of[key] == values_of[first]]
        label = " = ".join(map(short_key, [first, *same]))
        said = [short_key(key) for key in others if key not in same]
        said = [UNITS[first], *said] if first in UNITS else said
        found.append(
            Factor(first, f"{label} ({', with '.join(said)})" if said else label, tuple(distinct), first in numbers)
        )
    return found


def _are_numbers(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return len(set(known)) > 1 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in known)


def _tied(one: Sequence[Any], other: Sequence[Any], numbers: bool) -> bool:
    """Whether a value of either says the value of the other; of two numbers, whether they rise or fall together."""
    pairs = {(repr(a), repr(b)): (a, b) for a, b in zip(one, other, strict=True)}
    if not len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
        return False
    if not numbers:
        return True
    # Drawn at random, each value of one also says that of the other, and they have nothing to do with each other.
    at = sorted(pair for pair in pairs.values() if None not in pair)
    rises = {b > a for (_, a), (_, b) in itertools.pairwise(at)}
    return len(rises) == 1


def pictures(sweep: Sweep, cells: Sequence[Cell], metric: str) -> list[Picture]:
    """Returns the pictures that make sense for a metric of a sweep.

    The metric against each number that was set, over two of them as a heat map, against parameters and FLOPs, and while
    training. What else was set takes colours, then panels in rows and columns.

    Args:
      sweep: of the cells.
      cells: as of `aaconv.sweep.results.cells`.
      metric: theirs.
    """
    known = [cell for cell in cells if math.isfinite(cell.mean)]
    varied = factors(known) if known else []
    numbers = [factor for factor in varied if factor.is_number]
    found = [_against(known, metric, factor) for factor in varied]
    found += [_over(known, metric, numbers, varied), _against_cost(known, metric, varied)]
    logs = {trial.name: metrics.read_rows(sweep.folder(trial)) for cell in known for trial in cell.trials}
    curves = [metric, "train/loss"] if metric.startswith("eval/") else [metric]
    found += [_while_training(logs, known, name, varied) for name in curves]
    return [picture for picture in found if picture is not None]


@dataclasses.dataclass(frozen=True)
class _Arrangement:
    """What lines, columns and rows of panels stand for; None: there is one."""

    line: Factor | None = None
    column: Factor | None = None
    row: Factor | None = None

    def place(self, cell: Cell) -> tuple[str, str]:
        """Returns the titles of the row and the column that a cell belongs to."""
        title = lambda factor: f"{factor.name} = {factor.spell(cell)}" if factor else ""
        return title(self.row), title(self.column)

    def titles(self, factor: Factor | None) -> list[str]:
        """Returns the titles of the rows or columns of a factor."""
        return [f"{factor.name} = {spell(value)}" for value in factor.values] if factor else [""]

    def name(self, cell: Cell) -> str:
        """Returns the name of the line that a cell belongs to."""
        return self.line.spell(cell) if self.line else ""


def _arranged(others: Sequence[Factor], *, lines: bool = True) -> _Arrangement | None:
    """Gives each factor its place: fractions get the colours, for they have the most to say side by side.

    Returns:
      The arrangement; None where there are too many factors, or values, for a picture that can be read.
    """
    is_fraction = lambda factor: factor.is_number and any(value % 1 for value in factor.numbers)
    ranked = sorted(others, key=lambda factor: (not is_fraction(factor), -len(factor.values)))
    places: list[Factor | None] = [None] * (not lines) + ranked
    if len(places) > 3:
        return None
    line, column, row = [*places, None, None, None][:3]
    if line and len(line.values) > MOST_LINES or any(f and len(f.values) > MOST_PANELS for f in (column, row)):
        return None
    return _Arrangement(line, column, row)


def _lines_of(factor: Factor | None) -> Any:
    from aaconv.plots import sweeps

    if factor is None:
        return sweeps.Lines()
    return sweeps.Lines([spell(value) for value in factor.values], factor.name, factor.is_number)


def _panels(arrangement: _Arrangement, contents: dict[tuple[str, str], Any]) -> Any:
    from aaconv.plots import sweeps

    return sweeps.Panels(contents, arrangement.titles(arrangement.row), arrangement.titles(arrangement.column))


def _against(cells: Sequence[Cell], metric: str, factor: Factor) -> Picture | None:
    from aaconv.plots import sweeps

    if factor.is_number:
        cells = [cell for cell in cells if cell.values[factor.key] is not None]
    names = () if factor.is_number else [spell(value) for value in factor.values]
    scale = 100 if in_percent(metric) else 1
    arrangement = _arranged([other for other in factors(cells) if other.key != factor.key])
    series = len({(arrangement.place(cell), arrangement.name(cell)) for cell in cells}) if arrangement else len(cells)
    joined = factor.is_number
    title = f"{metric} against {factor.name}"
    if len(cells) < 2 * series or len(names) > MOST_LINES:
        alone = _differing_in(factor, cells)
        if len(alone) > 2 and len(names) <= MOST_LINES:
            # Varied at one cell of the others: these are a line, which the rest would only hide.
            title += f" where {cell_name(alone[0], [other for other in factors(cells) if other.key != factor.key])}"
            cells, arrangement = alone, _Arrangement()
        elif not factor.is_number or len(factor.numbers) < max(4, len(cells) / 2):
            return None
        else:
            # Hardly two cells differ in this alone: drawn at random. Dots say what a line cannot.
            arrangement, joined = _Arrangement(), False
    assert arrangement is not None
    at = lambda cell: names.index(factor.spell(cell)) if names else cell.values[factor.key]
    contents: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for cell in sorted(cells, key=at):
        several = [scale * result for result in cell.results]
        point = sweeps.Point(at(cell), several, scale * cell.confidence, cell.is_whole)
        contents.setdefault(arrangement.place(cell), {}).setdefault(arrangement.name(cell), []).append(point)
    if len(contents) < FEWEST_FILLED * _number_of_panels(arrangement):
        return None
    many = any(len(cell.results) > 1 for cell in cells)
    return Picture(
        f"{file_name(metric)}_against_{file_name(factor.key)}",
        title,
        _explained(many, "Line: mean over seeds" if joined else "Mark: mean over seeds") + _lacking(cells, "Hollow"),
        partial(
            sweeps.against,
            _panels(arrangement, contents),
            lines=_lines_of(arrangement.line),
            xlabel=factor.label,
            ylabel=metric_label(metric),
            names=names,
            joined=joined,
            bounds=_bounds(metric),
        ),
    )


def _differing_in(factor: Factor, cells: Sequence[Cell]) -> list[Cell]:
    """Returns the most cells that differ in one factor alone, the first such of equals."""
    others = [other for other in factors(cells) if other.key != factor.key]
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        alike.setdefault(tuple(other.spell(cell) for other in others), []).append(cell)
    return max(alike.values(), key=len)


def _explained(many: bool, start: str) -> str:
    if not many:
        return "A dot a trial; one seed a cell, so there is no spread to show."
    return f"{start}; dots: trials; bars: 95% interval of the mean, cut where it is far wider than the results."


def _bounds(metric: str) -> tuple[float, float]:
    return (0.0, 100.0) if in_percent(metric) else (-math.inf, math.inf)


def _lacking(cells: Sequence[Cell], mark: str) -> str:
    """Returns the sentence that explains how cells are marked that lack seeds; "" where there are none."""
    if all(cell.is_whole for cell in cells):
        return ""
    return f" {mark}: results of some seeds are missing, for they failed, diverged or are not finished."


def _number_of_panels(arrangement: _Arrangement) -> int:
    return len(arrangement.titles(arrangement.row)) * len(arrangement.titles(arrangement.column))


def _over(cells: Sequence[Cell], metric: str, numbers: Sequence[Factor], varied: Sequence[Factor]) -> Picture | None:
    from aaconv.plots import sweeps

    if len(numbers) < 2:
        return None
    # Two fractions, such as kappa and upsilon, rather than a fraction and a count.
    is_fraction = lambda factor: any(value % 1 for value in factor.numbers)
    chosen = sorted(numbers, key=lambda factor: (not is_fraction(factor), -len(factor.numbers)))[:2]
    across, up = sorted(chosen, key=numbers.index)
    arrangement = _arranged([factor for factor in varied if factor not in chosen], lines=False)
    if arrangement is None:
        return None
    scale = 100 if in_percent(metric) else 1
    contents: dict[tuple[str, str], np.ndarray] = {}
    notes: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
    for cell in cells:
        x, y = cell.values[across.key], cell.values[up.key]
        if x is not None and y is not None:
            empty = np.full((len(up.numbers), len(across.numbers)), math.nan)
            table = contents.setdefault(arrangement.place(cell), empty)
            at = up.numbers.index(y), across.numbers.index(x)
            table[at] = scale * cell.mean
            if not cell.is_whole:
                notes.setdefault(arrangement.place(cell), {})[at] = cell.seeds
    filled = sum(int(np.isfinite(table).sum()) for table in contents.values())
    if filled < FEWEST_FILLED * _number_of_panels(arrangement) * len(up.numbers) * len(across.numbers):
        return None
    return Picture(
        f"{file_name(metric)}_over_{file_name(across.key)}_and_{file_name(up.key)}",
        f"{metric} over {across.name} and {up.name}",
        "Means over seeds; the lightest is the best." + _lacking(cells, "With a count, or hatched"),
        partial(
            sweeps.heat_maps,
            _panels(arrangement, contents),
            up=[f"{value:g}" for value in up.numbers],
            across=[f"{value:g}" for value in across.numbers],
            xlabel=across.label,
            ylabel=up.label,
            label=metric_label(metric),
            form="{:.2f}" if scale == 100 else "{:.4g}",
            higher_is_better=higher_is_better(metric),
            notes=notes,
        ),
    )


def _against_cost(cells: Sequence[Cell], metric: str, varied: Sequence[Factor]) -> Picture | None:
    from aaconv.plots import sweeps

    scale = 100 if in_percent(metric) else 1
    costs: dict[str, Callable[[Cell], float]] = {
        "parameters": lambda cell: cell.trial.parameters,
        "FLOPs for one image": lambda cell: cell.trial.flops,
    }
    costs = {name: cost for name, cost in costs.items() if len({cost(cell) for cell in cells}) > 1}
    if not costs:
        return None
    fronts = {name: in_front(cells, metric, cost) for name, cost in costs.items()}
    first = next(iter(costs.values()))
    named = sorted({id(cell): cell for front in fronts.values() for cell in front}.values(), key=first)
    numbers = {id(cell): number for number, cell in enumerate(named, 1)}
    panels = {}
    for name, cost in costs.items():
        size, prefix = _prefix(max(map(cost, cells)))
        ahead = {id(cell) for cell in fronts[name]}
        panels[f"{prefix}{name}" if name.startswith("F") else f"{name}{prefix and f' ({prefix})'}"] = [
            sweeps.Cost(
                cost(cell) / size,
                scale * cell.mean,
                scale * cell.confidence,
                numbers.get(id(cell), 0),
                id(cell) in ahead,
                cell.is_whole,
            )
            for cell in cells
        ]
    return Picture(
        f"{file_name(metric)}_against_cost",
        f"{metric} against {' and '.join(name.partition(' ')[0] for name in costs)}",
        "A dot a cell, its mean. Numbered: the Pareto front, where nothing else brings as much for as little."
        + _lacking(cells, "Hollow, and in no front" if any(cell.is_whole for cell in cells) else "Hollow"),
        partial(
            sweeps.fronts,
            panels,
            ylabel=metric_label(metric),
            names={numbers[id(cell)]: cell_name(cell, varied) for cell in named},
            bounds=_bounds(metric),
        ),
    )


def _prefix(most: float) -> tuple[float, str]:
    """Returns the power of 1000 below a number, and its prefix."""
    return next(((size, letter) for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if most >= size), (1.0, ""))


def _while_training(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], cells: Sequence[Cell], metric: str, varied: Sequence[Factor]
) -> Picture | None:
    from aaconv.plots import sweeps

    axis = "epoch" if all("epoch" in row for rows in logs.values() for row in rows) else "step"
    curves = {id(cell): _curve([logs[trial.name] for trial in cell.trials], metric, axis) for cell in cells}
    known = [cell for cell in cells if curves[id(cell)] is not None]
    if not known:
        return None
    arrangement = _arranged(varied)
    if arrangement is not None and len(known) >= 2 * _number_of_panels(arrangement) or len(known) == 1:
        arrangement = arrangement or _Arrangement()
        lines, name = _lines_of(arrangement.line), arrangement.name
    elif len(known) <= MOST_LINES:  # a panel a line would say less than all lines in one
        arrangement, name = _Arrangement(), lambda cell: cell_name(cell, varied)
        lines = sweeps.Lines([name(cell) for cell in known])
    else:
        return None
    contents: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in known:
        contents.setdefault(arrangement.place(cell), {})[name(cell)] = curves[id(cell)]
    lacking = {(arrangement.place(cell), name(cell)) for cell in known if not cell.is_whole}
    if len(contents) < FEWEST_FILLED * _number_of_panels(arrangement):
        return None
    many = any(len(cell.results) > 1 for cell in known)
    few = any(len(panel) <= sweeps.MOST_SHADED for panel in contents.values())
    shade = "; shade: from the lowest to the highest seed" if few else ""
    return Picture(
        f"{file_name(metric)}_while_training",
        f"{metric} while training",
        (f"Line: mean over seeds{shade}." if many else "A line a cell, of one seed.") + _lacking(known, "Dashed"),
        partial(
            sweeps.learning,
            _panels(arrangement, contents),
            lines=lines,
            xlabel=axis,
            ylabel=metric_label(metric),
            lacking=lacking,
        ),
    )


def _curve(logs: Sequence[Sequence[Mapping[str, Any]]], metric: str, axis: str) -> np.ndarray | None:
    """Returns ``(4, n)``: epoch or step, mean, lowest and highest over the seeds; None where that is but a point."""
    runs = [{row["step"]: row for row in rows if metric in row} for rows in logs]
    steps = sorted(set.intersection(*map(set, runs)))
    if len(steps) < 2:
        return None
    scale = 100 if in_percent(metric) else 1
    values = scale * np.array([[run[step][metric] for step in steps] for run in runs], np.float64)
    return np.stack([[runs[0][step][axis] for step in steps], values.mean(0), values.min(0), values.max(0)])


def cell_name(cell: Cell, varied: Sequence[Factor]) -> str:
    """Returns what tells a cell from the others."""
    return ", ".join(f"{factor.name.replace(' ', '')}={factor.spell(cell)}" for factor in varied) or "all trials"


def metric_label(metric: str) -> str:
    """Returns a metric with its unit, where that is known."""
    unit = METRIC_UNITS.get(metric.rpartition("/")[2])
    return f"{metric} ({unit})" if unit else metric


def file_name(name: str) -> str:
    """Returns a metric or a key as a part of a file's name."""
    return name.replace("/", "_").replace(".", "_")
