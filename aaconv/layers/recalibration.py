r"""Layers that rescale a map by what they see of it: the mechanisms that the paper compares attention with.

Each is called on a map ``(*b, h, w, c)`` and returns one of the same shape and dtype, so that a network can
inject it into its blocks. All take ``norm``, the batch normalisation of the network, whether or not they
normalise, and ``dtype``.

`SqueezeExcite` gives a number a channel, `GatherExcite` one a channel and region, `BAM` one a channel and pixel, and
`CBAM` one a channel, then one a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.errors import close_matches

ModuleDef = Callable[..., Any]

FORMS = ("parameter_free", "parametrised", "pointwise")
"""The forms of `GatherExcite`."""


class SqueezeExcite(nn.Module):
    r"""Squeeze-and-Excitation: every channel is scaled by a number that all channels' means decide.

    .. math:: y = x \cdot \sigma(W_2\, \delta(W_1\, \bar x + b_1) + b_2), \qquad
              \bar x_c = \frac{1}{H W} \sum_{i, j} x_{ijc}

    with :math:`\delta` the ReLU, :math:`W_1` of ``(c, c / r)`` and :math:`W_2` of ``(c / r, c)``.

    Attributes:
      reduction: r; ``c / r`` is rounded down.
      reduced: channels of the bottleneck instead of ``c / r``.
      use_bias: whether there are :math:`b_1` and :math:`b_2`.
      norm: not used.
      dtype: of the activations; means are float32.

    Raises:
      ValueError: at the call, where ``reduction`` is larger than the channels.

    References:
      Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, eq. 2 to 4, https://arxiv.org/abs/1709.01507; biases
      left out: section 6 of its longer version.
    """

    reduction: int = 16
    reduced: int | None = None
    use_bias: bool = True
    norm: ModuleDef | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*b, h, w, c)`` -> ``(*b, h, w, c)``."""
        channels = x.shape[-1]
        reduced = reduced_channels(channels, self.reduction) if self.reduced is None else self.reduced
        y = nn.Dense(reduced, use_bias=self.use_bias, dtype=self.dtype, name="reduce")(_mean(x))
        y = nn.Dense(channels, use_bias=self.use_bias, dtype=self.dtype, name="expand")(nn.relu(y))
        return x * nn.sigmoid(y).astype(x.dtype)


