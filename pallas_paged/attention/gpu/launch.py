# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on Hopper: a schedule, short sequences split evenly, then tiles of rows.

A batch of any mix takes three launches, none of which needs the host to know a length: XLA computes
the schedule; the decode kernel takes the sequences whose new tokens fit the rows of one warpgroup
and cuts their keys evenly over the chip; the prefill kernel puts together what that cut, takes the
other sequences, tile by tile, and zeroes the rows of none.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import dispatch, layout
from pallas_paged.attention.gpu import decode, prefill
from pallas_paged.attention.gpu.config import GpuAttentionConfig, default_config
from pallas_paged.attention.gpu.schedule import (
    ROW_TILE,
    WARPGROUP_ROWS,
    Shape,
    make_schedule,
    per_head,
)
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from pallas_paged.kv_write.gpu import launch as writes
from pallas_paged.unfused import unfused

_HEAD_DIMS = (64, 128, 256)
# Shared memory that one block of threads may have, less what barriers take.
_SHARED_BYTES = 227 * 1024 - 1024


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the kernels are launched with; static.

    Attributes:
      shape: the static description of the call.
      config: the block sizes.
      num_multiprocessors: of the GPU that the call is made for.
    """

    shape: Shape
    config: GpuAttentionConfig
    num_multiprocessors: int


def plan(
    q: jax.Array,
    kv_pages: jax.Array,
    page_indices: jax.Array,
    options: AttentionOptions,
    config: GpuAttentionConfig | None = None,
    k: jax.Array | None = None,
) -> dispatch.Plan:
    """What the kernels are launched with for a call of these shapes, or why they cannot run.

    The arrays may be `jax.ShapeDtypeStruct`s: nothing is traced.

    Args:
      q: [T, N, H].
      kv_pages: [P, page_size, R, C].
      page_indices: int32[S, M].
      options: the static options.
      config: the block sizes; None lets `default_config` choose.
      k: the new keys of a call that writes them, by another kernel.

    Returns:
      a `Plan` whose `spec` is a `Launch`.
    """
    refusal = dispatch.why_no_mosaic_gpu() or _refusal(
        q, kv_pages, page_indices, options.num_kv_heads
    )
    if refusal is None and k is not None:
        refusal = writes.unsupported_pool(kv_pages, q)
    if refusal is not None:
        return dispatch.Plan(refusal=refusal)
    shape = Shape(
        num_heads=q.shape[1],
        num_kv_heads=options.num_kv_heads,
        head_dim=layout.padded_head_dim(q.shape[2]),
        num_pages=kv_pages.shape[0],
        page_size=kv_pages.shape[1],
        table_width=page_indices.shape[1],
        q_dtype=jnp.dtype(q.dtype),
        product_dtype=jnp.dtype(q.dtype),
        pool_dtype=jnp.dtype(kv_pages.dtype),
        causal=options.causal,
        soft_cap=options.soft_cap,
        is_scale_positive=options.is_scale_positive,
        has_window=options.has_window,
        return_lse=options.return_lse,
        is_interpreted=False,
    )
    if config is not None:
        refusal = _refusal_of_sizes(shape, config)
        if refusal is not None:
            return dispatch.Plan(refusal=refusal)
    sizes = config or default_config(
        shape.head_dim, shape.is_quantized, page_indices.shape[0], shape.page_size
    )
    return dispatch.Plan(spec=Launch(shape, sizes, dispatch.num_multiprocessors()))


def _refusal(
    q: jax.Array, kv_pages: jax.Array, page_indices: jax.Array, num_kv_heads: int
) -> str | None:
    """Why the kernels cannot run a call with any block sizes, as a sentence; None if they can."""
    num_heads, head_dim = q.shape[1], layout.padded_head_dim(q.shape[2])
    _, page_size, num_rows, _ = kv_pages.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype} and the matrix unit takes bfloat16 and float16: cast q"
    if kv_pages.dtype not in (q.dtype, jnp.float8_e4m3fn, jnp.float8_e5m2):
        return (
            f"the pool is {kv_pages.dtype} and q {q.dtype}; the kernels take a pool of q's dtype, "
            "float8_e4m3fn or float8_e5m2"
        )
    if head_dim not in _HEAD_DIMS:
        return (
            f"head_dim is {q.shape[2]} and the kernels take up to {_HEAD_DIMS[-1]}: split the "
            "heads or use the oracle"
        )
    if page_size % ROW_TILE:
        return (
            f"page_size is {page_size}, and a page must be whole tiles of the matrix unit, "
            f"multiples of {ROW_TILE} tokens"
        )
    if head_dim > layout.HALF_LANES and num_rows % 2:
        return (
            f"the pool has R = {num_rows} rows a slot and K and V of a head are a pair of rows; "
            "make it with make_kv_pages"
        )
    group = num_heads // num_kv_heads
    if group > WARPGROUP_ROWS:
        return (
            f"{group} query heads read one KV head, and the decode kernel holds at most "
            f"{WARPGROUP_ROWS} in the rows of its products"
        )
    max_seqs, table_width = page_indices.shape
    if max_seqs * num_kv_heads * -(-table_width * page_size // 64) >= 2**31:
        return (
            f"page_indices [{max_seqs}, {table_width}] has room for 2**31 blocks of keys or more, "
            "and blocks are counted in int32"
        )
    return None


def _refusal_of_sizes(shape: Shape, config: GpuAttentionConfig) -> str | None:
    """Why the kernels cannot run with a caller's block sizes, as a sentence; None if they can."""
    if shape.is_quantized and config.decode_pipelines > 1:
        return (
            f"config has {config.decode_pipelines} decode pipelines, and where a pool is "
            "converted there are registers for one"
        )
    for name, needed in zip(("prefill", "decode"), _shared_bytes(shape, config), strict=True):
        if needed > _SHARED_BYTES:
            return (
                f"config's {name} blocks take {needed} bytes of shared memory, and a "
                f"multiprocessor has {_SHARED_BYTES} for them: fewer slots or keys"
            )
    return None


