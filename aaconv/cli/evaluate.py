"""``aaconv eval``."""

from __future__ import annotations

import argparse
import os

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import OK
from aaconv.cli.loading import OWN_CONFIG, add_checkpoint, load_config, need_workdir
from aaconv.cli.printing import print_pairs, say, spoken_metrics
from aaconv.cli.processes import add_processes, is_first_process, join


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    evaluate = commands.add(
        "eval",
        _eval,
        "Evaluate a checkpoint on the config's data.eval_split.",
        config=OWN_CONFIG,
        workdir="folder of the run",
    )
    add_processes(evaluate)
    add_checkpoint(evaluate)


def _eval(arguments: argparse.Namespace) -> int:
    workdir = need_workdir(arguments)
    config = load_config(arguments, or_workdir=True)
    join(arguments)
    from aaconv import hosts, train

    hosts.let_sigterm_end()
    first = is_first_process()
    note = say if first else lambda text: None
    values = train.evaluate(config, workdir, which=arguments.checkpoint, note=note)
    if first:
        print_pairs(
            [
                ("checkpoint", os.path.join(workdir, "checkpoints", str(values["step"]))),
                ("data set", config.data.name),
                *spoken_metrics(values, config.data.eval_split),
            ]
        )
    return OK
