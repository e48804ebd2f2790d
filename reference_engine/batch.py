# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The batch: segments as padded arrays, whose shapes come from a closed set.

No other module pads. The batch is dense: segment follows segment without a gap, and padding is only
at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from reference_engine.config import EngineConfig
from reference_engine.scheduler import Segment
from reference_engine.write_plan import plan_writes


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """One allowed set of static sizes. A step runs in the smallest shape that holds it.

    Attributes:
      num_tokens: T, the length of the packed batch.
      num_seqs: S, the number of sequences.
      num_page_writes: W, the capacity of `page_ids`.
      num_slices: X, the capacity of `slices`.
      num_slots: the capacity of `slots`.
    """

    num_tokens: int
    num_seqs: int
    num_page_writes: int
    num_slices: int
    num_slots: int


Array = Any  # numpy's where the host packs it, jax's in the model


class Batch(NamedTuple):
    """The model's input of one step.

    The writes are given in the form that EngineConfig.kv_write names. The arrays of the other forms
    have length 0; with "fused", the arrays of all forms have.
    """

    token_ids: Array  # i32[T]
    positions: Array  # i32[T]
    kv_lens: Array  # i32[S], new tokens included
    page_indices: Array  # i32[S, M], -1 past a sequence's pages
    cu_q_lens: Array  # i32[S + 1], the total number of tokens past the last sequence
    num_seqs: Array  # i32[1]
    page_ids: Array  # i32[W], -1 past the whole pages
    token_starts: Array  # i32[W]
    slices: Array  # i32[3, X]
    num_slices: Array  # i32[1]
    slots: Array  # i32[T or 0], -1 on padding


@functools.cache
def batch_shapes(config: EngineConfig) -> tuple[BatchShape, ...]:
    """Every shape that a step can have. No other shape is ever compiled.

    >>> config = EngineConfig(max_num_batched_tokens=48, max_num_seqs=2, page_size=16)
    >>> [(s.num_tokens, s.num_seqs) for s in batch_shapes(config)]
    [(16, 1), (16, 2), (32, 1), (32, 2), (48, 1), (48, 2)]
    """
    token_buckets = config.token_buckets or _powers_of_two(16, config.max_num_batched_tokens)
    seq_buckets = config.seq_buckets or _powers_of_two(1, config.max_num_seqs)
    return tuple(_shape(t, s, config) for t in token_buckets for s in seq_buckets)


def describe_shapes(config: EngineConfig) -> str:
    """The shapes in one line, for people.

    >>> print(describe_shapes(EngineConfig(max_num_batched_tokens=48, max_num_seqs=2)))
    6 shapes: {16, 32, 48} tokens x {1, 2} sequences
    """
    shapes = batch_shapes(config)
    tokens, seqs = (
        "{" + ", ".join(f"{size:,}" for size in sorted(set(sizes))) + "}"
        for sizes in zip(*((shape.num_tokens, shape.num_seqs) for shape in shapes), strict=True)
    )
    return f"{len(shapes)} shape{'s' * (len(shapes) > 1)}: {tokens} tokens x {seqs} sequences"


@functools.lru_cache(maxsize=65536)
def choose_shape(num_tokens: int, num_seqs: int, config: EngineConfig) -> BatchShape:
    """The smallest shape that holds a step with this number of tokens and sequences."""
    return min(
        shape
        for shape in batch_shapes(config)
        if shape.num_tokens >= num_tokens and shape.num_seqs >= num_seqs
    )


def make_batch(segments: Sequence[Segment], config: EngineConfig) -> Batch:
    """Packs the segments in order, and plans their writes.

    Args:
      segments: the segments of one step, as the scheduler has planned them.
      config: it gives the page size, the shapes and the form of the writes.
    """
    lengths = [len(segment.token_ids) for segment in segments]
    shape = choose_shape(sum(lengths), len(segments), config)
    return make_batch_of(shape, segments, config)


