# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Tokens are drawn from the distribution that SamplingParams say, by rows that know no other."""

import dataclasses
import fractions
import math

import jax.numpy as jnp
import numpy as np
import pytest

from reference_engine import sampler
from reference_engine.request import Request
from reference_engine.sampler import (
    add_bias,
    greedy,
    log_probabilities,
    make_bias,
    make_penalties,
    make_rows,
    next_tokens,
    penalise,
    sample,
)
from reference_engine.sampling_params import MAX_BIASED_IDS, MAX_LOGPROBS, SamplingParams
from reference_engine.unserved import SAMPLING_PARAMS as UNSERVED

VOCAB = 24
LOGITS = np.random.default_rng(5).normal(size=VOCAB).astype(np.float32) * 2
NUM_ROWS = 4096


def request(seed=0, output=(), prompt=(1,), **params):
    return Request(
        0, prompt, SamplingParams(max_tokens=99, **params), output_ids=list(output), seed=seed
    )


def draw(params, logits=LOGITS, num_rows=NUM_ROWS):
    """Tokens of many rows that differ in their seeds."""
    requests = [request(seed=i, **params) for i in range(num_rows)]
    return np.asarray(next_tokens(np.tile(logits, (num_rows, 1)), requests, 8))


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
        request(
            seed=i * 2**40 - 7,
            output=[0] * int(rng.integers(5)),
            temperature=float(rng.choice([0, 0.5, 1, 2])),
            top_k=int(rng.integers(9)),
            top_p=float(rng.uniform(0.1, 1)),
            min_p=float(rng.uniform(0, 0.2)),
        )
        for i in range(16)
    ]
    logits = rng.normal(size=(16, VOCAB)).astype(np.float32)
    together = np.asarray(next_tokens(logits, requests, 8))
    order = rng.permutation(16)
    shuffled = next_tokens(logits[order], [requests[i] for i in order], 8)
    assert np.asarray(shuffled).tolist() == together[order].tolist()
    one = np.zeros((4, VOCAB), np.float32)
    for i in (0, 5, 11):
        one[0] = logits[i]
        assert int(next_tokens(one, [requests[i]], 8)[0]) == together[i]


def test_seeds_and_steps_give_other_tokens():
    flat = np.zeros(VOCAB, np.float32)
    seeds = [0, 1, -1, 2**32, 2**63 - 1, -(2**63)]  # of both halves
    rows = [
        request(seed=seed, output=[0] * step, temperature=1.0)
        for seed in seeds
        for step in range(40)
    ]
    tokens = np.asarray(sample(np.tile(flat, (240, 1)), make_rows(rows, 240))).reshape(6, 40)
    for i in range(6):
        assert len(set(tokens[i].tolist())) > 12
        for j in range(i):
            assert np.mean(tokens[i] == tokens[j]) < 0.3


def test_greedy_rows_take_the_largest_and_the_lowest_id_among_equals():
    logits = np.array([[0, 3, 3, -np.inf], [5, 0, 0, 5]], np.float32)
    assert greedy(logits).tolist() == [1, 0]
    assert sample(logits, make_rows([request()], 2)).tolist() == [1, 0]


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_even():
    assert set(draw({"temperature": 1e-30})) == {int(LOGITS.argmax())}
    assert set(draw({"temperature": 1e30}).tolist()) == set(range(VOCAB))


def test_stop_ids_do_not_come_before_min_tokens():
    best = int(LOGITS.argmax())
    second = int(np.argsort(-LOGITS)[1])
    ban = {"min_tokens": 3, "stop_token_ids": (best,)}
    requests = [request(output=[0] * 2, **ban), request(output=[0] * 3, **ban)]
    assert next_tokens(np.tile(LOGITS, (2, 1)), requests, 8).tolist() == [second, best]
    assert best not in draw({"temperature": 1.0, **ban})


def test_a_temperature_that_float32_calls_nothing_is_greedy():
    for temperature in (1e-39, 1e-60):
        assert set(draw({"temperature": temperature}, num_rows=8)) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("top_k", [-1, VOCAB, 2**31, 2**40])
