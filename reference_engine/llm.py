# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Serves a model folder: text or token ids in, text and token ids out, whole or as they come."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_paged.checks import require
from reference_engine import checkpoint, progress
from reference_engine.batch import batch_shapes
from reference_engine.chat_template import is_object
from reference_engine.compiles import use_persistent_cache
from reference_engine.config import EngineConfig
from reference_engine.engine import Engine, Output
from reference_engine.generation_config import sampling_params
from reference_engine.request import FinishReason, SamplingParams, as_int, refuse_unserved
from reference_engine.tokenizer import Message, StopStrings, Tokenizer
from reference_engine.weights import load_params, param_shapes

Prompt = str | Sequence[int] | Mapping[str, Any]
DEFAULT_MODEL_LEN = 1024

# What vLLM's LLM takes beside EngineConfig's fields: see request.refuse_unserved.
_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "tokenizer": ((None,), "the folder's own is used; give token ids made by another"),
    "tokenizer_mode": ((None, "auto"), "tokenizer.json is read"),
    "skip_tokenizer_init": ((None, False), "take tokenizer.json out of the folder"),
    "trust_remote_code": ((None, False), "no code of a model's folder is ever run; leave it out"),
    "tensor_parallel_size": ((None, 1), "one device serves a model"),
    "pipeline_parallel_size": ((None, 1), "one device serves a model"),
    "data_parallel_size": ((None, 1), "one device serves a model"),
    "quantization": ((None,), "quantised weights are left out on purpose"),
    "kv_cache_dtype": ((None, "auto"), "the pool has the parameters' dtype; give dtype"),
    "load_format": ((None, "auto", "safetensors"), "a folder has safetensors"),
    "config_format": ((None, "auto", "hf"), "a folder has config.json"),
    "hf_config_path": ((None,), "the folder's config.json is read"),
    "hf_token": ((None, False), "download the model, and give its folder"),
    "model_impl": ((None, "auto"), "this engine's own model is run"),
    "runner": ((None, "auto", "generate"), "a model generates"),
    "task": ((None, "auto", "generate"), "a model generates"),
    "convert": ((None, "auto", "none"), "a model generates"),
    "device": ((None, "auto"), "jax chooses it: set JAX_PLATFORMS or jax_default_device"),
    "distributed_executor_backend": ((None,), "one device serves a model"),
    "disable_custom_all_reduce": ((None, False, True), "one device serves a model"),
    "served_model_name": ((None,), "outputs do not name the model"),
    "max_logprobs": ((None, 20), "it is 20"),
    "logits_processors": ((None, [], ()), "give SamplingParams logit_bias or bad_words"),
    "override_generation_config": ((None, {}), "give SamplingParams with each call"),
    "compilation_config": ((None, {}), "every step is a compiled program; leave it out"),
    "enable_sleep_mode": ((None, False), "delete the LLM to free its memory"),
    "revision": ((None,), "download the revision, and give its folder"),
    "tokenizer_revision": ((None,), "download the revision, and give its folder"),
    "download_dir": ((None,), "download the model, and give its folder"),
    "hf_overrides": ((None, {}), "change the folder's config.json"),
    "generation_config": ((None, "auto"), "give SamplingParams with each call"),
    "gpu_memory_utilization": ((None,), "give num_pages, the pages of the pool"),
    "kv_cache_memory_bytes": ((None,), "give num_pages, the pages of the pool"),
    "num_gpu_blocks_override": ((None,), "it is num_pages here"),
    "block_size": ((None,), "it is page_size here"),
    "swap_space": ((None, 0), "what loses its pages is computed again"),
    "cpu_offload_gb": ((None, 0), "parameters and pool are on the device"),
    "enforce_eager": ((None, False), "every step is a compiled program; leave it out"),
    "enable_chunked_prefill": ((None, True), "prefills are always chunked"),
    "enable_lora": ((None, False), "LoRA is left out on purpose"),
    "limit_mm_per_prompt": ((None, {}), "multimodal prompts are left out on purpose"),
    "speculative_config": ((None,), "drafts are not served"),
    "disable_log_stats": ((None, True), "read engine.stats"),
}
# And its generate and chat.
_CALL_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora_request": ((None,), "LoRA is left out on purpose"),
    "guided_options_request": ((None,), "guided decoding is left out on purpose"),
    "priority": ((None,), "requests are served as they come"),
    "prompt_token_ids": ((None,), "give them as prompts"),
    "tokenization_kwargs": ((None, {}), "encode the text yourself, and give token ids"),
    "mm_processor_kwargs": ((None, {}), "multimodal prompts are left out on purpose"),
}


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """What was generated for a prompt.

    Attributes:
      index: which of the prompt's `n` completions it is.
      text: without stop strings and special tokens unless SamplingParams ask for them; "" if the
        model has no tokenizer.
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
    """A prompt and its `n` completions, in order.

    Attributes:
      request_id: the first completion's number.
      prompt: its text; None where token ids alone were given.
      prompt_token_ids: its token ids.
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
      request_id: for `LLM.abort`; each of a prompt's `n` completions has one.
      prompt_index: which of the prompts of the call it is.
      text: whole characters only, and nothing of a stop string unless it was asked for; may be "".
      token_ids: what was generated; not all of their text may be in `text` yet.
      logprobs: of each of them; None unless asked for.
      finish_reason, stop_reason: see CompletionOutput; None while it goes on.
      index: which of the prompt's completions it is.
    """

    request_id: int
    prompt_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    index: int = 0


class LLM:
    """A dense Llama, Qwen2 or Qwen3 in a Hugging Face folder, ready to serve.

    One thread at a time, see Engine: a call while another thread is inside one is a RuntimeError.

    Attributes:
      engine: the loop; its `stats` say what it has done.
      tokenizer: None where the folder has none; prompts are token ids then.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        config: EngineConfig | None = None,
        *,
        dtype: str = "auto",
        seed: int | None = 0,
        warm_up: bool = False,
        compilation_cache: str | os.PathLike | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ):
        """Reads the folder; refuses it, by name of what is wrong, before memory is allocated.

        Args:
          model: a folder with config.json, model.safetensors or the files that its index names,
            and, where there are, the tokenizer's files and generation_config.json.
          config: see EngineConfig; None for its defaults, cut to the model's longest context.
          dtype: of parameters, activations and pool; "auto" for the checkpoint's.
          seed: at least 0, for requests that sample and have no seed; None for 0.
          warm_up: compile every shape now, and none later.
          compilation_cache: a folder that keeps what is compiled, for the next process.
          use_tqdm: show progress, if standard error is a terminal.
          **options: fields of EngineConfig, in place of `config`'s; None leaves one as it is.
            vLLM's other arguments are known, and refused by a sentence unless they ask for nothing.

        Raises:
          OSError: a file is missing.
          ValueError: the model is not served, the files are corrupt, or an option is not served.
        """
        fields = {
            name: options.pop(name) for name in EngineConfig.__dataclass_fields__ if name in options
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        if str(options.get("tokenizer")) == str(model):
            options["tokenizer"] = None  # the folder's own
        refuse_unserved("LLM", options, _OPTIONS)
        if compilation_cache is not None:
            use_persistent_cache(compilation_cache)
        folder = pathlib.Path(model)
        shape = checkpoint.read_model_config(folder, dtype)
        longest = shape.max_position
        if config is None:
            fields.setdefault("max_model_len", min(longest or DEFAULT_MODEL_LEN, DEFAULT_MODEL_LEN))
            config = EngineConfig(**fields)
        elif fields:
            config = dataclasses.replace(config, **fields)
        require(
            longest is None or config.max_model_len <= longest,
            "LLM",
            "max_model_len",
            got=f"{config.max_model_len}",
            wanted=f"at most the model's {longest}",
            hint="lower EngineConfig.max_model_len: config.json's max_position_embeddings and RoPE"
            " scaling reach no further",
        )
        self._folder = folder
        self._generation = checkpoint.read_generation_config(folder)
        has_tokenizer = (folder / "tokenizer.json").exists()
        self.tokenizer = Tokenizer(folder) if has_tokenizer else None
        self._use_tqdm = use_tqdm
        num_tensors = len(param_shapes(shape)["layers"]) * shape.num_layers
        with progress.bar(num_tensors, "loading", "tensor", shown=use_tqdm) as bar:
            params = load_params(folder, shape, on_tensor=lambda _: bar.update())
        self.engine = Engine(
            params,
            shape,
            config,
            eos_token_ids=self._generation["eos_token_id"],
            seed=0 if seed is None else seed,
        )
        self._streams: dict[int, _Stream] = {}
        self._outputs: collections.deque[Output] = collections.deque()  # not in their streams yet
        self._left: collections.deque[int] = collections.deque()  # requests that nobody reads now
        if warm_up:
            shapes = batch_shapes(config)
            with progress.bar(len(shapes), "compiling", "shape", shown=use_tqdm) as bar:
                self.engine.warm_up(lambda _: bar.update())

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; greedy without one.

        Raises:
          ValueError: it asks for what is not served; the message names the file and the field.
        """
        return sampling_params(self._folder, self._generation)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Completes prompts, all together.

        Args:
          prompts: a text, a list of token ids, a dict with `prompt`, `prompt_token_ids` or both
            (the ids are served), or a list of such.
          sampling_params: for all, or one for each; None for `get_default_sampling_params()`.
          use_tqdm: show progress, if standard error is a terminal.
          **options: vLLM's other arguments; refused by a sentence unless they ask for nothing.

        Returns:
          One output a prompt, in order.

        Raises:
          ValueError: a prompt cannot be served; it is named, none of the call's is begun, and
            requests that others have begun are left alone.
        """
        refuse_unserved("LLM.generate", options, _CALL_OPTIONS)
        jobs = self._jobs(prompts, sampling_params)
        with self.engine.alone("LLM.generate"):
            return self._generate(jobs, use_tqdm)

    def _generate(self, jobs: Sequence[_Job], use_tqdm: bool) -> list[RequestOutput]:
        ids = self._add(jobs, is_live=False)
        streams = [self._streams[i] for i in ids]
        try:
            with progress.bar(
                len(ids), "generating", "request", shown=use_tqdm and self._use_tqdm
            ) as bar:
                done = 0
                while any(not stream.is_done for stream in streams):
                    self.step()
                    now = sum(stream.is_done for stream in streams)
                    bar.update(now - done)
                    done = now
                    bar.set_postfix_str(f"{self.engine.stats.num_tokens:,} tokens computed")
            prompts_of: dict[int, list[_Stream]] = {}
            for stream in streams:
                prompts_of.setdefault(stream.job.prompt_index, []).append(stream)
            return [_collect(completions) for completions in prompts_of.values()]
        finally:
            self._drop(ids)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Delta]:
        """Completes prompts and yields what each step adds to each of their completions.

        Args, errors: see `generate`; prompts are checked at the call, begun with the first `next`.
        Several iterators may be open at a time: whichever is asked next computes for all of them.
        Closing one ends its requests.
        """
        return self._iterate(self._jobs(prompts, sampling_params))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Completes a conversation, or each of several. See `generate`.

        Args:
          messages: of a conversation, or a list of conversations.
          sampling_params, use_tqdm: see `generate`.
          **options: for the chat template, see `Tokenizer.apply_chat_template`.
        """
        refuse_unserved(
            "LLM.chat",
            {name: options.pop(name) for name in _CALL_OPTIONS if name in options},
            _CALL_OPTIONS,
        )
        prompts = [self.chat_prompt(each, **options) for each in _conversations(messages)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation, as the model was taught to read it.

        Args, errors: see `Tokenizer.apply_chat_template`.
        """
        tokenizer = self._need_tokenizer("chat")
        text = tokenizer.apply_chat_template(messages, **options)
        return tokenizer.encode(text, add_special_tokens=False)  # the template has them

    def abort(self, request_id: int) -> bool:
        """Ends a request; its stream gets a last Delta. False if it is not alive."""
        with self.engine.alone("LLM.abort"):
            stream = self._streams.get(request_id)
            if stream is None or self.engine.abort(request_id) is None:
                return False
            stream.end(FinishReason.ABORT, None)
            return True

    def step(self) -> None:
        """Computes one batch for all requests that are alive."""
        with self.engine.alone("LLM.step"):
            self._end_left()
            self._outputs.extend(self.engine.step())
            while self._outputs:  # an error in one stream leaves the others theirs
                output = self._outputs.popleft()
                stream = self._streams.get(output.request_id)
                if stream is None or stream.is_done:
                    continue  # dropped or aborted in the meantime
                if stream.push(output) and output.finish_reason is None:
                    self.engine.abort(output.request_id, FinishReason.STOP)

    def _jobs(self, prompts: Any, params: Any) -> list[_Job]:
        """A job for each completion of every prompt, all of them checked."""
        many = _prompts(prompts)
        if params is None:
            params = self.get_default_sampling_params()
        each = [params] * len(many) if isinstance(params, SamplingParams) else _listed(params)
        wrong = (
            [params]
            if each is None
            else [one for one in each if not isinstance(one, SamplingParams)]
        )
        require(
            not wrong,
            "LLM.generate",
            "sampling_params",
            got=", ".join(map(repr, wrong[:1])),
            wanted="SamplingParams",
            hint="or a list of them, one for each prompt",
        )
        assert each is not None
        require(
            len(each) == len(many),
            "LLM.generate",
            "sampling_params",
            got=f"{len(each)} SamplingParams",
            wanted=f"one for each of the {len(many)} prompts",
            hint="or one for all of them",
        )
        jobs = []
        for index, (prompt, param) in enumerate(zip(many, each, strict=True)):
            text, ids = _text_and_ids(index, prompt)
            if param.stop:
                self._need_tokenizer("stop strings")
            param = self._with_word_ids(param)
            if ids is None:
                ids = self._need_tokenizer("text prompts").encode(text or "")
            completions = _each_completion(param)
            try:
                prompt_ids = self.engine.check_request(ids, completions[0])
            except ValueError as error:
                raise ValueError(f"LLM.generate: prompt {index}: {error}") from error
            jobs += [_Job(index, i, text, prompt_ids, one) for i, one in enumerate(completions)]
        return jobs

    def _with_word_ids(self, params: SamplingParams) -> SamplingParams:
        """The same, words that must not be generated given as their tokens."""
        if not any(isinstance(word, str) for word in params.bad_words):
            return params
        tokenizer, found = self._need_tokenizer("bad_words"), []
        for word in params.bad_words:
            found += _word_ids(tokenizer, word) if isinstance(word, str) else [word]
        return dataclasses.replace(params, bad_words=tuple(dict.fromkeys(found)))

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"LLM: {what} need a tokenizer, and the model's folder has no tokenizer.json;"
                " wanted token ids: encode them yourself, or add the file"
            )
        return self.tokenizer

    def _add(self, jobs: Sequence[_Job], *, is_live: bool) -> list[int]:
        ids: list[int] = []
        try:
            for job in jobs:
                request_id = self.engine.add_checked(job.prompt_ids, job.params)
                ids.append(request_id)
                self._streams[request_id] = _Stream(request_id, job, self.tokenizer, is_live)
        except BaseException:
            self._drop(ids)
            raise
        return ids

    def _iterate(self, jobs: Sequence[_Job]) -> Iterator[Delta]:
        ids = self._add(jobs, is_live=True)
        streams = [self._streams[i] for i in ids]
        try:
            while True:
                for stream in streams:
                    while stream.deltas:
                        yield stream.deltas.popleft()
                if any(stream.deltas for stream in streams):
                    continue  # steps of others, while the caller had one of the last streams'
                if all(stream.is_done for stream in streams):
                    return
                self.step()
        finally:
            self._drop(ids)

    def _drop(self, request_ids: Sequence[int]) -> None:
        """Ends what an error or the caller left behind.

        An iterator that nobody holds any more is closed by whichever thread collects the garbage:
        where that is not the one that uses the engine, the next step ends its requests.
        """
        self._left.extend(request_ids)
        if self.engine.alone.is_mine():
            self._end_left()

    def _end_left(self) -> None:
        while self._left:
            request_id = self._left.popleft()
            try:
                self.engine.abort(request_id)
                self._streams.pop(request_id, None)
            except BaseException:
                self._left.appendleft(request_id)
                raise


