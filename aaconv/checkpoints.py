"""Checkpoints: what is kept, how it is saved and how it is restored. The only place that knows orbax.

A checkpoint of step s holds two trees of arrays, ``model`` (what evaluation needs) and
``training`` (what continuing needs besides), and ``meta``, a JSON object. Saving is
asynchronous: the arrays are copied before `Checkpoints.save` returns, the files are written
behind the next steps, and a checkpoint appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib.metadata
import logging
import math
import os
import platform
import sys
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from aaconv import workdirs

ITEMS = ("model", "training")
_T = TypeVar("_T")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYSTEM = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # jax remembers the last number it was asked with, and has several processes stop at the next one. Training asks
        # by a count of its own; with Orbax's `step` in between, SIGTERM during a save was never heeded (0.12.8).
        return False


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for the last save.

    Args:
      workdir: the run's folder; they lie in ``checkpoints/`` there, one folder a step.
      keep_last: how many of the newest are kept.
      best_metric: name of the metric by which the best is kept as well; "" for none. Lower is
        better for a name that ends in ``loss``, higher for others.
      read_only: nothing is written, moved or cleaned up.
      on_failed_write: gets the error when writing behind the steps fails, in the thread that
        writes. `save` and `wait` raise it too; with several processes only after minutes of
        waiting for each other.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        best_metric: str = "",
        read_only: bool = False,
        on_failed_write: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._folder = workdirs.path(workdir) / "checkpoints"
        self._best_metric = best_metric
        self._values: dict[int, float] = {}
        self._read_only = read_only
        self._quiet = contextlib.ExitStack()
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._quiet.enter_context(_quiet_threads(on_failed_write))
        # Not orbax's own read_only, which warns that it does what it was asked to.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(keep_last, self.best_step),
            create=False,
            cleanup_tmp_directories=not read_only,
            save_root_metadata=False,
            # Metrics lie in our own meta: a damaged checkpoint must not stop the listing.
            lightweight_initialize=True,
        )
        # In a bucket there is no folder before something is in it.
        there = not read_only or self._folder.is_dir()
        self._manager = _Manager(self._folder, options=options) if there else None

    def steps(self) -> list[int]:
        """Returns the steps there are, ascending; a damaged one may be among them."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells the metrics of the model after `step` updates, before or after its `save`."""
        value = metrics.get(self._best_metric)
        if value is not None and not math.isnan(value):
            self._values[step] = -value if self._best_metric.endswith("loss") else value

    def best_step(self, among: Sequence[int] | None = None) -> int | None:
        """Returns the step with the best recorded metric, the newest of equals; None without any."""
        known = [step for step in (self.steps() if among is None else among) if step in self._values]
        return max(known, key=lambda step: (self._values[step], step), default=None)

    def improves(self, step: int) -> bool:
        """Whether the metric recorded for `step` is above that of every checkpoint there is."""
        others = [self._values[s] for s in self.steps() if s in self._values and s != step]
        return step in self._values and self._values[step] > max(others, default=-math.inf)

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied. A step that is there is left alone.

        Args:
          step: completed updates.
          items: the trees of arrays by name, all of `ITEMS`.
          meta: JSON-able; ``step``, ``tree``, ``crc32`` and ``versions`` are added.
        """
        assert self._manager is not None and not self._read_only
        if step in self.steps():
            return
        tree = {name: describe_tree(items[name]) for name in ITEMS}
        sums = {name: _checksums(items[name]) for name in ITEMS}
        meta = {**meta, "step": step, "tree": tree, "crc32": sums, "versions": versions()}
        arrays = {name: ocp.args.StandardSave(items[name]) for name in ITEMS}
        self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)), force=True)

    def wait(self) -> None:
        """Blocks until what was saved is on disk, and raises what went wrong while writing."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def restore(
        self,
        abstract: Mapping[str, Any],
        *,
        step: int | None = None,
        explain: Callable[[Mapping[str, Any]], str] = lambda meta: "",
        note: Callable[[str], None] = lambda text: None,
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read, onto the devices asked for.

        The devices need not be those it was saved from. One that is truncated or half-written
        is passed over, with a note that names it and the one used instead; when not read-only
        it is also moved to ``damaged_checkpoints/``, out of the way of the step's next save. An
        error of the system (permissions, open files, memory) is no damage and is raised.

        Args:
          abstract: trees of `jax.ShapeDtypeStruct` with shardings, for some of `ITEMS`.
          step: starts looking there, going backwards; the newest by default.
          explain: gets the ``meta`` of a checkpoint whose trees differ from `abstract`; what
            it returns is appended to the error.
          note: gets a line for each checkpoint passed over.

        Returns:
          The step, the trees, the meta; None when there is no checkpoint at all.

        Raises:
          ValueError: the trees differ, with the differences listed, or no checkpoint there is
            can be read.
        """
        candidates = [s for s in reversed(self.steps()) if step is None or s <= step]
        damaged: dict[int, str] = {}
        for candidate in candidates:
            try:
                meta = _read_twice(lambda step=candidate: self._read_meta(step, abstract))
            except _Damaged as error:  # The one before is tried.
                damaged[candidate] = str(error)
                continue
            difference = compare_trees(meta["tree"], {name: describe_tree(tree) for name, tree in abstract.items()})
            if difference:
                raise ValueError(
                    f"checkpoint {self._folder / str(candidate)} does not fit this config's model "
                    f"(- saved, + wanted):\n{difference}{explain(meta)}"
                )
            try:
                items = _read_twice(lambda step=candidate: self._read(step, abstract))
                # Only now, when all have read: the sums of sharded arrays gather them from all processes.
                _read_twice(lambda items=items, sums=meta["crc32"]: _check_sums(items, sums))
            except _Damaged as error:
                damaged[candidate] = str(error)
                continue
            for broken, reason in damaged.items():
                note(
                    f"warning: checkpoint {self._folder / str(broken)} cannot be read ({reason}); "
                    f"using {self._folder / str(candidate)} instead{self._set_aside(broken)}"
                )
            return candidate, items, meta
        if damaged:
            listed = "\n".join(f"  {self._folder / str(s)}: {reason}" for s, reason in damaged.items())
            raise ValueError(
                f"none of the {len(damaged)} checkpoints can be read; restore one from a copy, or train in a "
                f"new workdir:\n{listed}"
            )
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the JSON object saved with `step`."""
        assert self._manager is not None
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Waits for the last save and lets go; harmless when called again."""
        manager, self._manager = self._manager, None
        with self._quiet:
            if manager is not None:
                manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_meta(self, step: int, names: Iterable[str]) -> dict[str, Any]:
        meta = self.meta(step)
        missing = [name for name in names if name not in meta["tree"] or name not in meta["crc32"]]
        if missing:
            raise ValueError(f"its meta does not describe {', '.join(missing)}")
        return meta

    def _read(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        assert self._manager is not None
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: restored[name] for name in abstract}

    def _set_aside(self, step: int) -> str:
        if self._read_only:
            return ""
        assert self._manager is not None
        home, broken = self._folder.parent / "damaged_checkpoints", self._folder / str(step)
        failed: Exception | None = None
        if jax.process_index() == 0:
            try:
                workdirs.move_into(broken, home)
            except Exception as error:  # A bucket's libraries raise errors of their own.
                failed = error
        # All wait here: they must see the same steps, or they would not save the same ones.
        if np.any(multihost_utils.process_allgather(np.bool_(failed is not None))):
            reason = f" ({_first_line(failed)})" if failed else ""
            raise ValueError(
                f"checkpoint {broken} cannot be read, and process 0 cannot move it to {home}{reason}: move or delete "
                "it yourself, and run the same command again"
            ) from failed
        self._manager.reload()
        return f"; it was moved to {home}"


class _LastAndBest:
    """Keeps the last n and the best: orbax's own policies do not see metrics told after the save."""

    def __init__(self, keep_last: int, best: Callable[[Sequence[int]], int | None]) -> None:
        self._keep_last = keep_last
        self._best = best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = {*sorted(steps)[-self._keep_last :], self._best(steps)}
        return [step in keep for step in steps]


