"""Bytes that a compiled program moves between a device's memory and its cores, read off the program's text.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and arrays in a TPU's VMEM like
those in HBM: https://github.com/openxla/xla, ``HloCostAnalysis``. This reads the scheduled, optimised HLO.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_TILES = re.compile(r"T((?:\([\d,]+\))+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"\bindex=(\d+)")

_FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier"),
    *("partition-id", "replica-id"),
}
# Custom calls that only tell the compiler something.
_MARKERS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}
_SLICES = {"slice", "dynamic-slice", "gather"}  # read what they return of their first operand
_SAME = {"bitcast", "copy", "convert", "reshape"}  # of a loop's counter


def hbm_bytes(hlo_text: str) -> int:
    """Counts the bytes between HBM and the cores in one run of a compiled program.

    Each instruction moves its operands and its results, but

    - arrays in another memory space than the default one (VMEM on a TPU) are free; others are padded to their tiles;
    - of an array that is only sliced, the slices count, and of one that is updated in place, the updates, inside
      fusions as well;
    - a loop's body and condition count once a trip, and of the branches of a conditional the largest;
    - a custom call's operands and results count once. That is too little for a kernel that fetches a block
      again, and leaves out what it keeps in HBM for itself.

    Caches, and padding of slices that do not lie on tiles, are unknown to it.

    Args:
      hlo_text: the scheduled, optimised program, as ``compiled.as_text()`` of jax gives it.

    Raises:
      ValueError: the text is no such program, or does not say how often a loop runs.
    """
    try:
        return _Module(hlo_text).moved()
    except LookupError as error:
        raise ValueError(f"the program's text is not of a form that is known here: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class Executed:
    """One instruction of a compiled program, and how often a run executes it.

    Attributes:
      name, opcode: of the instruction.
      type: of its result, as the program's text has it; ``operands`` the types of what it is given.
      attributes: what stands after its operands.
      times: how often; loops count with all their trips, and of a conditional every branch counts.
      siblings: opcodes of the computation it stands in, which tells what it is fused with; empty outside fusions.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    times: int
    siblings: frozenset[str]

    @property
    def op_name(self) -> str:
        """Where the operation comes from: functions and layers, joined by ``/``; "" where it is not known."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


def executed(hlo_text: str) -> Iterator[Executed]:
    """Yields every instruction that a run of a compiled program executes, those inside fusions too.

    Args:
      hlo_text: as of `hbm_bytes`.

    Raises:
      ValueError: as of `hbm_bytes`.
    """
    try:
        yield from _Module(hlo_text).executed()
    except LookupError as error:
        raise ValueError(f"the program's text is not of a form that is known here: {error!r}") from error


def array_bytes(type_text: str) -> int:
    """Bytes of the arrays of a type without padding, wherever they lie: what goes over a network.

    Example:
      >>> array_bytes("(f32[4]{0:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)})")
      28
    """
    return sum(-(-math.prod(array.sizes) * array.bits // 8) for array in _arrays(type_text))


def padded_bytes(type_text: str) -> int:
    """Bytes of the arrays of a type in HBM, with their padding.

    Example:
      >>> padded_bytes("f32[4]{0:T(128)}")
      512
    """
    return _bytes(type_text)


def elements(type_text: str) -> list[str]:
    """The types in a tuple's type; of another type, itself.

    Example:
      >>> elements("(f32[4]{0}, (s32[], pred[2]{0}))")
      ['f32[4]{0}', '(s32[], pred[2]{0})']
    """
    return _elements(type_text)


@dataclasses.dataclass(frozen=True)
class _Array:
    """One array of a type, sizes in the order of the dimensions."""

    bits: int
    sizes: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        return not re.search(r"S\([1-9]", self.layout)

    @property
    def padded(self) -> int:
        """Bytes with its padding, wherever it is."""
        order, _, rest = self.layout.partition(":")
        minor_to_major = [int(index) for index in order.split(",") if index]
        sizes = [self.sizes[index] for index in reversed(minor_to_major)] if minor_to_major else list(self.sizes)
        found = _TILES.search(rest)
        tiles = [[int(x) for x in re.findall(r"\d+", tile)] for tile in found[1][1:-1].split(")(")] if found else []
        if tiles and len(tiles[0]) <= len(sizes):
            for tile in tiles:  # each one divides the last dimensions, and its own take their place
                head, tail = sizes[: -len(tile)], sizes[-len(tile) :]
                sizes = [*head, *(-(-size // part) for size, part in zip(tail, tile, strict=True)), *tile]
        return -(-math.prod(sizes) * self.bits // 8)

    @property
    def bytes(self) -> int:
        return self.padded if self.in_hbm else 0


@functools.cache
def _arrays(text: str) -> tuple[_Array, ...]:
    """The arrays of a type, however nested."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(text):
        if kind == "token" or kind == "opaque":
            continue
        bits = 8 if kind == "pred" else int(re.sub(r"^[a-z]+(\d+).*$", r"\1", kind))
        found.append(_Array(bits, tuple(int(size.strip("<= ")) for size in sizes.split(",") if size), layout or ""))
    return tuple(found)


