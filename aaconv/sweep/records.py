"""What a sweep's workdir holds, and who may write it.

``sweep.json`` says what the trials are; ``trials/NAME/`` is the workdir of one, with a ``trial.json`` that lists its
attempts. Whoever runs a trial holds a lock on its folder, which ends with the process, however that ends: so whether
a trial runs is never a matter of what a file says. Every file is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from aaconv import config as config_lib
from aaconv.sweep.description import LONGEST_NAME, Trial

if TYPE_CHECKING:
    from aaconv.config import ConfigDict as Config

SWEEP, HALVING = "sweep.json", "halving.json"
TRIAL, PROGRESS, OUTPUT = "trial.json", "progress.json", "output.txt"
FINISHED, FAILED, KILLED, STOPPED, PAUSED = "finished", "failed", "killed", "stopped", "paused"
"""Outcomes of an attempt; one that has none yet runs, or its process ended without a word."""
DEFAULT_METRIC = "eval/accuracy"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep as its workdir knows it.

    Attributes:
      workdir: absolute.
      base: the config that trials override.
      trials: in the order of the description; earlier ones of the workdir that are finished and not described any
        more come after them.
      until: the step at which a trial pauses, by its name; others run to their end.
    """

    workdir: Path
    base: Config
    trials: tuple[Trial, ...]
    until: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def metric(self) -> str:
        """What trials are ranked by."""
        return self.base.checkpoint.best_metric or DEFAULT_METRIC

    def folder(self, trial: Trial) -> Path:
        """Returns the workdir of a trial."""
        return self.workdir / "trials" / trial.name

    def part(self, names: Iterable[str], until: Mapping[str, int]) -> Sweep:
        """Returns the sweep of some of the trials, which pause at the steps of ``until``."""
        wanted = set(names)
        chosen = tuple(trial for trial in self.trials if trial.name in wanted)
        return dataclasses.replace(self, trials=chosen, until=dict(until))

    def config(self, trial: Trial) -> Config:
        """Returns the whole config of a trial."""
        return config_lib.override(self.base, trial.overrides, where=trial.name)

    def identity(self, trial: Trial) -> str:
        """Returns what two trials have in common that are the same run, whatever they are called."""
        return self.config(trial).to_json_best_effort()

    def columns(self) -> list[str]:
        """Returns every key that some trial overrides, the seed last."""
        from aaconv.sweep.description import order

        return order({key for trial in self.trials for key in trial.overrides})

    def values(self, trial: Trial) -> dict[str, Any]:
        """Returns a trial's values of `columns`, those of the base where it overrides nothing."""
        base = dict(config_lib.items(self.base))
        return {key: trial.overrides.get(key, base[key]) for key in self.columns()}

    def cell(self, trial: Trial) -> dict[str, Any]:
        """Returns a trial's `values` without the seed: those that it shares with the trials of its cell."""
        return {key: value for key, value in self.values(trial).items() if key != "seed"}


