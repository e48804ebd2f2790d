# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""bench.attention: its trips on paper, its reading of the schedule, its gate, flags and output."""

import collections
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from absl import app, flags
from absl.testing import flagsaver
from jax.experimental.pallas import tpu as pltpu

from bench import attention, clock, tune_attention
from bench.cases import attention as attention_cases
from bench.cases.attention import CASES, CPU_CASES, PRESETS, SCALES, Call, Case, room_for
from bench.measure import attention as measure
from bench.peers import child as peers
from bench.tpu_model import attention as model
from bench.tpu_model import attention_roles as roles
from bench.tpu_model import attention_trips
from bench.tpu_model import schedule as ts
from bench.tpu_model.attention_trips import DECODE, END, FILL, FULL, MULTIPLE, PREFILL, SINGLE
from bench.tpu_model.compile import COMPILE_ENV, DEVICES, TOPOLOGIES, as_if_on, mesh_of
from pallas_paged import dispatch, tuned
from pallas_paged.attention import oracle
from pallas_paged.attention.tpu import (
    decode_iteration,
    kv_fetch,
    new_kv,
    prefill,
    prefill_iteration,
    q_tiles,
)
from pallas_paged.attention.tpu import launch as mosaic_tpu
from pallas_paged.attention.tpu import spec as kernel_spec
from tests.kv_write.cases import FAST_COMPILE


def _spec(*sizes, **fields):
    """The kernel's own static parameters, with pages of 16 and block sizes of a config's order."""
    config = mosaic_tpu.TpuAttentionConfig(*sizes)
    call = Call(num_heads=2, num_kv_heads=1, page_size=16, config=config, **fields)
    return model.spec_of(call, "v6e")


_ONE = _spec(128, 128, 3, 1)
_TWO = _spec(128, 128, 4, 2)


@pytest.fixture
def two_decodes(monkeypatch):
    """Iterations over full blocks take two decodes, however short they are."""
    monkeypatch.setattr(kernel_spec, "LONG_ITERATION_KEYS", 256)
    attention_trips.trips.cache_clear()
    yield
    attention_trips.trips.cache_clear()


@contextlib.contextmanager
def _flags(**values):
    """The command's flags, as if given, whatever other commands have defined by their names."""
    for holder in list(vars(attention).values()):
        if isinstance(holder, flags.FlagHolder) and holder.name in flags.FLAGS:
            delattr(flags.FLAGS, holder.name)
    importlib.reload(attention)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed(**{"generations": "v6e", "page_sizes": "16"} | values):
        yield


def _counts(spec, *lens, **options):
    """What `trips` counts, zeros left out."""
    return {key: n for key, n in attention_trips.trips(lens, spec, **options).items() if n}


# --- the trips on paper ------------------------------------------------------------------------


def test_one_decode():
    """100 keys are 7 pages and one block; the second of the two fetches ahead finds nothing."""
    assert _counts(_ONE, (1, 100)) == {
        (FILL, "iteration"): 2,
        (FILL, "slow"): 2,
        (FILL, "find0"): 1,
        (FILL, "fetch0"): 1,
        (FILL, "chunks0"): 7,
        (DECODE, "first"): 1,
        (DECODE, "open"): 1,
        (DECODE, "tiles"): 1,
        (SINGLE, "iteration"): 1,
        (SINGLE, "slow"): 1,
        (END, "close"): 1,
        (END, "gather"): 1,
        (END, "gather_trips"): 1,
    }


def test_a_long_decode_takes_two_full_blocks_and_then_any_two():
    """5 full blocks and 10 keys: two iterations over full blocks, then one of what is left."""
    counts = _counts(_TWO, (1, 650))
    assert counts[FULL, "iteration"] == 2 and counts[MULTIPLE, "iteration"] == 1
    assert (SINGLE, "iteration") not in counts
    assert counts[FILL, "iteration"] == 2  # 4 buffers, and an iteration takes 2
    # They fetch blocks 2 and 3 (full, within the work item), then 4 and the one page of the 5th.
    assert counts[FULL, "slow"] == 1
    assert (counts[FULL, "chunks0"], counts[FULL, "chunks1"]) == (16, 9)
    assert (MULTIPLE, "chunks0") not in counts


