"""What is kept, what can be restored and where, and what damage does."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tracemalloc  # noqa: F401  pytest imports it in the test that has no file left to open
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aaconv import checkpoints, parallel

# Orbax awaits one of the reads that fail; asyncio may report the others from its own threads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_items(seed: int, devices: int = 8, classes: int = 3) -> dict:
    rng = np.random.default_rng(seed)
    sharding = parallel.replicated(parallel.make_mesh(devices))
    return jax.device_put(
        {
            "model": {
                "params": {"fc": {"kernel": rng.normal(size=(50, classes)).astype(np.float32)}},
                "batch_stats": {},
            },
            "training": {"step": np.int32(seed), "opt_state": (rng.normal(size=5).astype(np.float32), {})},
        },
        sharding,
    )


def abstract(items: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)


def save(workdir: Path, steps, values=(), **settings) -> list[int]:
    with checkpoints.Checkpoints(workdir, **settings) as saver:
        for i, step in enumerate(steps):
            if i < len(values):
                saver.record(step, {"eval/accuracy": values[i], "eval/loss": values[i]})
            saver.save(step, make_items(step), {"data": {"batches": step}})
    with checkpoints.Checkpoints(workdir, read_only=True) as saver:
        return saver.steps()


def assert_same(items: dict, other: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, items, other)


def test_what_is_saved_comes_back_on_one_device(tmp_path):
    save(tmp_path, [7])
    wanted = abstract(make_items(0, devices=1))
    with checkpoints.Checkpoints(tmp_path, read_only=True) as saver:
        found = saver.restore(wanted)
    assert found is not None
    step, items, meta = found
    assert step == 7
    assert meta["data"] == {"batches": 7}
    assert meta["versions"]["jax"] == jax.__version__
    assert_same(items, make_items(7))
    assert {x.sharding for x in jax.tree.leaves(items)} == {wanted["training"]["step"].sharding}


@pytest.mark.parametrize("axis", [0, 1])
def test_how_an_array_is_sharded_does_not_matter(tmp_path, axis):
    """Saved split over eight devices, restored whole and split otherwise, with the checksums of the whole."""
    mesh = parallel.make_mesh(8)
    whole = jax.random.normal(jax.random.key(0), (16, 8))
    items = {"model": {"w": whole}, "training": {"n": np.zeros((), np.int32)}}
    items = jax.device_put(items, parallel.replicated(mesh))
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    sharded = {**items, "model": {"w": jax.device_put(whole, split)}}
    for name, tree in (("whole", items), ("sharded", sharded)):
        with checkpoints.Checkpoints(tmp_path / name) as saver:
            saver.save(1, tree, {})
    sums = []
    for name in ("whole", "sharded"):
        with checkpoints.Checkpoints(tmp_path / name, read_only=True) as saver:
            for wanted in (items, sharded):
                found = saver.restore(abstract(wanted))
                assert found is not None
                assert_same(found[1], items)
                assert found[1]["model"]["w"].sharding == wanted["model"]["w"].sharding
            sums.append(saver.meta(1)["crc32"])
    assert sums[0] == sums[1]
    assert sums[0]["model"]["w"] == zlib.crc32(np.asarray(whole).tobytes())


def test_one_of_the_trees_is_enough(tmp_path):
    save(tmp_path, [7])
    with checkpoints.Checkpoints(tmp_path, read_only=True) as saver:
        found = saver.restore({"model": abstract(make_items(0))["model"]})
    assert found is not None
    assert_same(found[1], {"model": make_items(7)["model"]})


def test_the_last_and_the_best_are_kept(tmp_path):
    values = [0.1, 0.9, 0.3, 0.4, 0.2]
    assert save(tmp_path, [1, 2, 3, 4, 5], values, keep_last=2, best_metric="eval/accuracy") == [2, 4, 5]


def test_the_best_loss_is_the_lowest(tmp_path):
    values = [0.7, 0.9, 0.3, 0.4, 0.5]
    assert save(tmp_path, [1, 2, 3, 4, 5], values, keep_last=1, best_metric="eval/loss") == [3, 5]


def test_only_the_last_without_a_metric(tmp_path):
    assert save(tmp_path, [1, 2, 3], [0.9, 0.1, 0.2], keep_last=1) == [3]


def test_best_is_known_again_after_a_restart(tmp_path):
    save(tmp_path, [1, 2], [0.9, 0.1], keep_last=1, best_metric="eval/accuracy")
    with checkpoints.Checkpoints(tmp_path, keep_last=1, best_metric="eval/accuracy") as saver:
        saver.record(1, {"eval/accuracy": 0.9})
        saver.record(2, {"eval/accuracy": 0.1})
        saver.record(3, {"eval/accuracy": 0.5})
        assert saver.best_step() == 1
        assert not saver.improves(3)
        saver.save(3, make_items(3), {"data": {}})
    with checkpoints.Checkpoints(tmp_path, read_only=True) as saver:
        assert saver.steps() == [1, 3]


def test_saving_goes_on_while_the_buffers_are_used_again(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    sharding = parallel.replicated(parallel.make_mesh())
    items = jax.device_put({"model": {"w": np.zeros(300_000, np.float32)}, "training": {"n": 0}}, sharding)
    with checkpoints.Checkpoints(tmp_path, keep_last=3) as saver:
        for i in range(1, 10):
            items = step(items)
            if i % 3 == 0:
                saver.save(i, items, {})
        for i in (3, 6, 9):
            found = saver.restore(abstract(items), step=i)
            assert found is not None
            np.testing.assert_array_equal(found[1]["model"]["w"], i)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.slow  # a restore for each file, one to three minutes a kind of damage
@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip])
def test_any_damaged_file_of_the_newest(tmp_path, damage):
    """The values restored are either the newest's or those of the one before, with a note."""
    save(tmp_path / "whole", [1, 2])
    folder = tmp_path / "whole" / "checkpoints" / "2"
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    older = 0
    for file in files:
        workdir = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", workdir)
        damage(workdir / "checkpoints" / "2" / file)
        notes = []
        with checkpoints.Checkpoints(workdir) as saver:
            found = saver.restore(abstract(make_items(0)), note=notes.append)
            assert found is not None
            step, items, meta = found
            assert_same(items, make_items(step))
            assert meta["data"] == {"batches": step}
            if step == 1:
                older += 1
                (note,) = notes
                assert f"{workdir / 'checkpoints' / '2'} cannot be read" in note
                assert f"using {workdir / 'checkpoints' / '1'} instead" in note
                # Out of the way: the step can be saved again, and nothing was deleted.
                assert len(list((workdir / "damaged_checkpoints").iterdir())) == 1
                saver.save(2, make_items(2), {"data": {"batches": 2}})
                saver.wait()
                assert saver.steps() == [1, 2]
            else:
                assert not notes
        shutil.rmtree(workdir)
    assert older >= 4


