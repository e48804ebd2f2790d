# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A request: what was asked for, what was generated, and which pages hold it."""

from __future__ import annotations

import array
import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_paged.checks import require
from pallas_paged.scalars import read_int
from reference_engine.config import EngineConfig, num_pages_for
from reference_engine.sampling_params import MAX_STOP_IDS, SamplingParams
from reference_engine.sampling_rows import asked_by, make_row


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token, which is the last output token, or a stop string was generated
    LENGTH = "length"  # max_tokens or the engine's max_model_len was reached
    ABORT = "abort"  # the caller aborted it


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A live request. Only the scheduler changes it.

    Attributes:
      request_id: the engine's number for it, which rises with the arrival.
      prompt_ids: the token ids of the prompt.
      params: see SamplingParams.
      output_ids: the tokens generated so far, as far as the host has read them.
      stop_ids: the ids that end it: the model's own unless it ignores them, and those of its
        params, which are added here.
      seed: the seed of its random numbers.
      num_computed: the number of its first tokens whose keys and values are in the pool, or are
        written there by a step in flight.
      num_cached: how many of them the prefix cache held when the request was last admitted.
      page_ids: the request's pages in order; page i holds the positions from i * page_size on.
      page_hashes: the hashes of its first full pages, as far as they were needed.
      num_published: the number of its first pages that were published to the prefix cache.
      num_deferrals: the number of steps in a row that alignment has made it wait.
      num_preemptions: how often its pages were taken away.
      finish_reason: why it ended; None while it lives.
      num_prompt: the number of tokens of the prompt.
      num_tokens: the number of tokens of the prompt and of the output so far, including the
        pending tokens: those that steps in flight yield.
      pending_row: the row of the newest step in flight that yields the last token; -1 if the host
        knows all tokens.
      max_tokens: the most tokens to generate.
      max_length: the number of tokens, prompt included, with which it ends in any case.
      bad_words: for each bad word, its token ids before the last one, and the last one.
      asks: what it asks of the sampler, see sampling_rows.
      sampling_row: its row of the sampler's arrays, see sampling_rows.
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
    # Stored, because the scheduler reads them multiple times per request and step.
    num_prompt: int = dataclasses.field(init=False)
    num_tokens: int = dataclasses.field(init=False)
    pending_row: int = dataclasses.field(init=False, default=-1)
    max_tokens: float = dataclasses.field(init=False)
    max_length: float = dataclasses.field(init=False, default=math.inf)  # `Scheduler.add` sets it
    bad_words: list[tuple[list[int], int]] = dataclasses.field(init=False)
    asks: int = dataclasses.field(init=False)
    sampling_row: bytes = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.prompt_ids)
        self.num_tokens = self.num_prompt + len(self.output_ids)
        params = self.params
        self.stop_ids |= frozenset(params.stop_token_ids)
        self.max_tokens = math.inf if params.max_tokens is None else params.max_tokens
        self.bad_words = [
            (list(word[:-1]), word[-1]) for word in params.bad_words if not isinstance(word, str)
        ]
        self.asks = asked_by(params, has_bias=bool(params.logit_bias or self.bad_words))
        self.sampling_row = make_row(params, self.seed)

    @property
    def num_known(self) -> int:
        """The number of tokens of the prompt and of the output that the host has read."""
        return self.num_prompt + len(self.output_ids)

    def forget_pending(self) -> None:
        """Takes back the tokens that steps in flight yield; they are computed again."""
        self.num_tokens = self.num_known
        self.pending_row = -1

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """The known tokens at the positions [start, end), as far as there are."""
        if start >= self.num_prompt:
            return tuple(self.output_ids[start - self.num_prompt : end - self.num_prompt])
        return (*self.prompt_ids[start:end], *self.output_ids[: max(0, end - self.num_prompt)])


