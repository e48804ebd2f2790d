# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A request: what was asked, what has come of it, and which pages hold it."""

from __future__ import annotations

import array
import dataclasses
import enum
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import InitVar
from typing import Any

import numpy as np

from pallas_paged.checks import require

MAX_STOP_IDS = 32  # of one request with min_tokens: their place in the sampler is static
MAX_BIASED_IDS = 1024  # of one request, by logit_bias and bad_words: static as well
MAX_LOGPROBS = 20
MAX_N = 16384  # as vLLM's
_MAX_FLOAT = float(np.finfo(np.float32).max)  # what the device computes with

# What vLLM's SamplingParams have beside these: name -> (what changes nothing, what to do instead).
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((None, 1), "give n, and choose among its outputs"),
    "use_beam_search": ((None, False), "beam search is left out on purpose"),
    "length_penalty": ((None, 1.0), "beam search is left out on purpose"),
    "early_stopping": ((None, False), "beam search is left out on purpose"),
    "prompt_logprobs": ((None,), "logprobs are reported of generated tokens alone"),
    "logprob_token_ids": ((None,), "give logprobs, the number of likeliest ids"),
    "flat_logprobs": ((None, False), "logprobs are a dict a token"),
    "detokenize": ((None, True), "read token_ids and leave the text alone"),
    "spaces_between_special_tokens": ((None, True), "join the texts yourself"),
    "logits_processors": ((None, (), []), "give logit_bias or bad_words"),
    "allowed_token_ids": ((None,), "give logit_bias or bad_words"),
    "structured_outputs": ((None,), "guided decoding is left out on purpose"),
    "guided_decoding": ((None,), "guided decoding is left out on purpose"),
    "truncate_prompt_tokens": ((None,), "cut the prompt yourself"),
    "output_kind": ((None,), "generate returns whole outputs, stream what each step adds"),
    "extra_args": ((None,), "leave it out"),
    "skip_reading_prefix_cache": ((None, False), "give EngineConfig.enable_prefix_caching"),
    "thinking_token_budget": ((None,), "give max_tokens"),
    "repetition_detection": ((None,), "give repetition_penalty or frequency_penalty"),
}


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token (the last output token) or a stop string was generated
    LENGTH = "length"  # max_tokens or the engine's max_model_len was reached
    ABORT = "abort"  # the caller took it back


