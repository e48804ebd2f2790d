# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The verdict of `bench.kv_write`: which form of write to use, and what writing pages is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import report
from bench.cases.kv_write import OPS
from bench.tpu_model.kv_write import DESCRIPTOR_NS, WritePrediction
from bench.tpu_model.published import Check

# Forms within this factor of the fastest count as equal, because neither the model nor a clock is
# worth more. Of equals the first in `OPS` is chosen: it needs the fewest indices.
_EQUAL = 1.01
_CALLS = {
    "page": "page_write",
    "page_starts": "page_write, token_starts",
    "slice": "slice_write",
    "token": "token_write",
}
# What the model calls its bounds -> what the verdict does; the third is the DMA engine's.
_BOUNDS = {"HBM": "HBM", "issue": "core"}
# (op, page size) -> time per byte.
Times = Mapping[tuple[str, int], float]


def choose(times: Times) -> tuple[str, int, str]:
    """The form to use, the smallest page size that it needs, and this size as text."""
    least = min(times.values())
    equals = [key for key, time in times.items() if time <= least * _EQUAL]
    op = next(op for op in OPS if any(op == other for other, _ in equals))
    page_size = min(size for other, size in equals if other == op)
    larger = [(other, size) for other, size in times if other == op and size > page_size]
    if op == "token":
        return op, page_size, "any"
    is_enough = larger and set(larger) <= set(equals)
    return op, page_size, f"{page_size} and larger" if is_enough else str(page_size)


def predicted(
    predictions: Sequence[WritePrediction], checks: Sequence[Check] = ()
) -> report.Verdict:
    """The verdict on TPU generations, for the largest call.

    The descriptor bound counts for the choice, because published times prove no faster DMA engine.
    """
    tokens = max(p.case.num_tokens for p in predictions)
    rows = []
    for generation in dict.fromkeys(p.case.generation for p in predictions):
        mine = {
            (p.case.op, p.case.page_size): p
            for p in predictions
            if p.case.generation == generation and p.case.num_tokens == tokens
        }
        op, page_size, sizes = choose({key: _per_byte(p, True) for key, p in mine.items()})
        best = mine[op, page_size]
        core_busy = best.schedule_cycles / max(best.schedule_cycles, best.hbm_cycles)
        rows.append(
            {
                "generation": generation,
                "use": _CALLS[op],
                "page size": sizes,
                "bound by": _BOUNDS.get(best.bound(True), "DMA engine"),
                "core busy": f"{core_busy:.0%}",
                "us": f"{best.microseconds(True):.1f}",
                "slices take": _against_pages(mine, "slice", page_size),
                "tokens take": _against_pages(mine, "token", page_size),
            }
        )
    case = predictions[0].case
    notes = [
        "These are predictions from schedules compiled for TPUs. Nothing here ran on a TPU.",
        "'bound by' is what sets the time: HBM, the issuing core, or the DMA engine at"
        f" {DESCRIPTOR_NS:.0f} ns per DMA. 'slices take' and 'tokens take' are multiples of"
        " page_write's time at that page size: if only HBM and the core count, and (after ..) if"
        " the DMA engine counts as well.",
    ]
    if checks:
        low, high = min(c.error for c in checks), max(c.error for c in checks)
        notes.append(
            f"The model's own check: it predicts published times of another kernel on a v6e with"
            f" errors of {low:+.0%} to {high:+.0%}."
        )
    shape = f"{case.num_kv_heads} KV heads of {case.head_dim}, {case.dtype}"
    return report.Verdict(
        f"how to write {tokens:,} new tokens to a paged pool ({shape})", rows, notes
    )


def measured(
    rows: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Sequence[Mapping[str, Any]]],
    device: str,
) -> report.Verdict:
    """The verdict on the device that this ran on, a row per number of tokens.

    Args:
      rows: of the ops, as `bench.measure.kv_write.as_record` makes them.
      baselines: "copy", "scatter" and "peers" -> rows of the same form.
      device: its name.
    """
    table = []
    for tokens in sorted({row["num_tokens"] for row in rows}):
        mine = {(r["op"], r["page_size"]): r for r in rows if r["num_tokens"] == tokens}
        times = {key: row["median_us"] / row["bytes"] for key, row in mine.items()}
        op, page_size, sizes = choose(times)
        best = mine[op, page_size]
        page = _find(times, "page", page_size) or _find(times, "page_starts", page_size)
        row = {
            "tokens": f"{tokens:,}",
            "use": _CALLS[op],
            "page size": sizes,
            "us": f"{best['median_us']:,.1f}",
            "GB/s": f"{best['gb_per_s']:,.0f}",
        }
        for form in ("slice", "token"):
            other = _find(times, form, page_size)
            row[f"{form}s take"] = f"{other / page:.2f}x" if other and page else "-"
        for name, found in baselines.items():
            same = [r["median_us"] / r["bytes"] for r in found if r["num_tokens"] == tokens]
            row[f"{name} takes"] = f"{min(same) / times[op, page_size]:.2f}x" if same else "-"
        table.append(row)
    note = f"These are measurements on {device} ({rows[0]['method']})."
    against = (
        "'slices take' and 'tokens take' are multiples of page_write's time at that page size."
    )
    if baselines:
        against += " The other columns are multiples of the time of the form to use, per byte."
    if "copy" in baselines:
        against += " A copy is a plain copy of as many bytes: what HBM allows."
    return report.Verdict(
        f"how to write new tokens to a paged pool on {device}", table, [note, against]
    )


def _per_byte(p: WritePrediction, descriptors: bool) -> float:
    return p.microseconds(descriptors) / p.case.num_bytes


def _against_pages(mine: Mapping[tuple[str, int], WritePrediction], op: str, page_size: int) -> str:
    """Time of another form over page_write's at a page size, under both bounds."""
    factors = []
    for descriptors in (False, True):
        times = {key: _per_byte(p, descriptors) for key, p in mine.items()}
        page = _find(times, "page", page_size) or _find(times, "page_starts", page_size)
        other = _find(times, op, page_size)
        if page is None or other is None:
            return "-"
        factors.append(f"{other / page:.2f}x")
    return " .. ".join(dict.fromkeys(factors))


def _find(times: Times, op: str, page_size: int) -> float | None:
    """A form's time at a page size, if it is there; tokens have one time for all page sizes."""
    for (form, size), time in times.items():
        if form == op and (size == page_size or op == "token"):
            return time
    return None
