"""Time and memory of whole training steps, and where the time goes: ``aaconv bench step``."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aaconv import config as config_lib, data, metrics, models, ops, parallel, train
from aaconv.bench import ahead, report, timing
from aaconv.config import ConfigDict
from aaconv.layers import AAConv, MultiHeadSelfAttention

RECIPE = str(Path(__file__).with_name("recipe.py"))
MODELS = ("resnet50", "aa_resnet50")
_FLAGS = ("data.image_size", "batch_size", "dtype")  # the keys behind --size, --batch and --dtype
SIZES = {"cpu": (160, 8, "float32")}
ACCELERATOR = (224, 128, "bfloat16")
NOISE = 0.1  # of the median, between the quartiles: what is told of a measurement
STEPS_PER_EPOCH = 1000  # of the made-up data set: the schedule's arithmetic stays in the step
TRAINING, INFERENCE = "training step", "inference"

Note = Callable[[str], None]


@dataclasses.dataclass
class Row:
    """One network; the columns of ``step.csv``, after the machine's.

    Attributes:
      network: name, with the implementation where one was asked for.
      work: ``training step`` or ``inference``.
      status: ``measured``, ``compiled`` (not run), ``unavailable`` or ``too large``; `reason` says why for the
        last two.
      step_s: median seconds a step; ``_q1`` and ``_q3`` the quartiles, ``_samples`` how many.
      images_per_s: batch divided by the median.
      temporary_bytes: beside state, batch and results.
      argument_bytes: state and batch.
      moved: bytes between the device's memory and its cores, see `traffic.hbm_bytes`.
      required_bytes: what the device would need for what does not fit.
    """

    network: str
    overrides: str
    work: str
    size: int
    batch: int
    dtype: str
    status: str = ""
    reason: str = ""
    step_s: float | None = None
    step_q1: float | None = None
    step_q3: float | None = None
    step_samples: int | None = None
    images_per_s: float | None = None
    temporary_bytes: int | None = None
    argument_bytes: int | None = None
    moved: int | None = None
    required_bytes: int | None = None

    @property
    def total_bytes(self) -> int | None:
        """What the device holds during a step."""
        if self.temporary_bytes is None:
            return self.required_bytes
        return self.temporary_bytes + (self.argument_bytes or 0)

    @property
    def verdict(self) -> str:
        """Whether it fits, in a table's words."""
        return {"compiled": "yes", "unavailable": "-"}.get(self.status) or f"no: {self.reason}"

    def set_needs(self, needs: ahead.Needs) -> None:
        self.temporary_bytes, self.moved = needs.temporaries, needs.moved
        self.argument_bytes = None if needs.temporaries is None else (needs.arguments or 0) + (needs.results or 0)
        self.required_bytes = needs.required
        self.status, self.reason = ("too large", needs.refused) if needs.refused else ("compiled", "")

    def set_times(self, times: timing.Times) -> None:
        self.status = "measured"
        self.step_s, self.step_samples = times.median, len(times.samples)
        self.step_q1, self.step_q3 = times.quartiles
        self.images_per_s = self.batch / times.median


@dataclasses.dataclass
class LayerRow:
    """One kind of augmented convolution; the columns of ``layers.csv``, after the machine's.

    Attributes:
      network, work, size, batch, dtype: as of `Row`.
      layers: names of the layers of this kind.
      count: how many.
      input, attends_at: spatial shapes, pixels.
      heads, key_depth, value_depth: of attention, depths a head.
      conv_s: median seconds of the plain convolution of as many features that it replaces.
      aaconv_s: of the layer.
      attention_s: of `aaconv.ops.relative_attention` alone, at the layer's shapes.
    """

    network: str
    work: str
    size: int
    batch: int
    dtype: str
    layers: str
    count: int
    input: str
    attends_at: str
    heads: int
    key_depth: int
    value_depth: int
    conv_s: float | None = None
    aaconv_s: float | None = None
    attention_s: float | None = None

    @property
    def added_s(self) -> float:
        """What all layers of this kind add to the network."""
        assert self.aaconv_s is not None and self.conv_s is not None
        return self.count * (self.aaconv_s - self.conv_s)


