# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The softmax of one KV block, and of the blocks so far (Milakov and Gimelshein, 2018)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged.attention.options import Factors
from pallas_paged.attention.xla.spec import XlaSpec


class Partial(NamedTuple):
    """The softmax of the keys so far.

    Attributes:
      out: f32[I, B, N, H], the weighted sum of the values.
      total: f32[I, B, N], the sum of the weights.
      largest: f32[I, B, N], the largest score, by which the weights are shifted.
    """

    out: jax.Array
    total: jax.Array
    largest: jax.Array


def nothing(rows: jax.Array) -> Partial:
    """The softmax of no key."""
    return Partial(
        jnp.zeros_like(rows, jnp.float32),
        jnp.zeros_like(rows[..., 0], jnp.float32),
        jnp.full_like(rows[..., 0], -jnp.inf, jnp.float32),
    )


def of_heads(scale: jax.Array | None, spec: XlaSpec, num_heads: int) -> jax.Array:
    """A scale of the tensor or of each KV head as f32[1] or f32[N], one for each query head."""
    if scale is None:
        return jnp.ones(1, jnp.float32)
    scale = jnp.asarray(scale, jnp.float32).reshape(-1)
    return scale if scale.size == 1 else jnp.repeat(scale, num_heads // spec.options.num_kv_heads)


def attend_block(
    spec: XlaSpec,
    q: jax.Array,
    scale: jax.Array,
    k: jax.Array,
    v: jax.Array,
    is_seen: jax.Array,
) -> Partial:
    """The softmax of one KV block by two einsums.

    Args:
      spec: the static parameters.
      q: [I, B, N, H].
      scale: f32[1] or f32[N], the factor on the scores.
      k, v: [I, block_kv, K, H].
      is_seen: bool[I, B, block_kv].
    """
    num_kv_heads = k.shape[2]
    einsum = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if spec.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    q_of_kv_heads = q.astype(spec.dtype).reshape(*q.shape[:2], num_kv_heads, -1, q.shape[3])
    scores = einsum("ibkgh,iklh->ikbgl", q_of_kv_heads, k.swapaxes(1, 2))
    of_kv_heads = (num_kv_heads, 1, -1) if scale.size > 1 else (1, 1, 1)
    scores *= scale.reshape(of_kv_heads)[..., None]  # [K, 1, G, 1]
    if spec.options.soft_cap is not None:
        scores = spec.options.soft_cap * jnp.tanh(scores / spec.options.soft_cap)
    scores = jnp.where(is_seen[:, None, :, None], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1)  # [I, K, B, G]
    weights = jnp.exp(scores - _shift(largest)[..., None])
    out = einsum("ikbgl,iklh->ikbgh", weights.astype(spec.dtype), v.swapaxes(1, 2))
    by_row = [x.swapaxes(1, 2).reshape(q.shape[:3]) for x in (jnp.sum(weights, axis=-1), largest)]
    return Partial(out.swapaxes(1, 2).reshape(q.shape), *by_row)


def attend_block_by_cudnn(
    spec: XlaSpec, q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array, *, is_causal: bool
) -> Partial:
    """The same by cuDNN's attention, of the first `count` int32[I] keys of the block."""
    scale = 1.0 if spec.sm_scale is None else spec.sm_scale
    out, lse = cudnn(q, k, v, count, is_causal=is_causal, scale=scale)
    has_keys = (count > 0)[:, None, None]
    total = jnp.where(has_keys, 1.0, 0.0) * jnp.ones_like(lse)
    out = jnp.where(has_keys[..., None], out.astype(jnp.float32), 0.0)
    return Partial(out, total, jnp.where(has_keys, lse, -jnp.inf))


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array, *, is_causal: bool, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The output [I, B, N, H] and the log-sum-exp f32[I, B, N] of the first `count` keys."""
    out, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=jnp.full_like(count, q.shape[1]),
        key_value_seq_lengths=jnp.maximum(count, 1),
        implementation="cudnn",
        return_residual=True,
    )
    # jax rounds the log-sum-exp to q's dtype, and XLA leaves out that rounding where the next step
    # undoes it (xla_allow_excess_precision, its default).
    return out, lse.astype(jnp.float32)


def join(a: Partial, b: Partial) -> Partial:
    """The softmax of the keys of both."""
    largest = jnp.maximum(a.largest, b.largest)
    shift = _shift(largest)
    of_a, of_b = jnp.exp(a.largest - shift), jnp.exp(b.largest - shift)
    out = a.out * of_a[..., None] + b.out * of_b[..., None]
    return Partial(out, a.total * of_a + b.total * of_b, largest)


def _shift(largest: jax.Array) -> jax.Array:
    """What scores are shifted by: 0 where a row sees no key, to avoid NaN."""
    return jnp.where(jnp.isneginf(largest), 0.0, largest)


def finish(spec: XlaSpec, factors: Factors, partial: Partial) -> tuple[jax.Array, jax.Array]:
    """The output f32[I, B, N, H] and the log-sum-exp f32[I, B, N]; sinks count as keys."""
    if factors.sinks is not None:
        largest = jnp.broadcast_to(factors.sinks.astype(jnp.float32), partial.total.shape)
        sinks = Partial(jnp.zeros_like(partial.out), jnp.ones_like(partial.total), largest)
        # A sink of -inf is a head without one.
        sinks = sinks._replace(total=jnp.where(jnp.isneginf(largest), 0.0, 1.0))
        partial = join(partial, sinks)
    total = partial.total[..., None]
    v_scale = of_heads(factors.v_scale, spec, partial.total.shape[-1])
    out = partial.out / jnp.where(total > 0, total, 1.0) * v_scale[:, None]
    return out, _shift(partial.largest) + jnp.log(partial.total)
