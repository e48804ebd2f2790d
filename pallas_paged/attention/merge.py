# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Joins attention over parts of the keys, by the log-sum-exp of each part."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_paged import checks, scalars, settings


def merge_attention_states(
    outs: jax.Array | Sequence[jax.Array], lses: jax.Array | Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys, of what attention over X parts of them has returned.

    The parts may be computed by calls with `return_lse=True`, on one device or on many. Each key
    belongs to one part. Sinks count once: give them to one part alone. The sums are those of an
    online softmax (Milakov and Gimelshein, 2018), in float32.

    Args:
      outs: [X, T, N, H] or X arrays [T, N, H], the outputs of the parts; float32, bfloat16 or
        float16.
      lses: float32[X, T, N] or X arrays float32[T, N], their log-sum-exps. A part in which a row
        sees no key has -inf there; its output is not read then.

    Returns:
      (out, lse): the output [T, N, H] in the dtype of `outs`, and the log-sum-exp float32[T, N].
      Rows that see no key in any part are zeros and -inf.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.

    Under `shard_map`, where the pages of a sequence lie on the devices of an axis `"context"`, each
    device attends to its own pages, and `jax.lax.all_gather(x, "context")` makes of `out` and `lse`
    what this function takes.

    >>> outs = jnp.array([1.0, 4.0]).reshape(2, 1, 1, 1) * jnp.ones((2, 1, 1, 128))
    >>> lses = jnp.log(jnp.array([1.0, 2.0])).reshape(2, 1, 1)  # the second weighs twice as much
    >>> out, lse = merge_attention_states(outs, lses)
    >>> round(float(out[0, 0, 0]), 4), round(float(jnp.exp(lse[0, 0])), 4)
    (3.0, 3.0)
    """
    op = "merge_attention_states"
    stacked = _stacked(op, "outs", outs), _stacked(op, "lses", lses)
    checks.require(
        stacked[0].ndim == 4
        and stacked[0].shape[0] > 0
        and stacked[0].dtype in (jnp.float32, jnp.bfloat16, jnp.float16),
        op,
        "outs",
        got=checks.describe(stacked[0]),
        wanted="float32, bfloat16 or float16 [X, T, N, H], or X arrays [T, N, H], of X >= 1 parts",
        hint="they are what ragged_paged_attention returns",
    )
    checks.require(
        stacked[1].dtype == jnp.float32 and stacked[1].shape == stacked[0].shape[:3],
        op,
        "lses",
        got=checks.describe(stacked[1]),
        wanted=f"float32{list(stacked[0].shape[:3])}",
        hint=f"one for each row and head of outs {checks.describe(stacked[0])}: call with"
        " return_lse=True",
    )
    return _merge(*stacked)


def _stacked(op: str, argument: str, parts: jax.Array | Sequence[jax.Array]) -> jax.Array:
    """One array of an array or of a sequence of them."""
    if scalars.is_array(parts):
        return jnp.asarray(parts)
    checks.require(
        isinstance(parts, list | tuple) and len(parts) > 0,
        op,
        argument,
        got=checks.describe(parts),
        wanted="an array whose first dimension is that of the parts, or a list of arrays",
        hint="one for each part of the keys",
    )
    for part in parts:
        checks.require_array(op, argument, part)
        checks.require(
            (part.shape, part.dtype) == (parts[0].shape, parts[0].dtype),
            op,
            argument,
            got=f"{checks.describe(part)} beside {checks.describe(parts[0])}",
            wanted="arrays of one shape and dtype",
            hint="the parts are of the same queries",
        )
    return jnp.stack(parts)


@settings.independent()
@jax.jit
def _merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(lses, axis=0)  # [T, N]
    # Where no part has a key, the difference of two infinities would be NaN.
    weights = jnp.exp(lses - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = jnp.sum(weights, axis=0)
    # Selected and not multiplied by 0, because a part without a key may hold anything.
    weights = weights[..., None]
    parts = jnp.where(weights != 0, weights * outs.astype(jnp.float32), 0.0)
    divisor = jnp.where(total == 0, 1.0, total)
    out = jnp.sum(parts, axis=0) / divisor[..., None]
    return out.astype(outs.dtype), largest + jnp.log(divisor)
