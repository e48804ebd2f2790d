# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Shard the pool and the attention over KV heads (tensor parallelism), on four devices.

    python -m examples.shard_over_heads

Each device holds its own KV heads of every page and the query heads that read them. The page
table and the lengths are the same on all devices. No device needs anything from another one, so the
compiled program has no collectives.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_paged as pp

NUM_SHARDS = 4
NUM_HEADS = 16
NUM_KV_HEADS = 8
HEAD_DIM = 128
PAGE_SIZE = 8
NUM_PAGES = 16
KV_LENS = np.array([19, 30])
Q_LENS = np.array([19, 1])  # a prefill and a decode

HEADS = P(None, "heads")  # axis 1 of q, k, v and the output
POOL = P(None, None, "heads")  # axis 2 of the pool: the rows of a slot
EVERYWHERE = P()


def make_sharded_pool(mesh: jax.sharding.Mesh) -> jax.Array:
    """The pools of the shards, joined along their rows.

    A slot has padding rows where its heads do not fill whole tiles. They are padded per shard, so
    each shard's pool is made for its own number of heads.
    """

    def of_shard() -> jax.Array:
        return pp.make_kv_pages(
            NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS // NUM_SHARDS, HEAD_DIM, jnp.float32
        )

    make = jax.shard_map(of_shard, mesh=mesh, in_specs=(), out_specs=POOL, check_vma=False)
    return jax.jit(make)()


def step(
    q: jax.Array,  # [T, N, H]
    k: jax.Array,  # [T, K, H]
    v: jax.Array,  # [T, K, H]
    pool: jax.Array,  # [P, page_size, R, C]
    kv_lens: jax.Array,  # int32[S]
    page_indices: jax.Array,  # int32[S, M]
    cu_q_lens: jax.Array,  # int32[S + 1]
    num_seqs: jax.Array,  # int32[1]
) -> tuple[jax.Array, ...]:
    """What one device computes: its heads of the new tokens, its rows of the pool."""
    return pp.write_and_attend(
        q, k, v, pool, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=HEAD_DIM**-0.5
    )


def main() -> None:
    mesh = jax.make_mesh((NUM_SHARDS,), ("heads",))
    rng = np.random.default_rng(0)
    num_tokens = int(Q_LENS.sum())
    q = rng.standard_normal((num_tokens, NUM_HEADS, HEAD_DIM), np.float32)
    k, v = rng.standard_normal((2, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float32)
    metadata = [
        jnp.asarray(x, jnp.int32)
        for x in (
            KV_LENS,
            rng.permutation(NUM_PAGES)[:8].reshape(2, 4),
            np.append(0, np.cumsum(Q_LENS)),
            [2],
        )
    ]

    # `check_vma=False` is needed around writes on a GPU, and harmless elsewhere.
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(HEADS, HEADS, HEADS, POOL, *[EVERYWHERE] * 4),
        out_specs=(HEADS, POOL),
        check_vma=False,
    )
    program = functools.partial(jax.jit, donate_argnums=3)(sharded)
    arrays = [jax.device_put(x, NamedSharding(mesh, HEADS)) for x in (q, k, v)]
    arguments = (*arrays, make_sharded_pool(mesh), *metadata)

    text = program.lower(*arguments).compile().as_text()
    assert text is not None
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "permute("))

    out, pool = program(*arguments)
    print("the pool of one device:", pool.addressable_shards[0].data.shape)

    whole = pp.make_kv_pages(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, jnp.float32)
    expected, _ = step(*(jnp.asarray(x) for x in (q, k, v)), whole, *metadata)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    print(f"{NUM_SHARDS} devices computed what one computes, without a collective.")


if __name__ == "__main__":
    # The CPU stands for four devices. This must be said before jax uses any device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_SHARDS)
    main()
