# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Finds the work items of a batch in order: which rows of which sequence, and which keys they see.

Whatever the metadata says, rows are inside the batch and keys are inside the page table.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged.attention.tpu.index_math import ceil_div, div, rem
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.scores import sliding_window
from pallas_paged.attention.tpu.spec import MAX_LEN, ROW_TILE, KernelSpec


class WorkItem(NamedTuple):
    """The rows of one sequence that are computed together: int32 scalars, kept in SMEM.

    Attributes:
      seq: the sequence.
      row, end: the first row of the batch, and the row after the last one.
      position: position of the first row's token in the sequence.
      first_chunk: the first chunk of the sequence's keys that has a key to see.
      key_end: position of the first key that no row sees.
      num_blocks: the KV blocks that the item takes.
      is_decode: 1 if it is one row and all rows of its sequence, else 0.
      old_end: where the call writes, the chunk from which on the keys come from VMEM, being new.
      num_pool_blocks: where the call writes, the KV blocks that come from the pool.
      first_new_block: where the call writes, the first KV block of new keys with a key to see.
    """

    seq: Any
    row: Any
    end: Any
    position: Any
    first_chunk: Any
    key_end: Any
    num_blocks: Any
    is_decode: Any
    old_end: Any = None
    num_pool_blocks: Any = None
    first_new_block: Any = None


# The fields that only a prefill has whose new tokens are written.
_NEW_KV_FIELDS = WorkItem._fields[-3:]
_OTHER_FIELDS = WorkItem._fields[:-3]


def kept_fields(spec: KernelSpec) -> tuple[str, ...]:
    """The fields that are kept in SMEM. Of the others that a call has, all are 0."""
    missing: tuple[str, ...] = () if spec.writes else _NEW_KV_FIELDS
    if not spec.options.has_window:
        missing += ("first_chunk", "first_new_block")
    return tuple(name for name in WorkItem._fields if name not in missing)


def record_size(spec: KernelSpec) -> int:
    """Scalars of SMEM per work item: a power of 2, so that a shift finds them."""
    return 1 << (len(kept_fields(spec)) - 1).bit_length()


def rows_of(spec: KernelSpec, refs: Refs, seq: Any) -> tuple[Any, Any]:
    """The rows of a sequence: (the first, the one after the last)."""
    start = jnp.clip(refs.cu_q_lens[seq], 0, spec.num_tokens)
    return start, jnp.clip(refs.cu_q_lens[seq + 1], start, spec.num_tokens)


def num_seqs(spec: KernelSpec, refs: Refs) -> Any:
    """How many sequences the batch has."""
    return jnp.clip(refs.num_seqs[0], 0, spec.max_seqs)


