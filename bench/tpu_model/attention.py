# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Predict the TPU attention from its compiled schedule: which part runs how often in which case.

`predict` compiles each form of the call once for a generation, names the parts of the shipped
kernel (`bench.tpu_model.attention_roles`), counts how often each runs for a case's lengths
(`bench.tpu_model.attention_trips`) and adds up bundles. That the blocks and the DMAs come out as
many as the case has is checked at every prediction. Calls are compiled with room for all cases and
counted as if they had room for their own lengths alone: S, M and T are nothing but constants in the
kernel.

    python -m bench.tpu_model.schedule bench.tpu_model.attention:compile_target v6e \
        '{"page_size": 128}'

prints the schedule of the shipped default configuration as a tree.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from bench.cases.attention import MIN_Q_BYTES, Call, Case
from bench.tpu_model import attention_roles, attention_trips
from bench.tpu_model import schedule as ts
from bench.tpu_model.attention_roles import Role, Roles
from bench.tpu_model.attention_trips import FULL, MULTIPLE, PREFILL, SINGLE
from bench.tpu_model.compile import as_if_on
from pallas_paged.attention.tpu import launch as mosaic_tpu
from pallas_paged.attention.tpu.spec import KernelSpec

# flop of bfloat16 products in a cycle; see ts.Generation.
FLOP_PER_CYCLE = {"v4": 131072, "v5e": 131072, "v5p": 131072, "v6e": 524288, "tpu7x": 524288}