def local(workdir: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a sweep's workdir.

    Raises:
      ValueError: it is no folder but in a bucket, which has no locks.
    """
    if "://" in os.fspath(workdir):
        raise ValueError(
            f"workdir {os.fspath(workdir)!r} is in a bucket, which has no locks for a sweep to share its trials by: "
            "name a folder, which may be on a disk that hosts share"
        )
    return Path(workdir).expanduser().absolute()


def load(workdir: str | os.PathLike[str]) -> Sweep:
    """Reads the sweep that a workdir holds.

    Raises:
      ValueError: it holds none.
    """
    folder = local(workdir)
    try:
        found = json.loads((folder / SWEEP).read_text())
        trials = tuple(Trial(**trial) for trial in found["trials"])
        trials = tuple(
            dataclasses.replace(trial, overrides=config_lib.typed(trial.overrides, where=SWEEP)) for trial in trials
        )
        base = config_lib.override(ConfigDict(found["base"]), {}, where=SWEEP)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no sweep: name the --workdir of one, or begin it with `aaconv sweep --config FILE`"
        ) from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder / SWEEP} is not the description of a sweep: move it away, or name a new --workdir"
        ) from error
    return Sweep(folder, base, trials)


@contextlib.contextmanager
def opened(
    workdir: Path, base: Config, trials: Sequence[Trial], note: Callable[[str], None] = lambda text: None
) -> Iterator[Sweep]:
    """Writes down what a workdir's trials are, and keeps others from changing it meanwhile.

    Others with the same description may enter: they share the trials.

    Args:
      workdir: an existing folder.
      base: what the trials override.
      trials: that there shall be. Others that were finished in the workdir before stay in the sweep.
      note: gets lines about what is not as one might expect.

    Raises:
      ValueError: the workdir holds something else, or trials of another config, or somebody runs another description.
    """
    _refuse_single_run(workdir)
    with (workdir / ".sweep.lock").open("a") as file:
        sweep, written = None, {}
        if flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            sweep = _merged(workdir, base, trials, note)
            listed = [dataclasses.asdict(trial) for trial in sweep.trials]
            written = json.loads(json.dumps({"base": base.to_dict(), "trials": listed}))
            write_json(workdir / SWEEP, written)
        # The one lock ends before the other begins, see flock(2): somebody may have come in between.
        flock(file, fcntl.LOCK_SH)
        if sweep is None or read_json(workdir / SWEEP) != written:
            # Somebody is at work: the same is joined, another is not.
            sweep = load(workdir)
            if not _same(sweep, base, trials):
                raise ValueError(
                    f"another process is running a sweep with other trials in {workdir}: wait for it, stop it, or give "
                    "the same description to help it"
                )
            note(f"another process is running this sweep in {workdir}: the trials are shared with it")
        yield sweep


def checked(
    workdir: Path, base: Config, trials: Sequence[Trial], note: Callable[[str], None] = lambda text: None
) -> Sweep:
    """Returns the sweep that `opened` would give, and writes nothing; arguments and errors as there."""
    _refuse_single_run(workdir)
    return _merged(workdir, base, trials, note)


def _refuse_single_run(workdir: Path) -> None:
    if (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} is the workdir of a single run: name another --workdir for the sweep")


@contextlib.contextmanager
def joined(workdir: Path) -> Iterator[Sweep]:
    """Reads the sweep of a workdir and keeps its description as it is meanwhile.

    Raises:
      ValueError: it holds none.
    """
    with (workdir / ".sweep.lock").open("a") as file:
        flock(file, fcntl.LOCK_SH)
        yield load(workdir)


def _merged(workdir: Path, base: Config, trials: Sequence[Trial], note: Callable[[str], None]) -> Sweep:
    sweep = Sweep(workdir, base, tuple(trials))
    if (workdir / SWEEP).exists():
        old = load(workdir)
        # Runs are the same that differ in nothing but in what changes no result, unless that is what is swept.
        varied = {key for trial in (*old.trials, *trials) for key in trial.overrides}
        same = lambda of, trial: json.dumps(
            [
                item
                for item in config_lib.items(of.config(trial))
                if item[0] in varied or not _changes_no_result(item[0])
            ]
        )
        ran = {same(old, trial): trial for trial in old.trials if read_json(old.folder(trial) / TRIAL)}
        new = [(same(sweep, trial), trial) for trial in trials]
        # What ran under another name, as with fewer keys overridden, keeps its folder; what is new leaves it alone.
        taken = {trial.name for trial in ran.values()}
        name = lambda key, trial: ran[key].name if key in ran else _free_name(trial.name, key, taken)
        trials = [dataclasses.replace(trial, name=name(key, trial)) for key, trial in new]
        names = {trial.name for trial in trials}
        finished = lambda trial: bool(read_json(old.folder(trial) / TRIAL).get("values"))
        before = [trial for trial in ran.values() if trial.name not in names and finished(trial)]
        sweep = dataclasses.replace(sweep, trials=tuple(trials))
        swept = [set(trial.overrides) for trial in [*before, *trials]]
        shared = set.intersection(*swept) if swept else set()
        others = {key: values for key, values in changes(old.base, base).items() if key not in shared}
        if others and any(read_json(old.folder(trial) / TRIAL) for trial in old.trials):
            raise ValueError(
                f"{workdir} holds trials of another config ({spell_changes(others)}): name a new --workdir, or set "
                "these keys back"
            )
        if before:
            sweep = dataclasses.replace(sweep, trials=(*trials, *before))
            few = ", ".join(trial.name for trial in before[:3]) + (" ..." if len(before) > 3 else "")
            note(f"{len(before)} finished trials are not described any more and stay in the table: {few}")
    changed = {trial.name: found for trial in sweep.trials if (found := changes_since(sweep, trial))}
    if changed:
        name, found = next(iter(changed.items()))
        several = f"{len(changed)} trials, the first of them {name}," if len(changed) > 1 else f"trial {name}"
        raise ValueError(
            f"{several} ran with another config ({spell_changes(found)}): set it back, name a new --workdir, or delete "
            f"{workdir / 'trials' / name} to run it anew"
        )
    return sweep


def _free_name(name: str, identity: str, taken: Collection[str]) -> str:
    """Returns a trial's name, with a checksum of what it is where another one ran under that name."""
    if name not in taken:
        return name
    return f"{name[: LONGEST_NAME - 9]}~{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _same(sweep: Sweep, base: Config, trials: Sequence[Trial]) -> bool:
    if changes(sweep.base, base):
        return False
    described = {sweep.identity(trial) for trial in sweep.trials}
    return {sweep.identity(trial) for trial in trials} <= described


# Another config


def changes(old: Config | Mapping[str, Any], new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns what differs between two configs and may change a result: ``{dotted key: (old value, new value)}``."""
    from aaconv import train

    as_dict = lambda config: json.loads(train.to_json(config)) if isinstance(config, ConfigDict) else config
    found = train.config_changes(as_dict(old), as_dict(new))
    return {key: values for key, values in found.items() if not _changes_no_result(key)}


def _changes_no_result(key: str) -> bool:
    from aaconv import train

    # A single run may be lengthened; trials of different lengths cannot be compared.
    return key.startswith(tuple(name for name in train.CONTINUABLE if name not in ("num_epochs", "num_steps")))


def changes_since(sweep: Sweep, trial: Trial) -> dict[str, tuple[Any, Any]]:
    """Returns what differs between the config that a trial ran with, if it ran, and the one it has now."""
    ran_with = read_json(sweep.folder(trial) / "config.json")
    return changes(ran_with, sweep.config(trial)) if ran_with else {}


def spell_changes(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Says ``key was 1, is 2`` of each, of the first five at most."""
    said = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in found.items()]
    return ", ".join(said[:5]) + (f" and {len(said) - 5} more" if len(said) > 5 else "")


# Who runs a trial


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Takes a trial for this process, until the context ends; gives False where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".trial.lock") as mine:
        yield mine


