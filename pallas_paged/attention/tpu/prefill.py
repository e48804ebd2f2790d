# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Attention of a prefill's rows to one KV block, on the matrix unit.

Heads are computed one after the other, and everything is transposed: keys are rows and queries are
lanes. So shift and sum are vectors along the lanes, no reduction crosses lanes, and the second
product fills the matrix unit although a head has only 128 lanes. Sum and accumulator are float32,
in the base 2.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.attention.tpu.operands import HIGH, LOW, Heads, Load, keys, values
from pallas_paged.attention.tpu.scores import LOG2_E, SUBLANES, Scoring, scores, seen_keys

# Query rows and keys of one product: enough for the matrix unit to stream longer than it takes to
# load what it holds, and few enough for the weights in between to stay in registers.
_PRODUCT_ROWS = 256
_PRODUCT_KEYS = 256
# The sum of a row's weights must lie between these powers of 2 for its result to be sound: far
# enough from the ends of float32 (-126 and 127) that nothing that counts was lost, and that no
# product overflowed.
_SOUND = (-40, 60)


class RunningState(NamedTuple):
    """Refs of the running state of a q tile; its rows are the tokens of each query head in turn.

    Attributes:
      shift_ref: f32[K, 8, rows], the shift (in the first of the 8).
      l_ref: f32[K, 16, rows], the sum of the weights (in the first of the 16). For the log-sum-exp
        the last 8 have a part each of the sum of the weights before they were rounded.
      acc_ref: f32[K, C, rows], the accumulator.
    """

    shift_ref: Any
    l_ref: Any
    acc_ref: Any


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys of a KV block each query sees, as bits of the words that hold the weights.

    All heads share it.

    Attributes:
      ref: uint32[keys or keys / 2, tokens], room for the bits.
      dtype: the dtype in which weights are masked: float32, or bfloat16, two of which share a word.
      first: position of the block's first key.
    """

    ref: Any
    dtype: jnp.dtype
    first: Any

    @property
    def keys_per_word(self) -> int:
        """Keys whose weights share a word."""
        return 4 // self.dtype.itemsize


def start(state: RunningState) -> None:
    """Empties the running state."""
    state.shift_ref[...] = jnp.zeros_like(state.shift_ref)
    state.l_ref[...] = jnp.zeros_like(state.l_ref)
    state.acc_ref[...] = jnp.zeros_like(state.acc_ref)


def attend(
    heads: Heads,
    scoring: Scoring,
    q_ref: Any,
    load: Load,
    *,
    first: Any,
    first_position: Any,
    end: Any,
    num_keys: int,
    is_masked: bool,
    mask_dtype: jnp.dtype,
    mask_ref: Any,
    state: RunningState,
) -> None:
    """Takes one KV block into the running state of a q tile.

    Weights are `2 ** (score - shift)` with a shift that is known before: no maximum stands between
    the two products. From block to block the shift is moved by whole powers of 2, so that the sum
    stays near 1. Whether it was right all along shows in the sum at the end (`is_sound`). It was,
    unless scores jump by more than about 40 within a block; then `find_shifts` and a second pass
    over the blocks follow.

    Args:
      heads: shapes and dtypes.
      scoring: what turns products into scores.
      q_ref: [tokens, N * C], the q tile.
      load: loads the words of the block, see `operands.Load`.
      first, end: positions of the block's first key, and of the first key that it does not hold.
      first_position: position of the q tile's first query; the others follow.
      num_keys: keys of a block.
      is_masked: whether some key of the block may not count for some query; static.
      mask_dtype, mask_ref: see `Mask`.
      state: the running state.
    """
    tiles = [
        (head, at, q)
        for head in range(heads.num_kv_heads)
        for at, q, _ in _query_tiles(heads, head, q_ref)
    ]
    # Rows of ones below V: so the matrix unit sums the weights too, as it rounded them.
    ones = jnp.ones((2 * SUBLANES, num_keys), heads.compute_dtype)
    mask = Mask(mask_ref, mask_dtype, first) if is_masked else None
    if mask is not None:
        _store_mask(scoring, mask, first_position, end)

    @functools.cache
    def keys_of(head: int) -> jax.Array:
        return keys(heads, load, head)

    @functools.cache
    def values_of(head: int) -> jax.Array:
        return jnp.concatenate([values(heads, load, head, None).T, ones], axis=0)

    def weigh(head: int, at: slice, q: Callable[[], jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _weigh(heads, scoring, keys_of, q, mask, head, at, num_keys, state)

    # The first product of the next tile comes before the second product of this one, so that the
    # matrix unit has work while the weights of this one are computed.
    ahead = weigh(*tiles[0])
    for (head, at, _), following in itertools.zip_longest(tiles, tiles[1:]):
        rescale, weights = ahead
        if following:
            ahead = weigh(*following)
        _accumulate(heads, values_of, weights, rescale, head, at, state)


def _query_tiles(
    heads: Heads, head: int, q_ref: Any
) -> Iterator[tuple[slice, Callable[[], jax.Array], jax.Array]]:
    """The queries of a KV head, in tiles of rows.

    Yields:
      the rows; a function that loads the queries, `compute_dtype`[rows, C]; and the number of each
      row's token in the q tile, int32[1, rows].
    """
    tokens = q_ref.shape[0]
    step = max(1, _PRODUCT_ROWS // tokens)

    def load(members: range) -> jax.Array:
        lanes = [(head * heads.group + m) * heads.lanes for m in members]
        q = [q_ref[:, lane : lane + heads.lanes].astype(heads.compute_dtype) for lane in lanes]
        return jnp.concatenate(q, axis=0)

    for g in range(0, heads.group, step):
        members = range(g, min(g + step, heads.group))
        row = lax.broadcasted_iota(jnp.int32, (1, len(members) * tokens), 1)
        at = slice(g * tokens, (g + len(members)) * tokens)
        yield at, functools.partial(load, members), lax.rem(row, tokens)


def _weigh(
    heads: Heads,
    scoring: Scoring,
    keys_of: Callable[[int], jax.Array],
    q: Callable[[], jax.Array],
    mask: Mask | None,
    head: int,
    at: slice,
    num_keys: int,
    state: RunningState,
) -> tuple[jax.Array, jax.Array]:
    """The weights of a tile of queries, by the shift that is known.

    Returns:
      the factor on sum and accumulator so far, f32[1, rows], and the weights [keys, rows].
    """
    shift_ref, l_ref, _ = state
    scale = scoring.scale(head)
    shift, rescale = _move_shift(shift_ref[head, :1, at], l_ref[head, :1, at])
    shift_ref[head, :1, at] = shift
    weights = []
    for first_key in range(0, num_keys, _PRODUCT_KEYS):
        s = lax.dot_general(
            keys_of(head)[first_key : first_key + _PRODUCT_KEYS],
            q(),
            (((1,), (1,)), ((), ())),
            precision=heads.precision,
            preferred_element_type=jnp.float32,
        )  # [keys, rows]
        s = scores(scoring.options, s, scale)
        p = jnp.exp2(s - shift)
        weights.append(p if mask is None else _masked(p, mask, first_key))
    if scoring.options.return_lse:  # the log-sum-exp is of the weights before they are rounded
        parts = sum(jnp.sum(p.reshape(-1, SUBLANES, p.shape[1]), axis=0) for p in weights)
        exact = l_ref[head, 8:, at]
        l_ref[head, 8:, at] = exact * rescale + parts
    return rescale, jnp.concatenate([p.astype(heads.compute_dtype) for p in weights], axis=0)


def _move_shift(shift: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The shift that brings a sound sum near 1, and the factor that the sum then needs."""
    exponent = (lax.bitcast_convert_type(total, jnp.int32) >> 23) - 127  # no sum is negative
    is_sound = (exponent >= _SOUND[0]) & (exponent <= _SOUND[1])
    exponent = jnp.where(is_sound, exponent, 0)
    factor = lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    return shift + exponent.astype(jnp.float32), factor


