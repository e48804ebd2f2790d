# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Prefill attention on Hopper: tiles of 128 rows of one query head, one block of threads a tile.

The pipeline: as many blocks of threads as multiprocessors, each walking every so many-th tile. One
warpgroup produces (queries of the next tile, pages of keys and values), two consume, 64 rows each;
with a quantised pool a fourth converts in between. Two consumers take turns by themselves: while
one's softmax runs, the matrix unit has the products of the other. The longest tiles of a sequence
come first. Before their first tile the consumers merge what the decode kernel left in parts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu import kv_blocks as blocks
from pallas_paged.attention.gpu import online_softmax as attention
from pallas_paged.attention.gpu import rows as gpu_rows
from pallas_paged.attention.gpu.combine_splits import merge_heads
from pallas_paged.attention.gpu.online_softmax import Rows, Span
from pallas_paged.attention.gpu.schedule import (
    LOG2E,
    ROW_TILE,
    TILES,
    WARPGROUP_ROWS,
    Lengths,
    Shape,
    clip_window,
    first_seen,
    named,
    of_head,
    search,
    tiling,
)

# Registers of a thread. 64 Ki are for all: 2 x 240 + 24, or 2 x 208 + 40 + 56, times 128.
_CONSUMER_REGISTERS = {False: 240, True: 208}
_PRODUCER_REGISTERS = {False: 24, True: 40}
_CONVERTER_REGISTERS = 56


def num_consumers(shape: Shape) -> int:
    """Consuming warpgroups: two, or one where the sum of the values takes a quarter of the
    registers and the converter's warpgroup leaves too few at the start."""
    return 1 if shape.is_quantized and shape.head_dim == 256 else 2


def tile_rows(shape: Shape) -> int:
    """Rows of a tile."""
    return num_consumers(shape) * WARPGROUP_ROWS


