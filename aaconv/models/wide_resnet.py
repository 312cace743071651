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

SHORTCUTS = ("pad", "projection")


class PreActivationBlock(nn.Module):
    """norm, relu, conv twice; ``conv`` is the first 3x3 (Zagoruyko & Komodakis 2016, fig. 1d)."""

    features: int
    strides: int
    conv: ModuleDef
    plain_conv: ModuleDef
    norm: ModuleDef
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        changes = self.strides > 1 or x.shape[-1] != self.features
        y = nn.relu(self.norm(name="norm1")(x))
        if changes:
            x = self._match(y)
        y = self.conv(self.features, (3, 3), strides=self.strides, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        return x + self.plain_conv(self.features, (3, 3), name="conv2")(y)

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
      width: multiplier k of the channels 16, 32, 64.
      num_classes: logits.
      stage_convs: what each stage puts in the place of the first 3x3 of its blocks, see `ResNet`.
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
        x = conv(16, (3, 3), name="conv_stem")(images)
        maps = {"stem": x}
        stage_convs = self.stage_convs or (nn.Conv,) * 3
        for stage, stage_conv in enumerate(stage_convs, start=1):
            injected = partial(stage_conv, **conv.keywords)
            for i in range(self.blocks_per_stage):
                x = PreActivationBlock(
                    features=16 * self.width * 2 ** (stage - 1),
                    strides=2 if stage > 1 and i == 0 else 1,
                    conv=injected,
                    plain_conv=conv,
                    norm=norm,
                    shortcut=self.shortcut,
                    name=f"stage{stage}_block{i + 1}",
                )(x)
            if stage == len(stage_convs):
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
    num_heads: int = 8,
    min_key_depth: int = 20,
    stages: Sequence[int] = (1, 2, 3),
    pooled_stages: Sequence[int] = (),
    position_encoding: str = "relative",
    larger_maps: str = "raise",
    strided_attention: str = "subsample",
    implementation: str | None = None,
    shortcut: str = "pad",
    dtype: Any = jnp.float32,
) -> WideResNet:
    """Wide-ResNet-d-k for CIFAR, plain or augmented in the first 3x3 of every block.

    The paper prints 36.3M parameters for WRN-28-10 and 36.2M for AA-WRN-28-10 (kappa = 2 upsilon = 0.2, 8
    heads). The plain figure is that of shortcuts without parameters (``pad``, the default here: 36.28M;
    ``projection``: 36.54M). No setting that we know gives 36.2M together with the paper's 10.9 GFLOPs: this one gives
    36.05M (36.31M with ``projection``) and 11.40 GFLOPs, at 32 pixels.

    Args:
      depth: 6 n + 4, e.g. 10, 16, 22, 28, 40.
      width: multiplier k.
      num_classes: logits.
      kappa, upsilon, num_heads, min_key_depth, position_encoding, larger_maps, strided_attention,
        implementation: as in `aaconv.AAConv`; ``upsilon=0`` is the plain network.
      stages: augmented stages, 1 to 3.
      pooled_stages: augmented stages that attend at half their resolution.
      shortcut: ``pad`` or ``projection``.
      dtype: of activations.

    Raises:
      ValueError: a depth that is not 6 n + 4, a width below 1, an unknown shortcut.

    References:
      Bello et al. 2019, 4.1 and table 1.
    """
    if depth < 10 or (depth - 4) % 6:
        near = max(10, round((depth - 4) / 6) * 6 + 4)
        raise ValueError(f"depth={depth} must be 6 n + 4 with n of at least 1: use {near}, for example")
    check_sizes(width=width, num_classes=num_classes)
    if shortcut not in SHORTCUTS:
        raise ValueError(
            f"shortcut={shortcut!r} is not one of {', '.join(SHORTCUTS)}{close_matches(shortcut, SHORTCUTS)}"
        )
    return WideResNet(
        blocks_per_stage=(depth - 4) // 6,
        width=width,
        num_classes=num_classes,
        stage_convs=stage_convs(
            3,
            kappa=kappa,
            upsilon=upsilon,
            num_heads=num_heads,
            min_key_depth=min_key_depth,
            stages=stages,
            pooled_stages=pooled_stages,
            position_encoding=position_encoding,
            larger_maps=larger_maps,
            strided_attention=strided_attention,
            implementation=implementation,
        ),
        shortcut=shortcut,
        dtype=dtype,
    )
