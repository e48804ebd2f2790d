# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention of one warpgroup: 64 rows of queries over a range of KV blocks.

This is the online softmax of FlashAttention (Dao et al., 2022), in base 2. `attend_overlapped`
issues the product of the queries with the next block's keys together with the product of this
block's weights with its values, so that the matrix unit works while the softmax does (the overlap
inside a warpgroup of FlashAttention-3, Shah et al., 2024).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu.kv_blocks import KvStages, clear_values
from pallas_paged.attention.gpu.mma_layout import (
    column_indices,
    full_column,
    over_columns,
    row_indices,
    zero_result,
)
from pallas_paged.attention.gpu.schedule import KvRange
from pallas_paged.attention.gpu.spec import WARPGROUP_ROWS, KernelSpec, Ref, Scalar

LOG2E = math.log2(math.e)
# Lower than any score: exp2 of it is 0, and its differences stay finite.
LOWEST = -1e30
# The mean of the values [64, H] and the log2 of the sum of exponentials [64].
Result = tuple[jax.Array, jax.Array]
# With a larger cap, the rounding of a tanh near 1 is more than 1e-5 of a score.
_LARGE_CAP = 128.0


@dataclasses.dataclass(frozen=True)
class QueryRows:
    """The 64 rows of queries of one warpgroup, and what they see.

    Attributes:
      queries: [64, H], a ref in shared memory or values in registers.
      position: the position of row 0; row r has position `position + r // group`.
      length: the length of the sequence, past which no row sees a key.
      window: how many keys a row looks back on, or None.
      scale: the factor on the product of a query with a key, in base 2: a scalar, or f32[64] with
        one value per row.
      group: the rows that have one position.
    """

    queries: Ref | jax.Array
    position: Scalar
    length: Scalar
    window: Scalar | None
    scale: Any
    group: int


def attend_overlapped(
    rows: QueryRows,
    kv_range: KvRange,
    stages: KvStages,
    step: Scalar,
    sink: jax.Array | None,
    spec: KernelSpec,
    on_last_keys: Callable[[], None],
) -> Result:
    """Attends to the blocks of a range, which come through the stages from the `step`-th on.

    This form is for work that the matrix unit bounds: the product for a block's scores is issued
    with the sum of the values of the block before. A stage is held for two blocks.

    Args:
      rows: the queries.
      kv_range: the blocks.
      stages: where the blocks are.
      step: how many blocks went through the stages before.
      sink: one more score per row, f32[64] in base 2, or None.
      spec: the static parameters.
      on_last_keys: called when the queries have been read for the last time.

    Returns:
      the mean of the values f32[64, H], and the log2 of the sum of exponentials f32[64]. Rows that
      saw nothing have mean 0 and a log2 below LOWEST.
    """

    def next_block(i: Scalar, carry: Any, is_masked: bool) -> Any:
        out, largest, total, weights = carry
        stage = _wait(stages, step, kv_range, i, is_masked, spec)
        before = stages.stage(step + i - 1)
        keys, values = stages.keys(stage, spec.head_dim), stages.values(before, spec.head_dim)

        def weigh(scores: jax.Array) -> tuple[jax.Array, ...]:
            return _softmax(scores, i, largest, total, rows, kv_range, is_masked, spec)

        out, (largest, total, shrink, new) = _scores_and_sum(
            rows.queries, keys, out, weights, values, weigh, kv_range.block_kv, spec
        )
        plgpu.barrier_arrive(stages.empty.at[before])
        out, new = out * over_columns(shrink, spec.head_dim), new.astype(spec.product_dtype)
        return out, largest, total, new

    out, largest, total = _start(sink, spec)
    stage = _wait(stages, step, kv_range, 0, True, spec)
    scores = _scores(rows.queries, stages.keys(stage, spec.head_dim), kv_range.block_kv, spec)
    largest, total, _, weights = _softmax(scores, 0, largest, total, rows, kv_range, True, spec)
    carry = out, largest, total, weights.astype(spec.product_dtype)
    out, largest, total, weights = _for_each_block(1, kv_range, carry, next_block, spec)
    on_last_keys()
    last = stages.stage(step + kv_range.count - 1)
    out = _add_product(out, weights, stages.values(last, spec.head_dim), spec)
    plgpu.barrier_arrive(stages.empty.at[last])
    return _finish(out, largest, total, spec)


