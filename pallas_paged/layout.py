# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The layout of the pool: shapes, slots, and where K and V of a head lie. Only this file knows it.

A pool is ``kv_pages[P, page_size, R, C]``. One *slot* is the ``[R, C]`` of one token.

- head_dim > 64: ``C`` is head_dim rounded up to 128; K of head i in row ``2i``, V in row ``2i + 1``
  (for multiples of 128 the layout of JAX's own TPU kernel).
- head_dim <= 64: ``C = 128``; row i holds head i, K from lane 0 and V from lane 64.

Rows and lanes beyond those in use are padding: a write sets them to zero.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged import scalars

LANES = 128  # the minor dimension of a TPU register, and of the pool's rows
HALF_LANES = LANES // 2

POOL_DTYPES = tuple(
    jnp.dtype(d)
    for d in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8)
)


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least x.

    >>> round_up(130, 128)
    256
    """
    return -(-x // multiple) * multiple


def is_quantized(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a pool of `dtype` holds scaled values (8 bits) rather than the values themselves."""
    return jnp.dtype(dtype).itemsize == 1


def packs_kv_in_row(head_dim: int) -> bool:
    """Whether K and V of a head share one row (head_dim <= 64) instead of taking two."""
    return head_dim <= HALF_LANES


def num_lanes(head_dim: int) -> int:
    """The pool's minor dimension C for a head dimension."""
    return LANES if packs_kv_in_row(head_dim) else -(-head_dim // LANES) * LANES


def num_rows_used(num_kv_heads: int, head_dim: int) -> int:
    """Rows of a slot that hold data."""
    return num_kv_heads if packs_kv_in_row(head_dim) else 2 * num_kv_heads


def num_rows(num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """The smallest row count R for which XLA on TPU keeps the pool where it is.

    XLA lays out a `[..., R, 128]` array in tiles of up to 8 rows of 32-bit words. Row counts that
    are one such tile (a power of two of words, up to 8 rows) or whole tiles of 8 rows stay in
    row-major order; others are laid out transposed and copied whole at every call
    (tests/kv_write/test_compiled.py reads this off the compiled HLO).
    """
    used = num_rows_used(num_kv_heads, head_dim)
    smallest = max(2, 4 // jnp.dtype(dtype).itemsize)
    for rows in (smallest, 4, 8):
        if used <= rows:
            return rows
    return -(-used // 8) * 8


def heads_of_rows(num_rows_of_pool: int, head_dim: int, dtype: jax.typing.DTypeLike) -> list[int]:
    """Every K whose pool has this many rows; if no pool is made with them, the K that fill them.

    >>> heads_of_rows(8, 128, jnp.bfloat16), heads_of_rows(6, 128, jnp.bfloat16)
    ([3, 4], [3])
    """
    of_one = num_rows_used(1, head_dim)
    # Padding is less than 8 rows.
    fit = range(max(1, (num_rows_of_pool - 7) // of_one), num_rows_of_pool // of_one + 1)
    made = [heads for heads in fit if num_rows(heads, head_dim, dtype) == num_rows_of_pool]
    return made or [heads for heads in fit if num_rows_used(heads, head_dim) == num_rows_of_pool]


def heads_of_width(
    width: int, num_rows_of_pool: int, num_lanes_of_pool: int, dtype: jax.typing.DTypeLike
) -> list[tuple[int, int]]:
    """Every (K, H) with `K * H == width` whose pool has these rows and lanes.

    >>> heads_of_width(768, 8, 256, jnp.bfloat16), heads_of_width(1024, 8, 256, jnp.bfloat16)
    ([(3, 256), (4, 192)], [(4, 256)])
    """
    packed = heads_of_rows(num_rows_of_pool, HALF_LANES, dtype)
    paired = heads_of_rows(num_rows_of_pool, LANES, dtype)
    return [
        (heads, width // heads)
        for is_packed, candidates in ((False, paired), (True, packed))
        for heads in candidates
        if width % heads == 0
        and packs_kv_in_row(width // heads) == is_packed
        and num_lanes(width // heads) == num_lanes_of_pool
    ]


def pool_shape(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[int, int, int, int]:
    """Shape `[P, page_size, R, C]` of the pool that `make_kv_pages` makes."""
    return (
        num_pages,
        page_size,
        num_rows(num_kv_heads, head_dim, dtype),
        num_lanes(head_dim),
    )


def make_kv_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    *,
    num_shards: int = 1,
) -> jax.Array:
    """Makes an empty pool of `num_pages` pages of `page_size` tokens.

    Args:
      num_pages: P. For a model with L layers make one flat pool of `L * P` pages: a `lax.scan` over
        the layers then needs no copy of it.
      page_size: tokens in a page, >= 1.
      num_kv_heads: K, >= 1.
      head_dim: H, 1 to 256.
      dtype: float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
      num_shards: the number of devices that its heads are sharded over, a divisor of K. R is then
        the sum of what each shard needs, so that `PartitionSpec(None, None, "x")` gives each device
        the pool that it would make for its own `K / num_shards` heads.

    Returns:
      The pool, `kv_pages[P, page_size, R, C]`, all zeros.

    Raises:
      ValueError: a size or the dtype is outside these bounds.

    >>> make_kv_pages(10, 16, num_kv_heads=8, head_dim=128).shape
    (10, 16, 16, 128)
    >>> make_kv_pages(10, 16, num_kv_heads=8, head_dim=64).shape
    (10, 16, 8, 128)
    >>> make_kv_pages(10, 16, num_kv_heads=2, head_dim=64, num_shards=2).shape  # R is 2 a shard
    (10, 16, 4, 128)
    """
    sizes = {
        "num_pages": num_pages,
        "page_size": page_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_shards": num_shards,
    }
    for name, value in sizes.items():
        size = scalars.read_int(value)
        if size is None or not 1 <= size < 2**31:
            raise ValueError(
                f"make_kv_pages: {name} is {scalars.show(value)}; wanted an integer >= 1 and below "
                "2**31"
            )
        sizes[name] = size
    num_pages, page_size, num_kv_heads, head_dim, num_shards = sizes.values()
    if num_kv_heads % num_shards:
        raise ValueError(
            f"make_kv_pages: num_shards is {num_shards}; wanted a divisor of the {num_kv_heads} KV "
            "heads: where there are more devices than heads, replicate the heads"
        )
    if head_dim > 2 * LANES:
        raise ValueError(
            f"make_kv_pages: head_dim is {head_dim}; wanted at most {2 * LANES}: split the head"
        )
    if _dtype_or_none(dtype) not in POOL_DTYPES:
        raise ValueError(
            f"make_kv_pages: dtype is {_dtype_or_none(dtype) or scalars.show(dtype)}; "
            f"wanted one of {', '.join(map(str, POOL_DTYPES))}"
        )
    if num_pages * page_size >= 2**31:
        raise ValueError(
            f"make_kv_pages: num_pages * page_size is {num_pages * page_size}; wanted below 2**31, "
            "because a slot is an int32: use fewer pages or multiple pools"
        )
    shard = pool_shape(num_pages, page_size, num_kv_heads // num_shards, head_dim, dtype)
    return jnp.zeros((*shard[:2], num_shards * shard[2], shard[3]), dtype)


def _dtype_or_none(dtype: jax.typing.DTypeLike) -> np.dtype | None:
    """The dtype that is named, or None. An array only has a dtype; numpy takes None for float64."""
    if dtype is None or isinstance(dtype, jax.Array | np.ndarray | np.generic):
        return None
    try:
        return jnp.dtype(dtype)
    except TypeError:
        return None


def split_heads(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """`[T, K, H]` of k or v in either of its forms, `[T, K, H]` or `[T, K*H]`."""
    return x.reshape(x.shape[0], num_kv_heads, -1)


def padded_head_dim(head_dim: int) -> int:
    """Lanes that the pool has for K of one head, and as many for V."""
    return HALF_LANES if packs_kv_in_row(head_dim) else num_lanes(head_dim)


def pad_heads(x: jax.Array) -> jax.Array:
    """Heads `[..., H]` with zeros up to the lanes that the pool has for each: a copy, if any."""
    missing = padded_head_dim(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x


def merge_kv(k: jax.Array, v: jax.Array, num_rows: int) -> jax.Array:
    """Slots `[T, R, C]` of k and v `[T, K, H]`, with zeros in the padding rows and lanes."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if packs_kv_in_row(head_dim):
        pad = ((0, 0), (0, 0), (0, HALF_LANES - head_dim))
        slots = jnp.concatenate([jnp.pad(k, pad), jnp.pad(v, pad)], axis=-1)
    else:
        slots = jnp.stack([k, v], axis=2).reshape(num_tokens, 2 * num_kv_heads, head_dim)
        slots = jnp.pad(slots, ((0, 0), (0, 0), (0, num_lanes(head_dim) - head_dim)))
    return jnp.pad(slots, ((0, 0), (0, num_rows - slots.shape[1]), (0, 0)))


def split_kv(slots: jax.Array, num_kv_heads: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """k and v `[..., K, H]` of slots `[..., R, C]`: the inverse of `merge_kv`."""
    if packs_kv_in_row(head_dim):
        rows = slots[..., :num_kv_heads, :]
        return rows[..., :head_dim], rows[..., HALF_LANES : HALF_LANES + head_dim]
    rows = slots[..., : 2 * num_kv_heads, :head_dim]
    return rows[..., 0::2, :], rows[..., 1::2, :]


def flatten_slots(kv_pages: jax.Array) -> jax.Array:
    """The pool by slot, `[P * page_size, R, C]`: slot = page * page_size + row (no copy)."""
    return kv_pages.reshape(-1, *kv_pages.shape[2:])


def result_like(kv_pages: jax.Array) -> jax.ShapeDtypeStruct:
    """The result of a kernel that updates the pool, varying over a shard_map's axes as it does."""
    return jax.ShapeDtypeStruct(
        kv_pages.shape, kv_pages.dtype, manual_axis_type=jax.typeof(kv_pages).manual_axis_type
    )


def to_words(slots: jax.Array) -> jax.Array:
    """Slots `[..., R, C]` of a 16- or 8-bit dtype as uint32 words `[..., words, C]`.

    Two or four rows share a word, the first in the low bits, as in the memory of a TPU.
    """
    per_word = 4 // slots.dtype.itemsize
    *rest, num_rows, num_lanes = slots.shape
    rows = slots.reshape(*rest, num_rows // per_word, per_word, num_lanes)
    return jax.lax.bitcast_convert_type(jnp.moveaxis(rows, -2, -1), jnp.uint32)


def from_words(words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The inverse of `to_words`."""
    rows = jnp.moveaxis(jax.lax.bitcast_convert_type(words, dtype), -1, -2)
    *rest, num_words, per_word, num_lanes = rows.shape
    return rows.reshape(*rest, num_words * per_word, num_lanes)
