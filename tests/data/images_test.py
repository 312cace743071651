from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aaconv import data
from aaconv.config import default_config
from aaconv.data import images


def _encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _broken_exif() -> bytes:
    """A JPEG whose EXIF says that it is turned and has a fraction in the place of its width."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5
    whole = _encode(_ramp(10, 20), "JPEG", exif=exif)
    assert whole.count(b"\x01\x1a\x00\x05") == 1
    return whole.replace(b"\x01\x1a\x00\x05", b"\x01\x00\x00\x05")


def _unknown_dds() -> bytes:
    whole = bytearray(_encode(_ramp(8, 8), "DDS"))
    whole[80:84] = (128).to_bytes(4, "little")  # the flags of the pixel format
    return bytes(whole)


def _ramp(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, each by the share of the side."""
    y, x = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)


def test_random_boxes_keep_their_area_and_ratio():
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        left, upper, right, lower = images.random_box(320, 240, rng, 0.2)
        assert 0 <= left < right <= 320 and 0 <= upper < lower <= 240
        area, ratio = (right - left) * (lower - upper) / (320 * 240), (right - left) / (lower - upper)
        assert 0.19 < area <= 1 and 0.73 < ratio < 1.36
        areas.append(area)
    assert min(areas) < 0.25 and max(areas) > 0.8


def test_an_image_too_long_for_any_box_gives_its_middle():
    assert images.random_box(1000, 10, np.random.default_rng(0), 0.9) == (493, 0, 506, 10)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("stored", [(64, 48), (480, 640)])
def test_the_central_crop_shows_the_middle(kind: str, stored: tuple[int, int]):
    # A large JPEG decodes at a fraction of its size: the result must not tell.
    height, width = stored
    crop = images.decode_central_crop(_encode(_ramp(height, width), kind), (20, 20), 3, share=0.5, where="")
    side = 0.5 * min(height, width)
    for channel, length in ((0, width), (1, height)):
        positions = length / 2 - side / 2 + side * (np.arange(20) + 0.5) / 20
        profile = crop[..., channel].mean(axis=1 - np.array([1, 0])[channel])
        np.testing.assert_allclose(profile, positions / length * 255, atol=4)


def test_a_random_crop_is_the_box_that_was_drawn():
    encoded = _encode(_ramp(100, 200))
    crop = images.decode_random_crop(encoded, (16, 16), 3, np.random.default_rng(7), min_area=0.1, where="")
    left, upper, right, lower = images.random_box(200, 100, np.random.default_rng(7), 0.1)
    assert crop.shape == (16, 16, 3)
    assert abs(crop[..., 0].mean() - (left + right) / 2 / 200 * 255) < 2
    assert abs(crop[..., 1].mean() - (upper + lower) / 2 / 100 * 255) < 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_channels_asked_for(mode: str, channels: int, tmp_path: Path):
    path = tmp_path / "image.tiff"
    Image.new("RGB", (9, 5), (255, 255, 255)).convert(mode).save(path)
    config = default_config()
    config.data.channels = channels
    image = data.load_image(config, path)
    assert image.shape == (5, 9, channels) and image.dtype == np.uint8 and image.min() == 255


def test_the_orientation_a_camera_noted_is_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_ramp(10, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.load_image(default_config(), tmp_path / "turned.jpg").shape == (20, 10, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no image format"),
        (b"words, not pixels", "no image format"),
        (_encode(_ramp(40, 40))[:70], "truncated"),
        (_encode(_ramp(40, 40), "JPEG")[:400], "truncated"),
        (_encode(np.zeros((4, 4), np.uint16)), "more than 8 bits"),
        (_broken_exif(), "not an integer"),
        (_unknown_dds(), "pixel format"),
    ],
)
def test_a_file_that_is_no_whole_image_is_named(content: bytes, reason: str, tmp_path: Path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"picture\.png' is corrupt or not an image .*(?i:{reason}).*replace it by"):
        data.load_image(default_config(), path)


def test_an_example_that_no_decoder_knows_is_named():
    for decode in (images.decode, functools.partial(images.decode_central_crop, shape=(4, 4), share=1.0)):
        with pytest.raises(ValueError, match="image example 3 is corrupt .*pixel format"):
            decode(_unknown_dds(), channels=3, where="example 3")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.png' does not exist: give the path"):
        data.load_image(default_config(), tmp_path / "none.png")
    with pytest.raises(ValueError, match="is not a file: give the path"):
        data.load_image(default_config(), tmp_path)


def test_resizing_keeps_the_middle_of_the_right_proportions():
    resized = images.resize_central(_ramp(100, 200), (10, 10))
    # The middle 100 of 200 columns, each result column ten of them wide.
    np.testing.assert_allclose(resized[0, :, 0], (50 + 5 + 10 * np.arange(10)) / 200 * 255, atol=2)
    same = _ramp(10, 10)
    assert images.resize_central(same, (10, 10)) is same
    assert images.resize_central(same[..., :1], (5, 7)).shape == (5, 7, 1)
