# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Command line: `python -m reference_engine generate`, `replay` and `explain`.

generate completes prompts with a model folder. replay runs the same traffic through a tiny random
model twice, with page-aligned scheduling and without, prints what each run did, and checks that
both came to the same. explain prints one run step by step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app, flags
from jax.experimental.pallas import tpu as pltpu

from reference_engine import progress, traffic
from reference_engine import replay as replay_lib
from reference_engine.batch import describe_shapes
from reference_engine.checkpoint import read_model_config
from reference_engine.compiles import use_persistent_cache
from reference_engine.config import (
    BACKENDS,
    DTYPES,
    KV_WRITES,
    EngineConfig,
    ModelConfig,
    num_pages_for,
)
from reference_engine.engine import Engine, Output
from reference_engine.explain import Timeline, explain_step, import_figure
from reference_engine.llm import LLM
from reference_engine.replay import Comparison, Job, Result
from reference_engine.request import SamplingParams
from reference_engine.weights import random_params

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "trace",
    None,
    "CSV file with columns TIMESTAMP,ContextTokens,GeneratedTokens (the Azure LLM inference traces"
    " have them); without it, requests are drawn from distributions fitted to such a trace.",
)
flags.DEFINE_integer("num_requests", 40, "How many requests, from the top of the trace.")
flags.DEFINE_float("length_scale", 1.0, "Factor on the prompts' lengths, to make a run shorter.")
flags.DEFINE_float("steps_per_second", 20.0, "Engine steps per second of the trace's time.")
flags.DEFINE_integer(
    "seed", 0, "Fixes the weights, the prompts and the drawn requests; of generate, the sampling."
)
flags.DEFINE_integer("page_size", EngineConfig.page_size, "Tokens in a page.")
flags.DEFINE_integer(
    "num_pages",
    0,
    "Pages in the pool; 0 for a quarter (generate: all) of what max_num_seqs of the"
    " longest request would fill.",
)
flags.DEFINE_integer(
    "max_num_batched_tokens", EngineConfig.max_num_batched_tokens, "Most new tokens in a step."
)
flags.DEFINE_integer("max_num_seqs", EngineConfig.max_num_seqs, "Most requests that run at a time.")
flags.DEFINE_integer(
    "max_deferrals",
    EngineConfig.max_deferrals,
    "Most steps in a row that alignment makes a request wait.",
)
flags.DEFINE_integer(
    "long_prefill_token_threshold",
    EngineConfig.long_prefill_token_threshold,
    "Most new tokens of one request in a step while others compete; 0 for no limit.",
)
flags.DEFINE_string(
    "kv_write", EngineConfig.kv_write, f"How K and V are written: one of {', '.join(KV_WRITES)}."
)
flags.DEFINE_string(
    "write_backend",
    EngineConfig.write_backend,
    f"Backend of the writes: one of {', '.join(BACKENDS)}. A CPU interprets mosaic_tpu (right, and"
    " very slow).",
)
flags.DEFINE_string(
    "attention_backend",
    EngineConfig.attention_backend,
    "Backend of the attention, and of the writes with --kv_write=fused; as --write_backend.",
)
flags.DEFINE_bool(
    "page_aligned_scheduling",
    True,
    "End chunks of prefills on page boundaries; which of replay's two runs `explain` prints.",
)
flags.DEFINE_bool("enable_prefix_caching", True, "Let requests share pages of common fronts.")
flags.DEFINE_string("compilation_cache", None, "A folder that keeps what is compiled.")
# `allow_override`: benchmarks have a flag of this name, and a process may import both.
flags.DEFINE_string(
    "plot", None, "PNG file for `explain` to draw the steps in.", allow_override=True
)

