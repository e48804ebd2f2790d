# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the GPU attention kernels know when they are traced, and the schedule XLA gives them."""

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
# Tokens at most of a copy that swizzles: a block in several copies arrives sooner than in one.
_MAX_PIECE = 32
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
      product_dtype: of the matrix unit's operands, bfloat16 or float16.
      causal: whether a query sees no later key.
      soft_cap: bound on the scores, or None.
      is_scale_positive: whether the factor on the scores is known to be above 0.
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
    product_dtype: jnp.dtype
    causal: bool
    soft_cap: float | None
    is_scale_positive: bool
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
        piece = math.gcd(self.page_size, block)
        return piece if self.is_quantized else math.gcd(piece, _MAX_PIECE)


def tiling(dtype: Any) -> tuple[Any, ...]:
    """The form of an operand of the matrix unit in shared memory: 8 rows of 128 swizzled bytes."""
    transforms: tuple[Any, ...] = (plgpu.TilingTransform, plgpu.SwizzleTransform)
    tile, swizzle = transforms
    return tile((ROW_TILE, 128 // jnp.dtype(dtype).itemsize)), swizzle(128)


def per_head(kv_pages: jax.Array, shape: Shape) -> jax.Array:
    """The pool as `[P, page_size, heads, 2H]`, K and V of a head side by side: no copy."""
    return kv_pages.reshape(*kv_pages.shape[:2], -1, shape.kv_dim)


# The rows of the schedule.
BLOCKS, TILES = range(2)


def make_schedule(
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    window: jax.Array | None,
    num_tokens: int,
    shape: Shape,
    block: int,
    tile_rows: int,
) -> jax.Array:
    """int32[2, S + 1]: work before each sequence, and in all.

    Rows: blocks of one KV head for the decode kernel, tiles of one query head for the prefill
    kernel. Both kernels find their work in it, so no host needs to know the lengths. Written as one
    sum over masked entries, because XLA makes one small kernel of that and three of prefix sums.
    """
    max_seqs = kv_lens.shape[0]
    seq = jnp.arange(max_seqs, dtype=jnp.int32)
    lengths = Lengths(kv_lens, cu_q_lens, num_seqs, num_tokens, shape)
    begin, end, length = lengths.of(slice(0, max_seqs), slice(1, max_seqs + 1))
    is_used = (seq < num_seqs[0]) & (end > begin)
    is_short = (end - begin <= shape.max_short) & (length > 0)
    low = 0 if window is None else first_seen(length - (end - begin), window)
    # A window of 0, which only a traced one can be, leaves no block, but rows to be zeroed.
    blocks = jnp.maximum(-(-length // block) - low // block, 1)
    tiles = -(-(end - begin // ROW_TILE * ROW_TILE) // tile_rows)
    counts = jnp.stack(
        [jnp.where(is_used & is_short, blocks, 0), jnp.where(is_used & ~is_short, tiles, 0)]
    )
    is_before = seq < jnp.arange(max_seqs + 1, dtype=jnp.int32)[:, None]
    return jnp.sum(jnp.where(is_before, counts[:, None], 0), axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The metadata of a batch, brought into bounds whatever it says; arrays or refs.

    Attributes:
      kv_lens: int32[S].
      cu_q_lens: int32[S + 1].
      num_seqs: int32[1].
      num_tokens: T.
      shape: the static description.
    """

    kv_lens: Any
    cu_q_lens: Any
    num_seqs: Any
    num_tokens: int
    shape: Shape

    def of(self, seq, following=None) -> tuple[Any, Any, Any]:
        """(begin, end, length): rows of the batch and tokens in the cache of a sequence."""
        begin = self.row(seq)
        end = jnp.maximum(begin, self.row(seq + 1 if following is None else following))
        return begin, end, jnp.clip(self.kv_lens[seq], 0, self.shape.capacity)

    def row(self, seq):
        """A sequence's first row."""
        return jnp.clip(self.cu_q_lens[seq], 0, self.num_tokens)


def search(sums, row: int, size: int, value, scale: int):
    """The last i < size with `sums[row, i] * scale <= value`, of sums that grow from 0.

    Sixteen places at a time: each step waits for the memory once.
    """
    found = jnp.int32(0)
    width = 16
    stride = 1
    while stride * width < size:
        stride *= width
    while stride:
        places = [jnp.minimum(found + j * stride, size) for j in range(1, width)]
        reached = [sums[row, place] for place in places]
        steps = [
            jnp.where((place < size) & (sum_before * scale <= value), 1, 0)
            for place, sum_before in zip(places, reached, strict=True)
        ]
        found += stride * sum(steps)
        stride //= width
    return found


def first_seen(position: jax.Array, window: jax.Array) -> jax.Array:
    """The first key that the query at a position looks back on."""
    return jnp.maximum(position - clip_window(window) + 1, 0)


def clip_window(window: jax.Array) -> jax.Array:
    """A window whose differences with positions stay in int32, 2**31 - 1 for "all" included."""
    return jnp.clip(window, 0, 2**30)


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
