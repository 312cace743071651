"""The loop: the same numbers on any devices, stopped and continued or not, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aaconv import checkpoints, metrics, models, train
from aaconv.config import ConfigDict, default_config

# A network and a source of data small enough to train often


class Net(nn.Module):
    """Convolution, batch norm, classes."""

    features: int = 6

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        return nn.Dense(4, name="head")(x.mean(axis=(-3, -2)))


EXAMPLES, BATCH, STEPS_PER_EPOCH = 48, 16, 3


def examples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, EXAMPLES).astype(np.int32)
    image = rng.integers(0, 100, (EXAMPLES, 6, 6, 1)) + 35 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


class Order:
    """Batches of indices, in a new order each epoch; `poison` makes one step's images nan."""

    def __init__(self, seed: int, poison: int) -> None:
        self.seed, self.poison, self.taken = seed, poison, 0

    def __iter__(self):
        return self

    def __next__(self):
        epoch, i = divmod(self.taken, STEPS_PER_EPOCH)
        self.taken += 1
        order = np.random.default_rng((self.seed, epoch)).permutation(EXAMPLES)[i * BATCH : (i + 1) * BATCH]
        noise = np.full(BATCH, math.nan if self.taken == self.poison else 0.0, np.float32)
        return {"index": order.astype(np.int32), "noise": noise}

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


@dataclasses.dataclass
class TrainInput:
    seed: int
    poison: int
    steps_per_epoch: int = STEPS_PER_EPOCH

    def __post_init__(self):
        self.resident = examples()

    def __iter__(self):
        return Order(self.seed, self.poison)

    def prepare(self, batch, key, resident):
        image = resident["image"][batch["index"]].astype(jnp.float32) / 255 - 0.5
        image = image + 0.05 * jax.random.normal(key, image.shape) + batch["noise"].reshape(-1, 1, 1, 1)
        return {"image": image, "label": resident["label"][batch["index"]]}


@dataclasses.dataclass
class EvalInput:
    batch_size: int
    on_batch: object = None

    def __iter__(self):
        arrays = examples()
        for start in range(0, 40, self.batch_size):  # 40 of the 48: the last batch is padded
            if self.on_batch is not None:
                self.on_batch(start)
            index = np.arange(start, start + self.batch_size)
            batch = {name: array[np.minimum(index, 39)] for name, array in arrays.items()}
            yield {**batch, "mask": index < 40}

    def prepare(self, batch):
        return {**batch, "image": batch["image"].astype(jnp.float32) / 255 - 0.5}


def source(poison: int = 0, on_batch=None) -> SimpleNamespace:
    return SimpleNamespace(
        info=lambda config: SimpleNamespace(num_classes=4, image_shape=(6, 6, 1)),
        train_input=lambda config, **processes: TrainInput(config.seed, poison),
        eval_input=lambda config, **processes: EvalInput(config.eval_batch_size, on_batch),
    )


def make_config(**settings) -> ConfigDict:
    config = default_config()
    config.model.name, config.data.name = "net", "noise"
    config.batch_size, config.eval_batch_size, config.num_epochs = BATCH, 16, 4.0
    config.log_every_steps = 2
    config.optimizer.weight_decay, config.optimizer.ema_decay = 1e-3, 0.9
    config.loss.label_smoothing, config.loss.mixup_alpha = 0.1, 0.2
    for key, value in settings.items():
        *groups, name = key.split("__")
        owner = config
        for group in groups:
            owner = owner[group]
        owner[name] = value
    return config.lock()


class Recorder(metrics.Progress):
    """Keeps the notes; sends a signal to its own process when a step is reached."""

    def __init__(self, at_step: int = -1, number: int = signal.SIGTERM) -> None:
        self.notes: list[str] = []
        self._at_step, self._number = at_step, number

    def update(self, step):
        if step == self._at_step:
            os.kill(os.getpid(), self._number)

    def note(self, text):
        self.notes.append(text)


