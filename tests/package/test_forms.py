# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The forms in which other projects hold a pool, a page table and a count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from bench.tpu_model.compile import aot_compile
from pallas_paged import layout
from tests.attention.cases import make_case
from tests.kv_write.test_compiled import large_results

STRUCT = jax.ShapeDtypeStruct
PER_WORD = {"float32": 1, "bfloat16": 2, "float8_e4m3fn": 4}


def five(pool):
    """[P, page_size, R / p, p, C], as tpu-inference, sglang-jax and MaxText keep a pool."""
    per_word = 4 // pool.dtype.itemsize
    *page, num_rows, num_lanes = pool.shape
    return pool.reshape(*page, num_rows // per_word, per_word, num_lanes)


def make_write(dtype, head_dim=128):
    pool = pallas_paged.make_kv_pages(6, 4, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    rng = np.random.default_rng(0)
    pool = jnp.asarray(rng.normal(size=pool.shape), pool.dtype)
    k, v = (jnp.asarray(rng.normal(size=(8, 2, head_dim)), jnp.bfloat16) for _ in range(2))
    return pool, k, v


@pytest.mark.parametrize("backend", ["oracle", "xla"])
@pytest.mark.parametrize("dtype", PER_WORD)
def test_writes_return_the_pool_in_the_form_in_which_it_came(dtype, backend):
    pool, k, v = make_write(dtype)
    ids = jnp.array([3, 1], jnp.int32)
    slots = jnp.arange(8, dtype=jnp.int32) + 5
    slices = jnp.array([[4, 9], [0, 4], [4, 3]], jnp.int32)
    for op, metadata in (
        (pallas_paged.page_write, (ids,)),
        (pallas_paged.slice_write, (slices, 2)),
        (pallas_paged.slice_write, (slices, jnp.int32(2))),
        (pallas_paged.token_write, (slots,)),
    ):
        wanted = op(jnp.array(pool), k, v, *metadata, backend=backend)
        found = op(five(pool), k, v, *metadata, backend=backend)
        assert found.shape == five(pool).shape and found.shape[3] == PER_WORD[dtype]
        np.testing.assert_array_equal(found.reshape(pool.shape), wanted)
    found = pallas_paged.copy_pages(five(pool), ids, ids[::-1] + 1, backend=backend)
    wanted = pallas_paged.copy_pages(jnp.array(pool), ids, ids[::-1] + 1, backend=backend)
    np.testing.assert_array_equal(found.reshape(pool.shape), wanted)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_takes_every_form(head_dim):
    case = make_case([(3, 30), (1, 17)], num_kv_heads=2, head_dim=head_dim, dtype="bfloat16")
    q, pool, kv_lens, table, cu_q_lens, num_seqs = case.arrays
    pool = jnp.nan_to_num(jnp.asarray(pool, jnp.bfloat16))
    attend = functools.partial(pallas_paged.ragged_paged_attention, backend="xla")
    wanted = attend(q, pool, kv_lens, table, cu_q_lens, num_seqs, num_kv_heads=2)
    count = int(num_seqs[0])
    forms = ((table, num_seqs), (table.reshape(-1), count), (table, jnp.int32(count)))
    for page_indices, seqs in forms:
        for kv_pages in (pool, five(pool)):
            found = attend(q, kv_pages, kv_lens, page_indices, cu_q_lens, seqs, num_kv_heads=2)
            np.testing.assert_array_equal(found, wanted)
    new = jnp.ones((q.shape[0], 2, head_dim), jnp.bfloat16)
    call = functools.partial(pallas_paged.write_and_attend, backend="xla")
    wanted = call(q, new, new, jnp.array(pool), kv_lens, table, cu_q_lens, num_seqs)
    found = call(q, new, new, five(pool), kv_lens, table.reshape(-1), cu_q_lens, count)
    assert found[1].shape == five(pool).shape
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1].reshape(pool.shape), wanted[1])
    indices = [
        pallas_paged.write_indices(ids, kv_lens, cu_q_lens, seqs, 5, num_tokens=q.shape[0])
        for ids, seqs in forms
    ]
    for other in indices[1:]:
        assert all(map(np.array_equal, indices[0], other))


def test_every_other_function_takes_every_form():
    """validate, explain_backend and the way back to separate caches."""
    pool, k, _ = make_write("bfloat16")
    metadata = {"page_indices": [5, 2, 0, 3], "kv_lens": [8, 3], "cu_q_lens": [0, 4, 5]}
    metadata = {name: np.array(x, np.int32) for name, x in metadata.items()}
    slices = np.array([[4], [0], [2]], np.int32)
    for kv_pages in (pool, five(pool)):
        for count in (1, np.int32(1), jnp.int32(1), [1]):
            pallas_paged.validate(kv_pages, slices=slices, num_slices=count)
        for count in (2, jnp.int32(2), np.array([2])):
            pallas_paged.validate(kv_pages, **metadata, num_seqs=count)
        kv_lens = np.array([8, 5], np.int32)  # of which the second page is page 3
        with pytest.raises(
            ValueError, match=r"page_indices` is 6 at index \(1, 1\); wanted a page"
        ):
            table = np.array([5, 2, 0, 6], np.int32)
            pallas_paged.validate(
                kv_pages, **metadata | {"kv_lens": kv_lens, "page_indices": table}, num_seqs=2
            )
        q = jax.ShapeDtypeStruct((5, 2, 128), jnp.bfloat16)
        choice = pallas_paged.explain_backend(
            pallas_paged.ragged_paged_attention, q, kv_pages, *metadata_of(metadata), 2
        )
        assert choice.backend is not None
        apart = pallas_paged.to_separate_caches(kv_pages, 2, 128)
        assert all(map(np.array_equal, apart, pallas_paged.split_kv(pool, 2, 128)))


