# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention of XLA's own operations: for GPUs and CPUs that no kernel here is for.

The batch is cut into query tiles: a decode is a tile of one row, all other new tokens are in tiles
of up to `block_q` rows of one sequence. A group of tiles goes through its keys together, one KV
block of `block_kv` keys of each tile at a time. The pages of a block are gathered, and an online
softmax (Milakov and Gimelshein, 2018) joins the blocks. Memory holds one group's block and nothing
that grows with the page table. On a GPU that has cuDNN its attention computes a block; elsewhere
two einsums do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged import dispatch, layout
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from pallas_paged.attention.xla import kv_blocks, online_softmax
from pallas_paged.attention.xla.kv_blocks import Keys
from pallas_paged.attention.xla.online_softmax import Partial
from pallas_paged.attention.xla.spec import XlaSpec

# Bytes of K and V that one group gathers at a time. A GPU's loop costs about 50 us per iteration,
# so that it takes much at once; a CPU's caches should hold them.
_GROUP_BYTES = {"gpu": 2**29, "cpu": 2**23}
_BLOCK_Q = {"gpu": 128, "cpu": 64}
_BLOCK_KV = {"gpu": 2048, "cpu": 128}
# The most tiles in a group, of which each has a partial output in float32.
_MAX_TILES = {"gpu": 16, "cpu": 4}