def compile_target(**fields: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What `bench.tpu_model.compile.Job` compiles: a call, by its fields; `config` by its own."""
    config = fields.pop("config", None)
    call = Call(**fields, config=mosaic_tpu.TpuAttentionConfig(**config) if config else None)
    row_bytes = call.num_heads * call.head_dim * jnp.dtype(call.dtype).itemsize
    call = dataclasses.replace(call, num_tokens=max(call.num_tokens, MIN_Q_BYTES // row_bytes))
    return call.step("mosaic_tpu"), call.shapes(), {"donate_argnums": (1,)} if call.writes else {}


def config_of(call: Call, generation: str) -> mosaic_tpu.TpuAttentionConfig:
    """The block sizes that the call runs with on a generation."""
    with as_if_on(generation):
        num_new_tokens = call.num_tokens if call.writes else 0
        return call.config or mosaic_tpu.default_config(call.heads, call.page_size, num_new_tokens)


def spec_of(call: Call, generation: str) -> KernelSpec:
    """The kernel's static parameters for a call on a generation, as its own plan makes them.

    Raises:
      ValueError: the kernel does not run the call, or does not write its new tokens.
    """
    k = call.shapes()[-2] if call.writes else None
    with as_if_on(generation):
        plan = mosaic_tpu.plan(*call.arrays(), call.options(), call.config, k)
    if plan.refusal is not None:
        raise ValueError(f"{call} on {generation}: {plan.refusal}")
    if plan.spec.writes != call.writes:
        raise ValueError(f"{call} on {generation}: VMEM has no room for the new tokens")
    return plan.spec


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a compiled schedule says of a case. A prediction, not a measurement.

    Attributes:
      case: the case.
      config: the block sizes.
      core_cycles: bundles of the whole call.
      hbm_cycles: cycles that the kernel's transfers take at peak HBM bandwidth.
      num_dmas: DMAs of pages, or of parts of them.
      block_cycles: bundles of a decode's block, all that comes with each of them included (0
        without decodes); of the first that runs of iterations over full blocks, multiple and one.
      block_hbm_cycles: cycles that the block takes at peak HBM bandwidth.
      fixed_cycles: bundles of a sequence outside its blocks, the call's start and end included (0
        unless all are decodes).
      taken_flop: operations of the blocks of keys that are multiplied with work items of queries.
      spills: register spills and refills per bundle of iterations: "unmasked", "masked", "decode".
      vmem_bytes: what the kernel asks for.
      parts: where the bundles of the call are.
    """

    case: Case
    config: mosaic_tpu.TpuAttentionConfig
    core_cycles: float
    hbm_cycles: float
    num_dmas: int
    block_cycles: float
    block_hbm_cycles: float
    fixed_cycles: float
    taken_flop: float
    spills: Mapping[str, float]
    vmem_bytes: int
    parts: Mapping[str, float]

    @property
    def cycles(self) -> float:
        """Of the call, if the slower of core and HBM sets its time."""
        return max(self.core_cycles, self.hbm_cycles)

    @property
    def microseconds(self) -> float:
        """The same as time."""
        return ts.microseconds(self.cycles, self.case.generation)

    @property
    def bound(self) -> str:
        """What sets the time: "HBM" or "core"."""
        return "HBM" if self.hbm_cycles >= self.core_cycles else "core"

    def matrix_use(self, flop: float) -> float:
        """Share of the matrix units' peak that so many operations in the call's time are."""
        return flop / (FLOP_PER_CYCLE[self.case.generation] * self.cycles)


def predict(
    cases: Sequence[Case], *, on_done: Callable[[ts.Job, float], None] | None = None
) -> list[Prediction]:
    """Compiles the cases' calls, each once for a generation, and predicts the cases.

    Raises:
      RuntimeError: libtpu is missing or failed.
      ValueError: the schedule is not the kernel's as it is known here.
    """
    for case in cases:
        if reason := unknown(case.call):
            raise ValueError(f"{case.name} on {case.generation}: {reason}")
    forms = compiles(cases)
    jobs = [
        ts.Job(
            f"{generation} {call.num_heads}/{call.num_kv_heads}/{call.head_dim} page "
            f"{call.page_size} #{i}",
            "bench.tpu_model.attention:compile_target",
            generation,
            dataclasses.asdict(call),
        )
        for i, (generation, call) in enumerate(dict.fromkeys(forms.values()))
    ]
    compiled = dict(
        zip(dict.fromkeys(forms.values()), ts.schedules(jobs, on_done=on_done), strict=True)
    )
    return [predict_from(case, compiled[forms[case]]) for case in cases]


@dataclasses.dataclass(frozen=True)
class Writing:
    """A case whose call writes its new tokens, and the same that finds them in the pool."""

    fused: Prediction
    read: Prediction

    @property
    def unit(self) -> str:
        """What `extra_cycles` is for."""
        return "cycles_a_token" if self.fused.case.num_decodes else "cycles_a_page"

    @property
    def extra_cycles(self) -> float:
        """Bundles that writing adds, for each new token of decodes, each new page of prefills."""
        case = self.fused.case
        pages = sum(-(-q // case.call.page_size) for q, _ in case.lens)
        number = case.num_decodes or pages
        return (self.fused.core_cycles - self.read.core_cycles) / number


def writing_pairs(cases: Sequence[Case]) -> list[tuple[Case, Case]]:
    """For each case of decodes or of prefills alone: its call with the writes, and one without them
    of the same block sizes. A case whose new tokens VMEM has no room for is left out."""
    pairs = []
    for case in cases:
        call = dataclasses.replace(case.call, writes=True)
        config = config_of(call, case.generation)
        with as_if_on(case.generation):
            has_room = mosaic_tpu.fits(call.heads, config, call.num_tokens)
        if has_room and case.num_decodes in (0, len(case.lens)):
            fused, read = (
                dataclasses.replace(
                    case, call=dataclasses.replace(call, writes=writes, config=config)
                )
                for writes in (True, False)
            )
            pairs.append((fused, read))
    return pairs


def unknown(call: Call) -> str | None:
    """What of a call the model does not know, as a sentence; None if it knows it."""
    entries = call.max_seqs * call.table_width
    if entries <= mosaic_tpu.MAX_TABLE:
        return None
    return (
        f"a page table of {entries} entries does not fit SMEM, and a streamed one is not "
        "predicted; use longer pages or shorter sequences"
    )


def compiles(cases: Sequence[Case]) -> dict[Case, tuple[str, Call]]:
    """What is compiled for each case: a generation and a call with its block sizes."""
    return {
        case: (
            case.generation,
            dataclasses.replace(case.call, config=config_of(case.call, case.generation)),
        )
        for case in cases
    }


def _kernel(schedule: ts.Schedule) -> ts.Kernel:
    """The attention's kernel, all its tensors in HBM."""
    names = ("ragged_paged_attention", "write_and_attend")
    kernels = [k for k in schedule.kernels if k.name.startswith(names)]
    if len(kernels) != 1:
        raise ValueError(f"{schedule.job.name}: {len(kernels)} attention kernels; wanted 1")
    tensors = [o for o in kernels[0].operands if "," in o.shape]  # metadata has one dimension
    elsewhere = [o for o in tensors if o.space != "hbm"]
    if elsewhere:
        raise ValueError(
            f"{schedule.job.name}: XLA put {elsewhere} outside HBM; the model is of transfers"
        )
    return kernels[0]


def _runs(roles: Roles, counts: collections.Counter[tuple[str, str]]) -> dict[tuple[int, ...], int]:
    """Path -> how often a node runs in the whole call."""
    mixed = counts[MULTIPLE, "iteration"] + counts[SINGLE, "iteration"]
    own = {
        attention_roles.CALL: 1,
        attention_roles.LOOP: counts[FULL, "run"] + mixed + counts[PREFILL, "iteration"],
        attention_roles.DECODES: counts[FULL, "run"] + mixed,
        attention_roles.MIXED: mixed,
        attention_roles.NEVER: 0,
    }
    return {path: own.get(role, counts[role]) for path, role in roles.items()}


def _execute(tree: ts.Node, runs: Mapping[tuple[int, ...], int]) -> ts.Counts:
    """Counts of the whole call: each part as often as it runs where it stands."""

    def rules(kind: str) -> list[tuple[Any, float]]:
        return [
            (ts.at(*n.path), runs[n.path] / runs[n.path[:-1]] if runs[n.path[:-1]] else 0)
            for n in tree.walk()
            if n.kind == kind
        ]

    return ts.executed(tree, loops=rules("loop"), branches=rules("branch"))


def predict_from(case: Case, schedule: ts.Schedule) -> Prediction:
    """Predicts a case from the schedule of what `compiles` names for it."""
    config = config_of(case.call, case.generation)
    tree = _kernel(schedule).tree
    spec = spec_of(case.call, case.generation)
    roles = attention_roles.roles(tree)
    counts = attention_trips.trips(case.lens, spec, case.call.sliding_window)
    runs = _runs(roles, counts)
    num_dmas = _check(case, spec, tree, roles, runs, counts)
    total = _execute(tree, runs)
    bundles = dict.fromkeys(PARTS, 0.0)
    for node in tree.walk():
        bundles[_part(roles[node.path])] += node.own.bundles * runs[node.path]
    cycles_of = {
        place: _iteration_cycles(place, tree, roles, spec)
        for place in (FULL, MULTIPLE, SINGLE)
        if counts[place, "iteration"]
    }
    per_iteration = _blocks_per_iteration(spec)
    in_blocks = sum(cycles * counts[place, "iteration"] for place, cycles in cycles_of.items())
    is_all_decodes = case.num_decodes == len(case.lens)
    spills: dict[str, float] = {}
    for node in tree.walk():
        place, event = roles[node.path]
        name = event if place == PREFILL else "decode" if event == "iteration" else ""
        if node.own.slots.get("MATMUL") and name in ("masked", "unmasked", "decode"):
            spills.setdefault(name, _spills(node.own))  # of a decode: of full blocks, the first
    itemsize = jnp.dtype(case.call.dtype).itemsize
    row = case.call.num_heads * case.call.heads.lanes * itemsize
    pages = num_dmas * spec.chunk * case.call.slot_bytes // case.call.heads.lane_tiles
    if case.call.writes:  # k and v come, slots leave
        pages += 2 * case.num_tokens * case.call.slot_bytes
    return Prediction(
        case=case,
        config=config,
        core_cycles=total.bundles,
        hbm_cycles=ts.hbm_cycles(pages + 2 * case.num_tokens * row, case.generation),
        num_dmas=num_dmas,
        block_cycles=next(
            (cycles / per_iteration[place] for place, cycles in cycles_of.items()), 0.0
        ),
        block_hbm_cycles=ts.hbm_cycles(
            spec.chunks_per_block * spec.chunk * case.call.slot_bytes, case.generation
        ),
        fixed_cycles=(total.bundles - in_blocks) / case.num_decodes if is_all_decodes else 0.0,
        taken_flop=_taken_flop(case, spec),
        spills=spills,
        vmem_bytes=mosaic_tpu.vmem_bytes(
            case.call.heads,
            config,
            case.call.num_tokens if case.call.writes else 0,
            return_lse=False,
        ),
        parts=bundles,
    )


PARTS = (
    "decode iterations",
    "prefill iterations",
    "DMA loops",
    "between iterations",
    "finding work items",
    "q tiles",
    "ends of prefills",
    "new tokens",
    "start and end",
)


# Trips on the way to an iteration, of a decode or a prefill, that are no place's own.
_DISPATCH = (attention_roles.LOOP, attention_roles.DECODES, attention_roles.MIXED)


def _part(role: Role) -> str:
    """Under which of PARTS a node's bundles stand."""
    place, event = role
    if place == attention_trips.FILL or role in (attention_roles.CALL, attention_roles.NEVER):
        return "start and end"
    if role in (*_DISPATCH, (FULL, "run"), (PREFILL, "iteration")):
        return "between iterations"
    if event == "iteration":
        return "decode iterations"
    if event in ("masked", "unmasked"):
        return "prefill iterations"
    if "chunks" in event or "fetch" in event:
        return "DMA loops"
    if event.startswith(("make", "send")):
        return "new tokens"
    if event.startswith(("find", "skip", "slow")):
        return "finding work items"
    return "ends of prefills" if event == "last" else "q tiles"


def _blocks_per_iteration(spec: KernelSpec) -> dict[str, int]:
    """Kind of iteration -> the KV blocks that it takes."""
    many = spec.kv_blocks_per_iteration
    return {FULL: many, MULTIPLE: many, SINGLE: 1, PREFILL: 1}


def _iteration_cycles(place: str, tree: ts.Node, roles: Roles, spec: KernelSpec) -> float:
    """Bundles that a decode's iteration takes with every one of its trips."""
    cycles = 0.0
    for node in tree.walk():
        role = roles[node.path]
        is_on_its_way = role in _DISPATCH and place != FULL
        if role == (place, "iteration") or is_on_its_way:
            cycles += node.own.bundles
        elif role[0] == place and role[1].startswith("chunks"):
            cycles += node.own.bundles * spec.chunks_per_block
    return cycles


def _spills(counts: ts.Counts) -> float:
    used = counts.slots.get("VLOAD:FILL", 0) + counts.slots.get("VSTORE:SPILL", 0)
    return used / counts.bundles


def _work_items(case: Case, spec: KernelSpec) -> list[attention_trips.WorkItem]:
    items, _ = attention_trips.find_work_items(case.lens, spec, case.call.sliding_window)
    return items


def _taken_flop(case: Case, spec: KernelSpec) -> float:
    """Operations of whole blocks with the rows that a work item has."""
    items = _work_items(case, spec)
    pairs = sum(
        (u.end - u.row) * u.num_blocks(spec.chunks_per_block) * spec.block_kv for u in items
    )
    return 4 * case.call.head_dim * case.call.num_heads * pairs


def _check(
    case: Case,
    spec: KernelSpec,
    tree: ts.Node,
    roles: Roles,
    runs: Mapping[tuple[int, ...], int],
    counts: collections.Counter[tuple[str, str]],
) -> int:
    """Checks blocks and DMAs against the case's own; returns the DMAs of pages.

    Where DMAs are written out in an iteration, those of blocks that are not there are predicated
    off. They stand in the schedule all the same.
    """
    items = _work_items(case, spec)
    wanted_blocks = sum(item.num_blocks(spec.chunks_per_block) for item in items)
    wanted = sum(max(0, item.end_chunk - item.first_chunk) for item in items)
    wanted *= case.call.heads.lane_tiles
    per_iteration = _blocks_per_iteration(spec)
    taken = sum(counts[place, "iteration"] * number for place, number in per_iteration.items())
    # An iteration of decodes sends new tokens among the DMAs, one for each decode that it may end.
    inserts = {
        FULL: spec.decodes_per_full_iteration,
        MULTIPLE: spec.kv_blocks_per_iteration,
        SINGLE: 1,
    }
    sent, scheduled, predicated = 0, 0.0, 0
    for node in tree.walk():
        role = roles[node.path]
        if (
            "chunks" in role[1]
            or role == (attention_trips.FILL, "iteration")
            or node.own.slots.get("MATMUL")
        ):
            is_insert = case.call.writes and role[1] == "iteration"
            of_inserts = inserts.get(role[0], 0) * case.call.heads.lane_tiles * is_insert
            scheduled += (node.own.dma_issues - of_inserts) * runs[node.path]
    for place, number in (per_iteration | {attention_trips.FILL: 1}).items():
        chunks = sum(counts[place, f"chunks{b}"] for b in range(number))
        sent += chunks * case.call.heads.lane_tiles
        is_looped = any(r[0] == place and "chunks" in r[1] for r in roles.values())
        room = counts[place, "iteration"] * number * spec.chunks_per_block
        predicated += 0 if is_looped else (room - chunks) * case.call.heads.lane_tiles
    if (taken, sent, scheduled - predicated) != (wanted_blocks, wanted, wanted):
        raise ValueError(
            f"{case.name} on {case.generation}, {case.call}: the weighted schedule takes {taken} "
            f"blocks and sends {scheduled - predicated:g} DMAs; the case has {wanted_blocks} and "
            f"{wanted}"
        )
    return wanted