def _listed(values: Any) -> list[Any] | None:
    """What a sequence holds; None for what is none."""
    is_text = isinstance(values, str | bytes | bytearray | Mapping | set | frozenset)
    if is_text or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return None
    return list(values)


def _prompts(given: Any) -> list[Any]:
    """The prompts of a call: one alone, or a sequence of them."""
    if isinstance(given, str | Mapping):
        return [given]
    many = _listed(given)
    require(
        many is not None,
        "LLM.generate",
        "prompts",
        got=f"{given!r}",
        wanted="a text, token ids, a dict, or a list of such",
        hint="see LLM.generate",
    )
    assert many is not None
    is_one = not many or as_int(many[0]) is not None or isinstance(many[0], bool | np.bool_)
    return [many] if is_one else many


def _text_and_ids(index: int, prompt: Any) -> tuple[str | None, list[Any] | None]:
    """A prompt's text and its token ids, where they are given; one of them is."""
    given = prompt if isinstance(prompt, Mapping) else {}
    known = ("prompt", "prompt_token_ids")
    others = [name for name in given if name not in known and given[name] is not None]
    require(
        not others,
        "LLM.generate",
        f"prompts[{index}]",
        got=f"a dict with {others}",
        wanted=f"no other keys than {' and '.join(known)}",
        hint="multimodal prompts, embeddings and cache salts are not served",
    )
    if isinstance(prompt, Mapping):
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
    else:
        text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    found = None if ids is None else _listed(ids)
    is_right = (text is None or isinstance(text, str)) and (ids is None) == (found is None)
    require(
        is_right and not (text is None and ids is None),
        "LLM.generate",
        f"prompts[{index}]",
        got=f"{prompt!r}",
        wanted="a text, token ids, or a dict with `prompt`, a text, or `prompt_token_ids`, a list",
        hint="see LLM.generate",
    )
    return text, found


