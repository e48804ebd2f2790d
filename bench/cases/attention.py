# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention's cases: the heads of models, lengths of sequences, and the calls they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_paged
from pallas_paged import layout
from pallas_paged.attention.gpu import launch as mosaic_gpu
from pallas_paged.attention.options import AttentionOptions
from pallas_paged.attention.tpu import launch as mosaic_tpu
from pallas_paged.attention.tpu.operands import Heads

# Bytes of q below which XLA may put it into VMEM before the kernel, which would be another kernel.
MIN_Q_BYTES = 2**24
# The rows that these are with 32 heads of 128 in bfloat16. Calls with narrower rows get more rows
# when they are compiled for a TPU.
_MIN_TOKENS = MIN_Q_BYTES // (32 * 128 * 2)
# Heads of models as one chip sees them, and what else is theirs.
PRESETS: dict[str, dict[str, Any]] = {
    "llama3-8b": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "llama3-70b-tp8": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 128},
    "qwen3-32b-tp4": {"num_heads": 16, "num_kv_heads": 2, "head_dim": 128},
    "gemma-window": {  # the local layers of Gemma 2 9B
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 256,
        "sliding_window": 4096,
        "soft_cap": 50.0,
    },
}
# (k_scale, v_scale) of 8-bit pools: what brings normal values into int8's range; fp8 needs nothing,
# but a model's calls have scales.
SCALES: dict[str, tuple[float, float]] = {
    "int8": (0.03, 0.03),
    "float8_e4m3fn": (1.0, 1.0),
    "float8_e5m2": (1.0, 1.0),
}
# (count, new tokens, all keys) of a case's sequences.
Runs = tuple[tuple[int, int, int], ...]
CASES: dict[str, Runs] = {
    "decode": ((64, 1, 4096),),
    "decode_short": ((256, 1, 512),),
    "prefill": ((1, 2048, 2048),),
    "chunked": ((1, 512, 8704),),
    "mixed": ((64, 1, 4096), (1, 512, 8704)),
}
# What is measured on a GPU in their place, where thread blocks and their number matter.
GPU_CASES: dict[str, Runs] = {
    "decode": ((64, 1, 4096),),
    "decode_few": ((16, 1, 4096),),
    "decode_one": ((1, 1, 32768),),
    "decode_many": ((256, 1, 1024),),
    "prefill_long": ((2, 8192, 8192),),
    "prefill_many": ((8, 2048, 2048),),
    "chunked_long": ((4, 512, 8192),),
    "chunked_many": ((16, 128, 4096),),
    "chunk": ((1, 2048, 4096),),
    "mixed_chunk": ((64, 1, 4096), (1, 2048, 4096)),
}
# What is measured on a CPU, beside the oracle.
CPU_CASES: dict[str, Runs] = {
    "decode_1024": ((64, 1, 1024),),
    "prefill_256": ((8, 256, 256),),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One static form of the call; lengths are no part of it.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K and H.
      sliding_window: keys that a query looks back on; None for all.
      soft_cap: bound on the scores, or None.
      page_size: tokens in a page.
      max_seqs, table_width, num_tokens, num_pages: S, M, T and P.
      dtype: of q and the pool.
      pool_dtype: of the pool where it is another; 8-bit pools have the scales of SCALES.
      writes: whether the call writes its new tokens, `write_and_attend`.
      config: block sizes, a Config of the kernel that runs; None is the shipped choice.
    """

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    sliding_window: int | None = None
    soft_cap: float | None = None
    page_size: int = 16
    max_seqs: int = 256
    table_width: int = 544
    num_tokens: int = _MIN_TOKENS
    num_pages: int = 16385
    dtype: str = "bfloat16"
    writes: bool = False
    config: Any = None
    pool_dtype: str | None = None

    def shapes(self) -> tuple[Any, ...]:
        """q as `[T, N*H]`, pool, kv_lens, page_indices, cu_q_lens and num_seqs, as shapes; and k
        and v as `[T, K*H]` if they are written."""
        dtype = jnp.dtype(self.dtype)
        pool_dtype = jnp.dtype(self.pool_dtype or self.dtype)
        pool = layout.pool_shape(
            self.num_pages, self.page_size, self.num_kv_heads, self.head_dim, pool_dtype
        )
        lengths = ((self.max_seqs,), (self.max_seqs, self.table_width), (self.max_seqs + 1,), (1,))
        return (
            jax.ShapeDtypeStruct((self.num_tokens, self.num_heads * self.head_dim), dtype),
            jax.ShapeDtypeStruct(pool, pool_dtype),
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in lengths),
            *[jax.ShapeDtypeStruct((self.num_tokens, self.num_kv_heads * self.head_dim), dtype)]
            * (2 * self.writes),
        )

    def step(self, backend: str) -> Callable[..., Any]:
        """The public call, as a function of `shapes()`; returns the output as `[T, N*H]`, and the
        pool if it is written to.

        q and the output are what a projection makes and takes, so that no copy stands between.
        """
        options: dict[str, Any] = {
            "sm_scale": self.head_dim**-0.5,
            "sliding_window": self.sliding_window,
            "soft_cap": self.soft_cap,
            "num_kv_heads": self.num_kv_heads,
            "config": self.config,
            "backend": backend,
        }
        if self.pool_dtype in SCALES:
            options["k_scale"], options["v_scale"] = SCALES[self.pool_dtype]

        def call(q: jax.Array, pool: jax.Array, *arrays: jax.Array) -> Any:
            heads = q.reshape(-1, self.num_heads, self.head_dim)
            if not self.writes:
                out = pallas_paged.ragged_paged_attention(heads, pool, *arrays, **options)
                return out.reshape(q.shape)
            *metadata, k, v = arrays
            out, pool = pallas_paged.write_and_attend(heads, k, v, pool, *metadata, **options)
            return out.reshape(q.shape), pool

        return call

    @property
    def heads(self) -> Heads:
        """The TPU kernel's description of the heads."""
        q, pool, _ = self.arrays()
        return mosaic_tpu.heads_of(q, pool, self.num_kv_heads)

    def options(self) -> AttentionOptions:
        """The static options, as the public op makes them."""
        return AttentionOptions(
            self.num_kv_heads,
            soft_cap=self.soft_cap,
            has_window=self.sliding_window is not None,
            has_scales=self.pool_dtype in SCALES,
        )

    def unsupported(self, backend: str = "mosaic_tpu") -> str | None:
        """Why a backend's kernel cannot run the call, as a sentence; None if it can."""
        if backend == "xla":
            return None
        kernels = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}[backend]
        return kernels.plan(*self.arrays(), self.options(), self.config).refusal

    def arrays(self) -> tuple[Any, Any, Any]:
        """q as `[T, N, H]`, pool and page_indices, as shapes."""
        q, pool, _, table, *_ = self.shapes()
        heads = (self.num_tokens, self.num_heads, self.head_dim)
        return jax.ShapeDtypeStruct(heads, q.dtype), pool, table

    @property
    def slot_bytes(self) -> int:
        """Bytes of a token's slot in the pool."""
        pool = self.shapes()[1]
        _, _, rows, lanes = pool.shape
        return rows * lanes * pool.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths of the sequences of a call, and for what it is compiled.

    Attributes:
      name: for tables.
      generation: a key of `bench.tpu_model.schedule.GENERATIONS`.
      runs: (count, new tokens, all keys): that many sequences of one length, in order.
      call: the static form, with room for the lengths.
    """

    name: str
    generation: str
    runs: Runs
    call: Call

    @property
    def lens(self) -> tuple[tuple[int, int], ...]:
        """(new tokens, all keys) of each sequence."""
        return tuple((q, kv) for count, q, kv in self.runs for _ in range(count))

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(count * q for count, q, _ in self.runs)

    @property
    def num_decodes(self) -> int:
        """Sequences with one new token."""
        return sum(count for count, q, _ in self.runs if q == 1)

    @property
    def all_flop(self) -> int:
        """Operations of both products over every pair of query and key, masked or not."""
        pairs = sum(count * q * kv for count, q, kv in self.runs)
        return 4 * self.call.head_dim * self.call.num_heads * pairs

    @property
    def flop(self) -> int:
        """Operations of both products over the pairs that the mask lets see."""
        window = self.call.sliding_window or 2**31
        pairs = sum(
            count * sum(min(position + 1, window) for position in range(kv - q, kv))
            for count, q, kv in self.runs
        )
        return 4 * self.call.head_dim * self.call.num_heads * pairs

    @property
    def num_bytes(self) -> int:
        """HBM bytes that any kernel must move: keys and values that are seen once, q and out."""
        window = self.call.sliding_window or 2**31
        keys = sum(count * min(kv, window + q - 1) for count, q, kv in self.runs)
        row = self.call.num_heads * self.call.head_dim * jnp.dtype(self.call.dtype).itemsize
        return keys * self.call.slot_bytes + 2 * self.num_tokens * row


def room_for(runs: Sequence[Runs], page_size: int, *, is_exact: bool = False) -> dict[str, Any]:
    """Static sizes of a `Call` that any of some cases' lengths fit, so that they share a compile.

    Args:
      runs: of each case.
      page_size: tokens in a page.
      is_exact: whether T is what the lengths need; else large enough for XLA to leave q in HBM.
    """
    tokens = max(sum(count * q for count, q, _ in case) for case in runs)
    pages = max(sum(count * -(-kv // page_size) for count, _, kv in case) for case in runs)
    return {
        "max_seqs": max(sum(count for count, _, _ in case) for case in runs),
        "table_width": max(-(-kv // page_size) for case in runs for _, _, kv in case),
        "num_tokens": tokens if is_exact else max(tokens, _MIN_TOKENS),
        "num_pages": pages + 1,
    }
