# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention in Mosaic GPU: hostile batches give what the float32 oracle gives, or a refusal.

On a GPU these tests run the kernels there (`JAX_PLATFORMS=cuda pytest tests -k gpu`). On a CPU some
of them run in GPU interpret mode, with race detection, and all forms are lowered for CUDA.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from pallas_paged import dispatch, layout, ragged_paged_attention
from pallas_paged.attention.gpu import launch as mosaic_gpu
from pallas_paged.attention.gpu.config import GpuAttentionConfig
from pallas_paged.attention.options import AttentionOptions
from pallas_paged.attention.tpu import launch as mosaic_tpu
from tests.attention.cases import ABSURD, Case, make_case, mismatch, run_oracle
from tests.kv_write.cases import run_all_on_gpu, run_on_gpu

ON_GPU = jax.default_backend() == "gpu"
needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2: test_old_jax"
)

# Decodes, short sequences, prefills, one without keys and one that ends at a block's end. The
# lengths are multiples of nothing.
MIX = [(1, 200), (40, 150), (3, 0), (2, 130), (1, 37), (20, 128)]
# More q tiles and work tiles than thread blocks: the stages are reused, heads are split many times.
LONG = [(1, 1500), (300, 1000), (17, 513), (1, 1), (1, 700), (150, 150), (4, 900)]
DECODES = [(1, n) for n in (4000, 3, 700, 1, 128, 129, 127, 2500)]

FLOATS = "bfloat16", "float16"


@dataclasses.dataclass(frozen=True)
class Call:
    """A batch and what it is called with."""

    lens: Any = tuple(MIX)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    pool_dtype: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    config: GpuAttentionConfig | None = None
    seed: int = 0

    def make(self) -> tuple[Case, dict[str, Any]]:
        num_heads, num_kv_heads = self.heads
        case = make_case(
            list(self.lens),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=self.dtype,
            pool_dtype=self.pool_dtype or self.dtype,
            seed=self.seed,
            first_row=3,
        )
        case = dataclasses.replace(case, kv_pages=_clear_padding(case.kv_pages, self.head_dim))
        options = dict(self.options)
        sinks = options.pop("sinks", False)
        if sinks:
            options["sinks"] = jnp.linspace(-2.0, 3.0, num_heads).at[0].set(-jnp.inf)
        options = {"sm_scale": self.head_dim**-0.5, "num_kv_heads": num_kv_heads} | options
        return case, options

    @property
    def id(self) -> str:
        parts = [f"{len(self.lens)}seqs", "x".join(map(str, self.heads)), f"H{self.head_dim}"]
        parts += [f"page{self.page_size}", self.dtype, self.pool_dtype or ""]
        parts += [name for name, _ in self.options] + (["config"] if self.config else [])
        return "-".join(filter(None, parts))


def _clear_padding(kv_pages, head_dim):
    """Zeroes the lanes that no head has, as the writes leave them. Unused rows keep their NaN."""
    missing = layout.padded_head_dim(head_dim) - head_dim
    if not missing:
        return kv_pages
    lanes = np.arange(kv_pages.shape[3]) % layout.padded_head_dim(head_dim)
    return jnp.where(lanes < head_dim, kv_pages, jnp.zeros((), kv_pages.dtype))


def options_of(**options):
    return tuple(options.items())


