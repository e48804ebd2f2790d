# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A step of a model for the tests of adapters, and in numpy what must come out of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.package import adapter_stand_ins as stand_ins

FLOAT32 = np.dtype(np.float32)
JUNK = (2_147_480_000, -1, -(2**31), stand_ins.INVALID)


@dataclasses.dataclass
class Batch:
    """One step of a model: what it is given, and the pool before and after its writes."""

    lens: list  # (new tokens, all tokens) of every sequence
    q: np.ndarray  # [T, N, H], with rows behind the last sequence's
    k: np.ndarray  # [T, K, H], float32, not quantised
    v: np.ndarray
    table: np.ndarray  # [S, M]
    kv_lens: np.ndarray  # [S]
    cu_q_lens: np.ndarray  # [S + 1]
    slots: np.ndarray  # [T], a sentinel behind the last sequence's
    before: np.ndarray  # [P, page_size, R, C]
    after: np.ndarray
    stored: list  # (keys, values) [kv_len, K, H] float32 of every sequence, as the pool holds them

    @property
    def num_seqs(self):
        return len(self.lens)

    def five(self, pool):
        """A copy on the device, [P, page_size, R / p, p, C]."""
        per_word = 4 // pool.dtype.itemsize
        *page, num_rows, num_lanes = pool.shape
        return jnp.array(pool.reshape(*page, num_rows // per_word, per_word, num_lanes))

    def expect_pool(self, found):
        """Every byte of the pool, NaN where nothing is."""
        found = np.asarray(found).reshape(self.after.shape)
        np.testing.assert_array_equal(found.view(np.uint8), self.after.view(np.uint8))

    def expect(self, found, *, sm_scale, causal=True, window=None, cap=None, sinks=None):
        """Dense attention in float64, query by query; rows of no sequence are zeros."""
        wanted = np.zeros(self.q.shape)
        for s, (num_new, length) in enumerate(self.lens):
            keys, values = (
                np.repeat(x.astype(np.float64), self.q.shape[1] // x.shape[1], axis=1)
                for x in self.stored[s]
            )
            for i in range(num_new):
                row, position = self.cu_q_lens[s] + i, length - num_new + i
                scores = np.einsum("nh,jnh->nj", self.q[row], keys) * sm_scale
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                j = np.arange(length)
                hidden = (j > position) & causal | (j <= position - (window or length + 1))
                scores[:, hidden] = -np.inf
                extra = np.full((len(scores), 1), -np.inf) if sinks is None else sinks[:, None]
                weights = np.exp(np.concatenate([scores, extra], axis=1))
                weights = weights[:, :-1] / weights.sum(axis=1, keepdims=True)
                wanted[row] = np.einsum("nj,jnh->nh", weights, values)
        np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-5, rtol=2e-5)


def make_batch(
    lens=((1, 13), (5, 5), (9, 21)),
    *,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    page_size=8,
    dtype=FLOAT32,
    k_scale=1.0,
    v_scale=1.0,
    max_seqs=5,
    width=4,
):
    """Pages in any order, page 0 free (a slot there is the sentinel), NaN wherever nothing is."""
    rng = np.random.default_rng(0)
    num_new = [n for n, _ in lens]
    num_tokens, total = sum(num_new) + 3, sum(length for _, length in lens)
    q = rng.normal(size=(num_tokens, num_heads, head_dim)).astype(np.float32)
    k, v = (
        rng.normal(size=(num_tokens, num_kv_heads, head_dim)).astype(np.float32) for _ in range(2)
    )
    table = rng.choice(JUNK, size=(max_seqs, width)).astype(np.int32)
    kv_lens = np.resize(np.array([-1, stand_ins.INVALID], np.int32), max_seqs)
    num_pages = 2 + total // page_size + len(lens)
    pages = iter(1 + rng.permutation(num_pages - 1))
    paired = head_dim > 64
    rows = num_kv_heads * (2 if paired else 1)
    before = np.full((num_pages, page_size, rows, 128), np.nan).astype(dtype)
    after, stored, slots = before.copy(), [], np.full(num_tokens, stand_ins.INVALID, np.int32)
    first = 0
    for s, (new, length) in enumerate(lens):
        table[s, : -(-length // page_size)] = [next(pages) for _ in range(-(-length // page_size))]
        kv_lens[s] = length
        old = rng.normal(size=(2, length - new, num_kv_heads, head_dim)).astype(np.float32)
        keys = np.concatenate([old[0], k[first : first + new]]) * np.float32(1 / k_scale)
        values = np.concatenate([old[1], v[first : first + new]]) * np.float32(1 / v_scale)
        keys, values = keys.astype(dtype), values.astype(dtype)
        for j in range(length):
            slot = np.zeros((rows, 128), dtype)
            if paired:
                slot[0::2, :head_dim], slot[1::2, :head_dim] = keys[j], values[j]
            else:
                slot[:, :head_dim], slot[:, 64 : 64 + head_dim] = keys[j], values[j]
            page, row = table[s, j // page_size], j % page_size
            after[page, row] = slot
            if j < length - new:
                before[page, row] = slot
            else:
                slots[first + j - (length - new)] = page * page_size + row
        stored.append((keys.astype(np.float32) * k_scale, values.astype(np.float32) * v_scale))
        first += new
    cu_q_lens = np.full(max_seqs + 1, -1, np.int32)
    cu_q_lens[: len(lens) + 1] = np.append(0, np.cumsum(num_new))
    return Batch(list(lens), q, k, v, table, kv_lens, cu_q_lens, slots, before, after, stored)
