"""Multi-head self-attention over space: the attention branch of AAConv, and a layer of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import PrecisionLike

from aaconv.layers.position import (
    RelativePosition,
    check_position_encoding,
    encode_input,
)
from aaconv.ops import BlockSizes, attention_weights, relative_attention

Dtype = Any
default_kernel_init = nn.linear.default_kernel_init


class MultiHeadSelfAttention(nn.Module):
    r"""Self-attention over the positions of a map, with position encodings of choice.

    .. math:: \mathrm{MHA}(X) = \mathrm{Concat}[O_1 .. O_{N_h}] W^O, \quad
              O_h = \mathrm{Softmax}\Big(\frac{Q K^\top + S_H + S_W}{\sqrt{d_k^h}}\Big) V

    One pointwise projection makes queries, keys and values (``2 * key_depth + value_depth`` channels, in
    that order, heads before depth), one more mixes the heads.

    Parameters: ``qkv`` and ``out`` (as `flax.linen.Dense`; ``out`` with ``output_projection`` only), and
    ``relative/rel_h``, ``relative/rel_w`` with the relative encoding. Attention maps ``(*b, n, h, w, h, w)``
    are sown as ``attention_weights`` in the ``intermediates`` collection when
    ``apply(..., mutable=["intermediates"])`` asks for it; otherwise they are never formed separately.

    Attributes:
      num_heads: N_h, the number of heads ``n``.
      key_depth: d_k, channels of the queries and of the keys over all heads.
      value_depth: d_v, channels of the values over all heads, and of the output.
      position_encoding: ``relative`` (default), ``none``, ``sinusoid`` (two-dimensional sines, added to
        the input) or ``coordconv`` (coordinate channels, appended to the input).
      larger_maps: what the tables do on a larger map than at initialisation, see `RelativePosition`.
      spatial_ndim: spatial axes of the input: 1 for signals, 2 for images, 3 for volumes and video.
      use_bias: whether the two projections have a bias. The paper's counts are without.
      implementation: of `aaconv.ops.relative_attention`; None to have it chosen.
      block_sizes: of `aaconv.ops.relative_attention`; None to have them chosen.
      dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype: as in `flax.linen.Dense`.
      relative_init: of the tables; default normal with deviation ``(key_depth / num_heads) ** -0.5``.
      output_projection: whether a projection mixes the heads, W^O of eq. 2; without, the heads are the output.
      scale_positions: whether :math:`1 / \sqrt{d_k^h}` reaches the relative logits too, as in eq. 3 and 4; without, it
        scales the content logits alone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MultiHeadSelfAttention(num_heads=2, key_depth=16, value_depth=8)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 5, 3)))
      >>> jax.tree.map(jnp.shape, variables["params"]["relative"])
      {'rel_h': (7, 8), 'rel_w': (9, 8)}
      >>> layer.apply(variables, jnp.ones((6, 4, 5, 3))).shape
      (6, 4, 5, 8)

    References:
      Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, eq. 1, 2 and 4.
    """

    num_heads: int
    key_depth: int
    value_depth: int
    position_encoding: str = "relative"
    larger_maps: str = "raise"
    spatial_ndim: int = 2
    use_bias: bool = True
    implementation: str | None = None
    block_sizes: BlockSizes | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: nn.initializers.Initializer = default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Any] = promote_dtype
    relative_init: nn.initializers.Initializer | None = None
    output_projection: bool = True
    scale_positions: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Attends over the map.

        Args:
          inputs: ``(*b, h, w, c)``, any batch shape.

        Returns:
          ``(*b, h, w, value_depth)``.

        Raises:
          ValueError: depths that the heads do not divide, an unknown encoding, a rank too small.
        """
        check_depths(self.num_heads, self.key_depth, self.value_depth)
        check_position_encoding(self.position_encoding)
        if inputs.ndim < self.spatial_ndim + 1:
            raise ValueError(
                f"inputs have shape {inputs.shape}: with spatial_ndim={self.spatial_ndim} they need at least "
                f"{self.spatial_ndim + 1} axes, (*b, *space, c)"
            )
        inputs = promote_inputs(self, inputs)
        x = encode_input(inputs, self.position_encoding, spatial_ndim=self.spatial_ndim)
        qkv = self._dense(2 * self.key_depth + self.value_depth, name="qkv")(x)
        q, k, v = (
            split_heads(part, self.num_heads) for part in jnp.split(qkv, [self.key_depth, 2 * self.key_depth], axis=-1)
        )
        rel = None
        if self.position_encoding == "relative":
            rel = RelativePosition(
                depth=self.key_depth // self.num_heads,
                larger_maps=self.larger_maps,
                param_dtype=self.param_dtype,
                table_init=self.relative_init,
                name="relative",
            )(inputs.shape[-1 - self.spatial_ndim : -1])
            if not self.scale_positions:
                # The operation scales content and positions alike: larger tables make up for it.
                rel = tuple(table * (self.key_depth / self.num_heads) ** 0.5 for table in rel)
            rel = tuple(table.astype(q.dtype) for table in rel)
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            weights = attention_weights(
                q,
                k,
                rel,
                spatial_ndim=self.spatial_ndim,
                implementation=self.implementation,
                precision=self.precision,
            )
            self.sow("intermediates", "attention_weights", weights)
        heads = relative_attention(
            q,
            k,
            v,
            rel,
            spatial_ndim=self.spatial_ndim,
            implementation=self.implementation,
            block_sizes=self.block_sizes,
            precision=self.precision,
        )
        joined = heads.reshape(*heads.shape[:-2], self.value_depth)
        return self._dense(self.value_depth, name="out")(joined) if self.output_projection else joined

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            promote_dtype=self.promote_dtype,
            name=name,
        )


def promote_inputs(module: Any, inputs: jax.Array) -> jax.Array:
    """Casts inputs to the dtype the module computes in, before anything but a projection touches them."""
    # Integer or half-precision pixels would otherwise be averaged, or added to, in their own dtype.
    parameter = jnp.zeros((), module.param_dtype)
    return module.promote_dtype(inputs, parameter, None, dtype=module.dtype)[0]


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """``(*b, h, w, n * d)`` -> ``(*b, h, w, n, d)``; the operation itself transposes."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def check_depths(num_heads: int, key_depth: int, value_depth: int) -> None:
    """Checks that every head gets the same, non-empty share of keys and values.

    Raises:
      ValueError: naming the depth, the heads and the nearest depths that do.
    """
    check_heads(num_heads)
    for name, depth in (("key_depth", key_depth), ("value_depth", value_depth)):
        if depth < 1:
            raise ValueError(f"{name}={depth} must be at least num_heads={num_heads}, a channel a head")
        if depth < num_heads or depth % num_heads:
            near = sorted({max(depth // num_heads + more, 1) * num_heads for more in (0, 1)})
            raise ValueError(
                f"num_heads={num_heads} must divide {name}={depth}: use {name}={' or '.join(map(str, near))}, "
                f"or {_divisors(depth)} heads"
            )


def check_heads(num_heads: int) -> None:
    """Checks a number of heads.

    Raises:
      ValueError: it is not a whole number of at least 1.
    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads={num_heads!r} must be a whole number of at least 1")


def _divisors(depth: int) -> str:
    found: Sequence[int] = [d for d in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16) if depth > 0 and depth % d == 0]
    return ", ".join(map(str, found)) or "no"
