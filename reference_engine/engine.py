# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The loop: schedule, run, commit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_paged import dispatch, layout, settings
from pallas_paged.checks import require
from reference_engine import compiles
from reference_engine.batch import (
    Array,
    Batch,
    BatchShape,
    Spec,
    batch_shapes,
    make_batch,
    make_batch_of,
    pack,
    unpack,
)
from reference_engine.config import EngineConfig, ModelConfig, num_pages_for
from reference_engine.model import forward, make_pool
from reference_engine.one_thread import OneThread
from reference_engine.page_pool import PagePool
from reference_engine.request import (
    MAX_STOP_IDS,
    FinishReason,
    Request,
    SamplingParams,
    as_int,
)
from reference_engine.sampler import (
    add_bias,
    greedy,
    is_greedy,
    log_probabilities,
    make_bias,
    make_penalties,
    make_sampling,
    penalise,
    sample,
)
from reference_engine.scheduler import Scheduler, StepPlan
from reference_engine.weights import Params


class Output(NamedTuple):
    """One new token.

    Attributes:
      request_id: whose it is.
      token_id: the token.
      finish_reason: why the request ended with it; None if it goes on.
      logits: the model's f32[vocab_size], before any bias or penalty; None unless asked for.
      logprobs: id -> log probability, the token's first, then the likeliest; None unless asked for.
    """

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    logits: np.ndarray | None = None
    logprobs: dict[int, float] | None = None


@dataclasses.dataclass
class Stats:
    """Counts over an engine's life.

    Attributes:
      num_steps: steps that computed something.
      num_tokens: tokens computed, recomputed ones included.
      num_padding: rows of the batches that held no token.
      num_cached: tokens that the prefix cache spared.
      num_deferrals: times that alignment made a request wait a step.
      num_preemptions: times that a request lost its pages.
      seconds: in steps.
      device_seconds: of them, from a program's dispatch to its tokens; in the rest the device waits
        for the host.
      num_recompiles: programs that XLA compiled in steps after `warm_up`; 0 as it should be.
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


def model_step(
    params: Params,
    kv_pages: jax.Array,
    packed: jax.Array,
    *,
    spec: Spec,
    model: ModelConfig,
    kv_write: str,
    write_backend: str,
    attention_backend: str,
) -> tuple[jax.Array, jax.Array]:
    """The model's step as one program with one input from the host.

    Args:
      params: the model's.
      kv_pages: [L*P, page_size, R, C].
      packed: i32[n]; a packed Batch.
      spec: what `batch.pack` said of it.
      model, kv_write, write_backend, attention_backend: see model.forward.

    Returns:
      Logits of each sequence's last new token, f32[S, vocab_size], and the pool.
    """
    return forward(
        params,
        kv_pages,
        Batch(*unpack(packed, spec)),
        config=model,
        kv_write=kv_write,
        write_backend=write_backend,
        attention_backend=attention_backend,
    )


# XLA's own matrix products for a GPU take whole arrays, so that a loop over layers would copy each
# layer's weights out of theirs in every step, and so would several products made one. cuBLAS's
# read the weights where they are.
_COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
}


@functools.cache
def jitted_step(platform: str) -> Any:
    """`model_step`, the pool donated, compiled as is best for a platform."""
    return jax.jit(
        model_step,
        static_argnames=("spec", "model", "kv_write", "write_backend", "attention_backend"),
        donate_argnames=("kv_pages",),
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


@settings.defaults()
def run_step(
    params: Params, kv_pages: jax.Array, packed: Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`model_step` on the device of now; donates the pool."""
    return jitted_step(dispatch.platform())(params, kv_pages, packed, **options)


def _outputs(
    plan: StepPlan,
    tokens: list[int],
    extras: list,
    finished: Sequence[Request],
    aborted: Set[int],
) -> list[Output]:
    """Of every request that got a token and is there to take it."""
    reasons = {request.request_id: request.finish_reason for request in finished}
    return [
        Output(segment.request_id, token, reasons.get(segment.request_id), *extra)
        for segment, token, extra in zip(plan.segments, tokens, extras, strict=True)
        if segment.samples and segment.request_id not in aborted
    ]


