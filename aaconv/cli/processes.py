"""The flags by which the processes of one run find each other."""

from __future__ import annotations

import argparse

from aaconv.cli.arguments import Parser, above_zero
from aaconv.cli.printing import say


def add_processes(command: Parser) -> None:
    """Adds the flags."""
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
            f"--{name}-timeout",
            type=above_zero,
            default=seconds,
            metavar="SECONDS",
            help=f"{what} (default: {seconds})",
        )


def join(arguments: argparse.Namespace) -> None:
    """Waits for the other processes, where there are any."""
    from aaconv import hosts

    hosts.start(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        start_timeout=arguments.start_timeout,
        heartbeat_timeout=arguments.heartbeat_timeout,
        note=say,
    )


def is_first_process() -> bool:
    """Tells whether this process is the one that prints and draws."""
    import jax

    return jax.process_index() == 0
