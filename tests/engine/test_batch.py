# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Segments become arrays of a closed set of shapes, and nothing gets lost in the padding."""

import dataclasses

import numpy as np
import pytest

import pallas_paged
from reference_engine.batch import (
    batch_shapes,
    choose_shape,
    describe_shapes,
    fitting_shapes,
    make_batch,
    make_batch_of,
)
from reference_engine.config import KV_WRITES, EngineConfig
from reference_engine.scheduler import Segment

SEGMENTS = (
    Segment(0, 3, (11, 12, 13, 14, 15, 16, 17), (5, 2, 9), samples=True, is_decode=False),
    Segment(1, 8, (21,), (4, 7, 1), samples=True, is_decode=True),
    Segment(2, 0, (31, 32, 33, 34), (8, 3), samples=False, is_decode=False),
)


def config_of(kv_write, **fields):
    return EngineConfig(
        page_size=4,
        max_num_batched_tokens=40,
        max_num_seqs=6,
        max_model_len=20,
        num_pages=12,
        kv_write=kv_write,
        **fields,
    )


@pytest.mark.parametrize("kv_write", KV_WRITES)
def test_arrays(kv_write):
    batch = make_batch(SEGMENTS, config_of(kv_write))
    assert batch.token_ids.tolist() == [*range(11, 18), 21, *range(31, 35)] + [0] * 4
    assert batch.positions.tolist() == [*range(3, 10), 8, *range(4)] + [0] * 4
    assert batch.kv_lens.tolist() == [10, 9, 4, 0, 0, 0]
    assert batch.cu_q_lens.tolist() == [0, 7, 8, 12, 12, 12, 12]
    assert batch.num_seqs.tolist() == [3]
    assert batch.page_indices.tolist() == [
        [5, 2, 9, -1, -1],
        [4, 7, 1, -1, -1],
        [8, 3, -1, -1, -1],
        *[[-1] * 5] * 3,
    ]
    assert all(array.dtype == np.int32 for array in batch)


def test_pages_and_the_slices_that_remain():
    batch = make_batch(SEGMENTS, config_of("pages"))
    assert batch.page_ids.tolist() == [2, 8, -1, -1]
    assert batch.token_starts[:2].tolist() == [1, 8]
    assert batch.num_slices.tolist() == [3]
    assert batch.slices[:, :3].T.tolist() == [[23, 0, 1], [36, 5, 2], [4, 7, 1]]
    assert batch.slots.shape == (0,)


def test_slices_alone():
    batch = make_batch(SEGMENTS, config_of("slices"))
    assert batch.num_slices.tolist() == [5]
    assert sorted(batch.slices[:, :5].T.tolist()) == [
        [4, 7, 1],
        [8, 1, 4],
        [23, 0, 1],
        [32, 8, 4],
        [36, 5, 2],
    ]
    assert batch.page_ids.shape == batch.slots.shape == (0,)


def test_slots_alone():
    batch = make_batch(SEGMENTS, config_of("tokens"))
    assert batch.slots.tolist() == [23, 8, 9, 10, 11, 36, 37, 4, 32, 33, 34, 35] + [-1] * 4
    assert batch.page_ids.shape == (0,) and batch.slices.shape == (3, 0)


def test_fused_brings_no_writes():
    batch = make_batch(SEGMENTS, config_of("fused"))
    assert batch.page_ids.shape == batch.token_starts.shape == batch.slots.shape == (0,)
    assert batch.slices.shape == (3, 0) and batch.num_slices.tolist() == [0]


