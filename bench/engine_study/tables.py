# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The engine study's tables: rows of text for `bench.report.table`."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.engine_study import cost as engine_cost
from bench.engine_study import share as engine_share
from bench.engine_study import simulate as study


def cost_rows(cost: engine_cost.Cost) -> list[dict[str, str]]:
    """What the study costs a step, in one row."""
    return [
        {
            "host": f"{cost.host_us:.0f}",
            "weights": f"{cost.weights_us:.0f}",
            "row": f"{cost.row_us:.2f}",
            "decode": f"{cost.decode_us:.2f}",
            "key": f"{cost.decode_key_us:.4f}",
            "prefilled": f"{cost.prefilled_us:.3f}",
            "pair": f"{cost.pair_us:.6f}",
            "token's bytes": f"{cost.written_us:.3f}",
            "page of 16": f"{cost.page_us[16]:.3f}",
            "slice of 16": f"{cost.slice_us[16]:.3f}",
            "token": f"{cost.token_us:.3f}",
            "descriptor": f"{cost.descriptor_us:.3f}",
        }
    ]


def pair_row(cell: study.Cell, off: study.Outcome, on: study.Outcome) -> dict[str, str]:
    """A cell without and with alignment."""

    def pair(form: str, *values: float) -> str:
        return " / ".join(format(value, form) for value in values)

    return {
        "page": str(cell.page_size),
        "budget": f"{cell.budget:,}",
        "steps": pair(",", off.steps, on.steps),
        "whole pages": pair(",", off.pages, on.pages),
        "partial": pair(",", off.partials, on.partials),
        "padding %": pair(".1f", *(100 * o.padding / (o.padding + o.tokens) for o in (off, on))),
        "deferrals": f"{on.deferrals:,}",
        "decode skips": pair(",", off.skips, on.skips),
        "preempted": pair(",", off.preemptions, on.preemptions),
        "TTFT p50 ms": pair(",.0f", off.ttft_ms[0], on.ttft_ms[0]),
        "p99": pair(",.0f", off.ttft_ms[1], on.ttft_ms[1]),
        "TPOT p50": pair(".1f", off.tpot_ms[0], on.tpot_ms[0]),
        "p99 ": pair(".1f", off.tpot_ms[1], on.tpot_ms[1]),
        "ITL p50": pair(".1f", off.itl_ms[0], on.itl_ms[0]),
        "p99  ": pair(".1f", off.itl_ms[1], on.itl_ms[1]),
        "goodput": pair(".2f", off.goodput, on.goodput),
    }


def form_rows(by_cell: dict[study.Cell, study.Outcome]) -> list[dict[str, str]]:
    """Every form of write at the least page size and the budget that is nearest to 2,048."""
    page = min(cell.page_size for cell in by_cell)
    budget = min(
        (cell.budget for cell in by_cell if cell.page_size == page), key=lambda b: abs(b - 2048)
    )
    rows = []
    for cell, off in by_cell.items():
        if (cell.page_size, cell.budget, cell.aligned) != (page, budget, False):
            continue
        on = by_cell[dataclasses.replace(cell, aligned=True)]
        rows.append(
            {
                "trace": cell.trace,
                "form": cell.kv_write,
                "descriptors a step": " / ".join(
                    f"{o.descriptors / o.steps:.0f}" for o in (off, on)
                ),
                "share %": " / ".join(f"{100 * o.write_share:.2f}" for o in (off, on)),
                "requests/s": " / ".join(f"{o.throughput:.3f}" for o in (off, on)),
                "TTFT p50 ms": " / ".join(f"{o.ttft_ms[0]:,.0f}" for o in (off, on)),
            }
        )
    return rows


def capacity_rows(panels: dict[str, dict[str, list]]) -> list[dict[str, str]]:
    """Change of throughput per trace and page size, a column per budget."""
    budgets = sorted({x for lines in panels.values() for line in lines.values() for x, _ in line})
    return [
        {"trace": trace, "page": name.removeprefix("page ")}
        | {f"budget {b:,}": next((f"{y:+.1f}" for x, y in line if x == b), "-") for b in budgets}
        for trace, lines in panels.items()
        for name, line in lines.items()
    ]


def share_row(share: engine_share.Share) -> dict[str, str]:
    """A row of the share; each cell without and with the bound on descriptors."""
    row = {
        "": share.generation,
        "batch": share.batch,
        "page": str(share.page_size),
        "step ms": f"{share.compute_us / 1e3:.2f}",
    }
    for form in (*engine_share.FORMS, "shipped"):
        row[form] = " / ".join(
            f"{share.percent(form, is_bound=bound):.2f}" for bound in (False, True)
        )
    for other in ("tokens", "shipped"):
        row[f"{other} to pages"] = " / ".join(
            f"{share.gain_percent('pages', other, is_bound=bound):.2f}" for bound in (False, True)
        )
    return row


def real_row(row: dict[str, Any]) -> dict[str, str]:
    """A measured batch."""
    write = row["write_us"]
    return {
        "batch": row["batch"],
        "page": str(row["page_size"]),
        "form": row["kv_write"],
        "tokens": f"{row['tokens']:,}",
        "step ms": f"{row['step_us'] / 1e3:.3f}",
        "p20": f"{row['p20_us'] / 1e3:.3f}",
        "p80": f"{row['p80_us'] / 1e3:.3f}",
        "kernels ms": "-" if row["kernels_us"] is None else f"{row['kernels_us'] / 1e3:.3f}",
        "writes ms": "-" if write is None else f"{write / 1e3:.3f}",
        "share %": "-" if write is None else f"{100 * write / row['step_us']:.2f}",
    }


def serve_row(row: dict[str, Any]) -> dict[str, str]:
    """A served workload."""
    return {
        "workload": row["workload"],
        "T": f"{row['temperature']:g}",
        "output tokens/s": f"{row['output_tokens_per_s']:,.0f}",
        "TTFT mean ms": f"{row['ttft_mean_ms']:,.0f}",
        "p50": f"{row['ttft_ms'][0]:,.0f}",
        "p99": f"{row['ttft_ms'][1]:,.0f}",
        "TPOT p50": f"{row['tpot_ms'][0]:.2f}",
        "p99 ": f"{row['tpot_ms'][1]:.2f}",
        "ITL p50": f"{row['itl_ms'][0]:.2f}",
        "p99  ": f"{row['itl_ms'][1]:.2f}",
        "goodput": f"{row['goodput']:.2f}",
        "padding %": f"{row['padding_percent']:.1f}",
        "steps": f"{row['num_steps']:,}",
        "late": f"{row['num_late_steps']:,}",
        "discarded": f"{row['num_discarded']:,}",
        "preempted": f"{row['num_preemptions']:,}",
        "recompiles": f"{row['num_recompiles']:,}",
        "seconds": f"{row['seconds']:.2f}",
        "host s": f"{row['host_seconds']:.2f}",
    }