def test_an_iteration_takes_short_decodes_together():
    """Three decodes of a block each: two in one iteration, the third alone: nothing follows it."""
    counts = _counts(_TWO, (1, 100), (1, 100), (1, 100))
    assert counts[MULTIPLE, "iteration"] == counts[SINGLE, "iteration"] == 1
    # The stages start with two. The iteration finds the third before it knows that it has no two
    # blocks.
    assert counts[FILL, "find0"] == 2 and counts[MULTIPLE, "find"] == 1
    assert counts[MULTIPLE, "fetch0"] == counts[MULTIPLE, "slow"] == 1
    assert (MULTIPLE, "fetch1") not in counts
    assert counts[DECODE, "first"] == 2  # the second's first block comes in the first's iteration


def test_they_are_decodes_of_one_q_tile():
    """A decode, a prefill, a decode: the prefill and what follows it join no iteration."""
    counts = _counts(_TWO, (1, 100), (8, 100), (1, 100))
    assert counts[SINGLE, "iteration"] == 2 and counts[PREFILL, "iteration"] == 1
    assert (MULTIPLE, "iteration") not in counts and (FULL, "iteration") not in counts
    counts = _counts(_TWO, *[(1, 100)] * 129)  # one more than a q tile's rows
    assert counts[MULTIPLE, "iteration"] == 64 and counts[SINGLE, "iteration"] == 1
    assert counts[DECODE, "open"] == 2


def test_a_full_iteration_may_be_of_two_decodes(two_decodes):
    """With two parts of one block each, full blocks of any two neighbours go together."""
    counts = _counts(_TWO, (1, 128), (1, 128), (1, 128), (1, 100))
    assert counts[FULL, "iteration"] == counts[MULTIPLE, "iteration"] == 1
    assert counts[FULL, "find0"] == counts[FULL, "find1"] == 1


def test_a_short_iteration_over_full_blocks_is_of_one_decode():
    assert _counts(_TWO, (1, 128), (1, 128))[MULTIPLE, "iteration"] == 1


def test_each_part_of_an_iteration_is_fetched_at_once(two_decodes):
    """Two decodes of two full blocks each: half of an iteration's fetches is within each."""
    counts = _counts(_spec(128, 128, 8, 4), *[(1, 256)] * 6)
    assert counts[FULL, "iteration"] == 3
    assert counts[FULL, "find"] + counts[FULL, "find_1"] == 4  # and the ring began with two
    assert (FULL, "find0") not in counts and (FULL, "find2") not in counts
    assert counts[FULL, "slow"] == counts[FULL, "slow_1"] == 1  # of the last, behind the last unit


def test_the_fetches_of_an_iteration_cross_sequences():
    """Three decodes of a block each: the stages start with two, the third is found later."""
    counts = _counts(_ONE, (1, 128), (1, 128), (1, 128))
    assert counts[FILL, "find0"] == 2 and counts[SINGLE, "find0"] == 1
    assert counts[SINGLE, "iteration"] == 3 and counts[DECODE, "open"] == 1


def test_a_prefill_masks_the_block_of_its_diagonal():
    """40 rows at 260..299: keys 0..255 are earlier than all of them, the rest is not."""
    counts = _counts(_ONE, (40, 300))
    assert counts[PREFILL, "iteration"] == 3
    assert (counts[PREFILL, "unmasked"], counts[PREFILL, "masked"]) == (2, 1)
    assert counts[PREFILL, "last"] == counts[PREFILL, "open"] == 1


def test_a_window_leaves_out_blocks_and_masks_the_first():
    """20 rows at 500..519 look back 100 keys: from 401 on, page 25, so two blocks, both masked."""
    counts = _counts(_ONE, (20, 520), sliding_window=100)
    assert counts[PREFILL, "iteration"] == counts[PREFILL, "masked"] == 1
    items, _ = attention_trips.find_work_items(((20, 520),), _ONE, 100)
    assert (items[0].first_chunk, items[0].end_chunk) == (25, 33)


