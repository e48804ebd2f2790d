# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Command line: `python -m reference_engine replay` and `python -m reference_engine explain`.

replay runs the same traffic through a tiny random model twice, with page-aligned scheduling and
without, prints what each run did, and checks that both came to the same. explain prints one run
step by step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np
from absl import app, flags
from jax.experimental.pallas import tpu as pltpu

from reference_engine import replay as replay_lib
from reference_engine import traffic
from reference_engine.config import BACKENDS, KV_WRITES, EngineConfig, ModelConfig, num_pages_for
from reference_engine.engine import Engine, Output
from reference_engine.replay import Comparison, Job, Result
from reference_engine.scheduler import Segment
from reference_engine.weights import random_params
from reference_engine.write_plan import plan_writes

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "trace", None,
    "CSV file with columns TIMESTAMP,ContextTokens,GeneratedTokens (the Azure LLM inference traces"
    " have them); without it, requests are drawn from distributions fitted to such a trace.",
)
flags.DEFINE_integer("num_requests", 40, "How many requests, from the top of the trace.")
flags.DEFINE_float("length_scale", 1.0, "Factor on the prompts' lengths, to make a run shorter.")
flags.DEFINE_float("steps_per_second", 20.0, "Engine steps per second of the trace's time.")
flags.DEFINE_integer("seed", 0, "Fixes the weights, the prompts and the drawn requests.")
flags.DEFINE_integer("page_size", EngineConfig.page_size, "Tokens in a page.")
flags.DEFINE_integer(
    "num_pages", 0, "Pages in the pool; 0 for a quarter of what max_num_seqs of the longest request"
    " would fill.",
)
flags.DEFINE_integer(
    "max_num_batched_tokens", EngineConfig.max_num_batched_tokens, "Most new tokens in a step."
)
flags.DEFINE_integer(
    "max_num_seqs", EngineConfig.max_num_seqs, "Most requests that run at a time."
)
flags.DEFINE_integer(
    "max_deferrals", EngineConfig.max_deferrals,
    "Most steps in a row that alignment makes a request wait.",
)
flags.DEFINE_integer(
    "long_prefill_token_threshold", EngineConfig.long_prefill_token_threshold,
    "Most new tokens of one request in a step while others compete; 0 for no limit.",
)
flags.DEFINE_string(
    "kv_write", EngineConfig.kv_write, f"How K and V are written: one of {', '.join(KV_WRITES)}."
)
flags.DEFINE_string(
    "write_backend", EngineConfig.write_backend,
    f"Backend of the writes: one of {', '.join(BACKENDS)}. A CPU interprets mosaic_tpu (right, and"
    " very slow).",
)
flags.DEFINE_string(
    "attention", EngineConfig.attention,
    "Backend of the attention, and of the writes with --kv_write=fused; as --write_backend.",
)
flags.DEFINE_bool("page_aligned_scheduling", True, "Which of the two runs `explain` prints.")

MODEL = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16,
)


def main(argv: Sequence[str]) -> None:
    commands = {"replay": _replay, "explain": _explain}
    if len(argv) != 2 or argv[1] not in commands:
        got = " ".join(argv[1:]) or "no command"
        _exit(2, f"{got}: wanted one command, {' or '.join(commands)}, and flags (see --helpfull)")
    if {FLAGS.write_backend, FLAGS.attention} <= {"auto", "oracle"}:
        # The oracle needs no accelerator, and this keeps one free that another program may hold.
        jax.config.update("jax_platforms", "cpu")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            jobs = _make_jobs()
            config = _make_config(jobs)
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            print(f"warning: {message}", file=sys.stderr)
        with _interpreted(config):
            commands[argv[1]](jobs, config)
    except BrokenPipeError:  # the reader of our output has gone, as in `explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _exit(2, f"cannot read {error.filename}: {error.strerror}")
    except (ValueError, NotImplementedError) as error:
        _exit(2, str(error))


def _interpreted(config: EngineConfig) -> contextlib.AbstractContextManager:
    """What TPU kernels need in order to run where there is no TPU."""
    if "mosaic_tpu" in (config.write_backend, config.attention) and jax.default_backend() == "cpu":
        return pltpu.force_tpu_interpret_mode()
    return contextlib.nullcontext()


def _replay(jobs: list[Job], config: EngineConfig) -> None:
    print(_describe(jobs, config))
    params = random_params(MODEL, FLAGS.seed)
    results, seconds = [], []
    for aligned in (True, False):
        progress = _Progress(f"page_aligned_scheduling={'on' if aligned else 'off'}", len(jobs))
        start = time.perf_counter()
        results.append(replay_lib.replay(
            jobs, params, MODEL, _with_alignment(config, aligned), observe=progress.observe
        ))
        seconds.append(time.perf_counter() - start)
        progress.close()
    print(_table(results, seconds))
    comparison = replay_lib.compare(*results)
    print(_comparison(comparison))
    if not comparison.is_equal:
        _exit(1, "the two runs differ")


