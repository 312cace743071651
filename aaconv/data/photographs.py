"""Made-up photographs as a TFDS data set: as many pixels and bytes as ImageNet's have, to measure decoding with.

JPEGs of 500x375 pixels at quality 95, which come to about 110 kB each; ILSVRC 2012 has 138 GB for 1.28 million
training images, that is 108 kB. Their amplitudes fall with frequency as photographs' do (Field 1987), somewhat faster
than 1/f so that the files have that size, and the colours are strongly correlated. What a decoder does depends on
pixels and bytes, not on what can be seen.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aaconv.data import digits

NAME = "made_up_photographs"
WIDTH, HEIGHT, QUALITY = 500, 375, 95
FALL = 1.3  # amplitude is frequency to the power of minus this
DEVIATION = 50.0  # of a pixel's value


def prepare(root: os.PathLike[str], count: int) -> Path:
    """Makes the data set in ``root/made_up_photographs/1.0.0``, with `count` images in its only split, ``train``."""
    import tensorflow_datasets as tfds

    class MadeUpPhotographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """JPEGs of no content."""

        name = NAME
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)})
            return tfds.core.DatasetInfo(
                builder=self,
                description="Noise with the spectrum of photographs.",
                features=features,
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for index in range(count):
                yield index, {"image": photograph(index), "label": index % 10}

    return digits.write(MadeUpPhotographs(data_dir=os.fspath(root), file_format="array_record"))


def photograph(seed: int) -> bytes:
    """Returns a JPEG, the same for the same seed."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf  # no mean
    amplitude = frequency**-FALL

    def noise() -> np.ndarray:
        phase = np.exp(2j * np.pi * generator.random(amplitude.shape))
        field = np.fft.irfft2(amplitude * phase, (HEIGHT, WIDTH))
        return field / field.std()

    grey = noise()
    colours = [120 + DEVIATION * (0.95 * grey + 0.3 * noise()) for _ in range(3)]
    pixels = np.clip(np.stack(colours, axis=-1), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
