"""Training: state, step, loop, and what restores their result. Reads top to bottom.

``step`` is the number of completed updates everywhere. The order within the loop matters:
step, log, evaluate, save, and only then the next batch, so that the data iterator's state
saved with step s is the one that step s + 1 reads from.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from aaconv import checkpoints, hosts, metrics, models, optim, parallel, watch, workdirs
from aaconv.config import ConfigDict, default_config
from aaconv.errors import close_matches
from aaconv.models.summary import summarise
from aaconv.watch import Doing

EVAL_METRICS = ("eval/accuracy", "eval/top5", "eval/loss")


class NonFiniteLossError(FloatingPointError):
    """The loss, a gradient or a weight became nan or infinite; names the steps and the last good checkpoint."""


class Preempted(Exception):
    """A signal asked to stop; the state is saved and the same command continues."""


# State


class Window(flax.struct.PyTreeNode):
    """What is summed since the last logged step; saved with the state so that a resumed run logs the same rows."""

    totals: metrics.Totals
    grad_norm: Array
    steps: Array

    @classmethod
    def empty(cls) -> Window:
        return cls(metrics.Totals.zeros(), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


class TrainState(flax.struct.PyTreeNode):
    """Everything an update reads and writes, on the mesh as `aaconv.parallel.state_sharding` says.

    Attributes:
      step: completed updates, int32.
      params: trained weights, float32.
      batch_stats: batch norm's running statistics.
      opt_state: of the optax chain.
      ema: ``{"params", "batch_stats"}``, their moving averages; ``{}`` when off.
      window: sums since the last logged step.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    window: Window

    def variables(self) -> dict[str, Any]:
        """Returns what evaluation uses: the averages if they are on, else the weights themselves."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}

    def items(self) -> dict[str, Any]:
        """Splits the state into the trees of a checkpoint."""
        return {
            "model": {"params": self.params, "batch_stats": self.batch_stats, "ema": self.ema},
            "training": {"step": self.step, "opt_state": self.opt_state, "window": self.window},
        }

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> TrainState:
        """The inverse of `items`."""
        return cls(**items["model"], **items["training"])


def init_state(key: Array, run: Run) -> TrainState:
    """Returns the state before the first update; call it under jit, with `key` for the weights."""
    variables = run.model.init(key, jnp.zeros((1, *run.info.image_shape), jnp.float32), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    averages = {"params": params, "batch_stats": batch_stats}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=run.optimizer.init(params),
        ema=averages if run.config.optimizer.ema_decay else {},
        window=Window.empty(),
    )


# Steps


def mixup(key: Array, images: Array, targets: Array, alpha: float) -> tuple[Array, Array]:
    """Blends each example with the one at the mirrored place of the batch (Zhang et al. 2018).

    One weight from Beta(alpha, alpha) serves the batch. The order of a batch is random
    already, so its mirror image pairs at random.

    Args:
      key: typed key.
      images: `(b, h, w, c)`.
      targets: distributions `(b, k)`.
      alpha: above 0.
    """
    weight = jax.random.beta(key, alpha, alpha)
    blend = lambda x: weight * x + (1 - weight) * jnp.flip(x, axis=0)
    return blend(images), blend(targets)


def train_step(
    state: TrainState, batch: Mapping[str, Array], resident: Mapping[str, Array], run_key: Array, *, run: Run
) -> tuple[TrainState, Array]:
    """One update on a global batch.

    Args:
      state: donated.
      batch: a global batch of the data's own, for ``prepare``.
      resident: the training set, if it lies on the device, else ``{}``.
      run_key: from `run_key`; not of ``run``, so that runs which differ in their seed share what is compiled.
      run: what does not change.

    Returns:
      The next state, and the batch's mean loss to wait on.
    """
    config = run.config
    # Folding in the step, rather than carrying a key, gives a resumed run the same numbers.
    key = jax.random.fold_in(jax.random.wrap_key_data(run_key), state.step)
    prepare_key, mixup_key, dropout_key = jax.random.split(key, 3)
    prepared = run.prepare_train(batch, prepare_key, resident or None)
    images = prepared["image"]
    targets = metrics.soft_labels(prepared["label"], run.info.num_classes, config.loss.label_smoothing)
    if config.loss.mixup_alpha:
        images, targets = mixup(mixup_key, images, targets, config.loss.mixup_alpha)

    def apply(params: Any, batch_stats: Any, images: Array, key: Array) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        rngs = {"dropout": key}
        logits, updated = run.model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return logits, updated.get("batch_stats", {})

    apply = parallel.by_group(apply, run.mesh)

    def gradient(batch_stats: Any, images: Array, targets: Array, key: Array) -> tuple[Any, Any, Array, Array]:
        def loss_of(params: Any) -> tuple[Array, tuple[Any, Array, Array]]:
            weights = parallel.gather(params, run.mesh, config.mesh.fsdp_min_size)
            logits, updated = apply(weights, batch_stats, parallel.divide_rows(images, run.mesh), key)
            losses = metrics.cross_entropy(logits, targets)
            return jnp.mean(losses), (updated, logits, losses)

        (_, found), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return gradients, *found

    if config.accumulate_steps == 1:
        gradients, batch_stats, logits, losses = gradient(state.batch_stats, images, targets, dropout_key)
    else:
        gradients, batch_stats, logits, losses = accumulate(
            gradient, config.accumulate_steps, state.params, state.batch_stats, images, targets, dropout_key
        )
    params, opt_state, norm = optim.update(run.optimizer, gradients, state.opt_state, state.params)
    step = state.step + 1
    average = state.ema
    if config.optimizer.ema_decay:
        # Batch norm's statistics are averaged with the weights they belong to.
        latest = {"params": params, "batch_stats": batch_stats}
        average = optim.ema(state.ema, latest, step, config.optimizer.ema_decay)
    window = Window(
        totals=state.window.totals + metrics.totals(logits, targets, losses),
        grad_norm=state.window.grad_norm + norm,
        steps=state.window.steps + 1,
    )
    return TrainState(step, params, batch_stats, opt_state, average, window), jnp.mean(losses)


def accumulate(
    gradient: Callable[..., Any], parts: int, params: Any, batch_stats: Any, images: Array, targets: Array, key: Array
) -> tuple[Any, Any, Array, Array]:
    """Works through a batch in parts, one after another, of which only one is in memory.

    The mean of the parts' gradients is the gradient of the whole batch but for rounding, with two exceptions:
    batch norm takes its statistics from each part by itself (and updates the running ones as often), and dropout
    draws anew for each.

    Args:
      gradient: ``(batch_stats, images, targets, key) -> gradients, batch_stats, logits, losses``.
      parts: how many; divides the examples of each device.
      params: the gradients have their shapes.
      batch_stats: before the first part.
      images: ``(b, h, w, c)``.
      targets: ``(b, k)``.
      key: for all parts.

    Returns:
      What ``gradient`` returns, of the whole batch; ``batch_stats`` after the last part.
    """

    def part(carry: Any, xs: Any) -> Any:
        total, batch_stats = carry
        gradients, batch_stats, *found = gradient(batch_stats, *xs)
        return (jax.tree.map(jnp.add, total, gradients), batch_stats), found

    xs = parallel.in_parts(images, parts), parallel.in_parts(targets, parts), jax.random.split(key, parts)
    (total, batch_stats), found = jax.lax.scan(part, (jax.tree.map(jnp.zeros_like, params), batch_stats), xs)
    logits, losses = map(parallel.from_parts, found)
    return jax.tree.map(lambda x: x / parts, total), batch_stats, logits, losses


def eval_step(
    variables: Mapping[str, Any], totals: metrics.Totals, batch: Mapping[str, Array], *, run: Run
) -> metrics.Totals:
    """Adds a batch's loss (without smoothing), top-1 and top-5 to `totals`; padding counts nothing."""
    prepared = run.prepare_eval(batch)
    variables = parallel.gather(variables, run.mesh)
    logits: Any = run.model.apply(variables, parallel.divide_rows(prepared["image"], run.mesh), train=False)
    targets = metrics.soft_labels(prepared["label"], run.info.num_classes)
    return totals + metrics.totals(logits, targets, metrics.cross_entropy(logits, targets), prepared["mask"])


