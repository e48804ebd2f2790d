# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What page-aligned scheduling and page-granular writes are worth to a serving engine.

    python -m bench.engine --traces=code.csv,conv.csv [--plot=study.png] [--all] [--json]
    python -m bench.engine --parts=real --json > costs.json      # on a machine with an accelerator
    python -m bench.engine --parts=serve --startup --all         # there, too

Five parts. `study` replays traces and generated traffic through the engine's scheduler in simulated
time, with alignment on and off, in every form of write, at several page sizes and budgets. `share`
predicts how much of a step of Llama 3 8B the KV write is on TPU generations. `launches` counts what
a layer of a step launches there, in programs compiled ahead of time. `real` runs the model itself
on this device and times its steps. `serve` serves requests with the engine itself, and tells tokens
per second, latencies and the device's idle time. Without an accelerator `study` and `share` are
run, with one `real`. It prints a verdict, with --all also every row.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags

from bench import report
from bench.engine_study import cost as engine_cost
from bench.engine_study import real as engine_real
from bench.engine_study import serve_part, tables, tpu_step
from bench.engine_study import share as engine_share
from bench.engine_study import simulate as study
from bench.engine_study.latency import Objectives
from bench.engine_study.part import Part
from bench.tpu_model import kv_write as write_model
from bench.tpu_model import schedule as ts
from bench.verdicts import engine as verdicts
from reference_engine import traffic
from reference_engine.config import BACKENDS, KV_WRITES

PARTS = ("study", "share", "launches", "real", "serve")

# `allow_override`: other commands have flags of these names, and a process may import several.
_PARTS = flags.DEFINE_list("parts", None, f"Some of {', '.join(PARTS)}.", allow_override=True)
_TRACES = flags.DEFINE_list(
    "traces",
    [],
    "Trace files with the columns of the Azure LLM inference traces, or in the format of the"
    " Mooncake traces; a generator's requests are studied beside them.",
)
_NUM_REQUESTS = flags.DEFINE_integer(
    "requests", 500, "Requests of each trace, from its top.", lower_bound=1
)
_LOAD = flags.DEFINE_float(
    "load", 0.8, "Offered load, of what the engine takes in when all requests are there at once."
)
_SEED = flags.DEFINE_integer("traffic_seed", 0, "Fixes the generated requests.")
_DEVICE = flags.DEFINE_string(
    "device",
    "v6e",
    "TPU generation whose predicted costs the study has; or a file that"
    " `--parts=real --json` wrote, for a device's measured costs.",
)
_GENERATIONS = flags.DEFINE_list(
    "generations", ["v5e", "v6e", "tpu7x"], "TPU generations of the share.", allow_override=True
)
_PAGE_SIZES = flags.DEFINE_list(
    "page_sizes",
    ["16", "32", "64", "128", "256"],
    "Tokens in a page; where the flag is left out, the parts but the study take 16 alone.",
    allow_override=True,
)
_BUDGETS = flags.DEFINE_list(
    "budgets", ["512", "1024", "2048", "4096", "8192"], "Most new tokens in a step."
)
_KV_WRITES = flags.DEFINE_list("kv_writes", list(KV_WRITES), f"Some of {', '.join(KV_WRITES)}.")
_BOUND = flags.DEFINE_bool(
    "descriptor_bound",
    True,
    "Whether the study's DMA engine takes a descriptor in"
    f" {write_model.DESCRIPTOR_NS:.0f} ns, all that published data prove, and no less.",
)
_HOST_US = flags.DEFINE_float(
    "host_us",
    700.0,
    "Host work between two steps, for the study; the default is between the"
    " least and the median (600, 770) that `pytest bench/test_engine.py --benchmark-only` measured"
    " with 64 decodes on a shared core.",
)
_POOL_TOKENS = flags.DEFINE_integer(
    "pool_tokens", 98_304, "Tokens that the pool holds in the study (12 GiB for Llama 3 8B)."
)
_TTFT_MS = flags.DEFINE_float("ttft_ms", 1000.0, "A good request's time to first token, at most.")
_TPOT_MS = flags.DEFINE_float("tpot_ms", 50.0, "A good request's time for each further token.")
_MODEL = flags.DEFINE_enum(
    "real_model", None, list(engine_real.MODELS), "Default: llama3-8b, tiny on a CPU."
)
_BATCHES = flags.DEFINE_list(
    "batches", ["prefill", "mixed", "decode"], "Kinds of batches of the real part."
)
_ATTENTION = flags.DEFINE_enum("real_attention", "auto", list(BACKENDS), "Its attention's backend.")
_WRITE_BACKEND = flags.DEFINE_enum(
    "real_write_backend", "auto", list(BACKENDS), "Its writes' backend."
)
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "Of the study.", lower_bound=1)
_ALL = flags.DEFINE_bool("all", False, "Print every row after the verdict.", allow_override=True)
_JSON = flags.DEFINE_bool(
    "json", False, "Print every row and the verdict as JSON on stdout.", allow_override=True
)
_PLOT = flags.DEFINE_string("plot", None, "Write a PNG to this file.", allow_override=True)


