"""Compiles relative attention in the forms of the literature and reads what memory each needs; nothing is run.

COMMAND: python experiments/relative_memory/run.py

Writes results.csv and memory.png beside this file and prints the tables last.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from aaconv import ops
from aaconv.bench import report

HERE = Path(__file__).resolve().parent
SEQUENCES = ((256,), (512,), (1024,), (2048,), (4096,))
MAPS = ((14, 14), (28, 28), (56, 56))
HEADS = 8
DEPTHS = (20, 64)
NONE = "no positions"
WORK = ("forward", "forward + backward")
# XLA's CPU compiler hands softmax and the products around it to a library where it can, and does not count what the
# library allots: attention without positions then seems to hold no map at all.
OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of relative attention, for one image in float32.

    Attributes:
      arguments: ``(space, d)`` -> shapes of its arguments.
      attend: from the arguments to the output.
      counted: ``(space, d)`` -> numbers in the arrays of the published algorithm, beyond content logits, softmax and
        parameters: those that pass on a pair's or a query's positions.
    """

    arguments: Callable[[Sequence[int], int], list[tuple[int, ...]]]
    attend: Callable[..., jax.Array]
    counted: Callable[[Sequence[int], int], int]


@dataclasses.dataclass
class Row:
    """The columns of the CSV file, after the machine's; sizes in bytes.

    Attributes:
      temporaries: beside arguments and results, of the compiled program.
      extra: of those, what attention without positions does not need.
      counted: in the arrays of the algorithm, see `Form`; forward only.
    """

    space: str
    positions: int
    n: int
    d: int
    form: str
    work: str
    temporaries: int | None = None
    extra: int | None = None
    counted: int | None = None
    reason: str = ""


def _maps(space: Sequence[int], d: int) -> list[tuple[int, ...]]:
    return [(*space, HEADS, d)] * 3


def _with_tables(space: Sequence[int], d: int) -> list[tuple[int, ...]]:
    return _maps(space, d) + [(2 * size - 1, d) for size in space]


def _relative(implementation: str, q, k, v, *rel) -> jax.Array:
    return ops.relative_attention(q, k, v, rel or None, spatial_ndim=q.ndim - 2, implementation=implementation)


def _skewed(space: Sequence[int], d: int) -> int:
    """By offset, by position and tiled to a whole map, for each axis; one axis has nothing to tile."""
    pixels = math.prod(space)
    tiled = pixels**2 * len(space) if len(space) > 1 else 0
    return HEADS * (sum(pixels * (2 * size - 1) + pixels * size for size in space) + tiled)


def _by_offset_and_position(space: Sequence[int], d: int) -> int:
    return HEADS * 2 * math.prod(space) ** 2


def _explicit(space: Sequence[int], d: int) -> int:
    return math.prod(space) ** 2 * d


def _factorised(space: Sequence[int], d: int) -> int:
    """A number for each query and key row or column, and the tables' rows by query and key position."""
    return HEADS * math.prod(space) * sum(space) + d * sum(size**2 for size in space)


def forms(space: Sequence[int]) -> dict[str, Form]:
    """Returns the forms that serve a sequence or a map."""
    relative = {
        "skew": _skewed,
        "factorised": _factorised,
        # The tile's own positions are counted as none: they do not grow with the map.
        "blockwise": lambda space, d: 0,
    }
    found = {NONE: Form(_maps, partial(_relative, "factorised"), lambda space, d: 0)}
    if len(space) == 1:
        found["explicit (Shaw)"] = Form(_with_tables, ops.shaw_attention, _explicit)
        causal = lambda space, d: [*_maps(space, d), (*space, d)]
        found["skew, causal (Music Transformer)"] = Form(
            causal, ops.music_transformer_attention, _by_offset_and_position
        )
    else:
        found["explicit (Shaw)"] = Form(_with_tables, partial(_relative, "explicit"), _explicit)
    return found | {name: Form(_with_tables, partial(_relative, name), count) for name, count in relative.items()}


