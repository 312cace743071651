"""Trains the plain and the augmented narrow network, three seeds each, and writes the table and the curves.

COMMAND: python experiments/cifar100_small/run.py --workdir runs/cifar100_small

What is finished is not trained again, and an interrupted run goes on from its checkpoint. The table goes to
results.csv and the picture to curves.png, beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

from aaconv import config as config_lib, train

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "cifar100_small.py"
NETWORKS = ("plain", "aa")
SEEDS = (0, 1, 2)
METRICS = ("eval/accuracy", "eval/top5", "eval/loss", "train/accuracy", "train/loss")


def run_all(workdir: Path, overrides: list[str]) -> list[dict]:
    results = []
    for seed in SEEDS:
        for network in NETWORKS:
            config = config_lib.load(f"{CONFIG}:{network}", [f"seed={seed}", *overrides])
            metrics = train.train(config, workdir / f"{network}_seed{seed}")
            results.append({"network": network, "seed": seed, **{name: metrics.get(name) for name in METRICS}})
    return results


def write_table(results: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    for network in NETWORKS:
        for name in ("eval/accuracy", "eval/top5"):
            values = [100 * r[name] for r in results if r["network"] == network]
            print(f"{network:6} {name:14} mean {statistics.mean(values):.2f}  deviation {statistics.stdev(values):.2f}")


def draw_curves(workdir: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for network, colour in zip(NETWORKS, ("#666666", "#c0392b"), strict=True):
        for seed in SEEDS:
            lines = (workdir / f"{network}_seed{seed}" / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            label = {"plain": "WRN-10-1", "aa": "AA-WRN-10-1"}[network] if seed == 0 else None
            for axis, name in zip(axes, ("train/loss", "eval/accuracy"), strict=True):
                points = [(r["epoch"], r[name]) for r in rows if name in r]
                x, y = zip(*points, strict=True)
                scale = 100 if name == "eval/accuracy" else 1
                axis.plot(x, [scale * v for v in y], color=colour, label=label, linewidth=1.2, alpha=0.8)
    for axis, title in zip(axes, ("training loss", "top-1 on the 10,000 test images, %"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.csv and curves.png")
    parser.add_argument("overrides", nargs="*", help="config overrides for every run, e.g. num_epochs=20.0")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = run_all(args.workdir, args.overrides)
    write_table(results, args.out / "results.csv")
    draw_curves(args.workdir, args.out / "curves.png")
    print(f"wrote {args.out / 'results.csv'} and {args.out / 'curves.png'}")


if __name__ == "__main__":
    main()
