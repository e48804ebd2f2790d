# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Ragged paged attention on TPU: one kernel that takes decodes and prefills in the batch's order.

q and the output stay `[T, N*H]` in memory, as a projection makes them. The kernel takes whole row
tiles of them, and for heads of whole 128 lanes nothing is transposed, padded or copied before it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import dispatch, layout
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from pallas_paged.attention.tpu import decode, page_table, scratch
from pallas_paged.attention.tpu.config import (
    TpuAttentionConfig,
    default_config,
    fits,
    vmem_bytes,
    vmem_capacity,
)
from pallas_paged.attention.tpu.kernel import kernel
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.attention.tpu.spec import ROW_TILE, KernelSpec, chunk_tokens
from pallas_paged.kv_write import oracle as write_oracle
from pallas_paged.kv_write.tpu.interleave import Slots

# Page table entries that SMEM (1 MiB) holds beside the other metadata. A longer table is streamed.
MAX_TABLE = 160_000
# Entries of a streamed table that come at a time, a power of 2: two parts take 256 KiB.
_TABLE_PART = 32_768
# Sequences whose lengths and first rows SMEM holds beside the page table.
_MAX_SEQS = 20_000


def plan(
    q: jax.Array,
    kv_pages: jax.Array,
    page_indices: jax.Array,
    options: AttentionOptions,
    config: TpuAttentionConfig | None = None,
    k: jax.Array | None = None,
) -> dispatch.Plan:
    """What the kernel is launched with for a call of these shapes, or why it cannot run.

    The arrays may be `jax.ShapeDtypeStruct`s: nothing is traced.

    Args:
      q: [T, N, H].
      kv_pages: [P, page_size, R, C].
      page_indices: int32[S, M].
      options: the static options.
      config: the block sizes; None lets `default_config` choose.
      k: the new keys, [T, K, H] or [T, K*H], of a call that writes them. They stay in VMEM until
        their sequence is finished. If VMEM has no room for them, the plan only reads. It also only
        reads if k is in the pool's 8-bit dtype already, because the kernel attends to values that
        it has quantised itself.

    Returns:
      a `Plan` whose `spec` is a `KernelSpec`; `spec.writes` says whether the kernel writes k and v.
    """
    max_seqs, table_width = page_indices.shape
    num_pages, page_size = kv_pages.shape[:2]
    if jnp.float16 in (q.dtype, kv_pages.dtype):
        return dispatch.Plan(refusal="a TPU has no float16; use bfloat16")
    if max_seqs > _MAX_SEQS:
        return dispatch.Plan(
            refusal=f"the lengths of {max_seqs} sequences do not fit SMEM ({_MAX_SEQS} do); split "
            "the batch"
        )
    heads = heads_of(q, kv_pages, options.num_kv_heads)
    sizes = config or default_config(heads, page_size)
    refusal = _refusal(heads, sizes, max_seqs, table_width, page_size)
    if refusal is not None:
        return dispatch.Plan(refusal=refusal)
    new_kv = None
    if k is not None and not layout.is_quantized(k.dtype):
        writing = config or default_config(heads, page_size, q.shape[0])
        if fits(heads, writing, q.shape[0]):
            sizes, new_kv = writing, _new_slots(heads, is_flat=k.ndim == 2)
    spec = KernelSpec(
        heads=heads,
        options=options,
        num_tokens=layout.round_up(q.shape[0], ROW_TILE),
        max_seqs=max_seqs,
        table_width=table_width,
        num_pages=num_pages,
        page_size=page_size,
        chunk=chunk_tokens(page_size, sizes.block_kv),
        block_kv=sizes.block_kv,
        num_stages=sizes.num_stages,
        kv_blocks_per_iteration=sizes.kv_blocks_per_iteration,
        block_q=sizes.block_q,
        new_kv=new_kv,
        mask_dtype=_mask_dtype(heads, options),
        table_part=_TABLE_PART if page_indices.size > MAX_TABLE else 0,
        is_interpreted=False,
    )
    return dispatch.Plan(spec=spec)


