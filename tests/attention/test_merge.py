# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Parts of the keys, joined by their log-sum-exps: numbers, absurd parts, and pages on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_paged
from bench.tpu_model.compile import aot_compile
from pallas_paged import merge_attention_states, ragged_paged_attention
from pallas_paged.attention import merge
from tests.attention.cases import interpret_all, make_case, mismatch, run_oracle
from tests.kv_write.cases import run_all_on_gpu
from tests.kv_write.test_compiled import large_results
from tests.planted import plant

NUM_DEVICES = 4
IS_OLD = jax.__version_info__ < (0, 11, 2)


def by_numpy(outs, lses):
    """In float64, row by row, of the parts that have keys."""
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for at in np.ndindex(lse.shape):
        parts = [i for i in range(len(lses)) if lses[i][at] != -np.inf]
        if parts:
            lse[at] = np.logaddexp.reduce([lses[i][at].astype(float) for i in parts])
            out[at] = sum(np.exp(lses[i][at] - lse[at]) * outs[i][at].astype(float) for i in parts)
    return out, lse


def make(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    lses = rng.normal(size=(3, 5, 2)).astype(np.float32) * 20
    lses[rng.random(lses.shape) < 0.3] = -np.inf
    lses[:, 1] = -np.inf
    lses[:, 2] += 1e4  # whose exponentials are infinite
    outs = rng.normal(size=(3, 5, 2, 8)).astype(np.float32)
    return outs.astype(dtype), lses


def check(module, dtype):
    for seed in range(3):
        outs, lses = make(seed, dtype)
        hidden = np.where(lses[..., None] == -np.inf, np.nan, outs).astype(dtype)
        out, lse = module.merge_attention_states(jnp.asarray(hidden), jnp.asarray(lses))
        want, want_lse = by_numpy(outs, lses)
        assert out.dtype == dtype and lse.dtype == np.float32
        error = 1e-2 if np.dtype(dtype).itemsize == 2 else 1e-5
        np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=error, rtol=error)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
        assert (np.asarray(out)[1] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_it_is_the_weighted_mean(dtype):
    check(merge, dtype)


def test_lists_are_taken_and_one_part_is_itself():
    outs, lses = make()
    want = merge_attention_states(jnp.asarray(outs), jnp.asarray(lses))
    got = merge_attention_states(list(outs), tuple(lses))
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    outs[:1][lses[:1] == -np.inf] = 0
    out, lse = merge_attention_states(outs[:1], lses[:1])
    np.testing.assert_allclose(out, outs[0], rtol=1e-6)
    np.testing.assert_array_equal(lse, lses[0])


def test_a_nan_that_a_row_sees_stays():
    outs, lses = make()
    outs[0, 0, 0], lses[0, 0, 0] = np.nan, 1.0
    lses[1, 3, 1] = np.nan
    out, lse = merge_attention_states(outs, lses)
    assert np.isnan(out[0, 0]).all() and np.isnan(out[3, 1]).all() and np.isnan(lse[3, 1])
    assert np.isnan(np.asarray(out)).sum() == 2 * out.shape[-1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"outs": np.ones((2, 5, 2), np.float32)}, r"`outs` is float32\[2,5,2\]"),
        ({"outs": np.ones((2, 5, 2, 8), np.int8)}, "`outs` is int8"),
        ({"outs": np.ones((0, 5, 2, 8), np.float32)}, "X >= 1"),
        ({"outs": []}, "a list of arrays"),
        ({"outs": 3.0}, "a list of arrays"),
        ({"outs": [np.ones((5, 2, 8)), [1]]}, "`outs`"),
        ({"outs": [np.ones((5, 2, 8)), np.ones((5, 1, 8))]}, "one shape and dtype"),
        ({"lses": np.ones((2, 5, 3), np.float32)}, r"wanted float32\[2, 5, 2\]"),
        ({"lses": np.ones((2, 5, 2), jnp.bfloat16)}, r"wanted float32\[2, 5, 2\]"),
        ({"lses": None}, "a list of arrays"),
    ],
    ids=str,
)
def test_mistakes_are_sentences(change, sentence):
    arguments = {
        "outs": np.ones((2, 5, 2, 8), np.float32),
        "lses": np.ones((2, 5, 2), np.float32),
    } | change
    with pytest.raises(ValueError, match=sentence):
        merge_attention_states(**arguments)


