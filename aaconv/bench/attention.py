"""Time and memory of relative attention, every implementation beside its peers: ``aaconv bench attention``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from aaconv import ops
from aaconv.bench import ahead, program, report, timing, tpu_peers
from aaconv.bench.program import Inputs, Program, Shape
from aaconv.errors import close_matches
from aaconv.watch import HBM_BANDWIDTH, PEAK_FLOPS

BASELINE = "skew"
TORCH_PEERS = {
    "torch_sdpa_bias": "PyTorch's scaled_dot_product_attention, the bias built",
    "torch_sdpa_codes": "PyTorch's scaled_dot_product_attention, row and column codes appended",
    "torch_skew": "the published algorithm in PyTorch",
    "torch_flex": "PyTorch's FlexAttention with the same decomposed bias (CUDA)",
}
# What each stores of the (HW)^2 maps on a CPU, forward and backward: more than it may need, so that it is not begun.
_TORCH_MAPS = {"torch_sdpa_bias": 4, "torch_skew": 4}

_SERIES = {"cpu": "1,8,{0},{0},20,4", "gpu": "8,8,{0},{0},20,8", "tpu": "128,8,{0},{0},20,8"}
_SIZES = {"cpu": (7, 14, 28, 56), "gpu": (14, 28, 56, 112), "tpu": (14, 28, 56)}
_SHAPES = {
    "cpu": ("4,8,28,28,20,4", "1,8,56,56,20,2"),
    "gpu": ("256,8,14,14,20,8", "256,8,28,28,20,8", "64,8,56,56,20,8", "8,8,64,64,64,64", "1,8,128,128,32,32"),
    "tpu": (),
}
_AHEAD = ("128,8,28,28,20,8", "128,8,56,56,20,8")

_LINEAR = ("blockwise", "pallas_tpu", "tpu_flash_codes")  # in memory; the others store the maps


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, a second.

    Attributes:
      bandwidth: bytes between HBM and the core, published.
      macs: multiplications and additions in bfloat16, half of the published FLOP/s.
      exponentials: in float32; not published, inferred from the width of the vector unit and the clock.
    """

    bandwidth: float
    macs: float
    exponentials: float | None = None


# By `jax.Device.device_kind`.
CHIPS = {
    kind: Chip(HBM_BANDWIDTH[kind], PEAK_FLOPS[kind]["bfloat16"] / 2, exponentials)
    for kind, exponentials in {"TPU v5 lite": 1024 * 1.5e9, "TPU v6 lite": None}.items()  # 8 x 128 lanes, one a cycle
}

MOST_BYTES = 10**12  # of the inputs of what is compiled without being run

_CHECKS = ("appended_codes", "pallas_tpu_interpret")  # there to check values: measured where they are asked for

Note = Callable[[str], None]


