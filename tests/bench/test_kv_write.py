# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""bench.kv_write: its gate, its model of the walk, its flags and its output."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from bench import kv_write, report
from bench.cases.kv_write import OPS, WriteCase
from bench.tpu_model import kv_write as model
from bench.tpu_model.compile import COMPILE_ENV
from pallas_paged.kv_write import oracle

_CASE = WriteCase("page", "v6e", 16, 4096, 8, 128, "bfloat16")


def _case(**changes):
    return dataclasses.replace(_CASE, **changes)


@pytest.fixture(scope="module")
def predictions():
    """One compile for all: the four ops on v6e and the pages on tpu7x."""
    cases = [_case(op=op) for op in OPS] + [_case(generation="tpu7x")]
    return dict(zip([*OPS, "tpu7x"], model.predict(cases), strict=True))


def test_a_case_counts_its_bytes():
    """Each token: K and V of 8 heads of 128 in two bytes, read once and written once."""
    assert _CASE.num_bytes == 4096 * 2 * (2 * 8 * 128 * 2)
    assert _case(num_tokens=4100).num_bytes == _CASE.num_bytes  # whole pages alone
    assert _case(op="token", num_tokens=4100).num_bytes == 4100 * 2 * (2 * 8 * 128 * 2)


def test_every_op_issues_fast_enough(predictions):
    """The issue's bound: 7.5 cycles from a full block, id load and range check counted."""
    for op in OPS:
        assert 4.0 < predictions[op].cycles_per_issue <= 7.5, op


@pytest.mark.parametrize("name", ["page", "page_starts", "tpu7x"])
def test_pages_leave_hbm_the_bound(predictions, name):
    """All that a block costs stays under half of its HBM time."""
    p = predictions[name]
    assert p.schedule_cycles / p.hbm_cycles < 0.5
    assert p.bound(descriptors=True) == "HBM"


def test_slices_keep_up_with_pages(predictions):
    page, page_long = predictions["page"], predictions["slice"]
    for descriptors in (False, True):
        assert page_long.microseconds(descriptors) <= 1.25 * page.microseconds(descriptors)


def test_tokens_are_bound_by_descriptors(predictions):
    """4,096 DMAs at 18 ns are 73.7 us, whatever else."""
    token = predictions["token"]
    assert token.num_dmas == 4096
    assert token.bound(descriptors=True) == "18 ns"
    assert token.microseconds(True) == pytest.approx(4096 * 0.018, rel=1e-6)


def test_wrong_trip_counts_are_refused(monkeypatch, predictions):
    """A walk that does not make the case's DMAs gives an error and not a number."""
    trips, unroll, entries = model._count_trips(_CASE)
    wrong = dataclasses.replace(trips, chunks=trips.chunks - 1)
    monkeypatch.setattr(model, "_count_trips", lambda case: (wrong, unroll, entries))
    with pytest.raises(ValueError, match="the weighted schedule sends"):
        model.predict([_CASE])


def test_the_gate_stops_a_wrong_op(monkeypatch):
    """No number from ops that differ from the oracle in a single page."""
    right = oracle.page_write

    def wrong(kv_pages, k, v, page_ids, *rest, **options):
        return right(kv_pages, k, v, jnp.roll(page_ids, 1), *rest, **options)

    monkeypatch.setattr(oracle, "page_write", wrong)
    with pytest.raises(SystemExit, match="page: mosaic_tpu differs from the oracle"):
        kv_write.check_against_oracle()


def _run(*flags):
    """The command as a newcomer starts it: nothing of ours in the environment."""
    ours = ("JAX_PLATFORMS", "XLA_FLAGS", *COMPILE_ENV)
    env = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-m", "bench.kv_write", *flags], capture_output=True, text=True, env=env
    )


def test_json_is_all_that_json_prints():
    done = _run(
        "--json",
        "--all",
        "--generations=v5e",
        "--ops=page,token",
        "--page_sizes=16",
        "--tokens=256",
        "--nocheck_model",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [p["case"]["op"] for p in record["predictions"]] == ["page", "token"]
    assert [p["num_dmas"] for p in record["predictions"]] == [16, 256]
    assert record["scatter"][0]["median_us"] > 0
    assert record["environment"]["libtpu"]
    assert "learning/" not in done.stderr and "WARNING" not in done.stderr  # libtpu's own log
    verdict, tables = done.stderr.split("\n\n", 1)
    assert verdict.startswith("VERDICT: how to write 256 new tokens")
    assert record["verdict"]["rows"][0]["use"] == "page_write"
    rows = [line.split()[:3] for line in tables.splitlines()]
    assert ["page", "16", "256"] in rows and ["token", "-", "256"] in rows
    assert "The plain-jax scatter, measured on this" in tables


def test_the_default_output_is_a_verdict():
    done = _run("--generations=v5e", "--page_sizes=16", "--tokens=256", "--nocheck_model")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("VERDICT: ") and len(lines) <= report.MAX_VERDICT_LINES
    assert "These are predictions from schedules compiled for TPUs." in done.stdout


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--generations=v9", "--generations has 'v9'; wanted some of v4, v5e"),
        ("--tokens=0", "--tokens has '0'; wanted integers >= 1"),
        ("--ops=row", "--ops has 'row'; wanted some of page"),
        ("--peers=cuda", "--peers has 'cuda'; wanted some of torch, flashinfer"),
        pytest.param("--peers=torch", "--peers are measured on a GPU", id="peers_elsewhere"),
    ],
)
def test_bad_flags_are_a_sentence(flag, sentence):
    done = _run(flag)
    assert done.returncode != 0
    assert sentence in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
