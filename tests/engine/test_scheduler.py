# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The scheduler keeps its promises, and the check of them finds schedulers that do not."""

import array
import collections
import contextlib
import dataclasses
import random
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from reference_engine import page_pool as page_pool_lib
from reference_engine import scheduler as scheduler_lib
from reference_engine.config import EngineConfig
from reference_engine.page_pool import PagePool
from reference_engine.request import FinishReason, Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler, limit
from reference_engine.step_plan import StepPlan
from reference_engine.write_plan import plan_writes

STOP_TOKEN = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A request of a simulated run: when it comes, its lengths, and when it is taken back.

    The first `num_common` tokens are the same in all requests, as far as they have them.
    `abort_when`: at the step's "ended", or inside of it when it is "planned" or "committed".
    """

    arrival: int
    num_prompt: int
    max_tokens: int
    abort_at: int | None = None
    num_common: int = 0
    abort_when: str = "ended"


@dataclasses.dataclass(frozen=True)
class Scenario:
    config: EngineConfig
    jobs: tuple[Job, ...]
    seed: int = 0
    can_stop: bool = False  # whether one token in a hundred is the stop token
    runs_ahead: bool = False  # whether a step is planned before the tokens of the last are known


def make_config(**fields) -> EngineConfig:
    """An EngineConfig whose warning about soft alignment is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return EngineConfig(**fields)


