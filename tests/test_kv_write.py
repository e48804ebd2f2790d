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
from pallas_paged.kv_write import mosaic_tpu, mosaic_tpu_copy, mosaic_tpu_walk
from tests import cases
from tests.cases import Case, difference, expected, interpret, make

OPS = ("page_write", "slice_write", "token_write")
POOL_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


def _write_cases():
    """Pool dtype x op x form, everything else cycled so that it meets all of them."""
    page_sizes = itertools.cycle((4, 16, 1, 24, 33))
    heads = itertools.cycle((2, 1, 3, 2, 8, 5, 1))
    head_dims = itertools.cycle((128, 64, 80, 256, 96, 192))
    tokens = itertools.cycle((33, 61, 16, 70, 40))
    new_dtypes = itertools.cycle(("bfloat16", "float32", "bfloat16"))
    scales = itertools.cycle(("head", "tensor", "none"))
    kinds = {
        "page_write": itertools.cycle(("any", "holes", "implicit", "live")),
        "slice_write": itertools.cycle(("any", "holes", "equal", "live")),
        "token_write": itertools.cycle(("any", "live", "holes")),
    }
    for dtype, op, is_flat in itertools.product(POOL_DTYPES, OPS, (True, False)):
        yield Case(
            op,
            next(tokens),
            next(page_sizes),
            next(heads),
            next(head_dims),
            dtype,
            next(kinds[op]),
            next(new_dtypes),
            is_flat,
            next(scales) if jnp.dtype(dtype).itemsize == 1 else "none",
            extreme=True,
        )


# What the cycles do not reach by themselves.
SPECIAL = [
    # Every kind of order that the kernel tells apart, with whole unrolled chunks and what is left.
    Case("page_write", 70, 1, 2, 128, entries="holes"),
    Case("page_write", 70, 1, 2, 128, entries="live"),
    Case("page_write", 70, 2, 1, 128, entries="live", is_flat=False, block_tokens=32),
    Case("slice_write", 70, 16, 2, 128, entries="holes", block_tokens=32),
    Case("slice_write", 70, 16, 2, 128, entries="live", block_tokens=32),
    Case("slice_write", 70, 16, 2, 128, entries="equal", block_tokens=32),
    Case("slice_write", 61, 33, 1, 128, entries="any", block_tokens=48),
    # bf16 turned as pairs of tokens.
    Case("page_write", 61, 4, 3, 128, entries="any", turn_packed=True, extreme=True),
    Case("slice_write", 33, 16, 2, 256, entries="live", turn_packed=True, extreme=True),
    Case("token_write", 40, 16, 5, 128, entries="any", turn_packed=True, extreme=True),
    # Fewer tokens than a page, than a DMA's row tile, or than anything.
    Case("page_write", 7, 4, 2, 128, entries="any"),
    Case("page_write", 16, 33, 2, 128, entries="any"),
    Case("slice_write", 1, 4, 2, 64, entries="any"),
    Case("token_write", 1, 4, 2, 64, "int8", entries="live", scale="head"),
    # All entries are skipped.
    Case("page_write", 33, 4, 2, 128, entries="none"),
    Case("slice_write", 33, 4, 2, 128, entries="none"),
    Case("token_write", 16, 4, 2, 128, entries="none"),
    # A caller's own pool: R that is no whole number of words, and padding rows beyond the heads.
    Case("page_write", 33, 4, 1, 64, "bfloat16", num_rows=1),
    Case("slice_write", 33, 4, 3, 128, "int8", num_rows=6, scale="head"),
    Case("token_write", 16, 4, 2, 128, "float32", entries="any", num_rows=6),
    Case("page_write", 33, 4, 1, 128, "float8_e5m2", num_rows=7, is_flat=False),
    # A page longer than a window that has no divisor but 1.
    Case("page_write", 61, 29, 1, 64, "float32", entries="live"),
]
CASES = [*_write_cases(), *SPECIAL]
COPIES = [
    Case("copy_pages", 5, 4, 2, 128, "bfloat16", "holes"),
    Case("copy_pages", 19, 1, 1, 64, "int8", "holes"),
    Case("copy_pages", 8, 3, 1, 256, "float32", "live"),
    Case("copy_pages", 1, 33, 3, 80, "float8_e4m3fn", "live"),
    Case("copy_pages", 3, 2, 1, 128, "float8_e5m2", "none"),
]


def _runs():
    """Each case in one mode, an op's cases in turn."""
    modes = {op: itertools.cycle(cases.MODES) for op in (*OPS, "copy_pages")}
    return [(case, next(modes[case.op])) for case in CASES + COPIES]


def _same(actual, wanted):
    found = difference(actual, wanted)
    assert found is None, found


