"""Bytes moved are read off a compiled program's text, each rule on a program small enough to count by hand."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from aaconv.bench.traffic import hbm_bytes

BUFFER, ROW = 5 * 64 * 128 * 4, 64 * 128 * 4  # bytes of f32[5,64,128] and of one of its rows


def entry(*lines: str, before: str = "") -> str:
    """A program whose entry computation has these lines, of which the last one is the root."""
    *body, root = lines
    return "\n".join(
        ["HloModule m", "", before, "ENTRY %main () -> f32[] {", *("  " + x for x in body), f"  ROOT {root}", "}"]
    )


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("pred[7]", 7),
        ("s4[5]{0:E(4)}", 3),
        ("f32[]{:T(128)}", 4),
        ("f32[16,100]{1,0:T(8,128)}", 4 * 16 * 128),
        ("bf16[128,20,4,28]{0,3,2,1:T(8,128)(2,1)}", 2 * 20 * 4 * 32 * 128),  # 28 up to 32 beside 128
        ("bf16[3,100]{1,0:T(1,128)(2,1)}", 2 * 3 * 2 * 128),  # tiles of one row are stored in pairs
        ("s32[784]{0:T(1024)}", 4 * 1024),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),
        ("(f32[4]{0}, (bf16[4]{0}, f32[4]{0:T(128)S(1)}))", 24),
    ],
)
def test_sizes_are_padded_to_tiles_and_vmem_is_free(kind, size):
    assert hbm_bytes(entry(f'%x = {kind} custom-call(), custom_call_target="kernel"')) == size


def test_operands_and_results_move_and_renaming_is_free():
    program = entry(
        "%p = f32[4,8]{1,0} parameter(0)",
        "%b = f32[32]{0} bitcast(%p)",
        "%a = f32[32]{0} add(%b, %b)",
        '%h = f32[32]{0} custom-call(), custom_call_target="AllocateBuffer"',
        '%k = (f32[32]{0}, /*index=1*/f32[8]{0}) custom-call(%a, %h), custom_call_target="tpu_custom_call"',
        "%g = f32[8]{0} get-tuple-element(%k), index=1",
        "%t = (f32[8]{0}, f32[32]{0}) tuple(%g, %a)",
    )
    assert hbm_bytes(program) == 3 * 128 + (2 * 128 + 128 + 32)


def test_asynchronous_copies_move_once_and_on_the_side_of_hbm_alone():
    into = entry(
        "%p = f32[8,128]{1,0} parameter(0)",
        "%s = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%p)",
        "%d = f32[8,128]{1,0:S(1)} copy-done(%s)",
    )
    out = entry(
        "%p = f32[8,128]{1,0:S(1)} parameter(0)",
        "%s = (f32[8,128]{1,0}, f32[8,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%p)",
        "%d = f32[8,128]{1,0} copy-done(%s)",
    )
    part = entry(
        "%p = f32[8,128]{1,0} parameter(0)",
        "%s = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2], [0:128]}",
        "%d = f32[2,128]{1,0:S(1)} slice-done(%s)",
    )
    assert hbm_bytes(into) == hbm_bytes(out) == 4 * hbm_bytes(part) == 4096


def test_bare_slices_and_updates_leave_the_rest_alone():
    program = entry(
        "%p = f32[5,64,128]{2,1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%s = f32[1,64,128]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,64,128}",
        "%u = f32[5,64,128]{2,1,0} dynamic-update-slice(%p, %s, %i, %i, %i)",
    )
    assert hbm_bytes(program) == (2 * ROW + 12) + (2 * ROW + 12)


def fusion(body: str, result: str = "f32[5,64,128]{2,1,0}") -> str:
    inside = f"""%inside (a: f32[5,64,128], i: s32[]) -> f32[5,64,128] {{
  %a = f32[5,64,128]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
{body}
}}
"""
    lines = ["%p = f32[5,64,128]{2,1,0} parameter(0)", "%j = s32[] parameter(1)"]
    return entry(*lines, f"%f = {result} fusion(%p, %j), kind=kLoop, calls=%inside", before=inside)


SLICE = "  %s = f32[1,64,128]{2,1,0} dynamic-slice(%v, %i, %i, %i), dynamic_slice_sizes={1,64,128}"
UPDATE = "  %u = f32[5,64,128]{2,1,0} dynamic-update-slice(%v, %n, %i, %i, %i)"
VIEW = "  %v = f32[5,64,128]{2,1,0} bitcast(%a)"
NEGATED = "  %n = f32[1,64,128]{2,1,0} negate(%s)"


def test_a_fusion_reads_the_slices_it_takes():
    row = "f32[1,64,128]{2,1,0}"
    assert hbm_bytes(fusion("\n".join([VIEW, SLICE, NEGATED.replace("%n", "ROOT %n")]), row)) == 2 * ROW + 4
    whole = "\n".join([VIEW, SLICE, "  %w = f32[5,64,128]{2,1,0} negate(%v)", NEGATED.replace("%n", "ROOT %n")])
    assert hbm_bytes(fusion(whole, row)) == BUFFER + ROW + 4
    assert hbm_bytes(fusion("\n".join([VIEW, SLICE, NEGATED.replace("%n", "ROOT %n")]), row[:-1] + ":S(1)}")) == ROW + 4


def test_a_fusion_writes_what_it_updates_in_place():
    body = [VIEW, SLICE, NEGATED, UPDATE]
    assert hbm_bytes(fusion("\n".join([*body, "  ROOT %r = f32[5,64,128]{2,1,0} bitcast(%u)"]))) == 2 * ROW + 4
    pair = "(f32[5,64,128]{2,1,0}, f32[1,64,128]{2,1,0})"
    assert hbm_bytes(fusion("\n".join([*body, f"  ROOT %t = {pair} tuple(%u, %n)"]), pair)) == 3 * ROW + 4
    # Not in place: what is updated was computed here, and read as a whole.
    copied = [VIEW, SLICE, NEGATED, "  %c = f32[5,64,128]{2,1,0} negate(%a)", UPDATE.replace("(%v", "(%c")]
    assert hbm_bytes(fusion("\n".join([*copied, "  ROOT %r = f32[5,64,128]{2,1,0} bitcast(%u)"]))) == 2 * BUFFER + 4


def test_a_fusion_of_one_operation_with_several_results_writes_them_all():
    pair = "(f32[320,128]{1,0}, s32[320,128]{1,0})"
    assert hbm_bytes(fusion(f"  ROOT %t = {pair} sort(%a, %a), to_apply=%less", pair)) == 3 * BUFFER


def loop(condition: str, *, attributes: str = "", start: int = 0, step: int = 1) -> str:
    """A loop that moves 3 kB and the counter's 12 bytes a trip, and what its condition moves."""
    before = f"""%test (l: s32[], r: s32[]) -> pred[] {{
  %l = s32[] parameter(0)
  %r = s32[] parameter(1)
  ROOT %c = pred[] compare(%l, %r), direction=LT
}}

%body (x: (s32[], f32[250])) -> (s32[], f32[250]) {{
  %x = (s32[], f32[250]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %v = f32[250]{{0}} get-tuple-element(%x), index=1
  %one = s32[] constant({step})
  %n = s32[] add(%i, %one)
  %w = f32[250]{{0}} add(%v, %v)
  ROOT %t = (s32[], f32[250]{{0}}) tuple(%n, %w)
}}

%condition (x: (s32[], f32[250])) -> pred[] {{
  %x = (s32[], f32[250]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %n = s32[] constant(10)
  ROOT %r = pred[] {condition}
}}
"""
    return entry(
        f"%z = s32[] constant({start})",
        "%v = f32[250]{0} parameter(0)",
        "%t = (s32[], f32[250]{0}) tuple(%z, %v)",
        f"%w = (s32[], f32[250]{{0}}) while(%t), condition=%condition, body=%body{attributes}",
        before=before,
    )


