# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Converters between the pool and other forms of a cache."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from pallas_paged import layout

HEADS = [(1, 64), (3, 80), (2, 128), (5, 32), (4, 256)]


def make_kv(*shape):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2))


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), HEADS)
def test_a_pool_from_caches_is_the_one_that_is_written(num_kv_heads, head_dim):
    k, v = make_kv(6, 4, num_kv_heads, head_dim)
    pool = pallas_paged.make_kv_pages(6, 4, num_kv_heads, head_dim)
    flat = (x.reshape(24, num_kv_heads, head_dim) for x in (k, v))
    wanted = pallas_paged.page_write(pool, *flat, jnp.arange(6, dtype=jnp.int32))
    found = pallas_paged.from_separate_caches(k, v)
    np.testing.assert_array_equal(found, wanted)
    by_head = (jnp.moveaxis(x, 2, 0) for x in (k, v))
    np.testing.assert_array_equal(
        pallas_paged.from_separate_caches(*by_head, heads_first=True), wanted
    )
    for back, x in zip(
        pallas_paged.to_separate_caches(found, num_kv_heads, head_dim), (k, v), strict=True
    ):
        np.testing.assert_array_equal(back, x)


def test_the_pool_has_the_rows_of_its_dtype():
    k, v = make_kv(2, 4, 1, 128)
    assert pallas_paged.from_separate_caches(k, v, dtype=jnp.int8).shape == layout.pool_shape(
        2, 4, 1, 128, jnp.int8
    )


@pytest.mark.parametrize(
    ("lens", "page_size"), [([33, 16, 0, 5], 16), ([3, 1, 2], 1), ([16, 16], 16), ([0], 4)]
)
def test_a_flat_list_of_pages(lens, page_size):
    pages = [-(-n // page_size) for n in lens]
    flat = np.random.default_rng(1).permutation(64)[: sum(pages) + 3].astype(np.int32)
    cu_kv_lens = np.cumsum([0, *(p * page_size for p in pages)]).astype(np.int32)
    table = np.asarray(pallas_paged.page_table_from_flat(flat, cu_kv_lens, page_size, 3))
    for row, (first, count) in enumerate(zip(np.cumsum([0, *pages]), pages, strict=False)):
        wanted = [*flat[first : first + count][:3], *[-1] * 3][:3]
        assert table[row].tolist() == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, v: pallas_paged.merge_kv(k, v[:-1]), "argument `v` is .*, as k"),
        (lambda k, v: pallas_paged.merge_kv(k.astype(jnp.int32), v), "argument `k` is int32"),
        (lambda k, v: pallas_paged.from_separate_caches(k[0], v[0]), "argument `k` .*four dim"),
        (lambda k, v: pallas_paged.from_separate_caches(k, v, heads_first=1), "True or False"),
        (lambda k, v: pallas_paged.split_kv(k, 9, 64), "`slots` is .* for 9 KV heads of 64"),
        (lambda k, v: pallas_paged.split_kv(k, 1, 300), "`head_dim` is 300; wanted an int from 1"),
        (lambda k, v: pallas_paged.page_table_from_flat([1], k, 4, 4), "`page_indices` is"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make_kv(3, 4, 2, 64))


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype"),
    [(2, 64, jnp.bfloat16), (2, 128, jnp.int8), (8, 128, jnp.bfloat16)],
)
def test_a_sharded_pool_is_its_shards(num_kv_heads, head_dim, dtype):
    whole = pallas_paged.make_kv_pages(3, 4, num_kv_heads, head_dim, dtype, num_shards=2)
    shard = pallas_paged.make_kv_pages(3, 4, num_kv_heads // 2, head_dim, dtype)
    assert whole.shape[2] == 2 * shard.shape[2]
    with pytest.raises(ValueError, match="num_shards is 3; wanted a divisor of the"):
        pallas_paged.make_kv_pages(3, 4, num_kv_heads, head_dim, dtype, num_shards=3)
