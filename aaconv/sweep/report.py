"""What came out of a sweep: a tidy CSV file, and a table with mean, spread and confidence over seeds."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aaconv.errors import close_matches
from aaconv.sweep import records
from aaconv.sweep.description import Trial, short_key, spell
from aaconv.sweep.records import TRIAL, Status, Sweep

RESULTS, REPORT = "results.csv", "report.md"
RAN_ON = ("date", "revision", "device", "cpu", "cores", "python", "aaconv", "jax", "jaxlib")
"""Columns of ``results.csv`` about the last attempt, as of `aaconv.bench.report.machine`."""


def write_results(sweep: Sweep) -> Path:
    """Writes ``results.csv``: a row a finished trial and metric; overrides, counts and what it ran on are columns.

    Returns:
      Its path.
    """
    columns = sweep.columns()
    seed = [] if "seed" in columns else ["seed"]
    header = [
        "trial",
        *columns,
        *seed,
        "metric",
        "value",
        "step",
        "parameters",
        "flops",
        "seconds",
        "attempts",
        *RAN_ON,
    ]
    path = sweep.workdir / RESULTS
    beside = path.with_name(f".{RESULTS}.{os.getpid()}")
    with beside.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for status in finished(sweep)[0]:
            trial = status.trial
            ran = records.read_json(sweep.folder(trial) / TRIAL)["attempts"][-1]
            where = [ran.get(column, "") for column in RAN_ON]
            swept = [_cell(value) for value in sweep.values(trial).values()]
            start = [trial.name, *swept, *([sweep.base.seed] if seed else [])]
            for metric, value in status.values.items():
                if "/" in metric:
                    row = [metric, value, status.step, trial.parameters, trial.flops, f"{status.seconds:.1f}"]
                    writer.writerow([*start, *row, status.attempts, *where])
    beside.replace(path)
    return path


def _cell(value: Any) -> Any:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


def finished(sweep: Sweep) -> tuple[list[Status], list[str]]:
    """Returns the trials whose results are there and belong to the sweep's config, and remarks about the others."""
    found = records.statuses(sweep)
    remarks, good = [], []
    for state in ("running", "failed", "interrupted", "waiting"):
        missing = [status.trial.name for status in found if status.state == state]
        if missing:
            remarks.append(f"not in the table, {state}: {_few(missing)}")
    for status in found:
        if status.state == "finished":
            changed = records.changes_since(sweep, status.trial)
            if changed:
                remarks.append(f"not in the table, {status.trial.name} ran on: {records.spell_changes(changed)}")
            else:
                good.append(status)
    for column in ("revision", "aaconv", "jax", "device", "cpu"):
        seen: dict[str, list[str]] = {}
        for status in good:
            ran = records.read_json(sweep.folder(status.trial) / TRIAL)["attempts"][-1]
            seen.setdefault(str(ran.get(column, "")), []).append(status.trial.name)
        if len(seen) > 1:
            said = "; ".join(f"{value or 'none'}: {_few(names)}" for value, names in seen.items())
            remarks.append(f"the trials differ in their {column}: {said}")
    return good, remarks


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclasses.dataclass(frozen=True)
class Group:
    """Trials that differ in their seed alone.

    Attributes:
      values: of the other keys that the sweep overrides.
      trial: the first of them.
      results: values of a metric, one a seed.
    """

    values: dict[str, Any]
    trial: Trial
    results: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.results)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; nan for one."""
        return statistics.stdev(self.results) if len(self.results) > 1 and self._finite() else math.nan

    @property
    def confidence(self) -> float:
        """Half the width of the 95% confidence interval of the mean, by Student's t distribution; nan for one seed."""
        return t_quantile(len(self.results) - 1) * self.deviation / math.sqrt(len(self.results))

    def _finite(self) -> bool:
        return all(map(math.isfinite, self.results))


def t_quantile(freedom: int) -> float:
    """Returns the 97.5% quantile of Student's t distribution, nan for no degree of freedom.

    Example:
      >>> f"{t_quantile(2):.4f}"
      '4.3027'
    """
    from scipy import special

    return float(special.stdtrit(freedom, 0.975)) if freedom > 0 else math.nan


