"""Scikit-learn's handwritten digits as a TFDS data set: 1,797 images, no download, no TensorFlow.

Images are 8x8x1. Scikit-learn stores the counts 0 to 16 of set pixels in 4x4 blocks; here they
are scaled to uint8 as ``round(255 * count / 16)``. A fixed permutation puts 1,437 images in
``train`` and 360 in ``test``. Version 1.0.0.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NAME = "digits"
VERSION = "1.0.0"
NUM_TEST = 360


class Digits(NamedTuple):
    """All of scikit-learn's digits.

    Attributes:
      images: uint8 ``(n, 8, 8)``.
      labels: ``(n,)``, 0 to 9.
      splits: indices of each split, in its order.
    """

    images: np.ndarray
    labels: np.ndarray
    splits: dict[str, np.ndarray]


@functools.cache
def load() -> Digits:
    """Returns all images, their labels and the split; not to be written to."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    # RandomState, because its streams are frozen for good; a Generator's are not.
    order = np.random.RandomState(0).permutation(len(images))
    return Digits(images, found.target, {"train": order[:-NUM_TEST], "test": order[-NUM_TEST:]})


def write(made: Any) -> Path:
    """Writes the files of a TFDS builder that downloads nothing, and returns their folder."""
    import tensorflow_datasets as tfds

    # TFDS announces a download of unknown size, which there is not.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    finally:
        tfds.enable_progress_bar()
    return Path(made.data_path)


def builder(root: os.PathLike[str]) -> Any:
    """Returns the TFDS builder of the digits, whose files lie or will lie below `root`."""
    # Inside a function because a builder's base class takes importing tensorflow_datasets.
    import tensorflow_datasets as tfds
    from PIL import Image

    class DigitsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Handwritten digits, 8x8, ten classes."""

        name = NAME
        VERSION = tfds.core.Version("1.0.0")
        RELEASE_NOTES = {"1.0.0": "First version: a fixed split of 1,437 and 360 images."}

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=(
                    "Optical recognition of handwritten digits, as scikit-learn ships it: 1,797 images of 8x8 "
                    "pixels, the counts 0 to 16 scaled to 0 to 255, split by a fixed permutation."
                ),
                homepage="https://archive.ics.uci.edu/dataset/80",
                citation=(
                    "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. "
                    "UCI Machine Learning Repository."
                ),
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(order) for split, order in load().splits.items()}

        def _generate_examples(self, order: Any) -> Any:
            images, labels, _ = load()
            for key, index in enumerate(order):
                # TFDS encodes arrays with TensorFlow, but Pillow images without it.
                yield key, {"image": Image.fromarray(images[index]), "label": int(labels[index])}

    return DigitsBuilder(data_dir=os.fspath(root), file_format="array_record")
