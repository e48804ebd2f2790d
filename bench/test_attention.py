# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The bench's cases under pytest-benchmark: pytest bench --benchmark-only."""

from typing import Any

import jax
import pytest

from bench.cases.attention import Call, Case, room_for
from bench.measure.attention import random_inputs

_RUNS = {"decode": ((8, 1, 256),), "prefill": ((1, 128, 256),), "mixed": ((8, 1, 256), (1, 64, 64))}


@pytest.mark.parametrize("name", _RUNS)
def test_attention(benchmark: Any, name: str) -> None:
    """One call of the platform's backend, 8 query heads on 2 KV heads, pages of 16."""
    runs = _RUNS[name]
    call = Call(num_heads=8, num_kv_heads=2, **room_for([runs], 16, is_exact=True))
    pool, q, *metadata = random_inputs(Case(name, "v6e", runs, call), seed=0)
    step = jax.jit(call.step("auto"))
    benchmark(lambda: jax.block_until_ready(step(q, pool, *metadata)))
