# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Writes on TPU: bring the batch through VMEM in token blocks, then one DMA per page into the pool.

Pages, slices and tokens share one kernel (kernel.py): entries.py makes one form of metadata of what
the ops are given, `plan` works out the static parameters, `_launch` calls the kernel. Entries whose
tokens ascend read the batch once; any other order is right too, and reads a token block again where
it must.
"""

__all__ = [
    "TpuWriteConfig",
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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import dispatch, layout
from pallas_paged.kv_write.options import WriteOptions, WriteScales
from pallas_paged.kv_write.tpu.entries import Entries, Operands, of_pages, of_slices, prepare
from pallas_paged.kv_write.tpu.interleave import Slots, scratch_shape, tiling
from pallas_paged.kv_write.tpu.kernel import kernel
from pallas_paged.kv_write.tpu.page_copies import copy_pages, gather_pages, scatter_pages
from pallas_paged.kv_write.tpu.spec import NUM_STAGES, KernelSpec, chunks_per_group

# A quarter of the smallest VMEM among the generations (v4: 16 MiB), so that a caller's own kernels
# and XLA's prefetches keep their room.
_VMEM_BUDGET = 4 * 2**20
# What a kernel may take at all: XLA's default scope is 16 MiB, and the compiler takes a little.
_VMEM_LIMIT = 14 * 2**20
# Elements of the metadata that are in SMEM at a time, each up to three words. Pallas keeps two such
# parts, which are 192 KiB of 1 MiB.
ELEMENTS_PER_STEP = 8192
# At most this many DMAs in one unrolled iteration: beyond it the cost of issuing one no longer
# falls.
_MAX_UNROLL = 16
# The float dtype in which 8-bit codes, as numbers, go to the kernel.
_CODES_AS = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class TpuWriteConfig:
    """Block sizes of the TPU writes.

    Attributes:
      block_tokens: tokens of the batch that one pipeline stage in VMEM has room for, a multiple of
        16. There are two stages, each of k, v and pool slots. For moves of pages: the most tokens
        of a page that one DMA moves.
      transpose_packed: whether bfloat16 k and v of the form [T, K*H] are transposed from heads to
        slots as packed pairs of tokens, and not as float32. That is shorter on tpu7x, where a
        packed tile is one register; elsewhere the change of layout costs more than it saves.
    """

    block_tokens: int
    transpose_packed: bool = False

    def __post_init__(self) -> None:
        if self.block_tokens < 16 or self.block_tokens % 16:
            raise ValueError(
                f"TpuWriteConfig: block_tokens is {self.block_tokens}; wanted a multiple of 16, "
                "the rows of a bfloat16 register tile"
            )


def default_config(slots: Slots, new: jax.ShapeDtypeStruct) -> TpuWriteConfig:
    """The largest token block whose buffers stay inside the VMEM budget."""
    transpose_packed = dispatch.tpu_generation() == 7
    # 208 and the 16 that misaligned starts cost are two iterations of the interleaving at 8 heads
    # of 128; the small ones are for large slots.
    for block_tokens in (256, 208, 128, 64, 32, 16):
        config = TpuWriteConfig(block_tokens, transpose_packed)
        if vmem_bytes(slots, new, config) <= _VMEM_BUDGET:
            break
    return config


def vmem_bytes(slots: Slots, new: jax.ShapeDtypeStruct, config: TpuWriteConfig) -> int:
    """VMEM that the kernel's buffers take, as tiles, for k and v of the form of `new`."""
    tiles = tiling(slots, new.dtype, config.block_tokens, config.transpose_packed)
    tokens = layout.round_up(config.block_tokens + 2 * _misalignment(new), tiles.tile)
    lanes = layout.LANES
    if slots.is_flat:
        new_values = layout.round_up(new.shape[1], lanes)
    else:
        new_values = layout.round_up(new.shape[1], 8) * layout.round_up(new.shape[2], lanes)
    slot_words = layout.round_up(slots.num_words, 8) if slots.num_words > 4 else slots.num_words
    rows, _ = scratch_shape(slots, tiles)
    return (
        2 * NUM_STAGES * tokens * new_values * new.dtype.itemsize
        + NUM_STAGES * tokens * slot_words * slots.num_lanes * 4
        + rows * lanes * 4
    )


def unsupported(kv_pages: jax.Array, k: jax.Array, num_kv_heads: int, head_dim: int) -> str | None:
    """Why the kernel cannot run a write, as a sentence; None if it can."""
    if k.dtype == jnp.float16:
        return "a TPU has no float16; cast k and v to bfloat16 or float32"
    reason = unsupported_pool(kv_pages)
    if reason is None:
        slots, new = _forms(kv_pages, k, num_kv_heads)
        smallest = vmem_bytes(slots, new, TpuWriteConfig(16))
        if smallest > _VMEM_LIMIT:
            reason = (
                f"{num_kv_heads} KV heads of {head_dim} in {new.dtype} need "
                f"{smallest / 2**20:.1f} MiB of VMEM for their smallest token block, and "
                f"{_VMEM_LIMIT / 2**20:.0f} MiB are there; shard the heads or split the call by "
                "heads"
            )
    return reason


