# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The writes' cases: which op writes how many new tokens to pages of which size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_paged
from bench.cases.rounding import ceil_div
from pallas_paged import layout

# page_write, page_write with token_starts, slice_write of page-long slices, and token_write.
OPS = ("page", "page_starts", "slice", "token")
# What `python -m bench.kv_write` goes through unless it is told otherwise.
GENERATIONS = ("v5e", "v6e", "tpu7x")
PAGE_SIZES = (16, 32, 64, 128, 256)
TOKENS = (64, 1024, 8192, 65536)
NUM_KV_HEADS, HEAD_DIM, DTYPE = 8, 128, "bfloat16"


@dataclasses.dataclass(frozen=True)
class WriteCase:
    """One write: `num_tokens` new tokens to pages of `page_size`, all pages whole and in order.

    Attributes:
      op: one of `OPS`.
      generation: a key of `bench.tpu_model.schedule.GENERATIONS`.
      page_size: tokens per page.
      num_tokens: new tokens of the call.
      num_kv_heads: K.
      head_dim: H.
      dtype: of k, v and the pool.
      is_flat: whether k and v are [T, K*H] rather than [T, K, H].
    """

    op: str
    generation: str
    page_size: int
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    is_flat: bool = True

    @property
    def num_pages(self) -> int:
        """Whole pages that are written; tokens after the last whole page are not in the case."""
        return self.num_tokens // self.page_size

    @property
    def num_bytes(self) -> int:
        """HBM bytes: the k and v that are read, and the slots that are written."""
        tokens = self.num_tokens if self.op == "token" else self.num_pages * self.page_size
        itemsize = jnp.dtype(self.dtype).itemsize
        _, _, rows, lanes = self._pool_shape
        return tokens * itemsize * (2 * self.num_kv_heads * self.head_dim + rows * lanes)

    @property
    def _pool_shape(self) -> tuple[int, int, int, int]:
        pages = 2 * max(1, ceil_div(self.num_tokens, self.page_size))
        return layout.pool_shape(
            pages, self.page_size, self.num_kv_heads, self.head_dim, self.dtype
        )

    def shapes(self) -> tuple[Any, ...]:
        """What `step` takes, as shapes: the pool, k, v and the op's indices."""
        heads: tuple[int, ...] = (self.num_kv_heads, self.head_dim)
        if self.is_flat:
            heads = (math.prod(heads),)
        new = (self.num_tokens, *heads)
        indices: dict[str, list[tuple[int, ...]]] = {
            "page": [(self.num_pages,)],
            "page_starts": [(self.num_pages,), (self.num_pages,)],
            "slice": [(3, self.num_pages), (1,)],
            "token": [(self.num_tokens,)],
        }
        dtype = jnp.dtype(self.dtype)
        return (
            jax.ShapeDtypeStruct(self._pool_shape, dtype),
            *(jax.ShapeDtypeStruct(new, dtype) for _ in "kv"),
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in indices[self.op]),
        )

    def step(self, backend: str) -> Callable[..., jax.Array]:
        """The public call, as a function of `shapes()`."""
        writes: dict[str, Callable[..., jax.Array]] = {
            "page": pallas_paged.page_write,
            "page_starts": pallas_paged.page_write,
            "slice": pallas_paged.slice_write,
            "token": pallas_paged.token_write,
        }
        write = writes[self.op]

        def call(kv_pages: jax.Array, *arrays: jax.Array) -> jax.Array:
            return write(kv_pages, *arrays, num_kv_heads=self.num_kv_heads, backend=backend)

        return call
