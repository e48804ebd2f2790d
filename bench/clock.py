# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""How long a jitted function takes.

Three ways, and a `Timing` says which one it is. `time_calls` reads the wall clock around one call:
right on a CPU, where a call is long against Python's dispatch, and for what a caller waits for.
`time_loop` runs the step n and 2n
times inside one jitted loop and divides the difference by n: dispatch and transfer are in both and
cancel, so that it is the one to use on a TPU. `time_kernels` adds up what the driver says each of a
step's kernels took (CUPTI, through jax.profiler): on a GPU a step of 2 us is shorter than the gap
between two launches. `time_step` chooses by the device.

All take steps that update a donated state (the pool) and can rotate over several states, so that
no step finds in a cache what the step before it left there; `time_kernels` empties the cache too.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

EVICT_BYTES = 2**28  # several times the L2 of any GPU (50 MB on an H100)
# A Timing's method.
KERNEL_TIME = "kernel time, cold L2"
WALL_CLOCK = "wall clock"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one step over several repeats.

    Attributes:
      median_us: the median.
      p20_us: a fifth of the repeats were faster.
      p80_us: a fifth of the repeats were slower.
      repeats: number of samples.
      method: "wall clock", "in-jit loop" or "kernel time, cold L2".
    """

    median_us: float
    p20_us: float
    p80_us: float
    repeats: int
    method: str

    def gb_per_s(self, num_bytes: float) -> float:
        """1e9 bytes a second at the median, for a step that moves `num_bytes`."""
        return num_bytes / self.median_us * 1e-3


def summarise(samples_us: Sequence[float], method: str) -> Timing:
    """Median and percentiles (interpolated) of samples.

    Raises:
      ValueError: no samples.
    """
    if not samples_us:
        raise ValueError("summarise: samples_us is empty; want one sample or more")
    if len(samples_us) == 1:
        p20 = p80 = samples_us[0]
    else:
        p20, _, _, p80 = statistics.quantiles(samples_us, n=5, method="inclusive")
    return Timing(statistics.median(samples_us), p20, p80, len(samples_us), method)


def time_step(
    step: Callable[..., Any],
    states: Sequence[Any],
    inputs: Sequence[Any] = (),
    *,
    repeats: int = 20,
    iterations: int = 64,
) -> Timing:
    """Times `state = step(state, *inputs)` the way that suits the default device.

    Args:
      step: returns a state of the same shapes and dtypes. Plain or jitted.
      states: one state, or several to rotate over. They are donated: do not use them afterwards.
      inputs: arrays that every step reads.
      repeats: samples.
      iterations: of the in-jit loop; only a TPU uses it.
    """
    platform = jax.devices()[0].platform
    if platform == "cpu":
        return time_calls(step, states, inputs, repeats=repeats)
    if platform == "gpu":
        return time_kernels(step, states, inputs, repeats=repeats)
    return time_loop(step, states, inputs, repeats=repeats, iterations=iterations)


def time_calls(
    step: Callable[..., Any],
    states: Sequence[Any],
    inputs: Sequence[Any] = (),
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> Timing:
    """Times single calls by the wall clock, Python's dispatch included.

    Args:
      step: see `time_step`.
      states: see `time_step`.
      inputs: see `time_step`.
      repeats: samples.
      warmup: calls before the first sample, one for each state at least; the first one compiles.
    """
    [timing] = time_calls_in_turn([step], states, inputs, repeats=repeats, warmup=warmup)
    return timing


def time_calls_in_turn(
    steps: Sequence[Callable[..., Any]],
    states: Sequence[Any],
    inputs: Sequence[Any] = (),
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> list[Timing]:
    """Times single calls of several steps by the wall clock, one call of each after the other.

    So what else the machine does in the meantime slows all of them alike.

    Args:
      steps: see `time_step`; each takes the state that the one before it returned.
      states: see `time_step`.
      inputs: see `time_step`.
      repeats: samples of each step.
      warmup: calls of each before its first sample, one for each state at least.

    Returns:
      a timing for each step.
    """
    _check_positive(repeats=repeats, states=len(states))
    runs = [jax.jit(step, donate_argnums=0) for step in steps]
    states = list(states)
    samples: list[list[float]] = [[] for _ in runs]
    warmup = max(warmup, len(states))
    for i in range(warmup + repeats):
        for run, of_run in zip(runs, samples, strict=True):
            state = jax.block_until_ready(states[i % len(states)])
            began = time.perf_counter()
            state = jax.block_until_ready(run(state, *inputs))
            of_run.append((time.perf_counter() - began) * 1e6)
            states[i % len(states)] = state
    return [summarise(of_run[warmup:], WALL_CLOCK) for of_run in samples]


def time_loop(
    step: Callable[..., Any],
    states: Sequence[Any],
    inputs: Sequence[Any] = (),
    *,
    repeats: int = 20,
    iterations: int = 64,
) -> Timing:
    """Times the step inside one jitted loop: (time of 2n rounds - time of n rounds) / n.

    A round is one step on each state. Trip counts are static, because XLA on a GPU reads a dynamic
    loop condition back to the host in every round.

    Args:
      step: see `time_step`. It must use its state, or the compiler hoists it out of the loop.
      states: see `time_step`.
      inputs: see `time_step`.
      repeats: samples.
      iterations: n, rounds of the shorter loop.

    Raises:
      ValueError: the longer loop was not the slower one in the median: n is too small for this
        machine's noise, or the compiler removed the step.
    """
    _check_positive(repeats=repeats, iterations=iterations, states=len(states))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def rounds(n: int, states: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return jax.lax.fori_loop(0, n, lambda _, s: tuple(step(x, *inputs) for x in s), states)

    carried, inputs = tuple(states), tuple(inputs)

    def seconds(n: int) -> float:
        nonlocal carried
        began = time.perf_counter()
        carried = jax.block_until_ready(rounds(n, carried, inputs))
        return time.perf_counter() - began

    jax.block_until_ready((carried, inputs))
    for n in (iterations, 2 * iterations):
        seconds(n)  # compiles
    steps = iterations * len(states)
    samples = []
    for _ in range(repeats):
        short = seconds(iterations)
        samples.append((seconds(2 * iterations) - short) / steps * 1e6)
    timing = summarise(samples, "in-jit loop")
    if timing.median_us <= 0:
        raise ValueError(
            f"time_loop: {2 * iterations} rounds took no longer than {iterations}; raise iterations"
        )
    return timing


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel, copy or fill that ran on a GPU.

    Attributes:
      name: as the driver has it; names of XLA's kernels do not tell one program's from another's.
      microseconds: how long it ran.
      module: the XLA program that launched it; None where that was not recorded.
      start_us: how many microseconds after the first one of the recording it started.
    """

    name: str
    microseconds: float
    module: str | None = None
    start_us: float = 0.0


