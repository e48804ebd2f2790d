# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Loads and stores rows between registers and device memory, only those rows that are wanted.

Pallas has no predicated loads and stores of registers, so these are inline Mosaic GPU. The
interpreter cannot run that and takes loops.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf, vector

from pallas_paged.attention.gpu.mma_layout import COLUMN, RESULT
from pallas_paged.attention.gpu.spec import Ref, Scalar

_REF = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """What the 64 rows of a warpgroup's registers stand for in the packed batch.

    Row r is token `first_token + r // group` and head `first_head + r % group`.
    """

    first_token: Scalar
    first_head: Scalar
    group: int

    def of(self, r: Scalar) -> tuple[Scalar, Scalar]:
        """(token, head) of row r."""
        return self.first_token + r // self.group, self.first_head + r % self.group


def store(
    value: jax.Array, ref: Ref, rows: BatchRows, begin: Scalar, end: Scalar, is_interpreted: bool
) -> None:
    """`ref[token, head of row r] = value[r]` for `begin <= r < end`.

    Args:
      value: [64, H] in the layout of a product's result, or one value per row, [64].
      ref: [tokens, heads, H] or [tokens, heads] in device memory, of the same dtype.
      rows: what the rows stand for.
      begin, end: which rows are stored.
      is_interpreted: whether Pallas interprets the kernel.
    """
    if is_interpreted:

        def store_row(r: Scalar, _: None) -> None:
            ref[rows.of(r)] = value[r]

        num_rows = value.shape[0]
        lax.fori_loop(jnp.clip(begin, 0, num_rows), jnp.clip(end, 0, num_rows), store_row, None)
        return

    is_column = value.ndim == 1
    layout = COLUMN if is_column else RESULT

    @plgpu.inline_mgpu(arg_types=(_REF, layout, _SCALAR, _SCALAR, _SCALAR, _SCALAR))
    def run(_: Any, out: ir.Value, values: mgpu.FragmentedArray, *scalars: Any) -> None:
        token, head, begin, end = map(_index, scalars)
        for i, mine in _rows_of_column(values) if is_column else _rows_of_result(values):
            with mgpu.when(_is_between(i, begin, end)):
                target = _target(i, token, head, rows.group)
                if is_column:
                    memref.store(_element(mine), out, target)
                else:
                    for j, register in mine:
                        vector.store(values.registers[register], out, [*target, j])

    run(ref, value, rows.first_token, rows.first_head, begin, end)


def load(
    ref: Ref, rows: BatchRows, end: Scalar, shape: tuple[int, int], is_interpreted: bool
) -> jax.Array:
    """[64, H]: row r is `ref[token, head of row r]`, and 0 from row `end` on.

    The arguments are those of `store`. The result is an operand of the matrix unit, in registers.
    """
    if is_interpreted:

        def load_row(r: Scalar, values: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(values, ref[rows.of(r)][None], (r, 0))

        return lax.fori_loop(0, jnp.clip(end, 0, shape[0]), load_row, jnp.zeros(shape, ref.dtype))

    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=RESULT)

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _SCALAR, _SCALAR), return_type=result)
    def run(_: Any, source: ir.Value, *scalars: Any) -> mgpu.FragmentedArray:
        token, head, end = map(_index, scalars)
        element = ir.MemRefType(source.type).element_type
        zero = arith.constant(element, ir.FloatAttr.get(element, 0.0))
        tile = mgpu.FragmentedArray.splat(zero, shape, RESULT.to_mgpu())
        registers = tile.registers.copy()
        kind = registers.flat[0].type
        for i, mine in _rows_of_result(tile):
            branch = scf.IfOp(_is_less(i, end), [kind] * len(mine), has_else=True)
            with ir.InsertionPoint(branch.then_block):
                target = _target(i, token, head, rows.group)
                scf.yield_([vector.load(kind, source, [*target, j]) for j, _ in mine])
            with ir.InsertionPoint(branch.else_block):
                scf.yield_([registers[register] for _, register in mine])
            for (_, register), loaded in zip(mine, branch.results, strict=True):
                registers[register] = loaded
        return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

    return run(ref, rows.first_token, rows.first_head, end)


def load_per_head(
    ref: Ref, first_head: Scalar, group: int, num_rows: int, is_interpreted: bool
) -> jax.Array:
    """f32[64]: row r is `ref[first_head + r % group]` of ref f32[heads]."""
    if is_interpreted:

        def load_row(r: Scalar, values: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(values, ref[first_head + r % group][None], (r,))

        return lax.fori_loop(0, num_rows, load_row, jnp.zeros((num_rows,), jnp.float32))

    result = plgpu.ShapeDtypeStruct((num_rows,), jnp.dtype(jnp.float32), layout=COLUMN)

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR), return_type=result)
    def run(_: Any, source: ir.Value, head: Any) -> mgpu.FragmentedArray:
        zero = arith.constant(ir.F32Type.get(), 0.0)
        column = mgpu.FragmentedArray.splat(zero, (num_rows,), COLUMN.to_mgpu())
        registers = column.registers.copy()
        kind = registers.flat[0].type
        indices = list(_rows_of_column(column))
        for (i, _), register in zip(indices, np.ndindex(registers.shape), strict=True):
            (_, at) = _target(i, _constant(0), _index(head), group)
            loaded = memref.load(source, [at])
            registers[register] = (
                vector.broadcast(kind, loaded) if isinstance(kind, ir.VectorType) else loaded
            )
        return mgpu.FragmentedArray(_registers=registers, _layout=column.layout, _is_signed=None)

    return run(ref, first_head)