flags.DEFINE_string("model", None, "generate: a Hugging Face folder of a Llama, Qwen2 or Qwen3.")
flags.DEFINE_multi_string("prompt", [], "generate: a prompt; may be repeated.")
flags.DEFINE_list("prompt_ids", [], "generate: token ids of a prompt, for want of a tokenizer.")
flags.DEFINE_bool("chat", False, "generate: the prompts are a user's turns of one chat each.")
flags.DEFINE_integer("max_tokens", 64, "generate: most tokens of each completion.")
flags.DEFINE_integer(
    "max_model_len",
    0,
    "generate: most tokens of prompt and completion; 0 for 1,024, or what the"
    " model was made for if that is less.",
)
flags.DEFINE_float("temperature", 0.0, "generate: 0 for greedy.")
flags.DEFINE_integer("top_k", 0, "generate: 0 or -1 for all.")
flags.DEFINE_float("top_p", 1.0, "generate: see SamplingParams.")
flags.DEFINE_float("min_p", 0.0, "generate: see SamplingParams.")
flags.DEFINE_float("repetition_penalty", 1.0, "generate: see SamplingParams; 1 for none.")
flags.DEFINE_float("presence_penalty", 0.0, "generate: see SamplingParams; 0 for none.")
flags.DEFINE_float("frequency_penalty", 0.0, "generate: see SamplingParams; 0 for none.")
flags.DEFINE_multi_string("bad_words", [], "generate: a string that is not generated.")
flags.DEFINE_integer("n", 1, "generate: completions of each prompt.")
flags.DEFINE_multi_string("stop", [], "generate: a string that ends a completion.")
flags.DEFINE_bool("include_stop_str_in_output", False, "generate: print that string too.")
flags.DEFINE_bool("skip_special_tokens", True, "generate: print no special tokens.")
flags.DEFINE_integer("min_tokens", 0, "generate: tokens before any may end a completion.")
flags.DEFINE_bool("ignore_eos", False, "generate: do not stop at the model's end of text.")
flags.DEFINE_enum("dtype", "auto", ["auto", *DTYPES], "generate: of weights and pool.")
flags.DEFINE_bool("warm_up", False, "generate: compile every shape first.")

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


def main(argv: Sequence[str]) -> None:
    commands = {"generate": _generate, "replay": _replay, "explain": _explain}
    if len(argv) != 2 or argv[1] not in commands:
        got = " ".join(argv[1:]) or "no command"
        _exit(2, f"{got}: wanted one command, {', '.join(commands)}, and flags (see --helpfull)")
    if argv[1] != "generate" and {FLAGS.write_backend, FLAGS.attention_backend} <= {
        "auto",
        "oracle",
    }:
        # The oracle needs no accelerator, and this keeps one free that another program may hold.
        jax.config.update("jax_platforms", "cpu")
    try:
        if FLAGS.compilation_cache is not None:
            use_persistent_cache(FLAGS.compilation_cache)
        commands[argv[1]]()
    except BrokenPipeError:  # the reader of our output has gone, as in `explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _exit(2, f"cannot open {error.filename}: {error.strerror}")
    except (ValueError, NotImplementedError, ImportError) as error:
        _exit(2, str(error))


def _interpreted(config: EngineConfig) -> contextlib.AbstractContextManager:
    """What TPU kernels need in order to run where there is no TPU."""
    if (
        "mosaic_tpu" in (config.write_backend, config.attention_backend)
        and jax.default_backend() == "cpu"
    ):
        return pltpu.force_tpu_interpret_mode()
    return contextlib.nullcontext()


def _generate() -> None:
    if FLAGS.model is None:
        raise ValueError("--model is missing; wanted the folder of a model")
    if not FLAGS.prompt and not FLAGS.prompt_ids:
        raise ValueError("--prompt is missing; wanted a prompt, or --prompt_ids")
    fields: dict[str, Any] = {
        name: FLAGS[name].value
        for name in (
            "max_tokens",
            "min_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "bad_words",
            "n",
            "stop",
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
        )
    }
    params = SamplingParams(**fields)
    with _announced():
        config = _serving_config()
    with _interpreted(config):
        llm = LLM(FLAGS.model, config, dtype=FLAGS.dtype, seed=FLAGS.seed, warm_up=FLAGS.warm_up)
        print(describe_shapes(config), file=sys.stderr)
        prompts: list[Any] = list(FLAGS.prompt)
        if FLAGS.chat:
            prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in prompts]
        if FLAGS.prompt_ids:
            prompts.append(_ids(FLAGS.prompt_ids))
        start = time.perf_counter()
        if len(prompts) == params.n == 1:
            _print_as_it_comes(llm, prompts[0], params)
        else:
            for i, output in enumerate(llm.generate(prompts, params)):
                for completion in output.outputs:
                    which = f"{i}" if params.n == 1 else f"{i}.{completion.index}"
                    print(f"[{which}] {completion.text if llm.tokenizer else completion.token_ids}")
        _report(llm, time.perf_counter() - start)


