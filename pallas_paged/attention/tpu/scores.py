# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""How a product of a query and a key becomes a score, and which keys a query sees.

Scores are in the base 2: a weight is `2 ** score`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import layout
from pallas_paged.attention.options import AttentionOptions
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.spec import MAX_LEN, KernelSpec

LOG2_E = math.log2(math.e)
# Rows of a float32 register.
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What turns products into scores: the static options, and the numbers of the call.

    Attributes:
      options: the static options.
      scales: `scales(which, head)` is the float32 scale of K (0) or V (1) of a KV head.
      sliding_window: int32 scalar, None without one.
      sm_scale: float32 scalar.
    """

    options: AttentionOptions
    scales: Callable[[int, int], Any]
    sliding_window: Any
    sm_scale: Any

    def scale(self, head: int) -> Any:
        """The factor on the products of a KV head: sm_scale, times K's scale if it has one."""
        return self.sm_scale * self.scales(0, head) if self.options.has_scales else self.sm_scale


def scoring(spec: KernelSpec, refs: Refs) -> Scoring:
    """What turns products into scores in a call, from its numbers in SMEM."""

    def scales(which: int, head: int) -> Any:
        return refs.factors[1 + which * spec.heads.num_kv_heads + head]

    return Scoring(spec.options, scales, sliding_window(spec, refs), refs.factors[0])


def sliding_window(spec: KernelSpec, refs: Refs) -> Any:
    """The length of the sliding window, None without one."""
    return jnp.clip(refs.sliding_window[0], 1, MAX_LEN) if spec.options.has_window else None


def scores(options: AttentionOptions, product: jax.Array, scale: Any) -> jax.Array:
    """Scores in the base 2 of products of q and k; `scale` is `Scoring.scale`."""
    if options.soft_cap is None:
        return product * (scale * LOG2_E)
    return jnp.tanh(product * (scale / options.soft_cap)) * (options.soft_cap * LOG2_E)


def seen_keys(
    options: AttentionOptions,
    key: jax.Array,
    query_position: Any,
    first: Any,
    end: Any,
    sliding_window: Any,
) -> jax.Array:
    """Which keys of a KV block the mask lets a query see.

    Everything but the comparison with `key` is computed on one number per query, because there are
    many keys.

    Args:
      options: static.
      key: number of the key in its block, int32.
      query_position: broadcasts with `key`.
      first, end: positions of the block's first key, and of the first key that it does not hold.
      sliding_window: int32 scalar, None without one.
    """
    stop = end
    if options.causal:
        stop = jnp.minimum(stop, query_position + 1)
    seen = key < stop - first
    if options.has_window:
        seen &= key > query_position - sliding_window - first
    return seen


def holds_token(first: Any, end: Any, num_keys: int, parity: int | None) -> jax.Array:
    """bool[keys or keys / 2, 128]: which rows of a KV block hold a token; see `operands.values`."""
    step, offset = (1, 0) if parity is None else (2, parity)
    row = lax.broadcasted_iota(jnp.int32, (num_keys // step, layout.LANES), 0)
    return first + row * step + offset < end
