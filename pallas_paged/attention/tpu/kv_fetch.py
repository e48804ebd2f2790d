# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Fetching of KV blocks: the chunks of all work items, in order, stream through pipeline stages.

A *KV block* is the keys that a work item takes at a time, and a *chunk* is what one DMA brings: a
page, or an equal part of one. Each loop iteration takes some blocks that were fetched before and
starts the fetch of as many, which go to the stages that it has freed.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.attention.tpu import page_table
from pallas_paged.attention.tpu.index_math import div, rem
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.spec import KernelSpec
from pallas_paged.attention.tpu.work_items import find_work_item, num_seqs

# The most DMAs of one iteration that are written out one by one, so that the arithmetic hides the
# time to start them. More are started by a loop, before the arithmetic.
_MAX_UNROLL = 512
_MAX_UNROLL_INTERPRETED = 16  # each is a call back to Python, and slow to compile


class Fetch(NamedTuple):
    """A KV block to fetch.

    Attributes:
      stage: the pipeline stage that it goes to.
      first_chunk: its first chunk, counted over the page table.
      num_chunks: how many chunks it has; 0 if there is nothing to fetch.
    """

    stage: Any
    first_chunk: Any
    num_chunks: Any


NO_FETCH = Fetch(*[np.int32(0)] * 3)


class Cursor(NamedTuple):
    """How far fetching has come.

    Attributes:
      num_fetched: KV blocks whose fetch was started since the start of the kernel.
      chunk, end: of the work item that is being fetched, the next chunk and the one after the last.
      blocks: where the call writes, the KV blocks that this item has left.
      is_over: whether this item has nothing left, and another item may follow.
    """

    num_fetched: Any
    chunk: Any
    end: Any
    blocks: Any
    is_over: Any


def _is_over(spec: KernelSpec, refs: Refs, chunk: Any, end: Any, blocks: Any) -> Any:
    is_done = blocks == 0 if spec.writes else chunk >= end
    return is_done & (refs.state.search_seq < num_seqs(spec, refs))


def read_cursor(spec: KernelSpec, refs: Refs) -> Cursor:
    """How far fetching has come, from the kernel's state."""
    state = refs.state
    chunk, end = state.fetch_chunk, state.fetch_end
    blocks = state.fetch_blocks if spec.writes else None
    is_over = _is_over(spec, refs, chunk, end, blocks)
    return Cursor(state.num_fetched, chunk, end, blocks, is_over)


def fill_stages(spec: KernelSpec, refs: Refs) -> None:
    """Starts the first fetches, for all stages but `kv_blocks_per_iteration` of them."""

    @pl.loop(0, spec.num_stages - spec.kv_blocks_per_iteration)
    def _fill(_: Any) -> None:
        issuer(spec, refs, next_fetches(spec, refs, 1), 1)()


