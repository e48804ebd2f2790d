# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Spread the pages of long sequences over four devices (context parallelism).

    python -m examples.spread_a_long_context

Page j of a sequence lies on device j % 4. Each device writes the new tokens that belong to its
pages, and attends to the keys of its pages. The log-sum-exp joins what the devices have found. A
chunk of a prefill also sees its own tokens, causally; no device needs pages for that, because every
device has the new keys and values.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_paged as pp

NUM_DEVICES = 4
NUM_HEADS = 8
NUM_KV_HEADS = 2
HEAD_DIM = 128
PAGE_SIZE = 8
KV_LENS = np.array([150, 93])  # with the new tokens
Q_LENS = np.array([1, 21])  # a decode and a chunk
PAGES_PER_SEQ = 20
SCALE = HEAD_DIM**-0.5

CONTEXT, EVERYWHERE = P("context"), P()


def num_local(length: jax.Array) -> jax.Array:
    """How many of the first `length` tokens of a sequence lie on this device."""
    stripe = PAGE_SIZE * NUM_DEVICES  # a page of each device
    rest = length % stripe - lax.axis_index("context") * PAGE_SIZE
    return length // stripe * PAGE_SIZE + jnp.clip(rest, 0, PAGE_SIZE)


def step(
    q: jax.Array,  # [T, N, H]
    k: jax.Array,  # [T, K, H]
    v: jax.Array,  # [T, K, H]
    pool: jax.Array,  # [P, page_size, R, C], the pages of this device
    kv_lens: jax.Array,  # int32[S]
    page_indices: jax.Array,  # int32[S, M], for this device: M pages of it for each sequence
    cu_q_lens: jax.Array,  # int32[S + 1]
    num_seqs: jax.Array,  # int32[1]
) -> tuple[jax.Array, jax.Array]:
    """What one device computes: the output of all rows, and its part of the pool."""
    num_tokens, device = len(q), lax.axis_index("context")
    seq = jnp.searchsorted(cu_q_lens[1:], jnp.arange(num_tokens), side="right")
    starts = kv_lens - jnp.diff(cu_q_lens)  # the position of the first new token
    position = starts[seq] + jnp.arange(num_tokens) - cu_q_lens[seq]
    page, row = position // PAGE_SIZE, position % PAGE_SIZE
    slot = page_indices[seq, page // NUM_DEVICES] * PAGE_SIZE + row
    slots = jnp.where(page % NUM_DEVICES == device, slot, -1).astype(jnp.int32)
    pool = pp.token_write(pool, k, v, slots, num_kv_heads=NUM_KV_HEADS)

    # The tokens before the new ones: every row sees all of them, so that no mask is needed.
    options = {"sm_scale": SCALE, "num_kv_heads": NUM_KV_HEADS, "return_lse": True}
    metadata = num_local(starts), page_indices, cu_q_lens, num_seqs
    past = pp.ragged_paged_attention(q, pool, *metadata, causal=False, **options)
    states = [lax.all_gather(x, "context") for x in past]

    # The new tokens, causally, from a small pool that holds nothing else.
    q_lens = jnp.diff(cu_q_lens)
    num_pages = -(-q_lens // PAGE_SIZE)
    first_page = jnp.cumsum(num_pages) - num_pages  # each sequence has whole pages of it
    new = pp.make_kv_pages(
        num_tokens // PAGE_SIZE + len(q_lens), PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, pool.dtype
    )
    slots = first_page[seq] * PAGE_SIZE + jnp.arange(num_tokens) - cu_q_lens[seq]
    new = pp.token_write(new, k, v, slots.astype(jnp.int32), num_kv_heads=NUM_KV_HEADS)
    table = first_page[:, None] + jnp.arange(num_tokens // PAGE_SIZE + 1)
    own = pp.ragged_paged_attention(
        q, new, q_lens, table.astype(jnp.int32), cu_q_lens, num_seqs, **options
    )
    outs, lses = (jnp.concatenate([x, y[None]]) for x, y in zip(states, own, strict=True))
    return pp.merge_attention_states(outs, lses)[0], pool


def main() -> None:
    mesh = jax.make_mesh((NUM_DEVICES,), ("context",))
    rng = np.random.default_rng(0)
    num_seqs, num_tokens = len(KV_LENS), int(Q_LENS.sum())
    q = rng.standard_normal((num_tokens, NUM_HEADS, HEAD_DIM), np.float32)
    k, v = rng.standard_normal((2, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float32)
    # One device would have this pool and this table.
    whole = pp.make_kv_pages(
        num_seqs * PAGES_PER_SEQ, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, jnp.float32
    )
    whole = jnp.asarray(rng.standard_normal(whole.shape, np.float32))
    table = rng.permutation(num_seqs * PAGES_PER_SEQ).reshape(num_seqs, PAGES_PER_SEQ)
    cu_q_lens = np.append(0, np.cumsum(Q_LENS))
    kv_lens, cu_q_lens, count = (
        jnp.asarray(x, jnp.int32) for x in (KV_LENS, cu_q_lens, [num_seqs])
    )

    # Device d has the pages j * 4 + d of each sequence, one sequence after the other.
    stripes = table.reshape(num_seqs, -1, NUM_DEVICES).transpose(2, 0, 1)  # [devices, S, M]
    spread = pp.gather_pages(whole, jnp.asarray(stripes.reshape(-1), jnp.int32))
    spread = jax.device_put(spread, NamedSharding(mesh, CONTEXT))
    local = jnp.arange(stripes[0].size, dtype=jnp.int32).reshape(num_seqs, -1)

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(EVERYWHERE, EVERYWHERE, EVERYWHERE, CONTEXT, *[EVERYWHERE] * 4),
        out_specs=(EVERYWHERE, CONTEXT),
        check_vma=False,
    )
    out, spread = jax.jit(sharded, donate_argnums=3)(
        q, k, v, spread, kv_lens, local, cu_q_lens, count
    )
    print("the pool of one device:", spread.addressable_shards[0].data.shape)

    expected, whole = pp.write_and_attend(
        *(jnp.asarray(x) for x in (q, k, v)),
        whole,
        kv_lens,
        jnp.asarray(table, jnp.int32),
        cu_q_lens,
        count,
        sm_scale=SCALE,
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    back = pp.gather_pages(whole, jnp.asarray(stripes.reshape(-1), jnp.int32))
    np.testing.assert_array_equal(spread, back)
    print(f"{NUM_DEVICES} devices computed what one computes, each from a quarter of the pages.")


if __name__ == "__main__":
    # The CPU stands for four devices. This must be said before jax uses any device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    main()
