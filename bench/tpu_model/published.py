# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the schedule model is worth: its prediction of a published TPU v6e measurement.

vLLM pull request 20415 chose the block size of its KV-cache update kernel from a notebook of
measurements on a v6e (tengyifei/playground, pallas/better-index-copy.ipynb): 2048 tokens of 4
combined heads x 128, bf16, as 24 slices of 64 tokens and 512 slices of one, padded to a multiple
of n with empty slices; each grid step copies n slices HBM -> VMEM, waits for all, copies them
VMEM -> HBM and waits for all. Its profile gives the time of a step for six values of n.

The same kernel is written here from that description, compiled for v6e with default bounds checks
and timed by `step_cycles`: one bundle a cycle, and each DMA lands a fixed latency after its issue.
A wait is thus free when enough bundles lie between it and its DMA's issue, and that is how latency
enters: twice a grid step, before the last waits of either phase. With n >= 128 the waits' own
bundles cover it and the prediction rests on the schedule alone; below, it rests on the latency,
which is fitted to these very data. Bandwidth is not modelled: HBM needs 1.3 us each way.

Known differences from the measurement: a static grid, no trace flags, today's libtpu, and operands
forced into HBM (the notebook let XLA put them where it liked).

    python -m bench.tpu_model.published
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench import report
from bench.cases.rounding import ceil_div
from bench.tpu_model.schedule import (
    GENERATIONS,
    Counts,
    Job,
    Kernel,
    Node,
    describe,
    microseconds,
    schedules,
)

GENERATION = "v6e"
# Slices per grid step -> microseconds a call, as printed by the notebook.
PUBLISHED_US = {8: 75.9, 16: 45.8, 32: 30.7, 64: 24.0, 128: 22.8, 256: 27.3}
# Of the DMAs of these kernels, from issue to landed; fitted, not measured on its own.
DMA_LATENCY_NS = 450.0

_NUM_SLICES = 24 + 512
_NUM_TOKENS = 24 * 64 + 512
_PAGE_SIZE = 64
_POOL_TOKENS = 5607 * _PAGE_SIZE
_ROW = (4, 128)


@dataclasses.dataclass(frozen=True)
class Check:
    """One point of the comparison.

    Attributes:
      slices_per_step: n.
      bundles_per_slice: of a grid step.
      schedule_us: predicted from the schedule alone, without DMA latency.
      predicted_us: predicted with it.
      published_us: measured by others on a v6e.
    """

    slices_per_step: int
    bundles_per_slice: float
    schedule_us: float
    predicted_us: float
    published_us: float

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted_us / self.published_us - 1


def index_copy(
    slices_per_step: int,
) -> tuple[Callable[..., jax.Array], tuple[Any, ...], dict[str, Any]]:
    """The kernel as a `Job` target: see `aot_compile` for what it returns."""

    def run(slices: jax.Array, new_kv: jax.Array, pool: jax.Array) -> jax.Array:
        return pl.pallas_call(
            functools.partial(_index_copy_kernel, slices_per_step=slices_per_step),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * 2,
                out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
                grid=(_num_steps(slices_per_step),),
                scratch_shapes=[
                    pltpu.VMEM((slices_per_step, _PAGE_SIZE, *_ROW), new_kv.dtype),
                    pltpu.SemaphoreType.DMA,
                ],
            ),
            out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
            input_output_aliases={2: 0},
            name="index_copy",
        )(slices, new_kv, pool)

    padded = _num_steps(slices_per_step) * slices_per_step
    args = (
        jax.ShapeDtypeStruct((3, padded), jnp.int32),
        jax.ShapeDtypeStruct((_NUM_TOKENS, *_ROW), jnp.bfloat16),
        jax.ShapeDtypeStruct((_POOL_TOKENS, *_ROW), jnp.bfloat16),
    )
    return run, args, {"donate_argnums": 2}


def _index_copy_kernel(
    # scalar prefetch
    slices_smem: Any,  # i32[3, padded]: first pool row, first new row, length
    # inputs
    new_kv_hbm: Any,  # [num_tokens, 4, 128]
    _: Any,  # the pool, aliased
    # outputs
    pool_hbm: Any,  # [pool_tokens, 4, 128]
    # scratch
    block_vmem: Any,  # [slices_per_step, page_size, 4, 128]
    sem: Any,
    *,
    slices_per_step: int,
) -> None:
    first = pl.program_id(0) * slices_per_step

    def transfer(i: int, into_vmem: bool) -> Any:
        to, start, length = (slices_smem[row, first + i] for row in range(3))
        block = block_vmem.at[i, pl.ds(0, length)]
        if into_vmem:
            return pltpu.make_async_copy(new_kv_hbm.at[pl.ds(start, length)], block, sem)
        return pltpu.make_async_copy(block, pool_hbm.at[pl.ds(to, length)], sem)

    for into_vmem in (True, False):
        transfers = [transfer(i, into_vmem) for i in range(slices_per_step)]
        for t in transfers:
            t.start()
        for t in transfers:
            t.wait()


