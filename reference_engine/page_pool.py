# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which pages are free and how many requests hold each of the others. Pure Python."""

from __future__ import annotations

import collections


class PagePool:
    """Free list and reference counts of `num_pages` pages.

    A page is free when nobody refers to it. Pages are handed out in the order in which they were
    freed, the least recently used first.

    >>> pool = PagePool(4)
    >>> pages = pool.allocate(3)
    >>> pages, pool.num_free
    ([0, 1, 2], 1)
    >>> pool.allocate(2) is None  # all or nothing
    True
    >>> pool.release(pages)
    >>> pool.allocate(4)
    [3, 2, 1, 0]
    """

    def __init__(self, num_pages: int):
        self._free = collections.deque(range(num_pages))
        self._references = [0] * num_pages

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, page_id: int) -> int:
        """How many holders page `page_id` has."""
        return self._references[page_id]

    def allocate(self, num_pages: int) -> list[int] | None:
        """Takes `num_pages` free pages, one reference each; None, and nothing taken, if too few."""
        if num_pages > len(self._free):
            return None
        page_ids = [self._free.popleft() for _ in range(num_pages)]
        for page_id in page_ids:
            self._references[page_id] = 1
        return page_ids

    def retain(self, page_ids: list[int]) -> None:
        """Adds one reference to each page; ValueError, and no change, if one of them is free."""
        self._check_held(page_ids, "retain")
        for page_id in page_ids:
            self._references[page_id] += 1

    def release(self, page_ids: list[int]) -> None:
        """Takes one reference from each page; ValueError, and no change, if one of them is free.

        The last pages of a request are freed first, so that its front, which other requests are
        likelier to share, is reused last.
        """
        self._check_held(page_ids, "release")
        for page_id in reversed(page_ids):
            self._references[page_id] -= 1
            if self._references[page_id] == 0:
                self._free.append(page_id)

    def _check_held(self, page_ids: list[int], what: str) -> None:
        for page_id, count in collections.Counter(page_ids).items():
            held = self._references[page_id] if 0 <= page_id < len(self._references) else 0
            if held == 0 or (what == "release" and held < count):
                raise ValueError(
                    f"PagePool.{what}: page {page_id} has {held} references, {count} were named;"
                    " a page must be allocated first and released once per reference"
                )
