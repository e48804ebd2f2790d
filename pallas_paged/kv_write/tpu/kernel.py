# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel of the TPU writes: a pipeline over groups of chunks, with two groups in flight.

While a group's tokens are interleaved and its DMAs start, the next group's tokens come in and the
DMAs of the group before finish. spec.py defines the words.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged.kv_write.tpu.grouping import Group, chunks_of_step, find_group
from pallas_paged.kv_write.tpu.interleave import interleave
from pallas_paged.kv_write.tpu.issue import send_group, wait_sent
from pallas_paged.kv_write.tpu.refs import Ref, Refs, unpack
from pallas_paged.kv_write.tpu.spec import KernelSpec
from pallas_paged.kv_write.tpu.token_blocks import start_loads, wait_loads

# (the group whose tokens are on their way, its stage, tokens that the last group sent, and the
# group before that)
Carry = tuple[Group, jax.Array, jax.Array, jax.Array]


def kernel(spec: KernelSpec, *arguments: Ref) -> None:
    """Writes the chunks of one step of the grid."""
    refs = unpack(spec, arguments)
    chunks = chunks_of_step(spec, refs)

    @pl.when(chunks.first_of_step == 0)
    def _clear_padding() -> None:
        if spec.slots.has_padding:
            refs.transpose_vmem[...] = jnp.zeros_like(refs.transpose_vmem)
            refs.slots_vmem[...] = jnp.zeros_like(refs.slots_vmem)

    def open_group(i: jax.Array, stage: jax.Array) -> Group:
        """Finds the group that starts with chunk i, if there is one, and starts its loads."""

        def find_and_load() -> Group:
            group = find_group(chunks, i)
            start_loads(spec, refs, group, stage)
            return group

        def no_group() -> Group:
            return Group(i, jnp.int32(0), i, jnp.int32(0))

        return lax.cond(i < chunks.count, find_and_load, no_group)

    def write_group(carry: Carry) -> Carry:
        group, stage, sent, sent_before = carry
        next_group = open_group(group.end, 1 - stage)
        wait_loads(spec, refs, group, stage)
        wait_sent(refs, sent_before, stage)
        _interleave(spec, refs, group, stage)
        return next_group, 1 - stage, send_group(spec, refs, chunks, group, stage), sent

    zero = jnp.int32(0)
    opening = (open_group(zero, zero), zero, zero, zero)
    _, stage, sent, sent_before = lax.while_loop(
        lambda carry: carry[0].first < chunks.count, write_group, opening
    )
    wait_sent(refs, sent_before, stage)
    wait_sent(refs, sent, 1 - stage)


def _interleave(spec: KernelSpec, refs: Refs, group: Group, stage: jax.Array) -> None:
    """Makes pool slots of the token block in a stage."""

    def scales(which: int, head: int) -> jax.Array:
        return refs.inverse_scales[which * spec.slots.num_kv_heads + head]

    interleave(
        spec.slots,
        spec.tiling,
        refs.k_vmem.at[stage],
        refs.v_vmem.at[stage],
        refs.slots_vmem.at[pl.ds(stage * spec.stage_rows, spec.stage_rows)],
        refs.transpose_vmem,
        num_tokens=group.needed_end - group.block_start,
        scales=scales if spec.has_scales else None,
    )
