# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Serve requests with the engine itself, and time it as its users do.

Requests arrive at their times, also while a step is computed, and are added before the next call of
`Engine.step`. A token's time is when the call of `step` that has returned it returns. The clock of
a run starts with the arrival of its first request, before the engine has seen it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bench.engine_study import traces
from bench.engine_study.latency import Objectives, latencies
from bench.engine_study.traces import Traffic
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.defaults import default_fields, device_memory, resolve
from reference_engine.engine import Engine
from reference_engine.llm import LLM
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


def workloads(shrink: int = 1) -> dict[str, Traffic]:
    """A, B and C: requests that are all there from the start.

    Args:
      shrink: divides lengths and numbers of requests, for machines without an accelerator.
    """
    rng = np.random.default_rng(0)
    low, high = 100 // shrink, 1024 // shrink
    drawn = rng.integers(max(1, low), high + 1, (256 // shrink, 2)).tolist()

    def same(prompt: int, output: int) -> list[Arrival]:
        return [Arrival(0.0, prompt // shrink, max(2, output // shrink))] * (64 // shrink)

    return {
        "A": Traffic("A", [Arrival(0.0, *lengths) for lengths in drawn]),
        "B": Traffic("B", same(1024, 256)),
        "C": Traffic("C", same(4096, 16)),
    }


def make_engine(
    model: ModelConfig | pathlib.Path, fields: Mapping[str, Any], *, warm_up: bool
) -> Engine:
    """The engine that LLM makes on this platform where nobody says more than `fields`.

    Args:
      model: a shape, which gets random parameters; or a model's folder.
      fields: of EngineConfig.
      warm_up: whether to compile every shape. If not, a step compiles its shape when it comes.
    """
    fields = {"compile_in_background": False, **fields}
    if isinstance(model, pathlib.Path):
        llm = LLM(model, warm_up=warm_up, compilation_cache=False, use_tqdm=False, **fields)
        return llm.engine
    platform = jax.default_backend()
    config = EngineConfig(**{**default_fields(model, platform), **fields})
    memory = None if platform == "cpu" or config.num_pages is not None else device_memory()
    config = resolve(config, model, platform, memory)
    engine = Engine(random_params(model, seed=0), model, config)
    if warm_up:
        engine.warm_up()
    return engine


def serve(
    engine: Engine, traffic: Traffic, *, temperature: float, objectives: Objectives, seed: int
) -> dict[str, Any]:
    """Serves requests to their end; returns a row.

    Args:
      engine: one that is idle.
      traffic: the requests. None ends before it has all of its tokens.
      temperature: of every request.
      objectives: what a good request keeps.
      seed: fixes the prompts. With another seed than in the runs before, nothing of them is found
        in the prefix cache.
    """
    ids = traces.prompts(traffic, engine.model_config.vocab_size, seed)
    before = dataclasses.replace(engine.stats)
    token_times = _token_times(engine, traffic.arrivals, ids, temperature)
    counts = {name: value - getattr(before, name) for name, value in vars(engine.stats).items()}
    seconds = max(times[-1] for times in token_times)
    num_outputs = sum(map(len, token_times))
    rows = counts["num_tokens"] + counts["num_discarded"] + counts["num_padding"]
    return {
        "traffic": traffic.name,
        "temperature": temperature,
        "num_requests": len(token_times),
        "num_prompt_tokens": sum(a.num_prompt for a in traffic.arrivals),
        "num_output_tokens": num_outputs,
        "duration_s": seconds,
        "output_tokens_per_s": num_outputs / seconds,
        "padding_percent": 100 * counts["num_padding"] / rows,
        "host_s": counts["seconds"] - counts["wait_seconds"],
        **counts,
        **latencies([a.seconds for a in traffic.arrivals], token_times, seconds, objectives),
    }


def warm(engine: Engine, temperatures: Sequence[float]) -> None:
    """Serves a few short requests, so that no run is the first to touch anything."""
    traffic = Traffic("warm", [Arrival(0.0, 20, 5)] * 4)
    for seed, temperature in enumerate(temperatures):
        serve(engine, traffic, temperature=temperature, objectives=Objectives(), seed=2**31 + seed)


def _token_times(
    engine: Engine, arrivals: Sequence[Arrival], ids: Sequence[list[int]], temperature: float
) -> list[list[float]]:
    """When each request got each of its tokens, in seconds after the start."""
    token_times: list[list[float]] = [[] for _ in arrivals]
    places: dict[int, int] = {}  # request id -> index of the arrival
    arrived = 0
    began = time.perf_counter()
    while arrived < len(arrivals) or engine.has_work:
        now = time.perf_counter() - began
        if not engine.has_work and (left := arrivals[arrived].seconds - now) > 0:
            time.sleep(left)
            now = arrivals[arrived].seconds
        while arrived < len(arrivals) and arrivals[arrived].seconds <= now:
            most = arrivals[arrived].num_output
            params = SamplingParams(temperature=temperature, max_tokens=most, ignore_eos=True)
            places[engine.add_request(ids[arrived], params)] = arrived
            arrived += 1
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            token_times[places[output.request_id]].append(now)
    return token_times
