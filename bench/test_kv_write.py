# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The bench's cases under pytest-benchmark: pytest bench --benchmark-only."""

from typing import Any

import jax
import pytest

from bench.cases.kv_write import OPS, WriteCase
from bench.measure.kv_write import random_inputs


@pytest.mark.parametrize("op", OPS)
def test_write(benchmark: Any, op: str) -> None:
    """One call of the platform's backend, pool donated, 1,024 tokens in pages of 16."""
    case = WriteCase(op, "v6e", 16, 1024, 8, 128, "bfloat16")
    pool, *inputs = random_inputs(case, seed=0)
    step = jax.jit(case.step("auto"), donate_argnums=0)
    pool = step(pool, *inputs)

    def write() -> None:
        nonlocal pool
        pool = jax.block_until_ready(step(pool, *inputs))

    benchmark(write)
