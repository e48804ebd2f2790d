# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""validate: what is right passes, every refusal is a sentence with the first offending index."""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import pallas_paged
from pallas_paged import validate
from tests.kv_write.cases import INT_MAX, INT_MIN

# 8 pages of 4 slots; only the shape is read.
POOL = jax.ShapeDtypeStruct((8, 4, 2, 128), jnp.bfloat16)


def ints(*values):
    return np.array(values, np.int32)


def columns(*entries):
    return np.array(entries, np.int32).T.reshape(3, -1)


# Two sequences of 9 and 6 tokens, of which 6 and 2 are new; then garbage.
BATCH = {
    "num_tokens": 9,
    "page_indices": np.array([[6, 2, 5], [7, 3, INT_MAX], [INT_MIN, 99, -1]], np.int32),
    "kv_lens": ints(9, 6, INT_MAX),
    "cu_q_lens": ints(0, 6, 8, INT_MIN),
    "num_seqs": ints(2),
}


def batch(**changes):
    """BATCH with some arguments replaced; `None` leaves one out."""
    merged = BATCH | changes
    return {name: x for name, x in merged.items() if x is not None}


VALID = {
    "nothing": {},
    "pages": {"num_tokens": 14, "page_ids": ints(3, 0, 7)},
    "pages anywhere": {"num_tokens": 14, "page_ids": ints(3, 0), "token_starts": ints(10, 0)},
    "skipped pages": {
        "num_tokens": 5,
        "page_ids": ints(-1, 2, -1, -1),
        "token_starts": ints(-1, 1, INT_MAX, INT_MIN),
    },
    "implicit pages beyond the batch, skipped": {"num_tokens": 5, "page_ids": ints(1, -1)},
    "slices": {
        "num_tokens": 9,
        "slices": columns((4, 0, 4), (9, 4, 2), (11, 8, 1), (8, 6, 1)),
        "num_slices": ints(4),
    },
    "slices beyond num_slices": {
        "num_tokens": 9,
        "slices": columns((0, 0, 1), (0, 0, 1), (99, -3, 0)),
        "num_slices": ints(1),
    },
    "skipped slices": {
        "num_tokens": 9,
        "slices": columns((-1, 77, -5), (-1, 0, 1), (0, 8, 1)),
        "num_slices": ints(3),
    },
    "no slices": {"slices": columns(), "num_slices": ints(0)},
    "slots": {"slots": ints(31, -1, 0, -1, 5)},
    "no slots": {"slots": []},
    "a page beside slices and slots": {
        "num_tokens": 4,
        "page_ids": ints(2),
        "slices": columns((12, 0, 2)),
        "num_slices": ints(1),
        "slots": ints(14, 15, 7, -1),
    },
    "copies": {"src_ids": ints(1, 1, -1, 4), "dst_ids": ints(2, 3, 1, -1)},
    "device arrays": {"slots": jnp.arange(3), "src_ids": jnp.array([1]), "dst_ids": [2]},
    "a batch": batch(),
    "a batch without a table": batch(page_indices=None),
    "ends alone": batch(page_indices=None, kv_lens=None),
    "lengths alone": batch(page_indices=None, cu_q_lens=None),
    "a table without ends": batch(cu_q_lens=None),
    "no sequences": batch(num_seqs=ints(0)),
    "a call without tokens": {
        "num_tokens": 0,
        "page_ids": ints(-1),
        "slices": columns((-1, 0, 1)),
        "num_slices": ints(1),
        "slots": [],
        "cu_q_lens": ints(0, 0),
        "num_seqs": ints(1),
    },
    "a batch without tokens": batch(num_tokens=0, cu_q_lens=ints(0, 0, 0, 9)),
    "a batch that ends at T": batch(num_tokens=8),
    "a sequence without tokens": batch(kv_lens=ints(9, 0, 6), cu_q_lens=ints(0, 6, 6, 9)),
    "new tokens only": batch(kv_lens=ints(6, 2, 0)),
    "page 0 and the last page": batch(
        page_indices=np.array([[0, 2, 5], [1, 7, 0], [0, 0, 0]]),
    ),
    "the longest length": batch(kv_lens=ints(12, 6, 0)),
    "rows without new tokens use nothing": batch(
        cu_q_lens=ints(0, 0, 2, 0), page_indices=np.array([[99, -1, 5], [7, 3, 0], [0, 0, 0]])
    ),
    "a shared prefix": batch(
        kv_lens=ints(9, 6, 0),
        cu_q_lens=ints(0, 5, 7, 7),
        page_indices=np.array([[6, 2, 5], [6, 3, 2], [0, 0, 0]]),
    ),
    "a prefix that all share": batch(
        page_indices=np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]]),
        kv_lens=ints(9, 9, 12),
        cu_q_lens=ints(0, 1, 2, 6),
        num_seqs=ints(3),
    ),
    "a shared page that only a row without new tokens would read": batch(
        cu_q_lens=ints(0, 6, 6, 0), page_indices=np.array([[6, 2, 5], [5, 2, 0], [0, 0, 0]])
    ),
    "a written page beyond the other's length": batch(
        page_indices=np.array([[6, 2, 5], [7, 3, 5], [0, 0, 0]])
    ),
    "numpy's int64": {"num_tokens": np.int64(9), "page_ids": np.array([3, 0])},
}


