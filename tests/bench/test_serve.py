# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The part of the engine's benchmark that serves: its clocks, its traces, its recordings."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from bench import clock, report
from bench import engine as cli
from bench.engine_study import decode, serve, startup, tables, traces
from bench.engine_study.cost import LLAMA3_8B
from bench.engine_study.latency import Objectives, latencies
from bench.engine_study.real import TINY
from bench.verdicts import engine as verdicts
from reference_engine.hf_config import read_model_config
from reference_engine.outputs import Output
from reference_engine.stats import Stats
from reference_engine.traffic import Arrival
from reference_engine.weights import load_params, param_shapes

# Few shapes, which compile soon.
SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 18, "max_model_len": 128, "num_pages": 64}
CONFIG = [f"{name}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def engine():
    return serve.make_engine(TINY, SMALL, warm_up=True)


# ---- Latencies


def test_latencies_by_their_definitions():
    """TTFT 1, 2 and 4 s; TPOT 0.5 s and 2 s; one request of a single token has none."""
    times = [[1.0, 1.5, 2.0], [3.0, 4.0, 7.0], [6.0]]
    found = latencies([0.0, 1.0, 2.0], times, 10.0, Objectives(ttft_ms=4000, tpot_ms=500))
    assert found["ttft_mean_ms"] == pytest.approx(7000 / 3)
    assert found["ttft_ms"] == pytest.approx((2000, 4000 - 0.02 * 2000))
    assert found["tpot_ms"] == pytest.approx((1250, 500 + 0.99 * 1500))
    assert found["itl_ms"] == pytest.approx((750, 1000 + 0.97 * 2000))  # 0.5, 0.5, 1 and 3 s
    assert (found["goodput"], found["throughput"]) == pytest.approx((0.2, 0.3))
    met = latencies([0.0], times[:1], 10.0, Objectives(ttft_ms=999, tpot_ms=500))
    assert met["goodput"] == 0 and met["throughput"] == pytest.approx(0.1)
    single = latencies([2.0], times[2:], 10.0, Objectives(ttft_ms=4000, tpot_ms=0))
    assert single["goodput"] == pytest.approx(0.1)
    assert single["tpot_ms"] == single["itl_ms"] == (0.0, 0.0)


class _Engine:
    """Gives each live request a token in every step of two seconds, read one step late."""

    def __init__(self, clock):
        self.clock, self.stats, self.requests, self.late = clock, Stats(), {}, []
        self.model_config = types.SimpleNamespace(vocab_size=50)
        self.added = []

    @property
    def has_work(self):
        return any(self.requests.values())

    def add_request(self, prompt, params):
        assert params.ignore_eos and all(0 <= token < 50 for token in prompt)
        self.added.append((self.clock.now, len(prompt), params.max_tokens, params.temperature))
        self.requests[len(self.added) + 6] = params.max_tokens
        return len(self.added) + 6

    def step(self):
        self.clock.now += 2.0
        self.stats.num_steps += 1
        self.stats.num_tokens += 3
        self.stats.num_padding += 1
        self.stats.seconds += 2.0
        self.stats.wait_seconds += 1.5
        late = [i for i in self.late if self.requests[i]]
        for request_id in late:
            self.requests[request_id] -= 1
        self.late = [i for i, left in self.requests.items() if left]
        return [Output(i, 1, None) for i in late]


@pytest.fixture
def fake_clock(monkeypatch):
    fake = types.SimpleNamespace(now=100.0)
    fake.perf_counter = lambda: fake.now
    fake.sleep = lambda seconds: setattr(fake, "now", fake.now + seconds)
    monkeypatch.setattr(serve, "time", fake)
    return fake


def test_a_request_waits_from_its_arrival_on(fake_clock):
    """The second arrives during a step; the third after a pause, in which nobody steps."""
    engine = _Engine(fake_clock)
    engine.stats.num_steps = 7  # of runs before
    arrivals = [Arrival(0.0, 5, 2), Arrival(3.0, 4, 1), Arrival(50.0, 3, 1)]
    traffic = traces.Traffic("t", arrivals)
    row = serve.serve(engine, traffic, temperature=0.6, objectives=Objectives(), seed=0)
    assert [at for at, *_ in engine.added] == [100.0, 104.0, 150.0]
    assert [rest for _, *rest in engine.added] == [[5, 2, 0.6], [4, 1, 0.6], [3, 1, 0.6]]
    # Tokens come at 4 and 6, at 8, and at 54 seconds.
    assert row["ttft_mean_ms"] == pytest.approx((4000 + 5000 + 4000) / 3)
    assert row["tpot_ms"] == row["itl_ms"] == (2000.0, 2000.0)
    assert row["duration_s"] == 54.0 and row["num_output_tokens"] == 4
    assert row["output_tokens_per_s"] == pytest.approx(4 / 54)
    assert row["num_steps"] == 6 and row["padding_percent"] == pytest.approx(25)
    assert row["host_s"] == pytest.approx(3.0)


def test_the_engine_serves_every_token(engine):
    arrivals = [Arrival(0.0, 20, 3), Arrival(0.0, 7, 1), Arrival(0.02, 40, 2)]
    traffic = traces.Traffic("t", arrivals)
    rows = [
        serve.serve(engine, traffic, temperature=t, objectives=Objectives(), seed=seed)
        for seed, t in enumerate((0.6, 0.0))
    ]
    for row in rows:
        assert row["num_output_tokens"] == 6
        assert row["num_tokens"] == 20 + 7 + 40 + 6 - 3 and row["num_cached"] == 0
        assert row["num_recompiles"] == row["num_preemptions"] == 0
        assert 0 < row["host_s"] < row["seconds"] <= row["duration_s"] + 0.02
    again = serve.serve(engine, traffic, temperature=0.0, objectives=Objectives(), seed=1)
    assert again["num_cached"] > 0  # so that a seed is to be used once
    assert not engine.has_work


def test_the_workloads_are_those_of_the_table():
    full = serve.workloads()
    lengths = np.array([(a.num_prompt, a.num_output) for a in full["A"].arrivals])
    assert lengths.shape == (256, 2) and lengths.min() >= 100 and lengths.max() <= 1024
    assert lengths.mean(axis=0) == pytest.approx([562, 562], rel=0.1)
    assert {tuple(a) for a in lengths} != {tuple(a[::-1]) for a in lengths}
    assert full["B"].arrivals == [Arrival(0.0, 1024, 256)] * 64
    assert full["C"].arrivals == [Arrival(0.0, 4096, 16)] * 64
    assert {len(t.arrivals) for t in serve.workloads(16).values()} == {16, 4}


# ---- Traces


def _mooncake(tmp_path, *requests, **changes):
    file = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": at, "input_length": n, "output_length": m, "hash_ids": ids} | changes
        for at, n, m, ids in requests
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(file)


def test_a_mooncake_trace_shares_the_tokens_of_its_blocks(tmp_path):
    path = _mooncake(
        tmp_path,
        (2000, 1000, 3, [4, 5]),
        (2000, 600, 1, [4, 6]),
        (3500, 1024, 9, [5, 4]),
        (9000, 1, 1, [0]),
    )
    traffic = traces.read(path, 3, "t")
    assert traffic.arrivals == [
        Arrival(0.0, 1000, 3),
        Arrival(0.0, 600, 1),
        Arrival(1.5, 1024, 9),
    ]
    first, second, third = traces.prompts(traffic, 90, seed=1)
    assert list(map(len, (first, second, third))) == [1000, 600, 1024]
    assert first[:512] == second[:512] == third[512:] and first[512:] == third[:488]
    assert first[512:600] != second[512:]
    assert traces.prompts(traffic, 90, seed=2)[0] != first
    assert traces.no_longer_than(traffic, 1003).arrivals == traffic.arrivals[:2]
    kept = traces.no_longer_than(traffic, 1002)
    assert kept.arrivals == traffic.arrivals[1:2] and kept.blocks == [(4, 6)]


def test_an_azure_trace_is_read_by_its_columns(tmp_path):
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.0,40,4\n2023-11-16 18:17:05.5,50,5\n"
    )
    traffic = traces.read(str(file), 9, "t")
    assert traffic == traces.Traffic("t", [Arrival(0.0, 40, 4), Arrival(2.5, 50, 5)])
    assert list(map(len, traces.prompts(traffic, 9, seed=0))) == [40, 50]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_length": 0}, "line 1: input_length 0; wanted a whole number from 1"),
        ({"output_length": 1.5}, "line 1: output_length 1.5"),
        ({"timestamp": -1}, "line 1: timestamp -1; wanted milliseconds that do not go back"),
        ({"timestamp": None}, "line 1: timestamp None"),
        ({"hash_ids": [1]}, "line 1: 1 hash_ids; wanted 2, one per 512 tokens"),
        ({"hash_ids": ["a", "b"]}, r"line 1: hash_ids \['a', 'b'\]"),
    ],
)
def test_a_wrong_mooncake_trace_is_refused(tmp_path, changes, message):
    path = _mooncake(tmp_path, (0, 600, 1, [1, 2]), **changes)
    with pytest.raises(ValueError, match=message):
        traces.read(path, 5)


