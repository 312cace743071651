r"""Multi-head self-attention over space with relative positions, as one pure function.

Letters as in `aaconv.ops.relative`, and ``e`` the value depth a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from aaconv.ops import blockwise, mesh, relative
from aaconv.ops.blocks import BlockSizes
from aaconv.ops.choice import check_name, choose_implementation, device_of


def relative_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel: Sequence[jax.Array] | None,
    *,
    spatial_ndim: int = 2,
    scale: float | jax.Array | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    r"""Attention of every position to every position of the same map, with relative logits.

    .. math:: o_i = \sum_j \mathrm{softmax}_j\big(\mathrm{scale}\,
              (q_i^\top k_j + q_i^\top r^H_{j_y - i_y} + q_i^\top r^W_{j_x - i_x})\big)\, v_j

    Pure, compiled, differentiable in every array (forward mode needs an implementation that holds the whole
    maps, such as ``factorised``). The softmax and its logits are float32 at least
    (float64 under x64); the matrix products take the inputs' dtype.

    On a mesh with an axis called ``spatial`` each device attends from its rows of the map, the first of the spatial
    axes, to all of it, in ``blockwise`` and ``pallas_tpu``; see `aaconv.ops.mesh`. The others leave that to the
    compiler.

    Args:
      q: queries ``(*b, h, w, n, d)``; ``*b`` any batch shape, ``n`` heads.
      k: keys ``(*b, h, w, n, d)``.
      v: values ``(*b, h, w, n, e)``; ``e`` need not equal ``d``.
      rel: tables ``(rel_h, rel_w)`` in axis order, ``(2 * size - 1, d)`` each, shared by the heads; row
        ``offset + size - 1`` serves ``offset = key - query``. None for attention without positions.
      spatial_ndim: number of spatial axes: 1 for signals, 2 for images, 3 for volumes and video.
      scale: multiplies content and relative logits alike; default :math:`d^{-1/2}`.
      implementation: a name from `IMPLEMENTATIONS`, or None to have it chosen by platform, shape and
        dtype, see `choose_implementation`.
      block_sizes: overrides the block sizes of those that work in blocks, see `BlockSizes`.
      precision: of the matrix products, see `jax.lax.Precision`.

    Returns:
      ``(*b, h, w, n, e)`` in the inputs' dtype.

    Raises:
      ValueError: shapes, dtypes, tables or block sizes do not fit, or the name is unknown.
      NotImplementedError: the named implementation cannot serve on this platform or for this shape or
        dtype; the message says why.

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
    rel = check_inputs(q, k, v, rel, spatial_ndim)
    if not isinstance(block_sizes, BlockSizes | None):
        raise ValueError(f"block_sizes={block_sizes!r} must be a BlockSizes, such as BlockSizes(query=128), or None")
    platform, device_kind = device_of(q)
    name = choose_implementation(
        q.shape,
        v.shape[-1],
        q.dtype,
        spatial_ndim=spatial_ndim,
        positions=rel is not None,
        implementation=implementation,
        platform=platform,
        device_kind=device_kind,
        precision=precision,
    ).implementation
    if implementation is not None and block_sizes is not None:
        block_sizes.check_used(implementation)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif jnp.shape(scale):
        raise ValueError(f"scale has shape {jnp.shape(scale)}: it must be one number; multiply q by anything else")
    if name in ("cudnn", "tokamax") and mesh.row_devices(q, spatial_ndim) > 1:
        raise NotImplementedError(
            f"implementation={name!r} cannot serve here: rows of the map are divided over devices, and it takes as "
            "many queries as keys; leave the name out"
        )
    if name not in ("blockwise", "pallas_tpu", "pallas_tpu_interpret"):
        q, k, v = mesh.whole_space(spatial_ndim, q, k, v)
    if name in relative.FORMS:
        return _attend(q, k, v, rel, scale, spatial_ndim=spatial_ndim, form=name, precision=precision)
    if name == "blockwise":
        kind = platform if platform in blockwise.TILE else "gpu"
        return blockwise.attend(
            q, k, v, rel, scale, spatial_ndim=spatial_ndim, precision=precision, blocks=block_sizes, platform=kind
        )
    # A number is the kernel's own constant; an array multiplies the queries before it.
    attend = _kernel(name, isinstance(scale, int | float))
    return attend(q, k, v, rel, scale=scale, spatial_ndim=spatial_ndim, precision=precision, blocks=block_sizes)


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
      q, k, rel, spatial_ndim, scale, precision: as in `relative_attention`.
      implementation: as there; one that never holds the maps gives way to ``factorised``.

    Returns:
      ``(*b, n, h, w, h, w)``, query position before key position, in float32 or wider; it sums to 1
      over the key axes.

    Example:
      >>> import jax.numpy as jnp
      >>> attention_weights(jnp.ones((4, 5, 2, 8)), jnp.ones((4, 5, 2, 8)), None).shape
      (2, 4, 5, 4, 5)
    """
    rel = check_inputs(q, k, k, rel, spatial_ndim)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    space = relative.spatial_shape(q, spatial_ndim)
    check_name(implementation)
    form = implementation if implementation in relative.FORMS else "factorised"
    weights = _weights(q, k, rel, scale, spatial_ndim=spatial_ndim, form=form, precision=precision)
    return weights.reshape(*weights.shape[:-2], *space, *space)


@functools.cache
def _kernel(name: str, number: bool) -> Callable[..., jax.Array]:
    """The compiled kernel; imported when it is used, `import aaconv` needs none of them."""
    if name.startswith("pallas_tpu"):
        from aaconv.ops import pallas_tpu

        attend = functools.partial(pallas_tpu.attend, interpret=name == "pallas_tpu_interpret")
    else:
        from aaconv.ops import appended_codes

        attend = functools.partial(appended_codes.attend, kernel="xla" if name == "appended_codes" else name)
    return jax.jit(attend, static_argnames=("spatial_ndim", "precision", "blocks", *(("scale",) if number else ())))


def check_inputs(q, k, v, rel, spatial_ndim) -> tuple[jax.Array, ...] | None:
    """Returns the tables after checking that shapes and dtypes fit each other.

    Raises:
      ValueError: naming those that do not.
    """
    relative.check_arrays({"q": q, "k": k, "v": v}, floating=False)
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
    wide = relative.logits_dtype(q.dtype)
    scale = jnp.asarray(scale, wide)
    # On the queries where that rounds nothing twice: the logits need not be kept for the scale's gradient.
    if q.dtype == wide:
        q, scale = q * scale, None
    q_flat, k_flat = (_heads_first(x, size, spatial_ndim) for x in (q, k))
    logits = jnp.einsum("...qd,...kd->...qk", q_flat, k_flat, precision=precision, preferred_element_type=wide)
    if rel is not None:
        logits = logits + relative.relative_logits(q, rel, spatial_ndim=spatial_ndim, form=form, precision=precision)
    return jax.nn.softmax(logits if scale is None else logits * scale, axis=-1)


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