def run(
    workdir, *, poison=0, on_batch=None, progress=None, model=None, pause_step=None, **settings
) -> dict[str, float]:
    return train.train(
        make_config(**settings),
        workdir,
        model=model or Net(),
        data=source(poison, on_batch),
        progress=progress or Recorder(),
        pause_step=pause_step,
    )


def rows(workdir) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in metrics.read_rows(workdir)
    ]


def final_state(workdir) -> dict:
    config = make_config()
    run = train.build(config, Net(), source(), training=True)
    with checkpoints.Checkpoints(workdir, read_only=True) as saved:
        found = saved.restore(run.abstract_state().items())
    assert found is not None
    return {"step": found[0], **found[1]}


def assert_equals_undisturbed(workdir, undisturbed) -> None:
    """Bit for bit: weights, averages, optimiser, step, and every row but the clock's."""
    assert rows(workdir) == rows(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(undisturbed))


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """These tests compile the same step many times over."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield settings
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir)
    return workdir


class DroppingNet(nn.Module):
    """Remembers what dropout left of 32 ones for the first image."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        left = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(x), 32)))
        seen = self.variable("batch_stats", "seen", jnp.zeros, 32)
        if train:
            seen.value = left[0]
        return nn.Dense(4, name="head")(left)


# What a run gives


def test_a_run_learns_and_logs(undisturbed):
    written = metrics.read_rows(undisturbed)
    logged = [row for row in written if "train/loss" in row]
    evaluated = [row for row in written if "eval/loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in evaluated] == [3, 6, 9, 12]
    assert [row["epoch"] for row in evaluated] == [1.0, 2.0, 3.0, 4.0]
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]
    assert set(logged[0]) == {
        "step", "epoch", "train/loss", "train/accuracy", "optim/learning_rate", "optim/grad_norm",
        "perf/steps_per_sec", "perf/images_per_sec", "perf/images_per_sec_per_chip", "perf/input_wait_share",
        "perf/checkpoint_seconds", "perf/compile_seconds",
    }  # fmt: skip
    assert set(evaluated[0]) == {
        "step", "epoch", "eval/loss", "eval/accuracy", "eval/top5", "perf/evaluation_seconds"
    }  # fmt: skip
    # The step is compiled before the first row, the evaluation at step 3.
    assert ["perf/compile_seconds" in row for row in logged] == [True, True, False, False, False, False]
    assert evaluated[-1]["eval/top5"] == 1.0
    # The rate of the update that made the step: the first of two logged is that of step 1.
    assert logged[0]["optim/learning_rate"] == pytest.approx(0.05 * (1 + math.cos(math.pi / 12)), rel=1e-6)
    assert json.loads((undisturbed / "config.json").read_text())["batch_size"] == BATCH


def test_one_device_and_eight_give_the_same_losses(undisturbed, tmp_path):
    recorder = Recorder()
    run(tmp_path, mesh__data=1, progress=recorder)
    assert [note for note in recorder.notes if note.startswith("compiling")] == [
        "compiling the step ...",
        "compiling the evaluation ...",
    ]
    for one, eight in zip(rows(tmp_path), rows(undisturbed), strict=True):
        assert one == pytest.approx(eight, rel=3e-6)


@pytest.mark.slow
def test_dropout_is_drawn_anew_each_step_and_alike_on_any_devices(tmp_path):
    def seen(steps, **settings):
        settings |= {"num_epochs": None, "num_steps": steps, "optimizer__ema_decay": 0.0}
        workdir = tmp_path / f"{steps} {settings}"
        run(workdir, model=DroppingNet(), **settings)
        restored = train.restore(make_config(**settings), workdir, model=DroppingNet(), data=source())
        return np.asarray(restored.variables["batch_stats"]["seen"])

    first, on_one, second = seen(1), seen(1, mesh__data=1), seen(2)
    assert set(first) == {0.0, 2.0}
    np.testing.assert_array_equal(first, on_one)
    assert (first != second).any()


