# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""validate: every sentence, at the first index that is wrong; and what is right passes."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import make_kv_pages, validate, write_indices


def _pool():
    """8 pages of 4 tokens: slots 0 to 31."""
    return make_kv_pages(8, 4, num_kv_heads=1, head_dim=128)


def _ints(*values):
    return np.array(values, np.int32)


def _batch(**changes):
    """Two sequences with 6 and 1 new tokens, the first page of both shared and only read."""
    batch = {
        "page_indices": _ints([7, 2, 5], [7, 1, -9]),
        "kv_lens": _ints(10, 6),
        "cu_q_lens": _ints(0, 6, 7),
        "num_seqs": _ints(2),
        "num_tokens": 8,
    }
    return batch | changes


RIGHT = {
    "pages": {"page_ids": _ints(3, -1, 0), "num_tokens": 12},
    "starts": {"page_ids": _ints(3, -1, 0), "token_starts": _ints(1, 99, 8), "num_tokens": 12},
    "slices": {
        "slices": _ints([2, 31, -5], [0, 2, -5], [2, 1, 77]), "num_slices": _ints(2),
        "num_tokens": 3,
    },
    "slots": {"slots": _ints(31, -1, 0, -1)},
    "copies": {"src_ids": _ints(1, 1, -1), "dst_ids": _ints(2, 3, 2)},
    "batch": _batch(),
    "one_sequence": _batch(num_seqs=_ints(1), cu_q_lens=_ints(0, 6, -1), kv_lens=_ints(10, -4)),
    "pages_and_slices": {
        "page_ids": _ints(1), "slices": _ints([0], [4], [4]), "num_slices": _ints(1),
    },
}  # fmt: skip

