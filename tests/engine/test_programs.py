# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Shapes are compiled beside the steps: each step takes the smallest that is ready."""

import dataclasses
import gc
import subprocess
import sys
import threading
import time

import pytest

from reference_engine import compiles
from reference_engine.batch import batch_shapes, choose_shape
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.programs import Programs, most_useful_first
from reference_engine.sampling_params import SamplingParams
from reference_engine.weights import random_params

CONFIG = EngineConfig(
    page_size=4,
    num_pages=32,
    max_model_len=32,
    max_num_batched_tokens=32,
    page_aligned_scheduling=False,
    max_num_seqs=2,
    attention_backend="oracle",
)
MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
DECODE_1, DECODE_2, SMALL, LARGE = batch_shapes(CONFIG)
TIMEOUT = 60.0  # of a test that would hang


class Compiler:
    """Compiles a shape when the test says so."""

    def __init__(self, failing=(), error=RuntimeError, in_lowering=False):
        self.may_end = {shape: threading.Event() for shape in batch_shapes(CONFIG)}
        self.begun = []
        self.at_others = []  # the shapes whose model is compiled
        self.others_may_end = threading.Event()
        self.others_may_end.set()
        self.failing = failing
        self.error = error
        self.in_lowering = in_lowering

    def lower(self, shape):
        self.begun.append(shape)
        if self.in_lowering and shape in self.failing:
            raise self.error("planted")

        def finish():
            assert self.may_end[shape].wait(TIMEOUT)
            if shape in self.failing:
                raise self.error("planted")

        def finish_others():
            self.at_others.append(shape)
            assert self.others_may_end.wait(TIMEOUT)

        return [finish, finish_others]


