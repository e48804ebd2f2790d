# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Bugs planted in the GPU attention: the checks of test_gpu.py must catch each.

A bug is one snippet of a module's source, replaced; the modules that import it are made anew. Each
runs in GPU interpret mode, and the test says how it shows.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_paged import dispatch
from pallas_paged.attention import gpu
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from tests.attention.cases import make_case, mismatch, run_oracle
from tests.kv_write.cases import RaceFoundError, run_all_on_gpu
from tests.planted import plant

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2) or jax.default_backend() == "gpu",
    reason="GPU interpret mode is for a CPU with jax 0.11.2",
)

_ROOM = gpu.__name__
# A decode in three splits, and a prefill of two tiles with a rest; both end inside a page.
LENS = [(1, 300), (140, 203)]

# name: (module, snippet, what is planted instead, symptom)
BUGS = {
    "none": ("launch", "_HEAD_DIMS = (64, 128, 256)", "_HEAD_DIMS = (64, 128, 256)", None),
    "wrong_row_of_the_table": ("kv_blocks", "table[seq, entry]", "table[0, entry]", "wrong"),
    "causal_edge": (
        "online_softmax",
        "jnp.minimum(own + 1, end)",
        "jnp.minimum(own, end)",
        "wrong",
    ),
    "window_edge": (
        "online_softmax",
        "is_seen &= key > over_columns(own - rows.window,",
        "is_seen &= key >= over_columns(own - rows.window,",
        "wrong",
    ),
    "nan_after_the_sequence": (
        "online_softmax",
        "@pl.when((begin > 0) | (end < kv_range.block_kv))",
        "@pl.when(begin > kv_range.block_kv)",
        "wrong",
    ),
    "nothing_is_cleared_for_the_other": (
        "kv_blocks",
        "plgpu.barrier_arrive(stages.cleared)\n        plgpu.barrier_wait(stages.cleared)",
        "pass",
        "race",
    ),
    "released_early": (
        "online_softmax",
        "        out, (largest, total, shrink, new) = _scores_and_sum(\n"
        "            rows.queries, keys, out, weights, values, weigh, kv_range.block_kv,"
        " spec\n        )\n        plgpu.barrier_arrive(stages.empty.at[before])\n",
        "        plgpu.barrier_arrive(stages.empty.at[before])\n"
        "        out, (largest, total, shrink, new) = _scores_and_sum(\n"
        "            rows.queries, keys, out, weights, values, weigh, kv_range.block_kv,"
        " spec\n        )\n",
        "race",
    ),
    "a_missed_wait": (
        "online_softmax",
        "    plgpu.barrier_wait(stages.full.at[stage])\n",
        "",
        "race/error",
    ),
    "dropped_rescale": (
        "online_softmax",
        "total * shrink + weights.sum(axis=1)",
        "total + weights.sum(axis=1)",
        "wrong",
    ),
    "values_of_another_block": (
        "online_softmax",
        "stages.values(before, spec.head_dim)",
        "stages.values(stage, spec.head_dim)",
        "wrong",
    ),
    "a_split_forgotten": (
        "decode",
        "last - partition.index + 1, tile.row",
        "last - partition.index, tile.row",
        "wrong",
    ),
    "splits_weigh_alike": (
        "combine_splits",
        "mean + split_mean * weight",
        "mean + split_mean",
        "wrong",
    ),
    "a_head_nobody_combines": (
        "kernel",
        'block") + warpgroup * num_thread_blocks',
        'block") + (warpgroup + 1) * num_thread_blocks',
        "wrong",
    ),
    "neighbours_rows": (
        "prefill",
        "tile.begin - row, tile.end - row",
        "tile.begin - row, tile.end + 1 - row",
        "wrong/race/error",
    ),
    "rows_of_nobody": (
        "kernel",
        "full_column(-jnp.inf)",
        "full_column(0.0)",
        "wrong",
    ),
}


PLANTED = [(f"{_ROOM}.{module}", old, new) for module, old, new, _ in BUGS.values()]


def _run(monkeypatch, name, old, new):
    """What is wrong with the result of a call whose kernels have a bug; None if nothing is."""
    plant(monkeypatch, _ROOM, f"{_ROOM}.{name}", old, new)
    kernels = gpu.launch
    monkeypatch.setattr(dispatch, "num_multiprocessors", lambda: 2)
    case = make_case(
        LENS,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        page_size=16,
        dtype="bfloat16",
        pool_dtype="bfloat16",
        first_row=3,
    )
    options = {"sm_scale": 0.125, "num_kv_heads": 1, "sliding_window": 150}
    q, pool, *batch = (jnp.asarray(x) for x in case.arrays)
    static = AttentionOptions(1, return_lse=True, has_window=True)
    config = kernels.GpuAttentionConfig(64, 2, 64, 2)
    spec = kernels.plan(q, pool, batch[1], static, config).spec
    factors = Factors(jnp.float32(options["sm_scale"]), jnp.int32(options["sliding_window"]))

    def call():
        return kernels.attend(spec, q, None, pool, Batch(*batch), factors)[:2]

    return mismatch(*run_all_on_gpu(call), *run_oracle(case, options))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(monkeypatch, bug):
    module, old, new, symptom = BUGS[bug]
    try:
        found = _run(monkeypatch, module, old, new)
    except RaceFoundError:
        shown = "race"
    except jax.errors.JaxRuntimeError:
        shown = "error"
    else:
        shown = "wrong" if found else None
    wanted = (None,) if symptom is None else symptom.split("/")
    assert shown in wanted, shown
