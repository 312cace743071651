"""MnasNet: the paper's counts, its blocks against lax operations, and where it attends."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import aaconv
from aaconv.layers import SqueezeExcite
from aaconv.models.mnasnet import MBConvBlock, round_channels
from aaconv.models.recalibration import identity
from aaconv.models.summary import summarise

# Width, then parameters in millions and GFLOPs, plain and augmented, as Bello et al. print them; but for the plain
# parameters at 1.4, where they print 6.10.
COUNTS = [
    (0.75, "2.91", 0.45, "3.02", 0.51),
    (1.0, "3.89", 0.63, "4.06", 0.70),
    (1.25, "5.26", 1.01, "5.53", 1.11),
    (1.4, "6.106", 1.17, "6.44", 1.29),
]
# Output channels of the stages, and side of the map where the stage's blocks end, with 224 pixels.
CHANNELS = {
    0.75: (24, 32, 64, 88, 120, 240),
    1.0: (24, 40, 80, 112, 160, 320),
    1.25: (32, 48, 104, 144, 200, 400),
    1.4: (32, 56, 112, 160, 224, 448),
}
SIDES = (56, 28, 14, 14, 7, 7)


@pytest.fixture(scope="module")
def summaries():
    """Each network, traced once."""
    found = {}
    for name in ("mnasnet_a1", "aa_mnasnet_a1"):
        for width, *_ in COUNTS:
            found[name, width] = summarise(aaconv.create(name, width_multiplier=width), (224, 224, 3))
    return found


@pytest.mark.parametrize("width,parameters,gflops,augmented_parameters,augmented_gflops", COUNTS)
def test_counts_of_the_paper(summaries, width, parameters, gflops, augmented_parameters, augmented_gflops):
    for name, wanted, giga in (
        ("mnasnet_a1", parameters, gflops),
        ("aa_mnasnet_a1", augmented_parameters, augmented_gflops),
    ):
        summary = summaries[name, width]
        assert f"{summary.parameters / 1e6:.{len(wanted.split('.')[1])}f}" == wanted
        # 2% of the printed figure, not of the far end of its rounding interval.
        assert summary.flops / 1e9 == pytest.approx(giga, rel=0.02)


@pytest.mark.parametrize("width", CHANNELS)
def test_stages(summaries, width):
    plain, augmented = (summaries[name, width] for name in ("mnasnet_a1", "aa_mnasnet_a1"))
    stages = plain.by_stage()
    assert list(stages) == ["stem", *(f"stage{i}" for i in range(1, 7)), "head"]
    shapes = [shape for _, _, shape in stages.values()]
    assert shapes[0] == (112, 112, round_channels(16, width))
    assert shapes[1:-1] == [(side, side, channels) for side, channels in zip(SIDES, CHANNELS[width], strict=True)]
    assert [shape for _, _, shape in augmented.by_stage().values()] == shapes
    layers = {layer.path: layer for layer in plain.layers}
    assert layers["conv_stem"].output_shape == (112, 112, round_channels(32, width))
    assert layers["conv_head"].output_shape == (7, 7, 1280)
    assert sum("conv_expand" in path for path in layers) == 15


def test_kernels_strides_and_expansions(summaries):
    layers = {layer.path: layer for layer in summaries["mnasnet_a1", 1.0].layers}
    channels, before, seen = 16, 112, []
    table = ((2, 3, 6), (3, 5, 3), (4, 3, 6), (2, 3, 6), (3, 5, 6), (1, 3, 6))  # blocks, kernel size, expansion
    for stage, (blocks, kernel_size, expansion) in enumerate(table, 1):
        for block in range(1, blocks + 1):
            path = f"stage{stage}_block{block}"
            inner = channels * expansion
            assert layers[f"{path}/conv_expand"].output_shape == (before, before, inner)
            assert layers[f"{path}/conv_expand"].parameters == channels * inner
            before = SIDES[stage - 1]
            assert layers[f"{path}/conv_depthwise"].output_shape == (before, before, inner)
            assert layers[f"{path}/conv_depthwise"].parameters == kernel_size**2 * inner
            assert layers[f"{path}/conv_depthwise"].flops == 2 * before**2 * kernel_size**2 * inner
            squeezed = layers.get(f"{path}/recalibration/reduce")
            if squeezed is not None:
                assert squeezed.output_shape == (1, 1, channels // 4)
                assert squeezed.parameters == (inner + 1) * (channels // 4)
                seen.append(stage)
            channels = CHANNELS[1.0][stage - 1]
    assert seen == [2, 2, 2, 4, 4, 5, 5, 5]


def test_where_it_attends(summaries):
    attention = summaries["aa_mnasnet_a1", 1.0].attention
    blocks = [(2, i) for i in (1, 2, 3)] + [(3, i) for i in (1, 2, 3, 4)] + [(4, 1), (4, 2)]
    blocks += [(5, i) for i in (1, 2, 3)] + [(6, 1)]
    assert [a.path for a in attention] == [f"stage{s}_block{b}/conv_expand/attention" for s, b in blocks]
    # The first block of a stage expands before its stride; only stage 2 pools.
    assert [a.layer_output[0] for a in attention] == [56, 28, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7, 7]
    assert [a.attends_at[0] for a in attention] == [28, 14, 14, 28, 14, 14, 14, 14, 14, 14, 7, 7, 7]
    assert all(a.layer_input == a.layer_output for a in attention)
    # 72 * 0.05 is less than a channel for each of four heads.
    assert [a.value_depth for a in attention] == [4, 4, 4, 12, 24, 24, 24, 24, 32, 32, 48, 48, 48]
    assert [a.key_depth for a in attention] == [8, 12, 12, 24, 48, 48, 48, 48, 64, 64, 96, 96, 96]
    assert {a.num_heads for a in attention} == {4}
    assert attention[0].conv_features == 72 - 4


def test_other_readings_that_the_docstring_names():
    count = lambda **options: summarise(aaconv.create("aa_mnasnet_a1", **options), (224, 224, 3))
    small = partial(count, width_multiplier=0.75)
    assert f"{small(min_key_depth=1).parameters / 1e6:.4f}" == "3.0148"
    assert f"{small(min_key_depth=20).parameters / 1e6:.2f}" == "3.08"
    assert f"{count(pooled_stages=()).flops / 1e9:.2f}" == "0.85"


def test_the_choice_of_stages_and_pooling():
    model = aaconv.create("aa_mnasnet_a1", stages=(5, 6), position_encoding="none", kappa=0.5, upsilon=0.25)
    attention = summarise(model, (64, 96, 3)).attention
    assert [a.path.split("/")[0] for a in attention] == [f"stage5_block{i}" for i in (1, 2, 3)] + ["stage6_block1"]
    assert [a.attends_at for a in attention] == [(4, 6), (2, 3), (2, 3), (2, 3)]
    assert {a.position_encoding for a in attention} == {"none"}
    assert attention[0].value_depth == 168 and attention[0].key_depth == 336
    model = aaconv.create("aa_mnasnet_a1", stages=(6,), pooled_stages=(6,))
    assert [a.attends_at for a in summarise(model, (128, 128, 3)).attention] == [(2, 2)]


def test_an_augmented_network_without_attention_is_the_plain_one(summaries):
    none = summarise(aaconv.create("aa_mnasnet_a1", kappa=0.0, upsilon=0.0), (224, 224, 3))
    assert none == summaries["mnasnet_a1", 1.0]


def test_channels_are_rounded_to_eights_and_not_below_nine_tenths():
    assert round_channels(24, 0.75) == 24  # 18: 16 is less than 90% of it
    assert round_channels(112, 1.4) == 160  # 156.8
    assert round_channels(16, 1.4) == 24  # 22.4
    assert round_channels(20, 1.0) == 24  # a half goes up
    assert round_channels(24, 0.1) == 8


def conv(x, p, strides=1):
    kernel = p["kernel"]
    groups = x.shape[-1] // kernel.shape[2]
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def norm(x, p, stats):
    mean, var, scale, bias = (v.reshape(1, 1, 1, -1) for v in (stats["mean"], stats["var"], p["scale"], p["bias"]))
    return (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias


relu = partial(jnp.maximum, 0.0)


def block_by_hand(p, s, x, strides, expanded):
    """An inverted bottleneck; ``expanded`` is what its expansion gives."""
    y = relu(norm(expanded, p["norm_expand"], s["norm_expand"]))
    y = relu(norm(conv(y, p["conv_depthwise"], strides), p["norm_depthwise"], s["norm_depthwise"]))
    if "recalibration" in p:
        reduce, expand = p["recalibration"]["reduce"], p["recalibration"]["expand"]
        scale = relu(y.mean((1, 2)) @ reduce["kernel"] + reduce["bias"][None])
        scale = 1 / (1 + jnp.exp(-(scale @ expand["kernel"] + expand["bias"][None])))
        y = y * scale[:, None, None]
    y = norm(conv(y, p["conv_project"]), p["norm_project"], s["norm_project"])
    return x + y if strides == 1 and x.shape[-1] == y.shape[-1] else y


def network_by_hand(params, stats, x):
    x = relu(norm(conv(x, params["conv_stem"], 2), params["norm_stem"], stats["norm_stem"]))
    p, s = params["separable_stem"], stats["separable_stem"]
    x = relu(norm(conv(x, p["conv_depthwise"]), p["norm_depthwise"], s["norm_depthwise"]))
    x = norm(conv(x, p["conv_project"]), p["norm_project"], s["norm_project"])
    for stage, (blocks, strides) in enumerate(((2, 2), (3, 2), (4, 2), (2, 1), (3, 2), (1, 1)), 1):
        for block in range(1, blocks + 1):
            p, s = (tree[f"stage{stage}_block{block}"] for tree in (params, stats))
            x = block_by_hand(p, s, x, strides if block == 1 else 1, conv(x, p["conv_expand"]))
    x = relu(norm(conv(x, params["conv_head"]), params["norm_head"], stats["norm_head"]))
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


def random_like(shapes):
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda s: jnp.asarray(0.5 + 0.2 * rng.normal(size=s.shape), s.dtype), shapes)
    # Kernels of both signs, or every relu would be the identity.
    return jax.tree.map(lambda v: v - 0.5 if v.ndim > 1 else v, values)


@pytest.mark.slow
def test_equals_the_network_by_hand():
    # At this width SeparableBlock has as many channels in as out, and no shortcut all the same.
    model = aaconv.create("mnasnet_a1", width_multiplier=0.25, num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 40, 33, 3))
    variables = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)))
    assert variables["params"]["separable_stem"]["conv_project"]["kernel"].shape == (1, 1, 8, 8)
    wanted = jax.jit(network_by_hand)(variables["params"], variables["batch_stats"], images)
    got = jax.jit(partial(model.apply, train=False))(variables, images)
    assert float(jnp.std(wanted)) > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    "strides,features,squeezed,added",
    [(1, 6, True, True), (1, 6, False, True), (2, 6, True, False), (1, 8, False, False)],
)
def test_an_augmented_block_by_hand(strides, features, squeezed, added):
    attending = partial(aaconv.AAConv, key_depth=6, value_depth=4, num_heads=2, use_bias=False)
    block = MBConvBlock(
        features=features,
        kernel_size=5,
        strides=strides,
        expansion=3,
        conv=attending,
        plain_conv=partial(nn.Conv, use_bias=False),
        norm=partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3),
        recalibration=partial(SqueezeExcite, reduced=2) if squeezed else identity,
    )
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 6))
    variables = random_like(jax.eval_shape(lambda: block.init(jax.random.key(0), x)))
    params, stats = variables["params"], variables["batch_stats"]
    assert ("recalibration" in params) == squeezed
    expanded = attending(18, (1, 1)).apply({"params": params["conv_expand"]}, x)
    got = block.apply(variables, x)
    np.testing.assert_allclose(got, block_by_hand(params, stats, x, strides, expanded), rtol=1e-4, atol=1e-5)
    # Whether the input is added shows where the last normalisation lets nothing through.
    last = jax.tree.map(jnp.zeros_like, params["norm_project"])
    silenced = block.apply({"params": {**params, "norm_project": last}, "batch_stats": stats}, x)
    np.testing.assert_array_equal(silenced, x if added else jnp.zeros_like(got))


@pytest.mark.parametrize("name", ["mnasnet_a1", "aa_mnasnet_a1"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_features_and_statistics(name, dtype):
    model = aaconv.create(name, width_multiplier=0.25, num_classes=7, dtype=dtype)
    images = jnp.ones((2, 64, 40, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert set(variables) == {"params", "batch_stats"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    (logits, maps), updated = jax.eval_shape(
        lambda v: model.apply(v, images, train=True, features=True, mutable=["batch_stats"]), variables
    )
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    strides = {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 16, "stage5": 32, "stage6": 32}
    assert {stage: x.shape[:3] for stage, x in maps.items()} == {
        stage: (2, -(-64 // stride), -(-40 // stride)) for stage, stride in strides.items()
    }
    assert {x.dtype for x in maps.values()} == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_an_augmented_block_in_bfloat16_is_near_float32():
    def make(dtype):
        return MBConvBlock(
            features=8,
            kernel_size=3,
            strides=1,
            expansion=3,
            conv=partial(aaconv.AAConv, key_depth=8, value_depth=4, num_heads=2, use_bias=False, dtype=dtype),
            plain_conv=partial(nn.Conv, use_bias=False, dtype=dtype),
            norm=partial(nn.BatchNorm, use_running_average=True, dtype=dtype),
            recalibration=partial(SqueezeExcite, reduced=2, dtype=dtype),
        )

    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 8))
    variables = random_like(jax.eval_shape(lambda: make(jnp.float32).init(jax.random.key(0), x)))
    exact = make(jnp.float32).apply(variables, x)
    half = make(jnp.bfloat16).apply(variables, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max()))


@pytest.mark.slow
def test_statistics_move_by_a_hundredth():
    model = aaconv.create("mnasnet_a1", width_multiplier=0.25, num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)))
    _, updated = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
    before = variables["batch_stats"]["norm_stem"]["mean"]
    seen = conv(images, variables["params"]["conv_stem"], 2).mean((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["norm_stem"]["mean"], 0.99 * before + 0.01 * seen, rtol=1e-4)


def test_dropout_drops_features_in_training_only():
    model = aaconv.create("mnasnet_a1", width_multiplier=0.25, num_classes=3, dropout=0.5)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)))

    @jax.jit
    def training(key):
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]

    first, again, other = (training(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    jax.eval_shape(lambda: model.apply(variables, images, train=False))  # takes no key
    without = aaconv.create("mnasnet_a1", width_multiplier=0.25, num_classes=3)
    jax.eval_shape(lambda: without.apply(variables, images, train=True, mutable=["batch_stats"]))  # nor does this


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("mnasnet_a1", dict(width_multiplier=0.0), "width_multiplier=0.0 must be a finite number greater than 0"),
        ("mnasnet_a1", dict(width_multiplier=-1.0), "width_multiplier=-1.0 must be .* the paper has 0.75"),
        ("mnasnet_a1", dict(width_multiplier=float("nan")), "width_multiplier=nan must be"),
        ("mnasnet_a1", dict(width_multiplier=float("inf")), "width_multiplier=inf must be"),
        ("mnasnet_a1", dict(width=2), "mnasnet_a1 has no argument 'width'; known: width_multiplier"),
        ("mnasnet_a1", dict(num_classes=0), "num_classes=0 must be at least 1"),
        ("mnasnet_a1", dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        ("mnasnet_a1", dict(kappa=0.1), "kappa=0.1: mnasnet_a1 does not attend; use aa_mnasnet_a1"),
        ("aa_mnasnet_a1", dict(stages=(6, 7)), r"stages=\(6, 7\): this network has stages 1 to 6, not 7"),
        ("aa_mnasnet_a1", dict(stages=(0,)), r"stages=\(0,\): this network has stages 1 to 6, not 0"),
        ("aa_mnasnet_a1", dict(pooled_stages=(1,)), r"pooled_stages=\(1,\) names stage 1, which is not among"),
        ("mnasnet_b1", {}, "unknown model 'mnasnet_b1'; did you mean 'mnasnet_a1'"),
    ],
)
def test_says_what_does_not_exist(name, options, message):
    with pytest.raises(ValueError, match=message):
        aaconv.create(name, **options)


@pytest.mark.parametrize(
    "shape,dtype,message",
    [
        ((1, 32, 31, 3), jnp.float32, "images are 32x31 pixels: .* at least 32"),
        ((1, 32, 32, 3), jnp.uint8, "images are uint8: scale and normalise"),
        ((1, 32, 32, 1), jnp.float32, "images have 1 channels and the network was initialised with 3"),
    ],
)
def test_images_that_do_not_fit(shape, dtype, message):
    model = aaconv.create("mnasnet_a1", width_multiplier=0.25, num_classes=3)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: model.apply(v, jnp.ones(shape, dtype), train=False), variables)
