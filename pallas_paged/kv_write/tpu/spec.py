# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The static parameters of the TPU write kernel, and the words that it uses.

- A *chunk* is what one DMA sends to the pool: consecutive tokens of the batch that go to
  consecutive slots. It is a page, an equal part of a page, a slice, a part of a slice, or a token.
- A *token block* is a range of the batch that fits one pipeline stage in VMEM.
- A *group* is consecutive chunks whose tokens all lie in one token block. The kernel works group by
  group, and the two pipeline stages hold two groups.
"""

import dataclasses

import jax.numpy as jnp

from pallas_paged import layout
from pallas_paged.kv_write.tpu.interleave import Slots, Tiling

# Two groups are in flight: one is interleaved and sent while the next one's tokens come in.
NUM_STAGES = 2


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """The kernel's static parameters; launch.plan makes them once per trace.

    Attributes:
      op: "page_write", "slice_write" or "token_write", for the kernel's name.
      slots: the form of k and v and of the pool's slots.
      new_dtype: the dtype of k and v as the kernel takes them.
      tiling: how the tokens of a group are interleaved.
      num_tokens: T.
      num_entries: pages, slices or tokens that the call names, those to be skipped included.
      chunk_tokens: tokens of a chunk; if `has_lengths`, of the longest possible chunk.
      chunks_per_entry: chunks of a page, or of the longest possible slice.
      has_token_starts: whether every entry names its first token; if not, chunk i starts at token
        `i * chunk_tokens`.
      has_lengths: whether every chunk has a length of its own; if not, it is `chunk_tokens`.
      max_elements_per_step: elements of the metadata that are in SMEM at a time, at most.
      block_tokens: tokens from the first to the last token of a group, at most.
      max_sent_tokens: tokens that a group sends, at most; the pool's slots bound them because one
        wait covers them all.
      row_align: the offset and the size of a DMA of k or v are multiples of this many rows.
      misalignment: rows that a token block may need beyond its group's tokens for that.
      chunks_per_iteration: DMAs in one iteration of the unrolled loop that starts them.
    """

    op: str
    slots: Slots
    new_dtype: jnp.dtype
    tiling: Tiling
    num_tokens: int
    num_entries: int
    chunk_tokens: int
    chunks_per_entry: int
    has_token_starts: bool
    has_lengths: bool
    max_elements_per_step: int
    block_tokens: int
    max_sent_tokens: int
    row_align: int
    misalignment: int
    chunks_per_iteration: int

    @property
    def chunks_per_element(self) -> int:
        """Chunks per element of the metadata. Slices are cut before the kernel sees them."""
        return 1 if self.has_lengths else self.chunks_per_entry

    @property
    def num_elements(self) -> int:
        """Elements of the metadata: one per entry, or one per chunk of a slice."""
        return self.num_entries * self.chunks_per_entry // self.chunks_per_element

    @property
    def elements_per_step(self) -> int:
        """Elements of the metadata that one step of the grid works on."""
        return min(self.num_elements, self.max_elements_per_step)

    @property
    def num_steps(self) -> int:
        """Steps of the grid."""
        return -(-self.num_elements // self.elements_per_step)

    @property
    def chunks_per_step(self) -> int:
        """Chunks that one step of the grid works on."""
        return self.elements_per_step * self.chunks_per_element

    @property
    def max_chunks(self) -> int:
        """Chunks whose tokens are in the batch, where the entries do not name their tokens."""
        num_chunks = self.num_elements * self.chunks_per_element
        return min(num_chunks, self.num_tokens // self.chunk_tokens)

    @property
    def chunks_per_group(self) -> int:
        """Chunks of the full length in a group."""
        return chunks_per_group(self.chunk_tokens, self.block_tokens)

    @property
    def is_one_iteration(self) -> bool:
        """Whether a group has no room for two whole iterations of the loop that starts DMAs."""
        return self.chunks_per_group <= self.chunks_per_iteration and not self.has_lengths

    @property
    def aligned_tokens(self) -> int:
        """Tokens of k and v that whole tiles of rows hold; a batch of less than one is padded."""
        return max(1, self.num_tokens // self.row_align) * self.row_align

    @property
    def has_tail(self) -> bool:
        """Whether some last tokens of the batch fill no tile of rows, and so come by themselves."""
        return self.num_tokens > self.aligned_tokens

    @property
    def block_rows(self) -> int:
        """Rows of k and v that a token block has at most, the tail left out."""
        return min(self.block_tokens + self.misalignment, self.aligned_tokens)

    @property
    def stage_rows(self) -> int:
        """Tokens that one pipeline stage has room for, as whole tiles of the interleaving."""
        rows = self.block_rows + (self.row_align if self.has_tail else 0)
        return -(-rows // self.tiling.tile) * self.tiling.tile

    @property
    def has_scales(self) -> bool:
        """Whether k and v are scaled on their way."""
        return layout.is_quantized(self.slots.pool_dtype)

    @property
    def slots_per_target(self) -> int:
        """Slots of what the metadata names: a page's slots, or one slot."""
        return 1 if self.has_lengths else self.chunks_per_element * self.chunk_tokens

    @property
    def name(self) -> str:
        """The kernel's name, in profiles and compiled programs."""
        return f"{self.op}_{self.chunk_tokens}_block{self.block_tokens}"


def chunks_per_group(chunk_tokens: int, block_tokens: int) -> int:
    """Chunks of `chunk_tokens` in a group."""
    return max(1, block_tokens // chunk_tokens)
