# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Copies of whole pages on a GPU: a thread block moves a part of one through shared memory."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged.kv_write.gpu.block_tokens import Ref
from pallas_paged.kv_write.options import WriteOptions
from pallas_paged.unfused import unfused

# Shared memory of a thread block. Small, so that many of them share the 227 KiB of a
# multiprocessor.
BLOCK_BYTES = 32 * 2**10
# The kernels have the barrier that they need, in commit_smem, and reduce nothing.
COMPILER_PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)


def copy_pages(
    kv_pages: jax.Array, src_ids: jax.Array, dst_ids: jax.Array, options: WriteOptions
) -> jax.Array:
    """See api.copy_pages."""
    num_pages, page_size, num_rows, num_lanes = kv_pages.shape
    if src_ids.shape[0] == 0:
        return kv_pages
    page_rows = page_size * num_rows
    most = BLOCK_BYTES // (num_lanes * kv_pages.dtype.itemsize)
    if options.config is not None:
        most = min(most, options.config.block_tokens * num_rows)
    count = next(n for n in range(min(most, page_rows), 0, -1) if page_rows % n == 0)
    blocks_per_page = page_rows // count
    kv_pages, src_ids, dst_ids = unfused((kv_pages, src_ids, dst_ids))
    pool = jax.new_ref(kv_pages.reshape(num_pages, page_rows, num_lanes))

    def kernel(src_ids: Ref, dst_ids: Ref, pool: Ref, rows_smem: Ref, barrier: Ref) -> None:
        # src_ids, dst_ids: int32[n]; pool: [P, page rows, C]; rows_smem: [count, C]
        block = lax.axis_index("block")
        src, dst = (ids[block // blocks_per_page] for ids in (src_ids, dst_ids))
        rows = pl.ds(block % blocks_per_page * count, count)

        @pl.when((src >= 0) & (src < num_pages) & (dst >= 0) & (dst < num_pages))
        def _copy() -> None:
            plgpu.copy_gmem_to_smem(
                pool.at[src, rows],
                rows_smem,
                barrier,
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )
            plgpu.barrier_wait(barrier)
            plgpu.copy_smem_to_gmem(rows_smem, pool.at[dst, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(src_ids.shape[0] * blocks_per_page,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((count, num_lanes), kv_pages.dtype), plgpu.Barrier()],
        compiler_params=COMPILER_PARAMS,
        kernel_name=f"copy_pages_{count}",
    )(src_ids, dst_ids, pool)
    return unfused(pool[...]).reshape(kv_pages.shape)
