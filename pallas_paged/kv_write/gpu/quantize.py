# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Converts values to a pool of another dtype in a GPU's registers: `oracle.quantize`, bit for bit.

The hardware's conversions round as the oracle does, but they make every NaN the same one: its sign
and the oracle's code are put back.
"""

import jax
import jax.numpy as jnp
from jax import lax

_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def quantize(x: jax.Array, inverse_scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """`x` as the pool holds it.

    Args:
      x: float32, bfloat16 or float16, any shape.
      inverse_scale: float32[], for 8-bit pools.
      dtype: the pool's dtype.
    """
    x = x.astype(jnp.float32)
    if dtype == jnp.float32:
        return x
    if inverse_scale is not None:
        x = x * inverse_scale
    return _to_int8(x) if dtype == jnp.int8 else _to_float(x, dtype)


def _to_int8(x: jax.Array) -> jax.Array:
    y = jnp.where(x != x, 0.0, jnp.minimum(jnp.maximum(x, -128.0), 127.0))
    # Adding 1.5 * 2**23 leaves the integer, rounded half to even, in the low mantissa bits.
    return lax.bitcast_convert_type(y + jnp.float32(3 << 22), jnp.int32).astype(jnp.int8)


def _to_float(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    info = jnp.finfo(dtype)
    uint = _UINT[info.bits // 8]
    is_nan = x != x
    y = x
    if info.bits == 8:
        y = jnp.minimum(jnp.maximum(x, -float(info.max)), float(info.max))
    code = lax.bitcast_convert_type(jnp.where(is_nan, 0.0, y).astype(dtype), uint)
    sign = lax.bitcast_convert_type(x, jnp.uint32) >> (32 - info.bits) & (1 << (info.bits - 1))
    # In 32 bits, because Mosaic cannot select among 8-bit values.
    nan = jnp.where(is_nan, sign | _nan_code(dtype), jnp.uint32(0)).astype(uint)
    return lax.bitcast_convert_type(code | nan, dtype)


def _nan_code(dtype: jnp.dtype) -> int:
    """The bits of the quiet NaN that has no sign and no payload."""
    if dtype == jnp.float8_e4m3fn:
        return 0x7F  # its only one
    info = jnp.finfo(dtype)
    return ((1 << info.nexp) - 1) << info.nmant | 1 << (info.nmant - 1)
