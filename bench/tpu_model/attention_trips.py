# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""How often each part of the TPU attention's kernel runs for given lengths, counted on paper.

The static side is the kernel's own: its `KernelSpec`, as `launch.plan` makes it without tracing.
What depends on lengths is repeated here, function by function, on plain integers and without the
arithmetic: `trips` runs it and counts what `bench.tpu_model.attention` weighs the compiled schedule
with. tests/bench/test_attention.py interprets the kernel and fails where the two count differently.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

from bench.cases.rounding import ceil_div
from pallas_paged.attention.tpu import kv_blocks, new_kv
from pallas_paged.attention.tpu.spec import ROW_TILE, KernelSpec

# What one iteration of the kernel's loop takes: many full KV blocks of a decode (or of two), many
# KV blocks of any decodes, one KV block of a decode, one KV block of a prefill.
FULL, MULTIPLE, SINGLE, PREFILL = "full", "multiple", "single", "prefill"
# What runs before a decode's first iteration, before all iterations, and after them.
DECODE, FILL, END = "decode", "fill", "end"


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """A work item as the kernel keeps it, and what finding it took."""

    row: int
    end: int
    position: int
    first_chunk: int
    end_chunk: int
    key_end: int
    is_decode: bool
    is_last: bool  # of its sequence
    skipped: int  # candidates without keys before it
    old_end: int | None  # the chunk from which on keys are new and in VMEM; None if none is
    new_blocks: int  # of those
    old_tokens: int

    def num_pool_blocks(self, chunks: int) -> int:
        return max(0, ceil_div(self.end_chunk - self.first_chunk, chunks))

    def num_blocks(self, chunks: int) -> int:
        return self.num_pool_blocks(chunks) + self.new_blocks


@functools.lru_cache(maxsize=256)
def trips(
    lens: tuple[tuple[int, int], ...],
    spec: KernelSpec,
    sliding_window: int | None = None,
) -> collections.Counter[tuple[str, str]]:
    """Counts what a call does.

    Args:
      lens: for each sequence (new tokens, all keys), at most as many new tokens as keys.
      spec: the kernel's static parameters; they say whether the call writes its new tokens.
      sliding_window: keys that a query looks back on.

    Returns:
      (place, event) -> count. The places are FILL, DECODE, FULL, MULTIPLE, SINGLE, PREFILL and END.
      The events:
      - "iteration"; of FULL also "run", iterations one after the other.
      - of DECODE, PREFILL and END, for their q tiles: "first" (a work item's first iteration),
        "open", "close", "gather" and "gather_trips", "zero" and "zero_trips", "keep", "tiles".
      - "find", "skip" and "skip_trips": a work item that is found before many KV blocks are
        fetched; "slow": fetches that went block by block. All of these end with "_1" for the second
        decode of an iteration.
      - "find<b>", "skip<b>" and "skip_trips<b>" for the b-th KV block that is fetched, "fetch<b>"
        and "chunks<b>".
      - of PREFILL: "last", and "masked", "masked_fetch" and "masked_chunks" and the same with
        "unmasked", "masked_clear" and "masked_clear_trips" (each clears some tokens after the last
        one). Where the call writes, "make" and "make_trips" (the row tiles of a q tile but the
        first), "send" and "send_trips" (whole pages, or parts of them, but the first).
    """
    return _Kernel(lens, spec, sliding_window).run()


def part_name(part: int) -> str:
    """The end of the events' names for the fetches of an iteration's second decode."""
    return f"_{part}" if part else ""


