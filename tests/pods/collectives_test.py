"""Collectives are read off real programs for eight devices, with bytes that are counted by hand."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from aaconv.pods import collectives
from aaconv.pods.chips import HOP_SECONDS, parse_topology

FLOATS = 1024  # on each device


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("slow", "fast"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


EVERY = P(("slow", "fast"))


def read(mesh, function, out=EVERY):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=EVERY, out_specs=out, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * FLOATS,), jnp.float32, sharding=NamedSharding(mesh, EVERY))
    return collectives.read(jax.jit(mapped).lower(x).compile().as_text(), mesh.size)


@pytest.mark.parametrize(
    ("axes", "group"),
    [(("slow", "fast"), range(8)), (("fast",), range(4)), (("slow",), (0, 4))],
    ids=["all", "fast", "slow"],
)
@pytest.mark.parametrize(
    ("kind", "function", "size"),
    [
        ("all-reduce", lambda x, axes: lax.psum(x, axes), lambda n: 4 * FLOATS),
        ("all-gather", lambda x, axes: lax.all_gather(x, axes, tiled=True), lambda n: 4 * FLOATS * n),
        ("reduce-scatter", lambda x, axes: lax.psum_scatter(x, axes, tiled=True), lambda n: 4 * FLOATS),
        ("all-to-all", lambda x, axes: lax.all_to_all(x, axes, 0, 0, tiled=True), lambda n: 4 * FLOATS),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "all-to-all"],
)
def test_bytes_and_groups_are_those_of_the_program(mesh, kind, function, size, axes, group):
    (found,) = read(mesh, lambda x: function(x, axes))
    assert (found.kind, found.bytes, found.group, found.times) == (kind, size(len(group)), tuple(group), 1)


def test_a_permutation_sends_the_array_once(mesh):
    ring = [(i, (i + 1) % 4) for i in range(4)]
    (found,) = read(mesh, lambda x: lax.ppermute(x, "fast", ring))
    assert (found.kind, found.bytes, found.sent, found.group) == ("collective-permute", 4 * FLOATS, 4 * FLOATS, (0, 1))


def test_a_loop_counts_with_every_trip(mesh):
    def run(x):
        return lax.fori_loop(0, 12, lambda _, x: lax.psum(jnp.sin(x), "fast"), x)

    (found,) = read(mesh, run)
    assert (found.kind, found.times, found.bytes) == ("all-reduce", 12, 4 * FLOATS)


def test_arrays_that_are_reduced_together_add_up(mesh):
    found = read(mesh, lambda x: sum(map(jnp.sum, lax.psum((x, x[:8], jnp.float32(3) * x[0]), "fast"))), out=P())
    assert {x.kind for x in found} == {"all-reduce"}
    assert sum(x.bytes for x in found) == 4 * (FLOATS + 8 + 1)


def test_what_xla_divides_by_itself_is_found_too(mesh):
    rows, whole = NamedSharding(mesh, EVERY), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows)
    text = jax.jit(lambda x: x.T @ x, out_shardings=whole).lower(x).compile().as_text()
    (found,) = collectives.read(text, mesh.size)
    assert (found.kind, found.bytes, len(found.group)) == ("all-reduce", 4 * 128 * 128, 8)


def line(attributes: str, opcode: str = "all-reduce", kind: str = "f32[256]{0}") -> str:
    return f"""HloModule m

ENTRY %main (p: f32[256]) -> f32[256] {{
  %p = f32[256]{{0}} parameter(0)
  ROOT %r = {kind} {opcode}(%p), {attributes}, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[1,8]<=[8]", tuple(range(8))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=8], device_ids=([8]) {'a'}", tuple(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
    ],
)
def test_every_way_to_write_groups(attributes, group):
    (found,) = collectives.read(line(attributes), 8)
    assert found.group == group


def test_an_asynchronous_collective_counts_where_it_starts():
    text = """HloModule m

ENTRY %main (p: f32[256]) -> f32[1024] {
  %p = f32[256]{0} parameter(0)
  %s = (f32[256]{0}, f32[1024]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %d = f32[1024]{0} all-gather-done(%s)
}
"""
    (found,) = collectives.read(text, 8)
    assert (found.kind, found.bytes, found.sent) == ("all-gather", 4096, 3072)


def test_a_reduction_of_which_a_slice_is_kept_is_a_reduce_scatter():
    text = """HloModule m

%scatter (p: f32[256]) -> f32[64] {
  %p = f32[256]{0} parameter(0)
  %r = f32[256]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  %i = s32[] constant(64)
  ROOT %d = f32[64]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={64}
}

ENTRY %main (p: f32[256]) -> f32[64] {
  %p = f32[256]{0} parameter(0)
  ROOT %f = f32[64]{0} fusion(%p), kind=kCustom, calls=%scatter
}
"""
    (found,) = collectives.read(text, 8)
    assert (found.kind, found.bytes, found.sent) == ("reduce-scatter", 1024, 768)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 700),
        ("all-gather", 700),
        ("reduce-scatter", 700),
        ("all-to-all", 700),
        ("collective-permute", 800),
    ],
)
def test_bytes_sent_by_a_ring_of_eight(kind, sent):
    assert collectives.sent_bytes(kind, 800, 8) == sent
    assert collectives.sent_bytes(kind, 800, 1) == 0


def coordinates(*layout):
    return list(itertools.product(*map(range, layout)))


@pytest.mark.parametrize(
    ("topology", "group", "links"),
    [
        ("v5e:16x16", range(256), 4),  # two rings
        ("v5e:16x16", range(16), 2),  # one ring
        ("v5e:16x16", range(8), 1),  # half of one: a line
        ("v5e:4x4", range(16), 2),  # no rings: what a chip in the corner has
        ("v5e:2x2", range(2), 1),
        ("v5p:4x4x4", range(64), 6),
        ("v5p:2x2x2", range(8), 3),
    ],
)
def test_large_reductions_take_as_long_as_their_bytes_over_the_links(topology, group, links):
    slice = parse_topology(topology)
    size, devices = 10**9, len(group)
    found = collectives.Collective("all-reduce", size, tuple(group), 1, "")
    expected = 2 * size * (devices - 1) / devices / (links * slice.chip.link)
    assert collectives.seconds(found, slice, coordinates(*slice.layout)) == pytest.approx(expected)


def test_small_reductions_take_as_long_as_the_way():
    slice = parse_topology("v5e:16x16")
    found = collectives.Collective("all-reduce", 4, tuple(range(256)), 1, "")
    # There and back over half of each ring.
    assert collectives.seconds(found, slice, coordinates(16, 16)) == pytest.approx(2 * (8 + 8) * HOP_SECONDS)


def test_totals_add_up_by_kind():
    slice = parse_topology("v5e:2x2")
    found = [
        collectives.Collective("all-gather", 400, (0, 1, 2, 3), 1, ""),
        collectives.Collective("all-reduce", 4000, (0, 1, 2, 3), 5, ""),
        collectives.Collective("all-reduce", 40, (0, 1, 2, 3), 1, ""),
    ]
    reduced, gathered = collectives.totals(found, slice, coordinates(2, 2))
    assert (reduced.kind, reduced.count, reduced.bytes, reduced.sent) == ("all-reduce", 6, 20040, 30060)
    assert (gathered.kind, gathered.count, gathered.sent) == ("all-gather", 1, 300)
