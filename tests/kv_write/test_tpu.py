# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The KV writes: the oracle against a plain loop, the TPU kernels against the oracle, bit for bit.

The kernels run in TPU interpret mode, each case in one of the two DMA modes; test_coverage says
what the cases must cover together. test_kv_write_planted.py shows that these checks find bugs.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from pallas_paged.kv_write.tpu import grouping, page_copies
from pallas_paged.kv_write.tpu import launch as mosaic_tpu
from tests import jax_lines
from tests.kv_write import cases
from tests.kv_write.cases import Case, difference, expected, interpret, make

OPS = ("page_write", "slice_write", "token_write")
POOL_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


def _static_cases():
    """Pool dtype x op; everything else is cycled, in cycles that drift past one another."""
    page_sizes = itertools.cycle((4, 16, 1, 24, 33))
    heads = itertools.cycle((2, 1, 3, 2, 8, 5, 1))
    head_dims = itertools.cycle((128, 64, 80, 256, 96, 192, 128))
    tokens = itertools.cycle((33, 61, 16, 70))
    new_dtypes = itertools.cycle(("bfloat16", "float32", "bfloat16", "bfloat16"))
    forms = itertools.cycle((True, False))
    scales = itertools.cycle(("head", "tensor", "none", "head"))
    for dtype, op in itertools.product(POOL_DTYPES, OPS):
        yield Case(
            op,
            next(tokens),
            next(page_sizes),
            next(heads),
            next(head_dims),
            dtype,
            new_dtype=next(new_dtypes),
            is_flat=next(forms),
            scale=next(scales) if jnp.dtype(dtype).itemsize == 1 else "none",
            extreme=True,
        )


