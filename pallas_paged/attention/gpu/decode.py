# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Decode attention on Hopper: the keys of all sequences in one line, cut evenly over the chip.

The pipelines: one block of threads a multiprocessor, with one or two pipelines in it, each with an
equal share of the line of (sequence, KV head, block of keys), whatever the sequences' lengths (the
split of Stream-K, Osama et al., 2023). One warpgroup of a pipeline produces pages, one consumes;
with a quantised pool a third converts in between. Two pipelines know nothing of each other: one
works while the other waits. The query heads of a KV head and the new tokens of a short sequence
share the 64 rows of the matrix unit. Where a share begins or ends inside a sequence's head its
result is a part; the next kernel merges parts by their log-sum-exp.
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
from pallas_paged.attention.gpu.online_softmax import Rows, Span
from pallas_paged.attention.gpu.schedule import (
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
    over_rows,
    search,
    tiling,
)


@dataclasses.dataclass(frozen=True)
class Registers:
    """Registers of a thread of each role."""

    consumer: int
    producer: int
    converter: int = 0


# Of two pipelines, and of one with a converter: 512 and 384 threads, which begin with 128 and 168
# registers each and share those. A lone pipeline without one has all it can use from the start.
_REGISTERS = {False: Registers(216, 40), True: Registers(240, 40, 104)}


