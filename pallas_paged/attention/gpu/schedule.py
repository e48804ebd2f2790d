# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The schedule: how much work each sequence makes, and how a kernel finds its own work in it.

XLA computes the schedule in front of the kernels, so no host needs to know a length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.attention.gpu.refs import Inputs
from pallas_paged.attention.gpu.spec import ROW_TILE, KernelSpec, Ref, Scalar
from pallas_paged.attention.options import Batch

# The rows of the schedule.
KV_BLOCKS, Q_TILES = range(2)


def make_schedule(
    batch: Batch, window: jax.Array | None, num_tokens: int, spec: KernelSpec
) -> jax.Array:
    """The work in front of each sequence, and in all: int32[2, S + 1].

    Row `KV_BLOCKS` counts the blocks of one KV head for the decode kernel, row `Q_TILES` the tiles
    of one query head for the prefill kernel. Prefix sums are written as one sum over masked
    entries, because XLA makes one small kernel of that and three of prefix sums.

    Args:
      batch: the metadata.
      window: int32[], the sliding window, or None.
      num_tokens: T, as the kernels have it.
      spec: the static parameters.
    """
    max_seqs = batch.kv_lens.shape[0]
    block_kv = spec.decode_kv.block_kv
    seq = jnp.arange(max_seqs, dtype=jnp.int32)
    lengths = Lengths(batch.kv_lens, batch.cu_q_lens, num_tokens, spec.capacity)
    begin, end, length = lengths.of(slice(0, max_seqs), slice(1, max_seqs + 1))
    is_used = (seq < batch.num_seqs[0]) & (end > begin)
    is_short = (end - begin <= spec.max_short) & (length > 0)
    low = 0 if window is None else first_seen(length - (end - begin), window)
    # A window of 0, which only a traced one can be, leaves no block, but rows to be zeroed.
    blocks = jnp.maximum(-(-length // block_kv) - low // block_kv, 1)
    tiles = -(-(end - begin // ROW_TILE * ROW_TILE) // spec.block_q)
    counts = jnp.stack(
        [jnp.where(is_used & is_short, blocks, 0), jnp.where(is_used & ~is_short, tiles, 0)]
    )
    is_before = seq < jnp.arange(max_seqs + 1, dtype=jnp.int32)[:, None]
    return jnp.sum(jnp.where(is_before, counts[:, None], 0), axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of a batch, clipped so that every work item stays in bounds.

    Attributes:
      kv_lens: int32[S], an array or a ref.
      cu_q_lens: int32[S + 1], an array or a ref.
      num_tokens: T.
      capacity: the tokens that a row of the page table has room for.
    """

    kv_lens: Ref
    cu_q_lens: Ref
    num_tokens: int
    capacity: int

    def of(self, seq: Any, following: slice | None = None) -> tuple[Scalar, Scalar, Scalar]:
        """(begin, end, length): the rows of a sequence in the batch, and its tokens in the cache.

        Args:
          seq: the index of the sequence, or a slice of indices.
          following: the slice of the indices that follow those of `seq`, if that is a slice.
        """
        begin = self.row(seq)
        end = jnp.maximum(begin, self.row(seq + 1 if following is None else following))
        return begin, end, jnp.clip(self.kv_lens[seq], 0, self.capacity)

    def row(self, seq: Any) -> Scalar:
        """The first row of a sequence, or of a slice of sequences."""
        return jnp.clip(self.cu_q_lens[seq], 0, self.num_tokens)


def lengths_of(inputs: Inputs, spec: KernelSpec) -> Lengths:
    """The lengths of the batch that a kernel reads."""
    return Lengths(inputs.kv_lens, inputs.cu_q_lens, inputs.q.shape[0], spec.capacity)


def search(schedule: Ref, row: int, size: int, item: Scalar, scale: int) -> Scalar:
    """The sequence that a work item belongs to, by a search in one row of the schedule.

    Each step compares 15 entries at a time, because each step waits for the memory once.

    Args:
      schedule: the schedule; its rows grow from 0.
      row: `KV_BLOCKS` or `Q_TILES`.
      size: S.
      item: the number of the work item.
      scale: the work items per unit of the schedule.

    Returns:
      the last i < size with `schedule[row, i] * scale <= item`.
    """
    found = jnp.int32(0)
    width = 16
    stride = 1
    while stride * width < size:
        stride *= width
    while stride:
        candidates = [jnp.minimum(found + j * stride, size) for j in range(1, width)]
        sums = [schedule[row, i] for i in candidates]
        steps = [
            jnp.where((i < size) & (sum_before * scale <= item), 1, 0)
            for i, sum_before in zip(candidates, sums, strict=True)
        ]
        found += stride * sum(steps)
        stride //= width
    return found


def first_seen(position: Scalar, window: Scalar) -> Scalar:
    """The first key that the query at a position looks back on."""
    return jnp.maximum(position - clip_window(window) + 1, 0)


def clip_window(window: Scalar) -> Scalar:
    """A sliding window whose differences with positions stay in int32, also if it is 2**31 - 1."""
    return jnp.clip(window, 0, 2**30)


@dataclasses.dataclass(frozen=True)
class KvRange:
    """The KV blocks that some rows attend to, from last to first.

    The order puts the blocks that need a mask for the causal rule at the beginning.

    Attributes:
      low: the first position that any of the rows sees.
      end: where the sequence ends. A block may hold later positions that the rows do not see.
      first_whole, end_whole: the positions that all rows see. Blocks inside need no mask.
      block_kv: the positions of a block.
      newest: the index of the block to begin with.
      count: the number of blocks, at least 1.
    """

    low: Scalar
    end: Scalar
    first_whole: Scalar
    end_whole: Scalar
    block_kv: int
    newest: Scalar
    count: Scalar

    def first_key(self, i: Scalar) -> Scalar:
        """The first position of the i-th block."""
        return (self.newest - i) * self.block_kv

    def masked(self) -> tuple[Scalar, Scalar]:
        """(a, b): the blocks before a and those from b on need a mask."""
        begin = self.count - jnp.clip(self.end_whole // self.block_kv - self._oldest, 0, self.count)
        whole = -(-self.first_whole // self.block_kv) - self._oldest
        begin = jnp.maximum(begin, 1)
        return begin, jnp.clip(self.count - whole, begin, self.count)

    @property
    def _oldest(self) -> Scalar:
        return self.newest - self.count + 1
