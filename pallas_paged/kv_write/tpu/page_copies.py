# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Moves of whole pages on TPU, from HBM to HBM: one DMA per page, or per equal part of a page.

All DMAs of a grid step are in flight together. A copy has ids of both ends; a gather writes its
entries in order, and a scatter reads them so.
"""

import dataclasses
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

# Entries whose ids are in SMEM at a time.
_ENTRIES_PER_STEP = 8192
_UNROLL = 8
# VMEM for the zeros that a gather puts where an id is of no page.
_ZERO_BYTES = 2**18


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static parameters of a call.

    Attributes:
      op: "copy_pages", "gather_pages" or "scatter_pages".
      num_entries: n.
      step: entries of a grid step; those after the first n are none.
      chunk_tokens: tokens of a page that one DMA moves, a divisor of the page.
      zero_tokens: tokens of the zeros in VMEM, a divisor of the page; 0 without them.
    """

    op: str
    num_entries: int
    step: int
    chunk_tokens: int
    zero_tokens: int

    @property
    def num_ids(self) -> int:
        """Arrays of ids."""
        return 2 if self.op == "copy_pages" else 1


def copy_pages(
    kv_pages: jax.Array, src_ids: jax.Array, dst_ids: jax.Array, options: WriteOptions
) -> jax.Array:
    """See page_api.copy_pages."""
    if src_ids.shape[0] == 0:
        return kv_pages
    return _launch("copy_pages", (src_ids, dst_ids), kv_pages, kv_pages, options)


def gather_pages(kv_pages: jax.Array, page_ids: jax.Array, options: WriteOptions) -> jax.Array:
    """See page_api.gather_pages."""
    if page_ids.shape[0] == 0:
        return jnp.zeros((0, *kv_pages.shape[1:]), kv_pages.dtype)
    return _launch("gather_pages", (page_ids,), kv_pages, None, options)


def scatter_pages(
    kv_pages: jax.Array, page_ids: jax.Array, pages: jax.Array, options: WriteOptions
) -> jax.Array:
    """See page_api.scatter_pages."""
    if page_ids.shape[0] == 0:
        return kv_pages
    return _launch("scatter_pages", (page_ids,), pages, kv_pages, options)


