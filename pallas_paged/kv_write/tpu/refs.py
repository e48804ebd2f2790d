# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The refs of the TPU write kernel, by name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.kv_write.tpu.spec import KernelSpec

Ref = Any  # jax has no public type for a kernel's ref
Scalar = jax.Array | int  # int32; an int where it is static


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's refs; None where the call has none."""

    # scalar inputs, in SMEM
    targets: Ref  # int32[elements_per_step]: page ids, or the chunks' first slots
    # inputs, in HBM
    k: Ref  # [T, K*H] or [T, K, H]
    v: Ref
    # the output, in HBM, the same memory as the input before it
    pool_before: Ref
    pool: Ref  # [P*page_size, words, C], 32-bit words
    # scratch
    k_vmem: Ref  # [2, stage_rows, K*H] or [2, stage_rows, K, H]: one token block per stage
    v_vmem: Ref
    slots_vmem: Ref  # [2 * stage_rows, words, C]: the slots of one token block per stage
    transpose_vmem: Ref  # words of interleave.scratch_shape
    load_sems: Ref  # DMA semaphores, one per stage
    send_sems: Ref
    # scalar inputs of some calls
    num_used: Ref = None  # int32[1] each: see entries.summarize
    first_step_back: Ref = None
    first_hole: Ref = None
    first_unequal: Ref = None
    token_starts: Ref = None  # int32[elements_per_step]
    lengths: Ref = None  # int32[elements_per_step]
    inverse_scales: Ref = None  # float32[2K]: of K, then of V
    # inputs of some calls
    k_tail: Ref = None  # [row_align, K*H]: the last tokens, which fill no tile of rows
    v_tail: Ref = None


def unpack(spec: KernelSpec, arguments: Sequence[Ref]) -> Refs:
    """The refs of a call: inputs, the output and scratch, in the order of the launch."""
    names = [
        "num_used first_step_back first_hole first_unequal" if spec.has_token_starts else "",
        "targets",
        "token_starts" if spec.has_token_starts else "",
        "lengths" if spec.has_lengths else "",
        "inverse_scales" if spec.has_scales else "",
        "k v",
        "k_tail v_tail" if spec.has_tail else "",
        "pool_before pool",
        "k_vmem v_vmem slots_vmem transpose_vmem load_sems send_sems",
    ]
    refs = dict(zip(" ".join(names).split(), arguments, strict=True))
    if refs["pool"].dtype.itemsize < 4:
        refs["pool"] = refs["pool"].bitcast(jnp.uint32)
    return Refs(**refs)
