# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a call of the attention is given beside its tensors. api.py makes it, all else reads it."""

import dataclasses
from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """Which tokens of the packed batch and which pages belong to which sequence; traced.

    Attributes:
      kv_lens: int32[S], the tokens of each sequence, the new ones included.
      page_indices: int32[S, M], the page table.
      cu_q_lens: int32[S + 1], prefix sums of the new tokens.
      num_seqs: int32[1], how many of the S rows are sequences.
    """

    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array


class Factors(NamedTuple):
    """The numbers of a call that may be traced; None where the call has none.

    Attributes:
      sm_scale: float32[], the factor on q . k.
      sliding_window: int32[], how many keys a query looks back on.
      k_scale, v_scale: float32[] or float32[K], what the values of an 8-bit pool are multiplied by.
      sinks: float32[N], one more score per head.
    """

    sm_scale: jax.Array
    sliding_window: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    sinks: jax.Array | None = None

    @property
    def has_scales(self) -> bool:
        """Whether the pool's values are multiplied by anything."""
        return self.k_scale is not None or self.v_scale is not None


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The static options of a call, checked.

    Attributes:
      num_kv_heads: K.
      causal: whether a query sees no later key.
      soft_cap: the bound on the scores, or None.
      mask_value: what is added to the scores of hidden keys; None leaves them out.
      return_lse: whether the log-sum-exp is wanted.
      max_seqlen_q: the most new tokens of a sequence, if the caller has promised any.
      has_window, has_scales, has_sinks: which of the `Factors` the call has.
      is_scale_positive: whether sm_scale is known to be above 0, which saves the GPU kernels a
        product per score.
    """

    num_kv_heads: int
    causal: bool = True
    soft_cap: float | None = None
    mask_value: float | None = None
    return_lse: bool = False
    max_seqlen_q: int | None = None
    has_window: bool = False
    has_scales: bool = False
    has_sinks: bool = False
    is_scale_positive: bool = True
