# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention of XLA's own operations against the oracle, on the cases of the TPU kernel."""

import itertools

import jax
import pytest

from pallas_paged.attention.api import ragged_paged_attention
from pallas_paged.attention.xla import launch as xla
from tests.attention import test_tpu
from tests.attention.cases import mismatch, run_oracle
from tests.kv_write.cases import FAST_COMPILE

ON_CPU = jax.default_backend() == "cpu"


def run(case, options):
    """[out, log-sum-exp], compiled apart from what else runs."""

    def call(*arrays):
        return ragged_paged_attention(*arrays, **options, return_lse=True, backend="xla")

    jitted = jax.jit(call, compiler_options=FAST_COMPILE if ON_CPU else None)
    return jitted(*case.arrays)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several groups of several blocks, in a case of the tests' size."""
    for platform in ("cpu", "gpu"):
        monkeypatch.setitem(xla._BLOCK_Q, platform, 16)
        monkeypatch.setitem(xla._BLOCK_KV, platform, 48)
        monkeypatch.setitem(xla._MAX_TILES, platform, 3)
        monkeypatch.setitem(xla._GROUP_BYTES, platform, 2**19)


@pytest.mark.parametrize("setup", test_tpu.SETUPS, ids=lambda setup: setup.id)
def test_it_is_the_oracle(setup):
    for batch, window in itertools.product(setup.batches, setup.windows or (None,)):
        case, options = setup.case(batch), setup.options(window)
        options.pop("return_lse", None)
        found = mismatch(*run(case, options), *run_oracle(case, options))
        assert found is None, f"{batch}, window {window}: {found}"
