"""BoTNet: its parameters, where it attends, and what it refuses."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import aaconv
from aaconv import models
from aaconv.models.botnet import botnet
from aaconv.models.summary import summarise


@pytest.mark.parametrize(
    "options,parameters",
    [
        ({}, 20_852_008),
        (dict(position_encoding="none"), 20_838_440),
        (dict(last_stride=1), 20_859_176),
        (dict(scale_positions=False), 20_852_008),
    ],
    ids=str,
)
def test_botnet50_has_the_20_8_million_parameters_of_the_paper(options, parameters):
    found = summarise(aaconv.create("botnet50", **options), (224, 224, 3)).parameters
    assert found == parameters
    assert found // 100_000 == 208  # 20.8M, cut; without positions it is 20.8M rounded too


def test_attention_takes_the_place_of_the_last_stage_alone():
    plain = summarise(aaconv.create("resnet50"), (224, 224, 3)).by_stage()
    ours = summarise(aaconv.create("botnet50"), (224, 224, 3)).by_stage()
    assert {stage for stage in plain if plain[stage] != ours[stage]} == {"stage4"}
    tables = 128 * (2 * 27 + 4 * 13)
    assert plain["stage4"][0] - ours["stage4"][0] == 3 * 512 * 512 * (9 - 3) - tables
    assert plain["stage4"][2] == ours["stage4"][2] == (7, 7, 2048)


@pytest.mark.parametrize(
    "name,last_stride,sizes",
    [("botnet50", 2, [(14, 7), (7, 7), (7, 7)]), ("botnet101", 1, [(14, 14)] * 3), ("botnet152", 2, None)],
)
def test_the_summary_lists_what_attends(name, last_stride, sizes):
    summary = summarise(aaconv.create(name, last_stride=last_stride), (224, 224, 3))
    assert [a.path for a in summary.attention] == [f"stage4_block{i}/conv2/attention" for i in (1, 2, 3)]
    assert {(a.num_heads, a.key_depth, a.value_depth, a.conv_features) for a in summary.attention} == {(4, 512, 512, 0)}
    assert {a.position_encoding for a in summary.attention} == {"relative"}
    for attention, (before, after) in zip(summary.attention, sizes or [(14, 7), (7, 7), (7, 7)], strict=True):
        assert attention.attends_at == attention.layer_input == (before, before)
        assert attention.layer_output == (after, after)


def test_shapes_dtypes_and_other_sizes_at_call():
    model = aaconv.create("botnet50", num_classes=7, width=8, dtype=jnp.bfloat16, larger_maps="clip")
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 64, 64, 3)), train=False))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    for shape in ((2, 64, 64, 3), (2, 96, 40, 3)):
        forward = partial(model.apply, train=False, features=True)
        logits, maps = jax.eval_shape(forward, variables, jnp.ones(shape))
        assert logits.shape == (2, 7) and logits.dtype == jnp.float32
        assert maps["stage4"].shape == (2, shape[1] // 32, -(-shape[2] // 32), 256)
        assert maps["stage4"].dtype == jnp.bfloat16


def test_a_last_stage_without_stride_takes_images_of_sixteen_pixels():
    small = aaconv.create("botnet50", width=8, num_classes=3, last_stride=1)
    shapes = jax.eval_shape(lambda: small.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)), train=False))
    assert shapes["params"]["stage4_block1"]["conv2"]["attention"]["relative"]["rel_h"].shape == (1, 16)
    with pytest.raises(ValueError, match="divides each side by 32"):
        summarise(small.clone(stage_strides=None), (16, 16, 3))


def test_the_names_carry_source_resolution_and_arguments():
    for depth in (50, 101, 152):
        entry = models.entry(f"botnet{depth}")
        assert (entry.source, entry.image_size, entry.augmented) == ("Srinivas et al. 2021", 224, True)
    assert set(models.defaults("botnet50")) == {
        *("num_classes", "width", "num_heads", "scale_positions", "last_stride", "position_encoding"),
        *("larger_maps", "implementation", "dtype"),
    }


WRONG = [
    (dict(last_stride=3), "last_stride=3 must be 1"),
    (dict(num_heads=0), "num_heads=0 must be a whole number"),
    (dict(width=0), "width=0 must be at least 1"),
    (dict(position_encoding="sine"), "position_encoding='sine' is not one of"),
    (dict(implementation="skwe"), "implementation='skwe' is not one of"),
    (dict(kappa=0.2), "botnet50 has no argument 'kappa'"),
    (dict(depth=101), "depth=101 is already set by the name 'botnet50'"),
]


@pytest.mark.parametrize("options,message", WRONG, ids=[str(o) for o, _ in WRONG])
def test_says_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        aaconv.create("botnet50", **options)


def test_a_depth_without_bottlenecks_is_refused():
    with pytest.raises(ValueError, match="depth=34 must be one of 50, 101, 152"):
        botnet(34)
