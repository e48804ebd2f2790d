# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A running request moves from one engine to another, and goes on with the same tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from reference_engine import moved_request
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.request import FinishReason
from reference_engine.sampling_params import SamplingParams
from reference_engine.weights import random_params
from tests.planted import plant

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
# One bucket, so that a request's logits do not depend on what else is computed.
CONFIG = EngineConfig(
    page_size=4,
    num_pages=64,
    max_model_len=64,
    max_num_batched_tokens=8,
    max_num_seqs=4,
    token_buckets=(8,),
    seq_buckets=(4,),
)
PARAMS = random_params(MODEL, seed=1)
PROMPT = [int(x) for x in np.random.default_rng(0).integers(300, size=19)]
SAMPLED = SamplingParams(
    max_tokens=20, temperature=0.9, top_p=0.95, seed=7, frequency_penalty=0.3, ignore_eos=True
)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def make_engine(**fields):
    engine = Engine(PARAMS, MODEL, dataclasses.replace(CONFIG, **fields))
    other = engine.add_request([5, 4, 3, 2, 1, 9, 8], SamplingParams(max_tokens=30))
    assert other == 0
    return engine


def tokens_of(outputs, request_id):
    return [output.token_id for output in outputs if output.request_id == request_id]


def run_to_the_end(engine, request_id):
    outputs = []
    while engine.scheduler.get(request_id) is not None:
        outputs += engine.step()
    return tokens_of(outputs + engine.step(), request_id)


def unmoved(params):
    engine = make_engine()
    return run_to_the_end(engine, engine.add_request(PROMPT, params))


def moved_after(num_steps, params, *, to_host=False, **fields):
    """The tokens of both engines, and how many of them the first one yielded."""
    first, second = make_engine(**fields), make_engine(**fields)
    request_id = first.add_request(PROMPT, params)
    outputs = []
    for _ in range(num_steps):
        outputs += first.step()
        second.step()
    moved = first.detach(request_id)
    outputs += first.step()  # the tokens that were in flight
    tokens = tokens_of(outputs, request_id)
    assert first.scheduler.get(request_id) is None and tuple(tokens) == moved.output_ids
    if to_host:
        moved = dataclasses.replace(moved, pages=jax.device_get(moved.pages))
        assert isinstance(moved.pages, np.ndarray)
    num_free = second.scheduler.pool.num_free
    new_id = second.attach(moved)
    assert moved.num_computed == 0 or second.scheduler.pool.num_free < num_free
    return tokens + run_to_the_end(second, new_id), len(tokens)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_it_goes_on_with_the_same_tokens(params, async_scheduling):
    want = unmoved(params)
    assert len(want) == 20 and len(set(want)) > 10
    counts = set()
    for num_steps in (0, 1, 2, 4, 9, 14):  # waiting, within its prompt, and decoding
        got, num_first = moved_after(num_steps, params, async_scheduling=async_scheduling)
        assert got == want, num_steps
        counts.add(num_first)
    assert 0 in counts and len(counts) == 3


def test_what_is_computed_is_not_computed_again():
    first, second = make_engine(), make_engine()
    request_id = first.add_request(PROMPT, GREEDY)
    while not tokens_of(first.step(), request_id):
        pass
    moved = first.detach(request_id)
    assert moved.num_computed == len(PROMPT) + len(moved.output_ids) - 1
    new_id = second.attach(moved)
    second.step()
    [segment] = [s for s in second.last_plan.segments if s.request_id == new_id]
    assert segment.start == moved.num_computed and segment.token_ids == moved.output_ids[-1:]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_its_pages_may_rest_in_host_memory(params):
    assert moved_after(8, params, to_host=True)[0] == unmoved(params)


def test_its_prefix_is_found_in_the_new_engine():
    first, second = make_engine(), make_engine()
    request_id = first.add_request(PROMPT, GREEDY)
    while not tokens_of(first.step(), request_id):
        pass
    new_id = second.attach(first.detach(request_id))
    second.step()
    again = second.add_request(PROMPT, GREEDY)
    tokens = run_to_the_end(second, again)
    assert tokens == unmoved(GREEDY) and second.stats.num_cached == 16
    assert second.scheduler.get(new_id) is None


