# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""New keys and values: made into slots in VMEM, attended to there, and written to their pages.

The rows of k and v come in with the q tile that they belong to and are stored as slots after the
pipeline stages. The new tokens of a prefill stay there, in order, until its sequence is finished:
they are its last KV blocks, and none of their pages is read. The new token of a decode is inserted
into the decode's last KV block once that has come. Each slot leaves for the pool once. Those of a
prefill leave by whole chunks; a chunk that a later work item fills leaves with that one.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.attention.tpu import page_table
from pallas_paged.attention.tpu.index_math import ceil_div, div, rem
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.spec import NEW_KV_LEAD, ROW_TILE, KernelSpec
from pallas_paged.attention.tpu.token_rows import TokenRows
from pallas_paged.attention.tpu.work_items import WorkItem, load_work_item, rows_of
from pallas_paged.kv_write.tpu.interleave import load_lanes, row_words

# Whole chunks of a prefill that one trip of a loop sends.
CHUNKS_PER_TRIP = 4


def row_of(spec: KernelSpec, token: Any) -> Any:
    """The row of a new token in `Refs.kv_vmem`, by its number.

    A prefill's tokens are counted from the first one of the chunk that its first new token goes to,
    those of a q tile of decodes from the first row of the tile.
    """
    return spec.stage_rows + NEW_KV_LEAD + token


def input_copies(refs: Refs, first: Any, num_rows: Any) -> list[Any]:
    """The copies that bring k and v of a q tile."""
    rows = pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)
    return [
        pltpu.make_async_copy(new.at[rows], vmem.at[pl.ds(0, num_rows)], refs.q_tile_sem.at[0])
        for new, vmem in ((refs.k, refs.k_vmem), (refs.v, refs.v_vmem))
    ]


def wait_sent(spec: KernelSpec, refs: Refs) -> None:
    """Waits until the pool has all tokens that were sent to it."""
    state = refs.state

    @pl.when(state.tokens_in_flight > 0)
    def _wait() -> None:
        rows = pl.ds(0, state.tokens_in_flight * spec.heads.lane_tiles)
        view = refs.kv_vmem.at[rows, pl.ds(0, spec.heads.num_words), 0]
        pltpu.make_async_copy(view, view, refs.sent_sem.at[0]).wait()

    state.tokens_in_flight = 0


# ---- Slots


def _make_row_tile(
    spec: KernelSpec, refs: Refs, tile: Any, row: Any, first_new: Any = None
) -> None:
    """Makes slots of one row tile of the q tile.

    Args:
      spec, refs: the kernel's.
      tile: the number of the row tile in the q tile.
      row: the row of `Refs.kv_vmem` that its first token goes to.
      first_new: tokens of the row tile before this one keep the slots that are there; None if all
        are new.
    """
    new: Any = spec.new_kv
    rows = TokenRows(refs.kv_vmem, spec.is_interpreted)
    tokens = pl.ds(pl.multiple_of(tile * ROW_TILE, ROW_TILE), ROW_TILE)
    load_k, load_v = (
        functools.partial(load_lanes, new, vmem, tokens) for vmem in (refs.k_vmem, refs.v_vmem)
    )

    def scales(which: int, head: int) -> Any:
        return refs.inverse_scales[which * new.num_kv_heads + head]

    words = row_words(new, load_k, load_v, scales if refs.inverse_scales is not None else None)
    token = lax.broadcasted_iota(jnp.int32, (ROW_TILE, 1), 0)
    for w, lane_tiles in enumerate(words):
        for c, word in enumerate(lane_tiles):
            if word is None:  # a row of the pool that no head has
                word = jnp.zeros((ROW_TILE, layout.LANES), jnp.uint32)
            word = lax.bitcast_convert_type(word, refs.kv_vmem.dtype)
            at = row + c * spec.new_kv_rows
            if first_new is not None:
                word = jnp.where(token >= first_new, word, rows.load(at, ROW_TILE, w))
            rows.store(at, w, word)


