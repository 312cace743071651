"""How `aaconv bench step` trains unless told otherwise: the recipe of configs/imagenet_resnet.py, on made-up images."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.data = ConfigDict()
    c.data.name = "synthetic"
    c.data.mean = (0.485, 0.456, 0.406)
    c.data.std = (0.229, 0.224, 0.225)
    c.data.augment = ConfigDict({"flip": True})
    c.num_epochs = 100.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 1e-4

    c.schedule = ConfigDict()
    c.schedule.name = "steps"
    c.schedule.learning_rate = 0.128
    c.schedule.scale_with_batch = True
    c.schedule.warmup_percent = 5.0
    c.schedule.boundaries_epochs = (30, 60, 80, 90)
    c.schedule.factor = 0.1

    c.mesh = ConfigDict({"data": 1})
    return c
