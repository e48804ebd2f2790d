# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The writes under shard_map over KV heads: right shard by shard, in place, free of copies.

A sharded pool is `[P, page_size, num_shards * R, C]` on axis 2, each shard with the R rows that
`layout.num_rows` gives for its own heads; k and v are sharded on axis 1 in either form. The GPU
kernels are in test_sharding_gpu.py.
"""

import dataclasses
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_paged
from bench.tpu_model.compile import aot_compile
from pallas_paged import layout
from tests.kv_write import cases
from tests.kv_write.cases import Case, difference, make

NUM_SHARDS = 4
HEADS = PartitionSpec(None, "heads")  # k and v
POOL = PartitionSpec(None, None, "heads")
SCALE = PartitionSpec("heads")
EVERYWHERE = PartitionSpec()
OPS = ("page_write", "slice_write", "token_write")


def sharded(op, num_metadata, *, backend, mesh=None, num_kv_heads=None, scales=(), config=None):
    """The public op under shard_map, not yet jitted; `num_kv_heads` of one shard.

    With shard_map's own default of checking what varies, which the GPU kernels do not take.
    """
    num_new = 0 if op == "copy_pages" else 2
    keywords = {"num_kv_heads": num_kv_heads} if num_new else {}

    def call(kv_pages, *rest):
        arrays, scale_values = rest[: len(rest) - len(scales)], rest[len(rest) - len(scales) :]
        return getattr(pallas_paged, op)(
            kv_pages,
            *arrays,
            **keywords,
            **dict(zip(scales, scale_values, strict=True)),
            backend=backend,
            config=config,
        )

    specs = (POOL, *[HEADS] * num_new, *[EVERYWHERE] * num_metadata, *[SCALE] * len(scales))
    checks = {"check_vma": backend != "mosaic_gpu"}
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=POOL, **checks), specs


# ---- On 4 virtual CPU devices


def mesh_of(num_shards):
    assert len(jax.devices()) >= num_shards, "tests/conftest.py asks for 4 virtual devices"
    return jax.sharding.Mesh(np.array(jax.devices()[:num_shards]), ("heads",))


def shards_of(case, num_shards=NUM_SHARDS):
    """One call per shard: its own pool, k, v and scales, everybody's metadata."""
    calls = [make(case, seed) for seed in range(num_shards)]
    return [dataclasses.replace(call, metadata=calls[0].metadata) for call in calls]


def num_interpreted_shards():
    """On how many devices at once the interpreter can run: 4, or 2 where threads are scarce.

    Each interpreted device waits for the others in a callback that holds a thread of the CPU
    client. That has as many threads as the machine has cores (NPROC in the environment overrides
    it), at least one a device; before jax 0.12 the callbacks' own arguments need one more, and with
    none to spare the devices wait for ever.
    """
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    return NUM_SHARDS if threads >= 2 * NUM_SHARDS else NUM_SHARDS // 2


def run_sharded(calls, backend):
    """The pool of each shard after one call on all of them."""
    case, mesh = calls[0].case, mesh_of(len(calls))
    scales = tuple(n for n in ("k_scale", "v_scale") if getattr(calls[0], n) is not None)
    fn, specs = sharded(
        case.op,
        len(calls[0].metadata),
        backend=backend,
        mesh=mesh,
        num_kv_heads=case.num_kv_heads,
        scales=scales,
        config=calls[0].config(backend),
    )
    new = ("k", "v") if calls[0].k is not None else ()
    arrays = [
        np.concatenate([call.kv_pages for call in calls], axis=2),
        *(np.concatenate([getattr(call, n) for call in calls], axis=1) for n in new),
        *calls[0].metadata,
        *(np.concatenate([getattr(call, n) for call in calls]) for n in scales),
    ]
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    options = cases.EXACT_COMPILE if backend == "mosaic_tpu" else None
    return jax.jit(fn, donate_argnums=0, compiler_options=options)(*placed)


