"""ImageNet, ResNet-34, 50, 101 and 152, plain, attention-augmented and with other mechanisms.

COMMAND: aaconv train --config configs/imagenet_resnet.py:aa_resnet50 --workdir runs/aa_resnet50
SOURCE: Bello et al., Attention Augmented Convolutional Networks, ICCV 2019, 4.2, tables 2 and 3.
EXPECTED (paper): parameters, GFLOPs, top-1 / top-5. Not measured here yet.

    resnet34   21.8M  7.4  73.6/91.5    aa_resnet34   20.7M  7.1  74.7/92.0
    resnet50   25.6M  8.2  76.4/93.1    aa_resnet50   25.8M  8.3  77.7/93.8
    resnet101  44.5M 15.6  77.9/94.0    aa_resnet101  45.4M 16.1  78.7/94.4
    resnet152  60.2M 23.0  78.4/94.2    aa_resnet152  61.6M 23.8  79.1/94.6   (the last row is not verified)

    se_resnet34   22.0M  7.4  74.3/91.8    bam_resnet50  25.9M  77.3
    se_resnet50   28.1M  8.2  77.5/93.7    cbam_resnet50 28.1M  77.4
    se_resnet101  49.3M 15.6  78.4/94.2
    se_resnet152  66.8M 23.1  78.9/94.5    (of these only se_resnet50 is verified)

HARDWARE: several GPUs or TPU chips, bfloat16. The data set is prepared once: aaconv prepare imagenet2012.

Parameters and FLOPs come out as printed. Inferred from them: 8 heads, kappa = 2 upsilon = 0.2 (ResNet-34: 0.25 both),
at least 20 key channels a head, the 3x3 of every block of the last three stages, the 28-pixel stage attending at 14.
Not verified: 100 epochs, learning rate 0.128 B/256 with 5% of warm-up and a tenth at 30, 60, 80 and 90, batch 1024 in
all (the paper took the largest of 32 to 256 a worker that fitted), weight decay 1e-4, label smoothing (none here).
"""

from ml_collections import ConfigDict

NAMES = (
    *(f"{kind}resnet{depth}" for depth in (34, 50, 101, 152) for kind in ("", "aa_", "se_")),
    "bam_resnet50",
    "cbam_resnet50",
)


def get_config(argument: str = "aa_resnet50") -> ConfigDict:
    if argument not in NAMES:
        raise ValueError(f"imagenet_resnet takes one of {', '.join(NAMES)} as its argument, not {argument!r}")
    c = ConfigDict()
    c.seed = 0
    c.dtype = "bfloat16"

    c.model = ConfigDict()
    c.model.name = argument
    if argument.startswith("aa_"):
        c.model.kappa = 0.25 if argument == "aa_resnet34" else 0.2
        c.model.upsilon = 0.25 if argument == "aa_resnet34" else 0.1
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