def attend(
    rows: QueryRows,
    kv_range: KvRange,
    stages: KvStages,
    step: Scalar,
    sink: jax.Array | None,
    spec: KernelSpec,
) -> Result:
    """Does the same as `attend_overlapped`, one block after the other.

    This form is for work that the memory bounds: a stage is empty as soon as its block is done.
    """

    def next_block(i: Scalar, carry: Any, is_masked: bool) -> Any:
        out, largest, total = carry
        stage = _wait(stages, step, kv_range, i, is_masked, spec)
        scores = _scores(rows.queries, stages.keys(stage, spec.head_dim), kv_range.block_kv, spec)
        largest, total, shrink, weights = _softmax(
            scores, i, largest, total, rows, kv_range, is_masked, spec
        )
        out, weights = out * over_columns(shrink, spec.head_dim), weights.astype(spec.product_dtype)
        out = _add_product(out, weights, stages.values(stage, spec.head_dim), spec)
        plgpu.barrier_arrive(stages.empty.at[stage])
        return out, largest, total

    carry = _for_each_block(0, kv_range, _start(sink, spec), next_block, spec)
    out, largest, total = carry
    return _finish(out, largest, total, spec)


def _start(sink: jax.Array | None, spec: KernelSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of values, largest score, sum of exponentials) before any key."""
    out = zero_result(spec.head_dim)
    if sink is not None:
        return out, sink, full_column(1.0)
    return out, full_column(LOWEST), full_column(0.0)


def _for_each_block(
    first: int,
    kv_range: KvRange,
    carry: Any,
    next_block: Callable[[Scalar, Any, bool], Any],
    spec: KernelSpec,
) -> Any:
    """`carry = next_block(i, carry, is_masked)` for the blocks from the first on."""
    begin, end = kv_range.masked()
    carry = lax.fori_loop(first, begin, lambda i, c: next_block(i, c, True), carry)
    carry = lax.fori_loop(begin, end, lambda i, c: next_block(i, c, False), carry)
    if spec.options.has_window:
        carry = lax.fori_loop(end, kv_range.count, lambda i, c: next_block(i, c, True), carry)
    return carry


def _wait(
    stages: KvStages, step: Scalar, kv_range: KvRange, i: Scalar, is_masked: bool, spec: KernelSpec
) -> Scalar:
    """Waits for the i-th block and returns its stage."""
    stage = stages.stage(step + i)
    plgpu.barrier_wait(stages.full.at[stage])
    if is_masked:
        _clear_edges(stages, stage, kv_range, i, spec)
    return stage


def _softmax(
    scores: jax.Array,
    i: Scalar,
    largest: jax.Array,
    total: jax.Array,
    rows: QueryRows,
    kv_range: KvRange,
    is_masked: bool,
    spec: KernelSpec,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(largest, total, shrink, weights) with the scores of the i-th block."""
    scores, scale = _scaled(scores, rows, spec)
    if is_masked:
        scores = _mask(scores, kv_range.first_key(i), rows, spec)
    newest = jnp.maximum(largest, scores.max(axis=1) * scale)
    shrink = jnp.exp2(largest - newest)
    weights = jnp.exp2(
        scores * _over_scores(scale, scores) - over_columns(newest, kv_range.block_kv)
    )
    return newest, total * shrink + weights.sum(axis=1), shrink, weights


def _finish(out: jax.Array, largest: jax.Array, total: jax.Array, spec: KernelSpec) -> Result:
    """The mean of the values and the log2 of the sum of exponentials."""
    is_any = total > 0
    mean = out * over_columns(1.0 / jnp.where(is_any, total, 1.0), spec.head_dim)
    return mean, jnp.where(is_any, largest + jnp.log(total) * LOG2E, 2 * LOWEST)


def sink_score(sink: jax.Array) -> jax.Array:
    """The score of a sink in base 2.

    A sink of -inf becomes as low as finite numbers go: it weighs nothing, and its difference from
    itself stays 0.
    """
    return jnp.maximum(sink * LOG2E, 2 * LOWEST)


def natural_log(log2_sum: jax.Array) -> jax.Array:
    """The log-sum-exp that a caller gets: -inf where nothing was seen."""
    return jnp.where(log2_sum > LOWEST, log2_sum * (1.0 / LOG2E), -jnp.inf)


def _scaled(scores: jax.Array, rows: QueryRows, spec: KernelSpec) -> tuple[jax.Array, Any]:
    """(scores, factor) whose product is the scores in base 2. The factor is positive."""
    soft_cap = spec.options.soft_cap
    if soft_cap is None:
        if spec.options.is_scale_positive:
            return scores, rows.scale
        # The largest score times such a factor may be the smallest; and 0 times -inf is NaN.
        return scores * _over_scores(rows.scale, scores), 1.0
    # tanh(x) = 1 - 2 / (exp(2 x) + 1); the hardware's own tanh has only 11 good bits.
    grown = jnp.exp2(scores * _over_scores(rows.scale * (2.0 / soft_cap), scores))
    bounded = 1.0 - 2.0 / (grown + 1.0)
    if soft_cap > _LARGE_CAP:
        # Near 0 that difference has lost the bits that such a cap makes large: take tanh's power
        # series there.
        x = scores * _over_scores(rows.scale * (1.0 / (LOG2E * soft_cap)), scores)
        square = x * x
        series = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
        bounded = jnp.where(square < 0.04, series, bounded)
    return soft_cap * LOG2E * bounded, 1.0


