# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Bugs planted in the GPU writes: the checks of test_gpu.py must catch each.

A bug is one snippet of a module's source, replaced; the modules that import it are made anew. The
test says how it shows in GPU interpret mode. On a GPU only those run that cannot reach memory that
is not theirs.
"""

import jax
import pytest

from pallas_paged.kv_write import gpu
from tests.kv_write.cases import Case, RaceFoundError, difference, expected, make, run_on_gpu
from tests.planted import plant

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2) or jax.default_backend() == "gpu",
    reason="GPU interpret mode is for a CPU with jax 0.11.2",
)

PAGES = Case("page_write", 17, 4, 1, 128, "float32", "any", "float32", block_tokens=4)
MANY = Case("page_write", 47, 4, 1, 128, "float32", "holes", "float32", block_tokens=4)
LONG = Case("page_write", 40, 5, 1, 128, "float32", "implicit", "float32", block_tokens=4)
HOLES = Case("page_write", 17, 4, 1, 128, "float32", "holes", "float32", block_tokens=4)
SLICES = Case("slice_write", 9, 4, 1, 128, "float32", "any", "float32", block_tokens=4)
LIVE_SLICES = Case("slice_write", 9, 4, 1, 128, "float32", "live", "float32", block_tokens=4)
TOKENS = Case("token_write", 29, 4, 1, 128, "float32", "any", "float32", block_tokens=4)
PADDED = Case("token_write", 11, 4, 1, 128, "float32", "any", "float32", num_rows=6, block_tokens=4)
INT8 = Case("token_write", 11, 4, 2, 64, "int8", "live", scale="head", extreme=True)
E4M3 = Case("token_write", 11, 4, 2, 128, "float8_e4m3fn", "live", scale="head", extreme=True)
E5M2 = Case("token_write", 11, 4, 2, 128, "float8_e5m2", "live", scale="head", extreme=True)
BF16 = Case("token_write", 11, 4, 2, 128, "bfloat16", "live", "float32", extreme=True)
COPIES = Case("copy_pages", 16, 1, 2, 128, "float32", "holes")

# name: (module, snippet, what is planted instead, case, symptom)
BUGS = {
    "page_past_the_pool": ("block_tokens", "& (page < spec.num_pages)", "", MANY, "error"),
    "page_below_zero": ("block_tokens", "(page >= 0) &", "(page >= -1) &", PAGES, "error"),
    "start_past_the_batch": (
        "block_tokens",
        "(start <= spec.num_tokens - page_size)",
        "(start <= spec.num_tokens)",
        PAGES,
        "error",
    ),
    "start_below_zero": (
        "block_tokens",
        "is_live &= (start >= 0) & (start <= spec.num_tokens - page",
        "is_live &= (start >= -1) & (start <= spec.num_tokens - page",
        PAGES,
        "bytes",
    ),
    "rest_of_a_page_twice": ("block_tokens", "row + j >= first_row", "row + j >= 0", LONG, "race"),
    "part_past_its_page": (
        "block_tokens",
        "row = jnp.minimum(first_row, page_size - count)",
        "row = first_row",
        LONG,
        "race",
    ),
    "rows_in_reverse": (
        "block_tokens",
        "page * page_size + row + j for",
        "page * page_size + row + count - 1 - j for",
        HOLES,
        "bytes",
    ),
    "slice_past_num_slices": (
        "block_tokens",
        "(entry < num_slices[0])",
        "(entry <= num_slices[0])",
        SLICES,
        "bytes",
    ),
    "slice_leaves_its_page": (
        "block_tokens",
        "slot % spec.page_size <= spec.page_size - length",
        "slot % spec.page_size <= spec.page_size",
        SLICES,
        "race",
    ),
    "slice_overflows": (
        "block_tokens",
        "(start >= 0) & (start <= spec.num_tokens - length)",
        "(start >= 0) & (start + length <= spec.num_tokens)",
        SLICES,
        "error",
    ),
    "slice_too_long": (
        "block_tokens",
        "is_live & (offset + j < length)",
        "is_live & (offset + j <= length)",
        LIVE_SLICES,
        "error/race",
    ),
    "slot_past_the_pool": (
        "block_tokens",
        "(slot >= 0) & (slot < spec.num_slots) & (start",
        "(slot > -100) & (start",
        TOKENS,
        "error",
    ),
    "last_block_twice": ("block_tokens", "& (start + j >= block * count)", "", TOKENS, "race"),
    "pulled_back_and_forgotten": (
        "block_tokens",
        "return first, start - first",
        "return first, 0",
        LIVE_SLICES,
        "bytes",
    ),
    "k_and_v_swapped": (
        "kernel",
        "enumerate((refs.k_smem, refs.v_smem)):\n                plgpu",
        "enumerate((refs.v_smem, refs.k_smem)):\n                plgpu",
        TOKENS,
        "bytes",
    ),
    "not_awaited": (
        "kernel",
        "plgpu.barrier_wait(barrier)\n        _send(",
        "_send(",
        TOKENS,
        "race",
    ),
    "padding_not_written": (
        "kernel",
        "@pl.when(is_live & (head == 0))",
        "@pl.when(head < 0)",
        PADDED,
        "bytes",
    ),
    "zeros_not_committed": ("kernel", "plgpu.commit_smem()\n", "pass\n", PADDED, "race"),
    "scale_of_another_head": ("kernel", "scales[kind][head]", "scales[kind][0]", E4M3, "bytes"),
    "v_scaled_as_k": ("kernel", "scales[kind][head]", "scales[0][head]", INT8, "bytes"),
    "copied_the_wrong_way": (
        "page_copies",
        "ends.get(op, (page_ids[0], page_ids[-1]))",
        "ends.get(op, (page_ids[-1], page_ids[0]))",
        COPIES,
        "race",
    ),
    "copied_from_nowhere": (
        "page_copies",
        "(page_id >= 0) & (page_id < num_pages)",
        "(page_id < num_pages)",
        COPIES,
        "error",
    ),
    "int8_truncated": (
        "quantize",
        "y + jnp.float32(3 << 22)",
        "jnp.trunc(y) + jnp.float32(3 << 22)",
        INT8,
        "bytes",
    ),
    "int8_wraps": ("quantize", "jnp.minimum(jnp.maximum(x, -128.0), 127.0)", "x", INT8, "bytes"),
    "int8_nan": (
        "quantize",
        "jnp.where(x != x, 0.0, jnp.min",
        "jnp.where(x != x, 1.0, jnp.min",
        INT8,
        "bytes",
    ),
    "fp8_not_saturated": ("quantize", "if info.bits == 8:", "if False:", E4M3, "bytes"),
    "fp8_nan": ("quantize", "sign | _nan_code(dtype), jnp", "sign, jnp", E4M3, "bytes"),
    "e5m2_infinity": ("quantize", "| 1 << (info.nmant - 1)", "", E5M2, "bytes"),
    "bf16_nan": ("quantize", "sign | _nan_code(dtype), jnp", "sign, jnp", BF16, "bytes"),
}
NOTHING = ("launch", '"""Writes on Hopper', '"""Writes on a Hopper')
PLANTED = [
    (f"{gpu.__name__}.{module}", old, new) for module, old, new, *_ in (*BUGS.values(), NOTHING)
]
CONTROLS = [
    *(PAGES, MANY, LONG, HOLES, SLICES, LIVE_SLICES, TOKENS, PADDED),
    *(INT8, E4M3, E5M2, BF16, COPIES),
]


def _plant(monkeypatch, module, old, new):
    plant(monkeypatch, gpu.__name__, f"{gpu.__name__}.{module}", old, new)


def _run(call):
    """The call through the module as it now is, past the public op and what that has compiled."""
    arrays, options = call.backend_arguments("mosaic_gpu")
    op = getattr(gpu.launch, call.case.op)
    return jax.jit(lambda arrays: op(*arrays, options))(arrays)


def _symptom(call):
    """How a run differs from the plain loop: "bytes", "race", "error" or None."""
    try:
        result = run_on_gpu(lambda: _run(call))
    except RaceFoundError:
        return "race"
    except jax.errors.JaxRuntimeError as e:
        assert "mosaic_gpu/interpret" in str(e), e  # it ran, and the interpreter refused
        return "error"
    return "bytes" if difference(result, expected(call)) else None


@pytest.mark.parametrize("name", [pytest.param(n, id=f"{n}-{b[4]}") for n, b in BUGS.items()])
def test_gpu_bug_is_caught(name, monkeypatch):
    module, old, new, case, symptom = BUGS[name]
    _plant(monkeypatch, module, old, new)
    assert _symptom(make(case)) in symptom.split("/")


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.id)
def test_without_a_gpu_bug_nothing_shows(case, monkeypatch):
    """The same machinery with nothing planted."""
    _plant(monkeypatch, *NOTHING)
    assert _symptom(make(case)) is None
