# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Block sizes of the TPU attention: what they are, how they are chosen, the VMEM that they need."""

import dataclasses

from pallas_paged import dispatch, layout, tuned
from pallas_paged.attention.tpu import decode
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.attention.tpu.spec import ROW_TILE, new_kv_rows

# The fraction of a generation's VMEM that block sizes may need. The rest is for the compiler, and
# for what XLA prefetches.
_VMEM_FRACTION = 0.75
_SMALLEST_VMEM = 16 * 2**20  # that of a v4, for calls that are traced for no TPU
# The most keys, times KV heads, that one iteration over decodes takes: about 4,000 bundles.
MAX_ITERATION_KEYS = 16_384


@dataclasses.dataclass(frozen=True)
class TpuAttentionConfig:
    """Block sizes of the TPU attention.

    Attributes:
      block_kv: keys of a KV block, a multiple of 128.
      block_q: rows of a q tile, a multiple of 128: the most rows of a prefill that are computed
        together, and the rows of the batch whose decodes share a q tile.
      num_stages: pipeline stages: the KV blocks that VMEM holds, those that are computed with and
        those that are on their way.
      kv_blocks_per_iteration: KV blocks that one loop iteration over decodes takes, at most half of
        `num_stages`.
    """

    block_kv: int
    block_q: int
    num_stages: int = 3
    kv_blocks_per_iteration: int = 1

    def __post_init__(self) -> None:
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
        # An iteration waits for all of its blocks, while those of the next one are on their way.
        if self.num_stages < 2 * self.kv_blocks_per_iteration:
            raise ValueError(
                f"TpuAttentionConfig: num_stages is {self.num_stages}; wanted at least twice "
                f"kv_blocks_per_iteration, {self.kv_blocks_per_iteration}, so that blocks come in "
                "while others are computed"
            )


def default_config(heads: Heads, page_size: int, num_new_tokens: int = 0) -> TpuAttentionConfig:
    """The block sizes that a call has without a config.

    They are those of the device's tuned table (`pallas_paged.tuned`), else the largest ones that
    fit the VMEM of its generation.

    Args:
      heads: shapes and dtypes.
      page_size: tokens per page.
      num_new_tokens: T of a call that writes new tokens, 0 of a call that only reads.
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
    # The code for one block has no loop over heads: 4,096 keys times heads are about 1,000 bundles.
    block_kv = max(128, min(1024, 4096 // heads.num_kv_heads // 128 * 128))
    while True:
        for num_stages, kv_blocks_per_iteration in ((16, 8), (8, 4), (4, 2), (3, 1)):
            config = TpuAttentionConfig(block_kv, 128, num_stages, kv_blocks_per_iteration)
            is_short = kv_blocks_per_iteration * block_kv * heads.num_kv_heads <= MAX_ITERATION_KEYS
            if (is_short or kv_blocks_per_iteration == 1) and fits(heads, config, num_new_tokens):
                return config
        if block_kv == 128:
            return config
        block_kv = max(128, block_kv // 2 // 128 * 128)


def fits(heads: Heads, config: TpuAttentionConfig, num_new_tokens: int = 0) -> bool:
    """Whether block sizes leave enough of the generation's VMEM free; see `default_config`."""
    needed = vmem_bytes(heads, config, num_new_tokens, return_lse=True)
    return needed <= _VMEM_FRACTION * vmem_capacity()


def vmem_capacity() -> int:
    """Bytes of VMEM that a core of the TPU has that a call is traced for."""
    return dispatch.tpu_vmem_bytes() or _SMALLEST_VMEM


def vmem_bytes(
    heads: Heads, config: TpuAttentionConfig, num_new_tokens: int = 0, *, return_lse: bool
) -> int:
    """Bytes of VMEM that the kernel's scratch takes, and the largest values of an iteration."""
    block_q, width = config.block_q, heads.num_heads * heads.lanes
    prefill_rows = block_q * heads.group
    token = heads.pitch * heads.lanes * 4
    stages = (config.num_stages + 1) * config.block_kv * token
    q_tiles = 3 * block_q * width * heads.q_dtype.itemsize
    q_tiles += 2 * block_q * decode.row_pitch(heads.num_heads) * heads.lanes * 4
    prefill_state = heads.num_kv_heads * prefill_rows * (heads.lanes + 24) * 4
    decode_state = decode.decode_rows(heads.num_heads) * (heads.lanes + 2 * layout.LANES) * 4
    lse = 2 * block_q * layout.round_up(heads.num_heads, layout.LANES) * 4 if return_lse else 0
    # The scores and the weights of one head, and the mask.
    values = 3 * config.block_kv * prefill_rows * 4
    new_kv = 0
    if num_new_tokens:
        # A chunk is at most a block, which the old tokens before the new ones may fill. k and v of
        # a q tile come as [T, K, H] or [T, K*H]; the former pads the heads to whole tiles.
        tokens = layout.round_up(num_new_tokens, ROW_TILE)
        new_kv = new_kv_rows(tokens, config.block_kv, config.block_kv, block_q) * token
        new_kv += 2 * block_q * layout.round_up(heads.num_kv_heads, 16) * heads.lanes * 4
    return stages + q_tiles + prefill_state + decode_state + lse + values + new_kv
