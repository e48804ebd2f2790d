# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The KV writes in Mosaic GPU: bit for bit what the plain loop makes of them, in place, refused.

On a GPU these tests run the kernels there (`JAX_PLATFORMS=cuda pytest tests -k gpu`); on a CPU in
GPU interpret mode, with race detection, and lowered for CUDA. test_kv_write_gpu_planted.py shows
that the checks find bugs.
"""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from pallas_paged import dispatch
from pallas_paged.kv_write.gpu import launch as mosaic_gpu
from pallas_paged.kv_write.tpu import launch as mosaic_tpu
from tests.kv_write import cases
from tests.kv_write.cases import Case, difference, expected, make, run_on_gpu

ON_GPU = jax.default_backend() == "gpu"
OPS = ("page_write", "slice_write", "token_write")
POOL_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
IS_OLD = jax.__version_info__ < (0, 11, 2)
needs_new_jax = pytest.mark.skipif(IS_OLD, reason="Mosaic GPU needs jax 0.11.2: test_old_jax")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="only a GPU's compiler makes this HLO")


def _static_cases():
    """Pool dtype x op; everything else is cycled, in cycles that drift past one another."""
    page_sizes = itertools.cycle((4, 16, 1, 24, 33))
    heads = itertools.cycle((2, 1, 3, 2, 1))
    head_dims = itertools.cycle((128, 64, 256, 64, 128))
    tokens = {
        "page_write": itertools.cycle((33, 47)),
        "slice_write": itertools.cycle((9, 5)),  # T + 16 slices, most of them dead
        "token_write": itertools.cycle((33, 16, 21)),
    }
    new_dtypes = itertools.cycle(("bfloat16", "float32", "bfloat16", "float16", "bfloat16"))
    forms = itertools.cycle((True, False))
    scales = itertools.cycle(("head", "tensor", "none", "head"))
    block_tokens = itertools.cycle((4, 16, 3, 8))
    kinds = {op: itertools.cycle(kinds) for op, kinds in cases.KINDS.items()}
    for dtype, op in itertools.product(POOL_DTYPES, OPS):
        yield Case(
            op,
            next(tokens[op]),
            next(page_sizes),
            next(heads),
            next(head_dims),
            dtype,
            next(kinds[op]),
            new_dtype=next(new_dtypes),
            is_flat=next(forms),
            scale=next(scales) if jnp.dtype(dtype).itemsize == 1 else "none",
            extreme=True,
            block_tokens=next(block_tokens),
        )


SPECIAL = [
    # The three ops as a model uses them: no conversion, whole blocks and a rest.
    Case("page_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("page_write", 70, 16, 2, 128, entries="implicit", block_tokens=8),
    Case("page_write", 70, 33, 2, 128, entries="implicit", block_tokens=4, fetch_first=False),
    Case("slice_write", 17, 16, 2, 128, entries="any", block_tokens=4),
    Case("token_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("token_write", 37, 3, 2, 128, entries="any", block_tokens=8, fetch_first=False),
    # Fewer tokens than a block holds, than a page, or than a warpgroup has threads.
    Case("page_write", 7, 4, 2, 128, block_tokens=16),
    Case("page_write", 16, 33, 2, 128, block_tokens=4),
    Case("slice_write", 1, 4, 2, 64, block_tokens=4),
    Case("token_write", 1, 4, 1, 64, "int8", "live", scale="head", block_tokens=4),
    Case("token_write", 3, 4, 1, 64, "float8_e5m2", "any", scale="head", block_tokens=4),
    Case("page_write", 33, 1, 1, 64, "float8_e4m3fn", "any", scale="head", block_tokens=4),
    # Many heads: more than one thread block per token.
    Case("token_write", 5, 4, 24, 256, "float32", "any", "float32", block_tokens=4),
    Case("token_write", 3, 4, 12, 64, "int8", "live", scale="head", block_tokens=2),
    # A caller's own pool: padding rows beyond the heads.
    Case("page_write", 33, 4, 1, 64, "bfloat16", num_rows=1, block_tokens=4),
    Case("slice_write", 9, 4, 3, 128, "int8", num_rows=22, scale="tensor", block_tokens=4),
    Case("token_write", 16, 4, 2, 128, num_rows=6, is_flat=False, block_tokens=4),
]
# Heads that the pool has more lanes for; k and v that are quantised already.
SPECIAL += [
    Case("page_write", 33, 16, 2, 80, entries="holes"),
    Case("slice_write", 9, 4, 1, 160, "float8_e4m3fn", scale="head", extreme=True),
    Case("token_write", 21, 4, 3, 32, "float32", "any", "float32", is_flat=False),
    Case("token_write", 21, 4, 3, 8, "int8", "any", scale="tensor"),
    Case("page_write", 33, 4, 2, 240, "bfloat16", "any", "float16", is_flat=False),
    Case("token_write", 33, 4, 2, 128, "float8_e4m3fn", "any", "float8_e4m3fn", scale="head"),
    Case("page_write", 33, 16, 3, 64, "float8_e5m2", "holes", "float8_e5m2", is_flat=False),
    Case("slice_write", 9, 4, 1, 96, "int8", "any", "int8", scale="tensor"),
]
COPIES = [
    Case("copy_pages", 5, 4, 2, 128, "bfloat16", "holes"),
    Case("copy_pages", 19, 1, 1, 64, "int8", "holes"),
    Case("copy_pages", 4, 33, 5, 256, "float32", "live"),  # a page takes more than one thread block
    Case("copy_pages", 3, 2, 1, 128, "float8_e5m2", "none"),
]
CASES = [*_static_cases(), *SPECIAL, *COPIES]


def _id(x):
    return x.id if isinstance(x, Case) else str(x)


def _same(actual, wanted):
    found = difference(actual, wanted)
    assert found is None, found


@needs_new_jax
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_kernel_is_the_plain_loop(case):
    call = make(case)
    _same(run_on_gpu(lambda: call.run("mosaic_gpu")), expected(call))


def test_coverage():
    """What the cases above must cover together, so that a trimmed list does not lose it."""
    assert set(itertools.product(OPS, POOL_DTYPES)) <= {(c.op, c.pool_dtype) for c in CASES}
    for op, kinds in cases.KINDS.items():
        assert set(kinds) <= {c.entries for c in CASES if c.op == op}
    for name, wanted in {
        "page_size": {1, 4, 16, 24, 33},
        "num_kv_heads": {1, 2, 3, 12, 24},
        "head_dim": {64, 128, 256},
        "num_tokens": {1, 3, 5, 7, 9, 16, 17, 33, 47, 70},
        "new_dtype": {"float32", "bfloat16", "float16"},
        "is_flat": {True, False},
        "fetch_first": {True, False},
    }.items():
        assert wanted <= {getattr(c, name) for c in CASES}, name
    quantized = {(c.pool_dtype, c.scale) for c in CASES}
    assert {"none", "tensor", "head"} <= {s for d, s in quantized if jnp.dtype(d).itemsize == 1}


@needs_new_jax
@pytest.mark.parametrize("case", [case for case in CASES if case.op != "copy_pages"], ids=_id)
def test_case_lowers_for_cuda(case):
    """The interpreter takes blocks that the lowering would not."""
    call = make(case)
    positional, keywords = call.arguments()
    config = call.config("mosaic_gpu")

    def step(pool):
        rest = positional[1:]
        op = getattr(pallas_paged, case.op)
        return op(pool, *rest, **keywords, config=config, backend="mosaic_gpu")

    text = jax.jit(step).trace(positional[0]).lower(lowering_platforms=("cuda",)).as_text()
    has_work = case.op != "page_write" or case.num_tokens >= case.page_size
    assert ("custom_call @mosaic_gpu" in text) == has_work


@needs_new_jax
@pytest.mark.skipif(not ON_GPU, reason="the interpreter would take minutes")
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("pool_dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("op", OPS)
def test_large(op, pool_dtype, page_size):
    """More blocks than a GPU runs at once."""
    scale = "head" if pool_dtype != "bfloat16" else "none"
    call = make(Case(op, 20_003, page_size, 8, 128, pool_dtype, "any", scale=scale, extreme=True))
    _same(call.run("mosaic_gpu"), expected(call))


@needs_new_jax
@pytest.mark.parametrize("op", ["token_write", "page_write"])
def test_two_entries_for_one_slot(op):
    """Either may win, nothing else may come; also more of them than the pool has slots."""
    call = make(Case(op, 33, 1, 1, 128, "float32", is_flat=False, block_tokens=1))
    ids = np.arange(33, dtype=np.int32) % 4
    metadata = (ids,) if op == "token_write" else (ids, np.arange(33, dtype=np.int32))
    call = dataclasses.replace(call, kv_pages=call.kv_pages[:4], metadata=metadata)
    # Two copies into one slot are a race, here by the caller's wish.
    result = run_on_gpu(lambda: call.run("mosaic_gpu"), detect_races=False)
    slots = cases.new_slots(call)
    for slot in range(4):
        # K and V of a slot are two copies: each of one of the tokens. On a GPU two copies into one
        # row at a time may each leave a part of it, so there each value is one of the tokens'.
        is_same = result[slot, 0].view(np.uint32) == slots[slot::4].view(np.uint32)
        is_one = is_same if ON_GPU else is_same.all(axis=-1)
        assert is_one.any(axis=0).all(), slot


@needs_new_jax
@pytest.mark.parametrize("count", [-3, 0, 2, cases.INT_MAX])
def test_num_slices_is_clamped(count):
    call = make(Case("slice_write", 16, 4, 1, 128, "float32", "live", is_flat=False))
    slices, num_slices = call.metadata
    call = dataclasses.replace(
        call, metadata=(slices[:, : num_slices[0]], np.array([count], np.int32))
    )
    _same(run_on_gpu(lambda: call.run("mosaic_gpu")), expected(call))


@needs_new_jax
@pytest.mark.parametrize(("block_tokens", "rows"), [(None, 128), (64, 128), (16, 64), (3, 8)])
def test_a_copys_config_says_what_a_block_moves(block_tokens, rows):
    """As many rows as fit, or of so many tokens as the config allows, in equal parts of a page."""
    config = block_tokens and mosaic_gpu.GpuWriteConfig(block_tokens)
    pool, ids = jnp.zeros((6, 64, 4, 128), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    jaxpr = jax.make_jaxpr(
        lambda pool: pallas_paged.copy_pages(pool, ids, ids, config=config, backend="mosaic_gpu")
    )(pool)
    assert re.search(rf"copy_pages_{rows}\b", str(jaxpr))


@needs_new_jax
@pytest.mark.parametrize("op", [*OPS, "copy_pages"])
def test_nothing_to_write(op):
    call = make(Case(op, 0, 4, 2, 128, entries="live"))
    _same(run_on_gpu(lambda: call.run("mosaic_gpu")), call.kv_pages)
    call = make(Case(op, 16, 4, 2, 128, entries="live"))
    none = np.zeros((0,), np.int32)
    metadata = {
        "page_write": (none, none),
        "slice_write": (np.zeros((3, 0), np.int32), np.array([5], np.int32)),
        "token_write": (none,),
        "copy_pages": (none, none),
    }[op]
    new = None if op == "copy_pages" else call.k[: None if op != "token_write" else 0]
    call = dataclasses.replace(call, metadata=metadata, k=new, v=new)
    _same(run_on_gpu(lambda: call.run("mosaic_gpu")), call.kv_pages)


@needs_new_jax
@pytest.mark.parametrize("op", [*OPS, "copy_pages"])
def test_only_the_pool_is_donated(op):
    call = make(Case(op, 16, 4, 1, 64, "int8", "live", is_flat=False, scale="head"))
    positional, keywords = call.arguments()
    scales = [x for x in keywords.values() if isinstance(x, jax.Array)]
    result = run_on_gpu(
        lambda: getattr(pallas_paged, op)(*positional, **keywords, backend="mosaic_gpu")
    )
    assert positional[0].is_deleted()
    assert not any(x.is_deleted() for x in [*positional[1:], *scales] if x is not None)
    _same(result, expected(call))


def _shapes(op, dtype, page_size, head_dim, new_dtype=None):
    """Shapes of one call with 100 tokens: pool, the others, keywords."""
    call = make(Case(op, 100, page_size, 8, head_dim, dtype, "live", new_dtype or "bfloat16"))
    if jnp.dtype(dtype).itemsize == 1 and op != "copy_pages":
        scale = np.ones((8,), np.float32)
        call = dataclasses.replace(call, k_scale=scale, v_scale=scale)
    (pool, *rest), keywords = call.arguments()
    return pool, rest, keywords


def _jitted(op, keywords):
    static = {name: x for name, x in keywords.items() if not hasattr(x, "shape")}

    def step(pool, rest, scales):
        return getattr(pallas_paged, op)(pool, *rest, **static, **scales, backend="mosaic_gpu")

    scales = {name: x for name, x in keywords.items() if hasattr(x, "shape")}
    return jax.jit(step, donate_argnums=0), scales


LOWERED = [
    *((op, dtype, 16, 128) for op in OPS for dtype in POOL_DTYPES),
    *((op, "bfloat16", page_size, 128) for op in OPS for page_size in (1, 64, 96)),
    *(
        (op, dtype, 32, head_dim)
        for op in OPS
        for dtype in ("bfloat16", "float8_e4m3fn")
        for head_dim in (64, 256)
    ),
    *(("copy_pages", dtype, 16, 128) for dtype in POOL_DTYPES),
]


@needs_new_jax
@pytest.mark.parametrize(("op", "dtype", "page_size", "head_dim"), LOWERED)
def test_lowered_for_cuda_in_place(op, dtype, page_size, head_dim):
    """One kernel, whose result is the pool that came in."""
    new_dtype = dtype if dtype in ("float32", "float16") else "bfloat16"
    pool, rest, keywords = _shapes(op, dtype, page_size, head_dim, new_dtype)
    step, scales = _jitted(op, keywords)
    text = step.trace(pool, rest, scales).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    pool_type = "x".join(map(str, pool.shape))
    assert re.search(rf"%arg0: tensor<{pool_type}x\w+> {{[^}}]*tf.aliasing_output = 0", text)
    aliases = re.findall(r"output_operand_alias<[^>]*operand_index = (\d+)", text)
    assert len(aliases) == 1
    operands = re.search(r"custom_call @mosaic_gpu\w*\(([^)]*)\)", text)[1].split(", ")
    assert int(aliases[0]) == len(operands) - 1  # the pool comes last
    # The pool by slot, behind the barrier that keeps XLA from fusing the kernel with a slice of it.
    [(made, source)] = re.findall(rf"{re.escape(operands[-1])} = stablehlo\.(\w+) (%\w+)", text)
    assert made == "reshape"
    assert re.search(rf"{re.escape(source)} = stablehlo.optimization_barrier %arg0 ", text)


def _copies(text, pool):
    """HLO instructions that make another array of the pool's size."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|fusion|copy-start)\(", text)
    return [s for s in shapes if np.prod([int(n) for n in s.split(",")]) == pool.size]


