# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The kernel's state: the int32 scalars in SMEM that one loop iteration leaves for the next."""

from typing import Any

# Kinds of q tiles.
NO_Q_TILE, DECODES, PREFILL = 0, 1, 2


class _Int32:
    """A scalar of the state, which is read and written like an attribute."""

    index: int

    def __set_name__(self, owner: "type[State]", name: str) -> None:
        self.index = owner.SIZE
        owner.SIZE += 1

    def __get__(self, state: "State", owner: "type[State]") -> Any:
        return state.ref[self.index]

    def __set__(self, state: "State", value: Any) -> None:
        state.ref[self.index] = value


class _Pair:
    """Two scalars of the state, an attribute with an index that may be traced."""

    index: int

    def __set_name__(self, owner: "type[State]", name: str) -> None:
        self.index = owner.SIZE
        owner.SIZE += 2

    def __get__(self, state: "State", owner: "type[State]") -> "_PairOf":
        return _PairOf(state.ref, self.index)


class _PairOf:
    """The two scalars of one state."""

    def __init__(self, ref: Any, index: int) -> None:
        self._ref, self._index = ref, index

    def __getitem__(self, i: Any) -> Any:
        return self._ref[self._index + i]

    def __setitem__(self, i: Any, value: Any) -> None:
        self._ref[self._index + i] = value


class State:
    """The scalars by name. Each has one module that writes it; all modules may read it.

    All are 0 at the start; `kernel` then sets the row where the search begins.
    """

    SIZE = 0  # int32 scalars; counted as the fields below are defined
    __slots__ = ("ref",)

    # Written by work_items: where the search for the next work item goes on.
    search_seq = _Int32()  # the sequence
    search_row = _Int32()  # and the row of the batch; its first value is the kernel's
    # Written by kv_fetch, of the work item whose KV blocks are being fetched.
    fetch_chunk = _Int32()  # the next chunk in the pool
    fetch_end = _Int32()  # the chunk after its last one in the pool
    fetch_blocks = _Int32()  # KV blocks left, those of new tokens included; only if the call writes
    # Counted since the start of the kernel.
    num_fetched = _Int32()  # KV blocks whose fetch was started; written by kv_fetch
    num_taken = _Int32()  # KV blocks that were computed with; written by kv_blocks
    num_found = _Int32()  # work items; written by work_items
    # Written by q_tiles, but for `q_tile_end`: the open q tile.
    q_tile_row = _Int32()  # its first row in the batch
    q_tile_start = _Int32()  # the first row that a work item has in it
    q_tile_end = _Int32()  # the row after the last one; written by decode_ and prefill_iteration
    q_tile_kind = _Int32()  # NO_Q_TILE, DECODES or PREFILL
    # Written by q_tiles: the output.
    rows_sent = _Int32()  # rows of the output that are in HBM or on their way there
    out_stage = _Int32()  # which of the two buffers the open q tile's output is in, 0 or 1
    rows_in_flight = _Int32()  # rows of the other buffer that are on their way
    # Written by new_kv.
    tokens_in_flight = _Int32()  # new tokens on their way to the pool
    # Written by page_table: of the two parts of a streamed page table that are in SMEM,
    table_part = _Pair()  # their numbers
    table_in_flight = _Pair()  # and whether they are still on their way, 0 or 1

    def __init__(self, ref: Any) -> None:
        self.ref = ref  # int32[SIZE], SMEM

    def clear(self) -> None:
        """Sets all to 0."""
        for i in range(self.SIZE):
            self.ref[i] = 0
