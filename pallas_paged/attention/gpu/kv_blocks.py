# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""KV blocks in shared memory: pipeline stages that one warpgroup fills and others read.

A KV block is `block_kv` consecutive positions of one KV head, with K and V side by side:
`[block_kv, 2H]`. The producer asks for it in chunks, with one tensor copy per page (or per equal
part of a page). The blocks of a quantised pool arrive in raw stages of their own, from which
convert.py brings them into the other stages, so that the consumers see no difference.
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
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_paged.attention.gpu.mma_layout import operand_transforms
from pallas_paged.attention.gpu.refs import Inputs
from pallas_paged.attention.gpu.schedule import KvRange
from pallas_paged.attention.gpu.spec import WARPGROUP, KernelSpec, KvBlockSizes, Ref, Scalar

# The refs of the stages and of the raw stages, as `scratch_types` has them.
KvScratch = tuple[dict[str, Ref], dict[str, Ref] | None]
# The most values in each dimension of a box, which one tensor copy brings.
_MAX_BOX = 256


@dataclasses.dataclass(frozen=True)
class KvStages:
    """Pipeline stages for KV blocks, with the barriers that say which are full and which empty.

    Attributes:
      smem: [stages, block_kv, 2H]; raw stages are [stages, 2H / box, block_kv, box].
      full: one barrier per stage, which completes when the stage's block is there.
      empty: one barrier per stage, at which all readers of the block arrive.
      cleared: a barrier at which all readers meet after one of them has cleared values for all;
        None where there is one reader.
      num_stages: the number of stages.
      first: the first stage, a traced scalar where multiple pipelines share the arrays.
    """

    smem: Ref
    full: Ref
    empty: Ref
    cleared: Ref | None
    num_stages: int
    first: Scalar = 0

    def stage(self, step: Scalar) -> Scalar:
        """The stage of the step-th block that goes through the pipeline."""
        return self.first + lax.rem(step, self.num_stages)

    def keys(self, stage: Scalar, head_dim: int) -> Ref:
        """[block_kv, H] of a stage: transposed, an operand of the matrix unit."""
        return self.smem.at[stage, :, pl.ds(0, head_dim)]

    def values(self, stage: Scalar, head_dim: int) -> Ref:
        """[block_kv, H] of a stage: an operand of the matrix unit."""
        return self.smem.at[stage, :, pl.ds(head_dim, head_dim)]

    def release_all(self) -> None:
        """Says that every stage is empty, which a reader does first."""
        for stage in range(self.num_stages):
            plgpu.barrier_arrive(self.empty.at[self.first + stage])

    def drain(self, step: Scalar) -> None:
        """Waits until all stages are empty again, which a writer does last."""
        for i in range(self.num_stages):
            plgpu.barrier_wait(self.empty.at[self.stage(step + i)])


def scratch_types(
    spec: KernelSpec, sizes: KvBlockSizes, num_readers: int, num_pipelines: int = 1
) -> KvScratch:
    """The scratch of the stages of all pipelines, and of their raw stages if there are any."""
    block_kv = sizes.block_kv
    num_chunks = block_kv // spec.chunk(block_kv)
    num_stages, num_raw_stages = (
        n * num_pipelines for n in (sizes.num_stages, sizes.num_raw_stages)
    )

    def types(
        block_shape: tuple[int, ...],
        dtype: Any,
        transforms: tuple[Any, ...],
        num_stages: int,
        num_writers: int,
        num_readers: int,
    ) -> dict[str, Any]:
        return dict(
            smem=plgpu.SMEM((num_stages, *block_shape), dtype, transforms=transforms),
            full=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_writers),
            empty=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_readers),
            cleared=plgpu.Barrier(num_arrivals=num_readers) if num_readers > 1 else None,
        )

    dtype = spec.product_dtype
    ready = (block_kv, spec.kv_dim), dtype, operand_transforms(dtype), num_stages
    if not spec.is_quantized:
        return types(*ready, num_chunks, num_readers), None
    box = min(spec.kv_dim, _MAX_BOX)
    num_boxes = spec.kv_dim // box
    raw = (num_boxes, block_kv, box), spec.pool_dtype, (), num_raw_stages
    return types(*ready, 1, num_readers), types(*raw, num_chunks * num_boxes, 1)


def stages_of(
    scratch: KvScratch, sizes: KvBlockSizes, pipeline: Scalar = 0
) -> tuple[KvStages, KvStages | None]:
    """The stages that the consumers of a pipeline read, and its raw stages if there are any."""
    ready, raw = scratch
    stages = KvStages(**ready, num_stages=sizes.num_stages, first=pipeline * sizes.num_stages)
    if raw is None:
        return stages, None
    first = pipeline * sizes.num_raw_stages
    return stages, KvStages(**raw, num_stages=sizes.num_raw_stages, first=first)


def fetch_range(
    stages: KvStages,
    step: Scalar,
    kv_range: KvRange,
    seq: Scalar,
    kv_head: Scalar,
    inputs: Inputs,
    spec: KernelSpec,
) -> Scalar:
    """Asks for all blocks of a range, one after the other, as stages become empty.

    Args:
      stages: where the blocks go.
      step: the blocks that went into the stages before.
      kv_range: the blocks. Chunks that nobody sees are left out.
      seq, kv_head: the sequence and the KV head that the blocks belong to.
      inputs: the refs with the pool and the page table.
      spec: the static parameters.

    Returns:
      the next block's step.
    """

    def fetch(i: Scalar, _: None) -> None:
        _fetch(stages, step + i, kv_range, kv_range.first_key(i), seq, kv_head, inputs, spec)

    lax.fori_loop(0, kv_range.count, fetch, None)
    return step + kv_range.count