def _bytes(text: str) -> int:
    return sum(array.bytes for array in _arrays(text))


def _padded(text: str) -> int:
    return sum(array.padded for array in _arrays(text))


def _in_hbm(text: str) -> bool:
    return any(array.in_hbm for array in _arrays(text))


def _elements(text: str) -> list[str]:
    """The types in a tuple's type; of another type, itself."""
    if not text.startswith("("):
        return [text]
    depth, start, found = 0, 1, []
    for at, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if (sign == "," and depth == 1) or (sign == ")" and depth == 0):
            found.append(text[start:at].strip())
            start = at + 1
    return [element for element in found if element]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    inside: str  # the brackets: operands, a constant's value, a parameter's number
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def called(self, attribute: str) -> list[str]:
        """Computations named by an attribute, one or a list in braces."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [] if found is None else re.findall(r"[\w.\-]+", found[1])

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


def _closed(text: str, start: int) -> int:
    """Index past the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"a line of the program has a bracket that is not closed: {text[:120]}")


def _instruction(name: str, text: str) -> _Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"a line of the program has no operation: {text[:120]}")
    close = _closed(text, opcode.end() - 1)
    return _Instruction(name, text[:end], opcode[1], text[opcode.end() : close - 1], text[close:])


@dataclasses.dataclass(frozen=True)
class _Computation:
    instructions: Mapping[str, _Instruction]
    root: _Instruction

    def parameter(self, number: int) -> _Instruction | None:
        """None where the computation does not use it."""
        found = (x for x in self.instructions.values() if x.opcode == "parameter" and int(x.inside) == number)
        return next(found, None)

    @functools.cached_property
    def users(self) -> Mapping[str, list[tuple[_Instruction, int]]]:
        """Who reads an instruction, as which of its operands."""
        found: dict[str, list[tuple[_Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for index, operand in enumerate(instruction.operands):
                found.setdefault(operand, []).append((instruction, index))
        return found

    def operand(self, instruction: _Instruction, index: int) -> _Instruction:
        return self.instructions[instruction.operands[index]]

    def through_bitcasts(self, instruction: _Instruction) -> _Instruction:
        while instruction.opcode == "bitcast":
            instruction = self.operand(instruction, 0)
        return instruction

    def outputs(self) -> list[_Instruction]:
        return [self.instructions[x] for x in self.root.operands] if self.root.opcode == "tuple" else [self.root]


@dataclasses.dataclass(frozen=True)
class _Value:
    """An instruction where it is computed; `arguments` are what its computation was called with."""

    computation: _Computation
    instruction: _Instruction
    arguments: tuple[_Value, ...] = ()


class _Module:
    def __init__(self, text: str) -> None:
        self._computations: dict[str, _Computation] = {}
        self._entry = ""
        name, root, found = "", None, {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name, root, found = header[2], None, {}
                self._entry = name if header[1] else self._entry
            elif line == "}" and name:
                if root is not None:
                    self._computations[name] = _Computation(found, root)
                name = ""
            elif name and (start := _INSTRUCTION.match(line)):
                found[start[2]] = _instruction(start[2], _COMMENT.sub("", line[start.end() :]))
                root = found[start[2]] if start[1] else root
        if self._entry not in self._computations:
            raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")

    def executed(self) -> Iterator[Executed]:
        yield from self._executed(self._entry, 1, inside_fusion=False)

    def _executed(self, name: str, times: int, *, inside_fusion: bool) -> Iterator[Executed]:
        computation = self._computations[name]
        opcodes = {x.opcode for x in computation.instructions.values()}
        siblings = frozenset(opcodes) if inside_fusion else frozenset()
        for x in computation.instructions.values():
            operands = tuple(computation.instructions[operand].type for operand in x.operands)
            yield Executed(x.name, x.opcode, x.type, operands, x.attributes, times, siblings)
            if x.opcode == "while":
                trips = self._trips(computation, x)
                for inner in (*x.called("body"), *x.called("condition")):
                    yield from self._executed(inner, times * trips, inside_fusion=inside_fusion)
            elif x.opcode == "conditional":
                for attribute in ("branch_computations", "true_computation", "false_computation"):
                    for inner in x.called(attribute):
                        yield from self._executed(inner, times, inside_fusion=inside_fusion)
            elif x.opcode in ("call", "async-start", "fusion"):
                for inner in (*x.called("calls"), *(x.called("to_apply") if x.opcode == "call" else ())):
                    within = inside_fusion or x.opcode == "fusion"
                    yield from self._executed(inner, times, inside_fusion=within)

    def moved(self) -> int:
        return self._computation(self._entry)

    def _computation(self, name: str) -> int:
        computation = self._computations[name]
        return sum(self._instruction(computation, x) for x in computation.instructions.values())

    def _instruction(self, computation: _Computation, x: _Instruction) -> int:
        opcode, result = x.opcode, x.type
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or x.target in _MARKERS:
            return 0
        if opcode == "while":
            (body,), (condition,) = x.called("body"), x.called("condition")
            return self._trips(computation, x) * (self._computation(body) + self._computation(condition))
        if opcode == "conditional":
            names = [*x.called("branch_computations"), *x.called("true_computation"), *x.called("false_computation")]
            return max(map(self._computation, names))
        if opcode == "call" or opcode == "async-start":
            return sum(map(self._computation, [*x.called("to_apply"), *x.called("calls")]))
        operands = [computation.instructions[name].type for name in x.operands]
        if opcode.endswith("-start"):
            opcode, result = opcode.removesuffix("-start"), _started(x)
        if opcode == "fusion":
            (name,) = x.called("calls")
            reads = sum(self._read(name, index, kind) for index, kind in enumerate(operands))
            return reads + sum(self._written(name, index, kind) for index, kind in enumerate(_elements(result)))
        if opcode in _SLICES:
            return _bytes(result) + _in_hbm(operands[0]) * _padded(result) + sum(map(_bytes, operands[1:]))
        if opcode == "dynamic-update-slice":
            return _in_hbm(result) * _padded(operands[1]) + sum(map(_bytes, operands[1:]))
        return sum(map(_bytes, operands)) + _bytes(result)

    def _read(self, name: str, number: int, kind: str) -> int:
        """What a fusion reads of an operand of some type."""
        if not _in_hbm(kind):
            return 0
        parts = self._parts(name, number)
        return _bytes(kind) if parts is None else min(_bytes(kind), parts)

    def _parts(self, name: str, number: int) -> int | None:
        """Bytes of the slices a computation takes of a parameter; None where it reads all of it."""
        computation = self._computations[name]
        parameter = computation.parameter(number)
        if parameter is None:
            return 0
        in_place = {id(update) for update in map(computation.through_bitcasts, computation.outputs())}
        total, pending = 0, [parameter]
        while pending:
            value = pending.pop()
            if value is computation.root:
                return None
            for user, index in computation.users.get(value.name, ()):
                if user.opcode == "bitcast":
                    pending.append(user)
                elif user.opcode in _SLICES and index == 0:
                    total += _padded(user.type)
                elif user.opcode == "dynamic-update-slice" and index == 0 and id(user) in in_place:
                    continue
                elif user.opcode == "fusion":
                    part = self._parts(user.called("calls")[0], index)
                    if part is None:
                        return None
                    total += part
                else:
                    return None
        return total

    def _written(self, name: str, index: int, kind: str) -> int:
        """What a fusion writes of its result of some type."""
        computation = self._computations[name]
        outputs = computation.outputs()
        if index >= len(outputs):  # the root is one operation of several results
            return _bytes(kind)
        output = computation.through_bitcasts(outputs[index])
        if output.opcode == "fusion" and not output.type.startswith("("):
            return self._written(output.called("calls")[0], 0, kind)
        if output.opcode == "dynamic-update-slice" and _in_hbm(kind):
            buffer = computation.through_bitcasts(computation.operand(output, 0))
            if buffer.opcode == "parameter":
                return _padded(computation.operand(output, 1).type)
        return _bytes(kind)

    # Loops

    def _trips(self, computation: _Computation, loop: _Instruction) -> int:
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        body, condition = (self._computations[loop.called(what)[0]] for what in ("body", "condition"))
        test = self._value(_Value(condition, condition.root))
        sides = [self._operand(test, index) for index in (0, 1)] if test.instruction.opcode == "compare" else []
        direction = re.search(r"direction=(\w+)", test.instruction.attributes)
        signs = {"LT": (1, 0), "LE": (1, 1), "GT": (-1, 0), "GE": (-1, 1)}  # limit on the right; and one trip more
        if len(sides) == 2 and direction and direction[1] in signs:
            sign, more = signs[direction[1]]
            counter, limit = sides[::sign]  # limit > counter is the same as counter < limit
            at, end = _index(counter), _number(limit)
            if at is not None and end is not None:
                start = self._start(computation, loop, at)
                step = self._step(body, at)
                if start is not None and step:
                    return max(0, math.ceil((end + more - start) / step))
        raise ValueError(f"the program does not say how often its loop {loop.name} runs")

    def _start(self, computation: _Computation, loop: _Instruction, index: int) -> int | None:
        """What a loop's counter begins with."""
        carried = computation.operand(loop, 0)
        if carried.opcode != "tuple":
            return None
        return _number(self._value(_Value(computation, computation.operand(carried, index))))

    def _step(self, body: _Computation, index: int) -> int | None:
        """What a loop's body adds to its counter."""
        if body.root.opcode != "tuple":
            return None
        total = self._value(_Value(body, body.operand(body.root, index)))
        if total.instruction.opcode != "add":
            return None
        sides = [self._operand(total, side) for side in (0, 1)]
        counters, numbers = [_index(side) for side in sides], [_number(side) for side in sides]
        return next((n for at, n in zip(counters, reversed(numbers), strict=True) if at == index and n), None)

    def _operand(self, value: _Value, index: int) -> _Value:
        operand = value.computation.operand(value.instruction, index)
        return self._value(dataclasses.replace(value, instruction=operand))

    def _value(self, value: _Value) -> _Value:
        """Follows a value to where it is computed: into what is called, out to its arguments, through copies."""
        while True:
            computation, x, arguments = value.computation, value.instruction, value.arguments
            if x.opcode in _SAME:
                value = dataclasses.replace(value, instruction=computation.operand(x, 0))
            elif x.opcode in ("fusion", "call"):
                called = self._computations[(x.called("calls") or x.called("to_apply"))[0]]
                given = tuple(dataclasses.replace(value, instruction=computation.instructions[y]) for y in x.operands)
                value = _Value(called, called.root, given)
            elif x.opcode == "parameter" and arguments:
                value = arguments[int(x.inside)]
            else:
                return value


def _number(value: _Value) -> int | None:
    """The value of an integer constant."""
    x = value.instruction
    return int(x.inside) if x.opcode == "constant" and re.fullmatch(r"-?\d+", x.inside) else None


def _index(value: _Value) -> int | None:
    """Which of what a loop carries a value is."""
    x = value.instruction
    found = _INDEX.search(x.attributes) if x.opcode == "get-tuple-element" else None
    carried = found and value.computation.operand(x, 0).opcode == "parameter"
    return int(found[1]) if found and carried else None


def _started(x: _Instruction) -> str:
    """The type that an asynchronous operation will have written."""
    elements = _elements(x.type)
    if x.opcode == "copy-start":
        return elements[0]
    return elements[1] if x.type.startswith("(") and len(elements) > 1 else x.type
