# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The command line: its tables, its words, its exit codes."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from reference_engine import __main__ as cli
from reference_engine import batch as batch_lib
from reference_engine import engine as engine_lib
from reference_engine.completions import CompletionOutput, RequestOutput
from reference_engine.llm import LLM
from reference_engine.replay import Result
from reference_engine.sampling_params import SamplingParams
from tests.engine.checkpoints import byte_tokenizer, write_checkpoint

SMALL = {"num_requests": 5, "length_scale": 0.04, "max_num_batched_tokens": 48, "max_num_seqs": 4}
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,48,10
2023-11-16 18:17:04.0319600,33,8
2023-11-16 18:17:04.0781490,110,27
"""


def main(command, **values):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        cli.main(["reference_engine", *command.split()])


def test_replay_prints_both_runs_and_that_they_are_equal(capsys):
    main("replay", **SMALL)
    out, err = capsys.readouterr()
    assert err == ""
    assert "prompts SCALED by 0.04" in out
    rows = dict(re.findall(r"^(\S.*?)  +(\S+ +\S+)$", out, re.MULTILINE))
    assert rows["page_aligned_scheduling"].split() == ["on", "off"]
    for label in ("steps", "tokens computed", "whole pages written", "slices (whole and partial)"):
        assert all(int(cell.replace(",", "")) > 0 for cell in rows[label].split())
    assert {"deferrals", "preemptions", "steps to first token, p50"} <= rows.keys()
    assert out.startswith("The two runs came to the same.\nEqual, bit for bit: ")
    assert out.count("\n") <= 25
    tokens = re.search(r": (\d+) of (\d+) generated tokens", out)
    logits = re.search(r" (\d+) of (\d+) rows of logits", out)
    assert len({*tokens.groups(), *logits.groups()}) == 1
    assert "5 of 5 requests" in out and "5 different outputs of 5 requests" in out


def test_replay_fails_where_the_runs_differ(capsys, monkeypatch):
    real, calls = batch_lib.plan_writes, []

    def planted(segments, page_size):  # once, in the first run
        plan = real(segments, page_size)
        calls.append(1)
        if len(calls) == 2:
            plan.slices[0] += page_size
        return plan

    monkeypatch.setattr(batch_lib, "plan_writes", planted)
    with pytest.raises(SystemExit) as exit_info:
        main("replay", **SMALL)
    assert exit_info.value.code == 1
    out, err = capsys.readouterr()
    assert err == "reference_engine: the two runs differ\n"
    assert out.startswith("THE TWO RUNS DIFFER.\n")
    assert re.search(r"the largest difference of logits is [\d.]+", out)


def test_explain_prints_every_step(capsys, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    values = SMALL | {"trace": str(trace), "length_scale": 1.0, "num_pages": 40}
    main("explain", **values, all=True)
    out = capsys.readouterr().out
    assert "prompts as recorded" in out and "3 requests" in out
    assert "request 0 prefill [0, 48) of 48 + 10: whole pages 0-2\n" in out
    assert re.search(r"request 0 decode  \[48, 49\) of 48 \+ 10: page \d+ row 0\n", out)
    assert re.search(r"deferred at \d+: the next page boundary is \d+ tokens away, \d+ are", out)
    assert re.search(r"prefill \[\d+, 110\) .* page \d+ rows 0-13\n", out)
    assert out.count("finished: length") == 3


def test_explain_prints_the_summary_and_the_first_steps(capsys):
    main("explain", **SMALL)
    short = capsys.readouterr().out.splitlines()
    main("explain", **SMALL, all=True)
    whole = capsys.readouterr().out.splitlines()
    num_steps, num_left = int(whole[0].split()[3]), int(re.search(r"\d+", short[-1])[0])
    assert len(short) <= 25 and whole[: len(short) - 1] == short[:-1]
    steps = [sum(line.startswith("step ") for line in lines) for lines in (short, whole)]
    assert steps == [num_steps - num_left, num_steps] and "which --all prints" in short[-1]


def test_explain_without_alignment_defers_nobody(capsys):
    main("explain", **SMALL, page_aligned_scheduling=False, all=True)
    out = capsys.readouterr().out
    assert "page_aligned_scheduling off" in out and "deferred" not in out


@pytest.mark.parametrize("kv_write", ["tokens", "fused"])
def test_other_forms_of_write_replay_to_the_same(capsys, kv_write):
    main("replay", **SMALL, kv_write=kv_write, attention_backend="oracle")
    out, err = capsys.readouterr()
    assert err == "" and "5 of 5 requests" in out
    how = "fused with the attention" if kv_write == "fused" else f"{kv_write} by auto"
    assert f"kv_write {how}, attention by oracle; " in out


def test_replay_fails_where_one_run_has_a_wrong_page_table(capsys, monkeypatch):
    real, calls = engine_lib.make_batch_of, []

    def planted(*args):  # once, in the first run
        batch = real(*args)
        calls.append(1)
        if len(calls) == 2:
            batch = batch._replace(table_rows=batch.table_rows + 1)
        return batch

    monkeypatch.setattr(engine_lib, "make_batch_of", planted)
    with pytest.raises(SystemExit) as exit_info:
        main("replay", **SMALL, kv_write="fused")
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == "reference_engine: the two runs differ\n"


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({}, 0),
        ({"kv_write": "fused", "attention_backend": "oracle"}, 0),
        ({"write_backend": "mosaic_tpu"}, 1),
        ({"attention_backend": "mosaic_tpu"}, 1),
        ({"kv_write": "fused", "attention_backend": "mosaic_tpu"}, 1),
    ],
)
def test_a_cpu_interprets_the_tpu_kernels(monkeypatch, values, wanted):
    entered = []

    @contextlib.contextmanager
    def interpreting():
        entered.append("in")
        yield
        entered.append("out")

    def replay(jobs, params, model, config, observe):
        assert entered == ["in"] * wanted
        assert {name: getattr(config, name) for name in values} == values
        return Result()

    monkeypatch.setattr(cli.pltpu, "force_tpu_interpret_mode", interpreting)
    monkeypatch.setattr(cli.replay_lib, "replay", replay)
    main("explain", **SMALL, **values)
    assert entered == ["in", "out"] * wanted


def test_explain_says_who_is_not_admitted(capsys, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    small = SMALL | {"trace": str(trace), "length_scale": 1.0}
    main("explain", **small, num_pages=10, all=True)
    assert re.search(
        r"request 2 not admitted: it wants 7 pages and \d are free", capsys.readouterr().out
    )
    main("explain", **(small | {"max_num_seqs": 1}), num_pages=40, all=True)
    assert "request 1 not admitted: max_num_seqs=1 requests are running" in capsys.readouterr().out


def test_explain_draws_the_steps(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    trace = tmp_path / "trace.csv"  # two that grow until the pool holds one
    trace.write_text(TRACE.partition("\n")[0] + "\n2023-11-16 18:17:03,14,45" * 2 + "\n")
    main(
        "explain",
        **(SMALL | {"trace": str(trace), "length_scale": 1.0}),
        num_pages=6,
        plot=str(tmp_path / "steps.png"),
        all=True,
    )
    assert "preempted" in capsys.readouterr().out
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, seed=3, tokenizer=byte_tokenizer())
    return path


GENERATE = {"max_tokens": 8, "max_num_batched_tokens": 32, "max_num_seqs": 2}


def test_generate_streams_one_prompt_and_reports(capsys, folder):
    main("generate", model=str(folder), prompt=["the quick"], **GENERATE)
    out, err = capsys.readouterr()
    want = LLM(folder).generate("the quick", SamplingParams(max_tokens=8))[0].outputs[0].text
    assert out == want + "\n"
    assert "1,024 pages of 16 tokens; at most 48 tokens and 2 requests per step, 256 tok" in err
    assert "5 shapes: decodes of {1, 2} sequences, other steps of {16, 32, 48} tokens\n" in err
    assert re.search(r"8 steps in .* tokens computed, .* no warm-up\n", err)


def test_generate_takes_several_prompts_and_chats(capsys, folder):
    main(
        "generate",
        model=str(folder),
        prompt=["the quick", "dog"],
        chat=True,
        warm_up=True,
        temperature=1.0,
        seed=3,
        **(GENERATE | {"max_num_seqs": 1}),
    )
    out, err = capsys.readouterr()
    assert re.match(r"(?s)\[0\] .*\n\[1\] .*\n$", out)
    assert "0 programs compiled after warm-up" in err


def test_generates_flags_are_sampling_params(capsys, folder, monkeypatch):
    fields = {
        "n": 2,
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "bad_words": ["dog"],
        "min_tokens": 3,
        "top_k": -1,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "stop": ["the"],
    }

    def generate(self, prompts, params):
        assert params == SamplingParams(max_tokens=8, **fields)
        outputs = (CompletionOutput(i, f"text {i}", (), None, "stop", None) for i in range(2))
        return [RequestOutput(0, prompts[0], (1,), tuple(outputs))]

    monkeypatch.setattr(LLM, "generate", generate)
    main("generate", model=str(folder), prompt=["the quick"], **(GENERATE | fields))
    assert capsys.readouterr().out == "[0.0] text 0\n[0.1] text 1\n"


def test_generate_serves_token_ids_without_a_tokenizer(capsys, tmp_path):
    write_checkpoint(tmp_path)
    main("generate", model=str(tmp_path), prompt_ids=["1", "7", "3"], **GENERATE)
    assert re.match(r"(\d+ ){8}\n$", capsys.readouterr().out)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prompt": ["the dog " * 40], "max_model_len": 64}, "prompt 0: .* wanted fewer than max_"),
        ({"prompt_ids": ["5", "x"]}, "--prompt_ids is '5,x'; wanted ids, as 1,15,7"),
        ({"prompt_ids": ["999"]}, "is 999 at index 0; wanted whole numbers in"),
        ({"prompt": ["x"], "max_model_len": 999}, "is 999; wanted at most the model's 256"),
        ({"prompt": ["x"], "num_pages": 1, "max_tokens": 60}, "at most the pool's 1 pages"),
        ({"prompt": ["x"], "page_size": 0}, "argument `page_size` is 0; wanted an int >= 1"),
        ({"prompt": ["x"], "repetition_penalty": 0.0}, "argument `repetition_penalty` is 0.0"),
        ({"prompt": ["x"], "temperature": float("nan")}, "argument `temperature` is nan"),
        ({"prompt": ["x"], "bad_words": [""]}, "argument `bad_words` is"),
        ({"prompt": ["x"], "seed": -1}, "argument `seed` is -1; wanted an int >= 0"),
    ],
)
def test_generates_mistakes_are_one_sentence(capsys, folder, values, message):
    with pytest.raises(SystemExit) as exit_info:
        main("generate", model=str(folder), **values)
    assert exit_info.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert re.search(message, err[-1]) and err[-1].startswith("reference_engine: ")


def test_soft_alignment_is_announced_on_stderr(capsys):
    main("explain", **(SMALL | {"max_num_batched_tokens": 17, "num_requests": 1}))
    assert capsys.readouterr().err.startswith("warning: EngineConfig: max_num_batched_tokens=17")


@pytest.mark.parametrize(
    "command, values, message",
    [
        ("", {}, "no command: wanted one command, generate, replay, explain, and flags"),
        ("rerun", {}, "rerun: wanted one command"),
        ("replay explain", {}, "replay explain: wanted one command"),
        ("replay", {"trace": "/no/such/file"}, "cannot open /no/such/file: No such file"),
        ("replay", {"num_requests": 0}, "--num_requests is 0; wanted at least 1"),
        ("replay", {"length_scale": 0.0}, "--length_scale is 0.0; wanted a number above 0"),
        ("replay", {"steps_per_second": float("nan")}, "--steps_per_second is nan"),
        ("replay", {"page_size": 0}, "--page_size is 0; wanted at least 1"),
        ("replay", {"page_size": 512}, "wanted at least page_size=512"),
        ("replay", {"kv_write": "rows"}, "argument `kv_write` is 'rows'"),
        ("replay", {"num_pages": 1}, "wanted at most the pool's 1 pages"),
        ("replay", {"num_pages": -3}, "argument `num_pages` is -3"),
        ("replay", {"write_backend": "cuda"}, "argument `write_backend` is 'cuda'"),
        (
            "replay",
            {"attention_backend": "flash"},
            "argument `attention_backend` is 'flash'; wanted one of",
        ),
        (
            "replay",
            {"kv_write": "fused", "write_backend": "oracle"},
            "argument `write_backend` is 'oracle'; wanted 'auto' or attention_backend='auto'",
        ),
        (
            "replay",
            {"attention_backend": "mosaic_gpu"},
            "backend 'mosaic_gpu' cannot run this call",
        ),
        ("explain", {"plot": "/no/such/x.png"}, "cannot open /no/such/x.png: No such file"),
        ("generate", {}, "--model is missing; wanted the folder of a model"),
        ("generate", {"model": "/no/such"}, "--prompt is missing; wanted a prompt, or --prompt_i"),
        ("generate", {"model": "/no/such", "prompt": ["x"]}, "cannot open /no/such/config.json"),
        ("generate", {"model": "x", "prompt": ["x"], "top_p": 0.0}, "argument `top_p` is 0.0"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(capsys, command, values, message):
    with pytest.raises(SystemExit) as exit_info:
        main(command, **values)
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("reference_engine: ") and err.count("\n") == 1


def test_as_a_process(tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "reference_engine", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=False,
        )

    bad = call("replay", "--no_such_flag=1")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "no_such_flag" in bad.stderr and bad.stderr.count("\n") == 1
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    good = call("replay", f"--trace={trace}", "--num_requests=2")
    assert (good.returncode, good.stderr) == (0, "")
    assert "2 of 2 requests" in good.stdout
