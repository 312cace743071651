"""The two programs that ``aaconv train`` runs on a slice, compiled without it, and what they need."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from aaconv import data, metrics, parallel, train
from aaconv.bench import ahead
from aaconv.bench.step import eval_input_without_examples, train_input_without_examples
from aaconv.config import ConfigDict
from aaconv.data import declared, pipeline
from aaconv.models import summary
from aaconv.pods import buffers, collectives
from aaconv.pods.chips import Slice

TRAINING, EVALUATION = "training step", "evaluation step"
STEPS_PER_EPOCH = 1000
"""Of sets whose size nobody knows here; it only enters the schedule's arithmetic."""
EXAMPLES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet2012": 1_281_167}
"""Images to train on in sets that need not be prepared here, by the TFDS catalogue."""

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable


class Described:
    """In the place of `aaconv.data`: a data set by its description, prepared or not, without its examples."""

    def info(self, config: ConfigDict) -> data.DatasetInfo:
        try:
            return data.info(config)
        except data.NotPrepared:
            found = declared.declared_info(config)
            name = found.name.partition(":")[0].partition("/")[0]
            return dataclasses.replace(found, num_train=EXAMPLES.get(name, 0))

    def train_input(self, config: ConfigDict, **processes: int) -> data.TrainInput:
        info = self.info(config)
        resident = self._resident(config, info)
        steps_per_epoch = info.num_train // config.batch_size or STEPS_PER_EPOCH
        placement = "workers" if resident is None else "device"
        return train_input_without_examples(config, steps_per_epoch, placement, resident)

    def eval_input(self, config: ConfigDict, **processes: int) -> data.EvalInput:
        return eval_input_without_examples(config)

    def _resident(self, config: ConfigDict, info: data.DatasetInfo) -> Any:
        """Shapes of the training set where `aaconv.data.pipeline.train_input` would put it on the accelerator."""
        placement = config.data.placement
        if placement == "auto":
            size = info.num_train * int(np.prod(info.image_shape))
            small = 0 < size < pipeline.MEMORY_LIMIT and not info.decoded
            placement = "device" if small and not config.data.augment.random_resized_crop else "workers"
        if placement != "device":
            return None
        return {
            "image": jax.ShapeDtypeStruct((info.num_train, *info.image_shape), jnp.uint8),
            "label": jax.ShapeDtypeStruct((info.num_train,), jnp.int32),
        }


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for the devices of a mesh; bytes, FLOPs and images are those of one device.

    Attributes:
      name: `TRAINING` or `EVALUATION`.
      images: of the batch.
      batch_devices: devices that have images of their own.
      inputs: bytes by kind that the program is given, as the shardings have it.
      beside: bytes of what lies in memory meanwhile and is no part of the program.
      needs: the compiler's account.
      model_flops: of the network's products by its own count, a multiply-add as 2; three times those of the forward
        pass for a training step.
      compiler_flops: by XLA's cost analysis, which takes a loop's body once; None where it was refused.
      collectives: read off the program.
      largest: arrays in HBM, or what the compiler lists when it refuses a program.
      seconds: that compiling took.
    """

    name: str
    images: int
    batch_devices: int
    inputs: Mapping[str, int]
    beside: int
    needs: ahead.Needs
    model_flops: float
    compiler_flops: float | None
    collectives: tuple[collectives.Collective, ...]
    largest: tuple[buffers.Buffer, ...]
    seconds: float

    @property
    def total(self) -> int | None:
        """Bytes in memory while it runs; None where the compiler names no figure."""
        return None if self.needs.total is None else self.needs.total + self.beside

    def fits(self, memory: int) -> bool:
        return not self.needs.refused and (self.total or 0) <= memory


def build(config: ConfigDict, devices: Sequence[Device]) -> train.Run:
    """Makes what a run of the config on these devices needs.

    Raises:
      ValueError: as of `aaconv.train.build`.
    """
    return train.build(config, None, Described(), training=True, devices=devices)


def compile_program(run: train.Run, name: str, *, alone: bool = False) -> Program:
    """Compiles one program of a run exactly as `aaconv.train` does.

    Args:
      run: from `build`.
      name: `TRAINING` or `EVALUATION`.
      alone: whether evaluation is by itself, not within a run, whose state lies in memory meanwhile.
    """
    training = name == TRAINING
    whole, split = parallel.replicated(run.mesh), parallel.batch_sharding(run.mesh)
    size = run.config.batch_size if training else run.config.eval_batch_size
    began = time.monotonic()
    with tracing(run):
        state = run.abstract_state()
        resident = _placed(run.train.resident or {}, whole)
        batch = _batch(run, size, training, bool(resident), split)
        totals = _placed(jax.eval_shape(metrics.Totals.zeros), whole)
        if training:
            step, given_to = train.train_step, (state, batch, resident, train.key_shape())
            compiled, needs = ahead.account(lambda: train.compile_step(run, state, batch, resident))
        else:
            step, given_to = train.eval_step, (state.variables(), totals, batch)
            compiled, needs = ahead.account(lambda: train.Evaluator(run).step.lower(*given_to).compile())
        origins = _origins(run, step, given_to) if needs.refused else {}
        flops = sum(x.flops * (2 if x.kind == "attention" else 1) for x in summary_of(run).layers)
    kinds = _kinds(state, resident)
    given = kinds if training else {"weights": device_bytes(state.variables())}
    text = "" if compiled is None else compiled.as_text()
    images = size // parallel.batch_devices(run.mesh)
    # The network's work is divided over the axes that divide images, and nothing else.
    parts = run.mesh.shape[parallel.SPATIAL]
    return Program(
        name=name,
        images=images,
        batch_devices=parallel.batch_devices(run.mesh),
        inputs={**given, "batch": device_bytes(batch)},
        beside=0 if training or alone else sum(kinds.values()) - sum(given.values()),
        needs=needs,
        model_flops=flops * images / parts * (3 if training else 1),
        compiler_flops=None if compiled is None else _flops(compiled),
        collectives=tuple(collectives.read(text, run.mesh.size)) if text else (),
        largest=buffers.in_program(text) if text else buffers.in_refusal(_last_report(), origins),
        seconds=time.monotonic() - began,
    )


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on each device, without padding."""

    def of(x: Any) -> int:
        sharding: NamedSharding = x.sharding
        return int(np.prod(sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def _kinds(state: train.TrainState, resident: Any) -> dict[str, int]:
    found = {
        "parameters": device_bytes(state.params),
        "optimiser state": device_bytes(state.opt_state),
        "averages": device_bytes(state.ema),
        "statistics": device_bytes((state.batch_stats, state.window, state.step)),
        "training set": device_bytes(resident),
    }
    return {kind: size for kind, size in found.items() if size}


def _batch(run: train.Run, size: int, training: bool, resident: bool, split: NamedSharding) -> dict[str, Any]:
    if training and resident:
        return _placed({"index": jax.ShapeDtypeStruct((size,), jnp.int32)}, split)
    shapes = {"image": ((size, *run.info.image_shape), jnp.uint8), "label": ((size,), jnp.int32)}
    if not training:
        shapes["mask"] = ((size,), jnp.bool_)
    return _placed({key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()}, split)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return parallel.with_sharding(tree, jax.tree.map(lambda _: sharding, tree))


def summary_of(run: train.Run) -> summary.Summary:
    """What the run's network is made of; within `tracing`."""
    return summary.summarise(run.model, run.info.image_shape)


def tracing(run: train.Run) -> contextlib.AbstractContextManager[Any]:
    """Inside, what is traced knows the platform of the run's devices."""
    return ahead.tracing_for(run.mesh)


def coordinates(run: train.Run) -> list[tuple[int, ...]]:
    """Where in the slice the devices lie, in the order of the mesh."""
    return [tuple(device.coords) for device in run.mesh.devices.flat]


def _origins(run: train.Run, step: Any, given: Any) -> buffers.Origins:
    jaxpr = jax.make_jaxpr(functools.partial(step, run=run))(*given)
    return buffers.origins_of(jaxpr, parallel.batch_devices(run.mesh))


def topology_devices(slice: Slice) -> tuple[Device, ...]:
    """Returns the devices of a slice that need not be here, and has the compiler log into a folder of its own.

    Raises:
      ValueError: libtpu is not installed.
    """
    if "TPU_LOG_DIR" not in os.environ:
        # Also because what it logs by default stays in the folder for temporary files.
        folder = tempfile.TemporaryDirectory(prefix="aaconv_compile_")
        atexit.register(folder.cleanup)
        os.environ["TPU_LOG_DIR"] = folder.name
    return ahead.topology_devices(slice.name)


def _last_report() -> str:
    """What the compiler logged when it last refused a program; its error names no arrays."""
    logs = Path(os.environ.get("TPU_LOG_DIR", "")).glob("tpu_driver.*.ERROR.*")
    text = "".join(log.read_text(errors="replace") for log in sorted(logs, key=lambda log: log.stat().st_mtime))
    return text[text.rfind("Memory usage report") :]


def _flops(compiled: Any) -> float | None:
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return costs.get("flops") if costs else None
