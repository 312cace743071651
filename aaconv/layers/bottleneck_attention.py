"""Self-attention in the place of a convolution: what a bottleneck transformer puts between its pointwise layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.layers.attention import MultiHeadSelfAttention, check_heads
from aaconv.layers.augmented_conv import as_pointwise, per_axis
from aaconv.ops import BlockSizes

Dtype = Any


class BottleneckAttention(nn.Module):
    r"""Multi-head self-attention over the whole map, with the leading arguments of `flax.linen.Conv`.

    .. math:: Y = \mathrm{pool}_s\big(\mathrm{Concat}[O_1 .. O_n]\big), \quad
              O_h = \mathrm{Softmax}\big(Q K^\top / \sqrt{d} + s_{pos} (S_H + S_W)\big) V, \quad d = F_{out} / n

    Queries, keys and values have ``features`` channels each, made by one pointwise projection; the heads are the
    output, with no projection behind them: in its block a pointwise convolution follows. With a stride the layer
    attends at the resolution of its input and then takes means over ``stride`` x ``stride`` windows, of the pixels
    inside the map where a window is cut by its border. The output has the size of a convolution's with SAME padding.

    The paper writes the logits as :math:`q k^\top + q r^\top` and leaves the scale out, so it does not say whether the
    positions are scaled. Chosen here is :math:`s_{pos} = 1 / \sqrt d`, as in attention augmentation, eq. 3 and 4;
    ``scale_positions=False`` gives :math:`s_{pos} = 1`.

    Parameters: ``attention/qkv`` and ``attention/relative``, as in `MultiHeadSelfAttention`.

    Attributes:
      features: output channels, and depth of queries, keys and values over all heads.
      kernel_size: as many entries as there are spatial axes; the numbers have no meaning for attention, which sees
        the whole map.
      strides: between output positions; a number, or one an axis.
      use_bias: whether queries, keys and values have a bias; in the paper they have none.
      dtype, param_dtype, kernel_init: as in `flax.linen.Conv`; ``kernel_init`` as that of a pointwise convolution.
      num_heads: ``n``; it must divide ``features``.
      scale_positions: whether :math:`1 / \sqrt d` reaches the relative logits too.
      position_encoding, larger_maps, implementation, block_sizes, relative_init: as in `MultiHeadSelfAttention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = BottleneckAttention(16, (3, 3), strides=2)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 14, 14, 6)))
      >>> layer.apply(variables, jnp.ones((8, 14, 14, 6))).shape
      (8, 7, 7, 16)
      >>> jax.tree.map(jnp.shape, variables["params"]["attention"])
      {'qkv': {'kernel': (6, 48)}, 'relative': {'rel_h': (27, 4), 'rel_w': (27, 4)}}

    References:
      Srinivas et al., Bottleneck Transformers for Visual Recognition, CVPR 2021, 3 and figure 4,
      https://arxiv.org/abs/2101.11605
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    num_heads: int = 4
    scale_positions: bool = True
    position_encoding: str = "relative"
    larger_maps: str = "raise"
    implementation: str | None = None
    block_sizes: BlockSizes | None = None
    relative_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Attends, and pools where there is a stride.

        Args:
          inputs: ``(*b, h, w, c)``, any batch shape, as many spatial axes as ``kernel_size`` has entries.

        Returns:
          ``(*b, h', w', features)``, ``h' = ceil(h / stride)``.

        Raises:
          ValueError: heads that do not divide ``features``, a stride below 1, an unknown encoding, a rank too small.
        """
        ndim = 1 if isinstance(self.kernel_size, int) else len(self.kernel_size)
        strides = per_axis("strides", self.strides, ndim)
        check_heads(self.num_heads)
        if self.features < 1 or self.features % self.num_heads:
            below = max(self.features // self.num_heads, 1) * self.num_heads
            raise ValueError(
                f"num_heads={self.num_heads} must divide features={self.features}: use features={below}, or another "
                "number of heads"
            )
        y = MultiHeadSelfAttention(
            num_heads=self.num_heads,
            key_depth=self.features,
            value_depth=self.features,
            position_encoding=self.position_encoding,
            larger_maps=self.larger_maps,
            spatial_ndim=ndim,
            use_bias=self.use_bias,
            implementation=self.implementation,
            block_sizes=self.block_sizes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=as_pointwise(self.kernel_init, ndim),
            relative_init=self.relative_init,
            output_projection=False,
            scale_positions=self.scale_positions,
            name="attention",
        )(inputs)
        if max(strides) == 1:
            return y
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return nn.avg_pool(wide, strides, strides, padding="SAME", count_include_pad=False).astype(y.dtype)
