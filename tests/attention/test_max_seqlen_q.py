# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The promise that no sequence has more than so many new tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from pallas_paged import GpuAttentionConfig, dispatch
from tests.attention.cases import make_case, mismatch, run_oracle
from tests.kv_write.cases import run_all_on_gpu

ON_GPU = jax.default_backend() == "gpu"
needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2"
)
OPTIONS = {"sm_scale": 0.1, "num_kv_heads": 1}
# Rows before, between and after the sequences, a sequence without keys, and heads that are split.
DECODES = ((1, 300), (1, 5), (0, 7), (1, 130), (1, 0), (1, 64))


def make(lens=DECODES):
    return make_case(
        lens,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        page_size=16,
        max_seqs=len(lens) + 2,
        table_width=20,
        dtype="bfloat16",
        pool_dtype="bfloat16",
        num_tokens=sum(n for n, _ in lens) + 11,
    )


@pytest.fixture(autouse=True)
def few_thread_blocks(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(dispatch, "num_multiprocessors", lambda: 3)


def attend(case, backend, **options):
    return pallas_paged.ragged_paged_attention(
        *case.arrays, **OPTIONS, backend=backend, return_lse=True, **options
    )


@needs_new_jax
@pytest.mark.parametrize("config", [None, GpuAttentionConfig(64, 2, 64, 2)])
def test_decodes_need_no_prefill_kernel(config):
    case = make()
    got = run_all_on_gpu(lambda: attend(case, "mosaic_gpu", max_seqlen_q=1, config=config))
    found = mismatch(*got, *run_oracle(case, OPTIONS))
    assert found is None, found


@needs_new_jax
def test_a_kernel_is_left_out():
    """What is launched, by the names of the kernels."""
    case = make()

    def names(max_seqlen_q):
        traced = jax.make_jaxpr(
            functools.partial(attend, case, "mosaic_gpu", max_seqlen_q=max_seqlen_q)
        )()
        text = str(traced)
        return "prefill_" in text, "finish" in text

    assert names(None) == names(33) == (True, False)
    assert names(1) == names(32) == (False, True)  # two query heads fill 64 rows with 32 tokens


@needs_new_jax
def test_a_broken_promise_shows():
    case = make(((1, 40), (40, 64), (2, 8)))
    out, lse = run_all_on_gpu(lambda: attend(case, "mosaic_gpu", max_seqlen_q=1))
    want, want_lse = map(np.asarray, run_oracle(case, OPTIONS))
    begin, end = case.cu_q_lens[1:3]
    kept = np.r_[:begin, end : len(out)]
    found = mismatch(out[kept], lse[kept], want[kept], want_lse[kept])
    assert found is None, found
    assert np.isnan(out[begin:end].astype(np.float32)).all()


@pytest.mark.parametrize("backend", ["oracle", "xla"])
def test_other_backends_need_no_promise(backend):
    case = make(((1, 40), (9, 64), (2, 8)))
    for got, want in zip(attend(case, backend, max_seqlen_q=1), attend(case, backend), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("max_seqlen_q", [0, -1, 1.5, True, "1", jnp.ones(2, jnp.int32)])
def test_what_is_no_number_of_tokens_is_refused(max_seqlen_q):
    with pytest.raises(ValueError, match="argument `max_seqlen_q` is .*wanted None or a static"):
        attend(make(), "oracle", max_seqlen_q=max_seqlen_q)