def check_request(
    prompt: Any, params: Any, *, config: EngineConfig, vocab_size: int, eos_ids: frozenset[int]
) -> tuple[int, ...]:
    """Refuses what an engine cannot serve; returns the prompt's token ids as Python's ints.

    Args:
      prompt: token ids of Python, numpy or jax.
      params: SamplingParams, whose words are looked up.
      config: the engine's.
      vocab_size: the number of token ids.
      eos_ids: the model's ids that end the request unless it ignores them.

    Raises:
      ValueError: see Engine.add_request.
    """
    op = "Engine.add_request"
    require(
        isinstance(params, SamplingParams),
        op,
        "params",
        got=f"{params!r}",
        wanted="SamplingParams",
        hint="or None for greedy ones",
    )
    _check_ids(op, prompt, vocab_size)
    _check_lengths(op, len(prompt), params, config)
    params.check_ids(op, vocab_size)
    require(
        params.n == 1,
        op,
        "n",
        got=f"{params.n}",
        wanted="1",
        hint="LLM.generate returns n outputs; an Engine takes one request for each output",
    )
    num_stops = len((frozenset() if params.ignore_eos else eos_ids) | set(params.stop_token_ids))
    require(
        params.min_tokens == 0 or num_stops <= MAX_STOP_IDS,
        op,
        "stop_token_ids",
        got=f"{num_stops} ids, the model's own included",
        wanted=f"at most {MAX_STOP_IDS} with min_tokens",
        hint="name fewer, or leave min_tokens at 0",
    )
    return tuple(map(int, prompt))


def _check_ids(op: str, prompt: Any, vocab_size: int) -> None:
    require(
        hasattr(prompt, "__len__") and not isinstance(prompt, bytes | bytearray | Mapping),
        op,
        "prompt_ids",
        got=f"{prompt!r}",
        wanted="a list of token ids",
        hint="an Engine takes no text",
    )
    require(
        len(prompt) > 0,
        op,
        "prompt_ids",
        got="empty",
        wanted="at least one token id",
        hint="start the prompt with the model's beginning-of-text token",
    )
    wrong = [
        f"{token!r} at index {i}"
        for i, token in enumerate(prompt)
        if (type(token) is not int and read_int(token) is None) or not 0 <= token < vocab_size
    ]
    require(
        not wrong,
        op,
        "prompt_ids",
        got=", ".join(wrong[:1]),
        wanted=f"whole numbers in [0, {vocab_size})",
        hint="use the tokenizer that the model came with",
    )


def _check_lengths(op: str, num_prompt: int, params: SamplingParams, config: EngineConfig) -> None:
    require(
        num_prompt < config.max_model_len,
        op,
        "prompt_ids",
        got=f"{num_prompt} tokens long",
        wanted=f"fewer than max_model_len={config.max_model_len}",
        hint="shorten it, or raise max_model_len",
    )
    # The last token is never written, because no later token reads it.
    most = config.max_model_len if params.max_tokens is None else params.max_tokens
    longest = min(num_prompt + most, config.max_model_len) - 1
    num_pages = num_pages_for(longest, config.page_size)
    require(
        num_pages <= config.pool_pages,
        op,
        "prompt_ids",
        got=f"{num_prompt} tokens long with max_tokens={params.max_tokens}: up to"
        f" {num_pages} pages",
        wanted=f"at most the pool's {config.pool_pages} pages",
        hint="lower max_tokens, shorten the prompt, or raise num_pages",
    )


def check_numbers(seed: int, eos_token_ids: Sequence[int]) -> None:
    """Refuses an engine's seed that is none, and ids that no vocabulary has."""
    seed_number, eos = read_int(seed), [read_int(token) for token in eos_token_ids]
    require(
        seed_number is not None and seed_number >= 0,
        "Engine",
        "seed",
        got=f"{seed!r}",
        wanted="an int >= 0",
        hint="requests without a seed of their own get theirs from it",
    )
    require(
        all(token is not None and 0 <= token < 2**31 for token in eos),
        "Engine",
        "eos_token_ids",
        got=f"{eos_token_ids!r}",
        wanted="ids in [0, 2**31)",
        hint="() for none",
    )
