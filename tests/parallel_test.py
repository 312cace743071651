"""The mesh, and how arrays lie on it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aaconv import parallel


def test_mesh_takes_all_or_as_many_as_told():
    assert parallel.make_mesh().shape == {"data": 8}
    mesh = parallel.make_mesh(2)
    assert mesh.shape == {"data": 2}
    assert list(mesh.devices) == jax.devices()[:2]
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)


@pytest.mark.parametrize("data", [0, -2, 9])
def test_mesh_that_does_not_match(data):
    with pytest.raises(ValueError, match=f"mesh.data={data} .* 8 devices .*set mesh.data=-1"):
        parallel.make_mesh(data)


def test_batch_that_does_not_divide():
    mesh = parallel.make_mesh()
    parallel.check_batch("batch_size", 24, mesh)
    with pytest.raises(ValueError, match="batch_size=30 .* 8 devices .*use 24 or 32, or mesh.data=6"):
        parallel.check_batch("batch_size", 30, mesh)
    with pytest.raises(ValueError, match="eval_batch_size=3 .*use 8, or mesh.data=3"):
        parallel.check_batch("eval_batch_size", 3, mesh)


def test_to_global_splits_and_replicates():
    mesh = parallel.make_mesh()
    image = np.arange(16 * 4, dtype=np.float32).reshape(16, 4)
    split = parallel.to_global({"image": image}, parallel.batch_sharding(mesh))["image"]
    assert split.shape == (16, 4)
    assert {shard.data.shape for shard in split.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(split, image)
    whole = parallel.to_global({"image": image}, parallel.replicated(mesh))["image"]
    assert whole.is_fully_replicated
    np.testing.assert_array_equal(whole, image)
