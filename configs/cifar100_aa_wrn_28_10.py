"""CIFAR-100, AA-Wide-ResNet-28-10: the paper's augmented network.

COMMAND: aaconv train --config configs/cifar100_aa_wrn_28_10.py --workdir runs/cifar100_aa_wrn_28_10
SOURCE: Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, 4.1 and table 1.
EXPECTED (paper): 36.2M parameters, 10.9 GFLOPs, top-1 81.6, top-5 95.2. Not measured here yet. This network has 36.05M
and counts 11.4 GFLOPs: no setting that we know gives exactly the paper's two figures.
HARDWARE: one GPU or TPU chip, bfloat16; 11.4 GFLOPs an image forward, so about 0.9 EFLOP for the 500 epochs.

Stated by the paper: 500 epochs, SGD with momentum 0.9, the learning rate from 0 to 0.2 B/256 over the first 5% and
then cosine, the first 3x3 of all 12 blocks augmented, kappa = 2 upsilon = 0.2, 8 heads. Not verified: at least 20 key
channels a head, no pooling, batch 256 and weight decay 5e-4 for the augmented network, that weight decay leaves
normalisation and biases alone, no Nesterov momentum, crops after padding by 4, flips, mean and deviation of the set.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.dtype = "bfloat16"

    c.model = ConfigDict()
    c.model.name = "aa_wrn_28_10"
    c.model.kappa = 0.2
    c.model.upsilon = 0.1
    c.model.num_heads = 8
    c.model.min_key_depth = 20
    c.model.shortcut = "pad"  # 1x1 projections give 36.31M parameters

    c.data = ConfigDict()
    c.data.name = "cifar100"
    c.data.mean = (0.5071, 0.4865, 0.4409)
    c.data.std = (0.2673, 0.2564, 0.2762)
    c.data.augment = ConfigDict({"crop_padding": 4, "flip": True})

    c.batch_size = 256
    c.num_epochs = 500.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 5e-4

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.2
    c.schedule.scale_with_batch = True
    c.schedule.warmup_percent = 5.0

    c.eval_every_epochs = 5.0
    c.checkpoint = ConfigDict({"every_epochs": 10.0})
    return c