def temporaries(form: Form, space: Sequence[int], d: int, work: str) -> int:
    """Compiles for one image in float32 and returns the bytes that the program allots beside arguments and results."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in form.arguments(space, d)]

    def gradient(cotangent, *arguments):
        out, pull = jax.vjp(form.attend, *arguments)
        return out, pull(cotangent)

    if work == WORK[0]:
        lowered = jax.jit(form.attend).lower(*arguments)
    else:
        lowered = jax.jit(gradient).lower(arguments[2], *arguments)
    analysis: Any = lowered.compile(OPTIONS).memory_analysis()
    return analysis.temp_size_in_bytes


def measure(spaces: Sequence[Sequence[int]], output: Path) -> list[Row]:
    rows: list[Row] = []
    machine = report.machine()
    columns = [*machine, *(field.name for field in dataclasses.fields(Row))]
    with report.Csv(output / "results.csv", columns) as file:
        for space in spaces:
            for d in DEPTHS:
                base: dict[str, int] = {}
                for name, form in forms(space).items():
                    for work in WORK:
                        row = Row("x".join(map(str, space)), math.prod(space), HEADS, d, name, work)
                        if work == WORK[0]:
                            row.counted = 4 * form.counted(space, d)
                        print(f"{row.space} d {d} {name}, {work}", file=sys.stderr, flush=True)
                        try:
                            row.temporaries = temporaries(form, space, d, work)
                            base.setdefault(work, row.temporaries)  # attention without positions comes first
                            row.extra = row.temporaries - base[work]
                        except (MemoryError, RuntimeError) as error:
                            row.reason = report.first_line(error)
                        rows.append(row)
                        file.write({**machine, **dataclasses.asdict(row)})
    print(f"written {output / 'results.csv'}")
    return rows


def print_tables(rows: Sequence[Row]) -> None:
    for title, maps in (("Sequences", False), ("Maps", True)):
        chosen = [row for row in rows if ("x" in row.space) is maps]
        spaces = list(dict.fromkeys(row.space for row in chosen))
        for work in WORK:
            print(f"\n{title}, n = {HEADS}, {work}: temporary memory in MB (10^6 bytes)\n")
            lines = []
            for d in DEPTHS:
                for name in dict.fromkeys(row.form for row in chosen):
                    of_form = {row.space: row for row in chosen if (row.form, row.d, row.work) == (name, d, work)}
                    lines.append([name, str(d), *(report.megabytes(of_form[space].temporaries) for space in spaces)])
            print(report.table(["form", "d", *spaces], lines))
    print("\nForward, beyond attention without positions: compiled / counted, in MB\n")
    spaces = list(dict.fromkeys(row.space for row in rows))
    lines = []
    for d in DEPTHS:
        for name in dict.fromkeys(row.form for row in rows if row.form != NONE):
            of_form = {row.space: row for row in rows if (row.form, row.d, row.work) == (name, d, WORK[0])}
            cells = [of_form.get(space) for space in spaces]
            texts = ["" if c is None else f"{_signed(c.extra)} / {report.megabytes(c.counted)}" for c in cells]
            lines.append([name, str(d), *texts])
    print(report.table(["form", "d", *spaces], lines))


def _signed(size: int | None) -> str:
    return "-" if size is None else f"{'-' if size < 0 else ''}{report.megabytes(abs(size))}"


def draw(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    names = list(dict.fromkeys(row.form for row in rows))
    for axis, maps in zip(axes, (False, True), strict=True):
        for name in names:
            points = [
                (row.positions, row.temporaries / 1e6)
                for row in rows
                if ("x" in row.space) is maps
                and (row.form, row.d, row.work) == (name, 64, WORK[1])
                and row.temporaries is not None
            ]
            if points:
                style: dict[str, Any] = (
                    {"color": "black", "linestyle": "--"} if name == NONE else {"color": f"C{names.index(name)}"}
                )
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.4, label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("positions")
        axis.set_title("square maps" if maps else "sequences", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("temporaries, forward + backward, MB")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"written {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.csv and memory.png")
    parser.add_argument("--largest", type=int, default=4096, help="leave out what has more positions")
    args = parser.parse_args()
    spaces = [space for space in (*SEQUENCES, *MAPS) if math.prod(space) <= args.largest]
    rows = measure(spaces, args.out)
    draw(rows, args.out / "memory.png")
    print(report.describe(report.machine()))
    print_tables(rows)


if __name__ == "__main__":
    main()
