# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Puts together the heads that the decode kernel cut between blocks of threads.

A warpgroup takes a KV head and, strip by strip, its query heads: the parts' values weighed by their
log-sum-exps, some values a thread. It runs in the prefill kernel, in front of the tiles, because a
launch costs more than the work.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu import online_softmax as attention
from pallas_paged.attention.gpu import rows as gpu_rows
from pallas_paged.attention.gpu.schedule import (
    LOG2E,
    LOWEST,
    WARPGROUP,
    Shape,
    keep_if,
)

# Values of a strip, at most, unless one head has more; those of 16 strips of 512 read at a time,
# so that their loads overlap, are 128 registers of a thread.
_STRIP = 1024
_VALUES_AT_ONCE = 16 * 512


def merge_heads(inputs, out, lse, first, stride, shape: Shape) -> None:
    """Merges the heads that begin in the shares first, first + stride, ... and end in later ones.

    Args:
      inputs: refs in device memory, of what `decode.decode` returns
        means, sums: f32[parts, 64 * H]
        merges: int32[shares, 4]
      out: ref [T, N, H].
      lse: ref f32[T, N], or None.
      first, stride: int32 scalar and int.
      shape: the static description.
    """
    merges = inputs["merges"]
    heads = _heads_of_strip(shape)
    num_strips = shape.group // heads

    def merge_head(i, _):
        share = first + i * stride
        num_parts, row, num_tokens, kv_head = (merges[share, j] for j in range(4))

        def merge_strip(i, _):
            token, strip = i // num_strips, lax.rem(i, num_strips)
            first_value = (token * num_strips + strip) * heads * shape.head_dim
            mean, log2_sum = _merge_parts(inputs, share, num_parts, first_value, heads, shape)
            first_head = kv_head * shape.group + strip * heads
            where = (row + token, first_head, heads, shape.is_interpreted)
            gpu_rows.store_heads(mean.astype(shape.q_dtype), out, *where)
            if lse is not None:
                log_sum = attention.natural_log(log2_sum)
                gpu_rows.store_heads_column(log_sum, lse, *where, shape.head_dim)

        count = jnp.where(num_parts > 0, num_tokens * num_strips, 0)
        lax.fori_loop(0, count, merge_strip, None)

    count = (merges.shape[0] - first + stride - 1) // stride
    lax.fori_loop(0, jnp.maximum(count, 0), merge_head, None)


def _heads_of_strip(shape: Shape) -> int:
    """Query heads of a strip, a divisor of G."""
    most = max(1, _STRIP // shape.head_dim)
    return max(n for n in range(1, min(most, shape.group) + 1) if shape.group % n == 0)


def _merge_parts(inputs, share, num_parts, first_value, heads: int, shape: Shape):
    """Mean and log2 of the sum over all parts, of a strip of heads side by side."""
    # A warpgroup takes whole multiples of 128; the rest is the next strip's, or nobody's.
    size = -(-heads * shape.head_dim // WARPGROUP) * WARPGROUP
    at_once = max(1, min(16, _VALUES_AT_ONCE // size))
    columns = pl.ds(first_value, size)

    def read(j):
        is_part = j < num_parts
        j = jnp.minimum(j, num_parts - 1)
        part = 2 * (share + j) + jnp.where(j == 0, 1, 0)
        mean, log2_sum = inputs["means"][part, columns], inputs["sums"][part, columns]
        return keep_if(is_part, mean, 0.0), keep_if(is_part, log2_sum, 2 * LOWEST)

    def add(i, carry):
        mean, total, largest = carry
        parts = [read(i * at_once + j) for j in range(at_once)]
        newest = largest
        for _, log2_sum in parts:
            newest = jnp.maximum(newest, log2_sum)
        shrink = jnp.exp2(largest - newest)
        mean, total = mean * shrink, total * shrink
        for part, log2_sum in parts:
            weight = jnp.exp2(log2_sum - newest)
            mean, total = mean + part * weight, total + weight
        return mean, total, newest

    vec_size = next(n for n in (4, 2, 1) if size // WARPGROUP % n == 0)
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vec_size)
    zeros, lowest = (
        plgpu.layout_cast(jnp.full((size,), value, jnp.float32), layout) for value in (0.0, LOWEST)
    )
    steps = (num_parts + at_once - 1) // at_once
    mean, total, largest = lax.fori_loop(0, steps, add, (zeros, zeros, lowest))
    is_any = total > 0
    total = jnp.where(is_any, total, 1.0)
    return mean / total, jnp.where(is_any, largest + jnp.log(total) * LOG2E, 2 * LOWEST)
