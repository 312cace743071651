"""Relative attention as plain attention of wider queries and keys: values here, the GPU kernels as far as lowering."""

from __future__ import annotations

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

from aaconv import ops
from aaconv.ops import appended_codes, relative

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)


def attend(q, k, v, rel, scale, *, spatial_ndim=2):
    return appended_codes.attend(q, k, v, rel, scale, spatial_ndim=spatial_ndim, kernel="xla")


@functools.partial(jax.jit, static_argnames=("scale", "spatial_ndim"))
def plainly(q, k, v, rel, *, scale=0.6, spatial_ndim=2):
    return attend(q, k, v, rel, scale, spatial_ndim=spatial_ndim)


# One to three axes, even and odd numbers of positions, an axis of one position, and one position in all; values
# shallower and deeper than keys, and deeper than keys with all codes.
@pytest.mark.parametrize(
    "space,d,e",
    [((6,), 3, 5), ((7,), 4, 2), ((4, 5), 4, 2), ((3, 5), 2, 19), ((1, 6), 3, 5), ((2, 3, 2), 3, 5), ((1, 1), 3, 5)],
    ids=str,
)
def test_equals_the_formula(reference, inputs, space, d, e):
    q, k, v, rel = inputs(space, d=d, e=e)
    for tables in (rel, None):
        wanted = reference.attention(q, k, v, tables, spatial_ndim=len(space), scale=0.6)
        got = plainly(*jax.tree.map(jnp.float32, (q, k, v, tables)), spatial_ndim=len(space))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, atol=3e-6)


def test_float64_stays_float64(reference, inputs):
    q, k, v, rel = inputs((3, 5))
    with jax.enable_x64(True):
        got = plainly(*jax.tree.map(jnp.asarray, (q, k, v, rel)))
        assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, reference.attention(q, k, v, rel, scale=0.6), atol=1e-13)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)])
def test_keeps_the_dtype(reference, inputs, dtype, tolerance):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs((3, 5), d=8))
    rel = jax.tree.map(jnp.float32, rel)  # tables may be wider
    got = plainly(q, k, v, rel)
    assert got.dtype == dtype
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, k, v, rel))
    np.testing.assert_allclose(np.asarray(got, np.float64), reference.attention(*exact, scale=0.6), atol=tolerance)


def test_relative_logits_beyond_float16_keep_their_order():
    # 300 * 300 is more than 65504, and 300 * 250 too: the row one down beats the one above, and nothing is NaN.
    q = jnp.full((3, 4, 1, 1), 300.0, jnp.float16)
    v = jnp.arange(12, dtype=jnp.float16).reshape(3, 4, 1, 1)
    down = jnp.zeros((5, 1), jnp.float16).at[3].set(300.0).at[1].set(250.0)
    got = plainly(q, jnp.zeros_like(q), v, (down, jnp.zeros((7, 1), jnp.float16)), scale=1.0)
    np.testing.assert_array_equal(got[:2, :, 0, 0], np.repeat([[5.5], [9.5]], 4, axis=1))


@pytest.mark.parametrize("space", [(7,), (4, 3), (3, 5), (2, 3, 2)], ids=str)
def test_gradients_of_every_argument(inputs, space):
    arguments = (*inputs(space), 0.6)

    def gradients(f, dtype):
        loss = lambda *a: jnp.square(f(*a, spatial_ndim=len(space))).sum()
        return jax.jit(jax.grad(loss, argnums=range(5)))(*jax.tree.map(lambda x: jnp.asarray(x, dtype), arguments))

    with jax.enable_x64(True):
        exact = lambda *a, spatial_ndim: ops.relative_attention(
            *a[:4], scale=a[4], spatial_ndim=spatial_ndim, implementation="factorised"
        )
        wanted = gradients(exact, jnp.float64)
    got = gradients(attend, jnp.float32)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("scale", [0.6, 0.0, -0.6, 1e-9])