TRIP = 3000 + 12 + 9


@pytest.mark.parametrize(
    ("condition", "more", "trips"),
    [
        ("compare(%i, %n), direction=LT", {}, 10),
        ("compare(%i, %n), direction=LE", {}, 11),
        ("compare(%n, %i), direction=GT", {}, 10),
        ("compare(%i, %n), direction=LT", {"start": 4, "step": 4}, 2),
        ("fusion(%i, %n), kind=kLoop, calls=%test", {}, 10),
        ("call(%i, %n), to_apply=%test", {}, 10),
        (
            "compare(%i, %i), direction=LT",
            {"attributes": ', backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}'},
            7,
        ),
    ],
)
def test_a_loop_counts_with_every_trip(condition, more, trips):
    assert hbm_bytes(loop(condition, **more)) == trips * TRIP


@pytest.mark.parametrize(
    "condition", ["compare(%i, %i), direction=LT", "compare(%i, %n), direction=NE", "custom-call(%i, %n)"]
)
def test_a_loop_of_unknown_length_is_refused(condition):
    with pytest.raises(ValueError, match="does not say how often its loop w runs"):
        hbm_bytes(loop(condition))


def test_of_branches_the_largest_counts():
    branch = """%{0} (x: f32[{1}]) -> f32[] {{
  %x = f32[{1}]{{0}} parameter(0)
  ROOT %y = f32[{1}]{{0}} negate(%x)
}}
"""
    program = entry(
        "%i = s32[] parameter(0)",
        "%p = f32[100]{0} parameter(1)",
        "%q = f32[200]{0} parameter(2)",
        "%c = f32[]{} conditional(%i, %p, %q), branch_computations={%small, %large}",
        before=branch.format("small", 100) + branch.format("large", 200),
    )
    assert hbm_bytes(program) == 2 * 800


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hbm_bytes("module @jit_f {}")


def test_a_compiled_scan_scales_with_its_length():
    def run(xs, w):
        def step(carry, x):
            carry = jnp.tanh(carry @ w + x)
            return carry, carry

        return jax.lax.scan(step, jnp.zeros_like(w), xs)

    def moved(length, text=lambda text: text):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((length, 64, 64), (64, 64))]
        return hbm_bytes(text(jax.jit(run).lower(*shapes).compile().as_text()))

    short, medium, long = (moved(length) for length in (10, 20, 40))
    # Beside the product, x is read and a row of the result is written, and each result is not read as a whole.
    a_trip = (medium - short) / 10
    assert (long - medium) / 20 == a_trip and 6 * 64 * 64 * 4 <= a_trip <= 14 * 64 * 64 * 4
    # The trip count is read off the condition as well as it is off what the compiler noted.
    assert moved(20, lambda text: re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)) == medium
