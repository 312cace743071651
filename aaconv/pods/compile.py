"""``aaconv compile``: the programs of a training run, compiled for a slice that is not here, and whether they fit."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aaconv import parallel, train
from aaconv.bench import report
from aaconv.config import ConfigDict
from aaconv.pods import bounds, collectives, page, programs
from aaconv.pods.chips import Slice, parse_topology
from aaconv.pods.programs import EVALUATION, TRAINING, Program

Note = Callable[[str], None]
COMPILATIONS = 5
"""At most, to find the largest batch."""
GROWTH = 64
"""Times the largest batch so far, where a larger one takes no more memory than a smaller."""


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch of one program, in images a device; None where none was found to fit, or not to.

    Attributes:
      fits: compiled, and fits.
      refused: compiled, and does not fit.
      model: by a line through two compilations.
    """

    fits: int | None
    refused: int | None
    model: int


def run(
    config: ConfigDict,
    topology: str,
    *,
    training: bool = True,
    evaluation: bool = True,
    largest_batch: bool = True,
    json_file: str = "",
    note: Note = lambda text: print(text, file=sys.stderr, flush=True),
) -> bool:
    """Compiles a config's steps for a slice with the real TPU compiler, and prints what they need.

    Args:
      config: from `aaconv.config.load`; its data set need not be prepared here.
      topology: generation and layout, e.g. ``v5e:16x16``.
      training: whether to compile the training step.
      evaluation: whether to compile the evaluation step.
      largest_batch: whether to look for the largest batch that fits, which takes a few compilations more.
      json_file: to write the figures to as well.
      note: gets lines of progress.

    Returns:
      Whether all of it fits.

    Raises:
      ValueError: there is no such slice, libtpu is not installed, or the config cannot be run on the slice.
    """
    slice = parse_topology(topology)
    devices = programs.topology_devices(slice)
    built = programs.build(config, devices)
    print("\n".join(head(built, slice)), flush=True)
    found: dict[str, Any] = {}
    fits = True
    for name in [TRAINING] * training + [EVALUATION] * evaluation:
        note(f"compiling the {name} for {slice.devices} {slice.chip.device}{'s' * (slice.devices > 1)} ...")
        program = programs.compile_program(built, name, alone=not training)
        totals = collectives.totals(program.collectives, slice, programs.coordinates(built))
        moved = program.needs.moved
        least = bounds.bounds(program.model_flops, moved, totals, slice)
        print("\n" + "\n".join(page.program(program, slice, totals, least)), flush=True)
        found[name] = page.as_json(program, slice, totals, least)
        fits = fits and program.fits(slice.device_memory)
        if json_file:  # what is known, should the rest be interrupted
            _write(json_file, config, slice, found, fits)
        if largest_batch and name == TRAINING:
            answer = find_largest(config, built, program, slice, devices, note)
            print("\n".join(_say_largest(answer, built, slice)), flush=True)
            found[name]["largest_batch"] = dataclasses.asdict(answer)
    if not fits:
        print("\nIt does not fit. What helps:")
        print("\n".join(f"  - {remedy}" for remedy in page.remedies(slice.chips, config)), flush=True)
    if json_file:
        _write(json_file, config, slice, found, fits)
        note(f"written {json_file}")
    return fits


def head(built: train.Run, slice: Slice) -> list[str]:
    """Returns the lines about the slice, the mesh and the network."""
    config, chip, mesh = built.config, slice.chip, built.mesh
    hosts = f"{slice.hosts} host{'s' * (slice.hosts > 1)}"
    memory = f"{page.gibibytes(slice.device_memory)} of HBM a {chip.device} for a program"
    cores = ", 2 cores each, compiled for as 2 devices" if chip.cores > 1 else ""
    chips = f"{slice.chips:,} chip{'s' * (slice.chips > 1)} on {hosts}{cores}, {memory}"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    with programs.tracing(built):
        network = programs.summary_of(built)
    images = "x".join(map(str, built.info.image_shape))
    machine = report.machine()
    versions = ", ".join(f"{name} {machine[name]}" for name in ("jax", "libtpu") if name in machine)
    rows = [
        ("slice", f"{slice.name}, {chips}"),
        ("mesh", axes),
        ("network", f"{config.model.name}, {network.parameters / 1e6:.2f}M parameters, {config.dtype}"),
        *[("attention", line) for line in network.computed_by()],
        ("data", f"{config.data.name}, images {images}, {built.info.num_classes} classes"),
        (
            "batch",
            f"{config.batch_size:,} images a step"
            + (f" in {config.accumulate_steps} parts" if config.accumulate_steps > 1 else "")
            + f", {config.eval_batch_size:,} in evaluation",
        ),
        ("compiler", f"{versions}; nothing was run"),
    ]
    return [f"{name:11}{value}" for name, value in rows]


