"""What came out of a sweep, as a tidy table in a CSV or Parquet file, and as cells with mean, spread and confidence."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from aaconv.errors import close_matches
from aaconv.metrics import higher_is_better
from aaconv.sweep import records
from aaconv.sweep.description import Trial, trial_name
from aaconv.sweep.records import FAILED, FINISHED, TRIAL, Status, Sweep

RESULTS = "results.csv"
DIVERGED = "diverged"
STATES = (FINISHED, DIVERGED, FAILED, "eliminated", "paused", "interrupted", "running", "waiting")
"""What a report tells apart, in its order."""
RAN_ON = ("date", "revision", "device", "cpu", "cores", "python", "aaconv", "jax", "jaxlib")
"""Columns of the tidy table about the last attempt, as of `aaconv.bench.report.machine`."""


# The tidy table


def tidy(sweep: Sweep, found: Sequence[Status] | None = None) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the columns and rows of the tidy table: a row a finished trial and metric.

    Columns are the trial, the keys that the sweep overrides, ``seed``, ``metric``, ``value``, ``step`` (completed
    updates), ``parameters``, ``flops`` for one image, ``seconds`` of all attempts, ``attempts``, and `RAN_ON`.

    Args:
      sweep: as of `aaconv.sweep.records.load`.
      found: how its trials stand; by default they are looked at.
    """
    keys = sweep.columns()
    keys += [] if "seed" in keys else ["seed"]
    counts = ("parameters", "flops", "seconds", "attempts")
    rows = []
    for status in finished(sweep, found)[0]:
        trial = status.trial
        ran = records.read_json(sweep.folder(trial) / TRIAL)["attempts"][-1]
        start = {"trial": trial.name, "seed": sweep.base.seed, **sweep.values(trial)}
        rest = {"parameters": trial.parameters, "flops": trial.flops, "seconds": round(status.seconds, 1)}
        rest |= {"attempts": status.attempts, **{name: ran.get(name) for name in RAN_ON}}
        step = int(status.values.get("step", status.step))
        rows += [
            {**start, "metric": metric, "value": value, "step": step, **rest}
            for metric, value in status.values.items()
            if "/" in metric
        ]
    return ["trial", *keys, "metric", "value", "step", *counts, *RAN_ON], rows


def write_results(
    sweep: Sweep, path: str | os.PathLike[str] | None = None, found: Sequence[Status] | None = None
) -> Path:
    """Writes the tidy table.

    Args:
      sweep: as of `aaconv.sweep.records.load`.
      path: of the file, ``.csv`` or ``.parquet``; ``results.csv`` in the sweep's workdir by default. A CSV file has an
        empty field, a Parquet file null, where nothing is known or set.
      found: how its trials stand; by default they are looked at.

    Returns:
      Its path.

    Raises:
      ImportError: Parquet is asked for, and pyarrow is not installed.
      ValueError: it has another ending, or cannot be written.
    """
    path = sweep.workdir / RESULTS if path is None else Path(path)
    check_table(path)
    write = _write_csv if path.suffix == ".csv" else _write_parquet
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside, *tidy(sweep, found))
        beside.replace(path)
    except OSError as error:
        raise ValueError(f"the table {path} cannot be written ({error.strerror}): name another file") from error
    return path


def check_table(path: Path) -> None:
    """Raises what `write_results` would, as far as that is known before anything is written."""
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"the table {path} ends neither in .csv nor in .parquet: name a file that does")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the table {path} cannot be written: the folder {path.parent} is not there, make it first")
    if path.suffix == ".parquet":
        import pyarrow  # noqa: F401


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    cell = lambda value: "" if value is None else str(value).lower() if isinstance(value, bool) else value
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([cell(row[column]) for column in columns] for row in rows)


