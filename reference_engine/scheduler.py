# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which tokens each step computes. Pure Python.

A request has no phase: each step lets `num_computed` catch up with `num_tokens`. One function,
`limit`, states every limit on a request's next chunk, for running and waiting requests alike.
"""

from __future__ import annotations

import array
import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from reference_engine.config import EngineConfig, num_pages_for
from reference_engine.page_pool import PagePool, page_hash
from reference_engine.request import FinishReason, Request


class Segment(NamedTuple):
    """The new tokens of one request in one step.

    Attributes:
      request_id: whose they are.
      start: position of the first of them; also how many tokens are in the pool already.
      token_ids: the tokens, at positions [start, end).
      page_ids: the request's pages, in order, enough for `end` tokens; not a copy, it may grow.
      samples: whether `end` is the last known token, so that the step yields a new one.
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
    """A request that alignment made wait: `budget` tokens did not reach the next page boundary."""

    request_id: int
    num_computed: int
    budget: int


@dataclasses.dataclass(frozen=True, slots=True)
class Blocked:
    """The first in the queue, which wants `num_pages` new pages of `num_free`, or, where those
    are enough, one of the places of max_num_seqs."""

    request_id: int
    num_pages: int
    num_free: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, who waits for a page boundary, whose pages were taken away, and
    who could not be admitted."""

    segments: tuple[Segment, ...]
    deferrals: tuple[Deferral, ...] = ()
    preempted: tuple[int, ...] = ()
    blocked: Blocked | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)


def charge(num_new_tokens: int) -> int:
    """What a chunk costs of the step's budget.

    The batch is packed densely, so a chunk costs its tokens and no more. Pages are the currency of
    the pool: rounding the charge up to pages as well would stall a tail whose pages exceed what the
    budget can ever hold.
    """
    return num_new_tokens


def is_decode(request: Request, computed: int) -> bool:
    """Whether the next tokens of `request`, after `computed` of them, are a decode.

    They are when the prompt is computed and at most the newest token is not. A request that was
    preempted computes its outputs again as a prefill, all but the newest.
    """
    return computed >= max(request.num_prompt, request.num_tokens - 1)


def limit(
    request: Request, computed: int, budget: int, contended: bool, config: EngineConfig
) -> int:
    """How many tokens of `request` the step may compute next, after `computed` of them.

    Args:
      request: read only.
      computed: tokens already in the pool.
      budget: what is left of the step's budget.
      contended: whether another request competes for the step.
      config: see EngineConfig.

    Returns:
      A count that fits every limit; 0 for "not in this step".
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
    # The end is a position, not a length: a start inside a page returns to the boundary here.
    aligned = end // config.page_size * config.page_size - computed
    if aligned > 0:
        return aligned
    return 0 if request.num_deferrals < config.max_deferrals else n


class Scheduler:
    """Requests in arrival order, and the pages they hold.

    Attributes:
      waiting: requests without pages, first come first; a preempted one returns to the front.
      running: requests with pages, in order of admission.
      num_cached: tokens that admitted requests found in the prefix cache, so far.
    """

    def __init__(self, config: EngineConfig, pool: PagePool):
        self.config = config
        self.pool = pool
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self.num_cached = 0
        self._requests: dict[int, Request] = {}  # both of them, by id

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.waiting.append(request)

    def get(self, request_id: int) -> Request | None:
        """The live request of that number."""
        return self._requests.get(request_id)

    def schedule(self) -> StepPlan:
        """Plans one step. Pages are taken here; `commit` counts the tokens once they are computed.

        A plan that is never committed costs nothing: the next one holds the same tokens again.
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
                # Whoever cannot use what is left must not stop those behind it, decodes above all.
                defer(request, computed)
                continue
            if computed + n > len(request.page_ids) * page_size and not self._grow(
                request, computed + n, preempted
            ):
                continue
            segments.append(_segment(request, computed, computed + n))
            budget -= charge(n)

        # Whoever was preempted needs the pages that an admission would take.
        while self.waiting and budget > 0 and not preempted:
            request = self.waiting[0]
            cached = self._find_cached(request)
            # Pages for all known tokens at once: a half-admitted prompt could only wait for pages
            # that other half-admitted prompts hold.
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
        """Counts the plan's tokens as computed and appends the tokens that the step yielded.

        Requests that were aborted or lost their pages since are passed over.

        Full pages are published to the prefix cache here and not before: within one step nobody
        may read a page that another request writes.

        Args:
          plan: what was computed.
          new_tokens: request id -> token, for every segment that samples.

        Returns:
          The requests that finished. They hold their pages until `release`.
        """
        finished = []
        page_size, requests = self.config.page_size, self._requests
        for request_id, start, token_ids, page_ids, samples, _ in plan.segments:
            request = requests.get(request_id)
            if request is None or request.page_ids is not page_ids or request.num_computed != start:
                continue  # what the step computed of it has no place any more
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
        """Ends a request, waiting or running, and returns it; None if there is none.

        A plan may hold it: `commit` passes over it then. One that has finished and waits for its
        `release` is left alone: None as well.
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
        """Sends all running requests back to the front of the queue, in order, to be recomputed."""
        while self.running:
            self._preempt_last()

    def restart(self, plan: StepPlan | None = None) -> None:
        """Lets all requests that are alive wait again, in order of arrival, with every page free.

        That is the way on from an error inside any other method, which leaves the books half
        written: nothing of them is read but which requests there are, and their tokens.

        Args:
          plan: what a `commit` that did not come to its end was called with: the tokens that it
            has appended are taken back.
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
        """Pages of the longest front of the request that the prefix cache holds.

        At least one token is left to compute, because the next one is sampled from its logits; as
        chunks start on boundaries, a full hit recomputes its last page.
        """
        if not self.config.enable_prefix_caching:
            return []
        num_full = (request.num_tokens - 1) // self.config.page_size
        self._extend_hashes(request, num_full)
        return self.pool.find(request.page_hashes[:num_full])

    def _publish(self, request: Request) -> None:
        """Offers the pages that have become full to the prefix cache."""
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
        """Gives `request` pages for `num_tokens` tokens, taking those of the last admitted."""
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
