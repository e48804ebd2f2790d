# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A request: what was asked, what has come of it, and which pages hold it."""

from __future__ import annotations

import array
import dataclasses
import enum
import math

from pallas_paged.checks import require

MAX_STOP_IDS = 32  # of one request with min_tokens: their place in the sampler is static
MAX_LOGPROBS = 20


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token (the last output token) or a stop string was generated
    LENGTH = "length"  # max_tokens or the engine's max_model_len was reached
    ABORT = "abort"  # the caller took it back


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen; vLLM's names and meanings, but greedy unless asked.

    Tokens are drawn from softmax(logits / temperature), first cut to the `top_k` likeliest, then to
    those of at least `min_p` of the likeliest one's probability, then to the smallest set of the
    likeliest whose probability reaches `top_p`.

    Attributes:
      max_tokens: most tokens to generate, at least 1.
      min_tokens: no stop id is generated, and no stop string ends the request, before so many.
      temperature: 0 takes the largest logit, lowest id first.
      top_k: 0 for all.
      top_p: in (0, 1].
      min_p: in [0, 1].
      seed: fixes the request's tokens, whatever else is in the batch; None takes one from the
        engine's seed and the request's number.
      stop: strings; the text ends before the first of them that is generated.
      stop_token_ids: generation ends after one of these ids.
      ignore_eos: whether the model's own end-of-text ids do not stop it.
      logprobs: how many of the likeliest ids to report with each token, at most MAX_LOGPROBS; 0
        reports the token's own alone, None nothing. Of the logits before all of the above.

    Raises:
      ValueError: a value is outside its range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_int("max_tokens", 1, hint="a request generates at least one token")
        self._check_int("min_tokens", 0, self.max_tokens, hint="0 lets any token stop it")
        self._check_int("top_k", 0, hint="0 keeps all")
        if self.logprobs is not None:
            self._check_int("logprobs", 0, MAX_LOGPROBS, hint="None reports nothing")
        if self.seed is not None:
            self._check_int("seed", -(2**63), 2**63 - 1, hint="None draws one")
        self._check_range("temperature", 0.0, math.inf, hint="0 is greedy")
        self._check_range("top_p", 0.0, 1.0, above=True, hint="1 keeps all")
        self._check_range("min_p", 0.0, 1.0, hint="0 keeps all")
        require(
            all(isinstance(text, str) and text for text in self.stop), "SamplingParams", "stop",
            got=f"{self.stop!r}", wanted="strings that are not empty", hint="() for none",
        )
        require(
            all(isinstance(token, int) for token in self.stop_token_ids), "SamplingParams",
            "stop_token_ids", got=f"{self.stop_token_ids!r}", wanted="ints", hint="() for none",
        )

    def _check_int(self, name, low, high=None, *, hint):
        value = getattr(self, name)
        require(
            isinstance(value, int) and low <= value and (high is None or value <= high),
            "SamplingParams", name, got=f"{value!r}",
            wanted=f"an int >= {low}" if high is None else f"an int in [{low}, {high}]", hint=hint,
        )

    def _check_range(self, name, low, high, *, hint, above=False):
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not math.isnan(value)
        require(
            is_number and low <= value <= high and value < math.inf and not (above and value == 0),
            "SamplingParams", name, got=f"{value!r}",
            wanted=f"a number in {'(' if above else '['}{low:g}, {high:g}{')' * (high > 1)}"
            + "]" * (high <= 1), hint=hint,
        )


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A live request. The scheduler and its commit are the only writers.

    Attributes:
      request_id: the engine's number for it, rising with arrival.
      prompt_ids: the prompt's tokens.
      params: see SamplingParams.
      output_ids: tokens generated so far; `append` adds to them.
      stop_ids: ids that end it: those of its params, added here, and the model's own unless it
        ignores them.
      seed: of its random numbers.
      num_computed: tokens whose keys and values are in the pool, from the front.
      num_cached: those of them that the prefix cache had when the request was last admitted.
      page_ids: the request's pages, in order; page i holds positions [i*page_size, ...).
      page_hashes: of its full pages, from the front, as many as were needed so far.
      num_published: pages, from the front, that the prefix cache knows or was offered.
      num_deferrals: steps in a row that alignment has made it wait.
      num_preemptions: times its pages were taken away.
      finish_reason: None while it lives.
      num_prompt: tokens of the prompt.
      num_tokens: tokens known so far: the prompt and what was generated.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    output_ids: list[int] = dataclasses.field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    num_computed: int = 0
    num_cached: int = 0
    page_ids: array.array = dataclasses.field(default_factory=lambda: array.array("i"))
    page_hashes: list[bytes] = dataclasses.field(default_factory=list)
    num_published: int = 0
    num_deferrals: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    # Counted, not computed: the scheduler asks for them several times a request and step.
    num_prompt: int = dataclasses.field(init=False)
    num_tokens: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.num_prompt = len(self.prompt_ids)
        self.num_tokens = self.num_prompt + len(self.output_ids)
        self.stop_ids |= frozenset(self.params.stop_token_ids)

    def append(self, token_id: int) -> None:
        """Adds a generated token."""
        self.output_ids.append(token_id)
        self.num_tokens += 1

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """The known tokens at positions [start, end)."""
        if start >= self.num_prompt:
            return tuple(self.output_ids[start - self.num_prompt : end - self.num_prompt])
        return (*self.prompt_ids[start:end], *self.output_ids[: max(0, end - self.num_prompt)])
