# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Parameters of a model: for now random ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reference_engine.config import ModelConfig

Params = dict[str, Any]


def random_params(config: ModelConfig, seed: int) -> Params:
    """Random parameters of which greedy decoding yields diverse tokens.

    Attention must weigh in the residual stream against the token's own embedding, or the next token
    is a function of the last one alone and generation falls into a short cycle. Hence keys and
    queries large enough for uneven attention, and an output projection that does not shrink it.

    Args:
      config: see ModelConfig.
      seed: fixes every number.

    Returns:
      A pytree in `config.dtype`; `layers` is stacked, [L, ...], matrices are [in, out].
    """
    rng = np.random.default_rng(seed)
    layers, width, inner = config.num_layers, config.hidden_size, config.intermediate_size
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim

    def normal(*shape, scale):
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.dtype(config.dtype))

    def matrix(rows, columns, gain=1.0):
        return normal(layers, rows, columns, scale=gain * rows**-0.5)

    def ones(*shape):
        return jnp.ones(shape, jnp.dtype(config.dtype))

    return {
        "embedding": normal(config.vocab_size, width, scale=1.0),
        "layers": {
            "attention_norm": ones(layers, width),
            "q": matrix(width, q_width, gain=2.0),
            "k": matrix(width, kv_width, gain=2.0),
            "v": matrix(width, kv_width),
            "o": matrix(q_width, width, gain=2.0),
            "mlp_norm": ones(layers, width),
            "gate": matrix(width, inner),
            "up": matrix(width, inner),
            "down": matrix(inner, width, gain=2.0),
        },
        "norm": ones(width),
        "unembedding": normal(width, config.vocab_size, scale=width**-0.5),
    }


def num_params(params: Params) -> int:
    """How many numbers `params` holds."""
    return sum(x.size for x in jax.tree.leaves(params))