def _explain(jobs: list[Job], config: EngineConfig) -> None:
    print(_describe(jobs, config))
    config = _with_alignment(config, FLAGS.page_aligned_scheduling)
    print(f"page_aligned_scheduling {'on' if config.page_aligned_scheduling else 'off'}")

    def print_step(step: int, engine: Engine, outputs: list[Output]) -> None:
        print("\n".join(_explain_step(step, engine, outputs, jobs)))

    replay_lib.replay(
        jobs, random_params(MODEL, FLAGS.seed), MODEL, config, observe=print_step
    )


def _make_jobs() -> list[Job]:
    if FLAGS.num_requests < 1:
        raise ValueError(f"--num_requests is {FLAGS.num_requests}; wanted at least 1")
    for name, value in (
        ("length_scale", FLAGS.length_scale), ("steps_per_second", FLAGS.steps_per_second),
    ):
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name} is {value}; wanted a number above 0")
    if FLAGS.trace is None:
        arrivals = traffic.generate(FLAGS.num_requests, seed=FLAGS.seed)
    else:
        arrivals = traffic.read_azure_trace(FLAGS.trace, FLAGS.num_requests)
    return replay_lib.make_jobs(
        traffic.scale_prompts(arrivals, FLAGS.length_scale), vocab_size=MODEL.vocab_size,
        steps_per_second=FLAGS.steps_per_second, seed=FLAGS.seed,
    )


