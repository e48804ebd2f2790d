# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Attention of a prefill's rows to one block of keys, on the matrix unit.

Head by head, and everything transposed: keys are rows and queries are lanes. So shift and sum are
vectors along the lanes, no reduction crosses lanes, and the second product fills the matrix unit
although a head has only 128 lanes. Sum and accumulator are float32, in the base 2.
"""

import functools
import itertools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.attention.tpu.operands import HIGH, LOW, Heads, keys, values
from pallas_paged.attention.tpu.scores import (
    LOG2_E,
    SUBLANES,
    Score,
    scores,
    seen_keys,
)

# Query rows and keys of one product of a prefill: so many that the matrix unit streams longer than
# it takes to load what it holds, and so few that the weights in between stay in registers.
_PREFILL_ROWS = 256
_PREFILL_KEYS = 256
# Sums of weights, as exponents of 2, between which a prefill's result is sound: far enough from
# float32's ends (-126 and 127) that nothing that counts was lost, and no product overflowed.
_SOUND = (-40, 60)


def start(shift_ref, l_ref, acc_ref):
    """Empties the running state: f32[K, 8, rows] twice, f32[K, C, rows]."""
    shift_ref[...] = jnp.zeros_like(shift_ref)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)


def attend(
    heads: Heads,
    score: Score,
    q_ref,
    load,
    scales,
    window,
    sm_scale,
    *,
    first,
    first_position,
    end,
    num_keys,
    is_masked,
    mask_dtype,
    mask_ref,
    shift_ref,
    l_ref,
    acc_ref,
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
      mask_dtype: as which weights are masked, by their bits: bfloat16, pairs of which share a word,
        or float32; static.
      mask_ref: room for the bits of a mask, uint32[keys or keys / 2, tokens].
      shift_ref, l_ref, acc_ref: shift f32[K, 8, rows] (the first of 8), sum f32[K, 16, rows] (the
        first; of the unrounded weights, for the log-sum-exp, 8 parts from the 8th on) and
        accumulator f32[K, C, rows]; rows are `tokens` of one query head after another.
      The rest is as for `decode.attend`.
    """
    tiles = [
        (head, *tile)
        for head in range(heads.num_kv_heads)
        for tile in _query_tiles(heads, head, q_ref)
    ]
    # Rows of ones below V: the matrix unit sums the weights too, as it rounded them.
    ones = jnp.ones((2 * SUBLANES, num_keys), heads.compute_dtype)

    if is_masked:
        _store_mask(score, mask_ref, mask_dtype, first, first_position, end, window)

    @functools.cache
    def keys_of(head):
        return keys(heads, load, head)

    @functools.cache
    def values_of(head):
        return jnp.concatenate([values(heads, load, head, None).T, ones], axis=0)

    def weigh(head, at, q, token):
        """The weights of a tile of queries, in the base 2, by the shift that is known."""
        scale = sm_scale * scales(0, head) if score.has_scales else sm_scale
        shift, rescale = _move_shift(shift_ref[head, :1, at], l_ref[head, :1, at])
        shift_ref[head, :1, at] = shift
        weights = []
        for start in range(0, num_keys, _PREFILL_KEYS):
            s = lax.dot_general(
                keys_of(head)[start : start + _PREFILL_KEYS],
                q(),
                (((1,), (1,)), ((), ())),
                precision=heads.precision,
                preferred_element_type=jnp.float32,
            )  # [keys, rows]
            s = scores(score, s, scale)
            p = jnp.exp2(s - shift)
            if is_masked:
                p = _masked(p, mask_ref, mask_dtype, start, first)
            weights.append(p)
        if score.return_lse:  # which is of the weights as they are
            parts = sum(jnp.sum(p.reshape(-1, SUBLANES, p.shape[1]), axis=0) for p in weights)
            exact = l_ref[head, 8:, at]
            l_ref[head, 8:, at] = exact * rescale + parts
        return rescale, jnp.concatenate([p.astype(heads.compute_dtype) for p in weights], axis=0)

    def accumulate(rescale, weights, head, at, q, token):
        del q, token
        o = jnp.dot(
            values_of(head),
            weights,
            precision=heads.precision,
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


def _store_mask(score, mask_ref, dtype, first, first_position, end, window):
    """Stores the bits of the weights that count, as `dtype`, which all heads share."""
    together, tokens = 4 // dtype.itemsize, mask_ref.shape[1]
    position = first_position + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    for start in range(0, mask_ref.shape[0], SUBLANES):
        key = together * (start + lax.broadcasted_iota(jnp.int32, (SUBLANES, tokens), 0))
        mask = jnp.zeros(key.shape, jnp.uint32)
        for i, bits in enumerate((LOW, HIGH) if together == 2 else (LOW | HIGH,)):
            seen = seen_keys(score, key + i, position, first, end, window)
            mask |= jnp.where(seen, jnp.uint32(bits), jnp.uint32(0))
        mask_ref[start : start + SUBLANES] = mask


def _masked(weights, mask_ref, dtype, start, first):
    """Weights [keys, rows] of a block's keys from `start` on, as `dtype`; 0 where none counts."""
    # The mask takes half of the registers, or all. Loaded from a row that the compiler does not
    # know to be the one that it was stored to, it does not stay in them, to be spilled and filled.
    row = pl.multiple_of(jnp.minimum(first, 0), SUBLANES)  # 0: no position is negative
    together = 4 // dtype.itemsize
    mask = mask_ref[pl.ds(row + start // together, weights.shape[0] // together)]
    mask = jnp.concatenate([mask] * (weights.shape[1] // mask.shape[1]), axis=1)
    bits = pltpu.bitcast(weights.astype(dtype), jnp.uint32)
    return pltpu.bitcast(bits & mask, dtype)


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
      l_ref, acc_ref: see `attend`.
    """
    is_bad = jnp.zeros(has_keys.shape, bool)
    for head in range(heads.num_kv_heads):
        total = l_ref[head, :1]
        is_bad |= ~((total >= 2.0 ** _SOUND[0]) & (total <= 2.0 ** (_SOUND[1] + 20)))
        largest = jnp.max(jnp.abs(acc_ref[head]), axis=0, keepdims=True)
        is_bad |= ~(largest < jnp.inf)
    return jnp.max(jnp.where(is_bad & has_keys, 1.0, 0.0)) == 0.0


def find_shifts(
    heads: Heads,
    score: Score,
    q_ref,
    load,
    scales,
    window,
    sm_scale,
    *,
    first,
    first_position,
    end,
    shift_ref,
):
    """Takes one block of keys into each query's largest score, the shift that is always right."""
    for head in range(heads.num_kv_heads):
        scale = sm_scale * scales(0, head) if score.has_scales else sm_scale
        k = keys(heads, load, head)
        for at, q, token in _query_tiles(heads, head, q_ref):
            s = lax.dot_general(
                k,
                q(),
                (((1,), (1,)), ((), ())),
                precision=heads.precision,
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


def finish(heads: Heads, score: Score, head: int, sinks, scales, shift_ref, l_ref, acc_ref):
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
            sink = jnp.where(is_head, sinks(head * heads.group + g) * LOG2_E, sink)
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
    return out, (shift + jnp.log2(weight)) / LOG2_E