def run(
    names: Sequence[str] = MODELS,
    *,
    recipe: str = "",
    overrides: Sequence[str] = (),
    implementations: Sequence[str] = (),
    size: int | None = None,
    batch: int | None = None,
    dtype: str = "",
    inference: bool = False,
    layers: bool = True,
    seconds: float = 60.0,
    output: str | os.PathLike[str] = "runs/bench/step",
    topology: str = "",
    note: Note = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Row]:
    """Measures the steps of some networks in one run, prints tables, and writes ``step.csv`` and ``layers.csv``.

    The step is the one of `aaconv.train`, with the recipe's optimiser and augmentation on the device, on made-up
    images that are there already.

    Args:
      names: networks, see `aaconv.list_models`; the first is what the others are divided by.
      recipe: a config file, which the following three then default to; by default that of the ImageNet ResNets.
      overrides: ``key=value`` for it; those of attention reach the augmented networks only.
      implementations: of `aaconv.ops.relative_attention`: the augmented networks are measured with each.
      size: side of the images in pixels; by default 160 on a CPU, 224 elsewhere.
      batch: images a step; by default 8 on a CPU, 128 elsewhere.
      dtype: of activations; by default float32 on a CPU, bfloat16 elsewhere.
      inference: whether to measure the evaluation step instead.
      layers: whether to measure each kind of augmented convolution by itself as well.
      seconds: of timing for the networks, and again for the layers, without compiling and warming up.
      output: folder of the files.
      topology: a TPU to compile for without running, e.g. ``v5e:2x2``.
      note: gets lines of progress.

    Raises:
      ValueError: an unknown network, implementation, key or topology, or a folder that cannot be written.
    """
    devices = ahead.topology_devices(topology) if topology else jax.devices()
    defaults = dict(zip(_FLAGS, SIZES.get(devices[0].platform, ACCELERATOR), strict=True))
    flags = {key: value for key, value in zip(_FLAGS, (size, batch, dtype), strict=True) if value}
    settings = [] if recipe else [f"{key}={value}" for key, value in defaults.items()]
    settings += ["mesh.data=1", *overrides, *(f"{key}={value}" for key, value in flags.items())]
    configs = _configs(names, recipe or RECIPE, settings, implementations)
    runs = {
        name: train.build(config, None, _Synthetic(), training=True, devices=devices[:1])
        for name, config in configs.items()
    }
    target = f"{devices[0].device_kind}, one chip of {topology}, compiled ahead of time" if topology else ""
    machine = report.machine(target)
    c = next(iter(configs.values()))
    work, side = INFERENCE if inference else TRAINING, c.data.image_size
    rows = {name: Row(name, " ".join(overrides), work, side, c.batch_size, c.dtype) for name in runs}
    steps: dict[str, _Step] = {}
    for name, row in rows.items():
        try:
            steps[name] = _Step(runs[name], inference=inference)
        except NotImplementedError as error:
            row.status, row.reason = "unavailable", report.reason(error)
    columns = [*machine, *(field.name for field in dataclasses.fields(Row))]
    with report.Csv(Path(output) / "step.csv", columns) as file:
        print(report.describe(machine))
        print(f"{work}, {c.batch_size} images of {side} x {side}, {c.dtype}", *overrides, sep=", ", flush=True)
        for name, row in rows.items():
            if name in steps:
                note(f"compiling {name}")
                row.set_needs(steps[name].compile())
                free = report.free_memory() if devices[0].platform == "cpu" and not topology else None
                if free and (row.total_bytes or 0) > free:
                    row.status = "too large"
                    row.reason = f"needs {(row.total_bytes or 0) / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: not run"
                if row.status != "compiled" or topology:
                    del steps[name]
            if name in steps:
                steps[name].load()
            else:
                file.write({**machine, **dataclasses.asdict(row)})
        if steps:
            note(f"timing {len(steps)} networks for {seconds:g} s")
        for name, times in timing.measure({name: step.job() for name, step in steps.items()}, seconds).items():
            rows[name].set_times(times)
            low, high = times.quartiles
            if high - low > NOISE * times.median:
                note(
                    f"{name}: half of the samples lie {100 * (high - low) / times.median:.0f}% apart, so smaller "
                    "differences mean nothing: take a quiet machine, larger images or batches, or more --seconds"
                )
            file.write({**machine, **dataclasses.asdict(rows[name])})
    print(f"written {file.path}")
    for row in rows.values():
        if row.status == "unavailable":
            print(f"{row.network} is not here: {row.reason}")
    try:
        if layers:
            measured = {name: (runs[name], rows[name]) for name in steps}
            _measure_layers(measured, machine, Path(output) / "layers.csv", seconds, note)
    finally:  # an interruption leaves what is known
        found = list(rows.values())
        print(f"\n{MEMORY_LEGEND if topology else LEGEND}\n\n{_memory_table(found) if topology else _table(found)}")
    return found


# Networks


