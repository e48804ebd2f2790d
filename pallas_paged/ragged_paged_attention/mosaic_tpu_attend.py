# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Attention of one unit's queries over one block of keys, on the matrix unit: two forms.

`decode` takes the one row of a decode with all its heads: heads are rows, keys are lanes, K and V
are what the matrix unit holds. `prefill` takes many rows, head by head, and everything transposed:
keys are rows and queries are lanes. So the running maximum and sum are vectors along the lanes,
no reduction crosses lanes, and the second product fills the matrix unit although a head has only
128 lanes.

Both keep sum and accumulator in float32, in the base 2.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.ragged_paged_attention.mosaic_tpu_operands import HIGH, LOW, Heads, keys, values

_LOG2_E = math.log2(math.e)
_SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Score:
    """What is done to a product of q and k, and which of them count; static.

    Attributes:
      soft_cap: None or the bound on the scores.
      causal: whether a query sees no later key.
      has_window, has_scales, has_sinks: whether the call has these arrays.
      return_lse: whether the log-sum-exp is wanted.
    """

    soft_cap: float | None
    causal: bool
    has_window: bool
    has_scales: bool
    has_sinks: bool
    return_lse: bool


def scores(score: Score, product, scale):
    """Scores in the base 2 of products; `scale` is sm_scale, times K's if the pool has scales."""
    if score.soft_cap is None:
        return product * (scale * _LOG2_E)
    return jnp.tanh(product * (scale / score.soft_cap)) * (score.soft_cap * _LOG2_E)


def seen_keys(score: Score, key, query_position, first, end, window):
    """Which keys of a block the mask lets a query see.

    Everything but the comparison with `key` is done on a query's scalar, or on a row of them: keys
    are many.

    Args:
      score: static.
      key: number in the block, int32.
      query_position: broadcasts with `key`.
      first, end: position of the block's first key, and of the first that it does not hold.
      window: the sliding window's scalar, None without one.
    """
    stop = end
    if score.causal:
        stop = jnp.minimum(stop, query_position + 1)
    seen = key < stop - first
    if score.has_window:
        seen &= key > query_position - window - first
    return seen