WRONG = {
    "page_beyond": ({"page_ids": _ints(0, 8, 9)}, "`page_ids` is 8 at index 1; wanted -1 or a"),
    "page_negative": ({"page_ids": _ints(0, -2)}, "`page_ids` is -2 at index 1"),
    "page_twice": ({"page_ids": _ints(1, 0, 1)}, "`page_ids` writes slot 4 again at index 2"),
    "too_many_pages": ({"page_ids": _ints(1, 0), "num_tokens": 7}, "`page_ids` is 4 at index 1"),
    "start_late": (
        {"page_ids": _ints(1, 0), "token_starts": _ints(3, 4), "num_tokens": 7},
        "`token_starts` is 4 at index 1; wanted a first token in [0, 3]",
    ),
    "start_negative": (
        {"page_ids": _ints(1, 0), "token_starts": _ints(-1, 4), "num_tokens": 9},
        "`token_starts` is -1 at index 0",
    ),
    "starts_short": (
        {"page_ids": _ints(1, 0), "token_starts": _ints(1)}, "has 1 entries; wanted 2, as page_ids",
    ),
    "starts_alone": ({"token_starts": _ints(1)}, "`page_ids` is missing; wanted with `token_sta"),
    "slices_alone": ({"slices": _ints([0], [0], [1])}, "`num_slices` is missing"),
    "slice_rows": ({"slices": _ints([0]), "num_slices": _ints(1)}, "has 1 rows; wanted 3"),
    "slice_count": (
        {"slices": _ints([0], [0], [1]), "num_slices": _ints(2)}, "`num_slices` is [2]; wanted one",
    ),
    "slice_empty": (
        {"slices": _ints([0, 4], [0, 1], [1, 0]), "num_slices": _ints(2)},
        "`slices[2]` is 0 at index 1; wanted a length of at least 1",
    ),
    "slice_crosses": (
        {"slices": _ints([0, 6], [0, 1], [1, 3]), "num_slices": _ints(2)},
        "`slices[2]` is 3 at index 1; wanted a length that stays inside",
    ),
    "slice_slot": (
        {"slices": _ints([32], [0], [1]), "num_slices": _ints(1)}, "`slices[0]` is 32 at index 0",
    ),
    "slice_source": (
        {"slices": _ints([0], [2], [2]), "num_slices": _ints(1), "num_tokens": 3},
        "`slices[1]` is 2 at index 0; wanted a run that ends by token 3",
    ),
    "slice_overlaps": (
        {"slices": _ints([0, 1], [0, 4], [2, 2]), "num_slices": _ints(2)},
        "`slices` writes slot 1 again at index 1",
    ),
    "slice_in_page": (
        {"page_ids": _ints(2), "slices": _ints([9], [4], [1]), "num_slices": _ints(1)},
        "`slices` writes slot 9 again at index 0",
    ),
    "slot_beyond": ({"slots": _ints(0, 32)}, "`slots` is 32 at index 1; wanted -1 or a slot in"),
    "slot_twice": ({"slots": _ints(5, -1, 5)}, "`slots` writes slot 5 again at index 2"),
    "slots_of_floats": ({"slots": np.zeros(3)}, "`slots` is float64[3]; wanted integers"),
    "copy_beyond": ({"src_ids": _ints(0), "dst_ids": _ints(8)}, "`dst_ids` is 8 at index 0"),
    "copy_twice": (
        {"src_ids": _ints(0, 1), "dst_ids": _ints(2, 2)},
        "`dst_ids` is 2 at index 1; wanted every page written once",
    ),
    "copy_chain": (
        {"src_ids": _ints(0, 2), "dst_ids": _ints(2, 3)},
        "`dst_ids` is 2 at index 0; wanted a page that is not read",
    ),
    "copies_unequal": ({"src_ids": _ints(0, 1), "dst_ids": _ints(2)}, "has 1 entries; wanted 2"),
    "copy_half": ({"src_ids": _ints(0)}, "`dst_ids` is missing"),
    "batch_sizes": (_batch(kv_lens=_ints(10)), "are of [2, 1, 2] sequences"),
    "seqs_beyond": (_batch(num_seqs=_ints(3)), "`num_seqs` is [3]; wanted one number in [0, 2]"),
    "cu_falls": (_batch(cu_q_lens=_ints(0, 6, 5)), "`cu_q_lens` is 5 at index 2; wanted prefix"),
    "cu_beyond": (_batch(cu_q_lens=_ints(0, 6, 9)), "`cu_q_lens` is 9 at index 2; wanted a pre"),
    "kv_short": (_batch(kv_lens=_ints(5, 6)), "`kv_lens` is 5 at index 0; wanted a length that"),
    "kv_long": (_batch(kv_lens=_ints(10, 13)), "`kv_lens` is 13 at index 1; wanted at most 3"),
    "kv_negative": (
        {"kv_lens": _ints(3, -1)}, "`kv_lens` is -1 at index 1; wanted a length that counts",
    ),
    "table_beyond": (
        _batch(page_indices=_ints([7, 2, 8], [7, 1, 0])), "`page_indices` is 8 at index [0, 2]",
    ),
    "both_write": (
        _batch(page_indices=_ints([7, 2, 5], [7, 5, 0])),
        "`page_indices` is 5 at index [1, 1]; wanted a page that no other place in the batch wr",
    ),
    "reads_written": (
        _batch(page_indices=_ints([7, 2, 5], [2, 1, 0])),
        "`page_indices` is 2 at index [1, 0]; wanted a page that no other sequence writes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments", RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(arguments):
    assert validate(_pool(), **arguments) is None


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(arguments, sentence):
    with pytest.raises(ValueError, match="^validate: argument") as caught:
        validate(_pool(), **arguments)
    assert sentence in str(caught.value)


def test_what_write_indices_makes_is_right():
    batch = _batch()
    num_tokens = batch.pop("num_tokens")
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    w = write_indices(**arrays, page_size=4, num_tokens=num_tokens)
    pages = {"page_ids": w.page_ids, "token_starts": w.token_starts}
    slices = {"slices": w.slices, "num_slices": w.num_slices}
    validate(_pool(), **pages, **slices, **arrays, num_tokens=num_tokens)
    validate(_pool(), slots=w.slots, num_tokens=num_tokens)


def test_a_hundred_thousand_slots_are_quick():
    """Numpy throughout: a loop over tokens would take seconds."""
    pool = np.broadcast_to(np.zeros((), np.float32), (10_000, 16, 2, 128))
    slots = np.random.default_rng(0).permutation(160_000)
    validate(pool, slots=slots)
    slots[-1] = slots[0]
    with pytest.raises(ValueError, match="again at index 159999"):
        validate(pool, slots=slots)