def find_work_items(
    lens: Sequence[tuple[int, int]],
    spec: KernelSpec,
    sliding_window: int | None,
) -> tuple[list[WorkItem], int | None]:
    """The items in order; and the candidates that the search after the last one skips, or None
    where the last item ends the last sequence and nothing is searched for."""
    items: list[WorkItem] = []
    start = skipped = 0
    for q_len, kv_len in lens:
        stop = start + q_len
        row = start
        while True:
            end = min(stop, (row & -ROW_TILE) + spec.block_q)
            position = kv_len - (stop - row)
            key_end = max(0, min(position + end - row, kv_len))
            first_key = 0
            if sliding_window is not None:
                first_key = max(0, min(position - sliding_window + 1, key_end))
            first, last = first_key // spec.chunk, ceil_div(key_end, spec.chunk)
            if row < end and first < last:
                old_end, new_blocks = None, 0
                if spec.writes and q_len > 1:
                    old_end = (kv_len - q_len) // spec.chunk
                    last = min(last, old_end)
                    new_blocks = ceil_div(key_end - old_end * spec.chunk, spec.block_kv)
                    new_blocks -= max(0, first - old_end) * spec.chunk // spec.block_kv
                items.append(
                    WorkItem(
                        row,
                        end,
                        position,
                        first,
                        last,
                        key_end,
                        q_len == 1,
                        end == stop,
                        skipped,
                        old_end,
                        new_blocks,
                        kv_len - q_len,
                    )
                )
                skipped = 0
            else:
                skipped += 1
            row = max(row, end)
            if row >= stop:
                break
        start = stop
    return items, skipped or None