def check_writable(workdir: str | os.PathLike[str]) -> Path:
    """Makes `workdir` if need be and checks that files can be made in it.

    Returns:
      Its absolute path.

    Raises:
      ValueError: it cannot be made or written.
    """
    path = workdirs.path(workdir)
    if workdirs.in_bucket(path):
        return _check_bucket(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"workdir {str(path)!r} cannot be written ({error.strerror or error}): "
            "name a folder that this user may write, on a disk with space"
        ) from error
    return path


def finished_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Returns the steps whose checkpoints are whole, ascending; unlike `Checkpoints`, without the other processes."""
    found = [path for path in (workdirs.path(workdir) / "checkpoints").glob("*") if path.name.isdecimal()]
    if workdirs.in_bucket(workdir):
        # Nothing is renamed there when it is whole: orbax writes this file last.
        found = [path for path in found if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in found)


def _check_bucket(path: Path) -> Path:
    probe = path / f".writable-{uuid.uuid4().hex}"
    try:
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # Its libraries raise errors of their own.
        raise ValueError(
            f"workdir {str(path)!r} cannot be written ({_first_line(error)}): name a bucket that this account may "
            "write, and outside of Google's cloud log in with `gcloud auth application-default login`"
        ) from error
    return path


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds `workdir` against a second run in it, which would clean up this one's half-written files.

    Ends with the process, however that ends. A bucket has no such lock: there, nothing keeps a second run out.

    Raises:
      ValueError: another process holds it.
    """
    if jax.process_index() != 0 or workdirs.in_bucket(workdir):
        yield
        return
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {workdir}: wait for it, stop it, or name another --workdir"
            ) from error
        except OSError:
            pass  # Some network file systems have no locks.
        yield