def test_prefill_units_start_at_row_tiles():
    """A decode, then 200 rows from row 1 on: the items end at rows 128 and 201."""
    items, _ = attention_trips.find_work_items(((1, 64), (200, 200)), _ONE, None)
    assert [(u.row, u.end) for u in items] == [(0, 1), (1, 128), (128, 201)]
    counts = _counts(_ONE, (1, 64), (200, 200))
    # The prefill's first window begins in the tile that the decode's left: its rows are kept.
    assert counts[PREFILL, "keep"] == 1 and counts[PREFILL, "gather"] == 1
    assert counts[PREFILL, "close"] == 2  # the decode's and the first prefill's


def test_empty_sequences_are_skipped_and_their_rows_zeroed():
    """20 rows without keys fill a tile and part of another; the decode's window begins there."""
    counts = _counts(_ONE, (20, 0), (0, 50), (1, 16))
    assert counts[FILL, "skip_trips0"] == 2 and counts[FILL, "find0"] == 1
    assert counts[DECODE, "zero_trips"] == 1  # rows 0..16
    counts = _counts(_ONE, (1, 16), (3, 0))
    assert counts[FILL, "find0"] == 2 and counts[FILL, "skip_trips0"] == 1
    assert (END, "zero") not in counts  # one row tile, the decode's


_LENS_OF_TWINS = {
    # Full blocks of two decodes, multiple blocks, one block; a prefill; searches.
    "decodes": ((2, 1, 128), (1, 1, 256), (2, 1, 100), (1, 5, 200), (1, 1, 300)),
    # Prefills of two q tiles, an empty sequence, a window that hides blocks, new tokens.
    "prefills": ((1, 150, 205), (1, 3, 0), (2, 1, 340), (1, 9, 600)),
}


@pytest.mark.parametrize("name", _LENS_OF_TWINS)
def test_the_interpreted_kernel_does_what_is_counted(name, monkeypatch, two_decodes):
    """Iterations, searches, fetched chunks and q tiles, with and without a window and writes."""
    done = []

    def count(module, function, event):
        original = getattr(module, function)

        def counted(*args, **options):
            what = event(args, options) if callable(event) else event
            jax.debug.callback(lambda: done.append(what))
            return original(*args, **options)

        monkeypatch.setattr(module, function, counted)

    def place(args, options):
        return SINGLE if len(args[2]) == 1 else FULL if options["is_full"] else MULTIPLE

    count(decode_iteration, "run_iteration", place)
    count(prefill, "attend", lambda _, options: "masked" if options["is_masked"] else "unmasked")
    count(kv_fetch, "find_work_item", "find")
    count(kv_fetch, "_start_chunk", "chunks")
    count(q_tiles, "open_q_tile", "open")
    count(q_tiles, "_gather_decodes", "gather")
    count(prefill_iteration, "_finish", "last")
    count(new_kv, "make_prefill", "make")

    runs, window = _LENS_OF_TWINS[name], 300 if name == "prefills" else None
    call = Call(
        num_heads=2,
        num_kv_heads=1,
        soft_cap=41.0,  # that no other call has, so that jit traces what counts
        sliding_window=window,
        writes=name == "prefills",
        config=mosaic_tpu.TpuAttentionConfig(128, 128, 4, 2),
        **room_for([runs], 16, is_exact=True),
    )
    case = Case("own", "v6e", runs, call)
    pool, q, *metadata = attention.random_inputs(case, seed=0)
    new = [jnp.ones(x.shape, x.dtype) for x in call.shapes()[2 + len(metadata) :]]
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        step = jax.jit(call.step("mosaic_tpu"), compiler_options=FAST_COMPILE)
        jax.block_until_ready(step(q, pool, *metadata, *new))
    jax.effects_barrier()
    counts = attention_trips.trips(case.lens, model.spec_of(call, "v6e"), window)

    def total(event):
        return sum(n for (_, e), n in counts.items() if re.fullmatch(event, e))

    iterations = {kind: counts[kind, "iteration"] for kind in (FULL, MULTIPLE, SINGLE)}
    if window:  # then full blocks are masked like others
        iterations[MULTIPLE] += iterations.pop(FULL)

    assert collections.Counter(done) == {
        event: number
        for event, number in {
            **iterations,
            "masked": total("masked"),
            "unmasked": total("unmasked"),
            "find": total(r"find_?\d*"),
            "chunks": total(r"chunks\d+"),
            "open": total("open"),
            "gather": total("gather"),
            "last": total("last"),
            "make": total("make"),
        }.items()
        if number
    }
    wanted = {
        "decodes": {FULL, MULTIPLE, SINGLE, "find", "masked", "gather"},
        "prefills": {"masked", "unmasked", "make", "last", "chunks"},
    }
    assert wanted[name] <= {*done}


