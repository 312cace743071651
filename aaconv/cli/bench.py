"""``aaconv bench attention``, ``bench step``, ``bench input`` and ``bench loop``."""

from __future__ import annotations

import argparse

from aaconv.cli.arguments import Commands, Parser, above_zero, at_least_one
from aaconv.cli.exits import OK
from aaconv.cli.loading import load_config
from aaconv.cli.printing import say


def add(commands: Commands) -> None:
    """Adds the commands and their flags."""
    commands.add_group(
        "bench",
        "Measure what attention and training steps cost.",
        "Measure what attention and training steps cost: medians after a warm-up, taken in turn.",
        metavar="WHAT",
        unknown="does not measure",
        missing="nothing to measure",
    )
    attention = commands.add(
        "bench attention",
        _attention,
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
        "--memory-limit", type=above_zero, metavar="GB", help="begin nothing that needs more (default: half the free)"
    )
    attention.add_argument("--memory-only", action="store_true", help="compile and read the memory, run nothing")
    step = commands.add(
        "bench step",
        _step,
        "Time and memory of the training steps of networks, and where the time goes.",
        config="config file of the recipe (default: that of the ImageNet ResNets)",
    )
    step.add_argument("--models", metavar="NAMES", help="networks (default: resnet50,aa_resnet50)")
    step.add_argument(
        "--size", type=at_least_one, metavar="PIXELS", help="side of the images (default: 160 on a CPU, else 224)"
    )
    step.add_argument("--batch", type=at_least_one, metavar="N", help="images a step (default: 8 on a CPU, else 128)")
    step.add_argument("--inference", action="store_true", help="the evaluation step instead")
    step.add_argument("--no-layers", action="store_true", help="leave out the layers by themselves")
    _add_pipeline_benchmarks(commands)
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
            "--seconds", type=above_zero, default=seconds, metavar="S", help=f"of timing {per} (default: {seconds})"
        )
        command.add_argument(
            "--topology", default="", metavar="TPU", help="compile for a TPU without one, e.g. v5e:2x2, and run nothing"
        )
        _add_output(command)


def _add_pipeline_benchmarks(commands: Commands) -> None:
    source = commands.add(
        "bench input",
        _input,
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
        "--size", type=at_least_one, metavar="PIXELS", help="side of the crops (default: the config's, else 224)"
    )
    source.add_argument("--batch", type=at_least_one, default=64, metavar="N", help="images a batch (default: 64)")
    source.add_argument(
        "--feed",
        type=above_zero,
        default=1000.0,
        metavar="RATE",
        help="images a second of a device, to say how many cores feed it (default: 1000)",
    )
    source.add_argument(
        "--seconds", type=above_zero, default=5.0, metavar="S", help="of each measurement, at least (default: 5)"
    )
    loop = commands.add(
        "bench loop",
        _loop,
        "What the training loop costs beside its steps: real steps with data and logging, and bare steps, in turn.",
        config="config file, e.g. configs/digits.py",
    )
    loop.add_argument(
        "--steps", type=at_least_one, default=200, metavar="N", help="of a round, each way, at least (default: 200)"
    )
    for command in (source, loop):
        command.add_argument(
            "--rounds", type=at_least_one, default=5, metavar="N", help="times that each way is measured (default: 5)"
        )
        _add_output(command)


def _add_output(command: Parser) -> None:
    folder = f"runs/{command.prog.partition(' ')[2].replace(' ', '/')}"
    command.add_argument("--output", default=folder, metavar="DIR", help=f"for the files (default: {folder})")


def _attention(arguments: argparse.Namespace) -> int:
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
        note=say,
    )
    return OK


def _step(arguments: argparse.Namespace) -> int:
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
        note=say,
    )
    return OK


def _input(arguments: argparse.Namespace) -> int:
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
        note=say,
    )
    return OK


def _loop(arguments: argparse.Namespace) -> int:
    from aaconv.bench import loop

    loop.run(
        load_config(arguments, or_workdir=False),
        name=arguments.config,
        overrides=arguments.overrides,
        steps=arguments.steps,
        rounds=arguments.rounds,
        output=arguments.output,
        note=say,
    )
    return OK


def _counts_of_workers(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of worker processes such as 0,1,2")
    return tuple(map(int, numbers))
