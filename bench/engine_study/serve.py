# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Serve requests with the engine itself, and time it as its users do.

Requests arrive at their times, also while a step is computed, and are added before the next call of
`Engine.step`. A token's time is when the call of `step` that has returned it returns. The clock of
a run starts with the arrival of its first request, before the engine has seen it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bench.engine_study.latency import Objectives, latencies
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.defaults import default_fields, device_memory, resolve
from reference_engine.engine import Engine
from reference_engine.sampling_params import SamplingParams
from reference_engine.traffic import Arrival
from reference_engine.weights import random_params

QWEN3_0_6B = ModelConfig(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    qk_norm=True,
    tie_embeddings=True,
    dtype="bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests, by their lengths and the times of their arrival."""

    name: str
    arrivals: Sequence[Arrival]


def at_once(shrink: int = 1) -> dict[str, Workload]:
    """A, B and C: many requests that are there from the start.

    Args:
      shrink: divides lengths and numbers of requests, for machines without an accelerator.
    """
    rng = np.random.default_rng(0)

    def between(low: int, high: int) -> int:
        return int(rng.integers(max(1, low // shrink), high // shrink + 1))

    def same(number: int, prompt: int, output: int) -> list[Arrival]:
        lengths = max(1, prompt // shrink), max(2, output // shrink)
        return [Arrival(0.0, *lengths)] * max(2, number // shrink)

    mixed = [
        Arrival(0.0, between(100, 1024), between(100, 1024)) for _ in range(max(2, 256 // shrink))
    ]
    return {
        "A": Workload("A", mixed),
        "B": Workload("B", same(64, 1024, 256)),
        "C": Workload("C", same(64, 4096, 16)),
    }


def make_config(
    model: ModelConfig, platform: str, workloads: Sequence[Workload], fields: dict[str, Any]
) -> EngineConfig:
    """What LLM takes on this platform, with some fields replaced, and room for the longest request.

    It is called before the parameters are made.
    """
    longest = max(a.num_prompt + a.num_output for w in workloads for a in w.arrivals)
    config = default_fields(model, platform) | fields
    config["max_model_len"] = max(config["max_model_len"], longest)
    memory = None if platform == "cpu" else device_memory()
    return resolve(EngineConfig(**config), model, platform, memory)


def make_engine(model: ModelConfig, config: EngineConfig) -> tuple[Engine, float]:
    """An engine with random parameters and every program compiled; and the seconds for that."""
    params = jax.block_until_ready(random_params(model, seed=0))
    began = time.perf_counter()
    engine = Engine(params, model, config)
    engine.warm_up()
    return engine, time.perf_counter() - began


def serve(
    engine: Engine,
    workload: Workload,
    *,
    temperature: float,
    objectives: Objectives,
    seed: int,
) -> dict[str, Any]:
    """Runs a workload to its end; returns a row.

    Args:
      engine: idle.
      workload: see Workload. No request ends before it has all of its tokens.
      temperature: of every request.
      objectives: of a good request.
      seed: fixes the prompts. Another one than in the run before, so that nothing is cached.
    """
    rng = np.random.default_rng(seed)
    arrivals = workload.arrivals
    prompts = [rng.integers(engine.model_config.vocab_size, size=a.num_prompt) for a in arrivals]
    prompts = [prompt.tolist() for prompt in prompts]
    before = dataclasses.replace(engine.stats)
    token_times: list[list[float]] = [[] for _ in arrivals]
    index: dict[int, int] = {}  # request id -> place in the workload
    arrived = 0
    began = time.perf_counter()
    while arrived < len(arrivals) or engine.has_work:
        now = time.perf_counter() - began
        if not engine.has_work and arrivals[arrived].seconds > now:
            time.sleep(arrivals[arrived].seconds - now)
            now = arrivals[arrived].seconds
        while arrived < len(arrivals) and arrivals[arrived].seconds <= now:
            params = SamplingParams(
                temperature=temperature,
                max_tokens=arrivals[arrived].num_output,
                ignore_eos=True,
            )
            index[engine.add_request(prompts[arrived], params)] = arrived
            arrived += 1
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            token_times[index[output.request_id]].append(now)
    counts = {name: value - getattr(before, name) for name, value in vars(engine.stats).items()}
    seconds = max(times[-1] for times in token_times)
    num_output = sum(map(len, token_times))
    rows = counts["num_tokens"] + counts["num_discarded"] + counts["num_padding"]
    return {
        "workload": workload.name,
        "temperature": temperature,
        "requests": len(arrivals),
        "prompt_tokens": sum(a.num_prompt for a in arrivals),
        "output_tokens": num_output,
        "seconds": seconds,
        "output_tokens_per_s": num_output / seconds,
        "padding_percent": 100 * counts["num_padding"] / rows,
        "host_seconds": counts["seconds"] - counts["wait_seconds"],
        **counts,
        **latencies([a.seconds for a in arrivals], token_times, seconds, objectives),
    }
