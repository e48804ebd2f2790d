# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Windows of rows: q comes in, the output goes out, whole register tiles of the packed batch.

A *window* is a run of rows whose q and output are in VMEM: the rows of one prefill unit, or of
decodes in a row. Neighbours may share a tile: the later one takes over its rows and sends them
again, behind the earlier one's copy.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.attention.tpu import new_kv as new
from pallas_paged.attention.tpu.refs import (
    DECODES,
    DONE,
    LEAVING,
    NO_WINDOW,
    PARITY,
    PREFILL,
    ROW_TILE,
    WINDOW,
    WINDOW_END,
    WINDOW_KIND,
    WINDOW_ROW,
    Refs,
    Rows,
    Walk,
    ceil_div,
    div,
)


def open_decode(walk: Walk, refs: Refs, row):
    """Has a window of decodes open that holds a row."""
    state = refs.state
    is_inside = (row >= state[WINDOW]) & (row < state[WINDOW] + walk.window)

    @pl.when(jnp.logical_not(is_inside) | (state[WINDOW_KIND] != DECODES))
    def _open():
        num_rows = open_window(walk, refs, row, DECODES)
        _scatter_decodes(walk, refs, num_rows)
        if walk.new is not None:
            new.make_of_decodes(walk, refs, num_rows)


def open_window(walk: Walk, refs: Refs, row, kind: int):
    """Closes the open window and opens the one whose first row tile has `row`; its rows."""
    state = refs.state
    close_window(walk, refs)
    first = row & -ROW_TILE
    num_rows = pl.multiple_of(jnp.minimum(walk.window, walk.num_tokens - first), ROW_TILE)
    loads = [
        pltpu.make_async_copy(
            refs.q.at[pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)],
            refs.q_vmem.at[pl.ds(0, num_rows)],
            refs.window_sem.at[0],
        )
    ]
    if walk.new is not None:
        loads += new.loads(refs, first, num_rows)
    for load in loads:
        load.start()
    # The last window may end in the tile where this one begins: its rows go out once more.
    is_shared = state[DONE] > first
    before = jnp.clip(first - state[WINDOW], 0, walk.window - ROW_TILE) & -ROW_TILE
    tile = pl.ds(pl.multiple_of(before, ROW_TILE), ROW_TILE)
    zero_until(walk, refs, first)
    parity = state[PARITY]
    _clear(walk, refs, parity, walk.window if kind == PREFILL else ROW_TILE)

    @pl.when(is_shared)
    def _keep():
        refs.out_vmem[parity, :ROW_TILE] = refs.out_vmem[1 - parity, tile]
        if walk.score.return_lse:
            refs.lse_vmem[parity, :ROW_TILE] = refs.lse_vmem[1 - parity, tile]

    state[WINDOW] = first
    state[WINDOW_ROW] = row
    state[WINDOW_KIND] = kind
    for load in loads:
        load.wait()
    return num_rows


def close_window(walk: Walk, refs: Refs):
    """Sends the open window's output on its way, if there is one."""
    state = refs.state

    @pl.when(state[WINDOW_KIND] != NO_WINDOW)
    def _close():
        parity, first = state[PARITY], state[WINDOW]
        pl.when(state[WINDOW_KIND] == DECODES)(lambda: _gather_decodes(walk, refs, parity))
        num_rows = ((state[WINDOW_END] + ROW_TILE - 1) & -ROW_TILE) - first
        _send(walk, refs, parity, first, num_rows)
        state[PARITY] = 1 - parity
        state[WINDOW_KIND] = NO_WINDOW


def zero_until(walk: Walk, refs: Refs, row):
    """Fills the output's rows that no unit has, up to a row tile, from the free buffer."""
    state = refs.state

    @pl.when(state[DONE] < row)
    def _zero():
        parity = state[PARITY]
        _clear(walk, refs, parity, walk.window)

        def send_some(first):
            num_rows = jnp.minimum(row - first, walk.window)
            _send(walk, refs, parity, first, num_rows)
            return first + num_rows

        lax.while_loop(lambda first: first < row, send_some, state[DONE])
        state[PARITY] = 1 - parity


