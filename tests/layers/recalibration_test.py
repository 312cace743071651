"""The layers that rescale a map, against their formulas in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aaconv.layers import BAM, CBAM, GatherExcite, SqueezeExcite

norm = partial(nn.BatchNorm, use_running_average=True)
SHAPE = (2, 8, 12, 16)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def normalised(x, name, params, stats):
    p, s = params[name], stats[name]
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def conv(x, p, *, padding, stride=1, dilation=1, depthwise=False):
    kernel = p["kernel"]
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    height, width = ((x.shape[1 + i] - (kernel.shape[i] - 1) * dilation - 1) // stride + 1 for i in (0, 1))
    out = p.get("bias", 0)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            top, left = i * dilation, j * dilation
            seen = x[:, top : top + height * stride : stride, left : left + width * stride : stride]
            seen = seen[:, :height, :width]
            out = out + (seen * kernel[i, j, 0] if depthwise else seen @ kernel[i, j])
    return out


def squeeze_excite(x, params, stats):
    y = x.mean((1, 2), keepdims=True)
    return x * sigmoid(dense(relu(dense(y, params["reduce"])), params["expand"]))


def gather_excite(x, params, stats, *, extent, form):
    e = extent
    if form == "parameter_free" and e == 0:
        y = x.mean((1, 2), keepdims=True)
    elif form == "parameter_free":
        y = np.zeros((x.shape[0], x.shape[1] // e, x.shape[2] // e, x.shape[3]))
        for u in range(y.shape[1]):
            for v in range(y.shape[2]):
                region = x[:, max(e * u - e + 1, 0) : e * u + e, max(e * v - e + 1, 0) : e * v + e]
                y[:, u, v] = region.mean((1, 2))
    elif e == 0:
        y = (x * params["conv1"]["kernel"][None, :, :, 0]).sum((1, 2), keepdims=True)
        y = normalised(y, "norm1", params, stats)
    else:
        y, steps = x, int(np.log2(e))
        for i in range(1, steps + 1):
            y = conv(y, params[f"conv{i}"], padding=1, stride=2, depthwise=True)
            y = normalised(y, f"norm{i}", params, stats)
            y = relu(y) if i < steps else y
    if form == "pointwise":
        y = dense(relu(dense(y, params["reduce"])), params["expand"])
    out = np.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = x[:, i, j] * sigmoid(y[:, i // e, j // e] if e else y[:, 0, 0])
    return out


def bam(x, params, stats):
    y = dense(relu(dense(x.mean((1, 2), keepdims=True), params["channel_reduce"])), params["channel_expand"])
    z = relu(conv(x, params["spatial_reduce"], padding=0))
    for i in (1, 2):
        z = relu(conv(z, params[f"spatial_conv{i}"], padding=4, dilation=4))
    z = conv(z, params["spatial_collapse"], padding=0)
    return x + x * sigmoid(normalised(y, "channel_norm", params, stats) + normalised(z, "spatial_norm", params, stats))


def cbam(x, params, stats):
    def mlp(y):
        return dense(relu(dense(y, params["reduce"])), params["expand"])

    x = x * sigmoid(mlp(x.mean((1, 2), keepdims=True)) + mlp(x.max((1, 2), keepdims=True)))
    seen = np.stack([x.mean(-1), x.max(-1)], axis=-1)
    return x * sigmoid(conv(seen, params["spatial"], padding=3))


LAYERS = {
    "se": (SqueezeExcite(reduction=4), squeeze_excite),
    "se without biases": (SqueezeExcite(reduction=4, use_bias=False), squeeze_excite),
    "bam": (BAM(reduction=4, norm=norm), bam),
    "cbam": (CBAM(reduction=4), cbam),
    **{
        f"ge {form} {extent}": (
            GatherExcite(extent=extent, form=form, reduction=4, norm=norm),
            partial(gather_excite, extent=extent, form=form),
        )
        for form in ("parameter_free", "parametrised", "pointwise")
        for extent in (0, 2, 4)
    },
}
every_layer = pytest.mark.parametrize("layer,formula", LAYERS.values(), ids=LAYERS)


def case(layer, shape=SHAPE):
    """An input, and variables that are not those of initialisation, where normalisation does nothing."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    random = {
        "params": jax.tree.map(lambda s: rng.normal(size=s.shape) / 2, variables.get("params", {})),
        "batch_stats": jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape), variables.get("batch_stats", {})),
    }
    return x, jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), random)


@every_layer
def test_equals_its_formula(layer, formula):
    x, variables = case(layer)
    wide, params, stats = jax.tree.map(
        lambda v: np.asarray(v, np.float64), (x, variables["params"], variables["batch_stats"])
    )
    got = layer.apply(variables, x)
    np.testing.assert_allclose(got, formula(wide, params, stats), rtol=1e-5, atol=1e-5)