def steps_of(lengths, starts, page_size):
    """One segment for each length; segment i starts at starts[i], and its pages are its own."""
    return [
        Segment(
            i,
            start,
            (1,) * length,
            tuple(range(-(-(start + length) // page_size))),
            samples=True,
            is_decode=length == 1,
        )
        for i, (length, start) in enumerate(zip(lengths, starts, strict=True))
    ]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("kv_write", KV_WRITES)
def test_every_step_has_one_of_the_announced_shapes(kv_write, page_size):
    config = dataclasses.replace(config_of(kv_write), page_size=page_size)
    shapes = batch_shapes(config)
    assert len(shapes) == len(set(shapes)) == 4 + 3 + (page_size > 1)
    seen = set()
    for num_seqs in range(1, 7):
        for length in range(1, (40 + page_size - 1) // num_seqs + 1):
            for start in range(4):
                if start + length > 20:
                    continue
                for last in {1, length}:  # the last request decodes
                    lengths = [length] * (num_seqs - 1) + [last]
                    segments = steps_of(lengths, [start] * num_seqs, page_size)
                    shape = choose_shape(sum(lengths), num_seqs, config)
                    assert shape.is_decode == (max(lengths) == 1)
                    batch = make_batch(segments, config)  # it raises if a capacity is too small
                    assert batch.token_ids.shape[0] == shape.num_tokens
                    assert batch.kv_lens.shape[0] == shape.num_seqs
                    assert batch.page_ids.shape[0] == shape.num_page_writes
                    assert batch.slices.shape[1] == shape.num_slices
                    assert batch.slots.shape[0] == shape.num_slots
                    seen.add(shape)
    assert seen == set(shapes)  # none is compiled for nothing


def test_a_batch_fits_into_every_larger_shape_that_holds_it():
    config = config_of("pages")
    decodes = steps_of([1, 1, 1], [3, 4, 5], 4)
    fitting = fitting_shapes(3, 3, config)
    assert [(s.num_tokens, s.is_decode) for s in fitting] == [
        (4, True),
        (6, True),
        (16, False),
        (32, False),
        (40, False),
        (44, False),
    ]
    for shape in fitting:
        batch = make_batch_of(shape, decodes, config)
        assert batch.num_slices.tolist() == [3] and batch.cu_q_lens[3:].tolist() == [3] * (
            shape.num_seqs - 2
        )
    assert all(not shape.is_decode for shape in fitting_shapes(4, 3, config))


def test_only_sizes_that_a_step_can_have_are_shapes():
    def sizes(**fields):
        shapes = batch_shapes(dataclasses.replace(config_of("tokens"), **fields))
        return [(s.num_tokens, s.num_seqs) for s in shapes]

    # Fewer tokens than sequences, in a step and in two requests.
    unaligned = {"page_aligned_scheduling": False}  # a budget of one page warns
    assert sizes(max_num_batched_tokens=4, **unaligned) == [(1, 1), (2, 2), (4, 4), (4, 4)]
    assert sizes(max_num_seqs=2, max_model_len=10) == [(1, 1), (2, 2), (16, 2), (20, 2)]
    # Five or six sequences have five tokens at least, so that no step needs (4, 6).
    assert sizes(token_buckets=(4, 40), seq_buckets=(4, 6)) == [(4, 4), (40, 4), (40, 6)]


def test_the_shapes_of_a_server_are_few_and_pad_little():
    config = EngineConfig(max_num_batched_tokens=8192, max_num_seqs=256, max_model_len=8192)
    assert len(batch_shapes(config)) == 43
    # 256 requests end one after another, as far apart as their tokens are.
    rows = [choose_shape(n, n, config).num_tokens for n in range(1, 257)]
    assert sum(rows) / sum(range(1, 257)) < 1.06
    for num_tokens in range(512, 8193):  # a step with a prefill
        assert choose_shape(num_tokens, 1, config).num_tokens < 1.25 * num_tokens + 1
    assert describe_shapes(config).startswith("43 shapes: decodes of {1, 2, 4, 8, 16 to 256 by 16}")


def test_the_smallest_shape_that_fits_is_taken():
    config = config_of("tokens")
    chosen = choose_shape(17, 3, config)
    assert (chosen.num_tokens, chosen.num_seqs) == (32, 6)
    chosen = choose_shape(33, 5, config)
    assert (chosen.num_tokens, chosen.num_seqs) == (40, 6)
    chosen = choose_shape(5, 5, config)
    assert (chosen.num_tokens, chosen.num_seqs, chosen.is_decode) == (6, 6, True)
    # Of two shapes of 16 tokens and 16 sequences, the one that runs decodes alone.
    assert choose_shape(12, 12, EngineConfig()).is_decode
    assert not choose_shape(12, 11, EngineConfig()).is_decode
    only = config_of("tokens", token_buckets=(40,), seq_buckets=(6,))
    assert len(batch_shapes(only)) == 1


def test_the_plan_of_the_host_is_what_write_indices_computes():
    """Importers without a host plan use write_indices; it must describe the same writes."""
    batch = make_batch(SEGMENTS, config_of("pages"))
    slots = make_batch(SEGMENTS, config_of("tokens")).slots
    ours = pallas_paged.write_indices(
        batch.page_indices,
        batch.kv_lens,
        batch.cu_q_lens,
        batch.num_seqs,
        4,
        num_tokens=batch.token_ids.shape[0],
    )
    assert ours.slots.tolist() == slots.tolist()
    assert ours.page_ids.tolist() == batch.page_ids.tolist()
    count = int(ours.num_slices[0])
    assert sorted(ours.slices[:, :count].T.tolist()) == sorted(batch.slices[:, :3].T.tolist())
