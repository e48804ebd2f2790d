# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""From the page table and the lengths of a batch to what the writes take, in jittable jax.numpy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_paged import checks, forms, scalars, settings


class WriteIndices(NamedTuple):
    """The writes of one batch. All arrays are int32, and their entries are in token order.

    There are two ways to write the batch: whole pages by `page_ids` and `token_starts` and the rest
    by `slices` and `num_slices`, or all tokens by `slots`.
    """

    page_ids: jax.Array  # [T // page_size], -1 after the last whole page
    token_starts: jax.Array  # [T // page_size], -1 after the last whole page
    slices: jax.Array  # [3, 2*S], rows: first slot, first token, length
    num_slices: jax.Array  # [1]
    slots: jax.Array  # [T], -1 where the token belongs to no sequence


def write_indices(
    page_indices: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    page_size: int,
    *,
    num_tokens: int,
) -> WriteIndices:
    """Finds where the new tokens of a ragged batch go, as whole pages, slices and slots.

    The new tokens of sequence s are tokens `cu_q_lens[s]` up to `cu_q_lens[s + 1]` of the packed
    batch, and they are the last of its `kv_lens[s]` tokens. A page that they cover whole becomes an
    entry of `page_ids`; the rest of them becomes slices, at most one at either end. The function is
    jittable: call it once per step and reuse the result in every layer.

    Args:
      page_indices: int32[S, M] or int32[S * M], the page table, one row per sequence. Entry m of a
        row is the page that holds the `page_size` positions from `m * page_size` on.
      kv_lens: int32[S], tokens of each sequence, the new ones included.
      cu_q_lens: int32[S + 1], prefix sums of the numbers of new tokens.
      num_seqs: int32[1], int32[] or an int, how many of the S rows are sequences.
      page_size: tokens in a page.
      num_tokens: T, the static length of the packed batch.

    Returns:
      WriteIndices, a tuple `(page_ids, token_starts, slices, num_slices, slots)`.

    Raises:
      ValueError: an argument has the wrong form; the message says which and what was wanted.

    A sequence has 3 tokens and gets 6 more, with pages of 4 tokens. One new token ends page 7, four
    fill page 2, and one begins page 5:

    >>> w = write_indices(jnp.array([[7, 2, 5]], jnp.int32), jnp.array([9], jnp.int32),
    ...                   jnp.array([0, 6], jnp.int32), jnp.array([1], jnp.int32), 4, num_tokens=6)
    >>> w.page_ids.tolist(), w.token_starts.tolist()
    ([2], [1])
    >>> w.slices[:, : w.num_slices[0]].T.tolist()  # (first slot, first token, length)
    [[31, 0, 1], [20, 5, 1]]
    >>> w.slots.tolist()
    [31, 8, 9, 10, 11, 20]
    """
    op = "write_indices"
    kv_lens, page_indices, cu_q_lens, num_seqs = forms.require_batch(
        op, kv_lens, page_indices, cu_q_lens, num_seqs
    )
    page_size = _static_int(op, "page_size", page_size, 1)
    num_tokens = _static_int(op, "num_tokens", num_tokens, 0)

    with settings.defaults():
        return _write_indices(
            jnp.asarray(page_indices),
            jnp.asarray(kv_lens),
            jnp.asarray(cu_q_lens),
            jnp.asarray(num_seqs),
            page_size,
            num_tokens,
        )


