# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Explains what each step did and why, in words and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from reference_engine.engine import Engine
from reference_engine.extras import import_extra
from reference_engine.outputs import Output
from reference_engine.replay import Job
from reference_engine.scheduler import Segment
from reference_engine.write_plan import plan_writes


def explain_step(step: int, engine: Engine, outputs: list[Output], jobs: Sequence[Job]) -> str:
    """The engine's last step in words.

    Says which requests were scheduled, what each of them wrote where, which requests wait, and why.

    Args:
      step: the step's number.
      engine: the engine after the step, without `async_scheduling`.
      outputs: what the step returned.
      jobs: the requests by their ids.
    """
    plan, config = engine.last_plan, engine.config
    assert plan is not None
    lines = [
        f"step {step}: {plan.num_tokens} of {plan.budget} tokens; pages free:"
        f" {engine.scheduler.pool.num_free} of {config.num_pages}; requests waiting:"
        f" {len(engine.scheduler.waiting)}"
    ]
    for segment in plan.segments:
        job = jobs[segment.request_id]
        lines.append(
            f"  request {segment.request_id} {'decode ' if segment.is_decode else 'prefill'}"
            f" [{segment.start}, {segment.end}) of {len(job.prompt_ids)} + {job.max_tokens}: "
            + _explain_writes(segment, config.page_size)
        )
    for deferral in plan.deferrals:
        missing = config.page_size - deferral.num_computed % config.page_size
        lines.append(
            f"  request {deferral.request_id} deferred at {deferral.num_computed}: the next page"
            f" boundary is {missing} tokens away, {deferral.budget} are left of the budget"
        )
    for request_id in plan.preempted:
        lines.append(f"  request {request_id} preempted: its pages went to an earlier request")
    if plan.blocked is not None:
        wanted, free = plan.blocked.num_pages, plan.blocked.num_free
        why = f"it wants {wanted} pages and {free} are free"
        if wanted <= free:
            why = f"max_num_seqs={config.max_num_seqs} requests are running"
        lines.append(f"  request {plan.blocked.request_id} not admitted: {why}")
    for output in outputs:
        if output.finish_reason is not None:
            lines.append(f"  request {output.request_id} finished: {output.finish_reason}")
    return "\n".join(lines)


class Timeline:
    """Steps to draw: one row per request, and one mark per segment, deferral or preemption."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        # kind -> (step, request) of every mark
        self._marks: dict[str, list[tuple[int, int]]] = {
            "prefill": [],
            "decode": [],
            "deferred": [],
            "preempted": [],
        }
        self._tokens: list[tuple[int, int, int]] = []  # step, tokens of prefills, of decodes

    def observe(self, step: int, engine: Engine) -> None:
        """Adds the engine's last step."""
        plan = engine.last_plan
        assert plan is not None
        tokens = {"prefill": 0, "decode": 0}
        for segment in plan.segments:
            kind = "decode" if segment.is_decode else "prefill"
            self._marks[kind].append((step, segment.request_id))
            tokens[kind] += len(segment.token_ids)
        self._marks["deferred"] += [(step, d.request_id) for d in plan.deferrals]
        self._marks["preempted"] += [(step, request_id) for request_id in plan.preempted]
        self._tokens.append((step, tokens["prefill"], tokens["decode"]))

    def save(self, path: str | os.PathLike, title: str) -> None:
        """Writes a PNG file.

        Raises:
          ImportError: matplotlib is not installed.
          OSError: the file cannot be written.
        """
        figure_class = import_figure()
        figure = figure_class(figsize=(11, 6), dpi=150, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        looks = {
            "prefill": ("s", "C0"),
            "decode": ("|", "C2"),
            "deferred": ("x", "C3"),
            "preempted": ("v", "C1"),
        }
        for kind, marks in self._marks.items():
            marker, color = looks[kind]
            if marks:
                above.plot(*zip(*marks, strict=True), marker, color=color, label=kind, markersize=4)
        above.set(ylabel="request", title=title)
        above.invert_yaxis()
        above.legend(loc="upper right")
        steps, prefills, decodes = zip(*self._tokens, strict=True)
        below.stackplot(steps, decodes, prefills, colors=["C2", "C0"], step="mid")
        below.axhline(self._budget, color="black", linewidth=0.8, linestyle="--")
        below.set(xlabel="step", ylabel="tokens")
        figure.savefig(path, format="png")


def import_figure() -> Any:
    """matplotlib's Figure class. It does without pyplot, which would look for a display.

    Raises:
      ImportError: matplotlib is not installed; the message says how to install it.
    """
    return import_extra("matplotlib.figure", extra="plot", needed_by="--plot").Figure


def _explain_writes(segment: Segment, page_size: int) -> str:
    writes = plan_writes([segment], page_size)
    parts = []
    if len(writes.page_ids):
        parts.append(f"whole pages {_ranges(writes.page_ids.tolist())}")
    for slot, _, length in writes.slices.T.tolist():
        page, row = divmod(slot, page_size)
        rows = f"row {row}" if length == 1 else f"rows {row}-{row + length - 1}"
        parts.append(f"page {page} {rows}")
    return ", ".join(parts)


def _ranges(ids: list[int]) -> str:
    """Page ids as text; consecutive ids, rising or falling, as first-last.

    >>> _ranges([3, 4, 5, 9, 8, 1])
    '3-5 9-8 1'
    """
    runs: list[list[int]] = []
    for page_id in ids:
        run = runs[-1] if runs else []
        if len(run) == 1 and abs(page_id - run[0]) == 1:
            run.append(page_id)
        elif len(run) == 2 and page_id - run[1] == (1 if run[1] > run[0] else -1):
            run[1] = page_id
        else:
            runs.append([page_id])
    return " ".join("-".join(map(str, run)) for run in runs)