@pytest.fixture
def make(monkeypatch):
    """Makes Programs with one thread, and ends them after the test."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    made = []

    def start(**options):
        compiler = Compiler(**options)
        programs = Programs(CONFIG, compiler.lower)
        made.append((programs, compiler))
        programs.start()
        return programs, compiler

    yield start
    for programs, compiler in made:
        programs.stop()
        for event in (*compiler.may_end.values(), compiler.others_may_end):
            event.set()
        programs.close()


def choose_in_thread(programs, *sizes):
    chosen = []
    thread = threading.Thread(target=lambda: chosen.append(programs.choose(*sizes)), daemon=True)
    thread.start()
    return thread, chosen


def wait_until(is_true):
    end = time.monotonic() + TIMEOUT
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_without_threads_a_step_takes_the_smallest_shape_that_holds_it():
    programs = Programs(CONFIG, Compiler().lower)
    for num_tokens, num_seqs in ((1, 1), (2, 2), (2, 1), (17, 2)):
        assert programs.choose(num_tokens, num_seqs) is choose_shape(num_tokens, num_seqs, CONFIG)


def test_a_step_takes_the_smallest_shape_that_is_ready(make):
    programs, compiler = make()
    assert most_useful_first(batch_shapes(CONFIG)) == [LARGE, DECODE_2, SMALL, DECODE_1]
    thread, chosen = choose_in_thread(programs, 1, 1)
    thread.join(0.05)
    assert not chosen  # it waits for the first shape
    compiler.may_end[LARGE].set()
    thread.join(TIMEOUT)
    assert chosen == [LARGE]
    # The shape that the step would have liked best comes next, before those that nobody has missed.
    compiler.may_end[DECODE_2].set()  # it may have been begun in the meantime
    compiler.may_end[DECODE_1].set()
    wait_until(lambda: programs.choose(1, 1) is DECODE_1)
    assert programs.choose(5, 1) is LARGE  # SMALL is not ready
    compiler.may_end[SMALL].set()
    wait_until(lambda: programs.choose(5, 1) is SMALL)
    assert programs.choose(17, 1) is LARGE


def test_the_first_shape_is_ready_before_the_samplers_programs(make):
    programs, compiler = make()
    compiler.others_may_end.clear()
    compiler.may_end[LARGE].set()
    assert programs.choose(1, 1) is LARGE
    assert compiler.at_others in ([], [LARGE])
    compiler.others_may_end.set()
    wait_until(lambda: len(compiler.begun) == 2)
    compiler.others_may_end.clear()
    compiler.may_end[compiler.begun[1]].set()
    wait_until(lambda: len(compiler.at_others) == 2)
    assert programs.choose(1, 1) is LARGE  # the second shape waits for all of its programs
    compiler.others_may_end.set()
    wait_until(lambda: programs.choose(1, 1) is compiler.begun[1])


def test_the_shape_that_is_missed_comes_next(make):
    programs, compiler = make()
    wait_until(lambda: compiler.begun == [LARGE])
    thread, _ = choose_in_thread(programs, 1, 1)
    thread.join(0.05)
    compiler.may_end[LARGE].set()
    wait_until(lambda: len(compiler.begun) == 2)
    assert compiler.begun == [LARGE, DECODE_1]


@pytest.mark.parametrize("in_lowering", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_an_error_is_raised_in_the_step_that_needs_the_shape_and_in_no_other(
    make, error, in_lowering
):
    programs, compiler = make(failing=(DECODE_2, SMALL), error=error, in_lowering=in_lowering)
    for shape in (LARGE, DECODE_2, SMALL):
        compiler.may_end[shape].set()
    wait_until(lambda: DECODE_1 in compiler.begun)
    # These steps compile the shape again, which raises the error.
    assert programs.choose(2, 2) is DECODE_2
    assert programs.choose(3, 2) is SMALL
    assert programs.choose(17, 2) is LARGE
    assert programs.choose(1, 1) is LARGE  # it needs none of those that have failed


def test_closing_waits_for_one_shape_and_compiles_no_other(make):
    programs, compiler = make()
    wait_until(lambda: compiler.begun == [LARGE])
    programs.stop()
    compiler.may_end[LARGE].set()
    programs.close()
    assert compiler.begun == [LARGE]
    assert programs.choose(1, 1) is DECODE_1  # the step compiles it


def test_warm_up_takes_over_from_the_threads(make):
    programs, compiler = make()
    wait_until(lambda: compiler.begun == [LARGE])
    for event in compiler.may_end.values():
        event.set()
    shapes = []
    programs.compile_all(shapes.append)
    assert set(compiler.begun) == set(compiler.at_others) == set(batch_shapes(CONFIG))
    assert len(compiler.begun) == len(shapes) == 4 and set(shapes) == set(compiler.begun)
    assert programs.choose(1, 1) is DECODE_1


def test_an_error_in_warm_up_is_raised_there():
    compiler = Compiler(failing=(SMALL,))
    for event in compiler.may_end.values():
        event.set()
    with pytest.raises(RuntimeError, match="planted"):
        Programs(CONFIG, compiler.lower).compile_all()


def tokens_of(engine):
    for seed in range(2):
        params = SamplingParams(max_tokens=8, temperature=0.8, seed=seed, ignore_eos=True)
        engine.add_request([3, 1, 4, 1, 5][: 3 + seed], params)
    return engine.run()


def test_an_engine_that_compiles_in_the_background_serves_the_same_tokens():
    params = random_params(MODEL, seed=0)
    config = dataclasses.replace(CONFIG, max_num_seqs=1, max_num_batched_tokens=16)
    want = tokens_of(Engine(params, MODEL, config))
    # Another pool, so that nothing is compiled yet.
    config = dataclasses.replace(config, compile_in_background=True, num_pages=33)
    engine = Engine(params, MODEL, config)
    assert tokens_of(engine) == want
    wait_until(lambda: not any(t.is_alive() for t in engine._programs._threads))
    # The steps find what the threads have compiled.
    before = compiles.num_compiles()
    assert len(tokens_of(engine)) == 2
    assert compiles.num_compiles() == before
    engine.close()


def test_the_threads_of_an_engine_that_nobody_holds_end(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    config = dataclasses.replace(CONFIG, compile_in_background=True, num_pages=34)
    engine = Engine(random_params(MODEL, seed=0), MODEL, config)
    programs = engine._programs
    del engine
    gc.collect()
    assert not programs._queue
    programs.close()


def test_the_interpreter_exits_while_threads_compile():
    code = """
from tests.engine.test_programs import *
config = dataclasses.replace(CONFIG, compile_in_background=True)
engine = Engine(random_params(MODEL, seed=0), MODEL, config)
assert engine._programs._threads[0].is_alive()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * TIMEOUT
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result
