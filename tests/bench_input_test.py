"""`aaconv bench input` and `aaconv bench loop` run the real pipeline and loop; none of their times is asserted."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from PIL import Image

from aaconv import cli
from aaconv.bench import input, loop
from aaconv.data import photographs

# input


@pytest.fixture
def bench(capfd, tmp_path):
    """Calls ``aaconv bench``; gives the exit code, what was printed and the rows of the CSV file."""

    def call(what: str, *argv: str):
        code = cli.main(["bench", what, "--output", str(tmp_path / "out"), *argv])
        out, err = capfd.readouterr()
        file = tmp_path / "out" / f"{what}.csv"
        rows = list(csv.DictReader(io.StringIO(file.read_text()))) if file.exists() else []
        return code, out, err, rows

    return call


def test_a_made_up_photograph_has_the_pixels_and_bytes_of_imagenets():
    encoded = photographs.photograph(3)
    assert encoded == photographs.photograph(3) != photographs.photograph(4)
    with Image.open(io.BytesIO(encoded)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
        assert 30 < np.asarray(image).std() < 60
    assert 100_000 < len(encoded) < 120_000


def test_input_measures_every_way(bench, monkeypatch):
    monkeypatch.setattr(input, "COUNT", 12)
    argv = ["--workers", "0,1", "--rounds", "1", "--seconds", "0.01", "--batch", "4", "--size", "32", "--feed", "1e9"]
    code, out, err, rows = bench("input", *argv)
    assert code == cli.OK and "making 12 photographs" in err and "round 1/1: 1 process" in err
    assert "12 files of 11" in out and "187,500 pixels" in out and "32 x 32, batches of 4" in out
    assert [(row["num_workers"], row["images_per_s_rounds"]) for row in rows] == [("", "1"), ("0", "1"), ("1", "1")]
    assert rows[0]["what"] == input.DECODING and rows[1]["what"].endswith("threads") or rows[1]["busy"] == "1"
    for row in rows:
        assert row["data"] == "made_up_photographs/1.0.0" and (row["size"], row["batch"]) == ("32", "4")
        assert float(row["images_per_s_per_core"]) <= float(row["images_per_s"]) < math.inf
    lines = out.splitlines()
    assert lines[-4].startswith("| 1 process ")
    assert lines[-2].startswith("The pipeline gives up to ")
    assert lines[-1].startswith("A device that takes 1,000,000,000 images/s is fed by ")


def test_input_refuses_what_is_not_decoded_in_training(bench, tmp_path):
    argv = ["--config", "configs/digits.py", f"--config.data.data_dir={tmp_path}", "--size", "8"]
    code, _, err, _ = bench("input", *argv)
    assert code == cli.WRONG_INPUT
    assert "the images of data.name='digits' are all of one size and are decoded once, before training" in err


def test_input_refuses_workers_that_are_no_numbers(bench):
    code, _, err, _ = bench("input", "--workers", "0,two")
    assert code == cli.WRONG_INPUT and "'0,two' must be numbers of worker processes such as 0,1,2" in err


# loop


def test_loop_takes_turns_with_bare_steps_on_real_data(bench, tmp_path, monkeypatch):
    called = []
    bare = loop._Bare.__call__
    monkeypatch.setattr(loop._Bare, "__call__", lambda self, steps: called.append(steps) or bare(self, steps))
    argv = ["--config", "configs/digits.py", f"--config.data.data_dir={tmp_path}", "--steps", "5", "--rounds", "2"]
    settings = {"model.name": "wrn_10_1", "batch_size": 8, "log_every_steps": 3, "mesh.data": 1}
    settings |= dict.fromkeys(["model.kappa", "model.upsilon", "model.num_heads", "model.min_key_depth"])
    settings |= dict.fromkeys(["model.depth", "model.width"])
    code, out, err, (row,) = bench("loop", *argv, *(f"--config.{key}={value}" for key, value in settings.items()))
    assert code == cli.OK and "round 2/2" in err
    # Two turns of three steps a round, after two calls to warm up.
    assert called == [2, 3, 3, 3, 3]
    assert (row["steps"], row["rounds"], row["log_every_steps"], row["batch"]) == ("6", "2", "3", "8")
    assert (row["data"], row["placement"], row["network"]) == ("digits", "memory", "wrn_10_1")
    assert 0 < float(row["bare_s_q1"]) <= float(row["bare_s"]) <= float(row["bare_s_q3"])
    assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
    assert 0 <= float(row["input_wait_share"]) < 1
    assert out.splitlines()[-1].startswith("| configs/digits.py | ")
