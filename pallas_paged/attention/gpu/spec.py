# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the GPU attention kernels know when they are traced: sizes, options and block sizes."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_paged import layout
from pallas_paged.attention.gpu.config import GpuAttentionConfig
from pallas_paged.attention.options import AttentionOptions

# A ref of a kernel, or a view of one.
Ref = Any
# An int, or a traced int32 scalar.
Scalar = Any

# The rows of the smallest product of the matrix unit. One warpgroup holds its result.
WARPGROUP_ROWS = 64
# Tensor copies to and from tiles of the matrix unit start at multiples of its 8 rows.
ROW_TILE = 8
# The threads of a warpgroup, which loads whole multiples of them.
WARPGROUP = 128
# The most tokens in a tensor copy that swizzles: a KV block arrives sooner in multiple copies.
_MAX_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class KvBlockSizes:
    """The KV blocks of one kernel, and how many of them are in shared memory at a time.

    Attributes:
      block_kv: the keys of a block.
      num_stages: blocks in the dtype of the products.
      num_raw_stages: blocks of a quantised pool as they arrive; 0 for another pool.
    """

    block_kv: int
    num_stages: int
    num_raw_stages: int


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """The static parameters of both kernels.

    Attributes:
      num_heads, head_dim: N, and H as the pool has it.
      num_pages, page_size, table_width: P, page_size and M.
      q_dtype, pool_dtype: the dtype of q and of the output, and that of the pool.
      product_dtype: the dtype of the matrix unit's operands, bfloat16 or float16.
      options: the call's options.
      config: the block sizes.
      num_multiprocessors: those of the GPU that the call is made for.
      is_interpreted: whether Pallas interprets the kernels, which cannot run inline Mosaic code.
    """

    num_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    table_width: int
    q_dtype: jnp.dtype
    pool_dtype: jnp.dtype
    product_dtype: jnp.dtype
    options: AttentionOptions
    config: GpuAttentionConfig
    num_multiprocessors: int
    is_interpreted: bool = False

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.options.num_kv_heads

    @property
    def group(self) -> int:
        """G, the query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_dim(self) -> int:
        """The values of K and V of one head, which lie side by side in a slot."""
        return 2 * self.head_dim

    @property
    def is_quantized(self) -> bool:
        """Whether the pool holds 8-bit values."""
        return layout.is_quantized(self.pool_dtype)

    @property
    def capacity(self) -> int:
        """The tokens that a sequence's row of the page table has room for."""
        return min(self.table_width * self.page_size, 2**31 - 2**16)

    @property
    def max_short(self) -> int:
        """The new tokens of the longest sequence that the decode kernel takes.

        The query heads of a group for all these tokens fit the rows of one warpgroup.
        """
        return WARPGROUP_ROWS // self.group

    @property
    def has_prefills(self) -> bool:
        """Whether a sequence may have more new tokens than the decode kernel takes."""
        most = self.options.max_seqlen_q
        return most is None or most > self.max_short

    def chunk(self, block_kv: int) -> int:
        """The tokens that one copy brings: a page of a KV block, or an equal part of the page."""
        chunk = math.gcd(self.page_size, block_kv)
        return chunk if self.is_quantized else math.gcd(chunk, _MAX_CHUNK)

    @property
    def decode_kv(self) -> KvBlockSizes:
        """The KV blocks of each pipeline of the decode kernel."""
        config = self.config
        num_raw = config.decode_raw_stages if self.is_quantized else 0
        return KvBlockSizes(config.decode_block_kv, config.decode_stages, num_raw)

    @property
    def decode_roles(self) -> int:
        """The warpgroups of each pipeline: consumer, producer, converter of a quantised pool."""
        return 2 + self.is_quantized

    @property
    def has_decode_queries_in_registers(self) -> bool:
        """Whether a consumer of the decode kernel keeps its queries in registers.

        This leaves room in shared memory for pages. A consumer that shares the registers with
        another pipeline, or that sums values of 256 columns, has no registers left for them.
        """
        return self.is_quantized and self.head_dim <= 128

    @property
    def prefill_kv(self) -> KvBlockSizes:
        """The KV blocks of the prefill kernel."""
        config = self.config
        num_raw = config.prefill_raw_stages if self.is_quantized else 0
        return KvBlockSizes(config.prefill_block_kv, config.prefill_stages, num_raw)

    @property
    def prefill_consumers(self) -> int:
        """The consuming warpgroups of a thread block of the prefill kernel.

        There are two, or one where the sum of the values takes a quarter of the registers and the
        converter's warpgroup leaves too few at the start.
        """
        return 1 if self.is_quantized and self.head_dim == 256 else 2

    @property
    def block_q(self) -> int:
        """The rows of a q tile of the prefill kernel."""
        return self.prefill_consumers * WARPGROUP_ROWS
