# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""New keys and values: made into slots in VMEM, attended to from there, and written to their pages.

The rows of k and v come in with the window of q that they belong to and are turned into slots
behind the ring. Those of a prefill stay there, in order, until its sequence is over: they are its
last blocks of keys, and no page of them is read. The one of a decode is copied into its last block
once that has come in. Each slot leaves for the pool once: a prefill's by whole pages (or the equal
parts of one that are fetched), a page that a later unit fills with that unit.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.attention.tpu import page_table as table
from pallas_paged.attention.tpu.refs import (
    LEAD,
    ROW_TILE,
    SENT,
    WINDOW,
    Refs,
    Rows,
    Unit,
    Walk,
    ceil_div,
    div,
    rem,
)
from pallas_paged.attention.tpu.work_items import kept_unit, rows_of
from pallas_paged.kv_write.tpu.interleave import load_lanes, row_words

# Whole pieces of a prefill that are sent in one trip of a loop.
_PIECES_TOGETHER = 4


def row_of(walk: Walk, token):
    """Where new token number `token` is, counted from where a sequence's (or window's) begin."""
    return walk.ring_rows + LEAD + token


def loads(refs: Refs, first, num_rows):
    """The copies that bring a window's k and v."""
    rows = pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)
    return [
        pltpu.make_async_copy(new.at[rows], vmem.at[pl.ds(0, num_rows)], refs.window_sem.at[0])
        for new, vmem in ((refs.k, refs.k_vmem), (refs.v, refs.v_vmem))
    ]


def wait_sent(walk: Walk, refs: Refs):
    """Waits until the pool has what was sent to it."""

    @pl.when(refs.state[SENT] > 0)
    def _wait():
        rows = pl.ds(0, refs.state[SENT] * walk.heads.lane_tiles)
        view = refs.slots.at[rows, pl.ds(0, walk.heads.num_words), 0]
        pltpu.make_async_copy(view, view, refs.sent_sem.at[0]).wait()

    refs.state[SENT] = 0


# ---- Slots


def _make_tile(walk: Walk, refs: Refs, tile, row, num_kept=None):
    """Makes slots of a row tile of the window, at `row` of its own; the first `num_kept` stay."""
    new: Any = walk.new
    rows = Rows(refs.slots, walk.is_interpreted)
    tokens = pl.ds(pl.multiple_of(tile * ROW_TILE, ROW_TILE), ROW_TILE)
    load_k, load_v = (
        functools.partial(load_lanes, new, vmem, tokens) for vmem in (refs.k_vmem, refs.v_vmem)
    )

    def scales(which, head):
        return refs.inverse_scales[which * new.num_kv_heads + head]

    words = row_words(new, load_k, load_v, scales if refs.inverse_scales is not None else None)
    token = lax.broadcasted_iota(jnp.int32, (ROW_TILE, 1), 0)
    for w, lane_tiles in enumerate(words):
        for c, word in enumerate(lane_tiles):
            if word is None:  # padding rows of the pool
                word = jnp.zeros((ROW_TILE, layout.LANES), jnp.uint32)
            word = lax.bitcast_convert_type(word, refs.slots.dtype)
            at = row + c * walk.new_rows
            if num_kept is not None:
                word = jnp.where(token >= num_kept, word, rows.load(at, ROW_TILE, w))
            rows.store(at, w, word)


def _make(walk: Walk, refs: Refs, first, end, row):
    """Makes slots of the window's rows from `first` to `end`; `row` is where its row 0 would be."""

    @pl.when(first < end)
    def _make_tiles():
        tile = div(first, ROW_TILE)
        # Rows before the first may be another sequence's; where they go, old tokens are.
        _make_tile(walk, refs, tile, row + tile * ROW_TILE, first - tile * ROW_TILE)
        pl.loop(tile + 1, ceil_div(end, ROW_TILE))(
            lambda i: _make_tile(walk, refs, i, row + i * ROW_TILE)
        )


def make_of_decodes(walk: Walk, refs: Refs, num_rows):
    """Makes slots of all rows of a window of decodes, those of others among them."""
    wait_sent(walk, refs)
    pl.loop(0, div(num_rows, ROW_TILE))(
        lambda i: _make_tile(walk, refs, i, row_of(walk, i * ROW_TILE))
    )


# ---- A decode


class Put(NamedTuple):
    """A decode's new token: from where it is put into which row of its last block."""

    index: Any
    source: Any
    row: Any
    is_put: Any


