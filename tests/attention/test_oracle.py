# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention oracle against float64 loops, on hostile cases, with planted bugs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import layout
from pallas_paged.attention import api, oracle
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from tests.attention.cases import Case, by_loops, make_case

ragged_paged_attention = functools.partial(api.ragged_paged_attention, backend="oracle")


def check(case: Case, tolerance=2e-5, **options) -> None:
    """Raises AssertionError unless the oracle agrees with the loops, log-sum-exp included."""
    out, lse = jax.jit(  # a fresh jit, so that a planted bug is traced
        functools.partial(_call_oracle, num_kv_heads=case.num_kv_heads, **options)
    )(*case.arrays)
    assert out.dtype == case.q.dtype and lse.dtype == jnp.float32
    want_out, want_lse = by_loops(case, **{k: v for k, v in options.items() if v is not None})
    np.testing.assert_allclose(
        np.asarray(out, np.float64), want_out, rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    work = case.cu_q_lens[case.num_seqs[0]]
    assert np.all(np.asarray(out[work:], np.float32) == 0)


def _call_oracle(q, kv_pages, *batch, num_kv_heads, **options):
    traced = {name: options.pop(name) for name in Factors._fields if name in options}
    return oracle.attend(
        q,
        kv_pages,
        Batch(*batch),
        Factors(**{"sm_scale": 1.0} | traced),
        AttentionOptions(num_kv_heads, **options),
    )


# A prefill, a decode, a chunk in the middle, lengths around page and query-block boundaries.
LENS = [(7, 7), (1, 33), (9, 24), (0, 12), (16, 16), (1, 1), (17, 31), (1, 15), (3, 5)]
SHORT = [(6, 6), (1, 11), (4, 9)]

OPTIONS = {
    "plain": {},
    "scaled": {"sm_scale": 32**-0.5},
    "not causal": {"causal": False, "sm_scale": 0.2},
    "window 1": {"sliding_window": 1},
    "window 6": {"sliding_window": 6, "sm_scale": 0.3},
    "window, not causal": {"sliding_window": 3, "causal": False, "sm_scale": 0.3},
    "soft cap": {"soft_cap": 2.5},
    "sinks": {"sinks": np.array([0.5, -3.0, 4.0, 0.0], np.float32), "sm_scale": 0.2},
    "weak mask": {"mask_value": -1.5, "sm_scale": 0.2},
    "usual mask": {"mask_value": -0.7 * float(np.finfo(np.float32).max), "sliding_window": 4},
    "all": {
        "sm_scale": 0.3,
        "sliding_window": 7,
        "soft_cap": 3.0,
        "sinks": np.array([1.0, 0.0, -1.0, 2.0], np.float32),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    check(make_case(LENS), **options)


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_dim, page_size",
    [(5, 1, 64, 4), (12, 2, 128, 3), (3, 3, 80, 1), (6, 2, 16, 16), (2, 1, 192, 7), (1, 1, 256, 5)],
)
def test_head_counts_and_sizes(num_heads, num_kv_heads, head_dim, page_size):
    case = make_case(
        SHORT,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
    )
    check(case, sm_scale=head_dim**-0.5)


def test_boundaries_of_pages_and_query_blocks():
    lengths = [1, 4, 5, 6, 9, 10, 11, 15, 16, 17, 31, 32, 33]
    lens = [(q_len, n) for n in lengths for q_len in sorted({1, min(n, 3), n})]
    check(make_case(lens), sm_scale=0.3)


@pytest.mark.parametrize(
    "dtype, pool_dtype",
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float16"),
        ("float16", "bfloat16"),
        ("bfloat16", "float8_e4m3fn"),
        ("float32", "float8_e5m2"),
    ],
)
def test_narrow_types(dtype, pool_dtype):
    case = make_case(SHORT, dtype=dtype, pool_dtype=pool_dtype)
    rounding = {"float32": 2e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    scales = {}
    if pool_dtype.startswith("float8"):
        scales = {"k_scale": 0.5, "v_scale": np.array([2.0, 0.25], np.float32)}
    check(case, tolerance=rounding, sm_scale=0.3, **scales)


def test_int8_pool():
    scales = {"k_scale": np.array([0.02, 0.03], np.float32), "v_scale": np.float32(0.04)}
    check(make_case(SHORT, pool_dtype="int8"), sm_scale=0.3, **scales)


def test_window_and_scales_may_be_traced():
    case = make_case(SHORT, pool_dtype="float8_e4m3fn")
    traced = jax.jit(
        lambda window, scale: ragged_paged_attention(
            *case.arrays, sliding_window=window, k_scale=scale, v_scale=scale, num_kv_heads=2
        )
    )(jnp.int32(3), jnp.float32(0.5))
    want, _ = by_loops(case, sliding_window=3, k_scale=0.5, v_scale=0.5)
    np.testing.assert_allclose(traced, want, rtol=2e-5, atol=2e-5)


def test_a_batch_without_work_is_zero():
    case = make_case([(0, 5), (0, 0)])
    out, lse = ragged_paged_attention(*case.arrays, num_kv_heads=2, return_lse=True)
    assert not np.any(out) and np.all(np.isneginf(lse))
    *arrays, _ = make_case([(4, 4)]).arrays
    assert not np.any(ragged_paged_attention(*arrays, jnp.array([0], jnp.int32), num_kv_heads=2))


def test_a_sequence_without_keys_is_zero():
    case = make_case([(3, 3), (2, 2)])
    case.kv_lens[1] = 0
    out, lse = ragged_paged_attention(*case.arrays, num_kv_heads=2, return_lse=True)
    assert np.all(np.isfinite(out)) and np.any(out[:3])
    assert not np.any(out[3:]) and np.all(np.isneginf(lse[3:]))


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lens": np.array([-5, 2**31 - 1, -(2**31), 3, 3], np.int32)},
        {"cu_q_lens": np.array([9, 4, -(2**31), 2**31 - 1, 0, 5], np.int32)},
        {"kv_lens": np.array([1, 1, 1, 1, 1], np.int32)},  # fewer tokens than new ones
        {"num_seqs": np.array([2**31 - 1], np.int32)},
        {"num_seqs": np.array([-1], np.int32)},
        {"page_indices": np.full((5, 5), -(2**31), np.int32)},
    ],
)
def test_absurd_metadata_ends(change):
    case = dataclasses.replace(make_case(SHORT), **change)
    jax.block_until_ready(ragged_paged_attention(*case.arrays, num_kv_heads=2))


