# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on TPU: one kernel that walks decodes and prefills in their order.

q and the output stay `[T, N*H]` in memory, as a projection makes them; the kernel takes whole row
tiles of them and never a transposed or padded copy (heads of whole 128 lanes).
"""

__all__ = [
    "TpuAttentionConfig",
    "default_config",
    "is_fused",
    "ragged_paged_attention",
    "unsupported",
    "write_and_attend",
]

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import dispatch, layout, tuned
from pallas_paged.attention.tpu import decode as decodes
from pallas_paged.attention.tpu import page_table
from pallas_paged.attention.tpu.kernel import kernel
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.attention.tpu.refs import (
    ROW_TILE,
    STATE_SIZE,
    Walk,
    new_rows,
)
from pallas_paged.attention.tpu.scores import Score
from pallas_paged.kv_write import oracle as write_oracle
from pallas_paged.kv_write.tpu.interleave import Slots

# What the kernel leaves of a generation's VMEM to the compiler and to XLA's prefetches.
_VMEM_SHARE = 0.75
_SMALLEST_VMEM = 16 * 2**20  # a v4's, for calls that are traced for no TPU
# Keys of heads in the largest body of a decode, about 4,000 bundles.
_MAX_BODY = 16_384
# Page table entries that SMEM (1 MiB) holds beside the other metadata; longer tables are streamed,
# so many entries at a time (a power of 2, 256 KiB with the part that comes in meanwhile).
_MAX_TABLE = 160_000
_TABLE_PART = 32_768
# Sequences whose lengths and first rows SMEM holds beside that.
_MAX_SEQS = 20_000


@dataclasses.dataclass(frozen=True)
class TpuAttentionConfig:
    """Block sizes of the TPU attention.

    Attributes:
      block_keys: keys of a block, a multiple of 128.
      window_rows: rows of the batch whose queries a prefill takes together, a multiple of 128; also
        the rows of decodes that share a window of q.
      num_buffers: blocks in VMEM: those being computed, the others on their way.
      blocks_per_body: blocks that a long decode takes at a time, at most half of `num_buffers`.
    """

    block_keys: int
    window_rows: int
    num_buffers: int = 3
    blocks_per_body: int = 1

    def __post_init__(self):
        for name, multiple in (
            ("block_keys", 128),
            ("window_rows", 128),
            ("num_buffers", 1),
            ("blocks_per_body", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < multiple or value % multiple:
                raise ValueError(
                    f"TpuAttentionConfig: {name} is {value!r}; wanted a positive "
                    f"multiple of {multiple}"
                )
        # A body waits for all of its blocks, and those of the next one come in meanwhile.
        if self.num_buffers < 2 * self.blocks_per_body:
            raise ValueError(
                f"TpuAttentionConfig: num_buffers is {self.num_buffers}; wanted at "
                f"least twice blocks_per_body, {self.blocks_per_body}, so that blocks come in "
                "while others are computed"
            )


def default_config(heads: Heads, page_size: int, num_new_tokens: int = 0) -> TpuAttentionConfig:
    """What was found for the device (`pallas_paged.tuned`), else the largest blocks whose buffers
    fit the generation's VMEM.

    Args:
      heads: the static description.
      page_size: tokens of a page.
      num_new_tokens: T of a call that writes them, 0 of one that only reads.
    """
    found = tuned.find(
        dispatch.tpu_device_kind(),
        "ragged_paged_attention",
        page_size=page_size,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        q_dtype=heads.q_dtype.name,
        pool_dtype=heads.pool_dtype.name,
    )
    if found and fits(heads, TpuAttentionConfig(**found), num_new_tokens):
        return TpuAttentionConfig(**found)
    # A block of all heads is one straight body: 4,096 keys of heads are about 1,000 bundles.
    block_keys = max(128, min(1024, 4096 // heads.num_kv_heads // 128 * 128))
    while True:
        for num_buffers, blocks_per_body in ((16, 8), (8, 4), (4, 2), (3, 1)):
            config = TpuAttentionConfig(block_keys, 128, num_buffers, blocks_per_body)
            is_short = blocks_per_body * block_keys * heads.num_kv_heads <= _MAX_BODY
            if (is_short or blocks_per_body == 1) and fits(heads, config, num_new_tokens):
                return config
        if block_keys == 128:
            return config
        block_keys = max(128, block_keys // 2 // 128 * 128)


def fits(heads: Heads, config: TpuAttentionConfig, num_new_tokens: int = 0) -> bool:
    """Whether the kernel's share of the generation's VMEM holds what block sizes need."""
    needed = vmem_bytes(heads, config, num_new_tokens, return_lse=True)
    return needed <= _VMEM_SHARE * _vmem_capacity()


def _vmem_capacity() -> int:
    return dispatch.tpu_vmem_bytes() or _SMALLEST_VMEM


def vmem_bytes(
    heads: Heads, config: TpuAttentionConfig, num_new_tokens: int = 0, *, return_lse: bool
) -> int:
    """VMEM that the kernel's scratch takes, and the largest values of a body."""
    window, width = config.window_rows, heads.num_heads * heads.lanes
    rows = window * heads.group
    slot = heads.pitch * heads.lanes * 4
    ring = (config.num_buffers + 1) * config.block_keys * slot
    windows = 3 * window * width * heads.q_dtype.itemsize
    windows += 2 * window * decodes.row_pitch(heads.num_heads) * heads.lanes * 4
    prefill = heads.num_kv_heads * rows * (heads.lanes + 24) * 4
    decode = decodes.decode_rows(heads.num_heads) * (heads.lanes + 2 * layout.LANES) * 4
    lse = 2 * window * _round_up(heads.num_heads, layout.LANES) * 4 if return_lse else 0
    body = 3 * config.block_keys * rows * 4  # scores and weights of one head, and the mask
    new = 0
    if num_new_tokens:
        # With the part of a page, at most a block of keys, that may be before them; and the windows
        # of k and v, of which [T, K, H] pads the heads to whole tiles.
        tokens = _round_up(num_new_tokens, ROW_TILE)
        new = new_rows(tokens, config.block_keys, config.block_keys, window) * slot
        new += 2 * window * _round_up(heads.num_kv_heads, 16) * heads.lanes * 4
    return ring + windows + prefill + decode + lse + body + new


