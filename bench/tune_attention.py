# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Find the TPU attention's block sizes: predict the cases for many of them and keep the best.

    python -m bench.tune_attention [--generations=v5e,v6e,tpu7x] [--presets=...] [--write]
                                   [--all] [--json]

For every generation, preset and page size it compiles the kernel with each candidate and predicts
the cases of `bench.attention`. The best has the least geometric mean of their times; of equals (to
a hundredth) the one that keeps the core least busy, because what the model leaves out costs the
core, and then the one that takes less VMEM. With --write it goes to `pallas_paged/tuned/`, with the
figures that chose it; `default_config` of pallas_paged/attention/tpu/config.py reads it there. A
GPU's are measured on it, by `python -m bench.tune_attention_gpu`. The command prints a verdict,
with --all also every candidate; what each search finds is told on stderr as soon as it ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from bench import report, tuning
from bench.cases.attention import CASES, PRESETS, Call, Case, room_for
from bench.tpu_model import schedule as ts
from bench.tpu_model.attention import Prediction, config_of, predict
from bench.tpu_model.compile import DEVICES, as_if_on
from pallas_paged.attention.tpu import config as tpu_config

# `allow_override`: other commands have flags of these names, and a process may import several.
_GENERATIONS = flags.DEFINE_list(
    "generations",
    ["v5e", "v6e", "tpu7x"],
    "TPU generations to find block sizes for.",
    allow_override=True,
)
_PRESETS = flags.DEFINE_list(
    "presets", list(PRESETS), f"Some of {', '.join(PRESETS)}.", allow_override=True
)
_PAGE_SIZES = flags.DEFINE_list(
    "page_sizes", ["16", "128"], "Tokens in a page.", allow_override=True
)
_FULL = flags.DEFINE_bool("full", False, "Try the full grid (hours) and not the likely ones.")
_WRITE = flags.DEFINE_bool("write", False, "Write the best to pallas_paged/tuned/.")
_ALL = flags.DEFINE_bool("all", False, "Print every row after the verdict.", allow_override=True)
_JSON = flags.DEFINE_bool(
    "json", False, "Print every row and the verdict as JSON on stdout.", allow_override=True
)

