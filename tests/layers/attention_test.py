from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aaconv
from aaconv.layers import resize_table


def test_stands_alone_with_its_own_output_depth():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 6, 7))
    layer = aaconv.MultiHeadSelfAttention(num_heads=3, key_depth=12, value_depth=9)
    variables = layer.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "qkv": {"kernel": (7, 33), "bias": (33,)},
        "relative": {"rel_h": (9, 4), "rel_w": (11, 4)},
        "out": {"kernel": (9, 9), "bias": (9,)},
    }
    assert layer.apply(variables, x).shape == (2, 3, 5, 6, 9)
    assert layer.apply(variables, x[0, 0]).shape == (5, 6, 9)


def test_implementations_share_their_parameters():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 6))
    layer = aaconv.MultiHeadSelfAttention(num_heads=2, key_depth=8, value_depth=4)
    variables = layer.init(jax.random.key(1), x)
    for name in aaconv.IMPLEMENTATIONS:
        other = layer.clone(implementation=name)
        if name in ("cudnn", "tokamax", "pallas_tpu"):
            with pytest.raises(NotImplementedError, match=f"{name}.* cannot serve here"):
                other.init(jax.random.key(1), x)
            continue
        assert jax.tree.structure(other.init(jax.random.key(1), x)) == jax.tree.structure(variables)
        np.testing.assert_allclose(other.apply(variables, x), layer.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize(
    "options,shape,message",
    [
        (dict(num_heads=3, key_depth=10, value_depth=9), (1, 4, 4, 3), "num_heads=3 must divide key_depth=10"),
        (dict(num_heads=3, key_depth=9, value_depth=2), (1, 4, 4, 3), "use value_depth=3, or 1, 2 heads"),
        (
            dict(num_heads=-1, key_depth=9, value_depth=9),
            (1, 4, 4, 3),
            "num_heads=-1 must be a whole number of at least 1",
        ),
        (dict(num_heads=1, key_depth=4, value_depth=4), (4, 3), "need at least 3 axes"),
        (
            dict(num_heads=1, key_depth=4, value_depth=4, position_encoding="rel"),
            (1, 4, 4, 3),
            "'rel' is not one of",
        ),
    ],
)
def test_says_what_does_not_fit(options, shape, message):
    with pytest.raises(ValueError, match=message):
        aaconv.MultiHeadSelfAttention(**options).init(jax.random.key(0), jnp.ones(shape))


def test_resized_tables_keep_offset_zero_and_the_ends():
    table = jax.random.normal(jax.random.key(0), (9, 3))
    for size in (2, 5, 7, 12):
        for how in ("interpolate", "clip"):
            got = resize_table(table, size, larger_maps=how)
            assert got.shape == (2 * size - 1, 3)
            np.testing.assert_allclose(got[size - 1], table[4], atol=1e-6)
            if size > 5:
                np.testing.assert_allclose(got[jnp.array([0, -1])], table[jnp.array([0, -1])], atol=1e-6)
    np.testing.assert_array_equal(resize_table(table, 3), table[2:7])
    np.testing.assert_array_equal(resize_table(table[:1], 4), jnp.broadcast_to(table[:1], (7, 3)))