@pytest.mark.parametrize("name", VALID)
def test_valid(name):
    validate(POOL, **VALID[name])


# What is wrong, and the sentence's beginning and end around "; wanted".
REFUSALS = [
    # Ids.
    ({"page_ids": ints(1, -1, 8, 9)}, "`page_ids` is 8 at index 2; wanted -1 or a page in [0, 8):"),
    ({"page_ids": ints(1, -2, 9)}, "`page_ids` is -2 at index 1; wanted -1 or a page in [0, 8):"),
    ({"slots": ints(31, -1, 32, 99)}, "`slots` is 32 at index 2; wanted -1 or a slot in [0, 32):"),
    ({"slots": ints(0, INT_MIN)}, "`slots` is -2147483648 at index 1; wanted -1 or a slot in"),
    (
        {"src_ids": ints(1, 8), "dst_ids": ints(2, 9)},
        "`src_ids` is 8 at index 1; wanted -1 or a page in [0, 8):",
    ),
    (
        {"src_ids": ints(1, 3), "dst_ids": ints(-7, 99)},
        "`dst_ids` is -7 at index 0; wanted -1 or a page in [0, 8):",
    ),
    # Sources of pages.
    (
        {"num_tokens": 11, "page_ids": ints(1, -1, 2, 3)},
        "`page_ids` is 2 from token 8 on at index 2; wanted a first token in [0, 7],",
    ),
    (
        {"num_tokens": 11, "page_ids": ints(1, -1, 2), "token_starts": ints(7, 99, 8)},
        "`token_starts` is 8 at index 2; wanted a first token in [0, 7],",
    ),
    (
        {"page_ids": ints(1, 2), "token_starts": ints(7, -1)},
        "`token_starts` is -1 at index 1; wanted a first token in [0, T - page_size],",
    ),
    # Slices.
    (
        {"num_tokens": 9, "slices": columns((0, 0, 1), (32, 0, 1)), "num_slices": ints(2)},
        "`slices` is (slot 32, token 0, length 1) at index 1; wanted -1 or a slot in [0, 32):",
    ),
    (
        {"slices": columns((-1, 0, 0), (0, 0, 0), (-9, 0, 1)), "num_slices": ints(3)},
        "`slices` is (slot 0, token 0, length 0) at index 1; wanted a length of at least 1",
    ),
    (
        {"slices": columns((8, 0, 4), (5, 0, 4)), "num_slices": ints(2)},
        "`slices` is (slot 5, token 0, length 4) at index 1; wanted a length of at least 1 that "
        "ends inside the page of 4 slots:",
    ),
    (
        {"num_tokens": 9, "slices": columns((8, 8, 1), (0, 8, 2)), "num_slices": ints(2)},
        "`slices` is (slot 0, token 8, length 2) at index 1; wanted tokens inside [0, 9):",
    ),
    (
        {"slices": columns((8, -1, 1), (0, 8, 2)), "num_slices": ints(2)},
        "`slices` is (slot 8, token -1, length 1) at index 0; wanted tokens inside the batch:",
    ),
    (
        {"slices": columns((0, 0, 1)), "num_slices": ints(2)},
        "`num_slices` is 2; wanted a count in [0, 1]: there are 1 columns of slices",
    ),
    ({"slices": columns(), "num_slices": ints(-1)}, "`num_slices` is -1; wanted a count in [0, 0]"),
    # Twice.
    (
        {"page_ids": ints(3, -1, -1, 5, 4, 5, 3)},
        "`page_ids` is 5 at index 5, slot 20 (page 5, row 0) once more; wanted no slot that "
        "page_ids at index 3 writes:",
    ),
    (
        {"slots": ints(7, 9, -1, -1, 9, 7)},
        "`slots` is 9 at index 4, slot 9 (page 2, row 1) once more; wanted no slot that slots at "
        "index 1 writes:",
    ),
    (  # A long one over a short one, which its neighbour in order does not touch.
        {"slices": columns((0, 0, 4), (4, 0, 2), (1, 0, 1), (3, 0, 1)), "num_slices": ints(4)},
        "`slices` is 1 at index 2, slot 1 (page 0, row 1) once more; wanted no slot that slices at "
        "index 0 writes:",
    ),
    (
        {"slices": columns((3, 0, 1), (1, 0, 3)), "num_slices": ints(2)},
        "`slices` is 1 at index 1, slot 3 (page 0, row 3) once more; wanted no slot that slices at "
        "index 0 writes:",
    ),
    (
        {"page_ids": ints(2, 1), "slices": columns((0, 0, 1), (7, 0, 1)), "num_slices": ints(2)},
        "`slices` is 7 at index 1, slot 7 (page 1, row 3) once more; wanted no slot that page_ids "
        "at index 1 writes:",
    ),
    (
        {"slots": ints(30, 17), "slices": columns((16, 0, 2)), "num_slices": ints(1)},
        "`slots` is 17 at index 1, slot 17 (page 4, row 1) once more; wanted no slot that slices "
        "at index 0 writes:",
    ),
    (
        {"slots": ints(*[-1] * 3, 14), "page_ids": ints(3)},
        "`slots` is 14 at index 3, slot 14 (page 3, row 2) once more; wanted no slot that page_ids "
        "at index 0 writes:",
    ),
    # Copies.
    (
        {"src_ids": ints(1, -1, 1, 1), "dst_ids": ints(2, 3, 3, 2)},
        "`dst_ids` is 2 at index 3; wanted no page that an earlier pair writes:",
    ),
    (
        {"src_ids": ints(1, 2, 4), "dst_ids": ints(3, 4, 5)},
        "`dst_ids` is 4 at index 1; wanted no page that is also a source:",
    ),
    (
        {"src_ids": ints(1), "dst_ids": ints(1)},
        "`dst_ids` is 1 at index 0; wanted no page that is also a source:",
    ),
    # Batches.
    (batch(num_seqs=ints(4)), "`num_seqs` is 4; wanted a count in [0, 3]: there are 3 rows"),
    (batch(num_seqs=ints(-1)), "`num_seqs` is -1; wanted a count in [0, 3]"),
    (
        batch(cu_q_lens=ints(0, 6, 5, 4), num_seqs=ints(3)),
        "`cu_q_lens` is 5 at index 2, after 6; wanted no less than the one before:",
    ),
    (batch(cu_q_lens=ints(-1, -3, 5, 0)), "`cu_q_lens` is -1 at index 0; wanted at least 0:"),
    (
        batch(cu_q_lens=ints(0, 6, 10, 0)),
        "`cu_q_lens` is 10 at index 2; wanted at most num_tokens, 9:",
    ),
    (batch(kv_lens=ints(9, -1, 0)), "`kv_lens` is -1 at index 1; wanted at least 0:"),
    (batch(kv_lens=ints(13, -1, 0)), "`kv_lens` is 13 at index 0; wanted at most M * page_size,"),
    (
        batch(kv_lens=ints(9, 1, 0)),
        "`kv_lens` is 1 at index 1, whose new tokens are 2; wanted at least the new tokens:",
    ),
    (
        batch(page_indices=np.array([[6, 2, 8], [-1, 3, 0], [0, 0, 0]])),
        "`page_indices` is 8 at index (0, 2); wanted a page in [0, 8):",
    ),
    (
        batch(page_indices=np.array([[6, 2, 5], [-1, 3, 0], [0, 0, 0]])),
        "`page_indices` is -1 at index (1, 0); wanted a page in [0, 8):",
    ),
    (
        batch(cu_q_lens=None, page_indices=np.array([[6, 2, 5], [7, 99, 0], [0, 0, 0]])),
        "`page_indices` is 99 at index (1, 1); wanted a page in [0, 8):",
    ),
    # One page for two sequences: sequence 0 reads its first entry and writes the others, sequence 1
    # reads its first and writes its second.
    (
        batch(page_indices=np.array([[6, 2, 5], [7, 5, 0], [0, 0, 0]])),
        "`page_indices` is 5 at index (1, 1), where sequence 1 writes, and at index (0, 2), where "
        "sequence 0 writes; wanted a page of its own for every sequence's new tokens:",
    ),
    (
        batch(page_indices=np.array([[6, 2, 5], [2, 3, 0], [0, 0, 0]]), kv_lens=ints(9, 7, 0)),
        "`page_indices` is 2 at index (1, 0), where sequence 1 reads, and at index (0, 1), where "
        "sequence 0 writes; wanted a page of its own for every sequence's new tokens:",
    ),
    (
        batch(cu_q_lens=ints(0, 5, 7, 0), page_indices=np.array([[6, 2, 5], [7, 6, 0], [0, 0, 0]])),
        "`page_indices` is 6 at index (1, 1), where sequence 1 writes, and at index (0, 0), where "
        "sequence 0 reads; wanted a page of its own for every sequence's new tokens:",
    ),
    (  # Two may read page 6; the third's first new token lies in its last slot.
        batch(
            page_indices=np.array([[6, 2, 5], [6, 3, 0], [6, 4, 0]]),
            kv_lens=ints(9, 6, 5),
            cu_q_lens=ints(0, 5, 7, 9),
            num_seqs=ints(3),
        ),
        "`page_indices` is 6 at index (2, 0), where sequence 2 writes, and at index (0, 0), where "
        "sequence 0 reads; wanted a page of its own for every sequence's new tokens:",
    ),
    (
        batch(cu_q_lens=ints(0, 5, 7, 0), page_indices=np.array([[6, 2, 6], [7, 3, 0], [0, 0, 0]])),
        "`page_indices` is 6 at index (0, 2), where sequence 0 writes, and at index (0, 0), where "
        "sequence 0 reads; wanted a page of its own for every sequence's new tokens:",
    ),
    (  # What is first in the table is named, whatever is wrong with it.
        batch(page_indices=np.array([[6, 2, 2], [7, 99, 0], [0, 0, 0]])),
        "`page_indices` is 2 at index (0, 2), where sequence 0 writes, and at index (0, 1), where "
        "sequence 0 writes; wanted a page of its own for every sequence's new tokens:",
    ),
    # One beyond a boundary.
    ({"num_tokens": 0, "page_ids": ints(-1, 1)}, "`page_ids` is 1 from token 4 on at index 1;"),
    (
        {"num_tokens": 0, "slices": columns((0, 0, 1)), "num_slices": ints(1)},
        "`slices` is (slot 0, token 0, length 1) at index 0; wanted tokens inside [0, 0):",
    ),
    (batch(num_tokens=0), "`cu_q_lens` is 6 at index 1; wanted at most num_tokens, 0:"),
    (batch(num_tokens=7), "`cu_q_lens` is 8 at index 2; wanted at most num_tokens, 7:"),
    (
        batch(kv_lens=ints(9, 0, 0)),
        "`kv_lens` is 0 at index 1, whose new tokens are 2; wanted at least the new tokens:",
    ),
    (
        batch(kv_lens=ints(5, 2, 0)),
        "`kv_lens` is 5 at index 0, whose new tokens are 6; wanted at least the new tokens:",
    ),
    # Without what they need.
    ({"token_starts": ints(0)}, "`page_ids` is None; wanted an array, because token_starts is"),
    ({"slices": columns()}, "`num_slices` is None; wanted an array, because slices is given"),
    ({"num_slices": ints(0)}, "`slices` is None; wanted an array, because num_slices is given"),
    ({"src_ids": ints(0)}, "`dst_ids` is None; wanted an array, because src_ids is given"),
    ({"dst_ids": ints(0)}, "`src_ids` is None; wanted an array, because dst_ids is given"),
    (batch(kv_lens=None), "`kv_lens` is None; wanted an array, because page_indices is given"),
    (batch(num_seqs=None), "`num_seqs` is None; wanted an array, because page_indices is given"),
    (
        batch(page_indices=None, num_seqs=None),
        "`num_seqs` is None; wanted an array, because kv_lens is given",
    ),
    ({"cu_q_lens": ints(0)}, "`num_seqs` is None; wanted an array, because cu_q_lens is given"),
    ({"num_seqs": ints(0)}, "`num_seqs` is given alone; wanted page_indices, kv_lens or cu_q_lens"),
    # Forms.
    ({"page_ids": np.zeros(2)}, "`page_ids` is float64[2]; wanted integers[n]:"),
    ({"page_ids": [[1], [2, 3]]}, "`page_ids` is [[1], [2, 3]] of type list; wanted integers[n]:"),
    ({"slots": ints(1)[None]}, "`slots` is int32[1,1]; wanted integers[T]:"),
    (batch(num_seqs=2.0), "`num_seqs` is 2.0 of type float; wanted integers[1] or integers[]:"),
    (
        batch(page_indices=ints(6, 2, 5, 7)),
        "`page_indices` is int32[4]; wanted int32[S, M], neither 0, or int32[S * M] with the S",
    ),
    (batch(num_seqs=ints(1, 2)), "`num_seqs` is of shape [2]; wanted [1]:"),
    (batch(kv_lens=ints(9, 6)), "`kv_lens` is of shape [2]; wanted [3]:"),
    (batch(cu_q_lens=ints(0, 6, 8)), "`cu_q_lens` is of shape [3]; wanted [4]:"),
    (
        {"slices": np.zeros((2, 3), np.int32), "num_slices": ints(1)},
        "`slices` is of shape [2, 3]; wanted [3, 3]:",
    ),
    (
        {"page_ids": ints(1), "token_starts": ints(0, 4)},
        "`token_starts` is of shape [2]; wanted [1]:",
    ),
    ({"src_ids": ints(1), "dst_ids": ints(0, 4)}, "`dst_ids` is of shape [2]; wanted [1]:"),
    ({"num_tokens": 3, "slots": ints(1, 2)}, "`slots` is of shape [2]; wanted [3], one per token"),
    ({"num_tokens": -1}, "`num_tokens` is -1; wanted None or an integer >= 0:"),
    ({"num_tokens": 2.0}, "`num_tokens` is 2.0; wanted None or an integer >= 0:"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS, ids=[s for _, s in REFUSALS])
def test_refusals(arguments, sentence):
    with pytest.raises(ValueError) as refusal:
        validate(POOL, **arguments)
    message = str(refusal.value)
    assert message.startswith(f"validate: argument {sentence}")
    # What came; what was wanted: what to do.
    assert re.fullmatch(r"validate: argument `\w+` is .+; wanted .+: .+", message)


def test_what_is_no_pool():
    with pytest.raises(ValueError, match=r"validate: argument `kv_pages` is float32\[3\]; wanted"):
        validate(jnp.zeros(3), slots=ints(0))


def test_traced_values():
    with pytest.raises(ValueError, match=r"`slots` is int32\[3\], traced; .* outside jit"):
        jax.jit(lambda slots: validate(POOL, slots=slots))(jnp.arange(3))


@pytest.mark.parametrize("source", ["page_ids", "slices", "cu_q_lens"])
def test_slots_say_how_many_tokens_there_are(source):
    """Without num_tokens no source has an upper end, unless slots are there to count."""
    arguments = {
        "page_ids": {"page_ids": ints(1), "token_starts": ints(7)},
        "slices": {"slices": columns((0, 9, 2)), "num_slices": ints(1)},
        "cu_q_lens": {"cu_q_lens": ints(0, 11), "num_seqs": ints(1)},
    }[source]
    validate(POOL, **arguments)
    validate(POOL, **arguments, slots=ints(*[-1] * 11))
    with pytest.raises(ValueError, match="wanted"):
        validate(POOL, **arguments, slots=ints(*[-1] * 10))


# ---- Random calls, and those that write_indices makes


def first_repeat(ids, size):
    """(index, earlier index) of the first entry whose slots came before, by a plain loop."""
    seen = {}
    for i, first in enumerate(ids):
        for slot in range(first, first + size) if first >= 0 else ():
            if slot in seen:
                return i, seen[slot]
            seen[slot] = i
    return None


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=200)
@hypothesis.given(st.lists(st.integers(-1, 31), max_size=9), st.integers(1, 3))
def test_the_first_of_several_repeats_is_named(first_slots, length):
    first_slots = [s for s in first_slots if s % 4 + length <= 4]
    slices = columns(*((s, 0, length) for s in first_slots))
    arguments = {"num_tokens": 4, "slices": slices, "num_slices": ints(len(first_slots))}
    found = first_repeat(first_slots, length)
    if found is None:
        validate(POOL, **arguments)
        return
    with pytest.raises(ValueError) as refusal:
        validate(POOL, **arguments)
    pattern = r"`slices` is -?\d+ at index (\d+), .* no slot that slices at index (\d+) writes"
    assert tuple(map(int, re.search(pattern, str(refusal.value)).groups())) == found


