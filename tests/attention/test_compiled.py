# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What libtpu makes of the attention, ahead of time on a CPU: it compiles, and copies nothing."""

import base64
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import pallas_paged
from bench.tpu_model.compile import TOPOLOGIES, aot_compile, mesh_of
from pallas_paged import dispatch, layout
from pallas_paged.attention.tpu import launch as mosaic_tpu
from pallas_paged.attention.tpu.launch import TpuAttentionConfig
from tests.kv_write.test_compiled import for_a_tpu_alone, large_results  # noqa: F401 (a fixture)

GENERATIONS = tuple(TOPOLOGIES)
POOL_DTYPES = ("bfloat16", "float8_e4m3fn", "float32", "int8", "float8_e5m2")
# A pool must be larger than a VMEM (128 MiB), or XLA may hold all of it there.
MIN_POOL_BYTES = 256 * 2**20

Struct = jax.ShapeDtypeStruct


def _pool(num_kv_heads, head_dim, page_size, dtype, min_bytes=MIN_POOL_BYTES):
    """A pool's shape, in 256 MiB or more."""
    _, *page = layout.pool_shape(1, page_size, num_kv_heads, head_dim, dtype)
    page_bytes = page[0] * page[1] * page[2] * jnp.dtype(dtype).itemsize
    return Struct((-(-min_bytes // page_bytes), *page), jnp.dtype(dtype))


def _metadata(max_seqs=8, table_width=40):
    ids = functools.partial(Struct, dtype=jnp.int32)
    return ids((max_seqs,)), ids((max_seqs, table_width)), ids((max_seqs + 1,)), ids((1,))


def _compile(
    generation,
    heads,
    head_dim,
    page_size,
    dtype,
    pool_dtype,
    *,
    num_tokens=709,
    config=None,
    has_window=False,
    has_sinks=False,
    scale="none",
    form="read_only",
    metadata=None,
    **static,
):
    """A public op, compiled for a TPU generation; and the pool.

    Args:
      form: "read_only", or "write" for `write_and_attend` with k and v [T, K*H].
    """
    num_heads, num_kv_heads = heads
    pool = _pool(num_kv_heads, head_dim, page_size, pool_dtype)
    arrays = {}
    if has_window:
        arrays["sliding_window"] = Struct((), jnp.int32)
    if has_sinks:
        arrays["sinks"] = Struct((num_heads,), jnp.float32)
    if scale != "none":
        shape = (num_kv_heads,) if scale == "head" else ()
        arrays |= {name: Struct(shape, jnp.float32) for name in ("k_scale", "v_scale")}

    options = static | {
        "num_kv_heads": num_kv_heads,
        "config": config,
        "sm_scale": head_dim**-0.5,
        "backend": "mosaic_tpu",
    }
    q = Struct((num_tokens, num_heads, head_dim), jnp.dtype(dtype))
    if form == "read_only":
        op, tensors, donated = pallas_paged.ragged_paged_attention, (q, pool), ()
    else:
        new = Struct((num_tokens, num_kv_heads * head_dim), q.dtype)
        op, tensors, donated = pallas_paged.write_and_attend, (q, new, new, pool), (3,)

    def call(*args):
        *tensors, metadata, arrays = args
        return op(*tensors, *metadata, **arrays, **options)

    args = (*tensors, metadata or _metadata(), arrays)
    jit_kwargs = {"donate_argnums": donated} if donated else {}
    return aot_compile(call, args, generation, jit_kwargs=jit_kwargs), pool


def _size(x):
    return x.size * x.dtype.itemsize


def _every_kind():
    """Generation x pool dtype; everything else is cycled, in cycles that drift past one another.

    The heads of a large model, (32, 8), take the compiler long: they come with heads of 128.
    """
    heads = itertools.cycle(((2, 1), (3, 3), (4, 1), (12, 2), (2, 1), (5, 1), (32, 8)))
    head_dims = itertools.cycle((128, 64, 80, 256, 96, 192, 128, 32))
    # No cycle covers all pairs: this was searched for.
    forms = iter("rrwwwrwrrrwrrrrwwwrwwwrww")
    # Small blocks, or once for each generation default_config: it takes the compiler long.
    sizes = iter("ssdssssdssssdsssdssssssds")
    page_sizes = itertools.cycle((16, 256, 33, 1, 64, 131))
    dtypes = itertools.cycle(("bfloat16", "bfloat16", "float32", "float32", "bfloat16", "bfloat16"))
    scales = itertools.cycle(("head", "tensor", "none", "head"))
    soft_caps = itertools.cycle((None, 30.0))
    yes = {
        "has_window": itertools.cycle((False, True, True)),
        "has_sinks": itertools.cycle((False, False, True, True, False, True, False)),
        "return_lse": itertools.cycle((True, False, False, True, True, False, False)),
        "causal": itertools.cycle((True, True, False, True, True, True, False, True, False)),
    }
    for generation, pool_dtype in itertools.product(GENERATIONS, POOL_DTYPES):
        is_small = jnp.dtype(pool_dtype).itemsize == 1
        of_heads, head_dim = next(heads), next(head_dims)
        # 12 of 256 leave no room in a v4's VMEM for new tokens.
        head_dim = 128 if of_heads == (32, 8) else min(head_dim, 3072 // of_heads[0] // 2)
        config = {"s": TpuAttentionConfig(128, 128, 4, 2), "d": None}[next(sizes)]
        yield (
            (generation, of_heads, head_dim, next(page_sizes), next(dtypes), pool_dtype),
            {name: next(values) for name, values in yes.items()}
            | {"soft_cap": next(soft_caps), "scale": next(scales) if is_small else "none"}
            | {"form": {"r": "read_only", "w": "write"}[next(forms)], "config": config},
        )


EVERY_KIND = list(_every_kind())


def _id(call):
    (generation, heads, head_dim, page_size, dtype, pool_dtype), options = call
    names = [name for name, value in options.items() if value is True]
    names += ["soft_cap"] * bool(options["soft_cap"]) + [f"scale_{options['scale']}"]
    names.append(options["form"])
    return "-".join(
        [generation, f"N{heads[0]}K{heads[1]}", f"H{head_dim}", f"p{page_size}", dtype]
        + [f"on_{pool_dtype}", *names]
    )


@pytest.mark.usefixtures("for_a_tpu_alone")
@pytest.mark.parametrize("call", EVERY_KIND, ids=_id)
def test_every_kind_compiles_without_a_copy_of_the_pool(call):
    args, options = call
    compiled, pool = _compile(*args, **options)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert "tpu_custom_call" in hlo, "the kernel is not in the program"
    found = large_results(hlo, _size(pool))
    assert not found, found[0][1][:300]
    if options["form"] == "read_only":  # nothing of the pool goes out, in its buffer or another
        assert memory.alias_size_in_bytes == 0 and "input_output_alias" not in hlo
        assert memory.output_size_in_bytes < 64 * 2**20 < _size(pool)
    else:  # one kernel, into the pool's own buffer
        assert hlo.count('custom_call_target="tpu_custom_call"') == 1
        assert "write_and_attend_block" in hlo and "input_output_alias" in hlo
        assert _size(pool) <= memory.alias_size_in_bytes <= memory.output_size_in_bytes
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 64 * 2**20
    assert memory.temp_size_in_bytes < 128 * 2**20 < _size(pool)


def test_coverage():
    """What the compiles above must cover together."""
    rows = [
        dict(
            zip(
                ("generation", "heads", "head_dim", "page_size", "dtype", "pool_dtype"),
                args,
                strict=True,
            )
        )
        | options
        for args, options in EVERY_KIND
    ]

    def pairs(a, b):
        return {(row[a], row[b]) for row in rows}

    options = ("has_window", "has_sinks", "return_lse", "causal")
    for generation_or_type in ("generation", "pool_dtype"):
        values = {row[generation_or_type] for row in rows}
        for name in (*options, "soft_cap", "dtype", "form"):
            there = {row[name] for row in rows}
            missing = set(itertools.product(values, there)) - pairs(generation_or_type, name)
            assert not missing, (generation_or_type, name, missing)
    for a, b in itertools.combinations((*options, "soft_cap", "form", "dtype"), 2):
        assert len(pairs(a, b)) == 4, (a, b)
    assert {row["head_dim"] for row in rows} == {32, 64, 80, 96, 128, 192, 256}
    assert {row["page_size"] for row in rows} == {1, 16, 33, 64, 131, 256}
    for form in ("read_only", "write"):
        of_form = [row for row in rows if row["form"] == form]
        assert {row["head_dim"] for row in of_form} >= {32, 64, 96, 128, 192, 256}, form
        assert (32, 8) in {row["heads"] for row in of_form}, form
        assert sum(row["config"] is None for row in of_form) >= 2, form
    assert sum(row["heads"] == (32, 8) for row in rows) >= 3
    assert {row["generation"] for row in rows if row["config"] is None} == set(GENERATIONS)
    small = ("float8_e4m3fn", "float8_e5m2", "int8")
    scales = itertools.product(small, ("head", "tensor", "none"))
    assert set(scales) <= pairs("pool_dtype", "scale")


def test_a_copy_of_the_pool_would_be_seen():
    """Six rows of heads are no layout that XLA leaves alone; see layout.num_rows."""
    pool = Struct((32768, 16, 6, 128), jnp.bfloat16)

    def call(q, pool, metadata):
        return pallas_paged.ragged_paged_attention(
            q, pool, *metadata, backend="mosaic_tpu", config=TpuAttentionConfig(128, 128, 2)
        )

    q = Struct((64, 3, 128), jnp.bfloat16)
    hlo = aot_compile(call, (q, pool, _metadata()), "v5e").as_text()
    assert large_results(hlo, _size(pool))


def test_config_is_in_the_kernels_name():
    config = TpuAttentionConfig(256, 128, 2)
    compiled, _ = _compile("v5e", (2, 1), 128, 16, "bfloat16", "bfloat16", config=config)
    assert "ragged_paged_attention_block256_window128" in compiled.as_text()


# ---- From projection to projection

# With this many tokens q is as large as a VMEM, and XLA cannot hide a copy of it there.
CHAIN_TOKENS = 262144
# The most that the fused form takes of one head, by far: k is smaller than a VMEM, but the kernel
# has all of that to itself.
FUSED_CHAIN_TOKENS = 65536
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, WIDTH, PAGE_SIZE = 4, 2, 128, 1024, 16


def _rope(x, cos, sin):
    """RoPE of [T, heads*H] one head's whole lanes at a time: the form that XLA fuses."""
    heads = []
    for head in jnp.split(x.astype(jnp.float32), x.shape[1] // HEAD_DIM, axis=1):
        turned = jnp.roll(head, HEAD_DIM // 2, axis=1)
        heads.append((head * cos + turned * sin).astype(x.dtype))
    return jnp.concatenate(heads, axis=1)


def _layer(form, pool, x, weights, rotation, page_ids, metadata, first_page):
    """Projections, RoPE, a write, attention and the output projection: [T, D] and the pool."""
    w_q, w_k, w_v, w_o = weights
    kv_lens, page_indices, cu_q_lens, num_seqs = metadata
    q, k, v = _rope(x @ w_q, *rotation), _rope(x @ w_k, *rotation), x @ w_v
    q = q.reshape(-1, NUM_HEADS, HEAD_DIM)
    metadata = kv_lens, page_indices + first_page, cu_q_lens, num_seqs
    options = {"num_kv_heads": k.shape[1] // HEAD_DIM, "backend": "mosaic_tpu"}
    attention = options | {"sm_scale": HEAD_DIM**-0.5, "config": TpuAttentionConfig(128, 128, 2)}
    if form == "write":
        out, pool = pallas_paged.write_and_attend(q, k, v, pool, *metadata, **attention)
    else:
        ids = jnp.where(page_ids >= 0, page_ids + first_page, -1)
        pool = pallas_paged.page_write(pool, k, v, ids, **options)
        out = pallas_paged.ragged_paged_attention(q, pool, *metadata, **attention)
    return out.reshape(-1, NUM_HEADS * HEAD_DIM) @ w_o, pool


def _chain_args(pool, num_layers, num_tokens, num_kv_heads):
    bf16, f32 = jnp.bfloat16, jnp.float32
    q_width, kv_width = NUM_HEADS * HEAD_DIM, num_kv_heads * HEAD_DIM
    shapes = [(WIDTH, q_width), (WIDTH, kv_width), (WIDTH, kv_width), (q_width, WIDTH)]
    return (
        pool,
        Struct((num_tokens, WIDTH), bf16),
        tuple(Struct((num_layers, *shape), bf16) for shape in shapes),
        tuple(Struct((num_tokens, HEAD_DIM), f32) for _ in ("cos", "sin")),
        Struct((num_tokens // PAGE_SIZE,), jnp.int32),
        _metadata(table_width=2048),
    )


@pytest.mark.parametrize(
    ("generation", "form", "num_tokens", "num_kv_heads"),
    [
        ("v5e", "read_only", CHAIN_TOKENS, NUM_KV_HEADS),
        ("v6e", "write", FUSED_CHAIN_TOKENS, 1),
        ("v6e", "read_only", CHAIN_TOKENS, NUM_KV_HEADS),
        ("v5e", "write", FUSED_CHAIN_TOKENS, 1),
    ],
)
def test_scan_over_layers_copies_nothing(generation, form, num_tokens, num_kv_heads):
    """Neither the pool, nor q, k, v or the attention's output, from projection to projection."""
    num_layers = 4
    pool = _pool(num_kv_heads, HEAD_DIM, PAGE_SIZE, "bfloat16", min_bytes=2**30)
    num_pages = pool.shape[0] // num_layers

    def model(pool, x, weights, rotation, page_ids, metadata):
        def body(carry, layer):
            (x, pool), (index, weights) = carry, layer
            y, pool = _layer(
                form, pool, x, weights, rotation, page_ids, metadata, index * num_pages
            )
            return (x + y, pool), None

        layers = (jnp.arange(num_layers, dtype=jnp.int32), weights)
        return lax.scan(body, (x, pool), layers)[0]

    compiled = aot_compile(
        model,
        _chain_args(pool, num_layers, num_tokens, num_kv_heads),
        generation,
        jit_kwargs={"donate_argnums": (0, 1)},
    )
    hlo = compiled.as_text()
    assert " while(" in hlo  # the loop was not unrolled away
    num_kernels = hlo.count('custom_call_target="tpu_custom_call"')
    assert num_kernels == 1 if form == "write" else num_kernels >= 2
    kv_bytes = num_tokens * num_kv_heads * HEAD_DIM * 2
    assert {opcode for opcode, _ in large_results(hlo, kv_bytes)} <= {"fusion"}
    assert not large_results(hlo, _size(pool))
    found = _moving_fusions(hlo, kv_bytes)
    assert not found, found[0][:300]


def _moving_fusions(hlo, num_bytes):
    """Fusions of `num_bytes` or more that only move: XLA also makes a fusion of a copy."""
    return [
        line
        for opcode, line in large_results(hlo, num_bytes)
        if re.match(r"(ROOT )?%?(copy|transpose|bitcast|reshape)[\w.\-]*fusion", line)
    ]


def test_heads_that_are_no_lanes_are_copied_by_xla():
    """The check above can fail: RoPE on a view [T, N, H] moves q."""
    pool = _pool(NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, "bfloat16", min_bytes=2**30)

    def call(pool, x, w_q, cos, metadata):
        q = (x @ w_q).reshape(-1, NUM_HEADS, HEAD_DIM)
        q = (jnp.roll(q, 64, axis=-1) * cos[:, None]).astype(jnp.bfloat16)
        return pallas_paged.ragged_paged_attention(
            q,
            pool,
            *metadata,
            num_kv_heads=NUM_KV_HEADS,
            backend="mosaic_tpu",
            config=TpuAttentionConfig(128, 128, 2),
        )

    args = (
        pool,
        Struct((CHAIN_TOKENS, WIDTH), jnp.bfloat16),
        Struct((WIDTH, NUM_HEADS * HEAD_DIM), jnp.bfloat16),
        Struct((CHAIN_TOKENS, HEAD_DIM), jnp.float32),
        _metadata(),
    )
    hlo = aot_compile(call, args, "v5e").as_text()
    opcodes = {o for o, _ in large_results(hlo, CHAIN_TOKENS * NUM_HEADS * HEAD_DIM * 2)}
    assert opcodes & {"copy", "transpose", "reshape"}


# ---- Precision


def _kernel_bodies(hlo):
    """The Mosaic modules of a program's kernels, as MLIR bytecode."""
    bodies = re.findall(r'"custom_call_config":\s*\{"body":\s*"([^"]+)"', hlo)
    assert bodies, "no kernel in the program"
    return [base64.b64decode(body) for body in bodies]


def _products(jaxpr):
    """The precision of every matrix product in a jaxpr, those of the kernels it calls included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


PRECISIONS = [
    ("float32", "float32", True),
    ("float32", "bfloat16", True),
    ("bfloat16", "float32", True),
    ("bfloat16", "bfloat16", False),
    ("bfloat16", "int8", False),
]


@pytest.mark.parametrize(("dtype", "pool_dtype", "is_full"), PRECISIONS)
def test_float32_has_full_precision_products(dtype, pool_dtype, is_full):
    """In the kernel's own code, as libtpu gets it: a CPU computes true float32 anyway."""
    compiled, _ = _compile(
        "v5e", (2, 1), 128, 16, dtype, pool_dtype, config=TpuAttentionConfig(128, 128, 2)
    )
    (body,) = _kernel_bodies(compiled.as_text())
    assert (b"contract_precision<fp32>" in body) is is_full

    def call(q, pool, metadata):
        return pallas_paged.ragged_paged_attention(
            q,
            pool,
            *metadata,
            num_kv_heads=1,
            backend="mosaic_tpu",
            config=TpuAttentionConfig(128, 128, 2),
        )

    args = Struct((64, 2, 128), dtype), _pool(1, 128, 16, pool_dtype), _metadata()
    precisions = list(_products(jax.make_jaxpr(call)(*args).jaxpr))
    highest = (lax.Precision.HIGHEST,) * 2
    assert len(precisions) >= 4
    assert {p in (highest, lax.Precision.HIGHEST) for p in precisions} == {is_full}


# ---- Refusals


def _refusal(generation, q, pool, metadata, **options):
    """What the kernel says to a call that is traced for a TPU generation."""

    def call(q, pool, metadata):
        return pallas_paged.ragged_paged_attention(
            q, pool, *metadata, backend="mosaic_tpu", **options
        )

    with jax.sharding.use_abstract_mesh(mesh_of(generation).abstract_mesh):
        with pytest.raises(NotImplementedError) as raised:
            jax.eval_shape(call, q, pool, metadata)
        auto = functools.partial(pallas_paged.ragged_paged_attention, **options)
        dispatch._warn_once.cache_clear()
        with pytest.warns(UserWarning, match="'mosaic_tpu' cannot run this call, and"):
            jax.eval_shape(auto, q, pool, *metadata)  # which goes on to another backend
    return str(raised.value)


def test_refuses_what_vmem_cannot_hold():
    q, pool = Struct((64, 64, 256), jnp.float32), _pool(64, 256, 16, "float32")
    message = _refusal("v4", q, pool, _metadata(), config=TpuAttentionConfig(1024, 256, 4))
    assert re.search(
        r"cannot run this call: 64 query heads on 64 KV heads of 256 with TpuAttentionConfig"
        r"\(block_kv=1024.* need \d+\.\d MiB of VMEM, and 16 MiB are there; shard the heads or make"
        r" the blocks smaller",
        message,
    ), message
    assert "and 64 MiB are there" in _refusal("tpu7x", q, pool, _metadata())


def test_refuses_more_sequences_than_smem_holds():
    q, pool = Struct((64, 2, 128), jnp.bfloat16), _pool(1, 128, 16, "bfloat16")
    message = _refusal("v6e", q, pool, _metadata(20_001, 1))
    assert "the lengths of 20001 sequences do not fit SMEM (20000 do); split the batch" in message


def test_refuses_a_page_table_that_int32_does_not_count():
    """Pages of 4,099 tokens, a prime, come token by token."""
    q, pool = Struct((64, 2, 128), jnp.bfloat16), _pool(1, 128, 4099, "bfloat16")
    message = _refusal("v6e", q, pool, _metadata(1000, 1024))
    assert "page_indices [1000, 1024] has 4197376000 chunks of pages" in message
    assert "split the batch, or shorten the page table" in message


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_refuses_float16(dtypes):
    q, pool = Struct((64, 2, 128), dtypes[0]), _pool(1, 128, 16, dtypes[1])
    assert "a TPU has no float16; use bfloat16" in _refusal("v5e", q, pool, _metadata())


def test_refuses_a_mask_that_lets_hidden_keys_count():
    q, pool = Struct((64, 2, 128), jnp.bfloat16), _pool(1, 128, 16, "bfloat16")
    message = _refusal("v5e", q, pool, _metadata(), mask_value=-100.0)
    assert "mask_value -100.0 would let hidden keys count" in message
    assert "pass None or a number below -1e+09" in message


# Sequences and table width. A table with this many entries is streamed, or only just not.
LARGE_TABLES = [
    ("v4", 256, 1024, 128, "write"),  # 256 sequences of 131,072 tokens
    ("v5e", 256, 1024, 128, "read_only"),
    ("tpu7x", 256, 1024, 128, "write"),
    ("v4", 1, 65_536, 16, "read_only"),  # one of 1,048,576
    ("v5e", 1, 65_536, 16, "write"),
    ("tpu7x", 1, 65_536, 16, "read_only"),
    ("v4", 400, 400, 16, "write"),  # the largest that is not streamed
    ("v5e", 20_000, 8, 16, "write"),  # and beside the most sequences
    ("v6e", 20_000, 9, 16, "write"),  # whose table is streamed
]


@pytest.mark.parametrize(
    ("generation", "max_seqs", "table_width", "page_size", "form"), LARGE_TABLES
)
def test_large_tables_compile(generation, max_seqs, table_width, page_size, form):
    is_streamed = max_seqs * table_width > mosaic_tpu.MAX_TABLE
    assert is_streamed == (max_seqs * table_width > 160_000) and max_seqs <= mosaic_tpu._MAX_SEQS
    compiled, pool = _compile(
        generation,
        (2, 1),
        128,
        page_size,
        "bfloat16",
        "bfloat16",
        form=form,
        metadata=_metadata(max_seqs, table_width),
        config=TpuAttentionConfig(128, 128, 2),
    )
    assert not large_results(compiled.as_text(), _size(pool))
