"""What a run is doing and how fast: a clock over its activities, a profiler window, a hang detector.

`Clock` gives each moment of a run to one activity; the rates in the log, the last line of a run and the
hang detector's report all come from it.
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from aaconv import workdirs

_TERA = 1e12

PEAK_FLOPS: Mapping[str, Mapping[str, float]] = {
    "TPU v4": {"bfloat16": 275 * _TERA, "float32": 275 * _TERA},
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), {"bfloat16": 197 * _TERA, "float32": 197 * _TERA}),
    **dict.fromkeys(("TPU v5", "TPU v5p"), {"bfloat16": 459 * _TERA, "float32": 459 * _TERA}),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), {"bfloat16": 918 * _TERA, "float32": 918 * _TERA}),
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        {"bfloat16": 312 * _TERA, "float32": 156 * _TERA},
    ),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), {"bfloat16": 989.4 * _TERA, "float32": 494.7 * _TERA}),
    "NVIDIA H100 PCIe": {"bfloat16": 756 * _TERA, "float32": 378 * _TERA},
}
"""Published peaks of one chip by `jax.Device.device_kind` and dtype, FLOPs a second, a multiply-add being 2.

float32 is what jax makes of it by default (`jax.lax.Precision.DEFAULT`): bfloat16 products on a TPU, TensorFloat-32 on
these GPUs. Without sparsity. Sources: Google Cloud's pages on TPU v4, v5e, v5p and v6e ("peak compute per chip"),
NVIDIA's data sheets of the A100, H100 and H200. A device that is not here has no known peak.
"""


HBM_BANDWIDTH: Mapping[str, float] = {
    "TPU v4": 1200e9,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 819e9),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 2765e9),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 1640e9),
}
"""Bytes a second between a chip's HBM and its cores, peak, as Google Cloud's pages gave them until 2025 ("HBM bandwidth
per chip"; newer readings of the pages round those of v5e and v6e to 800 and 1600 GB/s)."""


class Doing(enum.Enum):
    """An activity of a run, in words that say which step it is for."""

    STARTING = "starting"
    FIRST_INPUT = "waiting for the first input, of step {step}"
    COMPILING = "compiling"
    INPUT = "waiting for the input of step {step}"
    STEPPING = "step {step} on the devices"
    EVALUATING = "evaluating step {step}"
    SAVING = "saving step {step}"
    PROFILING = "writing the trace, at step {step}"


_UNLIMITED = (Doing.STARTING, Doing.COMPILING)  # a large network compiles for as long as it takes


class _Moment(NamedTuple):
    doing: Doing
    step: int
    since: float  # of time.monotonic

    def __str__(self) -> str:
        return self.doing.value.format(step=self.step)


class Clock:
    """Where the time of a run goes; every moment belongs to one activity.

    The host runs a step or two ahead of the devices, so the seconds of `Doing.STEPPING` are those in which it
    hands out steps and waits for devices, and the seconds of `Doing.INPUT` those in which it waits for a batch,
    whether or not the devices still have work. Where the devices are the slower, the second are few; where
    the input is, the first are.

    Args:
      step: completed updates at the start.
      batch_size: images a step, over all devices.
      chips: devices of the mesh.
      flops_per_image: of a training step, as of `aaconv.models.summary.Summary.training_flops`.
      peak_flops: of one chip, see `PEAK_FLOPS`; None where it is unknown: then no utilisation is given.
    """

    def __init__(
        self, step: int, *, batch_size: int, chips: int, flops_per_image: float, peak_flops: float | None
    ) -> None:
        self._step, self._batch_size, self._chips = step, batch_size, chips
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self._seconds = dict.fromkeys(Doing, 0.0)
        self._read = dict(self._seconds)  # as they were at the last reading
        # Replaced as a whole, so that another thread never reads half of it.
        self.now = _Moment(Doing.STARTING, step, time.monotonic())

    def turn_to(self, doing: Doing, step: int) -> None:
        """Ends the present activity and begins another.

        Args:
          doing: the activity.
          step: the one it is for.
        """
        before, self.now = self.now, _Moment(doing, step, time.monotonic())
        self._seconds[before.doing] += self.now.since - before.since

    def elapsed(self) -> float:
        """Returns the seconds since the present activity began."""
        return time.monotonic() - self.now.since

    def seconds(self, doing: Doing) -> float:
        """Returns the seconds that an activity took since the clock was made."""
        self.turn_to(self.now.doing, self.now.step)
        return self._seconds[doing]

    def rates(self, step: int) -> dict[str, float]:
        """Returns what is logged under ``perf/``, of the time since the last call.

        Rates and shares are those of the loop: without compiling, the first input (for which workers start),
        evaluating, saving and writing traces.

        Args:
          step: completed updates.

        Returns:
          ``perf/steps_per_sec``, ``perf/images_per_sec``, ``perf/images_per_sec_per_chip``;
          ``perf/mfu``, the model FLOPs utilisation: FLOPs of the steps done in that time as a share of what the chips'
          peak allows, absent where no peak is known; ``perf/input_wait_share``, of the loop's time;
          ``perf/checkpoint_seconds`` for which saving held up the loop; and ``perf/compile_seconds`` where
          something was compiled.
        """
        self.turn_to(self.now.doing, self.now.step)
        seconds = {doing: total - self._read[doing] for doing, total in self._seconds.items()}
        self._read = dict(self._seconds)
        loop = max(seconds[Doing.INPUT] + seconds[Doing.STEPPING], 1e-9)
        steps_per_sec = (step - self._step) / loop
        self._step = step
        values = {
            "perf/steps_per_sec": steps_per_sec,
            "perf/images_per_sec": steps_per_sec * self._batch_size,
            "perf/images_per_sec_per_chip": steps_per_sec * self._batch_size / self._chips,
            "perf/input_wait_share": seconds[Doing.INPUT] / loop,
            "perf/checkpoint_seconds": seconds[Doing.SAVING],
        }
        if self._peak_flops is not None:
            flops_per_sec = values["perf/images_per_sec_per_chip"] * self._flops_per_image
            values["perf/mfu"] = flops_per_sec / self._peak_flops
        if seconds[Doing.COMPILING]:
            values["perf/compile_seconds"] = seconds[Doing.COMPILING]
        return values

    def describe(self) -> str:
        """Says where the time since the clock was made went."""
        self.turn_to(self.now.doing, self.now.step)
        words = {
            "steps": Doing.STEPPING,
            "waiting for input": Doing.INPUT,
            "evaluating": Doing.EVALUATING,
            "saving": Doing.SAVING,
            "compiling": Doing.COMPILING,
            "writing a trace": Doing.PROFILING,
        }
        seconds = {word: self._seconds[doing] for word, doing in words.items() if self._seconds[doing]}
        whole = sum(self._seconds.values())
        seconds["starting"] = whole - sum(seconds.values())
        return f"{whole:,.1f} s, of which {', '.join(f'{took:,.1f} s {word}' for word, took in seconds.items())}"


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns a chip's peak at a dtype, see `PEAK_FLOPS`; None where it is not known.

    Example:
      >>> peak_flops("TPU v5 lite", "bfloat16")
      197000000000000.0
      >>> peak_flops("cpu", "float32") is None
      True
    """
    return PEAK_FLOPS.get(device_kind, {}).get(dtype)


class ProfilerWindow:
    """Calls training steps, some of them under jax's profiler.

    Each step is named ``train`` with its number in the trace, which Perfetto and TensorBoard's profile plugin read.
    Of several processes the first alone writes: their steps are one program.

    Args:
      folder: of the trace.
      clock: is told when the trace is begun and written, so that this is not taken for work.
      start_step: the first step in the trace, counted from 1.
      num_steps: how many; 0: none.
      note: gets a line when the trace is written.
    """

    def __init__(
        self, folder: Path, clock: Clock, *, start_step: int, num_steps: int, note: Callable[[str], None]
    ) -> None:
        if jax.process_index() != 0:
            num_steps = 0
        self._folder, self._clock, self._note = folder, clock, note
        # jax writes no trace into a bucket.
        self._trace = Path(tempfile.mkdtemp(prefix="trace-")) if num_steps and workdirs.in_bucket(folder) else folder
        self._window = range(start_step, start_step + num_steps)
        self._first: int | None = None  # in the trace that is being taken
        self._missed = bool(num_steps)

    def __call__(self, step: int, step_fn: Callable[..., Any], *arguments: Any) -> Any:
        """Returns ``step_fn(*arguments)``, which computes that step."""
        if self._first is None and step in self._window:
            self._clock.turn_to(Doing.PROFILING, step)
            jax.profiler.start_trace(self._trace)
            self._first, self._missed = step, False
            self._clock.turn_to(Doing.STEPPING, step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = step_fn(*arguments)
        if self._first is not None and step == self._window[-1]:
            jax.block_until_ready(result)
            self._write(step)
            self._clock.turn_to(Doing.STEPPING, step)
        return result

    def _write(self, step: int) -> None:
        self._clock.turn_to(Doing.PROFILING, step)
        first, self._first = self._first, None
        jax.profiler.stop_trace()
        if self._trace != self._folder:
            workdirs.copy_files(self._trace, self._folder)
            shutil.rmtree(self._trace)
        self._note(
            f"traced steps {first} to {step} into {self._folder}: open the .trace.json.gz in there at ui.perfetto.dev, "
            "or the folder in TensorBoard with its profile plugin"
        )

    def __enter__(self) -> ProfilerWindow:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._first is not None:  # The run ended within the window.
            self._write(self._clock.now.step)
        if self._missed:
            first, last = self._window[0], self._window[-1]
            self._note(
                f"no trace: steps {first} to {last}, which profile.start_step asks for, were not among those done"
            )


class HangDetector:
    """Writes down what every thread is at when an activity takes longer than a limit, and lets it go on.

    The stacks go to standard error and to a file, once a hang, and when it is over a line says so. It is a
    thread, so it sees nothing while other code holds Python's interpreter lock; waiting for devices, for
    other processes, for workers or for a disk does not.

    Args:
      clock: says what is being done since when. Starting and compiling have no limit.
      limit_seconds: for one activity: a batch, a step, a checkpoint, an evaluation of the whole set; 0: none.
      file: written anew with each hang's report below those before it.
    """

    def __init__(self, clock: Clock, limit_seconds: float, file: Path) -> None:
        self._clock, self._limit, self._file = clock, limit_seconds, file
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang detector", daemon=True)

    def __enter__(self) -> HangDetector:
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._limit:
            self._thread.join()

    def _watch(self) -> None:
        hung, reports, over = None, "", False
        while not over:
            over = self._over.wait(min(self._limit / 4, 1.0))
            now = self._clock.now
            seconds = time.monotonic() - now.since
            if hung is not None and now is not hung:
                _say(f"aaconv: {hung}: it went on, after about {time.monotonic() - hung.since:.1f} s")
                hung = None
            if hung is None and now.doing not in _UNLIMITED and seconds > self._limit:
                hung = now
                report = self._report(f"{now} takes {seconds:.1f} s")
                _say(report)  # before the file, whose disk may be what hangs
                reports += report
                with contextlib.suppress(Exception):  # of a disk, or of a bucket's library
                    self._file.write_text(reports)

    def _report(self, what: str) -> str:
        names = "".join(f"  0x{thread.ident or 0:016x} {thread.name}\n" for thread in threading.enumerate())
        # Not straight to standard error, which in a notebook is no file.
        with tempfile.TemporaryFile() as scratch:
            faulthandler.dump_traceback(scratch)
            scratch.seek(0)
            stacks = scratch.read().decode(errors="replace")
        return (
            f"aaconv: {time.strftime('%Y-%m-%d %H:%M:%S')}, process {jax.process_index()}: {what}, more than "
            f"hang_limit_seconds={self._limit:g}; the run goes on. What every thread is at is below and in "
            f"{self._file}.\nthreads:\n{names}{stacks}"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
