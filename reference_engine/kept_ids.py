# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""top_k, min_p and top_p without a sort: which ids a draw may take.

Likelier is the id with the larger logit, and the lower id where logits are equal. So what is kept
is given by two numbers of a row: a threshold on the logits, and the last id among the ids whose
logit is the threshold.

A small top_k takes one pass over the logits, see `cut_to_few`. Otherwise the threshold is found
digit by digit: the floats of a row are searched as 32-bit integers that rise with them, 3 bits in a
pass over the logits. A pass adds up what lies at or above each of 7 pivots. All that is added are
integers, so that a sum depends on no order and on no batch, and both ways keep the same ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged import settings
from reference_engine.sampling_rows import MAX_FEW, Sampling, is_kept, split_rows, with_cut

_BITS = 3  # of a digit; with 4 a pass takes an H100 longer to add than to read
_NUM_PIVOTS = 2**_BITS - 1
_LIMB = 2.0**13  # a sum of 2**18 limbs is below 2**31
_BLOCK = 256  # the ids of a block
_MAX_PART = 16384  # the most numbers of a row that one reduction of XLA for GPUs adds up
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
    is multiplied by the power of two with which the masses that are left add up to between 2**29
    and 2**30, and rounded. An id is kept if the masses of the likelier ids add up
    to less than top_p times the sum of the weights that are left. A top_p of 1 keeps
    all.

    Args:
      logits: f32[S, V].
      rows: i32[S, ROW_SIZE], see sampling_rows.

    Returns:
      The rows with their cut.
    """
    s = split_rows(rows)
    largest = jnp.max(logits, axis=1)
    inverse = _inverse(s)
    weights = _weights(logits, (largest[:, None], inverse[:, None]))
    kept = is_kept(logits, s) & (weights >= s.min_p[:, None])
    total, smallest = _total_and_smallest(weights, logits, kept)
    scale, wanted = _scale(total, s)

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


@settings.defaults()
@jax.jit
def cut_to_few(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """As `cut_top_k` and then `cut_top_p`, for rows whose top_k is at most MAX_FEW.

    The MAX_FEW likeliest ids lie in the MAX_FEW blocks of ids whose largest logits are the largest.
    So one pass over the logits, which finds the largest logit of each block, leaves little to sort.

    Args:
      logits: f32[S, V].
      rows: i32[S, ROW_SIZE], see sampling_rows. Rows with a top_k of 0 are cut by nothing.

    Returns:
      The rows with their cut.
    """
    s = split_rows(rows)
    values, ids = _few_likeliest(logits)
    inverse = _inverse(s)
    weights = _weights(values, (values[:, :1], inverse[:, None]))
    kept = jnp.arange(values.shape[1]) < s.top_k[:, None]
    kept &= weights >= s.min_p[:, None]
    scale, wanted = _scale(_total_and_smallest(weights, values, kept)[0], s)
    masses = jnp.where(kept, _round(weights * scale[:, None]), 0)
    before = jnp.cumsum(masses, axis=1) - masses
    kept &= (before < wanted[:, None]) | (s.top_p >= 1)[:, None]
    index = jnp.maximum(jnp.sum(kept, axis=1, keepdims=True) - 1, 0)
    threshold = jnp.take_along_axis(values, index, axis=1)[:, 0]
    last = jnp.take_along_axis(ids, index, axis=1)[:, 0]
    is_cut = s.top_k > 0
    return with_cut(rows, jnp.where(is_cut, threshold, -jnp.inf), jnp.where(is_cut, last, _ALL_IDS))


def _few_likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The MAX_FEW likeliest ids, the likeliest first: f32[S, V] -> logits, f32[S, n], and ids."""
    num_rows, size = logits.shape
    values = jnp.where(logits == 0, 0.0, logits)  # -0 is equal to 0, but a sort tells them apart
    values = jnp.pad(values, ((0, 0), (0, -size % _BLOCK)), constant_values=-jnp.inf)
    ids = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    for block in (_BLOCK, 16):
        values, ids = (x.reshape(num_rows, -1, block) for x in (values, ids))
        largest = jnp.max(values, axis=2)
        _, blocks = lax.top_k(largest, min(MAX_FEW, largest.shape[1]))
        blocks = jnp.sort(blocks, axis=1)[:, :, None]  # so that the ids rise
        values, ids = (jnp.take_along_axis(x, blocks, axis=1) for x in (values, ids))
    values, ids = (x.reshape(num_rows, -1) for x in (values, ids))
    values, order = lax.top_k(values, min(MAX_FEW, values.shape[1]))
    return values, jnp.take_along_axis(ids, order, axis=1)


def _inverse(s: Sampling) -> jax.Array:
    return 1 / jnp.where(s.temperature > 0, s.temperature, 1.0)