def test_scale_known_or_traced(reference, inputs, scale):
    q, k, v, rel = inputs((3, 5))
    arguments = jax.tree.map(jnp.float32, (q, k, v, rel))
    wanted = reference.attention(q, k, v, rel, scale=scale)
    np.testing.assert_allclose(plainly(*arguments, scale=scale), wanted, atol=3e-6)
    np.testing.assert_allclose(jax.jit(attend)(*arguments, scale), wanted, atol=3e-6)


@pytest.mark.parametrize("even_length,equal_depths,multiple", [(True, True, 8), (False, False, 8), (False, False, 1)])
def test_products_are_content_and_relative_logits(inputs, even_length, equal_depths, multiple):
    @jax.jit
    def f(q, k, v, rel):
        wide = appended_codes.append_codes(
            q,
            k,
            v,
            rel,
            0.5,
            spatial_ndim=2,
            depth_multiple=multiple,
            equal_depths=equal_depths,
            even_length=even_length,
        )
        product = lambda q, k: jnp.einsum("bqnd,bknd->bnqk", q, k)
        wanted = relative.relative_logits(q, rel) + product(*(x.reshape(2, 15, 2, 3) for x in (q, k)))
        return *wide, product(*wide[:2]), 0.5 * wanted

    with jax.enable_x64(True):
        wide_q, wide_k, values, products, wanted = f(*inputs((3, 5), d=3, e=2))
        length = 16 if even_length else 15
        depth = 16 if even_length else 11 if multiple == 1 else 16
        assert wide_q.shape == wide_k.shape == (2, length, 2, depth)
        assert values.shape == (2, length, 2, depth if equal_depths else multiple * -(-2 // multiple))
        np.testing.assert_allclose(np.asarray(products)[..., :15, :15], wanted, atol=1e-13)
        # The key that fills up is out of reach, and what fills up the values is zero.
        assert (np.asarray(products)[..., 15:] < -1e9).all()
        np.testing.assert_array_equal(np.asarray(values)[:, 15:], 0)
        np.testing.assert_array_equal(np.asarray(values)[..., 2:], 0)


def test_any_batch_shape(inputs):
    *_, rel = inputs((3, 5))
    rel = jax.tree.map(jnp.float32, rel)
    for batch in [(), (2, 3), (0,)]:
        q, k, v, _ = jax.tree.map(jnp.asarray, inputs((3, 5), batch=batch, dtype=np.float32))
        got = plainly(q, k, v, rel)
        np.testing.assert_allclose(
            got, ops.relative_attention(q, k, v, rel, scale=0.6, implementation="factorised"), atol=3e-6
        )
        assert got.shape == v.shape


@pytest.mark.parametrize("space", [(3, 4), (3, 5)], ids=str)
def test_nan_stays_in_its_query(inputs, space):
    q, k, v, rel = inputs(space, dtype=np.float32)
    q[1, 2, 3, 0, 0] = np.nan
    got = np.asarray(plainly(q, k, v, rel))
    where = np.zeros(got.shape, bool)
    where[1, 2, 3, 0] = True
    np.testing.assert_array_equal(np.isnan(got), where)


def test_under_transformations(inputs):
    q, k, v, rel = jax.tree.map(jnp.asarray, inputs((3, 5), batch=(8,), dtype=np.float32))
    loss = lambda q, k, v, rel: jnp.square(plainly(q, k, v, rel)).sum()
    wanted = jax.jit(jax.value_and_grad(loss, (0, 3)))(q, k, v, rel)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def over_mesh(q, k, v, rel):
        specs = (P("data"), P("data"), P("data"), P())
        out = jax.shard_map(plainly, mesh=mesh, in_specs=specs, out_specs=P("data"))(q, k, v, rel)
        return jnp.square(out).sum()

    each = lambda q, k, v, rel: jax.vmap(loss, (0, 0, 0, None))(q, k, v, rel).sum()
    for f in (over_mesh, each, jax.checkpoint(loss)):
        got = jax.jit(jax.value_and_grad(f, (0, 3)))(q, k, v, rel)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


def test_export_with_any_batch(inputs):
    q, k, v, rel = jax.tree.map(jnp.asarray, inputs((3, 5), dtype=np.float32))
    batch = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((*batch, *x.shape[1:]), x.dtype) for x in (q, k, v)]
    exported = export.export(plainly)(*shapes, rel)
    np.testing.assert_allclose(exported.call(q, k, v, rel), plainly(q, k, v, rel), atol=1e-6)


# What reaches cuDNN.


@pytest.fixture
def hopper(monkeypatch):
    """jax as it is on a machine with a Hopper GPU, so far as tracing and lowering go."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    answers = {
        "check_cudnn_version": lambda: 92800,
        "check_compute_capability": lambda wanted: tuple(map(int, wanted.split("."))) <= HOPPER,
        "is_cuda_compute_capability_equal": lambda wanted: tuple(map(int, wanted.split("."))) == HOPPER,
    }
    for name, answer in answers.items():
        if not hasattr(module, name):
            pytest.skip(f"jax {jax.__version__} asks for the GPU in other functions than this test knows")
        monkeypatch.setattr(module, name, answer)


def calls(f, *arguments) -> tuple[list[str], str]:
    """The cuDNN calls in f's program for CUDA, and the program."""
    program = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @__cudnn\$.*", program), program


def abstract(space, *, batch=(4,), n=8, d=20, e=8, dtype=jnp.bfloat16):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    q, v = shape(*batch, *space, n, d), shape(*batch, *space, n, e)
    return q, q, v, tuple(shape(2 * size - 1, d) for size in space)


def through_cudnn(q, k, v, rel):
    return appended_codes.attend(q, k, v, rel, 0.25, spatial_ndim=2)


@pytest.mark.parametrize(
    "space,length,depth",
    [((14, 14), 196, 48), ((28, 28), 784, 80), ((56, 56), 3136, 136), ((7, 7), 50, 40), ((1, 1), 2, 24)],
    ids=str,
)
def test_lowers_to_cudnn_forward_and_backward(hopper, space, length, depth):
    arguments = abstract(space)
    found, program = calls(through_cudnn, *arguments)
    wide = f"tensor<4x{length}x8x{depth}xbf16>"
    assert len(found) == 1
    assert "@__cudnn$fmhaSoftmax(" in found[0]
    assert f"({wide}, {wide}, {wide})" in found[0]
    assert r"fmha_scale\22: 0.25," in found[0]
    square = re.compile(rf"tensor<\S*{length}x{length}x")
    assert length == 2 or not square.search(program)
    loss = lambda *a: jnp.square(through_cudnn(*a).astype(jnp.float32)).sum()
    found, program = calls(jax.grad(loss, (0, 1, 2, 3)), *arguments)
    assert [re.match(r"custom_call @__cudnn\$(\w+)", call)[1] for call in found] == [
        "fmhaSoftmax",
        "fmhaSoftmaxBackward",
    ]
    assert length == 2 or not square.search(program)


def test_lowers_under_transformations(hopper):
    found, _ = calls(jax.vmap(through_cudnn, (0, 0, 0, None)), *abstract((4, 4), batch=(3, 4)))
    assert "tensor<12x16x8x32xbf16>" in found[0]  # the mapped axis joins the batch
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P("data"), P("data"), P())
    split = jax.shard_map(through_cudnn, mesh=mesh, in_specs=specs, out_specs=P("data"))
    found, _ = calls(split, *abstract((4, 4), batch=(16,)))
    assert "tensor<2x16x8x32xbf16>" in found[0]


