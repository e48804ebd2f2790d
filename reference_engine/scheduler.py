# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The scheduler: which tokens each step computes. Pure Python.

A request has no phase: each step lets its `num_computed` catch up with its `num_tokens`. One
function, `limit`, states every limit on the next chunk of a request, whether it runs or waits.
"""

from __future__ import annotations

import array
import collections
from collections.abc import Sequence
from typing import Protocol

from reference_engine.config import EngineConfig, num_pages_for
from reference_engine.page_pool import PagePool, page_hash
from reference_engine.request import FinishReason, Request
from reference_engine.step_plan import Blocked, Deferral, Draft, Segment, StepPlan


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
    if request.num_tokens - computed == 1 and computed < config.max_model_len:
        # As in every decode. The rules below come to the same, in 0.7 in place of 0.1 us.
        return 1 if budget > 0 else 0
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


def left_over(budget: int, config: EngineConfig) -> int:
    """What of the `budget` that a step has left goes to the next step, beside that step's own.

    Chunks that end on page boundaries leave less than a page, which would cost up to a page of
    throughput in every step. Any number of steps in a row so have as many tokens as their budgets
    allow together, to less than a page. It is the deficit counter of deficit round robin (Shreedhar
    and Varghese, 1995). Without alignment it is 0.

    >>> config = EngineConfig(page_size=16, max_num_batched_tokens=64)
    >>> [left_over(budget, config) for budget in (0, 5, 15, 16)]
    [0, 5, 15, 0]
    """
    if not config.page_aligned_scheduling or budget >= config.page_size:
        return 0  # nobody wanted a whole page
    return min(budget, config.max_step_tokens - config.max_num_batched_tokens)


class Scheduler:
    """The requests in the order of their arrival, and the pages that they hold.

    Attributes:
      waiting: the requests without pages, the first to be admitted first. A request that is
        preempted becomes the first again.
      running: the requests with pages, in the order of their admission.
      num_cached: the number of tokens that admitted requests have found in the prefix cache.
      num_discarded: the number of tokens that were computed for requests which had ended or lost
        their pages by the time of the commit.
    """

    def __init__(self, config: EngineConfig, pool: PagePool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self.num_cached = self.num_discarded = 0
        self._left_over = 0  # of the budget of the step that has begun last
        self._requests: dict[int, Request] = {}  # the waiting and the running ones, by id

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        self._enter(request)
        self.waiting.append(request)

    def adopt(self, request: Request, num_computed: int) -> bool:
        """Lets a new request run at once, of which the first tokens are computed elsewhere.

        Nothing is changed, and False is returned, if too few pages are free for all of its tokens,
        or if as many requests run as may.
        """
        if len(self.running) >= self.config.max_num_seqs:
            return False
        num_pages = num_pages_for(request.num_tokens, self.config.page_size)
        if (page_ids := self.pool.allocate(num_pages)) is None:
            return False
        self._enter(request)
        request.page_ids.extend(page_ids)
        request.num_computed = num_computed
        self.running.append(request)
        return True

    def _enter(self, request: Request) -> None:
        request.max_length = min(request.num_prompt + request.max_tokens, self.config.max_model_len)
        self._requests[request.request_id] = request

    def get(self, request_id: int) -> Request | None:
        """The live request with this id, None if there is none."""
        return self._requests.get(request_id)

    def requests_of(self, plan: StepPlan) -> list[Request]:
        """The live requests of a plan's segments, in order."""
        requests = self._requests
        return [requests[segment.request_id] for segment in plan.segments]

    def schedule(self, *, may_preempt: bool = True) -> StepPlan:
        """Plans one step.

        The pages are taken here; `begin` counts the tokens when the step has been dispatched. A
        plan that is never begun does no harm: the next plan holds the same tokens again.

        A request that ends with the token that a step in flight yields, whichever that is, gets
        nothing more. It keeps its pages until that token has been committed.

        Args:
          may_preempt: whether requests may lose their pages. Where one would have to and may not,
            the plan is empty.
        """
        budget = self.config.max_num_batched_tokens + self._left_over
        draft = Draft(budget, len(self.running) + len(self.waiting) > 1)
        if not self._plan_running(draft, may_preempt):
            return StepPlan(())
        # A preempted request needs the pages that an admission would take.
        if not draft.preempted:
            self._plan_waiting(draft)
        return draft.finish(budget=budget, left_over=left_over(draft.budget, self.config))

    def _plan_running(self, draft: Draft, may_preempt: bool) -> bool:
        """Gives each running request its next chunk; False if one must not be preempted but has to.

        A request that cannot use the rest of the budget does not stop the requests after it, above
        all the decodes.
        """
        config, page_size = self.config, self.config.page_size
        budget, contended, segments = draft.budget, draft.contended, draft.segments
        for request in self.running:  # whoever is preempted in the loop is the last of them
            if budget <= 0:
                break
            if request.num_tokens >= request.max_length:
                draft.num_ending += 1
                continue
            computed = request.num_computed
            n = limit(request, computed, budget, contended, config)
            if n == 0:
                draft.deferrals.append(Deferral(request.request_id, computed, budget))
                continue
            if computed + n > len(request.page_ids) * page_size:
                missing = num_pages_for(computed + n, page_size) - len(request.page_ids)
                if missing > self.pool.num_free and not may_preempt:
                    return False
                if not self._grow(request, missing, draft.preempted):
                    continue
            segments.append(_segment(request, computed, computed + n))
            budget -= charge(n)
        draft.budget = budget
        return True

    def _plan_waiting(self, draft: Draft) -> None:
        """Admits waiting requests, first come, first served, and gives each its first chunk."""
        config, page_size = self.config, self.config.page_size
        while self.waiting and draft.budget > 0:
            request = self.waiting[0]
            cached = self._find_cached(request)
            # A request gets pages for all of its tokens at once. Requests that had got only some
            # of their pages could wait for each other's pages for ever.
            num_new = num_pages_for(request.num_tokens, page_size) - len(cached)
            is_full = len(self.running) - draft.num_ending >= config.max_num_seqs
            if is_full or not self.pool.can_take(cached, num_new):
                draft.blocked = Blocked(request.request_id, num_new, self.pool.num_free)
                break
            computed = len(cached) * page_size
            n = limit(request, computed, draft.budget, draft.contended, config)
            if n == 0:
                draft.deferrals.append(Deferral(request.request_id, computed, draft.budget))
                break
            self._admit(request, cached, num_new)
            draft.segments.append(_segment(request, computed, computed + n))
            draft.budget -= charge(n)

    def begin(self, plan: StepPlan) -> None:
        """Counts the plan's tokens as computed, because the step has been dispatched.

        Whoever samples has one token more from now on, which is pending until `commit`. Requests
        that were aborted or lost their pages since the plan was made are skipped.

        Pages that become full are published to the prefix cache here, and not before: within one
        step, no request may read a page that another request writes. Later steps run later on the
        device, so they find the page written. A page with a pending token has no hash yet; `commit`
        publishes it.
        """
        page_size, requests = self.config.page_size, self._requests
        self._left_over = plan.left_over
        for row, (request_id, start, token_ids, page_ids, samples, _) in enumerate(plan.segments):
            request = requests.get(request_id)
            if request is None or request.page_ids is not page_ids or request.num_computed != start:
                continue
            request.num_computed = end = start + len(token_ids)
            request.num_deferrals = 0
            if end >= (request.num_published + 1) * page_size:
                self._publish(request)
            if samples:
                request.num_tokens += 1
                request.pending_row = row
        for deferral in plan.deferrals:
            waiter = requests.get(deferral.request_id)
            if waiter is not None:
                waiter.num_deferrals += 1

    def commit(self, plan: StepPlan, tokens: Sequence[int]) -> list[tuple[int, Request]]:
        """Appends the tokens that a step has yielded, and ends requests.

        Requests that have ended or lost their pages since `begin` are skipped, and what the step
        has computed for them is counted in `num_discarded`.

        A request may end while the next step, which has begun, computes its last token. That is
        undone: neither the token's keys and values nor the page that was taken for them alone are
        the request's. The page is free at once, although the device may still write to it, because
        whoever gets it writes in a later step, which runs later on the device.

        Args:
          plan: what was computed.
          tokens: the new token of each segment, in order; those of segments that do not sample mean
            nothing.

        Returns:
          For each token that was appended, the number of its segment and its request. Requests that
          have finished hold their pages until `release`.
        """
        kept: list[tuple[int, Request]] = []
        page_size, requests = self.config.page_size, self._requests
        for row, (request_id, start, token_ids, page_ids, samples, _) in enumerate(plan.segments):
            request = requests.get(request_id)
            if request is None or request.page_ids is not page_ids:
                self.num_discarded += len(token_ids)
                continue  # the pages that the step wrote are not this request's any more
            end = start + len(token_ids)
            output_ids = request.output_ids
            if not samples or request.num_prompt + len(output_ids) != end:
                continue  # the second: the plan was committed before
            output_ids.append(token := tokens[row])
            kept.append((row, request))
            if token in request.stop_ids or end + 1 >= request.max_length:
                request.finish_reason = _finish_reason(request, end + 1)
                if request.finish_reason is not None:
                    self._undo_what_follows(request, end)
                    continue
            if request.num_tokens == end + 1:
                request.pending_row = -1
            if request.num_computed >= (request.num_published + 1) * page_size:
                self._publish(request)
        return kept

    def _undo_what_follows(self, request: Request, end: int) -> None:
        """Takes back what a later step computes of a request that ends after `end` computed tokens.

        At most one page was taken for it, because a request holds no page without a use.
        """
        request.forget_pending()
        request.num_computed = end
        num_pages = num_pages_for(end, self.config.page_size)
        self.pool.release(request.page_ids[num_pages:])
        del request.page_ids[num_pages:]

    def release(self, request: Request) -> None:
        """Forgets a running request and gives its pages back."""
        self.running.remove(request)
        del self._requests[request.request_id]
        self._free_pages(request)

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """Ends a waiting or running request and returns it; returns None if there is none.

        A plan may hold the request: `commit` skips it then, and the tokens that steps in flight
        yield are none of it. A request that has finished and waits for its `release` is left as it
        is, and None is returned.
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
        """Moves all running requests to the start of the queue, in order, to be recomputed.

        The tokens that steps in flight yield for them are discarded, and computed again.
        """
        while self.running:
            self._preempt_last()

    def restart(self, plan: StepPlan | None = None) -> None:
        """Frees every page and lets all live requests wait again, in the order of their arrival.

        That is how the scheduler goes on after an error inside another method. The error may have
        left its state half written, so only the requests and their tokens are read from it. Tokens
        that steps in flight yield are discarded, and computed again.

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
            request.forget_pending()
            request.num_computed = request.num_published = request.num_deferrals = 0
            request.page_hashes = []
        self._requests = {request.request_id: request for request in alive}
        self.running, self.waiting = [], collections.deque(alive)
        self._left_over = 0

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
        """Publishes the pages that have become full, of known tokens, to the prefix cache."""
        num_full = min(request.num_computed, request.num_known) // self.config.page_size
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

    def _grow(self, request: Request, missing: int, preempted: list[int]) -> bool:
        """Gives `request` the missing pages; False if it lost all of its own instead.

        Where too few pages are free, the requests that were admitted last are preempted.
        """
        while (page_ids := self.pool.allocate(missing)) is None:
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
        """Gives all pages back, and with them what steps in flight compute for the request.

        The pages are free at once, although a step in flight may still write to them: whoever gets
        them writes in a later step, which runs later on the device.
        """
        self.pool.release(request.page_ids)
        request.page_ids = array.array("i")  # a plan may still refer to the old one
        request.forget_pending()


def _segment(request: Request, start: int, end: int) -> Segment:
    samples = end == request.num_tokens
    if samples and end - start == 1 and start >= request.num_prompt:
        # As most segments are. A pending token comes alone, because all before it are computed.
        row = request.pending_row
        newest = request.output_ids[-1] if row < 0 else -1 - row
        fields = request.request_id, start, (newest,), request.page_ids, True, True
        return tuple.__new__(Segment, fields)  # in half the time of Segment(*fields)
    token_ids, decodes = request.token_ids(start, end), is_decode(request, start)
    return Segment(request.request_id, start, token_ids, request.page_ids, samples, decodes)


def _finish_reason(request: Request, num_known: int) -> FinishReason | None:
    output_ids = request.output_ids
    if output_ids[-1] in request.stop_ids and len(output_ids) >= request.params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_known >= request.max_length else None
