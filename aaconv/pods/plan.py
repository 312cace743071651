"""``aaconv plan``: which stages to augment, by the paper's rule, with the compiler as the judge.

Bello et al. (2019), 3.3: augment from the last layer, where maps are small, towards the first, as far as memory
allows.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from aaconv import models, parallel, train
from aaconv.bench import report
from aaconv.config import ConfigDict
from aaconv.pods import page, programs
from aaconv.pods.chips import parse_topology
from aaconv.pods.programs import TRAINING, Program

PUBLISHED = "skew"
"""The implementation that is the paper's own algorithm."""

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A set of augmented stages, and the training step compiled with it.

    Attributes:
      stages: augmented, from 1.
      published: with the paper's algorithm.
      ours: with the implementation that the config names, or that is chosen where it names none.
      chosen_by: which that is.
    """

    stages: tuple[int, ...]
    published: Program
    ours: Program
    chosen_by: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `run` found.

    Attributes:
      candidates: from the last stage alone to all, or to the last set that the network can augment.
      memory: bytes that were to suffice.
      limit: why a further stage cannot be augmented; "" where the candidates end with all.
      published, ours: the largest set of stages that fits; None where not even the last stage does.
    """

    candidates: tuple[Candidate, ...]
    memory: int
    limit: str = ""

    @property
    def published(self) -> tuple[int, ...] | None:
        return self._largest("published")

    @property
    def ours(self) -> tuple[int, ...] | None:
        return self._largest("ours")

    def _largest(self, which: str) -> tuple[int, ...] | None:
        # As far as memory allows: a larger set behind one that does not fit does not count.
        found = None
        for candidate in self.candidates:
            if not getattr(candidate, which).fits(self.memory):
                break
            found = candidate.stages
        return found


def run(
    config: ConfigDict,
    *,
    topology: str = "",
    memory_gb: float | None = None,
    output: str = "",
    note: Note = lambda text: print(text, file=sys.stderr, flush=True),
) -> Plan:
    """Compiles the training step with more and more augmented stages, prints what fits, and writes the config.

    Args:
      config: from `aaconv.config.load`, of a network that takes ``stages``.
      topology: a TPU slice, which need not be here: the step is compiled for one of its chips, with a chip's share of
        the batch.
      memory_gb: instead: memory in units of 10^9 bytes; the step is compiled for one device of this machine, with the
        whole batch.
      output: a file for the config with the chosen stages, which ``--config`` takes; "" for none.
      note: gets lines of progress.

    Raises:
      ValueError: the network has no stages to choose or cannot augment its last, there is no such slice, libtpu is not
        installed, or the file cannot be written.
    """
    if bool(topology) == (memory_gb is not None):
        raise ValueError("give either --topology, e.g. v5e:16x16, or --memory-gb, e.g. 16")
    if output and not output.endswith(".json"):
        raise ValueError(f"--output {output}: the config is written as JSON, name a file that ends in .json")
    _check_network(config)
    if topology:
        slice = parse_topology(topology)
        devices, memory = programs.topology_devices(slice), slice.device_memory
        where = f"one {slice.chip.device} of {slice.name}"
    else:
        assert memory_gb is not None
        devices, memory = jax.devices()[:1], int(memory_gb * 1e9)
        where = f"one {devices[0].platform} device"
    one = _on_one_device(config, devices)
    total = _number_of_stages(programs.build(_with_stages(one, ()), devices[:1]))
    print(f"{config.model.name}, {one.batch_size} images a step of {where}, {config.dtype}, {page.gibibytes(memory)}")
    versions = report.machine()
    print(f"compiled by jax {versions['jax']}, libtpu {versions.get('libtpu', 'none')}; nothing was run", flush=True)
    sets, limit = _possible(one, devices, total)
    if limit:
        note(limit)
    candidates = []
    for stages in sets:
        note(f"compiling with stages {_say(stages)} of {total} ...")
        ours, chosen_by = _compile(one, devices, stages, config.model.implementation)
        published, _ = _compile(one, devices, stages, PUBLISHED)
        candidates.append(Candidate(stages, published, ours, chosen_by))
        # Minutes each: what is known so far, should somebody stop it.
        note(f"  published {page.gibibytes(published.total)}, ours {page.gibibytes(ours.total)}")
    plan = Plan(tuple(candidates), memory, limit)
    print(f"\n{table(plan)}\n")
    print("\n".join(verdict(plan, config)), flush=True)
    if output and plan.ours is not None:
        _write(output, _with_stages(config, plan.ours))
        print(f"written {output}: aaconv train --config {output} --workdir ...")
    return plan


