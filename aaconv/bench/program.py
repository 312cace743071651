"""One implementation at one shape: compiled, checked and ready to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aaconv import parallel
from aaconv.bench import ahead, reference
from aaconv.bench.timing import Job

CHECKED_QUERIES = 32
# What a right answer stays below: some hundred times the rounding of float32. Keys that were not masked miss by 0.24%.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}

Attend = Callable[..., Any]  # (q, k, v, rel_h, rel_w) -> out


@dataclasses.dataclass(frozen=True)
class Shape:
    """``B,n,H,W,d,e``: images, heads, height, width, key and value depth a head."""

    batch: int
    heads: int
    height: int
    width: int
    key_depth: int
    value_depth: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads ``4,8,28,28,20,4``.

        Raises:
          ValueError: it is not six whole numbers of at least 1.
        """
        numbers = text.replace(",", " ").split()
        if len(numbers) != 6 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(
                f"--shape {text!r} must be six whole numbers of at least 1, B,n,H,W,d,e: images, heads, height, width, "
                "key and value depth a head, e.g. 4,8,28,28,20,4"
            )
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return ",".join(map(str, dataclasses.astuple(self)))

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def arrays(self, *, heads_first: bool = False) -> tuple[tuple[int, ...], ...]:
        """Shapes of q, k, v, rel_h, rel_w and the cotangent.

        Args:
          heads_first: ``(b, n, h w, .)`` instead of a network's ``(b, h, w, n, .)``.
        """
        space = (self.batch, self.height, self.width, self.heads)
        if heads_first:
            space = (self.batch, self.heads, self.pixels)
        tables = ((2 * self.height - 1, self.key_depth), (2 * self.width - 1, self.key_depth))
        keys, values = (*space, self.key_depth), (*space, self.value_depth)
        return keys, keys, values, *tables, values


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random inputs, rounded to the dtype that is measured, and what is right for them.

    Attributes:
      arrays: q, k, v ``(b, h, w, n, .)`` and the two tables.
      cotangent: of the output, for the timed gradients.
      checked: a cotangent that is zero but at `queries` of the first image.
      queries: positions that are checked, row-major.
    """

    arrays: tuple[np.ndarray, ...]
    cotangent: np.ndarray
    checked: np.ndarray
    queries: np.ndarray

    @classmethod
    def draw(cls, shape: Shape, dtype: str, seed: int = 0) -> Inputs:
        """Draws inputs of deviation 1."""
        generator = np.random.default_rng(seed)
        draw = lambda size: generator.standard_normal(size, np.float32).astype(jnp.dtype(dtype))
        *arrays, cotangent = map(draw, shape.arrays())
        queries = np.sort(generator.permutation(shape.pixels)[:CHECKED_QUERIES])
        checked = np.zeros_like(cotangent)
        at = (0, queries // shape.width, queries % shape.width)
        checked[at] = cotangent[at]
        return cls(tuple(arrays), cotangent, checked, queries)

    def heads_first(self) -> Inputs:
        """Returns the same in the layout that peers take, ``(b, n, h w, .)``, contiguous."""
        q, k, v, *tables = self.arrays
        arrays = (*map(heads_first_of, (q, k, v)), *tables)
        return dataclasses.replace(self, arrays=arrays, cotangent=heads_first_of(self.cotangent))

    def expected(self) -> reference.Result:
        """Returns the right answer for the first image, in float64."""
        q, k, v, rel_h, rel_w = self.arrays
        cotangent = self._at_queries(self.checked[0])
        return reference.attend(q[0], k[0], v[0], rel_h, rel_w, cotangent, self.queries)

    def errors(self, found: Sequence[np.ndarray], expected: reference.Result) -> tuple[float, float]:
        """Compares an output and five gradients of the first image with `expected`.

        Returns:
          The largest error of the output, and the largest of the gradients', each as a share of the largest
          number in the array that should have come out; infinite where something is not finite.
        """
        out, *gradients = (np.asarray(x, np.float64) for x in found)
        pairs = [(self._at_queries(out), expected.out), *zip(gradients, expected[1:], strict=True)]
        errors = [float(np.max(np.abs(x - right)) / np.max(np.abs(right))) for x, right in pairs]
        errors = [error if np.isfinite(error) else np.inf for error in errors]
        return errors[0], max(errors[1:])

    def _at_queries(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, *values.shape[2:])[self.queries]


@dataclasses.dataclass(frozen=True)
class Program:
    """An implementation at a shape.

    Attributes:
      forward: computes the output.
      gradient: computes the gradients of all five inputs, which takes the forward pass too.
      check: from `Inputs.checked` to the output and the five gradients of the first image, ``(h, w, n, .)``.
      forward_bytes, gradient_bytes: measures temporary memory: what is allocated beside inputs and results. May run
        the program, once; None where it cannot be known.
    """

    forward: Job
    gradient: Job
    check: Callable[[np.ndarray], Sequence[np.ndarray]]
    forward_bytes: Callable[[], int | None]
    gradient_bytes: Callable[[], int | None]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What jax made of an implementation; executables are None where they do not fit the device."""

    forward: Any
    gradient: Any
    forward_needs: ahead.Needs
    gradient_needs: ahead.Needs
    heads_first: bool

    def program(self, inputs: Inputs, device: ahead.Device) -> Program:
        """Loads the inputs."""
        inputs = inputs.heads_first() if self.heads_first else inputs
        put = partial(jax.device_put, device=parallel.replicated(ahead.mesh_of(device)))
        arrays, cotangent = put(inputs.arrays), put(inputs.cotangent)
        pipelined = device.platform != "cpu"

        def check(checked: np.ndarray) -> Sequence[np.ndarray]:
            cotangent = heads_first_of(checked) if self.heads_first else checked
            gradients = self.gradient(put(cotangent), *arrays)
            *maps, rel_h, rel_w = jax.device_get([self.forward(*arrays), *gradients])
            first = [on_map(x[0], checked.shape[1:3]) if self.heads_first else x[0] for x in maps]
            return [*first, rel_h, rel_w]

        return Program(
            forward=Job(lambda: self.forward(*arrays), jax.block_until_ready, pipelined),
            gradient=Job(lambda: self.gradient(cotangent, *arrays), jax.block_until_ready, pipelined),
            check=check,
            forward_bytes=lambda: self.forward_needs.temporaries,
            gradient_bytes=lambda: self.gradient_needs.temporaries,
        )


