# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Callbacks, aborts, errors and interrupts at any place of a step: pages balance, tokens are right.

The model is a toy whose next token depends on every token that the page tables lead to.
"""

import collections
import dataclasses
import gc
import linecache
import random
import sys
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from reference_engine import engine as engine_lib
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.llm import LLM
from reference_engine.page_pool import PagePool
from reference_engine.request import FinishReason, Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler
from tests.engine.checkpoints import byte_tokenizer, write_checkpoint

VOCAB = 31
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
)
CONFIG = EngineConfig(
    page_size=4,
    num_pages=24,
    max_model_len=64,
    max_num_batched_tokens=16,
    max_num_seqs=5,
    token_buckets=(16,),
    seq_buckets=(5,),
)


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["in_turn", "ahead"])
def _both_loops(request):
    """Each test runs in both loops: one step after the other, and one step ahead."""
    global CONFIG
    before = CONFIG
    CONFIG = dataclasses.replace(CONFIG, async_scheduling=request.param)
    yield
    CONFIG = before


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


class CallbackError(Exception):
    pass


def next_token(tokens) -> int:
    state = 7
    for token in tokens:
        state = (state * 131 + token + 1) % 1_000_003
    return state % VOCAB


def wanted_tokens(prompt, num_tokens) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class ToyEngine(Engine):
    """An engine whose pool holds tokens, and whose model reads them through the page tables."""

    def __init__(self, config=None, **options):
        config = config or CONFIG
        super().__init__({}, MODEL, config, **options)
        self.rows = np.full((config.num_pages, config.page_size), -1)
        self.in_model = lambda: None  # called in the middle of a step

    def _run(self, batch, last_tokens, **options):
        self.in_model()
        last_tokens = np.asarray(last_tokens)
        page_size = self.config.page_size
        logits = np.zeros((len(batch.kv_lens), VOCAB), np.float32)
        page_table = np.array(self._page_table.take())
        rows, columns, pages = batch.page_changes[:, batch.page_changes[0] >= 0]
        page_table[rows, columns] = pages
        ends = batch.cu_q_lens
        for i in range(int(batch.num_seqs[0])):
            new = batch.token_ids[ends[i] : ends[i + 1]].tolist()
            new = [int(last_tokens[-1 - token]) if token < 0 else token for token in new]
            length = int(batch.kv_lens[i])
            table = page_table[batch.table_rows[i]]
            for position, token in zip(range(length - len(new), length), new, strict=True):
                self.rows[table[position // page_size], position % page_size] = token
            tokens = self.rows[table[: -(-length // page_size)]].ravel()[:length]
            logits[i, next_token(tokens.tolist())] = 1
        self._page_table.on_device = page_table
        return logits, self._kv_pages

    def lose_the_pool(self):
        """As a program that fails after it has taken the pool."""
        self._kv_pages.delete()
        self.rows[:] = -1
        raise CallbackError


def assert_balanced(engine):
    held = collections.Counter(
        page for request in engine.scheduler.running for page in request.page_ids
    )
    pool = engine.scheduler.pool
    assert [pool.references(i) for i in range(pool.num_pages)] == [
        held[i] for i in range(pool.num_pages)
    ]
    assert pool.num_free == pool.num_pages - len(held)


def assert_all_free(engine):
    assert not engine.has_work
    assert engine.scheduler.pool.num_free == engine.config.num_pages
    assert_balanced(engine)


def add_some(engine, count=6, seed=0):
    """Requests with common fronts, two of each length; id -> (prompt, number of tokens)."""
    rng = random.Random(seed)
    front = [rng.randrange(VOCAB) for _ in range(20)]
    jobs = {}
    for i in range(count):
        prompt = front[: rng.randrange(13)] + [rng.randrange(VOCAB) for _ in range(1 + i // 2)]
        num_tokens = 3 + i // 2
        jobs[engine.add_request(prompt, SamplingParams(num_tokens))] = (prompt, num_tokens)
    return jobs


def collect(engine, tokens):
    """Steps to the end, in spite of errors."""
    while engine.has_work or engine._outputs:
        try:
            outputs = engine.step()
        except (CallbackError, Interrupt):
            assert_balanced(engine)
            continue
        assert_balanced(engine)
        for output in outputs:
            tokens[output.request_id].append(output.token_id)
    assert_all_free(engine)


# Callbacks.


@pytest.mark.parametrize("victims", ["itself", "its twin", "all", "twice", "unknown"])
def test_on_finish_may_abort_whatever_it_likes(victims):
    answers, told = [], []

    def on_finish(request):
        told.append(request.request_id)
        ids = {
            "itself": [request.request_id],
            "its twin": [0, 1],
            "all": range(8),
            "twice": [2, 2],
            "unknown": [99, -1],
        }[victims]
        for i in ids:
            was_alive = (alive := engine.scheduler.get(i)) is not None and not alive.finish_reason
            answer = engine.abort(i)
            assert (answer is not None) == was_alive
            answers.append(answer)

    engine = ToyEngine(on_finish=on_finish)
    prompts = [[3, 1], [4, 1], [5] * 9, [6, 7, 8]]
    lengths = [2, 2, 9, 5]
    for prompt, length in zip(prompts, lengths, strict=True):
        engine.add_request(prompt, SamplingParams(length))
    tokens = collections.defaultdict(list)
    collect(engine, tokens)
    assert told[:2] == [0, 1]
    aborted = {request.request_id for request in answers if request is not None}
    assert aborted == {"all": {2, 3}, "twice": {2}}.get(victims, set())
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        want = wanted_tokens(prompt, length)
        if i in aborted:  # nothing of a request comes after its abort, its token of now included
            assert tokens[i] == want[:1]
        else:
            assert tokens[i] == want
    for request in filter(None, answers):
        assert request.finish_reason is FinishReason.ABORT


def test_a_finished_request_keeps_its_reason():
    seen = []

    def on_finish(request):
        assert engine.abort(request.request_id) is None
        assert engine.read_kv(request).shape[2] == request.num_computed == 3
        seen.append(request)

    engine = ToyEngine(on_finish=on_finish)
    engine.add_request([1, 2, 3], SamplingParams(1))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH]
    assert seen[0].finish_reason is FinishReason.LENGTH


def test_on_finish_may_add_requests():
    added = {}

    def on_finish(request):
        if request.request_id < 3:
            prompt = [*request.prompt_ids, *request.output_ids]
            added[engine.add_request(prompt, SamplingParams(4))] = prompt

    engine = ToyEngine(on_finish=on_finish)
    engine.add_request([1, 2, 3], SamplingParams(3))
    tokens = engine.run()
    assert len(added) == 3
    for request_id, prompt in added.items():
        assert tokens[request_id] == wanted_tokens(prompt, 4)
    assert_all_free(engine)


def test_on_finish_that_raises_costs_no_token_and_no_other_callback():
    told = []

    def on_finish(request):
        told.append(request.request_id)
        raise CallbackError(request.request_id)

    engine = ToyEngine(on_finish=on_finish)
    jobs = add_some(engine)
    tokens = collections.defaultdict(list)
    collect(engine, tokens)
    assert tokens == {i: wanted_tokens(*job) for i, job in jobs.items()}
    assert sorted(told) == sorted(jobs)


def test_run_goes_on_where_a_callback_stopped_it():
    fails = [True]

    def on_finish(request):
        if fails.pop():
            raise CallbackError

    engine = ToyEngine(on_finish=on_finish)
    request_id = engine.add_request([1, 2, 3], SamplingParams(1))
    with pytest.raises(CallbackError):
        engine.run()
    assert_all_free(engine)
    assert engine.run() == {request_id: wanted_tokens([1, 2, 3], 1)}
    assert engine.run() == {} and engine.step() == []


@pytest.mark.parametrize("name", ["step", "run"])
def test_a_step_inside_a_step_is_refused(name):
    def on_finish(request):
        getattr(engine, name)()

    engine = ToyEngine(on_finish=on_finish)
    jobs = {engine.add_request([1, 2], SamplingParams(2)): ([1, 2], 2)}
    jobs[engine.add_request([5, 2], SamplingParams(6))] = ([5, 2], 6)
    while not engine.step():
        pass
    with pytest.raises(RuntimeError, match="Engine.step: called inside of a step, by a callback"):
        engine.step()
    engine._on_finish = None
    got = engine.run()
    assert got == {i: wanted_tokens(*job)[1:] for i, job in jobs.items()}
    assert_all_free(engine)


# Aborts and errors between schedule and commit.


def test_an_abort_in_the_middle_of_a_step():
    """As by a finalizer or by the handler of a signal."""
    engine = ToyEngine()
    jobs = add_some(engine)
    answers = []

    def in_model():
        answers.extend([engine.abort(1), engine.abort(1), engine.abort(77), engine.abort(5)])
        assert engine.scheduler.get(1).page_ids  # its pages are in use

    engine.in_model = in_model
    outputs = engine.step()
    assert [answer and answer.request_id for answer in answers] == [1, None, None, 5]
    assert all(answers[i].finish_reason is FinishReason.ABORT for i in (0, 3))
    assert not {1, 5} & {output.request_id for output in outputs}
    engine.in_model = lambda: None
    tokens = collections.defaultdict(list)
    for output in outputs:
        tokens[output.request_id].append(output.token_id)
    collect(engine, tokens)
    assert tokens == {i: wanted_tokens(*job) for i, job in jobs.items() if i not in (1, 5)}


def test_an_abort_and_an_error_in_one_step():
    engine = ToyEngine()
    jobs = add_some(engine)

    def in_model():
        engine.abort(0)
        raise CallbackError

    engine.in_model = in_model
    with pytest.raises(CallbackError):
        engine.step()
    engine.in_model = lambda: None
    assert engine.run() == {i: wanted_tokens(*job) for i, job in jobs.items() if i != 0}
    assert_all_free(engine)


def scheduler_with(*prompts):
    scheduler = Scheduler(CONFIG, PagePool(CONFIG.num_pages))
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(i, tuple(prompt), SamplingParams(2)))
    return scheduler


@pytest.mark.parametrize("is_begun", [False, True])
def test_commit_passes_over_whoever_has_lost_its_pages(is_begun):
    for lose in (lambda s: s.abort(1), lambda s: s.preempt_all(), lambda s: s.restart()):
        scheduler = scheduler_with([1, 2], [3, 4], [5, 6])
        plan = scheduler.schedule()
        if is_begun:
            scheduler.begin(plan)
        lose(scheduler)
        if not is_begun:
            scheduler.begin(plan)
        kept = scheduler.commit(plan, [9, 9, 9])
        alive = [scheduler.get(i) for i in range(3) if scheduler.get(i) is not None]
        assert [request for _, request in kept] == [r for r in alive if r in scheduler.running]
        assert [bool(r.output_ids) for r in alive] == [r in scheduler.running for r in alive]
        assert all(r.num_tokens == r.num_known and r.pending_row == -1 for r in alive)
        assert scheduler.num_discarded == 2 * (3 - len(kept))
        while scheduler.running or scheduler.waiting:
            plan = scheduler.schedule()
            scheduler.begin(plan)
            for _, request in scheduler.commit(plan, [9] * len(plan.segments)):
                if request.finish_reason is not None:
                    scheduler.release(request)
        assert scheduler.pool.num_free == CONFIG.num_pages
        assert all(request.output_ids == [9, 9] for request in alive)


def test_a_plan_is_committed_once():
    scheduler = scheduler_with([1, 2])
    plan = scheduler.schedule()
    scheduler.begin(plan)
    assert len(scheduler.commit(plan, [9])) == 1
    assert scheduler.commit(plan, [9]) == []
    assert scheduler.get(0).output_ids == [9]


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that befalls a step: where, what, and whom."""

    step: int
    place: str  # before, model, finish
    what: str  # abort, add, raise, lose
    victim: int