def store_heads(
    value: jax.Array,
    ref: Ref,
    token: Scalar,
    first_head: Scalar,
    num_heads: int,
    is_interpreted: bool,
) -> None:
    """`ref[token, first_head + i // H, i % H] = value[i]` for `i < num_heads * H`.

    Args:
      value: [num_heads * H or more], strided over the threads of a warpgroup.
      ref: [tokens, heads, H] in device memory, of the same dtype.
      token, first_head: where the heads go.
      num_heads: how many heads are stored.
      is_interpreted: whether Pallas interprets the kernel.
    """
    head_dim = ref.shape[-1]
    if is_interpreted:
        heads = value[: num_heads * head_dim].reshape(num_heads, head_dim)
        ref[token, pl.ds(first_head, num_heads)] = heads
        return

    def store_vector(
        out: ir.Value, i: ir.Value, vector_: ir.Value, token: ir.Value, head: ir.Value
    ) -> None:
        target = [token, arith.addi(head, arith.divui(i, _constant(head_dim)))]
        target.append(arith.remui(i, _constant(head_dim)))
        pointer = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(out, tuple(target)))
        # A store that does not state its alignment is split into single values.
        llvm.store(vector_, pointer, alignment=mgpu.utils.bitwidth(vector_.type) // 8)

    _store_strided(value, ref, token, first_head, num_heads * head_dim, store_vector)


def store_heads_column(
    value: jax.Array,
    ref: Ref,
    token: Scalar,
    first_head: Scalar,
    num_heads: int,
    is_interpreted: bool,
    head_dim: int,
) -> None:
    """`ref[token, first_head + n] = value[n * head_dim]` for `n < num_heads`.

    The other arguments are those of `store_heads`.
    """
    if is_interpreted:
        for n in range(num_heads):
            ref[token, first_head + n] = value[n * head_dim]
        return

    def store_first(
        out: ir.Value, i: ir.Value, vector_: ir.Value, token: ir.Value, head: ir.Value
    ) -> None:
        size = _constant(head_dim)
        is_first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(i, size), _constant(0))
        with mgpu.when(is_first):
            memref.store(_element(vector_), out, [token, arith.addi(head, arith.divui(i, size))])

    _store_strided(value, ref, token, first_head, num_heads * head_dim, store_first)


def _store_strided(
    value: jax.Array,
    ref: Ref,
    token: Scalar,
    first_head: Scalar,
    size: int,
    store_vector: Callable[..., None],
) -> None:
    """`store_vector(ref, i, register, token, head)` of each register whose first value i < size."""
    vec_size = next(n for n in (4, 2, 1) if value.shape[0] // 128 % n == 0)
    layout = plgpu.Layout.WG_STRIDED(value.shape, vec_size=vec_size)

    @plgpu.inline_mgpu(arg_types=(_REF, layout, _SCALAR, _SCALAR))
    def run(_: Any, out: ir.Value, strip: Any, token: Any, head: Any) -> None:
        token, head = _index(token), _index(head)
        indices = strip.layout.linear_thread_idxs()
        for i, register in zip(indices, strip.registers.flat, strict=True):
            if size == value.shape[0]:
                store_vector(out, i, register, token, head)
            else:
                with mgpu.when(_is_less(i, _constant(size))):
                    store_vector(out, i, register, token, head)

    run(ref, value, token, first_head)


def _index(scalar: Any) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), scalar.registers.item())


def _constant(value: int) -> ir.Value:
    return mgpu.utils.c(value, ir.IndexType.get())


def _is_less(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _is_between(i: ir.Value, begin: ir.Value, end: ir.Value) -> ir.Value:
    return arith.andi(arith.cmpi(arith.CmpIPredicate.sle, begin, i), _is_less(i, end))


def _target(i: ir.Value, token: ir.Value, head: ir.Value, group: int) -> list[ir.Value]:
    """The token and the head that row i of the registers stands for, as `BatchRows.of` has them."""
    if group == 1:
        return [arith.addi(token, i), head]
    size = _constant(group)
    return [arith.addi(token, arith.divui(i, size)), arith.addi(head, arith.remui(i, size))]


def _rows_of_result(tile: mgpu.FragmentedArray) -> Iterable[tuple[ir.Value, Any]]:
    """(row, [(column, register)]) of each row of which a thread holds registers."""
    rows: dict[tuple[int, ...], tuple[ir.Value, list[Any]]] = {}
    registers = np.ndindex(tile.registers.shape)
    for (i, j), register in zip(tile.layout.thread_idxs(tile.shape), registers, strict=True):
        # The second dimension alone goes over columns; the others say which row.
        rows.setdefault(register[:1] + register[2:], (i, []))[1].append((j, register))
    return rows.values()


def _rows_of_column(column: mgpu.FragmentedArray) -> Iterable[tuple[ir.Value, Any]]:
    """(row, register) of each row of which a thread holds the value."""
    indices = column.layout.thread_idxs(column.shape)
    return [(i, r) for (i,), r in zip(indices, column.registers.flat, strict=True)]


def _element(register: ir.Value) -> ir.Value:
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, dynamic_position=[], static_position=[0])
    return register
