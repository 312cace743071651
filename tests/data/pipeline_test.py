from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from aaconv import data
from aaconv.config import ConfigDict

PLACEMENTS = ("device", "memory", "workers")


def _take(iterator: Any, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def _same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def _order(config: ConfigDict, epochs: int, **where: int) -> np.ndarray:
    """The examples' indices, an epoch a row."""
    config.data.placement = "device"
    train = data.train_input(config, **where)
    batches = _take(iter(train), train.steps_per_epoch * epochs)
    return np.concatenate([batch["index"] for batch in batches]).reshape(epochs, -1)


def test_an_epoch_shows_every_example_at_most_once_in_a_new_order(digits_config: ConfigDict):
    digits_config.batch_size = 100
    order = _order(digits_config, 3)
    assert order.dtype == np.int32 and order.shape == (3, 1400)
    assert all(len(np.unique(epoch)) == 1400 for epoch in order)
    assert order.min() == 0 and order.max() == 1436
    assert all((a == b).mean() < 0.01 for a, b in itertools.combinations(order, 2))
    # What an epoch leaves out differs too.
    assert len({frozenset(epoch.tolist()) for epoch in order}) == 3


def test_the_seed_decides_the_order(digits_config: ConfigDict):
    first = _order(digits_config, 2)
    assert np.array_equal(first, _order(digits_config, 2))
    digits_config.seed = 1
    other = _order(digits_config, 2)
    # Neither is an epoch of one seed that of another.
    assert all((a == b).mean() < 0.01 for a in first for b in other)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_shares_the_same_batches(count: int, digits_config: ConfigDict):
    whole = _order(digits_config, 2).reshape(-1, 128)
    parts = [_order(digits_config, 2, process_index=i, process_count=count) for i in range(count)]
    together = np.concatenate([part.reshape(len(whole), -1) for part in parts], axis=1)
    assert np.array_equal(whole, together)


def test_every_placement_feeds_the_same(digits_config: ConfigDict):
    digits_config.data.augment.crop_padding, digits_config.data.augment.flip = 1, True
    fed = []
    for placement in PLACEMENTS:
        digits_config.data.placement = placement
        train = data.train_input(digits_config)
        assert train.placement == placement and (train.resident is not None) == (placement == "device")
        first, *_, next_epoch = _take(iter(train), train.steps_per_epoch + 1)
        prepare = jax.jit(train.prepare)
        fed.append([prepare(batch, jax.random.key(0), train.resident) for batch in (first, next_epoch)])
        for batch in fed[-1]:
            assert batch["image"].shape == (128, 8, 8, 1) and batch["image"].dtype == np.float32
            assert batch["label"].dtype == np.int32
    assert _same(fed[0], fed[1]) and _same(fed[0], fed[2])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_resuming_in_the_middle_of_an_epoch_is_exact(placement: str, digits_config: ConfigDict):
    digits_config.data.placement = placement
    train = data.train_input(digits_config)
    iterator = iter(train)
    _take(iterator, 15)  # 11 to an epoch
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _take(iterator, 12)
    assert state == iterator.get_state() | {"batches": 15}
    resumed = iter(data.train_input(digits_config))
    resumed.set_state(state)
    assert _same(_take(resumed, 12), expected)
    # Also back, on an iterator that has run.
    iterator.set_state(state)
    assert _same(_take(iterator, 12), expected)
    assert iterator.get_state()["batches"] == 27


def test_a_position_saved_by_one_process_serves_four(digits_config: ConfigDict):
    digits_config.data.placement = "device"
    whole = iter(data.train_input(digits_config))
    _take(whole, 7)
    parts = [iter(data.train_input(digits_config, i, 4)) for i in range(4)]
    for part in parts:
        part.set_state(whole.get_state())
    assert np.array_equal(next(whole)["index"], np.concatenate([next(part)["index"] for part in parts]))


@pytest.mark.parametrize("change", [{"seed": 5}, {"batch_size": 64}, {"data.train_split": "train[:50%]"}])
def test_a_position_of_another_order_is_refused(change: dict[str, Any], digits_config: ConfigDict):
    state = iter(data.train_input(digits_config)).get_state()
    with digits_config.unlocked():
        digits_config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match="saved position belongs to .* but this run has .* new workdir"):
        iter(data.train_input(digits_config)).set_state(state)


def test_a_position_of_a_version_with_another_order_is_refused(digits_config: ConfigDict):
    iterator = iter(data.train_input(digits_config))
    state = iterator.get_state()
    del state["order"]
    with pytest.raises(ValueError, match="the saved position has no order=.*continue with that version, or start in a"):
        iterator.set_state(state)


def test_the_order_stays_for_good(digits_config: ConfigDict):
    """Written down once: a run that goes on with other versions of numpy or of this library has the same order."""
    digits_config.data.placement = "device"
    epochs = _take(iter(data.train_input(digits_config)), 12)  # 11 to an epoch
    starts = [epochs[i]["index"][:5].tolist() for i in (0, 11)]
    assert starts == [[855, 921, 269, 1185, 11], [1347, 7, 1370, 720, 259]]


