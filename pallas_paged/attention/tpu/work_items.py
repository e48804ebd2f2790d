# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Finding the units of a batch in order: which rows of which sequence, and which keys they see.

Whatever the metadata says, rows are inside the batch and keys inside the page table.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged.attention.tpu.refs import (
    AHEAD_ROW,
    AHEAD_SEQ,
    FOUND,
    MAX_LEN,
    OF_NEW_TOKENS,
    ROW_TILE,
    Refs,
    Unit,
    Walk,
    ceil_div,
    div,
    rem,
)


def rows_of(walk: Walk, refs: Refs, seq):
    """The rows of a sequence: (first, end)."""
    start = jnp.clip(refs.cu_q_lens[seq], 0, walk.num_tokens)
    return start, jnp.clip(refs.cu_q_lens[seq + 1], start, walk.num_tokens)


def num_seqs(walk: Walk, refs: Refs):
    """How many sequences there are."""
    return jnp.clip(refs.num_seqs[0], 0, walk.max_seqs)


def window_len(walk: Walk, refs: Refs):
    """The sliding window, None without one."""
    return jnp.clip(refs.window_len[0], 1, MAX_LEN) if walk.score.has_window else None


def unit_at(walk: Walk, refs: Refs, seq, row) -> tuple[Unit, Any, Any]:
    """The unit that begins at a row, but for its numbers of blocks, the end of its pieces, and
    whether its sequence ends before or with it."""
    start, stop = rows_of(walk, refs, seq)
    kv_len = jnp.clip(refs.kv_lens[seq], 0, MAX_LEN)
    num_keys = jnp.minimum(kv_len, walk.capacity)
    end = jnp.minimum(stop, (row & -ROW_TILE) + walk.window)
    position = kv_len - (stop - row)
    key_end = num_keys
    if walk.score.causal:
        key_end = jnp.clip(position + end - row, 0, num_keys)
    first_key = jnp.int32(0)
    if walk.score.has_window:
        first_key = jnp.clip(position - window_len(walk, refs) + 1, 0, key_end)
    first_piece, end_piece = div(first_key, walk.piece), ceil_div(key_end, walk.piece)
    is_decode = stop - start == 1
    unit = Unit(seq, row, end, position, first_piece, key_end, None, is_decode)
    if walk.new is None:
        return unit, end_piece, end >= stop
    # A decode's only new token is put into its last block; a prefill's stay where they were made.
    old_end = div(jnp.clip(kv_len - (stop - start), 0, walk.capacity), walk.piece)
    unit = unit._replace(old_end=jnp.where(is_decode, MAX_LEN // walk.piece, old_end))
    return unit, end_piece, end >= stop


def _with_blocks(walk: Walk, unit: Unit, end_piece) -> tuple[Unit, Any]:
    """The unit with its numbers of blocks, and the end of its pieces in the pool."""
    if walk.new is None:
        num_blocks = ceil_div(end_piece - unit.first_piece, walk.pieces_per_block)
        return unit._replace(num_blocks=num_blocks), end_piece
    end_in_pool = jnp.minimum(end_piece, unit.old_end)
    num_in_pool, first_new = end_in_pool, jnp.int32(0)
    if walk.score.has_window:
        num_in_pool = jnp.maximum(end_in_pool - unit.first_piece, 0)
        first_new = div(jnp.maximum(unit.first_piece - unit.old_end, 0) * walk.piece, walk.block)
    num_pool_blocks = ceil_div(num_in_pool, walk.pieces_per_block)
    num_new = ceil_div(jnp.maximum(unit.key_end - unit.old_end * walk.piece, 0), walk.block)
    unit = unit._replace(
        num_blocks=num_pool_blocks + jnp.maximum(num_new - first_new, 0),
        num_pool_blocks=num_pool_blocks,
        first_new=first_new,
    )
    return unit, end_in_pool


def first_piece_of(walk: Walk, seq):
    """Which piece of the whole page table is a sequence's first."""
    return seq * (walk.table_width * walk.pieces_per_page)


def find_unit(walk: Walk, refs: Refs):
    """Finds the next unit that has keys to see and keeps it.

    Returns:
      what to fetch: its first piece and their end in the pool, counted over the page table, and its
      number of blocks; nothing where there is no unit.
    """
    state = refs.state
    end_seq = num_seqs(walk, refs)

    def candidate(seq, row):
        unit, end_piece, is_last = unit_at(walk, refs, jnp.minimum(seq, walk.max_seqs - 1), row)
        return unit._replace(seq=seq), end_piece, is_last

    def behind(unit, is_last):
        """Where the search goes on. A sequence begins where the one before it ends."""
        return jnp.where(is_last, unit.seq + 1, unit.seq), jnp.maximum(unit.row, unit.end)

    def is_empty(found):
        unit, end_piece, _ = found
        has_work = (unit.row < unit.end) & (unit.first_piece < end_piece)
        return (unit.seq < end_seq) & ~has_work

    def skip(found):
        unit, _, is_last = found
        return candidate(*behind(unit, is_last))

    found = candidate(state[AHEAD_SEQ], state[AHEAD_ROW])
    # Blocks are counted behind the search, where they are on no branch's way.
    unit, end_piece, is_last = lax.while_loop(is_empty, skip, found)
    is_found = unit.seq < end_seq
    unit, end_in_pool = _with_blocks(walk, unit, end_piece)
    state[AHEAD_SEQ] = unit.seq

    @pl.when(is_found)
    def _found():
        state[AHEAD_SEQ], state[AHEAD_ROW] = behind(unit, is_last)
        at = rem(state[FOUND], walk.max_units)
        state[FOUND] = state[FOUND] + 1
        for i, name in enumerate(walk.kept):
            refs.units[at, i] = jnp.asarray(getattr(unit, name), jnp.int32)

    table = jnp.where(is_found, first_piece_of(walk, unit.seq), 0)
    end_in_pool = jnp.where(is_found, end_in_pool, unit.first_piece)
    num_blocks = None if walk.new is None else jnp.where(is_found, unit.num_blocks, 0)
    return table + unit.first_piece, table + end_in_pool, num_blocks


def kept_unit(walk: Walk, refs: Refs, index) -> Unit:
    """The unit found as number `index`, but for what only `with_new_tokens` reads."""
    # In their order, not as a set: a set's order, and so the program, would differ by process.
    others = Unit._fields[: -len(OF_NEW_TOKENS)]
    return Unit(**_read(walk, refs, index, others), **dict.fromkeys(OF_NEW_TOKENS))


def with_new_tokens(walk: Walk, refs: Refs, index, unit: Unit) -> Unit:
    """The unit with where its new tokens are, which a prefill needs to know."""
    return unit._replace(**_read(walk, refs, index, OF_NEW_TOKENS)) if walk.new else unit


def _read(walk: Walk, refs: Refs, index, names):
    """Fields of the unit found as number `index`."""
    at = rem(index, walk.max_units)
    return {
        name: refs.units[at, walk.kept.index(name)] if name in walk.kept else jnp.int32(0)
        for name in names
    }
