"""Compiles AA-ResNet-50's training step for slices of TPUs, and writes the pages and results.csv.

COMMAND: python experiments/pod_steps/run.py [CASE ...]

Needs libtpu and no TPU. Minutes to an hour a case, by the machine; each row is written when it is known, and a case
that has one already is left out, so that the same command goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CONFIG = "configs/imagenet_resnet.py:aa_resnet50"
IMAGES = 128  # a chip


@dataclasses.dataclass(frozen=True)
class Case:
    """A slice, the images of a step on all of it, and what else differs from the config."""

    topology: str
    batch_size: int
    overrides: tuple[str, ...] = ()


LARGE = ("data.image_size=1024", "model.pooled_stages=()")  # stage 2 attends at 128 x 128 then
CASES = {
    "v5e_1x1": Case("v5e:1x1", IMAGES),
    "v5e_4x4": Case("v5e:4x4", 16 * IMAGES),
    "v5e_16x16": Case("v5e:16x16", 256 * IMAGES),
    "v5p_2x2x1": Case("v5p:2x2x1", 4 * IMAGES),
    "1024_pixels_v5e_1x1": Case("v5e:1x1", 48, LARGE),
    "1024_pixels_v5e_2x4": Case("v5e:2x4", 48, (*LARGE, "mesh.spatial=8")),
}
COLUMNS = (
    "case topology overrides chips images_a_chip batch_size fits total_bytes parameters_bytes optimiser_bytes "
    "temporaries_bytes padding_bytes model_flops compiler_flops hbm_bytes all_reduces all_reduce_bytes all_reduce_s "
    "other_collectives other_bytes compute_s memory_s network_s bound_images_per_s refused compile_s "
    "date revision jax jaxlib libtpu cpu cores"
).split()


def main(names: list[str]) -> None:
    file = HERE / "results.csv"
    for name in names or CASES:
        rows = list(csv.DictReader(file.open())) if file.exists() else []
        if any(row["case"] == name for row in rows):
            print(f"{name}: has its row in {file.name}")
            continue
        rows.append(measure(name, CASES[name]))
        rows.sort(key=lambda row: list(CASES).index(row["case"]))
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def measure(name: str, case: Case) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        sizes = (f"batch_size={case.batch_size}", f"eval_batch_size={case.batch_size}")
        words = ["compile", "--config", CONFIG, "--topology", case.topology, "--train-only", "--json", str(figures)]
        words += [f"--config.{override}" for override in (*case.overrides, *sizes)]
        words += ["--no-largest-batch"]  # which takes up to four compilations more
        done = subprocess.run(
            [sys.executable, "-m", "aaconv", *words], cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True
        )
        if done.returncode not in (0, 4):
            sys.exit(done.returncode)
        (HERE / f"{name}.txt").write_text(done.stdout)
        return row_of(name, case, json.loads(figures.read_text()))


def row_of(name: str, case: Case, found: dict) -> dict[str, object]:
    """The columns, from what `aaconv compile --json` wrote."""
    step = found["programs"]["training step"]
    memory, told = step["memory"], step["collectives"]
    nothing = {"count": 0, "bytes": 0, "seconds": 0.0}
    reduced = told.get("all-reduce", nothing)
    others = [x for kind, x in told.items() if kind != "all-reduce"]
    row = {
        "case": name,
        "topology": case.topology,
        "overrides": " ".join(case.overrides),
        "chips": found["chips"],
        "images_a_chip": step["images"],
        "batch_size": case.batch_size,
        "fits": step["fits"],
        "total_bytes": step["total_bytes"],
        "parameters_bytes": memory["parameters"],
        "optimiser_bytes": memory["optimiser state"],
        "temporaries_bytes": memory.get("temporaries"),
        "padding_bytes": memory.get("their padding"),
        **{key: step[key] for key in ("model_flops", "compiler_flops", "hbm_bytes", "bound_images_per_s", "refused")},
        "all_reduces": reduced["count"],
        "all_reduce_bytes": reduced["bytes"],
        "all_reduce_s": reduced["seconds"],
        "other_collectives": sum(x["count"] for x in others),
        "other_bytes": sum(x["bytes"] for x in others),
        **{f"{key}_s": value for key, value in step["seconds"].items()},
        "compile_s": step["compile_seconds"],
    }
    return {**row, **{key: found.get(key) for key in COLUMNS[-7:]}}


if __name__ == "__main__":
    main(sys.argv[1:])