def test_reading_leaves_a_damaged_checkpoint_where_it_is(tmp_path):
    save(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "model")
    before = sorted(tmp_path.rglob("*"))
    notes = []
    with checkpoints.Checkpoints(tmp_path, read_only=True) as saver:
        found = saver.restore(abstract(make_items(0)), note=notes.append)
    assert found is not None
    assert found[0] == 1
    assert len(notes) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_that_cannot_be_moved_is_named(tmp_path):
    save(tmp_path, [1, 2])
    assert checkpoints.finished_steps(tmp_path) == [1, 2]
    for file in (tmp_path / "checkpoints/2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (tmp_path / "damaged_checkpoints").write_text("in the way")
    with checkpoints.Checkpoints(tmp_path) as saver:
        with pytest.raises(
            ValueError, match=r"checkpoints/2 cannot be read, and process 0 cannot move it to .*File exists"
        ):
            saver.restore(abstract(make_items(0)))


def test_too_many_open_files_are_no_damage(tmp_path):
    save(tmp_path, [1, 2])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with checkpoints.Checkpoints(tmp_path) as saver:
        wanted = abstract(make_items(0))
        with open(os.devnull) as lowest_free:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free.fileno(), limits[1]))
        try:
            with pytest.raises((OSError, ValueError), match="Too many open files"):
                saver.restore(wanted)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        found = saver.restore(wanted)
    assert found is not None
    assert found[0] == 2
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_half_written_is_not_taken_for_a_checkpoint(tmp_path):
    save(tmp_path, [1])
    home = tmp_path / "checkpoints"
    shutil.copytree(home / "1", home / "2.orbax-checkpoint-tmp-123")
    (home / "3").mkdir()
    notes = []
    with checkpoints.Checkpoints(tmp_path) as saver:
        found = saver.restore(abstract(make_items(0)), note=notes.append)
    assert found is not None
    assert found[0] == 1
    assert [str(home / "3") in note for note in notes] == [True]