def decode_rows(num_heads: int) -> int:
    """Rows that a decode's heads take, whole registers."""
    return -(-num_heads // _SUBLANES) * _SUBLANES


def _head_rows(heads: Heads, head: int):
    """(first row, bool[8, 1] or None) of each register of rows that has heads of a KV head."""
    first, end = head * heads.group, (head + 1) * heads.group
    row = lax.broadcasted_iota(jnp.int32, (_SUBLANES, 1), 0)
    for start in range(first // _SUBLANES * _SUBLANES, end, _SUBLANES):
        is_all = first <= start and end >= min(start + _SUBLANES, heads.num_heads)
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


def decode(
    heads: Heads, score: Score, sinks_ref, scales, window, sm_scale,
    *, steps: Sequence[Step], num_keys, is_full, m_ref, l_ref, acc_ref,
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
    rows = range(0, decode_rows(heads.num_heads), _SUBLANES)

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
                queries(step.q, row), k, (((1,), (1,)), ((), ())), precision=heads.precision,
                preferred_element_type=jnp.float32,
            )
            product[row] = _select(mask, scores(score, s, scale), product.get(row))

    def mask_product(step, product):
        if is_full:
            return product
        key = lax.broadcasted_iota(jnp.int32, (_SUBLANES, num_keys), 1)
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
                    jnp.where(is_first, *x)
                    for x in ((-jnp.inf, m), (0.0, total), (0.0, acc))
                )
            largest = (jnp.max(product[row], axis=1, keepdims=True) for product in found)
            top = functools.reduce(jnp.maximum, largest, m)
            shift = jnp.where(top == -jnp.inf, 0.0, top)  # nothing seen yet: 0, not NaN
            rescale = jnp.exp2(m - shift)
            total = total * rescale
            for weights_of_step, product in zip(weights, found, strict=True):
                p = jnp.exp2(product[row] - shift[:, :1])
                total += sum(
                    p[:, c : c + layout.LANES] for c in range(0, num_keys, layout.LANES)
                )
                weights_of_step[row] = _parts(p, heads.compute_dtype)
            after[row] = _State(top, total, acc * _wide(rescale, heads.lane_tiles))
        return weights, after

    def multiply_values(step, head, weights, state):
        """Takes one KV head's weighted values into the state."""
        is_token = functools.partial(_is_token, step.first, step.end, num_keys)
        v = values(heads, step.load, head, None if is_full else is_token)
        for row, mask in _head_rows(heads, head):
            acc = state[row].acc
            o = jnp.dot(
                weights[row], v, precision=heads.precision, preferred_element_type=jnp.float32
            )
            o = acc + sum(o[part : part + _SUBLANES] for part in range(0, o.shape[0], _SUBLANES))
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
    state = {
        row: _State(*(ref[pl_rows(row)] for ref in (m_ref, l_ref, acc_ref))) for row in rows
    }
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
    registers = decode_rows(heads.num_heads) // _SUBLANES
    most = max(1, _JOINT_KEYS // (registers * num_keys))
    groups: list[list[Step]] = []
    for step in steps:
        if step.is_first is not False or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(step)
    return groups


class _State(NamedTuple):
    """What a decode has so far, of eight heads; see `decode`."""

    m: Any
    total: Any
    acc: Any


def _wide(x, lane_tiles):
    """f32[8, 128] with equal lanes as f32[8, C]."""
    return x if lane_tiles == 1 else jnp.concatenate([x] * lane_tiles, axis=1)


def pl_rows(row):
    """The rows of one register."""
    return slice(row, row + _SUBLANES)


def _finish_decode(heads, score, sinks_ref, scales, row, m, total, acc):
    """Attended values of eight heads, f32[8, C] with V in lane 0, and log-sum-exp f32[8, 1]."""
    m, total = m[:, :1], jnp.sum(total, axis=1, keepdims=True)
    if score.has_sinks:
        sink = sinks_ref[pl_rows(row), :1] * _LOG2_E
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
    return out, (m + jnp.log2(total)) / _LOG2_E


# Keys times registers of query rows whose products fit the registers together.
_JOINT_KEYS = 4096
# Query rows and keys of one product of a prefill: so many that the matrix unit streams longer than
# it takes to load what it holds, and so few that the weights in between stay in registers.
_PREFILL_ROWS = 256
_PREFILL_KEYS = 256
# Sums of weights, as exponents of 2, between which a prefill's result is sound: far enough from
# float32's ends (-126 and 127) that nothing that counts was lost, and no product overflowed.
_SOUND = (-40, 60)


def start_prefill(shift_ref, l_ref, acc_ref):
    """Empties the running state: f32[K, 8, rows] twice, f32[K, C, rows]."""
    shift_ref[...] = jnp.zeros_like(shift_ref)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)


def prefill(
    heads: Heads, score: Score, q_ref, load, scales, window, sm_scale,
    *, first, first_position, end, num_keys, is_masked, shift_ref, l_ref, acc_ref,
):
    """Takes one block of keys into the running state of a window of queries.

    Weights are `2 ** (score - shift)` with a shift that is known before: no maximum stands between
    the two products. The shift is moved by whole powers of 2 from block to block, so that the sum
    stays near 1; whether it was right all along shows in the sum at the end (`is_sound`). It is,
    unless scores jump by more than about 40 within a block; then `find_shifts` and another round.

    Args:
      q_ref: [tokens, N * C], the window.
      first_position: of the window's first query; the others follow.
      is_masked: whether some key of the block may not count for some query; static.
      shift_ref, l_ref, acc_ref: shift f32[K, 8, rows] (the first of 8), sum f32[K, 16, rows] (the
        first; of the unrounded weights, for the log-sum-exp, 8 parts from the 8th on) and
        accumulator f32[K, C, rows]; rows are `tokens` of one query head after another.
      The rest is as for `decode`.
    """
    is_token = functools.partial(_is_token, first, end, num_keys) if is_masked else None
    tiles = [
        (head, *tile)
        for head in range(heads.num_kv_heads)
        for tile in _query_tiles(heads, head, q_ref)
    ]
    # Rows of ones below V: the matrix unit sums the weights too, as it rounded them.
    ones = jnp.ones((2 * _SUBLANES, num_keys), heads.compute_dtype)

    # A mask of pairs of weights is half as large as one of scores, and all heads share it. The
    # log-sum-exp is of weights that are not rounded.
    masks_pairs = is_masked and heads.compute_dtype == jnp.bfloat16 and not score.return_lse

    @functools.cache
    def seen_pairs(start, number):
        """Which weights of keys from `start` on count: uint32[keys / 2, tokens], a half a key."""
        shape = (number // 2, q_ref.shape[0])
        position = first_position + lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
        key = start + 2 * lax.broadcasted_iota(jnp.int32, shape, 0)
        low, high = (seen_keys(score, key + i, position, first, end, window) for i in range(2))
        zero = jnp.uint32(0)
        return jnp.where(low, jnp.uint32(LOW), zero) | jnp.where(high, jnp.uint32(HIGH), zero)

    @functools.cache
    def keys_of(head):
        return keys(heads, load, head)

    @functools.cache
    def values_of(head):
        return jnp.concatenate([values(heads, load, head, is_token).T, ones], axis=0)

    def weigh(head, at, q, token):
        """The weights of a tile of queries, in the base 2, by the shift that is known."""
        scale = sm_scale * scales(0, head) if score.has_scales else sm_scale
        shift, rescale = _move_shift(shift_ref[head, :1, at], l_ref[head, :1, at])
        shift_ref[head, :1, at] = shift
        weights = []
        for start in range(0, num_keys, _PREFILL_KEYS):
            s = lax.dot_general(
                keys_of(head)[start : start + _PREFILL_KEYS], q(), (((1,), (1,)), ((), ())),
                precision=heads.precision, preferred_element_type=jnp.float32,
            )  # [keys, rows]
            s = scores(score, s, scale)
            if is_masked and not masks_pairs:
                key = start + lax.broadcasted_iota(jnp.int32, s.shape, 0)
                seen = seen_keys(score, key, first_position + token, first, end, window)
                s = jnp.where(seen, s, -jnp.inf)
            p = jnp.exp2(s - shift)
            if masks_pairs:
                mask = seen_pairs(start, p.shape[0])
                mask = jnp.concatenate([mask] * (p.shape[1] // mask.shape[1]), axis=1)
                pairs = pltpu.bitcast(p.astype(jnp.bfloat16), jnp.uint32)
                p = pltpu.bitcast(pairs & mask, jnp.bfloat16)
            weights.append(p)
        if score.return_lse:  # which is of the weights as they are
            parts = sum(jnp.sum(p.reshape(-1, _SUBLANES, p.shape[1]), axis=0) for p in weights)
            exact = l_ref[head, 8:, at]
            l_ref[head, 8:, at] = exact * rescale + parts
        return rescale, jnp.concatenate([p.astype(heads.compute_dtype) for p in weights], axis=0)

    def accumulate(rescale, weights, head, at, q, token):
        del q, token
        o = jnp.dot(
            values_of(head), weights, precision=heads.precision,
            preferred_element_type=jnp.float32,
        )  # [C and the sum 16 times, rows]
        l_ref[head, :1, at] = l_ref[head, :1, at] * rescale + o[heads.lanes : heads.lanes + 1]
        acc_ref[head, :, at] = acc_ref[head, :, at] * rescale + o[: heads.lanes]

    # The next tile's first product comes before this one's second: the matrix unit has work while
    # this one's weights are computed.
    ahead = weigh(*tiles[0])
    for tile, following in itertools.zip_longest(tiles, tiles[1:]):
        weighed = ahead
        ahead = weigh(*following) if following else None
        accumulate(*weighed, *tile)


def _is_token(first, end, num_keys, parity):
    """bool[keys or keys / 2, 128]: which slots of a block hold a token; see `values`."""
    step, offset = (1, 0) if parity is None else (2, parity)
    slot = lax.broadcasted_iota(jnp.int32, (num_keys // step, layout.LANES), 0)
    return first + slot * step + offset < end


def _query_tiles(heads, head, q_ref):
    """The queries of a KV head, a tile of rows at a time: (where, how to load them, [rows, C], and
    the token of each row)."""
    tokens = q_ref.shape[0]
    step = max(1, _PREFILL_ROWS // tokens)

    def load(members):
        lanes = [(head * heads.group + m) * heads.lanes for m in members]
        q = [q_ref[:, lane : lane + heads.lanes].astype(heads.compute_dtype) for lane in lanes]
        return jnp.concatenate(q, axis=0)

    for g in range(0, heads.group, step):
        members = range(g, min(g + step, heads.group))
        row = lax.broadcasted_iota(jnp.int32, (1, len(members) * tokens), 1)
        at = slice(g * tokens, (g + len(members)) * tokens)
        yield at, functools.partial(load, members), lax.rem(row, tokens)


def _move_shift(shift, total):
    """The shift by which a sum that is sound becomes about 1, and the factor that it then takes."""
    exponent = (lax.bitcast_convert_type(total, jnp.int32) >> 23) - 127  # no sum is negative
    is_sound = (exponent >= _SOUND[0]) & (exponent <= _SOUND[1])
    exponent = jnp.where(is_sound, exponent, 0)
    factor = lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    return shift + exponent.astype(jnp.float32), factor


def is_sound(heads: Heads, has_keys, l_ref, acc_ref):
    """Whether a prefill's state is right for the rows that count.

    Args:
      heads: static.
      has_keys: bool[1, rows], the rows that count and see a key.
      l_ref, acc_ref: see `prefill`.
    """
    is_bad = jnp.zeros(has_keys.shape, bool)
    for head in range(heads.num_kv_heads):
        total = l_ref[head, :1]
        is_bad |= ~((total >= 2.0 ** _SOUND[0]) & (total <= 2.0 ** (_SOUND[1] + 20)))
        largest = jnp.max(jnp.abs(acc_ref[head]), axis=0, keepdims=True)
        is_bad |= ~(largest < jnp.inf)
    return jnp.max(jnp.where(is_bad & has_keys, 1.0, 0.0)) == 0.0


def find_shifts(
    heads: Heads, score: Score, q_ref, load, scales, window, sm_scale,
    *, first, first_position, end, num_keys, shift_ref,
):
    """Takes one block of keys into each query's largest score, the shift that is always right."""
    for head in range(heads.num_kv_heads):
        scale = sm_scale * scales(0, head) if score.has_scales else sm_scale
        k = keys(heads, load, head)
        for at, q, token in _query_tiles(heads, head, q_ref):
            s = lax.dot_general(
                k, q(), (((1,), (1,)), ((), ())), precision=heads.precision,
                preferred_element_type=jnp.float32,
            )
            key = lax.broadcasted_iota(jnp.int32, s.shape, 0)
            seen = seen_keys(score, key, first_position + token, first, end, window)
            s = jnp.where(seen, scores(score, s, scale), -jnp.inf)
            largest = jnp.max(s, axis=0, keepdims=True)
            shift_ref[head, :1, at] = jnp.maximum(shift_ref[head, :1, at], largest)


def start_again(shift_ref, l_ref, acc_ref):
    """Empties the running state but for the shifts found; rows that see nothing have any."""
    shift = shift_ref[...]
    shift_ref[...] = jnp.where(jnp.abs(shift) < jnp.inf, shift, 0.0)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)


def finish_prefill(heads: Heads, score: Score, head: int, sinks, scales, shift_ref, l_ref, acc_ref):
    """One KV head's attended values f32[rows, C], V in lane 0, and log-sum-exp f32[1, rows].

    `sinks(head)` is the float32 sink of a query head.
    """
    shift = shift_ref[head, :1]
    total = l_ref[head, :1]
    weight = jnp.sum(l_ref[head, 8:], axis=0, keepdims=True) if score.return_lse else total
    acc = acc_ref[head]
    if score.has_sinks:
        tokens = shift.shape[1] // heads.group
        row = lax.broadcasted_iota(jnp.int32, shift.shape, 1)
        sink = jnp.zeros_like(shift)
        for g in range(heads.group):
            is_head = (row >= g * tokens) & (row < (g + 1) * tokens)
            sink = jnp.where(is_head, sinks(head * heads.group + g) * _LOG2_E, sink)
        # The larger of the two is 2 ** 0; log2(0) is -inf.
        top = jnp.maximum(shift + jnp.log2(total), sink)
        rescale = jnp.where(total > 0, jnp.exp2(shift - top), 0.0)
        shift, acc = top, acc * rescale
        total, weight = (x * rescale + jnp.exp2(sink - top) for x in (total, weight))
    factor = 1.0 / jnp.where(total > 0, total, 1.0)
    if score.has_scales:
        factor = factor * scales(1, head)
    out = (acc * factor).T
    if heads.value_lane:
        out = jnp.roll(out, -heads.value_lane, axis=1)
    return out, (shift + jnp.log2(weight)) / _LOG2_E


def as_row(column: jax.Array, num_lanes: int) -> jax.Array:
    """A column f32[rows, 1] as a row f32[1, num_lanes], 0 behind it."""
    shape = (column.shape[0], num_lanes)
    is_diagonal = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(
        jnp.int32, shape, 1
    )
    return jnp.sum(jnp.where(is_diagonal, column, 0.0), axis=0, keepdims=True)
