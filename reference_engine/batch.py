# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The batch: segments as padded arrays, whose shapes come from a closed set.

No other module pads. The batch is dense: segment follows segment without a gap, and padding is only
at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from reference_engine.config import EngineConfig
from reference_engine.page_table import PageTable
from reference_engine.scheduler import Segment
from reference_engine.write_plan import plan_writes


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """One allowed set of static sizes. A step runs in a shape that holds it.

    Attributes:
      num_tokens: T, the length of the packed batch.
      num_seqs: S, the number of sequences.
      num_page_writes: W, the capacity of `page_ids`.
      num_slices: X, the capacity of `slices`.
      num_slots: the capacity of `slots`.
      num_page_changes: C, the capacity of `page_changes`.
      is_decode: whether every sequence has exactly one new token, as in a step of decodes.
    """

    num_tokens: int
    num_seqs: int
    num_page_writes: int
    num_slices: int
    num_slots: int
    num_page_changes: int
    is_decode: bool = False


Array = Any  # numpy's where the host packs it, jax's in the model


class Batch(NamedTuple):
    """The model's input of one step.

    The writes are given in the form that EngineConfig.kv_write names. The arrays of the other forms
    have length 0; with "fused", the arrays of all forms have.
    """

    token_ids: Array  # i32[T]
    positions: Array  # i32[T]
    kv_lens: Array  # i32[S], new tokens included
    cu_q_lens: Array  # i32[S + 1], the total number of tokens past the last sequence
    num_seqs: Array  # i32[1]
    page_ids: Array  # i32[W], -1 past the whole pages
    token_starts: Array  # i32[W]
    slices: Array  # i32[3, X]
    num_slices: Array  # i32[1]
    slots: Array  # i32[T or 0], -1 on padding
    table_rows: Array  # i32[S], each sequence's row of page_indices
    page_changes: Array  # i32[3, C], row, column and page of entries to change; row -1 on padding
    page_indices: Array  # i32[R, M], the page table; it is not packed


# The sizes of a step of decodes go up by a sixteenth of the largest, so that what is padded while
# the running requests end one by one is a few percent. Those of other steps go up by a quarter of
# the power of two below, because such a step may have any size, and its time goes with its size.
_FINEST_DECODES = 8  # sequences
_FINEST_PREFILLS = 512  # tokens; below, reading the weights takes longer than the rows do
_SMALLEST_PREFILL = 16  # tokens


@functools.cache
def batch_shapes(config: EngineConfig) -> tuple[BatchShape, ...]:
    """Every shape that a step can have, the smallest first. No other shape is ever compiled.

    A step of decodes has one token for each sequence. Every other step has room for max_num_seqs
    sequences, unless it has fewer tokens. Where the config gives buckets, the shapes are the
    products of both kinds of buckets.

    >>> config = EngineConfig(max_num_batched_tokens=48, max_num_seqs=2, page_size=16)
    >>> [(s.num_tokens, s.num_seqs) for s in batch_shapes(config)]
    [(1, 1), (2, 2), (16, 2), (32, 2), (48, 2), (64, 2)]
    """
    if config.token_buckets or config.seq_buckets:
        return _bucket_shapes(config)
    decodes = _decode_sizes(min(config.max_num_seqs, config.max_step_tokens))
    shapes = [_shape(size, size, config, is_decode=True) for size in decodes]
    for size in _step_sizes(config):
        shapes.append(_shape(size, min(size, config.max_num_seqs), config))
    return tuple(sorted(shapes, key=_size))


def max_num_seqs(config: EngineConfig) -> int:
    """The most sequences of a shape, which is the number of rows of the page table."""
    return max(shape.num_seqs for shape in batch_shapes(config))


def num_logit_rows(num_seqs: int) -> int:
    """The rows of logits that a step with S = `num_seqs` yields; those past S mean nothing.

    There are few sizes, because each has its own programs of the sampler, and those take longer to
    compile than the model does.

    >>> [num_logit_rows(num_seqs) for num_seqs in (1, 8, 9, 80, 256)]
    [8, 8, 16, 128, 256]
    """
    return max(8, 1 << (num_seqs - 1).bit_length())


