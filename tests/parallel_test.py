"""The mesh, how arrays lie on it, and that a step gives the same numbers however it is divided."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from aaconv import AAConv, optim, parallel, train
from aaconv.config import default_config
from aaconv.models.resnet import BasicBlock, ResNet

BATCH, SIDE, CLASSES = 32, 32, 5

# The mesh


def test_mesh_takes_all_or_as_many_as_told():
    assert parallel.make_mesh().shape == {"group": 1, "data": 8, "fsdp": 1, "spatial": 1}
    mesh = parallel.make_mesh(2)
    assert mesh.shape == {"group": 1, "data": 2, "fsdp": 1, "spatial": 1}
    assert list(mesh.devices.flat) == jax.devices()[:2]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_mesh_fills_one_axis_with_what_the_others_leave():
    assert parallel.make_mesh(-1, 2, 2).shape == {"group": 1, "data": 2, "fsdp": 2, "spatial": 2}
    assert parallel.make_mesh(1, -1, 2).shape["fsdp"] == 4
    assert parallel.make_mesh(2, 1, -1).shape["spatial"] == 4
    grouped = parallel.make_mesh(-1, 2, batch_norm_devices=4).shape
    assert grouped == {"group": 2, "data": 2, "fsdp": 2, "spatial": 1}
    assert parallel.make_mesh(batch_norm_devices=8).shape["group"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), r"mesh.data=0 must be at least 1, or -1 for what the others leave of the 8 cpu devices"),
        ((-1, -2), "mesh.fsdp=-2 must be at least 1"),
        ((9,), "mesh.data=9, mesh.fsdp=1, mesh.spatial=1 need 9 devices: there are 8; set mesh.data=-1"),
        ((-1, 3), "mesh.data=-1, mesh.fsdp=3, .* do not divide the 8 cpu devices: use sizes whose product divides 8"),
        ((-1, -1), "at most one of them can be -1"),
    ],
)
def test_mesh_that_does_not_match(arguments, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(*arguments)


@pytest.mark.parametrize(
    "fsdp, sharing, message",
    [
        (1, 3, "mesh.batch_norm_devices=3 must divide the 8 devices along the batch: use one of 1, 2, 4, 8"),
        (1, 0, "mesh.batch_norm_devices=0 must divide"),
        (4, 2, "mesh.batch_norm_devices=2 must be a multiple of mesh.fsdp=4"),
    ],
)
def test_groups_that_do_not_match(fsdp, sharing, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(-1, fsdp, batch_norm_devices=sharing)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device that is not here."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_are_joined_along_the_batch():
    # What jax would hand over: not in the order of the slices.
    devices = [Device(i, i % 2, i % 2) for i in range(8)]
    mesh = parallel.make_mesh(-1, 2, devices=devices)
    assert mesh.shape == {"group": 1, "data": 4, "fsdp": 2, "spatial": 1}
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)[0, :, :, 0]
    assert slices.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match="mesh.data=1 must be a multiple of the 2 slices"):
        parallel.make_mesh(1, 8, devices=devices)


def test_a_run_of_several_processes_takes_all_devices():
    devices = [Device(i, i // 4) for i in range(8)]
    with pytest.raises(ValueError, match="leave out some of the 8 cpu devices of several processes: set mesh.data=-1"):
        parallel.make_mesh(4, devices=devices)


@pytest.mark.parametrize(
    "sizes, per_process, shares",
    [((-1, 1, 1), 2, 4), ((-1, 1, 2), 4, 2), ((1, 1, 8), 4, 1), ((2, 1, 4), 2, 2), ((4, 1, 2), 1, 4)],
)
def test_processes_read_what_their_devices_hold(sizes, per_process, shares):
    """This process is number 0: its share is the first; processes that divide the same images count once."""
    devices = [Device(i, i // per_process) for i in range(8)]
    assert parallel.input_share(parallel.make_mesh(*sizes, devices=devices)) == (0, shares)


def test_images_over_parts_of_several_hosts():
    devices = [Device(i, i // 3) for i in range(6)]
    with pytest.raises(ValueError, match="mesh.spatial=2 divides images over parts of several hosts"):
        parallel.input_share(parallel.make_mesh(-1, 1, 2, devices=devices))


@pytest.mark.parametrize(
    "arguments, sharing, words",
    [
        ((1,), -1, "1 device"),
        ((), -1, "8 devices"),
        ((-1, 2), -1, "8 devices (data 4 x fsdp 2)"),
        ((-1, 2, 2), 2, "8 devices (data 2 x fsdp 2 x spatial 2), batch norm by groups of 2 devices"),
        ((), 1, "8 devices, batch norm by device"),
    ],
)
def test_a_mesh_in_words(arguments, sharing, words):
    assert parallel.describe(parallel.make_mesh(*arguments, batch_norm_devices=sharing)) == words


# Batches and states


def test_batch_that_does_not_divide():
    mesh = parallel.make_mesh()
    parallel.check_batch("batch_size", 24, mesh)
    with pytest.raises(ValueError, match="batch_size=30 .* 8 devices .*use 24 or 32, or mesh.data=6"):
        parallel.check_batch("batch_size", 30, mesh)
    with pytest.raises(ValueError, match="eval_batch_size=3 .*use 8, or mesh.data=3"):
        parallel.check_batch("eval_batch_size", 3, mesh)
    with pytest.raises(ValueError, match="batch_size=24 .* 8 devices .* times accumulate_steps=2: use 16 or 32$"):
        parallel.check_batch("batch_size", 24, mesh, 2)
    parallel.check_batch("batch_size", 6, parallel.make_mesh(2, 1, 4))


def test_rows_that_do_not_divide():
    parallel.check_rows(28, parallel.make_mesh(2, 1, 4))
    with pytest.raises(ValueError, match="mesh.spatial=8 must divide the 28 rows of the images: use 4"):
        parallel.check_rows(28, parallel.make_mesh(1, 1, 8))


def test_to_global_splits_and_replicates():
    mesh = parallel.make_mesh(2, 2, 2)
    image = np.arange(16 * 4, dtype=np.float32).reshape(16, 4)
    split = parallel.to_global({"image": image}, parallel.batch_sharding(mesh))["image"]
    assert split.shape == (16, 4)
    assert {shard.data.shape for shard in split.addressable_shards} == {(4, 4)}
    np.testing.assert_array_equal(split, image)
    whole = parallel.to_global({"image": image}, parallel.replicated(mesh))["image"]
    assert whole.is_fully_replicated
    np.testing.assert_array_equal(whole, image)


def test_a_state_is_divided_along_the_longest_axis_that_divides():
    mesh = parallel.make_mesh(2, 4)
    shapes = {"kernel": (3, 3, 64, 128), "square": (256, 256), "odd": (1001, 66), "head": (2048, 1001), "scale": (128,)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: found.spec for name, found in parallel.state_sharding(mesh, tree).items()}
    last = P(None, None, None, "fsdp")
    assert specs == {"kernel": last, "square": P(None, "fsdp"), "odd": P(), "head": P("fsdp"), "scale": P()}
    assert parallel.state_sharding(mesh, tree, min_size=128)["scale"].spec == P("fsdp")
    assert parallel.state_sharding(parallel.make_mesh(), tree)["kernel"].spec == P()


# Steps


class Net(nn.Module):
    """A pixel's features, batch norm, classes; small enough to be written down again."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm")(x)
        return nn.Dense(CLASSES, name="head")(nn.relu(x).mean(axis=(-3, -2)))