def test_traced_scale_multiplies_the_queries(hopper):
    f = lambda scale, *a: appended_codes.attend(*a, scale, spatial_ndim=2)
    found, _ = calls(f, jax.ShapeDtypeStruct((), jnp.float32), *abstract((4, 4)))
    assert r"fmha_scale\22: 1.0," in found[0]


# What cannot be served, and why.


@pytest.mark.parametrize(
    "space,e,capability,reason",
    [
        ((56, 56), 8, HOPPER, None),
        ((56, 56), 8, AMPERE, r"20 \+ 56 \+ 56 = 132 deep, and .* takes 128, and 256 on .* 9\.x; this is 8\.0"),
        ((56, 56), 8, BLACKWELL, r"this is 10\.0"),
        ((54, 54), 8, AMPERE, None),
        ((118, 118), 8, HOPPER, None),
        ((117, 119), 8, HOPPER, r"20 \+ 117 \+ 119 \+ 1 = 257 deep"),  # an odd number of positions takes one more
        ((1, 128), 8, AMPERE, r"20 \+ 128 = 148 deep"),
        ((4, 4), 128, AMPERE, None),
        ((4, 4), 136, AMPERE, r"values are e=136 deep"),
        ((4, 4), 8, (7, 5), r"compute capability 8\.0 or later, and this GPU has 7\.5"),
    ],
)
def test_says_why_not_cudnn(hopper, space, e, capability, reason):
    q, k, v, rel = abstract(space, e=e)
    got = appended_codes.reason_not_cudnn(q.shape, e, q.dtype, compute_capability=capability)
    if reason is None:
        assert got is None
        if capability == HOPPER:  # jax agrees
            calls(through_cudnn, q, k, v, rel)
    else:
        assert re.search(reason, got)


