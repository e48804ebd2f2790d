# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel's static parameters: all that is known of a call before its arrays are."""

import dataclasses

import jax.numpy as jnp

from pallas_paged.attention.options import AttentionOptions
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.kv_write.tpu.interleave import Slots

# DMAs move q and the output in tiles of this many rows, at offsets that are multiples of it: the
# register tile of bfloat16.
ROW_TILE = 16
# The first row tile of a q tile may hold rows of the sequence before. Their tokens are stored, and
# never read, in this many rows before the new tokens in VMEM.
NEW_KV_LEAD = ROW_TILE
# Sequence lengths and sliding windows are cut off here, so that sums of them fit int32.
MAX_LEN = 2**30
# A loop iteration over full KV blocks with this many keys is long: few decodes fill it alone, so it
# takes the blocks of two.
LONG_ITERATION_KEYS = 8192


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """The kernel's static parameters. `launch.plan` makes them from the shapes of a call.

    Attributes:
      heads: the shapes and dtypes of q's heads and of the pool's slots.
      options: the static options of the call.
      num_tokens: T, rounded up to whole row tiles.
      max_seqs: S.
      table_width: M.
      num_pages: P.
      page_size: tokens per page.
      chunk: tokens that one DMA brings: a page, or an equal part of one (`chunk_tokens`).
      block_kv: tokens of a KV block.
      num_stages: pipeline stages, each with the room for one KV block.
      kv_blocks_per_iteration: KV blocks that one loop iteration over decodes takes.
      block_q: rows of a q tile.
      new_kv: how the new k and v become slots of the pool; None if the call only reads.
      mask_dtype: the dtype in which a prefill's weights are masked.
      table_part: entries of a streamed page table that come into SMEM at a time; 0 if SMEM holds
        the whole table.
      is_interpreted: whether the kernel runs in the interpreter, which cannot reshape a ref.
    """

    heads: Heads
    options: AttentionOptions
    num_tokens: int
    max_seqs: int
    table_width: int
    num_pages: int
    page_size: int
    chunk: int
    block_kv: int
    num_stages: int
    kv_blocks_per_iteration: int
    block_q: int
    new_kv: Slots | None
    mask_dtype: jnp.dtype
    table_part: int
    is_interpreted: bool

    @property
    def writes(self) -> bool:
        """Whether the call writes new tokens."""
        return self.new_kv is not None

    @property
    def chunks_per_block(self) -> int:
        """Chunks that a KV block has room for."""
        return self.block_kv // self.chunk

    @property
    def chunks_per_page(self) -> int:
        """Chunks that make up a page."""
        return self.page_size // self.chunk

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's row of the page table has room for."""
        return min(self.table_width * self.page_size, MAX_LEN)

    @property
    def max_work_items(self) -> int:
        """Work items that may have been found and not be finished, rounded up to a power of 2.

        There is at most one for each KV block in flight, and the one whose blocks come next.
        """
        return 1 << self.num_stages.bit_length()

    @property
    def decodes_per_full_iteration(self) -> int:
        """Decodes whose KV blocks one iteration over full blocks takes, the same number of each."""
        return decodes_per_full_iteration(self.block_kv, self.kv_blocks_per_iteration)

    @property
    def rows_per_stage(self) -> int:
        """Rows of a pipeline stage in VMEM: those of all tokens, for each lane tile."""
        return self.heads.lane_tiles * self.block_kv

    @property
    def stage_rows(self) -> int:
        """Rows of all stages, and of one more stage into which blocks are fetched again."""
        return (self.num_stages + 1) * self.rows_per_stage

    @property
    def new_kv_rows(self) -> int:
        """Rows per lane tile that follow the stages: the new tokens of a sequence or a q tile."""
        if self.new_kv is None:
            return 0
        return new_kv_rows(self.num_tokens, self.chunk, self.block_kv, self.block_q)


def chunk_tokens(page_size: int, block_kv: int) -> int:
    """Tokens that one DMA brings: a page, or its largest divisor that fits a KV block."""
    return next(n for n in range(min(page_size, block_kv), 0, -1) if page_size % n == 0)


def decodes_per_full_iteration(block_kv: int, kv_blocks_per_iteration: int) -> int:
    """Decodes that share one iteration over full KV blocks: 2 where it is long, else 1."""
    is_long = kv_blocks_per_iteration * block_kv >= LONG_ITERATION_KEYS
    return 2 if is_long and kv_blocks_per_iteration % 2 == 0 else 1


def new_kv_rows(num_tokens: int, chunk: int, block_kv: int, block_q: int) -> int:
    """Rows that a call's new tokens take in VMEM: whole KV blocks, and the rows around them.

    The first new token lies up to `chunk - 1` rows into the first block, after the old tokens of
    its chunk.
    """
    tokens = max(num_tokens + chunk - 1, block_q)
    return NEW_KV_LEAD + -(-tokens // block_kv) * block_kv + ROW_TILE
