# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Command line: `python -m reference_engine generate`, `replay` or `explain`, and flags.

generate completes prompts with the model of a folder. replay runs the same requests through a tiny
random model twice, with page-aligned scheduling and without; it checks that both runs come to the
same, and prints what each of them did. explain prints what one such run did, step by step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from jax.experimental.pallas import tpu as pltpu

from reference_engine import progress, report, traffic
from reference_engine import replay as replay_lib
from reference_engine.compiles import use_persistent_cache
from reference_engine.config import (
    BACKENDS,
    DTYPES,
    KV_WRITES,
    EngineConfig,
    ModelConfig,
    num_pages_for,
)
from reference_engine.engine import Engine
from reference_engine.explain import Timeline, explain_step, import_figure
from reference_engine.llm import LLM
from reference_engine.outputs import Output
from reference_engine.replay import Job, Result
from reference_engine.sampling_params import SamplingParams
from reference_engine.weights import Params, random_params

FLAGS = flags.FLAGS

# The fields of EngineConfig that are flags, of its types and defaults; generate has LLM's defaults.
_ENGINE_FLAGS = {
    "page_size": "Tokens in a page.",
    "max_num_batched_tokens": "The most new tokens in a step, on average.",
    "max_num_seqs": "The most requests that run at a time.",
    "gpu_memory_utilization": "generate: what share of the memory parameters, pool and steps take.",
    "page_aligned_scheduling": "End the chunks of prefills on page boundaries. replay runs with and"
    " without it; explain prints the run that this flag asks for.",
    "long_prefill_token_threshold": "The most new tokens of one request in a step while other"
    " requests compete with it; 0 for no limit.",
    "max_deferrals": "The most steps in a row that alignment makes a request wait.",
    "enable_prefix_caching": "Let requests share the pages of a common prefix.",
    "kv_write": f"How keys and values are written: one of {', '.join(KV_WRITES)}.",
    "write_backend": f"The backend of the writes: one of {', '.join(BACKENDS)}. A CPU interprets"
    " mosaic_tpu: the results are right, and the run is very slow.",
    "attention_backend": "The backend of the attention, and with --kv_write=fused of the writes"
    " too: one of those of --write_backend.",
}
# The fields of SamplingParams that are flags. Types and defaults as above.
_SAMPLING_FLAGS = {
    "max_tokens": "generate: the most tokens of each completion.",
    "min_tokens": "generate: how many tokens come before any token may end a completion.",
    "temperature": "generate: 0 takes the likeliest token.",
    "top_k": "generate: sample from this number of the likeliest tokens; 0 or -1 for all.",
    "top_p": "generate: sample from the likeliest tokens that together have this probability.",
    "min_p": "generate: sample from tokens with at least this share of the likeliest's"
    " probability.",
    "repetition_penalty": "generate: see SamplingParams; 1 for none.",
    "presence_penalty": "generate: see SamplingParams; 0 for none.",
    "frequency_penalty": "generate: see SamplingParams; 0 for none.",
    "bad_words": "generate: a string that is not generated.",
    "n": "generate: the number of completions of each prompt.",
    "stop": "generate: a string that ends a completion.",
    "ignore_eos": "generate: do not stop at the model's end of text.",
    "include_stop_str_in_output": "generate: print the string that ended a completion, too.",
    "skip_special_tokens": "generate: print no special tokens.",
}


def _define(name: str, default: object, text: str) -> None:
    """Defines a flag of its default's type; an empty tuple is the default of a list of strings."""
    define: dict[type, Callable[..., Any]] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        tuple: flags.DEFINE_multi_string,
    }
    define[type(default)](name, default, text)


for _name, _text in _ENGINE_FLAGS.items():
    _define(_name, getattr(EngineConfig, _name), _text)
for _name, _text in _SAMPLING_FLAGS.items():
    _define(_name, getattr(SamplingParams, _name), _text)
FLAGS.set_default("max_tokens", 64)  # SamplingParams' 16 are vLLM's, and few to look at

flags.DEFINE_integer(
    "num_pages",
    0,
    "Pages in the pool; 0 for as many as the memory has room for (generate; on a CPU, for 16,384"
    " tokens), or a quarter of what max_num_seqs of the longest request fill (replay, explain).",
)
flags.DEFINE_integer(
    "seed", 0, "Fixes the weights, the prompts and the drawn requests; for generate, the sampling."
)
flags.DEFINE_string(
    "compilation_cache",
    None,
    "A folder that keeps compiled programs; empty for none. On a GPU or TPU, generate keeps them in"
    " the folder pallas_paged/xla of $XDG_CACHE_HOME or ~/.cache by default.",
)