def describe_shapes(config: EngineConfig) -> str:
    """The shapes in one line, for people.

    >>> print(describe_shapes(EngineConfig(max_num_batched_tokens=48, max_num_seqs=2)))
    6 shapes: decodes of {1, 2} sequences, other steps of {16 to 64 by 16} tokens
    >>> print(describe_shapes(EngineConfig(token_buckets=(128, 256), seq_buckets=(16,))))
    2 shapes: {128, 256} tokens x {16} sequences
    """
    shapes = batch_shapes(config)
    count = f"{len(shapes)} shape{'s' * (len(shapes) > 1)}"
    if config.token_buckets or config.seq_buckets:
        tokens = _listed(shape.num_tokens for shape in shapes)
        return f"{count}: {tokens} tokens x {_listed(s.num_seqs for s in shapes)} sequences"
    decodes = _listed(shape.num_seqs for shape in shapes if shape.is_decode)
    others = _listed(shape.num_tokens for shape in shapes if not shape.is_decode)
    return f"{count}: decodes of {decodes} sequences, other steps of {others} tokens"


@functools.lru_cache(maxsize=65536)
def fitting_shapes(num_tokens: int, num_seqs: int, config: EngineConfig) -> tuple[BatchShape, ...]:
    """The shapes that hold a step with this number of tokens and sequences, the smallest first."""
    return tuple(
        shape
        for shape in batch_shapes(config)
        if shape.num_tokens >= num_tokens
        and shape.num_seqs >= num_seqs
        # Every sequence has a token, so equal numbers mean one token each.
        and (num_tokens == num_seqs or not shape.is_decode)
    )


def choose_shape(num_tokens: int, num_seqs: int, config: EngineConfig) -> BatchShape:
    """The smallest shape that holds a step with this number of tokens and sequences."""
    return fitting_shapes(num_tokens, num_seqs, config)[0]


def make_batch(segments: Sequence[Segment], config: EngineConfig) -> Batch:
    """Packs the segments in order, and plans their writes.

    Args:
      segments: the segments of one step, as the scheduler has planned them.
      config: it gives the page size, the shapes and the form of the writes.
    """
    lengths = [len(segment.token_ids) for segment in segments]
    shape = choose_shape(sum(lengths), len(segments), config)
    return make_batch_of(shape, segments, config)


def make_batch_of(
    shape: BatchShape,
    segments: Sequence[Segment],
    config: EngineConfig,
    table: PageTable | None = None,
) -> Batch:
    """As `make_batch`, in a given shape. Without segments, the batch computes nothing.

    The pages are entered in `table`; without one, in a table of the batch alone.
    """
    table = table or PageTable(shape.num_seqs, config.max_pages_per_seq)
    table_rows, page_changes = table.update(segments, shape.num_page_changes)
    lengths = np.array([len(segment.token_ids) for segment in segments], np.int64)
    total = int(lengths.sum())
    starts = np.array([segment.start for segment in segments], np.int64)
    cu_q_lens = np.concatenate([[0], np.cumsum(lengths)])
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
        cu_q_lens=_pad(cu_q_lens, shape.num_seqs + 1, cu_q_lens[-1]),
        num_seqs=np.array([len(segments)], np.int32),
        page_ids=_pad(writes.page_ids if pages else nothing, shape.num_page_writes, -1),
        token_starts=_pad(writes.token_starts if pages else nothing, shape.num_page_writes, -1),
        slices=np.stack([_pad(row, shape.num_slices, 0) for row in slices]),
        num_slices=np.array([slices.shape[1]], np.int32),
        slots=_pad(writes.slots if shape.num_slots else nothing, shape.num_slots, -1),
        table_rows=_pad(table_rows, shape.num_seqs, 0),
        page_changes=np.stack([_pad(row, shape.num_page_changes, -1) for row in page_changes]),
        page_indices=table.host,
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


def _size(shape: BatchShape) -> tuple[int, int, bool]:
    return shape.num_tokens, shape.num_seqs, not shape.is_decode