class _Synthetic:
    """In the place of `aaconv.data`: its augmentation, on images that are made up."""

    def info(self, config: ConfigDict) -> data.DatasetInfo:
        side = config.data.image_size
        return data.DatasetInfo(
            name="synthetic",
            num_classes=1000,
            num_train=STEPS_PER_EPOCH * config.batch_size,
            num_eval=config.batch_size,
            image_shape=(side, side, config.data.channels),
            label_names=tuple(map(str, range(1000))),
            decoded=False,
        )

    def train_input(self, config: ConfigDict, **processes: int) -> data.TrainInput:
        return train_input_without_examples(config, STEPS_PER_EPOCH, "memory")

    def eval_input(self, config: ConfigDict, **processes: int) -> data.EvalInput:
        return eval_input_without_examples(config)


def train_input_without_examples(
    config: ConfigDict, steps_per_epoch: int, placement: str, resident: Any = None
) -> data.TrainInput:
    """Returns a training input that prepares batches and yields none, for steps on made-up batches."""
    nothing: Any = None
    return data.TrainInput(
        nothing,
        steps_per_epoch=steps_per_epoch,
        placement=placement,
        resident=resident,
        num_workers=0,
        identity={},
        config=config,
    )


def eval_input_without_examples(config: ConfigDict) -> data.EvalInput:
    """Returns an evaluation input that prepares batches and yields none."""
    nothing: Any = None
    return data.EvalInput(nothing, num_batches=1, placement="memory", num_workers=0, config=config)


def _configs(
    names: Sequence[str], recipe: str, settings: Sequence[str], implementations: Sequence[str]
) -> dict[str, ConfigDict]:
    """The configs to compare, by what they are called in the tables."""
    configs: dict[str, ConfigDict] = {}
    for name in dict.fromkeys(names):
        is_plain = not models.entry(name).augmented
        for implementation in [None] if is_plain else implementations or [None]:
            chosen = [*settings, f"model.name={name}"]
            if is_plain:  # what concerns attention is not for it
                chosen += [f"model.{argument}=None" for argument in models.ATTENTION]
            if implementation is not None:
                chosen.append(f"model.implementation={implementation}")
            config = config_lib.load(recipe, chosen)
            if config.data.image_size is None:
                raise ValueError("data.image_size is not set in the config: add --size, e.g. --size 32")
            configs[name if implementation is None else f"{name} {implementation}"] = config
    if not configs:
        raise ValueError(f"--models is empty: name networks, e.g. {','.join(MODELS)}")
    return configs


class _Step:
    """The step of a run, and what it works on.

    Raises:
      ValueError: the network cannot take such images.
      NotImplementedError: the implementation cannot serve.
    """

    def __init__(self, run: train.Run, *, inference: bool) -> None:
        self._run, self._inference = run, inference
        with ahead.tracing_for(run.mesh):
            self._shapes = run.abstract_state()

    def compile(self) -> ahead.Needs:
        """Compiles it, and returns what it needs."""
        with ahead.tracing_for(self._run.mesh):
            self._compiled, needs = ahead.account(self._compile)
        return needs

    def _compile(self) -> Any:
        batch = self._batch_shapes()
        if not self._inference:
            return train.compile_step(self._run, self._shapes, batch, {})
        totals = jax.eval_shape(metrics.Totals.zeros)
        totals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), totals)
        return train.Evaluator(self._run).step.lower(self._shapes.variables(), totals, batch).compile()

    @property
    def _replicated(self) -> Any:
        return parallel.replicated(self._run.mesh)

    def load(self) -> None:
        """Makes a state and a batch."""
        generator = np.random.default_rng(0)
        shapes = self._batch_shapes()
        made = {"image": generator.integers(0, 256, shapes["image"].shape, np.uint8)}
        made["label"] = generator.integers(0, self._run.info.num_classes, shapes["label"].shape, np.int32)
        if self._inference:
            made["mask"] = np.ones(shapes["mask"].shape, bool)
        self._batch = parallel.to_global(made, parallel.batch_sharding(self._run.mesh))
        self._state = train.fresh_state(self._run)
        self._key = train.run_key(self._run)
        if self._inference:
            self._totals = jax.device_put(metrics.Totals.zeros(), self._replicated)

    def job(self) -> timing.Job:
        return timing.Job(self._start, jax.block_until_ready, pipelined=jax.default_backend() != "cpu")

    def _start(self) -> Any:
        if self._inference:
            self._totals = self._compiled(self._state.variables(), self._totals, self._batch)
            return self._totals.count
        self._state, loss = self._compiled(self._state, self._batch, {}, self._key)
        return loss, self._state.step

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        size, sharding = self._run.config.batch_size, parallel.batch_sharding(self._run.mesh)
        shapes = {"image": ((size, *self._run.info.image_shape), jnp.uint8), "label": ((size,), jnp.int32)}
        if self._inference:
            shapes["mask"] = ((size,), jnp.bool_)
        return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


