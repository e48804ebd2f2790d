# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel's scratch: VMEM, SMEM and semaphores."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.attention.tpu import decode, work_items
from pallas_paged.attention.tpu.spec import KernelSpec
from pallas_paged.attention.tpu.state import State


def shapes(spec: KernelSpec, tensors: dict[str, jax.Array]) -> dict[str, Any]:
    """What scratch the kernel takes, by its names in `Refs`, which say what is in it.

    Args:
      spec: the static parameters.
      tensors: q, and k and v if they are written, [T, width] or [T, K, H].
    """
    heads, block_q, q = spec.heads, spec.block_q, tensors["q"]
    decode_rows = decode.decode_rows(heads.num_heads)
    head_rows = heads.lane_tiles * block_q, decode.row_pitch(heads.num_heads), 1, layout.LANES
    prefill_rows = block_q * heads.group
    word = jnp.float32 if heads.pool_dtype == jnp.float32 else jnp.uint32
    kv_rows = spec.stage_rows + heads.lane_tiles * spec.new_kv_rows
    mask_rows = spec.block_kv * spec.mask_dtype.itemsize // 4

    def float32(*shape: int) -> Any:
        return pltpu.VMEM(shape, jnp.float32)

    found = {
        "state": pltpu.SMEM((State.SIZE,), jnp.int32),
        "work_items": pltpu.SMEM((spec.max_work_items, work_items.record_size(spec)), jnp.int32),
        "kv_vmem": pltpu.VMEM((kv_rows, heads.pitch, 1, layout.LANES), word),
        "q_vmem": pltpu.VMEM((block_q, q.shape[1]), q.dtype),
        "out_vmem": pltpu.VMEM((2, block_q, q.shape[1]), q.dtype),
        "q_heads": float32(*head_rows),
        "out_heads": float32(*head_rows),
        "decode_m": float32(decode_rows, layout.LANES),
        "decode_l": float32(decode_rows, layout.LANES),
        "decode_acc": float32(decode_rows, heads.lanes),
        "prefill_shift": float32(heads.num_kv_heads, 8, prefill_rows),
        "prefill_l": float32(heads.num_kv_heads, 16, prefill_rows),
        "prefill_acc": float32(heads.num_kv_heads, heads.lanes, prefill_rows),
        "prefill_mask": pltpu.VMEM((mask_rows, block_q), jnp.uint32),
        "stage_sems": pltpu.SemaphoreType.DMA((spec.num_stages + 1,)),
        "q_tile_sem": pltpu.SemaphoreType.DMA((1,)),
        "out_sems": pltpu.SemaphoreType.DMA((2,)),
    }
    if spec.options.return_lse:
        lanes = layout.round_up(heads.num_heads, layout.LANES)
        found["lse_vmem"] = float32(2, block_q, lanes)
    if spec.writes:
        for name in ("k", "v"):
            x = tensors[name]
            found[f"{name}_vmem"] = pltpu.VMEM((block_q, *x.shape[1:]), x.dtype)
        found["sent_sem"] = pltpu.SemaphoreType.DMA((1,))
    if spec.table_part:
        found["table_parts"] = pltpu.SMEM((2 * spec.table_part,), jnp.int32)
        found["table_sems"] = pltpu.SemaphoreType.DMA((2,))
    return found
