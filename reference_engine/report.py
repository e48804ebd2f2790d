# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the command line prints, as texts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from reference_engine.batch import describe_shapes
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.replay import Comparison, Job, Result
from reference_engine.stats import Stats


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns: the first column is aligned left, the others right.

    >>> print(table([("", "on", "off"), ("steps", "9", "1,234")]))
           on    off
    steps   9  1,234
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([label.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def serving(stats: Stats, seconds: float, is_warmed_up: bool) -> str:
    """What it took to serve the prompts, in one line."""
    recompiles = "no warm-up"
    if is_warmed_up:
        recompiles = f"{stats.num_recompiles} programs compiled after warm-up"
    return (
        f"{stats.num_steps:,} steps in {seconds:.1f} s: {stats.num_tokens:,} tokens computed,"
        f" {stats.num_cached:,} found in the cache, {stats.num_padding:,} rows of padding,"
        f" {stats.num_preemptions} preemptions, {recompiles}"
    )


def limits(config: EngineConfig) -> str:
    """What the engine was given, in two lines."""
    return (
        f"{config.pool_pages:,} pages of {config.page_size} tokens; at most"
        f" {config.max_step_tokens:,} tokens and {config.max_num_seqs:,} requests per step,"
        f" {config.max_model_len:,} tokens of a request\n{describe_shapes(config)}"
    )


def verdict(c: Comparison, model: ModelConfig) -> str:
    """Whether two runs came to the same, and whether that proves anything."""
    difference = ""
    if c.num_equal_logits != c.num_outputs:
        difference = f"; the largest difference of logits is {c.max_logit_difference:.3g}"
    return "\n".join(
        [
            "The two runs came to the same." if c.is_equal else "THE TWO RUNS DIFFER.",
            f"Equal, bit for bit: {c.num_equal_tokens:,} of {c.num_outputs:,} generated tokens,"
            f" {c.num_equal_logits:,} of {c.num_outputs:,} rows of logits, the keys and values of"
            f" {c.num_equal_pools:,} of {c.num_requests:,} requests{difference}.",
            f"The outputs are diverse: {c.num_distinct_tokens} of {model.vocab_size} token ids were"
            f" generated, {c.num_distinct_outputs} different outputs of {c.num_requests} requests.",
        ]
    )


def alignment(on: Result, off: Result) -> str:
    """What alignment changed, in one line."""
    return (
        f"With page-aligned scheduling, prefills wrote {on.num_prefill_partials:,} partial pages"
        f" instead of {off.num_prefill_partials:,}, in {on.num_steps:,} steps instead of"
        f" {off.num_steps:,}."
    )


def counts(results: Sequence[Result], seconds: Sequence[float]) -> str:
    """What the runs with alignment and without it did, side by side."""
    rows: list[Sequence[str]] = [("page_aligned_scheduling", "on", "off")]
    for label, name in (
        ("steps", "num_steps"),
        ("tokens computed", "num_tokens"),
        ("whole pages written", "num_whole_pages"),
        ("partial pages, by prefills", "num_prefill_partials"),
        ("partial pages, by decodes", "num_decode_partials"),
        ("slices (whole and partial)", "num_slices"),
        ("deferrals", "num_deferrals"),
        ("preemptions", "num_preemptions"),
        ("tokens found in the prefix cache", "num_cached"),
    ):
        rows.append((label, *(f"{getattr(result, name):,}" for result in results)))
    for percent in (50, 99):
        waits = [np.percentile(list(result.ttft.values()), percent) for result in results]
        rows.append((f"steps to first token, p{percent}", *(f"{wait:.1f}" for wait in waits)))
    rows.append(("seconds (the first run compiles)", *(f"{value:.1f}" for value in seconds)))
    return table(rows)


def summary(result: Result, config: EngineConfig) -> str:
    """What a run did, in two lines."""
    aligned = "on" if config.page_aligned_scheduling else "off"
    return (
        f"With page_aligned_scheduling {aligned}, {result.num_steps:,} steps computed"
        f" {result.num_tokens:,} tokens, with {result.num_deferrals:,} deferrals and"
        f" {result.num_preemptions:,} preemptions.\nThey wrote {result.num_whole_pages:,} whole"
        f" pages, {result.num_prefill_partials:,} partial pages of prefills, and"
        f" {result.num_decode_partials:,} tokens of decodes."
    )


def steps(texts: Sequence[str], *, max_lines: int | None) -> str:
    """The steps that fit into `max_lines` lines, and how many more there are; None for all steps.

    If the first step does not fit, its first lines are shown.

    >>> print(steps(["step 0", "step 1\\n  request 0"], max_lines=2))
    step 0
    ... and 1 more steps, which --all prints.
    """
    if max_lines is None or not texts:
        return "\n".join(texts)
    ends = np.cumsum([text.count("\n") + 1 for text in texts])
    num_shown = max(1, int(np.searchsorted(ends, max_lines, side="right")))
    lines = "\n".join(texts[:num_shown]).splitlines()[:max_lines]
    if num_shown < len(texts):
        lines.append(f"... and {len(texts) - num_shown:,} more steps, which --all prints.")
    return "\n".join(lines)


def setup(
    jobs: Sequence[Job],
    config: EngineConfig,
    model: ModelConfig,
    source: str,
    *,
    scale: float,
    rate: float,
) -> str:
    """What was run.

    Args:
      jobs: the requests.
      config: the engine's.
      model: the model's.
      source: where the requests are from.
      scale: the factor by which their prompts were made shorter.
      rate: engine steps per second of their time.
    """
    prompts = [len(job.prompt_ids) for job in jobs]
    scaled = "as recorded" if scale == 1 else f"SCALED by {scale:g}"
    writes = f"kv_write {config.kv_write} by {config.write_backend}"
    if config.kv_write == "fused":
        writes = "kv_write fused with the attention"
    return "\n".join(
        [
            f"traffic  {source}: {len(jobs):,} requests in {jobs[-1].arrival_step + 1:,} steps"
            f" ({rate:g} steps per second)",
            f"         prompts {scaled}: {min(prompts):,} to {max(prompts):,} tokens,"
            f" {sum(prompts):,} in all; outputs {sum(job.max_tokens for job in jobs):,} in all",
            f"model    random weights, {model.num_layers} layers, {model.num_heads} query heads on"
            f" {model.num_kv_heads} KV heads of {model.head_dim}, {model.vocab_size} token ids,"
            f" {model.dtype}, on {jax.default_backend()}",
            f"engine   page_size {config.page_size}, {config.pool_pages:,} pages, at most"
            f" {config.max_step_tokens} tokens and {config.max_num_seqs} requests per step",
            f"         {writes}, attention by {config.attention_backend};"
            f" {describe_shapes(config)}",
        ]
    )
