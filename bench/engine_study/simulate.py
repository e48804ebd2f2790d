# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Replay a trace through the scheduler alone, in simulated time.

The scheduler is the engine's own and sees real requests; only the model is left out: every step
takes what `bench.engine_study.cost` says of it, and every token is the same.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from bench.cases.rounding import ceil_div
from bench.engine_study.cost import Cost, Work, visible_pairs
from bench.engine_study.latency import Objectives, latencies
from reference_engine.batch import choose_shape
from reference_engine.config import EngineConfig
from reference_engine.page_pool import PagePool
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler, StepPlan, is_decode
from reference_engine.traffic import Arrival

MAX_NUM_SEQS = 256


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    trace: str
    page_size: int
    budget: int
    aligned: bool
    kv_write: str


@dataclasses.dataclass
class Outcome:
    """What a run came to.

    Attributes:
      seconds: simulated, from the first arrival to the last token.
      steps: batches.
      tokens: computed, recomputed ones included.
      padding: rows of the batches without a token.
      pages: whole pages written.
      partials: other pieces of pages that prefills wrote.
      decodes: tokens that decodes wrote, one slice each.
      descriptors: writes issued in the cell's form.
      deferrals: requests that alignment made wait a step, counted each time.
      skips: decodes that found no budget in a step, counted each time.
      preemptions: requests that lost their pages.
      write_share: of all steps' time, the writes'.
      ttft_ms, tpot_ms, itl_ms: (p50, p99) of the time to first token, of a request's mean time
        for each token after it, and of all gaps between two tokens of a request.
      goodput: requests a second that met both objectives.
      throughput: requests a second.
    """

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    padding: int = 0
    pages: int = 0
    partials: int = 0
    decodes: int = 0
    descriptors: int = 0
    deferrals: int = 0
    skips: int = 0
    preemptions: int = 0
    write_share: float = 0.0
    ttft_ms: tuple[float, float] = (0.0, 0.0)
    tpot_ms: tuple[float, float] = (0.0, 0.0)
    itl_ms: tuple[float, float] = (0.0, 0.0)
    goodput: float = 0.0
    throughput: float = 0.0