def test_all_damaged(tmp_path):
    save(tmp_path, [1, 2])
    for step in "12":
        truncate(tmp_path / "checkpoints" / step / "meta" / "metadata")
    with checkpoints.Checkpoints(tmp_path) as saver:
        with pytest.raises(ValueError, match="none of the 2 checkpoints can be read.*new workdir"):
            saver.restore(abstract(make_items(0)))
        assert saver.steps() == [1, 2]


def test_none_there(tmp_path):
    with checkpoints.Checkpoints(tmp_path, read_only=True) as saver:
        assert saver.steps() == []
        assert saver.restore(abstract(make_items(0))) is None
    assert list(tmp_path.iterdir()) == []


def test_another_tree_is_a_difference_not_damage(tmp_path):
    save(tmp_path, [1, 2])
    wanted = make_items(0, classes=4)
    wanted["model"]["params"]["norm"] = {"scale": wanted["model"]["params"]["fc"]["kernel"][0]}
    with checkpoints.Checkpoints(tmp_path) as saver, pytest.raises(ValueError) as error:
        saver.restore(abstract(wanted), explain=lambda meta: f"\nsaved with {meta['data']}")
    assert str(error.value).splitlines()[1:] == [
        "  - params/fc/kernel float32(50, 3)",
        "  + params/fc/kernel float32(50, 4)",
        "  + params/norm/scale float32(4)",
        "saved with {'batches': 2}",
    ]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run' cannot be written .*: name a folder"):
        checkpoints.check_writable(tmp_path / "file" / "run")
    assert checkpoints.check_writable(tmp_path / "a" / "b").is_dir()


def test_one_run_at_a_time(tmp_path):
    with checkpoints.lock(tmp_path):
        with pytest.raises(ValueError, match="another process is training in"), checkpoints.lock(tmp_path):
            pass
    with checkpoints.lock(tmp_path):
        pass


ASKED_TO_STOP = """
import os, signal, socket, sys, time
import jax
from jax.experimental import multihost_utils
from aaconv import checkpoints

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = "127.0.0.1:%d" % free.getsockname()[1]
jax.distributed.initialize(coordinator, 1, 0, cluster_detection_method="deactivate")
with checkpoints.Checkpoints(sys.argv[1]) as saver:
    assert not multihost_utils.reached_preemption_sync_point(1)
    items = {"model": {"a": jax.numpy.ones(2)}, "training": {"step": jax.numpy.int32(0)}}
    saver.save(1000, items, {})
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)  # jax looks for the signal once a second
    for step in range(2, 50):
        if multihost_utils.reached_preemption_sync_point(step):
            print("stopped at", step)
            break
        time.sleep(0.1)
"""


def test_sigterm_after_a_save_stops_training_of_several_processes(tmp_path):
    """jax asks them all, here one, by numbers that a save must not disturb."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED_TO_STOP, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("stopped at "), done.stdout + done.stderr
