# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The engine's benchmark: what it counts, what it costs, what it refuses."""

import dataclasses
import json
import types

import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from bench import clock, report
from bench import engine as cli
from bench.engine_study import cost as cost_lib
from bench.engine_study import real, tpu_step
from bench.engine_study import share as share_lib
from bench.engine_study import simulate as study
from bench.engine_study.cost import PAGE_SIZES, Cost, Work, visible_pairs
from reference_engine.traffic import Arrival, generate

COST = Cost(
    name="v6e",
    source="made up",
    host_us=100.0,
    weights_us=1000.0,
    row_us=2.0,
    seq_us=1.0,
    decode_us=3.0,
    decode_key_us=0.01,
    prefilled_us=0.1,
    pair_us=1e-4,
    written_us=0.02,
    page_us=dict.fromkeys(PAGE_SIZES, 0.1),
    slice_us=dict.fromkeys(PAGE_SIZES, 0.2),
    token_us=0.3,
    fused_us=(0.05, 0.001),
)
WORK = Work(
    rows=512,
    seqs=64,
    decodes=60,
    decode_keys=60_000,
    prefilled=400,
    pairs=80_000,
    pages=24,
    partials=2,
)
OPTIONS = {"pool_tokens": 20_000, "objectives": study.Objectives()}


def test_descriptors_by_form():
    assert WORK.tokens == 460
    assert [WORK.descriptors(form) for form in ("tokens", "slices", "pages", "fused")] == [
        460,
        86,
        86,
        0,
    ]


def test_a_step_is_the_sum_of_its_parts_and_each_the_largest_of_its_bounds():
    compute = 512 * 2 + 64 + 60 * 3 + 600 + 40 + 8
    assert COST.compute_us(WORK) == pytest.approx(compute)
    assert COST.compute_us(WORK._replace(rows=16)) == pytest.approx(compute - 1088 + 1000)
    written = {form: COST.write_us(WORK, form, 16) for form in ("tokens", "slices", "pages")}
    assert written == pytest.approx({"tokens": 138.0, "slices": 23.2, "pages": 20.8})
    assert COST.write_us(WORK, "fused", 16) == pytest.approx(4.6)  # its bytes, written once
    slow_dma = dataclasses.replace(COST, descriptor_us=1.0)
    assert slow_dma.write_us(WORK, "tokens", 16) == 460
    assert slow_dma.write_us(WORK, "pages", 16) == 86
    slow_hbm = dataclasses.replace(COST, written_us=1.0)
    assert slow_hbm.write_us(WORK, "pages", 16) == 460
    assert COST.step_us(WORK, "pages", 16) == pytest.approx(100 + compute + 20.8)


def test_visible_pairs_add_up():
    assert visible_pairs(0, 100) == sum(range(1, 101))
    assert visible_pairs(0, 40) + visible_pairs(40, 100) == visible_pairs(0, 100)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("page_size", [16, 128])
