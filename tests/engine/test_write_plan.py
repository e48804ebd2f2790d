# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Every new token is written once, where its request's page table says, in every form."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from reference_engine.scheduler import Segment
from reference_engine.write_plan import WritePlan, plan_writes


def check_write_plan(plan: WritePlan, segments, page_size: int) -> None:
    """Raises AssertionError unless every form of the plan writes exactly the segments' tokens."""
    expected = []  # the slot of every packed token, token by token
    for segment in segments:
        for position in range(segment.start, segment.end):
            page_id = segment.page_ids[position // page_size]
            expected.append(page_id * page_size + position % page_size)
    assert plan.slots.tolist() == expected
    by_page = _tokens_by_slot(
        plan.page_ids * page_size, plan.token_starts, np.full_like(plan.page_ids, page_size)
    )
    mixed = [*by_page, *_tokens_by_slot(*plan.slices)]
    assert sorted(mixed, key=lambda pair: pair[1]) == [(s, t) for t, s in enumerate(expected)]
    only_slices = _tokens_by_slot(*plan.all_slices(page_size))
    assert sorted(only_slices) == sorted(mixed)
    first_slots, _, lengths = plan.slices
    assert np.all(lengths >= 1) and np.all(lengths < page_size)
    assert np.all(first_slots // page_size == (first_slots + lengths - 1) // page_size)


def _tokens_by_slot(slots, tokens, lengths):
    return [
        (slot + i, token + i)
        for slot, token, length in zip(
            slots.tolist(), tokens.tolist(), lengths.tolist(), strict=True
        )
        for i in range(length)
    ]


def make_segment(request_id, start, length, page_ids):
    token_ids = (7,) * length
    return Segment(request_id, start, token_ids, tuple(page_ids), samples=True, is_decode=False)


@st.composite
def _steps(draw):
    page_size = draw(st.integers(1, 9))
    pages = iter(draw(st.permutations(range(60))))
    segments = []
    for request_id in range(draw(st.integers(0, 5))):
        start, length = draw(st.integers(0, 30)), draw(st.integers(1, 30))
        length = min(length, 10 * page_size - start % page_size)
        num_pages = -(-(start + length) // page_size)
        start -= max(0, num_pages - 10) * page_size  # at most 10 pages each
        num_pages = min(num_pages, 10)
        page_ids = [next(pages) for _ in range(num_pages + draw(st.integers(0, 1)))]
        segments.append(make_segment(request_id, start, length, page_ids))
    return segments, page_size


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=200)
@hypothesis.given(_steps())
def test_every_token_is_covered_once(step):
    segments, page_size = step
    check_write_plan(plan_writes(segments, page_size), segments, page_size)


@pytest.mark.parametrize("start, length", [(1, 64), (1, 15), (17, 15), (17, 20), (15, 1), (16, 16)])
def test_chunks_that_start_inside_a_page(start, length):
    # These starts crashed, or silently moved a token to the front of its page, where a plan
    # took for granted that a prefill starts on a boundary.
    segments = [make_segment(0, start, length, [11, 3, 8, 2, 9])]
    check_write_plan(plan_writes(segments, 16), segments, 16)


def test_a_step_without_segments_writes_nothing():
    plan = plan_writes([], 4)
    assert plan.slots.shape == plan.page_ids.shape == plan.token_starts.shape == (0,)
    assert plan.slices.shape == plan.all_slices(4).shape == (3, 0)


def _wrong_page(plan):
    plan.page_ids[0] += 1


def _wrong_source(plan):
    plan.token_starts[-1] -= 1


def _slice_moved_to_the_front_of_its_page(plan):
    plan.slices[0, 0] -= plan.slices[0, 0] % 4


def _slice_too_short(plan):
    plan.slices[2, -1] -= 1


def _wrong_slot(plan):
    plan.slots[3] += 1


@pytest.mark.parametrize(
    "plant",
    [
        _wrong_page,
        _wrong_source,
        _slice_moved_to_the_front_of_its_page,
        _slice_too_short,
        _wrong_slot,
    ],
)
def test_the_check_finds_planted_bugs(plant):
    segments = [make_segment(0, 3, 9, [5, 2, 9]), make_segment(1, 0, 6, [4, 7])]
    plan = plan_writes(segments, 4)
    check_write_plan(plan, segments, 4)
    plant(plan)
    with pytest.raises(AssertionError):
        check_write_plan(plan, segments, 4)