flags.DEFINE_string("model", None, "generate: the Hugging Face folder of a Llama, Qwen2 or Qwen3.")
flags.DEFINE_multi_string("prompt", [], "generate: a prompt.")
flags.DEFINE_list(
    "prompt_ids", [], "generate: a prompt as token ids, for a model without a tokenizer."
)
flags.DEFINE_bool("chat", False, "generate: each prompt is a user's message that begins a chat.")
flags.DEFINE_integer(
    "max_model_len",
    0,
    "generate: the most tokens of a prompt and its completion; 0 for 8,192, on a CPU 1,024, or for"
    " the longest context of the model if that is shorter.",
)
flags.DEFINE_enum(
    "dtype", "auto", ["auto", *DTYPES], "generate: the dtype of the weights and of the pool."
)
flags.DEFINE_bool("warm_up", False, "generate: compile every shape before the first step.")

flags.DEFINE_string(
    "trace",
    None,
    "A CSV file with the columns TIMESTAMP,ContextTokens,GeneratedTokens, as the Azure LLM"
    " inference traces have them. Without it, requests are drawn from distributions that were"
    " fitted to such a trace.",
)
flags.DEFINE_integer("num_requests", 40, "How many requests to take from the top of the trace.")
flags.DEFINE_float(
    "length_scale", 1.0, "A factor on the lengths of the prompts; below 1, a run is shorter."
)
flags.DEFINE_float("steps_per_second", 20.0, "Engine steps per second of the trace's time.")
# `allow_override`: benchmarks have flags of these names, and a process may import both.
flags.DEFINE_bool("all", False, "explain: print every step.", allow_override=True)
flags.DEFINE_string("plot", None, "explain: a PNG file to draw the steps in.", allow_override=True)

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
    """Runs the command that `argv` names."""
    commands = {"generate": _generate, "replay": _replay, "explain": _explain}
    if len(argv) != 2 or argv[1] not in commands:
        got = " ".join(argv[1:]) or "no command"
        _exit(2, f"{got}: wanted one command, {', '.join(commands)}, and flags (see --helpfull)")
    backends = {FLAGS.write_backend, FLAGS.attention_backend}
    if argv[1] != "generate" and backends <= {"auto", "oracle", "xla"}:
        # The tiny model needs no accelerator: another program may hold it.
        jax.config.update("jax_platforms", "cpu")
        if backends == {"auto"}:
            FLAGS[
                "attention_backend"
            ].value = "oracle"  # a row's bits do not depend on its batch there
    try:
        if FLAGS.compilation_cache:
            use_persistent_cache(FLAGS.compilation_cache)
        commands[argv[1]]()
    except BrokenPipeError:  # the reader of our output has ended, as in `explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _exit(2, f"cannot open {error.filename}: {error.strerror}")
    except (ValueError, NotImplementedError, ImportError) as error:
        _exit(2, str(error))


def _given(names: Sequence[str] | dict[str, str]) -> dict[str, Any]:
    """The values of flags by their names."""
    return {name: FLAGS[name].value for name in names}


