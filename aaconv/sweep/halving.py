"""Successive halving: all trials train a little, the best of them three times as long, and so on.

At each rung the trials that are left pause, are evaluated, and the best ``1 / factor`` of them go on. Each keeps the
schedule of its whole length, so that one which is never stopped computes what it computes without halving, bit for
bit. Trials that differ in their seed alone are judged together, by their mean. All have to reach a rung before it is
decided: processors may idle for a while, but what is decided does not depend on who was fast. Decisions are written
into ``halving.json`` and never revised.

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
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aaconv import metrics
from aaconv.errors import close_matches
from aaconv.sweep import records
from aaconv.sweep.description import Trial, trial_name
from aaconv.sweep.display import spell_metric
from aaconv.sweep.records import HALVING, TRIAL, Sweep

METRICS = ("eval/accuracy", "eval/top5", "eval/loss")
UNITS = ("epochs", "steps")


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
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", budget.strip())
        unit = f"{match[2].rstrip('s')}s" if match else ""
        if match is None or unit not in UNITS or not float(match[1]):
            raise ValueError(f"--halving {budget!r} must be the first rung's budget, such as 2epochs or 500steps")
        minimum = float(match[1])
        if unit == "steps" and minimum != int(minimum):
            raise ValueError(f"--halving {budget!r}: steps are whole; write {math.ceil(minimum)}steps")
        if factor < 2:
            raise ValueError(f"--halving-factor {factor} must be at least 2, for one in so many goes on")
        if metric not in METRICS:
            near = close_matches(metric, METRICS) or f": it is one of {', '.join(METRICS)}"
            raise ValueError(f"--halving-metric {metric!r} is not measured by an evaluation{near}")
        return cls(minimum, unit, factor, metric)

    def describe(self) -> str:
        return f"from {self.minimum:g} {self.unit}, one in {self.factor} by {self.metric}"

    def parts(self, sweep: Sweep) -> Iterator[Sweep]:
        """Yields what is to be run, one rung after another, and decides when it is asked for the next.

        Args:
          sweep: which; as of `aaconv.sweep.records.opened`.

        Raises:
          ValueError: there is no rung before the end of the runs, or `begin` would refuse.
        """
        rungs = self.rungs(sweep)
        self.begin(sweep)
        groups = by_group(sweep.trials)
        for number, until in enumerate(rungs):
            decided = records.read_json(sweep.workdir / HALVING)["rungs"]
            if number >= len(decided):
                names = [trial.name for name in groups for trial in groups[name]]
                yield sweep.part(names, until)
                decided = self._decide(sweep, number, until, groups)
            groups = {name: groups[name] for name in decided[number]["kept"]}
        yield sweep.part([trial.name for trials in groups.values() for trial in trials], {})

    def begin(self, sweep: Sweep) -> None:
        """Writes down that a sweep is halved, or checks that it is so in the same way.

        Raises:
          ValueError: the workdir has been decided in another way, or among other trials.
        """
        file = sweep.workdir / HALVING
        with _alone(sweep.workdir):
            found = records.read_json(file)
            names = [trial.name for trial in sweep.trials]
            if not found.get("rungs"):
                records.write_json(file, {**dataclasses.asdict(self), "trials": names, "rungs": []})
                return
            before = _read(found)
            if before != self:
                raise ValueError(
                    f"{sweep.workdir} was halved {before.describe()}, and not {self.describe()}: name a new --workdir, "
                    f"or move {file} away to have it decided anew"
                )
            others = sorted(set(names) ^ set(found["trials"]))
            if others:
                raise ValueError(
                    f"{file} has decided among {len(found['trials'])} trials, and there are others now "
                    f"({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): name a new --workdir, or move that "
                    "file away to have it decided anew"
                )

    def rungs(self, sweep: Sweep) -> list[dict[str, int]]:
        """Returns the step of each trial at each rung before its end.

        There is no rung where but one group is left.

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
        budget, left = self.minimum, len(by_group(sweep.trials))
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

    def _decide(
        self, sweep: Sweep, number: int, until: Mapping[str, int], groups: Mapping[str, Sequence[Trial]]
    ) -> list[dict[str, Any]]:
        with _alone(sweep.workdir):
            found = records.read_json(sweep.workdir / HALVING)
            if len(found["rungs"]) > number:  # another launcher was first
                return found["rungs"]
            values = {name: self._value(sweep, trials, until) for name, trials in groups.items()}
            sign = -1 if metrics.higher_is_better(self.metric) else 1
            # The first described of equals; what has no value, because it failed or is nan, comes last.
            ranked = sorted(values, key=lambda name: _last(values[name], sign))
            keep = ranked[: max(1, len(ranked) // self.factor)]
            found["rungs"].append(
                {
                    "budget": f"{self.minimum * self.factor**number:g} {self.unit}",
                    "decided": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "values": {name: values[name] for name in ranked},
                    "kept": keep,
                    "eliminated": [trial.name for name in ranked[len(keep) :] for trial in groups[name]],
                }
            )
            records.write_json(sweep.workdir / HALVING, found)
            return found["rungs"]

    def _value(self, sweep: Sweep, trials: Sequence[Trial], until: Mapping[str, int]) -> float | None:
        values = []
        for trial in trials:
            folder, step = sweep.folder(trial), until[trial.name]
            found = records.read_json(folder / TRIAL).get("rungs", {}).get(str(step))
            # One that was finished before the sweep was halved may have been evaluated there all the same.
            rows = metrics.read_rows(folder) if found is None else [{"step": step, **found}]
            values += [row.get(self.metric) for row in rows if row["step"] == step]
        known = [value for value in values if value is not None and math.isfinite(value)]
        return statistics.fmean(known) if known else None


def _last(value: float | None, sign: int) -> tuple[bool, float]:
    return (value is None, 0.0 if value is None else sign * value)


def by_group(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Returns the trials that differ in their seed alone, by the name they would have without it.

    Example:
      >>> list(by_group([Trial("k=1,seed=0", {"model.kappa": 1.0, "seed": 0}), Trial("b", {"seed": 1})]))
      ['kappa=1.0', 'base']
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        rest = {key: value for key, value in trial.overrides.items() if key != "seed"}
        groups.setdefault(trial_name(rest), []).append(trial)
    return groups


def recorded(workdir: Path) -> Halving | None:
    """Returns how a sweep is halved, None where it is not."""
    found = records.read_json(workdir / HALVING)
    return _read(found) if found else None


def describe(workdir: Path) -> list[str]:
    """Says in a line a rung who was compared by what, and who goes on; [] where a sweep is not halved."""
    found = records.read_json(workdir / HALVING)
    if not found:
        return []
    halving = _read(found)
    lines = [f"successive halving {halving.describe()}"]
    for number, rung in enumerate(found["rungs"], 1):
        values, kept = rung["values"], rung["kept"]
        said = ", ".join(f"{name} {_spell(values[name], halving.metric)}" for name in kept)
        line = f"rung {number}, at {rung['budget']}: {len(kept)} of {len(values)} go on: {said}"
        next_best = next((name for name in values if name not in kept), None)  # from the best to the worst
        lines.append(
            line if next_best is None else f"{line}; not {next_best} {_spell(values[next_best], halving.metric)}"
        )
    return lines


def _spell(value: float | None, metric: str) -> str:
    return "(no value)" if value is None else spell_metric(metric, value)


def _read(found: Mapping[str, Any]) -> Halving:
    return Halving(**{field.name: found[field.name] for field in dataclasses.fields(Halving)})


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Keeps other launchers from deciding at the same time."""
    with (workdir / ".halving.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
