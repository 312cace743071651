"""Photographs of flowers, 5 classes: an augmented ResNet-18 on images that have to be decoded and cropped.

COMMAND: aaconv train --config configs/flowers.py --workdir runs/flowers
SOURCE: this project's own; tf_flowers of TFDS, 3,670 photographs, CC BY 2.0 (aaconv prepare tf_flowers).
EXPECTED: not measured yet. The set has no test split: the last fifth of it is kept for evaluation.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0

    c.model = ConfigDict()
    c.model.name = "aa_resnet18"
    c.model.width = 32
    c.model.kappa = 0.25
    c.model.upsilon = 0.25
    c.model.num_heads = 4
    c.model.min_key_depth = 8
    c.model.pooled_stages = ()

    c.data = ConfigDict()
    c.data.name = "tf_flowers"
    c.data.train_split = "train[:80%]"
    c.data.eval_split = "train[80%:]"
    c.data.image_size = 96
    c.data.mean = (0.485, 0.456, 0.406)
    c.data.std = (0.229, 0.224, 0.225)
    c.data.augment = ConfigDict({"random_resized_crop": True, "min_area": 0.25, "flip": True})

    c.batch_size = 64
    c.eval_batch_size = 128
    c.num_epochs = 30.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.9
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 5e-4

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.1
    c.schedule.scale_with_batch = True
    c.schedule.warmup_percent = 10.0

    c.loss = ConfigDict({"label_smoothing": 0.1})
    c.log_every_steps = 15
    c.eval_every_epochs = 2.0
    c.checkpoint = ConfigDict({"every_epochs": 2.0})
    return c
