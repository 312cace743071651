"""ResNet v1.5 with an injected convolution in each block, plain or attention-augmented."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.models.augmentation import ModuleDef, check_images, check_sizes, conv_and_norm, stage_convs
from aaconv.models.recalibration import identity, recalibrations


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ``conv`` is the first of them (He et al. 2016, fig. 5 left).

    ``recalibration`` is the last layer of the residual branch, a layer of `aaconv.layers` or nothing.
    """

    features: int
    strides: int
    conv: ModuleDef
    plain_conv: ModuleDef
    norm: ModuleDef
    expansion: int = 1
    recalibration: ModuleDef = identity

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.features, (3, 3), strides=self.strides, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.plain_conv(self.features, (3, 3), name="conv2")(y)
        y = self.norm(name="norm2", scale_init=nn.initializers.zeros_init())(y)
        y = self.recalibration(name="recalibration")(y)
        return nn.relu(y + _shortcut(x, y, self.strides, self.plain_conv, self.norm))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 with the stride (v1.5), 1x1; ``conv`` is the 3x3 (He et al. 2016, fig. 5 right).

    ``recalibration`` is the last layer of the residual branch, a layer of `aaconv.layers` or nothing.
    """

    features: int
    strides: int
    conv: ModuleDef
    plain_conv: ModuleDef
    norm: ModuleDef
    expansion: int = 4
    recalibration: ModuleDef = identity

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.plain_conv(self.features, (1, 1), name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, (3, 3), strides=self.strides, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.plain_conv(self.features * self.expansion, (1, 1), name="conv3")(y)
        # A residual branch that starts at zero: Goyal et al. 2017, 5.1.
        y = self.norm(name="norm3", scale_init=nn.initializers.zeros_init())(y)
        y = self.recalibration(name="recalibration")(y)
        return nn.relu(y + _shortcut(x, y, self.strides, self.plain_conv, self.norm))


def _shortcut(x, y, strides, conv, norm):
    if x.shape == y.shape:
        return x
    x = conv(y.shape[-1], (1, 1), strides=strides, name="conv_shortcut")(x)
    return norm(name="norm_shortcut")(x)


class ResNet(nn.Module):
    """ResNet v1.5 (stride in the 3x3) for images of 32 pixels a side and more.

    Attributes:
      stage_sizes: blocks a stage.
      block: `BasicBlock` or `BottleneckBlock`.
      num_classes: logits.
      width: channels of the stem; stage ``s`` has ``width * 2 ** (s - 1)`` (times 4 with bottlenecks).
      stage_convs: what each stage puts in the place of its 3x3 convolution: `flax.linen.Conv`, a partial of
        `aaconv.AAConv`, or any module with the arguments of `flax.linen.Conv`. None: all plain.
      block_recalibrations: what each stage puts at the end of the residual branch of its blocks, a partial of a layer
        of `aaconv.layers.recalibration`. None: nothing.
      stage_recalibrations: what stands after the last block of each stage, likewise.
      stage_strides: of the first block of each stage; None: 1 in the first stage and 2 in the others.
      dtype: of activations; parameters are float32.
      norm_momentum: of the running batch statistics.

    References:
      He et al., Deep Residual Learning, CVPR 2016; Bello et al. 2019, 4.2.
    """

    stage_sizes: Sequence[int]
    block: ModuleDef = BottleneckBlock
    num_classes: int = 1000
    width: int = 64
    stage_convs: Sequence[ModuleDef] | None = None
    block_recalibrations: Sequence[ModuleDef] | None = None
    stage_recalibrations: Sequence[ModuleDef] | None = None
    stage_strides: Sequence[int] | None = None
    dtype: Any = jnp.float32
    norm_momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, features: bool = False):
        """Classifies images.

        Args:
          images: ``(*b, h, w, c)`` floating point.
          train: whether batch normalisation uses the batch's statistics and updates ``batch_stats``.
          features: whether to return the maps of the stages as well.

        Returns:
          Logits ``(*b, num_classes)`` in float32; with ``features`` also a dict with ``stem`` (stride 4),
          ``stage1`` (stride 4), ``stage2`` (8), ``stage3`` (16), ``stage4`` (32), each ``(*b, h, w, c)``; other
          ``stage_strides`` give other strides.

        Raises:
          ValueError: images too small, of another dtype or number of channels.
        """
        stage_strides = self.stage_strides or (1,) + (2,) * (len(self.stage_sizes) - 1)
        check_images(self, images, stem="conv_stem", stride=4 * math.prod(stage_strides))
        conv, norm = conv_and_norm(train=train, dtype=self.dtype, momentum=self.norm_momentum)
        x = conv(self.width, (7, 7), strides=2, name="conv_stem")(images)
        x = nn.relu(norm(name="norm_stem")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        maps = {"stem": x}
        nothing = (identity,) * len(self.stage_sizes)
        choices = zip(
            self.stage_sizes,
            self.stage_convs or (nn.Conv,) * len(self.stage_sizes),
            stage_strides,
            self.block_recalibrations or nothing,
            self.stage_recalibrations or nothing,
            strict=True,
        )
        for stage, (size, stage_conv, stride, in_block, after_stage) in enumerate(choices, start=1):
            injected = partial(stage_conv, **conv.keywords)
            for i in range(size):
                x = self.block(
                    features=self.width * 2 ** (stage - 1),
                    strides=stride if i == 0 else 1,
                    conv=injected,
                    plain_conv=conv,
                    norm=norm,
                    recalibration=partial(in_block, norm=norm, dtype=self.dtype),
                    name=f"stage{stage}_block{i + 1}",
                )(x)
            x = after_stage(norm=norm, dtype=self.dtype, name=f"stage{stage}_recalibration")(x)
            maps[f"stage{stage}"] = x
        x = jnp.mean(x.astype(jnp.float32), axis=(-3, -2))
        logits = nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)
        return (logits, maps) if features else logits


SIZES: dict[int, tuple[ModuleDef, tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
}


def resnet(
    depth: int,
    *,
    num_classes: int = 1000,
    width: int = 64,
    kappa: float = 0.0,
    upsilon: float = 0.0,
    attention_ratio: float | None = None,
    num_heads: int = 8,
    min_key_depth: int = 20,
    stages: Sequence[int] = (2, 3, 4),
    pooled_stages: Sequence[int] | None = None,
    position_encoding: str = "relative",
    larger_maps: str = "raise",
    strided_attention: str = "subsample",
    implementation: str | None = None,
    recalibration: str = "none",
    reduction: int = 16,
    extent: int = 0,
    gather: str = "parameter_free",
    recalibration_stages: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
) -> ResNet:
    """ResNet-18, 34, 50, 101 or 152, plain or augmented.

    The 3x3 of every block of the augmented stages is an `aaconv.AAConv`; in ResNet-18 and 34 the first 3x3.
    Stem, first stage and pointwise convolutions stay convolutions, also when fully attentional
    (``kappa=upsilon=1``). The 28-pixel stage attends at 14 pixels (``pooled_stages=(2,)``).

    Parameters at 224 pixels, 1,000 classes, in millions: ResNet-34 / 50 / 101 / 152 plain 21.8 / 25.6 /
    44.5 / 60.2; augmented (kappa = 2 upsilon = 0.2; ResNet-34 kappa = upsilon = 0.25) 20.7 / 25.8 / 45.4 / 61.6;
    ResNet-50 with kappa = upsilon = 0.25, 0.5, 0.75, 1: 24.3, 22.3, 20.7, 19.4. The paper gives these figures. FLOPs
    come within 1% of its own, but for the last: 6.38 G, where it prints 6.3. The paper gives no rounding;
    that ResNet-34's heads, the rounding and the pooled stage are as here is inferred from them.

    With Squeeze-and-Excitation ResNet-34 / 50 / 101 / 152 have 22.0 / 28.1 / 49.3 / 66.8, ResNet-50 with BAM 25.9 and
    with CBAM 28.1, as printed (the figures of ResNet-34, 101 and 152 and of BAM and CBAM are recalled, not verified).

    Args:
      depth: 18, 34, 50, 101 or 152.
      num_classes: logits.
      width: channels of the stem.
      kappa, upsilon, num_heads, min_key_depth, position_encoding, larger_maps, strided_attention,
        implementation: as in `aaconv.AAConv`; ``upsilon=0`` is the plain network.
      attention_ratio: kappa and upsilon alike, instead of both (figure 4): 0 is the plain network, 1 attends only.
      stages: augmented stages, 1 to 4.
      pooled_stages: augmented stages that attend at half their resolution; None: stage 2, if it is augmented.
      recalibration: ``none``; ``se``, ``ge`` or ``cbam``: a layer on the residual branch of every block; ``bam``: one
        after a stage. It goes with attention as well.
      reduction: of the channels, in all of them but the parameter-free and the parametrised Gather-Excite.
      extent, gather: ``extent`` and ``form`` of `aaconv.layers.GatherExcite`.
      recalibration_stages: the stages that have it, 1 to 4; None: all of them, for ``bam`` all but the last.
      dtype: of activations.

    References:
      Bello et al. 2019, 4.2, 4.4, tables 2 and 3, figure 4.
    """
    block, sizes = SIZES[depth]
    check_sizes(width=width, num_classes=num_classes)
    if pooled_stages is None:
        pooled_stages = tuple({2} & set(stages)) if upsilon else ()
    block_recalibrations, stage_recalibrations = recalibrations(
        len(sizes),
        recalibration=recalibration,
        reduction=reduction,
        extent=extent,
        gather=gather,
        stages=recalibration_stages,
    )
    return ResNet(
        stage_sizes=sizes,
        block=block,
        num_classes=num_classes,
        width=width,
        stage_convs=stage_convs(
            len(sizes),
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
        ),
        block_recalibrations=block_recalibrations,
        stage_recalibrations=stage_recalibrations,
        dtype=dtype,
    )
