# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel of the TPU writes: walk the entries in groups, two groups in flight.

A group is a run of entries whose tokens lie in one window of the batch. While a group's window is
interleaved and its DMAs go out, the next group's window comes in and the last group's DMAs finish.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.kv_write.tpu.interleave import Slots, Tiling, interleave

# What is known of a call's entries, each with what stands before it: nothing; that each starts
# after the one before; that none is to be skipped; that all are equally long.
ANY_ORDER, ASCENDING, ALL_LIVE, EQUAL_LENGTHS = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Entries:
    """The static side of a call's entries.

    Attributes:
      kind: "pages", "slices" or "tokens", for the kernel's name.
      max_len: tokens of an entry; of the longest possible one if `has_lengths`.
      parts: entries to one element of the metadata: a page that is longer than a window is written
        as so many equal parts.
      has_sources: each element has its own first token; else entry i starts at token i * max_len.
      has_lengths: each entry has its own length; else it has max_len tokens.
    """

    kind: str
    max_len: int
    parts: int = 1
    has_sources: bool = False
    has_lengths: bool = False


@dataclasses.dataclass(frozen=True)
class Walk:
    """The kernel's static side: the entries, the windows and the buffers' shapes."""

    slots: Slots
    entries: Entries
    num_tokens: int  # T
    max_entries: int  # entries to walk where their sources are not their own
    align: int  # rows of k and v that a window starts and ends at a multiple of
    whole: int  # tokens in k and v; the num_tails > 0 case has up to align - 1 more in the tails
    window: int  # tokens of k and v that a window has room for
    tiling: Tiling
    buffer: int  # tokens that one half of the buffers has room for
    block: int  # tokens from the first to the last of a group
    max_taken: int  # tokens that a group sends at most: what one wait covers
    step: int  # elements of metadata in SMEM at a time
    group: int  # entries in a group where the entries' sources are not their own
    unroll: int  # DMAs in one unrolled body
    num_tails: int
    has_scales: bool

    @property
    def at_most_one_chunk(self) -> bool:
        """Whether a group has no room for two whole unrolled bodies."""
        return self.group <= self.unroll and not self.entries.has_lengths


