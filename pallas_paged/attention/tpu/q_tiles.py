# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Q tiles: rows of q come into VMEM, and the rows of the output go from there to HBM.

A *q tile* is a range of rows of the packed batch whose q and output are in VMEM: the rows of one
work item of a prefill, or those of decodes that follow each other. It begins at a row tile (16 rows
that a DMA takes whole). Neighbours may share a row tile. Then the later q tile takes over the rows
of the earlier one and sends them again, after the earlier one's copy is done.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.attention.tpu import new_kv
from pallas_paged.attention.tpu.index_math import ceil_div, div
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.spec import ROW_TILE, KernelSpec
from pallas_paged.attention.tpu.state import DECODES, NO_Q_TILE, PREFILL
from pallas_paged.attention.tpu.token_rows import TokenRows


def open_for_decode(spec: KernelSpec, refs: Refs, row: Any) -> None:
    """Opens a q tile of decodes that begins at a row, unless the open one has that row."""
    state = refs.state
    is_inside = (row >= state.q_tile_row) & (row < state.q_tile_row + spec.block_q)

    @pl.when(jnp.logical_not(is_inside) | (state.q_tile_kind != DECODES))
    def _open() -> None:
        num_rows = open_q_tile(spec, refs, row, DECODES)
        _scatter_decodes(spec, refs, num_rows)
        if spec.writes:
            new_kv.make_decodes(spec, refs, num_rows)


def open_q_tile(spec: KernelSpec, refs: Refs, row: Any, kind: int) -> Any:
    """Closes the open q tile and opens the one that begins at the row tile of a row.

    Args:
      spec, refs: the kernel's.
      row: a row of the batch.
      kind: DECODES or PREFILL.

    Returns:
      the number of its rows.
    """
    state = refs.state
    close_q_tile(spec, refs)
    first = row & -ROW_TILE
    num_rows = pl.multiple_of(jnp.minimum(spec.block_q, spec.num_tokens - first), ROW_TILE)
    loads = [
        pltpu.make_async_copy(
            refs.q.at[pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)],
            refs.q_vmem.at[pl.ds(0, num_rows)],
            refs.q_tile_sem.at[0],
        )
    ]
    if spec.writes:
        loads += new_kv.input_copies(refs, first, num_rows)
    for load in loads:
        load.start()
    # The last q tile may end in the row tile where this one begins: its rows are sent once more.
    is_shared = state.rows_sent > first
    before = jnp.clip(first - state.q_tile_row, 0, spec.block_q - ROW_TILE) & -ROW_TILE
    tile = pl.ds(pl.multiple_of(before, ROW_TILE), ROW_TILE)
    zero_until(spec, refs, first)
    stage = state.out_stage
    _clear(spec, refs, stage, spec.block_q if kind == PREFILL else ROW_TILE)

    @pl.when(is_shared)
    def _keep() -> None:
        refs.out_vmem[stage, :ROW_TILE] = refs.out_vmem[1 - stage, tile]
        if spec.options.return_lse:
            refs.lse_vmem[stage, :ROW_TILE] = refs.lse_vmem[1 - stage, tile]

    state.q_tile_row = first
    state.q_tile_start = row
    state.q_tile_kind = kind
    for load in loads:
        load.wait()
    return num_rows


def close_q_tile(spec: KernelSpec, refs: Refs) -> None:
    """Sends the output of the open q tile on its way, if one is open."""
    state = refs.state

    @pl.when(state.q_tile_kind != NO_Q_TILE)
    def _close() -> None:
        stage, first = state.out_stage, state.q_tile_row
        pl.when(state.q_tile_kind == DECODES)(lambda: _gather_decodes(spec, refs, stage))
        num_rows = ((state.q_tile_end + ROW_TILE - 1) & -ROW_TILE) - first
        _send(spec, refs, stage, first, num_rows)
        state.out_stage = 1 - stage
        state.q_tile_kind = NO_Q_TILE


def zero_until(spec: KernelSpec, refs: Refs, row: Any) -> None:
    """Sends zeros to the output's rows before a row tile that no work item has."""
    state = refs.state

    @pl.when(state.rows_sent < row)
    def _zero() -> None:
        stage = state.out_stage
        _clear(spec, refs, stage, spec.block_q)

        def send_some(first: Any) -> Any:
            num_rows = jnp.minimum(row - first, spec.block_q)
            _send(spec, refs, stage, first, num_rows)
            return first + num_rows

        lax.while_loop(lambda first: first < row, send_some, state.rows_sent)
        state.out_stage = 1 - stage


