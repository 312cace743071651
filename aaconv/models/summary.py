"""What a network is made of: parameters, FLOPs and attention, counted without running it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aaconv.layers import AAConv, BottleneckAttention, MultiHeadSelfAttention
from aaconv.ops import Choice, choose_implementation

IN_CONV_PLACE = (AAConv, BottleneckAttention)
"""Layers around attention that networks put in the place of a convolution."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer that multiplies, or normalises.

    Attributes:
      path: names from the network down to the layer, joined by ``/``.
      kind: ``conv``, ``dense``, ``attention`` (the two products of queries, keys and values) or the class name.
      parameters: of the layer itself, without its sub-layers.
      flops: for one image. A multiply-add is 2 in a convolution or projection and 1 in the products of
        attention, which is the counting under which the paper's figures come out.
      output_shape: without the batch.
    """

    path: str
    kind: str
    parameters: int
    flops: int
    output_shape: tuple[int, ...]

    @property
    def stage(self) -> str:
        """``stem``, ``stage1`` .. or ``head``: the part of the network this layer belongs to."""
        return _stage(self.path)


def _stage(path: str) -> str:
    first = path.split("/")[0]
    match = re.match(r"(stage\d+)", first)
    if match:
        return match.group(1)
    return "stem" if first.endswith("stem") else "head"


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attending layer.

    Attributes:
      path: names from the network down to the layer, joined by ``/``.
      layer_input, layer_output: spatial shapes of the layer around it that stands for a convolution.
      attends_at: spatial shape of the map it attends over.
      num_heads, key_depth, value_depth: over all heads, after rounding.
      conv_features: filters left to the convolution beside it.
      position_encoding: see `aaconv.AAConv`.
      choice: the implementation that runs on this machine and why, see `aaconv.ops.choose_implementation`.
      map_bytes: memory of its float32 attention maps for one image when they are stored,
        ``num_heads * (h * w) ** 2 * 4``.
    """

    path: str
    layer_input: tuple[int, ...]
    layer_output: tuple[int, ...]
    attends_at: tuple[int, ...]
    num_heads: int
    key_depth: int
    value_depth: int
    conv_features: int
    position_encoding: str
    choice: Choice

    @property
    def map_bytes(self) -> int:
        return self.num_heads * math.prod(self.attends_at) ** 2 * 4


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summarise` found; ``layers`` and ``attention`` in the order of the forward pass.

    Attributes:
      layers: all layers.
      attention: the attending ones.
      output_shapes: ``(stage, shape without the batch)`` of what the stages hand on, which is not always the last
        layer's: a layer that rescales may end in a number a channel.
    """

    layers: tuple[Layer, ...]
    attention: tuple[Attention, ...]
    output_shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def parameters(self) -> int:
        """Trainable parameters in all (batch statistics are not trained)."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> int:
        """FLOPs for one image, see `Layer`."""
        return sum(layer.flops for layer in self.layers)

    @property
    def training_flops(self) -> int:
        """FLOPs of a training step for one image: three times the forward pass, every multiply-add being 2.

        The backward pass has two products for each of the forward pass: for the inputs' gradients and for the weights'.
        Here the products of attention count 2 as well, because a chip's peak is counted so. What an implementation
        computes anew, normalisation, activations and the update are left out, as is usual for utilisation.
        """
        return 3 * sum(layer.flops * (2 if layer.kind == "attention" else 1) for layer in self.layers)

    def by_stage(self) -> dict[str, tuple[int, int, tuple[int, ...]]]:
        """Returns ``{stage: (parameters, flops, output shape)}`` in forward order."""
        stages: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        shapes = dict(self.output_shapes)
        for layer in self.layers:
            parameters, flops, _ = stages.get(layer.stage, (0, 0, ()))
            shape = shapes.get(layer.stage, layer.output_shape)
            stages[layer.stage] = (parameters + layer.parameters, flops + layer.flops, shape)
        return stages

    def computed_by(self) -> list[str]:
        """Says which implementation computes which layers' attention, and why, in a line each."""
        layers: dict[Choice, list[str]] = {}
        for layer in self.attention:
            layers.setdefault(layer.choice, []).append(layer.path.removesuffix("/attention"))
        return [
            f"{choice.implementation!r}, {choice.reason}: "
            + ("all of them" if len(paths) == len(self.attention) else ", ".join(paths))
            for choice, paths in layers.items()
        ]


def summarise(model: nn.Module, image_shape: Sequence[int]) -> Summary:
    """Counts a network's parameters and FLOPs and lists what attends, by shapes alone.

    Args:
      model: a network of `aaconv.models.create`, or any Linen module called as ``model(images, train=False)``
        that is made of `flax.linen.Conv`, `flax.linen.Dense`, `aaconv.AAConv` and normalisations.
      image_shape: ``(h, w, c)``.

    Returns:
      A `Summary`. Nothing is computed and no memory is taken: the network is traced once. A layer that is called
      twice has its FLOPs twice and its parameters once.

    Raises:
      ValueError: some parameters belong to no such layer's own call, as under `flax.linen.scan` or
        `flax.linen.vmap`, so that the figures would be wrong.

    Example:
      >>> from aaconv import models
      >>> summary = summarise(models.create("aa_resnet50"), (224, 224, 3))
      >>> f"{summary.parameters / 1e6:.1f}M {summary.flops / 1e9:.1f}G {len(summary.attention)} layers attend"
      '25.8M 8.3G 13 layers attend'
    """
    layers: list[Layer] = []
    attention: list[Attention] = []
    output_shapes: dict[str, tuple[int, ...]] = {}
    around: list[tuple[nn.Module, tuple[int, ...]]] = []  # modules being called, outermost first

    def record(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or any(module is m for m, _ in around):
            return next_fun(*args, **kwargs)  # the second is nn.Conv.__call__ through AAConv's
        shape = tuple(args[0].shape) if args and hasattr(args[0], "shape") else ()
        around.append((module, shape))
        try:
            out = next_fun(*args, **kwargs)
        finally:
            around.pop()
        _record(module, shape, out, around, layers, attention)
        if len(module.path) == 1 and hasattr(out, "shape"):
            output_shapes[_stage(module.path[0])] = tuple(out.shape[1:])
        return out

    def trace():
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)

    variables = jax.eval_shape(trace)
    summary = Summary(tuple(_once(layers)), tuple(attention), tuple(output_shapes.items()))
    whole = count_parameters(nn.meta.unbox(variables.get("params", {})))
    if summary.parameters != whole:
        raise ValueError(
            f"the layers of {type(model).__name__} have {summary.parameters:,} parameters by their calls and {whole:,} "
            "in all: layers under nn.scan or nn.vmap cannot be counted; summarise the repeated module by itself"
        )
    return summary


def _once(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Leaves a layer's parameters to the first of its calls."""
    seen: set[str] = set()
    for layer in layers:
        yield dataclasses.replace(layer, parameters=0) if layer.path in seen else layer
        seen.add(layer.path)


def count_parameters(params: Any) -> int:
    """Returns the number of elements in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _choice(module: MultiHeadSelfAttention, space: tuple[int, ...], dtype: Any) -> Choice:
    return choose_implementation(
        (*space, module.num_heads, module.key_depth // module.num_heads),
        module.value_depth // module.num_heads,
        dtype,
        spatial_ndim=module.spatial_ndim,
        positions=module.position_encoding == "relative",
        implementation=module.implementation,
    )


def _record(module, shape, out, around, layers, attention) -> None:
    path = "/".join(module.path)
    own = {
        name: value
        for name, value in nn.meta.unbox(dict(module.variables.get("params", {}))).items()
        if not isinstance(value, dict) and hasattr(value, "shape")
    }
    if isinstance(module, MultiHeadSelfAttention):
        space = shape[-1 - module.spatial_ndim : -1]
        # Content logits and the weighted sum; the H + W relative logits a query are left out, as in the paper.
        flops = math.prod(space) ** 2 * (module.key_depth + module.value_depth)
        layers.append(Layer(path, "attention", 0, flops, tuple(out.shape[1:])))
        conv, conv_shape = around[-1] if around and isinstance(around[-1][0], IN_CONV_PLACE) else (None, shape)
        attention.append(
            Attention(
                path=path,
                layer_input=tuple(conv_shape[-1 - module.spatial_ndim : -1]),
                layer_output=tuple(space),  # until the convolution around it returns
                attends_at=tuple(space),
                num_heads=module.num_heads,
                key_depth=module.key_depth,
                value_depth=module.value_depth,
                conv_features=conv.features - module.value_depth if conv is not None else 0,
                position_encoding=module.position_encoding,
                choice=_choice(module, space, out.dtype),
            )
        )
        return
    if isinstance(module, IN_CONV_PLACE) and attention and attention[-1].path.startswith(path + "/"):
        ndim = len(attention[-1].attends_at)
        attention[-1] = dataclasses.replace(attention[-1], layer_output=tuple(out.shape[-1 - ndim : -1]))
    if not own:
        return
    flops, kind = 0, type(module).__name__
    if isinstance(module, nn.Conv | nn.Dense):
        kind = "conv" if isinstance(module, nn.Conv) else "dense"
        positions = math.prod(out.shape[1:-1])
        flops = 2 * positions * math.prod(own["kernel"].shape)
    output_shape = tuple(out.shape[1:]) if hasattr(out, "shape") else ()
    layers.append(Layer(path, kind, count_parameters(own), flops, output_shape))
