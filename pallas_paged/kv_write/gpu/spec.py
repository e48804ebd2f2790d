# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The static parameters of the GPU write kernel."""

import dataclasses

import jax.numpy as jnp

from pallas_paged import layout


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """The kernel's static parameters; launch.plan makes them once per trace.

    A thread block takes up to `block_tokens` tokens of one entry, and `block_heads` heads of each.
    An entry is a page, a slice, or in a token_write the whole batch.

    Attributes:
      op: "page_write", "slice_write" or "token_write", for the kernel's name.
      num_tokens: T.
      num_kv_heads: K.
      head_dim: lanes of a head in the pool.
      num_pages: P.
      slot_heads: heads that a slot has room for, R or R / 2; those after the first K are padding.
      new_dtype: the dtype of k and v.
      num_entries: entries of the call, those to be skipped included.
      entry_tokens: tokens of the longest possible entry.
      block_tokens: tokens that a thread block has room for.
      block_heads: KV heads that a thread block has room for, a divisor of K. It is one where values
        are converted: each head has its scales then, and a loop over heads would wait for memory at
        each.
      first_heads: the first head of the keys in the array k, and of the values in the array v; both
        arrays are the packed QKV if there is one.
      has_token_starts: whether every page names its first token; if not, page i starts at token
        `i * page_size`.
      fetch_first: see GpuWriteConfig.
    """

    op: str
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    slot_heads: int
    new_dtype: jnp.dtype
    pool_dtype: jnp.dtype
    num_entries: int
    entry_tokens: int
    block_tokens: int
    block_heads: int
    first_heads: tuple[int, int]
    has_token_starts: bool
    fetch_first: bool

    @property
    def converts(self) -> bool:
        """Whether values change on their way, which only registers can do."""
        return self.new_dtype != self.pool_dtype

    @property
    def fills_buffer(self) -> bool:
        """Whether a token's heads end where the next token's may begin: at 128 bytes."""
        return self.block_heads * self.head_dim * self.pool_dtype.itemsize % 128 == 0

    @property
    def has_scales(self) -> bool:
        """Whether values are scaled on their way."""
        return self.converts and layout.is_quantized(self.pool_dtype)

    @property
    def num_fetches(self) -> int:
        """Copies that bring a block's k, and as many its v: one where its tokens touch."""
        return 1 if self.fills_buffer else self.block_tokens

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return self.num_pages * self.page_size

    @property
    def padding(self) -> int:
        """Heads of a slot that hold zeros."""
        return self.slot_heads - self.num_kv_heads

    @property
    def entry_block_tokens(self) -> int:
        """Tokens of an entry that one thread block takes."""
        return min(self.block_tokens, self.entry_tokens)

    @property
    def blocks_per_entry(self) -> int:
        """Thread blocks per entry, for each of the head groups."""
        return -(-self.entry_tokens // self.entry_block_tokens)

    @property
    def grid(self) -> tuple[int, int]:
        """Thread blocks: groups of heads, and what is to be written of each."""
        # The last dimension of a grid may exceed 65,535 thread blocks.
        return self.num_kv_heads // self.block_heads, self.num_entries * self.blocks_per_entry

    @property
    def name(self) -> str:
        """The kernel's name, in profiles and compiled programs."""
        return f"{self.op}_{self.block_tokens}x{self.block_heads}"