def test_a_trace_that_goes_back_or_is_cut_short_is_refused(tmp_path):
    path = _mooncake(tmp_path, (5, 6, 1, [1]), (4, 6, 1, [1]))
    with pytest.raises(ValueError, match="line 2: timestamp 4"):
        traces.read(path, 5)
    file = tmp_path / "cut.jsonl"
    file.write_text('{"timestamp": 0, "input')
    with pytest.raises(ValueError, match="line 1: '{.*wanted a JSON object"):
        traces.read(str(file), 5)


def test_rates_are_means_of_the_gaps():
    own = traces.Traffic("t", [Arrival(float(at), 3, 3) for at in (0, 1, 1, 8)])

    def times(rate, is_poisson=False, seed=0):
        moved = traces.at_rate(own, rate, is_poisson=is_poisson, seed=seed)
        assert [(a.num_prompt, a.num_output) for a in moved.arrivals] == [(3, 3)] * 4
        return [a.seconds for a in moved.arrivals]

    assert times(None) == [0, 1, 1, 8]
    assert times(3.0) == pytest.approx([0, 1 / 8, 1 / 8, 1])
    assert times(np.inf) == times(np.inf, is_poisson=True) == [0, 0, 0, 0]
    many = traces.Traffic("t", [Arrival(float(at), 1, 1) for at in range(4001)])
    drawn = traces.at_rate(many, 5.0, is_poisson=True, seed=1).arrivals
    gaps = np.diff([a.seconds for a in drawn])
    assert gaps.mean() == pytest.approx(0.2, rel=0.05) and gaps.std() == pytest.approx(0.2, rel=0.1)
    kept = traces.at_rate(many, None, is_poisson=True, seed=1).arrivals  # a request a second
    assert kept[-1].seconds == pytest.approx(4000, rel=0.05)
    at_once = traces.Traffic("t", [Arrival(0.0, 1, 1)] * 2)
    with pytest.raises(ValueError, match="t: all requests arrive at once"):
        traces.at_rate(at_once, 2.0, is_poisson=False, seed=0)