def unsupported(
    q, kv_pages, page_indices, num_kv_heads: int, config: TpuAttentionConfig | None
) -> str | None:
    """Why the kernel cannot run a call, as a sentence; None if it can."""
    if jnp.float16 in (q.dtype, kv_pages.dtype):
        return "a TPU has no float16; use bfloat16"
    max_seqs, page_size = page_indices.shape[0], kv_pages.shape[1]
    if max_seqs > _MAX_SEQS:
        return (
            f"the lengths of {max_seqs} sequences do not fit SMEM ({_MAX_SEQS} do); split the batch"
        )
    heads = heads_of(q, kv_pages, num_kv_heads)
    config = config or default_config(heads, page_size)
    pieces = page_indices.size * (page_size // _piece(page_size, config.block_keys))
    if pieces > 2**31 - 2**16:  # a block's more are read behind the last
        return (
            f"page_indices {list(page_indices.shape)} has {pieces} pieces of pages, and they are "
            "counted in int32; split the batch, or shorten the page table"
        )
    needed, there = vmem_bytes(heads, config, return_lse=True), _vmem_capacity()
    if needed > there:
        return (
            f"{heads.num_heads} query heads on {num_kv_heads} KV heads of {heads.head_dim} with "
            f"{config} need {needed / 2**20:.1f} MiB of VMEM, and {there / 2**20:.0f} MiB are "
            "there; shard the heads or make the blocks smaller"
        )
    return None


def is_fused(q, kv_pages, num_kv_heads: int, config: TpuAttentionConfig | None) -> bool:
    """Whether one kernel writes a call's new tokens and attends; a static question.

    They are held in VMEM until their sequence is over, so there may not be too many.
    """
    heads, num_new_tokens = heads_of(q, kv_pages, num_kv_heads), q.shape[0]
    config = config or default_config(heads, kv_pages.shape[1], num_new_tokens)
    return fits(heads, config, num_new_tokens)


def heads_of(q, kv_pages, num_kv_heads: int) -> Heads:
    """The static description of a call's heads."""
    rows_per_word = 4 // kv_pages.dtype.itemsize
    return Heads(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[2],
        pool_dtype=jnp.dtype(kv_pages.dtype),
        num_rows=_round_up(kv_pages.shape[2], rows_per_word),
        q_dtype=jnp.dtype(q.dtype),
    )


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def ragged_paged_attention(
    q,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    *,
    sm_scale,
    causal,
    sliding_window,
    soft_cap,
    k_scale,
    v_scale,
    sinks,
    num_kv_heads,
    return_lse,
    config,
):
    """See api.ragged_paged_attention; returns (out, log-sum-exp or None)."""
    heads = heads_of(q, kv_pages, num_kv_heads)
    out, lse, _ = _attend(
        q,
        None,
        kv_pages,
        (kv_lens, page_indices, cu_q_lens, num_seqs),
        heads=heads,
        sm_scale=sm_scale,
        causal=causal,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=sinks,
        return_lse=return_lse,
        config=config or default_config(heads, kv_pages.shape[1]),
    )
    return out, lse


def write_and_attend(
    q,
    k,
    v,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    *,
    sm_scale,
    causal,
    sliding_window,
    soft_cap,
    k_scale,
    v_scale,
    sinks,
    num_kv_heads,
    return_lse,
    config,
):
    """See api.write_and_attend, where `is_fused`; returns (out, log-sum-exp or None, pool)."""
    heads = heads_of(q, kv_pages, num_kv_heads)
    return _attend(
        q,
        (k, v),
        kv_pages,
        (kv_lens, page_indices, cu_q_lens, num_seqs),
        heads=heads,
        sm_scale=sm_scale,
        causal=causal,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=sinks,
        return_lse=return_lse,
        config=config or default_config(heads, kv_pages.shape[1], q.shape[0]),
    )


def _attend(
    q,
    new,
    kv_pages,
    lengths,
    *,
    heads,
    sm_scale,
    causal,
    sliding_window,
    soft_cap,
    k_scale,
    v_scale,
    sinks,
    return_lse,
    config,
):
    """Prepares the operands and launches; (out, log-sum-exp, pool), the last two or None."""
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_rows = kv_pages.shape[1:3]
    kv_lens, page_indices, cu_q_lens, num_seqs = lengths
    has_scales = k_scale is not None or v_scale is not None
    score = Score(
        soft_cap=soft_cap,
        causal=causal,
        has_window=sliding_window is not None,
        has_scales=has_scales,
        has_sinks=sinks is not None,
        return_lse=return_lse,
    )
    rows = _round_up(num_tokens, ROW_TILE)
    static = Walk(
        heads=heads,
        score=score,
        num_tokens=rows,
        max_seqs=page_indices.shape[0],
        table_width=page_indices.shape[1],
        num_pages=kv_pages.shape[0],
        page_size=page_size,
        piece=_piece(page_size, config.block_keys),
        block=config.block_keys,
        ring=config.num_buffers,
        blocks_per_body=config.blocks_per_body,
        window=config.window_rows,
        new=_new_slots(new, heads),
        mask_dtype=_mask_dtype(heads, score),
        table_part=_TABLE_PART if page_indices.size > _MAX_TABLE else 0,
        is_interpreted=False,
    )
    table = page_table.prepare(page_indices, kv_pages.shape[0], page_size, writes=new is not None)
    # A block's entries are read whether it has so many pieces or not.
    behind = static.pieces_per_block
    if static.table_part:
        behind = -table.shape[0] % static.table_part
    table = jnp.pad(table, (0, behind))
    factors = [jnp.asarray(sm_scale, jnp.float32).reshape(1)]
    if has_scales:
        for scale in (k_scale, v_scale):
            scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
            factors.append(jnp.broadcast_to(scale, (heads.num_kv_heads,)))
    metadata = [kv_lens, table, cu_q_lens, num_seqs, jnp.concatenate(factors)]
    if score.has_window:
        metadata.append(jnp.asarray(sliding_window, jnp.int32).reshape(1))
    if score.has_sinks:
        column = jnp.pad(sinks, (0, decodes.decode_rows(num_heads) - num_heads))
        metadata += [sinks, jnp.broadcast_to(column[:, None], (column.shape[0], layout.LANES))]
    if new is not None and layout.is_quantized(heads.pool_dtype):
        scales = (write_oracle.inverse_scale(x, heads.num_kv_heads) for x in (k_scale, v_scale))
        metadata.append(jnp.concatenate(list(scales)))

    # Reshaped back to what a projection made, before any padding that it does not need.
    pad_lanes = heads.lanes - head_dim
    if pad_lanes:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_lanes)))
    q = q.reshape(num_tokens, num_heads * heads.lanes)
    tensors = [_pad_rows(x, rows) for x in (q, *(new or ()))]
    pool = layout.flatten_slots(kv_pages)
    if heads.num_rows > num_rows:
        pool = jnp.pad(pool, ((0, 0), (0, heads.num_rows - num_rows), (0, 0)))

    def launch(is_interpreted, pool):
        walk = dataclasses.replace(static, is_interpreted=is_interpreted)
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
    lse = results.pop(0)[:num_tokens, :num_heads] if return_lse else None
    pool = results[0][:, :num_rows].reshape(kv_pages.shape) if new is not None else None
    return out, lse, pool