def test_a_request_that_is_gone_is_none_and_the_pages_balance():
    engine = make_engine()
    request_id = engine.add_request(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
    assert engine.detach(99) is None
    while engine.has_work:
        engine.step()
    assert engine.detach(request_id) is None
    request_id = engine.add_request(PROMPT, GREEDY)
    for _ in range(5):
        engine.step()
    moved = engine.detach(request_id)
    assert engine.scheduler.pool.num_free == CONFIG.num_pages and not engine.has_work
    assert engine.detach(request_id) is None
    got = [run_to_the_end(engine, engine.attach(moved)) for _ in range(2)]  # it may come twice
    assert got[0] == got[1] == unmoved(GREEDY)[len(moved.output_ids) :]


def test_a_request_that_ends_with_a_token_in_flight_is_gone():
    engine = make_engine()
    ended = []
    engine._on_finish = ended.append
    request_id = engine.add_request(PROMPT, SamplingParams(max_tokens=1, ignore_eos=True))
    while engine.scheduler.get(request_id).pending_row < 0:
        engine.step()
    assert engine.detach(request_id) is None
    assert [r.finish_reason for r in ended] == [FinishReason.LENGTH]
    assert len(tokens_of(engine.step(), request_id)) == 1


def test_where_there_is_no_room_nothing_changes():
    first = make_engine()
    request_id = first.add_request(PROMPT, GREEDY)
    for _ in range(6):
        first.step()
    moved = first.detach(request_id)
    small = Engine(PARAMS, MODEL, dataclasses.replace(CONFIG, num_pages=16))
    small.add_request(list(range(46)), SamplingParams(max_tokens=5))
    small.step()
    num_free = small.scheduler.pool.num_free
    with pytest.raises(RuntimeError, match=f"Engine.attach: {num_free} pages are free and 1"):
        small.attach(moved)
    assert small.scheduler.pool.num_free == num_free and len(small.scheduler.running) == 1
    full = Engine(PARAMS, MODEL, dataclasses.replace(CONFIG, max_num_seqs=1))
    full.add_request([1, 2, 3], GREEDY)
    full.step()
    with pytest.raises(RuntimeError, match="1 requests run"):
        full.attach(moved)
    while small.has_work:
        small.step()
    assert run_to_the_end(small, small.attach(moved))


@pytest.mark.parametrize("loses_pool", [False, True])
def test_an_error_on_the_way_in_leaves_the_others(loses_pool, monkeypatch):
    first, second, undisturbed = make_engine(), make_engine(), make_engine()
    request_id = first.add_request(PROMPT, GREEDY)
    for _ in range(7):
        first.step()
    moved = first.detach(request_id)
    second.step()
    num_free = second.scheduler.pool.num_free

    def put(self, kv_pages, page_ids, model):
        if loses_pool:
            kv_pages.delete()
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(moved_request.MovedRequest, "put", put)
        with pytest.raises(MemoryError):
            second.attach(moved)
    assert len(second.scheduler.running) + len(second.scheduler.waiting) == 1
    assert loses_pool or second.scheduler.pool.num_free == num_free
    new_id = second.attach(moved)
    outputs = []
    while second.has_work:
        outputs += second.step()
    tokens = [*moved.output_ids, *tokens_of(outputs, new_id)]
    assert tokens == unmoved(GREEDY)
    assert tokens_of(outputs, 0) == undisturbed.run()[0]


@pytest.mark.parametrize(
    ("fields", "model", "sentence"),
    [
        (
            {"page_size": 8, "max_num_batched_tokens": 16, "token_buckets": (16,)},
            {},
            "both engines need the same model, dtype and page_size",
        ),
        ({"max_model_len": 16, "num_pages": 64}, {}, "max_model_len=16"),
        ({}, {"num_layers": 2}, r"wanted float32\[2, n >= 5, 4, 2, 128\]"),
        ({}, {"dtype": "bfloat16"}, "moved.pages"),
    ],
    ids=str,
)
def test_another_engine_is_refused(fields, model, sentence):
    first = make_engine()
    request_id = first.add_request(PROMPT, GREEDY)
    while not tokens_of(first.step(), request_id):
        pass
    moved = first.detach(request_id)
    model = dataclasses.replace(MODEL, **model)
    config = dataclasses.replace(CONFIG, **fields)
    other = Engine(random_params(model, seed=1), model, config)
    with pytest.raises(ValueError, match=sentence):
        other.attach(moved)
    assert other.scheduler.pool.num_free == config.num_pages and not other.has_work


def test_a_callback_may_not_move_requests():
    engine, errors = make_engine(), []

    def on_finish(request):
        for call in (lambda: engine.detach(0), lambda: engine.attach(moved)):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    request_id = engine.add_request(PROMPT, GREEDY)
    for _ in range(6):
        engine.step()
    moved = engine.detach(request_id)
    engine._on_finish = on_finish
    engine.run()
    assert [e.split(": ")[0] for e in errors] == ["Engine.detach", "Engine.attach"]


FAULTS = {
    "pages of the first layer alone": (
        "np.where(ids >= 0, ids + first, -1)",
        "np.where(ids + 0 * first >= 0, ids + 0 * first, -1)",
    ),
    "the next page": ("] = page_ids", "] = np.roll(page_ids, 1)"),
    "another seed": ("            request.seed,\n", "            request.seed + 1,\n"),
    "another output": ("tuple(request.output_ids)", "tuple(request.output_ids[:-1] + [7])"),
}
PLANTED = [(moved_request.__name__, *fault) for fault in FAULTS.values()]


@pytest.mark.parametrize("name", FAULTS)
def test_planted_bugs_are_seen(name, monkeypatch):
    """One engine has the bug, because two could undo each other's."""
    module = plant(monkeypatch, "reference_engine", moved_request.__name__, *FAULTS[name])
    first, second = make_engine(async_scheduling=False), make_engine()
    request_id = first.add_request(PROMPT, SAMPLED)
    while first.scheduler.get(request_id).num_computed < 26:  # half of a page
        first.step()
    wrong = module.MovedRequest.of(first.scheduler.get(request_id), first._kv_pages, MODEL)
    fields = {field.name: getattr(wrong, field.name) for field in dataclasses.fields(wrong)}
    new_id = second.attach(moved_request.MovedRequest(**fields))
    assert [*wrong.output_ids, *run_to_the_end(second, new_id)] != unmoved(SAMPLED)
