"""Attention-augmented convolution as a drop-in for `flax.linen.Conv`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from aaconv.errors import close_matches
from aaconv.layers.attention import MultiHeadSelfAttention, check_depths, check_heads, promote_inputs
from aaconv.layers.position import check_position_encoding
from aaconv.ops import BlockSizes

STRIDED_ATTENTION = ("subsample", "average_pool")
PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


class AAConv(nn.Conv, kw_only=True):
    r"""Attention-augmented convolution: some output channels convolve, the others attend.

    .. math:: \mathrm{AAConv}(X) = \mathrm{Concat}[\mathrm{Conv}(X), \mathrm{MHA}(X)]

    with :math:`F_{out} - d_v` filters in the convolution and :math:`d_v` channels of self-attention.
    Takes every argument of `flax.linen.Conv`, with its name, order, default and meaning; the arguments
    below come after them, by keyword only. With ``upsilon=0`` it is `flax.linen.Conv`, bit for bit and
    with the same parameters; with ``upsilon=1`` it attends only. Parameters otherwise: ``conv`` (as
    `flax.linen.Conv`) and ``attention`` (as `MultiHeadSelfAttention`).

    **What attends where.** Attention runs at the resolution of the output. With a stride, each output
    position attends from the input pixel in the centre of its convolution window (``subsample``: a strided
    pointwise projection), or from the mean of the ``stride`` x ``stride`` pixels around that centre
    (``average_pool``). The centres follow the padding, so the attention map always has the size and the
    alignment of the convolution's output: SAME, VALID or explicit padding, odd or even sizes. A window whose
    centre lies in the padding attends from the nearest border pixel. The paper does not say how a
    strided augmented convolution attends. With ``pooled_attention`` that map is average-pooled once more
    (3x3, stride 2), and the result of attention is brought back by bilinear interpolation between the centres of
    those windows before the concat; the convolution stays at full resolution.

    **Depths.** ``key_depth`` is ``kappa * features`` rounded down to a multiple of ``num_heads``, and at least
    ``min_key_depth`` a head; ``value_depth`` is ``upsilon * features`` rounded down to a multiple of
    ``num_heads``. Both can be given instead.

    Attributes:
      kappa: :math:`d_k / F_{out}`, share of key channels; any number > 0 (paper: 3.2).
      upsilon: :math:`d_v / F_{out}`, share of the output's channels that attend, 0 to 1.
      num_heads: N_h.
      key_depth: d_k over all heads, instead of ``kappa``.
      value_depth: d_v over all heads, instead of ``upsilon``; 0 is a plain convolution.
      min_key_depth: channels a head that the keys have at least when ``kappa`` sets them; 20 in the
        paper's networks, 2 in MnasNet's.
      position_encoding: ``relative``, ``none``, ``sinusoid`` or ``coordconv``.
      larger_maps: ``raise``, ``interpolate`` or ``clip``: what the relative tables do when a call's map is
        larger than the map at initialisation. Smaller maps use the middle of the tables, exactly.
      strided_attention: ``subsample`` or ``average_pool``, see above; no effect at stride 1.
      pooled_attention: whether attention runs at half the output's resolution.
      implementation: of `aaconv.ops.relative_attention`; None to have it chosen.
      block_sizes: of `aaconv.ops.relative_attention`; None to have them chosen.
      relative_init: of the relative tables; default normal with deviation ``d ** -0.5``, d a head.

    ``use_bias``, ``dtype``, ``param_dtype``, ``promote_dtype``, ``precision``, ``kernel_init`` and ``bias_init``
    serve the pointwise projections of attention too; the paper's parameter counts are without biases.
    ``strides``, ``padding``, dilations, ``feature_group_count`` and ``mask`` shape the convolution; ``mask`` has
    the shape of the convolution branch's kernel, which has ``features - value_depth`` filters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = AAConv(64, (3, 3), strides=2, kappa=0.25, upsilon=0.25, num_heads=4)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
      >>> layer.apply(variables, jnp.ones((8, 32, 32, 3))).shape
      (8, 16, 16, 64)
      >>> variables["params"]["conv"]["kernel"].shape, variables["params"]["attention"]["qkv"]["kernel"].shape
      ((3, 3, 3, 48), (3, 176))

    References:
      Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, 3.2 and 3.3,
      https://arxiv.org/abs/1904.09925
    """

    kappa: float = 0.25
    upsilon: float = 0.25
    num_heads: int = 8
    key_depth: int | None = None
    value_depth: int | None = None
    min_key_depth: int = 20
    position_encoding: str = "relative"
    larger_maps: str = "raise"
    strided_attention: str = "subsample"
    pooled_attention: bool = False
    implementation: str | None = None
    block_sizes: BlockSizes | None = None
    relative_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves and attends.

        Args:
          inputs: ``(*b, h, w, c)``, any batch shape, as many spatial axes as ``kernel_size`` has entries.

        Returns:
          ``(*b, h', w', features)``, with the size that `flax.linen.Conv` gives.

        Raises:
          ValueError: shares, heads or depths that do not fit each other, an input too small, a padding
            that attention cannot follow (``CAUSAL``).
        """
        key_depth, value_depth = self.depths()
        if value_depth == 0:
            return super().__call__(inputs)
        kernel_size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        ndim = len(kernel_size)
        self._check(inputs, ndim, value_depth)
        conv_features = self.features - value_depth
        space = inputs.shape[-1 - ndim : -1]
        branches = []
        if conv_features:
            branches.append(self._conv(conv_features)(inputs))
        x = self._attention_input(promote_inputs(self, inputs), kernel_size)
        size = x.shape[-1 - ndim : -1]
        if 0 in size:
            raise ValueError(
                f"inputs of spatial shape {space} give an empty output with kernel_size={tuple(kernel_size)} and "
                f"padding={self.padding!r}: use larger inputs or padding='SAME'"
            )
        if self.pooled_attention:
            x = _pool_3x3(x, ndim)
        attended = self._attention(key_depth, value_depth, ndim)(x)
        if self.pooled_attention:
            attended = _upsample(attended, size)
        branches.append(attended)
        return jnp.concatenate(branches, axis=-1)

    def depths(self) -> tuple[int, int]:
        """Returns ``(key_depth, value_depth)`` over all heads, after rounding.

        Raises:
          ValueError: a share outside its range, or a depth that gives a head nothing.
        """
        return attention_depths(
            self.features,
            kappa=self.kappa,
            upsilon=self.upsilon,
            num_heads=self.num_heads,
            key_depth=self.key_depth,
            value_depth=self.value_depth,
            min_key_depth=self.min_key_depth,
        )

    def _check(self, inputs: jax.Array, ndim: int, value_depth: int) -> None:
        check_position_encoding(self.position_encoding)
        if inputs.ndim < ndim + 1:
            raise ValueError(
                f"inputs have shape {inputs.shape}: kernel_size={self.kernel_size} needs at least {ndim + 1} axes, "
                "(*b, *space, c)"
            )
        if self.strided_attention not in STRIDED_ATTENTION:
            raise ValueError(
                f"strided_attention={self.strided_attention!r} is not one of {', '.join(STRIDED_ATTENTION)}"
                f"{close_matches(self.strided_attention, STRIDED_ATTENTION)}"
            )
        if isinstance(self.padding, str) and self.padding not in PADDINGS:
            raise ValueError(
                f"padding={self.padding!r} is not one of {', '.join(PADDINGS)}, nor a number or a pair for each axis"
                f"{close_matches(self.padding, PADDINGS)}"
            )
        if self.padding == "CAUSAL":
            raise ValueError(
                "padding='CAUSAL' with upsilon > 0: attention sees every position, the later ones too; "
                "use upsilon=0 or another padding"
            )
        groups, filters = self.feature_group_count, self.features - value_depth
        if filters and (filters % groups or inputs.shape[-1] % groups):
            raise ValueError(
                f"feature_group_count={groups} must divide the {inputs.shape[-1]} input channels and the {filters} "
                f"filters left to the convolution (features={self.features} - value_depth={value_depth}): choose "
                "value_depth or the groups so that it does"
            )
        if not filters and self.mask is not None:
            raise ValueError("mask is given, but all features attend (upsilon=1): there is no kernel to mask")

    def _conv(self, features: int) -> nn.Conv:
        theirs = {f.name: getattr(self, f.name) for f in dataclasses.fields(nn.Conv) if f.init}
        theirs |= {"features": features, "name": "conv", "parent": self}
        return nn.Conv(**theirs)

    def _attention(self, key_depth: int, value_depth: int, ndim: int) -> MultiHeadSelfAttention:
        return MultiHeadSelfAttention(
            num_heads=self.num_heads,
            key_depth=key_depth,
            value_depth=value_depth,
            position_encoding=self.position_encoding,
            larger_maps=self.larger_maps,
            spatial_ndim=ndim,
            use_bias=self.use_bias,
            implementation=self.implementation,
            block_sizes=self.block_sizes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=as_pointwise(self.kernel_init, ndim),
            bias_init=self.bias_init,
            promote_dtype=self.promote_dtype,
            relative_init=self.relative_init,
            name="attention",
        )

    def _attention_input(self, x: jax.Array, kernel_size: Sequence[int]) -> jax.Array:
        """The input at the centres of the convolution's windows, ``(*b, h', w', c)``."""
        ndim = len(kernel_size)
        strides = per_axis("strides", self.strides, ndim)
        input_dilation = per_axis("input_dilation", self.input_dilation, ndim)
        kernel_dilation = per_axis("kernel_dilation", self.kernel_dilation, ndim)
        windows = [(k - 1) * d + 1 for k, d in zip(kernel_size, kernel_dilation, strict=True)]
        for axis in range(ndim):
            where = x.ndim - 1 - ndim + axis
            if input_dilation[axis] > 1:
                x = _spread(x, where, input_dilation[axis])
            size = x.shape[where]
            low, high = _padding(self.padding, axis, ndim, size, windows[axis], strides[axis])
            out = max((size + low + high - windows[axis]) // strides[axis] + 1, 0)
            pool = strides[axis] if self.strided_attention == "average_pool" else 1
            x = _windows(x, where, int((windows[axis] - pool) / 2) - low, out, strides[axis], pool)
        return x


def attention_depths(
    features: int,
    *,
    kappa: float,
    upsilon: float,
    num_heads: int,
    key_depth: int | None = None,
    value_depth: int | None = None,
    min_key_depth: int = 20,
) -> tuple[int, int]:
    """The rounding of kappa and upsilon to channels.

    Args:
      features: output channels F_out of the layer.
      kappa, upsilon, num_heads, key_depth, value_depth, min_key_depth: as in `AAConv`.

    Returns:
      ``(key_depth, value_depth)`` over all heads; ``(0, 0)`` for a plain convolution.

    Raises:
      ValueError: naming the value, the constraint and what to use instead.

    Example:
      >>> attention_depths(512, kappa=0.2, upsilon=0.1, num_heads=8)
      (160, 48)
    """
    check_heads(num_heads)
    for name, share in (("kappa", kappa), ("upsilon", upsilon)):
        if isinstance(share, str):
            raise ValueError(f"{name}={share!r} must be a number")
    if value_depth is None:
        if not 0 <= upsilon <= 1:
            raise ValueError(f"upsilon={upsilon} must lie between 0 (a plain convolution) and 1 (attention only)")
        if upsilon == 0:
            return 0, 0
        value_depth = _round_down(upsilon * features, num_heads)
        if value_depth == 0:
            share = math.ceil(num_heads / features * 1000) / 1000
            ways = [f"use upsilon >= {share}"] if share <= 1 else []
            if upsilon * features >= 1:
                ways.append(f"use at most {int(upsilon * features)} heads")
            raise ValueError(
                f"upsilon={upsilon} of features={features} is less than a channel for each of num_heads={num_heads}: "
                f"{' or '.join(ways) or 'use more features'}"
            )
        if upsilon == 1 and value_depth != features:
            raise ValueError(
                f"upsilon=1 with features={features}: num_heads={num_heads} must divide features; use "
                f"{', '.join(str(n) for n in range(1, num_heads) if features % n == 0)} heads"
            )
    elif value_depth == 0:
        return 0, 0
    elif not 0 < value_depth <= features:
        raise ValueError(f"value_depth={value_depth} must lie between 0 and features={features}")
    if key_depth is None:
        if not 0 < kappa < math.inf:
            raise ValueError(
                f"kappa={kappa} must be a finite number greater than 0 where upsilon={upsilon} is: attention needs keys"
            )
        if min_key_depth < 1:
            raise ValueError(f"min_key_depth={min_key_depth} must be at least 1 channel a head")
        key_depth = max(_round_down(kappa * features, num_heads), min_key_depth * num_heads)
    check_depths(num_heads, key_depth, value_depth)
    return key_depth, value_depth


def _round_down(depth: float, multiple: int) -> int:
    # 0.1 * 640 and the like must not fall short of a whole number by a rounding error.
    return int(depth + 1e-6) // multiple * multiple


def per_axis(name: str, value: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Returns one number an axis for what `flax.linen.Conv` takes as a number, one an axis, or None for 1.

    Raises:
      ValueError: a number below 1, or not as many as there are axes.
    """
    if value is None:
        value = 1
    values = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(values) != ndim or min(values) < 1:
        raise ValueError(f"{name}={value!r} must be a number of at least 1, or one for each of {ndim} spatial axes")
    return values


def _padding(padding, axis: int, ndim: int, size: int, window: int, stride: int) -> tuple[int, int]:
    """The padding of one axis in pixels, for whatever `flax.linen.Conv` accepts."""
    if isinstance(padding, str):
        if padding in ("CIRCULAR", "REFLECT"):
            return (window - 1) // 2, window // 2
        return lax.padtype_to_pads((size,), (window,), (stride,), padding)[0]
    if isinstance(padding, int):
        return padding, padding
    if len(padding) != ndim:
        raise ValueError(f"padding={padding!r} must have one entry for each of {ndim} spatial axes")
    pair = (padding[axis],) * 2 if isinstance(padding[axis], int) else tuple(padding[axis])
    if len(pair) != 2:
        raise ValueError(f"padding={padding!r} must give a number or a pair (low, high) for each spatial axis")
    return pair


def _spread(x: jax.Array, axis: int, dilation: int) -> jax.Array:
    """Nearest-neighbour form of an input dilation: ``(size - 1) * dilation + 1`` positions."""
    size = x.shape[axis]
    at = (jnp.arange((size - 1) * dilation + 1) + dilation // 2) // dilation
    return jnp.take(x, at, axis=axis)


def _windows(x: jax.Array, axis: int, start: int, out: int, stride: int, pool: int) -> jax.Array:
    """Means of ``out`` windows of ``pool`` pixels, ``stride`` apart; border pixels repeat beyond the border."""
    size = x.shape[axis]
    last = start + (out - 1) * stride + pool - 1
    pads = [(0, 0)] * x.ndim
    pads[axis] = (max(0, -start), max(0, last - (size - 1)))
    if pads[axis] != (0, 0):
        x = jnp.pad(x, pads, mode="edge")
    start += pads[axis][0]

    def at(offset: int) -> jax.Array:
        first = start + offset
        return lax.slice_in_dim(x, first, first + max((out - 1) * stride + 1, 0), stride, axis)

    if pool == 1:
        return at(0)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = sum((at(offset).astype(wide) for offset in range(1, pool)), at(0).astype(wide))
    return (total / pool).astype(x.dtype)


def _pool_3x3(x: jax.Array, ndim: int) -> jax.Array:
    """Average over 3x3 windows, stride 2, of the pixels inside the map only."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.avg_pool(wide, (3,) * ndim, (2,) * ndim, padding="SAME", count_include_pad=False).astype(x.dtype)


def _upsample(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Bilinear interpolation of what `_pool_3x3` made of a map of ``size``, back to that size."""
    ndim = len(size)
    # SAME centres its windows on pixels 1, 3, 5, ... of an even axis and on 0, 2, 4, ... of an odd one;
    # interpolating between those centres keeps the result where it was.
    shift = jnp.array([0.5 if s % 2 == 0 else -0.5 for s in size])
    shape = (*x.shape[: -1 - ndim], *size, x.shape[-1])
    axes = tuple(range(x.ndim - 1 - ndim, x.ndim - 1))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    large = jax.image.scale_and_translate(wide, shape, axes, jnp.full((ndim,), 2.0), shift, "linear", antialias=False)
    return large.astype(x.dtype)


def as_pointwise(init: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """An initialiser of convolution kernels as one of matrices: those of a pointwise convolution."""

    def matrix(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        kernel = init(key, (1,) * ndim + tuple(shape), dtype)
        if isinstance(kernel, nn.Partitioned):
            return kernel.replace(value=kernel.value.reshape(shape), names=kernel.names[-2:])
        return kernel.reshape(shape)

    return matrix