events = st.builds(
    Event,
    st.integers(0, 12),
    st.sampled_from(("before", "model", "finish")),
    st.sampled_from(("abort", "abort", "add", "raise", "lose")),
    st.integers(-1, 9),
)


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=60)
@hypothesis.given(st.lists(events, max_size=12), st.booleans(), st.integers(0, 3))
def test_whatever_befalls_a_step_pages_balance_and_tokens_are_right(happenings, is_tight, seed):
    due = collections.defaultdict(list)
    for event in happenings:
        due[event.step, event.place].append(event)
    engine = ToyEngine(
        dataclasses.replace(CONFIG, num_pages=8 if is_tight else 24),
        on_finish=lambda request: happen("finish"),
    )
    jobs, tokens, aborted, now = add_some(engine, seed=seed), collections.defaultdict(list), {}, 0

    def happen(place):
        for event in due.pop((now, place), ()):
            if event.what == "abort":
                if engine.abort(event.victim) is not None:
                    assert engine.abort(event.victim) is None
                    aborted[event.victim] = len(tokens[event.victim])
            elif event.what == "add":
                prompt = [1, 2, 3, event.step, event.victim + 1]
                jobs[engine.add_request(prompt, SamplingParams(3))] = (prompt, 3)
            elif event.what == "raise" or place != "model":
                raise CallbackError
            else:
                engine.lose_the_pool()

    engine.in_model = lambda: happen("model")
    while engine.has_work or engine._outputs:
        try:
            happen("before")
            for output in engine.step():
                tokens[output.request_id].append(output.token_id)
        except CallbackError:
            pass
        assert_balanced(engine)
        now += 1
        assert now < 200
    assert_all_free(engine)
    for i, job in jobs.items():
        want = wanted_tokens(*job)
        assert tokens[i] == (want[: aborted[i]] if i in aborted else want)


