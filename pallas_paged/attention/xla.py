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

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import dispatch, layout
from pallas_paged.attention.options import AttentionOptions, Batch, Factors

# Bytes of K and V that one group gathers at a time. A GPU's loop costs about 50 us per iteration,
# so that it takes much at once; a CPU's caches should hold them.
_GROUP_BYTES = {"gpu": 2**28, "cpu": 2**21}
_BLOCK_Q = {"gpu": 128, "cpu": 64}
_BLOCK_KV = {"gpu": 1024, "cpu": 256}
# The most tiles in a group, of which each has a partial output in float32.
_MAX_TILES = {"gpu": 16, "cpu": 4}


@dataclasses.dataclass(frozen=True)
class XlaSpec:
    """The static parameters of a call.

    Attributes:
      options: the static options of the op.
      dtype: of the operands of the products.
      block_q: rows of a tile of a prefill.
      block_kv: keys in a block, whole pages.
      num_decodes, num_tiles: tiles in a group of decodes, and of the others.
      has_cudnn: whether cuDNN's attention computes a block.
    """

    options: AttentionOptions
    dtype: jnp.dtype
    block_q: int
    block_kv: int
    num_decodes: int
    num_tiles: int
    has_cudnn: bool


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


class Partial(NamedTuple):
    """The softmax of the keys so far.

    Attributes:
      out: f32[I, B, N, H], the weighted sum of the values.
      total: f32[I, B, N], the sum of the weights.
      largest: f32[I, B, N], the largest score, by which the weights are shifted.
    """

    out: jax.Array
    total: jax.Array
    largest: jax.Array