def step_cycles(bundles: Sequence[Counts], latency_cycles: float) -> float:
    """Cycles of a straight line of bundles in which each wait takes the oldest DMA in flight.

    Args:
      bundles: counts of each bundle.
      latency_cycles: from a DMA's issue to its landing.
    """
    clock = 0.0
    landings: collections.deque[float] = collections.deque()
    for bundle in bundles:
        clock += 1
        landings.extend([clock + latency_cycles] * int(bundle.dma_issues))
        for _ in range(int(bundle.dma_waits)):
            clock = max(clock, landings.popleft())
    return clock


def check_model(*, on_done: Callable[[Job, float], None] | None = None) -> list[Check]:
    """Compiles the six kernels and predicts what was published.

    Raises:
      RuntimeError: libtpu is missing or failed.
      ValueError: the compiled kernel is not the one that was measured.
    """
    jobs = [
        Job(
            f"index_copy {n}",
            "bench.tpu_model.published:index_copy",
            GENERATION,
            {"slices_per_step": n},
        )
        for n in PUBLISHED_US
    ]
    compiled = schedules(jobs, on_done=on_done)
    return [
        _check(schedule.kernel("index_copy"), n)
        for n, schedule in zip(PUBLISHED_US, compiled, strict=True)
    ]


def format_check(checks: Sequence[Check]) -> str:
    """The comparison as a table and a sentence on its worst error."""
    rows = [
        {
            "slices/step": c.slices_per_step,
            "bundles/slice": f"{c.bundles_per_slice:.1f}",
            "schedule alone us": f"{c.schedule_us:.1f}",
            "predicted us": f"{c.predicted_us:.1f}",
            "published us": f"{c.published_us:.1f}",
            "error": f"{c.error:+.1%}",
        }
        for c in checks
    ]
    low, high = min(c.error for c in checks), max(c.error for c in checks)
    return (
        f"{report.table(rows)}\n"
        f"Model against vLLM PR 20415 (v6e): predicted is {low:+.1%} to {high:+.1%} of published;"
        f" DMA latency {DMA_LATENCY_NS:.0f} ns is fitted to these data and matters below 128."
    )


def _check(kernel: Kernel, slices_per_step: int) -> Check:
    if any(o.space != "hbm" for o in kernel.operands if o.shape.startswith("bf16")):
        raise ValueError(f"index_copy: XLA put an operand outside HBM: {kernel.operands}")
    loop = _grid_loop(kernel, slices_per_step)
    steps = _num_steps(slices_per_step)
    step = kernel.bundles[loop.first : loop.last + 1]
    latency = DMA_LATENCY_NS * GENERATIONS[GENERATION].clock_ghz
    once = kernel.tree.own.bundles
    return Check(
        slices_per_step,
        len(step) / slices_per_step,
        microseconds(once + steps * len(step), GENERATION),
        microseconds(once + steps * step_cycles(step, latency), GENERATION),
        PUBLISHED_US[slices_per_step],
    )


def _grid_loop(kernel: Kernel, slices_per_step: int) -> Node:
    """The loop over grid steps, which must hold a step's DMAs and no branch."""
    wanted = {"hbm_to_vmem": slices_per_step, "vmem_to_hbm": slices_per_step}
    children = kernel.tree.children
    if len(children) != 1 or children[0].kind != "loop" or children[0].own.dmas != wanted:
        raise ValueError(
            f"index_copy: want one straight loop with {wanted}, got\n{describe(kernel.tree)}"
        )
    return children[0]


def _num_steps(slices_per_step: int) -> int:
    return ceil_div(_NUM_SLICES, slices_per_step)


def main() -> None:
    """Prints the comparison."""
    with report.Progress(len(PUBLISHED_US), "compiling") as progress:
        checks = check_model(on_done=lambda job, _: progress.step(job.name))
    sys.stdout.write(format_check(checks) + "\n")


if __name__ == "__main__":
    main()
