# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel's refs by name: inputs, outputs and scratch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pallas_paged.attention.tpu.state import State


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's refs; None where the call has none. `launch` makes what they refer to."""

    # Metadata: int32[S]; [S*M], in SMEM or (if streamed) in HBM; [S + 1]; [1].
    kv_lens: Any
    page_table: Any
    cu_q_lens: Any
    num_seqs: Any
    factors: Any  # float32[1 or 1 + 2K], SMEM: sm_scale, then the scales of K and of V
    # Inputs and outputs in HBM.
    q: Any  # [T, N*C]
    pool: Any  # [P*page_size, R or words, C]
    out: Any  # [T, N*C]
    # Scratch.
    state: State
    work_items: Any  # int32[max_work_items, work_items.record_size], SMEM
    kv_vmem: Any  # uint32 or float32 [stage_rows, then new_kv_rows per lane tile, pitch, 1, 128]
    q_vmem: Any  # q's dtype [block_q, N*C]
    out_vmem: Any  # q's dtype [2, block_q, N*C]: one is being computed, the other is on its way
    q_heads: Any  # float32[lane tiles * block_q, row pitch, 1, 128]: heads of decodes are rows
    out_heads: Any  # as q_heads
    decode_m: Any  # see decode.attend
    decode_l: Any
    decode_acc: Any
    prefill_shift: Any  # see prefill.attend
    prefill_l: Any
    prefill_acc: Any
    prefill_mask: Any  # uint32[block_kv or block_kv / 2, block_q]
    stage_sems: Any  # one per stage, the one for blocks that are fetched again included
    q_tile_sem: Any
    out_sems: Any  # of the output, of the log-sum-exp
    # What only some calls have.
    sliding_window: Any = None  # int32[1], SMEM
    sinks: Any = None  # float32[N], SMEM
    sinks_vmem: Any = None  # float32[rows, 128], all lanes equal
    inverse_scales: Any = None  # float32[2K], SMEM, of K and of V: factors on new tokens
    lse: Any = None  # float32[T, 128s], HBM
    lse_vmem: Any = None  # float32[2, block_q, 128s], as out_vmem
    k: Any = None  # [T, K*H] or [T, K, H], HBM
    v: Any = None
    pool_before: Any = None  # the same memory as pool
    k_vmem: Any = None  # [block_q, K*H] or [block_q, K, H]
    v_vmem: Any = None
    sent_sem: Any = None
    table_parts: Any = None  # int32[2 * table_part], SMEM
    table_sems: Any = None


def unpack(names: Sequence[str], arguments: Sequence[Any]) -> Refs:
    """The refs of a call from the kernel's arguments, in the order of their names."""
    refs = dict(zip(names, arguments, strict=True))
    if refs["pool"].dtype.itemsize < 4:
        refs["pool"] = refs["pool"].bitcast(jnp.uint32)
    refs["state"] = State(refs["state"])
    return Refs(**refs)