def test_a_replay_computes_every_token_once(page_size, aligned):
    arrivals = generate(60, seed=3)
    cell = study.Cell("t", page_size, 512, aligned, "pages")
    outcome = study.simulate(arrivals, cell, COST, **OPTIONS | {"pool_tokens": 10**6})
    assert outcome.preemptions == 0
    prompts = sum(a.num_prompt for a in arrivals)
    outputs = sum(a.num_output for a in arrivals)
    assert outcome.tokens == prompts + outputs - 60  # the last token of each is not computed
    assert outcome.decodes == outputs - 60
    # Every page of a prompt is written whole, or in pieces.
    whole = sum(a.num_prompt // page_size for a in arrivals)
    assert outcome.pages <= whole
    if aligned:
        assert outcome.pages >= 0.97 * whole
    assert outcome.descriptors == outcome.pages + outcome.partials + outcome.decodes
    assert (outcome.deferrals > 0) == aligned
    assert 0 < outcome.goodput <= outcome.throughput
    assert outcome.ttft_ms[0] <= outcome.ttft_ms[1] and outcome.itl_ms[0] <= outcome.itl_ms[1]


def test_latencies_are_those_of_the_steps():
    """One request alone: its prefill, then its decodes."""
    arrivals = [Arrival(5.0, 100, 3)]
    cell = study.Cell("t", 16, 512, True, "pages")
    outcome = study.simulate(arrivals, cell, COST, **OPTIONS)
    config = study.make_config(cell, 20_000, 104)
    assert config.num_pages == 20_000 // 16 + 1
    prefill = COST.step_us(Work(128, 1, 0, 0, 100, visible_pairs(0, 100), 6, 1), "pages", 16)
    decodes = [COST.step_us(Work(16, 1, 1, keys, 0, 0, 0, 0), "pages", 16) for keys in (101, 102)]
    assert outcome.steps == 3
    assert outcome.ttft_ms[0] == pytest.approx(prefill * 1e-3)
    assert outcome.tpot_ms[0] == pytest.approx(sum(decodes) / 2 * 1e-3)
    assert outcome.seconds == pytest.approx((prefill + sum(decodes)) * 1e-6)


def test_alignment_spares_partial_pages_and_never_decodes():
    arrivals = study.at_load(generate(120, seed=1), 0.9, "t", COST, **OPTIONS)
    cells = [study.Cell("t", 64, 512, aligned, "pages") for aligned in (False, True)]
    off, on = (study.simulate(arrivals, cell, COST, **OPTIONS) for cell in cells)
    assert on.partials < off.partials / 2
    assert off.deferrals == 0 < on.deferrals


def test_a_load_is_a_share_of_what_fits():
    arrivals = generate(50, seed=1)
    half = study.at_load(arrivals, 0.5, "t", COST, **OPTIONS)
    full = study.at_load(arrivals, 1.0, "t", COST, **OPTIONS)
    assert half[-1].seconds == pytest.approx(2 * full[-1].seconds)
    assert [a.num_prompt for a in half] == [a.num_prompt for a in arrivals]


def test_a_sweep_in_processes_is_the_same_as_one_by_one():
    traces = {"a": generate(20, seed=1), "b": generate(20, seed=2)}
    cells = [study.Cell(trace, 16, 512, on, "tokens") for trace in traces for on in (True, False)]
    done = []
    outcomes = study.sweep(traces, cells, COST, num_processes=2, on_done=done.append, **OPTIONS)
    assert set(done) == set(cells)
    for cell, outcome in zip(cells, outcomes, strict=True):
        assert outcome == study.simulate(traces[cell.trace], cell, COST, **OPTIONS)


def test_predicted_costs_are_made_of_the_predictions(monkeypatch):
    writes, attended = [], []

    def predict_writes(cases, on_done):
        writes.extend(cases)
        return [
            types.SimpleNamespace(
                case=c, num_dmas=100, schedule_cycles=175_000.0, hbm_cycles=3500.0
            )
            for c in cases
        ]

    def predict_attention(cases, on_done):
        attended.extend(cases)
        us = {
            "short": 64 * (2 + 1024 * 0.5),
            "long": 64 * (2 + 4096 * 0.5),
            "first": 2048 * 3 + visible_pairs(0, 2048) * 0.25,
            "second": 2048 * 3 + visible_pairs(2048, 4096) * 0.25,
        }
        writing = {"short": 64 * 70.0, "first": 2048 / 16 * 56.0}
        return [
            types.SimpleNamespace(
                case=c,
                microseconds=us[c.name],
                core_cycles=1000.0 + (writing[c.name] if c.call.writes else 0.0),
            )
            for c in cases
        ]

    monkeypatch.setattr(cost_lib.write_model, "predict", predict_writes)
    monkeypatch.setattr(cost_lib.attention_model, "predict", predict_attention)
    cost = cost_lib.predicted("v6e", host_us=5.0, is_bound_by_descriptors=True)
    assert {(c.op, c.page_size) for c in writes} == {
        ("token", 1),
        *((op, size) for op in ("slice", "page_starts") for size in PAGE_SIZES),
    }
    assert [c.name for c in attended] == [
        "short",
        "long",
        "first",
        "second",
        "short",
        "short",
        "first",
        "first",
    ]
    assert cost.fused_us == pytest.approx((32 * 70 / 1750, 32 * 56 / 16 / 1750))
    assert (cost.decode_us, cost.decode_key_us) == pytest.approx((64.0, 16.0))
    assert (cost.prefilled_us, cost.pair_us) == pytest.approx((96.0, 8.0))
    assert cost.page_us[64] == cost.token_us == pytest.approx(32 * 1.0)  # 1,750 cycles a DMA
    assert cost.descriptor_us == pytest.approx(32 * 0.018)
    # Llama 3 8B: 8.03e9 parameters, of which the embedding is not multiplied.
    matrices, last = cost_lib._matrix_sizes(cost_lib.LLAMA3_8B)
    assert matrices + 2 * last == pytest.approx(8.03e9, rel=1e-3)
    assert cost.weights_us == pytest.approx((matrices + last) * 2 / 1640e9 * 1e6)
    assert cost.row_us == pytest.approx(2 * matrices / (524288 * 1.75e9) * 1e6)


def test_shares_are_of_the_step_with_its_writes():
    batch = share_lib.Batch("b", 2, 100, ((10, 42), (0, 16)))
    work = share_lib.work_of(batch, 16)
    assert work == Work(50, 4, 2, 200, 48, visible_pairs(10, 42) + visible_pairs(0, 16), 2, 2)
    (share,) = share_lib.shares([COST], [batch], [16], descriptor_us=2.0)
    tokens, compute = 50 * 0.3, COST.compute_us(work)
    assert share.percent("tokens", is_bound=False) == pytest.approx(
        100 * tokens / (compute + tokens)
    )
    assert share.percent("tokens", is_bound=True) == pytest.approx(100 * 100 / (compute + 100))
    shipped = 32 * 50 * 68 / 1.75e3
    assert share.write_us["shipped"] == pytest.approx(shipped)
    pages = 2 * 0.1 + 2 * 0.2 + 2 * 0.3
    assert share.write_us["pages"] == pytest.approx(pages)
    assert share.gain_percent("pages", "shipped", is_bound=False) == pytest.approx(
        100 * (shipped - pages) / (compute + shipped)
    )


def test_a_measured_device_is_fitted(tmp_path):
    """Rows made from known costs come back as these costs."""
    truth = dataclasses.replace(
        COST,
        decode_us=0.0,
        prefilled_us=0.0,
        seq_us=0.0,
        host_us=0.0,
        written_us=0.0,
        weights_us=0.0,
        fused_us=(0.0, 0.0),
    )
    rows = []
    for batch in real.ALL_BATCHES:
        work = share_lib.work_of(batch, 16)
        for form in ("tokens", "slices", "pages"):
            write = truth.write_us(work, form, 16)
            rows.append(
                {
                    "batch": batch.name,
                    "kv_write": form,
                    "page_size": 16,
                    "write_us": write,
                    "step_us": 700 * (work.decodes == work.rows) + truth.compute_us(work) + write,
                }
            )
    fit = real.fit(rows, 250.0, "some device")
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"real": {"fit": fit}}))
    got = cost_lib.fitted(str(file))
    assert got.decode_key_us == pytest.approx(COST.decode_key_us)
    assert got.pair_us == pytest.approx(COST.pair_us)
    assert got.row_us == pytest.approx(COST.row_us, rel=1e-3)
    assert got.token_us == pytest.approx(COST.token_us)
    assert got.page_us[16] == pytest.approx(COST.page_us[16] * 128 * 16 / 2048)
    assert got.host_us == 250.0 and cost_lib.fitted(str(file), host_us=3.0).host_us == 3.0
    assert real.fit(rows[:-1], 250.0, "some device") is None
    file.write_text("{}")
    with pytest.raises(ValueError, match="no measurement that costs can be taken from"):
        cost_lib.fitted(str(file))


