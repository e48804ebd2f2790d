# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The vLLM plugin over a stand-in of vLLM: its numbers are `limit`'s, and it refuses at the start.

test_vllm_scheduler.py runs it in vLLM's scheduler, where vLLM is installed.
"""

import pathlib
import random
import subprocess
import sys
import types
import warnings

import pytest

from reference_engine.config import EngineConfig
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import is_decode, limit
from tests.engine import vllm_stand_in
from tests.engine.vllm_stand_in import NAME, VERSION
from tests.planted import plant

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def vllm_request(num_prompt, num_output=0, num_computed=0, request_id="a"):
    return types.SimpleNamespace(
        request_id=request_id,
        num_prompt_tokens=num_prompt,
        num_tokens=num_prompt + num_output,
        num_computed_tokens=num_computed,
    )


def start(plugin, *, is_async=False, **fields):
    classes = plugin.PageAlignedScheduler, plugin.PageAlignedAsyncScheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # soft alignment is what is tested
        return classes[is_async](is_async=is_async, **fields)


def end_step(scheduler, *request_ids):
    scheduled = types.SimpleNamespace(num_scheduled_tokens=dict.fromkeys(request_ids, 1))
    scheduler._update_after_schedule(scheduled)
    assert scheduler.outputs[-1] is scheduled, "vLLM's own method was not called"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("method, more", vllm_stand_in.METHODS)
def test_the_class_that_fits_starts_and_is_asked(monkeypatch, method, more, is_async):
    plugin = vllm_stand_in.install(monkeypatch, method=method)
    scheduler = start(plugin, is_async=is_async)
    assert scheduler.need_mamba_block_aligned_split is True
    ask = scheduler._mamba_block_aligned_split
    # 40 local and 8 external tokens of a prompt of 300, and a budget of 100: the end is 144.
    assert ask(vllm_request(300), 100, 40, 8, *more) == 96
    assert ask(vllm_request(300, num_computed=5), 100) == 91


def check_numbers(plugin):
    """Random requests through random steps, beside `limit` and a count of deferrals kept here."""
    rng = random.Random(3)
    seen = set()
    for trial in range(200):
        page_size = rng.randint(1, 20)
        scheduler = start(plugin, block_size=page_size, budget=rng.randint(page_size, 64))
        config = EngineConfig(page_size=page_size, max_model_len=4096, max_num_batched_tokens=4096)
        num_prompt, num_output = rng.randint(1, 90), rng.randint(0, 40) * rng.randint(0, 1)
        ours = Request(0, (1,) * num_prompt, SamplingParams(99), output_ids=[1] * num_output)
        request_id, computed, waits = str(trial), 0, rng.random() < 0.5
        if rng.random() < 0.5:  # cached or loaded tokens, or a chunk that ended inside a page
            computed = rng.randrange(ours.num_tokens)
        scheduler.requests[request_id] = None
        while computed < ours.num_tokens:
            budget = rng.randint(1, rng.choice([4, page_size, 64]))
            n = min(budget, ours.num_tokens - computed)
            want = limit(ours, computed, n, False, config)
            local = rng.randint(0, computed) if waits else 0
            external = rng.randint(0, computed - local) if waits else 0
            theirs = vllm_request(num_prompt, num_output, computed - local - external, request_id)
            got = scheduler._mamba_block_aligned_split(theirs, n, local, external)
            assert got == want, (trial, computed, n)
            ours.num_deferrals = 0 if got else ours.num_deferrals + 1
            assert ours.num_deferrals <= config.max_deferrals, "it waits for ever"
            end_step(scheduler, *[request_id] * (got > 0))
            is_end = computed + got == ours.num_tokens
            aligned = (computed + got) % page_size == 0
            seen.add((got > 0, is_end, aligned, computed >= num_prompt, is_decode(ours, computed)))
            computed += got
            waits &= not got
    assert {
        (False, False, True, False, False),  # deferred
        (True, False, False, False, False),  # inside a page, after the last deferral
        (True, False, True, True, False),  # outputs computed again
        (True, True, False, True, True),  # a decode
    } <= seen


def test_its_numbers_are_those_of_limit(monkeypatch):
    check_numbers(vllm_stand_in.install(monkeypatch))


def check_drafts(plugin):
    """What vLLM counts behind the known tokens is left to it."""
    ask = start(plugin)._mamba_block_aligned_split
    assert ask(vllm_request(20, 3, num_computed=22), 5) == 5  # a decode with 4 drafts
    assert ask(vllm_request(20, 3, num_computed=23), 1) == 1  # its token is still being sampled
    assert ask(vllm_request(20, num_computed=19), 4) == 4  # padded to the length of a draft
    assert ask(vllm_request(20, num_computed=20), 0) == 0  # all is scheduled: nothing is deferred
    assert ask(vllm_request(20, 30, num_computed=20), 13) == 12  # a preempted request: a prefill


def test_drafts_and_placeholders_are_left_alone(monkeypatch):
    check_drafts(vllm_stand_in.install(monkeypatch))


def check_waiting(plugin):
    """Eight steps at most; from the start again once it got tokens, and nothing kept when gone."""
    scheduler = start(plugin)
    ask = scheduler._mamba_block_aligned_split
    scheduler.requests = {"a": None, "b": None}
    most = EngineConfig().max_deferrals
    for request_id in "ab":
        for computed, inside in ((0, 5), (5, 7)):
            asked = vllm_request(100, num_computed=computed, request_id=request_id)
            lengths = []
            while not lengths or not lengths[-1]:
                lengths.append(ask(asked, inside))
                end_step(scheduler, *request_id * (lengths[-1] > 0))
            assert lengths == [0] * most + [inside]
    asked = vllm_request(100, request_id="b")
    assert [ask(asked, 5) for _ in range(most)] == [0] * most
    # It may run now, but vLLM finds no blocks for it, so that only the other one is scheduled.
    assert ask(asked, 5) == 5
    end_step(scheduler, "a")
    assert ask(asked, 5) == 5
    del scheduler.requests["b"]  # aborted
    end_step(scheduler)
    assert not scheduler._page_deferrals


def test_waiting_is_bounded(monkeypatch):
    check_waiting(vllm_stand_in.install(monkeypatch))


def check_mamba(plugin, more=(), by_hand=False):
    """Where vLLM aligns the model itself, its answer to all of its arguments is given back."""
    scheduler = start(plugin, model_aligns=not by_hand)
    if by_hand:  # as vLLM's own tests do
        scheduler.need_mamba_block_aligned_split = True
    ask, request = scheduler._mamba_block_aligned_split, vllm_request(300)
    assert ask(request, 100, 3, 4, *more) == ("vllm", request, 100, 3, 4, *more)
    scheduler.need_mamba_block_aligned_split = False
    assert scheduler.need_mamba_block_aligned_split is True
    assert ask(request, 100, 3, 4, *more) == 89


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("method, more", vllm_stand_in.METHODS)
def test_a_model_that_vllm_aligns_is_left_to_it(monkeypatch, method, more, by_hand):
    check_mamba(vllm_stand_in.install(monkeypatch, method=method), more, by_hand)


@pytest.mark.parametrize(
    "stand_in, message",
    [
        ({"method": None}, "has no Scheduler._mamba_block_aligned_split with the parameters"),
        ({"method": vllm_stand_in.other}, "has no Scheduler._mamba_block_aligned_split with"),
        ({"sets_flag": False}, "does not set Scheduler.need_mamba_block_aligned_split"),
    ],
)
def test_a_vllm_without_the_method_is_refused(monkeypatch, stand_in, message):
    plugin = vllm_stand_in.install(monkeypatch, **stand_in)
    with pytest.raises(NotImplementedError, match=f"vLLM {VERSION} {message}.*use another version"):
        start(plugin)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_class_that_does_not_fit_is_refused(monkeypatch, is_async):
    plugin = vllm_stand_in.install(monkeypatch)
    classes = ["PageAlignedScheduler", "PageAlignedAsyncScheduler"]
    message = (
        f"`--scheduler-cls` is {classes[not is_async]}; wanted {NAME}.{classes[is_async]}, because"
        f" async_scheduling is {is_async}"
    )
    with pytest.raises(ValueError, match=message):
        getattr(plugin, classes[not is_async])(is_async=is_async)


@pytest.mark.parametrize(
    "feature, value, message",
    [
        ("max_num_encoder_input_tokens", 1, "--language-model-only serves its text"),
        ("num_prefill_lookahead", 2, "leave --speculative-config out"),
        ("prefix_replay_tokens", 1, "from a start that vLLM does not tell"),
        ("is_diffusion", True, "vLLM has its own scheduler for diffusion"),
    ],
)
def test_models_whose_chunks_vllm_changes_are_refused(monkeypatch, feature, value, message):
    plugin = vllm_stand_in.install(monkeypatch)
    start(plugin, **{feature: value - 1})
    with pytest.raises(NotImplementedError, match=f"{NAME}: .*{message}"):
        start(plugin, **{feature: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"budget": 15}, "`max_num_batched_tokens` is 15; wanted at least page_size=16"),
        ({"threshold": 8}, "`long_prefill_token_threshold` is 8; wanted 0 or at least page_size"),
    ],
)
def test_limits_below_a_block_are_refused(monkeypatch, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        start(vllm_stand_in.install(monkeypatch), **fields)
    assert "leaving --scheduler-cls out" in caught.value.__notes__[0]


def test_kv_that_is_still_to_be_loaded_is_refused_where_vllm_would_never_load_it(monkeypatch):
    scheduler = start(vllm_stand_in.install(monkeypatch))
    with pytest.raises(NotImplementedError, match=f"vLLM {VERSION} aligns KV that is still to be"):
        scheduler._mamba_block_aligned_split(vllm_request(99), 0, 16, 32)


def test_what_it_imports_takes_no_accelerator():
    """vLLM's process holds the device; jax would take most of its memory."""
    code = """
import types
from jax._src import xla_bridge
from reference_engine.config import EngineConfig
from reference_engine.scheduler import limit
request = types.SimpleNamespace(num_prompt=99, num_tokens=99, num_deferrals=0)
assert limit(request, 0, 50, False, EngineConfig(page_size=16)) == 48
assert not xla_bridge.backends_are_initialized()
import jax
jax.devices()
assert xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


SCHEDULER = "reference_engine.scheduler"
BUGS = {
    "lengths are rounded, not positions": (
        SCHEDULER,
        "aligned = end // config.page_size * config.page_size - computed",
        "aligned = n // config.page_size * config.page_size",
    ),
    "cached tokens do not count": (NAME, "+ sum(cached)", ""),
    "loaded tokens do not count": (NAME, "+ sum(cached)", "+ cached[0]"),
    "outputs computed again are no prefill": (
        NAME,
        "if start + n >= request.num_tokens:",
        "if start + n >= request.num_prompt_tokens:",
    ),
    "outputs are not known": (
        NAME,
        "num_tokens=request.num_tokens",
        "num_tokens=request.num_prompt_tokens",
    ),
    "drafts are cut": (NAME, "return num_new_tokens", "return n"),
    "waits one step too many": (
        SCHEDULER,
        "return 0 if request.num_deferrals < config.max_deferrals else n",
        "return 0 if request.num_deferrals <= config.max_deferrals else n",
    ),
    "models that vllm aligns are aligned again": (NAME, "if self._model_aligns:", "if False:"),
    "waits for ever": (NAME, "counts.num_deferrals + 1", "0"),
    "waits less": (NAME, "counts.num_deferrals + 1", "counts.num_deferrals + 2"),
    "waits once only": (NAME, "and request_id not in scheduler_output.num_scheduled_tokens", ""),
    "ends the waiting of all": (
        NAME,
        "and request_id not in scheduler_output.num_scheduled_tokens",
        "and not scheduler_output.num_scheduled_tokens",
    ),
    "keeps the count of what is gone": (NAME, "request_id in self.requests and", ""),
    "is never asked": (NAME, "or self._page_config is not None", ""),
}
PLANTED = list(BUGS.values())


def planted_plugin(monkeypatch, bug):
    """The plugin over the vLLM that is in its place now, with a bug."""
    plant(monkeypatch, "reference_engine", *BUGS[bug])
    return sys.modules[NAME]


@pytest.mark.parametrize("bug", BUGS)
def test_the_checks_find(monkeypatch, bug):
    vllm_stand_in.install(monkeypatch)
    plugin = planted_plugin(monkeypatch, bug)
    with pytest.raises(AssertionError):
        assert start(plugin).need_mamba_block_aligned_split
        check_numbers(plugin)
        check_drafts(plugin)
        check_waiting(plugin)
        check_mamba(plugin)
