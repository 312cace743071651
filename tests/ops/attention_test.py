"""`relative_attention`, every implementation, against the float64 loops and the paper's properties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import export
from jax.test_util import check_grads

from aaconv import ops

SPACES = [(6,), (4, 4), (3, 5), (1, 7), (7, 1), (2, 3, 2)]
# Those that run on any platform; the TPU kernel has its own tests beside these, and takes no float64.
PLAIN = ["factorised", "skew", "explicit", "appended_codes", "blockwise"]
EVERY = pytest.mark.parametrize("implementation", PLAIN)
EVERY_FLOAT32 = pytest.mark.parametrize("implementation", [*PLAIN, "pallas_tpu_interpret"])


@EVERY
@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("positions", [True, False], ids=["relative", "none"])
def test_equals_the_formula(reference, inputs, implementation, space, positions):
    q, k, v, rel = inputs(space)
    rel = rel if positions else None
    with jax.enable_x64(True):
        got = ops.relative_attention(q, k, v, rel, spatial_ndim=len(space), implementation=implementation)
        assert got.dtype == jnp.float64
        assert got.shape == v.shape
    np.testing.assert_allclose(got, reference.attention(q, k, v, rel, spatial_ndim=len(space)), atol=1e-13)


@EVERY
@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 3e-6), (jnp.bfloat16, 3e-2)])
def test_keeps_the_dtype(reference, inputs, implementation, dtype, tolerance):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs((4, 5), d=8))
    got = ops.relative_attention(q, k, v, rel, implementation=implementation)
    assert got.dtype == dtype
    wanted = reference.attention(*jax.tree.map(lambda x: np.asarray(x, np.float64), (q, k, v, rel)))
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=tolerance)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_softmax_runs_in_float32_at_least(inputs, implementation, dtype):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs((3, 4)))
    program = str(jax.make_jaxpr(lambda *a: ops.relative_attention(*a, implementation=implementation))(q, k, v, rel))
    exponentials = [line for line in program.splitlines() if " exp " in line]
    assert exponentials and all(":f32[" in line for line in exponentials)


@EVERY
@pytest.mark.parametrize("space", [(4,), (3, 2), (2, 2, 2)], ids=str)
def test_gradients_of_every_argument(inputs, implementation, space):
    q, k, v, rel = inputs(space, batch=(1,))
    with jax.enable_x64(True):

        def f(q, k, v, rel, scale):
            return ops.relative_attention(
                q, k, v, rel, spatial_ndim=len(space), scale=scale, implementation=implementation
            )

        args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (q, k, v, rel, 0.7))
        modes = ["rev"] if implementation == "blockwise" else ["rev", "fwd"]
        check_grads(f, args, order=1, modes=modes, atol=1e-7, rtol=1e-7)
        if len(space) == 2 and implementation == "blockwise":  # the others' derivatives are all jax's
            check_grads(f, args, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@EVERY_FLOAT32
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_any_batch_shape(inputs, implementation, batch):
    q, k, v, rel = jax.tree.map(jnp.asarray, inputs((3, 4), batch=batch, dtype=np.float32))
    f = lambda q, k, v: ops.relative_attention(q, k, v, rel, implementation=implementation)

    def loss(*args):
        got = ops.relative_attention(*args, implementation=implementation)
        return got.sum(), got

    gradients, got = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, rel)
    assert got.shape == v.shape
    one = jax.jit(f)
    for b in np.ndindex(*batch):
        np.testing.assert_allclose(got[b], one(q[b], k[b], v[b]), atol=1e-6)
    if batch and batch != (0,):
        np.testing.assert_allclose(jax.jit(jax.vmap(f))(q, k, v), got, atol=1e-6)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, (q, k, v, rel))


@settings(max_examples=6, deadline=None)
@given(
    space=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    n=st.integers(1, 3),
    d=st.integers(1, 5),
    e=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_implementations_agree(space, n, d, e, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v = draw(*space, n, d), draw(*space, n, d), draw(*space, n, e)
    rel = tuple(draw(2 * s - 1, d) for s in space)
    first, *others = (
        ops.relative_attention(q, k, v, rel, spatial_ndim=len(space), implementation=name) for name in PLAIN
    )
    for other in others:
        np.testing.assert_allclose(first, other, atol=2e-5)


@EVERY_FLOAT32
def test_a_row_of_the_table_serves_its_offset(implementation):
    # Two rows down and one column left, as key - query: every query with such a key must look there.
    h, w, offset = 5, 4, (2, -1)
    q = jnp.full((h, w, 1, 1), 100.0)
    position = jnp.arange(h * w, dtype=jnp.float32).reshape(h, w, 1, 1)
    rel_h = jnp.zeros((2 * h - 1, 1)).at[offset[0] + h - 1].set(1.0)
    rel_w = jnp.zeros((2 * w - 1, 1)).at[offset[1] + w - 1].set(1.0)
    got = ops.relative_attention(q, jnp.zeros_like(q), position, (rel_h, rel_w), implementation=implementation)
    for y in range(h - 2):
        for x in range(1, w):
            assert got[y, x, 0, 0] == position[y + 2, x - 1, 0, 0]


@EVERY_FLOAT32
def test_permutation_equivariant_without_positions_and_not_with(inputs, implementation):
    q, k, v, rel = inputs((3, 4), dtype=np.float32)
    order = np.random.default_rng(1).permutation(12)
    mix = lambda x: x.reshape(2, 12, *x.shape[3:])[:, order].reshape(x.shape)
    f = lambda rel, *a: np.asarray(ops.relative_attention(*a, rel, implementation=implementation))
    np.testing.assert_allclose(f(None, mix(q), mix(k), mix(v)), mix(f(None, q, k, v)), atol=1e-6)
    assert np.abs(f(rel, mix(q), mix(k), mix(v)) - mix(f(rel, q, k, v))).max() > 0.1


@EVERY_FLOAT32
def test_heads_and_images_do_not_mix(inputs, implementation):
    q, k, v, rel = inputs((3, 4), batch=(3,), n=3, dtype=np.float32)
    f = lambda v: np.asarray(ops.relative_attention(q, k, v, rel, implementation=implementation))
    other = v.copy()
    other[1, ..., 2, :] += 1.0
    difference = np.abs(f(other) - f(v)).max(axis=(1, 2, 4))
    wanted = np.zeros((3, 3))
    wanted[1, 2] = 1.0
    np.testing.assert_allclose(difference, wanted, atol=1e-5)


@EVERY_FLOAT32
def test_nan_stays_in_its_query(inputs, implementation):
    q, k, v, rel = inputs((3, 4), dtype=np.float32)
    q[1, 2, 3, 0, 0] = np.nan
    got = np.asarray(ops.relative_attention(q, k, v, rel, implementation=implementation))
    where = np.zeros(got.shape, bool)
    where[1, 2, 3, 0] = True
    np.testing.assert_array_equal(np.isnan(got), where)


@EVERY_FLOAT32
def test_under_remat_and_export_with_a_symbolic_batch(inputs, implementation):
    q, k, v, rel = inputs((3, 2), batch=(3,), dtype=np.float32)
    f = jax.checkpoint(lambda *a: ops.relative_attention(*a, implementation=implementation))
    (b,) = export.symbolic_shape("b")
    symbolic = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (q, k, v)]
    exported = export.export(jax.jit(f))(*symbolic, rel)
    np.testing.assert_allclose(exported.call(q, k, v, rel), f(q, k, v, rel), atol=1e-6)


def test_scale_multiplies_content_and_position_alike(inputs):
    q, k, v, rel = inputs((3, 4), dtype=np.float32)
    by_hand = ops.relative_attention(0.3 * q, k, v, rel, scale=1.0)
    np.testing.assert_allclose(ops.relative_attention(q, k, v, rel, scale=0.3), by_hand, atol=1e-6)
    default = ops.relative_attention(q, k, v, rel)
    np.testing.assert_allclose(default, ops.relative_attention(q, k, v, rel, scale=3**-0.5), atol=1e-6)


@EVERY_FLOAT32
def test_a_scale_of_another_type_gets_its_gradient_in_that_type(inputs, implementation):
    q, k, v, rel = inputs((3, 2), dtype=np.float32)
    f = lambda s: ops.relative_attention(q, k, v, rel, scale=jnp.exp(s), implementation=implementation)[..., 0].sum()
    gradient = jax.grad(f)(jnp.bfloat16(-0.5))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(gradient), float(jax.grad(f)(jnp.float32(-0.5))), rtol=0.02, atol=0.02)


def test_weights_average_the_values(inputs):
    q, k, v, rel = inputs((3, 4), dtype=np.float32)
    weights = ops.attention_weights(q, k, rel)
    assert weights.shape == (2, 2, 3, 4, 3, 4)
    np.testing.assert_allclose(weights.sum((-1, -2)), 1.0, atol=1e-6)
    by_hand = np.einsum("bnyxhw,bhwne->byxne", weights, v)
    np.testing.assert_allclose(ops.relative_attention(q, k, v, rel), by_hand, atol=1e-5)


def test_compiles_once_for_a_shape(inputs):
    traces = 0

    @jax.jit
    def f(q, k, v, rel):
        nonlocal traces
        traces += 1
        return ops.relative_attention(q, k, v, rel)

    for seed in range(3):
        f(*inputs((3, 4), dtype=np.float32, seed=seed))
    assert traces == 1


WRONG = [
    (dict(k=(2, 3, 4, 2, 4)), r"k must equal q"),
    (dict(v=(2, 3, 5, 2, 5)), r"v may differ from them in its last axis only"),
    (dict(v=(2, 3, 4, 2, 0)), r"must not be empty"),
    (dict(rel=((5, 3), (5, 3))), r"rel\[1\] has shape \(5, 3\) .* it must be \(7, 3\)"),
    (dict(rel=((5, 4), (7, 4))), r"rel\[0\] has shape \(5, 4\).* it must be \(5, 3\)"),
    (dict(rel=((5, 3),)), r"rel holds 1 tables for spatial_ndim=2"),
    (dict(rel=((5,), (7, 3))), r"rel\[0\] has shape \(5,\)"),
    (dict(scale=np.ones((2, 1))), r"scale has shape \(2, 1\): it must be one number"),
    (dict(spatial_ndim=0), r"spatial_ndim=0 must be between"),
    (dict(spatial_ndim=4), r"needs at least 6 axes"),
    (dict(implementation="skwe"), r"'skwe' is not one of .*did you mean 'skew'"),
    (dict(form=np.int32), r"q, k and v are int32.*cast them to one floating dtype"),
    (dict(mixed=True), r"q, k and v are float32, bfloat16 and float32"),
]


@pytest.mark.parametrize("wrong,message", WRONG, ids=[m[:24] for _, m in WRONG])
def test_says_what_does_not_fit(wrong, message):
    q = jnp.ones((2, 3, 4, 2, 3))
    k = jnp.ones(wrong.get("k", (2, 3, 4, 2, 3)))
    v = jnp.ones(wrong.get("v", (2, 3, 4, 2, 5)))
    rel = tuple(jnp.ones(s) for s in wrong.get("rel", ((5, 3), (7, 3))))
    if "form" in wrong:
        q, k, v = (x.astype(wrong["form"]) for x in (q, k, v))
    if "mixed" in wrong:
        k = k.astype(jnp.bfloat16)
    options = {name: wrong[name] for name in ("spatial_ndim", "implementation", "scale") if name in wrong}
    with pytest.raises(ValueError, match=message):
        ops.relative_attention(q, k, v, rel, **options)


def test_empty_space_is_refused():
    q = jnp.ones((2, 0, 4, 2, 3))
    with pytest.raises(ValueError, match="no axis of space, heads or depth may be empty"):
        ops.relative_attention(q, q, q, None)
