"""The TPU kernel: values and gradients in interpret mode, and what the real TPU compiler makes of it where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aaconv.ops import pallas_tpu, relative_attention
from aaconv.ops.blocks import BlockSizes


def attend(q, k, v, rel, *, scale=0.6, spatial_ndim=2, blocks=None):
    # In interpret mode on a CPU this is float32 with float32 products.
    return pallas_tpu.attend(q, k, v, rel, scale, spatial_ndim=spatial_ndim, blocks=blocks, interpret=True)


def with_gradients(f, q, k, v, rel):
    """Returns the result and the gradients of q, k, v and the tables for one cotangent."""
    cotangent = np.cos(np.arange(v.size)).reshape(v.shape)
    out, back = jax.vjp(f, q, k, v, rel)
    return jax.tree.leaves((out, back(jnp.asarray(cotangent, out.dtype))))


def exact(q, k, v, rel, *, scale=0.6, spatial_ndim=2):
    """The same in float64, by `factorised`, which attention_test.py holds against loops."""
    f = lambda *a: relative_attention(*a, scale=scale, spatial_ndim=spatial_ndim, implementation="factorised")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (q, k, v, rel))
        return [np.asarray(x) for x in with_gradients(jax.jit(f), *wide)]


def check(inputs, space, *, positions=True, blocks=None, dtype=jnp.float32, tolerance=3e-6, **kwargs):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs(space, **kwargs))
    rel = rel if positions else None
    f = jax.jit(lambda *a: attend(*a, spatial_ndim=len(space), blocks=blocks))
    got = with_gradients(f, q, k, v, rel)
    wanted = exact(q, k, v, rel, spatial_ndim=len(space))
    assert len(got) == len(wanted) == 4 + (len(space) if positions else 0)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("space", [(6,), (5, 3), (1, 7), (2, 3, 2)], ids=str)
def test_values_and_gradients(inputs, space):
    check(inputs, space)


@pytest.mark.parametrize(
    "space,query,key,positions",
    [
        ((13, 17), 128, 64, True),
        ((13, 17), 128, 64, False),
        ((19, 14), 128, 272, True),
        ((3, 11, 7), 128, 56, True),
        ((300,), 256, 48, True),
    ],
    ids=str,
)
def test_several_blocks_with_padding_in_the_last(inputs, space, query, key, positions):
    check(inputs, space, blocks=BlockSizes(query=query, key=key), positions=positions, batch=(1,), n=1)


@pytest.mark.parametrize("d,e", [(1, 128), (128, 1), (24, 8)])
def test_depths(inputs, d, e):
    check(inputs, (4, 5), d=d, e=e, batch=(1,), tolerance=1e-5)


@pytest.mark.parametrize("blocks", [None, BlockSizes(query=128, key=80)], ids=["chosen", "small"])
def test_bfloat16(inputs, blocks):
    # 2**-7 is two units in the last place of what is largest: b, the weights and the result are rounded once each.
    check(inputs, (14, 15), d=20, e=8, batch=(1,), n=2, dtype=jnp.bfloat16, blocks=blocks, tolerance=2**-6)


def test_many_maps_in_a_step_and_both_halves(inputs):
    check(inputs, (3, 3), batch=(5, 2), n=4)


@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_any_batch_shape(inputs, batch):
    q, k, v, rel = jax.tree.map(jnp.asarray, inputs((3, 4), batch=batch, dtype=np.float32))
    got = with_gradients(jax.jit(attend), q, k, v, rel)
    assert [x.shape for x in got] == [x.shape for x in jax.tree.leaves((v, q, k, v, rel))]
    for b in np.ndindex(*batch):
        wanted = relative_attention(q[b], k[b], v[b], rel, scale=0.6, implementation="factorised")
        np.testing.assert_allclose(got[0][b], wanted, atol=1e-5)


@pytest.mark.parametrize("key", [None, 64], ids=["one block", "several"])
def test_nan_stays_in_its_query(inputs, key):
    q, k, v, rel = inputs((12, 12), dtype=np.float32)
    q[1, 2, 3, 0, 0] = np.nan
    got = np.asarray(attend(q, k, v, rel, blocks=BlockSizes(key=key)))
    where = np.zeros(got.shape, bool)
    where[1, 2, 3, 0] = True
    np.testing.assert_array_equal(np.isnan(got), where)


def test_large_logits_do_not_overflow(inputs):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs((12, 12), batch=(1,)))
    got = attend(100 * q, k, v, rel, blocks=BlockSizes(key=64))
    np.testing.assert_allclose(got, exact(100 * q, k, v, rel)[0], atol=1e-3)


@pytest.mark.parametrize("scale", [0, -0.5, 1e-3])
def test_keys_that_pad_a_block_stay_out_at_any_scale(inputs, scale):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs((3, 5), batch=(1,)))
    np.testing.assert_allclose(attend(q, k, v, rel, scale=scale), exact(q, k, v, rel, scale=scale)[0], atol=1e-5)


def test_blocks_do_not_reach_past_what_the_maps_hold(inputs):
    # Two blocks of 256 for 300 pixels: on the hardware a third tile of 128 lanes is there, a fourth is not.
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs((300,), batch=(1,), n=1, d=3))
    f = lambda *a: attend(*a, spatial_ndim=1, blocks=BlockSizes(query=256))
    assert "f32[1,3,512]" in str(jax.make_jaxpr(f)(q, k, v, rel))


def test_scale_as_an_array_has_a_gradient(inputs):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs((3, 4)))
    loss = jax.jit(lambda scale: jnp.sum(attend(q, k, v, rel, scale=scale) ** 2))
    near = [loss(jnp.float32(scale)) for scale in (0.59, 0.61)]
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0.6)), (near[1] - near[0]) / 0.02, rtol=1e-3)


@pytest.mark.parametrize("tables", [None, 0], ids=["shared tables", "own tables"])
def test_vmap(inputs, tables):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs((3, 4), batch=(3, 2)))
    if tables is not None:
        rel = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), rel)
    f = lambda *a: with_gradients(attend, *a)
    got = jax.jit(jax.vmap(f, in_axes=(0, 0, 0, tables)))(q, k, v, rel)
    f = jax.jit(f)
    for i in range(3):
        own = rel if tables is None else jax.tree.map(lambda x, i=i: x[i], rel)
        for a, b in zip(got, f(q[i], k[i], v[i], own), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_each_device_takes_its_part(inputs, kind):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs((3, 4), batch=(8,)))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2, 3)))
    wanted = step(q, k, v, rel)
    args = *(jax.device_put(x, split) for x in (q, k, v)), jax.device_put(rel, whole)
    for a, b in zip(jax.tree.leaves(step(*args)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
    program = step.lower(*args).compile().as_text()
    assert "all-gather" not in program
    assert "all-reduce" in program  # the tables' gradients


def test_a_batch_that_does_not_divide_the_mesh_still_works(inputs):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs((3, 4), batch=(3,)))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    args = jax.device_put((q, k, v, rel), NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_allclose(jax.jit(attend)(*args), attend(q, k, v, rel), atol=1e-6)


def test_lowers_for_tpu_with_a_symbolic_batch():
    (b,) = jax.export.symbolic_shape("b")
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    f = lambda *a: jax.vjp(lambda *x: pallas_tpu.attend(*x, 0.2, spatial_ndim=2), *a[:-1])[1](a[-1])
    args = of(b, 5, 6, 2, 3), of(b, 5, 6, 2, 3), of(b, 5, 6, 2, 4), (of(9, 3), of(11, 3)), of(b, 5, 6, 2, 4)
    exported = jax.export.export(jax.jit(f), platforms=["tpu"])(*args)
    assert exported.mlir_module().count("@tpu_custom_call") == 2
    assert [str(x.shape[0]) for x in exported.out_avals] == ["b", "b", "b", "9", "11"]


@pytest.mark.parametrize(
    "blocks,dtype,message",
    [
        (BlockSizes(query=100), np.float32, r"query=100.* multiple of the 128 lanes.*use 128"),
        (BlockSizes(key=12), np.float32, r"key=12.* multiple of the 8 rows.* float32: use 16"),
        (BlockSizes(key=24), jnp.bfloat16, r"key=24.* multiple of the 16 rows.* bfloat16: use 32"),
    ],
    ids=["query", "key", "key in bfloat16"],
)
def test_block_sizes_that_do_not_fit(inputs, blocks, dtype, message):
    with pytest.raises(ValueError, match=message):
        attend(*jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs((3, 4))), blocks=blocks)


def test_says_what_it_cannot_serve(inputs):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), inputs((3, 4)))
    with pytest.raises(NotImplementedError, match="bfloat16 and float32, not float16"):
        attend(q, k, v, rel)
    assert pallas_tpu.reason_not((8, 112, 112, 8, 20), 8, jnp.bfloat16) is None
    assert "512x512 with depths 20 and 8" in str(pallas_tpu.reason_not((512, 512, 8, 20), 8, jnp.bfloat16))


def test_costs_are_those_of_the_maps():
    maps = jnp.zeros((3, 8, 16 * 16), jnp.bfloat16)
    cost = pallas_tpu.costs((16, 16), 8, 8, maps=3, dtype=jnp.bfloat16)
    kept = 3 * 16 * 16 * 4
    assert cost["forward"]["hbm_bytes"] == 4 * maps.nbytes + kept
    assert cost["backward"]["hbm_bytes"] == 8 * maps.nbytes + kept
    assert cost["forward"]["exponentials"] == cost["backward"]["exponentials"] == 3 * 256**2


AHEAD_OF_TIME = """
    import json, re, sys
    import jax, jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from aaconv.ops import pallas_tpu

    chip, devices, *sizes = sys.argv[1:]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
    mesh = Mesh(np.array(topology.devices[: int(devices)]), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def gradients(q, k, v, rel, do):
        return jax.vjp(lambda *a: pallas_tpu.attend(*a, 20**-0.5, spatial_ndim=2), q, k, v, rel)[1](do)

    for size in map(int, sizes):
        of = lambda *shape, sharding=split: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        maps = [of(128, size, size, 8, depth) for depth in (20, 20, 8)]
        table = of(2 * size - 1, 20, sharding=whole)
        lowered = jax.jit(gradients).trace(*maps, (table, table), maps[2]).lower(lowering_platforms=("tpu",))
        # The arrays between the kernels kept out of VMEM, where small ones would not count.
        for options in {}, {"xla_tpu_scoped_vmem_limit_kib": "122880"}:
            compiled = lowered.compile(compiler_options=options)
            program = compiled.as_text()
            print(json.dumps({
                "temporaries": compiled.memory_analysis().temp_size_in_bytes,
                "kernels": program.count('custom_call_target="tpu_custom_call"'),
                "all-gather": len(re.findall("all-gather(-start)?[(]", program)),
                "all-reduce": len(re.findall("all-reduce(-start)?[(]", program)),
            }))
"""


def compile_ahead(chip, devices, *sizes):
    """Compiles the gradient of all five inputs, B 128, n 8, d 20, e 8, bfloat16."""
    return [json.loads(line) for line in run_ahead(AHEAD_OF_TIME, chip, devices, *sizes)]


def run_ahead(program, *arguments):
    """Runs a program that compiles for TPUs in a process of its own; gives the lines of its output."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        # Two workers may compile at a time: no TPU is opened.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


ON_SMALL_CHIPS = """
    import sys
    import jax, jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from aaconv import ops

    topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    mesh = Mesh(np.array(topology.devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    for size, depth, dtype in (14, 128, jnp.float32), (28, 20, jnp.bfloat16), (64, 64, jnp.bfloat16):
        of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        q, table = of(2, size, size, 8, depth), of(2 * size - 1, depth)
        loss = lambda q, k, v, *rel: ops.relative_attention(q, k, v, rel).sum()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(jax.grad(loss, range(5))).trace(q, q, q, table, table)
        program = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        print(size, program.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.parametrize("chip,kernels", [("v4:2x2x1", [2, 2, 0]), ("v5p:2x2x1", [2, 2, 2])])
def test_the_default_compiles_for_chips_with_less_vmem(chip, kernels):
    found = run_ahead(ON_SMALL_CHIPS, chip)
    assert [line.split() for line in found] == [[str(s), str(n)] for s, n in zip((14, 28, 64), kernels, strict=True)]


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_the_tpu_compiler_takes_it_in_linear_memory(chip):
    small, small_in_hbm, large, large_in_hbm = compile_ahead(chip, 1, 28, 56)
    assert all(found["kernels"] == 2 for found in (small, large))
    assert max(small["temporaries"], small_in_hbm["temporaries"]) < 0.25e9
    assert max(large["temporaries"], large_in_hbm["temporaries"]) < 1e9
    assert large_in_hbm["temporaries"] < 4.5 * small_in_hbm["temporaries"]


def test_the_tpu_compiler_gathers_nothing_on_a_mesh():
    found, _ = compile_ahead("v5e:2x2", 4, 28)
    assert found["kernels"] == 2
    assert found["all-gather"] == 0
    assert found["all-reduce"] > 0
