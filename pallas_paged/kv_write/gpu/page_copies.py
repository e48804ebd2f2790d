# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Moves of whole pages on a GPU: a thread block moves a part of one through shared memory.

A copy has ids of both ends; a gather writes its entries in order, and a scatter reads them so.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged import layout
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
    """See page_api.copy_pages."""
    if src_ids.shape[0] == 0:
        return kv_pages
    kv_pages = unfused(kv_pages)
    pool = jax.new_ref(_in_rows(kv_pages))
    _launch("copy_pages", (src_ids, dst_ids), (pool,), kv_pages, options)
    return unfused(pool[...]).reshape(kv_pages.shape)


def gather_pages(kv_pages: jax.Array, page_ids: jax.Array, options: WriteOptions) -> jax.Array:
    """See page_api.gather_pages."""
    num_entries, page = page_ids.shape[0], kv_pages.shape[1:]
    if num_entries == 0:
        return jnp.zeros((0, *page), kv_pages.dtype)
    kv_pages = unfused(kv_pages)
    pages = _launch("gather_pages", (page_ids,), (_in_rows(kv_pages),), kv_pages, options)
    return unfused(pages).reshape(num_entries, *page)


def scatter_pages(
    kv_pages: jax.Array, page_ids: jax.Array, pages: jax.Array, options: WriteOptions
) -> jax.Array:
    """See page_api.scatter_pages."""
    if page_ids.shape[0] == 0:
        return kv_pages
    kv_pages, pages = unfused((kv_pages, pages))
    pool = jax.new_ref(_in_rows(kv_pages))
    _launch("scatter_pages", (page_ids,), (_in_rows(pages), pool), kv_pages, options)
    return unfused(pool[...]).reshape(kv_pages.shape)


def _in_rows(pages: jax.Array) -> jax.Array:
    """Pages [P, page_size, R, C] as [P, page rows, C]."""
    return pages.reshape(len(pages), -1, pages.shape[-1])


def _launch(
    op: str,
    ids: tuple[jax.Array, ...],
    arrays: tuple[Any, ...],
    kv_pages: jax.Array,
    options: WriteOptions,
) -> Any:
    """Launches the kernel of a move; the last of the arrays is the target, but of a gather."""
    num_pages, page_size, num_rows, num_lanes = kv_pages.shape
    num_entries, page_rows = ids[0].shape[0], page_size * num_rows
    most = BLOCK_BYTES // (num_lanes * kv_pages.dtype.itemsize)
    if options.config is not None:
        most = min(most, options.config.block_tokens * num_rows)
    count = next(n for n in range(min(most, page_rows), 0, -1) if page_rows % n == 0)
    blocks_per_page = page_rows // count

    def kernel(*refs: Ref, rows_smem: Ref, barrier: Ref) -> None:
        # ids: int32[n] each; the arrays: [P or n, page rows, C]; rows_smem: [count, C]
        ids_refs, (source, *others) = refs[: len(ids)], refs[len(ids) :]
        target = others[0] if others else source
        block = lax.axis_index("block")
        entry, rows = block // blocks_per_page, pl.ds(block % blocks_per_page * count, count)
        page_ids = [ref[entry] for ref in ids_refs]
        is_live = [(page_id >= 0) & (page_id < num_pages) for page_id in page_ids]
        ends = {"gather_pages": (page_ids[0], entry), "scatter_pages": (entry, page_ids[-1])}
        src, dst = ends.get(op, (page_ids[0], page_ids[-1]))

        def send() -> None:
            plgpu.copy_smem_to_gmem(rows_smem, target.at[dst, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(is_live[0] & is_live[-1])
        def _move() -> None:
            plgpu.copy_gmem_to_smem(
                source.at[src, rows],
                rows_smem,
                barrier,
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )
            plgpu.barrier_wait(barrier)
            send()

        if op == "gather_pages":

            @pl.when(jnp.logical_not(is_live[0]))
            def _fill() -> None:
                rows_smem[...] = jnp.zeros(rows_smem.shape, rows_smem.dtype)
                plgpu.commit_smem()
                send()

    result: Any = ()
    if op == "gather_pages":
        result = layout.result_like(kv_pages).update(shape=(num_entries, page_rows, num_lanes))
    return plgpu.kernel(
        kernel,
        out_type=result,
        grid=(num_entries * blocks_per_page,),
        grid_names=("block",),
        scratch_types={
            "rows_smem": plgpu.SMEM((count, num_lanes), kv_pages.dtype),
            "barrier": plgpu.Barrier(),
        },
        compiler_params=COMPILER_PARAMS,
        kernel_name=f"{op}_{count}",
    )(*unfused(ids), *arrays)