def _shape(
    num_tokens: int, num_seqs: int, config: EngineConfig, *, is_decode: bool = False
) -> BatchShape:
    # A single token fills a page only where a page is a token.
    whole = 0 if is_decode and config.page_size > 1 else num_tokens // config.page_size
    # Only the first page and the last page of a segment can be partial.
    ends = min(num_tokens, 2 * num_seqs)
    return BatchShape(
        num_tokens,
        num_seqs,
        num_page_writes=whole if config.kv_write == "pages" else 0,
        num_slices={"pages": ends, "slices": min(num_tokens, whole + ends)}.get(config.kv_write, 0),
        num_slots=num_tokens if config.kv_write == "tokens" else 0,
        num_page_changes=num_seqs + whole,  # more of them, and the whole table is sent
        is_decode=is_decode,
    )


def _bucket_shapes(config: EngineConfig) -> tuple[BatchShape, ...]:
    """The products of the buckets, without those that no step needs: a sequence has a token."""
    tokens = config.token_buckets or _powers_of_two(16, config.max_step_tokens)
    seqs = config.seq_buckets or _powers_of_two(1, config.max_num_seqs)
    return tuple(
        _shape(t, s, config)
        for t in tokens
        for below, s in itertools.pairwise((0, *seqs))
        if t > below
    )


def _decode_sizes(largest: int) -> list[int]:
    """Powers of two, then multiples of a sixteenth of the largest, rounded up to 8.

    >>> _decode_sizes(64)
    [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    """
    step = -(-largest // (16 * _FINEST_DECODES)) * _FINEST_DECODES
    powers = [size for size in _powers_of_two(1, step) if size < min(step, largest)]
    return [*powers, *range(step, largest, step), largest]


def _prefill_sizes(largest: int) -> list[int]:
    """Powers of two up to 512, and then four sizes for each doubling.

    >>> _prefill_sizes(1536)
    [16, 32, 64, 128, 256, 512, 640, 768, 896, 1024, 1280, 1536]
    """
    sizes = []
    for power in _powers_of_two(_SMALLEST_PREFILL, largest)[:-1]:
        parts = 1 if power < _FINEST_PREFILLS else 4
        sizes += [power + power * part // parts for part in range(parts)]
    return [*(size for size in sizes if size < largest), largest]


def _step_sizes(config: EngineConfig) -> list[int]:
    """The token counts of the shapes that are no decodes'.

    Aligned steps are up to a page shorter or longer than the budget, so there the sizes go up by a
    128th of the budget, or by a sixteenth of a page if that is more.

    >>> config = EngineConfig(max_num_batched_tokens=1024, max_model_len=2048, page_size=16)
    >>> _step_sizes(config)[-5:]
    [896, 1016, 1024, 1032, 1040]
    """
    budget, most = config.max_num_batched_tokens, config.max_step_tokens
    sizes = set(_prefill_sizes(budget))
    if most > budget:
        sizes.add(most)
        if budget >= _FINEST_PREFILLS:
            step = max(budget // 128, config.page_size // 16, 8)
            sizes.update(range(budget, most, step), range(budget, budget - config.page_size, -step))
    largest = min(most, config.max_num_seqs * config.max_model_len)
    return [*sorted(size for size in sizes if size < largest), largest]


def _listed(sizes: Iterable[int]) -> str:
    """The distinct sizes in order; of four or more with the same distance, the first and last.

    >>> _listed([1, 2, 4, 8, 12, 16, 20, 20, 30])
    '{1, 2, 4 to 20 by 4, 30}'
    """
    left, parts = sorted(set(sizes)), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 0
        run = next(n for n in range(1, len(left) + 1) if left[n : n + 1] != [left[0] + n * step])
        run = run if run >= 4 else 1
        parts.append(
            f"{left[0]:,}" if run == 1 else f"{left[0]:,} to {left[run - 1]:,} by {step:,}"
        )
        left = left[run:]
    return "{" + ", ".join(parts) + "}"


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
