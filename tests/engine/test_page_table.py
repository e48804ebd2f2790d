# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The table on the device is what the requests hold, whatever happens in between."""

import array
import random

import numpy as np
import pytest

from reference_engine import page_table as page_table_lib
from reference_engine.page_table import PageTable
from reference_engine.step_plan import Segment

WIDTH, NUM_ROWS, MAX_CHANGES = 9, 4, 5


def segment_of(request_id, page_ids):
    return Segment(request_id, 0, (1,), page_ids, samples=True, is_decode=True)


def run_at_random(seed, num_steps=300):
    """Random steps of requests that grow, end, lose their pages and come back; what happened.

    After each step every row on the device is checked. One step in ten fails at some point.
    """
    rng = random.Random(seed)
    table = PageTable(NUM_ROWS, WIDTH)
    requests, num_requests = {}, 0
    counts = {"sent": 0, "changed": 0, "failed": 0, "nothing": 0}

    def pages(most):
        return array.array("i", (rng.randrange(1000) for _ in range(rng.randint(1, most))))

    for _ in range(num_steps):
        while len(requests) < NUM_ROWS + 2 and rng.random() < 0.7:
            requests[num_requests] = pages(WIDTH)
            num_requests += 1
        for request_id in list(requests):
            if rng.random() < 0.1:
                del requests[request_id]
            elif rng.random() < 0.1:
                requests[request_id] = pages(WIDTH)  # preempted, and admitted again
            elif rng.random() < 0.3:
                requests[request_id].extend(pages(2)[: WIDTH - len(requests[request_id])])
        chosen = rng.sample(sorted(requests), min(len(requests), rng.randint(0, NUM_ROWS)))
        segments = [segment_of(request_id, requests[request_id]) for request_id in chosen]
        had_table = table.on_device is not None
        rows, changes = table.update(segments, MAX_CHANGES)
        assert changes.shape[0] == 3 and changes.shape[1] <= MAX_CHANGES
        fails = rng.random()
        if fails < 0.05:  # in the packing
            counts["failed"] += 1
            continue
        taken = table.take()
        is_sent = not isinstance(taken, np.ndarray)
        assert is_sent or had_table
        on_device = np.array(taken)
        if fails < 0.1:  # in the dispatch
            counts["failed"] += 1
            continue
        on_device[changes[0], changes[1]] = changes[2]
        assert len(set(rows.tolist())) == len(rows)
        for row, segment in zip(rows, segments, strict=True):
            assert on_device[row, : len(segment.page_ids)].tolist() == list(segment.page_ids)
            assert table.host[row].tolist() == on_device[row].tolist()
        table.on_device = on_device
        counts["sent" if is_sent else "changed" if changes.size else "nothing"] += 1
    return counts


def test_each_row_on_the_device_is_what_its_request_holds():
    counts = run_at_random(0)
    for seed in range(1, 20):
        for name, count in run_at_random(seed).items():
            counts[name] += count
    assert min(counts.values()) > 100, counts


def _keep_the_rows_after_an_error(table, segments, max_changes):
    if table.on_device is None and table._rows:
        table.on_device = table.host.copy() * 0
    return _real_update(table, segments, max_changes)


def _never_free(table, segment, segments):
    if not table._free and segment.request_id not in table._rows:
        table._free.append(0)
    return _real_take_row(table, segment, segments)


_real_update, _real_take_row = PageTable.update, PageTable._take_row


@pytest.mark.parametrize(
    "name, fault",
    [
        ("update", _keep_the_rows_after_an_error),
        ("_take_row", _never_free),
    ],
)
def test_the_check_finds_planted_faults(monkeypatch, name, fault):
    monkeypatch.setattr(page_table_lib.PageTable, name, fault)
    with pytest.raises(AssertionError):
        for seed in range(20):
            run_at_random(seed)


def test_what_was_sent_does_not_change_with_the_host():
    table = PageTable(NUM_ROWS, WIDTH)
    held = array.array("i", [3])
    table.update([segment_of(0, held)], MAX_CHANGES)
    table.on_device = table.take()
    held.append(5)
    rows, changes = table.update([segment_of(0, held)], MAX_CHANGES)
    assert rows.tolist() == [0] and changes.T.tolist() == [[0, 1, 5]]
    assert np.asarray(table.take())[0, :2].tolist() == [3, -1]


def test_steady_decodes_send_nothing_but_new_pages():
    table = PageTable(512, 2720)
    held = [array.array("i", range(i, i + 2000)) for i in range(512)]
    segments = [segment_of(i, page_ids) for i, page_ids in enumerate(held)]
    table.update(segments, 512)
    table.on_device = table.take()
    for step in range(5):
        held[7 * step].append(step)
        rows, changes = table.update(segments[::-1], 512)  # in any order
        assert rows.tolist() == list(range(512))[::-1]
        assert changes.T.tolist() == [[7 * step, 2000, step]]
        table.on_device = table.take()