def test_training_crops_differ_by_epoch_and_repeat_by_seed(photographs_config: ConfigDict):
    train = data.train_input(photographs_config)
    assert train.placement == "workers" and train.steps_per_epoch == 6
    batches = _take(iter(train), 12)
    assert batches[0]["image"].shape == (8, 16, 16, 3) and batches[0]["image"].dtype == np.uint8
    assert _same(batches, _take(iter(data.train_input(photographs_config)), 12))
    crops = {image.tobytes() for batch in batches for image in batch["image"]}
    assert len(crops) == 96


def test_every_photograph_comes_once_an_epoch_whatever_its_format(photographs_config: ConfigDict):
    batches = _take(iter(data.train_input(photographs_config)), 6)
    # The fixture's images tell who they are by their brightness, in steps of 5.
    found = np.concatenate([np.round((batch["image"].mean((1, 2, 3)) - 1) / 5) for batch in batches]).astype(int)
    assert sorted(found) == list(range(48))
    assert np.array_equal(found % 3, np.concatenate([batch["label"] for batch in batches]))


def test_crops_do_not_depend_on_the_number_of_processes(photographs_config: ConfigDict):
    whole = _take(iter(data.train_input(photographs_config)), 8)
    parts = [_take(iter(data.train_input(photographs_config, i, 2)), 8) for i in range(2)]
    together = [{k: np.concatenate([x[k], y[k]]) for k in x} for x, y in zip(*parts, strict=True)]
    assert _same(whole, together)


def test_worker_processes_give_what_threads_give_and_resume(photographs_config: ConfigDict):
    expected = _take(iter(data.train_input(photographs_config)), 11)
    photographs_config.data.num_workers = 2
    train = data.train_input(photographs_config)
    iterator = iter(train)
    got = _take(iterator, 4)
    state = iterator.get_state()
    iterator.close()
    resumed = iter(train)
    resumed.set_state(state)
    got += _take(resumed, 7)
    resumed.close()
    assert _same(got, expected)


SCRIPT = """
if __name__ == "__main__":
    import sys, time
    from aaconv import data
    from aaconv.config import default_config

    config = default_config()
    config.data.update(
        name="photographs", data_dir=sys.argv[1], image_size=16, eval_split="test", num_workers=2
    )
    config.data.augment.random_resized_crop = True
    config.batch_size, config.eval_batch_size = 8, 4
    batches = iter(data.train_input(config))
    first = next(batches)
"""