def unsupported_pool(kv_pages: jax.Array) -> str | None:
    """Why the kernels cannot run on a pool, as a sentence; None if they can."""
    if kv_pages.dtype == jnp.float16:
        return "a TPU has no float16; make a bfloat16 pool"
    return None


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
      kv_pages, k: the arrays, or their shapes and dtypes.
      options: the call's options, of which `num_kv_heads` and `config` are read.
      num_entries: pages, slices or tokens that the call names.
      has_token_starts: whether each of them names its first token.
    """
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    slots, new = _forms(kv_pages, k, options.num_kv_heads)
    config = options.config or default_config(slots, new)
    if op == "page_write":
        chunk_tokens = _page_chunk(page_size, config.block_tokens)
        chunks_per_entry = page_size // chunk_tokens
    elif op == "slice_write":
        longest = min(page_size, num_tokens)
        chunks_per_entry = -(-longest // config.block_tokens)
        chunk_tokens = -(-longest // chunks_per_entry)
    else:
        chunk_tokens, chunks_per_entry = 1, 1
    group = chunks_per_group(chunk_tokens, config.block_tokens)
    group_tokens = group * chunk_tokens + _misalignment(new)
    align = _row_alignment(new)
    return KernelSpec(
        op=op,
        slots=slots,
        new_dtype=new.dtype,
        tiling=tiling(
            slots, new.dtype, min(group_tokens, max(num_tokens, align)), config.transpose_packed
        ),
        num_tokens=num_tokens,
        num_entries=num_entries,
        chunk_tokens=chunk_tokens,
        chunks_per_entry=chunks_per_entry,
        has_token_starts=has_token_starts,
        has_lengths=op == "slice_write",
        max_elements_per_step=ELEMENTS_PER_STEP,
        block_tokens=config.block_tokens,
        max_sent_tokens=min(config.block_tokens, num_pages * page_size),
        row_align=align,
        misalignment=_misalignment(new),
        chunks_per_iteration=_chunks_per_iteration(group, has_lengths=op == "slice_write"),
    )


def _forms(
    kv_pages: jax.Array, k: jax.Array, num_kv_heads: int
) -> tuple[Slots, jax.ShapeDtypeStruct]:
    """The form of the slots, and the form of k and v, that the kernel works with.

    k and v in the dtype of an 8-bit pool come as numbers for an int8 pool: see entries.prepare. A
    pool whose rows do not fill whole 32-bit words gets more rows: see _launch.
    """
    pool_dtype, new_dtype = jnp.dtype(kv_pages.dtype), jnp.dtype(k.dtype)
    if layout.is_quantized(k.dtype):
        pool_dtype, new_dtype = jnp.dtype(jnp.int8), jnp.dtype(_CODES_AS)
    slots = Slots(
        num_kv_heads=num_kv_heads,
        head_dim=k.shape[-1] if k.ndim == 3 else k.shape[-1] // num_kv_heads,
        pool_dtype=pool_dtype,
        num_rows=layout.round_up(kv_pages.shape[2], 4 // pool_dtype.itemsize),
        is_flat=k.ndim == 2,
    )
    return slots, jax.ShapeDtypeStruct(k.shape, new_dtype)


def _page_chunk(page_size: int, block_tokens: int) -> int:
    """Tokens of a page that one DMA takes: all of them, or a divisor that a token block holds.

    A divisor is also taken where a token block would be left more than a quarter empty, as 208
    tokens are by one page of 128: interleaving and grouping cost as much as for a full one.
    """
    divisors = [n for n in range(min(page_size, block_tokens), 0, -1) if page_size % n == 0]
    filling = (n for n in divisors if n >= 16 and block_tokens % n <= block_tokens // 4)
    return next(filling, divisors[0])


def _chunks_per_iteration(group: int, *, has_lengths: bool) -> int:
    """DMAs in one unrolled iteration, for groups of up to `group` chunks of the full length.

    Where chunks may be shorter than that, a group may hold many more of them: the iteration is
    large unless a group of the longest would then never fill it.
    """
    if has_lengths and group < _MAX_UNROLL // 2:
        return _MAX_UNROLL
    return min(group, _MAX_UNROLL)


def _row_alignment(new: jax.ShapeDtypeStruct) -> int:
    """The offset and the size of a DMA of k are multiples of this many rows."""
    return 1 if new.ndim == 3 else 32 // new.dtype.itemsize


def _misalignment(new: jax.ShapeDtypeStruct) -> int:
    """Rows that a token block may need beyond its group's tokens, because of the alignment."""
    align = _row_alignment(new)
    return align if align > 1 else 0


