# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Segments become arrays of a closed set of shapes, and nothing gets lost in the padding."""

import numpy as np
import pytest

import pallas_paged
from reference_engine.batch import batch_shapes, choose_shape, make_batch
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
    assert batch.kv_lens.tolist() == [10, 9, 4, 0]
    assert batch.cu_q_lens.tolist() == [0, 7, 8, 12, 12]
    assert batch.num_seqs.tolist() == [3]
    assert batch.page_indices.tolist() == [
        [5, 2, 9, -1, -1],
        [4, 7, 1, -1, -1],
        [8, 3, -1, -1, -1],
        [-1] * 5,
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


@pytest.mark.parametrize("kv_write", KV_WRITES)
def test_every_step_has_one_of_the_announced_shapes(kv_write):
    config = config_of(kv_write)
    shapes = batch_shapes(config)
    assert len(shapes) == len(set(shapes)) == 3 * 4
    seen = set()
    for num_seqs in range(1, 7):
        for length in range(1, 40 // num_seqs + 1):
            for start in range(4):
                page_ids = tuple(range(12)[: -(-(start + length) // 4)])
                segments = [
                    Segment(i, start, (1,) * length, page_ids, samples=True, is_decode=False)
                    for i in range(num_seqs)
                ]
                if start + length > 20:
                    continue
                batch = make_batch(segments, config)
                seen.add(
                    (
                        batch.token_ids.shape[0],
                        batch.num_seqs.shape and batch.kv_lens.shape[0],
                        batch.page_ids.shape[0],
                        batch.slices.shape[1],
                        batch.slots.shape[0],
                    )
                )
    assert seen <= {
        (s.num_tokens, s.num_seqs, s.num_page_writes, s.num_slices, s.num_slots) for s in shapes
    }
    assert len(seen) > 4


def test_the_smallest_shape_that_fits_is_taken():
    config = config_of("tokens")
    chosen = choose_shape(17, 3, config)
    assert (chosen.num_tokens, chosen.num_seqs) == (32, 4)
    chosen = choose_shape(33, 5, config)
    assert (chosen.num_tokens, chosen.num_seqs) == (40, 6)
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
