# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""New k and v to pool rows in registers: convert or quantise, pack to 32-bit words, turn.

A register tile of k, as a projection leaves it, holds one head of many tokens; a pool slot holds
all heads of one token. Rows of a slot are packed into 32-bit words (bf16 K and V of a head are the
low and the high half of one), and the words turn from head-major to token-major through a small
scratch: whole tiles in, strided loads out, so that nothing is shuffled in registers.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import layout


@dataclasses.dataclass(frozen=True)
class Slots:
    """What the interleaving needs to know of k, v and the pool; all static."""

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


# Tiles that lie in the scratch at a time: one is stored while the one before it is loaded.
_REGIONS = 2

Turns = Literal["rows", "packed", "nothing"]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How many tokens the turn from rows of heads to slots takes at a time.

    Attributes:
      tile: tokens in a register tile of k and v.
      unroll: tiles in one loop body, so that their latencies overlap.
      turns: what goes through the scratch. "rows" of any k and v; "packed" ones of bf16 k and v,
        which go from pairs of tokens to pairs of K and V without a detour over float32; "nothing"
        where bf16 k and v are [tokens, K, H] and so have their heads in the rows already.
    """

    tile: int
    unroll: int
    turns: Turns

    @property
    def pitch(self) -> int:
        """Scratch rows from one word row's tile to the next: not a multiple of 8, because loads
        with such a stride hit one memory bank and take twice as long."""
        return self.tile + 4


def tiling(slots: Slots, new_dtype: jnp.dtype, num_tokens: int, packed: bool) -> Tiling:
    """For windows of `num_tokens`: as few bodies as will do, of at most 8 tiles, all alike."""
    tile = 32 // jnp.dtype(new_dtype).itemsize
    registers = slots.num_words * slots.num_lanes // layout.LANES
    whole_bf16 = (
        slots.pool_dtype == new_dtype == jnp.bfloat16 and slots.head_dim % layout.LANES == 0
    )
    turns: Turns = "rows"
    if whole_bf16 and not slots.is_flat:
        turns = "nothing"
    elif whole_bf16 and packed:
        turns = "packed"
    num_tiles = -(-num_tokens // tile)
    num_bodies = -(-num_tiles // max(1, min(8, 64 // registers)))
    return Tiling(tile=tile, unroll=-(-num_tiles // num_bodies), turns=turns)


def scratch_shape(slots: Slots, tiling: Tiling) -> tuple[int, int]:
    """Shape of the words' scratch, [rows, 128]."""
    lane_tiles = slots.num_lanes // layout.LANES
    return _REGIONS * lane_tiles * slots.num_words * tiling.pitch, layout.LANES


