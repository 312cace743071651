"""Optimisers, learning-rate schedules and the conversion between epochs and steps.

The only place that knows optax. `plan` turns every duration of a config into steps once;
`optimizer` builds the update from it. ``step`` is the number of completed updates, so
``plan.learning_rate(step)`` is the rate of the update that follows them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aaconv.config import ConfigDict
from aaconv.errors import close_matches


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's durations in steps, and its learning rate.

    Attributes:
      steps_per_epoch: updates an epoch.
      total_steps: updates of the whole run.
      warmup_steps: updates over which the rate rises linearly from 0.
      eval_every_steps: updates between evaluations; the last step is evaluated as well.
      checkpoint_every_steps: updates between checkpoints; the last step is saved as well.
      peak: the learning rate after warm-up, before decay.
      schedule: the config's ``schedule`` section.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    peak: float
    schedule: ConfigDict = dataclasses.field(repr=False)

    def epoch(self, step: int) -> float:
        """Returns how many epochs `step` completed updates are."""
        return step / self.steps_per_epoch

    def learning_rate(self, step: Any) -> jax.Array:
        """Returns the float32 learning rate of the update after `step` completed ones.

        With p the peak, w the warm-up and T the total steps: ``p step / w`` during warm-up,
        afterwards, by ``schedule.name``,

        - cosine: ``p (final + (1 - final) (1 + cos(pi (step - w) / (T - w))) / 2)``
        - steps: ``p factor^(number of boundaries reached)``
        - exponential: ``p factor^floor(step / every)``, a staircase counted from step 0
        - constant: ``p``

        Args:
          step: int or integer array, of any shape; may be traced.
        """
        s = self.schedule
        step = jnp.asarray(step, jnp.float32)
        if s.name == "cosine":
            share = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
            share = jnp.clip(share, 0.0, 1.0)
            decayed = s.final + (1 - s.final) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        elif s.name == "steps":
            boundaries = [round(epochs * self.steps_per_epoch) for epochs in s.boundaries_epochs]
            reached = sum(((step >= boundary).astype(jnp.float32) for boundary in boundaries), jnp.float32(0))
            decayed = jnp.float32(s.factor) ** reached
        elif s.name == "exponential":
            # Half a step of slack keeps a boundary that is not exact in float32 on its step.
            every = s.every_epochs * self.steps_per_epoch
            decayed = jnp.float32(s.factor) ** jnp.floor((step + 1e-3) / every)
        else:
            decayed = jnp.ones_like(step)
        if self.warmup_steps:
            decayed = jnp.where(step < self.warmup_steps, step / self.warmup_steps, decayed)
        return jnp.asarray(self.peak * decayed, jnp.float32)


def plan(config: ConfigDict, steps_per_epoch: int) -> Plan:
    """Converts a config's durations to steps.

    Args:
      config: the whole config.
      steps_per_epoch: updates an epoch, at least 1.

    Raises:
      ValueError: the warm-up does not end within the run, boundaries do not ascend, or the
        schedule is unknown.
    """
    if steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch} must be at least 1: the training split holds fewer examples "
            f"than batch_size={config.batch_size}; lower batch_size"
        )

    def to_steps(epochs: float) -> int:
        return max(1, round(epochs * steps_per_epoch))

    s = config.schedule
    known = ("cosine", "steps", "exponential", "constant")
    if s.name not in known:
        raise ValueError(
            f"schedule.name={s.name!r} is not one of {', '.join(known)}{close_matches(str(s.name), known)}"
        )
    total = config.num_steps if config.num_steps is not None else to_steps(config.num_epochs)
    if s.warmup_percent and not 0 <= s.warmup_percent <= 100:
        raise ValueError(f"schedule.warmup_percent={s.warmup_percent} must lie between 0 and 100")
    warmup = round(total * s.warmup_percent / 100) or round(s.warmup_epochs * steps_per_epoch)
    if warmup and warmup >= total:
        raise ValueError(
            f"the warm-up takes {warmup} steps of a run of {total}: it must end before the run does; lower "
            f"schedule.warmup_epochs={s.warmup_epochs} or schedule.warmup_percent={s.warmup_percent}, or train longer"
        )
    boundaries = tuple(s.boundaries_epochs)
    if s.name == "steps" and (not boundaries or list(boundaries) != sorted(set(boundaries)) or boundaries[0] <= 0):
        raise ValueError(
            f"schedule.boundaries_epochs={boundaries} must be one or more ascending epochs above 0 for "
            "schedule.name='steps', e.g. (60, 120, 160)"
        )
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        eval_every_steps=to_steps(config.eval_every_epochs),
        checkpoint_every_steps=config.checkpoint.every_steps or to_steps(config.checkpoint.every_epochs),
        peak=s.learning_rate * (config.batch_size / 256 if s.scale_with_batch else 1.0),
        schedule=s,
    )


def optimizer(config: ConfigDict, run: Plan) -> optax.GradientTransformation:
    """Builds the update: clipping, weight decay, the optimiser's rule, the learning rate.

    With g the gradient clipped to ``clip_norm`` over the whole tree, wd the weight decay and
    r(step) the learning rate:

    - sgd: ``g += wd w; m = momentum m + g; w -= r m`` (Nesterov: ``w -= r (g + momentum m)``)
    - rmsprop: ``g += wd w; v = decay v + (1 - decay) g^2; m = momentum m + r g / sqrt(v + eps);
      w -= m``, with v starting at 1 as TensorFlow's did
    - adamw: ``w -= r (adam(g; b1, b2, eps) + wd w)``

    Args:
      config: the whole config; reads its ``optimizer`` section.
      run: from `plan`.

    Raises:
      ValueError: an unknown name, or settings that contradict each other.
    """
    o = config.optimizer
    known = ("sgd", "rmsprop", "adamw")
    if o.name not in known:
        raise ValueError(
            f"optimizer.name={o.name!r} is not one of {', '.join(known)}{close_matches(str(o.name), known)}"
        )
    if o.nesterov and o.name != "sgd":
        raise ValueError(f"optimizer.nesterov=True needs optimizer.name='sgd', not {o.name!r}: switch it off")
    if o.nesterov and not o.momentum:
        raise ValueError("optimizer.nesterov=True needs optimizer.momentum above 0, e.g. 0.9; with 0 it does nothing")
    for key in ("momentum", "decay", "b1", "b2", "ema_decay"):
        if not 0 <= o[key] < 1:
            raise ValueError(f"optimizer.{key}={o[key]} must be at least 0 and below 1: an average needs new terms")

    rate = optax.scale_by_learning_rate(run.learning_rate)
    decay = optax.add_decayed_weights(o.weight_decay, mask=None if o.decay_norm_and_bias else weight_decay_mask)
    momentum = optax.trace(o.momentum, nesterov=o.nesterov)
    parts = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    if o.name == "adamw":
        parts.append(optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps))
    if o.weight_decay:
        parts.append(decay)
    if o.name == "rmsprop":
        parts.append(optax.scale_by_rms(decay=o.decay, eps=o.eps, eps_in_sqrt=True, initial_scale=1.0))
        parts.append(rate)
        parts += [momentum] if o.momentum else []
    else:
        parts += [momentum] if o.name == "sgd" and o.momentum else []
        parts.append(rate)
    return optax.chain(*parts)


def no_optimizer() -> optax.GradientTransformation:
    """Returns an optimiser without state, for what is only evaluated."""
    return optax.identity()


def update(
    transformation: optax.GradientTransformation, gradients: Any, state: Any, params: Any
) -> tuple[Any, Any, jax.Array]:
    """Returns the new params, the optimiser's new state and the gradients' norm before clipping."""
    updates, state = transformation.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, optax.tree.norm(gradients)


def weight_decay_mask(params: Any) -> Any:
    """Returns a tree of bools: True where weight decay applies.

    It applies to arrays of two axes or more: kernels, and attention's relative-position
    tables. Vectors (biases, batch-norm scales) and scalars are left alone.
    """
    return jax.tree.map(lambda p: p.ndim > 1, params)


def ema(average: Any, new: Any, step: Any, decay: float) -> Any:
    """Moves a tree of averages towards `new`: ``average += (1 - d) (new - average)``.

    ``d = min(decay, (1 + step) / (10 + step))``: early averages follow the weights closely
    instead of remembering their random start.

    Args:
      average: the tree of averages.
      new: the tree of new values, same shapes.
      step: completed updates, this one included.
      decay: in [0, 1).
    """
    step = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, n: a + (1 - d).astype(a.dtype) * (n - a), average, new)


def describe(run: Plan) -> str:
    """Returns one line on the run's length and rate, for logs."""
    warmup = f", warm-up {run.warmup_steps} steps" if run.warmup_steps else ""
    epochs = run.epoch(run.total_steps)
    text = f"{epochs:.0f}" if math.isclose(epochs, round(epochs)) else f"{epochs:.2f}"
    return (
        f"{run.total_steps} steps ({text} epochs of {run.steps_per_epoch} steps), "
        f"{run.schedule.name} schedule, peak learning rate {run.peak:g}{warmup}"
    )