class GatherExcite(nn.Module):
    r"""Gather-Excite: every pixel is scaled by what was gathered in the region around it, a channel by itself.

    .. math:: y = x \cdot \sigma(\mathrm{interp}(\xi(x)))

    with :math:`\xi` the gathering at every ``extent``-th pixel and :math:`\mathrm{interp}` the nearest neighbour:
    ``extent x extent`` pixels share a number. The region around pixel ``extent * u`` reaches ``extent - 1`` pixels
    in every direction, ``2 * extent - 1`` in all: the paper's selection operator as recalled, not verified. The forms
    differ in :math:`\xi`:

    - ``parameter_free`` (the paper's theta minus): the mean over the region, pixels inside the map only.
    - ``parametrised`` (theta): ``log2(extent)`` depthwise 3x3 convolutions of stride 2, which together see the same
      region, each normalised and with a ReLU between them; one depthwise convolution as large as the map where
      ``extent`` is 0.
    - ``pointwise`` (theta plus): the same, then two 1x1 convolutions, ``c -> c / r -> c``, with a ReLU between them
      and without biases, as in `SqueezeExcite` on ResNets.

    Parameters: none; ``conv1``, ``norm1``, ``conv2`` .. ; and ``reduce`` and ``expand``. A convolution as large as
    the map serves no other size.

    Attributes:
      extent: the extent ratio e, 2, 4, 8 ..; 0 for the whole map.
      form: one of `FORMS`.
      reduction: r, of ``pointwise``.
      norm: batch normalisation, which ``parametrised`` and ``pointwise`` need.
      dtype: of the activations; means are float32.

    Raises:
      ValueError: at the call, an unknown form, an extent that is no power of two or does not divide the map, a
        ``reduction`` larger than the channels, ``norm`` missing, or another map than the global convolution's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.arange(16.0).reshape(4, 4, 1)
      >>> scale = GatherExcite(extent=2).apply({}, x) / x
      >>> bool(jnp.allclose(scale[2:, 2:], jax.nn.sigmoid(x[1:, 1:].mean())))
      True

    References:
      Hu, Shen, Albanie, Sun & Vedaldi, Gather-Excite, NeurIPS 2018, sections 2 and 3, https://arxiv.org/abs/1810.12348
    """

    extent: int = 0
    form: str = "parameter_free"
    reduction: int = 16
    norm: ModuleDef | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*b, h, w, c)`` -> ``(*b, h, w, c)``."""
        self._check(x.shape)
        y = self._average(x) if self.form == "parameter_free" else self._convolve(x)
        if self.form == "pointwise":
            reduced = reduced_channels(x.shape[-1], self.reduction)
            y = nn.Dense(reduced, use_bias=False, dtype=self.dtype, name="reduce")(y)
            y = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="expand")(nn.relu(y))
        scale = nn.sigmoid(y).astype(x.dtype)
        if self.extent:
            scale = jnp.repeat(jnp.repeat(scale, self.extent, axis=-3), self.extent, axis=-2)
        return x * scale

    def _average(self, x: jax.Array) -> jax.Array:
        if not self.extent:
            return _mean(x)
        e = self.extent

        def pool(x: jax.Array) -> jax.Array:
            # The last region ends with the map, where the extent divides it; the first begins e - 1 before it.
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(e - 1, 0), (e - 1, 0), (0, 0)])
            return nn.avg_pool(x, (2 * e - 1, 2 * e - 1), (e, e))

        wide = x.astype(_wide(x))
        return pool(wide) / pool(jnp.ones_like(wide[..., :1]))

    def _convolve(self, x: jax.Array) -> jax.Array:
        norm, channels = _given(self.norm, f"form={self.form!r}"), x.shape[-1]
        if self.extent:
            convs = [{"kernel_size": (3, 3), "strides": 2, "padding": 1}] * (self.extent.bit_length() - 1)
        else:
            convs = [{"kernel_size": x.shape[-3:-1], "padding": "VALID"}]
        for i, conv in enumerate(convs, start=1):
            depthwise = {"feature_group_count": channels, "use_bias": False, "dtype": self.dtype}
            x = nn.Conv(channels, **conv, **depthwise, name=f"conv{i}")(x if i == 1 else nn.relu(x))
            x = norm(name=f"norm{i}")(x)
        return x

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is not one of {', '.join(FORMS)}{close_matches(self.form, FORMS)}")
        check_extent(self.extent)
        height, width = shape[-3:-1]
        if self.extent and (height % self.extent or width % self.extent):
            smaller = [2**i for i in range(1, self.extent.bit_length()) if not (height % 2**i or width % 2**i)]
            raise ValueError(
                f"extent={self.extent} must divide the map of {height}x{width}: that takes extent="
                f"{' or '.join(map(str, [*smaller, 0]))} (0 is the whole map); use one that all stages "
                "take, larger images, or leave the stage out (recalibration_stages)"
            )
        if self.form != "parameter_free" and not self.extent and self.has_variable("params", "conv1"):
            made_for = nn.meta.unbox(self.get_variable("params", "conv1")["kernel"]).shape[:2]
            if made_for != (height, width):
                raise ValueError(
                    f"the map is {height}x{width} and the convolution over the whole map was made for "
                    f"{made_for[0]}x{made_for[1]}: initialise with that size, or use form='parameter_free' or an "
                    "extent above 0"
                )


class BAM(nn.Module):
    r"""Bottleneck attention module: what a channel and what a pixel's surroundings say, added, scale the map.

    .. math:: y = x + x \cdot \sigma(M_c + M_s), \qquad
              M_c = \mathrm{BN}(W_1\, \delta(W_0\, \bar x + b_0) + b_1), \qquad
              M_s = \mathrm{BN}(f_3(\delta f_2(\delta f_1(\delta f_0(x)))))

    with :math:`\delta` the ReLU, :math:`\bar x` the means of the channels, :math:`W_0` of ``(c, c / r)``,
    :math:`f_0` a 1x1 convolution to ``c / r`` channels, :math:`f_1` and :math:`f_2` dilated 3x3 ones and
    :math:`f_3` a 1x1 one to a single channel. :math:`M_c` is ``(*b, 1, 1, c)``, :math:`M_s` is ``(*b, h, w, 1)``.

    The paper's equations show no ReLU; one after every hidden layer is what is chosen here. Normalisation stands where
    the equations have it, at the end of both branches, and every layer has a bias.

    Attributes:
      reduction: r; ``c / r`` is rounded down.
      dilation: of the 3x3 convolutions, d in the paper.
      num_convs: how many of them there are.
      norm: batch normalisation; it must be given.
      dtype: of the activations; means are float32.

    Raises:
      ValueError: at the call, where ``reduction`` is larger than the channels or ``norm`` is missing.

    References:
      Park et al., BAM: Bottleneck Attention Module, BMVC 2018, eq. 1 to 5, https://arxiv.org/abs/1807.06514
    """

    reduction: int = 16
    dilation: int = 4
    num_convs: int = 2
    norm: ModuleDef | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*b, h, w, c)`` -> ``(*b, h, w, c)``."""
        norm, channels = _given(self.norm, "BAM"), x.shape[-1]
        reduced = reduced_channels(channels, self.reduction)
        y = nn.relu(nn.Dense(reduced, dtype=self.dtype, name="channel_reduce")(_mean(x)))
        y = norm(name="channel_norm")(nn.Dense(channels, dtype=self.dtype, name="channel_expand")(y))
        z = nn.relu(nn.Conv(reduced, (1, 1), dtype=self.dtype, name="spatial_reduce")(x))
        for i in range(1, self.num_convs + 1):
            conv = nn.Conv(reduced, (3, 3), kernel_dilation=self.dilation, dtype=self.dtype, name=f"spatial_conv{i}")
            z = nn.relu(conv(z))
        z = norm(name="spatial_norm")(nn.Conv(1, (1, 1), dtype=self.dtype, name="spatial_collapse")(z))
        return x + x * nn.sigmoid(y + z).astype(x.dtype)


