# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the kernels read and write in device memory: arrays at the launch, refs in a kernel."""

import dataclasses
from typing import NamedTuple

from pallas_paged.attention.gpu.spec import Ref, Scalar


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both kernels read. None stands for what a call does not have.

    Attributes:
      q: [T, N, H].
      kv: the pool, [P, page_size, heads, 2H].
      table: the page table, int32[S, M].
      kv_lens, cu_q_lens, num_seqs: int32[S], int32[S + 1], int32[1].
      schedule: int32[2, S + 1], of `make_schedule`.
      sm_scale: f32[1].
      window: int32[1], the sliding window.
      k_scale, v_scale: f32[1] or f32[K].
      sinks: f32[N].
    """

    q: Ref
    kv: Ref
    table: Ref
    kv_lens: Ref
    cu_q_lens: Ref
    num_seqs: Ref
    schedule: Ref
    sm_scale: Ref
    window: Ref | None = None
    k_scale: Ref | None = None
    v_scale: Ref | None = None
    sinks: Ref | None = None


class DecodeOutputs(NamedTuple):
    """What the decode kernel writes.

    Attributes:
      out: [T, N, H]. Only the rows of short sequences whose heads are not split are written.
      means: f32[2 * partitions + 1, 64, H], two partial results per partition: the means of the
        values. One more than are used, because the combination reads whole multiples of 128, past
        the end of a partial result.
      log2_sums: as `means`, the log2 of the sums of exponentials, equal over a row.
      splits: int32[partitions, 4], the head that begins in a partition and ends in a later one: its
        number of partial results (0 for no such head), first row of the batch, tokens and KV head.
      lse: f32[T, N], written where `out` is; None if it is not wanted.
    """

    out: Ref
    means: Ref
    log2_sums: Ref
    splits: Ref
    lse: Ref | None = None


class PartialResults(NamedTuple):
    """What the decode kernel leaves to be combined: refs as in `DecodeOutputs`.

    Attributes:
      means, log2_sums: f32[2 * partitions + 1, 64 * H].
      splits: int32[partitions, 4].
    """

    means: Ref
    log2_sums: Ref
    splits: Ref


class PrefillOutputs(NamedTuple):
    """What the prefill kernel completes in place: the rows that the decode kernel left open.

    Attributes:
      out: [T, N, H].
      lse: f32[T, N], or None.
    """

    out: Ref
    lse: Ref | None


def scale_of_head(scale: Ref, kv_head: Scalar) -> Scalar:
    """The scale of one KV head, from a ref f32[1] or f32[K]."""
    return scale[kv_head if scale.shape[0] > 1 else 0]