def all_finite(tree: Any) -> Array:
    """Returns whether every floating-point number of `tree` is finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in floats])


# A run: what the config names, built


@dataclasses.dataclass(frozen=True)
class Run:
    """What does not change from step to step.

    Attributes:
      config: locked.
      model: ``apply(variables, images, train=...)`` gives logits.
      data: `aaconv.data`, or something with its ``info``, ``train_input`` and ``eval_input``.
      info: of the data set: ``num_classes``, ``image_shape`` and so on.
      mesh: of `aaconv.parallel.make_mesh`.
      train: the training input; None when only evaluating.
      eval: the evaluation input.
      plan: durations in steps; None when only evaluating.
      optimizer: the optax chain; one without state when only evaluating.
    """

    config: ConfigDict
    model: nn.Module
    data: Any
    info: Any
    mesh: Mesh
    train: Any
    eval: Any
    plan: optim.Plan | None
    optimizer: Any

    def prepare_train(self, batch: Any, key: Array, resident: Any) -> dict[str, Array]:
        return self.train.prepare(batch, key, resident)

    def prepare_eval(self, batch: Any) -> dict[str, Array]:
        return self.eval.prepare(batch)

    def abstract_state(self) -> TrainState:
        """Returns shapes and shardings of the state, computing nothing."""
        shapes = jax.eval_shape(functools.partial(init_state, run=self), jax.random.key(0))
        return parallel.with_sharding(
            shapes, parallel.state_sharding(self.mesh, shapes, self.config.mesh.fsdp_min_size)
        )


def build_model(config: ConfigDict, num_classes: int) -> nn.Module:
    """Builds the config's network: every ``model`` key that is set is an argument of it."""
    overrides = {key: value for key, value in config.model.items() if key != "name" and value is not None}
    return models.create(config.model.name, num_classes=num_classes, dtype=jnp.dtype(config.dtype), **overrides)