def _conversations(messages: Any) -> list[Any]:
    """The conversations of a call: one, a list of messages, or a list of such."""
    many = _listed(messages)
    require(
        many is not None,
        "LLM.chat",
        "messages",
        got=f"{messages!r}",
        wanted="a list of messages, which are dicts, or a list of such lists",
        hint='as [{"role": "user", "content": "..."}]',
    )
    assert many is not None
    if not many or is_object(many[0]):
        many = [many]
    for i, each in enumerate(many):
        found = _listed(each)
        require(
            found is not None and all(map(is_object, found)),
            "LLM.chat",
            f"messages[{i}]",
            got=f"{each!r}",
            wanted="a list of messages, which are dicts",
            hint='as [{"role": "user", "content": "..."}]',
        )
    return many


def _word_ids(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    """The tokens of a word at the start of a text, and of it behind a space."""
    bare = word.lstrip() or word
    found = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, " " + bare)]
    require(
        all(found),
        "LLM.generate",
        "bad_words",
        got=f"{word!r}, which has no tokens",
        wanted="words that the tokenizer knows",
        hint="leave it out",
    )
    return found


def _each_completion(params: SamplingParams) -> list[SamplingParams]:
    """Of each of the `n` completions; the first has the seed that was given."""
    if params.n == 1:
        return [params]
    seeds: list[int | None] = [None] * params.n
    if params.seed is not None:  # the sums wrap around as 64 bits do
        seeds = [(params.seed + i + 2**63) % 2**64 - 2**63 for i in range(params.n)]
    return [dataclasses.replace(params, n=1, seed=seed) for seed in seeds]


