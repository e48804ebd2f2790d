# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""One step ahead, the engine comes to what it comes to step by step, whatever befalls a request."""

import collections
import dataclasses
import functools
import hashlib
import random

import jax
import numpy as np
import pytest

from reference_engine import LLM, FinishReason
from reference_engine import engine as engine_lib
from reference_engine import sampler as sampler_lib
from reference_engine import scheduler as scheduler_lib
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.page_pool import page_hash
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler
from reference_engine.weights import random_params
from tests.engine.checkpoints import byte_tokenizer, write_checkpoint

VOCAB = 23
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
# One shape, and the oracle: the bits of a row depend on nothing but its tokens.
CONFIG = EngineConfig(
    attention_backend="oracle",
    page_size=4,
    num_pages=60,
    max_model_len=48,
    max_num_batched_tokens=16,
    max_num_seqs=4,
    token_buckets=(16,),
    seq_buckets=(4,),
)


@functools.cache
def params():
    return random_params(MODEL, seed=1)


class DeviceError(Exception):
    pass


class Unreadable:
    """Tokens of a program that has failed on the device, which shows when they are read."""

    def __array__(self, *args, **kwargs):
        raise DeviceError


class FailingEngine(Engine):
    """An engine whose steps fail as `failures` says: how, by the number of the call."""

    def __init__(self, *args, failures, **options):
        super().__init__(*args, **options)
        self.failures = failures
        self.num_calls = self.num_failures = 0

    def _fails(self, *kinds):
        if self.failures.get(self.num_calls) not in kinds:
            return None
        self.num_failures += 1
        return self.failures.pop(self.num_calls)

    def _run(self, batch, last_tokens, **options):
        kind = self._fails("before", "with the pool")
        if kind == "with the pool":
            super()._run(batch, last_tokens, **options)
        if kind:
            raise DeviceError
        return super()._run(batch, last_tokens, **options)

    def _collect(self, step):
        if self._fails("on the device"):
            step = dataclasses.replace(step, tokens=Unreadable())
        super()._collect(step)

    def step(self):
        self.num_calls += 1
        return super().step()


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, the step in which it comes, and the number of tokens after which it is aborted."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int
    abort_after: int | None


@dataclasses.dataclass(frozen=True)
class Scenario:
    config: EngineConfig
    jobs: tuple[Job, ...]
    failures: dict[int, str]


def random_scenario(seed: int) -> Scenario:
    rng = random.Random(seed)
    front = [rng.randrange(VOCAB) for _ in range(24)]
    jobs, has_aborts = [], rng.random() < 0.5
    for _ in range(rng.randint(2, 8)):
        own = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 14))]
        kind = rng.choice(["greedy", "drawn", "penalised", "bad words"])
        fields = {}
        if kind == "drawn":
            fields = {"temperature": 0.9, "top_p": 0.95, "top_k": rng.choice([0, 5])}
        elif kind == "penalised":
            fields = {"repetition_penalty": 1.6, "presence_penalty": 0.4, "frequency_penalty": 0.3}
        elif kind == "bad words" and rng.random() < 0.6:
            fields = {"bad_words": [(rng.randrange(VOCAB),), tuple(rng.choices(range(VOCAB), k=2))]}
        num_stops = rng.choice([0, 0, 2, 4])
        jobs.append(
            Job(
                tuple(front[: rng.choice([0, 5, 12, 24])] + own),
                SamplingParams(
                    max_tokens=rng.choice([1, 2, 5, 9, 30, 30]),
                    seed=rng.randrange(100),
                    stop_token_ids=tuple(rng.sample(range(VOCAB), num_stops)),
                    min_tokens=rng.choice([0, 0, 1]) if num_stops else 0,
                    logprobs=rng.choice([None, None, 0, 3]),
                    **fields,
                ),
                arrival=rng.randint(0, 12),
                abort_after=rng.choice([None, 0, 1, 3]) if has_aborts else None,
            )
        )
    fails = rng.random() < 0.5
    kinds = ("before", "with the pool", "on the device")
    config = dataclasses.replace(
        CONFIG,
        num_pages=rng.choice([12, 12, 60]),
        max_num_seqs=rng.randint(2, 4),
        enable_prefix_caching=rng.random() < 0.7,
        page_aligned_scheduling=rng.random() < 0.5,
        max_num_batched_tokens=rng.choice([8, 11, 16]),
    )
    return Scenario(
        config,
        tuple(jobs),
        {n: rng.choice(kinds) for n in rng.sample(range(40), 5)} if fails else {},
    )


