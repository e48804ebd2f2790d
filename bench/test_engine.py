# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The engine's host work under pytest-benchmark: pytest bench/test_engine.py --benchmark-only."""

from typing import Any

import jax.numpy as jnp

from reference_engine import engine as engine_lib
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.page_pool import PagePool
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler
from reference_engine.weights import random_params


def test_scheduler_step_with_512_running(benchmark: Any) -> None:
    """Schedule, begin and commit of 512 decodes, one step ahead; under 1 ms on one core."""
    config = EngineConfig(
        num_pages=140_000, max_model_len=4352, max_num_batched_tokens=2048, max_num_seqs=512
    )
    scheduler = Scheduler(config, PagePool(config.pool_pages))
    for i in range(512):
        scheduler.add(Request(i, tuple(range(100 + i % 50)), SamplingParams(max_tokens=4000)))

    plans = [scheduler.schedule()]
    scheduler.begin(plans[0])

    def step() -> Any:
        plans.append(scheduler.schedule(may_preempt=False))
        scheduler.begin(plans[-1])
        return len(scheduler.commit(plans.pop(0), [5] * 512))

    for _ in range(100):
        step()
    assert benchmark.pedantic(step, rounds=1000) == 512


def test_host_work_of_64_decodes(benchmark: Any, monkeypatch: Any) -> None:
    """An engine's step without the model: scheduling, packing, two dispatches, commit."""
    model = ModelConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    config = EngineConfig(
        num_pages=64 * 125,
        max_model_len=2000,
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        token_buckets=(64, 2048),
        seq_buckets=(64,),
    )
    engine = Engine(random_params(model, 0), model, config)
    logits = jnp.zeros((64, model.vocab_size))
    monkeypatch.setattr(
        engine_lib, "run_step", lambda params, pool, table, *_, **__: (logits, pool, table)
    )
    for i in range(64):
        engine.add_request([i] * 1000, SamplingParams(max_tokens=900))
    while len(engine.step()) < 64:
        pass
    assert len(benchmark.pedantic(engine.step, rounds=400)) == 64
