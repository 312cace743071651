"""The forms of the relative logits against each other and against the loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aaconv import ops


@pytest.mark.parametrize("form", list(ops.FORMS))
@pytest.mark.parametrize("space", [(5,), (4, 3), (1, 6), (2, 3, 4)], ids=str)
def test_forms_equal_the_formula(reference, inputs, form, space):
    q, _, _, rel = inputs(space)
    with jax.enable_x64(True):
        got = ops.relative_logits(q, rel, spatial_ndim=len(space), form=form)
    np.testing.assert_allclose(got, reference.logits(q, rel), atol=1e-13)


@pytest.mark.parametrize("form", list(ops.FORMS))
def test_gradient_reaches_every_row_of_both_tables(inputs, form):
    q, _, _, rel = inputs((3, 4), dtype=np.float32)
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(2, 2, 12, 12)), jnp.float32)
    loss = lambda rel: (ops.relative_logits(q, rel, form=form) * weights).sum()
    for gradient in jax.grad(loss)(rel):
        assert (jnp.abs(gradient).max(axis=-1) > 1e-3).all()


def test_translation_equivariant(inputs):
    # The logit of two pixels depends on their offset only: windows of a larger map agree with it.
    q, _, _, rel = inputs((6, 7), n=1, batch=(), dtype=np.float32)
    whole = ops.relative_logits(q, rel).reshape(6, 7, 6, 7)
    for y in range(3):
        for x in range(3):
            window = ops.relative_logits(q[y : y + 4, x : x + 5], (rel[0][2:-2], rel[1][2:-2]))
            np.testing.assert_allclose(
                window.reshape(4, 5, 4, 5), whole[y : y + 4, x : x + 5, y : y + 4, x : x + 5], atol=1e-5
            )


def test_factorised_form_stores_h_plus_w_numbers_a_query(inputs):
    q, _, _, rel = inputs((12, 10), batch=(1,), n=1, dtype=np.float32)
    by_row, by_column = ops.axis_logits(q, rel)
    assert by_row.shape == (1, 12, 10, 1, 12) and by_column.shape == (1, 12, 10, 1, 10)
    program = jax.make_jaxpr(lambda q, rel: ops.axis_logits(q, rel))(q, rel)
    sizes = [v.aval.size for eqn in program.jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) <= 12 * 10 * 12 < (12 * 10) ** 2


def test_masked_form_is_the_lower_triangle(inputs):
    q, _, _, (table,) = inputs((6,))
    with jax.enable_x64(True):
        got = ops.masked_relative_logits(q, table[:6])
        whole = ops.relative_logits(q, (table,), spatial_ndim=1)
        np.testing.assert_allclose(got, jnp.tril(whole), atol=1e-13)
        assert np.abs(np.diagonal(got, axis1=-2, axis2=-1)).min() > 0


def test_keeps_float32_logits_for_bfloat16_queries(inputs):
    q, _, _, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inputs((3, 4)))
    assert all(b.dtype == jnp.float32 for b in ops.axis_logits(q, rel))
    assert ops.relative_logits(q, rel).dtype == jnp.float32


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda q, rel: ops.relative_logits(q, rel, form="skw"), "did you mean 'skew'"),
        (lambda q, rel: ops.relative_logits(q, rel[::-1]), r"one row for each offset from -2 to 2"),
        (lambda q, rel: ops.masked_relative_logits(q[0], rel[0]), r"it must be \(4, 3\)"),
        (lambda q, rel: ops.masked_relative_logits(q[0, 0, 0], rel[0]), r"it must be \(\*b, l, n, d\)"),
    ],
)
def test_says_what_does_not_fit(call, message, inputs):
    q, _, _, rel = inputs((3, 4))
    with pytest.raises(ValueError, match=message):
        call(jnp.asarray(q), rel)