def test_a_top_k_of_all_keeps_all(top_k):
    want = draw({"temperature": 1.0}, num_rows=64)
    assert draw({"temperature": 1.0, "top_k": top_k}, num_rows=64).tolist() == want.tolist()


def penalised(logits, prompt, output, repetition=1.0, presence=0.0, frequency=0.0):
    """The same in float64, id by id, as SamplingParams define it."""
    logits = logits.astype(float).copy()
    for token in {*prompt, *output}:
        logits[token] *= repetition if logits[token] <= 0 else 1 / repetition
    for token in set(output):
        logits[token] -= presence + frequency * list(output).count(token)
    return logits


PENALTIES = [(1.3, 0.0, 0.0), (0.5, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, -2.0, 0.3), (1.2, 0.5, -1.5)]


def test_penalties_are_those_of_their_definitions_and_leave_other_rows_alone():
    rng = np.random.default_rng(7)
    requests = [
        request(
            prompt=tuple(rng.integers(0, VOCAB, 5).tolist()),
            repetition_penalty=repetition,
            output=rng.integers(0, 6, 9).tolist(),
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        for repetition, presence, frequency in [*PENALTIES, (1.0, 0.0, 0.0)]
    ]
    logits = rng.normal(size=(8, VOCAB)).astype(np.float32) * 3
    logits[2, :4] = -np.inf
    got = np.asarray(penalise(logits, make_penalties(requests, 8, max_model_len=16)))
    for row, (one, numbers) in enumerate(zip(requests, PENALTIES, strict=False)):
        want = penalised(logits[row], one.prompt_ids, one.output_ids, *numbers)
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-5)
        assert not np.array_equal(got[row], logits[row])
    assert np.array_equal(got[5:], logits[5:])  # no penalty, no request: to the last bit


def test_numbers_at_their_bounds_give_no_nan():
    extreme = {"logit_bias": {2: 3e38, 3: -3e38}, "temperature": 1e-38}
    requests = [
        request(output=[2, 3, 5], repetition_penalty=penalty, **extreme)
        for penalty in (1e-50, 1e-30, 1e38)
    ]
    logits = np.tile(LOGITS, (4, 1))
    biased = add_bias(logits, make_bias(requests, 4))
    changed = np.asarray(penalise(biased, make_penalties(requests, 4, 8)))
    assert not np.isnan(changed).any() and np.max(changed) < np.inf
    first, second = np.asarray(next_tokens(logits, requests, 8))[:2].tolist()
    assert first in (2, 5) and second == 2


def test_logit_bias_is_added_before_the_penalties():
    token = int(LOGITS.argmin())
    bias = {token: np.float32(30), 0: 1}
    requests = [
        request(logit_bias=bias),
        request(),
        request(logit_bias=bias, output=[token], repetition_penalty=1000.0),
    ]
    logits = np.tile(LOGITS, (3, 1))
    want = LOGITS.copy()
    want[[token, 0]] += np.float32([30, 1])
    got = np.asarray(add_bias(logits, make_bias(requests, 3)))
    assert np.array_equal(got, [want, LOGITS, want])
    chosen = next_tokens(logits, requests, 8).tolist()
    assert chosen[:2] == [token, int(LOGITS.argmax())] and chosen[2] != token


def test_bad_words_forbid_their_last_token_behind_the_others():
    best, second, third = np.argsort(-LOGITS)[:3].tolist()
    words = [[7, 8, best], [best, second], [third]]
    for output, want in (
        ([], best),
        ([7, 8], second),
        ([8, 7], best),
        ([8], best),
        ([7, 8, 1], best),
        ([best], best),
        ([7, 8, best], best),
        ([best, 7, 8], second),
    ):
        one = request(output=output, bad_words=words)
        assert next_tokens(LOGITS[None], [one], 8).tolist() == [want], output
    alone = request(bad_words=[[best]], temperature=1.0)
    assert sampler._forbidden(alone) == [best]
    after = request(prompt=(7, 8), bad_words=words)  # the prompt is no output
    assert next_tokens(LOGITS[None], [after], 8).tolist() == [best]


