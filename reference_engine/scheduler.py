# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The scheduler: which tokens each step computes. Pure Python.

A request has no phase: each step lets its `num_computed` catch up with its `num_tokens`. One
function, `limit`, states every limit on the next chunk of a request, whether it runs or waits.
"""

from __future__ import annotations

import array
import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from reference_engine.config import EngineConfig, num_pages_for
from reference_engine.page_pool import PagePool, page_hash
from reference_engine.request import FinishReason, Request


class Segment(NamedTuple):
    """The new tokens of one request in one step.

    Attributes:
      request_id: the request.
      start: the position of the first token; as many tokens are in the pool already.
      token_ids: the tokens at positions [start, end).
      page_ids: the request's pages in order, enough for `end` tokens. It is no copy: it may grow.
      samples: whether the request has no token after `end`, so that the step yields a new one.
      is_decode: whether it is a decode; every other segment is part of a prefill.
    """

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    page_ids: Sequence[int]
    samples: bool
    is_decode: bool

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class Deferral:
    """A request that alignment makes wait: `budget` tokens do not reach the next page boundary."""

    request_id: int
    num_computed: int
    budget: int


@dataclasses.dataclass(frozen=True, slots=True)
class Blocked:
    """The first request of the queue, if it cannot be admitted.

    It wants `num_pages` new pages, and `num_free` are free. Where those are enough, max_num_seqs
    requests are running already.
    """

    request_id: int
    num_pages: int
    num_free: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
      segments: what to compute.
      deferrals: the requests that wait for a page boundary.
      preempted: the ids of the requests that lost their pages, in the order in which they did.
      blocked: the request that could not be admitted, if there is one.
    """

    segments: tuple[Segment, ...]
    deferrals: tuple[Deferral, ...] = ()
    preempted: tuple[int, ...] = ()
    blocked: Blocked | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)


class TokenCounts(Protocol):
    """What `is_decode` and `limit` read of a request; see Request."""

    num_prompt: int
    num_tokens: int
    num_deferrals: int


def charge(num_new_tokens: int) -> int:
    """What a chunk costs of the step's budget.

    The batch is packed densely, so a chunk costs its tokens and no more. Pages are counted by the
    pool. If this charge were rounded up to pages too, the end of a prompt would wait for ever where
    its pages hold more tokens than the budget.
    """
    return num_new_tokens


def is_decode(request: TokenCounts, computed: int) -> bool:
    """Whether the next tokens of `request`, after `computed` of them, are a decode.

    They are if the whole prompt is computed, and every token but the newest. A request that was
    preempted computes its outputs again as a prefill, except for the newest.
    """
    return computed >= max(request.num_prompt, request.num_tokens - 1)


def limit(
    request: TokenCounts, computed: int, budget: int, contended: bool, config: EngineConfig
) -> int:
    """How many tokens of `request` the step may compute next, after `computed` of them.

    Args:
      request: the request, which is only read.
      computed: the number of its tokens that are in the pool already.
      budget: what is left of the step's budget.
      contended: whether another request competes for the step.
      config: see EngineConfig.

    Returns:
      A number of tokens within every limit; 0 if the request gets nothing in this step.
    """
    last = min(request.num_tokens, config.max_model_len)
    n = min(last - computed, budget)
    if contended and config.long_prefill_token_threshold:
        n = min(n, config.long_prefill_token_threshold)
    if n <= 0:
        return 0
    if not config.page_aligned_scheduling or is_decode(request, computed):
        return n
    end = computed + n
    if end == last and charge(n) <= budget:
        return n
    # The end is rounded as a position, not as a length, so that a chunk that starts inside a page
    # ends on a boundary too.
    aligned = end // config.page_size * config.page_size - computed
    if aligned > 0:
        return aligned
    return 0 if request.num_deferrals < config.max_deferrals else n