def _over_scores(scale: Any, scores: jax.Array) -> Any:
    """`QueryRows.scale` as a factor of scores."""
    return over_columns(scale, scores.shape[1]) if jnp.ndim(scale) else scale


def _mask(scores: jax.Array, first_key: Scalar, rows: QueryRows, spec: KernelSpec) -> jax.Array:
    """Sets the scores of the keys that a row does not see to -inf."""
    causal, has_window = spec.options.causal, spec.options.has_window
    key = column_indices(scores.shape)
    end = rows.length - first_key
    if not causal and not has_window:
        return jnp.where(key < end, scores, -jnp.inf)
    # What a row sees is given by two keys, which is one value per row instead of one per score.
    row = row_indices()
    own = (row // rows.group if rows.group > 1 else row) + (rows.position - first_key)
    if causal:
        is_seen = key < over_columns(jnp.minimum(own + 1, end), scores.shape[1])
    else:
        is_seen = key < end
    if has_window:
        is_seen &= key > over_columns(own - rows.window, scores.shape[1])
    return jnp.where(is_seen, scores, -jnp.inf)


def _clear_edges(
    stages: KvStages, stage: Scalar, kv_range: KvRange, i: Scalar, spec: KernelSpec
) -> None:
    """Clears the values before the sliding window and after the sequence, which may be anything."""
    first = kv_range.first_key(i)
    begin, end = kv_range.low - first, kv_range.end - first

    @pl.when((begin > 0) | (end < kv_range.block_kv))
    def _() -> None:
        clear_values(stages, stage, begin, end, spec)


def _scores(queries: Any, keys: Ref, block_kv: int, spec: KernelSpec) -> jax.Array:
    """f32[64, block_kv], queries times keys."""
    if spec.is_interpreted:
        return _interpreted_product(queries[...], keys[...].T)

    def product(scores_ref: Ref) -> jax.Array:
        plgpu.wgmma(scores_ref, queries, keys.T)
        return scores_ref[...]

    return pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, block_kv), jnp.float32))


def _interpreted_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two values, because the interpreter's matrix unit takes none from registers.

    The threads have loaded these values. The matrix unit would have read them through another
    proxy, so only here a fence is needed before a tensor copy overwrites them.
    """
    product = jnp.dot(a, b, preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return product


def _add_product(out: jax.Array, weights: jax.Array, values: Ref, spec: KernelSpec) -> jax.Array:
    """f32[64, H]: out and the weights times the values."""
    if spec.is_interpreted:
        return out + _interpreted_product(weights, values[...])
    return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, weights, values))(plgpu.ACC.init(out))


def _scores_and_sum(
    queries: Any,
    keys: Ref,
    out: jax.Array,
    weights: jax.Array,
    values: Ref,
    weigh: Callable[[jax.Array], tuple[jax.Array, ...]],
    block_kv: int,
    spec: KernelSpec,
) -> tuple[jax.Array, Any]:
    """Issues queries times keys and `out += weights times values`, and weighs the scores meanwhile.

    Returns:
      the sum, and what `weigh(scores)` returned: (largest, total, shrink, weights).
    """
    if spec.is_interpreted:
        weighed = weigh(_scores(queries, keys, block_kv, spec))
        return _add_product(out, weights, values, spec), weighed

    def both(refs: Any) -> None:
        sum_ref, *weighed_refs = refs

        def issue(scores_ref: Ref) -> jax.Array:
            plgpu.wgmma(scores_ref, queries, keys.T)
            plgpu.wgmma(sum_ref, weights, values)
            return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

        scores = pl.run_scoped(issue, plgpu.ACC((WARPGROUP_ROWS, block_kv), jnp.float32))
        # No part of the softmax may be moved past the wait for the sum.
        weighed = lax.optimization_barrier(weigh(scores))
        for ref, value in zip(weighed_refs, weighed, strict=True):
            ref[...] = value

    row = full_column(0.0)
    tile = jnp.zeros((WARPGROUP_ROWS, block_kv), jnp.float32)
    out, *results = pl.run_state(both)((plgpu.ACC.init(out), row, row, row, tile))
    return out, results
