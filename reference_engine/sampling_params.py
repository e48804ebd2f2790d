# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""SamplingParams: how the tokens of a request are chosen, checked where they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import InitVar
from typing import Any

import numpy as np

from pallas_paged.checks import require
from pallas_paged.scalars import read_int
from reference_engine.unserved import SAMPLING_PARAMS, refuse_unserved

MAX_STOP_IDS = 32  # of one request with min_tokens; the sampler has arrays of this size
MAX_BIASED_IDS = 1024  # of one request, by logit_bias and bad_words; a static size as well
MAX_LOGPROBS = 20
MAX_N = 16384  # as vLLM's
_MAX_FLOAT = float(np.finfo(np.float32).max)  # what the device computes with


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen. Names and meanings are vLLM's, but greedy by default.

    The model's logits are changed first, in this order: `logit_bias` is added; `bad_words`, and
    stop ids that must not come yet, become impossible; the three penalties are applied. Then the
    token is the one with the largest logit, or it is drawn from softmax(logits / temperature). For
    the draw, only the `top_k` likeliest ids are kept; of these, the ids with at least `min_p` times
    the probability of the likeliest one; of these, the smallest set of the likeliest ids whose
    probability reaches `top_p`. Likelier is the larger logit, and the lower id among equal ones.
    All of it is computed in float32, on the device; `kept_ids.cut_top_p` says how probabilities are
    added up. A row with a NaN takes the first of them.

    Whole and real numbers may be Python's, numpy's or jax's. None is accepted as empty for `stop`,
    `stop_token_ids`, `logit_bias` and `bad_words`. vLLM's other names are refused by a sentence
    unless they ask for nothing.

    Attributes:
      max_tokens: the most tokens to generate, at least 1; None for as many as max_model_len allows.
      min_tokens: the first `min_tokens` tokens have no stop id among them, and a stop string that
        ends in them does not end the request. A stop string that begins in them and ends after them
        does.
      temperature: 0 takes the largest logit, and the lowest id among equal ones.
      top_k: 0 or -1 for all ids.
      top_p: in (0, 1].
      min_p: in [0, 1].
      seed: a signed number of 64 bits that fixes the request's tokens, whatever else is in the
        batch. None makes one from the engine's seed and the request's number.
      stop: strings; the text ends before the first of them that is generated.
      stop_token_ids: ids after which generation ends.
      ignore_eos: whether generation goes on after the model's own end-of-text ids.
      logprobs: how many of the likeliest ids to report with each token, at most MAX_LOGPROBS. 0
        reports only the token itself, None nothing. They are of the logits before any change.
      n: the number of outputs of each prompt. Output i has the seed `seed + i`, so the first output
        is the one that n = 1 gives.
      repetition_penalty: above 0. For ids that are in the prompt or the output, positive logits are
        divided by it, and negative ones multiplied. 1 for none.
      presence_penalty: in [-2, 2]; subtracted from the logits of ids that are in the output.
      frequency_penalty: in [-2, 2]; subtracted once for each time that an id is in the output.
      logit_bias: id -> a number that is added to its logit; kept as pairs.
      bad_words: strings that are not generated, neither at the start of a text nor after a space;
        or sequences of token ids, of which the last id is not generated after the others. With
        logit_bias, at most MAX_BIASED_IDS.
      skip_special_tokens: whether special tokens are left out of the text.
      include_stop_str_in_output: whether the text has the stop string, or the text of the stop
        token, that ended it.

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
    # In the order of SAMPLING_PARAMS.
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
        refuse_unserved(
            "SamplingParams", dict(zip(SAMPLING_PARAMS, unserved, strict=True)), SAMPLING_PARAMS
        )
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
        value = read_int(given)
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
        value = _as_float(given)
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
            hint="numbers and strings are not accepted",
        )
        self._set(name, bool(value))

    def _check_sequences(self) -> None:
        stop, words = _as_tuple(self.stop), _as_tuple(self.bad_words)
        ids = _as_tuple(self.stop_token_ids)
        kept_stop = [text for text in stop or () if isinstance(text, str) and text]
        kept_ids = [token for token in map(read_int, ids or ()) if token is not None]
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
        """Refuses ids outside the vocabulary, and words that are not given as ids.

        Raises:
          ValueError: the message begins with `op`.
        """
        words = [word for word in self.bad_words if isinstance(word, str)]
        require(
            not words,
            op,
            "bad_words",
            got=f"{words!r}",
            wanted="token ids in a row",
            hint="LLM looks up the ids of words; an Engine has no tokenizer",
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


def _as_tuple(values: Any) -> tuple[Any, ...] | None:
    """The items of a sequence; none for None, the string for a string; None for anything else."""
    if values is None:
        return ()
    if isinstance(values, str):
        return (values,)
    if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
        return None
    return tuple(values) if getattr(values, "ndim", 1) else None


def _bias_pairs(given: Any) -> tuple[tuple[int, float], ...] | None:
    """logit_bias as pairs; None if it is wrong."""
    pairs = tuple(given.items()) if isinstance(given, Mapping) else _as_tuple(given)
    if pairs is None or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return None
    bias = [(read_int(token), _as_float(value)) for token, value in pairs]
    kept = [
        (token, value)
        for token, value in bias
        if token is not None and value is not None and abs(value) <= _MAX_FLOAT
    ]
    return tuple(kept) if len(kept) == len(pairs) else None


def _bad_word(given: Any) -> str | tuple[int, ...] | None:
    """A string, or a tuple of ids, from an entry of bad_words; None if it is wrong."""
    if isinstance(given, str):
        return given or None
    ids = tuple(token for token in map(read_int, _as_tuple(given) or ()) if token is not None)
    return ids if ids and len(ids) == len(given) else None


def _as_float(value: Any) -> float | None:
    """The float of a real number of Python, numpy or jax; None for anything else, and for bools.

    >>> _as_float(np.float32(0.5)), _as_float(2), _as_float(True), _as_float("0.5")
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