def _shared_bytes(shape: Shape, config: GpuAttentionConfig) -> tuple[int, int]:
    """Shared memory that a block of threads of the prefill and of the decode kernel takes."""

    def ring(block_kv, slots, raw_stages):
        raw = raw_stages if shape.is_quantized else 0
        per_key = slots * shape.q_dtype.itemsize + raw * shape.pool_dtype.itemsize
        return block_kv * shape.kv_dim * per_key

    queries = WARPGROUP_ROWS * shape.head_dim * shape.q_dtype.itemsize
    return (
        prefill.num_consumers(shape) * queries
        + ring(config.prefill_block_kv, config.prefill_stages, config.prefill_raw_stages),
        config.decode_pipelines
        * (
            (not decode.queries_in_registers(shape)) * queries
            + ring(config.decode_block_kv, config.decode_stages, config.decode_raw_stages)
        ),
    )


def attend(
    spec: Launch,
    q: jax.Array,
    new: None,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
) -> tuple[jax.Array, jax.Array | None, None]:
    """Prepares the operands and launches the kernels.

    Args:
      spec: of `plan`.
      q: [T, N, H].
      new: None: new keys and values are in the pool already.
      kv_pages: [P, page_size, R, C].
      batch, factors: what else the call is given.

    Returns:
      the output, q's dtype [T, N, H], the log-sum-exp f32[T, N] or None, and None.
    """
    shape, config = spec.shape, spec.config
    num_tokens, _, head_dim = q.shape
    kv_lens, page_indices, cu_q_lens, num_seqs = batch
    sm_scale, sliding_window, k_scale, v_scale, sinks = factors
    # Tensor copies see rows in tiles of 8, and heads as wide as the pool has them; a batch of other
    # sizes is copied.
    q = jnp.pad(layout.pad_heads(q), ((0, -num_tokens % ROW_TILE), (0, 0), (0, 0)))
    operands: dict[str, Any] = {
        "q": q,
        "kv": per_head(kv_pages, shape),
        "table": page_indices,
        "sm_scale": jnp.asarray(sm_scale, jnp.float32).reshape(1),
    }
    if shape.has_window:
        operands["window"] = jnp.asarray(sliding_window, jnp.int32).reshape(1)
    if shape.is_quantized:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                operands[name] = jnp.asarray(scale, jnp.float32).reshape(-1)
    if sinks is not None:
        operands["sinks"] = sinks.astype(jnp.float32)
    operands |= {"kv_lens": kv_lens, "cu_q_lens": cu_q_lens, "num_seqs": num_seqs}
    operands["schedule"] = make_schedule(
        kv_lens,
        cu_q_lens,
        num_seqs,
        sliding_window,
        q.shape[0],
        shape,
        config.decode_block_kv,
        prefill.tile_rows(shape),
    )

    launch = functools.partial(_launch, shape, config, spec.num_multiprocessors)
    out, lse = lax.platform_dependent(
        operands,
        cuda=functools.partial(launch, False),
        default=functools.partial(launch, True),
    )
    return out[:num_tokens, :, :head_dim], (lse[:num_tokens] if shape.return_lse else None), None


def _launch(shape: Shape, config: GpuAttentionConfig, num_sms: int, is_interpreted: bool, operands):
    """The two kernels; the first leaves holes for the second, which updates the output in place."""
    shape = dataclasses.replace(shape, is_interpreted=is_interpreted)
    operands = unfused(operands)
    out, lse, means, sums, merges = decode.decode(shape, config, num_sms, operands)
    parts = {"means": means.reshape(len(means), -1), "sums": sums.reshape(len(sums), -1)}
    out_ref, lse_ref = jax.new_ref(out), None if lse is None else jax.new_ref(lse)
    prefill.prefill(shape, config, num_sms, operands | parts | {"merges": merges}, out_ref, lse_ref)
    return unfused((jax.ref.freeze(out_ref), None if lse_ref is None else jax.ref.freeze(lse_ref)))
