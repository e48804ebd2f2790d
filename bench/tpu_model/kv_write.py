# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Predict the TPU writes from their compiled schedules: which loop runs how often in which case.

`predict` compiles each case for its generation, names the loops of the shipped kernel by what is in
them (`_roles`), counts how often the case runs each of them (`_count_trips`) and adds up bundles.
That the DMAs come out as many as the case has entries is checked at every prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from bench.cases.kv_write import WriteCase
from bench.cases.rounding import ceil_div
from bench.tpu_model import schedule as ts
from pallas_paged.kv_write.options import WriteOptions
from pallas_paged.kv_write.tpu import launch as mosaic_tpu
from pallas_paged.kv_write.tpu.spec import KernelSpec

# What published data prove of the DMA engine: 640 slices, two DMAs each, in 22.8 us on a v6e
# (vLLM PR 20415, 128 slices a step, where latency vanishes); see bench.tpu_model.published.
DESCRIPTOR_NS = 18.0


def spec_of(case: WriteCase) -> KernelSpec:
    """The kernel's static parameters for a case, with the shipped block sizes."""
    pool, k = case.shapes()[:2]
    options = WriteOptions("mosaic_tpu", False, config=None, num_kv_heads=case.num_kv_heads)
    return mosaic_tpu.plan(
        {"slice": "slice_write", "token": "token_write"}.get(case.op, "page_write"),
        pool,
        k,
        options,
        num_entries=case.num_tokens if case.op == "token" else case.num_pages,
        has_token_starts=case.op in ("page_starts", "slice"),
    )


