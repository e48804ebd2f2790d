# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on TPU: one kernel that walks decodes and prefills in their order.

q and the output stay `[T, N*H]` in memory, as a projection makes them; the kernel takes whole row
tiles of them and never a transposed or padded copy (heads of whole 128 lanes).
"""

__all__ = ["Config", "default_config", "ragged_paged_attention", "unsupported"]

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import dispatch, layout, tuned
from pallas_paged.ragged_paged_attention import mosaic_tpu_attend as attend
from pallas_paged.ragged_paged_attention import mosaic_tpu_walk
from pallas_paged.ragged_paged_attention.mosaic_tpu_attend import Score
from pallas_paged.ragged_paged_attention.mosaic_tpu_operands import Heads
from pallas_paged.ragged_paged_attention.mosaic_tpu_walk import (
    ROW_TILE,
    STATE_SIZE,
    UNIT_SIZE,
    Walk,
    kernel,
)

# What the kernel leaves of a generation's VMEM to the compiler and to XLA's prefetches.
_VMEM_SHARE = 0.75
_VMEM_BYTES = {4: 16 * 2**20, 5: 64 * 2**20, 6: 128 * 2**20, 7: 64 * 2**20}
_SMALLEST_VMEM = 16 * 2**20
# Page table entries that SMEM (1 MiB) holds beside the other metadata.
_MAX_TABLE = 200_000


@dataclasses.dataclass(frozen=True)
class Config:
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
            ("block_keys", 128), ("window_rows", 128), ("num_buffers", 1), ("blocks_per_body", 1)
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < multiple or value % multiple:
                raise ValueError(
                    f"ragged_paged_attention Config: {name} is {value!r}; wanted a positive "
                    f"multiple of {multiple}"
                )
        # A body waits for all of its blocks, and those of the next one come in meanwhile.
        if self.num_buffers < 2 * self.blocks_per_body:
            raise ValueError(
                f"ragged_paged_attention Config: num_buffers is {self.num_buffers}; wanted at "
                f"least twice blocks_per_body, {self.blocks_per_body}, so that blocks come in "
                "while others are computed"
            )


def default_config(heads: Heads, page_size: int) -> Config:
    """What was found for the device (`pallas_paged.tuned`), else the largest blocks whose buffers
    fit the generation's VMEM."""
    found = tuned.find(
        dispatch.tpu_device_kind(), "ragged_paged_attention", page_size=page_size,
        num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim,
        q_dtype=heads.q_dtype.name, pool_dtype=heads.pool_dtype.name,
    )
    if found and fits(heads, Config(**found)):
        return Config(**found)
    # A block of all heads is one straight body: 4,096 keys of heads are about 1,000 bundles.
    block_keys = max(128, min(1024, 4096 // heads.num_kv_heads // 128 * 128))
    while True:
        pieces = block_keys // _piece(page_size, block_keys)
        for num_buffers, blocks_per_body in ((8, 4), (4, 2), (3, 1)):
            config = Config(block_keys, 128, num_buffers, blocks_per_body)
            # More DMAs than a body writes out are issued before it, in a loop that nothing hides:
            # not where fewer blocks at a time do without it.
            is_looped = pieces <= mosaic_tpu_walk._MAX_UNROLL < blocks_per_body * pieces
            if fits(heads, config) and not is_looped:
                return config
        if block_keys == 128:
            return config
        block_keys = max(128, block_keys // 2 // 128 * 128)


def fits(heads: Heads, config: Config) -> bool:
    """Whether the buffers leave enough of the generation's VMEM to the compiler."""
    return vmem_bytes(heads, config, return_lse=True) <= _VMEM_SHARE * _vmem_capacity()


def _vmem_capacity() -> int:
    return _VMEM_BYTES.get(dispatch.tpu_generation() or 0, _SMALLEST_VMEM)


def vmem_bytes(heads: Heads, config: Config, *, return_lse: bool) -> int:
    """VMEM that the kernel's scratch takes, and the largest values of a body."""
    window, width = config.window_rows, heads.num_heads * heads.lanes
    rows = window * heads.group
    ring = (config.num_buffers + 1) * config.block_keys * heads.pitch * heads.lanes * 4
    windows = 3 * window * width * heads.q_dtype.itemsize
    windows += 2 * window * attend.row_pitch(heads.num_heads) * heads.lanes * 4
    prefill = heads.num_kv_heads * rows * (heads.lanes + 24) * 4
    decode = attend.decode_rows(heads.num_heads) * (heads.lanes + 2 * layout.LANES) * 4
    lse = 2 * window * _round_up(heads.num_heads, layout.LANES) * 4 if return_lse else 0
    body = 3 * config.block_keys * rows * 4  # scores, weights and the mask of one head
    return ring + windows + prefill + decode + lse + body


def unsupported(q, kv_pages, page_indices, num_kv_heads: int, config: Config | None) -> str | None:
    """Why the kernel cannot run a call, as a sentence; None if it can."""
    if jnp.float16 in (q.dtype, kv_pages.dtype):
        return "a TPU has no float16; use bfloat16"
    table = page_indices.shape[0] * page_indices.shape[1]
    if table > _MAX_TABLE:
        return (
            f"a page table of {table} entries does not fit SMEM beside the other metadata "
            f"({_MAX_TABLE} entries do); use longer pages or a narrower table"
        )
    heads = heads_of(q, kv_pages, num_kv_heads)
    config = config or default_config(heads, kv_pages.shape[1])
    needed, there = vmem_bytes(heads, config, return_lse=True), _vmem_capacity()
    if needed > there:
        return (
            f"{heads.num_heads} query heads on {num_kv_heads} KV heads of {heads.head_dim} with "
            f"{config} need {needed / 2**20:.1f} MiB of VMEM, and {there / 2**20:.0f} MiB are "
            "there; shard the heads or make the blocks smaller"
        )
    return None


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
    q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs,
    *, sm_scale, causal, sliding_window, soft_cap, k_scale, v_scale, sinks, num_kv_heads,
    return_lse, config,
):
    """See api.ragged_paged_attention; returns (out, log-sum-exp or None)."""
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return q, jnp.zeros((0, num_heads), jnp.float32)
    heads = heads_of(q, kv_pages, num_kv_heads)
    config = config or default_config(heads, kv_pages.shape[1])
    page_size = kv_pages.shape[1]
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
        is_interpreted=False,
    )
    factors = [jnp.asarray(sm_scale, jnp.float32).reshape(1)]
    if has_scales:
        for scale in (k_scale, v_scale):
            scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
            factors.append(jnp.broadcast_to(scale, (num_kv_heads,)))
    metadata = [
        kv_lens, page_indices.reshape(-1), cu_q_lens, num_seqs, jnp.concatenate(factors)
    ]
    if score.has_window:
        metadata.append(jnp.asarray(sliding_window, jnp.int32).reshape(1))
    vectors = []
    if score.has_sinks:
        metadata.append(sinks)
        column = jnp.pad(sinks, (0, attend.decode_rows(num_heads) - num_heads))
        vectors.append(jnp.broadcast_to(column[:, None], (column.shape[0], layout.LANES)))

    # Reshaped back to what a projection made, before any padding that it does not need.
    pad_lanes = heads.lanes - head_dim
    if pad_lanes:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_lanes)))
    q = q.reshape(num_tokens, num_heads * heads.lanes)
    if rows > num_tokens:
        q = jnp.pad(q, ((0, rows - num_tokens), (0, 0)))
    pool = layout.flatten_slots(kv_pages)
    if heads.num_rows > pool.shape[1]:
        pool = jnp.pad(pool, ((0, 0), (0, heads.num_rows - pool.shape[1]), (0, 0)))

    def launch(is_interpreted, pool):
        return _launch(
            dataclasses.replace(static, is_interpreted=is_interpreted), metadata, vectors, q, pool
        )

    # The interpreter cannot view a ref as words, so on a CPU it gets the pool as words.
    out, *lse = lax.platform_dependent(
        pool,
        tpu=functools.partial(launch, False),
        default=lambda pool: launch(
            True, layout.to_words(pool) if heads.rows_per_word > 1 else pool
        ),
    )
    out = out[:num_tokens].reshape(num_tokens, num_heads, heads.lanes)[..., :head_dim]
    return out, lse[0][:num_tokens, :num_heads] if return_lse else None