def _make_rows(spec: KernelSpec, refs: Refs, first: Any, end: Any, origin: Any) -> None:
    """Makes slots of rows `first .. end` of the q tile; its row 0 would go to the row `origin`."""

    @pl.when(first < end)
    def _make_row_tiles() -> None:
        tile = div(first, ROW_TILE)
        # Rows before the first may be another sequence's. Old tokens are where they would go.
        _make_row_tile(spec, refs, tile, origin + tile * ROW_TILE, first - tile * ROW_TILE)
        pl.loop(tile + 1, ceil_div(end, ROW_TILE))(
            lambda i: _make_row_tile(spec, refs, i, origin + i * ROW_TILE)
        )


def make_decodes(spec: KernelSpec, refs: Refs, num_rows: Any) -> None:
    """Makes slots of all rows of a q tile of decodes, also of rows that are no decodes."""
    wait_sent(spec, refs)
    pl.loop(0, div(num_rows, ROW_TILE))(
        lambda i: _make_row_tile(spec, refs, i, row_of(spec, i * ROW_TILE))
    )


# ---- Of a decode


class Insert(NamedTuple):
    """A decode's new token, to be inserted into a KV block.

    Attributes:
      index: the number of the decode's work item.
      source: the token's row in `Refs.kv_vmem`.
      row: its row in the block.
      is_wanted: whether the block is the decode's last one, and the page table has room for the
        token; else nothing is inserted.
    """

    index: Any
    source: Any
    row: Any
    is_wanted: Any


def plan_insert(
    spec: KernelSpec, refs: Refs, index: Any, item: WorkItem, first: Any, is_last: Any
) -> Insert:
    """What `insert` and `send_inserted` do for a KV block of a decode.

    Args:
      spec, refs: the kernel's.
      index, item: the decode's work item, and its number.
      first: position of the block's first key.
      is_last: whether it is the decode's last block.
    """
    source = row_of(spec, item.row - refs.state.q_tile_row)
    row = item.position - first
    return Insert(index, source, row, is_last & (item.position < spec.capacity))


def insert(spec: KernelSpec, refs: Refs, plan: Insert, block_row: Any, lane_tile_rows: Any) -> None:
    """Inserts a decode's new token into its last KV block, all of which has come.

    For other blocks the token is copied to rows that nobody reads, which costs less than a branch.
    `block_row` and `lane_tile_rows` are those of `kv_blocks.BlockRows`.
    """
    unused = row_of(spec, -NEW_KV_LEAD)
    rows = TokenRows(refs.kv_vmem, spec.is_interpreted)
    for c in range(spec.heads.lane_tiles):
        target = block_row + c * lane_tile_rows + plan.row
        target = jnp.where(plan.is_wanted, target, unused + c * spec.new_kv_rows)
        rows.copy_token(target, plan.source + c * spec.new_kv_rows, spec.heads.num_words)


def send_inserted(spec: KernelSpec, refs: Refs, plans: Sequence[Insert]) -> Iterator[None]:
    """Sends the tokens that were inserted to their pages, from which nothing is read any more.

    A generator: each step does a little, so that what stands between two steps hides what the later
    one waits for.
    """
    state = refs.state
    yield
    for plan in plans:
        yield
        item = load_work_item(spec, refs, plan.index)
        page, row = div(item.position, spec.page_size), rem(item.position, spec.page_size)
        if spec.table_part:  # only the entries of what is sent may be read

            @pl.when(plan.is_wanted)
            def _at_once(
                item: Any = item, page: Any = page, row: Any = row, plan: Any = plan
            ) -> None:
                send = _plan_send(spec, refs, item.seq, page, row, plan.source, 1, jnp.bool_(True))
                state.tokens_in_flight = state.tokens_in_flight + _start_send(spec, refs, send)

            continue
        send = _plan_send(spec, refs, item.seq, page, row, plan.source, 1, plan.is_wanted)
        yield
        state.tokens_in_flight = state.tokens_in_flight + _start_send(spec, refs, send)


def finish_sending(steps: Iterable[None]) -> None:
    """Runs the steps that a generator of `send_inserted` has left."""
    for _ in steps:
        pass


# ---- Of a prefill


def _num_old_tokens(spec: KernelSpec, refs: Refs, item: WorkItem) -> Any:
    """The tokens that an item's sequence had before the call."""
    start, _ = rows_of(spec, refs, item.seq)
    return jnp.clip(item.position - (item.row - start), 0, spec.capacity)