SCALES = options_of(k_scale=0.5, v_scale=np.array([0.7, 1.3], np.float32))
SMALL = GpuAttentionConfig(64, 2, 64, 2)
FEW = ((1, 70), (20, 90), (1, 5))
# What the interpreter does on a CPU: each form of the kernels once, in seconds.
INTERPRETED = [
    Call(),
    Call(heads=(3, 3), head_dim=64, page_size=24, options=options_of(sliding_window=40),
         config=GpuAttentionConfig(64, 2, 64, 2, decode_pipelines=2)),
    Call(heads=(2, 1), head_dim=256, page_size=8, dtype="float16",
         options=options_of(soft_cap=5.0, sinks=True)),
    # The decode kernel holds a stage for two blocks.
    Call(pool_dtype="float8_e4m3fn", options=SCALES, config=GpuAttentionConfig(64, 2, 64, 3)),
    Call(heads=(5, 1), page_size=136, options=options_of(causal=False, sliding_window=77),
         config=SMALL),
    # Factors that reverse the order of the scores or make all of them equal.
    Call(FEW, (2, 1), 64, options=options_of(sm_scale=-0.09, sinks=True), config=SMALL),
    Call(FEW, (2, 1), 64, options=options_of(sm_scale=0.0, sliding_window=30), config=SMALL),
    Call(FEW, (2, 1), 64, options=options_of(sm_scale=0.5, soft_cap=1e6), config=SMALL),
    # Heads for which the pool has more lanes than they need.
    Call(FEW, (2, 1), 80, 24, config=SMALL),
    Call(FEW, (4, 2), 32, pool_dtype="float8_e4m3fn", options=SCALES, config=SMALL),
]  # fmt: skip


def _device_calls():
    """Calls that only a GPU runs: sizes that fill it, and more of everything."""
    groups = itertools.cycle([(8, 2), (4, 4), (12, 2), (5, 1), (32, 8), (64, 1)])
    pages = itertools.cycle([16, 64, 128, 8, 24, 256, 40])
    dims = itertools.cycle([128, 64, 256, 112, 240, 40])
    features = [
        (),
        options_of(sliding_window=1),
        options_of(sliding_window=300),
        options_of(soft_cap=20.0),
        options_of(causal=False),
        options_of(sinks=True),
        options_of(soft_cap=3.0, sliding_window=64),
        options_of(sinks=True, sliding_window=100, causal=False),
        options_of(sm_scale=-0.09),
        options_of(sm_scale=0.0, sinks=True),
        options_of(sm_scale=0.1, soft_cap=300.0),
        options_of(sm_scale=-0.3, soft_cap=4.0),
    ]
    for seed, (lens, feature) in enumerate(itertools.product((LONG, DECODES), features)):
        dtype = FLOATS[seed % 2]
        yield Call(
            tuple(lens), next(groups), next(dims), next(pages), dtype, None, feature, seed=seed
        )
    for pool_dtype, head_dim in itertools.product(("float8_e4m3fn", "float8_e5m2"), (64, 128, 256)):
        for lens, dtype in ((LONG, "bfloat16"), (DECODES, "float16")):
            yield Call(tuple(lens), (4, 2), head_dim, next(pages), dtype, pool_dtype, SCALES)
    rng = np.random.default_rng(3)
    ragged = [
        (int(n) if rng.random() < 0.5 else 1, int(n + rng.integers(0, 500)))
        for n in rng.integers(1, 300, 100)
    ]
    yield Call(tuple(ragged), (8, 2), page_size=32)
    yield Call(tuple((1, int(n)) for n in rng.integers(1, 900, 300)), (8, 2), page_size=32)


CALLS = [*INTERPRETED, *(_device_calls() if ON_GPU else [])]


def run_kernels(case: Case, options, config=None, *, detect_races=True):
    """[out, log-sum-exp] of the kernels, through the public op."""
    return run_all_on_gpu(
        lambda: ragged_paged_attention(
            *case.arrays, **options, return_lse=True, config=config, backend="mosaic_gpu"
        ),
        detect_races=detect_races,
    )


@pytest.fixture(autouse=True)
def few_thread_blocks(monkeypatch):
    """The interpreter gets a chip of two multiprocessors, so that each has multiple work items."""
    if not ON_GPU:
        monkeypatch.setattr(dispatch, "num_multiprocessors", lambda: 2)


@needs_new_jax
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.id)
def test_kernels_are_the_oracle(call):
    case, options = call.make()
    out, lse = run_kernels(case, options, call.config)
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    found = mismatch(out, lse, *run_oracle(case, options))
    assert found is None, found


@needs_new_jax
def test_traced_window_and_no_lse():
    """A window that is an array does what the int does; without the log-sum-exp nothing changes."""
    case, options = Call(options=options_of(sliding_window=40)).make()
    wanted, _ = run_oracle(case, options)
    options["sliding_window"] = jnp.int32(40)
    out = run_on_gpu(lambda: ragged_paged_attention(*case.arrays, **options, backend="mosaic_gpu"))
    found = mismatch(out, None, wanted, None)
    assert found is None, found