def _mask_dtype(heads: Heads, score: Score) -> jnp.dtype:
    """As what a prefill's weights are masked: as the matrix products take them, which makes half as
    many words of bfloat16. Not where the log-sum-exp wants them unrounded; nor where the vector
    unit knows no bfloat16 (before v6e) and a mask of pairs would be turned for each register."""
    knows_bfloat16 = (dispatch.tpu_generation() or 6) >= 6
    return heads.compute_dtype if knows_bfloat16 and not score.return_lse else jnp.dtype("float32")


def _new_slots(new, heads: Heads) -> Slots | None:
    """What the making of slots needs to know of k and v, [T, K, H] or [T, K*H]."""
    if new is None:
        return None
    return Slots(
        heads.num_kv_heads,
        heads.head_dim,
        heads.pool_dtype,
        heads.num_rows,
        is_flat=new[0].ndim == 2,
    )


def _pad_rows(x, num_rows):
    missing = num_rows - x.shape[0]
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def _piece(page_size: int, block_keys: int) -> int:
    """Tokens that one DMA brings: a page, or its largest divisor that a block has room for."""
    return next(n for n in range(min(page_size, block_keys), 0, -1) if page_size % n == 0)


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
    decode_rows = decodes.decode_rows(heads.num_heads)
    head_rows = heads.lane_tiles * window, decodes.row_pitch(heads.num_heads), 1, layout.LANES
    prefill_rows = window * heads.group
    lse_lanes = _round_up(heads.num_heads, layout.LANES)
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
            vmem_limit_bytes=_vmem_capacity(),
        ),
        name=f"{name}_block{walk.block}_window{window}",
    )(*metadata, *tensors, pool)


def _varying(q, pool):
    """The result varies over a shard_map's axes as q and the pool do."""
    return jax.typeof(q).manual_axis_type