def test_a_case_counts_its_operations():
    """2 rows at 3 and 4 of 5 see 4 + 5 keys; with a window of 2, 2 each."""
    call = Call(num_heads=4, num_kv_heads=1, head_dim=128)
    case = Case("own", "v6e", ((1, 2, 5),), call)
    assert case.flop == 4 * 4 * 128 * 9 and case.all_flop == 4 * 4 * 128 * 10
    assert case.num_bytes == 5 * 2 * 128 * 2 + 2 * 2 * 4 * 128 * 2
    narrow = dataclasses.replace(case, call=dataclasses.replace(call, sliding_window=2))
    assert narrow.flop == 4 * 4 * 128 * 4
    assert narrow.num_bytes == case.num_bytes - 2 * 2 * 128 * 2


# --- one compile for all that follows ---------------------------------------------------------

# Smaller than what is shipped, which takes the compiler three times as long.
_CONFIG = mosaic_tpu.TpuAttentionConfig(256, 128, 4, 2)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run of the command: what it printed, and the schedule that it read."""

    record: dict
    table: str
    schedule: ts.Schedule


@pytest.fixture(scope="module")
def run():
    """`python -m bench.attention --json --all --parts` for one model, generation and page size."""
    schedules, read = [], ts.schedules

    def keep(jobs, **options):
        schedules.extend(read(jobs, **options))
        return schedules

    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        _flags(presets="llama3-70b-tp8", page_sizes="128", json="true", parts="true", all="true"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(ts, "schedules", keep)
        patch.setattr(mosaic_tpu, "default_config", lambda *_: _CONFIG)
        attention.main(["attention"])
    assert len(schedules) == 2  # the five cases share a compile, and those that write another
    return _Run(json.loads(out.getvalue()), err.getvalue(), schedules[0])


def _case(name, config=_CONFIG):
    room = room_for(list(CASES.values()), 128)
    call = Call(**PRESETS["llama3-70b-tp8"], page_size=128, **room, config=config)
    return Case(name, "v6e", CASES[name], call)


def test_the_record_holds_every_case(run):
    assert [p["case"]["name"] for p in run.record["predictions"]] == list(CASES)
    decode = run.record["predictions"][0]
    assert decode["num_dmas"] == 64 * 4096 // 128
    assert decode["bytes"] == 64 * 4096 * 2 * 128 * 2 + 2 * 64 * 8 * 128 * 2
    assert run.record["environment"]["libtpu"]


def test_the_text_is_a_table_with_its_assumptions(run):
    assert "\nPredicted from compiled schedules." in run.table
    assert "perfect overlap" in run.table
    (header, rule), rows = _table(run.table, "case  ")
    assert header.split()[:3] == ["case", "page", "us"] and set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows] == list(CASES)


def test_the_verdict_comes_first_and_is_of_the_rows(run):
    verdict, _ = run.table.split("\n\n", 1)
    lines = verdict.splitlines()
    assert lines[0].startswith("VERDICT: ragged paged attention") and len(lines) <= 25
    [row] = run.record["verdict"]["rows"]
    for p in run.record["predictions"]:
        assert row[p["case"]["name"]].startswith(f"{p['microseconds']:,.0f} {p['bound']}")


def _table(text, start):
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(start))
    return lines[at : at + 2], lines[at + 2 : at + 2 + len(CASES)]


def test_the_parts_are_the_whole(run):
    for p in run.record["predictions"]:
        assert sum(p["parts"].values()) == pytest.approx(p["core_cycles"])


def test_mixed_costs_no_more_than_its_parts(run):
    """The issue's bound, on the core alone."""
    cycles = {p["case"]["name"]: p["core_cycles"] for p in run.record["predictions"]}
    assert cycles["mixed"] <= 1.05 * (cycles["decode"] + cycles["chunked"])


