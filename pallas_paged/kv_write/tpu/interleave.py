# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Makes pool slots of new k and v: convert or quantise, pack into 32-bit words, transpose.

A register tile of k, as a projection leaves it, holds one head of many tokens; a pool slot holds
all heads of one token. The rows of a slot are packed into 32-bit words (bf16 K and V of a head are
the low and the high half of one word). The words are transposed from head-major to token-major
through a small scratch in VMEM: they go in as whole tiles and come out by strided loads, so that
nothing is shuffled in registers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout
from pallas_paged.kv_write.tpu.quantize import quantize


@dataclasses.dataclass(frozen=True)
class Slots:
    """The form of k and v, and of the pool's slots: all that the interleaving needs, static."""

    num_kv_heads: int
    head_dim: int
    pool_dtype: jnp.dtype
    num_rows: int  # R
    is_flat: bool  # k and v are [T, K*H] rather than [T, K, H]

    @property
    def rows_per_word(self) -> int:
        """Pool rows that one 32-bit word holds."""
        return 4 // self.pool_dtype.itemsize

    @property
    def num_words(self) -> int:
        """Rows of 32-bit words in a slot."""
        return -(-self.num_rows // self.rows_per_word)

    @property
    def num_lanes(self) -> int:
        """C."""
        return layout.num_lanes(self.head_dim)

    @property
    def has_padding(self) -> bool:
        """Whether some words are never stored, because all their rows are padding."""
        used = layout.num_rows_used(self.num_kv_heads, self.head_dim)
        return used <= self.num_rows - self.rows_per_word


Ref = Any
Tokens = pl.Slice | slice  # what pl.ds returns
# load(first_lane, num_lanes, head) -> float32[n, 128]: see row_words
LoadLanes = Callable[[int, int, int], jax.Array]
# scales(which, head) -> float32[], the inverse scale of K (0) or V (1)
Scales = Callable[[int, int], jax.Array]

# Tiles that lie in the scratch at a time: one is stored while the one before it is loaded.
_REGIONS = 2

Transposed = Literal["rows", "packed_rows", "nothing"]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How many tokens are transposed from rows of heads to slots at a time.

    Attributes:
      tile: tokens in a register tile of k and v.
      tiles_per_iteration: tiles in one iteration of the loop, so that their latencies overlap.
      transposed: what goes through the scratch. "rows": rows of any k and v. "packed_rows": rows of
        bf16 k and v, which go from pairs of tokens to pairs of K and V without becoming float32.
        "nothing": bf16 k and v of the form [tokens, K, H] have their heads in rows already.
    """

    tile: int
    tiles_per_iteration: int
    transposed: Transposed

    @property
    def pitch(self) -> int:
        """Scratch rows from the tile of one row of words to the next one's.

        Not a multiple of 8, because loads with such a stride hit one memory bank and take twice as
        long.
        """
        return self.tile + 4


def tiling(slots: Slots, new_dtype: jnp.dtype, num_tokens: int, packed: bool) -> Tiling:
    """For `num_tokens` tokens: as few iterations as will do, all of the same 8 tiles or fewer."""
    tile = 32 // jnp.dtype(new_dtype).itemsize
    registers = slots.num_words * slots.num_lanes // layout.LANES
    whole_bf16 = (
        slots.pool_dtype == new_dtype == jnp.bfloat16 and slots.head_dim % layout.LANES == 0
    )
    transposed: Transposed = "rows"
    if whole_bf16 and not slots.is_flat:
        transposed = "nothing"
    elif whole_bf16 and packed:
        transposed = "packed_rows"
    num_tiles = -(-num_tokens // tile)
    num_iterations = -(-num_tiles // max(1, min(8, 64 // registers)))
    return Tiling(tile, -(-num_tiles // num_iterations), transposed)


def scratch_shape(slots: Slots, tiling: Tiling) -> tuple[int, int]:
    """Shape of the words' scratch, [rows, 128]."""
    lane_tiles = slots.num_lanes // layout.LANES
    return _REGIONS * lane_tiles * slots.num_words * tiling.pitch, layout.LANES


def interleave(
    slots: Slots,
    tiling: Tiling,
    k_ref: Ref,
    v_ref: Ref,
    slots_ref: Ref,
    transpose_ref: Ref,
    *,
    num_tokens: jax.Array,
    scales: Scales | None,
) -> None:
    """Makes the slots of at least the first `num_tokens` tokens of a token block.

    Args:
      slots, tiling: the static parameters.
      k_ref, v_ref: VMEM, [tokens, K*H] or [tokens, K, H].
      slots_ref: VMEM words, [tokens, words, C].
      transpose_ref: VMEM words of `scratch_shape`, zeroed once if `slots.has_padding`.
      num_tokens: int32; rounded up to whole iterations.
      scales: None, or `scales(which, head)`, the float32 inverse scale of K (0) or V (1).
    """
    tile, per_iteration = tiling.tile, tiling.tiles_per_iteration

    def store_heads(u: int, first: jax.Array) -> None:
        """Stores the words of tile u, which are rows of one head each, in the scratch."""
        tokens = pl.ds(first, tile)
        if tiling.transposed == "packed_rows":
            words = _packed_row_words(slots, k_ref, v_ref, tokens)
        else:
            load_k = functools.partial(load_lanes, slots, k_ref, tokens)
            load_v = functools.partial(load_lanes, slots, v_ref, tokens)
            words = row_words(slots, load_k, load_v, scales)
        _store_words(slots, tiling, transpose_ref, u, words)

    def make_slots(first_tile: jax.Array, num_tiles: int) -> None:
        """Makes the slots of `num_tiles` tiles. The stores of a tile go ahead of the loads of the
        one before it, so that no load waits for the stores of its own tile."""
        firsts = [pl.multiple_of((first_tile + u) * tile, tile) for u in range(num_tiles)]
        if tiling.transposed == "nothing":
            _combine_rows(slots, k_ref, v_ref, slots_ref, pl.ds(firsts[0], num_tiles * tile))
            return
        for u in range(num_tiles + 1):
            if u < num_tiles:
                store_heads(u, firsts[u])
            if u:
                _load_slots(slots, tiling, transpose_ref, slots_ref, u - 1, firsts[u - 1])

    # Whole iterations, the last one pulled back where it would leave the buffer: a few tiles are
    # made in vain or twice, which costs less than a second loop with shorter iterations.
    last_start = slots_ref.shape[0] // tile - per_iteration

    @pl.loop(0, pl.cdiv(num_tokens, tile * per_iteration))
    def _make(i: jax.Array) -> None:
        make_slots(jnp.minimum(i * per_iteration, last_start), per_iteration)


def _region(slots: Slots, tiling: Tiling, u: int, lane_tile: int) -> int:
    """The scratch row where a lane tile of tile u begins."""
    lane_tiles = slots.num_lanes // layout.LANES
    return (u % _REGIONS * lane_tiles + lane_tile) * slots.num_words * tiling.pitch


def _store_words(
    slots: Slots,
    tiling: Tiling,
    transpose_ref: Ref,
    u: int,
    words: list[list[jax.Array | None]],
) -> None:
    """Stores the words of tile u, `[word row][lane tile]`, in the scratch."""
    for w, lane_tiles in enumerate(words):
        for c, word in enumerate(lane_tiles):
            if word is None:
                continue
            if transpose_ref.dtype == jnp.float32:
                word = lax.bitcast_convert_type(word, jnp.float32)
            row = _region(slots, tiling, u, c) + w * tiling.pitch
            transpose_ref[pl.ds(row, tiling.tile), :] = word


def _load_slots(
    slots: Slots, tiling: Tiling, transpose_ref: Ref, slots_ref: Ref, u: int, first: jax.Array
) -> None:
    """Loads the words of tile u from the scratch as slots of one token each."""
    for j in range(tiling.tile):
        # Packed words have the even tokens of the tile before the odd ones.
        is_packed = tiling.transposed == "packed_rows"
        row = j // 2 + j % 2 * (tiling.tile // 2) if is_packed else j
        for c in range(slots.num_lanes // layout.LANES):
            start = _region(slots, tiling, u, c) + row
            words = transpose_ref[pl.ds(start, slots.num_words, stride=tiling.pitch), :]
            slots_ref[first + j, :, pl.ds(c * layout.LANES, layout.LANES)] = words


def _combine_rows(slots: Slots, k_ref: Ref, v_ref: Ref, slots_ref: Ref, tokens: Tokens) -> None:
    """Makes slots of bf16 k and v that hold their heads in the rows that the slots' words have."""
    k, v = (
        lax.bitcast_convert_type(ref[tokens].astype(jnp.float32), jnp.uint32)
        for ref in (k_ref, v_ref)
    )
    high = jnp.uint32(0xFFFF0000)
    slots_ref[tokens, pl.ds(0, slots.num_kv_heads)] = (k >> 16) | (v & high)


def _packed_row_words(
    slots: Slots, k_ref: Ref, v_ref: Ref, tokens: Tokens
) -> list[list[jax.Array | None]]:
    """`row_words` of bf16 k and v for a bf16 pool, the even tokens before the odd ones."""
    low = jnp.uint32(0xFFFF)
    lane_tiles = slots.num_lanes // layout.LANES

    def words(head: int, lane_tile: int) -> jax.Array:
        lanes = pl.ds((head * lane_tiles + lane_tile) * layout.LANES, layout.LANES)
        k = pltpu.bitcast(k_ref[tokens, lanes], jnp.uint32)  # [n // 2, 128], pairs of tokens
        v = pltpu.bitcast(v_ref[tokens, lanes], jnp.uint32)
        return jnp.concatenate([(k & low) | (v << 16), (k >> 16) | (v & ~low)], axis=0)

    used: list[list[jax.Array | None]] = [
        [words(h, c) for c in range(lane_tiles)] for h in range(slots.num_kv_heads)
    ]
    return used + [[None] * lane_tiles] * (slots.num_words - slots.num_kv_heads)


def load_lanes(
    slots: Slots, ref: Ref, tokens: Tokens, first_lane: int, num_lanes: int, head: int
) -> jax.Array:
    """float32[n, 128]: lanes `first_lane .. + num_lanes` of a head, then zeros."""
    if not slots.is_flat:
        x = ref[tokens, head, pl.ds(first_lane, num_lanes)].astype(jnp.float32)
        return _pad_lanes(x)
    start = head * slots.head_dim + first_lane
    base, shift = start // layout.LANES * layout.LANES, start % layout.LANES
    width = ref.shape[1]

    def tile_at(lane: int) -> jax.Array:
        return _pad_lanes(ref[tokens, lane : min(lane + layout.LANES, width)].astype(jnp.float32))

    x = tile_at(base)
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if shift:
        x = pltpu.roll(x, layout.LANES - shift, 1)
    if shift + num_lanes > layout.LANES:
        rest = pltpu.roll(tile_at(base + layout.LANES), layout.LANES - shift, 1)
        x = jnp.where(lane < layout.LANES - shift, x, rest)
    return x if num_lanes == layout.LANES else jnp.where(lane < num_lanes, x, 0.0)


def _pad_lanes(x: jax.Array) -> jax.Array:
    missing = layout.LANES - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing))) if missing else x


