# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Registers to and from rows of device memory, only those that are wanted.

Row r of the 64 that a warpgroup holds for the matrix unit stands for token `first_row + r // group`
of the batch and head `first_head + r % group`. Pallas has no predicated loads and stores of
registers, so these are inline Mosaic GPU; the interpreter, which has none, takes loops.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf, vector

_REF = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT
_TILE = plgpu.Layout.WGMMA
_COLUMN = plgpu.Layout.WGMMA.reduce(1)


def store(value, ref, first_row, first_head, begin, end, group: int, is_interpreted: bool) -> None:
    """`ref[first_row + r // group, first_head + r % group] = value[r]` for `begin <= r < end`.

    Args:
      value: [64, H] in the layout of a product's result, or one value a row, [64].
      ref: [rows, heads, H] or [rows, heads] in device memory, of the same dtype.
      first_row, first_head, begin, end: int32 scalars.
      group: heads to a row of the batch.
      is_interpreted: whether Pallas interprets the kernel.
    """
    if is_interpreted:

        def store_row(r, _):
            ref[first_row + r // group, first_head + r % group] = value[r]

        _each_row(value.shape[0], begin, end, store_row)
        return

    is_column = value.ndim == 1
    layout = _COLUMN if is_column else _TILE

    @plgpu.inline_mgpu(arg_types=(_REF, layout, _SCALAR, _SCALAR, _SCALAR, _SCALAR))
    def run(_, out, rows, *scalars):
        row, head, begin, end = map(_index, scalars)
        for i, mine in _column_rows(rows) if is_column else _by_row(rows):
            with mgpu.when(_is_between(i, begin, end)):
                target = _target(i, row, head, group)
                if is_column:
                    memref.store(_element(mine), out, target)
                else:
                    for j, register in mine:
                        vector.store(rows.registers[register], out, [*target, j])

    run(ref, value, first_row, first_head, begin, end)


def load(ref, first_row, first_head, end, group: int, shape, is_interpreted: bool) -> jax.Array:
    """[64, H]: row r is `ref[first_row + r // group, first_head + r % group]`, 0 from `end` on.

    Arguments as in `store`; the result is an operand of the matrix unit, in registers.
    """
    if is_interpreted:

        def load_row(r, rows):
            row = ref[first_row + r // group, first_head + r % group]
            return lax.dynamic_update_slice(rows, row[None], (r, 0))

        return lax.fori_loop(0, jnp.clip(end, 0, shape[0]), load_row, jnp.zeros(shape, ref.dtype))

    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=_TILE)

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _SCALAR, _SCALAR), return_type=result)
    def run(_, source, *scalars):
        row, head, end = map(_index, scalars)
        element = ir.MemRefType(source.type).element_type
        zero = arith.constant(element, ir.FloatAttr.get(element, 0.0))
        tile = mgpu.FragmentedArray.splat(zero, shape, _TILE.to_mgpu())
        registers = tile.registers.copy()
        kind = registers.flat[0].type
        for i, mine in _by_row(tile):
            branch = scf.IfOp(_is_less(i, end), [kind] * len(mine), has_else=True)
            with ir.InsertionPoint(branch.then_block):
                target = _target(i, row, head, group)
                scf.yield_([vector.load(kind, source, [*target, j]) for j, _ in mine])
            with ir.InsertionPoint(branch.else_block):
                scf.yield_([registers[register] for _, register in mine])
            for (_, register), loaded in zip(mine, branch.results, strict=True):
                registers[register] = loaded
        return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

    return run(ref, first_row, first_head, end)


def load_per_head(ref, first_head, group: int, num_rows: int, is_interpreted: bool) -> jax.Array:
    """f32[64]: row r is `ref[first_head + r % group]` of ref f32[heads]."""
    if is_interpreted:

        def load_row(r, rows):
            return lax.dynamic_update_slice(rows, ref[first_head + r % group][None], (r,))

        return lax.fori_loop(0, num_rows, load_row, jnp.zeros((num_rows,), jnp.float32))

    result = plgpu.ShapeDtypeStruct((num_rows,), jnp.dtype(jnp.float32), layout=_COLUMN)

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR), return_type=result)
    def run(_, source, head):
        zero = arith.constant(ir.F32Type.get(), 0.0)
        column = mgpu.FragmentedArray.splat(zero, (num_rows,), _COLUMN.to_mgpu())
        registers = column.registers.copy()
        kind = registers.flat[0].type
        indices = list(_column_rows(column))
        for (i, _), place in zip(indices, np.ndindex(registers.shape), strict=True):
            (_, at) = _target(i, _constant(0), _index(head), group)
            loaded = memref.load(source, [at])
            registers[place] = (
                vector.broadcast(kind, loaded) if isinstance(kind, ir.VectorType) else loaded
            )
        return mgpu.FragmentedArray(_registers=registers, _layout=column.layout, _is_signed=None)

    return run(ref, first_head)