def test_what_is_shipped_is_known_and_keeps_its_goals():
    """The schedule of the default block sizes; the issue's bounds for one KV head on a v6e."""
    (decode, chunked) = model.predict([_case("decode", None), _case("chunked", None)])
    assert decode.core_cycles <= 1.0 * decode.hbm_cycles
    assert chunked.matrix_use(chunked.case.all_flop) >= 0.36


def test_writing_is_on_top_of_the_same_call(run):
    """A decode's token and a prefill's page, of the compiled write_and_attend."""
    fused = {p["case"]["name"]: p for p in run.record["writing"]}
    assert set(fused) == {"decode", "decode_short", "prefill", "chunked"}  # not the mixed one
    for p in run.record["predictions"]:
        name = p["case"]["name"]
        if name not in fused:
            continue
        unit, number = {
            "decode": ("cycles_a_token", 64),
            "decode_short": ("cycles_a_token", 256),
            "prefill": ("cycles_a_page", 16),
            "chunked": ("cycles_a_page", 4),
        }[name]
        extra = fused[name]["core_cycles"] - p["core_cycles"]
        assert fused[name][unit] == pytest.approx(extra / number)
        assert 10 < fused[name][unit] < 2000
        assert sum(fused[name]["parts"].values()) == pytest.approx(fused[name]["core_cycles"])
        assert (fused[name]["parts"]["new tokens"] > 0) == (unit == "cycles_a_page")
        assert fused[name]["bytes"] == p["bytes"] and fused[name]["num_dmas"] <= p["num_dmas"]
    assert "cycles per new token" in run.table


def test_new_tokens_are_made_and_sent_on_the_way():
    """200 rows from row 1 on, after 20 old tokens, are two q tiles: rows 1..127 are 8 tiles and
    fill pages from the 2nd to the 9th, 128..200 5 tiles and 5 pages. Of a q tile's pages the first
    goes by itself, and a last one that is not full; the 7 and 3 between them four at a time."""
    counts = _counts(_spec(128, 128, 3, 1, writes=True), (1, 64), (200, 220))
    assert counts[PREFILL, "make"] == 2 and counts[PREFILL, "make_trips"] == 7 + 4
    assert counts[PREFILL, "send"] == 2 and counts[PREFILL, "send_trips"] == 2 + 1
    # The one old page comes from the pool, for each q tile; all else is new, in blocks of 128.
    chunks = sum(n for (_, event), n in counts.items() if event.startswith("chunks"))
    assert chunks == 4 + 2 * 1
    assert counts[PREFILL, "iteration"] == (1 + 2) + (1 + 2)


def test_wrong_trip_counts_are_refused(monkeypatch, run):
    """Trips that do not make the case's blocks and DMAs gives an error and not a number."""
    right = attention_trips.trips

    def wrong(lens, spec, sliding_window):
        counts = right(lens, spec, sliding_window).copy()
        counts[FULL, "iteration"] -= 1
        return counts

    monkeypatch.setattr(attention_trips, "trips", wrong)
    with pytest.raises(ValueError, match="the weighted schedule takes"):
        model.predict_from(_case("decode"), run.schedule)


def test_a_kernel_of_another_structure_is_refused(run):
    (kernel,) = [k for k in run.schedule.kernels if "attention" in k.name]
    tree = kernel.tree
    assert set(roles.roles(tree)) == {node.path for node in tree.walk()}
    for shorter in (
        dataclasses.replace(tree, children=tree.children[:-1]),
        dataclasses.replace(tree, children=tree.children[::-1]),
    ):
        with pytest.raises(ValueError, match="wanted.*; the schedule is"):
            roles.roles(shorter)


# --- the gate and the flags -------------------------------------------------------------------