def row_words(
    slots: Slots, load_k: LoadLanes, load_v: LoadLanes, scales: Scales | None
) -> list[list[jax.Array | None]]:
    """The words of n tokens: `[word row][lane tile]` of uint32[n, 128], None for padding.

    Args:
      slots: the static parameters.
      load_k, load_v: `load(first_lane, num_lanes, head)` gives float32[n, 128], the lanes of one
        head from `first_lane` moved to lane 0 and zeros after `num_lanes`.
      scales: None, or `scales(which, head)`, the float32 inverse scale of K (0) or V (1).
    """

    def codes(which: int, head: int, first_lane: int, num_lanes: int) -> jax.Array:
        x = (load_k, load_v)[which](first_lane, num_lanes, head)
        if scales is not None:
            x = x * scales(which, head)
        return quantize(x, slots.pool_dtype)

    def row(r: int, lane_tile: int) -> jax.Array | None:
        """Pool row r, one tile of 128 lanes, as codes in 32 bits; None is a row of zeros."""
        if r >= layout.num_rows_used(slots.num_kv_heads, slots.head_dim):
            return None
        if layout.packs_kv_in_row(slots.head_dim):
            k = codes(0, r, 0, slots.head_dim)
            v = codes(1, r, 0, slots.head_dim)
            return k | _roll(v, layout.HALF_LANES)
        first = lane_tile * layout.LANES
        return codes(r % 2, r // 2, first, min(slots.head_dim - first, layout.LANES))

    num_tiles = slots.num_lanes // layout.LANES
    per_word = slots.rows_per_word
    return [
        [
            _pack([row(w * per_word + i, tile) for i in range(per_word)], slots.pool_dtype)
            for tile in range(num_tiles)
        ]
        for w in range(slots.num_words)
    ]


def _roll(codes: jax.Array, shift: int) -> jax.Array:
    """Rolls the lanes of uint32 codes (the rotate unit takes int32)."""
    rolled = pltpu.roll(lax.bitcast_convert_type(codes, jnp.int32), shift, 1)
    return lax.bitcast_convert_type(rolled, jnp.uint32)


def _pack(rows: list[jax.Array | None], dtype: jnp.dtype) -> jax.Array | None:
    """Words of multiple rows of codes, the first row in the low bits; None if all are padding."""
    bits = 8 * dtype.itemsize
    word = None
    for i, row in enumerate(rows):
        if row is None:
            continue
        row = row << (bits * i) if i else row
        word = row if word is None else word | row
    return word
