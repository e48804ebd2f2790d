# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The commands' verdicts: short, computed from the rows, and changed by them."""

import dataclasses

import pytest

from bench import report, tune_attention, tune_attention_gpu
from bench.cases.attention import CASES, PRESETS, Call, Case, room_for
from bench.cases.kv_write import WriteCase
from bench.engine_study.share import Share
from bench.engine_study.simulate import Cell, Outcome
from bench.tpu_model.attention import Prediction, Writing
from bench.tpu_model.kv_write import WritePrediction
from bench.tpu_model.published import Check
from bench.verdicts import attention, engine, kv_write
from pallas_paged import TpuAttentionConfig
from pallas_paged.attention.gpu.config import GpuAttentionConfig

# ---- The form


def test_a_verdict_is_short_and_counts_what_it_leaves_out():
    rows = [{"row": str(i)} for i in range(100)]
    lines = report.Verdict("many rows", rows, ["A sentence. " * 20]).text().splitlines()
    assert len(lines) == report.MAX_VERDICT_LINES
    assert lines[0] == "VERDICT: many rows"
    shown = [line for line in lines if line.strip().isdigit()]
    assert f"  ... and {100 - len(shown)} more rows, which --all prints" in lines
    assert "--json" in lines[-1]
    few = report.Verdict("few rows", rows[:3]).text().splitlines()
    assert len(few) == 1 + 2 + 3 + 1 and not any("more rows" in line for line in few)


# ---- Writes


def _write(op, page_size, *, hbm, issue, generation="v6e", tokens=65536, dmas=None):
    case = WriteCase(op, generation, page_size, tokens, 8, 128, "bfloat16")
    num_dmas = tokens // (1 if op == "token" else page_size) if dmas is None else dmas
    return WritePrediction(case, num_dmas, 5.0, issue, hbm, num_dmas * 18.0 * 1.75, 0)


def _writes(**changes):
    """Every form at pages of 16 and 64: HBM takes 500,000 cycles, issuing a fifth of it."""
    rows = {
        f"{op}_{size}": dict(op=op, page_size=size, hbm=500_000.0, issue=100_000.0)
        for op in ("page", "slice")
        for size in (16, 64)
    }
    rows["token"] = dict(op="token", page_size=16, hbm=500_000.0, issue=600_000.0)
    for name, fields in changes.items():
        rows[name] |= fields
    return [_write(**fields) for fields in rows.values()]


def test_pages_of_the_least_size_are_chosen_where_all_are_equal():
    [row] = kv_write.predicted(_writes()).rows
    assert (row["use"], row["page size"], row["bound by"]) == (
        "page_write",
        "16 and larger",
        "HBM",
    )
    assert row["core busy"] == "20%" and row["slices take"] == "1.00x"
    # 65,536 DMAs at 18 ns are 31.5 cycles each, 2,064,384 cycles.
    assert row["tokens take"] == "1.20x .. 4.13x"


@pytest.mark.parametrize(
    "changes, column, wanted",
    [
        ({"page_16": {"issue": 700_000.0}}, "page size", "64"),
        ({"page_16": {"issue": 700_000.0}, "page_64": {"issue": 600_000.0}}, "use", "slice_write"),
        (
            {name: {"issue": 2e6} for name in ("page_16", "page_64", "slice_16", "slice_64")},
            "bound by",
            "core",
        ),
        ({"slice_16": {"issue": 750_000.0}}, "slices take", "1.50x"),
        ({"token": {"issue": 5e6}}, "tokens take", "10.00x"),
        ({"token": {"dmas": 16384}}, "tokens take", "1.20x"),
    ],
)
def test_planted_times_change_the_verdict_on_writes(changes, column, wanted):
    [row] = kv_write.predicted(_writes(**changes)).rows
    assert row[column] == wanted


