# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on Hopper: a schedule, short sequences split evenly, then tiles of rows.

A batch of any mix takes three launches, none of which needs the host to know a length: XLA computes
the schedule; the decode kernel takes the sequences whose new tokens fit the rows of one warpgroup
and cuts their keys evenly over the chip; the prefill kernel puts together what that cut, takes the
other sequences, tile by tile, and zeroes the rows of none.
"""

__all__ = ["GpuAttentionConfig", "default_config", "ragged_paged_attention", "unsupported"]

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import dispatch, layout, tuned
from pallas_paged.attention.gpu import decode, prefill
from pallas_paged.attention.gpu.schedule import (
    ROW_TILE,
    WARPGROUP_ROWS,
    Shape,
    make_schedule,
    per_head,
)
from pallas_paged.unfused import unfused

_HEAD_DIMS = (64, 128, 256)
# Shared memory that one block of threads may have, less what barriers take.
_SHARED_BYTES = 227 * 1024 - 1024


@dataclasses.dataclass(frozen=True)
class GpuAttentionConfig:
    """Block sizes of the GPU attention.

    Attributes:
      prefill_block_keys, decode_block_keys: keys that are attended to at a time, 64 or 128.
      prefill_slots, decode_slots: blocks in shared memory: those being computed, the others on
        their way.
      prefill_raw_slots, decode_raw_slots: blocks of a quantised pool on their way.
      decode_pipelines: pipelines of the decode kernel that share a multiprocessor, 1 or 2, and 1
        for a quantised pool; the slots are each one's.
    """

    prefill_block_keys: int
    prefill_slots: int
    decode_block_keys: int
    decode_slots: int
    prefill_raw_slots: int = 2
    decode_raw_slots: int = 2
    decode_pipelines: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("block_keys"):
                is_right, wanted = value in (64, 128), "64 or 128"
            elif field.name == "decode_pipelines":
                is_right, wanted = value in (1, 2), "1 or 2"
            else:
                is_right, wanted = isinstance(value, int) and value >= 1, "an int >= 1"
                if field.name == "prefill_slots" or field.name == "decode_slots":
                    is_right, wanted = is_right and value >= 2, "an int >= 2"
            if not is_right:
                raise ValueError(f"GpuAttentionConfig: {field.name} is {value!r}; wanted {wanted}")


def default_config(
    head_dim: int, is_quantized: bool, max_seqs: int, page_size: int
) -> GpuAttentionConfig:
    """What was found for the device (`pallas_paged.tuned`), else what `formula` gives."""
    found = tuned.find(
        dispatch.gpu_device_kind(),
        "ragged_paged_attention",
        page_size=page_size,
        head_dim=head_dim,
        is_quantized=is_quantized,
        has_few_seqs=has_few_seqs(max_seqs),
    )
    return GpuAttentionConfig(**found) if found else formula(head_dim, is_quantized, max_seqs)


def has_few_seqs(max_seqs: int) -> bool:
    """Whether so few sequences are decoded at most that each is better split less."""
    return max_seqs < 32


def formula(head_dim: int, is_quantized: bool, max_seqs: int) -> GpuAttentionConfig:
    """As many blocks as shared memory has room for.

    Two pipelines decode on a multiprocessor where many sequences begin and end, so that one's
    latencies hide behind the other's pages; one where few do, which splits heads less.
    """
    prefill_keys = 64 if head_dim == 256 else 128
    if is_quantized:
        prefill_slots = {64: 4, 128: 2, 256: 2}[head_dim]
        if head_dim == 256:
            keys, slots, raw_slots = 64, 2, 2
        elif has_few_seqs(max_seqs):
            keys, slots, raw_slots = 64, 3, {64: 12, 128: 7}[head_dim]
        else:
            keys, slots, raw_slots = 128, 2, {64: 6, 128: 3}[head_dim]
        return GpuAttentionConfig(
            prefill_keys,
            prefill_slots,
            keys,
            slots,
            prefill_raw_slots=2,
            decode_raw_slots=raw_slots,
        )
    prefill_slots = {64: 6, 128: 3, 256: 2}[head_dim]
    if head_dim == 256:
        return GpuAttentionConfig(prefill_keys, prefill_slots, 64, 3)
    decode_slots = {64: 6, 128: 3}[head_dim]
    if has_few_seqs(max_seqs):
        return GpuAttentionConfig(prefill_keys, prefill_slots, 128, decode_slots)
    return GpuAttentionConfig(prefill_keys, prefill_slots, 64, decode_slots, decode_pipelines=2)


def _shared_bytes(shape: Shape, config: GpuAttentionConfig) -> tuple[int, int]:
    """Shared memory that a block of threads of the prefill and of the decode kernel takes."""

    def ring(block_keys, slots, raw_slots):
        raw = raw_slots if shape.is_quantized else 0
        per_key = slots * shape.q_dtype.itemsize + raw * shape.pool_dtype.itemsize
        return block_keys * shape.kv_dim * per_key

    queries = WARPGROUP_ROWS * shape.head_dim * shape.q_dtype.itemsize
    return (
        prefill.num_consumers(shape) * queries
        + ring(config.prefill_block_keys, config.prefill_slots, config.prefill_raw_slots),
        config.decode_pipelines
        * (
            (not decode.queries_in_registers(shape)) * queries
            + ring(config.decode_block_keys, config.decode_slots, config.decode_raw_slots)
        ),
    )


def unsupported(
    q, kv_pages, page_indices, num_kv_heads: int, config: GpuAttentionConfig | None
) -> str | None:
    """Why the kernels cannot run a call, as a sentence; None if they can."""
    reason = dispatch.why_no_mosaic_gpu()
    if reason is not None:
        return reason
    num_heads, head_dim = q.shape[1], layout.padded_head_dim(q.shape[2])
    num_pages, page_size, num_rows, _ = kv_pages.shape
    del num_pages
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
    if config is not None:
        shape = _shape_of(q, kv_pages, page_indices, num_kv_heads)
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


def _shape_of(q, kv_pages, page_indices, num_kv_heads, **options) -> Shape:
    """The static description of a call."""
    options = {
        "causal": True,
        "soft_cap": None,
        "is_scale_positive": True,
        "has_window": False,
        "return_lse": False,
        "is_interpreted": False,
    } | options
    return Shape(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=layout.padded_head_dim(q.shape[2]),
        num_pages=kv_pages.shape[0],
        page_size=kv_pages.shape[1],
        table_width=page_indices.shape[1],
        q_dtype=jnp.dtype(q.dtype),
        product_dtype=jnp.dtype(q.dtype),
        pool_dtype=jnp.dtype(kv_pages.dtype),
        **options,
    )


def ragged_paged_attention(
    q,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    *,
    sm_scale,
    causal,
    sliding_window,
    soft_cap,
    k_scale,
    v_scale,
    sinks,
    num_kv_heads,
    return_lse,
    config,
    is_scale_positive,
):
    """Returns the output, q's dtype [T, N, H], and the log-sum-exp, f32[T, N] or None; see api."""
    num_tokens, _, head_dim = q.shape
    shape = _shape_of(
        q,
        kv_pages,
        page_indices,
        num_kv_heads,
        causal=causal,
        soft_cap=soft_cap,
        has_window=sliding_window is not None,
        return_lse=return_lse,
        is_scale_positive=is_scale_positive,
    )
    config = config or default_config(
        shape.head_dim, shape.is_quantized, page_indices.shape[0], shape.page_size
    )
    num_sms = dispatch.num_multiprocessors()

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
        config.decode_block_keys,
        prefill.tile_rows(shape),
    )

    launch = functools.partial(_launch, shape, config, num_sms)
    out, lse = lax.platform_dependent(
        operands,
        cuda=functools.partial(launch, False),
        default=functools.partial(launch, True),
    )
    return out[:num_tokens, :, :head_dim], (lse[:num_tokens] if return_lse else None)


def _launch(shape: Shape, config: GpuAttentionConfig, num_sms: int, is_interpreted: bool, operands):
    """The two kernels; the first leaves holes for the second, which updates the output in place."""
    shape = dataclasses.replace(shape, is_interpreted=is_interpreted)
    operands = unfused(operands)
    out, lse, means, sums, merges = decode.decode(shape, config, num_sms, operands)
    parts = {"means": means.reshape(len(means), -1), "sums": sums.reshape(len(sums), -1)}
    out_ref, lse_ref = jax.new_ref(out), None if lse is None else jax.new_ref(lse)
    prefill.prefill(shape, config, num_sms, operands | parts | {"merges": merges}, out_ref, lse_ref)
    return unfused((jax.ref.freeze(out_ref), None if lse_ref is None else jax.ref.freeze(lse_ref)))