def describe_tree(tree: Any) -> dict[str, str]:
    """Returns ``{path: "dtype(shape)"}`` of a tree of arrays, e.g. ``{"params/fc/bias": "float32(10)"}``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{x.dtype}({', '.join(map(str, x.shape))})" for path, x in leaves}


def compare_trees(saved: Mapping[str, Mapping[str, str]], wanted: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the differences of two `describe_tree` by item, a line each, or ""."""
    lines = []
    for name in wanted:
        for path in sorted(saved[name].keys() | wanted[name].keys()):
            old, new = saved[name].get(path), wanted[name].get(path)
            if old != new:
                lines += [f"  - {path} {old}"] if old else []
                lines += [f"  + {path} {new}"] if new else []
    if len(lines) > 40:
        lines = [*lines[:40], f"  ... and {len(lines) - 40} more"]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("aaconv", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _checksums(tree: Any) -> dict[str, int]:
    # Short arrays of noise do not compress, are stored as they are, and a flipped bit in them would go unseen.
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): zlib.crc32(_bytes(x)) for path, x in leaves}


def _bytes(x: jax.Array) -> memoryview:
    if x.is_fully_replicated:
        whole = x.addressable_data(0)
    elif x.is_fully_addressable:
        whole = x
    else:
        # One array at a time: sharded ones may not fit a host together. Every process must come here alike.
        whole = multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(whole).reshape(-1).view(np.uint8).data


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def disk_full(error: BaseException) -> str:
    """Returns the system's words where an error, or one it followed from, is of a full disk, else ""."""
    return _system_reason(error, _DISK_FULL)


def _system_reason(error: BaseException | None, numbers: Sequence[int]) -> str:
    while error is not None:
        for number in numbers:
            # Orbax and tensorstore hand on what the system said as text only.
            if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""


def _check_sums(items: Mapping[str, Any], sums: Mapping[str, Any]) -> None:
    # All of them before the first complaint: sharded arrays are gathered from all processes.
    found = {name: _checksums(tree) for name, tree in items.items()}
    for name, of_tree in found.items():
        for path, value in of_tree.items():
            if value != sums[name][path]:
                raise ValueError(f"the values of {name}/{path} are not those that were saved")


class _Damaged(Exception):
    """A checkpoint cannot be read, and would not be the next time."""


def _read_twice(read: Callable[[], _T]) -> _T:
    """Reads, once more if that failed: an error that passes, as on a network disk, is no damage.

    What failed in one process counts as failed in all, or they would go on with different checkpoints.
    """
    for again in (True, False):
        failed: Exception | None = None
        result: Any = None
        try:
            with _quiet_coroutines():
                result = read()
        except Exception as error:  # A broken file raises anything.
            exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
            if exhausted or isinstance(error, MemoryError) or _system_reason(error, _SYSTEM):
                raise
            failed = error
        if not np.any(multihost_utils.process_allgather(np.bool_(failed is not None))):
            return result
        if not again:
            raise _Damaged(_first_line(failed) if failed else "another process cannot read it") from failed
    raise AssertionError("the loop returns or raises")


@contextlib.contextmanager
def _quiet_threads(on_error: Callable[[BaseException], None]) -> Iterator[None]:
    """Keeps orbax's threads from logging the traceback of an error that `Checkpoints.wait` raises; hands it on."""

    failed, hook = False, sys.unraisablehook

    def unless_late(unraisable: Any) -> None:
        # After a failed write, threads of tensorstore have results for a loop that is closed: a traceback for each.
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    def wanted(record: logging.LogRecord) -> bool:
        nonlocal failed
        of_orbax = record.name == "asyncio" or "/orbax/" in Path(record.pathname).as_posix()
        if record.levelno < logging.ERROR or not of_orbax:
            return True
        failed = True
        if record.name == "absl" and record.exc_info and record.exc_info[1] is not None:
            on_error(record.exc_info[1])
        return False

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(wanted)
    sys.unraisablehook = unless_late
    try:
        yield
    except BaseException:
        failed = True
        raise
    finally:
        if failed:
            gc.collect()  # asyncio logs an error that nobody awaited when its future is deleted
        if sys.unraisablehook is unless_late:
            sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(wanted)


@contextlib.contextmanager
def _quiet_coroutines() -> Iterator[None]:
    # Of the many reads that fail on a damaged file orbax awaits one; Python would print the others' errors.
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except BaseException:
        gc.collect()  # while nobody listens; without an error there is nothing to hide, and this takes 0.1 s
        raise
    finally:
        sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