def time_kernels(
    step: Callable[..., Any],
    states: Sequence[Any],
    inputs: Sequence[Any] = (),
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> Timing:
    """Adds up the time of a step's kernels and copies on a GPU, from an L2 that holds none of it.

    Before every step a large array is read, so that state and inputs come from memory. What passes
    between two kernels of one step is not counted: it is the host's.

    Args:
      step: see `time_step`.
      states: see `time_step`.
      inputs: see `time_step`.
      repeats: samples.
      warmup: steps before the first sample, one for each state at least; the first one compiles.

    Raises:
      RuntimeError: the profiler recorded no kernels of a step.
    """
    _check_positive(repeats=repeats, states=len(states))
    states = list(states)
    run = jax.jit(step, donate_argnums=0)
    evict = _eviction()

    def one(i: int) -> None:
        states[i % len(states)] = jax.block_until_ready(run(states[i % len(states)], *inputs))

    def all_of_them() -> None:
        for i in range(repeats):
            evict()
            one(i)

    for i in range(max(warmup, len(states))):
        one(i)
    events = record_kernels(all_of_them)
    if any(map(_is_eviction, events)):
        return summarise_kernels(events, _is_eviction, repeats)
    # Without the programs' names only a recording a step tells it from what empties the L2.
    samples = []
    for i in range(repeats):
        evict()
        samples.append(sum(e.microseconds for e in record_kernels(functools.partial(one, i))))
    return summarise(samples, KERNEL_TIME)


def summarise_kernels(
    events: Sequence[Event], is_eviction: Callable[[Event], bool], repeats: int
) -> Timing:
    """The time of a step's kernels, from what ran on the GPU, each step after an eviction.

    Args:
      events: in order.
      is_eviction: whether an event is of what empties the L2.
      repeats: steps.

    Raises:
      RuntimeError: there are not that many steps, or one is without a kernel.
    """
    samples: list[float] = []
    was_evicting = False
    for event in events:
        is_evicting = is_eviction(event)
        if is_evicting and not was_evicting:
            samples.append(0.0)
        elif not is_evicting and samples:
            samples[-1] += event.microseconds
        was_evicting = is_evicting
    if len(samples) != repeats or not all(samples):
        raise RuntimeError(
            f"summarise_kernels: the profiler recorded {len(samples)} steps of {repeats}, "
            f"{sum(map(bool, samples))} of them with kernels; want all. Events: "
            f"{sorted({(event.module or '', event.name) for event in events})}"
        )
    return summarise(samples, KERNEL_TIME)


def _evict_l2(filler: jax.Array) -> jax.Array:
    return jnp.max(filler)


@functools.cache
def _eviction() -> Callable[[], Any]:
    """What empties the L2: reads an array that is larger, in a program of its own name."""
    filler = jnp.ones((EVICT_BYTES // 4,), jnp.float32)
    read = jax.jit(_evict_l2)
    jax.block_until_ready(read(filler))  # compiles
    return lambda: jax.block_until_ready(read(filler))


def _is_eviction(event: Event) -> bool:
    return event.module is not None and event.module.endswith(_evict_l2.__name__)


def record_kernels(call: Callable[[], Any]) -> list[Event]:
    """What a call runs on the GPU, in order.

    Raises:
      RuntimeError: the default device is no GPU (the profiler would bring down a process that has
        compiled for a TPU ahead of time: it wants a TPU from the libtpu it finds), or nothing was
        recorded.
    """
    if (platform := jax.default_backend()) != "gpu":
        raise RuntimeError(f"record_kernels: the default device is a {platform}; want a GPU")
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        events = [
            event
            for path in pathlib.Path(folder).rglob("*.xplane.pb")
            for event in gpu_events(jax.profiler.ProfileData.from_file(str(path)))
        ]
    if not events:
        raise RuntimeError("record_kernels: the profiler recorded nothing on a GPU")
    return events


def gpu_events(profile: jax.profiler.ProfileData) -> list[Event]:
    """What ran on the GPUs of a profile, in order of its start.

    A GPU is a plane and each of its streams a line, "Stream #13(Compute,MemcpyD2D)"; other lines
    hold the same events by module and op. The launching program is an event's `hlo_module`.
    """
    found = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream #"):
                continue
            for event in line.events:
                stats = {name: value for name, value in event.stats if name == "hlo_module"}
                module = str(stats["hlo_module"]) if stats else None
                found.append((event.start_ns, Event(event.name, event.duration_ns / 1e3, module)))
    found.sort(key=lambda pair: pair[0])
    return [
        dataclasses.replace(event, start_us=(start - found[0][0]) / 1e3) for start, event in found
    ]


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; want 1 or more")
