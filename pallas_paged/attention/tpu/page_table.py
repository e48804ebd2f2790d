# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The page table: whole in SMEM, or, where it is longer, streamed into it in parts.

Of a streamed table two parts are in SMEM at a time. A part is in the half that the parity of its
number names, so that the address of an entry follows from the entry's number alone. Sequences are
processed in order, so the part after the one in use comes in meanwhile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.attention.tpu.index_math import div
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.spec import KernelSpec

# The bit that marks a page id outside the pool.
_OUTSIDE = -(2**31)


def prepare(page_indices: jax.Array, num_pages: int, page_size: int, *, writes: bool) -> jax.Array:
    """The flat page table, int32[S*M], as the kernel gets it: every page that it reads exists.

    A call that only reads gets the id of some page in place of an id outside the pool. A call that
    writes must also see which tokens it may not write. Such an id has its highest bit set, which
    its product with an even page size loses; with an odd page size the kernel checks ids itself.
    """
    ids = page_indices.reshape(-1)
    if writes and page_size % 2:
        return ids
    inside = _inside_pool(ids, num_pages)
    return jnp.where(ids == inside, ids, inside | _OUTSIDE) if writes else inside


def _inside_pool(page_ids: jax.Array, num_pages: int) -> jax.Array:
    """Page ids, with some page of the pool in place of those outside it."""
    unsigned = page_ids.astype(jnp.uint32)  # no id is negative, seen so
    return jnp.minimum(unsigned, jnp.uint32(num_pages - 1)).astype(jnp.int32)


def entry(spec: KernelSpec, refs: Refs, i: Any) -> Any:
    """Entry i of the flat page table. `bring` must have brought an entry of a streamed table."""
    if not spec.table_part:
        return refs.page_table[i]
    return refs.table_parts[i & (2 * spec.table_part - 1)]


def page_row(spec: KernelSpec, refs: Refs, i: Any) -> Any:
    """The pool's row where the page of entry i begins, inside the pool whatever the table says."""
    page_id = entry(spec, refs, i)
    if spec.writes and spec.page_size % 2:
        page_id = _inside_pool(page_id, spec.num_pages)
    return page_id * spec.page_size


def start(refs: Refs) -> None:
    """Notes that no part of a streamed table is in SMEM yet."""
    for half in range(2):
        refs.state.table_part[half] = -1
        refs.state.table_in_flight[half] = 0


def bring(spec: KernelSpec, refs: Refs, first: Any, last: Any) -> None:
    """Brings the entries from `first` to `last`, fewer than a part has, into SMEM.

    They stay there until the next call.
    """
    for part in (div(first, spec.table_part), div(last, spec.table_part)):
        _start_part(spec, refs, part)
        _wait_half(spec, refs, part & 1)
    following = div(last, spec.table_part) + 1
    num_parts = refs.page_table.shape[0] // spec.table_part
    # The following part may not replace the one that `first` is in.
    is_free = (following < num_parts) & (div(first, spec.table_part) == following - 1)
    pl.when(is_free)(lambda: _start_part(spec, refs, following))


def finish(spec: KernelSpec, refs: Refs) -> None:
    """Waits for the parts that are still on their way."""
    for half in range(2):
        _wait_half(spec, refs, half)


def _copy(spec: KernelSpec, refs: Refs, part: Any, half: Any) -> Any:
    size = spec.table_part
    return pltpu.make_async_copy(
        refs.page_table.at[pl.ds(pl.multiple_of(part * size, size), size)],
        refs.table_parts.at[pl.ds(pl.multiple_of(half * size, size), size)],
        refs.table_sems.at[half],
    )


def _start_part(spec: KernelSpec, refs: Refs, part: Any) -> None:
    half = part & 1

    @pl.when(refs.state.table_part[half] != part)
    def _start() -> None:
        _wait_half(spec, refs, half)  # for a part that came ahead and was not the next one used
        _copy(spec, refs, part, half).start()
        refs.state.table_part[half] = part
        refs.state.table_in_flight[half] = 1


def _wait_half(spec: KernelSpec, refs: Refs, half: Any) -> None:
    @pl.when(refs.state.table_in_flight[half] == 1)
    def _wait() -> None:
        _copy(spec, refs, 0, half).wait()
        refs.state.table_in_flight[half] = 0
