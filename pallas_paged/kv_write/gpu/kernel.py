# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel of the GPU writes: a thread block fetches a few tokens and sends each to its slot.

A thread block fetches the k and the v of its tokens into shared memory, by one bulk copy each. Then
it sends two tensor copies per token, K to the even rows of its slot and V to the odd ones. Values
for a pool of another dtype go through registers on their way. A thread block does nothing else, and
many of them share a multiprocessor: that is what hides their latencies.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_write.gpu.block_tokens import BlockTokens, FindTokens, Ref
from pallas_paged.kv_write.gpu.quantize import quantize
from pallas_paged.kv_write.gpu.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's refs; None where the call has none."""

    # inputs, in GMEM
    metadata: Sequence[Ref]  # int32, what the op's FindTokens takes
    k: Ref  # [T, K, H], or a packed QKV
    v: Ref
    inverse_scales: Sequence[Ref]  # float32[K] of K and of V, for 8-bit pools
    # in GMEM, updated in place
    pool: Ref  # [P * page_size, slot_heads, 2, H]
    # scratch
    k_smem: Ref  # [block_tokens, block_heads, H] of the pool's dtype
    v_smem: Ref
    barrier: Ref  # k and v are there
    zeros_smem: Ref  # [padding heads or more, 2, H]


def kernel(
    *arguments: Ref,
    spec: KernelSpec,
    find_tokens: FindTokens,
    k_smem: Ref,
    v_smem: Ref,
    barrier: Ref = None,
    zeros_smem: Ref = None,
) -> None:
    """One thread block: find its tokens, fetch them, send them."""
    refs = _unpack(spec, arguments, k_smem, v_smem, barrier, zeros_smem)
    mine = find_tokens(spec, lax.axis_index("block"), *refs.metadata)
    head = lax.axis_index("head_group") * spec.block_heads

    def fetch_and_send() -> None:
        if spec.converts:
            _fetch_and_convert(spec, refs, mine, head)
        else:
            _fetch(spec, refs, mine, head)
            plgpu.barrier_wait(barrier)
        _send(spec, refs, mine, head)

    if spec.fetch_first and not mine.needs_metadata:
        fetch_and_send()
    else:
        pl.when(functools.reduce(jnp.logical_or, mine.is_live))(fetch_and_send)


def _unpack(spec: KernelSpec, arguments: Sequence[Ref], *scratch: Ref) -> Refs:
    """The refs of a call by name: inputs and the pool, in the order of the launch, then scratch."""
    num_tensors = 5 if spec.has_scales else 3
    metadata, (k, v, *scales, pool) = arguments[:-num_tensors], arguments[-num_tensors:]
    return Refs(metadata, k, v, scales, pool, *scratch)


def _fetch(spec: KernelSpec, refs: Refs, mine: BlockTokens, head: jax.Array) -> None:
    """Starts the copies of the block's k and v into shared memory."""
    tokens = pl.ds(mine.first, spec.block_tokens)
    copies: list[tuple[Any, Any]] = []
    new_and_smem = ((refs.k, refs.k_smem), (refs.v, refs.v_smem))
    for (new, smem), first_head in zip(new_and_smem, spec.first_heads, strict=True):
        heads = pl.ds(first_head + head, spec.block_heads)
        if spec.fills_buffer:
            copies.append((new.at[tokens, heads], smem))
        else:
            copies += [
                (new.at[mine.first + j, heads], smem.at[j, pl.ds(0, spec.block_heads)])
                for j in range(spec.block_tokens)
            ]
    for source, target in copies:
        plgpu.copy_gmem_to_smem(
            source, target, refs.barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        )


def _fetch_and_convert(spec: KernelSpec, refs: Refs, mine: BlockTokens, head: jax.Array) -> None:
    """Puts k and v of one head into shared memory as the pool holds them."""
    tokens = pl.ds(mine.first, spec.block_tokens)
    # Both are on their way before either is used.
    values = [
        new[tokens, first_head + head]
        for new, first_head in zip((refs.k, refs.v), spec.first_heads, strict=True)
    ]
    for kind, smem in enumerate((refs.k_smem, refs.v_smem)):
        scale = refs.inverse_scales[kind][head] if refs.inverse_scales else None
        smem[:, 0] = quantize(values[kind], scale, spec.pool_dtype)


def _send(spec: KernelSpec, refs: Refs, mine: BlockTokens, head: jax.Array) -> None:
    """Copies what shared memory holds to the slots of the pool, and zeros to their padding."""
    zeros = refs.zeros_smem
    heads = pl.ds(head, spec.block_heads)
    if zeros is not None:
        zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)
    if spec.converts or zeros is not None:
        plgpu.commit_smem()
    for j, (slot, is_live) in enumerate(zip(mine.slots, mine.is_live, strict=True)):

        @pl.when(is_live)
        def _send_token(slot: jax.Array = slot, row: jax.Array = mine.shift + j) -> None:
            for kind, smem in enumerate((refs.k_smem, refs.v_smem)):
                plgpu.copy_smem_to_gmem(
                    smem.at[row, pl.ds(0, spec.block_heads)],
                    refs.pool.at[slot, heads, kind],
                    commit_group=False,
                )

        if zeros is not None:

            @pl.when(is_live & (head == 0))
            def _send_padding(slot: jax.Array = slot) -> None:
                plgpu.copy_smem_to_gmem(
                    zeros.at[pl.ds(0, spec.padding)],
                    refs.pool.at[slot, pl.ds(spec.num_kv_heads, spec.padding)],
                    commit_group=False,
                )

    plgpu.commit_smem_to_gmem_group()
    # Shared memory must outlive the reads; the writes are over when the kernel is.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
