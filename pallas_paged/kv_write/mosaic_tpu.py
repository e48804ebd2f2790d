# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Writes on TPU: stream the batch through VMEM in windows, then one DMA an entry into the pool.

An *entry* is a run of consecutive tokens that goes to consecutive slots: a page, a slice or a
token. The kernel walks the entries in order. It groups those that lie in one window of the batch,
interleaves that window's k and v into pool rows, and issues a group's DMAs while the next window
is on its way and the previous group's DMAs are still in flight. Entries in ascending order of
their tokens are read once; any other order is right and reads a window again where it must.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import dispatch, layout
from pallas_paged.kv_write import oracle
from pallas_paged.kv_write.mosaic_tpu_interleave import (
    Slots,
    Tiling,
    interleave,
    scratch_shape,
    tiling,
)

# A quarter of the smallest VMEM among the generations (v4: 16 MiB), so that a caller's own kernels
# and XLA's prefetches keep their room.
_VMEM_BUDGET = 4 * 2**20
# Entries whose metadata is in SMEM at a time; two such windows of three words are 192 KiB of 1 MiB.
_ENTRIES_PER_STEP = 8192
# What is known of a call's entries, each with what stands before it: nothing; that each starts
# after the one before; that none is to be skipped; that all are equally long.
ANY_ORDER, ASCENDING, ALL_LIVE, EQUAL_LENGTHS = 0, 1, 2, 3
# At most this many DMAs in one unrolled body: past it the issue cost no longer falls.
_MAX_UNROLL = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the TPU writes.

    Attributes:
      block_tokens: tokens of the batch in one VMEM window, a multiple of 16; the kernel holds two
        windows of k and v and two of pool rows. `copy_pages` does not use it.
      turn_packed: see mosaic_tpu_interleave.Tiling.packed.
    """

    block_tokens: int
    turn_packed: bool = False

    def __post_init__(self):
        if self.block_tokens < 16 or self.block_tokens % 16:
            raise ValueError(
                f"kv_write Config: block_tokens is {self.block_tokens}; wanted a multiple of 16, "
                "the rows of a bfloat16 register tile"
            )


def default_config(kv_pages, k, num_kv_heads: int, head_dim: int) -> Config:
    """The largest window whose buffers stay inside the VMEM budget."""
    pool_bytes = kv_pages.shape[2] * kv_pages.shape[3] * kv_pages.dtype.itemsize
    lanes = layout.LANES
    if k.ndim == 2:
        new_lanes = -(-num_kv_heads * head_dim // lanes) * lanes
    else:
        new_lanes = -(-num_kv_heads // 8) * 8 * -(-head_dim // lanes) * lanes
    token_bytes = 2 * pool_bytes + 4 * new_lanes * k.dtype.itemsize
    # A window has up to 64 tokens more than a block: those that alignment and whole loop bodies
    # add. Whole bodies of 64 tokens where there is room for one.
    tokens = _VMEM_BUDGET // token_bytes - 64
    unit = 64 if tokens >= 64 else 16
    return Config(
        block_tokens=max(16, min(256, tokens // unit * unit)),
        turn_packed=dispatch.tpu_generation() == 7,
    )


def unsupported(kv_pages, k, num_kv_heads: int, head_dim: int) -> str | None:
    """Why the kernels cannot run a write, as a sentence; None if they can."""
    del num_kv_heads, head_dim
    if k.dtype == jnp.float16:
        return "a TPU has no float16; cast k and v to bfloat16 or float32"
    return unsupported_pool(kv_pages)


def unsupported_pool(kv_pages) -> str | None:
    """Why the kernels cannot run on a pool, as a sentence; None if they can."""
    if kv_pages.dtype == jnp.float16:
        return "a TPU has no float16; make a bfloat16 pool"
    return None


@dataclasses.dataclass(frozen=True)
class Entries:
    """The static side of a call's entries.

    Attributes:
      kind: "pages", "slices" or "tokens", for the kernel's name.
      max_len: tokens of an entry; of the longest possible one if `has_lengths`.
      has_sources: each entry has its own first token; else entry i starts at token i * max_len.
      has_lengths: each entry has its own length; else it has max_len tokens.
    """

    kind: str
    max_len: int
    has_sources: bool
    has_lengths: bool


def page_write(
    kv_pages, k, v, page_ids, token_starts, *, k_scale, v_scale, num_kv_heads, config
):
    """See api.page_write. Pages longer than a window are written as equal parts."""
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    if num_tokens < page_size or page_ids.shape[0] == 0:
        return kv_pages
    slots = _slots(kv_pages, k, num_kv_heads)
    config = config or default_config(kv_pages, k, num_kv_heads, slots.head_dim)
    part = _largest_part(page_size, config.block_tokens)
    parts = page_size // part
    if token_starts is None:
        page_ids = page_ids[: num_tokens // page_size]
    ids = _split(page_ids, num_pages, parts)
    entries = Entries("pages", part, has_sources=token_starts is not None, has_lengths=False)
    metadata = (ids,)
    if token_starts is not None:
        starts = (token_starts[:, None] + jnp.arange(parts, dtype=jnp.int32) * part).reshape(-1)
        is_source = (token_starts >= 0) & (token_starts <= num_tokens - page_size)
        is_live = (ids >= 0) & jnp.repeat(is_source, parts)
        metadata = (jnp.where(is_live, ids, -1), starts)
    return _write(
        kv_pages, k, v, metadata, k_scale, v_scale, slots=slots, entries=entries, config=config
    )


def _split(page_ids, num_pages, parts):
    """Ids of the equal parts of pages; -1 for what is outside the pool (before it overflows)."""
    if parts == 1:
        return page_ids
    is_page = (page_ids >= 0) & (page_ids < num_pages)
    first = jnp.where(is_page, page_ids, 0)[:, None] * parts
    ids = first + jnp.arange(parts, dtype=jnp.int32)
    return jnp.where(is_page[:, None], ids, -1).reshape(-1)


def slice_write(
    kv_pages, k, v, slices, num_slices, *, k_scale, v_scale, num_kv_heads, config
):
    """See api.slice_write. Slices longer than a window are written as several."""
    num_pages, page_size = kv_pages.shape[:2]
    num_tokens = k.shape[0]
    if num_tokens == 0 or slices.shape[1] == 0:
        return kv_pages
    slots = _slots(kv_pages, k, num_kv_heads)
    config = config or default_config(kv_pages, k, num_kv_heads, slots.head_dim)
    slot, token, length = slices
    is_live = oracle.is_live_slice(slices, num_slices, num_pages, page_size, num_tokens)
    max_len = min(page_size, num_tokens)
    if max_len > config.block_tokens:
        part = jnp.arange(-(-max_len // config.block_tokens), dtype=jnp.int32)
        offset = (part * config.block_tokens)[None, :]  # [1, parts]
        is_live = (is_live[:, None] & (offset < length[:, None])).reshape(-1)
        length = jnp.minimum(length[:, None] - offset, config.block_tokens).reshape(-1)
        slot, token = ((x[:, None] + offset).reshape(-1) for x in (slot, token))
        max_len = config.block_tokens
    metadata = (jnp.where(is_live, slot, -1), token, jnp.where(is_live, length, 0))
    entries = Entries("slices", max_len, has_sources=True, has_lengths=True)
    return _write(
        kv_pages, k, v, metadata, k_scale, v_scale, slots=slots, entries=entries, config=config
    )


def token_write(kv_pages, k, v, slots, *, k_scale, v_scale, num_kv_heads, config):
    """See api.token_write. One DMA a token, whatever the slots."""
    if k.shape[0] == 0:
        return kv_pages
    static = _slots(kv_pages, k, num_kv_heads)
    config = config or default_config(kv_pages, k, num_kv_heads, static.head_dim)
    entries = Entries("tokens", 1, has_sources=False, has_lengths=False)
    return _write(
        kv_pages, k, v, (slots,), k_scale, v_scale, slots=static, entries=entries, config=config
    )


def _slots(kv_pages, k, num_kv_heads) -> Slots:
    return Slots(
        num_kv_heads=num_kv_heads,
        head_dim=k.shape[-1] if k.ndim == 3 else k.shape[-1] // num_kv_heads,
        pool_dtype=jnp.dtype(kv_pages.dtype),
        num_rows=kv_pages.shape[2],
        is_flat=k.ndim == 2,
    )


def _largest_part(page_size: int, limit: int) -> int:
    """The largest divisor of `page_size` up to `limit`."""
    return next(n for n in range(min(page_size, limit), 0, -1) if page_size % n == 0)


def _pad_to(x, size, value):
    return jnp.pad(x, (0, size - x.shape[0]), constant_values=value)


def _write(kv_pages, k, v, metadata, k_scale, v_scale, *, slots, entries, config):
    """Prepares the operands: metadata to whole steps, the batch's ragged end, the pool's view."""
    num_tokens = k.shape[0]
    num_entries = metadata[0].shape[0]
    step = min(num_entries, _ENTRIES_PER_STEP)
    if entries.has_sources:
        # How far to walk (past it there are only holes), and whether the walk may take whole
        # chunks: it may where each entry starts after the one before, so that the first and the
        # last speak for all.
        target, source = metadata[:2]
        end = source + (metadata[2] if entries.has_lengths else entries.max_len)
        entry = jnp.arange(num_entries, dtype=jnp.int32)
        num_walked = jnp.max(jnp.where(target >= 0, entry + 1, 0))
        is_sorted = jnp.all((source[1:] >= end[:-1]) | (entry[1:] >= num_walked))
        all_live = jnp.all((target >= 0) | (entry >= num_walked))
        order = jnp.where(is_sorted, jnp.where(all_live, ALL_LIVE, ASCENDING), ANY_ORDER)
        longest = jnp.int32(entries.max_len)
        if entries.has_lengths:
            longest = jnp.max(metadata[2])
            is_equal = jnp.all((metadata[2] == longest) | (entry >= num_walked))
            order = jnp.where((order == ALL_LIVE) & is_equal, EQUAL_LENGTHS, order)
        walk = jnp.stack([num_walked, order, longest])
    else:
        num_walked = min(num_entries, num_tokens // entries.max_len)
        walk = jnp.array([num_walked, ASCENDING, entries.max_len], jnp.int32)
    if num_entries % step:
        size = -(-num_entries // step) * step
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
        _launch, slots=slots, entries=entries, config=config, num_tokens=num_tokens
    )
    if slots.rows_per_word == 1:
        pool = launch(pool, walk, metadata, k, v, tails, scales)
    else:
        # The interpreter cannot view a ref as words, so on a CPU it gets the pool as words.
        pool = lax.platform_dependent(
            pool, walk, metadata, k, v, tails, scales,
            tpu=launch,
            default=lambda pool, *rest: layout.from_words(
                launch(layout.to_words(pool), *rest), slots.pool_dtype
            ),
        )
    return pool[:, :num_rows].reshape(kv_pages.shape)


def _row_alignment(k) -> int:
    """Rows of k that a DMA's offset and size must be a multiple of."""
    return 1 if k.ndim == 3 else 32 // k.dtype.itemsize


