# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Runs requests through an engine, and compares what two such runs came to."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.outputs import Output
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import StepPlan
from reference_engine.traffic import Arrival
from reference_engine.weights import Params
from reference_engine.write_plan import plan_writes


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A request to replay: its prompt, the tokens to generate, and the step in which it arrives."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    arrival_step: int


@dataclasses.dataclass
class Result:
    """What one run did, and what it came to.

    The dicts have request ids as keys: the jobs in order, 0, 1, ...

    Attributes:
      num_steps: the steps that computed something.
      num_tokens: the tokens computed, including those that were computed again.
      num_whole_pages: the pages that one step filled from the first row to the last.
      num_prefill_partials: the partial pages that prefills wrote.
      num_decode_partials: the partial pages that decodes wrote, of one token each.
      num_deferrals: how often alignment made a request wait for a step.
      num_preemptions: how often a request lost its pages.
      num_cached: the tokens that were found in the prefix cache.
      ttft: the steps from a request's arrival to its first token, including both.
      outputs: the generated tokens.
      logits: f32[vocab_size] for each generated token.
      kv_digests: a digest of the keys and values that the pool held when the request ended.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_whole_pages: int = 0
    num_prefill_partials: int = 0
    num_decode_partials: int = 0
    num_deferrals: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    ttft: dict[int, int] = dataclasses.field(default_factory=dict)
    outputs: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    logits: dict[int, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    kv_digests: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def num_slices(self) -> int:
        """Whole and partial pages: the number of slices if everything is written by slices."""
        return self.num_whole_pages + self.num_prefill_partials + self.num_decode_partials


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two runs of the same jobs differ.

    Attributes:
      num_outputs: the generated tokens that were compared.
      num_equal_tokens: those that are equal.
      num_equal_logits: the rows of logits that are equal, bit for bit.
      max_logit_difference: the largest of all rows; infinite if there is a NaN or a row is missing.
      num_requests: the requests that were compared.
      num_equal_pools: those whose keys and values in the pool are equal, bit for bit.
      num_distinct_tokens: the number of different tokens in the outputs of the first run.
      num_distinct_outputs: the number of different outputs of the first run.
    """

    num_outputs: int
    num_equal_tokens: int
    num_equal_logits: int
    max_logit_difference: float
    num_requests: int
    num_equal_pools: int
    num_distinct_tokens: int
    num_distinct_outputs: int

    @property
    def is_equal(self) -> bool:
        """Whether everything is equal, bit for bit."""
        return (
            self.num_equal_tokens == self.num_equal_logits == self.num_outputs
            and self.num_equal_pools == self.num_requests
        )


def make_jobs(
    arrivals: Sequence[Arrival], *, vocab_size: int, steps_per_second: float, seed: int
) -> list[Job]:
    """Gives each arrival a random prompt, and the step that its time means."""
    rng = np.random.default_rng(seed)
    return [
        Job(
            tuple(rng.integers(vocab_size, size=arrival.num_prompt).tolist()),
            arrival.num_output,
            int(arrival.seconds * steps_per_second),
        )
        for arrival in arrivals
    ]


def replay(
    jobs: Sequence[Job],
    params: Params,
    model_config: ModelConfig,
    config: EngineConfig,
    *,
    observe: Callable[[int, Engine, list[Output]], None] | None = None,
) -> Result:
    """Runs the jobs to their end.

    Time is counted in steps, and one step is computed after the other, without
    `async_scheduling`. When nothing is left to do, it jumps to the next arrival.

    Args:
      jobs: the requests in the order of their arrival.
      params: the model's parameters.
      model_config: their shape.
      config: the engine's. Logits are recorded if it returns them.
      observe: called after every step with the step's number, the engine, and the step's outputs.
    """
    result = Result()
    if config.async_scheduling:
        config = dataclasses.replace(config, async_scheduling=False)

    def keep_digest(request: Request) -> None:
        kv = np.ascontiguousarray(engine.read_kv(request))
        result.kv_digests[request.request_id] = hashlib.sha256(kv.tobytes()).hexdigest()

    engine = Engine(params, model_config, config, on_finish=keep_digest)
    arrived = now = 0
    while arrived < len(jobs) or engine.has_work:
        if not engine.has_work:
            now = max(now, jobs[arrived].arrival_step)
        while arrived < len(jobs) and jobs[arrived].arrival_step <= now:
            job = jobs[arrived]
            engine.add_request(job.prompt_ids, SamplingParams(max_tokens=job.max_tokens))
            arrived += 1
        outputs = engine.step()
        assert engine.last_plan is not None
        _count_plan(result, engine.last_plan, config.page_size)
        for output in outputs:
            request_id = output.request_id
            result.ttft.setdefault(request_id, now - jobs[request_id].arrival_step + 1)
            result.outputs.setdefault(request_id, []).append(output.token_id)
            if output.logits is not None:
                result.logits.setdefault(request_id, []).append(output.logits)
        if observe is not None:
            observe(now, engine, outputs)
        now += 1
    result.num_cached = engine.stats.num_cached
    return result


def compare(ours: Result, other: Result) -> Comparison:
    """Compares tokens and logits by position, and the bytes in the pools by request."""
    num_outputs = equal_tokens = equal_logits = 0
    largest = 0.0
    for request_id in sorted(ours.outputs.keys() | other.outputs.keys()):
        tokens = [run.outputs.get(request_id, []) for run in (ours, other)]
        num_outputs += max(map(len, tokens))
        equal_tokens += sum(a == b for a, b in zip(*tokens, strict=False))
        rows = [run.logits.get(request_id, []) for run in (ours, other)]
        if len(rows[0]) != len(rows[1]):
            largest = np.inf
        for a, b in zip(*rows, strict=False):
            equal_logits += a.tobytes() == b.tobytes()
            difference = float(np.max(np.abs(a - b)))
            largest = max(largest, np.inf if np.isnan(difference) else difference)
    return Comparison(
        num_outputs=num_outputs,
        num_equal_tokens=equal_tokens,
        num_equal_logits=equal_logits,
        max_logit_difference=largest,
        num_requests=len(ours.outputs.keys() | other.outputs.keys()),
        num_equal_pools=sum(
            digest == other.kv_digests.get(request_id)
            for request_id, digest in ours.kv_digests.items()
        ),
        num_distinct_tokens=len({token for tokens in ours.outputs.values() for token in tokens}),
        num_distinct_outputs=len(set(map(tuple, ours.outputs.values()))),
    )


def _count_plan(result: Result, plan: StepPlan, page_size: int) -> None:
    result.num_steps += bool(plan.segments)
    result.num_tokens += plan.num_tokens
    result.num_deferrals += len(plan.deferrals)
    result.num_preemptions += len(plan.preempted)
    for segment in plan.segments:
        writes = plan_writes([segment], page_size)
        result.num_whole_pages += len(writes.page_ids)
        if segment.is_decode:
            result.num_decode_partials += writes.slices.shape[1]
        else:
            result.num_prefill_partials += writes.slices.shape[1]
