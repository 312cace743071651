"""``aaconv prepare``."""

from __future__ import annotations

import argparse

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import OK, UsageError


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    prepare = commands.add("prepare", _prepare, "Prepare a TFDS data set, or the digits, for training.")
    prepare.add_argument("name", nargs="?", metavar="NAME", help="e.g. digits, cifar100, tf_flowers")
    prepare.add_argument(
        "--data-dir", metavar="DIR", help="where to (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        raise UsageError("NAME is missing: name a data set, e.g. `aaconv prepare cifar100`")
    from aaconv import data

    print(data.prepare(arguments.name, arguments.data_dir))
    return OK
