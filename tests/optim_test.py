"""Schedules and updates against formulas written out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aaconv import optim
from aaconv.config import ConfigDict, default_config

STEPS_PER_EPOCH = 10


def make_config(num_epochs: float = 4.0, **settings) -> ConfigDict:
    config = default_config()
    config.num_epochs = num_epochs
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    return config


def rates(config: ConfigDict) -> list[float]:
    plan = optim.plan(config, STEPS_PER_EPOCH)
    return [float(plan.learning_rate(step)) for step in range(plan.total_steps + 1)]


def test_cosine_after_warmup():
    config = make_config(schedule__learning_rate=0.4, schedule__warmup_epochs=1.0, schedule__final=0.1)
    by_hand = [0.4 * s / 10 for s in range(10)]
    by_hand += [0.4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 10) / 30))) for s in range(10, 41)]
    np.testing.assert_allclose(rates(config), by_hand, rtol=1e-6, atol=1e-8)


def test_warmup_in_percent_of_the_run():
    assert optim.plan(make_config(schedule__warmup_percent=25.0), STEPS_PER_EPOCH).warmup_steps == 10


def test_steps():
    config = make_config(
        schedule__name="steps", schedule__boundaries_epochs=(1.0, 2.5), schedule__factor=0.2,
        schedule__learning_rate=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(rates(config), [1.0] * 10 + [0.2] * 15 + [0.04] * 16, rtol=1e-6)


def test_exponential_is_a_staircase():
    config = make_config(
        schedule__name="exponential", schedule__every_epochs=2.4, schedule__factor=0.97,
        schedule__learning_rate=0.1, num_epochs=24.0,
    )  # fmt: skip
    np.testing.assert_allclose(rates(config), [0.1 * 0.97 ** (s // 24) for s in range(241)], rtol=2e-6)


def test_constant_scaled_with_the_batch():
    config = make_config(schedule__name="constant", schedule__scale_with_batch=True)
    config.batch_size = 1024
    np.testing.assert_allclose(rates(config), [0.4] * 41, rtol=1e-6)


def test_durations_in_steps():
    config = make_config(2.55)
    config.eval_every_epochs, config.checkpoint.every_epochs = 0.5, 2.0
    plan = optim.plan(config, STEPS_PER_EPOCH)
    assert (plan.total_steps, plan.eval_every_steps, plan.checkpoint_every_steps) == (26, 5, 20)
    assert plan.epoch(25) == 2.5
    config.num_epochs, config.num_steps, config.checkpoint.every_steps = None, 7, 3
    plan = optim.plan(config, STEPS_PER_EPOCH)
    assert (plan.total_steps, plan.checkpoint_every_steps) == (7, 3)


PARAMS = {"conv": {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]])}, "norm": {"scale": np.array([1.5, -0.5])}}


def gradients(step: int) -> dict:
    return jax.tree.map(lambda p: np.cos(p * (step + 1)), PARAMS)


def run_updates(config: ConfigDict, steps: int = 5) -> dict:
    plan = optim.plan(config, STEPS_PER_EPOCH)
    optimizer = optim.optimizer(config, plan)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients(step))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(rule, weight_decay: dict, steps: int = 5) -> dict:
    """Runs `rule(w, g, memory, rate, step, wd) -> (w, memory)` on each array in float64."""
    done = {}
    for group, leaves in PARAMS.items():
        for name, w in leaves.items():
            memory: dict = {}
            for step in range(steps):
                rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 40))
                w, memory = rule(w, gradients(step)[group][name], memory, rate, step, weight_decay[group])
            done[group] = {name: w}
    return done


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("vectors_too", [False, True])
def test_sgd(nesterov, vectors_too):
    config = make_config(
        optimizer__nesterov=nesterov, optimizer__weight_decay=0.01, optimizer__decay_norm_and_bias=vectors_too
    )

    def rule(w, g, memory, rate, step, wd):
        g = g + wd * w
        m = 0.9 * memory.get("m", 0) + g
        return w - rate * (g + 0.9 * m if nesterov else m), {"m": m}

    expected = by_hand(rule, {"conv": 0.01, "norm": 0.01 if vectors_too else 0.0})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run_updates(config), expected)


def test_rmsprop():
    config = make_config(
        optimizer__name="rmsprop", optimizer__weight_decay=0.01, optimizer__decay=0.8, optimizer__eps=1e-3
    )

    def rule(w, g, memory, rate, step, wd):
        g = g + wd * w
        v = 0.8 * memory.get("v", 1.0) + 0.2 * g**2
        m = 0.9 * memory.get("m", 0) + rate * g / np.sqrt(v + 1e-3)
        return w - m, {"v": v, "m": m}

    expected = by_hand(rule, {"conv": 0.01, "norm": 0.0})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run_updates(config), expected)


def test_adamw():
    config = make_config(optimizer__name="adamw", optimizer__weight_decay=0.05, optimizer__b2=0.95)

    def rule(w, g, memory, rate, step, wd):
        m = 0.9 * memory.get("m", 0) + 0.1 * g
        v = 0.95 * memory.get("v", 0) + 0.05 * g**2
        adam = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        return w - rate * (adam + wd * w), {"m": m, "v": v}

    expected = by_hand(rule, {"conv": 0.05, "norm": 0.0})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run_updates(config), expected)


def test_clipping_is_of_the_whole_trees_norm():
    config = make_config(optimizer__clip_norm=0.5, optimizer__momentum=0.0)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients(0))))
    assert norm > 0.5
    expected = jax.tree.map(lambda p, g: p - 0.1 * g * 0.5 / norm, PARAMS, gradients(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run_updates(config, 1), expected)


def test_weight_decay_reaches_kernels_and_tables_only():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "norm": {"scale": jnp.zeros(8), "bias": jnp.zeros(8)},
        "rel_h": jnp.zeros((15, 20)),
        "temperature": jnp.zeros(()),
    }
    assert optim.weight_decay_mask(params) == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "rel_h": True,
        "temperature": False,
    }


def test_ema_follows_early_and_settles():
    average = {"w": jnp.float32(1.0)}
    average = optim.ema(average, {"w": jnp.float32(0.0)}, 1, 0.99)
    np.testing.assert_allclose(average["w"], 2 / 11, rtol=1e-6)
    average = optim.ema(average, {"w": jnp.float32(1.0)}, 10_000, 0.99)
    np.testing.assert_allclose(average["w"], 2 / 11 + 0.01 * 9 / 11, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer__name": "sdg"}, "'sdg' is not one of.*did you mean 'sgd'"),
        ({"optimizer__name": "adamw", "optimizer__nesterov": True}, "nesterov=True needs.*'sgd', not 'adamw'"),
        ({"optimizer__momentum": 0.0, "optimizer__nesterov": True}, "needs optimizer.momentum above 0"),
        ({"optimizer__momentum": 1.0}, "optimizer.momentum=1.0 must be.*below 1"),
        ({"optimizer__ema_decay": 1.0}, "optimizer.ema_decay=1.0 must be.*below 1"),
        ({"schedule__name": "cosin"}, "'cosin' is not one of.*did you mean 'cosine'"),
        ({"schedule__warmup_epochs": 4.0}, "warm-up takes 40 steps of a run of 40.*lower"),
        ({"schedule__warmup_percent": 120.0}, "must lie between 0 and 100"),
        ({"schedule__name": "steps"}, r"boundaries_epochs=\(\) must be one or more ascending"),
        ({"schedule__name": "steps", "schedule__boundaries_epochs": (3.0, 2.0)}, "ascending"),
    ],
)
def test_bad_settings(settings, words):
    config = make_config(**settings)
    with pytest.raises(ValueError, match=words):
        optim.optimizer(config, optim.plan(config, STEPS_PER_EPOCH))


def test_no_steps_in_an_epoch():
    with pytest.raises(ValueError, match="steps_per_epoch=0 .*lower batch_size"):
        optim.plan(make_config(), 0)