PROGRAMS = ("greedy", "sample", "cut_to_few", "cut_top_k", "cut_top_p", "add_bias", "penalise")


@pytest.mark.parametrize(
    "params, programs",
    [
        ([{}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}], ["greedy"]),
        ([{"temperature": 1.0}, {}], ["sample"]),
        ([{"temperature": 1.0, "top_k": 64, "top_p": 0.9}, {}], ["cut_to_few", "sample"]),
        ([{"temperature": 1.0, "top_k": 64}, {"temperature": 1.0}], ["cut_to_few", "sample"]),
        ([{"temperature": 1.0, "top_k": 65}], ["cut_top_k", "sample"]),
        ([{"temperature": 1.0, "top_p": 0.9}], ["cut_top_p", "sample"]),
        ([{"temperature": 1.0, "min_p": 0.9}], ["cut_top_p", "sample"]),
        (
            [{"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.9}],
            ["cut_top_k", "cut_top_p", "sample"],
        ),
        (
            [{"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_k": 99}, {}],
            ["cut_top_k", "sample"],
        ),
        ([{"presence_penalty": 0.1}, {}], ["penalise", "greedy"]),
        ([{"logit_bias": {1: 0.5}}], ["add_bias", "greedy"]),
        ([{"bad_words": [[1]]}], ["add_bias", "greedy"]),
        ([{"min_tokens": 2, "stop_token_ids": [1]}], ["add_bias", "greedy"]),
        ([{"min_tokens": 1, "stop_token_ids": [1]}], ["greedy"]),  # it has one
    ],
)
def test_only_the_programs_run_that_somebody_asks_for(params, programs, monkeypatch):
    ran = []
    for name in PROGRAMS:
        program = getattr(sampler, name)
        monkeypatch.setattr(
            sampler, name, lambda *args, n=name, p=program: (ran.append(n), p(*args))[1]
        )
    requests = [request(output=[3], **one) for one in params]
    next_tokens(np.tile(LOGITS, (4, 1)), requests, 8)
    assert ran == programs


def test_a_row_has_the_same_token_whichever_programs_cut_it():
    rng = np.random.default_rng(11)
    logits = rng.normal(size=(64, 700)).astype(np.float32) * 3
    logits[::2] = np.round(logits[::2])
    requests = [
        request(
            seed=i,
            temperature=float(rng.uniform(0.3, 3)),
            top_k=int(rng.integers(1, 65)),
            top_p=float(rng.uniform(0.3, 1)),
            min_p=float(rng.choice([0, 0.02])),
        )
        for i in range(63)
    ]
    few = next_tokens(logits, [*requests, request()], 8).tolist()
    many = next_tokens(logits, [*requests, request(temperature=1.0, top_p=0.5)], 8).tolist()
    assert few[:63] == many[:63] and len(set(few)) > 20


def test_a_pending_token_counts_as_if_the_host_knew_it():
    """The step before has sampled it, and the host has not read it."""
    rng = np.random.default_rng(12)
    logits = np.tile(rng.normal(size=VOCAB).astype(np.float32), (6, 1))
    params = [
        {"presence_penalty": 2.0, "temperature": 1.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 9.0},
        {"temperature": 1.0},
        {"min_tokens": 3, "stop_token_ids": [int(LOGITS.argmax())]},
    ]
    outputs = [[2, 3], [int(logits[0].argmax())] * 2, [4, 4], [1, 2], [7, 8]]
    known = [request(output=outputs[i], seed=i, **params[i]) for i in range(5)]
    last_tokens = np.array([99, *(output[-1] for output in outputs[::-1]), 99, 99], np.int32)
    rows = [5, 4, 3, 2, 1]
    pending = [request(output=outputs[i][:-1], seed=i, **params[i]) for i in range(5)]
    for one in pending:
        one.num_tokens += 1
    want = next_tokens(logits, known, 8).tolist()[:5]
    got = next_tokens(logits, pending, 8, jnp.asarray(last_tokens), rows)
    assert got.tolist()[:5] == want
    some = next_tokens(
        logits, [pending[0], *known[1:]], 8, jnp.asarray(last_tokens), [5, *[-1] * 4]
    )
    assert some.tolist()[:5] == want
    np.testing.assert_array_equal(
        penalise(logits, make_penalties(pending, 6, 8, rows), jnp.asarray(last_tokens)),
        penalise(logits, make_penalties(known, 6, 8)),
    )
    with pytest.raises(AssertionError):
        next_tokens(logits[:1], [request(output=[1], bad_words=[[1]])], 8, last_tokens, [0])


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
        ({"min_tokens": 9, "max_tokens": 8}, r"argument `min_tokens` is 9; wanted an int in"),
        ({"temperature": 1e39}, "argument `temperature` is 1e.39"),
        ({"temperature": "0.5"}, "argument `temperature` is '0.5'"),
        ({"temperature": True}, "argument `temperature` is True"),
        ({"temperature": None}, "argument `temperature` is None"),
        ({"temperature": 10**400}, "argument `temperature` is 1000"),
        ({"temperature": np.array([0.5])}, "argument `temperature` is array"),
        ({"top_k": -2}, "argument `top_k` is -2; wanted an int >= -1: 0 keeps all, as -1 does"),
        ({"top_k": True}, "argument `top_k` is True"),
        ({"top_k": 5.0}, "argument `top_k` is 5.0"),
        ({"top_p": np.nan}, "argument `top_p` is nan"),
        ({"max_tokens": True}, "argument `max_tokens` is True"),
        ({"max_tokens": np.bool_(True)}, "argument `max_tokens` is np.True_"),
        ({"n": 0}, r"argument `n` is 0; wanted an int in \[1, 16384\]"),
        ({"n": 10**9}, "argument `n` is 1000000000"),
        ({"logprobs": -1}, r"argument `logprobs` is -1"),
        ({"logprobs": True}, r"argument `logprobs` is True"),
        ({"seed": -(2**63) - 1}, "argument `seed` is -9223372036854775809"),
        ({"seed": True}, "argument `seed` is True"),
        ({"repetition_penalty": 0}, r"`repetition_penalty` is 0; wanted a number in \(0, 3.4"),
        ({"repetition_penalty": -1.0}, "`repetition_penalty` is -1.0"),
        ({"repetition_penalty": math.inf}, "`repetition_penalty` is inf"),
        ({"presence_penalty": 2.1}, r"`presence_penalty` is 2.1; wanted a number in \[-2, 2\]"),
        ({"frequency_penalty": math.nan}, "`frequency_penalty` is nan"),
        ({"logit_bias": {1: math.nan}}, "`logit_bias` is {1: nan}; wanted a dict from ids"),
        ({"logit_bias": {1: -math.inf}}, "`logit_bias` is {1: -inf}.* all but impossible"),
        ({"logit_bias": {1: 1e39}}, "`logit_bias`"),
        ({"logit_bias": {"1": 2.0}}, "`logit_bias` is {'1': 2.0}"),
        ({"logit_bias": {True: 2.0}}, "`logit_bias`"),
        ({"logit_bias": [1, 2]}, "`logit_bias`"),
        ({"logit_bias": 7}, "`logit_bias` is 7"),
        ({"bad_words": [""]}, r"`bad_words` is \[''\]; wanted strings that are not empty, or"),
        ({"bad_words": [[]]}, "`bad_words`"),
        ({"bad_words": [3]}, "`bad_words`"),
        ({"bad_words": [[1, "a"]]}, "`bad_words`"),
        ({"bad_words": 3}, "`bad_words` is 3"),
        ({"ignore_eos": 1}, "`ignore_eos` is 1; wanted True or False"),
        ({"skip_special_tokens": None}, "`skip_special_tokens` is None"),
        ({"include_stop_str_in_output": "no"}, "`include_stop_str_in_output` is 'no'"),
        ({"stop": 5}, "argument `stop` is 5"),
        ({"stop": b"x"}, "argument `stop` is b'x'"),
        ({"stop": [None]}, "argument `stop`"),
        ({"stop": ""}, "argument `stop` is ''"),
        ({"stop_token_ids": 5}, "argument `stop_token_ids` is 5; wanted ints"),
        ({"stop_token_ids": [True]}, "argument `stop_token_ids`"),
        ({"stop_token_ids": [2.0]}, "argument `stop_token_ids`"),
        ({"best_of": 2}, "`best_of` is 2, which is not served; wanted 1: give n"),
        ({"prompt_logprobs": 1}, "`prompt_logprobs` is 1, which is not served"),
        ({"structured_outputs": object()}, "`structured_outputs` .*guided decoding is left out"),
        ({"allowed_token_ids": [1]}, r"`allowed_token_ids` is \[1\], which is not served"),
        ({"detokenize": False}, "`detokenize` is False, which is not served; wanted True"),
        ({"use_beam_search": True}, "`use_beam_search` .*beam search is left out on purpose"),
        ({"logits_processors": [max]}, "`logits_processors` .* give logit_bias or bad_words"),
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


def test_numbers_may_be_numpys_and_jaxs():
    want = SamplingParams(
        max_tokens=5,
        top_k=3,
        temperature=0.5,
        top_p=0.25,
        seed=7,
        n=2,
        stop_token_ids=(1, 2),
        logit_bias={4: 0.5},
        bad_words=[[3, 4]],
    )
    for whole, real in (
        (np.int64, np.float32),
        (np.uint8, np.float64),
        (np.array, np.float16),
        (jnp.int32, jnp.bfloat16),
        (int, fractions.Fraction),
    ):
        got = SamplingParams(
            max_tokens=whole(5),
            top_k=whole(3),
            temperature=real(0.5),
            top_p=real(0.25),
            seed=whole(7),
            n=whole(2),
            stop_token_ids=np.array([1, 2]),
            logit_bias={4 if whole is np.array or whole is jnp.int32 else whole(4): real(0.5)},
            bad_words=[np.array([3, 4])],
            ignore_eos=np.bool_(False),
        )
        assert got == want and hash(got) == hash(want)
        assert all(
            type(value) in (int, float, bool, tuple, type(None))
            for value in dataclasses.asdict(got).values()
        )


def test_each_of_vllms_other_names_is_refused_by_its_own():
    """SamplingParams lists them twice, and both lists must be in one order."""
    assert "best_of" in UNSERVED and "repetition_detection" in UNSERVED
    for name in UNSERVED:
        with pytest.raises(ValueError, match=f"SamplingParams: argument `{name}` is "):
            SamplingParams(**{name: object()})


def test_none_and_the_neutral_values_of_vllms_other_names_ask_for_nothing():
    nothing = dict.fromkeys(
        (
            "stop",
            "stop_token_ids",
            "logit_bias",
            "bad_words",
            "best_of",
            "logits_processors",
            "guided_decoding",
            "prompt_logprobs",
        )
    )
    assert SamplingParams(**nothing, detokenize=True, use_beam_search=False) == SamplingParams()
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(max_tokens=None, min_tokens=99).max_tokens is None
    assert SamplingParams(bad_words="word").bad_words == ("word",)
    again = SamplingParams(logit_bias={3: -1}, bad_words=["a", [1, 2]], seed=-1)
    assert dataclasses.replace(again) == again


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stop_token_ids": [-1]}, r"`stop_token_ids` is -1; wanted ids in \[0, 24\)"),
        ({"stop_token_ids": [3, 2**40]}, "`stop_token_ids` is 1099511627776"),
        ({"logit_bias": {24: 1.0}}, "`logit_bias` is 24"),
        ({"logit_bias": {-1: 1.0}}, "`logit_bias` is -1"),
        ({"bad_words": [[1, 24]]}, "`bad_words` is 24"),
        ({"bad_words": ["word"]}, r"`bad_words` is \['word'\]; wanted token ids in a row: LLM"),
        (
            {
                "bad_words": [[i % 24, i // 24 % 24, i // 576] for i in range(MAX_BIASED_IDS)],
                "logit_bias": {1: 1},
            },
            "`logit_bias` is of 1025 ids, bad_words included; wanted at most",
        ),
    ],
)
def test_ids_are_checked_against_the_vocabulary(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields).check_ids("op", VOCAB)
