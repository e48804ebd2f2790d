# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Blocks of keys: pages of all units, in order, stream through a ring of buffers.

A *block* is the keys that a unit takes at a time. Blocks are fetched some ahead of the one that is
being computed, a DMA a page (or equal part of one), and waited for by their number of tokens.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.attention.tpu import page_table
from pallas_paged.attention.tpu.new_kv import row_of
from pallas_paged.attention.tpu.refs import (
    AHEAD_BLOCKS,
    AHEAD_END,
    AHEAD_PIECE,
    AHEAD_SEQ,
    FETCHED,
    TAKEN,
    Refs,
    Rows,
    Unit,
    Walk,
    ceil_div,
    div,
    rem,
)
from pallas_paged.attention.tpu.work_items import find_unit, first_piece_of, num_seqs

# DMAs of one body that are written out, so that their issue hides behind the arithmetic; beyond
# them a loop issues first.
_MAX_UNROLL = 512
_MAX_UNROLL_INTERPRETED = 16  # each is a call back to Python, and slow to compile
# Rows that are loaded between two points at which DMAs start. Of 64, 128 and 512 the best: where
# many DMAs stand together, the matrix unit waits for the loads behind them.
_LOAD_ROWS = 128
# Tokens of a block that are read, or not, together: a block is a multiple of it.
_RUN = 128
# Tokens behind the last one that are cleared in one trip of a loop.
_CLEARED = 8


class Fetch(NamedTuple):
    """A block to fetch: its buffer, its first piece in the page table, and how many pieces."""

    buffer: Any
    first_piece: Any
    num_pieces: Any


NO_FETCH = Fetch(*[np.int32(0)] * 3)


class Place(NamedTuple):
    """Where a block is: the row of its first token in its first lane tile, and from that lane
    tile's to the next one's; and where its last run of tokens begins, None if it may be full."""

    row: Any
    lane_tile_rows: Any
    last_run: Any = None


class Ahead(NamedTuple):
    """Where fetching is.

    Attributes:
      fetched: blocks fetched.
      piece, end, blocks: of the unit that is being fetched the next of its pieces in the pool,
        their end, and, where new tokens are written, its blocks that are still to come.
      is_over: whether all of it is fetched, and there may be another unit.
    """

    fetched: Any
    piece: Any
    end: Any
    blocks: Any
    is_over: Any


def _is_over(walk: Walk, refs: Refs, piece, end, blocks):
    is_done = piece >= end if walk.new is None else blocks == 0
    return is_done & (refs.state[AHEAD_SEQ] < num_seqs(walk, refs))


def read_ahead(walk: Walk, refs: Refs) -> Ahead:
    """Where fetching is, from the walk's state."""
    state = refs.state
    piece, end = state[AHEAD_PIECE], state[AHEAD_END]
    blocks = None if walk.new is None else state[AHEAD_BLOCKS]
    is_over = _is_over(walk, refs, piece, end, blocks)
    return Ahead(state[FETCHED], piece, end, blocks, is_over)