def _interpreted(*backends: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which TPU kernels run on a CPU; an empty one where that is not asked for."""
    if "mosaic_tpu" in backends and jax.default_backend() == "cpu":
        return pltpu.force_tpu_interpret_mode()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Prints the warnings of the block that it surrounds on standard error, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {message}", file=sys.stderr)


# ---- generate


def _generate() -> None:
    if FLAGS.model is None:
        raise ValueError("--model is missing; wanted the folder of a model")
    if not FLAGS.prompt and not FLAGS.prompt_ids:
        raise ValueError("--prompt is missing; wanted a prompt, or --prompt_ids")
    params = SamplingParams(**_given(_SAMPLING_FLAGS))
    with _interpreted(FLAGS.write_backend, FLAGS.attention_backend):
        with _announced():
            llm = _load()
        print(report.limits(llm.engine.config), file=sys.stderr)
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
        seconds = time.perf_counter() - start
        print(report.serving(llm.engine.stats, seconds, FLAGS.warm_up), file=sys.stderr)


def _ids(texts: Sequence[str]) -> list[int]:
    if not all(text.strip().isdigit() for text in texts):
        raise ValueError(f"--prompt_ids is {','.join(texts)!r}; wanted ids, as 1,15,7")
    return list(map(int, texts))


def _print_as_it_comes(llm: LLM, prompt: Any, params: SamplingParams) -> None:
    for delta in llm.stream(prompt, params):
        text = delta.text if llm.tokenizer else "".join(f"{token} " for token in delta.token_ids)
        print(text, end="", flush=True)
    print()


def _load() -> LLM:
    """The model with the flags that were given; what the others are is LLM's affair."""
    given = [name for name in _ENGINE_FLAGS if not FLAGS[name].using_default_value]
    return LLM(
        FLAGS.model,
        dtype=FLAGS.dtype,
        seed=FLAGS.seed,
        warm_up=FLAGS.warm_up,
        compilation_cache=False if FLAGS.compilation_cache == "" else None,
        max_model_len=FLAGS.max_model_len or None,
        num_pages=FLAGS.num_pages or None,
        **_given(given),
    )


def _page_size() -> int:
    """The flag, checked before anything is divided by it."""
    if FLAGS.page_size < 1:
        raise ValueError(f"--page_size is {FLAGS.page_size}; wanted at least 1")
    return FLAGS.page_size


# ---- replay and explain


def _replay() -> None:
    with _announced():
        jobs = _make_jobs()
        configs = [_make_config(jobs, aligned) for aligned in (True, False)]
    params = random_params(MODEL, FLAGS.seed)
    results, seconds = [], []
    for config in configs:
        start = time.perf_counter()
        results.append(_run(jobs, params, config))
        seconds.append(time.perf_counter() - start)
    comparison = replay_lib.compare(*results)
    print(report.verdict(comparison, MODEL), report.alignment(*results), "", sep="\n")
    print(report.counts(results, seconds), "", _setup(jobs, configs[0]), sep="\n")
    if not comparison.is_equal:
        _exit(1, "the two runs differ")


def _explain() -> None:
    if FLAGS.plot is not None:
        import_figure()  # before the work whose result it would draw
        _check_writable(FLAGS.plot)
    with _announced():
        jobs = _make_jobs()
        config = _make_config(jobs, FLAGS.page_aligned_scheduling)
    steps: list[str] = []
    timeline = Timeline(config.max_num_batched_tokens)

    def keep(step: int, engine: Engine, outputs: list[Output]) -> None:
        steps.append(explain_step(step, engine, outputs, jobs))
        timeline.observe(step, engine)

    result = _run(jobs, random_params(MODEL, FLAGS.seed), config, keep)
    if FLAGS.plot is not None:
        aligned = "on" if config.page_aligned_scheduling else "off"
        title = f"pages of {config.page_size}, page_aligned_scheduling {aligned}"
        timeline.save(FLAGS.plot, title)
    print(report.summary(result, config), _setup(jobs, config), "", sep="\n")
    print("[start, end) are the positions computed, of the prompt's tokens + those to generate.")
    print(report.steps(steps, max_lines=None if FLAGS.all else 15))


def _run(
    jobs: Sequence[Job],
    params: Params,
    config: EngineConfig,
    observe: Callable[[int, Engine, list[Output]], None] | None = None,
) -> Result:
    """Replays the jobs and shows progress; `observe` as in `replay.replay`."""
    backends = (config.write_backend, config.attention_backend)
    what = f"page_aligned_scheduling={'on' if config.page_aligned_scheduling else 'off'}"
    with progress.bar(len(jobs), what, "request") as bar, _interpreted(*backends):

        def update(step: int, engine: Engine, outputs: list[Output]) -> None:
            bar.update(sum(output.finish_reason is not None for output in outputs))
            if observe is not None:
                observe(step, engine, outputs)

        return replay_lib.replay(jobs, params, MODEL, config, observe=update)


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
    for name, value in _given(["length_scale", "steps_per_second"]).items():
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


def _make_config(jobs: Sequence[Job], aligned: bool) -> EngineConfig:
    page_size = _page_size()
    longest = num_pages_for(max(len(job.prompt_ids) + job.max_tokens for job in jobs), page_size)
    fields = _given(_ENGINE_FLAGS) | {"page_aligned_scheduling": aligned}
    return EngineConfig(
        **fields,
        num_pages=FLAGS.num_pages or max(longest, FLAGS.max_num_seqs * longest // 4),
        max_model_len=longest * page_size,
        # One shape: a row of a matrix product then has the same bits in any batch. It has room for
        # what alignment leaves over.
        token_buckets=(FLAGS.max_num_batched_tokens + page_size,),
        seq_buckets=(FLAGS.max_num_seqs,),
        return_logits=True,
        async_scheduling=False,  # what is shown is counted in steps
    )


def _setup(jobs: Sequence[Job], config: EngineConfig) -> str:
    source = FLAGS.trace or f"generator, seed {FLAGS.seed}"
    return report.setup(
        jobs, config, MODEL, source, scale=FLAGS.length_scale, rate=FLAGS.steps_per_second
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
