# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""write_indices against a plain loop: valid batches exactly, absurd ones inside their bounds.

The checks take the function as an argument, so that the same checks meet planted faults.
"""

import collections
import dataclasses
import functools
import inspect
import sys
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import pallas_paged
from pallas_paged.kv_write import indices
from tests.kv_write.cases import INT_MAX, INT_MIN
from tests.planted import replace_once

# (S, M, page_size, T): few, because each is a program to compile.
SHAPES = ((8, 6, 3, 24), (3, 4, 16, 70), (5, 7, 1, 11), (1, 3, 3, 8))
GARBAGE = (INT_MAX, INT_MIN, -1, 0, 1, 5)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of one call, in numpy."""

    page_indices: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray
    page_size: int
    num_tokens: int

    def run(self, write_indices):
        """Calls `write_indices`; the fields of the result in numpy."""
        arrays = (self.page_indices, self.kv_lens, self.cu_q_lens, self.num_seqs)
        result = write_indices(
            *map(jnp.asarray, arrays), self.page_size, num_tokens=self.num_tokens
        )
        return indices.WriteIndices(*map(np.asarray, result))


def make_batch(shape, lens, *, garbage=0):
    """Sequences of (kv_len, q_len) in `lens`, on permuted pages; the rest is `garbage`."""
    max_seqs, width, page_size, num_tokens = shape
    table = np.full((max_seqs, width), garbage, np.int64)
    pages = iter(np.random.default_rng(7).permutation(max_seqs * width))
    for s, (kv_len, _) in enumerate(lens):
        for m in range(-(-kv_len // page_size)):
            table[s, m] = next(pages)
    pad = [garbage] * (max_seqs - len(lens))
    return Batch(
        table.astype(np.int32),
        np.array([kv for kv, _ in lens] + pad, np.int32),
        np.array([0, *np.cumsum([q for _, q in lens]), *pad], np.int32)[: max_seqs + 1],
        np.array([len(lens)], np.int32),
        page_size,
        num_tokens,
    )


# ---- What must hold


def wanted_slots(batch):
    """The slot of every token, -1 where it has none: one token at a time in Python integers."""
    slots = [-1] * batch.num_tokens
    for s in range(int(batch.num_seqs[0])):
        begin, end = (int(x) for x in batch.cu_q_lens[s : s + 2])
        for token in range(begin, end):
            position = int(batch.kv_lens[s]) - (end - token)
            page, row = divmod(position, batch.page_size)
            slots[token] = _slot_of(int(batch.page_indices[s, page]), row, batch.page_size)
    return slots


def _slot_of(page, row, page_size):
    """-1 for a page whose slots no int32 holds."""
    return page * page_size + row if 0 <= page and (page + 1) * page_size <= 2**31 else -1


def wanted_page_entries(batch):
    """(page id, first token) of the pages that one sequence's new tokens cover from end to end."""
    pages = []
    for s in range(int(batch.num_seqs[0])):
        begin, end = (int(x) for x in batch.cu_q_lens[s : s + 2])
        kv_len = int(batch.kv_lens[s])
        for m in range(kv_len // batch.page_size):
            token = end - kv_len + m * batch.page_size
            if token >= begin:
                pages.append((int(batch.page_indices[s, m]), token))
    return pages


def check_valid(write_indices, batch):
    """Raises AssertionError unless the result is what the plain loops say."""
    w = batch.run(write_indices)
    check_forms(w, batch)
    slots = wanted_slots(batch)
    assert w.slots.tolist() == slots
    pages = wanted_page_entries(batch)
    entries = list(zip(w.page_ids.tolist(), w.token_starts.tolist(), strict=True))
    assert entries == pages + [(-1, -1)] * (len(entries) - len(pages))
    # Pages and slices together: every new token once, where `slots` has it, in token order.
    count = int(w.num_slices[0])
    slices = w.slices[:, :count].T.tolist()
    runs = [(page, token, batch.page_size) for page, token in pages]
    runs = [(_slot_of(page, 0, batch.page_size), token, n) for page, token, n in runs] + slices
    covered = collections.Counter(token + j for _, token, n in runs for j in range(n))
    assert covered == {t: 1 for t in _new_tokens(batch)}
    for slot, token, length in runs:
        assert slots[token : token + length] == (
            [-1] * length if slot < 0 else list(range(slot, slot + length))
        )
    assert [token for _, token, _ in slices] == sorted(token for _, token, _ in slices)
    for slot, _, length in slices:
        assert 1 <= length < batch.page_size
        assert slot < 0 or slot % batch.page_size + length <= batch.page_size
    assert (w.slices[2, count:] == 0).all()


def _new_tokens(batch):
    return range(int(batch.cu_q_lens[int(batch.num_seqs[0])]))


def check_forms(w, batch):
    """Shapes and dtypes as WriteIndices documents them."""
    whole = batch.num_tokens // batch.page_size
    shapes = ((whole,), (whole,), (3, 2 * batch.kv_lens.size), (1,), (batch.num_tokens,))
    assert tuple(x.shape for x in w) == shapes
    assert {x.dtype for x in w} == {np.dtype(np.int32)}


def check_bounded(write_indices, batch):
    """Raises AssertionError if any input at all gives a wild entry.

    A slot is -1 or in a page that a sequence's row names among those that its length needs (others
    may be anybody's); a page is -1 or such an entry; sources lie inside the batch.
    """
    w = batch.run(write_indices)
    check_forms(w, batch)
    p, num_tokens = batch.page_size, batch.num_tokens
    named = set()
    for row, kv_len in list(zip(batch.page_indices.tolist(), batch.kv_lens.tolist(), strict=True))[
        : max(0, int(batch.num_seqs[0]))
    ]:
        named |= set(row[: max(0, -(-kv_len // p))])
    for page, token in zip(w.page_ids.tolist(), w.token_starts.tolist(), strict=True):
        if (page, token) != (-1, -1):
            assert page == -1 or page in named
            assert 0 <= token <= num_tokens - p
    for slot in w.slots.tolist():
        assert slot == -1 or slot >= 0 and slot // p in named
    assert 0 <= w.num_slices[0] <= w.slices.shape[1]
    for slot, token, length in w.slices[:, : w.num_slices[0]].T.tolist():
        assert slot == -1 or slot >= 0 and slot // p in named
        assert 1 <= length and slot % p + length <= p or slot == -1
        assert 0 <= token <= num_tokens - length


# ---- Batches


@st.composite
def valid_batches(draw, shapes=SHAPES):
    """Any ragged batch: prefills, decode rows, rows without new tokens or without any; garbage."""
    shape = draw(st.sampled_from(shapes))
    max_seqs, width, page_size, num_tokens = shape
    lens, free = [], num_tokens
    for _ in range(draw(st.integers(0, max_seqs))):
        kv_len = draw(st.integers(0, width * page_size))
        near_edge = kv_len % page_size + page_size * draw(st.integers(0, 2))
        q_len = draw(st.one_of(st.integers(0, kv_len), st.sampled_from((0, 1, near_edge))))
        lens.append((kv_len, min(q_len, kv_len, free)))
        free -= lens[-1][1]
    return make_batch(shape, lens, garbage=draw(st.sampled_from(GARBAGE)))


@st.composite
def absurd_batches(draw):
    """Any int32 anywhere, small numbers and edges more often than not."""
    max_seqs, width, page_size, num_tokens = draw(st.sampled_from(SHAPES))
    near = [0, 1, page_size, width * page_size, num_tokens, max_seqs]
    edge = st.sampled_from([*near, *(x + 1 for x in near), *(-x for x in near), INT_MAX, INT_MIN])
    number = st.one_of(edge, st.integers(0, num_tokens), st.integers(INT_MIN, INT_MAX))

    def array(*size):
        count = int(np.prod(size))
        values = draw(st.lists(number, min_size=count, max_size=count))
        return np.array(values, np.int32).reshape(size)

    return Batch(
        array(max_seqs, width),
        array(max_seqs),
        array(max_seqs + 1),
        array(1),
        page_size,
        num_tokens,
    )


def with_lost_pages(batch, where, ids):
    """The batch with some table entries that are no page."""
    table = batch.page_indices.copy()
    table.flat[np.asarray(where, np.int64) % table.size] = ids
    return dataclasses.replace(batch, page_indices=table)


# What random batches reach too seldom, by name.
HARD = {
    "head, whole pages and tail": make_batch(SHAPES[0], [(14, 12)]),
    "inside one page": make_batch(SHAPES[1], [(7, 3), (15, 14)], garbage=INT_MAX),
    "ends on an edge": make_batch(SHAPES[1], [(32, 20), (48, 16)], garbage=INT_MIN),
    "decode rows": make_batch(SHAPES[0], [(1, 1), (3, 1), (4, 1), (18, 1)]),
    "rows without new tokens": make_batch(SHAPES[0], [(0, 0), (9, 0), (8, 8), (7, 0), (5, 4)]),
    "zeros beyond num_seqs": make_batch(SHAPES[0], [(5, 5)]),
    "INT_MIN beyond num_seqs": make_batch(SHAPES[0], [(5, 5), (6, 1)], garbage=INT_MIN),
    "plausible beyond num_seqs": make_batch(SHAPES[0], [(5, 5)], garbage=7),
    "every row and token in use": make_batch(SHAPES[0], [(3, 3)] * 8),
    "pages of one token": make_batch(SHAPES[2], [(7, 4), (3, 3), (1, 1)]),
    "no sequence": make_batch(SHAPES[1], [], garbage=4),
    "full table row": make_batch(SHAPES[3], [(9, 8)]),
    # 2**31 // 3 - 1 is the last page whose slots an int32 holds.
    "last page of int32": with_lost_pages(make_batch(SHAPES[3], [(2, 2)]), [0], 2**31 // 3 - 1),
    "lost pages": with_lost_pages(
        make_batch(SHAPES[0], [(14, 12), (9, 7)]), (0, 1, 6, 8), (-1, INT_MAX, INT_MIN, 2**31 // 3)
    ),
}


# The real function is compiled once a shape.
jitted = jax.jit(pallas_paged.write_indices, static_argnames=("page_size", "num_tokens"))

_settings = functools.partial(hypothesis.settings, deadline=None, derandomize=True, database=None)


# ---- Tests


@pytest.mark.parametrize("name", HARD)
def test_hard_batches(name):
    check_valid(jitted, HARD[name])
    check_bounded(jitted, HARD[name])


@_settings(max_examples=200)
@hypothesis.given(valid_batches())
def test_valid_batches(batch):
    check_valid(jitted, batch)
    check_bounded(jitted, batch)


@_settings(max_examples=100)
@hypothesis.given(
    valid_batches(),
    st.lists(st.integers(0, 50), max_size=6),
    st.sampled_from((-1, INT_MAX, INT_MIN, -7)),
)
def test_lost_pages_are_skipped(batch, where, page_id):
    """A table entry that is no page loses its tokens; nobody else's move, none lands elsewhere."""
    batch = with_lost_pages(batch, where, page_id)
    check_valid(jitted, batch)
    check_bounded(jitted, batch)


@_settings(max_examples=200)
@hypothesis.given(absurd_batches())
def test_absurd_batches_stay_in_bounds(batch):
    check_bounded(jitted, batch)


@pytest.mark.parametrize(
    "absurd",
    [
        {"kv_lens": [-3, INT_MIN]},
        {"kv_lens": [INT_MAX, 19]},  # more than M * page_size
        {"cu_q_lens": [9, 4, 0]},
        {"cu_q_lens": [-5, INT_MIN, INT_MAX]},
        {"cu_q_lens": [0, 1000, 4]},
        {"num_seqs": [-1]},
        {"num_seqs": [INT_MIN]},
        {"num_seqs": [INT_MAX]},
    ],
    ids=str,
)
def test_each_absurd_value(absurd):
    batch = make_batch(SHAPES[0], [(14, 12), (9, 7)], garbage=INT_MAX)
    arrays = {name: getattr(batch, name).copy() for name in absurd}
    for name, values in absurd.items():
        arrays[name][: len(values)] = values
    check_bounded(jitted, dataclasses.replace(batch, **arrays))


def test_rows_with_absurd_lengths_write_nothing():
    check_too_long(jitted)


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_batches_shorter_than_a_page(num_tokens):
    batch = make_batch((2, 2, 4, num_tokens), [(num_tokens, num_tokens)])
    check_valid(pallas_paged.write_indices, batch)


def test_positions_beyond_int32():
    """A table whose last position no int32 holds: no step of the arithmetic overflows."""
    page_size, width = 2**16, 2**15 + 1
    table = np.arange(width, dtype=np.int32)[None] % 11
    kv_len = 2**31 - page_size  # the last position in a page whose end an int32 holds
    arrays = [np.array(x, np.int32) for x in ([kv_len], [0, 2], [1])]
    batch = Batch(table, *arrays, page_size, 2)
    assert batch.run(pallas_paged.write_indices).slots.tolist() == wanted_slots(batch)
    batch.kv_lens[0] = INT_MAX
    check_bounded(pallas_paged.write_indices, batch)


def test_untraced_calls_agree():
    batch = HARD["head, whole pages and tail"]
    plain, compiled = (batch.run(f) for f in (pallas_paged.write_indices, jitted))
    for name, a, b in zip(plain._fields, plain, compiled, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@_settings(max_examples=15)
@hypothesis.given(valid_batches(shapes=SHAPES[:2]))
def test_the_three_granularities_write_the_same_pool(batch):
    check_same_pool(jitted, batch)


def check_same_pool(write_indices, batch):
    """Pages and slices, and tokens, through the oracle: the same bytes, and what a loop writes."""
    w = batch.run(write_indices)
    num_pages = batch.page_indices.size
    k = np.arange(1, batch.num_tokens + 1, dtype=np.float32)[:, None, None] * np.ones((1, 1, 128))
    k = jnp.asarray(k, jnp.float32)

    def pool():
        return jnp.full((num_pages, batch.page_size, 2, 128), -7, jnp.float32)

    by_page = pallas_paged.page_write(
        pool(), k, -k, jnp.array(w.page_ids), jnp.array(w.token_starts), backend="oracle"
    )
    by_page = pallas_paged.slice_write(
        by_page, k, -k, jnp.array(w.slices), jnp.array(w.num_slices), backend="oracle"
    )
    by_token = pallas_paged.token_write(pool(), k, -k, jnp.array(w.slots), backend="oracle")
    wanted = np.array(pool()).reshape(-1, 2, 128)
    for token, slot in enumerate(wanted_slots(batch)):
        if 0 <= slot < len(wanted):
            wanted[slot] = np.array([[token + 1], [-token - 1]])
    wanted = wanted.reshape(by_page.shape)
    np.testing.assert_array_equal(by_token, wanted)
    np.testing.assert_array_equal(by_page, wanted)


# ---- Refusals

GOOD = {
    "page_indices": np.zeros((2, 3), np.int32),
    "kv_lens": np.zeros(2, np.int32),
    "cu_q_lens": np.zeros(3, np.int32),
    "num_seqs": np.zeros(1, np.int32),
    "page_size": 4,
    "num_tokens": 8,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_indices": np.zeros(3, np.int32)}, r"`page_indices` is int32\[3\]; wanted int32\[S"),
        (
            {"page_indices": np.zeros((0, 3), np.int32)},
            r"`page_indices` is int32\[0,3\]; .*er 0",
        ),
        (
            {"page_indices": np.zeros((2, 0), np.int32)},
            r"`page_indices` is int32\[2,0\]; .*er 0",
        ),
        ({"kv_lens": np.zeros(2, np.float32)}, r"`kv_lens` is float32\[2\]; wanted int32\[S\]"),
        ({"kv_lens": np.zeros(3, np.int32)}, r"`kv_lens` is int32\[3\]; wanted int32\[2\]"),
        ({"cu_q_lens": np.zeros(2, np.int32)}, r"`cu_q_lens` is int32\[2\]; wanted int32\[3\]"),
        ({"cu_q_lens": [0, 0, 0]}, r"`cu_q_lens` is \[0, 0, 0\] of type list; wanted an array"),
        ({"num_seqs": np.zeros(2, np.int32)}, r"`num_seqs` is int32\[2\]; wanted int32\[1\]"),
        ({"num_seqs": np.zeros((), np.uint32)}, r"`num_seqs` is uint32\[\]; wanted int32\[1\]"),
        ({"num_seqs": 2.0}, r"`num_seqs` is 2.0 of type float; wanted int32\[1\], int32"),
        ({"page_size": 0}, r"`page_size` is 0; wanted a Python int >= 1"),
        ({"page_size": 4.0}, r"`page_size` is 4.0; wanted a Python int >= 1"),
        ({"page_size": 2**31}, r"`page_size` is 2147483648; wanted .* below 2\*\*31"),
        ({"num_tokens": -1}, r"`num_tokens` is -1; wanted a Python int >= 0"),
    ],
)
def test_refusals(change, message):
    pallas_paged.write_indices(**GOOD)
    with pytest.raises(ValueError, match=f"write_indices: argument {message}"):
        pallas_paged.write_indices(**GOOD | change)


# ---- Planted faults

FAULTS = {
    "head ends a token late": (
        "jnp.minimum(first_page * page_size, kv_len)",
        "jnp.minimum(first_page * page_size + 1, kv_len)",
    ),
    "head ends a token early": (
        "jnp.minimum(first_page * page_size, kv_len)",
        "jnp.minimum(first_page * page_size - 1, kv_len)",
    ),
    "head does not end with the sequence": (
        "jnp.minimum(first_page * page_size, kv_len)",
        "first_page * page_size",
    ),
    "floor for the first page": ("-(-start // page_size)", "start // page_size"),
    "ceil for the last page": (
        "last_page = kv_len // page_size",
        "last_page = -(-kv_len // page_size)",
    ),
    "tail begins before the head": (
        "jnp.maximum(last_page * page_size, head_end)",
        "last_page * page_size",
    ),
    "padding rows are sequences": (
        "is_seq = jnp.arange(max_seqs) < num_seqs[0]",
        "is_seq = jnp.arange(max_seqs) < max_seqs",
    ),
    "the last row is no sequence": (
        "is_seq = jnp.arange(max_seqs) < num_seqs[0]",
        "is_seq = jnp.arange(max_seqs) < num_seqs[0] - 1",
    ),
    "padding rows are searched": ("jnp.where(is_seq, q_end, num_tokens)", "q_end"),
    "searched from the left": ('side="right", method', 'side="left", method'),
    "tokens behind the last sequence": ("(nth >= 0) & (nth < q_len[seq])", "(nth >= 0)"),
    "page sources a token late": (
        "token_start = q_start[seq] +",
        "token_start = 1 + q_start[seq] +",
    ),
    "pages of the first row": (
        "_page(page_indices, seq, page), -1)",
        "_page(page_indices, 0, page), -1)",
    ),
    "slices not in order": ("[:, order]", "[:, order[::-1]]"),
    "slices with holes": ("order = jnp.argsort(length <= 0, stable=True)", "order = row * 0 + row"),
    "empty slices counted": ("jnp.sum(length > 0,", "jnp.sum(length >= 0,"),
    "lost pages are page 0": (
        "page_size + position % page_size, -1)",
        "page_size + position % page_size, position % page_size)",
    ),
    "lost pages wrap around": (
        "is_page = (page >= 0) & (page <= 2**31 // page_size - 1)",
        "is_page = page >= 0",
    ),
    "one page fewer in int32": (
        "page <= 2**31 // page_size - 1)",
        "page <= 2**31 // page_size - 2)",
    ),
    "absurd kv_lens are clamped": ("is_seq & (kv_lens == kv_len)", "is_seq"),
    "more new tokens than tokens": ("jnp.minimum(q_end - q_start, kv_len)", "q_end - q_start"),
    "sequences beyond the batch": (
        "q_end = jnp.clip(cu_q_lens[1:], q_start, num_tokens)",
        "q_end = jnp.maximum(cu_q_lens[1:], q_start)",
    ),
}


PLANTED = [(indices.__name__, *fault) for fault in FAULTS.values()]


def planted(old, new):
    """write_indices from the module's source with one snippet replaced."""
    source = replace_once(inspect.getsource(indices), old, new)
    module = types.ModuleType("planted_indices")
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, "planted_indices", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return jax.jit(module.write_indices, static_argnames=("page_size", "num_tokens"))


ABSURD = [
    dataclasses.replace(make_batch(SHAPES[0], [(3, 3)] * 8, garbage=1000), **change)
    for change in (
        {"kv_lens": np.array([INT_MAX, 19, -1, 3, 1, 0, 2, 3], np.int32)},
        {"cu_q_lens": np.array([9, 3, 20, 8, 24, 2, 90, INT_MAX, INT_MIN], np.int32)},
        {"cu_q_lens": np.array([0, 24, 0, 24, 0, 24, 0, 24, 0], np.int32)},
        {"cu_q_lens": np.array([0, *[90] * 8], np.int32)},
    )
]


def check_all(write_indices):
    """Every check on every named batch, those of the first shape first: one program to compile."""
    for batch in ABSURD:
        check_bounded(write_indices, batch)
    check_too_long(write_indices)
    for batch in sorted(HARD.values(), key=lambda b: b.num_tokens != SHAPES[0][3]):
        check_valid(write_indices, batch)
        check_bounded(write_indices, batch)


def check_too_long(write_indices):
    """Of two sequences, the one whose length its table row cannot hold is skipped whole."""
    batch = make_batch(SHAPES[0], [(9, 7), (14, 12)])
    wanted = [-1] * 7 + wanted_slots(batch)[7:]
    batch.kv_lens[0] = 6 * 3 + 1
    assert batch.run(write_indices).slots.tolist() == wanted


def test_the_checks_pass_without_a_fault():
    check_all(planted("is_seq = ", "is_seq  = "))


@pytest.mark.parametrize("name", FAULTS)
def test_the_checks_find_planted_faults(name):
    faulty = planted(*FAULTS[name])
    with pytest.raises(AssertionError):
        check_all(faulty)