def make_run(model: nn.Module, side: int, devices: int = 8, **settings) -> train.Run:
    config = default_config()
    config.batch_size = BATCH
    for key, value in settings.items():
        owner = config.mesh if key in config.mesh else config
        owner[key] = value
    config.mesh.fsdp_min_size = 64
    config.schedule.name = "constant"
    optimizer = optim.optimizer(config, optim.Plan(10, 10, 0, 10, 10, peak=0.1, schedule=config.schedule))
    mesh = parallel.configured_mesh(config.mesh, jax.devices()[:devices])
    info = SimpleNamespace(num_classes=CLASSES, image_shape=(side, side, 3))
    same = SimpleNamespace(prepare=lambda batch, key, resident: batch)
    return train.Run(config.lock(), model, None, info, mesh, same, None, None, optimizer)


def make_batch(side: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    # Each image with brightness and contrast of its own, so that it matters whose statistics are taken.
    scale = generator.uniform(0.5, 2, (2, BATCH, 1, 1, 1))
    image = generator.standard_normal((BATCH, side, side, 3)) * scale[0] + scale[1]
    return {"image": image.astype(np.float32), "label": generator.integers(0, CLASSES, BATCH).astype(np.int32)}


def step(run: train.Run) -> tuple[train.TrainState, float]:
    """The state after one step, and its loss."""
    batch = parallel.to_global(make_batch(run.info.image_shape[0]), parallel.batch_sharding(run.mesh))
    state = train.fresh_state(run)
    state, loss = train.compile_step(run, state, batch, {})(state, batch, {}, train.run_key(run))
    return state, float(loss)


def assert_same(found: tuple[train.TrainState, float], right: tuple[train.TrainState, float], tolerance: float):
    assert found[1] == pytest.approx(right[1], rel=tolerance)
    for name in ("params", "batch_stats", "opt_state"):
        trees = (jax.tree_util.tree_leaves_with_path(getattr(state, name)) for state, _ in (found, right))
        for (path, x), (_, y) in zip(*trees, strict=True):
            where = f"{name}{jax.tree_util.keystr(path)}"
            scale = np.max(np.abs(y), initial=1e-3)
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=where)


