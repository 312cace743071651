"""Every config in configs/ loads and builds, by shapes alone."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aaconv import config as config_lib, optim, train
from aaconv.data.declared import declared_info
from aaconv.models.summary import count_parameters
from aaconv.sweep import description

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Config and argument, and the parameters in millions where the paper or the config's head states them.
EVERY = {
    "digits.py": None,
    "digits_sweep.py": None,
    "flowers.py": None,
    "cifar100_small.py:plain": None,
    "cifar100_small.py:aa": None,
    "cifar100_small_sweep.py": None,
    "digit_pairs.py:near": None,
    "digit_pairs_sweep.py": None,
    "cifar100_wrn_28_10.py": "36.3",
    "cifar100_aa_wrn_28_10.py": "36.05",
    "imagenet_resnet.py:resnet34": "21.8",
    "imagenet_resnet.py:aa_resnet34": "20.745",
    "imagenet_resnet.py:se_resnet34": "22.0",
    "imagenet_resnet.py:resnet50": "25.6",
    "imagenet_resnet.py:aa_resnet50": "25.809",
    "imagenet_resnet.py:se_resnet50": "28.1",
    "imagenet_resnet.py:bam_resnet50": "25.9",
    "imagenet_resnet.py:cbam_resnet50": "28.1",
    "imagenet_resnet.py:resnet101": "44.5",
    "imagenet_resnet.py:aa_resnet101": "45.387",
    "imagenet_resnet.py:se_resnet101": "49.3",
    "imagenet_resnet.py:resnet152": "60.2",
    "imagenet_resnet.py:aa_resnet152": "61.614",
    "imagenet_resnet.py:se_resnet152": "66.8",
    "paper_cifar100_sweep.py:attention_ratio": "33.9",
    "paper_imagenet_sweep.py:attention_ratio": "24.304",
    "imagenet_mnasnet.py:mnasnet_a1_0_75": "2.91",
    "imagenet_mnasnet.py:aa_mnasnet_a1_0_75": "3.02",
    "imagenet_mnasnet.py:mnasnet_a1": "3.89",
    "imagenet_mnasnet.py:aa_mnasnet_a1": "4.06",
    "imagenet_mnasnet.py:mnasnet_a1_1_25": "5.26",
    "imagenet_mnasnet.py:aa_mnasnet_a1_1_25": "5.53",
    "imagenet_mnasnet.py:mnasnet_a1_1_4": "6.106",
    "imagenet_mnasnet.py:aa_mnasnet_a1_1_4": "6.44",
}


def test_none_is_left_out():
    assert {p.name for p in CONFIGS.glob("*.py")} == {name.partition(":")[0] for name in EVERY}


# Further arguments of a file of which others are always built, and sweeps over networks that are.
LONG = ("_0_75", "_1_25", "_1_4", "resnet101", "resnet152", "_sweep.py:attention_ratio")


@pytest.mark.parametrize(
    "name,parameters",
    [pytest.param(*item, marks=[pytest.mark.by_hand] if item[0].endswith(LONG) else []) for item in EVERY.items()],
)
def test_builds(name, parameters):
    config = config_lib.load(str(CONFIGS / name))
    info = declared_info(config)
    model = train.build_model(config, info.num_classes)
    images = jax.ShapeDtypeStruct((4, *info.image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    if parameters is not None:
        digits = len(parameters.split(".")[1])
        assert f"{count_parameters(variables['params']) / 1e6:.{digits}f}" == parameters
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    assert logits.shape == (4, info.num_classes) and logits.dtype == jnp.float32
    if "101" in name or "152" in name:
        return  # the step of the deepest takes half a minute to trace, and is ResNet-50's with more blocks
    plan = optim.plan(config, steps_per_epoch=1000)
    optimizer = optim.optimizer(config, plan)

    def update(variables, images):
        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return logits.sum(), updated

        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
        params, *_ = optim.update(optimizer, gradient, optimizer.init(variables["params"]), variables["params"])
        return {"params": params, **updated}

    after = jax.eval_shape(update, variables, images)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), dict(variables)
    )


# Sweeps, how many trials they have, and their parameters in millions, in order, where the paper has them.
SWEEPS = {
    "cifar100_small_sweep.py": (12, None),
    "digit_pairs_sweep.py": (36, None),
    "digit_pairs_sweep.py:distance": (18, None),
    "paper_imagenet_sweep.py:attention_ratio": (9, "25.6 24.3 24.3 22.3 22.3 20.7 20.7 19.4 19.4"),
    "paper_imagenet_sweep.py:position_encodings": (4, "25.8 25.8 25.8 25.8"),
    "paper_imagenet_sweep.py:heads": (4, None),
    "paper_cifar100_sweep.py:attention_ratio": (27, None),
    "paper_cifar100_sweep.py:position_encodings": (12, None),
    "paper_cifar100_sweep.py:heads": (12, None),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "paper" in name else []) for name in SWEEPS]
)
def test_every_trial_of_a_sweep_can_be_run(name):
    path, (count, parameters) = str(CONFIGS / name), SWEEPS[name]
    function = config_lib.sweep_function(path)
    assert function is not None
    trials, invalid = description.describe(
        config_lib.load(path), description.from_function(function, path), check_devices=False, need_data=False
    )
    assert not invalid and len(trials) == count
    if parameters is not None:
        assert " ".join(f"{trial.parameters / 1e6:.1f}" for trial in trials) == parameters


def test_recalibration_is_set_by_key_or_by_name():
    def build(*overrides, file="imagenet_resnet.py:aa_resnet50"):
        return train.build_model(config_lib.load(str(CONFIGS / file), overrides), 1000)

    both = build("model.recalibration=se", "model.reduction=8", "model.recalibration_stages=4")
    assert [getattr(part, "keywords", {}).get("reduction") for part in both.block_recalibrations] == [
        None,
        None,
        None,
        8,
    ]
    named = build("model.name=se_wrn_28_10", file="cifar100_wrn_28_10.py")
    keyed = build("model.recalibration=se", file="cifar100_wrn_28_10.py")
    assert [part.func for part in named.block_recalibrations] == [part.func for part in keyed.block_recalibrations]


def test_augmented_mnasnet_starts_at_half_the_rate_of_the_plain_one_and_ends_at_the_same():
    plain, augmented = (
        optim.plan(config_lib.load(str(CONFIGS / f"imagenet_mnasnet.py:{name}")), steps_per_epoch=10)
        for name in ("mnasnet_a1", "aa_mnasnet_a1")
    )
    assert plain.peak == pytest.approx(0.256) and augmented.peak == pytest.approx(0.128)
    ratios = [float(augmented.learning_rate(s) / plain.learning_rate(s)) for s in (49, 50, 1800, plain.total_steps)]
    assert ratios[0] == pytest.approx(0.5) and ratios[-1] == pytest.approx(1.0, rel=1e-4)
    assert ratios == sorted(ratios)
    assert float(plain.learning_rate(plain.total_steps)) == pytest.approx(0.256 * 0.97**145, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "cifar100_small.py:both",
        "digit_pairs.py:far_away",
        "imagenet_resnet.py:resnet18",
        "imagenet_mnasnet.py:mnasnet_a1_0_5",
        "digit_pairs_sweep.py:far",
        "paper_imagenet_sweep.py:head",
        "paper_cifar100_sweep.py:head",
    ],
)
def test_an_argument_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="takes .*not '(both|far_away|far|resnet18|mnasnet_a1_0_5|head)'"):
        config_lib.load(str(CONFIGS / name))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.name)
def test_head_states_command_source_and_expectation(path):
    head = path.read_text().split('"""')[1]
    for word in ("COMMAND:", "SOURCE:", "EXPECTED"):
        assert word in head
    assert f"--config configs/{path.name}" in head
