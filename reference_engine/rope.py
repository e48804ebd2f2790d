# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Rotary frequencies, plain or scaled for longer contexts.

RoPE rotates by position * frequency, so a longer context means other frequencies. Here they are
fixed before the first token. Kinds of scaling whose frequencies change with the length of the
sequence ("dynamic", "longrope") are left out, because every cached key would have to be rotated
again.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pallas_paged.checks import require

KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are scaled. A kind reads only the fields that are named for it.

    Attributes:
      kind: "default" leaves the frequencies as they are. "linear" divides all of them by `factor`.
        "llama3" counts how many periods of a frequency the original context holds: below
        `low_freq_factor` periods, the frequency is divided by `factor`; above `high_freq_factor`,
        it is kept; between the two, it is blended. "yarn" (arXiv 2309.00071) blends in a similar
        way between `beta_slow` and `beta_fast` periods, and scales queries and keys as well.
      factor: how many times longer the context becomes, >= 1.
      original_max_position: the length of the original context ("llama3", "yarn").
      low_freq_factor, high_freq_factor: see "llama3".
      beta_fast, beta_slow: see "yarn".
      attention_factor: for "yarn", the factor of cos and sin. None means 0.1 * ln(factor) + 1, or
        the value from mscale and mscale_all_dim.
      mscale, mscale_all_dim: for "yarn", where neither is 0 and attention_factor is None, the
        factor is (0.1 * mscale * ln(factor) + 1) / (0.1 * mscale_all_dim * ln(factor) + 1).
      truncate: for "yarn", whether the blend starts and ends at whole indices.

    Raises:
      ValueError: the kind is unknown, or the numbers mean nothing for it.
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.kind in KINDS,
            "RopeScaling",
            "kind",
            got=f"{self.kind!r}",
            wanted=f"one of {KINDS}",
            hint="frequencies that change with the sequence's length are not served",
        )
        require(
            self.factor >= 1,
            "RopeScaling",
            "factor",
            got=f"{self.factor}",
            wanted=">= 1",
            hint="1 leaves the context as it is",
        )
        if self.kind in ("llama3", "yarn"):
            require(
                self.original_max_position >= 1,
                "RopeScaling",
                "original_max_position",
                got=f"{self.original_max_position}",
                wanted="an int >= 1",
                hint="give the length of the context before it was scaled",
            )
        require(
            self.kind != "llama3" or self.low_freq_factor < self.high_freq_factor,
            "RopeScaling",
            "high_freq_factor",
            got=f"{self.high_freq_factor}",
            wanted=f"more than low_freq_factor={self.low_freq_factor}",
            hint="frequencies between the two are blended",
        )


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of lanes, and the factor of cos and sin.

    Args:
      head_dim: the width of a head, even.
      theta: the base of the frequencies.
      scaling: see RopeScaling.

    Returns:
      f32[head_dim / 2], and a number.

    >>> frequencies(4, 100.0, RopeScaling())[0].tolist()
    [1.0, 0.10000000149011612]
    >>> frequencies(4, 100.0, RopeScaling("linear", factor=4.0))[0].tolist()
    [0.25, 0.02500000037252903]
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    plain = 1.0 / np.float32(theta) ** exponents
    factor = 1.0
    if scaling.kind == "linear":
        plain = plain / scaling.factor
    elif scaling.kind == "llama3":
        periods = scaling.original_max_position * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        plain = _blend(plain, scaling.factor, kept=np.clip((periods - low) / (high - low), 0, 1))
    elif scaling.kind == "yarn":
        first, last = _yarn_range(head_dim, theta, scaling)
        ramp = (np.arange(head_dim // 2) - first) / (last - first or 1e-3)
        plain = _blend(plain, scaling.factor, kept=1 - np.clip(ramp, 0, 1))
        factor = _yarn_attention_factor(scaling)
    return plain.astype(np.float32), float(factor)


def _blend(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    return plain * kept + plain / factor * (1 - kept)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    grown = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (scaling.mscale * grown + 1.0) / (scaling.mscale_all_dim * grown + 1.0)
    return grown + 1.0


def _yarn_range(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """The indices of the frequencies of beta_fast and beta_slow periods in the original context."""

    def index(periods: float) -> float:
        wavelength = scaling.original_max_position / (periods * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    return max(first, 0), min(last, head_dim - 1)
