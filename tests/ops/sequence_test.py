"""Relative attention on sequences against loops in float64, and what a causal mask promises."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from aaconv import ops


def shaw(q, k, v, key_table, value_table, causal, scale):
    """Eq. 3 and 4 of Shaw et al., one query at a time."""
    length, n = q.shape[-3:-1]
    furthest = len(key_table) // 2
    out = np.zeros(v.shape)
    for *b, head, i in itertools.product(*map(range, (*q.shape[:-3], n, length))):
        seen = range(i + 1 if causal else length)
        a = [key_table[min(max(j - i, -furthest), furthest) + furthest] for j in seen]
        logits = np.array([scale * q[(*b, i, head)] @ (k[(*b, j, head)] + a[j]) for j in seen])
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for j in seen:
            value = v[(*b, j, head)].copy()
            if value_table is not None:
                c = len(value_table) // 2
                value += value_table[min(max(j - i, -c), c) + c]
            out[(*b, i, head)] += weights[j] * value
    return out


def draw(length=6, *, n=2, d=3, e=5, batch=(2,), clip=2, seed=0):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(*batch, length, n, d)) for _ in range(2))
    v = rng.normal(size=(*batch, length, n, e))
    return q, k, v, rng.normal(size=(2 * clip + 1, d)), rng.normal(size=(2 * clip + 1, e))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("clip", [0, 2, 5, 9])
@pytest.mark.parametrize("values", [False, True], ids=["keys", "keys and values"])
def test_shaw_equals_the_loops(causal, clip, values):
    q, k, v, key_table, value_table = draw(clip=clip)
    value_table = value_table if values else None
    with jax.enable_x64(True):
        got = ops.shaw_attention(q, k, v, key_table, value_table, causal=causal)
        scaled = ops.shaw_attention(q, k, v, key_table, value_table, causal=causal, scale=0.2)
        assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, shaw(q, k, v, key_table, value_table, causal, 3**-0.5), atol=1e-13)
    np.testing.assert_allclose(scaled, shaw(q, k, v, key_table, value_table, causal, 0.2), atol=1e-13)


def test_tables_of_keys_and_values_may_clip_at_other_offsets():
    q, k, v, key_table, _ = draw(clip=1)
    value_table = draw(clip=4)[-1]
    with jax.enable_x64(True):
        got = ops.shaw_attention(q, k, v, key_table, value_table)
    np.testing.assert_allclose(got, shaw(q, k, v, key_table, value_table, False, 3**-0.5), atol=1e-13)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_music_transformer_equals_the_loops(batch):
    q, k, v, table, _ = draw(batch=batch, clip=5)
    with jax.enable_x64(True):
        got = ops.music_transformer_attention(q, k, v, table[:6])
        scaled = ops.music_transformer_attention(q, k, v, table[:6], scale=0.2)
    np.testing.assert_allclose(got, shaw(q, k, v, table, None, True, 3**-0.5), atol=1e-13)
    np.testing.assert_allclose(scaled, shaw(q, k, v, table, None, True, 0.2), atol=1e-13)


def test_shaw_without_clipping_is_relative_attention_of_one_axis():
    q, k, v, table, _ = draw(clip=5)
    with jax.enable_x64(True):
        wanted = ops.relative_attention(q, k, v, (table,), spatial_ndim=1)
        np.testing.assert_allclose(ops.shaw_attention(q, k, v, table), wanted, atol=1e-13)


FORMS = {
    "shaw": lambda q, k, v, r, s: ops.shaw_attention(q, k, v, r, s, causal=True),
    "music_transformer": lambda q, k, v, r, s: ops.music_transformer_attention(q, k, v, r[:6]),
}
EVERY = pytest.mark.parametrize("form", FORMS)


@EVERY
def test_later_positions_do_not_reach_earlier_outputs(form):
    arrays = [jnp.asarray(x, jnp.float32) for x in draw(clip=5)]
    for first in range(1, 6):
        changed = [x.at[:, first:].add(1e3) for x in arrays[:3]]
        before, after = FORMS[form](*arrays), FORMS[form](*changed, *arrays[3:])
        np.testing.assert_array_equal(before[:, :first], after[:, :first])
        assert np.abs(before[:, first:] - after[:, first:]).min(axis=(0, 2, 3)).max() > 1.0


@pytest.mark.slow
@EVERY
def test_gradients_of_every_argument(form):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in draw(batch=(), clip=5)]
        check_grads(FORMS[form], arrays, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)
        gradient = jax.grad(lambda *a: (FORMS[form](*a) ** 2).sum(), 3)(*arrays)
    assert (np.abs(gradient[:6]).max(axis=-1) > 1e-6).all()
    np.testing.assert_array_equal(gradient[6:], 0.0)  # offsets that a causal query never meets


def test_gradients_without_a_mask_reach_every_row():
    q, k, v, key_table, value_table = (jnp.asarray(x, jnp.float32) for x in draw(clip=3))
    loss = lambda r, s: (ops.shaw_attention(q, k, v, r, s) ** 2).sum()
    for gradient in jax.grad(loss, (0, 1))(key_table, value_table):
        assert (jnp.abs(gradient).max(axis=-1) > 1e-4).all()


@EVERY
def test_keeps_bfloat16_with_a_softmax_in_float32(form):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(clip=5)]
    assert FORMS[form](*arrays).dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(FORMS[form])(*arrays))
    exponentials = [line for line in program.splitlines() if " exp " in line]
    assert exponentials and all(":f32[" in line for line in exponentials)


@EVERY
def test_a_sequence_of_one_attends_to_itself(form):
    q, k, v, key_table, _ = (jnp.asarray(x, jnp.float32) for x in draw(length=1, clip=0))
    if form == "shaw":
        got = ops.shaw_attention(q, k, v, key_table, causal=True)
    else:
        got = ops.music_transformer_attention(q, k, v, key_table)
    np.testing.assert_allclose(got, v, rtol=1e-6)


WRONG = [
    ("shaw_attention", dict(key_table=(4, 3)), r"key_table has shape \(4, 3\): it must be \(2 \* c \+ 1, 3\), an odd"),
    ("shaw_attention", dict(value_table=(5, 3)), r"value_table has shape \(5, 3\): it must be \(2 \* c \+ 1, 5\)"),
    ("shaw_attention", dict(key_table=(5,)), r"key_table has shape \(5,\)"),
    ("shaw_attention", dict(k=(2, 5, 2, 3)), r"k must equal q"),
    ("shaw_attention", dict(q=(6, 2)), r"needs at least 3 axes"),
    ("shaw_attention", dict(scale=np.ones(2)), r"scale has shape \(2,\): it must be one number"),
    ("music_transformer_attention", dict(table=(11, 3)), r"table has shape \(11, 3\) .* it must be \(6, 3\)"),
    ("music_transformer_attention", dict(v=(2, 6, 1, 5)), r"v may differ from them in its last axis only"),
]


@pytest.mark.parametrize("function,wrong,message", WRONG, ids=[m[:30] for _, _, m in WRONG])
def test_says_what_does_not_fit(function, wrong, message):
    shapes = {"q": (2, 6, 2, 3), "k": (2, 6, 2, 3), "v": (2, 6, 2, 5)}
    tables = {"shaw_attention": {"key_table": (5, 3)}, "music_transformer_attention": {"table": (6, 3)}}
    shapes |= tables[function] | {name: value for name, value in wrong.items() if name != "scale"}
    options = {name: value for name, value in wrong.items() if name == "scale"}
    with pytest.raises(ValueError, match=message):
        getattr(ops, function)(**{name: jnp.ones(shape) for name, shape in shapes.items()}, **options)


def test_integers_are_refused():
    q = jnp.ones((6, 1, 3), jnp.int32)
    with pytest.raises(ValueError, match="cast them to one floating dtype"):
        ops.shaw_attention(q, q, q, jnp.ones((3, 3)))


def test_what_is_no_array_is_told():
    q = jnp.ones((6, 1, 3))
    with pytest.raises(ValueError, match="key_table is of type NoneType: it must be an array"):
        ops.shaw_attention(q, q, q, None)
    with pytest.raises(ValueError, match="table is int32: cast it to a floating dtype"):
        ops.music_transformer_attention(q, q, q, jnp.ones((6, 3), jnp.int32))
    with pytest.raises(ValueError, match="k is of type list: it must be an array"):
        ops.shaw_attention(q, [q], q, jnp.ones((3, 3)))
