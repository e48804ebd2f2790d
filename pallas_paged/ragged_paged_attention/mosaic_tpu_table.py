# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The page table: in SMEM whole, or, where it is longer, streamed into it in parts.

Two parts are in SMEM at a time, each in the half that its number's parity names, so that an entry's
place follows from its number alone. Sequences are walked in order, so the part behind the one that
is used comes in meanwhile.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.ragged_paged_attention.mosaic_tpu_refs import (
    TABLE_COMING,
    TABLE_HELD,
    Refs,
    Walk,
    div,
)


def entry(walk: Walk, refs: Refs, i):
    """An entry of the flat page table; of a streamed one it has been brought."""
    if not walk.table_part:
        return refs.table[i]
    return refs.table_parts[i & (2 * walk.table_part - 1)]


def page_to_read(walk: Walk, refs: Refs, i):
    """The page id of an entry, inside the pool whatever the table says."""
    page_id = entry(walk, refs, i).astype(jnp.uint32)  # as an unsigned number, none is negative
    return jnp.minimum(page_id, jnp.uint32(walk.num_pages - 1)).astype(jnp.int32)


def start(walk: Walk, refs: Refs):
    """Nothing is held yet."""
    for half in range(2):
        refs.state[TABLE_HELD + half] = -1
        refs.state[TABLE_COMING + half] = 0


def bring(walk: Walk, refs: Refs, first, last):
    """Has the entries from `first` to `last`, fewer than a part's, in SMEM, until others come."""
    for part in (div(first, walk.table_part), div(last, walk.table_part)):
        _start_part(walk, refs, part)
        _wait_half(walk, refs, part & 1)
    following = div(last, walk.table_part) + 1
    num_parts = refs.table.shape[0] // walk.table_part
    # Not over the part that `first` is in.
    is_free = (following < num_parts) & (div(first, walk.table_part) == following - 1)
    pl.when(is_free)(lambda: _start_part(walk, refs, following))


def finish(walk: Walk, refs: Refs):
    """Waits for what still comes."""
    for half in range(2):
        _wait_half(walk, refs, half)


def _copy(walk, refs, part, half):
    size = walk.table_part
    return pltpu.make_async_copy(
        refs.table.at[pl.ds(pl.multiple_of(part * size, size), size)],
        refs.table_parts.at[pl.ds(pl.multiple_of(half * size, size), size)],
        refs.table_sems.at[half],
    )


def _start_part(walk, refs, part):
    half = part & 1

    @pl.when(refs.state[TABLE_HELD + half] != part)
    def _start():
        _wait_half(walk, refs, half)  # what came ahead and was not what was wanted
        _copy(walk, refs, part, half).start()
        refs.state[TABLE_HELD + half] = part
        refs.state[TABLE_COMING + half] = 1


def _wait_half(walk, refs, half):
    @pl.when(refs.state[TABLE_COMING + half] == 1)
    def _wait():
        _copy(walk, refs, 0, half).wait()
        refs.state[TABLE_COMING + half] = 0