def start_old_tokens(spec: KernelSpec, refs: Refs, item: WorkItem) -> Any:
    """Starts to bring the old tokens of the chunk that the first new token of a prefill goes to.

    Returns:
      how many there are: 0 unless the item is the first one of its sequence.
    """
    wait_sent(spec, refs)
    start, _ = rows_of(spec, refs, item.seq)
    first = item.old_end * spec.chunk
    num_tokens = jnp.where(item.row == start, _num_old_tokens(spec, refs, item) - first, 0)

    @pl.when(num_tokens > 0)
    def _start() -> None:
        at = _entry_of(spec, refs, item.seq, div(first, spec.page_size))
        source = page_table.page_row(spec, refs, at) + rem(first, spec.page_size)
        for copy in _old_token_copies(spec, refs, source, num_tokens):
            copy.start()

    return num_tokens


def wait_old_tokens(spec: KernelSpec, refs: Refs, num_tokens: Any) -> None:
    """Waits for the tokens that `start_old_tokens` started to bring."""

    @pl.when(num_tokens > 0)
    def _wait() -> None:
        for copy in _old_token_copies(spec, refs, 0, num_tokens):
            copy.wait()


def _old_token_copies(
    spec: KernelSpec, refs: Refs, pool_row: Any, num_tokens: Any
) -> Iterator[Any]:
    """The copies that bring slots of the pool to the rows before the first new token."""
    row = row_of(spec, 0)
    for c in range(spec.heads.lane_tiles):
        yield pltpu.make_async_copy(
            refs.pool.at[pl.ds(pool_row, num_tokens), :, pl.ds(c * layout.LANES, layout.LANES)],
            refs.kv_vmem.at[
                pl.ds(row + c * spec.new_kv_rows, num_tokens), pl.ds(0, spec.heads.num_words), 0
            ],
            refs.q_tile_sem.at[0],
        )


def make_prefill(spec: KernelSpec, refs: Refs, item: WorkItem) -> None:
    """Makes and sends the new tokens that a work item of a prefill is the first to see.

    These are its own, whose k and v came with the open q tile. Without a causal mask the first work
    item of a sequence sees all new tokens of the sequence.
    """
    start, stop = rows_of(spec, refs, item.seq)
    row_of_position_0 = item.row - item.position
    first_row = jnp.maximum(start, row_of_position_0)
    end_row = jnp.minimum(stop, row_of_position_0 + spec.capacity)

    def make(tile_row: Any, row: Any, end: Any) -> None:
        """Makes slots of rows `row .. end` of the batch; k and v are those from `tile_row` on."""
        first = jnp.maximum(row, first_row) - tile_row
        origin = row_of(spec, tile_row - row_of_position_0 - item.old_end * spec.chunk)
        _make_rows(spec, refs, first, jnp.minimum(end, end_row) - tile_row, origin)

    num_old = _num_old_tokens(spec, refs, item)
    if spec.options.causal:
        make(refs.state.q_tile_row, item.row, item.end)
        first = div(jnp.maximum(item.position, 0), spec.chunk) * spec.chunk
        end = jnp.minimum(item.position + item.end - item.row, spec.capacity)
        end = jnp.where(item.end == stop, end, div(end, spec.chunk) * spec.chunk)
        _send_chunks(spec, refs, item, jnp.maximum(first, num_old), end)
        return

    @pl.when(item.row == start)
    def _all() -> None:
        def make_q_tile(tile_row: Any) -> Any:
            num_rows = jnp.minimum(spec.block_q, spec.num_tokens - tile_row)
            copies = input_copies(refs, tile_row, pl.multiple_of(num_rows, ROW_TILE))
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.wait()
            make(tile_row, jnp.maximum(start, tile_row), tile_row + num_rows)
            return tile_row + num_rows

        lax.while_loop(lambda tile_row: tile_row < end_row, make_q_tile, start & -ROW_TILE)
        _send_chunks(spec, refs, item, num_old, end_row - row_of_position_0)


