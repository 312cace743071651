"""What is measured, where it is written, and how progress is shown.

`Totals` are sums on the device; `Log` writes rows to ``metrics.jsonl`` (and TensorBoard
when tensorboardX is installed); `progress` shows a bar on a terminal and lines elsewhere.
Metric names are ``group/name``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from aaconv import workdirs

REWRITE_SECONDS = 30.0


class Totals(flax.struct.PyTreeNode):
    """Sums over examples, added up on the device and fetched rarely.

    Attributes:
      loss: sum of the loss.
      top1: examples whose label has the highest logit.
      top5: examples whose label is among the five highest.
      count: examples.
    """

    loss: Array
    top1: Array
    top5: Array
    count: Array

    @classmethod
    def zeros(cls) -> Totals:
        """Returns the totals of no examples."""
        # One array each: a state is donated, and a buffer cannot be donated twice.
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(4)))

    def __add__(self, other: Totals) -> Totals:
        return jax.tree.map(jnp.add, self, other)

    def means(self, group: str) -> dict[str, float]:
        """Returns ``{group/loss, group/accuracy, group/top5}``; blocks until they are there."""
        fetched = jax.device_get(self)
        count = float(fetched.count)
        names = {"loss": fetched.loss, "accuracy": fetched.top1, "top5": fetched.top5}
        return {f"{group}/{name}": float(x) / count if count else math.nan for name, x in names.items()}


def soft_labels(labels: Array, num_classes: int, smoothing: float = 0.0) -> Array:
    """Returns float32 target distributions ``(1 - s) one_hot + s / num_classes``.

    Args:
      labels: integers `(*b,)`.
      num_classes: k.
      smoothing: s, in [0, 1].

    Returns:
      `(*b, k)`.
    """
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return hot * (1 - smoothing) + smoothing / num_classes if smoothing else hot


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Returns ``-sum(targets log_softmax(logits))`` in float32, `(*b,)` for `(*b, k)`."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def totals(logits: Array, targets: Array, losses: Array, mask: Array | None = None) -> Totals:
    """Sums a batch.

    An example counts as right when the class of its largest target is ranked first (among
    the first five) by the logits; equal logits rank in the order of their classes. With
    fewer than six classes the five highest are all of them. A logit that is not finite is
    never right.

    Args:
      logits: `(*b, k)`.
      targets: distributions `(*b, k)`, as of `soft_labels`, possibly mixed.
      losses: `(*b,)`.
      mask: bool `(*b,)`; False where an example is padding.
    """
    label = jnp.argmax(targets, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, label, axis=-1)
    classes = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    before = (logits > own) | ((logits == own) & (classes < label))
    rank = jnp.sum(before, axis=-1)
    weight = jnp.ones(losses.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    right = weight * jnp.all(jnp.isfinite(logits), axis=-1)
    # where, not a product: a padding example's loss may be nan.
    losses = jnp.where(weight > 0, losses, 0.0)
    return Totals(
        loss=jnp.sum(losses.astype(jnp.float32)),
        top1=jnp.sum(right * (rank < 1)),
        top5=jnp.sum(right * (rank < 5)),
        count=jnp.sum(weight),
    )


# Writers


class Log:
    """Rows of metrics in a workdir: ``metrics.jsonl``, one JSON object a line.

    Every row has ``step`` (completed updates). A value that is not finite is written as null.
    Only process 0 writes; elsewhere every method does nothing.

    Nothing can be appended to an object in a bucket, so there the whole file is written anew: every `REWRITE_SECONDS`
    at most, and at `flush`.

    Args:
      workdir: an existing folder, or one in a bucket, where no TensorBoard events are written.
      resume_step: rows after this step are dropped, so that a resumed run's file reads like
        an uninterrupted one's; likewise a last line that was cut off.
      tensorboard: also write TensorBoard events to ``workdir/tensorboard`` if tensorboardX is
        installed.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int = 0, tensorboard: bool = True) -> None:
        self._file: IO[str] | None = None
        self._at = 0.0
        self._board: _Board | None = None
        self._rewritten: Path | None = None
        folder = workdirs.path(workdir)
        path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(workdir) if row["step"] <= resume_step]
        if jax.process_index() != 0:
            return
        self._write_all(path)
        if workdirs.in_bucket(path):
            self._rewritten = path
            return
        self._file = path.open("a")
        if tensorboard:
            self._board = _tensorboard(folder / "tensorboard", resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row and flushes it: what is logged survives a kill, in a bucket what was written by then."""
        row = {"step": step, **values}
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_dump(row))
            self._file.flush()
        elif time.monotonic() - self._at > REWRITE_SECONDS:
            self.flush()
        if self._board is not None:
            self._board.write(step, values)

    def flush(self) -> None:
        """Writes what is not written yet; due before a checkpoint, from which a resumed run goes on with these rows."""
        if self._rewritten is not None:
            self._write_all(self._rewritten)

    def _write_all(self, path: Path) -> None:
        workdirs.write_text(path, "".join(_dump(row) for row in self.rows))
        self._at = time.monotonic()

    def close(self) -> None:
        """Closes the files; harmless when called again."""
        self.flush()
        self._rewritten = None
        file, self._file, board, self._board = self._file, None, self._board, None
        if board is not None:
            board.close()
        if file is not None:
            file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_rows(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the rows of ``workdir/metrics.jsonl``; an incomplete line is left out.

    null, which stands for a value that is not finite, is read as nan.
    """
    path = workdirs.path(workdir) / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _dump(row: Mapping[str, Any]) -> str:
    # JSON has no nan: many readers refuse a file with one.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


def _tensorboard(folder: Path, resume_step: int) -> _Board | None:
    try:
        return _Board(folder, resume_step)
    except ImportError:
        return None


class _Board:
    """TensorBoard events. Not tensorboardX's own writer, whose thread dies on a full disk, and the run with it."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2

        proto: Any = event_pb2  # whose classes are made at run time
        self._event, self._scalar = proto.Event, summary.scalar
        folder.mkdir(exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = record_writer.RecordWriter(str(path))
        self._add(file_version="brain.Event:2")
        if resume_step:
            # Hides what an interrupted run wrote after the step that is resumed.
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._add(step=resume_step + 1, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step=step, summary=self._scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # What cannot be written now was reported when it was logged.
            self._file.close()

    def _add(self, **values: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **values).SerializeToString())


# TensorBoard's view of hyperparameters


HPARAMS = "events.out.tfevents.0.hparams"  # the first by name, where TensorBoard begins


def write_hparams_of_all(
    folder: Path, values: Mapping[str, Sequence[Any]], names: Sequence[str], *, within: str = ""
) -> None:
    """Tells TensorBoard what runs below a folder differ in, and by what they are compared.

    Args:
      folder: above those of the runs.
      values: that each hyperparameter has, all numbers, all bools or all strings.
      names: of metrics.
      within: folder of a run's own events, in that of the run.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    from tensorboardX.proto import api_pb2, plugin_hparams_pb2

    api: Any = api_pb2  # whose classes are made at run time
    plugin: Any = plugin_hparams_pb2
    infos = []
    for name, several in values.items():
        kind = {bool: "BOOL", str: "STRING"}.get(type(several[0]), "FLOAT64")
        info = api.HParamInfo(name=name, type=api.DataType.Value(f"DATA_TYPE_{kind}"))
        info.domain_discrete.extend(several)
        infos.append(info)
    compared = [api.MetricInfo(name=api.MetricName(tag=name, group=within), display_name=name) for name in names]
    experiment = api.Experiment(hparam_infos=infos, metric_infos=compared)
    _write_hparams(folder, {"experiment": plugin.HParamsPluginData(experiment=experiment)})


def write_hparams(
    folder: Path, values: Mapping[str, Any], *, name: str, started: float, ended: float | None, failed: bool
) -> None:
    """Tells TensorBoard a run's hyperparameters.

    Args:
      folder: of the run.
      values: numbers, bools and strings by name.
      name: of the run.
      started: in seconds of `time.time`.
      ended: likewise; None while it runs.
      failed: whether it ended without a result.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    from tensorboardX.proto import api_pb2, plugin_hparams_pb2

    api: Any = api_pb2
    plugin: Any = plugin_hparams_pb2
    start = plugin.SessionStartInfo(group_name=name, start_time_secs=started)
    for key, value in values.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[key], field, value)
    found = {"session_start_info": plugin.HParamsPluginData(session_start_info=start)}
    if ended is not None:
        status = api.Status.Value("STATUS_FAILURE" if failed else "STATUS_SUCCESS")
        end = plugin.SessionEndInfo(status=status, end_time_secs=ended)
        found["session_end_info"] = plugin.HParamsPluginData(session_end_info=end)
    _write_hparams(folder, found)


def _write_hparams(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes a file of events that takes the place of an earlier one."""
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    event: Any = event_pb2
    summary: Any = summary_pb2
    # Without "tfevents" in its name, so that TensorBoard does not read it half-written.
    beside = folder / f".hparams.{os.getpid()}"
    file = record_writer.RecordWriter(str(beside))
    file.write(event.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    for tag, content in found.items():
        data = summary.SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString())
        value = summary.Summary.Value(tag=f"_hparams_/{tag}", metadata=summary.SummaryMetadata(plugin_data=data))
        whole = event.Event(wall_time=time.time(), summary=summary.Summary(value=[value]))
        file.write(whole.SerializeToString())
    file.close()
    beside.replace(folder / HPARAMS)


# Progress


class Progress:
    """Shows a run's progress; this one shows nothing.

    Called as ``start``, then ``update`` every step, ``show`` at each log step, ``note`` for
    lines of text, ``stop``.
    """

    def start(self, step: int, total_steps: int) -> None:
        """Begins at `step` completed updates of `total_steps`."""

    def update(self, step: int) -> None:
        """`step` updates are on their way; must be cheap."""

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """New values, of `Log` rows."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def stop(self) -> None:
        """Ends the display."""


class Lines(Progress):
    """Plain lines, for files and logs.

    Args:
      stream: where to; standard error by default.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream
        self._total = 0
        self._began: tuple[int, float] | None = None

    def start(self, step: int, total_steps: int) -> None:
        self._total = total_steps

    def update(self, step: int) -> None:
        if self._began is None:  # Not from `start`: compiling the first step is over now.
            self._began = (step, time.monotonic())

    def show(self, step: int, values: Mapping[str, float]) -> None:
        line = f"step {step}/{self._total}  {_format(values)}"
        if "train/loss" in values and self._began is not None and step > self._began[0]:
            first, began = self._began
            left = (time.monotonic() - began) / (step - first) * (self._total - step)
            line += f"  {duration(left)} left"
        self.note(line)

    def note(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)


class Bar(Progress):
    """A bar on a terminal, with loss, accuracy, images a second and time left; evaluations above it.

    Args:
      stream: the terminal; standard error by default.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        import rich.console
        import rich.progress as rp

        console = rich.console.Console(file=stream or sys.stderr)
        columns = (
            rp.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            rp.BarColumn(bar_width=None),
            rp.TextColumn("{task.fields[train]}"),
            rp.TimeRemainingColumn(compact=True),
        )
        self._bar = rp.Progress(*columns, console=console, refresh_per_second=4, expand=True)
        self._task: Any = None

    def start(self, step: int, total_steps: int) -> None:
        shown = "compiling" if step < total_steps else ""
        self._task = self._bar.add_task("", total=total_steps, completed=step, train=shown)
        self._bar.start()

    def update(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        if self._bar.tasks[0].fields["train"] == "compiling":
            self._bar.update(self._task, train="")

    def show(self, step: int, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._bar.update(self._task, completed=step, train=_format(values))
        else:
            self.note(f"epoch {values['epoch']:g}  {_format(values)}" if "epoch" in values else _format(values))

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


def progress(stream: IO[str] | None = None) -> Progress:
    """Returns a `Bar` when `stream`, standard error by default, is a terminal, else `Lines`.

    Processes above 0 show nothing.
    """
    if jax.process_index() != 0:
        return Progress()
    return Bar(stream) if (stream or sys.stderr).isatty() else Lines(stream)


def _format(values: Mapping[str, float]) -> str:
    forms = {
        "train/loss": "loss {:.4f}",
        "train/accuracy": "accuracy {:.1%}",
        "perf/images_per_sec": "{:,.0f} images/s",
        "perf/mfu": "{:.1%} MFU",
        "perf/input_wait_share": "{:.0%} input wait",
        "eval/loss": "eval loss {:.4f}",
        "eval/accuracy": "eval accuracy {:.2%}",
        "eval/top5": "top-5 {:.2%}",
        "perf/evaluation_seconds": "in {:.1f} s",
    }
    return "  ".join(form.format(values[name]) for name, form in forms.items() if name in values)


def higher_is_better(metric: str) -> bool:
    """Whether a metric ranks from above; losses, times, shares of time that are lost, and norms of gradients do not.

    Example:
      >>> higher_is_better("perf/images_per_sec"), higher_is_better("perf/evaluation_seconds")
      (True, False)
    """
    return not metric.endswith(("loss", "_seconds", "_share", "grad_norm"))


def duration(seconds: float) -> str:
    """Returns ``M:SS`` or ``H:MM:SS``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