# Interrupts, wherever they strike.

# A second interrupt while the first is dealt with, and one that takes what was handed over away
# from the caller, are beyond what a function can do.
_EXEMPT = {"restart", "reset", "forget_all", "_recover", "_hand_over"}
_FILES = {
    sys.modules[f"reference_engine.{name}"].__file__
    for name in ("engine", "in_flight", "outputs", "scheduler", "page_pool", "page_table")
}


def interrupted_step(engine, after):
    """A step that is interrupted when it comes to its `after`th line; None, or its outputs."""
    left = after

    def on_line(frame, event, argument):
        nonlocal left
        # A `with` is left by one instruction, which no interrupt divides, and by a line event; a
        # `return` out of it has one more behind its value.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not line.startswith(("with ", "return self._hand_over()")):
            left -= 1
            if left == 0:
                raise Interrupt
        return on_line

    def on_call(frame, event, argument):
        code = frame.f_code
        return on_line if code.co_filename in _FILES and code.co_name not in _EXEMPT else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        return engine.step()
    except Interrupt:
        return None
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("is_tight", [False, True])
def test_a_step_may_be_interrupted_at_any_line(is_tight):
    config = dataclasses.replace(CONFIG, num_pages=8 if is_tight else 24)
    told = []
    engine = ToyEngine(config, on_finish=lambda request: told.append(request.request_id))
    jobs, num_interrupts, after = {}, 0, 1
    tokens = collections.defaultdict(list)
    while after < 600:
        if not engine.has_work:
            jobs |= add_some(engine, seed=after)
        engine.abort(max(jobs)) if after % 97 == 0 else None
        outputs = interrupted_step(engine, after)
        assert_balanced(engine)
        if outputs is None:
            num_interrupts += 1
            after += 1
            # A step without an interrupt, so that something is in the pool when the next comes.
            outputs = engine.step()
            assert_balanced(engine)
        else:
            after += 7
        for output in outputs:
            tokens[output.request_id].append(output.token_id)
    collect(engine, tokens)
    assert num_interrupts > 200
    assert set(told) <= set(jobs)
    for i, job in jobs.items():
        want = wanted_tokens(*job)
        assert tokens[i] == want[: len(tokens[i])]
        assert tokens[i] == want or i not in told
    assert len(told) > 0.9 * len(jobs)


