"""The ``aaconv`` command: a file for each command, with its flags and the function that runs it.

Results go to standard output, progress and remarks to standard error. Exit codes: 0 done;
2 wrong input; 3 the loss became nan or infinite; 4 compiled, but does not fit the memory; 5 a trial of a sweep failed;
75 stopped after saving, and 76 another process of the run was lost: the same command goes on; 130 interrupted.

Every start reads all of these files, so what is heavy is imported by the functions.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from aaconv.cli import (
    bench,
    compile,
    evaluate,
    launch,
    models,
    plan,
    predict,
    prepare,
    show,
    sweep,
    sweep_report,
    train,
    version,
)
from aaconv.cli.arguments import Commands
from aaconv.cli.exits import (
    DOES_NOT_FIT,
    INTERRUPTED,
    NOT_FINITE,
    OK,
    STOPPED,
    TRIAL_FAILED,
    WRONG_INPUT,
    UsageError,
)
from aaconv.cli.printing import say

__all__ = [
    "DOES_NOT_FIT",
    "INTERRUPTED",
    "NOT_FINITE",
    "OK",
    "STOPPED",
    "TRIAL_FAILED",
    "WRONG_INPUT",
    "UsageError",
    "main",
    "run",
]

EXTRAS = {  # the extra that brings a package, by the name it is imported by
    **dict.fromkeys(
        "absl array_record etils grain ml_collections optax orbax PIL rich sklearn tensorflow_datasets".split(), "train"
    ),
    "gcsfs": "gcs",
    "matplotlib": "plots",
    "pyarrow": "parquet",
    "submitit": "slurm",
    "tensorflow": "prepare",
    "wandb": "wandb",
}


def run() -> None:
    """Entry point of the ``aaconv`` script."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone; without this, Python complains while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    hosts = sys.modules.get("aaconv.hosts")  # not loaded, then there is but this process
    if hosts is not None:
        hosts.leave(code, failed=code not in (OK, STOPPED))
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
      argv: what follows ``aaconv``.

    Returns:
      The exit code.
    """
    debug = os.environ.get("AACONV_DEBUG", "") not in ("", "0")
    try:
        command, arguments = _commands().parse(argv)
        debug = debug or arguments.debug
        return command(arguments)
    except KeyboardInterrupt:
        say("aaconv: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        code = _exit_code(error)
        if debug or code is None:
            traceback.print_exc()
        if code is None:
            say("aaconv: this is a bug, the lines above say where")
            return 1
        say(f"aaconv: {'' if code == STOPPED else 'error: '}{_message(error)}")
        return code


def _commands() -> Commands:
    commands = Commands()
    # In the order in which the help names them.
    files = train, evaluate, show, models, predict, prepare, sweep, sweep_report, launch, bench, compile, plan, version
    for file in files:
        file.add(commands)
    return commands


def _exit_code(error: Exception) -> int | None:
    """Returns the code of an error that its message alone explains, else None."""
    if isinstance(error, ImportError):
        return WRONG_INPUT if (error.name or "").partition(".")[0] in EXTRAS else None
    train = sys.modules.get("aaconv.train")  # not loaded, then it raised nothing
    if train is not None and isinstance(error, train.NonFiniteLossError):
        return NOT_FINITE
    if train is not None and isinstance(error, train.Preempted):
        return STOPPED
    hosts = sys.modules.get("aaconv.hosts")
    if hosts is not None and isinstance(error, hosts.LostError):
        return hosts.LOST
    return WRONG_INPUT if isinstance(error, ValueError | NotImplementedError | OSError) else None


def _message(error: Exception) -> str:
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        return f"this needs {package}, which is not installed: run  pip install 'aaconv[{EXTRAS[package]}]'"
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return str(error)
