"""The report of a sweep: tables with mean, spread and confidence over seeds, pictures, and a page for the browser."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aaconv import config as config_lib
from aaconv.metrics import duration, higher_is_better
from aaconv.sweep import halving, page, pictures, records, results
from aaconv.sweep.description import short_key, spell
from aaconv.sweep.records import FINISHED, TRIAL, Status, Sweep
from aaconv.sweep.results import Cell, in_percent
from aaconv.train import EVAL_METRICS

REPORT, PAGE, PICTURES = "report.md", "report.html", "pictures"
MANY = 4  # pictures, which take some ten seconds
LISTED = 20  # trials that are not finished, at most, in what is printed


class NothingFinishedError(ValueError):
    """No trial of a sweep is finished, so there is nothing to report."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `write_report` wrote.

    Attributes:
      path: of the Markdown.
      page: of the HTML, which needs no other file.
      text: of the Markdown, without pictures.
      pictures: their paths; None without matplotlib.
      found: how the trials stood, which all of it is made from.
    """

    path: Path
    page: Path
    text: str
    pictures: list[Path] | None
    found: list[Status]


def write_report(
    sweep: Sweep, metrics: Sequence[str] = (), *, note: Callable[[str], None] = lambda text: None
) -> Report:
    """Writes ``results.csv``, ``report.md``, ``report.html`` and, where matplotlib is installed, ``pictures/``.

    Args:
      sweep: as of `aaconv.sweep.records.load`.
      metrics: a table and pictures each; by default the sweep's own.
      note: gets a line where this takes long.

    Raises:
      NothingFinishedError: no trial is finished.
      ValueError: no trial has the metric.
    """
    found = records.statuses(sweep)
    metrics = list(dict.fromkeys(metrics or [sweep.metric]))
    seen = {name for status in found for name in status.values if "/" in name}
    for metric in metrics:
        results.check_metric(metric, seen | set(EVAL_METRICS))
    good, remarks = results.finished(sweep, found)
    others = [status for status in found if results.outcome(status) != FINISHED]
    if not good:
        changed = set(remarks) - set(results.absent(results.by_outcome(found)))  # finished, but not with this config
        told = "\n".join(f"  {line}" for line in [*unfinished(others), *sorted(changed)])
        raise NothingFinishedError(
            f"no trial of {sweep.workdir} is finished, so there is nothing to report: {standing(found)}\n{told}\n"
            f"  `aaconv sweep status --workdir {shlex.quote(str(sweep.workdir))}` says how it goes"
        )
    remarks = [*halving.describe(sweep.workdir), *remarks]
    cells = {metric: results.cells(sweep, found, good, metric) for metric in metrics}
    drawn, names = {}, set()
    for metric in metrics:  # the training loss is not drawn again with the next metric
        found_here = pictures.pictures(sweep, cells[metric], metric)
        drawn[metric] = [picture for picture in found_here if picture.name not in names]
        names |= {picture.name for picture in found_here}
    title = f"{sweep.base.model.name} on {sweep.base.data.name}: {len(good)} of {len(sweep.trials)} trials"
    parts = [f"# {title}", f"{standing(found)}."]
    for metric in metrics:
        parts += [markdown(*table(cells[metric], metric)), best(cells[metric], metric)]
    parts.append(f"{intervals(cells)}  \n{ran_on(sweep, good)}".strip())
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    if others:
        parts.append("\n".join(f"- {line}" for line in unfinished(others)))
    text = "\n\n".join(part for part in parts if part) + "\n"
    results.write_results(sweep, found=found)
    count = sum(map(len, drawn.values()))
    if count > MANY:
        note(f"drawing {count} pictures ...")
    paths = _write_pictures(sweep, title, drawn)
    shown = [picture for several in drawn.values() for picture in several] if paths is not None else []
    links = "".join(f"\n![{picture.title}]({PICTURES}/{picture.name}.png)\n" for picture in shown)
    path = sweep.workdir / REPORT
    path.write_text(text + links, encoding="utf-8")
    html = page.page(
        title,
        standing=standing(found),
        sections=[
            page.Section(
                metric,
                *table(cells[metric], metric),
                row_of_best=_row_of_best(cells[metric], metric),
                remark=f"{best(cells[metric], metric)} {intervals({metric: cells[metric]})}".strip(),
                pictures=drawn[metric] if paths is not None else [],
            )
            for metric in metrics
        ],
        remarks=[ran_on(sweep, good), *remarks],
        trials=_trials(sweep, found),
        config=dict(config_lib.items(sweep.base)),
    )
    (sweep.workdir / PAGE).write_text(html, encoding="utf-8")
    return Report(path, sweep.workdir / PAGE, text, paths, found)


INTERVAL = "Interval: 95% confidence interval of the mean, by Student's t distribution over the seeds."
BEYOND = "Student's t distribution does not know that accuracies end at 0 and 100%: few seeds make intervals go beyond."
SEEDS, DEVIATION = "seeds", "standard deviation"


def _write_pictures(sweep: Sweep, title: str, drawn: dict[str, list[pictures.Picture]]) -> list[Path] | None:
    """Returns the paths, None without matplotlib; pictures of an earlier report are removed."""
    from aaconv import plots

    folder = sweep.workdir / PICTURES
    try:
        plots.check_installed()
    except ImportError:
        return None
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    paths = []
    for picture in [picture for several in drawn.values() for picture in several]:
        paths.append(folder / f"{picture.name}.png")
        plots.png(picture.draw, paths[-1], title=f"{picture.title}; {title}")
    return paths


# What is said


def standing(found: Sequence[Status]) -> str:
    """Says how many trials ended how."""
    groups = results.by_outcome(found)
    finished = len(groups.pop(FINISHED, []))
    others = [f"{len(group)} {state}" for state, group in groups.items()]
    return ", ".join([f"{finished} of {len(found)} trials finished", *others])


def unfinished(others: Sequence[Status]) -> list[str]:
    """Returns a line a trial that is not finished and has something to say: its error, or how far it came."""
    lines = []
    for state, group in results.by_outcome(others).items():
        for status in group:
            said = status.error.splitlines()[-1] if status.error else ""
            at = f" at step {status.step} of {status.total_steps}" if status.total_steps else ""
            if said or at:
                lines.append(f"{state}{at}: {status.trial.name}{said and f': {said}'}")
    return lines[:LISTED] + ([f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else [])


def ran_on(sweep: Sweep, good: Sequence[Status]) -> str:
    """Says on what the first of the finished trials ran, and how long all of them took."""
    ran = records.read_json(sweep.folder(good[0].trial) / TRIAL)["attempts"][-1]
    versions = ", ".join(f"{name} {ran[name]}" for name in ("python", "jax", "jaxlib") if ran.get(name))
    seconds = sum(status.seconds for status in good)
    return (
        f"Ran on {ran.get('device', '?')}, {_counted(ran.get('cores', 0), 'thread')} a trial, {seconds:,.0f} s in all; "
        f"{versions}; revision {ran.get('revision') or ran.get('aaconv', '?')}, {ran.get('date', '?')}."
    )


def best(cells: Sequence[Cell], metric: str) -> str:
    """Says which cell has the best mean, with how many others' intervals its own overlaps, and who is not compared."""
    first = results.best(cells, metric)
    if first is None or len(cells) == 1:
        return ""
    varied = pictures.factors(cells)
    named = lambda cell: (
        f"{_spoken(cell.mean, metric)}{'%' if in_percent(metric) else ''} with "
        + (pictures.cell_name(cell, varied) + ("" if cell.is_whole else f" ({cell.seeds} seeds)"))
    )
    said = f"Best mean: {named(first)}"
    others = [cell for cell in results.compared(cells) if cell is not first]
    if equal := [cell for cell in others if cell.mean == first.mean]:
        said += f", and the same mean with {_counted(len(equal), 'other cell')}"
    if math.isnan(first.confidence):
        said += "; one seed, so nothing says how much of it is chance."
    elif others:
        overlapping = [cell for cell in others if abs(cell.mean - first.mean) <= first.confidence + cell.confidence]
        alone = [cell for cell in others if math.isnan(cell.confidence)]
        said += f"; its interval overlaps with that of {len(overlapping)} of {_counted(len(others), 'other cell')}"
        said += f"; {_counted(len(alone), 'cell')} of one seed without an interval." if alone else "."
    else:
        said += "."
    lacking = [cell for cell in cells if not cell.is_whole and not _is_spoilt(cell)]
    if lacking and first.is_whole:
        sign = 1 if higher_is_better(metric) else -1
        ahead = [cell for cell in lacking if sign * (cell.mean - first.mean) > 0]
        said += f" Not compared, since seeds are missing: {_counted(len(lacking), 'cell')}"
        said += f", among them {', '.join(map(named, ahead))}." if ahead else "."
    if spoilt := list(filter(_is_spoilt, cells)):
        said += f" Not compared, since results are not finite: {_counted(len(spoilt), 'cell')}."
    return said


