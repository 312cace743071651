"""``aaconv plan``."""

from __future__ import annotations

import argparse

from aaconv.cli.arguments import Commands, above_zero
from aaconv.cli.exits import DOES_NOT_FIT, OK
from aaconv.cli.loading import load_config
from aaconv.cli.printing import say


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    plan = commands.add(
        "plan",
        _plan,
        "Choose the augmented stages: from the last one backwards as far as memory allows, by compiling.",
        config="config file, e.g. configs/imagenet_resnet.py; its data set need not be here",
    )
    plan.epilog = f"Exit code {DOES_NOT_FIT}: not even the last stage fits. {plan.epilog}"
    plan.add_argument(
        "--topology", default="", metavar="TPU", help="compile for one chip of it, with a chip's share of the batch"
    )
    plan.add_argument(
        "--memory-gb", type=above_zero, metavar="GB", help="instead: compile for one device here, with the whole batch"
    )
    plan.add_argument(
        "--output", default="", metavar="FILE", help="write the config with the chosen stages, for --config (.json)"
    )


def _plan(arguments: argparse.Namespace) -> int:
    config = load_config(arguments, or_workdir=False)
    from aaconv.pods import plan

    found = plan.run(
        config,
        topology=arguments.topology,
        memory_gb=arguments.memory_gb,
        output=arguments.output,
        note=say,
    )
    return OK if found.ours is not None else DOES_NOT_FIT
