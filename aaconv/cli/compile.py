"""``aaconv compile``."""

from __future__ import annotations

import argparse

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import DOES_NOT_FIT, OK, UsageError
from aaconv.cli.loading import load_config
from aaconv.cli.printing import say


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    compile = commands.add(
        "compile",
        _compile,
        "Compile the training and the evaluation step for a TPU slice that is not here: do they fit, what binds them?",
        config="config file, e.g. configs/imagenet_resnet.py; its data set need not be here",
    )
    compile.epilog = f"Exit code {DOES_NOT_FIT}: it does not fit. {compile.epilog}"
    compile.add_argument("--topology", default="", metavar="TPU", help="generation and layout, e.g. v5e:16x16")
    only = compile.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="the training step alone")
    only.add_argument("--eval-only", action="store_true", help="the evaluation step alone")
    compile.add_argument(
        "--no-largest-batch", action="store_true", help="do not look for the largest batch: fewer compilations"
    )
    compile.add_argument("--json", default="", metavar="FILE", help="write the figures to it as well")


def _compile(arguments: argparse.Namespace) -> int:
    config = load_config(arguments, or_workdir=False)
    if not arguments.topology:
        raise UsageError("--topology is missing: name a TPU slice, e.g. --topology v5e:16x16")
    from aaconv.pods import compile

    fits = compile.run(
        config,
        arguments.topology,
        training=not arguments.eval_only,
        evaluation=not arguments.train_only,
        largest_batch=not arguments.no_largest_batch,
        json_file=arguments.json,
        note=say,
    )
    return OK if fits else DOES_NOT_FIT
