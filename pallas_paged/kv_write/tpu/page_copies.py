# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Copies of whole pages on TPU, from HBM to HBM: one DMA per page, or per equal part of a page.

All DMAs of a grid step are in flight together.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.kv_write.options import WriteOptions
from pallas_paged.kv_write.tpu.refs import Ref, Scalar

# Pairs of ids that are in SMEM at a time.
_PAIRS_PER_STEP = 8192
_UNROLL = 8


def copy_pages(
    kv_pages: jax.Array, src_ids: jax.Array, dst_ids: jax.Array, options: WriteOptions
) -> jax.Array:
    """See api.copy_pages. With a config, in equal chunks of at most its `block_tokens`."""
    page_size, num_ids = kv_pages.shape[1], src_ids.shape[0]
    if num_ids == 0:
        return kv_pages
    config = options.config
    most = page_size if config is None else min(config.block_tokens, page_size)
    chunk_tokens = next(n for n in range(most, 0, -1) if page_size % n == 0)
    step = min(num_ids, _PAIRS_PER_STEP)
    if num_ids % step:
        size = -(-num_ids // step) * step
        padding = (0, size - num_ids)
        src_ids = jnp.pad(src_ids, padding, constant_values=-1)
        dst_ids = jnp.pad(dst_ids, padding, constant_values=-1)
    spec = pl.BlockSpec((step,), lambda i: (i,), memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, step, chunk_tokens),
        out_shape=layout.result_like(kv_pages),
        grid=(src_ids.shape[0] // step,),
        in_specs=[spec, spec, hbm],
        out_specs=hbm,
        input_output_aliases={2: 0},
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        # The kernel checks both ids of every pair.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name=f"copy_pages_{chunk_tokens}",
    )(src_ids, dst_ids, kv_pages)


def _kernel(
    step: int,
    chunk_tokens: int,
    # scalar inputs, in SMEM
    src_ref: Ref,  # int32[step]
    dst_ref: Ref,  # int32[step]
    # the pool, aliased
    _: Ref,
    pool_ref: Ref,  # [P, page_size, R, C]
    # scratch
    sem: Ref,
) -> None:
    """Copies a step's pages: starts all DMAs, then waits for them by their number."""
    num_pages, num_chunks = jnp.uint32(pool_ref.shape[0]), pool_ref.shape[1] // chunk_tokens

    def send(src: jax.Array, dst: jax.Array) -> None:
        if num_chunks == 1:
            pltpu.make_async_copy(pool_ref.at[src], pool_ref.at[dst], sem).start()
            return

        def send_chunk(i: jax.Array, _: Any) -> None:
            rows = pl.ds(i * chunk_tokens, chunk_tokens)
            pltpu.make_async_copy(pool_ref.at[src, rows], pool_ref.at[dst, rows], sem).start()

        lax.fori_loop(jnp.int32(0), jnp.int32(num_chunks), send_chunk, None)

    def start(i: Scalar, copied: jax.Array) -> jax.Array:
        src, dst = src_ref[i], dst_ref[i]
        live = (src.astype(jnp.uint32) < num_pages) & (dst.astype(jnp.uint32) < num_pages)

        @pl.when(live)
        def _start() -> None:
            send(src, dst)

        return copied + live.astype(jnp.int32)

    unroll = min(_UNROLL, step)

    def start_unrolled(iteration: jax.Array, copied: jax.Array) -> jax.Array:
        for u in range(unroll):
            copied = start(iteration * unroll + u, copied)
        return copied

    copied = lax.fori_loop(0, step // unroll, start_unrolled, jnp.int32(0))
    copied = lax.fori_loop(step // unroll * unroll, step, start, copied)

    def wait(copied: jax.Array) -> jax.Array:
        size = jnp.minimum(copied, pool_ref.shape[0])
        view = pool_ref.at[pl.ds(0, size)]
        pltpu.make_async_copy(view, view, sem).wait()
        return copied - size

    lax.while_loop(lambda copied: copied > 0, wait, copied)
