# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""From logits to tokens, row by row: no row's token depends on another row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged import settings
from reference_engine.batch import Array
from reference_engine.request import MAX_LOGPROBS, MAX_STOP_IDS, Request

_NO_TOKEN = 2**31 - 1  # outside every vocabulary


class Sampling(NamedTuple):
    """SamplingParams of S rows, and where each is in its output."""

    temperature: Array  # f32[S], 0 for greedy
    top_k: Array  # i32[S], 0 for all
    top_p: Array  # f32[S]
    min_p: Array  # f32[S]
    seed: Array  # i32[S, 2], the two halves of 64 bits
    num_output: Array  # i32[S], tokens generated before
    banned: Array  # i32[S, MAX_STOP_IDS], ids that must not come yet


def is_greedy(request: Request) -> bool:
    """Whether the request's next token is its largest logit's, whatever that is."""
    params = request.params
    return params.temperature == 0 and len(request.output_ids) >= params.min_tokens


def make_sampling(requests: Sequence[Request], num_seqs: int) -> Sampling:
    """Numpy arrays of `num_seqs` rows: those of the requests, and greedy ones."""
    sampling = Sampling(
        temperature=np.zeros(num_seqs, np.float32), top_k=np.zeros(num_seqs, np.int32),
        top_p=np.ones(num_seqs, np.float32), min_p=np.zeros(num_seqs, np.float32),
        seed=np.zeros((num_seqs, 2), np.int32), num_output=np.zeros(num_seqs, np.int32),
        banned=np.full((num_seqs, MAX_STOP_IDS), _NO_TOKEN, np.int32),
    )
    for row, request in enumerate(requests):
        params = request.params
        if params.temperature > 0:
            sampling.temperature[row] = params.temperature
            sampling.top_k[row] = params.top_k
            sampling.top_p[row] = params.top_p
            sampling.min_p[row] = params.min_p
            sampling.seed[row] = np.array([request.seed], np.int64).view(np.int32)
            sampling.num_output[row] = len(request.output_ids)
        if len(request.output_ids) < params.min_tokens:
            sampling.banned[row, : len(request.stop_ids)] = sorted(request.stop_ids)
    return sampling


@settings.defaults()
@jax.jit
def greedy(logits: jax.Array) -> jax.Array:
    """The id of the largest logit, the lowest id among equals: f32[S, V] -> i32[S].

    >>> greedy(jnp.array([[0.0, 2.0, 2.0]])).tolist()
    [1]
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@settings.defaults()
@jax.jit
def sample(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row: f32[S, V] -> i32[S]; see SamplingParams.

    >>> sample(jnp.array([[0.0, 2.0, 2.0]]), make_sampling([], num_seqs=1)).tolist()
    [1]
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, sampling.banned].set(-jnp.inf, mode="drop")
    return jnp.where(sampling.temperature > 0, jax.vmap(_draw)(logits, sampling), greedy(logits))


def _draw(logits: jax.Array, s: Sampling) -> jax.Array:
    """One row's token: f32[V] -> i32[]."""
    size = logits.shape[0]
    # From the largest down: 0 is the largest's, so that no temperature overflows.
    scaled = (logits - jnp.max(logits)) / jnp.where(s.temperature > 0, s.temperature, 1.0)
    order = jnp.argsort(-scaled)  # stable: the lowest id first among equals
    scaled = scaled[order]
    weights = jnp.exp(scaled)
    kept = (jnp.arange(size) < jnp.where(s.top_k > 0, s.top_k, size)) & (weights >= s.min_p)
    weights = jnp.where(kept, weights, 0.0)
    before = jnp.cumsum(weights) - weights
    kept &= before < s.top_p * jnp.sum(weights)
    kept = kept.at[0].set(True)
    key = jax.random.key(0)
    for number in (s.seed[0], s.seed[1], s.num_output):
        key = jax.random.fold_in(key, number)
    # The largest of logits plus Gumbel noise is a draw from their softmax. Noise goes by id.
    noise = jax.random.gumbel(key, (size,))[order]
    return order[jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf))].astype(jnp.int32)


@settings.defaults()
@jax.jit
def log_probabilities(
    logits: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row: its token's, the largest MAX_LOGPROBS ids from the likeliest down, and theirs.

    Args:
      logits: f32[S, V].
      tokens: i32[S].

    Returns:
      f32[S], i32[S, n], f32[S, n], n = min(V, MAX_LOGPROBS).
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    values, ids = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    return own, ids.astype(jnp.int32), values
