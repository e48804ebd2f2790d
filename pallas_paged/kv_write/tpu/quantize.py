# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Converts values to the pool's bits in a TPU's registers: `oracle.quantize`, bit for bit."""

import jax
import jax.numpy as jnp
from jax import lax


def quantize(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 values, scaled already, as the pool's bits in the low bits of uint32."""
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.uint32)
    if dtype == jnp.bfloat16:
        rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
        return lax.bitcast_convert_type(rounded, jnp.uint32) >> 16
    if dtype == jnp.int8:
        return _to_int8(x)
    return _to_fp8(x, dtype)


def _to_int8(x: jax.Array) -> jax.Array:
    y = jnp.where(x != x, 0.0, jnp.clip(x, -128.0, 127.0))
    # Adding 1.5 * 2**23 leaves the integer, rounded half to even, in the low mantissa bits.
    magic = jnp.float32(3 << 22)
    return lax.bitcast_convert_type(y + magic, jnp.uint32) & 0xFF


def _to_fp8(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds to nearest even in integers: the same bits on every generation and on a CPU."""
    info = jnp.finfo(dtype)
    num_mantissa, min_exponent = info.nmant, int(info.minexp)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    largest = lax.bitcast_convert_type(jnp.float32(info.max), jnp.uint32)
    clipped = jnp.minimum(magnitude, largest)  # infinities too; NaN is put back below
    # Normal range: rebias the exponent, then round away the surplus mantissa bits.
    shift = 23 - num_mantissa
    rebias = (127 + min_exponent - 1) << 23
    odd = (clipped >> shift) & 1
    normal = (clipped - rebias + ((1 << (shift - 1)) - 1) + odd) >> shift
    # Subnormals: adding this power of two makes the float32 adder round at their spacing.
    magic = jnp.float32(2.0 ** (min_exponent - num_mantissa + 23))
    magic_bits = lax.bitcast_convert_type(magic, jnp.uint32)
    value = lax.bitcast_convert_type(clipped, jnp.float32)
    subnormal = lax.bitcast_convert_type(value + magic, jnp.uint32) - magic_bits
    smallest_normal = (127 + min_exponent) << 23
    code = jnp.where(clipped < smallest_normal, subnormal, normal)
    nan_code = 0x7F if dtype == jnp.float8_e4m3fn else 0x7E
    return sign | jnp.where(magnitude > 0x7F800000, nan_code, code)