def plan_put(walk: Walk, refs: Refs, index, unit: Unit, first, is_last) -> Put:
    """What `put` and `send_puts` do for a block of a decode: nothing unless it is the last one.

    Args:
      index, unit: the decode's number, and it.
      first: position of the block's first key.
      is_last: whether it is the decode's last block.
    """
    source = row_of(walk, unit.row - refs.state[WINDOW])
    return Put(index, source, unit.position - first, is_last & (unit.position < walk.capacity))


def put(walk: Walk, refs: Refs, plan: Put, place):
    """Puts a decode's new token into its last block, at `place`; all of it has come.

    Other blocks' go where nobody looks: a copy costs a body less than a branch around it.
    """
    spare = row_of(walk, -LEAD)
    rows = Rows(refs.slots, walk.is_interpreted)
    for c in range(walk.heads.lane_tiles):
        target = place.row + c * place.lane_tile_rows + plan.row
        target = jnp.where(plan.is_put, target, spare + c * walk.new_rows)
        rows.copy_token(target, plan.source + c * walk.new_rows, walk.heads.num_words)


def send_puts(walk: Walk, refs: Refs, plans: Sequence[Put]):
    """A generator that sends the tokens that were put to their pages, of which nothing is still
    being read: a little at a step, for what stands between two steps to hide what it waits for."""
    yield
    for plan in plans:
        yield
        unit = kept_unit(walk, refs, plan.index)
        place = unit.seq, div(unit.position, walk.page_size), rem(unit.position, walk.page_size)
        if walk.table_part:  # of which only what is wanted may be read

            @pl.when(plan.is_put)
            def _at_once(place=place, plan=plan):
                send = _plan_send(walk, refs, *place, plan.source, 1, jnp.bool_(True))
                refs.state[SENT] = refs.state[SENT] + _start(walk, refs, send)

            continue
        send = _plan_send(walk, refs, *place, plan.source, 1, plan.is_put)
        yield
        refs.state[SENT] = refs.state[SENT] + _start(walk, refs, send)


# ---- A prefill


def _old_end(walk: Walk, refs: Refs, unit: Unit):
    """How many tokens of a unit's sequence were there before."""
    start, _ = rows_of(walk, refs, unit.seq)
    return jnp.clip(unit.position - (unit.row - start), 0, walk.capacity)


def start_old_tail(walk: Walk, refs: Refs, unit: Unit):
    """Starts to bring the old tokens of the page that the first new one goes to, before it."""
    wait_sent(walk, refs)
    start, _ = rows_of(walk, refs, unit.seq)
    first = unit.old_end * walk.piece
    num_tokens = jnp.where(unit.row == start, _old_end(walk, refs, unit) - first, 0)

    @pl.when(num_tokens > 0)
    def _start():
        at = _entry_of(walk, refs, unit.seq, div(first, walk.page_size))
        source = table.page_row(walk, refs, at) + rem(first, walk.page_size)
        for copy in _copies_of_slots(walk, refs, source, row_of(walk, 0), num_tokens):
            copy.start()

    return num_tokens


def wait_old_tail(walk: Walk, refs: Refs, num_tokens):
    """Waits for what `start_old_tail` started."""

    @pl.when(num_tokens > 0)
    def _wait():
        for copy in _copies_of_slots(walk, refs, 0, row_of(walk, 0), num_tokens):
            copy.wait()


def _copies_of_slots(walk, refs, pool_row, row, num_tokens):
    """The copies that bring slots of the pool to where new tokens are."""
    for c in range(walk.heads.lane_tiles):
        yield pltpu.make_async_copy(
            refs.pool.at[pl.ds(pool_row, num_tokens), :, pl.ds(c * layout.LANES, layout.LANES)],
            refs.slots.at[
                pl.ds(row + c * walk.new_rows, num_tokens), pl.ds(0, walk.heads.num_words), 0
            ],
            refs.window_sem.at[0],
        )


