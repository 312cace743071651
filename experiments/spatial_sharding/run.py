"""Compiles a training step on large images for TPU chips that are not here: one chip, and eight that share each image.

COMMAND: python experiments/spatial_sharding/run.py

The step is a whole one: forward pass, loss, gradients and an update by momentum, parameters and momentum donated.
Nothing is run. Writes results.csv beside this file and prints the table last. It needs the TPU compiler: pip install
libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aaconv import models
from aaconv.bench import ahead, report

HERE = Path(__file__).resolve().parent
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclasses.dataclass
class Row:
    """The columns of the CSV file, after the machine's; bytes a chip.

    Attributes:
      stages: which attend.
      size: pixels of an image's side.
      batch: images in all.
      chips: that share each image.
      implementation: of attention; "" where it was chosen.
      fits: whether the compiler accepts the program for a chip's memory.
      total: arguments, results and temporaries; what would be needed where it does not fit.
      collectives: instructions of each kind, and the megabytes of their results; those in loops once.
    """

    network: str
    stages: str
    size: int
    batch: int
    chips: int
    implementation: str
    fits: bool = False
    total: int | None = None
    arguments: int | None = None
    temporaries: int | None = None
    collectives: str = ""
    reason: str = ""


def compile_step(row: Row, devices: tuple[Any, ...], **overrides: Any) -> Row:
    """Compiles a training step for the first chips of a topology and fills in what it needs."""
    mesh = Mesh(
        np.array(devices[: row.chips]).reshape(1, row.chips), ("data", "spatial"), axis_types=(AxisType.Auto,) * 2
    )
    images_split, labels_split, whole = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "spatial"), ("data",), ())
    )
    stages = tuple(int(stage) for stage in row.stages.split())
    model = models.create(
        row.network, dtype=jnp.bfloat16, stages=stages, implementation=row.implementation or None, **overrides
    )
    optimiser = optax.sgd(0.1, momentum=0.9)

    def step(variables, momentum, images, labels):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]}, images, train=True, mutable=["batch_stats"]
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
            return each.mean(), updated["batch_stats"]

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, momentum = optimiser.update(gradients, momentum)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": statistics}, momentum, value

    images = jax.ShapeDtypeStruct((row.batch, row.size, row.size, 3), jnp.bfloat16, sharding=images_split)
    labels = jax.ShapeDtypeStruct((row.batch,), jnp.int32, sharding=labels_split)
    lay = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    with ahead.tracing_for(mesh):
        init = partial(model.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype))
        variables = jax.tree.map(lay, dict(variables))
        momentum = jax.tree.map(lay, jax.eval_shape(optimiser.init, variables["params"]))
        lowered = jax.jit(step, donate_argnums=(0, 1)).trace(variables, momentum, images, labels)
        lowered = lowered.lower(lowering_platforms=("tpu",))
        compiled, needs = ahead.account(lowered.compile)
    row.fits, row.total, row.reason = not needs.refused, needs.total, needs.refused
    row.arguments, row.temporaries = needs.arguments, needs.temporaries
    if compiled is not None:
        row.collectives = collectives(compiled.as_text())
    return row


def collectives(program: str) -> str:
    """Counts a program's collectives and their results' megabytes: ``all-gather 24 x, 100 MB; ...``."""
    found: dict[str, list[int]] = {}
    for shapes, kind in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", program):
        sizes = [
            BYTES.get(dtype, 4) * int(np.prod([int(size) for size in dims.split(",") if size]))
            for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
        ]
        found.setdefault(kind, []).append(max(sizes, default=0))
    return "; ".join(f"{kind} {len(sizes)} x, {sum(sizes) / 1e6:.1f} MB" for kind, sizes in sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.csv")
    parser.add_argument("--topology", default="v5e:2x4", help="chips that the step is compiled for")
    parser.add_argument("--network", default="aa_resnet50")
    parser.add_argument("--stages", nargs="+", default=["2 3 4"], help="which attend, e.g. '2 3 4' '1 2 3 4'")
    parser.add_argument("--size", type=int, default=1024, help="pixels of an image's side")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="images in all")
    parser.add_argument("--chips", type=int, nargs="+", default=[1, 8], help="that share each image")
    parser.add_argument("--implementation", nargs="+", default=[""], help="of attention; '' to have it chosen")
    args = parser.parse_args()
    devices = ahead.topology_devices(args.topology)
    machine = report.machine(f"{devices[0].device_kind} ({args.topology})")
    columns = [*machine, *(field.name for field in dataclasses.fields(Row))]
    rows = []
    with report.Csv(args.out / "results.csv", columns) as file:
        for stages in args.stages:
            for implementation in args.implementation:
                for batch in args.batch:
                    for chips in args.chips:
                        row = Row(args.network, stages, args.size, batch, chips, implementation)
                        rows.append(compile_step(row, devices))
                        file.write({**machine, **dataclasses.asdict(rows[-1])})
                        print(rows[-1], flush=True)
    print(report.describe(machine))
    gigabytes = lambda size: "-" if size is None else f"{size / 1e9:.2f}"
    print(
        report.table(
            ("stages", "attention", "batch", "chips", "fits", "GB a chip", "of them temporaries", "collectives"),
            [
                (
                    row.stages,
                    row.implementation or "chosen",
                    str(row.batch),
                    str(row.chips),
                    "yes" if row.fits else f"no: {row.reason}",
                    gigabytes(row.total),
                    gigabytes(row.temporaries),
                    row.collectives or "-",
                )
                for row in rows
            ],
            text=2,
        )
    )


if __name__ == "__main__":
    main()
