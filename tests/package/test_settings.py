# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""jax's global settings change nothing: every op has the same bits and the same program under each.

The oracle is run, eagerly and inside a jit; the kernels are lowered for a TPU and for CUDA, where
the whole text must be what it is under jax's defaults (which tests/kv_write/test_compiled.py
compiles), and interpreted.
"""

import contextlib
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_paged
from bench.tpu_model.compile import mesh_of
from pallas_paged import settings
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.sampling_params import SamplingParams
from reference_engine.weights import random_params
from tests.attention.cases import interpret_all
from tests.kv_write.cases import run_all_on_gpu

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2"
)

T, HEADS, KV_HEADS, H, PAGE_SIZE = 20, 2, 1, 128, 8


@contextlib.contextmanager
def _flag(name, value):
    old = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, old)


def _mesh(size, axis_type):
    return jax.set_mesh(jax.make_mesh((size,), ("x",), axis_types=(axis_type,)))


@contextlib.contextmanager
def _compilation_cache():
    from jax.experimental.compilation_cache import compilation_cache

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(compilation_cache.reset_cache)
        for name, value in (
            ("jax_compilation_cache_dir", folder),
            ("jax_persistent_cache_min_compile_time_secs", 0),
            ("jax_persistent_cache_min_entry_size_bytes", -1),
            ("jax_raise_persistent_cache_errors", True),
        ):
            stack.enter_context(_flag(name, value))
        compilation_cache.reset_cache()
        yield


# What changes how jax traces; several at once, as each costs a trace.
TRACING = {
    "x64, highest precision, no promotion": lambda: _all(
        jax.enable_x64(True),
        jax.default_matmul_precision("highest"),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ),
    "as flags, with checks": lambda: _all(
        _flag("jax_enable_x64", True),
        _flag("jax_default_matmul_precision", "highest"),
        _flag("jax_numpy_rank_promotion", "raise"),
        _flag("jax_numpy_dtype_promotion", "strict"),
        _flag("jax_enable_checks", True),
        jax.checking_leaks(),
    ),
}
# And what changes where a program is run.
JITTED = TRACING | {
    "checks and leaks": lambda: _all(_flag("jax_enable_checks", True), jax.checking_leaks()),
    "a device": lambda: jax.default_device(jax.devices()[2]),
    "explicit mesh": lambda: _mesh(4, AxisType.Explicit),
    "mesh": lambda: _mesh(4, AxisType.Auto),
}
# And how; one by one, because an eager call is compiled once for all of them.
EAGER = {
    "x64": lambda: jax.enable_x64(True),
    "highest precision": lambda: jax.default_matmul_precision("highest"),
    "global precision": lambda: _flag("jax_default_matmul_precision", "bfloat16"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "no dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no NaN": lambda: jax.debug_nans(True),
    "no infinity": lambda: jax.debug_infs(True),
    "no jit": lambda: jax.disable_jit(True),
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "a platform": lambda: jax.default_device("cpu"),
    "tracebacks": lambda: _flag("jax_traceback_filtering", "off"),
    "compilation cache": _compilation_cache,
}


@contextlib.contextmanager
def _all(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@functools.cache
def _arrays() -> dict[str, Any]:
    """Tiny, on the device; the pools are never zero, and hold NaN where nobody may look."""
    rng = np.random.default_rng(0)

    def new(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    def ids(*values):
        return jnp.asarray(values, jnp.int32)

    pool = new(9, PAGE_SIZE, 2, H).at[8].set(jnp.nan)
    return {
        "pool": pool, "pool8": new(9, PAGE_SIZE, 4, H).astype(jnp.float8_e4m3fn),
        "q": new(T, HEADS, H), "k": new(T, KV_HEADS, H), "v": new(T, KV_HEADS, H),
        "kv_lens": ids(17, 11, 0), "page_indices": ids([1, 2, 3], [4, 5, 8], [8, 8, 8]),
        "cu_q_lens": ids(0, 9, 20, 20), "num_seqs": ids(2),
        "page_ids": ids(6, -1), "token_starts": ids(3, 0), "slots": jnp.arange(T, dtype=jnp.int32),
        "slices": ids([3, 16], [0, 7], [4, 8]), "num_slices": ids(2), "src": ids(1), "dst": ids(7),
        "pages": new(2, PAGE_SIZE, 2, H), "lse": new(T, HEADS).astype(jnp.float32),
        "scale": jnp.full(KV_HEADS, 0.5, jnp.float32), "sinks": jnp.zeros(HEADS, jnp.float32),
    }  # fmt: skip


def _batch(x):
    return x["kv_lens"], x["page_indices"], x["cu_q_lens"], x["num_seqs"]


# op -> what calls it; scales, windows and caps as Python numbers, numpy's and jax's.
OPS = {
    "page_write": lambda x, b: pallas_paged.page_write(
        x["pool"], x["k"], x["v"], x["page_ids"], x["token_starts"], backend=b),
    "page_write of 8 bits": lambda x, b: pallas_paged.page_write(
        x["pool8"], x["k"], x["v"], x["page_ids"], num_kv_heads=KV_HEADS, k_scale=0.5,
        v_scale=x["scale"], backend=b),
    "slice_write": lambda x, b: pallas_paged.slice_write(
        x["pool"], x["k"], x["v"], x["slices"], x["num_slices"], backend=b),
    "token_write": lambda x, b: pallas_paged.token_write(
        x["pool"], x["k"].reshape(T, -1), x["v"].reshape(T, -1), x["slots"],
        num_kv_heads=KV_HEADS, backend=b),
    "copy_pages": lambda x, b: pallas_paged.copy_pages(x["pool"], x["src"], x["dst"], backend=b),
    "gather_pages": lambda x, b: pallas_paged.gather_pages(x["pool"], x["page_ids"], backend=b),
    "scatter_pages": lambda x, b: pallas_paged.scatter_pages(
        x["pool"], x["page_ids"], x["pages"], backend=b),
    "merge_attention_states": lambda x, b: pallas_paged.merge_attention_states(
        [x["q"], -x["q"]], [x["lse"], -x["lse"]]),
    "attention": lambda x, b: pallas_paged.ragged_paged_attention(
        x["q"], x["pool"], *_batch(x), sm_scale=0.1, num_kv_heads=KV_HEADS, backend=b),
    "attention with all": lambda x, b: pallas_paged.ragged_paged_attention(
        x["q"], x["pool8"], *_batch(x), sm_scale=np.float32(0.1), sliding_window=5, soft_cap=3.0,
        k_scale=0.5, v_scale=x["scale"], sinks=x["sinks"], num_kv_heads=KV_HEADS, return_lse=True,
        backend=b),
    "write_and_attend": lambda x, b: pallas_paged.write_and_attend(
        x["q"], x["k"], x["v"], x["pool"], *_batch(x), sm_scale=0.1, sliding_window=7,
        num_kv_heads=KV_HEADS, backend=b),
}  # fmt: skip


def _copies():
    return {name: jnp.array(x) for name, x in _arrays().items()}


def _bits(results):
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(results)]


def _every_op(x, backend, names=tuple(OPS)):
    return {name: OPS[name](x, backend) for name in names}


def _write_indices(x):
    return pallas_paged.write_indices(
        x["page_indices"],
        *(x[n] for n in ("kv_lens", "cu_q_lens", "num_seqs")),
        PAGE_SIZE,
        num_tokens=T,
    )


@functools.cache
def _wanted(op):
    """What an eager call gives under jax's defaults."""
    return _bits(OPS[op](_copies(), "oracle"))