def check_best_metric(config: ConfigDict) -> None:
    """Raises a ValueError where ``checkpoint.best_metric`` is neither "" nor one that an evaluation gives."""
    best = config.checkpoint.best_metric
    if best and best not in EVAL_METRICS:
        near = close_matches(best, EVAL_METRICS) or ";"
        raise ValueError(
            f"checkpoint.best_metric={best!r} is not one of {', '.join(EVAL_METRICS)}{near} '' keeps only the last"
        )


def build(
    config: ConfigDict, model: nn.Module | None, data: Any, *, training: bool, devices: Sequence[Any] | None = None
) -> Run:
    """Makes all that a run needs from its config.

    Args:
      config: from `aaconv.config.load`.
      model: stands in for the config's.
      data: stands in for `aaconv.data`.
      training: whether for more than evaluation.
      devices: of the mesh, which need not be here; by default all there are.

    Raises:
      ValueError: the config cannot be run; the message names the key.
    """
    if data is None:
        from aaconv import data
    mesh = parallel.configured_mesh(config.mesh, devices) if training else _evaluation_mesh(config)
    parallel.check_batch("eval_batch_size", config.eval_batch_size, mesh)
    check_best_metric(config)
    info = data.info(config)
    parallel.check_rows(info.image_shape[0], mesh)
    # A mesh of devices that are not here is only compiled for.
    share, shares = parallel.input_share(mesh) if devices is None else (0, 1)
    processes = {"process_index": share, "process_count": shares}
    train_input = plan = None
    optimizer = optim.no_optimizer()
    if training:
        parallel.check_batch("batch_size", config.batch_size, mesh, config.accumulate_steps)
        train_input = data.train_input(config, **processes)
        plan = optim.plan(config, train_input.steps_per_epoch)
        optimizer = optim.optimizer(config, plan)
    return Run(
        config=config,
        model=build_model(config, info.num_classes) if model is None else model,
        data=data,
        info=info,
        mesh=mesh,
        train=train_input,
        eval=data.eval_input(config, **processes),
        plan=plan,
        optimizer=optimizer,
    )


def _evaluation_mesh(config: ConfigDict) -> Mesh:
    """The config's mesh, or all devices along the batch where that of a pod does not fit: results are the same."""
    try:
        return parallel.configured_mesh({**config.mesh, "batch_norm_devices": -1})
    except ValueError:
        return parallel.make_mesh()