def next_fetches(
    walk: Walk, refs: Refs, num_blocks: int, ahead: Ahead | None = None
) -> list[Fetch]:
    """The next blocks to fetch; without pieces where there is none, or all is in VMEM already.

    Args:
      num_blocks: how many.
      ahead: where fetching is, if it has been read.
    """
    # Of each decode of a body of full blocks on its own: so they are all full most times. The
    # entries of a streamed table that one part needs may not be there with another's.
    parts = walk.full_parts if num_blocks > 1 and not walk.table_part else 1
    fetches = []
    for _ in range(parts):
        ahead = ahead or read_ahead(walk, refs)
        fetches += _next_part(walk, refs, num_blocks // parts, ahead)
        ahead = None
    return fetches


def _next_part(walk: Walk, refs: Refs, num_blocks: int, at: Ahead) -> list[Fetch]:
    """The next blocks to fetch, at once where all are full ones of a unit."""
    state, per_block = refs.state, walk.pieces_per_block
    fetched = at.fetched

    def within_unit(piece, end, blocks):
        """All full blocks of the unit that is being fetched."""
        bring_entries(walk, refs, Fetch(fetched, piece, num_blocks * per_block))
        starts = [piece + b * per_block for b in range(num_blocks)]
        counts, is_there = [jnp.int32(per_block)] * num_blocks, [jnp.int32(1)] * num_blocks
        blocks = None if blocks is None else blocks - num_blocks
        return starts, counts, is_there, (piece + num_blocks * per_block, end, blocks)

    def block_by_block(*ahead):
        starts, counts, is_there = [], [], []
        for _ in range(num_blocks):
            is_over = at.is_over if num_blocks == 1 else _is_over(walk, refs, *ahead)
            piece, end, blocks = lax.cond(
                is_over, functools.partial(find_unit, walk, refs), lambda ahead=ahead: ahead
            )
            starts.append(piece)
            counts.append(jnp.clip(end - piece, 0, per_block))
            there = counts[-1] if walk.new is None else blocks
            is_there.append(jnp.where(there > 0, 1, 0))
            blocks = None if walk.new is None else jnp.maximum(blocks - 1, 0)
            ahead = piece + counts[-1], end, blocks
            if walk.table_part and num_blocks > 1:
                # Started here: the entries of several units may not all be in SMEM at a time.
                buffer = rem(fetched + sum(is_there[:-1]), walk.ring)
                start_block(walk, refs, Fetch(buffer, piece, counts[-1]))
                counts[-1] = jnp.zeros_like(counts[-1])
            else:
                bring_entries(walk, refs, Fetch(fetched, piece, counts[-1]))
        return starts, counts, is_there, ahead

    places = (AHEAD_PIECE, AHEAD_END, AHEAD_BLOCKS)
    ahead = at.piece, at.end, at.blocks
    if num_blocks == 1:
        starts, counts, is_there, ahead = block_by_block(*ahead)
    else:
        # Where a unit ends with a body, as long ones of round lengths do, the next is one as well.
        ahead = lax.cond(at.is_over, functools.partial(find_unit, walk, refs), lambda: ahead)
        starts, counts, is_there, ahead = lax.cond(
            ahead[1] - ahead[0] >= num_blocks * per_block, within_unit, block_by_block, *ahead
        )
    for place, value in zip(places, ahead, strict=True):
        if value is not None:
            state[place] = value
    fetches = []
    for piece, count, one in zip(starts, counts, is_there, strict=True):
        fetches.append(Fetch(rem(fetched, walk.ring), piece, count))
        fetched += one
    state[FETCHED] = fetched
    return fetches


def bring_entries(walk: Walk, refs: Refs, fetch: Fetch):
    """Has a fetch's entries of the page table in SMEM, where that is streamed."""
    if not walk.table_part:
        return
    first = div(fetch.first_piece, walk.pieces_per_page)
    last = div(fetch.first_piece + fetch.num_pieces - 1, walk.pieces_per_page)
    pl.when(fetch.num_pieces > 0)(lambda: page_table.bring(walk, refs, first, last))


def _pool_row(walk: Walk, refs: Refs, fetch: Fetch, i):
    """The pool's row where piece i of a block begins; any row where it has no such piece."""
    piece = fetch.first_piece + i
    at, part = div(piece, walk.pieces_per_page), rem(piece, walk.pieces_per_page)
    return page_table.page_row(walk, refs, at) + part * walk.piece


def _start_piece(walk: Walk, refs: Refs, fetch: Fetch, i, pool_row):
    """Starts the DMA of piece i of a block."""
    heads, place = walk.heads, buffer_at(walk, fetch.buffer)
    for c in range(heads.lane_tiles):
        row = place.row + c * place.lane_tile_rows + i * walk.piece
        pltpu.make_async_copy(
            refs.pool.at[pl.ds(pool_row, walk.piece), :, pl.ds(c * layout.LANES, layout.LANES)],
            refs.slots.at[pl.ds(row, walk.piece), pl.ds(0, heads.num_words), 0],
            refs.ring_sems.at[fetch.buffer],
        ).start()


def start_block(walk: Walk, refs: Refs, fetch: Fetch):
    """Starts the DMAs of a block, one by one."""
    bring_entries(walk, refs, fetch)
    pl.loop(0, fetch.num_pieces)(
        lambda i: _start_piece(walk, refs, fetch, i, _pool_row(walk, refs, fetch, i))
    )


def fill_ring(walk: Walk, refs: Refs):
    """Starts the first blocks, so many that a body's are always all on their way."""

    @pl.loop(0, walk.ring - walk.kv_blocks_per_iteration)
    def _fill(_):
        issues(walk, refs, next_fetches(walk, refs, 1), 1)()


def issues(walk: Walk, refs: Refs, fetches: list[Fetch], num_calls: int):
    """A function that, called `num_calls` times, starts the DMAs of some blocks.

    The compiler keeps the order of DMAs and loads, so those that are to hide behind a body's
    arithmetic must stand among its loads. Where they are many, a loop starts all at once.
    """
    num_dmas = len(fetches) * walk.pieces_per_block
    if num_dmas > (_MAX_UNROLL_INTERPRETED if walk.is_interpreted else _MAX_UNROLL):
        for fetch in fetches:
            start_block(walk, refs, fetch)
        return lambda: None
    pieces = iter([(fetch, i) for fetch in fetches for i in range(walk.pieces_per_block)])

    def start(fetch, i, pool_row=None):
        pool_row = _pool_row(walk, refs, fetch, i) if pool_row is None else pool_row
        _start_piece(walk, refs, fetch, i, pool_row)

    def issue():
        for fetch, i in itertools.islice(pieces, pl.cdiv(num_dmas, num_calls)):
            # Read before it is known to be there: under the condition it would cost a select. Of a
            # streamed table it may not be read then: a part may be on its way.
            pool_row = None if walk.table_part else _pool_row(walk, refs, fetch, i)
            pl.when(i < fetch.num_pieces)(functools.partial(start, fetch, i, pool_row))

    return issue


def buffer_at(walk: Walk, buffer) -> Place:
    """Where a buffer of the ring is."""
    return Place(buffer * (walk.heads.lane_tiles * walk.block), walk.block)


def block_of(walk: Walk, unit: Unit, block):
    """(position of a unit's block's first key, of the first that its buffer does not hold), of a
    unit whose keys all come from the pool."""
    first = unit.first_piece + block * walk.pieces_per_block
    end = (first + walk.pieces_per_block) * walk.piece
    return first * walk.piece, jnp.minimum(unit.key_end, end)


def prefill_block_of(walk: Walk, unit: Unit, block):
    """`block_of` of a prefill: with new keys, the blocks from `old_end` on are in VMEM."""
    if walk.new is None:
        return block_of(walk, unit, block)
    is_old = block < unit.num_pool_blocks
    piece = unit.first_piece + block * walk.pieces_per_block
    end = jnp.minimum(piece + walk.pieces_per_block, unit.old_end) * walk.piece
    new = unit.old_end * walk.piece + _new_block(unit, block) * walk.block
    first = jnp.where(is_old, piece * walk.piece, new)
    return first, jnp.minimum(unit.key_end, jnp.where(is_old, end, new + walk.block))


def _new_block(unit: Unit, block):
    """Which of the blocks of new keys a block of a unit is."""
    return unit.first_new + block - unit.num_pool_blocks


def _wait_block(walk: Walk, refs: Refs, buffer, num_tokens):
    """Waits for the tokens of a block in a buffer."""
    heads = walk.heads
    rows = pl.ds(0, num_tokens * heads.lane_tiles)
    view = refs.slots.at[rows, pl.ds(0, heads.num_words), 0]
    pltpu.make_async_copy(view, view, refs.ring_sems.at[buffer]).wait()


def _num_fetched(walk: Walk, first, end):
    """How many tokens of a block are fetched: whole pieces."""
    return ceil_div(end - first, walk.piece) * walk.piece


def take_blocks(walk: Walk, refs: Refs, taken, is_full: bool) -> list[Place]:
    """Waits for the next blocks; returns where they are.

    Args:
      taken: (unit, block) of each, of decodes.
      is_full: whether all are known to be full.
    """
    first = refs.state[TAKEN]
    refs.state[TAKEN] = first + len(taken)
    buffers = [rem(first + b, walk.ring) for b in range(len(taken))]
    for buffer, (unit, block) in zip(buffers, taken, strict=True):
        num_tokens = _num_fetched(walk, *block_of(walk, unit, block))
        _wait_block(walk, refs, buffer, walk.block if is_full else num_tokens)
    return [buffer_at(walk, buffer) for buffer in buffers]


def take_prefill_block(walk: Walk, refs: Refs, unit: Unit, block):
    """Waits for a prefill's next block; returns its buffer."""
    taken = refs.state[TAKEN]
    refs.state[TAKEN] = taken + 1
    buffer = rem(taken, walk.ring)
    num_tokens = _num_fetched(walk, *prefill_block_of(walk, unit, block))
    _when_in_pool(walk, unit, block, lambda: _wait_block(walk, refs, buffer, num_tokens))
    return buffer


def bring_again(walk: Walk, refs: Refs, unit: Unit, block):
    """Brings a block that was taken before, to the buffer behind the ring, which it returns."""
    buffer = jnp.int32(walk.ring)

    def bring():
        first, end = prefill_block_of(walk, unit, block)
        num_pieces = ceil_div(end - first, walk.piece)
        piece = first_piece_of(walk, unit.seq) + div(first, walk.piece)
        start_block(walk, refs, Fetch(buffer, piece, num_pieces))
        _wait_block(walk, refs, buffer, _num_fetched(walk, first, end))

    _when_in_pool(walk, unit, block, bring)
    return buffer


def _when_in_pool(walk: Walk, unit: Unit, block, do):
    """Does it for a block that comes from the pool; new keys are in VMEM."""
    if walk.new is None:
        do()
    else:
        pl.when(block < unit.num_pool_blocks)(do)


def prefill_place(walk: Walk, unit: Unit, block, buffer) -> Place:
    """Where a prefill's block is: in its buffer, or among the new tokens."""
    place = buffer_at(walk, buffer)
    if walk.new is None:
        return place
    new = Place(row_of(walk, _new_block(unit, block) * walk.block), walk.new_rows)
    is_old = block < unit.num_pool_blocks
    return Place(*(jnp.where(is_old, a, b) for a, b in zip(place[:2], new[:2], strict=True)))


def clear_behind(walk: Walk, refs: Refs, place: Place, num_tokens) -> Place:
    """Makes zeros of what lies behind the tokens of a block, which may be anything, and a weight of
    0 would not make 0 of that. Only up to a whole run: instead of runs without tokens, the place
    that is returned has the last one again and again."""
    rows, heads = Rows(refs.slots, walk.is_interpreted), walk.heads
    end = ceil_div(num_tokens, _RUN) * _RUN

    @pl.loop(0, ceil_div(end - num_tokens, _CLEARED))
    def _clear(i):
        for j in range(_CLEARED):
            # The last one again, and no branch.
            token = jnp.minimum(num_tokens + i * _CLEARED + j, end - 1)
            for c in range(heads.lane_tiles):
                rows.clear_token(place.row + c * place.lane_tile_rows + token, heads.num_words)

    return place._replace(last_run=end - _RUN)


def num_points(walk: Walk) -> int:
    """How often `load` has DMAs start while the keys and values of a block are loaded."""
    steps = 1 if walk.heads.compute_dtype == jnp.float32 else 2
    return 2 * walk.heads.num_kv_heads * walk.heads.lane_tiles * steps * len(_runs(walk, steps))


def _runs(walk: Walk, step: int) -> range:
    """Where runs of rows begin that are loaded at a time, of every `step`-th row of a block."""
    return range(0, walk.block, _LOAD_ROWS * step)


def load(
    walk: Walk, refs: Refs, place: Place, issue, word: int, lane_tile: int, parity: int | None
):
    """Words of a block; see operands' `keys`. Calls `issue` behind each run of rows."""
    first, step = (0, 1) if parity is None else (parity, 2)
    row = place.row + lane_tile * place.lane_tile_rows + first
    rows = Rows(refs.slots, walk.is_interpreted)
    runs = []
    for start in _runs(walk, step):
        num_tokens = min(_LOAD_ROWS * step, walk.block - start)
        if place.last_run is None:
            runs.append(rows.load(row + start, num_tokens // step, word, step))
        else:
            for run in range(start, start + num_tokens, _RUN):
                at = row + jnp.minimum(run, place.last_run)
                runs.append(rows.load(at, _RUN // step, word, step))
        issue()
    return lax.bitcast_convert_type(jnp.concatenate(runs, axis=0), jnp.uint32)