def test_the_gate_stops_a_wrong_op(monkeypatch):
    """No number from an op that takes another sequence's pages."""
    right = oracle.attend

    def wrong(q, kv_pages, batch, factors, options):
        batch = batch._replace(page_indices=jnp.roll(batch.page_indices, 1, axis=0))
        return right(q, kv_pages, batch, factors, options)

    monkeypatch.setattr(oracle, "attend", wrong)
    monkeypatch.setattr(
        mosaic_tpu, "default_config", lambda *_: mosaic_tpu.TpuAttentionConfig(128, 128)
    )
    # A cap that no other call has, so that jit traces the planted bug.
    shape = PRESETS["llama3-70b-tp8"] | {"soft_cap": 37.0}
    with pytest.raises(SystemExit, match="mosaic_tpu differs from the oracle by"):
        attention.check_against_oracle([shape])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"generations": "v9"}, "--generations has 'v9'; wanted some of v4, v5e"),
        ({"page_sizes": "0"}, "--page_sizes has '0'; wanted integers >= 1"),
        ({"cases": "verify"}, "--cases has 'verify'; wanted some of decode"),
        ({"presets": "gpt"}, "--presets has 'gpt'; wanted some of llama3-8b"),
        ({"lens": "64x1"}, "--lens has '64x1'; wanted .COUNTx.NEW:ALL"),
        ({"lens": "9:4"}, "--lens has '9:4'; wanted .COUNTx.NEW:ALL with 1 <= NEW <= ALL"),
        ({"num_heads": "12"}, "--num_heads is 12; wanted a multiple of the 8 KV heads"),
        ({"kv_heads": "-1"}, "--kv_heads is -1; wanted > 0"),
        ({"backend": "mosaic_gpu"}, "--backend is mosaic_gpu, which does not run here: jax's"),
        ({"wall_clock": "true"}, "--wall_clock is for what is measured"),
        ({"peers": "cuda"}, "--peers has 'cuda'; wanted some of torch, flashinfer"),
        pytest.param({"peers": "torch"}, "--peers are measured on a GPU", id="peers_elsewhere"),
        ({"lens": "400x1:16,1:9000"}, "a page table of 225763 entries does not fit SMEM"),
    ],
)
def test_bad_flags_are_a_sentence(given, sentence):
    with _flags(**given), pytest.raises(app.UsageError, match=sentence):
        attention.main(["attention"])


def test_own_lengths_and_heads_take_the_place_of_the_cases():
    with _flags(lens="3x1:64,8:100", kv_heads="4"):
        cases = attention._cases(attention._runs())
    assert {case.runs for case in cases} == {((3, 1, 64), (1, 8, 100))}
    assert {case.call.num_kv_heads for case in cases} == {4}
    assert {case.call.table_width for case in cases} == {7}


@pytest.mark.parametrize("pool_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_a_pool_of_8_bits_has_values_that_its_scale_makes_normal(pool_dtype, monkeypatch):
    # Those of a large model take the interpreter's program thrice as long to compile.
    monkeypatch.setattr(
        mosaic_tpu, "default_config", lambda *_: mosaic_tpu.TpuAttentionConfig(128, 128)
    )
    with _flags(pool_dtype=pool_dtype, lens="2x1:100", kv_heads="2", num_heads="4"):
        [shape] = attention._shapes().values()
        [case] = attention._cases(attention._runs())
        attention.check_against_oracle([shape])
    assert case.num_bytes == 200 * 512 + 2 * 2 * 4 * 128 * 2  # a byte a value of K and V
    pool, q, *_ = attention.random_inputs(case, seed=0)
    assert pool.dtype == pool_dtype and q.dtype == jnp.bfloat16
    values = pool.astype(jnp.float32) * SCALES[pool_dtype][0]
    assert abs(values.std() - 1) < 0.05 and abs(values.mean()) < 0.05


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What `main` does on a GPU, with the oracle in the kernels' place and times made up."""
    step, times = Call.step, itertools.count(2)

    def time_kernels(step, states, inputs, **_):
        out = jax.jit(step, donate_argnums=0)(*states, *inputs)
        assert out.shape == inputs[0].shape and bool(jnp.any(out != 0))
        return clock.Timing(float(next(times)), 1.0, 9.0, 20, clock.KERNEL_TIME)

    class Child:
        def __enter__(self):
            return lambda function, name, case: (
                "no cuDNN here" if "cuDNN" in name else clock.Timing(4.0, 3.0, 5.0, 20, "")
            )

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "why_no_mosaic_gpu", lambda: None)
    monkeypatch.setattr(Call, "step", lambda call, backend: step(call, "oracle"))
    monkeypatch.setattr(clock, "time_kernels", time_kernels)
    monkeypatch.setattr(peers, "Child", Child)
    monkeypatch.setitem(peers.MODULES, "torch", ("json",))
    monkeypatch.setitem(attention_cases.CASES, "mixed", ((2, 1, 45), (1, 19, 150)))


