# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What is special to the prefill kernel: q tiles of one query head, dealt out to thread blocks.

A q tile is up to 128 rows of one sequence, or of no sequence: those are zeroed. Thread block i of n
takes the tiles i, i + n, and so on. The longest tiles of a sequence come first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu import row_io
from pallas_paged.attention.gpu.mma_layout import as_column
from pallas_paged.attention.gpu.online_softmax import LOG2E, QueryRows, natural_log, sink_score
from pallas_paged.attention.gpu.refs import Inputs, PrefillOutputs, scale_of_head
from pallas_paged.attention.gpu.row_io import BatchRows
from pallas_paged.attention.gpu.schedule import (
    Q_TILES,
    KvRange,
    first_seen,
    lengths_of,
    search,
)
from pallas_paged.attention.gpu.spec import ROW_TILE, WARPGROUP_ROWS, KernelSpec, Ref, Scalar


@dataclasses.dataclass(frozen=True)
class QTile:
    """Rows of one query head, 64 per consumer; traced scalars.

    Attributes:
      seq: the sequence. For rows of no sequence it is any, with nothing in the cache.
      head: the query head.
      row: the tile's first row in the batch, a multiple of 8: the sequence may begin later.
      begin, end: the sequence's rows in the batch.
      position: the position of the tile's first row.
      length: the sequence's tokens in the cache; 0 where there is nothing to attend to.
    """

    seq: Scalar
    head: Scalar
    row: Scalar
    begin: Scalar
    end: Scalar
    position: Scalar
    length: Scalar

    def kv_range(self, window: Scalar | None, spec: KernelSpec) -> KvRange:
        """The KV blocks that the tile attends to."""
        block_kv = spec.prefill_kv.block_kv
        high, end_whole = self.length, self.length
        if spec.options.causal:
            high = jnp.minimum(high, self.position + spec.block_q)
            end_whole = jnp.minimum(end_whole, self.position + 1)
        low: Scalar = 0
        first_whole: Scalar = 0
        if spec.options.has_window:
            low = first_seen(self.position, window)
            first_whole = first_seen(self.position + spec.block_q - 1, window)
        newest = jnp.maximum(high - 1, 0) // block_kv
        return KvRange(
            low=low,
            end=self.length,
            first_whole=first_whole,
            end_whole=end_whole,
            block_kv=block_kv,
            newest=newest,
            count=newest - jnp.minimum(low // block_kv, newest) + 1,
        )


def for_each_tile(
    inputs: Inputs, spec: KernelSpec, body: Callable[[QTile, Scalar], Scalar]
) -> Scalar:
    """Calls `step = body(tile, step)` for the tiles of this thread block; returns the last step.

    A step counts the KV blocks that went through the stages before. The tiles of the sequences come
    first, then those of the rows after the last sequence and of the rows before the first one.
    """
    schedule, num_tokens = inputs.schedule, inputs.q.shape[0]
    max_seqs = schedule.shape[1] - 1
    lengths = lengths_of(inputs, spec)
    first_row = lengths.row(0)
    last_row = lengths.row(jnp.clip(inputs.num_seqs[0], 0, max_seqs))
    num_seq_tiles = schedule[Q_TILES, max_seqs]
    num_after = _num_tiles(last_row, num_tokens, spec)
    total = (num_seq_tiles + num_after + _num_tiles(0, first_row, spec)) * spec.num_heads

    def next_tile(state: Any) -> Any:
        item, seq, step = state
        number, head = item // spec.num_heads, lax.rem(item, spec.num_heads)
        is_of_sequence = number < num_seq_tiles
        seq = lax.while_loop(
            lambda s: is_of_sequence & (number >= schedule[Q_TILES, s + 1]), lambda s: s + 1, seq
        )
        begin, end, length = lengths.of(seq)
        is_after = number < num_seq_tiles + num_after
        from_first = jnp.where(
            is_of_sequence,
            schedule[Q_TILES, seq + 1] - 1 - number,
            number - num_seq_tiles - jnp.where(is_after, 0, num_after),
        )
        begin = jnp.where(is_of_sequence, begin, jnp.where(is_after, last_row, 0))
        end = jnp.where(is_of_sequence, end, jnp.where(is_after, num_tokens, first_row))
        length = jnp.where(is_of_sequence, length, 0)
        row = begin // ROW_TILE * ROW_TILE + from_first * spec.block_q
        tile = QTile(seq, head, row, begin, end, length - end + row, length)
        return item + lax.axis_size("block"), seq, body(tile, step)

    # The decodes before the first tile may be too many to go through one by one. Between later
    # tiles there are few.
    block = lax.axis_index("block")
    # Where there is no tile, as in most steps of an engine, nobody waits for the search.
    first_seq = lax.cond(
        num_seq_tiles > 0,
        lambda: search(schedule, Q_TILES, max_seqs, block // spec.num_heads, 1),
        lambda: jnp.int32(0),
    )
    start = block, first_seq, jnp.int32(0)
    return lax.while_loop(lambda state: state[0] < total, next_tile, start)[2]


def _num_tiles(begin: Scalar, end: Scalar, spec: KernelSpec) -> Scalar:
    """The tiles of one query head that the rows [begin, end) of the batch take."""
    return jnp.where(end > begin, -(-(end - begin // ROW_TILE * ROW_TILE) // spec.block_q), 0)


class QueryStage(NamedTuple):
    """The queries of a tile in shared memory, with the barriers between producer and consumers.

    Attributes:
      smem: [consumers, 64, H].
      full: one barrier per consumer, which completes when its queries are there.
      empty: one barrier per consumer, at which it arrives when it has read its queries.
    """

    smem: Ref
    full: Ref
    empty: Ref

    def fetch(self, tile: QTile, inputs: Inputs, spec: KernelSpec) -> None:
        """Asks for the queries of a tile, as the consumers have read those of the tile before."""
        for consumer in range(spec.prefill_consumers):
            row = pl.multiple_of(tile.row + consumer * WARPGROUP_ROWS, ROW_TILE)
            plgpu.barrier_wait(self.empty.at[consumer])
            plgpu.copy_gmem_to_smem(
                inputs.q.at[pl.ds(row, WARPGROUP_ROWS), tile.head],
                self.smem.at[consumer],
                self.full.at[consumer],
            )

    def wait(self, consumer: Scalar) -> None:
        """Waits for a consumer's queries."""
        plgpu.barrier_wait(self.full.at[consumer])

    def release(self, consumer: Scalar) -> None:
        """Says that a consumer has read its queries, or that it has none yet."""
        plgpu.barrier_arrive(self.empty.at[consumer])

    def drain(self, spec: KernelSpec) -> None:
        """Waits until all queries are read, which the producer does last."""
        for consumer in range(spec.prefill_consumers):
            plgpu.barrier_wait(self.empty.at[consumer])


def query_rows(
    inputs: Inputs,
    queries: QueryStage,
    tile: QTile,
    consumer: Scalar,
    window: Scalar | None,
    spec: KernelSpec,
) -> QueryRows:
    """The queries of one consumer, which are in shared memory, and what they see."""
    mine = queries.smem.at[consumer]
    scale = inputs.sm_scale[0] * LOG2E
    if inputs.k_scale is not None:
        scale *= scale_of_head(inputs.k_scale, tile.head // spec.group)
    return QueryRows(
        queries=mine,
        position=tile.position + consumer * WARPGROUP_ROWS,
        length=tile.length,
        window=window,
        scale=scale,
        group=1,
    )


def load_sink(inputs: Inputs, tile: QTile) -> jax.Array | None:
    """The sink of the tile's head for each row, f32[64] in base 2, or None."""
    if inputs.sinks is None:
        return None
    sink = sink_score(inputs.sinks[tile.head])
    return as_column(jnp.broadcast_to(sink, (WARPGROUP_ROWS,)))


def store(
    tile: QTile,
    row: Scalar,
    mean: jax.Array,
    log2_sum: jax.Array,
    outputs: PrefillOutputs,
    spec: KernelSpec,
) -> None:
    """Stores a consumer's rows, from `row` of the batch on, as far as they are the sequence's."""
    where = BatchRows(row, tile.head, 1), tile.begin - row, tile.end - row, spec.is_interpreted
    row_io.store(mean.astype(spec.q_dtype), outputs.out, *where)
    if outputs.lse is not None:
        row_io.store(natural_log(log2_sum), outputs.lse, *where)
