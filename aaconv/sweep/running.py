"""Runs the trials of a sweep: here one after another, in several local processes, or (`slurm`) as jobs of a cluster.

Every process that runs trials does the same, `work`: it takes the next trial that is missing and that nobody has,
until there is none. What they have in common is the workdir alone, so a process more, of this launcher or of another,
on this machine or another one that sees the same folder, needs nobody's leave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aaconv import checkpoints, launch, metrics, train
from aaconv.sweep import records, tracking
from aaconv.sweep.description import Trial
from aaconv.sweep.records import FAILED, FINISHED, KILLED, OUTPUT, PAUSED, PROGRESS, STOPPED, TRIAL, Sweep

POLL_SECONDS = 0.3
ERROR_LINES = 12


# One trial


class _Recorder(metrics.Progress):
    """Leaves a trial's progress in its folder, for whoever looks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written, self._step, self._total = -math.inf, 0, 0
        self._values: dict[str, float | None] = {}

    def start(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self.update(step)

    def update(self, step: int) -> None:
        self._step = step
        if time.monotonic() - self._written > 1:
            self._write()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._values |= _without_nan(values)
        self._write()

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError), (self._folder / OUTPUT).open("a") as file:
            print(text, file=file)

    def stop(self) -> None:
        self._write()

    def _write(self) -> None:
        found = {"step": self._step, "total_steps": self._total, "values": self._values}
        with contextlib.suppress(OSError):  # What cannot be written is said by the run itself, at its next row.
            records.write_json(self._folder / PROGRESS, found)
        self._written = time.monotonic()


def run_trial(sweep: Sweep, trial: Trial, *, capture: bool = False, job: str = "") -> str:
    """Trains one trial, which this process has claimed, and records how it went.

    Args:
      sweep: of the trial; says whether it pauses on the way.
      trial: which.
      capture: whether all that the process prints goes to the trial's ``output.txt``, and not only the run's notes.
      job: number of the job of Slurm that this process is of.

    Returns:
      The outcome, ``finished``, ``paused`` or ``failed``.

    Raises:
      Preempted: a signal asked to stop, after the state was saved.
      ValueError: how it went cannot be written down.
    """
    import jax

    from aaconv.bench import report

    folder = sweep.folder(trial)
    record = close_open_attempt(sweep, trial)
    attempt: dict[str, Any] = {"started": time.time(), "process": this_process(), **({"job": job} if job else {})}
    record |= {"name": trial.name, "overrides": trial.overrides}
    record["attempts"] = [*record.get("attempts", []), attempt]
    records.write_json(folder / TRIAL, record)
    recorder = _Recorder(folder)
    until = sweep.until.get(trial.name)
    try:
        attempt |= report.machine()  # a GPU that does not start is a failure as well
        records.write_json(folder / TRIAL, record)
        tracking.write_hparams(sweep, trial)
        where = f"process {attempt['process']}" + (f", Slurm's job {job}" if job else "")
        recorder.note(f"--- attempt {len(record['attempts'])}, {attempt['date']}, {where}")
        with _printing_to(folder / OUTPUT) if capture else contextlib.nullcontext():
            values = train.train(sweep.config(trial), folder, progress=recorder, pause_step=until)
        if until is None:
            record["values"] = _without_nan(values)
            attempt["outcome"] = FINISHED
        else:
            rungs = record.setdefault("rungs", {})
            rungs[str(until)] = _without_nan(_evaluated_at(folder, until))
            attempt["outcome"] = PAUSED
    except Exception as error:
        if isinstance(error, train.Preempted):
            attempt["outcome"] = STOPPED
            raise
        attempt["outcome"], attempt["error"] = FAILED, _explained(error)
        recorder.note(attempt["error"])
    except BaseException:  # interrupted at once
        attempt["outcome"] = STOPPED
        raise
    finally:
        attempt["seconds"] = round(time.time() - attempt["started"], 3)
        attempt["saved_step"] = max(checkpoints.finished_steps(folder), default=0)
        _write_record(folder / TRIAL, record)
        tracking.write_hparams(sweep, trial)
        jax.clear_caches()  # Other networks' programs would only fill the memory.
    return attempt["outcome"]