def _piece(page_size: int, block_keys: int) -> int:
    """Tokens that one DMA brings: a page, or its largest divisor that a block has room for."""
    return next(n for n in range(min(page_size, block_keys), 0, -1) if page_size % n == 0)


def _launch(walk: Walk, metadata, vectors, q, pool):
    """The one pallas_call."""
    heads, window = walk.heads, walk.window
    width = heads.num_heads * heads.lanes
    decode_rows = attend.decode_rows(heads.num_heads)
    pitch = attend.row_pitch(heads.num_heads)
    prefill_rows = window * heads.group
    lse_lanes = _round_up(heads.num_heads, layout.LANES)
    word = jnp.float32 if heads.pool_dtype == jnp.float32 else jnp.uint32
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)

    def vmem(*shape):
        return pltpu.VMEM(shape, jnp.float32)

    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype, manual_axis_type=_varying(q, pool))]
    if walk.score.return_lse:
        out_shape.append(
            jax.ShapeDtypeStruct(
                (q.shape[0], lse_lanes), jnp.float32, manual_axis_type=_varying(q, pool)
            )
        )
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        functools.partial(kernel, walk),
        out_shape=out_shape,
        in_specs=[
            *(smem for _ in metadata),
            *(pl.BlockSpec(memory_space=pltpu.VMEM) for _ in vectors),
            hbm,
            hbm,
        ],
        out_specs=[hbm for _ in out_shape],
        scratch_shapes=[
            pltpu.SMEM((STATE_SIZE,), jnp.int32),
            pltpu.SMEM((walk.max_units, UNIT_SIZE), jnp.int32),
            pltpu.VMEM(
                (walk.ring + 1, heads.lane_tiles, walk.block, heads.pitch, 1, layout.LANES), word
            ),
            pltpu.VMEM((window, width), heads.q_dtype),
            pltpu.VMEM((2, window, width), heads.q_dtype),
            *[vmem(heads.lane_tiles, window, pitch, 1, layout.LANES)] * 2,
            vmem(decode_rows, layout.LANES),
            vmem(decode_rows, layout.LANES),
            vmem(decode_rows, heads.lanes),
            vmem(heads.num_kv_heads, 8, prefill_rows),
            vmem(heads.num_kv_heads, 16, prefill_rows),
            vmem(heads.num_kv_heads, heads.lanes, prefill_rows),
            pltpu.SemaphoreType.DMA((walk.ring + 1,)),
            pltpu.SemaphoreType.DMA((1,)),
            pltpu.SemaphoreType.DMA((2,)),
            *([vmem(2, window, lse_lanes)] if walk.score.return_lse else []),
        ],
        # The kernel checks every id (fetch_block) and keeps every row inside the batch (rows_of).
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True,
            vmem_limit_bytes=_vmem_capacity(),
        ),
        name=f"ragged_paged_attention_block{walk.block}_window{window}",
    )(*metadata, *vectors, q, pool)


def _varying(q, pool):
    """The result varies over a shard_map's axes as q and the pool do."""
    return jax.typeof(q).manual_axis_type
