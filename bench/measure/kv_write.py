# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Measure the writes, beside what else moves the same bytes: the plain scatter and a plain copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import clock, report
from bench.cases.kv_write import WriteCase


def random_inputs(case: WriteCase, seed: int) -> tuple[jax.Array, ...]:
    """Arrays for `case.step`: a pool that is never zero, pages in random order."""
    rng = np.random.default_rng(seed)
    pool, k, v, *_ = case.shapes()
    num_pages, page_size = pool.shape[:2]
    pages = rng.permutation(num_pages)[: case.num_pages].astype(np.int32)
    starts = np.arange(case.num_pages, dtype=np.int32) * page_size
    slots = rng.permutation(num_pages * page_size)[: case.num_tokens].astype(np.int32)
    index = {
        "page": (pages,),
        "page_starts": (pages, starts),
        "slice": (
            np.stack([pages * page_size, starts, np.full_like(starts, page_size)]),
            np.array([case.num_pages], np.int32),
        ),
        "token": (slots,),
    }[case.op]
    # Drawn where they are used: half a GiB of normals takes a host half a minute.
    keys = jax.random.split(jax.random.key(seed), 3)
    tensors = (
        jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, (pool, k, v), strict=True)
    )
    return (*tensors, *(jnp.asarray(x) for x in index))


def time_write(step: Any, case: WriteCase) -> clock.Timing:
    """Times a step over pools that rotate, so that no cache holds the one that is written."""
    first, k, v, *index = random_inputs(case, seed=0)
    pools = [first, first + 1] if jax.default_backend() != "cpu" else [first]
    return clock.time_step(step, pools, (k, v, *index))


def measure_op(case: WriteCase) -> dict[str, Any]:
    """The platform's backend on a case."""
    return as_record(case, case.op, time_write(case.step("auto"), case))


def measure_scatter(case: WriteCase, unique: bool) -> dict[str, Any]:
    """What people write: k and v interleaved, then one scatter by slot.

    Args:
      case: of the op "token".
      unique: promise XLA that no slot comes twice and none is out of range (which no -1 survives).
    """
    promise: dict[str, Any] = {"unique_indices": True, "mode": "promise_in_bounds"}

    def scatter(kv_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
        rows = jnp.stack([k, v], axis=2).reshape(case.num_tokens, -1, kv_pages.shape[-1])
        flat = kv_pages.reshape(-1, *kv_pages.shape[2:])
        rows = jnp.pad(rows, ((0, 0), (0, flat.shape[1] - rows.shape[1]), (0, 0)))
        return flat.at[slots].set(rows, **(promise if unique else {})).reshape(kv_pages.shape)

    name = ".at[slots].set" + (", unique and in bounds" if unique else "")
    return as_record(case, name, time_write(scatter, case))


def measure_copy(case: WriteCase) -> dict[str, Any]:
    """A copy that reads and writes as many bytes as the case."""
    source = jax.random.normal(
        jax.random.key(0), (case.num_bytes // 2 // jnp.dtype(case.dtype).itemsize,), case.dtype
    )

    def copy(halves: jax.Array, source: jax.Array) -> jax.Array:
        # Into half of an array, because XLA would hand on the source itself for a whole one.
        return jax.lax.dynamic_update_index_in_dim(halves, source, 0, 0)

    states = [jnp.stack([source, source])]
    return as_record(case, "copy", clock.time_step(copy, states, (source,)))


def as_record(case: WriteCase, name: str, timing: clock.Timing) -> dict[str, Any]:
    """What goes into the JSON of a measured case."""
    return {
        "op": name,
        "page_size": case.page_size,
        "num_tokens": case.num_tokens,
        "bytes": case.num_bytes,
        "gb_per_s": timing.gb_per_s(case.num_bytes),
        **dataclasses.asdict(timing),
    }


def text(rows: Sequence[dict[str, Any]], device: str) -> str:
    """The table of measured ops."""
    cells = [
        {
            "op": row["op"],
            "page": "-" if row["op"] == "token" else str(row["page_size"]),
            **_cells(row),
        }
        for row in rows
    ]
    return f"Measured on {device} ({rows[0]['method']}).\n{report.table(cells, indent=2)}"


def baseline_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of what is measured beside them."""
    return report.table([{"what": row["op"], **_cells(row)} for row in rows], indent=2)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "tokens": f"{row['num_tokens']:,}",
        "MB": f"{row['bytes'] / 1e6:.2f}",
        "us": f"{row['median_us']:,.2f}",
        "p20": f"{row['p20_us']:,.2f}",
        "p80": f"{row['p80_us']:,.2f}",
        "GB/s": f"{row['gb_per_s']:,.2f}",
    }


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Points of a plot: op -> (tokens, microseconds), for the smallest page size."""
    found: dict[str, list] = {}
    page_size = min(row["page_size"] for row in rows)
    for row in rows:
        if row["page_size"] == page_size:
            found.setdefault(row["op"], []).append((row["num_tokens"], row["median_us"]))
    return found
