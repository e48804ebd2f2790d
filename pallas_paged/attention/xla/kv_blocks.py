# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The keys and values of a group of query tiles, gathered from the pool a block at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_paged import bits, layout
from pallas_paged.attention.xla.spec import XlaSpec


class Keys(NamedTuple):
    """Where the keys of a group of tiles are.

    Attributes:
      kv_pages: [P, page_size, R, C], the pool.
      table: int32[I, M], the pages of each tile's sequence.
      kv_len: int32[I], its tokens.
    """

    kv_pages: jax.Array
    table: jax.Array
    kv_len: jax.Array


def read_block(
    spec: XlaSpec, keys: Keys, block: jax.Array, first: jax.Array, end: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """k and v [I, block_kv, K, H] of one KV block of each tile; 0 outside of keys [first, end)."""
    num_pages, page_size = keys.kv_pages.shape[:2]
    pages_per_block = spec.block_kv // page_size
    column = block * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
    pages = keys.table[:, jnp.minimum(column, keys.table.shape[1] - 1)]
    key = block * spec.block_kv + jnp.arange(spec.block_kv, dtype=jnp.int32)
    pages = jnp.clip(pages, 0, num_pages - 1)
    is_key = (key >= first[:, None]) & (key < end[:, None])
    return _gather(spec, keys.kv_pages, pages, is_key)


def read_tile(spec: XlaSpec, keys: Keys, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k and v [I, block_q, K, H] of the keys from `position` int32[I] on; 0 after the last."""
    num_pages, page_size = keys.kv_pages.shape[:2]
    key = position[:, None] + jnp.arange(spec.block_q, dtype=jnp.int32)
    column = jnp.clip(key // page_size, 0, keys.table.shape[1] - 1)
    pages = jnp.clip(jnp.take_along_axis(keys.table, column, axis=1), 0, num_pages - 1)
    slots = pages * page_size + key % page_size
    one_per_page = layout.flatten_slots(keys.kv_pages)[:, None]
    return _gather(spec, one_per_page, slots, key < keys.kv_len[:, None])


def _gather(
    spec: XlaSpec, kv_pages: jax.Array, pages: jax.Array, is_key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """k and v [I, L, K, H] of pages int32[I, n]; 0 where bool[I, L] says that there is no key.

    K and V are gathered apart from each other, so that each is written once, as a product takes it.
    """
    num_pages, page_size, num_rows, _ = kv_pages.shape
    num_kv_heads, head_dim = spec.options.num_kv_heads, spec.head_dim
    dtype = kv_pages.dtype
    kv_pages, pages = bits.gatherable(kv_pages, pages)
    if layout.packs_kv_in_row(head_dim):
        v_lane = layout.HALF_LANES
        k = kv_pages[pages, :, :num_kv_heads, :head_dim]
        v = kv_pages[pages, :, :num_kv_heads, v_lane : v_lane + head_dim]
    elif num_rows % 2 == 0:
        pairs = kv_pages.reshape(num_pages, page_size, num_rows // 2, 2, -1)
        k, v = (pairs[pages, :, :num_kv_heads, i, :head_dim] for i in (0, 1))
    else:
        k, v = layout.split_kv(kv_pages[pages], num_kv_heads, head_dim)

    def as_operand(x: jax.Array) -> jax.Array:
        x = x.view(dtype).reshape(*is_key.shape, num_kv_heads, head_dim)
        # Selected and not multiplied by 0, because an unused slot may hold NaN.
        return jnp.where(is_key[..., None, None], x.astype(spec.dtype), 0)

    return as_operand(k), as_operand(v)
