"""Successive halving: all trials train a little, the best of them three times as long, and so on.

At each rung the trials that are left pause, are evaluated, and the best ``1 / factor`` of them go on. Each keeps the
schedule of its whole length, so that one which is never stopped computes what it computes without halving, bit for
bit. Trials that differ in their seed alone, a cell, are judged together, by their mean; a cell of which a trial failed
or diverged comes after all whole ones. All have to reach a rung before it is decided, or to have failed as often as
they may: processors may idle for a while, but what is decided does not depend on who was fast. One that somebody
stopped on its way is run on first; one that is past the rung without an evaluation there cannot be judged, which is an
error. Decisions are written
into ``halving.json``, with the reasons of trials that had no value, and never revised.

References:
  Karnin, Koren and Somekh, Almost Optimal Exploration in Multi-Armed Bandits, ICML 2013: sequential halving.
  Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016: the same
  where each arm is a training run. Without waiting, which is not done here: Li et al., A System for Massively Parallel
  Hyperparameter Tuning, MLSys 2020.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import re
import statistics
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aaconv import metrics
from aaconv.errors import close_matches
from aaconv.sweep import records
from aaconv.sweep.description import Trial
from aaconv.sweep.display import spell_metric
from aaconv.sweep.records import FAILED, HALVING, TRIAL, Sweep
from aaconv.sweep.results import by_cell, few, outcome

UNITS = ("epochs", "steps")
TOLD = 4  # trials without a value at a rung


@dataclasses.dataclass(frozen=True)
class Halving:
    """How trials are compared on their way.

    Attributes:
      minimum: budget of the first rung.
      unit: of it, ``epochs`` or ``steps``.
      factor: of the trials one in so many goes on, and so many times as long is the next rung's budget.
      metric: that decides, of the evaluation at the rung; a loss is better the lower it is.
    """

    minimum: float
    unit: str
    factor: int = 3
    metric: str = records.DEFAULT_METRIC

    @classmethod
    def parse(cls, budget: str, factor: int, metric: str) -> Halving:
        """Reads a budget such as ``2epochs`` or ``500steps``.

        Raises:
          ValueError: it is none, or the factor or metric cannot be; the message says what can.

        Example:
          >>> Halving.parse("1.5 epochs", 3, "eval/loss").describe()
          'from 1.5 epochs, one in 3 by eval/loss'
        """
        from aaconv.train import EVAL_METRICS

        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", budget.strip())
        unit = f"{match[2].rstrip('s')}s" if match else ""
        if match is None or unit not in UNITS or not float(match[1]):
            raise ValueError(f"--halving {budget!r} must be the first rung's budget, such as 2epochs or 500steps")
        minimum = float(match[1])
        if unit == "steps" and minimum != int(minimum):
            raise ValueError(f"--halving {budget!r}: steps are whole; write {math.ceil(minimum)}steps")
        if factor < 2:
            raise ValueError(f"--halving-factor {factor} must be at least 2, for one in so many goes on")
        if metric not in EVAL_METRICS:
            near = close_matches(metric, EVAL_METRICS) or f": it is one of {', '.join(EVAL_METRICS)}"
            raise ValueError(
                f"--halving-metric {metric!r}, else checkpoint.best_metric, is not measured by an evaluation{near}"
            )
        return cls(minimum, unit, factor, metric)

    def describe(self) -> str:
        return f"from {self._budget(0)}, one in {self.factor} by {self.metric}"

    def _budget(self, number: int) -> str:
        budget = self.minimum * self.factor**number
        return f"{budget:g} {self.unit if budget != 1 else self.unit.removesuffix('s')}"

    def parts(self, sweep: Sweep) -> Iterator[Sweep]:
        """Yields what is to be run, one rung after another, and decides when it is asked for the next.

        Trials that have neither a value nor failed, as where another launcher had them and was stopped, are yielded
        again. Where no trial at all has a value at a rung, nothing is decided and nothing more is yielded.

        Args:
          sweep: which; as of `aaconv.sweep.records.opened`.

        Raises:
          ValueError: there is no rung before the end of the runs, or `begin` would refuse, or trials went past a rung
            without being evaluated there.
        """
        rungs = self.rungs(sweep)
        self.begin(sweep, rungs)
        cells = by_cell(sweep)
        for number, until in enumerate(rungs):
            decided = records.read_json(sweep.workdir / HALVING)["rungs"]
            part = sweep.part([trial.name for trials in cells.values() for trial in trials], until)
            missing = part.trials if number >= len(decided) else ()
            while missing:
                yield part.part([trial.name for trial in missing], until)
                decided, missing = self._decide(part, number, cells)
            if number >= len(decided):
                return
            out = set(decided[number]["eliminated"])  # cells may have other names since, trials have not
            cells = {name: trials for name, trials in cells.items() if out.isdisjoint(trial.name for trial in trials)}
        yield sweep.part([trial.name for trials in cells.values() for trial in trials], {})

    def begin(self, sweep: Sweep, rungs: Sequence[Mapping[str, int]]) -> None:
        """Writes down that a sweep is halved, or checks that it is so in the same way.

        Args:
          sweep: which.
          rungs: as of `rungs`.

        Raises:
          ValueError: the workdir is halved in another way, or has been decided among other trials, or trials that ran
            before were not evaluated at a rung.
        """
        file = sweep.workdir / HALVING
        with _alone(sweep.workdir):
            found = records.read_json(file)
            names = [trial.name for trial in sweep.trials]
            before = _read(file, found) if found else self
            if before != self:
                raise ValueError(
                    f"{sweep.workdir} is halved {before.describe()}, and not {self.describe()}: name a new --workdir, "
                    f"or move {file} away to have it decided anew"
                )
            self._check_evaluated(sweep, rungs[len(found.get("rungs", [])) :])
            if not found.get("rungs"):
                records.write_json(file, {**dataclasses.asdict(self), "trials": names, "rungs": []})
                return
            others = sorted(set(names) ^ set(found["trials"]))
            if others:
                raise ValueError(
                    f"{file} has decided among {len(found['trials'])} trials, and there are others now "
                    f"({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): name a new --workdir, or move that "
                    "file away to have it decided anew"
                )

    def rungs(self, sweep: Sweep) -> list[dict[str, int]]:
        """Returns the step of each trial at each rung before its end.

        There is no rung where but one cell is left.

        Raises:
          ValueError: trials have different lengths, or there is no rung before their end.
        """
        from aaconv import data, optim

        totals: dict[str, int] = {}
        ahead: dict[str, float] = {}  # steps to a unit of budget
        for trial in sweep.trials:
            config = sweep.config(trial)
            plan = optim.plan(config, data.info(config).num_train // config.batch_size)
            totals[trial.name] = plan.total_steps
            ahead[trial.name] = plan.steps_per_epoch if self.unit == "epochs" else 1
        lengths = {name: total / ahead[name] for name, total in totals.items()}
        shortest, longest = min(lengths.values()), max(lengths.values())
        if longest - shortest > 1e-6 * longest:
            raise ValueError(
                f"--halving compares trials after the same number of {self.unit}, and these have from {shortest:g} to "
                f"{longest:g}: give all one length, or count in {UNITS[self.unit == 'epochs']}"
            )
        found: list[dict[str, int]] = []
        budget, left = self.minimum, len(by_cell(sweep))
        while budget < shortest - 1e-6 and left > 1:
            until = {name: max(1, round(budget * steps)) for name, steps in ahead.items()}
            if any(until[name] >= total for name, total in totals.items()):
                break
            found.append(until)
            budget, left = budget * self.factor, max(1, left // self.factor)
        if not found:
            raise ValueError(
                f"--halving {self.minimum:g}{self.unit}: "
                + ("there is but one trial, seeds aside, and nothing to choose from: leave it out" if left < 2 else "")
                + (f"the runs end after {shortest:g} {self.unit}: give a smaller budget" if left > 1 else "")
            )
        return found

    def _check_evaluated(self, sweep: Sweep, rungs: Sequence[Mapping[str, int]]) -> None:
        """Raises where a trial is past a rung and cannot be judged there, for it ran without knowing of it."""
        from aaconv import checkpoints

        out = records.eliminated(sweep.workdir)
        missing: dict[str, int] = {}
        evaluated: list[set[int]] = []
        for trial in sweep.trials:
            ahead = [until[trial.name] for until in rungs]
            folder = sweep.folder(trial)
            if trial.name in out or not ahead or not folder.exists():
                continue
            is_finished = bool(records.read_json(folder / TRIAL).get("values"))
            reached = math.inf if is_finished else max(checkpoints.finished_steps(folder), default=0)
            without = [step for step in ahead if step < reached and not self._evaluations(sweep, trial, step)]
            if without:
                missing[trial.name] = without[0]
                evaluated.append({row["step"] for row in metrics.read_rows(folder) if self.metric in row})
        if missing:
            there = sorted(set.intersection(*evaluated))
            file = sweep.workdir / HALVING
            raise ValueError(
                f"--halving {self.minimum:g}{self.unit} compares trials by {self.metric}, and {len(missing)} of "
                f"{len(sweep.trials)} ran on without being evaluated there: "
                f"{few([f'{name} at step {step}' for name, step in missing.items()])}; name a new --workdir, or "
                "another budget"
                + (f" (they were evaluated at step {', '.join(map(str, there[:5]))})" if there else "")
                + (f", and move {file} away" if file.exists() else "")
            )

    def _decide(
        self, part: Sweep, number: int, cells: Mapping[str, Sequence[Trial]]
    ) -> tuple[list[dict[str, Any]], Sequence[Trial]]:
        """Decides a rung if all of its trials have a value or failed, and any has a value.

        Returns:
          The decisions that there are, and the trials that this one has to wait for.

        Raises:
          ValueError: a trial is past the rung and was not evaluated there.
        """
        with _alone(part.workdir):
            found = records.read_json(part.workdir / HALVING)
            if len(found["rungs"]) > number:  # another launcher was first
                return found["rungs"], ()
            self._check_evaluated(part, [part.until])
            judged = {name: self._judge(part, trials) for name, trials in cells.items()}
            missing = [trial for cell in judged.values() for trial in cell.missing]
            if missing or all(cell.mean is None for cell in judged.values()):
                return found["rungs"], missing
            sign = -1 if metrics.higher_is_better(self.metric) else 1
            ranked = sorted(judged, key=lambda name: judged[name].rank(sign))  # the first described of equals
            known = [name for name in ranked if judged[name].mean is not None]
            keep = known[: max(1, len(ranked) // self.factor)]
            found["rungs"].append(
                {
                    "budget": self._budget(number),
                    "decided": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "values": {name: judged[name].mean for name in ranked},
                    "seeds": {name: [judged[name].known, judged[name].trials] for name in ranked},
                    "without": {trial: why for name in ranked for trial, why in judged[name].without.items()},
                    "kept": keep,
                    "eliminated": [trial.name for name in ranked[len(keep) :] for trial in cells[name]],
                }
            )
            records.write_json(part.workdir / HALVING, found)
            return found["rungs"], ()

    def _judge(self, part: Sweep, trials: Sequence[Trial]) -> _Judged:
        known: list[float] = []
        without: dict[str, str] = {}
        missing: list[Trial] = []
        for trial in trials:
            status = records.status(part, trial)
            values = self._evaluations(part, trial, part.until[trial.name])
            if values and values[0] is not None and math.isfinite(values[0]):
                known.append(values[0])
            elif values:
                without[trial.name] = f"{self.metric} is not finite"
            elif status.state == FAILED:
                without[trial.name] = _why(status)
            else:
                missing.append(trial)
        return _Judged(statistics.fmean(known) if known else None, len(trials), without, missing)

    def _evaluations(self, sweep: Sweep, trial: Trial, step: int) -> list[float | None]:
        """Returns the metric of the evaluation at a step, None for nan; [] where there was none."""
        folder = sweep.folder(trial)
        found = records.read_json(folder / TRIAL).get("rungs", {}).get(str(step))
        # One that was finished before the sweep was halved may have been evaluated there all the same.
        rows = metrics.read_rows(folder) if found is None else [{"step": step, **found}]
        return [row[self.metric] for row in rows if row["step"] == step and self.metric in row]


@dataclasses.dataclass(frozen=True)
class _Judged:
    """A cell at a rung.

    Attributes:
      mean: of its trials that have a value; None without any.
      trials: that it has.
      without: why others have no value, and will have none.
      missing: those that may yet have one.
    """

    mean: float | None
    trials: int
    without: Mapping[str, str]
    missing: Sequence[Trial]

    @property
    def known(self) -> int:
        return self.trials - len(self.without)

    def rank(self, sign: int) -> tuple[float, float]:
        # By what is left of it, an unstable cell could win.
        return len(self.without) / self.trials, 0.0 if self.mean is None else sign * self.mean


def _why(status: records.Status) -> str:
    attempts = f" in {status.attempts} attempts" if status.attempts > 1 else ""
    said = status.error.splitlines()
    return f"{outcome(status)}{attempts}" + (f": {said[-1]}" if said else "")


def recorded(workdir: Path) -> Halving | None:
    """Returns how a sweep is halved, None where it is not.

    Raises:
      ValueError: ``halving.json`` is something else.
    """
    found = records.read_json(workdir / HALVING)
    return _read(workdir / HALVING, found) if found else None


def describe(workdir: Path) -> list[str]:
    """Says of each rung who was compared by what, who goes on and who had no value; [] where a sweep is not halved."""
    found = records.read_json(workdir / HALVING)
    if not found:
        return []
    halving = _read(workdir / HALVING, found)
    lines = [f"successive halving {halving.describe()}"]
    for number, rung in enumerate(found["rungs"], 1):
        values, kept = rung["values"], rung["kept"]
        spell = lambda name, rung=rung: f"{name} {_spell(rung, name, halving.metric)}"
        said = ", ".join(map(spell, kept))
        line = f"rung {number}, at {rung['budget']}: {len(kept)} of {len(values)} go on: {said}"
        next_best = next((name for name in values if name not in kept), None)  # from the best to the worst
        lines.append(line if next_best is None else f"{line}; not {spell(next_best)}")
        without = [
            f"{name}: {textwrap.shorten(why, 100, placeholder=' ...')}" for name, why in rung.get("without", {}).items()
        ]
        lines += [f"rung {number}, without a value: {text}" for text in without[:TOLD]]
        lines += [f"rung {number}, without a value: {len(without) - TOLD} more"] if len(without) > TOLD else []
    return lines


def _spell(rung: Mapping[str, Any], name: str, metric: str) -> str:
    value = rung["values"][name]
    known, trials = rung.get("seeds", {}).get(name, (1, 1))
    if value is None:
        return "(no value)"
    return spell_metric(metric, value) + (f" ({known} of {trials} seeds)" if known < trials else "")


def _read(file: Path, found: Mapping[str, Any]) -> Halving:
    try:
        return Halving(**{field.name: found[field.name] for field in dataclasses.fields(Halving)})
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}, so it says no successive halving: move it away") from error


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Keeps other launchers from deciding at the same time."""
    with (workdir / ".halving.lock").open("a") as file:
        records.flock(file, fcntl.LOCK_EX)
        yield
