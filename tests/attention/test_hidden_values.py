# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the mask, a window or a length hides from a row does not reach it, whatever it holds.

A value that is not finite is put where a row must not see it; the row must stay what it was. The
kernels run on what they run on: on a TPU's interpreter, on a GPU or its interpreter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import dispatch, ragged_paged_attention
from pallas_paged.attention.gpu import launch as mosaic_gpu
from pallas_paged.attention.tpu import launch as mosaic_tpu
from tests.attention.cases import interpret_all, make_case
from tests.kv_write.cases import run_all_on_gpu

ON_GPU = jax.default_backend() == "gpu"
PAGE_SIZE, HEAD_DIM = 8, 128
# A prefill, a chunk behind tokens, a decode.
LENS = [(40, 40), (9, 61), (1, 50)]
CONFIGS: dict[str, Any] = {
    "oracle": None,
    "xla": None,
    "mosaic_tpu": mosaic_tpu.TpuAttentionConfig(128, 128, 2),
    "mosaic_gpu": mosaic_gpu.GpuAttentionConfig(64, 2, 64, 2),
}
BACKENDS = ["oracle", "xla", "mosaic_gpu"] if ON_GPU else list(CONFIGS)
POOLS = ["bfloat16", "float8_e5m2"]


@pytest.fixture(autouse=True)
def few_thread_blocks(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(dispatch, "num_multiprocessors", lambda: 2)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "mosaic_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU needs jax 0.11.2")
    return request.param


def _case(pool_dtype):
    return make_case(
        LENS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        dtype="bfloat16",
        pool_dtype=pool_dtype,
    )


def _run(case, backend, **options):
    """[out, log-sum-exp], float64."""
    options = {"sm_scale": HEAD_DIM**-0.5, "num_kv_heads": 2, "return_lse": True} | options

    def call():
        return ragged_paged_attention(
            *case.arrays, **options, config=CONFIGS[backend], backend=backend
        )

    if backend == "mosaic_tpu":
        results: Any = interpret_all(call, "eager", detect_races=False)
    elif backend == "mosaic_gpu":
        results = run_all_on_gpu(call, detect_races=False)
    else:
        results = call()
    return [np.asarray(x, np.float64) for x in results]


def _with(case, seq, positions, row, value):
    """The case with `value` in K (row 0) or V (row 1) of all heads at positions of a sequence."""
    positions = np.asarray(positions)
    pages = case.page_indices[seq, positions // PAGE_SIZE]
    pool = np.array(case.kv_pages.astype(jnp.float32))
    for head in range(2):
        pool[pages, positions % PAGE_SIZE, 2 * head + row] = value
    return dataclasses.replace(case, kv_pages=jnp.asarray(pool).astype(case.kv_pages.dtype))


@pytest.mark.parametrize("pool_dtype", POOLS)
def test_pages_before_the_window(backend, pool_dtype):
    """Pages that no row's window reaches are freed: their entries are -1 or lead to garbage."""
    case = _case(pool_dtype)
    wanted = _run(case, backend, sliding_window=12)
    table = case.page_indices.copy()
    for seq, (q_len, kv_len) in enumerate(LENS):
        num_freed = max(0, kv_len - q_len - 12 + 1) // PAGE_SIZE
        table[seq, :num_freed] = np.resize([-1, 2**31 - 1], num_freed)
    assert (table != case.page_indices).sum() >= 8
    # What a page id that is no page may be taken for holds NaN, unless a sequence has it.
    pool = np.array(case.kv_pages.astype(jnp.float32))
    unused = sorted(set(range(len(pool))) - set(table[table >= 0]))
    pool[unused] = np.nan
    freed = dataclasses.replace(
        case, page_indices=table, kv_pages=jnp.asarray(pool).astype(case.kv_pages.dtype)
    )
    for found, want in zip(_run(freed, backend, sliding_window=12), wanted, strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("pool_dtype", "value"), [("bfloat16", np.nan), ("bfloat16", -np.inf), ("float8_e5m2", np.inf)]
)
def test_keys_of_later_tokens(backend, pool_dtype, value):
    """A key that only later rows see, in the same block as what the earlier ones see."""
    case = _case(pool_dtype)
    wanted = _run(case, backend)
    poisoned = _with(_with(case, 0, [23], 0, value), 1, [58], 0, value)
    first_of_1 = case.cu_q_lens[1] + 58 - (61 - 9)
    rows = [*range(case.cu_q_lens[0], case.cu_q_lens[0] + 23)]
    rows += [*range(case.cu_q_lens[1], first_of_1), case.cu_q_lens[2]]
    # A TPU's tile whose sum is not finite runs again with its exact maxima: other roundings.
    tolerance = 2.0**-7 if backend == "mosaic_tpu" else 0.0
    for found, want in zip(_run(poisoned, backend), wanted, strict=True):
        np.testing.assert_allclose(found[rows], want[rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_of_later_tokens_in_the_oracle(value):
    """The kernels multiply such a value by a weight of 0 and document that; the oracle does not."""
    case = _case("bfloat16")
    wanted, wanted_lse = _run(case, "oracle")
    found, found_lse = _run(_with(case, 0, [23], 1, value), "oracle")
    sees = np.zeros(len(found), bool)
    sees[case.cu_q_lens[0] + 23 : case.cu_q_lens[1]] = True
    np.testing.assert_array_equal(found[~sees], wanted[~sees])
    np.testing.assert_array_equal(found_lse, wanted_lse)
    assert np.all(np.isnan(found[sees]) if np.isnan(value) else np.isinf(found[sees]))


def test_a_mask_value_moves_no_nan():
    """With jax's usual mask value, too, what is hidden stays away."""
    case = _case("bfloat16")
    options = {"mask_value": -0.7 * float(np.finfo(np.float32).max)}
    wanted = _run(case, "oracle", **options)
    poisoned = _with(_with(case, 0, [23], 0, np.nan), 0, [23], 1, np.nan)
    rows = slice(case.cu_q_lens[0], case.cu_q_lens[0] + 23)
    for found, want in zip(_run(poisoned, "oracle", **options), wanted, strict=True):
        np.testing.assert_array_equal(found[rows], want[rows])


@pytest.mark.parametrize("mask_value", [-1e4, -0.7 * float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_mask_value_moves_no_infinity(mask_value, value):
    """One lane of a hidden key makes its score infinite, of either sign, and not NaN."""
    case = _case("bfloat16")
    wanted = _run(case, "oracle", mask_value=mask_value)
    page = case.page_indices[0, 23 // PAGE_SIZE]
    pool = case.kv_pages.at[page, 23 % PAGE_SIZE, :, 0].set(value)
    poisoned = dataclasses.replace(case, kv_pages=pool)
    rows = slice(case.cu_q_lens[0], case.cu_q_lens[0] + 23)
    # Its weight is 0 with the larger mask value, and next to it with the other.
    for found, want in zip(_run(poisoned, "oracle", mask_value=mask_value), wanted, strict=True):
        np.testing.assert_allclose(found[rows], want[rows], atol=1e-6)


def test_values_of_later_tokens_in_later_blocks(backend):
    """A value that no row of a tile sees, in a block that the tile does not take."""
    case = make_case(
        [(200, 200)],
        num_heads=4,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        dtype="bfloat16",
        pool_dtype="bfloat16",
    )
    wanted = _run(case, backend)
    # Position 195 is in a block of its own for every backend; the first tile ends long before.
    for found, want in zip(_run(_with(case, 0, [195], 1, np.nan), backend), wanted, strict=True):
        np.testing.assert_array_equal(found[:120], want[:120])
