# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on Hopper: a schedule, a kernel for short sequences and one for the rest.

Any batch takes three launches, and none of them needs the host to know a length. XLA computes the
schedule. The decode kernel takes the sequences whose new tokens fit the rows of one warpgroup, and
splits their keys evenly over the chip. The prefill kernel combines what was split, takes the other
sequences tile by tile, and zeroes the rows that belong to no sequence. Where the caller promises
that there are no other sequences, a small kernel does the rest of that.
"""

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
from pallas_paged.attention.gpu import kernel, kv_blocks
from pallas_paged.attention.gpu.config import GpuAttentionConfig, default_config
from pallas_paged.attention.gpu.mma_layout import operand_transforms
from pallas_paged.attention.gpu.prefill import QueryStage
from pallas_paged.attention.gpu.refs import (
    DecodeOutputs,
    Inputs,
    PartialResults,
    PrefillOutputs,
)
from pallas_paged.attention.gpu.schedule import make_schedule
from pallas_paged.attention.gpu.spec import (
    ROW_TILE,
    WARPGROUP_ROWS,
    KernelSpec,
    KvBlockSizes,
)
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from pallas_paged.kv_write.gpu import launch as writes
from pallas_paged.unfused import unfused

_HEAD_DIMS = (64, 128, 256)
# The shared memory that one thread block may have, less what barriers take.
_SHARED_BYTES = 227 * 1024 - 1024


def plan(
    q: jax.Array,
    kv_pages: jax.Array,
    page_indices: jax.Array,
    options: AttentionOptions,
    config: GpuAttentionConfig | None = None,
    k: jax.Array | None = None,
) -> dispatch.Plan:
    """What the kernels are launched with for a call of these shapes, or why they cannot run.

    The arrays may be `jax.ShapeDtypeStruct`s: nothing is traced.

    Args:
      q: [T, N, H].
      kv_pages: [P, page_size, R, C].
      page_indices: int32[S, M].
      options: the static options.
      config: the block sizes; None lets `default_config` choose.
      k: the new keys of a call that also writes them, which another kernel does.

    Returns:
      a `Plan` whose `spec` is a `KernelSpec`.
    """
    refusal = dispatch.why_no_mosaic_gpu() or _refusal(
        q, kv_pages, page_indices, options.num_kv_heads
    )
    if refusal is None and k is not None:
        refusal = writes.unsupported_pool(kv_pages, q)
    if refusal is not None:
        return dispatch.Plan(refusal=refusal)
    head_dim = layout.padded_head_dim(q.shape[2])
    max_seqs, table_width = page_indices.shape
    num_pages, page_size = kv_pages.shape[:2]
    spec = KernelSpec(
        num_heads=q.shape[1],
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        table_width=table_width,
        q_dtype=jnp.dtype(q.dtype),
        pool_dtype=jnp.dtype(kv_pages.dtype),
        product_dtype=jnp.dtype(q.dtype),
        options=options,
        config=config
        or default_config(head_dim, layout.is_quantized(kv_pages.dtype), max_seqs, page_size),
        num_multiprocessors=dispatch.num_multiprocessors(),
    )
    refusal = None if config is None else _refusal_of_sizes(spec)
    return dispatch.Plan(refusal=refusal) if refusal else dispatch.Plan(spec=spec)


def _refusal(
    q: jax.Array, kv_pages: jax.Array, page_indices: jax.Array, num_kv_heads: int
) -> str | None:
    """Why the kernels cannot run a call with any block sizes, as a sentence; None if they can."""
    num_heads, head_dim = q.shape[1], layout.padded_head_dim(q.shape[2])
    _, page_size, num_rows, _ = kv_pages.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype} and the matrix unit takes bfloat16 and float16: cast q"
    if kv_pages.dtype not in (q.dtype, jnp.float8_e4m3fn, jnp.float8_e5m2):
        return (
            f"the pool is {kv_pages.dtype} and q is {q.dtype}; the kernels take a pool of q's "
            "dtype, float8_e4m3fn or float8_e5m2"
        )
    if head_dim not in _HEAD_DIMS:
        return (
            f"head_dim is {q.shape[2]} and the kernels take up to {_HEAD_DIMS[-1]}: split the "
            "heads or use the oracle"
        )
    if page_size % ROW_TILE:
        return (
            f"page_size is {page_size}, and a page must be whole tiles of the matrix unit: take a "
            f"multiple of {ROW_TILE} tokens"
        )
    if head_dim > layout.HALF_LANES and num_rows % 2:
        return (
            f"the pool has R = {num_rows} rows per slot, and K and V of a head are a pair of rows; "
            "make it with make_kv_pages"
        )
    group = num_heads // num_kv_heads
    if group > WARPGROUP_ROWS:
        return (
            f"{group} query heads read one KV head, and the decode kernel holds at most "
            f"{WARPGROUP_ROWS} in the rows of its products"
        )
    max_seqs, table_width = page_indices.shape
    if max_seqs * num_kv_heads * -(-table_width * page_size // 64) >= 2**31:
        return (
            f"page_indices [{max_seqs}, {table_width}] has room for 2**31 KV blocks or more, "
            "and blocks are counted in int32"
        )
    return None


def _refusal_of_sizes(spec: KernelSpec) -> str | None:
    """Why the kernels cannot run with a caller's block sizes, as a sentence; None if they can."""
    if spec.is_quantized and spec.config.decode_pipelines > 1:
        return (
            f"config has {spec.config.decode_pipelines} decode pipelines, and where a pool is "
            "converted there are registers for one"
        )
    for name, needed in zip(("prefill", "decode"), _shared_bytes(spec), strict=True):
        if needed > _SHARED_BYTES:
            return (
                f"config's {name} blocks take {needed} bytes of shared memory, and a "
                f"multiprocessor has {_SHARED_BYTES} for them: take fewer stages or keys"
            )
    return None


