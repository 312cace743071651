"""Attention-augmented convolution and its networks in JAX and Flax.

>>> import aaconv, jax, jax.numpy as jnp
>>> layer = aaconv.AAConv(64, (3, 3), kappa=0.25, upsilon=0.25, num_heads=4)
>>> variables = layer.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
>>> layer.apply(variables, jnp.ones((8, 16, 16, 3))).shape
(8, 16, 16, 64)
"""

from __future__ import annotations

from aaconv.layers import AAConv as AAConv, MultiHeadSelfAttention as MultiHeadSelfAttention
from aaconv.models import create as create, list_models as list_models
from aaconv.ops import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    BlockSizes as BlockSizes,
    attention_weights as attention_weights,
    relative_attention as relative_attention,
    relative_logits as relative_logits,
)

__version__ = "0.1.0"
