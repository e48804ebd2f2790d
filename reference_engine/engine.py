# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The loop: schedule, run, commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pallas_paged import layout
from pallas_paged.checks import require
from reference_engine.batch import make_batch
from reference_engine.config import EngineConfig, ModelConfig, num_pages_for
from reference_engine.model import forward, make_pool
from reference_engine.page_pool import PagePool
from reference_engine.request import FinishReason, Request, SamplingParams
from reference_engine.sampler import greedy
from reference_engine.scheduler import Scheduler, StepPlan
from reference_engine.weights import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """One new token.

    Attributes:
      request_id: whose it is.
      token_id: the token.
      finish_reason: why the request ended with it; None if it goes on.
      logits: f32[vocab_size] that the token was taken from; None unless asked for.
    """

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    logits: np.ndarray | None


class Engine:
    """Serves token-id prompts, greedily, from one paged pool.

    Attributes:
      scheduler: requests and their pages.
      last_plan: what the last step computed; None before the first.

    >>> from reference_engine.weights import random_params
    >>> model = ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=1,
    ...                     num_heads=2, num_kv_heads=1, head_dim=8)
    >>> engine = Engine(random_params(model, seed=0), model, EngineConfig(max_model_len=64))
    >>> request_id = engine.add_request([3, 1, 4], SamplingParams(max_tokens=2))
    >>> {key: len(tokens) for key, tokens in engine.run().items()}
    {0: 2}
    """

    def __init__(
        self,
        params: Params,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        on_finish: Callable[[Request], None] | None = None,
    ):
        """Makes the pool; nothing is compiled before the first step.

        Args:
          params: the model's parameters, see weights.
          model_config: their shape.
          config: see EngineConfig.
          on_finish: called with every request that finished by itself, while its pages are still
            its own (`read_kv` works).
        """
        self.config = config
        self.model_config = model_config
        self.scheduler = Scheduler(config, PagePool(config.num_pages))
        self.last_plan: StepPlan | None = None
        self._params = params
        self._on_finish = on_finish
        self._kv_pages = make_pool(model_config, config.num_pages, config.page_size)
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add_request(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> int:
        """Queues a prompt and returns the request's id.

        Raises:
          ValueError: the prompt is empty, has an id outside the vocabulary, leaves no room for a
            token below max_model_len, or could outgrow the pool. Nothing else is changed.
        """
        params = params or SamplingParams()
        self._check_prompt(prompt_ids, params)
        request = Request(self._next_id, tuple(map(int, prompt_ids)), params)
        self._next_id += 1
        self.scheduler.add(request)
        return request.request_id

    def abort(self, request_id: int) -> bool:
        """Takes a request back and frees its pages; False if no such request is alive."""
        return self.scheduler.abort(request_id) is not None

    def step(self) -> list[Output]:
        """Computes one batch and returns the tokens it yielded, in the batch's order.

        If the model raises, the error passes on, no token is lost, and the next step computes the
        same tokens again (all of them from the start if the pool went down with the step).
        """
        plan = self.scheduler.schedule()
        self.last_plan = plan
        if not plan.segments:
            return []
        try:
            logits, tokens = self._run(plan)
        except BaseException:
            self._recover()
            raise
        new_tokens = {
            segment.request_id: token
            for segment, token in zip(plan.segments, tokens, strict=True) if segment.samples
        }
        finished = self.scheduler.commit(plan, new_tokens)
        reasons = {request.request_id: request.finish_reason for request in finished}
        outputs = [
            Output(
                segment.request_id, new_tokens[segment.request_id],
                reasons.get(segment.request_id), None if logits is None else logits[row],
            )
            for row, segment in enumerate(plan.segments) if segment.samples
        ]
        try:
            if self._on_finish is not None:
                for request in finished:
                    self._on_finish(request)
        finally:
            for request in finished:
                self.scheduler.release(request)
        return outputs

    def run(self) -> dict[int, list[int]]:
        """Steps until no request is left; the tokens yielded meanwhile, by request id."""
        tokens: dict[int, list[int]] = {}
        while self.has_work:
            for output in self.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
        return tokens

    def read_kv(self, request: Request) -> np.ndarray:
        """Keys and values of a live request's computed tokens, [2, L, num_computed, K, H]."""
        config = self.model_config
        table = np.zeros(self.config.max_pages_per_seq, int)  # one shape, so compiled once
        table[: len(request.page_ids)] = request.page_ids
        first_pages = np.arange(config.num_layers)[:, None] * self.config.num_pages
        slots = self._kv_pages[first_pages + table]  # [L, M, page_size, R, C]
        kv = np.stack(layout.split_kv(slots, config.num_kv_heads, config.head_dim))
        kv = kv.reshape(2, config.num_layers, -1, config.num_kv_heads, config.head_dim)
        return kv[:, :, : request.num_computed]

    def _run(self, plan: StepPlan) -> tuple[np.ndarray | None, list[int]]:
        batch = make_batch(plan.segments, self.config)
        logits, kv_pages = forward(
            self._params, self._kv_pages, batch, config=self.model_config,
            kv_write=self.config.kv_write, write_backend=self.config.write_backend,
            attention=self.config.attention,
        )
        tokens = np.asarray(greedy(logits))[: len(plan.segments)].tolist()
        self._kv_pages = kv_pages  # not before the step has come to its end without an error
        return (np.asarray(logits) if self.config.return_logits else None), tokens

    def _recover(self) -> None:
        """After a failed step: the plan was not committed; only a donated pool can be lost."""
        if self._kv_pages.is_deleted():
            self._kv_pages = make_pool(
                self.model_config, self.config.num_pages, self.config.page_size
            )
            self.scheduler.preempt_all()

    def _check_prompt(self, prompt: Sequence[int], params: SamplingParams) -> None:
        op, config = "Engine.add_request", self.config
        require(
            len(prompt) > 0, op, "prompt_ids", got="empty", wanted="at least one token id",
            hint="start the prompt with the model's beginning-of-text token",
        )
        vocab_size = self.model_config.vocab_size
        wrong = [
            f"{token!r} at index {i}" for i, token in enumerate(prompt)
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size
        ]
        require(
            not wrong, op, "prompt_ids", got=", ".join(wrong[:1]),
            wanted=f"whole numbers in [0, {vocab_size})",
            hint="use the tokenizer that the model came with",
        )
        require(
            len(prompt) < config.max_model_len, op, "prompt_ids", got=f"{len(prompt)} tokens long",
            wanted=f"fewer than max_model_len={config.max_model_len}",
            hint="shorten it, or raise max_model_len",
        )
        # The last token is never written: nothing reads it.
        longest = min(len(prompt) + params.max_tokens, config.max_model_len) - 1
        num_pages = num_pages_for(longest, config.page_size)
        require(
            num_pages <= config.num_pages, op, "prompt_ids",
            got=f"{len(prompt)} tokens long with max_tokens={params.max_tokens}: up to"
            f" {num_pages} pages", wanted=f"at most the pool's {config.num_pages} pages",
            hint="lower max_tokens, shorten the prompt, or raise num_pages",
        )