def _with_kinds():
    """Each static case in one mode with two kinds of entries, "any" and one of the others."""
    kinds = {op: itertools.cycle(kinds[1:]) for op, kinds in cases.KINDS.items()}
    for i, case in enumerate(_static_cases()):
        mode = cases.MODES[i // 2 % 2]  # so that each form meets each mode
        yield case, mode
        yield dataclasses.replace(case, entries=next(kinds[case.op])), mode


def _every_kind():
    """What the kernel does by the order of its entries, whole unrolled iterations and the rest."""
    for case, mode in (
        (Case("page_write", 70, 1, 2, 128, block_tokens=32), "on_wait"),
        (Case("page_write", 70, 2, 1, 128, is_flat=False, block_tokens=32), "eager"),
        (Case("slice_write", 70, 16, 2, 128, block_tokens=32), "on_wait"),
        (Case("slice_write", 61, 33, 1, 128, block_tokens=48, is_flat=False), "eager"),
        (Case("token_write", 40, 3, 1, 128), "on_wait"),
    ):
        for kind in cases.KINDS[case.op]:
            yield dataclasses.replace(case, entries=kind), mode


SPECIAL = [
    (Case("page_write", 61, 4, 3, 64, "int8", "implicit", scale="head"), "on_wait"),
    (Case("page_write", 33, 1, 2, 128, entries="implicit"), "eager"),
    # bf16 transposed as pairs of tokens.
    (Case("page_write", 61, 4, 3, 128, transpose_packed=True, extreme=True), "eager"),
    (Case("slice_write", 33, 16, 2, 256, transpose_packed=True, extreme=True), "on_wait"),
    # Fewer tokens than a page, than a DMA's row tile, or than anything.
    (Case("page_write", 7, 4, 2, 128), "on_wait"),
    (Case("page_write", 16, 33, 2, 128), "on_wait"),
    (Case("slice_write", 1, 4, 2, 64), "eager"),
    (Case("token_write", 1, 4, 2, 64, "int8", "live", scale="head"), "eager"),
    # A caller's own pool: R that is no whole number of words, and padding rows beyond the heads.
    (Case("page_write", 33, 4, 1, 64, "bfloat16", num_rows=1), "on_wait"),
    (Case("slice_write", 33, 4, 3, 128, "int8", num_rows=6, scale="tensor"), "eager"),
    (Case("token_write", 16, 4, 2, 128, "bfloat16", num_rows=6, is_flat=False), "on_wait"),
    (Case("page_write", 33, 4, 1, 128, "float8_e5m2", num_rows=7, is_flat=False), "eager"),
    # k and v that are quantised already: their very bits, whatever the scales.
    (
        Case("page_write", 33, 4, 2, 128, "float8_e5m2", "holes", "float8_e5m2", scale="head"),
        "eager",
    ),
    (
        Case("token_write", 21, 3, 3, 64, "float8_e4m3fn", "any", "float8_e4m3fn", is_flat=False),
        "on_wait",
    ),
    (Case("slice_write", 33, 16, 1, 96, "int8", "any", "int8", scale="tensor"), "eager"),
    # A page longer than a token block that has no divisor but 1.
    (Case("page_write", 61, 29, 1, 64, "float32", "live"), "on_wait"),
    # Pages that leave too much of a token block empty, and so go out in two chunks.
    (Case("page_write", 70, 32, 1, 128, entries="holes", block_tokens=48), "eager"),
    (Case("page_write", 70, 32, 1, 128, entries="implicit", block_tokens=48), "on_wait"),
    # Slices longer than a token block: two equal chunks.
    (Case("slice_write", 70, 64, 1, 128, entries="any", block_tokens=48), "eager"),
    # A token block of nine tiles, interleaved as two iterations of five.
    (Case("page_write", 160, 16, 1, 128, entries="live", block_tokens=128), "eager"),
]
COPIES = [
    (Case("copy_pages", 5, 4, 2, 128, "bfloat16", "holes"), "on_wait"),
    (Case("copy_pages", 19, 1, 1, 64, "int8", "holes"), "eager"),
    (Case("copy_pages", 8, 3, 1, 256, "float32", "live"), "eager"),
    (Case("copy_pages", 1, 33, 3, 80, "float8_e4m3fn", "live"), "on_wait"),
    (Case("copy_pages", 3, 2, 1, 128, "float8_e5m2", "none"), "eager"),
]
RUNS = [*_with_kinds(), *_every_kind(), *SPECIAL, *COPIES]
CASES = [case for case, _ in RUNS]


def _id(x):
    return x.id if isinstance(x, Case) else str(x)


def _same(actual, wanted):
    found = difference(actual, wanted)
    assert found is None, found


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_oracle_is_the_plain_loop(case):
    call = make(case)
    _same(call.run("oracle"), expected(call))


def _features(run):
    case, mode = run
    form = case.new_dtype, case.is_flat, case.scale, case.num_rows is None, case.transpose_packed
    return (case.op, case.pool_dtype), (case.op, mode), *form


@pytest.mark.parametrize(
    ("case", "mode"), jax_lines.runs(RUNS, _features, lambda run: f"{run[0].id}-{run[1]}")
)
def test_kernel_is_the_oracle(case, mode):
    call = make(case)
    _same(interpret(lambda: call.run("mosaic_tpu"), mode), call.run("oracle"))


def test_coverage():
    """What the cases above must cover together, so that a trimmed list does not lose it."""
    assert set(itertools.product(OPS, POOL_DTYPES)) <= {(c.op, c.pool_dtype) for c in CASES}
    seen = {(c.op, c.is_flat, m) for c, m in RUNS}
    assert set(itertools.product(OPS, (True, False), cases.MODES)) <= seen
    assert {("copy_pages", m) for m in cases.MODES} <= {(c.op, m) for c, m in RUNS}
    for op, kinds in cases.KINDS.items():
        assert set(kinds) <= {c.entries for c in CASES if c.op == op}
    for name, wanted in {
        "page_size": {1, 4, 16, 24, 33},
        "num_kv_heads": {1, 2, 3, 5, 8},
        "head_dim": {64, 80, 96, 128, 192, 256},
        "num_tokens": {1, 7, 16, 33, 61, 70},
        "new_dtype": {"float32", "bfloat16"},
    }.items():
        assert wanted <= {getattr(c, name) for c in CASES}, name
    quantized = {(c.pool_dtype, c.scale) for c in CASES}
    assert set(itertools.product(POOL_DTYPES[2:], ("none", "tensor", "head"))) <= quantized


@pytest.mark.parametrize(
    ("op", "kind", "regularity"),
    [
        ("page_write", "any", "ANY_ORDER"),
        ("page_write", "holes", "ASCENDING"),
        ("page_write", "beyond", "ASCENDING"),
        ("page_write", "step_back", "ANY_ORDER"),
        ("page_write", "live", "EQUAL_LENGTHS"),
        ("slice_write", "any", "ANY_ORDER"),
        ("slice_write", "holes", "ASCENDING"),
        ("slice_write", "live", "ALL_LIVE"),
        ("slice_write", "equal", "EQUAL_LENGTHS"),
    ],
)
def test_kinds_reach_every_regularity(op, kind, regularity, monkeypatch):
    """What the kernel is told about the entries is what the kind is named for."""
    call = make(next(c for c, _ in _every_kind() if c.op == op and c.entries == kind))
    summaries = []

    def launch(spec, kv_pages, operands):
        summaries.append(operands.summary)
        return kv_pages

    monkeypatch.setattr(mosaic_tpu, "_launch", launch)
    arrays, options = call.backend_arguments("mosaic_tpu")
    getattr(mosaic_tpu, op)(*arrays, options)
    assert int(grouping.read_summary(summaries[0])[1]) == getattr(grouping, regularity)


STEPS = [
    (Case("page_write", 70, 2, 1, 128, "float32", "any"), "on_wait"),
    (Case("slice_write", 37, 4, 1, 128, "float32", "holes", is_flat=False), "eager"),
    (Case("token_write", 37, 4, 1, 128, "float32", "any"), "on_wait"),
    (Case("copy_pages", 37, 1, 1, 128, "float32", "holes"), "eager"),
]


@pytest.mark.parametrize(("case", "mode"), STEPS, ids=_id)
def test_several_grid_steps(case, mode, monkeypatch):
    """More entries than are in SMEM at a time."""
    monkeypatch.setattr(mosaic_tpu, "ELEMENTS_PER_STEP", 16)
    monkeypatch.setattr(page_copies, "_ENTRIES_PER_STEP", 16)
    jax.clear_caches()  # what other tests compiled with one step, and below what this one did
    call = make(case)
    result = interpret(lambda: call.run("mosaic_tpu"), mode)
    jax.clear_caches()
    _same(result, call.run("oracle"))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("op", ["token_write", "page_write"])
def test_two_entries_for_one_slot(op, mode):
    """Either may win, nothing else may come; also more of them than the pool has slots."""
    call = make(Case(op, 33, 1, 1, 128, "float32", is_flat=False))
    ids = np.arange(33, dtype=np.int32) % 4
    metadata = (ids,) if op == "token_write" else (ids, np.arange(33, dtype=np.int32))
    call = dataclasses.replace(call, kv_pages=call.kv_pages[:4], metadata=metadata)
    # Two DMAs into one slot are a race, here by the caller's wish.
    result = interpret(lambda: call.run("mosaic_tpu"), mode, detect_races=False)
    slots = cases.new_slots(call)
    for slot in range(4):
        assert any(difference(result[slot, 0], new) is None for new in slots[slot::4]), slot


@pytest.mark.parametrize("count", [-3, 0, 2, cases.INT_MAX])
@pytest.mark.parametrize("backend", ["oracle", "mosaic_tpu"])
def test_num_slices_is_clamped(count, backend):
    call = make(Case("slice_write", 16, 4, 1, 128, "float32", "live", is_flat=False))
    slices, num_slices = call.metadata
    call = dataclasses.replace(
        call, metadata=(slices[:, : num_slices[0]], np.array([count], np.int32))
    )
    if backend == "oracle":
        result = call.run(backend)
    else:
        result = interpret(lambda: call.run(backend), "on_wait")
    _same(result, expected(call))


EMPTY = [
    Case("page_write", 0, 4, 2, 128, entries="any"),
    Case("page_write", 3, 4, 2, 128, entries="any"),  # no whole page
    Case("slice_write", 0, 4, 2, 64, "int8", entries="any"),
    Case("token_write", 0, 4, 2, 128, entries="live"),
    Case("copy_pages", 0, 4, 2, 128, entries="live"),
]


@pytest.mark.parametrize("backend", ["oracle", "mosaic_tpu"])
@pytest.mark.parametrize("is_flat", [True, False], ids=["flat", "by_head"])
@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.id)
def test_no_tokens(case, is_flat, backend):
    call = make(dataclasses.replace(case, is_flat=is_flat))
    _same(interpret(lambda: call.run(backend), "on_wait"), call.kv_pages)


