# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Blocks of keys and values in shared memory: a ring that one warpgroup fills and others empty.

A block is `block` consecutive positions of one KV head, K and V side by side, `[block, 2H]`. The
producer asks for it piece by piece, one tensor copy a page (or a part of a page). Blocks of a
quantised pool come into a ring of their own, and a warpgroup turns them into the products' dtype
on their way to the other ring, so that the consumers see no difference.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf, vector

from pallas_paged.attention.gpu.schedule import (
    WARPGROUP,
    Shape,
    tiling,
)

# Values of a box of a tensor copy in each dimension, at most.
_MAX_BOX = 256


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots for blocks, and the barriers that say which are full and which are empty.

    Attributes:
      smem: [slots, block, 2H]; of a quantised pool [slots, 2H / box, block, box].
      full: a barrier a slot, which completes when its block is there.
      empty: a barrier a slot, at which all that read it arrive.
      cleared: a barrier at which all readers meet where one clears for all; None for one reader.
      num_slots: of the ring.
      first: its first slot, a traced scalar where several rings share the arrays.
    """

    smem: Any
    full: Any
    empty: Any
    cleared: Any
    num_slots: int
    first: Any = 0

    def slot(self, step) -> jax.Array:
        """The slot of the step-th block that goes through the ring."""
        return self.first + lax.rem(step, self.num_slots)

    def keys(self, slot, head_dim: int):
        """[block, H] of a slot: transposed, an operand of the matrix unit."""
        return self.smem.at[slot, :, pl.ds(0, head_dim)]

    def values(self, slot, head_dim: int):
        """[block, H] of a slot: an operand of the matrix unit."""
        return self.smem.at[slot, :, pl.ds(head_dim, head_dim)]

    def release_all(self) -> None:
        """What a reader does first: every slot is empty."""
        for slot in range(self.num_slots):
            plgpu.barrier_arrive(self.empty.at[self.first + slot])

    def drain(self, step) -> None:
        """What a writer does last: waits until all slots are empty again."""
        for i in range(self.num_slots):
            plgpu.barrier_wait(self.empty.at[self.slot(step + i)])


def scratch(shape: Shape, block: int, num_slots: int, num_raw_slots: int, num_readers: int):
    """The types of the two rings' scratch: of the products' dtype, and of a quantised pool's."""
    pieces = block // shape.piece(block)

    def ring(block_shape, dtype, transforms, num_slots, num_writers, num_readers):
        return dict(
            smem=plgpu.SMEM((num_slots, *block_shape), dtype, transforms=transforms),
            full=plgpu.Barrier(num_barriers=num_slots, num_arrivals=num_writers),
            empty=plgpu.Barrier(num_barriers=num_slots, num_arrivals=num_readers),
            cleared=plgpu.Barrier(num_arrivals=num_readers) if num_readers > 1 else None,
        )

    dtype = shape.product_dtype
    ready = (block, shape.kv_dim), dtype, tiling(dtype), num_slots
    if not shape.is_quantized:
        return ring(*ready, pieces, num_readers), None
    box = min(shape.kv_dim, _MAX_BOX)
    num_boxes = shape.kv_dim // box
    raw = (num_boxes, block, box), shape.pool_dtype, (), num_raw_slots
    return ring(*ready, 1, num_readers), ring(*raw, pieces * num_boxes, 1)


def rings(
    scoped, num_slots: int, num_raw_slots: int, pipeline: Any = 0
) -> tuple[Ring, Ring | None]:
    """A pipeline's ring that is attended to, and the one of raw blocks of a quantised pool."""
    ready, raw = (
        scope and Ring(**scope, num_slots=count, first=pipeline * count)
        for scope, count in zip(scoped, (num_slots, num_raw_slots), strict=True)
    )
    return ready, raw