def plan(
    q: jax.Array,
    kv_pages: jax.Array,
    page_indices: jax.Array,
    options: AttentionOptions,
    sm_scale: jax.Array | np.number,
) -> dispatch.Plan:
    """The static parameters of a call; XLA runs every call that the op takes."""
    platform = "gpu" if dispatch.platform() == "gpu" else "cpu"
    is_narrow = q.dtype in (jnp.bfloat16, jnp.float16) and kv_pages.dtype != jnp.float32
    dtype = q.dtype if platform == "gpu" and is_narrow else jnp.dtype(jnp.float32)
    page_size, num_rows, num_lanes = kv_pages.shape[1:]
    pages = min(max(1, _BLOCK_KV[platform] // page_size), page_indices.shape[1])
    block_kv = pages * page_size
    block_bytes = block_kv * num_rows * num_lanes * dtype.itemsize
    num_tiles = max(1, _GROUP_BYTES[platform] // block_bytes)
    block_q = min(_BLOCK_Q[platform], layout.round_up(max(q.shape[0], 1), 8))
    has_cudnn = _has_cudnn(q, dtype, options)
    spec = XlaSpec(
        options,
        q.shape[2],
        dtype,
        block_q,
        block_kv,
        num_decodes=min(num_tiles, page_indices.shape[0]),
        num_tiles=min(num_tiles, _MAX_TILES[platform]),
        has_cudnn=has_cudnn,
        sm_scale=float(sm_scale) if has_cudnn and isinstance(sm_scale, np.number) else None,
    )
    return dispatch.Plan(spec=spec)


def _has_cudnn(q: jax.Array, dtype: jnp.dtype, options: AttentionOptions) -> bool:
    """Whether cuDNN's attention runs the blocks: jax refuses it while it traces a call.

    A window would need a mask, which costs more than half of its time again.
    """
    has_its_mask = options.soft_cap is None and not options.has_window
    if dispatch.platform() != "gpu" or dtype == jnp.float32 or not has_its_mask:
        return False
    heads = jax.ShapeDtypeStruct((1, 128, q.shape[1], q.shape[2]), dtype)
    keys = jax.ShapeDtypeStruct((1, 128, options.num_kv_heads, q.shape[2]), dtype)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        jax.eval_shape(
            functools.partial(online_softmax.cudnn, is_causal=True, scale=1.0),
            heads,
            keys,
            keys,
            count,
        )
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def attend(
    spec: XlaSpec,
    q: jax.Array,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the new tokens over the pages of their sequences; see the public op.

    Args:
      spec: the static parameters, of `plan`.
      q: [T, N, H].
      kv_pages: [P, page_size, R, C].
      batch: the metadata.
      factors: the traced options.

    Returns:
      the output, q's dtype [T, N, H], and the log-sum-exp f32[T, N].
    """
    num_tokens = q.shape[0]
    max_seqs, table_width = batch.page_indices.shape
    extent = table_width * kv_pages.shape[1]
    # Whatever the metadata says, rows stay in [0, T), positions stay inside the page table, and all
    # loops end.
    starts = jnp.clip(batch.cu_q_lens, 0, num_tokens)
    kv_lens = jnp.clip(batch.kv_lens, 0, extent)
    is_seq = jnp.arange(max_seqs) < batch.num_seqs[0]
    q_lens = jnp.where(is_seq & (kv_lens > 0), jnp.maximum(jnp.diff(starts), 0), 0)
    lse = jnp.full_like(q[..., 0], -jnp.inf, jnp.float32)
    if spec.options.causal:
        # New tokens before position 0 are absurd and see no key. They are in no tile, so that for
        # cuDNN a tile's rows and its own keys begin at the same position.
        num_blind = jnp.maximum(q_lens - kv_lens, 0)
        q_lens -= num_blind
        starts = starts[1:] - q_lens
        if factors.sinks is not None:
            row = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
            is_blind = jnp.any((row >= starts - num_blind) & (row < starts), axis=1)
            _, of_sinks = online_softmax.finish(spec, factors, online_softmax.nothing(q[None]))
            lse = jnp.where(is_blind[:, None], of_sinks[0], lse)
    batch = Batch(kv_lens, batch.page_indices, starts, batch.num_seqs)
    run = functools.partial(_for_each_group, spec, q, kv_pages, batch, factors)
    outputs = (jnp.zeros_like(q), lse)
    outputs = run(jnp.where(q_lens == 1, 1, 0), 1, min(spec.num_decodes, num_tokens), outputs)
    if num_tokens > 1:
        rows = jnp.where(q_lens == 1, 0, q_lens)
        outputs = run(rows, spec.block_q, spec.num_tiles, outputs)
    return outputs


def _for_each_group(
    spec: XlaSpec,
    q: jax.Array,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
    q_lens: jax.Array,
    block_q: int,
    num_tiles: int,
    outputs: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Computes the rows of the sequences that have some in `q_lens`, a group of tiles at a time."""
    num_tokens = q.shape[0]
    max_tiles = min(len(q_lens), num_tokens) if block_q == 1 else num_tokens
    ends = jnp.cumsum(-(-q_lens // block_q))  # tiles up to the end of each sequence

    def one_group(
        group: jax.Array, outputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        tile = group * num_tiles + jnp.arange(num_tiles, dtype=jnp.int32)
        seq = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
        is_tile = tile < ends[-1]
        seq = jnp.where(is_tile, seq, 0)
        first_tile = ends[seq] - -(-q_lens[seq] // block_q)
        offset = (tile - first_tile)[:, None] * block_q + jnp.arange(block_q, dtype=jnp.int32)
        position = (batch.kv_lens - q_lens)[seq][:, None] + offset
        is_row = is_tile[:, None] & (offset < q_lens[seq][:, None])
        row = jnp.where(is_row, batch.cu_q_lens[seq][:, None] + offset, num_tokens)
        out, lse = _attend_group(spec, q, kv_pages, batch, factors, Tiles(seq, position, row))
        outs, lses = outputs
        outs = outs.at[row].set(out.astype(outs.dtype), mode="drop")
        return outs, lses.at[row].set(lse, mode="drop")

    if max_tiles <= num_tiles:  # a loop would make the host wait for the number of groups
        return one_group(jnp.int32(0), outputs)
    return lax.fori_loop(0, -(-ends[-1] // num_tiles), one_group, outputs)


class Tiles(NamedTuple):
    """A group of query tiles; I tiles of B rows.

    Attributes:
      seq: int32[I], the sequence of each.
      position: int32[I, B], the position of each row in its sequence.
      row: int32[I, B], where each row is in the packed batch; T if it is none of the batch's.
    """

    seq: jax.Array
    position: jax.Array
    row: jax.Array


def _attend_group(
    spec: XlaSpec,
    q: jax.Array,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array]:
    """The output f32[I, B, N, H] and the log-sum-exp f32[I, B, N] of a group of tiles."""
    is_row = tiles.row < q.shape[0]
    rows = q.at[tiles.row].get(mode="fill", fill_value=0)  # [I, B, N, H]
    scale = online_softmax.of_heads(factors.k_scale, spec, q.shape[1])
    kv_len = jnp.where(jnp.any(is_row, axis=1), batch.kv_lens[tiles.seq], 0)
    keys = Keys(kv_pages, batch.page_indices[tiles.seq], kv_len)
    if spec.has_cudnn and rows.shape[1] > 1:
        if spec.sm_scale is None:
            scale *= factors.sm_scale
        rows = (rows.astype(jnp.float32) * scale[..., None]).astype(spec.dtype)
        partial = _run_blocks_by_cudnn(spec, rows, keys, tiles.position[:, 0])
    else:
        seen = _seen_keys(spec, keys, factors, tiles, is_row)
        partial = _run_blocks(spec, rows, scale * factors.sm_scale, keys, *seen)
    return online_softmax.finish(spec, factors, partial)


def _run_blocks(
    spec: XlaSpec,
    rows: jax.Array,
    scale: jax.Array,
    keys: Keys,
    first: jax.Array,
    end: jax.Array,
) -> Partial:
    """The softmax of the keys [first, end) of each row; first and end are int32[I, B].

    `scale` f32[1] or f32[N] is the factor on the scores of all heads or of each.
    """

    def one_block(block: jax.Array, partial: Partial) -> Partial:
        key = block * spec.block_kv + jnp.arange(spec.block_kv, dtype=jnp.int32)
        is_seen = (key >= first[..., None]) & (key < end[..., None])  # [I, B, block_kv]
        k, v = kv_blocks.read_block(spec, keys, block, tile_first, tile_end)
        return online_softmax.join(
            partial, online_softmax.attend_block(spec, rows, scale, k, v, is_seen)
        )

    # What no row of a tile sees is not read: pages before a window may be somebody else's.
    has_keys = first < end
    tile_first = jnp.min(jnp.where(has_keys, first, 2**31 - 1), axis=1)
    tile_end = jnp.max(jnp.where(has_keys, end, 0), axis=1)
    first_block = jnp.min(tile_first) // spec.block_kv
    end_block = -(-jnp.max(tile_end) // spec.block_kv)
    return lax.fori_loop(first_block, end_block, one_block, online_softmax.nothing(rows))


def _run_blocks_by_cudnn(
    spec: XlaSpec, rows: jax.Array, keys: Keys, position: jax.Array
) -> Partial:
    """The same without a window; `position` int32[I] is that of each tile's first row.

    cuDNN gets the number of keys that all rows of a tile see, and no mask. The keys at the tile's
    own positions, of which a causal row does not see all, are a square block of their own.
    """
    num_keys = jnp.minimum(position, keys.kv_len) if spec.options.causal else keys.kv_len

    def one_block(block: jax.Array, partial: Partial) -> Partial:
        count = jnp.clip(num_keys - block * spec.block_kv, 0, spec.block_kv)
        k, v = kv_blocks.read_block(spec, keys, block, jnp.zeros_like(num_keys), num_keys)
        return online_softmax.join(
            partial, online_softmax.attend_block_by_cudnn(spec, rows, k, v, count, is_causal=False)
        )

    partial = online_softmax.nothing(rows)
    if spec.options.causal:
        k, v = kv_blocks.read_tile(spec, keys, position)
        count = jnp.clip(keys.kv_len - position, 0, spec.block_q)
        partial = online_softmax.attend_block_by_cudnn(spec, rows, k, v, count, is_causal=True)
    return lax.fori_loop(0, -(-jnp.max(num_keys) // spec.block_kv), one_block, partial)


def _seen_keys(
    spec: XlaSpec, keys: Keys, factors: Factors, tiles: Tiles, is_row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first key that each row sees and the one after the last, int32[I, B]."""
    end = jnp.broadcast_to(keys.kv_len[:, None], tiles.position.shape)
    if spec.options.causal:
        end = jnp.minimum(end, tiles.position + 1)
    first = jnp.zeros_like(end)
    if factors.sliding_window is not None:
        # A negative window counts as 0, so that the difference cannot overflow.
        window = jnp.maximum(factors.sliding_window, 0)
        first = jnp.maximum(tiles.position - window + 1, 0)
    return first, jnp.where(is_row, end, 0)
