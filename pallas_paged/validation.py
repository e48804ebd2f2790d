# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Checks of values that only exist at run time: page ids, slots, slices and lengths.

The ops skip an entry that is out of range and leave two entries for one slot undefined, because
they cannot tell a mistake from an intention. `validate` can, on the host and in numpy: in tests,
while debugging, and in the first step of a run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_paged import checks, scalars

_OP = "validate"


def validate(
    kv_pages: jax.Array,
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
    """Refuses metadata that an op would skip or for which its result would be undefined.

    Pass what one call, or multiple calls on one batch, will get. All that is passed together must
    write every slot at most once: the results of `write_indices` go in as pages and slices, or as
    slots, but not as both. An entry whose id or slot is -1 is meant to be skipped and not checked
    further. The function reads the values, so it waits for device arrays and cannot be traced.

    Args:
      kv_pages: [P, page_size, R, C], the pool; only its shape is read.
      num_tokens: T, the tokens of k and v; `slots` imply it. If it is None and there are no slots,
        it is not checked whether an entry's tokens end inside the batch.
      page_ids: integer[n], for `page_write`.
      token_starts: integer[n]; needs `page_ids`. None means `i * page_size`.
      slices: integer[3, max_slices], for `slice_write`; needs `num_slices`.
      num_slices: integer[1]; needs `slices`.
      slots: integer[T], for `token_write`.
      src_ids, dst_ids: integer[n], for `copy_pages`; each needs the other.
      page_indices: integer[S, M], the page table; needs `kv_lens` and `num_seqs`.
      kv_lens: integer[S], tokens of each sequence, the new ones included; needs `num_seqs`.
      cu_q_lens: integer[S + 1], prefix sums of the new tokens; needs `num_seqs`.
      num_seqs: integer[1]; needs one of the three above. Rows from it on may hold anything. So may
        the table's entries after the end of a sequence, and all those of a sequence without new
        tokens.

    Raises:
      ValueError: one of the following, with the argument, the first index at which it holds, what
        came, what was wanted, and what to do.
        - An argument has the wrong form, or is given without one that it needs.
        - An id or slot lies outside the pool and is not -1.
        - A page or slot is written twice, or a page is both copied from and copied to.
        - A slice is empty or leaves its page, or an entry's tokens leave the batch.
        - `num_slices` or `num_seqs` is more than its array holds.
        - `cu_q_lens` decrease or leave the batch.
        - A length in `kv_lens` is negative, less than the new tokens, or more than the row of the
          table has room for.
        - An entry of the table that is in use lies outside the pool, or has a page for new tokens
          that another entry in use has too, to write it or to read it.

    >>> import numpy as np
    >>> from pallas_paged.layout import make_kv_pages
    >>> pool = make_kv_pages(4, 16, num_kv_heads=1, head_dim=128)
    >>> validate(pool, num_tokens=40, page_ids=np.array([2, -1, 0]), token_starts=[0, 0, 24])
    >>> validate(pool, num_tokens=40, page_ids=np.array([2, 9]))
    Traceback (most recent call last):
      ...
    ValueError: validate: argument `page_ids` is 9 at index 1; wanted -1 or a page in [0, 4): \
use -1 to skip an entry
    """
    checks.require_pool(_OP, kv_pages)
    num_pages, page_size = kv_pages.shape[:2]
    given = {
        "page_ids": page_ids,
        "token_starts": token_starts,
        "slices": slices,
        "num_slices": num_slices,
        "slots": slots,
        "src_ids": src_ids,
        "dst_ids": dst_ids,
        "page_indices": page_indices,
        "kv_lens": kv_lens,
        "cu_q_lens": cu_q_lens,
        "num_seqs": num_seqs,
    }
    arrays = {name: _to_numpy(name, x) for name, x in given.items() if x is not None}
    _require_partners(arrays)
    _require_forms(arrays)
    num_tokens = _num_tokens(num_tokens, arrays)

    writes = []
    if "page_ids" in arrays:
        writes.append(_check_pages(arrays, num_pages, page_size, num_tokens))
    if "slices" in arrays:
        writes.append(_check_slices(arrays, num_pages, page_size, num_tokens))
    if "slots" in arrays:
        writes.append(_check_slots(arrays["slots"], num_pages * page_size))
    _check_written_once(writes, page_size)
    if "src_ids" in arrays:
        _check_copies(arrays["src_ids"], arrays["dst_ids"], num_pages)
    if "num_seqs" in arrays:
        _check_batch(arrays, num_pages, page_size, num_tokens)


# ---- Forms

_SHAPES = {
    "slices": "[3, max_slices]",
    "num_slices": "[1]",
    "slots": "[T]",
    "page_indices": "[S, M]",
    "kv_lens": "[S]",
    "cu_q_lens": "[S + 1]",
    "num_seqs": "[1]",
}
_NEEDS = (
    ("token_starts", "page_ids"),
    ("slices", "num_slices"),
    ("num_slices", "slices"),
    ("src_ids", "dst_ids"),
    ("dst_ids", "src_ids"),
    ("page_indices", "kv_lens"),
    ("page_indices", "num_seqs"),
    ("kv_lens", "num_seqs"),
    ("cu_q_lens", "num_seqs"),
)


def _to_numpy(argument: str, x: Any) -> np.ndarray:
    """An integer array of the right dimensions as int64, so that no sum below overflows."""
    checks.require(
        not isinstance(x, jax.core.Tracer),
        _OP,
        argument,
        got=f"{checks.describe(x)}, traced",
        wanted="values",
        hint="call validate outside jit; kernels stay in bounds for any values",
    )
    shape = _SHAPES.get(argument, "[n]")
    try:
        array = np.asarray(x)
    except (TypeError, ValueError):  # a list of lists of different lengths, random keys
        array = np.empty((), object)
    is_integer = np.issubdtype(array.dtype, np.integer) or (isinstance(x, list) and not array.size)
    checks.require(
        is_integer and array.ndim == len(shape.split(",")),
        _OP,
        argument,
        got=checks.describe(x),
        wanted=f"integers{shape}",
        hint="pass what the op gets",
    )
    return array.astype(np.int64)


def _require_partners(arrays: dict[str, np.ndarray]) -> None:
    for argument, other in _NEEDS:
        checks.require(
            argument not in arrays or other in arrays,
            _OP,
            other,
            got="None",
            wanted=f"an array, because {argument} is given",
            hint=f"{argument} means nothing without {other}",
        )
    checks.require(
        "num_seqs" not in arrays or not {"page_indices", "kv_lens", "cu_q_lens"}.isdisjoint(arrays),
        _OP,
        "num_seqs",
        got="given alone",
        wanted="page_indices, kv_lens or cu_q_lens beside it",
        hint="it says how many of their rows are sequences",
    )


def _require_forms(arrays: dict[str, np.ndarray]) -> None:
    """Shapes that must agree with each other."""
    max_seqs = _max_seqs(arrays)
    wanted: dict[str, tuple[int, ...]] = {
        "num_slices": (1,),
        "num_seqs": (1,),
        "kv_lens": (max_seqs,),
        "cu_q_lens": (max_seqs + 1,),
    }
    if "slices" in arrays:
        wanted["slices"] = (3, arrays["slices"].shape[1])
    if "token_starts" in arrays:
        wanted["token_starts"] = arrays["page_ids"].shape
    if "dst_ids" in arrays:
        wanted["dst_ids"] = arrays["src_ids"].shape
    for argument, shape in wanted.items():
        if argument in arrays:
            checks.require(
                arrays[argument].shape == shape,
                _OP,
                argument,
                got=f"of shape {list(arrays[argument].shape)}",
                wanted=f"{list(shape)}",
                hint="it must fit the other arguments",
            )


def _max_seqs(arrays: dict[str, np.ndarray]) -> int:
    """S, of the first argument that has it; 0 where none does."""
    for argument in ("page_indices", "kv_lens"):
        if argument in arrays:
            return arrays[argument].shape[0]
    return max(0, arrays["cu_q_lens"].shape[0] - 1) if "cu_q_lens" in arrays else 0


def _num_tokens(num_tokens: int | None, arrays: dict[str, np.ndarray]) -> int | None:
    count = scalars.read_int(num_tokens)
    checks.require(
        num_tokens is None or (count is not None and count >= 0),
        _OP,
        "num_tokens",
        got=scalars.show(num_tokens),
        wanted="None or an integer >= 0",
        hint="it is T, the leading dimension of k and v",
    )
    num_tokens = count
    if "slots" not in arrays:
        return num_tokens
    count = arrays["slots"].shape[0]
    checks.require(
        num_tokens in (None, count),
        _OP,
        "slots",
        got=f"of shape [{count}]",
        wanted=f"[{num_tokens}], one per token of num_tokens",
        hint="-1 skips a token",
    )
    return count


# ---- Values


class _Fault(NamedTuple):
    """One way in which values can be wrong: at which indices, and the words for an index."""

    is_bad: np.ndarray
    got: Callable[[int], str]
    wanted: str
    hint: str


def _refuse_first(argument: str, faults: Sequence[_Fault]) -> None:
    """Raises the error of the first index at which any of the faults holds."""
    bad = np.flatnonzero(np.stack([fault.is_bad for fault in faults]).any(axis=0))
    if not bad.size:
        return
    index = int(bad[0])
    fault = next(f for f in faults if f.is_bad[index])
    checks.require(False, _OP, argument, got=fault.got(index), wanted=fault.wanted, hint=fault.hint)


def _value_at(array: np.ndarray) -> Callable[[int], str]:
    return lambda i: f"{array[i]} at index {i}"


def _outside(ids: np.ndarray, size: int, what: str) -> _Fault:
    return _Fault(
        (ids != -1) & ((ids < 0) | (ids >= size)),
        _value_at(ids),
        f"-1 or a {what} in [0, {size})",
        "use -1 to skip an entry",
    )


class _Writes(NamedTuple):
    """What an argument's live entries write: each of them consecutive slots inside one page."""

    argument: str
    entry: np.ndarray  # the index of each entry in the argument
    first: np.ndarray  # its first slot
    length: np.ndarray  # its slots


def _check_pages(
    arrays: dict[str, np.ndarray], num_pages: int, page_size: int, num_tokens: int | None
) -> _Writes:
    ids = arrays["page_ids"]
    _refuse_first("page_ids", [_outside(ids, num_pages, "page")])
    is_live = ids != -1
    argument = "token_starts" if "token_starts" in arrays else "page_ids"
    starts = arrays.get("token_starts", np.arange(ids.size) * page_size)
    last = "T - page_size" if num_tokens is None else num_tokens - page_size
    is_bad = starts < 0 if num_tokens is None else (starts < 0) | (starts > num_tokens - page_size)
    _refuse_first(
        argument,
        [
            _Fault(
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
    return _Writes("page_ids", index, ids[index] * page_size, np.full(index.size, page_size))


def _check_slices(
    arrays: dict[str, np.ndarray], num_pages: int, page_size: int, num_tokens: int | None
) -> _Writes:
    slices, count = arrays["slices"], arrays["num_slices"]
    max_slices = slices.shape[1]
    _refuse_first("num_slices", [_count_fault(count, max_slices, "columns of slices")])
    first, token, length = slices[:, : count[0]]
    is_live = first != -1

    def got(i: int) -> str:
        return f"(slot {first[i]}, token {token[i]}, length {length[i]}) at index {i}"

    outside = _outside(first, num_pages * page_size, "slot")
    faults = [
        outside._replace(got=got),
        _Fault(
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
    faults.append(
        _Fault(is_live & ~is_source, got, f"tokens inside {batch}", "its source must be in k and v")
    )
    _refuse_first("slices", faults)
    index = np.flatnonzero(is_live)
    return _Writes("slices", index, first[index], length[index])


def _check_slots(slots: np.ndarray, num_slots: int) -> _Writes:
    _refuse_first("slots", [_outside(slots, num_slots, "slot")])
    index = np.flatnonzero(slots != -1)
    return _Writes("slots", index, slots[index], np.ones(index.size, np.int64))


def _count_fault(count: np.ndarray, most: int, what: str) -> _Fault:
    return _Fault(
        (count < 0) | (count > most),
        lambda i: f"{count[i]}",
        f"a count in [0, {most}]",
        f"there are {most} {what}",
    )


def _check_written_once(writes: list[_Writes], page_size: int) -> None:
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
        _OP,
        str(argument[again]),
        got=f"{value} at index {index[again]}, slot {slot[at]} (page {page}, row {row}) once more",
        wanted=f"no slot that {argument[earlier]} at index {index[earlier]} writes",
        hint="it is undefined which of two writes stays; keep one, or skip one with -1",
    )


def _check_copies(src: np.ndarray, dst: np.ndarray, num_pages: int) -> None:
    for argument, ids in (("src_ids", src), ("dst_ids", dst)):
        _refuse_first(argument, [_outside(ids, num_pages, "page")])
    is_live = (src != -1) & (dst != -1)
    index = np.flatnonzero(is_live)
    is_again = np.zeros(dst.size, bool)
    is_again[index] = _is_repeated(dst[index])
    is_read = is_live & np.isin(dst, src[index])
    order = "the order of the copies is undefined"
    faults = [
        _Fault(is_again, _value_at(dst), "no page that an earlier pair writes", order),
        _Fault(is_read, _value_at(dst), "no page that is also a source", f"{order}; use two calls"),
    ]
    _refuse_first("dst_ids", faults)


def _is_repeated(values: np.ndarray) -> np.ndarray:
    """Which values also stand at an earlier index."""
    is_again = np.ones(values.size, bool)
    is_again[np.unique(values, return_index=True)[1]] = False
    return is_again


def _check_batch(
    arrays: dict[str, np.ndarray], num_pages: int, page_size: int, num_tokens: int | None
) -> None:
    max_seqs = _max_seqs(arrays)
    _refuse_first("num_seqs", [_count_fault(arrays["num_seqs"], max_seqs, "rows")])
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
    got = _value_at(cu_q_lens)
    before = np.append(cu_q_lens[:1], cu_q_lens[:-1])
    faults = [_Fault(cu_q_lens < 0, got, "at least 0", "prefix sums of the new tokens, from 0")]
    if num_tokens is not None:
        hint = "k and v must hold every new token"
        faults.append(
            _Fault(cu_q_lens > num_tokens, got, f"at most num_tokens, {num_tokens}", hint)
        )
    faults.append(
        _Fault(
            cu_q_lens < before,
            lambda i: f"{cu_q_lens[i]} at index {i}, after {cu_q_lens[i - 1]}",
            "no less than the one before",
            "prefix sums of the new tokens do not decrease",
        )
    )
    _refuse_first("cu_q_lens", faults)


def _check_lengths(kv_lens: np.ndarray, q_len: np.ndarray | None, most: int | None) -> None:
    got = _value_at(kv_lens)
    faults = [_Fault(kv_lens < 0, got, "at least 0", "a length counts all of a sequence's tokens")]
    if most is not None:
        hint = "widen the page table"
        faults.append(_Fault(kv_lens > most, got, f"at most M * page_size, {most}", hint))
    if q_len is not None:
        faults.append(
            _Fault(
                kv_lens < q_len,
                lambda i: f"{kv_lens[i]} at index {i}, whose new tokens are {q_len[i]}",
                "at least the new tokens",
                "kv_lens counts the new tokens too",
            )
        )
    _refuse_first("kv_lens", faults)


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

    faults = [
        _Fault(
            (is_used & ((table < 0) | (table >= num_pages))).reshape(-1),
            got,
            f"a page in [0, {num_pages})",
            "every page up to a sequence's kv_len must be in the pool",
        ),
        _Fault(
            conflict < np.arange(table.size),
            lambda i: f"{table.flat[i]} at {use(i)}, and at {use(conflict[i])}",
            "a page of its own for every sequence's new tokens",
            "share a page only after the call that writes it; copy a shared page before writing it "
            "(copy_pages)",
        ),
    ]
    _refuse_first("page_indices", faults)


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
