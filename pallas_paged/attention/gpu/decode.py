# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What is special to the decode kernel: the keys of all sequences in one line, split evenly.

A work item is one KV block of one KV head of a sequence. All work items stand in one line, of which
each pipeline of each thread block takes an equal partition, whatever the lengths of the sequences
are (the split of Stream-K, Osama et al., 2023). A pipeline goes through its partition in work
tiles, which are the items of one head. The query heads of a KV head and the new tokens of a short
sequence share the 64 rows of the matrix unit. Where a partition begins or ends inside a head, the
result of its tile is partial, and the prefill kernel combines the partial results by their
log-sum-exps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu import row_io
from pallas_paged.attention.gpu.mma_layout import keep_if, over_columns
from pallas_paged.attention.gpu.online_softmax import (
    LOG2E,
    LOWEST,
    QueryRows,
    natural_log,
    sink_score,
)
from pallas_paged.attention.gpu.refs import DecodeOutputs, Inputs, scale_of_head
from pallas_paged.attention.gpu.row_io import BatchRows
from pallas_paged.attention.gpu.schedule import (
    KV_BLOCKS,
    KvRange,
    first_seen,
    lengths_of,
    search,
)
from pallas_paged.attention.gpu.spec import WARPGROUP_ROWS, KernelSpec, Ref, Scalar


@dataclasses.dataclass(frozen=True)
class WorkTile:
    """The work items of one KV head of a sequence that lie in a partition; traced scalars.

    Attributes:
      seq, kv_head: the sequence and the KV head.
      row: the sequence's first row of the batch.
      num_tokens: the sequence's rows of the batch.
      length: the sequence's tokens in the cache.
      first: the tile's first KV block among the `num_blocks` of the head.
      count: the KV blocks of the tile.
      num_blocks: the KV blocks of the head.
      item: the tile's first work item in the line.
    """

    seq: Scalar
    kv_head: Scalar
    row: Scalar
    num_tokens: Scalar
    length: Scalar
    first: Scalar
    count: Scalar
    num_blocks: Scalar
    item: Scalar

    def kv_range(self, window: Scalar | None, spec: KernelSpec) -> KvRange:
        """The KV blocks of the tile."""
        block_kv = spec.decode_kv.block_kv
        position = self.length - self.num_tokens
        low: Scalar = 0
        first_whole: Scalar = 0
        if spec.options.has_window:
            low = first_seen(position, window)
            first_whole = first_seen(self.length - 1, window)
        end_whole = position + 1 if spec.options.causal else self.length
        oldest = low // block_kv + self.first
        return KvRange(
            low=low,
            end=self.length,
            first_whole=first_whole,
            end_whole=end_whole,
            block_kv=block_kv,
            newest=oldest + self.count - 1,
            count=self.count,
        )


@dataclasses.dataclass(frozen=True)
class Partition:
    """One of `count` equal partitions of the line of all work items.

    Attributes:
      index: which one, a traced scalar.
      count: the pipelines of all thread blocks.
    """

    index: Scalar
    count: int

    def bounds(self, schedule: Ref, spec: KernelSpec) -> tuple[Scalar, Scalar]:
        """(begin, end): the work items of the partition."""
        each, rest = self._each(schedule, spec)
        begin = self.index * each + jnp.minimum(self.index, rest)
        return begin, begin + each + jnp.where(self.index < rest, 1, 0)

    def index_of(self, item: Scalar, schedule: Ref, spec: KernelSpec) -> Scalar:
        """The index of the partition that a work item lies in."""
        each, rest = self._each(schedule, spec)
        longer = rest * (each + 1)  # the items of the first partitions, which have one more each
        return jnp.where(
            item < longer, item // (each + 1), rest + (item - longer) // jnp.maximum(each, 1)
        )

    def _each(self, schedule: Ref, spec: KernelSpec) -> tuple[Scalar, Scalar]:
        """(the items of each partition, the number of partitions that have one more)."""
        total = schedule[KV_BLOCKS, schedule.shape[1] - 1] * spec.num_kv_heads
        return total // self.count, lax.rem(total, self.count)


def for_each_tile(
    inputs: Inputs,
    partition: Partition,
    spec: KernelSpec,
    body: Callable[[WorkTile, Scalar], Scalar],
) -> Scalar:
    """Calls `step = body(tile, step)` for the tiles of a partition in order; returns the last step.

    A step counts the KV blocks that went through the stages before.
    """
    schedule = inputs.schedule
    lengths = lengths_of(inputs, spec)
    max_seqs = schedule.shape[1] - 1
    begin, end = partition.bounds(schedule, spec)

    def next_tile(state: Any) -> Any:
        item, seq, step = state
        seq = lax.while_loop(
            lambda s: schedule[KV_BLOCKS, s + 1] * spec.num_kv_heads <= item, lambda s: s + 1, seq
        )
        before = schedule[KV_BLOCKS, seq]
        num_blocks = schedule[KV_BLOCKS, seq + 1] - before
        inside = item - before * spec.num_kv_heads
        kv_head = inside // num_blocks
        first = inside - kv_head * num_blocks
        row, end_row, length = lengths.of(seq)
        tile = WorkTile(
            seq=seq,
            kv_head=kv_head,
            row=row,
            num_tokens=end_row - row,
            length=length,
            first=first,
            count=jnp.minimum(num_blocks - first, end - item),
            num_blocks=num_blocks,
            item=item,
        )
        return item + tile.count, seq, body(tile, step)

    first_seq = lax.cond(
        begin < end,
        lambda: search(schedule, KV_BLOCKS, max_seqs, begin, spec.num_kv_heads),
        lambda: jnp.int32(0),
    )
    start = begin, first_seq, jnp.int32(0)
    return lax.while_loop(lambda state: state[0] < end, next_tile, start)[2]


