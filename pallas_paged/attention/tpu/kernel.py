# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel of the TPU attention: its main loop over the work items' KV blocks.

A *work item* is the rows of one sequence that are computed together: the row of a decode, or some
rows of a prefill. Work items are found in order (work_items) as their KV blocks are fetched
(kv_fetch), some blocks ahead of those that are computed with (kv_blocks). One iteration of the loop
takes one KV block of a prefill (prefill_iteration, prefill), or some blocks of one or more decodes
(decode_iteration, decode). Queries and results are in q tiles (q_tiles). Where the call writes new
keys and values, they are made, used and sent on the way (new_kv).
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_paged.attention.tpu import (
    decode_iteration,
    kv_fetch,
    new_kv,
    page_table,
    prefill_iteration,
    q_tiles,
    work_items,
)
from pallas_paged.attention.tpu.refs import Refs, unpack
from pallas_paged.attention.tpu.spec import KernelSpec

# Where the main loop is: the number of the work item, the number of its next KV block, and whether
# the item, a prefill, takes its blocks for the second time.
_At = tuple[Any, Any, Any]


def kernel(spec: KernelSpec, names: tuple[str, ...], *arguments: Any) -> None:
    """Computes all work items of all sequences.

    Args:
      spec: the static parameters.
      names: what `Refs` calls the arguments.
      arguments: refs of the inputs, the outputs and the scratch.
    """
    refs = unpack(names, arguments)
    _start(spec, refs)

    def is_left(at: _At) -> Any:
        _, _, is_again = at
        return (refs.state.num_taken < refs.state.num_fetched) | is_again

    zero = jnp.int32(0)
    iteration = functools.partial(_iteration, spec, refs)
    lax.while_loop(is_left, iteration, (zero, zero, jnp.bool_(False)))
    _finish(spec, refs)


def _iteration(spec: KernelSpec, refs: Refs, at: _At) -> _At:
    """Takes the next KV block, or the next ones; returns where the main loop goes on."""
    index, block, is_again = at
    item = work_items.load_work_item(spec, refs, index)

    def of_prefill() -> _At:
        prefill = work_items.with_new_kv(spec, refs, index, item)
        must_repeat = prefill_iteration.run(spec, refs, prefill, block, is_again)
        is_over = (block + 1 == item.num_blocks) & jnp.logical_not(must_repeat)
        return (
            jnp.where(is_over, index + 1, index),
            jnp.where(is_over | must_repeat, 0, block + 1),
            must_repeat | (is_again & jnp.logical_not(is_over)),
        )

    def of_decodes() -> _At:
        return *decode_iteration.run(spec, refs, index, item, block), jnp.bool_(False)

    return lax.cond(item.is_decode == 1, of_decodes, of_prefill)


def _start(spec: KernelSpec, refs: Refs) -> None:
    """Sets the state and starts the first fetches."""
    refs.state.clear()
    refs.state.search_row = work_items.rows_of(spec, refs, 0)[0]
    if spec.table_part:
        page_table.start(refs)
    kv_fetch.fill_stages(spec, refs)


def _finish(spec: KernelSpec, refs: Refs) -> None:
    """Sends what is left of the output and waits for everything that is on its way."""
    q_tiles.close_q_tile(spec, refs)
    q_tiles.zero_until(spec, refs, spec.num_tokens)
    q_tiles.wait_output(spec, refs)
    if spec.writes:
        new_kv.wait_sent(spec, refs)
    if spec.table_part:
        page_table.finish(spec, refs)