class Scheduler:
    """The requests in the order of their arrival, and the pages that they hold.

    Attributes:
      waiting: the requests without pages, the first to be admitted first. A request that is
        preempted becomes the first again.
      running: the requests with pages, in the order of their admission.
      num_cached: the number of tokens that admitted requests have found in the prefix cache.
    """

    def __init__(self, config: EngineConfig, pool: PagePool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self.num_cached = 0
        self._requests: dict[int, Request] = {}  # the waiting and the running ones, by id

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        self._requests[request.request_id] = request
        self.waiting.append(request)

    def get(self, request_id: int) -> Request | None:
        """The live request with this id, None if there is none."""
        return self._requests.get(request_id)

    def schedule(self) -> StepPlan:
        """Plans one step.

        The pages are taken here; `commit` counts the tokens when they have been computed. A plan
        that is never committed does no harm: the next plan holds the same tokens again.
        """
        segments: list[Segment] = []
        deferrals: list[Deferral] = []
        preempted: list[int] = []
        blocked: Blocked | None = None
        config, page_size = self.config, self.config.page_size
        budget = config.max_num_batched_tokens
        contended = len(self.running) + len(self.waiting) > 1

        def defer(request: Request, computed: int) -> None:
            request.num_deferrals += 1
            deferrals.append(Deferral(request.request_id, computed, budget))

        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            index += 1
            computed = request.num_computed
            n = limit(request, computed, budget, contended, config)
            if n == 0:
                # A request that cannot use the rest of the budget must not stop the requests after
                # it, above all the decodes.
                defer(request, computed)
                continue
            if computed + n > len(request.page_ids) * page_size and not self._grow(
                request, computed + n, preempted
            ):
                continue
            segments.append(_segment(request, computed, computed + n))
            budget -= charge(n)

        # A preempted request needs the pages that an admission would take.
        while self.waiting and budget > 0 and not preempted:
            request = self.waiting[0]
            cached = self._find_cached(request)
            # A request gets pages for all of its tokens at once. Requests that had got only some
            # of their pages could wait for each other's pages for ever.
            num_new = num_pages_for(request.num_tokens, page_size) - len(cached)
            if len(self.running) >= config.max_num_seqs or not self.pool.can_take(cached, num_new):
                blocked = Blocked(request.request_id, num_new, self.pool.num_free)
                break
            computed = len(cached) * page_size
            n = limit(request, computed, budget, contended, config)
            if n == 0:
                defer(request, computed)
                break  # first come, first served
            self._admit(request, cached, num_new)
            segments.append(_segment(request, computed, computed + n))
            budget -= charge(n)

        return StepPlan(tuple(segments), tuple(deferrals), tuple(preempted), blocked)

    def commit(self, plan: StepPlan, new_tokens: dict[int, int]) -> list[Request]:
        """Counts the plan's tokens as computed, and appends the tokens that the step yielded.

        Requests that were aborted or lost their pages since the plan was made are skipped.

        Pages that have become full are published to the prefix cache here, and not before: within
        one step, no request may read a page that another request writes.

        Args:
          plan: what was computed.
          new_tokens: request id -> new token, for every segment that samples.

        Returns:
          The requests that have finished. They hold their pages until `release`.
        """
        finished = []
        page_size, requests = self.config.page_size, self._requests
        for request_id, start, token_ids, page_ids, samples, _ in plan.segments:
            request = requests.get(request_id)
            if request is None or request.page_ids is not page_ids or request.num_computed != start:
                continue  # the pages that the step wrote are not this request's any more
            request.num_computed = end = start + len(token_ids)
            request.num_deferrals = 0
            if end >= (request.num_published + 1) * page_size:
                self._publish(request)
            if samples:
                request.append(new_tokens[request_id])
                reason = _finish_reason(request, self.config)
                if reason is not None:
                    request.finish_reason = reason
                    finished.append(request)
        return finished

    def release(self, request: Request) -> None:
        """Forgets a running request and gives its pages back."""
        self.running.remove(request)
        del self._requests[request.request_id]
        self._free_pages(request)

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """Ends a waiting or running request and returns it; returns None if there is none.

        A plan may hold the request: `commit` skips it then. A request that has finished and waits
        for its `release` is left as it is, and None is returned.
        """
        request = self._requests.get(request_id)
        if request is None or request.finish_reason is not None:
            return None
        if request.page_ids:
            self.release(request)
        else:
            self.waiting.remove(request)
            del self._requests[request_id]
        request.finish_reason = reason
        return request

    def preempt_all(self) -> None:
        """Moves all running requests to the start of the queue, in order, to be recomputed."""
        while self.running:
            self._preempt_last()

    def restart(self, plan: StepPlan | None = None) -> None:
        """Frees every page and lets all live requests wait again, in the order of their arrival.

        That is how the scheduler goes on after an error inside another method. The error may have
        left its state half written, so only the requests and their tokens are read from it.

        Args:
          plan: the argument of a `commit` that did not end. The tokens that it has appended are
            removed.
        """
        for segment in plan.segments if plan is not None else ():
            request = self._requests.get(segment.request_id)
            if request is not None and segment.samples:
                del request.output_ids[segment.end - request.num_prompt :]
                request.finish_reason = None
        alive = [request for request in self._requests.values() if request.finish_reason is None]
        self.pool.reset()
        for request in alive:
            request.page_ids = array.array("i")
            request.num_tokens = request.num_prompt + len(request.output_ids)
            request.num_computed = request.num_published = request.num_deferrals = 0
            request.page_hashes = []
        self._requests = {request.request_id: request for request in alive}
        self.running, self.waiting = [], collections.deque(alive)

    def _find_cached(self, request: Request) -> list[int]:
        """The pages of the longest prefix of the request that the prefix cache holds.

        At least one token is left to compute, because the next token is sampled from its logits.
        Shared pages are full, so a request that is cached as a whole recomputes its last page.
        """
        if not self.config.enable_prefix_caching:
            return []
        num_full = (request.num_tokens - 1) // self.config.page_size
        self._extend_hashes(request, num_full)
        return self.pool.find(request.page_hashes[:num_full])

    def _publish(self, request: Request) -> None:
        """Publishes the pages that have become full to the prefix cache."""
        num_full = request.num_computed // self.config.page_size
        if self.config.enable_prefix_caching:
            self._extend_hashes(request, num_full)
            for i in range(request.num_published, num_full):
                self.pool.publish(request.page_ids[i], request.page_hashes[i])
        request.num_published = num_full

    def _extend_hashes(self, request: Request, num_pages: int) -> None:
        page_size, hashes = self.config.page_size, request.page_hashes
        for i in range(len(hashes), num_pages):
            tokens = request.token_ids(i * page_size, (i + 1) * page_size)
            hashes.append(page_hash(hashes[-1] if hashes else b"", tokens))

    def _admit(self, request: Request, cached: list[int], num_new: int) -> None:
        page_ids = self.pool.take(cached, num_new)
        assert page_ids is not None  # the caller has counted the free pages
        self.waiting.popleft()
        request.page_ids.extend(page_ids)
        request.num_published = len(cached)
        request.num_computed = request.num_cached = len(cached) * self.config.page_size
        self.num_cached += request.num_cached
        self.running.append(request)

    def _grow(self, request: Request, num_tokens: int, preempted: list[int]) -> bool:
        """Gives `request` pages for `num_tokens` tokens; False if it lost all of its own instead.

        Where too few pages are free, the requests that were admitted last are preempted.
        """
        missing = num_pages_for(num_tokens, self.config.page_size) - len(request.page_ids)
        while (page_ids := self.pool.allocate(max(missing, 0))) is None:
            victim = self._preempt_last()
            preempted.append(victim.request_id)
            if victim is request:
                return False
        request.page_ids.extend(page_ids)
        return True

    def _preempt_last(self) -> Request:
        victim = self.running.pop()
        self._free_pages(victim)
        victim.num_computed = victim.num_published = 0
        victim.num_preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def _free_pages(self, request: Request) -> None:
        self.pool.release(request.page_ids)
        request.page_ids = array.array("i")  # a plan may still refer to the old one


def _segment(request: Request, start: int, end: int) -> Segment:
    return Segment(
        request.request_id,
        start,
        request.token_ids(start, end),
        request.page_ids,
        samples=end == request.num_tokens,
        is_decode=is_decode(request, start),
    )


def _finish_reason(request: Request, config: EngineConfig) -> FinishReason | None:
    num_output, params = len(request.output_ids), request.params
    if request.output_ids[-1] in request.stop_ids and num_output >= params.min_tokens:
        return FinishReason.STOP
    if num_output >= request.max_tokens or request.num_tokens >= config.max_model_len:
        return FinishReason.LENGTH
    return None