def _refusal(
    heads: Heads, config: TpuAttentionConfig, max_seqs: int, table_width: int, page_size: int
) -> str | None:
    """Why the kernel cannot run with these block sizes, as a sentence; None if it can."""
    chunks_per_page = page_size // chunk_tokens(page_size, config.block_kv)
    num_chunks = max_seqs * table_width * chunks_per_page
    # Less the chunks that the last KV block reads after the end of the table.
    if num_chunks > 2**31 - 2**16:
        return (
            f"page_indices {[max_seqs, table_width]} has {num_chunks} chunks of pages, and the "
            "kernel counts them in int32; split the batch, or shorten the page table"
        )
    needed, there = vmem_bytes(heads, config, return_lse=True), vmem_capacity()
    if needed > there:
        return (
            f"{heads.num_heads} query heads on {heads.num_kv_heads} KV heads of {heads.head_dim} "
            f"with {config} need {needed / 2**20:.1f} MiB of VMEM, and {there / 2**20:.0f} MiB are "
            "there; shard the heads or make the blocks smaller"
        )
    return None


def heads_of(q: jax.Array, kv_pages: jax.Array, num_kv_heads: int) -> Heads:
    """The shapes and dtypes of a call's heads: q [T, N, H], kv_pages [P, page_size, R, C]."""
    rows_per_word = 4 // kv_pages.dtype.itemsize
    return Heads(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[2],
        pool_dtype=jnp.dtype(kv_pages.dtype),
        num_rows=layout.round_up(kv_pages.shape[2], rows_per_word),
        q_dtype=jnp.dtype(q.dtype),
    )


def _new_slots(heads: Heads, *, is_flat: bool) -> Slots:
    """How new k and v become slots of the pool; they are [T, K*H] if flat, else [T, K, H]."""
    return Slots(
        heads.num_kv_heads,
        heads.head_dim,
        heads.pool_dtype,
        heads.num_rows,
        is_flat=is_flat,
    )


def _mask_dtype(heads: Heads, options: AttentionOptions) -> jnp.dtype:
    """The dtype in which a prefill's weights are masked.

    It is the dtype of the matrix products' operands, because bfloat16 takes half as many words as
    float32. There are two exceptions. The log-sum-exp needs the masked weights in float32. And the
    vector unit has no bfloat16 before v6e: there a mask of pairs would be rearranged for every
    register of weights.
    """
    has_bfloat16 = (dispatch.tpu_generation() or 6) >= 6
    return heads.compute_dtype if has_bfloat16 and not options.return_lse else jnp.dtype("float32")