@needs_new_jax
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("op", [*OPS, "copy_pages"])
def test_compiled_without_a_copy(op, dtype):
    pool, rest, keywords = _shapes(op, dtype, 16, 128)
    step, scales = _jitted(op, keywords)
    assert not _copies(step.lower(pool, rest, scales).compile().as_text(), pool)


@needs_new_jax
@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_loop_over_layers_without_a_copy(op):
    """A flat pool of four layers, carried through a scan that writes one layer in each step."""
    pool, rest, keywords = _shapes(op, "bfloat16", 16, 128)
    k, v, *metadata = rest
    pool = jnp.tile(pool, (4, 1, 1, 1))
    step, scales = _jitted(op, keywords)

    def layers(pool, k, v, metadata):
        def layer(pool, i):
            return step(pool, [k * (i + 1).astype(k.dtype), v, *metadata], scales), None

        return jax.lax.scan(layer, pool, jnp.arange(4))[0]

    run = jax.jit(layers, donate_argnums=0)
    assert not _copies(run.lower(pool, k, v, metadata).compile().as_text(), pool)


# --- refusals ---------------------------------------------------------------------------------


def _refused(error, sentence, op="token_write", **changes):
    arguments = {
        "kv_pages": jnp.ones((6, 4, 4, 128), jnp.bfloat16),
        "k": jnp.ones((8, 2, 128), jnp.bfloat16),
        "v": jnp.ones((8, 2, 128), jnp.bfloat16),
        "slots": jnp.zeros((8,), jnp.int32),
    } | changes
    with pytest.raises(error, match=re.escape(sentence)):
        getattr(pallas_paged, op)(**{"backend": "mosaic_gpu", **arguments})


