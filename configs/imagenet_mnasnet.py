"""ImageNet, MnasNet-A1 of four widths, plain and attention-augmented.

COMMAND: aaconv train --config configs/imagenet_mnasnet.py:aa_mnasnet_a1 --workdir runs/aa_mnasnet_a1
SOURCE: Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, 4.2; Tan et al., MnasNet, CVPR 2019, 5.
EXPECTED (paper, not verified): parameters, GFLOPs, top-1. Not measured here yet. The argument names the width too.

    mnasnet_a1_0_75  2.91M  .45  73.3    aa_mnasnet_a1_0_75  3.02M  .51  73.9
    mnasnet_a1       3.89M  .63  75.2    aa_mnasnet_a1       4.06M  .70  75.7
    mnasnet_a1_1_25  5.26M 1.01  76.7    aa_mnasnet_a1_1_25  5.53M 1.11  77.2
    mnasnet_a1_1_4   6.10M 1.17  77.2    aa_mnasnet_a1_1_4   6.44M 1.29  77.7

HARDWARE: several GPUs or TPU chips, bfloat16. The data set is prepared once: aaconv prepare imagenet2012.

Parameters come out as printed but for the plain network at 1.4 (6.106M), FLOPs within 2%. Inferred from them: 4 heads,
kappa = 2 upsilon = 0.1, at least 2 key channels a head, the expansions of the last 13 blocks, only the first of their
stages attending at half its resolution.

As MnasNet's authors published it: RMSProp with decay 0.9, momentum 0.9 and epsilon 0.001 inside the root, batch 4096
(their code: 1024, at the same rate an image), the rate from 0 to 0.256 over 5 epochs and multiplied by 0.97 every 2.4
epochs counted from the start, batch-norm momentum 0.99 and epsilon 0.001, weight decay 1e-5, dropout 0.2; in their
code also label smoothing 0.1, weights averaged with 0.9999 and 350 epochs. Otherwise than there: weight decay leaves
the biases alone, kernels start as in the other networks here, bfloat16.
Not verified: that the augmented run kept all of this, but started at half the rate and decayed more slowly, to end
at the same rate.
"""

from ml_collections import ConfigDict

WIDTHS = {"_0_75": 0.75, "": 1.0, "_1_25": 1.25, "_1_4": 1.4}
NAMES = {f"{name}{width}": (name, WIDTHS[width]) for name in ("mnasnet_a1", "aa_mnasnet_a1") for width in WIDTHS}


def get_config(argument: str = "aa_mnasnet_a1") -> ConfigDict:
    if argument not in NAMES:
        raise ValueError(f"imagenet_mnasnet takes one of {', '.join(NAMES)} as its argument, not {argument!r}")
    c = ConfigDict()
    c.seed = 0
    c.dtype = "bfloat16"

    c.model = ConfigDict()
    c.model.name, c.model.width_multiplier = NAMES[argument]
    c.model.dropout = 0.2
    augmented = argument.startswith("aa_")
    if augmented:
        c.model.kappa = 0.1
        c.model.upsilon = 0.05
        c.model.num_heads = 4
        c.model.min_key_depth = 2
        c.model.stages = (2, 3, 4, 5, 6)
        c.model.pooled_stages = (2,)

    c.data = ConfigDict()
    c.data.name = "imagenet2012"
    c.data.eval_split = "validation"
    c.data.image_size = 224
    c.data.mean = (0.485, 0.456, 0.406)
    c.data.std = (0.229, 0.224, 0.225)
    c.data.num_workers = 16
    c.data.augment = ConfigDict({"random_resized_crop": True, "flip": True})

    c.batch_size = 4096
    c.num_epochs = 350.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "rmsprop"
    c.optimizer.decay = 0.9
    c.optimizer.momentum = 0.9
    c.optimizer.eps = 1e-3
    c.optimizer.weight_decay = 1e-5
    c.optimizer.ema_decay = 0.9999

    c.schedule = ConfigDict()
    c.schedule.name = "exponential"
    c.schedule.learning_rate = 0.008 if augmented else 0.016  # for a batch of 256
    c.schedule.scale_with_batch = True
    c.schedule.warmup_epochs = 5.0
    c.schedule.every_epochs = 2.4
    # 350 epochs hold 145 whole times 2.4: over them half the rate is made up for.
    c.schedule.factor = 0.97 * 2 ** (1 / 145) if augmented else 0.97

    c.loss = ConfigDict({"label_smoothing": 0.1})
    c.log_every_steps = 100
    c.checkpoint = ConfigDict({"every_epochs": 1.0})
    return c
