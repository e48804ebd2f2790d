# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What ragged paged attention costs: decodes, prefills, and both in one call.

    python -m bench.attention [--generations=v5e,v6e,tpu7x] [--cases=decode,prefill] [--presets=...]
                              [--pool_dtype=float8_e4m3fn] [--peers=torch,flashinfer]
                              [--backend=xla] [--wall_clock] [--all] [--json]

Without an accelerator it compiles the shipped TPU kernel for real TPU generations, reads its final
schedule and predicts whole calls; with one it measures the same calls there, on a GPU beside other
libraries if asked. With --backend=xla it measures that backend, on a CPU beside the oracle.
Whatever it does, nothing is printed before the op agrees with the oracle. It prints a verdict, with
--all also every row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.experimental.pallas import tpu as pltpu

from bench import report
from bench.cases.attention import (
    CASES,
    CPU_CASES,
    GPU_CASES,
    PRESETS,
    SCALES,
    Call,
    Case,
    Runs,
    room_for,
)
from bench.measure.attention import (
    measure,
    measure_beside_oracle,
    measure_peers,
    measured_text,
    peers_text,
    random_inputs,
)
from bench.peers import child as peers
from bench.tpu_model import schedule as ts
from bench.tpu_model.attention import (
    Prediction,
    Writing,
    compiles,
    predict,
    unknown,
    writing_pairs,
)
from bench.tpu_model.compile import as_if_on
from bench.verdicts import attention as verdicts
from pallas_paged.attention.tpu import launch as mosaic_tpu