@pytest.mark.parametrize("before", [{}, {"mesh__fsdp": 2, "mesh__fsdp_min_size": 1}], ids=["replicated", "divided"])
def test_the_checkpoint_of_eight_devices_continues_on_one(undisturbed, tmp_path, before):
    with pytest.raises(train.Preempted):
        run(tmp_path, progress=Recorder(at_step=7), **before)
    recorder = Recorder()
    run(tmp_path, progress=recorder, mesh__data=1)
    assert any("mesh.data was -1, is 1" in note for note in recorder.notes)
    assert not any("batch norm" in note for note in recorder.notes)
    for one, eight in zip(rows(tmp_path), rows(undisturbed), strict=True):
        assert one == pytest.approx(eight, rel=3e-6)


def test_statistics_of_other_batches_after_a_change_of_devices_are_told(tmp_path):
    with pytest.raises(train.Preempted):
        run(tmp_path, progress=Recorder(at_step=7), mesh__batch_norm_devices=1)
    recorder = Recorder()
    run(tmp_path, progress=recorder, mesh__data=2, mesh__batch_norm_devices=1)
    assert any("warning: 2 examples shared batch norm's statistics, and now 8 do" in note for note in recorder.notes)
    with pytest.raises(ValueError, match="holds a run of another config .mesh.batch_norm_devices was 1, is -1"):
        run(tmp_path, mesh__batch_norm_devices=-1)


def digits_config(data_dir: Path) -> ConfigDict:
    config = default_config()
    config.data.data_dir = str(data_dir)
    config.model.name, config.data.name = "wrn", "digits"
    config.model.depth, config.model.width = 10, 1
    config.data.channels, config.data.mean, config.data.std = 1, (0.5,), (0.5,)
    config.data.placement, config.mesh.data = "device", 1
    config.batch_size, config.eval_batch_size, config.num_epochs = 64, 64, 1.0
    config.schedule.learning_rate = 0.05
    return config


@pytest.mark.slow
def test_a_network_of_the_configs_name_trains_on_digits(tmp_path):
    config = digits_config(tmp_path / "tfds")
    result = train.train(config, tmp_path, progress=Recorder())
    assert result["step"] == 22
    assert result["train/accuracy"] > 0.25
    assert train.evaluate(config, tmp_path) == {name: result[name] for name in ("step", *train.EVAL_METRICS)}


@pytest.mark.slow
def test_bfloat16_activations_with_float32_weights(tmp_path):
    config = digits_config(tmp_path / "tfds")
    config.dtype = "bfloat16"
    result = train.train(config, tmp_path, progress=Recorder())
    assert result["train/accuracy"] > 0.25
    restored = train.restore(config, tmp_path)
    assert restored.model.dtype == jnp.bfloat16
    assert {str(x.dtype) for x in jax.tree.leaves(restored.variables)} == {"float32"}