def interleave(slots, tiling, k_ref, v_ref, rows_ref, turn_ref, *, num_tokens, scales):
    """Fills the pool rows of at least the first `num_tokens` tokens of a window.

    Args:
      slots, tiling: the static description.
      k_ref, v_ref: VMEM, [tokens, K*H] or [tokens, K, H].
      rows_ref: VMEM words, [tokens, words, C].
      turn_ref: VMEM words of `scratch_shape`, zeroed once if `slots.has_padding`.
      num_tokens: int32; rounded up to whole tiles.
      scales: None, or `scales(which, head)`, the float32 inverse scale of K (0) or V (1).
    """
    tile, pitch = tiling.tile, tiling.pitch
    lane_tiles = slots.num_lanes // layout.LANES

    def region(u, c):
        """Scratch row where lane tile c of tile u begins."""
        return (u % _REGIONS * lane_tiles + c) * slots.num_words * pitch

    def put_heads(u, first):
        """The words of one tile, as rows of a head each."""
        tokens = pl.ds(first, tile)
        if tiling.turns == "packed":
            head_words = _paired_words(slots, k_ref, v_ref, tokens)
        else:
            load_k = functools.partial(load_lanes, slots, k_ref, tokens)
            load_v = functools.partial(load_lanes, slots, v_ref, tokens)
            head_words = row_words(slots, load_k, load_v, scales)
        for w, words in enumerate(head_words):
            for c, word in enumerate(words):
                if word is None:
                    continue
                if rows_ref.dtype == jnp.float32:
                    word = lax.bitcast_convert_type(word, jnp.float32)
                turn_ref[pl.ds(region(u, c) + w * pitch, tile), :] = word

    def place(j):
        """Where token j of a tile is among its words: packed, the even ones come first."""
        return j // 2 + j % 2 * (tile // 2) if tiling.turns == "packed" else j

    def take_tokens(u, first):
        """The same words, as slots of a token each."""
        for j in range(tile):
            for c in range(lane_tiles):
                words = turn_ref[pl.ds(region(u, c) + place(j), slots.num_words, stride=pitch), :]
                rows_ref[first + j, :, pl.ds(c * layout.LANES, layout.LANES)] = words

    def pair(first, num_tokens):
        """Tokens whose k and v hold their heads as the slot's words do."""
        tokens = pl.ds(first, num_tokens)
        k, v = (
            lax.bitcast_convert_type(ref[tokens].astype(jnp.float32), jnp.uint32)
            for ref in (k_ref, v_ref)
        )
        high = jnp.uint32(0xFFFF0000)
        rows_ref[tokens, pl.ds(0, slots.num_kv_heads)] = (k >> 16) | (v & high)

    def fill(first_tile, num_tiles):
        """`num_tiles` tiles, turned one ahead, so that none waits for its own stores."""
        firsts = [pl.multiple_of((first_tile + u) * tile, tile) for u in range(num_tiles)]
        if tiling.turns == "nothing":
            pair(firsts[0], num_tiles * tile)
            return
        for u in range(num_tiles + 1):
            if u < num_tiles:
                put_heads(u, firsts[u])
            if u:
                take_tokens(u - 1, firsts[u - 1])

    # Whole bodies, the last one pulled back where it would leave the buffer: a few tiles are done
    # for nothing or twice, which costs less than a second, shorter body.
    behind = rows_ref.shape[0] // tile - tiling.unroll

    @pl.loop(0, pl.cdiv(num_tokens, tile * tiling.unroll))
    def _fill(i):
        fill(jnp.minimum(i * tiling.unroll, behind), tiling.unroll)


def _paired_words(slots, k_ref, v_ref, tokens):
    """`row_words` of bf16 k and v for a bf16 pool, the even tokens before the odd ones."""
    low = jnp.uint32(0xFFFF)
    lane_tiles = slots.num_lanes // layout.LANES

    def words(head, lane_tile):
        lanes = pl.ds((head * lane_tiles + lane_tile) * layout.LANES, layout.LANES)
        k = pltpu.bitcast(k_ref[tokens, lanes], jnp.uint32)  # [n // 2, 128], pairs of tokens
        v = pltpu.bitcast(v_ref[tokens, lanes], jnp.uint32)
        return jnp.concatenate([(k & low) | (v << 16), (k >> 16) | (v & ~low)], axis=0)

    used = [[words(h, c) for c in range(lane_tiles)] for h in range(slots.num_kv_heads)]
    return used + [[None] * lane_tiles] * (slots.num_words - slots.num_kv_heads)


def load_lanes(slots, ref, tokens, first_lane, num_lanes, head):
    """float32[n, 128]: lanes `first_lane .. + num_lanes` of a head, zeros behind them."""
    if not slots.is_flat:
        x = ref[tokens, head, pl.ds(first_lane, num_lanes)].astype(jnp.float32)
        return _pad_lanes(x)
    start = head * slots.head_dim + first_lane
    base, shift = start // layout.LANES * layout.LANES, start % layout.LANES
    width = ref.shape[1]

    def tile_at(lane):
        return _pad_lanes(ref[tokens, lane : min(lane + layout.LANES, width)].astype(jnp.float32))

    x = tile_at(base)
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if shift:
        x = pltpu.roll(x, layout.LANES - shift, 1)
    if shift + num_lanes > layout.LANES:
        rest = pltpu.roll(tile_at(base + layout.LANES), layout.LANES - shift, 1)
        x = jnp.where(lane < layout.LANES - shift, x, rest)
    return x if num_lanes == layout.LANES else jnp.where(lane < num_lanes, x, 0.0)