_KNOWN = CASES | GPU_CASES | CPU_CASES
# The platforms on which each backend can be checked here.
_RUNS_ON = {"xla": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",), "mosaic_tpu": ("cpu", "tpu")}

# `allow_override`: other commands have flags of these names, and a process may import several.
_GENERATIONS = flags.DEFINE_list(
    "generations",
    ["v5e", "v6e", "tpu7x"],
    "TPU generations to predict for.",
    allow_override=True,
)
_CASES = flags.DEFINE_list(
    "cases",
    None,
    f"Some of {', '.join(_KNOWN)}; by default {', '.join(CASES)}, on a GPU "
    f"{', '.join(GPU_CASES)}, and where a CPU is measured {', '.join(CPU_CASES)}.",
)
_LENS = flags.DEFINE_list(
    "lens",
    None,
    "Sequences of a case of your own, as [COUNTx]NEW:ALL: 64x1:4096,512:8704. The other cases are "
    "left out unless --cases names them.",
)
_PAGE_SIZES = flags.DEFINE_list(
    "page_sizes", ["16", "128"], "Tokens in a page.", allow_override=True
)
_PRESETS = flags.DEFINE_list(
    "presets", ["llama3-8b"], f"Some of {', '.join(PRESETS)}.", allow_override=True
)
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Query heads, in place of the preset's.")
_KV_HEADS = flags.DEFINE_integer(
    "kv_heads", None, "KV heads, in place of the preset's.", allow_override=True
)
_HEAD_DIM = flags.DEFINE_integer(
    "head_dim", None, "Head dimension, in place of the preset's.", allow_override=True
)
_WINDOW = flags.DEFINE_integer("sliding_window", None, "Sliding window, in place of the preset's.")
_SOFT_CAP = flags.DEFINE_float("soft_cap", None, "Soft cap, in place of the preset's.")
_POOL_DTYPE = flags.DEFINE_enum(
    "pool_dtype",
    "bfloat16",
    ["bfloat16", *SCALES],
    "Of the pool; q is bfloat16. 8-bit pools have a scale a tensor.",
)
_PEERS = flags.DEFINE_list(
    "peers",
    [],
    f"Measure these on a GPU too: {', '.join(peers.MODULES)}; a missing one is an error.",
    allow_override=True,
)
_BACKEND = flags.DEFINE_enum(
    "backend",
    "auto",
    ["auto", *_RUNS_ON],
    "What is measured, on a CPU beside the oracle; mosaic_tpu is predicted there. auto is the "
    "kernel for the accelerator, and on a CPU mosaic_tpu.",
    allow_override=True,
)
_WALL_CLOCK = flags.DEFINE_bool(
    "wall_clock",
    False,
    "Measure single calls by the wall clock on an accelerator too, what the host does included.",
)
_FUSED = flags.DEFINE_bool(
    "fused", True, "Predict what write_and_attend adds to the calls, too; compiles as many again."
)
_PARTS = flags.DEFINE_bool("parts", False, "Print where in the kernel a call's bundles are, too.")
_ALL = flags.DEFINE_bool("all", False, "Print every row after the verdict.", allow_override=True)
_JSON = flags.DEFINE_bool(
    "json", False, "Print every row and the verdict as JSON on stdout.", allow_override=True
)
_PLOT = flags.DEFINE_string(
    "plot", None, "Write a PNG of 64 decodes' time against their keys.", allow_override=True
)

# How a configuration is printed.
_SIZES = "block_kv:block_q:stages:blocks per iteration"
# Largest difference from the oracle in bfloat16 outputs of about 1: two steps of rounding.
_TOLERANCE = 0.03
_PLOTTED: dict[str, Runs] = {
    f"64 decodes at {keys}": ((64, 1, keys),) for keys in (256, 512, 1024, 2048, 4096, 8192)
}

_ASSUMPTIONS = """\
The numbers for TPUs are predictions. They rest on
- the clock and the peak HBM bandwidth of one core (sources: bench/tpu_model/schedule.py):
  {};
- bundles of the final schedule that libtpu compiled, each part as often as the kernel's walk over
  these lengths runs it (bench/tpu_model/attention_trips.py), as cycles;
- perfect overlap: a call takes as long as the slower of the core and HBM;
- weights that stay in range, so that no prefill runs again with its exact maxima.
They leave out waiting for a DMA, its latency (about 0.45 us at either end of a call) and what the
DMA engine takes a descriptor, bank conflicts, instruction fetch, taken branches, the page table's
way to SMEM, launch overhead and what XLA runs before the kernel. Matrix-unit use counts
4 * queries * keys * heads * head_dim: of all pairs (no causal discount), and of the blocks that
the kernel takes. "block" is a decode's block of keys, with all that comes with each of them, on the
core and in HBM; "fixed" is what a decode costs outside its blocks."""
_WRITING = """\
Writing the new tokens as well, by write_and_attend: cycles that it adds on the core, to the same
call with the same block sizes, for each new token of decodes and each page of prefills' new
tokens."""


def main(argv: Sequence[str]) -> None:
    """Checks, predicts or measures, prints."""
    say = report.start(argv, as_json=_JSON.value, plot=_PLOT.value)
    report.start_backends()
    is_predicted = _is_predicted()
    peers.require(_PEERS.value, on_gpu=jax.default_backend() == "gpu")
    if _WALL_CLOCK.value and is_predicted:
        raise app.UsageError("--wall_clock is for what is measured; a CPU measures --backend=xla")
    if _WALL_CLOCK.value and _PEERS.value:
        raise app.UsageError("--peers are timed by their kernels alone; leave --wall_clock out")
    cases = _cases(_runs())
    plotted = _cases(_PLOTTED) if _PLOT.value else []
    _require_supported([*cases, *plotted])
    check_against_oracle(list(_shapes().values()))
    found = _predict(cases, plotted) if is_predicted else _measure(cases, plotted)
    record = {"environment": report.environment()} | found.record
    record["verdict"] = found.verdict.record()
    say(found.verdict.text())
    if _ALL.value:
        say(f"\n{found.details}")
    if _PLOT.value:
        how = "predicted" if is_predicted else "measured"
        report.save_plot(
            _PLOT.value,
            found.points,
            xlabel="keys of each of 64 decodes",
            ylabel="microseconds",
            title=f"Attention, {how}",
        )
    if _JSON.value:
        report.write_json(record)


@dataclasses.dataclass(frozen=True)
class _Findings:
    """What a run found.

    Attributes:
      verdict: of the rows.
      record: the rows, for the JSON.
      details: the rows, as tables.
      points: for the plot.
    """

    verdict: report.Verdict
    record: dict[str, Any]
    details: str
    points: dict[str, dict]


def _predict(cases: Sequence[Case], plotted: Sequence[Case]) -> _Findings:
    pairs = writing_pairs(cases) if _FUSED.value else []
    wanted = [*cases, *(case for pair in pairs for case in pair), *plotted]
    total = len(set(compiles(wanted).values()))
    with report.Progress(total, "compiling") as progress:
        found = iter(predict(wanted, on_done=lambda job, _: progress.step(job.name)))
    predictions = list(itertools.islice(found, len(cases)))
    writing = [Writing(next(found), next(found)) for _ in pairs]
    details = _prediction_text(predictions)
    if writing:
        details += f"\n\n{_WRITING}\n"
        details += report.table([_writing_row(w) for w in writing], indent=2)
    return _Findings(
        verdicts.predicted(_shapes(), predictions, writing),
        {
            "predictions": [_as_record(p) for p in predictions],
            "writing": [_as_record(w.fused) | {w.unit: w.extra_cycles} for w in writing],
        },
        details,
        _points([(p.case, p.microseconds) for p in found]),
    )


def _measure(cases: Sequence[Case], plotted: Sequence[Case]) -> _Findings:
    """The cases on this device; of those for several generations the first's."""
    kind = jax.devices()[0].device_kind
    first = [case for case in cases if case.generation == cases[0].generation]
    time = functools.partial(measure, backend=_backend(), by_wall_clock=_WALL_CLOCK.value)
    record: dict[str, Any] = {}
    if jax.default_backend() == "cpu":
        pairs = [measure_beside_oracle(case, _backend()) for case in first]
        record["measured"], record["peers"] = map(list, zip(*pairs, strict=True))
    else:
        record["measured"] = [time(case) for case in first]
    details = measured_text(record["measured"], kind)
    plotted = [case for case in plotted if case.generation == cases[0].generation]
    times = [(case, time(case)["median_us"]) for case in plotted]
    if _PEERS.value:
        record["peers"] = measure_peers(first, record["measured"], _PEERS.value)
    if "peers" in record:
        details += "\n" + peers_text(record["peers"])
    verdict = verdicts.measured(record["measured"], record.get("peers", ()), kind)
    return _Findings(verdict, record, details, _points(times, kind))


# --- cases ------------------------------------------------------------------------------------


def _runs() -> dict[str, Runs]:
    """Case name -> its sequences, as the flags say."""
    of_platform = {"gpu": GPU_CASES, "cpu": CASES if _is_predicted() else CPU_CASES}
    names = _CASES.value or list(of_platform.get(jax.default_backend(), CASES))
    report.require_choices("cases", _KNOWN, names)
    chosen = {name: _KNOWN[name] for name in names}
    if _LENS.value is None:
        return chosen
    own: list[tuple[int, int, int]] = []
    for text in _LENS.value:
        found = re.fullmatch(r"(?:(\d+)x)?(\d+):(\d+)", text.strip())
        count, new, keys = (int(x or 1) for x in found.groups()) if found else (0, 0, 0)
        if count < 1 or not 1 <= new <= keys:
            raise app.UsageError(
                f"--lens has {text!r}; wanted [COUNTx]NEW:ALL with 1 <= NEW <= ALL, as 64x1:4096"
            )
        own.append((count, new, keys))
    return (chosen if _CASES.value else {}) | {"own": tuple(own)}


def _shapes() -> dict[str, dict[str, Any]]:
    """Name -> heads and options, as the flags say."""
    report.require_choices("presets", PRESETS, _PRESETS.value)
    given: dict[str, Any] = {
        "num_heads": _NUM_HEADS.value,
        "num_kv_heads": _KV_HEADS.value,
        "head_dim": _HEAD_DIM.value,
        "sliding_window": _WINDOW.value,
        "soft_cap": _SOFT_CAP.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value <= 0:
            raise app.UsageError(f"--{name.replace('num_kv', 'kv')} is {value}; wanted > 0")
    shapes = {name: PRESETS[name] | given for name in _PRESETS.value}
    if _POOL_DTYPE.value != "bfloat16":
        shapes = {name: shape | {"pool_dtype": _POOL_DTYPE.value} for name, shape in shapes.items()}
    for shape in shapes.values():
        if shape["num_heads"] % shape["num_kv_heads"]:
            raise app.UsageError(
                f"--num_heads is {shape['num_heads']}; wanted a multiple of the "
                f"{shape['num_kv_heads']} KV heads"
            )
    if not given:
        return shapes
    return {f"{name}, changed": shape for name, shape in shapes.items()}


def _cases(runs: dict[str, Runs]) -> list[Case]:
    """Such sequences for every generation, page size and shape that the flags name."""
    report.require_choices("generations", tuple(ts.GENERATIONS), _GENERATIONS.value)
    page_sizes = report.require_sizes("page_sizes", _PAGE_SIZES.value)
    # Room for what is plotted, too, so that all share their compiles.
    room = [*_runs().values(), *(_PLOTTED.values() if _PLOT.value else ())]
    return [
        Case(name, generation, lens, Call(**shape, page_size=page, **room_for(room, page)))
        for generation in _GENERATIONS.value
        for shape in _shapes().values()
        for name, lens in runs.items()
        for page in page_sizes
    ]


def _require_supported(cases: Sequence[Case]) -> None:
    """Ends the program with the kernel's own sentence where it cannot run a case."""
    is_predicted = _is_predicted()
    for case in cases:
        with as_if_on(case.generation) if is_predicted else contextlib.nullcontext():
            reason = case.call.unsupported(_backend())
            reason = reason or (unknown(case.call) if is_predicted else None)
        if reason:
            where = case.generation if is_predicted else "this device"
            raise app.UsageError(f"{case.name} on {where}: {reason}")


def _backend() -> str:
    """What is checked, and measured or predicted; never the oracle."""
    platform = jax.default_backend()
    if _BACKEND.value == "auto":
        return "mosaic_gpu" if platform == "gpu" else "mosaic_tpu"
    if platform not in _RUNS_ON[_BACKEND.value]:
        raise app.UsageError(
            f"--backend is {_BACKEND.value}, which does not run here: jax's device is a {platform}"
        )
    return _BACKEND.value


def _is_predicted() -> bool:
    """Whether this device only predicts what the backend costs elsewhere."""
    return (jax.default_backend(), _backend()) == ("cpu", "mosaic_tpu")


# --- correctness ------------------------------------------------------------------------------


def check_against_oracle(shapes: Sequence[dict[str, Any]]) -> None:
    """A call of decodes and prefills against the oracle, or the program ends.

    On a CPU the backend runs small, the TPU kernel in interpret mode; elsewhere the backend that
    would be measured runs at size.

    Args:
      shapes: heads and options, fields of `Call`.
    """
    on_cpu = jax.default_backend() == "cpu"
    backend = _backend()
    runs = ((2, 1, 45), (1, 19, 150), (1, 1, 7)) if on_cpu else CASES["mixed"]
    page_size = 4 if on_cpu else 16
    for shape in shapes:
        if on_cpu:
            group = min(2, shape["num_heads"] // shape["num_kv_heads"])
            shape = shape | {"num_heads": group, "num_kv_heads": 1}
            if shape.get("sliding_window"):
                shape["sliding_window"] = min(shape["sliding_window"], 32)
        call = Call(**shape, page_size=page_size, **room_for([runs], page_size, is_exact=True))
        pool, q, *metadata = random_inputs(Case("gate", "v6e", runs, call), seed=1)
        want = jax.jit(call.step("oracle"))(q, pool, *metadata)
        if on_cpu:
            with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
                got = jax.jit(call.step(backend))(q, pool, *metadata)
        else:
            got = jax.jit(call.step(backend))(q, pool, *metadata)
        error = np.abs(np.asarray(want, np.float32) - np.asarray(got, np.float32)).max()
        if not error <= _TOLERANCE:
            raise SystemExit(
                f"ragged_paged_attention: {backend} differs from the oracle by {error:.3g}, more "
                f"than {_TOLERANCE}; no number is printed"
            )


# --- prediction -------------------------------------------------------------------------------


def _as_record(p: Prediction) -> dict[str, Any]:
    return {
        **dataclasses.asdict(p),
        "bytes": p.case.num_bytes,
        "flop": p.case.flop,
        "microseconds": p.microseconds,
        "bound": p.bound,
        "matrix_use": p.matrix_use(p.case.all_flop),
        "matrix_use_of_taken": p.matrix_use(p.taken_flop),
    }


def _prediction_text(predictions: Sequence[Prediction]) -> str:
    generations = ", ".join(
        f"{name} {ts.GENERATIONS[name].clock_ghz:g} GHz {ts.GENERATIONS[name].hbm_gb_per_s:g} GB/s"
        for name in _GENERATIONS.value
    )
    text = ["Predicted from compiled schedules.", _ASSUMPTIONS.format(generations)]
    for name, shape in _shapes().items():
        for generation in _GENERATIONS.value:
            mine = [
                p
                for p in predictions
                if p.case.generation == generation
                and {key: getattr(p.case.call, key) for key in shape} == shape
            ]
            text += [f"\n{generation}, {name}: {_shape_text(shape)}"]
            text += [report.table([_row(p, mine) for p in mine], indent=2)]
            if _PARTS.value:
                text += ["  percent of a call's bundles in"]
                text += [report.table([_parts_row(p) for p in mine], indent=2)]
    return "\n".join(text)


def _shape_text(shape: dict[str, Any]) -> str:
    words = f"{shape['num_heads']} query heads, {shape['num_kv_heads']} KV heads, head_dim "
    words += str(shape["head_dim"])
    for name in ("sliding_window", "soft_cap"):
        if shape.get(name) is not None:
            words += f", {name} {shape[name]:g}"
    pool_dtype = shape.get("pool_dtype")
    return words + ", bfloat16" + (f", pool {pool_dtype}" if pool_dtype else "")


def _writing_row(w: Writing) -> dict[str, str]:
    call = w.fused.case.call
    return {
        "generation": w.fused.case.generation,
        "heads": f"{call.num_heads}/{call.num_kv_heads}/{call.head_dim}",
        "case": w.fused.case.name,
        "page": str(call.page_size),
        "cycles per new token": f"{w.extra_cycles:.0f}" if w.unit == "cycles_a_token" else "-",
        "cycles per new page": f"{w.extra_cycles:.0f}" if w.unit == "cycles_a_page" else "-",
        "core/HBM": f"{w.fused.core_cycles / w.fused.hbm_cycles:.2f}",
        _SIZES: _sizes(w.fused.config),
    }


def _sizes(c: mosaic_tpu.TpuAttentionConfig) -> str:
    return f"{c.block_kv}:{c.block_q}:{c.num_stages}:{c.kv_blocks_per_iteration}"


def _row(p: Prediction, others: Sequence[Prediction]) -> dict[str, str]:
    is_decode, has_decodes = p.fixed_cycles > 0, p.block_cycles > 0
    return {
        "case": p.case.name,
        "page": str(p.case.call.page_size),
        "us": f"{p.microseconds:.1f}",
        "HBM us": f"{ts.microseconds(p.hbm_cycles, p.case.generation):.1f}",
        "core/HBM": f"{p.core_cycles / p.hbm_cycles:.2f}",
        "bound": p.bound,
        "matrix use": f"{p.matrix_use(p.case.all_flop):.2f}",
        "taken": f"{p.matrix_use(p.taken_flop):.2f}",
        "block": f"{p.block_cycles:.0f}" if has_decodes else "-",
        "in HBM": f"{p.block_hbm_cycles:.0f}" if has_decodes else "-",
        "fixed": f"{p.fixed_cycles:.0f}" if is_decode else "-",
        "of its parts": _of_parts(p, others),
        "DMAs": f"{p.num_dmas:,}",
        "spills a bundle: prefill": f"{p.spills['unmasked']:.2f}",
        "masked": f"{p.spills['masked']:.2f}",
        "decode": f"{p.spills['decode']:.2f}",
        "VMEM MiB": f"{p.vmem_bytes / 2**20:.1f}",
        _SIZES: _sizes(p.config),
    }


def _of_parts(p: Prediction, others: Sequence[Prediction]) -> str:
    """Time of a call of several kinds of sequences over the times of calls of one kind each."""
    runs = {other.case.runs: other for other in others if other.case.call == p.case.call}
    alone = [runs.get((run,)) for run in p.case.runs]
    if len(alone) < 2 or None in alone:
        return "-"
    return f"{p.cycles / sum(part.cycles for part in alone if part):.2f}"


def _parts_row(p: Prediction) -> dict[str, str]:
    return {"case": p.case.name, "page": str(p.case.call.page_size)} | {
        name: f"{100 * bundles / p.core_cycles:.1f}" for name, bundles in p.parts.items()
    }


def _points(times: Sequence[tuple[Case, float]], panel: str | None = None) -> dict[str, dict]:
    """panel -> line -> points (keys, microseconds)."""
    panels: dict[str, dict[str, list]] = {}
    for case, microseconds in times:
        heads = f"{case.call.num_heads}/{case.call.num_kv_heads}/{case.call.head_dim}"
        lines = panels.setdefault(panel or case.generation, {})
        line = lines.setdefault(f"{heads}, page {case.call.page_size}", [])
        line.append((case.runs[0][2], microseconds))
    return panels


if __name__ == "__main__":
    app.run(main)
