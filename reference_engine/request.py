# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A request: what was asked, what has come of it, and which pages hold it."""

from __future__ import annotations

import dataclasses
import enum

from pallas_paged.checks import require


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token was generated (it is the last output token)
    LENGTH = "length"  # max_tokens or the engine's max_model_len was reached
    ABORT = "abort"  # the caller took it back


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen. Tokens are greedy: the largest logit, lowest id first.

    Attributes:
      max_tokens: most tokens to generate, at least 1.
      stop_token_ids: generation ends after one of these ids.

    Raises:
      ValueError: `max_tokens` is below 1.
    """

    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        require(
            isinstance(self.max_tokens, int) and self.max_tokens >= 1, "SamplingParams",
            "max_tokens", got=f"{self.max_tokens!r}", wanted="an int >= 1",
            hint="a request generates at least one token",
        )


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A live request. The scheduler and its commit are the only writers.

    Attributes:
      request_id: the engine's number for it, rising with arrival.
      prompt_ids: the prompt's tokens.
      params: see SamplingParams.
      output_ids: tokens generated so far.
      num_computed: tokens whose keys and values are in the pool, from the front.
      page_ids: the request's pages, in order; page i holds positions [i*page_size, ...).
      num_deferrals: steps in a row that alignment has made it wait.
      num_preemptions: times its pages were taken away.
      finish_reason: None while it lives.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    output_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    page_ids: list[int] = dataclasses.field(default_factory=list)
    num_deferrals: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt and what was generated."""
        return len(self.prompt_ids) + len(self.output_ids)

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """The known tokens at positions [start, end)."""
        return (*self.prompt_ids[start:end],
                *self.output_ids[max(0, start - self.num_prompt):max(0, end - self.num_prompt)])
