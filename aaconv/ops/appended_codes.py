r"""Relative attention as plain dot-product attention of wider queries and keys, for flash-attention kernels.

The relative logit of a query towards a key is one number for the key's row plus one for its column
(`aaconv.ops.relative.axis_logits`). So with those numbers appended to the queries, and to the keys one-hot
codes that pick them,

.. math:: q_i' = [q_i, b^H_{i, 0..H-1}, b^W_{i, 0..W-1}], \qquad k_j' = [k_j, 1_{j_y}, 1_{j_x}],

:math:`q_i' \cdot k_j' = q_i \cdot k_j + b^H_{i, j_y} + b^W_{i, j_x}` is eq. 3 of Bello et al. exactly, and any
kernel for softmax(Q K^T) V serves, forward and backward, without knowing of positions. Its own VJP gives the
gradients of q' and k', and XLA's those of the tables through `axis_logits`.

The price is depth: :math:`d + H + W` in place of d. Kernels bound it, see `reason_not_cudnn`.

The axis logits are rounded to the inputs' dtype when they are appended. In bfloat16 that adds, for d = 20 and
28x28, a relative error of 1e-4 to 6e-4 to the outputs where relative logits are smaller than content logits, and
3e-3 where they are as large; having queries and keys in bfloat16 at all costs 3e-3, and 3.4e-3. Two codes a
position, for a high and a low half, would make it 5e-6 at twice the codes' depth, so the logits are not split.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import core, export, lax

from aaconv.ops import relative

# Appended to the queries, and its negative to a key that only fills up: a logit of -2^30 before scaling,
# and both factors fit float16.
_FLAG = 2.0**15

# Tokamax's kernel for Hopper multiplies at most 256 columns at once in its backward pass; its Triton kernels
# round the depth up to a power of two.
_TOKAMAX_DEPTH = 256


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel: Sequence[jax.Array] | None,
    scale: float | jax.Array,
    *,
    spatial_ndim: int,
    precision: lax.PrecisionLike = None,
    blocks: object | None = None,
    kernel: str = "cudnn",
) -> jax.Array:
    """Relative attention through a flash-attention kernel. Linear memory, but for ``kernel="xla"``.

    On a mesh jax splits cuDNN's call over batch and heads by itself. XLA would gather the whole batch for
    tokamax's, which is to be called within ``jax.shard_map(..., check_vma=False)``.

    Args:
      q, k, v, rel, spatial_ndim: as in `aaconv.ops.relative_attention`, which has checked them.
      scale: a positive number goes to the kernel, which multiplies float32 logits by it. Anything else, such as
        a traced array, multiplies the queries, which rounds them once more.
      precision: of the products that make the axis logits; cuDNN's own are always of the inputs' dtype with
        float32 sums.
      blocks: not used, the kernels choose their own.
      kernel: ``cudnn`` (NVIDIA's, through jax), ``tokamax`` (its kernels on a GPU, its plain form elsewhere), or
        ``xla``: what cuDNN is given, computed plainly with all logits in memory, to check values.

    Returns:
      ``(*b, *space, n, e)`` in q's dtype.

    Raises:
      NotImplementedError: from the kernel; `reason_not_cudnn` and `reason_not_tokamax` say it beforehand.
    """
    del blocks
    e = v.shape[-1]
    if 0 in v.shape:
        return jnp.zeros(v.shape, q.dtype)
    size = math.prod(relative.spatial_shape(q, spatial_ndim))
    fixed = None if isinstance(scale, core.Tracer) else float(scale)
    if fixed is not None and not fixed > 1e-6:  # it would lift what keeps a filling key from having weight
        fixed = None
    inputs = append_codes(
        q,
        k,
        v,
        rel,
        scale if fixed is None else None,
        spatial_ndim=spatial_ndim,
        precision=precision,
        **_FORMS[kernel],
    )
    out = _KERNELS[kernel](*inputs, scale=1.0 if fixed is None else fixed, precision=precision)
    return out[:, :size, :, :e].reshape(v.shape)


def append_codes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel: Sequence[jax.Array] | None,
    scale: float | jax.Array | None = None,
    *,
    spatial_ndim: int,
    depth_multiple: int = 8,
    equal_depths: bool = True,
    even_length: bool = True,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values whose plain dot-product attention is the relative attention of q, k, v and rel.

    Args:
      q, k, v, rel, spatial_ndim: as in `aaconv.ops.relative_attention`, which has checked them.
      scale: multiplies the queries in float32 before they are rounded; None leaves scaling to the kernel.
      depth_multiple: both depths are filled up with zeros to a multiple of this.
      equal_depths: whether queries and values are to be as deep as each other.
      even_length: whether to append a position to an odd number of them. As a key it has no weight, as a query
        its result is to be cut off.
      precision: of the products that make the axis logits.

    Returns:
      q' and k' ``(B, T, n, depth)`` and v' ``(B, T, n, depth_v)`` in the inputs' dtypes: the layout of
      `jax.nn.dot_product_attention`, with B the product of the batch axes and T = h * w, row by row.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = jnp.ones((2, 7, 7, 1, 20))
      >>> v = jnp.ones((2, 7, 7, 1, 4))
      >>> [x.shape for x in append_codes(q, k, v, (jnp.ones((13, 20)), jnp.ones((13, 20))), spatial_ndim=2)]
      [(2, 50, 1, 40), (2, 50, 1, 40), (2, 50, 1, 40)]

    References:
      Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, eq. 3 and 4,
      https://arxiv.org/abs/1904.09925
    """
    space = relative.spatial_shape(q, spatial_ndim)
    size, n = math.prod(space), q.shape[-2]
    batch = math.prod(q.shape[: q.ndim - 2 - spatial_ndim])
    flat = lambda x: x.reshape(batch, size, n, x.shape[-1])
    queries, keys = [flat(q)], [flat(k)]
    zero = jnp.zeros_like(keys[0][..., :1])  # what is added to it is sharded as the keys are
    if rel is not None:
        for axis, logits in enumerate(relative.axis_logits(q, rel, spatial_ndim=spatial_ndim, precision=precision)):
            if space[axis] > 1:  # on an axis of one position all keys have the same logit
                code = _one_hot(space, axis, k.dtype).reshape(1, size, 1, space[axis])
                if q.dtype == jnp.float16:
                    # It ends at 65504, and infinity times a code's zero would be NaN for every key: taken below their
                    # largest, which the softmax does not notice.
                    logits = logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
                    logits = jnp.maximum(logits, float(jnp.finfo(q.dtype).min))
                queries.append(flat(logits))
                keys.append(zero + code)
    if scale is not None:
        queries = [x.astype(relative.logits_dtype(q.dtype)) * scale for x in queries]
    wide_q = jnp.concatenate([x.astype(q.dtype) for x in queries], axis=-1)
    wide_k = jnp.concatenate(keys, axis=-1)
    values = flat(v)
    if even_length and size % 2:
        wide_q, wide_k, values, zero = (_fill(x, 1, size + 1) for x in (wide_q, wide_k, values, zero))
        filling = (jnp.arange(size + 1) == size).reshape(1, size + 1, 1, 1)
        wide_q = jnp.concatenate([wide_q, zero + _FLAG], axis=-1)
        wide_k = jnp.concatenate([wide_k, jnp.where(filling, -_FLAG, zero)], axis=-1)
    depth, depth_v = (-(-x.shape[-1] // depth_multiple) * depth_multiple for x in (wide_q, values))
    if equal_depths:
        depth = depth_v = max(depth, depth_v)
    return _fill(wide_q, -1, depth), _fill(wide_k, -1, depth), _fill(values, -1, depth_v)


def reason_not_cudnn(
    shape: Sequence[int],
    e: int,
    dtype: jnp.dtype,
    *,
    spatial_ndim: int = 2,
    positions: bool = True,
    compute_capability: tuple[int, int] | None = None,
) -> str | None:
    """Says why cuDNN's flash attention cannot serve, or returns None if it can.

    The limits are those of `jax.nn.dot_product_attention` (fused_attention_stablehlo.py, check_layout and
    check_is_flash_attention, jax 0.10 to 0.12) and of cuDNN's backward pass, whose depth is at most 128, and 256
    on Hopper (https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html for 9.18, and
    what 9.28 says when it is asked). jax allows 256 on newer GPUs too, where the forward pass alone has it.

    Args:
      shape: of the queries, ``(*b, *space, n, d)``; ``*b`` may be left out.
      e: depth of the values.
      dtype: of queries, keys and values.
      spatial_ndim: number of spatial axes.
      positions: whether there are tables.
      compute_capability: of the GPU, such as ``(9, 0)`` for Hopper; None for the one that jax runs on.
    """
    reason, capability = _no_gpu("cuDNN's flash attention", shape, compute_capability)
    if reason:
        return reason
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    limit = 256 if capability[0] == 9 else 128
    return _too_deep(
        "cudnn",
        shape,
        e,
        spatial_ndim,
        positions,
        limit,
        f"cuDNN's backward pass takes 128, and 256 on compute capability 9.x; this is {_dotted(capability)}",
    )


def reason_not_tokamax(
    shape: Sequence[int],
    e: int,
    dtype: jnp.dtype,
    *,
    spatial_ndim: int = 2,
    positions: bool = True,
    compute_capability: tuple[int, int] | None = None,
) -> str | None:
    """Says why tokamax cannot serve, or returns None if it can. Arguments as in `reason_not_cudnn`."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed: pip install 'aaconv[tokamax]' (Python 3.12)"
    reason, _ = _no_gpu("tokamax", shape, compute_capability)
    if reason:
        return reason
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"tokamax takes bfloat16, float16 and float32, not {jnp.dtype(dtype).name}"
    return _too_deep("tokamax", shape, e, spatial_ndim, positions, _TOKAMAX_DEPTH, f"tokamax takes {_TOKAMAX_DEPTH}")


def _no_gpu(what, shape, capability) -> tuple[str | None, tuple[int, int]]:
    """What keeps every GPU kernel from serving, and the compute capability."""
    found = capability or _compute_capability()
    if found is None:
        return f"{what} runs on NVIDIA GPUs, and jax runs on {jax.local_devices()[0].device_kind} here", (0, 0)
    if found < (8, 0):
        return f"{what} needs compute capability 8.0 or later, and this GPU has {_dotted(found)}", found
    if any(export.is_symbolic_dim(x) for x in shape):
        return f"{what} needs numbers for all sizes, and q has shape ({', '.join(map(str, shape))})", found
    return None, found


def _too_deep(kernel, shape, e, spatial_ndim, positions, limit, source) -> str | None:
    space, d = tuple(shape[-2 - spatial_ndim : -2]), shape[-1]
    form = _FORMS[kernel]
    parts = [d, *(size for size in space if positions and size > 1)]
    if form["even_length"] and math.prod(space) % 2:
        parts.append(1)
    depth = max(sum(parts), e)
    if -(-depth // form["depth_multiple"]) * form["depth_multiple"] <= limit:
        return None
    if e > sum(parts):
        return f"values are e={e} deep, and {source}"
    return f"queries with their codes are {' + '.join(map(str, parts))} = {depth} deep, and {source}"


def _compute_capability() -> tuple[int, int] | None:
    """Of the first local device, or None if that is no NVIDIA GPU (AMD's have names in its place)."""
    numbers = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and all(map(str.isdigit, numbers)) else None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _one_hot(space: tuple[int, ...], axis: int, dtype) -> jax.Array:
    """``(*space, size)``: every position's code for one axis."""
    shape = (*space, space[axis])
    here, code = (lax.broadcasted_iota(jnp.int32, shape, which) for which in (axis, len(space)))
    return (here == code).astype(dtype)


def _fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind ``x`` up to ``size`` along ``axis``."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, width)


def _xla(q, k, v, *, scale, precision):
    # Not jax's own plain form, whose softmax is float32 for float64 too and which a CPU cannot compile in float16.
    dtype = relative.logits_dtype(q.dtype)
    logits = jnp.einsum("btnd,bsnd->bnts", q, k, precision=precision, preferred_element_type=dtype)
    weights = jax.nn.softmax(logits * scale, axis=-1)
    return jnp.einsum("bnts,bsne->btne", weights.astype(v.dtype), v, precision=precision)


def _cudnn(q, k, v, *, scale, precision):
    del precision
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")


def _tokamax(q, k, v, *, scale, precision):
    tokamax = importlib.import_module("tokamax")  # an extra: neither linters nor type checkers find it installed
    capability = _compute_capability()
    if capability is None:
        implementation = ("xla",)
    elif capability[0] in (9, 10):
        implementation = ("mosaic", "triton")  # the first that takes the dtype
    else:
        implementation = ("triton",)  # its Mosaic kernel for older GPUs has no backward pass
    return tokamax.dot_product_attention(q, k, v, scale=scale, precision=precision, implementation=implementation)


_KERNELS: dict[str, Callable[..., jax.Array]] = {
    "cudnn": _cudnn,
    "tokamax": _tokamax,
    "xla": _xla,
}

# jax refuses an odd length to cuDNN's backward pass (it takes an absent bias for a bias, for which cuDNN does).
_CUDNN_FORM = {"depth_multiple": 8, "equal_depths": True, "even_length": True}
_FORMS = {
    "cudnn": _CUDNN_FORM,
    "tokamax": {"depth_multiple": 8, "equal_depths": False, "even_length": False},
    "xla": _CUDNN_FORM,
}
