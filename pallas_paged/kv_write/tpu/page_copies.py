# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Copies of whole pages on TPU: a DMA a page, or a part of one, from HBM to HBM, a step's all in
flight."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout

# Pairs of ids whose metadata is in SMEM at a time.
_PAIRS_PER_STEP = 8192
_UNROLL = 8


def copy_pages(kv_pages, src_ids, dst_ids, *, config=None):
    """See api.copy_pages. With a config in equal parts of at most its `block_tokens`."""
    page_size = kv_pages.shape[1]
    most = page_size if config is None else min(config.block_tokens, page_size)
    part = next(n for n in range(most, 0, -1) if page_size % n == 0)
    num_ids = src_ids.shape[0]
    if num_ids == 0:
        return kv_pages
    step = min(num_ids, _PAIRS_PER_STEP)
    if num_ids % step:
        size = -(-num_ids // step) * step
        padding = (0, size - num_ids)
        src_ids = jnp.pad(src_ids, padding, constant_values=-1)
        dst_ids = jnp.pad(dst_ids, padding, constant_values=-1)
    spec = pl.BlockSpec((step,), lambda i: (i,), memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_copy_kernel, step, part),
        out_shape=layout.result_like(kv_pages),
        grid=(src_ids.shape[0] // step,),
        in_specs=[spec, spec, hbm],
        out_specs=hbm,
        input_output_aliases={2: 0},
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        # _copy_kernel checks both ids of every pair.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name=f"copy_pages_{part}",
    )(src_ids, dst_ids, kv_pages)


def _copy_kernel(
    step,
    part,
    # scalar inputs, in SMEM
    src_ref,  # int32[step]
    dst_ref,  # int32[step]
    # the pool, aliased
    _,
    pool_ref,  # [P, page_size, R, C]
    # scratch
    sem,
):
    num_pages, num_parts = jnp.uint32(pool_ref.shape[0]), pool_ref.shape[1] // part

    def send(src, dst):
        if num_parts == 1:
            pltpu.make_async_copy(pool_ref.at[src], pool_ref.at[dst], sem).start()
            return

        def send_part(i, _):
            rows = pl.ds(i * part, part)
            pltpu.make_async_copy(pool_ref.at[src, rows], pool_ref.at[dst, rows], sem).start()

        lax.fori_loop(jnp.int32(0), jnp.int32(num_parts), send_part, None)

    def start(i, copied):
        src, dst = src_ref[i], dst_ref[i]
        live = (src.astype(jnp.uint32) < num_pages) & (dst.astype(jnp.uint32) < num_pages)

        @pl.when(live)
        def _start():
            send(src, dst)

        return copied + live.astype(jnp.int32)

    unroll = min(_UNROLL, step)

    def chunk(c, copied):
        for u in range(unroll):
            copied = start(c * unroll + u, copied)
        return copied

    copied = lax.fori_loop(0, step // unroll, chunk, jnp.int32(0))
    copied = lax.fori_loop(step // unroll * unroll, step, start, copied)

    def wait(copied):
        size = jnp.minimum(copied, pool_ref.shape[0])
        view = pool_ref.at[pl.ds(0, size)]
        pltpu.make_async_copy(view, view, sem).wait()
        return copied - size

    lax.while_loop(lambda copied: copied > 0, wait, copied)