def wait_output(spec: KernelSpec, refs: Refs) -> None:
    """Waits until the output that is on its way has arrived."""
    state = refs.state

    @pl.when(state.rows_in_flight > 0)
    def _wait() -> None:
        for copy in _output_copies(spec, refs, 0, 0, state.rows_in_flight):
            copy.wait()

    state.rows_in_flight = 0


def _output_copies(
    spec: KernelSpec, refs: Refs, stage: Any, first: Any, num_rows: Any
) -> Iterator[Any]:
    """The copies that take a q tile's output, from one of the two buffers, to HBM."""
    num_rows = pl.multiple_of(num_rows, ROW_TILE)
    rows = pl.ds(pl.multiple_of(first, ROW_TILE), num_rows)
    yield pltpu.make_async_copy(
        refs.out_vmem.at[stage, pl.ds(0, num_rows)], refs.out.at[rows], refs.out_sems.at[0]
    )
    if spec.options.return_lse:
        yield pltpu.make_async_copy(
            refs.lse_vmem.at[stage, pl.ds(0, num_rows)], refs.lse.at[rows], refs.out_sems.at[1]
        )


def _send(spec: KernelSpec, refs: Refs, stage: Any, first: Any, num_rows: Any) -> None:
    """Sends rows to the output after the last ones have arrived, because row tiles may overlap."""
    state = refs.state
    wait_output(spec, refs)
    for copy in _output_copies(spec, refs, stage, first, num_rows):
        copy.start()
    state.rows_in_flight = num_rows
    state.rows_sent = jnp.maximum(state.rows_sent, first + num_rows)


def _clear(spec: KernelSpec, refs: Refs, stage: Any, num_rows: int) -> None:
    """Fills the first rows of an output buffer with the result of a row without work."""
    out = refs.out_vmem
    out[stage, :num_rows] = jnp.zeros((num_rows, out.shape[2]), out.dtype)
    if spec.options.return_lse:
        refs.lse_vmem[stage] = jnp.full(refs.lse_vmem.shape[1:], -jnp.inf, jnp.float32)


def _head_lanes(heads: Heads) -> Iterator[tuple[int, int, slice]]:
    """(head, its lane tile, the lanes of that tile in a row of q) of all heads."""
    for n in range(heads.num_heads):
        for c in range(heads.lane_tiles):
            lane = n * heads.lanes + c * layout.LANES
            yield n, c, slice(lane, lane + layout.LANES)


def _scatter_decodes(spec: KernelSpec, refs: Refs, num_rows: Any) -> None:
    """Moves each row of q to one row per head, and fills the output of decodes with zeros."""
    if spec.is_interpreted:
        refs.out_heads[...] = jnp.zeros_like(refs.out_heads)
    else:
        flat = refs.out_heads.reshape(-1, layout.LANES)
        flat[...] = jnp.zeros(flat.shape, jnp.float32)
    q_heads = TokenRows(refs.q_heads, spec.is_interpreted)

    @pl.loop(0, div(num_rows, ROW_TILE))
    def _row_tile(i: Any) -> None:
        tile = pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)
        for n, c, lanes in _head_lanes(spec.heads):
            q = refs.q_vmem[tile, lanes].astype(jnp.float32)
            q_heads.store(c * spec.block_q + i * ROW_TILE, n, q)


def _gather_decodes(spec: KernelSpec, refs: Refs, stage: Any) -> None:
    """Moves the results of decodes from one row per head to one row of the output each."""
    state, out = refs.state, refs.out_vmem
    first_row = state.q_tile_start - state.q_tile_row
    out_heads = TokenRows(refs.out_heads, spec.is_interpreted)

    @pl.loop(0, ceil_div(state.q_tile_end - state.q_tile_row, ROW_TILE))
    def _row_tile(i: Any) -> None:
        tile = pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)
        row = i * ROW_TILE + lax.broadcasted_iota(jnp.int32, (ROW_TILE, 1), 0)
        for n, c, lanes in _head_lanes(spec.heads):
            attended = out_heads.load(c * spec.block_q + i * ROW_TILE, ROW_TILE, n)
            attended = attended.astype(out.dtype)
            out[stage, tile, lanes] = jnp.where(row >= first_row, attended, out[stage, tile, lanes])
