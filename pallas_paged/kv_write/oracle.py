# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the writes mean, in jittable jax.numpy: gather the entries' tokens, scatter those in range.

Also the CPU backend. An entry that is out of range anywhere is dropped whole, never clamped.
"""

import jax
import jax.numpy as jnp

from pallas_paged import layout


def quantize(
    x: jax.Array, scale: jax.Array | float | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Values `[T, K, H]` as the pool stores them.

    - Pools of 16 and 32 bit: rounded to nearest even where the pool is narrower; no scale.
    - 8-bit pools: `y = float32(x) * (1 / float32(scale))`, one float32 product (scale 1 if None).
      k and v that have the pool's dtype already are stored as they are, without a scale.
      int8: `y` rounded half to even, then saturated to [-128, 127]; NaN gives 0.
      fp8: `y` saturated to the largest finite value (448 for e4m3fn, 57,344 for e5m2; infinities
      too), rounded to nearest even, subnormals kept; NaN stays NaN.
    """
    dtype = jnp.dtype(dtype)
    if not layout.is_quantized(dtype) or x.dtype == dtype:
        return x.astype(dtype)
    y = x.astype(jnp.float32) * inverse_scale(scale, x.shape[1])[:, None]
    if dtype == jnp.int8:
        y = jnp.where(jnp.isnan(y), 0.0, jnp.round(y))
        return jnp.clip(y, -128, 127).astype(jnp.int8)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(y, -largest, largest).astype(dtype)


def inverse_scale(scale: jax.Array | float | None, num_kv_heads: int) -> jax.Array:
    """`1 / scale` as float32[K]; what both backends multiply by."""
    inverse = 1.0 / jnp.asarray(1.0 if scale is None else scale, jnp.float32)
    return jnp.broadcast_to(inverse, (num_kv_heads,))


def _new_slots(kv_pages, k, v, k_scale, v_scale, num_kv_heads):
    """The new tokens in the pool's form, `[T, R, C]`, as `_bits`."""
    k = quantize(layout.split_heads(k, num_kv_heads), k_scale, kv_pages.dtype)
    v = quantize(layout.split_heads(v, num_kv_heads), v_scale, kv_pages.dtype)
    return layout.merge_kv(_bits(k), _bits(v), kv_pages.shape[2])


def _bits(x):
    """The same bytes, narrow floats as unsigned integers.

    On a CPU, XLA moves narrow floats by way of wider ones, which rewrites every NaN in the pool.
    """
    if x.dtype in (jnp.float32, jnp.int8):
        return x
    return x.view(jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _set(pool, index, bits):
    """`pool[index] = bits`, byte for byte, an index past the end dropped."""
    return _bits(pool).at[index].set(bits, mode="drop").view(pool.dtype)


def _scatter(slots_of_pool, rows, new, tokens, is_live):
    """Pool rows `rows[i]` become `new[tokens[i]]` where `is_live[i]`."""
    target = jnp.where(is_live, rows, slots_of_pool.shape[0])  # one past the end: dropped
    values = new.at[tokens].get(mode="fill", fill_value=0)
    return _set(slots_of_pool, target, values)


def page_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_ids: jax.Array,
    token_starts: jax.Array | None,
    *,
    k_scale: jax.Array | float | None,
    v_scale: jax.Array | float | None,
    num_kv_heads: int,
) -> jax.Array:
    """Page `page_ids[i]` gets tokens `token_starts[i] .. + page_size`; see api.page_write."""
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    if num_tokens < page_size or page_ids.shape[0] == 0:
        return kv_pages
    if token_starts is None:
        # Entries past the last whole page would overflow int32 long before they are of use.
        page_ids = page_ids[: num_tokens // page_size]
        token_starts = jnp.arange(page_ids.shape[0], dtype=jnp.int32) * page_size
    is_live = (page_ids >= 0) & (page_ids < num_pages)
    is_live &= (token_starts >= 0) & (token_starts <= num_tokens - page_size)
    new = _new_slots(kv_pages, k, v, k_scale, v_scale, num_kv_heads)
    starts = jnp.where(is_live, token_starts, 0)
    tokens = starts[:, None] + jnp.arange(page_size, dtype=jnp.int32)  # [n, page_size]
    return _set(kv_pages, jnp.where(is_live, page_ids, num_pages), new[tokens])


def slice_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slices: jax.Array,
    num_slices: jax.Array,
    *,
    k_scale: jax.Array | float | None,
    v_scale: jax.Array | float | None,
    num_kv_heads: int,
) -> jax.Array:
    """Slot `slices[0, i] + j` gets token `slices[1, i] + j`, `j < slices[2, i]`."""
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    if num_tokens == 0 or slices.shape[1] == 0:
        return kv_pages
    first_slot, first_token, length = slices
    is_live = is_live_slice(slices, num_slices, num_pages, page_size, num_tokens)
    new = _new_slots(kv_pages, k, v, k_scale, v_scale, num_kv_heads)
    step = jnp.arange(page_size, dtype=jnp.int32)
    is_token = is_live[:, None] & (step < length[:, None])  # [n, page_size]
    pool = _scatter(
        layout.flatten_slots(kv_pages),
        jnp.where(is_live, first_slot, 0)[:, None] + step,
        new,
        jnp.where(is_token, jnp.where(is_live, first_token, 0)[:, None] + step, 0),
        is_token,
    )
    return pool.reshape(kv_pages.shape)


def is_live_slice(
    slices: jax.Array, num_slices: jax.Array, num_pages: int, page_size: int, num_tokens: int
) -> jax.Array:
    """bool[n]: which slices are written. Compared without adding, so that no int32 overflows."""
    first_slot, first_token, length = slices
    is_live = jnp.arange(slices.shape[1]) < num_slices[0]
    is_live &= (first_slot >= 0) & (first_slot < num_pages * page_size)
    is_live &= (length >= 1) & (length <= min(page_size, num_tokens))
    is_live &= first_slot % page_size <= page_size - length
    return is_live & (first_token >= 0) & (first_token <= num_tokens - length)


def token_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: jax.Array | float | None,
    v_scale: jax.Array | float | None,
    num_kv_heads: int,
) -> jax.Array:
    """Slot `slots[t]` gets token t."""
    pool = layout.flatten_slots(kv_pages)
    if slots.shape[0] == 0:
        return kv_pages
    new = _new_slots(kv_pages, k, v, k_scale, v_scale, num_kv_heads)
    is_live = (slots >= 0) & (slots < pool.shape[0])
    return _scatter(pool, slots, new, jnp.arange(slots.shape[0]), is_live).reshape(kv_pages.shape)


def copy_pages(kv_pages: jax.Array, src_ids: jax.Array, dst_ids: jax.Array) -> jax.Array:
    """Page `dst_ids[i]` gets what page `src_ids[i]` held before the call."""
    num_pages = kv_pages.shape[0]
    is_live = (src_ids >= 0) & (src_ids < num_pages) & (dst_ids >= 0) & (dst_ids < num_pages)
    pages = kv_pages[jnp.where(is_live, src_ids, 0)]
    return _set(kv_pages, jnp.where(is_live, dst_ids, num_pages), _bits(pages))
