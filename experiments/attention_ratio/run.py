"""Attention ratio kappa = upsilon from 0 to 1, with and without relative positions: the form of the paper's figure 4.

COMMAND: python experiments/attention_ratio/run.py --workdir runs/ratio --jobs 2

A narrow Wide-ResNet, three seeds, on a few of the digits, or with `--config cifar100_small.py:aa` on CIFAR-100. The
table goes to results.csv and the picture to attention_ratio.png, beside this file; the table is printed last.
experiments/position_encodings takes the runs that it shares from the same --workdir.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import seeds  # noqa: E402

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
ENCODINGS = {"relative": "relative positions", "none": "no positions"}


def name(ratio: float, encoding: str) -> str:
    return f"ratio{ratio:g}_{encoding}" if ratio else "plain"


def variants(base: seeds.Variant) -> dict[str, seeds.Variant]:
    config, overrides = base
    found: dict[str, seeds.Variant] = {}
    for ratio in RATIOS:
        for encoding in ENCODINGS:
            settings = ["model.kappa=None", "model.upsilon=None", f"model.attention_ratio={ratio}"]
            settings.append(f"model.position_encoding={encoding}")
            found.setdefault(name(ratio, encoding), (config, [*overrides, *settings]))
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"| kappa = upsilon | {' | '.join(ENCODINGS.values())} | difference |", "|---|---:|---:|---:|"]
    for ratio in RATIOS:
        cells = [seeds.percent(results, name(ratio, encoding)) for encoding in ENCODINGS]
        cost = f"{cells[0][0] - cells[1][0]:+.2f}" if ratio else ""
        lines.append(f"| {ratio:g} | {seeds.spoken(cells[0])} | {seeds.spoken(cells[1])} | {cost} |")
    return "\n".join(lines)


def draw(results: Sequence[Mapping[str, Any]], path: Path, images: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for encoding, colour, marker in zip(ENCODINGS, ("#e4572e", "#4c78a8"), "os", strict=True):
        means, deviations = zip(*(seeds.percent(results, name(ratio, encoding)) for ratio in RATIOS), strict=True)
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6, "capsize": 3}
        axes.errorbar(RATIOS, means, deviations, label=ENCODINGS[encoding], **style)
    axes.set(xlabel="attention ratio, kappa = upsilon", xticks=RATIOS)
    axes.set_title(f"top-1 on {images}, %", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    arguments = seeds.parse(__doc__, HERE)
    results = seeds.run_all(variants(seeds.base(arguments, seeds.FEW_DIGITS)), arguments)
    seeds.write(results, arguments.out / "results.csv")
    draw(results, arguments.out / "attention_ratio.png", arguments.config or "1,510 digits")
    print(f"written {arguments.out / 'results.csv'} and {arguments.out / 'attention_ratio.png'}\n")
    print(table(results))


if __name__ == "__main__":
    main()