# ---- Steps of decodes


def _event(name, start, microseconds):
    return clock.Event(name, microseconds, "jit_step", start)


def _steps(number, period=100.0):
    """Steps of two equal kernels, one that runs once, and a copy beside it on another stream."""
    events = []
    for at in np.arange(number) * period:
        events += [_event("pick", at, 10.0), _event("mm", at + 10, 30.0)]
        events += [_event("mm", at + 45, 30.0), _event("copy", at + 70, 10.0)]
        events += [_event("copy", at + 71, 2.0)]
    return events


def test_idle_is_what_no_stream_fills():
    assert decode.busy_us(_steps(1)) == 10 + 30 + 30 + 5
    assert decode.busy_us([]) == 0
    found = decode.summarise_steps(_steps(20), 20)
    assert found == decode.Recording(14, 100.0, 75.0, 82.0, 5.0)
    # A recording that begins and ends inside a step, with slow steps first.
    cut = _steps(2, period=900.0)[3:] + [
        dataclasses.replace(event, start_us=event.start_us + 2000.0) for event in _steps(18)
    ]
    assert decode.summarise_steps(cut[:-2], 20) == decode.Recording(13, 100.0, 75.0, 82.0, 5.0)
    with pytest.raises(RuntimeError, match="no kernel was launched once in each of 10 steps"):
        decode.summarise_steps(_steps(20), 10)
    with pytest.raises(RuntimeError, match="6 steps; want more than 7"):
        decode.summarise_steps(_steps(6), 6)


