"""Wide-ResNet for small images, with an injected convolution in each block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.errors import close_matches
from aaconv.models.augmentation import ModuleDef, check_images, check_sizes, conv_and_norm, stage_convs
from aaconv.models.recalibration import identity, recalibrations

SHORTCUTS = ("pad", "projection")


class PreActivationBlock(nn.Module):
    """norm, relu, conv twice; ``conv`` is the first 3x3 (Zagoruyko & Komodakis 2016, fig. 1d).

    ``recalibration`` is the last layer of the residual branch, a layer of `aaconv.layers` or nothing.
    """

    features: int
    strides: int
    conv: ModuleDef
    plain_conv: ModuleDef
    norm: ModuleDef
    shortcut: str
    recalibration: ModuleDef = identity

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        changes = self.strides > 1 or x.shape[-1] != self.features
        y = nn.relu(self.norm(name="norm1")(x))
        if changes:
            x = self._match(y)
        y = self.conv(self.features, (3, 3), strides=self.strides, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.plain_conv(self.features, (3, 3), name="conv2")(y)
        return x + self.recalibration(name="recalibration")(y)

    def _match(self, x: jax.Array) -> jax.Array:
        if self.shortcut == "projection":
            return self.plain_conv(self.features, (1, 1), strides=self.strides, name="conv_shortcut")(x)
        if self.strides > 1:
            window = (self.strides, self.strides)
            x = nn.avg_pool(x, window, window, padding="SAME", count_include_pad=False).astype(x.dtype)
        extra = self.features - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(extra // 2, extra - extra // 2)])


class WideResNet(nn.Module):
    """Wide-ResNet-d-k: three stages at full, half and quarter resolution.

    Attributes:
      blocks_per_stage: ``(depth - 4) / 6``.
      width: multiplier k of the stages' channels, by default 16, 32, 64.
      num_classes: logits.
      stage_convs: what each stage puts in the place of the first 3x3 of its blocks, see `ResNet`.
      block_recalibrations, stage_recalibrations: what stands at the end of the residual branch of the blocks of each
        stage, and after its last block, see `ResNet`.
      stem_channels: of the first convolution, and of stage 1 before `width` multiplies it.
      shortcut: ``pad``: average pooling and zero channels where a block changes size; ``projection``: a
        strided 1x1 convolution.
      dtype: of activations; parameters are float32.
      norm_momentum: of the running batch statistics.

    References:
      Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016; Bello et al. 2019, 4.1.
    """

    blocks_per_stage: int
    width: int
    num_classes: int = 100
    stage_convs: Sequence[ModuleDef] | None = None
    block_recalibrations: Sequence[ModuleDef] | None = None
    stage_recalibrations: Sequence[ModuleDef] | None = None
    stem_channels: int = 16
    shortcut: str = "pad"
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
          Logits ``(*b, num_classes)`` in float32; with ``features`` also a dict with ``stem``, ``stage1``
          (stride 1), ``stage2`` (2) and ``stage3`` (4), each ``(*b, h, w, c)``; the last is normalised.

        Raises:
          ValueError: images too small, of another dtype or number of channels.
        """
        check_images(self, images, stem="conv_stem", stride=4)
        conv, norm = conv_and_norm(train=train, dtype=self.dtype, momentum=self.norm_momentum)
        x = conv(self.stem_channels, (3, 3), name="conv_stem")(images)
        maps = {"stem": x}
        nothing = (identity,) * 3
        choices = zip(
            self.stage_convs or (nn.Conv,) * 3,
            self.block_recalibrations or nothing,
            self.stage_recalibrations or nothing,
            strict=True,
        )
        for stage, (stage_conv, in_block, after_stage) in enumerate(choices, start=1):
            injected = partial(stage_conv, **conv.keywords)
            for i in range(self.blocks_per_stage):
                x = PreActivationBlock(
                    features=self.stem_channels * self.width * 2 ** (stage - 1),
                    strides=2 if stage > 1 and i == 0 else 1,
                    conv=injected,
                    plain_conv=conv,
                    norm=norm,
                    shortcut=self.shortcut,
                    recalibration=partial(in_block, norm=norm, dtype=self.dtype),
                    name=f"stage{stage}_block{i + 1}",
                )(x)
            x = after_stage(norm=norm, dtype=self.dtype, name=f"stage{stage}_recalibration")(x)
            if stage == 3:
                x = nn.relu(norm(name="norm_final")(x))
            maps[f"stage{stage}"] = x
        x = jnp.mean(x.astype(jnp.float32), axis=(-3, -2))
        logits = nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)
        return (logits, maps) if features else logits


