# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Between the pool and other forms of a cache: keys and values apart, heads first, flat tables.

Each function makes new arrays. They are for a change of caches, for tests and for reading a pool;
an engine that keeps a cache in another form pays for a copy of it in every call.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged import checks, forms, layout, scalars


def merge_kv(k: jax.Array, v: jax.Array, *, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The slots of keys and values: `[..., R, C]` of k and v `[..., K, H]`.

    Args:
      k, v: [..., K, H], keys and values of the same tokens.
      dtype: of the pool, by which R may differ; None for that of k. Values are cast, not scaled.

    Returns:
      [..., R, C], with zeros in the padding rows and lanes.

    Raises:
      ValueError: k and v are no such arrays.

    >>> k = jnp.ones((5, 3, 128), jnp.bfloat16)
    >>> merge_kv(k, -k).shape  # three heads are six rows, and R is eight
    (5, 8, 128)
    """
    _require_kv("merge_kv", k, v, ndim=None)
    *rest, num_kv_heads, head_dim = k.shape
    dtype = jnp.dtype(k.dtype if dtype is None else dtype)
    num_rows = layout.num_rows(num_kv_heads, head_dim, dtype)
    k, v = (x.reshape(-1, num_kv_heads, head_dim).astype(dtype) for x in (k, v))
    slots = layout.merge_kv(k, v, num_rows)
    return slots.reshape(*rest, *slots.shape[1:])


def split_kv(slots: jax.Array, num_kv_heads: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[..., K, H]` of slots or of a pool `[..., R, C]`: inverts `merge_kv`.

    Args:
      slots: [..., R, C], for example a pool [P, page_size, R, C].
      num_kv_heads: K.
      head_dim: H.

    Returns:
      (k, v), [..., K, H] each.

    Raises:
      ValueError: the slots have no room for such heads.

    >>> k = jnp.arange(6.0).reshape(3, 2, 1) * jnp.ones((3, 2, 64))
    >>> found_k, found_v = split_kv(merge_kv(k, -k), 2, 64)
    >>> bool((found_k == k).all() and (found_v == -k).all())
    True
    """
    op = "split_kv"
    checks.require_array(op, "slots", slots)
    heads = checks.require_heads(op, num_kv_heads, "the number of KV heads of the slots")
    width = scalars.read_int(head_dim)
    checks.require(
        width is not None and 1 <= width <= 2 * layout.LANES,
        op,
        "head_dim",
        got=scalars.show(head_dim),
        wanted=f"an int from 1 to {2 * layout.LANES}",
        hint="the size of a head",
    )
    assert width is not None
    checks.require(
        slots.ndim >= 2
        and slots.shape[-2] >= layout.num_rows_used(heads, width)
        and slots.shape[-1] == layout.num_lanes(width),
        op,
        "slots",
        got=checks.describe(slots),
        wanted=f"[..., R, {layout.num_lanes(width)}] with R of at least "
        f"{layout.num_rows_used(heads, width)}, for {heads} KV heads of {width}",
        hint="pass the heads that the pool was made for",
    )
    return layout.split_kv(slots, heads, width)


def from_separate_caches(
    k: jax.Array,
    v: jax.Array,
    *,
    heads_first: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """The pool of a cache that keeps keys and values apart.

    Args:
      k, v: [P, page_size, K, H]; with `heads_first` [K, P, page_size, H], as jax's own GPU kernel
        has them.
      heads_first: which of the two.
      dtype: of the pool; None for that of k. Values are cast, not scaled.

    Returns:
      The pool, [P, page_size, R, C], as `make_kv_pages` makes it.

    Raises:
      ValueError: k and v are no such arrays.

    >>> k = jnp.ones((2, 10, 16, 128), jnp.bfloat16)  # 2 heads, 10 pages of 16 tokens
    >>> from_separate_caches(k, -k, heads_first=True).shape
    (10, 16, 4, 128)
    """
    op = "from_separate_caches"
    _require_kv(op, k, v, ndim=4)
    if checks.require_bool(op, "heads_first", heads_first):
        k, v = (jnp.moveaxis(x, 0, 2) for x in (k, v))
    return merge_kv(k, v, dtype=dtype)


def to_separate_caches(
    kv_pages: jax.Array, num_kv_heads: int, head_dim: int, *, heads_first: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a pool, apart: the inverse of `from_separate_caches`.

    Args:
      kv_pages: [P, page_size, R, C], the pool, or [P, page_size, R / p, p, C].
      num_kv_heads: K.
      head_dim: H.
      heads_first: whether the results are [K, P, page_size, H].

    Returns:
      (k, v), [P, page_size, K, H] each, or [K, P, page_size, H].

    Raises:
      ValueError: the pool has no room for such heads.

    >>> k = jnp.ones((2, 10, 16, 80), jnp.bfloat16)
    >>> pool = from_separate_caches(k, -k, heads_first=True)
    >>> [x.shape for x in to_separate_caches(pool, 2, 80, heads_first=True)]
    [(2, 10, 16, 80), (2, 10, 16, 80)]
    """
    op = "to_separate_caches"
    checks.require_pool(op, forms.pool_in_rows(op, kv_pages))
    k, v = split_kv(forms.merge_rows(kv_pages), num_kv_heads, head_dim)
    if checks.require_bool(op, "heads_first", heads_first):
        k, v = (jnp.moveaxis(x, 2, 0) for x in (k, v))
    return k, v


def page_table_from_flat(
    page_indices: Any, cu_kv_lens: Any, page_size: int, max_pages: int
) -> jax.Array:
    """The page table `[S, M]` of a flat list in which each sequence has only the pages it needs.

    The pages of sequence s begin at entry `ceil(cu_kv_lens[s] / page_size)`, and it has as many as
    lie between `cu_kv_lens[s]` and `cu_kv_lens[s + 1]`. So `cu_kv_lens` may be prefix sums of
    lengths that are rounded up to whole pages, as sglang-jax has them, or with `page_size=1` prefix
    sums of numbers of pages, as FlashInfer has them. The function can be jitted; call it once per
    step.

    Args:
      page_indices: int32[n], the pages of all sequences, one sequence after the other.
      cu_kv_lens: int32[S + 1], prefix sums.
      page_size: tokens in a page, an int.
      max_pages: M, an int; pages of a sequence beyond it are left out.

    Returns:
      int32[S, M], with -1 after a sequence's last page.

    Raises:
      ValueError: an argument has the wrong form.

    >>> flat = jnp.array([7, 3, 9], jnp.int32)
    >>> page_table_from_flat(flat, jnp.array([0, 32, 48], jnp.int32), 16, 3).tolist()
    [[7, 3, -1], [9, -1, -1]]
    """
    op = "page_table_from_flat"
    checks.require_int32(op, "page_indices", page_indices, 1, "[n]")
    checks.require_int32(op, "cu_kv_lens", cu_kv_lens, 1, "[S + 1]")
    for name, value in (("page_size", page_size), ("max_pages", max_pages)):
        size = scalars.read_int(value)
        checks.require(
            size is not None and 1 <= size < 2**31,
            op,
            name,
            got=scalars.show(value),
            wanted="an int >= 1",
            hint="it is static: a shape depends on it",
        )
    checks.require(
        cu_kv_lens.shape[0] > 1 and page_indices.shape[0] > 0,
        op,
        "cu_kv_lens",
        got=checks.describe(cu_kv_lens),
        wanted="int32[S + 1] with S of at least 1, and page_indices that are not empty",
        hint="prefix sums of the sequences, from 0",
    )
    first = -(-jnp.asarray(cu_kv_lens) // page_size)
    column = jnp.arange(max_pages, dtype=jnp.int32)
    entry = first[:-1, None] + column
    table = jnp.asarray(page_indices).at[entry].get(mode="fill", fill_value=-1)
    return jnp.where((entry >= 0) & (entry < first[1:, None]), table, -1)


def _require_kv(op: str, k: Any, v: Any, *, ndim: int | None) -> None:
    wanted = "[..., K, H]" if ndim is None else "four dimensions"
    for name, x in (("k", k), ("v", v)):
        checks.require_array(op, name, x)
        checks.require(
            (x.ndim >= 2 if ndim is None else x.ndim == ndim)
            and 0 not in x.shape
            and x.shape[-1] <= 2 * layout.LANES
            and x.dtype in layout.POOL_DTYPES,
            op,
            name,
            got=checks.describe(x),
            wanted=f"{wanted} of one of {', '.join(map(str, layout.POOL_DTYPES))}, and heads of at "
            f"most {2 * layout.LANES}",
            hint="pass the keys and values as the cache holds them",
        )
    checks.require(
        k.shape == v.shape and k.dtype == v.dtype,
        op,
        "v",
        got=checks.describe(v),
        wanted=f"{checks.describe(k)}, as k",
        hint="k and v of a token have the same form",
    )
