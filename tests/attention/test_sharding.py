# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention under shard_map over KV heads: right shard by shard, without collectives or copies.

Query heads are sharded on axis 1 of q and of the output, the pool's rows on axis 2, each shard with
the R rows that `layout.num_rows` gives for its own heads; sinks and scales by head. The GPU kernels
are in test_sharding_gpu.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_paged
from bench.tpu_model.compile import aot_compile
from pallas_paged import layout
from pallas_paged.attention.tpu.launch import TpuAttentionConfig
from tests.attention.cases import (
    Setup,
    interpret_all,
    make_write,
    mismatch,
    run_oracle,
    write_mismatch,
)
from tests.kv_write import cases
from tests.kv_write.test_sharding import NUM_SHARDS, mesh_of, moved_pools, num_interpreted_shards

HEADS = PartitionSpec(None, "heads")  # q, out and the log-sum-exp
POOL = PartitionSpec(None, None, "heads")
BY_HEAD = PartitionSpec("heads")  # sinks and scales
EVERYWHERE = PartitionSpec()
NUM_METADATA = 4


def sharded(names, *, backend, num_kv_heads, config, mesh=None, **static):
    """The public op under shard_map, not yet jitted, and the specs of its arguments.

    Args:
      names: of the arrays behind the metadata: of scales, sinks or the window.
      num_kv_heads: of one shard.
    """

    def call(q, kv_pages, *rest):
        metadata, arrays = rest[:NUM_METADATA], rest[NUM_METADATA:]
        return pallas_paged.ragged_paged_attention(
            q,
            kv_pages,
            *metadata,
            **dict(zip(names, arrays, strict=True)),
            **static,
            num_kv_heads=num_kv_heads,
            config=config,
            backend=backend,
            return_lse=True,
        )

    by_name = [EVERYWHERE if name == "sliding_window" else BY_HEAD for name in names]
    specs = (HEADS, POOL, *[EVERYWHERE] * NUM_METADATA, *by_name)
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=(HEADS, HEADS)), specs


def sharded_write(*, num_kv_heads, config, mesh=None, backend="mosaic_tpu", **static):
    """`write_and_attend` under shard_map, as `sharded`; k and v are [T, K*H].

    Without shard_map's check of what varies where a GPU kernel writes.
    """

    def call(*args):
        return pallas_paged.write_and_attend(
            *args,
            **static,
            num_kv_heads=num_kv_heads,
            config=config,
            backend=backend,
            return_lse=True,
        )

    specs = (HEADS, HEADS, HEADS, POOL, *[EVERYWHERE] * NUM_METADATA)
    checks = {"check_vma": backend != "mosaic_gpu"}
    out_specs = (HEADS, POOL, HEADS)
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=out_specs, **checks), specs


# ---- On 4 virtual CPU devices

SETUPS = [
    Setup(2, 1, 128, 16, "float32", "bfloat16", ("tiny",), num_tokens=37),
    Setup(4, 2, 64, 16, "bfloat16", "bfloat16", ("tiny",), has_sinks=True, num_tokens=37),
    Setup(
        2,
        1,
        128,
        24,
        "float32",
        "int8",
        ("tiny",),
        scale="head",
        windows=(9,),
        is_window_traced=True,
        num_tokens=37,
    ),
]
ARRAYS = ("k_scale", "v_scale", "sinks", "sliding_window")


def shards_of(setup, num_shards):
    """(case, options) of each shard: its own q, pool, scales and sinks, everybody's metadata."""
    shards = []
    for seed in range(num_shards):
        case, options = setup.case("tiny", seed), setup.options(*setup.windows)
        if shards:
            first = shards[0][0]
            # The pages of a shard's own keys, moved to where the first shard has them.
            case.kv_pages = _moved(case, first)
            case = dataclasses.replace(case, page_indices=first.page_indices)
        for name in ARRAYS[:3]:
            if name in options:
                options[name] = options[name] * (1 + 0.25 * seed)
        shards.append((case, options))
    return shards


