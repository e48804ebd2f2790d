# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The write plan: which pages and slots of the pool get the new tokens of a step.

Pure numpy. The new tokens are packed segment after segment, without gaps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from reference_engine.scheduler import Segment


@dataclasses.dataclass(frozen=True, eq=False)
class WritePlan:
    """The same writes in two forms: `slots` alone, or `page_ids` and `slices` together.

    Attributes:
      page_ids: i32[W], the pages that the step fills from the first row to the last.
      token_starts: i32[W], the packed token that goes to row 0 of each of these pages.
      slices: i32[3, X], the rows (first slot, first packed token, length). A slice lies inside one
        page and is shorter than the page.
      slots: i32[T], page * page_size + row for every packed token.
    """

    page_ids: np.ndarray
    token_starts: np.ndarray
    slices: np.ndarray
    slots: np.ndarray

    def all_slices(self, page_size: int) -> np.ndarray:
        """The whole pages as slices, before the other slices: i32[3, W + X]."""
        whole = np.stack(
            [
                self.page_ids * page_size,
                self.token_starts,
                np.full_like(self.page_ids, page_size),
            ]
        )
        return np.concatenate([whole, self.slices], axis=1)


def plan_writes(segments: Sequence[Segment], page_size: int) -> WritePlan:
    """Cuts every segment at its page boundaries.

    >>> segment = Segment(0, 3, (7,) * 7, page_ids=(5, 2, 9), samples=True, is_decode=False)
    >>> plan = plan_writes([segment], page_size=4)
    >>> plan.page_ids.tolist(), plan.token_starts.tolist()  # positions 4..7 fill page 2
    ([2], [1])
    >>> plan.slices.T.tolist()  # position 3 in page 5; positions 8 and 9 in page 9
    [[23, 0, 1], [36, 5, 2]]
    >>> plan.slots.tolist()
    [23, 8, 9, 10, 11, 36, 37]
    """
    lengths = np.array([len(segment.token_ids) for segment in segments], np.int64)
    starts = np.array([segment.start for segment in segments], np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    position = np.arange(total) + np.repeat(starts - ends + lengths, lengths)
    index, row = np.divmod(position, page_size)
    # Of each segment, only the pages that new tokens go to.
    first_page = starts // page_size
    num_pages = -(-(starts + lengths) // page_size) - first_page
    pages = np.fromiter(
        itertools.chain.from_iterable(
            segment.page_ids[first : first + count]
            for segment, first, count in zip(
                segments, first_page.tolist(), num_pages.tolist(), strict=True
            )
        ),
        np.int32,
        int(num_pages.sum()),
    )
    page = pages[index + np.repeat(np.cumsum(num_pages) - num_pages - first_page, lengths)]
    # A slice starts with the first row of a page, and with the first token of a segment.
    is_first = row == 0
    is_first[(ends - lengths)] = True
    tokens = np.flatnonzero(is_first)
    sizes = np.diff(tokens, append=total)
    slots = page * page_size + row
    whole, part = tokens[sizes == page_size], sizes < page_size
    return WritePlan(
        page_ids=page[whole].astype(np.int32),
        token_starts=whole.astype(np.int32),
        slices=np.stack([slots[tokens[part]], tokens[part], sizes[part]]).astype(np.int32),
        slots=slots.astype(np.int32),
    )
