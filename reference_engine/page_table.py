# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The page table of the running requests, which stays on the device from step to step.

A step sends only the entries that have changed. The whole table of 512 requests of 2,720 pages has
5.6 MB, which would be packed and sent in each step otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from reference_engine.step_plan import Segment


class _Row(NamedTuple):
    """What the table holds of a request: in which row, of which pages, and how many of them."""

    number: int
    page_ids: Sequence[int]
    num_pages: int


class PageTable:
    """One row for each request, in the order in which they came.

    The device's copy is an input of a step and one of its outputs. Between the two nobody has it,
    so that after an error, wherever it was, the next step starts anew: from an empty table, all of
    which is sent.

    Attributes:
      host: the entries as the host knows them, i32[R, M]. Entries past the pages of a request mean
        nothing.
      on_device: the table after the last step, i32[R, M]; None if the device has none.

    >>> segment = Segment(7, 3, (1, 1), page_ids=(5, 2), samples=True, is_decode=False)
    >>> table = PageTable(num_rows=2, width=3)
    >>> rows, changes = table.update([segment], max_changes=4)
    >>> rows.tolist(), changes.tolist(), table.host.tolist()  # it will be sent as a whole
    ([0], [[], [], []], [[5, 2, -1], [-1, -1, -1]])
    >>> table.on_device = table.take()
    >>> rows, changes = table.update([segment._replace(request_id=8)], max_changes=4)
    >>> rows.tolist(), changes.T.tolist()  # row, column, page
    ([1], [[1, 0, 5], [1, 1, 2]])
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self.host = np.full((num_rows, width), -1, np.int32)
        self.on_device: jax.Array | None = None
        self._next: jax.Array | None = None  # the input of the next step
        self._rows: dict[int, _Row] = {}  # by request id
        self._free: list[int] = []

    def update(
        self, segments: Sequence[Segment], max_changes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Enters the pages of a step's segments.

        Args:
          segments: of at most R requests.
          max_changes: if more entries than this have changed, the whole table is sent.

        Returns:
          The row of each segment, i32[S], and the changed entries, i32[3, n]: row, column, page.
        """
        table, self.on_device, self._next = self.on_device, None, None
        if table is None:
            self._rows, self._free = {}, list(reversed(range(len(self.host))))
        rows, changes = [], []
        for segment in segments:
            row = self._rows.get(segment.request_id)
            page_ids = segment.page_ids
            # A request that has lost its pages has got another sequence of them.
            if row is None or row.page_ids is not page_ids:
                row = self._take_row(segment, segments)
            if row.num_pages < len(page_ids):
                new = page_ids[row.num_pages :]
                self.host[row.number, row.num_pages : len(page_ids)] = new
                changes += [(row.number, row.num_pages + i, page) for i, page in enumerate(new)]
                self._rows[segment.request_id] = row._replace(num_pages=len(page_ids))
            rows.append(row.number)
        if table is None or len(changes) > max_changes:
            table, changes = None, []
        self._next = table
        return np.array(rows, np.int32), np.array(changes, np.int32).reshape(-1, 3).T

    def take(self) -> jax.Array:
        """The table on the device without the last changes, for the step to enter them.

        If there is none, or too many entries have changed, that is the host's, changes included.
        """
        table, self._next = self._next, None
        # The step may donate it, and later changes of the host's must not be seen by it.
        return jax.device_put(self.host.copy()) if table is None else table

    def _take_row(self, segment: Segment, segments: Sequence[Segment]) -> _Row:
        """A row without entries for the segment's request."""
        old = self._rows.get(segment.request_id)
        if old is None and not self._free:
            present = {other.request_id for other in segments}
            for request_id in [i for i in self._rows if i not in present]:
                self._free.append(self._rows.pop(request_id).number)
        row = _Row(self._free.pop() if old is None else old.number, segment.page_ids, 0)
        self._rows[segment.request_id] = row
        return row