def _ids(texts: Sequence[str]) -> list[int]:
    if not all(text.strip().isdigit() for text in texts):
        raise ValueError(f"--prompt_ids is {','.join(texts)!r}; wanted ids, as 1,15,7")
    return list(map(int, texts))


def _print_as_it_comes(llm: LLM, prompt: Any, params: SamplingParams) -> None:
    for delta in llm.stream(prompt, params):
        text = delta.text if llm.tokenizer else "".join(f"{token} " for token in delta.token_ids)
        print(text, end="", flush=True)
    print()


def _report(llm: LLM, seconds: float) -> None:
    stats = llm.engine.stats
    recompiles = f"{stats.num_recompiles} programs compiled after warm-up"
    if not FLAGS.warm_up:
        recompiles = "no warm-up"
    print(
        f"{stats.num_steps:,} steps in {seconds:.1f} s: {stats.num_tokens:,} tokens computed,"
        f" {stats.num_cached:,} found in the cache, {stats.num_padding:,} rows of padding,"
        f" {stats.num_preemptions} preemptions, {recompiles}",
        file=sys.stderr,
    )


def _serving_config() -> EngineConfig:
    """EngineConfig's defaults, and the flags that are given."""
    fields: dict[str, Any] = {
        name: FLAGS[name].value
        for name in (
            "page_size",
            "max_num_batched_tokens",
            "max_num_seqs",
            "max_deferrals",
            "long_prefill_token_threshold",
            "kv_write",
            "write_backend",
            "attention_backend",
            "page_aligned_scheduling",
            "enable_prefix_caching",
        )
    }
    model = read_model_config(FLAGS.model)
    longest = FLAGS.max_model_len or min(
        EngineConfig.max_model_len, model.max_position or EngineConfig.max_model_len
    )
    if fields["page_size"] < 1:
        raise ValueError(f"--page_size is {fields['page_size']}; wanted at least 1")
    all_pages = fields["max_num_seqs"] * num_pages_for(longest, fields["page_size"])
    return EngineConfig(
        **fields, max_model_len=longest, num_pages=FLAGS.num_pages or max(1, all_pages)
    )


