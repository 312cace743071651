"""Position encodings as Flax modules and functions: what tells attention where things are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.errors import close_matches
from aaconv.ops import position

POSITION_ENCODINGS = ("relative", "none", "sinusoid", "coordconv")
LARGER_MAPS = ("raise", "interpolate", "clip")

_AXIS_NAMES = {1: ("w",), 2: ("h", "w"), 3: ("d", "h", "w")}


def check_position_encoding(name: str) -> str:
    """Returns ``name`` if it is one of `POSITION_ENCODINGS`.

    Raises:
      ValueError: it is not; the message lists the known ones.
    """
    if name not in POSITION_ENCODINGS:
        raise ValueError(
            f"position_encoding={name!r} is not one of {', '.join(POSITION_ENCODINGS)}"
            f"{close_matches(name, POSITION_ENCODINGS)}"
        )
    return name


def encode_input(x: jax.Array, encoding: str, *, spatial_ndim: int = 2) -> jax.Array:
    """Adds what an absolute encoding adds to the input of attention.

    Args:
      x: ``(*b, h, w, c)``.
      encoding: one of `POSITION_ENCODINGS`. ``sinusoid`` is added to the channels, ``coordconv``
        appends a coordinate channel an axis and their radius, the others leave ``x`` as it is.
      spatial_ndim: number of spatial axes.

    Returns:
      ``(*b, h, w, c)``, or ``(*b, h, w, c + 3)`` for ``coordconv`` on images.
    """
    check_position_encoding(encoding)
    space = x.shape[-1 - spatial_ndim : -1]
    if encoding == "sinusoid":
        code = position.sinusoid(space, x.shape[-1], dtype=x.dtype)
        return x + jnp.broadcast_to(code, x.shape)
    if encoding == "coordconv":
        code = position.coordinates(space, dtype=x.dtype)
        code = jnp.broadcast_to(code, (*x.shape[: -1 - spatial_ndim], *code.shape))
        return jnp.concatenate([x, code], axis=-1)
    return x


class RelativePosition(nn.Module):
    """The relative-position tables of one layer: an embedding for each offset along each axis.

    The tables are made for the map that the layer is initialised with, ``2 * size - 1`` rows an axis,
    and serve other sizes at call: a smaller map takes the middle rows, which are its offsets exactly;
    a larger one does as ``larger_maps`` says. The parameters never change their size.

    Attributes:
      depth: key depth a head, ``d``.
      larger_maps: ``"raise"``: an error that names both sizes. ``"interpolate"``: rows are interpolated
        linearly so that the outermost offsets of both maps meet. ``"clip"``: offsets beyond the table
        use its outermost row (Shaw et al. 2018, 3.2).
      param_dtype: of the tables.
      table_init: of the tables; default normal with mean 0 and deviation ``depth ** -0.5``.

    References:
      Bello et al. 2019, 3.2: tables shared across heads, not across layers.
    """

    depth: int
    larger_maps: str = "raise"
    param_dtype: Any = jnp.float32
    table_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, shape: Sequence[int]) -> tuple[jax.Array, ...]:
        """Returns tables ``(2 * size - 1, depth)`` for a map of spatial ``shape``, in axis order."""
        if self.larger_maps not in LARGER_MAPS:
            raise ValueError(
                f"larger_maps={self.larger_maps!r} is not one of {', '.join(LARGER_MAPS)}"
                f"{close_matches(self.larger_maps, LARGER_MAPS)}"
            )
        init = self.table_init or nn.initializers.normal(self.depth**-0.5)
        names = _AXIS_NAMES.get(len(shape), tuple(map(str, range(len(shape)))))
        tables = []
        for axis, size in zip(names, shape, strict=True):
            name = f"rel_{axis}"
            rows = 2 * size - 1
            if self.has_variable("params", name):
                rows = nn.meta.unbox(self.get_variable("params", name)).shape[0]
            tables.append(self.param(name, init, (rows, self.depth), self.param_dtype))
        made_for = tuple((t.shape[0] + 1) // 2 for t in tables)
        if self.larger_maps == "raise" and any(s > m for s, m in zip(shape, made_for, strict=True)):
            raise ValueError(
                f"the map to attend over is {tuple(shape)} and the relative-position tables were made for "
                f"{made_for}: a table has no rows for the larger offsets. Initialise with the largest size, or set "
                "larger_maps='interpolate' or larger_maps='clip'"
            )
        return tuple(
            resize_table(table, size, larger_maps=self.larger_maps) for table, size in zip(tables, shape, strict=True)
        )


def resize_table(table: jax.Array, size: int, *, larger_maps: str = "interpolate") -> jax.Array:
    """A table for an axis of ``size`` positions, from one made for another size.

    Args:
      table: ``(2 * m - 1, d)``, row ``offset + m - 1``.
      size: positions along the axis now.
      larger_maps: ``interpolate`` or ``clip``, for ``size > m``; a smaller axis takes the middle rows.

    Returns:
      ``(2 * size - 1, d)``.

    Example:
      >>> import jax.numpy as jnp
      >>> resize_table(jnp.arange(5.0)[:, None], 2)[:, 0]
      Array([1., 2., 3.], dtype=float32)
    """
    made_for = (table.shape[0] + 1) // 2
    if size <= made_for:
        return table[made_for - size : made_for + size - 1]
    if larger_maps == "clip":
        extra = size - made_for
        return jnp.pad(table, ((extra, extra), (0, 0)), mode="edge")
    rows = 2 * size - 1
    at = jnp.linspace(0.0, table.shape[0] - 1.0, rows)
    below = jnp.clip(jnp.floor(at).astype(int), 0, max(table.shape[0] - 2, 0))
    above = jnp.minimum(below + 1, table.shape[0] - 1)
    share = (at - below)[:, None].astype(table.dtype)
    return table[below] * (1 - share) + table[above] * share
