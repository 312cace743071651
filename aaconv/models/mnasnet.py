"""MnasNet-A1 with an injected expansion in each block, plain or attention-augmented."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.layers import SqueezeExcite
from aaconv.models.augmentation import ModuleDef, check_images, check_sizes, conv_and_norm, stage_convs
from aaconv.models.recalibration import identity


class SeparableBlock(nn.Module):
    """3x3 depthwise, then pointwise without an activation or a shortcut (Tan et al. 2019, fig. 7c)."""

    features: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = self.conv(channels, (3, 3), feature_group_count=channels, name="conv_depthwise")(x)
        y = nn.relu(self.norm(name="norm_depthwise")(y))
        y = self.conv(self.features, (1, 1), name="conv_project")(y)
        return self.norm(name="norm_project")(y)


class MBConvBlock(nn.Module):
    """Inverted bottleneck: pointwise expansion, depthwise with the stride, recalibration, pointwise projection.

    ``conv`` is the expansion, at the resolution before the stride. The input is added where nothing changes its
    shape; no activation follows the projection (Tan et al. 2019, fig. 7b and d).
    """

    features: int
    kernel_size: int
    strides: int
    expansion: int
    conv: ModuleDef
    plain_conv: ModuleDef
    norm: ModuleDef
    recalibration: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1] * self.expansion
        y = self.conv(channels, (1, 1), name="conv_expand")(x)
        y = nn.relu(self.norm(name="norm_expand")(y))
        y = self.plain_conv(
            channels,
            (self.kernel_size, self.kernel_size),
            strides=self.strides,
            feature_group_count=channels,
            name="conv_depthwise",
        )(y)
        y = nn.relu(self.norm(name="norm_depthwise")(y))
        y = self.recalibration(name="recalibration")(y)
        y = self.plain_conv(self.features, (1, 1), name="conv_project")(y)
        y = self.norm(name="norm_project")(y)
        return x + y if x.shape == y.shape else y


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of fig. 7a.

    Attributes:
      features: output channels at width 1.
      size: blocks.
      kernel_size: of the depthwise convolutions.
      strides: of the first block.
      expansion: channels between expansion and projection, as a multiple of the block's input channels.
      squeeze: channels of the squeeze-and-excitation bottleneck, as a share of the block's input channels; 0: none.
    """

    features: int
    size: int
    kernel_size: int
    strides: int
    expansion: int
    squeeze: float = 0.0


STAGES = (
    Stage(24, size=2, kernel_size=3, strides=2, expansion=6),
    Stage(40, size=3, kernel_size=5, strides=2, expansion=3, squeeze=0.25),
    Stage(80, size=4, kernel_size=3, strides=2, expansion=6),
    Stage(112, size=2, kernel_size=3, strides=1, expansion=6, squeeze=0.25),
    Stage(160, size=3, kernel_size=5, strides=2, expansion=6, squeeze=0.25),
    Stage(320, size=1, kernel_size=3, strides=1, expansion=6),
)
"""The stages of inverted bottlenecks, between the stem (32 and 16 channels) and the 1,280 channels of the head."""


