"""``aaconv show``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import OK
from aaconv.cli.loading import dataset_info, load_config, summarise
from aaconv.cli.printing import make_console, make_table, percent, size

if TYPE_CHECKING:
    from rich.console import Console

    from aaconv.config import ConfigDict
    from aaconv.models.summary import Summary


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    show = commands.add(
        "show",
        _show,
        "Print the resolved config, parameters and FLOPs by stage, and what attends where.",
        config="config file, e.g. configs/digits.py",
        workdir="instead of --config: the folder of a run",
    )
    show.add_argument("--layers", action="store_true", help="every layer, not only the stages")


def _show(arguments: argparse.Namespace) -> int:
    config = load_config(arguments, or_workdir=True)
    info = dataset_info(config)
    summary = summarise(config, info)
    from rich.text import Text

    console = make_console()
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
    stages = make_table("stage", "output", "parameters", "share", "MFLOPs", "share")
    for stage, (parameters, flops, shape) in summary.by_stage().items():
        stages.add_row(stage, size(shape), *_counts(parameters, flops, summary))
    stages.add_section()
    stages.add_row("all", "", *_counts(summary.parameters, summary.flops, summary))
    console.print(stages)
    console.print(
        Text("FLOPs for one image: 2 for a multiply-add in a convolution or projection, 1 in attention's products")
    )
    if arguments.layers:
        console.print()
        layers = make_table("layer", "kind", "output", "parameters", "share", "MFLOPs", "share", text=3)
        for layer in summary.layers:
            counts = _counts(layer.parameters, layer.flops, summary)
            layers.add_row(layer.path, layer.kind, size(layer.output_shape), *counts)
        console.print(layers)
    console.print()
    if not summary.attention:
        console.print(Text("nothing attends"))
        return OK
    attention = make_table(
        "attends", "in", "over", "out", "heads", "key", "value", "conv", "positions", "maps (MB)", text=4
    )
    for layer in summary.attention:
        attention.add_row(
            layer.path.removesuffix("/attention"),
            size(layer.layer_input),
            size(layer.attends_at),
            size(layer.layer_output),
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
        percent(parameters / max(summary.parameters, 1)),
        f"{flops / 1e6:,.2f}",
        percent(flops / max(summary.flops, 1)),
    )
