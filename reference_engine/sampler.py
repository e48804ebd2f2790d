# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The sampler: from logits to tokens. The token of a row depends on no other row."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_paged import settings
from reference_engine import sampling_rows
from reference_engine.kept_ids import cut_to_few, cut_top_k, cut_top_p
from reference_engine.request import Request
from reference_engine.sampling_params import MAX_BIASED_IDS, MAX_LOGPROBS, MAX_STOP_IDS
from reference_engine.sampling_rows import Array, Sampling, is_kept, join_rows, split_rows

_NO_TOKEN = 2**31 - 1  # an id outside every vocabulary
_FLOAT32 = np.finfo(np.float32)


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


def num_output(request: Request) -> int:
    """The number of tokens generated so far, including one that the host has not read yet."""
    return request.num_tokens - request.num_prompt


def make_rows(requests: Sequence[Request], num_seqs: int) -> np.ndarray:
    """The rows of the requests for one transfer, see sampling_rows, then greedy rows."""
    return join_rows(
        [request.sampling_row for request in requests],
        [num_output(request) for request in requests],
        num_seqs,
    )


def make_bias(requests: Sequence[Request], num_seqs: int) -> Bias:
    """Numpy arrays of `num_seqs` rows: the rows of the requests, then rows without a bias."""
    changes = [
        [*request.params.logit_bias, *((token, -np.inf) for token in _forbidden(request))]
        for request in requests
    ]
    return _pad_bias(changes, num_seqs, MAX_BIASED_IDS)


def make_bans(requests: Sequence[Request], num_seqs: int) -> Bias:
    """As `make_bias`, of -inf for the stop ids of requests that must not stop yet."""
    changes = [
        [(token, -np.inf) for token in sorted(request.stop_ids)] if must_go_on(request) else []
        for request in requests
    ]
    return _pad_bias(changes, num_seqs, MAX_STOP_IDS)


def must_go_on(request: Request) -> bool:
    """Whether the next token is one of the first min_tokens."""
    return num_output(request) < request.params.min_tokens


def _pad_bias(changes: Sequence[Sequence[tuple[int, float]]], num_seqs: int, num_ids: int) -> Bias:
    bias = Bias(
        ids=np.full((num_seqs, num_ids), _NO_TOKEN, np.int32),
        values=np.zeros((num_seqs, num_ids), np.float32),
    )
    for row, pairs in enumerate(changes):
        if pairs:
            ids, values = zip(*pairs, strict=True)
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

    For `rows`, see `next_tokens`: a pending token has the id -1 - its row.
    """
    penalties = Penalties(
        token_ids=np.full((num_seqs, max_model_len), _NO_TOKEN, np.int32),
        num_prompt=np.zeros(num_seqs, np.int32),
        repetition=np.ones(num_seqs, np.float32),
        presence=np.zeros(num_seqs, np.float32),
        frequency=np.zeros(num_seqs, np.float32),
    )
    for row, request in enumerate(requests):
        if request.asks & sampling_rows.PENALTIES:
            params, ids = request.params, penalties.token_ids[row]
            ids[: request.num_prompt] = request.prompt_ids
            known = request.num_prompt + len(request.output_ids)
            ids[request.num_prompt : known] = request.output_ids
            if rows is not None and rows[row] >= 0:
                ids[known] = -1 - rows[row]
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

    Changing logits, cutting and drawing are separate programs, and only those run that a request of
    the batch asks for. None of them waits for the device.

    Args:
      logits: the model's logits.
      requests: the requests of the first rows; the tokens of the other rows mean nothing.
      max_model_len: the most tokens of a request.
      last_tokens: the new tokens of the step before, i32[B], on the device.
      rows: for each request the row of its pending token in `last_tokens`, which counts as a token
        of the request but is not known to the host yet; -1 if none is pending. None for none at
        all. A request with bad_words must not have one.
    """
    num_seqs = logits.shape[0]
    asked = functools.reduce(operator.or_, [request.asks for request in requests], 0)
    if asked & sampling_rows.BIAS:
        assert rows is None or not any(
            request.bad_words and row >= 0 for request, row in zip(requests, rows, strict=True)
        )
        logits = add_bias(logits, make_bias(requests, num_seqs))
    if asked & sampling_rows.MIN_TOKENS and any(map(must_go_on, requests)):
        logits = add_bias(logits, make_bans(requests, num_seqs))
    if asked & sampling_rows.PENALTIES:
        penalties = make_penalties(requests, num_seqs, max_model_len, rows)
        logits = penalise(logits, penalties, last_tokens)
    if not asked & sampling_rows.DRAW:
        return greedy(logits)
    return sample(logits, _cut(logits, make_rows(requests, num_seqs), asked))


