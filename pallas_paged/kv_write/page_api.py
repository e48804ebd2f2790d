# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Whole pages: copied inside of the pool, gathered out of it, scattered into it.

Signatures, docstrings, checks and dispatch, as in api.py; no kernel code.
"""

from typing import Any

import jax

from pallas_paged import checks, dispatch, forms
from pallas_paged.dispatch import Backend
from pallas_paged.kv_write.calls import (
    BACKENDS,
    Config,
    in_place,
    plan,
    reading,
    refuse,
    require_config,
    require_same_form,
)
from pallas_paged.kv_write.options import WriteOptions


def copy_pages(
    kv_pages: jax.Array,
    src_ids: jax.Array,
    dst_ids: jax.Array,
    *,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Copies pages inside the pool: page `dst_ids[i]` gets the content of page `src_ids[i]`.

    An engine copies a page that two sequences share before one of them writes it (copy on write).

    Args:
      kv_pages: the pool, as in `page_write`; donated.
      src_ids, dst_ids: int32[n]. A pair of which either id lies outside the pool is skipped. The
        order of the copies is undefined, so no page may be written twice, nor both read and
        written; `validate` refuses such calls.
      config: a Config of the backend that runs. A copy only reads its `block_tokens`, the most
        tokens of a page that it moves at once. None lets the backend choose.
      backend: as in `page_write`.

    Returns:
      The pool, in the form in which it came.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import copy_pages
    >>> pool = jnp.arange(3.0).reshape(3, 1, 1, 1) * jnp.ones((3, 1, 2, 128))
    >>> copy_pages(pool, jnp.array([2], jnp.int32), jnp.array([0], jnp.int32))[:, 0, 0, 0].tolist()
    [2.0, 1.0, 2.0]
    """
    op = "copy_pages"
    pool = forms.pool_in_rows(op, kv_pages)
    checks.require_pool(op, pool)
    checks.require_int32(op, "src_ids", src_ids, 1, "[n]")
    require_same_form(op, "dst_ids", dst_ids, "src_ids", src_ids)
    return _copy_pages(kv_pages, src_ids, dst_ids, _options(op, backend, config, pool))


def gather_pages(
    kv_pages: jax.Array,
    page_ids: jax.Array,
    *,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Gathers pages of the pool into one contiguous array, in the order of `page_ids`.

    An engine sends a request's pages to another engine in this form, or keeps them in host memory;
    `scatter_pages` puts them back. Of a pool of L layers, the pages of all layers are gathered by
    one call with the ids of each layer.

    Args:
      kv_pages: the pool, as in `page_write`; it is only read, and not donated.
      page_ids: int32[n]. Any id may come more than once. The page of an id outside of the pool, -1
        included, is zeros.
      config: a Config of the backend that runs, of which `block_tokens` is read: the most tokens of
        a page that are moved at once. None lets the backend choose.
      backend: as in `page_write`.

    Returns:
      [n, page_size, R, C], or [n, page_size, R / p, p, C] of a pool of that form.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import gather_pages
    >>> pool = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1) * jnp.ones((4, 1, 2, 128))
    >>> gather_pages(pool, jnp.array([3, -1, 0], jnp.int32))[:, 0, 0, 0].tolist()
    [4.0, 0.0, 1.0]
    """
    op = "gather_pages"
    pool = forms.pool_in_rows(op, kv_pages)
    checks.require_pool(op, pool)
    checks.require_int32(op, "page_ids", page_ids, 1, "[n]")
    return _gather_pages(kv_pages, page_ids, _options(op, backend, config, pool))


def scatter_pages(
    kv_pages: jax.Array,
    page_ids: jax.Array,
    pages: jax.Array,
    *,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Writes whole pages that `gather_pages` has returned: page `page_ids[i]` becomes `pages[i]`.

    Args:
      kv_pages: the pool, as in `page_write`; donated.
      page_ids: int32[n], the page of each entry. An entry with an id outside of the pool, -1
        included, is skipped. Of two entries for one page either may win, and each may win a part.
      pages: [n, page_size, R, C] in the dtype and the form of the pool.
      config, backend: as in `gather_pages`.

    Returns:
      The pool, in the form in which it came.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import gather_pages, scatter_pages
    >>> pool = jnp.arange(3.0).reshape(3, 1, 1, 1) * jnp.ones((3, 1, 2, 128))
    >>> pages = gather_pages(pool, jnp.array([2, 1], jnp.int32))
    >>> scatter_pages(0 * pool, jnp.array([0, -1], jnp.int32), pages)[:, 0, 0, 0].tolist()
    [2.0, 0.0, 0.0]
    """
    op = "scatter_pages"
    pool = forms.pool_in_rows(op, kv_pages)
    checks.require_pool(op, pool)
    checks.require_int32(op, "page_ids", page_ids, 1, "[n]")
    checks.require_array(op, "pages", pages)
    wanted = jax.ShapeDtypeStruct((page_ids.shape[0], *kv_pages.shape[1:]), kv_pages.dtype)
    checks.require(
        pages.shape == wanted.shape and pages.dtype == wanted.dtype,
        op,
        "pages",
        got=checks.describe(pages),
        wanted=checks.describe(wanted),
        hint="one page of the pool's form for each of page_ids, as gather_pages returns them",
    )
    return _scatter_pages(kv_pages, page_ids, pages, _options(op, backend, config, pool))


def _options(op: str, backend: str, config: Any, pool: Any) -> WriteOptions:
    """The options of a move, with the backend that runs it."""
    chosen, _ = dispatch.choose(
        op, backend, lambda name: plan(name, lambda x: x.unsupported_pool(pool))
    )
    require_config(op, config, chosen)
    return WriteOptions(chosen, backend == "auto", config)


@in_place
def _copy_pages(
    kv_pages: jax.Array, src_ids: jax.Array, dst_ids: jax.Array, options: WriteOptions
) -> jax.Array:
    arrays = refuse("copy_pages", options, kv_pages, src_ids, dst_ids)
    return BACKENDS[options.backend].copy_pages(*arrays, options)


@reading
def _gather_pages(kv_pages: jax.Array, page_ids: jax.Array, options: WriteOptions) -> jax.Array:
    arrays = refuse("gather_pages", options, kv_pages, page_ids)
    return BACKENDS[options.backend].gather_pages(*arrays, options)


@in_place
def _scatter_pages(
    kv_pages: jax.Array, page_ids: jax.Array, pages: jax.Array, options: WriteOptions
) -> jax.Array:
    pages = pages.reshape(pages.shape[0], *kv_pages.shape[1:])
    arrays = refuse("scatter_pages", options, kv_pages, page_ids, pages)
    return BACKENDS[options.backend].scatter_pages(*arrays, options)