class CBAM(nn.Module):
    r"""Convolutional block attention module: channels are scaled first, then pixels.

    .. math:: z = x \cdot \sigma(\mathrm{MLP}(\mathrm{mean}_{hw}\, x) + \mathrm{MLP}(\mathrm{max}_{hw}\, x)), \qquad
              y = z \cdot \sigma(f^{7 \times 7}([\mathrm{mean}_c\, z;\ \mathrm{max}_c\, z]))

    with one :math:`\mathrm{MLP}` for both, ``c -> c / r -> c`` with a ReLU between.

    The paper's equations show neither biases nor a normalisation. Here the MLP has biases and the convolution has
    none: ResNet-50 then has 28.09M parameters, 28.07M without biases.

    Attributes:
      reduction: r; ``c / r`` is rounded down.
      norm: not used.
      dtype: of the activations; means are float32.

    Raises:
      ValueError: at the call, where ``reduction`` is larger than the channels.

    References:
      Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, eq. 1 to 3, https://arxiv.org/abs/1807.06521
    """

    reduction: int = 16
    norm: ModuleDef | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*b, h, w, c)`` -> ``(*b, h, w, c)``."""
        channels = x.shape[-1]
        reduced = reduced_channels(channels, self.reduction)
        seen = jnp.concatenate([_mean(x), jnp.max(x, axis=(-3, -2), keepdims=True)], axis=-3)
        y = nn.relu(nn.Dense(reduced, dtype=self.dtype, name="reduce")(seen))
        y = nn.Dense(channels, dtype=self.dtype, name="expand")(y)
        x = x * nn.sigmoid(jnp.sum(y, axis=-3, keepdims=True)).astype(x.dtype)
        seen = jnp.concatenate([_mean(x, axis=-1), jnp.max(x, axis=-1, keepdims=True)], axis=-1)
        y = nn.Conv(1, (7, 7), use_bias=False, dtype=self.dtype, name="spatial")(seen)
        return x * nn.sigmoid(y).astype(x.dtype)


def reduced_channels(channels: int, reduction: int) -> int:
    """``channels / reduction``, rounded down.

    Raises:
      ValueError: nothing is left, or the ratio is below 1.
    """
    if reduction < 1:
        raise ValueError(f"reduction={reduction} must be at least 1")
    if reduction > channels:
        raise ValueError(
            f"reduction={reduction} is larger than the {channels} channels it divides: use at most {channels}"
        )
    return channels // reduction


def check_extent(extent: int) -> None:
    """Checks an extent ratio of `GatherExcite` by itself, without a map.

    Raises:
      ValueError: it is neither 0 nor a power of two from 2 on.
    """
    if not isinstance(extent, int) or extent < 0 or extent == 1 or extent & (extent - 1):
        below = 1 << (extent.bit_length() - 1) if isinstance(extent, int) and extent > 2 else 2
        raise ValueError(
            f"extent={extent!r} must be 0 (the whole map) or a power of two from 2 on: use {below} or {2 * below}"
        )


def _given(norm: ModuleDef | None, what: str) -> ModuleDef:
    if norm is None:
        raise ValueError(
            f"{what} normalises and norm is None: give a normalisation, such as "
            "partial(flax.linen.BatchNorm, use_running_average=not train)"
        )
    return norm


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _mean(x: jax.Array, axis: int | tuple[int, ...] = (-3, -2)) -> jax.Array:
    """The mean in float32 and back, axes kept."""
    return jnp.mean(x.astype(_wide(x)), axis=axis, keepdims=True).astype(x.dtype)
