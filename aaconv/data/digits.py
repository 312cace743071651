"""Scikit-learn's handwritten digits as a TFDS data set: 1,797 images, no download, no TensorFlow.

Images are 8x8x1. Scikit-learn stores the counts 0 to 16 of set pixels in 4x4 blocks; here they
are scaled to uint8 as ``round(255 * count / 16)``. A fixed permutation puts 1,437 images in
``train`` and 360 in ``test``. Version 1.0.0.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

NAME = "digits"
VERSION = "1.0.0"
NUM_TEST = 360


def prepare(root: os.PathLike[str]) -> str:
    """Makes the data set in ``root/digits/1.0.0`` and returns that folder.

    It is made in a folder of its own and moved into place in one step, so several processes
    may do this at once and nobody sees half a data set.

    Raises:
      ValueError: `root` cannot be written.
    """
    root = Path(root)
    home = root / NAME / VERSION
    if (home / "dataset_info.json").exists():
        return str(home)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".digits-", dir=root))
    except OSError as error:
        raise ValueError(
            f"the digits cannot be prepared in {root}: {error.strerror or error}; set data.data_dir or "
            "TFDS_DATA_DIR to a folder that can be written"
        ) from error
    try:
        made = write(builder(scratch))
        try:
            os.rename(made, home)
        except OSError:
            # Another process was first: its files are the same as ours.
            if not (home / "dataset_info.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return str(home)


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
    import numpy as np
    import tensorflow_datasets as tfds
    from PIL import Image
    from sklearn.datasets import load_digits

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
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
            digits: Any = load_digits()
            # RandomState, because its streams are frozen for good; a Generator's are not.
            order = np.random.RandomState(0).permutation(len(digits.target))
            return {
                "train": self._generate_examples(digits, order[:-NUM_TEST]),
                "test": self._generate_examples(digits, order[-NUM_TEST:]),
            }

        def _generate_examples(self, digits: Any, order: Any) -> Any:
            for key, index in enumerate(order):
                pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
                # TFDS encodes arrays with TensorFlow, but Pillow images without it.
                yield key, {"image": Image.fromarray(pixels), "label": int(digits.target[index])}

    return Digits(data_dir=os.fspath(root), file_format="array_record")
