# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Decode attention on Hopper: the keys of all sequences in one line, cut evenly over the chip.

The pipeline: as many blocks of threads as fit the chip, each with an equal share of the line of
(sequence, KV head, block of keys), whatever the sequences' lengths (the split of Stream-K, Osama et
al., 2023). One warpgroup produces pages, one consumes; with a quantised pool a third converts in
between. The query heads of a KV head and the new tokens of a short sequence share the 64 rows of
the matrix unit. Where a share begins or ends inside a sequence's head its result is a part; the
next kernel merges parts by their log-sum-exp.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.ragged_paged_attention import mosaic_gpu_attend as attention
from pallas_paged.ragged_paged_attention import mosaic_gpu_blocks as blocks
from pallas_paged.ragged_paged_attention import mosaic_gpu_rows as gpu_rows
from pallas_paged.ragged_paged_attention.mosaic_gpu_attend import Rows, Span
from pallas_paged.ragged_paged_attention.mosaic_gpu_shape import (
    BLOCKS,
    LOG2E,
    LOWEST,
    WARPGROUP_ROWS,
    Lengths,
    Shape,
    clip_window,
    first_seen,
    keep_if,
    named,
    of_head,
    search,
    tiling,
)

# Registers of a thread, by whether there is a converter. 64 Ki are for all threads of a
# multiprocessor: 240 + 40 and 240 + 40 + 104 times 128 are under the half and all of them.
_CONSUMER_REGISTERS = {False: 216, True: 240}
_PRODUCER_REGISTERS = 40
_CONVERTER_REGISTERS = 104


