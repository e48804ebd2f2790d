# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Checks of values that only exist at run time: page ids, slots, slices and lengths.

The ops skip an entry that is out of range and leave two entries for one slot undefined, because
they cannot tell a mistake from an intention. `validate` can, on the host and in numpy: in tests,
while debugging, and in the first step of a run.
"""

from typing import Any

import jax
import numpy as np

from pallas_paged import checks, forms, scalars
from pallas_paged.validation import batch, writes
from pallas_paged.validation.faults import OP


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
      kv_pages: [P, page_size, R, C], the pool, or [P, page_size, R / p, p, C]; only its shape is
        read.
      num_tokens: T, the tokens of k and v; `slots` imply it. If it is None and there are no slots,
        it is not checked whether an entry's tokens end inside the batch.
      page_ids: integer[n], for `page_write`.
      token_starts: integer[n]; needs `page_ids`. None means `i * page_size`.
      slices: integer[3, max_slices], for `slice_write`; needs `num_slices`.
      num_slices: integer[1], integer[] or an int; needs `slices`.
      slots: integer[T], for `token_write`.
      src_ids, dst_ids: integer[n], for `copy_pages`; each needs the other.
      page_indices: integer[S, M] or integer[S * M], the page table; needs `kv_lens` and
        `num_seqs`.
      kv_lens: integer[S], tokens of each sequence, the new ones included; needs `num_seqs`.
      cu_q_lens: integer[S + 1], prefix sums of the new tokens; needs `num_seqs`.
      num_seqs: integer[1], integer[] or an int; needs one of the three above. Rows from it on may
        hold anything. So may the table's entries after the end of a sequence, and all those of a
        sequence without new tokens.

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
    kv_pages = forms.pool_in_rows(OP, kv_pages)
    checks.require_pool(OP, kv_pages)
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
    arrays = _in_first_form(arrays)
    _require_forms(arrays)
    num_tokens = _num_tokens(num_tokens, arrays)

    entries = []
    if "page_ids" in arrays:
        entries.append(writes.check_pages(arrays, num_pages, page_size, num_tokens))
    if "slices" in arrays:
        entries.append(writes.check_slices(arrays, num_pages, page_size, num_tokens))
    if "slots" in arrays:
        entries.append(writes.check_slots(arrays["slots"], num_pages * page_size))
    writes.check_written_once(entries, page_size)
    if "src_ids" in arrays:
        writes.check_copies(arrays["src_ids"], arrays["dst_ids"], num_pages)
    if "num_seqs" in arrays:
        batch.check_batch(arrays, num_pages, page_size, num_tokens)


# ---- Forms

# The shapes that an argument may have, first the one that the checks read.
_SHAPES = {
    "slices": ("[3, max_slices]",),
    "num_slices": ("[1]", "[]"),
    "slots": ("[T]",),
    "page_indices": ("[S, M]", "[S * M]"),
    "kv_lens": ("[S]",),
    "cu_q_lens": ("[S + 1]",),
    "num_seqs": ("[1]", "[]"),
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
    """An integer, or integers in an array of the right dimensions, as an array."""
    checks.require(
        not isinstance(x, jax.core.Tracer),
        OP,
        argument,
        got=f"{checks.describe(x)}, traced",
        wanted="values",
        hint="call validate outside jit; kernels stay in bounds for any values",
    )
    shapes = _SHAPES.get(argument, ("[n]",))
    try:
        array = np.asarray(x)
    except (TypeError, ValueError):  # a list of lists of different lengths, random keys
        array = np.empty((), object)
    is_integer = np.issubdtype(array.dtype, np.integer) or (isinstance(x, list) and not array.size)
    checks.require(
        is_integer and array.ndim in [0 if s == "[]" else s.count(",") + 1 for s in shapes],
        OP,
        argument,
        got=checks.describe(x),
        wanted=" or ".join(f"integers{shape}" for shape in shapes),
        hint="pass what the op gets",
    )
    return array


def _in_first_form(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Counts as [1], a page table as [S, M], and all as int64, so that no sum overflows."""
    if "page_indices" in arrays:
        table = forms.table_in_rows(OP, arrays["page_indices"], arrays["kv_lens"].shape[0])
        arrays = arrays | {"page_indices": table}
    return {name: np.atleast_1d(array.astype(np.int64)) for name, array in arrays.items()}


def _require_partners(arrays: dict[str, np.ndarray]) -> None:
    for argument, other in _NEEDS:
        checks.require(
            argument not in arrays or other in arrays,
            OP,
            other,
            got="None",
            wanted=f"an array, because {argument} is given",
            hint=f"{argument} means nothing without {other}",
        )
    checks.require(
        "num_seqs" not in arrays or not {"page_indices", "kv_lens", "cu_q_lens"}.isdisjoint(arrays),
        OP,
        "num_seqs",
        got="given alone",
        wanted="page_indices, kv_lens or cu_q_lens beside it",
        hint="it says how many of their rows are sequences",
    )


def _require_forms(arrays: dict[str, np.ndarray]) -> None:
    """Shapes that must agree with each other."""
    max_seqs = batch.max_seqs(arrays)
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
                OP,
                argument,
                got=f"of shape {list(arrays[argument].shape)}",
                wanted=f"{list(shape)}",
                hint="it must fit the other arguments",
            )


def _num_tokens(num_tokens: int | None, arrays: dict[str, np.ndarray]) -> int | None:
    count = scalars.read_int(num_tokens)
    checks.require(
        num_tokens is None or (count is not None and count >= 0),
        OP,
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
        OP,
        "slots",
        got=f"of shape [{count}]",
        wanted=f"[{num_tokens}], one per token of num_tokens",
        hint="-1 skips a token",
    )
    return count
