# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Values of what is written or copied: inside the pool and the batch, and every slot once."""

from typing import NamedTuple

import numpy as np

from pallas_paged import checks
from pallas_paged.validation.faults import OP, Fault, count_fault, outside, refuse_first, value_at


class Writes(NamedTuple):
    """What an argument's live entries write: each of them consecutive slots inside one page."""

    argument: str
    entry: np.ndarray  # the index of each entry in the argument
    first: np.ndarray  # its first slot
    length: np.ndarray  # its slots


def check_pages(
    arrays: dict[str, np.ndarray], num_pages: int, page_size: int, num_tokens: int | None
) -> Writes:
    """Refuses ids outside the pool and pages whose tokens leave the batch."""
    ids = arrays["page_ids"]
    refuse_first("page_ids", [outside(ids, num_pages, "page")])
    is_live = ids != -1
    argument = "token_starts" if "token_starts" in arrays else "page_ids"
    starts = arrays.get("token_starts", np.arange(ids.size) * page_size)
    last = "T - page_size" if num_tokens is None else num_tokens - page_size
    is_bad = starts < 0 if num_tokens is None else (starts < 0) | (starts > num_tokens - page_size)
    refuse_first(
        argument,
        [
            Fault(
                is_live & is_bad,
                lambda i: (
                    f"{ids[i]} from token {starts[i]} on at index {i}"
                    if argument == "page_ids"
                    else f"{starts[i]} at index {i}"
                ),
                f"a first token in [0, {last}], so that the page's tokens are in the batch",
                "write what is less than a page with slice_write, or skip it with page id -1",
            )
        ],
    )
    index = np.flatnonzero(is_live)
    return Writes("page_ids", index, ids[index] * page_size, np.full(index.size, page_size))


def check_slices(
    arrays: dict[str, np.ndarray], num_pages: int, page_size: int, num_tokens: int | None
) -> Writes:
    """Refuses slices that leave their page, the pool or the batch."""
    slices, count = arrays["slices"], arrays["num_slices"]
    max_slices = slices.shape[1]
    refuse_first("num_slices", [count_fault(count, max_slices, "columns of slices")])
    first, token, length = slices[:, : count[0]]
    is_live = first != -1

    def got(i: int) -> str:
        return f"(slot {first[i]}, token {token[i]}, length {length[i]}) at index {i}"

    beyond = outside(first, num_pages * page_size, "slot")
    found = [
        beyond._replace(got=got),
        Fault(
            is_live & ((length < 1) | (first % page_size > page_size - length)),
            got,
            f"a length of at least 1 that ends inside the page of {page_size} slots",
            "cut it at the page's end; write_indices does",
        ),
    ]
    is_source = token >= 0
    if num_tokens is not None:
        is_source &= token <= num_tokens - length
    batch = "the batch" if num_tokens is None else f"[0, {num_tokens})"
    found.append(
        Fault(is_live & ~is_source, got, f"tokens inside {batch}", "its source must be in k and v")
    )
    refuse_first("slices", found)
    index = np.flatnonzero(is_live)
    return Writes("slices", index, first[index], length[index])


def check_slots(slots: np.ndarray, num_slots: int) -> Writes:
    """Refuses slots outside the pool."""
    refuse_first("slots", [outside(slots, num_slots, "slot")])
    index = np.flatnonzero(slots != -1)
    return Writes("slots", index, slots[index], np.ones(index.size, np.int64))


def check_written_once(writes: list[Writes], page_size: int) -> None:
    """Refuses the first entry that writes a slot of an earlier one."""
    if not writes:
        return
    index, first, length = (
        np.concatenate([getattr(w, field) for w in writes])
        for field in ("entry", "first", "length")
    )
    order = np.argsort(first, kind="stable")
    is_hit = first[order][1:] < (first + length)[order][:-1]
    if not is_hit.any():
        return
    # An entry lies inside one page. So the search slot by slot is only needed in pages where two
    # entries that are neighbours in slot order overlap.
    pages = np.unique(first[order][1:][is_hit] // page_size)
    entry = np.flatnonzero(np.isin(first // page_size, pages))
    owner = np.repeat(entry, length[entry])
    begins = np.cumsum(length[entry]) - length[entry]
    slot = np.repeat(first[entry] - begins, length[entry]) + np.arange(owner.size)
    order = np.argsort(slot, kind="stable")  # of one slot's owners, the earliest entry first
    owner, slot = owner[order], slot[order]
    is_again = np.append(False, slot[1:] == slot[:-1])
    at = np.flatnonzero(is_again)[owner[is_again].argmin()]
    again = int(owner[at])
    earlier = int(owner[np.searchsorted(slot, slot[at])])
    argument = np.repeat([w.argument for w in writes], [w.entry.size for w in writes])
    page, row = divmod(int(slot[at]), page_size)
    value = page if argument[again] == "page_ids" else first[again]
    checks.require(
        False,
        OP,
        str(argument[again]),
        got=f"{value} at index {index[again]}, slot {slot[at]} (page {page}, row {row}) once more",
        wanted=f"no slot that {argument[earlier]} at index {index[earlier]} writes",
        hint="it is undefined which of two writes stays; keep one, or skip one with -1",
    )


def check_copies(src: np.ndarray, dst: np.ndarray, num_pages: int) -> None:
    """Refuses pages outside the pool, and copies whose result depends on their order."""
    for argument, ids in (("src_ids", src), ("dst_ids", dst)):
        refuse_first(argument, [outside(ids, num_pages, "page")])
    is_live = (src != -1) & (dst != -1)
    index = np.flatnonzero(is_live)
    is_again = np.zeros(dst.size, bool)
    is_again[index] = _is_repeated(dst[index])
    is_read = is_live & np.isin(dst, src[index])
    order = "the order of the copies is undefined"
    found = [
        Fault(is_again, value_at(dst), "no page that an earlier pair writes", order),
        Fault(
            is_read,
            value_at(dst),
            "no page that is also a source",
            f"{order}; use two calls",
        ),
    ]
    refuse_first("dst_ids", found)


def _is_repeated(values: np.ndarray) -> np.ndarray:
    """Which values also stand at an earlier index."""
    is_again = np.ones(values.size, bool)
    is_again[np.unique(values, return_index=True)[1]] = False
    return is_again