def _fetch(
    stages: KvStages,
    step: Scalar,
    kv_range: KvRange,
    first_key: Scalar,
    seq: Scalar,
    kv_head: Scalar,
    inputs: Inputs,
    spec: KernelSpec,
) -> None:
    """Asks for the block of a range that begins at position `first_key`."""
    chunk = spec.chunk(kv_range.block_kv)
    starts = [first_key + j * chunk for j in range(kv_range.block_kv // chunk)]
    # All entries of the page table are read first, so that their loads overlap.
    pages = []
    for start in starts:
        entry = jnp.minimum(start // spec.page_size, spec.table_width - 1)
        pages.append(jnp.clip(inputs.table[seq, entry], 0, spec.num_pages - 1))
    stage = stages.stage(step)
    plgpu.barrier_wait(stages.empty.at[stage])
    for j, (start, page) in enumerate(zip(starts, pages, strict=True)):
        row: Scalar = 0
        if chunk != spec.page_size:
            row = pl.multiple_of(lax.rem(start, spec.page_size), chunk)
        is_seen = (start < kv_range.end) & (start + chunk > kv_range.low)
        source = inputs.kv.at[page, pl.ds(row, chunk), kv_head]
        target = stages.smem.at[stage]
        rows = pl.ds(j * chunk, chunk)
        if not spec.is_quantized:
            copies = [(source, target.at[rows])]
        else:
            num_boxes, _, box = target.shape
            copies = [
                (source.at[:, pl.ds(n * box, box)], target.at[n, rows]) for n in range(num_boxes)
            ]
        for copy in copies:
            _copy(*copy, stages.full.at[stage], is_seen, spec.is_interpreted)


def _copy(
    source: Ref, target: Ref, barrier: Ref, is_wanted: jax.Array, is_interpreted: bool
) -> None:
    """Starts a copy that arrives at the barrier, or only arrives there."""
    if not is_interpreted:
        copy: Any = plgpu.copy_gmem_to_smem  # with a predicate from jax 0.11.2 on
        copy(source, target, barrier, predicate=is_wanted)
        return

    # The interpreter takes no predicate.
    @pl.when(is_wanted)
    def _() -> None:
        plgpu.copy_gmem_to_smem(source, target, barrier)

    @pl.when(jnp.logical_not(is_wanted))
    def _() -> None:
        plgpu.barrier_arrive(barrier)


def clear_values(
    stages: KvStages, stage: Scalar, begin: Scalar, end: Scalar, spec: KernelSpec
) -> None:
    """Zeroes the values of a stage in the rows outside [begin, end).

    Nobody sees those rows, so their weights are zero. But they hold what another sequence or nobody
    wrote, which may be NaN, and zero times NaN is not zero. All readers of the stage call this
    together.
    """
    block_kv = stages.smem.shape[1]
    values = stages.values(stage, spec.head_dim)

    def clear() -> None:
        if spec.is_interpreted:
            rows = lax.broadcasted_iota(jnp.int32, (block_kv, spec.head_dim), 0)
            values[...] = jnp.where((rows >= begin) & (rows < end), values[...], 0)
        else:
            _zero_rows(values, 0, jnp.clip(begin, 0, block_kv), spec)
            _zero_rows(values, jnp.clip(end, 0, block_kv), block_kv, spec)
        plgpu.commit_smem()

    if stages.cleared is None:
        clear()
    else:
        pl.when(lax.axis_index("warpgroup") == 0)(clear)
        plgpu.barrier_arrive(stages.cleared)
        plgpu.barrier_wait(stages.cleared)


def _zero_rows(values: Ref, begin: Scalar, end: Scalar, spec: KernelSpec) -> None:
    """Zeroes the rows [begin, end) of a swizzled [block_kv, H], 16 bytes per thread and step.

    A row is whole lines of 128 bytes, and swizzling moves data only inside a line.
    """
    scalar = plgpu.Layout.WG_SPLAT
    operand = plgpu.RefType(operand_transforms(spec.product_dtype))
    width = 8  # values in 16 bytes
    tile_columns = 128 // spec.product_dtype.itemsize

    @plgpu.inline_mgpu(arg_types=(operand, scalar, scalar))
    def run(_: Any, tiles: ir.Value, begin: Any, end: Any) -> None:
        # tiles: [block_kv / 8, H / 64, 8, 64]
        def index(x: Any) -> ir.Value:
            return arith.index_cast(ir.IndexType.get(), x.registers.item())

        vectors = index_constant(spec.head_dim // width)  # in a row
        thread = gpu.thread_id(gpu.Dimension.x)
        thread = arith.remui(thread, index_constant(WARPGROUP))
        i32 = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((4,), i32)
        zero = arith.constant(
            words, ir.DenseElementsAttr.get_splat(words, ir.IntegerAttr.get(i32, 0))
        )
        low = arith.addi(arith.muli(index(begin), vectors), thread)
        loop = scf.ForOp(low, arith.muli(index(end), vectors), index_constant(WARPGROUP))
        with ir.InsertionPoint(loop.body):
            row = arith.divui(loop.induction_variable, vectors)
            column = arith.muli(
                arith.remui(loop.induction_variable, vectors), index_constant(width)
            )
            eight, wide = index_constant(8), index_constant(tile_columns)
            store_16_bytes(
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


def index_constant(value: int) -> ir.Value:
    """A constant of MLIR's index type."""
    return arith.constant(ir.IndexType.get(), value)


def store_16_bytes(words: ir.Value, ref: ir.Value, indices: list[ir.Value]) -> None:
    """Stores four words at an element of a ref that lies at a multiple of 16 bytes.

    A store that does not state its alignment is split into one store of 2 bytes per value, and a
    load into loads of single bytes.
    """
    target = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(ref, tuple(indices)))
    llvm.store(words, target, alignment=16)