def plan(
    q: jax.Array,
    kv_pages: jax.Array,
    page_indices: jax.Array,
    options: AttentionOptions,
    config: None,
    k: jax.Array | None = None,
) -> dispatch.Plan:
    """The static parameters of a call; XLA runs every call that the op takes."""
    del config, k  # it has no block sizes to choose, and never writes
    platform = "gpu" if dispatch.platform() == "gpu" else "cpu"
    is_narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    dtype = q.dtype if platform == "gpu" and is_narrow else jnp.dtype(jnp.float32)
    page_size, num_rows, num_lanes = kv_pages.shape[1:]
    pages = min(max(1, _BLOCK_KV[platform] // page_size), page_indices.shape[1])
    block_kv = pages * page_size
    block_bytes = block_kv * num_rows * num_lanes * dtype.itemsize
    num_tiles = max(1, _GROUP_BYTES[platform] // block_bytes)
    block_q = min(_BLOCK_Q[platform], layout.round_up(max(q.shape[0], 1), 8))
    spec = XlaSpec(
        options,
        dtype,
        block_q,
        block_kv,
        num_decodes=min(num_tiles, page_indices.shape[0]),
        num_tiles=min(num_tiles, _MAX_TILES[platform]),
        has_cudnn=_has_cudnn(q, dtype, options),
    )
    return dispatch.Plan(spec=spec)


def _has_cudnn(q: jax.Array, dtype: jnp.dtype, options: AttentionOptions) -> bool:
    """Whether cuDNN's attention runs such a block: jax refuses it while it traces a call."""
    if dispatch.platform() != "gpu" or dtype == jnp.float32 or options.soft_cap is not None:
        return False
    heads = jax.ShapeDtypeStruct((1, 8, q.shape[1], q.shape[2]), dtype)
    keys = jax.ShapeDtypeStruct((1, 128, options.num_kv_heads, q.shape[2]), dtype)
    mask = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bool_)
    try:
        jax.eval_shape(_cudnn, heads, keys, keys, mask)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def attend(
    spec: XlaSpec,
    q: jax.Array,
    new: None,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
) -> tuple[jax.Array, jax.Array, None]:
    """Attention of the new tokens over the pages of their sequences; see the public op.

    Args:
      spec: the static parameters, of `plan`.
      q: [T, N, H].
      new: None: new keys and values are in the pool already.
      kv_pages: [P, page_size, R, C].
      batch: the metadata.
      factors: the traced options.

    Returns:
      the output, q's dtype [T, N, H], the log-sum-exp f32[T, N], and None.
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
    batch = Batch(kv_lens, batch.page_indices, starts, batch.num_seqs)
    outputs = (jnp.zeros_like(q), jnp.full_like(q[..., 0], -jnp.inf, jnp.float32))
    run = functools.partial(_for_each_group, spec, q, kv_pages, batch, factors)
    outputs = run(jnp.where(q_lens == 1, 1, 0), 1, min(spec.num_decodes, num_tokens), outputs)
    if num_tokens > 1:
        rows = jnp.where(q_lens == 1, 0, q_lens)
        outputs = run(rows, spec.block_q, spec.num_tiles, outputs)
    return *outputs, None


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

    return lax.fori_loop(0, -(-ends[-1] // num_tiles), one_group, outputs)


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
    scale = factors.sm_scale * _of_heads(factors.k_scale, spec, q.shape[1])
    rows = (rows.astype(jnp.float32) * scale[..., None]).astype(spec.dtype)
    first, end = _seen_keys(spec, batch, factors, tiles, is_row)  # int32[I, B]

    def one_block(block: jax.Array, partial: Partial) -> Partial:
        key = block * spec.block_kv + jnp.arange(spec.block_kv, dtype=jnp.int32)
        is_seen = (key >= first[..., None]) & (key < end[..., None])  # [I, B, block_kv]
        k, v = _gather(spec, kv_pages, batch, tiles.seq, block, key, q.shape[2])
        attend_block = _attend_block_by_cudnn if spec.has_cudnn else _attend_block
        return _join(partial, attend_block(spec, rows, k, v, is_seen))

    nothing = Partial(
        jnp.zeros_like(rows, jnp.float32),
        jnp.zeros_like(rows[..., 0], jnp.float32),
        jnp.full_like(rows[..., 0], -jnp.inf, jnp.float32),
    )
    has_keys = first < end
    first_block = jnp.min(jnp.where(has_keys, first, 2**31 - 1)) // spec.block_kv
    end_block = -(-jnp.max(jnp.where(has_keys, end, 0)) // spec.block_kv)
    return _finish(spec, factors, lax.fori_loop(first_block, end_block, one_block, nothing))


def _of_heads(scale: jax.Array | None, spec: XlaSpec, num_heads: int) -> jax.Array:
    """A scale of the tensor or of each KV head as f32[1] or f32[N], one for each query head."""
    if scale is None:
        return jnp.ones(1, jnp.float32)
    scale = jnp.asarray(scale, jnp.float32).reshape(-1)
    return scale if scale.size == 1 else jnp.repeat(scale, num_heads // spec.options.num_kv_heads)


def _seen_keys(
    spec: XlaSpec, batch: Batch, factors: Factors, tiles: Tiles, is_row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first key that each row sees and the one after the last, int32[I, B]."""
    end = jnp.broadcast_to(batch.kv_lens[tiles.seq][:, None], tiles.position.shape)
    if spec.options.causal:
        end = jnp.minimum(end, tiles.position + 1)
    first = jnp.zeros_like(end)
    if factors.sliding_window is not None:
        # A negative window counts as 0, so that the difference cannot overflow.
        window = jnp.maximum(factors.sliding_window, 0)
        first = jnp.maximum(tiles.position - window + 1, 0)
    return first, jnp.where(is_row, end, 0)


def _gather(
    spec: XlaSpec,
    kv_pages: jax.Array,
    batch: Batch,
    seq: jax.Array,
    block: jax.Array,
    key: jax.Array,
    head_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """k and v [I, block_kv, K, H] of one KV block of each sequence; 0 from its end on.

    K and V are gathered apart from each other, so that each is written once, as a product takes it.
    """
    num_pages, page_size, num_rows, _ = kv_pages.shape
    num_kv_heads = spec.options.num_kv_heads
    pages_per_block = spec.block_kv // page_size
    column = block * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
    column = jnp.minimum(column, batch.page_indices.shape[1] - 1)
    pages = jnp.clip(batch.page_indices[seq[:, None], column], 0, num_pages - 1)
    is_token = (key < batch.kv_lens[seq][:, None])[..., None, None]

    if layout.packs_kv_in_row(head_dim):
        v_lane = layout.HALF_LANES
        k = kv_pages[pages, :, :num_kv_heads, :head_dim]
        v = kv_pages[pages, :, :num_kv_heads, v_lane : v_lane + head_dim]
    elif num_rows % 2 == 0:
        pairs = kv_pages.reshape(num_pages, page_size, num_rows // 2, 2, -1)
        k, v = (pairs[pages, :, :num_kv_heads, i, :head_dim] for i in (0, 1))
    else:
        k, v = layout.split_kv(kv_pages[pages], num_kv_heads, head_dim)

    def as_operand(x: jax.Array) -> jax.Array:
        x = x.reshape(len(seq), spec.block_kv, num_kv_heads, head_dim)
        # Selected and not multiplied by 0, because an unused slot may hold NaN.
        return jnp.where(is_token, x.astype(spec.dtype), 0)

    return as_operand(k), as_operand(v)


def _attend_block(
    spec: XlaSpec, q: jax.Array, k: jax.Array, v: jax.Array, is_seen: jax.Array
) -> Partial:
    """The softmax of one KV block by two einsums.

    Args:
      spec: the static parameters.
      q: [I, B, N, H], scaled.
      k, v: [I, block_kv, K, H].
      is_seen: bool[I, B, block_kv].
    """
    num_kv_heads = k.shape[2]
    einsum = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if spec.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    q_of_kv_heads = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[3])
    scores = einsum("ibkgh,ilkh->ikbgl", q_of_kv_heads, k)
    if spec.options.soft_cap is not None:
        scores = spec.options.soft_cap * jnp.tanh(scores / spec.options.soft_cap)
    scores = jnp.where(is_seen[:, None, :, None], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1)  # [I, K, B, G]
    weights = jnp.exp(scores - _shift(largest)[..., None])
    out = einsum("ikbgl,ilkh->ibkgh", weights.astype(spec.dtype), v)
    by_row = [x.swapaxes(1, 2).reshape(q.shape[:3]) for x in (jnp.sum(weights, axis=-1), largest)]
    return Partial(out.reshape(q.shape), *by_row)


def _attend_block_by_cudnn(
    spec: XlaSpec, q: jax.Array, k: jax.Array, v: jax.Array, is_seen: jax.Array
) -> Partial:
    """The same by cuDNN's attention, which adds the mask to the scores as a large number.

    The score of a key that is not finite would come through the mask. Such keys are 0 for cuDNN.
    """
    del spec
    k = jnp.where(jnp.isfinite(k), k, 0)
    out, lse = _cudnn(q, k, v, is_seen[:, None])
    has_keys = jnp.any(is_seen, axis=-1, keepdims=True)
    total = jnp.broadcast_to(jnp.where(has_keys, 1.0, 0.0), lse.shape)
    out = jnp.where(has_keys[..., None], out.astype(jnp.float32), 0.0)
    return Partial(out, total, jnp.where(has_keys, lse, -jnp.inf))


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The output [I, B, N, H] and the log-sum-exp f32[I, B, N] of scaled queries."""
    out, lse = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=1.0, implementation="cudnn", return_residual=True
    )
    return out, lse


def _join(a: Partial, b: Partial) -> Partial:
    """The softmax of the keys of both."""
    largest = jnp.maximum(a.largest, b.largest)
    shift = _shift(largest)
    of_a, of_b = jnp.exp(a.largest - shift), jnp.exp(b.largest - shift)
    out = a.out * of_a[..., None] + b.out * of_b[..., None]
    return Partial(out, a.total * of_a + b.total * of_b, largest)


def _shift(largest: jax.Array) -> jax.Array:
    """What scores are shifted by: 0 where a row sees no key, to avoid NaN."""
    return jnp.where(jnp.isneginf(largest), 0.0, largest)


def _finish(spec: XlaSpec, factors: Factors, partial: Partial) -> tuple[jax.Array, jax.Array]:
    """The output f32[I, B, N, H] and the log-sum-exp f32[I, B, N]; sinks count as keys."""
    if factors.sinks is not None:
        largest = jnp.broadcast_to(factors.sinks.astype(jnp.float32), partial.total.shape)
        sinks = Partial(jnp.zeros_like(partial.out), jnp.ones_like(partial.total), largest)
        # A sink of -inf is a head without one.
        sinks = sinks._replace(total=jnp.where(jnp.isneginf(largest), 0.0, 1.0))
        partial = _join(partial, sinks)
    total = partial.total[..., None]
    v_scale = _of_heads(factors.v_scale, spec, partial.total.shape[-1])
    out = partial.out / jnp.where(total > 0, total, 1.0) * v_scale[:, None]
    return out, _shift(partial.largest) + jnp.log(partial.total)
