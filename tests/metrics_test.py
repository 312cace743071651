"""Sums, rows and progress."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aaconv import metrics

# Sums


def summed(logits, labels, mask=None):
    logits = jnp.asarray(logits, jnp.float32)
    targets = metrics.soft_labels(jnp.asarray(labels), logits.shape[-1])
    mask = None if mask is None else jnp.asarray(mask)
    return metrics.totals(logits, targets, metrics.cross_entropy(logits, targets), mask)


def test_totals_against_numpy():
    rng = np.random.default_rng(0)
    logits, labels, mask = rng.normal(size=(64, 12)), rng.integers(0, 12, 64), rng.random(64) < 0.7
    order = np.argsort(-logits, axis=-1)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(64), labels]
    means = summed(logits, labels, mask).means("eval")
    np.testing.assert_allclose(means["eval/loss"], losses[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(means["eval/accuracy"], (order[:, 0] == labels)[mask].mean(), rtol=1e-6)
    in_five = (order[:, :5] == labels[:, None]).any(-1)
    np.testing.assert_allclose(means["eval/top5"], in_five[mask].mean(), rtol=1e-6)


def test_totals_of_parts_add_up():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(6, 9)), rng.integers(0, 9, 6)
    parts = metrics.Totals.zeros() + summed(logits[:4], labels[:4]) + summed(logits[4:], labels[4:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), parts, summed(logits, labels))


def test_fewer_than_five_classes():
    assert summed([[3.0, 2.0, 1.0]], [2]).means("eval")["eval/top5"] == 1.0


def test_equal_logits_rank_by_class_and_count_once():
    totals = summed(np.zeros((10, 10)), np.arange(10))
    assert (float(totals.top1), float(totals.top5)) == (1.0, 5.0)


def test_logits_that_are_not_finite_are_never_right():
    totals = summed([[math.nan] * 6, [math.inf] + [0.0] * 5], [0, 0])
    assert (float(totals.top1), float(totals.top5)) == (0.0, 0.0)


def test_a_padding_examples_nan_does_not_spread():
    totals = summed([[5.0, 0.0], [math.nan, math.nan]], [0, 0], [True, False])
    assert math.isfinite(totals.means("eval")["eval/loss"])
    assert totals.means("eval")["eval/accuracy"] == 1.0


def test_no_examples_have_no_mean():
    assert math.isnan(metrics.Totals.zeros().means("eval")["eval/loss"])


def test_soft_labels():
    np.testing.assert_allclose(metrics.soft_labels(jnp.array([1]), 4, 0.2), [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)


def test_cross_entropy_of_mixed_labels_in_bfloat16_is_float32():
    logits = jnp.array([[2.0, 0.0, -1.0]], jnp.bfloat16)
    targets = jnp.array([[0.25, 0.75, 0.0]])
    loss = metrics.cross_entropy(logits, targets)
    z = math.log(math.exp(2) + 1 + math.exp(-1))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [z - 0.5], rtol=1e-6)


# Rows


def test_rows_survive_a_resumption(tmp_path):
    with metrics.Log(tmp_path, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.write(step, {"train/loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "train/lo')
    with metrics.Log(tmp_path, resume_step=20, tensorboard=False) as log:
        assert [row["step"] for row in log.rows] == [10, 20]
        log.write(30, {"train/loss": 3.0})
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [10, 20, 30]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 30, "train/loss": 3.0}


def test_rows_are_on_disk_at_once(tmp_path):
    with metrics.Log(tmp_path, tensorboard=False) as log:
        log.write(1, {"train/loss": 2.0})
        assert len(metrics.read_rows(tmp_path)) == 1


def test_values_that_are_not_finite_stay_json(tmp_path):
    with metrics.Log(tmp_path, tensorboard=False) as log:
        log.write(1, {"train/loss": math.nan, "optim/grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "train/loss": None, "optim/grad_norm": None}
    assert math.isnan(metrics.read_rows(tmp_path)[0]["train/loss"])


def test_no_rows_where_there_is_no_file(tmp_path):
    assert metrics.read_rows(tmp_path) == []


def test_which_metrics_are_better_the_higher_they_are():
    names = [*("eval/accuracy", "eval/top5", "perf/images_per_sec", "perf/mfu"), "eval/loss", "train/loss"]
    names += ["perf/evaluation_seconds", "perf/input_wait_share", "optim/grad_norm"]
    assert [name for name in names if metrics.higher_is_better(name)] == names[:4]


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    with metrics.Log(tmp_path) as log:
        log.write(5, {"train/loss": 2.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


# Progress

TRAIN = {"epoch": 1.0, "train/loss": 0.5, "train/accuracy": 0.875, "perf/images_per_sec": 1234.5}
EVAL = {"epoch": 1.0, "eval/loss": 0.25, "eval/accuracy": 0.9812, "eval/top5": 1.0}


def drive(progress: metrics.Progress) -> None:
    progress.start(0, 20)
    progress.note("a line")
    for step in range(1, 11):
        progress.update(step)
    progress.show(10, TRAIN)
    progress.show(10, EVAL)
    progress.stop()


def test_lines():
    stream = io.StringIO()
    drive(metrics.Lines(stream))
    note, train, evaluation = stream.getvalue().splitlines()
    assert note == "a line"
    assert train == "step 10/20  loss 0.5000  accuracy 87.5%  1,234 images/s  0:00 left"
    assert evaluation == "step 10/20  eval loss 0.2500  eval accuracy 98.12%  top-5 100.00%"


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    main, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        assert isinstance(metrics.progress(stream), metrics.Bar)
        drive(metrics.progress(stream))
    shown = b""
    with contextlib.suppress(OSError):  # That is how the other end's closing shows.
        while chunk := os.read(main, 1 << 16):
            shown += chunk
    os.close(main)
    for words in ("a line", "10/20", "loss 0.5000", "accuracy 87.5%", "1,234 images/s", "eval accuracy 98.12%"):
        assert words in shown.decode()


def test_lines_elsewhere(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        assert isinstance(metrics.progress(stream), metrics.Lines)