def _pad_rows(x, num_rows):
    return jnp.pad(x, ((0, num_rows - x.shape[0]), (0, 0)))


def _launch(pool, walk, metadata, k, v, tails, scales, *, slots, entries, config, num_tokens):
    """The one pallas_call of the three writes. `pool` is [P*page_size, R or words, C]."""
    align = _row_alignment(k)
    whole = k.shape[0] // align * align
    window = min(config.block_tokens + (align if align > 1 else 0), whole)
    turn = tiling(slots, k.dtype, window, config.turn_packed)
    buffer = -(-(window + (align if tails else 0)) // turn.tokens) * turn.tokens
    step = min(metadata[0].shape[0], _ENTRIES_PER_STEP)
    group = max(1, config.block_tokens // entries.max_len)
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
        align=align,
        whole=whole,
        window=window,
        tiling=turn,
        buffer=buffer,
        block=config.block_tokens,
        max_taken=min(config.block_tokens, pool.shape[0]),
        step=step,
        group=group,
        unroll=min(group, _MAX_UNROLL) if not entries.has_lengths else 16,
        num_tails=len(tails),
        has_scales=bool(scales),
    )
    new_tokens = k.size * k.dtype.itemsize * 2
    return pl.pallas_call(
        functools.partial(_kernel, static),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        grid=(metadata[0].shape[0] // step,),
        in_specs=[
            whole_smem,
            *(smem(x) for x in metadata),
            *(whole_smem for _ in scales),
            *(hbm for _ in (k, v, *tails)),
            hbm,
        ],
        out_specs=hbm,
        input_output_aliases={1 + len(metadata) + len(scales) + 2 + len(tails): 0},
        scratch_shapes=[
            pltpu.VMEM((2, buffer, *k.shape[1:]), k.dtype),
            pltpu.VMEM((2, buffer, *k.shape[1:]), k.dtype),
            pltpu.VMEM((2 * buffer, slots.num_words, slots.num_lanes), word),
            pltpu.VMEM(scratch_shape(slots, turn), word),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        # The kernel's own checks guard every id (_Issue.is_live) and every window (_plan).
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * new_tokens
        ),
        name=f"{entries.kind[:-1]}_write_{entries.max_len}_block{config.block_tokens}",
    )(walk, *metadata, *scales, k, v, *tails, pool)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The kernel's static side: the entries, the windows and the buffers' shapes."""

    slots: Slots
    entries: Entries
    num_tokens: int  # T
    align: int  # rows of k and v that a window starts and ends at a multiple of
    whole: int  # tokens in k and v; the num_tails > 0 case has up to align - 1 more in the tails
    window: int  # tokens of k and v in a window
    tiling: Tiling
    buffer: int  # tokens that one half of the buffers has room for
    block: int  # tokens from the first to the last of a group
    max_taken: int  # tokens that a group sends at most: what one wait covers
    step: int  # entries in SMEM at a time
    group: int  # entries in a group where the entries' sources are not their own
    unroll: int  # DMAs in one unrolled body
    num_tails: int
    has_scales: bool


def _kernel(walk, *refs):
    """Walks this step's entries, group by group, two groups in flight."""
    # scalar inputs, in SMEM
    walk_ref, *refs = refs  # int32[3]: entries to walk, what is known of them, the longest length
    target_ref, *refs = refs  # int32[step]: page or slot
    source_ref = length_ref = scale_ref = None
    if walk.entries.has_sources:
        source_ref, *refs = refs  # int32[step]: first token
    if walk.entries.has_lengths:
        length_ref, *refs = refs  # int32[step]: tokens
    if walk.has_scales:
        scale_ref, *refs = refs  # float32[2K]: inverse scales of K, then of V
    # inputs, in HBM
    new_refs, refs = refs[:2], refs[2:]  # k, v: [T, K*H] or [T, K, H]
    tail_refs, refs = refs[: walk.num_tails], refs[walk.num_tails :]  # [align, K*H] each
    # the pool (aliased), then scratch
    _, pool_ref, k_vmem, v_vmem, rows_vmem, turn_vmem, in_sems, out_sems = refs

    slots, entries = walk.slots, walk.entries
    pool_words = pool_ref
    if pool_ref.dtype.itemsize < 4:
        pool_words = pool_ref.bitcast(jnp.uint32)
    num_slots = pool_words.shape[0]
    num_targets = num_slots if entries.has_lengths else num_slots // entries.max_len
    target_slots = 1 if entries.has_lengths else entries.max_len
    first_entry = pl.program_id(0) * walk.step
    num_entries = jnp.clip(walk_ref[0] - first_entry, 0, walk.step)

    def source(i):
        return source_ref[i] if entries.has_sources else (first_entry + i) * entries.max_len

    def length(i):
        return length_ref[i] if entries.has_lengths else entries.max_len

    def end(i):
        return source(i) + length(i)

    def is_in_pool(target):
        """The kernel's own check: below the pool's end and, as unsigned, not negative."""
        return target.astype(jnp.uint32) < jnp.uint32(num_targets)

    def is_live(i):
        return is_in_pool(target_ref[i])

    def window_of(i):
        """Where the window of entry i starts; inside the batch, whatever a skipped entry says."""
        start = source(i) // walk.align * walk.align
        return jnp.clip(start, 0, walk.whole - walk.window)

    def plan(i):
        """The group that starts with entry i: (i, its window, its end, the last token it needs)."""
        start = window_of(i)
        if not entries.has_sources:
            last = jnp.minimum(i + walk.group, num_entries)
            return i, start, last, end(last - 1)
        limit = start + walk.window
        if walk.num_tails:
            limit = jnp.where(start == walk.whole - walk.window, walk.num_tokens, limit)
        limit = jnp.minimum(limit, source(i) + walk.block)

        # Of entries that ascend, the last of a chunk speaks for it.
        def chunk_fits(last):
            until = last + walk.unroll
            fits = end(jnp.minimum(until, walk.step) - 1) <= limit
            return (walk_ref[1] != ANY_ORDER) & (until <= num_entries) & fits

        last = lax.while_loop(chunk_fits, lambda last: last + walk.unroll, i)

        # Where no chunk fits, one by one; the first entry of a group always does, or is skipped.
        def entry_fits(state):
            last, _, taken = state
            entry = jnp.minimum(last, walk.step - 1)
            fits = (source(entry) >= start) & (end(entry) <= limit)
            fits &= taken + length(entry) <= walk.max_taken
            return (last < num_entries) & (fits | jnp.logical_not(is_live(entry)))

        def take(state):
            last, needed, taken = state
            live = is_live(last)
            needed = jnp.where(live, jnp.maximum(needed, end(last)), needed)
            return last + 1, needed, taken + jnp.where(live, length(last), 0)

        def one_by_one():
            return lax.while_loop(entry_fits, take, take((i, start, jnp.int32(0))))[:2]

        def by_chunks():
            return last, end(last - 1)

        return i, start, *lax.cond(last > i, by_chunks, one_by_one)

    def loads(start, slot):
        """(condition or None, copy) of a window's k and v, and of the batch's ragged end."""
        pairs = list(zip(new_refs, (k_vmem, v_vmem), strict=True))
        for hbm, vmem in pairs:
            yield None, pltpu.make_async_copy(
                hbm.at[pl.ds(pl.multiple_of(start, walk.align), walk.window)],
                vmem.at[slot, pl.ds(0, walk.window)],
                in_sems.at[slot],
            )
        for tail, (_, vmem) in zip(tail_refs, pairs, strict=False):
            yield start == walk.whole - walk.window, pltpu.make_async_copy(
                tail, vmem.at[slot, pl.ds(walk.window, walk.align)], in_sems.at[slot]
            )

    def start_loads(start, slot):
        for condition, copy in loads(start, slot):
            _when(condition, copy.start)

    def wait_loads(start, slot):
        for condition, copy in loads(start, slot):
            _when(condition, copy.wait)

    def issue(first, last, start, slot):
        """One DMA for each live entry; returns how many tokens are on their way."""

        def send(target, row, num_tokens):
            """Starts one entry, whose tokens are in the buffers from `row` on."""
            pltpu.make_async_copy(
                rows_vmem.at[pl.ds(row, num_tokens)],
                pool_words.at[pl.ds(target * target_slots, num_tokens)],
                out_sems.at[slot],
            ).start()

        # Row of a token: its place in the window, in this group's half of the buffers.
        to_row = slot * walk.buffer - start

        def row_of(i, u):
            if entries.has_sources:
                return source(i + u) + to_row
            return source(i) + to_row + u * entries.max_len

        def send_live(i, sent):
            """One entry behind its own check."""
            target, num_tokens = target_ref[i], length(i)
            live = is_in_pool(target)
            pl.when(live)(lambda: send(target, row_of(i, 0), num_tokens))
            return sent + jnp.where(live, num_tokens, 0)

        def checked_chunk(c, sent):
            """`unroll` entries, each behind its own check, counted together where all are live."""
            i = first + c * walk.unroll
            largest = jnp.uint32(0)
            for u in range(walk.unroll):
                target, num_tokens = target_ref[i + u], length(i + u)
                row = row_of(i, u)
                # As an unsigned number, so that the negative ones are out of the pool too.
                largest = jnp.maximum(largest, target.astype(jnp.uint32))
                pl.when(is_in_pool(target))(
                    functools.partial(send, target, row, num_tokens)
                )

            def count_live(i):
                # A loop, because straight code would be predicated and run in every case.
                def add(i, sum):
                    return sum + jnp.where(is_live(i), length(i), 0)

                return lax.fori_loop(i, i + walk.unroll, add, jnp.int32(0))

            def count_all(i):
                return jnp.int32(0) + functools.reduce(jnp.add, [length(i + u) for u in range(walk.unroll)])

            return sent + lax.cond(largest < num_targets, count_all, count_live, i)

        def unchecked_chunk(num_tokens, c, sent):
            """`unroll` entries that are known to be live, and perhaps to be equally long."""
            i = first + c * walk.unroll
            for u in range(walk.unroll):
                n = length(i + u) if num_tokens is None else num_tokens
                send(target_ref[i + u], row_of(i, u), n)
                sent += n
            return sent

        num_chunks = (last - first) // walk.unroll
        done, sent = jnp.int32(0), jnp.int32(0)

        def run(state, order, chunk):
            """Does the chunks now if they are known to have this order, else later."""
            done, sent = state
            until = jnp.where(walk_ref[1] == order, num_chunks, done)
            return until, lax.fori_loop(done, until, chunk, sent)

        if entries.has_lengths:
            chunk = functools.partial(unchecked_chunk, walk_ref[2])
            done, sent = run((done, sent), EQUAL_LENGTHS, chunk)
        if entries.has_sources:
            num_tokens = None if entries.has_lengths else entries.max_len
            chunk = functools.partial(unchecked_chunk, num_tokens)
            done, sent = run((done, sent), ALL_LIVE, chunk)
        sent = lax.fori_loop(done, num_chunks, checked_chunk, sent)
        return lax.fori_loop(first + num_chunks * walk.unroll, last, send_live, sent)

    def wait_sent(sent, slot):
        """One wait for a group's bytes; the entries of a group have no more tokens than it."""

        @pl.when(sent > 0)
        def _wait():
            view = pool_words.at[pl.ds(0, sent)]
            pltpu.make_async_copy(view, view, out_sems.at[slot]).wait()

    @pl.when(first_entry == 0)
    def _clear_padding():
        if slots.has_padding:
            turn_vmem[...] = jnp.zeros_like(turn_vmem)

    def scales(which, head):
        return scale_ref[which * slots.num_kv_heads + head]

    def open_group(i, slot):
        """Plans the group that starts with entry i and sets its window on its way."""

        def begin():
            group = plan(i)
            start_loads(group[1], slot)
            return group

        return lax.cond(i < num_entries, begin, lambda: (i, jnp.int32(0), i, jnp.int32(0)))

    def do_group(carry):
        (first, start, last, needed), slot, sent, sent_before = carry
        ahead = open_group(last, 1 - slot)
        wait_loads(start, slot)
        wait_sent(sent_before, slot)
        interleave(
            slots,
            walk.tiling,
            k_vmem.at[slot],
            v_vmem.at[slot],
            rows_vmem.at[pl.ds(slot * walk.buffer, walk.buffer)],
            turn_vmem,
            num_tokens=needed - start,
            scales=scales if walk.has_scales else None,
        )
        return ahead, 1 - slot, issue(first, last, start, slot), sent

    zero = jnp.int32(0)
    _, slot, sent, sent_before = lax.while_loop(
        lambda carry: carry[0][0] < num_entries, do_group, (open_group(zero, zero), zero, zero, zero)
    )
    wait_sent(sent_before, slot)
    wait_sent(sent, 1 - slot)


def _when(condition, action):
    if condition is None:
        action()
    else:
        pl.when(condition)(action)


def copy_pages(kv_pages, src_ids, dst_ids, *, config):
    """See api.copy_pages. One DMA a page from HBM to HBM, all of a step in flight."""
    del config
    num_ids = src_ids.shape[0]
    if num_ids == 0:
        return kv_pages
    step = min(num_ids, _ENTRIES_PER_STEP)
    if num_ids % step:
        size = -(-num_ids // step) * step
        src_ids, dst_ids = (_pad_to(x, size, -1) for x in (src_ids, dst_ids))
    spec = pl.BlockSpec((step,), lambda i: (i,), memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_copy_kernel, step),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        grid=(src_ids.shape[0] // step,),
        in_specs=[spec, spec, hbm],
        out_specs=hbm,
        input_output_aliases={2: 0},
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        # _copy_kernel checks both ids of every pair.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name=f"copy_pages_{kv_pages.shape[1]}",
    )(src_ids, dst_ids, kv_pages)


def _copy_kernel(
    step,
    # scalar inputs, in SMEM
    src_ref,  # int32[step]
    dst_ref,  # int32[step]
    # the pool, aliased
    _,
    pool_ref,  # [P, page_size, R, C]
    # scratch
    sem,
):
    num_pages = jnp.uint32(pool_ref.shape[0])

    def start(i, copied):
        src, dst = src_ref[i], dst_ref[i]
        live = (src.astype(jnp.uint32) < num_pages) & (dst.astype(jnp.uint32) < num_pages)

        @pl.when(live)
        def _start():
            pltpu.make_async_copy(pool_ref.at[src], pool_ref.at[dst], sem).start()

        return copied + live.astype(jnp.int32)

    unroll = min(8, step)

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
