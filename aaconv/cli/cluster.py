"""Flags of ``aaconv sweep`` that say where the trials run (``--slurm``), and how far (``--halving``)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from aaconv.cli.arguments import Parser, at_least_one
from aaconv.cli.exits import UsageError
from aaconv.cli.printing import say

if TYPE_CHECKING:
    from aaconv.sweep.halving import Halving
    from aaconv.sweep.records import Sweep
    from aaconv.sweep.slurm import Resources

SLURM = "partition account qos time mem nodes tasks_per_node cpus_per_task gpus_per_node array_parallelism".split()
SLURM += "save_seconds setup sbatch".split()


def add_halving(sweep: Parser) -> None:
    """Adds the flags of successive halving."""
    group = sweep.add_argument_group(
        "successive halving",
        "Trials are compared on their way, and only the best go on. Those that differ in their seed alone are judged "
        "together, by their mean.",
    )
    group.add_argument(
        "--halving", default="", metavar="BUDGET", help="of the first comparison, e.g. 2epochs or 500steps"
    )
    group.add_argument(
        "--halving-factor",
        type=at_least_one,
        metavar="N",
        help="one in N goes on, and the next comparison is after N times as long (default: 3)",
    )
    group.add_argument("--halving-metric", metavar="METRIC", help="that decides (default: checkpoint.best_metric)")


def add_slurm(sweep: Parser) -> None:
    """Adds the flags of Slurm."""
    group = sweep.add_argument_group(
        "Slurm", "With --slurm every trial is a job of an array. What else is given here is sbatch's, for each trial."
    )
    group.add_argument(
        "--slurm", action="store_true", help="run the trials as jobs, from a machine that may submit them"
    )
    for flag, metavar, what in (
        ("partition", "NAME", "default: Slurm's"),
        ("account", "NAME", "default: Slurm's"),
        ("qos", "NAME", "default: Slurm's"),
        ("time", "LIMIT", "after which a trial is saved and queued again, e.g. 4:00:00 (default: the partition's)"),
        ("mem", "SIZE", "of each node, e.g. 32G (default: Slurm's)"),
    ):
        group.add_argument(f"--{flag}", metavar=metavar, help=what)
    for flag, metavar, what in (
        ("nodes", "N", "of a trial (default: as many as its mesh needs with --gpus-per-node)"),
        ("tasks-per-node", "N", "processes of a trial on each node (default: one, which has all its GPUs)"),
        ("cpus-per-task", "N", "default: Slurm's, often one"),
        ("gpus-per-node", "N", "default: none"),
        ("array-parallelism", "N", "trials that run at a time, in all (default: no limit)"),
        ("save-seconds", "S", "before the time limit, for a step and a checkpoint (default: 300)"),
    ):
        group.add_argument(f"--{flag}", type=at_least_one, metavar=metavar, help=what)
    for flag, metavar, what in (
        ("setup", "LINE", "bash that comes before training, e.g. 'module load cuda'"),
        ("sbatch", "KEY=VALUE", "any other option of sbatch, e.g. constraint=a100"),
    ):
        group.add_argument(f"--{flag}", action="append", metavar=metavar, help=f"{what}; may be repeated")


def read_halving(arguments: argparse.Namespace, metric: str) -> Callable[[Sweep], Halving | None]:
    """Returns what says, of the sweep that a workdir holds, whether and how it is halved.

    Args:
      arguments: of the command line.
      metric: that decides unless a flag names another.

    Raises:
      UsageError, ValueError: a flag is wrong.
    """
    from aaconv.sweep import halving

    if arguments.halving:
        asked = halving.Halving.parse(
            arguments.halving, arguments.halving_factor or 3, arguments.halving_metric or metric
        )
        return lambda sweep: asked
    for flag in ("halving_factor", "halving_metric"):
        if getattr(arguments, flag):
            raise UsageError(f"--{flag.replace('_', '-')} belongs to --halving BUDGET: add that, or leave it out")

    def as_before(sweep: Sweep) -> Halving | None:
        before = halving.recorded(sweep.workdir)
        if before is not None:
            file = sweep.workdir / "halving.json"
            say(f"going on with successive halving {before.describe()}; to run all trials, move {file} away")
        return before

    return as_before


def read_slurm(arguments: argparse.Namespace) -> Resources | None:
    """Returns what each trial asks Slurm for; None without ``--slurm``.

    Raises:
      UsageError: a flag has no meaning.
      ValueError: Slurm is not here, or a flag is wrong.
    """
    given = {name: value for name in SLURM if (value := getattr(arguments, name))}
    if not arguments.slurm:
        for name in given:
            raise UsageError(f"--{name.replace('_', '-')} is for jobs of Slurm: add --slurm, or leave it out")
        return None
    if arguments.jobs > 1:
        raise UsageError(
            f"--jobs {arguments.jobs} counts processes on this machine, where --slurm runs none: did you mean "
            f"--array-parallelism {arguments.jobs}?"
        )
    from aaconv.sweep import slurm

    others = {}
    for text in given.pop("sbatch", []):
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals:
            raise UsageError(f"--sbatch {text} has no value: write --sbatch {key}=VALUE")
        others[key.replace("_", "-")] = value  # as submitit writes it
    found = dataclasses.replace(slurm.Resources(), **given, others=others)
    slurm.check(found)
    return found