@needs_new_jax
@pytest.mark.parametrize("exponent", [-110, 100])
def test_queries_beyond_float16(exponent):
    """The decode kernel of an 8-bit pool multiplies in float16, which holds 2**-24 to 2**16."""
    call = Call(((1, 40), (2, 70)), (2, 1), 64, pool_dtype="float8_e4m3fn", config=SMALL)
    case, options = call.make()
    q = case.q.copy()
    for row, size in enumerate([0, 2, -1], case.cu_q_lens[0]):
        q[row] = q[row].astype(np.float32) * 2.0 ** (exponent + size)
    case = dataclasses.replace(case, q=q)
    options["sm_scale"] = 64**-0.5 * 2.0**-exponent
    found = mismatch(*run_kernels(case, options, call.config), *run_oracle(case, options))
    assert found is None, found


@needs_new_jax
@pytest.mark.parametrize("window", [0, -(2**31), 2**31 - 1])
def test_traced_windows_of_none_and_of_all(window):
    """No window overflows, and a causal query sees nothing through a window of 0."""
    call = Call(((1, 64), (30, 128)), (2, 1), 64, options=options_of(causal=False), config=SMALL)
    case, options = call.make()

    def run(run_one):
        traced = jax.jit(lambda window: run_one(case, options | {"sliding_window": window}))
        return traced(jnp.int32(window))

    if window > 0:
        wanted = run_oracle(case, options)
    else:
        options["causal"] = True
        wanted = run_oracle(case, options | {"sliding_window": jnp.int32(window)})  # in a jit
        assert not np.any(wanted[0])

    def attend(case, options):
        return ragged_paged_attention(
            *case.arrays, **options, return_lse=True, backend="mosaic_gpu"
        )

    found = mismatch(*run_all_on_gpu(lambda: run(attend)), *wanted)
    assert found is None, found


@needs_new_jax
@pytest.mark.parametrize("name", ABSURD if ON_GPU else ["everything", "overlapping rows"])
def test_absurd_metadata_ends_in_bounds(name):
    """The kernels end, whatever the metadata says. Pages without NaN make every read harmless."""
    lens = [(1, 30), (9, 31), (1, 7), (5, 8), (1, 1), (3, 30)]
    case = make_case(
        lens,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        page_size=8,
        max_seqs=6,
        table_width=6,
        dtype="bfloat16",
        pool_dtype="bfloat16",
        num_tokens=24,
    )
    absurd = {k: np.array(v, np.int32) for k, v in ABSURD[name].items()}
    case = dataclasses.replace(case, **absurd)
    out, _ = run_kernels(case, {"sm_scale": 0.1, "num_kv_heads": 1}, detect_races=False)
    assert out.shape == case.q.shape


# ---- Tables that people have: shared pages, reused pages, more rows than tokens, and large ones


def _shared_prefixes(case):
    """Every sequence begins with the two whole pages of the first sequence."""
    table = case.page_indices.copy()
    table[1 : len(case.keys), :2] = table[0, :2]
    return dataclasses.replace(case, page_indices=table)