def test_evaluation_sees_each_example_once_and_uses_the_averages(undisturbed):
    config = make_config(eval_batch_size=24)
    restored = train.restore(config, undisturbed, model=Net(), data=source())
    averages = final_state(undisturbed)["model"]["ema"]
    jax.tree.map(np.testing.assert_array_equal, restored.variables, averages)
    image, label = (x[:40] for x in examples().values())
    logits = restored.model.apply(restored.variables, jnp.asarray(image, jnp.float32) / 255 - 0.5, train=False)
    losses = -jax.nn.log_softmax(logits)[np.arange(40), label]
    notes = []
    values = train.evaluate(config, undisturbed, model=Net(), data=source(), note=notes.append)
    assert notes[0] == "compiling the evaluation ..." and notes[1].startswith("compiled the evaluation in ")
    assert values["eval/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert values["eval/accuracy"] == pytest.approx(float((logits.argmax(-1) == label).mean()))
    assert values["step"] == 12


def test_the_best_is_kept_and_can_be_restored(tmp_path):
    run(tmp_path, checkpoint__best_metric="eval/loss", checkpoint__keep_last=1, num_epochs=3.0)
    losses = {row["step"]: row["eval/loss"] for row in rows(tmp_path) if "eval/loss" in row}
    best = min(losses, key=losses.__getitem__)
    values = train.evaluate(
        make_config(checkpoint__best_metric="eval/loss"), tmp_path, which="best", model=Net(), data=source()
    )
    assert values["step"] == best
    assert values["eval/loss"] == pytest.approx(losses[best], rel=1e-6)


def test_mixup_blends_images_and_labels_alike():
    images = jnp.arange(4.0).reshape(4, 1, 1, 1)
    targets = metrics.soft_labels(jnp.arange(4), 4)
    mixed, soft = train.mixup(jax.random.key(3), images, targets, 0.4)
    weight = float(soft[0, 0])
    assert 0 < weight < 1
    np.testing.assert_allclose(soft, weight * np.eye(4) + (1 - weight) * np.eye(4)[::-1], rtol=1e-6)
    np.testing.assert_allclose(mixed.ravel(), weight * np.arange(4) + (1 - weight) * np.arange(3, -1, -1), rtol=1e-6)


# Stopped and continued


@pytest.mark.parametrize(("at_step", "number"), [(1, signal.SIGINT), (6, signal.SIGTERM)])
def test_a_stopped_run_continues_as_if_it_had_not(undisturbed, tmp_path, at_step, number):
    handler = signal.getsignal(number)
    with pytest.raises(train.Preempted, match=f"{number.name}: saved step {at_step} of 12"):
        run(tmp_path, progress=Recorder(at_step, number))
    assert signal.getsignal(number) is handler
    recorder = Recorder()
    run(tmp_path, progress=recorder)
    assert any(f"from step {at_step} of 12" in note for note in recorder.notes)
    assert_equals_undisturbed(tmp_path, undisturbed)


def test_a_paused_run_is_evaluated_and_goes_on_as_if_it_had_not(undisturbed, tmp_path):
    paused = run(tmp_path, pause_step=5)
    assert paused["step"] == 5 and "eval/accuracy" in paused
    assert checkpoints.finished_steps(tmp_path)[-1] == 5
    assert run(tmp_path)["step"] == rows(undisturbed)[-1]["step"]
    whole = rows(undisturbed)
    more = [row for row in rows(tmp_path) if row not in whole]
    assert [row["step"] for row in more] == [5] and "eval/loss" in more[0]
    assert [row for row in rows(tmp_path) if row not in more] == whole
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(undisturbed))
    with pytest.raises(ValueError, match="pause_step=0 must be at least 1"):
        run(tmp_path, pause_step=0)


@pytest.mark.slow
def test_stopped_during_the_last_evaluation(undisturbed, tmp_path):
    def on_batch(start):
        # The evaluations before the last are left alone.
        if start == 16 and rows(tmp_path)[-1]["step"] == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):  # Once after training, once when only the evaluation is left.
        with pytest.raises(train.Preempted):
            run(tmp_path, on_batch=on_batch)
        assert "eval/loss" not in rows(tmp_path)[-1]
    result = run(tmp_path)
    assert result["eval/accuracy"] == rows(undisturbed)[-1]["eval/accuracy"]
    assert_equals_undisturbed(tmp_path, undisturbed)


PROGRAM = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import importlib.util, jax
jax.config.update("jax_num_cpu_devices", 8)
file, cache, workdir, step, number = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
spec = importlib.util.spec_from_file_location("train_test", file)
test = importlib.util.module_from_spec(spec)
sys.modules["train_test"] = test
spec.loader.exec_module(test)
try:
    test.run(workdir, progress=test.Recorder(int(step), int(number)))
except test.train.Preempted as stopped:
    print(stopped)
    sys.exit(75)
