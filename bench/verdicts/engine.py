# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The verdict of `bench.engine`: what alignment and forms of write are worth, how it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bench.engine_study.share import Share
from bench.engine_study.simulate import Cell, Outcome


def _row(part: str, what: str, finding: str) -> dict[str, str]:
    return {"part": part, "of": what, "finding": finding}


def study_rows(
    by_cell: Mapping[Cell, Outcome], capacity: Mapping[Cell, Outcome], form: str
) -> list[dict[str, str]]:
    """Per trace: what alignment does to the throughput, to partial pages, and to the forms.

    Args:
      by_cell: outcomes at the load that was asked for.
      capacity: outcomes with every request there from the start; their throughput is the engine's.
      form: of write, whose partial pages and latency are told.
    """
    rows = []
    for trace in dict.fromkeys(cell.trace for cell in by_cell):
        changes = {
            cell: 100 * (capacity[_aligned(cell)].throughput / off.throughput - 1)
            for cell, off in capacity.items()
            if cell.trace == trace and not cell.aligned
        }
        most = max(changes, key=lambda cell: abs(changes[cell]))
        rows.append(
            _row(
                "study",
                trace,
                f"alignment changes the throughput by {min(changes.values()):+.1f}% to"
                f" {max(changes.values()):+.1f}% in {len(changes)} cases; most at page"
                f" {most.page_size}, budget {most.budget:,}",
            )
        )
        cell = dataclasses.replace(most, kv_write=form)
        off, on = by_cell[cell], by_cell[_aligned(cell)]
        rows.append(
            _row(
                "study",
                trace,
                f"there prefills write {off.partials:,} parts of pages without alignment,"
                f" {on.partials:,} with; the first token comes after {off.ttft_ms[0]:,.0f} and"
                f" {on.ttft_ms[0]:,.0f} ms (median)",
            )
        )
        shares = {
            other.kv_write: 100 * outcome.write_share
            for other, outcome in by_cell.items()
            if other == dataclasses.replace(cell, aligned=True, kv_write=other.kv_write)
        }
        finding = ", ".join(f"{name} {share:.2f}%" for name, share in shares.items())
        rows.append(_row("study", trace, f"there, aligned, writing takes of the time: {finding}"))
    return rows


def _aligned(cell: Cell) -> Cell:
    return dataclasses.replace(cell, aligned=True)


def share_rows(shares: Sequence[Share]) -> list[dict[str, str]]:
    """Per generation: by how much whole pages shorten a step, over all batches and both bounds."""
    rows = []
    for generation in dict.fromkeys(share.generation for share in shares):
        mine = [share for share in shares if share.generation == generation]
        parts = []
        for other, name in (("tokens", "tokens"), ("shipped", "the slices that engines ship")):
            gains = {
                (share.batch, bound): share.gain_percent("pages", other, is_bound=bound)
                for share in mine
                for bound in (False, True)
            }
            batch, _ = max(gains, key=lambda key: gains[key])
            low, high = min(gains.values()), max(gains.values())
            parts.append(f"{low:.1f}% to {high:.1f}% shorter than with {name} (most: {batch})")
        rows += [_row("share", generation, f"with whole pages a step is {part}") for part in parts]
    return rows


def launch_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Per generation and model: what a layer launches, and whether anything is copied."""
    found = []
    for row in rows:
        copies = row["copy"] + row["transpose"] + row["pool_copies"]
        found.append(
            _row(
                "launches",
                f"{row['generation']}, {row['model']}",
                f"{row['fusion'] + row['convolution']} fusions and {row['custom-call']} kernels a"
                f" layer, {copies or 'no'} copies",
            )
        )
    return found


def real_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Per batch: the form and page size of the shortest step, against the longest."""
    found = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        mine = [row for row in rows if row["batch"] == batch]
        mine.sort(key=lambda row: row["step_us"])
        best, worst = mine[0], mine[-1]
        saved = 100 * (1 - best["step_us"] / worst["step_us"])
        finding = (
            f"{best['step_us'] / 1e3:.3f} ms with {best['kv_write']}, page {best['page_size']}"
        )
        if best is not worst:
            finding += (
                f": {saved:.1f}% less than with {worst['kv_write']}, page {worst['page_size']}"
            )
        if best["write_us"] is not None:
            finding += f"; writes take {100 * best['write_us'] / best['step_us']:.2f}%"
        found.append(_row("real", batch, finding))
    return found


def serve_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Per run: tokens a second, what a user waits for, and what the engine did in vain."""
    found = []
    for row in rows:
        finding = (
            f"{row['output_tokens_per_s']:,.0f} output tokens/s; first token after"
            f" {row['ttft_mean_ms']:,.0f} ms (mean), {row['ttft_ms'][1]:,.0f} (p99); then one every"
            f" {row['tpot_ms'][0]:.1f} ms; padding {row['padding_percent']:.1f}%"
        )
        if row["goodput"] < row["throughput"]:
            finding += f"; {100 * row['goodput'] / row['throughput']:.0f}% served well"
        if row["num_recompiles"]:
            finding += f"; {row['num_recompiles']} recompiles"
        found.append(_row("serve", f"{row['traffic']}, T = {row['temperature']:g}", finding))
    return found


def step_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Per batch of decodes and kind of sampling: its step, and how long the device idles."""
    greedy = {
        (row["model"], row["batch"]): row["step_us"] for row in rows if row["sampling"] == "greedy"
    }
    found = []
    for row in rows:
        finding = f"{row['step_us'] / 1e3:.3f} ms a step"
        more_us = row["step_us"] - greedy.get((row["model"], row["batch"]), row["step_us"])
        if row["sampling"] != "greedy" and more_us:
            finding += f", {more_us / 1e3:+.3f} to greedy"
        if (launches := row["launches"]) is not None:
            finding += (
                f", of kernels {row['busy_us'] / 1e3:.3f}: GPU idle {row['idle_percent']:.1f}%;"
                f" {launches:.0f} launches, {launches / row['num_layers']:.1f} a layer"
            )
        if row["num_recompiles"]:
            finding += f"; {row['num_recompiles']} recompiles"
        found.append(_row("step", f"{row['model']}, {row['batch']}, {row['sampling']}", finding))
    return found


def startup_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Per state of the cache of compiled programs: what a user of LLM(folder) waits for."""
    return [
        _row(
            "start",
            f"LLM(folder), {row['cache']} cache",
            f"ready after {row['ready_s']:.1f} s, first token after {row['first_token_s']:.1f} s,"
            f" every shape compiled after {row['all_compiled_s']:.1f} s",
        )
        for row in rows
    ]
