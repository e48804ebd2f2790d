# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The outputs of a step: new tokens, and what is returned beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reference_engine.request import FinishReason, Request

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