def compile_target(**fields: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What `bench.tpu_model.compile.Job` compiles: a case, by its fields."""
    case = WriteCase(**fields)
    return case.step("mosaic_tpu"), case.shapes(), {"donate_argnums": 0}


@dataclasses.dataclass(frozen=True)
class WritePrediction:
    """What a compiled schedule says of a case. A prediction, not a measurement.

    Attributes:
      case: the case.
      num_dmas: DMAs into the pool.
      cycles_per_issue: bundles of the unrolled body that a full block takes, by DMA: id load,
        range check, addresses, issue and count.
      schedule_cycles: bundles of the whole call, everything that a block costs included.
      hbm_cycles: cycles that the bytes take at peak HBM bandwidth.
      descriptor_cycles: cycles at one DMA in `DESCRIPTOR_NS`.
      num_xla_passes: launches of XLA's own before the kernel (metadata); not in the cycles.
    """

    case: WriteCase
    num_dmas: int
    cycles_per_issue: float
    schedule_cycles: float
    hbm_cycles: float
    descriptor_cycles: float
    num_xla_passes: int

    def microseconds(self, descriptors: bool) -> float:
        """Time if the slowest of the units sets it; with or without the descriptor bound."""
        return ts.microseconds(max(self._bounds(descriptors).values()), self.case.generation)

    def bound(self, descriptors: bool) -> str:
        """The unit that sets it: "HBM", "issue" or "18 ns"."""
        bounds = self._bounds(descriptors)
        return max(bounds, key=lambda name: bounds[name])

    def _bounds(self, descriptors: bool) -> dict[str, float]:
        bounds = {"HBM": self.hbm_cycles, "issue": self.schedule_cycles}
        if descriptors:
            bounds[f"{DESCRIPTOR_NS:.0f} ns"] = self.descriptor_cycles
        return bounds


def predict(
    cases: Sequence[WriteCase], *, on_done: Callable[[ts.Job, float], None] | None = None
) -> list[WritePrediction]:
    """Compiles the cases and predicts each from its schedule.

    Cases whose kernels differ in nothing but trip counts share a compile.

    Raises:
      RuntimeError: libtpu is missing or failed.
      ValueError: the schedule does not have the loops that the kernel is written with.
    """
    representatives = list(dict.fromkeys(map(representative, cases)))
    jobs = [
        ts.Job(
            f"{c.generation} {c.op} page {c.page_size} tokens {c.num_tokens} flat {c.is_flat}",
            "bench.tpu_model.kv_write:compile_target",
            c.generation,
            dataclasses.asdict(c),
        )
        for c in representatives
    ]
    compiled = dict(zip(representatives, ts.schedules(jobs, on_done=on_done), strict=True))
    return [_predict(case, compiled[representative(case)]) for case in cases]


def representative(case: WriteCase) -> WriteCase:
    """The case whose kernel has the same body: one with full groups, in one step or several."""
    step = mosaic_tpu.ELEMENTS_PER_STEP * (1 if case.op == "token" else case.page_size)
    # So many that XLA cannot prefetch k and v to VMEM, which would time another kernel.
    tokens = 2 * step if case.num_tokens > step else 65536
    page_size = 1 if case.op == "token" else case.page_size
    return dataclasses.replace(case, num_tokens=tokens, page_size=page_size)


@dataclasses.dataclass(frozen=True)
class _Trips:
    """Trips that a case makes: totals over the call."""

    steps: int
    groups: int
    bodies: int
    chunks: int
    singles: int
    groups_with_singles: int
    plan_chunks: int
    plan_entries: int
    one_by_one: int  # groups that the kernel plans entry by entry


def _count_trips(case: WriteCase) -> tuple[_Trips, int, int]:
    """How often a dense case runs what the kernel plans, the unroll, and the number of chunks.

    The kernel's own grouping (`grouping.find_group`) on paper.
    """
    spec = spec_of(case)
    num_entries = spec.num_elements * spec.chunks_per_element
    group, unroll = spec.chunks_per_group, spec.chunks_per_iteration
    step = spec.chunks_per_step
    totals = dict.fromkeys((f.name for f in dataclasses.fields(_Trips)), 0)
    for first_of_step in range(0, num_entries, step):
        totals["steps"] += 1
        last_of_step = min(first_of_step + step, num_entries)
        i = first_of_step
        while i < last_of_step:
            size = min(group, last_of_step - i)
            if spec.has_token_starts and size >= unroll:
                size -= size % unroll
                totals["plan_chunks"] += size // unroll
            elif spec.has_token_starts:
                totals["one_by_one"] += 1
                totals["plan_entries"] += size - 1
            tokens = size * spec.chunk_tokens + (i * spec.chunk_tokens) % spec.row_align
            totals["groups"] += 1
            totals["bodies"] += ceil_div(tokens, spec.tiling.tile * spec.tiling.tiles_per_iteration)
            singles = size % unroll if unroll > 1 else size
            totals["chunks"] += (size - singles) // unroll
            totals["singles"] += singles
            totals["groups_with_singles"] += singles > 0
            i += size
    return _Trips(**totals), unroll, num_entries


def _roles(tree: ts.Node, case: WriteCase, unroll: int) -> dict[tuple[int, ...], str]:
    """Path -> role of every loop of the kernel and of the regions that issue, by what is in them.

    The fast form of a chunk has no role where the compiler has predicated it into the group's loop.
    """
    loops = [node for node in tree.walk() if node.kind == "loop"]
    one_chunk = case.op in ("page", "page_starts") and unroll > 1  # spec.is_one_iteration

    def stores(node: ts.Node) -> float:
        return node.total.vector_stores

    def sends(node: ts.Node) -> float:
        return node.total.dmas.get("vmem_to_hbm", 0)

    names = {"page": ["checked"], "page_starts": ["unchecked", "checked"], "token": ["checked"]}
    chunks = names.get(case.op, ["equal", "unchecked", "checked"]) if unroll > 1 else []
    issue = [n for n in loops if sends(n) and not stores(n)]
    if one_chunk:  # no loop around the chunk; a short one the compiler may have predicated
        inline = [n for n in loops if _own_sends(n) == unroll and stores(n)]
        regions = [n for n in tree.walk() if n.kind == "branch" and _own_sends(n) == unroll]
        chunks = chunks[len(inline) :]
        issue = [*regions, *issue]
    turn = [n for n in loops if stores(n) and not sends(n)]
    scalar = [n for n in loops if not stores(n) and not sends(n)]
    counts = [n for n in scalar if any(_is_inside(n, other) for other in issue)]
    plans = [n for n in scalar if n not in counts]
    outer = [n for n in loops if stores(n) and sends(n)]
    # Before the loop and in it; where a group is one chunk there is no loop over chunks.
    plan_names = {"page_starts": ["open_entries", "plan_entries"]}.get(case.op, [])
    if case.op == "slice":
        plan_names = ["open_chunks", "open_entries", "plan_chunks", "plan_entries"]
    wanted = (len(chunks) + 1, 1, len(plan_names))
    if (len(issue), len(turn), len(plans)) != wanted or not outer:
        raise ValueError(
            f"{case}: the schedule has {len(issue)} issue regions, {len(turn)} turning loops, "
            f"{len(plans)} planning loops; wanted {wanted}:\n{ts.describe(tree)}"
        )
    roles = {n.path: "count" for n in counts}
    roles |= {n.path: name for n, name in zip(issue, [*chunks, "single"], strict=True)}
    roles |= {n.path: "body" for n in turn}
    roles |= {n.path: name for n, name in zip(plans, plan_names, strict=True)}
    innermost = max(outer, key=lambda n: len(n.path))
    return roles | {n.path: "group" if n is innermost else "step" for n in outer}


def _own_sends(node: ts.Node) -> float:
    """DMAs into the pool that a region issues itself and not in a region or loop inside it."""
    return node.own.dmas.get("vmem_to_hbm", 0)


def _spacing(kernel: ts.Kernel, roles: dict[tuple[int, ...], str]) -> float:
    """Bundles from one DMA to the next of those that stand in the group's loop itself."""
    group = next(n for n in kernel.tree.walk() if roles.get(n.path) == "group")
    inside = {i for child in group.children for i in range(child.first, child.last + 1)}
    at = [
        i
        for i in range(group.first, group.last + 1)
        if i not in inside and kernel.bundles[i].dmas.get("vmem_to_hbm")
    ]
    return (at[-1] - at[0]) / (len(at) - 1)


def _is_inside(node: ts.Node, other: ts.Node) -> bool:
    return len(node.path) > len(other.path) and node.path[: len(other.path)] == other.path


def _predict(case: WriteCase, schedule: ts.Schedule) -> WritePrediction:
    kernels = [k for k in schedule.kernels if "_write_" in k.name]
    if len(kernels) != 1:
        raise ValueError(f"{case}: {len(kernels)} write kernels compiled; wanted 1")
    tree = kernels[0].tree
    tensors = [o for o in kernels[0].operands if "," in o.shape]  # metadata has one dimension
    elsewhere = [o for o in tensors if o.space != "hbm"]
    if elsewhere:
        raise ValueError(f"{case}: XLA put {elsewhere} outside HBM; the model is of transfers")
    made, unroll, num_entries = _count_trips(case)
    roles = _roles(tree, case, unroll)
    fast = {"page": "checked", "token": "checked", "page_starts": "unchecked", "slice": "equal"}[
        case.op
    ]
    per_group = 1.0 / made.groups
    trips = {
        "step": made.steps,
        "group": made.groups / made.steps,
        "body": made.bodies * per_group,
        **dict.fromkeys(("equal", "unchecked", "checked", "count"), 0.0),
        "single": made.singles / max(1, made.groups_with_singles),
        fast: made.chunks * per_group,
        "plan_chunks": made.plan_chunks * per_group,
        # Each step plans its first group before the loop; counted as an average one.
        "open_chunks": made.plan_chunks * per_group,
        "plan_entries": made.plan_entries / max(1, made.one_by_one),
        "open_entries": made.plan_entries / max(1, made.one_by_one),
    }

    def roles_in(node: ts.Node) -> set[str]:
        return {roles[n.path] for n in node.walk() if n.path in roles}

    def is_single(node: ts.Node) -> bool:
        """Whether a region runs only where a group has entries that fill no chunk."""
        inside = roles_in(node)
        return "single" in inside and not inside & {"group", "step"}

    def probability(node: ts.Node) -> float:
        """How often a region that may be skipped runs, when it is reached, by what is in it."""
        if node.path in roles:
            return trips[roles[node.path]]
        inside = roles_in(node)
        if is_single(node):
            nested = any(_is_inside(node, other) and is_single(other) for other in branches)
            return 1.0 if nested else made.groups_with_singles * per_group
        if inside == {"count"}:
            return 0.0  # a chunk with an entry to skip; a dense case has none
        if inside in ({"plan_entries"}, {"open_entries"}) and not node.total.dma_issues:
            return made.one_by_one * per_group
        return 1.0

    branches = [node for node in tree.walk() if node.kind == "branch"]
    counts = ts.executed(
        tree,
        loops=[(ts.at(*n.path), trips[roles[n.path]]) for n in tree.walk() if n.kind == "loop"],
        branches=[(ts.at(*node.path), probability(node)) for node in branches],
    )
    fast = fast if unroll > 1 else "single"
    body = next((n for n in tree.walk() if roles.get(n.path) == fast), None)
    sent = counts.dmas["vmem_to_hbm"]
    if body is None:
        sent -= unroll * (made.groups - made.chunks)  # predicated off
        cycles_per_issue = _spacing(kernels[0], roles)
    else:
        rare = sum(n.total.bundles for n in body.children)
        cycles_per_issue = (body.total.bundles - rare) / unroll
    if abs(sent - num_entries) > 1e-6 * num_entries:
        raise ValueError(
            f"{case}: the weighted schedule sends {sent} DMAs; the case has {num_entries} entries"
        )
    return WritePrediction(
        case=case,
        num_dmas=num_entries,
        cycles_per_issue=cycles_per_issue,
        schedule_cycles=counts.bundles,
        hbm_cycles=ts.hbm_cycles(case.num_bytes, case.generation),
        descriptor_cycles=num_entries * DESCRIPTOR_NS * ts.GENERATIONS[case.generation].clock_ghz,
        num_xla_passes=len(schedule.kernels) - 1,
    )