def first_conflict(table, kv_lens, q_lens, page_size):
    """(place, earlier place) of the first entry that shares a written page, by a plain loop."""
    places = []
    for row, (kv_len, q_len) in enumerate(zip(kv_lens, q_lens, strict=True)):
        if not q_len:
            continue
        # A page at a time, of the tokens that lie in it.
        for start in range(0, kv_len, page_size):
            writes = min(start + page_size, kv_len) > kv_len - q_len
            page = table[row][start // page_size]
            place = (row, start // page_size), writes
            for earlier_page, (earlier, earlier_writes) in places:
                if page == earlier_page and (writes or earlier_writes):
                    return place[0], earlier
            places.append((page, place))
    return None


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=300)
@hypothesis.given(st.data())
def test_the_first_shared_page_that_is_written_is_named(data):
    page_size, width, num_pages = 4, 3, data.draw(st.integers(4, 40))
    kv_lens = data.draw(st.lists(st.integers(0, width * page_size), min_size=1, max_size=4))
    q_lens = [data.draw(st.integers(0, kv_len)) for kv_len in kv_lens]
    entries = st.lists(st.integers(0, num_pages - 1), min_size=width, max_size=width)
    table = [data.draw(entries) for _ in kv_lens]
    pool = jax.ShapeDtypeStruct((num_pages, page_size, 2, 128), jnp.bfloat16)
    arguments = {
        "num_tokens": sum(q_lens),
        "page_indices": np.array(table, np.int32).reshape(-1, width),
        "kv_lens": ints(*kv_lens),
        "cu_q_lens": np.cumsum([0, *q_lens], dtype=np.int32),
        "num_seqs": ints(len(kv_lens)),
    }
    found = first_conflict(table, kv_lens, q_lens, page_size)
    if found is None:
        validate(pool, **arguments)
        return
    with pytest.raises(ValueError) as refusal:
        validate(pool, **arguments)
    places = re.findall(r"at index \((\d+), (\d+)\), where", str(refusal.value))
    assert tuple(tuple(map(int, place)) for place in places) == found


def make_call(rng, page_size):
    """A batch of four sequences on permuted pages, and garbage rows."""
    kv_lens = rng.integers(0, 5 * page_size + 1, 4)
    q_lens = rng.integers(0, kv_lens + 1)
    num_pages = 30
    table = rng.permutation(num_pages)[: 5 * 5].reshape(5, 5).astype(np.int32)
    table[np.arange(5) * page_size >= np.append(kv_lens, 0)[:, None]] = INT_MAX
    ends = np.append(np.cumsum([0, *q_lens]), INT_MIN).astype(np.int32)
    lens = np.append(kv_lens, INT_MAX).astype(np.int32)
    num_tokens = int(q_lens.sum()) + int(rng.integers(0, 3))
    pool = jax.ShapeDtypeStruct((num_pages, page_size, 2, 128), jnp.bfloat16)
    return pool, num_tokens, table, lens, ends, ints(4)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_what_write_indices_makes_is_valid(page_size):
    pool, num_tokens, *arrays = make_call(np.random.default_rng(page_size), page_size)
    w = pallas_paged.write_indices(*map(jnp.array, arrays), page_size, num_tokens=num_tokens)
    pages = w._asdict()
    slots = pages.pop("slots")
    names = ("page_indices", "kv_lens", "cu_q_lens", "num_seqs")
    named = dict(zip(names, arrays, strict=True))
    validate(pool, num_tokens=num_tokens, **pages, **named)
    validate(pool, num_tokens=num_tokens, slots=slots, **named)
    # Both at once would write everything twice.
    assert (np.asarray(slots) >= 0).any()
    with pytest.raises(ValueError, match="`slots` is .* once more"):
        validate(pool, **pages, slots=slots)


def test_many_entries():
    """1e5 entries of each kind: arrays, not loops; the one repeat among them is found."""
    count, page_size = 100_000, 16
    pool = jax.ShapeDtypeStruct((2 * count, page_size, 16, 128), jnp.bfloat16)
    pages = np.random.default_rng(0).permutation(2 * count).astype(np.int32)
    page_ids, others = pages[:count], pages[count:] * page_size
    starts = np.zeros(count, np.int32)
    slices = np.stack([others, starts, np.full(count, 8, np.int32)])
    slots = others + 8
    arguments = {
        "page_ids": page_ids,
        "token_starts": starts,
        "slices": slices,
        "num_slices": ints(count),
        "slots": slots,
    }
    validate(pool, **arguments)
    slots[70_000] = slots[60_000] - 3
    with pytest.raises(ValueError, match="at index 70000, .* that slices at index 60000 writes"):
        validate(pool, **arguments)


def test_many_sequences():
    """256 sequences of 4,096 pages, a prefix shared by all; the one page that is not is found."""
    num_seqs, width, page_size = 256, 4096, 16
    num_pages = num_seqs * width
    pool = jax.ShapeDtypeStruct((num_pages, page_size, 16, 128), jnp.bfloat16)
    table = np.random.default_rng(0).permutation(num_pages).astype(np.int32).reshape(-1, width)
    table[:, :1000] = table[0, :1000]
    arguments = {
        "num_tokens": num_seqs * 32,
        "page_indices": table,
        "kv_lens": np.full(num_seqs, width * page_size, np.int32),
        "cu_q_lens": np.arange(num_seqs + 1, dtype=np.int32) * 32,
        "num_seqs": ints(num_seqs),
    }
    validate(pool, **arguments)
    table[200, 3000] = table[100, 4094]
    with pytest.raises(ValueError, match=r"\(200, 3000\), .* reads, and at index \(100, 4094\)"):
        validate(pool, **arguments)