def _make_config(jobs: list[Job]) -> EngineConfig:
    page_size = FLAGS.page_size
    if page_size < 1:
        raise ValueError(f"--page_size is {page_size}; wanted at least 1")
    longest = num_pages_for(max(len(job.prompt_ids) + job.max_tokens for job in jobs), page_size)
    return EngineConfig(
        page_size=page_size,
        num_pages=FLAGS.num_pages or max(longest, FLAGS.max_num_seqs * longest // 4),
        max_model_len=longest * page_size,
        max_num_batched_tokens=FLAGS.max_num_batched_tokens,
        max_num_seqs=FLAGS.max_num_seqs,
        max_deferrals=FLAGS.max_deferrals,
        long_prefill_token_threshold=FLAGS.long_prefill_token_threshold,
        kv_write=FLAGS.kv_write,
        write_backend=FLAGS.write_backend,
        attention=FLAGS.attention,
        # One shape: a row of a matrix product is then the same to the last bit in any batch.
        token_buckets=(FLAGS.max_num_batched_tokens,),
        seq_buckets=(FLAGS.max_num_seqs,),
        return_logits=True,
    )


def _with_alignment(config: EngineConfig, aligned: bool) -> EngineConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # main has said it
        return dataclasses.replace(config, page_aligned_scheduling=aligned)


def _describe(jobs: list[Job], config: EngineConfig) -> str:
    source = FLAGS.trace or f"generator, seed {FLAGS.seed}"
    prompts = [len(job.prompt_ids) for job in jobs]
    scaled = "as recorded" if FLAGS.length_scale == 1 else f"SCALED by {FLAGS.length_scale:g}"
    return "\n".join([
        f"traffic  {source}: {len(jobs):,} requests in {jobs[-1].arrival_step + 1:,} steps"
        f" ({FLAGS.steps_per_second:g} steps a second)",
        f"         prompts {scaled}: {min(prompts):,} to {max(prompts):,} tokens,"
        f" {sum(prompts):,} in all; outputs {sum(job.max_tokens for job in jobs):,} in all",
        f"model    random weights, {MODEL.num_layers} layers, {MODEL.num_heads} query heads on"
        f" {MODEL.num_kv_heads} KV heads of {MODEL.head_dim}, {MODEL.vocab_size} token ids,"
        f" {MODEL.dtype}, on {jax.default_backend()}",
        f"engine   page_size {config.page_size}, {config.num_pages:,} pages, at most"
        f" {config.max_num_batched_tokens} tokens and {config.max_num_seqs} requests a step,"
        f" {_describe_writes(config)}, attention by {config.attention}",
        "",
    ])


def _describe_writes(config: EngineConfig) -> str:
    if config.kv_write == "fused":
        return "kv_write fused with the attention"
    return f"kv_write {config.kv_write} by {config.write_backend}"


def _table(results: list[Result], seconds: list[float]) -> str:
    rows = [("page_aligned_scheduling", "on", "off")]

    def add(label, values):
        rows.append((label, *values))

    for label, name in (
        ("steps", "num_steps"), ("tokens computed", "num_tokens"),
        ("whole pages written", "num_whole_pages"),
        ("partial pages, by prefills", "num_prefill_partials"),
        ("partial pages, by decodes", "num_decode_partials"),
        ("slices (whole and partial)", "num_slices"), ("deferrals", "num_deferrals"),
        ("preemptions", "num_preemptions"),
    ):
        add(label, (f"{getattr(result, name):,}" for result in results))
    for percentile in (50, 99):
        add(
            f"steps to first token, p{percentile}",
            (f"{np.percentile(list(result.ttft.values()), percentile):.1f}" for result in results),
        )
    add("seconds (the first compiles)", (f"{value:.1f}" for value in seconds))
    return "\n".join(f"{label:<30}{on:>12}{off:>12}" for label, on, off in rows)


def _comparison(c: Comparison) -> str:
    logits = f"{c.num_equal_logits:,} of {c.num_outputs:,} rows, bit for bit"
    if c.num_equal_logits != c.num_outputs:
        logits += f"; the largest difference is {c.max_logit_difference:.3g}"
    return "\n".join([
        "",
        "equal in both runs",
        f"  generated tokens   {c.num_equal_tokens:,} of {c.num_outputs:,}",
        f"  logits             {logits}",
        f"  live pool bytes    {c.num_equal_pools:,} of {c.num_requests:,} requests, each at its"
        " end, bit for bit",
        f"  diversity          {c.num_distinct_tokens} of {MODEL.vocab_size} token ids generated;"
        f" {c.num_distinct_outputs} different outputs of {c.num_requests} requests",
    ])


def _explain_step(step: int, engine: Engine, outputs: list[Output], jobs: list[Job]) -> list[str]:
    plan, config = engine.last_plan, engine.config
    assert plan is not None
    lines = [
        f"step {step}: {plan.num_tokens} of {config.max_num_batched_tokens} tokens;"
        f" {engine.scheduler.pool.num_free} of {config.num_pages} pages free,"
        f" {len(engine.scheduler.waiting)} requests waiting"
    ]
    for segment in plan.segments:
        num_prompt = len(jobs[segment.request_id].prompt_ids)
        kind = "decode " if replay_lib.is_decode(segment, num_prompt) else "prefill"
        lines.append(
            f"  request {segment.request_id} {kind} [{segment.start}, {segment.end}) of"
            f" {num_prompt} + {jobs[segment.request_id].max_tokens}: "
            + _explain_writes(segment, config.page_size)
        )
    for deferral in plan.deferrals:
        missing = config.page_size - deferral.num_computed % config.page_size
        lines.append(
            f"  request {deferral.request_id} deferred at {deferral.num_computed}: the next page"
            f" boundary is {missing} tokens away, {deferral.budget} are left of the budget"
        )
    for request_id in plan.preempted:
        lines.append(f"  request {request_id} preempted: its pages went to an earlier request")
    for output in outputs:
        if output.finish_reason is not None:
            lines.append(f"  request {output.request_id} finished: {output.finish_reason}")
    return lines


def _explain_writes(segment: Segment, page_size: int) -> str:
    writes = plan_writes([segment], page_size)
    parts = []
    if len(writes.page_ids):
        parts.append(f"whole pages {_ranges(writes.page_ids.tolist())}")
    for slot, _, length in writes.slices.T.tolist():
        page, row = divmod(slot, page_size)
        rows = f"row {row}" if length == 1 else f"rows {row}-{row + length - 1}"
        parts.append(f"page {page} {rows}")
    return ", ".join(parts)


def _ranges(ids: list[int]) -> str:
    """Runs of consecutive ids, rising or falling, as first-last."""
    runs: list[list[int]] = []
    for page_id in ids:
        run = runs[-1] if runs else []
        if len(run) == 1 and abs(page_id - run[0]) == 1:
            run.append(page_id)
        elif len(run) == 2 and page_id - run[1] == (1 if run[1] > run[0] else -1):
            run[1] = page_id
        else:
            runs.append([page_id])
    return " ".join("-".join(map(str, run)) for run in runs)


class _Progress:
    """A counter on standard error, if that is a terminal."""

    def __init__(self, label: str, total: int):
        self._label, self._total, self._done = label, total, 0
        self._visible = sys.stderr.isatty()

    def observe(self, step: int, engine: Engine, outputs: list[Output]) -> None:
        self._done += sum(output.finish_reason is not None for output in outputs)
        if self._visible:
            print(
                f"\r{self._label}: step {step}, {self._done} of {self._total} requests done",
                end="", file=sys.stderr, flush=True,
            )

    def close(self) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        _exit(2, str(error))


def _exit(status: int, sentence: str) -> NoReturn:
    print(f"reference_engine: {sentence}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
