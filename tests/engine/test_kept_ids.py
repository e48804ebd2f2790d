# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The ids that top_k, min_p and top_p keep are those of the sorted form, on hostile rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference_engine import kept_ids
from reference_engine.request import Request
from reference_engine.sampler import greedy, make_rows, next_tokens
from reference_engine.sampling_params import SamplingParams
from reference_engine.sampling_rows import is_kept, split_rows
from tests.planted import plant

NUM_ROWS = 96
SIZES = [5, 700]  # the second one is three blocks of ties, the last one not full


def rows_of_logits(rng, size):
    """Rows with and without ties, with -inf, with wide and narrow ranges."""
    normal = rng.normal(size=(NUM_ROWS, size)) * rng.choice([0.01, 1, 3, 20], (NUM_ROWS, 1))
    normal += rng.choice([0, 0, 10, -500], (NUM_ROWS, 1))
    kind = rng.integers(8, size=(NUM_ROWS, 1))
    rows = np.where(kind == 1, np.round(normal), normal)  # ties
    rows = np.where(kind == 2, np.round(normal, 1), rows)
    rows = np.where(kind == 3, 7.25, rows)  # all equal
    rows = np.where(kind == 4, rng.choice([-1.0, 0.0, -0.0, 1.0], rows.shape), rows)
    rows = np.where((kind == 5) & (rng.random(rows.shape) < 0.9), -np.inf, rows)
    rows = np.where((kind == 6) & (np.arange(size) != size // 2), -np.inf, rows)
    rows = np.where(kind == 7, rng.choice([-3e38, 3e38, 1e-30, 2.0], rows.shape), rows)
    rows[np.all(rows == -np.inf, axis=1), size // 2] = 1.0
    return rows.astype(np.float32)


def params_of_rows(rng, size, **fixed):
    kinds = {
        "temperature": [0.6, 1.0, 1e-30, 5.0, 1e30, 0.0],
        "top_k": [
            0,
            1,
            2,
            3,
            20,
            63,
            64,
            255,
            256,
            257,
            512,
            size // 2,
            size - 1,
            size,
            size + 1,
            2**40,
        ],
        "top_p": [1.0, 0.95, 0.5, 1e-9, 1 - 2**-24],
        "min_p": [0.0, 0.0, 0.05, 0.5, 1.0, 1e-9],
    }
    return [
        SamplingParams(**({name: rng.choice(kinds[name]).item() for name in kinds} | fixed))
        for _ in range(NUM_ROWS)
    ]


def make_case(seed, size, **fixed):
    rng = np.random.default_rng([seed, size])
    params = params_of_rows(rng, size, **fixed)
    return rows_of_logits(rng, size), params


def kept_by(programs, logits, params):
    """Whether each id is kept, after these programs."""
    rows = make_rows([Request(0, (1,), one) for one in params], len(params))
    for program in programs:
        rows = program(logits, rows)
    return np.asarray(is_kept(jnp.asarray(logits), split_rows(jnp.asarray(rows))))


def likeliest_first(logits):
    return np.argsort(-logits, kind="stable")


def sorted_top_k(logits, top_k):
    kept = np.zeros(logits.shape, bool)
    kept[likeliest_first(logits)[: top_k or None]] = True
    return kept


def weights_of(logits, params):
    """exp((logit - max) / temperature) in float32, by the device."""
    return np.asarray(
        jax.jit(kept_ids._weights)(
            logits, (np.max(logits), np.float32(1) / np.float32(max(params.temperature, 2e-38)))
        )
    )


def sorted_top_p(logits, kept, params):
    """What is kept of what top_k has kept: sorted and added up with whole numbers.

    Only the power of two that makes whole numbers of weights comes from the definition.
    """
    weights = weights_of(logits, params).astype(float)
    kept = kept & (weights >= np.float32(params.min_p))
    if params.top_p == 1:
        return kept
    total = float(np.sum(np.where(kept, weights, 0)))
    scale = 2.0 ** (29 - np.floor(np.log2(total)))
    order = likeliest_first(logits)
    masses = np.floor(weights * scale + 0.5).astype(np.int64)
    masses = np.where(kept, masses, 0)[order]
    wanted = np.ceil(np.float32(params.top_p) * np.float32(total * scale))
    before = np.cumsum(masses) - masses
    keep = kept.copy()
    keep[order[before >= max(wanted, 1)]] = False
    return keep


def check_top_k(module, seed, size):
    logits, params = make_case(seed, size, temperature=1.0, top_p=1.0, min_p=0.0)
    got = kept_by([module.cut_top_k], logits, params)
    for row, one in enumerate(params):
        want = sorted_top_k(logits[row], one.top_k)
        assert np.array_equal(got[row], want), (row, one, logits[row])


def check_top_p(module, seed, size, **fixed):
    logits, params = make_case(seed, size, **fixed)
    got = kept_by([module.cut_top_k, module.cut_top_p], logits, params)
    for row, one in enumerate(params):
        if one.temperature == 0:
            assert got[row].all()  # greedy rows need nothing cut
            continue
        want = sorted_top_p(logits[row], sorted_top_k(logits[row], one.top_k), one)
        assert np.array_equal(got[row], want), (row, one, got[row].sum(), want.sum())


def check_few(module, seed, size):
    logits, params = make_case(seed, size)
    params = [dataclasses.replace(one, top_k=min(one.top_k, 64)) for one in params]
    got = kept_by([module.cut_to_few], logits, params)
    for row, one in enumerate(params):
        want = np.ones(size, bool)
        if one.temperature > 0 and one.top_k > 0:
            want = sorted_top_p(logits[row], sorted_top_k(logits[row], one.top_k), one)
        assert np.array_equal(got[row], want), (row, one, got[row].sum(), want.sum())


def check_all(module, size):
    for seed in range(4):
        check_top_k(module, seed, size)
        check_top_p(module, seed, size, top_k=0)
        check_top_p(module, seed, size)
        check_few(module, seed, size)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_kept_is_that_of_the_sorted_form(size):
    check_all(kept_ids, size)


def test_the_nucleus_is_the_smallest_that_reaches_top_p_in_float64():
    """As the real numbers define it, but for ids that they put within rounding of the border."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(NUM_ROWS, 700)) * 3).astype(np.float32)
    params = [
        SamplingParams(temperature=rng.uniform(0.3, 2), top_p=rng.uniform(0.05, 0.999))
        for _ in range(NUM_ROWS)
    ]
    got = kept_by([kept_ids.cut_top_p], logits, params)
    for row, one in enumerate(params):
        p = np.exp((logits[row].astype(float) - logits[row].max()) / one.temperature)
        p = np.sort(p / p.sum())[::-1]
        num_kept = got[row].sum()
        assert p[: num_kept - 1].sum() - 1e-6 < one.top_p < p[:num_kept].sum() + 1e-6
    assert len({kept.sum() for kept in got}) > NUM_ROWS // 4


def test_rows_without_a_number_cut_nothing_that_greedy_takes():
    logits = np.zeros((3, 5), np.float32)
    logits[0, 3], logits[1, 2], logits[2] = np.inf, np.nan, -np.inf
    one = SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1)
    requests = [Request(0, (1,), one) for _ in range(3)]
    assert next_tokens(logits, requests, 8).tolist() == [3, 2, 0] == greedy(logits).tolist()


FAULTS = {
    "ties from the end": ("up_to_id < num_ties[:, None]", "up_to_id <= num_ties[:, None]"),
    "a block too many": ("is_before = up_to_block <", "is_before = up_to_block <="),
    "no ties before the block": ("jnp.where(is_before, up_to_block, 0)", "0 * up_to_block"),
    "above the pivot": ("logits >= pivot[:, None]", "logits > pivot[:, None]"),
    "a digit too few": ("-(-32 // _BITS)", "32 // _BITS"),
    "the last failing pivot": (
        "jnp.max(jnp.where(reaches, 0, sums), axis=0)",
        "jnp.min(jnp.where(reaches, 2**30, sums), axis=0)",
    ),
    "signs": ("key ^ np.uint32(0x80000000), ~key", "key ^ np.uint32(0x80000000), key"),
    "NaNs below": ("key = jnp.maximum(key, lowest)", "key = jnp.maximum(key, 0)"),
    "min_p after top_p": (
        "kept = is_kept(logits, s) & (weights >= s.min_p[:, None])",
        "kept = is_kept(logits, s)",
    ),
    "top_p of all": (
        "kept = is_kept(logits, s) & (weights >= s.min_p[:, None])",
        "kept = weights >= s.min_p[:, None]",
    ),
    "cut ties count": ("(pivots <= lowest) |", "(pivots < lowest) |"),
    "rounded down": ("(x + 0.5)", "(x + 0.0)"),
    "no middle bits": ("middle) / _LIMB", "0 * middle) / _LIMB"),
    "no low bits": ("(low / _LIMB", "(0 * low / _LIMB"),
    "one tie": ("-(-(wanted - above) // ", "((wanted - above) // "),
    "top_p of 1": ("has_top_p = s.top_p < 1", "has_top_p = s.top_p <= 1"),
    "few: zeros": ("jnp.where(logits == 0, 0.0, logits)", "logits"),
    "few: the order of blocks": ("jnp.sort(blocks, axis=1)[:, :, None]", "blocks[:, :, None]"),
    "few: one too many": (") < s.top_k[:, None]", ") <= s.top_k[:, None]"),
    "few: no min_p": ("kept &= weights >= s.min_p", "kept &= weights >= 0 * s.min_p"),
    "few: one id more": ("(before < wanted[:, None])", "(before <= wanted[:, None])"),
    "few: rows that cut nothing": ("is_cut = s.top_k > 0", "is_cut = s.top_k >= 0"),
}
FAULTS = {name: (kept_ids.__name__, old, new) for name, (old, new) in FAULTS.items()}
PLANTED = list(FAULTS.values())


@pytest.mark.parametrize("name", FAULTS)
def test_planted_bugs_are_caught(name, monkeypatch):
    module = plant(monkeypatch, "reference_engine", *FAULTS[name])
    with pytest.raises(AssertionError):
        check_all(module, SIZES[1])