@jax.numpy_rank_promotion("allow")
def by_hand(params, images, labels, groups: int):
    """The network's loss written down, with statistics by groups of consecutive examples, and its gradients."""

    def loss_of(params):
        x = images.reshape(groups, -1, *images.shape[1:]) @ params["first"]["kernel"] + params["first"]["bias"]
        mean, var = x.mean(axis=(1, 2, 3), keepdims=True), x.var(axis=(1, 2, 3), keepdims=True)
        x = (x - mean) / jnp.sqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
        x = jax.nn.relu(x).mean(axis=(2, 3)).reshape(len(images), -1)
        logits = x @ params["head"]["kernel"] + params["head"]["bias"]
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
        return -own.mean(), (mean.mean(axis=(0, 1, 2, 3)), var.mean(axis=(0, 1, 2, 3)))

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)


@pytest.mark.parametrize(
    "mesh, groups, parts",
    [
        ({"batch_norm_devices": -1}, 1, 1),
        ({"batch_norm_devices": 1}, 8, 1),
        ({"batch_norm_devices": 2}, 4, 1),
        ({"batch_norm_devices": 4}, 2, 1),
        ({"fsdp": 2, "spatial": 2, "batch_norm_devices": 2}, 2, 2),
    ],
    ids=str,
)
def test_batch_norm_takes_its_statistics_from_the_devices_that_share_them(mesh, groups, parts):
    run = make_run(Net(), 4, accumulate_steps=parts, **mesh)
    before = jax.device_get(train.fresh_state(run).params)
    state, loss = step(run)
    batch = make_batch(4)
    mean, var, losses, gradients = np.zeros(6), np.ones(6), [], []
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), before)
        for part in range(parts):  # one after another, each of every device's examples
            images, labels = batch["image"][part::parts].astype(np.float64), batch["label"][part::parts]
            (found, (of_part, spread)), gradient = by_hand(wide, images, labels, groups)
            mean, var = 0.9 * mean + 0.1 * np.asarray(of_part), 0.9 * var + 0.1 * np.asarray(spread)
            losses.append(float(found))
            gradients.append(gradient)
        after = jax.tree.map(lambda x, *g: np.asarray(x - 0.1 * sum(g) / parts), wide, *gradients)
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    np.testing.assert_allclose(state.batch_stats["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.batch_stats["norm"]["var"], var, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), state.params, after)


def test_statistics_by_device_are_not_those_of_the_batch():
    """Else the test above would not tell them apart."""
    each, together = (step(make_run(Net(), 4, batch_norm_devices=sharing)) for sharing in (1, -1))
    assert abs(each[1] - together[1]) > 1e-3


def augmented() -> nn.Module:
    attend = partial(AAConv, kappa=0.5, upsilon=0.5, num_heads=2)
    return ResNet((1, 1), BasicBlock, num_classes=CLASSES, width=8, stage_convs=(attend, attend))


@pytest.fixture(scope="module")
def on_one_device() -> tuple[train.TrainState, float]:
    return step(make_run(augmented(), SIDE, devices=1))


@pytest.mark.parametrize(
    "mesh",
    [{"data": 8}, {"fsdp": 4}, {"fsdp": 2, "spatial": 2}, {"data": 1, "spatial": 8}],
    ids=str,
)
def test_a_step_is_the_same_however_it_is_divided(on_one_device, mesh):
    state, loss = step(make_run(augmented(), SIDE, **mesh))
    assert_same((state, loss), on_one_device, 3e-5)


def test_groups_and_parts_of_a_batch_with_divided_weights_and_rows():
    """All of the mesh at once: as on two devices, one a group, where weights and rows are whole."""

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            x = AAConv(8, (3, 3), strides=2, kappa=0.5, upsilon=0.5, num_heads=2, name="augmented")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
            x = nn.Conv(16, (3, 3), name="conv")(nn.relu(x))
            return nn.Dense(CLASSES, name="head")(x.mean(axis=(-3, -2)))

    settings = {"batch_norm_devices": 1, "accumulate_steps": 2}
    plain = step(make_run(Small(), 16, devices=2, **settings))
    divided = step(make_run(Small(), 16, fsdp=2, spatial=2, **settings | {"batch_norm_devices": 2}))
    assert_same(divided, plain, 3e-5)


def test_weights_and_their_moments_are_divided():
    run = make_run(augmented(), SIDE, data=2, fsdp=4)
    state, _ = step(run)
    kernel = state.params["stage2_block1"]["conv2"]["kernel"]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert moments
    for x in (kernel, *moments):
        assert x.sharding == NamedSharding(run.mesh, P(None, None, None, "fsdp"))
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // 4}


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 4, "fsdp": 2}], ids=str)
def test_accumulated_gradients_are_those_of_the_large_batch(mesh):
    """Without batch norm, whose statistics are the parts' own."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            x = nn.Conv(16, (3, 3), name="conv")(x)
            return nn.Dense(CLASSES, name="head")(nn.relu(x).mean(axis=(-3, -2)))

    devices = 1 if mesh == {"data": 1} else 8
    whole = step(make_run(Plain(), 8, devices, **mesh))
    parts = step(make_run(Plain(), 8, devices, accumulate_steps=4, **mesh))
    assert_same(parts, whole, 1e-6)
    np.testing.assert_array_equal(parts[0].window.totals.count, whole[0].window.totals.count)
    np.testing.assert_allclose(parts[0].window.totals.loss, whole[0].window.totals.loss, rtol=1e-6)


def test_accumulation_keeps_examples_on_their_device():
    """The parts of a divided batch are made of what each device holds: nothing moves."""
    mesh = parallel.make_mesh()
    divide = jax.jit(lambda x: parallel.in_parts(x, 4), in_shardings=parallel.batch_sharding(mesh))
    text = divide.lower(jax.ShapeDtypeStruct((64, 3), jnp.float32)).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    x = np.arange(64 * 3).reshape(64, 3)
    np.testing.assert_array_equal(parallel.from_parts(parallel.in_parts(jnp.asarray(x), 4)), x)


def test_accumulation_updates_running_statistics_part_by_part():
    run = make_run(Net(), 4, devices=1, accumulate_steps=2)
    params = jax.device_get(train.fresh_state(run).params)
    state, _ = step(run)
    kernel, bias = params["first"]["kernel"].astype(np.float64), params["first"]["bias"]
    mean = np.zeros(6)
    for part in range(2):
        mean = 0.9 * mean + 0.1 * (make_batch(4)["image"][part::2] @ kernel + bias).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(state.batch_stats["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)