def test_a_gpu_is_measured_beside_its_peers(as_on_a_gpu, capsys):
    with _flags(
        lens="3x1:64",
        page_sizes="16,32",
        kv_heads="1",
        num_heads="2",
        peers="torch",
        json="true",
        all="true",
        pool_dtype="float8_e4m3fn",
    ):
        attention.main(["attention"])
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert [row["median_us"] for row in record["measured"]] == [2.0, 3.0]
    assert {row["pool_dtype"] for row in record["measured"]} == {"float8_e4m3fn"}
    flash, refused = record["peers"][:2]
    assert flash["ours_us"] == 2.0 and flash["ours_over"] == 0.5 and flash["page_size"] == 16
    assert flash["tflop_per_s"] == pytest.approx(record["measured"][0]["tflop_per_s"] / 2)
    assert refused == {
        "peer": "torch cuDNN",
        "ours_us": 2.0,
        "case": "own",
        "refusal": "no cuDNN here",
    }
    assert "torch cuDNN, own: no cuDNN here" in err and "0.50x" in err
    [verdict] = record["verdict"]["rows"]
    assert verdict["page"] == "16" and verdict["us"] == "2.0" and verdict["ours over it"] == "0.50x"
    assert err.startswith("VERDICT: ragged paged attention on ")
    assert len(record["peers"]) == 4


def test_a_gpu_is_timed_by_the_wall_clock_if_asked(as_on_a_gpu, capsys):
    given = {"lens": "3x1:64", "kv_heads": "1", "num_heads": "2", "wall_clock": "true"}
    with _flags(**given, json="true"):
        attention.main(["attention"])
    [row] = json.loads(capsys.readouterr().out)["measured"]
    assert row["method"] == "wall clock" and row["repeats"] == 20
    with _flags(**given, peers="torch"):
        with pytest.raises(app.UsageError, match="leave --wall_clock out"):
            attention.main(["attention"])


def test_a_cpu_is_measured_beside_the_oracle(monkeypatch, capsys):
    step, timed = Call.step, []

    def time_in_turn(steps, states, inputs):
        timings = clock.time_calls_in_turn(steps, states, inputs, repeats=1)
        outputs = [run(jnp.zeros_like(inputs[0]), *inputs) for run in steps]
        assert jnp.allclose(*outputs, atol=0.03) and bool(jnp.any(outputs[0] != 0))
        return [
            dataclasses.replace(t, median_us=us) for t, us in zip(timings, (2.0, 8.0), strict=True)
        ]

    monkeypatch.setattr(Call, "step", lambda call, name: timed.append(name) or step(call, name))
    monkeypatch.setattr(measure, "clock", types.SimpleNamespace(time_calls_in_turn=time_in_turn))
    with _flags(backend="xla", lens="3x1:64", num_heads="2", kv_heads="1", json="true", all="true"):
        attention.main(["attention"])
    out, err = capsys.readouterr()
    record = json.loads(out)
    [ours], [oracle] = record["measured"], record["peers"]
    assert timed[-2:] == ["xla", "oracle"] and ours["method"] == "wall clock"
    assert (ours["median_us"], oracle["median_us"], oracle["ours_over"]) == (2.0, 8.0, 0.25)
    [verdict] = record["verdict"]["rows"]
    assert verdict["fastest other"] == "oracle" and verdict["ours over it"] == "0.25x"
    assert "predicted" not in err.lower()
    with _flags(backend="xla"):
        assert list(attention._runs()) == list(CPU_CASES)


def test_what_the_gpu_kernels_cannot_run_is_a_sentence(as_on_a_gpu):
    with _flags(lens="3x1:64", pool_dtype="int8"):
        with pytest.raises(app.UsageError, match="own on this device: the pool is int8 and q"):
            attention.main(["attention"])


def test_the_command_refuses_without_a_traceback():
    """As a newcomer starts it: nothing of ours in the environment."""
    ours = ("JAX_PLATFORMS", "XLA_FLAGS", *COMPILE_ENV)
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-m", "bench.attention", "--generations=v9"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode != 0
    assert "--generations has 'v9'" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr


# --- tuned block sizes ------------------------------------------------------------------------