def _write_indices(
    page_indices: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    page_size: int,
    num_tokens: int,
) -> WriteIndices:
    max_seqs, table_width = page_indices.shape
    # Absurd lengths must not give a slot of another sequence: each one is confined to the batch
    # and to its row of the table.
    is_seq = jnp.arange(max_seqs) < num_seqs[0]
    q_start = jnp.clip(cu_q_lens[:-1], 0, num_tokens)
    q_end = jnp.clip(cu_q_lens[1:], q_start, num_tokens)
    # Rows from num_seqs on may hold anything, often zeros. Their ends must not come before any
    # token, where the search below would count them.
    q_end = jnp.where(is_seq, q_end, num_tokens)
    # At most as many whole pages as have int32 positions, so that no page's edge overflows.
    kv_len = jnp.clip(kv_lens, 0, min(table_width, (2**31 - 1) // page_size) * page_size)
    q_len = jnp.where(is_seq & (kv_lens == kv_len), jnp.minimum(q_end - q_start, kv_len), 0)
    # The last row is the last token, as for the attention, also where there are more rows.
    q_start = jnp.where(is_seq, q_end - q_len, q_start)
    start = kv_len - q_len  # first new position, [S]

    first_page = -(-start // page_size)
    last_page = kv_len // page_size
    num_whole = jnp.maximum(last_page - first_page, 0)  # [S]
    seq, nth = _ragged(num_whole, num_tokens // page_size)
    page = first_page[seq] + nth
    token_start = q_start[seq] + page * page_size - start[seq]
    page_ids = jnp.where(nth >= 0, _page(page_indices, seq, page), -1)
    token_starts = jnp.where(nth >= 0, token_start, -1)

    # The rest is at most one slice before the first page edge and one after the last.
    head_end = jnp.minimum(first_page * page_size, kv_len)
    tail_start = jnp.maximum(last_page * page_size, head_end)
    position = jnp.stack([start, tail_start], axis=1).reshape(-1)  # [2*S]
    length = jnp.stack([head_end, kv_len], axis=1).reshape(-1) - position
    row = jnp.repeat(jnp.arange(max_seqs), 2)
    slot = _slot(page_indices, row, position, page_size)
    token = q_start[row] + position - start[row]
    order = jnp.argsort(length <= 0, stable=True)  # the empty ones last
    slices = jnp.stack([slot, token, length])[:, order].astype(jnp.int32)
    num_slices = jnp.sum(length > 0, dtype=jnp.int32)[None]

    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.minimum(_num_up_to(q_end, tokens), max_seqs - 1)
    nth = tokens - q_start[seq]
    is_new = (nth >= 0) & (nth < q_len[seq])
    slots = jnp.where(is_new, _slot(page_indices, seq, start[seq] + nth, page_size), -1)
    return WriteIndices(page_ids, token_starts, slices, num_slices, slots)


def _static_int(op: str, argument: str, x: Any, least: int) -> int:
    value = scalars.read_int(x)
    checks.require(
        value is not None and least <= value < 2**31,
        op,
        argument,
        got=scalars.show(x),
        wanted=f"a Python int >= {least} and below 2**31",
        hint="it sets the result's static shapes",
    )
    return value or 0


def _ragged(counts: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Which group each of `capacity` entries is in, and its index there, -1 after the last group.

    Group g has `counts[g]` entries, one group after the other.
    """
    ends = jnp.cumsum(counts)
    entry = jnp.arange(capacity, dtype=jnp.int32)
    group = jnp.minimum(_num_up_to(ends, entry), counts.shape[0] - 1)
    nth = entry - (ends[group] - counts[group])
    return group, jnp.where(entry < ends[-1], nth, -1)


def _num_up_to(ends: jax.Array, x: jax.Array) -> jax.Array:
    """How many of the rising `ends` are at most x.

    All are compared, because a binary search would be a loop, and on a GPU each of its steps is a
    kernel or two.
    """
    return jnp.searchsorted(ends, x, side="right", method="compare_all")


def _page(page_indices: jax.Array, seq: jax.Array, page: jax.Array) -> jax.Array:
    """The page id in the table, -1 past the end of the row."""
    return page_indices.at[seq, page].get(mode="fill", fill_value=-1)


def _slot(
    page_indices: jax.Array, seq: jax.Array, position: jax.Array, page_size: int
) -> jax.Array:
    """The slot of a position, -1 where the page id is negative or its slots would overflow."""
    page = _page(page_indices, seq, position // page_size)
    is_page = (page >= 0) & (page <= 2**31 // page_size - 1)
    return jnp.where(is_page, jnp.where(is_page, page, 0) * page_size + position % page_size, -1)
