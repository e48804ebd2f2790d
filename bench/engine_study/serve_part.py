# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The part `serve` of `bench.engine`: its flags, and what is run for them."""

from __future__ import annotations

import ast
import dataclasses
import gc
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import app, flags

from bench import report
from bench.engine_study import decode, serve, startup, tables, traces
from bench.engine_study.cost import LLAMA3_8B
from bench.engine_study.latency import Objectives
from bench.engine_study.part import Part
from bench.engine_study.real import TINY
from bench.peers.child import Child
from bench.verdicts import engine as verdicts
from reference_engine import traffic
from reference_engine.batch import describe_shapes
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine

MODELS = {"qwen3-0.6b": serve.QWEN3_0_6B, "llama3-8b": LLAMA3_8B, "tiny": TINY}
WORKLOADS = ("A", "B", "C", "generated")

_WORKLOADS = flags.DEFINE_list(
    "workloads",
    ["A", "B", "C"],
    "What is served beside --traces, some of A: 256 requests at once, 100 to 1,024 tokens in and"
    " out; B: 64 at once, 1,024 in and 256 out; C: 64 at once, 4,096 in and 16 out; generated: the"
    " generator's requests, at their times. On a CPU A, B and C are divided by 16.",
    allow_override=True,
)
_TEMPERATURES = flags.DEFINE_list(
    "temperatures", ["0.6", "0"], "Of the requests, one run for each.", allow_override=True
)
_RATES = flags.DEFINE_list(
    "rates",
    [],
    "Requests a second at which traces and generated requests arrive, one run for each; inf for all"
    " at once. Left out: their own times.",
    allow_override=True,
)
_POISSON = flags.DEFINE_bool(
    "poisson",
    False,
    "Whether they arrive with exponential gaps. If not, their own times are scaled to the rate.",
    allow_override=True,
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    f"One of {', '.join(MODELS)}, with random weights; or a model's folder. Default: qwen3-0.6b,"
    " tiny on a CPU.",
    allow_override=True,
)
_ENGINE_CONFIG = flags.DEFINE_multi_string(
    "engine_config",
    [],
    "FIELD=VALUE of EngineConfig, for what shall not be LLM's default; may be repeated.",
    allow_override=True,
)
_DECODE_MODELS = flags.DEFINE_list(
    "decode_models",
    None,
    "Models beside --model of whose steps the first of --decodes is timed. Default: llama3-8b, none"
    " on a CPU.",
    allow_override=True,
)
_DECODES = flags.DEFINE_list(
    "decodes",
    ["64", "256"],
    "Numbers of decodes in the steps that are timed, at 1,024 tokens each; divided by 16 on a CPU.",
    allow_override=True,
)
_STARTUP = flags.DEFINE_bool(
    "startup",
    False,
    "Whether to time LLM(folder) and its first token in new processes, with an empty and with a"
    " full cache of compiled programs. The folder is --model, or one with random weights.",
    allow_override=True,
)


def start() -> list[dict[str, Any]]:
    """What must be measured before this process has a backend: see `startup`.

    Raises:
      app.UsageError: a flag has a value that it must not have.
    """
    fields = _fields()
    if not _STARTUP.value:
        return []
    with Child() as run:
        on_cpu = run(report.start_backends) == "cpu"
    model, name = _model(_name(on_cpu))
    if isinstance(model, pathlib.Path):
        return startup.measure(model, fields)
    with tempfile.TemporaryDirectory() as folder:
        startup.write_folder(pathlib.Path(folder), model)
        print(f"starting a random {name}, twice", file=sys.stderr, flush=True)
        return startup.measure(pathlib.Path(folder), fields)