def make_of_prefill(walk: Walk, refs: Refs, unit: Unit):
    """Makes and sends the new tokens that a prefill's unit is the first to see.

    These are its own, of which the open window has k and v; without a causal mask the first unit
    sees the whole sequence's.
    """
    start, stop = rows_of(walk, refs, unit.seq)
    row_of_position_0 = unit.row - unit.position
    first_row = jnp.maximum(start, row_of_position_0)
    end_row = jnp.minimum(stop, row_of_position_0 + walk.capacity)

    def make(window, row, end):
        first = jnp.maximum(row, first_row) - window
        origin = row_of(walk, window - row_of_position_0 - unit.old_end * walk.piece)
        _make(walk, refs, first, jnp.minimum(end, end_row) - window, origin)

    old_end = _old_end(walk, refs, unit)
    if walk.score.causal:
        make(refs.state[WINDOW], unit.row, unit.end)
        first = div(jnp.maximum(unit.position, 0), walk.piece) * walk.piece
        end = jnp.minimum(unit.position + unit.end - unit.row, walk.capacity)
        end = jnp.where(unit.end == stop, end, div(end, walk.piece) * walk.piece)
        _send_pages(walk, refs, unit, jnp.maximum(first, old_end), end)
        return

    @pl.when(unit.row == start)
    def _all():
        def make_window(window):
            num_rows = jnp.minimum(walk.window, walk.num_tokens - window)
            copies = loads(refs, window, pl.multiple_of(num_rows, ROW_TILE))
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.wait()
            make(window, jnp.maximum(start, window), window + num_rows)
            return window + num_rows

        lax.while_loop(lambda window: window < end_row, make_window, start & -ROW_TILE)
        _send_pages(walk, refs, unit, old_end, end_row - row_of_position_0)


def _send_pages(walk: Walk, refs: Refs, unit: Unit, first, end):
    """Sends a prefill's tokens from position `first` to `end`, whole pieces but for the ends."""
    piece, per_page = walk.piece, walk.page_size // walk.piece
    _, stop = rows_of(walk, refs, unit.seq)
    # More tokens than the page table has room for are absurd: none is written.
    first = jnp.where(unit.position + stop - unit.row <= walk.capacity, first, end)

    def send(i, row, num_tokens, is_wanted, num_sent):
        """Sends tokens of piece i, from its row `row` on."""
        source = row_of(walk, (i - unit.old_end) * piece + row)
        page, row = div(i, per_page), rem(i, per_page) * piece + row
        planned = _plan_send(walk, refs, unit.seq, page, row, source, num_tokens, is_wanted)
        return num_sent + _start(walk, refs, planned)

    first_piece, end_piece = div(first, piece), div(end, piece)

    def send_whole(i, num_sent):
        for j in range(together):
            at = first_piece + 1 + i * together + j
            num_sent = send(at, 0, piece, at < end_piece, num_sent)
        return num_sent

    # Those of a streamed table may not be there together.
    together = 1 if walk.table_part else _PIECES_TOGETHER
    row = first - first_piece * piece
    num_tokens = jnp.minimum(end - first, piece - row)
    num_sent = send(first_piece, row, num_tokens, first < end, refs.state[SENT])
    num_whole = jnp.maximum(end_piece - first_piece - 1, 0)
    num_sent = lax.fori_loop(0, ceil_div(num_whole, together), send_whole, num_sent)
    is_wanted = (end_piece > first_piece) & (end_piece * piece < end)
    refs.state[SENT] = send(end_piece, 0, end - end_piece * piece, is_wanted, num_sent)


# ---- To the pool


def _entry_of(walk, refs, seq, page):
    """Which entry of the table has a page of a sequence; it is in SMEM."""
    at = seq * walk.table_width + page
    if walk.table_part:
        table.bring(walk, refs, at, at)
    return at


class _Send(NamedTuple):
    """Slots to send: to which page's row, from where, how many, and whether they are sent."""

    page_id: Any
    row: Any
    source: Any
    num_tokens: Any
    is_sent: Any


def _plan_send(walk, refs, seq, page, row, source, num_tokens, is_wanted) -> _Send:
    """What it takes to send slots to a page of a sequence, from its row `row` on; an id outside the
    pool is skipped."""
    at = _entry_of(walk, refs, seq, page)
    page_id = table.entry(walk, refs, jnp.where(is_wanted, at, 0))
    is_inside = page_id.astype(jnp.uint32) < jnp.uint32(walk.num_pages)
    return _Send(page_id, row, source, num_tokens, is_wanted & is_inside)


def _start(walk, refs, send: _Send):
    """Starts to send; returns how many tokens."""

    @pl.when(send.is_sent)
    def _dma():
        target = pl.ds(send.page_id * walk.page_size + send.row, send.num_tokens)
        for c in range(walk.heads.lane_tiles):
            pltpu.make_async_copy(
                refs.slots.at[
                    pl.ds(send.source + c * walk.new_rows, send.num_tokens),
                    pl.ds(0, walk.heads.num_words),
                    0,
                ],
                refs.pool.at[target, :, pl.ds(c * layout.LANES, layout.LANES)],
                refs.sent_sem.at[0],
            ).start()

    return jnp.where(send.is_sent, send.num_tokens, 0)
