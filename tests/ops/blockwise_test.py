"""What is particular to the implementation in blocks: its cuts, its memory, and jax's transformations."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aaconv import ops
from aaconv.ops import blockwise

attend = functools.partial(ops.relative_attention, implementation="blockwise")


def gradients(f, *args):
    """Of a loss in which every output counts differently."""

    def loss(*args):
        out = f(*args)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weights.astype(out.dtype))

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(args)))))(*args)


def output_and_gradients(f, *args):
    """Both in one program."""
    return jax.jit(lambda *args: (f(*args), gradients(f, *args)))(*args)


def assert_close(got, wanted, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, wanted)


def assert_as_factorised(q, k, v, rel, *, sizes):
    f = functools.partial(ops.relative_attention, spatial_ndim=q.ndim - 3)  # behind one axis of batch
    with jax.enable_x64(True):
        got = output_and_gradients(functools.partial(f, implementation="blockwise", block_sizes=sizes), q, k, v, rel)
        wanted = output_and_gradients(functools.partial(f, implementation="factorised"), q, k, v, rel)
        assert_close(got, wanted)


@pytest.mark.parametrize(
    "space,query,pairs",
    [
        ((5, 4), 4, 1),  # a line and a pair at a time
        ((5, 4), 8, 2),  # two lines: the last block is half empty
        ((5, 4), 20, 6),  # one block
        ((7,), 3, 3),  # a signal: every position is a line
        ((3, 5, 2), 4, 4),  # two lines of a frame of a volume
        ((2, 3, 5), 6, None),  # lines along the shorter axis
        ((1, 1), 1, None),
        ((13, 1), 5, None),
    ],
    ids=str,
)
def test_any_cut_gives_the_same(inputs, space, query, pairs):
    assert_as_factorised(*inputs(space, batch=(6,), n=4), sizes=ops.BlockSizes(query=query, pairs=pairs))


@pytest.mark.parametrize("space", [(5, 4), (3, 5, 2)], ids=str)
def test_any_cut_gives_the_same_without_positions(inputs, space):
    q, k, v, _ = inputs(space, batch=(6,), n=4)
    assert_as_factorised(q, k, v, None, sizes=ops.BlockSizes(query=8, pairs=2))


@pytest.mark.parametrize("d,e", [(1, 128), (128, 1), (128, 128)])
def test_any_depth(inputs, d, e):
    args = inputs((3, 7), n=2, d=d, e=e)
    with jax.enable_x64(True):
        plain = functools.partial(ops.relative_attention, implementation="factorised")
        assert_close(gradients(attend, *args), gradients(plain, *args))


@pytest.mark.parametrize("dtype,tolerance", [(jnp.bfloat16, 0.05), (jnp.float16, 0.01), (jnp.float32, 1e-5)])
def test_gradients_in_narrow_types(inputs, dtype, tolerance):
    args = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs((4, 9), d=8))
    got = gradients(attend, *args)
    assert all(g.dtype == dtype for g in jax.tree.leaves(got))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args)
        wanted = gradients(functools.partial(ops.relative_attention, implementation="factorised"), *wide)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, atol=tolerance * np.abs(w).max())


@pytest.mark.parametrize(
    "space, platform", [((40, 6), "tpu"), ((150,), "tpu"), ((2, 3, 50), "tpu"), ((40, 6), "gpu")], ids=str
)
def test_as_it_is_cut_on_accelerators(inputs, platform, space):
    q, k, v, rel = inputs(space, batch=(3,), n=2)
    options = dict(spatial_ndim=len(space), platform=platform)
    cut = lambda q, k, v, rel: blockwise.attend(q, k, v, rel, 0.5, **options)
    plain = functools.partial(ops.relative_attention, spatial_ndim=len(space), scale=0.5, implementation="factorised")
    with jax.enable_x64(True):
        assert_close(gradients(cut, q, k, v, rel), gradients(plain, q, k, v, rel))


def test_in_bfloat16_as_accelerators_compute_it(inputs, monkeypatch):
    # The scale on the logits, the statistics beside the products: what the path of float32 does not do. A CPU
    # has not all products of bfloat16 with float32 sums, so they are made of float32, which is the same.
    wide_products = lambda self, letters, *xs: jnp.einsum(letters, *(x.astype(jnp.float32) for x in xs))
    monkeypatch.setattr(blockwise._Cut, "einsum", wide_products)
    args = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inputs((30, 5), batch=(2,), d=8))
    cut = lambda q, k, v, rel: blockwise.attend(q, k, v, rel, 0.5, spatial_ndim=2, platform="tpu")
    got = gradients(cut, *args)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args)
        wanted = gradients(functools.partial(ops.relative_attention, scale=0.5, implementation="factorised"), *wide)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, atol=0.03 * np.abs(w).max())


def largest_buffer(f, *args):
    """Elements of the largest array in the compiled program, inside its fusions and loops too."""
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", jax.jit(f).lower(*args).compile().as_text())
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("derivative", [False, True], ids=["forward", "gradient"])
def test_no_array_is_as_large_as_the_maps(inputs, derivative):
    args = jax.tree.map(jnp.asarray, inputs((40, 40), batch=(2,), n=2, d=8, e=4, dtype=np.float32))
    f = functools.partial(gradients, attend) if derivative else attend
    one_map = 1600**2
    assert largest_buffer(f, *args) < one_map / 4
    plain = functools.partial(ops.relative_attention, implementation="factorised")
    assert largest_buffer(functools.partial(gradients, plain) if derivative else plain, *args) >= 4 * one_map


@pytest.mark.parametrize(
    "small,large",
    [
        ((32, 32), (64, 64)),
        ((1024,), (4096,)),
        ((2, 512), (2, 2048)),
        ((4, 16, 16), (4, 32, 32)),
    ],
    ids=str,
)
def test_memory_grows_with_the_positions_not_with_their_square(small, large):
    def temporaries(space):
        f = functools.partial(attend, spatial_ndim=len(space))
        q = jax.ShapeDtypeStruct((1, *space, 8, 20), jnp.float32)
        v = jax.ShapeDtypeStruct((1, *space, 8, 4), jnp.float32)
        rel = tuple(jax.ShapeDtypeStruct((2 * size - 1, 20), jnp.float32) for size in space)
        program = jax.jit(functools.partial(gradients, f)).lower(q, q, v, rel).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(large) < 5 * temporaries(small)


@pytest.mark.parametrize("times", [1.0, 40.0])  # at 40 the bound by lengths is too far off, and the maximum is taken
def test_second_derivative_of_the_queries(inputs, times):
    q, k, v, rel = inputs((2, 3), batch=(1,))
    q = times * q
    with jax.enable_x64(True):
        of = lambda f: jax.grad(lambda q: jnp.sum(jnp.sin(jax.grad(lambda q: jnp.sum(f(q, k, v, rel) ** 2))(q))))(q)
        plain = functools.partial(ops.relative_attention, implementation="factorised")
        assert_close(of(attend), of(plain))


def test_gradients_stay_finite_where_rounding_lifts_a_logit_far_above_its_sum(inputs):
    # Relative logits of 1e20 and more are rounded to much more than an exponential bears, in another order in the two
    # passes; no weight may come out above 1 for that.
    q, k, v, rel = jax.tree.map(jnp.float32, inputs((4, 5), batch=(1,)))
    found = gradients(attend, q, k, v, tuple(1e20 * table for table in rel))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    of_values = jax.grad(lambda v: attend(q, k, v, tuple(1e20 * table for table in rel)).sum())(v)
    assert np.abs(of_values).max() <= 20  # a weight of each of 20 queries


def test_forward_mode_is_refused_by_name(inputs):
    q, k, v, rel = inputs((2, 3), dtype=np.float32)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: attend(q, k, v, rel), (q,), (q,))


def test_under_vmap_and_remat(inputs):
    q, k, v, rel = inputs((3, 4), batch=(4, 2))
    with jax.enable_x64(True):
        wanted = gradients(attend, q, k, v, rel)
        assert_close(gradients(jax.vmap(attend, (0, 0, 0, None)), q, k, v, rel), wanted)
        assert_close(gradients(jax.vmap(jax.vmap(attend, (0, 0, 0, None)), (1, 1, 1, None), 1), q, k, v, rel), wanted)
        assert_close(gradients(jax.checkpoint(attend), q, k, v, rel), wanted)


def test_exports_with_a_symbolic_batch(inputs):
    q, k, v, rel = inputs((3, 4), batch=(5,), dtype=np.float32)
    (b,) = export.symbolic_shape("b")
    symbolic = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (q, k, v)]
    for f in (attend, functools.partial(gradients, attend)):
        again = export.export(jax.jit(f))(*symbolic, rel)
        assert_close(again.call(q, k, v, rel), f(q, k, v, rel), atol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("pairs", [None, 1])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_nothing_is_gathered(inputs, kind, pairs, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
    q, k, v, rel = inputs((6, 5), batch=(8,), n=2, dtype=np.float32)
    attend = functools.partial(
        ops.relative_attention, implementation="blockwise", block_sizes=ops.BlockSizes(pairs=pairs)
    )
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    q, k, v = (jax.device_put(x, by_batch) for x in (q, k, v))
    rel = jax.tree.map(lambda x: jax.device_put(x, whole), rel)

    def step(q, k, v, rel):
        return jax.grad(lambda *a: jnp.sum(attend(*a) ** 2 / 2), argnums=(0, 1, 2, 3))(q, k, v, rel)

    program = jax.jit(step).lower(q, k, v, rel).compile()
    assert "all-gather" not in program.as_text()
    got = jax.tree.map(np.asarray, program(q, k, v, rel))
    assert_close(got, step(*jax.tree.map(np.asarray, (q, k, v, rel))), atol=1e-4)


def test_within_shard_map_the_tables_gather_every_devices_gradient(inputs):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    q, k, v, rel = inputs((3, 4), batch=(4,))
    with jax.enable_x64(True):
        batch, whole = PartitionSpec("data"), PartitionSpec()
        f = jax.shard_map(attend, mesh=mesh, in_specs=(batch, batch, batch, whole), out_specs=batch)
        assert_close(gradients(jax.jit(f), q, k, v, rel), gradients(attend, q, k, v, rel))


@pytest.mark.parametrize("length", [1.0, 30.0, 1000.0])
def test_logits_far_below_what_the_lengths_of_queries_and_keys_allow(reference, inputs, length):
    # One key points away from all queries and is `length` times as long: the bound by lengths is far off, exponentials
    # below it vanish in float32, and the maximum has to be taken instead.
    q, k, v, rel = inputs((5, 6), batch=(1,), d=4)
    q[..., 0] = np.abs(q[..., 0]) + 1
    k[0, 2, 3, :, :] = [-10 * length, 0, 0, 0]
    got, pull = jax.vjp(lambda *a: attend(*a[:3], a[3:]), *jax.tree.map(jnp.float32, (q, k, v, *rel)))
    np.testing.assert_allclose(got, reference.attention(q, k, v, rel), atol=5e-6)
    with jax.enable_x64(True):
        exact = lambda *a: ops.relative_attention(*a[:3], a[3:], implementation="factorised")
        _, exact_pull = jax.vjp(exact, *jax.tree.map(jnp.asarray, (q, k, v, *rel)))
        wanted = exact_pull(jnp.ones(v.shape))
    for one, other in zip(pull(jnp.ones(v.shape, jnp.float32)), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    "sizes,message",
    [
        (dict(query=6), r"BlockSizes\(query=6\) for maps of 5 x 4: .* whole lines .*, a multiple of 4 and at most 20"),
        (dict(query=24), r"BlockSizes\(query=24\).*at most 20"),
        (dict(query=0), r"BlockSizes\(query=0\): it must be a positive integer"),
        (dict(pairs=2.0), r"BlockSizes\(pairs=2.0\): it must be a positive integer"),
        (dict(key=True), r"BlockSizes\(key=True\): it must be a positive integer"),
        (dict(key=128), r"BlockSizes\(key=128\) with .*'blockwise', which takes query and pairs.*one that .* \(pallas"),
    ],
    ids=str,
)
def test_says_which_block_sizes_do_not_divide(inputs, sizes, message):
    q, k, v, rel = inputs((5, 4))
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, rel, block_sizes=ops.BlockSizes(**sizes))


@pytest.mark.parametrize("sizes", [64, 0, (64, 64), "64"], ids=repr)
def test_block_sizes_of_another_type_are_refused(inputs, sizes):
    q, k, v, rel = inputs((5, 4))
    with pytest.raises(ValueError, match=r"block_sizes=.* must be a BlockSizes, such as"):
        ops.relative_attention(q, k, v, rel, block_sizes=sizes)


def test_block_sizes_take_integers_of_numpy():
    assert ops.BlockSizes(query=np.int64(16)) == ops.BlockSizes(query=16)
