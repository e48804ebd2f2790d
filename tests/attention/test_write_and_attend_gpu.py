# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""write_and_attend in Mosaic GPU, composed of the writes and the attention.

The output is compared with the oracle's by the tolerances, and the whole pool bit by bit. The pool
is updated in place, in one call and in a loop over layers. On a GPU these tests run there
(`JAX_PLATFORMS=cuda pytest tests -k gpu`). On a CPU they are interpreted and lowered for CUDA.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_paged import dispatch, layout, write_and_attend
from tests.attention.cases import make_write, write_mismatch
from tests.attention.test_gpu import (
    DECODES,
    LONG,
    ON_GPU,
    SCALES,
    SMALL,
    Call,
    needs_new_jax,
    options_of,
)
from tests.kv_write.cases import run_all_on_gpu
from tests.kv_write.test_sharding import moved_pools

# Chunks that begin and end inside pages and at their ends, a decode that opens a page, holes.
CHUNKS = ((1, 97), (20, 30), (3, 0), (1, 17), (16, 16), (33, 70))
SCALED = (*SCALES, ("sinks", True))
CALLS = [
    (Call(CHUNKS), True),
    (Call(CHUNKS, (2, 2), 64, 24, options=options_of(sliding_window=40)), False),
    (Call(CHUNKS, pool_dtype="float8_e4m3fn", options=SCALED, config=SMALL), True),
]
DEVICE_CALLS = [
    (Call(tuple(LONG), (8, 2), page_size=64), True),
    (Call(tuple(DECODES), (8, 2), page_size=16), False),
    (Call(tuple(LONG), (4, 2), 256, 8, dtype="float16", options=options_of(soft_cap=5.0)), True),
    (Call(tuple(LONG), (4, 2), 64, 16, pool_dtype="float8_e5m2", options=SCALED), False),
]


@pytest.fixture(autouse=True)
def few_thread_blocks(monkeypatch):
    """The interpreter gets a chip of two multiprocessors."""
    if not ON_GPU:
        monkeypatch.setattr(dispatch, "num_multiprocessors", lambda: 2)


@needs_new_jax
@pytest.mark.parametrize(
    ("call", "is_flat"),
    CALLS + (DEVICE_CALLS if ON_GPU else []),
    ids=lambda x: x.id if isinstance(x, Call) else ("flat" if x else "by_head"),
)
def test_kernels_are_the_oracle(call, is_flat):
    case, options = call.make()
    scales = options.get("k_scale"), options.get("v_scale")
    write = make_write(case, is_flat=is_flat, scales=scales)
    options["return_lse"] = True
    results = run_all_on_gpu(
        lambda: write_and_attend(*write.arrays, **options, config=call.config, backend="mosaic_gpu")
    )
    found = write_mismatch(write, options, results)
    assert found is None, found


# ---- In place


