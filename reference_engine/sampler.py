# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""From logits to tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.jit
def greedy(logits: jax.Array) -> jax.Array:
    """The id of the largest logit, the lowest id among equals: f32[S, vocab_size] -> i32[S].

    >>> greedy(jnp.array([[0.0, 2.0, 2.0]])).tolist()
    [1]
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
