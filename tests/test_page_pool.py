# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Pages are handed out once, counted, and come back."""

import collections

import hypothesis
import pytest
from hypothesis import strategies as st

from reference_engine.page_pool import PagePool


def test_allocation_is_all_or_nothing():
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.allocate(1) is None


def test_the_least_recently_freed_page_goes_out_first_and_fronts_outlive_tails():
    pool = PagePool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(4) == [*reversed(second), *reversed(first)]


def test_a_shared_page_stays_until_its_last_holder_lets_go():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.retain(pages)
    pool.release(pages)
    assert pool.references(pages[0]) == 1
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 2


@pytest.mark.parametrize("page_id", [0, 3, -1, 4])
def test_a_page_that_nobody_holds_cannot_be_released_or_shared(page_id):
    pool = PagePool(4)
    held = pool.allocate(3)[1:]
    pool.release([0])
    for change in (pool.release, pool.retain):
        with pytest.raises(ValueError, match=f"page {page_id} has 0 references"):
            change([*held, page_id])
    assert [pool.references(i) for i in range(4)] == [0, 1, 1, 0]  # nothing half done


def test_a_page_is_released_at_most_as_often_as_it_is_held():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    with pytest.raises(ValueError, match=f"page {page} has 1 references, 2 were named"):
        pool.release([page, page])
    assert pool.num_free == 1


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.tuples(st.sampled_from("ars"), st.integers(0, 9)), max_size=60))
def test_references_balance_under_any_order(actions):
    pool = PagePool(8)
    holders: list[list[int]] = []
    for action, number in actions:
        if action == "a":
            pages = pool.allocate(number)
            if pages is not None:
                holders.append(pages)
        elif holders and action == "r":
            pool.release(holders.pop(number % len(holders)))
        elif holders:
            shared = list(holders[number % len(holders)])
            pool.retain(shared)
            holders.append(shared)
        held = collections.Counter(page for pages in holders for page in pages)
        assert [pool.references(i) for i in range(8)] == [held[i] for i in range(8)]
        assert pool.num_free == 8 - len(held)
    for pages in holders:
        pool.release(pages)
    assert pool.num_free == 8
