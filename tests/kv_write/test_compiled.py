# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What libtpu makes of the writes, ahead of time on a CPU: they compile, and copy no pool."""

import functools
import itertools
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import pallas_paged
from bench.tpu_model.compile import COMPILE_ENV, TOPOLOGIES, aot_compile
from pallas_paged import layout
from pallas_paged.kv_write.tpu import launch as mosaic_tpu

OPS = ("page_write", "slice_write", "token_write", "copy_pages")
POOL_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
GENERATIONS = tuple(TOPOLOGIES)
# A pool must be larger than a VMEM (128 MiB), or XLA may hold all of it there.
MIN_POOL_BYTES = 256 * 2**20

Struct = jax.ShapeDtypeStruct


def _pool(num_kv_heads, head_dim, page_size, dtype, num_rows=None, min_bytes=MIN_POOL_BYTES):
    """A pool's shape, in 256 MiB or more."""
    _, _, rows, lanes = layout.pool_shape(1, page_size, num_kv_heads, head_dim, dtype)
    rows = num_rows or rows
    page_bytes = page_size * rows * lanes * jnp.dtype(dtype).itemsize
    return Struct((-(-min_bytes // page_bytes), page_size, rows, lanes), jnp.dtype(dtype))


def _new(num_tokens, num_kv_heads, head_dim, dtype, is_flat):
    shape = (num_kv_heads * head_dim,) if is_flat else (num_kv_heads, head_dim)
    return Struct((num_tokens, *shape), jnp.dtype(dtype))


def _metadata(op, num_tokens, page_size, num_entries=None):
    ids = functools.partial(Struct, dtype=jnp.int32)
    n = num_entries or max(1, num_tokens // page_size)
    return {
        "page_write": (ids((n,)), ids((n,))),
        "slice_write": (ids((3, n)), ids((1,))),
        "token_write": (ids((num_tokens,)),),
        "copy_pages": (ids((n,)), ids((n,))),
    }[op]


def _compile(op, generation, pool, new, metadata, num_kv_heads, *, scales=(), donate=True):
    """HLO text of one public op, compiled for a TPU generation."""

    def call(pool, new, metadata, scales):
        keywords = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        if new:
            keywords["num_kv_heads"] = num_kv_heads
        return getattr(pallas_paged, op)(pool, *new, *metadata, **keywords, backend="mosaic_tpu")

    jit_kwargs = {"donate_argnums": 0} if donate else {}
    return aot_compile(
        call, (pool, new, metadata, scales), generation, jit_kwargs=jit_kwargs
    ).as_text()


# Instructions that move nothing: they rename, pass on, or are the kernels themselves.
_NO_COPY = {
    "parameter",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "while",
    "call",
    "conditional",
    "opt-barrier",
}


def large_results(hlo, num_bytes):
    """(opcode, line) of the instructions that write `num_bytes` or more in one array.

    Looks at what the TPU runs one after another: the entry and the bodies of loops and calls, not
    the insides of fusions.
    """
    inside_fusions = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", hlo))
    found, name = [], None
    for line in hlo.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start:
            name = start[1]
        match = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
        if match is None or name in inside_fusions:
            continue
        result, opcode = match.groups()
        is_kernel = 'custom_call_target="tpu_custom_call"' in line
        if opcode in _NO_COPY or is_kernel:
            continue
        if max(map(_num_bytes, re.findall(r"[a-z]\w*\[[\d,]*\]", result)), default=0) >= num_bytes:
            found.append((opcode, line.strip()))
    return found


def _num_bytes(array):
    """Bytes of `bf16[8,128]`."""
    dtype, dims = array[:-1].split("[")
    bits = re.search(r"\d+", dtype)  # pred has none
    return math.prod(int(d) for d in dims.split(",") if d) * (int(bits[0]) if bits else 8) // 8


def _size(x):
    return x.size * x.dtype.itemsize


@pytest.fixture
def for_a_tpu_alone(monkeypatch):
    """What a CPU would run is not traced, which takes as long; other tests here leave it in."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))


def _assert_no_pool_copy(hlo, pool):
    assert "tpu_custom_call" in hlo, "the kernel is not in the program"
    found = large_results(hlo, _size(pool))
    assert not found, found[0][1][:300]


def test_conftest_sets_what_compiling_needs():
    for name in COMPILE_ENV.keys() - {"JAX_PLATFORMS"}:  # the caller's wish comes first
        assert os.environ[name] == COMPILE_ENV[name]


def _every_op():
    """op x pool dtype x generation; shapes are cycled so that each meets all of them."""
    heads = itertools.cycle((8, 1, 2, 3, 5))
    head_dims = itertools.cycle((128, 64, 80, 256, 96, 192, 128))
    page_sizes = itertools.cycle((16, 1, 24, 33, 128, 256))
    forms = itertools.cycle((True, False, True, True, False, True, False))
    new_dtypes = itertools.cycle(("bfloat16", "float32", "bfloat16"))
    for generation, dtype, op in itertools.product(GENERATIONS, POOL_DTYPES, OPS):
        yield (
            generation,
            op,
            dtype,
            next(heads),
            next(head_dims),
            next(page_sizes),
            next(forms),
            next(new_dtypes),
        )


def _op_id(args):
    generation, op, dtype, heads, head_dim, page_size, is_flat, new_dtype = args
    form = "flat" if is_flat else "by_head"
    return f"{generation}-{op}-{dtype}-K{heads}-H{head_dim}-p{page_size}-{new_dtype}-{form}"


EVERY_OP = list(_every_op())


@pytest.mark.usefixtures("for_a_tpu_alone")
@pytest.mark.parametrize("args", EVERY_OP, ids=_op_id)
def test_every_op_compiles_without_a_copy(args):
    generation, op, dtype, heads, head_dim, page_size, is_flat, new_dtype = args
    num_tokens = 709  # a multiple of nothing, with whole pages of 256
    pool = _pool(heads, head_dim, page_size, dtype)
    new = (_new(num_tokens, heads, head_dim, new_dtype, is_flat),) * 2
    scales = ()
    if layout.is_quantized(dtype) and op != "copy_pages":
        scales = (Struct((heads,), jnp.float32), Struct((), jnp.float32))
    metadata = _metadata(op, num_tokens, page_size)
    new = () if op == "copy_pages" else new
    hlo = _compile(op, generation, pool, new, metadata, heads, scales=scales)
    _assert_no_pool_copy(hlo, pool)


def test_coverage():
    """What the compiles above must cover together."""
    columns = list(zip(*EVERY_OP, strict=True))
    wanted = ({8, 1, 2, 3, 5}, {64, 80, 96, 128, 192, 256}, {1, 16, 24, 33, 128, 256})
    assert all(w <= set(c) for w, c in zip(wanted, columns[3:6], strict=True))
    writes = {(a[1], a[6], a[7]) for a in EVERY_OP}
    assert set(itertools.product(OPS[:3], (True, False), ("bfloat16", "float32"))) <= writes


MANY = {
    "65536_tokens_by_page": ("page_write", 65536, None),
    "1000000_slots": ("token_write", 1_000_000, None),
    "1000000_slices": ("slice_write", 65536, 1_000_000),
}


@pytest.mark.parametrize("generation", ["v4", "tpu7x"])
@pytest.mark.parametrize(("op", "num_tokens", "num_entries"), MANY.values(), ids=MANY)
def test_many_entries(op, num_tokens, num_entries, generation):
    heads = 8 if op == "page_write" else 1
    pool = _pool(heads, 128, 16, "bfloat16", min_bytes=2**30)
    new = (_new(num_tokens, heads, 128, "bfloat16", True),) * 2
    metadata = _metadata(op, num_tokens, 16, num_entries)
    _assert_no_pool_copy(_compile(op, generation, pool, new, metadata, heads), pool)


def _vmem_bytes(hlo):
    """VMEM that the kernels of a program hold, by the compiler's own account."""
    kernels = "\n".join(line for line in hlo.splitlines() if "tpu_custom_call" in line)
    used = re.findall(r'"used_scoped_memory_configs":(\[.*?\])', kernels)
    sizes = [
        int(size)
        for config in used
        for size in re.findall(r'"memory_space":"1".*?"size":"(\d+)"', config)
    ]
    assert sizes, "no kernel says what VMEM it uses"
    return max(sizes)


@pytest.mark.parametrize("generation", ["v4", "tpu7x"])
@pytest.mark.parametrize("op", OPS[:3])
def test_vmem_does_not_grow_with_the_batch(op, generation):
    """A quarter of a v4's, however many tokens there are."""
    pool = _pool(8, 128, 16, "bfloat16")
    new = (_new(1_000_000, 8, 128, "bfloat16", True),) * 2
    metadata = _metadata(op, 1_000_000, 16)
    assert _vmem_bytes(_compile(op, generation, pool, new, metadata, 8)) < 4 * 2**20


# Large slots, and the forms and dtypes that take most room.
LARGE = [(16, 128, "bfloat16", True), (8, 256, "float32", False), (32, 128, "int8", True)]


@pytest.mark.parametrize(("heads", "head_dim", "dtype", "is_flat"), LARGE)
def test_vmem_of_large_slots(heads, head_dim, dtype, is_flat):
    pool = _pool(heads, head_dim, 16, dtype)
    new = (_new(8192, heads, head_dim, "float32", is_flat),) * 2
    hlo = _compile("page_write", "v4", pool, new, _metadata("page_write", 8192, 16), heads)
    assert _vmem_bytes(hlo) <= 4 * 2**20


def _made_rows():
    """(rows, lanes, dtype) of every pool that make_kv_pages makes for these heads."""
    heads = (*range(1, 13), 16, 20, 24)
    return sorted(
        {
            (layout.num_rows(k, h, d), layout.num_lanes(h), d)
            for k, h, d in itertools.product(heads, (64, 128, 256), ("int8", "bfloat16", "float32"))
            if h < 256 or d == "bfloat16"
        }
    )


def _write_one_head(rows, lanes, dtype, generation):
    """HLO and pool of a page_write of one head into a pool of `rows` rows."""
    head_dim = 64 if lanes == 128 and rows == 1 else lanes
    pool = _pool(1, head_dim, 16, dtype, num_rows=rows)
    new = (_new(64, 1, head_dim, "bfloat16", False),) * 2
    metadata = _metadata("page_write", 64, 16)
    return _compile("page_write", generation, pool, new, metadata, 1), pool


@pytest.mark.parametrize(("rows", "lanes", "dtype"), _made_rows())
def test_made_pools_stay_where_they_are(rows, lanes, dtype):
    generation = ("v5e", "tpu7x")[(rows // 8 + lanes // 128) % 2]
    if dtype == "bfloat16":
        _assert_no_pool_copy(*_write_one_head(rows, lanes, dtype, generation))
    else:  # the kernel that compiles fastest: where the pool lies is XLA's choice, not the kernel's
        pool = _pool(1, lanes, 16, dtype, num_rows=rows)
        ids = _metadata("copy_pages", 64, 16)
        _assert_no_pool_copy(_compile("copy_pages", generation, pool, (), ids, 1), pool)


# What the docstring of layout.num_rows says of other row counts.
BAD = [
    (6, "bfloat16", "v5e"),
    (10, "bfloat16", "v6e"),
    (12, "bfloat16", "v4"),
    (20, "float32", "v5p"),
    (2, "int8", "v5e"),
]


@pytest.mark.parametrize(("rows", "dtype", "generation"), BAD)
def test_other_row_counts_are_copied(rows, dtype, generation):
    """Why make_kv_pages pads; also: the check for copies can fail."""
    hlo, pool = _write_one_head(rows, 128, dtype, generation)
    assert large_results(hlo, _size(pool))


def test_a_pool_that_is_not_donated_is_copied():
    """The check for copies can fail, here on a plain copy."""
    pool = _pool(8, 128, 16, "bfloat16")
    ids = _metadata("copy_pages", 64, 16)
    hlo = _compile("copy_pages", "v5e", pool, (), ids, 8, donate=False)
    assert {opcode for opcode, _ in large_results(hlo, _size(pool))} & {"copy", "copy-start"}


def _rope_by_head(x, cos, sin, num_kv_heads):
    """RoPE of [T, K*H] one head's lanes at a time: the form that XLA fuses without a copy."""
    half = x.shape[1] // num_kv_heads // 2
    heads = []
    for head in jnp.split(x.astype(jnp.float32), num_kv_heads, axis=1):
        turned = jnp.roll(head, half, axis=1)
        heads.append((head * cos + turned * sin).astype(x.dtype))
    return jnp.concatenate(heads, axis=1)


def _rope_reshaped(x, cos, sin, num_kv_heads):
    """RoPE as most models write it, on a view [T, K, H]."""
    y = x.reshape(x.shape[0], num_kv_heads, -1).astype(jnp.float32)
    turned = jnp.roll(y, y.shape[-1] // 2, axis=-1)
    return (y * cos[:, None] + turned * sin[:, None]).astype(x.dtype).reshape(x.shape)


def _layer(pool, x, w_k, w_v, cos, sin, page_ids, *, rope, form, heads=2):
    k, v = rope(x @ w_k, cos, sin, heads), x @ w_v
    if form == "by_head":
        k, v = (y.reshape(y.shape[0], heads, -1) for y in (k, v))
    return pallas_paged.page_write(pool, k, v, page_ids, num_kv_heads=heads, backend="mosaic_tpu")


def _layer_args(num_tokens, pool, num_layers=None):
    layers = () if num_layers is None else (num_layers,)
    bf16, f32 = jnp.bfloat16, jnp.float32
    return (
        pool,
        Struct((num_tokens, 1024), bf16),
        *(Struct((*layers, 1024, 256), bf16) for _ in "kv"),
        *(Struct((num_tokens, 128), f32) for _ in ("cos", "sin")),
        Struct((num_tokens // 16,), jnp.int32),
    )


# So many tokens that k is as large as a VMEM and XLA cannot hide a copy of it there.
CHAIN_TOKENS = 262144


@pytest.mark.parametrize(
    ("generation", "rope"),
    [("v5e", _rope_by_head), ("tpu7x", lambda x, *_: x)],
    ids=["v5e-rope", "tpu7x-no_rope"],
)
def test_projection_to_pool_copies_neither_k_nor_v(generation, rope):
    pool = _pool(2, 128, 16, "bfloat16", min_bytes=2**30)
    layer = functools.partial(_layer, rope=rope, form="flat")
    hlo = aot_compile(
        layer, _layer_args(CHAIN_TOKENS, pool), generation, jit_kwargs={"donate_argnums": 0}
    ).as_text()
    _assert_no_pool_copy(hlo, pool)
    found = large_results(hlo, CHAIN_TOKENS * 256 * 2)
    assert {opcode for opcode, _ in found} <= {"fusion"}, [line[:200] for _, line in found]


@pytest.mark.parametrize(
    ("rope", "form"),
    [(lambda x, *_: x, "by_head"), (_rope_reshaped, "flat")],
    ids=["by_head", "rope_on_a_view"],
)
def test_other_forms_are_copied_by_xla(rope, form):
    """Why the docs recommend [T, K*H] and RoPE by head; also: the check above can fail."""
    pool = _pool(2, 128, 16, "bfloat16", min_bytes=2**30)
    layer = functools.partial(_layer, rope=rope, form=form)
    hlo = aot_compile(
        layer, _layer_args(CHAIN_TOKENS, pool), "v5e", jit_kwargs={"donate_argnums": 0}
    ).as_text()
    opcodes = {opcode for opcode, _ in large_results(hlo, CHAIN_TOKENS * 256 * 2)}
    assert opcodes & {"copy", "transpose", "reshape"}  # a reshape that was no bitcast is a copy


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_scan_over_layers(generation):
    """One flat pool of L * P pages through lax.scan, ids moved by layer * P."""
    num_layers = 4
    pool = _pool(2, 128, 16, "bfloat16", min_bytes=2**30)
    num_pages = pool.shape[0] // num_layers

    def model(pool, x, w_k, w_v, cos, sin, page_ids):
        def body(pool, layer):
            index, w_k, w_v = layer
            ids = jnp.where(page_ids >= 0, page_ids + index * num_pages, -1)
            pool = _layer(pool, x, w_k, w_v, cos, sin, ids, rope=_rope_by_head, form="flat")
            return pool, None

        return lax.scan(body, pool, (jnp.arange(num_layers), w_k, w_v))[0]

    args = _layer_args(CHAIN_TOKENS, pool, num_layers)
    hlo = aot_compile(model, args, generation, jit_kwargs={"donate_argnums": 0}).as_text()
    assert " while(" in hlo  # the loop was not unrolled away
    _assert_no_pool_copy(hlo, pool)
    found = large_results(hlo, CHAIN_TOKENS * 256 * 2)
    assert {opcode for opcode, _ in found} <= {"fusion"}, [line[:200] for _, line in found]


def test_config_is_in_the_kernels_name():
    pool = _pool(2, 128, 16, "bfloat16")
    new = (_new(256, 2, 128, "bfloat16", True),) * 2

    def call(pool, k, v, ids):
        return pallas_paged.page_write(
            pool,
            k,
            v,
            ids,
            num_kv_heads=2,
            config=mosaic_tpu.TpuWriteConfig(48),
            backend="mosaic_tpu",
        )

    ids = Struct((16,), jnp.int32)
    hlo = aot_compile(call, (pool, *new, ids), "v5e", jit_kwargs={"donate_argnums": 0}).as_text()
    assert "page_write_16_block48" in hlo


@pytest.mark.parametrize(("block_tokens", "part"), [(None, 48), (48, 48), (32, 24), (16, 16)])
def test_a_copys_config_says_what_a_dma_moves(block_tokens, part):
    """A page, or the largest equal parts of it that the config allows; in place either way."""
    pool, ids = _pool(2, 128, 48, "bfloat16"), _metadata("copy_pages", 64, 48)
    config = block_tokens and mosaic_tpu.TpuWriteConfig(block_tokens)

    def call(pool, ids):
        return pallas_paged.copy_pages(pool, *ids, config=config, backend="mosaic_tpu")

    hlo = aot_compile(call, (pool, ids), "v5e", jit_kwargs={"donate_argnums": 0}).as_text()
    assert f"copy_pages_{part}" in hlo
    _assert_no_pool_copy(hlo, pool)


@pytest.mark.parametrize(
    "generation, dtype, op",
    [
        ("v5e", "float8_e4m3fn", "page_write"),
        ("v6e", "int8", "token_write"),
        ("tpu7x", "float8_e5m2", "slice_write"),
        ("tpu7x", "float8_e4m3fn", "token_write"),
    ],
)
def test_stored_codes_copy_no_pool(for_a_tpu_alone, generation, dtype, op):
    """k and v in the pool's own 8-bit dtype: the pool is viewed as int8, there and back."""
    pool = _pool(8, 128, 16, dtype)
    new = (_new(300, 8, 128, dtype, True),) * 2
    hlo = _compile(op, generation, pool, new, _metadata(op, 300, 16), 8)
    _assert_no_pool_copy(hlo, pool)
