# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Keeps XLA from fusing a kernel that updates an operand in place with slices around it.

XLA for GPUs wraps a custom call whose operand is a slice, or whose result goes into a dynamic
update slice, into one fusion (`DynamicSliceFusionRewriterV2`, on by default since July 2026). The
fusion forgets which operand the call updates in place: the call then writes into the array that
was sliced, which nobody donated, and its result is memory that nobody wrote. It happens in
`lax.scan` and `lax.map`, for a slice with a constant index as for a traced one, and any sliced
operand is enough. `tests/package/xla_slice_fusion.py` reproduces it without this package.
"""

from typing import TypeVar

import jax
from jax import lax

Arrays = TypeVar("Arrays")


def unfused(arrays: Arrays) -> Arrays:
    """Returns a pytree of arrays as it is, with a barrier after it that XLA does not fuse across.

    Every operand and every result of a call that updates an operand in place goes through here. The
    barrier is gone when XLA assigns buffers, so it copies nothing by itself. A slice is copied to
    an array of its own, as XLA does for every call that it does not fuse. Each array has its own
    barrier, because XLA may look through a barrier of a tuple.
    """
    return jax.tree.map(lax.optimization_barrier, arrays)
