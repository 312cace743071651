"""Attention with its rows divided over devices: equal to one device, and no device holds a part of the maps."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aaconv import AAConv, models, ops

ROWS = {"spatial": 8}
DATA = {"data": 2, "spatial": 4}
FSDP = {"data": 2, "fsdp": 2, "spatial": 2}
GROUPS = {"group": 2, "data": 2, "spatial": 2}


def make_mesh(sizes, kind=AxisType.Auto):
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices)


def put(mesh, tree, *spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))), tree)


def out_and_gradients(attend, q, k, v, rel, scale):
    """The result, and the gradients of all arguments for a loss in which every output counts differently."""
    out, pull = jax.vjp(lambda q, k, v, rel, scale: attend(q, k, v, rel, scale=scale), q, k, v, rel, scale)
    weights = jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape).astype(out.dtype)
    if jax.typeof(out).sharding.mesh.are_all_axes_explicit:
        weights = jax.sharding.reshard(weights, jax.typeof(out).sharding)
    return out, pull(weights)


def on_one_device(attend, *arrays):
    return jax.jit(functools.partial(out_and_gradients, attend))(*arrays)


def assert_close(got, wanted, tolerance=2e-5):
    """To a share of each array's largest number."""

    def check(got, wanted):
        got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max() + 1e-6)

    jax.tree.map(check, got, wanted)


def arguments(inputs, space, *, dtype=np.float32, positions=True, **options):
    q, k, v, rel = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs(space, d=4, **options))
    return q, k, v, rel if positions else None, jnp.float32(0.4)


@pytest.mark.parametrize(
    "sizes,space,batch,positions",
    [
        (ROWS, (8, 12), (2,), True),
        (ROWS, (13, 6), (), True),  # three rows of the last devices are not there, and lines run along the rows
        (DATA, (16, 5), (4,), True),
        (DATA, (4, 9), (4,), False),
        (DATA, (6,), (3,), True),  # neither the rows nor the images can be divided evenly
        (FSDP, (5, 4, 3), (4,), True),
    ],
    ids=str,
)
def test_equals_one_device(inputs, sizes, space, batch, positions):
    mesh = make_mesh(sizes)
    arrays = arguments(inputs, space, batch=batch, positions=positions)
    attend = functools.partial(ops.relative_attention, spatial_ndim=len(space))
    got = jax.jit(functools.partial(out_and_gradients, attend))(*put(mesh, arrays))
    assert_close(got, on_one_device(attend, *arrays))
    if space[0] % mesh.shape["spatial"] == 0:
        assert "spatial" in got[0].sharding.spec


@pytest.mark.parametrize("implementation", ["factorised", "appended_codes", "pallas_tpu_interpret"])
def test_other_implementations_equal_one_device(inputs, implementation):
    arrays = arguments(inputs, (9, 4), batch=(2,), n=1)
    attend = functools.partial(ops.relative_attention, implementation=implementation, precision="highest")
    got = jax.jit(functools.partial(out_and_gradients, attend))(*put(make_mesh(DATA), arrays))
    assert_close(got, on_one_device(ops.relative_attention, *arrays))


def test_in_bfloat16(inputs):
    arrays = arguments(inputs, (8, 6), dtype=jnp.bfloat16)
    got = jax.jit(functools.partial(out_and_gradients, ops.relative_attention))(*put(make_mesh(DATA), arrays))
    assert got[0].dtype == got[1][0].dtype == jnp.bfloat16
    assert_close(got, on_one_device(ops.relative_attention, *arrays), 0.01)


@pytest.mark.parametrize("spec", [("data", "spatial"), (None, ("data", "spatial")), ("data", None, "spatial")], ids=str)
@pytest.mark.parametrize("implementation", [None, "factorised"])
def test_explicit_axes_say_how_rows_are_divided(inputs, spec, implementation):
    if implementation and spec != ("data", "spatial"):
        pytest.skip("one way of dividing shows that a whole map is gathered")
    mesh = make_mesh(DATA, AxisType.Explicit)
    q, k, v, *rest = arguments(inputs, (8, 4))
    attend = functools.partial(ops.relative_attention, implementation=implementation)
    with jax.set_mesh(mesh):
        arrays = *put(mesh, (q, k, v), *spec), *put(mesh, tuple(rest))
        got = jax.jit(functools.partial(out_and_gradients, attend))(*arrays)
    assert_close(got, on_one_device(ops.relative_attention, q, k, v, *rest))
    if implementation is None and spec[1]:
        assert got[0].sharding.spec[:2] == spec


