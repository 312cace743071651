"""Decoding, cutting and resizing single images on the host, with Pillow and numpy.

Everything here returns uint8 arrays ``(h, w, c)``. Resizing is bilinear with antialiasing,
as Pillow does it: when shrinking, every source pixel counts.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from aaconv.config import ConfigDict

Box = tuple[int, int, int, int]  # left, upper, right, lower in pixels of the stored image

_MODES = {1: "L", 3: "RGB"}
_RATIOS = (3 / 4, 4 / 3)  # of width to height, Inception's
_TRIES = 10  # before a random crop gives up and takes the middle


def decode(encoded: bytes, channels: int, *, where: str) -> np.ndarray:
    """Decodes an image at its stored size.

    Args:
      encoded: the bytes of a PNG, JPEG or any other file Pillow reads.
      channels: 1 or 3; greyscale, palette and CMYK images are converted.
      where: words that find the image again, for the message.

    Raises:
      ValueError: the bytes are no image, or a broken one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return _array(_convert(image, channels), channels)
    except Exception as error:
        raise _unusable(where, error) from error


def decode_random_crop(
    encoded: bytes, shape: tuple[int, int], channels: int, rng: np.random.Generator, *, min_area: float, where: str
) -> np.ndarray:
    """Decodes an image and cuts a random box out of it, resized to `shape`.

    The box has an area of `min_area` to 1 of the image and a ratio of width to height of
    3/4 to 4/3 (Szegedy et al. 2015, as torchvision's RandomResizedCrop samples it).
    """
    return _decode_cut(encoded, shape, channels, lambda width, height: random_box(width, height, rng, min_area), where)


def decode_central_crop(
    encoded: bytes, shape: tuple[int, int], channels: int, *, share: float, where: str
) -> np.ndarray:
    """Decodes an image and resizes its middle to `shape`.

    Args:
      encoded: the bytes of an image file.
      shape: height and width of the result, pixels.
      channels: 1 or 3.
      share: of the largest box of these proportions that is kept, along each side.
      where: words that find the image again, for the message.
    """
    return _decode_cut(
        encoded,
        shape,
        channels,
        lambda width, height: central_box(width, height, share, ratio=shape[1] / shape[0]),
        where,
    )


def _decode_cut(
    encoded: bytes, shape: tuple[int, int], channels: int, choose_box: Callable[[int, int], Box], where: str
) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            left, upper, right, lower = choose_box(width, height)
            # A JPEG decodes at 1/2, 1/4 or 1/8 of its size for a fraction of the cost, as long as
            # the box keeps as many pixels as are wanted; other formats ignore this.
            scale = max(shape[0] / (lower - upper), shape[1] / (right - left))
            image.draft(_MODES[channels], (math.ceil(width * scale), math.ceil(height * scale)))
            across, down = image.width / width, image.height / height
            box = (left * across, upper * down, min(right * across, image.width), min(lower * down, image.height))
            image = _convert(image, channels)
            return _array(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=box), channels)
    except Exception as error:
        raise _unusable(where, error) from error


def resize_central(image: np.ndarray, shape: tuple[int, int], *, share: float = 1.0) -> np.ndarray:
    """Resizes the middle of an image, of the target's proportions.

    Args:
      image: uint8 ``(h, w, c)``.
      shape: height and width of the result.
      share: of the largest such box in the image that is kept, along each side.
    """
    if image.shape[:2] == shape:
        return image
    channels = image.shape[-1]
    pillow = Image.fromarray(image[..., 0] if channels == 1 else image)
    box = central_box(pillow.width, pillow.height, share, ratio=shape[1] / shape[0])
    return _array(pillow.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=box), channels)


def random_box(width: int, height: int, rng: np.random.Generator, min_area: float) -> Box:
    """Draws a box of `min_area` to 1 of the image's area and a ratio of 3/4 to 4/3."""
    for _ in range(_TRIES):
        area = rng.uniform(min_area, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    ratio = min(max(width / height, _RATIOS[0]), _RATIOS[1])
    return central_box(width, height, 1.0, ratio=ratio)


def central_box(width: int, height: int, share: float, *, ratio: float = 1.0) -> Box:
    """Returns the largest central box of a ratio of width to height, shrunk to a share of its sides."""
    h = min(float(height), width / ratio) * share
    box_width, box_height = max(1, round(h * ratio)), max(1, round(h))
    left, upper = (width - box_width) // 2, (height - box_height) // 2
    return left, upper, left + box_width, upper + box_height


def load_image(config: ConfigDict, path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file, e.g. for prediction.

    Args:
      config: its `data.channels` says what the image is converted to, greyscale or RGB.
      path: a file in any format Pillow reads.

    Returns:
      uint8 ``(h, w, c)``, turned as its EXIF orientation says.

    Raises:
      ValueError: the file is missing, unreadable, no image, a broken one, or not of 8 bits.
    """
    file, channels = Path(path), config.data.channels
    if not file.is_file():
        what = "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"image file {str(file)!r} {what}: give the path of a PNG or JPEG")
    try:
        with Image.open(file) as image:
            return _array(_convert(ImageOps.exif_transpose(image), channels), channels)
    except Exception as error:
        raise _unusable(f"file {str(file)!r}", error) from error


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise ValueError("its pixels have more than 8 bits")
    # Pillow copies where the mode is right already, which small images feel.
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def _array(image: Image.Image, channels: int) -> np.ndarray:
    array = np.asarray(image, np.uint8)
    return array[..., None] if channels == 1 else array


def _unusable(where: str, error: Exception) -> Exception:
    """Returns the error to raise: of broken bytes Pillow's decoders raise anything, `struct.error` for one."""
    if isinstance(error, MemoryError):
        return error
    if isinstance(error, UnidentifiedImageError):
        reason = "it is in no image format that is known"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = str(error) or type(error).__name__
    return ValueError(f"image {where} is corrupt or not an image ({reason}): replace it by a whole 8-bit PNG or JPEG")
