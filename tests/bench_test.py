"""The benchmarks run, check what they measure and write what they say; none of their times is asserted."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aaconv import cli, ops, train
from aaconv.bench import attention, program, step, timing

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES = ["--shape", "2,2,3,5,4,3", "--shape", "2,2,6,5,4,3"]
OURS = ["--implementation", "factorised", "--implementation", "skew"]


@pytest.fixture
def bench(capfd, tmp_path):
    """Calls ``aaconv bench``; gives the exit code, what was printed and the rows of the CSV file."""

    def call(what: str, *argv: str):
        code = cli.main(["bench", what, "--seconds", "0.01", "--output", str(tmp_path), *argv])
        out, err = capfd.readouterr()
        with (tmp_path / f"{what}.csv").open() as file:
            return code, out, err, list(csv.DictReader(file))

    return call


@pytest.fixture
def inputs() -> program.Inputs:
    return program.Inputs.draw(program.Shape(2, 2, 3, 7, 4, 3), "float32")


# attention


def test_attention_prints_its_table_last_and_writes_rows_and_a_picture(bench, tmp_path):
    code, out, err, rows = bench("attention", *SHAPES, *OURS, "--implementation", "torch_flex")
    assert code == cli.OK and "2/2 2,2,6,5,4,3" in err
    lines = out.splitlines()
    assert lines[-1].startswith("| skew ") and lines[-4].startswith("| implementation ")
    assert "\n  torch_flex: " in out and f"jax {jax.__version__}" in out
    assert [(row["H"], row["implementation"]) for row in rows] == [
        (height, name) for height in ("3", "6") for name in ("factorised", "skew", "torch_flex")
    ]
    for row in rows:
        if row["implementation"] == "torch_flex":
            assert row["status"] == "unavailable" and row["reason"] and row["gradient_s"] == ""
            continue
        assert row["status"] == "measured" and row["dtype"] == "float32" and row["jax"] == jax.__version__
        assert int(row["pixels"]) == int(row["H"]) * int(row["W"])
        assert 0 < float(row["forward_q1"]) <= float(row["forward_s"]) <= float(row["forward_q3"])
        assert int(row["gradient_samples"]) >= timing.MIN_ROUNDS and int(row["gradient_bytes"]) > 0
        assert max(float(row["forward_error"]), float(row["gradient_error"])) < 1e-5
    assert all(sum(row["chosen"] == "True" for row in rows if row["H"] == height) <= 1 for height in ("3", "6"))
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_memory_alone_is_read_without_running(bench, monkeypatch):
    monkeypatch.setattr(timing, "measure", None)
    code, out, _, rows = bench("attention", *SHAPES[:2], *OURS, "--memory-only", "--dtype", "bfloat16")
    assert code == cli.OK and out.splitlines()[-1].startswith("| skew ")
    assert all(row["status"] == "compiled" and int(row["gradient_bytes"]) > 0 for row in rows)


@pytest.mark.parametrize("limit,reason", [("1e-7", "the inputs alone take"), ("1e-5", "needs 0.0 GB")])
def test_what_needs_too_much_is_not_begun(bench, monkeypatch, limit, reason):
    monkeypatch.setattr(program.Compiled, "program", None)
    code, out, _, rows = bench("attention", *SHAPES[:2], *OURS, "--memory-limit", limit)
    assert code == cli.OK and "too large" in out.splitlines()[-1]
    assert all(row["status"] == "too large" and "--memory-limit is" in row["reason"] for row in rows)
    assert all(row["reason"].startswith(reason) for row in rows)


def test_inputs_beyond_any_machine_are_not_compiled(bench):
    # XLA's arithmetic overflows somewhere there and ends the process.
    code, out, _, rows = bench("attention", "--shape", "64,8,4096,4096,64,64", *OURS, "--memory-only")
    assert code == cli.OK and "the inputs alone take 8,796 GB" in out
    assert all(row["status"] == "too large" for row in rows)


def test_a_single_size_makes_no_picture(bench, tmp_path):
    code, _, err, _ = bench("attention", *SHAPES[:2], *OURS, "--memory-only")
    assert code == cli.OK and "no picture: it shows how costs grow" in err
    assert not (tmp_path / "attention.png").exists()


def test_a_wrong_result_is_marked_and_not_timed(bench, monkeypatch):
    right = ops.relative_attention

    def attend(q, k, v, rel, *, implementation):
        # Right forward, wrong backward in one table alone.
        rel = rel if implementation == "skew" else (rel[0], jax.lax.stop_gradient(rel[1]))
        return right(q, k, v, rel, implementation="skew")

    monkeypatch.setattr(ops, "relative_attention", attend)
    code, out, err, rows = bench("attention", *SHAPES[:2], *OURS)
    wrong, other = rows
    assert code == cli.OK and "factorised is WRONG" in err and "WRONG" in out.splitlines()[-2]
    assert wrong["status"] == "wrong" and wrong["forward_s"] == "" and float(wrong["forward_error"]) < 1e-5
    assert other["status"] == "measured"


def test_one_that_fails_or_cannot_serve_leaves_the_others(bench, monkeypatch):
    right = ops.relative_attention

    def attend(*arguments, implementation):
        if implementation == "skew":
            raise NotImplementedError("implementation='skew' cannot serve here: the moon is full")
        if implementation == "explicit":
            raise RuntimeError("broken")
        return right(*arguments, implementation=implementation)

    monkeypatch.setattr(ops, "relative_attention", attend)
    _, out, _, rows = bench("attention", *SHAPES[:2], *OURS, "--implementation", "explicit")
    assert "  skew: the moon is full\n" in out and "  explicit: RuntimeError: broken\n" in out
    assert [row["status"] for row in rows] == ["measured", "unavailable", "failed"]
    assert out.splitlines()[-1].startswith("| factorised ")


def test_a_pytorch_whose_libraries_are_missing_leaves_the_others(bench, monkeypatch, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delitem(sys.modules, "aaconv.bench.torch_peers", raising=False)
    names = ("--implementation", "skew", "--implementation", "torch_sdpa_bias")
    code, out, _, rows = bench("attention", *SHAPES[:2], *names)
    assert code == cli.OK and [row["status"] for row in rows] == ["measured", "unavailable"]
    assert "torch_sdpa_bias: PyTorch cannot be imported: libcudnn.so.9" in out


def test_interruption_keeps_the_finished_shapes(bench, monkeypatch):
    measure, calls = timing.measure, []

    def interrupt(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **more)

    monkeypatch.setattr(timing, "measure", interrupt)
    code, out, err, rows = bench("attention", *SHAPES, *OURS)
    assert code == cli.INTERRUPTED and "holds the 2 rows" in err
    assert {row["H"] for row in rows} == {"3"} and out.splitlines()[-1].startswith("| skew ")


def test_the_reference_agrees_with_the_operation_in_float64(inputs):
    expected = inputs.expected()
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in inputs.arrays]
        attend = lambda q, k, v, *rel: ops.relative_attention(q, k, v, rel, implementation="explicit")
        out, pullback = jax.vjp(attend, *arrays)
        *maps, rel_h, rel_w = [out, *pullback(jnp.asarray(inputs.checked, jnp.float64))]
        found = [*(np.asarray(x)[0] for x in maps), rel_h, rel_w]
    assert max(inputs.errors(found, expected)) < 1e-12


@pytest.mark.parametrize("spoiled", range(6))
def test_an_error_in_any_result_is_seen(inputs, spoiled):
    expected = inputs.expected()
    space = inputs.arrays[0].shape[1:3]
    out = np.zeros(inputs.checked.shape[1:])
    out.reshape(-1, *out.shape[2:])[inputs.queries] = expected.out
    found = [out, *(x.copy() for x in expected[1:])]
    assert max(inputs.errors(found, expected)) == 0 and out.shape[:2] == space
    found[spoiled] = 1.1 * found[spoiled]
    forward, backward = inputs.errors(found, expected)
    assert math.isclose(forward if spoiled == 0 else backward, 0.1, rel_tol=1e-6)
    found[spoiled] = np.full_like(found[spoiled], np.nan)
    assert max(inputs.errors(found, expected)) == math.inf


@pytest.mark.parametrize("name", ["torch_sdpa_bias", "torch_sdpa_codes", "torch_skew"])
def test_peers_in_pytorch_are_right(inputs, name):
    pytest.importorskip("torch", reason="PyTorch is an extra of the benchmarks: pip install 'aaconv[bench]'")
    from aaconv.bench import torch_peers

    peer = torch_peers.program(name, inputs, "float32", cuda=False)
    assert max(inputs.errors(peer.check(inputs.checked), inputs.expected())) < 1e-5
    n, pixels = 2, 21
    maps = 4 * n * pixels**2 * len(inputs.arrays[0])  # bytes of the attention maps
    needed = peer.gradient_bytes()
    assert needed is not None and needed > (0 if name == "torch_sdpa_codes" else maps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpu_flash_codes", "tpu_flash_bias"])
def test_peers_on_tpus_are_right(inputs, name):
    from jax.experimental.pallas import tpu as pltpu

    from aaconv.bench import tpu_peers

    attend, shape = tpu_peers.PEERS[name][1], program.Shape(2, 2, 3, 7, 4, 3)
    with pltpu.force_tpu_interpret_mode():
        compiled = program.compile(attend, shape, "float32", jax.devices()[0], heads_first=True)
        found = compiled.program(inputs, jax.devices()[0]).check(inputs.checked)
    assert max(inputs.errors(found, inputs.expected())) < 1e-5


def test_a_tpu_need_not_be_there(tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    words = [
        "bench",
        "attention",
        *SHAPES[:2],
        "--implementation",
        "skew",
        "--topology",
        "v5e:2x2",
        "--output",
        tmp_path,
    ]
    # Another process: the compiler changes jax's settings for the whole of it.
    done = subprocess.run([sys.executable, "-m", "aaconv", *words], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == cli.OK and "TPU v5 lite, one chip of v5e:2x2" in done.stdout, done.stderr
    with (tmp_path / "attention.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["status"] == "compiled" and row["dtype"] == "bfloat16" and float(row["gradient_moved"]) > 0


# step


@pytest.mark.slow
def test_step_measures_networks_and_their_layers(bench, tmp_path):
    words = "--models wrn_10_1,aa_wrn_10_1 --size 8 --batch 2 --config.model.stages=3 --config.model.upsilon=0.25"
    code, out, _, rows = bench("step", *words.split(), "--implementation", "skew")
    assert code == cli.OK
    assert [row["network"] for row in rows] == ["wrn_10_1", "aa_wrn_10_1 skew"]
    for row in rows:
        assert row["status"] == "measured" and row["size"] == "8" and row["batch"] == "2"
        assert math.isclose(float(row["images_per_s"]) * float(row["step_s"]), 2)
        assert int(row["temporary_bytes"]) > 0 and int(row["argument_bytes"]) > 4 * 70_000  # its parameters
    assert out.splitlines()[-1].startswith("| aa_wrn_10_1 skew ") and "Where the time goes" in out
    with (tmp_path / "layers.csv").open() as file:
        (layer,) = csv.DictReader(file)
    found = [layer[key] for key in ("layers", "count", "input", "attends_at")]
    assert found == ["stage3_block1/conv1", "1", "4x4", "2x2"]
    assert all(float(layer[key]) > 0 for key in ("conv_s", "aaconv_s", "attention_s"))


def test_step_of_inference_alone(bench, tmp_path):
    words = "--models wrn_10_1 --size 8 --batch 2 --inference --no-layers"
    code, out, _, rows = bench("step", *words.split())
    assert code == cli.OK and "inference, 2 images of 8 x 8" in out
    assert rows[0]["work"] == "inference" and float(rows[0]["step_s"]) > 0
    assert not (tmp_path / "layers.csv").exists()


def test_equal_layers_are_measured_once():
    configs = step._configs(["aa_resnet50"], step.RECIPE, ["data.image_size=64", "batch_size=2"], [])
    run = train.build(configs["aa_resnet50"], None, step._Synthetic(), training=True, devices=jax.devices()[:1])
    kinds = step._kinds(run, batch=2)
    # In each of the three augmented stages the first block has the stride and the others are alike.
    assert [len(kind.paths) for kind in kinds] == [1, 3, 1, 5, 1, 2]


# timing


def test_calls_take_turns_and_each_begins_a_round():
    order: list[str] = []
    jobs = {name: timing.Job(lambda name=name: order.append(name), lambda result: None) for name in "abc"}
    times = timing.measure(jobs, seconds=0.0, warm_up=1)
    assert order[:3] == ["a", "b", "c"]  # the warm-up
    turns = [name for index, name in enumerate(order[3:]) if index == 0 or name != order[3:][index - 1]]
    assert "".join(turns) == "abc" + "bca" + "cab"
    assert {len(found.samples) for found in times.values()} == {(len(order) - 3) // 3}


def test_pipelined_calls_are_waited_for_once_a_turn():
    waited: list[int] = []
    job = timing.Job(iter(range(10**6)).__next__, waited.append, pipelined=True)
    times = timing.measure({"one": job}, seconds=0.0, warm_up=1)["one"]
    assert len(times.samples) == len(waited) - 1 == timing.MIN_ROUNDS
    assert waited[-1] - waited[-2] > 1  # calls between two waits


def test_median_and_quartiles():
    times = timing.Times([5.0, 1.0, 2.0, 4.0, 3.0])
    assert times.median == 3 and times.quartiles == (2, 4)
    assert timing.Times([7.0]).quartiles == (7, 7)


def test_default_shapes_of_every_platform():
    for platform in ("cpu", "gpu", "tpu"):
        shapes = attention.default_shapes(platform)
        rows = [attention.Row.of(shape, "float32", "skew") for shape in shapes]
        assert len(set(shapes)) == len(shapes) and len({row.pixels for row in attention.series(rows)}) >= 3


def test_names_that_cannot_run_here_are_refused_before_anything_is_written(tmp_path, capsys):
    words = ["bench", "attention", *SHAPES[:2], "--implementation", "cudnn", "--implementation", "pallas_tpu"]
    assert cli.main([*words, "--output", str(tmp_path / "new")]) == cli.WRONG_INPUT
    answer = capsys.readouterr().err
    assert "cudnn cannot be measured here: it runs on NVIDIA GPUs" in answer and "pallas_tpu cannot" in answer
    assert not (tmp_path / "new").exists()