def compile(attend: Attend, shape: Shape, dtype: str, device: ahead.Device, *, heads_first: bool = False) -> Compiled:
    """Compiles an implementation and its gradient for a device, which need not be here.

    Args:
      attend: a function of five arrays.
      shape: to compile for.
      dtype: of all of them.
      device: where they are.
      heads_first: whether it takes and gives `Inputs.heads_first`.

    Raises:
      NotImplementedError: the implementation cannot serve this shape, dtype or device.
    """
    mesh = ahead.mesh_of(device)
    sharding = parallel.replicated(mesh)
    *arrays, cotangent = (
        jax.ShapeDtypeStruct(x, jnp.dtype(dtype), sharding=sharding) for x in shape.arrays(heads_first=heads_first)
    )

    def gradient(cotangent, *arrays):
        return jax.vjp(attend, *arrays)[1](cotangent)

    with ahead.tracing_for(mesh):
        forward, forward_needs = ahead.account(jax.jit(attend).lower(*arrays).compile)
        backward, gradient_needs = ahead.account(jax.jit(gradient).lower(cotangent, *arrays).compile)
    return Compiled(forward, backward, forward_needs, gradient_needs, heads_first)


def on_map(x: np.ndarray, space: tuple[int, ...]) -> np.ndarray:
    """``(n, h w, d)`` of one image -> ``(h, w, n, d)``."""
    return np.moveaxis(x, 0, 1).reshape(*space, x.shape[0], x.shape[-1])


def heads_first_of(x: np.ndarray) -> np.ndarray:
    """``(b, h, w, n, d)`` -> ``(b, n, h w, d)``, contiguous."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return np.ascontiguousarray(np.moveaxis(x, 2, 1))
