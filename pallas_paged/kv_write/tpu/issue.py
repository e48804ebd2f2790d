# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Issues a group's DMAs, one per chunk from VMEM into the pool, and waits for their end.

What a DMA costs is the scalar work around it: a load of the target, its check, the addresses, the
count of tokens. So chunks are sent in unrolled iterations, and those in the cheapest form that the
call's regularity allows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.kv_write.tpu.grouping import (
    ALL_LIVE,
    ANY_ORDER,
    ASCENDING,
    EQUAL_LENGTHS,
    Chunks,
    Group,
)
from pallas_paged.kv_write.tpu.refs import Refs, Scalar
from pallas_paged.kv_write.tpu.spec import KernelSpec

# An iteration of the unrolled loop: (its number, tokens sent so far) -> tokens sent.
Iteration = Callable[[Scalar, jax.Array], jax.Array]


def send_group(
    spec: KernelSpec, refs: Refs, chunks: Chunks, group: Group, stage: jax.Array
) -> jax.Array:
    """Starts one DMA per live chunk of a group; returns how many tokens are on their way."""
    # What is added to a token's number for its row among the slots of both stages.
    to_row = stage * spec.stage_rows - group.block_start
    sender = _Sender(spec, refs, chunks, group.first, stage, to_row)
    first, end = group.first, group.end
    done, sent = first, jnp.int32(0)
    if spec.chunks_per_iteration > 1 and spec.is_one_iteration:
        return _send_one_iteration(sender, end)
    if spec.chunks_per_iteration > 1:
        done, sent = _send_iterations(sender, (end - first) // spec.chunks_per_iteration)
    return lax.fori_loop(done, end, sender.send_if_live, sent)


def wait_sent(refs: Refs, sent: jax.Array, stage: jax.Array) -> None:
    """Waits once for all that a group sent, by its number of tokens."""

    @pl.when(sent > 0)
    def _wait() -> None:
        view = refs.pool.at[pl.ds(0, sent)]
        pltpu.make_async_copy(view, view, refs.send_sems.at[stage]).wait()


def _send_one_iteration(sender: "_Sender", end: jax.Array) -> jax.Array:
    """Sends a group that is one iteration, or less: no loop around the iteration."""
    spec, first, none = sender.spec, sender.first, jnp.int32(0)

    def send_rest() -> jax.Array:
        return lax.fori_loop(first, end, sender.send_if_live, none)

    def send_checked() -> jax.Array:
        return sender.checked_iteration(none, none)

    def send_unchecked() -> jax.Array:
        return sender.unchecked_iteration(spec.chunk_tokens, none, none)

    is_whole = end - first == spec.chunks_per_iteration
    if not spec.has_token_starts:
        return lax.cond(is_whole, send_checked, send_rest)
    return lax.cond(
        is_whole & (sender.chunks.regularity >= ALL_LIVE),
        send_unchecked,
        lambda: lax.cond(is_whole, send_checked, send_rest),
    )


def _send_iterations(sender: "_Sender", num_iterations: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sends a group's whole iterations; returns the chunk after them, and the tokens sent."""
    spec, refs = sender.spec, sender.refs
    # (the regularity that a form needs, the form), the cheapest first
    forms: list[tuple[int, Iteration]] = [(ASCENDING, sender.checked_iteration)]
    if spec.has_lengths:
        forms = [
            (EQUAL_LENGTHS, functools.partial(sender.unchecked_iteration, refs.lengths[0])),
            (ALL_LIVE, functools.partial(sender.unchecked_iteration, None)),
            (ANY_ORDER, sender.checked_iteration),
        ]
    elif spec.has_token_starts:
        forms = [
            (ALL_LIVE, functools.partial(sender.unchecked_iteration, spec.chunk_tokens)),
            (ANY_ORDER, sender.checked_iteration),
        ]
    done, sent = jnp.int32(0), jnp.int32(0)
    for needed, iteration in forms:
        until = jnp.where(sender.chunks.regularity >= needed, num_iterations, done)
        sent = lax.fori_loop(done, until, iteration, sent)
        done = until
    return sender.first + num_iterations * spec.chunks_per_iteration, sent


@dataclasses.dataclass(frozen=True)
class _Sender:
    """Sends chunks of one group. Each method returns the tokens that were sent so far."""

    spec: KernelSpec
    refs: Refs
    chunks: Chunks
    first: Any  # the group's first chunk
    stage: Any
    to_row: Any  # offset from a token's number to its row in slots_vmem

    def send(self, i: Scalar, target: jax.Array, row: jax.Array, num_tokens: Scalar) -> None:
        """Starts the DMA of chunk i, whose tokens are in slots_vmem from `row` on."""
        spec = self.spec
        slot = target * spec.slots_per_target + i % spec.chunks_per_element * spec.chunk_tokens
        pltpu.make_async_copy(
            self.refs.slots_vmem.at[pl.ds(row, num_tokens)],
            self.refs.pool.at[pl.ds(slot, num_tokens)],
            self.refs.send_sems.at[self.stage],
        ).start()

    def row_of(self, i: Scalar, u: int) -> jax.Array:
        """The row in slots_vmem of the first token of chunk i + u."""
        if self.spec.has_token_starts:
            return self.chunks.start(i + u) + self.to_row
        return self.chunks.start(i) + self.to_row + u * self.spec.chunk_tokens

    def send_if_live(self, i: Scalar, sent: jax.Array) -> jax.Array:
        """Sends one chunk, after its own check."""
        target, num_tokens = self.chunks.target(i), self.chunks.length(i)
        live = self.chunks.is_in_pool(target)
        pl.when(live)(lambda: self.send(i, target, self.row_of(i, 0), num_tokens))
        return sent + jnp.where(live, num_tokens, 0)

    def checked_iteration(self, iteration: Scalar, sent: jax.Array) -> jax.Array:
        """Sends an iteration's chunks, each after its own check, and counts them together if all
        are live."""
        chunks, unroll = self.chunks, self.spec.chunks_per_iteration
        i = self.first + iteration * unroll
        largest = jnp.uint32(0)
        for u in range(unroll):
            target, num_tokens = chunks.target(i + u), chunks.length(i + u)
            row = self.row_of(i, u)
            # As an unsigned number, so that the negative ones are out of the pool too.
            largest = jnp.maximum(largest, target.astype(jnp.uint32))
            when_in_pool = pl.when(chunks.is_in_pool(target))
            when_in_pool(functools.partial(self.send, i + u, target, row, num_tokens))

        def count_live(i: jax.Array) -> jax.Array:
            # A loop, because straight code would be predicated and run in every case.
            def add(i: jax.Array, sum: jax.Array) -> jax.Array:
                return sum + jnp.where(chunks.is_live(i), chunks.length(i), 0)

            return lax.fori_loop(i, i + unroll, add, jnp.int32(0))

        def count_all(i: jax.Array) -> jax.Array:
            return jnp.int32(0) + sum(chunks.length(i + u) for u in range(unroll))

        return sent + lax.cond(largest < chunks.num_targets, count_all, count_live, i)

    def unchecked_iteration(
        self, num_tokens: Scalar | None, iteration: Scalar, sent: jax.Array
    ) -> jax.Array:
        """Sends an iteration's chunks, of which all are live; `num_tokens` is None where their
        lengths may differ."""
        chunks, unroll = self.chunks, self.spec.chunks_per_iteration
        i = self.first + iteration * unroll
        for u in range(unroll):
            n = chunks.length(i + u) if num_tokens is None else num_tokens
            self.send(i + u, chunks.target(i + u), self.row_of(i, u), n)
            sent += n if num_tokens is None else 0
        return sent if num_tokens is None else sent + unroll * num_tokens
