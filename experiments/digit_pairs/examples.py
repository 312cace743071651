"""Draws images of each config and label of digit_pairs, for docs/training.md.

COMMAND: python experiments/digit_pairs/examples.py --out docs/images/digit_pairs.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aaconv.data import digit_pairs, digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the picture")
    out = parser.parse_args().out
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(digit_pairs.GAPS), len(digit_pairs.LABELS), figsize=(9, 1.5), layout="constrained", squeeze=False
    )
    for row, config in zip(axes, digit_pairs.GAPS, strict=True):
        pairs = digit_pairs.pairs(config, "test")
        for place, label in zip(row, digit_pairs.LABELS, strict=True):
            first = next(pair for pair in pairs if pair.label == label)
            place.imshow(first.draw(digits.load().images), cmap="gray", interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(label if config == "near" else "", fontsize=9)
        row[0].set_ylabel(config, fontsize=9, rotation=0, ha="right", va="center")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
