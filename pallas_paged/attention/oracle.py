# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What ragged paged attention means, in jax.numpy that jit takes. It is also the CPU backend.

Sequences are computed one after the other, so that memory holds the keys and values of one sequence
and one block of scores. Queries are taken in blocks that begin at *positions in the sequence* that
are multiples of _QUERY_BLOCK, and scores always span the whole page table. So a row's arithmetic
depends, to the last bit, on the row's position and on the tokens of its own sequence. It does not
depend on where this call's new tokens begin, on what else is in the batch, or on which pages hold
the tokens. Nothing is promised across page table widths, head counts, dtypes or jax versions.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import bits, layout
from pallas_paged.attention.options import AttentionOptions, Batch, Factors

# Rows of one matrix product. There are few, because a decode has one and wastes the others. More
# would save a prefill trips of the loop.
_QUERY_BLOCK = 16


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the new tokens over the pages of their sequences; see the public op.

    Args:
      q: [T, N, H].
      kv_pages: [P, page_size, R, C].
      batch: which tokens and pages belong to which sequence.
      factors: the numbers of the call that may be traced.
      options: the static options.

    Returns:
      the output, q's dtype [T, N, H], and the log-sum-exp, f32[T, N].
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_lens, page_indices, cu_q_lens, num_seqs = batch
    sm_scale, sliding_window, k_scale, v_scale, sinks = factors
    causal, num_kv_heads = options.causal, options.num_kv_heads
    soft_cap, mask_value = options.soft_cap, options.mask_value
    max_seqs, table_width = page_indices.shape
    extent = table_width * kv_pages.shape[1]
    group = num_heads // num_kv_heads
    # Whatever the metadata says, rows stay in [0, T), positions stay inside the page table, and all
    # loops end.
    cu_q_lens = jnp.clip(cu_q_lens, 0, num_tokens)
    kv_lens = jnp.clip(kv_lens, 0, extent)

    def one_sequence(
        seq: jax.Array, outputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        kv_len = kv_lens[seq]
        q_start = cu_q_lens[seq]
        q_len = jnp.maximum(cu_q_lens[seq + 1] - q_start, 0)
        first = kv_len - q_len  # position of the first new token
        k, v = _read_kv(
            kv_pages, page_indices[seq], kv_len, k_scale, v_scale, num_kv_heads, head_dim
        )

        def one_block(
            block: jax.Array, outputs: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            positions = block * _QUERY_BLOCK + jnp.arange(_QUERY_BLOCK, dtype=jnp.int32)
            is_row = (positions >= first) & (positions < kv_len)
            rows = q_start + positions - first
            q_block = q.at[jnp.where(is_row, rows, num_tokens)].get(mode="fill", fill_value=0)
            is_seen = _is_seen(positions, extent, causal, sliding_window)
            out, lse = _attend(
                q_block.reshape(_QUERY_BLOCK, num_kv_heads, group, head_dim).astype(jnp.float32),
                k,
                v,
                is_seen,
                jnp.arange(extent) < kv_len,
                sm_scale,
                soft_cap,
                mask_value,
                sinks,
            )
            target = jnp.where(is_row, rows, num_tokens)  # a row past the end is dropped
            outs, lses = outputs
            outs = outs.at[target].set(out.reshape(q_block.shape).astype(q.dtype), mode="drop")
            return outs, lses.at[target].set(lse.reshape(-1, num_heads), mode="drop")

        first_block = first // _QUERY_BLOCK
        has_work = (q_len > 0) & (kv_len > 0)
        end_block = jnp.where(has_work, -(-kv_len // _QUERY_BLOCK), first_block)
        return lax.fori_loop(first_block, end_block, one_block, outputs)

    # Made from q, so that under shard_map they vary over the same axes.
    outputs = (jnp.zeros_like(q), jnp.full_like(q[..., 0], -jnp.inf, jnp.float32))
    return lax.fori_loop(0, jnp.clip(num_seqs[0], 0, max_seqs), one_sequence, outputs)


def _read_kv(
    kv_pages: jax.Array,
    page_ids: jax.Array,
    kv_len: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """k and v of one sequence, f32[K, L, H] each, zero from position kv_len on."""
    page_ids = jnp.clip(page_ids, 0, kv_pages.shape[0] - 1)
    pages, page_ids = bits.gatherable(kv_pages, page_ids)
    slots = pages[page_ids].view(kv_pages.dtype)  # [M, page_size, R, C]
    slots = slots.reshape(-1, *slots.shape[2:])
    is_token = jnp.arange(slots.shape[0])[:, None, None] < kv_len

    def dequantize(x: jax.Array, scale: jax.Array | None) -> jax.Array:
        x = x.astype(jnp.float32)
        if scale is not None:
            x *= jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (num_kv_heads,))[:, None]
        # Selected and not multiplied by 0, because an unused row may hold NaN.
        return jnp.where(is_token, x, 0.0).swapaxes(0, 1)

    k, v = layout.split_kv(slots, num_kv_heads, head_dim)
    return dequantize(k, k_scale), dequantize(v, v_scale)


def _is_seen(
    positions: jax.Array, extent: int, causal: bool, sliding_window: jax.Array | None
) -> jax.Array:
    """bool[B, L]: which of `extent` keys the mask lets the queries at some positions see."""
    q_position = positions[:, None]
    kv_position = jnp.arange(extent, dtype=jnp.int32)
    is_seen = jnp.ones((positions.shape[0], extent), bool)
    if causal:
        is_seen &= kv_position <= q_position
    if sliding_window is not None:
        # A negative window counts as 0, so that the difference cannot overflow.
        is_seen &= kv_position > q_position - jnp.maximum(sliding_window, 0)
    return is_seen


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    is_seen: jax.Array,
    is_token: jax.Array,
    sm_scale: jax.Array,
    soft_cap: float | None,
    mask_value: float | None,
    sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one block of queries.

    Args:
      q: f32[B, K, G, H].
      k, v: f32[K, L, H].
      is_seen: bool[B, L], which keys the mask lets each query see.
      is_token: bool[L], which keys the sequence has.
      sm_scale, soft_cap, mask_value, sinks: see the public op.

    Returns:
      the output f32[B, K, G, H] and the log-sum-exp f32[B, K, G].
    """
    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("bkgh,klh->bkgl", q, k, precision=highest) * sm_scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    is_seen = is_seen[:, None, None]  # [B, 1, 1, L]
    # A mask value moves the score of a hidden key. A score that is NaN or infinite must not reach
    # the row.
    moved = -jnp.inf if mask_value is None else scores + mask_value
    masked = jnp.where(jnp.isfinite(scores), moved, -jnp.inf)
    scores = jnp.where(is_token, jnp.where(is_seen, scores, masked), -jnp.inf)
    largest = jnp.max(scores, axis=-1)  # [B, K, G]
    if sinks is not None:
        sinks = sinks.reshape(q.shape[1:3]).astype(jnp.float32)
        largest = jnp.maximum(largest, sinks)
    shift = jnp.where(
        jnp.isneginf(largest), 0.0, largest
    )  # 0 where a row sees no key, to avoid NaN
    weights = jnp.exp(scores - shift[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks - shift)
    out = _sum_of_values(weights, v, jnp.broadcast_to(is_seen & is_token, weights.shape))
    return out / jnp.where(total > 0, total, 1.0)[..., None], shift + jnp.log(total)


def _sum_of_values(weights: jax.Array, v: jax.Array, is_seen: jax.Array) -> jax.Array:
    """f32[B, K, G, H]: weights f32[B, K, G, L] times v f32[K, L, H], of the keys that a row sees.

    A value that is not finite must only reach the rows that see it. A weight of 0 does not keep it
    from the others, because 0 times NaN is NaN. So the finite values are summed by one product,
    whose bits do not depend on what hidden tokens hold, and the others are added where they are
    seen.
    """
    product = functools.partial(jnp.einsum, "bkgl,klh->bkgh", precision=lax.Precision.HIGHEST)
    is_finite = jnp.isfinite(v)
    out = product(weights, jnp.where(is_finite, v, 0.0))

    def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, is_seen = row
        seen = jnp.where(is_seen[..., None] & ~is_finite[:, None], v[:, None], 0.0)
        return jnp.einsum("kgl,kglh->kgh", weights, seen)

    return lax.cond(
        jnp.all(is_finite), lambda: out, lambda: out + lax.map(of_row, (weights, is_seen))
    )
