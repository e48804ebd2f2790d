# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Other forms in which callers hold a pool and a batch's metadata. They are taken as they are.

Other TPU projects keep a pool as `[P, page_size, R / p, p, C]`, with the p rows that share a
32-bit word in a dimension of their own. Their page table may be flat, and a count a scalar.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged import checks, layout, scalars


def pool_in_rows(op: str, kv_pages: Any) -> Any:
    """The pool as checks and plans read it: `[P, page_size, R, C]`.

    A pool of four dimensions is returned as it is. Of one of five only the shape and the dtype are
    returned, because a reshape outside of a jit would copy it; `merge_rows` makes the array.
    """
    if not scalars.is_array(kv_pages) or kv_pages.ndim != 5:
        return kv_pages
    per_word = max(1, 4 // kv_pages.dtype.itemsize)
    *page, num_words, num_packed, num_lanes = kv_pages.shape
    checks.require(
        num_packed == per_word,
        op,
        "kv_pages",
        got=checks.describe(kv_pages),
        wanted=f"[P, page_size, R, C], or [P, page_size, R / {per_word}, {per_word}, C] of "
        f"{kv_pages.dtype}",
        hint="a stack of layers is one flat pool of L*P pages",
    )
    return jax.ShapeDtypeStruct((*page, num_words * num_packed, num_lanes), kv_pages.dtype)


def require_rows(op: str, kv_pages: Any, num_kv_heads: int, head_dim: int) -> None:
    """Refuses a pool of five dimensions that has other rows than those of its heads.

    A stack of layers, `[L, P, page_size, R, C]`, may look like such a pool, but its R does not fit.
    """
    if kv_pages.ndim != 5:
        return
    per_word = kv_pages.shape[3]
    num_rows = kv_pages.shape[2] * per_word
    used = layout.num_rows_used(num_kv_heads, head_dim)
    rows = layout.round_up(used, per_word), layout.num_rows(num_kv_heads, head_dim, kv_pages.dtype)
    checks.require(
        num_rows in rows,
        op,
        "kv_pages",
        got=f"{checks.describe(kv_pages)}, R = {num_rows} rows",
        wanted=f"R = {' or '.join(map(str, sorted(set(rows))))} for {num_kv_heads} KV heads of "
        f"{head_dim}",
        hint="a pool of five dimensions is [P, page_size, R / p, p, C]; a stack of layers is one "
        "flat pool of L*P pages",
    )


def merge_rows(kv_pages: jax.Array) -> jax.Array:
    """The pool as `[P, page_size, R, C]`. Inside a jit this copies nothing."""
    if kv_pages.ndim == 4:
        return kv_pages
    *page, num_words, num_packed, num_lanes = kv_pages.shape
    return kv_pages.reshape(*page, num_words * num_packed, num_lanes)


def split_rows(kv_pages: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `merge_rows`: the pool in the form in which it came."""
    return kv_pages if like.ndim == 4 else kv_pages.reshape(like.shape)


def require_count(op: str, argument: str, x: Any, hint: str) -> Any:
    """A count as int32[1]: an int, or an array of int32 of shape [] or [1]."""
    if not scalars.is_array(x) or isinstance(x, np.integer):
        value = scalars.read_int(x)
        is_good = value is not None and -(2**31) <= value < 2**31
        got = scalars.show(x) if scalars.is_integer(x) else checks.describe(x)
        wanted = "int32[1], int32[] or an int"
        checks.require(is_good, op, argument, got=got, wanted=wanted, hint=hint)
        return np.asarray([value], np.int32)
    checks.require(
        x.dtype == jnp.int32 and x.shape in ((), (1,)),
        op,
        argument,
        got=checks.describe(x),
        wanted="int32[1], int32[] or an int",
        hint=hint,
    )
    return _reshape(x, (1,))


def require_batch(
    op: str, kv_lens: Any, page_indices: Any, cu_q_lens: Any, num_seqs: Any
) -> tuple[Any, Any, Any, Any]:
    """The metadata of a batch: int32[S], int32[S, M], int32[S + 1] and int32[1].

    The page table may also be int32[S * M], and num_seqs an int or int32[].
    """
    checks.require_int32(op, "kv_lens", kv_lens, 1, "[S]")
    page_indices = _require_table(op, page_indices, kv_lens)
    max_seqs = page_indices.shape[0]
    for name, array, size in (
        ("kv_lens", kv_lens, max_seqs),
        ("cu_q_lens", cu_q_lens, max_seqs + 1),
    ):
        checks.require_int32(op, name, array, 1, f"[{size}]")
        checks.require(
            array.shape[0] == size,
            op,
            name,
            got=checks.describe(array),
            wanted=f"int32[{size}]",
            hint=f"page_indices {checks.describe(page_indices)} has S = {max_seqs}",
        )
    hint = "it counts the rows of page_indices that are sequences"
    return kv_lens, page_indices, cu_q_lens, require_count(op, "num_seqs", num_seqs, hint)


def _require_table(op: str, page_indices: Any, kv_lens: Any) -> Any:
    """The page table as int32[S, M]."""
    checks.require_array(op, "page_indices", page_indices)
    checks.require(
        page_indices.dtype == jnp.int32,
        op,
        "page_indices",
        got=checks.describe(page_indices),
        wanted="int32[S, M] or int32[S * M]",
        hint="metadata is int32; convert it on the host, where an overflow can be seen",
    )
    return table_in_rows(op, page_indices, kv_lens.shape[0])


def table_in_rows(op: str, page_indices: Any, max_seqs: int) -> Any:
    """A page table [S, M] or [S * M] as [S, M]; `max_seqs` is the S of kv_lens."""
    is_flat = page_indices.ndim == 1
    checks.require(
        page_indices.ndim in (1, 2)
        and 0 not in page_indices.shape
        and (not is_flat or (max_seqs > 0 and page_indices.size % max_seqs == 0)),
        op,
        "page_indices",
        got=checks.describe(page_indices),
        wanted=f"int32[S, M], neither 0, or int32[S * M] with the S = {max_seqs} of kv_lens",
        hint="give the table one row per sequence slot and one column per page; for a batch "
        "without sequences pass one row of any ids and num_seqs 0",
    )
    if not is_flat:
        return page_indices
    return _reshape(page_indices, (max_seqs, page_indices.size // max_seqs))


def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    if x.shape == shape:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return x.reshape(shape)
