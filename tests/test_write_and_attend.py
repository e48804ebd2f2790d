# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The fused TPU kernel, which writes a batch's new tokens and attends: interpreted.

The output is held to the oracle's by the tolerances, the whole pool bit for bit. Where new tokens
go there is NaN before, as everywhere else where nothing is. test_attention_planted.py shows that
these checks find bugs.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.ragged_paged_attention import mosaic_tpu
from pallas_paged.ragged_paged_attention.api import ragged_paged_attention, write_and_attend
from tests import cases
from tests.attention_cases import (
    Setup,
    Write,
    call_kernel,
    check_write,
    interpret_all,
    make_case,
    make_write,
    run_oracle,
)
from tests.cases import INT_MAX, INT_MIN


@dataclasses.dataclass(frozen=True)
class Call:
    """A setup, how k and v come, and the DMA mode."""

    setup: Setup
    is_flat: bool
    mode: str

    @property
    def id(self):
        return f"{self.setup.id}-{'flat' if self.is_flat else 'by_head'}-{self.mode}"

    def write(self, batch, seed=0):
        """One batch, its new tokens not yet in the pool."""
        options = self.setup.options()
        scales = options.get("k_scale"), options.get("v_scale")
        return make_write(self.setup.case(batch, seed), is_flat=self.is_flat, scales=scales)


CALLS = [
    Call(
        Setup(
            4, 2, 32, 16, batches=("chunks", "spans", "late", "none"), return_lse=True,
            num_tokens=291,
        ),
        True, "on_wait",
    ),
    Call(
        Setup(
            5, 1, 128, 24, "bfloat16", "bfloat16", ("chunks", "spans"), windows=(20,),
            num_tokens=291, config=(128, 128, 4, 2),
        ),
        True, "eager",
    ),
    Call(
        Setup(
            2, 1, 192, 200, "bfloat16", "float8_e4m3fn", ("spans", "tiny"), scale="head",
            has_sinks=True, return_lse=True, num_tokens=291,
        ),
        False, "on_wait",
    ),
    Call(
        Setup(
            3, 3, 96, 5, "float32", "float8_e5m2", ("chunks", "few"), causal=False, soft_cap=2.5,
            num_tokens=103,
        ),
        False, "eager",
    ),
    Call(
        Setup(
            6, 3, 64, 33, "bfloat16", "int8", ("spans", "chunks"), scale="head", causal=False,
            has_sinks=True, num_tokens=291,
        ),
        True, "on_wait",
    ),
    Call(
        Setup(
            2, 2, 256, 1, "float32", "bfloat16", ("tiny",), windows=(7, INT_MAX),
            is_window_traced=True, num_tokens=37, return_lse=True, config=(256, 128, 2),
        ),
        True, "eager",
    ),
    Call(
        Setup(
            2, 1, 128, 64, "bfloat16", "float32", ("spans",), num_tokens=291, soft_cap=3.0,
            return_lse=True, config=(128, 128, 4, 2),
        ),
        False, "on_wait",
    ),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.id)
def test_kernel_is_the_oracle(call):
    setup = call.setup
    for batch, window in itertools.product(setup.batches, setup.windows or (None,)):
        write = call.write(batch)
        q, _, _, pool, *_ = write.arrays
        assert mosaic_tpu.is_fused(q, pool, setup.num_kv_heads, mosaic_tpu.Config(*setup.config))
        label = f"{batch}, window {window}: "
        check_write(write, setup.options(window), call.mode, setup.config, label=label)