def check_shards(result, calls, wanted):
    """Raises AssertionError unless each shard's rows are `wanted` of it."""
    num_rows = calls[0].kv_pages.shape[2]
    result = np.asarray(result)
    for shard, pool in enumerate(wanted):
        rows = result[:, :, shard * num_rows : (shard + 1) * num_rows].copy()
        found = difference(rows, pool)
        assert found is None, f"shard {shard}: {found}"


CASES = [
    Case("page_write", 20, 4, 2, 128),
    Case("page_write", 20, 4, 1, 128, is_flat=False),
    Case("page_write", 20, 3, 2, 64, "int8", scale="head"),
    Case("slice_write", 20, 4, 2, 128, is_flat=False),
    Case("slice_write", 20, 4, 1, 128),
    Case("token_write", 20, 4, 2, 128, "float32"),
    Case("token_write", 20, 4, 1, 128),
    Case("copy_pages", 5, 4, 1, 128, entries="holes"),
]
CASE_IDS = [case.id for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_oracle(case):
    calls = shards_of(case)
    check_shards(run_sharded(calls, "oracle"), calls, [c.run("oracle") for c in calls])


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_kernel(case):
    """The interpreter runs the kernels of several devices at once, races still detected."""
    calls = shards_of(case, num_interpreted_shards())
    mode = cases.MODES[CASES.index(case) % 2]
    result = cases.interpret(lambda: run_sharded(calls, "mosaic_tpu"), mode)
    check_shards(result, calls, [c.run("oracle") for c in calls])


def test_the_check_sees_swapped_shards():
    """The shards' contents differ, so that heads on the wrong shard are found."""
    calls = shards_of(CASES[0])
    wanted = [c.run("oracle") for c in calls]
    swapped = [dataclasses.replace(calls[0], k=calls[1].k), *calls[1:]]
    with pytest.raises(AssertionError, match="shard 0: .* values differ"):
        check_shards(run_sharded(swapped, "oracle"), calls, wanted)


def test_coverage():
    """Each write with 2 heads and with 1 a shard, in both forms."""
    seen = {(c.op, c.num_kv_heads) for c in CASES} & {(op, n) for op in OPS for n in (1, 2)}
    assert len(seen) == 2 * len(OPS)
    assert {c.is_flat for c in CASES if c.op != "copy_pages"} == {True, False}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("is_donated", [True, False])
def test_donation(op, is_donated):
    """Donated, every shard keeps its buffer; not donated, the caller's pool stays as it was."""
    mesh = mesh_of(NUM_SHARDS)
    call = make(Case(op, 16, 4, 2, 128, "float32", entries="live"))
    fn, specs = sharded(op, len(call.metadata), backend="oracle", mesh=mesh, num_kv_heads=2)
    arrays = [
        np.tile(call.kv_pages, (1, 1, NUM_SHARDS, 1)),
        *(np.tile(x, (1, NUM_SHARDS)) for x in (call.k, call.v)),
        *call.metadata,
    ]
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    before = _pointers(placed[0])
    result = jax.jit(fn, donate_argnums=(0,) if is_donated else ())(*placed)
    check_shards(result, [call], [call.run("oracle")] * NUM_SHARDS)
    assert (_pointers(result) == before) is is_donated
    assert placed[0].is_deleted() is is_donated
    assert not any(x.is_deleted() for x in placed[1:])
    if not is_donated:
        assert difference(placed[0], arrays[0]) is None


def _pointers(x):
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


# ---- Compiled for the four chips of a v5e:2x2

# A shard's pool: 4,096 pages of 16, 33 MB of one KV head. Larger than k, v and any VMEM.
NUM_PAGES, PAGE_SIZE, HEAD_DIM, NUM_TOKENS, NUM_LAYERS = 4096, 16, 128, 512, 4
NUM_ENTRIES = NUM_TOKENS // PAGE_SIZE

# What may carry a pool without moving it; the kernel itself is a custom-call, aliased.
CARRIERS = {
    "parameter",
    "custom-call",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "optimization-barrier",
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_BYTES = {
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "pred": 1,
}


def moved_pools(hlo, pool_bytes):
    """Instructions that give a new array of a pool's size: copies, fusions, transposes, scatters.

    Everything but what is known to carry a buffer as it is, so that no kind of copy is forgotten.
    """
    found = []
    for result, opcode in _INSTRUCTION.findall(hlo):
        sizes = [
            _BYTES.get(dtype, 8) * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in _ARRAY.findall(result)
        ]
        if opcode not in CARRIERS and max(sizes, default=0) >= pool_bytes:
            found.append(f"{opcode} -> {result}")
    return found


def abstract(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


METADATA = {
    "page_write": (abstract((NUM_ENTRIES,), jnp.int32), abstract((NUM_ENTRIES,), jnp.int32)),
    "slice_write": (abstract((3, 2 * NUM_ENTRIES), jnp.int32), abstract((1,), jnp.int32)),
    "token_write": (abstract((NUM_TOKENS,), jnp.int32),),
}


def pool_of(num_kv_heads, num_layers=1):
    """The global pool and the bytes of one shard of it."""
    num_rows = layout.num_rows(num_kv_heads, HEAD_DIM, jnp.bfloat16)
    shape = (num_layers * NUM_PAGES, PAGE_SIZE, NUM_SHARDS * num_rows, HEAD_DIM)
    return abstract(shape), math.prod(shape) * 2 // NUM_SHARDS


def new_of(num_kv_heads, is_flat, *leading):
    heads = NUM_SHARDS * num_kv_heads
    width = (heads * HEAD_DIM,) if is_flat else (heads, HEAD_DIM)
    return abstract((*leading, NUM_TOKENS, *width))


def compile_for_chips(fn, args, specs, *, donate=True):
    return aot_compile(
        fn,
        args,
        "v5e",
        axes={"heads": NUM_SHARDS},
        specs=specs,
        jit_kwargs={"donate_argnums": 0} if donate else None,
    )


def compile_op(op, num_kv_heads, is_flat, *, donate=True):
    """The op with four shards' operands, compiled; and the bytes of a shard's pool."""
    metadata = METADATA[op]
    pool, pool_bytes = pool_of(num_kv_heads)
    new = new_of(num_kv_heads, is_flat)
    fn, specs = sharded(op, len(metadata), backend="mosaic_tpu", num_kv_heads=num_kv_heads)
    args = (pool, new, new, *metadata)
    return compile_for_chips(fn, args, specs, donate=donate), pool_bytes


def assert_in_place(compiled, pool_bytes):
    """The pool is written where it is, and nothing as large as an eighth of it is made."""
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert "custom-call(" in hlo and "num_partitions=4" in hlo
    assert moved_pools(hlo, pool_bytes // 8) == []  # in a scan, one layer's part is a quarter
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 8


@pytest.mark.parametrize("is_flat", [True, False], ids=["T,KH", "T,K,H"])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_compiled_in_place(op, num_kv_heads, is_flat):
    assert_in_place(*compile_op(op, num_kv_heads, is_flat))


def write_layers(num_kv_heads):
    """A model's loop: one flat pool through lax.scan, three writes a layer, under shard_map."""

    def step(kv_pages, layer):
        index, k, v, (page_ids, starts), (slices, num_slices), (slots,) = layer
        first_page = index * NUM_PAGES

        def shift(ids, first):
            return jnp.where(ids < 0, ids, ids + first)

        slices = slices.at[0].set(shift(slices[0], first_page * PAGE_SIZE))
        options = {"num_kv_heads": num_kv_heads, "backend": "mosaic_tpu"}
        kv_pages = pallas_paged.page_write(
            kv_pages, k, v, shift(page_ids, first_page), starts, **options
        )
        kv_pages = pallas_paged.slice_write(kv_pages, k, v, slices, num_slices, **options)
        slots = shift(slots, first_page * PAGE_SIZE)
        return pallas_paged.token_write(kv_pages, k, v, slots, **options), None

    def model(kv_pages, k, v, *metadata):
        def body(kv_pages, layer):
            return step(kv_pages, (*layer, metadata[:2], metadata[2:4], metadata[4:]))

        layers = jnp.arange(NUM_LAYERS, dtype=jnp.int32)
        return jax.lax.scan(body, kv_pages, (layers, k, v))[0]

    return model


SCAN_METADATA = tuple(x for op in OPS for x in METADATA[op])
LAYERS = PartitionSpec(None, None, "heads")  # [L, T, K*H]
SCAN_SPECS = (POOL, LAYERS, LAYERS, *[EVERYWHERE] * len(SCAN_METADATA))


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_compiled_in_place_in_a_scan_over_layers(num_kv_heads):
    pool, pool_bytes = pool_of(num_kv_heads, NUM_LAYERS)
    new = new_of(num_kv_heads, True, NUM_LAYERS)
    fn = jax.shard_map(write_layers(num_kv_heads), in_specs=SCAN_SPECS, out_specs=POOL)
    args = (pool, new, new, *SCAN_METADATA)
    compiled = compile_for_chips(fn, args, SCAN_SPECS)
    assert " while(" in compiled.as_text()
    assert_in_place(compiled, pool_bytes)


# ---- The helper can fail


def test_a_pool_that_is_not_donated_is_a_copy():
    compiled, pool_bytes = compile_op("page_write", 1, True, donate=False)
    assert any("copy" in found for found in moved_pools(compiled.as_text(), pool_bytes))
    with pytest.raises(AssertionError):
        assert_in_place(compiled, pool_bytes)


def test_a_row_count_that_layout_avoids_is_a_copy():
    """Why a shard pads: three heads a shard want 6 rows, which XLA transposes at every call."""
    assert layout.num_rows(3, HEAD_DIM, jnp.bfloat16) == 8
    num_rows = NUM_SHARDS * 6
    pool = abstract((NUM_PAGES, PAGE_SIZE, num_rows, HEAD_DIM))
    new = new_of(3, True)
    fn, specs = sharded("page_write", 2, backend="mosaic_tpu", num_kv_heads=3)
    compiled = compile_for_chips(fn, (pool, new, new, *METADATA["page_write"]), specs)
    assert moved_pools(compiled.as_text(), math.prod(pool.shape) * 2 // NUM_SHARDS)


def test_a_stack_of_layers_is_a_temporary():
    """Why the pool is flat: as the scan's xs and ys the layers' pools are moved in and out."""
    pool, pool_bytes = pool_of(1)
    stack = abstract((NUM_LAYERS, *pool.shape))
    new = new_of(1, True, NUM_LAYERS)
    page_ids = METADATA["page_write"]

    def model(kv_pages, k, v, page_ids, starts):
        def body(carry, layer):
            pool, k, v = layer
            return carry, pallas_paged.page_write(
                pool, k, v, page_ids, starts, num_kv_heads=1, backend="mosaic_tpu"
            )

        return jax.lax.scan(body, 0, (kv_pages, k, v))[1]

    spec = PartitionSpec(None, *POOL)
    specs = (spec, LAYERS, LAYERS, EVERYWHERE, EVERYWHERE)
    fn = jax.shard_map(model, in_specs=specs, out_specs=spec)
    compiled = compile_for_chips(fn, (stack, new, new, *page_ids), specs)
    assert moved_pools(compiled.as_text(), pool_bytes)


@pytest.mark.parametrize(
    ("line", "is_moved"),
    [
        ("  %copy.1 = bf16[8,4]{1,0:T(8,128)(2,1)} copy(%p)", True),
        ("  ROOT %t = s8[64]{0} transpose(%p), dimensions={0}", True),
        ("  %f = (bf16[8,4]{1,0}, u32[]) fusion(%p), kind=kLoop", True),
        ("  copy-start.1 = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}) copy-start(%p)", True),
        ("  %f = bf16[4,4]{1,0} fusion(%p), kind=kLoop", False),  # half a pool
        ("  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)", False),
        ("  ROOT %b = bf16[2,4,4]{2,1,0} bitcast(%p)", False),
        ("  %g = bf16[8,4]{1,0} get-tuple-element(%w), index=1", False),
    ],
)
def test_moved_pools(line, is_moved):
    assert bool(moved_pools(line, 64)) is is_moved
