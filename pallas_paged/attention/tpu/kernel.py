# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel of the TPU attention: walk the sequences' units, block by block.

A *unit* is the rows of one sequence that are computed together: the row of a decode, or a run of a
prefill's rows. Units are found in order (work_items) as their blocks of keys are fetched
(kv_blocks), some ahead of the one that is computed (decode, prefill);
their queries and results are in windows of the batch (q_tiles). Where the call writes
new keys and values, they are made, used and sent on the way (new_kv).
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged import layout
from pallas_paged.attention.tpu import decode as decodes
from pallas_paged.attention.tpu import kv_blocks as blocks
from pallas_paged.attention.tpu import new_kv as new
from pallas_paged.attention.tpu import page_table
from pallas_paged.attention.tpu import prefill as prefills
from pallas_paged.attention.tpu import q_tiles as windows
from pallas_paged.attention.tpu import work_items as units
from pallas_paged.attention.tpu.refs import (
    AHEAD_ROW,
    FETCHED,
    FOUND,
    PARITY,
    PREFILL,
    STATE_SIZE,
    TAKEN,
    WINDOW,
    WINDOW_END,
    Refs,
    Unit,
    Walk,
    unpack,
)


def kernel(walk: Walk, *arguments):
    """Runs every unit of every sequence."""
    refs = unpack(walk, arguments)
    state = refs.state
    for i in range(STATE_SIZE):
        state[i] = 0
    state[AHEAD_ROW] = units.rows_of(walk, refs, 0)[0]
    if walk.table_part:
        page_table.start(refs)
    blocks.fill_ring(walk, refs)

    def is_left(at):
        *_, is_again = at
        return (state[TAKEN] < state[FETCHED]) | is_again

    zero = jnp.int32(0)
    lax.while_loop(is_left, functools.partial(_run, walk, refs), (zero, zero, jnp.bool_(False)))
    windows.close_window(walk, refs)
    windows.zero_until(walk, refs, walk.num_tokens)
    windows.wait_leaving(walk, refs)
    if walk.new is not None:
        new.wait_sent(walk, refs)
    if walk.table_part:
        page_table.finish(walk, refs)


def _run(walk: Walk, refs: Refs, at):
    """Takes the next block, or blocks: (number of the unit, its block, whether it starts again)."""
    index, block, is_again = at
    unit = units.kept_unit(walk, refs, index)

    def run_prefill():
        prefill = units.with_new_tokens(walk, refs, index, unit)
        must_repeat = _prefill(walk, refs, prefill, block, is_again)
        refs.state[WINDOW_END] = unit.end
        is_over = (block + 1 == unit.num_blocks) & jnp.logical_not(must_repeat)
        return (
            jnp.where(is_over, index + 1, index),
            jnp.where(is_over | must_repeat, 0, block + 1),
            must_repeat | (is_again & jnp.logical_not(is_over)),
        )

    def run_decodes():
        return *_decode(walk, refs, index, unit, block), jnp.bool_(False)

    return lax.cond(unit.is_decode == 1, run_decodes, run_prefill)


def _factors(walk: Walk, refs: Refs):
    """What both bodies need: `scales(which, head)`, the sliding window, sm_scale."""

    def scales(which, head):
        return refs.factors[1 + which * walk.heads.num_kv_heads + head]

    return scales, units.window_len(walk, refs), refs.factors[0]


# ---- Decodes


class _Taken(NamedTuple):
    """A block that a body takes: which block of which unit, and the unit's number."""

    index: Any
    unit: Unit
    block: Any


def _behind(at: _Taken):
    """(number of the unit, its block) of the block behind one."""
    is_over = at.block + 1 == at.unit.num_blocks
    return at.index + jnp.where(is_over, 1, 0), jnp.where(is_over, 0, at.block + 1)