def fetch(ring: Ring, step, kv_hbm, table, seq, kv_head, first, begin, end, block, shape: Shape):
    """Asks for the block of positions `first .. + block`; pages outside [begin, end) stay away.

    Args:
      ring: where to.
      step: how many blocks went into the ring before this one.
      kv_hbm: the pool, [P, page_size, heads, 2H].
      table: the page table, [S, M].
      seq, kv_head: whose block.
      first: its first position, a multiple of `block`.
      begin, end: positions that somebody sees.
      block: positions of a block.
      shape: the static description.
    """
    piece = shape.piece(block)
    starts = [first + j * piece for j in range(block // piece)]
    # All of the table's entries first, so that their loads overlap.
    pages = []
    for start in starts:
        entry = jnp.minimum(start // shape.page_size, shape.table_width - 1)
        pages.append(jnp.clip(table[seq, entry], 0, shape.num_pages - 1))
    slot = ring.slot(step)
    plgpu.barrier_wait(ring.empty.at[slot])
    for j, (start, page) in enumerate(zip(starts, pages, strict=True)):
        row: Any = 0
        if piece != shape.page_size:
            row = pl.multiple_of(lax.rem(start, shape.page_size), piece)
        is_seen = (start < end) & (start + piece > begin)
        source = kv_hbm.at[page, pl.ds(row, piece), kv_head]
        target = ring.smem.at[slot]
        rows = pl.ds(j * piece, piece)
        if not shape.is_quantized:
            copies = [(source, target.at[rows])]
        else:
            num_boxes, _, box = target.shape
            copies = [
                (source.at[:, pl.ds(n * box, box)], target.at[n, rows]) for n in range(num_boxes)
            ]
        for copy in copies:
            _copy(*copy, ring.full.at[slot], is_seen, shape.is_interpreted)


def _copy(source, target, barrier, is_wanted, is_interpreted: bool) -> None:
    """A copy, or only its arrival at the barrier."""
    if not is_interpreted:
        plgpu.copy_gmem_to_smem(source, target, barrier, predicate=is_wanted)
        return

    # The interpreter takes no predicate.
    @pl.when(is_wanted)
    def _():
        plgpu.copy_gmem_to_smem(source, target, barrier)

    @pl.when(jnp.logical_not(is_wanted))
    def _():
        plgpu.barrier_arrive(barrier)


def clear_values(ring: Ring, slot, begin, end, shape: Shape) -> None:
    """Zeroes the values of a slot's rows outside [begin, end).

    Nobody sees those rows, so their weights are zero; but what is there, of another sequence or of
    nobody, may be NaN, and zero times NaN is not zero. All readers of the ring call this together.
    """
    block = ring.smem.shape[1]
    values = ring.values(slot, shape.head_dim)

    def clear():
        if shape.is_interpreted:
            rows = lax.broadcasted_iota(jnp.int32, (block, shape.head_dim), 0)
            values[...] = jnp.where((rows >= begin) & (rows < end), values[...], 0)
        else:
            _zero_rows(values, 0, jnp.clip(begin, 0, block), shape)
            _zero_rows(values, jnp.clip(end, 0, block), block, shape)
        plgpu.commit_smem()

    if ring.cleared is None:
        clear()
    else:
        pl.when(lax.axis_index("warpgroup") == 0)(clear)
        plgpu.barrier_arrive(ring.cleared)
        plgpu.barrier_wait(ring.cleared)


def _zero_rows(values, begin, end, shape: Shape) -> None:
    """Zeroes rows [begin, end) of a swizzled [block, H], 16 bytes a thread and step.

    A row is whole lines of 128 bytes, and swizzling moves data only inside a line.
    """
    scalar = plgpu.Layout.WG_SPLAT
    operand = plgpu.RefType(tiling(shape.product_dtype))
    width = 8  # values in 16 bytes
    tile_columns = 128 // shape.product_dtype.itemsize

    @plgpu.inline_mgpu(arg_types=(operand, scalar, scalar))
    def run(_, tiles, begin, end):  # tiles [block / 8, H / 64, 8, 64]
        def index(x):
            return arith.index_cast(ir.IndexType.get(), x.registers.item())

        def const(x):
            return arith.constant(ir.IndexType.get(), x)

        chunks = const(shape.head_dim // width)
        thread = gpu.thread_id(gpu.Dimension.x)
        thread = arith.remui(thread, const(128))
        i32 = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((4,), i32)
        zero = arith.constant(
            words, ir.DenseElementsAttr.get_splat(words, ir.IntegerAttr.get(i32, 0))
        )
        low = arith.addi(arith.muli(index(begin), chunks), thread)
        loop = scf.ForOp(low, arith.muli(index(end), chunks), const(128))
        with ir.InsertionPoint(loop.body):
            row = arith.divui(loop.induction_variable, chunks)
            column = arith.muli(arith.remui(loop.induction_variable, chunks), const(width))
            eight, wide = const(8), const(tile_columns)
            _store_16_bytes(
                zero,
                tiles,
                [
                    arith.divui(row, eight),
                    arith.divui(column, wide),
                    arith.remui(row, eight),
                    arith.remui(column, wide),
                ],
            )
            scf.yield_([])

    run(values, jnp.asarray(begin, jnp.int32), jnp.asarray(end, jnp.int32))


def convert(raw: Ring, ready: Ring, step, shape: Shape) -> None:
    """Turns the step-th block of a quantised pool into the products' dtype, exactly; no scales."""
    source, target = raw.slot(step), ready.slot(step)
    plgpu.barrier_wait(raw.full.at[source])
    plgpu.barrier_wait(ready.empty.at[target])
    if shape.is_interpreted:
        values = raw.smem[source].swapaxes(0, 1).reshape(ready.smem.shape[1:])
        ready.smem[target] = values.astype(ready.smem.dtype)
    else:
        _convert_block(raw.smem.at[source], ready.smem.at[target], shape)
    plgpu.commit_smem()
    plgpu.barrier_arrive(raw.empty.at[source])
    plgpu.barrier_arrive(ready.full.at[target])


def _convert_block(source, target, shape: Shape) -> None:
    """8 values at a time: a load of 8 bytes and a store of 16, where the swizzle has them."""
    width = 8
    _, block, box = source.shape
    at_once = 4  # so that their loads and conversions overlap
    steps = block * shape.kv_dim // (WARPGROUP * width * at_once)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(tiling(shape.product_dtype))))
    def run(_, raw, tiles):  # raw [2H / box, block, box], tiles [block / 8, 2H / 64, 8, 64]
        def const(x):
            return arith.constant(ir.IndexType.get(), x)

        chunks, eight = const(shape.kv_dim // width), const(8)
        thread = arith.remui(gpu.thread_id(gpu.Dimension.x), const(WARPGROUP))

        def load(item):
            row, chunk = arith.divui(item, chunks), arith.remui(item, chunks)
            chunks_of_box = const(box // width)
            column = arith.muli(arith.remui(chunk, chunks_of_box), const(width))
            place = [arith.divui(chunk, chunks_of_box), row, column]
            return row, chunk, _load_8_bytes(raw, place)

        def store(row, chunk, words):
            # A tile's row is 8 chunks of 16 bytes; chunk c of row r lies at c ^ r.
            in_tile = arith.remui(row, eight)
            place = arith.xori(arith.remui(chunk, eight), in_tile)
            target = [
                arith.divui(row, eight),
                arith.divui(chunk, eight),
                in_tile,
                arith.muli(place, const(width)),
            ]
            _store_16_bytes(_widen(words, shape), tiles, target)

        loop = scf.ForOp(const(0), const(steps), const(1))
        with ir.InsertionPoint(loop.body):
            first = arith.muli(loop.induction_variable, const(WARPGROUP * at_once))
            first = arith.addi(first, thread)
            loaded = [load(arith.addi(first, const(n * WARPGROUP))) for n in range(at_once)]
            for item in loaded:
                store(*item)
            scf.yield_([])

    run(source, target)


def _load_8_bytes(ref, indices):
    """Two words from an element of a ref that lies at a multiple of 8 bytes."""
    source = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(ref, tuple(indices)))
    words = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
    return llvm.load(words, source, alignment=8)


def _store_16_bytes(words, ref, indices) -> None:
    """Stores four words at an element of a ref that lies at a multiple of 16 bytes.

    A store that does not say so is split into one of 2 bytes for each value, and a load into bytes.
    """
    target = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(ref, tuple(indices)))
    llvm.store(words, target, alignment=16)


def _widen(words, shape: Shape):
    """Two words of 8-bit values as the products' dtype, two values in each of four words."""
    pairs = [pair for n in range(2) for pair in _convert_four(_extract(words, n), shape)]
    return vector.from_elements(ir.VectorType.get((4,), ir.IntegerType.get_signless(32)), pairs)


def _extract(words, n: int):
    return vector.extract(words, dynamic_position=[], static_position=[n])


def _convert_four(word, shape: Shape):
    """Two words of 16-bit pairs from a word of four 8-bit values."""
    i32 = ir.IntegerType.get_signless(32)
    narrow = {"float8_e4m3fn": "e4m3x2", "float8_e5m2": "e5m2x2"}[shape.pool_dtype.name]
    if shape.product_dtype == jnp.float16:
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
