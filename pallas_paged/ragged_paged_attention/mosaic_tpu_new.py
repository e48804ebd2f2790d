# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""New keys and values: made into slots in VMEM, attended to from there, and written to their pages.

The rows of k and v come in with the window of q that they belong to and are turned into slots
behind the ring. Those of a prefill stay there, in order, until its sequence is over: they are its
last blocks of keys, and no page of them is read. The one of a decode is copied into its last block
once that has come in. Each slot leaves for the pool once: a prefill's by whole pages (or the equal
parts of one that are fetched), a page that a later unit fills with that unit.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.kv_write.mosaic_tpu_interleave import load_lanes, row_words
from pallas_paged.ragged_paged_attention import mosaic_tpu_table as table
from pallas_paged.ragged_paged_attention.mosaic_tpu_refs import (
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
from pallas_paged.ragged_paged_attention.mosaic_tpu_units import rows_of


def row_of(walk: Walk, token):
    """Where new token number `token` is, counted from where a sequence's (or window's) begin."""
    return walk.ring_rows + LEAD + token


def loads(walk: Walk, refs: Refs, first, num_rows):
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


def put_decode(walk: Walk, refs: Refs, unit: Unit, first, place):
    """Puts a decode's new token into its last block, and sends it to its page.

    Args:
      unit: the decode.
      first: position of the block's first key.
      place: where the block is; all of it has come, and none of its page is still being read.
    """

    @pl.when(unit.position < walk.capacity)
    def _put():
        source = row_of(walk, unit.row - refs.state[WINDOW])
        words = pl.ds(0, walk.heads.num_words)
        for c in range(walk.heads.lane_tiles):
            target = place.row + c * place.lane_tile_rows + unit.position - first
            refs.slots[target, words, 0, :] = refs.slots[source + c * walk.new_rows, words, 0, :]
        page, row = div(unit.position, walk.page_size), rem(unit.position, walk.page_size)
        num_sent = _send(walk, refs, unit.seq, page, row, source, 1)
        refs.state[SENT] = refs.state[SENT] + num_sent


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
            copies = loads(walk, refs, window, pl.multiple_of(num_rows, ROW_TILE))
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

    def send_piece(i, num_sent):
        a, b = jnp.maximum(first, i * piece), jnp.minimum(end, (i + 1) * piece)
        source = row_of(walk, a - unit.old_end * piece)
        row = rem(i, per_page) * piece + a - i * piece
        page = div(i, per_page)
        return num_sent + _send(walk, refs, unit.seq, page, row, source, b - a)

    num_pieces = jnp.where(first < end, ceil_div(end, piece), 0)
    num_sent = lax.fori_loop(div(first, piece), num_pieces, send_piece, refs.state[SENT])
    refs.state[SENT] = num_sent


# ---- To the pool


def _entry_of(walk, refs, seq, page):
    """Which entry of the table has a page of a sequence; it is in SMEM."""
    at = seq * walk.table_width + page
    if walk.table_part:
        table.bring(walk, refs, at, at)
    return at


def _send(walk, refs, seq, page, row, source, num_tokens):
    """Sends slots to a page of a sequence, from its row `row` on; returns how many: an id outside
    the pool is skipped."""
    page_id = table.entry(walk, refs, _entry_of(walk, refs, seq, page))
    is_inside = page_id.astype(jnp.uint32) < jnp.uint32(walk.num_pages)

    @pl.when(is_inside)
    def _start():
        target = pl.ds(page_id * walk.page_size + row, num_tokens)
        for c in range(walk.heads.lane_tiles):
            pltpu.make_async_copy(
                refs.slots.at[
                    pl.ds(source + c * walk.new_rows, num_tokens),
                    pl.ds(0, walk.heads.num_words), 0,
                ],
                refs.pool.at[target, :, pl.ds(c * layout.LANES, layout.LANES)],
                refs.sent_sem.at[0],
            ).start()

    return jnp.where(is_inside, num_tokens, 0)
