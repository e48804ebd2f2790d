# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Writes on Hopper: a thread block brings a few tokens into shared memory and sends them to slots.

Pages, slices and tokens share one kernel (kernel.py) and differ in the few lines that say which
tokens a thread block takes and where they go (block_tokens.py).
"""

__all__ = [
    "GpuWriteConfig",
    "copy_pages",
    "default_config",
    "gather_pages",
    "page_write",
    "plan",
    "scatter_pages",
    "slice_write",
    "token_write",
    "unsupported",
    "unsupported_pool",
]

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_paged import dispatch, layout
from pallas_paged.kv_write import oracle
from pallas_paged.kv_write.gpu.block_tokens import FindTokens, of_pages, of_slices, of_tokens
from pallas_paged.kv_write.gpu.kernel import kernel
from pallas_paged.kv_write.gpu.page_copies import (
    BLOCK_BYTES,
    COMPILER_PARAMS,
    copy_pages,
    gather_pages,
    scatter_pages,
)
from pallas_paged.kv_write.gpu.spec import KernelSpec
from pallas_paged.kv_write.options import WriteOptions, WriteScales
from pallas_paged.unfused import unfused

_HEAD_DIMS = (64, 128, 256)
_WARPGROUP = 128  # threads; an array in registers has a multiple of as many values


@dataclasses.dataclass(frozen=True)
class GpuWriteConfig:
    """Block sizes of the GPU writes.

    Attributes:
      block_tokens: tokens that a thread block brings in and sends, at most. There are fewer where
        they would not fit its shared memory, or where pages are shorter. For moves of pages: tokens
        of a page that a thread block copies, with the same limit of bytes.
      fetch_first: whether a thread block fetches k and v before it knows if they are wanted, where
        it knows which they are. That saves one latency of the memory, and costs traffic in batches
        with many entries to skip.
    """

    block_tokens: int = 4
    fetch_first: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.block_tokens <= 64:
            raise ValueError(
                f"GpuWriteConfig: block_tokens is {self.block_tokens}; wanted 1 to 64, because a "
                "block's copies are unrolled"
            )


def default_config() -> GpuWriteConfig:
    """One size for all calls.

    On an H100, sizes of 1 to 8 tokens are within 2% of each other for calls of 1,024 tokens and
    more, and take 1.7 to 2.3 us for 64 tokens (BUILD_NOTES.md).
    """
    return GpuWriteConfig()


def unsupported(kv_pages: jax.Array, k: jax.Array, num_kv_heads: int, head_dim: int) -> str | None:
    """Why the kernel cannot run a write, as a sentence; None if it can."""
    del num_kv_heads
    reason = unsupported_pool(kv_pages, k)
    if reason is None and layout.padded_head_dim(head_dim) not in _HEAD_DIMS:
        reason = (
            f"head_dim is {head_dim} and the kernels take up to {_HEAD_DIMS[-1]}; split the heads "
            "or use the oracle"
        )
    if reason is None and head_dim > layout.HALF_LANES and kv_pages.shape[2] % 2:
        reason = (
            f"the pool has R = {kv_pages.shape[2]} rows per slot and K and V of a head are a pair "
            "of rows; make it with make_kv_pages"
        )
    return reason


def unsupported_pool(kv_pages: jax.Array, k: jax.Array | None = None) -> str | None:
    """Why the kernels cannot run on a pool, as a sentence; None if they can."""
    reason = dispatch.why_no_mosaic_gpu()
    if reason is None and (_varies(kv_pages) or _varies(k)):
        reason = (
            "under shard_map jax's kernels on a GPU take no ref that varies over the mesh; call "
            "jax.shard_map with check_vma=False"
        )
    return reason


def _varies(array: Any) -> bool:
    """Whether each shard of a shard_map that checks what varies has an array of its own."""
    axes = getattr(getattr(array, "aval", None), "manual_axis_type", None)
    return axes is not None and bool(axes.varying)


def plan(
    op: str,
    kv_pages: jax.Array,
    k: jax.Array,
    options: WriteOptions,
    *,
    num_entries: int,
    has_token_starts: bool = False,
) -> KernelSpec:
    """The kernel's static parameters for a call, made once per trace.

    Args:
      op: the op's name.
      kv_pages, k: the arrays, or their shapes and dtypes; k may be a packed QKV.
      options: the call's options, of which `num_kv_heads` and `config` are read.
      num_entries: pages or slices that the call names; 1 for tokens.
      has_token_starts: whether each page names its first token.
    """
    num_pages, page_size, num_rows, _ = kv_pages.shape
    num_tokens, num_kv_heads = k.shape[0], options.num_kv_heads
    config = options.config or default_config()
    # A packed QKV has more heads than K.
    spare_heads = k.shape[1] - num_kv_heads if k.ndim == 3 else 0
    first_heads = (spare_heads - num_kv_heads, spare_heads) if spare_heads else (0, 0)
    head_dim = layout.padded_head_dim(k.shape[-1] // (num_kv_heads if k.ndim == 2 else 1))
    row_bytes = 2 * head_dim * kv_pages.dtype.itemsize
    converts = k.dtype != kv_pages.dtype
    block_heads = next(
        n
        for n in range(1 if converts else num_kv_heads, 0, -1)
        if num_kv_heads % n == 0 and n * row_bytes <= BLOCK_BYTES
    )
    most = max(1, BLOCK_BYTES // (block_heads * row_bytes))
    block_tokens = min(config.block_tokens, most, num_tokens)
    if converts:
        # A thread's values are moved as one vector, and vectors have powers of two of them.
        smallest = _WARPGROUP // min(head_dim, _WARPGROUP)
        block_tokens = max(smallest, 1 << block_tokens.bit_length() - 1)
    longest = {"page_write": page_size, "slice_write": min(page_size, num_tokens)}
    return KernelSpec(
        op=op,
        num_tokens=num_tokens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        slot_heads=num_rows if layout.packs_kv_in_row(head_dim) else num_rows // 2,
        new_dtype=jnp.dtype(k.dtype),
        pool_dtype=jnp.dtype(kv_pages.dtype),
        num_entries=num_entries,
        entry_tokens=longest.get(op, num_tokens),
        block_tokens=block_tokens,
        block_heads=block_heads,
        first_heads=first_heads,
        has_token_starts=has_token_starts,
        fetch_first=config.fetch_first,
    )


def page_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    page_ids: jax.Array,
    token_starts: jax.Array | None,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """See api.page_write. A thread block takes as many tokens of one page as it has room for."""
    page_size = kv_pages.shape[1]
    if k.shape[0] < page_size or page_ids.shape[0] == 0:
        return kv_pages
    if token_starts is None:
        page_ids = page_ids[: k.shape[0] // page_size]
    spec = plan(
        "page_write",
        kv_pages,
        k,
        options,
        num_entries=page_ids.shape[0],
        has_token_starts=token_starts is not None,
    )
    metadata = (page_ids,) if token_starts is None else (page_ids, token_starts)
    return _launch(spec, of_pages, kv_pages, k, v, metadata, scales)


def slice_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    slices: jax.Array,
    num_slices: jax.Array,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """See api.slice_write. A thread block takes as many tokens of one slice as it has room for."""
    if k.shape[0] == 0 or slices.shape[1] == 0:
        return kv_pages
    spec = plan("slice_write", kv_pages, k, options, num_entries=slices.shape[1])
    return _launch(spec, of_slices, kv_pages, k, v, (slices, num_slices), scales)


def token_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    slots: jax.Array,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """See api.token_write. A thread block takes consecutive tokens, whatever their slots."""
    if k.shape[0] == 0:
        return kv_pages
    spec = plan("token_write", kv_pages, k, options, num_entries=1)
    return _launch(spec, of_tokens, kv_pages, k, v, (slots,), scales)


def _launch(
    spec: KernelSpec,
    find_tokens: FindTokens,
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    metadata: tuple[jax.Array, ...],
    scales: WriteScales,
) -> jax.Array:
    """The one launch of the three writes. The pool is a ref, so that it stays where it is."""
    if v is None:  # the kernel takes both from a packed QKV, each from its first head on
        v = k
    else:
        k, v = (layout.split_heads(x, spec.num_kv_heads) for x in (k, v))
    k, v = (layout.pad_heads(x) for x in (k, v))
    missing = spec.block_tokens - spec.num_tokens
    if missing > 0:  # a lone token of 64: fewer values than a thread block has threads
        k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (k, v))
    inverse_scales: tuple[jax.Array, ...] = ()
    if spec.has_scales:
        inverse_scales = tuple(oracle.inverse_scale(x, spec.num_kv_heads) for x in scales)

    # The tensor copies start at multiples of 128 bytes of shared memory.
    buffer_heads = spec.block_heads + (not spec.fills_buffer)
    buffer = plgpu.SMEM((spec.block_tokens, buffer_heads, spec.head_dim), spec.pool_dtype)
    scratch: dict[str, Any] = {"k_smem": buffer, "v_smem": buffer}
    if not spec.converts:
        scratch["barrier"] = plgpu.Barrier(num_arrivals=2 * spec.num_fetches)
    if spec.padding:
        whole = _WARPGROUP * 8 // (2 * spec.head_dim)  # heads that 128 threads fill, 8 values each
        scratch["zeros_smem"] = plgpu.SMEM(
            (pl.cdiv(spec.padding, whole) * whole, 2, spec.head_dim), spec.pool_dtype
        )

    metadata, k, v, inverse_scales, kv_pages = unfused((metadata, k, v, inverse_scales, kv_pages))
    pool = jax.new_ref(kv_pages.reshape(spec.num_slots, spec.slot_heads, 2, spec.head_dim))
    plgpu.kernel(
        functools.partial(kernel, spec=spec, find_tokens=find_tokens),
        out_type=(),
        grid=spec.grid,
        grid_names=("head_group", "block"),
        scratch_types=scratch,
        compiler_params=COMPILER_PARAMS,
        kernel_name=spec.name,
    )(*metadata, k, v, *inverse_scales, pool)
    return unfused(pool[...]).reshape(kv_pages.shape)