def _write_record(file: Path, record: Mapping[str, Any]) -> None:
    try:
        records.write_json(file, record)
    except OSError as error:
        last = record["attempts"][-1]
        raise ValueError(
            f"{file} cannot be written ({error.strerror or error}): make it possible and run the same command again; "
            f"this attempt {last['outcome']}: {last.get('error', 'without an error')}"
        ) from error


def _evaluated_at(folder: Path, step: int) -> dict[str, float]:
    for row in metrics.read_rows(folder):
        if row["step"] == step and "eval/loss" in row:
            return row
    raise ValueError(
        f"the run in {folder} is past step {step}, where trials are compared, and was not evaluated there: give "
        "another --halving, or name a new --workdir"
    )


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Sends what this process prints, libraries in C++ included, to the end of a file."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def _explained(error: Exception) -> str:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, ValueError | NotImplementedError | OSError | train.NonFiniteLossError):
        return said
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-ERROR_LINES:])


def close_open_attempt(sweep: Sweep, trial: Trial, reason: str = "") -> dict[str, Any]:
    """Records that the last attempt's process died, if it did; for who has claimed the trial.

    Returns:
      What ``trial.json`` holds then.
    """
    folder = sweep.folder(trial)
    record = records.read_json(folder / TRIAL)
    attempts = record.get("attempts", [])
    if not attempts or "outcome" in attempts[-1]:
        return record
    last = attempts[-1]
    reason = reason or "its process ended without a word: killed, out of memory, or the machine went down"
    lines = records.last_lines(folder / OUTPUT, ERROR_LINES - 1)
    last["outcome"], last["error"] = KILLED, f"{lines}\n{reason}".strip()
    for name in (OUTPUT, PROGRESS):
        with contextlib.suppress(FileNotFoundError):
            last["seconds"] = max(last.get("seconds", 0), (folder / name).stat().st_mtime - last["started"])
    last["saved_step"] = max(checkpoints.finished_steps(folder), default=0)
    records.write_json(folder / TRIAL, record)
    return record


def fail_if_stalled(sweep: Sweep, trial: Trial, job: str) -> bool:
    """Records that a trial failed of whose job three attempts in a row ended without a step saved in between.

    Without that such a job, whose time limit ends before its first step, say, would go round for ever.

    Args:
      sweep: of the trial.
      trial: which; this process has claimed it.
      job: number of the job of Slurm that this process is of.

    Returns:
      Whether it was so.
    """
    record = close_open_attempt(sweep, trial)
    ended = [attempt for attempt in record.get("attempts", []) if attempt.get("job") == job][-3:]
    if len(ended) < 3 or any(attempt["outcome"] not in (STOPPED, KILLED) for attempt in ended):
        return False
    first, *_, step = (attempt.get("saved_step", 0) for attempt in ended)
    if step > first:
        return False
    ended[-1]["outcome"] = FAILED
    ended[-1]["error"] = (
        f"its job {job} of Slurm was queued again three times and saved no step in between, after step {step}: give a "
        "longer --time, or a --save-seconds that leaves more of it; where compiling takes that long, "
        "--setup 'export JAX_COMPILATION_CACHE_DIR=FOLDER' keeps what is compiled; where it is preempted that often, "
        "save more often, --config.checkpoint.every_steps"
    )
    records.write_json(sweep.folder(trial) / TRIAL, record)
    return True


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no nan.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def this_process() -> str:
    """Returns ``HOST:PID``."""
    return f"{platform.node()}:{os.getpid()}"


# One process