@dataclasses.dataclass
class Row:
    """One implementation at one shape; the columns of the CSV file, after the machine's.

    Attributes:
      chosen: whether it is the one that aaconv takes for this shape unless another is asked for.
      status: ``measured``, ``compiled`` (not run), ``wrong``, ``unavailable``, ``too large`` or ``failed``.
      reason: why, for the last four.
      forward_error, gradient_error: against float64, as shares of the largest number.
      forward_s, gradient_s: median seconds; ``_q1`` and ``_q3`` the quartiles, ``_samples`` how many.
        The gradient is of all five inputs and includes the forward pass.
      forward_bytes, gradient_bytes: temporary memory.
      forward_moved, gradient_moved: bytes between the device's memory and its cores, see `traffic.hbm_bytes`.
      required_bytes: what the device would need for what does not fit.
    """

    B: int
    n: int
    H: int
    W: int
    d: int
    e: int
    pixels: int
    dtype: str
    implementation: str
    chosen: bool = False
    status: str = ""
    reason: str = ""
    forward_error: float | None = None
    gradient_error: float | None = None
    forward_s: float | None = None
    forward_q1: float | None = None
    forward_q3: float | None = None
    forward_samples: int | None = None
    gradient_s: float | None = None
    gradient_q1: float | None = None
    gradient_q3: float | None = None
    gradient_samples: int | None = None
    forward_bytes: int | None = None
    gradient_bytes: int | None = None
    forward_moved: int | None = None
    gradient_moved: int | None = None
    required_bytes: int | None = None

    @classmethod
    def of(cls, shape: Shape, dtype: str, name: str) -> Row:
        batch, heads, height, width, key_depth, value_depth = dataclasses.astuple(shape)
        return cls(batch, heads, height, width, key_depth, value_depth, shape.pixels, dtype, name)

    @property
    def shape(self) -> Shape:
        return Shape(self.B, self.n, self.H, self.W, self.d, self.e)

    @property
    def label(self) -> str:
        return f"{self.implementation} *" if self.chosen else self.implementation

    def skip(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def set_times(self, what: str, times: timing.Times) -> None:
        low, high = times.quartiles
        values = {"s": times.median, "q1": low, "q3": high, "samples": len(times.samples)}
        for key, value in values.items():
            setattr(self, f"{what}_{key}", value)

    def times(self, what: str) -> str:
        median, low, high = (getattr(self, f"{what}_{key}") for key in ("s", "q1", "q3"))
        return report.milliseconds(median, None if median is None else (low, high))


def known() -> dict[str, str]:
    """Returns every implementation and peer by name, with how it does it."""
    peers = {name: text for name, (text, _) in tpu_peers.PEERS.items()}
    return {**ops.IMPLEMENTATIONS, **TORCH_PEERS, **peers}


def default_shapes(platform: str, *, ahead_of_time: bool = False) -> list[Shape]:
    """Returns the shapes that are measured unless others are asked for."""
    if ahead_of_time:
        return [Shape.parse(text) for text in _AHEAD]
    series = [_SERIES[platform].format(size) for size in _SIZES[platform]]
    return [Shape.parse(text) for text in dict.fromkeys([*_SHAPES[platform], *series])]


def run(
    shapes: Sequence[Shape] = (),
    *,
    dtype: str = "",
    names: Sequence[str] = (),
    seconds: float = 20.0,
    memory_limit: float | None = None,
    output: str | os.PathLike[str] = "runs/bench/attention",
    memory_only: bool = False,
    topology: str = "",
    note: Note = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Row]:
    """Measures, prints a table for each shape, and writes ``attention.csv`` and ``attention.png``.

    Args:
      shapes: to measure; by default `default_shapes` of the platform.
      dtype: of q, k, v and the tables; by default float32 on a CPU, bfloat16 elsewhere.
      names: of `known`; by default all but those that are there to check values.
      seconds: of timing for each shape, without compiling and warming up.
      memory_limit: GB (10^9 bytes); what needs more is not begun. By default half of the free memory of a CPU
        machine, and none elsewhere, where running out of it is an error like another.
      output: folder of the two files.
      memory_only: whether to compile without running.
      topology: a TPU to compile for, e.g. ``v5e:2x2``; implies `memory_only`.
      note: gets lines of progress.

    Returns:
      The rows. An interruption leaves those of the finished shapes in the file, and prints them.

    Raises:
      ValueError: an unknown name or topology, or a folder that cannot be written.
    """
    _check_names(names)
    # Read when jax meets a GPU, three quarters of which it would keep from PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = ahead.topology_devices(topology)[0] if topology else jax.devices()[0]
    platform = device.platform if device.platform in _SERIES else "gpu"
    memory_only = memory_only or bool(topology)
    _check_platform(names, "cuda" if platform == "gpu" else platform)
    names = list(dict.fromkeys(names)) or _default_names(memory_only)
    dtype = dtype or ("float32" if platform == "cpu" else "bfloat16")
    shapes = shapes or default_shapes(platform, ahead_of_time=bool(topology))
    if memory_limit is None and platform == "cpu":
        memory_limit = (report.free_memory() or 8e9) / 2e9
    limit = memory_limit * 1e9 if memory_limit else None
    machine = report.machine(
        f"{device.device_kind}, one chip of {topology}, compiled ahead of time" if topology else ""
    )
    columns = [*machine, *(field.name for field in dataclasses.fields(Row))]
    chip = CHIPS.get(device.device_kind) if topology else None
    rows: list[Row] = []
    with report.Csv(Path(output) / "attention.csv", columns) as file:
        print(report.describe(machine))
        print(f"{len(shapes)} {'shape' if len(shapes) == 1 else 'shapes'} in {dtype}", end="")
        print(f", at most {limit / 1e9:.3g} GB a program" if limit and not memory_only else "", flush=True)
        if not memory_only and machine.get("load", 0) > 0.5 * report.cores():
            note(
                f"this machine is busy (load {machine['load']}, {report.cores()} cores): times will be long, PyTorch's "
                "most of all, whose threads wait for each other"
            )
        try:
            for number, shape in enumerate(shapes, start=1):
                tell = functools.partial(_tell, note, f"{number}/{len(shapes)} {shape}")
                measured = _compile_only if memory_only else functools.partial(_measure, seconds=seconds)
                chosen = _chosen(shape, dtype, device)
                for row in measured(shape, dtype, names, device=device, limit=limit, note=tell):
                    row.chosen = row.implementation == chosen
                    rows.append(row)
                    file.write({**machine, **dataclasses.asdict(row)})
        except KeyboardInterrupt:
            note(f"interrupted: {file.path} holds the {len(rows)} rows of the shapes that were finished")
            _finish(rows, memory_only, file.path, machine["device"], chip, note)
            raise
    _finish(rows, memory_only, file.path, machine["device"], chip, note)
    return rows


def _tell(note: Note, prefix: str, text: str) -> None:
    note(f"{prefix}: {text}")


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in known():
            raise ValueError(
                f"--implementation {name!r} is not one of {', '.join(known())}{close_matches(name, known())}"
            )


def _check_platform(names: Sequence[str], platform: str) -> None:
    """Refuses names of which none can run on the platform, before anything is compiled or written."""
    anywhere = Shape(1, 1, 8, 8, 8, 8)  # of a kind that every kernel takes
    reasons = {name: _reason_not(name, anywhere, platform) for name in names}
    if reasons and all(reasons.values()):
        raise ValueError("; ".join(f"{name} cannot be measured here: {reason}" for name, reason in reasons.items()))


def _reason_not(name: str, shape: Shape, platform: str) -> str | None:
    if name not in ops.IMPLEMENTATIONS:
        return None
    space = (shape.height, shape.width, shape.heads, shape.key_depth)
    try:
        ops.choose_implementation(
            space, shape.value_depth, jnp.dtype("bfloat16"), implementation=name, platform=platform
        )
    except NotImplementedError as error:
        return report.reason(error)
    return None


def _default_names(memory_only: bool) -> list[str]:
    left_out = {*_CHECKS, *(TORCH_PEERS if memory_only else ())}
    return [name for name in known() if name not in left_out]


def _chosen(shape: Shape, dtype: str, device: ahead.Device) -> str:
    with ahead.tracing_for(ahead.mesh_of(device)):
        return ops.choose_implementation(shape.arrays()[0], shape.value_depth, jnp.dtype(dtype)).implementation


def _attend(name: str) -> program.Attend:
    """An implementation or a peer as a function of five arrays."""
    if name in tpu_peers.PEERS:
        return tpu_peers.PEERS[name][1]
    return lambda q, k, v, *rel: ops.relative_attention(q, k, v, rel, implementation=name)


def _compiled(row: Row, device: ahead.Device) -> program.Compiled | None:
    """Compiles a row's implementation; where that is not possible, the row says why."""
    if row.implementation in tpu_peers.PEERS and device.platform != "tpu":
        row.skip("unavailable", "a kernel for TPUs")
        return None
    try:
        heads_first = row.implementation in tpu_peers.PEERS
        return program.compile(_attend(row.implementation), row.shape, row.dtype, device, heads_first=heads_first)
    except NotImplementedError as error:
        row.skip("unavailable", report.reason(error))
    except Exception as error:  # one that fails must not take the others' results with it
        row.skip("failed", report.first_line(error))
    return None


def _account(row: Row, compiled: program.Compiled) -> None:
    """Puts what the compiler says into a row."""
    forward, gradient = compiled.forward_needs, compiled.gradient_needs
    row.forward_bytes, row.gradient_bytes = forward.temporaries, gradient.temporaries
    row.forward_moved, row.gradient_moved = forward.moved, gradient.moved
    refused = gradient if gradient.refused else forward
    if refused.refused:
        what = "forward + backward" if gradient.refused else "forward"
        row.required_bytes = refused.required
        row.skip("too large", f"{what} {refused.refused}")


def _compile_only(
    shape: Shape, dtype: str, names: Iterable[str], *, device: ahead.Device, limit: float | None, note: Note
) -> Iterable[Row]:
    given = sum(map(math.prod, shape.arrays())) * jnp.dtype(dtype).itemsize
    for name in names:
        row = Row.of(shape, dtype, name)
        if given > MOST_BYTES:  # XLA's arithmetic overflows somewhere above, and takes the process with it
            row.skip("too large", f"the inputs alone take {given / 1e9:,.0f} GB")
            row.required_bytes = given
            yield row
            continue
        note(f"compiling {name}")
        if name in TORCH_PEERS:
            row.skip("unavailable", "PyTorch compiles nothing whose memory could be read without running it")
        else:
            compiled = _compiled(row, device)
            if compiled is not None:
                row.status = "compiled"
                _account(row, compiled)
        yield row


def _measure(
    shape: Shape,
    dtype: str,
    names: Iterable[str],
    *,
    device: ahead.Device,
    limit: float | None,
    note: Note,
    seconds: float,
) -> Iterable[Row]:
    rows = {name: Row.of(shape, dtype, name) for name in names}
    given = sum(map(math.prod, shape.arrays())) * jnp.dtype(dtype).itemsize
    alone = f"the inputs alone take {given / 1e9:,.3g} GB, --memory-limit is {(limit or 0) / 1e9:.3g}: not run"
    try:
        if limit and given > limit:
            raise MemoryError
        inputs = Inputs.draw(shape, dtype)
        expected = inputs.expected()
    except MemoryError:  # inputs are drawn on the host, whatever runs the programs
        for row in rows.values():
            row.skip("too large", alone if limit and given > limit else "the inputs do not fit this machine's memory")
        return rows.values()
    programs: dict[str, Program] = {}
    for name, row in rows.items():
        note(f"preparing {name}")
        prepared = _prepare(row, inputs, device, limit)
        if prepared is None:
            continue
        try:
            row.forward_error, row.gradient_error = inputs.errors(prepared.check(inputs.checked), expected)
            row.forward_bytes, row.gradient_bytes = prepared.forward_bytes(), prepared.gradient_bytes()
        except Exception as error:
            _failed(row, error)
            continue
        worst = max(row.forward_error, row.gradient_error)
        if worst > program.TOLERANCE[dtype]:
            row.skip("wrong", f"off by {worst:.2g} of the largest number, more than {program.TOLERANCE[dtype]:g}")
            note(f"{name} is WRONG: {row.reason}")
            continue
        programs[name] = prepared
    if programs:
        jobs = {(name, what): getattr(programs[name], what) for name in programs for what in ("forward", "gradient")}
        note(f"timing {len(programs)} implementations for {seconds:g} s")
        for (name, what), times in timing.measure(jobs, seconds, warm_up=1).items():  # the check was another
            rows[name].set_times(what, times)
            rows[name].status = "measured"
    return rows.values()


def _prepare(row: Row, inputs: Inputs, device: ahead.Device, limit: float | None) -> Program | None:
    """Makes a row's program; where that is not possible, the row says why."""
    if row.implementation in TORCH_PEERS:
        return _prepare_torch(row, inputs, device, limit)
    compiled = _compiled(row, device)
    if compiled is None:
        return None
    _account(row, compiled)
    if row.status:
        return None
    needed = max(compiled.forward_needs.total or 0, compiled.gradient_needs.total or 0)
    if limit and needed > limit:
        row.skip("too large", f"needs {needed / 1e9:.1f} GB, --memory-limit is {limit / 1e9:.1f}: not run")
        return None
    return compiled.program(inputs, device)


def _prepare_torch(row: Row, inputs: Inputs, device: ahead.Device, limit: float | None) -> Program | None:
    name, shape = row.implementation, row.shape
    if importlib.util.find_spec("torch") is None:
        row.skip("unavailable", "torch is not installed: pip install 'aaconv[bench]'")
        return None
    cuda = device.platform in ("gpu", "cuda")
    if device.platform not in ("cpu", "gpu", "cuda") or (name == "torch_flex" and not cuda):
        row.skip("unavailable", "needs a CUDA device" if name == "torch_flex" else f"PyTorch runs no {device.platform}")
        return None
    needed = (
        _TORCH_MAPS.get(name, 0) * shape.batch * shape.heads * shape.pixels**2 * (4 if row.dtype == "float32" else 2)
    )
    if limit and needed > limit:
        row.skip("too large", f"needs about {needed / 1e9:.1f} GB, --memory-limit is {limit / 1e9:.1f}: not run")
        return None
    # PyTorch's profiler, which counts the memory, reports its start, its stop and a missing GPU as errors.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        from aaconv.bench import torch_peers
    except ImportError as error:  # It is there, but its libraries are not.
        row.skip("unavailable", f"PyTorch cannot be imported: {error}")
        return None
    try:
        return torch_peers.program(name, inputs, row.dtype, cuda=cuda)
    except NotImplementedError as error:
        row.skip("unavailable", str(error))
    except Exception as error:
        _failed(row, error)
    return None


def _failed(row: Row, error: Exception) -> None:
    torch = sys.modules.get("torch")
    memory = "RESOURCE_EXHAUSTED" in str(error) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    row.skip("too large" if memory else "failed", "out of memory" if memory else report.first_line(error))


# What is printed and drawn


def _finish(rows: Sequence[Row], memory_only: bool, path: Path, device: str, chip: Chip | None, note: Note) -> None:
    if not rows:
        return
    picture = _draw(rows, path.with_suffix(".png"), device, note)
    for found in [str(path), *([picture] if picture else [])]:
        print(f"written {found}")
    left_out: dict[str, list[Row]] = {}
    for row in rows:
        if row.status in ("unavailable", "failed"):
            left_out.setdefault(f"{row.implementation}: {row.reason}", []).append(row)
    shapes = {row.shape for row in rows}
    if left_out:
        print("\nnot measured")
    for text, group in left_out.items():
        at = "" if len(group) == len(shapes) else f" (at {'; '.join(str(row.shape) for row in group)})"
        print(f"  {text}{at}")
    print(f"\n{MEMORY_LEGEND if memory_only else LEGEND}")
    for shape in dict.fromkeys(row.shape for row in rows):
        group = [row for row in rows if row.shape == shape]
        print(f"\n**B n H W d e = {str(shape).replace(',', ' ')}, {group[0].dtype}**\n")
        print(_memory_table(group) if memory_only else _table(group))
    if chip is not None:
        for shape in dict.fromkeys(row.shape for row in rows):
            group = [row for row in rows if row.shape == shape]
            print(
                f"\n**Floors at B n H W d e = {str(shape).replace(',', ' ')}, {group[0].dtype}, forward + backward**\n"
            )
            print(_floors(group, chip))
        print(f"\n{FLOORS_LEGEND}")


LEGEND = (
    "Medians (quartiles in brackets). + backward: forward and backward together, the gradients of q, k, v and both\n"
    f"tables. MB: temporary memory, 10^6 bytes. / {BASELINE}: as a share of the published algorithm's. error: largest\n"
    "difference from float64, forward and gradients, as a share of the largest number. *: what aaconv takes by itself."
)
MEMORY_LEGEND = (
    "MB: temporary memory, 10^6 bytes. + backward: forward and backward together, the gradients of q, k, v and both\n"
    f"tables. / {BASELINE}: as a share of the published algorithm's. moves: bytes between the device's memory and\n"
    "its cores, read off the compiled program: loops with all their trips, what stays in VMEM not at all, custom\n"
    "kernels with their operands and results once. *: what aaconv takes by itself."
)

FLOORS_LEGEND = (
    "These are bounds, not timings: nothing ran. Each line is an amount of work over the chip's peak rate, as if it\n"
    "were all there is to do; a program takes at least the longest of its own lines and of those of all, and may take\n"
    "much longer. The rates of memory and of products, in bfloat16, are published, that of exponentials is inferred.\n"
    "bytes moved: as above; kernels that fetch a block again move more. by their block specs: between VMEM and where\n"
    "the arrays are, which for some is VMEM as well. products: two kinds forward, five backward, without those that\n"
    "form the relative logits. inputs and results: q, k, v, the output and both tables, and the gradient of each."
)


def _table(group: Sequence[Row]) -> str:
    base = next((row for row in group if row.implementation == BASELINE), None)
    columns = [
        *("implementation", "forward, ms", "+ backward, ms", "forward, MB", "+ backward, MB"),
        *(f"{what} / {BASELINE}" for what in ("forward", "+ backward", "MB")),
        "error",
    ]
    body = []
    for row in group:
        if row.status in ("unavailable", "failed"):
            continue
        instead = {"wrong": "WRONG", "too large": "too large"}.get(row.status)
        shares = (
            report.ratio(getattr(row, key), base and getattr(base, key))
            for key in ("forward_s", "gradient_s", "gradient_bytes")
        )
        body.append(
            [
                row.label,
                instead or row.times("forward"),
                instead or row.times("gradient"),
                report.megabytes(row.forward_bytes),
                report.megabytes(row.gradient_bytes),
                *shares,
                "-" if row.forward_error is None else f"{row.forward_error:.0e}, {row.gradient_error:.0e}",
            ]
        )
    return report.table(columns, body)


def _memory_table(group: Sequence[Row]) -> str:
    base = next((row for row in group if row.implementation == BASELINE), None)
    size = lambda row: row.gradient_bytes or row.required_bytes
    columns = ["implementation", "forward, MB", "+ backward, MB", f"+ backward / {BASELINE}", "+ backward moves, GB"]
    body = []
    for row in group:
        if row.status in ("unavailable", "failed"):
            continue
        moves = _gigabytes(row.gradient_moved)
        share = report.ratio(size(row), base and size(base))
        fits = "yes" if row.status == "compiled" else f"no: {row.reason}"
        sizes = report.megabytes(row.forward_bytes), report.megabytes(row.gradient_bytes)
        body.append([row.label, *sizes, share, moves, fits])
    return report.table([*columns, "fits"], body)


def _floors(group: Sequence[Row], chip: Chip) -> str:
    """How long each thing that has to be done takes at the chip's rate, were it the only one."""
    from aaconv.ops import pallas_tpu

    shape, dtype = group[0].shape, jnp.dtype(group[0].dtype)
    maps, d, e = shape.batch * shape.heads, shape.key_depth, shape.value_depth
    pairs = maps * shape.pixels**2
    body: list[list[str]] = []

    def floor(whose: str, what: str, amount: float, unit: str, rate: float | None, suffix: str = "") -> None:
        scale = {"GB": 1e9, "TMAC": 1e12, "G": 1e9}[unit]
        known = "unknown" if rate is None else f"{_digits(rate / scale)} {unit}/s{suffix}"
        least = "-" if rate is None else _digits(1e3 * amount / rate)
        body.append([whose, what, f"{_digits(amount / scale)} {unit}", known, least])

    for row in group:
        if row.implementation in _LINEAR and row.status == "compiled":
            if row.gradient_moved is not None:
                floor(row.implementation, "bytes moved", row.gradient_moved, "GB", chip.bandwidth)
            if row.implementation == "pallas_tpu":
                space = (shape.height, shape.width)
                ways = pallas_tpu.costs(space, d, e, maps=maps, dtype=dtype).values()
                moved, macs = (sum(way[key] for way in ways) for key in ("hbm_bytes", "macs"))
                floor(row.implementation, "bytes of its kernels, by their block specs", moved, "GB", chip.bandwidth)
                floor(row.implementation, "products, padded as its kernels do", macs, "TMAC", chip.macs)
    arrays = 2 * sum(map(math.prod, shape.arrays())) * dtype.itemsize
    floor("all", "inputs and results once, unpadded", arrays, "GB", chip.bandwidth)
    floor("all", "products, unpadded", pairs * ((d + e) + (3 * d + 2 * e)), "TMAC", chip.macs)
    floor("all", "exponentials, once each way", 2 * pairs, "G", chip.exponentials, " (inferred)")
    return report.table(["of", "what", "amount", "rate", "ms at least"], body, text=2)


def _digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _gigabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:,.{1 if size >= 1e10 else 2}f}"