@pytest.mark.skipif(not IS_OLD, reason="this jax is new enough")
def test_old_jax():
    sentence = f"backend 'mosaic_gpu' cannot run this call: jax is {jax.__version__}, and"
    _refused(NotImplementedError, sentence)
    ids = jnp.zeros((2,), jnp.int32)
    with pytest.raises(NotImplementedError, match=re.escape(sentence)):
        pallas_paged.copy_pages(jnp.ones((6, 4, 4, 128)), ids, ids, backend="mosaic_gpu")


@needs_new_jax
def test_wider_heads():
    new = jnp.ones((8, 2, 300), jnp.bfloat16)
    sentence = "head_dim is 300 and the kernels take up to 256"
    _refused(NotImplementedError, sentence, kv_pages=jnp.ones((6, 4, 4, 384)), k=new, v=new)


@needs_new_jax
def test_half_a_pair_of_rows():
    _refused(NotImplementedError, "the pool has R = 5 rows", kv_pages=jnp.ones((6, 4, 5, 128)))


@needs_new_jax
def test_other_gpus(monkeypatch):
    """An Ampere has none of the copies; "auto" takes XLA's operations and says so."""

    class Device:
        compute_capability, device_kind = "8.0", "NVIDIA A100"

    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    sentence = "compute capability 8.0, and the kernels are written for Hopper (9.0)"
    _refused(NotImplementedError, sentence)
    plans = {
        "mosaic_gpu": dispatch.Plan(refusal=dispatch.why_no_mosaic_gpu()),
        "xla": dispatch.Plan(),
    }
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"and 'xla' runs it, which is slower: the GPU has"):
        assert dispatch.choose("token_write", "auto", plans.__getitem__) == ("xla", None)


@needs_new_jax
def test_config_of_another_backend():
    hint = "wanted None or the block sizes of a write: pass a pallas_paged.GpuWriteConfig"
    _refused(ValueError, hint, config=mosaic_tpu.TpuWriteConfig(16))


def test_config_of_a_gpu_elsewhere():
    hint = "wanted None or the block sizes of a write: pass a pallas_paged.TpuWriteConfig"
    _refused(ValueError, hint, config=mosaic_gpu.GpuWriteConfig(4), backend="mosaic_tpu")


@pytest.mark.parametrize("block_tokens", [-1, 0, 65])
def test_config_value(block_tokens):
    with pytest.raises(ValueError, match=f"block_tokens is {block_tokens}; wanted 1 to 64"):
        mosaic_gpu.GpuWriteConfig(block_tokens)
