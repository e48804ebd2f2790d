# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A packed QKV in place of q, k and v: every op that takes one, every backend that runs here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from pallas_paged import dispatch
from tests.kv_write.cases import run_all_on_gpu

ON_GPU = jax.default_backend() == "gpu"
needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2"
)
NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, NUM_PAGES = 4, 2, 8, 6
METADATA = (
    jnp.array([13, 9, 0], jnp.int32),
    jnp.array([[4, 1], [0, 3], [-1, -1]], jnp.int32),
    jnp.array([0, 5, 14, 14], jnp.int32),
    jnp.array([2], jnp.int32),
)
NUM_TOKENS = 16
SLOTS = jnp.array([44, 41, -1, 40, *range(12)], jnp.int32)
RUNNING = [b for b in dispatch.BACKENDS if not b.startswith("mosaic")]
if ON_GPU:
    RUNNING.append("mosaic_gpu")


def make(head_dim, num_tokens=NUM_TOKENS, dtype=jnp.bfloat16):
    shape = (num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, head_dim)
    qkv = jax.random.normal(jax.random.key(1), shape, jnp.float32).astype(dtype)
    q, k, v = jnp.split(qkv, [NUM_HEADS, NUM_HEADS + NUM_KV_HEADS], axis=1)
    pool = jax.random.normal(
        jax.random.key(2),
        pallas_paged.make_kv_pages(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, head_dim, dtype).shape,
    )
    return qkv, q, k, v, pool.astype(dtype)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 0])
@pytest.mark.parametrize("head_dim", [128, 64, 96])
@pytest.mark.parametrize("backend", RUNNING)
def test_attention_reads_the_first_heads(backend, head_dim, num_tokens):
    qkv, q, _, _, pool = make(head_dim, num_tokens)
    attend = functools.partial(
        pallas_paged.ragged_paged_attention,
        sm_scale=None,
        num_kv_heads=NUM_KV_HEADS,
        backend=backend,
        return_lse=True,
    )
    assert_same(attend(qkv, pool, *METADATA, num_heads=NUM_HEADS), attend(q, pool, *METADATA))


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 0])
@pytest.mark.parametrize("head_dim", [128, 64, 96])
@pytest.mark.parametrize("backend", RUNNING)
def test_write_and_attend_takes_all_of_it(backend, head_dim, num_tokens):
    qkv, q, k, v, pool = make(head_dim, num_tokens)
    call = functools.partial(
        pallas_paged.write_and_attend, num_kv_heads=NUM_KV_HEADS, backend=backend, return_lse=True
    )
    got = call(qkv, None, None, jnp.copy(pool), *METADATA)
    assert_same(got, call(q, k, v, jnp.copy(pool), *METADATA))


@pytest.mark.parametrize("pool_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("op", ["page_write", "slice_write", "token_write"])
@pytest.mark.parametrize("backend", RUNNING)
def test_writes_read_the_last_heads(backend, op, pool_dtype):
    qkv, _, k, v, pool = make(128)
    pool = pallas_paged.make_kv_pages(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, 128, pool_dtype)
    arguments = {
        "page_write": (jnp.array([4, -1, 1], jnp.int32), jnp.array([3, 0, 8], jnp.int32)),
        "slice_write": (jnp.array([[8, 20], [0, 7], [5, 3]], jnp.int32), jnp.array([2], jnp.int32)),
        "token_write": (SLOTS,),
    }[op]
    options = {"num_kv_heads": NUM_KV_HEADS, "backend": backend}
    if pool_dtype != "bfloat16":
        options |= {"k_scale": jnp.array([0.5, 2.0]), "v_scale": 0.25}
    write = getattr(pallas_paged, op)
    got = write(jnp.copy(pool), qkv, None, *arguments, **options)
    want = write(jnp.copy(pool), k, v, *arguments, **options)
    assert np.asarray(want, np.float32).any()
    assert_same(got, want)


@needs_new_jax
def test_the_kernels_of_a_gpu_read_it_where_it_is(monkeypatch):
    """Interpreted where there is no GPU."""
    if not ON_GPU:
        monkeypatch.setattr(dispatch, "num_multiprocessors", lambda: 2)
    qkv, q, k, v, pool = make(64)
    call = functools.partial(
        pallas_paged.write_and_attend, num_kv_heads=NUM_KV_HEADS, return_lse=True, sm_scale=None
    )
    got = run_all_on_gpu(
        lambda: call(qkv, None, None, jnp.copy(pool), *METADATA, backend="mosaic_gpu")
    )
    want = call(q, k, v, jnp.copy(pool), *METADATA, backend="oracle")
    assert_same(got[1], want[1])
    for a, b in zip(got[::2], want[::2], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.02)


def test_the_array_may_begin_with_other_heads():
    """Of what a write is given, only the last heads count."""
    qkv, _, k, v, pool = make(128)
    got = pallas_paged.token_write(
        jnp.copy(pool), qkv[:, NUM_HEADS:], None, SLOTS, num_kv_heads=NUM_KV_HEADS
    )
    assert_same(got, pallas_paged.token_write(jnp.copy(pool), k, v, SLOTS))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 1}, "argument `v` is None of type NoneType; wanted .*as k"),
        ({"v": 1}, "argument `v` is .*; wanted None, as k is"),
        (
            {"num_kv_heads": None},
            "argument `num_kv_heads` is None of type NoneType; wanted an int, because v is None",
        ),
        ({"num_kv_heads": 4}, r"argument `q` is .*; wanted \[T, N \+ 2K, H\] with N >= 1"),
        ({"num_kv_heads": 5}, r"argument `q` is .*; wanted \[T, A, H\] with at least 2 \* 5 heads"),
        ({"num_kv_heads": 0}, "argument `num_kv_heads` is 0; wanted an int >= 1"),
    ],
)
def test_what_is_no_packed_qkv_is_refused(change, message):
    qkv, _, k, v, pool = make(128)
    arrays = {"k": k if "k" in change else None, "v": v if "v" in change else None}
    with pytest.raises(ValueError, match=f"write_and_attend: {message}"):
        pallas_paged.write_and_attend(
            qkv,
            *arrays.values(),
            pool,
            *METADATA,
            num_kv_heads=change.get("num_kv_heads", NUM_KV_HEADS),
        )


@pytest.mark.parametrize("num_heads", [9, 0, 2.5, "4", True])
def test_wrong_numbers_of_query_heads_are_refused(num_heads):
    qkv, _, _, _, pool = make(128)
    with pytest.raises(
        ValueError, match="ragged_paged_attention: argument `num_heads` is .*; wanted "
    ):
        pallas_paged.ragged_paged_attention(
            qkv, pool, *METADATA, num_heads=num_heads, num_kv_heads=NUM_KV_HEADS
        )


@pytest.mark.parametrize("qkv", [jnp.ones((16, 1024)), None, jnp.ones((16, 3, 128))])
def test_writes_refuse_what_is_no_packed_qkv(qkv):
    _, _, _, _, pool = make(128, dtype=jnp.float32)
    with pytest.raises(ValueError, match="token_write: argument `k` is .*; wanted "):
        pallas_paged.token_write(pool, qkv, None, SLOTS, num_kv_heads=NUM_KV_HEADS)
