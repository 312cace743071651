from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from aaconv import data
from aaconv.config import ConfigDict
from aaconv.data import digits


def test_every_digit_of_scikit_learn_is_in_one_split(digits_config: ConfigDict):
    digits_config.data.placement = "device"
    images, labels = [], []
    for split in ("train", "test"):
        digits_config.data.train_split = split
        arrays = data.train_input(digits_config).resident
        assert arrays is not None
        images.append(arrays["image"])
        labels.append(arrays["label"])
    assert [len(part) for part in labels] == [1437, 360]
    found = {(image.tobytes(), int(label)) for image, label in zip(*map(np.concatenate, (images, labels)), strict=True)}
    source = load_digits()
    scaled = np.round(source.images * 255 / 16).astype(np.uint8)
    assert found == {(image.tobytes(), int(label)) for image, label in zip(scaled, source.target, strict=True)}
    assert images[0].shape[1:] == (8, 8, 1) and images[0].min() == 0 and images[0].max() == 255


def test_both_splits_hold_every_class(digits_config: ConfigDict):
    digits_config.data.placement = "device"
    for split in ("train", "test"):
        digits_config.data.train_split = split
        arrays = data.train_input(digits_config).resident
        assert arrays is not None
        assert np.bincount(arrays["label"], minlength=10).min() >= 25


def test_they_are_prepared_on_first_use_wherever_the_environment_says(
    digits_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "new" / "folder"))
    digits_config.data.data_dir = ""
    assert data.info(digits_config).num_train == 1437
    assert (tmp_path / "new" / "folder" / "digits" / "1.0.0" / "dataset_info.json").exists()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["digits"]
    assert "ownload" not in capfd.readouterr().out


def test_several_processes_may_prepare_them_at_once(tmp_path: Path):
    code = "import sys; from aaconv.data import own; sys.stdin.read(); print(own.prepare('digits', sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    assert {process.communicate()[0].strip() for process in processes} == {str(tmp_path / "digits" / "1.0.0")}
    assert all(process.returncode == 0 for process in processes)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert json.loads((tmp_path / "digits/1.0.0/dataset_info.json").read_text())["fileFormat"] == "array_record"


def test_a_folder_that_cannot_be_written_is_named(digits_config: ConfigDict, tmp_path: Path):
    (tmp_path / "file").write_text("")
    digits_config.data.data_dir = str(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot be prepared in .*file: .*set data\.data_dir or TFDS_DATA_DIR"):
        data.info(digits_config)


def test_there_is_only_one_version(tmp_path: Path):
    with pytest.raises(ValueError, match="the only version is 1.0.0"):
        data.prepare("digits:2.0.0", str(tmp_path))
    assert data.prepare("digits:1.0.0", str(tmp_path)) == str(tmp_path / "digits" / digits.VERSION)
