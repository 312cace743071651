from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from aaconv import data
from aaconv.config import ConfigDict, default_config
from aaconv.data import declared, digits
from aaconv.data.digit_pairs import DIGIT, GAPS, LABELS, MARGIN, WIDTH, Pair, pairs

EVERY = [(level, split) for level in GAPS for split in ("train", "test")]


@pytest.fixture(scope="module")
def far_config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    config = default_config()
    config.data.update(name="digit_pairs/far", channels=1, mean=(0.5,), std=(0.5,), placement="device")
    config.data.data_dir = str(tmp_path_factory.mktemp("pairs"))
    return config


def shown(level: str, split: str) -> list[Pair]:
    found = pairs(level, split)
    assert len(found) == {"train": 8100, "test": 2700}[split]
    return found


@pytest.mark.parametrize(("level", "split"), EVERY)
def test_the_label_follows_from_the_two_digits_and_no_digit_tells_it(level, split):
    found, target = shown(level, split), load_digits().target
    count = len(found)
    for pair in found:
        left, right = target[list(pair.images)]
        wanted = "same" if left == right else "left_larger" if left > right else "right_larger"
        assert pair.digits == (left, right) and pair.label == wanted and pair.images[0] != pair.images[1]
    assert Counter(pair.label for pair in found) == dict.fromkeys(LABELS, count // 3)
    # Every digit is in as many images of each label, and every order of two is as frequent.
    assert set(Counter(pair.digits for pair in found if pair.label == "same").values()) == {count // 15}
    assert list(Counter(pair.digits for pair in found if pair.label != "same").values()) == [count // 3 // 10] * 20
    for label in LABELS:
        digits = Counter(digit for pair in found if pair.label == label for digit in pair.digits)
        assert digits == dict.fromkeys(range(5), count // 3 * 2 // 5)


@pytest.mark.parametrize(("level", "split"), EVERY)
def test_digits_stand_as_far_apart_and_from_the_edges_as_the_level_says(level, split):
    found = shown(level, split)
    nearest, furthest = {"near": (0, 3), "middle": (10, 13), "far": (24, 27)}[level]
    gaps = Counter(pair.gap for pair in found)
    assert set(gaps) == set(range(nearest, furthest + 1)) and min(gaps.values()) > 0.2 * len(found)
    assert min(pair.left for pair in found) == MARGIN
    assert max(pair.left + 2 * DIGIT + pair.gap for pair in found) <= WIDTH - MARGIN


@pytest.mark.parametrize("level", GAPS)
def test_the_place_in_a_grid_of_the_networks_stride_tells_no_side(level):
    found = shown(level, "train")
    for columns in ([pair.left for pair in found], [pair.left + DIGIT + pair.gap for pair in found]):
        counts = np.bincount(np.asarray(columns) % 4, minlength=4)
        assert abs(counts / len(found) - 0.25).max() < 0.02  # four standard deviations


def test_train_and_test_have_no_digit_in_common_and_use_those_of_the_set_digits():
    used = {split: {index for pair in shown("far", split) for index in pair.images} for split in ("train", "test")}
    known = digits.load()
    assert used == {split: {i for i in order.tolist() if known.labels[i] < 5} for split, order in known.splits.items()}
    assert not used["train"] & used["test"]


def test_levels_differ_in_nothing_but_places():
    far, near, middle = ([(p.images, p.digits) for p in shown(level, "train")] for level in GAPS)
    assert far == near == middle


# Of all images and labels of train, then of test. Other sums mean other data: give it another version.
CHECKSUMS = {"near": "829e71740c975704", "middle": "8d83e8972aba7da5", "far": "934ae0db1f495d09"}


@pytest.mark.parametrize("level", GAPS)
def test_the_same_images_come_out_everywhere(level):
    total = hashlib.sha256()
    for split in ("train", "test"):
        for pair in shown(level, split):
            total.update(pair.draw(digits.load().images).tobytes() + pair.label.encode())
    assert total.hexdigest()[:16] == CHECKSUMS[level]


def test_they_are_prepared_at_first_use_and_hold_what_was_drawn(far_config: ConfigDict):
    info = data.info(far_config)
    assert (info.name, info.num_train, info.num_eval) == ("digit_pairs/far/2.0.0", 8100, 2700)
    assert (info.image_shape, info.label_names, info.decoded) == ((8, 96, 1), LABELS, False)
    root = Path(far_config.data.data_dir)
    assert [str(path.relative_to(root)) for path in root.glob("*/*/*")] == ["digit_pairs/far/2.0.0"]
    far_config.data.train_split = "test"
    stored = data.train_input(far_config).resident
    assert stored is not None
    for image, label, pair in zip(stored["image"], stored["label"], pairs("far", "test"), strict=True):
        assert np.array_equal(image[..., 0], pair.draw(digits.load().images)) and LABELS[label] == pair.label


def test_a_version_from_before_is_left_alone_and_read_only_by_its_name(far_config: ConfigDict):
    config = far_config.copy_and_resolve_references()
    root = Path(config.data.data_dir)
    data.prepare("digit_pairs/far", str(root))
    config.data.data_dir = str(root.parent / "older")
    older = root.parent / "older/digit_pairs/far/1.0.0"
    shutil.copytree(root / "digit_pairs/far/2.0.0", older)
    info = json.loads((older / "dataset_info.json").read_text())
    (older / "dataset_info.json").write_text(json.dumps(info | {"version": "1.0.0"}))
    assert data.info(config).name == "digit_pairs/far/2.0.0"
    assert sorted(path.name for path in older.parent.iterdir()) == ["1.0.0", "2.0.0"]
    config.data.name = "digit_pairs/far:1.0.0"
    assert data.info(config).name == "digit_pairs/far/1.0.0"


def test_what_is_declared_of_them_is_what_they_hold(far_config: ConfigDict):
    said = declared.declared_info(far_config)
    assert (said.image_shape, said.label_names) == ((8, 96, 1), LABELS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "digit_pairs",
            "'digit_pairs' does not exist; did you mean .* name one of digit_pairs/near, digit_pairs/middle, ",
        ),
        ("digit_pairs/fra", "'digit_pairs/fra' does not exist; did you mean 'digit_pairs/far'"),
        ("digit_pairs/far:1.0.0", "the only version is 2.0.0"),
        ("digits/far", "'digits/far' does not exist: it has no configs; name digits"),
        ("digit_pears/far", "did you mean 'digit_pairs/far'"),
    ],
)
def test_a_name_that_is_wrong_lists_the_right_ones(name, words, tmp_path: Path):
    config = default_config()
    config.data.update(name=name, channels=1, mean=(0.5,), std=(0.5,), data_dir=str(tmp_path))
    for call in (lambda: data.info(config), lambda: data.prepare(name, str(tmp_path))):
        with pytest.raises(ValueError, match=words):
            call()
    assert not list(tmp_path.iterdir())
