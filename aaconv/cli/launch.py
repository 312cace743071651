"""``aaconv launch slurm``, ``aaconv launch gke`` and ``aaconv launch tpu-vm``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aaconv.cli.arguments import Commands, at_least_one
from aaconv.cli.exits import OK, UsageError
from aaconv.cli.loading import dataset_info, load_config, need_workdir
from aaconv.cli.printing import say

if TYPE_CHECKING:
    from aaconv.config import ConfigDict


def add(commands: Commands) -> None:
    """Adds the commands and their flags."""
    commands.add_group(
        "launch",
        "Print what starts a training run on many hosts.",
        "Print what starts `aaconv train` on many hosts; nothing is run, put it into a file and read it.",
        metavar="WHERE",
        unknown="does not know",
        missing="nowhere to launch",
    )
    config, workdir = "config file, as the hosts see it", "folder of the run that all hosts share"
    slurm = commands.add("launch slurm", _slurm, "A script for sbatch.", config=config, workdir=workdir)
    slurm.add_argument("--nodes", type=at_least_one, default=1, metavar="N", help="hosts (default: 1)")
    slurm.add_argument(
        "--gpus-per-node", type=at_least_one, default=0, metavar="N", help="one task each (default: CPUs only)"
    )
    slurm.add_argument("--cpus-per-task", type=at_least_one, default=0, metavar="N", help="default: Slurm's, often one")
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
    gke = commands.add("launch gke", _gke, "A JobSet for kubectl.", config=config, workdir=workdir)
    gke.add_argument("--image", metavar="IMAGE", help="container image with aaconv[train,gcs] and jax[tpu]")
    gke.add_argument("--slices", type=at_least_one, default=1, metavar="N", help="of that topology (default: 1)")
    gke.add_argument(
        "--max-restarts",
        type=at_least_one,
        default=3,
        metavar="N",
        help="after errors; preemptions do not count (default: 3)",
    )
    gke.add_argument("--namespace", default="", metavar="NAME", help="default: kubectl's")
    gke.add_argument("--service-account", default="", metavar="NAME", help="who may write the workdir")
    tpu_vm = commands.add("launch tpu-vm", _tpu_vm, "gcloud commands for Cloud TPU.", config=config, workdir=workdir)
    tpu_vm.add_argument("--zone", metavar="ZONE", help="e.g. us-west4-a")
    tpu_vm.add_argument(
        "--runtime", default="", metavar="VERSION", help="of the hosts' software (default: by generation)"
    )
    tpu_vm.add_argument(
        "--install",
        default="aaconv[train,gcs] jax[tpu]",
        metavar="PACKAGES",
        help="as for pip, separated by spaces (default: %(default)s)",
    )
    for command in (gke, tpu_vm):
        command.add_argument("--topology", metavar="TPU", help="of a slice, e.g. v5e:4x4")
        command.add_argument("--name", default="", metavar="NAME", help="what it is called there")
        command.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away at any time")
    for command in (slurm, gke):
        command.add_argument(
            "--save-seconds",
            type=at_least_one,
            default=300,
            metavar="S",
            help="for a step and a checkpoint, once told to stop (default: 300)",
        )
    for command in (slurm, gke, tpu_vm):
        python = "venv/bin/aaconv" if command is tpu_vm else "aaconv"
        command.add_argument(
            "--executable", default=python, metavar="COMMAND", help=f"starts aaconv there (default: {python})"
        )


def _slurm(arguments: argparse.Namespace) -> int:
    from aaconv import launch, parallel

    gpus = arguments.nodes * arguments.gpus_per_node
    # How many devices a node without GPUs has, --setup may decide.
    devices = parallel.imagined(gpus, "gpu", processes=gpus) if gpus else None
    text = launch.slurm(
        _training(arguments, devices),
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


def _gke(arguments: argparse.Namespace) -> int:
    from aaconv import launch

    _need(arguments, topology="v5e:4x4", image="us-docker.pkg.dev/PROJECT/REPOSITORY/aaconv:latest")
    text = launch.gke(
        _training(arguments, _chips(arguments, arguments.slices)),
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


def _tpu_vm(arguments: argparse.Namespace) -> int:
    from aaconv import launch

    _need(arguments, topology="v5e:4x4", name="train-1", zone="us-west4-a")
    text = launch.tpu_vm(
        _training(arguments, _chips(arguments)),
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


def _chips(arguments: argparse.Namespace, slices: int = 1) -> list[Any]:
    from aaconv import parallel
    from aaconv.slices import Slice

    found = Slice.parse(arguments.topology)
    return parallel.imagined(slices * found.chips, "tpu", slices * found.hosts, slices)


def _training(arguments: argparse.Namespace, devices: Sequence[Any] | None) -> Any:
    from aaconv import launch

    workdir, config = need_workdir(arguments), arguments.config or ""
    if arguments.function is _gke and config and not Path(config.partition(":")[0]).is_file():
        say(f"{config} is not on this machine, so it was not checked; it must be in the image")
    else:
        # What is wrong with a config is said here, not when hours later the hosts are there.
        found = load_config(arguments, or_workdir=False)
        if devices is not None:
            _check_sizes(found, devices)
    try:
        executable = shlex.split(arguments.executable)
    except ValueError as error:
        raise UsageError(f"--executable {arguments.executable!r} is no command for a shell: {error}") from error
    if not executable:
        raise UsageError(
            "--executable is empty: name the command that is aaconv on the hosts, e.g. --executable aaconv"
        )
    return launch.Training(config, workdir, arguments.overrides, executable)


def _check_sizes(config: ConfigDict, devices: Sequence[Any]) -> None:
    from aaconv import parallel

    mesh = parallel.configured_mesh(config.mesh, devices)
    parallel.check_batch("batch_size", config.batch_size, mesh, config.accumulate_steps)
    parallel.check_batch("eval_batch_size", config.eval_batch_size, mesh)
    if mesh.shape[parallel.SPATIAL] > 1:
        parallel.check_rows(dataset_info(config).image_shape[0], mesh)


def _need(arguments: argparse.Namespace, **examples: str) -> None:
    for name, example in examples.items():
        if not getattr(arguments, name):
            raise UsageError(f"--{name} is missing, e.g. --{name} {example}")


def _warn_of_own_disks(arguments: argparse.Namespace, slices: int = 1) -> None:
    from aaconv.slices import Slice

    hosts = Slice.parse(arguments.topology).hosts * slices
    if "://" not in arguments.workdir:
        say(
            f"warning: --workdir {arguments.workdir} must be a disk that outlives the machines"
            f"{f' and that all {hosts} hosts share' if hosts > 1 else ''}; gs://BUCKET/FOLDER is one"
        )
