# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The page pool: which pages are free, how many requests hold the others, and the prefix cache.

Pure Python. The prefix cache belongs to the pages. A full page that was published is found by a
hash of all tokens up to its end. That holds while the page is free, too, until it is allocated
again.
"""

from __future__ import annotations

import array
import collections
import hashlib
from collections.abc import Iterable, Sequence


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full page: of its tokens and, through the parent's hash, of all before them.

    >>> first = page_hash(b"", (1, 2))
    >>> page_hash(first, (3, 4)) == page_hash(b"", (3, 4))
    False
    """
    return hashlib.blake2b(parent + array.array("q", token_ids).tobytes(), digest_size=16).digest()


class PagePool:
    """The free list, the reference counts and the prefix cache of `num_pages` pages.

    A page without a reference is free. Free pages are allocated in the order in which they were
    freed, so the least recently used page comes first. A page that is allocated leaves the prefix
    cache.

    >>> pool = PagePool(4)
    >>> pages = pool.allocate(3)
    >>> pages, pool.num_free
    ([0, 1, 2], 1)
    >>> pool.allocate(2) is None  # all or nothing
    True
    >>> pool.publish(pages[0], b"hash")
    >>> pool.release(pages)
    >>> pool.take(pool.find([b"hash"]), 1)  # a page that was found, and a new one
    [0, 3]
    """

    def __init__(self, num_pages: int) -> None:
        self._references = [0] * num_pages
        self.reset()

    def reset(self) -> None:
        """Frees every page and empties the prefix cache, whatever state they are in."""
        num_pages = len(self._references)
        self._free = collections.OrderedDict.fromkeys(range(num_pages))
        self._references = [0] * num_pages
        self.forget_all()

    @property
    def num_pages(self) -> int:
        """The number of pages, free or not."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """The number of pages without a reference; the prefix cache may still find some of them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """The number of page contents that can be found. Multiple pages may hold the same one."""
        return len(self._pages_of)

    def references(self, page_id: int) -> int:
        """The number of references to a page."""
        return self._references[page_id]

    def allocate(self, num_pages: int) -> list[int] | None:
        """Takes `num_pages` free pages, with one reference each.

        Returns None, and takes nothing, if fewer are free.
        """
        if num_pages > len(self._free):
            return None
        page_ids = [self._free.popitem(last=False)[0] for _ in range(num_pages)]
        for page_id in page_ids:
            self._references[page_id] = 1
            self._forget(page_id)
        return page_ids

    def release(self, page_ids: Sequence[int]) -> None:
        """Removes one reference from each page.

        The last pages of a request are freed first, so that its first pages, which other requests
        are more likely to share, are allocated again last.

        Raises:
          ValueError: one of the pages is free; nothing is changed then.
        """
        self._check_held(page_ids)
        for page_id in reversed(page_ids):
            self._references[page_id] -= 1
            if self._references[page_id] == 0:
                self._free[page_id] = None

    def publish(self, page_id: int, digest: bytes) -> None:
        """Lets `find` find a page by the hash of its content, which must not change from now on.

        Where multiple pages hold the same content, the one that was published first is found.

        Raises:
          ValueError: the page is free.
        """
        if not (0 <= page_id < self.num_pages and self._references[page_id]):
            self._check_held([page_id])  # says what is wrong
        if self._hash_of[page_id] != digest:
            self._forget(page_id)
            self._hash_of[page_id] = digest
            self._pages_of.setdefault(digest, {})[page_id] = None

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest prefix of the hashes that is cached; takes no reference."""
        page_ids = []
        for digest in digests:
            pages = self._pages_of.get(digest)
            if pages is None:
                break
            page_ids.append(next(iter(pages)))
        return page_ids

    def can_take(self, found: Sequence[int], num_new: int) -> bool:
        """Whether enough pages are free for `take`."""
        return num_new + sum(self._references[i] == 0 for i in found) <= len(self._free)

    def take(self, found: Sequence[int], num_new: int) -> list[int] | None:
        """Takes one reference to each page that `find` has found, and `num_new` new pages.

        Returns None, and takes nothing, if too few pages are free.
        """
        if not self.can_take(found, num_new):
            return None
        for page_id in found:  # before the new pages, or one of these could be allocated
            if self._references[page_id] == 0:
                del self._free[page_id]
            self._references[page_id] += 1
        return [*found, *(self.allocate(num_new) or ())]

    def forget_all(self) -> None:
        """Empties the prefix cache, because the contents of the pages are lost."""
        self._hash_of: list[bytes | None] = [None] * self.num_pages
        # hash -> the pages with this content, as keys, in the order of their publication.
        self._pages_of: dict[bytes, dict[int, None]] = {}

    def _forget(self, page_id: int) -> None:
        digest, self._hash_of[page_id] = self._hash_of[page_id], None
        if digest is not None:
            pages = self._pages_of[digest]
            del pages[page_id]
            if not pages:
                del self._pages_of[digest]

    def _check_held(self, page_ids: Sequence[int]) -> None:
        for page_id, count in collections.Counter(page_ids).items():
            held = self._references[page_id] if 0 <= page_id < self.num_pages else 0
            if held < count:
                raise ValueError(
                    f"PagePool: page {page_id} has {held} references, {count} were named;"
                    " a page must be allocated first, and released once per reference"
                )
