# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Block sizes of the TPU attention: what they are, which ones are taken, and the VMEM they need."""

import dataclasses

from pallas_paged import dispatch, layout, tuned
from pallas_paged.attention.tpu import decode
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.attention.tpu.refs import ROW_TILE, new_rows

# What the kernel leaves of a generation's VMEM to the compiler and to XLA's prefetches.
_VMEM_SHARE = 0.75
_SMALLEST_VMEM = 16 * 2**20  # a v4's, for calls that are traced for no TPU
# Keys of heads in the largest body of a decode, about 4,000 bundles.
_MAX_BODY = 16_384


@dataclasses.dataclass(frozen=True)
class TpuAttentionConfig:
    """Block sizes of the TPU attention.

    Attributes:
      block_kv: the keys of a KV block, a multiple of 128.
      block_q: rows of the batch whose queries a prefill takes together, a multiple of 128; also
        the rows of decodes that share a window of q.
      num_stages: blocks in VMEM: those being computed, the others on their way.
      kv_blocks_per_iteration: KV blocks that a long decode takes in one iteration of its loop, at
        most half of `num_stages`.
    """

    block_kv: int
    block_q: int
    num_stages: int = 3
    kv_blocks_per_iteration: int = 1

    def __post_init__(self):
        for name, multiple in (
            ("block_kv", 128),
            ("block_q", 128),
            ("num_stages", 1),
            ("kv_blocks_per_iteration", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < multiple or value % multiple:
                raise ValueError(
                    f"TpuAttentionConfig: {name} is {value!r}; wanted a positive "
                    f"multiple of {multiple}"
                )
        # A body waits for all of its blocks, and those of the next one come in meanwhile.
        if self.num_stages < 2 * self.kv_blocks_per_iteration:
            raise ValueError(
                f"TpuAttentionConfig: num_stages is {self.num_stages}; wanted at least twice "
                f"kv_blocks_per_iteration, {self.kv_blocks_per_iteration}, so that blocks come in "
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
    block_kv = max(128, min(1024, 4096 // heads.num_kv_heads // 128 * 128))
    while True:
        for num_stages, kv_blocks_per_iteration in ((16, 8), (8, 4), (4, 2), (3, 1)):
            config = TpuAttentionConfig(block_kv, 128, num_stages, kv_blocks_per_iteration)
            is_short = kv_blocks_per_iteration * block_kv * heads.num_kv_heads <= _MAX_BODY
            if (is_short or kv_blocks_per_iteration == 1) and fits(heads, config, num_new_tokens):
                return config
        if block_kv == 128:
            return config
        block_kv = max(128, block_kv // 2 // 128 * 128)


def fits(heads: Heads, config: TpuAttentionConfig, num_new_tokens: int = 0) -> bool:
    """Whether the kernel's share of the generation's VMEM holds what block sizes need."""
    needed = vmem_bytes(heads, config, num_new_tokens, return_lse=True)
    return needed <= _VMEM_SHARE * vmem_capacity()


def vmem_capacity() -> int:
    """VMEM of a core of the TPU that a call is traced for."""
    return dispatch.tpu_vmem_bytes() or _SMALLEST_VMEM


def vmem_bytes(
    heads: Heads, config: TpuAttentionConfig, num_new_tokens: int = 0, *, return_lse: bool
) -> int:
    """VMEM that the kernel's scratch takes, and the largest values of a body."""
    window, width = config.block_q, heads.num_heads * heads.lanes
    rows = window * heads.group
    slot = heads.pitch * heads.lanes * 4
    ring = (config.num_stages + 1) * config.block_kv * slot
    windows = 3 * window * width * heads.q_dtype.itemsize
    windows += 2 * window * decode.row_pitch(heads.num_heads) * heads.lanes * 4
    prefill = heads.num_kv_heads * rows * (heads.lanes + 24) * 4
    decode_state = decode.decode_rows(heads.num_heads) * (heads.lanes + 2 * layout.LANES) * 4
    lse = 2 * window * layout.round_up(heads.num_heads, layout.LANES) * 4 if return_lse else 0
    body = 3 * config.block_kv * rows * 4  # scores and weights of one head, and the mask
    new = 0
    if num_new_tokens:
        # With the part of a page, at most a block of keys, that may be before them; and the windows
        # of k and v, of which [T, K, H] pads the heads to whole tiles.
        tokens = layout.round_up(num_new_tokens, ROW_TILE)
        new = new_rows(tokens, config.block_kv, config.block_kv, window) * slot
        new += 2 * window * layout.round_up(heads.num_kv_heads, 16) * heads.lanes * 4
    return ring + windows + prefill + decode_state + lse + body + new
