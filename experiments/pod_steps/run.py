"""Compiles AA-ResNet-50's training step for slices of TPUs, and writes the pages and results.csv.

COMMAND: python experiments/pod_steps/run.py [TOPOLOGY ...]

Needs libtpu and no TPU. Minutes to an hour a slice, by the machine; each row is written when it is known, and a slice
that has one already is left out, so that the same command goes on.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CONFIG = "configs/imagenet_resnet.py:aa_resnet50"
IMAGES = 128  # a chip
CHIPS = {"v5e:1x1": 1, "v5e:4x4": 16, "v5e:16x16": 256, "v5p:2x2x1": 4, "v5p:4x4x4": 64}
COLUMNS = (
    "topology chips images_a_chip batch_size fits total_bytes parameters_bytes optimiser_bytes temporaries_bytes "
    "padding_bytes model_flops compiler_flops hbm_bytes all_reduces all_reduce_bytes all_reduce_s other_collectives "
    "compute_s memory_s network_s bound_images_per_s refused compile_s "
    "date revision jax jaxlib libtpu cpu cores"
).split()


def main(topologies: list[str]) -> None:
    file = HERE / "results.csv"
    for topology in topologies or CHIPS:
        rows = list(csv.DictReader(file.open())) if file.exists() else []
        if any(row["topology"] == topology for row in rows):
            print(f"{topology}: has its row in {file.name}")
            continue
        rows.append(measure(topology))
        rows.sort(key=lambda row: list(CHIPS).index(row["topology"]))
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def measure(topology: str) -> dict[str, object]:
    batch = IMAGES * CHIPS[topology]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        words = ["compile", "--config", CONFIG, "--topology", topology, f"--config.batch_size={batch}", "--train-only"]
        words += [f"--config.eval_batch_size={batch}", "--json", str(figures)]
        words += ["--no-largest-batch"]  # which takes up to four compilations more
        done = subprocess.run(
            [sys.executable, "-m", "aaconv", *words], cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True
        )
        if done.returncode not in (0, 4):
            sys.exit(done.returncode)
        (HERE / f"{topology.replace(':', '_')}.txt").write_text(done.stdout)
        found = json.loads(figures.read_text())
    step = found["programs"]["training step"]
    memory, told = step["memory"], step["collectives"]
    reduced = told.get("all-reduce", {"count": 0, "bytes": 0, "seconds": 0.0})
    row = {
        "topology": topology,
        "chips": found["chips"],
        "images_a_chip": step["images"],
        "batch_size": batch,
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
        "other_collectives": sum(x["count"] for kind, x in told.items() if kind != "all-reduce"),
        **{f"{key}_s": value for key, value in step["seconds"].items()},
        "compile_s": step["compile_seconds"],
    }
    return {**row, **{key: found.get(key) for key in COLUMNS[-7:]}}


if __name__ == "__main__":
    main(sys.argv[1:])
