"""Programs compiled ahead of time, here or for a TPU that is not here: what they need, without running them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from aaconv import parallel
from aaconv.bench import report, traffic

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")  # examples, one a generation
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT])"
# Both forms the TPU compiler has of saying it.
_TOO_LARGE = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE),
)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the compiler says of one program.

    Attributes:
      temporaries: bytes beside arguments and results; None where the program was refused.
      arguments, results: bytes of these; donated arguments count as arguments alone.
      moved: bytes between the device's memory and its cores, see `traffic.hbm_bytes`; None where the program's text
        does not say.
      refused: why it does not fit, in the compiler's figures; "" where it does.
      required: bytes it would need on the device, where it was refused.
      message: all that the compiler said, where it was refused.
    """

    temporaries: int | None = None
    arguments: int | None = None
    results: int | None = None
    moved: int | None = None
    refused: str = ""
    required: int | None = None
    message: str = ""

    @property
    def total(self) -> int | None:
        """Bytes in all."""
        if self.temporaries is None:
            return self.required
        return self.temporaries + (self.arguments or 0) + (self.results or 0)


def account(compile: Callable[[], Any]) -> tuple[Any, Needs]:
    """Compiles, and reads what the program needs.

    Args:
      compile: returns an executable, as does the ``compile`` of what `jax.jit` lowered.

    Returns:
      The executable and its needs; None instead of the executable where the compiler refuses the program because
      it does not fit the device's memory.
    """
    try:
        compiled = compile()
    except jax.errors.JaxRuntimeError as error:
        needs = _refusal(str(error))
        if needs is None:
            raise
        return None, needs
    return compiled, needs_of(compiled)


def needs_of(compiled: Any) -> Needs:
    """Reads an executable's own account of itself."""
    memory, moved = compiled.memory_analysis(), _moved(compiled)
    if memory is None:
        return Needs(moved=moved)
    return Needs(
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        moved=moved,
    )


def _moved(compiled: Any) -> int | None:
    text = compiled.as_text()
    try:
        return traffic.hbm_bytes(text) if text else None
    except ValueError:  # a loop whose length depends on the data
        return None


def topology_devices(name: str) -> tuple[Device, ...]:
    """Returns the devices of a TPU that need not be here, to compile for with libtpu.

    Sets jax to run on the CPU and to do without its compilation cache, for the rest of the process: call it before
    anything is compiled.

    Args:
      name: generation and layout, e.g. ``v5e:2x2``.

    Raises:
      ValueError: libtpu is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    # Without these libtpu looks for the machine's metadata server, complains that this is no TPU machine, and lets
    # only one process compile at a time.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # else jax takes the TPU compiler for a TPU
    jax.config.update("jax_enable_compilation_cache", False)  # what is in it could not be loaded without a TPU
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        if "not installed" in str(error):
            raise ValueError(
                f"--topology {name} needs the TPU compiler, which runs without a TPU: pip install libtpu"
            ) from error
        raise ValueError(
            f"--topology {name} is refused by the TPU compiler ({report.first_line(error)}): give a generation and a "
            f"layout, e.g. {', '.join(TOPOLOGIES)}"
        ) from error


def mesh_of(device: Device) -> Mesh:
    """Returns the mesh of one device, which need not be here."""
    return parallel.make_mesh(devices=[device])


def tracing_for(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Inside, what is traced knows the platform of a mesh that is not here, which only the context says."""
    if mesh.devices.flat[0] in jax.devices():
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _refusal(message: str) -> Needs | None:
    for form in _TOO_LARGE:
        found = form.search(message)
        if found:
            needed, unit, available, available_unit = found.groups()
            return Needs(
                refused=f"needs {needed} {unit}iB, the chip has {available} {available_unit}iB",
                required=int(float(needed) * _UNITS[unit]),
                message=message,
            )
    if "RESOURCE_EXHAUSTED" in message:
        return Needs(refused="does not fit: " + message.strip().splitlines()[0][:160], message=message)
    return None
