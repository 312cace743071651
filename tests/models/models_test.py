"""The networks: the paper's counts, their shapes, and what they refuse."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import aaconv
from aaconv import models
from aaconv.models.summary import count_parameters, summarise

# Parameters in millions to the digit that the paper prints, and where they are known to three digits;
# GFLOPs in the paper's counting. Bello et al. 2019, tables 1 to 3 and figure 4.
COUNTS = [
    ("resnet34", {}, "21.8", 7.4),
    ("resnet50", {}, "25.6", 8.2),
    ("resnet101", {}, "44.5", 15.6),
    ("resnet152", {}, "60.2", 23.0),
    ("aa_resnet34", {}, "20.745", 7.11),
    ("aa_resnet50", {}, "25.809", 8.34),
    ("aa_resnet101", {}, "45.387", 16.14),
    ("aa_resnet152", {}, "61.614", 23.88),
    ("aa_resnet50", dict(kappa=0.25, upsilon=0.25), "24.304", 7.9),
    ("aa_resnet50", dict(kappa=0.5, upsilon=0.5), "22.343", 7.3),
    ("aa_resnet50", dict(kappa=0.75, upsilon=0.75), "20.735", 6.8),
    ("aa_resnet50", dict(kappa=1.0, upsilon=1.0), "19.384", None),
]


def initialise(model, images):
    # Compiled as a whole: op by op it takes several times as long.
    return jax.jit(partial(model.init, train=False))(jax.random.key(1), images)


@pytest.mark.parametrize("name,options,parameters,gflops", COUNTS, ids=[f"{n}-{p}" for n, _, p, _ in COUNTS])
def test_counts_of_the_paper(name, options, parameters, gflops):
    summary = summarise(aaconv.create(name, **options), (224, 224, 3))
    digits = len(parameters.split(".")[1])
    assert f"{summary.parameters / 1e6:.{digits}f}" == parameters
    if gflops is not None:
        assert summary.flops / 1e9 == pytest.approx(gflops, rel=0.01)


def test_fully_attentional_resnet50_flops():
    # The paper prints 6.3 G; this network counts 6.38, the only figure of the series more than 1% away.
    summary = summarise(aaconv.create("aa_resnet50", kappa=1.0, upsilon=1.0), (224, 224, 3))
    assert summary.flops / 1e9 == pytest.approx(6.383, abs=1e-3)
    augmented = {a.path.split("/")[0][:6] for a in summary.attention}
    assert augmented == {"stage2", "stage3", "stage4"}
    assert all(a.conv_features == 0 for a in summary.attention)
    kinds = {layer.path: layer.kind for layer in summary.layers}
    assert kinds["conv_stem"] == kinds["stage1_block1/conv2"] == kinds["stage3_block1/conv1"] == "conv"


@pytest.mark.parametrize(
    "name,options,parameters",
    [
        ("wrn_28_10", {}, "36.28"),
        ("wrn_28_10", dict(shortcut="projection"), "36.54"),
        ("aa_wrn_28_10", {}, "36.05"),
        ("aa_wrn_28_10", dict(shortcut="projection"), "36.31"),
    ],
)
def test_counts_of_wide_resnets(name, options, parameters):
    summary = summarise(aaconv.create(name, **options), (32, 32, 3))
    assert f"{summary.parameters / 1e6:.2f}" == parameters
    assert len(summary.attention) == (12 if name.startswith("aa") else 0)


def test_the_summary_counts_what_is_there():
    model = aaconv.create("aa_resnet18", width=16, num_classes=7)
    summary = summarise(model, (64, 48, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 64, 48, 3)), train=False))
    assert summary.parameters == count_parameters(variables["params"])
    assert sum(p for p, _, _ in summary.by_stage().values()) == summary.parameters
    assert sum(f for _, f, _ in summary.by_stage().values()) == summary.flops
    assert list(summary.by_stage()) == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    first = summary.attention[0]
    assert (first.layer_input, first.layer_output, first.attends_at) == ((16, 12), (8, 6), (4, 3))
    assert (first.num_heads, first.key_depth, first.value_depth, first.conv_features) == (8, 160, 8, 24)
    assert first.map_bytes == 8 * 12**2 * 4


def test_flops_of_a_convolution_by_hand():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(8, (3, 3), strides=2, name="a")(x)
            x = aaconv.AAConv(8, (3, 3), upsilon=0.0, name="b")(x)
            return nn.Dense(5, name="c")(x.mean((1, 2)))

    summary = summarise(Net(), (10, 6, 4))
    assert [layer.flops for layer in summary.layers] == [
        2 * 5 * 3 * 9 * 4 * 8,
        2 * 5 * 3 * 9 * 8 * 8,
        2 * 8 * 5,
    ]


def test_a_layer_called_twice_has_its_parameters_once():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            layer = nn.Conv(4, (3, 3), name="a")
            return layer(layer(x))

    summary = summarise(Net(), (6, 6, 4))
    assert summary.parameters == 9 * 4 * 4 + 4
    assert summary.flops == 2 * (2 * 36 * 9 * 4 * 4)


def test_scanned_layers_are_refused_rather_than_miscounted():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Conv(4, (3, 3))(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scanned()(x, None)[0]

    with pytest.raises(ValueError, match="have 148 parameters by their calls and 444 in all"):
        summarise(Net(), (6, 6, 4))


def test_attention_flops_by_hand():
    summary = summarise(aaconv.create("aa_wrn_10_1", stages=(3,), num_heads=2), (16, 16, 3))
    (product,) = [layer for layer in summary.layers if layer.kind == "attention"]
    assert product.flops == 16**2 * (40 + 6)
    # There every multiply-add counts 2, and each product has two more in the backward pass.
    assert summary.training_flops == 3 * (summary.flops + product.flops)


@pytest.mark.parametrize("name", ["wrn_10_1", "aa_wrn_10_1", "aa_resnet18"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_features_and_statistics(name, dtype):
    small = dict(width=16) if "resnet" in name else {}
    heads = dict(num_heads=1) if name.startswith("aa") else {}
    model = aaconv.create(name, num_classes=7, dtype=dtype, **small, **heads)
    images = jnp.ones((2, 32, 40, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert set(variables) == {"params", "batch_stats"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    (logits, maps), updated = jax.eval_shape(
        lambda v: model.apply(v, images, train=True, features=True, mutable=["batch_stats"]), variables
    )
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    sides = {"stem": 1, "stage1": 1, "stage2": 2, "stage3": 4}
    if "resnet" in name:
        sides = {"stem": 4, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
    assert set(maps) == set(sides)
    for stage, stride in sides.items():
        assert maps[stage].shape[:3] == (2, -(-32 // stride), -(-40 // stride))
        assert maps[stage].dtype == dtype


@pytest.mark.slow
def test_a_small_network_learns_and_gradients_are_finite():
    model = aaconv.create("aa_wrn_10_1", num_classes=2, num_heads=1, min_key_depth=4)
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    labels = jnp.arange(8) % 2
    variables = initialise(model, images)

    @jax.jit
    def step(variables):
        def loss(params):
            logits, updated = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            value = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()
            return value, updated

        (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
        return value, {"params": params, **updated}, gradient

    first, variables, gradient = step(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    for _ in range(30):
        last, variables, _ = step(variables)
    assert last < 0.2 * first
    assert step._cache_size() == 1


def test_channels_of_the_stem_scale_the_whole_wide_resnet():
    found = summarise(aaconv.create("wrn", depth=10, width=3, stem_channels=10), (16, 16, 3))
    outputs = [shape[-1] for _, shape in found.output_shapes if "head" not in _]
    assert (outputs[0], sorted(set(outputs))) == (10, [10, 30, 60, 120])
    assert (
        summarise(aaconv.create("wrn_10_1", stem_channels=32), (16, 16, 3)).output_shapes[1:]
        == (summarise(aaconv.create("wrn_10_2"), (16, 16, 3)).output_shapes[1:])
    )


def test_the_choice_of_stages_pooling_and_encoding():
    options = dict(stages=(3,), pooled_stages=(3,), position_encoding="coordconv", num_heads=2, upsilon=0.5)
    summary = summarise(aaconv.create("aa_wrn_16_1", **options), (32, 32, 3))
    assert [a.path for a in summary.attention] == [f"stage3_block{i}/conv1/attention" for i in (1, 2)]
    assert {a.attends_at for a in summary.attention} == {(4, 4)}
    assert {a.position_encoding for a in summary.attention} == {"coordconv"}
    assert {a.value_depth for a in summary.attention} == {32}


@pytest.mark.parametrize("name,size", [("aa_resnet50", 224), ("aa_wrn_28_10", 32)])
def test_the_attention_ratio_is_kappa_and_upsilon(name, size):
    by_ratio = summarise(aaconv.create(name, attention_ratio=0.5), (size, size, 3))
    assert by_ratio == summarise(aaconv.create(name, kappa=0.5, upsilon=0.5), (size, size, 3))
    plain = summarise(aaconv.create(name.removeprefix("aa_")), (size, size, 3))
    assert summarise(aaconv.create(name, attention_ratio=0.0), (size, size, 3)) == plain


def test_an_augmented_network_without_attention_is_the_plain_one():
    plain = summarise(aaconv.create("resnet50"), (224, 224, 3))
    assert plain.attention == ()
    assert summarise(aaconv.create("aa_resnet50", kappa=0.0, upsilon=0.0), (224, 224, 3)) == plain


def test_models_by_name_and_pattern():
    assert {"wrn_28_10", "aa_wrn_28_10", "resnet18", "aa_resnet152"} <= set(aaconv.list_models())
    assert all(name.startswith("aa_") for name in aaconv.list_models("aa_*"))
    assert aaconv.create("aa_wrn_40_4").width == 4
    assert aaconv.create("wrn", depth=16, width=2).blocks_per_stage == 2
    assert set(models.MODELS) == set(aaconv.list_models())


@pytest.mark.parametrize("name", ["wrn_10_1", "aa_wrn_10_1"])
def test_larger_images_at_call_than_at_initialisation(name):
    heads = dict(num_heads=1, larger_maps="interpolate") if name.startswith("aa") else {}
    model = aaconv.create(name, num_classes=3, **heads)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False))
    for shape in ((2, 12, 8, 3), (2, 8, 6, 3)):
        logits = jax.eval_shape(partial(model.apply, train=False), variables, jnp.ones(shape))
        assert logits.shape == (2, 3)


WRONG_NAMES = [
    ("resnet51", {}, "unknown model 'resnet51'; did you mean 'resnet5?0?"),
    ("wrn_27_10", {}, r"depth=27 must be 6 n \+ 4 .*: use 28"),
    ("wrn", dict(width=0), "width=0 must be at least 1"),
    ("wrn", dict(stem_channels=0), "stem_channels=0 must be at least 1"),
    ("aa_resnet50", dict(kapa=0.2), "resnet50 has no argument 'kapa'; did you mean 'kappa'"),
    ("wrn_28_10", dict(width=4), r"width=4 is already set by the name 'wrn_28_10'; use wrn with depth="),
    ("aa_resnet50", dict(upsilon=1.5), "upsilon=1.5 must lie between 0"),
    ("aa_resnet50", dict(attention_ratio=1.5), "attention_ratio=1.5 must lie between 0"),
    (
        "aa_resnet50",
        dict(attention_ratio=0.5, kappa=0.5),
        "kappa=0.5 and attention_ratio=0.5: the ratio sets",
    ),
    ("resnet50", dict(attention_ratio=0.5), "attention_ratio=0.5: resnet50 does not attend; use aa_resnet50"),
    ("wrn_16_2", dict(kappa=0.2), "kappa=0.2: wrn_16_2 does not attend; use aa_wrn_16_2"),
    (
        "resnet18",
        dict(recalibration_stages=3),
        r"recalibration_stages=3 must be whole numbers, such as \(2, 3\), or None",
    ),
    ("resnet18", dict(num_classes=None), "num_classes=None must be a whole number"),
    ("resnet18", dict(num_classes=2.5), "num_classes=2.5 must be a whole number"),
    ("aa_resnet50", dict(attention_ratio="half"), "attention_ratio='half' must be a number, or None"),
    ("aa_resnet50", dict(position_encoding=None), "position_encoding=None must be a name"),
    ("botnet50", dict(scale_positions=1), "scale_positions=1 must be True or False"),
    ("resnet18", dict(dtype="float31"), "dtype='float31' is not a dtype"),
    ("resnet18", dict(reduction=8), "reduction has no effect with recalibration='none'"),
    ("se_resnet18", dict(extent=2), "extent has no effect with recalibration='se', which takes reduction and"),
    (None, {}, "name=None must be the name of a network"),
    ("aa_resnet50", dict(kappa=-0.5), "kappa=-0.5 must not be negative"),
    ("aa_resnet50", dict(num_heads=0), "num_heads=0 must be at least 1"),
    ("aa_resnet50", dict(stages=(3, 5)), r"stages=\(3, 5\): this network has stages 1 to 4, not 5"),
    ("aa_resnet50", dict(stages=(3, 4), pooled_stages=(2,)), r"pooled_stages=\(2,\) names stage 2, which is not among"),
    ("resnet50", dict(width=0), "width=0 must be at least 1"),
    ("resnet50", dict(num_classes=0), "num_classes=0 must be at least 1"),
    ("resnet50", dict(kappa=0.2), "kappa=0.2: resnet50 does not attend; use aa_resnet50"),
    ("aa_resnet50", dict(position_encoding="sine"), "position_encoding='sine' is not one of"),
    ("aa_resnet50", dict(implementation="skwe"), "implementation='skwe' is not one of"),
    ("wrn", dict(shortcut="proj"), "shortcut='proj' is not one of pad, projection; did you mean 'projection'"),
]


@pytest.mark.parametrize("name,options,message", WRONG_NAMES, ids=[f"{n}-{o}" for n, o, _ in WRONG_NAMES])
def test_says_what_does_not_exist(name, options, message):
    with pytest.raises(ValueError, match=message):
        aaconv.create(name, **options)


@pytest.mark.parametrize(
    "shape,dtype,message",
    [
        ((1, 3, 8, 3), jnp.float32, "images are 3x8 pixels: .* at least 4"),
        ((8, 8), jnp.float32, r"must be \(\*b, h, w, c\)"),
        ((1, 8, 8, 3), jnp.uint8, "images are uint8: scale and normalise"),
        ((1, 8, 8, 1), jnp.float32, "images have 1 channels and the network was initialised with 3"),
    ],
)
def test_images_that_do_not_fit(shape, dtype, message):
    model = aaconv.create("wrn_10_1", num_classes=3)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: model.apply(v, jnp.ones(shape, dtype), train=False), variables)


def test_heads_that_do_not_divide_are_reported_with_the_way_out():
    model = aaconv.create("aa_wrn_10_1", num_heads=16)
    with pytest.raises(ValueError, match="upsilon=0.1 of features=16 .*use upsilon >= 1"):
        summarise(model, (32, 32, 3))