def _moved(case, first):
    pool = np.array(case.kv_pages)
    moved = np.array(first.kv_pages)
    for seq in range(case.num_seqs[0]):
        count = -(-case.kv_lens[seq] // pool.shape[1])
        moved[first.page_indices[seq, :count]] = pool[case.page_indices[seq, :count]]
    return jnp.asarray(moved)


def run_sharded(shards, setup, backend):
    """(out, log-sum-exp) of one call on all shards."""
    mesh = mesh_of(len(shards))
    options = shards[0][1]
    names = [name for name in ARRAYS if name in options]
    fn, specs = sharded(
        names,
        backend=backend,
        mesh=mesh,
        num_kv_heads=setup.num_kv_heads,
        config=_config(setup, backend),
        sm_scale=options["sm_scale"],
    )
    q, pool, *metadata = zip(*(case.arrays for case, _ in shards), strict=True)
    arrays = [np.concatenate(q, axis=1), np.concatenate(pool, axis=2), *(x[0] for x in metadata)]
    for name in names:
        values = [options[name] for _, options in shards]
        arrays.append(values[0] if name == "sliding_window" else np.concatenate(values))
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    return _compiled_fast(fn)(*placed)


def _config(setup, backend):
    return None if backend == "mosaic_gpu" else TpuAttentionConfig(*setup.config)


def _compiled_fast(fn):
    """On a CPU, whose options these are."""
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(fn, compiler_options=cases.FAST_COMPILE if on_cpu else None)


def check_shards(result, shards, setup):
    """Raises AssertionError unless each shard's heads are what the oracle says of it alone."""
    out, lse = (np.asarray(x) for x in result)
    for shard, (case, options) in enumerate(shards):
        heads = slice(shard * setup.num_heads, (shard + 1) * setup.num_heads)
        found = mismatch(out[:, heads], lse[:, heads], *run_oracle(case, options))
        assert found is None, f"shard {shard}: {found}"


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.id)
def test_oracle(setup):
    shards = shards_of(setup, NUM_SHARDS)
    check_shards(run_sharded(shards, setup, "oracle"), shards, setup)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.id)
def test_kernel(setup):
    """The interpreter runs the kernels of several devices at once, races still detected."""
    shards = shards_of(setup, num_interpreted_shards())
    mode = cases.MODES[SETUPS.index(setup) % 2]
    result = interpret_all(lambda: run_sharded(shards, setup, "mosaic_tpu"), mode)
    check_shards(result, shards, setup)


def test_the_check_sees_swapped_shards():
    """The shards' contents differ, so that heads on the wrong shard are found."""
    setup = SETUPS[0]
    shards = shards_of(setup, NUM_SHARDS)
    swapped = [shards[1], shards[0], *shards[2:]]
    with pytest.raises(AssertionError, match="shard 0: head . is off by"):
        check_shards(run_sharded(swapped, setup, "oracle"), shards, setup)


def test_write_and_attend():
    """Each shard writes its own heads' rows, and no other's: the pool is compared bit for bit."""
    setup = SETUPS[0]
    shards = shards_of(setup, num_interpreted_shards())
    writes = writes_of(shards)
    results = interpret_all(lambda: run_sharded_write(shards, writes, setup), "on_wait")
    check_written_shards(results, shards, writes, setup)


def writes_of(shards):
    """Each shard's new tokens, taken out of its pool."""
    return [make_write(case, is_flat=True) for case, _ in shards]


def run_sharded_write(shards, writes, setup, backend="mosaic_tpu"):
    """(out, pool, log-sum-exp) of one call on all shards."""
    mesh = mesh_of(len(shards))
    fn, specs = sharded_write(
        num_kv_heads=setup.num_kv_heads,
        config=_config(setup, backend),
        mesh=mesh,
        backend=backend,
        sm_scale=shards[0][1]["sm_scale"],
    )
    q, k, v, pool, *metadata = zip(*(write.arrays for write in writes), strict=True)
    arrays = [*(np.concatenate(x, axis=1) for x in (q, k, v)), np.concatenate(pool, axis=2)]
    arrays += [x[0] for x in metadata]
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    return _compiled_fast(fn)(*placed)


def check_written_shards(results, shards, writes, setup):
    """Raises AssertionError unless each shard did what the oracle does of it alone."""
    out, kv_pages, lse = (np.asarray(x) for x in results)
    num_rows = kv_pages.shape[2] // len(shards)
    for shard, write in enumerate(writes):
        heads = slice(shard * setup.num_heads, (shard + 1) * setup.num_heads)
        rows = slice(shard * num_rows, (shard + 1) * num_rows)
        results = [out[:, heads], np.ascontiguousarray(kv_pages[:, :, rows]), lse[:, heads]]
        found = write_mismatch(write, shards[shard][1], results)
        assert found is None, f"shard {shard}: {found}"


