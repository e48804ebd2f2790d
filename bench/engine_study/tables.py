# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The engine study's tables: rows of text for `bench.report.table`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench import report
from bench.engine_study import cost as engine_cost
from bench.engine_study import share as engine_share
from bench.engine_study import simulate as study
from bench.engine_study.latency import Objectives
from reference_engine.traffic import Arrival


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


def study_text(
    by_cell: dict[study.Cell, study.Outcome],
    loaded: dict[str, list[Arrival]],
    cost: engine_cost.Cost,
    form: str,
    objectives: Objectives,
) -> str:
    """All of the study's tables but the one of the throughput.

    Args:
      by_cell: outcomes at the load.
      loaded: the requests of each trace.
      cost: of a step.
      form: of write, for the tables that are of one form.
      objectives: of a good request.
    """
    text = [
        f"Costs {cost.source}, microseconds a step:",
        report.table(cost_rows(cost), indent=2),
        f"At most {study.MAX_NUM_SEQS} requests at a time, batches padded to the engine's shapes;"
        f" good requests have their first token in {objectives.ttft_ms:g} ms and the others every"
        f" {objectives.tpot_ms:g} ms.",
    ]
    for trace, arrivals in loaded.items():
        span = arrivals[-1].seconds
        text += [
            f"\n{trace}: {len(arrivals):,} requests in {span:,.0f} s,"
            f" {sum(a.num_prompt for a in arrivals):,} prompt tokens,"
            f" {sum(a.num_output for a in arrivals):,} generated; written by {form};"
            " alignment off / on"
        ]
        rows = []
        for cell, off in by_cell.items():
            if cell.trace == trace and cell.kv_write == form and not cell.aligned:
                rows.append(pair_row(cell, off, by_cell[dataclasses.replace(cell, aligned=True)]))
        text += [report.table(rows, indent=2)]
    text += [
        "\nForms of write, page 16, budget 2,048 (or the nearest that was run); descriptors a"
        " step, the writes' share of the time, requests a second; alignment off / on",
        report.table(form_rows(by_cell), indent=2),
    ]
    return "\n".join(text)


def panels(capacity: dict[study.Cell, study.Outcome]) -> dict[str, dict[str, list]]:
    """trace -> page size -> (budget, percent by which alignment changes the throughput)."""
    found: dict[str, dict[str, list]] = {}
    for cell, off in capacity.items():
        if not cell.aligned:
            on = capacity[dataclasses.replace(cell, aligned=True)]
            line = found.setdefault(cell.trace, {}).setdefault(f"page {cell.page_size}", [])
            line.append((cell.budget, 100 * (on.throughput / off.throughput - 1)))
    return found


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


def serve_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was served: what a user sees of it, and what the engine did."""
    users = [_served(row) | _latencies(row) for row in rows]
    return [
        "\nServed; TTFT, TPOT and ITL in ms, good requests and all requests a second",
        report.table(users, indent=2),
        "\nThe engine's steps meanwhile; a late one was dispatched when the device was idle",
        report.table([_served(row) | _steps(row) for row in rows], indent=2),
    ]


def _served(row: dict[str, Any]) -> dict[str, str]:
    return {"traffic": row["traffic"], "T": f"{row['temperature']:g}"}


def _latencies(row: dict[str, Any]) -> dict[str, str]:
    return {
        "requests": f"{row['num_requests']:,}",
        "left out": f"{row['num_left_out']:,}",
        "tokens in": f"{row['num_prompt_tokens']:,}",
        "out": f"{row['num_output_tokens']:,}",
        "seconds": f"{row['duration_s']:.2f}",
        "out/s": f"{row['output_tokens_per_s']:,.0f}",
        "TTFT mean": f"{row['ttft_mean_ms']:,.0f}",
        "p50": f"{row['ttft_ms'][0]:,.0f}",
        "p99": f"{row['ttft_ms'][1]:,.0f}",
        "TPOT p50": f"{row['tpot_ms'][0]:.2f}",
        "p99 ": f"{row['tpot_ms'][1]:.2f}",
        "ITL p50": f"{row['itl_ms'][0]:.2f}",
        "p99  ": f"{row['itl_ms'][1]:.2f}",
        "good/s": f"{row['goodput']:.2f}",
        "all/s": f"{row['throughput']:.2f}",
    }


def _steps(row: dict[str, Any]) -> dict[str, str]:
    return {
        "steps": f"{row['num_steps']:,}",
        "late": f"{row['num_late_steps']:,}",
        "tokens": f"{row['num_tokens']:,}",
        "discarded": f"{row['num_discarded']:,}",
        "padding": f"{row['num_padding']:,}",
        "padding %": f"{row['padding_percent']:.1f}",
        "cached": f"{row['num_cached']:,}",
        "preempted": f"{row['num_preemptions']:,}",
        "deferrals": f"{row['num_deferrals']:,}",
        "recompiles": f"{row['num_recompiles']:,}",
        "in step() s": f"{row['seconds']:.2f}",
        "host's s": f"{row['host_s']:.2f}",
        "host's ms a step": f"{1e3 * row['host_s'] / max(1, row['num_steps']):.2f}",
    }


def decode_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Steps of decodes."""
    if not rows:
        return []
    return [
        "\nSteps of decodes in the engine: ms by the wall clock without a profiler; kernels and"
        "\nlaunches by the profiler, and the recorded step, in which every launch takes longer."
        "\n`a layer` is all launches of a step over the number of layers",
        report.table([_decode(row) for row in rows], indent=2),
    ]


def _decode(row: dict[str, Any]) -> dict[str, str]:
    def cell(name: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[name] is None else format(row[name] * scale, form)

    launches = row["launches"]
    return {
        "model": row["model"],
        "batch": row["batch"],
        "sampling": row["sampling"],
        "step": f"{row['step_us'] / 1e3:.3f}",
        "median": f"{row['median_us'] / 1e3:.3f}",
        "p99": f"{row['p99_us'] / 1e3:.3f}",
        "host's": f"{row['host_us'] / 1e3:.3f}",
        "late %": f"{row['late_percent']:.0f}",
        "recompiles": str(row["num_recompiles"]),
        "kernels": cell("kernels_us", ".3f", 1e-3),
        "busy": cell("busy_us", ".3f", 1e-3),
        "idle %": cell("idle_percent", ".1f"),
        "recorded step": cell("recorded_step_us", ".3f", 1e-3),
        "its idle %": cell("recorded_idle_percent", ".1f"),
        "launches": cell("launches", ".0f"),
        "a layer": "-" if launches is None else f"{launches / row['num_layers']:.1f}",
    }


def startup_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The start of a server."""
    if not rows:
        return []
    return [
        "\nLLM(folder) in a new process, seconds; the folder's files are in the system's memory",
        report.table(
            [
                {
                    "cache of programs": row["cache"],
                    "LLM ready": f"{row['ready_s']:.1f}",
                    "first token": f"{row['first_token_s']:.1f}",
                    "all shapes compiled": f"{row['all_compiled_s']:.1f}",
                    "pages": f"{row['num_pages']:,}",
                }
                for row in rows
            ],
            indent=2,
        ),
    ]
