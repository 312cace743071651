from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aaconv import data
from aaconv.config import ConfigDict, default_config
from aaconv.data import declared


def _edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_info_says_what_a_run_needs(digits_config: ConfigDict):
    info = data.info(digits_config)
    assert (info.name, info.num_classes, info.num_train, info.num_eval) == ("digits/1.0.0", 10, 1437, 360)
    assert info.image_shape == (8, 8, 1) and not info.decoded
    assert info.label_names == tuple("0123456789")


def test_keys_of_any_name_are_found(photographs_config: ConfigDict):
    info = data.info(photographs_config)
    assert info.decoded and info.image_shape == (16, 16, 3)
    assert info.label_names == ("rose", "daisy", "tulip")


def test_a_split_expression_selects_a_share(digits_config: ConfigDict):
    digits_config.data.train_split, digits_config.data.eval_split = "train[:90%]", "train[90%:]+test"
    info = data.info(digits_config)
    assert (info.num_train, info.num_eval) == (1293, 1437 - 1293 + 360)


@pytest.mark.parametrize("split", ["tset", "validation", "train[", "train[:half]", "test+tran[:10%]", "test[400:]", ""])
def test_an_unknown_split_lists_the_splits(split: str, digits_config: ConfigDict):
    digits_config.data.eval_split = split
    with pytest.raises(ValueError, match=r"data\.eval_split=.*is not a split of digits/1\.0\.0.*train \(1437 images\)"):
        data.info(digits_config)


def test_a_misspelt_split_is_corrected(digits_config: ConfigDict):
    digits_config.data.eval_split = "tests"
    with pytest.raises(ValueError, match="did you mean 'test'"):
        data.info(digits_config)


@pytest.mark.parametrize("split", ["train[:0%]", "train[5:5]", "train[95%:90%]"])
def test_an_empty_split_is_refused(split: str, digits_config: ConfigDict):
    digits_config.data.train_split = split
    with pytest.raises(ValueError, match=r"is empty: select at least one image; there are train \(1437 images\)"):
        data.info(digits_config)


def test_an_unknown_name_lists_the_close_ones(digits_config: ConfigDict):
    digits_config.data.name = "digit"
    with pytest.raises(ValueError, match=r"unknown data set 'digit'.*there is digits.*did you mean 'digits'"):
        data.info(digits_config)
    digits_config.data.name = "cifar1000"
    with pytest.raises(ValueError, match="did you mean 'cifar100' or 'cifar10'"):
        data.info(digits_config)


@pytest.mark.parametrize("name", ["", "Two words", "a/b/c", "digits:1", "../digits"])
def test_what_is_no_name_is_refused(name: str, digits_config: ConfigDict):
    digits_config.data.name = name
    with pytest.raises(ValueError, match="is not the name of a data set: write NAME, NAME:1.0.0"):
        data.info(digits_config)


def test_a_set_that_is_not_prepared_names_the_command(digits_config: ConfigDict, tmp_path: Path):
    digits_config.data.name, digits_config.data.data_dir = "cifar100", str(tmp_path / "my data")
    command = f"aaconv prepare cifar100 --data-dir '{tmp_path / 'my data'}'"
    with pytest.raises(data.NotPrepared, match=r"not prepared in .*it has none.*aaconv\[prepare\]") as caught:
        data.info(digits_config)
    assert command in str(caught.value)
    assert data.prepare_command("cifar100", tmp_path / "my data") == command


def test_the_newest_version_counts_unless_one_is_named(digits_copy: Path, digits_config: ConfigDict):
    for version in ("1.0.9", "1.0.10"):
        shutil.copytree(digits_copy, digits_copy.parent / version)
        _edit(digits_copy.parent / version / "dataset_info.json", lambda info, v=version: info.update(version=v))
    digits_config.data.data_dir = str(digits_copy.parents[1])
    assert data.info(digits_config).name == "digits/1.0.10"
    digits_config.data.name = "digits:1.0.9"
    assert data.info(digits_config).name == "digits/1.0.9"
    digits_config.data.name = "digits:3.0.0"
    with pytest.raises(ValueError, match=r"version 3\.0\.0 .* which has 1\.0\.0, 1\.0\.9, 1\.0\.10: name one of those"):
        data.info(digits_config)


def test_a_config_of_a_set_is_found(digits_copy: Path, digits_config: ConfigDict):
    root = digits_copy.parents[1]
    for name in ("plain", "noisy"):
        shutil.copytree(digits_copy, root / "shapes" / name / "1.0.0")
        _edit(
            root / "shapes" / name / "1.0.0" / "dataset_info.json",
            lambda info, n=name: info.update(name="shapes", configName=n),
        )
        for file in (root / "shapes" / name / "1.0.0").glob("digits-*"):
            file.rename(file.with_name(file.name.replace("digits", "shapes")))
    digits_config.data.data_dir, digits_config.data.name = str(root), "shapes/noisy"
    assert data.info(digits_config).name == "shapes/noisy/1.0.0"
    assert len(next(iter(data.train_input(digits_config)))["label"]) == 128
    digits_config.data.name = "shapes"
    with pytest.raises(ValueError, match="several configs in .*: name one of shapes/noisy, shapes/plain"):
        data.info(digits_config)