def _cut(logits: jax.Array, rows: Array, asked: int) -> Array:
    """The rows with what top_k, top_p and min_p keep, by the cheapest programs that can."""
    if not asked & sampling_rows.MANY:
        return cut_to_few(logits, rows) if asked & sampling_rows.TOP_K else rows
    if asked & sampling_rows.TOP_K:
        rows = cut_top_k(logits, rows)
    return cut_top_p(logits, rows) if asked & sampling_rows.TOP_P else rows


def run_every_program(
    logits: jax.Array, max_model_len: int, last_tokens: jax.Array | None = None
) -> None:
    """Runs each program of this module once, so that all are compiled for these logits' shape.

    Args:
      logits: f32[S, V].
      max_model_len: the most tokens of a request.
      last_tokens: see `next_tokens`: None, or as long as it is there.
    """
    num_seqs = logits.shape[0]
    rows = make_rows([], num_seqs)
    cut_top_p(logits, rows)  # which comes first or second
    tokens = sample(logits, cut_top_p(logits, cut_top_k(logits, rows)))
    results = [
        add_bias(logits, make_bias([], num_seqs)),
        add_bias(logits, make_bans([], num_seqs)),
        penalise(logits, make_penalties([], num_seqs, max_model_len), last_tokens),
        sample(logits, rows),
        cut_to_few(logits, rows),
        greedy(logits),
        log_probabilities(logits, tokens),
    ]
    jax.block_until_ready(results)


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

    The id -1 - r stands for `last_tokens[r]`, which is i32[B].

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
def sample(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """The next token of each row: f32[S, V] -> i32[S]; see SamplingParams.

    The largest of logits + temperature * Gumbel noise is a draw from softmax(logits / temperature).
    With the temperature 0 it is the largest of the logits. The noise belongs to the id. All of it
    is one pass over the logits, in which neither noise nor sums are written to memory.

    Args:
      logits: f32[S, V].
      rows: i32[S, ROW_SIZE], see sampling_rows.

    >>> sample(jnp.array([[0.0, 2.0, 2.0]]), make_rows([], num_seqs=1)).tolist()
    [1]
    """
    s = split_rows(rows)
    noisy = logits + s.temperature[:, None] * _gumbel(s, logits.shape[1])
    return jnp.argmax(jnp.where(is_kept(logits, s), noisy, -jnp.inf), axis=-1).astype(jnp.int32)


def _gumbel(s: Sampling, size: int) -> jax.Array:
    """Gumbel noise of each id, f32[S, size], by the seed and the number of output tokens."""
    # One block of Threefry in each row makes its key, so that neither seeds nor steps that follow
    # each other have noise in common.
    keys = jax.random.wrap_key_data(s.seed, impl="threefry2x32")
    keys = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, s.num_output))
    ids = lax.broadcasted_iota(jnp.uint32, (1, size), 1)
    bits = _pcg3d(ids, keys[:, :1], keys[:, 1:])
    # The largest noise decides. It is that of the smallest numbers, where floats are dense.
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    exponential = -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))
    return -jnp.log(exponential)


def _pcg3d(z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The first of the three numbers that the hash pcg3d makes of (x, y, z), u32 all.

    From Jarzynski and Olano, "Hash Functions for GPU Rendering", Journal of Computer Graphics
    Techniques 9(3), 2020. It takes 11 integer operations where Threefry takes about 80.
    """
    x, y, z = (v * np.uint32(1664525) + np.uint32(1013904223) for v in (x, y, z))
    x += y * z
    y += z * x
    z += x * y
    x, y, z = (v ^ (v >> 16) for v in (x, y, z))
    return x + y * z


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