class MnasNet(nn.Module):
    """MnasNet-A1 for images of 32 pixels a side and more.

    Attributes:
      width_multiplier: of the channels of stem and stages, see `round_channels`; the head keeps its 1,280.
      num_classes: logits.
      stage_convs: what each of the six stages puts in the place of its 1x1 expansions: `flax.linen.Conv`, a
        partial of `aaconv.AAConv`, or any module with the arguments of `flax.linen.Conv`. None: all plain.
      dropout: share of the features before the last layer that is dropped in training; above 0, ``apply`` needs
        ``rngs={"dropout": key}`` there.
      dtype: of activations; parameters are float32.
      norm_momentum: of the running batch statistics.
      norm_epsilon: added to the variance in batch normalisation.

    References:
      Tan et al., MnasNet, CVPR 2019, fig. 7, https://arxiv.org/abs/1807.11626; Bello et al. 2019, 4.2.
    """

    width_multiplier: float = 1.0
    num_classes: int = 1000
    stage_convs: Sequence[ModuleDef] | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    norm_momentum: float = 0.99
    norm_epsilon: float = 1e-3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, features: bool = False):
        """Classifies images.

        Args:
          images: ``(*b, h, w, c)`` floating point.
          train: whether batch normalisation uses the batch's statistics and updates ``batch_stats``.
          features: whether to return the maps of the stages as well.

        Returns:
          Logits ``(*b, num_classes)`` in float32; with ``features`` also a dict with ``stem`` (stride 2),
          ``stage1`` (stride 4), ``stage2`` (8), ``stage3`` and ``stage4`` (16), ``stage5`` and ``stage6`` (32),
          each ``(*b, h, w, c)``.

        Raises:
          ValueError: images too small, of another dtype or number of channels.
        """
        check_images(self, images, stem="conv_stem", stride=32)
        conv, norm = conv_and_norm(train=train, dtype=self.dtype, momentum=self.norm_momentum)
        norm = partial(norm, epsilon=self.norm_epsilon)
        widened = partial(round_channels, multiplier=self.width_multiplier)
        x = conv(widened(32), (3, 3), strides=2, name="conv_stem")(images)
        x = nn.relu(norm(name="norm_stem")(x))
        x = SeparableBlock(widened(16), conv=conv, norm=norm, name="separable_stem")(x)
        maps = {"stem": x}
        convs = self.stage_convs or (nn.Conv,) * len(STAGES)
        for number, (stage, stage_conv) in enumerate(zip(STAGES, convs, strict=True), start=1):
            injected = partial(stage_conv, **conv.keywords)
            for i in range(stage.size):
                reduced = int(x.shape[-1] * stage.squeeze)
                x = MBConvBlock(
                    features=widened(stage.features),
                    kernel_size=stage.kernel_size,
                    strides=stage.strides if i == 0 else 1,
                    expansion=stage.expansion,
                    conv=injected,
                    plain_conv=conv,
                    norm=norm,
                    recalibration=partial(SqueezeExcite, reduced=reduced, dtype=self.dtype) if reduced else identity,
                    name=f"stage{number}_block{i + 1}",
                )(x)
            maps[f"stage{number}"] = x
        x = conv(1280, (1, 1), name="conv_head")(x)
        x = nn.relu(norm(name="norm_head")(x))
        x = jnp.mean(x.astype(jnp.float32), axis=(-3, -2))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        logits = nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)
        return (logits, maps) if features else logits


