"""ResNet's forward pass against one written with lax operations on the same parameters."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aaconv


def conv(x, p, strides=1):
    return lax.conv_general_dilated(
        x, p["kernel"], (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def norm(x, p, stats):
    mean, var, scale, bias = (v.reshape(1, 1, 1, -1) for v in (stats["mean"], stats["var"], p["scale"], p["bias"]))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def by_hand(params, stats, x, sizes, convs):
    """``convs`` are the strides of a block's convolutions by name: the v1.5 stride is in the 3x3."""
    relu = partial(jnp.maximum, 0.0)
    x = relu(norm(conv(x, params["conv_stem"], 2), params["norm_stem"], stats["norm_stem"]))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for stage, blocks in enumerate(sizes, 1):
        for block in range(1, blocks + 1):
            p, s = (tree[f"stage{stage}_block{block}"] for tree in (params, stats))
            stride = 2 if stage > 1 and block == 1 else 1
            y = x
            for i, strided in enumerate(convs, 1):
                y = norm(conv(y, p[f"conv{i}"], stride if strided else 1), p[f"norm{i}"], s[f"norm{i}"])
                y = relu(y) if i < len(convs) else y
            if "conv_shortcut" in p:
                x = norm(conv(x, p["conv_shortcut"], stride), p["norm_shortcut"], s["norm_shortcut"])
            x = relu(x + y)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.parametrize(
    "name,sizes,convs",
    [("resnet18", (2, 2, 2, 2), (True, False)), ("resnet50", (3, 4, 6, 3), (False, True, False))],
)
@pytest.mark.slow
def test_equals_the_network_by_hand(name, sizes, convs):
    model = aaconv.create(name, width=4, num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 40, 33, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.asarray(0.5 + 0.2 * rng.normal(size=s.shape), s.dtype), shapes)
    # Kernels of both signs, or every relu would be the identity.
    variables = jax.tree.map(lambda v: v - 0.5 if v.ndim > 1 else v, variables)
    wanted = by_hand(variables["params"], variables["batch_stats"], images, sizes, convs)
    np.testing.assert_allclose(model.apply(variables, images, train=False), wanted, rtol=2e-4, atol=1e-4)


@pytest.mark.slow
def test_residual_branches_start_at_zero():
    model = aaconv.create("resnet18", width=4, num_classes=3)
    init = jax.jit(partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
    for name, block in params.items():
        if "block" in name:
            assert (block["norm2"]["scale"] == 0).all() and (block["norm1"]["scale"] == 1).all()
