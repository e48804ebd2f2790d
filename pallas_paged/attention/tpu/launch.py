# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on TPU: one kernel that takes decodes and prefills in their order.

q and the output stay `[T, N*H]` in memory, as a projection makes them; the kernel takes whole row
tiles of them and never a transposed or padded copy (heads of whole 128 lanes).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import dispatch, layout
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from pallas_paged.attention.tpu import decode, page_table
from pallas_paged.attention.tpu.config import (
    TpuAttentionConfig,
    default_config,
    fits,
    vmem_bytes,
    vmem_capacity,
)
from pallas_paged.attention.tpu.kernel import kernel
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.attention.tpu.refs import ROW_TILE, STATE_SIZE, Walk
from pallas_paged.attention.tpu.scores import Score
from pallas_paged.kv_write import oracle as write_oracle
from pallas_paged.kv_write.tpu.interleave import Slots

# Page table entries that SMEM (1 MiB) holds beside the other metadata; longer tables are streamed,
# so many entries at a time (a power of 2, 256 KiB with the part that comes in meanwhile).
MAX_TABLE = 160_000
_TABLE_PART = 32_768
# Sequences whose lengths and first rows SMEM holds beside that.
_MAX_SEQS = 20_000


def plan(
    q: jax.Array,
    kv_pages: jax.Array,
    page_indices: jax.Array,
    options: AttentionOptions,
    config: TpuAttentionConfig | None = None,
    k: jax.Array | None = None,
) -> dispatch.Plan:
    """What the kernel is launched with for a call of these shapes, or why it cannot run.

    The arrays may be `jax.ShapeDtypeStruct`s: nothing is traced.

    Args:
      q: [T, N, H].
      kv_pages: [P, page_size, R, C].
      page_indices: int32[S, M].
      options: the static options.
      config: the block sizes; None lets `default_config` choose.
      k: the new keys, [T, K, H] or [T, K*H], of a call that writes them. They are held in VMEM
        until their sequence is over. Where VMEM has no room for them, and where they are stored as
        codes already (the kernel attends to what it quantised itself), the plan only reads.

    Returns:
      a `Plan` whose `spec` is a `Walk`; `spec.writes` says whether the kernel writes k and v.
    """
    max_seqs, table_width = page_indices.shape
    num_pages, page_size = kv_pages.shape[:2]
    if jnp.float16 in (q.dtype, kv_pages.dtype):
        return dispatch.Plan(refusal="a TPU has no float16; use bfloat16")
    if max_seqs > _MAX_SEQS:
        return dispatch.Plan(
            refusal=f"the lengths of {max_seqs} sequences do not fit SMEM ({_MAX_SEQS} do); split "
            "the batch"
        )
    heads = heads_of(q, kv_pages, options.num_kv_heads)
    sizes = config or default_config(heads, page_size)
    refusal = _refusal(heads, sizes, max_seqs, table_width, page_size)
    if refusal is not None:
        return dispatch.Plan(refusal=refusal)
    new = None
    if k is not None and not layout.is_quantized(k.dtype):
        writing = config or default_config(heads, page_size, q.shape[0])
        if fits(heads, writing, q.shape[0]):
            sizes, new = writing, _new_slots(heads, is_flat=k.ndim == 2)
    score = Score(
        soft_cap=options.soft_cap,
        causal=options.causal,
        has_window=options.has_window,
        has_scales=options.has_scales,
        has_sinks=options.has_sinks,
        return_lse=options.return_lse,
    )
    spec = Walk(
        heads=heads,
        score=score,
        num_tokens=layout.round_up(q.shape[0], ROW_TILE),
        max_seqs=max_seqs,
        table_width=table_width,
        num_pages=num_pages,
        page_size=page_size,
        piece=_piece(page_size, sizes.block_kv),
        block=sizes.block_kv,
        ring=sizes.num_stages,
        kv_blocks_per_iteration=sizes.kv_blocks_per_iteration,
        window=sizes.block_q,
        new=new,
        mask_dtype=_mask_dtype(heads, score),
        table_part=_TABLE_PART if page_indices.size > MAX_TABLE else 0,
        is_interpreted=False,
    )
    return dispatch.Plan(spec=spec)


