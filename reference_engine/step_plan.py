# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The plan of a step: what is computed, and who waits or loses its pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """The new tokens of one request in one step.

    Attributes:
      request_id: the request.
      start: the position of the first token; as many tokens are in the pool already.
      token_ids: the tokens at positions [start, end). The last one is -1 - r if the host does not
        know it yet, because row r of the step in flight yields it.
      page_ids: the request's pages in order, enough for `end` tokens. It is no copy: it may grow.
      samples: whether the request has no token after `end`, so that the step yields a new one.
      is_decode: whether it is a decode; every other segment is part of a prefill.
    """

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    page_ids: Sequence[int]
    samples: bool
    is_decode: bool

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class Deferral:
    """A request that alignment makes wait: `budget` tokens do not reach the next page boundary."""

    request_id: int
    num_computed: int
    budget: int


@dataclasses.dataclass(frozen=True, slots=True)
class Blocked:
    """The first request of the queue, if it cannot be admitted.

    It wants `num_pages` new pages, and `num_free` are free. Where those are enough, max_num_seqs
    requests are running already.
    """

    request_id: int
    num_pages: int
    num_free: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
      segments: what to compute.
      deferrals: the requests that wait for a page boundary.
      preempted: the ids of the requests that lost their pages, in the order in which they did.
      blocked: the request that could not be admitted, if there is one.
      budget: the tokens that the step might have had.
      left_over: what the next step has beside its own budget.
    """

    segments: tuple[Segment, ...]
    deferrals: tuple[Deferral, ...] = ()
    preempted: tuple[int, ...] = ()
    blocked: Blocked | None = None
    budget: int = 0
    left_over: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)


@dataclasses.dataclass(slots=True)
class Draft:
    """A StepPlan in the making.

    Attributes:
      budget: what is left of the step's budget.
      contended: whether more than one request competes for the step.
      num_ending: the running requests that get nothing, because a step in flight ends them.
      segments, deferrals, preempted, blocked: see StepPlan.
    """

    budget: int
    contended: bool
    num_ending: int = 0
    segments: list[Segment] = dataclasses.field(default_factory=list)
    deferrals: list[Deferral] = dataclasses.field(default_factory=list)
    preempted: list[int] = dataclasses.field(default_factory=list)
    blocked: Blocked | None = None

    def finish(self, *, budget: int, left_over: int) -> StepPlan:
        """The plan."""
        return StepPlan(
            tuple(self.segments),
            tuple(self.deferrals),
            tuple(self.preempted),
            self.blocked,
            budget,
            left_over,
        )
