# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention's cases for the compiled schedule: shapes, and what `bench._tpu_schedule` compiles.

    python -m bench._tpu_schedule bench._attention_model:compile_target v6e '{"page_size": 128}'

prints the schedule of the shipped default configuration as a tree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import pallas_paged
from pallas_paged import layout


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of the call; lengths are no part of it.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K and H.
      page_size: tokens in a page.
      max_seqs, table_width: S and M.
      num_tokens: T.
      dtype: of q and the pool.
    """

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    max_seqs: int = 64
    table_width: int = 256
    num_tokens: int = 64
    dtype: str = "bfloat16"

    def shapes(self) -> tuple[Any, ...]:
        """q, pool, kv_lens, page_indices, cu_q_lens and num_seqs, as shapes."""
        dtype = jnp.dtype(self.dtype)
        num_pages = self.max_seqs * self.table_width // 4 + 1
        pool = layout.pool_shape(
            num_pages, self.page_size, self.num_kv_heads, self.head_dim, dtype
        )
        lengths = ((self.max_seqs,), (self.max_seqs, self.table_width), (self.max_seqs + 1,), (1,))
        return (
            jax.ShapeDtypeStruct((self.num_tokens, self.num_heads, self.head_dim), dtype),
            jax.ShapeDtypeStruct(pool, dtype),
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in lengths),
        )

    def step(self, *arrays: jax.Array) -> jax.Array:
        """The public call, as a function of `shapes()`."""
        return pallas_paged.ragged_paged_attention(
            *arrays, sm_scale=self.head_dim**-0.5, num_kv_heads=self.num_kv_heads,
            backend="mosaic_tpu",
        )


def compile_target(**fields: Any):
    """What `bench._tpu_compile.Job` compiles: a case, by its fields."""
    case = Case(**fields)
    return case.step, case.shapes(), {}
