"""Flax Linen modules over `aaconv.ops`."""

from aaconv.layers.attention import MultiHeadSelfAttention as MultiHeadSelfAttention
from aaconv.layers.augmented_conv import AAConv as AAConv, attention_depths as attention_depths
from aaconv.layers.bottleneck_attention import BottleneckAttention as BottleneckAttention
from aaconv.layers.position import RelativePosition as RelativePosition, resize_table as resize_table
from aaconv.layers.recalibration import (
    BAM as BAM,
    CBAM as CBAM,
    GatherExcite as GatherExcite,
    SqueezeExcite as SqueezeExcite,
)
