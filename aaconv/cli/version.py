"""``aaconv version``."""

from __future__ import annotations

import argparse

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import OK


def add(commands: Commands) -> None:
    """Adds the command."""
    commands.add("version", _version, "Print the versions of aaconv and of what it runs on.")


def _version(arguments: argparse.Namespace) -> int:
    import platform
    from importlib import metadata

    import aaconv

    print(f"aaconv {aaconv.__version__}")
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    print(f"Python {platform.python_version()}")
    return OK