def _refusal(
    heads: Heads, config: TpuAttentionConfig, max_seqs: int, table_width: int, page_size: int
) -> str | None:
    """Why the kernel cannot run with these block sizes, as a sentence; None if it can."""
    pieces = max_seqs * table_width * (page_size // _piece(page_size, config.block_kv))
    if pieces > 2**31 - 2**16:  # a block's more are read behind the last
        return (
            f"page_indices {[max_seqs, table_width]} has {pieces} pieces of pages, and they are "
            "counted in int32; split the batch, or shorten the page table"
        )
    needed, there = vmem_bytes(heads, config, return_lse=True), vmem_capacity()
    if needed > there:
        return (
            f"{heads.num_heads} query heads on {heads.num_kv_heads} KV heads of {heads.head_dim} "
            f"with {config} need {needed / 2**20:.1f} MiB of VMEM, and {there / 2**20:.0f} MiB are "
            "there; shard the heads or make the blocks smaller"
        )
    return None


def heads_of(q: jax.Array, kv_pages: jax.Array, num_kv_heads: int) -> Heads:
    """The static description of a call's heads."""
    rows_per_word = 4 // kv_pages.dtype.itemsize
    return Heads(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[2],
        pool_dtype=jnp.dtype(kv_pages.dtype),
        num_rows=layout.round_up(kv_pages.shape[2], rows_per_word),
        q_dtype=jnp.dtype(q.dtype),
    )


def attend(
    spec: Walk,
    q: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Prepares the operands and launches the kernel.

    Args:
      spec: of `plan`.
      q: [T, N, H].
      new: k and v, [T, K, H] or [T, K*H], where `spec.writes`; else None.
      kv_pages: [P, page_size, R, C].
      batch, factors: what else the call is given.

    Returns:
      the output [T, N, H], the log-sum-exp f32[T, N] or None, the pool or None.
    """
    heads, score = spec.heads, spec.score
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_rows = kv_pages.shape[1:3]
    kv_lens, page_indices, cu_q_lens, num_seqs = batch
    sm_scale, sliding_window, k_scale, v_scale, sinks = factors
    table = page_table.prepare(page_indices, kv_pages.shape[0], page_size, writes=new is not None)
    # A block's entries are read whether it has so many pieces or not.
    behind = spec.pieces_per_block
    if spec.table_part:
        behind = -table.shape[0] % spec.table_part
    table = jnp.pad(table, (0, behind))
    factors = [jnp.asarray(sm_scale, jnp.float32).reshape(1)]
    if score.has_scales:
        for scale in (k_scale, v_scale):
            scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
            factors.append(jnp.broadcast_to(scale, (heads.num_kv_heads,)))
    metadata = [kv_lens, table, cu_q_lens, num_seqs, jnp.concatenate(factors)]
    if score.has_window:
        metadata.append(jnp.asarray(sliding_window, jnp.int32).reshape(1))
    if score.has_sinks:
        column = jnp.pad(sinks, (0, decode.decode_rows(num_heads) - num_heads))
        metadata += [sinks, jnp.broadcast_to(column[:, None], (column.shape[0], layout.LANES))]
    if new is not None and layout.is_quantized(heads.pool_dtype):
        scales = (write_oracle.inverse_scale(x, heads.num_kv_heads) for x in (k_scale, v_scale))
        metadata.append(jnp.concatenate(list(scales)))

    # Reshaped back to what a projection made, before any padding that it does not need.
    pad_lanes = heads.lanes - head_dim
    if pad_lanes:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_lanes)))
    q = q.reshape(num_tokens, num_heads * heads.lanes)
    tensors = [_pad_rows(x, spec.num_tokens) for x in (q, *(new or ()))]
    pool = layout.flatten_slots(kv_pages)
    if heads.num_rows > num_rows:
        pool = jnp.pad(pool, ((0, 0), (0, heads.num_rows - num_rows), (0, 0)))

    def launch(is_interpreted, pool):
        walk = dataclasses.replace(spec, is_interpreted=is_interpreted)
        return list(_launch(walk, metadata, tensors, pool))

    def launch_with_words(pool):  # the interpreter cannot view a ref as words
        *results, last = launch(True, layout.to_words(pool))
        return [*results, last if new is None else layout.from_words(last, heads.pool_dtype)]

    out, *results = lax.platform_dependent(
        pool,
        tpu=functools.partial(launch, False),
        default=launch_with_words if heads.rows_per_word > 1 else functools.partial(launch, True),
    )
    out = out[:num_tokens].reshape(num_tokens, num_heads, heads.lanes)[..., :head_dim]
    lse = results.pop(0)[:num_tokens, :num_heads] if score.return_lse else None
    pool = results[0][:, :num_rows].reshape(kv_pages.shape) if new is not None else None
    return out, lse, pool


def _mask_dtype(heads: Heads, score: Score) -> jnp.dtype:
    """As what a prefill's weights are masked: as the matrix products take them, which makes half as
    many words of bfloat16. Not where the log-sum-exp wants them unrounded; nor where the vector
    unit knows no bfloat16 (before v6e) and a mask of pairs would be turned for each register."""
    knows_bfloat16 = (dispatch.tpu_generation() or 6) >= 6
    return heads.compute_dtype if knows_bfloat16 and not score.return_lse else jnp.dtype("float32")


def _new_slots(heads: Heads, *, is_flat: bool) -> Slots:
    """What the making of slots needs to know of k and v, [T, K*H] if flat, else [T, K, H]."""
    return Slots(
        heads.num_kv_heads,
        heads.head_dim,
        heads.pool_dtype,
        heads.num_rows,
        is_flat=is_flat,
    )


def _pad_rows(x, num_rows):
    missing = num_rows - x.shape[0]
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def _piece(page_size: int, block_kv: int) -> int:
    """Tokens that one DMA brings: a page, or its largest divisor that a block has room for."""
    return next(n for n in range(min(page_size, block_kv), 0, -1) if page_size % n == 0)


def _launch(walk: Walk, metadata, tensors, pool):
    """The one pallas_call: [out, log-sum-exp if wanted, pool if written to].

    Args:
      walk: static.
      metadata: SMEM, but for a streamed page table and the column of sinks.
      tensors: q, and k and v if they are to be written.
      pool: [P*page_size, R or words, C].
    """
    heads, window, has_new = walk.heads, walk.window, walk.new is not None
    q = tensors[0]
    decode_rows = decode.decode_rows(heads.num_heads)
    head_rows = heads.lane_tiles * window, decode.row_pitch(heads.num_heads), 1, layout.LANES
    prefill_rows = window * heads.group
    lse_lanes = layout.round_up(heads.num_heads, layout.LANES)
    word = jnp.float32 if heads.pool_dtype == jnp.float32 else jnp.uint32
    num_slots = walk.ring_rows + heads.lane_tiles * walk.new_rows
    hbm, smem, vmem = (
        pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.SMEM, pltpu.VMEM)
    )
    in_specs = [vmem if x.ndim == 2 else smem for x in metadata]
    if walk.table_part:
        in_specs[1] = hbm
    in_specs += [hbm] * (len(tensors) + 1)

    def scratch(*shape):
        return pltpu.VMEM(shape, jnp.float32)

    def shape_of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=_varying(q, pool))

    out_shape = [shape_of(q.shape, q.dtype)]
    if walk.score.return_lse:
        out_shape.append(shape_of((q.shape[0], lse_lanes), jnp.float32))
    aliases = {}
    if has_new:
        aliases[len(in_specs) - 1] = len(out_shape)
        out_shape.append(layout.result_like(pool))
    scratch_shapes = [
        pltpu.SMEM((STATE_SIZE,), jnp.int32),
        pltpu.SMEM((walk.max_units, walk.unit_size), jnp.int32),
        pltpu.VMEM((num_slots, heads.pitch, 1, layout.LANES), word),
        pltpu.VMEM((window, q.shape[1]), q.dtype),
        pltpu.VMEM((2, window, q.shape[1]), q.dtype),
        *[scratch(*head_rows)] * 2,
        scratch(decode_rows, layout.LANES),
        scratch(decode_rows, layout.LANES),
        scratch(decode_rows, heads.lanes),
        scratch(heads.num_kv_heads, 8, prefill_rows),
        scratch(heads.num_kv_heads, 16, prefill_rows),
        scratch(heads.num_kv_heads, heads.lanes, prefill_rows),
        pltpu.VMEM((walk.block * walk.mask_dtype.itemsize // 4, window), jnp.uint32),
        pltpu.SemaphoreType.DMA((walk.ring + 1,)),
        pltpu.SemaphoreType.DMA((1,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    if walk.score.return_lse:
        scratch_shapes.append(scratch(2, window, lse_lanes))
    if has_new:
        scratch_shapes += [pltpu.VMEM((window, *x.shape[1:]), x.dtype) for x in tensors[1:]]
        scratch_shapes.append(pltpu.SemaphoreType.DMA((1,)))
    if walk.table_part:
        scratch_shapes.append(pltpu.SMEM((2 * walk.table_part,), jnp.int32))
        scratch_shapes.append(pltpu.SemaphoreType.DMA((2,)))
    name = "write_and_attend" if has_new else "ragged_paged_attention"
    return pl.pallas_call(
        functools.partial(kernel, walk),
        out_shape=out_shape,
        in_specs=in_specs,
        out_specs=[hbm for _ in out_shape],
        input_output_aliases=aliases,
        scratch_shapes=scratch_shapes,
        # Every id is checked (page_table.prepare, page_row, _send), and the kernel keeps every row
        # inside the batch (rows_of) and every position inside the page table (unit_at).
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_capacity(),
        ),
        name=f"{name}_block{walk.block}_window{window}",
    )(*metadata, *tensors, pool)


def _varying(q, pool):
    """The result varies over a shard_map's axes as q and the pool do."""
    return jax.typeof(q).manual_axis_type