def test_the_verdict_on_writes_has_a_row_per_generation_and_the_models_error():
    rows = _writes() + [_write("page", 16, hbm=1.0, issue=9.0, generation="v5e")]
    verdict = kv_write.predicted(rows, [Check(8, 1, 1, 110.0, 100.0), Check(16, 1, 1, 9.5, 10.0)])
    assert [row["generation"] for row in verdict.rows] == ["v6e", "v5e"]
    assert "-5% to +10%" in verdict.notes[-1] and "Nothing here ran on a TPU" in verdict.notes[0]
    assert len(verdict.text().splitlines()) <= report.MAX_VERDICT_LINES


def _measured(op, page_size, us, tokens=1024):
    row = {"op": op, "page_size": page_size, "num_tokens": tokens, "bytes": 1000.0}
    return row | {"median_us": us, "gb_per_s": 1000.0 / us, "method": "kernel time"}


def test_the_measured_verdict_on_writes():
    rows = [_measured("page", 16, 10.0), _measured("page", 64, 8.0), _measured("slice", 64, 12.0)]
    rows += [_measured("token", 16, 40.0)]
    baselines = {"copy": [_measured("copy", 16, 4.0)], "peers": [_measured("torch", 16, 80.0)]}
    verdict = kv_write.measured(rows, baselines, "a GPU")
    [row] = verdict.rows
    assert (row["use"], row["page size"]) == ("page_write", "64")
    assert (row["slices take"], row["tokens take"]) == ("1.50x", "5.00x")
    assert (row["copy takes"], row["peers takes"]) == ("0.50x", "10.00x")
    assert "measurements on a GPU" in verdict.notes[0]
    rows[2] = _measured("slice", 64, 4.0)
    [row] = kv_write.measured(rows, {}, "a GPU").rows
    assert row["use"] == "slice_write" and "copy takes" not in row


# ---- Attention


def _attention(name="decode", *, page_size=16, core=1000.0, hbm=2000.0, writes=False):
    shape = PRESETS["llama3-8b"]
    call = Call(**shape, page_size=page_size, writes=writes, **room_for([CASES[name]], page_size))
    case = Case(name, "v6e", CASES[name], call)
    config = TpuAttentionConfig(512, 128)
    return Prediction(case, config, core, hbm, 9, 1.0, 1.0, 0.0, 1.0, {}, 2**20, {})


def _attention_rows(writing=(), **changes):
    rows = {(name, size): _attention(name, page_size=size) for name in CASES for size in (16, 128)}
    for (name, size), fields in changes.pop("changes", {}).items():
        rows[name, size] = _attention(name, page_size=size, **fields)
    return attention.predicted({"llama3-8b": PRESETS["llama3-8b"]}, list(rows.values()), writing)


def test_the_smallest_of_equal_page_sizes_is_chosen():
    [row] = _attention_rows().rows
    assert (row["page"], row["gain"]) == ("16", "0.0%")
    assert row["decode"] == "1 HBM"


def test_planted_times_change_the_verdict_on_attention():
    changes = {("decode", 16): {"hbm": 200_000.0}, ("prefill", 128): {"core": 4000.0}}
    [row] = _attention_rows(changes=changes).rows
    assert row["page"] == "128"
    assert row["decode"] == "1 HBM" and row["prefill"].startswith("2 core ")
    assert float(row["gain"].rstrip("%")) > 30


def test_what_writing_adds_is_told():
    read = _attention()
    writing = [Writing(_attention(core=1000.0 + 64 * c, writes=True), read) for c in (40, 70)]
    notes = " ".join(_attention_rows(writing).notes)
    assert "adds 40 to 70 core cycles per new token of decodes" in notes
    assert "adds" not in " ".join(_attention_rows().notes)


def test_the_measured_verdict_on_attention():
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "pool_dtype": "bfloat16"}

    def row(page_size, us, **fields):
        row = {"case": "decode", "page_size": page_size, "median_us": us, "gb_per_s": 1e3 / us}
        return row | heads | {"tflop_per_s": 9.0, "method": "kernel time"} | fields

    peers = [row(16, 30.0, peer="slow"), row(16, 5.0, peer="fast"), {"refusal": "no", "peer": "x"}]
    verdict = attention.measured([row(16, 10.0), row(128, 12.5)], peers, "a GPU")
    [found] = verdict.rows
    assert (found["page"], found["gain"], found["us"]) == ("16", "20.0%", "10.0")
    assert (found["fastest other"], found["ours over it"]) == ("fast", "2.00x")
    [found] = attention.measured([row(16, 10.0), row(128, 8.0)], (), "a GPU").rows
    assert found["page"] == "128" and "fastest other" not in found


