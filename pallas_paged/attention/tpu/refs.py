# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the parts of the TPU attention share: its static side, its refs, and its state in SMEM."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_paged import layout
from pallas_paged.attention.tpu.operands import Heads
from pallas_paged.attention.tpu.scores import Score
from pallas_paged.kv_write.tpu.interleave import Slots

# Rows of q and of the output that a DMA's offset and size are multiples of: a bfloat16 tile.
ROW_TILE = 16
# A window's first tile may have rows of the sequence before: so many rows lie before new tokens.
LEAD = ROW_TILE

# Lengths that the kernel takes at their word; longer ones are absurd.
MAX_LEN = 2**30
# Keys of a body from which on it takes full blocks of two decodes.
_LONG_BODY = 8192

# Places in the walk's state, int32 in SMEM.
(
    AHEAD_SEQ,  # where the search for the next unit goes on: sequence
    AHEAD_ROW,  # and row
    AHEAD_PIECE,  # of the unit that is being fetched: the next of its pieces in the pool,
    AHEAD_END,  # their end,
    AHEAD_BLOCKS,  # and its blocks that are still to come, where new tokens are written
    FETCHED,  # blocks fetched
    TAKEN,  # and taken since the start
    FOUND,  # units found since the start
    WINDOW,  # first row of the open window
    WINDOW_ROW,  # first row that a unit has in it
    WINDOW_END,  # where the last unit in it ended
    WINDOW_KIND,  # NO_WINDOW, DECODES or PREFILL
    DONE,  # rows of the output that are written, or on their way
    PARITY,  # which output buffer the open window leaves through
    LEAVING,  # rows of the window before it that are on their way
    SENT,  # new tokens on their way to the pool
    TABLE_HELD,  # two parts of a streamed page table: which they are
    _,
    TABLE_COMING,  # and whether they are still on their way
    _,
) = range(20)
STATE_SIZE = 20
NO_WINDOW, DECODES, PREFILL = 0, 1, 2


class Unit(NamedTuple):
    """The rows of one sequence that are computed together; int32 scalars, kept in SMEM.

    Attributes:
      seq, row, end: its sequence and rows.
      position: of its first row in its sequence.
      first_piece: of the keys that it sees.
      key_end: position of the first key that it does not see.
      num_blocks: blocks of keys that it takes.
      is_decode: whether it is all of its sequence's rows and one row, as 0 or 1.
      old_end, num_pool_blocks, first_new: where new tokens are written: the piece from which on
        keys come from VMEM, the blocks before it, and the first block behind it with a key to see.
    """

    seq: Any
    row: Any
    end: Any
    position: Any
    first_piece: Any
    key_end: Any
    num_blocks: Any
    is_decode: Any
    old_end: Any = None
    num_pool_blocks: Any = None
    first_new: Any = None


# Of a unit's fields those that only a prefill has whose new tokens are written.
OF_NEW_TOKENS = Unit._fields[-3:]


