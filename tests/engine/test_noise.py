# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The noise is Gumbel's, and that of neighbouring ids, seeds and steps has nothing in common."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference_engine import sampler
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.sampling_rows import split_rows
from tests.planted import plant

SIZE = 8192
SEEDS = [0, 1, 2, 3, -1, 2**32, 2**33, 2**63 - 1]  # of both halves
STEPS = [0, 1, 2, 3, 16, 1000]


def rows_of(module, cases):
    requests = [
        Request(0, (1,), SamplingParams(temperature=1.0), output_ids=[0] * step, seed=seed)
        for seed, step in cases
    ]
    return module.make_rows(requests, len(requests))


def noise_of(module, cases):
    """The noise of each (seed, step), f32[rows, SIZE]."""
    rows = jnp.asarray(rows_of(module, cases))
    return np.asarray(jax.jit(lambda rows: module._gumbel(split_rows(rows), SIZE))(rows))


def assert_uniform(counts):
    expected, freedom = np.sum(counts) / len(counts), len(counts) - 1
    statistic = np.sum((counts - expected) ** 2 / expected)
    # Too even is as suspicious as too uneven.
    assert abs(statistic - freedom) < 6 * math.sqrt(2 * freedom), statistic / freedom


def check_distribution(module):
    noise = noise_of(module, itertools.product(SEEDS, STEPS)).astype(float)
    uniform = np.exp(-np.exp(-noise))
    assert_uniform(np.bincount((uniform.ravel() * 256).astype(int).clip(0, 255), minlength=256))
    # The largest noise of a row decides: it has Gumbel's law itself, log(SIZE) later.
    largest = noise_of(module, [(seed, 7) for seed in range(2048)]).max(axis=1).astype(float)
    uniform = np.exp(-np.exp(-(largest - np.log(SIZE))))
    assert_uniform(np.bincount((uniform * 16).astype(int), minlength=16))


def check_independence(module):
    cases = list(itertools.product(SEEDS, STEPS))
    # Ranks have a variance, and so are close to normal in the mean.
    uniform = np.exp(-np.exp(-noise_of(module, cases).astype(float))) - 0.5
    limit = 6 / 12 / math.sqrt(SIZE)
    for a, b in itertools.combinations(range(len(cases)), 2):  # seeds and steps
        assert abs(np.mean(uniform[a] * uniform[b])) < limit, (cases[a], cases[b])
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 256, 4096):  # ids
        pairs = uniform[:, lag:] * uniform[:, :-lag]
        assert abs(np.mean(pairs)) < 6 / 12 / math.sqrt(pairs.size), lag
        # Also of the high ends, which are what a draw looks at.
        high = uniform > 0.45
        both = np.mean(high[:, lag:] & high[:, :-lag])
        assert abs(both - 0.05**2) < 6 * math.sqrt(0.05**2 / pairs.size), lag
    winners = noise_of(module, [(seed, seed % 3) for seed in range(2048)]).argmax(axis=1)
    for group in (winners % 16, winners // (SIZE // 16), (winners[1:] - winners[:-1]) % 16):
        assert_uniform(np.bincount(group, minlength=16))


CHECKS = {"distribution": check_distribution, "independence": check_independence}


@pytest.mark.parametrize("check", CHECKS)
def test_the_noise(check):
    CHECKS[check](sampler)


def test_the_noise_of_a_row_does_not_depend_on_its_batch():
    cases = list(itertools.product(SEEDS, STEPS))
    together = noise_of(sampler, cases)
    for i in (0, 7, len(cases) - 1):
        assert np.array_equal(noise_of(sampler, [cases[i]])[0], together[i])
    assert np.array_equal(noise_of(sampler, cases[::-1]), together[::-1])


FAULTS = {
    "two ids with one noise": ("(1, size), 1)\n", "(1, size), 1) // 2\n", "independence"),
    "the step does not count": ("s.num_output)", "0 * s.num_output)", "independence"),
    "half of a seed": (
        "wrap_key_data(s.seed",
        "wrap_key_data(0 * s.seed + s.seed[:, :1]",
        "independence",
    ),
    "one key": ("keys[:, :1], keys[:, 1:])", "0 * keys[:, :1], 0 * keys[:, 1:])", "independence"),
    "no second round": ("return x + y * z", "return x", "independence"),
    "half of the numbers": ("* 2.0**-32 +", "* 2.0**-33 +", "distribution"),
    "no logarithm": ("-jnp.log1p(-jnp.minimum(", "jnp.expm1(jnp.minimum(", "distribution"),
    "few bits": (
        "bits.astype(jnp.float32)",
        "(bits >> 20 << 20).astype(jnp.float32)",
        "distribution",
    ),
    "the other end": (
        "return -jnp.log(exponential)",
        "return jnp.log(exponential)",
        "distribution",
    ),
}
FAULTS = {name: (sampler.__name__, *fault) for name, fault in FAULTS.items()}
PLANTED = [fault[:3] for fault in FAULTS.values()]


@pytest.mark.parametrize("name", FAULTS)
def test_planted_bugs_are_caught(name, monkeypatch):
    *bug, check = FAULTS[name]
    module = plant(monkeypatch, "reference_engine", *bug)
    with pytest.raises(AssertionError):
        CHECKS[check](module)