def is_claimed(folder: Path) -> bool:
    """Whether some process runs a trial."""
    try:
        with (folder / ".trial.lock").open() as file:
            return not flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Locks a file for this process, until the context ends; gives False where another process has it."""
    with path.open("a") as file:
        for patience in (0.02, 0.05, 0):
            if flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield True
                return
            time.sleep(patience)  # somebody may only be looking, as `is_claimed` does
        yield False


def has_locks(folder: Path) -> bool:
    """Whether the file system of a folder has locks, without which two processes would run the same trial."""
    with tempfile.NamedTemporaryFile(dir=folder) as one, open(one.name) as other:
        flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flock(file: Any, operation: int) -> bool:
    """Does as `fcntl.flock`, and tells whether that was possible without waiting.

    On a file system without locks, as some network file systems are, everybody gets what they ask for.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


# Files


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is whole at any time."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else the name may be on the disk before the content, when the machine goes down
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that `write_json` wrote; {} where there is none.

    Raises:
      ValueError: it is not JSON.
    """
    for patience in (0.02, 0.1, 0.5, 0):
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            break
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}): move this file away") from error
        except OSError as error:
            # Over NFS: another host put a new file in the place of the one that was opened.
            if error.errno != errno.ESTALE or not patience:
                raise
        time.sleep(patience)
    return {}


def last_lines(path: Path, number: int = 10) -> str:
    """Returns the last lines of a text file that may be long, or not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-number:])
    except FileNotFoundError:
        return ""


# How trials stand


@dataclasses.dataclass(frozen=True)
class Status:
    """How a trial stands.

    Attributes:
      trial: which.
      state: ``waiting`` (not begun), ``running``, ``finished``, ``failed``, ``interrupted`` (goes on when the sweep is
        started again), ``paused`` (until it is compared with others) or ``eliminated`` (by that comparison).
      attempts: times it was started.
      step: completed updates, of ``total_steps``; both 0 where nothing is known.
      total_steps: updates of the whole run; 0 where nothing is known.
      seconds: of all attempts together.
      values: the last ones of each metric.
      error: why the last attempt failed, "" where it did not.
      process: ``HOST:PID`` of the last attempt.
    """

    trial: Trial
    state: str
    attempts: int
    step: int
    total_steps: int
    seconds: float
    values: dict[str, float]
    error: str
    process: str


def statuses(sweep: Sweep) -> list[Status]:
    """Returns how each trial stands now."""
    out = eliminated(sweep.workdir)
    return [_status(sweep, trial, trial.name in out) for trial in sweep.trials]


def status(sweep: Sweep, trial: Trial) -> Status:
    """Returns how a trial stands now."""
    return _status(sweep, trial, trial.name in eliminated(sweep.workdir))


def eliminated(workdir: Path) -> dict[str, int]:
    """Returns the trials that successive halving has stopped, with the number of the rung, from 0."""
    rungs = read_json(workdir / HALVING).get("rungs", [])
    return {name: number for number, rung in enumerate(rungs) for name in rung["eliminated"]}


def _status(sweep: Sweep, trial: Trial, is_eliminated: bool) -> Status:
    folder = sweep.folder(trial)
    claimed, record = is_claimed(folder), read_json(folder / TRIAL)
    if claimed != is_claimed(folder):  # begun or ended in between
        claimed, record = is_claimed(folder), read_json(folder / TRIAL)
    progress = read_json(folder / PROGRESS)
    attempts = record.get("attempts", [])
    last: dict[str, Any] = attempts[-1] if attempts else {}
    outcome = last.get("outcome", "")
    if record.get("values"):
        state = FINISHED
    elif claimed and not outcome and last:
        state = "running"
    elif is_eliminated and outcome not in (FAILED, KILLED):
        state = "eliminated"
    else:
        known = {"": "interrupted" if last else "waiting", STOPPED: "interrupted", PAUSED: "paused"}
        state = known.get(outcome, FAILED)
    seconds = sum(attempt.get("seconds") or 0 for attempt in attempts)
    if state == "running":
        seconds += time.time() - last["started"]
    return Status(
        trial=trial,
        state=state,
        attempts=len(attempts),
        step=progress.get("step", 0),
        total_steps=progress.get("total_steps", 0),
        seconds=seconds,
        values=_numbers(record.get("values") or progress.get("values", {})),
        error=last.get("error", "") if state == FAILED else "",
        process=last.get("process", ""),
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}