# Layers


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Layers that compute the same: one of them, without a parent, and the shapes it is called with."""

    conv: AAConv
    inputs: jax.ShapeDtypeStruct
    attention_inputs: jax.ShapeDtypeStruct
    paths: list[str]

    def key(self) -> Any:
        conv = {field.name: str(getattr(self.conv, field.name)) for field in dataclasses.fields(nn.Conv)}
        ours = self.conv.depths(), self.conv.strided_attention, self.conv.pooled_attention
        return str({**conv, "name": "", "parent": ""}), ours, self.inputs.shape


def _kinds(run: train.Run, batch: int) -> list[_Kind]:
    """Lists a network's augmented convolutions, equal ones together, in the order of the forward pass."""
    kinds: dict[Any, _Kind] = {}
    around: list[tuple[AAConv, jax.ShapeDtypeStruct]] = []

    def note(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, AAConv | MultiHeadSelfAttention):
            return next_fun(*args, **kwargs)
        shape = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
        if isinstance(module, AAConv):
            around.append((module, shape))
            try:
                return next_fun(*args, **kwargs)
            finally:
                around.pop()
        if around:
            conv, inputs = around[-1]
            kind = _Kind(conv.clone(parent=None, name=None), inputs, shape, [])
            kinds.setdefault(kind.key(), kind).paths.append("/".join(conv.path))
        return next_fun(*args, **kwargs)

    images = jax.ShapeDtypeStruct((batch, *run.info.image_shape), jnp.float32)
    with nn.intercept_methods(note):
        jax.eval_shape(partial(run.model.init, train=False), jax.random.key(0), images)
    return list(kinds.values())


def _measure_layers(
    networks: dict[str, tuple[train.Run, Row]], machine: dict[str, Any], path: Path, seconds: float, note: Note
) -> None:
    """Times each kind of layer by itself, and prints and writes what comes out."""
    found = [(row, kind) for run, row in networks.values() for kind in _kinds(run, row.batch)]
    if not found:
        return
    layers: list[LayerRow] = []
    columns = [*machine, *(field.name for field in dataclasses.fields(LayerRow))]
    with report.Csv(path, columns) as file:
        for number, (row, kind) in enumerate(found, start=1):
            note(f"{number}/{len(found)} {row.network}: layers like {kind.paths[0]}")
            layers.append(_measure_layer(row, kind, seconds / len(found)))
            file.write({**machine, **dataclasses.asdict(layers[-1])})
    print(f"written {path}")
    print(f"\n{LAYERS_LEGEND}\n\n{_layers_table(layers, {row.network: row for _, row in networks.values()})}")


def _measure_layer(row: Row, kind: _Kind, seconds: float) -> LayerRow:
    conv, heads = kind.conv, kind.conv.num_heads
    key_depth, value_depth = (depth // heads for depth in conv.depths())
    space, dtype, inference = kind.attention_inputs.shape[1:-1], kind.inputs.dtype, row.work == INFERENCE
    layer = LayerRow(
        *(row.network, row.work, row.size, row.batch, row.dtype),
        layers=_range(kind.paths),
        count=len(kind.paths),
        input="x".join(map(str, kind.inputs.shape[1:-1])),
        attends_at="x".join(map(str, space)),
        heads=heads,
        key_depth=key_depth,
        value_depth=value_depth,
    )
    plain = nn.Conv(**{field.name: getattr(conv, field.name) for field in _plain_fields()})
    arrays = [_random((row.batch, *space, heads, depth), dtype) for depth in (key_depth, key_depth, value_depth)]
    rel = None
    if conv.position_encoding == "relative":
        rel = tuple(_random((2 * side - 1, key_depth), dtype) for side in space)
    attend = partial(ops.relative_attention, spatial_ndim=len(space), implementation=conv.implementation)
    jobs = {
        "conv_s": _layer_job(plain, kind.inputs, inference),
        "aaconv_s": _layer_job(conv, kind.inputs, inference),
        "attention_s": _job(attend, inference, *arrays, rel),
    }
    for key, times in timing.measure(jobs, seconds).items():
        setattr(layer, key, times.median)
    return layer


def _plain_fields() -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(nn.Conv) if field.init and field.name not in ("parent", "name")]