def make_config(cell: Cell, pool_tokens: int, longest: int) -> EngineConfig:
    """The engine's limits in a cell. Random prompts share nothing, so nothing is cached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # soft alignment is what is studied
        return EngineConfig(
            page_size=cell.page_size,
            num_pages=max(pool_tokens, longest) // cell.page_size + 1,
            max_model_len=longest,
            max_num_batched_tokens=cell.budget,
            max_num_seqs=MAX_NUM_SEQS,
            page_aligned_scheduling=cell.aligned,
            kv_write=cell.kv_write,
            enable_prefix_caching=False,
        )


def simulate(
    arrivals: Sequence[Arrival],
    cell: Cell,
    cost: Cost,
    *,
    pool_tokens: int,
    objectives: Objectives,
) -> Outcome:
    """Runs the requests to their end."""
    longest = max(a.num_prompt + a.num_output for a in arrivals) + 1
    config = make_config(cell, pool_tokens, longest)
    scheduler = Scheduler(config, PagePool(config.pool_pages))
    outcome = Outcome()
    token_times: list[list[float]] = [[] for _ in arrivals]
    now = written = busy = 0.0
    arrived = 0
    while arrived < len(arrivals) or scheduler.running or scheduler.waiting:
        if not (scheduler.running or scheduler.waiting):
            now = max(now, arrivals[arrived].seconds)
        while arrived < len(arrivals) and arrivals[arrived].seconds <= now:
            one = arrivals[arrived]
            prompt: Any = range(one.num_prompt)
            scheduler.add(Request(arrived, prompt, SamplingParams(max_tokens=one.num_output)))
            arrived += 1
        plan = scheduler.schedule()
        work = _work(plan, config)
        write_us = cost.write_us(work, cell.kv_write, cell.page_size)
        step_us = cost.host_us + cost.compute_us(work) + write_us
        now += step_us * 1e-6
        busy, written = busy + step_us, written + write_us
        runnable = sum(is_decode(r, r.num_computed) for r in scheduler.running)
        outcome.skips += runnable - work.decodes
        _count(outcome, plan, work, cell)
        scheduler.begin(plan)
        for _, request in scheduler.commit(plan, [1] * len(plan.segments)):
            token_times[request.request_id].append(now)
            if request.finish_reason is not None:
                scheduler.release(request)
    outcome.seconds = now - arrivals[0].seconds
    outcome.write_share = written / busy
    _latencies(outcome, arrivals, token_times, objectives)
    return outcome


def _work(plan: StepPlan, config: EngineConfig) -> Work:
    decodes = keys = prefilled = pairs = pages = partials = 0
    page_size = config.page_size
    for segment in plan.segments:
        start, end = segment.start, segment.end
        if segment.is_decode:
            decodes += 1
            keys += end
            continue
        whole = max(0, end // page_size - ceil_div(start, page_size))
        pages += whole
        partials += ceil_div(end, page_size) - start // page_size - whole
        prefilled += end - start
        pairs += visible_pairs(start, end)
    shape = choose_shape(decodes + prefilled, len(plan.segments), config)
    return Work(shape.num_tokens, shape.num_seqs, decodes, keys, prefilled, pairs, pages, partials)


def _count(outcome: Outcome, plan: StepPlan, work: Work, cell: Cell) -> None:
    outcome.steps += 1
    outcome.tokens += work.tokens
    outcome.padding += work.rows - work.tokens
    outcome.pages += work.pages
    outcome.partials += work.partials
    outcome.decodes += work.decodes
    outcome.descriptors += work.descriptors(cell.kv_write)
    outcome.deferrals += len(plan.deferrals)
    outcome.preemptions += len(plan.preempted)


def _latencies(
    outcome: Outcome,
    arrivals: Sequence[Arrival],
    token_times: Sequence[Sequence[float]],
    objectives: Objectives,
) -> None:
    found = latencies([a.seconds for a in arrivals], token_times, outcome.seconds, objectives)
    outcome.ttft_ms, outcome.tpot_ms = found["ttft_ms"], found["tpot_ms"]
    outcome.itl_ms = found["itl_ms"]
    outcome.goodput, outcome.throughput = found["goodput"], found["throughput"]


def at_load(
    arrivals: Sequence[Arrival], load: float, trace: str, cost: Cost, **options: Any
) -> list[Arrival]:
    """The same requests, over 1/load times what they take when all are there from the start.

    That is taken at pages of 16 and a budget of 2,048, unaligned, written by slices, and is the
    same for all cells of a trace.
    """
    at_once = [dataclasses.replace(arrival, seconds=0.0) for arrival in arrivals]
    cell = Cell(trace, 16, 2048, False, "slices")
    span = simulate(at_once, cell, cost, **options).seconds / load
    factor = span / max(arrivals[-1].seconds, 1e-9)
    return [dataclasses.replace(a, seconds=a.seconds * factor) for a in arrivals]


def sweep(
    traces: dict[str, list[Arrival]],
    cells: Sequence[Cell],
    cost: Cost,
    *,
    num_processes: int,
    on_done: Callable[[Cell], None] | None = None,
    **options: Any,
) -> list[Outcome]:
    """Simulates every cell, in several processes; outcomes in the cells' order."""
    context = multiprocessing.get_context("spawn")  # jax has threads, which fork does not copy
    outcomes: dict[Cell, Outcome] = {}
    with concurrent.futures.ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_start, initargs=(traces, cost, options)
    ) as pool:
        futures = {pool.submit(_run, cell): cell for cell in cells}
        for future in concurrent.futures.as_completed(futures):
            outcomes[futures[future]] = future.result()
            if on_done is not None:
                on_done(futures[future])
    return [outcomes[cell] for cell in cells]


_shared: dict[str, Any] = collections.defaultdict(dict)  # of a worker process


def _start(traces: dict[str, list[Arrival]], cost: Cost, options: dict[str, Any]) -> None:
    _shared.update(traces=traces, cost=cost, options=options)


def _run(cell: Cell) -> Outcome:
    return simulate(_shared["traces"][cell.trace], cell, _shared["cost"], **_shared["options"])
