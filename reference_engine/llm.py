# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Serves a model folder: text or token ids in, text and token ids out, whole or as they come."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pallas_paged.checks import require
from reference_engine import checkpoint, progress
from reference_engine.batch import batch_shapes
from reference_engine.compiles import use_persistent_cache
from reference_engine.config import EngineConfig
from reference_engine.engine import Engine, Output
from reference_engine.request import FinishReason, SamplingParams
from reference_engine.tokenizer import Message, StopStrings, Tokenizer
from reference_engine.weights import load_params, param_shapes

Prompt = str | Sequence[int]
DEFAULT_MODEL_LEN = 1024


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """What was generated for a prompt.

    Attributes:
      index: 0; a prompt has one completion.
      text: without stop strings and special tokens; "" if the model has no tokenizer.
      token_ids: all that were generated, a stop token included.
      logprobs: of each token, see engine.Output; None unless asked for.
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
    """A finished request. `prompt` is None where token ids were given."""

    request_id: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a step added to a request.

    Attributes:
      request_id: for `LLM.abort`.
      prompt_index: which of the prompts of the call it is.
      text: whole characters only, and nothing of a stop string; may be "".
      token_ids: what was generated; not all of their text may be in `text` yet.
      logprobs: of each of them; None unless asked for.
      finish_reason, stop_reason: see CompletionOutput; None while it goes on.
    """

    request_id: int
    prompt_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class LLM:
    """A dense Llama, Qwen2 or Qwen3 in a Hugging Face folder, ready to serve.

    Attributes:
      engine: the loop; its `stats` say what it has done.
      tokenizer: None where the folder has none; prompts are token ids then.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: EngineConfig | None = None,
        *,
        dtype: str = "auto",
        seed: int = 0,
        warm_up: bool = False,
        compilation_cache: str | os.PathLike | None = None,
        use_tqdm: bool = True,
    ):
        """Reads the folder; refuses it, by name of what is wrong, before memory is allocated.

        Args:
          path: config.json, *.safetensors with or without an index, and, where there are, the
            tokenizer's files and generation_config.json.
          config: see EngineConfig; None for its defaults, cut to the model's longest context.
          dtype: of parameters, activations and pool; "auto" for the checkpoint's.
          seed: for requests that sample and have no seed.
          warm_up: compile every shape now, and none later.
          compilation_cache: a folder that keeps what is compiled, for the next process.
          use_tqdm: show progress, if standard error is a terminal.

        Raises:
          OSError: a file is missing.
          ValueError: the model is not served, or the files are corrupt.
        """
        if compilation_cache is not None:
            use_persistent_cache(compilation_cache)
        folder = pathlib.Path(path)
        model = checkpoint.read_model_config(folder, dtype)
        longest = model.max_position
        if config is None:
            config = EngineConfig(max_model_len=min(longest or DEFAULT_MODEL_LEN,
                                                    DEFAULT_MODEL_LEN))
        require(
            longest is None or config.max_model_len <= longest, "LLM", "max_model_len",
            got=f"{config.max_model_len}", wanted=f"at most the model's {longest}",
            hint="lower EngineConfig.max_model_len",
        )
        self._generation = checkpoint.read_generation_config(folder)
        has_tokenizer = (folder / "tokenizer.json").exists()
        self.tokenizer = Tokenizer(folder) if has_tokenizer else None
        self._use_tqdm = use_tqdm
        num_tensors = len(param_shapes(model)["layers"]) * model.num_layers
        with progress.bar(num_tensors, "loading", "tensor", shown=use_tqdm) as bar:
            params = load_params(folder, model, on_tensor=lambda _: bar.update())
        self.engine = Engine(
            params, model, config, eos_token_ids=self._generation["eos_token_id"], seed=seed
        )
        self._streams: dict[int, _Stream] = {}
        if warm_up:
            shapes = batch_shapes(config)
            with progress.bar(len(shapes), "compiling", "shape", shown=use_tqdm) as bar:
                self.engine.warm_up(lambda _: bar.update())

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; greedy without one."""
        given = self._generation
        fields: dict[str, Any] = {}
        if given.get("do_sample"):
            fields = {name: given[name] for name in ("top_k", "top_p", "min_p")
                      if given.get(name) is not None}
            fields["temperature"] = float(given.get("temperature") or 1.0)
        if given.get("max_new_tokens"):
            fields["max_tokens"] = given["max_new_tokens"]
        return SamplingParams(**fields)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts, all together.

        Args:
          prompts: a text, a list of token ids, or a list of such.
          params: for all, or one for each; None for `get_default_sampling_params()`.
          use_tqdm: show progress, if standard error is a terminal.

        Returns:
          One output a prompt, in order.

        Raises:
          ValueError: a prompt cannot be served; it is named, none of the call's is begun, and
            requests that others have begun are left alone.
        """
        jobs = self._jobs(prompts, params)
        ids = self._add(jobs, is_live=False)
        streams = [self._streams[i] for i in ids]
        try:
            with progress.bar(len(ids), "generating", "request",
                              shown=use_tqdm and self._use_tqdm) as bar:
                done = 0
                while any(not stream.is_done for stream in streams):
                    self.step()
                    now = sum(stream.is_done for stream in streams)
                    bar.update(now - done)
                    done = now
                    bar.set_postfix_str(f"{self.engine.stats.num_tokens:,} tokens computed")
            return [_collect(stream) for stream in streams]
        finally:
            self._drop(ids)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Delta]:
        """Completes prompts and yields what each step adds to each of them.

        Args, errors: see `generate`; prompts are checked at the call, begun with the first `next`.
        Several iterators may be open at a time: whichever is asked next computes for all of them.
        Closing one ends its requests.
        """
        return self._iterate(self._jobs(prompts, params))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Completes a conversation; `options` are for the chat template. See `generate`."""
        return self.generate(self.chat_prompt(messages, **options), params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation, as the model was taught to read it.

        Args, errors: see `Tokenizer.apply_chat_template`.
        """
        tokenizer = self._need_tokenizer("chat")
        text = tokenizer.apply_chat_template(messages, **options)
        return tokenizer.encode(text, add_special_tokens=False)  # the template has them

    def abort(self, request_id: int) -> bool:
        """Ends a request; its stream gets a last Delta. False if it is not alive."""
        stream = self._streams.get(request_id)
        if stream is None or self.engine.abort(request_id) is None:
            return False
        stream.end(FinishReason.ABORT, None)
        return True

    def step(self) -> None:
        """Computes one batch for all requests that are alive."""
        for output in self.engine.step():
            stream = self._streams[output.request_id]
            if stream.push(output) and output.finish_reason is None:
                self.engine.abort(output.request_id, FinishReason.STOP)

    def _jobs(self, prompts: Any, params: Any) -> list[_Job]:
        """Every prompt with its parameters, all of them checked."""
        is_one = len(prompts) == 0 or isinstance(prompts, str)
        is_one = is_one or isinstance(prompts[0], int | np.integer)
        many: list[Any] = [prompts] if is_one else list(prompts)
        if params is None:
            params = self.get_default_sampling_params()
        each = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        require(
            len(each) == len(many), "LLM.generate", "params", got=f"{len(each)} SamplingParams",
            wanted=f"one for each of the {len(many)} prompts", hint="or one for all of them",
        )
        jobs = []
        for index, (prompt, param) in enumerate(zip(many, each, strict=True)):
            text = prompt if isinstance(prompt, str) else None
            if param.stop:
                self._need_tokenizer("stop strings")
            ids = self._need_tokenizer("text prompts").encode(text) if text is not None else prompt
            try:
                self.engine.check_request(ids, param)
            except ValueError as error:
                raise ValueError(f"LLM.generate: prompt {index}: {error}") from error
            jobs.append(_Job(index, text, tuple(map(int, ids)), param))
        return jobs

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"LLM: {what} need a tokenizer, and the model's folder has no tokenizer.json;"
                " wanted token ids: encode them yourself, or add the file"
            )
        return self.tokenizer

    def _add(self, jobs: Sequence[_Job], *, is_live: bool) -> list[int]:
        ids = []
        for job in jobs:
            request_id = self.engine.add_request(job.prompt_ids, job.params)
            self._streams[request_id] = _Stream(request_id, job, self.tokenizer, is_live)
            ids.append(request_id)
        return ids

    def _iterate(self, jobs: Sequence[_Job]) -> Iterator[Delta]:
        ids = self._add(jobs, is_live=True)
        streams = [self._streams[i] for i in ids]
        try:
            while True:
                for stream in streams:
                    while stream.deltas:
                        yield stream.deltas.popleft()
                if all(stream.is_done for stream in streams):
                    return
                self.step()
        finally:
            self._drop(ids)

    def _drop(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)  # those that an error or the caller left behind
            del self._streams[request_id]


@dataclasses.dataclass(frozen=True)
class _Job:
    index: int
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams


class _Stream:
    """A request's deltas, and the text that is still to come."""

    def __init__(self, request_id: int, job: _Job, tokenizer: Tokenizer | None, is_live: bool):
        self.request_id = request_id
        self.job = job
        self.deltas: collections.deque[Delta] = collections.deque()
        self.is_done = False
        # Text that nobody reads yet is decoded in one go at the end.
        self._is_live = is_live or bool(job.params.stop)
        self._waiting: list[int] = []  # tokens without their text
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = tokenizer.detokenizer(job.prompt_ids)
        self._stop = StopStrings(job.params.stop)
        self._num_tokens = 0

    def push(self, output: Output) -> bool:
        """Takes a token; whether a stop string ends the request with it."""
        self._num_tokens += 1
        reason = output.finish_reason
        stop_reason: str | int | None = None
        if reason is FinishReason.STOP:
            stop_reason = output.token_id  # its own text is not part of the output
        else:
            self._waiting.append(output.token_id)
        text, stop = self._text(is_last=reason is not None)
        if stop is not None:
            reason, stop_reason = FinishReason.STOP, stop
        self._put(output, text, reason, stop_reason)
        return stop is not None

    def end(self, reason: FinishReason, stop_reason: str | None) -> None:
        """Ends the request from outside."""
        text, stop = self._text(is_last=True)
        self._put(None, text, reason, stop if stop is not None else stop_reason)

    def _text(self, *, is_last: bool) -> tuple[str, str | None]:
        if self._detokenizer is None or not (self._is_live or is_last):
            return "", None
        decode = self._detokenizer.finish if is_last else self._detokenizer.push
        text, self._waiting = decode(self._waiting), []
        if self._num_tokens < self.job.params.min_tokens:
            return text, None
        text, stop = self._stop.push(text)
        return (text + self._stop.finish(), None) if is_last and stop is None else (text, stop)

    def _put(self, output: Output | None, text: str, reason: Any, stop_reason: Any) -> None:
        self.is_done = reason is not None
        token_ids = () if output is None else (output.token_id,)
        logprobs = None if output is None or output.logprobs is None else (output.logprobs,)
        self.deltas.append(Delta(
            self.request_id, self.job.index, text, token_ids, logprobs, reason, stop_reason
        ))


def _collect(stream: _Stream) -> RequestOutput:
    """All deltas of a finished request as one output."""
    deltas = stream.deltas
    reason = deltas[-1].finish_reason
    assert reason is not None
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    completion = CompletionOutput(
        index=0,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprobs) if stream.job.params.logprobs is not None else None,
        finish_reason=reason,
        stop_reason=deltas[-1].stop_reason,
    )
    job = stream.job
    return RequestOutput(stream.request_id, job.prompt, job.prompt_ids, (completion,))
