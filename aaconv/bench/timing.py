"""Medians of competing calls, taken in turn so that a drift of the machine hits all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

TURN_SECONDS = 0.05  # a call that is shorter is repeated within its turn
PAUSE_SECONDS = 0.005  # between turns: the threads of the one before stop spinning
MIN_ROUNDS = 3

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Job:
    """One call to be timed.

    Attributes:
      start: begins the work and returns what `wait` waits for.
      wait: returns when that work is done.
      pipelined: whether the calls of a turn are started one after the other and waited for together. True on
        accelerators, which run them in order, so that the host's overhead hides behind the work; the sample is
        then the turn's mean.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    pipelined: bool = False

    def __call__(self) -> Any:
        """Runs once, to the end."""
        result = self.start()
        self.wait(result)
        return result


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds a call, one entry a sample."""

    samples: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def measure(jobs: Mapping[Key, Job], seconds: float, *, warm_up: int = 2) -> dict[Key, Times]:
    """Times calls round-robin.

    Each is called `warm_up` times untimed. Then rounds follow in which every job has one turn of about
    50 ms (one call at least), each round beginning with the next job, until `seconds` are over and
    every job has had three turns.

    Args:
      jobs: by name.
      seconds: for all of them together, without the warm-up.
      warm_up: calls of each before the first that counts, at least 1.

    Returns:
      Samples in the order of `jobs`.
    """
    jobs = dict(jobs)
    samples: dict[Key, list[float]] = {key: [] for key in jobs}
    turns: dict[Key, int] = {}
    for key, job in jobs.items():
        for _ in range(warm_up):
            began = time.perf_counter()
            job()
            took = time.perf_counter() - began
        turns[key] = max(1, min(100, math.ceil(TURN_SECONDS / max(took, 1e-6))))
    order = list(jobs)
    with _no_garbage_collection():
        end, rounds = time.perf_counter() + seconds, 0
        while jobs and (rounds < MIN_ROUNDS or time.perf_counter() < end):
            for key in order:
                time.sleep(PAUSE_SECONDS)
                samples[key] += _turn(jobs[key], turns[key])
            order.append(order.pop(0))
            rounds += 1
    return {key: Times(found) for key, found in samples.items()}


def _turn(job: Job, calls: int) -> Sequence[float]:
    if job.pipelined:
        began = time.perf_counter()
        for _ in range(calls):
            result = job.start()
        job.wait(result)
        return [(time.perf_counter() - began) / calls]
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        job()
        found.append(time.perf_counter() - began)
    return found


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