@pytest.mark.parametrize("backend", ["oracle", "mosaic_tpu"])
@pytest.mark.parametrize("op", ["page_write", "slice_write", "copy_pages"])
def test_no_entries(op, backend):
    call = make(Case(op, 16, 4, 2, 128, entries="live"))
    none = np.zeros((0,), np.int32)
    metadata = {
        "page_write": (none, none),
        "slice_write": (np.zeros((3, 0), np.int32), np.array([5], np.int32)),
        "copy_pages": (none, none),
    }[op]
    call = dataclasses.replace(call, metadata=metadata)
    _same(interpret(lambda: call.run(backend), "on_wait"), call.kv_pages)


@pytest.mark.parametrize("backend", ["oracle", "mosaic_tpu"])
@pytest.mark.parametrize("op", [*OPS, "copy_pages"])
def test_only_the_pool_is_donated(op, backend):
    call = make(Case(op, 16, 4, 1, 64, "int8", "live", is_flat=False, scale="head"))
    positional, keywords = call.arguments()
    scales = [x for x in keywords.values() if isinstance(x, jax.Array)]
    result = interpret(
        lambda: getattr(pallas_paged, op)(
            *positional, **keywords, config=call.config(backend), backend=backend
        ),
        "on_wait",
    )
    assert positional[0].is_deleted()
    assert not any(x.is_deleted() for x in [*positional[1:], *scales] if x is not None)
    _same(result, expected(call))


