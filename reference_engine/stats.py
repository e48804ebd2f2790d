# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The counts of an engine, and what they can tell of the time in which the device idles."""

from __future__ import annotations

import dataclasses

from reference_engine.scheduler import Scheduler
from reference_engine.step_plan import StepPlan


@dataclasses.dataclass
class Stats:
    """Counts over the life of an engine.

    A step is counted when its tokens have been read. Times are those of the host's clock. They show
    who waits for whom; how long the device idles is for a profiler to say.

    Attributes:
      num_steps: the steps that computed something.
      num_tokens: the tokens computed, including those that were computed again, without those that
        were discarded.
      num_discarded: the tokens computed in vain: their request had ended, was aborted or had lost
        its pages when the step was read.
      num_padding: the rows of the batches that held no token.
      num_cached: the tokens that were found in the prefix cache.
      num_deferrals: how often alignment made a request wait for a step.
      num_preemptions: how often a request lost its pages.
      seconds: the time spent in `Engine.step` without callbacks.
      wait_seconds: the part of it in which the host waited for the tokens of a step. The rest is
        the host's work. Where that runs beside the device's, a step takes about the longer of both.
      num_late_steps: the steps before which the device idled. When the dispatch of such a step
        returned, the step before had ended, or no step was in flight. Without `async_scheduling`
        every step is one; with it, the first step after a pause is one.
      num_recompiles: the programs that XLA compiled in steps after `warm_up`; it should be 0.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_discarded: int = 0
    num_padding: int = 0
    num_cached: int = 0
    num_deferrals: int = 0
    num_preemptions: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    num_late_steps: int = 0
    num_recompiles: int = 0

    def count(self, plan: StepPlan, num_padding: int, scheduler: Scheduler) -> None:
        """Counts a step that the scheduler has just committed."""
        self.num_steps += 1
        self.num_tokens += plan.num_tokens - (scheduler.num_discarded - self.num_discarded)
        self.num_discarded = scheduler.num_discarded
        self.num_padding += num_padding
        self.num_deferrals += len(plan.deferrals)
        self.num_preemptions += len(plan.preempted)
        self.num_cached = scheduler.num_cached
