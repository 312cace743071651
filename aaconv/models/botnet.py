"""BoTNet: a ResNet whose last stage attends over the whole map where it would convolve."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from aaconv.layers import BottleneckAttention
from aaconv.layers.attention import check_heads
from aaconv.layers.position import check_position_encoding
from aaconv.models.augmentation import check_sizes
from aaconv.models.resnet import SIZES, BottleneckBlock, ResNet
from aaconv.ops.choice import check_name

DEPTHS = tuple(depth for depth, (block, _) in SIZES.items() if block is BottleneckBlock)


def botnet(
    depth: int = 50,
    *,
    num_classes: int = 1000,
    width: int = 64,
    num_heads: int = 4,
    scale_positions: bool = True,
    last_stride: int = 2,
    position_encoding: str = "relative",
    larger_maps: str = "raise",
    implementation: str | None = None,
    dtype: Any = jnp.float32,
) -> ResNet:
    """BoTNet-50, 101 or 152: `aaconv.models.ResNet` with attention in the place of each 3x3 of the last stage.

    The first block of the stage attends at 14x14 (for 224 pixels) and pools to 7x7, or stays at 14x14 with
    ``last_stride=1``, the variant that the paper calls S1.

    BoTNet-50 has 20.852M parameters at 224 pixels with 1,000 classes, of which 13,568 are in relative tables: 2 * 27
    rows of depth 128 in the first block, 2 * 13 in each of the others. Without positions it has 20.838M, with
    ``last_stride=1`` 20.859M. The paper prints 20.8M: what 20.838M rounds to, and what all three are when cut, as its
    25.5M for ResNet-50, which has 25.557M, seems to be (recalled, not verified). A projection behind the heads, which
    the paper's layer is without, would give 21.638M.

    Args:
      depth: 50, 101 or 152.
      num_classes: logits.
      width: channels of the stem; ``8 * width`` attend in the last stage.
      num_heads, scale_positions, position_encoding, larger_maps, implementation: as in
        `aaconv.layers.BottleneckAttention`.
      last_stride: of the last stage, 1 or 2.
      dtype: of activations.

    Raises:
      ValueError: a depth, stride, name or number of heads that does not exist or fit.

    References:
      Srinivas et al., Bottleneck Transformers for Visual Recognition, CVPR 2021, 3, 4.7 and table 1,
      https://arxiv.org/abs/2101.11605
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth={depth} must be one of {', '.join(map(str, DEPTHS))}: those have bottleneck blocks")
    check_sizes(width=width, num_classes=num_classes)
    if last_stride not in (1, 2):
        raise ValueError(f"last_stride={last_stride} must be 1 (the last stage as large as the one before) or 2")
    check_heads(num_heads)
    check_position_encoding(position_encoding)
    check_name(implementation)
    attention = partial(
        BottleneckAttention,
        num_heads=num_heads,
        scale_positions=scale_positions,
        position_encoding=position_encoding,
        larger_maps=larger_maps,
        implementation=implementation,
    )
    block, sizes = SIZES[depth]
    return ResNet(
        stage_sizes=sizes,
        block=block,
        num_classes=num_classes,
        width=width,
        stage_convs=(nn.Conv, nn.Conv, nn.Conv, attention),
        stage_strides=(1, 2, 2, last_stride),
        dtype=dtype,
    )