@dataclasses.dataclass(frozen=True)
class Segment:
    """The part of a sequence's KV head that a pipeline attends to; traced scalars.

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
            low=low,
            end=self.length,
            first_whole=first_whole,
            end_whole=end_whole,
            block=block,
            newest=oldest + self.count - 1,
            count=self.count,
        )


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
      num_blocks: blocks of threads, all of which run at once; a pipeline of each has a share.
      operands: name -> array, as `_kernel` lists them; what is not given is left out.

    Returns:
      out [T, N, H], lse f32[T, N] or None, both with holes; the parts, two a share:
      means f32[2 * shares + 1, 64, H] and the log2 of their sums over all lanes, of the same
      shape; and what there is to merge, int32[shares, 4], one head a share: its parts, first row of
      the batch, tokens and KV head.
    """
    names = tuple(operands)
    num_tokens = operands["q"].shape[0]
    if shape.is_quantized:
        # Holds every 8-bit float, two by one instruction where bfloat16 takes five.
        shape = dataclasses.replace(shape, product_dtype=jnp.dtype(jnp.float16))
    num_pipelines = config.decode_pipelines
    num_shares = num_blocks * num_pipelines
    # One more than are used: the merge reads whole multiples of 128, past the end of a part.
    parts = jax.ShapeDtypeStruct((2 * num_shares + 1, WARPGROUP_ROWS, shape.head_dim), jnp.float32)
    merges = jax.ShapeDtypeStruct((num_shares, 4), jnp.int32)
    outs: list[Any] = [
        jax.ShapeDtypeStruct(operands["q"].shape, shape.q_dtype),
        parts,
        parts,
        merges,
    ]
    if shape.return_lse:
        outs.append(jax.ShapeDtypeStruct((num_tokens, shape.num_heads), jnp.float32))
    num_raw = config.decode_raw_stages if shape.is_quantized else 0

    sizes = config.decode_block_kv, config.decode_stages, num_raw, num_pipelines

    @named("decode_" + "_".join(map(str, sizes)))
    def body(*refs):
        inputs = dict(zip(names, refs[: len(names)], strict=True))
        out, means, sums, merges, lse = (*refs[len(names) :], None)[:5]
        results = Results(out, lse, means, sums, merges)
        queries = None
        if not queries_in_registers(shape):
            queries = plgpu.SMEM(
                (num_pipelines, WARPGROUP_ROWS, shape.head_dim),
                shape.product_dtype,
                transforms=tiling(shape.product_dtype),
            )
        pl.run_scoped(
            lambda *scoped: _kernel(inputs, results, *scoped, shape, config, num_raw),
            queries,
            blocks.scratch(
                shape,
                config.decode_block_kv,
                config.decode_stages * num_pipelines,
                num_raw * num_pipelines,
                1,
            ),
            collective_axes="warpgroup",
        )

    out, means, sums, merges, *lse = plgpu.kernel(
        body,
        out_type=outs,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_pipelines * _num_roles(shape),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    return out, (lse[0] if lse else None), means, sums, merges


def queries_in_registers(shape: Shape) -> bool:
    """Whether a consumer keeps a segment's queries to itself, which leaves room for pages; one that
    shares its registers with another pipeline's, or sums values of 256 columns, has none left."""
    return shape.is_quantized and shape.head_dim <= 128


def _num_roles(shape: Shape) -> int:
    """Warpgroups of a pipeline."""
    return 2 + shape.is_quantized


def _kernel(inputs, results: Results, queries, ring_scratch, shape: Shape, config, num_raw: int):
    """The warpgroups' roles.

    Args:
      inputs: refs in device memory, as in the prefill kernel.
      results: refs in device memory of what `decode` returns.
      queries, ring_scratch: scratch: [pipelines, 64, H] or None, the rings of all pipelines.
    """
    block = config.decode_block_kv
    pipeline = lax.axis_index("warpgroup") // _num_roles(shape)
    role = lax.rem(lax.axis_index("warpgroup"), _num_roles(shape))
    ready, raw = blocks.rings(ring_scratch, config.decode_stages, num_raw, pipeline)
    if queries is not None:
        queries = queries.at[pipeline]
    # Few shares spread over the multiprocessors before two meet on one.
    num_blocks = lax.axis_size("block")
    index = pipeline * num_blocks + lax.axis_index("block")
    share = Share(index, num_blocks * config.decode_pipelines)
    is_lone = not shape.is_quantized and config.decode_pipelines == 1
    registers = None if is_lone else _REGISTERS[shape.is_quantized]
    window = clip_window(inputs["window"][0]) if shape.has_window else None

    def each_segment(body):
        return _each_segment(inputs, share, shape, body)

    @pl.when(role == 0)
    def _consume():
        if registers:
            plgpu.set_max_registers(registers.consumer, action="increase")
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
                sink = keep_if(segment.first == 0, attention.sink_score(sink), 2 * LOWEST)
            if shape.is_quantized and config.decode_stages > 2:
                # Half the bytes a block: what bounds is this warpgroup's way from block to block.
                mean, log2_sum = attention.attend_overlapped(
                    rows, span, ready, step, sink, shape, on_last_keys=lambda: None
                )
            else:
                mean, log2_sum = attention.attend(rows, span, ready, step, sink, shape)
            if "v_scale" in inputs:
                mean *= of_head(inputs["v_scale"], segment.kv_head)
            _store(segment, rows, mean, log2_sum, results, share, inputs["schedule"], shape)
            return step + span.count

        results.merges[share.index, 0] = 0
        each_segment(attend)

    @pl.when(role == 1)
    def _produce():
        if registers:
            plgpu.set_max_registers(registers.producer, action="decrease")
        target = ready if raw is None else raw

        def fetch(segment: Segment, step):
            span = segment.span(window, block, shape)

            def fetch_block(i, _):
                blocks.fetch(
                    target,
                    step + i,
                    inputs["kv"],
                    inputs["table"],
                    segment.seq,
                    segment.kv_head,
                    span.first_key(i),
                    span.low,
                    span.end,
                    block,
                    shape,
                )

            lax.fori_loop(0, span.count, fetch_block, None)
            return step + span.count

        target.drain(each_segment(fetch))

    if raw is not None:

        @pl.when(role == 2)
        def _convert():
            plgpu.set_max_registers(_REGISTERS[True].converter, action="decrease")
            raw.release_all()

            def convert(segment: Segment, step):
                lax.fori_loop(
                    0,
                    segment.count,
                    lambda i, _: blocks.convert(raw, ready, step + i, shape),
                    None,
                )
                return step + segment.count

            ready.drain(each_segment(convert))


@dataclasses.dataclass(frozen=True)
class Share:
    """One of `count` equal parts of the line of all (sequence, KV head, block of keys).

    Attributes:
      index: which, a traced scalar.
      count: pipelines of all blocks of threads.
    """

    index: Any
    count: int

    def places(self, schedule, shape: Shape):
        """[begin, end) in the line."""
        each, rest = self._each(schedule, shape)
        begin = self.index * each + jnp.minimum(self.index, rest)
        return begin, begin + each + jnp.where(self.index < rest, 1, 0)

    def holding(self, place, schedule, shape: Shape):
        """The index of the share that holds a place."""
        each, rest = self._each(schedule, shape)
        longer = rest * (each + 1)  # places in the first shares, which are one longer
        return jnp.where(
            place < longer, place // (each + 1), rest + (place - longer) // jnp.maximum(each, 1)
        )

    def _each(self, schedule, shape: Shape):
        total = schedule[BLOCKS, schedule.shape[1] - 1] * shape.num_kv_heads
        return total // self.count, lax.rem(total, self.count)


def _each_segment(inputs, share: Share, shape: Shape, body):
    """Calls `step = body(segment, step)` for a share in order; returns the last."""
    schedule, num_tokens = inputs["schedule"], inputs["q"].shape[0]
    lengths = Lengths(inputs["kv_lens"], inputs["cu_q_lens"], inputs["num_seqs"], num_tokens, shape)
    max_seqs = schedule.shape[1] - 1
    begin, end = share.places(schedule, shape)

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
            seq=seq,
            kv_head=kv_head,
            row=row,
            num_tokens=end_row - row,
            length=length,
            first=first,
            count=jnp.minimum(num_blocks - first, end - place),
            num_blocks=num_blocks,
            place=place,
        )
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
    values = gpu_rows.load(
        inputs["q"],
        segment.row,
        head,
        segment.num_tokens * shape.group,
        shape.group,
        (WARPGROUP_ROWS, shape.head_dim),
        shape.is_interpreted,
    )
    if shape.product_dtype != shape.q_dtype:
        values, unit = _as_float16(values)
        scale *= unit
    if queries is not None:
        # Nobody reads the last segment's any more: its products have been waited for.
        queries[...] = values
        plgpu.commit_smem()
        values = queries
    return Rows(
        queries=values,
        head=head,
        position=segment.length - segment.num_tokens,
        length=segment.length,
        window=window,
        scale=scale,
        group=shape.group,
    )


