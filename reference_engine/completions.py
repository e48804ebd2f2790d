# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What LLM returns: completions, and the deltas of which they are made."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from reference_engine.outputs import Output
from reference_engine.request import FinishReason
from reference_engine.sampling_params import SamplingParams
from reference_engine.tokenizer import StopStrings, Tokenizer


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """What was generated for a prompt.

    Attributes:
      index: its number among the prompt's `n` completions.
      text: its text, without stop strings and special tokens unless SamplingParams ask for them; ""
        if the model has no tokenizer.
      token_ids: all generated tokens, including a stop token.
      logprobs: the log probabilities for each token, see engine.Output; None unless asked for.
      finish_reason: why it ended.
      stop_reason: the stop string or the stop id that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its `n` completions, in order.

    Attributes:
      request_id: the request id of the first completion.
      prompt: the prompt's text; None if only token ids were given.
      prompt_token_ids: the prompt's token ids.
      outputs: the completions.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a step added to a request.

    Attributes:
      request_id: the id for `LLM.abort`; each of a prompt's `n` completions has its own.
      prompt_index: the number of the prompt in the call.
      text: new text, which may be "". It has whole characters only, and no part of a stop string
        unless that was asked for.
      token_ids: the new tokens; some of their text may come with a later delta.
      logprobs: the log probabilities for each of them; None unless asked for.
      finish_reason, stop_reason: see CompletionOutput; None while the request goes on.
      index: the number of the completion among those of the prompt.
    """

    request_id: int
    prompt_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """One completion to generate.

    Attributes:
      prompt_index: the number of the prompt in the call.
      index: the number of the completion among those of the prompt.
      prompt: the prompt's text; None if only token ids were given.
      prompt_ids: the prompt's token ids.
      params: the completion's own, with n = 1.
    """

    prompt_index: int
    index: int
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams


class Stream:
    """The deltas of a request, and the text that is still to come.

    Attributes:
      request_id: the engine's number of the request.
      job: what it generates.
      deltas: the deltas that nobody has read yet.
      is_done: whether the last delta has been added.
    """

    def __init__(
        self, request_id: int, job: Job, tokenizer: Tokenizer | None, is_live: bool
    ) -> None:
        """Begins without a delta.

        Args:
          request_id, job: see the attributes.
          tokenizer: makes the text; None for no text.
          is_live: whether deltas are read while they come, so that each needs its text.
        """
        self.request_id = request_id
        self.job = job
        self.deltas: collections.deque[Delta] = collections.deque()
        self.is_done = False
        # Text that nobody reads before the end is decoded at the end, all at once.
        self._is_live = is_live or bool(job.params.stop)
        self._waiting: list[int] = []  # tokens that are not decoded yet
        self._detokenizer = None
        params = job.params
        self._includes_stop = params.include_stop_str_in_output
        if tokenizer is not None:
            self._detokenizer = tokenizer.detokenizer(
                job.prompt_ids, skip_special_tokens=params.skip_special_tokens
            )
        self._stop = StopStrings(params.stop, is_included=self._includes_stop)
        self._num_tokens = 0

    def push(self, output: Output) -> bool:
        """Adds a token; returns whether a stop string ends the request with it."""
        self._num_tokens += 1
        reason = output.finish_reason
        stop_reason: str | int | None = None
        if reason is FinishReason.STOP:
            stop_reason = output.token_id
        if reason is not FinishReason.STOP or self._includes_stop:
            self._waiting.append(output.token_id)
        text, stop = self._text(is_last=reason is not None)
        if stop is not None:
            reason, stop_reason = FinishReason.STOP, stop
        self._add(output, text, reason, stop_reason)
        return stop is not None

    def end(self, reason: FinishReason, stop_reason: str | None) -> None:
        """Ends the request before the engine does."""
        text, stop = self._text(is_last=True)
        self._add(None, text, reason, stop if stop is not None else stop_reason)

    def _text(self, *, is_last: bool) -> tuple[str, str | None]:
        if self._detokenizer is None or not (self._is_live or is_last):
            return "", None
        decode = self._detokenizer.finish if is_last else self._detokenizer.push
        text, self._waiting = decode(self._waiting), []
        # A stop string within the first min_tokens tokens ends nothing. One that begins there may
        # end the request later.
        may_stop = self._num_tokens > self.job.params.min_tokens
        text, stop = self._stop.push(text, may_stop=may_stop)
        return (text + self._stop.finish(), None) if is_last and stop is None else (text, stop)

    def _add(self, output: Output | None, text: str, reason: Any, stop_reason: Any) -> None:
        self.is_done = reason is not None
        token_ids = () if output is None else (output.token_id,)
        logprobs = None if output is None or output.logprobs is None else (output.logprobs,)
        self.deltas.append(
            Delta(
                self.request_id,
                self.job.prompt_index,
                text,
                token_ids,
                logprobs,
                reason,
                stop_reason,
                self.job.index,
            )
        )


def collect(streams: Sequence[Stream]) -> RequestOutput:
    """The completions of a prompt, each made of the deltas of its stream."""
    job = streams[0].job
    completions = tuple(map(_completion, streams))
    return RequestOutput(streams[0].request_id, job.prompt, job.prompt_ids, completions)


def _completion(stream: Stream) -> CompletionOutput:
    deltas = stream.deltas
    reason = deltas[-1].finish_reason
    assert reason is not None
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return CompletionOutput(
        index=stream.job.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprobs) if stream.job.params.logprobs is not None else None,
        finish_reason=reason,
        stop_reason=deltas[-1].stop_reason,
    )
