# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Measure the attention on this device, alone, beside the oracle and beside other libraries."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import clock, report
from bench.cases.attention import SCALES, Call, Case, room_for
from bench.cases.rounding import ceil_div
from bench.peers import attention as attention_peers
from bench.peers import child as peers

# What a TPU's caches and memories may hold; pools rotate until they are larger together.
_COLD_BYTES = 2**28


def random_inputs(case: Case, seed: int) -> tuple[jax.Array, ...]:
    """Pool, q and metadata of a case: pages in random order, ids of unused entries absurd."""
    rng = np.random.default_rng(seed)
    q, pool, kv_lens, table, *_ = case.call.shapes()
    keys = jax.random.split(jax.random.key(seed), 2)
    lens = np.array(case.lens, np.int32)
    used = ceil_div(lens[:, 1], case.call.page_size)
    pages = rng.permutation(pool.shape[0])[: used.sum()].astype(np.int32)
    page_indices = np.full(table.shape, -(2**31) + 7, np.int32)
    for row, ids in enumerate(np.split(pages, np.cumsum(used)[:-1])):
        page_indices[row, : len(ids)] = ids
    cu_q_lens = np.zeros(kv_lens.shape[0] + 1, np.int32)
    cu_q_lens[1 : len(lens) + 1] = np.cumsum(lens[:, 0])
    cu_q_lens[len(lens) + 1 :] = cu_q_lens[len(lens)]
    all_lens = np.zeros(kv_lens.shape, np.int32)
    all_lens[: len(lens)] = lens[:, 1]
    return (
        _random_pool(keys[0], case.call, pool),
        jax.random.normal(keys[1], q.shape, q.dtype),
        jnp.asarray(all_lens),
        jnp.asarray(page_indices),
        jnp.asarray(cu_q_lens),
        jnp.array([len(lens)], jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_pool(key: jax.Array, call: Call, pool: jax.ShapeDtypeStruct) -> jax.Array:
    """Values that are normal after the scale; drawn where they are used."""
    values = jax.random.normal(key, pool.shape, jnp.bfloat16)
    if call.pool_dtype in SCALES:
        values = values / SCALES[call.pool_dtype][0]
    return (jnp.rint(values) if pool.dtype == jnp.int8 else values).astype(pool.dtype)


def measure(case: Case, backend: str, *, by_wall_clock: bool = False) -> dict[str, Any]:
    """Times a backend on a case, from caches that hold nothing of the pool.

    On a GPU its kernels' times, each step after an eviction; on a TPU a loop over pools that
    rotate, where the next step's q is this step's output, so that nothing is hoisted or reordered.
    On a CPU, and with `by_wall_clock`, single calls, one after the other.
    """
    case = _in_exact_room(case)
    attend = case.call.step(backend)
    pool, q, *metadata = random_inputs(case, seed=0)
    once = (step_of_inputs(attend), [jnp.zeros_like(q)], (q, pool, *metadata))
    if by_wall_clock or jax.default_backend() == "cpu":
        timing = clock.time_calls(*once)
    elif jax.default_backend() == "gpu":
        timing = clock.time_kernels(*once)
    else:
        copies = max(2, min(16, ceil_div(_COLD_BYTES, pool.nbytes)))
        states = [(pool, q), *((pool.copy(), q.copy()) for _ in range(copies - 1))]

        def step(state: tuple[Any, Any], *metadata: jax.Array) -> tuple[Any, Any]:
            pool, q = state
            return pool, attend(q, pool, *metadata)

        timing = clock.time_step(step, states, metadata)
    return as_record(case, timing)


def measure_beside_oracle(case: Case, backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times a backend and the oracle by turns, by the wall clock; the oracle as a peer's row."""
    case = _in_exact_room(case)
    pool, q, *metadata = random_inputs(case, seed=0)
    timings = clock.time_calls_in_turn(
        [step_of_inputs(case.call.step(name)) for name in (backend, "oracle")],
        [jnp.zeros_like(q)],
        (q, pool, *metadata),
    )
    ours, oracle = (as_record(case, timing) for timing in timings)
    return ours, oracle | {
        "peer": "oracle",
        "ours_us": ours["median_us"],
        "ours_over": ours["median_us"] / oracle["median_us"],
    }


def _in_exact_room(case: Case) -> Case:
    """The case with no more room in its call than its lengths need."""
    room = room_for([case.runs], case.call.page_size, is_exact=True)
    return dataclasses.replace(case, call=dataclasses.replace(case.call, **room))


def step_of_inputs(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The step of a timing that is no loop. Its state is the last output alone: q and the pool are
    inputs, so that nothing can be copied, and q stays as it is, for zeros would cost less power and
    time."""

    def step(last: jax.Array, *inputs: jax.Array) -> Any:
        del last
        return attend(*inputs)

    return step


def as_record(case: Case, timing: clock.Timing) -> dict[str, Any]:
    """A measured case as it goes into the JSON; bytes and operations by one count for everybody."""
    call = case.call
    return {
        "case": case.name,
        "runs": case.runs,
        "page_size": call.page_size,
        "num_heads": call.num_heads,
        "num_kv_heads": call.num_kv_heads,
        "head_dim": call.head_dim,
        "pool_dtype": call.pool_dtype or call.dtype,
        "bytes": case.num_bytes,
        "flop": case.flop,
        "gb_per_s": timing.gb_per_s(case.num_bytes),
        "tflop_per_s": case.flop / timing.median_us * 1e-6,
        **dataclasses.asdict(timing),
    }


def measured_text(rows: Sequence[dict[str, Any]], device: str) -> str:
    cells = [
        {**_case_cells(row), "MB": f"{row['bytes'] / 1e6:.2f}", **_time_cells(row)} for row in rows
    ]
    return (
        f"Measured on {device} ({rows[0]['method']}), pool {rows[0]['pool_dtype']}; operations of "
        f"pairs that the mask lets see.\n{report.table(cells, indent=2)}"
    )


def _case_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "heads": f"{row['num_heads']}/{row['num_kv_heads']}/{row['head_dim']}",
        "case": row["case"],
        "page": str(row["page_size"]),
    }


def _time_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "us": f"{row['median_us']:.1f}",
        "p20": f"{row['p20_us']:.1f}",
        "p80": f"{row['p80_us']:.1f}",
        "GB/s": f"{row['gb_per_s']:,.0f}",
        "TFLOP/s": f"{row['tflop_per_s']:.2f}",
    }


# --- other libraries --------------------------------------------------------------------------


def measure_peers(
    cases: Sequence[Case], ours: Sequence[dict[str, Any]], libraries: Sequence[str]
) -> list[dict[str, Any]]:
    """Every peer on every case, with our time beside it; or why it does not run the case.

    Args:
      cases: what is measured.
      ours: what `measure` says of each.
      libraries: keys of `peers.MODULES`.
    """
    names = [n for n, peer in attention_peers.PEERS.items() if peer.library in libraries]
    found: dict[tuple, clock.Timing | str] = {}
    rows = []
    with peers.Child() as run, report.Progress(len(cases) * len(names), "measuring") as progress:
        for (case, own), name in itertools.product(zip(cases, ours, strict=True), names):
            page = case.call.page_size if attention_peers.PEERS[name].is_paged else None
            shape = dataclasses.replace(case.call, page_size=0, **_NO_ROOM)
            key = (name, case.runs, shape, page)
            if key not in found:  # contiguous keys are measured once for all page sizes
                found[key] = run(attention_peers.measure, name, case)
            progress.step(f"{name} {case.name}")
            result = found[key]
            row = {"peer": name, "ours_us": own["median_us"]}
            if isinstance(result, str):
                rows.append(row | {"case": case.name, "refusal": result})
            else:
                measured = as_record(case, result)
                rows.append(measured | row | {"ours_over": own["median_us"] / result.median_us})
    return rows


# What the lengths need differs with the page size.
_NO_ROOM = {"max_seqs": 0, "table_width": 0, "num_tokens": 0, "num_pages": 0}


def peers_text(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        {
            **_case_cells(row),
            "other": row["peer"],
            **_time_cells(row),
            "ours us": f"{row['ours_us']:.1f}",
            "ours over it": f"{row['ours_over']:.2f}x",
        }
        for row in rows
        if "refusal" not in row
    ]
    refusals = {
        f"  {row['peer']}, {row['case']}: {row['refusal']}" for row in rows if "refusal" in row
    }
    text = ["\nOthers, measured on this device; the same bytes and operations counted."]
    text += [report.table(cells, indent=2)] if cells else []
    text += ["Not run by", *sorted(refusals)] if refusals else []
    return "\n".join(text)
