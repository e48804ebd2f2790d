# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Combines the partial results of the heads whose keys are split between partitions (split-KV).

A warpgroup takes a KV head and goes through its query heads strip by strip. It weighs the partial
results by their log-sum-exps; each thread holds some values of the strip. The combination runs in
the prefill kernel, in front of the tiles, because a launch costs more than this work.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu import row_io
from pallas_paged.attention.gpu.mma_layout import keep_if
from pallas_paged.attention.gpu.online_softmax import LOG2E, LOWEST, Result, natural_log
from pallas_paged.attention.gpu.refs import PartialResults, PrefillOutputs
from pallas_paged.attention.gpu.spec import WARPGROUP, KernelSpec, Scalar

# The most values of a strip, unless one head has more.
_STRIP = 1024
# The values that are read at a time, so that their loads overlap: those of 16 strips of 512 take
# 128 registers of a thread.
_VALUES_AT_ONCE = 16 * 512


def combine_splits(
    partial: PartialResults,
    outputs: PrefillOutputs,
    first: Scalar,
    stride: int,
    spec: KernelSpec,
) -> None:
    """Combines the split heads that begin in the partitions first, first + stride, and so on.

    Args:
      partial: the refs of the partial results.
      outputs: the refs where the results go.
      first, stride: the partitions that this warpgroup takes.
      spec: the static parameters.
    """
    num_partitions = partial.splits.shape[0]
    heads = _heads_of_strip(spec)
    num_strips = spec.group // heads

    def combine_head(i: Scalar, _: None) -> None:
        partition = first + i * stride
        num_splits, row, num_tokens, kv_head = (partial.splits[partition, j] for j in range(4))

        def combine_strip(i: Scalar, _: None) -> None:
            token, strip = i // num_strips, lax.rem(i, num_strips)
            first_value = (token * num_strips + strip) * heads * spec.head_dim
            mean, log2_sum = _combine_strip(
                partial, partition, num_splits, first_value, heads, spec
            )
            first_head = kv_head * spec.group + strip * heads
            where = (row + token, first_head, heads, spec.is_interpreted)
            row_io.store_heads(mean.astype(spec.q_dtype), outputs.out, *where)
            if outputs.lse is not None:
                log_sum = natural_log(log2_sum)
                row_io.store_heads_column(log_sum, outputs.lse, *where, spec.head_dim)

        count = jnp.where(num_splits > 0, num_tokens * num_strips, 0)
        lax.fori_loop(0, count, combine_strip, None)

    count = (num_partitions - first + stride - 1) // stride
    lax.fori_loop(0, jnp.maximum(count, 0), combine_head, None)


def _heads_of_strip(spec: KernelSpec) -> int:
    """The query heads of a strip, a divisor of G."""
    most = max(1, _STRIP // spec.head_dim)
    return max(n for n in range(1, min(most, spec.group) + 1) if spec.group % n == 0)


def _combine_strip(
    partial: PartialResults,
    partition: Scalar,
    num_splits: Scalar,
    first_value: Scalar,
    heads: int,
    spec: KernelSpec,
) -> Result:
    """The mean and the log2 of the sum over all splits, of a strip of heads side by side.

    Both are f32 of `heads * H` values or more, strided over the threads of a warpgroup.
    """
    # A warpgroup takes whole multiples of 128. The rest belongs to the next strip, or to nobody.
    size = -(-heads * spec.head_dim // WARPGROUP) * WARPGROUP
    at_once = max(1, min(16, _VALUES_AT_ONCE // size))
    columns = pl.ds(first_value, size)

    def read(j: Scalar) -> Result:
        is_split = j < num_splits
        j = jnp.minimum(j, num_splits - 1)
        # A partition has two: of a head that began before it, and of one that begins in it.
        index = 2 * (partition + j) + jnp.where(j == 0, 1, 0)
        mean, log2_sum = partial.means[index, columns], partial.log2_sums[index, columns]
        return keep_if(is_split, mean, 0.0), keep_if(is_split, log2_sum, 2 * LOWEST)

    def add(
        i: Scalar, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, total, largest = carry
        splits = [read(i * at_once + j) for j in range(at_once)]
        newest = largest
        for _, log2_sum in splits:
            newest = jnp.maximum(newest, log2_sum)
        shrink = jnp.exp2(largest - newest)
        mean, total = mean * shrink, total * shrink
        for split_mean, log2_sum in splits:
            weight = jnp.exp2(log2_sum - newest)
            mean, total = mean + split_mean * weight, total + weight
        return mean, total, newest

    vec_size = next(n for n in (4, 2, 1) if size // WARPGROUP % n == 0)
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vec_size)
    zeros, lowest = (
        plgpu.layout_cast(jnp.full((size,), value, jnp.float32), layout) for value in (0.0, LOWEST)
    )
    steps = (num_splits + at_once - 1) // at_once
    mean, total, largest = lax.fori_loop(0, steps, add, (zeros, zeros, lowest))
    is_any = total > 0
    total = jnp.where(is_any, total, 1.0)
    return mean / total, jnp.where(is_any, largest + jnp.log(total) * LOG2E, 2 * LOWEST)
