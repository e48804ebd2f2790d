# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Writes on Hopper: a block brings a few tokens into shared memory and sends them to their slots.

The pipeline: one bulk copy each for the k and v of a block's tokens -> shared memory -> two tensor
copies a token, K to the even rows of its slot and V to the odd ones. Pools of another dtype take
the way through registers in between. A block does nothing else, and many of them share a
multiprocessor: that is what hides their latencies. Pages, slices and tokens differ in the few lines
that say where a block's tokens come from and go to (`_Rows`).
"""

__all__ = [
    "GpuWriteConfig",
    "copy_pages",
    "default_config",
    "page_write",
    "slice_write",
    "token_write",
    "unsupported",
    "unsupported_pool",
]

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged import dispatch, layout
from pallas_paged.kv_write import oracle
from pallas_paged.kv_write.gpu import quantize as convert
from pallas_paged.unfused import unfused

_HEAD_DIMS = (64, 128, 256)
# Shared memory of a block. Small, so that many blocks share the 227 KiB of a multiprocessor.
_BLOCK_BYTES = 32 * 2**10
_WARPGROUP = 128  # threads; an array in registers has a multiple of as many values


@dataclasses.dataclass(frozen=True)
class GpuWriteConfig:
    """Block sizes of the GPU writes.

    Attributes:
      block_tokens: tokens that a block brings in and sends, at most; fewer where they would not fit
        or where pages are shorter. `copy_pages`: of a page, in bytes at most what fits.
      fetch_first: k and v are fetched before the block knows whether they are wanted, where it
        knows which: shorter by one latency of the memory, dearer for batches with many holes.
    """

    block_tokens: int = 4
    fetch_first: bool = True

    def __post_init__(self):
        if not 1 <= self.block_tokens <= 64:
            raise ValueError(
                f"GpuWriteConfig: block_tokens is {self.block_tokens}; wanted 1 to 64, because a "
                "block's copies are unrolled"
            )


def default_config() -> GpuWriteConfig:
    """One size for all calls: on an H100 those of 1 to 8 tokens are within 2% of each other from
    1,024 tokens on, and take 1.7 to 2.3 us for 64 (BUILD_NOTES.md)."""
    return GpuWriteConfig()


def unsupported(kv_pages, k, num_kv_heads: int, head_dim: int) -> str | None:
    """Why the kernels cannot run a write, as a sentence; None if they can."""
    del num_kv_heads
    reason = unsupported_pool(kv_pages, k)
    if reason is None and layout.padded_head_dim(head_dim) not in _HEAD_DIMS:
        reason = (
            f"head_dim is {head_dim} and the kernels take up to {_HEAD_DIMS[-1]}; split the heads "
            "or use the oracle"
        )
    if reason is None and head_dim > layout.HALF_LANES and kv_pages.shape[2] % 2:
        reason = (
            f"the pool has R = {kv_pages.shape[2]} rows a slot and K and V of a head are a pair of "
            "rows; make it with make_kv_pages"
        )
    return reason


def unsupported_pool(kv_pages, k=None) -> str | None:
    """Why the kernels cannot run on a pool, as a sentence; None if they can."""
    reason = dispatch.why_no_mosaic_gpu()
    if reason is None and (_varies(kv_pages) or _varies(k)):
        reason = (
            "under shard_map jax's kernels on a GPU take no ref that varies over the mesh; call "
            "jax.shard_map with check_vma=False"
        )
    return reason


def _varies(array) -> bool:
    """Whether each shard of a shard_map that checks what varies has an array of its own."""
    axes = getattr(getattr(array, "aval", None), "manual_axis_type", None)
    return axes is not None and bool(axes.varying)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What one block of threads does; scalars that the kernel computes from the metadata.

    Attributes:
      source: the first of the block's tokens, in [0, T - tokens of a block].
      shift: the first of them that goes anywhere; the j-th that does is `shift + j`.
      slots: where each goes.
      is_live: whether each goes anywhere.
      depends: whether `source` rests on metadata, so that nothing can be fetched before those.
    """

    source: Any
    shift: Any
    slots: list[Any]
    is_live: list[Any]
    depends: bool


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static side of a write.

    Attributes:
      num_tokens: T.
      tokens: tokens that a block holds.
      heads: KV heads that a block holds, a divisor of K; one where values are converted, because
        each head has its scales, and a loop over heads would wait for memory at each.
      slot_heads: heads that a slot has room for, R or R / 2; those beyond K are padding.
    """

    num_tokens: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    slot_heads: int
    new_dtype: Any
    pool_dtype: Any
    tokens: int
    heads: int

    @property
    def converts(self) -> bool:
        """Whether values change on their way, which only registers can do."""
        return self.new_dtype != self.pool_dtype

    @property
    def fills_buffer(self) -> bool:
        """Whether a token's heads end where the next token's may begin: at 128 bytes."""
        return self.heads * self.head_dim * self.pool_dtype.itemsize % 128 == 0

    @property
    def num_fetches(self) -> int:
        """Copies that bring a block's k in, and as many its v: one where its tokens touch."""
        return 1 if self.fills_buffer else self.tokens

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def padding(self) -> int:
        """Heads of a slot that hold zeros."""
        return self.slot_heads - self.num_kv_heads