def test_within_the_callers_shard_map_over_other_axes(inputs):
    # As batch norm over groups of replicas has it: the whole network and its gradient within one over "group".
    mesh = make_mesh(GROUPS)
    arrays = arguments(inputs, (4, 6), batch=(4,))
    batch, whole = PartitionSpec("group"), PartitionSpec()

    def attend(q, k, v, rel, scale):
        part = lambda q, k, v, rel, scale: ops.relative_attention(q, k, v, rel, scale=scale)
        specs = (batch, batch, batch, whole, whole)
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=batch, axis_names={"group"})(
            q, k, v, rel, scale
        )

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(batch, batch, batch, whole), out_specs=whole, axis_names={"group"}
    )
    def gradient_of_tables(q, k, v, rel):
        return jax.grad(lambda rel: jnp.sum(ops.relative_attention(q, k, v, rel) ** 2))(rel)

    placed = put(mesh, arrays)
    got = jax.jit(functools.partial(out_and_gradients, attend))(*placed)
    assert_close(got, on_one_device(ops.relative_attention, *arrays))
    wanted = jax.grad(lambda rel: jnp.sum(ops.relative_attention(*arrays[:3], rel) ** 2))(arrays[3])
    assert_close(jax.jit(gradient_of_tables)(*placed[:4]), wanted)


def test_under_vmap_and_remat(inputs):
    mesh = make_mesh(DATA)
    arrays = arguments(inputs, (8, 3))

    @jax.checkpoint
    def attend(q, k, v, rel, scale):
        return jax.vmap(lambda q, k, v: ops.relative_attention(q, k, v, rel, scale=scale))(q, k, v)

    got = jax.jit(functools.partial(out_and_gradients, attend))(*put(mesh, arrays))
    assert_close(got, on_one_device(ops.relative_attention, *arrays))


@pytest.mark.parametrize("space", [(96, 48), (48, 96)], ids=str)
def test_no_device_holds_a_part_of_the_maps(inputs, space):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    mesh = make_mesh(ROWS)
    q, v, rel = of(1, *space, 2, 4), of(1, *space, 2, 4), tuple(of(2 * size - 1, 4) for size in space)
    program = jax.jit(functools.partial(out_and_gradients, ops.relative_attention)).lower(q, q, v, rel, of()).compile()
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)
    pixels = math.prod(space)
    # A block of up to 128 queries to all keys, in both heads, is the most; an eighth of one head's map is more.
    assert largest <= 2 * pixels * 128 < pixels**2 / 8
    assert "all-gather" in program.as_text()


@pytest.mark.parametrize("kernel", ["cudnn", "tokamax"])
def test_kernels_for_as_many_queries_as_keys_are_refused(inputs, monkeypatch, kernel):
    monkeypatch.setattr("aaconv.ops.choice.reason_not", lambda *a, **k: None)
    q, k, v, rel, _ = put(make_mesh(DATA), arguments(inputs, (8, 3)))
    with pytest.raises(NotImplementedError, match=f"'{kernel}' cannot serve here: rows of the map are divided"):
        ops.relative_attention(q, k, v, rel, implementation=kernel)


def assert_learns_alike(module, images, mesh, *spec, **call):
    """A network's result and its gradients by all parameters and the images, on one device and on the mesh."""
    variables = module.init(jax.random.key(0), images, **call)

    def run(variables, images):
        def loss(params, images):
            out, updated = module.apply({**variables, "params": params}, images, mutable=["batch_stats"], **call)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out * weights), (out, updated)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], images)

    wanted = jax.jit(run)(variables, images)
    program = jax.jit(run).lower(put(mesh, variables), put(mesh, images, *spec)).compile()
    assert_close(program(put(mesh, variables), put(mesh, images, *spec)), wanted, 2e-4)
    return program.as_text()


def test_a_layer_equals_one_device(inputs):
    images = jax.random.normal(jax.random.key(1), (2, 16, 10, 3))
    layer = AAConv(8, (3, 3), strides=2, num_heads=2, min_key_depth=2)
    assert_learns_alike(layer, images, make_mesh(DATA), "data", "spatial")


@pytest.mark.slow
def test_a_network_equals_one_device():
    images = jax.random.normal(jax.random.key(1), (4, 64, 32, 3))
    network = models.create("aa_wrn_10_1", num_classes=3, num_heads=1)
    program = assert_learns_alike(network, images, make_mesh(DATA), "data", "spatial", train=True)
    assert "collective-permute" in program  # the rows around a device's part that its convolutions need
