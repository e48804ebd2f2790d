# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Checks on the host of what only exists at run time: ids, slots, slices, lengths."""

from typing import Any

import numpy as np

_OP = "validate"


def validate(
    kv_pages: Any,
    *,
    num_tokens: int | None = None,
    page_ids: Any = None,
    token_starts: Any = None,
    slices: Any = None,
    num_slices: Any = None,
    slots: Any = None,
    src_ids: Any = None,
    dst_ids: Any = None,
    page_indices: Any = None,
    kv_lens: Any = None,
    cu_q_lens: Any = None,
    num_seqs: Any = None,
) -> None:
    """Raises at the first value that an op would skip, or that it would leave undefined.

    The ops themselves skip what is out of range and never say so; this is for tests and for
    finding out why a cache misses something. It copies its arguments to the host. What is given
    together is one step: no slot may be written twice by any of it.

    Args:
      kv_pages: [P, page_size, R, C]; only its shape is read.
      num_tokens: T, the tokens of the packed batch; sources are checked where it is given.
      page_ids, token_starts: as in `page_write`; -1 is a skipped entry.
      slices, num_slices: as in `slice_write`.
      slots: as in `token_write`; -1 is a skipped token.
      src_ids, dst_ids: as in `copy_pages`.
      page_indices, kv_lens, cu_q_lens, num_seqs: as in `write_indices`.

    Raises:
      ValueError: names the argument, the first index that is wrong, what came and what was wanted.

    >>> from pallas_paged import make_kv_pages, validate
    >>> pool = make_kv_pages(4, 2, num_kv_heads=1, head_dim=128)
    >>> validate(pool, page_ids=np.array([3, -1, 0]))
    >>> validate(pool, page_ids=np.array([3, 4]))
    Traceback (most recent call last):
      ...
    ValueError: validate: argument `page_ids` is 4 at index 1; wanted -1 or a page in [0, 4)
    """
    num_pages, page_size = kv_pages.shape[:2]
    num_slots = num_pages * page_size
    for names in (
        {"token_starts": token_starts, "page_ids": page_ids},
        {"num_slices": num_slices, "slices": slices},
        {"slices": slices, "num_slices": num_slices},
        {"src_ids": src_ids, "dst_ids": dst_ids},
        {"dst_ids": dst_ids, "src_ids": src_ids},
    ):
        (name, given), (other_name, other) = names.items()
        if given is not None and other is None:
            raise ValueError(
                f"{_OP}: argument `{other_name}` is missing; wanted with `{name}`: pass both"
            )

    written: list[tuple[str, np.ndarray, np.ndarray]] = []  # argument, slots, entry of each
    if page_ids is not None:
        ids = _flat("page_ids", page_ids)
        wanted = f"-1 or a page in [0, {num_pages})"
        _refuse("page_ids", ids, (ids < -1) | (ids >= num_pages), wanted)
        live = np.flatnonzero(ids >= 0)
        if num_tokens is not None or token_starts is not None:
            _check_starts(ids, token_starts, page_size, num_tokens)
        written.append(("page_ids", *_runs(ids[live] * page_size, page_size, live)))
    if slices is not None:
        runs = _check_slices(slices, num_slices, num_slots, page_size, num_tokens)
        written.append(("slices", *runs))
    if slots is not None:
        array = _flat("slots", slots)
        wanted = f"-1 or a slot in [0, {num_slots})"
        _refuse("slots", array, (array < -1) | (array >= num_slots), wanted)
        live = np.flatnonzero(array >= 0)
        written.append(("slots", array[live], live))
    _check_written_once(written)
    if src_ids is not None:
        _check_copies(_flat("src_ids", src_ids), _flat("dst_ids", dst_ids), num_pages)
    _check_batch(page_indices, kv_lens, cu_q_lens, num_seqs, num_pages, page_size, num_tokens)


def _flat(name: str, array: Any, ndim: int = 1) -> np.ndarray:
    """The array as int64 on the host, so that no sum here overflows."""
    array = np.asarray(array)
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{_OP}: argument `{name}` is {array.dtype}{list(array.shape)}; "
            f"wanted integers of {ndim} dimension{'s' * (ndim > 1)}"
        )
    return array.astype(np.int64)


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, wanted: str) -> None:
    """Raises for the first value that is wrong."""
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"{_OP}: argument `{name}` is {values[i]} at index {i}; wanted {wanted}")