def metadata_of(metadata):
    """In the order of the attention's arguments, as shapes."""
    arrays = (metadata[name] for name in ("kv_lens", "page_indices", "cu_q_lens"))
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


def test_the_model_scale_is_that_of_none():
    case = make_case([(3, 30)])
    found, wanted = (
        pallas_paged.ragged_paged_attention(
            *case.arrays, num_kv_heads=2, sm_scale=scale, backend="xla"
        )
        for scale in (None, 32**-0.5)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 4, 2, 4, 128), r"kv_pages` is bfloat16\[3,4,2,4,128\]; wanted .* / 2, 2, C\]"),
        # A stack of layers whose R is 2: its page_size would be taken for rows.
        ((2, 3, 16, 2, 128), r"R = 32 rows; wanted R = 4 for 2 KV heads of 128"),
    ],
)
def test_other_pools_of_five_dimensions_are_refused(shape, message):
    pool, k, v = make_write("bfloat16")
    with pytest.raises(ValueError, match=message):
        pallas_paged.token_write(jnp.zeros(shape, pool.dtype), k, v, jnp.zeros(8, jnp.int32))


def test_a_table_that_is_no_whole_number_of_rows_is_refused():
    case = make_case([(3, 30), (1, 17)])
    q, pool, kv_lens, table, cu_q_lens, num_seqs = case.arrays
    with pytest.raises(ValueError, match=r"page_indices` is int32\[\d+\]; wanted int32\[S, M\]"):
        flat = table.reshape(-1)[:-1]
        pallas_paged.ragged_paged_attention(
            q, pool, kv_lens, flat, cu_q_lens, num_seqs, num_kv_heads=2
        )


def five_of_a_tpu(dtype):
    """A pool of 8 heads of 128 that is larger than a VMEM, where XLA could hide a copy of it."""
    *page, num_rows, num_lanes = layout.pool_shape(2**13, 16, 8, 128, dtype)
    per_word = PER_WORD[dtype]
    return STRUCT((*page, num_rows // per_word, per_word, num_lanes), jnp.dtype(dtype))


def compile_for_a_tpu(call, pool, *args):
    """The program, which donates the pool, and what in it writes as much as a pool."""
    compiled = aot_compile(call, (pool, *args), "v6e", jit_kwargs={"donate_argnums": (0,)})
    hlo = compiled.as_text()
    assert "tpu_custom_call" in hlo, "the kernel is not in the program"
    return compiled, large_results(hlo, np.prod(pool.shape) * pool.dtype.itemsize)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_tpu_writes_into_a_pool_of_five_dimensions_in_place(dtype):
    """Both reshapes are bitcasts there, and the pool that comes is the one that goes."""
    pool, new = five_of_a_tpu(dtype), STRUCT((256, 8 * 128), jnp.bfloat16)

    def write(pool, k, v, slots):
        return pallas_paged.token_write(pool, k, v, slots, num_kv_heads=8, backend="mosaic_tpu")

    compiled, moved = compile_for_a_tpu(write, pool, new, new, STRUCT((256,), jnp.int32))
    assert not moved, moved[0][1][:300]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == np.prod(pool.shape) * pool.dtype.itemsize


@pytest.mark.parametrize("op", ["ragged_paged_attention", "write_and_attend"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_tpu_attends_to_a_pool_of_five_dimensions_where_it_is(dtype, op):
    q, new = STRUCT((64, 8, 128), jnp.bfloat16), STRUCT((64, 8, 128), jnp.bfloat16)
    batch = [STRUCT(shape, jnp.int32) for shape in ((4,), (4 * 8,), (5,), ())]
    options = {"config": pallas_paged.TpuAttentionConfig(128, 128, 2), "backend": "mosaic_tpu"}

    def attend(pool, q, k, v, *batch):
        if op == "write_and_attend":
            return pallas_paged.write_and_attend(q, k, v, pool, *batch, **options)
        return pallas_paged.ragged_paged_attention(q, pool, *batch, num_kv_heads=8, **options), pool

    _, moved = compile_for_a_tpu(attend, five_of_a_tpu(dtype), q, new, new, *batch)
    assert not moved, moved[0][1][:300]


def test_a_copy_of_such_a_pool_would_be_seen():
    """A pool that is used again after the write is copied first."""
    pool, new = five_of_a_tpu("bfloat16"), STRUCT((256, 8 * 128), jnp.bfloat16)

    def write(pool, k, v, slots):
        written = pallas_paged.token_write(pool, k, v, slots, num_kv_heads=8, backend="mosaic_tpu")
        return written, pool

    _, moved = compile_for_a_tpu(write, pool, new, new, STRUCT((256,), jnp.int32))
    assert {opcode for opcode, _ in moved} & {"copy", "copy-start"}
