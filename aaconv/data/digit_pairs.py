"""Two handwritten digits, near or far apart, as a TFDS data set: the label is a relation that no single digit tells.

An image has 8x96 pixels, black but for two of scikit-learn's digits (8x8, from 0 to 4) beside each other. It is
``same`` where both are the same digit, in two hands, else ``left_larger`` or ``right_larger``. Three configs differ in
the ``gap`` between the digits, in pixels, and in where the two stand:

- ``near``, 0 to 3: the receptive field of a Wide-ResNet-10, 25 pixels, holds both digits,
- ``middle``, 10 to 13: it holds parts of both,
- ``far``, 24 to 27: it never holds a pixel of both.

**What 25 pixels can know.** In ``far`` they hold at most one digit, or an edge of the image, never both: digits
keep 24 pixels from the left and the right edge, so that no zero padding tells where one stands. And a digit alone says
nothing of the label. Every digit is in as many images of each label, as often on the left as on the right, and as
likely at each of the places within the network's stride of 4. So the logits of a convolutional network that averages
over the image before a linear layer are a sum of what each digit gives alone, whichever side it is on. At most 43.3%
are then right, where all images of one digit give the same; scores that differ among them are not bounded by it.
Attention without positions relates the digits as a set: it can tell ``same``, but left from right it cannot, and ends
at 66.7%. With positions nothing stands in the way of 100%.

The digits of ``train`` are those of the set ``digits`` in ``train``, likewise ``test``; who wrote them scikit-learn
does not say. There are 8,100 and 2,700 images, a third of each label, with all digits in ``same`` and all pairs of
digits in the other two equally often. The configs hold the same pairs of images in the same order. Version 2.0.0; in
version 1.0.0, with all ten digits on 12 rows, a small network stayed at chance for 25 thousand images.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from aaconv.data import digits

NAME = "digit_pairs"
VERSION = "2.0.0"
KINDS = 5  # of digits: 0 to 4
HEIGHT, WIDTH, DIGIT = 8, 96, 8  # pixels
MARGIN = 24  # pixels at the left and the right without a digit
STRIDE = 4  # of a Wide-ResNet: as many places of a digit it could tell apart
GAPS = {"near": range(0, 4), "middle": range(10, 14), "far": range(24, 28)}  # pixels between the digits, by config
LABELS = ("same", "left_larger", "right_larger")
PER_LABEL = {"train": 2_700, "test": 900}  # multiples of 5 digits and of 10 pairs


@dataclasses.dataclass(frozen=True)
class Pair:
    """Which two of scikit-learn's digits stand where.

    Attributes:
      images: indices of the left and the right image in ``load_digits``.
      digits: what they show, below `KINDS`.
      left: first column of the left digit.
      gap: columns between the digits.
    """

    images: tuple[int, int]
    digits: tuple[int, int]
    left: int
    gap: int

    @property
    def label(self) -> str:
        left, right = self.digits
        return LABELS[0] if left == right else LABELS[1] if left > right else LABELS[2]

    def draw(self, images: np.ndarray) -> np.ndarray:
        """Returns the image, uint8 ``(HEIGHT, WIDTH)``, from all digits, uint8 ``(n, 8, 8)``."""
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        for index, left in zip(self.images, (self.left, self.left + DIGIT + self.gap), strict=True):
            pixels[:, left : left + DIGIT] = images[index]
        return pixels


def pairs(config: str, split: str) -> list[Pair]:
    """Returns the pairs of a split in their order, the same at every call.

    Args:
      config: a key of `GAPS`.
      split: ``train`` or ``test``.
    """
    _, labels, splits = digits.load()
    # RandomState, because its streams are frozen for good; a Generator's are not.
    choice, place = (np.random.RandomState([stream, split == "test"]) for stream in (0, 1))
    each = PER_LABEL[split]
    shown = [(d, d) for d in range(KINDS) for _ in range(each // KINDS)]
    larger = [(a, b) for a in range(KINDS) for b in range(a) for _ in range(each // (KINDS * (KINDS - 1) // 2))]
    shown += larger + [(b, a) for a, b in larger]
    shown = [shown[i] for i in choice.permutation(len(shown))]
    stock = {digit: _cycle(splits[split][labels[splits[split]] == digit], choice) for digit in range(KINDS)}
    gaps = np.asarray(GAPS[config])
    # As many places as the stride divides, so that each of its phases is as likely on the left as on the right.
    places = (WIDTH - 2 * MARGIN - 2 * DIGIT - gaps.max() + 1) // STRIDE * STRIDE
    found = []
    for left, right in shown:
        images = next(stock[left]), next(stock[right])
        gap, column = place.random_sample(2)
        found.append(
            Pair(
                images=images,
                digits=(left, right),
                left=MARGIN + int(column * places),
                gap=int(gaps[int(gap * len(gaps))]),
            )
        )
    return found


def _cycle(indices: np.ndarray, random: np.random.RandomState) -> Iterator[int]:
    """Gives all indices in a random order, then in another, without end: none comes twice running."""
    last = -1
    while True:
        order = random.permutation(indices)
        if order[0] == last:
            order = np.roll(order, 1)
        yield from map(int, order)
        last = order[-1]


def builder(root: os.PathLike[str], config: str) -> Any:
    """Returns the TFDS builder of a config, whose files lie or will lie below `root`."""
    # Inside a function because a builder's base class takes importing tensorflow_datasets.
    import tensorflow_datasets as tfds
    from PIL import Image

    class DigitPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Two handwritten digits far apart, 8x96, three classes."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        RELEASE_NOTES = {
            "1.0.0": "First version: 8,100 and 2,700 images at each of three distances.",
            "2.0.0": "Digits 0 to 4 instead of all ten, and no rows above and below them.",
        }
        BUILDER_CONFIGS = [
            tfds.core.BuilderConfig(name=name, description=f"{gaps[0]} to {gaps[-1]} pixels between the digits.")
            for name, gaps in GAPS.items()
        ]

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=(
                    "Two of scikit-learn's handwritten digits beside each other on a black image of 8x96 pixels: the "
                    "same digit, or the larger one on the left, or on the right."
                ),
                homepage="https://archive.ics.uci.edu/dataset/80",
                citation=(
                    "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. "
                    "UCI Machine Learning Repository."
                ),
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(HEIGHT, WIDTH, 1), encoding_format="png"),
                        "label": tfds.features.ClassLabel(names=LABELS),
                        "left_digit": np.int64,
                        "right_digit": np.int64,
                        "left_column": np.int64,
                        "gap": np.int64,
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in PER_LABEL}

        def _generate_examples(self, split: str) -> Any:
            images = digits.load().images
            for key, pair in enumerate(pairs(config, split)):
                yield (
                    key,
                    {
                        # TFDS encodes arrays with TensorFlow, but Pillow images without it.
                        "image": Image.fromarray(pair.draw(images)),
                        "label": pair.label,
                        "left_digit": pair.digits[0],
                        "right_digit": pair.digits[1],
                        "left_column": pair.left,
                        "gap": pair.gap,
                    },
                )

    return DigitPairs(data_dir=os.fspath(root), config=config, file_format="array_record")
