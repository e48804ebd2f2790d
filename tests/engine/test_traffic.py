# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Traces are read exactly or refused by line; generated traffic has the shape it claims."""

import numpy as np
import pytest

from reference_engine.traffic import (
    CODE_OUTPUTS,
    CODE_PROMPTS,
    Arrival,
    generate,
    read_azure_trace,
    scale_prompts,
)

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
FIRST = "2023-11-16 18:17:03.9799600,4808,10\n"


def write(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_reads_the_first_rows(tmp_path):
    path = write(tmp_path, HEADER + FIRST + "2023-11-16 18:17:04.0319600,3180,8\n\nnot,read,yet\n")
    arrivals = read_azure_trace(path, 2)
    assert arrivals[0] == Arrival(0.0, 4808, 10)
    assert (arrivals[1].num_prompt, arrivals[1].num_output) == (3180, 8)
    assert arrivals[1].seconds == pytest.approx(0.052)


def test_time_zones_line_ends_and_byte_order_marks(tmp_path):
    text = (
        "\ufeff"
        + HEADER.replace("\n", "\r\n")
        + ("2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 02:00:01.009930+02:00,7,1\r\n")
    )
    arrivals = read_azure_trace(write(tmp_path, text), 10)
    assert [arrival.seconds for arrival in arrivals] == [0.0, 1.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: columns ''; wanted TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("a,b,c\n" + FIRST, "line 1: columns 'a,b,c'"),
        (HEADER, "line 2: no request; wanted at least one row"),
        (HEADER + FIRST + "2023-11-16 18:17:05,12\n", "line 3: 2 fields; wanted 3 fields"),
        (HEADER + FIRST + "yesterday,12,3\n", "line 3: TIMESTAMP 'yesterday'"),
        (HEADER + "2023-11-16 18:17:05,twelve,3\n", "line 2: ContextTokens 'twelve'; wanted"),
        (HEADER + "2023-11-16 18:17:05,12,0\n", "line 2: GeneratedTokens '0'; wanted"),
        (HEADER + "2023-11-16 18:17:05,-12,1\n", "line 2: ContextTokens '-12'"),
        (HEADER + "2023-11-16 18:17:05,99999999999,1\n", "line 2: ContextTokens '9+'; .* to 10000"),
        (HEADER + FIRST + "2023-11-16 18:17:01,12,3\n", "line 3: TIMESTAMP .* do not go back"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"trace.csv, {message}"):
        read_azure_trace(write(tmp_path, text), 10)


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="trace.csv: no CSV text file"):
        read_azure_trace(str(path), 1)


def test_generated_lengths_and_gaps_follow_their_distributions():
    arrivals = generate(20_000, seed=3, rate=4.0, burstiness=0.5)
    prompts = np.array([arrival.num_prompt for arrival in arrivals])
    outputs = np.array([arrival.num_output for arrival in arrivals])
    gaps = np.diff([arrival.seconds for arrival in arrivals])
    assert prompts.min() >= 1 and prompts.max() <= CODE_PROMPTS.longest
    # The truncation takes part of the upper tail: the median is below exp(mu).
    assert 0.7 * np.exp(CODE_PROMPTS.mu) < np.median(prompts) < np.exp(CODE_PROMPTS.mu)
    assert np.median(outputs) == pytest.approx(np.exp(CODE_OUTPUTS.mu), rel=0.1)
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.03
    assert gaps.min() >= 0 and gaps.mean() == pytest.approx(1 / 4.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(0.5**-0.5, rel=0.05)


def test_generation_is_fixed_by_its_seed():
    assert generate(50, seed=1) == generate(50, seed=1) != generate(50, seed=2)


def test_scaling_keeps_times_and_outputs():
    arrivals = scale_prompts([Arrival(0.5, 1000, 7), Arrival(1.0, 3, 8)], 0.1)
    assert arrivals == [Arrival(0.5, 100, 7), Arrival(1.0, 1, 8)]
