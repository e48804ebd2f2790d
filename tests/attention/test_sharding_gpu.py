# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The GPU kernels under shard_map over KV heads.

The kernels that write are called without shard_map's check of what varies over the mesh. On a GPU
all of them run, on as many devices as there are. Elsewhere they are lowered for four CUDA devices.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from pallas_paged import layout, write_and_attend
from tests.attention import test_sharding as attention
from tests.attention.cases import Setup
from tests.kv_write import test_sharding as writes
from tests.kv_write.test_sharding import NUM_SHARDS, mesh_of

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2"
)
ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="the GPU interpreter runs one device")
elsewhere = pytest.mark.skipif(ON_GPU, reason="lowered for four devices, which only CPUs are here")

SETUPS = [
    Setup(4, 1, 128, 16, "bfloat16", "bfloat16", ("tiny",), num_tokens=37),
    Setup(4, 2, 64, 16, "bfloat16", "bfloat16", ("tiny",), has_sinks=True, num_tokens=37),
    Setup(
        4, 2, 128, 24, "bfloat16", "float8_e4m3fn", ("tiny",), scale="head", windows=(9,),
        is_window_traced=True, num_tokens=37,
    ),
]  # fmt: skip


def _num_shards():
    return min(NUM_SHARDS, len(jax.devices()))


# ---- On GPUs


@needs_gpu
@pytest.mark.parametrize("case", writes.CASES, ids=writes.CASE_IDS)
def test_writes(case):
    calls = writes.shards_of(case, _num_shards())
    result = writes.run_sharded(calls, "mosaic_gpu")
    writes.check_shards(result, calls, [call.run("oracle") for call in calls])


@needs_gpu
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.id)
def test_attention(setup):
    shards = attention.shards_of(setup, _num_shards())
    result = attention.run_sharded(shards, setup, "mosaic_gpu")
    attention.check_shards(result, shards, setup)


@needs_gpu
@pytest.mark.parametrize("setup", SETUPS[:1], ids=lambda setup: setup.id)
def test_write_and_attend(setup):
    shards = attention.shards_of(setup, _num_shards())
    written = attention.writes_of(shards)
    results = attention.run_sharded_write(shards, written, setup, "mosaic_gpu")
    attention.check_written_shards(results, shards, written, setup)


# ---- Lowered for four

NUM_PAGES, PAGE_SIZE, HEAD_DIM, NUM_TOKENS = 64, 16, 128, 40


def _lowered(fn, arrays, specs, donated=()):
    """StableHLO of a call on four devices, lowered for CUDA."""
    placed = [
        jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh_of(NUM_SHARDS), spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]
    traced = jax.jit(fn, donate_argnums=donated).trace(*placed)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _pool(num_kv_heads, dtype):
    """All shards' pool, and the type of one shard's as the kernels' views of it begin."""
    rows = layout.num_rows(num_kv_heads, HEAD_DIM, dtype)
    return ((NUM_PAGES, PAGE_SIZE, NUM_SHARDS * rows, HEAD_DIM), dtype), rows


def _new(num_heads):
    return (NUM_TOKENS, NUM_SHARDS * num_heads * HEAD_DIM), jnp.bfloat16


METADATA = {
    "page_write": [(4,), (4,)],
    "slice_write": [(3, 8), (1,)],
    "token_write": [(NUM_TOKENS,)],
    "copy_pages": [(5,), (5,)],
}
ATTENTION_METADATA = [((5,), jnp.int32), ((5, 8), jnp.int32), ((6,), jnp.int32), ((1,), jnp.int32)]


@elsewhere
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("op", METADATA)
def test_writes_lower_in_place(op, num_kv_heads):
    """One kernel, of one shard's heads, whose pool is the donated one."""
    pool, rows = _pool(num_kv_heads, jnp.bfloat16)
    metadata = [(shape, jnp.int32) for shape in METADATA[op]]
    fn, specs = writes.sharded(
        op,
        len(metadata),
        backend="mosaic_gpu",
        mesh=mesh_of(NUM_SHARDS),
        num_kv_heads=num_kv_heads,
    )
    new = [] if op == "copy_pages" else [_new(num_kv_heads)] * 2
    text = _lowered(fn, [pool, *new, *metadata], specs, donated=0)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert f"tensor<{NUM_PAGES}x{PAGE_SIZE}x{rows}x{HEAD_DIM}xbf16>" in text
    [main] = re.findall(r"func.func public @main\((%arg0: [^%]*)", text)
    assert "tf.aliasing_output = 0" in main or "jax.buffer_donor" in main


@elsewhere
@pytest.mark.parametrize("pool_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (4, 2)])
def test_attention_lowers(num_heads, num_kv_heads, pool_dtype):
    names = ["k_scale", "v_scale"] if pool_dtype != "bfloat16" else []
    pool, rows = _pool(num_kv_heads, jnp.dtype(pool_dtype))
    fn, specs = attention.sharded(
        names,
        backend="mosaic_gpu",
        num_kv_heads=num_kv_heads,
        config=None,
        mesh=mesh_of(NUM_SHARDS),
    )
    q = ((NUM_TOKENS, NUM_SHARDS * num_heads, HEAD_DIM), jnp.bfloat16)
    scales = [((NUM_SHARDS * num_kv_heads,), jnp.float32)] * len(names)
    text = _lowered(fn, [q, pool, *ATTENTION_METADATA, *scales], specs)
    assert text.count("custom_call @mosaic_gpu") == 2
    assert f"tensor<{NUM_PAGES}x{PAGE_SIZE}x{rows}x{HEAD_DIM}x" in text


@elsewhere
def test_write_and_attend_lowers():
    pool, _ = _pool(2, jnp.bfloat16)
    fn, specs = attention.sharded_write(
        num_kv_heads=2, config=None, mesh=mesh_of(NUM_SHARDS), backend="mosaic_gpu"
    )
    q = ((NUM_TOKENS, NUM_SHARDS * 4, HEAD_DIM), jnp.bfloat16)
    new = [_new(2)] * 2
    text = _lowered(fn, [q, *new, pool, *ATTENTION_METADATA], specs, donated=3)
    assert text.count("custom_call @mosaic_gpu") == 3


def test_writing_under_the_check_is_refused_by_the_call_itself():
    """Not by one of the ops that it is composed of, so that "auto" walks past."""
    pool, _ = _pool(2, jnp.bfloat16)
    _, specs = attention.sharded_write(
        num_kv_heads=2, config=None, mesh=mesh_of(_num_shards()), backend="mosaic_gpu"
    )

    def call(*arrays):
        return write_and_attend(*arrays, num_kv_heads=2, backend="mosaic_gpu")

    fn = jax.shard_map(
        call, mesh=mesh_of(_num_shards()), in_specs=specs, out_specs=(attention.HEADS, specs[3])
    )
    q = ((NUM_TOKENS, NUM_SHARDS * 4, HEAD_DIM), jnp.bfloat16)
    arrays = [q, _new(2), _new(2), pool, *ATTENTION_METADATA]
    scale = _num_shards() / NUM_SHARDS  # so that each shard has two KV heads
    arrays = [
        ((*shape[:i], int(shape[i] * scale), *shape[i + 1 :]), dtype)
        for i, (shape, dtype) in zip((1, 1, 1, 2), arrays[:4], strict=True)
    ] + ATTENTION_METADATA
    with pytest.raises(NotImplementedError, match="^write_and_attend: .* check_vma=False"):
        jax.eval_shape(fn, *(jax.ShapeDtypeStruct(*x) for x in arrays))