BUGS = {
    "a part without keys is read": ("jnp.where(weights != 0, ", "jnp.where(weights == weights, "),
    "no largest": ("jnp.where(largest == -jnp.inf, 0.0, largest)", "0.0"),
    "infinities are subtracted": ("jnp.where(largest == -jnp.inf, 0.0, largest)", "largest"),
    "not normalised": ("jnp.sum(parts, axis=0) / divisor[..., None]", "jnp.sum(parts, axis=0)"),
    "the sum's logarithm lost": ("largest + jnp.log(divisor)", "largest"),
}
PLANTED = [(merge.__name__, *bug) for bug in BUGS.values()]


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name, monkeypatch):
    module = plant(monkeypatch, "pallas_paged.attention", merge.__name__, *BUGS[name])
    with pytest.raises(AssertionError):
        check(module, np.float32)


# ---- The pages of each sequence on four devices, page j on device j % 4


LENS = [(1, 61), (20, 90), (7, 7), (1, 1)]  # decodes and chunks


def spread(case, lens):
    """(pool, local lengths, local tables) of each device, for the tokens before the new ones."""
    page_size, max_seqs = case.kv_pages.shape[1], len(case.kv_lens)
    width = -(-case.page_indices.shape[1] // NUM_DEVICES)
    pools, kv_lens, tables = [], [], []
    for device in range(NUM_DEVICES):
        table = np.full((max_seqs, width), -1, np.int32)
        mine = case.page_indices[:, device::NUM_DEVICES]
        table[:, : mine.shape[1]] = mine
        length = np.zeros(max_seqs, np.int32)
        for seq, (q_len, kv_len) in enumerate(lens):
            position = np.arange(kv_len - q_len)
            length[seq] = np.sum(position // page_size % NUM_DEVICES == device)
        # Its own copy, in which the other devices' pages are NaN.
        pool, used = np.array(case.kv_pages), set()
        for seq, count in enumerate(-(-length // page_size)):
            used |= set(table[seq, :count].tolist())
        pool[[page for page in range(len(pool)) if page not in used]] = np.nan
        pools.append(pool)
        kv_lens.append(length)
        tables.append(table)
    return np.stack(pools), np.stack(kv_lens), np.stack(tables)


def own_part(case, lens, options):
    """The new tokens among themselves."""
    page_size = case.kv_pages.shape[1]
    slots = np.zeros((64, page_size, *case.kv_pages.shape[2:]), case.kv_pages.dtype)
    q_lens = np.zeros(len(case.kv_lens), np.int32)
    table = np.arange(len(case.kv_lens) * 4, dtype=np.int32).reshape(-1, 4)
    for seq, (q_len, kv_len) in enumerate(lens):
        q_lens[seq] = q_len
        k, v = case.keys[seq][kv_len - q_len :], case.values[seq][kv_len - q_len :]
        merged = np.asarray(pallas_paged.merge_kv(jnp.asarray(k), jnp.asarray(v)))
        for i in range(q_len):
            slots[table[seq, i // page_size], i % page_size] = merged[i]
    return ragged_paged_attention(
        jnp.asarray(case.q),
        jnp.asarray(slots),
        jnp.asarray(q_lens),
        jnp.asarray(table),
        jnp.asarray(case.cu_q_lens),
        jnp.asarray(case.num_seqs),
        **options,
        backend="oracle",
    )


def mesh_of_devices():
    devices = jax.devices()[:NUM_DEVICES]
    return jax.make_mesh((NUM_DEVICES,), ("context",), devices=devices, axis_types=(AxisType.Auto,))


def attend_to_my_pages(options, backend):
    def call(q, pool, kv_lens, tables, cu_q_lens, num_seqs):
        part = ragged_paged_attention(
            q, pool[0], kv_lens[0], tables[0], cu_q_lens, num_seqs,
            **options, causal=False, backend=backend,
        )  # fmt: skip
        return [lax.all_gather(x, "context") for x in part]

    return call


def run_spread(case, lens, options, backend):
    """The outputs and log-sum-exps of the devices, [4, T, N, H] and [4, T, N]."""
    mine, everywhere = P("context"), P()
    arrays = case.q, *spread(case, lens), case.cu_q_lens, case.num_seqs
    call = attend_to_my_pages(options, backend)
    if backend == "mosaic_gpu":  # the interpreter has no devices: one call after the other

        def one(i):
            part = [x[i : i + 1] for x in arrays[1:4]]
            return ragged_paged_attention(
                jnp.asarray(arrays[0]), *(jnp.asarray(x[0]) for x in part),
                *map(jnp.asarray, arrays[4:]), **options, causal=False, backend=backend,
            )  # fmt: skip

        parts = run_all_on_gpu(lambda: [x for i in range(NUM_DEVICES) for x in one(i)])
        return np.stack(parts[0::2]), np.stack(parts[1::2])
    sharded = jax.shard_map(
        call,
        mesh=mesh_of_devices(),
        in_specs=(everywhere, mine, mine, mine, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    run = jax.jit(sharded)
    if backend == "mosaic_tpu":
        return interpret_all(lambda: run(*map(jnp.asarray, arrays)), "on_wait")
    return run(*map(jnp.asarray, arrays))


@pytest.mark.parametrize(
    "backend",
    [
        "oracle",
        "xla",
        "mosaic_tpu",
        pytest.param(
            "mosaic_gpu", marks=pytest.mark.skipif(IS_OLD, reason="Mosaic GPU needs jax 0.11.2")
        ),
    ],
)
def test_pages_on_four_devices_are_the_pages_on_one(backend):
    """A device may have fewer of a sequence's keys than there are new tokens, or none at all."""
    # GPU interpret mode is slow, and takes no float32.
    lens, dtype = (LENS[1:2], "bfloat16") if backend == "mosaic_gpu" else (LENS, "float32")
    case = make_case(lens, page_size=8, head_dim=128, dtype=dtype, pool_dtype=dtype)
    options = {"num_kv_heads": 2, "return_lse": True, "sm_scale": 0.2}
    outs, lses = run_spread(case, lens, options, backend)
    own = own_part(case, lens, options)
    out, lse = merge_attention_states([*outs, own[0]], [*lses, own[1]])
    # The outputs of the parts are rounded once more than that of the whole.
    slack = 1.0 if dtype == "float32" else 2.0
    found = mismatch(out, lse, *run_oracle(case, options), slack=slack)
    assert found is None, found


@pytest.mark.parametrize(
    ("generation", "max_q_len"),
    [("v5e", 256), ("v6e", 256), ("tpu7x", 1)],
    ids=["v5e-chunks", "v6e-chunks", "tpu7x-decodes"],
)
def test_four_chips_compile_it_without_a_copy_of_the_pool(generation, max_q_len):
    struct = jax.ShapeDtypeStruct
    num_seqs, pages = 8, 4096
    q = struct((num_seqs * max_q_len, 32, 128), jnp.bfloat16)
    pool = struct((NUM_DEVICES, pages, 16, 16, 128), jnp.bfloat16)
    lens, tables = struct((NUM_DEVICES, num_seqs), jnp.int32), (NUM_DEVICES, num_seqs, 512)
    arrays = q, pool, lens, struct(tables, jnp.int32), struct((num_seqs + 1,), jnp.int32)
    options = {"num_kv_heads": 8, "return_lse": True, "sm_scale": 0.1}

    def call(*args):
        return merge_attention_states(*attend_to_my_pages(options, "mosaic_tpu")(*args))

    everywhere, mine = P(), P("context")
    specs = (everywhere, mine, mine, mine, everywhere, everywhere)
    sharded = jax.shard_map(call, in_specs=specs, out_specs=everywhere, check_vma=False)
    compiled = aot_compile(
        sharded,
        (*arrays, struct((1,), jnp.int32)),
        generation,
        axes={"context": NUM_DEVICES},
        specs=specs,
    )
    hlo, pool_bytes = compiled.as_text(), pool.size * 2 // NUM_DEVICES
    assert "tpu_custom_call" in hlo and "all-gather" in hlo
    assert not large_results(hlo, pool_bytes)
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes
