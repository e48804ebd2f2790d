# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The main loops of the attention kernels: the roles of the warpgroups of a thread block.

In the decode and the prefill kernel one warpgroup produces: it asks for the KV blocks (and in the
prefill kernel for the queries) of the tiles to come. Others consume: they attend to the blocks.
With a quantised pool one more warpgroup converts the blocks in between. Each role goes through the
same tiles by itself, and the barriers of the stages keep them together.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu import decode, prefill
from pallas_paged.attention.gpu.combine_splits import combine_splits
from pallas_paged.attention.gpu.convert import convert_blocks
from pallas_paged.attention.gpu.kv_blocks import KvScratch, fetch_range, stages_of
from pallas_paged.attention.gpu.mma_layout import full_column, zero_result
from pallas_paged.attention.gpu.online_softmax import attend, attend_overlapped
from pallas_paged.attention.gpu.refs import (
    DecodeOutputs,
    Inputs,
    PartialResults,
    PrefillOutputs,
    scale_of_head,
)
from pallas_paged.attention.gpu.schedule import clip_window
from pallas_paged.attention.gpu.spec import WARPGROUP_ROWS, KernelSpec, Ref, Scalar


@dataclasses.dataclass(frozen=True)
class _Registers:
    """The registers of a thread of each role."""

    consumer: int
    producer: int
    converter: int = 0


# By whether the pool is quantised. A multiprocessor has 64 Ki registers. The decode kernel has 512
# threads in two pipelines, or 384 in one pipeline with a converter. They begin with 128 or 168
# registers each and share those.
_DECODE_REGISTERS = {False: _Registers(216, 40), True: _Registers(240, 40, 104)}
# 2 x 240 + 24, or 2 x 208 + 40 + 56, times the 128 threads of a warpgroup.
_PREFILL_REGISTERS = {False: _Registers(240, 24), True: _Registers(208, 40, 56)}


def decode_kernel(
    spec: KernelSpec,
    inputs: Inputs,
    outputs: DecodeOutputs,
    queries: Ref | None,
    kv_scratch: KvScratch,
) -> None:
    """Attends to the sequences whose new tokens fit the rows of one warpgroup.

    There is one thread block per multiprocessor, with one or two pipelines in it. Each pipeline has
    a consumer, a producer and, with a quantised pool, a converter. Two pipelines are independent:
    one works while the other waits.

    Args:
      spec: the static parameters.
      inputs, outputs: refs in device memory.
      queries: scratch, [pipelines, 64, H]; None where the queries stay in registers.
      kv_scratch: scratch, the stages of all pipelines.
    """
    pipeline = lax.axis_index("warpgroup") // spec.decode_roles
    role = lax.rem(lax.axis_index("warpgroup"), spec.decode_roles)
    stages, raw_stages = stages_of(kv_scratch, spec.decode_kv, pipeline)
    if queries is not None:
        queries = queries.at[pipeline]
    # The first pipelines of all multiprocessors come first, so that little work is spread over the
    # multiprocessors before two partitions meet on one.
    num_thread_blocks = lax.axis_size("block")
    index = pipeline * num_thread_blocks + lax.axis_index("block")
    partition = decode.Partition(index, num_thread_blocks * spec.config.decode_pipelines)
    # A lone pipeline without a converter has all the registers that it can use from the start.
    shares_registers = spec.is_quantized or spec.config.decode_pipelines > 1
    registers = _DECODE_REGISTERS[spec.is_quantized]
    window = None if inputs.window is None else clip_window(inputs.window[0])

    @pl.when(role == 0)
    def _consume() -> None:
        if shares_registers:
            plgpu.set_max_registers(registers.consumer, action="increase")
        stages.release_all()

        def attend_to(tile: decode.WorkTile, step: Scalar) -> Scalar:
            kv_range = tile.kv_range(window, spec)
            rows, where = decode.load_queries(inputs, queries, tile, window, spec)
            sink = decode.load_sink(inputs, where, tile, spec)
            if spec.is_quantized and spec.config.decode_stages > 2:
                # A block has half the bytes, so the consumer's time from block to block bounds.
                mean, log2_sum = attend_overlapped(
                    rows, kv_range, stages, step, sink, spec, on_last_keys=lambda: None
                )
            else:
                mean, log2_sum = attend(rows, kv_range, stages, step, sink, spec)
            if inputs.v_scale is not None:
                mean *= scale_of_head(inputs.v_scale, tile.kv_head)
            decode.store(tile, where, mean, log2_sum, outputs, partition, inputs.schedule, spec)
            return step + kv_range.count

        outputs.splits[partition.index, 0] = 0
        decode.for_each_tile(inputs, partition, spec, attend_to)

    @pl.when(role == 1)
    def _produce() -> None:
        if shares_registers:
            plgpu.set_max_registers(registers.producer, action="decrease")
        target = stages if raw_stages is None else raw_stages

        def fetch(tile: decode.WorkTile, step: Scalar) -> Scalar:
            kv_range = tile.kv_range(window, spec)
            return fetch_range(target, step, kv_range, tile.seq, tile.kv_head, inputs, spec)

        target.drain(decode.for_each_tile(inputs, partition, spec, fetch))

    if raw_stages is not None:

        @pl.when(role == 2)
        def _convert() -> None:
            plgpu.set_max_registers(registers.converter, action="decrease")
            raw_stages.release_all()

            def convert(tile: decode.WorkTile, step: Scalar) -> Scalar:
                return convert_blocks(raw_stages, stages, step, tile.count, spec)

            stages.drain(decode.for_each_tile(inputs, partition, spec, convert))


