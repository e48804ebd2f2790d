# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A step in flight: what the device computes, and what the host will read of it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from reference_engine.batch import pad_tokens
from reference_engine.config import EngineConfig
from reference_engine.outputs import Extra
from reference_engine.request import Request
from reference_engine.sampler import log_probabilities, next_tokens
from reference_engine.step_plan import StepPlan


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class InFlight:
    """A step that has been dispatched, and whose results the host has not read yet.

    Attributes:
      plan: what it computes.
      requests: the requests of the plan's segments.
      tokens: the new token of each row of logits, i32[rows].
      last_tokens: the same, padded to the largest number of sequences, for the next step.
      logits: the logits of each row, f32[rows, V], if they are to be returned.
      logprobs: see `sampler.log_probabilities`; None if no request wants any.
      num_padding: the rows of the batch that hold no token.
      is_read_first: whether it must be read before the next step is scheduled.
    """

    plan: StepPlan
    requests: list[Request]
    tokens: jax.Array
    last_tokens: jax.Array
    logits: jax.Array | None
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None
    num_padding: int
    is_read_first: bool


def choose_tokens(
    plan: StepPlan,
    requests: list[Request],
    logits: jax.Array,
    last_tokens: jax.Array,
    *,
    config: EngineConfig,
    num_padding: int,
) -> InFlight:
    """Dispatches what follows the model: the sampler, and the copies of its results to the host.

    Args:
      plan, requests, num_padding: see InFlight.
      logits: the model's logits, f32[rows, V].
      last_tokens: the last tokens of the step before, i32[R].
      config: the engine's.
    """
    rows = [request.pending_row for request in requests]
    tokens = next_tokens(logits, requests, config.max_model_len, last_tokens, rows)
    has_logprobs = any(request.params.logprobs is not None for request in requests)
    step = InFlight(
        plan,
        requests,
        tokens,
        pad_tokens(tokens, len(last_tokens)),
        logits if config.return_logits else None,
        log_probabilities(logits, tokens) if has_logprobs else None,
        num_padding,
        # A bad word is forbidden where the tokens before it are known.
        is_read_first=not config.async_scheduling or any(r.bad_words for r in requests),
    )
    # The device sends the results when it has them, before it begins a later step.
    for array in (step.tokens, step.logits, *(step.logprobs or ())):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    return step


def read_extras(step: InFlight) -> list[Extra] | None:
    """What is returned beside the tokens of the step's requests; None if nothing is."""
    if step.logits is None and step.logprobs is None:
        return None
    num_rows = len(step.requests)
    rows = [None] * num_rows if step.logits is None else np.asarray(step.logits)
    if step.logprobs is None:
        return [(row, None) for row, _ in zip(rows, range(num_rows), strict=False)]
    own, ids, values = map(np.asarray, step.logprobs)
    chosen = np.asarray(step.tokens)
    extras = []
    for i, request in enumerate(step.requests):
        count, found = request.params.logprobs, None
        if count is not None:
            top = zip(ids[i, :count].tolist(), values[i, :count].tolist(), strict=True)
            found = {int(chosen[i]): float(own[i])} | dict(top)
        extras.append((rows[i], found))
    return extras