def _accumulate(
    heads: Heads,
    values_of: Callable[[int], jax.Array],
    weights: jax.Array,
    rescale: jax.Array,
    head: int,
    at: slice,
    state: RunningState,
) -> None:
    """Takes the weighted values of a tile of queries, and the sum of weights, into the state."""
    _, l_ref, acc_ref = state
    o = jnp.dot(
        values_of(head),
        weights,
        precision=heads.precision,
        preferred_element_type=jnp.float32,
    )  # [C, then the sum 16 times, rows]
    l_ref[head, :1, at] = l_ref[head, :1, at] * rescale + o[heads.lanes : heads.lanes + 1]
    acc_ref[head, :, at] = acc_ref[head, :, at] * rescale + o[: heads.lanes]


# ---- The mask


def _store_mask(scoring: Scoring, mask: Mask, first_position: Any, end: Any) -> None:
    """Stores the bits of the weights that count."""
    per_word, tokens = mask.keys_per_word, mask.ref.shape[1]
    position = first_position + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    for row in range(0, mask.ref.shape[0], SUBLANES):
        key = per_word * (row + lax.broadcasted_iota(jnp.int32, (SUBLANES, tokens), 0))
        bits = jnp.zeros(key.shape, jnp.uint32)
        for i, bits_of_key in enumerate((LOW, HIGH) if per_word == 2 else (LOW | HIGH,)):
            seen = seen_keys(
                scoring.options, key + i, position, mask.first, end, scoring.sliding_window
            )
            bits |= jnp.where(seen, jnp.uint32(bits_of_key), jnp.uint32(0))
        mask.ref[row : row + SUBLANES] = bits