def as_int(value: Any) -> int | None:
    """A whole number of Python, numpy or jax as Python's; None for anything else, bools included.

    >>> as_int(np.int64(3)), as_int(True), as_int(3.0), as_int("3")
    (3, None, None, None)
    """
    if isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_:
        return None
    if getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_float(value: Any) -> float | None:
    """A real number of Python, numpy or jax as Python's; None for anything else, bools included.

    >>> as_float(np.float32(0.5)), as_float(2), as_float(True), as_float("0.5")
    (0.5, 2.0, None, None)
    """
    if isinstance(value, bool | str | bytes) or getattr(value, "dtype", None) == np.bool_:
        return None
    if getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen; vLLM's names and meanings, but greedy unless asked.

    The model's logits are first changed, in this order: `logit_bias` is added, `bad_words` and stop
    ids that must not come yet become impossible, then the three penalties are applied. The token is
    the largest one's, or is drawn from softmax(logits / temperature), first cut to the `top_k`
    likeliest, then to those of at least `min_p` of the likeliest one's probability, then to the
    smallest set of the likeliest whose probability reaches `top_p`. All in float32, on the device.

    Whole and real numbers may be Python's, numpy's or jax's. None stands for none of `stop`,
    `stop_token_ids`, `logit_bias` and `bad_words`. vLLM's other names are known, and refused by
    a sentence unless they ask for nothing.

    Attributes:
      max_tokens: most tokens to generate, at least 1; None for as many as max_model_len leaves.
      min_tokens: no stop id is among the first so many tokens, and no stop string that ends in
        them ends the request; one that begins in them and ends behind them does.
      temperature: 0 takes the largest logit, lowest id first.
      top_k: 0 or -1 for all.
      top_p: in (0, 1].
      min_p: in [0, 1].
      seed: 64 bits, signed; fixes the request's tokens, whatever else is in the batch; None takes
        one from the engine's seed and the request's number.
      stop: strings; the text ends before the first of them that is generated.
      stop_token_ids: generation ends after one of these ids.
      ignore_eos: whether the model's own end-of-text ids do not stop it.
      logprobs: how many of the likeliest ids to report with each token, at most MAX_LOGPROBS; 0
        reports the token's own alone, None nothing. Of the logits before all of the above.
      n: outputs of each prompt. Output i has the seed `seed + i`, so the first is what n = 1 gives.
      repetition_penalty: above 0; the positive logits of ids that are in the prompt or the output
        are divided by it, the negative ones multiplied. 1 for none.
      presence_penalty: in [-2, 2]; taken off the logits of ids that are in the output.
      frequency_penalty: in [-2, 2]; taken off once for each time that an id is in the output.
      logit_bias: id -> number to add to its logit; kept as pairs.
      bad_words: strings that are not generated, neither at the start of a word nor behind a
        space, or token ids in a row of which the last is not generated behind the others. At most
        MAX_BIASED_IDS together with logit_bias.
      skip_special_tokens: whether the text is without special tokens.
      include_stop_str_in_output: whether the text has the stop string, or the stop token's text,
        that ended it.

    Raises:
      ValueError: a value is outside its range.
    """

    max_tokens: int | None = 16
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
    n: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    # In the order of _UNSERVED.
    best_of: InitVar[Any] = None
    use_beam_search: InitVar[Any] = None
    length_penalty: InitVar[Any] = None
    early_stopping: InitVar[Any] = None
    prompt_logprobs: InitVar[Any] = None
    logprob_token_ids: InitVar[Any] = None
    flat_logprobs: InitVar[Any] = None
    detokenize: InitVar[Any] = None
    spaces_between_special_tokens: InitVar[Any] = None
    logits_processors: InitVar[Any] = None
    allowed_token_ids: InitVar[Any] = None
    structured_outputs: InitVar[Any] = None
    guided_decoding: InitVar[Any] = None
    truncate_prompt_tokens: InitVar[Any] = None
    output_kind: InitVar[Any] = None
    extra_args: InitVar[Any] = None
    skip_reading_prefix_cache: InitVar[Any] = None
    thinking_token_budget: InitVar[Any] = None
    repetition_detection: InitVar[Any] = None

    def __post_init__(self, *unserved: Any) -> None:
        refuse_unserved("SamplingParams", dict(zip(_UNSERVED, unserved, strict=True)), _UNSERVED)
        if self.max_tokens is not None:
            self._check_int("max_tokens", 1, hint="a request generates at least one token")
        self._check_int("min_tokens", 0, self.max_tokens, hint="0 lets any token stop it")
        self._check_int("top_k", -1, hint="0 keeps all, as -1 does")
        self._set("top_k", max(self.top_k, 0))
        self._check_int("n", 1, MAX_N, hint="a prompt has at least one output")
        if self.logprobs is not None:
            self._check_int("logprobs", 0, MAX_LOGPROBS, hint="None reports nothing")
        if self.seed is not None:
            self._check_int("seed", -(2**63), 2**63 - 1, hint="None draws one")
        self._check_float("temperature", 0.0, _MAX_FLOAT, hint="0 is greedy")
        self._check_float("top_p", 0.0, 1.0, above=True, hint="1 keeps all")
        self._check_float("min_p", 0.0, 1.0, hint="0 keeps all")
        self._check_float("repetition_penalty", 0.0, _MAX_FLOAT, above=True, hint="1 is none")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check_float(name, -2.0, 2.0, hint="0 is none")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            self._check_bool(name)
        self._check_sequences()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_int(self, name: str, low: int, high: int | None = None, *, hint: str) -> None:
        given = getattr(self, name)
        value = as_int(given)
        require(
            value is not None and low <= value and (high is None or value <= high),
            "SamplingParams",
            name,
            got=f"{given!r}",
            wanted=f"an int >= {low}" if high is None else f"an int in [{low}, {high}]",
            hint=hint,
        )
        self._set(name, value)

    def _check_float(
        self, name: str, low: float, high: float, *, hint: str, above: bool = False
    ) -> None:
        given = getattr(self, name)
        value = as_float(given)
        require(
            value is not None and low <= value <= high and not (above and value == low),
            "SamplingParams",
            name,
            got=f"{given!r}",
            wanted=f"a number in {'(' if above else '['}{low:g}, {high:g}]",
            hint=hint,
        )
        self._set(name, value)

    def _check_bool(self, name: str) -> None:
        value = getattr(self, name)
        require(
            isinstance(value, bool | np.bool_),
            "SamplingParams",
            name,
            got=f"{value!r}",
            wanted="True or False",
            hint="numbers and strings are not taken for it",
        )
        self._set(name, bool(value))

    def _check_sequences(self) -> None:
        stop, words = _as_tuple(self.stop), _as_tuple(self.bad_words)
        ids = _as_tuple(self.stop_token_ids)
        kept_stop = [text for text in stop or () if isinstance(text, str) and text]
        kept_ids = [token for token in map(as_int, ids or ()) if token is not None]
        kept_words = [word for word in map(_bad_word, words or ()) if word is not None]
        for name, given, kept, wanted in (
            ("stop", stop, kept_stop, "strings that are not empty"),
            ("stop_token_ids", ids, kept_ids, "ints"),
            ("bad_words", words, kept_words, "strings that are not empty, or token ids in a row"),
        ):
            require(
                given is not None and len(kept) == len(given),
                "SamplingParams",
                name,
                got=f"{getattr(self, name)!r}",
                wanted=wanted,
                hint="() for none",
            )
            self._set(name, tuple(kept))
        bias = _bias_pairs(self.logit_bias)
        require(
            bias is not None,
            "SamplingParams",
            "logit_bias",
            got=f"{self.logit_bias!r}",
            wanted="a dict from ids, which are ints, to finite numbers",
            hint="None for none; -100 makes an id all but impossible",
        )
        self._set("logit_bias", bias)

    def check_ids(self, op: str, vocab_size: int) -> None:
        """Refuses ids outside the vocabulary, and words whose ids nobody has looked up.

        Raises:
          ValueError: as `op`'s.
        """
        words = [word for word in self.bad_words if isinstance(word, str)]
        require(
            not words,
            op,
            "bad_words",
            got=f"{words!r}",
            wanted="token ids in a row",
            hint="LLM looks words up; an Engine has no tokenizer",
        )
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("bad_words", [token for word in self.bad_words for token in word]),
        ):
            wrong = [token for token in ids if not 0 <= int(token) < vocab_size]
            require(
                not wrong,
                op,
                name,
                got=", ".join(map(str, wrong[:1])),
                wanted=f"ids in [0, {vocab_size})",
                hint="use the tokenizer that the model came with",
            )
        count = len(self.logit_bias) + len(self.bad_words)
        require(
            count <= MAX_BIASED_IDS,
            op,
            "logit_bias",
            got=f"of {count} ids, bad_words included",
            wanted=f"at most {MAX_BIASED_IDS}",
            hint="name fewer",
        )


def refuse_unserved(
    op: str, given: Mapping[str, Any], unserved: Mapping[str, tuple[tuple[Any, ...], str]]
) -> None:
    """Refuses arguments that other engines have and this one has not.

    Args:
      op: whose arguments they are.
      given: name -> value of those that came.
      unserved: name -> the values that change nothing, and what to do instead of others.

    Raises:
      ValueError: one of them asks for something, or is no argument at all.
    """
    for name, value in given.items():
        if name not in unserved:
            raise ValueError(f"{op}: there is no argument `{name}`; it is {value!r}")
        neutral, hint = unserved[name]
        is_neutral = any(
            value is known or type(value) is type(known) and value == known for known in neutral
        )
        require(
            is_neutral,
            op,
            name,
            got=f"{value!r}, which is not served",
            wanted=f"{neutral[-1]!r}",
            hint=hint,
        )


def _as_tuple(values: Any) -> tuple[Any, ...] | None:
    """What a sequence holds: of None nothing, of a string itself. None for what is no sequence."""
    if values is None:
        return ()
    if isinstance(values, str):
        return (values,)
    if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
        return None
    return tuple(values) if getattr(values, "ndim", 1) else None


def _bias_pairs(given: Any) -> tuple[tuple[int, float], ...] | None:
    """logit_bias as it is kept; None if it is none."""
    pairs = tuple(given.items()) if isinstance(given, Mapping) else _as_tuple(given)
    if pairs is None or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return None
    bias = [(as_int(token), as_float(value)) for token, value in pairs]
    kept = [
        (token, value)
        for token, value in bias
        if token is not None and value is not None and abs(value) <= _MAX_FLOAT
    ]
    return tuple(kept) if len(kept) == len(pairs) else None


def _bad_word(given: Any) -> str | tuple[int, ...] | None:
    """An entry of bad_words as it is kept; None if it is none."""
    if isinstance(given, str):
        return given or None
    ids = tuple(token for token in map(as_int, _as_tuple(given) or ()) if token is not None)
    return ids if ids and len(ids) == len(given) else None


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
      max_tokens: most tokens to generate.
      bad_words: of each the token ids before its last, and its last.
      has_bias, has_penalties: whether its logits are changed before a token is chosen.
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
    max_tokens: float = dataclasses.field(init=False)
    bad_words: list[tuple[list[int], int]] = dataclasses.field(init=False)
    has_bias: bool = dataclasses.field(init=False)
    has_penalties: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.prompt_ids)
        self.num_tokens = self.num_prompt + len(self.output_ids)
        params = self.params
        self.stop_ids |= frozenset(params.stop_token_ids)
        self.max_tokens = math.inf if params.max_tokens is None else params.max_tokens
        self.bad_words = [
            (list(word[:-1]), word[-1]) for word in params.bad_words if not isinstance(word, str)
        ]
        self.has_bias = bool(params.logit_bias or self.bad_words)
        self.has_penalties = params.repetition_penalty != 1 or bool(
            params.presence_penalty or params.frequency_penalty
        )

    def append(self, token_id: int) -> None:
        """Adds a generated token."""
        self.output_ids.append(token_id)
        self.num_tokens += 1

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """The known tokens at positions [start, end)."""
        if start >= self.num_prompt:
            return tuple(self.output_ids[start - self.num_prompt : end - self.num_prompt])
        return (*self.prompt_ids[start:end], *self.output_ids[: max(0, end - self.num_prompt)])