def prefill_kernel(
    spec: KernelSpec,
    inputs: Inputs,
    partial: PartialResults,
    outputs: PrefillOutputs,
    queries: prefill.QueryStage,
    kv_scratch: KvScratch,
) -> None:
    """Combines the split heads, attends to the other sequences, and zeroes the rows without work.

    There is one thread block per multiprocessor, with two consumers of 64 rows each. The consumers
    alternate by themselves: while one's softmax runs, the matrix unit has the products of the
    other.

    Args:
      spec: the static parameters.
      inputs, partial, outputs: refs in device memory.
      queries: scratch, the queries of all consumers.
      kv_scratch: scratch, the stages.
    """
    stages, raw_stages = stages_of(kv_scratch, spec.prefill_kv)
    warpgroup = lax.axis_index("warpgroup")
    num_consumers = spec.prefill_consumers
    registers = _PREFILL_REGISTERS[spec.is_quantized]
    window = None if inputs.window is None else clip_window(inputs.window[0])

    @pl.when(warpgroup < num_consumers)
    def _consume() -> None:
        plgpu.set_max_registers(registers.consumer, action="increase")
        stages.release_all()
        queries.release(warpgroup)
        num_thread_blocks = lax.axis_size("block")
        first = lax.axis_index("block") + warpgroup * num_thread_blocks
        combine_splits(partial, outputs, first, num_thread_blocks * num_consumers, spec)

        def attend_to(tile: prefill.QTile, step: Scalar) -> Scalar:
            kv_range = tile.kv_range(window, spec)
            row = tile.row + warpgroup * WARPGROUP_ROWS
            rows = prefill.query_rows(inputs, queries, tile, warpgroup, window, spec)
            queries.wait(warpgroup)
            sink = prefill.load_sink(inputs, tile)
            mean, log2_sum = attend_overlapped(
                rows, kv_range, stages, step, sink, spec, lambda: queries.release(warpgroup)
            )
            if inputs.v_scale is not None:
                mean *= scale_of_head(inputs.v_scale, tile.head // spec.group)
            prefill.store(tile, row, mean, log2_sum, outputs, spec)
            return step + kv_range.count

        def zero(tile: prefill.QTile, step: Scalar) -> Scalar:
            row = tile.row + warpgroup * WARPGROUP_ROWS
            mean, log2_sum = zero_result(spec.head_dim), full_column(-jnp.inf)
            prefill.store(tile, row, mean, log2_sum, outputs, spec)
            return step

        def attend_or_zero(tile: prefill.QTile, step: Scalar) -> Scalar:
            return lax.cond(
                tile.length > 0, lambda: attend_to(tile, step), lambda: zero(tile, step)
            )

        prefill.for_each_tile(inputs, spec, attend_or_zero)

    @pl.when(warpgroup == num_consumers)
    def _produce() -> None:
        plgpu.set_max_registers(registers.producer, action="decrease")
        target = stages if raw_stages is None else raw_stages

        def fetch(tile: prefill.QTile, step: Scalar) -> Scalar:
            kv_range = tile.kv_range(window, spec)
            kv_head = tile.head // spec.group
            queries.fetch(tile, inputs, spec)
            return fetch_range(target, step, kv_range, tile.seq, kv_head, inputs, spec)

        def fetch_if_any(tile: prefill.QTile, step: Scalar) -> Scalar:
            return lax.cond(tile.length > 0, lambda: fetch(tile, step), lambda: step)

        target.drain(prefill.for_each_tile(inputs, spec, fetch_if_any))
        queries.drain(spec)

    if raw_stages is not None:

        @pl.when(warpgroup == num_consumers + 1)
        def _convert() -> None:
            plgpu.set_max_registers(registers.converter, action="decrease")
            raw_stages.release_all()

            def convert(tile: prefill.QTile, step: Scalar) -> Scalar:
                count = tile.kv_range(window, spec).count
                count = jnp.where(tile.length > 0, count, 0)
                return convert_blocks(raw_stages, stages, step, count, spec)

            stages.drain(prefill.for_each_tile(inputs, spec, convert))


def finish_kernel(
    spec: KernelSpec, inputs: Inputs, partial: PartialResults, outputs: PrefillOutputs
) -> None:
    """Takes the prefill kernel's place in a call without prefills; arguments as there.

    It combines the split heads and zeroes the rows without work. An idle prefill kernel takes 3.5
    us on an H100, and this one 3.0. The larger gain is that a program without the other is lowered
    in 1.4 s in place of 2.3. The rows of a sequence that is longer than promised are NaN.
    """
    warpgroup, num_thread_blocks = lax.axis_index("warpgroup"), lax.axis_size("block")
    first = warpgroup * num_thread_blocks + lax.axis_index("block")
    combine_splits(partial, outputs, first, num_thread_blocks * spec.prefill_consumers, spec)

    def fill(tile: prefill.QTile, step: Scalar) -> Scalar:
        row = tile.row + warpgroup * WARPGROUP_ROWS
        value = jnp.where(tile.length > 0, jnp.nan, 0.0)
        mean = zero_result(spec.head_dim) + value
        prefill.store(tile, row, mean, full_column(float("-inf")), outputs, spec)
        return step

    prefill.for_each_tile(inputs, spec, fill)