def find_largest(
    config: ConfigDict, built: train.Run, first: Program, slice: Slice, devices: Sequence[Any], note: Note
) -> Largest:
    """Looks for the largest batch whose training step fits.

    Memory is taken for a line over the batch, drawn through two compilations; what it promises is compiled, and
    so is the next size. The compiler trades memory for time where it is short, so that the line may promise too little.
    """
    unit = parallel.batch_devices(built.mesh) * config.accumulate_steps
    limit = slice.device_memory
    tried: dict[int, Program] = {config.batch_size // unit: first}

    def compile(images: int) -> Program:
        if images not in tried:
            note(
                f"compiling the training step with {images * config.accumulate_steps} images a {slice.chip.device} ..."
            )
            other = config.copy_and_resolve_references()
            other.batch_size = images * unit
            tried[images] = programs.compile_program(programs.build(other, devices), TRAINING)
        return tried[images]

    start = config.batch_size // unit
    compile(start // 2 if start > 1 else 2)
    model = _line(tried, limit)
    images = model
    while len(tried) < COMPILATIONS:
        fitting = max((n for n, x in tried.items() if x.fits(limit)), default=0)
        beyond = [n for n, x in tried.items() if not x.fits(limit)]
        refused = min(beyond, default=None)
        if fitting and len(beyond) > 1:  # twice too much: the line of so small a batch says nothing so far away
            images = min(images, math.isqrt(fitting * min(beyond)))
        size = _granule(images)
        images = max(1, images // size * size)
        if images <= fitting:
            images = fitting + size
        if refused is not None and images >= refused:
            images = min(refused - 1, max(fitting + 1, refused - size))
        if images <= fitting or images in tried:
            break
        # One granule above what fits is what shows that no more does.
        images = images + size if compile(images).fits(limit) else _line(tried, limit)
    fitting = [n for n, x in tried.items() if x.fits(limit)]
    refused = [n for n, x in tried.items() if not x.fits(limit) and n > max(fitting, default=0)]
    each = config.accumulate_steps
    return Largest(
        fits=max(fitting) * each if fitting else None,
        refused=min(refused) * each if refused else None,
        model=model * each,
    )


def _line(tried: dict[int, Program], limit: int) -> int:
    """Where the line through the two compilations nearest to the limit reaches it."""
    known = sorted((abs((x.total or 0) - limit), n, x.total) for n, x in tried.items() if x.total is not None)
    if len(known) < 2:
        return max(1, min(tried) // 2)
    (_, a, low), (_, b, high) = known[:2]
    slope = (high - low) / (b - a)
    # A batch that takes no memory yet says nothing of larger ones.
    return max(1, int(a + (limit - low) / slope)) if slope > 0 else GROWTH * max(tried)


def _granule(images: int) -> int:
    """Steps of the search: a power of two, about a sixteenth."""
    return 2 ** max(0, images.bit_length() - 5)


def _say_largest(answer: Largest, built: train.Run, slice: Slice) -> list[str]:
    devices, device = parallel.batch_devices(built.mesh), slice.chip.device
    if answer.fits is None:
        text = f"none was found to fit, down to {answer.refused} images a {device}"
    else:
        text = f"batch_size={answer.fits * devices:,}, {answer.fits:,} images a {device}: compiled, and fits"
        if answer.refused is not None:
            text += f"; {answer.refused:,} a {device} do not"
    return [f"  largest batch                 {text}", f"    (a line through two compilations says {answer.model:,})"]


def _write(path: str, config: ConfigDict, slice: Slice, found: dict[str, Any], fits: bool) -> None:
    content = {
        **report.machine(f"{slice.name}, compiled ahead of time"),
        "topology": slice.name,
        "chips": slice.chips,
        "device_memory_bytes": slice.device_memory,
        "fits": fits,
        "programs": found,
        "config": json.loads(train.to_json(config)),
    }
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written ({error.strerror}): name another file") from error