def next_tokens(logits: jax.Array, requests: Sequence[Request], max_model_len: int) -> jax.Array:
    """The next token of each row: f32[S, V] -> i32[S].

    A batch pays for what one of its requests asks for and for nothing else: what changes logits,
    and what draws, are programs of their own.

    Args:
      logits: the model's.
      requests: of the first rows; the others' tokens mean nothing.
      max_model_len: most tokens of a request.
    """
    num_seqs = logits.shape[0]
    if any(request.has_bias for request in requests):
        logits = add_bias(logits, make_bias(requests, num_seqs))
    if any(request.has_penalties for request in requests):
        logits = penalise(logits, make_penalties(requests, num_seqs, max_model_len))
    if all(map(is_greedy, requests)):
        return greedy(logits)
    return sample(logits, make_sampling(requests, num_seqs))


class Engine:
    """Serves token-id prompts from one paged pool.

    One thread at a time: a call from a thread while another thread is inside one is a RuntimeError,
    and changes nothing. Threads that take turns are fine. Callbacks may call everything but `step`
    and `run`.

    Attributes:
      scheduler: requests and their pages.
      last_plan: what the last step computed; None before the first.
      stats: see Stats.
      alone: what keeps other threads out.

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
    ):
        """Makes the pool; nothing is compiled before the first step.

        Args:
          params: the model's parameters, see weights.
          model_config: their shape.
          config: see EngineConfig.
          eos_token_ids: ids that end a request unless it ignores them.
          seed: at least 0; gives every request without a seed of its own one.
          on_finish: called with every request that finished by itself, while its pages are still
            its own (`read_kv` works). What it raises passes on from `step` when all have been
            called.
        """
        _check_numbers(seed, eos_token_ids)
        self.config = config
        self.model_config = model_config
        self.scheduler = Scheduler(config, PagePool(config.num_pages))
        self.last_plan: StepPlan | None = None
        self.stats = Stats()
        self._params = params
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = int(seed)
        self._compiles_after_warm_up: int | None = None
        self._on_finish = on_finish
        self.alone = OneThread()
        self._stepping = threading.Lock()  # held in a step
        self._is_computing = False  # in a step: whether its plan is not committed yet
        self._aborts: dict[int, FinishReason] = {}  # what came while a step was computed
        self._outputs: list[Output] = []  # not handed back yet
        self._finished: list[Request] = []  # not released yet
        self._kv_pages = make_pool(model_config, config.num_pages, config.page_size)
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

    def add_checked(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> int:
        """Queues what `check_request` has returned for these params, without a second check."""
        with self.alone("Engine.add_request"):
            return self._add(prompt_ids, params)

    def _add(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> int:
        seed = params.seed
        if seed is None and params.temperature > 0:
            drawn = np.random.SeedSequence([self._seed, self._next_id]).generate_state(1, np.uint64)
            seed = int(drawn.view(np.int64)[0])
        request = Request(
            self._next_id,
            prompt_ids,
            params,
            stop_ids=self._eos_ids(params),
            seed=seed or 0,
        )
        self._next_id += 1
        self.scheduler.add(request)
        return request.request_id

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """Ends a request now and frees its pages; returns it, None if no such request is alive.

        No output of it comes any more. It may be called at any time, also by callbacks, finalizers
        and handlers of signals; a step that is being computed ends the request when it commits.
        A request that has finished is not alive, also while `on_finish` is told of it.
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
        """Ends the requests that were taken back."""
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
        """Compiles every shape that a step can have, by running an empty batch of each.

        Args:
          on_shape: called when a shape is ready.
        """
        with self.alone("Engine.warm_up"):
            for shape in batch_shapes(self.config):
                self._warm_up_shape(shape)
                if on_shape is not None:
                    on_shape(shape)
            self._compiles_after_warm_up = compiles.num_compiles()

    def _warm_up_shape(self, shape: BatchShape) -> None:
        try:
            logits, self._kv_pages = self._run(make_batch_of(shape, (), self.config))
            tokens = sample(logits, make_sampling([], shape.num_seqs))
            add_bias(logits, make_bias([], shape.num_seqs))
            penalise(logits, make_penalties([], shape.num_seqs, self.config.max_model_len))
            jax.block_until_ready((greedy(logits), log_probabilities(logits, tokens)))
        except BaseException:
            self._recover()
            raise

    def step(self) -> list[Output]:
        """Computes one batch and returns the tokens it yielded, in the batch's order.

        If the model raises, the error passes on, no token is lost, and the next step computes the
        same tokens again (all of them from the start if the pool went down with the step). If a
        callback raises, the next step hands this one's tokens back before its own. An interrupt,
        wherever it strikes, is one or the other.

        Raises:
          RuntimeError: a callback called it.
        """
        with self.alone("Engine.step"):
            if self._stepping.locked():
                raise RuntimeError(
                    "Engine.step: called inside of itself, by a callback; return from the callback"
                    " first: add_request and abort are what it may call"
                )
            with self._stepping:
                self._is_computing = False
                self._end_finished()  # of a step that was interrupted
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
        """Runs what is scheduled; leaves it in `_outputs` and `_finished`."""
        start = time.perf_counter()
        plan = self._schedule()
        self.last_plan = plan
        if not plan.segments:
            return
        requests = [self._request(segment.request_id) for segment in plan.segments]
        compiled = compiles.num_compiles()
        try:
            batch = make_batch(plan.segments, self.config)
            dispatched = time.perf_counter()
            logits, kv_pages = self._run(batch)
            device_tokens = next_tokens(logits, requests, self.config.max_model_len)
            tokens = np.asarray(device_tokens)[: len(requests)].tolist()
            self.stats.device_seconds += time.perf_counter() - dispatched
            extras = self._extras(requests, device_tokens, logits)
            self._kv_pages = kv_pages  # not before the step has come to its end without an error
        except BaseException:
            self._recover()
            raise
        self._count(plan, batch, compiled)
        self._commit(plan, tokens, extras)
        self.stats.seconds += time.perf_counter() - start

    def _end_finished(self) -> None:
        """Tells of the requests that have finished and frees their pages."""
        with contextlib.ExitStack() as stack:  # all of it is done, whatever one part raises
            stack.callback(self._release_finished)
            if self._on_finish is not None:
                for request in reversed(self._finished):
                    stack.callback(self._on_finish, request)

    def _release_finished(self) -> None:
        try:
            for request in self._finished:
                if self.scheduler.get(request.request_id) is request:  # no restart took it
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
        """Steps until no request is left; the tokens yielded meanwhile, by request id."""
        tokens: dict[int, list[int]] = {}
        while self.has_work or self._outputs:
            for output in self.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
        return tokens

    def read_kv(self, request: Request) -> np.ndarray:
        """Keys and values of a live request's computed tokens, [2, L, num_computed, K, H]."""
        with self.alone("Engine.read_kv"):
            return self._read_kv(request)

    def _read_kv(self, request: Request) -> np.ndarray:
        config = self.model_config
        table = np.zeros(self.config.max_pages_per_seq, int)  # one shape, so compiled once
        table[: len(request.page_ids)] = request.page_ids
        first_pages = np.arange(config.num_layers)[:, None] * self.config.num_pages
        slots = self._kv_pages[first_pages + table]  # [L, M, page_size, R, C]
        kv = np.stack(layout.split_kv(slots, config.num_kv_heads, config.head_dim))
        kv = kv.reshape(2, config.num_layers, -1, config.num_kv_heads, config.head_dim)
        return kv[:, :, : request.num_computed]

    def _request(self, request_id: int) -> Request:
        request = self.scheduler.get(request_id)
        assert request is not None
        return request

    def _run(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Dispatches the model's step; its logits, and the pool that takes the engine's place."""
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

    def _extras(
        self, requests: Sequence[Request], tokens: jax.Array, logits: jax.Array
    ) -> list[tuple[np.ndarray | None, dict[int, float] | None]]:
        """What each row hands back beside its token: logits and log probabilities."""
        rows = np.asarray(logits) if self.config.return_logits else [None] * len(requests)
        if all(request.params.logprobs is None for request in requests):
            return [(row, None) for row, _ in zip(rows, requests, strict=False)]
        own, ids, values = map(np.asarray, log_probabilities(logits, tokens))
        chosen = np.asarray(tokens)
        extras = []
        for i, request in enumerate(requests):
            count, found = request.params.logprobs, None
            if count is not None:
                top = zip(ids[i, :count].tolist(), values[i, :count].tolist(), strict=True)
                found = {int(chosen[i]): float(own[i])} | dict(top)
            extras.append((rows[i], found))
        return extras

    def _commit(self, plan: StepPlan, tokens: list[int], extras: list) -> None:
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
            outputs = _outputs(plan, tokens, extras, finished, aborted)
            self._finished = finished
            self._outputs = before + outputs
        except BaseException:
            is_known = self._outputs is not before  # to the caller: it is never taken back
            self._finished = self._finished if is_known else []
            self.scheduler.restart(None if is_known else plan)
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
        """After a failed step: the plan was not committed; only a donated pool can be lost."""
        if self._kv_pages.is_deleted():
            self.scheduler.restart()  # first: a new pool must never meet the old tables
            self._kv_pages = make_pool(
                self.model_config, self.config.num_pages, self.config.page_size
            )

    def _eos_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset() if params.ignore_eos else self._eos_token_ids

    def check_request(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt's ids as Python's ints, if `add_request` would take them with these params.

        Raises:
          ValueError: see `add_request`.
        """
        op, config = "Engine.add_request", self.config
        require(
            isinstance(params, SamplingParams),
            op,
            "params",
            got=f"{params!r}",
            wanted="SamplingParams",
            hint="or None for greedy ones",
        )
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
        vocab_size = self.model_config.vocab_size
        wrong = [
            f"{token!r} at index {i}"
            for i, token in enumerate(prompt)
            if (type(token) is not int and as_int(token) is None) or not 0 <= token < vocab_size
        ]
        require(
            not wrong,
            op,
            "prompt_ids",
            got=", ".join(wrong[:1]),
            wanted=f"whole numbers in [0, {vocab_size})",
            hint="use the tokenizer that the model came with",
        )
        require(
            len(prompt) < config.max_model_len,
            op,
            "prompt_ids",
            got=f"{len(prompt)} tokens long",
            wanted=f"fewer than max_model_len={config.max_model_len}",
            hint="shorten it, or raise max_model_len",
        )
        # The last token is never written: nothing reads it.
        most = config.max_model_len if params.max_tokens is None else params.max_tokens
        longest = min(len(prompt) + most, config.max_model_len) - 1
        num_pages = num_pages_for(longest, config.page_size)
        require(
            num_pages <= config.num_pages,
            op,
            "prompt_ids",
            got=f"{len(prompt)} tokens long with max_tokens={params.max_tokens}: up to"
            f" {num_pages} pages",
            wanted=f"at most the pool's {config.num_pages} pages",
            hint="lower max_tokens, shorten the prompt, or raise num_pages",
        )
        params.check_ids(op, vocab_size)
        require(
            params.n == 1,
            op,
            "n",
            got=f"{params.n}",
            wanted="1",
            hint="LLM.generate returns n outputs; an Engine takes a request for each",
        )
        num_stops = len(self._eos_ids(params) | set(params.stop_token_ids))
        require(
            params.min_tokens == 0 or num_stops <= MAX_STOP_IDS,
            op,
            "stop_token_ids",
            got=f"{num_stops} ids, the model's own included",
            wanted=f"at most {MAX_STOP_IDS} with min_tokens",
            hint="name fewer, or leave min_tokens at 0",
        )
        return tuple(map(int, prompt))


def _check_numbers(seed: int, eos_token_ids: Sequence[int]) -> None:
    seed_number, eos = as_int(seed), [as_int(token) for token in eos_token_ids]
    require(
        seed_number is not None and seed_number >= 0,
        "Engine",
        "seed",
        got=f"{seed!r}",
        wanted="an int >= 0",
        hint="it is for requests without a seed of their own",
    )
    require(
        all(token is not None and 0 <= token < 2**31 for token in eos),
        "Engine",
        "eos_token_ids",
        got=f"{eos_token_ids!r}",
        wanted="ids in [0, 2**31)",
        hint="() for none",
    )
