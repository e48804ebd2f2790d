# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Does XLA still lose an in-place update of a sliced operand?

`python tests/package/xla_slice_fusion.py` says it.

Needs a Hopper GPU and jax. When it prints that XLA is mended, `pallas_paged/unfused.py` can go.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def add_one(x):
    """`x + 1` by a kernel that updates a copy of x in place."""
    ref = jax.new_ref(x)

    def kernel(x):
        x[...] += 1.0

    plgpu.kernel(kernel, out_type=(), compiler_params=plgpu.CompilerParams())(ref)
    return ref[...]


if __name__ == "__main__":
    stack = jnp.ones((3, 128), jnp.float32)
    result = jax.jit(lambda stack: add_one(stack[1]))(stack)
    is_mended = bool(jnp.all(result == 2.0) & jnp.all(stack == 1.0))
    print("XLA is mended" if is_mended else f"result {result[0]}, its input {stack[:, 0].tolist()}")
