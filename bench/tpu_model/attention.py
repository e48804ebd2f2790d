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

from bench.cases.attention import Call, Case
from bench.tpu_model import attention_roles as parts
from bench.tpu_model import attention_trips as walk
from bench.tpu_model import schedule as ts
from bench.tpu_model.attention_trips import FULL, PREFILL, SEVERAL, SINGLE
from bench.tpu_model.compile import as_if_on
from pallas_paged.attention.tpu import launch as mosaic_tpu

# flop of bfloat16 products in a cycle; see ts.Generation.
FLOP_PER_CYCLE = {"v4": 131072, "v5e": 131072, "v5p": 131072, "v6e": 524288, "tpu7x": 524288}


# Of q, below which XLA may put it into VMEM before the kernel, which would be another kernel.
_MIN_Q_BYTES = 2**24


def compile_target(**fields: Any):
    """What `bench.tpu_model.compile.Job` compiles: a call, by its fields; `config` by its own."""
    config = fields.pop("config", None)
    call = Call(**fields, config=mosaic_tpu.TpuAttentionConfig(**config) if config else None)
    row_bytes = call.num_heads * call.head_dim * jnp.dtype(call.dtype).itemsize
    call = dataclasses.replace(call, num_tokens=max(call.num_tokens, _MIN_Q_BYTES // row_bytes))
    return call.step("mosaic_tpu"), call.shapes(), {"donate_argnums": (1,)} if call.writes else {}


def config_of(call: Call, generation: str) -> mosaic_tpu.TpuAttentionConfig:
    """The block sizes that the call runs with on a generation."""
    with as_if_on(generation):
        num_new_tokens = call.num_tokens if call.writes else 0
        return call.config or mosaic_tpu.default_config(call.heads, call.page_size, num_new_tokens)


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
        without decodes); of the body of full blocks, of several or of one, the first that runs.
      block_hbm_cycles: cycles that the block takes at peak HBM bandwidth.
      fixed_cycles: bundles of a sequence outside its blocks, the call's start and end included (0
        unless all are decodes).
      taken_flop: operations of the blocks of keys that are multiplied with units of queries.
      spills: body -> register spills and refills per bundle: "unmasked", "masked" and "decode".
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
            is_fused = mosaic_tpu.fits(call.heads, config, call.num_tokens)
        if is_fused and case.num_decodes in (0, len(case.lens)):
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


def _counts(case: Case, config: mosaic_tpu.TpuAttentionConfig) -> collections.Counter:
    """How often each part of the kernel runs; see `attention_walk.trips`."""
    return walk.trips(
        case.lens,
        walk.blocks_of(config, case.call.page_size),
        case.call.sliding_window,
        case.call.writes,
    )


def _runs(roles: parts.Roles, counts: collections.Counter) -> dict[tuple[int, ...], int]:
    """Path -> how often a node runs in the whole call."""
    mixed = counts[SEVERAL, "body"] + counts[SINGLE, "body"]
    own = {
        parts.CALL: 1,
        parts.WALK: counts[FULL, "run"] + mixed + counts[PREFILL, "body"],
        parts.DECODES: counts[FULL, "run"] + mixed,
        parts.MIXED: mixed,
        parts.NEVER: 0,
    }
    return {path: own.get(role, counts[role]) for path, role in roles.items()}


def _execute(tree: ts.Node, runs: Mapping[tuple[int, ...], int]) -> ts.Counts:
    """Counts of the whole call: each part as often as it runs where it stands."""

    def rules(kind):
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
    blocks = walk.blocks_of(config, case.call.page_size)
    roles, counts = parts.roles(tree), _counts(case, config)
    runs = _runs(roles, counts)
    num_dmas = _check(case, blocks, tree, roles, runs, counts)
    total = _execute(tree, runs)
    bundles = dict.fromkeys(PARTS, 0.0)
    for node in tree.walk():
        bundles[_part(roles[node.path])] += node.own.bundles * runs[node.path]
    body_cycles = {
        place: _body_cycles(place, tree, roles, blocks)
        for place in (FULL, SEVERAL, SINGLE)
        if counts[place, "body"]
    }
    per_body = _blocks_of_bodies(blocks)
    in_blocks = sum(cycles * counts[place, "body"] for place, cycles in body_cycles.items())
    is_all_decodes = case.num_decodes == len(case.lens)
    spills: dict[str, float] = {}
    for node in tree.walk():
        place, event = roles[node.path]
        name = event if place == PREFILL else "decode" if event == "body" else ""
        if node.own.slots.get("MATMUL") and name in ("masked", "unmasked", "decode"):
            spills.setdefault(name, _spills(node.own))  # of a decode: of full blocks, the first
    itemsize = jnp.dtype(case.call.dtype).itemsize
    row = case.call.num_heads * case.call.heads.lanes * itemsize
    pages = num_dmas * blocks.piece * case.call.slot_bytes // case.call.heads.lane_tiles
    if case.call.writes:  # k and v come, slots leave
        pages += 2 * case.num_tokens * case.call.slot_bytes
    return Prediction(
        case=case,
        config=config,
        core_cycles=total.bundles,
        hbm_cycles=ts.hbm_cycles(pages + 2 * case.num_tokens * row, case.generation),
        num_dmas=num_dmas,
        block_cycles=next((cycles / per_body[place] for place, cycles in body_cycles.items()), 0.0),
        block_hbm_cycles=ts.hbm_cycles(
            blocks.pieces * blocks.piece * case.call.slot_bytes, case.generation
        ),
        fixed_cycles=(total.bundles - in_blocks) / case.num_decodes if is_all_decodes else 0.0,
        taken_flop=_taken_flop(case, blocks),
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
    "decode bodies",
    "prefill bodies",
    "DMA loops",
    "between bodies",
    "finding units",
    "windows",
    "ends of prefills",
    "new tokens",
    "start and end",
)


