"""Pure functions of arrays: attention over space with relative positions, and its parts."""

from aaconv.ops.attention import (
    attention_weights as attention_weights,
    relative_attention as relative_attention,
)
from aaconv.ops.blocks import BlockSizes as BlockSizes
from aaconv.ops.choice import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    Choice as Choice,
    choose_implementation as choose_implementation,
)
from aaconv.ops.decomposed import (
    decomposed_relative_attention as decomposed_relative_attention,
    resize_rows as resize_rows,
)
from aaconv.ops.position import coordinates as coordinates, sinusoid as sinusoid
from aaconv.ops.relative import (
    FORMS as FORMS,
    axis_logits as axis_logits,
    masked_relative_logits as masked_relative_logits,
    relative_logits as relative_logits,
)
from aaconv.ops.sequence import (
    music_transformer_attention as music_transformer_attention,
    shaw_attention as shaw_attention,
)