def test_a_recording_is_told_beside_the_wall_clock(engine, monkeypatch):
    recording = decode.Recording(14, 110.0, 75.0, 82.0, 56.0)
    row = decode._of_recording(recording, 80.0)
    assert row["idle_percent"] == pytest.approx(100 * 5 / 80)
    assert row["recorded_idle_percent"] == pytest.approx(100 * 35 / 110)
    row = decode.time_decodes(engine, 2, 20, sampling="T = 0.6", num_steps=4)
    assert not engine.has_work
    assert row["idle_percent"] is row["launches"] is None  # no GPU
    assert row["num_recompiles"] == row["num_preemptions"] == 0
    assert 0 < row["host_us"] <= row["step_us"] and row["batch"] == "2 decodes at 20"
    recorded = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(decode, "_record", lambda engine, n: recorded.append(n) or recording)
    row = {"model": "m", **decode.time_decodes(engine, 2, 20, sampling="greedy", num_steps=4)}
    assert recorded == [50] and row["launches"] == 56.0
    sampled = row | {"sampling": "T = 0.6", "step_us": row["step_us"] + 150.0}
    greedy, sampling = (v["finding"] for v in verdicts.step_rows([row, sampled]))
    assert "56 launches, 28.0 a layer" in greedy and "to greedy" not in greedy
    assert "+0.150 to greedy" in sampling
    assert " 28.0" in tables.decode_tables([row])[1]


def test_decodes_that_do_not_fit_are_not_timed(engine):
    assert decode.has_room(engine, 2, 20, 10)
    assert not decode.has_room(engine, 3, 20, 10)  # max_num_seqs
    assert not decode.has_room(engine, 2, 100, 20)  # max_model_len
    with pytest.raises(RuntimeError, match="[12] of 3 requests run; want all"):
        decode.start_decodes(engine, 3, 120, decode.SAMPLING["greedy"], 0)
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.abort(request.request_id)


# ---- The start


@pytest.mark.parametrize(
    "model",
    [
        dataclasses.replace(TINY, qk_norm=True, tie_embeddings=True, dtype="bfloat16"),
        dataclasses.replace(TINY, rope_theta=5e5),
    ],
    ids=["qwen3", "llama"],
)
def test_a_random_folder_is_a_models(tmp_path, model):
    startup.write_folder(tmp_path, model)
    read = read_model_config(tmp_path)
    assert dataclasses.replace(read, max_position=None) == model
    params = load_params(tmp_path, model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), param_shapes(model)
    )
    first, last = params["layers"][0], params["layers"][-1]
    assert np.all(np.asarray(first["mlp_norm"]) == 1)
    down = np.asarray(first["down"], np.float32)
    assert down.std() == pytest.approx(len(down) ** -0.5, rel=0.1)
    assert not np.array_equal(down, np.asarray(last["down"], np.float32))
    engine = serve.make_engine(tmp_path, SMALL, warm_up=False)
    assert engine.model_config == read
    assert {name: getattr(engine.config, name) for name in SMALL} == SMALL
    assert not engine.config.compile_in_background


def test_a_start_with_a_full_cache_compiles_nothing(tmp_path):
    startup.write_folder(tmp_path, TINY)
    fields = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 32}
    empty, full = startup.measure(tmp_path, fields)
    assert (empty["cache"], full["cache"]) == ("empty", "full")
    for row in (empty, full):
        assert 0 < row["ready_s"] < row["first_token_s"] < row["all_compiled_s"]
    assert full["all_compiled_s"] < 0.7 * empty["all_compiled_s"]
    rows = verdicts.startup_rows([empty, full])
    assert rows[1]["of"] == "LLM(folder), full cache"