# ---- Compiled for the four chips of a v5e:2x2

# A shard's pool: 4,096 pages of 16, 33 MB of one KV head. Larger than q.
NUM_PAGES, PAGE_SIZE, HEAD_DIM, NUM_TOKENS = 4096, 16, 128, 512


def abstract(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


METADATA = tuple(abstract(shape, jnp.int32) for shape in ((8,), (8, 64), (9,), (1,)))


def compiled_hlo(num_heads, num_kv_heads, names=()):
    """HLO text of the op on four chips, heads of one chip given; and the bytes of a chip's pool."""
    num_rows = layout.num_rows(num_kv_heads, HEAD_DIM, jnp.bfloat16)
    shape = (NUM_PAGES, PAGE_SIZE, NUM_SHARDS * num_rows, HEAD_DIM)
    fn, specs = sharded(
        names,
        backend="mosaic_tpu",
        num_kv_heads=num_kv_heads,
        config=TpuAttentionConfig(128, 128, 2),
    )
    arrays = {
        "sinks": abstract((NUM_SHARDS * num_heads,), jnp.float32),
        "sliding_window": abstract((), jnp.int32),
    }
    q = abstract((NUM_TOKENS, NUM_SHARDS * num_heads, HEAD_DIM))
    args = (q, abstract(shape), *METADATA, *(arrays[name] for name in names))
    hlo = aot_compile(fn, args, "v5e", axes={"heads": NUM_SHARDS}, specs=specs).as_text()
    return hlo, math.prod(shape) * 2 // NUM_SHARDS


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "names"),
    [(1, 1, ()), (4, 1, ("sinks",)), (4, 2, ("sliding_window",))],
)
def test_compiled_without_collectives_or_copies(num_heads, num_kv_heads, names):
    hlo, pool_bytes = compiled_hlo(num_heads, num_kv_heads, names)
    assert "tpu_custom_call" in hlo and "num_partitions=4" in hlo
    assert not [name for name in COLLECTIVES if f"{name}(" in hlo or f"{name}-start(" in hlo]
    assert moved_pools(hlo, pool_bytes // 2) == []


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (4, 2)])
def test_compiled_write_and_attend(num_heads, num_kv_heads):
    """In place on every chip: no collective, and nothing as large as the pool moves."""
    num_rows = layout.num_rows(num_kv_heads, HEAD_DIM, jnp.bfloat16)
    pool = abstract((NUM_PAGES, PAGE_SIZE, NUM_SHARDS * num_rows, HEAD_DIM))
    fn, specs = sharded_write(num_kv_heads=num_kv_heads, config=TpuAttentionConfig(128, 128, 2))
    new = abstract((NUM_TOKENS, NUM_SHARDS * num_kv_heads * HEAD_DIM))
    args = (abstract((NUM_TOKENS, NUM_SHARDS * num_heads, HEAD_DIM)), new, new, pool, *METADATA)
    compiled = aot_compile(
        fn,
        args,
        "v5e",
        axes={"heads": NUM_SHARDS},
        specs=specs,
        jit_kwargs={"donate_argnums": (3,)},
    )
    hlo, pool_bytes = compiled.as_text(), math.prod(pool.shape) * 2 // NUM_SHARDS
    assert "write_and_attend_block" in hlo and "num_partitions=4" in hlo
    assert not [name for name in COLLECTIVES if f"{name}(" in hlo or f"{name}-start(" in hlo]
    assert moved_pools(hlo, pool_bytes // 2) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes


def test_a_row_count_that_layout_avoids_is_a_copy():
    """The check can fail: three heads a shard in 6 rows, which XLA transposes at every call."""
    fn, specs = sharded(
        (), backend="mosaic_tpu", num_kv_heads=3, config=TpuAttentionConfig(128, 128, 2)
    )
    pool = abstract((NUM_PAGES, PAGE_SIZE, NUM_SHARDS * 6, HEAD_DIM))
    args = (abstract((NUM_TOKENS, NUM_SHARDS * 3, HEAD_DIM)), pool, *METADATA)
    hlo = aot_compile(fn, args, "v5e", axes={"heads": NUM_SHARDS}, specs=specs).as_text()
    assert moved_pools(hlo, math.prod(pool.shape) * 2 // NUM_SHARDS)
