"""Small prepared data sets, made on the spot."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aaconv.config import ConfigDict, default_config
from aaconv.data import own


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the digits prepared in it, not to be written to."""
    folder = tmp_path_factory.mktemp("digits")
    own.prepare("digits", folder)
    return str(folder)


@pytest.fixture
def digits_copy(digits_dir: str, tmp_path: Path) -> Path:
    """The folder of a version of the digits of one's own, to be damaged."""
    shutil.copytree(digits_dir, tmp_path / "copy")
    return tmp_path / "copy" / "digits" / "1.0.0"


@pytest.fixture
def digits_config(digits_dir: str) -> ConfigDict:
    return _config(name="digits", data_dir=digits_dir, channels=1, mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="session")
def photographs_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 JPEGs and PNGs of varying sizes, RGB, greyscale and palette, in 3 classes."""
    return make_photographs(tmp_path_factory.mktemp("photographs"), [photograph(i) for i in range(48)])


@pytest.fixture
def photographs_config(photographs_dir: str) -> ConfigDict:
    config = _config(name="photographs", data_dir=photographs_dir, image_size=16, eval_split="test")
    config.data.augment.random_resized_crop = True
    config.batch_size = 8
    return config


@pytest.fixture
def photographs_of(tmp_path: Path) -> Callable[[dict[int, bytes]], str]:
    """Makes the photographs with some of their files replaced."""
    return lambda other: make_photographs(tmp_path, [other.get(i) or photograph(i) for i in range(48)])


def _config(**data: Any) -> ConfigDict:
    config = default_config()
    config.data.update(data)
    return config


def photograph(i: int) -> bytes:
    """An image whose mean brightness tells which one it is."""
    random = np.random.RandomState(i)
    height, width = random.randint(20, 90, 2)
    pixels = np.full((height, width, 3), 5 * i, np.uint8) + random.randint(0, 3, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels).convert(("RGB", "L", "P")[i % 3])
    encoded = io.BytesIO()
    image.save(encoded, "PNG" if i % 3 == 2 else "JPEG", quality=95)
    return encoded.getvalue()


def make_photographs(folder: Path, encoded: list[bytes]) -> str:
    import tensorflow_datasets as tfds

    class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images of varying sizes."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Images of varying sizes.",
                features=tfds.features.FeaturesDict(
                    {
                        "picture": tfds.features.Image(shape=(None, None, 3)),
                        "kind": tfds.features.ClassLabel(names=["rose", "daisy", "tulip"]),
                        "number": np.int64,
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples(encoded), "test": self._generate_examples(encoded[:10])}

        def _generate_examples(self, encoded: list[bytes]) -> Any:
            for i, data in enumerate(encoded):
                yield i, {"picture": io.BytesIO(data), "kind": i % 3, "number": i}

    tfds.disable_progress_bar()
    Photographs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)
