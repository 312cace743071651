"""Which implementation of relative attention runs: by name, or by platform, shape and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax

from aaconv.errors import close_matches

IMPLEMENTATIONS: dict[str, str] = {
    "factorised": "relative logits as H + W numbers a query, added to the content logits by broadcasting",
    "skew": "the paper's own algorithm: relative logits by padding, reshaping and tiling (appendix of Bello et al.)",
    "explicit": "one relative embedding for each pair of positions, (HW)^2 d of them (Shaw et al. 2018)",
    "blockwise": "linear memory in plain XLA: a block of query lines at a time, forward and backward",
    "appended_codes": "wider queries and keys as the GPU kernels are given them, in plain XLA: to check values",
    "cudnn": "linear memory on NVIDIA GPUs: cuDNN's flash attention of wider queries and keys",
    "tokamax": "linear memory on NVIDIA GPUs: tokamax's flash attention of wider queries and keys",
    "pallas_tpu": "linear memory on TPUs: our kernel, which forms the relative logits in VMEM",
    "pallas_tpu_interpret": "our TPU kernel as ordinary operations, slow, on any platform: to check values",
}
"""What ``relative_attention(..., implementation=)`` knows, and how each does it."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation, one of `IMPLEMENTATIONS`, and why it runs."""

    implementation: str
    reason: str


def choose_implementation(
    shape: Sequence[int],
    e: int,
    dtype: jnp.dtype,
    *,
    spatial_ndim: int = 2,
    positions: bool = True,
    implementation: str | None = None,
    platform: str | None = None,
    device_kind: str | None = None,
    precision: lax.PrecisionLike = None,
) -> Choice:
    """The implementation that `relative_attention` runs.

    Without a name it follows what was measured, see experiments/attention_cost:

    ========  ==================================================================================
    platform  choice
    ========  ==================================================================================
    cpu       ``blockwise``: ahead of all others from 28 x 28 up, about level with them below, and of
              linear memory
    tpu       ``pallas_tpu`` where it can serve, by compiled memory and counted traffic (never
              timed on a TPU yet); ``blockwise`` elsewhere
    others    ``blockwise``: nothing was measured on a GPU yet, and it serves every shape
    ========  ==================================================================================

    Args:
      shape: of the queries, ``(*b, *space, n, d)``; the batch may be left out.
      e: value depth a head.
      dtype: of queries, keys and values.
      spatial_ndim: number of spatial axes.
      positions: whether there are tables.
      implementation: a name that was asked for.
      platform: ``cpu``, ``tpu``, ``cuda``...; None for the one jax runs on.
      device_kind: as of `jax.Device`, e.g. ``TPU v4``; None for that of the devices jax runs on, where the platform is
        theirs, and else any.
      precision: of the matrix products.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the named implementation cannot serve; the message says why.

    Example:
      >>> choose_implementation((28, 28, 8, 20), 4, "float32", platform="cpu").implementation
      'blockwise'
    """
    here = device_of(None)
    platform = platform or here[0]
    if device_kind is None:
        device_kind = here[1] if platform == here[0] else ""
    problem: dict[str, Any] = {
        "device_kind": device_kind,
        "e": e,
        "dtype": jnp.dtype(dtype),
        "spatial_ndim": spatial_ndim,
        "positions": positions,
        "precision": precision,
    }
    if implementation is not None:
        check_name(implementation)
        reason = reason_not(implementation, shape, platform=platform, **problem)
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot serve here: {reason}")
        return Choice(implementation, "asked for")
    if platform == "tpu":
        reason = reason_not("pallas_tpu", shape, platform=platform, **problem)
        if reason is None:
            return Choice("pallas_tpu", "least memory and traffic on a TPU, as compiled")
        return Choice("blockwise", f"pallas_tpu cannot serve: {reason}")
    if platform == "cpu":
        return Choice("blockwise", "the fastest that was measured on CPUs, in linear memory")
    return Choice("blockwise", f"serves every shape in linear memory; not measured on {platform} yet")


def check_name(implementation: str | None) -> None:
    """Raises ValueError for a name that is neither None nor one of `IMPLEMENTATIONS`."""
    if implementation is not None and implementation not in tuple(IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
            f"{close_matches(str(implementation), IMPLEMENTATIONS)}"
        )


def reason_not(
    implementation: str,
    shape: Sequence[int],
    *,
    e: int,
    dtype: jnp.dtype,
    spatial_ndim: int,
    positions: bool,
    platform: str,
    device_kind: str = "",
    precision: lax.PrecisionLike = None,
) -> str | None:
    """Says why the named implementation cannot serve a problem on a platform, or returns None if it can."""
    if implementation in ("cudnn", "tokamax"):
        if platform != "cuda":
            return f"it runs on NVIDIA GPUs, and this is {platform}"
        from aaconv.ops import appended_codes

        find = {"cudnn": appended_codes.reason_not_cudnn, "tokamax": appended_codes.reason_not_tokamax}
        return find[implementation](shape, e, dtype, spatial_ndim=spatial_ndim, positions=positions)
    if implementation in ("pallas_tpu", "pallas_tpu_interpret"):
        if implementation == "pallas_tpu" and platform != "tpu":
            return f"it runs on TPUs, and this is {platform}; pallas_tpu_interpret checks its values anywhere"
        from aaconv.ops import pallas_tpu

        return pallas_tpu.reason_not(
            shape,
            e,
            dtype,
            spatial_ndim=spatial_ndim,
            positions=positions,
            precision=precision,
            device_kind=device_kind if implementation == "pallas_tpu" else "",
        )
    return None


def device_of(x: jax.Array | None) -> tuple[str, str]:
    """Platform and kind of the devices that a computation on ``x`` will run on, as far as can be told while tracing.

    The mesh that ``x`` lives on says it, also ahead of time for devices that are not here; else the
    device of an array, the default device or the default backend. The kind is that of `jax.Device`, "" if not known.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    if x is not None:
        meshes.insert(0, jax.typeof(x).sharding.mesh)
    for mesh in meshes:
        device = getattr(mesh, "abstract_device", None)
        if getattr(device, "platform", None):
            return _named(device)
    if x is not None and not isinstance(x, core.Tracer) and hasattr(x, "devices"):
        return _named(next(iter(x.devices())))
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None:
        default = jax.default_backend()
    return _named(jax.local_devices(backend=default)[0] if isinstance(default, str) else default)


def _named(device: Any) -> tuple[str, str]:
    platform = str(device.platform)
    return {"gpu": "cuda"}.get(platform, platform), str(device.device_kind)
