# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Time the engine's own step on this device: batches, forms of write, and the host's part.

The program timed is the one that the engine runs (`model.run_step`), on batches that its own code
packs. Steps are dispatched one after the other and waited for together, so that the device is what
is timed as long as it takes longer than a dispatch. What the writes take of a step is read off its
kernels on a GPU whose writes have their own; elsewhere the writes are timed alone, in the same way:
those of all layers in one program without the rest of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench import clock
from bench.engine_study.cost import LLAMA3_8B, PAGE_SIZES, visible_pairs
from bench.engine_study.decode import longest_decode, start_decodes
from bench.engine_study.share import BATCHES, Batch
from reference_engine import compiles
from reference_engine import model as model_lib
from reference_engine.batch import Batch as Arrays
from reference_engine.batch import make_batch, pack, unpack
from reference_engine.config import EngineConfig, ModelConfig, num_pages_for
from reference_engine.engine import Engine
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Segment
from reference_engine.weights import Params, random_params

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
MODELS = {"llama3-8b": LLAMA3_8B, "tiny": TINY}
_EXTRA = (
    Batch("decode: 64 at 2,048", 64, 2048, ()),
    Batch("prefill: 2,048 on 0", 0, 0, ((0, 2048),)),
    Batch("prefill: 2,048 on 2,048", 0, 0, ((2048, 4096),)),
    Batch("mixed, chunk off the grid: 64 at 1,024, 1,984 on 1,029", 64, 1024, ((1029, 3013),)),
)
# Short steps first.
ALL_BATCHES = tuple(
    sorted(
        (*BATCHES[1:4], *_EXTRA), key=lambda batch: sum(end - start for start, end in batch.chunks)
    )
)

# How the names of the kernels that write begin.
_WRITES = ("page_write", "slice_write", "token_write")

# Long enough for the time of a dispatch not to matter.
_LONG_US = 250_000.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is run.

    Attributes:
      model: its shape.
      shrink: batches and lengths are divided by this, for machines without an accelerator.
      attention_backend, write_backend: see EngineConfig.
      steps, repeats: steps dispatched together, at most and as many as fill `_LONG_US`, and how
        often.
    """

    model: ModelConfig
    shrink: int = 1
    attention_backend: str = "auto"
    write_backend: str = "auto"
    steps: int = 8
    repeats: int = 5


def measure(
    setup: Setup, batches: Sequence[Batch], kv_writes: Sequence[str], page_sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Times every batch in every form at every page size; yields one row each.

    A row's `write_us` is the writes' part of a step, None of the fused form where it cannot be
    told from the attention; `kernels_us` all that runs in a step, None but on a GPU.
    """
    params = random_params(setup.model, seed=0)
    for page_size in page_sizes:
        kv_pages = _pool(setup, page_size)
        for batch in map(functools.partial(_shrunk, setup=setup), batches):
            for kv_write in kv_writes:
                config, arrays = _batch(batch, page_size, kv_write, setup)
                step = _step(setup, params, config, arrays)
                timing, kv_pages = _time(step, kv_pages, setup)
                write_us, kernels_us = None, None
                if jax.default_backend() == "gpu":
                    write_us, kernels_us, kv_pages = _time_kernels(step, kv_pages, setup)
                if write_us is None and kv_write != "fused":
                    alone = _writes(setup, config, arrays)
                    write, kv_pages = _time(alone, kv_pages, setup)
                    write_us = write.median_us
                yield {
                    "batch": batch.name,
                    "page_size": page_size,
                    "kv_write": kv_write,
                    "tokens": int(arrays.cu_q_lens[-1]),
                    "step_us": timing.median_us,
                    "p20_us": timing.p20_us,
                    "p80_us": timing.p80_us,
                    "kernels_us": kernels_us,
                    "write_us": write_us,
                }
        del kv_pages


