# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""From the arguments of the three ops to the metadata and other operands of their one kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import layout
from pallas_paged.kv_write import oracle
from pallas_paged.kv_write.options import WriteScales
from pallas_paged.kv_write.tpu.spec import KernelSpec


class Entries(NamedTuple):
    """The metadata, int32[n] each: one element per page, per chunk of a slice, or per token."""

    targets: jax.Array  # the page id, or the first slot; an element outside the pool is skipped
    token_starts: jax.Array | None = None  # None: element i starts at token i * tokens per element
    lengths: jax.Array | None = None  # None: all have one length


class Operands(NamedTuple):
    """What the kernel takes before the pool, in its order."""

    summary: tuple[jax.Array, ...]  # see summarize; empty without token_starts
    entries: Entries
    inverse_scales: jax.Array | None  # float32[2K], of K, then of V
    new: tuple[jax.Array, jax.Array]  # k and v
    tails: tuple[jax.Array, ...]  # the last rows of k and of v, where they fill no tile


def of_pages(
    spec: KernelSpec, page_ids: jax.Array, token_starts: jax.Array | None, num_pages: int
) -> Entries:
    """The entries of whole pages; those that are to be skipped get the page id -1."""
    if token_starts is None:
        return Entries(page_ids[: spec.num_entries])
    num_tokens, page_size = spec.num_tokens, spec.slots_per_target
    is_live = (page_ids >= 0) & (page_ids < num_pages)
    is_live &= (token_starts >= 0) & (token_starts <= num_tokens - page_size)
    # Inside the batch, so that no skipped entry's overflow hides a step back from summarize.
    starts = jnp.clip(token_starts, 0, num_tokens)
    return Entries(jnp.where(is_live, page_ids, -1), starts)


def of_slices(
    spec: KernelSpec, slices: jax.Array, num_slices: jax.Array, num_pages: int, page_size: int
) -> Entries:
    """The chunks of slices; those that are to be skipped get the slot -1 and no length."""
    target, start, length = slices
    is_live = oracle.is_live_slice(slices, num_slices, num_pages, page_size, spec.num_tokens)
    start = jnp.clip(start, 0, spec.num_tokens)  # as in of_pages
    if spec.chunks_per_entry > 1:
        chunk = jnp.arange(spec.chunks_per_entry, dtype=jnp.int32)
        offset = (chunk * spec.chunk_tokens)[None, :]  # [1, chunks]
        is_live = (is_live[:, None] & (offset < length[:, None])).reshape(-1)
        length = jnp.minimum(length[:, None] - offset, spec.chunk_tokens).reshape(-1)
        target, start = ((x[:, None] + offset).reshape(-1) for x in (target, start))
    return Entries(jnp.where(is_live, target, -1), start, jnp.where(is_live, length, 0))


def prepare(
    spec: KernelSpec, k: jax.Array, v: jax.Array, entries: Entries, scales: WriteScales
) -> Operands:
    """The kernel's operands: metadata of whole steps, whole tiles of k and v and what is left."""
    if layout.is_quantized(k.dtype):
        k, v = (_codes_as_numbers(spec, x) for x in (k, v))
        scales = WriteScales(None, None)
    summary = summarize(spec, entries) if entries.token_starts is not None else ()
    size = spec.num_steps * spec.elements_per_step
    if size > spec.num_elements:
        padding = (0, size - spec.num_elements)
        entries = jax.tree.map(lambda x: jnp.pad(x, padding, constant_values=-1), entries)

    # A DMA moves whole tiles of rows. What is left over at the end of k and v goes in by itself.
    align = spec.row_align
    tails: tuple[jax.Array, ...] = ()
    if spec.has_tail:
        tails = tuple(_pad_rows(x[spec.aligned_tokens :], align) for x in (k, v))
    elif spec.num_tokens < align:
        k, v = (_pad_rows(x, align) for x in (k, v))

    inverse_scales = None
    if spec.has_scales:
        heads = spec.slots.num_kv_heads
        inverse_scales = jnp.concatenate([oracle.inverse_scale(scale, heads) for scale in scales])
    return Operands(summary, entries, inverse_scales, (k, v), tails)


def summarize(spec: KernelSpec, entries: Entries) -> tuple[jax.Array, ...]:
    """What the kernel must know about entries that name their first tokens: four int32[1].

    The first is the number of elements up to the last one that is live; after it all are skipped.
    The others are the index of the first element that starts before the one before it ends, that is
    skipped, and whose length differs from the length before it; each is negated, and -n where
    there is none. All four come from one pass, because each pass of XLA's on a TPU is a launch.
    """
    target, start = entries.targets, entries.token_starts
    assert start is not None
    length = jnp.full_like(start, spec.chunk_tokens * spec.chunks_per_element)
    if entries.lengths is not None:
        length = entries.lengths
    num_elements = target.shape[0]
    element = jnp.arange(num_elements, dtype=jnp.int32)
    is_live = target >= 0
    is_first = element == 0

    def first(condition: jax.Array) -> jax.Array:
        return jnp.where(condition, -element, -num_elements)

    highest = lax.reduce(
        (
            jnp.where(is_live, element + 1, 0),
            first((start < jnp.roll(start + length, 1)) & ~is_first),
            first(~is_live),
            first((length != jnp.roll(length, 1)) & ~is_first),
        ),
        (jnp.int32(0), *(jnp.int32(-num_elements),) * 3),
        lambda xs, ys: tuple(map(jnp.maximum, xs, ys)),
        (0,),
    )
    return tuple(x[None] for x in highest)


def _codes_as_numbers(spec: KernelSpec, x: jax.Array) -> jax.Array:
    """8-bit codes of the pool's own dtype as the numbers from -128 to 127.

    The kernel quantises them as for an int8 pool, with a scale of 1, which restores their very bits
    whatever they stand for. The pool itself keeps its dtype: XLA would copy it to rename it.
    """
    return lax.bitcast_convert_type(x, jnp.int8).astype(spec.new_dtype)


def _pad_rows(x: jax.Array, num_rows: int) -> jax.Array:
    return jnp.pad(x, ((0, num_rows - x.shape[0]), (0, 0)))