@dataclasses.dataclass
class Run:
    """What a simulated run came to: per request, the chunks, the first-token step, the end."""

    chunks: dict[int, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    first_token_step: dict[int, int] = dataclasses.field(default_factory=dict)
    finish: dict[int, FinishReason] = dataclasses.field(default_factory=dict)
    num_steps: int = 0
    num_deferrals: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    num_aborts_in_a_step: int = 0
    num_late_aborts: int = 0
    num_discarded: int = 0
    num_empty_plans: int = 0


class Simulation:
    """Runs a scenario with random tokens for a model and checks every promise at every step.

    It keeps its own books (tokens, tokens computed, deferrals in a row, what every row of every
    page holds) and believes the scheduler's in nothing.
    """

    def __init__(self, scenario: Scenario):
        self.config = scenario.config
        self.jobs = scenario.jobs
        self.rng = random.Random(scenario.seed)
        self.runs_ahead = scenario.runs_ahead
        self.in_flight: tuple[StepPlan, list[int], int] | None = None  # plan, tokens, step
        self.lowest_token = STOP_TOKEN if scenario.can_stop else STOP_TOKEN + 1
        self.pool = PagePool(self.config.num_pages)
        self.scheduler = Scheduler(self.config, self.pool)
        self.requests: dict[int, Request] = {}
        self.tokens: dict[int, list[int]] = {}
        # What keys and values depend on: all tokens up to their own, so a hash of them stands in.
        self.fronts: dict[int, list[int]] = {}
        self.rows: dict[int, int] = {}  # slot -> the front whose keys and values are there
        self.common = [self.rng.randrange(1, 50) for _ in range(100)]
        self.computed: dict[int, int] = {}
        self.deferrals: dict[int, int] = {}
        self.left_over = 0  # tokens, less than a page, that the step before did not use
        self.result = Run()

    def run(self) -> Run:
        work = sum(job.num_prompt + job.max_tokens for job in self.jobs)
        bound = work + max((job.arrival for job in self.jobs), default=0) + 1
        bound *= 1 + self.runs_ahead
        step = 0
        while self.requests or any(job.arrival >= step for job in self.jobs):
            # The first in line gets at least one token each step and is never preempted.
            assert step <= bound, "a request starves"
            self._arrive(step)
            self._step(step)
            self._abort(step, "ended")
            step += 1
        self._commit()
        self.result.num_steps = step
        self.result.num_discarded = self.scheduler.num_discarded
        assert self.pool.num_free == self.config.num_pages, "pages leaked"
        assert not self.scheduler.waiting and not self.scheduler.running
        return self.result

    def _arrive(self, step):
        for request_id, job in enumerate(self.jobs):
            if job.arrival == step:
                own = [self.rng.randrange(1, 50) for _ in range(job.num_prompt)]
                prompt = tuple(
                    (self.common[: job.num_common] + own[job.num_common :])[: job.num_prompt]
                )
                params = SamplingParams(job.max_tokens, stop_token_ids=(STOP_TOKEN,))
                self.requests[request_id] = Request(request_id, prompt, params)
                self.tokens[request_id], self.fronts[request_id] = [], []
                for token in prompt:
                    self._know(request_id, token)
                self.computed[request_id] = self.deferrals[request_id] = 0
                self.scheduler.add(self.requests[request_id])

    def _know(self, request_id, token):
        self.tokens[request_id].append(token)
        fronts = self.fronts[request_id]
        fronts.append(hash((fronts[-1] if fronts else None, token)))

    def _abort(self, step, when, finished=()):
        for request_id, job in enumerate(self.jobs):
            if (job.abort_at, job.abort_when) == (step, when) and request_id in self.requests:
                request = self.scheduler.abort(request_id)
                if request_id in finished:
                    assert request is None and self.requests[request_id].page_ids
                    self.result.num_late_aborts += 1
                    continue
                assert request is self.requests[request_id]
                assert request.finish_reason is FinishReason.ABORT
                self._end(request)
                assert self.scheduler.abort(request_id) is None

    def _step(self, step):
        running = [r.request_id for r in self.scheduler.running]
        waiting = [r.request_id for r in self.scheduler.waiting]
        plan = self.scheduler.schedule(may_preempt=self.in_flight is None)
        if self.in_flight is None or not self.requests:
            assert bool(plan.segments) == bool(self.requests), "a step without progress"
        elif not plan.segments:
            self.result.num_empty_plans += 1
            self._commit()
            return
        for request_id in plan.preempted:
            self.computed[request_id] = 0
        self._check_budget(plan)
        self._check_order(plan, running, waiting)
        self._check_cached(plan, running)
        self._check_segments(plan)
        self._check_deferrals(plan)
        self._check_decodes(plan, running)
        self._check_pages(plan)
        self.result.num_deferrals += len(plan.deferrals)
        self.result.num_preemptions += len(plan.preempted)
        self._abort(step, "planned")
        new_tokens = []
        for segment in plan.segments:
            request_id = segment.request_id
            new_tokens.append(1)  # the model knows nothing of aborts
            if request_id not in self.requests:
                self.result.num_aborts_in_a_step += 1
                continue
            self.computed[request_id] = segment.end
            self.result.chunks.setdefault(request_id, []).append((segment.start, segment.end))
            if segment.end == len(self.tokens[request_id]):
                new_tokens[-1] = self.rng.randrange(self.lowest_token, 100)
                self._know(request_id, new_tokens[-1])
                self.result.first_token_step.setdefault(request_id, step)
        self.scheduler.begin(plan)
        if self.runs_ahead:
            self._commit()
        self.in_flight = plan, new_tokens, step
        if not self.runs_ahead:
            self._commit()

    def _commit(self):
        """Commits the step in flight, if there is one."""
        if self.in_flight is None:
            return
        plan, tokens, step = self.in_flight
        self.in_flight = None
        alive = [s.request_id for s in plan.segments if s.samples and s.request_id in self.requests]
        kept = self.scheduler.commit(plan, tokens)
        assert [request.request_id for _, request in kept] == alive, "a token was lost"
        finished = [request for _, request in kept if request.finish_reason is not None]
        self._abort(step, "committed", {request.request_id for request in finished})
        ends = {segment.request_id: segment.end for segment in plan.segments}
        for request in finished:
            end = ends[request.request_id]
            assert [*request.prompt_ids, *request.output_ids] == self.tokens[request.request_id][
                : end + 1
            ]
            assert (request.num_computed, request.num_tokens) == (end, end + 1), "not undone"
            assert len(request.page_ids) == -(-end // self.config.page_size), "a page too many"
            assert request.num_published == (end // self.config.page_size), (
                "published too much or too little"
            )
            self.scheduler.release(request)
            self._end(request)
        for request_id, request in self.requests.items():
            num_pending = request.num_tokens - request.num_known
            assert 0 <= num_pending <= self.runs_ahead
            assert [*request.prompt_ids, *request.output_ids] == self.tokens[request_id][
                : len(self.tokens[request_id]) - num_pending
            ]

    def _check_budget(self, plan):
        """All steps together stay within their budgets, and none is a page above."""
        config = self.config
        self.budget = config.max_num_batched_tokens + self.left_over
        assert plan.num_tokens <= self.budget, "budget overdrawn"
        assert plan.num_tokens <= config.max_step_tokens
        self.left_over = self.budget - plan.num_tokens
        if not config.page_aligned_scheduling or self.left_over >= config.page_size:
            self.left_over = 0
        if config.token_buckets:  # the most of every step
            self.left_over = 0

    def _check_order(self, plan, running, waiting):
        """First come, first served; pages are taken from the last admitted only."""
        assert len(plan.segments) <= self.config.max_num_seqs
        assert self.runs_ahead or len(self.scheduler.running) <= self.config.max_num_seqs
        now_running = [r.request_id for r in self.scheduler.running]
        kept = [r for r in running if r not in plan.preempted]
        assert list(plan.preempted) == running[len(kept) :][::-1]
        admitted = now_running[len(kept) :]
        assert now_running[: len(kept)] == kept
        assert not (plan.preempted and admitted)
        queue = [*reversed(plan.preempted), *waiting]
        assert admitted == queue[: len(admitted)]
        now_waiting = [r.request_id for r in self.scheduler.waiting]
        assert now_waiting == queue[len(admitted) :], "the queue was reordered"

    def _check_cached(self, plan, running):
        """An admitted request may start behind tokens that it shares, at a page boundary."""
        for segment in plan.segments:
            if segment.request_id not in running:
                assert segment.start == 0 or self.config.enable_prefix_caching
                assert segment.start % self.config.page_size == 0, "a shared page is not full"
                self.computed[segment.request_id] = segment.start
                self.result.num_cached += segment.start

    def _check_segments(self, plan):
        config = self.config
        ids = [segment.request_id for segment in plan.segments]
        assert len(set(ids)) == len(ids)
        for segment in plan.segments:
            tokens = self.tokens[segment.request_id]
            length = segment.end - segment.start
            assert length >= 1, "an empty segment"
            assert segment.start == self.computed[segment.request_id], "a gap or an overlap"
            assert self._known(segment.token_ids) == tokens[segment.start : segment.end]
            assert segment.end <= len(tokens) <= config.max_model_len
            assert segment.samples == (segment.end == len(tokens)), "a token too many or too few"
            assert segment.is_decode == self._is_decode(segment.request_id), "a wrong kind"
            if config.long_prefill_token_threshold and len(self.requests) > 1:
                assert length <= config.long_prefill_token_threshold, "above the threshold"
            if config.page_aligned_scheduling and not segment.samples:
                # Whoever samples ends where the tokens end; every other end is a boundary.
                on_boundary = segment.end % config.page_size == 0
                assert on_boundary or (
                    self.deferrals[segment.request_id] == config.max_deferrals
                ), "a chunk ends inside a page"

    def _known(self, token_ids):
        """The ids with the pending one, if there is one, looked up in the step in flight."""
        return [self.in_flight[1][-1 - i] if i < 0 else i for i in token_ids]

    def _check_deferrals(self, plan):
        deferred = {deferral.request_id for deferral in plan.deferrals}
        assert len(deferred) == len(plan.deferrals)
        assert self.config.page_aligned_scheduling or not deferred, "deferred without alignment"
        for segment in plan.segments:
            assert segment.request_id not in deferred
            self.deferrals[segment.request_id] = 0
        for deferral in plan.deferrals:
            request_id = deferral.request_id
            assert not self._is_decode(request_id), "a decode waits for a page boundary"
            assert deferral.budget > 0
            self.deferrals[request_id] += 1
            assert self.deferrals[request_id] <= self.config.max_deferrals, "deferred for ever"

    def _check_decodes(self, plan, running):
        """Every decode runs, in order, until the budget is spent."""
        ran = {segment.request_id for segment in plan.segments}
        if plan.num_tokens < self.budget:
            for request_id in running:
                job, num_tokens = self.jobs[request_id], len(self.tokens[request_id])
                is_ending = num_tokens >= min(
                    job.num_prompt + job.max_tokens, self.config.max_model_len
                )
                assert not is_ending or request_id not in ran, "a token too many"
                if self._is_decode(request_id) and not (request_id in plan.preempted or is_ending):
                    assert request_id in ran, "a decode was held back"

    def _is_decode(self, request_id):
        num_tokens = len(self.tokens[request_id])
        num_prompt = self.jobs[request_id].num_prompt
        return self.computed[request_id] >= max(num_prompt, num_tokens - 1)

    def _check_pages(self, plan):
        """Pages cover the tokens, hold what their readers think, and are written by one holder."""
        page_size = self.config.page_size
        holders = collections.Counter()
        for request in self.scheduler.running:
            assert len(request.page_ids) * page_size >= request.num_computed
            assert len(set(request.page_ids)) == len(request.page_ids), "a page twice in a table"
            holders.update(request.page_ids)
        assert all(not request.page_ids for request in self.scheduler.waiting)
        for page_id, count in holders.items():
            assert self.pool.references(page_id) == count, "references do not add up"
        assert len(holders) + self.pool.num_free == self.config.num_pages, "pages do not add up"
        for segment in plan.segments:
            for position in range(segment.start):
                slot = segment.page_ids[position // page_size] * page_size + position % page_size
                front = self.fronts[segment.request_id][position]
                assert self.rows.get(slot) == front, "a page does not hold its reader's tokens"
        slots = plan_writes(plan.segments, page_size).slots.tolist()
        assert len(set(slots)) == len(slots), "a slot is written twice"
        fronts = [f for s in plan.segments for f in self.fronts[s.request_id][s.start : s.end]]
        for slot, front in zip(slots, fronts, strict=True):
            assert holders[slot // page_size] == 1, "a write to a shared page"
            self.rows[slot] = front

    def _end(self, request):
        assert not request.page_ids
        self.result.finish[request.request_id] = request.finish_reason
        del self.requests[request.request_id]


def random_scenario(rng) -> Scenario:
    """A small scenario; `rng` offers randint(a, b), like random.Random and hypothesis'."""
    page_size = rng.randint(1, 9)
    budget = rng.randint(page_size, 40)
    threshold = rng.randint(0, 1) and rng.randint(page_size, budget)
    num_common = rng.randint(0, 1) and rng.randint(1, 60)
    jobs = tuple(
        Job(
            arrival=rng.randint(0, 12),
            num_prompt=rng.randint(1, 60),
            max_tokens=rng.randint(1, 40),
            abort_at=rng.randint(0, 40) if rng.randint(0, 3) == 0 else None,
            num_common=num_common and rng.randint(0, num_common),
            abort_when=("ended", "planned", "committed")[rng.randint(0, 2)],
        )
        for _ in range(rng.randint(1, 8))
    )
    longest = max(job.num_prompt + job.max_tokens for job in jobs)
    config = make_config(
        page_size=page_size,
        num_pages=-(-longest // page_size) + rng.randint(0, 12),
        max_model_len=longest - rng.randint(0, 2) if longest > 3 else 100,
        max_num_batched_tokens=budget,
        max_num_seqs=rng.randint(1, 6),
        page_aligned_scheduling=rng.randint(0, 3) > 0,
        token_buckets=(budget,) if rng.randint(0, 3) == 0 else None,
        long_prefill_token_threshold=threshold,
        max_deferrals=rng.randint(0, 3),
        enable_prefix_caching=rng.randint(0, 3) > 0,
    )
    jobs = tuple(job for job in jobs if job.num_prompt < config.max_model_len)
    return Scenario(
        config,
        jobs,
        seed=rng.randint(0, 1000),
        can_stop=True,
        runs_ahead=rng.randint(0, 1) == 1,
    )


def some_scenarios() -> list[Scenario]:
    return [random_scenario(random.Random(seed)) for seed in range(300)]


def resumed_past_its_prompt() -> Scenario:
    """Request 1 loses its pages with 30 tokens generated and computes them again in chunks."""
    config = make_config(
        page_size=8,
        max_num_batched_tokens=11,
        token_buckets=(11,),
        num_pages=8,
        max_num_seqs=2,
        max_model_len=60,
        enable_prefix_caching=False,
    )
    return Scenario(config, (Job(0, 3, 40), Job(0, 3, 40)))


class _Drawn:
    """random.Random's randint, drawn by hypothesis so that failures shrink."""

    def __init__(self, draw):
        self._draw = draw

    def randint(self, low, high):
        return self._draw(st.integers(low, high))


@st.composite
def scenarios(draw):
    return random_scenario(_Drawn(draw))


@hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=300,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(scenarios())
def test_every_promise_holds(scenario):
    Simulation(scenario).run()


def test_the_random_scenarios_reach_preemption_deferral_and_every_end():
    runs = [Simulation(scenario).run() for scenario in some_scenarios()]
    assert sum(run.num_preemptions for run in runs) > 100
    assert sum(run.num_deferrals for run in runs) > 100
    assert sum(run.num_cached for run in runs) > 1000
    assert sum(run.num_aborts_in_a_step for run in runs) > 10
    assert sum(run.num_late_aborts for run in runs) > 0
    assert sum(run.num_discarded for run in runs) > 10
    assert sum(run.num_empty_plans for run in runs) > 100
    assert {reason for run in runs for reason in run.finish.values()} == set(FinishReason)


# Planted faults. The check above is worth what it finds.


def _floor_the_length(request, computed, budget, contended, config):
    n = _unaligned_limit(request, computed, budget, contended, config)
    is_decode = computed >= max(request.num_prompt, request.num_tokens - 1)
    if n == 0 or is_decode or computed + n == request.num_tokens:
        return n
    aligned = n // config.page_size * config.page_size
    if aligned:
        return aligned
    return 0 if request.num_deferrals < config.max_deferrals else n


def _page_rounded_charge_that_stalls(request, computed, budget, contended, config):
    n = limit(request, computed, budget, contended, config)
    return n if n == 1 or -(-n // config.page_size) * config.page_size <= budget else 0


def _one_token_is_exempt(request, computed, budget, contended, config):
    n = _unaligned_limit(request, computed, budget, contended, config)
    return n if n == 1 else limit(request, computed, budget, contended, config)


def _defer_for_ever(request, computed, budget, contended, config):
    patient = dataclasses.replace(request, num_deferrals=-1)
    return limit(patient, computed, budget, contended, config)


def _resumed_counts_as_decode(request, computed, budget, contended, config):
    if computed >= request.num_prompt:
        return _unaligned_limit(request, computed, budget, contended, config)
    return limit(request, computed, budget, contended, config)


def _decodes_are_aligned(request, computed, budget, contended, config):
    n = limit(request, computed, budget, contended, config)
    return n if (computed + n) % config.page_size == 0 or computed < request.num_prompt else 0


def _budget_ignored(request, computed, budget, contended, config):
    return limit(request, computed, budget + 1, contended, config)


def _a_page_is_left_over(budget, config):
    return budget


def _more_is_left_over(budget, config):
    return min(_real_left_over(budget, config) + 1, config.page_size - 1)


def _threshold_ignored(request, computed, budget, contended, config):
    return limit(request, computed, budget, False, config)


def _unaligned_limit(request, computed, budget, contended, config):
    config = make_config(**{**vars(config), "page_aligned_scheduling": False})
    return limit(request, computed, budget, contended, config)


def _allocate_twice(pool, num_pages):
    page_ids = _real_allocate(pool, num_pages)
    if page_ids:
        pool._free[page_ids[-1]] = None
    return page_ids


def _skip_a_token_behind_the_cached(request, start, end):
    return _real_segment(request, min(start + bool(request.num_cached == start > 0), end - 1), end)


def _publish_before_it_is_computed(scheduler, request, cached, num_new):
    _real_admit(scheduler, request, cached, num_new)
    computed, request.num_computed = request.num_computed, request.num_tokens
    scheduler._publish(request)
    request.num_computed = computed


def _full_hit_recomputes_nothing(scheduler, request):
    scheduler._extend_hashes(request, request.num_tokens // scheduler.config.page_size)
    return scheduler.pool.find(request.page_hashes)


def _publish_the_partial_page(scheduler, request):
    computed = request.num_computed
    request.num_computed = min(
        len(request.page_ids) * scheduler.config.page_size, request.num_tokens
    )
    _real_publish(scheduler, request)
    request.num_computed = computed


def _hash_without_the_front(parent, token_ids):
    return page_pool_lib.page_hash(b"", token_ids)


def _hand_out_and_still_know(pool, page_id):
    pass


def _leave_a_found_page_free(pool, found, num_new):
    page_ids = _real_take(pool, found, num_new)
    if found:
        pool._free[found[-1]] = None
    return page_ids


def _preempt_to_the_back(scheduler):
    victim = _real_preempt(scheduler)
    scheduler.waiting.rotate(-1)
    return victim


def _free_nothing(scheduler, request):
    request.page_ids = array.array("i")


def _sample_from_every_chunk(request, start, end):
    return _real_segment(request, start, end)._replace(samples=True)


def _call_every_output_a_decode(request, start, end):
    return _real_segment(request, start, end)._replace(is_decode=start >= request.num_prompt)


_real_left_over = scheduler_lib.left_over
_real_allocate = PagePool.allocate
_real_take = PagePool.take
_real_preempt = Scheduler._preempt_last
_real_admit = Scheduler._admit
_real_publish = Scheduler._publish
_real_segment = scheduler_lib._segment

PLANTED = [
    (scheduler_lib, "limit", _floor_the_length, "ends inside a page"),
    (scheduler_lib, "limit", _page_rounded_charge_that_stalls, "without progress"),
    (scheduler_lib, "limit", _one_token_is_exempt, "ends inside a page"),
    (scheduler_lib, "limit", _defer_for_ever, "deferred for ever"),
    (scheduler_lib, "limit", _resumed_counts_as_decode, "ends inside a page"),
    (scheduler_lib, "limit", _decodes_are_aligned, "a decode waits"),
    (scheduler_lib, "limit", _budget_ignored, "budget overdrawn"),
    (scheduler_lib, "left_over", _a_page_is_left_over, "budget overdrawn"),
    (scheduler_lib, "left_over", _more_is_left_over, "budget overdrawn"),
    (scheduler_lib, "limit", _threshold_ignored, "above the threshold"),
    (scheduler_lib, "_segment", _sample_from_every_chunk, "a token too many"),
    (scheduler_lib, "_segment", _call_every_output_a_decode, "a wrong kind"),
    (PagePool, "allocate", _allocate_twice, "pages do not add up"),
    (PagePool, "take", _leave_a_found_page_free, "pages do not add up"),
    (PagePool, "_forget", _hand_out_and_still_know, "does not hold its reader's tokens"),
    (scheduler_lib, "page_hash", _hash_without_the_front, "does not hold its reader's tokens"),
    (scheduler_lib, "_segment", _skip_a_token_behind_the_cached, "a shared page is not full"),
    (Scheduler, "_admit", _publish_before_it_is_computed, "does not hold its reader's tokens"),
    (Scheduler, "_publish", _publish_the_partial_page, "does not hold its reader's tokens"),
    (Scheduler, "_find_cached", _full_hit_recomputes_nothing, "deferred"),
    (Scheduler, "_preempt_last", _preempt_to_the_back, "the queue was reordered"),
    (Scheduler, "_free_pages", _free_nothing, "references do not add up"),
]


@pytest.mark.parametrize(
    "owner, name, fault, message", PLANTED, ids=[fault.__name__ for _, _, fault, _ in PLANTED]
)
def test_the_check_finds_planted_faults(monkeypatch, owner, name, fault, message):
    monkeypatch.setattr(owner, name, fault)
    found = []
    for scenario in [resumed_past_its_prompt(), *some_scenarios()]:
        with contextlib.suppress(KeyError, ValueError):  # a fault may also trip over itself
            try:
                Simulation(scenario).run()
            except AssertionError as error:
                found.append(str(error))
        if found and message in found[-1]:
            return
    raise AssertionError(f"no scenario ended with {message!r}; the first three: {found[:3]}")


def test_the_check_finds_a_break_in_the_running_loop(monkeypatch):
    """Whoever cannot be scheduled stops everyone behind it: decodes are held back."""
    blocked_at = {}

    def limit_then_break(request, computed, budget, contended, config):
        if blocked_at.get("budget") == budget and blocked_at.get("request") is not request:
            return 0
        n = limit(request, computed, budget, contended, config)
        blocked_at.clear()
        if n == 0:
            blocked_at.update(budget=budget, request=request)
        return n

    monkeypatch.setattr(scheduler_lib, "limit", limit_then_break)
    with pytest.raises(AssertionError, match="a decode waits for a page boundary"):
        Simulation(decode_behind_a_deferred_prefill()).run()


def test_a_resumed_request_is_aligned_past_its_prompt():
    run = Simulation(resumed_past_its_prompt()).run()
    assert run.num_preemptions == 1
    resumed = run.chunks[1][run.chunks[1].index((0, 8)) :]
    assert resumed[:3] == [(0, 8), (8, 16), (16, 24)]


# The faults that vLLM PR #19878 had as printed, one by one.


def simulate(config, *jobs) -> Run:
    return Simulation(Scenario(config, tuple(jobs))).run()


def test_no_stall_where_the_page_does_not_divide_the_budget():
    config = make_config(page_size=64, max_num_batched_tokens=100, num_pages=50)
    run = simulate(config, Job(0, 90, 1))
    assert run.chunks[0] == [(0, 90)]
    run = simulate(config, Job(0, 154, 1))
    assert run.chunks[0] == [(0, 64), (64, 154)]


def test_no_starvation_of_a_tail_beside_steady_decodes():
    config = make_config(
        page_size=64, max_num_batched_tokens=192, num_pages=99, max_num_seqs=4, max_model_len=999
    )
    decodes = [Job(0, 1, 60), Job(0, 2, 60)]
    run = simulate(config, *decodes, Job(1, 180, 3))
    assert run.first_token_step[2] == 1
    assert all(end - start == 1 for start, end in run.chunks[0][1:])


def decode_behind_a_deferred_prefill() -> Scenario:
    """At step 3 request 0 ends its prompt with 12 tokens, which leaves request 1 seven of eight."""
    config = make_config(
        page_size=8,
        max_num_batched_tokens=19,
        token_buckets=(19,),
        num_pages=99,
        max_num_seqs=4,
        long_prefill_token_threshold=12,
    )
    return Scenario(config, (Job(0, 36, 5), Job(0, 100, 5), Job(0, 3, 9)))


def test_decodes_behind_a_deferred_prefill_run():
    run = Simulation(decode_behind_a_deferred_prefill()).run()
    assert run.num_deferrals == 1
    assert run.chunks[0][3] == (24, 36)
    assert run.chunks[1][2:4] == [(16, 24), (24, 32)]
    assert run.chunks[2][:4] == [(0, 3), (3, 4), (4, 5), (5, 6)]


def test_one_function_limits_running_and_waiting_requests_alike(monkeypatch):
    """The PR's clauses stood in both loops, one copy of them wrong."""

    def at_most_two(request, computed, budget, contended, config):
        return min(2, budget, request.num_tokens - computed)

    monkeypatch.setattr(scheduler_lib, "limit", at_most_two)
    config = make_config(page_size=8, num_pages=20, max_num_batched_tokens=16, max_num_seqs=4)
    scheduler = Scheduler(config, PagePool(20))
    for i in range(3):
        scheduler.add(Request(i, (i,) * 5, SamplingParams(1)))
    for chunk in ((0, 2), (2, 4), (4, 5)):  # admitted, then twice running
        plan = scheduler.schedule()
        assert [(s.start, s.end) for s in plan.segments] == [chunk] * 3
        run_plan(scheduler, plan)


def run_plan(scheduler, plan):
    """Begins and commits a plan whose new tokens are all 9; the requests that have finished."""
    scheduler.begin(plan)
    kept = scheduler.commit(plan, [9] * len(plan.segments))
    return [request for _, request in kept if request.finish_reason is not None]


def run_one(scheduler, request):
    """Runs a request alone; its chunks."""
    scheduler.add(request)
    chunks = []
    while request.finish_reason is None:
        plan = scheduler.schedule()
        chunks += [(segment.start, segment.end) for segment in plan.segments]
        for finished in run_plan(scheduler, plan):
            scheduler.release(finished)
    return chunks


def test_a_full_hit_recomputes_its_last_page():
    config = make_config(page_size=4, max_num_batched_tokens=32, num_pages=20)
    scheduler = Scheduler(config, PagePool(20))
    prompt = tuple(range(1, 13))
    assert run_one(scheduler, Request(0, prompt, SamplingParams(1))) == [(0, 12)]
    again = Request(1, prompt, SamplingParams(3))
    assert run_one(scheduler, again) == [(8, 12), (12, 13), (13, 14)]
    assert again.num_cached == 8
    # One token more: all three full pages are found. One token other: those in front of it.
    assert run_one(scheduler, Request(2, (*prompt, 7), SamplingParams(1))) == [(12, 13)]
    other = (*prompt[:6], 99, *prompt[7:])
    assert run_one(scheduler, Request(3, other, SamplingParams(1))) == [(4, 12)]
    assert scheduler.pool.num_free == 20


def test_generated_tokens_are_found_too():
    config = make_config(page_size=4, max_num_batched_tokens=32, num_pages=20)
    scheduler = Scheduler(config, PagePool(20))
    first = Request(0, (1, 2, 3), SamplingParams(7))
    run_one(scheduler, first)
    turn = Request(1, (*first.prompt_ids, *first.output_ids, 5), SamplingParams(1))
    assert run_one(scheduler, turn) == [(8, 11)]  # the last output was never written


def test_what_is_left_of_a_budget_never_becomes_an_empty_chunk():
    config = make_config(page_size=64, max_num_batched_tokens=131, num_pages=50, max_num_seqs=2)
    run = simulate(config, Job(0, 100, 1), Job(0, 130, 1))
    assert run.chunks == {0: [(0, 100)], 1: [(0, 130)]}


def test_exactly_one_token_left_is_no_exception():
    config = make_config(
        page_size=64,
        max_num_batched_tokens=101,
        token_buckets=(101,),
        num_pages=50,
        max_num_seqs=2,
    )
    run = simulate(config, Job(0, 100, 1), Job(0, 200, 1))
    assert run.chunks[1] == [(0, 64), (64, 128), (128, 200)]


def test_max_model_len_clamps_before_anything_is_classified():
    config = make_config(page_size=64, max_num_batched_tokens=256, max_model_len=100)
    request = Request(0, (1,) * 90, SamplingParams(50), output_ids=[2] * 15)
    # Known tokens beyond max_model_len (as drafts would be): a decode takes what fits.
    assert limit(request, 99, 256, True, config) == 1
    assert limit(request, 100, 256, True, config) == 0


def test_a_resumed_request_is_a_prefill_until_its_newest_token():
    config = make_config(page_size=8, max_num_batched_tokens=16)
    request = Request(0, (1,) * 10, SamplingParams(50), output_ids=[2] * 20)
    assert limit(request, 0, 11, True, config) == 8
    assert limit(request, 8, 15, True, config) == 8
    assert limit(request, 16, 7, True, config) == 0  # position 23 is an output; still a prefill
    assert limit(request, 24, 7, True, config) == 6  # the end: any length
    assert limit(request, 29, 1, True, config) == 1


def test_a_long_prompt_waits_boundedly_while_decodes_leave_less_than_a_page():
    # 60 decodes leave 4 of 64 tokens, below the page of 8, until they end at step 400.
    config = make_config(
        page_size=8,
        max_num_batched_tokens=64,
        token_buckets=(64,),
        num_pages=8000,
        max_num_seqs=61,
        max_model_len=1000,
        max_deferrals=2,
    )
    decodes = [Job(0, 1, 400)] * 60
    run = Simulation(Scenario(config, (*decodes, Job(1, 32, 2)))).run()
    assert run.first_token_step[60] <= 1 + 3 * (32 // 4)
    assert len(run.chunks[60]) > 32 // 8
    # Where a step may be longer than the budget, two steps leave the page together.
    config = make_config(**(vars(config) | {"token_buckets": None, "max_deferrals": 1}))
    run = Simulation(Scenario(config, (*decodes, Job(1, 32, 2)))).run()
    assert run.chunks[60][:4] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert run.first_token_step[60] == 7  # chunks at steps 1, 3, 5 and 7


# What alignment leaves of a step's budget.


def test_the_next_step_has_what_a_step_leaves():
    config = make_config(page_size=64, max_num_batched_tokens=100, num_pages=50)
    run = simulate(config, Job(0, 900, 1))
    ends = [end for _, end in run.chunks[0]]
    assert ends == [*(100 * step // 64 * 64 for step in range(1, 9)), 900]


def test_aligned_steps_are_as_many_as_others():
    """Whatever the page size; with the budget as the most of every step they are more."""
    rng = random.Random(0)
    jobs = [Job(rng.randint(0, 60), rng.randint(1, 400), rng.randint(1, 60)) for _ in range(60)]
    fields = {"num_pages": 9999, "max_num_seqs": 99, "max_num_batched_tokens": 128}

    def num_steps(**more):
        return simulate(make_config(**(fields | more)), *jobs).num_steps

    others = num_steps(page_aligned_scheduling=False)
    for page_size in (8, 16, 32):
        assert num_steps(page_size=page_size) <= others + 1
        assert num_steps(page_size=page_size, token_buckets=(128,)) > others + 1


def test_only_less_than_a_page_is_left_over_and_only_by_alignment():
    config = make_config(page_size=8, max_num_batched_tokens=20, max_num_seqs=12)
    assert [scheduler_lib.left_over(n, config) for n in (0, 1, 7, 8, 19)] == [0, 1, 7, 0, 0]
    for fields in ({"page_aligned_scheduling": False}, {"token_buckets": (20,)}):
        exact = dataclasses.replace(config, **fields)
        assert [scheduler_lib.left_over(n, exact) for n in range(20)] == [0] * 20
    longer = dataclasses.replace(config, token_buckets=(22, 23))
    assert [scheduler_lib.left_over(n, longer) for n in (2, 3, 4, 7, 8)] == [2, 3, 3, 3, 0]


def test_a_plan_leaves_something_over_only_if_it_begins():
    config = make_config(page_size=8, max_num_batched_tokens=20, num_pages=99)
    scheduler = Scheduler(config, PagePool(99))
    scheduler.add(Request(0, (1,) * 200, SamplingParams(2)))
    for _ in range(3):
        plan = scheduler.schedule()
        assert (plan.num_tokens, plan.budget, plan.left_over) == (16, 20, 4)
    run_plan(scheduler, plan)
    assert scheduler.schedule().num_tokens == 24
    run_plan(scheduler, scheduler.schedule())
    scheduler.preempt_all()
    scheduler.restart()
    assert scheduler.schedule().budget == 20


# The rule itself, and the configurations that cannot work.


def request_of(num_prompt, num_output=0, num_deferrals=0):
    return Request(
        0,
        (1,) * num_prompt,
        SamplingParams(50),
        output_ids=[2] * num_output,
        num_deferrals=num_deferrals,
    )


@pytest.mark.parametrize(
    "computed, budget, deferrals, want",
    [
        (0, 100, 0, 96),  # floors to the boundary
        (0, 16, 0, 16),
        (0, 15, 0, 0),  # short of the first boundary: wait ...
        (0, 15, 1, 0),
        (0, 15, 2, 15),  # ... but not for ever
        (15, 1, 0, 1),  # one token that reaches the boundary
        (15, 16, 0, 1),  # from inside a page: back to the boundary, not 16 further
        (15, 17, 0, 17),
        (192, 8, 0, 8),  # the end of the prompt, any length
        (190, 100, 0, 10),
        (192, 7, 0, 0),  # the end does not fit and no boundary is in reach
        (200, 100, 0, 0),  # nothing left
        (0, 0, 2, 0),
    ],
)
def test_limit(computed, budget, deferrals, want):
    config = make_config(page_size=16, max_num_batched_tokens=256, max_deferrals=2)
    request = request_of(200, num_deferrals=deferrals)
    assert limit(request, computed, budget, True, config) == want


def test_without_alignment_limit_is_the_budget():
    config = make_config(page_size=16, page_aligned_scheduling=False)
    for budget in (1, 15, 16, 17, 100):
        assert limit(request_of(200), 0, budget, True, config) == budget
        assert limit(request_of(200), 195, budget, True, config) == min(budget, 5)


def test_the_threshold_binds_only_while_another_request_competes():
    config = make_config(page_size=16, long_prefill_token_threshold=40)
    assert limit(request_of(200), 0, 256, True, config) == 32
    assert limit(request_of(200), 0, 256, False, config) == 200


def test_preemption_takes_the_last_admitted_and_recomputes_it():
    # Two requests of 4 pages each at their end, 6 pages in all.
    config = make_config(page_size=4, max_num_batched_tokens=32, num_pages=6, max_num_seqs=2)
    pool = PagePool(6)
    scheduler = Scheduler(config, pool)
    requests = [Request(i, (5,) * 8, SamplingParams(8)) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    preempted, num_steps = [], 0
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        preempted += plan.preempted
        for request in run_plan(scheduler, plan):
            scheduler.release(request)
        num_steps += 1
    assert preempted == [1]
    assert [len(request.output_ids) for request in requests] == [8, 8]
    assert requests[1].num_preemptions == 1
    assert pool.num_free == 6


@pytest.mark.parametrize("caching", [False, True])
def test_a_plan_that_is_not_committed_is_planned_again(caching):
    config = make_config(
        page_size=4,
        max_num_batched_tokens=8,
        num_pages=20,
        max_num_seqs=2,
        enable_prefix_caching=caching,
    )
    scheduler = Scheduler(config, PagePool(20))
    scheduler.add(Request(0, tuple(range(1, 14)), SamplingParams(2)))
    first = scheduler.schedule()
    assert scheduler.schedule() == first
    scheduler.begin(first)
    scheduler.commit(first, [9])
    scheduler.preempt_all()
    assert scheduler.pool.num_free == 20
    assert scheduler.schedule().segments[0].start == (8 if caching else 0)


def test_ten_thousand_requests_with_aborts_end_with_the_pool_full_again():
    rng = random.Random(7)
    config = make_config(
        page_size=8, max_num_batched_tokens=256, num_pages=150, max_num_seqs=48, max_model_len=200
    )
    scheduler = Scheduler(config, PagePool(150))
    common = [rng.randrange(50) for _ in range(64)]
    alive, ended, preempted, cached = set(), collections.Counter(), 0, 0
    arrived = 0
    while arrived < 10_000 or alive:
        for _ in range(min(rng.randrange(16), 10_000 - arrived)):
            prompt = (*common[: rng.randrange(64)], *rng.choices(range(50), k=rng.randrange(1, 60)))
            scheduler.add(Request(arrived, prompt, SamplingParams(rng.randrange(1, 24))))
            alive.add(arrived)
            arrived += 1
        if alive and rng.random() < 0.5:
            victim = rng.choice(list(alive)[:100])
            ended[scheduler.abort(victim).finish_reason] += 1
            alive.remove(victim)
        plan = scheduler.schedule()
        preempted += len(plan.preempted)
        for request in run_plan(scheduler, plan):
            scheduler.release(request)
            ended[request.finish_reason] += 1
            cached += request.num_cached
            alive.remove(request.request_id)
    assert ended.total() == 10_000 and ended[FinishReason.ABORT] > 500
    assert preempted > 100 and cached > 10_000
    assert scheduler.pool.num_free == 150
    assert not any(scheduler.pool.references(page) for page in range(150))
    assert not scheduler.waiting and not scheduler.running and scheduler.get(0) is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"page_size": 0}, "EngineConfig: argument `page_size` is 0; wanted an int >= 1"),
        ({"num_pages": 2.5}, "argument `num_pages` is 2.5"),
        ({"page_size": 256, "max_num_batched_tokens": 128}, "wanted at least page_size=256"),
        ({"page_size": 64, "long_prefill_token_threshold": 48}, "0 or at least page_size=64"),
        ({"max_deferrals": -1}, "argument `max_deferrals` is -1"),
        ({"kv_write": "rows"}, "is 'rows'; wanted one of"),
        ({"token_buckets": (64, 32)}, "argument `token_buckets` is \\(64, 32\\)"),
        ({"seq_buckets": (4,)}, "the last of them at least 16"),
        ({"seq_buckets": 16}, "argument `seq_buckets` is 16; wanted a rising tuple"),
        ({"seq_buckets": (True, 16)}, "argument `seq_buckets` is \\(True, 16\\)"),
        ({"max_num_seqs": True}, "argument `max_num_seqs` is True; wanted an int >= 1"),
        ({"max_deferrals": False}, "argument `max_deferrals` is False; wanted an int >= 0"),
        ({"enable_prefix_caching": "no"}, "`enable_prefix_caching` is 'no'; wanted True or False"),
        ({"page_aligned_scheduling": None}, "`page_aligned_scheduling` is None; wanted True or"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(fields, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)


def test_numbers_may_be_numpys():
    config = EngineConfig(
        page_size=np.int64(8),
        max_deferrals=np.uint8(0),
        seq_buckets=np.array([8, 16]),
        return_logits=np.True_,
    )
    assert config == EngineConfig(
        page_size=8, max_deferrals=0, seq_buckets=(8, 16), return_logits=True
    )
    assert type(config.page_size) is int and hash(config) == hash(dataclasses.replace(config))


def test_small_budgets_and_thresholds_are_fine_without_alignment():
    EngineConfig(
        page_size=64,
        max_num_batched_tokens=48,
        long_prefill_token_threshold=8,
        page_aligned_scheduling=False,
    )


def test_soft_alignment_is_announced():
    with pytest.warns(UserWarning, match="below max_num_seqs \\+ page_size = 16 \\+ 64"):
        EngineConfig(page_size=64, max_num_batched_tokens=79)
    EngineConfig(page_size=64, max_num_batched_tokens=80)