def wide_resnet(
    depth: int = 28,
    width: int = 10,
    *,
    num_classes: int = 100,
    kappa: float = 0.0,
    upsilon: float = 0.0,
    attention_ratio: float | None = None,
    num_heads: int = 8,
    min_key_depth: int = 20,
    stages: Sequence[int] = (1, 2, 3),
    pooled_stages: Sequence[int] = (),
    position_encoding: str = "relative",
    larger_maps: str = "raise",
    strided_attention: str = "subsample",
    implementation: str | None = None,
    recalibration: str = "none",
    reduction: int = 16,
    extent: int = 0,
    gather: str = "parameter_free",
    recalibration_stages: Sequence[int] | None = None,
    stem_channels: int = 16,
    shortcut: str = "pad",
    dtype: Any = jnp.float32,
) -> WideResNet:
    """Wide-ResNet-d-k for CIFAR, plain or augmented in the first 3x3 of every block.

    The paper prints 36.3M parameters for WRN-28-10 and 36.2M for AA-WRN-28-10 (kappa = 2 upsilon = 0.2, 8
    heads). The plain figure is that of shortcuts without parameters (``pad``, the default here: 36.28M;
    ``projection``: 36.54M). No setting that we know gives 36.2M together with the paper's 10.9 GFLOPs: this one gives
    36.05M (36.31M with ``projection``) and 11.40 GFLOPs, at 32 pixels.

    SE-WRN-28-10 and GE-WRN-28-10 have the 36.5M and 36.3M that it prints: the first without biases in the bottleneck
    (with them 36.55M), the second without parameters (the default here) or with convolutions of extent 2.

    Args:
      depth: 6 n + 4, e.g. 10, 16, 22, 28, 40.
      width: multiplier k.
      num_classes: logits.
      kappa, upsilon, num_heads, min_key_depth, position_encoding, larger_maps, strided_attention,
        implementation: as in `aaconv.AAConv`; ``upsilon=0`` is the plain network.
      attention_ratio: kappa and upsilon alike, instead of both: 0 is the plain network, 1 attends only.
      stages: augmented stages, 1 to 3.
      pooled_stages: augmented stages that attend at half their resolution.
      stem_channels: of the stem; the stages have ``width`` times 1, 2 and 4 times as many. Parameters can be matched
        with it in finer steps than with ``width``.
      shortcut: ``pad`` or ``projection``.
      recalibration: ``none``; ``se``, ``ge`` or ``cbam``: a layer on the residual branch of every block; ``bam``: one
        after a stage. It goes with attention as well.
      reduction: of the channels, in all of them but the parameter-free and the parametrised Gather-Excite.
      extent, gather: ``extent`` and ``form`` of `aaconv.layers.GatherExcite`.
      recalibration_stages: the stages that have it, 1 to 3; None: all of them, for ``bam`` all but the last.
      dtype: of activations.

    Raises:
      ValueError: a depth that is not 6 n + 4, a width or a number of channels below 1, an unknown shortcut.

    References:
      Bello et al. 2019, 4.1 and table 1.
    """
    if depth < 10 or (depth - 4) % 6:
        near = max(10, round((depth - 4) / 6) * 6 + 4)
        raise ValueError(f"depth={depth} must be 6 n + 4 with n of at least 1: use {near}, for example")
    check_sizes(width=width, stem_channels=stem_channels, num_classes=num_classes)
    if shortcut not in SHORTCUTS:
        raise ValueError(
            f"shortcut={shortcut!r} is not one of {', '.join(SHORTCUTS)}{close_matches(shortcut, SHORTCUTS)}"
        )
    block_recalibrations, stage_recalibrations = recalibrations(
        3,
        recalibration=recalibration,
        reduction=reduction,
        extent=extent,
        gather=gather,
        stages=recalibration_stages,
    )
    return WideResNet(
        blocks_per_stage=(depth - 4) // 6,
        width=width,
        num_classes=num_classes,
        stage_convs=stage_convs(
            3,
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
        stem_channels=stem_channels,
        shortcut=shortcut,
        dtype=dtype,
    )
