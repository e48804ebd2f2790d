# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Writes on TPU: stream the batch through VMEM in windows, then one DMA an entry into the pool.

An *entry* is a run of consecutive tokens that goes to consecutive slots: a page, a slice or a
token. This module makes entries of what the ops are given and launches the one kernel that all
three share (kernel.py). Entries in ascending order of their tokens are read once; any
other order is right too, and reads a window again where it must.
"""

__all__ = [
    "TpuWriteConfig",
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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import dispatch, layout
from pallas_paged.kv_write import oracle
from pallas_paged.kv_write.tpu.interleave import (
    Slots,
    Tiling,
    scratch_shape,
    tiling,
)
from pallas_paged.kv_write.tpu.kernel import (
    Entries,
    Walk,
    kernel,
)
from pallas_paged.kv_write.tpu.page_copies import copy_pages

# A quarter of the smallest VMEM among the generations (v4: 16 MiB), so that a caller's own kernels
# and XLA's prefetches keep their room.
_VMEM_BUDGET = 4 * 2**20
# What a kernel may take at all: XLA's default scope is 16 MiB, and the compiler takes a little.
_VMEM_LIMIT = 14 * 2**20
# Entries whose metadata is in SMEM at a time; two such windows of three words are 192 KiB of 1 MiB.
ENTRIES_PER_STEP = 8192
# At most this many DMAs in one unrolled body: past it the issue cost no longer falls.
_MAX_UNROLL = 16
# Which floats hold an 8-bit code, as a number, on their way to an int8 pool.
_CODES_AS = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class TpuWriteConfig:
    """Block sizes of the TPU writes.

    Attributes:
      block_tokens: tokens of the batch in one VMEM window, a multiple of 16; the kernel holds two
        windows of k and v and two of pool rows. `copy_pages`: the most of a page that a DMA moves.
      turn_packed: bf16 k and v of the form [T, K*H] turn as pairs of tokens, without a
        detour over float32. Shorter where the packed tile is one register (tpu7x); elsewhere its
        relayout costs more than it saves.
    """

    block_tokens: int
    turn_packed: bool = False

    def __post_init__(self):
        if self.block_tokens < 16 or self.block_tokens % 16:
            raise ValueError(
                f"TpuWriteConfig: block_tokens is {self.block_tokens}; wanted a multiple of 16, "
                "the rows of a bfloat16 register tile"
            )


def default_config(kv_pages, k, num_kv_heads: int) -> TpuWriteConfig:
    """The largest window whose buffers stay inside the VMEM budget."""
    slots = slots_of(kv_pages, k, num_kv_heads)
    turn_packed = dispatch.tpu_generation() == 7
    # 208 and the 16 that misaligned sources cost are two loop bodies of the interleaving at 8 heads
    # of 128; the small ones are for large slots.
    for block_tokens in (256, 208, 128, 64, 32, 16):
        config = TpuWriteConfig(block_tokens, turn_packed)
        if vmem_bytes(slots, k, config) <= _VMEM_BUDGET:
            break
    return config


def vmem_bytes(slots: Slots, k, config: TpuWriteConfig) -> int:
    """VMEM that the kernel's buffers take, as tiles."""
    turn = tiling(slots, k.dtype, config.block_tokens, config.turn_packed)
    tokens = _round_up(config.block_tokens + 2 * _misalignment(k), turn.tile)
    lanes = layout.LANES
    if slots.is_flat:
        new_values = _round_up(k.shape[1], lanes)
    else:
        new_values = _round_up(k.shape[1], 8) * _round_up(k.shape[2], lanes)
    slot_words = _round_up(slots.num_words, 8) if slots.num_words > 4 else slots.num_words
    rows, _ = scratch_shape(slots, turn)
    return (
        4 * tokens * new_values * k.dtype.itemsize
        + 2 * tokens * slot_words * slots.num_lanes * 4
        + rows * lanes * 4
    )


def unsupported(kv_pages, k, num_kv_heads: int, head_dim: int) -> str | None:
    """Why the kernels cannot run a write, as a sentence; None if they can."""
    if k.dtype == jnp.float16:
        return "a TPU has no float16; cast k and v to bfloat16 or float32"
    if layout.is_quantized(k.dtype):
        k = jax.ShapeDtypeStruct(k.shape, _CODES_AS)
    reason = unsupported_pool(kv_pages)
    if reason is None:
        smallest = vmem_bytes(slots_of(kv_pages, k, num_kv_heads), k, TpuWriteConfig(16))
        if smallest > _VMEM_LIMIT:
            reason = (
                f"{num_kv_heads} KV heads of {head_dim} in {k.dtype} need {smallest / 2**20:.1f} "
                f"MiB of VMEM for their smallest window, and {_VMEM_LIMIT / 2**20:.0f} MiB are "
                "there; shard the heads or split the call by heads"
            )
    return reason