def work(
    sweep: Sweep, *, retries: int, since: float, is_stopped: Callable[[], bool], wait: bool, capture: bool = False
) -> None:
    """Runs one missing trial after another.

    Args:
      sweep: all processes on it have the same.
      retries: times a trial is tried again after a failure; failures from before ``since`` do not count.
      since: when the launcher started, in seconds of `time.time`.
      is_stopped: whether to begin no further trial.
      wait: until trials that other processes have are finished, or their processes ended and they can be taken over;
        else returns when others have all that is left.
      capture: as for `run_trial`.

    Raises:
      Preempted: a signal asked to stop.
    """
    while not is_stopped():
        missing = unsettled(sweep, retries, since)
        if not missing:
            return
        for trial in missing:
            with records.claim(sweep.folder(trial)) as mine:
                # Somebody may have run it since it was looked at.
                if mine and failures(sweep, trial, since, close=True) <= retries and not is_finished(sweep, trial):
                    run_trial(sweep, trial, capture=capture)
                    break
        else:
            if not wait:
                return
            time.sleep(POLL_SECONDS)
    raise train.Preempted("stopped between two trials")


def unsettled(sweep: Sweep, retries: int, since: float) -> list[Trial]:
    """Returns the trials that are not finished and may be tried or are being tried, those that failed at the end."""
    counted = [(failures(sweep, trial, since), trial) for trial in sweep.trials if not is_finished(sweep, trial)]
    return [
        trial
        for count, trial in sorted(counted, key=lambda pair: pair[0])
        if count <= retries or records.is_claimed(sweep.folder(trial))
    ]


def is_finished(sweep: Sweep, trial: Trial) -> bool:
    """Whether a trial's result is there, or that of the step where it pauses."""
    record = records.read_json(sweep.folder(trial) / TRIAL)
    return bool(record.get("values")) or str(sweep.until.get(trial.name)) in record.get("rungs", {})


