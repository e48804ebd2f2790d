# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The iteration of the main loop that takes one KV block of a prefill."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged import layout
from pallas_paged.attention.tpu import kv_blocks, kv_fetch, new_kv, prefill, q_tiles
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.scores import scoring
from pallas_paged.attention.tpu.spec import KernelSpec
from pallas_paged.attention.tpu.state import PREFILL
from pallas_paged.attention.tpu.work_items import WorkItem


def run(spec: KernelSpec, refs: Refs, item: WorkItem, block: Any, is_again: Any) -> Any:
    """Takes one KV block of a prefill.

    Args:
      spec, refs: the kernel's.
      item: the work item.
      block: the number of the KV block.
      is_again: whether the item takes its blocks for the second time.

    Returns:
      whether it must: this was its last block, and its result is not sound (`prefill.is_sound`).
    """
    first, end = kv_blocks.prefill_key_range(spec, item, block)
    pl.when((block == 0) & jnp.logical_not(is_again))(lambda: _start(spec, refs, item))

    def take() -> tuple[Any, kv_fetch.Fetch]:
        stage = kv_blocks.take_prefill_block(spec, refs, item, block)
        return stage, kv_fetch.next_fetches(spec, refs, 1)[0]

    def take_again() -> tuple[Any, kv_fetch.Fetch]:
        return kv_blocks.fetch_again(spec, refs, item, block), kv_fetch.NO_FETCH

    stage, fetch = lax.cond(is_again, take_again, take)
    rows = kv_blocks.prefill_block_rows(spec, item, block, stage)
    # At an edge some key is later than some query, or before the window of some query, or the block
    # is not full.
    is_edge = end < first + spec.block_kv
    if spec.options.causal:
        is_edge |= end - 1 > item.position
    numbers = scoring(spec, refs)
    if spec.options.has_window:
        is_edge |= first <= item.position + item.end - item.row - 1 - numbers.sliding_window

    def attend(is_masked: bool) -> None:
        rows_read = kv_blocks.clear_rest(spec, refs, rows, end - first) if is_masked else rows
        issue = kv_fetch.issuer(spec, refs, [fetch], kv_blocks.num_issue_points(spec))
        prefill.attend(
            spec.heads,
            numbers,
            refs.q_vmem,
            functools.partial(kv_blocks.load, spec, refs, rows_read, issue),
            first=first,
            first_position=_first_position(refs, item),
            end=end,
            num_keys=spec.block_kv,
            is_masked=is_masked,
            mask_dtype=spec.mask_dtype,
            mask_ref=refs.prefill_mask,
            state=_running_state(refs),
        )

    lax.cond(is_edge, lambda: attend(True), lambda: attend(False))
    is_last = block + 1 == item.num_blocks
    must_repeat = is_last & jnp.logical_not(is_again)
    must_repeat = lax.cond(
        must_repeat,
        lambda: jnp.logical_not(_is_sound(spec, refs, item)),
        lambda: jnp.bool_(False),
    )
    pl.when(is_last & jnp.logical_not(must_repeat))(lambda: _finish(spec, refs, item))
    pl.when(must_repeat)(lambda: _find_shifts(spec, refs, item))
    refs.state.q_tile_end = item.end
    return must_repeat


def _running_state(refs: Refs) -> prefill.RunningState:
    return prefill.RunningState(refs.prefill_shift, refs.prefill_l, refs.prefill_acc)


def _first_position(refs: Refs, item: WorkItem) -> Any:
    """The position that the first row of the open q tile would have in the item's sequence."""
    return item.position - (item.row - refs.state.q_tile_row)


def _batch_rows(spec: KernelSpec, refs: Refs, shape: tuple[int, int], dim: int) -> Any:
    """The batch's row of each row of the q tile, along a dimension in which heads repeat them."""
    row = lax.broadcasted_iota(jnp.int32, shape, dim)
    return refs.state.q_tile_row + lax.rem(row, spec.block_q)


def _start(spec: KernelSpec, refs: Refs, item: WorkItem) -> None:
    """Brings the item's queries and, where the call writes, its new keys and values."""
    if spec.writes:
        num_tokens = new_kv.start_old_tokens(spec, refs, item)
    q_tiles.open_q_tile(spec, refs, item.row, PREFILL)
    if spec.writes:
        new_kv.wait_old_tokens(spec, refs, num_tokens)
        new_kv.make_prefill(spec, refs, item)
    prefill.start(_running_state(refs))


def _is_sound(spec: KernelSpec, refs: Refs, item: WorkItem) -> Any:
    """Whether the result of every row of an item that sees a key is sound."""
    row = _batch_rows(spec, refs, (1, refs.prefill_l.shape[2]), 1)
    counts = (row >= item.row) & (row < item.end)
    if spec.options.causal:
        counts &= item.position + row - item.row >= 0
    return prefill.is_sound(spec.heads, counts, _running_state(refs))


def _find_shifts(spec: KernelSpec, refs: Refs, item: WorkItem) -> None:
    """Goes through an item's KV blocks once more to find the largest score of each row."""
    shift_ref = refs.prefill_shift
    shift_ref[...] = jnp.full_like(shift_ref, -jnp.inf)
    numbers = scoring(spec, refs)

    @pl.loop(0, item.num_blocks)
    def _find(block: Any) -> None:
        first, end = kv_blocks.prefill_key_range(spec, item, block)
        stage = kv_blocks.fetch_again(spec, refs, item, block)
        rows = kv_blocks.prefill_block_rows(spec, item, block, stage)
        prefill.find_shifts(
            spec.heads,
            numbers,
            refs.q_vmem,
            functools.partial(kv_blocks.load, spec, refs, rows, lambda: None),
            first=first,
            first_position=_first_position(refs, item),
            end=end,
            shift_ref=shift_ref,
        )

    prefill.start_again(_running_state(refs))


def _finish(spec: KernelSpec, refs: Refs, item: WorkItem) -> None:
    """Stores an item's result in its rows of the q tile."""
    heads, stage, out_ref = spec.heads, refs.state.out_stage, refs.out_vmem
    row = _batch_rows(spec, refs, (spec.block_q, 1), 0)
    is_row = (row >= item.row) & (row < item.end)
    numbers, state = scoring(spec, refs), _running_state(refs)
    lse_columns = []
    for head in range(heads.num_kv_heads):
        out, lse = prefill.finish(heads, numbers, head, lambda n: refs.sinks[n], state)
        for g in range(heads.group):
            n = head * heads.group + g
            lanes = slice(n * heads.lanes, (n + 1) * heads.lanes)
            rows = slice(g * spec.block_q, (g + 1) * spec.block_q)
            out_ref[stage, :, lanes] = jnp.where(
                is_row, out[rows].astype(out_ref.dtype), out_ref[stage, :, lanes]
            )
            lse_columns.append(lse[:, rows])
    if spec.options.return_lse:
        missing = -heads.num_heads % layout.LANES
        lse_columns.append(jnp.zeros((missing, spec.block_q), jnp.float32))
        columns = jnp.concatenate(lse_columns, axis=0).T  # [block_q, lanes]
        refs.lse_vmem[stage] = jnp.where(is_row, columns, refs.lse_vmem[stage])