def _send_chunks(spec: KernelSpec, refs: Refs, item: WorkItem, first: Any, end: Any) -> None:
    """Sends a prefill's tokens from position `first` to `end`, all but the ends by whole chunks."""
    chunk, per_page, state = spec.chunk, spec.page_size // spec.chunk, refs.state
    _, stop = rows_of(spec, refs, item.seq)
    # If the page table has no room for all tokens, the lengths are absurd, and none is written.
    first = jnp.where(item.position + stop - item.row <= spec.capacity, first, end)

    def send(i: Any, row: Any, num_tokens: Any, is_wanted: Any, num_sent: Any) -> Any:
        """Sends tokens of chunk i, from its row `row` on."""
        source = row_of(spec, (i - item.old_end) * chunk + row)
        page, row = div(i, per_page), rem(i, per_page) * chunk + row
        planned = _plan_send(spec, refs, item.seq, page, row, source, num_tokens, is_wanted)
        return num_sent + _start_send(spec, refs, planned)

    first_chunk, end_chunk = div(first, chunk), div(end, chunk)

    def send_whole(i: Any, num_sent: Any) -> Any:
        for j in range(per_trip):
            at = first_chunk + 1 + i * per_trip + j
            num_sent = send(at, 0, chunk, at < end_chunk, num_sent)
        return num_sent

    # The entries of a streamed table that two chunks need may not be in SMEM together.
    per_trip = 1 if spec.table_part else CHUNKS_PER_TRIP
    row = first - first_chunk * chunk
    num_tokens = jnp.minimum(end - first, chunk - row)
    num_sent = send(first_chunk, row, num_tokens, first < end, state.tokens_in_flight)
    num_whole = jnp.maximum(end_chunk - first_chunk - 1, 0)
    num_sent = lax.fori_loop(0, ceil_div(num_whole, per_trip), send_whole, num_sent)
    is_wanted = (end_chunk > first_chunk) & (end_chunk * chunk < end)
    num_sent = send(end_chunk, 0, end - end_chunk * chunk, is_wanted, num_sent)
    state.tokens_in_flight = num_sent


# ---- To the pool


def _entry_of(spec: KernelSpec, refs: Refs, seq: Any, page: Any) -> Any:
    """The number of the table's entry for a page of a sequence; the entry itself is in SMEM."""
    at = seq * spec.table_width + page
    if spec.table_part:
        page_table.bring(spec, refs, at, at)
    return at


class _Send(NamedTuple):
    """Slots to send to the pool."""

    page_id: Any  # the page that they go to
    row: Any  # the row of it that the first one goes to
    source: Any  # the row of the first one in `Refs.kv_vmem`
    num_tokens: Any
    is_sent: Any  # whether they are sent at all


def _plan_send(
    spec: KernelSpec,
    refs: Refs,
    seq: Any,
    page: Any,
    row: Any,
    source: Any,
    num_tokens: Any,
    is_wanted: Any,
) -> _Send:
    """What it takes to send slots to page number `page` of a sequence, from its row `row` on.

    Slots for a page id outside the pool are not sent.
    """
    at = _entry_of(spec, refs, seq, page)
    page_id = page_table.entry(spec, refs, jnp.where(is_wanted, at, 0))
    is_inside = page_id.astype(jnp.uint32) < jnp.uint32(spec.num_pages)
    return _Send(page_id, row, source, num_tokens, is_wanted & is_inside)


def _start_send(spec: KernelSpec, refs: Refs, send: _Send) -> Any:
    """Starts to send slots and returns how many tokens are sent."""

    @pl.when(send.is_sent)
    def _start() -> None:
        target = pl.ds(send.page_id * spec.page_size + send.row, send.num_tokens)
        for c in range(spec.heads.lane_tiles):
            pltpu.make_async_copy(
                refs.kv_vmem.at[
                    pl.ds(send.source + c * spec.new_kv_rows, send.num_tokens),
                    pl.ds(0, spec.heads.num_words),
                    0,
                ],
                refs.pool.at[target, :, pl.ds(c * layout.LANES, layout.LANES)],
                refs.sent_sem.at[0],
            ).start()

    return jnp.where(send.is_sent, send.num_tokens, 0)