def _reused_pages(case):
    """A row of the table repeats its pages, as an engine with a sliding window keeps them."""
    table = case.page_indices.copy()
    for row, keys in zip(table, case.keys, strict=False):
        count = max(1, -(-len(keys) // 16 // 2))
        row[: 2 * count] = np.resize(row[:count], 2 * count)
    return dataclasses.replace(case, page_indices=table)


def _fewer_tokens_than_rows(case):
    """The last rows are the tokens. The rows before them have no position and are 0."""
    lens = case.kv_lens.copy()
    lens[1] = 20  # of 40 new ones
    return dataclasses.replace(case, kv_lens=lens)


TABLES = {
    "shared prefixes": ([(1, 70), (40, 90), (3, 40), (20, 33)], _shared_prefixes),
    "reused pages": ([(1, 70), (40, 90), (3, 40), (20, 33)], _reused_pages),
    "more rows than tokens": ([(1, 70), (40, 90), (3, 40), (20, 33)], _fewer_tokens_than_rows),
}
if ON_GPU:
    RNG = np.random.default_rng(5)
    TABLES |= {
        "4,096 sequences": (
            [(int(n % 3 + 1), int(n)) for n in RNG.integers(3, 300, 4096)],
            lambda case: case,
        ),
        "150,001 keys": ([(1, 150_001), (200, 150_001)], lambda case: case),
    }


@needs_new_jax
@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    lens, change = TABLES[name]
    case, options = Call(tuple(lens), heads=(2, 1), head_dim=64, config=SMALL).make()
    case = change(case)
    found = mismatch(*run_kernels(case, options, detect_races=False), *run_oracle(case, options))
    assert found is None, found


@needs_new_jax
@pytest.mark.skipif(not ON_GPU, reason="9 GB")
def test_a_pool_of_more_than_2_to_the_32_values():
    """The last pages are written, copied and read where they are."""
    num_pages, heads, dim = 131_072 + 64, 8, 128
    pool = layout.make_kv_pages(num_pages, 16, heads, dim)
    assert pool.size > 2**32
    small = layout.make_kv_pages(64, 16, heads, dim)
    first = num_pages - 64
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((512, heads, dim)), jnp.bfloat16) for _ in "kv")
    pages = jnp.asarray(rng.permutation(32), jnp.int32)
    slots = jnp.asarray(rng.permutation(np.arange(512, 1024))[:100], jnp.int32)
    src, dst = jnp.arange(8, dtype=jnp.int32), jnp.arange(50, 58, dtype=jnp.int32)

    def write(pool, base):
        options = {"backend": "mosaic_gpu"}
        pool = pallas_paged.page_write(pool, k, v, pages + base, **options)
        pool = pallas_paged.token_write(pool, k[:100], v[:100], slots + 16 * base, **options)
        slices = jnp.array([[16 * (58 + base) + 3], [7], [11]], jnp.int32)
        pool = pallas_paged.slice_write(pool, k, v, slices, jnp.array([1], jnp.int32), **options)
        return pallas_paged.copy_pages(pool, src + base, dst + base, **options)

    pool, small = write(pool, first), write(small, 0)
    np.testing.assert_array_equal(
        np.asarray(pool[first:]).view(np.uint16), np.asarray(small).view(np.uint16)
    )
    assert not jnp.any(pool[: num_pages // 2]) and not jnp.any(pool[num_pages // 2 : first])
    table = jnp.asarray(rng.permutation(32)[None], jnp.int32)
    kv_lens, cu_q_lens, num_seqs = (jnp.array(x, jnp.int32) for x in ([400], [0, 80], [1]))
    q = jnp.asarray(rng.standard_normal((80, 32, dim)), jnp.bfloat16)

    def attend(pool, base):
        return ragged_paged_attention(
            q,
            pool,
            kv_lens,
            table + base,
            cu_q_lens,
            num_seqs,
            sm_scale=0.1,
            num_kv_heads=heads,
            backend="mosaic_gpu",
        )

    np.testing.assert_array_equal(attend(pool, first), attend(small, 0))


def _lower(call: Call, **options):
    num_heads, num_kv_heads = call.heads
    pool_dtype = jnp.dtype(call.pool_dtype or call.dtype)
    shape = layout.pool_shape(64, call.page_size, num_kv_heads, call.head_dim, pool_dtype)
    i32 = jnp.int32
    arrays = [
        jax.ShapeDtypeStruct(*x)
        for x in (
            ((100, num_heads, call.head_dim), call.dtype),
            (shape, pool_dtype),
            ((5,), i32),
            ((5, 7), i32),
            ((6,), i32),
            ((1,), i32),
        )
    ]
    dynamic = {k: v for k, v in options.items() if hasattr(v, "shape")}
    static = {k: v for k, v in options.items() if k not in dynamic}

    def attend(arrays, dynamic):
        return ragged_paged_attention(
            *arrays,
            **static,
            **dynamic,
            num_kv_heads=num_kv_heads,
            config=call.config,
            backend="mosaic_gpu",
        )

    traced = jax.jit(attend).trace(arrays, dynamic)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _lowered_calls():
    """Page size x dtype of q and pool; everything else is cycled."""
    heads = itertools.cycle([(8, 2), (12, 2), (5, 1), (3, 3), (64, 1)])
    dims = itertools.cycle([128, 64, 256, 128, 96, 160, 16])
    features = itertools.cycle(
        [
            {},
            {"sliding_window": 100},
            {"soft_cap": 5.0, "return_lse": True},
            {"causal": False},
            {"sinks": True, "sliding_window": jax.ShapeDtypeStruct((), jnp.int32)},
            {"return_lse": True},
        ]
    )
    kinds = [
        ("bfloat16", None),
        ("float16", None),
        ("bfloat16", "float8_e4m3fn"),
        ("float16", "float8_e5m2"),
    ]
    for page_size, (dtype, pool_dtype) in zip(
        (8, 16, 24, 32, 64, 96, 128, 256), itertools.cycle(kinds), strict=False
    ):
        yield Call((), next(heads), next(dims), page_size, dtype, pool_dtype), next(features)


@needs_new_jax
@pytest.mark.parametrize(
    "call, options", list(_lowered_calls()), ids=lambda x: getattr(x, "id", "")
)
def test_lowers_for_cuda(call, options):
    """Two kernels, and the pool only goes in: nothing is as large as it is comes out."""
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = jax.ShapeDtypeStruct((call.heads[0],), jnp.float32)
    if call.pool_dtype:
        options["k_scale"] = options["v_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    text = _lower(call, **options)
    assert text.count("custom_call @mosaic_gpu_v2") == 2


@needs_new_jax
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("pool_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("max_seqs", [1, 256])
def test_default_config_fits_shared_memory(head_dim, pool_dtype, max_seqs):
    q = jax.ShapeDtypeStruct((8, 8, head_dim), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct(layout.pool_shape(9, 16, 2, head_dim, pool_dtype), pool_dtype)
    table = jax.ShapeDtypeStruct((max_seqs, 4), jnp.int32)
    config = mosaic_gpu.default_config(head_dim, pool_dtype != "bfloat16", max_seqs, 16)
    assert mosaic_gpu.plan(q, pool, table, AttentionOptions(2), config).refusal is None


REFUSED = {
    "float32": (dict(dtype="float32"), "q is float32 and the matrix unit takes"),
    "another pool": (dict(pool_dtype="int8"), "the pool is int8 and q is bfloat16"),
    "page_size": (dict(page_size=12), "page_size is 12"),
    "group": (dict(heads=(65, 1)), "65 query heads read one KV head"),
    "shared memory": (
        dict(config=GpuAttentionConfig(128, 9, 64, 2)),
        "config's prefill blocks take",
    ),
    "registers": (
        dict(pool_dtype="float8_e4m3fn", config=GpuAttentionConfig(128, 2, 64, 2, 2, 2, 2)),
        "config has 2 decode pipelines, and where a pool is converted",
    ),
    "another backend's config": (dict(config=mosaic_tpu.TpuAttentionConfig(128, 128)), "config is"),
}


@needs_new_jax
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_sentence(name):
    fields, sentence = REFUSED[name]
    case, options = Call(lens=((1, 5),), **fields).make()
    with pytest.raises(NotImplementedError, match=sentence):
        ragged_paged_attention(
            *case.arrays, **options, config=fields.get("config"), backend="mosaic_gpu"
        )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11, 2), reason="this jax is new enough")
def test_old_jax():
    case, options = Call(lens=((1, 5),)).make()
    with pytest.raises(NotImplementedError, match="update jax"):
        ragged_paged_attention(*case.arrays, **options, backend="mosaic_gpu")


@pytest.mark.parametrize(
    "fields, name",
    [
        ((96, 3, 64, 3), "prefill_block_kv"),
        ((128, 1, 64, 3), "prefill_stages"),
        ((128, 3, 64, 3, 0), "prefill_raw_stages"),
        ((128, 3, 64, 3, 2, 2, 0), "decode_pipelines"),
    ],
)
def test_config_checks_itself(fields, name):
    with pytest.raises(ValueError, match=name):
        GpuAttentionConfig(*fields)