def table(plan: Plan) -> str:
    """Returns the sets of stages, one a line, with the memory of the training step."""
    names = ", ".join(dict.fromkeys(x.chosen_by for x in plan.candidates))
    columns = ["augmented stages", f"published ({PUBLISHED})", "", f"ours ({names})", "", "published / ours"]
    rows = []
    for x in plan.candidates:
        cells = [_say(x.stages)]
        for program in (x.published, x.ours):
            cells += [page.gibibytes(program.total), _fit(program, plan.memory)]
        rows.append([*cells, report.ratio(x.published.total, x.ours.total)])
    return report.table(columns, rows)


def verdict(plan: Plan, config: ConfigDict) -> list[str]:
    """Returns the lines that say what to do."""
    lines = [plan.limit] if plan.limit else []
    for name, found in (("published algorithm", plan.published), ("ours", plan.ours)):
        lines.append(f"{name:21}{f'stages {_say(found)}' if found else 'not even the last stage fits'}")
    if plan.ours is None:
        return [*lines, "Lower --config.batch_size or set --config.accumulate_steps=2, and plan again."]
    return [*lines, f"{'set':21}{' '.join(f'--config.{x}' for x in overrides(config, plan.ours))}"]


def overrides(config: ConfigDict, stages: Sequence[int]) -> list[str]:
    """Returns the ``key=value`` that make a config augment these stages.

    What attends at half its resolution stays so as far as it still attends.
    """
    found = [f"model.stages={_say(stages)}"]
    pooled = config.model.pooled_stages
    if pooled is not None and set(pooled) - set(stages):
        kept = [stage for stage in pooled if stage in stages]
        found.append(f"model.pooled_stages={_say(kept) if kept else '()'}")
    return found


def _check_network(config: ConfigDict) -> None:
    name = config.model.name
    if "stages" in models.entry(name).arguments():
        return
    augmented = [x for x in models.list_models("aa_*") if x.removeprefix("aa_") == name]
    remedy = f"use {augmented[0]}" if augmented else "`aaconv models 'aa_*'` lists those that take stages"
    raise ValueError(f"model.name={name!r} has no augmented stages to choose: {remedy}")


def _on_one_device(config: ConfigDict, devices: Sequence[Any]) -> ConfigDict:
    """The config of one device with its share of the batch."""
    other = config.copy_and_resolve_references()
    whole = parallel.configured_mesh(config.mesh, devices) if len(devices) > 1 else None
    parts = parallel.batch_devices(whole) if whole is not None else 1
    for key in ("batch_size", "eval_batch_size"):
        if whole is not None:
            parallel.check_batch(key, config[key], whole, config.accumulate_steps if key == "batch_size" else 1)
        other[key] = max(1, config[key] // parts)
    for key in ("data", "fsdp", "spatial"):
        other.mesh[key] = 1
    other.mesh.batch_norm_devices = -1
    return other


def _number_of_stages(built: train.Run) -> int:
    with programs.tracing(built):
        names = programs.summary_of(built).by_stage()
    return max(int(match[1]) for name in names if (match := re.fullmatch(r"stage(\d+)", name)))


def _possible(config: ConfigDict, devices: Sequence[Any], total: int) -> tuple[list[tuple[int, ...]], str]:
    """The sets of stages that the network can augment, from the last alone, and why there are no more.

    The first stages have few channels: a share of them may be less than one a head. Asked before anything is compiled.

    Raises:
      ValueError: not even the last stage can be augmented.
    """
    sets: list[tuple[int, ...]] = []
    for first in range(total, 0, -1):
        stages = tuple(range(first, total + 1))
        try:
            built = programs.build(_with_stages(config, stages), devices[:1])
            with programs.tracing(built):
                programs.summary_of(built)
        except ValueError as error:
            if not sets:
                raise
            return sets, f"stage {first} cannot be augmented: {error}"
        sets.append(stages)
    return sets, ""


def _with_stages(config: ConfigDict, stages: Sequence[int]) -> ConfigDict:
    other = config.copy_and_resolve_references()
    other.model.stages = tuple(stages)
    if config.model.pooled_stages is not None:
        other.model.pooled_stages = tuple(x for x in config.model.pooled_stages if x in stages)
    return other


def _compile(
    config: ConfigDict, devices: Sequence[Any], stages: tuple[int, ...], implementation: str | None
) -> tuple[Program, str]:
    other = _with_stages(config, stages)
    other.model.implementation = implementation
    built = programs.build(other, devices[:1])
    with programs.tracing(built):
        names = dict.fromkeys(x.choice.implementation for x in programs.summary_of(built).attention)
    return programs.compile_program(built, TRAINING), " and ".join(names)


def _fit(program: Program, memory: int) -> str:
    if program.total is None:
        return "does not fit"
    spare = memory - program.total
    return f"fits, {page.gibibytes(spare)} to spare" if program.fits(memory) else f"{page.gibibytes(-spare)} too much"


def _say(stages: Sequence[int]) -> str:
    return ",".join(map(str, stages))


def _write(path: str, config: ConfigDict) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(train.to_json(config))
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written ({error.strerror}): name another file") from error
