# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Steps of decodes in the engine itself: how long they take, and how long the device idles.

The time of a step is the wall clock's, without a profiler. On a GPU the same steps are then
recorded by the profiler, which says what ran and when. The profiler makes every launch slower, so
that more idle time is seen in a recording than there is without one; both are told.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bench import clock
from reference_engine import compiles
from reference_engine.config import num_pages_for
from reference_engine.engine import Engine
from reference_engine.sampling_params import SamplingParams

# What a step of decodes is timed with; greedy first.
SAMPLING = {
    "greedy": SamplingParams(),
    "T = 0.6": SamplingParams(temperature=0.6),
    "T = 0.6, top-k 50, top-p 0.9": SamplingParams(temperature=0.6, top_k=50, top_p=0.9),
}
_SETTLING = 5  # steps after the last prefill, and in a recording, that are not counted


@dataclasses.dataclass(frozen=True)
class Recording:
    """What ran on a GPU in a step, means over steady steps. Times in microseconds.

    Attributes:
      num_steps: the steps that were counted.
      step_us: from the start of a step to the start of the next one.
      busy_us: the time in which something ran.
      kernels_us: the times of all kernels, copies and fills together, which is more than `busy_us`
        where they overlap.
      launches: the number of kernels, copies and fills.
    """

    num_steps: int
    step_us: float
    busy_us: float
    kernels_us: float
    launches: float


def start_decodes(
    engine: Engine, batch_size: int, context: int, params: SamplingParams, seed: int
) -> list[int]:
    """Adds requests, and steps until all of them decode; returns their ids.

    Args:
      engine: idle. max_num_seqs must be at least `batch_size`.
      batch_size: the number of requests.
      context: the number of prompt tokens of each.
      params: how their tokens are chosen; without an end.
      seed: fixes the prompts.

    Raises:
      RuntimeError: not all of them decode at a time, because the engine is too small.
    """
    rng = np.random.default_rng(seed)
    vocab_size = engine.model_config.vocab_size
    params = dataclasses.replace(params, max_tokens=None, ignore_eos=True)
    ids = [
        engine.add_request(rng.integers(vocab_size, size=context).tolist(), params)
        for _ in range(batch_size)
    ]
    scheduler = engine.scheduler
    while scheduler.waiting or any(r.num_computed < r.num_prompt for r in scheduler.running):
        engine.step()
    for _ in range(_SETTLING):
        engine.step()
    if len(scheduler.running) != batch_size:
        raise RuntimeError(
            f"start_decodes: {len(scheduler.running)} of {batch_size} requests run; want all:"
            " raise max_num_seqs, max_model_len or num_pages"
        )
    return ids