def kernel(walk, *refs):
    """Walks this step's entries, group by group, two groups in flight."""
    # scalar inputs, in SMEM
    survey_refs = ()
    if walk.entries.has_sources:
        survey_refs, refs = refs[:4], refs[4:]  # int32[1] each: see mosaic_tpu._survey
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
    parts = entries.parts
    target_slots = 1 if entries.has_lengths else parts * entries.max_len
    num_targets = num_slots // target_slots
    step = walk.step * parts
    first_entry = pl.program_id(0) * step
    num_walked, order = walk.max_entries, ASCENDING
    if survey_refs:
        num_walked, order = _order(survey_refs)
        num_walked = num_walked * parts
    num_entries = jnp.clip(num_walked - first_entry, 0, step)

    def target(i):
        """The page of entry i (for slices the slot), as the caller gave it."""
        return target_ref[i // parts]

    def source(i):
        if entries.has_sources:
            return source_ref[i // parts] + i % parts * entries.max_len
        return (first_entry + i) * entries.max_len

    def length(i):
        return length_ref[i] if entries.has_lengths else entries.max_len

    def end(i):
        return source(i) + length(i)

    def is_in_pool(target):
        """The kernel's own check: below the pool's end and, as unsigned, not negative."""
        return target.astype(jnp.uint32) < jnp.uint32(num_targets)

    def is_live(i):
        return is_in_pool(target(i))

    def window_of(i):
        """Where the window of entry i starts; inside the batch, whatever a skipped entry says."""
        start = source(i) & -walk.align  # a power of two; sources are never negative
        if entries.has_sources or walk.num_tails:
            start = jnp.minimum(start, walk.whole - walk.align)
        return start

    def plan(i):
        """The group that starts with entry i: (i, its window, its end, the last token it needs)."""
        start = window_of(i)
        if not entries.has_sources:
            last = jnp.minimum(i + walk.group, num_entries)
            return i, start, last, end(last - 1)
        limit = jnp.minimum(start + walk.window, source(i) + walk.block)

        def chunk_end(last):
            return end(jnp.minimum(last + walk.unroll, step) - 1)

        # Of entries that ascend, the last of a chunk speaks for it.
        def chunk_fits(state):
            last, _, until = state
            is_ahead = (order != ANY_ORDER) & (last + walk.unroll <= num_entries)
            return is_ahead & (until <= limit)

        def take_chunk(state):
            last, _, until = state
            last += walk.unroll
            return last, until, until if walk.at_most_one_chunk else chunk_end(last)

        # Where no chunk fits, one by one; the first entry of a group always does, or is skipped.
        def entry_fits(state):
            last, _, taken = state
            entry = jnp.minimum(last, step - 1)
            fits = (source(entry) >= start) & (end(entry) <= limit)
            fits &= taken + length(entry) <= walk.max_taken
            return (last < num_entries) & (fits | jnp.logical_not(is_live(entry)))

        def take(state):
            last, needed, taken = state
            live = is_live(last)
            needed = jnp.where(live, jnp.maximum(needed, end(last)), needed)
            return last + 1, needed, taken + jnp.where(live, length(last), 0)

        def one_by_one():
            # A group of skipped entries needs no token, but a DMA needs some.
            return lax.while_loop(entry_fits, take, take((i, start + 1, jnp.int32(0))))[:2]

        def by_chunks():
            chunk = take_chunk(none)
            if not walk.at_most_one_chunk:
                chunk = lax.while_loop(chunk_fits, take_chunk, chunk)
            return chunk[:2]

        none = (i, start, chunk_end(i))
        return i, start, *lax.cond(chunk_fits(none), by_chunks, one_by_one)

    def loads(start, needed, slot):
        """(condition or None, copy) of a window's k and v, and of the batch's ragged end."""
        rows = (needed - start + walk.align - 1) & -walk.align
        if walk.num_tails:
            rows = jnp.minimum(rows, walk.whole - start)
        rows = pl.multiple_of(rows, walk.align)
        for hbm, vmem in zip(new_refs, (k_vmem, v_vmem), strict=True):
            yield (
                None,
                pltpu.make_async_copy(
                    hbm.at[pl.ds(pl.multiple_of(start, walk.align), rows)],
                    vmem.at[slot, pl.ds(0, rows)],
                    in_sems.at[slot],
                ),
            )
        for tail, vmem in zip(tail_refs, (k_vmem, v_vmem), strict=False):
            behind = pl.multiple_of(walk.whole - start, walk.align)
            yield (
                needed > walk.whole,
                pltpu.make_async_copy(
                    tail, vmem.at[slot, pl.ds(behind, walk.align)], in_sems.at[slot]
                ),
            )

    def start_loads(start, needed, slot):
        for condition, copy in loads(start, needed, slot):
            _when(condition, copy.start)

    def wait_loads(start, needed, slot):
        for condition, copy in loads(start, needed, slot):
            _when(condition, copy.wait)

    def issue(first, last, start, slot):
        """One DMA for each live entry; returns how many tokens are on their way."""

        def send(i, target, row, num_tokens):
            """Starts entry i, whose tokens are in the buffers from `row` on."""
            first_slot = target * target_slots + i % parts * entries.max_len
            pltpu.make_async_copy(
                rows_vmem.at[pl.ds(row, num_tokens)],
                pool_words.at[pl.ds(first_slot, num_tokens)],
                out_sems.at[slot],
            ).start()

        # Row of a token: its place in the window, in this group's half of the buffers.
        to_row = slot * walk.buffer - start

        def row_of(i, u):
            if entries.has_sources:
                return source(i + u) + to_row
            return source(i) + to_row + u * entries.max_len

        def send_one_chunk():
            """A group that is one chunk, or less: no loop around the chunk."""
            none = jnp.int32(0)

            def send_rest():
                return lax.fori_loop(first, last, send_live, none)

            def send_checked():
                return checked_chunk(none, none)

            def send_unchecked():
                return unchecked_chunk(entries.max_len, none, none)

            is_whole = last - first == walk.unroll
            if not entries.has_sources:
                return lax.cond(is_whole, send_checked, send_rest)
            return lax.cond(
                is_whole & (order >= ALL_LIVE),
                send_unchecked,
                lambda: lax.cond(is_whole, send_checked, send_rest),
            )

        def send_chunks(num_chunks):
            """The whole chunks, in the cheapest form that what is known of them allows."""
            chunks = [(ASCENDING, checked_chunk)]
            if entries.has_lengths:
                chunks = [
                    (EQUAL_LENGTHS, functools.partial(unchecked_chunk, length_ref[0])),
                    (ALL_LIVE, functools.partial(unchecked_chunk, None)),
                    (ANY_ORDER, checked_chunk),
                ]
            elif entries.has_sources:
                chunks = [
                    (ALL_LIVE, functools.partial(unchecked_chunk, entries.max_len)),
                    (ANY_ORDER, checked_chunk),
                ]
            done, sent = jnp.int32(0), jnp.int32(0)
            for least, chunk in chunks:
                until = jnp.where(order >= least, num_chunks, done)
                sent = lax.fori_loop(done, until, chunk, sent)
                done = until
            return first + num_chunks * walk.unroll, sent

        def send_live(i, sent):
            """One entry behind its own check."""
            goal, num_tokens = target(i), length(i)
            live = is_in_pool(goal)
            pl.when(live)(lambda: send(i, goal, row_of(i, 0), num_tokens))
            return sent + jnp.where(live, num_tokens, 0)

        def checked_chunk(c, sent):
            """`unroll` entries, each behind its own check, counted together where all are live."""
            i = first + c * walk.unroll
            largest = jnp.uint32(0)
            for u in range(walk.unroll):
                goal, num_tokens = target(i + u), length(i + u)
                row = row_of(i, u)
                # As an unsigned number, so that the negative ones are out of the pool too.
                largest = jnp.maximum(largest, goal.astype(jnp.uint32))
                pl.when(is_in_pool(goal))(functools.partial(send, i + u, goal, row, num_tokens))

            def count_live(i):
                # A loop, because straight code would be predicated and run in every case.
                def add(i, sum):
                    return sum + jnp.where(is_live(i), length(i), 0)

                return lax.fori_loop(i, i + walk.unroll, add, jnp.int32(0))

            def count_all(i):
                return jnp.int32(0) + sum(length(i + u) for u in range(walk.unroll))

            return sent + lax.cond(largest < num_targets, count_all, count_live, i)

        def unchecked_chunk(num_tokens, c, sent):
            """`unroll` entries that are known to be live, and perhaps to be equally long."""
            i = first + c * walk.unroll
            for u in range(walk.unroll):
                n = length(i + u) if num_tokens is None else num_tokens
                send(i + u, target(i + u), row_of(i, u), n)
                sent += n if num_tokens is None else 0
            return sent if num_tokens is None else sent + walk.unroll * num_tokens

        done, sent = first, jnp.int32(0)
        if walk.unroll > 1 and walk.at_most_one_chunk:
            return send_one_chunk()
        if walk.unroll > 1:
            done, sent = send_chunks((last - first) // walk.unroll)
        return lax.fori_loop(done, last, send_live, sent)

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
            rows_vmem[...] = jnp.zeros_like(rows_vmem)

    def scales(which, head):
        return scale_ref[which * slots.num_kv_heads + head]

    def open_group(i, slot):
        """Plans the group that starts with entry i and sets its window on its way."""

        def begin():
            group = plan(i)
            start_loads(group[1], group[3], slot)
            return group

        return lax.cond(i < num_entries, begin, lambda: (i, jnp.int32(0), i, jnp.int32(0)))

    def do_group(carry):
        (first, start, last, needed), slot, sent, sent_before = carry
        ahead = open_group(last, 1 - slot)
        wait_loads(start, needed, slot)
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
    opening = (open_group(zero, zero), zero, zero, zero)
    _, slot, sent, sent_before = lax.while_loop(
        lambda carry: carry[0][0] < num_entries, do_group, opening
    )
    wait_sent(sent_before, slot)
    wait_sent(sent, 1 - slot)


def _order(survey_refs):
    """How many entries to walk, and what is known of them; what lies behind spoils no order."""
    num_walked, early, hole, unequal = (ref[0] for ref in survey_refs)
    order = jnp.where(-unequal < num_walked, ALL_LIVE, EQUAL_LENGTHS)
    order = jnp.where(-hole < num_walked, ASCENDING, order)
    return num_walked, jnp.where(-early < num_walked, ANY_ORDER, order)


def _when(condition, action):
    if condition is None:
        action()
    else:
        pl.when(condition)(action)