def failures(sweep: Sweep, trial: Trial, since: float, *, close: bool = False) -> int:
    """Returns how many attempts that began after ``since`` failed.

    Args:
      sweep: of the trial.
      trial: which.
      since: in seconds of `time.time`.
      close: whether this process has claimed the trial, so that an attempt without an end has failed.
    """
    record = close_open_attempt(sweep, trial) if close else records.read_json(sweep.folder(trial) / TRIAL)
    attempts = [attempt for attempt in record.get("attempts", []) if attempt["started"] >= since]
    return sum(attempt.get("outcome") in (FAILED, KILLED) for attempt in attempts)


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """Keeps what this process compiles: trials that differ in their seed alone have the same programs.

    In jax's persistent cache, in a folder that goes with the context; where jax has been given a folder, it is left so.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    if config.jax_compilation_cache_dir:
        yield
        return
    seconds = config.jax_persistent_cache_min_compile_time_secs
    with tempfile.TemporaryDirectory(prefix="aaconv_sweep_") as folder:
        config.update("jax_compilation_cache_dir", folder)
        config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # a second by default
        try:
            yield
        finally:
            config.update("jax_compilation_cache_dir", None)
            config.update("jax_persistent_cache_min_compile_time_secs", seconds)
            compilation_cache.reset_cache()


# The launcher


def run(
    sweep: Sweep,
    *,
    jobs: int = 1,
    retries: int = 0,
    parts: Callable[[Sweep], Iterable[Sweep]] | None = None,
    cluster: Callable[..., None] | None = None,
    displayed: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    note: Callable[[str], None] = lambda text: None,
) -> list[records.Status]:
    """Runs what is missing of a sweep.

    Args:
      sweep: as of `aaconv.sweep.records.opened`.
      jobs: 1: one trial after another in this process. More: so many processes, with the processors and GPUs divided
        among them.
      retries: times that a trial is tried again after it failed or its process died.
      parts: gives what is run, one part after another, as `aaconv.sweep.halving.Halving.parts` does; by default all.
      cluster: runs a part elsewhere, as `aaconv.sweep.slurm.Cluster.run` does.
      displayed: shows how it goes while its context lasts.
      note: gets a line at once when a signal came, for what runs may take a while to stop.

    Returns:
      How each trial stands; ``failed`` are those that failed in each attempt.

    Raises:
      Preempted: SIGTERM or SIGINT asked to stop, and the running trials saved their state; those of a cluster go on.
    """
    with train.Signals() as signals:
        try:
            with displayed(), compiling_once(), _saying_what_stops(signals, note if cluster is None else None):
                for part in parts(sweep) if parts else [sweep]:
                    since = time.time()  # a failure at an earlier rung is no attempt at this one
                    if cluster is not None:
                        cluster(part, retries=retries, since=since, signals=signals)
                    elif jobs == 1:
                        stopped = lambda: signals.caught is not None
                        work(part, retries=retries, since=since, is_stopped=stopped, wait=True)
                    else:
                        _Workers(part, jobs, retries, since).run(signals)
        except train.Preempted as error:
            done = sum(is_finished(sweep, trial) for trial in sweep.trials)
            rest = "what ran was saved; the same command goes on" if cluster is None else str(error)
            raise train.Preempted(
                f"stopped by {signals.name}: {done} of {len(sweep.trials)} trials are finished, {rest}"
            ) from error
    return records.statuses(sweep)


@contextlib.contextmanager
def _saying_what_stops(signals: train.Signals, note: Callable[[str], None] | None) -> Iterator[None]:
    ended = threading.Event()

    def wait() -> None:
        while signals.caught is None:
            if ended.wait(POLL_SECONDS):
                return
        if note is not None:
            again = "; once more ends it at once" if signals.caught == signal.SIGINT else ""
            note(f"{signals.name}: what runs is saved first, and what compiles is compiled before that{again}")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Workers:
    """The processes of one launcher, each begun again when it died and trials are missing."""

    def __init__(self, sweep: Sweep, jobs: int, retries: int, since: float) -> None:
        self._sweep, self._jobs, self._retries, self._since = sweep, jobs, retries, since
        self._shares = shares(jobs, visible_processors(), visible_gpus())
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by slot, whose share of the machine it has
        self._died_idle = 0

    def run(self, signals: train.Signals) -> None:
        try:
            while signals.caught is None:
                self._bury()
                missing = unsettled(self._sweep, self._retries, self._since)
                if not missing and not self._processes:
                    return
                wanted = min(self._jobs, len(missing) - sum(map(self._is_elsewhere, missing)))
                free = [slot for slot in range(self._jobs) if slot not in self._processes]
                for slot in free[: max(0, wanted - len(self._processes))]:
                    self._processes[slot] = self._start(slot)
                time.sleep(POLL_SECONDS)
            raise train.Preempted("stopped")
        except Exception:  # Whatever ends the launcher, what runs is saved; a second ctrl-C does not wait for it.
            self._stop()
            raise
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait()

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        task = {
            "workdir": str(self._sweep.workdir),
            "trials": [trial.name for trial in self._sweep.trials],
            "until": dict(self._sweep.until),
            "retries": self._retries,
            "since": self._since,
        }
        share = self._shares[slot]
        with self._output(slot).open("wb") as output, _only(share.processors):
            process = subprocess.Popen(
                [sys.executable, "-m", "aaconv.sweep"],
                env={**os.environ, **share.environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # ctrl-C in a terminal reaches the launcher alone, which passes it on
            )
        assert process.stdin is not None
        # The pipe stays open: its end tells the process that the launcher has ended.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        return process

    def _output(self, slot: int) -> Path:
        return self._sweep.workdir / f".worker{slot}.txt"

    def _bury(self) -> None:
        for slot, process in list(self._processes.items()):
            if process.poll() is None:
                continue
            del self._processes[slot]
            _close_pipe(process)
            if process.returncode in (0, launch.SAVED) or self._record_death(process):
                self._died_idle = 0
                continue
            self._died_idle += 1
            if self._died_idle > 2:
                lines = records.last_lines(self._output(slot), ERROR_LINES)
                raise ValueError(f"the processes of the sweep end before they begin a trial:\n{lines}")

    def _record_death(self, process: subprocess.Popen[bytes]) -> bool:
        """Records with what a process died, at the trial that it ran; returns whether it ever began one."""
        name = f"{platform.node()}:{process.pid}"
        if process.returncode < 0:
            reason = f"its process ended by {signal.Signals(-process.returncode).name}"
            reason += " (out of memory?)" if process.returncode == -signal.SIGKILL else ""
        else:
            reason = f"its process ended with exit code {process.returncode}"
        begun = False
        for trial in self._sweep.trials:
            folder = self._sweep.folder(trial)
            attempts = records.read_json(folder / TRIAL).get("attempts") or [{}]
            begun |= any(attempt.get("process") == name for attempt in attempts)
            if attempts[-1].get("process") == name and "outcome" not in attempts[-1]:
                with records.claim(folder) as mine:
                    if mine:
                        close_open_attempt(self._sweep, trial, reason)
        return begun

    def _is_elsewhere(self, trial: Trial) -> bool:
        status = records.status(self._sweep, trial)
        own = {f"{platform.node()}:{process.pid}" for process in self._processes.values()}
        return status.state == "running" and status.process not in own

    def _stop(self) -> None:
        """Has every process save its trial and end."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait()
            _close_pipe(process)
        self._processes.clear()


