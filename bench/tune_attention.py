# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Find the TPU attention's block sizes: predict the cases for many of them and keep the best.

    python -m bench.tune_attention [--generations=v5e,v6e,tpu7x] [--presets=...] [--write]

For every generation, preset and page size it compiles the kernel with each candidate and predicts
the cases of `bench.attention`. The best has the least geometric mean of their times; of equals (to
a hundredth) the one that keeps the core least busy, because what the model leaves out costs the
core, and then the one that takes less VMEM. With --write it goes to `pallas_paged/tuned/`, with the
figures that chose it; `mosaic_tpu.default_config` reads it there. A GPU's are measured on it, by
`python -m bench.tune_attention_gpu`.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from bench import report, tuning
from bench.cases.attention import CASES, PRESETS, Call, Case, room_for
from bench.tpu_model import schedule as ts
from bench.tpu_model.attention import Prediction, predict
from bench.tpu_model.compile import DEVICES, as_if_on
from pallas_paged.attention.tpu import launch as mosaic_tpu

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

_OP = "ragged_paged_attention"
_SHAPE = ("num_heads", "num_kv_heads", "head_dim", "q_dtype", "pool_dtype", "page_size")
# Geometric means that count as equal; the model is not worth more.
_EQUAL = 1.01
# (keys of a block, window rows, buffers, blocks of a body)
_GRID = tuple(
    (keys, rows, *ring)
    for keys, rows, ring in itertools.product(
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

    config: mosaic_tpu.TpuAttentionConfig
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


def main(argv: Sequence[str]) -> None:
    """Tries, prints, writes."""
    report.start(argv, as_json=False, plot=None)
    report.require_known("generations", ts.GENERATIONS, _GENERATIONS.value)
    report.require_known("presets", PRESETS, _PRESETS.value)
    if not all(value.isdigit() and int(value) for value in _PAGE_SIZES.value):
        raise app.UsageError(
            f"--page_sizes has {','.join(_PAGE_SIZES.value)!r}; wanted integers >= 1"
        )
    report.start_backends()
    print("Predicted from compiled schedules, as by bench.attention; microseconds.")
    for preset, generation in itertools.product(_PRESETS.value, _GENERATIONS.value):
        for page_size in sorted({int(value) for value in _PAGE_SIZES.value}):
            trials = list(_trials(generation, preset, page_size))
            best = choose(trials)
            print(f"\n{generation}, {preset}, pages of {page_size}")
            print(report.table([_row(trial, trial is best) for trial in trials], indent=2))
            if _WRITE.value:
                tuning.write(DEVICES[generation][0], _OP, entry_of(best), _SHAPE)


def _trials(generation: str, preset: str, page_size: int) -> Iterator[Trial]:
    call = Call(**PRESETS[preset], page_size=page_size, **room_for(list(CASES.values()), page_size))
    with as_if_on(generation):
        sizes = _GRID if _FULL.value else _likely(call.num_kv_heads)
        configs = [mosaic_tpu.TpuAttentionConfig(*size) for size in sizes]
        configs = [config for config in configs if mosaic_tpu.fits(call.heads, config)]
    with report.Progress(len(configs), f"{generation} {preset} {page_size}:") as progress:
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
        if keys * body * num_kv_heads <= mosaic_tpu._MAX_BODY
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


def _row(trial: Trial, is_best: bool) -> dict[str, str]:
    c = trial.config
    name = f"{c.block_kv}:{c.block_q}:{c.num_stages}:{c.kv_blocks_per_iteration}"
    figures = [*CASES, "mean", "mean on the core", "VMEM MiB"]
    row = {"keys:rows:buffers:body": name, **dict.fromkeys(figures, "-")}
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
