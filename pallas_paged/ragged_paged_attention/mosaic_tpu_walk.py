# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel of the TPU attention: walk the sequences' units, blocks of pages streaming ahead.

A *unit* is the rows of one sequence that are computed together: the row of a decode, or a run of a
prefill's rows. A *window* is a run of rows of the packed batch, whole register tiles, whose q and
output are in VMEM: the rows of one prefill unit, or of decodes in a row. A *block* is the keys that
a unit takes at a time; blocks of all units, in order, stream through a ring of buffers.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.ragged_paged_attention import mosaic_tpu_attend as attend
from pallas_paged.ragged_paged_attention.mosaic_tpu_attend import Score
from pallas_paged.ragged_paged_attention.mosaic_tpu_operands import Heads

# Rows of q and of the output that a DMA's offset and size are multiples of: a bfloat16 tile.
ROW_TILE = 16
# DMAs of one body that are written out, so that their issue hides behind the arithmetic; beyond
# them a loop issues first.
_MAX_UNROLL = 128

# Places in the walk's state, int32 in SMEM.
(
    _AHEAD_SEQ,  # where the search for the next unit goes on: sequence
    _AHEAD_ROW,  # and row
    _AHEAD_TABLE,  # of the unit that is being fetched: its place in the page table,
    _AHEAD_PIECE,  # the next of its pieces,
    _AHEAD_END,  # and their end
    _FETCHED,  # blocks fetched
    _TAKEN,  # and taken since the start
    _FOUND,  # units found since the start
    _WINDOW,  # first row of the open window
    _WINDOW_ROW,  # first row that a unit has in it
    _WINDOW_END,  # where the last unit in it ended
    _WINDOW_KIND,  # _NONE, _DECODES or _PREFILL
    _DONE,  # rows of the output that are written, or on their way
    _PARITY,  # which output buffer the open window leaves through
    _LEAVING,  # rows of the window before it that are on their way
) = range(15)
STATE_SIZE = 15
_NONE, _DECODES, _PREFILL = 0, 1, 2

# Of a unit that is found and not over yet, int32 in SMEM.
UNIT_SIZE = 7
_SEQ, _ROW, _END, _POSITION, _FIRST_PIECE, _KEY_END, _NUM_BLOCKS = range(UNIT_SIZE)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The kernel's static side."""

    heads: Heads
    score: Score
    num_tokens: int  # T, whole row tiles
    max_seqs: int  # S
    table_width: int  # M
    num_pages: int  # P
    page_size: int
    piece: int  # tokens of a page that one DMA brings: a page, or an equal part of it
    block: int  # tokens of a buffer: whole register tiles
    ring: int  # buffers
    blocks_per_body: int  # blocks that a long decode takes at a time
    window: int  # rows of a window
    is_interpreted: bool

    @property
    def pieces_per_block(self) -> int:
        """Pieces that a buffer has room for."""
        return self.block // self.piece

    @property
    def max_units(self) -> int:
        """Units that may have been found and not be over: one a block on its way, and the one
        whose blocks are next."""
        return self.ring + 1


