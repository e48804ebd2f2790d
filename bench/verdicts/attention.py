# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The verdict of `bench.attention`: the page size to use, and what limits each kind of call."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench import report
from bench.tpu_model.attention import Prediction, Writing

# Page sizes whose calls' mean time is within this factor of the least count as equal; the smallest
# of them is chosen, because it wastes the least of the pool.
_EQUAL = 1.01


def predicted(
    shapes: Mapping[str, Mapping[str, Any]],
    predictions: Sequence[Prediction],
    writing: Sequence[Writing] = (),
) -> report.Verdict:
    """The verdict on TPU generations, a row per generation and shape.

    Args:
      shapes: name -> the fields of a `Call` that say which shape it is.
      predictions: of the cases.
      writing: what writing the new tokens in the same call adds.
    """
    rows = []
    for generation in dict.fromkeys(p.case.generation for p in predictions):
        for name, shape in shapes.items():
            by_size: dict[int, dict[str, Prediction]] = {}
            for p in predictions:
                if p.case.generation == generation and all(
                    getattr(p.case.call, field) == value for field, value in shape.items()
                ):
                    by_size.setdefault(p.case.call.page_size, {})[p.case.name] = p
            page_size, gain = choose_page_size(
                {
                    size: {case: p.microseconds for case, p in cases.items()}
                    for size, cases in by_size.items()
                }
            )
            row = {"generation": generation, "model": name, "page": str(page_size), "gain": gain}
            rows.append(row | {case: _cell(p) for case, p in by_size[page_size].items()})
    notes = [
        "These are predictions from schedules compiled for TPUs. Nothing here ran on a TPU.",
        "Each case: microseconds, and what sets them: HBM, or the core, with the percentage of the"
        " matrix units' peak that the core reaches. 'gain' is the mean time that the page size"
        " saves against the slowest one tried.",
        *_writing_notes(writing),
    ]
    return report.Verdict("ragged paged attention on TPUs, at the best page size", rows, notes)


def choose_page_size(times: Mapping[int, Mapping[str, float]]) -> tuple[int, str]:
    """The page size to use, and by how much it beats the slowest one, as text.

    Args:
      times: page size -> case -> time.
    """
    means = {size: statistics.geometric_mean(cases.values()) for size, cases in times.items()}
    least, most = min(means.values()), max(means.values())
    size = min(size for size, mean in means.items() if mean <= least * _EQUAL)
    return size, f"{1 - means[size] / most:.1%}" if len(means) > 1 else "-"


def _cell(p: Prediction) -> str:
    use = f" {p.matrix_use(p.case.all_flop):.0%}" if p.bound == "core" else ""
    return f"{p.microseconds:,.0f} {p.bound}{use}"


def _writing_notes(writing: Sequence[Writing]) -> list[str]:
    costs: dict[str, list[float]] = {}
    for w in writing:
        costs.setdefault(w.unit, []).append(w.extra_cycles)
    names = {"cycles_a_token": "new token of decodes", "cycles_a_page": "page of prefills"}
    parts = [
        f"{min(cycles):.0f} to {max(cycles):.0f} core cycles per {names[unit]}"
        for unit, cycles in costs.items()
    ]
    if not parts:
        return []
    return [f"Writing the new tokens in the same call (write_and_attend) adds {', '.join(parts)}."]


def measured(
    rows: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]], device: str
) -> report.Verdict:
    """The verdict on the device that this ran on, a row per case at its best page size.

    Args:
      rows: of the cases, as `bench.measure.attention.as_record` makes them.
      peers: of others, as `measure_peers` and `measure_beside_oracle` there make them.
      device: its name.
    """
    by_case: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["case"], row["num_heads"], row["num_kv_heads"], row["head_dim"])
        by_case.setdefault(key, []).append(row)
    table = []
    for (case, *heads), found in by_case.items():
        page_size, gain = choose_page_size(
            {row["page_size"]: {case: row["median_us"]} for row in found}
        )
        best = next(row for row in found if row["page_size"] == page_size)
        cells = {
            "case": case,
            "heads": "/".join(map(str, heads)),
            "page": str(page_size),
            "gain": gain,
            "us": f"{best['median_us']:,.1f}",
            "GB/s": f"{best['gb_per_s']:,.0f}",
            "TFLOP/s": f"{best['tflop_per_s']:.2f}",
        }
        if peers:
            cells |= _fastest_peer(best, peers)
        table.append(cells)
    notes = [
        f"These are measurements on {device} ({rows[0]['method']}), pool {rows[0]['pool_dtype']}.",
        "'gain' is the time that the page size saves against the slowest one tried.",
    ]
    if peers:
        notes.append("'ours over it' is our time over that of the fastest other.")
    return report.Verdict(
        f"ragged paged attention on {device}, at the best page size", table, notes
    )


def _fastest_peer(ours: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which of the others is fastest on a case and page size."""
    fields = ("case", "page_size", "num_heads", "num_kv_heads", "head_dim")
    same = [
        peer
        for peer in peers
        if "refusal" not in peer and all(peer[field] == ours[field] for field in fields)
    ]
    if not same:
        return {"fastest other": "-", "ours over it": "-"}
    fastest = min(same, key=lambda peer: peer["median_us"])
    ratio = ours["median_us"] / fastest["median_us"]
    return {"fastest other": fastest["peer"], "ours over it": f"{ratio:.2f}x"}