def _masked(weights: jax.Array, mask: Mask, first_key: int) -> jax.Array:
    """Weights [keys, rows] of a block's keys from `first_key` on, 0 where a key does not count."""
    # The mask takes half of the registers, or all. It is loaded from a row that the compiler does
    # not know to be the one that it was stored to. So it does not stay in registers, from which it
    # would be spilled and refilled.
    row = pl.multiple_of(jnp.minimum(mask.first, 0), SUBLANES)  # 0, as no position is negative
    per_word = mask.keys_per_word
    bits = mask.ref[pl.ds(row + first_key // per_word, weights.shape[0] // per_word)]
    bits = jnp.concatenate([bits] * (weights.shape[1] // bits.shape[1]), axis=1)
    words = pltpu.bitcast(weights.astype(mask.dtype), jnp.uint32)
    return pltpu.bitcast(words & bits, mask.dtype)


# ---- A second pass


def is_sound(heads: Heads, has_keys: jax.Array, state: RunningState) -> jax.Array:
    """Whether the running state is right for the rows that count.

    Args:
      heads: shapes and dtypes.
      has_keys: bool[1, rows], the rows that count and see a key.
      state: the running state after the last KV block.
    """
    is_bad = jnp.zeros(has_keys.shape, bool)
    for head in range(heads.num_kv_heads):
        total = state.l_ref[head, :1]
        is_bad |= ~((total >= 2.0 ** _SOUND[0]) & (total <= 2.0 ** (_SOUND[1] + 20)))
        largest = jnp.max(jnp.abs(state.acc_ref[head]), axis=0, keepdims=True)
        is_bad |= ~(largest < jnp.inf)
    return jnp.max(jnp.where(is_bad & has_keys, 1.0, 0.0)) == 0.0


def find_shifts(
    heads: Heads,
    scoring: Scoring,
    q_ref: Any,
    load: Load,
    *,
    first: Any,
    first_position: Any,
    end: Any,
    shift_ref: Any,
) -> None:
    """Takes one KV block into each query's largest score, the shift that is always right.

    The arguments are as for `attend`.
    """
    for head in range(heads.num_kv_heads):
        scale = scoring.scale(head)
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
            seen = seen_keys(
                scoring.options, key, first_position + token, first, end, scoring.sliding_window
            )
            s = jnp.where(seen, scores(scoring.options, s, scale), -jnp.inf)
            largest = jnp.max(s, axis=0, keepdims=True)
            shift_ref[head, :1, at] = jnp.maximum(shift_ref[head, :1, at], largest)


def start_again(state: RunningState) -> None:
    """Empties the running state but for the shifts; those of rows that see nothing become 0."""
    shift = state.shift_ref[...]
    state.shift_ref[...] = jnp.where(jnp.abs(shift) < jnp.inf, shift, 0.0)
    state.l_ref[...] = jnp.zeros_like(state.l_ref)
    state.acc_ref[...] = jnp.zeros_like(state.acc_ref)


# ---- The result


def finish(
    heads: Heads,
    scoring: Scoring,
    head: int,
    sinks: Callable[[int], Any],
    state: RunningState,
) -> tuple[jax.Array, jax.Array]:
    """The result of one KV head.

    Args:
      heads: shapes and dtypes.
      scoring: what turns products into scores.
      head: the KV head.
      sinks: `sinks(head)` is the float32 sink of a query head.
      state: the running state.

    Returns:
      attended values f32[rows, C], with V from lane 0, and log-sum-exp f32[1, rows].
    """
    shift = state.shift_ref[head, :1]
    total = state.l_ref[head, :1]
    weight = total
    if scoring.options.return_lse:
        weight = jnp.sum(state.l_ref[head, 8:], axis=0, keepdims=True)
    acc = state.acc_ref[head]
    if scoring.options.has_sinks:
        tokens = shift.shape[1] // heads.group
        row = lax.broadcasted_iota(jnp.int32, shift.shape, 1)
        sink = jnp.zeros_like(shift)
        for g in range(heads.group):
            is_head = (row >= g * tokens) & (row < (g + 1) * tokens)
            sink = jnp.where(is_head, sinks(head * heads.group + g) * LOG2_E, sink)
        # The larger of the two is scaled to 2 ** 0. Where total is 0, log2 is -inf.
        top = jnp.maximum(shift + jnp.log2(total), sink)
        rescale = jnp.where(total > 0, jnp.exp2(shift - top), 0.0)
        shift, acc = top, acc * rescale
        total, weight = (x * rescale + jnp.exp2(sink - top) for x in (total, weight))
    factor = 1.0 / jnp.where(total > 0, total, 1.0)
    if scoring.options.has_scales:
        factor = factor * scoring.scales(1, head)
    out = (acc * factor).T
    if heads.value_lane:
        out = jnp.roll(out, -heads.value_lane, axis=1)
    return out, (shift + jnp.log2(weight)) / LOG2_E
