"""Two digits near or far apart: which one is larger, or are they the same? A task that takes relating distant places.

The set is the project's own and made at first use; aaconv/data/digit_pairs.py says how, and what can be known of it by
what. A Wide-ResNet-10 sees 25 pixels before it averages over the image; in ``far`` there are at least 24 between the
digits, so that without attention its logits are a sum of what each digit gives alone.

COMMAND: aaconv train --config configs/digit_pairs.py:far --workdir runs/digit_pairs_far    (or :middle, :near)
SOURCE: this project's own.
EXPECTED: at ``far`` 87.1% (99.6, 63.5 and 98.1 with seeds 0, 1 and 2), experiments/digit_pairs/README.md. But by luck
at most 43.3% can be right there without attention (--config.model.attention_ratio=0), 66.7% with attention without
positions (--config.model.position_encoding=none).
"""

from ml_collections import ConfigDict

LEVELS = ("near", "middle", "far")


def get_config(argument: str = "far") -> ConfigDict:
    if argument not in LEVELS:
        raise ValueError(f"digit_pairs takes one of {', '.join(LEVELS)} as its argument, not {argument!r}")
    c = ConfigDict()
    c.seed = 0

    c.model = ConfigDict()
    c.model.name = "aa_wrn"
    c.model.depth = 10
    c.model.width = 1
    c.model.stem_channels = 8
    c.model.attention_ratio = 0.5
    c.model.num_heads = 4
    c.model.min_key_depth = 4
    c.model.stages = (3,)

    c.data = ConfigDict()
    c.data.name = f"digit_pairs/{argument}"
    c.data.channels = 1
    c.data.mean = (0.051,)
    c.data.std = (0.192,)

    c.batch_size = 64
    c.num_epochs = 6.0

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"
    c.optimizer.weight_decay = 0.01

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.01
    c.schedule.warmup_percent = 10.0

    c.log_every_steps = 63
    c.eval_every_epochs = 1.0
    c.checkpoint = ConfigDict({"every_epochs": 6.0})
    return c