def test_a_set_in_another_format_says_how_to_convert(digits_copy: Path, digits_config: ConfigDict):
    _edit(digits_copy / "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    digits_config.data.data_dir = str(digits_copy.parents[1])
    for call in (lambda: data.info(digits_config), lambda: data.prepare("digits", digits_config.data.data_dir)):
        with pytest.raises(ValueError, match=r"stored as tfrecord.*`aaconv prepare digits:1\.0\.0 --data-dir /"):
            call()


def test_images_of_16_bits_are_refused(digits_copy: Path, digits_config: ConfigDict):
    def widen(features: Any) -> None:
        features["featuresDict"]["features"]["image"]["image"]["dtype"] = "uint16"

    _edit(digits_copy / "features.json", widen)
    digits_config.data.data_dir = str(digits_copy.parents[1])
    with pytest.raises(ValueError, match="images of digits/1.0.0 are uint16, not uint8"):
        data.info(digits_config)


@pytest.mark.parametrize("missing", ["image", "label"])
def test_a_set_without_image_or_label_lists_its_features(missing: str, digits_copy: Path, digits_config: ConfigDict):
    _edit(digits_copy / "features.json", lambda f: f["featuresDict"]["features"].pop(missing))
    _edit(digits_copy / "dataset_info.json", lambda info: info.pop("supervisedKeys"))
    digits_config.data.data_dir = str(digits_copy.parents[1])
    there = {"image": r"label \(ClassLabel\)", "label": r"image \(Image\)"}[missing]
    with pytest.raises(ValueError, match=f"has no {missing} features.*its features are {there}"):
        data.info(digits_config)


def _truncate(folder: Path) -> None:
    file = next(folder.glob("*-train*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        lambda folder: next(folder.glob("*-train*")).unlink(),
        lambda folder: (folder / "features.json").unlink(),
        lambda folder: (folder / "dataset_info.json").write_text("{"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], None], digits_copy: Path, digits_config: ConfigDict):
    damage(digits_copy)
    digits_config.data.data_dir = str(digits_copy.parents[1])
    with pytest.raises(ValueError, match=r"digits/1\.0\.0 cannot be read .*delete that folder and prepare"):
        data.train_input(digits_config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 3}, r"data\.channels=3 but the images of digits/1\.0\.0 have 1: set data\.channels=1"),
        ({"channels": 2}, r"data\.channels=2 is not supported"),
        ({"mean": (0.5, 0.5, 0.5)}, r"data\.mean=.* has 3 numbers for data\.channels=1"),
        ({"std": ()}, r"data\.std=.* has 0 numbers for data\.channels=1"),
        ({"std": (0.0,)}, r"data\.std=\(0\.0,\) must be greater than 0"),
    ],
)
def test_channels_have_to_agree(changes: dict[str, Any], message: str, digits_config: ConfigDict):
    digits_config.data.update(changes)
    for call in (data.info, data.train_input, data.eval_input):
        with pytest.raises(ValueError, match=message):
            call(digits_config)


def test_photographs_need_an_image_size(photographs_config: ConfigDict):
    photographs_config.data.image_size = None
    with pytest.raises(ValueError, match=r"data\.image_size is not set and the images of photographs/1\.0\.0 differ"):
        data.info(photographs_config)


def test_the_folder_comes_from_the_environment(
    digits_dir: str, digits_config: ConfigDict, monkeypatch: pytest.MonkeyPatch
):
    digits_config.data.data_dir = ""
    monkeypatch.setenv("TFDS_DATA_DIR", digits_dir)
    assert data.info(digits_config).num_train == 1437
    assert data.prepare("digits") == os.path.join(digits_dir, "digits", "1.0.0")


def test_preparing_an_unknown_set_lists_the_close_ones(tmp_path: Path):
    with pytest.raises(ValueError, match="'cifar_100' is unknown to TFDS; did you mean 'cifar100'"):
        data.prepare("cifar_100", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_preparing_without_tensorflow_names_the_extra(tmp_path: Path):
    with pytest.raises(ValueError, match=r"needs TensorFlow.*pip install 'aaconv\[prepare\]'.*aaconv prepare cifar10 "):
        data.prepare("cifar10", str(tmp_path))


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, aaconv.data; "
        "assert not {'grain', 'tensorflow', 'tensorflow_datasets', 'PIL', 'sklearn'} & set(sys.modules); "
        "assert 'train_input' in dir(aaconv.data)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="train_inptu"):
        data.train_inptu  # noqa: B018


@pytest.mark.parametrize(
    ("name", "size", "shape", "classes"),
    [
        ("cifar100", None, (32, 32, 3), 100),  # it has coarse labels too
        ("imagenet2012", 224, (224, 224, 3), 1000),
        ("digits", None, (8, 8, 1), 10),
    ],
)
def test_what_tfds_declares_serves_where_nothing_is_prepared(
    name: str, size: int | None, shape: tuple[int, int, int], classes: int, tmp_path: Path
):
    config = default_config()
    config.data.name, config.data.data_dir, config.data.image_size = name, str(tmp_path), size
    config.data.channels = shape[-1]
    config.data.mean = config.data.std = (0.5,) * shape[-1]
    info = declared.declared_info(config)
    assert (info.image_shape, info.num_classes, info.num_train) == (shape, classes, 0)
    assert not list(tmp_path.iterdir())


def test_what_tfds_does_not_declare_has_to_be_prepared():
    config = default_config()
    config.data.name = "no_such_set"
    with pytest.raises(ValueError, match="does not say what 'no_such_set' holds .*aaconv prepare no_such_set"):
        declared.declared_info(config)