def _shared_bytes(spec: KernelSpec) -> tuple[int, int]:
    """Bytes of shared memory per thread block: of the prefill kernel, then of the decode kernel."""

    def stages(sizes: KvBlockSizes) -> int:
        bytes_per_value = (
            sizes.num_stages * spec.q_dtype.itemsize
            + sizes.num_raw_stages * spec.pool_dtype.itemsize
        )
        return sizes.block_kv * spec.kv_dim * bytes_per_value

    queries = WARPGROUP_ROWS * spec.head_dim * spec.q_dtype.itemsize
    decode_queries = 0 if spec.has_decode_queries_in_registers else queries
    return (
        spec.prefill_consumers * queries + stages(spec.prefill_kv),
        spec.config.decode_pipelines * (decode_queries + stages(spec.decode_kv)),
    )


def attend(
    spec: KernelSpec,
    q: jax.Array,
    new: None,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
) -> tuple[jax.Array, jax.Array | None, None]:
    """Prepares the operands and launches the kernels.

    Args:
      spec: the static parameters, of `plan`.
      q: [T, N or more, H]; the first N heads are the queries.
      new: None: new keys and values are in the pool already.
      kv_pages: [P, page_size, R, C].
      batch: the metadata.
      factors: the traced options.

    Returns:
      the output, q's dtype [T, N, H], the log-sum-exp f32[T, N] or None, and None.
    """
    num_tokens, _, head_dim = q.shape
    # Tensor copies see rows in tiles of 8, and heads as wide as the pool has them. A batch of other
    # sizes is copied.
    q = jnp.pad(layout.pad_heads(q), ((0, -num_tokens % ROW_TILE), (0, 0), (0, 0)))
    operands = {
        "q": q,
        # K and V of a head lie side by side: no copy.
        "kv": kv_pages.reshape(*kv_pages.shape[:2], -1, spec.kv_dim),
        "table": batch.page_indices,
        "sm_scale": jnp.asarray(factors.sm_scale, jnp.float32).reshape(1),
    }
    if factors.sliding_window is not None:
        operands["window"] = jnp.asarray(factors.sliding_window, jnp.int32).reshape(1)
    if spec.is_quantized:
        for name, scale in (("k_scale", factors.k_scale), ("v_scale", factors.v_scale)):
            if scale is not None:
                operands[name] = jnp.asarray(scale, jnp.float32).reshape(-1)
    if factors.sinks is not None:
        operands["sinks"] = factors.sinks.astype(jnp.float32)
    operands |= {
        "kv_lens": batch.kv_lens,
        "cu_q_lens": batch.cu_q_lens,
        "num_seqs": batch.num_seqs,
        "schedule": make_schedule(batch, factors.sliding_window, q.shape[0], spec),
    }
    out, lse = lax.platform_dependent(
        operands,
        cuda=functools.partial(_launch, spec),
        default=functools.partial(_launch, dataclasses.replace(spec, is_interpreted=True)),
    )
    return out[:num_tokens, :, :head_dim], None if lse is None else lse[:num_tokens], None


