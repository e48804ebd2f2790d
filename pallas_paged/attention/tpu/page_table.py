# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The page table: in SMEM whole, or, where it is longer, streamed into it in parts.

Two parts are in SMEM at a time, each in the half that its number's parity names, so that an entry's
place follows from its number alone. Sequences are walked in order, so the part behind the one that
is used comes in meanwhile.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.attention.tpu.refs import (
    TABLE_COMING,
    TABLE_HELD,
    Refs,
    Walk,
    div,
)

_OUTSIDE = -(2**31)  # of a page id: outside the pool


def entry(walk: Walk, refs: Refs, i):
    """An entry of the flat page table; of a streamed one it has been brought."""
    if not walk.table_part:
        return refs.table[i]
    return refs.table_parts[i & (2 * walk.table_part - 1)]


def prepare(page_indices, num_pages: int, page_size: int, *, writes: bool):
    """The flat page table as the kernel gets it: what is read is inside the pool whatever ids say.

    A call that only reads takes another page's id for one outside the pool. One that writes must
    also see which tokens it may not write: such an id has its highest bit set, which a product with
    an even page size loses; with an odd one the kernel checks the ids itself.
    """
    ids = page_indices.reshape(-1)
    if writes and page_size % 2:
        return ids
    inside = inside_pool(ids, num_pages)
    return jnp.where(ids == inside, ids, inside | _OUTSIDE) if writes else inside


def inside_pool(page_ids, num_pages: int):
    """Page ids, those outside of the pool replaced by one inside."""
    unsigned = page_ids.astype(jnp.uint32)  # in which none is negative
    return jnp.minimum(unsigned, jnp.uint32(num_pages - 1)).astype(jnp.int32)


def page_row(walk: Walk, refs: Refs, i):
    """The pool's row where the page of an entry begins, inside the pool whatever the table says."""
    page_id = entry(walk, refs, i)
    if walk.new is not None and walk.page_size % 2:
        page_id = inside_pool(page_id, walk.num_pages)
    return page_id * walk.page_size


def start(refs: Refs):
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
