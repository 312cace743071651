"""Where a run's time goes, traces that are read back, and hangs that are told of while they last."""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aaconv import metrics, train, watch
from aaconv.config import ConfigDict, default_config
from aaconv.watch import Clock, Doing


@pytest.fixture
def clock() -> Clock:
    return Clock(0, batch_size=32, chips=4, flops_per_image=1e9, peak_flops=None)


# The clock


@pytest.fixture
def at(monkeypatch):
    """Sets the time of the clocks of `aaconv.watch`."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now.seconds))

    def at(seconds: float) -> None:
        now.seconds = seconds

    return at


def test_every_second_belongs_to_one_activity(at):
    clock = Clock(10, batch_size=32, chips=4, flops_per_image=1e9, peak_flops=1e11)
    days = [(2, Doing.FIRST_INPUT), (3, Doing.COMPILING), (8, Doing.STEPPING), (11, Doing.INPUT), (12, Doing.STEPPING)]
    for seconds, doing in days:
        at(seconds)
        clock.turn_to(doing, 11)
    at(16)
    # 20 steps in the 8 s from 8 to 16, one of them spent waiting; 5 s of compiling.
    assert clock.rates(30) == {
        "perf/steps_per_sec": 2.5,
        "perf/images_per_sec": 80.0,
        "perf/images_per_sec_per_chip": 20.0,
        "perf/mfu": 0.2,
        "perf/input_wait_share": 0.125,
        "perf/checkpoint_seconds": 0.0,
        "perf/compile_seconds": 5.0,
    }
    at(18)
    clock.turn_to(Doing.EVALUATING, 31)
    at(20)
    assert clock.elapsed() == 2.0
    clock.turn_to(Doing.SAVING, 31)
    at(23)
    clock.turn_to(Doing.PROFILING, 31)
    at(30)
    clock.turn_to(Doing.STEPPING, 32)
    at(32)
    # 10 steps in 2 s before and 2 s after what is no work.
    values = clock.rates(40)
    assert values["perf/steps_per_sec"] == 2.5
    assert values["perf/input_wait_share"] == 0.0
    assert values["perf/checkpoint_seconds"] == 3.0
    assert "perf/compile_seconds" not in values
    assert clock.describe() == (
        "32.0 s, of which 11.0 s steps, 1.0 s waiting for input, 2.0 s evaluating, 3.0 s saving, "
        "5.0 s compiling, 7.0 s writing a trace, 3.0 s starting"
    )


def test_no_utilisation_is_guessed(clock):
    clock.turn_to(Doing.STEPPING, 1)
    assert "perf/mfu" not in clock.rates(1)
    assert watch.peak_flops(jax.devices()[0].device_kind, "float32") is None
    assert watch.peak_flops("TPU v5 lite", "float64") is None


def test_peaks_of_chips():
    for kind, peak in {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}.items():
        # A TPU multiplies float32 as bfloat16 unless it is told otherwise.
        assert watch.peak_flops(kind, "bfloat16") == watch.peak_flops(kind, "float32") == peak
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        bfloat16, float32 = (watch.peak_flops(kind, dtype) for dtype in ("bfloat16", "float32"))
        assert bfloat16 is not None and float32 == bfloat16 / 2


# Traces


def steps_traced(folder: Path) -> list[int]:
    """Reads the numbers of the steps out of the one trace in a folder."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]


def test_the_steps_of_the_window_are_in_the_trace(clock, tmp_path):
    notes = []
    with watch.ProfilerWindow(tmp_path, clock, start_step=3, num_steps=2, note=notes.append) as traced:
        double = jax.jit(lambda x: 2 * x)
        x = jnp.ones(())
        for step in range(1, 8):
            x = traced(step, double, x)
    assert x == 2**7
    assert steps_traced(tmp_path) == [3, 4]
    (note,) = notes
    assert note.startswith(f"traced steps 3 to 4 into {tmp_path}: ")


def test_a_run_that_goes_on_or_ends_within_the_window_traces_what_it_can(clock, tmp_path):
    notes = []
    with watch.ProfilerWindow(tmp_path, clock, start_step=3, num_steps=20, note=notes.append) as traced:
        for step in range(5, 8):
            clock.turn_to(Doing.STEPPING, step)
            traced(step, jnp.negative, jnp.ones(()))
    assert steps_traced(tmp_path) == [5, 6, 7]
    assert notes[0].startswith("traced steps 5 to 7 ")


