# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Attention of decodes' queries to blocks of keys, on the matrix unit.

All heads of a decode's one row together: heads are rows, keys are lanes, K and V are what the
matrix unit holds. Sum and accumulator are float32, in the base 2.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import layout
from pallas_paged.attention.tpu.operands import HIGH, Heads, keys, values
from pallas_paged.attention.tpu.scores import (
    LOG2_E,
    SUBLANES,
    Score,
    holds_token,
    scores,
    seen_keys,
)

# Keys times registers of query rows whose products fit the registers together.
_JOINT_KEYS = 4096


def decode_rows(num_heads: int) -> int:
    """Rows that a decode's heads take, whole registers."""
    return -(-num_heads // SUBLANES) * SUBLANES


def _head_rows(heads: Heads, head: int):
    """(first row, bool[8, 1] or None) of each register of rows that has heads of a KV head."""
    first, end = head * heads.group, (head + 1) * heads.group
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
    for start in range(first // SUBLANES * SUBLANES, end, SUBLANES):
        is_all = first <= start and end >= min(start + SUBLANES, heads.num_heads)
        yield start, None if is_all else (row + start >= first) & (row + start < end)


def _select(mask, new, old):
    return new if mask is None or old is None else jnp.where(mask, new, old)


def row_pitch(num_heads: int) -> int:
    """Rows from one decode to the next where their heads are rows: odd, whole registers and one."""
    return decode_rows(num_heads) + 1


class Step(NamedTuple):
    """One block of keys that a decode's body takes.

    Attributes:
      load: see `operands.keys`; what it does on the way, such as starting DMAs, is done there.
      first, end: position of its first key, and of the first that it does not hold.
      position: of the query.
      is_first: whether it is its decode's first; False where the step before is known to be of the
        same decode.
      q: `q(row, lane_tile)`, f32[8, 128], eight heads of the token.
      store: `store(row, lane_tile, x)` takes f32[8, 128] of the values attended to so far; None if
        nobody wants them yet.
      store_lse: takes the log-sum-exp so far, f32[rows, 1].
    """

    load: Any
    first: Any
    end: Any
    position: Any
    is_first: Any
    q: Any
    store: Any
    store_lse: Any


def attend(
    heads: Heads,
    score: Score,
    sinks_ref,
    scales,
    window,
    sm_scale,
    *,
    steps: Sequence[Step],
    num_keys,
    is_full,
    m_ref,
    l_ref,
    acc_ref,
):
    """Takes blocks of keys, one behind the other, each into its decode's running state.

    The products with the next block's keys come before the softmax of this one's, so that the
    matrix unit has work while that is computed. Where they are small and of one decode, one softmax
    takes all.

    Args:
      heads, score: static.
      sinks_ref: f32[rows, 128], a head's sink in all lanes; None without sinks.
      scales: `scales(which, head)`, K's (0) or V's (1) float32 scale.
      window, sm_scale: scalars.
      steps: the blocks.
      num_keys: keys in a block.
      is_full: whether all keys of the blocks are known to count; static.
      m_ref, l_ref, acc_ref: state from body to body: running maximum f32[rows, 128] (all lanes
        equal), sum f32[rows, 128] (each lane its part) and accumulator f32[rows, C].
    """
    rows = range(0, decode_rows(heads.num_heads), SUBLANES)

    @functools.cache
    def queries(q, row):
        lane_tiles = [q(row, c) for c in range(heads.lane_tiles)]
        return jnp.concatenate(lane_tiles, axis=1).astype(heads.compute_dtype)

    def multiply_keys(step, head, product):
        """Takes one KV head's scores into `product`, f32[8, keys] of each register of rows."""
        k = keys(heads, step.load, head)
        scale = sm_scale * scales(0, head) if score.has_scales else sm_scale
        for row, mask in _head_rows(heads, head):
            s = lax.dot_general(
                queries(step.q, row),
                k,
                (((1,), (1,)), ((), ())),
                precision=heads.precision,
                preferred_element_type=jnp.float32,
            )
            product[row] = _select(mask, scores(score, s, scale), product.get(row))

    def mask_product(step, product):
        if is_full:
            return product
        key = lax.broadcasted_iota(jnp.int32, (SUBLANES, num_keys), 1)
        seen = seen_keys(score, key, step.position, step.first, step.end, window)
        return {row: jnp.where(seen, s, -jnp.inf) for row, s in product.items()}

    def weigh(state, together, found):
        """Softmax over some steps' products: their weights, and the state without their values."""
        weights: list[dict] = [{} for _ in together]
        after = {}
        for row in rows:
            m, total, acc = state[row]
            if together[0].is_first is not False:
                is_first = together[0].is_first
                m, total, acc = (
                    jnp.where(is_first, *x) for x in ((-jnp.inf, m), (0.0, total), (0.0, acc))
                )
            largest = (jnp.max(product[row], axis=1, keepdims=True) for product in found)
            top = functools.reduce(jnp.maximum, largest, m)
            shift = jnp.where(top == -jnp.inf, 0.0, top)  # nothing seen yet: 0, not NaN
            rescale = jnp.exp2(m - shift)
            total = total * rescale
            for weights_of_step, product in zip(weights, found, strict=True):
                p = jnp.exp2(product[row] - shift[:, :1])
                total += sum(p[:, c : c + layout.LANES] for c in range(0, num_keys, layout.LANES))
                weights_of_step[row] = _parts(p, heads.compute_dtype)
            after[row] = _State(top, total, acc * _wide(rescale, heads.lane_tiles))
        return weights, after

    def multiply_values(step, head, weights, state):
        """Takes one KV head's weighted values into the state."""
        is_token = functools.partial(holds_token, step.first, step.end, num_keys)
        v = values(heads, step.load, head, None if is_full else is_token)
        for row, mask in _head_rows(heads, head):
            acc = state[row].acc
            o = jnp.dot(
                weights[row], v, precision=heads.precision, preferred_element_type=jnp.float32
            )
            o = acc + sum(o[part : part + SUBLANES] for part in range(0, o.shape[0], SUBLANES))
            state[row] = state[row]._replace(acc=_select(mask, o, acc))

    def finish(step, state):
        if step.store is None:
            return
        lse = []
        for row in rows:
            out, lse_of_row = _finish_decode(heads, score, sinks_ref, scales, row, *state[row])
            lse.append(lse_of_row)
            for c in range(heads.lane_tiles):
                step.store(row, c, out[:, c * layout.LANES : (c + 1) * layout.LANES])
        if score.return_lse:
            step.store_lse(jnp.concatenate(lse, axis=0))

    groups = _joined(heads, steps, num_keys)
    state = {row: _State(*(ref[pl_rows(row)] for ref in (m_ref, l_ref, acc_ref))) for row in rows}
    found: list[dict] = []
    nothing: list[Step] = []
    for together, following in zip([nothing, *groups], [*groups, nothing], strict=True):
        weights: list[dict] = []
        if together:
            products = [mask_product(step, p) for step, p in zip(together, found, strict=True)]
            weights, state = weigh(state, together, products)
        found = [{} for _ in following]
        # Keys and values of a head take turns, because values load the vector units and keys the
        # matrix unit; only the last keys come first, so that values hide the softmax behind them.
        num_heads = heads.num_kv_heads
        lag = num_heads if following is groups[-1] else 0
        for turn in range(num_heads + lag):
            if turn < num_heads:
                for step, product in zip(following, found, strict=True):
                    multiply_keys(step, turn, product)
            if turn >= lag:
                for step, weights_of_step in zip(together, weights, strict=True):
                    multiply_values(step, turn - lag, weights_of_step, state)
        if together:
            finish(together[-1], state)
    for row in rows:
        for ref, x in zip((m_ref, l_ref, acc_ref), state[row], strict=True):
            ref[pl_rows(row)] = x


def _parts(weights, dtype):
    """Eight rows of float32 weights as the matrix unit takes them: in bfloat16 as two parts, whose
    products it sums in float32. The second fills the half of a register that eight rows leave."""
    if dtype == jnp.float32:
        return weights
    bits = lax.bitcast_convert_type(weights, jnp.uint32)
    first = lax.bitcast_convert_type(bits & jnp.uint32(HIGH), jnp.float32)
    return jnp.concatenate([first, weights - first], axis=0).astype(dtype)


def _joined(heads: Heads, steps: Sequence[Step], num_keys: int) -> list[list[Step]]:
    """Steps that one softmax takes: of one decode, and as many as have few products together,
    which would wait for each other."""
    registers = decode_rows(heads.num_heads) // SUBLANES
    most = max(1, _JOINT_KEYS // (registers * num_keys))
    groups: list[list[Step]] = []
    for step in steps:
        if step.is_first is not False or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(step)
    return groups


class _State(NamedTuple):
    """What a decode has so far, of eight heads; see `attend`."""

    m: Any
    total: Any
    acc: Any


def _wide(x, lane_tiles):
    """f32[8, 128] with equal lanes as f32[8, C]."""
    return x if lane_tiles == 1 else jnp.concatenate([x] * lane_tiles, axis=1)


def pl_rows(row):
    """The rows of one register."""
    return slice(row, row + SUBLANES)


def _finish_decode(heads, score, sinks_ref, scales, row, m, total, acc):
    """Attended values of eight heads, f32[8, C] with V in lane 0, and log-sum-exp f32[8, 1]."""
    m, total = m[:, :1], jnp.sum(total, axis=1, keepdims=True)
    if score.has_sinks:
        sink = sinks_ref[pl_rows(row), :1] * LOG2_E
        top = jnp.maximum(m, sink)
        rescale = jnp.exp2(m - top)
        m, total, acc = top, total * rescale + jnp.exp2(sink - top), acc * rescale
    factor = 1.0 / jnp.where(total > 0, total, 1.0)
    if score.has_scales:
        head_row = row + lax.broadcasted_iota(jnp.int32, factor.shape, 0)
        v_scale = jnp.ones_like(factor)
        for head in range(heads.num_kv_heads):
            is_head = (head_row >= head * heads.group) & (head_row < (head + 1) * heads.group)
            v_scale = jnp.where(is_head, scales(1, head), v_scale)
        factor = factor * v_scale
    out = acc * factor
    if heads.value_lane:
        out = jnp.roll(out, -heads.value_lane, axis=1)
    return out, (m + jnp.log2(total)) / LOG2_E


def as_row(column: jax.Array, num_lanes: int) -> jax.Array:
    """A column f32[rows, 1] as a row f32[1, num_lanes], 0 behind it."""
    shape = (column.shape[0], num_lanes)
    is_diagonal = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(
        jnp.int32, shape, 1
    )
    return jnp.sum(jnp.where(is_diagonal, column, 0.0), axis=0, keepdims=True)