"""


@pytest.mark.slow
def test_terminated_then_killed_then_continued(undisturbed, tmp_path, compilation_cache):
    def start(step: int, number: int) -> subprocess.CompletedProcess[str]:
        arguments = [__file__, compilation_cache["jax_compilation_cache_dir"], tmp_path, step, int(number)]
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1],
        )  # fmt: skip

    terminated = start(4, signal.SIGTERM)
    assert terminated.returncode == 75, terminated.stderr
    assert "stopped by SIGTERM: saved step 4 of 12" in terminated.stdout
    killed = start(8, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    recorder = Recorder()
    run(tmp_path, progress=recorder)
    # Step 6 was saved behind the steps after it: killed at 8, it may or may not have been whole.
    assert any("from step 6 of 12" in note or "from step 4 of 12" in note for note in recorder.notes)
    assert_equals_undisturbed(tmp_path, undisturbed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_is_passed_over(undisturbed, tmp_path):
    with pytest.raises(train.Preempted):
        run(tmp_path, progress=Recorder(at_step=8))
    for file in (tmp_path / "checkpoints" / "8").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    recorder = Recorder()
    run(tmp_path, progress=recorder)
    (warning,) = [note for note in recorder.notes if note.startswith("warning")]
    assert "checkpoints/8 cannot be read" in warning
    assert "checkpoints/6 instead" in warning
    assert_equals_undisturbed(tmp_path, undisturbed)


def test_a_complete_run_says_so_and_changes_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "checkpoints").rglob("*")}
    text = (undisturbed / "metrics.jsonl").read_text()
    recorder = Recorder()
    result = run(undisturbed, progress=recorder)
    assert any("the run is complete" in note for note in recorder.notes)
    assert result["step"] == 12
    assert result["eval/loss"] == rows(undisturbed)[-1]["eval/loss"]
    assert (undisturbed / "metrics.jsonl").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "checkpoints").rglob("*")} == before


def test_a_run_may_be_lengthened_not_cut(tmp_path):
    run(tmp_path, num_epochs=2.0)
    with pytest.raises(ValueError, match=r"longer run \(num_epochs was 2.0, is 1.0, that is 6 steps and now 3"):
        run(tmp_path, num_epochs=1.0)
    recorder = Recorder()
    result = run(tmp_path, num_epochs=3.0, log_every_steps=3, progress=recorder)
    assert result["step"] == 9
    (line,) = [note for note in recorder.notes if "changed config" in note]
    assert "num_epochs was 2.0, is 3.0" in line
    assert "log_every_steps was 2, is 3" in line
    assert "learning rate follows the new length" in line


# What stops a run


def test_nan_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(train.NonFiniteLossError) as error:
        run(tmp_path, poison=8, checkpoint__every_steps=1)
    assert "within steps [8, 8]" in str(error.value)
    assert f"last good checkpoint: {tmp_path}/checkpoints/7" in str(error.value)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8
    assert last["train/loss"] is None
    restored = train.restore(make_config(), tmp_path, model=Net(), data=source())
    assert restored.step == 7
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.variables))


def test_nan_before_the_first_checkpoint(tmp_path):
    with pytest.raises(train.NonFiniteLossError, match=r"steps \[1, 2\]; last good checkpoint: none was saved"):
        run(tmp_path, poison=1)
    assert not list((tmp_path / "checkpoints").iterdir())
    # Nothing to continue: the same workdir serves again, with its rows written anew.
    run(tmp_path, num_epochs=1.0)
    assert [row["step"] for row in rows(tmp_path)] == [2, 3, 3]


def test_another_configs_workdir_is_refused(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError) as error:
        run(undisturbed, optimizer__momentum=0.8, seed=1, log_every_steps=5)
    text = str(error.value)
    assert "seed was 0, is 1" in text
    assert "optimizer.momentum was 0.9, is 0.8" in text
    assert "log_every_steps" not in text
    assert "new --workdir" in text
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.name != ".lock"}


def test_another_run_without_a_checkpoint_is_refused(undisturbed, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(undisturbed / name, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(words: str, **settings) -> None:
        with pytest.raises(ValueError, match=words):
            run(tmp_path, **settings)
        assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()

    refused("seed was 0, is 1.*new --workdir.*move .*config.json and metrics.jsonl away", seed=1)
    (tmp_path / "config.json").unlink()
    del before["config.json"]
    refused("metrics.jsonl holds rows of a run.*name a new --workdir, or move that file away")
    for foreign in ('{"name": "of another program"}', "[1]", "words"):
        (tmp_path / "config.json").write_text(foreign)
        before["config.json"] = foreign.encode()
        refused("config.json is not the config of a run: name a new --workdir, or move that file away")


def test_a_config_from_before_a_key_has_its_default(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    del config["optimizer"]["clip_norm"]  # 0 by default, as in this run
    file.write_text(json.dumps(config))
    assert run(tmp_path / "old")["step"] == 12
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="optimizer.clip_norm was 0.0, is 1.0"):
        run(tmp_path / "old", optimizer__clip_norm=1.0)


class FillsDisk(Recorder):
    """No file may grow from step 7 on, once a checkpoint is there; a full disk does the same."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    def update(self, step):
        if step == 7:
            while not self._checkpoint.exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))