@dataclasses.dataclass
class Run:
    """What a run came to, by request: its tokens, and what `on_finish` saw."""

    outputs: dict[int, list] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    ends: dict[int, tuple] = dataclasses.field(default_factory=dict)


def run(scenario: Scenario, *, ahead: bool) -> tuple[Run, FailingEngine]:
    result = Run()

    def on_finish(request):
        result.ends[request.request_id] = end_of(engine, request)

    config = dataclasses.replace(scenario.config, async_scheduling=ahead)
    failures = dict(scenario.failures) if ahead else {}
    engine = FailingEngine(params(), MODEL, config, failures=failures, on_finish=on_finish)
    ids, now = {}, 0
    jobs = sorted(enumerate(scenario.jobs), key=lambda job: job[1].arrival)
    while jobs or engine.has_work or engine._outputs:
        while jobs and (jobs[0][1].arrival <= now or not engine.has_work):
            number, job = jobs.pop(0)
            ids[engine.add_request(job.prompt, job.params)] = number
            if job.abort_after == 0 and number % 2:
                engine.abort(max(ids))
        try:
            outputs = engine.step()
        except DeviceError:
            outputs = []
        for output in outputs:
            tokens = result.outputs[output.request_id]
            tokens.append((output.token_id, output.finish_reason, output.logprobs))
            limit = scenario.jobs[ids[output.request_id]].abort_after
            if limit is not None and len(tokens) >= max(limit, 1) and not output.finish_reason:
                assert engine.abort(output.request_id).num_tokens == (
                    len(scenario.jobs[ids[output.request_id]].prompt) + len(tokens)
                )
        assert_balanced(engine)
        now += 1
        assert now < 1000, "a run without an end"
    assert not engine._in_flight
    assert engine.scheduler.pool.num_free == config.num_pages, "a page leaked"
    # A step that fails on the device takes the one after it along.
    assert engine.stats.num_late_steps <= engine.stats.num_steps + 2 * engine.num_failures
    return result, engine


def end_of(engine: Engine, request: Request) -> tuple:
    """What a callback can see of a request that has finished."""
    page_size = engine.config.page_size
    tokens = [*request.prompt_ids, *request.output_ids]
    digest, hashes = b"", []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        digest = page_hash(digest, tokens[start : start + page_size])
        hashes.append(digest)
    known = request.page_hashes
    assert known == hashes[: len(known)], "a hash of other tokens"
    assert request.num_published <= request.num_computed // page_size, "published too much"
    kv = np.ascontiguousarray(engine.read_kv(request))
    return (
        request.finish_reason,
        request.num_computed,
        request.num_tokens,
        request.num_published,
        len(request.page_ids),
        hashlib.sha256(kv.tobytes()).hexdigest(),
    )


def assert_balanced(engine: Engine) -> None:
    held = collections.Counter(
        page for request in engine.scheduler.running for page in request.page_ids
    )
    pool = engine.scheduler.pool
    assert [pool.references(i) for i in range(pool.num_pages)] == [
        held[i] for i in range(pool.num_pages)
    ]


@functools.cache
def in_turn(seed: int) -> Run:
    return run(random_scenario(seed), ahead=False)[0]


def check(seed: int) -> FailingEngine:
    """Runs a scenario in both loops; the engine that was one step ahead."""
    want = in_turn(seed)
    got, engine = run(random_scenario(seed), ahead=True)
    assert got.outputs == want.outputs
    assert got.ends == want.ends
    jobs, stats = random_scenario(seed).jobs, engine.stats
    if engine.num_failures == 0 and all(job.abort_after is None for job in jobs):
        stops = [end for end in got.ends.values() if end[0] is FinishReason.STOP]
        assert stats.num_discarded <= len(stops), "computed a token too many"
        if stats.num_preemptions == 0:
            num_computed = sum(end[1] for end in got.ends.values())
            assert stats.num_tokens + stats.num_cached == num_computed, "a wrong count"
    return engine


SEEDS = range(40)


@pytest.fixture(autouse=True, scope="module")
def _in_turn_first():
    """The runs to compare with are made before any planted bug."""
    for seed in SEEDS:
        in_turn(seed)