# ---- The command


def main(*argv, **values):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        cli.main(["engine", *argv])


def test_the_command_serves_and_prints(capsys, monkeypatch, tmp_path, engine):
    made = []

    def make_engine(model, fields, *, warm_up):
        made.append((model, fields, warm_up))
        if model is serve.QWEN3_0_6B:
            raise ValueError("no room")
        return engine  # compiled already

    monkeypatch.setattr(serve, "make_engine", make_engine)
    trace = _mooncake(tmp_path, (0, 30, 2, [1]), (50, 30, 2, [1]), (60, 900, 2, [1, 2]))
    values = {
        "parts": ["serve"],
        "workloads": ["B"],
        "traces": [trace],
        "rates": ["40"],
        "poisson": True,
        "engine_config": CONFIG,
        "temperatures": ["0.6", "0"],
        "decodes": ["32"],
        "decode_models": ["qwen3-0.6b", "tiny"],
    }
    main(all=True, json=True, **values)
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert made == [
        (TINY, SMALL, True),
        (serve.QWEN3_0_6B, SMALL, False),
        (TINY, SMALL, False),
    ]
    assert "qwen3-0.6b: its decodes are not timed: no room" in err
    served = record["serve"]["served"]
    assert [(row["traffic"], row["temperature"]) for row in served] == [
        (name, t) for name in ("B", "mooncake at 40/s, Poisson") for t in (0.6, 0.0)
    ]
    assert [row["num_left_out"] for row in served] == [0, 0, 1, 1]
    assert [row["batch"] for row in record["serve"]["steps"]] == ["2 decodes at 64"] * 6
    assert "VERDICT: how fast the engine serves" in err and "measured on cpu: tiny" in err
    assert "host's ms a step" in err and "TTFT mean" in err and "EngineConfig(page_size=16" in err
    assert len(err[err.index("VERDICT") : err.index("--json.")].splitlines()) <= (
        report.MAX_VERDICT_LINES
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ({"workloads": ["D"]}, "--workloads has 'D'; wanted some of A, B, C, generated"),
        ({"temperatures": ["hot"]}, "--temperatures is 'hot'; wanted numbers >= 0"),
        ({"temperatures": ["-1"]}, "--temperatures is '-1'; wanted numbers >= 0"),
        ({"rates": ["0"], "workloads": ["generated"]}, "--rates is '0'"),
        ({"decodes": ["no"]}, "--decodes has 'no'"),
        ({"decode_models": ["gpt"]}, "--decode_models has 'gpt'; wanted some of qwen3-0.6b"),
        ({"model": "/no/folder"}, "--model is '/no/folder'; wanted one of qwen3-0.6b, llama3-8b"),
        ({"engine_config": ["pages=3"]}, "--engine_config has 'pages=3'; wanted FIELD=VALUE"),
        ({"engine_config": ["page_size=0"]}, "page_size.*wanted an int >= 1"),
        ({"engine_config": ["kv_write=rows"]}, "argument `kv_write`: got 'rows'|`kv_write`"),
    ],
)
def test_mistakes_are_refused(values, message):
    with pytest.raises(app.UsageError, match=message):
        main(**{"parts": ["serve"], "requests": 5} | values)


def test_the_shape_that_is_served_by_default():
    model = serve.QWEN3_0_6B
    sizes = [np.prod(x.shape) for x in jax.tree.leaves(param_shapes(model))]
    values = 28 * 8 * 128  # rows of the norms of the values' heads, which no checkpoint has
    norms = 28 * 23 * 128  # of which a checkpoint has one row for all heads
    assert sum(sizes) - values - norms + 28 * 128 == pytest.approx(596_049_920, rel=1e-3)
    assert LLAMA3_8B.tie_embeddings is False and model.tie_embeddings