@pytest.mark.parametrize("setting", EAGER)
def test_the_oracle_has_the_same_bits(setting):
    copies = [_copies() for _ in OPS]
    wanted = {op: _wanted(op) for op in OPS}
    with EAGER[setting]():
        results = {op: OPS[op](x, "oracle") for op, x in zip(OPS, copies, strict=True)}
    for op, result in results.items():
        assert _bits(result) == wanted[op], op


@pytest.mark.parametrize("setting", ["x64", "no rank promotion", "no dtype promotion", "no jit"])
def test_write_indices_has_the_same_bits(setting):
    wanted = _write_indices(_arrays())
    with EAGER[setting]():
        found = _write_indices(_arrays())
    assert _bits(found) == _bits(wanted)


@functools.cache
def _wanted_jitted():
    return _bits(jax.jit(lambda x: (_every_op(x, "oracle"), _write_indices(x)))(_arrays()))


@pytest.mark.parametrize("setting", JITTED)
def test_the_oracle_in_a_jit_has_the_same_bits(setting):
    """(What a caller's own jit returns, the caller's own checks for NaN see: a pool holds any.)"""
    wanted = _wanted_jitted()
    with JITTED[setting]():
        found = jax.jit(lambda x: (_every_op(x, "oracle"), _write_indices(x)))(_arrays())
    assert _bits(found) == wanted


def _structs(mesh=None):
    """The arrays' shapes; on a mesh, replicated."""
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in _arrays().items()
    }