@every_layer
def test_gradients_are_finite_and_reach_every_parameter(layer, formula):
    x, variables = case(layer)

    @partial(jax.grad, argnums=(0, 1))
    def gradient(params, x):
        return jnp.sin(layer.apply({**variables, "params": params}, x)).sum()

    for leaf in jax.tree.leaves(gradient(variables["params"], x)):
        assert np.isfinite(leaf).all() and np.any(leaf != 0)


@every_layer
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_keeps_bfloat16_and_its_parameters_float32(layer, formula, dtype):
    layer = layer.clone(dtype=dtype)
    x = jnp.ones(SHAPE, jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    out = jax.eval_shape(layer.apply, variables, x)
    assert (out.shape, out.dtype) == (SHAPE, jnp.bfloat16)


@every_layer
def test_takes_any_batch(layer, formula):
    x, variables = case(layer, (6, *SHAPE[1:]))
    wanted = layer.apply(variables, x)
    got = layer.apply(variables, x.reshape(2, 3, *SHAPE[1:]))
    np.testing.assert_allclose(got, wanted.reshape(got.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.apply(variables, x[0]), wanted[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [BAM(4), GatherExcite(4, "parametrised"), GatherExcite(0, "pointwise")], ids=repr)
def test_normalises_by_the_batch_in_training(layer):
    layer = layer.clone(norm=partial(nn.BatchNorm, use_running_average=False))
    x, variables = case(layer)
    _, updated = layer.apply(variables, x, mutable=["batch_stats"])
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))


@pytest.mark.parametrize(
    "layer,count",
    [
        (SqueezeExcite(4), 2 * 16 * 4 + 4 + 16),
        (SqueezeExcite(4, use_bias=False), 2 * 16 * 4),
        (SqueezeExcite(reduced=3), 2 * 16 * 3 + 3 + 16),
        (GatherExcite(), 0),
        (GatherExcite(0, "parametrised", norm=norm), (8 * 12 + 2) * 16),
        (GatherExcite(4, "parametrised", norm=norm), 2 * (9 + 2) * 16),
        (GatherExcite(2, "pointwise", 8, norm=norm), (9 + 2) * 16 + 2 * 16 * 2),
        # Channels: two projections and a normalisation. Space: 1x1, two 3x3, 1x1 and a normalisation.
        (BAM(4, norm=norm), (2 * 16 * 4 + 4 + 16 + 2 * 16) + (16 * 4 + 4) + 2 * (9 * 4 * 4 + 4) + (4 + 1) + 2),
        (CBAM(4), 2 * 16 * 4 + 4 + 16 + 49 * 2),
    ],
)
def test_parameters_by_hand(layer, count):
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones(SHAPE))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {}))) == count


def test_gathering_from_the_whole_map_serves_every_size_without_parameters():
    x = jnp.ones((1, 5, 7, 2))
    np.testing.assert_allclose(GatherExcite().apply({}, x), x * sigmoid(1), rtol=1e-6)


@pytest.mark.parametrize(
    "layer,shape,message",
    [
        (SqueezeExcite(32), SHAPE, "reduction=32 is larger than the 16 channels it divides: use at most 16"),
        (BAM(32, norm=norm), SHAPE, "reduction=32 is larger than the 16 channels"),
        (CBAM(32), SHAPE, "reduction=32 is larger than the 16 channels"),
        (CBAM(0), SHAPE, "reduction=0 must be at least 1"),
        (GatherExcite(0, "pointwise", 32, norm=norm), SHAPE, "reduction=32 is larger than the 16 channels"),
        (GatherExcite(form="parametrized"), SHAPE, "form='parametrized' is not one of .*did you mean 'parametrised'"),
        (GatherExcite(3), SHAPE, r"extent=3 must be 0 \(the whole map\) or a power of two from 2 on: use 2 or 4"),
        (GatherExcite(12), SHAPE, "extent=12 must be .*: use 8 or 16"),
        (GatherExcite(1), SHAPE, "extent=1 must be .*: use 2 or 4"),
        (GatherExcite(-2), SHAPE, "extent=-2 must be .*: use 2 or 4"),
        (GatherExcite(2.0), SHAPE, "extent=2.0 must be"),  # pyright: ignore[reportArgumentType]
        (GatherExcite(8), SHAPE, "extent=8 must divide the map of 8x12: that takes extent=2 or 4 or 0"),
        (GatherExcite(2), (1, 7, 7, 4), "extent=2 must divide the map of 7x7: that takes extent=0 "),
        (GatherExcite(0, "parametrised"), SHAPE, "form='parametrised' normalises and norm is None: give"),
        (BAM(4), SHAPE, "BAM normalises and norm is None: give"),
    ],
)
def test_says_what_does_not_fit(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones(shape))


def test_a_convolution_over_the_whole_map_serves_that_map_alone():
    layer = GatherExcite(0, "parametrised", norm=norm)
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones(SHAPE))
    with pytest.raises(ValueError, match="the map is 8x8 and the convolution .* made for 8x12: initialise with"):
        jax.eval_shape(layer.apply, variables, jnp.ones((1, 8, 8, 16)))