@dataclasses.dataclass(frozen=True)
class Segment:
    """The part of a sequence's KV head that a block of threads attends to; traced scalars.

    Attributes:
      seq, kv_head: whose keys.
      row: the sequence's first row of the batch.
      num_tokens: its rows.
      length: tokens in the cache.
      first: the segment's first block of `num_blocks`.
      count: its blocks.
      num_blocks: blocks of the sequence's head in all.
      place: of its first block in the line of all blocks.
    """

    seq: Any
    kv_head: Any
    row: Any
    num_tokens: Any
    length: Any
    first: Any
    count: Any
    num_blocks: Any
    place: Any

    def span(self, window, block: int, shape: Shape) -> Span:
        position = self.length - self.num_tokens
        low: Any = 0
        first_whole: Any = 0
        if shape.has_window:
            low = first_seen(position, window)
            first_whole = first_seen(self.length - 1, window)
        end_whole = position + 1 if shape.causal else self.length
        oldest = low // block + self.first
        return Span(
            low=low, end=self.length, first_whole=first_whole, end_whole=end_whole, block=block,
            newest=oldest + self.count - 1, count=self.count,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Results:
    """What the kernel writes: refs in device memory of what `decode` returns."""

    out: Any
    lse: Any
    means: Any
    sums: Any
    merges: Any


def decode(shape: Shape, config, num_blocks: int, operands: dict[str, jax.Array]):
    """Launches the kernel; its rows of out and lse are the short sequences' whole segments.

    Args:
      shape: the static description.
      config: block sizes.
      num_blocks: blocks of threads, all of which run at once.
      operands: name -> array, as `_kernel` lists them; what is not given is left out.

    Returns:
      out [T, N, H], lse f32[T, N] or None, both with holes; the parts, two a block of threads:
      means f32[2 * num_blocks + 1, 64, H] and the log2 of their sums over all lanes, of the same
      shape; and what there is to merge, int32[num_blocks, 4], one head a block of threads: its
      parts, first row of the batch, tokens and KV head.
    """
    names = tuple(operands)
    num_tokens = operands["q"].shape[0]
    # One more than are used: the merge reads whole multiples of 128, past the end of a part.
    parts = jax.ShapeDtypeStruct(
        (2 * num_blocks + 1, WARPGROUP_ROWS, shape.head_dim), jnp.float32
    )
    merges = jax.ShapeDtypeStruct((num_blocks, 4), jnp.int32)
    outs: list[Any] = [
        jax.ShapeDtypeStruct(operands["q"].shape, shape.q_dtype), parts, parts, merges
    ]  # fmt: skip
    if shape.return_lse:
        outs.append(jax.ShapeDtypeStruct((num_tokens, shape.num_heads), jnp.float32))
    num_raw = config.decode_raw_slots if shape.is_quantized else 0

    @named(f"decode_{config.decode_block_keys}_{config.decode_slots}_{num_raw}")
    def body(*refs):
        inputs = dict(zip(names, refs[: len(names)], strict=True))
        out, means, sums, merges, lse = (*refs[len(names):], None)[:5]
        results = Results(out, lse, means, sums, merges)
        queries = plgpu.SMEM(
            (WARPGROUP_ROWS, shape.head_dim), shape.q_dtype, transforms=tiling(shape.q_dtype)
        )
        pl.run_scoped(
            lambda *scoped: _kernel(inputs, results, *scoped, shape, config, num_raw),
            queries,
            blocks.scratch(shape, config.decode_block_keys, config.decode_slots, num_raw, 1),
            collective_axes="warpgroup",
        )

    out, means, sums, merges, *lse = plgpu.kernel(
        body,
        out_type=outs,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=2 + shape.is_quantized,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    return out, (lse[0] if lse else None), means, sums, merges


def _kernel(
    inputs, results: Results, queries, ring_scratch, shape: Shape, config, num_raw: int
):
    """The warpgroups' roles.

    Args:
      inputs: refs in device memory, as in the prefill kernel.
      results: refs in device memory of what `decode` returns.
      queries, ring_scratch: scratch: [64, H], the rings.
    """
    block = config.decode_block_keys
    ready, raw = blocks.rings(ring_scratch, config.decode_slots, num_raw)
    warpgroup = lax.axis_index("warpgroup")
    window = clip_window(inputs["window"][0]) if shape.has_window else None

    def set_registers(count, action):
        # A lone block of two warpgroups has all it can use from the start.
        if shape.is_quantized or config.decode_blocks_per_sm > 1:
            plgpu.set_max_registers(count, action=action)

    def each_segment(body):
        return _each_segment(inputs, shape, body)

    @pl.when(warpgroup == 0)
    def _consume():
        set_registers(_CONSUMER_REGISTERS[shape.is_quantized], "increase")
        ready.release_all()

        def attend(segment: Segment, step):
            span = segment.span(window, block, shape)
            rows = _rows(inputs, queries, segment, window, shape)
            sink = None
            if "sinks" in inputs:
                sink = gpu_rows.load_per_head(
                    inputs["sinks"], rows.head, shape.group, WARPGROUP_ROWS, shape.is_interpreted
                )
                # One of a head's segments takes the sink, or the merge would count it twice.
                sink = keep_if(segment.first == 0, sink * LOG2E, 2 * LOWEST)
            mean, log2_sum = attention.attend(rows, span, ready, step, sink, shape)
            if "v_scale" in inputs:
                mean *= of_head(inputs["v_scale"], segment.kv_head)
            _store(segment, rows, mean, log2_sum, results, inputs["schedule"], shape)
            return step + span.count

        results.merges[lax.axis_index("block"), 0] = 0
        each_segment(attend)

    @pl.when(warpgroup == 1)
    def _produce():
        set_registers(_PRODUCER_REGISTERS, "decrease")
        target = ready if raw is None else raw

        def fetch(segment: Segment, step):
            span = segment.span(window, block, shape)

            def fetch_block(i, _):
                blocks.fetch(
                    target, step + i, inputs["kv"], inputs["table"], segment.seq, segment.kv_head,
                    span.first_key(i), span.low, span.end, block, shape,
                )  # fmt: skip

            lax.fori_loop(0, span.count, fetch_block, None)
            return step + span.count

        target.drain(each_segment(fetch))

    if raw is not None:

        @pl.when(warpgroup == 2)
        def _convert():
            set_registers(_CONVERTER_REGISTERS, "decrease")
            raw.release_all()

            def convert(segment: Segment, step):
                lax.fori_loop(
                    0, segment.count,
                    lambda i, _: blocks.convert(raw, ready, step + i, shape), None,
                )  # fmt: skip
                return step + segment.count

            ready.drain(each_segment(convert))


def _share(schedule, shape: Shape, block):
    """[begin, end) of a block of threads in the line of all (sequence, KV head, block of keys)."""
    total = schedule[BLOCKS, schedule.shape[1] - 1] * shape.num_kv_heads
    num_blocks = lax.axis_size("block")
    each, rest = total // num_blocks, lax.rem(total, num_blocks)
    begin = block * each + jnp.minimum(block, rest)
    return begin, begin + each + jnp.where(block < rest, 1, 0)


def _sharer(schedule, shape: Shape, place):
    """The block of threads whose share holds a place in the line."""
    total = schedule[BLOCKS, schedule.shape[1] - 1] * shape.num_kv_heads
    num_blocks = lax.axis_size("block")
    each, rest = total // num_blocks, lax.rem(total, num_blocks)
    longer = rest * (each + 1)  # places in the first shares, which are one longer
    return jnp.where(
        place < longer, place // (each + 1), rest + (place - longer) // jnp.maximum(each, 1)
    )


def _each_segment(inputs, shape: Shape, body):
    """Calls `step = body(segment, step)` for this block's share in order; returns the last."""
    schedule, num_tokens = inputs["schedule"], inputs["q"].shape[0]
    lengths = Lengths(
        inputs["kv_lens"], inputs["cu_q_lens"], inputs["num_seqs"], num_tokens, shape
    )
    max_seqs = schedule.shape[1] - 1
    begin, end = _share(schedule, shape, lax.axis_index("block"))

    def one(state):
        place, seq, step = state
        seq = lax.while_loop(
            lambda s: schedule[BLOCKS, s + 1] * shape.num_kv_heads <= place, lambda s: s + 1, seq
        )
        before = schedule[BLOCKS, seq]
        num_blocks = schedule[BLOCKS, seq + 1] - before
        inside = place - before * shape.num_kv_heads
        kv_head = inside // num_blocks
        first = inside - kv_head * num_blocks
        row, end_row, length = lengths.of(seq)
        segment = Segment(
            seq=seq, kv_head=kv_head, row=row, num_tokens=end_row - row, length=length,
            first=first, count=jnp.minimum(num_blocks - first, end - place),
            num_blocks=num_blocks, place=place,
        )  # fmt: skip
        return place + segment.count, seq, body(segment, step)

    first = lax.cond(
        begin < end,
        lambda: search(schedule, BLOCKS, max_seqs, begin, shape.num_kv_heads),
        lambda: jnp.int32(0),
    )
    start = begin, first, jnp.int32(0)
    return lax.while_loop(lambda state: state[0] < end, one, start)[2]


def _rows(inputs, queries, segment: Segment, window, shape: Shape) -> Rows:
    scale = inputs["sm_scale"][0] * LOG2E
    if "k_scale" in inputs:
        scale *= of_head(inputs["k_scale"], segment.kv_head)
    head = segment.kv_head * shape.group
    # Nobody reads the last segment's any more: its products have been waited for.
    queries[...] = gpu_rows.load(
        inputs["q"], segment.row, head, segment.num_tokens * shape.group, shape.group,
        (WARPGROUP_ROWS, shape.head_dim), shape.is_interpreted,
    )  # fmt: skip
    plgpu.commit_smem()
    return Rows(
        queries=queries, head=head, position=segment.length - segment.num_tokens,
        length=segment.length, window=window, scale=scale, group=shape.group,
    )  # fmt: skip


def _store(segment: Segment, rows: Rows, mean, log2_sum, results: Results, schedule, shape: Shape):
    """A whole head's rows to the output, others as a part."""
    count = segment.num_tokens * shape.group
    is_whole = segment.count == segment.num_blocks
    block = lax.axis_index("block")

    @pl.when(is_whole)
    def _():
        where = (segment.row, rows.head, 0, count, shape.group, shape.is_interpreted)
        gpu_rows.store(mean.astype(shape.q_dtype), results.out, *where)
        if results.lse is not None:
            gpu_rows.store(attention.natural_log(log2_sum), results.lse, *where)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        part = 2 * block + jnp.where(segment.first > 0, 0, 1)
        where = (part, 0, 0, count, WARPGROUP_ROWS, shape.is_interpreted)
        gpu_rows.store(mean, results.means, *where)
        gpu_rows.store(attention.over_rows(log2_sum, shape.head_dim), results.sums, *where)

    @pl.when(jnp.logical_not(is_whole) & (segment.first == 0))
    def _():
        last = _sharer(schedule, shape, segment.place + segment.num_blocks - 1)
        merge = (last - block + 1, segment.row, segment.num_tokens, segment.kv_head)
        for i, value in enumerate(merge):
            results.merges[block, i] = value
