"""What the experiments here share: variants of a config, each trained with several seeds, and their table.

What is finished is not trained again, and an interrupted run goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
METRICS = ("eval/accuracy", "eval/top5", "eval/loss", "train/accuracy", "train/loss")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"

Variant = tuple[str, Sequence[str]]  # a config file with its argument, and overrides

# The digits, a fifth of the training images to train and all the others to test: with more, every network is right.
FEW_DIGITS: Variant = (
    "digits.py",
    [
        "data.train_split=train[:20%]",
        "data.eval_split=train[20%:]+test",
        "num_epochs=120.0",
        "eval_every_epochs=120.0",
        "checkpoint.every_epochs=120.0",
    ],
)


def parse(description: str | None, here: Path) -> argparse.Namespace:
    """Reads the flags that every experiment takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, default=here, help="folder for the table and the picture")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the processors")
    parser.add_argument(
        "--config", help="another config of configs/, with its argument, e.g. cifar100_small.py:aa", metavar="NAME"
    )
    parser.add_argument("overrides", nargs="*", help="config overrides for every run, e.g. num_epochs=20.0")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} must be at least 1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def base(arguments: argparse.Namespace, default: Variant) -> Variant:
    """What all variants start from: the experiment's own config, or the one that was named."""
    return (arguments.config, []) if arguments.config else default


def run_all(variants: Mapping[str, Variant], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains every variant with every seed, in ``workdir/VARIANT_seedN``; a row a run, in order."""
    runs = [(name, seed) for seed in SEEDS for name in variants]
    tasks = [
        (str(CONFIGS / variants[name][0]), [f"seed={seed}", *variants[name][1], *arguments.overrides], folder)
        for name, seed in runs
        for folder in [str(arguments.workdir / f"{name}_seed{seed}")]
    ]
    if arguments.jobs == 1:
        found = [_train(*task) for task in tasks]
    else:
        context = multiprocessing.get_context("spawn")
        shares = context.Queue()
        processors = sorted(os.sched_getaffinity(0))
        for job in range(arguments.jobs):
            shares.put(processors[job :: arguments.jobs] or processors)
        with ProcessPoolExecutor(arguments.jobs, mp_context=context, initializer=_take, initargs=(shares,)) as pool:
            found = list(pool.map(_train, *zip(*tasks, strict=True)))
    return [
        {"variant": name, "seed": seed, **{metric: row.get(metric) for metric in METRICS}}
        for (name, seed), row in zip(runs, found, strict=True)
    ]


def _take(shares: Any) -> None:
    """Keeps this process to its processors; before jax is there, which counts them when it starts."""
    os.sched_setaffinity(0, shares.get())


def _train(config: str, overrides: Sequence[str], workdir: str) -> dict[str, float]:
    from aaconv import config as config_lib, train

    return train.train(config_lib.load(config, overrides), workdir)


def write(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a CSV file, a row a run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


def percent(results: Sequence[Mapping[str, Any]], variant: str, metric: str = "eval/accuracy") -> tuple[float, float]:
    """Mean and sample deviation over the seeds, in percent."""
    values = [100 * row[metric] for row in results if row["variant"] == variant]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def spoken(mean_and_deviation: tuple[float, float]) -> str:
    """``33.23 ± 0.67``."""
    return "{:.2f} ± {:.2f}".format(*mean_and_deviation)