def page_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_ids: jax.Array,
    token_starts: jax.Array | None,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """See api.page_write. Pages that do not fill a token block well are sent as equal chunks."""
    num_pages, page_size = kv_pages.shape[:2]
    num_entries, has_token_starts = page_ids.shape[0], token_starts is not None
    if k.shape[0] < page_size or num_entries == 0:
        return kv_pages
    if not has_token_starts:
        num_entries = min(num_entries, k.shape[0] // page_size)
    spec = plan(
        "page_write",
        kv_pages,
        k,
        options,
        num_entries=num_entries,
        has_token_starts=has_token_starts,
    )
    entries = of_pages(spec, page_ids, token_starts, num_pages)
    return _launch(spec, kv_pages, prepare(spec, k, v, entries, scales))


def slice_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slices: jax.Array,
    num_slices: jax.Array,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """See api.slice_write. Slices that are longer than a token block are sent as more chunks."""
    num_pages, page_size = kv_pages.shape[:2]
    if k.shape[0] == 0 or slices.shape[1] == 0:
        return kv_pages
    num_entries = slices.shape[1]
    spec = plan("slice_write", kv_pages, k, options, num_entries=num_entries, has_token_starts=True)
    entries = of_slices(spec, slices, num_slices, num_pages, page_size)
    return _launch(spec, kv_pages, prepare(spec, k, v, entries, scales))


def token_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    scales: WriteScales,
    options: WriteOptions,
) -> jax.Array:
    """See api.token_write. One DMA per token, whatever the slots."""
    if k.shape[0] == 0:
        return kv_pages
    spec = plan("token_write", kv_pages, k, options, num_entries=slots.shape[0])
    return _launch(spec, kv_pages, prepare(spec, k, v, Entries(slots), scales))


def _launch(spec: KernelSpec, kv_pages: jax.Array, operands: Operands) -> jax.Array:
    """The one pallas_call of the three writes."""
    slots = spec.slots
    word = jnp.float32 if slots.pool_dtype == jnp.float32 else jnp.uint32
    new_vmem = pltpu.VMEM((NUM_STAGES, spec.stage_rows, *operands.new[0].shape[1:]), spec.new_dtype)
    specs = _block_specs(spec, operands)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)

    def call(pool: jax.Array, operands: Operands) -> jax.Array:
        """The kernel on a pool [P*page_size, R or words, C]."""
        return pl.pallas_call(
            functools.partial(kernel, spec),
            out_shape=layout.result_like(pool),
            grid=(spec.num_steps,),
            in_specs=[*specs, hbm],
            out_specs=hbm,
            input_output_aliases={len(specs): 0},
            scratch_shapes=[
                new_vmem,
                new_vmem,
                pltpu.VMEM((NUM_STAGES * spec.stage_rows, slots.num_words, slots.num_lanes), word),
                pltpu.VMEM(scratch_shape(slots, spec.tiling), word),
                pltpu.SemaphoreType.DMA((NUM_STAGES,)),
                pltpu.SemaphoreType.DMA((NUM_STAGES,)),
            ],
            # The kernel checks every id (Chunks.is_in_pool) and every token block
            # (Chunks.block_start, find_group) itself.
            compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
            cost_estimate=pl.CostEstimate(
                flops=0,
                transcendentals=0,
                bytes_accessed=4 * operands.new[0].size * spec.new_dtype.itemsize,
            ),
            name=spec.name,
        )(*jax.tree.leaves(operands), pool)

    pool = layout.flatten_slots(kv_pages)
    # Words need whole groups of rows; make_kv_pages gives them, a caller's own pool may not.
    missing = slots.num_rows - pool.shape[1]
    if missing:
        pool = jnp.pad(pool, ((0, 0), (0, missing), (0, 0)))
    if slots.rows_per_word == 1:
        pool = call(pool, operands)
    else:
        # The interpreter cannot view a ref as words, so on a CPU it gets the pool as words.
        pool = lax.platform_dependent(
            pool,
            operands,
            tpu=call,
            default=lambda pool, operands: layout.from_words(
                call(layout.to_words(pool), operands), kv_pages.dtype
            ),
        )
    return pool[:, : kv_pages.shape[2]].reshape(kv_pages.shape)


def _block_specs(spec: KernelSpec, operands: Operands) -> list[pl.BlockSpec]:
    """Where each operand of the kernel is: metadata in SMEM, a step's part of it at a time."""
    step = (spec.elements_per_step,)
    index = (lambda i: (i,)) if spec.num_steps > 1 else (lambda i: (0,))
    of_step = pl.BlockSpec(step, index, memory_space=pltpu.SMEM)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    summary, entries, inverse_scales, *new = operands
    return [
        *(smem for _ in summary),
        *(of_step for _ in jax.tree.leaves(entries)),
        *(smem for _ in jax.tree.leaves(inverse_scales)),
        *(hbm for _ in jax.tree.leaves(new)),
    ]
