# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Traffic: the lengths and arrival times of requests, from a trace or from a generator."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import itertools
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOST_TOKENS = 10_000_000  # of one request; a longer one is a typing error


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
      seconds: the time of its arrival after the first request's.
      num_prompt: the number of prompt tokens, >= 1.
      num_output: the number of generated tokens, >= 1.
    """

    seconds: float
    num_prompt: int
    num_output: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of token counts, truncated to [1, longest].

    Attributes:
      mu: the mean of the logarithm.
      sigma: the standard deviation of the logarithm.
      longest: the largest count; counts outside the range are drawn again.
    """

    mu: float
    sigma: float
    longest: int


# Fitted to the code traces of the Azure LLM inference dataset of 2023.
CODE_PROMPTS = Lengths(mu=7.00, sigma=1.36, longest=7_500)
CODE_OUTPUTS = Lengths(mu=2.79, sigma=0.85, longest=1_000)


def read_azure_trace(path: str, num_requests: int) -> list[Arrival]:
    """Reads the first requests of a trace.

    Args:
      path: a CSV file with the columns TIMESTAMP,ContextTokens,GeneratedTokens, as in the Azure LLM
        inference dataset.
      num_requests: how many rows to read from the top; fewer are read if the file ends first.

    Raises:
      OSError: the file cannot be read.
      ValueError: the columns are others, there is no row, or a row is wrong; the message names the
        line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            arrivals = list(itertools.islice(_parse(csv.reader(file), path), num_requests))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no CSV text file: {error}") from error
    if not arrivals:
        _fail(path, 2, "no request", "at least one row")
    return arrivals


def generate(
    num_requests: int,
    *,
    seed: int,
    rate: float = 2.57,
    burstiness: float = 0.3,
    prompts: Lengths = CODE_PROMPTS,
    outputs: Lengths = CODE_OUTPUTS,
) -> list[Arrival]:
    """Draws requests with truncated lognormal lengths, and gamma-distributed gaps between them.

    Args:
      num_requests: how many requests to draw.
      seed: fixes every number.
      rate: the mean number of arrivals per second.
      burstiness: the shape of the gamma distribution; 1 is Poisson, less is burstier.
      prompts: the lengths of the prompts.
      outputs: the lengths of the outputs. They do not depend on the prompts, as in the traces.

    >>> generate(2, seed=0) == generate(2, seed=0)
    True
    """
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), num_requests)
    seconds = np.cumsum(gaps) - gaps[:1]
    return [
        Arrival(float(at), prompt, output)
        for at, prompt, output in zip(
            seconds,
            _draw(rng, prompts, num_requests),
            _draw(rng, outputs, num_requests),
            strict=True,
        )
    ]


def scale_prompts(arrivals: list[Arrival], factor: float) -> list[Arrival]:
    """The same requests with prompts `factor` times as long, rounded, at least one token.

    >>> scale_prompts([Arrival(0.0, 100, 7)], 0.125)
    [Arrival(seconds=0.0, num_prompt=12, num_output=7)]
    """
    return [
        dataclasses.replace(arrival, num_prompt=max(1, round(arrival.num_prompt * factor)))
        for arrival in arrivals
    ]


def _draw(rng: np.random.Generator, lengths: Lengths, count: int) -> list[int]:
    drawn: list[int] = []
    while len(drawn) < count:
        batch = np.rint(rng.lognormal(lengths.mu, lengths.sigma, count)).astype(int)
        drawn += batch[(batch >= 1) & (batch <= lengths.longest)].tolist()
    return drawn[:count]


def _parse(rows: Iterator[list[str]], path: str) -> Iterator[Arrival]:
    header = next(rows, [])
    if tuple(name.strip() for name in header) != _COLUMNS:
        _fail(path, 1, f"columns {','.join(header)!r}", ",".join(_COLUMNS))
    first = previous = None
    for line, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(_COLUMNS):
            _fail(path, line, f"{len(row)} fields", f"{len(_COLUMNS)} fields")
        time = _timestamp(row[0], path, line)
        if previous is not None and time < previous:
            _fail(path, line, f"TIMESTAMP {row[0]!r}", "times that do not go back")
        previous = time
        first = first or time
        yield Arrival(
            (time - first).total_seconds(),
            *(
                _count(text, name, path, line)
                for name, text in zip(_COLUMNS[1:], row[1:], strict=True)
            ),
        )


def _timestamp(text: str, path: str, line: int) -> datetime.datetime:
    try:
        time = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        _fail(path, line, f"TIMESTAMP {text!r}", "YYYY-MM-DD HH:MM:SS.fraction")
    if time.tzinfo is not None:
        time = time.astimezone(datetime.UTC).replace(tzinfo=None)
    return time


def _count(text: str, name: str, path: str, line: int) -> int:
    text = text.strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(_MOST_TOKENS))
    if not (is_number and 1 <= int(text) <= _MOST_TOKENS):
        _fail(path, line, f"{name} {text!r}", f"a whole number from 1 to {_MOST_TOKENS}")
    return int(text)


def _fail(path: str, line: int, got: str, wanted: str) -> NoReturn:
    raise ValueError(f"{path}, line {line}: {got}; wanted {wanted}")
