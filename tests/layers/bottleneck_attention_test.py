"""`BottleneckAttention` against numpy in float64, as a convolution's place-holder, and what it refuses."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import aaconv
from aaconv.layers import BottleneckAttention
from aaconv.models.augmentation import conv_and_norm
from aaconv.models.resnet import BottleneckBlock


def attention(params, x, *, heads, stride=1, scale_positions=True):
    """The layer for ``(b, h, w, c)``, straight from the equations."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    b, h, w, _ = x.shape
    q, k, v = np.split(x @ params["qkv"]["kernel"], 3, axis=-1)
    features = q.shape[-1]
    d = features // heads
    out = np.zeros((b, h, w, features))
    row, column = (part.ravel() for part in np.mgrid[:h, :w])
    rows = column[None, :] - column[:, None] + w - 1  # key - query
    lines = row[None, :] - row[:, None] + h - 1
    for image in range(b):
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            qi, ki, vi = (y[image, ..., part].reshape(h * w, d) for y in (q, k, v))
            content = qi @ ki.T / d**0.5
            positions = np.zeros_like(content)
            if "relative" in params:
                r = params["relative"]["rel_h"][lines] + params["relative"]["rel_w"][rows]
                positions = np.einsum("qd,qkd->qk", qi, r)
            logits = content + positions / (d**0.5 if scale_positions else 1)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[image, ..., part] = (weights @ vi).reshape(h, w, d)
    if stride == 1:
        return out
    pooled = np.zeros((b, -(-h // stride), -(-w // stride), features))
    for y in range(pooled.shape[1]):
        for x in range(pooled.shape[2]):
            top = y * stride - (pooled.shape[1] * stride - h) // 2  # SAME pads the rest on the other side
            left = x * stride - (pooled.shape[2] * stride - w) // 2
            window = out[:, max(top, 0) : top + stride, max(left, 0) : left + stride]
            pooled[:, y, x] = window.mean((1, 2))
    return pooled


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("scale_positions", [True, False])
@pytest.mark.parametrize("space,stride", [((4, 5), 1), ((4, 6), 2), ((5, 3), 2), ((7, 4), 3)], ids=str)
@pytest.mark.parametrize("implementation", ["factorised", "blockwise"])
def test_equals_the_formula(space, stride, scale_positions, implementation):
    x = draw(2, *space, 3)
    layer = BottleneckAttention(
        12,
        (3, 3),
        strides=stride,
        num_heads=3,
        scale_positions=scale_positions,
        implementation=implementation,
        relative_init=nn.initializers.normal(1.0),
    )
    with jax.enable_x64(True):
        layer = layer.clone(param_dtype=jnp.float64)
        variables = layer.init(jax.random.key(0), x)
        got = layer.apply(variables, x)
        assert got.dtype == jnp.float64
    (params,) = variables["params"].values()
    wanted = attention(params, x, heads=3, stride=stride, scale_positions=scale_positions)
    np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_without_positions_scaling_them_changes_nothing():
    x = jnp.asarray(draw(1, 4, 4, 3), jnp.float32)
    layer = BottleneckAttention(8, (3, 3), position_encoding="none")
    variables = layer.init(jax.random.key(0), x)
    assert set(variables["params"]["attention"]) == {"qkv"}
    other = layer.clone(scale_positions=False).apply(variables, x)
    np.testing.assert_array_equal(layer.apply(variables, x), other)
    wanted = attention(variables["params"]["attention"], np.asarray(x, np.float64), heads=4)
    np.testing.assert_allclose(other, wanted, atol=1e-5)


def test_sown_maps_have_the_positions_unscaled_too():
    x = jnp.asarray(draw(1, 3, 4, 6), jnp.float32)
    layer = aaconv.MultiHeadSelfAttention(2, 8, 8, use_bias=False, output_projection=False, scale_positions=False)
    variables = layer.init(jax.random.key(0), x)
    out, sown = layer.apply(variables, x, mutable=["intermediates"])
    (weights,) = sown["intermediates"]["attention_weights"]
    values = (x @ variables["params"]["qkv"]["kernel"])[..., 16:].reshape(1, 3, 4, 2, 4)
    by_hand = jnp.einsum("bnyxhw,bhwne->byxne", weights, values).reshape(out.shape)
    np.testing.assert_allclose(out, by_hand, atol=1e-5)


def test_attention_has_an_output_projection_and_scaled_positions_unless_told_otherwise():
    x = jnp.asarray(draw(1, 3, 4, 6), jnp.float32)
    layer = aaconv.MultiHeadSelfAttention(num_heads=2, key_depth=8, value_depth=4)
    variables = layer.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"qkv", "relative", "out"}
    without = layer.clone(output_projection=False)
    assert set(without.init(jax.random.key(0), x)["params"]) == {"qkv", "relative"}
    params = dict(variables["params"])
    out = params.pop("out")
    heads = without.apply({"params": params}, x)
    projected = heads @ out["kernel"] + out["bias"].reshape(1, 1, 1, -1)
    np.testing.assert_allclose(layer.apply(variables, x), projected, atol=1e-6)


@pytest.mark.parametrize("strides", [1, 2])
def test_in_the_place_of_a_convolution_in_a_block(strides):
    """1x1, norm, relu, attention and pooling, norm, relu, 1x1, norm, and the shortcut."""
    x = draw(2, 4, 6, 8)
    conv, norm = conv_and_norm(train=False, dtype=jnp.float64, momentum=0.9)
    block = BottleneckBlock(
        features=4,
        strides=strides,
        conv=partial(BottleneckAttention, num_heads=2, param_dtype=jnp.float64, **conv.keywords),
        plain_conv=partial(conv, param_dtype=jnp.float64),
        norm=partial(norm, param_dtype=jnp.float64),
    )
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x))
        leaves, tree = jax.tree.flatten(shapes)
        filled = [0.5 * draw(*leaf.shape, seed=i) + (leaf.ndim == 1) for i, leaf in enumerate(leaves)]
        # Variances are positive.
        variables = jax.tree.map(lambda v: abs(v) if v.ndim == 1 else v, jax.tree.unflatten(tree, filled))
        got = block.apply(jax.tree.map(jnp.asarray, variables), x)
    params, stats = variables["params"], variables["batch_stats"]

    def normed(y, name):
        mean, var = stats[name]["mean"], stats[name]["var"]
        return (y - mean) / np.sqrt(var + 1e-5) * params[name]["scale"] + params[name]["bias"]

    relu = partial(np.maximum, 0.0)
    y = relu(normed(x @ params["conv1"]["kernel"][0, 0], "norm1"))
    y = relu(normed(attention(params["conv2"]["attention"], y, heads=2, stride=strides), "norm2"))
    y = normed(y @ params["conv3"]["kernel"][0, 0], "norm3")
    shortcut = x[:, ::strides, ::strides] @ params["conv_shortcut"]["kernel"][0, 0]
    np.testing.assert_allclose(got, relu(y + normed(shortcut, "norm_shortcut")), atol=1e-10)