_OP = "ragged_paged_attention"
_SHAPE = ("num_heads", "num_kv_heads", "head_dim", "q_dtype", "pool_dtype", "page_size")
# Geometric means that count as equal; the model is not worth more.
_EQUAL = 1.01
# How a configuration is printed.
_SIZES = "block_kv:block_q:stages:blocks per iteration"
# (block_kv, block_q, num_stages, kv_blocks_per_iteration)
_GRID = tuple(
    (block_kv, block_q, *stages)
    for block_kv, block_q, stages in itertools.product(
        (128, 256, 512, 1024, 2048), (128, 256), ((3, 1), (4, 2), (8, 4), (16, 8))
    )
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate's predictions, or why it has none.

    Attributes:
      config: the candidate.
      predictions: one a case; empty if it was refused.
      refusal: first line of the compiler's or the model's sentence.
    """

    config: tpu_config.TpuAttentionConfig
    predictions: tuple[Prediction, ...] = ()
    refusal: str = ""

    @property
    def mean_us(self) -> float:
        """Geometric mean of the cases' times."""
        return statistics.geometric_mean(p.microseconds for p in self.predictions)

    @property
    def core_us(self) -> float:
        """Geometric mean of what the cases take on the core alone."""
        return statistics.geometric_mean(
            ts.microseconds(p.core_cycles, p.case.generation) for p in self.predictions
        )

    @property
    def vmem_bytes(self) -> int:
        """What the kernel asks for."""
        return self.predictions[0].vmem_bytes


@dataclasses.dataclass(frozen=True)
class Search:
    """What was tried for one generation, model and page size.

    Attributes:
      generation, preset, page_size: for what.
      trials: the candidates.
      shipped: the block sizes that the kernel has now.
    """

    generation: str
    preset: str
    page_size: int
    trials: tuple[Trial, ...]
    shipped: tpu_config.TpuAttentionConfig

    @property
    def best(self) -> Trial:
        """What `choose` takes."""
        return choose(self.trials)

    @property
    def against_shipped(self) -> str:
        """By how much the best changes the mean time, as text."""
        if self.best.config == self.shipped:
            return "as shipped"
        times = [t.mean_us for t in self.trials if t.config == self.shipped and t.predictions]
        return f"{self.best.mean_us / times[0] - 1:+.1%}" if times else "shipped not tried"


def main(argv: Sequence[str]) -> None:
    """Tries, writes, prints."""
    say = report.start(argv, as_json=_JSON.value, plot=None)
    report.require_choices("generations", ts.GENERATIONS, _GENERATIONS.value)
    report.require_choices("presets", PRESETS, _PRESETS.value)
    page_sizes = report.require_sizes("page_sizes", _PAGE_SIZES.value)
    report.start_backends()
    searches = []
    for preset, generation in itertools.product(_PRESETS.value, _GENERATIONS.value):
        for page_size in page_sizes:
            search = _search(generation, preset, page_size)
            searches.append(search)
            best = f"{_sizes(search.best.config)}, {search.against_shipped}"
            title = f"{generation}, {preset}, pages of {page_size}"
            print(f"{title}: {best}", file=sys.stderr, flush=True)
            if _WRITE.value:
                tuning.write(DEVICES[generation][0], _OP, entry_of(search.best), _SHAPE)
    verdict = verdict_of(searches)
    say(verdict.text())
    if _ALL.value:
        say("\nPredicted from compiled schedules, as by bench.attention; microseconds.")
        for s in searches:
            rows = [_row(trial, trial is s.best) for trial in s.trials]
            say(f"\n{s.generation}, {s.preset}, pages of {s.page_size}")
            say(report.table(rows, indent=2))
    if _JSON.value:
        record = {"environment": report.environment(), "verdict": verdict.record()}
        report.write_json(record | {"searches": list(map(_as_record, searches))})


def verdict_of(searches: Sequence[Search]) -> report.Verdict:
    """The best block sizes, a row per generation and model, a column per page size."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for search in searches:
        key = (search.generation, search.preset)
        row = rows.setdefault(key, {"generation": search.generation, "model": search.preset})
        cell = f"{_sizes(search.best.config)} ({search.against_shipped})"
        row[f"pages of {search.page_size}"] = cell
    return report.Verdict(
        f"block sizes of the attention, {_SIZES}",
        list(rows.values()),
        [
            "These are predictions from schedules compiled for TPUs. Nothing here ran on a TPU.",
            "In brackets: how the mean time of the cases changes against the block sizes that the"
            " kernel ships with. --write makes the best the shipped ones.",
        ],
    )


def _search(generation: str, preset: str, page_size: int) -> Search:
    call = Call(**PRESETS[preset], page_size=page_size, **room_for(list(CASES.values()), page_size))
    trials = tuple(_trials(generation, preset, call))
    return Search(generation, preset, page_size, trials, config_of(call, generation))


def _trials(generation: str, preset: str, call: Call) -> Iterator[Trial]:
    with as_if_on(generation):
        sizes = _GRID if _FULL.value else _likely(call.num_kv_heads)
        configs = [tpu_config.TpuAttentionConfig(*size) for size in sizes]
        configs = [config for config in configs if tpu_config.fits(call.heads, config)]
    with report.Progress(len(configs), f"{generation} {preset} {call.page_size}:") as progress:
        for config in configs:
            cases = [
                Case(name, generation, runs, dataclasses.replace(call, config=config))
                for name, runs in CASES.items()
            ]
            try:
                yield Trial(config, tuple(predict(cases)))
            except (RuntimeError, ValueError) as e:
                yield Trial(config, refusal=str(e).splitlines()[0])
            progress.step(str(config.block_kv))


def _likely(num_kv_heads: int) -> list[tuple[int, int, int, int]]:
    """The grid around what default_config takes, no body longer than its longest."""
    block_kv = (512, 1024) if num_kv_heads < 8 else (256, 512)
    return [
        (keys, 128, buffers, body)
        for keys in block_kv
        for buffers, body in ((8, 4), (16, 8))
        if keys * body * num_kv_heads <= tpu_config.MAX_ITERATION_KEYS
    ]


def choose(trials: Sequence[Trial]) -> Trial:
    """The best trial: see the module.

    Raises:
      ValueError: no candidate has predictions.
    """
    done = [trial for trial in trials if trial.predictions]
    if not done:
        raise ValueError(f"no candidate compiled: {[trial.refusal for trial in trials]}")
    least = min(trial.mean_us for trial in done)
    equals = [trial for trial in done if trial.mean_us <= least * _EQUAL]
    return min(equals, key=lambda trial: (trial.core_us, trial.vmem_bytes))


def _sizes(c: tpu_config.TpuAttentionConfig) -> str:
    return ":".join(map(str, dataclasses.astuple(c)))


def _as_record(search: Search) -> dict[str, Any]:
    return {
        "generation": search.generation,
        "preset": search.preset,
        "page_size": search.page_size,
        "shipped": dataclasses.asdict(search.shipped),
        "best": dataclasses.asdict(search.best.config),
        "trials": [
            {
                "config": dataclasses.asdict(trial.config),
                "us": {p.case.name: p.microseconds for p in trial.predictions},
                "core_cycles": {p.case.name: p.core_cycles for p in trial.predictions},
                "vmem_bytes": trial.vmem_bytes if trial.predictions else None,
                "refusal": trial.refusal,
            }
            for trial in search.trials
        ],
    }


def _row(trial: Trial, is_best: bool) -> dict[str, str]:
    figures = [*CASES, "mean", "mean on the core", "VMEM MiB"]
    row = {_SIZES: _sizes(trial.config), **dict.fromkeys(figures, "-")}
    row |= {p.case.name: f"{p.microseconds:.1f}" for p in trial.predictions}
    if trial.predictions:
        row |= {
            "mean": f"{trial.mean_us:.1f}",
            "mean on the core": f"{trial.core_us:.1f}",
            "VMEM MiB": f"{trial.vmem_bytes / 2**20:.1f}",
        }
    return row | {"": "best" if is_best else trial.refusal}


def entry_of(trial: Trial) -> dict[str, Any]:
    """A trial as an entry of `pallas_paged.tuned`."""
    call = trial.predictions[0].case.call
    where = report.environment()
    return {
        "num_heads": call.num_heads,
        "num_kv_heads": call.num_kv_heads,
        "head_dim": call.head_dim,
        "q_dtype": call.dtype,
        "pool_dtype": call.dtype,
        "page_size": call.page_size,
        "config": dataclasses.asdict(trial.config),
        "predicted_us": {p.case.name: round(p.microseconds, 2) for p in trial.predictions},
        "predicted_core_cycles": {p.case.name: round(p.core_cycles) for p in trial.predictions},
        "vmem_bytes": trial.vmem_bytes,
        **{name: where[name] for name in ("jax", "libtpu", "commit", "date")},
    }


if __name__ == "__main__":
    app.run(main)
