# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The iterations of the main loop over decodes: which KV blocks one takes, and taking them.

There are three forms. A *full* iteration takes full blocks of one decode, or of two, which need no
mask. A *mixed* iteration takes as many blocks of any decodes that follow each other. A *single* one
takes one block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged.attention.tpu import decode, kv_blocks, kv_fetch, new_kv, q_tiles
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.scores import scoring
from pallas_paged.attention.tpu.spec import KernelSpec
from pallas_paged.attention.tpu.work_items import WorkItem, load_work_item


class _Block(NamedTuple):
    """A KV block: the number of its work item, the work item, and the block's number in it."""

    index: Any
    item: WorkItem
    block: Any


def run(spec: KernelSpec, refs: Refs, index: Any, item: WorkItem, block: Any) -> tuple[Any, Any]:
    """Takes one KV block of a decode, or multiple blocks of it and of decodes after it.

    Args:
      spec, refs: the kernel's.
      index, item: the work item and its number.
      block: the number of its next KV block.

    Returns:
      the number of the next work item and of its next KV block.
    """
    pl.when(block == 0)(lambda: q_tiles.open_for_decode(spec, refs, item.row))
    first = _Block(index, item, block)
    single = functools.partial(run_iteration, spec, refs, [first], is_full=False)
    if spec.kv_blocks_per_iteration == 1:
        return single()

    def full() -> tuple[Any, Any]:
        """Full iterations as long as there are some.

        What is next is found where the latency of the matrix unit hides it.
        """
        per_decode = spec.kv_blocks_per_iteration // spec.decodes_per_full_iteration
        block_is_full = spec.chunks_per_block * spec.chunk == spec.block_kv
        is_full = block_is_full and not spec.options.has_window

        def iteration(at: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            index, block, _ = at
            item = load_work_item(spec, refs, index)
            taken, _ = _full_iteration(spec, refs, _Block(index, item, block))
            index, block = run_iteration(
                spec, refs, taken, is_full=is_full, blocks_per_decode=per_decode
            )
            following = _Block(index, load_work_item(spec, refs, index), block)
            is_near = _is_near(spec, refs, following)
            return index, block, is_near & _full_iteration(spec, refs, following)[1]

        *at, _ = lax.while_loop(lambda at: at[2], iteration, (index, block, jnp.bool_(True)))
        return tuple(at)

    def mixed() -> tuple[Any, Any]:
        """A mixed iteration if enough blocks are there, else a single one."""
        many = spec.kv_blocks_per_iteration
        taken, is_there = [first], refs.state.num_taken + many <= refs.state.num_fetched
        for _ in range(1, many):
            taken.append(_next_block(spec, refs, taken[-1]))
            is_there &= _is_near(spec, refs, taken[-1])
        return lax.cond(
            is_there, functools.partial(run_iteration, spec, refs, taken, is_full=False), single
        )

    return lax.cond(_full_iteration(spec, refs, first)[1], full, mixed)


# ---- Which blocks


def _full_iteration(spec: KernelSpec, refs: Refs, first: _Block) -> tuple[list[_Block], Any]:
    """The blocks of a full iteration that begins at a block, and whether they are there."""
    state, many = refs.state, spec.kv_blocks_per_iteration
    taken, is_full = _full_blocks(spec, first)
    for _ in range(1, spec.decodes_per_full_iteration):
        at = _next_block(spec, refs, taken[-1])
        more, is_more_full = _full_blocks(spec, at)
        taken += more
        is_near = _is_near(spec, refs, at)
        is_full &= is_near & is_more_full & (state.num_taken + many <= state.num_fetched)
    return taken, is_full


def _full_blocks(spec: KernelSpec, first: _Block) -> tuple[list[_Block], Any]:
    """The blocks that a full iteration takes of one decode, and whether all are full."""
    number = spec.kv_blocks_per_iteration // spec.decodes_per_full_iteration
    taken = [first._replace(block=first.block + b) for b in range(number)]
    first_key, _ = kv_blocks.key_range(spec, first.item, first.block)
    num_keys = number * spec.chunks_per_block * spec.chunk
    return taken, first.item.key_end - first_key >= num_keys


def _is_near(spec: KernelSpec, refs: Refs, at: _Block) -> Any:
    """Whether a block's work item was found already and is a decode in the open q tile."""
    row = at.item.row - refs.state.q_tile_row
    is_decode = (at.index < refs.state.num_found) & (at.item.is_decode == 1)
    return is_decode & (row >= 0) & (row < spec.block_q)


def _next_block(spec: KernelSpec, refs: Refs, at: _Block) -> _Block:
    """The block that follows another."""
    index, block = _following(at)
    return _Block(index, load_work_item(spec, refs, index), block)


def _following(at: _Block) -> tuple[Any, Any]:
    """The numbers of the work item and of its block that follow a block."""
    is_over = at.block + 1 == at.item.num_blocks
    return at.index + jnp.where(is_over, 1, 0), jnp.where(is_over, 0, at.block + 1)


# ---- Taking them


def run_iteration(
    spec: KernelSpec,
    refs: Refs,
    taken: list[_Block],
    *,
    is_full: bool,
    blocks_per_decode: int = 1,
) -> tuple[Any, Any]:
    """Takes some KV blocks of decodes, fetches as many, and stores the results so far.

    Args:
      spec, refs: the kernel's.
      taken: the blocks, in order.
      is_full: whether all are full and no mask hides a key.
      blocks_per_decode: every group of this many blocks is of one decode.

    Returns:
      the number of the next work item and of its next KV block.
    """
    ends = [(b + 1) % blocks_per_decode == 0 for b in range(len(taken))]
    # What waits for numbers from SMEM comes before what waits for blocks.
    cursor = None if spec.table_part else kv_fetch.read_cursor(spec, refs)
    inserts: dict[int, new_kv.Insert] = {}
    for b, at in enumerate(taken):
        if spec.writes and ends[b]:
            first, _ = kv_blocks.key_range(spec, at.item, at.block)
            is_last = at.block + 1 == at.item.num_blocks
            inserts[b] = new_kv.plan_insert(spec, refs, at.index, at.item, first, is_last)
    rows = kv_blocks.take_blocks(spec, refs, [(at.item, at.block) for at in taken], is_full)
    for b, plan in inserts.items():
        new_kv.insert(spec, refs, plan, rows[b].row, rows[b].lane_tile_rows)
    sending = new_kv.send_inserted(spec, refs, list(inserts.values()))
    if spec.table_part:  # before the fetches bring other parts of the table
        new_kv.finish_sending(sending)
    fetches = kv_fetch.next_fetches(spec, refs, len(taken), cursor)
    num_points = len(taken) * kv_blocks.num_issue_points(spec)
    start_dmas = kv_fetch.issuer(spec, refs, fetches, num_points)

    def issue() -> None:
        start_dmas()
        next(sending, None)

    steps: list[decode.Step] = []
    for b, at in enumerate(taken):
        is_new = b % blocks_per_decode == 0
        if is_new:
            row = at.item.row - refs.state.q_tile_row
        first, end = kv_blocks.key_range(spec, at.item, at.block)
        store = functools.partial(_store, spec, refs, row) if ends[b] else None
        steps.append(
            decode.Step(
                load=functools.partial(kv_blocks.load, spec, refs, rows[b], issue),
                first=first,
                end=end,
                position=at.item.position,
                is_first=at.block == 0 if is_new else False,
                q=functools.partial(_query, spec, refs, row) if is_new else steps[-1].q,
                store=store,
                store_lse=functools.partial(_store_lse, refs, row),
            )
        )
    decode.attend(
        spec.heads,
        scoring(spec, refs),
        refs.sinks_vmem,
        steps=steps,
        num_keys=spec.block_kv,
        is_full=is_full,
        m_ref=refs.decode_m,
        l_ref=refs.decode_l,
        acc_ref=refs.decode_acc,
    )
    new_kv.finish_sending(sending)
    refs.state.q_tile_end = taken[-1].item.row + 1
    return _following(taken[-1])


def _query(spec: KernelSpec, refs: Refs, row: Any, head_row: int, lane_tile: int) -> jax.Array:
    """Eight heads of a decode's q, f32[8, 128]."""
    return refs.q_heads[lane_tile * spec.block_q + row, head_row : head_row + 8, 0, :]


def _store(
    spec: KernelSpec, refs: Refs, row: Any, head_row: int, lane_tile: int, x: jax.Array
) -> None:
    """Stores eight heads of a decode's result, f32[8, 128]."""
    refs.out_heads[lane_tile * spec.block_q + row, head_row : head_row + 8, 0, :] = x


def _store_lse(refs: Refs, row: Any, lse: jax.Array) -> None:
    """Stores a decode's log-sum-exp, f32[rows, 1]."""
    lse_vmem, stage = refs.lse_vmem, refs.state.out_stage
    register = pl.ds(pl.multiple_of(row & -8, 8), 8)
    is_row = lax.broadcasted_iota(jnp.int32, (8, 1), 0) == (row & 7)
    values = decode.as_row(lse, lse_vmem.shape[2])
    lse_vmem[stage, register] = jnp.where(is_row, values, lse_vmem[stage, register])