def _launch(spec: KernelSpec, operands: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """Launches the two kernels: the second completes the output of the first in place."""
    operands = unfused(operands)
    decode, prefill = spec.decode_kv, spec.prefill_kv
    num_pipelines = spec.config.decode_pipelines
    decode_spec = spec
    if spec.is_quantized:
        # float16 holds every 8-bit float. One instruction converts two of them, five for bfloat16.
        decode_spec = dataclasses.replace(spec, product_dtype=jnp.dtype(jnp.float16))
    decode_queries = None
    if not spec.has_decode_queries_in_registers:
        decode_queries = _queries_type(decode_spec, num_pipelines)
    [outputs] = _call(
        kernel.decode_kernel,
        f"decode_{_sizes(decode)}_{num_pipelines}",
        decode_spec,
        num_warpgroups=num_pipelines * spec.decode_roles,
        operands=(operands,),
        out_types=(_decode_types(spec, operands["q"]),),
        scratch_types=(
            decode_queries,
            kv_blocks.scratch_types(decode_spec, decode, 1, num_pipelines),
        ),
    )
    partial = PartialResults(
        outputs.means.reshape(len(outputs.means), -1),
        outputs.log2_sums.reshape(len(outputs.log2_sums), -1),
        outputs.splits,
    )
    in_place = PrefillOutputs(
        jax.new_ref(outputs.out), None if outputs.lse is None else jax.new_ref(outputs.lse)
    )
    num_consumers = spec.prefill_consumers
    if spec.has_prefills:
        barrier = plgpu.Barrier(num_barriers=num_consumers)
        _call(
            kernel.prefill_kernel,
            f"prefill_{_sizes(prefill)}",
            spec,
            num_warpgroups=num_consumers + 1 + spec.is_quantized,
            operands=(operands, partial, in_place),
            out_types=(),
            scratch_types=(
                QueryStage(_queries_type(spec, num_consumers), barrier, barrier),
                kv_blocks.scratch_types(spec, prefill, num_consumers),
            ),
        )
    else:
        _call(
            kernel.finish_kernel,
            "finish",
            spec,
            num_warpgroups=num_consumers,
            operands=(operands, partial, in_place),
            out_types=(),
            scratch_types=(),
        )
    return unfused(jax.tree.map(jax.ref.freeze, tuple(in_place)))


def _decode_types(spec: KernelSpec, q: jax.Array) -> DecodeOutputs:
    """The types of what the decode kernel writes."""
    num_partitions = spec.num_multiprocessors * spec.config.decode_pipelines
    partial = jax.ShapeDtypeStruct(
        (2 * num_partitions + 1, WARPGROUP_ROWS, spec.head_dim), jnp.float32
    )
    rows_and_heads = (q.shape[0], spec.num_heads)
    return DecodeOutputs(
        out=jax.ShapeDtypeStruct((*rows_and_heads, spec.head_dim), spec.q_dtype),
        means=partial,
        log2_sums=partial,
        splits=jax.ShapeDtypeStruct((num_partitions, 4), jnp.int32),
        lse=jax.ShapeDtypeStruct(rows_and_heads, jnp.float32) if spec.options.return_lse else None,
    )


def _queries_type(spec: KernelSpec, count: int) -> Any:
    """The scratch for the queries of `count` consumers, as the matrix unit takes them."""
    return plgpu.SMEM(
        (count, WARPGROUP_ROWS, spec.head_dim),
        spec.product_dtype,
        transforms=operand_transforms(spec.product_dtype),
    )


def _sizes(sizes: KvBlockSizes) -> str:
    """The sizes of KV blocks in the name of a kernel, which profiles show."""
    return f"{sizes.block_kv}_{sizes.num_stages}_{sizes.num_raw_stages}"


def _call(
    main_loop: Callable[..., None],
    name: str,
    spec: KernelSpec,
    *,
    num_warpgroups: int,
    operands: tuple[Any, ...],
    out_types: tuple[Any, ...],
    scratch_types: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Launches `main_loop(spec, *operands, *outputs, *scratch)`, a thread block per multiprocessor.

    Args:
      main_loop: the function of kernel.py.
      name: the kernel's name in profiles.
      spec: the static parameters.
      num_warpgroups: the warpgroups of a thread block.
      operands: the arrays of `Inputs` by name, then pytrees of arrays and refs.
      out_types: pytrees of the types of the outputs.
      scratch_types: pytrees of the types of the scratch.

    Returns:
      the outputs, in the pytrees of `out_types`.
    """
    in_leaves, in_tree = jax.tree.flatten(operands)
    out_leaves, out_tree = jax.tree.flatten(out_types)

    def body(*refs: Any) -> None:
        inputs, *others = jax.tree.unflatten(in_tree, refs[: len(in_leaves)])
        outputs = jax.tree.unflatten(out_tree, refs[len(in_leaves) :])
        pl.run_scoped(
            functools.partial(main_loop, spec, Inputs(**inputs), *others, *outputs),
            *scratch_types,
            collective_axes="warpgroup",
        )

    body.__name__ = body.__qualname__ = name
    outputs = plgpu.kernel(
        body,
        out_type=out_leaves,
        grid=(spec.num_multiprocessors,),
        grid_names=("block",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*in_leaves)
    return jax.tree.unflatten(out_tree, outputs)