@contextlib.contextmanager
def _announced():
    """Warnings of what is made inside go to standard error, a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {message}", file=sys.stderr)


def _replay() -> None:
    with _announced():
        jobs = _make_jobs()
        config = _make_config(jobs)
    print(_describe(jobs, config))
    results, seconds = [], []
    with _interpreted(config):
        params = random_params(MODEL, FLAGS.seed)
        for aligned in (True, False):
            what = f"page_aligned_scheduling={'on' if aligned else 'off'}"
            with progress.bar(len(jobs), what, "request") as bar:

                def observe(step: int, engine: Engine, outputs: list[Output], bar=bar) -> None:
                    bar.update(sum(output.finish_reason is not None for output in outputs))

                start = time.perf_counter()
                results.append(
                    replay_lib.replay(
                        jobs, params, MODEL, _with_alignment(config, aligned), observe=observe
                    )
                )
                seconds.append(time.perf_counter() - start)
    print(_table(results, seconds))
    comparison = replay_lib.compare(*results)
    print(_comparison(comparison))
    if not comparison.is_equal:
        _exit(1, "the two runs differ")


def _explain() -> None:
    if FLAGS.plot is not None:
        import_figure()  # before the work whose result it would draw
        _check_writable(FLAGS.plot)
    with _announced():
        jobs = _make_jobs()
        config = _make_config(jobs)
    print(_describe(jobs, config))
    config = _with_alignment(config, FLAGS.page_aligned_scheduling)
    alignment = f"page_aligned_scheduling {'on' if config.page_aligned_scheduling else 'off'}"
    print(alignment)
    timeline = Timeline(config.max_num_batched_tokens)

    def print_step(step: int, engine: Engine, outputs: list[Output]) -> None:
        print(explain_step(step, engine, outputs, jobs))
        timeline.observe(step, engine)

    with _interpreted(config):
        replay_lib.replay(jobs, random_params(MODEL, FLAGS.seed), MODEL, config, observe=print_step)
    if FLAGS.plot is not None:
        timeline.save(FLAGS.plot, f"pages of {config.page_size}, {alignment}")


def _check_writable(path: str) -> None:
    """Raises the OSError that writing the file would."""
    is_new = not os.path.exists(path)
    with open(path, "ab"):
        pass
    if is_new:
        os.remove(path)


def _make_jobs() -> list[Job]:
    if FLAGS.num_requests < 1:
        raise ValueError(f"--num_requests is {FLAGS.num_requests}; wanted at least 1")
    for name, value in (
        ("length_scale", FLAGS.length_scale),
        ("steps_per_second", FLAGS.steps_per_second),
    ):
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name} is {value}; wanted a number above 0")
    if FLAGS.trace is None:
        arrivals = traffic.generate(FLAGS.num_requests, seed=FLAGS.seed)
    else:
        arrivals = traffic.read_azure_trace(FLAGS.trace, FLAGS.num_requests)
    return replay_lib.make_jobs(
        traffic.scale_prompts(arrivals, FLAGS.length_scale),
        vocab_size=MODEL.vocab_size,
        steps_per_second=FLAGS.steps_per_second,
        seed=FLAGS.seed,
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
        attention_backend=FLAGS.attention_backend,
        enable_prefix_caching=FLAGS.enable_prefix_caching,
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
    return "\n".join(
        [
            f"traffic  {source}: {len(jobs):,} requests in {jobs[-1].arrival_step + 1:,} steps"
            f" ({FLAGS.steps_per_second:g} steps a second)",
            f"         prompts {scaled}: {min(prompts):,} to {max(prompts):,} tokens,"
            f" {sum(prompts):,} in all; outputs {sum(job.max_tokens for job in jobs):,} in all",
            f"model    random weights, {MODEL.num_layers} layers, {MODEL.num_heads} query heads on"
            f" {MODEL.num_kv_heads} KV heads of {MODEL.head_dim}, {MODEL.vocab_size} token ids,"
            f" {MODEL.dtype}, on {jax.default_backend()}",
            f"engine   page_size {config.page_size}, {config.num_pages:,} pages, at most"
            f" {config.max_num_batched_tokens} tokens and {config.max_num_seqs} requests a step,"
            f" {_describe_writes(config)}, attention by {config.attention_backend}",
            f"         {describe_shapes(config)}",
            "",
        ]
    )


def _describe_writes(config: EngineConfig) -> str:
    if config.kv_write == "fused":
        return "kv_write fused with the attention"
    return f"kv_write {config.kv_write} by {config.write_backend}"


def _table(results: list[Result], seconds: list[float]) -> str:
    rows = [("page_aligned_scheduling", "on", "off")]

    def add(label, values):
        rows.append((label, *values))

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
        add(label, (f"{getattr(result, name):,}" for result in results))
    for percentile in (50, 99):
        add(
            f"steps to first token, p{percentile}",
            (f"{np.percentile(list(result.ttft.values()), percentile):.1f}" for result in results),
        )
    add("seconds (the first compiles)", (f"{value:.1f}" for value in seconds))
    return "\n".join(f"{label:<34}{on:>12}{off:>12}" for label, on, off in rows)


def _comparison(c: Comparison) -> str:
    logits = f"{c.num_equal_logits:,} of {c.num_outputs:,} rows, bit for bit"
    if c.num_equal_logits != c.num_outputs:
        logits += f"; the largest difference is {c.max_logit_difference:.3g}"
    return "\n".join(
        [
            "",
            "equal in both runs",
            f"  generated tokens   {c.num_equal_tokens:,} of {c.num_outputs:,}",
            f"  logits             {logits}",
            f"  live pool bytes    {c.num_equal_pools:,} of {c.num_requests:,} requests, each at "
            "its end, bit for bit",
            f"  diversity          {c.num_distinct_tokens} of {MODEL.vocab_size} token ids "
            f"generated; {c.num_distinct_outputs} different outputs of {c.num_requests} requests",
        ]
    )


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
