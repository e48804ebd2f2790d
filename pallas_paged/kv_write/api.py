# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The public writes: signatures, docstrings, checks and dispatch. No kernel code.

Every op takes the pool, donates it, and returns it updated in place. An entry that is out of range
anywhere is skipped whole and not clamped: its page or slot may lie outside the pool (-1
does), or its tokens outside the batch. Where two entries write one slot, either may win, and on a
GPU each may win a part of it; `validate` refuses such calls.

The way of a call: the public op checks its arguments and chooses the backend, its jitted half calls
the backend's function of the same name, and that launches the kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged import checks, dispatch, forms
from pallas_paged.dispatch import Backend
from pallas_paged.kv_write.calls import (
    BACKENDS,
    Config,
    in_place,
    plan,
    refuse,
    require_config,
    require_same_form,
)
from pallas_paged.kv_write.indices import WriteIndices, write_indices
from pallas_paged.kv_write.options import WriteOptions, WriteScales

__all__ = ["WriteIndices", "page_write", "slice_write", "token_write", "write_indices"]


def page_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    page_ids: jax.Array,
    token_starts: jax.Array | None = None,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    num_kv_heads: int | None = None,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Writes whole pages: page `page_ids[i]` gets the `page_size` tokens from `token_starts[i]` on.

    Args:
      kv_pages: [P, page_size, R, C], the pool; donated. It may also be [P, page_size, R / p, p, C],
        as other TPU projects keep it, where p rows share 32 bits: p is 1, 2 or 4.
      k, v: [T, K, H] or [T, K*H], the new keys and values of the T tokens of the packed batch. They
        are float32 or bfloat16, or float16 on a GPU and in the oracle. They may also have the dtype
        of an 8-bit pool; then they are stored as they are, whatever the scales. With v = None, k is
        a packed QKV: [T, A, H] whose last 2 * num_kv_heads heads are the keys and then the values.
        On a GPU the kernel reads them where they are; elsewhere they are copied out of it.
      page_ids: int32[n], one page per entry; -1 skips the entry.
      token_starts: int32[n], the first token of each page in the packed batch. Any order is right;
        in ascending order the batch is read only once. None means `i * page_size`.
      k_scale, v_scale: a number or float32[K], one per KV head, for an fp8 or int8 pool, which
        stores `x * (1 / scale)` (`kv_write.oracle.quantize` defines the rounding). None means 1.
        Any float dtype is taken as float32, and an array of shape [1] as a number. A scale must be
        positive, and float32 must hold its inverse too; that is checked unless the scale is traced
        or lies on an accelerator.
      num_kv_heads: K, an int. It is needed where k is [T, K*H], unless only one K makes a pool of
        this form from k's width. Of a pool with 128 lanes that is rare: its R rows may be R/2 heads
        of 128 or R heads of 64.
      config: the block sizes of the kernel, a Config of the backend that runs. None lets the
        backend choose.
      backend: "auto", "oracle", "xla", "mosaic_tpu" or "mosaic_gpu". A named backend runs the call
        or refuses it. "auto" takes the kernel of the platform where it can run the call, and else
        "xla", with a warning on an accelerator; `explain_backend` says why.

    Returns:
      The pool, in the form in which it came.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import make_kv_pages, page_write
    >>> pool = make_kv_pages(4, 2, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> k = jnp.arange(1.0, 6.0)[:, None, None] * jnp.ones((5, 1, 128))  # 5 tokens
    >>> starts = jnp.array([1, 3], jnp.int32)  # tokens 1 and 2, tokens 3 and 4
    >>> pool = page_write(pool, k, -k, jnp.array([3, 0], jnp.int32), starts)
    >>> pool[:, :, :2, 0].tolist()  # K and V of both rows of each page
    ... # doctest: +NORMALIZE_WHITESPACE
    [[[4.0, -4.0], [5.0, -5.0]], [[0.0, 0.0], [0.0, 0.0]],
     [[0.0, 0.0], [0.0, 0.0]], [[2.0, -2.0], [3.0, -3.0]]]
    """
    op = "page_write"
    pool = forms.pool_in_rows(op, kv_pages)
    heads, head_dim, *scales = checks.require_write(op, pool, k, v, k_scale, v_scale, num_kv_heads)
    forms.require_rows(op, kv_pages, heads, head_dim)
    checks.require_int32(op, "page_ids", page_ids, 1, "[n]")
    if token_starts is not None:
        require_same_form(op, "token_starts", token_starts, "page_ids", page_ids)
    options = _options(op, backend, config, pool, k, heads, head_dim)
    k, v = _unpacked(k, v, options)
    return _page_write(kv_pages, k, v, page_ids, token_starts, WriteScales(*scales), options)


def slice_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    slices: jax.Array,
    num_slices: jax.Array,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    num_kv_heads: int | None = None,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Writes slices: consecutive tokens that go to consecutive slots of one page.

    Args:
      kv_pages, k, v: as in `page_write`.
      slices: int32[3, max_slices], one slice per column. The rows are its first slot
        (`page * page_size + row`), its first token, and its length. A slice whose length is below 1
        or that would leave its page is skipped. Any order of the tokens is right; in ascending
        order the batch is read only once.
      num_slices: int32[1], int32[] or an int, how many of the columns are slices; it is clamped to
        [0, max_slices].
      k_scale, v_scale, num_kv_heads, config, backend: as in `page_write`.

    Returns:
      The pool, in the form in which it came.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import make_kv_pages, slice_write
    >>> pool = make_kv_pages(2, 4, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> k = jnp.arange(1.0, 6.0)[:, None, None] * jnp.ones((5, 1, 128))
    >>> slices = jnp.array([[2, 5], [0, 3], [2, 1]], jnp.int32)
    >>> pool = slice_write(pool, k, -k, slices, jnp.array([2], jnp.int32))
    >>> pool[:, :, 0, 0].tolist()
    [[0.0, 0.0, 1.0, 2.0], [0.0, 4.0, 0.0, 0.0]]
    """
    op = "slice_write"
    pool = forms.pool_in_rows(op, kv_pages)
    heads, head_dim, *scales = checks.require_write(op, pool, k, v, k_scale, v_scale, num_kv_heads)
    forms.require_rows(op, kv_pages, heads, head_dim)
    checks.require_int32(op, "slices", slices, 2, "[3, max_slices]")
    checks.require(
        slices.shape[0] == 3,
        op,
        "slices",
        got=checks.describe(slices),
        wanted="int32[3, max_slices]",
        hint="rows are first slot, first token, length",
    )
    hint = "it counts the columns of slices that are in use"
    num_slices = forms.require_count(op, "num_slices", num_slices, hint)
    options = _options(op, backend, config, pool, k, heads, head_dim)
    k, v = _unpacked(k, v, options)
    return _slice_write(kv_pages, k, v, slices, num_slices, WriteScales(*scales), options)


def token_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    slots: jax.Array,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    num_kv_heads: int | None = None,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Writes token by token: slot `slots[t]` (`page * page_size + row`) gets token t.

    Args:
      kv_pages, k, v: as in `page_write`.
      slots: int32[T], one slot per token; -1 skips the token.
      k_scale, v_scale, num_kv_heads, config, backend: as in `page_write`.

    Returns:
      The pool, in the form in which it came.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import make_kv_pages, token_write
    >>> pool = make_kv_pages(2, 2, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> k = jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((3, 1, 128))
    >>> token_write(pool, k, -k, jnp.array([3, -1, 0], jnp.int32))[:, :, 0, 0].tolist()
    [[3.0, 0.0], [0.0, 1.0]]
    """
    op = "token_write"
    pool = forms.pool_in_rows(op, kv_pages)
    heads, head_dim, *scales = checks.require_write(op, pool, k, v, k_scale, v_scale, num_kv_heads)
    forms.require_rows(op, kv_pages, heads, head_dim)
    checks.require_int32(op, "slots", slots, 1, "[T]")
    checks.require(
        slots.shape[0] == k.shape[0],
        op,
        "slots",
        got=checks.describe(slots),
        wanted=f"int32[{k.shape[0]}]",
        hint=f"one slot per token of k {checks.describe(k)}; -1 skips one",
    )
    options = _options(op, backend, config, pool, k, heads, head_dim)
    k, v = _unpacked(k, v, options)
    return _token_write(kv_pages, k, v, slots, WriteScales(*scales), options)


def _unpacked(
    k: jax.Array, v: jax.Array | None, options: WriteOptions
) -> tuple[jax.Array, jax.Array | None]:
    """The keys and values of a packed QKV, unless the backend reads them where they are."""
    if v is not None or options.backend == "mosaic_gpu":
        return k, v
    keys, values = jnp.split(k[:, -2 * options.num_kv_heads :], 2, axis=1)
    return keys, values


def _options(
    op: str,
    backend: str,
    config: Any,
    kv_pages: jax.Array,
    k: jax.Array,
    num_kv_heads: int,
    head_dim: int,
) -> WriteOptions:
    """The options of a write, with the backend that runs it."""
    chosen, _ = dispatch.choose(
        op,
        backend,
        lambda name: plan(name, lambda x: x.unsupported(kv_pages, k, num_kv_heads, head_dim)),
    )
    require_config(op, config, chosen)
    return WriteOptions(chosen, backend == "auto", config, num_kv_heads)


# The jitted halves; see calls.in_place.


@in_place
def _page_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    page_ids: jax.Array,
    token_starts: jax.Array | None,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    arrays = refuse("page_write", options, kv_pages, k, v, page_ids, token_starts, scales)
    return BACKENDS[options.backend].page_write(*arrays, options)


@in_place
def _slice_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    slices: jax.Array,
    num_slices: jax.Array,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    arrays = refuse("slice_write", options, kv_pages, k, v, slices, num_slices, scales)
    return BACKENDS[options.backend].slice_write(*arrays, options)


@in_place
def _token_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    slots: jax.Array,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    arrays = refuse("token_write", options, kv_pages, k, v, slots, scales)
    return BACKENDS[options.backend].token_write(*arrays, options)