def main(argv: Sequence[str]) -> None:
    """Runs the parts, prints."""
    say = report.start(argv, as_json=_JSON.value, plot=_PLOT.value)
    traces = _traces()
    report.require_choices("parts", PARTS, _PARTS.value or [])
    started = serve_part.start() if "serve" in (_PARTS.value or []) else []
    on_cpu = report.start_backends() == "cpu"
    parts = _PARTS.value or (["study", "share"] if on_cpu else ["real"])
    if _PLOT.value and "study" not in parts:
        raise app.UsageError("--plot draws the study; wanted study among --parts")
    report.require_choices("kv_writes", KV_WRITES, _KV_WRITES.value)
    report.require_choices("generations", tuple(ts.GENERATIONS), _GENERATIONS.value)
    found: dict[str, Part] = {}
    panels: dict[str, dict[str, list]] = {}
    if "study" in parts:
        found["study"], panels = _study(traces)
    if "share" in parts:
        found["share"] = _share()
    if "launches" in parts:
        found["launches"] = _launches()
    if "real" in parts:
        found["real"] = _real(on_cpu)
    if "serve" in parts:
        found["serve"] = serve_part.run(
            on_cpu,
            _TRACES.value,
            _NUM_REQUESTS.value,
            seed=_SEED.value,
            objectives=Objectives(_TTFT_MS.value, _TPOT_MS.value),
            started=started,
        )
    verdict = report.Verdict(
        "how fast the engine serves, as its users see it"
        if set(found) == {"serve"}
        else "what page-aligned scheduling and page-granular writes are worth to an engine",
        [row for part in found.values() for row in part.rows],
        [part.note for part in found.values()],
    )
    say(verdict.text())
    if _ALL.value:
        say("\n" + "\n\n".join(part.details for part in found.values()))
    if _PLOT.value and panels:
        report.save_plot(
            _PLOT.value,
            panels,
            xlabel="budget of a step, tokens",
            log_y=False,
            ylabel="change of throughput with alignment, percent",
            title=f"Page-aligned scheduling, every request there from the start ({_DEVICE.value})",
        )
    if _JSON.value:
        records = {name: part.record for name, part in found.items()}
        where = {"environment": report.environment()}
        report.write_json(where | records | {"verdict": verdict.record()})


def _page_sizes_or_16() -> list[str]:
    return _PAGE_SIZES.value if _PAGE_SIZES.present else ["16"]


def _traces() -> dict[str, list[traffic.Arrival]]:
    """Name -> requests: the files', and the generator's."""
    if not 0 < _LOAD.value < 100:
        raise app.UsageError(f"--load is {_LOAD.value}; wanted a number above 0 and below 100")
    read = [serve_part.read_trace(path, _NUM_REQUESTS.value) for path in _TRACES.value]
    found = {trace.name: list(trace.arrivals) for trace in read}
    return found | {"generated": traffic.generate(_NUM_REQUESTS.value, seed=_SEED.value)}


# --- the study --------------------------------------------------------------------------------


