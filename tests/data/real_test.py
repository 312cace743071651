"""The real CIFAR-100, flowers and blood cells, where they are prepared."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from aaconv import data
from aaconv.config import ConfigDict, default_config


def _config(tfds_dir: str, name: str, **changes: object) -> ConfigDict:
    config = default_config()
    config.data.name, config.data.data_dir = name, tfds_dir
    config.data.update(changes)
    return config


@functools.cache
def _cifar100(tfds_dir: str) -> data.TrainInput:
    return data.train_input(_config(tfds_dir, "cifar100", placement="device"))


@pytest.mark.slow
def test_cifar100_is_whole(tfds_dir: str):
    info = data.info(_config(tfds_dir, "cifar100"))
    assert (info.num_train, info.num_eval, info.num_classes, info.image_shape) == (50_000, 10_000, 100, (32, 32, 3))
    assert info.label_names[0] == "apple" and not info.decoded
    train = _cifar100(tfds_dir)
    assert train.steps_per_epoch == 390 and train.resident is not None
    images, labels = train.resident["image"], train.resident["label"]
    assert images.shape == (50_000, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(np.bincount(labels), np.full(100, 500))
    # The published means of the channels.
    np.testing.assert_allclose(images.mean((0, 1, 2)) / 255, (0.5071, 0.4865, 0.4409), atol=5e-5)


def test_cifar100_is_evaluated_once_each(tfds_dir: str):
    evaluation = data.eval_input(_config(tfds_dir, "cifar100"))
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in evaluation])
    assert evaluation.num_batches == 20 and np.array_equal(np.bincount(labels), np.full(100, 100))


def test_cifar100_on_the_device_is_augmented_there(tfds_dir: str):
    config = _config(tfds_dir, "cifar100", train_split="train[:1000]", placement="device")
    config.data.mean, config.data.std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    config.data.augment.crop_padding, config.data.augment.flip = 4, True
    train = data.train_input(config)
    resident = jax.device_put(train.resident)
    prepare = jax.jit(train.prepare)
    batch = next(iter(train))
    fed = prepare(batch, jax.random.key(0), resident)
    assert fed["image"].shape == (128, 32, 32, 3)
    again, other = prepare(batch, jax.random.key(0), resident), prepare(batch, jax.random.key(1), resident)
    assert np.array_equal(fed["image"], again["image"]) and not np.array_equal(fed["image"], other["image"])
    assert train.resident is not None and np.array_equal(fed["label"], train.resident["label"][batch["index"]])


def test_flowers_are_cut_from_photographs(tfds_dir: str):
    config = _config(tfds_dir, "tf_flowers", train_split="train[:80%]", eval_split="train[80%:]", image_size=64)
    config.data.augment.random_resized_crop = True
    config.batch_size, config.eval_batch_size = 32, 256
    info = data.info(config)
    assert (info.num_train, info.num_eval, info.num_classes, info.decoded) == (2936, 734, 5, True)
    train = data.train_input(config)
    batch = next(iter(train))
    assert train.placement == "workers" and batch["image"].shape == (32, 64, 64, 3)
    assert batch["image"].std() > 30
    evaluation = list(data.eval_input(config))
    assert sum(batch["mask"].sum() for batch in evaluation) == 734
    assert {batch["image"].shape for batch in evaluation} == {(256, 64, 64, 3)}


def test_flowers_have_no_test_split(tfds_dir: str):
    with pytest.raises(ValueError, match=r"data\.eval_split='test' is not a split of tf_flowers/3\.0\.1"):
        data.info(_config(tfds_dir, "tf_flowers", image_size=64))


def test_a_detection_set_has_no_label(tfds_dir: str):
    with pytest.raises(ValueError, match=r"bccd/1\.0\.0 has no label features .*objects \(Sequence\)"):
        data.info(_config(tfds_dir, "bccd", image_size=64))