@pytest.fixture
def file_size_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if before[1] != resource.RLIM_INFINITY:
        pytest.skip("the size of files is limited here: the test could not lift its own limit")
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_at_a_row_is_named_and_the_run_continues(undisturbed, tmp_path, file_size_limit):
    words = rf"{tmp_path} cannot be written \(File too large\); last good checkpoint: .*/checkpoints/6\. Free space"
    with pytest.raises(ValueError, match=words):
        run(tmp_path, progress=FillsDisk(tmp_path / "checkpoints" / "6"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run(tmp_path)
    assert_equals_undisturbed(tmp_path, undisturbed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_at_a_checkpoint_is_named(tmp_path, file_size_limit, caplog):
    with pytest.raises(ValueError, match=r"File too large.*last good checkpoint: .*/checkpoints/4\. Free space"):
        run(
            tmp_path,
            progress=FillsDisk(tmp_path / "checkpoints" / "4"),
            checkpoint__every_steps=4,
            log_every_steps=100,
            eval_every_epochs=100.0,
        )
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert train.restore(make_config(), tmp_path, model=Net(), data=source()).step == 4


def test_the_best_needs_a_recorded_metric(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    for metric, words in (("eval/accuracy", "no recorded eval/accuracy"), ("", "no checkpoint.best_metric")):
        with pytest.raises(ValueError, match=f"{words} says which checkpoint in .*: use --checkpoint newest"):
            config = make_config(checkpoint__best_metric=metric)
            train.evaluate(config, tmp_path, which="best", model=Net(), data=source())


def test_another_networks_checkpoint_is_a_tree_difference(undisturbed):
    config = make_config(model__name="other")
    with pytest.raises(ValueError) as error:
        train.restore(config, undisturbed, model=Net(features=8), data=source())
    text = str(error.value)
    assert "  - params/conv/kernel float32(3, 3, 1, 6)\n  + params/conv/kernel float32(3, 3, 1, 8)" in text
    assert "config keys that differ: model.name was 'net', is 'other'" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 12}, "batch_size=12 must be a multiple of the 8 devices"),
        ({"eval_batch_size": 12}, "eval_batch_size=12 must be a multiple"),
        ({"mesh__data": 9}, "mesh.data=9, .* need 9 devices: there are 8; set mesh.data=-1"),
        ({"checkpoint__best_metric": "eval/acuracy"}, "best_metric='eval/acuracy' is not one of"),
        ({"optimizer__momentum": 1.0}, "optimizer.momentum=1.0 must be"),
    ],
)
def test_a_config_that_cannot_run_leaves_nothing_behind(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        run(tmp_path / "file" / "run")


def test_nothing_to_restore(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in .*train with this --workdir first"):
        train.evaluate(make_config(), tmp_path, model=Net(), data=source())
    with pytest.raises(ValueError, match="which='newst' is not one of newest, best"):
        train.evaluate(make_config(), tmp_path, which="newst", model=Net(), data=source())


def test_an_unknown_model_lists_close_ones():
    config = make_config(model__name="aa_wrm_28_10")
    with pytest.raises(ValueError, match="aa_wrn_28_10"):
        train.build_model(config, 10)
    assert "aa_wrn_28_10" in models.list_models()
