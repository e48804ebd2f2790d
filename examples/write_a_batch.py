# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Write the new tokens of a batch into the pages of their sequences, in two ways.

    python -m examples.write_a_batch

The batch holds two sequences. Sequence 0 is new: all of its 10 tokens are written. Sequence 1 has 3
tokens in the pool already and brings 6 more. A page holds 4 tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

import pallas_paged as pp

PAGE_SIZE = 4
NUM_KV_HEADS = 2
HEAD_DIM = 128

# The lengths of the sequences, which include the new tokens, and the numbers of new tokens.
KV_LENS = np.array([10, 9])
Q_LENS = np.array([10, 6])
NUM_TOKENS = int(Q_LENS.sum())

# One row per sequence: entry m names the page that holds positions 4*m, 4*m + 1, ... of the
# sequence. Pages may lie anywhere in the pool.
PAGE_TABLE = np.array([[5, 0, 7], [2, 6, 3]])


def empty_pool() -> jax.Array:
    """A pool of 8 pages."""
    return pp.make_kv_pages(8, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, jnp.float32)


def expected_pool(k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """What the pool must hold: the definition, token by token."""
    pool = np.array(empty_pool())
    token = 0
    for sequence, (kv_len, q_len) in enumerate(zip(KV_LENS, Q_LENS, strict=True)):
        for position in range(kv_len - q_len, kv_len):
            page = PAGE_TABLE[sequence, position // PAGE_SIZE]
            # K of head i is row 2 * i of a slot, and V is row 2 * i + 1.
            slot = pool[page, position % PAGE_SIZE]
            slot[0 : 2 * NUM_KV_HEADS : 2] = k[token]
            slot[1 : 2 * NUM_KV_HEADS : 2] = v[token]
            token += 1
    return pool


def main() -> None:
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM), np.float32)

    # The metadata of a batch. All of it is int32, and all of it may be traced.
    kv_lens = jnp.asarray(KV_LENS, jnp.int32)
    page_indices = jnp.asarray(PAGE_TABLE, jnp.int32)
    cu_q_lens = jnp.asarray(np.append(0, np.cumsum(Q_LENS)), jnp.int32)  # where each one begins
    num_seqs = jnp.asarray([2], jnp.int32)

    # A serving engine calls this once per step and uses its result in every layer.
    w = pp.write_indices(
        page_indices, kv_lens, cu_q_lens, num_seqs, page_size=PAGE_SIZE, num_tokens=NUM_TOKENS
    )
    print("whole pages   :", [int(page) for page in w.page_ids if page >= 0])
    print("slices        :", w.slices[:, : int(w.num_slices[0])].T.tolist())
    print("slots of token:", w.slots.tolist())

    # First way: whole pages by one index per page, and slices for the tokens that fill none. The
    # pool is donated: the old array must not be used again.
    pool = pp.page_write(empty_pool(), k, v, w.page_ids, w.token_starts)
    pool = pp.slice_write(pool, k, v, w.slices, w.num_slices)

    # Second way: one index per token.
    by_tokens = pp.token_write(empty_pool(), k, v, w.slots)

    expected = expected_pool(k, v)
    np.testing.assert_array_equal(pool, expected)
    np.testing.assert_array_equal(by_tokens, expected)
    print("Both ways wrote the same pool, bit for bit.")


if __name__ == "__main__":
    main()
