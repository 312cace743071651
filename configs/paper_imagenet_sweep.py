"""The paper's sweeps on ImageNet: attention ratio, position encodings, and heads.

COMMAND: aaconv sweep --config configs/paper_imagenet_sweep.py:attention_ratio --workdir runs/imagenet_ratio
    or :position_encodings, or :heads; aaconv sweep report --workdir runs/imagenet_ratio
SOURCE: Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, 4.2 and 4.4, figure 4.
EXPECTED (paper): top-1 of ResNet-50. Not measured here yet.

    attention ratio, kappa = upsilon       0     0.25   0.5    0.75   1
      with relative positions              76.4  77.7   77.3   76.7   73.9    stated
      without                              76.4                       71.1    stated as 2.8 points less at 1
      parameters, millions                 25.6  24.3   22.3   20.7   19.4    stated; these networks have them
      GFLOPs                               8.2   7.9    7.3    6.8    6.3     stated; the last of these networks has 6.4

    position encoding, kappa = 2 upsilon = 0.2     none       sinusoid   coordconv  relative
      top-1 / top-5                                77.5/93.7  77.5/93.7  77.5/93.8  77.7/93.8    stated

    heads, kappa = 2 upsilon = 0.2         1, 2, 4 and 8: no figures are known to us but 77.7 for 8 (stated for the
                                           network; that it has 8 heads is inferred from its parameters)

HARDWARE: several GPUs or TPU chips a trial, bfloat16: 9, 4 and 4 trials of about 3 EFLOP each, one seed of each cell.
The encodings of the paper lie within 0.2 points: it takes several seeds to tell them apart, --config.seed=1 and so on,
each in a workdir of its own.

The recipe is that of imagenet_resnet.py, whose head says what of it is verified.
"""

from ml_collections import ConfigDict

SWEEPS = ("attention_ratio", "position_encodings", "heads")


def get_config(argument: str = "attention_ratio") -> ConfigDict:
    if argument not in SWEEPS:
        raise ValueError(f"paper_imagenet_sweep takes one of {', '.join(SWEEPS)} as its argument, not {argument!r}")
    c = ConfigDict()
    c.seed = 0
    c.dtype = "bfloat16"

    c.model = ConfigDict()
    c.model.name = "aa_resnet50"
    if argument == "attention_ratio":
        c.model.attention_ratio = 0.25
    else:
        c.model.kappa = 0.2
        c.model.upsilon = 0.1
    c.model.num_heads = 8
    c.model.min_key_depth = 20
    c.model.stages = (2, 3, 4)
    c.model.pooled_stages = (2,)

    c.data = ConfigDict()
    c.data.name = "imagenet2012"
    c.data.eval_split = "validation"
    c.data.image_size = 224
    c.data.mean = (0.485, 0.456, 0.406)
    c.data.std = (0.229, 0.224, 0.225)
    c.data.num_workers = 16
    c.data.augment = ConfigDict({"random_resized_crop": True, "flip": True})

    c.batch_size = 1024
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

    c.log_every_steps = 100
    c.checkpoint = ConfigDict({"every_epochs": 1.0})
    return c


def sweep(add, argument):
    if argument == "position_encodings":
        for encoding in ("none", "sinusoid", "coordconv", "relative"):
            add({"model.position_encoding": encoding})
    elif argument == "heads":
        for heads in (1, 2, 4, 8):
            add({"model.num_heads": heads})
    else:
        for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
            # Without attention there is nothing to encode positions for: one trial, not two.
            for encoding in ("relative", "none") if ratio else ("relative",):
                add({"model.attention_ratio": ratio, "model.position_encoding": encoding})