# Trips on the way to a body, of a decode or a prefill, that are no place's own.
_DISPATCH = (parts.WALK, parts.DECODES, parts.MIXED)


def _part(role: parts.Role) -> str:
    """Under which of PARTS a node's bundles stand."""
    place, event = role
    if place == walk.FILL or role in (parts.CALL, parts.NEVER):
        return "start and end"
    if role in (*_DISPATCH, (FULL, "run"), (PREFILL, "body")):
        return "between bodies"
    if event == "body":
        return "decode bodies"
    if event in ("masked", "unmasked"):
        return "prefill bodies"
    if "pieces" in event or "fetch" in event:
        return "DMA loops"
    if event.startswith(("make", "send")):
        return "new tokens"
    if event.startswith(("find", "skip", "slow")):
        return "finding units"
    return "ends of prefills" if event == "last" else "windows"


def _blocks_of_bodies(blocks: walk.Blocks) -> dict[str, int]:
    """Body -> the blocks that it takes."""
    many = blocks.kv_blocks_per_iteration
    return {FULL: many, SEVERAL: many, SINGLE: 1, PREFILL: 1}


def _body_cycles(place: str, tree: ts.Node, roles: parts.Roles, blocks: walk.Blocks) -> float:
    """Bundles that a decode's body takes with every one of its trips."""
    cycles = 0.0
    for node in tree.walk():
        role = roles[node.path]
        is_on_its_way = role in _DISPATCH and place != FULL
        if role == (place, "body") or is_on_its_way:
            cycles += node.own.bundles
        elif role[0] == place and role[1].startswith("pieces"):
            cycles += node.own.bundles * blocks.pieces
    return cycles


def _spills(counts: ts.Counts) -> float:
    used = counts.slots.get("VLOAD:FILL", 0) + counts.slots.get("VSTORE:SPILL", 0)
    return used / counts.bundles


def _units(case: Case, blocks: walk.Blocks):
    units, _ = walk.find_units(case.lens, blocks, case.call.sliding_window, case.call.writes)
    return units


def _taken_flop(case: Case, blocks: walk.Blocks) -> float:
    """Operations of whole blocks with the rows that a unit has."""
    units = _units(case, blocks)
    pairs = sum((u.end - u.row) * u.num_blocks(blocks.pieces) * blocks.block for u in units)
    return 4 * case.call.head_dim * case.call.num_heads * pairs


def _check(case, blocks, tree, roles, runs, counts) -> int:
    """Checks blocks and DMAs against the case's own; returns the DMAs of pages.

    Where DMAs are written out in a body, those of blocks that are not there are predicated off;
    they stand in the schedule all the same.
    """
    units = _units(case, blocks)
    wanted_blocks = sum(unit.num_blocks(blocks.pieces) for unit in units)
    wanted = sum(max(0, unit.end_piece - unit.first_piece) for unit in units)
    wanted *= case.call.heads.lane_tiles
    per_body = _blocks_of_bodies(blocks)
    taken = sum(counts[place, "body"] * number for place, number in per_body.items())
    # A body of decodes sends new tokens among the DMAs, one for each decode that it may end.
    puts = {FULL: blocks.full_parts, SEVERAL: blocks.kv_blocks_per_iteration, SINGLE: 1}
    sent, scheduled, predicated = 0, 0.0, 0
    for node in tree.walk():
        role = roles[node.path]
        if "pieces" in role[1] or role == (walk.FILL, "body") or node.own.slots.get("MATMUL"):
            is_put = case.call.writes and role[1] == "body"
            of_puts = puts.get(role[0], 0) * case.call.heads.lane_tiles * is_put
            scheduled += (node.own.dma_issues - of_puts) * runs[node.path]
    for place, number in (per_body | {walk.FILL: 1}).items():
        pieces = sum(counts[place, f"pieces{b}"] for b in range(number))
        sent += pieces * case.call.heads.lane_tiles
        is_looped = any(r[0] == place and "pieces" in r[1] for r in roles.values())
        room = counts[place, "body"] * number * blocks.pieces
        predicated += 0 if is_looped else (room - pieces) * case.call.heads.lane_tiles
    if (taken, sent, scheduled - predicated) != (wanted_blocks, wanted, wanted):
        raise ValueError(
            f"{case.name} on {case.generation}, {case.call}: the weighted schedule takes {taken} "
            f"blocks and sends {scheduled - predicated:g} DMAs; the case has {wanted_blocks} and "
            f"{wanted}"
        )
    return wanted