def wait_leaving(walk: Walk, refs: Refs):
    """Waits for the output that is on its way."""
    state = refs.state

    @pl.when(state[LEAVING] > 0)
    def _wait():
        for copy in _leaves(walk, refs, 0, 0, state[LEAVING]):
            copy.wait()

    state[LEAVING] = 0


def _leaves(walk, refs, parity, first, num_rows):
    """The copies that take a window's output away."""
    num_rows = pl.multiple_of(num_rows, ROW_TILE)
    rows = pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)
    yield pltpu.make_async_copy(
        refs.out_vmem.at[parity, pl.ds(0, num_rows)], refs.out.at[rows], refs.out_sems.at[0]
    )
    if walk.score.return_lse:
        yield pltpu.make_async_copy(
            refs.lse_vmem.at[parity, pl.ds(0, num_rows)], refs.lse.at[rows], refs.out_sems.at[1]
        )


def _send(walk, refs, parity, first, num_rows):
    """Sends rows of a buffer to the output, behind what was sent before: tiles may overlap."""
    state = refs.state
    wait_leaving(walk, refs)
    for copy in _leaves(walk, refs, parity, first, num_rows):
        copy.start()
    state[LEAVING] = num_rows
    state[DONE] = jnp.maximum(state[DONE], first + num_rows)


def _clear(walk, refs, parity, num_rows):
    out = refs.out_vmem
    out[parity, :num_rows] = jnp.zeros((num_rows, out.shape[2]), out.dtype)
    if walk.score.return_lse:
        refs.lse_vmem[parity] = jnp.full(refs.lse_vmem.shape[1:], -jnp.inf, jnp.float32)


def _head_lanes(heads):
    """(head, its lane tile, that tile's lanes in a row of q) of all heads."""
    for n in range(heads.num_heads):
        for c in range(heads.lane_tiles):
            lane = n * heads.lanes + c * layout.LANES
            yield n, c, slice(lane, lane + layout.LANES)


def _scatter_decodes(walk, refs, num_rows):
    """Moves the window's rows of q to heads in rows, and empties the output's."""
    if walk.is_interpreted:  # it cannot reshape a ref
        refs.out_heads[...] = jnp.zeros_like(refs.out_heads)
    else:
        flat = refs.out_heads.reshape(-1, layout.LANES)
        flat[...] = jnp.zeros(flat.shape, jnp.float32)
    q_heads = Rows(refs.q_heads, walk.is_interpreted)

    @pl.loop(0, div(num_rows, ROW_TILE))
    def _tile(i):
        tile = pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)
        for n, c, lanes in _head_lanes(walk.heads):
            q = refs.q_vmem[tile, lanes].astype(jnp.float32)
            q_heads.store(c * walk.window + i * ROW_TILE, n, q)


def _gather_decodes(walk, refs, parity):
    """Moves the decodes' rows from heads in rows to a row of the output each."""
    state, out = refs.state, refs.out_vmem
    first_row = state[WINDOW_ROW] - state[WINDOW]
    out_heads = Rows(refs.out_heads, walk.is_interpreted)

    @pl.loop(0, ceil_div(state[WINDOW_END] - state[WINDOW], ROW_TILE))
    def _tile(i):
        tile = pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)
        row = i * ROW_TILE + lax.broadcasted_iota(jnp.int32, (ROW_TILE, 1), 0)
        for n, c, lanes in _head_lanes(walk.heads):
            attended = out_heads.load(c * walk.window + i * ROW_TILE, ROW_TILE, n).astype(out.dtype)
            out[parity, tile, lanes] = jnp.where(
                row >= first_row, attended, out[parity, tile, lanes]
            )