def _launch(
    op: str,
    ids: tuple[jax.Array, ...],
    source: jax.Array,
    target: jax.Array | None,
    options: WriteOptions,
) -> jax.Array:
    """Moves pages of `source` into `target`, which is updated in place, or into a new array.

    With a config, in equal chunks of at most its `block_tokens`.
    """
    page_size, num_entries = source.shape[1], ids[0].shape[0]
    most = page_size if options.config is None else min(options.config.block_tokens, page_size)
    token_bytes = source.shape[2] * source.shape[3] * source.dtype.itemsize
    spec = _Spec(
        op,
        num_entries,
        step=min(num_entries, _ENTRIES_PER_STEP),
        chunk_tokens=_divisor(page_size, most),
        zero_tokens=_divisor(page_size, _ZERO_BYTES // token_bytes) if target is None else 0,
    )
    padding = (0, -num_entries % spec.step)
    if padding[1]:
        ids = tuple(jnp.pad(x, padding, constant_values=-1) for x in ids)
    ids_spec = pl.BlockSpec((spec.step,), lambda i: (i,), memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    zeros = pltpu.VMEM((spec.zero_tokens, *source.shape[2:]), source.dtype)
    arrays = {"copy_pages": (target,), "gather_pages": (source,), "scatter_pages": (source, target)}
    operands = (*ids, *arrays[op])
    if target is None:
        like: Any = layout.result_like(source)
        like = like.update(shape=(num_entries, *source.shape[1:]))
    else:
        like = layout.result_like(target)
    return pl.pallas_call(
        functools.partial(_kernel, spec),
        out_shape=like,
        grid=(ids[0].shape[0] // spec.step,),
        in_specs=[ids_spec] * len(ids) + [hbm] * (len(operands) - len(ids)),
        out_specs=hbm,
        input_output_aliases={} if target is None else {len(operands) - 1: 0},
        scratch_shapes=[pltpu.SemaphoreType.DMA] + [zeros] * (target is None),
        # The kernel checks the ids of every entry.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name=f"{op}_{spec.chunk_tokens}",
    )(*operands)


def _divisor(page_size: int, most: int) -> int:
    """The largest divisor of the page that is at most `most`, at least 1."""
    return next(n for n in range(max(1, min(most, page_size)), 0, -1) if page_size % n == 0)


def _kernel(spec: _Spec, *refs: Ref) -> None:
    """Moves a step's pages: starts all DMAs, then waits for them by their number.

    The refs are the ids int32[step] in SMEM, what is read and not written, if there is any, the
    target's operand, if it is updated in place, the target, the semaphore, and the zeros.
    """
    ids, rest = refs[: spec.num_ids], refs[spec.num_ids :]
    if spec.op == "gather_pages":
        source, target, sem, zeros = rest
    elif spec.op == "scatter_pages":
        source, _, target, sem = rest
    else:
        _, target, sem = rest
        source = target
    first = pl.program_id(0) * spec.step

    def send(src: jax.Array, dst: jax.Array) -> None:
        _start_in_parts(source.at[src], target.at[dst], spec.chunk_tokens, sem)

    def start(i: Scalar, sent: jax.Array) -> jax.Array:
        entry, id_of_entry = first + i, ids[0][i]
        is_live = _is_page(id_of_entry, source if spec.op == "gather_pages" else target)
        if spec.op == "gather_pages":
            is_entry = entry < spec.num_entries

            @pl.when(is_live & is_entry)
            def _send_page() -> None:
                send(id_of_entry, entry)

            @pl.when(jnp.logical_not(is_live) & is_entry)
            def _send_zeros() -> None:
                _start_repeated(zeros, target.at[entry], sem)

            return sent + is_entry.astype(jnp.int32)

        src, dst = (entry, id_of_entry) if spec.op == "scatter_pages" else (ids[0][i], ids[1][i])
        is_live &= _is_page(dst, target)

        @pl.when(is_live)
        def _send() -> None:
            send(src, dst)

        return sent + is_live.astype(jnp.int32)

    if spec.op == "gather_pages":
        zeros[...] = jnp.zeros_like(zeros)
    unroll = min(_UNROLL, spec.step)

    def start_unrolled(iteration: jax.Array, sent: jax.Array) -> jax.Array:
        for u in range(unroll):
            sent = start(iteration * unroll + u, sent)
        return sent

    sent = lax.fori_loop(0, spec.step // unroll, start_unrolled, jnp.int32(0))
    sent = lax.fori_loop(spec.step // unroll * unroll, spec.step, start, sent)
    _wait(target, sent, sem)


def _is_page(page_id: jax.Array, pages: Ref) -> jax.Array:
    """Whether this is the number of one of the pages; as unsigned, a negative one is too large."""
    return page_id.astype(jnp.uint32) < jnp.uint32(pages.shape[0])


def _start_in_parts(source: Ref, target: Ref, chunk_tokens: int, sem: Ref) -> None:
    """Starts the DMAs of one page."""
    num_chunks = source.shape[0] // chunk_tokens
    if num_chunks == 1:
        pltpu.make_async_copy(source, target, sem).start()
        return

    def start_chunk(i: jax.Array, _: Any) -> None:
        rows = pl.ds(i * chunk_tokens, chunk_tokens)
        pltpu.make_async_copy(source.at[rows], target.at[rows], sem).start()

    lax.fori_loop(jnp.int32(0), jnp.int32(num_chunks), start_chunk, None)


def _start_repeated(source: Ref, target: Ref, sem: Ref) -> None:
    """Starts the DMAs that fill a page with the same tokens again and again."""
    size = source.shape[0]

    def start_one(i: jax.Array, _: Any) -> None:
        pltpu.make_async_copy(source, target.at[pl.ds(i * size, size)], sem).start()

    lax.fori_loop(jnp.int32(0), jnp.int32(target.shape[0] // size), start_one, None)


def _wait(target: Ref, sent: jax.Array, sem: Ref) -> None:
    """Waits for the DMAs of that many pages."""

    def wait(sent: jax.Array) -> jax.Array:
        size = jnp.minimum(sent, target.shape[0])
        view = target.at[pl.ds(0, size)]
        pltpu.make_async_copy(view, view, sem).wait()
        return sent - size

    lax.while_loop(lambda sent: sent > 0, wait, sent)