def next_fetches(
    spec: KernelSpec, refs: Refs, num_blocks: int, cursor: Cursor | None = None
) -> list[Fetch]:
    """The next KV blocks to fetch.

    A fetch has no chunks where no block is left, and where all keys of a block are in VMEM already.

    Args:
      spec, refs: the kernel's.
      num_blocks: how many blocks.
      cursor: how far fetching has come, if it was read before.
    """
    # A full iteration finds the blocks of each of its decodes apart: then they most often are full
    # blocks of one work item. With a streamed table it does not: the entries that one decode needs
    # may no longer be in SMEM once those of the other have been brought.
    parts = spec.decodes_per_full_iteration if num_blocks > 1 and not spec.table_part else 1
    fetches = []
    for _ in range(parts):
        cursor = cursor or read_cursor(spec, refs)
        fetches += _advance(spec, refs, num_blocks // parts, cursor)
        cursor = None
    return fetches


def _advance(spec: KernelSpec, refs: Refs, num_blocks: int, cursor: Cursor) -> list[Fetch]:
    """The next KV blocks to fetch, found at once where all are full blocks of one work item."""
    state = refs.state
    at = cursor.chunk, cursor.end, cursor.blocks
    if num_blocks == 1:
        starts, counts, is_there, at = _block_by_block(spec, refs, 1, cursor, *at)
    else:
        # A work item may end with an iteration, as long ones of round lengths do. Then the next one
        # is often as long.
        at = lax.cond(cursor.is_over, functools.partial(find_work_item, spec, refs), lambda: at)
        starts, counts, is_there, at = lax.cond(
            at[1] - at[0] >= num_blocks * spec.chunks_per_block,
            functools.partial(_within_item, spec, refs, num_blocks, cursor),
            functools.partial(_block_by_block, spec, refs, num_blocks, cursor),
            *at,
        )
    state.fetch_chunk, state.fetch_end = at[:2]
    if spec.writes:
        state.fetch_blocks = at[2]
    num_fetched = cursor.num_fetched
    fetches = []
    for chunk, count, one in zip(starts, counts, is_there, strict=True):
        fetches.append(Fetch(rem(num_fetched, spec.num_stages), chunk, count))
        num_fetched += one
    state.num_fetched = num_fetched
    return fetches


# What `_advance` finds: of each KV block the first chunk, the number of chunks, and 1 if there is
# such a block, else 0; then chunk, end and blocks of the cursor after them.
_Found = tuple[list[Any], list[Any], list[Any], tuple[Any, Any, Any]]


def _within_item(
    spec: KernelSpec, refs: Refs, num_blocks: int, cursor: Cursor, chunk: Any, end: Any, blocks: Any
) -> _Found:
    """The next KV blocks, all full blocks of the work item that is being fetched."""
    per_block = spec.chunks_per_block
    bring_entries(spec, refs, Fetch(cursor.num_fetched, chunk, num_blocks * per_block))
    starts = [chunk + b * per_block for b in range(num_blocks)]
    counts, is_there = [jnp.int32(per_block)] * num_blocks, [jnp.int32(1)] * num_blocks
    blocks = None if blocks is None else blocks - num_blocks
    return starts, counts, is_there, (chunk + num_blocks * per_block, end, blocks)


def _block_by_block(
    spec: KernelSpec, refs: Refs, num_blocks: int, cursor: Cursor, *at: Any
) -> _Found:
    """The next KV blocks, of which each may be another work item's."""
    starts: list[Any] = []
    counts: list[Any] = []
    is_there: list[Any] = []
    for _ in range(num_blocks):
        is_over = cursor.is_over if num_blocks == 1 else _is_over(spec, refs, *at)
        chunk, end, blocks = lax.cond(
            is_over, functools.partial(find_work_item, spec, refs), lambda at=at: at
        )
        starts.append(chunk)
        counts.append(jnp.clip(end - chunk, 0, spec.chunks_per_block))
        there = blocks if spec.writes else counts[-1]
        is_there.append(jnp.where(there > 0, 1, 0))
        blocks = jnp.maximum(blocks - 1, 0) if spec.writes else None
        at = chunk + counts[-1], end, blocks
        if spec.table_part and num_blocks > 1:
            # Started here, because SMEM may not hold the entries of all these work items at once.
            stage = rem(cursor.num_fetched + sum(is_there[:-1]), spec.num_stages)
            start_block(spec, refs, Fetch(stage, chunk, counts[-1]))
            counts[-1] = jnp.zeros_like(counts[-1])
        else:
            bring_entries(spec, refs, Fetch(cursor.num_fetched, chunk, counts[-1]))
    return starts, counts, is_there, at


def bring_entries(spec: KernelSpec, refs: Refs, fetch: Fetch) -> None:
    """Brings the page table's entries of a fetch into SMEM, if the table is streamed."""
    if not spec.table_part:
        return
    first = div(fetch.first_chunk, spec.chunks_per_page)
    last = div(fetch.first_chunk + fetch.num_chunks - 1, spec.chunks_per_page)
    pl.when(fetch.num_chunks > 0)(lambda: page_table.bring(spec, refs, first, last))


def start_block(spec: KernelSpec, refs: Refs, fetch: Fetch) -> None:
    """Starts the DMAs of a KV block in a loop."""
    bring_entries(spec, refs, fetch)
    pl.loop(0, fetch.num_chunks)(
        lambda i: _start_chunk(spec, refs, fetch, i, _pool_row(spec, refs, fetch, i))
    )


def _pool_row(spec: KernelSpec, refs: Refs, fetch: Fetch, i: Any) -> Any:
    """The pool's row where chunk i of a fetch begins; some row of the pool if it has fewer."""
    chunk = fetch.first_chunk + i
    at, part = div(chunk, spec.chunks_per_page), rem(chunk, spec.chunks_per_page)
    return page_table.page_row(spec, refs, at) + part * spec.chunk


def _start_chunk(spec: KernelSpec, refs: Refs, fetch: Fetch, i: Any, pool_row: Any) -> None:
    """Starts the DMA of chunk i of a fetch."""
    heads, first = spec.heads, fetch.stage * spec.rows_per_stage
    for c in range(heads.lane_tiles):
        row = first + c * spec.block_kv + i * spec.chunk
        pltpu.make_async_copy(
            refs.pool.at[pl.ds(pool_row, spec.chunk), :, pl.ds(c * layout.LANES, layout.LANES)],
            refs.kv_vmem.at[pl.ds(row, spec.chunk), pl.ds(0, heads.num_words), 0],
            refs.stage_sems.at[fetch.stage],
        ).start()


def issuer(
    spec: KernelSpec, refs: Refs, fetches: list[Fetch], num_calls: int
) -> Callable[[], None]:
    """A function that, called `num_calls` times, starts the DMAs of some KV blocks.

    The compiler keeps the order of DMAs and loads. So the arithmetic of an iteration hides the DMAs
    only if they stand among its loads. If they are too many for that, they are started here.
    """
    num_dmas = len(fetches) * spec.chunks_per_block
    if num_dmas > (_MAX_UNROLL_INTERPRETED if spec.is_interpreted else _MAX_UNROLL):
        for fetch in fetches:
            start_block(spec, refs, fetch)
        return lambda: None
    chunks = iter([(fetch, i) for fetch in fetches for i in range(spec.chunks_per_block)])

    def start(fetch: Fetch, i: int, pool_row: Any = None) -> None:
        pool_row = _pool_row(spec, refs, fetch, i) if pool_row is None else pool_row
        _start_chunk(spec, refs, fetch, i, pool_row)

    def issue() -> None:
        for fetch, i in itertools.islice(chunks, pl.cdiv(num_dmas, num_calls)):
            # The entry is read even if there is no such chunk: reading it under the condition would
            # cost a select. An entry of a streamed table is read under the condition, because the
            # part that has it may still be on its way.
            pool_row = None if spec.table_part else _pool_row(spec, refs, fetch, i)
            pl.when(i < fetch.num_chunks)(functools.partial(start, fetch, i, pool_row))

    return issue