def store_heads(value, ref, row, first_head, group: int, is_interpreted: bool) -> None:
    """`ref[row, first_head + i // H, i % H] = value[i]` for `i < group * H`.

    Args:
      value: [group * H or more], strided over a warpgroup's threads.
      ref: [rows, heads, H] in device memory, of the same dtype.
      row, first_head: int32 scalars.
      group: heads.
      is_interpreted: whether Pallas interprets the kernel.
    """
    head_dim = ref.shape[-1]
    if is_interpreted:
        heads = value[: group * head_dim].reshape(group, head_dim)
        ref[row, pl.ds(first_head, group)] = heads
        return

    def store_vector(out, i, vector_, row, head):
        target = [row, arith.addi(head, arith.divui(i, _constant(head_dim)))]
        target.append(arith.remui(i, _constant(head_dim)))
        pointer = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(out, tuple(target)))
        # A store that does not say how it is aligned is split into single values.
        llvm.store(vector_, pointer, alignment=mgpu.utils.bitwidth(vector_.type) // 8)

    _store_strided(value, ref, row, first_head, group * head_dim, store_vector)


def store_heads_column(
    value, ref, row, first_head, group: int, is_interpreted: bool, head_dim: int
) -> None:
    """`ref[row, first_head + n] = value[n * head_dim]` for n < group; arguments as above."""
    if is_interpreted:
        for n in range(group):
            ref[row, first_head + n] = value[n * head_dim]
        return

    def store_first(out, i, vector_, row, head):
        size = _constant(head_dim)
        is_first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(i, size), _constant(0))
        with mgpu.when(is_first):
            memref.store(_element(vector_), out, [row, arith.addi(head, arith.divui(i, size))])

    _store_strided(value, ref, row, first_head, group * head_dim, store_first)


def _store_strided(value, ref, row, first_head, size: int, store_vector) -> None:
    """`store_vector(ref, i, register, row, head)` of each register whose first value i < size."""
    vec_size = next(n for n in (4, 2, 1) if value.shape[0] // 128 % n == 0)
    layout = plgpu.Layout.WG_STRIDED(value.shape, vec_size=vec_size)

    @plgpu.inline_mgpu(arg_types=(_REF, layout, _SCALAR, _SCALAR))
    def run(_, out, strip, row, head):
        row, head = _index(row), _index(head)
        indices = strip.layout.linear_thread_idxs()
        for i, register in zip(indices, strip.registers.flat, strict=True):
            if size == value.shape[0]:
                store_vector(out, i, register, row, head)
            else:
                with mgpu.when(_is_less(i, _constant(size))):
                    store_vector(out, i, register, row, head)

    run(ref, value, row, first_head)


def _each_row(num_rows, begin, end, body):
    lax.fori_loop(jnp.clip(begin, 0, num_rows), jnp.clip(end, 0, num_rows), body, None)


def _index(scalar):
    return arith.index_cast(ir.IndexType.get(), scalar.registers.item())


def _constant(value: int):
    return mgpu.utils.c(value, ir.IndexType.get())


def _is_less(a, b):
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _is_between(i, begin, end):
    return arith.andi(arith.cmpi(arith.CmpIPredicate.sle, begin, i), _is_less(i, end))


def _target(i, row, head, group: int):
    """The row and head that row i of the registers stands for."""
    if group == 1:
        return [arith.addi(row, i), head]
    size = _constant(group)
    return [arith.addi(row, arith.divui(i, size)), arith.addi(head, arith.remui(i, size))]


def _by_row(tile):
    """(row, [(column, register)]) of each row that a thread holds registers of."""
    rows: dict = {}
    registers = np.ndindex(tile.registers.shape)
    for (i, j), register in zip(tile.layout.thread_idxs(tile.shape), registers, strict=True):
        # The second dimension alone goes over columns; the others say which row.
        rows.setdefault(register[:1] + register[2:], (i, []))[1].append((j, register))
    return rows.values()


def _column_rows(column):
    indices = column.layout.thread_idxs(column.shape)
    return [(i, r) for (i,), r in zip(indices, column.registers.flat, strict=True)]


def _element(register):
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, dynamic_position=[], static_position=[0])
    return register
