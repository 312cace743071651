"""What every test runs under: eight simulated CPU devices, strict shapes, and where the real data lies."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# In the environment, before jax is imported, so that the processes which tests start have it too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else an installed libtpu or CUDA plugin is probed
# Many tests compile the same step in another process. One folder a worker: jax writes its files in
# place, and another worker could read half of one.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).resolve().parents[1] / ".pytest_cache/jax" / os.environ.get("PYTEST_XDIST_WORKER", "alone")),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# A test compiles for longer than it runs. The programs, their fusions and buffers stay the same: only LLVM,
# which turns them into instructions, does less. A third of the time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import pytest
from absl import flags

REPOSITORY = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    # grain reads absl flags, which refuse to be read before somebody has parsed them.
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_look_through() -> Iterator[None]:
    """Takes what a module leaves out of later garbage collections: jax keeps all that it traced, a second's look."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tfds_dir() -> str:
    """The folder of prepared TFDS data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("TFDS_DATA_DIR") or REPOSITORY.parent / "shared" / "tfds")
    if not folder.is_dir():
        pytest.skip(f"no prepared data sets at {folder}: set TFDS_DATA_DIR to a folder of TFDS data sets")
    return str(folder)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Any]:
    """A Slurm of this machine's own, see tests/slurm_cluster.py; the test is skipped where there cannot be one."""
    spec = importlib.util.spec_from_file_location("slurm_cluster", Path(__file__).with_name("slurm_cluster.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = module.Slurm.missing()
    if missing:
        pytest.skip(f"no {', '.join(missing)} on this machine: install slurm-wlm and munge (Debian's names)")
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(module.Slurm(tmp_path_factory.mktemp("slurm")).running())
        except (AssertionError, OSError) as error:
            pytest.skip(f"Slurm does not start on this machine: {error}")
        yield cluster
