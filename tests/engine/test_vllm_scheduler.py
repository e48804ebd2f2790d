# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""vLLM's own scheduler with the plugin, and ours, schedule the same chunks. Needs vLLM.

CONTRIBUTING.md says how to run it on a CPU.
"""

import collections
import dataclasses
import random
import types
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own, as it is imported
    vllm = pytest.importorskip("vllm", reason="vLLM is no dependency: CONTRIBUTING.md installs it")
    from vllm.config import SchedulerConfig

    from tests.engine import vllm_runs

from reference_engine.config import EngineConfig
from tests.engine.test_scheduler import Job, Scenario, make_config, random_scenario
from tests.engine.test_vllm_plugin import planted_plugin

# vLLM warns about itself when it is configured.
pytestmark = pytest.mark.filterwarnings("ignore")

MAX_DEFERRALS = EngineConfig().max_deferrals
VERSION = tuple(map(int, vllm.__version__.split(".")[:2]))
# Older versions that were tried hold a request that is alone to the threshold, too.
HAS_OUR_THRESHOLD = VERSION >= (0, 33)


def scenario_for_both(rng, **fields) -> Scenario:
    """A random scenario of the reference engine, with limits that vLLM takes."""
    scenario = random_scenario(rng)
    config = scenario.config
    threshold = config.long_prefill_token_threshold
    has_threshold = HAS_OUR_THRESHOLD and threshold <= config.max_model_len
    fields = {
        "max_num_seqs": min(config.max_num_seqs, config.max_num_batched_tokens),
        "max_deferrals": MAX_DEFERRALS,
        "token_buckets": None,
        "long_prefill_token_threshold": threshold * has_threshold,
        **fields,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return dataclasses.replace(scenario, config=dataclasses.replace(config, **fields))


def long_scenario(rng, **fields) -> Scenario:
    """Forty requests of up to 200 tokens beside each other."""
    num_common = rng.choice([0, 100])
    jobs = tuple(
        Job(
            arrival=rng.randint(0, 60),
            num_prompt=rng.randint(1, 200),
            max_tokens=rng.randint(1, 60),
            abort_at=rng.randint(0, 150) if rng.random() < 0.15 else None,
            num_common=rng.randint(0, num_common),
        )
        for _ in range(40)
    )
    fields = {
        "page_size": rng.choice([8, 16]),
        "num_pages": rng.randint(35, 60),
        "max_model_len": 270,
        "max_num_batched_tokens": rng.randint(20, 100),
        "max_num_seqs": rng.randint(4, 16),
        **fields,
    }
    return Scenario(make_config(**fields), jobs)


def run_both(scenario, *, is_async=False, same_pages=False) -> collections.Counter:
    """Runs both and compares every step; what happened, counted."""
    ours = vllm_runs.OurRun(scenario)
    theirs = vllm_runs.VllmRun(scenario, is_async=is_async, same_pages=ours if same_pages else None)
    prompts = vllm_runs.prompts_of(scenario)
    counts = collections.Counter()
    step = 0
    last = max((job.arrival for job in scenario.jobs), default=0)
    while step <= last or ours.live:
        for i, job in enumerate(scenario.jobs):
            if job.arrival == step:
                ours.add(i, prompts[i], job.max_tokens)
                theirs.add(i, prompts[i], job.max_tokens)
        our_step, their_step = ours.step(), theirs.step()
        if not same_pages:  # vLLM takes the pages of a prompt chunk by chunk
            our_step.num_free = their_step.num_free
        assert their_step == our_step, step
        for i, job in enumerate(scenario.jobs):
            if job.abort_at == step:
                counts["aborted"] += i in ours.live
                ours.abort(i)
                theirs.abort(i)
        if not is_async:
            assert theirs.live == set(ours.live)
        counts["chunks"] += len(our_step.chunks)
        counts["deferrals"] += len(our_step.deferrals)
        counts["preempted"] += len(our_step.preempted)
        counts["cached"] += sum(r.num_cached > 0 for r in ours.live.values())
        step += 1
    while theirs.pending:
        theirs.end_step()
    assert not theirs.live
    assert_no_block_is_held(theirs, scenario)
    return counts


def assert_no_block_is_held(theirs, scenario):
    pool = theirs.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == scenario.config.num_pages, "blocks leaked"


@pytest.mark.parametrize("aligned", [False, True])
def test_few_pages_shared_prefixes_and_aborts(aligned):
    counts = collections.Counter()
    for seed in range(150):
        rng = random.Random(seed)
        counts += run_both(scenario_for_both(rng, page_aligned_scheduling=aligned), same_pages=True)
    for seed in range(6):
        rng = random.Random(seed)
        counts += run_both(long_scenario(rng, page_aligned_scheduling=aligned), same_pages=True)
    print(vllm.__version__, counts)
    assert counts["chunks"] > 10_000 and counts["aborted"] > 20
    assert counts["preempted"] > 50 and counts["cached"] > 500
    assert (counts["deferrals"] > 300) == aligned


def ample(scenario) -> Scenario:
    """Without what makes the pools differ: preemption, and prompts that share pages."""
    config = scenario.config
    num_pages = len(scenario.jobs) * config.max_pages_per_seq
    jobs = tuple(dataclasses.replace(job, num_common=0) for job in scenario.jobs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = dataclasses.replace(config, num_pages=max(num_pages, 1))
    return dataclasses.replace(scenario, jobs=jobs, config=config)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_ample_pages(aligned, is_async):
    """vLLM as it is, its pool included."""
    fields = {"page_aligned_scheduling": aligned}
    short, long = {}, {}
    if is_async:
        # A request ends one step later in vLLM, so the number of those that run must not matter.
        short = {"max_num_seqs": 8, "max_num_batched_tokens": 20, "long_prefill_token_threshold": 0}
        long = {"max_num_seqs": 40}
    counts = collections.Counter()
    for seed in range(100):
        scenario = ample(scenario_for_both(random.Random(seed), **fields, **short))
        counts += run_both(scenario, is_async=is_async)
    for seed in range(6):
        rng = random.Random(seed)
        long_fields = {"max_num_batched_tokens": rng.randint(40, 100), **fields, **long}
        counts += run_both(ample(long_scenario(rng, **long_fields)), is_async=is_async)
    print(vllm.__version__, is_async, counts)
    assert counts["chunks"] > 8_000 and counts["aborted"] > 20
    assert (counts["deferrals"] > 300) == aligned


def run_alone(scenario, **options) -> collections.Counter:
    """Runs vLLM, its pool as it is, and checks every chunk; what happened, counted."""
    config = scenario.config
    theirs = vllm_runs.VllmRun(scenario, **options)
    prompts = vllm_runs.prompts_of(scenario)
    counts = collections.Counter()
    work = sum(job.num_prompt + job.max_tokens for job in scenario.jobs)
    last, step, before = max(job.arrival for job in scenario.jobs), 0, {}
    while step <= last or theirs.live:
        assert step < last + (1 + MAX_DEFERRALS) * work, "a request waits for ever"
        for i, job in enumerate(scenario.jobs):
            if job.arrival == step:
                theirs.add(i, prompts[i], job.max_tokens)
        known = {int(i): r.num_tokens for i, r in theirs.scheduler.requests.items()}
        this = theirs.step()
        for i, _, end in this.chunks:
            if end < known[i]:
                aligned = end % config.page_size == 0
                counts["on a boundary" if aligned else "inside a page"] += 1
                if config.page_aligned_scheduling and not aligned:
                    assert before.get(i) == MAX_DEFERRALS, "a chunk ends inside a page"
        before = this.deferrals
        counts["preempted"] += len(this.preempted)
        counts["deferrals"] += len(this.deferrals)
        counts["drafts"] += this.num_drafts
        for i, job in enumerate(scenario.jobs):
            if job.abort_at == step:
                theirs.abort(i)
        step += 1
    while theirs.pending:
        theirs.end_step()
    assert_no_block_is_held(theirs, scenario)
    if theirs.scheduler.connector is not None:
        counts["loaded"] = theirs.scheduler.connector.num_loaded
    return counts


@pytest.mark.parametrize("is_async", [False, True])
def test_few_pages_and_vllms_own_pool(is_async):
    counts = {True: collections.Counter(), False: collections.Counter()}
    for aligned in counts:
        for seed in range(12):
            rng, fields = random.Random(seed), {"page_aligned_scheduling": aligned}
            if seed % 2:  # while all decode, less than a page is left
                fields |= {"page_size": 16, "max_num_seqs": 14, "max_num_batched_tokens": 20}
            counts[aligned] += run_alone(long_scenario(rng, **fields), is_async=is_async)
        print(vllm.__version__, is_async, aligned, counts[aligned])
        assert counts[aligned]["preempted"] > 30
    plugin, stock = counts[True], counts[False]
    assert plugin["on a boundary"] > 9 * plugin["inside a page"]
    assert stock["on a boundary"] < stock["inside a page"]
    assert plugin["inside a page"] and plugin["deferrals"] > 1000 and not stock["deferrals"]


def test_drafts_and_few_pages():
    counts = {True: collections.Counter(), False: collections.Counter()}
    for aligned in counts:
        for seed in range(6):
            scenario = long_scenario(random.Random(seed), page_aligned_scheduling=aligned)
            counts[aligned] += run_alone(scenario, num_drafts=3)
        print(vllm.__version__, aligned, counts[aligned])
    plugin, stock = counts[True], counts[False]
    assert plugin["on a boundary"] > 9 * plugin["inside a page"]
    assert plugin["drafts"] > 0.9 * stock["drafts"] > 1000 and plugin["preempted"] > 20


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("loads", ["sync", "async"])
def test_loaded_prefixes_and_few_pages(loads, is_async):
    """Tokens that a connector loads end anywhere; the chunks behind them end on boundaries."""
    counts = collections.Counter()
    for seed in range(6):
        scenario = long_scenario(random.Random(seed))
        if loads == "async" and VERSION < (0, 24):  # the method is asked for what is loaded, too
            with pytest.raises(NotImplementedError, match="aligns KV that is still to be loaded"):
                run_alone(scenario, loads=loads, is_async=is_async)
            return
        counts += run_alone(scenario, loads=loads, is_async=is_async)
    print(vllm.__version__, loads, is_async, counts)
    assert counts["on a boundary"] > 9 * counts["inside a page"] and counts["loaded"] > 5000


@pytest.mark.parametrize("is_async", [False, True])
def test_a_model_that_vllm_aligns_is_left_to_it(is_async):
    counts = collections.Counter()
    for seed in range(4):
        stock, plugin = (
            vllm_runs.VllmRun(scenario, is_async=is_async, has_mamba=True)
            for scenario in (
                long_scenario(
                    random.Random(seed),
                    page_aligned_scheduling=aligned,
                    num_pages=200,
                    max_num_batched_tokens=64,
                )
                for aligned in (False, True)
            )
        )
        scenario = long_scenario(random.Random(seed))
        prompts = vllm_runs.prompts_of(scenario)
        step = 0
        while step < 61 or stock.live:
            for i, job in enumerate(scenario.jobs):
                if job.arrival == step:
                    stock.add(i, prompts[i], job.max_tokens)
                    plugin.add(i, prompts[i], job.max_tokens)
            stock_step = stock.step()
            assert plugin.step() == stock_step
            counts["chunks"] += len(stock_step.chunks)
            step += 1
        assert not plugin.live and not plugin.scheduler._page_deferrals
    print(vllm.__version__, is_async, counts)
    assert counts["chunks"] > 2000


def test_vllm_finds_the_classes_by_their_names():
    for name in ("PageAlignedScheduler", "PageAlignedAsyncScheduler"):
        config = SchedulerConfig.default_factory(
            scheduler_cls=f"reference_engine.vllm_plugin.{name}"
        )
        assert config.get_scheduler_cls() is getattr(vllm_runs.vllm_plugin, name)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_class_that_does_not_fit_is_refused(monkeypatch, is_async):
    names = ["PageAlignedScheduler", "PageAlignedAsyncScheduler"]
    other = getattr(vllm_runs.vllm_plugin, names[not is_async])
    monkeypatch.setattr(vllm_runs, "vllm_plugin", types.SimpleNamespace(**{names[is_async]: other}))
    with pytest.raises(ValueError, match=f"wanted reference_engine.vllm_plugin.{names[is_async]},"):
        vllm_runs.VllmRun(long_scenario(random.Random(0)), is_async=is_async)


@pytest.mark.parametrize(
    "bug",
    [
        "lengths are rounded, not positions",
        "cached tokens do not count",
        "outputs are not known",
        "waits one step too many",
        "waits once only",
        "models that vllm aligns are aligned again",
    ],
)
def test_the_comparison_finds(monkeypatch, bug):
    monkeypatch.setattr(vllm_runs, "vllm_plugin", planted_plugin(monkeypatch, bug))
    with pytest.raises(AssertionError):
        test_few_pages_shared_prefixes_and_aborts(aligned=True)
        test_a_model_that_vllm_aligns_is_left_to_it(is_async=False)
