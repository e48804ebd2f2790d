# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Traffic to serve: files in two formats, rates, and the token ids of prompts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from reference_engine.traffic import Arrival, read_azure_trace

BLOCK = 512  # tokens that one of Mooncake's hash ids stands for
_MOST_TOKENS = 10_000_000  # of one request; a longer one is a typing error


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests in the order of their arrival.

    Attributes:
      name: for people.
      arrivals: when the requests arrive, and how long they are.
      blocks: for each request the ids of its prompt's blocks of `BLOCK` tokens; the same id stands
        for the same tokens. None where no prompt shares tokens with another.
    """

    name: str
    arrivals: Sequence[Arrival]
    blocks: Sequence[tuple[int, ...]] | None = None


def read(path: str, num_requests: int, name: str = "") -> Traffic:
    """Reads the first requests of a trace file.

    Args:
      path: lines of JSON with timestamp (milliseconds), input_length, output_length and hash_ids,
        as in the Mooncake traces; or a CSV file as in `traffic.read_azure_trace`.
      num_requests: how many requests to read from the top; fewer are read if the file ends first.
      name: the traffic's.

    Raises:
      OSError: the file cannot be read.
      ValueError: it has neither format; the message names the line.
    """
    with open(path, "rb") as file:
        is_json = file.read(1) == b"{"
    if not is_json:
        return Traffic(name, read_azure_trace(path, num_requests))
    with open(path, encoding="utf-8", errors="replace") as lines:
        requests = list(itertools.islice(_parse(lines, path), num_requests))
    return Traffic(name, [arrival for arrival, _ in requests], [ids for _, ids in requests])


def at_rate(traffic: Traffic, rate: float | None, *, is_poisson: bool, seed: int) -> Traffic:
    """The same requests in the same order, at other times.

    Args:
      traffic: see Traffic.
      rate: the mean number of arrivals per second; None for the traffic's own; infinite for all
        requests at once.
      is_poisson: whether the gaps are drawn from an exponential distribution. If not, they are the
        traffic's own, all scaled by one factor.
      seed: fixes the gaps that are drawn.

    Raises:
      ValueError: the requests have no times that could be scaled to a rate.

    >>> slow = Traffic("t", [Arrival(0.0, 5, 5), Arrival(10.0, 5, 5)])
    >>> [a.seconds for a in at_rate(slow, 2.0, is_poisson=False, seed=0).arrivals]
    [0.0, 0.5]
    """
    arrivals = traffic.arrivals
    span = arrivals[-1].seconds
    if rate is None:
        if not is_poisson:
            return traffic
        rate = (len(arrivals) - 1) / span if span else np.inf
    if np.isinf(rate):
        times = np.zeros(len(arrivals))
    elif is_poisson:
        gaps = np.random.default_rng(seed).exponential(1 / rate, len(arrivals))
        times = np.cumsum(gaps) - gaps[0]
    elif span:
        times = np.array([a.seconds for a in arrivals]) * ((len(arrivals) - 1) / rate / span)
    else:
        raise ValueError(f"{traffic.name}: all requests arrive at once; wanted times to scale")
    moved = [
        dataclasses.replace(arrival, seconds=float(at))
        for arrival, at in zip(arrivals, times, strict=True)
    ]
    return dataclasses.replace(traffic, arrivals=moved)


def no_longer_than(traffic: Traffic, most: int) -> Traffic:
    """The requests whose prompt and output together are at most `most` tokens long."""
    keep = [i for i, a in enumerate(traffic.arrivals) if a.num_prompt + a.num_output <= most]
    blocks = traffic.blocks
    return dataclasses.replace(
        traffic,
        arrivals=[traffic.arrivals[i] for i in keep],
        blocks=None if blocks is None else [blocks[i] for i in keep],
    )


def prompts(traffic: Traffic, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids for each request; a block that several prompts have is the same in each."""
    if traffic.blocks is None:
        rng = np.random.default_rng(seed)
        return [rng.integers(vocab_size, size=a.num_prompt).tolist() for a in traffic.arrivals]
    tokens: dict[int, list[int]] = {}
    for block in set(itertools.chain.from_iterable(traffic.blocks)):
        rng = np.random.default_rng([seed, block])
        tokens[block] = rng.integers(vocab_size, size=BLOCK).tolist()
    return [
        list(itertools.chain.from_iterable(tokens[block] for block in blocks))[: arrival.num_prompt]
        for arrival, blocks in zip(traffic.arrivals, traffic.blocks, strict=True)
    ]


def _parse(lines: Iterator[str], path: str) -> Iterator[tuple[Arrival, tuple[int, ...]]]:
    first: float | None = None
    previous = 0.0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError:
            raw = None
        if not isinstance(raw, dict):
            _fail(path, number, f"{line.strip()[:40]!r}", "a JSON object")
        at: Any = raw.get("timestamp")
        if type(at) not in (int, float) or not at >= previous:
            _fail(path, number, f"timestamp {at!r}", "milliseconds that do not go back")
        previous = at
        first = at if first is None else first
        sizes = [_count(raw, name, path, number) for name in ("input_length", "output_length")]
        blocks = raw.get("hash_ids")
        num_blocks = -(-sizes[0] // BLOCK)
        if not isinstance(blocks, list) or not all(type(b) is int and b >= 0 for b in blocks):
            _fail(path, number, f"hash_ids {blocks!r:.40}", "a list of whole numbers from 0 on")
        if len(blocks) < num_blocks:
            _fail(path, number, f"{len(blocks)} hash_ids", f"{num_blocks}, one per {BLOCK} tokens")
        yield Arrival((at - first) / 1e3, *sizes), tuple(blocks[:num_blocks])


def _count(raw: dict[str, Any], name: str, path: str, number: int) -> int:
    value = raw.get(name)
    if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
        _fail(path, number, f"{name} {value!r}", f"a whole number from 1 to {_MOST_TOKENS}")
    return value


def _fail(path: str, number: int, got: str, wanted: str) -> NoReturn:
    raise ValueError(f"{path}, line {number}: {got}; wanted {wanted}")
