# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""One warpgroup's attention of 64 rows of queries to blocks of keys and values.

The online softmax of FlashAttention (Dao et al., 2022), in base 2. The product of the queries with
the next block's keys is issued together with the product of this block's weights with its values,
so that the matrix unit works while the softmax does (the overlap inside a warpgroup of
FlashAttention-3, Shah et al., 2024).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu import kv_blocks as blocks
from pallas_paged.attention.gpu.kv_blocks import Ring
from pallas_paged.attention.gpu.schedule import (
    LOG2E,
    LOWEST,
    WARPGROUP_ROWS,
    Shape,
    iota,
    on_gpu_rows,
    over_rows,
)

# Above it the rounding of a tanh near 1 is more than 1e-5 of a score.
_LARGE_CAP = 128.0


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one warpgroup and what they see; traced scalars but for the first and the last.

    Attributes:
      queries: [64, H], a ref in shared memory or values in registers.
      head: query head of row 0; row r has head `head + r % group`.
      position: of row 0; row r has position `position + r // group`.
      length: of the sequence; no row sees further.
      window: how many keys a row looks back on, or None.
      scale: on the product of a query with a key, in base 2; a scalar, or f32[64], one a row.
      group: rows to a position.
    """

    queries: Any
    head: Any
    position: Any
    length: Any
    window: Any
    scale: Any
    group: int


@dataclasses.dataclass(frozen=True)
class Span:
    """The blocks that rows attend to, last to first: a later block has a mask more often.

    Attributes:
      low: the first position that any of the rows sees.
      end: where the sequence ends; later positions of a block that the rows do not see are there.
      first_whole, end_whole: positions that all rows see: blocks inside need no mask.
      block: positions of a block.
      newest: the block to begin with.
      count: how many, at least 1.
    """

    low: Any
    end: Any
    first_whole: Any
    end_whole: Any
    block: int
    newest: Any
    count: Any

    def first_key(self, i):
        """The first position of the i-th block."""
        return (self.newest - i) * self.block

    def masked(self) -> tuple[Any, Any]:
        """(a, b): blocks 0 to a and from b on need a mask."""
        begin = self.count - jnp.clip(self.end_whole // self.block - self._oldest, 0, self.count)
        whole = -(-self.first_whole // self.block) - self._oldest
        begin = jnp.maximum(begin, 1)
        return begin, jnp.clip(self.count - whole, begin, self.count)

    @property
    def _oldest(self):
        return self.newest - self.count + 1


def attend_overlapped(rows: Rows, span: Span, ring: Ring, step, sink, shape: Shape, on_last_keys):
    """Attends to the blocks of a span, which come through the ring from its `step`-th on.

    For work that the matrix unit bounds: a block's scores are issued with the sum of the values of
    the block before it. A slot is held for two blocks.

    Args:
      sink: one more score a row, f32[64] in base 2, or None.
      on_last_keys: called when the queries have been read for the last time.

    Returns:
      the mean of the values f32[64, H], the log2 of the sum of exponentials f32[64]; rows that saw
      nothing have mean 0 and less than LOWEST.
    """

    def next_block(i, carry, is_masked):
        out, largest, total, weights = carry
        slot, before = _wait(ring, step, span, i, is_masked, shape), ring.slot(step + i - 1)
        keys, values = ring.keys(slot, shape.head_dim), ring.values(before, shape.head_dim)

        def weigh(scores):
            return _softmax(scores, i, largest, total, rows, span, is_masked, shape)

        out, (largest, total, shrink, new) = _scores_and_sum(
            rows.queries, keys, out, weights, values, weigh, span.block, shape
        )
        plgpu.barrier_arrive(ring.empty.at[before])
        out, new = out * over_rows(shrink, shape.head_dim), new.astype(shape.product_dtype)
        return out, largest, total, new

    out, largest, total = _start(sink, shape)
    slot = _wait(ring, step, span, 0, True, shape)
    scores = _scores(rows.queries, ring.keys(slot, shape.head_dim), span.block, shape)
    largest, total, _, weights = _softmax(scores, 0, largest, total, rows, span, True, shape)
    carry = out, largest, total, weights.astype(shape.product_dtype)
    out, largest, total, weights = _each_block(1, span, carry, next_block, shape)
    on_last_keys()
    last = ring.slot(step + span.count - 1)
    out = _add_product(out, weights, ring.values(last, shape.head_dim), shape)
    plgpu.barrier_arrive(ring.empty.at[last])
    return _finish(out, largest, total, shape)


def attend(rows: Rows, span: Span, ring: Ring, step, sink, shape: Shape):
    """As `attend_overlapped`, one block after the other.

    For work that the memory bounds: a slot is empty as soon as its block is done.
    """

    def next_block(i, carry, is_masked):
        out, largest, total = carry
        slot = _wait(ring, step, span, i, is_masked, shape)
        scores = _scores(rows.queries, ring.keys(slot, shape.head_dim), span.block, shape)
        largest, total, shrink, weights = _softmax(
            scores, i, largest, total, rows, span, is_masked, shape
        )
        out, weights = out * over_rows(shrink, shape.head_dim), weights.astype(shape.product_dtype)
        out = _add_product(out, weights, ring.values(slot, shape.head_dim), shape)
        plgpu.barrier_arrive(ring.empty.at[slot])
        return out, largest, total

    carry = _each_block(0, span, _start(sink, shape), next_block, shape)
    out, largest, total = carry
    return _finish(out, largest, total, shape)


def _start(sink, shape: Shape):
    """(sum of values, largest score, sum of exponentials) before any key."""
    out = jnp.zeros((WARPGROUP_ROWS, shape.head_dim), jnp.float32)
    out = plgpu.layout_cast(out, plgpu.Layout.WGMMA)
    if sink is not None:
        return out, sink, on_gpu_rows(jnp.ones((WARPGROUP_ROWS,), jnp.float32))
    largest = on_gpu_rows(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32))
    return out, largest, on_gpu_rows(jnp.zeros((WARPGROUP_ROWS,), jnp.float32))


def _each_block(first: int, span: Span, carry, next_block, shape: Shape):
    """`carry = next_block(i, carry, is_masked)` for the blocks from the first on."""
    begin, end = span.masked()
    carry = lax.fori_loop(first, begin, lambda i, c: next_block(i, c, True), carry)
    carry = lax.fori_loop(begin, end, lambda i, c: next_block(i, c, False), carry)
    if shape.has_window:
        carry = lax.fori_loop(end, span.count, lambda i, c: next_block(i, c, True), carry)
    return carry


def _wait(ring: Ring, step, span: Span, i, is_masked: bool, shape: Shape):
    """The slot of the i-th block, once it is there."""
    slot = ring.slot(step + i)
    plgpu.barrier_wait(ring.full.at[slot])
    if is_masked:
        _clear_edges(ring, slot, span, i, shape)
    return slot


def _softmax(scores, i, largest, total, rows: Rows, span: Span, is_masked: bool, shape: Shape):
    """(largest, total, shrink, weights) with the scores of the i-th block."""
    scores, scale = _scaled(scores, rows, shape)
    if is_masked:
        scores = _mask(scores, span.first_key(i), rows, shape)
    newest = jnp.maximum(largest, scores.max(axis=1) * scale)
    shrink = jnp.exp2(largest - newest)
    weights = jnp.exp2(scores * _over_scores(scale, scores) - over_rows(newest, span.block))
    return newest, total * shrink + weights.sum(axis=1), shrink, weights


def _finish(out, largest, total, shape: Shape):
    """Mean of the values and log2 of the sum of exponentials."""
    is_any = total > 0
    mean = out * over_rows(1.0 / jnp.where(is_any, total, 1.0), shape.head_dim)
    return mean, jnp.where(is_any, largest + jnp.log(total) * LOG2E, 2 * LOWEST)


def sink_score(sink):
    """A sink's score in base 2. One of -inf is as low as finite numbers go: it weighs nothing, and
    its difference from itself stays 0."""
    return jnp.maximum(sink * LOG2E, 2 * LOWEST)


def natural_log(log2_sum):
    """The log-sum-exp that a caller gets, -inf where nothing was seen."""
    return jnp.where(log2_sum > LOWEST, log2_sum * (1.0 / LOG2E), -jnp.inf)


def _scaled(scores, rows: Rows, shape: Shape):
    """(scores, factor) whose product is the scores in base 2; the factor is positive."""
    if shape.soft_cap is None:
        if shape.is_scale_positive:
            return scores, rows.scale
        # The largest score times such a factor may be the smallest; and 0 times -inf is NaN.
        return scores * _over_scores(rows.scale, scores), 1.0
    # tanh(x) = 1 - 2 / (exp(2 x) + 1); the hardware's own tanh is good to 11 bits only.
    grown = jnp.exp2(scores * _over_scores(rows.scale * (2.0 / shape.soft_cap), scores))
    bounded = 1.0 - 2.0 / (grown + 1.0)
    if shape.soft_cap > _LARGE_CAP:
        # Near 0 that difference has lost what such a cap would make large: its power series.
        x = scores * _over_scores(rows.scale * (1.0 / (LOG2E * shape.soft_cap)), scores)
        square = x * x
        series = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
        bounded = jnp.where(square < 0.04, series, bounded)
    return shape.soft_cap * LOG2E * bounded, 1.0


def _over_scores(scale, scores):
    """`Rows.scale` as a factor of scores."""
    return over_rows(scale, scores.shape[1]) if jnp.ndim(scale) else scale


def _mask(scores, first_key, rows: Rows, shape: Shape):
    """Scores of the keys that a row does not see become -inf."""
    key = iota(scores.shape, 1)
    end = rows.length - first_key
    if not shape.causal and not shape.has_window:
        return jnp.where(key < end, scores, -jnp.inf)
    # What a row sees, as two keys: one value a row instead of one a score.
    row = plgpu.broadcasted_iota(
        jnp.int32, (WARPGROUP_ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
    )
    own = (row // rows.group if rows.group > 1 else row) + (rows.position - first_key)
    if shape.causal:
        is_seen = key < over_rows(jnp.minimum(own + 1, end), scores.shape[1])
    else:
        is_seen = key < end
    if shape.has_window:
        is_seen &= key > over_rows(own - rows.window, scores.shape[1])
    return jnp.where(is_seen, scores, -jnp.inf)


def _clear_edges(ring: Ring, slot, span: Span, i, shape: Shape) -> None:
    """Rows before the window and after the sequence hold anything; their values must not."""
    first = span.first_key(i)
    begin, end = span.low - first, span.end - first

    @pl.when((begin > 0) | (end < span.block))
    def _():
        blocks.clear_values(ring, slot, begin, end, shape)


def _scores(queries, keys, block: int, shape: Shape):
    """f32[64, block], queries times keys."""
    if shape.is_interpreted:
        return _interpreted_product(queries[...], keys[...].T)

    def product(scores_ref):
        plgpu.wgmma(scores_ref, queries, keys.T)
        return scores_ref[...]

    return pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))


def _interpreted_product(a, b):
    """The interpreter's matrix unit takes no operand from registers, so values are multiplied.

    They were loaded by the threads, where the matrix unit would have read them behind a proxy; so
    only here is a fence needed before a tensor copy overwrites them.
    """
    product = jnp.dot(a, b, preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return product


def _add_product(out, weights, values, shape: Shape):
    """f32[64, H]: out and the weights times the values."""
    if shape.is_interpreted:
        return out + _interpreted_product(weights, values[...])
    return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, weights, values))(plgpu.ACC.init(out))


def _scores_and_sum(queries, keys, out, weights, values, weigh, block: int, shape: Shape):
    """Issues queries times keys and `out += weights times values`; weighs the former meanwhile.

    Returns:
      the sum, and what `weigh(scores)` returned: (largest, total, shrink, weights).
    """
    if shape.is_interpreted:
        weighed = weigh(_scores(queries, keys, block, shape))
        return _add_product(out, weights, values, shape), weighed

    def both(refs):
        sum_ref, *weighed_refs = refs

        def issue(scores_ref):
            plgpu.wgmma(scores_ref, queries, keys.T)
            plgpu.wgmma(sum_ref, weights, values)
            return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

        scores = pl.run_scoped(issue, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))
        # Nothing of the softmax may slip behind the wait for the sum.
        weighed = lax.optimization_barrier(weigh(scores))
        for ref, value in zip(weighed_refs, weighed, strict=True):
            ref[...] = value

    row = on_gpu_rows(jnp.zeros((WARPGROUP_ROWS,), jnp.float32))
    tile = jnp.zeros((WARPGROUP_ROWS, block), jnp.float32)
    out, *weighed = pl.run_state(both)((plgpu.ACC.init(out), row, row, row, tile))
    return out, weighed