@dataclasses.dataclass(frozen=True)
class Walk:
    """The kernel's static side."""

    heads: Heads
    score: Score
    num_tokens: int  # T, whole row tiles
    max_seqs: int  # S
    table_width: int  # M
    num_pages: int  # P
    page_size: int
    piece: int  # tokens of a page that one DMA brings: a page, or an equal part of it
    block: int  # tokens of a buffer: whole register tiles
    ring: int  # buffers
    kv_blocks_per_iteration: int  # blocks that a long decode takes at a time
    window: int  # rows of a window
    new: Slots | None  # of the new k and v that the call writes; None if it only reads
    mask_dtype: jnp.dtype  # as what a prefill's weights are masked
    table_part: int  # entries of a streamed page table that come at a time; 0 if all are there
    is_interpreted: bool

    @property
    def writes(self) -> bool:
        """Whether the call writes new tokens."""
        return self.new is not None

    @property
    def pieces_per_block(self) -> int:
        """Pieces that a buffer has room for."""
        return self.block // self.piece

    @property
    def pieces_per_page(self) -> int:
        """Pieces of a page."""
        return self.page_size // self.piece

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's row of the page table has room for."""
        return min(self.table_width * self.page_size, MAX_LEN)

    @property
    def max_units(self) -> int:
        """Room for the units that may have been found and not be over: one a block on its way,
        and the one whose blocks are next; a power of 2."""
        return 1 << self.ring.bit_length()

    @property
    def full_parts(self) -> int:
        """Decodes that a body of full blocks may be of, as many blocks of each: two where the body
        is so long that few decodes fill it."""
        is_long = self.kv_blocks_per_iteration * self.block >= _LONG_BODY
        return 2 if is_long and self.kv_blocks_per_iteration % 2 == 0 else 1

    @property
    def kept(self) -> tuple[str, ...]:
        """Fields of a unit that are kept in SMEM; of the others that the call has all are 0."""
        missing: tuple[str, ...] = () if self.new else OF_NEW_TOKENS
        if not self.score.has_window:
            missing += ("first_piece", "first_new")
        return tuple(name for name in Unit._fields if name not in missing)

    @property
    def unit_size(self) -> int:
        """Places for them: a power of 2, so that a shift finds them."""
        return 1 << (len(self.kept) - 1).bit_length()

    @property
    def ring_rows(self) -> int:
        """Rows of the ring, and of the buffer behind it for a block that is taken again."""
        return (self.ring + 1) * self.heads.lane_tiles * self.block

    @property
    def new_rows(self) -> int:
        """Rows behind the ring, for each lane tile: the new tokens of a sequence, of a window."""
        if self.new is None:
            return 0
        return new_rows(self.num_tokens, self.piece, self.block, self.window)