def _abstract_call(call: Call, num_layers: int = 1, num_tokens: int = 64):
    """q, k, v, pool and metadata as shapes; keywords of the op."""
    num_heads, num_kv_heads = call.heads
    pool_dtype = jnp.dtype(call.pool_dtype or call.dtype)
    pool = layout.pool_shape(
        4096 * num_layers, call.page_size, num_kv_heads, call.head_dim, pool_dtype
    )

    def of(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    new = of((num_tokens, num_kv_heads * call.head_dim), call.dtype)
    q = of((num_tokens, num_heads, call.head_dim), call.dtype)
    metadata = of((8,)), of((8, 40)), of((9,)), of((1,))
    options = {"num_kv_heads": num_kv_heads, "backend": "mosaic_gpu"}
    if call.pool_dtype:
        options |= {"k_scale": 0.5, "v_scale": 0.7}
    return (q, new, new, of(pool, pool_dtype), *metadata), options


IN_PLACE = [
    Call((), (8, 2)),
    Call((), (4, 1), 64, 32, "float16"),
    Call((), (8, 4), 256, 8),
    Call((), (8, 2), pool_dtype="float8_e4m3fn"),
    Call((), (4, 4), 64, pool_dtype="float8_e5m2"),
]


@needs_new_jax
@pytest.mark.parametrize("call", IN_PLACE, ids=lambda call: call.id)
def test_lowers_for_cuda_in_place(call):
    """A kernel that writes and two that attend, and the pool that comes out is what came in."""
    arrays, options = _abstract_call(call)

    def step(pool, q, k, v, *metadata):
        return write_and_attend(q, k, v, pool, *metadata, **options)

    q, k, v, pool, *metadata = arrays
    traced = jax.jit(step, donate_argnums=0).trace(pool, q, k, v, *metadata)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
    pool_type = "x".join(map(str, pool.shape))
    assert re.search(rf"%arg0: tensor<{pool_type}x\w+> {{[^}}]*tf.aliasing_output = 1", text)


def _layers(num_layers, options, form):
    """A model's decode step: one flat pool through the layers, each of which writes and attends."""

    def step(pool, q, k, v, kv_lens, table, cu_q_lens, num_seqs):
        num_pages = pool.shape[0] // num_layers

        def layer(carry, index):
            q, pool = carry
            ids = jnp.where(table >= 0, table + index * num_pages, -1)
            out, pool = write_and_attend(
                q, k, v, pool, kv_lens, ids, cu_q_lens, num_seqs, **options
            )
            return (q + out, pool), None

        if form == "scan":
            return jax.lax.scan(layer, (q, pool), jnp.arange(num_layers))[0]
        return jax.lax.fori_loop(0, num_layers, lambda i, c: layer(c, i)[0], (q, pool))

    return jax.jit(step, donate_argnums=0)


@needs_new_jax
@pytest.mark.parametrize("form", ["scan", "fori_loop"])
@pytest.mark.parametrize("call", [IN_PLACE[0], IN_PLACE[3]], ids=lambda call: call.id)
def test_a_step_over_layers_copies_no_pool(call, form):
    """On a GPU the compiled HLO; elsewhere that it lowers, with the pool aliased."""
    (q, k, v, pool, *metadata), options = _abstract_call(call, num_layers=4)
    step = _layers(4, options, form)
    if not ON_GPU:
        lowered = step.trace(pool, q, k, v, *metadata).lower(lowering_platforms=("cuda",))
        assert "tf.aliasing_output = 1" in lowered.as_text()
        return
    compiled = step.lower(pool, q, k, v, *metadata).compile()
    pool_bytes = pool.size * pool.dtype.itemsize
    assert_in_place(compiled, pool_bytes, pool_bytes // 4)


@needs_new_jax
@pytest.mark.skipif(not ON_GPU, reason="only a GPU's compiler makes this HLO")
@pytest.mark.parametrize("call", IN_PLACE, ids=lambda call: call.id)
def test_compiled_without_a_copy(call):
    (q, k, v, pool, *metadata), options = _abstract_call(call)

    def step(pool, q, k, v, *metadata):
        return write_and_attend(q, k, v, pool, *metadata, **options)

    compiled = jax.jit(step, donate_argnums=0).lower(pool, q, k, v, *metadata).compile()
    pool_bytes = pool.size * pool.dtype.itemsize
    assert_in_place(compiled, pool_bytes, pool_bytes)


@needs_new_jax
@pytest.mark.skipif(not ON_GPU, reason="only a GPU's compiler makes this HLO")
def test_the_check_for_copies_can_fail():
    """A pool that is not donated is copied."""
    (q, k, v, pool, *metadata), options = _abstract_call(IN_PLACE[0])

    def step(pool, q, k, v, *metadata):
        return write_and_attend(q, k, v, pool, *metadata, **options)

    compiled = jax.jit(step).lower(pool, q, k, v, *metadata).compile()
    pool_bytes = pool.size * pool.dtype.itemsize
    with pytest.raises(AssertionError):
        assert_in_place(compiled, pool_bytes, pool_bytes)


def assert_in_place(compiled, pool_bytes, large):
    """No instruction makes an array of `large` bytes, and no memory is set aside for one.

    As in tests/kv_write/test_sharding.py, everything that is not known to carry a buffer counts.
    Inside a command buffer, a computation of its own, are instructions of the same kinds.
    """
    moved = moved_pools(compiled.as_text(), large)
    assert not moved, moved[0][:300]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < large