_OP = "ragged_paged_attention"


@pytest.mark.parametrize("generation", list(TOPOLOGIES))
def test_a_generation_has_the_name_that_jax_gives_it(generation):
    """What is traced as if on a generation is what libtpu's topology is."""
    with as_if_on(generation):
        kind = dispatch.tpu_device_kind()
    with jax.sharding.use_abstract_mesh(mesh_of(generation).abstract_mesh):
        assert dispatch.tpu_device_kind() == kind == DEVICES[generation][0]
    assert dispatch.tpu_device_kind() is None


@pytest.mark.parametrize("generation", ["v5e", "v6e", "tpu7x"])
def test_every_tuned_entry_is_read(generation):
    """Under a generation's mesh the default block sizes of an entry's shape are the entry's."""
    for entry in tuned.entries(DEVICES[generation][0], _OP):
        call = Call(
            **{name: entry[name] for name in ("num_heads", "num_kv_heads", "head_dim")},
            page_size=entry["page_size"],
            dtype=entry["pool_dtype"],
        )
        assert entry["q_dtype"] == entry["pool_dtype"]
        assert model.config_of(call, generation) == mosaic_tpu.TpuAttentionConfig(**entry["config"])


def test_an_entry_takes_the_place_of_the_formula(monkeypatch):
    """For its shape on its device, where the buffers fit beside a call's new tokens; else not."""
    call = Call(num_heads=2, num_kv_heads=1, page_size=16)
    entry = {
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 128,
        "q_dtype": "bfloat16",
        "pool_dtype": "bfloat16",
        "page_size": 16,
        "config": {
            "block_kv": 1024,
            "block_q": 256,
            "num_stages": 64,
            "kv_blocks_per_iteration": 1,
        },
    }
    formula = model.config_of(call, "v6e")
    monkeypatch.setattr(
        tuned, "entries", lambda kind, op: (entry,) if (kind, op) == ("TPU v6 lite", _OP) else ()
    )
    found = mosaic_tpu.TpuAttentionConfig(**entry["config"])
    assert model.config_of(call, "v6e") == found != formula
    assert model.config_of(call, "v5e") != found
    other = dataclasses.replace(call, num_heads=4)
    assert model.config_of(other, "v6e") != found
    with as_if_on("v6e"):
        fused = [mosaic_tpu.default_config(call.heads, 16, n) for n in (16, 2**18)]
    assert fused[0] == found != fused[1]


def test_an_entry_stands_for_the_nearest_page_size(monkeypatch):
    shape = {"num_heads": 2, "num_kv_heads": 1}
    table = [
        {**shape, "page_size": 16, "config": {"block_kv": 128}},
        {**shape, "page_size": 128, "config": {"block_kv": 256}},
    ]
    monkeypatch.setattr(tuned, "entries", lambda kind, op: table)
    for page_size, wanted in ((1, 128), (32, 128), (64, 256), (512, 256)):
        found = tuned.find("TPU v6 lite", _OP, page_size=page_size, **shape)
        assert found == {"block_kv": wanted}
    assert tuned.find("TPU v6 lite", _OP, page_size=16, **shape | {"num_heads": 4}) is None
    assert tuned.find(None, _OP, page_size=16, **shape) is None


def test_the_best_of_equals_keeps_the_core_free(run):
    """Then memory decides; and no time a hundredth longer is chosen for either."""
    right = tuple(model.predict_from(_case(name), run.schedule) for name in CASES)

    def trial(**factors):
        return tune_attention.Trial(
            right[0].config,
            tuple(
                dataclasses.replace(p, **{k: getattr(p, k) * f for k, f in factors.items()})
                for p in right
            ),
        )

    refused = tune_attention.Trial(right[0].config, refusal="it does not compile")
    slower = trial(core_cycles=0.9, hbm_cycles=9)
    busier, leaner = trial(core_cycles=1.005, vmem_bytes=0.1), trial(vmem_bytes=0.5)
    assert tune_attention.choose([refused, slower, trial(), busier, leaner]) is leaner
    assert tune_attention.choose([refused, slower, busier]) is busier
    with pytest.raises(ValueError, match="no candidate compiled: .'it does not compile'"):
        tune_attention.choose([refused])