def load_queries(
    inputs: Inputs, queries: Ref | None, tile: WorkTile, window: Scalar | None, spec: KernelSpec
) -> tuple[QueryRows, BatchRows]:
    """Loads the queries of a tile.

    Args:
      inputs: the refs with the queries and the scales.
      queries: [64, H], a ref in shared memory where they go, or None to keep them in registers.
      tile: the tile.
      window: the sliding window, or None.
      spec: the static parameters.

    Returns:
      the queries and what they see, and where they are in the batch.
    """
    scale = inputs.sm_scale[0] * LOG2E
    if inputs.k_scale is not None:
        scale *= scale_of_head(inputs.k_scale, tile.kv_head)
    where = BatchRows(tile.row, tile.kv_head * spec.group, spec.group)
    values = row_io.load(
        inputs.q,
        where,
        tile.num_tokens * spec.group,
        (WARPGROUP_ROWS, spec.head_dim),
        spec.is_interpreted,
    )
    if spec.product_dtype != spec.q_dtype:
        values, unit = _as_float16(values)
        scale *= unit
    if queries is not None:
        # The queries of the last tile may be overwritten: its products have been waited for.
        queries[...] = values
        plgpu.commit_smem()
        values = queries
    rows = QueryRows(
        queries=values,
        position=tile.length - tile.num_tokens,
        length=tile.length,
        window=window,
        scale=scale,
        group=spec.group,
    )
    return rows, where


def _as_float16(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x, unit): float16 x and f32[64] powers of two, with `x * unit` the rows of bfloat16 values.

    The largest value of a row comes just under the largest that float16 holds, so that the values
    down to 2**-29 of it lose no bit.
    """
    wide = values.astype(jnp.float32)
    largest = lax.bitcast_convert_type(jnp.abs(wide).max(axis=1), jnp.int32)
    # Exponents as float32 has them, with 127 added. The largest of float16 is 15.
    exponent = jnp.minimum(127 + 127 + 15 - (largest >> 23), 253)
    factor, unit = (
        lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent, 254 - exponent)
    )
    return (wide * over_columns(factor, wide.shape[1])).astype(jnp.float16), unit


def load_sink(
    inputs: Inputs, where: BatchRows, tile: WorkTile, spec: KernelSpec
) -> jax.Array | None:
    """The sink of each row, f32[64] in base 2, or None.

    One tile of a head takes the sink. Otherwise the combination would count it more than once.
    """
    if inputs.sinks is None:
        return None
    sink = row_io.load_per_head(
        inputs.sinks, where.first_head, spec.group, WARPGROUP_ROWS, spec.is_interpreted
    )
    return keep_if(tile.first == 0, sink_score(sink), 2 * LOWEST)


def store(
    tile: WorkTile,
    where: BatchRows,
    mean: jax.Array,
    log2_sum: jax.Array,
    outputs: DecodeOutputs,
    partition: Partition,
    schedule: Ref,
    spec: KernelSpec,
) -> None:
    """Stores the result of a tile: that of a whole head to the output, another as a partial result.

    The partition in which a split head begins says how the head is to be combined.
    """
    count = tile.num_tokens * spec.group
    is_whole = tile.count == tile.num_blocks

    @pl.when(is_whole)
    def _() -> None:
        bounds = (where, 0, count, spec.is_interpreted)
        row_io.store(mean.astype(spec.q_dtype), outputs.out, *bounds)
        if outputs.lse is not None:
            row_io.store(natural_log(log2_sum), outputs.lse, *bounds)

    @pl.when(jnp.logical_not(is_whole))
    def _() -> None:
        index = 2 * partition.index + jnp.where(tile.first > 0, 0, 1)
        bounds = (BatchRows(index, 0, WARPGROUP_ROWS), 0, count, spec.is_interpreted)
        row_io.store(mean, outputs.means, *bounds)
        row_io.store(over_columns(log2_sum, spec.head_dim), outputs.log2_sums, *bounds)

    @pl.when(jnp.logical_not(is_whole) & (tile.first == 0))
    def _() -> None:
        last = partition.index_of(tile.item + tile.num_blocks - 1, schedule, spec)
        split = (last - partition.index + 1, tile.row, tile.num_tokens, tile.kv_head)
        for i, value in enumerate(split):
            outputs.splits[partition.index, i] = value
