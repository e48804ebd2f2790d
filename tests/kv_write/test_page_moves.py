# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Pages gathered out of a pool and scattered into it, against a plain loop, byte for byte."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from bench.tpu_model.compile import TOPOLOGIES, aot_compile
from pallas_paged import kv_write
from pallas_paged.kv_write.options import WriteOptions
from tests.kv_write.cases import (
    EXACT_COMPILE,
    INT_MAX,
    INT_MIN,
    MODES,
    RaceFoundError,
    difference,
    interpret,
    run_on_gpu,
)
from tests.kv_write.test_compiled import large_results
from tests.planted import plant

NEEDS_NEW_JAX = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2"
)
NUM_PAGES = 11
OPS = ("gather_pages", "scatter_pages")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `kind` is "live", "holes" or "none": which ids are of a page."""

    op: str
    num_entries: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    kind: str
    block_tokens: int | None = None

    @property
    def id(self):
        return "-".join(map(str, dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Call:
    """The arrays of a call, in numpy; `pages` is None for a gather."""

    pool: np.ndarray
    ids: np.ndarray
    pages: np.ndarray | None

    def arrays(self):
        pages = () if self.pages is None else (jnp.array(self.pages),)
        return jnp.array(self.pool), jnp.array(self.ids), *pages

    def expected(self):
        if self.pages is None:
            found = np.zeros((len(self.ids), *self.pool.shape[1:]), self.pool.dtype)
            for i, page in enumerate(self.ids.tolist()):
                if 0 <= page < len(self.pool):
                    found[i] = self.pool[page]
            return found
        pool = self.pool.copy()
        for i, page in enumerate(self.ids.tolist()):
            if 0 <= page < len(pool):
                pool[page] = self.pages[i]
        return pool


def make(case):
    """Random bits, NaN of every payload among them; a scatter's ids are distinct."""
    rng = np.random.default_rng(case.num_entries + case.page_size)
    empty = pallas_paged.make_kv_pages(
        1, case.page_size, case.num_kv_heads, case.head_dim, case.dtype
    )
    dtype = np.dtype(empty.dtype)

    def bits(num_pages):
        of = np.dtype(f"uint{8 * dtype.itemsize}")
        shape = (num_pages, *empty.shape[1:])
        return rng.integers(1, np.iinfo(of).max, shape, of, endpoint=True).view(dtype)

    n = case.num_entries
    ids = rng.permutation(NUM_PAGES)[:n] if case.op == "scatter_pages" else None
    ids = rng.integers(0, NUM_PAGES, n) if ids is None else ids
    is_hole = {"live": np.zeros(n, bool), "none": np.ones(n, bool)}.get(case.kind)
    is_hole = rng.random(n) < 0.4 if is_hole is None else is_hole
    nasty = rng.choice([-1, -2, INT_MIN, INT_MAX, NUM_PAGES, 33 * NUM_PAGES], n)
    ids = np.where(is_hole, nasty, ids).astype(np.int32)
    pages = bits(n) if case.op == "scatter_pages" else None
    return Call(bits(NUM_PAGES), ids, pages)


def config_of(case, backend):
    if case.block_tokens is None or backend in ("oracle", "xla"):
        return None
    is_gpu = backend == "mosaic_gpu"
    config = pallas_paged.GpuWriteConfig if is_gpu else pallas_paged.TpuWriteConfig
    return config(case.block_tokens)


def run(case, backend):
    call = make(case)
    op = functools.partial(
        getattr(pallas_paged, case.op), config=config_of(case, backend), backend=backend
    )
    return op(*call.arrays())


CASES = [
    Case(op, n, page_size, heads, head_dim, dtype, kind, block_tokens)
    for op in OPS
    for n, page_size, heads, head_dim, dtype, kind, block_tokens in [
        (9, 4, 2, 128, "bfloat16", "holes", None),
        (7, 33, 3, 80, "float8_e4m3fn", "live", None),
        (1, 16, 1, 64, "int8", "live", None),
        (3, 2, 1, 256, "float32", "none", None),
        (10, 48, 1, 128, "float8_e5m2", "holes", 16),
    ]
]


def same(actual, wanted):
    found = difference(actual, wanted)
    assert found is None, found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_oracle_is_the_plain_loop(case):
    same(run(case, "oracle"), make(case).expected())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_tpus_kernel_is_the_plain_loop(case, mode):
    same(interpret(lambda: run(case, "mosaic_tpu"), mode), make(case).expected())


@NEEDS_NEW_JAX
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_gpus_kernel_is_the_plain_loop(case):
    same(run_on_gpu(lambda: run(case, "mosaic_gpu")), make(case).expected())


