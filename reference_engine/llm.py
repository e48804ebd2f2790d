# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""LLM serves the folder of a model: texts or token ids in, texts and token ids out."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pallas_paged import dispatch
from pallas_paged.checks import require
from reference_engine import progress, unserved
from reference_engine.batch import batch_shapes
from reference_engine.chat_messages import Message
from reference_engine.compiles import use_default_cache, use_persistent_cache
from reference_engine.completions import Delta, Job, RequestOutput, Stream, collect
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.defaults import default_fields, device_memory, resolve
from reference_engine.engine import Engine
from reference_engine.generation_config import read_generation_config, sampling_params
from reference_engine.hf_config import read_model_config
from reference_engine.outputs import Output
from reference_engine.prompts import (
    conversations,
    each_completion,
    listed,
    split_prompts,
    text_and_ids,
    word_ids,
)
from reference_engine.request import FinishReason
from reference_engine.sampling_params import SamplingParams
from reference_engine.tokenizer import Tokenizer
from reference_engine.unserved import refuse_unserved
from reference_engine.weights import load_params, num_tensors

Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A dense Llama, Qwen2 or Qwen3 of a Hugging Face folder, ready to serve.

    One thread at a time may use it: a call while another thread is in a call is a RuntimeError, as
    with Engine.

    Attributes:
      engine: the engine that computes; its `stats` say what it has done.
      tokenizer: None if the folder has none; prompts are token ids then.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        config: EngineConfig | None = None,
        *,
        dtype: str = "auto",
        seed: int | None = 0,
        warm_up: bool = False,
        compilation_cache: str | os.PathLike | bool | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> None:
        """Reads the folder.

        Args:
          model: a folder with config.json, with model.safetensors or the files that its index
            names, and, if they exist, the tokenizer's files and generation_config.json.
          config: see EngineConfig. None means those of a server, see `defaults.default_fields`: on
            a GPU or TPU 256 requests at a time and 8,192 tokens in a step, a pool of the memory
            that is left, and shapes that are compiled in the background; on a CPU EngineConfig's
            own.
          dtype: the dtype of parameters, activations and pool; "auto" for the checkpoint's.
          seed: at least 0, for requests that sample and have no seed; None for 0.
          warm_up: whether to compile every shape now, and none later.
          compilation_cache: the folder that keeps compiled programs for the next process. True for
            `compiles.default_cache_folder()`, unless jax has been given another; False for none.
            None means True on a GPU or TPU, and False on a CPU, whose programs may not run on
            another machine with the same home.
          use_tqdm: whether to show progress, if standard error is a terminal.
          **options: fields of EngineConfig, which replace those of `config`; None leaves a field as
            it is. vLLM's other arguments are refused by a sentence unless they ask for nothing.

        Raises:
          OSError: a file is missing.
          ValueError: the model is not served, a file is corrupt, or an option is not served. The
            message says what is wrong. No memory has been allocated then.
        """
        names = [field.name for field in dataclasses.fields(EngineConfig) if field.name in options]
        fields = {name: options.pop(name) for name in names}
        if str(options.get("tokenizer")) == str(model):
            options["tokenizer"] = None  # the folder's own
        refuse_unserved("LLM", options, unserved.LLM)
        platform = dispatch.platform()
        if compilation_cache is None:
            compilation_cache = platform != "cpu"
        folder = pathlib.Path(model)
        shape = read_model_config(folder, dtype)
        config = _merge(config, fields, shape, platform)
        if compilation_cache is True:
            use_default_cache()
        elif compilation_cache is not False:
            use_persistent_cache(compilation_cache)
        self._folder = folder
        self._generation = read_generation_config(folder)
        has_tokenizer = (folder / "tokenizer.json").exists()
        self.tokenizer = Tokenizer(folder) if has_tokenizer else None
        self._use_tqdm = use_tqdm
        with progress.bar(num_tensors(shape), "loading", "tensor", shown=use_tqdm) as bar:
            params = load_params(folder, shape, on_tensor=lambda _: bar.update())
        self.engine = Engine(
            params,
            shape,
            config,
            eos_token_ids=self._generation["eos_token_id"],
            seed=0 if seed is None else seed,
        )
        self._streams: dict[int, Stream] = {}
        self._outputs: collections.deque[Output] = collections.deque()  # not yet in their streams
        self._left: collections.deque[int] = collections.deque()  # requests that nobody reads
        if warm_up:
            shapes = batch_shapes(config)
            with progress.bar(len(shapes), "compiling", "shape", shown=use_tqdm) as bar:
                self.engine.warm_up(lambda _: bar.update())

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; greedy if there is no such file.

        Raises:
          ValueError: it asks for something that is not served; the message names file and field.
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
            (then the ids are served), or a list of these.
          sampling_params: for all prompts, or one for each; None for
            `get_default_sampling_params()`.
          use_tqdm: whether to show progress, if standard error is a terminal.
          **options: vLLM's other arguments; refused by a sentence unless they ask for nothing.

        Returns:
          One output per prompt, in order.

        Raises:
          ValueError: a prompt cannot be served; the message names it. No prompt of the call is
            begun then, and the requests of other calls are not changed.
        """
        refuse_unserved("LLM.generate", options, unserved.LLM_CALLS)
        jobs = self._jobs(prompts, sampling_params)
        with self.engine.alone("LLM.generate"):
            return self._generate(jobs, use_tqdm)

    def _generate(self, jobs: Sequence[Job], use_tqdm: bool) -> list[RequestOutput]:
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
            prompts_of: dict[int, list[Stream]] = {}
            for stream in streams:
                prompts_of.setdefault(stream.job.prompt_index, []).append(stream)
            return [collect(completions) for completions in prompts_of.values()]
        finally:
            self._drop(ids)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Delta]:
        """Completes prompts, and yields what each step adds to each of their completions.

        Args and errors: see `generate`. The prompts are checked at the call, and begun with the
        first `next`. Multiple iterators may be open at a time: a `next` of one of them computes for
        all. Closing an iterator ends its requests.
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
        """Completes one conversation or multiple ones. See `generate`.

        Args:
          messages: the messages of a conversation, or a list of conversations.
          sampling_params, use_tqdm: see `generate`.
          **options: options for the chat template, see `Tokenizer.apply_chat_template`.
        """
        refuse_unserved(
            "LLM.chat",
            {name: options.pop(name) for name in unserved.LLM_CALLS if name in options},
            unserved.LLM_CALLS,
        )
        prompts = [self.chat_prompt(each, **options) for each in conversations(messages)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The token ids of a conversation, in the form on which the model was trained.

        Args and errors: see `Tokenizer.apply_chat_template`.
        """
        tokenizer = self._need_tokenizer("chat")
        text = tokenizer.apply_chat_template(messages, **options)
        return tokenizer.encode(text, add_special_tokens=False)  # the template has added them

    def abort(self, request_id: int) -> bool:
        """Ends a request, whose stream gets a last Delta; returns False if it is not alive."""
        with self.engine.alone("LLM.abort"):
            stream = self._streams.get(request_id)
            if stream is None or self.engine.abort(request_id) is None:
                return False
            stream.end(FinishReason.ABORT, None)
            return True

    def step(self) -> None:
        """Computes one batch for all live requests."""
        with self.engine.alone("LLM.step"):
            self._end_left()
            self._outputs.extend(self.engine.step())
            while self._outputs:  # if one stream raises, the others keep their outputs
                output = self._outputs.popleft()
                stream = self._streams.get(output.request_id)
                if stream is None or stream.is_done:
                    continue  # it was dropped or aborted in the meantime
                if stream.push(output) and output.finish_reason is None:
                    self.engine.abort(output.request_id, FinishReason.STOP)

    def _jobs(self, prompts: Any, params: Any) -> list[Job]:
        """One checked job for each completion of every prompt."""
        many = split_prompts(prompts)
        if params is None:
            params = self.get_default_sampling_params()
        each = [params] * len(many) if isinstance(params, SamplingParams) else listed(params)
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
            text, ids = text_and_ids(index, prompt)
            if param.stop:
                self._need_tokenizer("stop strings")
            param = self._with_word_ids(param)
            if ids is None:
                ids = self._need_tokenizer("text prompts").encode(text or "")
            completions = each_completion(param)
            try:
                prompt_ids = self.engine.check_request(ids, completions[0])
            except ValueError as error:
                raise ValueError(f"LLM.generate: prompt {index}: {error}") from error
            jobs += [Job(index, i, text, prompt_ids, one) for i, one in enumerate(completions)]
        return jobs

    def _with_word_ids(self, params: SamplingParams) -> SamplingParams:
        """The same params, with the words that must not be generated as token ids."""
        if not any(isinstance(word, str) for word in params.bad_words):
            return params
        tokenizer, found = self._need_tokenizer("bad_words"), []
        for word in params.bad_words:
            found += word_ids(tokenizer, word) if isinstance(word, str) else [word]
        return dataclasses.replace(params, bad_words=tuple(dict.fromkeys(found)))

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"LLM: {what} need a tokenizer, and the model's folder has no tokenizer.json;"
                " wanted token ids: encode them yourself, or add the file"
            )
        return self.tokenizer

    def _add(self, jobs: Sequence[Job], *, is_live: bool) -> list[int]:
        ids: list[int] = []
        try:
            for job in jobs:
                request_id = self.engine.add_checked(job.prompt_ids, job.params)
                ids.append(request_id)
                self._streams[request_id] = Stream(request_id, job, self.tokenizer, is_live)
        except BaseException:
            self._drop(ids)
            raise
        return ids

    def _iterate(self, jobs: Sequence[Job]) -> Iterator[Delta]:
        ids = self._add(jobs, is_live=True)
        streams = [self._streams[i] for i in ids]
        try:
            while True:
                for stream in streams:
                    while stream.deltas:
                        yield stream.deltas.popleft()
                if any(stream.deltas for stream in streams):
                    continue  # other iterators stepped while the caller had the last deltas
                if all(stream.is_done for stream in streams):
                    return
                self.step()
        finally:
            self._drop(ids)

    def _drop(self, request_ids: Sequence[int]) -> None:
        """Ends requests that nobody reads any more.

        An iterator that nobody holds is closed by whichever thread collects the garbage. If that is
        not the thread that uses the engine, the next step ends the requests.
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


def _merge(
    config: EngineConfig | None, fields: Mapping[str, Any], model: ModelConfig, platform: str
) -> EngineConfig:
    """The config with the fields that are not None, and with a number of pages.

    Its max_model_len is one that the model can reach.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if config is None:
        config = EngineConfig(**default_fields(model, platform) | given)
    elif given:
        config = dataclasses.replace(config, **given)
    require(
        model.max_position is None or config.max_model_len <= model.max_position,
        "LLM",
        "max_model_len",
        got=f"{config.max_model_len}",
        wanted=f"at most the model's {model.max_position}",
        hint="lower EngineConfig.max_model_len: config.json's max_position_embeddings and RoPE"
        " scaling reach no further",
    )
    memory = None if platform == "cpu" or config.num_pages is not None else device_memory()
    return resolve(config, model, platform, memory)