def host_work(setup: Setup, num_steps: int = 30) -> dict[str, Any]:
    """The engine itself on decodes at batch 64: time of a step, and the host's part of it.

    `host_us` is a step's time without the wait for tokens. `late_percent` of the steps were
    dispatched when the device had already ended the step before (`Stats.num_late_steps`); before
    these it idled for no longer than the host works, so that `gap_us`, their product, bounds the
    mean time between two steps.
    """
    batch_size, context = 64, max(4, 1024 // setup.shrink)
    budget = max(2048 // setup.shrink, batch_size + 16)
    longest = longest_decode(batch_size, context, num_steps, budget)
    config = EngineConfig(
        page_size=16,
        num_pages=batch_size * num_pages_for(longest, 16) + 1,
        max_model_len=longest,
        max_num_batched_tokens=budget,
        max_num_seqs=batch_size,
        attention_backend=setup.attention_backend,
        write_backend=setup.write_backend,
    )
    # Not warmed up: of its shapes only few are needed, and steps compile those as they come.
    engine = Engine(random_params(setup.model, seed=0), setup.model, config)
    start_decodes(engine, batch_size, context, SamplingParams(), seed=0)
    samples = []
    num_late, num_compiles = engine.stats.num_late_steps, compiles.num_compiles()
    for _ in range(num_steps):
        before = dataclasses.replace(engine.stats)
        engine.step()
        seconds = engine.stats.seconds - before.seconds
        waited = engine.stats.wait_seconds - before.wait_seconds
        samples.append((seconds * 1e6, (seconds - waited) * 1e6))
    step_us, host_us = (float(np.median(column)) for column in zip(*samples, strict=True))
    late = (engine.stats.num_late_steps - num_late) / num_steps
    return {
        "batch": f"{batch_size} decodes at {context:,}",
        "step_us": step_us,
        "host_us": host_us,
        "host_percent": 100 * host_us / step_us,
        "late_percent": 100 * late,
        "gap_us": late * host_us,
        "recompiles": compiles.num_compiles() - num_compiles,
    }


def fit(rows: Sequence[dict[str, Any]], host_us: float, device: str) -> dict[str, Any] | None:
    """Fields of `engine_cost.Cost` that the rows say; None where batches are missing.

    Differences of batches that differ in one thing; the attention of a prefill's tokens stands with
    their rows, and that of a decode with the weights.
    """
    page_size = min(row["page_size"] for row in rows)
    found = {(row["batch"], row["kv_write"]): row for row in rows if row["page_size"] == page_size}
    names = [batch.name for batch in ALL_BATCHES]
    if any((name, form) not in found for name in names for form in ("tokens", "slices", "pages")):
        return None

    def compute(name: str) -> float:
        row = found[name, "slices"]
        return row["step_us"] - row["write_us"]

    def write(name: str, form: str) -> float:
        return found[name, form]["write_us"]

    decode, prefill = "decode: 64 at ", "prefill: 2,048 on "
    many, key_us = 2048, (compute(decode + "2,048") - compute(decode + "1,024")) / (64 * 1024)
    pair_us = max(0.0, (compute(prefill + "2,048") - compute(prefill + "0")) / many**2)
    row_us = (compute(prefill + "0") - visible_pairs(0, many) * pair_us) / many
    fused_us = 0.0
    if fused := found.get((prefill + "0", "fused")):
        fused_us = fused["write_us"] or max(0.0, fused["step_us"] - compute(prefill + "0"))
    page = {size: write(prefill + "0", "pages") * size / many for size in PAGE_SIZES}
    piece = {size: write(prefill + "0", "slices") * size / many for size in PAGE_SIZES}
    return {
        "name": device,
        "source": f"measured on {device}, pages of {page_size}",
        "host_us": host_us,
        "weights_us": compute(decode + "1,024") - 64 * 1024 * key_us,
        "row_us": row_us,
        "seq_us": 0.0,
        "decode_us": 0.0,
        "decode_key_us": key_us,
        "prefilled_us": 0.0,
        "pair_us": pair_us,
        "written_us": 0.0,
        "page_us": page,
        "slice_us": piece,
        "token_us": write(prefill + "0", "tokens") / many,
        "fused_us": (fused_us / many,) * 2,
        "descriptor_us": 0.0,
    }


def _shrunk(batch: Batch, setup: Setup) -> Batch:
    by = setup.shrink
    if by == 1:
        return batch
    # Off the grid stays off the grid.
    chunks = tuple(
        (start // by + start % 16, start // by + start % 16 + (end - start) // by)
        for start, end in batch.chunks
    )
    return dataclasses.replace(
        batch, decodes=batch.decodes // by, context=batch.context // by, chunks=chunks
    )


def _sequences(batch: Batch) -> list[tuple[int, int]]:
    return [(batch.context - 1, batch.context)] * batch.decodes + list(batch.chunks)


def _num_pages(setup: Setup, page_size: int) -> int:
    return max(
        sum(num_pages_for(end, page_size) for _, end in _sequences(_shrunk(batch, setup)))
        for batch in ALL_BATCHES
    )


def _pool(setup: Setup, page_size: int) -> jax.Array:
    return model_lib.make_pool(setup.model, _num_pages(setup, page_size), page_size)


def _batch(
    batch: Batch, page_size: int, kv_write: str, setup: Setup
) -> tuple[EngineConfig, Arrays]:
    """The batch as the engine packs it, pages in random order, without padding."""
    rng = np.random.default_rng(0)
    sequences = _sequences(batch)
    num_pages = _num_pages(setup, page_size)
    pages = iter(rng.permutation(num_pages).tolist())
    segments = [
        Segment(
            i,
            start,
            tuple(rng.integers(setup.model.vocab_size, size=end - start).tolist()),
            tuple(next(pages) for _ in range(num_pages_for(end, page_size))),
            samples=True,
            is_decode=i < batch.decodes,
        )
        for i, (start, end) in enumerate(sequences)
    ]
    tokens = sum(end - start for start, end in sequences)
    config = EngineConfig(
        page_size=page_size,
        num_pages=num_pages,
        max_model_len=max(e for _, e in sequences),
        max_num_batched_tokens=tokens,
        max_num_seqs=len(sequences),
        kv_write=kv_write,
        page_aligned_scheduling=False,
        attention_backend=setup.attention_backend,
        write_backend="auto" if kv_write == "fused" else setup.write_backend,
    )
    return config, make_batch(segments, config)


def _step(
    setup: Setup, params: Params, config: EngineConfig, arrays: Arrays
) -> Callable[[jax.Array], jax.Array]:
    """The engine's step on a batch, from pool to pool."""
    packed, spec = pack(arrays[:-1])
    packed = jax.device_put(packed)
    page_table = jax.device_put(arrays.page_indices)
    no_tokens = jnp.zeros(len(arrays.kv_lens), jnp.int32)

    is_decode = len(arrays.token_ids) == len(arrays.kv_lens)  # there is no padding

    def step(kv_pages: jax.Array) -> jax.Array:
        nonlocal page_table  # it is donated, too
        _, kv_pages, page_table = model_lib.run_step(
            params,
            kv_pages,
            page_table,
            packed,
            no_tokens,
            spec=spec,
            model=setup.model,
            options=model_lib.StepOptions.of(config, is_decode=is_decode),
        )
        return kv_pages

    return step


def _writes(setup: Setup, config: EngineConfig, arrays: Arrays) -> Callable[[jax.Array], jax.Array]:
    """The writes of all layers of a batch, from pool to pool."""
    packed, spec = pack(arrays)
    packed = jax.device_put(packed)
    width = setup.model.num_kv_heads * setup.model.head_dim
    shape = (setup.model.num_layers, len(arrays.token_ids), width)
    k, v = (
        jax.random.normal(key, shape, jnp.dtype(setup.model.dtype))
        for key in jax.random.split(jax.random.key(0))
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def write_all_layers(
        kv_pages: jax.Array, packed: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        batch = Arrays(*unpack(packed, spec))
        per_layer = kv_pages.shape[0] // setup.model.num_layers

        def layer(carry: tuple[Any, Any], xs: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            kv_pages, first_page = carry
            placed = model_lib.in_layer(batch, first_page, kv_pages.shape[1])
            kv_pages = model_lib.write_kv(kv_pages, *xs, placed, setup.model, config.write_backend)
            return (kv_pages, first_page + per_layer), None

        (kv_pages, _), _ = lax.scan(layer, (kv_pages, 0), (k, v))
        return kv_pages

    return lambda kv_pages: write_all_layers(kv_pages, packed, k, v)


def _time_kernels(
    step: Callable[[jax.Array], jax.Array], kv_pages: jax.Array, setup: Setup
) -> tuple[float | None, float, jax.Array]:
    """What the kernels that write, None if there are none, and all kernels of a step take."""

    def run() -> None:
        nonlocal kv_pages
        for _ in range(setup.repeats):
            kv_pages = jax.block_until_ready(step(kv_pages))

    times = [
        (event.name, event.microseconds / setup.repeats) for event in clock.record_kernels(run)
    ]
    writes = [time for name, time in times if name.startswith(_WRITES)]
    return sum(writes) if writes else None, sum(time for _, time in times), kv_pages


def _time(
    step: Callable[[jax.Array], jax.Array], kv_pages: jax.Array, setup: Setup
) -> tuple[clock.Timing, jax.Array]:
    def run(steps: int) -> float:
        nonlocal kv_pages
        began = time.perf_counter()
        for _ in range(steps):
            kv_pages = step(kv_pages)
        jax.block_until_ready(kv_pages)
        return (time.perf_counter() - began) / steps * 1e6

    run(1)  # compiles
    steps = min(setup.steps, max(1, math.ceil(_LONG_US / run(1))))
    samples = [run(steps) for _ in range(setup.repeats)]
    return clock.summarise(samples, "dispatched together"), kv_pages
