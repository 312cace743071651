"""The ``aaconv`` command: train, eval, show, predict, prepare, sweep, compile, plan, launch, bench, version.

Results go to standard output, progress and remarks to standard error. Exit codes: 0 done;
2 wrong input; 3 the loss became nan or infinite; 4 compiled, but does not fit the memory; 5 a trial of a sweep failed;
75 stopped after saving, and 76 another process of the run was lost: the same command goes on; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aaconv.errors import close_matches

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from aaconv.config import ConfigDict
    from aaconv.data import DatasetInfo
    from aaconv.models.summary import Attention, Summary
    from aaconv.sweep.description import Trial
    from aaconv.train import Restored

OK, WRONG_INPUT, NOT_FINITE, DOES_NOT_FIT, TRIAL_FAILED, STOPPED, INTERRUPTED = 0, 2, 3, 4, 5, 75, 130
GROUPS = {  # commands that have commands, and what is said of a wrong and of a missing one
    "bench": ("does not measure", "nothing to measure"),
    "launch": ("does not know", "nowhere to launch"),
}
EXTRAS = {  # the extra that brings a package, by the name it is imported by
    **dict.fromkeys(
        "absl array_record etils grain ml_collections optax orbax PIL rich sklearn tensorflow_datasets".split(), "train"
    ),
    "gcsfs": "gcs",
    "matplotlib": "plots",
    "tensorflow": "prepare",
}


class UsageError(ValueError):
    """The command line itself is wrong."""


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
        command, arguments = _parse(argv)
        debug = debug or arguments.debug
        return command(arguments)
    except KeyboardInterrupt:
        _say("aaconv: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        code = _exit_code(error)
        if debug or code is None:
            traceback.print_exc()
        if code is None:
            _say("aaconv: this is a bug, the lines above say where")
            return 1
        _say(f"aaconv: {'' if code == STOPPED else 'error: '}{_message(error)}")
        return code


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


# Arguments


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="aaconv",
        description="Attention-augmented convolution: train networks, look into them, use them.",
        epilog="`aaconv COMMAND --help` says more of a command.",
    )
    groups = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    commands: dict[str, _Parser] = {}

    def add(
        name: str, function: Callable[[Any], int], help: str, *, config: str = "", workdir: str = "", within: Any = None
    ) -> _Parser:
        epilog = (
            "Any key of the config can be set: --config.KEY=VALUE or --config.KEY VALUE, for example "
            "--config.model.num_heads=4 --config.model.stages=2,3. `aaconv show` lists the keys."
        )
        parent = groups if within is None else within
        command = parent.add_parser(name.split()[-1], help=help, description=help, epilog=epilog if config else None)
        command.set_defaults(function=function)
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
        if config:
            command.add_argument("--config", metavar="FILE[:ARGUMENT]", help=config)
        if workdir:
            command.add_argument("--workdir", metavar="DIR", help=workdir)
        commands[name] = command
        return command

    own = "config file; left out: the config.json in --workdir"
    train = add(
        "train",
        _train,
        "Train a network, or go on where the workdir's last checkpoint stands.",
        config="config file, e.g. configs/digits.py",
        workdir="folder of the run: config, metrics, checkpoints and pictures",
    )
    train.add_argument(
        "--maps", type=_whole, default=0, metavar="N", help="at the end, draw N test images' attention maps"
    )
    evaluate = add(
        "eval", _eval, "Evaluate a checkpoint on the config's data.eval_split.", config=own, workdir="folder of the run"
    )
    for command in (train, evaluate):
        _add_processes(command)
    show = add(
        "show",
        _show,
        "Print the resolved config, parameters and FLOPs by stage, and what attends where.",
        config="config file, e.g. configs/digits.py",
        workdir="instead of --config: the folder of a run",
    )
    show.add_argument("--layers", action="store_true", help="every layer, not only the stages")
    networks = add("models", _models, "Print a page of all networks: source, parameters, FLOPs, what attends where.")
    networks.add_argument("pattern", nargs="?", default="*", help="of names, e.g. 'aa_*' (default: all)")
    predict = add("predict", _predict, "Classify image files.", config=own, workdir="folder of the run")
    predict.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=_whole, default=5, metavar="K", help="classes to print (default: 5)")
    predict.add_argument(
        "--maps", metavar="PATH", help="draw attention maps into this .png file, or one file an image into this folder"
    )
    predict.add_argument(
        "--layer", metavar="NAME", help="the layer whose maps are drawn (default: the last of the largest maps)"
    )
    predict.add_argument(
        "--query",
        type=_point,
        action="append",
        metavar="DOWN,ACROSS",
        help="a pixel to look from, both numbers from 0 to 1; may be repeated (default: three points)",
    )
    for command in (evaluate, predict):
        command.add_argument(
            "--checkpoint", default="newest", choices=("newest", "best"), help="which one (default: newest)"
        )
    prepare = add("prepare", _prepare, "Prepare a TFDS data set, or the digits, for training.")
    prepare.add_argument("name", nargs="?", metavar="NAME", help="e.g. digits, cifar100, tf_flowers")
    prepare.add_argument(
        "--data-dir", metavar="DIR", help="where to (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )
    _add_sweep(add)
    launch = groups.add_parser("launch", help="Print what starts a training run on many hosts.")
    launch.description = (
        "Print what starts `aaconv train` on many hosts; nothing is run, put it into a file and read it."
    )
    _add_launchers(partial(add, within=launch.add_subparsers(metavar="WHERE", parser_class=_Parser)))
    bench = groups.add_parser("bench", help="Measure what attention and training steps cost.")
    bench.description = "Measure what attention and training steps cost: medians after a warm-up, taken in turn."
    _add_benchmarks(partial(add, within=bench.add_subparsers(metavar="WHAT", parser_class=_Parser)))
    _add_pods(add)
    add("version", _version, "Print the versions of aaconv and of what it runs on.")
    return parser, commands


def _add_processes(command: _Parser) -> None:
    group = command.add_argument_group(
        "several processes",
        "Run the same command on every host. On Cloud TPU, under Slurm (srun), Open MPI and in Kubernetes jobs of "
        "indexed pods they find each other; elsewhere give each all three:",
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="the host of process 0, and a free port")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0 to N - 1")
    for name, seconds, what in (
        ("start", 300, "to wait for the others at the start"),
        ("heartbeat", 100, "after which a silent process counts as lost and the others end"),
    ):
        command.add_argument(
            f"--{name}-timeout", type=_positive, default=seconds, metavar="SECONDS", help=f"{what} (default: {seconds})"
        )


def _add_launchers(add: Callable[..., _Parser]) -> None:
    config, workdir = "config file, as the hosts see it", "folder of the run that all hosts share"
    slurm = add("launch slurm", _launch_slurm, "A script for sbatch.", config=config, workdir=workdir)
    slurm.add_argument("--nodes", type=_whole, default=1, metavar="N", help="hosts (default: 1)")
    slurm.add_argument(
        "--gpus-per-node", type=_whole, default=0, metavar="N", help="one task each (default: CPUs only)"
    )
    slurm.add_argument("--cpus-per-task", type=_whole, default=0, metavar="N", help="default: Slurm's, often one")
    slurm.add_argument("--time", default="", metavar="LIMIT", help="e.g. 4:00:00 (default: the partition's)")
    slurm.add_argument("--partition", default="", metavar="NAME", help="default: Slurm's")
    slurm.add_argument("--account", default="", metavar="NAME", help="default: Slurm's")
    slurm.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="bash that comes before training, e.g. 'module load cuda'; may be repeated",
    )
    gke = add("launch gke", _launch_gke, "A JobSet for kubectl.", config=config, workdir=workdir)
    gke.add_argument("--image", metavar="IMAGE", help="container image with aaconv[train,gcs] and jax[tpu]")
    gke.add_argument("--slices", type=_whole, default=1, metavar="N", help="of that topology (default: 1)")
    gke.add_argument(
        "--max-restarts",
        type=_whole,
        default=3,
        metavar="N",
        help="after errors; preemptions do not count (default: 3)",
    )
    gke.add_argument("--namespace", default="", metavar="NAME", help="default: kubectl's")
    gke.add_argument("--service-account", default="", metavar="NAME", help="who may write the workdir")
    tpu_vm = add("launch tpu-vm", _launch_tpu_vm, "gcloud commands for Cloud TPU.", config=config, workdir=workdir)
    tpu_vm.add_argument("--zone", metavar="ZONE", help="e.g. us-west4-a")
    tpu_vm.add_argument(
        "--runtime", default="", metavar="VERSION", help="of the hosts' software (default: by generation)"
    )
    tpu_vm.add_argument(
        "--install",
        default="aaconv[train,gcs] jax[tpu]",
        metavar="PACKAGES",
        help="for pip, separated by spaces (default: %(default)s)",
    )
    for command in (gke, tpu_vm):
        command.add_argument("--topology", metavar="TPU", help="of a slice, e.g. v5e:4x4")
        command.add_argument("--name", default="", metavar="NAME", help="what it is called there")
        command.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away at any time")
    for command in (slurm, gke):
        command.add_argument(
            "--save-seconds",
            type=_whole,
            default=300,
            metavar="S",
            help="for a step and a checkpoint, once told to stop (default: 300)",
        )
    for command in (slurm, gke, tpu_vm):
        python = "python3 -m aaconv" if command is tpu_vm else "aaconv"
        command.add_argument(
            "--executable", default=python, metavar="COMMAND", help=f"starts aaconv there (default: {python})"
        )


def _add_sweep(add: Callable[..., _Parser]) -> None:
    sweep = add(
        "sweep",
        _sweep,
        "Run what is missing of a sweep: all trials that the config's sweep(add), or --grid and --zip, describe.",
        config="config file, e.g. configs/digits_sweep.py",
        workdir="folder of the sweep: its description, trials/, results.csv",
    )
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values of a key, e.g. model.kappa=0.1,0.2 or seed=0:3 (0, 1, 2) or 'model.stages=(2,3),(3,)'; repeated: "
        "all combinations",
    )
    sweep.add_argument(
        "--zip",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="likewise, but lists of one length: the first values belong together, and so on",
    )
    sweep.add_argument(
        "--invalid",
        default="error",
        choices=("error", "skip"),
        help="what to do with a trial that cannot be run, as its config or its shapes say (default: error)",
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the trials, with what each costs, and run nothing")
    sweep.add_argument(
        "--jobs", type=_whole, default=1, metavar="N", help="processes at a time, each with its share of the machine"
    )
    sweep.add_argument(
        "--retries", type=_count, default=0, metavar="K", help="times a failed trial is tried again (default: 0)"
    )
    sweep.epilog = f"`aaconv sweep status` and `aaconv sweep report` say how it goes and what came out. {sweep.epilog}"
    # Not the parser's own: argparse would take the value of a misspelt flag for one of them.
    kinds = _Parser(prog="aaconv sweep").add_subparsers(parser_class=_Parser)
    add("sweep status", _sweep_status, "Print how each trial stands.", workdir="folder of the sweep", within=kinds)
    report = add(
        "sweep report",
        _sweep_report,
        "Print mean, deviation and 95% interval over seeds; write report.md and results.csv.",
        workdir="folder of the sweep",
        within=kinds,
    )
    report.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a table each, e.g. eval/loss (default: the config's checkpoint.best_metric)",
    )


def _add_benchmarks(add: Callable[..., _Parser]) -> None:
    attention = add(
        "bench attention",
        _bench_attention,
        "Time and memory of relative attention: every implementation beside its peers, checked against float64.",
    )
    attention.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="B,n,H,W,d,e",
        help="images, heads, height, width, key and value depth a head; may be repeated (default: by platform)",
    )
    attention.add_argument(
        "--memory-limit", type=_positive, metavar="GB", help="begin nothing that needs more (default: half the free)"
    )
    attention.add_argument("--memory-only", action="store_true", help="compile and read the memory, run nothing")
    step = add(
        "bench step",
        _bench_step,
        "Time and memory of the training steps of networks, and where the time goes.",
        config="config file of the recipe (default: that of the ImageNet ResNets)",
    )
    step.add_argument("--models", metavar="NAMES", help="networks (default: resnet50,aa_resnet50)")
    step.add_argument(
        "--size", type=_whole, metavar="PIXELS", help="side of the images (default: 160 on a CPU, else 224)"
    )
    step.add_argument("--batch", type=_whole, metavar="N", help="images a step (default: 8 on a CPU, else 128)")
    step.add_argument("--inference", action="store_true", help="the evaluation step instead")
    step.add_argument("--no-layers", action="store_true", help="leave out the layers by themselves")
    _add_pipeline_benchmarks(add)
    for command, seconds, per in (
        (attention, 20, "for each shape"),
        (step, 60, "for the networks, and for the layers"),
    ):
        command.add_argument(
            "--implementation",
            action="append",
            default=[],
            metavar="NAME",
            help="may be repeated "
            f"(default: {'all, and the peers' if command is attention else 'what the networks take by themselves'})",
        )
        command.add_argument(
            "--dtype",
            choices=("float32", "bfloat16"),
            help="default: float32 on a CPU, else bfloat16",
        )
        command.add_argument(
            "--seconds", type=_positive, default=seconds, metavar="S", help=f"of timing {per} (default: {seconds})"
        )
        command.add_argument(
            "--topology", default="", metavar="TPU", help="compile for a TPU without one, e.g. v5e:2x2, and run nothing"
        )
        _add_output(command)


def _add_pipeline_benchmarks(add: Callable[..., _Parser]) -> None:
    source = add(
        "bench input",
        _bench_input,
        "Images a second that are decoded and cropped, by number of workers, until more bring no more.",
        config="config file of photographs that are prepared (default: made-up ones of ImageNet's mean size)",
    )
    source.add_argument(
        "--workers",
        type=_counts_of_workers,
        default=(),
        metavar="N,N,...",
        help="processes, 0 being threads (default: 0,1,2,4,... up to the cores, and one more)",
    )
    source.add_argument(
        "--size", type=_whole, metavar="PIXELS", help="side of the crops (default: the config's, else 224)"
    )
    source.add_argument("--batch", type=_whole, default=64, metavar="N", help="images a batch (default: 64)")
    source.add_argument(
        "--feed",
        type=_positive,
        default=1000.0,
        metavar="RATE",
        help="images a second of a device, to say how many cores feed it (default: 1000)",
    )
    source.add_argument(
        "--seconds", type=_positive, default=5.0, metavar="S", help="of each measurement, at least (default: 5)"
    )
    loop = add(
        "bench loop",
        _bench_loop,
        "What the training loop costs beside its steps: real steps with data and logging, and bare steps, in turn.",
        config="config file, e.g. configs/digits.py",
    )
    loop.add_argument(
        "--steps", type=_whole, default=200, metavar="N", help="of a round, each way, at least (default: 200)"
    )
    for command in (source, loop):
        command.add_argument(
            "--rounds", type=_whole, default=5, metavar="N", help="times that each way is measured (default: 5)"
        )
        _add_output(command)


def _add_output(command: _Parser) -> None:
    folder = f"runs/{command.prog.partition(' ')[2].replace(' ', '/')}"
    command.add_argument("--output", default=folder, metavar="DIR", help=f"for the files (default: {folder})")


def _add_pods(add: Callable[..., _Parser]) -> None:
    of_config = "config file, e.g. configs/imagenet_resnet.py; its data set need not be here"
    compile = add(
        "compile",
        _compile,
        "Compile the training and the evaluation step for a TPU slice that is not here: do they fit, what binds them?",
        config=of_config,
    )
    compile.epilog = f"Exit code {DOES_NOT_FIT}: it does not fit. " + (compile.epilog or "")
    compile.add_argument("--topology", default="", metavar="TPU", help="generation and layout, e.g. v5e:16x16")
    only = compile.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="the training step alone")
    only.add_argument("--eval-only", action="store_true", help="the evaluation step alone")
    compile.add_argument(
        "--no-largest-batch", action="store_true", help="do not look for the largest batch: fewer compilations"
    )
    compile.add_argument("--json", default="", metavar="FILE", help="write the figures to it as well")
    plan = add(
        "plan",
        _plan,
        "Choose the augmented stages: from the last one backwards as far as memory allows, by compiling.",
        config=of_config,
    )
    plan.epilog = f"Exit code {DOES_NOT_FIT}: not even the last stage fits. " + (plan.epilog or "")
    plan.add_argument(
        "--topology", default="", metavar="TPU", help="compile for one chip of it, with a chip's share of the batch"
    )
    plan.add_argument(
        "--memory-gb", type=_positive, metavar="GB", help="instead: compile for one device here, with the whole batch"
    )
    plan.add_argument(
        "--output", default="", metavar="FILE", help="write the config with the chosen stages, for --config (.json)"
    )


def _parse(argv: Sequence[str]) -> tuple[Callable[[Any], int], argparse.Namespace]:
    parser, commands = _parser()
    first = list(dict.fromkeys(command.split()[0] for command in commands))
    if not argv:
        parser.print_help(sys.stderr)
        raise UsageError(f"no command: give one of {', '.join(first)}")
    if argv[0] == "--version":
        argv = ["version"]
    asks_help = {"-h", "--help"}
    if argv[0] not in [*first, *asks_help]:
        near = close_matches(argv[0], first) or f": give one of {', '.join(first)}"
        raise UsageError(f"unknown command {argv[0]!r}{near}")
    name = argv[0]
    if name in GROUPS:
        kinds = [command.split()[1] for command in commands if command.startswith(f"{name} ")]
        what = argv[1] if len(argv) > 1 else ""
        if what not in [*kinds, *asks_help]:
            near = close_matches(what, kinds) or f": give one of {', '.join(kinds)}"
            no, none = GROUPS[name]
            raise UsageError(f"`aaconv {name}` {no} {what!r}{near}" if what else f"{none}{near}")
        name = f"{name} {what}"
    if name == "sweep" and len(argv) > 1 and not argv[1].startswith("-"):
        kinds = [command.split()[1] for command in commands if command.startswith("sweep ")]
        if argv[1] not in kinds:
            near = close_matches(argv[1], kinds) or f": it knows {', '.join(kinds)}"
            raise UsageError(f"`aaconv sweep` does not know {argv[1]!r}{near}; a config file comes after --config")
        name = f"sweep {argv[1]}"
    rest, overrides = _take_overrides(argv)
    if name.startswith("sweep "):
        arguments, unknown = commands[name].parse_known_args(rest[2:])
    else:
        arguments, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [flag for action in commands[name]._actions for flag in action.option_strings]
        raise UsageError(_unknown(unknown[0], name, flags))
    arguments.overrides = overrides
    if overrides and not hasattr(arguments, "config"):
        raise UsageError(f"`aaconv {name}` takes no config: leave out --config.{overrides[0]}")
    return arguments.function, arguments


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits ``--config.KEY=VALUE`` and ``--config.KEY VALUE`` from the rest."""
    rest, overrides, waiting = [], [], list(argv)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
            continue
        override = word.removeprefix("--config.")
        # A value may be negative, but not a flag.
        if "=" not in override and waiting and not waiting[0].startswith("--"):
            override = f"{override}={waiting.pop(0)}"
        if "=" not in override:
            raise UsageError(f"{word} has no value: write {word}=VALUE (true or false for a switch)")
        overrides.append(override)
    return rest, overrides


