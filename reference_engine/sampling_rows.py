# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the device knows of a request's SamplingParams: one row of 36 bytes, made once a request."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from reference_engine.sampling_params import SamplingParams

Array = Any  # numpy's where the host packs it, jax's on the device

# What a request asks of the sampler, as bits: a step runs the programs of its requests' bits.
BIAS, PENALTIES, MIN_TOKENS, DRAW, TOP_K, TOP_P, MANY = (1 << i for i in range(7))
MAX_FEW = 64  # a draw among more ids, or among nobody knows how many, asks for MANY

_FLOAT32 = np.finfo(np.float32)
_MAX_INT32 = 2**31 - 1
_ROW = struct.Struct("=fiffqifi")
ROW_SIZE = _ROW.size // 4  # in numbers of 32 bits
_NUM_OUTPUT = 6  # the column that the host fills in at every step


class Sampling(NamedTuple):
    """The rows as arrays, on the device."""

    temperature: jax.Array  # f32[S], 0 for greedy
    top_k: jax.Array  # i32[S], 0 for all
    top_p: jax.Array  # f32[S]
    min_p: jax.Array  # f32[S]
    seed: jax.Array  # u32[S, 2], the two halves of 64 bits
    num_output: jax.Array  # i32[S], the number of tokens generated so far
    # A draw may take the ids whose logits are above the threshold, and among those whose logits are
    # equal to it, the ids up to the last one.
    threshold: jax.Array  # f32[S]
    last_id: jax.Array  # i32[S]


def asked_by(params: SamplingParams, *, has_bias: bool) -> int:
    """What a request with these params asks for: BIAS, PENALTIES and so on, as bits.

    Args:
      params: the request's.
      has_bias: whether logit_bias or bad_words change its logits.
    """
    has_penalties = params.repetition_penalty != 1 or bool(
        params.presence_penalty or params.frequency_penalty
    )
    draws = params.temperature > 0
    cuts_by_mass = draws and (params.top_p < 1 or params.min_p > 0)
    return (
        BIAS * has_bias
        | PENALTIES * has_penalties
        | MIN_TOKENS * (params.min_tokens > 0)
        | DRAW * draws
        | TOP_K * (draws and params.top_k > 0)
        | TOP_P * cuts_by_mass
        | MANY * (draws and (params.top_k > MAX_FEW or (params.top_k == 0 and cuts_by_mass)))
    )


def make_row(params: SamplingParams, seed: int) -> bytes:
    """The row of a request that has no output yet.

    Args:
      params: the request's.
      seed: the request's, a signed number of 64 bits.
    """
    if params.temperature == 0:
        return _ROW.pack(0.0, 0, 1.0, 0.0, 0, 0, -np.inf, _MAX_INT32)
    return _ROW.pack(
        # A temperature that is 0 or subnormal in float32 is as good as the smallest normal one, and
        # one whose product with the noise, which is at most 23, is infinite as good as the largest.
        min(max(params.temperature, float(_FLOAT32.tiny)), float(_FLOAT32.max) / 32),
        min(params.top_k, _MAX_INT32),
        params.top_p,
        params.min_p,
        seed,
        0,
        -np.inf,
        _MAX_INT32,
    )


_GREEDY_ROW = make_row(SamplingParams(), 0)


def join_rows(rows: Sequence[bytes], num_outputs: Sequence[int], num_seqs: int) -> np.ndarray:
    """The rows of a batch as one array for one transfer, i32[S, ROW_SIZE], then greedy rows.

    Args:
      rows: the rows of the requests.
      num_outputs: how many tokens each of them has generated.
      num_seqs: S.
    """
    padding = _GREEDY_ROW * (num_seqs - len(rows))
    joined = np.frombuffer(bytearray(b"".join(rows) + padding), np.int32)
    joined = joined.reshape(num_seqs, ROW_SIZE)
    joined[: len(rows), _NUM_OUTPUT] = num_outputs
    return joined


def split_rows(rows: jax.Array) -> Sampling:
    """The arrays in the rows: i32[S, ROW_SIZE] -> Sampling. It can be traced."""
    floats = lax.bitcast_convert_type(rows, jnp.float32)
    return Sampling(
        temperature=floats[:, 0],
        top_k=rows[:, 1],
        top_p=floats[:, 2],
        min_p=floats[:, 3],
        seed=lax.bitcast_convert_type(rows[:, 4:_NUM_OUTPUT], jnp.uint32),
        num_output=rows[:, _NUM_OUTPUT],
        threshold=floats[:, 7],
        last_id=rows[:, 8],
    )


def with_cut(rows: jax.Array, threshold: jax.Array, last_id: jax.Array) -> jax.Array:
    """The rows with a threshold, f32[S], and a last id, i32[S], where these keep fewer ids."""
    old = split_rows(rows)
    is_equal = threshold == old.threshold
    last_id = jnp.where(
        threshold > old.threshold,
        last_id,
        jnp.where(is_equal, jnp.minimum(last_id, old.last_id), old.last_id),
    )
    threshold = jnp.maximum(threshold, old.threshold)
    cut = jnp.stack([lax.bitcast_convert_type(threshold, jnp.int32), last_id], axis=1)
    return jnp.concatenate([rows[:, :-2], cut], axis=1)


def is_kept(logits: jax.Array, s: Sampling) -> jax.Array:
    """Whether a draw may take each id: f32[S, V] -> bool[S, V]. A NaN is kept."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    threshold = s.threshold[:, None]
    return ~((logits < threshold) | ((logits == threshold) & (ids > s.last_id[:, None])))