def _write_parquet(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    numbers = {"value": pyarrow.float64(), "seconds": pyarrow.float64()}
    arrays = {}
    for column in columns:
        values = [list(row[column]) if isinstance(row[column], tuple) else row[column] for row in rows]
        # What has no value at all is text, so that files of several sweeps fit together.
        kind = numbers.get(column) or (pyarrow.string() if all(value is None for value in values) else None)
        arrays[column] = pyarrow.array(values, kind)
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)


# How trials ended


def outcome(status: Status) -> str:
    """Returns a trial's state, which is ``diverged`` where its loss became nan or infinite."""
    if status.state == FAILED and status.error.startswith("NonFiniteLossError"):
        return DIVERGED
    return status.state


def by_outcome(found: Sequence[Status]) -> dict[str, list[Status]]:
    """Groups trials by their `outcome`, in the order of `STATES`; outcomes of no trial are left out."""
    groups: dict[str, list[Status]] = {state: [] for state in STATES}
    for status in found:
        groups.setdefault(outcome(status), []).append(status)
    return {state: group for state, group in groups.items() if group}


def finished(sweep: Sweep, found: Sequence[Status] | None = None) -> tuple[list[Status], list[str]]:
    """Returns the trials whose results are there and belong to the sweep's config, and remarks about the others.

    Args:
      sweep: as of `aaconv.sweep.records.load`.
      found: how its trials stand; by default they are looked at.
    """
    groups = by_outcome(records.statuses(sweep) if found is None else found)
    remarks, good = absent(groups), []
    for status in groups.get(FINISHED, []):
        changed = records.changes_since(sweep, status.trial)
        if changed:
            remarks.append(f"not in the means, {status.trial.name} ran on: {records.spell_changes(changed)}")
        else:
            good.append(status)
    for column in ("revision", "aaconv", "jax", "device", "cpu"):
        seen: dict[str, list[str]] = {}
        for status in good:
            ran = records.read_json(sweep.folder(status.trial) / TRIAL)["attempts"][-1]
            seen.setdefault(str(ran.get(column, "")), []).append(status.trial.name)
        if len(seen) > 1:
            said = [f"{value or 'none'} ran {few(names, 1)}" for value, names in seen.items()]
            remarks.append(f"the trials differ in their {column}: {'; '.join(said)}")
    return good, remarks


def absent(found: Mapping[str, Sequence[Status]]) -> list[str]:
    """Says which trials have no result, by their outcome."""
    return [
        f"not in the means, {state}: {few([status.trial.name for status in group])}"
        for state, group in found.items()
        if state != FINISHED
    ]


def few(names: Sequence[str], most: int = 4) -> str:
    """Returns the first names, which have commas within, and how many more there are."""
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Cells


@dataclasses.dataclass(frozen=True)
class Cell:
    """Trials that differ in their seed alone.

    Attributes:
      values: of the other keys that the sweep overrides.
      trials: one a seed, that have a result.
      results: values of a metric, in the order of `trials`.
      missing: the other trials, which failed, diverged, or are not finished; they are in no number below.
    """

    values: dict[str, Any]
    trials: tuple[Trial, ...]
    results: tuple[float, ...]
    missing: tuple[Trial, ...] = ()

    @property
    def trial(self) -> Trial:
        """The first of them."""
        return (*self.trials, *self.missing)[0]

    @property
    def is_whole(self) -> bool:
        """Whether every seed has a result."""
        return not self.missing

    @property
    def seeds(self) -> str:
        """How many seeds are in the mean, and of how many where some are missing: ``3``, ``2 of 3``."""
        count = len(self.trials)
        return str(count) if self.is_whole else f"{count} of {count + len(self.missing)}"

    @property
    def mean(self) -> float:
        """Over the seeds; nan where a result is not finite, or there is none."""
        return statistics.fmean(self.results) if self._finite() else math.nan

    @property
    def standard_deviation(self) -> float:
        """Of the sample that the seeds are; nan for one."""
        return statistics.stdev(self.results) if len(self.results) > 1 and self._finite() else math.nan

    @property
    def confidence(self) -> float:
        """Half the width of the 95% confidence interval of the mean, by Student's t distribution; nan for one seed."""
        count = len(self.results)
        return t_quantile(count - 1) * self.standard_deviation / math.sqrt(count) if count > 1 else math.nan

    def _finite(self) -> bool:
        return bool(self.results) and all(map(math.isfinite, self.results))