@pytest.mark.parametrize("op", OPS)
def test_more_entries_than_a_tpu_has_in_smem_at_a_time(op, monkeypatch):
    monkeypatch.setattr(kv_write.tpu.page_copies, "_ENTRIES_PER_STEP", 4)
    jax.clear_caches()
    case = Case(op, 10, 2, 1, 128, "float32", "holes")
    result = interpret(lambda: run(case, "mosaic_tpu"), "on_wait")
    jax.clear_caches()
    same(result, make(case).expected())


@pytest.mark.parametrize("backend", ["oracle", "mosaic_tpu", "mosaic_gpu"])
@pytest.mark.parametrize("op", OPS)
def test_no_entries(op, backend):
    if backend == "mosaic_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU needs jax 0.11.2")
    case = Case(op, 0, 4, 2, 128, "bfloat16", "live")
    how = run_on_gpu if backend == "mosaic_gpu" else functools.partial(interpret, mode="eager")
    same(how(lambda: run(case, backend)), make(case).expected())


def test_only_a_scatter_donates_and_only_the_pool():
    call = make(Case("scatter_pages", 5, 4, 2, 128, "float32", "holes"))
    pool, ids, pages = call.arrays()
    pallas_paged.gather_pages(pool, ids)
    assert not pool.is_deleted()
    before = pool.unsafe_buffer_pointer()
    result = pallas_paged.scatter_pages(pool, ids, pages)
    assert pool.is_deleted() and not ids.is_deleted() and not pages.is_deleted()
    assert result.unsafe_buffer_pointer() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_pool_of_five_dimensions(dtype):
    pool = make(Case("gather_pages", 5, 4, 2, 128, dtype, "live")).pool
    per_word = 4 // pool.dtype.itemsize
    five = pool.reshape(*pool.shape[:2], -1, per_word, pool.shape[3])
    ids = jnp.array([3, 1], jnp.int32)
    pages = pallas_paged.gather_pages(jnp.array(five), ids)
    assert pages.shape == (2, *five.shape[1:])
    moved = pallas_paged.scatter_pages(jnp.array(five), ids[::-1], pages)
    wanted = pool.copy()
    wanted[[1, 3]] = pool[[3, 1]]
    same(np.asarray(moved).reshape(pool.shape), wanted)


def test_pages_rest_in_host_memory():
    """The way of an engine that sends pages away, or keeps them for later."""
    pool = make(Case("gather_pages", 5, 4, 2, 128, "bfloat16", "live")).pool
    ids = jnp.array([3, 1, 7], jnp.int32)
    pages = np.asarray(pallas_paged.gather_pages(jnp.array(pool), ids))
    empty = jnp.zeros(pool.shape, pool.dtype)
    moved = pallas_paged.scatter_pages(empty, jnp.array([0, 10, 4], jnp.int32), jnp.array(pages))
    same(np.asarray(moved)[[0, 10, 4]], pool[[3, 1, 7]])


def arguments_of(op):
    arguments = {"kv_pages": jnp.ones((5, 4, 4, 128)), "page_ids": jnp.zeros(2, jnp.int32)}
    return arguments if op == "gather_pages" else arguments | {"pages": jnp.ones((2, 4, 4, 128))}


