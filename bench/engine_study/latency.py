# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a user waits for: TTFT, TPOT, ITL and goodput, from the times of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Objectives:
    """Milliseconds that a request must keep to count as served well."""

    ttft_ms: float = 1000.0
    tpot_ms: float = 50.0


def latencies(
    arrivals: Sequence[float],
    token_times: Sequence[Sequence[float]],
    seconds: float,
    objectives: Objectives,
) -> dict[str, Any]:
    """The latencies of requests, each of which has got a token.

    Args:
      arrivals: when each request arrived, in seconds.
      token_times: when each of its tokens came, in seconds on the same clock.
      seconds: how long all of it took.
      objectives: see Objectives.

    Returns:
      `ttft_ms`, a request's time to its first token; `tpot_ms`, the mean time for each token after
      the first, over the requests that have several; and `itl_ms`, the time between two tokens of
      a request: each (p50, p99). `ttft_mean_ms`; `throughput`, requests a second; `goodput`,
      requests a second that met both objectives, where a request of one token has a TPOT of 0.
    """
    ttft = np.array([t[0] - a for a, t in zip(arrivals, token_times, strict=True)]) * 1e3
    tpot = np.array([(t[-1] - t[0]) / max(1, len(t) - 1) for t in token_times]) * 1e3
    gaps = np.concatenate([np.diff(times) for times in token_times]) * 1e3
    several = np.array([len(times) > 1 for times in token_times])
    met = int(np.count_nonzero((ttft <= objectives.ttft_ms) & (tpot <= objectives.tpot_ms)))
    return {
        "ttft_mean_ms": float(ttft.mean()),
        "ttft_ms": _percentiles(ttft),
        "tpot_ms": _percentiles(tpot[several]),
        "itl_ms": _percentiles(gaps),
        "throughput": len(arrivals) / seconds,
        "goodput": met / seconds,
    }


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    if not values.size:
        return (0.0, 0.0)
    return float(np.percentile(values, 50)), float(np.percentile(values, 99))
