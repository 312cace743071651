"""Image-classification data sets: any prepared TFDS set, read without TensorFlow.

The training loop uses three functions, `info`, `train_input` and `eval_input`; `prepare`
makes a data set; `load_image` and `preprocess_image` turn a user's file into what a network
is fed. Nothing heavy is imported before the first of them is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aaconv.data.catalog import (
        DatasetInfo as DatasetInfo,
        NotPrepared as NotPrepared,
        info as info,
        prepare as prepare,
        prepare_command as prepare_command,
    )
    from aaconv.data.images import load_image as load_image
    from aaconv.data.pipeline import (
        EvalInput as EvalInput,
        TrainInput as TrainInput,
        eval_input as eval_input,
        preprocess_image as preprocess_image,
        train_input as train_input,
    )

_HOMES = {
    "DatasetInfo": "catalog",
    "EvalInput": "pipeline",
    "NotPrepared": "catalog",
    "TrainInput": "pipeline",
    "eval_input": "pipeline",
    "info": "catalog",
    "load_image": "images",
    "prepare": "catalog",
    "prepare_command": "catalog",
    "preprocess_image": "pipeline",
    "train_input": "pipeline",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