MISTAKES = [
    ({"page_ids": jnp.ones((2, 2), jnp.int32)}, "argument `page_ids` is int32"),
    ({"page_ids": jnp.ones(2)}, "argument `page_ids` is float32"),
    ({"kv_pages": jnp.ones((2, 4))}, "argument `kv_pages`"),
    ({"config": pallas_paged.GpuAttentionConfig}, "argument `config`"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
    ({"pages": jnp.ones((3, 4, 4, 128))}, r"wanted float32\[2,4,4,128\]"),
    ({"pages": jnp.ones((2, 4, 4, 128), jnp.bfloat16)}, r"wanted float32\[2,4,4,128\]"),
    ({"pages": [1]}, "argument `pages`"),
]


@pytest.mark.parametrize(
    ("op", "change", "sentence"),
    [
        (op, *mistake)
        for op in OPS
        for mistake in MISTAKES
        if op == "scatter_pages" or "pages" not in mistake[0]
    ],
)
def test_mistakes_are_sentences(op, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        getattr(pallas_paged, op)(**arguments_of(op) | change)


@pytest.mark.parametrize("backend", ["oracle", "mosaic_tpu"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in arguments_of(op)])
def test_gradients_and_vmap_are_refused_by_every_argument(op, name, backend):
    arguments = arguments_of(op)

    def loss(x):
        return getattr(pallas_paged, op)(**arguments | {name: x}, backend=backend).sum()

    with pytest.raises(NotImplementedError, match=f"^{op}: vmap is not supported"):
        jax.vmap(loss)(jnp.stack([arguments[name]] * 2))
    if name != "page_ids":
        with pytest.raises(NotImplementedError, match=f"^{op}: .*gradient"):
            jax.grad(loss)(arguments[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_every_generation_compiles_it_without_a_copy_of_the_pool(generation, op, dtype):
    struct = jax.ShapeDtypeStruct
    pool, ids = struct((8192, 16, 16, 128), jnp.dtype(dtype)), struct((64,), jnp.int32)
    pages = () if op == "gather_pages" else (struct((64, *pool.shape[1:]), pool.dtype),)

    def call(pool, ids, *pages):
        return getattr(pallas_paged, op)(pool, ids, *pages, backend="mosaic_tpu")

    donated = {"donate_argnums": 0} if op == "scatter_pages" else {}
    hlo = aot_compile(call, (pool, ids, *pages), generation, jit_kwargs=donated).as_text()
    assert "tpu_custom_call" in hlo and f"{op}_16" in hlo
    assert not large_results(hlo, pool.size * pool.dtype.itemsize)


@NEEDS_NEW_JAX
@pytest.mark.parametrize("op", OPS)
def test_it_lowers_for_cuda(op):
    case = Case(op, 9, 33, 5, 256, "float32", "holes")  # a page takes more than one thread block
    pool, *rest = make(case).arrays()
    call = functools.partial(getattr(pallas_paged, op), backend="mosaic_gpu")
    text = jax.jit(call).trace(pool, *rest).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text


_GATHER = Case("gather_pages", 10, 4, 1, 128, "float32", "holes")
_SCATTER = Case("scatter_pages", 10, 4, 1, 128, "float32", "holes")
# name: (module, snippet, what is planted instead, case, symptom)
BUGS = {
    "gathered by entry": (
        "tpu",
        "send(id_of_entry, entry)",
        "send(entry, entry)",
        _GATHER,
        "bytes",
    ),
    "zeros are not zero": ("tpu", "zeros[...] = jnp.zeros_like(zeros)", "pass", _GATHER, "bytes"),
    "past the last entry": ("tpu", "entry < spec.num_entries", "entry >= 0", _GATHER, "error"),
    "scattered by entry": (
        "tpu",
        '(entry, id_of_entry) if spec.op == "scatter_pages"',
        '(entry, entry) if spec.op == "scatter_pages"',
        _SCATTER,
        "bytes",
    ),
    "an id of no page": (
        "tpu",
        "< jnp.uint32(pages.shape[0])",
        ">= jnp.uint32(0)",
        _SCATTER,
        "error",
    ),
    "zeros from nowhere on a GPU": (
        "gpu",
        "rows_smem[...] = jnp.zeros(rows_smem.shape, rows_smem.dtype)",
        "pass",
        _GATHER,
        "bytes",
    ),
    "gathered by entry on a GPU": (
        "gpu",
        '"gather_pages": (page_ids[0], entry)',
        '"gather_pages": (jnp.minimum(entry, 9), entry)',
        _GATHER,
        "bytes",
    ),
    "scattered from one page on a GPU": (
        "gpu",
        '"scatter_pages": (entry, page_ids[-1])',
        '"scatter_pages": (0 * entry, page_ids[-1])',
        _SCATTER,
        "bytes",
    ),
}

PLANTED = [(f"{kv_write.__name__}.{bug[0]}.page_copies", *bug[1:3]) for bug in BUGS.values()]


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name, monkeypatch):
    chip, old, new, case, symptom = BUGS[name]
    if chip == "gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU needs jax 0.11.2")
    name = f"{kv_write.__name__}.{chip}.page_copies"
    module = plant(monkeypatch, kv_write.__name__, name, old, new)
    if chip == "tpu":
        monkeypatch.setattr(module, "_ENTRIES_PER_STEP", 4)
    op, call = getattr(module, case.op), make(case)
    options = WriteOptions(f"mosaic_{chip}", False, None)
    jitted = jax.jit(lambda *arrays: op(*arrays, options), compiler_options=EXACT_COMPILE)
    how = run_on_gpu if chip == "gpu" else functools.partial(interpret, mode="eager")
    try:
        found = difference(how(lambda: jitted(*call.arrays())), call.expected())
    except (RaceFoundError, jax.errors.JaxRuntimeError):
        assert symptom == "error"
    else:
        assert symptom == "bytes" and found is not None