def _weights(logits: jax.Array, of_rows: tuple[jax.Array, jax.Array]) -> jax.Array:
    largest, inverse = of_rows
    return jnp.exp((logits - largest) * inverse)


def _masses(logits: jax.Array, of_rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    if logits.ndim > 1:
        largest, inverse, scale = (x[:, None] for x in of_rows)
    else:
        largest, inverse, scale = of_rows
    return _round(_weights(logits, (largest, inverse)) * scale)


def _round(x: jax.Array) -> jax.Array:
    return (x + 0.5).astype(jnp.int32)


def _scale(total: jax.Array, s: Sampling) -> tuple[jax.Array, jax.Array]:
    """What makes masses of weights with this sum, f32[S], and how much mass top_p wants, i32[S]."""
    exponent = (lax.bitcast_convert_type(total, jnp.int32) >> 23) - 127
    scale = lax.bitcast_convert_type((29 - exponent + 127) << 23, jnp.float32)
    return scale, jnp.maximum(jnp.ceil(s.top_p * (total * scale)).astype(jnp.int32), 1)


def _total_and_smallest(
    weights: jax.Array, logits: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of the kept weights, which are in [0, 1], and the smallest kept logit, f32[S] each.

    Each weight is cut into three integers of 13 bits, so that no order of the additions changes
    the sum. The last bit that counts is 2**-39.
    """
    scaled = jnp.where(kept, weights, 0.0) * _LIMB**2
    whole = scaled.astype(jnp.int32)
    rest = ((scaled - whole.astype(jnp.float32)) * _LIMB).astype(jnp.int32)
    limbs = [whole >> 13, whole & np.int32(_LIMB - 1), rest]
    *sums, smallest = _reduce_rows(limbs, jnp.where(kept, logits, jnp.inf))
    high, middle, low = (x.astype(jnp.float32) for x in sums)
    return ((low / _LIMB + middle) / _LIMB + high) / _LIMB, smallest


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
      lowest: f32[S]; what is wanted is there from this logit on. Each row's sum of the amounts of
        the logits above it is below 2**31. Nothing depends on the others.
      of_rows: what `amounts` needs to know of the rows.

    Returns:
      The float, f32[S], at least the lowest one, and the sum of the amounts of the logits above it,
      i32[S], which is less than what is wanted.
    """

    def find_digit(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Tied to what changes, so that XLA computes the amounts again in each pass: it would take
        # them out of the loop, and then write and read as many bytes as there are logits.
        (prefix, above), rows = lax.optimization_barrier((found, of_rows))
        # The last digits may overlap: what they have in common is found already.
        shift = jnp.maximum(32 - _BITS - _BITS * i, 0).astype(jnp.uint32)
        digits = jnp.arange(1, _NUM_PIVOTS + 1, dtype=jnp.uint32)[:, None]
        pivots = _float_of(prefix + (digits << shift))
        amount = amounts(logits, rows)
        parts = [jnp.where(logits >= pivot[:, None], amount, 0) for pivot in list(pivots)]
        sums = jnp.stack(_reduce_rows(parts))
        reaches = (pivots <= lowest) | (sums >= wanted)
        # The lowest pivot that fails has the largest sum of those that fail.
        above = jnp.maximum(above, jnp.max(jnp.where(reaches, 0, sums), axis=0))
        return prefix + (jnp.sum(reaches, axis=0).astype(jnp.uint32) << shift), above

    nothing = jnp.zeros_like(wanted)
    prefix, above = lax.fori_loop(
        0, -(-32 // _BITS), find_digit, (nothing.astype(jnp.uint32), nothing)
    )
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


def _reduce_rows(integers: list[jax.Array], *floats: jax.Array) -> list[jax.Array]:
    """The sums of integer arrays and the minima of float arrays, in one pass: [S, V] -> [S] each.

    XLA would cut a long row into parts of about the root of its length. Then so few numbers meet in
    a warp of a GPU that it takes longer to add up its lanes than to read.
    """
    num_rows, size = integers[0].shape
    num_parts = 1
    while size > _MAX_PART * num_parts:
        num_parts *= 2
    length = -(-size // num_parts)
    padding = ((0, 0), (0, num_parts * length - size))

    def split(x: jax.Array, fill: Any) -> jax.Array:
        return jnp.pad(x, padding, constant_values=fill).reshape(num_rows, num_parts, length)

    parts = [split(x, 0) for x in integers] + [split(x, np.inf) for x in floats]
    inits = [np.int32(0)] * len(integers) + [np.float32(np.inf)] * len(floats)
    combine = [lax.add] * len(integers) + [lax.min] * len(floats)

    def combine_all(xs: list[jax.Array], ys: list[jax.Array]) -> list[jax.Array]:
        return [f(x, y) for f, x, y in zip(combine, xs, ys, strict=True)]

    for axis in (2, 1):
        parts = list(lax.reduce(parts, inits, combine_all, (axis,)))
    return parts