def _as_float16(values):
    """(x, unit): float16 x and f32[64] powers of two, with `x * unit` the rows of bfloat16 values.

    A row's largest value comes just under what float16 holds, so that no bit is lost of values down
    to 2**-29 of it.
    """
    wide = values.astype(jnp.float32)
    largest = lax.bitcast_convert_type(jnp.abs(wide).max(axis=1), jnp.int32)
    # Exponents as float32 has them, with 127 added; float16's largest is 15.
    exponent = jnp.minimum(127 + 127 + 15 - (largest >> 23), 253)
    factor, unit = (
        lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent, 254 - exponent)
    )
    return (wide * over_rows(factor, wide.shape[1])).astype(jnp.float16), unit


def _store(
    segment: Segment,
    rows: Rows,
    mean,
    log2_sum,
    results: Results,
    share: Share,
    schedule,
    shape: Shape,
):
    """A whole head's rows to the output, others as a part."""
    count = segment.num_tokens * shape.group
    is_whole = segment.count == segment.num_blocks

    @pl.when(is_whole)
    def _():
        where = (segment.row, rows.head, 0, count, shape.group, shape.is_interpreted)
        gpu_rows.store(mean.astype(shape.q_dtype), results.out, *where)
        if results.lse is not None:
            gpu_rows.store(attention.natural_log(log2_sum), results.lse, *where)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        part = 2 * share.index + jnp.where(segment.first > 0, 0, 1)
        where = (part, 0, 0, count, WARPGROUP_ROWS, shape.is_interpreted)
        gpu_rows.store(mean, results.means, *where)
        gpu_rows.store(attention.over_rows(log2_sum, shape.head_dim), results.sums, *where)

    @pl.when(jnp.logical_not(is_whole) & (segment.first == 0))
    def _():
        last = share.holding(segment.place + segment.num_blocks - 1, schedule, shape)
        merge = (last - share.index + 1, segment.row, segment.num_tokens, segment.kv_head)
        for i, value in enumerate(merge):
            results.merges[share.index, i] = value
