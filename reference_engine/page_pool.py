# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which pages are free, how many requests hold each of the others, and what full ones hold.

Pure Python. The prefix cache is a property of pages: a full page that was published is known by a
hash of all tokens up to its end, also while it is free, until it is handed out anew.
"""

from __future__ import annotations

import array
import collections
import hashlib
from collections.abc import Iterable, Sequence


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full page: of its tokens and, through its parent's hash, of all before them.

    >>> first = page_hash(b"", (1, 2))
    >>> page_hash(first, (3, 4)) == page_hash(b"", (3, 4))
    False
    """
    return hashlib.blake2b(parent + array.array("q", token_ids).tobytes(), digest_size=16).digest()


class PagePool:
    """Free list, reference counts and prefix cache of `num_pages` pages.

    A page is free when nobody refers to it. Pages are handed out in the order in which they were
    freed, the least recently used first; what the prefix cache knows of a page ends there.

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

    def __init__(self, num_pages: int):
        self._references = [0] * num_pages
        self.reset()

    def reset(self) -> None:
        """Frees every page and empties the prefix cache, in whatever state they were."""
        num_pages = len(self._references)
        self._free = collections.OrderedDict.fromkeys(range(num_pages))
        self._references = [0] * num_pages
        self.forget_all()

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, those with a known content included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Contents that can be found; several pages may hold the same."""
        return len(self._pages_of)

    def references(self, page_id: int) -> int:
        """How many holders page `page_id` has."""
        return self._references[page_id]

    def allocate(self, num_pages: int) -> list[int] | None:
        """Takes `num_pages` free pages, one reference each; None, and nothing taken, if too few."""
        if num_pages > len(self._free):
            return None
        page_ids = [self._free.popitem(last=False)[0] for _ in range(num_pages)]
        for page_id in page_ids:
            self._references[page_id] = 1
            self._forget(page_id)
        return page_ids

    def release(self, page_ids: Sequence[int]) -> None:
        """Takes one reference from each page; ValueError, and no change, if one of them is free.

        The last pages of a request are freed first, so that its front, which other requests are
        likelier to share, is reused last.
        """
        self._check_held(page_ids)
        for page_id in reversed(page_ids):
            self._references[page_id] -= 1
            if self._references[page_id] == 0:
                self._free[page_id] = None

    def publish(self, page_id: int, digest: bytes) -> None:
        """Lets `find` find a held page by the hash of its content, which must not change again.

        Where several pages hold the same, the first one that is left is found.
        """
        self._check_held([page_id])
        if self._hash_of[page_id] != digest:
            self._forget(page_id)
            self._hash_of[page_id] = digest
            self._pages_of.setdefault(digest, {})[page_id] = None

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest known front of a chain of hashes; takes no reference."""
        page_ids = []
        for digest in digests:
            pages = self._pages_of.get(digest)
            if pages is None:
                break
            page_ids.append(next(iter(pages)))
        return page_ids

    def can_take(self, found: Sequence[int], num_new: int) -> bool:
        """Whether `take` would."""
        return num_new + sum(self._references[i] == 0 for i in found) <= len(self._free)

    def take(self, found: Sequence[int], num_new: int) -> list[int] | None:
        """One reference to each page that `find` found, held or free, and `num_new` new pages.

        None, and nothing taken, if too few are free.
        """
        if not self.can_take(found, num_new):
            return None
        for page_id in found:  # before anything is allocated, which could hand them out
            if self._references[page_id] == 0:
                del self._free[page_id]
            self._references[page_id] += 1
        return [*found, *(self.allocate(num_new) or ())]

    def forget_all(self) -> None:
        """Empties the prefix cache: the pages' contents are lost."""
        self._hash_of: list[bytes | None] = [None] * self.num_pages
        # The pages of a content in the order in which they were published, as keys.
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
                    f"PagePool: page {page_id} has {held} references, {count} were named; a page"
                    " must be allocated first and released once per reference"
                )