def longest_decode(batch_size: int, context: int, num_steps: int, budget: int) -> int:
    """At most how many tokens a request has after `start_decodes` and some steps.

    The first request decodes while the prompts of the others are computed, in what it and its like
    leave of the budget; alignment leaves at least half of that to prompts.
    """
    num_prefills = 2 * -(-batch_size * context // max(1, budget - batch_size))
    return context + num_prefills + 2 * _SETTLING + num_steps


def has_room(engine: Engine, batch_size: int, context: int, num_steps: int) -> bool:
    """Whether so many requests can decode at a time, and take so many steps."""
    config = engine.config
    longest = longest_decode(batch_size, context, num_steps, config.max_num_batched_tokens)
    return (
        batch_size <= config.max_num_seqs
        and longest <= config.max_model_len
        and batch_size * num_pages_for(longest, config.page_size) <= config.pool_pages
    )


def time_decodes(
    engine: Engine,
    batch_size: int,
    context: int,
    *,
    sampling: str,
    num_steps: int = 50,
    num_recorded: int = 50,
) -> dict[str, Any]:
    """Times steps of decodes, and on a GPU records some; returns a row.

    A row's `idle_percent` is the part of the wall clock's step in which the recorded kernels would
    not run; `recorded_idle_percent` is the device's idle time in the recording. Both are None, with
    what they are made of, where the device is no GPU.
    """
    seed = 1000 * batch_size + list(SAMPLING).index(sampling)  # nothing is cached
    ids = start_decodes(engine, batch_size, context, SAMPLING[sampling], seed)
    before, compiled = dataclasses.replace(engine.stats), compiles.num_compiles()
    times = [time.perf_counter()]
    for _ in range(num_steps):
        engine.step()
        times.append(time.perf_counter())
    samples = np.diff(times) * 1e6
    counts = {name: value - getattr(before, name) for name, value in vars(engine.stats).items()}
    recording = None
    if jax.default_backend() == "gpu":
        recording = _record(engine, num_recorded)
    for request_id in ids:
        engine.abort(request_id)
    step_us = float(samples.mean())
    row = {
        "batch": f"{batch_size} decodes at {context:,}",
        "sampling": sampling,
        "step_us": step_us,
        "median_us": statistics.median(samples),
        "p99_us": float(np.percentile(samples, 99)),
        "host_us": (counts["seconds"] - counts["wait_seconds"]) / num_steps * 1e6,
        "late_percent": 100 * counts["num_late_steps"] / num_steps,
        "num_recompiles": compiles.num_compiles() - compiled,
        "num_preemptions": counts["num_preemptions"],
        "num_layers": engine.model_config.num_layers,
    }
    return row | _of_recording(recording, step_us)


def summarise_steps(events: Sequence[clock.Event], num_steps: int) -> Recording:
    """What ran in a step, from a recording of several.

    A step is what runs from one launch of a kernel to the next launch of the same kernel, where
    that is one that each step launches once. The first steps are left out, and what runs after the
    last such launch, of which the end may not have been recorded.

    Args:
      events: in the order of their starts.
      num_steps: the steps that were dispatched.

    Raises:
      RuntimeError: no kernel was launched once a step, or too few steps were recorded.
    """
    names = [(event.module, event.name) for event in events]
    counts = collections.Counter(names)
    # A step that was in flight at the start may have been recorded too, or one be missing.
    once = [name for name, count in counts.items() if abs(count - num_steps) <= 1]
    if not once:
        raise RuntimeError(
            f"summarise_steps: no kernel was launched once in each of {num_steps} steps, of"
            f" {len(events)} launches: {counts.most_common(20)}"
        )
    starts = [i for i, name in enumerate(names) if name == once[0]][_SETTLING:]
    if len(starts) < 2:
        raise RuntimeError(
            f"summarise_steps: {num_steps} steps; want more than {_SETTLING + 2}, of which"
            f" {_SETTLING} are left out"
        )
    counted = events[starts[0] : starts[-1]]
    span = events[starts[-1]].start_us - counted[0].start_us
    number = len(starts) - 1
    return Recording(
        number,
        span / number,
        busy_us(counted) / number,
        sum(event.microseconds for event in counted) / number,
        len(counted) / number,
    )


def busy_us(events: Sequence[clock.Event]) -> float:
    """The time in which at least one of the events runs; they are in the order of their starts."""
    busy, end = 0.0, -np.inf
    for event in events:
        stop = event.start_us + event.microseconds
        busy += max(0.0, stop - max(end, event.start_us))
        end = max(end, stop)
    return busy


def _record(engine: Engine, num_steps: int) -> Recording:
    def run() -> None:
        for _ in range(num_steps):
            engine.step()

    return summarise_steps(clock.record_kernels(run), num_steps)


def _of_recording(recording: Recording | None, step_us: float) -> dict[str, Any]:
    if recording is None:
        names = ("busy_us", "kernels_us", "launches", "idle_percent")
        return dict.fromkeys((*names, "recorded_step_us", "recorded_idle_percent"))
    return {
        "busy_us": recording.busy_us,
        "kernels_us": recording.kernels_us,
        "launches": recording.launches,
        "idle_percent": 100 * max(0.0, 1 - recording.busy_us / step_us),
        "recorded_step_us": recording.step_us,
        "recorded_idle_percent": 100 * (1 - recording.busy_us / recording.step_us),
    }
