# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The walk of the TPU attention on paper: what its kernel does for given lengths, counted.

The same control flow as `kernel.kernel` and what it calls, function by function, on plain
integers and without the arithmetic. `trips` runs it and counts what `bench.tpu_model.attention`
weighs the compiled schedule with.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

from pallas_paged.attention.tpu import kv_blocks, new_kv, refs
from pallas_paged.attention.tpu import launch as mosaic_tpu
from pallas_paged.attention.tpu.refs import ROW_TILE

# The bodies: many full blocks of a decode (or of two), many blocks of any decodes, one block of a
# decode, one block of a prefill.
FULL, SEVERAL, SINGLE, PREFILL = "full", "several", "single", "prefill"
# What runs before a decode's body, before all bodies, and after them.
DECODE, FILL, END = "decode", "fill", "end"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The kernel's static sizes that decide its way.

    Attributes:
      block, window, ring, kv_blocks_per_iteration: see TpuAttentionConfig: keys of a block, rows of
        a window, blocks in VMEM and of a decode's long bodies.
      full_parts: decodes that a body of full blocks is of: see refs.Walk.
      page_size: tokens of a page.
      piece: tokens that one DMA brings.
    """

    block: int
    window: int
    ring: int
    kv_blocks_per_iteration: int
    page_size: int
    piece: int
    full_parts: int = 1

    @property
    def pieces(self) -> int:
        """Pieces of a full block."""
        return self.block // self.piece


def blocks_of(config: mosaic_tpu.TpuAttentionConfig, page_size: int) -> Blocks:
    """The sizes that a config gives with pages of a size."""
    many = config.kv_blocks_per_iteration
    is_long = many * config.block_kv >= refs._LONG_BODY and many % 2 == 0
    return Blocks(
        block=config.block_kv,
        window=config.block_q,
        ring=config.num_stages,
        kv_blocks_per_iteration=config.kv_blocks_per_iteration,
        page_size=page_size,
        piece=mosaic_tpu._piece(page_size, config.block_kv),
        full_parts=2 if is_long else 1,
    )


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One record of the kernel's units, and what finding it took."""

    row: int
    end: int
    position: int
    first_piece: int
    end_piece: int
    key_end: int
    is_decode: bool
    is_last: bool  # of its sequence
    skipped: int  # candidates without keys before it
    old_end: int | None  # the piece from which on keys are new and in VMEM; None if none is
    new_blocks: int  # of those
    old_tokens: int

    def num_pool_blocks(self, pieces: int) -> int:
        return max(0, _cdiv(self.end_piece - self.first_piece, pieces))

    def num_blocks(self, pieces: int) -> int:
        return self.num_pool_blocks(pieces) + self.new_blocks


@functools.lru_cache(maxsize=256)
def trips(
    lens: tuple[tuple[int, int], ...],
    blocks: Blocks,
    sliding_window: int | None = None,
    writes: bool = False,
) -> collections.Counter:
    """Counts what a call does.

    Args:
      lens: for each sequence (new tokens, all keys), at most as many new tokens as keys.
      blocks: the kernel's sizes.
      sliding_window: keys that a query looks back on.
      writes: whether the call writes its new tokens.

    Returns:
      (place, event) -> count. Places are FILL, DECODE, FULL, SEVERAL, SINGLE, PREFILL and END.
      Events: "body"; of FULL "run" (bodies one behind the other); of windows, of DECODE, PREFILL or
      END, "first" (a unit's first body), "open", "close", "gather" and "gather_trips", "zero" and
      "zero_trips", "keep", "tiles"; "find", "skip" and "skip_trips" (a unit found before many
      blocks are fetched); "slow" (fetches that went block by block), these also with "_1" of a
      second part; "find<b>", "skip<b>" and "skip_trips<b>" of the b-th block fetched, "fetch<b>"
      and "pieces<b>"; of a prefill "last", and "masked", "masked_fetch" and "masked_pieces" and the
      same with "unmasked", "masked_clear" and "masked_clear_trips" (some tokens behind the last one
      each). Where the call writes, of a prefill's window "make" and "make_trips" (its row tiles but
      the first), "send" and "send_trips" (whole pages, or parts, but the first; some a trip).
    """
    return _Walk(lens, blocks, sliding_window, writes).run()


