# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The sampler: from logits to tokens. The token of a row depends on no other row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged import settings
from reference_engine.batch import Array
from reference_engine.request import Request
from reference_engine.sampling_params import MAX_BIASED_IDS, MAX_LOGPROBS, MAX_STOP_IDS

_NO_TOKEN = 2**31 - 1  # an id outside every vocabulary
_FLOAT32 = np.finfo(np.float32)
_MAX_INT32 = 2**31 - 1


class Sampling(NamedTuple):
    """The SamplingParams of S rows, and how far each row's output has come."""

    temperature: Array  # f32[S], 0 for greedy
    top_k: Array  # i32[S], 0 for all
    top_p: Array  # f32[S]
    min_p: Array  # f32[S]
    seed: Array  # i32[S, 2], the two halves of 64 bits
    num_output: Array  # i32[S], the number of tokens generated so far
    banned: Array  # i32[S, MAX_STOP_IDS], the ids that must not come yet


class Bias(NamedTuple):
    """What is added to the logits of S rows: logit_bias, and -inf for ids that bad_words forbid."""

    ids: Array  # i32[S, MAX_BIASED_IDS]
    values: Array  # f32[S, MAX_BIASED_IDS]


class Penalties(NamedTuple):
    """The penalties of S rows, and the tokens to which they apply."""

    token_ids: Array  # i32[S, max_model_len], the prompt of a row and then its output
    num_prompt: Array  # i32[S]
    repetition: Array  # f32[S], 1 for none
    presence: Array  # f32[S]
    frequency: Array  # f32[S]


def is_greedy(request: Request) -> bool:
    """Whether the request's next token is the one with the largest logit, whichever that is."""
    params = request.params
    return params.temperature == 0 and num_output(request) >= params.min_tokens


def num_output(request: Request) -> int:
    """The number of tokens generated so far, including the one that the host has not read yet."""
    return request.num_tokens - request.num_prompt


def make_sampling(requests: Sequence[Request], num_seqs: int) -> Sampling:
    """Numpy arrays of `num_seqs` rows: the rows of the requests, then greedy rows."""
    sampling = Sampling(
        temperature=np.zeros(num_seqs, np.float32),
        top_k=np.zeros(num_seqs, np.int32),
        top_p=np.ones(num_seqs, np.float32),
        min_p=np.zeros(num_seqs, np.float32),
        seed=np.zeros((num_seqs, 2), np.int32),
        num_output=np.zeros(num_seqs, np.int32),
        banned=np.full((num_seqs, MAX_STOP_IDS), _NO_TOKEN, np.int32),
    )
    for row, request in enumerate(requests):
        params = request.params
        if params.temperature > 0:
            # A temperature that is 0 or subnormal in float32 is as good as the smallest normal one.
            sampling.temperature[row] = max(params.temperature, _FLOAT32.tiny)
            sampling.top_k[row] = min(params.top_k, _MAX_INT32)
            sampling.top_p[row] = params.top_p
            sampling.min_p[row] = params.min_p
            sampling.seed[row] = np.array([request.seed], np.int64).view(np.int32)
            sampling.num_output[row] = num_output(request)
        if num_output(request) < params.min_tokens:
            sampling.banned[row, : len(request.stop_ids)] = sorted(request.stop_ids)
    return sampling


def make_bias(requests: Sequence[Request], num_seqs: int) -> Bias:
    """Numpy arrays of `num_seqs` rows: the rows of the requests, then rows without a bias."""
    bias = Bias(
        ids=np.full((num_seqs, MAX_BIASED_IDS), _NO_TOKEN, np.int32),
        values=np.zeros((num_seqs, MAX_BIASED_IDS), np.float32),
    )
    for row, request in enumerate(requests):
        changes = [*request.params.logit_bias, *((token, -np.inf) for token in _forbidden(request))]
        if changes:
            ids, values = zip(*changes, strict=True)
            bias.ids[row, : len(ids)] = ids
            bias.values[row, : len(ids)] = values
    return bias


def _forbidden(request: Request) -> list[int]:
    """The last ids of the bad words whose other ids are the end of the output."""
    output, forbidden = request.output_ids, []
    for prefix, last in request.bad_words:
        start = len(output) - len(prefix)
        if start >= 0 and output[start:] == prefix:
            forbidden.append(last)
    return forbidden


def make_penalties(
    requests: Sequence[Request],
    num_seqs: int,
    max_model_len: int,
    rows: Sequence[int] | None = None,
) -> Penalties:
    """Numpy arrays of `num_seqs` rows: the rows of the requests, then rows without a penalty.

    For `rows`, see `next_tokens`: the id of a pending token is -1 - its row.
    """
    penalties = Penalties(
        token_ids=np.full((num_seqs, max_model_len), _NO_TOKEN, np.int32),
        num_prompt=np.zeros(num_seqs, np.int32),
        repetition=np.ones(num_seqs, np.float32),
        presence=np.zeros(num_seqs, np.float32),
        frequency=np.zeros(num_seqs, np.float32),
    )
    for row, request in enumerate(requests):
        if request.has_penalties:
            params = request.params
            penalties.token_ids[row, : request.num_prompt] = request.prompt_ids
            penalties.token_ids[row, request.num_prompt : request.num_known] = request.output_ids
            if rows is not None and rows[row] >= 0:
                penalties.token_ids[row, request.num_known] = -1 - rows[row]
            penalties.num_prompt[row] = request.num_prompt
            penalties.repetition[row] = params.repetition_penalty
            penalties.presence[row] = params.presence_penalty
            penalties.frequency[row] = params.frequency_penalty
    return penalties