class _Kernel:
    """The kernel's state; methods have the names of its functions."""

    def __init__(
        self, lens: Sequence[tuple[int, int]], spec: KernelSpec, sliding_window: int | None
    ) -> None:
        self.spec, self.sliding_window = spec, sliding_window
        self.items, self.last_search = find_work_items(lens, spec, sliding_window)
        self.num_tokens = ceil_div(sum(q for q, _ in lens), ROW_TILE) * ROW_TILE
        self.counts: collections.Counter = collections.Counter()
        self.found = self.fetched = self.taken = 0
        self.is_searched = False  # to the end of the last sequence
        self.ahead = self.ahead_end = self.ahead_blocks = 0
        self.q_tile = self.q_tile_end = self.done = 0
        self.kind = ""

    def count(self, place: str, event: str, number: int = 1) -> None:
        self.counts[place, event] += number

    def run(self) -> collections.Counter:
        for _ in range(self.spec.num_stages - self.spec.kv_blocks_per_iteration):
            self.count(FILL, "iteration")
            self.next_fetches(FILL, 1)
        index = block = 0
        while self.taken < self.fetched:
            index, block = self.step(index, block)
        if index != len(self.items):
            raise AssertionError(f"took the blocks of {index} items of {len(self.items)}")
        self.close_q_tile(END)
        self.zero_until(END, self.num_tokens)
        return self.counts

    def step(self, index: int, block: int) -> tuple[int, int]:
        """Takes the next block, or blocks; returns the item and the block after them."""
        item = self.items[index]
        if block == 0:
            self.count(DECODE if item.is_decode else PREFILL, "first")
        if item.is_decode:
            return self.decode(index, block)
        if block == 0:
            self.open_q_tile(PREFILL, item.row)
            if self.spec.writes:
                self.make(item)
        num_chunks = self.take(PREFILL, [(index, block)])
        form = "masked" if self.is_edge(item, block) else "unmasked"
        self.count(PREFILL, form)
        if form == "masked":
            first, end = self.block_of(item, block)
            cleared = -(end - first) % kv_blocks.STRIP
            self.count(PREFILL, "masked_clear", cleared > 0)
            self.count(PREFILL, "masked_clear_trips", ceil_div(cleared, kv_blocks.CLEARED_PER_TRIP))
        self.count(PREFILL, f"{form}_fetch", num_chunks > 0)
        self.count(PREFILL, f"{form}_chunks", num_chunks)
        self.count(PREFILL, "last", block + 1 == item.num_blocks(self.spec.chunks_per_block))
        return self.after((index, block))

    def take(self, place: str, taken: list[tuple[int, int]]) -> int:
        """Has an iteration take some blocks and fetch as many; returns the chunks it fetches."""
        self.count(place, "iteration")
        num_chunks = self.next_fetches(place, len(taken))
        self.taken += len(taken)
        if self.taken > self.fetched:
            raise AssertionError(f"took {self.taken} blocks of {self.fetched} fetched")
        self.q_tile_end = self.items[taken[-1][0]].end
        return num_chunks

    def make(self, item: WorkItem) -> None:
        """Makes slots of the new tokens of a prefill's q tile and sends the full pages."""
        chunk = self.spec.chunk
        tiles = ceil_div(item.end, ROW_TILE) - item.row // ROW_TILE
        self.count(PREFILL, "make")
        self.count(PREFILL, "make_trips", tiles - 1)
        first = max(item.position // chunk * chunk, item.old_tokens)
        end = item.position + item.end - item.row
        end = end if item.is_last else end // chunk * chunk
        if first < end:
            num_whole = max(0, end // chunk - first // chunk - 1)
            self.count(PREFILL, "send", num_whole > 0)
            self.count(PREFILL, "send_trips", ceil_div(num_whole, new_kv.CHUNKS_PER_TRIP))

    def decode(self, index: int, block: int) -> tuple[int, int]:
        """Takes a decode's next block, or blocks; returns the item and the block after them."""
        item, at = self.items[index], (index, block)
        is_inside = self.q_tile <= item.row < self.q_tile + self.spec.block_q
        if block == 0 and (not is_inside or self.kind != "decodes"):
            self.open_q_tile(DECODE, item.row)
        many = self.spec.kv_blocks_per_iteration
        if many == 1:
            self.take(SINGLE, [at])
            return self.after(at)
        full, is_full = self.full_iteration(at)
        if is_full:
            self.count(FULL, "run")
            while is_full:
                self.take(FULL, full)
                at = self.after(full[-1])
                full, is_full = self.full_iteration(at) if self.is_near(at) else ([], False)
            return at
        is_there, multiple = self.taken + many <= self.fetched, [at]
        while is_there and len(multiple) < many:
            multiple.append(self.after(multiple[-1]))
            is_there = self.is_near(multiple[-1])
        taken = multiple if is_there else [at]
        self.take(MULTIPLE if is_there else SINGLE, taken)
        return self.after(taken[-1])

    def full_iteration(self, at: tuple[int, int]) -> tuple[list[tuple[int, int]], bool]:
        """The blocks of an iteration of full ones, from one on; and whether they are there."""
        is_there = self.taken + self.spec.kv_blocks_per_iteration <= self.fetched
        full, is_full = self.full_part(at)
        for _ in range(1, self.spec.decodes_per_full_iteration):
            at = self.after(full[-1])
            is_full = is_full and is_there and self.is_near(at)
            more, is_more_full = self.full_part(at) if is_full else ([at], False)
            is_full &= is_more_full
            full += more
        return full, is_full

    def full_part(self, at: tuple[int, int]) -> tuple[list[tuple[int, int]], bool]:
        """Blocks of a decode from one on that are a part of a full iteration, if they are full."""
        index, block = at
        number = self.spec.kv_blocks_per_iteration // self.spec.decodes_per_full_iteration
        item = self.items[index]
        end = (item.first_chunk + (block + number) * self.spec.chunks_per_block) * self.spec.chunk
        return [(index, block + b) for b in range(number)], end <= item.key_end

    def is_near(self, at: tuple[int, int]) -> bool:
        """Whether an item has been found, and a decode whose row is in the q tile."""
        index, _ = at
        if index >= self.found:
            return False
        item = self.items[index]
        return item.is_decode and self.q_tile <= item.row < self.q_tile + self.spec.block_q

    def after(self, at: tuple[int, int]) -> tuple[int, int]:
        """The block after one: (number of the item, its block)."""
        index, block = at
        is_over = block + 1 == self.items[index].num_blocks(self.spec.chunks_per_block)
        return (index + 1, 0) if is_over else (index, block + 1)

    def block_of(self, item: WorkItem, block: int) -> tuple[int, int]:
        """Positions of the first key of a prefill's block, and of the first that it lacks."""
        first_chunk = item.first_chunk + block * self.spec.chunks_per_block
        first = first_chunk * self.spec.chunk
        end = (first_chunk + self.spec.chunks_per_block) * self.spec.chunk
        if item.old_end is not None:
            old_end, new = item.old_end, block - item.num_pool_blocks(self.spec.chunks_per_block)
            if new < 0:
                end = min(end, old_end * self.spec.chunk)
            else:
                skipped = max(0, item.first_chunk - old_end) * self.spec.chunk
                new += skipped // self.spec.block_kv
                first = old_end * self.spec.chunk + new * self.spec.block_kv
                end = first + self.spec.block_kv
        return first, min(item.key_end, end)

    def is_edge(self, item: WorkItem, block: int) -> bool:
        first, end = self.block_of(item, block)
        is_edge = end < first + self.spec.block_kv or end - 1 > item.position
        if self.sliding_window is not None:
            is_edge |= first <= item.position + item.end - item.row - 1 - self.sliding_window
        return is_edge

    def next_fetches(self, place: str, number: int) -> int:
        """Fetches some blocks and returns their chunks."""
        parts = self.spec.decodes_per_full_iteration if number > 1 else 1
        number //= parts
        return sum(self.next_part(place, part, number) for part in range(parts))

    def next_part(self, place: str, part: int, number: int) -> int:
        """Fetches the blocks of a part and returns their chunks."""
        if number > 1 and self.is_over():
            self.find_work_item(place, part_name(part))
        is_within = (
            number > 1 and self.ahead_end - self.ahead >= number * self.spec.chunks_per_block
        )
        self.count(place, f"slow{part_name(part)}", not is_within)
        num_chunks = 0
        for b in range(part * number, (part + 1) * number):
            if not is_within and self.is_over():
                self.find_work_item(place, b)
            num_chunks += self.fetch(place, b)
        return num_chunks

    def is_over(self) -> bool:
        """Whether the item that is being fetched is all fetched, and there may be another."""
        return self.ahead_blocks == 0 and not self.is_searched

    def fetch(self, place: str, b: int) -> int:
        num_chunks = max(0, min(self.ahead_end - self.ahead, self.spec.chunks_per_block))
        self.ahead += num_chunks
        if self.ahead_blocks:
            self.ahead_blocks -= 1
            self.fetched += 1
        if num_chunks:
            self.count(place, f"fetch{b}")
            self.count(place, f"chunks{b}", num_chunks)
        return num_chunks

    def find_work_item(self, place: str, b: int | str) -> None:
        self.count(place, f"find{b}")
        is_found = self.found < len(self.items)
        skipped = self.items[self.found].skipped if is_found else self.last_search or 0
        if skipped:
            self.count(place, f"skip{b}")
            self.count(place, f"skip_trips{b}", skipped)
        if is_found:
            item = self.items[self.found]
            self.ahead, self.ahead_end = item.first_chunk, item.end_chunk
            self.ahead_blocks = item.num_blocks(self.spec.chunks_per_block)
            self.found += 1
        is_last = self.found == len(self.items)
        self.is_searched = not is_found or (is_last and self.last_search is None)

    def open_q_tile(self, place: str, row: int) -> None:
        self.count(place, "open")
        self.close_q_tile(place)
        first = row & -ROW_TILE
        self.count(place, "keep", self.done > first)
        self.zero_until(place, first)
        self.q_tile, self.kind = first, "prefill" if place == PREFILL else "decodes"
        if place != PREFILL:
            num_rows = min(self.spec.block_q, self.num_tokens - first)
            self.count(place, "tiles", num_rows // ROW_TILE)

    def close_q_tile(self, place: str) -> None:
        if not self.kind:
            return
        self.count(place, "close")
        num_tiles = ceil_div(self.q_tile_end - self.q_tile, ROW_TILE)
        if self.kind == "decodes":
            self.count(place, "gather")
            self.count(place, "gather_trips", num_tiles)
        self.done = max(self.done, self.q_tile + num_tiles * ROW_TILE)
        self.kind = ""

    def zero_until(self, place: str, row: int) -> None:
        if self.done < row:
            self.count(place, "zero")
            self.count(place, "zero_trips", ceil_div(row - self.done, self.spec.block_q))
            self.done = row
