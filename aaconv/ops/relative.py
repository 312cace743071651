r"""Relative-position logits in the forms of the literature.

For a query at position :math:`i` and a key at position :math:`j` of the same map, attention
augmented convolution adds to the content logit :math:`q_i^\top k_j` one term per spatial axis,

.. math:: s_{ij} = q_i^\top r^H_{j_y - i_y} + q_i^\top r^W_{j_x - i_x}

(Bello et al. 2019, eq. 3 and 4). The tables :math:`r` hold one row per offset ``key - query``, row
``offset + size - 1``, so a table for an axis of ``size`` positions has ``2 * size - 1`` rows.

Letters: ``*b`` leading batch, ``h w`` space (any number of axes; two are written), ``n`` heads,
``d`` key depth a head, ``q`` and ``k`` the flattened query and key positions, in row-major order.

No function here scales: multiply by :math:`d^{-1/2}` with the content logits, once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aaconv.errors import close_matches

_AXIS_LETTERS = "uvwxyz"  # spatial axes in einsum; d, n, k and b are taken


def axis_logits(
    q: jax.Array,
    rel: Sequence[jax.Array],
    *,
    spatial_ndim: int = 2,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, ...]:
    r"""The factorised form: for every query, one number per key row and one per key column.

    The relative logit of a query towards a key depends on the key's row through one table and on its
    column through the other, so all of them are sums of ``H + W`` numbers a query:
    :math:`b^H_{i, y} = q_i^\top r^H_{y - i_y}` and :math:`b^W_{i, x} = q_i^\top r^W_{x - i_x}`.
    Nothing of size :math:`(HW)^2` is formed.

    Args:
      q: queries ``(*b, h, w, n, d)``, not scaled.
      rel: tables ``(2 * h - 1, d)`` and ``(2 * w - 1, d)``, in axis order.
      spatial_ndim: number of spatial axes, 2 for images.
      precision: of the matrix products, see `jax.lax.Precision`.

    Returns:
      One array an axis, ``(*b, h, w, n, h)`` and ``(*b, h, w, n, w)``, in float32 or wider.

    Raises:
      ValueError: a table's rank, rows or depth do not fit ``q``.

    Example:
      >>> import jax.numpy as jnp
      >>> q = jnp.ones((2, 4, 5, 1, 8))
      >>> [b.shape for b in axis_logits(q, (jnp.ones((7, 8)), jnp.ones((9, 8))))]
      [(2, 4, 5, 1, 4), (2, 4, 5, 1, 5)]

    References:
      Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, eq. 3 and 4,
      https://arxiv.org/abs/1904.09925
    """
    shape = check_tables(q, rel, spatial_ndim)
    space = _AXIS_LETTERS[:spatial_ndim]
    return _axis_logits(q, rel, shape, f"...{space}nd", f"...{space}n", precision)


def relative_logits(
    q: jax.Array,
    rel: Sequence[jax.Array],
    *,
    spatial_ndim: int = 2,
    form: str = "factorised",
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    r"""Relative logits of every query towards every key, :math:`s_{ij}` of eq. 4 (S_H + S_W).

    Three forms that differ in what they store beside the result, and agree:

    ==============  ===========================================================  ===================
    form            how                                                          extra memory
    ==============  ===========================================================  ===================
    ``factorised``  `axis_logits`, added by broadcasting                         n HW (H + W)
    ``skew``        q times every row of a table, then a pad and a reshape that  n (HW)^2
                    turn offsets into positions (Music Transformer's skewing,
                    extended to several axes as the paper's listing does, which
                    then tiles every axis to a whole map)
    ``explicit``    one embedding r_ij for each pair (Shaw et al.)               (HW)^2 d
    ==============  ===========================================================  ===================

    Args:
      q: queries ``(*b, h, w, n, d)``, not scaled.
      rel: tables ``(2 * h - 1, d)`` and ``(2 * w - 1, d)``, in axis order.
      spatial_ndim: number of spatial axes, 2 for images.
      form: one of `FORMS`.
      precision: of the matrix products, see `jax.lax.Precision`.

    Returns:
      Logits ``(*b, n, q, k)`` with ``q = k = h * w``, in float32 or wider.

    Raises:
      ValueError: a table does not fit ``q``, or ``form`` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> relative_logits(jnp.ones((2, 4, 5, 1, 8)), (jnp.ones((7, 8)), jnp.ones((9, 8)))).shape
      (2, 1, 20, 20)

    References:
      Bello et al. 2019, eq. 4 and appendix; Huang et al., Music Transformer, ICLR 2019, 3.4;
      Shaw et al., Self-Attention with Relative Position Representations, NAACL 2018, eq. 4.
    """
    shape = check_tables(q, rel, spatial_ndim)
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not one of {', '.join(FORMS)}{close_matches(form, FORMS)}")
    # Heads before space: (*b, n, h, w, d).
    q = jnp.moveaxis(q, -2, -spatial_ndim - 2)
    return FORMS[form](q, rel, shape, precision)


def masked_relative_logits(q: jax.Array, table: jax.Array, *, precision: lax.PrecisionLike = None) -> jax.Array:
    r"""Music Transformer's masked one-dimensional form: keys at or before the query.

    :math:`s_{ij} = q_i^\top r_{j - i}` for :math:`j \le i`, by one pad and one reshape of
    :math:`Q R^\top`, which the two-dimensional ``skew`` form extends to both directions and axes.

    Args:
      q: queries ``(*b, l, n, d)``, not scaled.
      table: ``(l, d)``, row ``offset + l - 1`` for offsets ``-(l - 1) .. 0``: the first half of an
        unmasked table of ``2 * l - 1`` rows.
      precision: of the matrix product, see `jax.lax.Precision`.

    Returns:
      Logits ``(*b, n, l, l)`` in float32 or wider; 0 above the diagonal, where a causal mask must
      remove the whole logit.

    Raises:
      ValueError: the table's rank, rows or depth do not fit ``q``.

    Example:
      >>> import jax.numpy as jnp
      >>> masked_relative_logits(jnp.ones((1, 3, 1, 2)), jnp.arange(6.0).reshape(3, 2))[0, 0]
      Array([[9., 0., 0.],
             [5., 9., 0.],
             [1., 5., 9.]], dtype=float32)

    References:
      Huang et al., Music Transformer, ICLR 2019, 3.4.1, https://arxiv.org/abs/1809.04281
    """
    check_arrays({"q": q}, floating=False)
    check_arrays({"table": table})
    if q.ndim < 3:
        raise ValueError(f"q has shape {q.shape}: it must be (*b, l, n, d)")
    length, depth = q.shape[-3], q.shape[-1]
    if table.shape != (length, depth):
        raise ValueError(
            f"table has shape {table.shape} for l={length} queries of depth d={depth}: it must be "
            f"{(length, depth)}, one row for each offset from {1 - length} to 0"
        )
    q = jnp.moveaxis(q, -2, -3)
    by_offset = jnp.einsum(
        "...nid,rd->...nir",
        q,
        table.astype(q.dtype),
        precision=precision,
        preferred_element_type=logits_dtype(q.dtype),
    )
    # A column before, read again as (l + 1, l): row i moves left by l - 1 - i, the first row is spare.
    padded = jnp.pad(by_offset, [(0, 0)] * (q.ndim - 1) + [(1, 0)])
    skewed = padded.reshape(*padded.shape[:-2], length + 1, length)[..., 1:, :]
    return jnp.tril(skewed)


def logits_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of logits and softmax for inputs of ``dtype``: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def rows_by_query(table: jax.Array, size: int) -> jax.Array:
    """``(size + keys - 1, d)`` rows by offset -> ``(size, keys, d)`` rows by query, of ``size``, and key position."""
    query, key = jnp.arange(size), jnp.arange(len(table) + 1 - size)
    return table[key[None, :] - query[:, None] + size - 1]


def check_arrays(arrays: Mapping[str, Any], *, floating: bool = True) -> None:
    """Checks that what was given is arrays, and of floating-point numbers where that is not checked elsewhere.

    Raises:
      ValueError: naming the one that is not.
    """
    for name, array in arrays.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(f"{name} is of type {type(array).__name__}: it must be an array, as jnp.asarray makes one")
        if floating and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}: cast it to a floating dtype first")


def check_tables(q: jax.Array, rel: Sequence[jax.Array], spatial_ndim: int) -> tuple[int, ...]:
    """Returns the spatial shape of ``q`` after checking that every table covers its axis exactly."""
    shape = spatial_shape(q, spatial_ndim)
    if len(rel) != spatial_ndim:
        raise ValueError(
            f"rel holds {len(rel)} tables for spatial_ndim={spatial_ndim}: give one table an axis, in axis order"
        )
    check_arrays({f"rel[{axis}]": table for axis, table in enumerate(rel)})
    for axis, (table, size) in enumerate(zip(rel, shape, strict=True)):
        wanted = (2 * size - 1, q.shape[-1])
        if table.shape != wanted:
            raise ValueError(
                f"rel[{axis}] has shape {table.shape} for spatial axis {axis} of size {size} and key depth "
                f"{q.shape[-1]}: it must be {wanted}, one row for each offset from {1 - size} to {size - 1}"
            )
    return shape


def spatial_shape(q: jax.Array, spatial_ndim: int) -> tuple[int, ...]:
    """Returns the ``spatial_ndim`` axes of ``(*b, *space, n, d)``, none of which may be empty."""
    if not 1 <= spatial_ndim <= len(_AXIS_LETTERS):
        raise ValueError(f"spatial_ndim={spatial_ndim} must be between 1 and {len(_AXIS_LETTERS)}")
    if q.ndim < spatial_ndim + 2:
        raise ValueError(
            f"q has shape {q.shape}: with spatial_ndim={spatial_ndim} it needs at least {spatial_ndim + 2} axes, "
            "(*b, *space, n, d)"
        )
    shape = q.shape[-2 - spatial_ndim : -2]
    if 0 in shape or 0 in q.shape[-2:]:
        raise ValueError(f"q has shape {q.shape}: no axis of space, heads or depth may be empty")
    return shape


def add_axes(parts: Sequence[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Sums axis logits ``(*b, n, h, w, size)`` into ``(*b, n, h, w, h, w)`` by broadcasting."""
    ndim = len(shape)
    total = None
    for axis, part in enumerate(parts):
        keys = [1] * ndim
        keys[axis] = shape[axis]
        part = part.reshape(*part.shape[:-1], *keys)
        part = jnp.broadcast_to(part, (*part.shape[:-ndim], *shape))
        total = part if total is None else total + part
    assert total is not None
    return total


