"""The paper's sweeps carried over to CIFAR-100: attention ratio, position encodings, and heads of AA-WRN-28-10.

COMMAND: aaconv sweep --config configs/paper_cifar100_sweep.py:attention_ratio --workdir runs/cifar100_ratio
    or :position_encodings, or :heads; aaconv sweep report --workdir runs/cifar100_ratio
SOURCE: Bello et al., Attention Augmented Convolutional Networks, ICCV 2019; the sweeps are those of 4.4 and figure 4,
which are on ImageNet (paper_imagenet_sweep.py), the network and the recipe those of 4.1.
EXPECTED (paper): of these cells it states two, top-1 / top-5: 80.3/95.0 without attention (with its own recipe, see
cifar100_wrn_28_10.py), 81.6/95.2 with kappa = 2 upsilon = 0.2, 8 heads and relative positions. By its ImageNet figures
the ratios would rank 0.25, 0.5, 0.75, 0, 1, the last further down without positions, and encodings would lie within
0.2 points: a guess. Not measured here yet.
HARDWARE: one GPU or TPU chip a trial, bfloat16: 27, 12 and 12 trials, three seeds of each cell, about 0.9 EFLOP each.

All cells have the augmented network's recipe, that of cifar100_aa_wrn_28_10.py, whose head says what of it is verified.
"""

from ml_collections import ConfigDict

SWEEPS = ("attention_ratio", "position_encodings", "heads")


def get_config(argument: str = "attention_ratio") -> ConfigDict:
    if argument not in SWEEPS:
        raise ValueError(f"paper_cifar100_sweep takes one of {', '.join(SWEEPS)} as its argument, not {argument!r}")
    c = ConfigDict()
    c.seed = 0
    c.dtype = "bfloat16"

    c.model = ConfigDict()
    c.model.name = "aa_wrn_28_10"
    if argument == "attention_ratio":
        c.model.attention_ratio = 0.25
    else:
        c.model.kappa = 0.2
        c.model.upsilon = 0.1
    c.model.num_heads = 8
    c.model.min_key_depth = 20
    c.model.shortcut = "pad"

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


def sweep(add, argument):
    for seed in range(3):
        if argument == "position_encodings":
            for encoding in ("none", "sinusoid", "coordconv", "relative"):
                add({"model.position_encoding": encoding, "seed": seed})
        elif argument == "heads":
            for heads in (1, 2, 4, 8):
                add({"model.num_heads": heads, "seed": seed})
        else:
            for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
                # Without attention there is nothing to encode positions for: one trial, not two.
                for encoding in ("relative", "none") if ratio else ("relative",):
                    add({"model.attention_ratio": ratio, "model.position_encoding": encoding, "seed": seed})