# The loop


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    data: Any = None,
    progress: metrics.Progress | None = None,
    pause_step: int | None = None,
) -> dict[str, float]:
    """Trains, or continues what `workdir` holds, to the end of the config's run.

    Writes ``config.json``, ``metrics.jsonl``, ``checkpoints/`` and, where tensorboardX is
    installed, ``tensorboard/``; ``profile/`` where the config asks for a trace, and
    ``hang-PROCESS.txt`` where something took too long. A run that was stopped, by whatever
    means, and continued gives the weights and rows of one that never stopped, bit for bit on
    the same devices; what is logged under ``perf/`` is the clock's.

    Args:
      config: from `aaconv.config.load`.
      workdir: made if need be.
      model: a network of one's own in the place of ``config.model``: a Linen module called
        with ``(images, train=...)``.
      data: a source of one's own in the place of `aaconv.data`: an object with its ``info``,
        ``train_input`` and ``eval_input``.
      progress: how it is shown; by default `metrics.progress`.
      pause_step: a step to return at, evaluated and saved, where it comes before the end of the run, which keeps its
        length and its schedule; the next call goes on from there. The same in every process; the row of that
        evaluation is one more than a run has that does not pause.

    Returns:
      The last values of each metric, with ``step`` and ``epoch``.

    Raises:
      ValueError: the config cannot be run, `pause_step` is below 1, or `workdir` holds another run, or it cannot be
        written; nothing in it was changed. Or the disk became full on the way; the run can
        be continued.
      NonFiniteLossError: the loss, a gradient or a weight became nan or infinite.
      Preempted: SIGTERM or SIGINT asked to stop; the state was saved.
      hosts.LostError: another process of the run ended or fell silent.
    """
    if pause_step is not None and pause_step < 1:
        raise ValueError(
            f"pause_step={pause_step} must be at least 1: name a completed step, or None for the whole run"
        )
    workdir = hosts.together(lambda: checkpoints.check_writable(workdir))
    progress = metrics.progress() if progress is None else progress
    run = hosts.together(lambda: build(config, model, data, training=True))
    _check_hosts_alike(config, pause_step=pause_step)
    hosts.check_same_folder(workdir)
    assert run.plan is not None
    plan, total_steps = run.plan, run.plan.total_steps
    end = total_steps if pause_step is None else min(pause_step, total_steps)
    abstract = run.abstract_state()
    with hosts.Watch() as others, _naming_full_disk(workdir), contextlib.ExitStack() as stack:
        # The past of the workdir.
        hosts.together(lambda: stack.enter_context(checkpoints.lock(workdir)))
        _check_same_run(run, workdir, progress.note)
        saver = stack.enter_context(
            checkpoints.Checkpoints(
                workdir,
                keep_last=config.checkpoint.keep_last,
                best_metric=config.checkpoint.best_metric,
                on_failed_write=lambda error: others.cannot_write(_unwritable(workdir, error)),
            )
        )
        found = saver.restore(abstract.items(), explain=functools.partial(_explain, config), note=progress.note)
        signals = stack.enter_context(Signals())
        iterator = iter(run.train)
        stack.callback(getattr(iterator, "close", lambda: None))
        if found is None:
            start, state = 0, fresh_state(run)
        else:
            start, items, meta = found
            state = TrainState.from_items(items)
            iterator.set_state(meta["data"])
            now = _batch_norm_examples(run)
            before = meta.get("batch_norm_examples", now)
            if before != now:
                progress.note(
                    f"warning: {before} examples shared batch norm's statistics, and now {now} do: "
                    "mesh.batch_norm_devices counts devices, and the mesh is another"
                )
        _write_config(config, workdir)
        log = stack.enter_context(metrics.Log(workdir, resume_step=start))
        for row in log.rows:
            saver.record(row["step"], row)
        if start:
            done = " which is its end: the run is complete" if start == total_steps else f" of {total_steps}"
            progress.note(f"continuing {workdir} from step {start}{done}")
        else:
            progress.note(f"training in {workdir}: {optim.describe(plan)}, on {parallel.describe(run.mesh)}")
        summary = summarise(run.model, run.info.image_shape)
        for line in summary.computed_by():
            progress.note(f"attention in {_count(len(summary.attention), 'layer')}, computed by {line}")

        # What watches the run.
        clock = watch.Clock(
            start,
            batch_size=config.batch_size,
            chips=run.mesh.size,
            flops_per_image=summary.training_flops,
            peak_flops=watch.peak_flops(run.mesh.devices.flat[0].device_kind, config.dtype),
        )
        traced = stack.enter_context(
            watch.ProfilerWindow(workdir / "profile", clock, **config.profile, note=progress.note)
        )
        hang_file = workdir / f"hang-{jax.process_index()}.txt"
        stack.enter_context(watch.HangDetector(clock, config.hang_limit_seconds, hang_file))

        # What runs on the devices.
        replicated, split = parallel.replicated(run.mesh), parallel.batch_sharding(run.mesh)
        _, shares = parallel.input_share(run.mesh)
        # There the compiled step takes a batch as it is, in 0.05 ms instead of 0.4 (2 arrays, on an Intel Xeon).
        on_host = jax.process_count() == 1 and run.mesh.devices.flat[0].platform == "cpu"
        resident = parallel.to_global(run.train.resident or {}, replicated)
        key = run_key(run)
        empty_window = jax.jit(Window.empty, out_shardings=replicated)
        is_finite = jax.jit(all_finite)
        learning_rate = jax.jit(plan.learning_rate)
        step_fn: Callable[..., Any] | None = None
        in_flight: collections.deque[Array] = collections.deque()
        step = checked = start

        @contextlib.contextmanager
        def compiling(what: str) -> Iterator[None]:
            before = clock.now
            progress.note(f"compiling {what} ...")
            clock.turn_to(Doing.COMPILING, step + 1)
            yield
            progress.note(f"compiled {what} in {clock.elapsed():.1f} s")
            clock.turn_to(before.doing, before.step)

        evaluator = Evaluator(run, compiling)

        def check_finite() -> None:
            nonlocal checked
            if not is_finite(state):
                saver.wait()
                good = max(saver.steps(), default=None)
                where = f"{workdir}/checkpoints/{good}" if good is not None else "none was saved yet"
                raise NonFiniteLossError(
                    f"nan or infinity in the loss, the gradient or the weights within steps [{checked + 1}, {step}]; "
                    f"last good checkpoint: {where}. Lower schedule.learning_rate={config.schedule.learning_rate}, "
                    "set optimizer.clip_norm or lengthen the warm-up, in a new workdir"
                )
            checked = step

        def log_window() -> None:
            window = jax.device_get(state.window)
            means = state.window.totals.means("train")
            values = {
                "epoch": plan.epoch(step),
                "train/loss": means["train/loss"],
                "train/accuracy": means["train/accuracy"],
                "optim/learning_rate": float(learning_rate(step - 1)),
                "optim/grad_norm": float(window.grad_norm) / max(int(window.steps), 1),
                **clock.rates(step),
            }
            log.write(step, values)
            progress.show(step, values)

        def evaluate_here() -> None:
            clock.turn_to(Doing.EVALUATING, step)
            before = clock.seconds(Doing.EVALUATING)
            values = evaluator(state.variables(), interrupted=lambda: signals.caught is not None)
            if values is not None:
                seconds = clock.seconds(Doing.EVALUATING) - before
                values = {"epoch": plan.epoch(step), **values, "perf/evaluation_seconds": seconds}
                log.write(step, values)
                saver.record(step, values)
                progress.show(step, values)

        def is_evaluated() -> bool:
            return any(row["step"] == step and "eval/loss" in row for row in log.rows)

        def eval_due() -> bool:
            return step > 0 and (step % plan.eval_every_steps == 0 or step in (end, total_steps))

        progress.start(start, total_steps)
        stack.callback(progress.stop)
        stack.enter_context(others.failing(graceful=Preempted))
        # Stopped during an evaluation: the state was saved without it.
        if eval_due() and not is_evaluated():
            evaluate_here()
            if not is_evaluated():
                raise Preempted(f"stopped by {signals.name} in the evaluation of step {step}; run it again")
        while step < end:
            clock.turn_to(Doing.INPUT if step_fn else Doing.FIRST_INPUT, step + 1)
            batch = next(iterator)
            if not on_host:
                batch = parallel.to_global(batch, split, shares)
            if step_fn is None:
                with compiling("the step"):
                    step_fn = compile_step(run, state, batch, resident)
                if asked_to_stop(signals, step - start):
                    raise Preempted(f"stopped by {signals.name} at step {step}, before a new one; run it again")
            clock.turn_to(Doing.STEPPING, step + 1)
            state, loss = traced(step + 1, step_fn, state, batch, resident, key)
            step += 1
            hosts.at(f"step {step} of {total_steps}")
            progress.update(step)
            # The host may run ahead of the devices, but not with an epoch of batches in their memory.
            in_flight.append(loss)
            if len(in_flight) > 2:
                jax.block_until_ready(in_flight.popleft())
            stop = asked_to_stop(signals, step - start)
            if step % config.log_every_steps == 0 or step == total_steps:
                log_window()
                check_finite()
                state = state.replace(window=empty_window())
            save_due = step % plan.checkpoint_every_steps == 0 or step in (end, total_steps)
            if not (stop or save_due or eval_due()):
                continue
            check_finite()
            if eval_due() and not stop:
                evaluate_here()
                stop = stop or asked_to_stop(signals, step - start)
            if stop or save_due or saver.improves(step):
                clock.turn_to(Doing.SAVING, step)
                meta = {
                    "data": iterator.get_state(),
                    "config": _as_dict(config),
                    "batch_norm_examples": _batch_norm_examples(run),
                }
                log.flush()
                saver.save(step, state.items(), meta)
            if stop and (step < end or not is_evaluated()):
                saver.wait()
                raise Preempted(f"stopped by {signals.name}: saved step {step} of {total_steps}; run it again to go on")
        clock.turn_to(Doing.SAVING, step)
        saver.wait()
        if step > start:
            progress.note(f"training took {clock.describe()}")
        return _last_values(log.rows)