def test_any_batch_shape_number_of_axes_and_bfloat16():
    layer = BottleneckAttention(8, (3,), strides=2, dtype=jnp.bfloat16)
    x = jnp.ones((2, 3, 7, 5), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    got = layer.apply(variables, x)
    assert got.shape == (2, 3, 4, 8) and got.dtype == jnp.bfloat16
    assert layer.apply(variables, x[0, 0]).shape == (4, 8)


WRONG = [
    (dict(features=10), r"num_heads=4 must divide features=10: use features=8"),
    (dict(features=2), r"num_heads=4 must divide features=2: use features=4"),
    (dict(num_heads=0), r"num_heads=0 must be a whole number"),
    (dict(strides=0), r"strides=0 must be a number of at least 1"),
    (dict(strides=(1, 2, 1)), r"strides=\(1, 2, 1\) must be"),
    (dict(kernel_size=(3, 3, 3, 3)), r"need at least 5 axes"),
    (dict(position_encoding="rel"), r"'rel' is not one of"),
]


@pytest.mark.parametrize("wrong,message", WRONG, ids=[m[:30] for _, m in WRONG])
def test_says_what_does_not_fit(wrong, message):
    options = {"features": 8, "kernel_size": (3, 3), **wrong}
    with pytest.raises(ValueError, match=message):
        BottleneckAttention(**options).init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