def test_a_window_that_is_not_reached_is_told_of(clock, tmp_path):
    notes = []
    with watch.ProfilerWindow(tmp_path, clock, start_step=3, num_steps=4, note=notes.append) as traced:
        traced(2, jnp.negative, jnp.ones(()))
    assert notes == ["no trace: steps 3 to 6, which profile.start_step asks for, were not among those done"]
    assert not list(tmp_path.iterdir())


def test_without_a_window_nothing_is_traced(clock, tmp_path):
    with watch.ProfilerWindow(tmp_path, clock, start_step=1, num_steps=0, note=pytest.fail) as traced:
        assert traced(1, lambda x: x + 1, 1) == 2
    assert not list(tmp_path.iterdir())


# In a run


class Net(nn.Module):
    """Classes, from the mean alone."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        return nn.Dense(10, name="head")(x.mean(axis=(-3, -2)))


class Input:
    """Grey images without end, for training and for evaluation; calls something before its third batch."""

    steps_per_epoch, resident = 100, None

    def __init__(self, before_third) -> None:
        self._before_third, self._taken = before_third, 0

    def __iter__(self):
        return self

    def __next__(self):
        self._taken += 1
        if self._taken == 3:
            self._before_third()
        return {"image": np.full((8, 2, 2, 1), self._taken, np.float32), "label": np.arange(8, dtype=np.int32)}

    def get_state(self):
        return {"taken": self._taken}

    def prepare(self, batch, key, resident):
        return batch


class EvalInput:
    def __iter__(self):
        yield {"image": np.ones((8, 2, 2, 1), np.float32), "label": np.arange(8), "mask": np.ones(8, bool)}

    def prepare(self, batch):
        return batch


def blocked_by(block) -> SimpleNamespace:
    """In the place of `aaconv.data`."""
    return SimpleNamespace(
        info=lambda config: SimpleNamespace(num_classes=10, image_shape=(2, 2, 1)),
        train_input=lambda config, **processes: Input(block),
        eval_input=lambda config, **processes: EvalInput(),
    )


def net_config(**settings: float) -> ConfigDict:
    config = default_config()
    config.model.name, config.data.name = "net", "grey"
    config.batch_size, config.num_steps, config.mesh.data = 8, 4, 1
    config.update_from_flattened_dict(settings)
    return config


def test_a_run_writes_the_trace_of_its_window(tmp_path):
    config = net_config(**{"profile.start_step": 2, "profile.num_steps": 2})
    train.train(config, tmp_path, model=Net(), data=blocked_by(lambda: None), progress=metrics.Progress())
    assert steps_traced(tmp_path / "profile") == [2, 3]


def test_a_source_of_data_that_blocks_is_told_of_once_and_the_run_goes_on(tmp_path, capfd):
    config = net_config(hang_limit_seconds=0.2)
    file, what = tmp_path / "hang-0.txt", "process 0: waiting for the input of step 3 takes 0."

    def block_until_told() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (file.exists() and what in file.read_text()):
            time.sleep(0.01)
        time.sleep(0.3)  # in which it could be told of again

    result = train.train(config, tmp_path, model=Net(), data=blocked_by(block_until_told), progress=metrics.Progress())
    assert result["step"] == 4
    # On a busy machine other things may take as long.
    (report,) = [text for text in re.split("(?=aaconv: 2)", file.read_text()) if what in text]
    assert "more than hang_limit_seconds=0.2; the run goes on" in report
    assert re.search(r"0x[0-9a-f]{16} MainThread\n", report)
    assert re.search(r"Thread 0x[0-9a-f]{16} .*\n.* in block_until_told\n", report)
    errors = capfd.readouterr().err
    assert report in errors
    assert "aaconv: waiting for the input of step 3: it went on, after about" in errors


def test_a_limit_holds_for_the_devices_too_and_none_for_compiling(clock, tmp_path):
    file = tmp_path / "hang-0.txt"
    told = threading.Event()

    def tell(text: str) -> None:
        if "step 7 on the devices" in text:
            told.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", SimpleNamespace(write=tell, flush=lambda: None))
        with watch.HangDetector(clock, 0.1, file):
            clock.turn_to(Doing.COMPILING, 7)
            time.sleep(0.3)
            clock.turn_to(Doing.STEPPING, 7)
            assert told.wait(timeout=60)
    assert "compiling takes" not in file.read_text()


def test_no_limit_no_thread(clock, tmp_path):
    with watch.HangDetector(clock, 0.0, tmp_path / "hang-0.txt"):
        assert "hang detector" not in [thread.name for thread in threading.enumerate()]