# ---- Engine


def _study(throughput_on, partials_on=10):
    def outcome(cell, partials, throughput):
        return Outcome(partials=partials, throughput=throughput, write_share=0.02)

    cells = [
        Cell("conv", page, 512, aligned, "pages") for page in (16, 64) for aligned in (False, True)
    ]
    capacity = {c: Outcome(throughput=1.0) for c in cells}
    capacity[cells[3]] = Outcome(throughput=throughput_on)
    by_cell = {c: outcome(c, partials_on if c.aligned else 100, 1.0) for c in cells}
    return [row["finding"] for row in engine.study_rows(by_cell, capacity, "pages")]


def test_planted_outcomes_change_the_verdict_on_alignment():
    change, partials, share = _study(1.25)
    assert "by +0.0% to +25.0% in 2 cases; most at page 64, budget 512" in change
    assert "100 parts of pages without alignment, 10 with" in partials and "pages 2.00%" in share
    change, partials, _ = _study(0.5, partials_on=7)
    assert "by -50.0% to +0.0%" in change and "7 with" in partials


def test_planted_shares_change_the_verdict_on_the_writes_share():
    def share(batch, tokens):
        us = {"pages": 0.0, "tokens": tokens, "shipped": 10.0}
        return Share("v6e", batch, 16, 90.0, us, us)

    tokens, shipped = (row["finding"] for row in engine.share_rows([share("a", 10.0)]))
    assert "10.0% to 10.0% shorter than with tokens (most: a)" in tokens
    assert "slices that engines ship" in shipped
    tokens, _ = (r["finding"] for r in engine.share_rows([share("a", 10.0), share("b", 30.0)]))
    assert "10.0% to 25.0% shorter than with tokens (most: b)" in tokens


def test_planted_steps_change_the_verdict_on_the_real_engine():
    def row(form, us):
        return {
            "batch": "decode",
            "kv_write": form,
            "page_size": 16,
            "step_us": us,
            "write_us": 100,
        }

    [found] = engine.real_rows([row("pages", 1000.0), row("tokens", 1250.0)])
    assert found["finding"] == (
        "1.000 ms with pages, page 16: 20.0% less than with tokens, page 16; writes take 10.00%"
    )
    [found] = engine.real_rows([row("pages", 2000.0), row("tokens", 1250.0)])
    assert found["finding"].startswith("1.250 ms with tokens")


# ---- Block sizes


def test_the_verdict_on_a_tpus_block_sizes():
    def trial(stages, core):
        config = TpuAttentionConfig(512, 128, stages)
        made = dataclasses.replace(_attention(core=core), config=config)
        return tune_attention.Trial(config, (made,))

    slow, fast = trial(3, 8000.0), trial(4, 4000.0)
    searches = [
        tune_attention.Search("v6e", "llama3-8b", size, (slow, fast), shipped.config)
        for size, shipped in ((16, slow), (128, fast))
    ]
    [row] = tune_attention.verdict_of(searches).rows
    assert row["pages of 16"] == "512:128:4:1 (-50.0%)"
    assert row["pages of 128"] == "512:128:4:1 (as shipped)"


def test_the_verdict_on_a_gpus_block_sizes():
    def trial(stages, us):
        return tune_attention_gpu.Trial(GpuAttentionConfig(128, stages, 64, 2), {"prefill": us})

    call = Call()
    searches = [
        tune_attention_gpu.Search(call, "prefill", (trial(2, 10.0), trial(3, 5.0)), None),
        tune_attention_gpu.Search(call, "decode, few", (), None),
    ]
    [row] = tune_attention_gpu.verdict_of(searches, "a GPU").rows
    assert row["prefill"] == "128:3:2:1 (-50.0%)" and row["decode, few"] == "not tried"