def groups(sweep: Sweep, found: Sequence[Status], metric: str) -> list[Group]:
    """Groups finished trials by all but their seed, in the order of the sweep.

    Raises:
      ValueError: no trial has the metric.
    """
    together: dict[str, tuple[dict[str, Any], Trial, list[float]]] = {}
    for status in found:
        if metric in status.values:
            values = {key: value for key, value in sweep.values(status.trial).items() if key != "seed"}
            together.setdefault(repr(values), (values, status.trial, []))[2].append(status.values[metric])
    if not together:
        known = sorted({name for status in found for name in status.values if "/" in name})
        near = close_matches(metric, known) or f"; there are {', '.join(known)}"
        raise ValueError(f"no trial has the metric {metric!r}{near}")
    return [Group(values, trial, tuple(results)) for values, trial, results in together.values()]


def table(sweep: Sweep, found: Sequence[Status], metric: str) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a metric's table; accuracies are in percent."""
    rows = groups(sweep, found, metric)
    keys = list(rows[0].values)
    percent = _in_percent(metric)
    spoken = lambda x: "–" if math.isnan(x) else f"{100 * x:.2f}" if percent else f"{x:.4g}"
    header = [*map(short_key, keys), "seeds", f"{metric}{' (%)' if percent else ''}", "deviation", "95% interval"]
    lines = []
    for row in rows:
        low, high = spoken(row.mean - row.confidence), spoken(row.mean + row.confidence)
        interval = "–" if math.isnan(row.confidence) else f"{low} to {high}"
        numbers = [str(len(row.results)), spoken(row.mean), spoken(row.deviation), interval]
        counts = [f"{row.trial.parameters:,}", f"{row.trial.flops / 1e6:,.2f}"]
        lines.append([*(spell(row.values[key]) for key in keys), *numbers, *counts])
    return [*header, "parameters", "MFLOPs"], lines


def write_report(sweep: Sweep, metrics: Sequence[str] = ()) -> tuple[Path, str, list[Path] | None]:
    """Writes ``results.csv``, ``report.md`` and, where matplotlib is installed, pictures.

    Args:
      sweep: as of `aaconv.sweep.records.load`.
      metrics: a table each; by default the sweep's own.

    Returns:
      The path of the report, its text, and the pictures' paths; None for these without matplotlib.

    Raises:
      ValueError: no trial is finished, or none has the metric.
    """
    good, remarks = finished(sweep)
    if not good:
        why = "; ".join(remarks)
        raise ValueError(
            f"no trial of {sweep.workdir} is finished ({why}): run the sweep first, `aaconv sweep status --workdir "
            f"{sweep.workdir}` says how it goes"
        )
    parts = [f"# {sweep.base.model.name} on {sweep.base.data.name}: {len(good)} of {len(sweep.trials)} trials"]
    metrics = metrics or [sweep.metric]
    for metric in metrics:
        parts.append(markdown(*table(sweep, good, metric)))
    ran = records.read_json(sweep.folder(good[0].trial) / TRIAL)["attempts"][-1]
    versions = ", ".join(f"{name} {ran[name]}" for name in ("python", "jax", "jaxlib") if ran.get(name))
    seconds = sum(status.seconds for status in good)
    parts.append(
        "Interval: of the mean, by Student's t distribution over the seeds.  \n"
        f"Ran on {ran.get('device', '?')}, {ran.get('cores', '?')} threads a trial, {seconds:,.0f} s in all; "
        f"{versions}; "
        f"revision {ran.get('revision') or ran.get('aaconv', '?')}, {ran.get('date', '?')}."
    )
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    text = "\n\n".join(parts) + "\n"
    write_results(sweep)
    path = sweep.workdir / REPORT
    path.write_text(text)
    try:
        pictures = [picture for metric in metrics for picture in draw(sweep, good, metric)]
    except ImportError:
        pictures = None
    return path, text, pictures