def make_batch_of(shape: BatchShape, segments: Sequence[Segment], config: EngineConfig) -> Batch:
    """As `make_batch`, in a given shape. Without segments, the batch computes nothing."""
    lengths = np.array([len(segment.token_ids) for segment in segments], np.int64)
    total = int(lengths.sum())
    starts = np.array([segment.start for segment in segments], np.int64)
    cu_q_lens = np.concatenate([[0], np.cumsum(lengths)])
    page_indices = np.full((shape.num_seqs, config.max_pages_per_seq), -1, np.int32)
    for row, segment in zip(page_indices, segments, strict=False):
        row[: len(segment.page_ids)] = segment.page_ids
    token_ids = itertools.chain.from_iterable(segment.token_ids for segment in segments)

    # The fused op finds in the page table what to write where.
    planned = () if config.kv_write == "fused" else segments
    writes = plan_writes(planned, config.page_size)
    nothing = np.empty(0, np.int32)
    pages = config.kv_write == "pages"
    slices = writes.slices if pages else writes.all_slices(config.page_size)
    if config.kv_write == "tokens":
        slices = np.empty((3, 0), np.int32)
    return Batch(
        token_ids=_pad(np.fromiter(token_ids, np.int32, total), shape.num_tokens, 0),
        positions=_pad(
            np.arange(total) + np.repeat(starts - cu_q_lens[:-1], lengths), shape.num_tokens, 0
        ),
        kv_lens=_pad(starts + lengths, shape.num_seqs, 0),
        page_indices=page_indices,
        cu_q_lens=_pad(cu_q_lens, shape.num_seqs + 1, cu_q_lens[-1]),
        num_seqs=np.array([len(segments)], np.int32),
        page_ids=_pad(writes.page_ids if pages else nothing, shape.num_page_writes, -1),
        token_starts=_pad(writes.token_starts if pages else nothing, shape.num_page_writes, -1),
        slices=np.stack([_pad(row, shape.num_slices, 0) for row in slices]),
        num_slices=np.array([slices.shape[1]], np.int32),
        slots=_pad(writes.slots if shape.num_slots else nothing, shape.num_slots, -1),
    )


def pad_tokens(tokens: jax.Array, size: int) -> jax.Array:
    """A step's tokens in an array of one size for all shapes, i32[S] -> i32[size].

    The model takes them in this form, so that it is not compiled for every pair of shapes.
    """
    return tokens if tokens.shape[0] == size else _pad_tokens(tokens, size)


@functools.partial(jax.jit, static_argnums=1)
def _pad_tokens(tokens: jax.Array, size: int) -> jax.Array:
    return jnp.pad(tokens, (0, size - tokens.shape[0]))


Spec = tuple[tuple[tuple[int, ...], str], ...]  # shape and dtype of each packed array


def pack(arrays: Sequence[Array]) -> tuple[np.ndarray, Spec]:
    """Packs arrays of 32-bit numbers into one array, so that a step costs one transfer.

    Returns:
      The array, i32[n], and the spec with which `unpack` gets the arrays back.

    >>> packed, spec = pack([np.array([1, 2], np.int32), np.array([[0.5]], np.float32)])
    >>> [x.tolist() for x in unpack(packed, spec)]
    [[1, 2], [[0.5]]]
    """
    numpy = [np.ascontiguousarray(array) for array in arrays]
    spec = tuple((array.shape, array.dtype.str) for array in numpy)
    return np.concatenate([array.reshape(-1).view(np.int32) for array in numpy]), spec


def unpack(packed: Array, spec: Spec) -> list[Any]:
    """The arrays that `pack` has packed. It can be traced; the spec is static."""
    arrays, start = [], 0
    for shape, dtype in spec:
        end = start + int(np.prod(shape, dtype=np.int64))
        part = packed[start:end]
        kind = np.dtype(dtype)
        if kind != np.int32:
            part = lax.bitcast_convert_type(part, kind)
        arrays.append(part.reshape(shape))
        start = end
    return arrays


def _shape(num_tokens: int, num_seqs: int, config: EngineConfig) -> BatchShape:
    whole = num_tokens // config.page_size
    # Only the first page and the last page of a segment can be partial.
    ends = min(num_tokens, 2 * num_seqs)
    return BatchShape(
        num_tokens,
        num_seqs,
        num_page_writes=whole if config.kv_write == "pages" else 0,
        num_slices={"pages": ends, "slices": min(num_tokens, whole + ends)}.get(config.kv_write, 0),
        num_slots=num_tokens if config.kv_write == "tokens" else 0,
    )


def _powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    """Doubling sizes from `smallest`, ending in `largest`."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


def _pad(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    array = np.full(size, fill, np.int32)
    array[: len(values)] = values
    return array