@dataclasses.dataclass(frozen=True)
class _Job:
    prompt_index: int
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
        params = job.params
        self._includes_stop = params.include_stop_str_in_output
        if tokenizer is not None:
            self._detokenizer = tokenizer.detokenizer(
                job.prompt_ids, skip_special_tokens=params.skip_special_tokens
            )
        self._stop = StopStrings(params.stop, is_included=self._includes_stop)
        self._num_tokens = 0

    def push(self, output: Output) -> bool:
        """Takes a token; whether a stop string ends the request with it."""
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
        # Text before min_tokens ends nothing, and is looked at for what it may be the front of.
        may_stop = self._num_tokens > self.job.params.min_tokens
        text, stop = self._stop.push(text, may_stop=may_stop)
        return (text + self._stop.finish(), None) if is_last and stop is None else (text, stop)

    def _put(self, output: Output | None, text: str, reason: Any, stop_reason: Any) -> None:
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


def _collect(streams: Sequence[_Stream]) -> RequestOutput:
    """A prompt's completions, each the sum of its deltas."""
    job = streams[0].job
    completions = tuple(map(_completion, streams))
    return RequestOutput(streams[0].request_id, job.prompt, job.prompt_ids, completions)


def _completion(stream: _Stream) -> CompletionOutput:
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
