# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The engine: the loop that schedules, runs and commits steps."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pallas_paged import layout
from pallas_paged.checks import require
from pallas_paged.scalars import read_int
from reference_engine import compiles
from reference_engine.batch import Batch, BatchShape, make_batch_of, pack
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.model import make_pool, run_step
from reference_engine.one_thread import OneThread
from reference_engine.outputs import Extra, Output, make_outputs, read_extras
from reference_engine.page_pool import PagePool
from reference_engine.programs import Programs, lowering
from reference_engine.request import FinishReason, Request, check_request
from reference_engine.sampler import next_tokens
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler, StepPlan
from reference_engine.weights import Params


@dataclasses.dataclass
class Stats:
    """Counts over the life of an engine.

    Attributes:
      num_steps: the steps that computed something.
      num_tokens: the tokens computed, including those that were computed again.
      num_padding: the rows of the batches that held no token.
      num_cached: the tokens that were found in the prefix cache.
      num_deferrals: how often alignment made a request wait for a step.
      num_preemptions: how often a request lost its pages.
      seconds: the time spent in steps.
      device_seconds: the part of it from the dispatch of a step's program to its tokens. In the
        other part, the device waits for the host.
      num_recompiles: the programs that XLA compiled in steps after `warm_up`; it should be 0.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_padding: int = 0
    num_cached: int = 0
    num_deferrals: int = 0
    num_preemptions: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    num_recompiles: int = 0


class Engine:
    """Serves prompts of token ids from one paged pool.

    One thread at a time may use it: a call while another thread is in a call is a RuntimeError, and
    changes nothing. Threads may use it one after another. Callbacks may call everything but `step`
    and `run`.

    Attributes:
      config: the limits and choices of the engine.
      model_config: the shape of the model.
      scheduler: the requests and their pages.
      last_plan: the plan of the last step; None before the first step.
      stats: see Stats.
      alone: keeps other threads out.

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
        eos_token_ids: Sequence[int] = (),
        seed: int = 0,
        on_finish: Callable[[Request], None] | None = None,
    ) -> None:
        """Makes the pool. Nothing is compiled before the first step, or only in the background.

        Args:
          params: the model's parameters, see weights.
          model_config: their shape.
          config: see EngineConfig.
          eos_token_ids: the ids that end a request unless it ignores them.
          seed: at least 0; requests without a seed of their own get theirs from it.
          on_finish: called with every request that has finished and was not aborted, while it still
            holds its pages, so that `read_kv` works. An error in it is raised by `step`, after all
            calls have been made.
        """
        _check_numbers(seed, eos_token_ids)
        self.config = config
        self.model_config = model_config
        self.scheduler = Scheduler(config, PagePool(config.pool_pages))
        self.last_plan: StepPlan | None = None
        self.stats = Stats()
        self._params = params
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = int(seed)
        self._compiles_after_warm_up: int | None = None
        self._on_finish = on_finish
        self.alone = OneThread()
        self._stepping = threading.Lock()  # held during a step
        self._is_computing = False  # whether a step has not committed its plan yet
        self._aborts: dict[int, FinishReason] = {}  # requests that are to be ended
        self._outputs: list[Output] = []  # not returned yet
        self._finished: list[Request] = []  # not released yet
        self._kv_pages = make_pool(model_config, config.pool_pages, config.page_size)
        self._programs = Programs(config, lowering(params, self._kv_pages, model_config, config))
        weakref.finalize(self, self._programs.stop)
        if config.compile_in_background:
            self._programs.start()
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add_request(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queues a prompt and returns the request's id.

        Args:
          prompt_ids: the prompt's token ids, as ints of Python, numpy or jax.
          params: how tokens are chosen; None for greedy ones.

        Raises:
          ValueError: the prompt is empty, has an id outside the vocabulary, leaves no room for a
            token below max_model_len, or could outgrow the pool. Nothing is changed then.
        """
        params = params or SamplingParams()
        return self.add_checked(self.check_request(prompt_ids, params), params)

    def check_request(self, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt's ids as Python's ints, if `add_request` would take them with these params.

        Raises:
          ValueError: see `add_request`.
        """
        return check_request(
            prompt_ids,
            params,
            config=self.config,
            vocab_size=self.model_config.vocab_size,
            eos_ids=self._eos_token_ids,
        )

    def add_checked(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> int:
        """Queues what `check_request` has returned for these params, without a second check."""
        with self.alone("Engine.add_request"):
            request_id = self._next_id
            seed = params.seed
            if seed is None and params.temperature > 0:
                source = np.random.SeedSequence([self._seed, request_id])
                seed = int(source.generate_state(1, np.uint64).view(np.int64)[0])
            stop_ids = frozenset() if params.ignore_eos else self._eos_token_ids
            request = Request(request_id, prompt_ids, params, stop_ids=stop_ids, seed=seed or 0)
            self._next_id += 1
            self.scheduler.add(request)
            return request_id

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """Ends a request and frees its pages; returns it, or None if no such request is alive.

        No further output of it is returned. It may be called at any time, also by callbacks,
        finalizers and signal handlers. A step that is being computed ends the request when it
        commits. A request that has finished is not alive, even while `on_finish` is called with it.
        """
        with self.alone("Engine.abort"):
            request = self.scheduler.get(request_id)
            if request is None or request.finish_reason or request_id in self._aborts:
                return None
            self._aborts[request_id] = reason
            if not (self._stepping.locked() and self._is_computing):
                self._take_aborts()
            return request

    def _take_aborts(self) -> None:
        """Ends the requests that were aborted."""
        try:
            while self._aborts:
                request_id, reason = next(iter(self._aborts.items()))
                self.scheduler.abort(request_id, reason)
                self._outputs = [o for o in self._outputs if o.request_id != request_id]
                self._aborts.pop(request_id, None)
        except BaseException:
            self.scheduler.restart()
            raise

    def warm_up(self, on_shape: Callable[[BatchShape], None] | None = None) -> None:
        """Compiles every shape that a step can have, in multiple threads.

        Args:
          on_shape: called after each shape.
        """
        with self.alone("Engine.warm_up"):
            self._programs.compile_all(on_shape)
            self._compiles_after_warm_up = compiles.num_compiles()

    def close(self) -> None:
        """Ends the threads that compile in the background, each after its present shape.

        The engine can still be used: steps compile the shapes that are missing.
        """
        self._programs.close()

    def step(self) -> list[Output]:
        """Computes one batch, and returns the tokens that it yielded, in the order of the batch.

        If the model raises an error, no token is lost: the next step computes the same tokens
        again. If the pool is lost with the step, all live requests are computed again from their
        start. If a callback raises an error, the next step returns the tokens of this step before
        its own. An interrupt at any point has one of these effects.

        Raises:
          RuntimeError: a callback called it.
        """
        with self.alone("Engine.step"):
            if self._stepping.locked():
                raise RuntimeError(
                    "Engine.step: called inside of itself, by a callback; return from the callback"
                    " first: it may call add_request and abort"
                )
            with self._stepping:
                self._is_computing = False
                self._end_finished()  # those of a step that was interrupted
                self._take_aborts()
                self._is_computing = True
                self._compute()
                self._is_computing = False
                self._take_aborts()
                self._end_finished()
            return self._hand_over()

    def _hand_over(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _compute(self) -> None:
        """Plans, runs and commits a step; the results are in `_outputs` and `_finished`."""
        start = time.perf_counter()
        plan = self._schedule()
        self.last_plan = plan
        if not plan.segments:
            return
        requests = [self._request(segment.request_id) for segment in plan.segments]
        compiled = compiles.num_compiles()
        try:
            shape = self._programs.choose(plan.num_tokens, len(plan.segments))
            batch = make_batch_of(shape, plan.segments, self.config)
            dispatched = time.perf_counter()
            logits, kv_pages = self._run(batch)
            device_tokens = next_tokens(logits, requests, self.config.max_model_len)
            tokens = np.asarray(device_tokens)[: len(requests)].tolist()
            self.stats.device_seconds += time.perf_counter() - dispatched
            extras = read_extras(
                requests, device_tokens, logits, return_logits=self.config.return_logits
            )
            self._kv_pages = kv_pages  # only after the step has ended without an error
        except BaseException:
            self._recover()
            raise
        self._count(plan, batch, compiled)
        self._commit(plan, tokens, extras)
        self.stats.seconds += time.perf_counter() - start

    def _end_finished(self) -> None:
        """Calls `on_finish` with the requests that have finished, and frees their pages."""
        with contextlib.ExitStack() as stack:  # makes all of the calls, even if one of them raises
            stack.callback(self._release_finished)
            if self._on_finish is not None:
                for request in reversed(self._finished):
                    stack.callback(self._on_finish, request)

    def _release_finished(self) -> None:
        try:
            for request in self._finished:
                if self.scheduler.get(request.request_id) is request:  # no restart removed it
                    self.scheduler.release(request)
            self._finished = []
        except BaseException:
            self.scheduler.restart()
            raise

    def _schedule(self) -> StepPlan:
        try:
            return self.scheduler.schedule()
        except BaseException:
            self.scheduler.restart()
            raise

    def run(self) -> dict[int, list[int]]:
        """Steps until no request is left; returns the new tokens by request id."""
        tokens: dict[int, list[int]] = {}
        while self.has_work or self._outputs:
            for output in self.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
        return tokens

    def read_kv(self, request: Request) -> np.ndarray:
        """The keys and values of a live request's computed tokens, [2, L, num_computed, K, H]."""
        with self.alone("Engine.read_kv"):
            return self._read_kv(request)

    def _read_kv(self, request: Request) -> np.ndarray:
        config = self.model_config
        table = np.zeros(self.config.max_pages_per_seq, int)  # one shape, so it compiles once
        table[: len(request.page_ids)] = request.page_ids
        first_pages = np.arange(config.num_layers)[:, None] * self.config.pool_pages
        slots = self._kv_pages[first_pages + table]  # [L, M, page_size, R, C]
        kv = np.stack(layout.split_kv(slots, config.num_kv_heads, config.head_dim))
        kv = kv.reshape(2, config.num_layers, -1, config.num_kv_heads, config.head_dim)
        return kv[:, :, : request.num_computed]

    def _request(self, request_id: int) -> Request:
        request = self.scheduler.get(request_id)
        assert request is not None
        return request

    def _run(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Dispatches the model's step; returns its logits and the new pool."""
        packed, spec = pack(batch)
        return run_step(
            self._params,
            self._kv_pages,
            packed,
            spec=spec,
            model=self.model_config,
            kv_write=self.config.kv_write,
            write_backend=self.config.write_backend,
            attention_backend=self.config.attention_backend,
        )

    def _commit(self, plan: StepPlan, tokens: list[int], extras: list[Extra]) -> None:
        new_tokens = {
            segment.request_id: token
            for segment, token in zip(plan.segments, tokens, strict=True)
            if segment.samples
        }
        before = None
        try:
            aborted = frozenset(self._aborts)
            self._take_aborts()
            before = self._outputs
            finished = self.scheduler.commit(plan, new_tokens)
            outputs = make_outputs(plan, tokens, extras, finished, aborted)
            self._finished = finished
            self._outputs = before + outputs
        except BaseException:
            # Once the outputs are kept, the caller gets them, and the tokens must stay.
            is_kept = self._outputs is not before
            self._finished = self._finished if is_kept else []
            self.scheduler.restart(None if is_kept else plan)
            raise

    def _count(self, plan: StepPlan, batch: Batch, compiled: int) -> None:
        stats, num_tokens = self.stats, plan.num_tokens
        stats.num_steps += 1
        stats.num_tokens += num_tokens
        stats.num_padding += len(batch.token_ids) - num_tokens
        stats.num_deferrals += len(plan.deferrals)
        stats.num_preemptions += len(plan.preempted)
        stats.num_cached = self.scheduler.num_cached
        if self._compiles_after_warm_up is not None:
            stats.num_recompiles += compiles.num_compiles() - compiled

    def _recover(self) -> None:
        """Makes a new pool if a failed step has lost the donated one. Its plan is not committed."""
        if self._kv_pages.is_deleted():
            self.scheduler.restart()  # first, because no page table may refer to the new pool
            self._kv_pages = make_pool(
                self.model_config, self.config.pool_pages, self.config.page_size
            )


def _check_numbers(seed: int, eos_token_ids: Sequence[int]) -> None:
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