def by_cell(sweep: Sweep) -> dict[str, list[Trial]]:
    """Returns the trials that differ in their seed alone, by the name that the values of the other keys make.

    A trial has the values of the sweep's base where it overrides nothing.
    """
    found: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        found.setdefault(trial_name(sweep.cell(trial)), []).append(trial)
    return found


def t_quantile(degrees_of_freedom: int) -> float:
    """Returns the 97.5% quantile of Student's t distribution.

    Example:
      >>> f"{t_quantile(2):.4f}"
      '4.3027'
    """
    from scipy import special

    return float(special.stdtrit(degrees_of_freedom, 0.975))


def cells(sweep: Sweep, found: Sequence[Status], good: Sequence[Status], metric: str) -> list[Cell]:
    """Groups the trials by all but their seed, in the order of the sweep.

    Args:
      sweep: as of `aaconv.sweep.records.load`.
      found: how its trials stand.
      good: those with results, as of `finished`.
      metric: of the results.

    Returns:
      The cells of which a trial is finished, or failed or diverged while none was eliminated; of others there is
      nothing to say.

    Raises:
      ValueError: no trial has the metric.
    """
    values_of = {status.trial.name: status.values for status in good}
    check_metric(metric, {name for values in values_of.values() for name in values if "/" in name})
    state_of = {status.trial.name: status.state for status in found}
    made = []
    for trials in by_cell(sweep).values():
        states = {state_of[trial.name] for trial in trials}
        if any(trial.name in values_of for trial in trials) or (FAILED in states and "eliminated" not in states):
            known = tuple(trial for trial in trials if metric in values_of.get(trial.name, {}))
            results = tuple(values_of[trial.name][metric] for trial in known)
            missing = tuple(trial for trial in trials if trial not in known)
            made.append(Cell(sweep.cell(trials[0]), known, results, missing))
    return made


def check_metric(metric: str, known: Collection[str]) -> None:
    """Raises a ValueError that lists close names, or all, where a metric is not one of those that are known."""
    if metric not in known:
        near = close_matches(metric, known) or f"; there are {', '.join(sorted(known))}"
        raise ValueError(f"no trial has the metric {metric!r}{near}")


def compared(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells that can be the best: those with a finite mean of all their seeds, or, with none, of some.

    Where a seed failed or diverged, the mean of the others says more of them than of the cell.
    """
    known = [cell for cell in cells if math.isfinite(cell.mean)]
    return [cell for cell in known if cell.is_whole] or known


def best(cells: Sequence[Cell], metric: str) -> Cell | None:
    """Returns the cell of the best mean among those `compared`, the first of equals; None where there is none."""
    sign = 1 if higher_is_better(metric) else -1
    return max(compared(cells), key=lambda cell: sign * cell.mean, default=None)


def in_front(cells: Sequence[Cell], metric: str, cost: Callable[[Cell], float]) -> list[Cell]:
    """Returns the Pareto front: the cells of which no other costs as little and brings as much, but for equals.

    Args:
      cells: as of `cells`.
      metric: theirs, which says whether high or low is better.
      cost: of a cell.

    Returns:
      By ascending cost. Cells that are not `compared` are in no front.
    """
    sign = 1 if higher_is_better(metric) else -1
    front, reached = [], -math.inf
    for cell in sorted(compared(cells), key=lambda cell: (cost(cell), -sign * cell.mean)):
        if sign * cell.mean > reached:
            front.append(cell)
            reached = sign * cell.mean
    return front


def in_percent(metric: str) -> bool:
    """Whether a metric is told in percent."""
    return metric.endswith(("accuracy", "top5"))
