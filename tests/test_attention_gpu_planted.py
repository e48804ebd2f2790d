# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Bugs planted in the GPU attention: the checks of test_attention_gpu.py must catch each.

A bug is one snippet of a module's source, replaced; the modules that import it are made anew. Each
runs in GPU interpret mode, and the test says how it shows.
"""

import importlib

import jax
import jax.numpy as jnp
import pytest

from pallas_paged import dispatch
from tests.attention_cases import make_case, mismatch, run_oracle
from tests.cases import RaceFoundError, run_all_on_gpu
from tests.planted import plant

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2) or jax.default_backend() == "gpu",
    reason="GPU interpret mode is for a CPU with jax 0.11.2",
)

# The package; as an attribute of pallas_paged its name is the op's.
package = importlib.import_module("pallas_paged.ragged_paged_attention")
# In the order in which they import each other.
_MODULES = tuple(
    f"mosaic_gpu{part}" for part in (
        "_shape", "_rows", "_blocks", "_attend", "_merge", "_prefill", "_decode", "",
    )
)  # fmt: skip
# Decodes in three parts, and a prefill of two tiles with a rest; both end inside a page.
LENS = [(1, 300), (140, 203)]

# name: (module, snippet, what is planted instead, symptom)
BUGS = {
    "none": ("", "_HEAD_DIMS = (64, 128, 256)", "_HEAD_DIMS = (64, 128, 256)", None),
    "wrong_row_of_the_table": ("_blocks", "table[seq, entry]", "table[0, entry]", "wrong"),
    "causal_edge": ("_attend", "jnp.minimum(own + 1, end)", "jnp.minimum(own, end)",
                    "wrong"),
    "window_edge": ("_attend", "is_seen &= key > over_rows(own - rows.window,",
                    "is_seen &= key >= over_rows(own - rows.window,", "wrong"),
    "nan_behind_the_sequence": ("_attend", "@pl.when((begin > 0) | (end < span.block))",
                                "@pl.when(begin > span.block)", "wrong"),
    "nothing_is_cleared_for_the_other": ("_blocks", "plgpu.barrier_arrive(ring.cleared)\n"
                                         "        plgpu.barrier_wait(ring.cleared)", "pass",
                                         "race"),
    "released_early": ("_attend", "        out, (largest, total, shrink, new) = _scores_and_sum(\n"
                       "            rows.queries, keys, out, weights, values, weigh, span.block,"
                       " shape\n        )\n        plgpu.barrier_arrive(ring.empty.at[before])\n",
                       "        plgpu.barrier_arrive(ring.empty.at[before])\n"
                       "        out, (largest, total, shrink, new) = _scores_and_sum(\n"
                       "            rows.queries, keys, out, weights, values, weigh, span.block,"
                       " shape\n        )\n", "race"),
    "a_missed_wait": ("_attend", "    plgpu.barrier_wait(ring.full.at[slot])\n", "", "race/error"),
    "dropped_rescale": ("_attend", "total * shrink + weights.sum(axis=1)",
                        "total + weights.sum(axis=1)", "wrong"),
    "values_of_another_block": ("_attend", "ring.values(before, shape.head_dim)",
                                "ring.values(slot, shape.head_dim)", "wrong"),
    "a_part_forgotten": ("_decode", "last - share.index + 1, segment.row",
                         "last - share.index, segment.row", "wrong"),
    "parts_weigh_alike": ("_merge", "mean + part * weight", "mean + part", "wrong"),
    "a_share_nobody_merges": ("_prefill", "block\") + warpgroup * num_blocks",
                              "block\") + (warpgroup + 1) * num_blocks", "wrong"),
    "neighbours_rows": ("_prefill", "tile.begin - row, tile.end - row, 1",
                        "tile.begin - row, tile.end + 1 - row, 1", "wrong/race/error"),
    "rows_of_nobody": ("_prefill", "jnp.full((WARPGROUP_ROWS,), -jnp.inf",
                       "jnp.full((WARPGROUP_ROWS,), 0.0", "wrong"),
}


PLANTED = [
    (f"{package.__name__}.mosaic_gpu{suffix}", old, new) for suffix, old, new, _ in BUGS.values()
]


def _run(monkeypatch, name, old, new):
    """What is wrong with the result of a call whose kernels have a bug; None if nothing is."""
    plant(monkeypatch, package, _MODULES, f"mosaic_gpu{name}", old, new)
    kernels = package.mosaic_gpu
    monkeypatch.setattr(dispatch, "num_multiprocessors", lambda: 2)
    case = make_case(
        LENS, num_heads=2, num_kv_heads=1, head_dim=64, page_size=16, dtype="bfloat16",
        pool_dtype="bfloat16", first_row=3,
    )  # fmt: skip
    options = {"sm_scale": 0.125, "num_kv_heads": 1, "sliding_window": 150}

    def call():
        return kernels.ragged_paged_attention(
            *(jnp.asarray(x) for x in case.arrays), **options, causal=True, soft_cap=None,
            k_scale=None, v_scale=None, sinks=None, return_lse=True, is_scale_positive=True,
            config=kernels.Config(64, 2, 64, 2),
        )  # fmt: skip

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
