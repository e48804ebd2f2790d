# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The outputs of a step: on the device while it is in flight, then new tokens and their extras."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from reference_engine.request import FinishReason, Request
from reference_engine.step_plan import StepPlan

Extra = tuple[np.ndarray | None, dict[int, float] | None]  # Output's logits and logprobs


class Output(NamedTuple):
    """One new token.

    Attributes:
      request_id: the request to which it belongs.
      token_id: the token.
      finish_reason: why the request ended with it; None if the request goes on.
      logits: the model's logits, f32[vocab_size], before any bias or penalty; None unless asked
        for.
      logprobs: id -> log probability, first of the token, then of the likeliest ids; None unless
        asked for.
    """

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    logits: np.ndarray | None = None
    logprobs: dict[int, float] | None = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class InFlight:
    """A step that has been dispatched, and whose results the host has not read yet.

    Attributes:
      plan: what it computes.
      requests: the requests of the plan's segments.
      tokens: the new token of each row, i32[S].
      last_tokens: the same, padded to the largest number of sequences, for the next step.
      logits: the logits of each row, f32[S, V], if they are to be returned.
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

    def start_copies(self) -> None:
        """Lets the device send the results when it has them, before it begins a later step."""
        for array in (self.tokens, self.logits, *(self.logprobs or ())):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()


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


def make_outputs(
    kept: Sequence[tuple[int, Request]], tokens: Sequence[int], extras: Sequence[Extra] | None
) -> list[Output]:
    """The outputs of the tokens that `Scheduler.commit` has appended.

    Args:
      kept: the rows of these tokens, and their requests.
      tokens: the new token of each row.
      extras: what is returned beside each of them, if anything is.
    """
    if extras is None:
        return [Output(r.request_id, tokens[row], r.finish_reason) for row, r in kept]
    return [Output(r.request_id, tokens[row], r.finish_reason, *extras[row]) for row, r in kept]


def finished_requests(kept: Sequence[tuple[int, Request]]) -> list[Request]:
    """The requests that ended with the tokens that `Scheduler.commit` has appended.

    It is a function because CPython does not guard the jumps of a comprehension that stands in a
    `try` of the caller: an interrupt there would pass by the `except`.
    """
    return [request for _, request in kept if request.finish_reason is not None]
