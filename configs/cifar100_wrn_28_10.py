"""CIFAR-100, Wide-ResNet-28-10: the plain network beside which the paper's augmented one is measured.

COMMAND: aaconv train --config configs/cifar100_wrn_28_10.py --workdir runs/cifar100_wrn_28_10
SOURCE: Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, 4.1 and table 1.
EXPECTED (paper): 36.3M parameters, 10.4 GFLOPs, top-1 80.3, top-5 95.0. Not measured here yet.
HARDWARE: one GPU or TPU chip, bfloat16; 10.4 GFLOPs an image forward, so about 0.8 EFLOP for the 500 epochs.

Stated by the paper: 500 epochs, SGD with momentum 0.9, the learning rate from 0 to 0.2 B/256 over the first 5% and
then cosine. Not verified: batch 1024 and weight decay 2e-4 for the plain network, that weight decay leaves
normalisation and biases alone, no Nesterov momentum, crops after padding by 4, flips, mean and deviation of the set.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.dtype = "bfloat16"

    c.model = ConfigDict()
    c.model.name = "wrn_28_10"
    c.model.shortcut = "pad"  # gives the paper's 36.3M; projections give 36.5M

    c.data = ConfigDict()
    c.data.name = "cifar100"
    c.data.mean = (0.5071, 0.4865, 0.4409)
    c.data.std = (0.2673, 0.2564, 0.2762)
    c.data.augment = ConfigDict({"crop_padding": 4, "flip": True})

    c.batch_size = 1024
    c.num_epochs = 500.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 2e-4

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.2
    c.schedule.scale_with_batch = True
    c.schedule.warmup_percent = 5.0

    c.eval_every_epochs = 5.0
    c.checkpoint = ConfigDict({"every_epochs": 10.0})
    return c
