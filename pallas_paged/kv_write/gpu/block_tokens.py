# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which tokens a thread block takes, and the slot of each: all that the three writes differ in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.kv_write.gpu.spec import KernelSpec

Ref = Any  # jax has no public type for a kernel's ref


@dataclasses.dataclass(frozen=True)
class BlockTokens:
    """The tokens of one thread block; scalars that the kernel computes from the metadata.

    Attributes:
      first: the first token that the block fetches, in [0, T - block_tokens].
      shift: how many of the fetched tokens come before the first one that is written; the j-th
        written token is `first + shift + j`.
      slots: the slot of each written token.
      is_live: whether each of them is in fact written.
      needs_metadata: whether `first` depends on metadata, so that nothing can be fetched before
        that has come.
    """

    first: jax.Array
    shift: jax.Array
    slots: list[jax.Array]
    is_live: list[jax.Array]
    needs_metadata: bool


# of_pages, of_slices or of_tokens
FindTokens = Callable[..., BlockTokens]


def of_pages(spec: KernelSpec, block: jax.Array, page_ids: Ref, *token_starts: Ref) -> BlockTokens:
    """The tokens of a part of one page. `page_ids`, `token_starts`: int32[n], GMEM."""
    page_size, count = spec.page_size, spec.entry_block_tokens
    entry = block // spec.blocks_per_entry
    first_row = block % spec.blocks_per_entry * count
    row = jnp.minimum(first_row, page_size - count)
    page = page_ids[entry]
    is_live = (page >= 0) & (page < spec.num_pages)
    start = entry * page_size
    if spec.has_token_starts:
        start = token_starts[0][entry]
        is_live &= (start >= 0) & (start <= spec.num_tokens - page_size)
        start = jnp.where(is_live, start, 0)
    first, shift = _pull_back(spec, start + row)
    slots = [page * page_size + row + j for j in range(count)]
    is_mine: list[Any] = [True] * count
    if page_size % count:  # the last part begins with rows of the one before it
        is_mine = [row + j >= first_row for j in range(count)]
    return BlockTokens(first, shift, slots, [is_live & x for x in is_mine], spec.has_token_starts)


def of_slices(spec: KernelSpec, block: jax.Array, slices: Ref, num_slices: Ref) -> BlockTokens:
    """The tokens of a part of one slice. `slices`: int32[3, n], `num_slices`: int32[1], GMEM."""
    count = spec.entry_block_tokens
    entry, offset = block // spec.blocks_per_entry, block % spec.blocks_per_entry * count
    slot, start, length = (slices[i, entry] for i in range(3))
    is_live = (entry < num_slices[0]) & (slot >= 0) & (slot < spec.num_slots)
    is_live &= (length >= 1) & (length <= spec.entry_tokens)
    is_live &= slot % spec.page_size <= spec.page_size - length
    is_live &= (start >= 0) & (start <= spec.num_tokens - length)
    is_live &= offset < length
    first, shift = _pull_back(spec, jnp.where(is_live, start + offset, 0))
    return BlockTokens(
        first,
        shift,
        [slot + offset + j for j in range(count)],
        [is_live & (offset + j < length) for j in range(count)],
        needs_metadata=True,
    )


def of_tokens(spec: KernelSpec, block: jax.Array, slots: Ref) -> BlockTokens:
    """Consecutive tokens, whatever their slots. `slots`: int32[T], GMEM."""
    count = spec.entry_block_tokens
    start = jnp.minimum(block * count, spec.num_tokens - count)
    mine = [slots[start + j] for j in range(count)]
    is_live = [
        (slot >= 0) & (slot < spec.num_slots) & (start + j >= block * count)
        for j, slot in enumerate(mine)
    ]
    first, shift = _pull_back(spec, start)
    return BlockTokens(first, shift, mine, is_live, needs_metadata=False)


def _pull_back(spec: KernelSpec, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, shift) of tokens from `start` on, so that a whole block of tokens can be fetched."""
    last = max(spec.num_tokens, spec.block_tokens) - spec.block_tokens
    first = jnp.minimum(start, last)
    return first, start - first