def attend(
    spec: KernelSpec,
    q: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Prepares the operands and launches the kernel.

    Args:
      spec: the `spec` of `plan`.
      q: [T, N, H].
      new: k and v, [T, K, H] or [T, K*H], where `spec.writes`; else None.
      kv_pages: [P, page_size, R, C].
      batch: which tokens and pages belong to which sequence.
      factors: the numbers of the call that may be traced.

    Returns:
      the output [T, N, H]; the log-sum-exp f32[T, N], None if it is not wanted; and the pool, None
      unless `spec.writes`.
    """
    heads = spec.heads
    num_tokens, num_heads, head_dim = q.shape
    num_rows = kv_pages.shape[2]
    metadata = _metadata(spec, batch, factors)
    # q is reshaped back to what a projection made, before any padding that this form does not need.
    pad_lanes = heads.lanes - head_dim
    if pad_lanes:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_lanes)))
    q = q.reshape(num_tokens, num_heads * heads.lanes)
    names = ("q", "k", "v") if spec.writes else ("q",)
    tensors = {
        name: _pad_rows(x, spec.num_tokens)
        for name, x in zip(names, (q, *(new or ())), strict=True)
    }
    pool = layout.flatten_slots(kv_pages)
    if heads.num_rows > num_rows:
        pool = jnp.pad(pool, ((0, 0), (0, heads.num_rows - num_rows), (0, 0)))

    def launch(is_interpreted: bool, pool: jax.Array) -> list[jax.Array]:
        static = dataclasses.replace(spec, is_interpreted=is_interpreted)
        return list(_launch(static, metadata, tensors, pool))

    def launch_with_words(pool: jax.Array) -> list[jax.Array]:
        """Interpreted, with the pool as words: the interpreter cannot view a ref as words."""
        *results, last = launch(True, layout.to_words(pool))
        return [*results, layout.from_words(last, heads.pool_dtype) if spec.writes else last]

    out, *results = lax.platform_dependent(
        pool,
        tpu=functools.partial(launch, False),
        default=launch_with_words if heads.rows_per_word > 1 else functools.partial(launch, True),
    )
    out = out[:num_tokens].reshape(num_tokens, num_heads, heads.lanes)[..., :head_dim]
    lse = results.pop(0)[:num_tokens, :num_heads] if spec.options.return_lse else None
    if not spec.writes:
        return out, lse, None
    return out, lse, results[0][:, :num_rows].reshape(kv_pages.shape)


def _metadata(spec: KernelSpec, batch: Batch, factors: Factors) -> dict[str, jax.Array]:
    """All operands but the large tensors, by their names in `Refs`."""
    options, num_kv_heads = spec.options, spec.heads.num_kv_heads
    kv_lens, page_indices, cu_q_lens, num_seqs = batch
    table = page_table.prepare(page_indices, spec.num_pages, spec.page_size, writes=spec.writes)
    # The entries of all chunks that a KV block has room for are read, though the block may have
    # fewer chunks.
    padding = spec.chunks_per_block
    if spec.table_part:
        padding = -table.shape[0] % spec.table_part
    table = jnp.pad(table, (0, padding))
    numbers = [jnp.asarray(factors.sm_scale, jnp.float32).reshape(1)]
    if options.has_scales:
        for scale in (factors.k_scale, factors.v_scale):
            scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
            numbers.append(jnp.broadcast_to(scale, (num_kv_heads,)))
    metadata = {
        "kv_lens": kv_lens,
        "page_table": table,
        "cu_q_lens": cu_q_lens,
        "num_seqs": num_seqs,
        "factors": jnp.concatenate(numbers),
    }
    if options.has_window:
        metadata["sliding_window"] = jnp.asarray(factors.sliding_window, jnp.int32).reshape(1)
    if options.has_sinks:
        num_heads, sinks = spec.heads.num_heads, jnp.asarray(factors.sinks)
        column = jnp.pad(sinks, (0, decode.decode_rows(num_heads) - num_heads))
        metadata["sinks"] = sinks
        metadata["sinks_vmem"] = jnp.broadcast_to(column[:, None], (column.shape[0], layout.LANES))
    if spec.writes and layout.is_quantized(spec.heads.pool_dtype):
        scales = (factors.k_scale, factors.v_scale)
        inverse_scales = [write_oracle.inverse_scale(x, num_kv_heads) for x in scales]
        metadata["inverse_scales"] = jnp.concatenate(inverse_scales)
    return metadata


def _pad_rows(x: jax.Array, num_rows: int) -> jax.Array:
    missing = num_rows - x.shape[0]
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def _launch(
    spec: KernelSpec,
    metadata: dict[str, jax.Array],
    tensors: dict[str, jax.Array],
    pool: jax.Array,
) -> list[jax.Array]:
    """The one pallas_call.

    Args:
      spec: the static parameters.
      metadata: operands in SMEM, but for a streamed page table and the column of sinks.
      tensors: q, and k and v if they are written; in HBM.
      pool: [P*page_size, R or words, C].

    Returns:
      the output, the log-sum-exp if it is wanted, and the pool if it is written to.
    """
    hbm, smem, vmem = (
        pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.SMEM, pltpu.VMEM)
    )
    in_specs = {name: vmem if x.ndim == 2 else smem for name, x in metadata.items()}
    if spec.table_part:
        in_specs["page_table"] = hbm
    in_specs |= dict.fromkeys(tensors, hbm)
    in_specs["pool_before" if spec.writes else "pool"] = hbm
    q = tensors["q"]
    # The results vary over a shard_map's axes as q does, and the pool with it.
    shape_of = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type
    )
    out_shapes = {"out": shape_of(q.shape, q.dtype)}
    if spec.options.return_lse:
        lanes = layout.round_up(spec.heads.num_heads, layout.LANES)
        out_shapes["lse"] = shape_of((q.shape[0], lanes), jnp.float32)
    aliases = {}
    if spec.writes:
        aliases[len(in_specs) - 1] = len(out_shapes)
        out_shapes["pool"] = layout.result_like(pool)
    scratch_shapes = scratch.shapes(spec, tensors)
    name = "write_and_attend" if spec.writes else "ragged_paged_attention"
    return pl.pallas_call(
        functools.partial(kernel, spec, (*in_specs, *out_shapes, *scratch_shapes)),
        out_shape=list(out_shapes.values()),
        in_specs=list(in_specs.values()),
        out_specs=[hbm for _ in out_shapes],
        input_output_aliases=aliases,
        scratch_shapes=list(scratch_shapes.values()),
        # Nothing is out of bounds: every page id is checked (page_table.prepare and page_row,
        # new_kv._plan_send), every row is inside the batch (work_items.rows_of), and every position
        # is inside the page table (work_items._candidate_at).
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_capacity(),
        ),
        name=f"{name}_block{spec.block_kv}_window{spec.block_q}",
    )(*metadata.values(), *tensors.values(), pool)
