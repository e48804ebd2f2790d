# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Brings the KV blocks of a quantised pool from raw stages into stages of the products' dtype."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf, vector

from pallas_paged.attention.gpu.kv_blocks import KvStages, index_constant, store_16_bytes
from pallas_paged.attention.gpu.mma_layout import operand_transforms
from pallas_paged.attention.gpu.spec import WARPGROUP, KernelSpec, Ref, Scalar


def convert_blocks(
    raw: KvStages, ready: KvStages, step: Scalar, count: Scalar, spec: KernelSpec
) -> Scalar:
    """Converts the next `count` blocks from the step-th on, and returns the step after them."""
    lax.fori_loop(0, count, lambda i, _: _convert(raw, ready, step + i, spec), None)
    return step + count


def _convert(raw: KvStages, ready: KvStages, step: Scalar, spec: KernelSpec) -> None:
    """Converts the step-th block to the dtype of the products, exactly and without scales."""
    source, target = raw.stage(step), ready.stage(step)
    plgpu.barrier_wait(raw.full.at[source])
    plgpu.barrier_wait(ready.empty.at[target])
    if spec.is_interpreted:
        values = raw.smem[source].swapaxes(0, 1).reshape(ready.smem.shape[1:])
        ready.smem[target] = values.astype(ready.smem.dtype)
    else:
        _convert_block(raw.smem.at[source], ready.smem.at[target], spec)
    plgpu.commit_smem()
    plgpu.barrier_arrive(raw.empty.at[source])
    plgpu.barrier_arrive(ready.full.at[target])


def _convert_block(source: Ref, target: Ref, spec: KernelSpec) -> None:
    """Converts 8 values at a time: loads 8 bytes, and stores 16 where the swizzle puts them."""
    width = 8
    _, block_kv, box = source.shape
    at_once = 4  # so that their loads and conversions overlap
    steps = block_kv * spec.kv_dim // (WARPGROUP * width * at_once)
    operand = plgpu.RefType(operand_transforms(spec.product_dtype))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), operand))
    def run(_: Any, raw: ir.Value, tiles: ir.Value) -> None:
        # raw: [2H / box, block_kv, box], tiles: [block_kv / 8, 2H / 64, 8, 64]
        vectors, eight = index_constant(spec.kv_dim // width), index_constant(8)
        thread = arith.remui(gpu.thread_id(gpu.Dimension.x), index_constant(WARPGROUP))

        def load(item: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
            row, vector_ = arith.divui(item, vectors), arith.remui(item, vectors)
            vectors_of_box = index_constant(box // width)
            column = arith.muli(arith.remui(vector_, vectors_of_box), index_constant(width))
            indices = [arith.divui(vector_, vectors_of_box), row, column]
            return row, vector_, _load_8_bytes(raw, indices)

        def store(row: ir.Value, vector_: ir.Value, words: ir.Value) -> None:
            # A tile's row is 8 vectors of 16 bytes. Vector v of row r lies at v ^ r.
            in_tile = arith.remui(row, eight)
            swizzled = arith.xori(arith.remui(vector_, eight), in_tile)
            indices = [
                arith.divui(row, eight),
                arith.divui(vector_, eight),
                in_tile,
                arith.muli(swizzled, index_constant(width)),
            ]
            store_16_bytes(_widen(words, spec), tiles, indices)

        loop = scf.ForOp(index_constant(0), index_constant(steps), index_constant(1))
        with ir.InsertionPoint(loop.body):
            first = arith.muli(loop.induction_variable, index_constant(WARPGROUP * at_once))
            first = arith.addi(first, thread)
            loaded = [
                load(arith.addi(first, index_constant(n * WARPGROUP))) for n in range(at_once)
            ]
            for item in loaded:
                store(*item)
            scf.yield_([])

    run(source, target)


def _load_8_bytes(ref: ir.Value, indices: list[ir.Value]) -> ir.Value:
    """Loads two words from an element of a ref that lies at a multiple of 8 bytes."""
    source = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(ref, tuple(indices)))
    words = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
    return llvm.load(words, source, alignment=8)


def _widen(words: ir.Value, spec: KernelSpec) -> ir.Value:
    """Two words of 8-bit values in the dtype of the products: four words of two values each."""
    pairs = [pair for n in range(2) for pair in _convert_four(_extract(words, n), spec)]
    return vector.from_elements(ir.VectorType.get((4,), ir.IntegerType.get_signless(32)), pairs)


def _extract(words: ir.Value, n: int) -> ir.Value:
    return vector.extract(words, dynamic_position=[], static_position=[n])


def _convert_four(word: ir.Value, spec: KernelSpec) -> list[ir.Value]:
    """Two words of 16-bit pairs from a word of four 8-bit values."""
    i32 = ir.IntegerType.get_signless(32)
    narrow = {"float8_e4m3fn": "e4m3x2", "float8_e5m2": "e5m2x2"}[spec.pool_dtype.name]
    if spec.product_dtype == jnp.float16:
        last = "mov.b32 $0, f0; mov.b32 $1, f1;"
    else:  # float16 holds every 8-bit float; bfloat16 holds those too
        last = " ".join(
            f"mov.b32 {{h{2 * n}, h{2 * n + 1}}}, f{n}; cvt.f32.f16 w{2 * n}, h{2 * n}; "
            f"cvt.f32.f16 w{2 * n + 1}, h{2 * n + 1}; "
            f"cvt.rn.bf16x2.f32 ${n}, w{2 * n + 1}, w{2 * n};"
            for n in range(2)
        )
    asm = (
        "{ .reg .b16 lo, hi; .reg .b16 h<4>; .reg .b32 f<2>; .reg .f32 w<4>; "
        f"mov.b32 {{lo, hi}}, $2; cvt.rn.f16x2.{narrow} f0, lo; cvt.rn.f16x2.{narrow} f1, hi; "
        f"{last} }}"
    )
    both = llvm.inline_asm(
        llvm.StructType.get_literal([i32, i32]), [word], asm, "=r,=r,r", has_side_effects=False
    )
    return [llvm.extractvalue(i32, both, [n]) for n in range(2)]
