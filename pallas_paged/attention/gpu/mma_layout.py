# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The layouts of the matrix unit: its operands in shared memory, its results in registers.

A result is [64, columns] over the threads of a warpgroup. A column is one value per row, [64],
which lies where the rows of a result do.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.attention.gpu.spec import ROW_TILE, WARPGROUP_ROWS

RESULT = plgpu.Layout.WGMMA
COLUMN = plgpu.Layout.WGMMA.reduce(1)


def operand_transforms(dtype: Any) -> tuple[Any, ...]:
    """The form of an operand in shared memory: tiles of 8 rows of 128 swizzled bytes."""
    transforms: tuple[Any, ...] = (plgpu.TilingTransform, plgpu.SwizzleTransform)
    tiling, swizzle = transforms
    return tiling((ROW_TILE, 128 // jnp.dtype(dtype).itemsize)), swizzle(128)


def as_column(values: jax.Array) -> jax.Array:
    """Values [64], one per row, where the rows of a result are."""
    return plgpu.layout_cast(values, COLUMN)


def full_column(value: float) -> jax.Array:
    """f32[64], the same value in every row."""
    return as_column(jnp.full((WARPGROUP_ROWS,), value, jnp.float32))


def zero_result(num_columns: int) -> jax.Array:
    """f32[64, columns] of zeros."""
    return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, num_columns), jnp.float32), RESULT)


def over_columns(column: jax.Array, num_columns: int) -> jax.Array:
    """The value of each row, [64], in all columns of a result, [64, columns]."""
    return lax.broadcast_in_dim(column, (column.shape[0], num_columns), [0])


def row_indices() -> jax.Array:
    """int32[64]: the index of each row."""
    return plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=COLUMN)


def column_indices(shape: tuple[int, ...]) -> jax.Array:
    """int32[64, columns]: the index of each value's column."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=RESULT)


def keep_if(flag: jax.Array, x: jax.Array, other: float) -> jax.Array:
    """All of x, or `other` everywhere. The lowering does not broadcast a scalar flag by itself."""
    return jnp.where(lax.broadcast_in_dim(flag, x.shape, ()), x, other)
