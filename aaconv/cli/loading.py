"""The config, the folder and the network that a command line names."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from aaconv.cli.arguments import Parser
from aaconv.cli.exits import UsageError

if TYPE_CHECKING:
    from aaconv.config import ConfigDict
    from aaconv.data import DatasetInfo
    from aaconv.models.summary import Summary

OWN_CONFIG = "config file; left out: the config.json in --workdir"


def add_checkpoint(command: Parser) -> None:
    """Adds the flag that chooses among a run's checkpoints."""
    command.add_argument(
        "--checkpoint", default="newest", choices=("newest", "best"), help="which one (default: newest)"
    )


def load_config(arguments: argparse.Namespace, *, or_workdir: bool) -> ConfigDict:
    """Returns the config of ``--config`` or, if so said and that is left out, of the run in ``--workdir``."""
    from aaconv import config, workdirs

    path = arguments.config
    if path is None and or_workdir and arguments.workdir:
        path = os.path.join(arguments.workdir, "config.json")
        if not workdirs.path(path).exists():
            raise ValueError(
                f"--workdir {arguments.workdir} has no config.json: name the folder of a run, or a --config"
            )
    if path is None:
        both = " or --workdir DIR" if or_workdir else ""
        raise UsageError(f"--config is missing: name a config file{both}, e.g. --config configs/digits.py")
    return config.load(path, arguments.overrides)


def need_workdir(arguments: argparse.Namespace) -> str:
    """Returns ``--workdir``, which may not be missing."""
    if not arguments.workdir:
        raise UsageError("--workdir is missing: name the folder of the run, e.g. --workdir runs/digits")
    return arguments.workdir


def dataset_info(config: ConfigDict) -> DatasetInfo:
    """Describes the data set, also one that is not prepared here: looking and predicting need no examples."""
    from aaconv import data
    from aaconv.data import declared

    try:
        return data.info(config)
    except data.NotPrepared:
        return declared.declared_info(config)


def summarise(config: ConfigDict, info: DatasetInfo) -> Summary:
    """Returns the parameters, FLOPs and attention of a config's network for a data set."""
    from aaconv import train
    from aaconv.models import summary

    return summary.summarise(train.build_model(config, info.num_classes), info.image_shape)