@pytest.fixture
def for_one_platform(monkeypatch):
    """What another platform would run is not traced, which takes as long."""

    def of(*args, tpu=None, cuda=None, default):
        return (tpu or cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", of)
    jax.clear_caches()
    yield
    jax.clear_caches()


# Each op once, in the form that has most in it.
LOWERED = ("slice_write", "token_write", "copy_pages", "attention with all", "write_and_attend")


def _lowered_for_tpu(mesh, names=LOWERED):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # A new function each time: nothing that was traced before is taken.
        return jax.jit(lambda x: _every_op(x, "mosaic_tpu", names)).lower(_structs(mesh))


def _lowered_for_cuda():
    traced = jax.jit(lambda x: _every_op(x, "mosaic_gpu", LOWERED)).trace(_structs())
    return traced.lower(lowering_platforms=("cuda",))


NO_PROMOTION = "x64, highest precision, no promotion"


@pytest.mark.usefixtures("for_one_platform")
# jax's checks of every jaxpr treble the time: with them fewer ops.
@pytest.mark.parametrize(
    "setting, names",
    [(NO_PROMOTION, LOWERED), ("as flags, with checks", ("token_write", "copy_pages"))],
)
def test_the_program_lowered_for_a_tpu_is_the_same(setting, names):
    mesh = mesh_of("v5e")
    wanted = _lowered_for_tpu(mesh, names).as_text()
    jax.clear_caches()
    with TRACING[setting]():
        found = _lowered_for_tpu(mesh, names).as_text()
    assert wanted.count("@tpu_custom_call") >= len(names)
    assert found == wanted


@needs_new_jax
@pytest.mark.usefixtures("for_one_platform")
def test_the_program_lowered_for_cuda_has_the_same_kernels():
    """Not to the letter: the bytecode of Mosaic's GPU modules differs a little under x64. And not
    with jax's leak checker: its own lowering of a GPU's loops leaves tracers."""
    wanted = _lowered_for_cuda().as_text().count("@mosaic_gpu_v2")
    jax.clear_caches()
    with TRACING[NO_PROMOTION]():
        found = _lowered_for_cuda().as_text().count("@mosaic_gpu_v2")
    assert found == wanted >= len(LOWERED)


@pytest.mark.usefixtures("for_one_platform")
def test_compiles_for_a_tpu_in_an_explicit_mesh():
    mesh = mesh_of("v5e")
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,))
    names = ("copy_pages", "write_and_attend")
    hlo = _lowered_for_tpu(mesh, names).compile().as_text()
    assert hlo.count('custom_call_target="tpu_custom_call"') == len(names)


def _interpreted(backend):
    """The bits of two ops interpreted, called as they are.

    (Inside a caller's jit, jax's GPU interpreter cannot be lowered under x64: its loops count in
    int64 there.)
    """
    x = _copies()
    x["pool"] = x["pool"].at[8].set(0)

    # A TPU's attention takes long, and the lowered program is the same to the letter.
    names = ("copy_pages", "attention" if backend == "mosaic_gpu" else "token_write")

    def call():
        own = (x | {"pool": jnp.array(x["pool"])} for _ in names)  # each op is given its pool
        return jax.tree.leaves([OPS[n](y, backend) for n, y in zip(names, own, strict=True)])

    if backend == "mosaic_gpu":
        return _bits(run_all_on_gpu(call, detect_races=False))
    return _bits(interpret_all(call, "eager", detect_races=False))


@pytest.mark.parametrize("backend", ["mosaic_tpu", pytest.param("mosaic_gpu", marks=needs_new_jax)])
def test_an_interpreted_kernel_has_the_same_bits(backend):
    wanted = _interpreted(backend)
    jax.clear_caches()
    with TRACING["as flags, with checks"]():
        found = _interpreted(backend)
    assert found == wanted


def test_64_bit_numbers():
    """What a caller computes under x64 is taken as 32 bits, and so are windows beyond them."""
    x = _arrays()

    def attend(sm_scale, window):
        return pallas_paged.ragged_paged_attention(
            x["q"],
            x["pool"],
            *_batch(x),
            sm_scale=sm_scale,
            sliding_window=window,
            num_kv_heads=KV_HEADS,
            backend="oracle",
        )

    wanted = attend(jnp.float32(0.1), None)
    with jax.enable_x64(True):
        sm_scale, window = jnp.float64(0.1), jnp.int64(2**40)
        assert (sm_scale.dtype, window.dtype) == (jnp.float64, jnp.int64)
        for call in (attend, jax.jit(attend)):
            out = call(sm_scale, window)
            np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (out, wanted)), 1e-2)


def test_outside_of_the_ops_nothing_is_changed():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        with settings.defaults():
            assert jnp.arange(2).dtype == jnp.int32
        assert jnp.arange(2).dtype == jnp.int64
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.zeros((2, 3)) + jnp.zeros(3)


@pytest.mark.parametrize("setting", ["x64", "no rank promotion", "no dtype promotion", "no NaN"])
def test_pools_and_validate(setting):
    x = _arrays()
    with EAGER[setting]():
        pool = pallas_paged.make_kv_pages(9, PAGE_SIZE, KV_HEADS, H)
        pallas_paged.validate(
            pool,
            kv_lens=x["kv_lens"],
            page_indices=x["page_indices"],
            cu_q_lens=x["cu_q_lens"],
            num_seqs=x["num_seqs"],
        )
    assert pool.shape == (9, PAGE_SIZE, 2, H) and pool.dtype == jnp.bfloat16


def _served():
    model = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    engine = Engine(random_params(model, seed=0), model, EngineConfig(max_model_len=64))
    engine.add_request([3, 1, 4], SamplingParams(max_tokens=3, logprobs=2))
    engine.add_request([2, 7], SamplingParams(max_tokens=3, temperature=0.9, seed=3, top_p=0.9))
    return [tuple(output) for _ in range(3) for output in engine.step()]


@pytest.mark.parametrize("setting", [None, "no NaN"])
def test_the_engine_generates_the_same_tokens(setting):
    wanted = _served()
    with EAGER[setting]() if setting else TRACING["as flags, with checks"]():
        assert _served() == wanted