@dataclasses.dataclass(frozen=True)
class Tile:
    """The rows of the consumers, of one query head; traced scalars.

    Attributes:
      seq: the sequence; any, with nothing in the cache, for rows of none.
      head: the query head.
      row: the tile's first row in the batch, a multiple of 8: the sequence may begin later.
      begin, end: rows of the sequence.
      position: of the tile's first row.
      length: of the sequence; 0 where there is nothing to attend to.
    """

    seq: Any
    head: Any
    row: Any
    begin: Any
    end: Any
    position: Any
    length: Any

    def span(self, window, block: int, shape: Shape) -> Span:
        high, end_whole = self.length, self.length
        if shape.causal:
            high = jnp.minimum(high, self.position + tile_rows(shape))
            end_whole = jnp.minimum(end_whole, self.position + 1)
        low: Any = 0
        first_whole: Any = 0
        if shape.has_window:
            low = first_seen(self.position, window)
            first_whole = first_seen(self.position + tile_rows(shape) - 1, window)
        newest = jnp.maximum(high - 1, 0) // block
        return Span(
            low=low,
            end=self.length,
            first_whole=first_whole,
            end_whole=end_whole,
            block=block,
            newest=newest,
            count=newest - jnp.minimum(low // block, newest) + 1,
        )


def prefill(shape: Shape, config, num_blocks: int, operands: dict[str, jax.Array], out, lse):
    """Launches the kernel, which writes all of `out` and `lse` that the decode kernel left open.

    Args:
      shape: the static description.
      config: block sizes.
      num_blocks: blocks of threads.
      operands: name -> array, as `_kernel` lists them; what is not given is left out.
      out: ref [T, N, H].
      lse: ref f32[T, N], or None.
    """
    names = tuple(operands)
    outs = (out,) if lse is None else (out, lse)
    num_raw = config.prefill_raw_stages if shape.is_quantized else 0

    @named(f"prefill_{config.prefill_block_kv}_{config.prefill_stages}_{num_raw}")
    def body(*refs):
        inputs = dict(zip(names, refs[: len(names)], strict=True))
        out_ref, lse_ref = (*refs[len(names) :], None)[:2]
        queries = plgpu.SMEM(
            (num_consumers(shape), WARPGROUP_ROWS, shape.head_dim),
            shape.q_dtype,
            transforms=tiling(shape.q_dtype),
        )
        barrier = plgpu.Barrier(num_barriers=num_consumers(shape))
        pl.run_scoped(
            lambda *scoped: _kernel(inputs, out_ref, lse_ref, scoped, shape, config, num_raw),
            queries,
            barrier,
            barrier,
            blocks.scratch(
                shape,
                config.prefill_block_kv,
                config.prefill_stages,
                num_raw,
                num_consumers(shape),
            ),
            collective_axes="warpgroup",
        )

    plgpu.kernel(
        body,
        out_type=(),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_consumers(shape) + 1 + shape.is_quantized,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values(), *outs)


def _kernel(inputs, out, lse, scoped, shape: Shape, config, num_raw: int):
    """The warpgroups' roles.

    Args:
      inputs: refs in device memory
        q: [T, N, H]
        kv: [P, page_size, heads, 2H]
        table: int32[S, M]
        kv_lens, cu_q_lens, num_seqs: int32[S], int32[S + 1], int32[1]
        schedule: int32[2, S + 1]
        means, sums, merges: the decode kernel's parts, as `merge_heads` takes them
        sm_scale: f32[1]
        window: int32[1], k_scale, v_scale: f32[1] or f32[K], sinks: f32[N]; where given
      out: [T, N, H]
      lse: f32[T, N] or None
      scoped: scratch: queries [2, 64, H] and their barriers (full, empty), the rings
    """
    queries, queries_full, queries_empty, ring_scratch = scoped
    block = config.prefill_block_kv
    ready, raw = blocks.rings(ring_scratch, config.prefill_stages, num_raw)
    warpgroup = lax.axis_index("warpgroup")
    window = clip_window(inputs["window"][0]) if shape.has_window else None

    def each_tile(body):
        return _each_tile(inputs, shape, body)

    @pl.when(warpgroup < num_consumers(shape))
    def _consume():
        plgpu.set_max_registers(_CONSUMER_REGISTERS[shape.is_quantized], action="increase")
        ready.release_all()
        plgpu.barrier_arrive(queries_empty.at[warpgroup])
        num_blocks = lax.axis_size("block")
        first_share = lax.axis_index("block") + warpgroup * num_blocks
        merge_heads(inputs, out, lse, first_share, num_blocks * num_consumers(shape), shape)

        def attend(tile: Tile, step):
            span = tile.span(window, block, shape)
            row = tile.row + warpgroup * WARPGROUP_ROWS
            rows = _rows(inputs, queries.at[warpgroup], tile, warpgroup, window, shape)
            plgpu.barrier_wait(queries_full.at[warpgroup])
            sink = None
            if "sinks" in inputs:
                sink = attention.sink_score(inputs["sinks"][tile.head])
                sink = jnp.broadcast_to(sink, (WARPGROUP_ROWS,))
                sink = attention.on_gpu_rows(sink)

            def release():
                plgpu.barrier_arrive(queries_empty.at[warpgroup])

            mean, log2_sum = attention.attend_overlapped(
                rows, span, ready, step, sink, shape, release
            )
            if "v_scale" in inputs:
                mean *= of_head(inputs["v_scale"], tile.head // shape.group)
            _store(tile, row, mean, log2_sum, out, lse, shape)
            return step + span.count

        def nothing(tile: Tile, step):
            row = tile.row + warpgroup * WARPGROUP_ROWS
            zeros = jnp.zeros((WARPGROUP_ROWS, shape.head_dim), jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            none = attention.on_gpu_rows(jnp.full((WARPGROUP_ROWS,), -jnp.inf, jnp.float32))
            _store(tile, row, zeros, none, out, lse, shape)
            return step

        each_tile(
            lambda tile, step: lax.cond(
                tile.length > 0, lambda: attend(tile, step), lambda: nothing(tile, step)
            )
        )

    @pl.when(warpgroup == num_consumers(shape))
    def _produce():
        plgpu.set_max_registers(_PRODUCER_REGISTERS[shape.is_quantized], action="decrease")
        target = ready if raw is None else raw

        def fetch(tile: Tile, step):
            span = tile.span(window, block, shape)
            kv_head = tile.head // shape.group

            def fetch_block(i, _):
                blocks.fetch(
                    target,
                    step + i,
                    inputs["kv"],
                    inputs["table"],
                    tile.seq,
                    kv_head,
                    span.first_key(i),
                    span.low,
                    span.end,
                    block,
                    shape,
                )

            for consumer in range(num_consumers(shape)):
                row = pl.multiple_of(tile.row + consumer * WARPGROUP_ROWS, ROW_TILE)
                plgpu.barrier_wait(queries_empty.at[consumer])
                plgpu.copy_gmem_to_smem(
                    inputs["q"].at[pl.ds(row, WARPGROUP_ROWS), tile.head],
                    queries.at[consumer],
                    queries_full.at[consumer],
                )
            lax.fori_loop(0, span.count, fetch_block, None)
            return step + span.count

        steps = each_tile(
            lambda tile, step: lax.cond(tile.length > 0, lambda: fetch(tile, step), lambda: step)
        )
        target.drain(steps)
        for consumer in range(num_consumers(shape)):
            plgpu.barrier_wait(queries_empty.at[consumer])

    if raw is not None:

        @pl.when(warpgroup == num_consumers(shape) + 1)
        def _convert():
            plgpu.set_max_registers(_CONVERTER_REGISTERS, action="decrease")
            raw.release_all()

            def convert(tile: Tile, step):
                count = tile.span(window, block, shape).count
                count = jnp.where(tile.length > 0, count, 0)
                lax.fori_loop(
                    0, count, lambda i, _: blocks.convert(raw, ready, step + i, shape), None
                )
                return step + count

            ready.drain(each_tile(convert))


def _each_tile(inputs, shape: Shape, body):
    """Calls `step = body(tile, step)` for every tile of this block of threads; returns the last.

    After the sequences' tiles come those of the rows behind the last one and before the first one.
    """
    schedule, num_tokens = inputs["schedule"], inputs["q"].shape[0]
    max_seqs = schedule.shape[1] - 1
    lengths = Lengths(inputs["kv_lens"], inputs["cu_q_lens"], inputs["num_seqs"], num_tokens, shape)
    first_row = lengths.row(0)
    last_row = lengths.row(jnp.clip(inputs["num_seqs"][0], 0, max_seqs))
    num_seq_tiles = schedule[TILES, max_seqs]
    num_behind = _num_tiles(last_row, num_tokens, shape)
    total = (num_seq_tiles + num_behind + _num_tiles(0, first_row, shape)) * shape.num_heads

    def one(state):
        item, seq, step = state
        number, head = item // shape.num_heads, lax.rem(item, shape.num_heads)
        is_of_sequence = number < num_seq_tiles
        seq = lax.while_loop(
            lambda s: is_of_sequence & (number >= schedule[TILES, s + 1]), lambda s: s + 1, seq
        )
        begin, end, length = lengths.of(seq)
        is_behind = number < num_seq_tiles + num_behind
        from_first = jnp.where(
            is_of_sequence,
            schedule[TILES, seq + 1] - 1 - number,
            number - num_seq_tiles - jnp.where(is_behind, 0, num_behind),
        )
        begin = jnp.where(is_of_sequence, begin, jnp.where(is_behind, last_row, 0))
        end = jnp.where(is_of_sequence, end, jnp.where(is_behind, num_tokens, first_row))
        length = jnp.where(is_of_sequence, length, 0)
        row = begin // ROW_TILE * ROW_TILE + from_first * tile_rows(shape)
        tile = Tile(seq, head, row, begin, end, length - end + row, length)
        return item + lax.axis_size("block"), seq, body(tile, step)

    # Decodes may stand before the first tile, too many to walk by; later ones are few at a time.
    block = lax.axis_index("block")
    # Where there is none, as in most steps of an engine, nobody waits for the search.
    first = lax.cond(
        num_seq_tiles > 0,
        lambda: search(schedule, TILES, max_seqs, block // shape.num_heads, 1),
        lambda: jnp.int32(0),
    )
    start = block, first, jnp.int32(0)
    return lax.while_loop(lambda state: state[0] < total, one, start)[2]


def _num_tiles(begin, end, shape: Shape):
    return jnp.where(end > begin, -(-(end - begin // ROW_TILE * ROW_TILE) // tile_rows(shape)), 0)


def _rows(inputs, queries, tile: Tile, warpgroup, window, shape: Shape) -> Rows:
    scale = inputs["sm_scale"][0] * LOG2E
    if "k_scale" in inputs:
        scale *= of_head(inputs["k_scale"], tile.head // shape.group)
    return Rows(
        queries=queries,
        head=tile.head,
        position=tile.position + warpgroup * WARPGROUP_ROWS,
        length=tile.length,
        window=window,
        scale=scale,
        group=1,
    )


def _store(tile: Tile, row, mean, log2_sum, out, lse, shape: Shape):
    """The rows of a warpgroup that are the sequence's."""
    where = (row, tile.head, tile.begin - row, tile.end - row, 1, shape.is_interpreted)
    gpu_rows.store(mean.astype(shape.q_dtype), out, *where)
    if lse is not None:
        gpu_rows.store(attention.natural_log(log2_sum), lse, *where)
