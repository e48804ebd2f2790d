# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which chunks make the next group: the metadata in SMEM, and the search through it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged.kv_write.tpu.refs import Refs, Scalar
from pallas_paged.kv_write.tpu.spec import KernelSpec

# How regular the entries of a call are, each level with all before it: nothing is known of them;
# each starts where the one before it ends, or later; none is to be skipped; all are equally long.
ANY_ORDER, ASCENDING, ALL_LIVE, EQUAL_LENGTHS = 0, 1, 2, 3


class Group(NamedTuple):
    """Consecutive chunks whose tokens lie in one token block. All int32[]."""

    first: Any  # the first chunk
    block_start: Any  # the first token of the token block
    end: Any  # the chunk after the last one
    needed_end: Any  # the token after the last one that a live chunk needs


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunks of one step of the grid, numbered from 0; their metadata is read from SMEM."""

    spec: KernelSpec
    refs: Refs
    first_of_step: Any  # the number in the whole call of the step's first chunk
    count: Any  # chunks of this step
    regularity: Any  # one of the levels above

    def target(self, i: Scalar) -> jax.Array:
        """The page of chunk i (of slices and tokens its first slot), as the caller gave it."""
        return self.refs.targets[i // self.spec.chunks_per_element]

    def start(self, i: Scalar) -> jax.Array:
        """The first token of chunk i."""
        spec, n = self.spec, self.spec.chunks_per_element
        if spec.has_token_starts:
            return self.refs.token_starts[i // n] + i % n * spec.chunk_tokens
        return (self.first_of_step + i) * spec.chunk_tokens

    def length(self, i: Scalar) -> Scalar:
        """The tokens of chunk i."""
        return self.refs.lengths[i] if self.spec.has_lengths else self.spec.chunk_tokens

    def end(self, i: Scalar) -> jax.Array:
        """The token after the last one of chunk i."""
        return self.start(i) + self.length(i)

    @property
    def num_targets(self) -> int:
        """Pages of the pool, or slots: what the metadata's ids lie below."""
        return self.refs.pool.shape[0] // self.spec.slots_per_target

    def is_in_pool(self, target: jax.Array) -> jax.Array:
        """The kernel's own check: below the pool's end and, as unsigned, not negative."""
        return target.astype(jnp.uint32) < jnp.uint32(self.num_targets)

    def is_live(self, i: Scalar) -> jax.Array:
        """Whether chunk i is written."""
        return self.is_in_pool(self.target(i))

    def block_start(self, i: Scalar) -> jax.Array:
        """Where the token block of chunk i starts; inside the batch, also if i is skipped."""
        spec = self.spec
        start = self.start(i) & -spec.row_align  # a power of two; starts are never negative
        if spec.has_token_starts or spec.has_tail:
            start = jnp.minimum(start, spec.aligned_tokens - spec.row_align)
        return start


def chunks_of_step(spec: KernelSpec, refs: Refs) -> Chunks:
    """The chunks of this step of the grid."""
    first_of_step = pl.program_id(0) * spec.chunks_per_step
    num_chunks: Scalar = spec.max_chunks
    regularity: Scalar = ASCENDING
    if spec.has_token_starts:
        summary = (refs.num_used, refs.first_step_back, refs.first_hole, refs.first_unequal)
        num_used, regularity = read_summary(summary)
        num_chunks = num_used * spec.chunks_per_element
    count = jnp.clip(num_chunks - first_of_step, 0, spec.chunks_per_step)
    return Chunks(spec, refs, first_of_step, count, regularity)


def read_summary(summary: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """How many elements are in use, and how regular those are: see entries.summarize."""
    num_used, step_back, hole, unequal = (ref[0] for ref in summary)
    regularity = jnp.where(-unequal < num_used, ALL_LIVE, EQUAL_LENGTHS)
    regularity = jnp.where(-hole < num_used, ASCENDING, regularity)
    return num_used, jnp.where(-step_back < num_used, ANY_ORDER, regularity)


def find_group(chunks: Chunks, i: jax.Array) -> Group:
    """The group that starts with chunk i."""
    spec = chunks.spec
    start = chunks.block_start(i)
    if not spec.has_token_starts:
        end = jnp.minimum(i + spec.chunks_per_group, chunks.count)
        return Group(i, start, end, chunks.end(end - 1))
    limit = jnp.minimum(start + spec.block_rows, chunks.start(i) + spec.block_tokens)
    step, last = spec.chunks_per_iteration, spec.chunks_per_step

    def next_needed_end(end: jax.Array) -> jax.Array:
        # Of chunks that ascend, the last one of an iteration speaks for all of them.
        return chunks.end(jnp.minimum(end + step, last) - 1)

    def iteration_fits(state: tuple[jax.Array, ...]) -> jax.Array:
        end, _, next_end = state
        is_ahead = (chunks.regularity != ANY_ORDER) & (end + step <= chunks.count)
        return is_ahead & (next_end <= limit)

    def take_iteration(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        end, _, next_end = state
        end += step
        return end, next_end, next_end if spec.is_one_iteration else next_needed_end(end)

    # Where no whole iteration fits, one by one; the first chunk always fits, or is skipped.
    def chunk_fits(state: tuple[jax.Array, ...]) -> jax.Array:
        end, _, taken = state
        chunk = jnp.minimum(end, last - 1)
        fits = (chunks.start(chunk) >= start) & (chunks.end(chunk) <= limit)
        fits &= taken + chunks.length(chunk) <= spec.max_sent_tokens
        return (end < chunks.count) & (fits | jnp.logical_not(chunks.is_live(chunk)))

    def take_chunk(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        end, needed_end, taken = state
        live = chunks.is_live(end)
        needed_end = jnp.where(live, jnp.maximum(needed_end, chunks.end(end)), needed_end)
        return end + 1, needed_end, taken + jnp.where(live, chunks.length(end), 0)

    def one_by_one() -> tuple[jax.Array, ...]:
        # A group of skipped chunks needs no token, but a DMA needs some.
        return lax.while_loop(chunk_fits, take_chunk, take_chunk((i, start + 1, jnp.int32(0))))[:2]

    def by_iterations() -> tuple[jax.Array, ...]:
        state = take_iteration(none)
        if not spec.is_one_iteration:
            state = lax.while_loop(iteration_fits, take_iteration, state)
        return state[:2]

    none = (i, start, next_needed_end(i))
    return Group(i, start, *lax.cond(iteration_fits(none), by_iterations, one_by_one))
