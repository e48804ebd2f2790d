# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the GPU attention kernels know when they are traced, and the schedule that XLA gives them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged import layout

# Rows of the matrix unit's smallest product, which one warpgroup of 128 threads holds.
WARPGROUP_ROWS = 64
# Tensor copies to and from tiles of the matrix unit start at multiples of its 8 rows.
ROW_TILE = 8
# A warpgroup loads whole multiples of its threads.
WARPGROUP = 128
LOG2E = math.log2(math.e)
# Below any score: exp2 of it is 0, and its differences stay finite.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static side of a call.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K and H.
      num_pages, page_size, table_width: P, page_size and M.
      q_dtype, pool_dtype: of q and the output, of the pool.
      causal: whether a query sees no later key.
      soft_cap: bound on the scores, or None.
      has_window: whether a sliding window is given.
      return_lse: whether the log-sum-exp is written.
      is_interpreted: whether Pallas interprets the kernel, which cannot run inline Mosaic code.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    table_width: int
    q_dtype: jnp.dtype
    pool_dtype: jnp.dtype
    causal: bool
    soft_cap: float | None
    has_window: bool
    return_lse: bool
    is_interpreted: bool

    @property
    def group(self) -> int:
        """G, query heads to one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_dim(self) -> int:
        """Values of K and V of one head, which lie side by side in a slot."""
        return 2 * self.head_dim

    @property
    def is_quantized(self) -> bool:
        return layout.is_quantized(self.pool_dtype)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's row of the page table has room for."""
        return min(self.table_width * self.page_size, 2**31 - 2**16)

    @property
    def max_short(self) -> int:
        """New tokens of the longest sequence that the decode kernel takes: all heads of a group in
        the rows of one warpgroup."""
        return WARPGROUP_ROWS // self.group

    def piece(self, block: int) -> int:
        """Tokens that one copy brings: of a block, and of one page."""
        return math.gcd(self.page_size, block)


def tiling(dtype: Any) -> tuple[Any, ...]:
    """The form of an operand of the matrix unit in shared memory: 8 rows of 128 swizzled bytes."""
    return (
        plgpu.TilingTransform((ROW_TILE, 128 // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(128),
    )


def per_head(kv_pages: jax.Array, shape: Shape) -> jax.Array:
    """The pool as `[P, page_size, heads, 2H]`, K and V of a head side by side: no copy."""
    return kv_pages.reshape(*kv_pages.shape[:2], -1, shape.kv_dim)


# The rows of the schedule.
BLOCKS, TILES, FIRST_ROW, END_ROW, LENGTH = range(5)


def make_schedule(
    kv_lens: jax.Array, cu_q_lens: jax.Array, num_seqs: jax.Array, window: jax.Array | None,
    num_tokens: int, shape: Shape, block: int, tile_rows: int,
) -> jax.Array:
    """int32[5, entries], one entry a sequence, then two for rows of no sequence, then padding.

    Rows: the decode kernel's blocks of one KV head before this entry, the prefill kernel's tiles of
    one query head before it, its first row of the batch, the row after its last, its length in the
    cache. Both kernels find their work in it, so no host needs to know the lengths. All of it is
    one sum over masked entries, which XLA makes one small kernel of.
    """
    max_seqs = kv_lens.shape[0]
    is_used = jnp.arange(max_seqs) < num_seqs[0]
    cu = jnp.clip(cu_q_lens, 0, num_tokens)
    first, end = cu[:-1], jnp.where(is_used, jnp.maximum(cu[1:], cu[:-1]), cu[:-1])
    length = jnp.where(end > first, jnp.clip(kv_lens, 0, shape.capacity), 0)
    is_short = (end - first <= shape.max_short) & (length > 0)
    low = jnp.zeros_like(length)
    if window is not None:
        low = first_seen(length - (end - first), window)
    blocks = jnp.where(is_short, -(-length // block) - low // block, 0)
    # Rows of no sequence: those after the last one's, and those before the first one's.
    last = jnp.max(jnp.where(is_used, end, cu[0]))
    first = jnp.concatenate([first, jnp.stack([last, jnp.zeros_like(last)])])
    end = jnp.concatenate([end, jnp.stack([jnp.full_like(last, num_tokens), cu[0]])])
    length, blocks, is_short = (jnp.pad(x, (0, 2)) for x in (length, blocks, is_short))
    tiles = -(-(end - first // ROW_TILE * ROW_TILE) // tile_rows)
    tiles = jnp.where((end > first) & ~is_short, tiles, 0)

    entries = max_seqs + 2
    size = num_entries(max_seqs)
    target = jnp.arange(size, dtype=jnp.int32)[:, None]
    source = jnp.arange(entries, dtype=jnp.int32)
    before, same = source < target, source == target
    rows = [
        jnp.where(before, blocks, 0), jnp.where(before, tiles, 0), jnp.where(same, first, 0),
        jnp.where(same, end, 0), jnp.where(same, length, 0),
    ]
    return jnp.sum(jnp.stack(rows), axis=-1, dtype=jnp.int32)


def num_entries(max_seqs: int) -> int:
    """Entries of a schedule: one more than used, so that sums end it, in whole warpgroups."""
    return -(-(max_seqs + 3) // WARPGROUP) * WARPGROUP


def first_seen(position: jax.Array, window: jax.Array) -> jax.Array:
    """The first key that the query at a position looks back on."""
    window = jnp.clip(window, 0, 2**30)
    return jnp.maximum(position - window + 1, 0)


def named(name: str):
    """Names a kernel's function, and so the kernel in profiles."""
    def rename(body):
        body.__name__ = body.__qualname__ = name
        return body

    return rename


def of_head(scale, kv_head):
    """A scale of one KV head, of a ref f32[1] or f32[K]."""
    return scale[kv_head if scale.shape[0] > 1 else 0]


def on_gpu_rows(value: jax.Array) -> jax.Array:
    """One value to a row of a product's result, where the matrix unit's layout has them."""
    return plgpu.layout_cast(value, plgpu.Layout.WGMMA.reduce(1))


def keep_if(flag: jax.Array, x: jax.Array, other: float) -> jax.Array:
    """All of x, or `other` everywhere; the lowering does not broadcast a scalar flag."""
    return jnp.where(jax.lax.broadcast_in_dim(flag, x.shape, ()), x, other)


def over_rows(rows: jax.Array, num_columns: int) -> jax.Array:
    """One value a row, over the columns of a product's result."""
    return jax.lax.broadcast_in_dim(rows, (rows.shape[0], num_columns), [0])


iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, layout=plgpu.Layout.WGMMA)
