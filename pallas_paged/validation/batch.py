# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Values of a batch's lengths and page table."""

import numpy as np

from pallas_paged.validation.faults import Fault, count_fault, refuse_first, value_at


def max_seqs(arrays: dict[str, np.ndarray]) -> int:
    """S, of the first argument that has it; 0 where none does."""
    for argument in ("page_indices", "kv_lens"):
        if argument in arrays:
            return arrays[argument].shape[0]
    return max(0, arrays["cu_q_lens"].shape[0] - 1) if "cu_q_lens" in arrays else 0


def check_batch(
    arrays: dict[str, np.ndarray], num_pages: int, page_size: int, num_tokens: int | None
) -> None:
    """Refuses lengths and pages that do not belong to a batch of this pool."""
    refuse_first("num_seqs", [count_fault(arrays["num_seqs"], max_seqs(arrays), "rows")])
    num_seqs = int(arrays["num_seqs"][0])
    q_len = None
    if "cu_q_lens" in arrays:
        cu_q_lens = arrays["cu_q_lens"][: num_seqs + 1]
        _check_ends(cu_q_lens, num_tokens)
        q_len = np.diff(cu_q_lens)
    if "kv_lens" not in arrays:
        return
    kv_lens = arrays["kv_lens"][:num_seqs]
    table = arrays["page_indices"][:num_seqs] if "page_indices" in arrays else None
    _check_lengths(kv_lens, q_len, None if table is None else table.shape[1] * page_size)
    if table is not None:
        _check_table(table, kv_lens, q_len, num_pages, page_size)


def _check_ends(cu_q_lens: np.ndarray, num_tokens: int | None) -> None:
    got = value_at(cu_q_lens)
    before = np.append(cu_q_lens[:1], cu_q_lens[:-1])
    found = [Fault(cu_q_lens < 0, got, "at least 0", "prefix sums of the new tokens, from 0")]
    if num_tokens is not None:
        hint = "k and v must hold every new token"
        found.append(Fault(cu_q_lens > num_tokens, got, f"at most num_tokens, {num_tokens}", hint))
    found.append(
        Fault(
            cu_q_lens < before,
            lambda i: f"{cu_q_lens[i]} at index {i}, after {cu_q_lens[i - 1]}",
            "no less than the one before",
            "prefix sums of the new tokens do not decrease",
        )
    )
    refuse_first("cu_q_lens", found)


def _check_lengths(kv_lens: np.ndarray, q_len: np.ndarray | None, most: int | None) -> None:
    got = value_at(kv_lens)
    found = [Fault(kv_lens < 0, got, "at least 0", "a length counts all of a sequence's tokens")]
    if most is not None:
        hint = "widen the page table"
        found.append(Fault(kv_lens > most, got, f"at most M * page_size, {most}", hint))
    if q_len is not None:
        found.append(
            Fault(
                kv_lens < q_len,
                lambda i: f"{kv_lens[i]} at index {i}, whose new tokens are {q_len[i]}",
                "at least the new tokens",
                "kv_lens counts the new tokens too",
            )
        )
    refuse_first("kv_lens", found)


def _check_table(
    table: np.ndarray,
    kv_lens: np.ndarray,
    q_len: np.ndarray | None,
    num_pages: int,
    page_size: int,
) -> None:
    """Refuses entries in use outside the pool, and pages for new tokens that are in use elsewhere.

    A sequence without new tokens has no queries, so it reads nothing and none of its entries is in
    use.
    """
    column = np.arange(table.shape[1])
    is_used = column < -(-kv_lens // page_size)[:, None]  # [num_seqs, M]
    is_new = np.zeros_like(is_used)
    if q_len is not None:
        is_used &= (q_len > 0)[:, None]
        is_new = is_used & (column >= ((kv_lens - q_len) // page_size)[:, None])
    conflict = _first_conflicts(table, is_used, is_new)

    def got(i: int) -> str:
        return f"{table.flat[i]} at index {divmod(i, table.shape[1])}"

    def use(i: int) -> str:
        row, column = divmod(int(i), table.shape[1])
        verb = "writes" if is_new[row, column] else "reads"
        return f"index {row, column}, where sequence {row} {verb}"

    found = [
        Fault(
            (is_used & ((table < 0) | (table >= num_pages))).reshape(-1),
            got,
            f"a page in [0, {num_pages})",
            "every page up to a sequence's kv_len must be in the pool",
        ),
        Fault(
            conflict < np.arange(table.size),
            lambda i: f"{table.flat[i]} at {use(i)}, and at {use(conflict[i])}",
            "a page of its own for every sequence's new tokens",
            "share a page only after the call that writes it; copy a shared page before writing it "
            "(copy_pages)",
        ),
    ]
    refuse_first("page_indices", found)


def _first_conflicts(table: np.ndarray, is_used: np.ndarray, is_new: np.ndarray) -> np.ndarray:
    """For each entry the flat index of the first one that cannot share its page, [table.size].

    That is the first use of the page if the entry writes it, and the first write of the page if the
    entry only reads it. Only an index before the entry itself is a conflict, so `table.size` stands
    for none.
    """
    used = np.flatnonzero(is_used)
    writes = is_new.flat[used]
    # Sorted, not looked up in an array of the pool's size: a pool may be far larger than a batch.
    pages, first, page = np.unique(table.flat[used], return_index=True, return_inverse=True)
    first_write = np.full(pages.size, table.size)
    np.minimum.at(first_write, page[writes], used[writes])
    conflict = np.full(table.size, table.size)
    conflict[used] = np.where(writes, used[first][page], first_write[page])
    return conflict