def _decode(walk: Walk, refs: Refs, index, unit: Unit, block):
    """Takes one block of a decode, or many, of it or of decodes behind it; returns what is next."""
    state, many, parts = refs.state, walk.kv_blocks_per_iteration, walk.full_parts
    pl.when(block == 0)(lambda: windows.open_decode(walk, refs, unit.row))
    first = _Taken(index, unit, block)
    one = functools.partial(_decode_blocks, walk, refs, [first], is_full=False)
    if many == 1:
        return one()
    tokens = walk.pieces_per_block * walk.piece

    def full_part(at: _Taken):
        """Many full blocks of a decode, which need no masks; and whether they are there."""
        taken = [at._replace(block=at.block + b) for b in range(many // parts)]
        first, _ = blocks.block_of(walk, at.unit, at.block)
        return taken, at.unit.key_end - first >= len(taken) * tokens

    def is_near(at: _Taken):
        """Whether a unit is known, and a decode whose row is in the window."""
        row = at.unit.row - state[WINDOW]
        is_decode = (at.index < state[FOUND]) & (at.unit.is_decode == 1)
        return is_decode & (row >= 0) & (row < walk.window)

    def behind(at: _Taken):
        index, block = _behind(at)
        return _Taken(index, units.kept_unit(walk, refs, index), block)

    def full_body(first: _Taken):
        """The blocks of a body of full ones, from one on; and whether they are there."""
        taken, is_full = full_part(first)
        for _ in range(1, parts):
            at = behind(taken[-1])
            more, is_more_full = full_part(at)
            taken += more
            is_full &= is_near(at) & is_more_full & (state[TAKEN] + many <= state[FETCHED])
        return taken, is_full

    def of_several():
        taken, is_there = [first], state[TAKEN] + many <= state[FETCHED]
        for _ in range(1, many):
            taken.append(behind(taken[-1]))
            is_there &= is_near(taken[-1])
        several = functools.partial(_decode_blocks, walk, refs, taken, is_full=False)
        return lax.cond(is_there, functools.partial(several, num_known=1), one)

    def of_full():
        """Bodies of full blocks as long as there are some: what is next is found where the
        matrix unit's latency hides it."""
        is_unmasked = tokens == walk.block and not walk.score.has_window

        def run(at):
            index, block, _ = at
            taken, _ = full_body(_Taken(index, units.kept_unit(walk, refs, index), block))
            index, block = _decode_blocks(
                walk, refs, taken, is_full=is_unmasked, num_known=many // parts
            )
            following = _Taken(index, units.kept_unit(walk, refs, index), block)
            return index, block, is_near(following) & full_body(following)[1]

        *at, _ = lax.while_loop(lambda at: at[2], run, (index, block, jnp.bool_(True)))
        return tuple(at)

    return lax.cond(full_body(first)[1], of_full, of_several)


def _decode_blocks(walk: Walk, refs: Refs, taken: list[_Taken], *, is_full, num_known=1):
    """Takes some blocks of decodes; returns what is next. Results so far go to their rows.

    Args:
      walk, refs: the kernel's.
      taken: the blocks, one behind the other.
      is_full: whether all are full and no mask hides a key.
      num_known: how many at a time are known to be of one decode.
    """
    heads, state = walk.heads, refs.state

    def is_last_known(b):
        return (b + 1) % num_known == 0

    # What waits for numbers from SMEM comes before what waits for blocks.
    ahead = None if walk.table_part else blocks.read_ahead(walk, refs)
    puts = {}
    for b, at in enumerate(taken):
        if walk.new is not None and is_last_known(b):
            first, _ = blocks.block_of(walk, at.unit, at.block)
            is_last = at.block + 1 == at.unit.num_blocks
            puts[b] = new.plan_put(walk, refs, at.index, at.unit, first, is_last)
    places = blocks.take_blocks(walk, refs, [(at.unit, at.block) for at in taken], is_full)
    for b, put in puts.items():
        new.put(walk, refs, put, places[b])
    sends = new.send_puts(walk, refs, list(puts.values()))
    if walk.table_part:  # before another part of the table comes for the fetches
        _finish(sends)
    fetches = blocks.next_fetches(walk, refs, len(taken), ahead)

    start_some = blocks.issues(walk, refs, fetches, len(taken) * blocks.num_points(walk))

    def issue():
        start_some()
        next(sends, None)

    steps: list[decodes.Step] = []
    for b, at in enumerate(taken):
        is_new = b % num_known == 0
        if is_new:
            row = at.unit.row - state[WINDOW]
        first, end = blocks.block_of(walk, at.unit, at.block)
        steps.append(
            decodes.Step(
                load=functools.partial(blocks.load, walk, refs, places[b], issue),
                first=first,
                end=end,
                position=at.unit.position,
                is_first=at.block == 0 if is_new else False,
                q=functools.partial(_query, walk, refs, row) if is_new else steps[-1].q,
                store=functools.partial(_store_decode, walk, refs, row)
                if is_last_known(b)
                else None,
                store_lse=functools.partial(_store_decode_lse, refs, row),
            )
        )
    scales, window, sm_scale = _factors(walk, refs)
    decodes.attend(
        heads,
        walk.score,
        refs.sinks_vmem,
        scales,
        window,
        sm_scale,
        steps=steps,
        num_keys=walk.block,
        is_full=is_full,
        m_ref=refs.decode_m,
        l_ref=refs.decode_l,
        acc_ref=refs.decode_acc,
    )
    _finish(sends)
    state[WINDOW_END] = taken[-1].unit.row + 1
    return _behind(taken[-1])


def _finish(steps):
    """Does what is left of a generator's."""
    for _ in steps:
        pass


def _query(walk: Walk, refs: Refs, row, head_row, lane_tile):
    """Eight heads of a decode's q, f32[8, 128]."""
    return refs.q_heads[lane_tile * walk.window + row, head_row : head_row + 8, 0, :]


def _store_decode(walk: Walk, refs: Refs, row, head_row, lane_tile, x):
    """Takes eight heads of a decode's result."""
    refs.out_heads[lane_tile * walk.window + row, head_row : head_row + 8, 0, :] = x


def _store_decode_lse(refs: Refs, row, lse):
    """Takes a decode's log-sum-exp, f32[rows, 1]."""
    lse_vmem, parity = refs.lse_vmem, refs.state[PARITY]
    registers = pl.ds(pl.multiple_of(row & -8, 8), 8)
    is_row = lax.broadcasted_iota(jnp.int32, (8, 1), 0) == (row & 7)
    values = decodes.as_row(lse, lse_vmem.shape[2])
    lse_vmem[parity, registers] = jnp.where(is_row, values, lse_vmem[parity, registers])


# ---- Prefills


def _state_of_prefill(refs: Refs):
    return {"shift_ref": refs.prefill_shift, "l_ref": refs.prefill_l, "acc_ref": refs.prefill_acc}


def _prefill(walk: Walk, refs: Refs, unit: Unit, block, is_again):
    """Takes one block of a prefill unit; returns whether the unit must start again."""
    first, end = blocks.prefill_block_of(walk, unit, block)
    pl.when((block == 0) & jnp.logical_not(is_again))(lambda: _start_prefill(walk, refs, unit))

    def from_ring():
        buffer = blocks.take_prefill_block(walk, refs, unit, block)
        return buffer, blocks.next_fetches(walk, refs, 1)[0]

    def from_pool():
        return blocks.bring_again(walk, refs, unit, block), blocks.NO_FETCH

    buffer, fetch = lax.cond(is_again, from_pool, from_ring)
    place = blocks.prefill_place(walk, unit, block, buffer)
    # Some key is later than some query, or too early for it, or the block is not full.
    is_edge = end < first + walk.block
    if walk.score.causal:
        is_edge |= end - 1 > unit.position
    scales, window, sm_scale = _factors(walk, refs)
    if walk.score.has_window:
        is_edge |= first <= unit.position + unit.end - unit.row - 1 - window

    def take(is_masked):
        keys = blocks.clear_behind(walk, refs, place, end - first) if is_masked else place
        issue = blocks.issues(walk, refs, [fetch], blocks.num_points(walk))
        prefills.attend(
            walk.heads,
            walk.score,
            refs.q_vmem,
            functools.partial(blocks.load, walk, refs, keys, issue),
            scales,
            window,
            sm_scale,
            is_masked=is_masked,
            mask_dtype=walk.mask_dtype,
            first_position=unit.position - (unit.row - refs.state[WINDOW]),
            first=first,
            end=end,
            num_keys=walk.block,
            mask_ref=refs.prefill_mask,
            **_state_of_prefill(refs),
        )

    lax.cond(is_edge, lambda: take(True), lambda: take(False))
    is_last = block + 1 == unit.num_blocks
    must_repeat = is_last & jnp.logical_not(is_again)
    must_repeat = lax.cond(
        must_repeat,
        lambda: jnp.logical_not(_is_sound(walk, refs, unit)),
        lambda: jnp.bool_(False),
    )
    pl.when(is_last & jnp.logical_not(must_repeat))(lambda: _finish_prefill(walk, refs, unit))
    pl.when(must_repeat)(lambda: _find_shifts(walk, refs, unit))
    return must_repeat


def _start_prefill(walk: Walk, refs: Refs, unit: Unit):
    """Has the unit's queries, and its new keys and values where the call writes them."""
    if walk.new is not None:
        num_tokens = new.start_old_tail(walk, refs, unit)
    windows.open_window(walk, refs, unit.row, PREFILL)
    if walk.new is not None:
        new.wait_old_tail(walk, refs, num_tokens)
        new.make_of_prefill(walk, refs, unit)
    prefills.start(**_state_of_prefill(refs))


def _window_rows(walk: Walk, refs: Refs, shape, dim):
    """Rows of the batch that the window's are, along a dimension; heads repeat them."""
    row = lax.broadcasted_iota(jnp.int32, shape, dim)
    return refs.state[WINDOW] + lax.rem(row, walk.window)


def _is_sound(walk: Walk, refs: Refs, unit: Unit):
    """Whether the weights of every row of a unit that sees a key were in range."""
    row = _window_rows(walk, refs, (1, refs.prefill_l.shape[2]), 1)
    counts = (row >= unit.row) & (row < unit.end)
    if walk.score.causal:
        counts &= unit.position + row - unit.row >= 0
    return prefills.is_sound(walk.heads, counts, refs.prefill_l, refs.prefill_acc)


def _find_shifts(walk: Walk, refs: Refs, unit: Unit):
    """A round over a unit's blocks for the largest score of each row, as its shift."""
    shift_ref = refs.prefill_shift
    shift_ref[...] = jnp.full_like(shift_ref, -jnp.inf)
    scales, window, sm_scale = _factors(walk, refs)

    @pl.loop(0, unit.num_blocks)
    def _find(block):
        first, end = blocks.prefill_block_of(walk, unit, block)
        buffer = blocks.bring_again(walk, refs, unit, block)
        place = blocks.prefill_place(walk, unit, block, buffer)
        prefills.find_shifts(
            walk.heads,
            walk.score,
            refs.q_vmem,
            functools.partial(blocks.load, walk, refs, place, lambda: None),
            scales,
            window,
            sm_scale,
            first_position=unit.position - (unit.row - refs.state[WINDOW]),
            first=first,
            end=end,
            shift_ref=shift_ref,
        )

    prefills.start_again(**_state_of_prefill(refs))


def _finish_prefill(walk: Walk, refs: Refs, unit: Unit):
    """Puts a unit's result into its rows of the window."""
    heads, parity, out_ref = walk.heads, refs.state[PARITY], refs.out_vmem
    row = _window_rows(walk, refs, (walk.window, 1), 0)
    is_row = (row >= unit.row) & (row < unit.end)
    scales, _, _ = _factors(walk, refs)
    lse_columns = []
    for head in range(heads.num_kv_heads):
        out, lse = prefills.finish(
            heads, walk.score, head, lambda n: refs.sinks[n], scales, **_state_of_prefill(refs)
        )
        for g in range(heads.group):
            n = head * heads.group + g
            at = slice(n * heads.lanes, (n + 1) * heads.lanes)
            rows = slice(g * walk.window, (g + 1) * walk.window)
            out_ref[parity, :, at] = jnp.where(
                is_row, out[rows].astype(out_ref.dtype), out_ref[parity, :, at]
            )
            lse_columns.append(lse[:, rows])
    if walk.score.return_lse:
        missing = -heads.num_heads % layout.LANES
        lse_columns.append(jnp.zeros((missing, walk.window), jnp.float32))
        columns = jnp.concatenate(lse_columns, axis=0).T  # [window, lanes]
        refs.lse_vmem[parity] = jnp.where(is_row, columns, refs.lse_vmem[parity])