def round_channels(channels: int, multiplier: float) -> int:
    """``channels * multiplier`` to the nearest multiple of 8, at least 8, and never below 90% of it.

    Args:
      channels: at width 1.
      multiplier: above 0.

    Example:
      >>> [round_channels(24, width) for width in (0.75, 1.0, 1.25, 1.4)]
      [24, 24, 32, 32]
    """
    exact = channels * multiplier
    rounded = max(int(exact + 4) // 8 * 8, 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def a_value_a_head(conv: ModuleDef, features: int, *arguments: Any, **keywords: Any) -> nn.Module:
    """Builds a partial of `AAConv` with values of at least one channel a head.

    Args:
      conv: a partial of `aaconv.AAConv` that sets ``upsilon`` and ``num_heads``.
      features: of the convolution. `AAConv` refuses fewer than ``num_heads / upsilon`` of them, because a head
        would be left without values: 80 in the paper's networks, whose narrowest expansion has 72.
      *arguments, **keywords: the other arguments of the convolution.
    """
    upsilon, num_heads = conv.keywords["upsilon"], conv.keywords["num_heads"]
    value_depth = num_heads if upsilon * features < num_heads else None
    return conv(features, *arguments, value_depth=value_depth, **keywords)


def mnasnet(
    width_multiplier: float = 1.0,
    *,
    num_classes: int = 1000,
    kappa: float = 0.0,
    upsilon: float = 0.0,
    attention_ratio: float | None = None,
    num_heads: int = 4,
    min_key_depth: int = 2,
    stages: Sequence[int] = (2, 3, 4, 5, 6),
    pooled_stages: Sequence[int] | None = None,
    position_encoding: str = "relative",
    larger_maps: str = "raise",
    strided_attention: str = "subsample",
    implementation: str | None = None,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> MnasNet:
    """MnasNet-A1, plain or augmented in the 1x1 expansion of every block of the augmented stages.

    Stages are numbered over the inverted bottlenecks: 24, 40, 80, 112, 160 and 320 channels. The paper augments the
    last 13 blocks of 18, and stages 2 to 6 have 13. A stage's first block expands before its stride, so with images
    of 224 pixels those of stages 2, 3 and 5 attend from maps of 56, 28 and 14 pixels, the other blocks of stages 2 to 6
    from maps of 28, 14, 14, 7 and 7; stage 2 attends at half its resolution (``pooled_stages=(2,)``).

    Parameters in millions and GFLOPs at 224 pixels, 1,000 classes, for width_multiplier 0.75 / 1 / 1.25 / 1.4, and
    what Bello et al. print for them:

    ============================  ==========================  ==============================
    plain                         2.91 / 3.89 / 5.26 / 6.11   0.447 / 0.623 / 1.007 / 1.173
    printed                       2.91 / 3.89 / 5.26 / 6.10   0.45 / 0.63 / 1.01 / 1.17
    kappa = 2 upsilon = 0.1       3.02 / 4.06 / 5.53 / 6.44   0.507 / 0.712 / 1.126 / 1.314
    printed                       3.02 / 4.06 / 5.53 / 6.44   0.51 / 0.70 / 1.11 / 1.29
    ============================  ==========================  ==============================

    All parameters come out but the plain 6.106M at 1.4, where 6.10 is printed, and all FLOPs within 2%. Inferred from
    the figures: a stem that is scaled and a head that is not (scaled too: 2.51, 3.89, 5.70 and 6.85M; stem not scaled:
    5.25M at 1.25), a squeeze-and-excitation bottleneck of a quarter of the block's input (of the expanded channels:
    5.14M at 1), and biases in it (without: 3.88M at 1 and 5.25M at 1.25, though 6.10M at 1.4).

    The paper gives no rounding of heads. With 0.05 of 72 or 96 channels the first block of stage 2 has less than two
    value channels a head; it gets at least one, and keys at least ``min_key_depth=2`` a head, which keeps kappa =
    2 upsilon. Other readings: ``min_key_depth=1`` gives 3.0148M at 0.75 (3.02 is printed) and else the same figures;
    20, as in the ResNets, 3.08M. Without pooling 0.64, 0.85, 1.26 and 1.46 GFLOPs; with every map above 14 pixels
    pooled 0.492, 0.688, 1.099 and 1.281; with pooling in the first block of stages 2, 3 and 5 only 0.501, 0.700, 1.107
    and 1.297, nearest to the printed ones, but it pools more than one stage and gives 3.0147M at 0.75. If the block
    that expands at 56 pixels stays plain, 3.0145M and 0.500 GFLOPs at 0.75.

    Args:
      width_multiplier: of the channels, rounded to multiples of 8; the paper has 0.75, 1, 1.25 and 1.4.
      num_classes: logits.
      kappa, upsilon, num_heads, min_key_depth, position_encoding, larger_maps, implementation: as in
        `aaconv.AAConv`, shares of an expansion's output channels; ``upsilon=0`` is the plain network. Where upsilon
        leaves less than a channel a head, there is one.
      attention_ratio: kappa and upsilon alike, instead of both.
      stages: augmented stages, 1 to 6.
      pooled_stages: augmented stages that attend at half their resolution; None: stage 2, if it is augmented.
      strided_attention: as in `aaconv.AAConv`; no effect, since no expansion has a stride.
      dropout: share of the features before the last layer that is dropped in training; 0.2 in the MnasNet paper.
      dtype: of activations.

    Raises:
      ValueError: a multiplier that is not above 0, a dropout outside 0 to 1, a stage that does not exist.

    Example:
      >>> mnasnet(0.75, kappa=0.1, upsilon=0.05).width_multiplier
      0.75

    References:
      Tan et al. 2019, fig. 7; Bello et al. 2019, 4.2.
    """
    if not 0 < width_multiplier < math.inf:
        raise ValueError(
            f"width_multiplier={width_multiplier} must be a finite number greater than 0; the paper has 0.75, 1, 1.25 "
            "and 1.4"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1; 0 switches it off")
    check_sizes(num_classes=num_classes)
    if pooled_stages is None:
        pooled_stages = tuple({2} & set(stages)) if attention_ratio or upsilon else ()
    convs = stage_convs(
        len(STAGES),
        kappa=kappa,
        upsilon=upsilon,
        attention_ratio=attention_ratio,
        num_heads=num_heads,
        min_key_depth=min_key_depth,
        stages=stages,
        pooled_stages=pooled_stages,
        position_encoding=position_encoding,
        larger_maps=larger_maps,
        strided_attention=strided_attention,
        implementation=implementation,
    )
    return MnasNet(
        width_multiplier=width_multiplier,
        num_classes=num_classes,
        stage_convs=tuple(conv if conv is nn.Conv else partial(a_value_a_head, conv) for conv in convs),
        dropout=dropout,
        dtype=dtype,
    )