def test_random_requests_come_to_the_same_one_step_ahead():
    engines = [check(seed) for seed in SEEDS]
    stats = [engine.stats for engine in engines]
    assert sum(one.num_discarded for one in stats) > 30
    assert sum(one.num_preemptions for one in stats) > 5
    assert sum(one.num_cached for one in stats) > 200
    assert sum(engine.num_failures for engine in engines) > 30
    reasons = [reason for seed in SEEDS for reason, *_ in in_turn(seed).ends.values()]
    assert reasons.count(FinishReason.STOP) > 20 and reasons.count(FinishReason.LENGTH) > 20


class RecordingEngine(Engine):
    """Records what is dispatched (+) and what is read (-), by the number of the step."""

    def __init__(self, config, **options):
        super().__init__(params(), MODEL, config, **options)
        self.events, self.numbers = [], {}

    def _dispatch(self, plan):
        step, kv_pages = super()._dispatch(plan)
        self.numbers[step] = number = len(self.numbers) + 1
        self.events.append(number)
        return step, kv_pages

    def _collect(self, step):
        self.events.append(-self.numbers[step])
        super()._collect(step)


def events_of(config, *requests):
    engine = RecordingEngine(config)
    for prompt, sampling in requests:
        engine.add_request(prompt, sampling)
    tokens = engine.run()
    return engine, tokens, engine.events


def test_a_step_is_dispatched_before_the_step_before_is_read():
    one = ([1, 2, 3], SamplingParams(5))
    engine, tokens, events = events_of(CONFIG, one)
    assert events == [1, 2, -1, 3, -2, 4, -3, 5, -4, -5]
    assert (engine.stats.num_steps, engine.stats.num_discarded) == (5, 0)
    assert engine.stats.num_tokens == 3 + 5 - 1
    in_turn = dataclasses.replace(CONFIG, async_scheduling=False)
    late, want, events = events_of(in_turn, one)
    assert events == [1, -1, 2, -2, 3, -3, 4, -4, 5, -5]
    assert late.stats.num_late_steps == late.stats.num_steps == 5
    assert want == tokens


def test_a_token_too_many_is_computed_only_where_no_one_could_know():
    tokens = events_of(CONFIG, ([1, 2, 3], SamplingParams(9)))[1][0]
    stop = next(i for i in range(1, 9) if tokens[i] not in tokens[:i])
    params = SamplingParams(9, stop_token_ids=(tokens[stop],))
    engine, got, events = events_of(CONFIG, ([1, 2, 3], params))
    assert got == {0: tokens[: stop + 1]}
    assert events[-1] == -(stop + 1) and max(events) == stop + 2  # the last one is never read
    assert engine.stats.num_discarded == 1
    assert engine.stats.num_tokens == 3 + stop
    long = dataclasses.replace(CONFIG, max_model_len=8)
    engine, got, _ = events_of(long, ([1, 2, 3], SamplingParams(None)))
    assert len(got[0]) == 5 and engine.stats.num_discarded == 0


class TokensOfABusyDevice:
    """Tokens that are not there before they are waited for."""

    def __init__(self, tokens):
        self.tokens, self.has_waited = tokens, False

    def is_ready(self):
        return self.has_waited

    def __array__(self, *args, **kwargs):
        self.has_waited = True
        return np.asarray(self.tokens)


class BusyEngine(Engine):
    def _dispatch(self, plan):
        step, kv_pages = super()._dispatch(plan)
        return dataclasses.replace(step, tokens=TokensOfABusyDevice(step.tokens)), kv_pages


@pytest.mark.parametrize("ahead", [False, True])
def test_late_steps_are_those_that_find_the_device_idle(ahead):
    config = dataclasses.replace(CONFIG, async_scheduling=ahead)
    engine = BusyEngine(params(), MODEL, config)
    for _ in range(2):  # with a pause between them
        engine.add_request([1, 2, 3], SamplingParams(5))
        engine.run()
    assert engine.stats.num_steps == 10
    assert engine.stats.num_late_steps == (2 if ahead else 10)
    assert 0 < engine.stats.wait_seconds < engine.stats.seconds


def test_bad_words_are_forbidden_behind_the_newest_token():
    free = events_of(CONFIG, ([1, 2, 3], SamplingParams(6)))[1][0]
    params = SamplingParams(6, bad_words=[tuple(free[1:3])])
    _, got, events = events_of(CONFIG, ([1, 2, 3], params))
    assert got[0][:2] == free[:2] and got[0][2] != free[2]
    assert events == [1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6]


