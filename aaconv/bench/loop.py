"""What the training loop costs beside the steps it runs: ``aaconv bench loop``."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax

from aaconv import metrics, parallel, train
from aaconv.bench import report, timing
from aaconv.config import ConfigDict

ROUNDS, STEPS = 5, 200
FAR = 10**6  # epochs: no evaluation and no checkpoint before that

Note = Callable[[str], None]


@dataclasses.dataclass
class Row:
    """One config; the columns of ``loop.csv``, after the machine's.

    Attributes:
      config, overrides: what was run.
      network, data, placement: of it.
      batch: images a step.
      devices: of the mesh.
      log_every_steps: how often the loop logs, which is when the two ways take turns.
      steps: of a round, each way.
      rounds: how many.
      loop_s, bare_s: median seconds of a round's steps by `aaconv.train.train`, and of as many calls of the
        compiled step on one batch that lies on the devices; ``_q1`` and ``_q3`` the quartiles.
      ratio: median over the rounds of one by the other, each round's two being taken in turn.
      input_wait_share: of the loop's time, as it logs it.
    """

    config: str
    overrides: str
    network: str
    data: str
    placement: str
    batch: int
    devices: int
    log_every_steps: int
    steps: int
    rounds: int
    loop_s: float | None = None
    loop_s_q1: float | None = None
    loop_s_q3: float | None = None
    bare_s: float | None = None
    bare_s_q1: float | None = None
    bare_s_q3: float | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    input_wait_share: float | None = None


def run(
    config: ConfigDict,
    *,
    name: str = "",
    overrides: Sequence[str] = (),
    steps: int = STEPS,
    rounds: int = ROUNDS,
    output: str | os.PathLike[str] = "runs/bench/loop",
    note: Note = lambda text: print(text, file=sys.stderr, flush=True),
) -> Row:
    """Measures a config's training loop against its bare step, prints a table, and writes ``loop.csv``.

    The loop is `aaconv.train.train` itself, in a folder that is thrown away: real data, the loop's own logging as often
    as the config says, no evaluation, no checkpoint. Whenever it has logged, when the devices have nothing left to do,
    it is held up and as many bare steps are run; so the two take turns of ``log_every_steps`` steps, and a drift of the
    machine hits both. What comes before the second row, such as compiling, does not count.

    Args:
      config: from `aaconv.config.load`.
      name: of the config, for the table.
      overrides: that it was loaded with, for the table.
      steps: of a round, rounded up to whole turns.
      rounds: how many.
      output: folder of the file.
      note: gets lines of progress.

    Raises:
      ValueError: the config cannot be run, or the folder cannot be written.
    """
    turns = math.ceil(steps / config.log_every_steps)
    config = _endless(config, (2 + rounds * turns) * config.log_every_steps)
    note("compiling the bare step")
    bare = _Bare(config)
    run = bare.run
    row = Row(
        config=name,
        overrides=" ".join(overrides),
        network=config.model.name,
        data=config.data.name,
        placement=run.train.placement,
        batch=config.batch_size,
        devices=run.mesh.size,
        log_every_steps=config.log_every_steps,
        steps=turns * config.log_every_steps,
        rounds=rounds,
    )
    machine = report.machine()
    columns = [*machine, *(field.name for field in dataclasses.fields(Row))]
    with (
        report.Csv(Path(output) / "loop.csv", columns) as file,
        tempfile.TemporaryDirectory() as workdir,
        open(os.devnull, "w") as nowhere,  # a run's lines are written, and not seen
    ):
        print(report.describe(machine))
        print(
            f"{row.network} on {row.data}, from {row.placement}",
            f"{row.batch} images a step",
            f"{row.devices} device{'s' * (row.devices > 1)}",
            f"a row every {row.log_every_steps} steps",
            *overrides,
            sep=", ",
            flush=True,
        )
        paired = _Paired(bare, config.log_every_steps, turns, rounds, note, nowhere)
        with contextlib.suppress(_Enough):
            train.train(config, workdir, progress=paired)
        row.input_wait_share = paired.input_wait_share()
        for key, samples in paired.samples().items():
            times = timing.Times(samples)
            setattr(row, key, times.median)
            setattr(row, f"{key}_q1", times.quartiles[0])
            setattr(row, f"{key}_q3", times.quartiles[1])
        file.write({**machine, **dataclasses.asdict(row)})
    print(f"written {file.path}\n\n{LEGEND}\n\n{_table(row)}")
    return row


def _endless(config: ConfigDict, steps: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        # One step more, so that the last measured one is not the end, where there is an evaluation.
        config.num_epochs, config.num_steps = None, steps + 1
        config.eval_every_epochs = config.checkpoint.every_epochs = float(FAR)
        config.checkpoint.every_steps = 0
    return config


class _Bare:
    """The compiled step of a config, with a state and one batch on the devices."""

    def __init__(self, config: ConfigDict) -> None:
        self.run = train.build(config, None, None, training=True)
        replicated, split = parallel.replicated(self.run.mesh), parallel.batch_sharding(self.run.mesh)
        batches = iter(self.run.train)
        self._batch = parallel.to_global(next(batches), split)
        batches.close()
        self._resident = parallel.to_global(self.run.train.resident or {}, replicated)
        self._state = train.fresh_state(self.run)
        self._key = train.run_key(self.run)
        self._step = train.compile_step(self.run, self._state, self._batch, self._resident)
        self(2)

    def __call__(self, steps: int) -> float:
        """Returns the seconds of so many steps, handed out one after the other and waited for at the end."""
        began = time.perf_counter()
        loss: Any = None
        for _ in range(steps):
            self._state, loss = self._step(self._state, self._batch, self._resident, self._key)
        jax.block_until_ready((self._state, loss))
        return time.perf_counter() - began


class _Enough(Exception):
    """All rounds are done."""


class _Paired(metrics.Lines):
    """Runs bare steps in turn with the loop's: at each row, when the loop has waited for its devices."""

    def __init__(self, bare: _Bare, steps: int, turns: int, rounds: int, note: Note, stream: IO[str]) -> None:
        super().__init__(stream)
        self._bare, self._steps, self._turns, self._rounds, self._note = bare, steps, turns, rounds, note
        self._loop_seconds: list[float] = []
        self._bare_seconds: list[float] = []
        self._wait_seconds: list[float] = []
        self._rows = 0
        self._turn_began = 0.0

    def show(self, step: int, values: Mapping[str, float]) -> None:
        super().show(step, values)
        self._rows += 1
        if self._rows > 2:  # after the first, the loop still compiles what looks for nan
            self._loop_seconds.append(time.perf_counter() - self._turn_began)
            # The loop's clock takes the bare steps for its own: seconds are right, its share is not.
            self._wait_seconds.append(values["perf/input_wait_share"] * self._steps / values["perf/steps_per_sec"])
            self._bare_seconds.append(self._bare(self._steps))
            done, rest = divmod(len(self._loop_seconds), self._turns)
            if not rest:
                self._note(f"round {done}/{self._rounds}")
            if done == self._rounds:
                raise _Enough
        self._turn_began = time.perf_counter()

    def input_wait_share(self) -> float:
        """Returns the share of the loop's time in which it waited for a batch."""
        return sum(self._wait_seconds) / sum(self._loop_seconds)

    def samples(self) -> dict[str, list[float]]:
        """Returns what each round's steps took."""
        loop, bare = (
            [sum(seconds[start : start + self._turns]) for start in range(0, len(seconds), self._turns)]
            for seconds in (self._loop_seconds, self._bare_seconds)
        )
        return {"loop_s": loop, "bare_s": bare, "ratio": [a / b for a, b in zip(loop, bare, strict=True)]}


LEGEND = (
    "Seconds of a round's steps, medians (quartiles in brackets): by the training loop, with its data and its rows,\n"
    "and by the compiled step alone on one batch. ratio: of the two within a round. They take turns at every row."
)


def _table(row: Row) -> str:
    def spread(key: str, digits: int) -> str:
        median, low, high = (f"{getattr(row, f'{key}{end}'):.{digits}f}" for end in ("", "_q1", "_q3"))
        return f"{median} ({low}-{high})"

    columns = ["config", "steps", "loop, s", "bare, s", "ratio", "waiting for input"]
    cells = [row.config, str(row.steps), spread("loop_s", 2), spread("bare_s", 2), spread("ratio", 4)]
    return report.table(columns, [[*cells, f"{row.input_wait_share:.2%}"]])