def series(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows of the largest set of shapes that differ in height and width only."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.B, row.n, row.d, row.e, row.dtype), []).append(row)
    return max(groups.values(), key=lambda group: (len({row.pixels for row in group}), len(group)), default=[])


def _draw(rows: Sequence[Row], path: Path, device: str, note: Note) -> str | None:
    chosen = series(rows)
    panels: dict[str, Mapping[str, list[tuple[float, float]]]] = {}
    for title, key, unit in (
        ("forward + backward, ms", "gradient_s", 1e3),
        ("temporary memory of forward + backward, MB", "gradient_bytes", 1e-6),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(chosen, key=lambda row: row.pixels):
            value = getattr(row, key)
            if value and row.status in ("measured", "compiled"):
                lines.setdefault(row.implementation, []).append((row.pixels, value * unit))
        if lines:
            panels[title] = lines
    if not panels:
        return None
    if len({row.pixels for row in chosen}) < 2:
        note("no picture: it shows how costs grow with the map, and needs two sizes that differ in H and W only")
        return None
    first = chosen[0]
    noun = "image" if first.B == 1 else "images"
    title = f"Relative attention, {first.B} {noun}, {first.n} heads, depths {first.d} and {first.e}, {first.dtype}"
    title += f"; {device}"
    try:
        from aaconv import plots

        return plots.scaling(
            panels, path, title=title, xlabel="pixels of the map, H W", dashed=[*TORCH_PEERS, *tpu_peers.PEERS]
        )
    except ImportError:
        note("no picture: this needs matplotlib, pip install 'aaconv[plots]'")
        return None
