"""Position encodings of an augmented network, in the form of the paper's table: none, sines, CoordConv, relative.

COMMAND: python experiments/position_encodings/run.py --workdir runs/ratio --jobs 2

A narrow Wide-ResNet with kappa = upsilon = 0.25, three seeds, on a few of the digits, or with
`--config cifar100_small.py:aa` on CIFAR-100. The table goes to results.csv beside this file and is printed last. In the
--workdir of experiments/attention_ratio the runs without and with relative positions are there already.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import seeds  # noqa: E402

ENCODINGS = {
    "none": "none",
    "sinusoid": "two-dimensional sines",
    "coordconv": "CoordConv",
    "relative": "relative",
}
RATIO = 0.25


def main() -> None:
    arguments = seeds.parse(__doc__, HERE)
    config, overrides = seeds.base(arguments, seeds.FEW_DIGITS)
    settings = [*overrides, "model.kappa=None", "model.upsilon=None", f"model.attention_ratio={RATIO}"]
    variants: dict[str, seeds.Variant] = {
        f"ratio{RATIO:g}_{name}": (config, [*settings, f"model.position_encoding={name}"]) for name in ENCODINGS
    }
    results = seeds.run_all(variants, arguments)
    seeds.write(results, arguments.out / "results.csv")
    print(f"written {arguments.out / 'results.csv'}\n")
    print("| position encoding | top-1 | top-5 |\n|---|---:|---:|")
    for name, text in ENCODINGS.items():
        cells = (seeds.percent(results, f"ratio{RATIO:g}_{name}", f"eval/{metric}") for metric in ("accuracy", "top5"))
        print(f"| {text} | {' | '.join(map(seeds.spoken, cells))} |")


if __name__ == "__main__":
    main()