def _runs(first: np.ndarray, length: Any, entry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All slots of runs that begin at `first`, and the entry that each belongs to."""
    length = np.broadcast_to(length, first.shape)
    starts = np.repeat(first, length)
    offset = np.arange(starts.size) - np.repeat(np.cumsum(length) - length, length)
    return starts + offset, np.repeat(entry, length)


def _check_starts(ids, token_starts, page_size, num_tokens) -> None:
    if token_starts is None:
        starts = np.arange(ids.size) * page_size
        name = "page_ids"  # what is wrong then is that there are too many
    else:
        starts, name = _flat("token_starts", token_starts), "token_starts"
        if starts.shape != ids.shape:
            raise ValueError(
                f"{_OP}: argument `token_starts` has {starts.size} entries; wanted {ids.size}, as "
                "page_ids"
            )
    last = (num_tokens if num_tokens is not None else 2**31) - page_size
    wrong = (ids >= 0) & ((starts < 0) | (starts > last))
    _refuse(name, starts, wrong, f"a first token in [0, {last}], so that its page is in the batch")


def _check_slices(slices, num_slices, num_slots, page_size, num_tokens):
    """The slots that the slices write, and the slice of each."""
    table = _flat("slices", slices, ndim=2)
    if table.shape[0] != 3:
        raise ValueError(f"{_OP}: argument `slices` has {table.shape[0]} rows; wanted 3")
    count = _flat("num_slices", np.reshape(num_slices, -1))
    if count.size != 1 or not 0 <= count[0] <= table.shape[1]:
        raise ValueError(
            f"{_OP}: argument `num_slices` is {count.tolist()}; wanted one number in "
            f"[0, {table.shape[1]}]"
        )
    slot, token, length = table[:, : count[0]]
    _refuse("slices[2]", length, length < 1, "a length of at least 1")
    _refuse("slices[0]", slot, (slot < 0) | (slot >= num_slots), f"a slot in [0, {num_slots})")
    room = page_size - slot % page_size
    _refuse("slices[2]", length, length > room, "a length that stays inside the slot's page")
    _refuse("slices[1]", token, token < 0, "a token of the batch")
    if num_tokens is not None:
        wrong = token + length > num_tokens
        _refuse("slices[1]", token, wrong, f"a run that ends by token {num_tokens}")
    return _runs(slot, length, np.arange(slot.size))


def _check_written_once(written) -> None:
    """No slot twice, within an argument or between two."""
    if not written:
        return
    slots = np.concatenate([s for _, s, _ in written])
    order = np.argsort(slots, kind="stable")
    again = order[1:][slots[order][1:] == slots[order][:-1]]
    if not again.size:
        return
    place = int(again.min())
    for name, mine, entry in written:
        if place < mine.size:
            raise ValueError(
                f"{_OP}: argument `{name}` writes slot {mine[place]} again at index "
                f"{entry[place]}; wanted every slot written once: either write may win"
            )
        place -= mine.size


def _check_copies(src, dst, num_pages) -> None:
    for name, ids in (("src_ids", src), ("dst_ids", dst)):
        _refuse(name, ids, (ids < -1) | (ids >= num_pages), f"-1 or a page in [0, {num_pages})")
    if src.shape != dst.shape:
        raise ValueError(
            f"{_OP}: argument `dst_ids` has {dst.size} entries; wanted {src.size}, as src_ids"
        )
    live = (src >= 0) & (dst >= 0)
    _, first = np.unique(dst, return_index=True)
    again = np.ones(dst.shape, bool)
    again[first] = False
    repeated = live & np.isin(dst, dst[live & again]) & again
    _refuse("dst_ids", dst, repeated, "every page written once")
    wrong = live & np.isin(dst, src[live])
    _refuse("dst_ids", dst, wrong, "a page that is not read in the same call")


def _check_batch(
    page_indices, kv_lens, cu_q_lens, num_seqs, num_pages, page_size, num_tokens
) -> None:
    """The batch that write_indices and the attention take, as far as it is given."""
    table = None if page_indices is None else _flat("page_indices", page_indices, ndim=2)
    lens = None if kv_lens is None else _flat("kv_lens", kv_lens)
    cu = None if cu_q_lens is None else _flat("cu_q_lens", cu_q_lens)
    sizes = [x.shape[0] for x in (table, lens) if x is not None]
    sizes += [] if cu is None else [cu.size - 1]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{_OP}: arguments `page_indices`, `kv_lens`, `cu_q_lens` are of {sizes} sequences; "
            "wanted one S for all, and S + 1 entries in cu_q_lens"
        )
    if not sizes:
        return
    count = sizes[0]
    if num_seqs is not None:
        given = _flat("num_seqs", np.reshape(num_seqs, -1))
        if given.size != 1 or not 0 <= given[0] <= count:
            raise ValueError(
                f"{_OP}: argument `num_seqs` is {given.tolist()}; wanted one number in [0, {count}]"
            )
        count = int(given[0])
    q_len = np.zeros(count, np.int64)
    if cu is not None:
        cu = cu[: count + 1]
        end = 2**31 - 1 if num_tokens is None else num_tokens
        _refuse("cu_q_lens", cu, (cu < 0) | (cu > end), f"a prefix sum in [0, {end}]")
        _refuse("cu_q_lens", cu, np.diff(cu, prepend=0) < 0, "prefix sums that do not fall")
        q_len = np.diff(cu)
    if lens is None:
        return
    lens = lens[:count]
    _refuse("kv_lens", lens, lens < q_len, "a length that counts the sequence's new tokens")
    _refuse("kv_lens", lens, lens < 0, "a length of at least 0")
    if table is None:
        return
    width = table.shape[1]
    _refuse("kv_lens", lens, lens > width * page_size, f"at most {width} pages of {page_size}")
    needed = np.arange(width) < -(-lens[:, None] // page_size)  # [S, M]
    table = table[:count]
    wrong = needed & ((table < 0) | (table >= num_pages))
    if wrong.any():
        s, m = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{_OP}: argument `page_indices` is {table[s, m]} at index [{s}, {m}]; wanted a page "
            f"in [0, {num_pages}), because the sequence has {lens[s]} tokens"
        )
    first_new = (lens - q_len)[:, None] // page_size
    is_written = needed & (np.arange(width) >= first_new) & (q_len > 0)[:, None]
    where = np.argwhere(is_written)
    pages = table[is_written]
    _, first = np.unique(pages, return_index=True)
    again = np.setdiff1d(np.arange(pages.size), first)
    if again.size:
        s, m = (int(i) for i in where[again.min()])
        raise ValueError(
            f"{_OP}: argument `page_indices` is {table[s, m]} at index [{s}, {m}]; wanted a page "
            "that no other place in the batch writes"
        )
    read = needed & ~is_written & np.isin(table, pages)
    if read.any():
        s, m = (int(i) for i in np.argwhere(read)[0])
        raise ValueError(
            f"{_OP}: argument `page_indices` is {table[s, m]} at index [{s}, {m}]; wanted a page "
            "that no other sequence writes in the same call"
        )
