# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What is done to a product of a query and a key, and which of them count, in the base 2."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from pallas_paged import layout

LOG2_E = math.log2(math.e)
# Rows of a float32 register.
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Score:
    """What is done to a product of q and k, and which of them count; static.

    Attributes:
      soft_cap: None or the bound on the scores.
      causal: whether a query sees no later key.
      has_window, has_scales, has_sinks: whether the call has these arrays.
      return_lse: whether the log-sum-exp is wanted.
    """

    soft_cap: float | None
    causal: bool
    has_window: bool
    has_scales: bool
    has_sinks: bool
    return_lse: bool


def scores(score: Score, product, scale):
    """Scores in the base 2 of products; `scale` is sm_scale, times K's if the pool has scales."""
    if score.soft_cap is None:
        return product * (scale * LOG2_E)
    return jnp.tanh(product * (scale / score.soft_cap)) * (score.soft_cap * LOG2_E)


def seen_keys(score: Score, key, query_position, first, end, window):
    """Which keys of a block the mask lets a query see.

    Everything but the comparison with `key` is done on a query's scalar, or on a row of them: keys
    are many.

    Args:
      score: static.
      key: number in the block, int32.
      query_position: broadcasts with `key`.
      first, end: position of the block's first key, and of the first that it does not hold.
      window: the sliding window's scalar, None without one.
    """
    stop = end
    if score.causal:
        stop = jnp.minimum(stop, query_position + 1)
    seen = key < stop - first
    if score.has_window:
        seen &= key > query_position - window - first
    return seen


def holds_token(first, end, num_keys, parity):
    """bool[keys or keys / 2, 128]: which slots of a block hold a token; see `values`."""
    step, offset = (1, 0) if parity is None else (2, parity)
    slot = lax.broadcasted_iota(jnp.int32, (num_keys // step, layout.LANES), 0)
    return first + slot * step + offset < end
