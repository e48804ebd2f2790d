# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What page-granular KV writes are worth: page against slice against token.

    python -m bench.kv_write [--generations=v5e,v6e,tpu7x] [--page_sizes=16,64] [--tokens=64,4096]
                             [--peers=torch,flashinfer] [--all] [--json]

Without an accelerator it compiles the shipped TPU kernels for real TPU generations, reads their
final schedules and predicts; with one it measures the same calls there, on a GPU beside a plain
copy of as many bytes and, if asked, beside other libraries. Either way nothing is printed before
the ops agree with the oracle bit for bit. It prints a verdict, with --all also every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.experimental.pallas import tpu as pltpu

from bench import report
from bench.cases import kv_write as write_cases
from bench.cases.kv_write import OPS, WriteCase
from bench.measure import kv_write as kv_write_measure
from bench.measure.kv_write import random_inputs
from bench.peers import child as peers
from bench.peers import kv_write as kv_write_peers
from bench.tpu_model import published as model_check
from bench.tpu_model import schedule as ts
from bench.tpu_model.kv_write import DESCRIPTOR_NS, WritePrediction, predict
from bench.verdicts import kv_write as verdicts

_GENERATIONS = flags.DEFINE_list(
    "generations", list(write_cases.GENERATIONS), "TPU generations to predict for."
)
_OPS = flags.DEFINE_list(
    "ops", list(OPS), "page, page_starts (page_write with token_starts), slice (page-long), token."
)
_PAGE_SIZES = flags.DEFINE_list(
    "page_sizes", list(map(str, write_cases.PAGE_SIZES)), "Tokens in a page."
)
_TOKENS = flags.DEFINE_list("tokens", list(map(str, write_cases.TOKENS)), "New tokens in a call.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", write_cases.NUM_KV_HEADS, "KV heads.", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", write_cases.HEAD_DIM, "Head dimension.", lower_bound=1)
_FORM = flags.DEFINE_enum("form", "flat", ["flat", "heads"], "k and v as [T, K*H] or [T, K, H].")
_PEERS = flags.DEFINE_list(
    "peers",
    [],
    f"Measure these on a GPU too: {', '.join(peers.MODULES)}; a missing one is an error.",
)
_SCATTER = flags.DEFINE_bool("scatter", True, "Measure the plain-jax scatter beside the ops.")
_CHECK_MODEL = flags.DEFINE_bool(
    "check_model", True, "Repeat the check of the model against published timings."
)
_ALL = flags.DEFINE_bool("all", False, "Print every row after the verdict.")
_JSON = flags.DEFINE_bool("json", False, "Print every row and the verdict as JSON on stdout.")
_PLOT = flags.DEFINE_string("plot", None, "Write a PNG of time against tokens to this file.")

# What moves as many bytes in other ways: a key of the JSON -> its title.
_BASELINES = {
    "scatter": "The plain-jax scatter",
    "copy": "A plain copy of as many bytes",
    "peers": "Other libraries",
}
_ASSUMPTIONS = f"""\
The numbers for TPUs are predictions. They rest on
- the clock and the peak HBM bandwidth of one core (sources: bench/tpu_model/schedule.py):
  {{}};
- bundles of the final schedule that libtpu compiled, times the trips of this case, as cycles;
- perfect overlap: a call takes as long as its slowest unit, HBM or the issuing core; the second
  bound lets the DMA engine take one descriptor in {DESCRIPTOR_NS:.0f} ns, all that published v6e \
data prove.
They leave out DMA latency (about 0.45 us at either end, fitted below: calls of a few hundred tokens
take that and not what stands here), waits, bank conflicts, instruction fetch, launch overhead, and
what XLA runs before the kernel ("XLA passes"). Expect 80 to 90% of a bandwidth-bound figure."""


def main(argv: Sequence[str]) -> None:
    """Checks, predicts or measures, prints."""
    say = report.start(argv, as_json=_JSON.value, plot=_PLOT.value)
    cases = _cases()
    on_cpu = report.start_backends() == "cpu"
    peers.require(_PEERS.value, on_gpu=jax.default_backend() == "gpu")
    check_against_oracle()
    record: dict[str, Any] = {"environment": report.environment()}
    device = jax.devices()[0].device_kind
    if on_cpu:
        predictions = _predict(cases)
        record["predictions"] = [_as_record(p) for p in predictions]
        checks = _check_model() if _CHECK_MODEL.value else []
        record |= {"model_check": [dataclasses.asdict(check) for check in checks]}
        verdict = verdicts.predicted(predictions, checks)
        details = [_prediction_text(predictions)]
        details += ["", model_check.format_check(checks)] if checks else []
        points = _points(predictions)
    else:
        record["measured"] = _measure(cases)
        details = [kv_write_measure.text(record["measured"], device)]
        points = {device: kv_write_measure.lines(record["measured"])}
    baselines = _baselines(on_cpu=on_cpu)
    if not on_cpu:
        verdict = verdicts.measured(record["measured"], baselines, device)
    for name, rows in baselines.items():
        details += [f"\n{_BASELINES[name]}, measured on this {device}:"]
        details += [kv_write_measure.baseline_table(rows)]
    record |= baselines | {"verdict": verdict.record()}
    say(verdict.text())
    if _ALL.value:
        say("\n" + "\n".join(details))
    if _PLOT.value:
        report.save_plot(
            _PLOT.value, points, xlabel="new tokens", ylabel="microseconds", title=_plot_title()
        )
    if _JSON.value:
        report.write_json(record)


def _check_model() -> list[model_check.Check]:
    with report.Progress(len(model_check.PUBLISHED_US), "checking the model") as progress:
        return model_check.check_model(on_done=lambda job, _: progress.step(job.name))


def _measure(cases: Sequence[WriteCase]) -> list[dict[str, Any]]:
    """The ops on this accelerator; of the cases for several generations those for the first."""
    mine = [case for case in cases if case.generation == cases[0].generation]
    measured = []
    with report.Progress(len(mine), "measuring") as progress:
        for case in mine:
            measured.append(kv_write_measure.measure_op(case))
            progress.step(case.op)
    return measured


def _baselines(*, on_cpu: bool) -> dict[str, list[dict[str, Any]]]:
    """What moves as many bytes in other ways, measured wherever this runs: name -> rows."""
    cases = [_token_case(int(tokens)) for tokens in _TOKENS.value]
    found: dict[str, list[dict[str, Any]]] = {}
    if _SCATTER.value:
        promises = [False] if on_cpu else [False, True]
        found["scatter"] = [
            kv_write_measure.measure_scatter(case, unique) for case in cases for unique in promises
        ]
    if not on_cpu:
        found["copy"] = [kv_write_measure.measure_copy(case) for case in cases]
    if _PEERS.value:
        with peers.Child() as run:
            found["peers"] = [
                kv_write_measure.as_record(
                    case, kv_write_peers.NAMES[peer], run(kv_write_peers.measure, peer, case)
                )
                for case in cases
                for peer in _PEERS.value
            ]
    return found


def _cases() -> list[WriteCase]:
    """The cases that the flags name; a token is written by itself, whatever the page size."""
    report.require_choices("generations", ts.GENERATIONS, _GENERATIONS.value)
    report.require_choices("ops", OPS, _OPS.value)
    page_sizes = report.require_sizes("page_sizes", _PAGE_SIZES.value)
    token_counts = report.require_sizes("tokens", _TOKENS.value)
    return [
        WriteCase(
            op,
            generation,
            page,
            tokens,
            _KV_HEADS.value,
            _HEAD_DIM.value,
            write_cases.DTYPE,
            is_flat=_FORM.value == "flat",
        )
        for generation in _GENERATIONS.value
        for tokens in token_counts
        for op in _OPS.value
        for page in (page_sizes[:1] if op == "token" else page_sizes)
        if tokens >= page or op == "token"
    ]


def _token_case(num_tokens: int) -> WriteCase:
    """Tokens one by one, [T, K, H], as the baselines take them."""
    page_size = min(map(int, _PAGE_SIZES.value))
    return WriteCase(
        "token",
        "v6e",
        page_size,
        num_tokens,
        _KV_HEADS.value,
        _HEAD_DIM.value,
        write_cases.DTYPE,
        is_flat=False,
    )


# --- correctness ------------------------------------------------------------------------------


def check_against_oracle() -> None:
    """Every op against the oracle, bit for bit over the whole pool, or the program ends.

    On a CPU the TPU kernels run in interpret mode, small; elsewhere the backend that would be
    measured runs, at size.
    """
    on_cpu = jax.default_backend() == "cpu"
    backend = "mosaic_tpu" if on_cpu else "auto"
    tokens, page_size = (37, 4) if on_cpu else (4097, 16)
    for op in OPS:
        case = WriteCase(op, "v6e", page_size, tokens, 2, 128, write_cases.DTYPE)
        arrays = random_inputs(case, seed=1)
        want = _bytes(jax.jit(case.step("oracle"))(*arrays))
        if on_cpu:
            with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
                got = _bytes(jax.jit(case.step(backend))(*arrays))
        else:
            got = _bytes(jax.jit(case.step(backend))(*arrays))
        if not np.array_equal(want, got):
            raise SystemExit(f"{op}: {backend} differs from the oracle; no number is printed")


def _bytes(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


# --- prediction -------------------------------------------------------------------------------


def _predict(cases: Sequence[WriteCase]) -> list[WritePrediction]:
    with report.Progress(len(cases), "compiling") as progress:
        return predict(cases, on_done=lambda job, _: progress.step(job.name))


def _as_record(p: WritePrediction) -> dict[str, Any]:
    return {
        **dataclasses.asdict(p),
        "bytes": p.case.num_bytes,
        "issue_bound": {"us": p.microseconds(False), "by": p.bound(False)},
        "descriptor_bound": {"us": p.microseconds(True), "by": p.bound(True)},
    }


def _prediction_text(predictions: Sequence[WritePrediction]) -> str:
    shape = f"{_KV_HEADS.value} KV heads, head_dim {_HEAD_DIM.value}, {write_cases.DTYPE}"
    generations = ", ".join(
        f"{name} {ts.GENERATIONS[name].clock_ghz:g} GHz {ts.GENERATIONS[name].hbm_gb_per_s:g} GB/s"
        for name in _GENERATIONS.value
    )
    parts = [f"Predicted from compiled schedules: {shape}, k and v {_FORM.value}."]
    parts += [_ASSUMPTIONS.format(generations)]
    for generation in _GENERATIONS.value:
        mine = [p for p in predictions if p.case.generation == generation]
        parts += [f"\n{generation}", report.table([_row(p) for p in mine], indent=2)]
    parts += ["\nTime of page : slice : token, page = 1"]
    parts += [report.table(_ratio_rows(predictions), indent=2)]
    parts += ["", *_token_sentences(predictions)]
    return "\n".join(parts)


def _row(p: WritePrediction) -> dict[str, str]:
    issue, descriptor = p.microseconds(False), p.microseconds(True)
    return {
        "op": p.case.op,
        "page": "-" if p.case.op == "token" else str(p.case.page_size),
        "tokens": f"{p.case.num_tokens:,}",
        "DMAs": f"{p.num_dmas:,}",
        "cycles/issue": f"{p.cycles_per_issue:.1f}",
        "MB": f"{p.case.num_bytes / 1e6:.2f}",
        "issue/HBM": f"{p.schedule_cycles / p.hbm_cycles:.2f}",
        "us": f"{issue:.2f}",
        "GB/s": f"{p.case.num_bytes / issue / 1e3:,.0f}",
        "bound": p.bound(False),
        f"us, {DESCRIPTOR_NS:.0f} ns/DMA": f"{descriptor:.2f}",
        "GB/s ": f"{p.case.num_bytes / descriptor / 1e3:,.0f}",
        "bound ": p.bound(True),
        "XLA passes": str(p.num_xla_passes),
    }


def _by_size(predictions: Sequence[WritePrediction]) -> dict[tuple, dict[str, WritePrediction]]:
    """(generation, tokens, page size) -> op -> prediction; tokens stand with every page size."""
    sizes = sorted({p.case.page_size for p in predictions if p.case.op != "token"})
    found: dict[tuple, dict[str, WritePrediction]] = {}
    for p in predictions:
        for size in sizes if p.case.op == "token" else [p.case.page_size]:
            found.setdefault((p.case.generation, p.case.num_tokens, size), {})[p.case.op] = p
    return found


def _ratio_rows(predictions: Sequence[WritePrediction]) -> list[dict[str, str]]:
    rows = []
    for (generation, tokens, page_size), ops in _by_size(predictions).items():
        if not {"page", "slice", "token"} <= set(ops):
            continue
        row = {"generation": generation, "tokens": f"{tokens:,}", "page": str(page_size)}
        for title, descriptors in (("issue alone", False), (f"{DESCRIPTOR_NS:.0f} ns/DMA", True)):
            page = ops["page"].microseconds(descriptors)
            row[title] = " : ".join(
                f"{ops[op].microseconds(descriptors) / page:.2f}"
                for op in ("page", "slice", "token")
            )
        rows.append(row)
    return rows


def _token_sentences(predictions: Sequence[WritePrediction]) -> list[str]:
    """Where writing by token stops being bound by HBM, and by how much, under both bounds."""
    lines = []
    for generation in _GENERATIONS.value:
        mine = [p for p in predictions if p.case.generation == generation and p.case.op == "token"]
        if not mine:
            continue
        p = max(mine, key=lambda p: p.case.num_tokens)
        per_token = p.hbm_cycles / p.case.num_tokens
        one_dma = p.descriptor_cycles / p.num_dmas
        lines.append(
            f"{generation}: token_write takes {p.schedule_cycles / p.hbm_cycles:.2f}x its HBM time "
            f"to issue, {p.descriptor_cycles / p.hbm_cycles:.2f}x at one DMA in "
            f"{DESCRIPTOR_NS:.0f} ns (for any page size, since each token is a DMA); runs of "
            f"{one_dma / per_token:.1f} tokens and more hide that."
        )
    return lines


def _points(predictions: Sequence[WritePrediction]) -> dict[str, dict[str, list]]:
    """generation -> line -> points, for the largest page size that all counts of tokens allow."""
    panels: dict[str, dict[str, list]] = {}
    page_size = min(p.case.page_size for p in predictions)
    for p in predictions:
        if p.case.page_size != page_size or p.case.op == "page_starts":
            continue
        lines = panels.setdefault(p.case.generation, {})
        for name, descriptors in (("issue", False), (f"{DESCRIPTOR_NS:.0f} ns/DMA", True)):
            label = f"{p.case.op}, {name}"
            lines.setdefault(label, []).append((p.case.num_tokens, p.microseconds(descriptors)))
    return panels


def _plot_title() -> str:
    kind = "predicted" if jax.default_backend() == "cpu" else "measured"
    return f"KV writes, page size {min(map(int, _PAGE_SIZES.value))}, {kind}"


if __name__ == "__main__":
    app.run(main)
