# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Token blocks: the k and v of a group's tokens, on their way from HBM into VMEM."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.kv_write.tpu.grouping import Group
from pallas_paged.kv_write.tpu.refs import Refs
from pallas_paged.kv_write.tpu.spec import KernelSpec


def start_loads(spec: KernelSpec, refs: Refs, group: Group, stage: jax.Array) -> None:
    """Starts to bring a group's token block into a stage."""
    for condition, copy in _copies(spec, refs, group, stage):
        _when(condition, copy.start)


def wait_loads(spec: KernelSpec, refs: Refs, group: Group, stage: jax.Array) -> None:
    """Waits until the stage holds the token block."""
    for condition, copy in _copies(spec, refs, group, stage):
        _when(condition, copy.wait)


def _copies(
    spec: KernelSpec, refs: Refs, group: Group, stage: jax.Array
) -> Iterator[tuple[jax.Array | None, Any]]:
    """(condition or None, copy) of a block's k and v, and of the batch's tail."""
    start, needed_end = group.block_start, group.needed_end
    rows = (needed_end - start + spec.row_align - 1) & -spec.row_align
    if spec.has_tail:
        rows = jnp.minimum(rows, spec.aligned_tokens - start)
    rows = pl.multiple_of(rows, spec.row_align)
    for hbm, vmem in ((refs.k, refs.k_vmem), (refs.v, refs.v_vmem)):
        yield (
            None,
            pltpu.make_async_copy(
                hbm.at[pl.ds(pl.multiple_of(start, spec.row_align), rows)],
                vmem.at[stage, pl.ds(0, rows)],
                refs.load_sems.at[stage],
            ),
        )
    if not spec.has_tail:
        return
    for tail, vmem in ((refs.k_tail, refs.k_vmem), (refs.v_tail, refs.v_vmem)):
        row = pl.multiple_of(spec.aligned_tokens - start, spec.row_align)
        yield (
            needed_end > spec.aligned_tokens,
            pltpu.make_async_copy(
                tail, vmem.at[stage, pl.ds(row, spec.row_align)], refs.load_sems.at[stage]
            ),
        )


def _when(condition: jax.Array | None, action: Callable[[], Any]) -> None:
    if condition is None:
        action()
    else:
        pl.when(condition)(action)