def _pad_lanes(x):
    missing = layout.LANES - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing))) if missing else x


def row_words(slots: Slots, load_k, load_v, scales) -> list[list[jax.Array]]:
    """The words of a block of tokens: `[word row][lane tile]` of uint32[n, 128].

    Args:
      slots: the static description.
      load_k, load_v: `load(first_lane, num_lanes, head)` gives float32[n, 128], the lanes of one
        head from `first_lane` moved to lane 0 and zeros after `num_lanes`.
      scales: None, or `scales(which, head)`, the float32 inverse scale of K (0) or V (1).
    """

    def codes(which, head, first_lane, num_lanes):
        x = (load_k, load_v)[which](first_lane, num_lanes, head)
        if scales is not None:
            x = x * scales(which, head)
        return encode(x, slots.pool_dtype)

    def row(r, lane_tile):
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


def _roll(codes, shift):
    """Rolls lanes of uint32 codes (the rotate unit takes int32)."""
    rolled = pltpu.roll(lax.bitcast_convert_type(codes, jnp.int32), shift, 1)
    return lax.bitcast_convert_type(rolled, jnp.uint32)


def _pack(rows, dtype):
    """Words of several rows of codes, the first row in the low bits; None if all are padding."""
    bits = 8 * dtype.itemsize
    word = None
    for i, row in enumerate(rows):
        if row is None:
            continue
        row = row << (bits * i) if i else row
        word = row if word is None else word | row
    return word


def encode(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 values as the pool's bit patterns in the low bits of uint32 (oracle.quantize)."""
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.uint32)
    if dtype == jnp.bfloat16:
        rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
        return lax.bitcast_convert_type(rounded, jnp.uint32) >> 16
    if dtype == jnp.int8:
        return _encode_int8(x)
    return _encode_fp8(x, dtype)


def _encode_int8(x):
    y = jnp.where(x != x, 0.0, jnp.clip(x, -128.0, 127.0))
    # Adding 1.5 * 2**23 leaves the integer, rounded half to even, in the low mantissa bits.
    magic = jnp.float32(3 << 22)
    return lax.bitcast_convert_type(y + magic, jnp.uint32) & 0xFF


def _encode_fp8(x, dtype):
    """Round to nearest even in integers: the same bits on every generation and on a CPU."""
    info = jnp.finfo(dtype)
    num_mantissa, min_exponent = info.nmant, int(info.minexp)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    largest = lax.bitcast_convert_type(jnp.float32(info.max), jnp.uint32)
    clipped = jnp.minimum(magnitude, largest)  # infinities too; NaN is put back below
    # Normal range: rebias the exponent, then round away the surplus mantissa bits.
    shift = 23 - num_mantissa
    rebias = (127 + min_exponent - 1) << 23
    odd = (clipped >> shift) & 1
    normal = (clipped - rebias + ((1 << (shift - 1)) - 1) + odd) >> shift
    # Subnormals: adding this power of two makes the float32 adder round at their spacing.
    magic = jnp.float32(2.0 ** (min_exponent - num_mantissa + 23))
    magic_bits = lax.bitcast_convert_type(magic, jnp.uint32)
    value = lax.bitcast_convert_type(clipped, jnp.float32)
    subnormal = lax.bitcast_convert_type(value + magic, jnp.uint32) - magic_bits
    smallest_normal = (127 + min_exponent) << 23
    code = jnp.where(clipped < smallest_normal, subnormal, normal)
    nan_code = 0x7F if dtype == jnp.float8_e4m3fn else 0x7E
    return sign | jnp.where(magnitude > 0x7F800000, nan_code, code)