def _is_spoilt(cell: Cell) -> bool:
    return not all(map(math.isfinite, cell.results))


def intervals(cells: Mapping[str, Sequence[Cell]]) -> str:
    """Says what the intervals of the tables are, "" where there is none.

    Args:
      cells: by metric.
    """
    if not any(len(cell.results) > 1 for several in cells.values() for cell in several):
        return ""
    ends = [
        end
        for metric, several in cells.items()
        if in_percent(metric)
        for cell in several
        for end in (cell.mean - cell.confidence, cell.mean + cell.confidence)
    ]
    return f"{INTERVAL} {BEYOND}" if any(end < 0 or end > 1 for end in ends) else INTERVAL


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _spoken(value: float, metric: str) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}" if in_percent(metric) else f"{value:.4g}"


def table(cells: Sequence[Cell], metric: str) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a metric's table; accuracies are in percent.

    Where seeds are missing, the column of seeds says how many are in the numbers: ``2 of 3``.
    """
    keys = list(cells[0].values)
    spoken = lambda value: _spoken(value, metric)
    label = f"{metric}{' (%)' if in_percent(metric) else ''}"
    header = [*map(short_key, keys), SEEDS, label, DEVIATION, "95% interval", "parameters", "MFLOPs"]
    lines = []
    for cell in cells:
        low, high = spoken(cell.mean - cell.confidence), spoken(cell.mean + cell.confidence)
        infinite = sum(not math.isfinite(result) for result in cell.results)
        interval = f"{low} to {high}"
        if infinite:
            interval = f"{infinite} of {len(cell.results)} not finite"
        elif len(cell.results) < 2:
            interval = "one seed" if cell.results else "–"
        numbers = [cell.seeds, spoken(cell.mean), spoken(cell.standard_deviation), interval]
        counts = [f"{cell.trial.parameters:,}", f"{cell.trial.flops / 1e6:,.2f}"]
        lines.append([*(spell(cell.values[key]) for key in keys), *numbers, *counts])
    return header, lines


def _row_of_best(cells: Sequence[Cell], metric: str) -> int | None:
    first = results.best(cells, metric)
    return None if first is None or len(cells) == 1 else cells.index(first)


def _trials(sweep: Sweep, found: Sequence[Status]) -> tuple[list[str], list[list[str]]]:
    """Returns the table of all trials, those first that did not finish."""
    header = [
        "trial",
        "outcome",
        sweep.metric + (" (%)" if in_percent(sweep.metric) else ""),
        "step",
        "time",
        "attempts",
    ]
    lines = []
    for state, group in sorted(results.by_outcome(found).items(), key=lambda pair: pair[0] == FINISHED):
        for status in group:
            value = status.values.get(sweep.metric)
            lines.append(
                [
                    status.trial.name,
                    state,
                    "" if value is None else _spoken(value, sweep.metric),
                    f"{status.step}/{status.total_steps}" if status.total_steps else "",
                    duration(status.seconds) if status.attempts else "",
                    str(status.attempts),
                    status.error.splitlines()[-1] if status.error else "",
                ]
            )
    return [*header, "error"], lines


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table that is aligned in plain text too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
