# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Tokens are drawn from the distribution that SamplingParams say, by rows that know no other."""

import math

import numpy as np
import pytest

from reference_engine import sampler
from reference_engine.request import MAX_LOGPROBS, Request, SamplingParams
from reference_engine.sampler import greedy, log_probabilities, make_sampling, sample

VOCAB = 24
LOGITS = np.random.default_rng(5).normal(size=VOCAB).astype(np.float32) * 2
NUM_ROWS = 4096


def request(seed=0, output=(), **params):
    return Request(
        0, (1,), SamplingParams(max_tokens=99, **params), output_ids=list(output), seed=seed
    )


def draw(params, logits=LOGITS, num_rows=NUM_ROWS):
    """Tokens of many rows that differ in their seeds."""
    rows = make_sampling([request(seed=i, **params) for i in range(num_rows)], num_rows)
    return np.asarray(sample(np.tile(logits, (num_rows, 1)), rows))


def distribution(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The same in float64, filter by filter, as SamplingParams define it."""
    p = np.exp(LOGITS.astype(float) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = np.ones(VOCAB, bool)
    if top_k:
        kept[order[top_k:]] = False
    kept &= p >= min_p * p.max()
    p = np.where(kept, p, 0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_follow_their_distribution(params):
    want = distribution(**params)
    counts = np.bincount(draw(params), minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(want))
    # Pearson's statistic; its mean is the degrees of freedom, its deviation the root of twice them.
    expected = want[want > 0] * NUM_ROWS
    statistic = np.sum((counts[want > 0] - expected) ** 2 / expected)
    freedom = np.count_nonzero(want) - 1
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom) + 1e-6


@pytest.mark.parametrize("params", [{"temperature": 1.1}, {"temperature": 1.0, "top_k": 12}])
def test_the_statistic_sees_a_slightly_wrong_distribution(params):
    wrong = {"temperature": 1.0, "top_k": params.get("top_k", 0) and 11}
    want = distribution(**wrong)
    counts = np.bincount(draw(params), minlength=VOCAB)
    expected = np.maximum(want * NUM_ROWS, 1e-3)
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert statistic > VOCAB + 5 * math.sqrt(2 * VOCAB)


def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    requests = [
        request(seed=i * 2**40 - 7, output=[0] * int(rng.integers(5)),
                temperature=float(rng.choice([0, 0.5, 1, 2])), top_k=int(rng.integers(9)),
                top_p=float(rng.uniform(0.1, 1)), min_p=float(rng.uniform(0, 0.2)))
        for i in range(16)
    ]
    logits = rng.normal(size=(16, VOCAB)).astype(np.float32)
    together = np.asarray(sample(logits, make_sampling(requests, 16)))
    order = rng.permutation(16)
    shuffled = sample(logits[order], make_sampling([requests[i] for i in order], 16))
    assert np.asarray(shuffled).tolist() == together[order].tolist()
    one = np.zeros((4, VOCAB), np.float32)
    for i in (0, 5, 11):
        one[0] = logits[i]
        assert int(sample(one, make_sampling([requests[i]], 4))[0]) == together[i]


def test_seeds_and_steps_give_other_tokens():
    flat = np.zeros(VOCAB, np.float32)
    seeds = [0, 1, -1, 2**32, 2**63 - 1, -(2**63)]  # of both halves
    rows = [request(seed=seed, output=[0] * step, temperature=1.0)
            for seed in seeds for step in range(40)]
    tokens = np.asarray(sample(np.tile(flat, (240, 1)), make_sampling(rows, 240))).reshape(6, 40)
    for i in range(6):
        assert len(set(tokens[i].tolist())) > 12
        for j in range(i):
            assert np.mean(tokens[i] == tokens[j]) < 0.3


def test_greedy_rows_take_the_largest_and_the_lowest_id_among_equals():
    logits = np.array([[0, 3, 3, -np.inf], [5, 0, 0, 5]], np.float32)
    assert greedy(logits).tolist() == [1, 0]
    assert sample(logits, make_sampling([request()], 2)).tolist() == [1, 0]


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_even():
    assert set(draw({"temperature": 1e-30})) == {int(LOGITS.argmax())}
    assert set(draw({"temperature": 1e30}).tolist()) == set(range(VOCAB))


def test_stop_ids_do_not_come_before_min_tokens():
    best = int(LOGITS.argmax())
    second = int(np.argsort(-LOGITS)[1])
    ban = {"min_tokens": 3, "stop_token_ids": (best,)}
    assert not sampler.is_greedy(request(**ban))
    rows = make_sampling([request(**ban), request(output=[0] * 3, **ban)], 2)
    assert sample(np.tile(LOGITS, (2, 1)), rows).tolist() == [second, best]
    assert best not in draw({"temperature": 1.0, **ban})


def test_log_probabilities():
    logits = np.stack([LOGITS, LOGITS[::-1] + 100])
    own, ids, values = map(np.asarray, log_probabilities(logits, np.array([3, 20], np.int32)))
    want = LOGITS - np.log(np.exp(LOGITS).sum())
    np.testing.assert_allclose(own, [want[3], want[3]], rtol=1e-4)
    assert ids.shape == (2, MAX_LOGPROBS) and ids[0].tolist() == np.argsort(-want)[:20].tolist()
    np.testing.assert_allclose(values[1], np.sort(want)[::-1][:20], rtol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_tokens": 0}, "argument `max_tokens` is 0; wanted an int >= 1"),
        ({"min_tokens": 17}, r"argument `min_tokens` is 17; wanted an int in \[0, 16\]"),
        ({"temperature": -0.1}, "argument `temperature` is -0.1; wanted a number in"),
        ({"temperature": math.nan}, "argument `temperature` is nan"),
        ({"temperature": math.inf}, "argument `temperature` is inf"),
        ({"top_p": 0.0}, r"argument `top_p` is 0.0; wanted a number in \(0, 1\]"),
        ({"top_p": 1.01}, "argument `top_p` is 1.01"),
        ({"min_p": 2}, r"argument `min_p` is 2; wanted a number in \[0, 1\]"),
        ({"top_k": -1}, "argument `top_k` is -1; wanted an int >= 0"),
        ({"logprobs": 21}, r"argument `logprobs` is 21; wanted an int in \[0, 20\]"),
        ({"seed": 2**63}, "argument `seed` is 9223372036854775808"),
        ({"seed": 1.5}, "argument `seed` is 1.5"),
        ({"stop": ("a", "")}, "argument `stop` is .*; wanted strings that are not empty"),
        ({"stop_token_ids": ("a",)}, "argument `stop_token_ids`"),
    ],
)
def test_params_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_a_stop_string_may_stand_alone():
    assert SamplingParams(stop="END", stop_token_ids=[3]) == SamplingParams(
        stop=("END",), stop_token_ids=(3,)
    )