def _layer_job(module: nn.Module, inputs: jax.ShapeDtypeStruct, inference: bool) -> timing.Job:
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    # Not by the initialisers, which take longer to compile than the layer.
    variables = jax.tree.map(lambda x: _random(x.shape, x.dtype, scale=0.05), shapes)
    return _job(
        lambda variables, x: module.apply(variables, x), inference, variables, _random(inputs.shape, inputs.dtype)
    )


def _job(function: Callable[..., Any], inference: bool, *arguments: Any) -> timing.Job:
    """A call of `function`, or of it and its gradients with respect to all arguments."""

    def gradient(*arguments):
        out, pullback = jax.vjp(function, *arguments)
        return pullback(jnp.ones_like(out))

    compiled = jax.jit(function if inference else gradient).lower(*arguments).compile()
    pipelined = jax.default_backend() != "cpu"
    return timing.Job(lambda: compiled(*arguments), jax.block_until_ready, pipelined)


def _random(shape: Sequence[int], dtype: Any, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(0).standard_normal(tuple(shape), np.float32), dtype)


def _range(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"


# What is printed

LEGEND = (
    "Medians (quartiles in brackets), the networks in turn. / first: as a share of the first network's. MB:\n"
    "10^6 bytes; in all: temporary memory and what the step is given, which is the state and the batch."
)
MEMORY_LEGEND = (
    "GB: 10^9 bytes. in all: temporary memory and what the step is given, which is the state and the batch. moves:\n"
    "bytes between HBM and the core, read off the compiled program; custom kernels with operands and results once."
)
LAYERS_LEGEND = (
    "Where the time goes: each kind of augmented convolution by itself, beside the plain convolution it replaces and\n"
    "the attention inside it. added: by all layers of the kind, and as a share of the network's step."
)


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    columns = ["network", "ms", "images / s", "ms / first", "temporary, MB", "in all, MB", "MB / first"]
    body = []
    for row in rows:
        times = (row.step_q1, row.step_q3) if row.step_q1 is not None and row.step_q3 is not None else None
        body.append(
            [
                row.network,
                report.milliseconds(row.step_s, times) if row.step_s else row.verdict,
                "-" if row.images_per_s is None else f"{row.images_per_s:,.1f}",
                report.ratio(row.step_s, first.step_s),
                report.megabytes(row.temporary_bytes),
                report.megabytes(row.total_bytes),
                report.ratio(row.total_bytes, first.total_bytes),
            ]
        )
    return report.table(columns, body)


def _memory_table(rows: Sequence[Row]) -> str:
    columns = ["network", "temporary, GB", "state and batch, GB", "in all, GB", "/ first", "moves, GB", "fits"]
    gigabytes = lambda size: "-" if size is None else f"{size / 1e9:.2f}"
    body = [
        [
            row.network,
            gigabytes(row.temporary_bytes),
            gigabytes(row.argument_bytes),
            gigabytes(row.total_bytes),
            report.ratio(row.total_bytes, rows[0].total_bytes),
            gigabytes(row.moved),
            row.verdict,
        ]
        for row in rows
    ]
    return report.table(columns, body)


def _layers_table(layers: Sequence[LayerRow], rows: dict[str, Row]) -> str:
    columns = ["network", "layers", "count", "input", "attends at", "n, d, e"]
    columns += ["conv, ms", "AAConv, ms", "of it attention, ms", "added, ms", "of the step"]
    body = []

    def share(name: str, seconds: float) -> list[str]:
        step = rows[name].step_s
        return [report.milliseconds(seconds), f"{100 * seconds / step:.1f}%" if step else "-"]

    for name in dict.fromkeys(layer.network for layer in layers):
        own = [layer for layer in layers if layer.network == name]
        for layer in own:
            sizes = [str(layer.count), layer.input, layer.attends_at]
            sizes.append(f"{layer.heads}, {layer.key_depth}, {layer.value_depth}")
            times = [report.milliseconds(x) for x in (layer.conv_s, layer.aaconv_s, layer.attention_s)]
            body.append([name, layer.layers, *sizes, *times, *share(name, layer.added_s)])
        times = [
            sum(layer.count * getattr(layer, key) for layer in own) for key in ("conv_s", "aaconv_s", "attention_s")
        ]
        count = str(sum(layer.count for layer in own))
        body.append(
            [name, "all", count, *[""] * 3, *map(report.milliseconds, times), *share(name, times[1] - times[0])]
        )
    return report.table(columns, body, text=2)