def _candidate_at(spec: KernelSpec, refs: Refs, seq: Any, row: Any) -> tuple[WorkItem, Any, Any]:
    """The work item that begins at a row of a sequence; it may have no rows, or no keys to see.

    Returns:
      the item, whose KV blocks `_with_blocks` counts later; the chunk after the last one that it
      sees; and whether it has the last rows of its sequence.
    """
    start, stop = rows_of(spec, refs, seq)
    kv_len = jnp.clip(refs.kv_lens[seq], 0, MAX_LEN)
    num_keys = jnp.minimum(kv_len, spec.capacity)
    end = jnp.minimum(stop, (row & -ROW_TILE) + spec.block_q)
    position = kv_len - (stop - row)
    key_end = num_keys
    if spec.options.causal:
        key_end = jnp.clip(position + end - row, 0, num_keys)
    first_key = jnp.int32(0)
    if spec.options.has_window:
        first_key = jnp.clip(position - sliding_window(spec, refs) + 1, 0, key_end)
    first_chunk, end_chunk = div(first_key, spec.chunk), ceil_div(key_end, spec.chunk)
    is_decode = stop - start == 1
    item = WorkItem(seq, row, end, position, first_chunk, key_end, None, is_decode)
    if not spec.writes:
        return item, end_chunk, end >= stop
    # The one new token of a decode is inserted into the last KV block, which comes from the pool;
    # those of a prefill stay in VMEM.
    old_end = div(jnp.clip(kv_len - (stop - start), 0, spec.capacity), spec.chunk)
    item = item._replace(old_end=jnp.where(is_decode, MAX_LEN // spec.chunk, old_end))
    return item, end_chunk, end >= stop


def _with_blocks(spec: KernelSpec, item: WorkItem, end_chunk: Any) -> tuple[WorkItem, Any]:
    """The item with its numbers of KV blocks, and the chunk after its last one in the pool."""
    if not spec.writes:
        num_blocks = ceil_div(end_chunk - item.first_chunk, spec.chunks_per_block)
        return item._replace(num_blocks=num_blocks), end_chunk
    end_in_pool = jnp.minimum(end_chunk, item.old_end)
    num_in_pool, first_new_block = end_in_pool, jnp.int32(0)
    if spec.options.has_window:
        num_in_pool = jnp.maximum(end_in_pool - item.first_chunk, 0)
        num_hidden = jnp.maximum(item.first_chunk - item.old_end, 0) * spec.chunk
        first_new_block = div(num_hidden, spec.block_kv)
    num_pool_blocks = ceil_div(num_in_pool, spec.chunks_per_block)
    num_new = ceil_div(jnp.maximum(item.key_end - item.old_end * spec.chunk, 0), spec.block_kv)
    item = item._replace(
        num_blocks=num_pool_blocks + jnp.maximum(num_new - first_new_block, 0),
        num_pool_blocks=num_pool_blocks,
        first_new_block=first_new_block,
    )
    return item, end_in_pool


def first_chunk_of(spec: KernelSpec, seq: Any) -> Any:
    """The first chunk of a sequence, counted over the whole page table."""
    return seq * (spec.table_width * spec.chunks_per_page)


def find_work_item(spec: KernelSpec, refs: Refs) -> tuple[Any, Any, Any]:
    """Finds the next work item that has keys to see, and stores it in SMEM.

    Returns:
      what to fetch: the item's first chunk in the pool and the one after its last, both counted
      over the page table, and, where the call writes, its number of KV blocks. Where no item is
      left there is nothing to fetch.
    """
    state = refs.state
    end_seq = num_seqs(spec, refs)

    def candidate(seq: Any, row: Any) -> tuple[WorkItem, Any, Any]:
        seq_in_bounds = jnp.minimum(seq, spec.max_seqs - 1)
        item, end_chunk, is_last = _candidate_at(spec, refs, seq_in_bounds, row)
        return item._replace(seq=seq), end_chunk, is_last

    def after(item: WorkItem, is_last: Any) -> tuple[Any, Any]:
        """Where the search goes on. A sequence begins where the one before it ends."""
        return jnp.where(is_last, item.seq + 1, item.seq), jnp.maximum(item.row, item.end)

    def is_empty(found: tuple[WorkItem, Any, Any]) -> Any:
        item, end_chunk, _ = found
        has_work = (item.row < item.end) & (item.first_chunk < end_chunk)
        return (item.seq < end_seq) & ~has_work

    def skip(found: tuple[WorkItem, Any, Any]) -> tuple[WorkItem, Any, Any]:
        item, _, is_last = found
        return candidate(*after(item, is_last))

    found = candidate(state.search_seq, state.search_row)
    # KV blocks are counted after the search, so that no trip of its loop pays for them.
    item, end_chunk, is_last = lax.while_loop(is_empty, skip, found)
    is_found = item.seq < end_seq
    item, end_in_pool = _with_blocks(spec, item, end_chunk)
    state.search_seq = item.seq

    @pl.when(is_found)
    def _store() -> None:
        state.search_seq, state.search_row = after(item, is_last)
        at = rem(state.num_found, spec.max_work_items)
        state.num_found = state.num_found + 1
        for i, name in enumerate(kept_fields(spec)):
            refs.work_items[at, i] = jnp.asarray(getattr(item, name), jnp.int32)

    first_chunk = jnp.where(is_found, first_chunk_of(spec, item.seq), 0)
    end_in_pool = jnp.where(is_found, end_in_pool, item.first_chunk)
    num_blocks = jnp.where(is_found, item.num_blocks, 0) if spec.writes else None
    return first_chunk + item.first_chunk, first_chunk + end_in_pool, num_blocks


def load_work_item(spec: KernelSpec, refs: Refs, index: Any) -> WorkItem:
    """The work item that was found as number `index`, without what only `with_new_kv` reads."""
    # Fields are read in their order. Over a set, the order and so the program would differ from
    # process to process.
    fields = _load_fields(spec, refs, index, _OTHER_FIELDS)
    return WorkItem(**fields, **dict.fromkeys(_NEW_KV_FIELDS))


def with_new_kv(spec: KernelSpec, refs: Refs, index: Any, item: WorkItem) -> WorkItem:
    """The item with the fields that say where its new keys are, which only a prefill needs."""
    return item._replace(**_load_fields(spec, refs, index, _NEW_KV_FIELDS)) if spec.writes else item


def _load_fields(spec: KernelSpec, refs: Refs, index: Any, names: Sequence[str]) -> dict[str, Any]:
    at, kept = rem(index, spec.max_work_items), kept_fields(spec)
    return {
        name: refs.work_items[at, kept.index(name)] if name in kept else jnp.int32(0)
        for name in names
    }
