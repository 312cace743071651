"""Trains the plain and the augmented narrow network, three seeds each, and writes the table and the curves.

COMMAND: python experiments/cifar100_small/run.py --workdir runs/cifar100_small

What is finished is not trained again, and an interrupted run goes on from its checkpoint. The table goes to
results.csv and the picture to curves.png, beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import seeds  # noqa: E402

NETWORKS = ("plain", "aa")


def draw_curves(workdir: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for network, colour in zip(NETWORKS, ("#666666", "#c0392b"), strict=True):
        for seed in seeds.SEEDS:
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
    arguments = seeds.parse(__doc__, HERE)
    variants: dict[str, seeds.Variant] = {network: (f"cifar100_small.py:{network}", []) for network in NETWORKS}
    results = seeds.run_all(variants, arguments)
    seeds.write(results, arguments.out / "results.csv")
    draw_curves(arguments.workdir, arguments.out / "curves.png")
    print(f"written {arguments.out / 'results.csv'} and {arguments.out / 'curves.png'}\n")
    print("| network | top-1 | top-5 |\n|---|---:|---:|")
    for network in NETWORKS:
        cells = (seeds.percent(results, network, f"eval/{metric}") for metric in ("accuracy", "top5"))
        print(f"| {network} | {' | '.join(map(seeds.spoken, cells))} |")


if __name__ == "__main__":
    main()
