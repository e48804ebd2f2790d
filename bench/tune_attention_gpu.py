# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Find the GPU attention's block sizes: measure the likely ones on this GPU and keep the best.

    python -m bench.tune_attention_gpu [--head_dims=128,64,256] [--max_minutes=4] [--write]
                                       [--all] [--json]

For each head dimension, with a pool of q's dtype and with a quantised one, it searches the prefill
kernel's sizes, the decode kernel's for few sequences and those for many: at most eight candidates
each, first what the formula gives. Each candidate must agree with the oracle. The best has the
least geometric mean of its cases' times; the formula's stays where nothing is faster by more than a
hundredth. With --write the best go to `pallas_paged/tuned/`, with the times that chose them;
`pallas_paged.attention.gpu.config.default_config` reads them there. When the time is over no other
search begins. It prints a verdict, with --all also every candidate; what each search finds is told
on stderr as soon as it ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from bench import clock, report, tuning
from bench.cases.attention import SCALES, Call, Case, Runs, room_for
from bench.measure.attention import random_inputs, step_of_inputs
from pallas_paged.attention.gpu import config as gpu_config

# `allow_override`: other commands have flags of these names, and a process may import several.
_HEAD_DIMS = flags.DEFINE_list("head_dims", ["128", "64", "256"], "Head dimensions.")
_POOL_DTYPES = flags.DEFINE_list(
    "pool_dtypes", ["bfloat16", "float8_e4m3fn"], "Pools; one of 8 bits stands for all that are."
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens in a page.", allow_override=True)
_MAX_MINUTES = flags.DEFINE_float("max_minutes", 4.0, "No search begins after this.")
_WRITE = flags.DEFINE_bool(
    "write", False, "Write the best to pallas_paged/tuned/.", allow_override=True
)
_ALL = flags.DEFINE_bool("all", False, "Print every row after the verdict.", allow_override=True)
_JSON = flags.DEFINE_bool(
    "json", False, "Print every row and the verdict as JSON on stdout.", allow_override=True
)

_OP = "ragged_paged_attention"
_SHAPE = ("head_dim", "is_quantized", "has_few_seqs", "page_size")
# Means that count as equal: what two runs of one program differ by.
_EQUAL = 1.01
_TOLERANCE = 0.03  # see bench.attention
_REPEATS = 10

# How a kernel's sizes are printed.
_SIZES = "block_kv:stages:raw_stages:pipelines"
# What each search measures; all cases of one have equally many new tokens, so that they share a
# program.
SEARCHES: dict[str, dict[str, Runs]] = {
    "prefill": {"prefill": ((2, 2048, 2048),), "chunked": ((8, 512, 8192),)},
    "decode, few": {"16 x 4,096": ((16, 1, 4096),), "1 x 32,768": ((1, 1, 32768),)},
    "decode, many": {"64 x 4,096": ((64, 1, 4096),), "256 x 1,024": ((256, 1, 1024),)},
}
# (query heads, KV heads) of the models that have heads of a dimension.
_HEADS = {64: (32, 8), 128: (32, 8), 256: (16, 8)}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate's times, or why it has none.

    Attributes:
      config: the candidate.
      times_us: case -> median.
      refusal: first line of the sentence.
    """

    config: gpu_config.GpuAttentionConfig
    times_us: dict[str, float] = dataclasses.field(default_factory=dict)
    refusal: str = ""

    @property
    def mean_us(self) -> float:
        """Geometric mean of the cases' times."""
        return statistics.geometric_mean(self.times_us.values())


@dataclasses.dataclass(frozen=True)
class Search:
    """What was tried for one head dimension, kind of pool and kernel.

    Attributes:
      call: the call.
      name: a key of `SEARCHES`.
      trials: the candidates, first the formula's; empty where the time was over.
      prefill: the best of the prefill's search, for the searches of decodes.
    """

    call: Call
    name: str
    trials: tuple[Trial, ...]
    prefill: Trial | None

    @property
    def title(self) -> str:
        """Which search it is."""
        pool_dtype = self.call.pool_dtype or self.call.dtype
        return f"head_dim {self.call.head_dim}, pool {pool_dtype}, {self.name}"

    @property
    def finding(self) -> str:
        """The best sizes, and by how much they change the mean time against the formula's."""
        if not self.trials:
            return "not tried, --max_minutes are over"
        best, formula = choose(self.trials), self.trials[0]
        sizes = _sizes(best.config, self.name)
        if best is formula:
            return f"{sizes} (formula)"
        if not formula.times_us:
            return f"{sizes} (the formula's did not run)"
        return f"{sizes} ({best.mean_us / formula.mean_us - 1:+.1%})"

    @property
    def entry(self) -> dict[str, Any] | None:
        """What `pallas_paged/tuned/` gets; None for a prefill's search, and where none was made."""
        if self.name == "prefill" or not self.trials:
            return None
        best = choose(self.trials)
        times = (self.prefill.times_us if self.prefill else {}) | best.times_us
        return entry_of(self.call, self.name == "decode, few", best.config, times)


def main(argv: Sequence[str]) -> None:
    """Searches, writes, prints."""
    say = report.start(argv, as_json=_JSON.value, plot=None)
    report.require_choices("head_dims", tuple(map(str, _HEADS)), _HEAD_DIMS.value)
    report.require_choices("pool_dtypes", ("bfloat16", *SCALES), _POOL_DTYPES.value)
    if report.start_backends() != "gpu":
        raise app.UsageError(
            "the GPU's block sizes are measured on a GPU, and there is none; a TPU's: "
            "python -m bench.tune_attention"
        )
    end = time.monotonic() + 60 * _MAX_MINUTES.value
    kind = jax.devices()[0].device_kind
    searches = []
    for head_dim, pool_dtype in itertools.product(map(int, _HEAD_DIMS.value), _POOL_DTYPES.value):
        for search in _tune(call_of(head_dim, pool_dtype), end):
            searches.append(search)
            print(f"{search.title}: {search.finding}", file=sys.stderr, flush=True)
            if _WRITE.value and (entry := search.entry):
                tuning.write(kind, _OP, entry, _SHAPE)
    verdict = verdict_of(searches, kind)
    say(verdict.text())
    if _ALL.value:
        say("\nKernel time, cold L2, microseconds.")
        for search in searches:
            say(f"\n{search.title}{'' if search.trials else ': ' + search.finding}")
            say(report.table(_rows(search), indent=2))
    if _JSON.value:
        record = {"environment": report.environment(), "verdict": verdict.record()}
        report.write_json(record | {"searches": list(map(_as_record, searches))})


def verdict_of(searches: Sequence[Search], kind: str) -> report.Verdict:
    """The best block sizes, a row per head dimension and pool, a column per search."""
    rows: dict[tuple[int, str], dict[str, str]] = {}
    for search in searches:
        head_dim, pool_dtype = search.call.head_dim, search.call.pool_dtype or search.call.dtype
        row = rows.setdefault(
            (head_dim, pool_dtype), {"head_dim": str(head_dim), "pool": pool_dtype}
        )
        row[search.name] = search.finding if search.trials else "not tried"
    return report.Verdict(
        f"block sizes of the attention on {kind}, {_SIZES}",
        list(rows.values()),
        [
            f"These are measurements on {kind}, pages of {searches[0].call.page_size}: kernel time"
            " with a cold L2.",
            "In brackets: how the mean time of the search's cases changes against the sizes that"
            " the formula gives. --write puts the best into pallas_paged/tuned/.",
        ],
    )


def call_of(head_dim: int, pool_dtype: str) -> Call:
    """The call that stands for all of a head dimension and kind of pool."""
    heads, kv_heads = _HEADS[head_dim]
    return Call(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=_PAGE_SIZE.value,
        pool_dtype=None if pool_dtype == "bfloat16" else pool_dtype,
    )


def _tune(call: Call, end: float) -> Iterator[Search]:
    """The searches of a head dimension and kind of pool."""
    prefill: Trial | None = None
    for name, cases in SEARCHES.items():
        if time.monotonic() > end:
            yield Search(call, name, (), prefill)
            continue
        trials = tuple(_trials(call, name, cases, prefill.config if prefill else None))
        yield Search(call, name, trials, prefill)
        if name == "prefill":
            prefill = choose(trials)


def _trials(
    call: Call, name: str, runs: dict[str, Runs], prefill: gpu_config.GpuAttentionConfig | None
) -> Iterator[Trial]:
    room = room_for(list(runs.values()), call.page_size, is_exact=True)
    call = dataclasses.replace(call, **room)
    cases = [Case(case, "", lens, call) for case, lens in runs.items()]
    inputs = [random_inputs(case, seed=0) for case in cases]
    oracle = jax.jit(call.step("oracle"))
    wanted = [oracle(q, pool, *metadata) for pool, q, *metadata in inputs]
    configs = candidates(call, name, prefill)
    with report.Progress(len(configs), f"{name}:") as progress:
        for config in configs:
            yield _try(call, config, cases, inputs, wanted)
            progress.step(_sizes(config, name))


def _try(
    call: Call,
    config: gpu_config.GpuAttentionConfig,
    cases: Sequence[Case],
    inputs: Sequence[tuple[jax.Array, ...]],
    wanted: Sequence[jax.Array],
) -> Trial:
    """Checks and times one candidate."""
    step = step_of_inputs(dataclasses.replace(call, config=config).step("mosaic_gpu"))
    run = jax.jit(step, donate_argnums=0)  # the program that is timed, compiled once
    times = {}
    try:
        for case, (pool, q, *metadata), want in zip(cases, inputs, wanted, strict=True):
            got = run(jnp.zeros_like(q), q, pool, *metadata)
            error = np.abs(np.asarray(want, np.float32) - np.asarray(got, np.float32)).max()
            if not error <= _TOLERANCE:
                raise ValueError(f"differs from the oracle by {error:.3g}")
            timing = clock.time_kernels(step, [got], (q, pool, *metadata), repeats=_REPEATS)
            times[case.name] = timing.median_us
    except (RuntimeError, ValueError) as e:
        return Trial(config, refusal=str(e).splitlines()[0])
    return Trial(config, times)


def candidates(
    call: Call, name: str, prefill: gpu_config.GpuAttentionConfig | None
) -> list[gpu_config.GpuAttentionConfig]:
    """What a search tries, the formula's first: rings as long as shared memory allows, and shorter.

    Args:
      call: with room for the search's lengths.
      name: a key of SEARCHES.
      prefill: whose prefill kernel decodes are measured with; None for the formula's.
    """
    is_quantized = call.pool_dtype is not None
    base = gpu_config.formula(call.head_dim, is_quantized, call.max_seqs)
    kernel = name.split(",")[0]
    if prefill is not None:
        names = [f.name for f in dataclasses.fields(prefill) if f.name.startswith("prefill")]
        base = dataclasses.replace(base, **{name: getattr(prefill, name) for name in names})

    def make(
        keys: int, slots: int, raw_stages: int, pipelines: int
    ) -> gpu_config.GpuAttentionConfig:
        sizes: dict[str, int] = {
            f"{kernel}_block_kv": keys,
            f"{kernel}_stages": slots,
            f"{kernel}_raw_stages": raw_stages,
        }
        if kernel == "decode":
            sizes["decode_pipelines"] = pipelines
        return dataclasses.replace(base, **sizes)

    def most(sizes: Sequence[gpu_config.GpuAttentionConfig]) -> list[gpu_config.GpuAttentionConfig]:
        return [config for config in sizes if fits(call, config)][-1:]

    found = [base]
    for keys, pipelines in itertools.product((64, 128), (1, 2) if kernel == "decode" else (1,)):
        if is_quantized:
            slots_tried = (2, 3, 4)
            raws = [
                [make(keys, slots, n, pipelines) for n in range(1, 17)] for slots in slots_tried
            ]
            longest = [config for sizes in raws for config in most(sizes)]
            found += longest + [config for sizes in raws[:1] for config in most(sizes[:4])]
        else:
            longest = most([make(keys, n, 2, pipelines) for n in range(2, 13)])
            shorter = [
                make(keys, getattr(config, f"{kernel}_stages") - 1, 2, pipelines)
                for config in longest
                if getattr(config, f"{kernel}_stages") > 2
            ]
            found += longest + shorter
    return list(dict.fromkeys(found))[:8]


def fits(call: Call, config: gpu_config.GpuAttentionConfig) -> bool:
    """Whether shared memory has room for a config's blocks."""
    return not dataclasses.replace(call, config=config).unsupported("mosaic_gpu")


def choose(trials: Sequence[Trial]) -> Trial:
    """The best trial: see the module.

    Raises:
      ValueError: no candidate has times.
    """
    done = [trial for trial in trials if trial.times_us]
    if not done:
        raise ValueError(f"no candidate ran: {[trial.refusal for trial in trials]}")
    best = min(done, key=lambda trial: trial.mean_us)
    return done[0] if done[0].mean_us <= best.mean_us * _EQUAL else best


def entry_of(
    call: Call,
    has_few_seqs: bool,
    config: gpu_config.GpuAttentionConfig,
    times_us: dict[str, float],
) -> dict[str, Any]:
    """An entry of `pallas_paged.tuned`."""
    where = report.environment()
    return {
        "head_dim": call.head_dim,
        "is_quantized": call.pool_dtype is not None,
        "has_few_seqs": has_few_seqs,
        "page_size": call.page_size,
        "config": dataclasses.asdict(config),
        "num_heads": call.num_heads,
        "num_kv_heads": call.num_kv_heads,
        "measured_us": {case: round(time, 2) for case, time in times_us.items()},
        **{name: where[name] for name in ("device_kind", "jax", "commit", "date")},
    }


def _as_record(search: Search) -> dict[str, Any]:
    return {
        "head_dim": search.call.head_dim,
        "pool_dtype": search.call.pool_dtype or search.call.dtype,
        "search": search.name,
        "best": dataclasses.asdict(choose(search.trials).config) if search.trials else None,
        "trials": [dataclasses.asdict(trial) for trial in search.trials],
    }


def _rows(search: Search) -> list[dict[str, str]]:
    best = choose(search.trials) if search.trials else None
    rows = []
    for trial in search.trials:
        row = {_SIZES: _sizes(trial.config, search.name)}
        for case in SEARCHES[search.name]:
            row[case] = f"{trial.times_us[case]:.1f}" if case in trial.times_us else "-"
        row["mean"] = f"{trial.mean_us:.1f}" if trial.times_us else "-"
        rows.append(row | {"": "best" if trial is best else trial.refusal})
    return rows


def _sizes(config: gpu_config.GpuAttentionConfig, name: str) -> str:
    kernel = name.split(",")[0]
    sizes = [getattr(config, f"{kernel}_{what}") for what in ("block_kv", "stages", "raw_stages")]
    pipelines = config.decode_pipelines if kernel == "decode" else 1
    return ":".join(map(str, [*sizes, pipelines]))


if __name__ == "__main__":
    app.run(main)
