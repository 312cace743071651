"""What ``aaconv compile`` and ``aaconv plan`` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aaconv.pods import bounds, buffers, collectives
from aaconv.pods.chips import Slice
from aaconv.pods.programs import Program

_WIDTH = 28


def remedies(chips: int, config: Any) -> list[str]:
    """What to try where a program does not fit, as far as this slice and config allow it."""
    found = [
        "a smaller --config.batch_size (or eval_batch_size), or more chips",
        f"--config.accumulate_steps={2 * config.accumulate_steps}: the same batch in parts, one after another",
    ]
    if chips > 1:
        found += [
            "--config.mesh.spatial: the rows of each image divided among chips",
            "--config.mesh.fsdp: weights, optimiser state and averages divided among chips, where they are large",
        ]
    if config.model.implementation:
        found.append("--config.model.implementation=None: attention of linear memory")
    return [*found, "`aaconv plan`: as many augmented stages as fit"]


def gibibytes(size: float | None) -> str:
    """Bytes in units of 2^30 or less, as the compiler has them."""
    if size is None:
        return "?"
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_ or (unit == "GiB" and size >= 0.1 * bytes_):
            return f"{size / bytes_:.2f} {unit}"
    return f"{size:.0f} B"


def scaled(number: float, unit: str) -> str:
    """``1.23 T`` and the like, in powers of 1000."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def milliseconds(seconds: float | None) -> str:
    """``12.3 ms``; ``?`` where it is not known."""
    return "?" if seconds is None else f"{1e3 * seconds:.3g} ms"


def program(found: Program, slice: Slice, totals: Sequence[collectives.Total], least: bounds.Bounds) -> list[str]:
    """Returns the part of the page about one program."""
    device, images = slice.chip.device, f"{found.images:,} images"
    lines = [f"{found.name}, {images} a {device}, compiled in {found.seconds:.0f} s", f"  memory a {device}"]
    lines += [_row(kind, gibibytes(size)) for kind, size in memory(found).items()]
    lines += [f"    {'':-<{_WIDTH + 14}}", _row("in all", f"{gibibytes(found.total)}, {verdict(found, slice)}")]
    if not found.fits(slice.device_memory):
        lines += largest(found.largest, refused=bool(found.needs.refused))
    if found.needs.refused:
        return lines
    lines += [f"  work a {device}"]
    counted = (
        "" if found.compiler_flops is None else f"  (XLA counts {scaled(found.compiler_flops, 'FLOP')}, loops once)"
    )
    lines += [_row("products of the network", f"{scaled(found.model_flops, 'FLOP')}{counted}")]
    moved = found.needs.moved
    lines += [_row("through HBM", "? (a loop of unknown length)" if moved is None else scaled(moved, "B"))]
    lines += [f"  collectives a {device}" + ("" if totals else ": none")]
    for x in totals:
        lines.append(
            _row(x.kind, f"{x.count:,} of {scaled(x.bytes, 'B')} together, {scaled(x.sent, 'B')} sent, ")
            + f"{milliseconds(x.seconds)} at least"
        )
    chip = slice.chip
    binding, seconds = least.longest
    rates = {
        "compute": f"bfloat16 peak, {scaled(chip.flops, 'FLOP/s')} a chip",
        "memory": f"HBM peak, {scaled(chip.bandwidth, 'B/s')} a chip",
        "network": f"links' peak, {scaled(chip.link, 'B/s')} each way",
    }
    lines += ["  takes at least"]
    for name, rate in rates.items():
        mark = "  <- binds" if name == binding else ""
        lines.append(_row(name, f"{milliseconds(getattr(least, name)):10} {rate}{mark}"))
    lines += [_row("bound", f"{found.images * found.batch_devices / seconds:,.0f} images/s on the slice")]
    return [*lines, "    What the peak rates allow if all else hides behind the longest: a bound, not a forecast."]


def memory(found: Program) -> dict[str, int]:
    """Bytes of one device by kind; only what is known before compiling, where the compiler refused the program."""
    kinds = dict(found.inputs)
    if not found.needs.refused:
        padding = (found.needs.arguments or 0) - sum(found.inputs.values())
        if padding > 0:
            kinds["their padding"] = padding
        kinds["temporaries"] = found.needs.temporaries or 0
        kinds["results not in place"] = found.needs.results or 0
    if found.beside:
        kinds["rest of the training state"] = found.beside
    return kinds


def verdict(found: Program, slice: Slice) -> str:
    """Whether a program fits, and by how much."""
    limit = slice.device_memory
    if found.needs.refused and found.total is None:
        return f"does not fit: {found.needs.refused}"
    total = found.total or 0
    share = f"{100 * total / limit:.0f}% of the {gibibytes(limit)} that a program may take"
    return f"{share}: {'fits' if found.fits(limit) else f'does not fit, {gibibytes(total - limit)} too much'}"


def largest(found: Sequence[buffers.Buffer], *, refused: bool = False) -> list[str]:
    """Returns the lines about the largest arrays."""
    if not found:
        return ["  the compiler names no arrays"] if refused else []
    head = "  largest allocations, by the compiler; layers by the arrays' types" if refused else "  largest arrays"
    lines = [head]
    for x in found:
        where = f"{x.layer or 'not named'}{', backward' if x.backward else ''}"
        lines.append(f"    {gibibytes(x.bytes):>10}  {x.shape:28} {where}")
    return lines


def as_json(found: Program, slice: Slice, totals: Sequence[collectives.Total], least: bounds.Bounds) -> dict[str, Any]:
    """Returns the same figures for other programs: bytes, FLOPs and seconds of one device."""
    longest = least.longest[1]
    return {
        "fits": found.fits(slice.device_memory),
        "images": found.images,
        "memory": memory(found),
        "total_bytes": found.total,
        "refused": found.needs.refused,
        "model_flops": found.model_flops,
        "compiler_flops": found.compiler_flops,
        "hbm_bytes": found.needs.moved,
        "collectives": {
            x.kind: {"count": x.count, "bytes": x.bytes, "sent_bytes": x.sent, "seconds": x.seconds} for x in totals
        },
        "seconds": {"compute": least.compute, "memory": least.memory, "network": least.network},
        "bound_images_per_s": found.images * found.batch_devices / longest,
        "largest": [{"bytes": x.bytes, "shape": x.shape, "layer": x.layer} for x in found.largest],
        "compile_seconds": round(found.seconds, 1),
    }


def _row(name: str, value: str) -> str:
    return f"    {name:{_WIDTH}}{value}"