def test_numbers_do_not_depend_on_chunks_pages_or_company():
    """A row's bits are a function of its position and its sequence alone."""
    length, width = 43, 12
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((3, length, 4, 32)).astype(np.float32)
    k, v = k[:, :2], v[:, :2]
    slots = np.asarray(layout.merge_kv(jnp.asarray(k), jnp.asarray(v), 2))

    def run(start, end, seed):
        rng = np.random.default_rng(seed)
        table = rng.permutation(40)[: 3 * width].reshape(3, width).astype(np.int32)
        pool = rng.standard_normal((40, 5, 2, 128)).astype(np.float32)
        for position in range(end):
            pool[table[1, position // 5], position % 5] = slots[position]
        before = int(rng.integers(0, 9))
        batch = rng.standard_normal((70, 4, 32)).astype(np.float32)
        batch[before : before + end - start] = q[start:end]
        ends = np.array([0, before, before + end - start, 70 - seed], np.int32)
        out = ragged_paged_attention(
            jnp.asarray(batch),
            jnp.asarray(pool),
            jnp.array([20, end, 58], jnp.int32),
            jnp.asarray(table),
            jnp.asarray(ends),
            jnp.array([3], jnp.int32),
            sm_scale=0.2,
            num_kv_heads=2,
        )
        return np.asarray(out)[before : before + end - start]

    whole = run(0, length, seed=1)
    for seed, cuts in enumerate([(0, 16, 32, 43), (0, 1, 2, 15, 17, 43), (0, 30, 42, 43)], 2):
        pieces = [run(a, b, seed) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_memory_does_not_grow_with_the_number_of_sequences():
    def temporaries(max_seqs):
        spec = jax.ShapeDtypeStruct
        compiled = (
            jax.jit(ragged_paged_attention)
            .lower(
                spec((64, 4, 128), jnp.float32),
                spec((512, 8, 4, 128), jnp.float32),
                spec((max_seqs,), jnp.int32),
                spec((max_seqs, 16), jnp.int32),
                spec((max_seqs + 1,), jnp.int32),
                spec((1,), jnp.int32),
            )
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64) < temporaries(4) + 100_000


def test_agrees_with_the_reference_of_jax():
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
        ref_ragged_paged_attention,
    )

    for window, soft_cap in ((None, None), (5, 2.0)):
        case = make_case([(7, 7), (1, 33), (9, 24)], num_heads=6, head_dim=128, page_size=8)
        options = {"sm_scale": 128**-0.5, "sliding_window": window, "soft_cap": soft_cap}
        ours = ragged_paged_attention(*case.arrays, **options)
        theirs = ref_ragged_paged_attention(*case.arrays, **options)
        np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=2e-5, atol=2e-5)


# Planted bugs: each replaces one function of the oracle, and the check must fail.

_real_read, _real_seen, _real_attend = oracle._read_kv, oracle._is_seen, oracle._attend


def _identity_table(kv_pages, page_ids, *rest):
    return _real_read(kv_pages, jnp.arange(page_ids.shape[0]), *rest)


def _pages_in_reverse(kv_pages, page_ids, *rest):
    return _real_read(kv_pages, page_ids[::-1], *rest)


def _unused_rows_leak(kv_pages, page_ids, kv_len, *rest):
    return _real_read(kv_pages, page_ids, 2**30, *rest)


def _all_values_summed(weights, v, is_seen):
    return jnp.einsum("bkgl,klh->bkgh", weights, v)


def _last_key_lost(kv_pages, page_ids, kv_len, *rest):
    return _real_read(kv_pages, page_ids, kv_len - 1, *rest)


def _keys_and_values_swapped(*args):
    return _real_read(*args)[::-1]


def _sees_one_ahead(positions, extent, causal, sliding_window):
    return _real_seen(positions + 1, extent, causal, sliding_window)


def _does_not_see_itself(positions, extent, causal, sliding_window):
    return _real_seen(positions - 1, extent, causal, sliding_window)


def _window_one_too_wide(positions, extent, causal, sliding_window):
    return _real_seen(positions, extent, causal, sliding_window + 1)


def _heads_interleaved(q, *rest):
    swapped = q.swapaxes(1, 2).reshape(q.shape)  # head n reads KV head n % K
    out, lse = _real_attend(swapped, *rest)
    back = (q.shape[0], q.shape[2], q.shape[1])
    return (
        out.reshape(*back, -1).swapaxes(1, 2).reshape(q.shape),
        lse.reshape(back).swapaxes(1, 2),
    )


def _scale_forgotten(q, k, v, is_seen, is_token, sm_scale, *rest):
    return _real_attend(q, k, v, is_seen, is_token, 1.0, *rest)


def _sinks_forgotten(*args):
    return _real_attend(*args[:-1], None)


def _soft_cap_forgotten(*args):
    return _real_attend(*args[:-3], None, *args[-2:])


def test_the_check_passes_without_a_planted_bug():
    check(make_case(SHORT), **OPTIONS["all"])


@pytest.mark.parametrize(
    "name, bug",
    [
        ("_read_kv", _identity_table),
        ("_read_kv", _pages_in_reverse),
        ("_read_kv", _last_key_lost),
        ("_read_kv", _keys_and_values_swapped),
        ("_is_seen", _sees_one_ahead),
        ("_is_seen", _does_not_see_itself),
        ("_is_seen", _window_one_too_wide),
        ("_attend", _heads_interleaved),
        ("_attend", _scale_forgotten),
        ("_attend", _sinks_forgotten),
        ("_attend", _soft_cap_forgotten),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_check_finds_planted_bugs(monkeypatch, name, bug):
    case, options = make_case(SHORT), OPTIONS["all"]
    monkeypatch.setattr(oracle, name, bug)
    with pytest.raises(AssertionError):
        check(case, **options)


def test_the_check_finds_unused_rows_that_leak(monkeypatch):
    """They are cleared, and what is not finite reaches no row that does not see it: two guards."""
    monkeypatch.setattr(oracle, "_read_kv", _unused_rows_leak)
    check(make_case(SHORT), **OPTIONS["all"])
    monkeypatch.setattr(oracle, "_sum_of_values", _all_values_summed)
    with pytest.raises(AssertionError):
        check(make_case(SHORT), **OPTIONS["all"])


# Refusals.


def _refused(message, error=ValueError, **options):
    arrays = dict(
        zip(
            ("q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs"),
            make_case(SHORT).arrays,
            strict=True,
        )
    )
    for name in list(options):
        if name in arrays:
            arrays[name] = options.pop(name)
    with pytest.raises(error, match=re.escape(message)):
        ragged_paged_attention(**arrays, **{"num_kv_heads": 2} | options)


@pytest.mark.parametrize(
    "message, options",
    [
        ("argument `q` is float32[3,4]; wanted", {"q": jnp.zeros((3, 4))}),
        ("argument `q` is int32[3,4,32]; wanted", {"q": jnp.zeros((3, 4, 32), jnp.int32)}),
        ("argument `q` is [1, 2] of type list", {"q": [1, 2]}),
        ("(head_dim 160); wanted a head_dim whose pool has C = 128", {"q": jnp.zeros((3, 4, 160))}),
        ("(3 query heads); wanted a multiple of the 2 KV heads", {"q": jnp.zeros((3, 3, 32))}),
        ("argument `num_kv_heads` is 3; wanted an int >= 1 whose rows fit", {"num_kv_heads": 3}),
        ("argument `num_kv_heads` is 0", {"num_kv_heads": 0}),
        ("argument `kv_pages` is float32[4,5,2]", {"kv_pages": jnp.zeros((4, 5, 2))}),
        ("argument `kv_lens` is float32[5]", {"kv_lens": jnp.zeros(5)}),
        ("argument `kv_lens` is int32[4]; wanted int32[5]", {"kv_lens": jnp.zeros(4, jnp.int32)}),
        (
            "argument `cu_q_lens` is int32[5]; wanted int32[6]",
            {"cu_q_lens": jnp.zeros(5, jnp.int32)},
        ),
        ("argument `page_indices` is int32[5,0]", {"page_indices": jnp.zeros((5, 0), jnp.int32)}),
        ("argument `num_seqs` is uint32[]", {"num_seqs": jnp.uint32(1)}),
        ("argument `sliding_window` is 0", {"sliding_window": 0}),
        ("argument `sliding_window` is float32[]", {"sliding_window": jnp.float32(3)}),
        ("argument `soft_cap` is 0.0; wanted None or a number > 0", {"soft_cap": 0.0}),
        ("argument `sinks` is float32[2]; wanted None or float32[4]", {"sinks": jnp.zeros(2)}),
        ("argument `k_scale` is 0.5", {"k_scale": 0.5}),
        ("argument `config` is 7", {"config": 7}),
        ("backend is 'cuda'", {"backend": "cuda"}),
    ],
)
def test_mistakes_are_refused_by_a_sentence(message, options):
    _refused(message, **options)


def test_a_backend_that_cannot_run_a_call_says_so():
    message = "backend 'mosaic_gpu' cannot run this call: "
    _refused(message, error=NotImplementedError, backend="mosaic_gpu")


def test_derivatives_and_vmap_are_refused_by_a_sentence():
    q, *rest = make_case(SHORT).arrays
    with pytest.raises(NotImplementedError, match="ragged_paged_attention: no derivative"):
        jax.grad(lambda q: ragged_paged_attention(q, *rest, num_kv_heads=2).sum())(q)
    with pytest.raises(NotImplementedError, match="ragged_paged_attention: vmap is not supported"):
        jax.vmap(lambda q: ragged_paged_attention(q, *rest, num_kv_heads=2))(jnp.stack([q, q]))