@pytest.mark.parametrize("case", CASES + COPIES, ids=lambda case: case.id)
def test_oracle_is_the_plain_loop(case):
    call = make(case)
    _same(call.run("oracle"), expected(call))


@pytest.mark.parametrize(
    ("case", "mode"), _runs(), ids=lambda x: x.id if isinstance(x, Case) else x
)
def test_kernel_is_the_oracle(case, mode):
    call = make(case)
    _same(interpret(lambda: call.run("mosaic_tpu"), mode), call.run("oracle"))


def test_coverage():
    """What the cases above must cover together, so that a trimmed list does not lose it."""
    runs = _runs()
    every = {
        (op, dtype, mode)
        for op, dtype, mode in itertools.product(OPS, POOL_DTYPES, cases.MODES)
    }
    assert every <= {(c.op, c.pool_dtype, m) for c, m in runs}
    for name, wanted in {
        "page_size": {1, 4, 16, 24, 33},
        "num_kv_heads": {1, 2, 3, 5, 8},
        "head_dim": {64, 80, 96, 128, 192, 256},
        "num_tokens": {1, 7, 16, 33, 61, 70},
        "new_dtype": {"float32", "bfloat16"},
        "is_flat": {True, False},
        "scale": {"none", "tensor", "head"},
        "entries": {"any", "holes", "live", "equal", "implicit", "none"},
    }.items():
        assert wanted <= {getattr(c, name) for c in CASES}, name
    quantized = {
        (c.pool_dtype, c.scale) for c in CASES if jnp.dtype(c.pool_dtype).itemsize == 1
    }
    assert {(d, s) for d in POOL_DTYPES[2:] for s in ("none", "tensor", "head")} <= quantized


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("ANY_ORDER", "any"),
        ("ASCENDING", "holes"),
        ("ALL_LIVE", "live"),
        ("EQUAL_LENGTHS", "equal"),
    ],
)
def test_cases_reach_every_order(name, entries, monkeypatch):
    """The orders that the kernel tells apart do come up in the cases that are named for them."""
    call = make(next(c for c in SPECIAL if c.op == "slice_write" and c.entries == entries))
    seen = []

    def launch(pool, walk, *args, **kwargs):
        seen.append(walk)
        return pool

    monkeypatch.setattr(mosaic_tpu, "_launch", launch)
    slices, num_slices = call.metadata
    mosaic_tpu.slice_write(
        jnp.asarray(call.kv_pages.astype(np.float32)),
        jnp.asarray(call.k),
        jnp.asarray(call.v),
        jnp.asarray(slices),
        jnp.asarray(num_slices),
        k_scale=None,
        v_scale=None,
        num_kv_heads=call.case.num_kv_heads,
        config=call.config(),
    )
    assert int(seen[0][1]) == getattr(mosaic_tpu_walk, name)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "case",
    [
        Case("page_write", 70, 2, 1, 128, entries="any"),
        Case("slice_write", 70, 4, 1, 128, entries="holes"),
        Case("slice_write", 70, 4, 1, 128, entries="live"),
        Case("token_write", 70, 4, 1, 128, entries="any"),
    ],
    ids=lambda case: case.id,
)
def test_several_grid_steps(case, mode, monkeypatch):
    """More entries than are in SMEM at a time."""
    monkeypatch.setattr(mosaic_tpu, "ENTRIES_PER_STEP", 16)
    call = make(case, seed=1)  # a seed of its own: the shapes must not be in jit's cache
    jax.clear_caches()
    result = interpret(lambda: call.run("mosaic_tpu"), mode)
    jax.clear_caches()
    _same(result, call.run("oracle"))


@pytest.mark.parametrize("mode", cases.MODES)
def test_copy_in_several_grid_steps(mode, monkeypatch):
    monkeypatch.setattr(mosaic_tpu_copy, "_PAIRS_PER_STEP", 16)
    call = make(Case("copy_pages", 37, 1, 1, 128, "float32", "holes"))
    jax.clear_caches()
    result = interpret(lambda: call.run("mosaic_tpu"), mode)
    jax.clear_caches()
    _same(result, call.run("oracle"))


@pytest.mark.parametrize("count", [-3, 0, 2, cases.INT_MAX])
@pytest.mark.parametrize("backend", ["oracle", "mosaic_tpu"])
def test_num_slices_is_clamped(count, backend):
    call = make(Case("slice_write", 16, 4, 1, 128, entries="live"))
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
    call = make(Case(op, 16, 4, 2, 64, "int8", entries="live", scale="head"))
    positional, keywords = call.arguments()
    scales = [x for x in keywords.values() if isinstance(x, jax.Array)]
    result = interpret(
        lambda: getattr(pallas_paged, op)(
            *positional, **keywords, config=call.config(), backend=backend
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
