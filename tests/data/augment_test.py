from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aaconv.data import augment


@pytest.fixture
def images() -> np.ndarray:
    return np.random.RandomState(0).randint(1, 256, (64, 7, 9, 3)).astype(np.uint8)


def _shift(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moves an image within a black frame, one pixel at a time."""
    moved = np.zeros_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            if 0 <= y + down < image.shape[0] and 0 <= x + right < image.shape[1]:
                moved[y + down, x + right] = image[y, x]
    return moved


def test_crops_are_shifts_in_a_black_frame(images: np.ndarray):
    cropped = np.asarray(jax.jit(augment.random_crop, static_argnums=2)(jax.random.key(0), images, 2))
    assert cropped.dtype == np.uint8 and cropped.shape == images.shape
    shifts = []
    for image, crop in zip(images, cropped, strict=True):
        matching = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if np.array_equal(_shift(image, down, right), crop)
        ]
        assert len(matching) == 1
        shifts += matching
    assert {down for down, _ in shifts} == {right for _, right in shifts} == set(range(-2, 3))
    assert len(set(shifts)) > 15  # of 25, from 64 draws


def test_flips_mirror_about_half_of_the_images(images: np.ndarray):
    flipped = np.asarray(jax.jit(augment.random_flip)(jax.random.key(0), images))
    kept = [np.array_equal(a, b) for a, b in zip(images, flipped, strict=True)]
    mirrored = [np.array_equal(a[:, ::-1], b) for a, b in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(kept, mirrored, strict=True))
    assert 20 <= sum(mirrored) <= 44


def test_the_key_alone_decides(images: np.ndarray):
    for function in (lambda key: augment.random_crop(key, images, 2), lambda key: augment.random_flip(key, images)):
        assert np.array_equal(function(jax.random.key(1)), function(jax.random.key(1)))
        assert not np.array_equal(function(jax.random.key(1)), function(jax.random.key(2)))


def test_equal_images_of_a_batch_are_treated_apart():
    images = jnp.tile(jnp.arange(1, 37, dtype=jnp.uint8).reshape(1, 6, 6, 1), (32, 1, 1, 1))
    cropped = np.asarray(augment.random_crop(jax.random.key(0), images, 2))
    assert len({crop.tobytes() for crop in cropped}) > 10


def test_no_padding_is_no_crop(images: np.ndarray):
    assert np.array_equal(augment.random_crop(jax.random.key(0), images, 0), images)


def test_a_batch_over_eight_devices_gets_the_same_augmentation(images: np.ndarray):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))

    @jax.jit
    def both(key: jax.Array, images: jax.Array) -> jax.Array:
        return augment.random_flip(key, augment.random_crop(key, images, 2))

    assert np.array_equal(both(jax.random.key(0), images), both(jax.random.key(0), spread))


def test_normalisation_is_the_formula(images: np.ndarray):
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)
    normal = augment.normalise(jnp.asarray(images), mean, std)
    assert normal.dtype == jnp.float32
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normal, expected, rtol=1e-5, atol=1e-6)