def test_no_request_loses_its_pages_while_its_token_is_unknown():
    small = dataclasses.replace(CONFIG, num_pages=12)
    requests = [([i] * 9, SamplingParams(30)) for i in range(3)]
    engine, got, events = events_of(small, *requests)
    assert engine.stats.num_preemptions > 0 and engine.stats.num_discarded == 0
    assert got == events_of(dataclasses.replace(small, async_scheduling=False), *requests)[1]
    # Before somebody loses its pages, all that was dispatched is read.
    assert any(events[i - 1] < 0 and events[i] < 0 for i in range(1, len(events) - 1))


def test_an_error_at_the_dispatch_leaves_the_step_before_to_be_read(monkeypatch):
    want = events_of(CONFIG, ([1, 2, 3], SamplingParams(4)))[1][0]
    engine = Engine(params(), MODEL, CONFIG)
    engine.add_request([1, 2, 3], SamplingParams(4))
    assert engine.step() == []

    def fail(*args, **options):
        raise DeviceError

    outputs = []
    with monkeypatch.context() as patch:  # for ever
        patch.setattr(engine_lib, "run_step", fail)
        with pytest.raises(DeviceError):
            engine.step()
        outputs += engine.step()
        for _ in range(3):
            with pytest.raises(DeviceError):
                engine.step()
    assert [output.token_id for output in outputs] == want[:1]
    while engine.has_work:
        outputs += engine.step()
    assert [output.token_id for output in outputs] == want
    assert engine.stats.num_tokens == 3 + 4 - 1  # nothing was computed twice


def test_an_error_on_the_device_is_an_error_of_the_read(monkeypatch):
    """A program that fails when it runs takes along what was dispatched behind it."""
    want = events_of(CONFIG, ([1, 2, 3], SamplingParams(6)))[1][0]
    engine = Engine(params(), MODEL, CONFIG)
    engine.add_request([1, 2, 3], SamplingParams(6))
    real, calls = engine_lib.run_step, []

    def boom(logits):
        raise DeviceError("planted")

    @jax.jit
    def spoil(logits):
        return jax.pure_callback(boom, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits)

    def run_step(*args, **options):
        logits, *others = real(*args, **options)
        calls.append(len(calls))
        return (spoil(logits) if calls[-1] == 2 else logits), *others

    monkeypatch.setattr(engine_lib, "run_step", run_step)
    outputs, errors = [], []
    while engine.has_work:
        try:
            outputs += engine.step()
        except Exception as error:
            errors.append(str(error))
            assert not engine._in_flight and not engine.scheduler.running
    assert len(errors) == 1 and "planted" in errors[0]
    assert [output.token_id for output in outputs] == want
    assert engine.scheduler.pool.num_free == CONFIG.num_pages


def test_an_interrupt_during_the_wait_leaves_the_step_in_flight(monkeypatch):
    class Interrupted(np.ndarray):
        def __array__(self, *args, **kwargs):
            raise KeyboardInterrupt

    want = events_of(CONFIG, ([1, 2, 3], SamplingParams(4)))[1][0]
    engine = Engine(params(), MODEL, CONFIG)
    engine.add_request([1, 2, 3], SamplingParams(4))
    outputs = engine.step()
    real = engine_lib.read_extras

    def interrupt(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_lib, "read_extras", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine_lib, "read_extras", real)
    assert len(engine._in_flight) == 2
    while engine.has_work:
        outputs += engine.step()
    assert [output.token_id for output in outputs] == want
    assert engine.stats.num_tokens == 3 + 4 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, seed=3, tokenizer=byte_tokenizer())
    return path


def test_stop_strings_end_the_same_in_both_loops(folder):
    """LLM ends these, a step after the engine could have."""
    config = EngineConfig(
        attention_backend="oracle",
        page_size=4,
        num_pages=64,
        max_model_len=96,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        token_buckets=(32,),
        seq_buckets=(4,),
    )
    prompts = ["the quick brown fox", "jumps over", "the lazy dog, and the dog sleeps", "dog"]
    free = SamplingParams(max_tokens=24, temperature=1.0, seed=4)
    llms = [LLM(folder, config, async_scheduling=ahead) for ahead in (False, True)]
    whole = [llm.generate(prompts, free) for llm in llms]
    assert whole[0] == whole[1]
    texts = [output.outputs[0].text for output in whole[0]]
    stops = [text[n : n + 2] for text, n in zip(texts, (3, 6, 9, 5), strict=True)]
    assert all(stops)
    each = [dataclasses.replace(free, stop=stop, logprobs=1) for stop in stops]
    want, got = (llm.generate(prompts, each) for llm in llms)
    assert got == want
    assert {output.outputs[0].finish_reason for output in got} == {FinishReason.STOP}
    assert llms[1].engine.stats.num_discarded >= 4 > llms[0].engine.stats.num_discarded == 0
    for llm in llms:
        assert llm.engine.scheduler.pool.num_free == 64 and not llm.engine._in_flight


