# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The engine: the loop that schedules, runs and commits steps."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged import layout
from reference_engine import compiles
from reference_engine.batch import (
    Batch,
    BatchShape,
    make_batch_of,
    max_num_seqs,
    num_logit_rows,
    pack,
)
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.in_flight import InFlight, choose_tokens, read_extras
from reference_engine.model import StepOptions, make_pool, run_step
from reference_engine.moved_request import MovedRequest
from reference_engine.one_thread import OneThread
from reference_engine.outputs import Extra, Output, finished_requests, make_outputs
from reference_engine.page_pool import PagePool
from reference_engine.page_table import PageTable
from reference_engine.programs import Programs, lowering
from reference_engine.request import FinishReason, Request, check_numbers, check_request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler
from reference_engine.stats import Stats
from reference_engine.step_plan import StepPlan
from reference_engine.weights import Params


class Engine:
    """Serves prompts of token ids from one paged pool.

    One thread at a time may use it: a call while another thread is in a call is a RuntimeError, and
    changes nothing. Threads may use it one after another. Callbacks may call everything but
    `step`, `run`, `detach` and `attach`.

    Attributes:
      config: the limits and choices of the engine.
      model_config: the shape of the model.
      scheduler: the requests and their pages.
      last_plan: the plan of the last step that was dispatched; None before the first step.
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
        check_numbers(seed, eos_token_ids)
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
        self._in_flight: collections.deque[InFlight] = collections.deque()  # the oldest first
        self._has_failed_to_dispatch = False
        num_seqs = max_num_seqs(config)
        self._page_table = PageTable(num_seqs, config.max_pages_per_seq)
        num_rows = num_logit_rows(num_seqs)
        self._no_tokens = jnp.zeros(num_rows, jnp.int32)  # stands in for a step before
        self._programs = Programs(
            config, lowering(params, self._kv_pages, self._no_tokens, model_config, config)
        )
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
                self._drop_unwanted()
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
            self._recover()
            raise

    def detach(self, request_id: int) -> MovedRequest | None:
        """Takes a request out, with what is computed of it, so that another engine can go on.

        The steps in flight are read first; the next `step` returns their tokens. No output of the
        request is returned after that, so that an LLM must not serve it: its stream would not end.

        Returns:
          The request; None if no such request is alive.

        Raises:
          RuntimeError: a callback called it.
        """
        with self.alone("Engine.detach"):
            self._refuse_inside_a_step("detach")
            while self._in_flight:
                self._collect(self._in_flight[0])
                self._take_aborts()
                self._end_finished()
            request = self.scheduler.get(request_id)
            if request is None:
                return None
            moved = MovedRequest.of(request, self._kv_pages, self.model_config)
            self.scheduler.abort(request_id)
            return moved

    def attach(self, moved: MovedRequest) -> int:
        """Goes on with a request that another engine has computed so far, and returns its new id.

        Its next tokens are those that the other engine would have computed, as far as both have the
        same parameters. Both need the same model and page size.

        Raises:
          ValueError: the engine cannot go on with it; see MovedRequest.check and `add_request`.
          RuntimeError: no page or place is free for it now; `step` first. Nothing is changed then.
        """
        prompt_ids = self.check_request(moved.prompt_ids, moved.params)
        moved.check(self._kv_pages, self.model_config, self.config)
        with self.alone("Engine.attach"):
            self._refuse_inside_a_step("attach")
            request = Request(
                self._next_id,
                prompt_ids,
                moved.params,
                output_ids=list(moved.output_ids),
                stop_ids=moved.stop_ids,
                seed=moved.seed,
            )
            if moved.num_computed == 0:
                self.scheduler.add(request)
            elif self.scheduler.adopt(request, moved.num_computed):
                self._put_pages(moved, request)
            else:
                raise RuntimeError(
                    f"Engine.attach: {self.scheduler.pool.num_free} pages are free and"
                    f" {len(self.scheduler.running)} requests run, so there is no room for a"
                    f" request of {request.num_tokens} tokens now; step until one has ended"
                )
            self._next_id += 1
            return request.request_id

    def _put_pages(self, moved: MovedRequest, request: Request) -> None:
        try:
            self._kv_pages = moved.put(self._kv_pages, request.page_ids, self.model_config)
        except BaseException:
            self.scheduler.abort(request.request_id)
            if self._kv_pages.is_deleted():
                self._recover()
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
        """Dispatches a batch, and returns the tokens of one, in the order of the batch.

        With `async_scheduling` the host works ahead of the device: the batch that is dispatched is
        the one after the batch whose tokens are read and returned. A call that finds no batch in
        flight returns no tokens. A call dispatches nothing if everything else depends on the tokens
        in flight: because a request would have to lose its pages, because a request with bad words
        runs, or because every request ends with them. Without `async_scheduling` a call returns the
        tokens of the batch that it dispatches.

        If the model raises an error, no token is lost: a later step computes the same tokens again.
        The batch that was in flight before is read by the next step. If the pool is lost with the
        error, all live requests are computed again from their start; it always is if the error
        shows only when the tokens are read. If a callback raises an error, the next step returns
        the tokens of this step before its own. An interrupt at any point has one of these effects.

        Raises:
          RuntimeError: a callback called it.
        """
        with self.alone("Engine.step"):
            self._refuse_inside_a_step("step")
            with self._stepping:
                self._is_computing = False
                self._end_finished()  # those of a step that was interrupted
                self._take_aborts()
                self._is_computing = True
                self._compute()
                self._is_computing = False
                self._take_aborts()
                self._end_finished()
                self._drop_unwanted()
            return self._hand_over()

    def _refuse_inside_a_step(self, method: str) -> None:
        if self._stepping.locked():
            raise RuntimeError(
                f"Engine.{method}: called inside of a step, by a callback; return from the callback"
                " first: it may call add_request and abort"
            )

    def _hand_over(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _compute(self) -> None:
        """Dispatches a step, and reads and commits one: the step before, or the same.

        The results are in `_outputs` and `_finished`.
        """
        start = time.perf_counter()
        steps = self._in_flight
        has_dispatched = False
        if not steps or not (
            len(steps) > 1 or steps[0].is_read_first or self._has_failed_to_dispatch
        ):
            self._has_failed_to_dispatch = True  # an error leaves it so
            has_dispatched = self._dispatch_next()
        self._has_failed_to_dispatch = False
        if steps and (len(steps) > 1 or not has_dispatched or steps[0].is_read_first):
            self._collect(steps[0])
        self.stats.seconds += time.perf_counter() - start

    def _dispatch_next(self) -> bool:
        """Schedules and dispatches a step; False if there is nothing to compute now."""
        plan = self._schedule()
        self.last_plan = plan
        if not plan.segments:
            return False
        is_begun = False
        try:
            step, kv_pages = self._dispatch(plan)
            is_begun = True
            self._kv_pages = kv_pages
            self.scheduler.begin(plan)
            self._in_flight.append(step)
        except BaseException:
            # If the pool is there, the step before is in flight still, and nothing is lost.
            if is_begun or self._kv_pages.is_deleted():
                self._recover()
            raise
        return True

    def _dispatch(self, plan: StepPlan) -> tuple[InFlight, jax.Array]:
        """Packs a step and starts it on the device; returns it, and the pool after it."""
        compiled = compiles.num_compiles()
        requests = self.scheduler.requests_of(plan)
        shape = self._programs.choose(plan.num_tokens, len(plan.segments))
        batch = make_batch_of(shape, plan.segments, self.config, self._page_table)
        before = self._in_flight[-1] if self._in_flight else None
        last_tokens = self._no_tokens if before is None else before.last_tokens
        logits, kv_pages = self._run(batch, last_tokens, is_decode=shape.is_decode)
        # jax's stub for an array does not declare `is_ready`.
        is_late = before is None or before.tokens.is_ready()  # type: ignore[attr-defined]
        step = choose_tokens(
            plan,
            requests,
            logits,
            last_tokens,
            config=self.config,
            num_padding=len(batch.token_ids) - int(batch.cu_q_lens[-1]),
        )
        self.stats.num_late_steps += is_late
        if self._compiles_after_warm_up is not None:
            self.stats.num_recompiles += compiles.num_compiles() - compiled
        return step, kv_pages

    def _collect(self, step: InFlight) -> None:
        """Waits for the oldest step in flight, and commits it.

        An interrupt during the wait leaves the step in flight.
        """
        start = time.perf_counter()
        try:
            tokens = np.asarray(step.tokens)[: len(step.requests)].tolist()
            self.stats.wait_seconds += time.perf_counter() - start
            extras = read_extras(step)
        except Exception:
            # A later step runs on the pool of this one, so it is lost, too.
            self._recover(is_pool_lost=True)
            raise
        self._commit(step, tokens, extras)

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
            self._recover()
            raise

    def _schedule(self) -> StepPlan:
        try:
            # Requests lose their pages only when all tokens are known, so that whoever has ended
            # keeps its pages for `on_finish`, and nobody loses pages that an end would have freed.
            return self.scheduler.schedule(may_preempt=not self._in_flight)
        except BaseException:
            self._recover()
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

    def _run(
        self, batch: Batch, last_tokens: jax.Array, *, is_decode: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Dispatches the model's step; returns its logits and the new pool."""
        packed, spec = pack(batch[:-1])
        logits, kv_pages, self._page_table.on_device = run_step(
            self._params,
            self._kv_pages,
            self._page_table.take(),
            packed,
            last_tokens,
            spec=spec,
            model=self.model_config,
            options=StepOptions.of(self.config, is_decode=is_decode),
        )
        return logits, kv_pages

    def _commit(self, step: InFlight, tokens: list[int], extras: list[Extra] | None) -> None:
        before = None
        try:
            self._in_flight.popleft()
            self._take_aborts()
            before = self._outputs
            kept = self.scheduler.commit(step.plan, tokens)
            outputs = make_outputs(kept, tokens, extras)
            self._finished = finished_requests(kept)
            self._outputs = before + outputs
        except BaseException:
            # Once the outputs are kept, the caller gets them, and the tokens must stay.
            is_kept = self._outputs is not before
            self._finished = self._finished if is_kept else []
            self._recover(None if is_kept else step.plan)
            raise
        self.stats.count(step.plan, step.num_padding, self.scheduler)

    def _drop_unwanted(self) -> None:
        """Drops the steps in flight if no request waits for them."""
        while self._in_flight and not self.has_work:
            step = self._in_flight.popleft()
            self.scheduler.commit(step.plan, ())
            self.stats.count(step.plan, step.num_padding, self.scheduler)

    def _recover(self, plan: StepPlan | None = None, *, is_pool_lost: bool = False) -> None:
        """Lets all live requests start again, after an error; no step stays in flight.

        A pool that a failed step has taken is replaced.

        Args:
          plan: see Scheduler.restart.
          is_pool_lost: whether the pool is the result of a step that has failed on the device.
        """
        self._in_flight.clear()
        self._page_table.on_device = None  # it may be the result of a step that has failed
        self.scheduler.restart(plan)  # first, because no page table may refer to the new pool
        if is_pool_lost and not self._kv_pages.is_deleted():
            self._kv_pages.delete()  # the device may have no room for both
        if self._kv_pages.is_deleted():
            self._kv_pages = make_pool(
                self.model_config, self.config.pool_pages, self.config.page_size
            )