def _study(traces: dict[str, list[traffic.Arrival]]) -> tuple[Part, dict[str, dict[str, list]]]:
    page_sizes = report.require_sizes("page_sizes", _PAGE_SIZES.value, engine_cost.PAGE_SIZES)
    budgets = report.require_sizes("budgets", _BUDGETS.value)
    cost = _cost()
    options: dict[str, Any] = {
        "pool_tokens": _POOL_TOKENS.value,
        "objectives": Objectives(_TTFT_MS.value, _TPOT_MS.value),
    }
    loaded = {
        name: study.at_load(arrivals, _LOAD.value, name, cost, **options)
        for name, arrivals in traces.items()
    }
    cells = [
        study.Cell(trace, page, budget, aligned, form)
        for trace in traces
        for page in page_sizes
        for budget in budgets
        if budget >= page
        for form in _KV_WRITES.value
        for aligned in (False, True)
    ]
    at_once = {
        name: [dataclasses.replace(a, seconds=0.0) for a in arrivals]
        for name, arrivals in traces.items()
    }
    full = [cell for cell in cells if cell.kv_write == _KV_WRITES.value[-1]]
    with report.Progress(len(cells) + len(full), "simulating") as progress:

        def done(cell: study.Cell) -> None:
            progress.step(f"{cell.trace} page {cell.page_size} budget {cell.budget}")

        outcomes = study.sweep(
            loaded, cells, cost, num_processes=_PROCESSES.value, on_done=done, **options
        )
        capacity = study.sweep(
            at_once, full, cost, num_processes=_PROCESSES.value, on_done=done, **options
        )
    by_cell = dict(zip(cells, outcomes, strict=True))
    by_full_cell = dict(zip(full, capacity, strict=True))
    panels = tables.panels(by_full_cell)
    details = (
        f"Scheduling of Llama 3 8B in simulated time, load {_LOAD.value:g},"
        f" {_POOL_TOKENS.value:,} tokens in the pool.\n"
    )
    details += tables.study_text(by_cell, loaded, cost, _told_form(), options["objectives"])
    details += (
        "\n\nChange of throughput with alignment, percent, all requests there from the start\n"
        + report.table(tables.capacity_rows(panels), indent=2)
    )
    record = {
        "cost": engine_cost.as_record(cost),
        "load": _LOAD.value,
        "cells": [dataclasses.asdict(c) | dataclasses.asdict(o) for c, o in by_cell.items()],
        "capacity": [
            dataclasses.asdict(c) | {"throughput": o.throughput, "seconds": o.seconds}
            for c, o in by_full_cell.items()
        ],
    }
    note = (
        "study: simulated time, the engine's own scheduler; the costs of a step of Llama 3 8B are"
        f" {cost.source}."
    )
    rows = verdicts.study_rows(by_cell, by_full_cell, _told_form())
    return Part(record, rows, note, details), panels


def _told_form() -> str:
    """The form of write that the study's tables are of."""
    return "pages" if "pages" in _KV_WRITES.value else _KV_WRITES.value[0]


def _cost() -> engine_cost.Cost:
    if _DEVICE.value not in ts.GENERATIONS:
        try:
            return engine_cost.fitted(
                _DEVICE.value, host_us=_HOST_US.value if _HOST_US.present else None
            )
        except OSError:
            raise app.UsageError(
                f"--device is {_DEVICE.value!r}; wanted one of {', '.join(ts.GENERATIONS)}, or a"
                " file that --parts=real --json wrote"
            ) from None
        except ValueError as error:
            raise app.UsageError(str(error)) from None
    with report.Progress(12, "compiling") as progress:
        return engine_cost.predicted(
            _DEVICE.value,
            host_us=_HOST_US.value,
            is_bound_by_descriptors=_BOUND.value,
            on_done=lambda job, _: progress.step(job.name),
        )


# --- the share --------------------------------------------------------------------------------


