"""The largest arrays of a program: which layer they belong to, and how many bytes they take."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from aaconv.bench import traffic

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# "  2.56GiB( 12%);    2.56GiB;   2754838528;       2; f32[168000,32,4], 2×f32[84000,4,2,32]"
_ALLOCATION = re.compile(r"^ *[\d.]+[KMGT]?i?B\([ \d]+%\); *([\d.]+)([KMGT]?i?B); *\d+; *\d+; (.*)$", re.MULTILINE)
_ARRAY = re.compile(r"(?:\d+×)?(\w+)\[([\d,]*)\]")
# What jax and flax put around the layers' names.
_AROUND = re.compile(r"jit\(\w+\)/?|jvp\(|transpose\(|vmap\(|remat\(|checkpoint/|rematted_computation/|\)")

Origins = Mapping[tuple[str, tuple[int, ...]], Sequence[str]]
"""Where the arrays of a program come from: names by type and sizes on one device, in order of size, without ones."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array in HBM.

    Attributes:
      bytes: with its padding.
      shape: type and sizes, as the compiler writes them, without the layout.
      layer: names of layers and the operation, joined by ``/``; "" where the compiler does not say.
      backward: whether it belongs to the backward pass.
    """

    bytes: int
    shape: str
    layer: str
    backward: bool = False


def in_refusal(report: str, origins: Origins, count: int = 5) -> tuple[Buffer, ...]:
    """Reads the largest allocations that the TPU compiler lists, in its log, when a program does not fit.

    It names their types, not their layers: those are looked up by type and size.

    Args:
      report: what it logged.
      origins: from `origins_of`.
      count: at most so many.
    """
    found = []
    for size, unit, listed in _ALLOCATION.findall(report):
        # Several arrays may take turns in one place: the one of most elements that is known tells whose it is.
        arrays = [(kind, [int(x) for x in sizes.split(",") if x]) for kind, sizes in _ARRAY.findall(listed)]
        arrays.sort(key=lambda array: -math.prod(array[1]))
        names = [name for kind, sizes in arrays for name in origins.get((kind, _key(sizes)), ())]
        kind, sizes = arrays[0] if arrays else ("", [])
        shape, name = f"{kind}[{','.join(map(str, sizes))}]", names[0] if names else ""
        found.append(Buffer(int(float(size) * _UNITS[unit]), shape, layer_of(name), "transpose(" in name))
    return tuple(sorted(found, key=lambda buffer: -buffer.bytes)[:count])


def origins_of(jaxpr: Any, parts: int) -> Origins:
    """Collects what a traced program computes where.

    Args:
      jaxpr: of the whole program, as `jax.make_jaxpr` gives it.
      parts: devices that arrays are divided over.
    """
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}

    def visit(jaxpr: Any, around: str) -> None:
        for equation in jaxpr.eqns:
            name = "/".join(filter(None, [around, str(equation.source_info.name_stack)]))
            inner = [x for x in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(x)]
            if equation.primitive.name != "pallas_call":
                for x in inner:
                    visit(getattr(x, "jaxpr", x), name)
            for out in equation.outvars:
                shape, dtype = getattr(out.aval, "shape", None), getattr(out.aval, "dtype", None)
                if shape is None or not hasattr(dtype, "itemsize"):
                    continue
                kind = _HLO_KINDS.get(str(dtype), str(dtype))
                divided = [
                    (*shape[:axis], size // parts, *shape[axis + 1 :])
                    for axis, size in enumerate(shape)
                    if size % parts == 0
                ]
                for key in {_key(sizes) for sizes in (shape, *divided)}:
                    names = found.setdefault((kind, key), [])
                    if name and name not in names:
                        names.append(name)

    visit(jaxpr.jaxpr, "")
    return found


_HLO_KINDS = {"float32": "f32", "bfloat16": "bf16", "int32": "s32", "uint32": "u32", "uint8": "u8", "bool": "pred"}


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _key(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in sizes if size != 1))


def in_program(hlo_text: str, count: int = 5) -> tuple[Buffer, ...]:
    """Lists the largest results in HBM of a compiled program, equal ones of a layer once.

    Not all of them are there at the same time.

    Args:
      hlo_text: ``compiled.as_text()``.
      count: at most so many.
    """
    found: dict[Buffer, None] = {}
    try:
        executed = list(traffic.executed(hlo_text))
    except ValueError:  # a loop whose length depends on the data
        return ()
    for x in executed:
        if x.siblings or x.opcode in ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant"):
            continue
        for element in traffic.elements(x.type):
            size = traffic.padded_bytes(element)
            if size and not element.startswith("("):
                found[Buffer(size, _plain(element), layer_of(x.op_name), "transpose(" in x.op_name)] = None
    return tuple(sorted(found, key=lambda buffer: -buffer.bytes)[:count])


def layer_of(op_name: str) -> str:
    """Names of layers and the operation, without what jax puts around them.

    Example:
      >>> layer_of("jit(train_step)/transpose(jvp(ResNet))/stage2_block1/conv1/conv_general_dilated")
      'ResNet/stage2_block1/conv1/conv_general_dilated'
    """
    return _AROUND.sub("", op_name)


def _plain(shape: str) -> str:
    return shape.partition("{")[0]