def unsupported_pool(kv_pages) -> str | None:
    """Why the kernels cannot run on a pool, as a sentence; None if they can."""
    if kv_pages.dtype == jnp.float16:
        return "a TPU has no float16; make a bfloat16 pool"
    return None


def _takes_codes(write):
    """A write that also takes k and v in the pool's own 8-bit dtype, and stores their very bits.

    They go as the numbers from -128 to 127, whatever they stand for, and the kernel quantises
    them as for an int8 pool, by 1, which changes none. The pool itself keeps its dtype: XLA would
    copy it to call it another.
    """

    @functools.wraps(write)
    def wrapped(kv_pages, k, v, *metadata, **options):
        if layout.is_quantized(k.dtype):
            k, v = (lax.bitcast_convert_type(x, jnp.int8).astype(_CODES_AS) for x in (k, v))
            options |= {"k_scale": None, "v_scale": None}
            return write(kv_pages, k, v, *metadata, **options, pool_dtype=jnp.dtype(jnp.int8))
        return write(kv_pages, k, v, *metadata, **options, pool_dtype=kv_pages.dtype)

    return wrapped


@_takes_codes
def page_write(
    kv_pages, k, v, page_ids, token_starts, *, k_scale, v_scale, num_kv_heads, config, pool_dtype
):
    """See api.page_write. Pages that do not fill a window well are written as equal parts."""
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    if num_tokens < page_size or page_ids.shape[0] == 0:
        return kv_pages
    slots = slots_of(kv_pages, k, num_kv_heads, pool_dtype)
    config = config or default_config(kv_pages, k, num_kv_heads)
    part = page_part(page_size, config.block_tokens)
    entries = Entries("pages", part, parts=page_size // part, has_sources=token_starts is not None)
    if token_starts is None:
        metadata = (page_ids[: num_tokens // page_size],)
    else:
        is_live = (page_ids >= 0) & (page_ids < num_pages)
        is_live &= (token_starts >= 0) & (token_starts <= num_tokens - page_size)
        # Inside the batch, so that no skipped entry's overflow hides a step back from _survey.
        starts = jnp.clip(token_starts, 0, num_tokens)
        metadata = (jnp.where(is_live, page_ids, -1), starts)
    return _write(
        kv_pages, k, v, metadata, k_scale, v_scale, slots=slots, entries=entries, config=config
    )


@_takes_codes
def slice_write(
    kv_pages, k, v, slices, num_slices, *, k_scale, v_scale, num_kv_heads, config, pool_dtype
):
    """See api.slice_write. Slices longer than a window are written as several."""
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    if num_tokens == 0 or slices.shape[1] == 0:
        return kv_pages
    slots = slots_of(kv_pages, k, num_kv_heads, pool_dtype)
    config = config or default_config(kv_pages, k, num_kv_heads)
    slot, token, length = slices
    is_live = oracle.is_live_slice(slices, num_slices, num_pages, page_size, num_tokens)
    token = jnp.clip(token, 0, num_tokens)  # as in page_write
    max_len = min(page_size, num_tokens)
    num_parts, part = slice_parts(max_len, config.block_tokens)
    if num_parts > 1:
        offset = (jnp.arange(num_parts, dtype=jnp.int32) * part)[None, :]  # [1, parts]
        is_live = (is_live[:, None] & (offset < length[:, None])).reshape(-1)
        length = jnp.minimum(length[:, None] - offset, part).reshape(-1)
        slot, token = ((x[:, None] + offset).reshape(-1) for x in (slot, token))
    metadata = (jnp.where(is_live, slot, -1), token, jnp.where(is_live, length, 0))
    entries = Entries("slices", part, has_sources=True, has_lengths=True)
    return _write(
        kv_pages, k, v, metadata, k_scale, v_scale, slots=slots, entries=entries, config=config
    )


@_takes_codes
def token_write(kv_pages, k, v, slots, *, k_scale, v_scale, num_kv_heads, config, pool_dtype):
    """See api.token_write. One DMA a token, whatever the slots."""
    if k.shape[0] == 0:
        return kv_pages
    static = slots_of(kv_pages, k, num_kv_heads, pool_dtype)
    config = config or default_config(kv_pages, k, num_kv_heads)
    entries = Entries("tokens", 1)
    return _write(
        kv_pages, k, v, (slots,), k_scale, v_scale, slots=static, entries=entries, config=config
    )


def slots_of(kv_pages, k, num_kv_heads, pool_dtype=None) -> Slots:
    """The static description of a call's k, v and pool, which may be quantised for as another."""
    return Slots(
        num_kv_heads=num_kv_heads,
        head_dim=k.shape[-1] if k.ndim == 3 else k.shape[-1] // num_kv_heads,
        pool_dtype=jnp.dtype(pool_dtype or kv_pages.dtype),
        num_rows=kv_pages.shape[2],
        is_flat=k.ndim == 2,
    )


def page_part(page_size: int, block_tokens: int) -> int:
    """Tokens of a page that one DMA takes: all of them, or a divisor that a window holds.

    Also where a window would be left more than a quarter empty, as 208 tokens are by one page of
    128: interleaving and planning cost as much as for a full one.
    """
    divisors = [n for n in range(min(page_size, block_tokens), 0, -1) if page_size % n == 0]
    filling = (n for n in divisors if n >= 16 and block_tokens % n <= block_tokens // 4)
    return next(filling, divisors[0])


def slice_parts(max_len: int, block_tokens: int) -> tuple[int, int]:
    """(parts, tokens of each but the last) that slices of up to `max_len` tokens are written in."""
    num_parts = -(-max_len // block_tokens)
    return num_parts, -(-max_len // num_parts)


def _survey(metadata, entries: Entries):
    """What the kernel must know of entries with sources of their own: four int32[1].

    How many entries to walk (past it there are only holes); then, negated, the first entry that
    starts before its predecessor ends, that is to be skipped, whose length is not its
    predecessor's. All in one pass, because on a TPU every pass of XLA's is a launch of its own.
    """
    target, source = metadata[:2]
    length = jnp.full_like(source, entries.max_len * entries.parts)
    if entries.has_lengths:
        length = metadata[2]
    num_entries = target.shape[0]
    entry = jnp.arange(num_entries, dtype=jnp.int32)
    is_live = target >= 0
    is_first = entry == 0

    def first(found):
        return jnp.where(found, -entry, -num_entries)

    highest = lax.reduce(
        (
            jnp.where(is_live, entry + 1, 0),
            first((source < jnp.roll(source + length, 1)) & ~is_first),
            first(~is_live),
            first((length != jnp.roll(length, 1)) & ~is_first),
        ),
        (jnp.int32(0), *(jnp.int32(-num_entries),) * 3),
        lambda xs, ys: tuple(map(jnp.maximum, xs, ys)),
        (0,),
    )
    return tuple(x[None] for x in highest)


def group_entries(entries: Entries, config: TpuWriteConfig) -> int:
    """Entries of the longest length in a group."""
    return max(1, config.block_tokens // entries.max_len)


def group_tiling(slots: Slots, entries: Entries, config: TpuWriteConfig, k) -> Tiling:
    """The interleaving's loop body, for groups of entries of the longest length."""
    tokens = group_entries(entries, config) * entries.max_len + _misalignment(k)
    return tiling(slots, k.dtype, min(tokens, k.shape[0]), config.turn_packed)


def unroll(group: int, *, has_lengths: bool) -> int:
    """DMAs in one unrolled body, for groups of up to `group` entries of the longest length.

    Where entries may be shorter than the longest, a group may hold many more of them: the body is
    large unless a group of the longest would then never fill it.
    """
    if has_lengths and group < _MAX_UNROLL // 2:
        return _MAX_UNROLL
    return min(group, _MAX_UNROLL)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _pad_to(x, size, value):
    return jnp.pad(x, (0, size - x.shape[0]), constant_values=value)


def _write(kv_pages, k, v, metadata, k_scale, v_scale, *, slots, entries, config):
    """Prepares the operands: metadata to whole steps, the batch's ragged end, the pool's view."""
    num_tokens = k.shape[0]
    num_entries = metadata[0].shape[0]
    step = min(num_entries, ENTRIES_PER_STEP)
    survey = _survey(metadata, entries) if entries.has_sources else ()
    if num_entries % step:
        size = _round_up(num_entries, step)
        metadata = tuple(_pad_to(x, size, -1) for x in metadata)

    # A DMA moves whole tiles of rows. What is left over at the end of k and v goes in by itself.
    align = _row_alignment(k)
    if num_tokens % align == 0:
        tails = ()
    elif num_tokens < align:
        k, v = (_pad_rows(x, align) for x in (k, v))
        tails = ()
    else:
        first = num_tokens // align * align
        tails = tuple(_pad_rows(x[first:], align) for x in (k, v))

    scales = ()
    if layout.is_quantized(slots.pool_dtype):
        heads = slots.num_kv_heads
        scales = (
            jnp.concatenate(
                [oracle.inverse_scale(k_scale, heads), oracle.inverse_scale(v_scale, heads)]
            ),
        )

    # Words need whole groups of rows; make_kv_pages gives them, a caller's own pool may not.
    num_rows = slots.num_rows
    missing = -num_rows % slots.rows_per_word
    pool = layout.flatten_slots(kv_pages)
    if missing:
        pool = jnp.pad(pool, ((0, 0), (0, missing), (0, 0)))
        slots = dataclasses.replace(slots, num_rows=num_rows + missing)

    launch = functools.partial(
        _launch,
        slots=slots,
        entries=entries,
        config=config,
        num_tokens=num_tokens,
        num_entries=num_entries,
    )
    if slots.rows_per_word == 1:
        pool = launch(pool, survey, metadata, k, v, tails, scales)
    else:
        # The interpreter cannot view a ref as words, so on a CPU it gets the pool as words.
        pool = lax.platform_dependent(
            pool,
            survey,
            metadata,
            k,
            v,
            tails,
            scales,
            tpu=launch,
            default=lambda pool, *rest: layout.from_words(
                launch(layout.to_words(pool), *rest), kv_pages.dtype
            ),
        )
    return pool[:, :num_rows].reshape(kv_pages.shape)


def _row_alignment(k) -> int:
    """Rows of k that a DMA's offset and size must be a multiple of."""
    return 1 if k.ndim == 3 else 32 // k.dtype.itemsize


def _misalignment(k) -> int:
    """Rows more than a group's tokens that its window may take."""
    align = _row_alignment(k)
    return align if align > 1 else 0


def _pad_rows(x, num_rows):
    return jnp.pad(x, ((0, num_rows - x.shape[0]), (0, 0)))


def _launch(
    pool,
    survey,
    metadata,
    k,
    v,
    tails,
    scales,
    *,
    slots,
    entries,
    config,
    num_tokens,
    num_entries,
):
    """The one pallas_call of the three writes. `pool` is [P*page_size, R or words, C]."""
    align = _row_alignment(k)
    whole = k.shape[0] // align * align
    group = group_entries(entries, config)
    window = min(config.block_tokens + _misalignment(k), whole)
    turn = group_tiling(slots, entries, config, k)
    buffer = _round_up(window + (align if tails else 0), turn.tile)
    step = min(metadata[0].shape[0], ENTRIES_PER_STEP)
    word = jnp.float32 if slots.pool_dtype == jnp.float32 else jnp.uint32

    def smem(array):
        if array.shape[0] == step:
            return pl.BlockSpec((step,), lambda i: (0,), memory_space=pltpu.SMEM)
        return pl.BlockSpec((step,), lambda i: (i,), memory_space=pltpu.SMEM)

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    whole_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    static = Walk(
        slots=slots,
        entries=entries,
        num_tokens=num_tokens,
        max_entries=min(num_entries * entries.parts, num_tokens // entries.max_len),
        align=align,
        whole=whole,
        window=window,
        tiling=turn,
        buffer=buffer,
        block=config.block_tokens,
        max_taken=min(config.block_tokens, pool.shape[0]),
        step=step,
        group=group,
        unroll=unroll(group, has_lengths=entries.has_lengths),
        num_tails=len(tails),
        has_scales=bool(scales),
    )
    new_tokens = k.size * k.dtype.itemsize * 2
    return pl.pallas_call(
        functools.partial(kernel, static),
        out_shape=layout.result_like(pool),
        grid=(metadata[0].shape[0] // step,),
        in_specs=[
            *(whole_smem for _ in survey),
            *(smem(x) for x in metadata),
            *(whole_smem for _ in scales),
            *(hbm for _ in (k, v, *tails)),
            hbm,
        ],
        out_specs=hbm,
        input_output_aliases={len(survey) + len(metadata) + len(scales) + 2 + len(tails): 0},
        scratch_shapes=[
            pltpu.VMEM((2, buffer, *k.shape[1:]), k.dtype),
            pltpu.VMEM((2, buffer, *k.shape[1:]), k.dtype),
            pltpu.VMEM((2 * buffer, slots.num_words, slots.num_lanes), word),
            pltpu.VMEM(scratch_shape(slots, turn), word),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        # The kernel's own checks guard every id (is_in_pool) and every window (window_of, plan).
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * new_tokens),
        name=f"{entries.kind[:-1]}_write_{entries.max_len}_block{config.block_tokens}",
    )(*survey, *metadata, *scales, k, v, *tails, pool)
