# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""From pool slots in VMEM to the matrix unit's operands: the keys and values of one head.

The slots of a KV block lie in VMEM as 32-bit words. Each token has its word rows of 128 lanes one
after another, and tokens are an odd number of rows apart, so that a load that strides over tokens
hits every memory bank. Two such loads, of the even tokens and of the odd ones, hold what a register
of bfloat16 pairs needs, in the order of the pairs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout

# Halves of a 32-bit word: the first of a pair of bfloat16 values, and the second.
LOW, HIGH = 0xFFFF, 0xFFFF0000

# `load(word, lane_tile, parity)` gives uint32[tokens or tokens / 2, 128]: one word row of all
# tokens (parity None), of the even ones (0) or of the odd ones (1).
Load = Callable[[int, int, int | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Heads:
    """The shapes and dtypes of q's heads and of the pool's slots.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K and H.
      pool_dtype: dtype of the pool.
      num_rows: R, rounded up to whole words.
      q_dtype: float32 or bfloat16.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    pool_dtype: jnp.dtype
    num_rows: int
    q_dtype: jnp.dtype

    @property
    def group(self) -> int:
        """G, the query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def lanes(self) -> int:
        """C, the lanes of a row of the pool."""
        return layout.num_lanes(self.head_dim)

    @property
    def lane_tiles(self) -> int:
        """Registers of 128 lanes that hold C lanes."""
        return self.lanes // layout.LANES

    @property
    def rows_per_word(self) -> int:
        """Pool rows that one 32-bit word holds."""
        return 4 // self.pool_dtype.itemsize

    @property
    def num_words(self) -> int:
        """Rows of words in a slot."""
        return self.num_rows // self.rows_per_word

    @property
    def pitch(self) -> int:
        """Word rows from one token to the next in VMEM: odd, so that strides meet all banks."""
        return self.num_words | 1

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of the matrix products' operands: float32 if q or the pool is, else bfloat16."""
        is_float32 = jnp.float32 in (self.q_dtype, self.pool_dtype)
        return jnp.dtype(jnp.float32 if is_float32 else jnp.bfloat16)

    @property
    def precision(self) -> lax.Precision | None:
        """Precision of the matrix products."""
        return lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else None

    @property
    def value_lane(self) -> int:
        """Lane where a value begins in the operand that holds it."""
        return layout.HALF_LANES if layout.packs_kv_in_row(self.head_dim) else 0

    def rows(self, head: int) -> tuple[int, int]:
        """Pool rows of K and V of a KV head."""
        if layout.packs_kv_in_row(self.head_dim):
            return head, head
        return 2 * head, 2 * head + 1


def keys(heads: Heads, load: Load, head: int) -> jax.Array:
    """K of one head: `compute_dtype`[tokens, C], zero in the lanes from H on.

    Args:
      heads: shapes and dtypes.
      load: loads the words of the tokens, see `Load`.
      head: the KV head.
    """
    return jnp.concatenate(
        [
            _operand(heads, load, heads.rows(head)[0], c, _lane_mask(heads, c))
            for c in range(heads.lane_tiles)
        ],
        axis=1,
    )


def values(
    heads: Heads, load: Load, head: int, is_token: Callable[[int | None], jax.Array] | None
) -> jax.Array:
    """V of one head: `compute_dtype`[tokens, C] with V from lane `value_lane` on.

    Rows that hold no token are zeros.

    Args:
      heads, load, head: as for `keys`.
      is_token: `is_token(parity)`, bool[tokens or tokens / 2, 128], says which rows hold a token;
        None if all do. The others may hold NaN, which a weight of 0 does not turn into 0.
    """
    if is_token is None:
        mask = None
    elif heads.compute_dtype == jnp.float32:
        mask = jnp.where(is_token(None), jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    else:
        mask = jnp.where(is_token(0), jnp.uint32(LOW), jnp.uint32(0))
        mask |= jnp.where(is_token(1), jnp.uint32(HIGH), jnp.uint32(0))
    row = heads.rows(head)[1]
    return jnp.concatenate(
        [_operand(heads, load, row, c, mask) for c in range(heads.lane_tiles)], axis=1
    )


def _lane_mask(heads: Heads, lane_tile: int) -> jax.Array | None:
    """The bits that keep the lanes below H, None if all are; the others may hold V, or NaN."""
    used = heads.head_dim - lane_tile * layout.LANES
    if used >= layout.LANES:
        return None
    lane = lax.broadcasted_iota(jnp.int32, (1, layout.LANES), 1)
    return jnp.where(lane < used, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))


def _operand(
    heads: Heads, load: Load, row: int, lane_tile: int, mask: jax.Array | None
) -> jax.Array:
    """One lane tile of one pool row of every token: `compute_dtype`[tokens, 128]."""
    word, part = divmod(row, heads.rows_per_word)
    if heads.compute_dtype == jnp.float32:
        bits = _float_bits(load(word, lane_tile, None), part, heads.pool_dtype)
        return lax.bitcast_convert_type(bits if mask is None else bits & mask, jnp.float32)
    even, odd = load(word, lane_tile, 0), load(word, lane_tile, 1)
    if heads.pool_dtype == jnp.bfloat16 and part == 0:
        pairs = (even & LOW) | (odd << 16)
    else:
        even, odd = (_float_bits(x, part, heads.pool_dtype) for x in (even, odd))
        pairs = (even >> 16) | (odd & jnp.uint32(HIGH))
    return pltpu.bitcast(pairs if mask is None else pairs & mask, jnp.bfloat16)


def _float_bits(words: jax.Array, part: int, dtype: jnp.dtype) -> jax.Array:
    """float32 bit patterns of value number `part` of each 32-bit word. No value is rounded."""
    if dtype == jnp.float32:
        return words
    if dtype == jnp.bfloat16:
        return words & jnp.uint32(HIGH) if part else words << 16
    byte = (words >> (8 * part)) & 0xFF if part < 3 else words >> 24
    if dtype == jnp.int8:
        signed = lax.bitcast_convert_type(byte << 24, jnp.int32) >> 24
        return lax.bitcast_convert_type(signed.astype(jnp.float32), jnp.uint32)
    return _fp8_bits(byte, dtype)


def _fp8_bits(byte: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 bit patterns of fp8 codes, by integers: not every generation can convert them."""
    info = jnp.finfo(dtype)
    num_mantissa, min_exponent = info.nmant, int(info.minexp)
    magnitude = byte & 0x7F
    shift = 23 - num_mantissa
    # The exponent is moved from the bias of the code to that of float32.
    normal = (magnitude << shift) + jnp.uint32((127 + min_exponent - 1) << 23)
    # Subnormal codes are multiples of the smallest one.
    smallest = jnp.float32(2.0 ** (min_exponent - num_mantissa))
    subnormal = lax.bitcast_convert_type(magnitude, jnp.int32).astype(jnp.float32) * smallest
    bits = jnp.where(
        magnitude < (1 << num_mantissa),
        lax.bitcast_convert_type(subnormal, jnp.uint32),
        normal,
    )
    if dtype == jnp.float8_e4m3fn:
        bits = jnp.where(magnitude == 0x7F, jnp.uint32(0x7FC00000), bits)
    else:  # float8_e5m2 has infinity at 0x7C and NaN above
        infinity = jnp.where(magnitude == 0x7C, jnp.uint32(0x7F800000), jnp.uint32(0x7FC00000))
        bits = jnp.where(magnitude >= 0x7C, infinity, bits)
    return bits | ((byte & 0x80) << 24)