@pytest.mark.parametrize("op", [*OPS, "copy_pages"])
def test_oracle_updates_in_place(op):
    """The output has the pool's buffer: donation is used, not only declared."""
    call = make(Case(op, 16, 4, 2, 128, "float32", entries="live"))
    positional, keywords = call.arguments()
    before = positional[0].unsafe_buffer_pointer()
    result = getattr(pallas_paged, op)(*positional, **keywords, backend="oracle")
    assert result.unsafe_buffer_pointer() == before


@pytest.mark.parametrize("new_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_oracle_takes_float16(op, new_dtype):
    call = make(Case(op, 33, 4, 2, 80, "float16", "any", new_dtype, extreme=True))
    _same(call.run("oracle"), expected(call))


@pytest.mark.parametrize("pool_dtype", ["float32", "float8_e4m3fn"])
def test_oracle_takes_new_float16(pool_dtype):
    call = make(Case("page_write", 33, 4, 2, 128, pool_dtype, "any", "float16", extreme=True))
    _same(call.run("oracle"), expected(call))


def test_scales_are_traced():
    """New scales neither recompile nor freeze: the second call has the second one's values."""
    call = make(Case("token_write", 16, 4, 2, 128, "int8", "live", scale="head"))
    other = dataclasses.replace(call, k_scale=call.k_scale * 3, v_scale=call.v_scale / 3)
    _same(call.run("oracle"), expected(call))
    with jax.log_compiles(False), _no_compile():
        result = other.run("oracle")
    _same(result, expected(other))
    assert difference(expected(call), expected(other)) is not None


def _no_compile():
    """A context in which tracing an op's jitted half anew is an error."""
    return jax.no_tracing()


def test_the_race_detectors_clocks_compare_as_jaxs():
    """`interpret` compares clocks faster than jax; equal ones are not ordered."""
    from jax._src.pallas.mosaic.interpret import vector_clock

    rng = np.random.default_rng(0)
    for a, b in rng.integers(0, 3, (300, 2, 3)).astype(np.int32):
        if hasattr(vector_clock, "ordered"):
            wanted = vector_clock.ordered(a, b)
        else:
            first, second = (vector_clock.NpVectorClock(3) for _ in "ab")
            first.clock, second.clock = a, b
            wanted = first.ordered(second)
        assert cases.is_ordered(a, b) == wanted
