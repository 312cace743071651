"""The networks that the paper compares attention with: counts, where their layers stand, and what they refuse."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import aaconv
from aaconv import models
from aaconv.models.resnet import BasicBlock, BottleneckBlock, ResNet
from aaconv.models.summary import count_parameters, summarise
from aaconv.models.wide_resnet import PreActivationBlock, WideResNet

# Parameters in millions as Bello et al. 2019 print them, tables 1 and 2 and the comparison on ResNet-50; of
# CBAM and BAM to one digit more, which their own papers print from what we recall.
COUNTS = [
    ("se_resnet34", {}, 224, "22.0"),
    ("se_resnet50", {}, 224, "28.1"),
    ("se_resnet101", {}, 224, "49.3"),
    ("se_resnet152", {}, 224, "66.8"),
    ("bam_resnet50", {}, 224, "25.92"),
    ("cbam_resnet50", {}, 224, "28.09"),
    ("se_wrn_28_10", {}, 32, "36.5"),
    ("ge_wrn_28_10", {}, 32, "36.3"),
    ("ge_wrn_28_10", dict(gather="parametrised", extent=2), 32, "36.3"),
]
KINDS = ("se", "ge", "bam", "cbam")
WITH_LAYERS = {"ge": {"gather": "pointwise"}}  # its other two forms have none, or only some


@pytest.mark.parametrize("name,options,side,parameters", COUNTS, ids=[f"{n}-{p}" for n, _, _, p in COUNTS])
def test_counts_of_the_paper(name, options, side, parameters):
    summary = summarise(aaconv.create(name, **options), (side, side, 3))
    assert f"{summary.parameters / 1e6:.{len(parameters.split('.')[1])}f}" == parameters


@pytest.mark.parametrize("name,gflops", [("se_resnet50", 8.2), ("se_wrn_28_10", 10.4), ("ge_wrn_28_10", 10.4)])
def test_flops_hardly_change(name, gflops):
    side = models.entry(name).image_size
    plain = summarise(aaconv.create(name.partition("_")[2]), (side, side, 3))
    summary = summarise(aaconv.create(name), (side, side, 3))
    assert summary.flops / 1e9 == pytest.approx(gflops, rel=0.015)
    assert plain.flops <= summary.flops < 1.001 * plain.flops


@pytest.mark.parametrize("name,side,parameters", [("resnet50", 224, 25_557_032), ("wrn_28_10", 32, 36_278_324)])
def test_networks_without_it_are_as_they_were(name, side, parameters):
    summary = summarise(aaconv.create(name, recalibration="none"), (side, side, 3))
    assert summary.parameters == parameters
    assert not any("recalibration" in layer.path for layer in summary.layers)


def places(model, side=32):
    """The modules that rescale, in the order of the forward pass."""
    found = [layer.path for layer in summarise(model, (side, side, 3)).layers if "recalibration" in layer.path]
    return list(dict.fromkeys(path.partition("recalibration")[0] + "recalibration" for path in found))


def test_stands_in_every_block_or_after_stages():
    blocks = [f"stage{s}_block{i}/recalibration" for s in (1, 2, 3, 4) for i in (1, 2)]
    assert places(aaconv.create("se_resnet18", width=16)) == blocks
    assert places(aaconv.create("cbam_resnet18", width=16)) == blocks
    assert places(aaconv.create("ge_resnet18", width=16, gather="parametrised")) == blocks
    assert places(aaconv.create("bam_resnet18", width=16)) == [f"stage{s}_recalibration" for s in (1, 2, 3)]
    assert places(aaconv.create("bam_wrn_16_1")) == ["stage1_recalibration", "stage2_recalibration"]
    assert places(aaconv.create("bam_wrn_16_1", recalibration_stages=(3,))) == ["stage3_recalibration"]
    assert places(aaconv.create("se_wrn_16_1", recalibration_stages=(2,))) == blocks[2:4]
    assert places(aaconv.create("se_wrn_16_1", recalibration_stages=())) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_gives_its_layers_to_their_stage(kind):
    plain = summarise(aaconv.create("wrn_10_1"), (32, 32, 3)).by_stage()
    stages = summarise(aaconv.create(f"{kind}_wrn_10_1", **WITH_LAYERS.get(kind, {})), (32, 32, 3)).by_stage()
    assert [stage for stage in stages if stages[stage][0] > plain[stage][0]] == [
        f"stage{s}" for s in ((1, 2) if kind == "bam" else (1, 2, 3))
    ]
    assert {s: shape for s, (_, _, shape) in stages.items()} == {s: shape for s, (_, _, shape) in plain.items()}
    assert stages["stage2"][2] == (16, 16, 32)


def tripled(*, name, norm=None, dtype=None):
    return lambda x: 3 * x


@pytest.mark.parametrize(
    "block",
    [
        partial(BasicBlock, features=4),
        partial(BottleneckBlock, features=1),
        partial(PreActivationBlock, features=4, shortcut="pad"),
    ],
    ids=["basic", "bottleneck", "pre-activation"],
)
def test_acts_on_the_residual_branch_alone(block):
    parts = dict(
        strides=1,
        conv=partial(nn.Conv, use_bias=False),
        plain_conv=partial(nn.Conv, use_bias=False),
        norm=partial(nn.BatchNorm, use_running_average=True),
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(20, 21, size=(2, 6, 6, 4)), jnp.float32)  # so large that no last relu cuts
    plain = block(**parts)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.uniform(-0.2, 0.2, s.shape) ** 2, s.dtype), shapes)
    branch = plain.apply(variables, x) - x
    assert np.abs(branch).max() > 1e-3
    got = block(**parts, recalibration=tripled).apply(variables, x)
    np.testing.assert_allclose(got, x + 3 * branch, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network", [WideResNet(1, 1), ResNet((1, 1), BasicBlock, width=4)], ids=["wrn", "resnet"])
def test_rescales_what_a_stage_hands_on(network):
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(partial(network.init, train=False))(jax.random.key(1), images)
    stages = 3 if isinstance(network, WideResNet) else 2
    other = network.clone(stage_recalibrations=(tripled, *[models.recalibration.identity] * (stages - 1)))
    (_, plain), (_, maps) = (net.apply(variables, images, train=False, features=True) for net in (network, other))
    np.testing.assert_allclose(maps["stage1"], 3 * plain["stage1"], rtol=1e-6)
    np.testing.assert_array_equal(maps["stem"], plain["stem"])
    assert np.any(maps["stage2"] != plain["stage2"])


def test_goes_with_attention():
    shape = (224, 224, 3)
    plain, augmented = (summarise(aaconv.create(name), shape) for name in ("resnet50", "aa_resnet50"))
    both = summarise(aaconv.create("aa_resnet50", recalibration="se"), shape)
    assert both.parameters - augmented.parameters == summarise(aaconv.create("se_resnet50"), shape).parameters - (
        plain.parameters
    )
    assert both.attention == augmented.attention


def test_arguments_reach_the_layers():
    few, many = (summarise(aaconv.create("se_wrn_10_1", reduction=r), (32, 32, 3)) for r in (16, 4))
    assert many.parameters - few.parameters == sum(2 * c * (c // 4 - c // 16) for c in (16, 32, 64))
    layers = summarise(aaconv.create("ge_wrn_10_1", gather="parametrised", extent=4), (32, 32, 3)).layers
    strided = [layer.output_shape for layer in layers if "stage2_block1/recalibration/conv" in layer.path]
    assert strided == [(8, 8, 32), (4, 4, 32)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain", ["wrn_10_1", "resnet18"])
def test_bfloat16_logits_and_statistics(kind, plain):
    small = dict(width=16) if "resnet" in plain else {}
    model = aaconv.create(f"{kind}_{plain}", num_classes=7, dtype=jnp.bfloat16, **small)
    images = jnp.ones((2, 32, 40, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    (logits, maps), updated = jax.eval_shape(
        lambda v: model.apply(v, images, train=True, features=True, mutable=["batch_stats"]), variables
    )
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert {m.dtype for m in maps.values()} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ge", "bam"])  # those that normalise, by the statistics of the batch
def test_gradients_of_a_training_step_are_finite(kind):
    model = aaconv.create(f"{kind}_wrn_10_1", num_classes=2, **WITH_LAYERS.get(kind, {}))
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), images)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jax.nn.log_softmax(logits)[:, 0].sum()

    found = jax.tree_util.tree_leaves_with_path(gradient(variables["params"]))
    assert all(np.isfinite(leaf).all() for _, leaf in found)
    assert any("recalibration" in jax.tree_util.keystr(path) and np.any(leaf != 0) for path, leaf in found)


def test_flops_of_grouped_convolutions_by_hand():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(8, (3, 3), strides=2, feature_group_count=4, use_bias=False, name="grouped")(x)
            x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")(x)
            x = nn.Conv(8, x.shape[1:3], padding="VALID", feature_group_count=8, use_bias=False, name="whole_map")(x)
            return nn.Dense(2, use_bias=False, name="pointwise")(x)

    summary = summarise(Net(), (10, 6, 8))
    # Every output value of the first sees 3x3 pixels of two channels, of the next two one channel.
    assert [layer.flops for layer in summary.layers] == [
        2 * (5 * 3 * 8) * 9 * 2,
        2 * (5 * 3 * 8) * 9,
        2 * 8 * (5 * 3),
        2 * 2 * 8,
    ]
    assert [layer.parameters for layer in summary.layers] == [9 * 2 * 8, 9 * 8, 15 * 8, 16]


@pytest.mark.parametrize("kind", KINDS)
def test_names(kind):
    names = aaconv.list_models(f"{kind}_*")
    sizes = {f"{kind}_resnet{depth}" for depth in (18, 34, 50, 101, 152)}
    assert set(names) == {f"{kind}_wrn", f"{kind}_wrn_28_10"} | sizes
    for name in names:
        found = models.entry(name)
        assert not found.augmented and found.fixed >= {"recalibration"} and "20" in found.source
        assert found.image_size == (32 if "wrn" in name else 224)
    assert models.defaults(f"{kind}_resnet50")["reduction"] == 16
    wide = aaconv.create(f"{kind}_wrn_16_2", num_classes=3)
    other = aaconv.create("wrn", depth=16, width=2, num_classes=3, recalibration=kind)
    shapes = [
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False))
        for m in (wide, other)
    ]
    assert shapes[0] == shapes[1]
    plain = summarise(aaconv.create("wrn_16_2", num_classes=3), (8, 8, 3)).parameters
    assert (count_parameters(shapes[0]["params"]) > plain) == (kind != "ge")


WRONG = [
    ("resnet50", dict(recalibration="sse"), "recalibration='sse' is not one of none, se, ge, .*did you mean 'se'"),
    ("ge_wrn", dict(gather="free"), "gather='free' is not one of parameter_free, parametrised, pointwise"),
    ("ge_wrn", dict(extent=3), "extent=3 must be 0"),
    ("se_wrn", dict(reduction=0), "reduction=0 must be at least 1"),
    (
        "se_wrn",
        dict(recalibration_stages=(1, 4)),
        r"recalibration_stages=\(1, 4\): this network has stages 1 to 3, not",
    ),
    ("bam_resnet50", dict(recalibration_stages=(0,)), r"recalibration_stages=\(0,\): .* stages 1 to 4, not 0"),
    ("se_wrn_28_10", dict(recalibration="ge"), "already set by the name 'se_wrn_28_10'; use wrn_28_10 with recalib"),
    ("se_wrn_28_10", dict(depth=16), "depth=16 is already set by the name 'se_wrn_28_10'; use se_wrn with depth="),
    ("se_resnet50", dict(kappa=0.2), "se_resnet50 does not attend; use aa_resnet50 with recalibration='se', or"),
    ("se_resnet50", dict(reductoin=8), "se_resnet50 has no argument 'reductoin'; did you mean 'reduction'"),
    ("se_resnet51", {}, "unknown model 'se_resnet51'; did you mean 'se_resnet"),
    ("see_wrn_28_10", {}, "unknown model 'see_wrn_28_10'; did you mean 'se_wrn_28_10'"),
]


@pytest.mark.parametrize("name,options,message", WRONG, ids=[f"{n}-{o}" for n, o, _ in WRONG])
def test_says_what_does_not_exist(name, options, message):
    with pytest.raises(ValueError, match=message):
        aaconv.create(name, **options)


def test_an_extent_that_does_not_divide_a_stage_is_reported():
    with pytest.raises(ValueError, match="extent=2 must divide the map of 7x7: that takes extent=0 "):
        summarise(aaconv.create("ge_resnet18", extent=2), (224, 224, 3))
    summary = summarise(aaconv.create("ge_resnet18", extent=2, recalibration_stages=(1, 2, 3)), (224, 224, 3))
    assert summary.parameters == summarise(aaconv.create("resnet18"), (224, 224, 3)).parameters