def test_the_real_part_times_the_engines_own_step():
    setup = real.Setup(real.TINY, shrink=32, steps=1, repeats=2)
    rows = list(real.measure(setup, real.ALL_BATCHES[1:3], ["pages", "fused"], [16]))
    assert [(row["kv_write"], row["tokens"]) for row in rows] == [
        ("pages", 2),
        ("fused", 2),
        ("pages", 64),
        ("fused", 64),
    ]
    assert all(row["step_us"] > 0 for row in rows)
    assert [row["write_us"] is None for row in rows] == [False, True, False, True]
    host = real.host_work(setup, num_steps=3)
    assert 0 < host["host_us"] < host["step_us"] and host["recompiles"] == 0
    assert 0 <= host["late_percent"] <= 100
    assert host["gap_us"] == pytest.approx(host["host_us"] * host["late_percent"] / 100)


def test_the_writes_part_is_that_of_the_kernels_that_write(monkeypatch):
    steps, kernels = [], ["token_write_k1", "gemm", "page_write", "slice_write", "attention"]

    def record_kernels(run):
        run()
        return [clock.Event(name, 2.0**i) for _ in steps for i, name in enumerate(kernels)]

    def step(kv_pages):
        steps.append(kv_pages)
        return kv_pages

    monkeypatch.setattr(clock, "record_kernels", record_kernels)
    setup, pool = real.Setup(real.TINY, repeats=2), np.zeros(1)
    assert real._time_kernels(step, pool, setup) == (1.0 + 4.0 + 8.0, 31.0, pool)
    assert len(steps) == 2
    steps, kernels = [], ["gemm", "attention"]
    assert real._time_kernels(step, pool, setup) == (None, 3.0, pool)


