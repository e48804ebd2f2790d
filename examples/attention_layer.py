# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""An attention layer of a small JAX model over a paged pool: prefill, then decode.

    python -m examples.attention_layer

The layer projects, rotates (RoPE), writes the new keys and values, attends, and projects back. One
function serves both phases: in the prefill a sequence has many new tokens, in a decode one. At the
end the program compares all rows with plain attention over the whole sequences, without a pool.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_paged as pp

WIDTH = 64  # of the residual stream
NUM_HEADS = 4
NUM_KV_HEADS = 2  # two query heads share one KV head
HEAD_DIM = 128
PAGE_SIZE = 8
PROMPT_LENS = (13, 8)
NUM_DECODES = 5


class Batch(NamedTuple):
    """The metadata of one step. See pallas_paged/README.md for the meaning of the fields."""

    positions: jax.Array  # int32[T], the place of each new token in its sequence
    kv_lens: jax.Array  # int32[S], the lengths of the sequences with their new tokens
    page_indices: jax.Array  # int32[S, M], the page table
    cu_q_lens: jax.Array  # int32[S + 1], where the new tokens of each sequence begin
    num_seqs: jax.Array  # int32[1]


def make_batch(page_table: np.ndarray, kv_lens: np.ndarray, q_lens: np.ndarray) -> Batch:
    """The metadata of a step in which sequence s has q_lens[s] new tokens."""
    positions = [np.arange(end - new, end) for end, new in zip(kv_lens, q_lens, strict=True)]
    return Batch(
        positions=jnp.asarray(np.concatenate(positions), jnp.int32),
        kv_lens=jnp.asarray(kv_lens, jnp.int32),
        page_indices=jnp.asarray(page_table, jnp.int32),
        cu_q_lens=jnp.asarray(np.append(0, np.cumsum(q_lens)), jnp.int32),
        num_seqs=jnp.asarray([len(kv_lens)], jnp.int32),
    )


def make_params(seed: int) -> dict[str, jax.Array]:
    """Random projections."""
    widths = {
        "q": (WIDTH, NUM_HEADS * HEAD_DIM),
        "k": (WIDTH, NUM_KV_HEADS * HEAD_DIM),
        "v": (WIDTH, NUM_KV_HEADS * HEAD_DIM),
        "o": (NUM_HEADS * HEAD_DIM, WIDTH),
    }
    keys = jax.random.split(jax.random.key(seed), len(widths))
    return {
        name: jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, widths.items(), strict=True)
    }


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """RoPE on `[T, heads * H]`, head by head.

    Head by head on the projection's own lanes, because on a TPU XLA copies a view `[T, heads, H]`.
    """
    frequencies = 10_000.0 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = positions[:, None].astype(jnp.float32) * frequencies  # [T, H / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    rotated = []
    for head in jnp.split(x, x.shape[1] // HEAD_DIM, axis=1):
        first, second = jnp.split(head, 2, axis=1)
        rotated += [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=1)


def project(
    params: dict[str, jax.Array], x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q `[T, N, H]`, and k and v `[T, K*H]`, as a projection makes them."""
    q = rotate(x @ params["q"], positions).reshape(-1, NUM_HEADS, HEAD_DIM)
    k = rotate(x @ params["k"], positions)
    return q, k, x @ params["v"]


# The pool is donated to the step, so that it is updated in place.
@functools.partial(jax.jit, donate_argnames="pool")
def attention_layer(
    params: dict[str, jax.Array], pool: jax.Array, x: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """One step of the layer: x `[T, WIDTH]` to `[T, WIDTH]`, and the pool."""
    q, k, v = project(params, x, batch.positions)
    out, pool = pp.write_and_attend(
        q,
        k,
        v,
        pool,
        batch.kv_lens,
        batch.page_indices,
        batch.cu_q_lens,
        batch.num_seqs,
        sm_scale=HEAD_DIM**-0.5,
        num_kv_heads=NUM_KV_HEADS,
    )
    return out.reshape(x.shape[0], -1) @ params["o"], pool


@jax.jit
def plain_attention(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The same layer over one whole sequence, without a pool."""
    length = x.shape[0]
    q, k, v = project(params, x, jnp.arange(length))
    k, v = (part.reshape(length, NUM_KV_HEADS, HEAD_DIM) for part in (k, v))
    out = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    return out.reshape(length, -1) @ params["o"]


def main() -> None:
    params = make_params(seed=0)
    rng = np.random.default_rng(0)
    # The inputs of the layer for every position of both sequences. In a model they come from the
    # layer below.
    xs = [rng.standard_normal((n + NUM_DECODES, WIDTH), np.float32) for n in PROMPT_LENS]

    pool = pp.make_kv_pages(16, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, jnp.float32)
    page_table = rng.permutation(16).reshape(2, 8)[:, :3]  # 3 pages for each sequence, anywhere

    # Prefill: all tokens of the prompts in one packed batch.
    kv_lens = np.array(PROMPT_LENS)
    batch = make_batch(page_table, kv_lens, q_lens=kv_lens)
    prompts = np.concatenate([x[:n] for x, n in zip(xs, PROMPT_LENS, strict=True)])
    out, pool = attention_layer(params, pool, prompts, batch)
    results = [[part] for part in np.split(np.asarray(out), [PROMPT_LENS[0]])]

    # Decode: one new token per sequence and step. The program is compiled once for this shape.
    for _ in range(NUM_DECODES):
        new = np.stack([x[length] for x, length in zip(xs, kv_lens, strict=True)])
        kv_lens = kv_lens + 1
        batch = make_batch(page_table, kv_lens, q_lens=np.array([1, 1]))
        out, pool = attention_layer(params, pool, new, batch)
        for rows, row in zip(results, np.asarray(out), strict=True):
            rows.append(row[None])

    for x, rows in zip(xs, results, strict=True):
        np.testing.assert_allclose(
            np.concatenate(rows), plain_attention(params, x), rtol=1e-4, atol=1e-4
        )
    print(f"Prefill and {NUM_DECODES} decodes agree with plain attention over whole sequences.")


if __name__ == "__main__":
    main()
