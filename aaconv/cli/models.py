"""``aaconv models``."""

from __future__ import annotations

import argparse

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import OK


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    models = commands.add(
        "models", _models, "Print a page of all networks: source, parameters, FLOPs, what attends where."
    )
    models.add_argument("pattern", nargs="?", default="*", help="of names, e.g. 'aa_*' (default: all)")
    models.add_argument("--names", action="store_true", help="print the names alone, which takes no counting")


def _models(arguments: argparse.Namespace) -> int:
    from aaconv.models import table

    print("\n".join(table.matching(arguments.pattern)) if arguments.names else table.page(arguments.pattern).rstrip())
    return OK