def part_name(part: int) -> str:
    """What the events of a part of a body's fetches end with."""
    return f"_{part}" if part else ""


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def find_units(
    lens: Sequence[tuple[int, int]],
    blocks: Blocks,
    sliding_window: int | None,
    writes: bool = False,
) -> tuple[list[_Unit], int | None]:
    """The units in order; and the candidates that the search after the last one skips, or None
    where the last unit ends the last sequence and nothing is searched for."""
    units: list[_Unit] = []
    start = skipped = 0
    for q_len, kv_len in lens:
        stop = start + q_len
        row = start
        while True:
            end = min(stop, (row & -ROW_TILE) + blocks.window)
            position = kv_len - (stop - row)
            key_end = max(0, min(position + end - row, kv_len))
            first_key = 0
            if sliding_window is not None:
                first_key = max(0, min(position - sliding_window + 1, key_end))
            first, last = first_key // blocks.piece, _cdiv(key_end, blocks.piece)
            if row < end and first < last:
                old_end, new_blocks = None, 0
                if writes and q_len > 1:
                    old_end = (kv_len - q_len) // blocks.piece
                    last = min(last, old_end)
                    new_blocks = _cdiv(key_end - old_end * blocks.piece, blocks.block)
                    new_blocks -= max(0, first - old_end) * blocks.piece // blocks.block
                units.append(
                    _Unit(
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
    return units, skipped or None


class _Walk:
    """The kernel's state; methods have the names of its functions."""

    def __init__(self, lens, blocks: Blocks, sliding_window: int | None, writes: bool):
        self.blocks, self.sliding_window, self.writes = blocks, sliding_window, writes
        self.units, self.last_search = find_units(lens, blocks, sliding_window, writes)
        self.num_tokens = _cdiv(sum(q for q, _ in lens), ROW_TILE) * ROW_TILE
        self.counts: collections.Counter = collections.Counter()
        self.found = self.fetched = self.taken = 0
        self.is_searched = False  # to the end of the last sequence
        self.ahead = self.ahead_end = self.ahead_blocks = 0
        self.window = self.window_end = self.done = 0
        self.kind = ""

    def count(self, place: str, event: str, number: int = 1) -> None:
        self.counts[place, event] += number

    def run(self) -> collections.Counter:
        for _ in range(self.blocks.ring - self.blocks.kv_blocks_per_iteration):
            self.count(FILL, "body")
            self.next_fetches(FILL, 1)
        index = block = 0
        while self.taken < self.fetched:
            index, block = self.step(index, block)
        if index != len(self.units):
            raise AssertionError(f"took the blocks of {index} units of {len(self.units)}")
        self.close_window(END)
        self.zero_until(END, self.num_tokens)
        return self.counts

    def step(self, index: int, block: int) -> tuple[int, int]:
        """Takes the next block, or blocks; returns the unit and the block behind them."""
        unit = self.units[index]
        if block == 0:
            self.count(DECODE if unit.is_decode else PREFILL, "first")
        if unit.is_decode:
            return self.decode(index, block)
        if block == 0:
            self.open_window(PREFILL, unit.row)
            if self.writes:
                self.make(unit)
        num_pieces = self.take(PREFILL, [(index, block)])
        form = "masked" if self.is_edge(unit, block) else "unmasked"
        self.count(PREFILL, form)
        if form == "masked":
            first, end = self.block_of(unit, block)
            cleared = -(end - first) % kv_blocks._RUN
            self.count(PREFILL, "masked_clear", cleared > 0)
            self.count(PREFILL, "masked_clear_trips", _cdiv(cleared, kv_blocks._CLEARED))
        self.count(PREFILL, f"{form}_fetch", num_pieces > 0)
        self.count(PREFILL, f"{form}_pieces", num_pieces)
        self.count(PREFILL, "last", block + 1 == unit.num_blocks(self.blocks.pieces))
        return self.behind((index, block))

    def take(self, place: str, taken: list[tuple[int, int]]) -> int:
        """Has a body take some blocks and fetch as many; returns the pieces that it fetches."""
        self.count(place, "body")
        num_pieces = self.next_fetches(place, len(taken))
        self.taken += len(taken)
        if self.taken > self.fetched:
            raise AssertionError(f"took {self.taken} blocks of {self.fetched} fetched")
        self.window_end = self.units[taken[-1][0]].end
        return num_pieces

    def make(self, unit: _Unit) -> None:
        """Makes a prefill's window of new tokens into slots and sends the pages that are full."""
        piece = self.blocks.piece
        tiles = _cdiv(unit.end, ROW_TILE) - unit.row // ROW_TILE
        self.count(PREFILL, "make")
        self.count(PREFILL, "make_trips", tiles - 1)
        first = max(unit.position // piece * piece, unit.old_tokens)
        end = unit.position + unit.end - unit.row
        end = end if unit.is_last else end // piece * piece
        if first < end:
            num_whole = max(0, end // piece - first // piece - 1)
            self.count(PREFILL, "send", num_whole > 0)
            self.count(PREFILL, "send_trips", _cdiv(num_whole, new_kv._PIECES_TOGETHER))

    def decode(self, index: int, block: int) -> tuple[int, int]:
        """Takes a decode's next block, or blocks; returns the unit and the block behind them."""
        unit, at = self.units[index], (index, block)
        is_inside = self.window <= unit.row < self.window + self.blocks.window
        if block == 0 and (not is_inside or self.kind != "decodes"):
            self.open_window(DECODE, unit.row)
        many = self.blocks.kv_blocks_per_iteration
        if many == 1:
            self.take(SINGLE, [at])
            return self.behind(at)
        full, is_full = self.full_body(at)
        if is_full:
            self.count(FULL, "run")
            while is_full:
                self.take(FULL, full)
                at = self.behind(full[-1])
                full, is_full = self.full_body(at) if self.is_near(at) else ([], False)
            return at
        is_there, several = self.taken + many <= self.fetched, [at]
        while is_there and len(several) < many:
            several.append(self.behind(several[-1]))
            is_there = self.is_near(several[-1])
        taken = several if is_there else [at]
        self.take(SEVERAL if is_there else SINGLE, taken)
        return self.behind(taken[-1])

    def full_body(self, at: tuple[int, int]) -> tuple[list[tuple[int, int]], bool]:
        """The blocks of a body of full ones, from one on; and whether they are there."""
        is_there = self.taken + self.blocks.kv_blocks_per_iteration <= self.fetched
        full, is_full = self.full_part(at)
        for _ in range(1, self.blocks.full_parts):
            at = self.behind(full[-1])
            is_full = is_full and is_there and self.is_near(at)
            more, is_more_full = self.full_part(at) if is_full else ([at], False)
            is_full &= is_more_full
            full += more
        return full, is_full

    def full_part(self, at: tuple[int, int]) -> tuple[list[tuple[int, int]], bool]:
        """Blocks of a decode from one on that are a part of a full body, if they are full."""
        index, block = at
        number = self.blocks.kv_blocks_per_iteration // self.blocks.full_parts
        unit = self.units[index]
        end = (unit.first_piece + (block + number) * self.blocks.pieces) * self.blocks.piece
        return [(index, block + b) for b in range(number)], end <= unit.key_end

    def is_near(self, at: tuple[int, int]) -> bool:
        """Whether a unit is known, and a decode whose row is in the window."""
        index, _ = at
        if index >= self.found:
            return False
        unit = self.units[index]
        return unit.is_decode and self.window <= unit.row < self.window + self.blocks.window

    def behind(self, at: tuple[int, int]) -> tuple[int, int]:
        """The block behind one: (number of the unit, its block)."""
        index, block = at
        is_over = block + 1 == self.units[index].num_blocks(self.blocks.pieces)
        return (index + 1, 0) if is_over else (index, block + 1)

    def block_of(self, unit: _Unit, block: int) -> tuple[int, int]:
        """Positions of the first key of a prefill's block, and of the first that it lacks."""
        first_piece = unit.first_piece + block * self.blocks.pieces
        first = first_piece * self.blocks.piece
        end = (first_piece + self.blocks.pieces) * self.blocks.piece
        if unit.old_end is not None:
            old_end, new = unit.old_end, block - unit.num_pool_blocks(self.blocks.pieces)
            if new < 0:
                end = min(end, old_end * self.blocks.piece)
            else:
                skipped = max(0, unit.first_piece - old_end) * self.blocks.piece
                new += skipped // self.blocks.block
                first = old_end * self.blocks.piece + new * self.blocks.block
                end = first + self.blocks.block
        return first, min(unit.key_end, end)

    def is_edge(self, unit: _Unit, block: int) -> bool:
        first, end = self.block_of(unit, block)
        is_edge = end < first + self.blocks.block or end - 1 > unit.position
        if self.sliding_window is not None:
            is_edge |= first <= unit.position + unit.end - unit.row - 1 - self.sliding_window
        return is_edge

    def next_fetches(self, place: str, number: int) -> int:
        """Fetches some blocks and returns their pieces."""
        parts = self.blocks.full_parts if number > 1 else 1
        number //= parts
        return sum(self.next_part(place, part, number) for part in range(parts))

    def next_part(self, place: str, part: int, number: int) -> int:
        """Fetches the blocks of a part and returns their pieces."""
        if number > 1 and self.is_over():
            self.find_unit(place, part_name(part))
        is_within = number > 1 and self.ahead_end - self.ahead >= number * self.blocks.pieces
        self.count(place, f"slow{part_name(part)}", not is_within)
        num_pieces = 0
        for b in range(part * number, (part + 1) * number):
            if not is_within and self.is_over():
                self.find_unit(place, b)
            num_pieces += self.fetch(place, b)
        return num_pieces

    def is_over(self) -> bool:
        """Whether the unit that is being fetched is all fetched, and there may be another."""
        return self.ahead_blocks == 0 and not self.is_searched

    def fetch(self, place: str, b: int) -> int:
        num_pieces = max(0, min(self.ahead_end - self.ahead, self.blocks.pieces))
        self.ahead += num_pieces
        if self.ahead_blocks:
            self.ahead_blocks -= 1
            self.fetched += 1
        if num_pieces:
            self.count(place, f"fetch{b}")
            self.count(place, f"pieces{b}", num_pieces)
        return num_pieces

    def find_unit(self, place: str, b: int | str) -> None:
        self.count(place, f"find{b}")
        is_found = self.found < len(self.units)
        skipped = self.units[self.found].skipped if is_found else self.last_search or 0
        if skipped:
            self.count(place, f"skip{b}")
            self.count(place, f"skip_trips{b}", skipped)
        if is_found:
            unit = self.units[self.found]
            self.ahead, self.ahead_end = unit.first_piece, unit.end_piece
            self.ahead_blocks = unit.num_blocks(self.blocks.pieces)
            self.found += 1
        is_last = self.found == len(self.units)
        self.is_searched = not is_found or (is_last and self.last_search is None)

    def open_window(self, place: str, row: int) -> None:
        self.count(place, "open")
        self.close_window(place)
        first = row & -ROW_TILE
        self.count(place, "keep", self.done > first)
        self.zero_until(place, first)
        self.window, self.kind = first, "prefill" if place == PREFILL else "decodes"
        if place != PREFILL:
            num_rows = min(self.blocks.window, self.num_tokens - first)
            self.count(place, "tiles", num_rows // ROW_TILE)

    def close_window(self, place: str) -> None:
        if not self.kind:
            return
        self.count(place, "close")
        num_tiles = _cdiv(self.window_end - self.window, ROW_TILE)
        if self.kind == "decodes":
            self.count(place, "gather")
            self.count(place, "gather_trips", num_tiles)
        self.done = max(self.done, self.window + num_tiles * ROW_TILE)
        self.kind = ""

    def zero_until(self, place: str, row: int) -> None:
        if self.done < row:
            self.count(place, "zero")
            self.count(place, "zero_trips", _cdiv(row - self.done, self.blocks.window))
            self.done = row