def _shape(kv_pages, k, num_kv_heads, config) -> _Shape:
    num_pages, page_size, num_rows, _ = kv_pages.shape
    head_dim = layout.padded_head_dim(k.shape[-1] // (num_kv_heads if k.ndim == 2 else 1))
    row_bytes = 2 * head_dim * kv_pages.dtype.itemsize
    converts = k.dtype != kv_pages.dtype
    heads = next(
        n
        for n in range(1 if converts else num_kv_heads, 0, -1)
        if num_kv_heads % n == 0 and n * row_bytes <= _BLOCK_BYTES
    )
    tokens = min(config.block_tokens, max(1, _BLOCK_BYTES // (heads * row_bytes)), k.shape[0])
    if converts:
        # A thread's values are moved as one vector, and vectors have powers of two of them.
        smallest = _WARPGROUP // min(head_dim, _WARPGROUP)
        tokens = max(smallest, 1 << tokens.bit_length() - 1)
    return _Shape(
        num_tokens=k.shape[0],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        slot_heads=num_rows if layout.packs_kv_in_row(head_dim) else num_rows // 2,
        new_dtype=jnp.dtype(k.dtype),
        pool_dtype=jnp.dtype(kv_pages.dtype),
        tokens=tokens,
        heads=heads,
    )


def page_write(kv_pages, k, v, page_ids, token_starts, *, k_scale, v_scale, num_kv_heads, config):
    """See api.page_write. A block takes as many tokens of one page as it holds."""
    if k.shape[0] < kv_pages.shape[1] or page_ids.shape[0] == 0:
        return kv_pages
    config = config or default_config()
    shape = _shape(kv_pages, k, num_kv_heads, config)
    count = min(shape.tokens, shape.page_size)
    parts = pl.cdiv(shape.page_size, count)
    has_sources = token_starts is not None
    if not has_sources:
        page_ids = page_ids[: shape.num_tokens // shape.page_size]

    def rows(block, ids, *starts):
        entry = block // parts
        first_row = block % parts * count
        row = jnp.minimum(first_row, shape.page_size - count)
        page = ids[entry]
        is_live = (page >= 0) & (page < shape.num_pages)
        start = entry * shape.page_size
        if has_sources:
            start = starts[0][entry]
            is_live &= (start >= 0) & (start <= shape.num_tokens - shape.page_size)
            start = jnp.where(is_live, start, 0)
        source, shift = _pull_back(start + row, shape)
        slots = [page * shape.page_size + row + j for j in range(count)]
        is_mine = [True] * count
        if shape.page_size % count:  # the last part begins with rows of the one before
            is_mine = [row + j >= first_row for j in range(count)]
        return _Rows(source, shift, slots, [is_live & x for x in is_mine], has_sources)

    metadata = (page_ids, token_starts) if has_sources else (page_ids,)
    return _write(
        kv_pages,
        k,
        v,
        metadata,
        k_scale,
        v_scale,
        shape,
        config,
        "page_write",
        rows,
        page_ids.shape[0] * parts,
    )


def slice_write(kv_pages, k, v, slices, num_slices, *, k_scale, v_scale, num_kv_heads, config):
    """See api.slice_write. A block takes as many tokens of one slice as it holds."""
    if k.shape[0] == 0 or slices.shape[1] == 0:
        return kv_pages
    config = config or default_config()
    shape = _shape(kv_pages, k, num_kv_heads, config)
    longest = min(shape.page_size, shape.num_tokens)
    count = min(shape.tokens, longest)
    parts = pl.cdiv(longest, count)

    def rows(block, slices, num_slices):
        entry, offset = block // parts, block % parts * count
        slot, token, length = (slices[i, entry] for i in range(3))
        is_live = (entry < num_slices[0]) & (slot >= 0) & (slot < shape.num_slots)
        is_live &= (length >= 1) & (length <= longest)
        is_live &= slot % shape.page_size <= shape.page_size - length
        is_live &= (token >= 0) & (token <= shape.num_tokens - length)
        is_live &= offset < length
        source, shift = _pull_back(jnp.where(is_live, token + offset, 0), shape)
        return _Rows(
            source,
            shift,
            [slot + offset + j for j in range(count)],
            [is_live & (offset + j < length) for j in range(count)],
            depends=True,
        )

    return _write(
        kv_pages,
        k,
        v,
        (slices, num_slices),
        k_scale,
        v_scale,
        shape,
        config,
        "slice_write",
        rows,
        slices.shape[1] * parts,
    )


def token_write(kv_pages, k, v, slots, *, k_scale, v_scale, num_kv_heads, config):
    """See api.token_write. A block takes consecutive tokens, whatever their slots."""
    if k.shape[0] == 0:
        return kv_pages
    config = config or default_config()
    shape = _shape(kv_pages, k, num_kv_heads, config)
    count = min(shape.tokens, shape.num_tokens)

    def rows(block, slots):
        first = jnp.minimum(block * count, shape.num_tokens - count)
        mine = [slots[first + j] for j in range(count)]
        is_live = [
            (slot >= 0) & (slot < shape.num_slots) & (first + j >= block * count)
            for j, slot in enumerate(mine)
        ]
        source, shift = _pull_back(first, shape)
        return _Rows(source, shift, mine, is_live, depends=False)

    return _write(
        kv_pages,
        k,
        v,
        (slots,),
        k_scale,
        v_scale,
        shape,
        config,
        "token_write",
        rows,
        pl.cdiv(shape.num_tokens, count),
    )


def _pull_back(first, shape: _Shape):
    """(source, shift) of tokens from `first` on, so that a whole block of tokens can be read."""
    last = max(shape.num_tokens, shape.tokens) - shape.tokens
    source = jnp.minimum(first, last)
    return source, first - source


def _write(
    kv_pages,
    k,
    v,
    metadata,
    k_scale,
    v_scale,
    shape: _Shape,
    config: GpuWriteConfig,
    name: str,
    rows: Callable[..., _Rows],
    num_blocks: int,
):
    """The one launch of the three writes. The pool is a ref, so that it stays where it is."""
    k, v = (layout.pad_heads(layout.split_heads(x, shape.num_kv_heads)) for x in (k, v))
    missing = shape.tokens - shape.num_tokens
    if missing > 0:  # a lone token of 64: fewer values than a block has threads
        k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (k, v))
    scales: tuple[jax.Array, ...] = ()
    if shape.converts and layout.is_quantized(shape.pool_dtype):
        heads = shape.num_kv_heads
        scales = tuple(oracle.inverse_scale(scale, heads) for scale in (k_scale, v_scale))

    # The tensor copies start at multiples of 128 bytes of shared memory.
    buffer_heads = shape.heads + (not shape.fills_buffer)
    buffer = plgpu.SMEM((shape.tokens, buffer_heads, shape.head_dim), shape.pool_dtype)
    scratch: dict[str, Any] = {"k_smem": buffer, "v_smem": buffer}
    if not shape.converts:
        scratch["barrier"] = plgpu.Barrier(num_arrivals=2 * shape.num_fetches)
    if shape.padding:
        whole = _WARPGROUP * 8 // (2 * shape.head_dim)  # heads that 128 threads fill, 8 values each
        scratch["zeros_smem"] = plgpu.SMEM(
            (pl.cdiv(shape.padding, whole) * whole, 2, shape.head_dim), shape.pool_dtype
        )

    metadata, k, v, scales, kv_pages = unfused((metadata, k, v, scales, kv_pages))
    pool = jax.new_ref(kv_pages.reshape(shape.num_slots, shape.slot_heads, 2, shape.head_dim))
    kernel = functools.partial(
        _kernel, shape=shape, rows=rows, num_metadata=len(metadata), fetch_first=config.fetch_first
    )
    plgpu.kernel(
        kernel,
        out_type=(),
        # The last dimension of a grid may exceed 65,535 blocks of threads.
        grid=(shape.num_kv_heads // shape.heads, num_blocks),
        grid_names=("head_group", "block"),
        scratch_types=scratch,
        compiler_params=_compiler_params(),
        kernel_name=f"{name}_{shape.tokens}x{shape.heads}",
    )(*metadata, k, v, *scales, pool)
    return unfused(pool[...]).reshape(kv_pages.shape)


def _compiler_params():
    # The kernels have the barrier that they need, in commit_smem, and reduce nothing.
    return plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)


def _kernel(
    *refs,
    shape: _Shape,
    rows,
    num_metadata,
    fetch_first,
    k_smem,
    v_smem,
    barrier=None,
    zeros_smem=None,
):
    """One block: fetch, wait, send.

    refs:
      metadata: what `rows` takes, int32, GMEM
      k, v: [T, K, H], GMEM
      inverse_k_scale, inverse_v_scale: f32[K], GMEM, for 8-bit pools
      pool: [P * page_size, heads, 2, H], GMEM, updated in place
    scratch:
      k_smem, v_smem: [tokens, heads, H] of the pool's dtype
      barrier: both of them have come
      zeros_smem: [padding heads or more, 2, H]
    """
    metadata, (k, v, *scales, pool) = refs[:num_metadata], refs[num_metadata:]
    mine = rows(lax.axis_index("block"), *metadata)
    head = lax.axis_index("head_group") * shape.heads
    tokens, heads = pl.ds(mine.source, shape.tokens), pl.ds(head, shape.heads)

    def fetch():
        copies: list[tuple[Any, Any]] = []
        for new, smem in ((k, k_smem), (v, v_smem)):
            if shape.fills_buffer:
                copies.append((new.at[tokens, heads], smem))
            else:
                copies += [
                    (new.at[mine.source + j, heads], smem.at[j, pl.ds(0, shape.heads)])
                    for j in range(shape.tokens)
                ]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(
                source, target, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            )

    def fetch_and_convert():
        values = [new[tokens, head] for new in (k, v)]  # both on their way before either is used
        for kind, smem in enumerate((k_smem, v_smem)):
            scale = scales[kind][head] if scales else None
            smem[:, 0] = convert.convert(values[kind], scale, shape.pool_dtype)

    def send():
        if zeros_smem is not None:
            zeros_smem[...] = jnp.zeros(zeros_smem.shape, zeros_smem.dtype)
        if shape.converts or zeros_smem is not None:
            plgpu.commit_smem()
        for j, (slot, is_live) in enumerate(zip(mine.slots, mine.is_live, strict=True)):

            @pl.when(is_live)
            def _(slot=slot, row=mine.shift + j):
                for kind, smem in enumerate((k_smem, v_smem)):
                    plgpu.copy_smem_to_gmem(
                        smem.at[row, pl.ds(0, shape.heads)],
                        pool.at[slot, heads, kind],
                        commit_group=False,
                    )

            if zeros_smem is not None:

                @pl.when(is_live & (head == 0))
                def _(slot=slot):
                    plgpu.copy_smem_to_gmem(
                        zeros_smem.at[pl.ds(0, shape.padding)],
                        pool.at[slot, pl.ds(shape.num_kv_heads, shape.padding)],
                        commit_group=False,
                    )

        plgpu.commit_smem_to_gmem_group()
        # Shared memory must outlive the reads; the writes are over when the kernel is.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def fetch_and_send():
        if shape.converts:
            fetch_and_convert()
        else:
            fetch()
            plgpu.barrier_wait(barrier)
        send()

    if fetch_first and not mine.depends:
        fetch_and_send()
    else:
        pl.when(functools.reduce(jnp.logical_or, mine.is_live))(fetch_and_send)


def copy_pages(kv_pages, src_ids, dst_ids, *, config=None):
    """See api.copy_pages. Each block copies a part of a page by way of its shared memory."""
    num_pages, page_size, num_rows, num_lanes = kv_pages.shape
    if src_ids.shape[0] == 0:
        return kv_pages
    page_rows = page_size * num_rows
    most = _BLOCK_BYTES // (num_lanes * kv_pages.dtype.itemsize)
    if config is not None:
        most = min(most, config.block_tokens * num_rows)
    count = next(n for n in range(min(most, page_rows), 0, -1) if page_rows % n == 0)
    parts = page_rows // count
    kv_pages, src_ids, dst_ids = unfused((kv_pages, src_ids, dst_ids))
    pool = jax.new_ref(kv_pages.reshape(num_pages, page_rows, num_lanes))

    def copy_pages_kernel(src_ids, dst_ids, pool, rows_smem, barrier):
        # src_ids, dst_ids: i32[n]; pool: [P, page rows, C]; rows_smem: [rows of a part, C]
        block = lax.axis_index("block")
        src, dst = (ids[block // parts] for ids in (src_ids, dst_ids))
        rows = pl.ds(block % parts * count, count)

        @pl.when((src >= 0) & (src < num_pages) & (dst >= 0) & (dst < num_pages))
        def _():
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
        copy_pages_kernel,
        out_type=(),
        grid=(src_ids.shape[0] * parts,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((count, num_lanes), kv_pages.dtype), plgpu.Barrier()],
        compiler_params=_compiler_params(),
        kernel_name=f"copy_pages_{count}",
    )(src_ids, dst_ids, pool)
    return unfused(pool[...]).reshape(kv_pages.shape)
