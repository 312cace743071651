"""CIFAR-100 on a CPU: a narrow Wide-ResNet, plain and augmented, same schedule.

COMMAND: aaconv train --config configs/cifar100_small.py:aa --workdir runs/cifar100_small/aa    (or :plain)
SOURCE: this project's own; the recipe is the paper's (4.1) with few epochs and a small network.
EXPECTED: see experiments/cifar100_small/README.md, measured over three seeds.

Attention stands in stages 2 and 3, at 8 pixels in both (the 16-pixel stage attends pooled, as the paper's first
augmented stage on ImageNet does), so that it takes little of a CPU's time.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "aa") -> ConfigDict:
    if argument not in ("plain", "aa"):
        raise ValueError(f"cifar100_small takes the argument plain or aa, not {argument!r}")
    c = ConfigDict()
    c.seed = 0

    c.model = ConfigDict()
    c.model.depth = 10
    c.model.width = 1
    if argument == "aa":
        c.model.name = "aa_wrn"
        c.model.kappa = 0.25
        c.model.upsilon = 0.25
        c.model.num_heads = 4
        c.model.min_key_depth = 8
        c.model.stages = (2, 3)
        c.model.pooled_stages = (2,)
    else:
        c.model.name = "wrn"

    c.data = ConfigDict()
    c.data.name = "cifar100"
    c.data.mean = (0.5071, 0.4865, 0.4409)
    c.data.std = (0.2673, 0.2564, 0.2762)
    c.data.augment = ConfigDict({"crop_padding": 4, "flip": True})

    c.batch_size = 128
    c.num_epochs = 4.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.9
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 5e-4

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.2
    c.schedule.scale_with_batch = True
    c.schedule.warmup_percent = 5.0

    c.log_every_steps = 50
    c.eval_every_epochs = 1.0
    c.checkpoint = ConfigDict({"every_epochs": 1.0})
    return c
