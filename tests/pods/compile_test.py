"""`aaconv compile`: what it is told of the data, what it reads off the compiler, and the command with the real one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aaconv import cli, config as config_lib, parallel
from aaconv.pods import bounds, buffers, collectives, compile, programs
from aaconv.pods.chips import CHIPS, parse_topology

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
SMALL = "model.depth=10 model.width=1 model.num_heads=1 batch_size=16 eval_batch_size=16 data.placement=memory".split()


def load(*overrides, file="configs/digits.py"):
    return config_lib.load(str(REPOSITORY / file), overrides)


# Data that is not here


@pytest.mark.parametrize(
    ("file", "classes", "shape"),
    [
        ("configs/imagenet_resnet.py:aa_resnet50", 1000, (224, 224, 3)),
        ("configs/cifar100_aa_wrn_28_10.py", 100, (32, 32, 3)),
    ],
)
def test_data_sets_need_not_be_prepared(tmp_path, file, classes, shape):
    config = load(f"data.data_dir={tmp_path}", file=file)
    info = programs.Described().info(config)
    assert (info.num_classes, info.image_shape) == (classes, shape)
    train_input = programs.Described().train_input(config)
    assert train_input.steps_per_epoch == {1000: 1_281_167 // 1024, 100: 50_000 // 256}[classes]
    if classes == 1000:
        assert train_input.resident is None  # photographs are decoded by workers
    else:
        assert train_input.resident is not None and train_input.resident["image"].shape == (50_000, *shape)


# What the compiler says

REPORT = """Memory usage report:

Memory Space: default (color=0)
Total bytes: 17974650880 (16.74GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.28GiB( 12%);    1.28GiB;   2754838528;                2; f32[16,32,4], f32[8,4,2,32]
    3.84GiB( 24%);    2.56GiB;      2326528;                8; f32[64,32], 3×f32[2,32]
    3.96GiB( 29%);  123.19MiB;  11012374528;                1; bf16[7,7]
"""


def test_the_largest_allocations_of_a_refusal_have_layers():
    origins = {
        ("f32", (2, 32)): ["jit(f)/transpose(jvp(Net))/head/dot_general"],
        ("f32", (2, 4, 8, 32)): ["jvp(Net)/a"],
    }
    first, second, third = buffers.in_refusal(REPORT, origins)
    assert first == buffers.Buffer(int(2.56 * GIB), "f32[64,32]", "Net/head/dot_general", backward=True)
    assert second == buffers.Buffer(int(1.28 * GIB), "f32[16,32,4]", "Net/a", backward=False)
    assert third.layer == "" and third.bytes == int(123.19 * 2**20)


def test_arrays_are_traced_to_where_they_are_computed():
    def inner(x):
        with jax.named_scope("outer"):
            return jax.lax.scan(lambda carry, y: (jnp.sin(carry @ y), None), x, jnp.ones((3, 64, 64)))[0]

    jaxpr = jax.make_jaxpr(lambda x: jax.jit(inner)(x).sum())(jnp.ones((8, 64)))
    origins = buffers.origins_of(jaxpr, parts=4)
    # The whole array, and a device's part of it.
    assert any("outer" in name for name in origins["f32", (8, 64)])
    assert any("outer" in name for name in origins["f32", (2, 64)])


def test_the_largest_arrays_of_a_program_have_layers():
    def work(x):
        with jax.named_scope("wide"):
            y = jnp.sort(jnp.tile(x, (1, 50)))
        return jnp.sort(y.T)[:8, :8] @ jnp.ones((8, 8))

    text = jax.jit(work).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
    first = buffers.in_program(text)[0]
    assert first.bytes == 64 * 64 * 50 * 4 and first.shape in ("f32[64,3200]", "f32[3200,64]")
    assert any(buffer.layer.startswith("wide/") for buffer in buffers.in_program(text))


# Bounds


def test_the_longest_bound_binds():
    slice = parse_topology("v5e:2x2")
    reduced = collectives.Total("all-reduce", 1, 10**9, 1.5e9, seconds=0.02)
    found = bounds.bounds(1.97e12, 819 * 10**7, [reduced], slice)
    assert found == bounds.Bounds(compute=pytest.approx(0.01), memory=pytest.approx(0.01), network=0.02)
    assert found.longest == ("network", 0.02)
    assert bounds.bounds(1.97e12, None, [], slice).longest == ("compute", pytest.approx(0.01))


# Programs, by the compiler of this machine


@pytest.fixture(scope="module")
def built():
    return programs.build(load(*SMALL, "mesh.fsdp=2", "mesh.fsdp_min_size=256"), jax.devices())


@pytest.fixture(scope="module")
def step(built):
    return programs.compile_program(built, programs.TRAINING)


def test_memory_by_kind_follows_the_shardings(built, step):
    with programs.tracing(built):
        state = built.abstract_state()
    whole = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state.params))
    divided = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    saved = sum(math.prod(x.shape) * 4 // 2 for x in divided)
    assert divided and step.inputs["parameters"] == whole - saved
    assert step.inputs["batch"] == 2 * (8 * 8 + 4)  # two images of uint8, and their labels
    assert "averages" not in step.inputs and "training set" not in step.inputs
    assert step.needs.arguments == pytest.approx(sum(step.inputs.values()), rel=0.02)  # a CPU does not pad
    assert step.total == step.needs.total and step.images == 2 and step.batch_devices == 8


def test_weights_that_are_divided_are_gathered_and_gradients_reduced(step):
    kinds = {x.kind for x in step.collectives}
    assert {"all-gather", "all-reduce"} <= kinds
    gathered = sum(x.bytes for x in step.collectives if x.kind == "all-gather" and len(x.group) == 2)
    assert gathered >= 2 * step.inputs["parameters"] * 0.9


def test_products_are_three_times_those_of_the_forward_pass(built, step):
    with programs.tracing(built):
        layers = programs.summary_of(built).layers
    forward = sum(x.flops * (2 if x.kind == "attention" else 1) for x in layers)
    assert step.model_flops == 3 * 2 * forward
    assert step.compiler_flops is not None and step.compiler_flops > 0.3 * step.model_flops


@pytest.mark.by_hand
def test_the_largest_batch_is_compiled_and_the_next_is_not_taken():
    config, devices = load(*SMALL), jax.devices()[:1]
    built = programs.build(config, devices)
    first = programs.compile_program(built, programs.TRAINING)
    assert first.total is not None
    chip = dataclasses.replace(CHIPS["v5e"], usable=5 * first.total)
    slice = dataclasses.replace(parse_topology("v5e:1x1"), chip=chip)
    found = compile.find_largest(config, built, first, slice, devices, lambda text: None)
    assert found.fits is not None and found.fits > 32
    assert found.refused is not None and found.fits < found.refused <= 1.3 * found.fits


# The command


def run_command(*words, **environment):
    # Another process: the compiler changes jax's settings for the whole of it.
    return subprocess.run(
        [sys.executable, "-m", "aaconv", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "v5e:3x5"], "layouts of v5e: 1x1, 2x2"),
        (["--topology", "h100:8"], "v4, v5e, v5p, v6e"),
        ([], "--topology is missing"),
        (["--topology", "v5e:2x2", "--train-only", "--eval-only"], "not allowed with"),
    ],
)
def test_wrong_words_are_refused(capsys, words, said):
    code = cli.main(["compile", "--config", str(REPOSITORY / "configs/digits.py"), *words])
    assert code == cli.WRONG_INPUT and said in capsys.readouterr().err


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")


@pytest.mark.slow
def test_the_compiler_takes_a_small_run_for_four_chips(compiler, tmp_path):
    file = tmp_path / "found/figures.json"
    words = ["compile", "--config", "configs/digits.py", "--topology", "v5e:2x2", "--no-largest-batch", "--json", file]
    done = run_command(*words)
    assert done.returncode == cli.OK, done.stderr
    assert "v5e:2x2, 4 chips on 1 host, 15.75 GiB" in done.stdout and "<- binds" in done.stdout
    found = json.loads(file.read_text())
    assert found["fits"] and set(found["programs"]) == {"training step", "evaluation step"}
    step = found["programs"]["training step"]
    # Images stay where they are: gradients, sums and batch norm's statistics are all that chips exchange.
    assert set(step["collectives"]) == {"all-reduce"}
    parameters = step["memory"]["parameters"]
    assert parameters <= step["collectives"]["all-reduce"]["bytes"] <= 1.3 * parameters
    assert sum(step["memory"].values()) == step["total_bytes"] and step["hbm_bytes"] > parameters


@pytest.mark.slow
def test_the_compiler_refuses_what_does_not_fit(compiler):
    words = ["compile", "--config", "configs/digits.py", "--topology", "v5e:1x1", "--train-only", "--no-largest-batch"]
    done = run_command(*words, "--config.batch_size=84000", "--config.data.placement=memory")
    assert done.returncode == cli.DOES_NOT_FIT, done.stderr
    assert "does not fit" in done.stdout and "accumulate_steps" in done.stdout
    # An array of every image of the batch, in the layer of attention that it belongs to.
    listed = done.stdout.partition("largest allocations")[2].splitlines()[1]
    assert "f32[168000,32,4]" in listed and "stage3_block1/conv1/attention" in listed


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_without_the_compiler_it_says_what_to_install():
    done = run_command("compile", "--config", "configs/digits.py", "--topology", "v5e:2x2")
    assert done.returncode == cli.WRONG_INPUT and "pip install libtpu" in done.stderr


def test_batches_that_do_not_divide_are_refused_by_the_mesh():
    with pytest.raises(ValueError, match="batch_size=12 must be a multiple of the 8 devices"):
        programs.build(load("batch_size=12"), jax.devices())
    assert parallel.batch_devices(programs.build(load("batch_size=16"), jax.devices()).mesh) == 8
