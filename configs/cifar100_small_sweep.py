"""Attention ratio on CIFAR-100 on two CPU cores: the form of the paper's figure 4, in half an hour.

The network of cifar100_small.py, a Wide-ResNet-10-1 of 80 thousand parameters, for an epoch and a half.

COMMAND: aaconv sweep --config configs/cifar100_small_sweep.py --workdir runs/cifar100_small_sweep --jobs 2
SOURCE: this project's own; the question is that of Bello et al. 2019, figure 4, network and schedule are far smaller.
EXPECTED: 18.1, 17.2, 16.2 and 14.2% for ratios 0, 0.25, 0.5 and 1, three seeds (experiments/cifar100_ratio). The paper
has 76.4, 77.7, 77.3 and 73.9 with ResNet-50 on ImageNet (stated), that is a gain of attention at 0.25 and 0.5 and a
loss at 1; a network this small, trained this short, does not show the gain.
HARDWARE: two CPU cores, TFDS_DATA_DIR with cifar100 (`aaconv prepare cifar100`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0

    c.model = ConfigDict()
    c.model.name = "aa_wrn"
    c.model.depth = 10
    c.model.width = 1
    c.model.attention_ratio = 0.25
    c.model.num_heads = 4
    c.model.min_key_depth = 8
    c.model.stages = (2, 3)
    c.model.pooled_stages = (2,)

    c.data = ConfigDict()
    c.data.name = "cifar100"
    c.data.mean = (0.5071, 0.4865, 0.4409)
    c.data.std = (0.2673, 0.2564, 0.2762)
    c.data.augment = ConfigDict({"crop_padding": 4, "flip": True})

    c.batch_size = 128
    c.num_epochs = 1.5

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
    c.eval_every_epochs = 1.5
    c.checkpoint = ConfigDict({"every_epochs": 1.5})
    return c


def sweep(add):
    for seed in range(3):
        for ratio in (0.0, 0.25, 0.5, 1.0):
            add({"model.attention_ratio": ratio, "seed": seed})
