# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the comparisons with other libraries share: the flag, a process of their own, their clock.

The libraries are no dependency of the project and are imported when they are asked for, in a child
process: only one user of a process can record a GPU's kernels (CUPTI has one subscriber), and jax
is one.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

from absl import app

from bench import clock, report

# What each peer imports.
MODULES = {"torch": ("torch",), "flashinfer": ("torch", "flashinfer")}

_REPEATS, _WARMUP = 20, 3


def require(names: Sequence[str], *, on_gpu: bool) -> None:
    """Ends the program if one of --peers is unknown or cannot be measured here.

    Raises:
      app.UsageError: with the sentence.
    """
    report.require_choices("peers", MODULES, names)
    if names and not on_gpu:
        raise app.UsageError("--peers are measured on a GPU, and there is none")
    for name in names:
        for module in MODULES[name]:
            if importlib.util.find_spec(module) is None:
                raise app.UsageError(
                    f"--peers has {name!r}, and the package {module!r} is not installed"
                )


class Child:
    """A process that runs functions of this package, one after another.

    with Child() as run:
        timing = run(function, *arguments)
    """

    def __enter__(self) -> Callable[..., Any]:
        # Spawned: a fork of a process whose jax has threads may never get on.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        return lambda function, *args: self._pool.submit(function, *args).result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def import_torch() -> Any:
    """PyTorch, in a child process.

    Raises:
      app.UsageError: it has no GPU, as a build of it for CPUs has not.
    """
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise app.UsageError(
            f"--peers need a PyTorch with CUDA, and {torch.__version__} has no GPU"
        )
    return torch


def time_kernels(torch: Any, step: Callable[[], Any]) -> clock.Timing:
    """Kernel time of a step in PyTorch from a cold L2, as `clock.time_kernels` takes jax's."""
    filler = torch.ones(clock.EVICT_BYTES // 4, device="cuda")
    for _ in range(_WARMUP):
        step()
    evicting = {event.name for event in record_kernels(torch, filler.max)}

    def all_of_them() -> None:
        for _ in range(_REPEATS):
            filler.max()
            torch.cuda.synchronize()
            step()
            torch.cuda.synchronize()

    return clock.summarise_kernels(
        record_kernels(torch, all_of_them), lambda event: event.name in evicting, _REPEATS
    )


def record_kernels(torch: Any, call: Callable[[], Any]) -> list[clock.Event]:
    """What a call runs on the GPU, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return [clock.Event(e.name, float(e.time_range.end - e.time_range.start)) for e in events]
