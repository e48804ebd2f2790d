# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel of the TPU attention: walk the sequences' units, blocks of pages streaming ahead.

A *unit* is the rows of one sequence that are computed together: the row of a decode, or a run of a
prefill's rows. A *window* is a run of rows of the packed batch, whole register tiles, whose q and
output are in VMEM: the rows of one prefill unit, or of decodes in a row. A *block* is the keys that
a unit takes at a time; blocks of all units, in order, stream through a ring of buffers.
"""

import dataclasses

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

# Places in the walk's state, int32 in SMEM.
(
    _AHEAD_SEQ,  # the unit whose blocks are being fetched: sequence,
    _AHEAD_ROW,  # first row,
    _AHEAD_BLOCK,  # and the next of its blocks
    _FETCHED,  # blocks fetched,
    _TAKEN,  # and taken, since the start
    _WINDOW,  # first row of the open window
    _WINDOW_END,  # where the last unit in it ended
    _WINDOW_KIND,  # _NONE, _DECODES or _PREFILL
    _DONE,  # rows of the output that are written, or on their way
    _PARITY,  # which output buffer the open window leaves through
    _LEAVING,  # rows of the window before it that are on their way
) = range(11)
STATE_SIZE = 11
_NONE, _DECODES, _PREFILL = 0, 1, 2


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
    window: int  # rows of a window
    return_lse: bool
    is_interpreted: bool

    @property
    def pieces_per_block(self) -> int:
        """Pieces that a buffer has room for."""
        return self.block // self.piece


def kernel(walk: Walk, *refs):
    """Runs every unit of every sequence."""
    heads, score = walk.heads, walk.score
    # scalar inputs, in SMEM
    # int32[S], [S*M], [S + 1], [1]; float32[1 or 1 + 2K]: sm_scale, then scales of K and of V
    kv_lens_ref, table_ref, cu_q_lens_ref, num_seqs_ref, factors_ref, *refs = refs
    window_ref = sinks_smem = sinks_vmem = None
    if score.has_window:
        window_ref, *refs = refs  # int32[1]
    if score.has_sinks:
        sinks_smem, sinks_vmem, *refs = refs  # float32[N]; float32[rows, 128], lanes equal
    # inputs and outputs, in HBM
    q_hbm, pool_ref, out_hbm, *refs = refs  # [T, N*C], [P*page_size, R or words, C], [T, N*C]
    lse_hbm = lse_vmem = None
    if walk.return_lse:
        lse_hbm, *refs = refs  # float32[T, 128s]
    # scratch
    (
        state,  # int32[STATE_SIZE]
        ring,  # uint32 or float32 [ring, lane tiles, block, pitch, 1, 128]
        q_vmem,  # q's dtype [window, N*C]
        out_vmem,  # q's dtype [2, window, N*C]: on its way out
        out_rows,  # float32[window, N*C]: being computed
        q_heads,  # float32[rows, C]: the heads of one decode
        out_heads,  # float32[rows, C]
        decode_m, decode_l, decode_acc,
        prefill_m, prefill_l, prefill_acc,
        ring_sems, window_sem, out_sems,
        *refs,
    ) = refs
    if walk.return_lse:
        (lse_vmem,) = refs  # float32[3, window, 128s]: two on their way out, one being computed

    pool = pool_ref if pool_ref.dtype.itemsize == 4 else pool_ref.bitcast(jnp.uint32)
    num_seqs = jnp.clip(num_seqs_ref[0], 0, walk.max_seqs)
    window_len = jnp.clip(window_ref[0], 1, 2**30) if score.has_window else None
    lanes = heads.lanes

    sm_scale = factors_ref[0]

    def scales(which, head):
        return factors_ref[1 + which * heads.num_kv_heads + head]

    # --- units ---

    def rows_of(seq):
        """The rows of a sequence, inside the batch whatever the metadata says."""
        start = jnp.clip(cu_q_lens_ref[seq], 0, walk.num_tokens)
        return start, jnp.clip(cu_q_lens_ref[seq + 1], start, walk.num_tokens)

    def unit(seq, row):
        """(end row, is decode, position of the first row, first piece, end of keys, blocks)."""
        start, stop = rows_of(seq)
        kv_len = jnp.clip(kv_lens_ref[seq], 0, walk.table_width * walk.page_size)
        is_decode = stop - start == 1
        end = jnp.minimum(stop, (row & -ROW_TILE) + walk.window)
        position = kv_len - (stop - row)
        key_end = kv_len
        if score.causal:
            key_end = jnp.clip(position + end - row, 0, kv_len)
        first_key = jnp.int32(0)
        if score.has_window:
            first_key = jnp.clip(position - window_len + 1, 0, key_end)
        first_piece = first_key // walk.piece
        num_pieces = pl.cdiv(key_end, walk.piece) - first_piece
        num_blocks = pl.cdiv(num_pieces, walk.pieces_per_block)
        return end, is_decode, position, first_piece, key_end, num_blocks

    def first_unit_from(seq, row):
        """The first unit that has keys to see, from a row of a sequence on; past all: num_seqs."""

        def has_none(state):
            seq, row = state
            at = jnp.minimum(seq, walk.max_seqs - 1)
            _, stop = rows_of(at)
            return (seq < num_seqs) & ((row >= stop) | (unit(at, row)[-1] == 0))

        def step(state):
            seq, row = state
            _, stop = rows_of(seq)
            following = jnp.minimum(seq + 1, walk.max_seqs - 1)
            is_over = row >= stop
            end = unit(seq, row)[0]
            return (
                jnp.where(is_over, seq + 1, seq),
                jnp.where(is_over, rows_of(following)[0], end),
            )

        return lax.while_loop(has_none, step, (seq, row))

    def next_unit(seq, row):
        return first_unit_from(seq, unit(seq, row)[0])

    # --- blocks: fetched ahead, taken in order ---

    def pieces_in(seq, row, block):
        """(first piece, how many) of a unit's block."""
        _, _, _, first_piece, key_end, _ = unit(seq, row)
        first = first_piece + block * walk.pieces_per_block
        last = jnp.minimum(pl.cdiv(key_end, walk.piece), first + walk.pieces_per_block)
        return first, last - first

    def fetch_block():
        """Sets the next block on its way."""
        seq, row, block = state[_AHEAD_SEQ], state[_AHEAD_ROW], state[_AHEAD_BLOCK]
        slot = lax.rem(state[_FETCHED], walk.ring)
        first, count = pieces_in(seq, row, block)
        pieces_per_page = walk.page_size // walk.piece

        def fetch_piece(i, _):
            piece = first + i
            page = table_ref[seq * walk.table_width + piece // pieces_per_page]
            page = jnp.clip(page, 0, walk.num_pages - 1)
            source = page * walk.page_size + piece % pieces_per_page * walk.piece
            for c in range(heads.lane_tiles):
                pltpu.make_async_copy(
                    pool.at[pl.ds(source, walk.piece), :, pl.ds(c * layout.LANES, layout.LANES)],
                    ring.at[
                        slot, c, pl.ds(i * walk.piece, walk.piece), pl.ds(0, heads.num_words), 0
                    ],
                    ring_sems.at[slot],
                ).start()
            return _

        lax.fori_loop(0, count, fetch_piece, 0)
        is_last = block + 1 == unit(seq, row)[-1]

        @pl.when(is_last)
        def _next_unit():
            state[_AHEAD_SEQ], state[_AHEAD_ROW] = next_unit(seq, row)
            state[_AHEAD_BLOCK] = 0

        @pl.when(jnp.logical_not(is_last))
        def _next_block():
            state[_AHEAD_BLOCK] = block + 1

        state[_FETCHED] = state[_FETCHED] + 1

    def fetch_ahead():
        """Fills the ring."""

        def has_room():
            is_free = state[_FETCHED] - state[_TAKEN] < walk.ring
            return is_free & (state[_AHEAD_SEQ] < num_seqs)

        def fetch(_):
            fetch_block()
            return has_room()

        lax.while_loop(lambda is_room: is_room, fetch, has_room())

    def take_block(seq, row, block):
        """Waits for a unit's block; returns how to load its words."""
        slot = lax.rem(state[_TAKEN], walk.ring)
        _, count = pieces_in(seq, row, block)
        view = ring.at[
            slot, pl.ds(0, heads.lane_tiles), pl.ds(0, count * walk.piece),
            pl.ds(0, heads.num_words), 0,
        ]
        pltpu.make_async_copy(view, view, ring_sems.at[slot]).wait()

        def load(word, lane_tile, parity):
            first, step = (0, 1) if parity is None else (parity, 2)
            if walk.is_interpreted:  # it cannot reshape a ref
                words = ring[slot, lane_tile, :, word, 0, :][first::step]
            else:
                flat = ring.reshape(-1, layout.LANES)
                start = ((slot * heads.lane_tiles + lane_tile) * walk.block + first) * heads.pitch
                words = flat[
                    pl.ds(start + word, walk.block // step, stride=step * heads.pitch), :
                ]
            return lax.bitcast_convert_type(words, jnp.uint32)

        return load

    def keys_in(block, first_piece, key_end):
        """(position of a block's first key, of the first that its buffer does not hold)."""
        first = (first_piece + block * walk.pieces_per_block) * walk.piece
        return first, jnp.minimum(key_end, first + walk.pieces_per_block * walk.piece)

    def release_block():
        state[_TAKEN] = state[_TAKEN] + 1
        fetch_ahead()

    # --- windows ---

    def copy_window(first, num_rows):
        num_rows = pl.multiple_of(num_rows, ROW_TILE)
        rows = pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)
        return pltpu.make_async_copy(
            q_hbm.at[rows], q_vmem.at[pl.ds(0, num_rows)], window_sem.at[0]
        )

    def leaves(parity, first, num_rows):
        """The copies that take a window's output away."""
        num_rows = pl.multiple_of(num_rows, ROW_TILE)
        rows = pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)
        yield pltpu.make_async_copy(
            out_vmem.at[parity, pl.ds(0, num_rows)], out_hbm.at[rows], out_sems.at[0]
        )
        if walk.return_lse:
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

    def close_window():
        @pl.when(state[_WINDOW_KIND] != _NONE)
        def _close():
            parity, first = state[_PARITY], state[_WINDOW]
            out_vmem[parity] = out_rows[...].astype(out_vmem.dtype)
            if walk.return_lse:
                lse_vmem[parity] = lse_vmem[2]
            num_rows = ((state[_WINDOW_END] + ROW_TILE - 1) & -ROW_TILE) - first
            send(parity, first, num_rows)
            state[_PARITY] = 1 - parity
            state[_WINDOW_KIND] = _NONE

    def clear_rows():
        out_rows[...] = jnp.zeros_like(out_rows)
        if walk.return_lse:
            lse_vmem[2] = jnp.full(lse_vmem.shape[1:], -jnp.inf, jnp.float32)

    def zero_until(row):
        """Fills the output's rows that no unit has, up to a row tile."""

        @pl.when(state[_DONE] < row)
        def _zero():
            parity = state[_PARITY]
            clear_rows()
            out_vmem[parity] = jnp.zeros(out_vmem.shape[1:], out_vmem.dtype)
            if walk.return_lse:
                lse_vmem[parity] = lse_vmem[2]

            def send_some(first):
                num_rows = jnp.minimum(row - first, walk.window)
                send(parity, first, num_rows)
                return first + num_rows

            lax.while_loop(lambda first: first < row, send_some, state[_DONE])
            state[_PARITY] = 1 - parity

    def open_window(row, kind):
        """Closes the open window and loads the one whose first row tile has `row`."""
        close_window()
        first = row & -ROW_TILE
        num_rows = jnp.minimum(walk.window, walk.num_tokens - first)
        load = copy_window(first, num_rows)
        load.start()

        # The last window may end in the tile where this one begins.
        is_shared = state[_DONE] > first
        before = jnp.clip(first - state[_WINDOW], 0, walk.window - ROW_TILE)
        tile = pl.ds(pl.multiple_of(before & -ROW_TILE, ROW_TILE), ROW_TILE)
        kept = out_rows[tile]
        kept_lse = lse_vmem[2, tile] if walk.return_lse else None
        zero_until(first)
        clear_rows()

        @pl.when(is_shared)
        def _keep():
            out_rows[:ROW_TILE] = kept
            if walk.return_lse:
                lse_vmem[2, :ROW_TILE] = kept_lse

        state[_WINDOW] = first
        state[_WINDOW_KIND] = kind
        load.wait()

    # --- the two kinds of units ---

    def run_decode(seq, row, position, first_piece, key_end, num_blocks):
        is_inside = (row >= state[_WINDOW]) & (row < state[_WINDOW] + walk.window)

        @pl.when(jnp.logical_not(is_inside) | (state[_WINDOW_KIND] != _DECODES))
        def _open():
            open_window(row, _DECODES)

        place = row - state[_WINDOW]
        tile = pl.ds(pl.multiple_of(place & -ROW_TILE, ROW_TILE), ROW_TILE)
        is_row = lax.broadcasted_iota(jnp.int32, (ROW_TILE, 1), 0) == place % ROW_TILE
        for n in range(heads.num_heads):
            q = q_vmem[tile, n * lanes : (n + 1) * lanes].astype(jnp.float32)
            q_heads[n : n + 1] = jnp.sum(jnp.where(is_row, q, 0.0), axis=0, keepdims=True)
        refs = {"m_ref": decode_m, "l_ref": decode_l, "acc_ref": decode_acc}
        attend.start_decode(**refs)

        def take(block, _):
            first, end = keys_in(block, first_piece, key_end)
            attend.decode(
                heads, score, q_heads, take_block(seq, row, block), scales, window_len,
                sm_scale, position=position, first=first, end=end, num_keys=walk.block, **refs,
            )
            release_block()
            return _

        lax.fori_loop(0, num_blocks, take, 0)
        out, lse = attend.finish_decode(heads, score, sinks_vmem, scales, **refs)
        out_heads[...] = out
        # A row at a dynamic place: into its register of 8 rows, by a select.
        registers = pl.ds(pl.multiple_of(place & -8, 8), 8)
        is_row = lax.broadcasted_iota(jnp.int32, (8, 1), 0) == place % 8
        for n in range(heads.num_heads):
            at = slice(n * lanes, (n + 1) * lanes)
            row_n = out_heads[n : n + 1]
            out_rows[registers, at] = jnp.where(is_row, row_n, out_rows[registers, at])
        if walk.return_lse:
            lse_row = attend.as_row(lse, lse_vmem.shape[2])
            lse_vmem[2, registers] = jnp.where(is_row, lse_row, lse_vmem[2, registers])

    def run_prefill(seq, row, end, position, first_piece, key_end, num_blocks):
        open_window(row, _PREFILL)
        first_row = state[_WINDOW]
        refs = {"m_ref": prefill_m, "l_ref": prefill_l, "acc_ref": prefill_acc}
        attend.start_prefill(**refs)

        def take(block, _):
            first, stop = keys_in(block, first_piece, key_end)
            attend.prefill(
                heads, score, q_vmem, take_block(seq, row, block), scales, window_len,
                sm_scale, first_position=position - (row - first_row), first=first, end=stop,
                num_keys=walk.block, **refs,
            )
            release_block()
            return _

        lax.fori_loop(0, num_blocks, take, 0)
        window_row = first_row + lax.broadcasted_iota(jnp.int32, (walk.window, 1), 0)
        is_row = (window_row >= row) & (window_row < end)
        lse_columns = []
        for head in range(heads.num_kv_heads):
            out, lse = attend.finish_prefill(
                heads, score, head, lambda n: sinks_smem[n], scales, **refs
            )
            for g in range(heads.group):
                n = head * heads.group + g
                at = slice(n * lanes, (n + 1) * lanes)
                rows = slice(g * walk.window, (g + 1) * walk.window)
                out_rows[:, at] = jnp.where(is_row, out[rows], out_rows[:, at])
                lse_columns.append(lse[:, rows])
        if walk.return_lse:
            num_lanes = lse_vmem.shape[2]
            missing = num_lanes - heads.num_heads
            lse_columns.append(jnp.zeros((missing, walk.window), jnp.float32))
            columns = jnp.concatenate(lse_columns, axis=0).T  # [window, lanes]
            lse_vmem[2] = jnp.where(is_row, columns, lse_vmem[2])

    # --- the walk ---

    for i in range(STATE_SIZE):
        state[i] = 0
    out_rows[...] = jnp.zeros_like(out_rows)
    start = first_unit_from(jnp.int32(0), rows_of(0)[0])
    state[_AHEAD_SEQ], state[_AHEAD_ROW] = start
    fetch_ahead()

    def run(at):
        seq, row = at
        end, is_decode, position, first_piece, key_end, num_blocks = unit(seq, row)

        @pl.when(is_decode)
        def _decode():
            run_decode(seq, row, position, first_piece, key_end, num_blocks)

        @pl.when(jnp.logical_not(is_decode))
        def _prefill():
            run_prefill(seq, row, end, position, first_piece, key_end, num_blocks)

        state[_WINDOW_END] = end
        return next_unit(seq, row)

    lax.while_loop(lambda at: at[0] < num_seqs, run, start)
    close_window()
    zero_until(walk.num_tokens)
    wait_leaving()