def draw(sweep: Sweep, found: Sequence[Status], metric: str) -> list[Path]:
    """Draws a metric against each number that the sweep sets, and over two such numbers as a heat map.

    Keys whose values go together, as of ``--zip``, share a picture.

    Args:
      sweep: of the trials.
      found: finished ones, as of `finished`.
      metric: that is drawn.

    Returns:
      The pictures' paths, in the sweep's workdir.
    """
    from aaconv import plots

    rows = groups(sweep, found, metric)
    varying = [key for key in rows[0].values if len({repr(row.values[key]) for row in rows}) > 1]
    axes = [key for key in varying if all(_is_number(row.values[key]) for row in rows)]
    axes = [key for i, key in enumerate(axes) if not any(_tied(rows, key, other) for other in axes[:i])]
    scale = 100 if _in_percent(metric) else 1
    title = f"{sweep.base.model.name} on {sweep.base.data.name}, {len(found)} trials"
    barred = (
        f"{title}; dots: trials, bars: 95% interval of the mean" if any(len(r.results) > 1 for r in rows) else title
    )
    ylabel = f"{metric}{' (%)' if scale == 100 else ''}"
    labels = {key: _axis_label(rows, key, [k for k in varying if _tied(rows, key, k)]) for key in axes}
    paths = []
    for key in axes:
        others = [other for other in varying if not _tied(rows, key, other)]
        lines: dict[str, list[Any]] = {}
        for row in sorted(rows, key=lambda row: row.values[key]):
            name = ", ".join(f"{short_key(other)}={spell(row.values[other])}" for other in others)
            results = [scale * result for result in row.results if math.isfinite(result)]
            if results:
                lines.setdefault(name, []).append((row.values[key], results, scale * row.confidence))
        path = sweep.workdir / f"{_file_name(metric)}_against_{_file_name(key)}.png"
        plots.against(lines, path, xlabel=labels[key], ylabel=ylabel, title=barred)
        paths.append(path)
    free = [key for key in varying if not any(_tied(rows, key, axis) and key != axis for axis in axes)]
    if len(axes) == 2 and free == axes:
        paths.append(_draw_heat_map(sweep, rows, axes, labels, scale, f"{ylabel}, {title}", metric))
    return paths


def _draw_heat_map(
    sweep: Sweep,
    rows: Sequence[Group],
    axes: Sequence[str],
    labels: dict[str, str],
    scale: int,
    title: str,
    metric: str,
) -> Path:
    from aaconv import plots

    across, up = (sorted({row.values[key] for row in rows}) for key in axes)
    cells = {(row.values[axes[0]], row.values[axes[1]]): scale * row.mean for row in rows}
    values = [[cells.get((x, y), math.nan) for x in across] for y in up]
    path = sweep.workdir / f"{_file_name(metric)}_over_{_file_name(axes[0])}_and_{_file_name(axes[1])}.png"
    plots.heat_map(
        np.asarray(values),
        path,
        rows=[f"{y:g}" for y in up],
        columns=[f"{x:g}" for x in across],
        xlabel=labels[axes[0]],
        ylabel=labels[axes[1]],
        title=title,
        form="{:.2f}" if scale == 100 else "{:.4g}",
    )
    return path


def _tied(rows: Sequence[Group], key: str, other: str) -> bool:
    """Whether a value of either key says the value of the other, as a key's own does."""
    pairs = {(repr(row.values[key]), repr(row.values[other])) for row in rows}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _axis_label(rows: Sequence[Group], key: str, tied: Sequence[str]) -> str:
    same = [k for k in tied if all(row.values[k] == row.values[key] for row in rows)]
    label = " = ".join(map(short_key, [key, *(k for k in same if k != key)]))
    others = [short_key(k) for k in tied if k not in same]
    return f"{label} (with {', '.join(others)})" if others else label


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_percent(metric: str) -> bool:
    return metric.endswith(("accuracy", "top5"))


def _file_name(name: str) -> str:
    return name.replace("/", "_").replace(".", "_")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table that is aligned in plain text too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
