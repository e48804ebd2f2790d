# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The writes by XLA's own operations: the pool stays where it is, however little is written."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged

NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM = 512, 8, 2, 64


def _ids(*values):
    return jnp.array(values, jnp.int32)


def _calls(first):
    """Op -> a call that writes one entry, to page `first`; the ids are traced."""
    k = jax.random.normal(jax.random.key(0), (PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM))
    v = jax.random.normal(jax.random.key(1), k.shape)
    slice_ = jnp.stack([first * PAGE_SIZE, _ids(1)[0], _ids(3)[0]])[:, None]
    ids = first[None]
    return {
        "page_write": lambda pool, **o: pallas_paged.page_write(pool, k, v, ids, **o),
        "slice_write": lambda pool, **o: pallas_paged.slice_write(pool, k, v, slice_, 1, **o),
        "token_write": lambda pool, **o: pallas_paged.token_write(
            pool, k[:1], v[:1], ids * PAGE_SIZE, **o
        ),
        "copy_pages": lambda pool, **o: pallas_paged.copy_pages(pool, ids + 1, ids, **o),
    }


@pytest.mark.parametrize("backend", ["oracle", "xla"])
@pytest.mark.parametrize("op", ["page_write", "slice_write", "token_write", "copy_pages"])
def test_one_entry_copies_no_pool(op, backend):
    """XLA for CPUs copied it for a scatter with one index: 25 ms a call for a pool of 134 MB."""

    def write_in_two_layers(pool, first):
        for page in (first, first + 5):
            pool = _calls(page)[op](pool, backend=backend)
        return pool

    pool = pallas_paged.make_kv_pages(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, jnp.float32)
    pool = jax.random.normal(jax.random.key(2), pool.shape)
    before, first = np.asarray(pool), _ids(17)[0]
    compiled = jax.jit(write_in_two_layers, donate_argnums=0).lower(pool, first).compile()
    sizes = [
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"= [a-z]+32\[([\d,]+)\]\S* copy\(", compiled.as_text())
    ]
    assert max(sizes, default=0) < pool.size, "the pool is copied"
    changed = np.flatnonzero((np.asarray(compiled(pool, first)) != before).any(axis=(1, 2, 3)))
    assert changed.tolist() == [17, 22]