def _unknown(word: str, command: str, flags: Iterable[str]) -> str:
    if not word.startswith("-"):
        config = word.partition(":")[0].endswith(".py")
        hint = f"did you mean --config {word}?" if config else f"see `aaconv {command} --help`"
        return f"`aaconv {command}` does not take {word!r}; {hint}"
    name = word.partition("=")[0]
    from aaconv import config

    keys = config.keys()
    asked = name.removeprefix("--")
    same = [key for key in keys if asked in (key, key.rpartition(".")[2])]
    if same and "--config" in flags:
        return f"unknown flag {name}; did you mean {' or '.join(f'--config.{key}' for key in same)}?"
    near = difflib.get_close_matches(name, list(flags), n=2, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; see `aaconv {command} --help`"
    return f"unknown flag {name} of `aaconv {command}`{hint}"


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def _counts_of_workers(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of worker processes such as 0,1,2")
    return tuple(map(int, numbers))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def _point(text: str) -> tuple[float, float]:
    try:
        down, across = (float(part) for part in text.split(","))
    except ValueError:
        down = across = -1.0
    if not (0 <= down <= 1 and 0 <= across <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers from 0 to 1, down and across, such as 0.5,0.25")
    return down, across


def _load_config(arguments: argparse.Namespace, *, or_workdir: bool) -> ConfigDict:
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


def _need_workdir(arguments: argparse.Namespace) -> str:
    if not arguments.workdir:
        raise UsageError("--workdir is missing: name the folder of the run, e.g. --workdir runs/digits")
    return arguments.workdir


# Commands


def _join(arguments: argparse.Namespace) -> None:
    from aaconv import hosts

    hosts.start(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        start_timeout=arguments.start_timeout,
        heartbeat_timeout=arguments.heartbeat_timeout,
        note=_say,
    )


def _train(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments, or_workdir=False)
    workdir = _need_workdir(arguments)
    _join(arguments)
    if arguments.maps:
        import jax

        if jax.process_count() > 1:
            raise UsageError(
                "--maps draws with one process: leave it out here, and afterwards give the same command with --maps to "
                "one process, which draws from the checkpoint"
            )
        from aaconv import plots

        plots.check_installed()

        _choose_layer(config, _info(config), None)
    from aaconv import train

    result = train.train(config, workdir)
    if _is_first_process():
        _print_result(config, workdir, result)
        _draw(arguments.maps, config, workdir)
    return OK


def _eval(arguments: argparse.Namespace) -> int:
    workdir = _need_workdir(arguments)
    config = _load_config(arguments, or_workdir=True)
    _join(arguments)
    from aaconv import hosts, train

    hosts.let_sigterm_end()
    values = train.evaluate(config, workdir, which=arguments.checkpoint, note=_say)
    if _is_first_process():
        _print_pairs(
            [
                ("checkpoint", os.path.join(workdir, "checkpoints", str(values["step"]))),
                ("data set", config.data.name),
                *_spoken_metrics(values, config.data.eval_split),
            ]
        )
    return OK


def _models(arguments: argparse.Namespace) -> int:
    from aaconv.models import table

    print(table.page(arguments.pattern), end="")
    return OK


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        raise UsageError("NAME is missing: name a data set, e.g. `aaconv prepare cifar100`")
    from aaconv import data

    print(data.prepare(arguments.name, arguments.data_dir))
    return OK


def _sweep(arguments: argparse.Namespace) -> int:
    base = _load_config(arguments, or_workdir=False)
    if not arguments.dry_run:
        _need_workdir(arguments)
    from aaconv import config as config_lib
    from aaconv.sweep import description

    if arguments.grid or arguments.zip:
        cells = description.from_flags(arguments.grid, arguments.zip)
    else:
        function = config_lib.sweep_function(arguments.config)
        if function is None:
            raise ValueError(
                f"{arguments.config} describes no sweep: add a function sweep(add) to it, or give --grid KEY=VALUES"
            )
        cells = description.from_function(function, arguments.config)
    if arguments.jobs > 1:
        import jax

        # The processes take the accelerators; here shapes are all that is asked for.
        jax.config.update("jax_platforms", "cpu")
    trials, invalid = description.describe(
        base, cells, check_devices=arguments.jobs == 1, need_data=not arguments.dry_run, note=_say
    )
    for cell in invalid:
        _say(f"cannot be run: {cell.name}: {cell.reason}")
    if arguments.dry_run and trials:
        _print_trials(trials)
    if invalid and (arguments.invalid == "error" or not trials):
        of = f"{len(invalid)} of {len(cells)} trials cannot be run"
        raise ValueError(f"{of}, as said above: change them" + (", or add --invalid skip" if trials else ""))
    return OK if arguments.dry_run else _run_sweep(arguments, base, trials)


def _print_trials(trials: Sequence[Trial]) -> None:
    table = _table("trial", "parameters", "MFLOPs", "memory (MB)", text=1)
    for trial in trials:
        table.add_row(trial.name, f"{trial.parameters:,}", f"{trial.flops / 1e6:,.2f}", f"{trial.memory / 1e6:,.1f}")
    _console().print(table)
    print(f"{len(trials)} trials; FLOPs for one image; memory: estimated, of a training step on each device")


def _run_sweep(arguments: argparse.Namespace, base: ConfigDict, trials: Sequence[Trial]) -> int:
    from aaconv import checkpoints
    from aaconv.sweep import display, records, report, running

    workdir = checkpoints.check_writable(records.local(arguments.workdir))
    with records.opened(workdir, base, trials, note=_say) as sweep:
        try:
            found = running.run(
                sweep, jobs=arguments.jobs, retries=arguments.retries, displayed=partial(display.displayed, sweep)
            )
        finally:
            report.write_results(sweep)
    failed = [status for status in found if status.state != "finished"]
    for status in failed:
        _say(f"failed: {status.trial.name}, {sweep.folder(status.trial) / records.OUTPUT}")
        for line in status.error.splitlines():
            _say(f"  {line}")
    pairs = [("trials", display.summary(sweep, found)), ("results", str(sweep.workdir / report.RESULTS))]
    _print_pairs([*pairs, ("table", f"aaconv sweep report --workdir {shlex.quote(arguments.workdir)}")])
    return TRIAL_FAILED if failed else OK


def _sweep_status(arguments: argparse.Namespace) -> int:
    from aaconv.sweep import display, records

    sweep = records.load(_need_workdir(arguments))
    _console().print(display.table(sweep, records.statuses(sweep)))
    return OK


def _sweep_report(arguments: argparse.Namespace) -> int:
    from aaconv.sweep import records, report

    sweep = records.load(_need_workdir(arguments))
    path, text, pictures = report.write_report(sweep, arguments.metric)
    print(text)
    _print_pairs([("report", str(path)), ("results", str(sweep.workdir / report.RESULTS))])
    _print_pairs(("picture", str(picture)) for picture in pictures or [])
    if pictures is None:
        _say("no pictures: run  pip install 'aaconv[plots]'  and the same command again")
    return OK


def _training(arguments: argparse.Namespace) -> Any:
    from aaconv import launch

    workdir, config = _need_workdir(arguments), arguments.config or ""
    if arguments.function is _launch_gke and config and not Path(config.partition(":")[0]).is_file():
        _say(f"{config} is not on this machine, so it was not checked; it must be in the image")
    else:
        # What is wrong with a config is said here, not when hours later the hosts are there.
        _load_config(arguments, or_workdir=False)
    try:
        executable = shlex.split(arguments.executable)
    except ValueError as error:
        raise UsageError(f"--executable {arguments.executable!r} is no command for a shell: {error}") from error
    return launch.Training(config, workdir, arguments.overrides, executable)


def _launch_slurm(arguments: argparse.Namespace) -> int:
    from aaconv import launch

    text = launch.slurm(
        _training(arguments),
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        save_seconds=arguments.save_seconds,
        setup=arguments.setup,
    )
    print(text, end="")
    return OK


def _launch_gke(arguments: argparse.Namespace) -> int:
    from aaconv import launch

    _need(arguments, topology="v5e:4x4", image="us-docker.pkg.dev/PROJECT/REPOSITORY/aaconv:latest")
    text = launch.gke(
        _training(arguments),
        topology=arguments.topology,
        image=arguments.image,
        name=arguments.name,
        slices=arguments.slices,
        max_restarts=arguments.max_restarts,
        save_seconds=arguments.save_seconds,
        namespace=arguments.namespace,
        service_account=arguments.service_account,
        spot=arguments.spot,
    )
    _warn_of_own_disks(arguments, arguments.slices)
    print(text, end="")
    return OK


def _launch_tpu_vm(arguments: argparse.Namespace) -> int:
    from aaconv import launch

    _need(arguments, topology="v5e:4x4", name="train-1", zone="us-west4-a")
    text = launch.tpu_vm(
        _training(arguments),
        name=arguments.name,
        zone=arguments.zone,
        topology=arguments.topology,
        spot=arguments.spot,
        runtime=arguments.runtime,
        install=arguments.install,
    )
    _warn_of_own_disks(arguments)
    print(text, end="")
    return OK


def _need(arguments: argparse.Namespace, **examples: str) -> None:
    for name, example in examples.items():
        if not getattr(arguments, name):
            raise UsageError(f"--{name} is missing, e.g. --{name} {example}")


def _warn_of_own_disks(arguments: argparse.Namespace, slices: int = 1) -> None:
    from aaconv import launch

    hosts = launch.Slice.parse(arguments.topology).hosts * slices
    if "://" not in arguments.workdir:
        _say(
            f"warning: --workdir {arguments.workdir} must be a disk that outlives the machines"
            f"{f' and that all {hosts} hosts share' if hosts > 1 else ''}; gs://BUCKET/FOLDER is one"
        )


def _bench_attention(arguments: argparse.Namespace) -> int:
    from aaconv.bench import attention
    from aaconv.bench.program import Shape

    attention.run(
        [Shape.parse(text) for text in arguments.shape],
        dtype=arguments.dtype or "",
        names=arguments.implementation,
        seconds=arguments.seconds,
        memory_limit=arguments.memory_limit,
        output=arguments.output,
        memory_only=arguments.memory_only,
        topology=arguments.topology,
        note=_say,
    )
    return OK


def _bench_step(arguments: argparse.Namespace) -> int:
    from aaconv.bench import step

    step.run(
        step.MODELS if arguments.models is None else [name for name in arguments.models.split(",") if name],
        recipe=arguments.config or "",
        overrides=arguments.overrides,
        implementations=arguments.implementation,
        size=arguments.size,
        batch=arguments.batch,
        dtype=arguments.dtype or "",
        inference=arguments.inference,
        layers=not arguments.no_layers,
        seconds=arguments.seconds,
        output=arguments.output,
        topology=arguments.topology,
        note=_say,
    )
    return OK


def _bench_input(arguments: argparse.Namespace) -> int:
    from aaconv.bench import input

    input.run(
        arguments.config or "",
        overrides=arguments.overrides,
        workers=arguments.workers,
        size=arguments.size,
        batch=arguments.batch,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        feed=arguments.feed,
        output=arguments.output,
        note=_say,
    )
    return OK


def _bench_loop(arguments: argparse.Namespace) -> int:
    from aaconv.bench import loop

    loop.run(
        _load_config(arguments, or_workdir=False),
        name=arguments.config,
        overrides=arguments.overrides,
        steps=arguments.steps,
        rounds=arguments.rounds,
        output=arguments.output,
        note=_say,
    )
    return OK


def _compile(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments, or_workdir=False)
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
        note=_say,
    )
    return OK if fits else DOES_NOT_FIT


def _plan(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments, or_workdir=False)
    from aaconv.pods import plan

    found = plan.run(
        config,
        topology=arguments.topology,
        memory_gb=arguments.memory_gb,
        output=arguments.output,
        note=_say,
    )
    return OK if found.ours is not None else DOES_NOT_FIT


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


# What training leaves


def _print_result(config: ConfigDict, workdir: str, result: dict[str, float]) -> None:
    from aaconv import checkpoints, metrics

    pairs = [("trained", f"{result['step']} steps, {result['epoch']:g} epochs")]
    pairs += _spoken_metrics(result, config.data.eval_split)
    with checkpoints.Checkpoints(workdir, best_metric=config.checkpoint.best_metric, read_only=True) as saved:
        for row in metrics.read_rows(workdir):
            saved.record(row["step"], row)
        newest, best = max(saved.steps()), saved.best_step()
    pairs.append(("checkpoint", os.path.join(workdir, "checkpoints", str(newest))))
    if best is not None and best != newest:
        pairs.append(("best checkpoint", os.path.join(workdir, "checkpoints", str(best))))
    pairs.append(("metrics", os.path.join(workdir, "metrics.jsonl")))
    _print_pairs(pairs)


def _draw(num_maps: int, config: ConfigDict, workdir: str) -> None:
    from aaconv import metrics, plots

    title = f"{config.model.name} on {config.data.name}"
    softened = [name for name in ("label_smoothing", "mixup_alpha") if config.loss[name]]
    if softened:
        # It explains why the training loss lies above the test loss.
        title += f" (training loss with {' and '.join(f'{name}={config.loss[name]}' for name in softened)})"
    try:
        pairs = [("curves", plots.curves(metrics.read_rows(workdir), os.path.join(workdir, "curves.png"), title=title))]
    except ImportError:
        # The run is trained and saved; that there is no picture of it is no failure.
        _say("no picture of the curves: run  pip install 'aaconv[plots]'  and the same command again")
        return
    if num_maps:
        path = os.path.join(workdir, "attention.png")
        pairs.append(("attention maps", _draw_test_maps(num_maps, config, workdir, path)))
    _print_pairs(pairs)


def _draw_test_maps(number: int, config: ConfigDict, workdir: str, path: str) -> str:
    import numpy as np

    from aaconv import data, plots, train

    restored = train.restore(config, workdir, note=_say)
    layer = _choose_layer(config, restored.info, None)
    network = _Network(restored, layer)
    batch = next(iter(data.eval_input(config)))
    images, labels = batch["image"][batch["mask"]], batch["label"][batch["mask"]]
    chosen = _varied(labels)[:number]
    names = restored.info.label_names
    captions, maps = [], []
    for index in chosen:
        probabilities, weights = network.look(images[index])
        maps.append(weights)
        guess = int(probabilities.argmax())
        captions.append(
            f"test image {index}: {names[labels[index]]}, taken for {names[guess]} ({_percent(probabilities[guess])})"
        )
    title = _maps_title(f"{config.model.name} on {config.data.name}, step {restored.step}", layer)
    return plots.attention_maps(list(images[chosen]), np.stack(maps), path, captions=captions, title=title)


def _varied(labels: np.ndarray) -> np.ndarray:
    """Returns the indices in an order where each class comes once before any comes again."""
    import numpy as np

    turns = [int(np.sum(labels[:i] == label)) for i, label in enumerate(labels)]
    return np.argsort(turns, kind="stable")


def _maps_title(start: str, layer: Attention) -> str:
    return f"{start}, {layer.path} ({_size(layer.attends_at)})"


# Prediction


class _Network:
    """A restored network as a function of one uint8 image.

    Args:
      restored: as of `aaconv.train.restore`.
      layer: whose attention maps `look` returns.
    """

    def __init__(self, restored: Restored, layer: Attention | None = None) -> None:
        import jax

        from aaconv.data import augment

        config = restored.config

        def logits_of(variables: Any, image: Any, **kwargs: Any) -> Any:
            images = augment.normalise(image[None], config.data.mean, config.data.std)
            return restored.model.apply(variables, images, train=False, **kwargs)

        def classify(variables: Any, image: Any) -> Any:
            return jax.nn.softmax(logits_of(variables, image)[0])

        def look(variables: Any, image: Any) -> Any:
            logits, sown = logits_of(variables, image, mutable=["intermediates"])
            found = sown["intermediates"]
            assert layer is not None
            for name in layer.path.split("/"):
                found = found[name]
            # Of the other layers' maps nothing is kept, so the compiler leaves them out.
            return jax.nn.softmax(logits[0]), found["attention_weights"][0][0]

        self._variables = restored.variables
        self._classify = jax.jit(classify)
        self._look = jax.jit(look)

    def classify(self, image: np.ndarray) -> np.ndarray:
        """Returns the probabilities of the classes, float32."""
        import numpy as np

        return np.asarray(self._classify(self._variables, image))

    def look(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the probabilities, and the layer's attention weights ``(n, h, w, h, w)``."""
        import numpy as np

        probabilities, weights = self._look(self._variables, image)
        return np.asarray(probabilities), np.asarray(weights)


def _predict(arguments: argparse.Namespace) -> int:
    workdir = _need_workdir(arguments)
    config = _load_config(arguments, or_workdir=True)
    if not arguments.images:
        raise UsageError("no image files: name at least one after the flags")
    suffix = Path(arguments.maps or "").suffix.lower()
    if suffix in (".jpg", ".jpeg", ".pdf", ".svg", ".gif", ".webp", ".tif", ".tiff"):
        raise UsageError(f"--maps {arguments.maps}: pictures are PNG; name a .png file, or a folder")
    for flag in ("layer", "query"):
        if getattr(arguments, flag) and not arguments.maps:
            raise UsageError(f"--{flag} chooses what --maps draws: add --maps attention.png")
    if arguments.maps:
        from aaconv import plots

        plots.check_installed()
    from aaconv import data, train

    info = _info(config)
    layer = _choose_layer(config, info, arguments.layer) if arguments.maps else None
    source = argparse.Namespace(info=lambda config: info)
    restored = train.restore(config, workdir, which=arguments.checkpoint, data=source, note=_say)
    network = _Network(restored, layer)
    drawn: list[_Drawn] = []
    wrong = []
    for file in arguments.images:
        try:
            image = data.preprocess_image(config, data.load_image(config, file), info)
        except ValueError as error:
            _say(f"aaconv: error: {error}")
            wrong.append(file)
            continue
        if layer is not None:
            probabilities, weights = network.look(image)
            best = int(probabilities.argmax())
            caption = f"{Path(file).name}: {info.label_names[best]} ({_percent(probabilities[best])})"
            drawn.append(_Drawn(file, image, caption, weights))
        else:
            probabilities = network.classify(image)
        print(file)
        for label in probabilities.argsort()[::-1][: arguments.top]:
            print(f"  {_percent(probabilities[label]):>7}  {info.label_names[label]}")
    if layer is not None and drawn:
        title = _maps_title(f"{config.model.name}, step {restored.step}", layer)
        for path in _draw_predictions(drawn, Path(arguments.maps), arguments.query, title):
            print(f"attention maps  {path}")
    if wrong:
        whole = len(arguments.images) - len(wrong)
        _say(f"aaconv: {len(wrong)} of {len(arguments.images)} images could not be read; {whole} classified")
        return WRONG_INPUT
    return OK


@dataclasses.dataclass(frozen=True)
class _Drawn:
    file: str
    image: np.ndarray
    caption: str
    weights: np.ndarray


def _draw_predictions(drawn: list[_Drawn], target: Path, queries: Any, title: str) -> list[str]:
    import numpy as np

    from aaconv import plots

    single = target.suffix.lower() == ".png"
    folder = target.parent if single else target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--maps {target} cannot be written: {error.strerror}; name another place") from error
    pictures = {target: drawn} if single else {_own_name(target, one, drawn): [one] for one in drawn}
    return [
        plots.attention_maps(
            [one.image for one in shown],
            np.stack([one.weights for one in shown]),
            path,
            captions=[one.caption for one in shown],
            queries=queries or plots.QUERIES,
            title=title,
        )
        for path, shown in pictures.items()
    ]


def _own_name(folder: Path, one: _Drawn, drawn: list[_Drawn]) -> Path:
    # Two files of one name from different folders must not share a picture.
    same = [other for other in drawn if Path(other.file).stem == Path(one.file).stem]
    number = next(i for i, other in enumerate(same, 1) if other is one)
    return folder / f"{Path(one.file).stem}_attention{f'_{number}' if len(same) > 1 else ''}.png"


def _choose_layer(config: ConfigDict, info: DatasetInfo, name: str | None) -> Attention:
    """Returns the layer of that name; by default the last of those that attend over the largest map."""
    layers = {layer.path: layer for layer in _summary(config, info).attention}
    if not layers:
        raise ValueError(f"{config.model.name} has no attention to draw: leave --maps out")
    if name is None:
        return max(reversed(layers.values()), key=lambda layer: math.prod(layer.attends_at))
    for path, layer in layers.items():
        if name in (path, path.rpartition("/")[0]):
            return layer
    near = close_matches(name, layers) or f"; it is one of {', '.join(layers)}"
    raise ValueError(f"--layer {name} does not attend{near}")


# What a config makes


def _show(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments, or_workdir=True)
    info = _info(config)
    summary = _summary(config, info)
    from rich.text import Text

    console = _console()
    console.print(Text(f"config {arguments.config or arguments.workdir}", style="bold"))
    _print_config(console, config)

    h, w, c = info.image_shape
    images = (
        f"{info.num_train:,} training and {info.num_eval:,} test images"
        if info.num_train
        else f"not prepared here; `aaconv prepare {info.name}` does that"
    )
    console.print()
    kind = config.model.recalibration
    rescaled = f", blocks rescaled by {kind}," if kind not in (None, "none") else ""
    what = f"{config.model.name}{rescaled} for {h}x{w}x{c} images, {info.num_classes} classes"
    console.print(Text(what, style="bold"))
    console.print(Text(f"data set {info.name}: {images}"))
    console.print()
    stages = _table("stage", "output", "parameters", "share", "MFLOPs", "share")
    for stage, (parameters, flops, shape) in summary.by_stage().items():
        stages.add_row(stage, _size(shape), *_counts(parameters, flops, summary))
    stages.add_section()
    stages.add_row("all", "", *_counts(summary.parameters, summary.flops, summary))
    console.print(stages)
    console.print(
        Text("FLOPs for one image: 2 for a multiply-add in a convolution or projection, 1 in attention's products")
    )
    if arguments.layers:
        console.print()
        layers = _table("layer", "kind", "output", "parameters", "share", "MFLOPs", "share", text=3)
        for layer in summary.layers:
            counts = _counts(layer.parameters, layer.flops, summary)
            layers.add_row(layer.path, layer.kind, _size(layer.output_shape), *counts)
        console.print(layers)
    console.print()
    if not summary.attention:
        console.print(Text("nothing attends"))
        return OK
    attention = _table(
        "attends", "in", "over", "out", "heads", "key", "value", "conv", "positions", "maps (MB)", text=4
    )
    for layer in summary.attention:
        attention.add_row(
            layer.path.removesuffix("/attention"),
            _size(layer.layer_input),
            _size(layer.attends_at),
            _size(layer.layer_output),
            str(layer.num_heads),
            str(layer.key_depth),
            str(layer.value_depth),
            str(layer.conv_features),
            layer.position_encoding,
            f"{layer.map_bytes / 1e6:,.2f}",
        )
    console.print(attention)
    console.print(Text("key, value, conv: channels over all heads; maps: one image's weights if they were stored"))
    for line in summary.computed_by():
        console.print(Text(f"computed by {line}"))
    return OK


def _print_config(console: Console, config: ConfigDict) -> None:
    from rich.text import Text

    from aaconv import config as config_lib, models

    default = config_lib.default_config()
    of_network = models.defaults(config.model.name)

    def lines(group: Any, usual: Any, indent: str) -> Iterable[tuple[str, str, bool]]:
        for key, value in group.items():
            if hasattr(value, "items"):
                yield f"{indent}{key}:", "", True
                yield from lines(value, usual[key], indent + "  ")
            else:
                changed = value != usual[key]
                remark = f"default {usual[key]!r}" if changed else ""
                if group is config.model and key in of_network:
                    remark = f"the network's own {'is ' if changed else ''}{of_network[key]!r}"
                yield f"{indent}{key} = {value!r}", remark, changed

    rows = list(lines(config, default, "  "))
    width = max(len(text) for text, remark, _ in rows if remark) if any(r for _, r, _ in rows) else 0
    for text, remark, changed in rows:
        line = Text(f"{text:{width}}  # {remark}" if remark else text, style="" if changed else "dim")
        console.print(line, soft_wrap=True)


def _counts(parameters: int, flops: int, summary: Summary) -> tuple[str, str, str, str]:
    return (
        f"{parameters:,}",
        _percent(parameters / max(summary.parameters, 1)),
        f"{flops / 1e6:,.2f}",
        _percent(flops / max(summary.flops, 1)),
    )


def _table(*columns: str, text: int = 2) -> Table:
    """Returns a table whose first `text` columns are words and the others numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        # Where the terminal is narrow the first column folds; a number is never broken.
        table.add_column(
            name,
            justify="left" if index < text else "right",
            no_wrap=index > 0,
            overflow="fold" if index == 0 else "ellipsis",
        )
    return table


def _console() -> Console:
    from rich.console import Console

    # A file or a pipe has no width: whatever reads it wants whole lines.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=1000)


# Shared


def _info(config: ConfigDict) -> DatasetInfo:
    """Describes the data set, also one that is not prepared here: looking and predicting need no examples."""
    from aaconv import data
    from aaconv.data import declared

    try:
        return data.info(config)
    except data.NotPrepared:
        return declared.declared_info(config)


def _summary(config: ConfigDict, info: DatasetInfo) -> Summary:
    from aaconv import train
    from aaconv.models import summary

    return summary.summarise(train.build_model(config, info.num_classes), info.image_shape)


def _is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


def _spoken_metrics(values: dict[str, float], split: str) -> list[tuple[str, str]]:
    forms = {"accuracy": "{:.2%}", "top5": "{:.2%}", "loss": "{:.4f}"}
    return [
        (f"{split} {name.replace('top5', 'top-5')}", form.format(values[f"eval/{name}"]))
        for name, form in forms.items()
        if f"eval/{name}" in values
    ]


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    for name, value in pairs:
        print(f"{name:15} {value}")


def _percent(share: Any) -> str:
    return f"{100 * float(share):.1f}%"


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