# Threads.


def in_thread(call):
    """What a call raises in another thread."""
    errors = []

    def work():
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="the other")
    thread.start()
    thread.join()
    return errors


def test_a_second_thread_is_told_and_changes_nothing():
    engine = ToyEngine()
    jobs = add_some(engine)
    request = engine.scheduler.get(0)
    calls = {
        "step": engine.step,
        "add_request": lambda: engine.add_request([1]),
        "abort": lambda: engine.abort(0),
        "warm_up": engine.warm_up,
        "read_kv": lambda: engine.read_kv(request),
        "run": engine.run,
    }
    errors = {}

    def in_model():
        for name, call in calls.items():
            errors[name] = in_thread(call)

    engine.in_model = in_model
    tokens = collections.defaultdict(list)
    for output in engine.step():
        tokens[output.request_id].append(output.token_id)
    engine.in_model = lambda: None
    assert set(errors) == set(calls)
    for name, (error,) in errors.items():
        assert isinstance(error, RuntimeError)
        name = "step" if name == "run" else name
        assert str(error).startswith(
            f"Engine.{name}: thread 'the other' calls while thread 'MainThread' is in Engine.step;"
            " an engine is for one thread at a time"
        )
    collect(engine, tokens)
    assert tokens == {i: wanted_tokens(*job) for i, job in jobs.items()}


