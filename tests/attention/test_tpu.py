# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The TPU kernel of the ragged paged attention, interpreted, against the oracle.

Each setup is one compiled program, in one of the two DMA modes, on several batches; test_coverage
says what the setups must cover together. test_tpu_planted.py shows that these checks find
bugs.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.attention.api import ragged_paged_attention
from pallas_paged.attention.tpu import decode
from pallas_paged.attention.tpu.launch import TpuAttentionConfig
from tests import jax_lines
from tests.attention.cases import ABSURD, Setup, check, make_case, mismatch, run_kernel, run_oracle
from tests.kv_write import cases
from tests.kv_write.cases import INT_MAX, INT_MIN

SETUPS = [
    Setup(12, 2, 128, 16, batches=("mix", "prefill", "decodes", "late"), return_lse=True),
    Setup(5, 1, 64, 4, "bfloat16", "bfloat16", ("blocks", "mix", "late"), windows=(150,)),
    Setup(
        3,
        3,
        80,
        1,
        "float32",
        "bfloat16",
        ("few", "boundary"),
        soft_cap=2.5,
        causal=False,
        num_tokens=37,
        config=(256, 128, 2),
    ),
    Setup(
        8,
        8,
        128,
        24,
        "bfloat16",
        "float8_e4m3fn",
        ("mix", "prefill"),
        scale="head",
        return_lse=True,
    ),
    Setup(
        4,
        1,
        96,
        33,
        "float32",
        "float8_e5m2",
        ("boundary", "blocks", "late", "none"),
        causal=False,
    ),
    Setup(
        16,
        2,
        128,
        131,
        "bfloat16",
        "bfloat16",
        ("few",),
        has_sinks=True,
        windows=(1, 140),
        is_window_traced=True,
        return_lse=True,
        num_tokens=37,
        config=(256, 128, 2),
    ),
    Setup(
        32,
        8,
        128,
        256,
        "bfloat16",
        "bfloat16",
        ("boundary",),
        num_tokens=19,
        config=(128, 128, 4, 2),
    ),
    Setup(
        4,
        2,
        192,
        200,
        "float32",
        "int8",
        ("mix", "beyond_window"),
        scale="head",
        windows=(7, 300, INT_MAX),
        is_window_traced=True,
        soft_cap=3.0,
    ),
    Setup(
        4,
        2,
        256,
        16,
        "bfloat16",
        "float32",
        ("window", "blocks"),
        return_lse=True,
        config=(128, 128, 4, 2),
    ),
    Setup(
        4,
        2,
        32,
        16,
        "bfloat16",
        "int8",
        ("prefill", "few"),
        scale="tensor",
        causal=False,
        windows=(20,),
        return_lse=True,
        config=(256, 128, 3),
    ),
    Setup(
        6,
        3,
        64,
        33,
        "float32",
        "float8_e4m3fn",
        ("window", "boundary"),
        soft_cap=4.0,
        scale="tensor",
        has_sinks=True,
        return_lse=True,
    ),
    Setup(
        2,
        1,
        32,
        16,
        batches=("decodes", "blocks"),
        windows=(16,),
        has_sinks=True,
        return_lse=True,
    ),
    Setup(
        5,
        1,
        256,
        24,
        "bfloat16",
        "float8_e5m2",
        ("few", "beyond_window"),
        scale="head",
        config=(128, 256, 2),
    ),
    Setup(
        3,
        3,
        96,
        4,
        "bfloat16",
        "bfloat16",
        ("prefill", "none"),
        soft_cap=1.5,
        num_rows=10,
        return_lse=True,
    ),
]
RUNS = [(setup, cases.MODES[i // 2 % 2]) for i, setup in enumerate(SETUPS)]


def _features(run):
    setup, mode = run
    return setup.features() + (mode,)


@pytest.mark.parametrize(
    ("setup", "mode"), jax_lines.runs(RUNS, _features, lambda run: f"{run[0].id}-{run[1]}")
)
def test_kernel_is_the_oracle(setup, mode):
    for batch, window in itertools.product(setup.batches, setup.windows or (None,)):
        label = f"{batch}, window {window}: "
        check(
            setup.case(batch),
            setup.options(window),
            mode,
            setup.config,
            label=label,
            whole_tolerance=setup.whole_tolerance(batch),
        )


def test_coverage():
    """What the setups above must cover together, so that a trimmed list does not lose it."""
    for name, wanted in {
        "page_size": {1, 4, 16, 24, 33, 131, 200, 256},
        "head_dim": {32, 64, 80, 96, 128, 192, 256},
        "causal": {True, False},
        "has_sinks": {True, False},
        "return_lse": {True, False},
    }.items():
        assert wanted <= {getattr(s, name) for s in SETUPS}, name
    heads = {(12, 2), (5, 1), (3, 3), (8, 8), (4, 1), (16, 2), (32, 8)}
    assert heads <= {(s.num_heads, s.num_kv_heads) for s in SETUPS}
    pools = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    types = {(s.dtype, s.pool_dtype) for s in SETUPS}
    assert set(itertools.product(("float32", "bfloat16"), (*pools, "int8"))) <= types
    assert {(s.pool_dtype, s.scale) for s in SETUPS} >= {
        ("float8_e4m3fn", "head"),
        ("float8_e4m3fn", "tensor"),
        ("float8_e5m2", "none"),
        ("float8_e5m2", "head"),
        ("int8", "head"),
        ("int8", "tensor"),
    }
    # Padding lanes, of both ways in which a slot holds K and V, in both computing dtypes.
    padded = {(s.head_dim, "float32" in (s.dtype, s.pool_dtype)) for s in SETUPS}
    assert {(32, True), (32, False), (96, True), (96, False), (80, True)} <= padded
    for features in itertools.combinations(("has_sinks", "windows", "soft_cap"), 2):
        assert any(all(getattr(s, f) for f in features) for s in SETUPS), features
    assert any(s.windows and not s.causal for s in SETUPS)
    assert {s.is_window_traced for s in SETUPS if s.windows} == {True, False}
    shorter = [w < min(s.page_size, s.config[0]) for s in SETUPS for w in s.windows]
    longer = [w > max(s.page_size, s.config[0]) for s in SETUPS for w in s.windows]
    assert any(shorter) and any(longer)
    every = {(b, m) for s, m in RUNS for b in s.batches}
    kinds = ("mix", "prefill", "boundary", "blocks", "decodes", "window")
    assert set(itertools.product(kinds, cases.MODES)) <= every
    assert {b for b, _ in every} == {*kinds, "beyond_window", "few", "late", "none"}
    # Every option of the kernel's outer loop in either mode.
    for name in ("dtype", "return_lse", "causal", "has_sinks"):
        seen = {(getattr(s, name), m) for s, m in RUNS}
        assert len(seen) == 4, name
    assert len({s.config for s in SETUPS}) > 2
    assert {len(s.config) for s in SETUPS} == {3, 4}  # also multiple blocks per iteration


# ---- The comparison can fail


def test_one_percent_in_one_head_is_caught():
    """The tolerances are tight: half as much again would still be 10 times what is planted."""
    for setup in (SETUPS[0], SETUPS[1]):
        case, options = setup.case("mix"), setup.options(150 if setup.windows else None)
        wanted, lse = run_oracle(case, options)
        rounded = np.asarray(wanted.astype(case.q.dtype))
        assert mismatch(rounded, lse, wanted, lse) is None
        for head in range(setup.num_heads):
            planted = np.array(wanted)
            planted[:, head] *= 1.01
            found = mismatch(planted.astype(case.q.dtype), lse, wanted, lse)
            assert found is not None and found.startswith(f"head {head} is off by"), found


def test_one_percent_in_one_row_is_caught():
    setup = SETUPS[1]
    case, options = setup.case("mix"), setup.options(150)
    wanted, lse = run_oracle(case, options)
    row = int(case.cu_q_lens[2])
    planted = np.array(wanted)
    planted[row, 3] *= 1.01
    found = mismatch(planted.astype(case.q.dtype), lse, wanted, lse)
    assert found is not None and found.startswith(f"row, head ({row}, 3)"), found
    assert mismatch(np.asarray(wanted), np.asarray(lse) + 3e-5, wanted, lse) is not None


# ---- Edges


@pytest.mark.parametrize("sm_scale", [-1.0, 5.0])
@pytest.mark.parametrize("batch", ["mix", "prefill"])
def test_scores_far_apart(batch, sm_scale):
    """Scores of hundreds: 2 to their power is no float32, in either direction."""
    setup = SETUPS[0]
    options = setup.options() | {"sm_scale": sm_scale}
    case = setup.case(batch)
    check(case, options, RUNS[0][1], setup.config, slack=20)
    _, lse = run_oracle(case, options)
    there = np.asarray(lse)[np.isfinite(lse)]
    assert np.max(there) > 30 and np.min(there) < -10


def test_scores_far_apart_in_bfloat16():
    setup = SETUPS[1]
    for sm_scale in (-1.0, 5.0):
        check(
            setup.case("mix"),
            setup.options(150) | {"sm_scale": sm_scale},
            RUNS[1][1],
            setup.config,
        )


def test_a_decode_in_every_row():
    """The decodes go across row tiles and q tiles, and each has keys."""
    case = make_case(
        [(1, 1 + 37 * i % 40 + (i % 25 == 24) * 190) for i in range(150)],
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        page_size=16,
        first_row=5,
    )
    options = {"num_kv_heads": 1, "return_lse": True, "sm_scale": 0.1}
    check(case, options, "on_wait", detect_races=False)


@pytest.mark.parametrize("return_lse", [True, False])
def test_no_tokens(return_lse):
    q, *rest = make_case([(1, 3)]).arrays
    result = ragged_paged_attention(
        q[:0], *rest, num_kv_heads=2, return_lse=return_lse, backend="mosaic_tpu"
    )
    out, *lse = result if return_lse else (result,)
    assert out.shape == (0, 4, 32) and [x.shape for x in lse] == [(0, 4)] * return_lse


def test_all_rows_of_a_pool_are_heads_where_nothing_else_is_said():
    setup, mode = RUNS[0]
    options = setup.options()
    del options["num_kv_heads"]
    check(setup.case("late"), options, mode, setup.config)


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_metadata_ends_and_stays_in_bounds(name):
    """The interpreter raises where the kernel leaves an array; the numbers do not matter."""
    case = make_case(
        [(6, 6), (1, 11), (9, 20), (1, 3)], num_tokens=23, max_seqs=6, table_width=6, num_pages=12
    )
    change = {k: np.array(v, np.int32) for k, v in ABSURD[name].items()}
    assert all(getattr(case, k).shape == v.shape for k, v in change.items())
    case = dataclasses.replace(case, **change)
    mode = cases.MODES[0]  # one, so that all of these share a program
    options = {"num_kv_heads": 2, "return_lse": True, "sliding_window": 14}
    out, lse = run_kernel(case, options, mode)
    if name.startswith("a negative"):
        assert not np.any(out) and np.all(np.isneginf(lse))


def test_sequences_around_absurd_ones_are_right():
    """What one sequence's absurd length or id may do is done to its own rows."""
    case = make_case(
        [(6, 6), (1, 11), (9, 20), (1, 3)], num_tokens=23, max_seqs=6, table_width=6, num_pages=12
    )
    options = {"num_kv_heads": 2, "return_lse": True, "sliding_window": 14}
    want, want_lse = run_oracle(case, options)
    rows = [*range(6), *range(7, 16)]  # of sequences 0 and 2
    for kv_len, page in ((-3, 0), (INT_MAX, INT_MIN), (2**20, INT_MAX)):
        kv_lens, table = case.kv_lens.copy(), case.page_indices.copy()
        kv_lens[[1, 3]], table[[1, 3]] = kv_len, page
        absurd = dataclasses.replace(case, kv_lens=kv_lens, page_indices=table)
        out, lse = run_kernel(absurd, options, cases.MODES[0])
        found = mismatch(out[rows], lse[rows], want[np.array(rows)], want_lse[np.array(rows)])
        assert found is None, found


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((100, 128), "block_kv"),
        ((128, 64), "block_q"),
        ((0, 128), "block_kv"),
        ((128, 128, 0), "num_stages"),
        ((128, 128, 2, 0), "kv_blocks_per_iteration"),
        ((128, 128, 3, 2), "num_stages is 3; wanted at least twice kv_blocks_per_iteration, 2"),
    ],
)
def test_config_refuses(sizes, name):
    """Also too few stages, in which an iteration would wait for blocks that nobody fetches."""
    with pytest.raises(ValueError, match=name):
        TpuAttentionConfig(*sizes)


# ---- Long sequences


def _long_case(lens, page_size=256):
    """Sequences whose last keys, and those at the edges of a window, weigh more than all others."""
    return make_case(
        lens,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        page_size=page_size,
        pool_dtype="bfloat16",
        num_tokens=16,
    )


@pytest.mark.parametrize("window", [5, 32_769])
def test_positions_past_16_bits(window):
    """Edges of a window at positions past 32,767 and 65,535; of 5 keys, one more is 20%."""
    case = _long_case([(1, 66_000), (3, 65_538), (2, 32_769)])
    options = {"num_kv_heads": 1, "sliding_window": jnp.int32(window), "sm_scale": 0.05}
    check(case, options, "eager", (1024, 128, 2))


def test_a_decode_of_more_products_than_one_softmax_takes():
    """Iterations take three full blocks of 2,048 keys, then one of the blocks that are left."""
    config = (2048, 128, 6, 3)
    assert config[0] * config[3] > decode._JOINT_KEYS
    case = _long_case([(1, 14_400), (1, 6_144)])
    options = {"num_kv_heads": 1, "sm_scale": 0.1, "return_lse": True}
    check(case, options, "eager", config)


def test_causal_edge_past_16_bits():
    """The last keys of a long sequence weigh more than all others together."""
    kv_len, q_len = 65_538, 3
    case = _long_case([(q_len, kv_len)])
    pool = np.array(case.kv_pages)
    direction = np.array(case.q[0, 0])
    case.q = np.broadcast_to(direction, case.q.shape)
    for position in range(kv_len - q_len - 1, kv_len):
        page = case.page_indices[0, position // 256]
        pool[page, position % 256, 0] = direction.astype(pool.dtype)
    case.kv_pages = jnp.asarray(pool)
    options = {"num_kv_heads": 1, "sm_scale": 0.3, "return_lse": True}
    out, _ = check(case, options, "on_wait", (2048, 128, 2))
    # The edge is all that matters: one key more or less is a quarter of the weight.
    assert np.all(row_change(out[0], out[1]) > 0.1)


def row_change(a, b):
    """How far two rows [N, H] are apart, f64[N], relative."""
    return np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)


# ---- What the ops are composed of


def test_two_parts_merged_by_log_sum_exp_are_the_whole():
    """Attention over the first keys, not causal, and over the rest, is attention over all."""
    q_len, first, rest = 20, 48, 37  # the cut is at a page's end
    options = {"num_kv_heads": 2, "return_lse": True, "sm_scale": 0.2}
    whole = make_case([(q_len, first + rest)], head_dim=64, page_size=48, num_tokens=23)
    part = dataclasses.replace(whole, page_indices=np.roll(whole.page_indices, -1, axis=1))
    parts = []
    for case, kv_len, causal in ((whole, first, False), (part, rest, True)):
        lens = case.kv_lens.copy()
        lens[0] = kv_len
        case = dataclasses.replace(case, kv_lens=lens)
        parts.append(check(case, options | {"causal": causal}, "eager"))
    want, want_lse = run_oracle(whole, options)
    (a, lse_a), (b, lse_b) = ([x[:q_len].astype(np.float64) for x in part] for part in parts)
    lse = np.logaddexp(lse_a, lse_b)
    merged = a * np.exp(lse_a - lse)[..., None] + b * np.exp(lse_b - lse)[..., None]
    found = mismatch(merged.astype(np.float32), lse, want[:q_len], want_lse[:q_len])
    assert found is None, found
