"""``aaconv predict``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aaconv.cli.arguments import Commands, at_least_one
from aaconv.cli.exits import OK, WRONG_INPUT, UsageError
from aaconv.cli.loading import OWN_CONFIG, add_checkpoint, dataset_info, load_config, need_workdir
from aaconv.cli.maps import Network, choose_layer, maps_title
from aaconv.cli.printing import percent, say

if TYPE_CHECKING:
    import numpy as np


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    predict = commands.add("predict", _predict, "Classify image files.", config=OWN_CONFIG, workdir="folder of the run")
    predict.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=at_least_one, default=5, metavar="K", help="classes to print (default: 5)")
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
    add_checkpoint(predict)


def _predict(arguments: argparse.Namespace) -> int:
    workdir = need_workdir(arguments)
    config = load_config(arguments, or_workdir=True)
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

    info = dataset_info(config)
    layer = choose_layer(config, info, arguments.layer) if arguments.maps else None
    source = argparse.Namespace(info=lambda config: info)
    restored = train.restore(config, workdir, which=arguments.checkpoint, data=source, note=say)
    network = Network(restored, layer)
    drawn: list[_Drawn] = []
    wrong = []
    for file in arguments.images:
        try:
            image = data.preprocess_image(config, data.load_image(config, file), info)
        except ValueError as error:
            say(f"aaconv: error: {error}")
            wrong.append(file)
            continue
        if layer is not None:
            probabilities, weights = network.look(image)
            best = int(probabilities.argmax())
            caption = f"{Path(file).name}: {info.label_names[best]} ({percent(probabilities[best])})"
            drawn.append(_Drawn(file, image, caption, weights))
        else:
            probabilities = network.classify(image)
        print(file)
        for label in probabilities.argsort()[::-1][: arguments.top]:
            print(f"  {percent(probabilities[label]):>7}  {info.label_names[label]}")
    if layer is not None and drawn:
        title = maps_title(f"{config.model.name}, step {restored.step}", layer)
        for path in _draw_predictions(drawn, Path(arguments.maps), arguments.query, title):
            print(f"attention maps  {path}")
    if wrong:
        whole = len(arguments.images) - len(wrong)
        say(f"aaconv: {len(wrong)} of {len(arguments.images)} images could not be read; {whole} classified")
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


def _point(text: str) -> tuple[float, float]:
    try:
        down, across = (float(part) for part in text.split(","))
    except ValueError:
        down = across = -1.0
    if not (0 <= down <= 1 and 0 <= across <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers from 0 to 1, down and across, such as 0.5,0.25")
    return down, across