def main(*argv, **values):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        cli.main(["engine", *argv])


def test_the_study_prints_and_draws(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli.engine_cost, "predicted", lambda *args, **kwargs: COST)
    values = {
        "requests": 25,
        "page_sizes": ["16", "64"],
        "budgets": ["128", "512"],
        "pool_tokens": 20_000,
        "processes": 1,
    }
    main(parts=["study", "share"], all=True, plot=str(tmp_path / "study.png"), **values)
    out = capsys.readouterr().out
    assert "Costs made up" in out and "generated: 25 requests" in out
    assert "PREDICTED share of the KV write" in out
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    main(parts=["study"], json=True, all=True, **values)
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert len(record["study"]["cells"]) == 2 * 2 * 4 * 2 and "whole pages" in err
    assert {"commit", "jax"} <= record["environment"].keys()
    assert err.startswith("VERDICT: ") and record["verdict"]["rows"][0]["of"] == "generated"
    main(parts=["study", "share"], **values | {"budgets": ["512"], "kv_writes": ["pages"]})
    out = capsys.readouterr().out
    assert out.startswith("VERDICT: ") and len(out.splitlines()) <= report.MAX_VERDICT_LINES


@pytest.mark.parametrize(
    "values, message",
    [
        ({"parts": ["studies"]}, "--parts has 'studies'; wanted some of study, share, launches"),
        ({"kv_writes": ["rows"]}, "--kv_writes has 'rows'"),
        ({"generations": ["v9"]}, "--generations has 'v9'"),
        ({"page_sizes": ["48"]}, "--page_sizes has '48'; wanted some of 16, 32, 64, 128, 256"),
        ({"budgets": ["0"]}, "--budgets has '0'; wanted integers >= 1"),
        ({"load": 0.0}, "--load is 0.0"),
        ({"parts": ["share"], "plot": "x.png"}, "--plot draws the study; wanted study among"),
        ({"parts": ["real"], "batches": ["idle"]}, "--batches has 'idle'; wanted some of prefill"),
        ({"device": "no-such-file"}, "--device is 'no-such-file'; wanted one of v4, v5e"),
        ({"traces": ["/no/such/file"]}, "cannot read /no/such/file: No such file"),
    ],
)
def test_mistakes_are_refused(values, message):
    with pytest.raises(app.UsageError, match=message):
        main(**{"parts": ["study"], "requests": 5} | values)
    with pytest.raises(app.UsageError, match="unexpected argument 'more'"):
        main("more")


def test_what_a_layer_launches_on_a_tpu_is_counted(monkeypatch, capsys):
    """The counting on a text; the command on what a child process would return."""
    text = """HloModule step

%fused (p: f32[4]) -> f32[4] {
  ROOT %add.1 = f32[4]{0} add(%p, %p)
}

ENTRY %main (a: f32[4]) -> (f32[4], f32[8]) {
  %a = f32[4]{0:T(128)} parameter(0)
  %fusion.1 = f32[4]{0:T(128)} fusion(%a), kind=kLoop, calls=%fused
  %fusion.2 = (f32[4]{0}, f32[8]{0:T(8)(2,1)}) fusion(%fusion.1), kind=kLoop, calls=%fused
  %kernel = bf16[2,2]{1,0} custom-call(%fusion.1), custom_call_target="tpu_custom_call"
  %name = f32[8]{0} custom-call(%a, %a), custom_call_target="ConcatBitcast"
  ROOT %copy.3 = f32[4]{0} copy(%fusion.1)
}
"""
    counts = tpu_step._count(text)
    assert (counts["fusion"], counts["custom-call"], counts["copy"], counts["add"]) == (2, 1, 1, 0)

    found = dict.fromkeys(("fusion", "custom-call", "convolution"), 3)
    found |= dict.fromkeys(("copy", "transpose", "pool_copies"), 0) | {"temp_bytes": 2_000_000}
    monkeypatch.setattr(tpu_step, "launches", lambda generation, shape: found)
    main(parts=["launches"], generations=["v6e"], all=True)
    out = capsys.readouterr().out
    assert "6 fusions and 3 kernels a layer, no copies" in out
