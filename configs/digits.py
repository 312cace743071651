"""Handwritten digits: a small augmented network that trains on two CPU cores in about a minute.

1,797 real images of 8x8 pixels that come with scikit-learn (1,437 to train, 360 to test): no download.
What a fresh checkout trains first; it shows that attention, data, checkpoints and pictures work.

COMMAND: aaconv train --config configs/digits.py --workdir runs/digits
SOURCE: this project's own; the network is the paper's augmented Wide-ResNet, narrow and shallow.
EXPECTED: at least 98% on the 360 test images (each image is 0.28%); measured values in the README.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0

    c.model = ConfigDict()
    c.model.name = "aa_wrn"
    c.model.depth = 10
    c.model.width = 2
    c.model.kappa = 0.5
    c.model.upsilon = 0.25
    c.model.num_heads = 2
    c.model.min_key_depth = 8

    c.data = ConfigDict()
    c.data.name = "digits"
    c.data.channels = 1
    c.data.mean = (0.305,)
    c.data.std = (0.376,)
    c.data.augment = ConfigDict({"crop_padding": 1})  # digits do not survive a flip

    c.batch_size = 64
    c.num_epochs = 30.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.9
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 5e-4

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.1
    c.schedule.warmup_percent = 10.0

    c.loss = ConfigDict({"label_smoothing": 0.1})

    c.log_every_steps = 22  # once an epoch
    c.eval_every_epochs = 5.0
    c.checkpoint = ConfigDict({"every_epochs": 5.0})
    return c