def test_depth_without_positions():
    shape = (64, 64, 8, 64)
    why = lambda positions: appended_codes.reason_not_cudnn(
        shape, 64, jnp.bfloat16, positions=positions, compute_capability=AMPERE
    )
    assert why(False) is None
    assert "64 + 64 + 64 = 192 deep" in why(True)


def test_says_what_else_keeps_a_kernel_from_serving(monkeypatch):
    why = appended_codes.reason_not_cudnn
    shape = (4, 14, 14, 8, 20)
    assert re.search(r"runs on NVIDIA GPUs, and jax runs on cpu", why(shape, 8, jnp.bfloat16))
    assert "not float32" in why(shape, 8, jnp.float32, compute_capability=HOPPER)
    symbolic = (*export.symbolic_shape("b"), *shape[1:])
    assert "q has shape (b, 14, 14, 8, 20)" in why(symbolic, 8, jnp.bfloat16, compute_capability=HOPPER)

    why = appended_codes.reason_not_tokamax
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why(shape, 8, jnp.bfloat16) == "tokamax is not installed: pip install 'aaconv[tokamax]' (Python 3.12)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "runs on NVIDIA GPUs" in why(shape, 8, jnp.bfloat16)
    assert "not float64" in why(shape, 8, jnp.float64, compute_capability=HOPPER)
    assert "= 276 deep, and tokamax takes 256" in why((128, 128, 8, 20), 8, jnp.bfloat16, compute_capability=HOPPER)
    assert why((56, 56, 8, 20), 8, jnp.bfloat16, compute_capability=AMPERE) is None


@pytest.mark.parametrize("space", [(4, 5), (3, 5), (2, 3, 2)], ids=str)
def test_tokamax(inputs, space):
    pytest.importorskip("tokamax")
    arguments = jax.tree.map(jnp.float32, inputs(space))
    count = len(space)
    through = lambda *a: appended_codes.attend(*a, 0.6, spatial_ndim=count, kernel="tokamax")
    exact = lambda *a: ops.relative_attention(*a, scale=0.6, spatial_ndim=count, implementation="factorised")
    both = lambda f: jax.jit(jax.value_and_grad(lambda *a: jnp.square(f(*a)).sum(), (0, 1, 2, 3)))(*arguments)
    np.testing.assert_allclose(jax.jit(through)(*arguments), exact(*arguments), atol=5e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), both(through), both(exact))