def _close_pipe(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


# A process of the launcher


def worker() -> int:
    """What a process of the launcher does: reads its task from standard input, and works.

    Returns:
      The exit code: 0, or 75 when it was asked to stop.
    """
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    sweep = records.load(task["workdir"]).part(task["trials"], task["until"])
    with train.Signals() as signals, compiling_once():
        try:
            work(
                sweep,
                retries=task["retries"],
                since=task["since"],
                is_stopped=lambda: signals.caught is not None,
                wait=False,
                capture=True,
            )
        except train.Preempted:
            return launch.SAVED
    return 0


def _end_with_the_launcher() -> None:
    # The other end of the pipe closes with the launcher, however that ended: what runs is saved.
    # Not through sys.stdin, whose lock Python wants at its end.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of several processes has of this machine.

    Attributes:
      processors: their numbers; empty where the system does not divide them.
      environment: beside the launcher's.
    """

    processors: tuple[int, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def shares(jobs: int, processors: Sequence[int], gpus: Sequence[str]) -> list[Share]:
    """Divides a machine among processes: each has processors and GPUs of its own as long as there are enough.

    Args:
      jobs: processes.
      processors: that there are.
      gpus: likewise, as ``CUDA_VISIBLE_DEVICES`` names them. Where there are fewer than processes, each process's
        memory on its GPU is limited to its part.

    Example:
      >>> for share in shares(2, range(5), ["0", "1", "2"]):
      ...     print(share.processors, share.environment)
      (0, 2, 4) {'CUDA_VISIBLE_DEVICES': '0,2'}
      (1, 3) {'CUDA_VISIBLE_DEVICES': '1'}
      >>> shares(3, [0], ["0", "1"])[2].environment
      {'CUDA_VISIBLE_DEVICES': '0', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.45'}
    """

    def part(things: Sequence[Any], job: int) -> Sequence[Any]:
        return things[job::jobs] if len(things) >= jobs else things[job % len(things) :][:1] if things else []

    found = []
    for job in range(jobs):
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(part(gpus, job))} if gpus else {}
        together = len(range(job % len(gpus), jobs, len(gpus))) if gpus else 1
        if together > 1:
            # jax takes three quarters of a GPU's memory at its start, which serves one process.
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / together:.2f}"
        found.append(Share(tuple(part(processors, job)), environment))
    return found


def visible_processors() -> list[int]:
    """Returns the processors that this process may use; [] where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the NVIDIA GPUs that jax would see, as ``CUDA_VISIBLE_DEVICES`` names them, without starting jax."""
    platforms = environment.get("JAX_PLATFORMS") or "cuda"
    if not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    command = shutil.which("nvidia-smi")
    listed = subprocess.run([command, "-L"], capture_output=True, text=True).stdout if command else ""
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


@contextlib.contextmanager
def _only(processors: Sequence[int]) -> Iterator[None]:
    """Keeps this thread, and so the processes it starts, to some processors."""
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