@contextlib.contextmanager
def _naming_full_disk(workdir: Path) -> Iterator[None]:
    # Around everything: what cannot be written comes to light at a later step, or while the files are closed.
    try:
        yield
    except Exception as error:
        if not checkpoints.disk_full(error):
            raise
        raise _unwritable(workdir, error) from error


def _unwritable(workdir: Path, error: BaseException) -> ValueError:
    good = max(checkpoints.finished_steps(workdir), default=None)
    where = f"{workdir}/checkpoints/{good}" if good is not None else "none was saved yet"
    return ValueError(
        f"{workdir} cannot be written ({checkpoints.disk_full(error) or error}); last good checkpoint: {where}. Free "
        "space and run the same command again to go on from there"
    )


def _batch_norm_examples(run: Run) -> int:
    """How many examples share batch norm's statistics."""
    return run.config.batch_size // run.config.accumulate_steps // run.mesh.shape[parallel.GROUP]


def _check_hosts_alike(config: ConfigDict, **arguments: Any) -> None:
    named = {"config": _flat(_as_dict(config)), "code": hosts.code_revision(), "version": checkpoints.versions()}
    named["argument"] = arguments
    hosts.check_alike({f"{kind} {key}": value for kind, facts in named.items() for key, value in facts.items()})


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def fresh_state(run: Run) -> TrainState:
    """Returns the state before the first step, on every device of the run's mesh."""
    # Born on its devices. On a CPU the default optimisation level takes ten times as long to
    # compile as the initialisation it speeds up (80 s for a ResNet-50).
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
    init = jax.jit(functools.partial(init_state, run=run), out_shardings=shardings, compiler_options=options)
    return init(jax.random.key(run.config.seed))


