# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the writes mean, in jittable jax.numpy: gather the entries' tokens, scatter those in range.

This is also the backend on a CPU. An entry that is out of range anywhere is dropped whole; nothing
is clamped.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from pallas_paged import dispatch, layout
from pallas_paged.bits import as_bits
from pallas_paged.kv_write.options import WriteOptions, WriteScales


def quantize(
    x: jax.Array, scale: jax.Array | float | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Values `[T, K, H]` as a pool of `dtype` stores them.

    - A pool of 16 or 32 bits has no scale. A value that it cannot hold is rounded to nearest even.
    - An 8-bit pool stores `y = float32(x) * (1 / float32(scale))`, one float32 product; None is a
      scale of 1. Values that have the pool's dtype already are stored as they are, without a scale.
      int8: `y` is rounded half to even, then saturated to [-128, 127]; NaN gives 0.
      fp8: `y`, infinities too, is saturated to the largest finite value (448 for e4m3fn, 57,344 for
      e5m2), then rounded to nearest even; subnormals are kept, and NaN stays NaN.
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
    """`1 / scale` as float32[K], which every backend multiplies by."""
    inverse = 1.0 / jnp.asarray(1.0 if scale is None else scale, jnp.float32)
    return jnp.broadcast_to(inverse, (num_kv_heads,))


def _new_slots(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, scales: WriteScales, num_kv_heads: int
) -> jax.Array:
    """The new tokens in the pool's form, `[T, R, C]`, as `as_bits`."""
    k = quantize(layout.split_heads(k, num_kv_heads), scales.k, kv_pages.dtype)
    v = quantize(layout.split_heads(v, num_kv_heads), scales.v, kv_pages.dtype)
    return layout.merge_kv(as_bits(k), as_bits(v), kv_pages.shape[2])


def _set(pool: jax.Array, index: jax.Array, bits: jax.Array) -> jax.Array:
    """`pool[index] = bits`, byte for byte; an index past the end is dropped."""
    if pool.dtype != bits.dtype and dispatch.platform() == "cpu":
        if pool.dtype.itemsize == 2 and _SCATTERS_16_BITS:
            bits = bits.view(pool.dtype)
        elif _FUSES_VIEWS and not _is_in_explicit_mesh(pool, index, bits):
            return _set_one_by_one(pool, index, bits)
    if index.size == 1:
        # XLA makes a lone index a slice of the pool that it reads first, and then copies the whole
        # pool on a CPU. A second index, which is dropped, keeps the scatter, which is in place.
        index = jnp.concatenate([index.reshape(1), jnp.array([len(pool)], index.dtype)])
        bits = jnp.broadcast_to(bits.reshape(1, *pool.shape[1:]), (2, *pool.shape[1:]))
    return pool.view(bits.dtype).at[index].set(bits, mode="drop").view(pool.dtype)


# On a CPU, XLA copies a pool that is seen as integers before it scatters into it and after that,
# 205 ms for 256 MiB. Since 0.12 it also scatters 16-bit floats as they are, in place; 8-bit floats
# it still makes wider ones. Until 0.11 it updates a slice of a pool that is seen as integers in
# place, which takes 0.5 ms for 8 pages.
_SCATTERS_16_BITS = jax.__version_info__ >= (0, 12)
_FUSES_VIEWS = jax.__version_info__ < (0, 11)


def _is_in_explicit_mesh(*arrays: jax.Array) -> bool:
    """Whether jax checks the shardings of these arrays while it traces.

    Then an update must have the sharding of the slice that it updates; a scatter takes any.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


def _set_one_by_one(pool: jax.Array, index: jax.Array, bits: jax.Array) -> jax.Array:
    """As `_set`, in a loop over what is not dropped."""
    index, bits = index.reshape(-1), bits.reshape(-1, *pool.shape[1:])
    is_dropped = index >= len(pool)
    order = jnp.argsort(is_dropped).astype(jnp.int32)

    def set_one(i: jax.Array, pool: jax.Array) -> jax.Array:
        # Behind the barrier the views stay in the loop, where they cost nothing.
        pool, entry = lax.optimization_barrier((pool, order[i]))
        updated = lax.dynamic_update_index_in_dim(
            pool.view(bits.dtype), bits[entry], index[entry], axis=0
        )
        return updated.view(pool.dtype)

    count = jnp.sum(~is_dropped, dtype=jnp.int32)
    return lax.fori_loop(jnp.int32(0), count, set_one, pool)


def _scatter(
    pool: jax.Array, slots: jax.Array, new: jax.Array, tokens: jax.Array, is_live: jax.Array
) -> jax.Array:
    """Slot `slots[i]` of a pool [P * page_size, R, C] gets `new[tokens[i]]` where `is_live[i]`."""
    target = jnp.where(is_live, slots, pool.shape[0])  # one past the end: dropped
    values = new.at[tokens].get(mode="fill", fill_value=0)
    return _set(pool, target, values)


def page_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_ids: jax.Array,
    token_starts: jax.Array | None,
    scales: WriteScales,
    options: WriteOptions,
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
    new = _new_slots(kv_pages, k, v, scales, options.num_kv_heads)
    starts = jnp.where(is_live, token_starts, 0)
    tokens = starts[:, None] + jnp.arange(page_size, dtype=jnp.int32)  # [n, page_size]
    return _set(kv_pages, jnp.where(is_live, page_ids, num_pages), new[tokens])


def slice_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slices: jax.Array,
    num_slices: jax.Array,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """Slot `slices[0, i] + j` gets token `slices[1, i] + j` for `j < slices[2, i]`.

    See api.slice_write.
    """
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    if num_tokens == 0 or slices.shape[1] == 0:
        return kv_pages
    first_slot, first_token, length = slices
    is_live = is_live_slice(slices, num_slices, num_pages, page_size, num_tokens)
    new = _new_slots(kv_pages, k, v, scales, options.num_kv_heads)
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
    """bool[n]: which slices are written. Nothing is added, so that no int32 overflows."""
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
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """Slot `slots[t]` gets token t; see api.token_write."""
    pool = layout.flatten_slots(kv_pages)
    if slots.shape[0] == 0:
        return kv_pages
    new = _new_slots(kv_pages, k, v, scales, options.num_kv_heads)
    is_live = (slots >= 0) & (slots < pool.shape[0])
    return _scatter(pool, slots, new, jnp.arange(slots.shape[0]), is_live).reshape(kv_pages.shape)


def copy_pages(
    kv_pages: jax.Array, src_ids: jax.Array, dst_ids: jax.Array, options: WriteOptions
) -> jax.Array:
    """Page `dst_ids[i]` gets what page `src_ids[i]` held before the call."""
    del options
    if src_ids.shape[0] == 0:
        return kv_pages
    num_pages = kv_pages.shape[0]
    is_live = (src_ids >= 0) & (src_ids < num_pages) & (dst_ids >= 0) & (dst_ids < num_pages)
    pages = as_bits(kv_pages)[jnp.where(is_live, src_ids, 0)]
    return _set(kv_pages, jnp.where(is_live, dst_ids, num_pages), pages)


def gather_pages(kv_pages: jax.Array, page_ids: jax.Array, options: WriteOptions) -> jax.Array:
    """[n, page_size, R, C]: page `page_ids[i]`, or zeros; see page_api.gather_pages."""
    del options
    if page_ids.shape[0] == 0:
        return jnp.zeros((0, *kv_pages.shape[1:]), kv_pages.dtype)
    is_live = (page_ids >= 0) & (page_ids < kv_pages.shape[0])
    pages = as_bits(kv_pages)[jnp.where(is_live, page_ids, 0)]
    return jnp.where(is_live[:, None, None, None], pages, 0).view(kv_pages.dtype)


def scatter_pages(
    kv_pages: jax.Array, page_ids: jax.Array, pages: jax.Array, options: WriteOptions
) -> jax.Array:
    """Page `page_ids[i]` becomes `pages[i]`; see page_api.scatter_pages."""
    del options
    if page_ids.shape[0] == 0:
        return kv_pages
    num_pages = kv_pages.shape[0]
    is_page = (page_ids >= 0) & (page_ids < num_pages)
    return _set(kv_pages, jnp.where(is_page, page_ids, num_pages), as_bits(pages))
