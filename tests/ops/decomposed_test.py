"""Decomposed relative positions against loops in float64, and the resizing of their tables."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from aaconv import ops

EVERY = pytest.mark.parametrize("implementation", ["factorised", "blockwise", "skew"])
# The map, and the sizes that the tables were made for: equal, smaller, larger, odd, even, one.
CASES = [((4, 3), (4, 3)), ((3, 5), (2, 3)), ((4, 3), (7, 6)), ((2, 6), (14, 1)), ((1, 4), (3, 4))]


def resized(table, rows):
    """Row by row: where the centre of a new cell lies among the centres of the old ones."""
    out = np.zeros((rows, table.shape[1]))
    for row in range(rows):
        centre = (row + 0.5) / rows * len(table) - 0.5
        if centre <= 0:
            out[row] = table[0]
        elif centre >= len(table) - 1:
            out[row] = table[-1]
        else:
            low = int(centre)
            out[row] = (low + 1 - centre) * table[low] + (centre - low) * table[low + 1]
    return out


def attention(q, k, v, rel_h, rel_w, scale):
    h, w, n = q.shape[-4:-1]
    rel_h, rel_w = resized(rel_h, 2 * h - 1), resized(rel_w, 2 * w - 1)
    positions = list(itertools.product(range(h), range(w)))
    out = np.zeros(v.shape)
    for b in np.ndindex(*q.shape[:-4]):
        for head, i in itertools.product(range(n), positions):
            query = q[(*b, *i, head)]
            logits = []
            for j in positions:
                rows = rel_h[i[0] - j[0] + h - 1] + rel_w[i[1] - j[1] + w - 1]
                logits.append(scale * (query @ k[(*b, *j, head)]) + query @ rows)
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            out[(*b, *i, head)] = sum(weight * v[(*b, *j, head)] for weight, j in zip(weights, positions, strict=True))
    return out


def draw(inputs, space, made_for, d=3):
    q, k, v, _ = inputs(space, d=d)
    rng = np.random.default_rng(1)
    return q, k, v, *(rng.normal(size=(2 * m - 1, d)) for m in made_for)


@EVERY
@pytest.mark.parametrize("space,made_for", CASES, ids=[f"{s}-{m}" for s, m in CASES])
def test_equals_the_loops(inputs, implementation, space, made_for):
    arrays = draw(inputs, space, made_for)
    with jax.enable_x64(True):
        got = ops.decomposed_relative_attention(*arrays, implementation=implementation)
        other = ops.decomposed_relative_attention(*arrays, scale=0.3, implementation=implementation)
        assert got.dtype == jnp.float64 and got.shape == arrays[2].shape
    np.testing.assert_allclose(got, attention(*arrays, 3**-0.5), atol=1e-13)
    np.testing.assert_allclose(other, attention(*arrays, 0.3), atol=1e-13)


@EVERY
@pytest.mark.parametrize("made_for", [(2, 4), (5, 2)], ids=str)
def test_gradients_of_every_argument(inputs, implementation, made_for):
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, draw(inputs, (3, 2), made_for))
        f = lambda *a: ops.decomposed_relative_attention(*a[:-1], scale=a[-1], implementation=implementation)
        check_grads(f, (*arrays, jnp.float64(0.6)), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_a_row_serves_query_minus_key_and_the_scale_spares_it():
    # Every query whose key lies two rows above and one column to the right must look there.
    h, w, offset = 5, 4, (2, -1)
    q = jnp.full((h, w, 1, 1), 100.0)
    position = jnp.arange(h * w, dtype=jnp.float32).reshape(h, w, 1, 1)
    rel_h = jnp.zeros((2 * h - 1, 1)).at[offset[0] + h - 1].set(1.0)
    rel_w = jnp.zeros((2 * w - 1, 1)).at[offset[1] + w - 1].set(1.0)
    got = ops.decomposed_relative_attention(q, jnp.zeros_like(q), position, rel_h, rel_w, scale=1e-6)
    for y in range(2, h):
        for x in range(w - 1):
            assert got[y, x, 0, 0] == position[y - 2, x + 1, 0, 0]


@EVERY
def test_keeps_bfloat16(inputs, implementation):
    arrays = draw(inputs, (3, 4), (5, 2), d=8)
    got = ops.decomposed_relative_attention(
        *(jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]),
        *(jnp.asarray(x, jnp.float32) for x in arrays[3:]),
        implementation=implementation,
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), attention(*arrays, 8**-0.5), atol=0.1)


@pytest.mark.parametrize("made_for,rows", [(1, 5), (3, 5), (5, 9), (9, 5), (27, 7), (7, 7)])
def test_resizing_keeps_the_middle_and_stays_between_the_rows(made_for, rows):
    table = np.random.default_rng(0).normal(size=(made_for, 2))
    with jax.enable_x64(True):
        got = np.asarray(ops.resize_rows(jnp.asarray(table), rows))
    np.testing.assert_allclose(got, resized(table, rows), atol=1e-14)
    np.testing.assert_allclose(got[rows // 2], table[made_for // 2], atol=1e-14)
    assert got.min() >= table.min() and got.max() <= table.max()


WRONG = [
    (dict(rel_h=(4, 3)), r"rel_h has shape \(4, 3\) for key depth 3: .* an odd number of rows"),
    (dict(rel_w=(5, 4)), r"rel_w has shape \(5, 4\) for key depth 3"),
    (dict(rel_w=(5,)), r"rel_w has shape \(5,\)"),
    (dict(k=(3, 4, 2, 4)), r"k must equal q"),
    (dict(k=(3, 2, 2, 3)), r"k must equal q"),
    (dict(scale=0), r"scale=0 leaves no content"),
    (dict(scale=np.ones(2)), r"scale has shape \(2,\): it must be one number"),
    (dict(implementation="skwe"), r"'skwe' is not one of .*did you mean 'skew'"),
]


@pytest.mark.parametrize("wrong,message", WRONG, ids=[m[:24] for _, m in WRONG])
def test_says_what_does_not_fit(wrong, message):
    shapes = {"q": (3, 4, 2, 3), "k": (3, 4, 2, 3), "v": (3, 4, 2, 5), "rel_h": (5, 3), "rel_w": (9, 3)}
    arrays = {name: jnp.ones(wrong.get(name, shape)) for name, shape in shapes.items()}
    options = {name: value for name, value in wrong.items() if name not in shapes}
    with pytest.raises(ValueError, match=message):
        ops.decomposed_relative_attention(**arrays, **options)


@pytest.mark.parametrize("table,message", [(None, "of type NoneType"), (np.ones((5, 3), np.int32), "int32: cast it")])
def test_tables_that_are_none_are_told(table, message):
    q = jnp.ones((3, 4, 1, 3))
    with pytest.raises(ValueError, match=f"rel_h is {message}"):
        ops.decomposed_relative_attention(q, q, q, table, jnp.ones((7, 3)))
