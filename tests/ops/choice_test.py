"""Which implementation runs, and what is said of those that cannot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from aaconv import ops

SHAPE = (2, 28, 28, 8, 20)
ELSEWHERE = ["cudnn", "tokamax", "pallas_tpu"]


@pytest.mark.parametrize(
    "platform,dtype,implementation",
    [
        ("cpu", jnp.float32, "blockwise"),
        ("cpu", jnp.float64, "blockwise"),
        ("cuda", jnp.bfloat16, "blockwise"),
        ("tpu", jnp.bfloat16, "pallas_tpu"),
        ("tpu", jnp.float32, "pallas_tpu"),
        ("tpu", jnp.float16, "blockwise"),
    ],
)
def test_choice_by_platform_and_dtype(platform, dtype, implementation):
    choice = ops.choose_implementation(SHAPE, 4, dtype, platform=platform)
    assert choice.implementation == implementation
    assert choice.reason


def test_on_a_tpu_a_map_that_does_not_fit_the_kernel_goes_block_by_block():
    choice = ops.choose_implementation((1, 512, 512, 8, 64), 64, jnp.float32, platform="tpu")
    assert choice.implementation == "blockwise"
    assert "VMEM" in choice.reason


@pytest.mark.parametrize(
    "kind,implementation",
    [("TPU v4", "blockwise"), ("TPU v5 lite", "pallas_tpu"), ("TPU v5p", "pallas_tpu"), ("TPU v99", "blockwise")],
)
def test_on_a_tpu_with_little_vmem_large_maps_go_block_by_block(kind, implementation):
    choice = ops.choose_implementation((64, 64, 8, 64), 64, jnp.bfloat16, platform="tpu", device_kind=kind)
    assert choice.implementation == implementation
    small = ops.choose_implementation(SHAPE, 8, jnp.bfloat16, platform="tpu", device_kind=kind)
    assert small.implementation == "pallas_tpu"


def test_on_a_tpu_a_precision_that_the_kernel_does_not_know_goes_block_by_block():
    choice = ops.choose_implementation(SHAPE, 4, jnp.float32, platform="tpu", precision="F32_F32_F32")
    assert choice.implementation == "blockwise"
    assert "jax.lax.Precision" in choice.reason


def test_a_name_is_obeyed():
    assert ops.choose_implementation(SHAPE, 4, jnp.float32, implementation="skew") == ops.Choice("skew", "asked for")


@pytest.mark.parametrize("implementation", ELSEWHERE)
def test_what_cannot_run_here_says_why(implementation):
    q = jnp.ones((1, 3, 3, 1, 8), jnp.bfloat16)
    message = f"implementation='{implementation}' cannot serve here: .*(GPU|TPU|not installed)"
    with pytest.raises(NotImplementedError, match=message):
        ops.relative_attention(q, q, q, None, implementation=implementation)


def test_every_name_is_either_run_by_the_shared_tests_or_refused_here():
    for name in ops.IMPLEMENTATIONS:
        if name not in ELSEWHERE:
            assert ops.choose_implementation(SHAPE, 4, jnp.float32, implementation=name).implementation == name


def test_block_sizes_for_what_takes_none_are_refused_unless_it_was_chosen():
    q = jnp.ones((1, 4, 4, 1, 8))
    for_a_tpu = ops.BlockSizes(key=128)
    with pytest.raises(
        ValueError, match=r"BlockSizes\(key=128\) with implementation='skew', which takes no block sizes"
    ):
        ops.relative_attention(q, q, q, None, implementation="skew", block_sizes=for_a_tpu)
    ops.relative_attention(q, q, q, None, block_sizes=for_a_tpu)


@pytest.mark.parametrize("platform,kernel", [("tpu", True), ("cpu", False), ("cuda", False)])
def test_the_mesh_that_the_queries_live_on_says_the_platform(platform, kernel):
    # So a program for devices that are not here is traced as it would be there.
    mesh = AbstractMesh((2,), ("data",), abstract_device=AbstractDevice("some device", 1, platform))
    q = jax.ShapeDtypeStruct((2, 3, 3, 1, 8), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    program = str(jax.make_jaxpr(lambda q: ops.relative_attention(q, q, q, None))(q))
    assert ("pallas_call" in program) == kernel
