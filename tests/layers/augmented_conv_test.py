"""AAConv as a drop-in for nn.Conv, and the properties the paper gives it."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import aaconv
from aaconv.layers import RelativePosition, attention_depths, augmented_conv

small = partial(aaconv.AAConv, kappa=0.5, upsilon=0.25, num_heads=2, min_key_depth=1)


def images(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def shape_of(module, x):
    return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x)[0]).shape


def test_takes_every_argument_of_conv_in_its_place():
    theirs = list(inspect.signature(nn.Conv).parameters.values())
    ours = list(inspect.signature(aaconv.AAConv).parameters.values())
    positional = [p for p in theirs if p.name not in ("parent", "name")]
    for a, b in zip(positional, ours, strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    new = [p for p in ours if p.name not in {t.name for t in theirs}]
    assert {"kappa", "upsilon", "num_heads"} <= {p.name for p in new}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in new)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2, "padding": "VALID", "use_bias": False},
        {"kernel_dilation": 2, "padding": [(1, 2), (0, 1)], "feature_group_count": 2},
        {"padding": "CIRCULAR", "dtype": jnp.bfloat16, "precision": "highest"},
        {"input_dilation": (2, 1), "padding": 1},
    ],
    ids=str,
)
def test_without_attention_is_conv_bit_for_bit(options):
    x = images(2, 7, 6, 4)
    theirs, ours = nn.Conv(6, (3, 3), **options), small(6, (3, 3), **{**options}, upsilon=0.0)
    wanted, got = theirs.init(jax.random.key(1), x), ours.init(jax.random.key(1), x)
    assert jax.tree.structure(wanted) == jax.tree.structure(got)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), wanted, got))
    for batch in (x, x[0], x.reshape(2, 1, 7, 6, 4)):
        a, b = theirs.apply(wanted, batch), ours.apply(got, batch)
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()


def test_fully_attentional_has_no_convolution():
    x = images(2, 6, 5, 4)
    layer = small(8, (3, 3), upsilon=1.0)
    variables = layer.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"attention"}
    assert layer.apply(variables, x).shape == (2, 6, 5, 8)


def test_is_the_concat_of_its_branches():
    x = images(2, 6, 5, 4)
    layer = small(8, (3, 3))
    variables = layer.init(jax.random.key(0), x)
    params = variables["params"]
    conv = nn.Conv(6, (3, 3)).apply({"params": params["conv"]}, x)
    attention = aaconv.MultiHeadSelfAttention(num_heads=2, key_depth=4, value_depth=2)
    attended = attention.apply({"params": params["attention"]}, x)
    np.testing.assert_array_equal(layer.apply(variables, x), jnp.concatenate([conv, attended], -1))


def test_attention_branch_is_the_formula_on_its_parameters():
    x = images(1, 3, 4, 5)
    attention = aaconv.MultiHeadSelfAttention(num_heads=2, key_depth=6, value_depth=4)
    variables = attention.init(jax.random.key(0), x)
    p = jax.tree.map(np.asarray, variables["params"])
    qkv = np.asarray(x) @ p["qkv"]["kernel"] + p["qkv"]["bias"]
    heads = []
    for h in range(2):
        q = qkv[0, ..., 3 * h : 3 * h + 3].reshape(12, 3)
        k = qkv[0, ..., 6 + 3 * h : 6 + 3 * h + 3].reshape(12, 3)
        v = qkv[0, ..., 12 + 2 * h : 12 + 2 * h + 2].reshape(12, 2)
        at = np.stack(np.divmod(np.arange(12), 4), -1)
        rows = p["relative"]["rel_h"][at[None, :, 0] - at[:, None, 0] + 2]
        columns = p["relative"]["rel_w"][at[None, :, 1] - at[:, None, 1] + 3]
        logits = (np.einsum("qd,kd->qk", q, k) + np.einsum("qd,qkd->qk", q, rows + columns)) / np.sqrt(3)
        heads.append(np.asarray(jax.nn.softmax(logits, -1)) @ v)
    wanted = np.concatenate(heads, -1) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(attention.apply(variables, x).reshape(12, 4), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)], ids=str)
@pytest.mark.parametrize("padding", ["SAME", "VALID", 0, 2, [(0, 3), (4, 1)], "CIRCULAR", "REFLECT"], ids=str)
@pytest.mark.parametrize("strides", [1, 2, 3])
def test_output_has_the_size_of_the_convolution(size, padding, strides):
    x = images(1, *size, 4)
    for kernel, dilation in (((3, 3), 1), ((2, 5), 1), ((3, 3), 2)):
        options = dict(strides=strides, padding=padding, kernel_dilation=dilation)
        try:
            wanted = shape_of(nn.Conv(8, kernel, **options), x)
        except ValueError:
            continue  # a window larger than the padded image
        for how in ("subsample", "average_pool"):
            for pooled in (False, True):
                layer = small(8, kernel, **options, strided_attention=how, pooled_attention=pooled)
                if 0 in wanted:
                    with pytest.raises(ValueError, match="give an empty output"):
                        shape_of(layer, x)
                else:
                    assert shape_of(layer, x) == wanted


def attention_reads(layer, size):
    """How strongly each input pixel reaches the attention maps, ``size``."""
    x = images(*size, 2)
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    @jax.grad
    def sensitivity(x):
        _, captured = layer.apply(variables, x, mutable=["intermediates"])
        (weights,) = captured["intermediates"]["attention"]["attention_weights"]
        return (weights * images(*weights.shape, seed=1)).sum()

    return np.abs(np.asarray(sensitivity(x))).sum(-1)


@pytest.mark.parametrize(
    "size,strides,padding,how,wanted",
    [
        ((8, 8), 2, "SAME", "subsample", [1, 3, 5, 7]),
        ((7, 7), 2, "SAME", "subsample", [0, 2, 4, 6]),
        ((8, 8), 1, "VALID", "subsample", [1, 2, 3, 4, 5, 6]),
        ((8, 8), 2, "VALID", "subsample", [1, 3, 5]),
        ((8, 8), 2, [(1, 1), (1, 1)], "subsample", [0, 2, 4, 6]),
        ((8, 8), 2, "SAME", "average_pool", [0, 1, 2, 3, 4, 5, 6, 7]),
        ((8, 8), 4, "SAME", "average_pool", [0, 1, 2, 3, 4, 5, 6, 7]),
        ((8, 8), 4, "SAME", "subsample", [1, 5]),
    ],
    ids=str,
)
def test_strided_attention_reads_the_centres_of_the_windows(size, strides, padding, how, wanted):
    layer = small(8, (3, 3), strides=strides, padding=padding, strided_attention=how)
    read = attention_reads(layer, size)
    assert list(np.flatnonzero(read.sum(1))) == wanted
    assert list(np.flatnonzero(read.sum(0))) == wanted


def test_average_pool_reads_the_mean_of_its_window():
    x = images(1, 8, 8, 4)
    layer = small(8, (3, 3), strides=2, strided_attention="average_pool")
    variables = layer.init(jax.random.key(0), x)
    means = nn.avg_pool(x, (2, 2), (2, 2))
    attention = aaconv.MultiHeadSelfAttention(num_heads=2, key_depth=4, value_depth=2)
    wanted = attention.apply({"params": variables["params"]["attention"]}, means)
    np.testing.assert_allclose(layer.apply(variables, x)[..., 6:], wanted, atol=1e-6)


def test_pooled_attention_pools_and_upsamples_its_branch_only():
    x = images(2, 8, 8, 4)
    layer = small(8, (3, 3), pooled_attention=True)
    variables = layer.init(jax.random.key(0), x)
    assert variables["params"]["attention"]["relative"]["rel_h"].shape == (7, 2)
    attention = aaconv.MultiHeadSelfAttention(num_heads=2, key_depth=4, value_depth=2)
    pooled = nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)
    low = attention.apply({"params": variables["params"]["attention"]}, pooled)
    got = layer.apply(variables, x)
    # The windows are centred on pixels 1, 3, 5 and 7: there the result is attention's own, between them the mean.
    np.testing.assert_allclose(got[:, 1::2, 1::2, 6:], low, atol=1e-6)
    np.testing.assert_allclose(got[:, 2::2, 1::2, 6:], (low[:, 1:] + low[:, :-1]) / 2, atol=1e-6)
    np.testing.assert_allclose(got[:, :2, :, 6:], got[:, [1, 0], :, 6:], atol=1e-6)
    conv = nn.Conv(6, (3, 3)).apply({"params": variables["params"]["conv"]}, x)
    np.testing.assert_array_equal(got[..., :6], conv)


@pytest.mark.parametrize("encoding", ["none", "relative", "sinusoid", "coordconv"])
def test_position_encodings(encoding):
    x = images(1, 4, 5, 6)
    layer = small(8, (1, 1), upsilon=1.0, position_encoding=encoding)
    variables = layer.init(jax.random.key(0), x)
    assert ("relative" in variables["params"]["attention"]) == (encoding == "relative")
    order = np.random.default_rng(0).permutation(20)
    mix = lambda x: x.reshape(1, 20, -1)[:, order].reshape(1, 4, 5, -1)
    difference = np.abs(layer.apply(variables, mix(x)) - mix(layer.apply(variables, x))).max()
    # Permuting pixels permutes the output exactly when positions are not encoded.
    assert difference < 1e-5 if encoding == "none" else difference > 1e-3


def test_translation_equivariant_on_a_periodic_image():
    # The map holds two periods, so that shifting it by a pixel permutes the keys of every query, and
    # tables with the image's period make the relative logits periodic too.
    tile = images(1, 4, 4, 3)
    x = jnp.tile(tile, (1, 2, 2, 1))
    layer = small(8, (1, 1), upsilon=1.0)
    variables = layer.init(jax.random.key(0), x)
    period = images(4, 2, seed=3)
    table = period[(jnp.arange(15) - 7) % 4]
    tables = {"rel_h": table, "rel_w": table[::-1]}
    variables = {"params": {"attention": {**variables["params"]["attention"], "relative": tables}}}
    rolled = layer.apply(variables, jnp.roll(x, (1, 2), (1, 2)))
    np.testing.assert_allclose(rolled, jnp.roll(layer.apply(variables, x), (1, 2), (1, 2)), atol=1e-5)


def test_gradient_reaches_every_parameter():
    x = images(2, 6, 5, 4)
    layer = small(8, (3, 3))
    variables = layer.init(jax.random.key(0), x)
    weights = images(2, 6, 5, 8, seed=4)
    gradient = jax.grad(lambda v: (layer.apply(v, x) * weights).sum())(variables)
    sizes = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient)
    flat = jax.tree_util.tree_leaves_with_path(sizes)
    assert {jax.tree_util.keystr(p) for p, _ in flat} >= {
        "['params']['attention']['relative']['rel_h']",
        "['params']['attention']['relative']['rel_w']",
    }
    assert all(size > 1e-4 for _, size in flat)


@pytest.mark.parametrize("kappa,upsilon", [(0.25, 0.25), (0.5, 0.125), (1.0, 1.0)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_parameter_change_of_equation_5(kappa, upsilon, kernel):
    f_in, f_out = 24, 64
    x = jax.ShapeDtypeStruct((1, 8, 8, f_in), jnp.float32)
    count = lambda m: sum(
        np.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(m.init, jax.random.key(0), x))
        if "relative" not in jax.tree_util.keystr(path)
    )
    options = dict(kernel_size=(kernel, kernel), use_bias=False)
    plain = count(nn.Conv(f_out, **options))
    augmented = count(aaconv.AAConv(f_out, **options, kappa=kappa, upsilon=upsilon, num_heads=4, min_key_depth=1))
    formula = f_in * f_out * (2 * kappa + (1 - kernel**2) * upsilon + f_out / f_in * upsilon**2)
    assert augmented - plain == pytest.approx(formula, abs=1e-6)


def test_relative_tables_are_counted_and_drawn_as_in_the_paper():
    x = images(1, 14, 9, 4)
    layer = aaconv.AAConv(256, (3, 3), kappa=0.5, upsilon=0.25, num_heads=4)
    tables = layer.init(jax.random.key(0), x)["params"]["attention"]["relative"]
    d = 128 // 4
    assert sum(t.size for t in tables.values()) == (2 * (14 + 9) - 2) * d
    large = RelativePosition(depth=d).init(jax.random.key(0), (300, 200))["params"]
    for table in large.values():
        assert abs(float(table.mean())) < 0.01
        np.testing.assert_allclose(float(table.std()), d**-0.5, rtol=0.03)


@pytest.mark.parametrize(
    "features,kappa,upsilon,heads,minimum,wanted",
    [
        (128, 0.2, 0.1, 8, 20, (160, 8)),
        (512, 0.2, 0.1, 8, 20, (160, 48)),
        (640, 0.5, 0.1, 8, 20, (320, 64)),
        (512, 0.2, 0.1, 8, 1, (96, 48)),
        (64, 0.25, 0.0, 8, 20, (0, 0)),
    ],
)
def test_rounding_of_the_depths(features, kappa, upsilon, heads, minimum, wanted):
    got = attention_depths(features, kappa=kappa, upsilon=upsilon, num_heads=heads, min_key_depth=minimum)
    assert got == wanted


def test_explicit_depths_win():
    layer = aaconv.AAConv(64, (3, 3), key_depth=12, value_depth=6, num_heads=3)
    assert layer.depths() == (12, 6)
    assert shape_of(layer, images(1, 4, 4, 3)) == (1, 4, 4, 64)


@pytest.mark.parametrize("upsilon,pooled", [(0.25, False), (1.0, False), (0.25, True)])
def test_keeps_bfloat16(upsilon, pooled):
    x = images(2, 6, 6, 4)
    layer = small(8, (3, 3), upsilon=upsilon, pooled_attention=pooled, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    got = layer.apply(variables, x)
    assert got.dtype == jnp.bfloat16
    wanted = layer.clone(dtype=None).apply(variables, x)
    assert wanted.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=0.1)


def test_images_of_a_batch_do_not_leak():
    x = images(3, 6, 5, 4)
    layer = small(8, (3, 3), strides=2)
    variables = layer.init(jax.random.key(0), x)
    whole = layer.apply(variables, x)
    other = layer.apply(variables, x.at[1].set(7.0))
    np.testing.assert_array_equal(whole[::2], other[::2])
    assert np.abs(whole[1] - other[1]).max() > 0.1
    for i in range(3):
        np.testing.assert_allclose(layer.apply(variables, x[i]), whole[i], atol=1e-5)


@pytest.mark.parametrize("space", [(11,), (4, 5, 3)], ids=["signal", "volume"])
def test_one_and_three_spatial_axes(space):
    x = images(2, *space, 4)
    layer = small(8, (3,) * len(space), strides=2)
    variables = layer.init(jax.random.key(0), x)
    got = layer.apply(variables, x)
    assert got.shape == shape_of(nn.Conv(8, (3,) * len(space), strides=2), x)
    assert layer.clone(pooled_attention=True, strides=1).init_with_output(jax.random.key(0), x)[0].shape == (
        2,
        *space,
        8,
    )


def test_smaller_maps_use_the_middle_of_the_tables():
    layer = small(8, (1, 1), upsilon=1.0)
    variables = layer.init(jax.random.key(0), images(1, 6, 7, 4))
    x = images(1, 4, 3, 4, seed=2)
    tables = variables["params"]["attention"]["relative"]
    cut = {"rel_h": tables["rel_h"][2:-2], "rel_w": tables["rel_w"][4:-4]}
    wanted = layer.apply({"params": {"attention": {**variables["params"]["attention"], "relative": cut}}}, x)
    np.testing.assert_array_equal(layer.apply(variables, x), wanted)


def test_larger_maps_raise_interpolate_or_clip():
    layer = small(8, (1, 1), upsilon=1.0)
    variables = layer.init(jax.random.key(0), images(1, 4, 4, 4))
    x = images(1, 7, 4, 4, seed=2)
    with pytest.raises(ValueError, match=r"\(7, 4\) .* made for \(4, 4\).*larger_maps='interpolate'"):
        layer.apply(variables, x)
    tables = variables["params"]["attention"]["relative"]

    def with_table(rel_h):
        attention = {**variables["params"]["attention"], "relative": {**tables, "rel_h": rel_h}}
        return layer.apply({"params": {"attention": attention}}, x)

    stretched = jnp.stack([jnp.interp(jnp.linspace(0, 6, 13), jnp.arange(7), c) for c in tables["rel_h"].T], -1)
    got = layer.clone(larger_maps="interpolate").apply(variables, x)
    np.testing.assert_allclose(got, with_table(stretched), atol=1e-5)
    edges = jnp.concatenate([tables["rel_h"][:1].repeat(3, 0), tables["rel_h"], tables["rel_h"][-1:].repeat(3, 0)])
    got = layer.clone(larger_maps="clip").apply(variables, x)
    np.testing.assert_allclose(got, with_table(edges), atol=1e-6)


def test_attention_maps_are_captured_only_on_request():
    x = images(2, 4, 5, 4)
    layer = small(8, (3, 3))
    variables = layer.init(jax.random.key(0), x)
    assert set(variables) == {"params"}
    _, captured = layer.apply(variables, x, mutable=["intermediates"])
    (weights,) = captured["intermediates"]["attention"]["attention_weights"]
    assert weights.shape == (2, 2, 4, 5, 4, 5)
    np.testing.assert_allclose(weights.sum((-1, -2)), 1.0, atol=1e-5)
    plain = jax.jit(layer.apply).lower(variables, x).compile()
    asked = jax.jit(partial(layer.apply, mutable=["intermediates"])).lower(variables, x).compile()
    assert plain.memory_analysis().output_size_in_bytes < asked.memory_analysis().output_size_in_bytes
    exponentials = lambda f: str(jax.make_jaxpr(f)(variables, x)).count(" exp ")
    assert exponentials(partial(layer.apply, mutable=["intermediates"])) == exponentials(layer.apply) + 1


@pytest.mark.parametrize("size", [(8, 6), (9, 7), (1, 2)], ids=str)
def test_pooled_attention_comes_back_where_it_was(size):
    # A straight ramp is its own average and its own interpolation, away from the border.
    ramp = jnp.asarray(np.add.outer(np.arange(size[0]), 10 * np.arange(size[1])), jnp.float32)
    back = augmented_conv._upsample(augmented_conv._pool_3x3(ramp[None, ..., None], 2), size)[0, ..., 0]
    assert back.shape == size
    np.testing.assert_allclose(back[2:-2, 2:-2], ramp[2:-2, 2:-2], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
@pytest.mark.parametrize(
    "options",
    [
        {"pooled_attention": True},
        {"strides": 2, "strided_attention": "average_pool"},
        {"position_encoding": "sinusoid"},
        {"position_encoding": "coordconv"},
    ],
    ids=str,
)
def test_integer_inputs_compute_as_in_conv(dtype, options):
    x = (200 + 55 * jnp.sin(jnp.arange(192.0))).astype(dtype).reshape(1, 8, 6, 4)
    layer = small(8, (3, 3), **options)
    variables = layer.init(jax.random.key(0), x)
    got, wanted = layer.apply(variables, x), layer.apply(variables, x.astype(jnp.float32))
    assert got.dtype == nn.Conv(8, (3, 3)).init_with_output(jax.random.key(0), x)[0].dtype == jnp.float32
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("options", [{"pooled_attention": True}, {"strides": 2, "strided_attention": "average_pool"}])
def test_pooling_does_not_overflow_in_float16(options):
    x = jnp.full((1, 8, 8, 4), 3e4, jnp.float16)
    layer = small(8, (3, 3), dtype=jnp.float16, kernel_init=nn.initializers.constant(1e-5), **options)
    assert np.isfinite(layer.apply(layer.init(jax.random.key(0), x), x)).all()


def test_arguments_of_conv_reach_the_attention_branch():
    x = images(1, 5, 6, 4)
    layer = small(
        8,
        (3, 3),
        param_dtype=jnp.float16,
        precision="highest",
        kernel_init=nn.initializers.constant(0.5),
        bias_init=nn.initializers.constant(2.0),
        relative_init=nn.initializers.constant(0.25),
        implementation="skew",
    )
    variables = layer.init(jax.random.key(0), x)
    attention = variables["params"]["attention"]
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(variables))
    for name in ("qkv", "out"):
        assert (attention[name]["kernel"] == 0.5).all() and (attention[name]["bias"] == 2.0).all()
    assert all((table == 0.25).all() for table in attention["relative"].values())
    program = str(jax.make_jaxpr(layer.apply)(variables, x))
    products = program.count("dot_general[")
    assert products >= 6 and program.count("precision=(Precision.HIGHEST") >= products
    # Skewing pads; the factorised form does not.
    attend = aaconv.MultiHeadSelfAttention(num_heads=2, key_depth=4, value_depth=2)
    for name, pads in (("skew", True), ("factorised", False)):
        chosen = attend.clone(implementation=name)
        variables = chosen.init(jax.random.key(0), x)
        assert (" pad[" in str(jax.make_jaxpr(chosen.apply)(variables, x))) == pads


def test_promotion_rule_of_conv_reaches_the_attention_branch():
    def to_bfloat16(*arrays, dtype=None):
        return [a if a is None else a.astype(jnp.bfloat16) for a in arrays]

    x = images(1, 5, 6, 4)
    for upsilon in (0.0, 0.25, 1.0):
        layer = small(8, (3, 3), upsilon=upsilon, promote_dtype=to_bfloat16)
        assert layer.apply(layer.init(jax.random.key(0), x), x).dtype == jnp.bfloat16


def test_initialisers_of_convolutions_serve_the_projections():
    x = images(1, 5, 6, 4)
    layer = small(8, (3, 3), kernel_init=nn.initializers.delta_orthogonal())
    kernel = layer.init(jax.random.key(0), x)["params"]["attention"]["qkv"]["kernel"]
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(4), atol=1e-5)


def test_partitioned_parameters():
    x = images(1, 5, 6, 4)
    conv_names = (None, None, None, "model")
    layer = small(
        8,
        (3, 3),
        kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), conv_names),
        relative_init=nn.with_partitioning(nn.initializers.normal(), (None, None)),
    )
    boxed = layer.init(jax.random.key(0), x)
    assert boxed["params"]["attention"]["qkv"]["kernel"].names == (None, "model")
    np.testing.assert_array_equal(layer.apply(boxed, x), layer.apply(nn.meta.unbox(boxed), x))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind):
    kinds = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((4,), ("data",), axis_types=kinds, devices=jax.devices()[:4])
    x = images(4, 5, 6, 4)
    layer = small(8, (3, 3))
    variables = layer.init(jax.random.key(0), x)
    wanted = layer.apply(variables, x)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        whole = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
        np.testing.assert_allclose(jax.jit(layer.apply)(whole, split), wanted, atol=1e-5)


# In the hands of others ---------------------------------------------------------------------------------


class TheirNet(nn.Module):
    conv: type = nn.Conv

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.relu(self.conv(8, (3, 3), strides=2, name=f"conv{i}")(x))
        return nn.Dense(3)(x.mean((-3, -2)))


def test_injected_into_a_network_of_the_users_own():
    x, labels = images(16, 12, 12, 3), jnp.arange(16) % 3
    net = TheirNet(conv=partial(small, num_heads=1))
    params = net.init(jax.random.key(0), x)

    @jax.jit
    def step(params):
        def loss(p):
            logits = net.apply(p, x)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    losses = []
    for _ in range(60):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert step._cache_size() == 1


class BottleneckOfOthers(nn.Module):
    """The block of a ResNet that takes its convolution as an argument, as Flax's ImageNet example does."""

    filters: int
    conv: type
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        y = nn.relu(norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = norm()(self.conv(self.filters * 4, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(self.conv(self.filters * 4, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


@pytest.mark.slow
def test_injected_into_a_resnet_of_others():
    conv = partial(small, use_bias=False)
    net = nn.Sequential([BottleneckOfOthers(8, conv), BottleneckOfOthers(8, conv, (2, 2))])
    x = images(2, 9, 9, 3)
    variables = net.init(jax.random.key(0), x)
    assert net.apply(variables, x).shape == (2, 5, 5, 32)
    assert sum("rel_h" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables)) == 8


def test_in_a_flax_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.bridge.ToNNX(small(8, (3, 3)), rngs=rngs)
            self.conv.lazy_init(images(1, 6, 6, 3))
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.conv(x).mean((1, 2)))

    model = Model(nnx.Rngs(0))
    x = images(4, 6, 6, 3)
    loss, gradient = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    assert np.isfinite(loss)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(gradient))
    tables = [g for path, g in leaves if "rel_" in jax.tree_util.keystr(path)]
    assert len(tables) == 2 and all(np.abs(np.asarray(g)).max() > 0 for g in tables)
    linen = small(8, (3, 3))
    params = linen.init(jax.random.key(0), x)
    assert linen.apply(params, x).shape == model.conv(x).shape


def test_under_remat_scan_and_vmap():
    x = images(2, 6, 6, 8)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + small(8, (3, 3), name="aa")(x), None

    scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = scanned.init(jax.random.key(0), x, None)
    assert variables["params"]["aa"]["attention"]["relative"]["rel_h"].shape == (3, 11, 2)
    got, _ = scanned.apply(variables, x, None)
    y = x
    for i in range(3):
        y, _ = Block().apply(jax.tree.map(lambda leaf, i=i: leaf[i], variables), y, None)
    np.testing.assert_allclose(got, y, atol=1e-4)
    gradient = jax.grad(lambda v: (scanned.apply(v, x, None)[0] ** 2).sum())(variables)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    layer = small(8, (3, 3))
    one = layer.init(jax.random.key(0), x)
    np.testing.assert_allclose(jax.vmap(layer.apply, (None, 0))(one, x), layer.apply(one, x), atol=1e-5)


def test_no_second_compilation_between_steps():
    layer = small(8, (3, 3))
    x = images(2, 6, 6, 4)
    variables = layer.init(jax.random.key(0), x)
    apply = jax.jit(layer.apply)
    for seed in range(3):
        apply(variables, images(2, 6, 6, 4, seed=seed))
    assert apply._cache_size() == 1


# Bad input ------------------------------------------------------------------------------------------------

WRONG = [
    (dict(upsilon=1.2), "upsilon=1.2 must lie between 0 .* and 1"),
    (dict(upsilon=-0.1), "upsilon=-0.1 must lie between"),
    (dict(kappa=0.0), "kappa=0.0 must be a finite number greater than 0"),
    (dict(kappa=float("inf")), "kappa=inf must be a finite number"),
    (dict(upsilon=1.0, features=4, num_heads=8), "num_heads=8: use at most 4 heads"),
    (dict(upsilon=1.0, strides=(2,)), r"strides=\(2,\) must be a number of at least 1, or one for each of 2"),
    (dict(upsilon=1.0, strides=0), "strides=0 must be a number of at least 1"),
    (dict(upsilon=1.0, padding=[(1, 1, 1), 1]), r"must give a number or a pair \(low, high\)"),
    (dict(num_heads=2.5), "num_heads=2.5 must be a whole number"),
    (dict(upsilon="0.5"), "upsilon='0.5' must be a number"),
    (dict(key_depth=-4), "key_depth=-4 must be at least num_heads=2"),
    (dict(padding="SMAE"), "padding='SMAE' is not one of SAME, .*did you mean 'SAME'"),
    (dict(num_heads=0), "num_heads=0 must be a whole number of at least 1"),
    (dict(upsilon=0.1, num_heads=8), "upsilon=0.1 of features=12 .* num_heads=8: use upsilon >= 0.667"),
    (dict(upsilon=0.05, num_heads=1), "for each of num_heads=1: use upsilon >= 0.084$|0.084\\n"),
    (dict(upsilon=1.0, num_heads=5), "num_heads=5 must divide features; use 1, 2, 3, 4 heads"),
    (dict(key_depth=7), "num_heads=2 must divide key_depth=7: use key_depth=6 or 8"),
    (dict(value_depth=3), "num_heads=2 must divide value_depth=3: use value_depth=2 or 4"),
    (dict(value_depth=14), "value_depth=14 must lie between 0 and features=12"),
    (dict(min_key_depth=0), "min_key_depth=0 must be at least 1"),
    (dict(position_encoding="sine"), "position_encoding='sine' is not one of .*did you mean"),
    (dict(strided_attention="pool"), "strided_attention='pool' is not one of .*did you mean 'average_pool'"),
    (dict(larger_maps="cut"), "larger_maps='cut' is not one of"),
    (dict(implementation="fast"), "implementation='fast' is not one of"),
    (dict(feature_group_count=2, value_depth=2, num_heads=1, features=9), "feature_group_count=2 must divide"),
    (dict(padding=[(1, 1)]), "Invalid padding format"),
    (dict(upsilon=1.0, mask=jnp.ones((3, 3, 4, 12))), "there is no kernel to mask"),
]


@pytest.mark.parametrize("options,message", WRONG, ids=[str(o)[:40] for o, _ in WRONG])
def test_says_what_does_not_fit(options, message):
    options = {"features": 12, "kernel_size": (3, 3), **options}
    with pytest.raises(ValueError, match=message):
        shape_of(small(**options), images(1, 6, 6, 4))


def test_causal_padding_is_refused_where_attention_would_see_the_future():
    with pytest.raises(ValueError, match="attention sees every position, the later ones too"):
        shape_of(small(8, (3,), padding="CAUSAL"), images(1, 6, 4))
    assert shape_of(small(8, (3,), padding="CAUSAL", upsilon=0.0), images(1, 6, 4)) == (1, 6, 8)


def test_too_few_axes_are_refused():
    with pytest.raises(ValueError, match=r"kernel_size=\(3, 3\) needs at least 3 axes"):
        shape_of(small(8, (3, 3)), images(6, 4))


def test_masked_convolution_branch():
    mask = jnp.zeros((3, 3, 4, 6)).at[1, 1].set(1.0)
    layer = small(8, (3, 3), mask=mask)
    x = images(1, 5, 5, 4)
    variables = layer.init(jax.random.key(0), x)
    centre = jnp.einsum("byxc,cf->byxf", x, variables["params"]["conv"]["kernel"][1, 1])
    np.testing.assert_allclose(layer.apply(variables, x)[..., :6], centre, atol=1e-5)


def test_is_a_dataclass_that_clones():
    layer = small(8, (3, 3))
    assert layer.clone(strides=2).strides == 2
    assert {f.name for f in dataclasses.fields(nn.Conv)} < {f.name for f in dataclasses.fields(layer)}