def new_rows(num_tokens: int, piece: int, block: int, window: int) -> int:
    """Rows that the new tokens of a call take in VMEM: whole blocks, and what lies around them."""
    tokens = max(num_tokens + piece - 1, window)
    return LEAD + -(-tokens // block) * block + ROW_TILE


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's refs; None where the call has none."""

    # int32[S], [S*M] in SMEM or (streamed) in HBM, [S + 1], [1]
    kv_lens: Any
    table: Any
    cu_q_lens: Any
    num_seqs: Any
    factors: Any  # float32[1 or 1 + 2K], SMEM: sm_scale, then scales of K and of V
    # inputs and outputs in HBM
    q: Any  # [T, N*C]
    pool: Any  # [P*page_size, R or words, C]
    out: Any  # [T, N*C]
    # scratch
    state: Any  # int32[STATE_SIZE], SMEM
    units: Any  # int32[max_units, unit_size], SMEM
    slots: Any  # uint32 or float32 [ring rows, then new rows, pitch, 1, 128]
    q_vmem: Any  # q's dtype [window, N*C]
    out_vmem: Any  # q's dtype [2, window, N*C]: one being computed, one on its way
    q_heads: Any  # float32[lane tiles * window, row pitch, 1, 128]: heads of decodes
    out_heads: Any
    decode_m: Any  # see decode.attend
    decode_l: Any
    decode_acc: Any
    prefill_shift: Any  # see prefill.attend
    prefill_l: Any
    prefill_acc: Any
    prefill_mask: Any  # uint32[block or block / 2, window]
    ring_sems: Any  # of each buffer
    window_sem: Any
    out_sems: Any  # of the output, of the log-sum-exp
    # of some calls
    window_len: Any = None  # int32[1], SMEM
    sinks: Any = None  # float32[N], SMEM
    sinks_vmem: Any = None  # float32[rows, 128], lanes equal
    inverse_scales: Any = None  # float32[2K], SMEM, of K and of V: what new tokens are times
    lse: Any = None  # float32[T, 128s], HBM
    lse_vmem: Any = None  # float32[2, window, 128s], as out_vmem
    k: Any = None  # [T, K*H] or [T, K, H], HBM
    v: Any = None
    pool_before: Any = None  # the same memory as pool
    k_vmem: Any = None  # [window, K*H] or [window, K, H]
    v_vmem: Any = None
    sent_sem: Any = None
    table_parts: Any = None  # int32[2 * table_part], SMEM
    table_sems: Any = None


def unpack(walk: Walk, arguments: Sequence[Any]) -> Refs:
    """The refs of a call: inputs, outputs and scratch, in the order of the launch."""
    score, has_new = walk.score, walk.new is not None
    is_quantized = has_new and layout.is_quantized(walk.heads.pool_dtype)
    names = [
        "kv_lens table cu_q_lens num_seqs factors",
        "window_len" if score.has_window else "",
        "sinks sinks_vmem" if score.has_sinks else "",
        "inverse_scales" if is_quantized else "",
        "q k v pool_before" if has_new else "q pool",
        "out",
        "lse" if score.return_lse else "",
        "pool" if has_new else "",
        "state units slots q_vmem out_vmem q_heads out_heads decode_m decode_l decode_acc",
        "prefill_shift prefill_l prefill_acc prefill_mask ring_sems window_sem out_sems",
        "lse_vmem" if score.return_lse else "",
        "k_vmem v_vmem sent_sem" if has_new else "",
        "table_parts table_sems" if walk.table_part else "",
    ]
    refs = dict(zip(" ".join(names).split(), arguments, strict=True))
    if refs["pool"].dtype.itemsize < 4:
        refs["pool"] = refs["pool"].bitcast(jnp.uint32)
    return Refs(**refs)


def div(x, n: int):
    """x // n of x >= 0, in one instruction where n is a power of 2."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, jnp.int32(n))


def ceil_div(x, n: int):
    """x / n of x >= 0, rounded up."""
    return div(x + (n - 1), n)


def rem(x, n: int):
    """x % n of x >= 0."""
    return x & (n - 1) if n & (n - 1) == 0 else lax.rem(x, jnp.int32(n))


@dataclasses.dataclass(frozen=True)
class Rows:
    """One row of 128 lanes of each of several tokens, in a ref [tokens, pitch, 1, 128].

    The pitch is odd, so that the stride from token to token meets all memory banks.
    """

    ref: Any
    is_interpreted: bool

    def load(self, first, num_tokens: int, row: int, step: int = 1):
        """[num_tokens, 128]: the row of every `step`-th token from `first` on."""
        if self.is_interpreted:  # it cannot reshape a ref
            num_rows = (num_tokens - 1) * step + 1
            return self.ref[pl.ds(first, num_rows), row, 0, :][::step]
        return self._flat[self._strided(first, num_tokens, row, step), :]

    def store(self, first, row: int, x):
        """Stores x [num_tokens, 128] as the row of the tokens from `first` on."""
        if self.is_interpreted:
            self.ref[pl.ds(first, x.shape[0]), row, 0, :] = x
        else:
            self._flat[self._strided(first, x.shape[0], row, 1), :] = x

    def copy_token(self, target, source, num_rows: int):
        """Copies the first rows of a token to another's place."""
        if self.is_interpreted:
            self.ref[target, :num_rows, 0, :] = self.ref[source, :num_rows, 0, :]
            return
        target, source = (pl.ds(at * self.ref.shape[1], num_rows) for at in (target, source))
        self._flat[target, :] = self._flat[source, :]

    def clear_token(self, target, num_rows: int):
        """Makes the first rows of a token zeros."""
        if self.is_interpreted:
            self.ref[target, :num_rows, 0, :] = jnp.zeros((num_rows, layout.LANES), self.ref.dtype)
            return
        rows = pl.ds(target * self.ref.shape[1], num_rows)
        self._flat[rows, :] = jnp.zeros((num_rows, layout.LANES), self.ref.dtype)

    @property
    def _flat(self):
        return self.ref.reshape(-1, layout.LANES)

    def _strided(self, first, num_tokens, row, step):
        pitch = self.ref.shape[1]
        return pl.ds(first * pitch + row, num_tokens, stride=step * pitch)