# Planted bugs.


def _publish_a_pending_token(scheduler, request):
    num_full = request.num_computed // scheduler.config.page_size
    if scheduler.config.enable_prefix_caching:
        scheduler._extend_hashes(request, num_full)
        for i in range(request.num_published, num_full):
            scheduler.pool.publish(request.page_ids[i], request.page_hashes[i])
    request.num_published = num_full


def _keep_the_extra_page(scheduler, request, end):
    request.forget_pending()
    request.num_computed = end


def _keep_the_extra_count(scheduler, request, end):
    computed = request.num_computed
    _real_undo(scheduler, request, end)
    request.num_computed = computed


def _keep_the_pending_token(scheduler, request, end):
    num_tokens = request.num_tokens
    _real_undo(scheduler, request, end)
    request.num_tokens = num_tokens


def _free_pages_and_keep_the_pending_token(scheduler, request):
    num_tokens, row = request.num_tokens, request.pending_row
    _real_free(scheduler, request)
    request.num_tokens, request.pending_row = num_tokens, row


def _take_the_next_row(request, start, end):
    segment = _real_segment(request, start, end)
    ids = tuple(i - 1 if i < 0 else i for i in segment.token_ids)
    return segment._replace(token_ids=ids)


def _compute_the_pending_token_twice(request, start, end):
    """One off: the position before it, in its place."""
    segment = _real_segment(request, start, end)
    return segment._replace(start=start - (request.pending_row >= 0))


def _foresee_no_end(scheduler, request):
    _real_add(scheduler, request)
    if request.max_tokens < 30:
        request.max_length += 1


def _foresee_nothing(draft_or_scheduler, draft, may_preempt):
    limits = [(request, request.max_length) for request in draft_or_scheduler.running]
    for request, _ in limits:
        request.max_length = 10**9
    try:
        return _real_plan_running(draft_or_scheduler, draft, may_preempt)
    finally:
        for request, length in limits:
            request.max_length = length


def _preempt_at_any_time(scheduler, draft, may_preempt):
    return _real_plan_running(scheduler, draft, True)


def _penalise_known_tokens_alone(requests, num_seqs, max_model_len, rows=None):
    return _real_make_penalties(requests, num_seqs, max_model_len)


def _count_known_tokens_alone(request):
    return len(request.output_ids)


def _keep_the_pool(engine, plan=None, *, is_pool_lost=False):
    """And go on behind the tokens of the failed steps, which nobody has read."""
    engine._in_flight.clear()
    for request in engine.scheduler.running:
        request.forget_pending()


_real_undo = Scheduler._undo_what_follows
_real_free = Scheduler._free_pages
_real_add = Scheduler.add
_real_plan_running = Scheduler._plan_running
_real_segment = scheduler_lib._segment
_real_make_penalties = sampler_lib.make_penalties


@pytest.mark.parametrize(
    "owner, name, fault",
    [
        (Scheduler, "_publish", _publish_a_pending_token),
        (Scheduler, "_undo_what_follows", _keep_the_extra_page),
        (Scheduler, "_undo_what_follows", _keep_the_extra_count),
        (Scheduler, "_undo_what_follows", _keep_the_pending_token),
        (Scheduler, "_free_pages", _free_pages_and_keep_the_pending_token),
        (Scheduler, "add", _foresee_no_end),
        (Scheduler, "_plan_running", _foresee_nothing),
        (Scheduler, "_plan_running", _preempt_at_any_time),
        (scheduler_lib, "_segment", _take_the_next_row),
        (scheduler_lib, "_segment", _compute_the_pending_token_twice),
        (sampler_lib, "make_penalties", _penalise_known_tokens_alone),
        (sampler_lib, "num_output", _count_known_tokens_alone),
        (Engine, "_recover", _keep_the_pool),
    ],
    ids=lambda x: x.__name__ if callable(x) and not isinstance(x, type) else "",
)
def test_a_planted_bug_is_seen(monkeypatch, owner, name, fault):
    monkeypatch.setattr(owner, name, fault)
    for seed in SEEDS:
        try:
            check(seed)
        except Exception:
            return
    raise AssertionError("no scenario shows it")
