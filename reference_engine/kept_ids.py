# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""top_k, min_p and top_p without a sort: which ids a draw may take.

Likelier is the id with the larger logit, and the lower id where logits are equal. So what is kept
is given by two numbers of a row: a threshold on the logits, and the last id among the ids whose
logit is the threshold. The threshold is found digit by digit: the floats of a row are searched as
32-bit integers that rise with them, 4 bits in a pass over the logits. A pass adds up what lies at
or above each of 15 pivots. All that is added are integers, so that a sum depends on no order and on
no batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged import settings
from reference_engine.sampling_rows import Sampling, is_kept, split_rows, with_cut

_BITS = 4  # of a digit
_NUM_PIVOTS = 2**_BITS - 1
_LIMB = 2.0**13  # a sum of 2**18 limbs is below 2**31
_BLOCK = 256  # the ids of a block, when ties are counted
_ALL_IDS = 2**31 - 1


@settings.defaults()
@jax.jit
def cut_top_k(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Drops all but the top_k likeliest ids of each row.

    Args:
      logits: f32[S, V].
      rows: i32[S, ROW_SIZE], see sampling_rows.

    Returns:
      The rows with their cut.
    """
    s = split_rows(rows)
    size = logits.shape[1]
    wanted = jnp.where(s.top_k > 0, jnp.minimum(s.top_k, size), size)
    nothing = jnp.full(wanted.shape, -jnp.inf)
    threshold, above = _search(
        logits, lambda logits, _: jnp.ones_like(logits, jnp.int32), wanted, nothing, ()
    )
    return with_cut(rows, threshold, _last_tie(logits, s, threshold, wanted - above))


@settings.defaults()
@jax.jit
def cut_top_p(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Of the ids that each row keeps, drops those below min_p, and then those past top_p.

    With the largest logit m of a row, the weight of an id is exp((logit - m) / temperature) in
    float32. Weights below min_p go. The mass of an id is its weight as a whole number: the weight
    is multiplied by the power of two with which the masses of all ids from the threshold on add up
    to between 2**29 and 2**30, and rounded. An id is kept if the masses of the likelier ids add up
    to less than top_p times the sum of all weights that are kept until then. A top_p of 1 keeps
    all.

    Args:
      logits: f32[S, V].
      rows: i32[S, ROW_SIZE], see sampling_rows.

    Returns:
      The rows with their cut.
    """
    s = split_rows(rows)
    largest = jnp.max(logits, axis=1)
    inverse = 1 / jnp.where(s.temperature > 0, s.temperature, 1.0)
    weights = _weights(logits, (largest[:, None], inverse[:, None]))
    kept = is_kept(logits, s) & (weights >= s.min_p[:, None])
    smallest = jnp.min(jnp.where(kept, logits, jnp.inf), axis=1)
    is_cut_tie = (logits == s.threshold[:, None]) & ~is_kept(logits, s)
    total, num_cut_ties = _exact_sum(jnp.where(kept, weights, 0.0), is_cut_tie)
    most = total + num_cut_ties * _weights(s.threshold, (largest, inverse))
    # The scale is 2**(29 - the exponent of the sum).
    exponent = (lax.bitcast_convert_type(most, jnp.int32) >> 23) - 127
    scale = lax.bitcast_convert_type((29 - exponent + 127) << 23, jnp.float32)
    wanted = jnp.maximum(jnp.ceil(s.top_p * (total * scale)).astype(jnp.int32), 1)

    # From the smallest kept logit on, nothing but the ties that top_k has cut is added too many.
    # These lie at the lowest pivot, and there the kept ones alone reach what is wanted.
    of_rows = (largest, inverse, scale)
    threshold, above = _search(logits, _masses, wanted, smallest, of_rows)
    num_ties = -(-(wanted - above) // jnp.maximum(_masses(threshold, of_rows), 1))
    last = _last_tie(logits, s, threshold, num_ties)
    has_top_p = s.top_p < 1
    rows = with_cut(
        rows, jnp.where(has_top_p, threshold, -jnp.inf), jnp.where(has_top_p, last, _ALL_IDS)
    )
    smallest = jnp.where(s.min_p > 0, smallest, -jnp.inf)
    return with_cut(rows, smallest, jnp.full_like(last, _ALL_IDS))


def _weights(logits: jax.Array, of_rows: tuple[jax.Array, jax.Array]) -> jax.Array:
    largest, inverse = of_rows
    return jnp.exp((logits - largest) * inverse)


def _masses(logits: jax.Array, of_rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    if logits.ndim > 1:
        largest, inverse, scale = (x[:, None] for x in of_rows)
    else:
        largest, inverse, scale = of_rows
    return (_weights(logits, (largest, inverse)) * scale + 0.5).astype(jnp.int32)


def _exact_sum(weights: jax.Array, flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of weights in [0, 1], f32[S, V] -> f32[S], and the number of flags, as a float.

    Each weight is cut into three integers of 13 bits, so that no order of the additions changes
    the sum. The last bit that counts is 2**-39.
    """
    scaled = weights * _LIMB**2
    whole = scaled.astype(jnp.int32)
    rest = ((scaled - whole.astype(jnp.float32)) * _LIMB).astype(jnp.int32)
    low_bits = np.int32(_LIMB - 1)
    limbs = [whole // np.int32(_LIMB), whole & low_bits, rest, flags.astype(jnp.int32)]
    high, middle, low, count = (x.astype(jnp.float32) for x in _sums(limbs))
    return ((low / _LIMB + middle) / _LIMB + high) / _LIMB, count


def _search(
    logits: jax.Array,
    amounts: Callable[[jax.Array, Any], jax.Array],
    wanted: jax.Array,
    lowest: jax.Array,
    of_rows: Any,
) -> tuple[jax.Array, jax.Array]:
    """The largest float at or above which the amounts add up to what is wanted, row by row.

    Args:
      logits: f32[S, V].
      amounts: makes the amount of each id, i32[S, V], at least 0, from the logits and `of_rows`.
      wanted: i32[S], at least 1.
      lowest: f32[S]; each row's sum of the amounts of the logits from there on is below 2**31.
      of_rows: what `amounts` needs to know of the rows.

    Returns:
      The float, f32[S], or something at or below the lowest one if all amounts are too little, and
      the sum of the amounts of the logits above it, i32[S], which is less than what is wanted.
    """

    def find_digit(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Tied to what changes, so that XLA computes the amounts again in each pass: it would take
        # them out of the loop, and then write and read as many bytes as there are logits.
        (prefix, above), rows = lax.optimization_barrier((found, of_rows))
        shift = (32 - _BITS - _BITS * i).astype(jnp.uint32)
        amount, parts = amounts(logits, rows), []
        for digit in range(1, _NUM_PIVOTS + 1):
            pivot = jnp.maximum(_float_of(prefix + (jnp.uint32(digit) << shift)), lowest)
            parts.append(jnp.where(logits >= pivot[:, None], amount, 0))
        sums = jnp.stack(_sums(parts))
        reaches = sums >= wanted
        # The lowest pivot that fails has the largest sum of those that fail.
        above = jnp.maximum(above, jnp.max(jnp.where(reaches, 0, sums), axis=0))
        return prefix + (jnp.sum(reaches, axis=0).astype(jnp.uint32) << shift), above

    nothing = jnp.zeros_like(wanted)
    prefix, above = lax.fori_loop(0, 32 // _BITS, find_digit, (nothing.astype(jnp.uint32), nothing))
    return _float_of(prefix), above


def _float_of(key: jax.Array) -> jax.Array:
    """The float of a key: u32 -> f32. Keys rise with the floats; the lowest ones are -inf's.

    The highest ones are NaNs, which no logit reaches.
    """
    lowest = np.uint32(0x007FFFFF)  # of -inf; below are the NaNs with a sign
    key = jnp.maximum(key, lowest)
    bits = jnp.where(key >> 31 == 1, key ^ np.uint32(0x80000000), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _last_tie(
    logits: jax.Array, s: Sampling, threshold: jax.Array, num_ties: jax.Array
) -> jax.Array:
    """Of the kept ids whose logit is the threshold, the one with this number, from 1 on: i32[S]."""
    size = logits.shape[1]
    is_tie = (logits == threshold[:, None]) & is_kept(logits, s)
    num_blocks = -(-size // _BLOCK)
    is_tie = jnp.pad(is_tie, ((0, 0), (0, num_blocks * _BLOCK - size)))
    is_tie = is_tie.reshape(-1, num_blocks, _BLOCK)
    up_to_block = jnp.cumsum(jnp.sum(is_tie, axis=2, dtype=jnp.int32), axis=1)
    is_before = up_to_block < num_ties[:, None]
    block = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    before = jnp.max(jnp.where(is_before, up_to_block, 0), axis=1)
    inside = jnp.take_along_axis(is_tie, block[:, None, None], axis=1, mode="clip")[:, 0]
    up_to_id = before[:, None] + jnp.cumsum(inside, axis=1, dtype=jnp.int32)
    return block * _BLOCK + jnp.sum(up_to_id < num_ties[:, None], axis=1, dtype=jnp.int32)


def _sums(operands: list[jax.Array]) -> list[jax.Array]:
    """The sums of the rows of integer arrays, all in one pass: i32[S, V] each -> i32[S] each."""
    zeros = [np.int32(0)] * len(operands)
    return list(
        lax.reduce(
            operands, zeros, lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)], (1,)
        )
    )