def _share() -> Part:
    with report.Progress(12 * len(_GENERATIONS.value), "compiling") as progress:
        costs = [
            engine_cost.predicted(
                name,
                host_us=0.0,
                is_bound_by_descriptors=False,
                on_done=lambda job, _: progress.step(job.name),
            )
            for name in _GENERATIONS.value
        ]
    descriptor_us = engine_cost.LLAMA3_8B.num_layers * write_model.DESCRIPTOR_NS * 1e-3
    page_sizes = report.require_sizes("page_sizes", _page_sizes_or_16(), engine_cost.PAGE_SIZES)
    shares = engine_share.shares(costs, engine_share.BATCHES, page_sizes, descriptor_us)
    forms = (*engine_share.FORMS, "shipped")
    details = (
        "PREDICTED share of the KV write in a step of Llama 3 8B, percent, by form; and by how"
        " much\nof a step whole pages are faster. Issue alone / at one descriptor in"
        f" {write_model.DESCRIPTOR_NS:.0f} ns. Products at peak,\nweights at peak bandwidth,"
        " attention and writes from compiled schedules, no host: a real step is\nlonger and its"
        " share smaller. `shipped`: one slice of"
        f" {engine_share.SHIPPED_SLICE_CYCLES} cycles a token. `fused`: what the writing adds to\n"
        "the attention, none of it hidden. The weights alone fill a v5e.\n"
        + report.table([tables.share_row(share) for share in shares], indent=2)
    )
    record = [
        dataclasses.asdict(share)
        | {
            "percent": {form: share.percent(form, is_bound=False) for form in forms},
            "percent_bound": {form: share.percent(form, is_bound=True) for form in forms},
        }
        for share in shares
    ]
    note = (
        "share: predicted from schedules compiled for TPUs, a step of Llama 3 8B; nothing here ran"
        f" on a TPU. Both bounds count: the core's issue alone, and {write_model.DESCRIPTOR_NS:.0f}"
        " ns per descriptor."
    )
    return Part(record, verdicts.share_rows(shares), note, details)


# --- what a step launches on a TPU ------------------------------------------------------------


def _launches() -> Part:
    cases = [(name, shape) for name in _GENERATIONS.value for shape in tpu_step.SHAPES]
    record = []
    with report.Progress(len(cases), "compiling") as progress:
        for generation, shape in cases:
            found = tpu_step.launches(generation, shape)
            record.append({"generation": generation, "model": shape, **found})
            progress.step(f"{shape} for {generation}")
    details = "What a layer of a step of 64 decodes launches, written by the attention's call\n"
    details += report.table([tpu_step.as_row(row) for row in record], indent=2)
    note = (
        "launches: counted in the programs that XLA compiles for TPUs; nothing here ran on a TPU."
    )
    return Part(record, verdicts.launch_rows(record), note, details)


# --- the real thing ---------------------------------------------------------------------------


def _real(on_cpu: bool) -> Part:
    name = _MODEL.value or ("tiny" if on_cpu else "llama3-8b")
    setup = engine_real.Setup(
        engine_real.MODELS[name],
        shrink=16 if name == "tiny" else 1,
        attention_backend=_ATTENTION.value,
        write_backend=_WRITE_BACKEND.value,
    )
    page_sizes = report.require_sizes("page_sizes", _page_sizes_or_16())
    forms = _KV_WRITES.value
    report.require_choices("batches", ("prefill", "mixed", "decode"), _BATCHES.value)
    batches = [b for b in engine_real.ALL_BATCHES if b.name.startswith(tuple(_BATCHES.value))]
    total = len(batches) * len(forms) * len(page_sizes)
    device = jax.devices()[0].device_kind
    host = engine_real.host_work(setup)
    details = (
        f"The engine on {host['batch']}: {host['step_us'] / 1e3:.2f} ms a step, of which the host"
        f" works {host['host_us'] / 1e3:.3f} ms ({host['host_percent']:.1f}%), beside the device"
        f" unless it is late, as in {host['late_percent']:.0f}% of the steps;"
        f" {host['recompiles']} programs compiled meanwhile"
    )
    rows = []
    for row in engine_real.measure(setup, batches, forms, page_sizes):
        rows.append(row)  # told at once: a run of minutes may be cut short
        cells = tables.real_row(row)
        print(
            f"{len(rows)}/{total} {cells['batch']}, page {cells['page']}, {cells['form']}:"
            f" {cells['step ms']} ms, writes {cells['writes ms']}",
            file=sys.stderr,
            flush=True,
        )
    how = (
        f"Measured on {device}: {name}, random weights, {setup.model.dtype}, attention by"
        f" {setup.attention_backend}, writes by {setup.write_backend}"
        + (f"; batches and lengths divided by {setup.shrink}" if setup.shrink > 1 else "")
    )
    table = report.table([tables.real_row(row) for row in rows], indent=2)
    fit = engine_real.fit(rows, host["gap_us"], device) if setup.shrink == 1 else None
    record = {"model": name, "shrink": setup.shrink, "rows": rows, "host": host, "fit": fit}
    note = f"real: {how[0].lower()}{how[1:]}."
    return Part(record, verdicts.real_rows(rows), note, f"{details}\n\n{how}\n{table}")


if __name__ == "__main__":
    app.run(main)