def test_threads_may_take_turns():
    engine = ToyEngine()
    jobs = add_some(engine)
    tokens = collections.defaultdict(list)

    def one_step():
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)

    while engine.has_work:
        assert in_thread(one_step) == []
        one_step()
    assert tokens == {i: wanted_tokens(*job) for i, job in jobs.items()}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, tokenizer=byte_tokenizer())
    return LLM(
        folder,
        EngineConfig(
            page_size=8,
            num_pages=64,
            max_model_len=64,
            max_num_batched_tokens=32,
            max_num_seqs=4,
            token_buckets=(32,),
            seq_buckets=(4,),
        ),
    )


def test_an_llm_is_for_one_thread_too(llm, monkeypatch):
    params = SamplingParams(max_tokens=4)
    want = llm.generate("the dog", params)[0].outputs
    stream = llm.stream("the dog", params)
    first = next(stream)
    calls = {
        "generate": lambda: llm.generate("x", params),
        "step": llm.step,
        "abort": lambda: llm.abort(first.request_id),
        "stream": lambda: next(llm.stream("x")),
        "open stream": lambda: next(stream),
        "chat": lambda: llm.chat([{"role": "user", "content": "x"}], params),
    }
    real, errors = engine_lib.run_step, {}

    def run_step(*args, **options):
        for name in list(calls):
            errors[name] = in_thread(calls.pop(name))
        return real(*args, **options)

    monkeypatch.setattr(engine_lib, "run_step", run_step)
    assert llm.generate("the dog", params)[0].outputs == want
    for (error,) in errors.values():
        assert isinstance(error, RuntimeError) and "one thread at a time" in str(error)
    assert next(stream, None) is None  # its iterator ended with the error in the other thread
    llm.step()
    assert_all_free(llm.engine)
    assert not llm._streams


def test_an_abandoned_stream_ends_whichever_thread_finds_it(llm):
    params = SamplingParams(max_tokens=20)
    want = llm.generate(["a fox", "a dog"], params)
    kept = llm.stream("a dog", params)
    text = next(kept).text
    streams = [llm.stream("a fox", params)]
    next(streams[0])
    assert in_thread(streams.clear) == []
    gc.collect()
    text += "".join(delta.text for delta in kept)
    assert text == want[1].outputs[0].text
    assert_all_free(llm.engine)
    assert not llm._streams


def test_a_stream_that_is_dropped_in_the_middle_of_a_step(llm, monkeypatch):
    params = SamplingParams(max_tokens=12)
    want = llm.generate("a dog", params)[0].outputs
    streams = [llm.stream("a fox", params)]
    next(streams[0])
    real = engine_lib.run_step

    def run_step(*args, **options):
        if streams:
            streams.clear()
            gc.collect()
        return real(*args, **options)

    monkeypatch.setattr(engine_lib, "run_step", run_step)
    assert llm.generate("a dog", params)[0].outputs == want and not streams
    assert_all_free(llm.engine)
    assert not llm._streams


def test_a_stream_that_is_left_half_way_leaves_the_others(llm):
    params = SamplingParams(max_tokens=12)
    want = [output.outputs[0].text for output in llm.generate(["a fox", "a dog"], params)]
    for leave in ("close", "throw", "del"):
        left, kept = llm.stream("a fox", params), llm.stream("a dog", params)
        text = next(kept).text
        next(left)
        if leave == "close":
            left.close()
        elif leave == "throw":
            with pytest.raises(KeyboardInterrupt):
                left.throw(KeyboardInterrupt)
        del left
        text += "".join(delta.text for delta in kept)
        assert text == want[1]
        assert_all_free(llm.engine)
        assert not llm._streams