def kernel(walk: Walk, *arguments):
    """Runs every unit of every sequence."""
    heads, score = walk.heads, walk.score
    refs: list = list(arguments)
    # scalar inputs, in SMEM
    # int32[S], [S*M], [S + 1], [1]; float32[1 or 1 + 2K]: sm_scale, then scales of K and of V
    kv_lens_ref, table_ref, cu_q_lens_ref, num_seqs_ref, factors_ref, *refs = refs
    window_ref: Any = None
    sinks_smem: Any = None
    sinks_vmem: Any = None
    if score.has_window:
        window_ref, *refs = refs  # int32[1]
    if score.has_sinks:
        sinks_smem, sinks_vmem, *refs = refs  # float32[N]; float32[rows, 128], lanes equal
    # inputs and outputs, in HBM
    q_hbm, pool_ref, out_hbm, *refs = refs  # [T, N*C], [P*page_size, R or words, C], [T, N*C]
    lse_hbm: Any = None
    lse_vmem: Any = None
    if score.return_lse:
        lse_hbm, *refs = refs  # float32[T, 128s]
    # scratch
    (
        state,  # int32[STATE_SIZE]
        units,  # int32[max_units, UNIT_SIZE]
        ring,  # uint32 or float32 [ring + 1, lane tiles, block, pitch, 1, 128]
        q_vmem,  # q's dtype [window, N*C]
        out_vmem,  # q's dtype [2, window, N*C]: one being computed, one on its way
        q_heads, out_heads,  # float32[lane tiles, window, row pitch, 1, 128]: heads of decodes
        decode_m, decode_l, decode_acc,  # see attend.decode
        prefill_shift, prefill_l, prefill_acc,  # see attend.prefill
        ring_sems, window_sem, out_sems,
        *refs,
    ) = refs
    if score.return_lse:
        (lse_vmem,) = refs  # float32[2, window, 128s], as out_vmem

    pool = pool_ref if pool_ref.dtype.itemsize == 4 else pool_ref.bitcast(jnp.uint32)
    num_seqs = jnp.clip(num_seqs_ref[0], 0, walk.max_seqs)
    window_len = jnp.clip(window_ref[0], 1, 2**30) if score.has_window else None
    lanes = heads.lanes
    sm_scale = factors_ref[0]

    def scales(which, head):
        return factors_ref[1 + which * heads.num_kv_heads + head]

    # --- units: found in order, as their blocks are fetched ---

    def rows_of(seq):
        """The rows of a sequence, inside the batch whatever the metadata says."""
        start = jnp.clip(cu_q_lens_ref[seq], 0, walk.num_tokens)
        return start, jnp.clip(cu_q_lens_ref[seq + 1], start, walk.num_tokens)

    def unit_at(seq, row):
        """(end row, position of the first row, first piece, end of its pieces, of its keys)."""
        _, stop = rows_of(seq)
        kv_len = jnp.clip(kv_lens_ref[seq], 0, walk.table_width * walk.page_size)
        end = jnp.minimum(stop, (row & -ROW_TILE) + walk.window)
        position = kv_len - (stop - row)
        key_end = kv_len
        if score.causal:
            key_end = jnp.clip(position + end - row, 0, kv_len)
        first_key = jnp.int32(0)
        if score.has_window:
            first_key = jnp.clip(position - window_len + 1, 0, key_end)
        return end, position, first_key // walk.piece, pl.cdiv(key_end, walk.piece), key_end

    def after(seq, end):
        """Where the search goes on behind a unit: (sequence, row)."""
        following = jnp.minimum(seq + 1, walk.max_seqs - 1)
        is_over = end >= rows_of(seq)[1]
        return jnp.where(is_over, seq + 1, seq), jnp.where(is_over, rows_of(following)[0], end)

    def find_unit():
        """Finds the next unit that has keys to see; returns what to fetch: its place in the page
        table, its first piece and their end."""

        def candidate(seq, row):
            return seq, row, *unit_at(jnp.minimum(seq, walk.max_seqs - 1), row)

        def is_empty(found):
            seq, row, end, _, first_piece, end_piece, _ = found
            return (seq < num_seqs) & ((row >= end) | (first_piece >= end_piece))

        def skip(found):
            seq, row, end, *_ = found
            return candidate(*after(seq, jnp.maximum(row, end)))

        found = candidate(state[_AHEAD_SEQ], state[_AHEAD_ROW])
        found = lax.while_loop(is_empty, skip, found)
        seq, row, end, position, first_piece, end_piece, key_end = found
        state[_AHEAD_SEQ] = seq

        @pl.when(seq < num_seqs)
        def _found():
            state[_AHEAD_SEQ], state[_AHEAD_ROW] = after(seq, end)
            at = lax.rem(state[_FOUND], walk.max_units)
            state[_FOUND] = state[_FOUND] + 1
            num_blocks = pl.cdiv(end_piece - first_piece, walk.pieces_per_block)
            record = (seq, row, end, position, first_piece, key_end, num_blocks)
            for i, value in enumerate(record):
                units[at, i] = value

        is_found = seq < num_seqs
        return seq * walk.table_width, first_piece, jnp.where(is_found, end_piece, first_piece)

    # --- blocks: fetched ahead, taken in order ---

    def next_fetches(num_blocks):
        """The next blocks to fetch: (buffer, place in the page table, first piece, pieces) of each;
        the last is 0 where there is none."""
        per_block = walk.pieces_per_block
        fetched = state[_FETCHED]

        def within_unit(table, first, end):
            """All full blocks of the unit that is being fetched."""
            counts = [jnp.int32(per_block)] * num_blocks
            starts = [(table, first + b * per_block) for b in range(num_blocks)]
            return starts, counts, (table, first + num_blocks * per_block, end)

        def block_by_block(*ahead):
            starts, counts = [], []
            for _ in range(num_blocks):
                is_over = (ahead[1] >= ahead[2]) & (state[_AHEAD_SEQ] < num_seqs)
                table, first, end = lax.cond(is_over, find_unit, lambda ahead=ahead: ahead)
                starts.append((table, first))
                counts.append(jnp.clip(end - first, 0, per_block))
                ahead = table, first + counts[-1], end
            return starts, counts, ahead

        ahead = state[_AHEAD_TABLE], state[_AHEAD_PIECE], state[_AHEAD_END]
        if num_blocks == 1:
            starts, counts, ahead = block_by_block(*ahead)
        else:
            starts, counts, ahead = lax.cond(
                ahead[2] - ahead[1] >= num_blocks * per_block, within_unit, block_by_block, *ahead
            )
        state[_AHEAD_TABLE], state[_AHEAD_PIECE], state[_AHEAD_END] = ahead
        fetches = []
        for start, count in zip(starts, counts, strict=True):
            fetches.append((lax.rem(fetched, walk.ring), *start, count))
            fetched += jnp.where(count > 0, 1, 0)
        state[_FETCHED] = fetched
        return fetches

    def start_piece(fetch, i):
        """Starts the DMA of piece i of a block."""
        slot, table, first, _ = fetch
        pieces_per_page = walk.page_size // walk.piece
        page, part = first + i, 0
        if pieces_per_page > 1:
            page, part = (first + i) // pieces_per_page, (first + i) % pieces_per_page
        # Inside the pool whatever the table says: as an unsigned number, no id is negative.
        page_id = table_ref[table + page].astype(jnp.uint32)
        page_id = jnp.minimum(page_id, jnp.uint32(walk.num_pages - 1)).astype(jnp.int32)
        source = pl.ds(page_id * walk.page_size + part * walk.piece, walk.piece)
        for c in range(heads.lane_tiles):
            pltpu.make_async_copy(
                pool.at[source, :, pl.ds(c * layout.LANES, layout.LANES)],
                ring.at[slot, c, pl.ds(i * walk.piece, walk.piece), pl.ds(0, heads.num_words), 0],
                ring_sems.at[slot],
            ).start()

    def issues(fetches, num_points):
        """A function that, called `num_points` times, starts the DMAs of some blocks.

        The compiler keeps the order of DMAs and loads, so those that are to hide behind a body's
        arithmetic must stand among its loads. Where they are many, a loop starts all at once.
        """
        num_dmas = len(fetches) * walk.pieces_per_block
        if num_dmas > _MAX_UNROLL:
            for fetch in fetches:
                pl.loop(0, fetch[3])(lambda i, fetch=fetch: start_piece(fetch, i))
            return lambda: None
        pieces = iter([(fetch, i) for fetch in fetches for i in range(walk.pieces_per_block)])

        def issue():
            for fetch, i in itertools.islice(pieces, pl.cdiv(num_dmas, num_points)):
                pl.when(i < fetch[3])(functools.partial(start_piece, fetch, i))

        return issue

    def block_of(unit, block):
        """(position of a unit's block's first key, of the first that its buffer does not hold)."""
        first = unit[_FIRST_PIECE] + block * walk.pieces_per_block
        end = (first + walk.pieces_per_block) * walk.piece
        return first * walk.piece, jnp.minimum(unit[_KEY_END], end)

    def wait_block(slot, num_tokens):
        """Waits for the tokens of a block in a buffer."""
        view = ring.at[
            slot, pl.ds(0, heads.lane_tiles), pl.ds(0, num_tokens), pl.ds(0, heads.num_words), 0
        ]
        pltpu.make_async_copy(view, view, ring_sems.at[slot]).wait()

    def num_tokens_of(unit, block):
        """How many tokens of a unit's block are fetched: whole pieces."""
        first, end = block_of(unit, block)
        return pl.cdiv(end - first, walk.piece) * walk.piece

    def take_blocks(unit, block, num_blocks):
        """Waits for a unit's next blocks, several only if all are full; returns their buffers."""
        taken = state[_TAKEN]
        state[_TAKEN] = taken + num_blocks
        slots = [lax.rem(taken + b, walk.ring) for b in range(num_blocks)]
        for slot in slots:
            is_any = num_blocks == 1
            wait_block(
                slot,
                num_tokens_of(unit, block) if is_any else walk.pieces_per_block * walk.piece,
            )
        return slots

    def take_again(unit, block):
        """Brings a block that was taken before, to the buffer behind the ring."""
        first, end = block_of(unit, block)
        table = unit[_SEQ] * walk.table_width
        fetch = jnp.int32(walk.ring), table, first // walk.piece, None
        pl.loop(0, pl.cdiv(end - first, walk.piece))(lambda i: start_piece(fetch, i))
        wait_block(walk.ring, num_tokens_of(unit, block))
        return jnp.int32(walk.ring)

    def load(slot, word, lane_tile, parity):
        """Words of the block in a buffer; see attend's `keys`."""
        first, step = (0, 1) if parity is None else (parity, 2)
        if walk.is_interpreted:  # it cannot reshape a ref
            words = ring[slot, lane_tile, :, word, 0, :][first::step]
        else:
            flat = ring.reshape(-1, layout.LANES)
            start = ((slot * heads.lane_tiles + lane_tile) * walk.block + first) * heads.pitch
            words = flat[pl.ds(start + word, walk.block // step, stride=step * heads.pitch), :]
        return lax.bitcast_convert_type(words, jnp.uint32)

    # --- windows ---

    def leaves(parity, first, num_rows):
        """The copies that take a window's output away."""
        num_rows = pl.multiple_of(num_rows, ROW_TILE)
        rows = pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)
        yield pltpu.make_async_copy(
            out_vmem.at[parity, pl.ds(0, num_rows)], out_hbm.at[rows], out_sems.at[0]
        )
        if score.return_lse:
            yield pltpu.make_async_copy(
                lse_vmem.at[parity, pl.ds(0, num_rows)], lse_hbm.at[rows], out_sems.at[1]
            )

    def wait_leaving():
        @pl.when(state[_LEAVING] > 0)
        def _wait():
            for copy in leaves(0, 0, state[_LEAVING]):
                copy.wait()

        state[_LEAVING] = 0

    def send(parity, first, num_rows):
        """Sends rows of a buffer to the output, behind what was sent before: tiles may overlap."""
        wait_leaving()
        for copy in leaves(parity, first, num_rows):
            copy.start()
        state[_LEAVING] = num_rows
        state[_DONE] = jnp.maximum(state[_DONE], first + num_rows)

    def clear(parity, num_rows):
        out_vmem[parity, :num_rows] = jnp.zeros((num_rows, out_vmem.shape[2]), out_vmem.dtype)
        if score.return_lse:
            lse_vmem[parity] = jnp.full(lse_vmem.shape[1:], -jnp.inf, jnp.float32)

    def zero_until(row):
        """Fills the output's rows that no unit has, up to a row tile, from the free buffer."""

        @pl.when(state[_DONE] < row)
        def _zero():
            parity = state[_PARITY]
            clear(parity, walk.window)

            def send_some(first):
                num_rows = jnp.minimum(row - first, walk.window)
                send(parity, first, num_rows)
                return first + num_rows

            lax.while_loop(lambda first: first < row, send_some, state[_DONE])
            state[_PARITY] = 1 - parity

    def gather_decodes(parity):
        """Moves the decodes' rows from heads in rows to a row of the output each."""
        first_row = state[_WINDOW_ROW] - state[_WINDOW]

        @pl.loop(0, pl.cdiv(state[_WINDOW_END] - state[_WINDOW], ROW_TILE))
        def _tile(i):
            tile = pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)
            row = i * ROW_TILE + lax.broadcasted_iota(jnp.int32, (ROW_TILE, 1), 0)
            for n in range(heads.num_heads):
                for c in range(heads.lane_tiles):
                    lane = n * lanes + c * layout.LANES
                    at = slice(lane, lane + layout.LANES)
                    new = head_rows(out_heads, n, c, i).load().astype(out_vmem.dtype)
                    out_vmem[parity, tile, at] = jnp.where(
                        row >= first_row, new, out_vmem[parity, tile, at]
                    )

    def head_rows(ref, n, c, i):
        return HeadRows(ref, n, c, i, attend.row_pitch(heads.num_heads), walk.is_interpreted)

    def close_window():
        @pl.when(state[_WINDOW_KIND] != _NONE)
        def _close():
            parity, first = state[_PARITY], state[_WINDOW]
            pl.when(state[_WINDOW_KIND] == _DECODES)(lambda: gather_decodes(parity))
            num_rows = ((state[_WINDOW_END] + ROW_TILE - 1) & -ROW_TILE) - first
            send(parity, first, num_rows)
            state[_PARITY] = 1 - parity
            state[_WINDOW_KIND] = _NONE

    def open_window(row, kind):
        """Closes the open window and opens the one whose first row tile has `row`."""
        close_window()
        first = row & -ROW_TILE
        num_rows = pl.multiple_of(jnp.minimum(walk.window, walk.num_tokens - first), ROW_TILE)
        load = pltpu.make_async_copy(
            q_hbm.at[pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)],
            q_vmem.at[pl.ds(0, num_rows)],
            window_sem.at[0],
        )
        load.start()
        # The last window may end in the tile where this one begins: its rows go out once more.
        is_shared = state[_DONE] > first
        before = jnp.clip(first - state[_WINDOW], 0, walk.window - ROW_TILE) & -ROW_TILE
        tile = pl.ds(pl.multiple_of(before, ROW_TILE), ROW_TILE)
        zero_until(first)
        parity = state[_PARITY]
        clear(parity, walk.window if kind == _PREFILL else ROW_TILE)

        @pl.when(is_shared)
        def _keep():
            out_vmem[parity, :ROW_TILE] = out_vmem[1 - parity, tile]
            if score.return_lse:
                lse_vmem[parity, :ROW_TILE] = lse_vmem[1 - parity, tile]

        state[_WINDOW] = first
        state[_WINDOW_ROW] = row
        state[_WINDOW_KIND] = kind
        load.wait()
        if kind == _DECODES:
            if walk.is_interpreted:  # it cannot reshape a ref
                out_heads[...] = jnp.zeros_like(out_heads)
            else:
                flat = out_heads.reshape(-1, layout.LANES)
                flat[...] = jnp.zeros(flat.shape, jnp.float32)

            @pl.loop(0, num_rows // ROW_TILE)
            def _tile(i):
                tile = pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)
                for n in range(heads.num_heads):
                    for c in range(heads.lane_tiles):
                        lane = n * lanes + c * layout.LANES
                        q = q_vmem[tile, lane : lane + layout.LANES].astype(jnp.float32)
                        head_rows(q_heads, n, c, i).store(q)

    # --- bodies ---

    def open_decode(row):
        is_inside = (row >= state[_WINDOW]) & (row < state[_WINDOW] + walk.window)

        @pl.when(jnp.logical_not(is_inside) | (state[_WINDOW_KIND] != _DECODES))
        def _open():
            open_window(row, _DECODES)

    def decode(unit, block, num_blocks, *, is_full):
        """Takes some blocks of a decode; its result so far goes to its row."""
        pl.when(block == 0)(lambda: open_decode(unit[_ROW]))
        place = unit[_ROW] - state[_WINDOW]
        fetches = next_fetches(num_blocks)
        slots = take_blocks(unit, block, num_blocks)
        lse = attend.decode(
            heads, score, sinks_vmem, scales, window_len, sm_scale,
            q=lambda row, c: q_heads[c, place, row : row + 8, 0, :],
            loads=[functools.partial(load, slot) for slot in slots],
            spans=[block_of(unit, block + b) for b in range(num_blocks)],
            position=unit[_POSITION],
            num_keys=walk.block,
            is_full=is_full,
            issue=issues(fetches, 2 * heads.num_kv_heads * num_blocks),
            is_first=block == 0,
            store=functools.partial(store_decode, place),
            m_ref=decode_m, l_ref=decode_l, acc_ref=decode_acc,
        )
        if score.return_lse:
            parity = state[_PARITY]
            registers = pl.ds(pl.multiple_of(place & -8, 8), 8)
            is_row = lax.broadcasted_iota(jnp.int32, (8, 1), 0) == place % 8
            row = attend.as_row(lse, lse_vmem.shape[2])
            lse_vmem[parity, registers] = jnp.where(is_row, row, lse_vmem[parity, registers])
        return block + num_blocks

    def store_decode(place, row, c, x):
        out_heads[c, place, row : row + 8, 0, :] = x

    prefill_refs = {"shift_ref": prefill_shift, "l_ref": prefill_l, "acc_ref": prefill_acc}

    def prefill(unit, block, is_again):
        """Takes one block of a prefill unit; returns whether the unit must start again."""
        first, end = block_of(unit, block)

        @pl.when((block == 0) & jnp.logical_not(is_again))
        def _start():
            open_window(unit[_ROW], _PREFILL)
            attend.start_prefill(**prefill_refs)

        def from_ring():
            fetches = next_fetches(1)
            return take_blocks(unit, block, 1)[0], fetches[0]

        def from_pool():
            nothing = (jnp.int32(0),) * 4
            return take_again(unit, block), nothing

        slot, fetch = lax.cond(is_again, from_pool, from_ring)
        # Some key is later than some query, or too early for it, or the block is not full.
        is_edge = end < first + walk.block
        if score.causal:
            is_edge |= end - 1 > unit[_POSITION]
        if score.has_window:
            is_edge |= first <= unit[_POSITION] + unit[_END] - unit[_ROW] - 1 - window_len

        def take(is_masked):
            attend.prefill(
                heads, score, q_vmem, functools.partial(load, slot), scales, window_len, sm_scale,
                is_masked=is_masked, issue=issues([fetch], 2 * heads.num_kv_heads),
                first_position=unit[_POSITION] - (unit[_ROW] - state[_WINDOW]),
                first=first, end=end, num_keys=walk.block, **prefill_refs,
            )

        lax.cond(is_edge, lambda: take(True), lambda: take(False))
        is_last = block + 1 == unit[_NUM_BLOCKS]
        must_repeat = is_last & jnp.logical_not(is_again)
        must_repeat = lax.cond(
            must_repeat, lambda: jnp.logical_not(is_sound(unit)), lambda: jnp.bool_(False)
        )
        pl.when(is_last & jnp.logical_not(must_repeat))(
            lambda: finish_prefill(unit, **prefill_refs)
        )
        pl.when(must_repeat)(lambda: find_shifts(unit))
        return must_repeat

    def is_sound(unit):
        """Whether the weights of every row of a unit that sees a key were in range."""
        row = lax.broadcasted_iota(jnp.int32, (1, prefill_l.shape[2]), 1)
        window_row = state[_WINDOW] + lax.rem(row, walk.window)
        counts = (window_row >= unit[_ROW]) & (window_row < unit[_END])
        if score.causal:
            counts &= unit[_POSITION] + window_row - unit[_ROW] >= 0
        return attend.is_sound(heads, counts, prefill_l, prefill_acc)

    def find_shifts(unit):
        """A round over a unit's blocks for the largest score of each row, as its shift."""
        prefill_shift[...] = jnp.full_like(prefill_shift, -jnp.inf)

        @pl.loop(0, unit[_NUM_BLOCKS])
        def _find(block):
            first, end = block_of(unit, block)
            attend.find_shifts(
                heads, score, q_vmem, functools.partial(load, take_again(unit, block)), scales,
                window_len, sm_scale,
                first_position=unit[_POSITION] - (unit[_ROW] - state[_WINDOW]),
                first=first, end=end, num_keys=walk.block, shift_ref=prefill_shift,
            )

        attend.start_again(**prefill_refs)

    def finish_prefill(unit, **refs):
        parity = state[_PARITY]
        window_row = state[_WINDOW] + lax.broadcasted_iota(jnp.int32, (walk.window, 1), 0)
        is_row = (window_row >= unit[_ROW]) & (window_row < unit[_END])
        lse_columns = []
        for head in range(heads.num_kv_heads):
            out, lse = attend.finish_prefill(
                heads, score, head, lambda n: sinks_smem[n], scales, **refs
            )
            for g in range(heads.group):
                n = head * heads.group + g
                at = slice(n * lanes, (n + 1) * lanes)
                rows = slice(g * walk.window, (g + 1) * walk.window)
                out_vmem[parity, :, at] = jnp.where(
                    is_row, out[rows].astype(out_vmem.dtype), out_vmem[parity, :, at]
                )
                lse_columns.append(lse[:, rows])
        if score.return_lse:
            missing = lse_vmem.shape[2] - heads.num_heads
            lse_columns.append(jnp.zeros((missing, walk.window), jnp.float32))
            columns = jnp.concatenate(lse_columns, axis=0).T  # [window, lanes]
            lse_vmem[parity] = jnp.where(is_row, columns, lse_vmem[parity])

    # --- the walk ---

    for i in range(STATE_SIZE):
        state[i] = 0
    state[_AHEAD_ROW] = rows_of(0)[0]

    @pl.loop(0, walk.ring - walk.blocks_per_body)
    def _fill_ring(_):
        (fetch,) = next_fetches(1)
        pl.loop(0, fetch[3])(lambda i: start_piece(fetch, i))

    def run(at):
        index, block, is_again = at
        record = lax.rem(index, walk.max_units)
        unit = tuple(units[record, i] for i in range(UNIT_SIZE))
        start, stop = rows_of(unit[_SEQ])
        is_decode = stop - start == 1
        many = walk.blocks_per_body

        def run_decode():
            if many == 1:
                return decode(unit, block, 1, is_full=False)
            # A body of many blocks takes none that is not full.
            _, end = block_of(unit, block + many - 1)
            first, _ = block_of(unit, block)
            is_long = end - first == many * walk.pieces_per_block * walk.piece
            is_full = walk.pieces_per_block * walk.piece == walk.block and not score.has_window
            return lax.cond(
                is_long,
                lambda: decode(unit, block, many, is_full=is_full),
                lambda: decode(unit, block, 1, is_full=False),
            )

        def run_prefill():
            must_repeat = prefill(unit, block, is_again)
            return jnp.where(must_repeat, 0, block + 1), must_repeat

        done, must_repeat = lax.cond(
            is_decode, lambda: (run_decode(), jnp.bool_(False)), run_prefill
        )
        state[_WINDOW_END] = unit[_END]
        is_over = done == unit[_NUM_BLOCKS]
        return (
            jnp.where(is_over, index + 1, index),
            jnp.where(is_over, 0, done),
            must_repeat | (is_again & jnp.logical_not(is_over)),
        )

    zero = jnp.int32(0)
    lax.while_loop(
        lambda at: (state[_TAKEN] < state[_FETCHED]) | at[2], run, (zero, zero, jnp.bool_(False))
    )
    close_window()
    zero_until(walk.num_tokens)
    wait_leaving()


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """One lane tile of one head of a row tile's tokens, in a ref [lane tiles, rows, pitch, 1, 128].

    The pitch is odd, so that the stride from token to token meets all memory banks.
    """

    ref: Any
    head: int
    lane_tile: int
    tile: Any  # which row tile
    pitch: int
    is_interpreted: bool

    def load(self):
        """float32[ROW_TILE, 128]."""
        if self.is_interpreted:  # it cannot reshape a ref
            return self.ref[self._rows]
        return self._flat[self._strided, :]

    def store(self, x):
        """Takes float32[ROW_TILE, 128]."""
        if self.is_interpreted:
            self.ref[self._rows] = x
        else:
            self._flat[self._strided, :] = x

    @property
    def _rows(self):
        return self.lane_tile, pl.ds(self.tile * ROW_TILE, ROW_TILE), self.head, 0

    @property
    def _flat(self):
        return self.ref.reshape(-1, layout.LANES)

    @property
    def _strided(self):
        row = self.lane_tile * self.ref.shape[1] + self.tile * ROW_TILE
        return pl.ds(row * self.pitch + self.head, ROW_TILE, stride=self.pitch)