@pytest.mark.slow
def test_worker_processes_run_in_a_plain_script(photographs_dir: str):
    # Nobody has parsed absl's flags here, and nothing may be printed when the interpreter ends.
    code = SCRIPT + "    assert sum(batch['mask'].sum() for batch in data.eval_input(config)) == 10"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, photographs_dir], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_working(photographs_dir: str):
    code = (
        SCRIPT
        + """
    for _ in range(4):  # so that both workers have begun: one that is still starting is ended by the signal
        next(batches)
    import os, signal
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.killpg(0, signal.SIGTERM)
    time.sleep(1)
    for _ in range(50):
        next(batches)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code, photographs_dir], capture_output=True, text=True, start_new_session=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(photographs_dir: str):
    code = SCRIPT + "    print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, photographs_dir], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        for _ in range(100):
            if not _group_is_alive(parent.pid):
                return
            time.sleep(0.1)
    raise AssertionError("a worker outlived its parent")


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("placement", ["memory", "workers"])
@pytest.mark.parametrize(("batch_size", "count"), [(100, 1), (100, 2), (360, 4), (512, 2), (72, 1)])
def test_evaluation_sees_every_image_exactly_once(
    placement: str, batch_size: int, count: int, digits_config: ConfigDict
):
    digits_config.data.placement, digits_config.eval_batch_size = placement, batch_size
    digits_config.data.train_split = "test"
    digits_config.batch_size = 10
    seen: list[tuple[bytes, int]] = []
    for index in range(count):
        evaluation = data.eval_input(digits_config, index, count)
        assert len(evaluation) == evaluation.num_batches == -(-360 // batch_size)
        batches = list(evaluation)
        assert len(batches) == evaluation.num_batches
        for batch in batches:
            assert batch["image"].shape == (batch_size // count, 8, 8, 1) and batch["image"].dtype == np.uint8
            assert batch["label"].shape == batch["mask"].shape == (batch_size // count,)
            assert batch["mask"].dtype == bool and batch["label"].dtype == np.int32
            assert not batch["image"][~batch["mask"]].any()
            seen += [
                (image.tobytes(), int(label))
                for image, label in zip(batch["image"][batch["mask"]], batch["label"][batch["mask"]], strict=True)
            ]
    digits_config.data.placement = "device"
    stored = data.train_input(digits_config).resident
    assert stored is not None
    expected = [(image.tobytes(), int(label)) for image, label in zip(stored["image"], stored["label"], strict=True)]
    assert sorted(seen) == sorted(expected)


def test_evaluation_can_be_run_again_and_left_early(digits_config: ConfigDict):
    evaluation = data.eval_input(digits_config)
    next(iter(evaluation))
    assert _same(list(evaluation), list(evaluation))


def test_evaluation_batches_are_normalised_with_their_mask(digits_config: ConfigDict):
    evaluation = data.eval_input(digits_config)
    batch = next(iter(evaluation))
    fed = jax.jit(evaluation.prepare)(batch)
    np.testing.assert_allclose(fed["image"], (batch["image"] / 255 - 0.5) / 0.25, atol=1e-6)
    assert fed["mask"].sum() == 360 and np.array_equal(fed["label"], batch["label"])


def test_images_are_resized_to_the_size_asked_for(digits_config: ConfigDict):
    digits_config.data.image_size = 12
    assert data.info(digits_config).image_shape == (12, 12, 1)
    assert next(iter(data.train_input(digits_config)))["image"].shape == (128, 12, 12, 1)
    assert next(iter(data.eval_input(digits_config)))["image"].shape == (512, 12, 12, 1)


def test_photographs_without_random_crops_may_stay_in_memory(photographs_config: ConfigDict):
    photographs_config.data.augment.random_resized_crop = False
    fed = {}
    for placement in PLACEMENTS:
        photographs_config.data.placement = placement
        train = data.train_input(photographs_config)
        fed[placement] = jax.jit(train.prepare)(next(iter(train)), jax.random.key(0), train.resident)
    assert _same([fed["device"]], [fed["memory"]]) and _same([fed["device"]], [fed["workers"]])


def test_random_crops_of_small_images_go_to_the_workers(digits_config: ConfigDict):
    digits_config.data.augment.random_resized_crop = True
    train = data.train_input(digits_config)
    assert train.placement == "workers" and next(iter(train))["image"].shape == (128, 8, 8, 1)
    for placement in ("device", "memory"):
        digits_config.data.placement = placement
        with pytest.raises(ValueError, match=f'placement={placement!r} keeps images already cut.*placement="workers"'):
            data.train_input(digits_config)


def test_small_sets_stay_in_memory_on_a_cpu(digits_config: ConfigDict):
    assert data.train_input(digits_config).placement == data.eval_input(digits_config).placement == "memory"


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"batch_size": 2000}, (0, 1), r"batch_size=2000 is larger than the 1437 images of data\.train_split='train'"),
        ({"batch_size": 100}, (0, 3), r"batch_size=100 does not divide among 3 processes: use a multiple of 3"),
        ({}, (2, 2), r"process_index=2 must lie between 0 and process_count - 1 = 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    changes: dict[str, Any], where: tuple[int, int], message: str, digits_config: ConfigDict
):
    digits_config.update(changes)
    with pytest.raises(ValueError, match=message):
        data.train_input(digits_config, *where)


def test_evaluation_batches_have_to_divide_too(digits_config: ConfigDict):
    with pytest.raises(ValueError, match=r"eval_batch_size=512 does not divide among 3 processes"):
        data.eval_input(digits_config, 0, 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named(
    num_workers: int, photographs_config: ConfigDict, photographs_of: Callable[[dict[int, bytes]], str]
):
    photographs_config.data.data_dir = photographs_of({20: b"no image"})
    photographs_config.data.num_workers = num_workers
    iterator = iter(data.train_input(photographs_config))
    message = r"of example 20 of split 'train' in .*photographs/1\.0\.0 is corrupt.*replace it"
    with pytest.raises(ValueError, match=message):
        _take(iterator, 6)
    iterator.close()


def test_a_corrupt_image_is_named_when_all_are_decoded_at_once(
    photographs_config: ConfigDict, photographs_of: Callable[[dict[int, bytes]], str]
):
    photographs_config.data.data_dir = photographs_of({3: b"no image"})
    photographs_config.data.augment.random_resized_crop = False
    photographs_config.data.placement = "memory"
    for call in (data.train_input, data.eval_input):
        with pytest.raises(ValueError, match="of example 3 of split .* is corrupt"):
            call(photographs_config)


def test_an_image_for_prediction_is_cut_as_in_evaluation(photographs_config: ConfigDict, digits_config: ConfigDict):
    image = np.random.RandomState(0).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    cut = data.preprocess_image(photographs_config, image)
    assert cut.shape == (16, 16, 3) and cut.dtype == np.uint8
    assert np.array_equal(cut, data.preprocess_image(photographs_config, image, data.info(photographs_config)))
    assert data.preprocess_image(digits_config, image[..., :1]).shape == (8, 8, 1)
    right = image[:8, :8, :1]
    assert np.array_equal(data.preprocess_image(digits_config, right), right)
    with pytest.raises(ValueError, match=r"shape \(40, 60, 3\): it must be \(height, width, 1\)"):
        data.preprocess_image(digits_config, image)
    with pytest.raises(ValueError, match="the image is float32, not uint8"):
        data.preprocess_image(photographs_config, image.astype(np.float32))
