"""What attention buys where distant places have to be related, and where it buys nothing.

The networks of digit_pairs.py, with three seeds a cell. On its set ``far``, whose two digits no window of a convolution
sees together, twelve cells: kappa = upsilon from 0 to 1 with four heads, with relative positions and without, and one,
two and eight heads at 0.5. With the argument ``distance``, the ratios 0 and 0.5 on ``near``, ``middle`` and ``far``.
All have the same width, with which their parameters are the closest: 16.8 to 18.8 thousand, the network without
attention having the most; a channel more in its stem would be a quarter more.

COMMAND: aaconv sweep --config configs/digit_pairs_sweep.py --workdir runs/digit_pairs_sweep --jobs 2
SOURCE: this project's own; the question is that of Bello et al. 2019, figure 4, on a task made for it.
EXPECTED: experiments/digit_pairs/README.md: 33.5% without attention, 63 to 65% with attention without positions, up to
99% with relative positions. What cannot be exceeded but by luck: 43.3%, 66.7% and 100%.
HARDWARE: two CPU cores, 15 minutes; ``distance`` 9.
"""

from ml_collections import ConfigDict

SWEEPS = ("attention", "distance")


def get_config(argument: str = "attention") -> ConfigDict:
    if argument not in SWEEPS:
        raise ValueError(f"digit_pairs_sweep takes one of {', '.join(SWEEPS)} as its argument, not {argument!r}")
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
    c.model.position_encoding = "relative"

    c.data = ConfigDict()
    c.data.name = "digit_pairs/far"
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

    c.log_every_steps = 126
    c.eval_every_epochs = 6.0
    c.checkpoint = ConfigDict({"every_epochs": 3.0})
    return c


def sweep(add, argument):
    for seed in range(3):
        if argument == "distance":
            for level in ("near", "middle", "far"):
                for ratio in (0.0, 0.5):
                    add({"data.name": f"digit_pairs/{level}", "model.attention_ratio": ratio, "seed": seed})
            continue
        add({"model.attention_ratio": 0.0, "seed": seed})
        for ratio in (0.25, 0.5, 0.75, 1.0):
            for encoding in ("relative", "none"):
                add({"model.attention_ratio": ratio, "model.position_encoding": encoding, "seed": seed})
        for heads in (1, 2, 8):
            add({"model.attention_ratio": 0.5, "model.num_heads": heads, "seed": seed})