def run_key(run: Run) -> Array:
    """Returns the data of the key that a run's randomness on the devices comes from, on every device of its mesh."""
    data = np.asarray(jax.random.key_data(jax.random.key(run.config.seed)))
    return parallel.to_global({"key": data}, parallel.replicated(run.mesh))["key"]


def compile_step(run: Run, state: TrainState, batch: Any, resident: Any) -> Callable[..., Any]:
    """Compiles the training step for arrays, or shapes, like these; the state is donated to it.

    Returns:
      ``(state, batch, resident, run_key) -> state, loss``.
    """
    replicated, split = parallel.replicated(run.mesh), parallel.batch_sharding(run.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        functools.partial(train_step, run=run),
        in_shardings=(shardings, split, replicated, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    # Ahead of time: compiling is timed by itself, and a change of shapes is an error, not a recompilation.
    return step.lower(state, batch, resident, key_shape()).compile()


def key_shape() -> jax.ShapeDtypeStruct:
    """Returns the shape of what `run_key` gives."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))


class Evaluator:
    """Runs the evaluation set; compiles once.

    Args:
      run: whose ``eval`` it runs.
      compiling: entered with what is compiled, while it is.
    """

    def __init__(
        self,
        run: Run,
        compiling: Callable[[str], contextlib.AbstractContextManager[None]] = lambda what: contextlib.nullcontext(),
    ) -> None:
        self._run, self._compiling, self._compiled = run, compiling, False
        self._replicated, self._split = parallel.replicated(run.mesh), parallel.batch_sharding(run.mesh)
        self.step = jax.jit(
            functools.partial(eval_step, run=run),
            in_shardings=(None, self._replicated, self._split),  # the weights as they lie
            out_shardings=self._replicated,
            donate_argnums=1,
        )
        self._zeros = jax.jit(metrics.Totals.zeros, out_shardings=self._replicated)

    def __call__(
        self, variables: Mapping[str, Any], interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        totals = self._zeros()
        _, shares = parallel.input_share(self._run.mesh)
        for batch in self._run.eval:
            # With several processes all must do the same number of batches.
            if jax.process_count() == 1 and interrupted():
                return None
            batch = parallel.to_global(batch, self._split, shares)
            with contextlib.nullcontext() if self._compiled else self._compiling("the evaluation"):
                totals = self.step(variables, totals, batch)
            self._compiled = True
        if not float(totals.count):
            raise ValueError(
                f"data.eval_split={self._run.config.data.eval_split!r} of {self._run.config.data.name!r} holds no "
                "examples: name a split that does"
            )
        return totals.means("eval")


class Signals:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        return signal.Signals(self.caught or signal.SIGTERM).name

    def __enter__(self) -> Signals:
        # Only the main thread may; and with several processes SIGTERM belongs to jax.distributed, which
        # has them agree on the step to stop at.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
            around = getattr(self._before[signal.SIGTERM], "__self__", None)
            if isinstance(around, Signals):
                self.caught = around.caught  # It came while this run was prepared.
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.caught == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number
        before = self._before.get(number)
        if callable(before) and isinstance(getattr(before, "__self__", None), Signals):
            before(number, frame)  # A sweep around this run has to stop as well, even if this run is at its end.

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def asked_to_stop(signals: Signals, steps: int) -> bool:
    """Whether to stop, asked by all processes after as many steps of this part of the run."""
    if jax.process_count() > 1:
        # jax has them meet one above the largest number that any has asked with, which is 0 for one that has not yet: a
        # run that continues from step 1000 would never pass by 1.
        return multihost_utils.reached_preemption_sync_point(steps + 1)
    return signals.caught is not None


def _last_values(rows: list[dict[str, Any]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in rows:
        values.update(row)
    return values


# The same run or another


CONTINUABLE = (
    "num_epochs num_steps log_every_steps eval_every_epochs eval_batch_size checkpoint. mesh.data mesh.fsdp "
    "mesh.spatial profile. hang_limit_seconds data.data_dir data.num_workers data.placement model.implementation"
).split()
"""Keys, or groups of them, that may change between a run's parts: but for rounding, updates stay the same."""


def to_json(config: ConfigDict) -> str:
    """Returns the config as it is written to ``config.json``."""
    return json.dumps(_as_dict(config), indent=2) + "\n"


def _write_config(config: ConfigDict, workdir: Path) -> None:
    if jax.process_index() == 0:
        workdirs.write_text(workdir / "config.json", to_json(config))


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns ``{dotted key: (old value, new value)}`` where two configs, as read from JSON, differ.

    A key that the old one lacks, because it was written before there was such a key, has its default.
    """
    old, new = _flat(_as_dict(default_config())) | _flat(old), _flat(new)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _check_same_run(run: Run, workdir: Path, note: Callable[[str], None]) -> None:
    with checkpoints.Checkpoints(workdir, read_only=True) as saved:
        trained = bool(saved.steps())
    file, log = workdir / "config.json", workdir / "metrics.jsonl"
    if not file.exists():
        # With checkpoints: removed by somebody; restoring compares the trees.
        if not trained and log.exists() and log.read_text():
            raise ValueError(
                f"{log} holds rows of a run, but there is neither its config.json nor a checkpoint: name a new "
                "--workdir, or move that file away"
            )
        return
    before = _read_run_config(file)
    changes = config_changes(before, _as_dict(run.config))
    others = [key for key in changes if not key.startswith(tuple(CONTINUABLE))]
    if others:
        back = "set these keys back to continue it"
        if not trained:
            back += f", or move {file} and metrics.jsonl away (no checkpoint was saved yet)"
        raise ValueError(
            f"{workdir} holds a run of another config ({_say(changes, others)}): name a new --workdir, or {back}"
        )
    if not changes or not trained:
        return
    assert run.plan is not None
    length = [key for key in changes if key in ("num_epochs", "num_steps")]
    if length:
        epochs, number = before["num_epochs"], before["num_steps"]
        total = number if number is not None else round(epochs * run.plan.steps_per_epoch)
        if run.plan.total_steps < total:
            raise ValueError(
                f"{workdir} holds a longer run ({_say(changes, length)}, that is {total} steps and now "
                f"{run.plan.total_steps}): a run may be lengthened, not cut; name a new --workdir"
            )
    stretched = "; the learning rate follows the new length from here" if length else ""
    note(f"continuing with a changed config: {_say(changes, changes)}{stretched}")


def _read_run_config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        found = str(error)
    if not isinstance(found, dict) or not {"model", "data", "num_epochs", "num_steps"} <= found.keys():
        raise ValueError(f"{file} is not the config of a run: name a new --workdir, or move that file away")
    return found


def _explain(config: ConfigDict, meta: Mapping[str, Any]) -> str:
    changes = config_changes(meta.get("config", {}), _as_dict(config))
    keys = [key for key in changes if not key.startswith(tuple(CONTINUABLE))]
    if not keys:
        return "\nno config key differs, so the network's code changed since: use the version that saved it"
    return f"\nconfig keys that differ: {_say(changes, keys)}; set them back, or name another --workdir"


def _say(changes: Mapping[str, tuple[Any, Any]], keys: Any) -> str:
    return ", ".join(f"{key} was {changes[key][0]!r}, is {changes[key][1]!r}" for key in keys)


def _as_dict(config: ConfigDict) -> dict[str, Any]:
    # Through JSON, which knows no tuples: what is compared is what can be read back.
    return json.loads(json.dumps(config.to_dict()))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


# After training


@dataclasses.dataclass(frozen=True)
class Restored:
    """A trained network: ``model.apply(variables, images, train=False)``.

    Attributes:
      model: the network.
      variables: its weights, or their moving averages when the config has them.
      info: of the data set.
      config: the one it was restored with.
      step: completed updates.
    """

    model: nn.Module
    variables: dict[str, Any]
    info: Any
    config: ConfigDict
    step: int


def restore(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = "newest",
    model: nn.Module | None = None,
    data: Any = None,
    note: Callable[[str], None] = lambda text: None,
) -> Restored:
    """Restores a trained network from a workdir, which it does not change.

    Args:
      config: of the run; only what shapes the network must agree with it.
      workdir: of the run.
      which: ``newest``, or ``best`` by ``checkpoint.best_metric``.
      model: as for `train`.
      data: as for `train`.
      note: gets a line when a damaged checkpoint is passed over.

    Raises:
      ValueError: there is no checkpoint, none can be read, no metric says which is the best,
        or it is of another network; the message lists the differences.
    """
    if data is None:
        from aaconv import data
    info = data.info(config)
    model = build_model(config, info.num_classes) if model is None else model
    return _restore(config, workdir, which, model, info, parallel.make_mesh(1), note)


def evaluate(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = "newest",
    model: nn.Module | None = None,
    data: Any = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Evaluates a workdir's network on ``data.eval_split``; arguments and errors as of `restore`.

    Says through ``note`` when it compiles, too.

    Returns:
      ``step``, ``eval/loss``, ``eval/accuracy``, ``eval/top5``, over each example exactly once.
    """

    @contextlib.contextmanager
    def compiling(what: str) -> Iterator[None]:
        note(f"compiling {what} ...")
        began = time.monotonic()
        yield
        note(f"compiled {what} in {time.monotonic() - began:.1f} s")

    run = hosts.together(lambda: build(config, model, data, training=False))
    _check_hosts_alike(config)
    with hosts.Watch():
        restored = _restore(config, workdir, which, run.model, run.info, run.mesh, note)
        values = Evaluator(run, compiling)(restored.variables)
    assert values is not None
    return {"step": restored.step, **values}


def _restore(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    which: str,
    model: nn.Module,
    info: Any,
    mesh: Mesh,
    note: Callable[[str], None],
) -> Restored:
    if which not in ("newest", "best"):
        raise ValueError(f"which={which!r} is not one of newest, best")
    best_metric = config.checkpoint.best_metric
    with checkpoints.Checkpoints(workdir, best_metric=best_metric, read_only=True) as saved:
        if not saved.steps():
            raise ValueError(
                f"no checkpoint in {str(workdirs.path(workdir) / 'checkpoints')!r}: train with this --workdir "
                "first, or name the workdir of a run"
            )
        for row in metrics.read_rows(workdir):
            saved.record(row["step"], row)
        step = saved.best_step() if which == "best" else None
        if which == "best" and step is None:
            what = f"recorded {best_metric}" if best_metric else "checkpoint.best_metric"
            raise ValueError(
                f"no {what} says which checkpoint in {str(workdirs.path(workdir))!r} is the best: use "
                "--checkpoint newest"
            )
        run = Run(config, model, None, info, mesh, None, None, None, optim.no_optimizer())
        abstract = {"model": run.abstract_state().items()["model"]}
        found = saved.restore(abstract, step=step, explain=functools.partial(_explain, config), note=note)
    assert found is not None
    step, items, _ = found
    weights = items["model"]
    variables = weights["ema"] or {"params": weights["params"], "batch_stats": weights["batch_stats"]}
    return Restored(model, variables, info, config, step)