def run(
    on_cpu: bool,
    paths: Sequence[str],
    num_requests: int,
    *,
    seed: int,
    objectives: Objectives,
    started: list[dict[str, Any]],
) -> Part:
    """Serves the workloads and the traces, and times steps of decodes.

    Args:
      on_cpu: whether the device is a CPU.
      paths: of trace files.
      num_requests: of a trace, and of the generator.
      seed: fixes what is drawn.
      objectives: of a good request.
      started: what `start` has returned.
    """
    shrink = 16 if on_cpu else 1
    # Mistakes are found before anything is compiled.
    temperatures = _numbers("temperatures", _TEMPERATURES.value, low=0.0)
    batches = report.require_sizes("decodes", _DECODES.value)
    others = _DECODE_MODELS.value
    others = ([] if on_cpu else ["llama3-8b"]) if others is None else others
    report.require_choices("decode_models", MODELS, others)
    runs = list(_traffic(paths, num_requests, shrink, seed))
    model, name = _model(_name(on_cpu))

    began = time.perf_counter()
    try:
        engine = serve.make_engine(model, _fields(), warm_up=True)
    except (OSError, ValueError) as error:
        raise app.UsageError(str(error)) from None
    made = time.perf_counter() - began
    device = jax.devices()[0].device_kind
    how = [
        f"{name} on {device}: every shape compiled after {made:.1f} s."
        f" {describe_shapes(engine.config)}.",
        str(engine.config),
    ]
    _tell(how[0])
    rows = _serve(engine, runs, temperatures, objectives)
    batches = [max(1, batch // shrink) for batch in batches]
    steps = list(_decodes(engine, name, batches, shrink))
    del engine  # the device may have no room for another
    steps += _decodes_of(others, batches[:1], shrink)
    details = [*how, *tables.serve_tables(rows), *tables.decode_tables(steps)]
    details += tables.startup_tables(started)
    return Part(
        {"model": name, "shrink": shrink, "served": rows, "steps": steps, "startup": started},
        [*verdicts.serve_rows(rows), *verdicts.step_rows(steps), *verdicts.startup_rows(started)],
        f"serve: measured on {device}: {name}"
        + ("" if isinstance(model, pathlib.Path) else ", random weights")
        + (f"; A, B, C and decodes divided by {shrink}" if shrink > 1 else "")
        + ". A token's time is when Engine.step returns it.",
        "\n".join(details),
    )


def _serve(
    engine: Engine,
    runs: Sequence[traces.Traffic],
    temperatures: Sequence[float],
    objectives: Objectives,
) -> list[dict[str, Any]]:
    serve.warm(engine, temperatures)
    rows: list[dict[str, Any]] = []
    for one in runs:
        kept = traces.no_longer_than(one, engine.config.max_model_len)
        num_left_out = len(one.arrivals) - len(kept.arrivals)
        if not kept.arrivals:
            raise app.UsageError(
                f"{one.name}: no request has at most max_model_len={engine.config.max_model_len}"
                " tokens; raise it by --engine_config=max_model_len=N"
            )
        for temperature in temperatures:
            try:
                row = serve.serve(
                    engine, kept, temperature=temperature, objectives=objectives, seed=len(rows)
                )
            except ValueError as error:  # a request that the pool could never hold
                raise app.UsageError(f"{one.name}: {error}") from None
            rows.append({**row, "num_left_out": num_left_out})
            # Told at once: a run of minutes may be cut short.
            _tell(" ".join(verdicts.serve_rows(rows[-1:])[0].values()))
    return rows


def _decodes_of(
    names: Sequence[str], batches: Sequence[int], shrink: int
) -> Iterator[dict[str, Any]]:
    """As `_decodes`, of models that serve nothing else, so that few shapes are compiled."""
    for name in names:
        gc.collect()
        try:
            engine = serve.make_engine(MODELS[name], _fields(), warm_up=False)
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # what was measured stands
            _tell(f"{name}: its decodes are not timed: {error}")
            continue
        yield from _decodes(engine, name, batches, shrink)
        del engine


def _decodes(
    engine: Engine, name: str, batches: Sequence[int], shrink: int
) -> Iterator[dict[str, Any]]:
    """Steps of decodes of an engine, with each kind of sampling."""
    context = 1024 // shrink
    num_steps, num_recorded = (50, 50) if shrink == 1 else (10, 0)
    for batch_size in batches:
        if not decode.has_room(engine, batch_size, context, num_steps + num_recorded):
            _tell(f"{name}: no room for {batch_size} decodes at {context}: not timed")
            continue
        for sampling in decode.SAMPLING:
            row = decode.time_decodes(
                engine,
                batch_size,
                context,
                sampling=sampling,
                num_steps=num_steps,
                num_recorded=num_recorded,
            )
            row = {"model": name, **row}
            _tell(" ".join(verdicts.step_rows([row])[0].values()))
            yield row


def _traffic(
    paths: Sequence[str], num_requests: int, shrink: int, seed: int
) -> Iterator[traces.Traffic]:
    """What is served, in order."""
    report.require_choices("workloads", WORKLOADS, _WORKLOADS.value)
    fixed = serve.workloads(shrink)
    yield from (fixed[name] for name in _WORKLOADS.value if name in fixed)
    found = [read_trace(path, num_requests) for path in paths]
    if "generated" in _WORKLOADS.value:
        found.append(traces.Traffic("generated", traffic.generate(num_requests, seed=seed)))
    for one in found:
        rates: list[float | None] = [*_numbers("rates", _RATES.value, low=1e-9)]
        for rate in rates or [None]:
            try:
                moved = traces.at_rate(one, rate, is_poisson=_POISSON.value, seed=seed)
            except ValueError as error:
                raise app.UsageError(str(error)) from None
            gaps = ", Poisson" if _POISSON.value else ""
            at = "at its own times" if rate is None else f"at {rate:g}/s"
            yield dataclasses.replace(moved, name=f"{one.name} {at}{gaps}")


def read_trace(path: str, num_requests: int) -> traces.Traffic:
    """The first requests of a trace file, under its name without the ending.

    Raises:
      app.UsageError: it cannot be read.
    """
    name = os.path.splitext(os.path.basename(path))[0]
    try:
        return traces.read(path, num_requests, name)
    except OSError as error:
        raise app.UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise app.UsageError(str(error)) from None


def _name(on_cpu: bool) -> str:
    return _MODEL.value or ("tiny" if on_cpu else "qwen3-0.6b")


def _model(name: str) -> tuple[ModelConfig | pathlib.Path, str]:
    """A shape or a folder, and its name for people."""
    if name in MODELS:
        return MODELS[name], name
    folder = pathlib.Path(name)
    if not folder.is_dir():
        raise app.UsageError(
            f"--model is {name!r}; wanted one of {', '.join(MODELS)}, or a model's folder"
        )
    return folder, folder.resolve().name


def _fields() -> dict[str, Any]:
    """Fields of EngineConfig, as --engine_config gives them."""
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    found = {}
    for given in _ENGINE_CONFIG.value:
        name, _, text = given.partition("=")
        if name not in names or not text:
            raise app.UsageError(
                f"--engine_config has {given!r}; wanted FIELD=VALUE of {', '.join(names)}"
            )
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def _numbers(name: str, given: Sequence[str], *, low: float) -> list[float]:
    try:
        numbers = [float(text) for text in given]
    except ValueError:
        numbers = [math.nan]
    if not all(number >= low for number in numbers):
        raise app.UsageError(f"--{name} is {','.join(given)!r}; wanted numbers >= {low:g}")
    return numbers


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