def _flat(logits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    batch = logits.shape[: logits.ndim - 2 * len(shape)]
    # One side at a time: on a mesh with explicit axes both at once are refused.
    return logits.reshape(*batch, size, *shape).reshape(*batch, size, size)


def _factorised(q, rel, shape, precision):
    space = _AXIS_LETTERS[: len(shape)]
    return _flat(add_axes(_axis_logits(q, rel, shape, f"...n{space}d", f"...n{space}", precision), shape), shape)


def _axis_logits(q, rel, shape, q_letters, out_letters, precision):
    """`axis_logits` for queries in any order of axes, e.g. heads first."""
    return tuple(
        jnp.einsum(
            f"{q_letters},{letter}kd->{out_letters}k",
            q,
            rows_by_query(table, size).astype(q.dtype),
            precision=precision,
            preferred_element_type=logits_dtype(q.dtype),
        )
        for letter, table, size in zip(_AXIS_LETTERS, rel, shape, strict=False)
    )


def _offsets_to_positions(logits: jax.Array) -> jax.Array:
    """``(..., s, 2 * s - 1)`` by offset -> ``(..., s, s)`` by key position (the paper's rel_to_abs)."""
    size = logits.shape[-2]
    lead = logits.shape[:-2]
    no_pad = [(0, 0)] * len(lead)
    logits = jnp.pad(logits, [*no_pad, (0, 0), (0, 1)]).reshape(*lead, 2 * size * size)
    logits = jnp.pad(logits, [*no_pad, (0, size - 1)]).reshape(*lead, size + 1, 2 * size - 1)
    return logits[..., :size, size - 1 :]


def _skew(q, rel, shape, precision):
    """The steps of the paper's listing, tiling and transposing included: the baseline of benchmarks."""
    ndim, lead = len(shape), q.ndim - 1 - len(shape)
    maps = []
    for axis, table in enumerate(rel):
        others = [a for a in range(ndim) if a != axis]
        by_offset = jnp.einsum(
            "...d,rd->...r",
            jnp.moveaxis(q, lead + axis, -2),  # the axis of this table next to the depth
            table.astype(q.dtype),
            precision=precision,
            preferred_element_type=logits_dtype(q.dtype),
        )
        by_position = _offsets_to_positions(by_offset)  # (*b, n, *others, here, there)
        sizes = [shape[a] for a in others]
        tiled = by_position.reshape(*by_position.shape[:-2], *[1] * len(others), *by_position.shape[-2:])
        tiled = jnp.tile(tiled, [*[1] * (lead + len(others)), *sizes, 1, 1])
        now = [*((a, "i") for a in others), *((a, "j") for a in others), (axis, "i"), (axis, "j")]
        order = [lead + now.index((a, side)) for side in "ij" for a in range(ndim)]
        maps.append(_flat(jnp.transpose(tiled, [*range(lead), *order]), shape))
    return functools.reduce(jnp.add, maps)


def _explicit(q, rel, shape, precision):
    ndim, depth = len(shape), q.shape[-1]
    pairs = jnp.zeros((*shape, *shape, depth), q.dtype)
    for axis, (table, size) in enumerate(zip(rel, shape, strict=True)):
        rows = rows_by_query(table.astype(q.dtype), size)
        keys = [1] * (2 * ndim)
        keys[axis] = keys[ndim + axis] = size
        pairs = pairs + jnp.broadcast_to(rows.reshape(*keys, depth), pairs.shape)
    size = math.prod(shape)
    return jnp.einsum(
        "...qd,qkd->...qk",
        q.reshape(*q.shape[: q.ndim - 1 - ndim], size, depth),
        pairs.reshape(size, size, depth),
        precision=precision,
        preferred_element_type=logits_dtype(q.dtype),
    )


FORMS: dict[str, Callable[..., jax.Array]] = {
    "factorised": _factorised,
    "skew": _skew,
    "explicit": _explicit,
}
"""The forms of `relative_logits`; each takes heads-first queries ``(*b, n, h, w, d)``."""
