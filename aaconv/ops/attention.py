r"""Multi-head self-attention over space with relative positions, as one pure function.

Letters as in `aaconv.ops.relative`, and ``e`` the value depth a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from aaconv.errors import close_matches
from aaconv.ops import relative

IMPLEMENTATIONS: dict[str, str] = {
    "factorised": "relative logits as H + W numbers a query, added to the content logits by broadcasting",
    "skew": "the paper's own algorithm: relative logits by padding and reshaping (appendix of Bello et al.)",
    "explicit": "one relative embedding for each pair of positions, (HW)^2 d of them (Shaw et al. 2018)",
}
"""What ``relative_attention(..., implementation=)`` knows, and how each does it."""

DEFAULT_IMPLEMENTATION = "factorised"


def relative_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel: Sequence[jax.Array] | None,
    *,
    spatial_ndim: int = 2,
    scale: float | jax.Array | None = None,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    r"""Attention of every position to every position of the same map, with relative logits.

    .. math:: o_i = \sum_j \mathrm{softmax}_j\big(\mathrm{scale}\,
              (q_i^\top k_j + q_i^\top r^H_{j_y - i_y} + q_i^\top r^W_{j_x - i_x})\big)\, v_j

    Pure, compiled, differentiable in every argument. The softmax and its logits are float32 at least
    (float64 under x64); the matrix products take the inputs' dtype.

    Args:
      q: queries ``(*b, h, w, n, d)``; ``*b`` any batch shape, ``n`` heads.
      k: keys ``(*b, h, w, n, d)``.
      v: values ``(*b, h, w, n, e)``; ``e`` need not equal ``d``.
      rel: tables ``(rel_h, rel_w)`` in axis order, ``(2 * size - 1, d)`` each, shared by the heads; row
        ``offset + size - 1`` serves ``offset = key - query``. None for attention without positions.
      spatial_ndim: number of spatial axes: 1 for signals, 2 for images, 3 for volumes and video.
      scale: multiplies content and relative logits alike; default :math:`d^{-1/2}`.
      implementation: a name from `IMPLEMENTATIONS`, or None for the default, ``factorised``.
      precision: of the matrix products, see `jax.lax.Precision`.

    Returns:
      ``(*b, h, w, n, e)`` in the inputs' dtype.

    Raises:
      ValueError: shapes, dtypes or tables do not fit each other, or the name is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = jnp.ones((2, 4, 5, 1, 8))
      >>> v = jnp.ones((2, 4, 5, 1, 3))
      >>> relative_attention(q, k, v, (jnp.ones((7, 8)), jnp.ones((9, 8)))).shape
      (2, 4, 5, 1, 3)

    References:
      Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, eq. 1, 3 and 4,
      https://arxiv.org/abs/1904.09925
    """
    rel = _check(q, k, v, rel, spatial_ndim)
    form = implementation_for(implementation)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _attend(q, k, v, rel, scale, spatial_ndim=spatial_ndim, form=form, precision=precision)


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    rel: Sequence[jax.Array] | None,
    *,
    spatial_ndim: int = 2,
    scale: float | jax.Array | None = None,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """The attention maps that `relative_attention` averages the values with, to look at.

    Args:
      q, k, rel, spatial_ndim, scale, implementation, precision: as in `relative_attention`.

    Returns:
      ``(*b, n, h, w, h, w)``, query position before key position, in float32 or wider; it sums to 1
      over the key axes.

    Example:
      >>> import jax.numpy as jnp
      >>> attention_weights(jnp.ones((4, 5, 2, 8)), jnp.ones((4, 5, 2, 8)), None).shape
      (2, 4, 5, 4, 5)
    """
    rel = _check(q, k, k, rel, spatial_ndim)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    space = relative.spatial_shape(q, spatial_ndim)
    form = implementation_for(implementation)
    weights = _weights(q, k, rel, scale, spatial_ndim=spatial_ndim, form=form, precision=precision)
    return weights.reshape(*weights.shape[:-2], *space, *space)


def implementation_for(implementation: str | None) -> str:
    """Returns the name of the implementation that will run, resolving None."""
    if implementation is None:
        return DEFAULT_IMPLEMENTATION
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
            f"{close_matches(implementation, IMPLEMENTATIONS)}"
        )
    return implementation


def _check(q, k, v, rel, spatial_ndim) -> tuple[jax.Array, ...] | None:
    relative.spatial_shape(q, spatial_ndim)
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or v.shape[-1] == 0:
        raise ValueError(
            f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}: k must equal q, and v may differ "
            "from them in its last axis only, which must not be empty"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: cast them to one floating dtype first")
    if rel is None:
        return None
    rel = tuple(rel)
    relative.check_tables(q, rel, spatial_ndim)
    return rel


@functools.partial(jax.jit, static_argnames=("spatial_ndim", "form", "precision"))
def _weights(q, k, rel, scale, *, spatial_ndim, form, precision):
    """Softmax weights ``(*b, n, q, k)``, float32 at least."""
    size = math.prod(relative.spatial_shape(q, spatial_ndim))
    q_flat, k_flat = (_heads_first(x, size, spatial_ndim) for x in (q, k))
    logits = jnp.einsum(
        "...qd,...kd->...qk",
        q_flat,
        k_flat,
        precision=precision,
        preferred_element_type=relative.logits_dtype(q.dtype),
    )
    if rel is not None:
        logits = logits + relative.relative_logits(q, rel, spatial_ndim=spatial_ndim, form=form, precision=precision)
    # The scale goes on the float32 logits: on bfloat16 queries it would round a second time.
    return jax.nn.softmax(logits * jnp.asarray(scale, logits.dtype), axis=-1)


@functools.partial(jax.jit, static_argnames=("spatial_ndim", "form", "precision"))
def _attend(q, k, v, rel, scale, *, spatial_ndim, form, precision):
    space = relative.spatial_shape(q, spatial_ndim)
    weights = _weights(q, k, rel, scale, spatial_ndim=spatial_ndim, form=form, precision=precision)
    out = jnp.einsum(
        "...qk,...ke->...qe",
        weights.astype(v.dtype),
        _heads_first(v, math.prod(space), spatial_ndim),
        precision=precision,
    )
    out = out.reshape(*out.shape[:-2], *space, out.shape[-1])
    return jnp.moveaxis(out, -2 - spatial_ndim, -2)


def _heads_first(x: jax.Array, size: int, spatial_ndim: int) -> jax.Array:
    """``(*b, h, w, n, d)`` -> ``(*b, n, h * w, d)``: a transpose, not only a reshape."""
    *batch, n, d = x.shape[: x.ndim - 2 - spatial_ndim] + x.shape[-2:]
    return jnp.moveaxis(x.reshape(*batch, size, n, d), -2, -3)
