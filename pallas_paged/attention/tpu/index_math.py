# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Division of traced int32 scalars by static numbers, without the correction for negative ones."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def div(x: Any, n: int) -> Any:
    """`x // n` for x >= 0: one shift where n is a power of 2."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, jnp.int32(n))


def ceil_div(x: Any, n: int) -> Any:
    """`x / n` for x >= 0, rounded up."""
    return div(x + (n - 1), n)


def rem(x: Any, n: int) -> Any:
    """`x % n` for x >= 0: one mask where n is a power of 2."""
    return x & (n - 1) if n & (n - 1) == 0 else lax.rem(x, jnp.int32(n))
