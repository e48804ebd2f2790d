# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The outputs of a step: new tokens, and what is returned beside them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

import jax
import numpy as np

from reference_engine.request import FinishReason, Request
from reference_engine.sampler import log_probabilities
from reference_engine.scheduler import StepPlan

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


def read_extras(
    requests: Sequence[Request], tokens: jax.Array, logits: jax.Array, *, return_logits: bool
) -> list[Extra]:
    """What is returned beside the tokens of the first rows, as far as it is asked for.

    Args:
      requests: the requests of the rows.
      tokens: the new token of each row, i32[S].
      logits: the logits of each row, f32[S, V].
      return_logits: whether to return the logits.
    """
    rows = np.asarray(logits) if return_logits else [None] * len(requests)
    if all(request.params.logprobs is None for request in requests):
        return [(row, None) for row, _ in zip(rows, requests, strict=False)]
    own, ids, values = map(np.asarray, log_probabilities(logits, tokens))
    chosen = np.asarray(tokens)
    extras = []
    for i, request in enumerate(requests):
        count, found = request.params.logprobs, None
        if count is not None:
            top = zip(ids[i, :count].tolist(), values[i, :count].tolist(), strict=True)
            found = {int(chosen[i]): float(own[i])} | dict(top)
        extras.append((rows[i], found))
    return extras


def make_outputs(
    plan: StepPlan,
    tokens: list[int],
    extras: list[Extra],
    finished: Sequence[Request],
    aborted: Set[int],
) -> list[Output]:
    """The outputs of the requests that got a token and were not aborted."""
    reasons = {request.request_id: request.finish_reason for request in finished}
    return [
        Output(segment.request_id, token, reasons.get(segment.request_id), *extra)
        for segment, token, extra in zip(plan.segments, tokens, extras, strict=True)
        if segment.samples and segment.request_id not in aborted
    ]
