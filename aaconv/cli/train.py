"""``aaconv train``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from aaconv.cli.arguments import Commands, at_least_one
from aaconv.cli.exits import OK, UsageError
from aaconv.cli.loading import dataset_info, load_config, need_workdir
from aaconv.cli.maps import Network, choose_layer, maps_title
from aaconv.cli.printing import percent, print_pairs, say, spoken_metrics
from aaconv.cli.processes import add_processes, is_first_process, join

if TYPE_CHECKING:
    import numpy as np

    from aaconv.config import ConfigDict


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    train = commands.add(
        "train",
        _train,
        "Train a network, or go on where the workdir's last checkpoint stands.",
        config="config file, e.g. configs/digits.py",
        workdir="folder of the run: config, metrics, checkpoints and pictures",
    )
    train.add_argument(
        "--maps", type=at_least_one, default=0, metavar="N", help="at the end, draw N test images' attention maps"
    )
    add_processes(train)


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments, or_workdir=False)
    workdir = need_workdir(arguments)
    join(arguments)
    if arguments.maps:
        import jax

        if jax.process_count() > 1:
            raise UsageError(
                "--maps draws with one process: leave it out here, and afterwards give the same command with --maps to "
                "one process, which draws from the checkpoint"
            )
        from aaconv import plots

        plots.check_installed()

        choose_layer(config, dataset_info(config), None)
    from aaconv import train

    result = train.train(config, workdir)
    if is_first_process():
        _print_result(config, workdir, result)
        _draw(arguments.maps, config, workdir)
    return OK


def _print_result(config: ConfigDict, workdir: str, result: dict[str, float]) -> None:
    from aaconv import checkpoints, metrics

    pairs = [("trained", f"{result['step']} steps, {result['epoch']:g} epochs")]
    pairs += spoken_metrics(result, config.data.eval_split)
    with checkpoints.Checkpoints(workdir, best_metric=config.checkpoint.best_metric, read_only=True) as saved:
        for row in metrics.read_rows(workdir):
            saved.record(row["step"], row)
        newest, best = max(saved.steps()), saved.best_step()
    pairs.append(("checkpoint", os.path.join(workdir, "checkpoints", str(newest))))
    if best is not None and best != newest:
        pairs.append(("best checkpoint", os.path.join(workdir, "checkpoints", str(best))))
    pairs.append(("metrics", os.path.join(workdir, "metrics.jsonl")))
    print_pairs(pairs)


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
        say("no picture of the curves: run  pip install 'aaconv[plots]'  and the same command again")
        return
    if num_maps:
        path = os.path.join(workdir, "attention.png")
        pairs.append(("attention maps", _draw_test_maps(num_maps, config, workdir, path)))
    print_pairs(pairs)


def _draw_test_maps(number: int, config: ConfigDict, workdir: str, path: str) -> str:
    import numpy as np

    from aaconv import data, plots, train

    restored = train.restore(config, workdir, note=say)
    layer = choose_layer(config, restored.info, None)
    network = Network(restored, layer)
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
            f"test image {index}: {names[labels[index]]}, taken for {names[guess]} ({percent(probabilities[guess])})"
        )
    title = maps_title(f"{config.model.name} on {config.data.name}, step {restored.step}", layer)
    return plots.attention_maps(list(images[chosen]), np.stack(maps), path, captions=captions, title=title)


def _varied(labels: np.ndarray) -> np.ndarray:
    """Returns the indices in an order where each class comes once before any comes again."""
    import numpy as np

    turns = [int(np.sum(labels[:i] == label)) for i, label in enumerate(labels)]
    return np.argsort(turns, kind="stable")
