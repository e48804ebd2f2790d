# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which bytes of the pool a step's new tokens go to: whole pages, and slices for the rest.

Pure numpy. Token i of the packed batch is the i-th new token, segment after segment, without gaps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from reference_engine.scheduler import Segment


@dataclasses.dataclass(frozen=True, eq=False)
class WritePlan:
    """The same writes in two forms: `slots` alone, or `page_ids` and `slices` together.

    Attributes:
      page_ids: i32[W], pages that the step fills from first row to last.
      token_starts: i32[W], the packed token that goes to row 0 of each.
      slices: i32[3, X], rows (first slot, first packed token, length), each inside one page and
        shorter than it.
      slots: i32[T], page * page_size + row of every packed token.
    """

    page_ids: np.ndarray
    token_starts: np.ndarray
    slices: np.ndarray
    slots: np.ndarray

    def all_slices(self, page_size: int) -> np.ndarray:
        """i32[3, W + X]: the whole pages too as slices."""
        whole = np.stack([
            self.page_ids * page_size, self.token_starts, np.full_like(self.page_ids, page_size),
        ])
        return np.concatenate([whole, self.slices], axis=1)


def plan_writes(segments: Sequence[Segment], page_size: int) -> WritePlan:
    """Cuts every segment at its page boundaries.

    >>> plan = plan_writes([Segment(0, 3, (7,) * 7, (5, 2, 9), True)], page_size=4)
    >>> plan.page_ids.tolist(), plan.token_starts.tolist()  # positions 4..7 fill page 2
    ([2], [1])
    >>> plan.slices.T.tolist()  # position 3 in page 5; positions 8 and 9 in page 9
    [[23, 0, 1], [36, 5, 2]]
    >>> plan.slots.tolist()
    [23, 8, 9, 10, 11, 36, 37]
    """
    whole: list[tuple[int, int]] = []
    slices: list[tuple[int, int, int]] = []
    slots: list[np.ndarray] = []
    packed = 0  # tokens of the segments before this one
    for segment in segments:
        positions = np.arange(segment.start, segment.end)
        pages = np.asarray(segment.page_ids)
        slots.append(pages[positions // page_size] * page_size + positions % page_size)
        position = segment.start
        while position < segment.end:
            index, row = divmod(position, page_size)
            length = min(page_size - row, segment.end - position)
            page_id, token = segment.page_ids[index], packed + position - segment.start
            if length == page_size:
                whole.append((page_id, token))
            else:
                slices.append((page_id * page_size + row, token, length))
            position += length
        packed += segment.end - segment.start
    pages_and_starts = np.array(whole, np.int32).reshape(-1, 2)
    return WritePlan(
        page_ids=pages_and_starts[:, 0],
        token_starts=pages_and_starts[:, 1],
        slices=np.array(slices, np.int32).reshape(-1, 3).T,
        slots=np.concatenate([np.empty(0, np.int32), *slots]).astype(np.int32),
    )
