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
    assert pool.take(pages, 0) == pages
    pool.release(pages)
    assert pool.references(pages[0]) == 1
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 2


@pytest.mark.parametrize("page_id", [0, 3, -1, 4])
def test_a_page_that_nobody_holds_cannot_be_released_or_published(page_id):
    pool = PagePool(4)
    held = pool.allocate(3)[1:]
    pool.release([0])
    for change in (lambda: pool.release([*held, page_id]), lambda: pool.publish(page_id, b"x")):
        with pytest.raises(ValueError, match=f"page {page_id} has 0 references"):
            change()
    assert pool.num_cached == 0
    assert [pool.references(i) for i in range(4)] == [0, 1, 1, 0]  # nothing half done


def test_a_page_is_released_at_most_as_often_as_it_is_held():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    with pytest.raises(ValueError, match=f"page {page} has 1 references, 2 were named"):
        pool.release([page, page])
    assert pool.num_free == 1


def test_a_published_page_is_found_until_it_is_handed_out_anew():
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.publish(pages[0], b"a")
    pool.publish(pages[1], b"b")
    assert pool.find([b"a", b"b", b"c"]) == pages
    assert pool.find([b"c", b"a"]) == []  # a chain: nothing behind a page that is not known
    pool.release(pages)
    assert pool.num_free == 3 and pool.find([b"a", b"b"]) == pages
    assert pool.allocate(2) == [2, 1]  # the least recently used: the tail goes before its front
    assert pool.find([b"a", b"b"]) == [0]
    assert pool.take([0], 1) is None and pool.take([0], 0) == [0]
    assert (pool.num_free, pool.references(0)) == (0, 1)


def test_of_equal_pages_the_first_that_is_left_is_found():
    pool = PagePool(3)
    first, second, third = pool.allocate(3)
    for page in (first, second, third):
        pool.publish(page, b"a")
    pool.publish(second, b"a")  # again: its place in the order stays
    pool.release([third])
    assert pool.find([b"a"]) == [first] and pool.num_cached == 1
    pool.release([first])
    assert pool.allocate(2) == [third, first]
    assert pool.find([b"a"]) == [second]  # held all along
    pool.release([second])
    assert pool.find([b"a"]) == [second]
    pool.allocate(1)
    assert pool.find([b"a"]) == [] and pool.num_cached == 0


def test_a_page_is_known_by_its_last_content_alone():
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"b")
    pool.publish(first, b"b")
    assert pool.find([b"a"]) == [] and pool.find([b"b"]) == [second] and pool.num_cached == 1


def test_a_reset_frees_whatever_was_held():
    pool = PagePool(3)
    pool.publish(pool.allocate(2)[0], b"a")
    pool.reset()
    assert pool.num_free == 3 and pool.num_cached == 0 and pool.find([b"a"]) == []
    assert pool.allocate(3) == [0, 1, 2]


def test_what_is_found_free_is_not_handed_out_as_new():
    pool = PagePool(3)
    pages = pool.allocate(3)
    pool.publish(pages[0], b"a")
    pool.release(pages)
    assert pool.can_take([0], 2) and not pool.can_take([0], 3)
    assert sorted(pool.take([0], 2)) == [0, 1, 2]


def test_everything_can_be_forgotten():
    pool = PagePool(2)
    pool.publish(pool.allocate(1)[0], b"a")
    pool.forget_all()
    assert pool.find([b"a"]) == [] and pool.num_cached == 0
    pool.publish(0, b"b")
    assert pool.find([b"b"]) == [0]


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from("artp"), st.integers(0, 9), st.integers(0, 5)), max_size=60)
)
def test_references_balance_under_any_order(actions):
    pool = PagePool(8)
    holders: list[list[int]] = []
    known: list[tuple[bytes, int]] = []  # contents and pages, as they were published
    for action, number, other in actions:
        if action == "a":
            pages = pool.allocate(number)
            if pages is not None:
                holders.append(pages)
                known = [(key, page) for key, page in known if page not in pages]
        elif action == "t":
            found = pool.find([bytes([number])])
            assert found == [page for key, page in known if key == bytes([number])][:1]
            pages = pool.take(found, other)
            if pages is not None:
                holders.append(pages)
                new = pages[len(found) :]
                known = [(key, page) for key, page in known if page not in new]
        elif holders and action == "r":
            pool.release(holders.pop(number % len(holders)))
        elif holders and holders[number % len(holders)]:
            page = holders[number % len(holders)][0]
            key = bytes([other])
            pool.publish(page, key)
            if (key, page) not in known:
                known = [(k, p) for k, p in known if p != page] + [(key, page)]
        held = collections.Counter(page for pages in holders for page in pages)
        assert [pool.references(i) for i in range(8)] == [held[i] for i in range(8)]
        assert pool.num_free == 8 - len(held)
        assert pool.num_cached == len({key for key, _ in known})
    for pages in holders:
        pool.release(pages)
    assert pool.num_free == 8