def next_tokens(
    logits: jax.Array,
    requests: Sequence[Request],
    max_model_len: int,
    last_tokens: jax.Array | None = None,
    rows: Sequence[int] | None = None,
) -> jax.Array:
    """The next token of each row: f32[S, V] -> i32[S].

    Changing logits and sampling are separate programs, and only those run that a request of the
    batch asks for.

    Args:
      logits: the model's logits.
      requests: the requests of the first rows; the tokens of the other rows mean nothing.
      max_model_len: the most tokens of a request.
      last_tokens: the tokens of the step before, i32[R].
      rows: for each request, the row of its pending token, which the host has not read yet, in
        `last_tokens`; -1 if there is none. None for none at all. A request with bad words must not
        have one.
    """
    num_seqs = logits.shape[0]
    if any(request.has_bias for request in requests):
        logits = add_bias(logits, make_bias(requests, num_seqs))
    if any(request.has_penalties for request in requests):
        penalties = make_penalties(requests, num_seqs, max_model_len, rows)
        logits = penalise(logits, penalties, last_tokens)
    if all(map(is_greedy, requests)):
        return greedy(logits)
    return sample(logits, make_sampling(requests, num_seqs))


def run_every_program(
    logits: jax.Array, max_model_len: int, last_tokens: jax.Array | None = None
) -> None:
    """Runs each program of this module once, so that all are compiled for these logits' shape.

    Args:
      logits: f32[S, V].
      max_model_len: the most tokens of a request.
      last_tokens: see `next_tokens`.
    """
    num_seqs = logits.shape[0]
    tokens = sample(logits, make_sampling([], num_seqs))
    add_bias(logits, make_bias([], num_seqs))
    penalise(logits, make_penalties([], num_seqs, max_model_len), last_tokens)
    jax.block_until_ready((greedy(logits), log_probabilities(logits, tokens)))


@settings.defaults()
@jax.jit
def add_bias(logits: jax.Array, bias: Bias) -> jax.Array:
    """Adds the bias of each row to its logits: f32[S, V] -> f32[S, V]."""
    rows = jnp.arange(logits.shape[0])[:, None]
    return _finite_above(logits.at[rows, bias.ids].add(bias.values, mode="drop"))


@settings.defaults()
@jax.jit
def penalise(
    logits: jax.Array, penalties: Penalties, last_tokens: jax.Array | None = None
) -> jax.Array:
    """Applies the penalties of each row, see SamplingParams: f32[S, V] -> f32[S, V].

    A token id of -1 - r stands for `last_tokens[r]`.

    A row without penalties keeps its bits, so that it does not depend on the other rows.
    """
    p = penalties
    rows = jnp.arange(logits.shape[0])[:, None]
    positions = jnp.arange(p.token_ids.shape[1], dtype=jnp.int32)[None, :]
    is_output = (positions >= p.num_prompt[:, None]).astype(jnp.float32)
    zeros, ids = jnp.zeros_like(logits), p.token_ids
    if last_tokens is not None:
        ids = jnp.where(ids < 0, last_tokens[jnp.maximum(-1 - ids, 0)], ids)
    counts = zeros.at[rows, ids].add(is_output, mode="drop")
    is_present = zeros.at[rows, ids].set(1.0, mode="drop") > 0
    repetition = p.repetition[:, None]
    penalised = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(is_present, penalised, logits)
    logits -= p.frequency[:, None] * counts
    logits -= p.presence[:, None] * (counts > 0).astype(jnp.float32)
    return _finite_above(logits)


def _finite_above(logits: jax.Array) -> jax.Array:
    """Keeps logits below infinity, because the difference of two infinite logits is NaN."""
    return jnp.minimum(logits, float(_FLOAT32.max))


@settings.defaults()
@jax.jit
def greedy(logits: jax.Array) -> jax.Array:
    """The id of the largest logit, the lowest id among equal ones: f32[S, V] -> i32[S].

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
    # The largest becomes 0, and the others are below, so that no temperature overflows.
    scaled = (logits - jnp.max(logits)) / jnp.where(s.temperature > 0, s.temperature, 1.0)
    order = jnp.argsort(-scaled)  # stable: among equal ones, the lowest id comes first
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
    # The largest of logits plus Gumbel noise is a draw from their softmax. The noise belongs to the
    # id, not to the rank.
    noise = jax.random.gumbel(key, (size,))[order]
    return order[jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf))].astype(jnp.int32)


@settings.defaults()
@jax.jit
def log_probabilities(
    logits: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The log probabilities of each row's token and of its likeliest ids.

    Args:
      logits: f32[S, V].
      tokens: i32[S].

    Returns:
      With n = min(V, MAX_LOGPROBS): the log probability of the token, f32[S]; the n likeliest ids,
      i32[S, n], the likeliest first; and their log probabilities, f32[S, n].
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    values, ids = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    return own, ids.astype(jnp.int32), values
