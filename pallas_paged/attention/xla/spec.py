# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The static parameters of a call."""

import dataclasses

import jax.numpy as jnp

from pallas_paged.attention.options import AttentionOptions


@dataclasses.dataclass(frozen=True)
class XlaSpec:
    """The static parameters of a call.

    Attributes:
      options: the static options of the op.
      head_dim: H.
      dtype: of the operands of the products.
      block_q: rows of a tile of a prefill.
      block_kv: keys in a block, whole pages.
      num_decodes, num_tiles: tiles in a group of decodes, and of the others.
      has_cudnn: whether cuDNN's attention computes the blocks of prefills.
      sm_scale: the factor on q . k if cuDNN gets it; None where it is traced, and then it is on q.
    """

    options: AttentionOptions
    head_dim: int
    dtype: jnp.dtype
    block_q: int
    block_kv: int
    num_decodes: int
    num_tiles: int
    has_cudnn: bool
    sm_scale: float | None
