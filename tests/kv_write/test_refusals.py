# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Every sentence with which a KV write refuses a call: op, argument, what came, what to do."""

import re

import jax
import jax.numpy as jnp
import pytest

import pallas_paged
from pallas_paged.kv_write.tpu import launch as mosaic_tpu

P, PAGE_SIZE, K, H, T = 6, 4, 2, 128, 8
OPS = ("page_write", "slice_write", "token_write", "copy_pages")
WRITES = OPS[:3]


def _ids(n, dtype=jnp.int32):
    return jnp.zeros((n,), dtype)


def _arguments(op, **changes):
    """A good call's arguments by name, with some changed."""
    arguments = {"kv_pages": jnp.ones((P, PAGE_SIZE, 2 * K, H), jnp.bfloat16)}
    if op != "copy_pages":
        new = jnp.ones((T, K, H), jnp.bfloat16)
        arguments |= {"k": new, "v": new}
    arguments |= {
        "page_write": {"page_ids": _ids(2)},
        "slice_write": {"slices": jnp.zeros((3, 5), jnp.int32), "num_slices": _ids(1)},
        "token_write": {"slots": _ids(T)},
        "copy_pages": {"src_ids": _ids(2), "dst_ids": _ids(2)},
    }[op]
    return arguments | changes


def _call(op, **changes):
    return getattr(pallas_paged, op)(**_arguments(op, **changes))


def _refused(error, op, argument, hint, call=None, **changes):
    """The call raises one line that names the op, the argument and what to do."""
    with pytest.raises(error) as caught:
        (call or _call)(op, **changes)
    message = str(caught.value)
    assert message.startswith(f"{op}: "), message
    if argument is not None:
        assert f"argument `{argument}` is " in message and "; wanted " in message, message
    assert hint in message, message
    assert "\n" not in message


@pytest.mark.parametrize("op", OPS)
def test_the_call_that_the_others_change_is_good(op):
    """Otherwise every refusal below could have another reason."""
    assert _call(op).shape == (P, PAGE_SIZE, 2 * K, H)


def _pool(shape=(P, PAGE_SIZE, 2 * K, H), dtype=jnp.bfloat16):
    return jnp.ones(shape, dtype)


POOLS = {
    "list": ([1.0, 2.0], "jnp.asarray"),
    "none": (None, "jnp.asarray"),
    "stack_of_layers": (_pool((2, P, PAGE_SIZE, 2 * K, H)), "one flat pool of L*P pages"),
    "no_pages": (_pool((0, PAGE_SIZE, 2 * K, H)), "make_kv_pages"),
    "no_rows": (_pool((P, PAGE_SIZE, 0, H)), "make_kv_pages"),
    "int32": (_pool(dtype=jnp.int32), "make it with make_kv_pages"),
    "uint8": (_pool(dtype=jnp.uint8), "make it with make_kv_pages"),
    "lanes": (_pool((P, PAGE_SIZE, 2 * K, 64)), "pads a head to whole lanes"),
    "slots_past_int32": (
        jax.ShapeDtypeStruct((2**20, 2**11, 2 * K, H), jnp.bfloat16),
        "a slot is an int32",
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("pool", "hint"), POOLS.values(), ids=POOLS)
def test_pool(op, pool, hint):
    _refused(ValueError, op, "kv_pages", hint, kv_pages=pool)


def _new(shape=(T, K, H), dtype=jnp.bfloat16):
    return jnp.ones(shape, dtype)


# name: (argument, hint, what is changed)
NEW = {
    "k_list": ("k", "jnp.asarray", {"k": [[1.0]]}),
    "v_list": ("v", "jnp.asarray", {"v": [[1.0]]}),
    "v_none": ("num_kv_heads", "the keys and the values", {"v": None}),
    "one_dimension": ("k", "one leading dimension", {"k": _new((T,))}),
    "four_dimensions": ("k", "one leading dimension", {"k": _new((1, T, K, H))}),
    "no_heads": ("k", "one leading dimension", {"k": _new((T, 0, H))}),
    "v_shape": ("v", "the same form", {"v": _new((T + 1, K, H))}),
    "v_form": ("v", "the same form", {"v": _new((T, K * H))}),
    "v_dtype": ("v", "the same form", {"v": _new(dtype=jnp.float32)}),
    "int_k": ("k", "or what the pool is to hold", {x: _new(dtype=jnp.int8) for x in "kv"}),
    "fp8_k": ("k", "or what the pool is to hold", {x: _new(dtype=jnp.float8_e5m2) for x in "kv"}),
    "other_head_dim": ("k", "has C = 256", {x: _new((T, K, 192)) for x in "kv"}),
    "too_many_heads": ("k", "these need R >= 6", {x: _new((T, 3, H)) for x in "kv"}),
    "too_many_small_heads": ("k", "these need R >= 5", {x: _new((T, 5, 64)) for x in "kv"}),
    "heads_disagree": ("num_kv_heads", "leave it out for [T, K, H]", {"num_kv_heads": 1}),
    "ambiguous_heads": ("num_kv_heads", "say which", {x: _new((T, K * H)) for x in "kv"}),
    "heads_do_not_divide": (
        "num_kv_heads",
        "k is [T, K*H]",
        {x: _new((T, K * H)) for x in "kv"} | {"num_kv_heads": 3},
    ),
    "zero_heads": (
        "num_kv_heads",
        "k is [T, K*H]",
        {x: _new((T, K * H)) for x in "kv"} | {"num_kv_heads": 0},
    ),
    "k_scale_without_quantising": ("k_scale", "only fp8 and int8", {"k_scale": 0.5}),
    "v_scale_without_quantising": ("v_scale", "only fp8 and int8", {"v_scale": jnp.ones(K)}),
}


@pytest.mark.parametrize("op", WRITES)
@pytest.mark.parametrize(("argument", "hint", "changes"), NEW.values(), ids=NEW)
def test_new_keys_and_values(op, argument, hint, changes):
    _refused(ValueError, op, argument, hint, **changes)


SCALES = {
    "per_token": jnp.ones(T),
    "matrix": jnp.ones((K, 1)),
    "int": jnp.ones(K, jnp.int32),
    "bool": True,
    "list": [1.0, 1.0],
    "string": "1.0",
}


@pytest.mark.parametrize("op", WRITES)
@pytest.mark.parametrize("argument", ["k_scale", "v_scale"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scale(op, argument, scale):
    pool = _pool(dtype=jnp.int8)
    _refused(ValueError, op, argument, "one per KV head", kv_pages=pool, **{argument: scale})


METADATA = {
    "page_ids_list": ("page_write", "page_ids", [0, 1], "jnp.asarray"),
    "page_ids_int64": ("page_write", "page_ids", _ids(2, jnp.uint32), "convert it on the host"),
    "page_ids_float": ("page_write", "page_ids", _ids(2, jnp.float32), "convert it on the host"),
    "page_ids_matrix": ("page_write", "page_ids", jnp.zeros((2, 1), jnp.int32), "int32"),
    "page_ids_scalar": ("page_write", "page_ids", jnp.int32(1), "int32"),
    "starts_dtype": ("page_write", "token_starts", _ids(2, jnp.int16), "convert it on the host"),
    "starts_length": ("page_write", "token_starts", _ids(3), "read in pairs"),
    "starts_list": ("page_write", "token_starts", [0, 4], "jnp.asarray"),
    "slices_vector": ("slice_write", "slices", _ids(3), "convert it on the host"),
    "slices_turned": ("slice_write", "slices", jnp.zeros((5, 3), jnp.int32), "first slot, first"),
    "slices_dtype": ("slice_write", "slices", jnp.zeros((3, 5)), "convert it on the host"),
    "num_slices_float": ("slice_write", "num_slices", 4.0, "int32[1], int32[] or an int"),
    "num_slices_bool": ("slice_write", "num_slices", True, "int32[1], int32[] or an int"),
    "num_slices_huge": ("slice_write", "num_slices", 2**31, "int32[1], int32[] or an int"),
    "num_slices_unsigned": ("slice_write", "num_slices", jnp.uint32(4), "int32[1]"),
    "num_slices_two": ("slice_write", "num_slices", _ids(2), "counts the columns"),
    "slots_dtype": ("token_write", "slots", _ids(T, jnp.uint8), "convert it on the host"),
    "slots_length": ("token_write", "slots", _ids(T - 1), "-1 skips one"),
    "slots_tuple": ("token_write", "slots", (0,) * T, "jnp.asarray"),
    "src_dtype": ("copy_pages", "src_ids", _ids(2, jnp.float32), "convert it on the host"),
    "dst_length": ("copy_pages", "dst_ids", _ids(1), "read in pairs"),
    "dst_list": ("copy_pages", "dst_ids", [0, 1], "jnp.asarray"),
}


@pytest.mark.parametrize(("op", "argument", "value", "hint"), METADATA.values(), ids=METADATA)
def test_metadata(op, argument, value, hint):
    _refused(ValueError, op, argument, hint, **{argument: value})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("config", [128, {"block_tokens": 16}, "auto"], ids=str)
def test_config_of_another_type(op, config):
    _refused(ValueError, op, "config", "TpuWriteConfig", config=config)


@pytest.mark.parametrize("block_tokens", [-16, 0, 8, 15, 24, 100])
def test_config_value(block_tokens):
    sentence = f"TpuWriteConfig: block_tokens is {block_tokens}; wanted a multiple of 16"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        mosaic_tpu.TpuWriteConfig(block_tokens)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cuda", "", "Oracle", "mosaic"])
def test_unknown_backend(op, backend):
    hint = "wanted \"auto\" or one of 'oracle', 'xla', 'mosaic_tpu', 'mosaic_gpu'"
    _refused(ValueError, op, None, f"backend is {backend!r}; {hint}", backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_float16_pool_on_a_tpu(op):
    reason = "backend 'mosaic_tpu' cannot run this call: a TPU has no float16; make a bfloat16 pool"
    pool = _pool(dtype=jnp.float16)
    _refused(NotImplementedError, op, None, reason, kv_pages=pool, backend="mosaic_tpu")


@pytest.mark.parametrize("op", WRITES)
def test_new_float16_on_a_tpu(op):
    reason = "a TPU has no float16; cast k and v to bfloat16 or float32"
    new = {x: _new(dtype=jnp.float16) for x in "kv"}
    _refused(NotImplementedError, op, None, reason, backend="mosaic_tpu", **new)


@pytest.mark.parametrize("op", WRITES)
def test_slots_that_no_vmem_holds(op):
    new = jax.ShapeDtypeStruct((T, 1024, H), jnp.float32)
    pool = jax.ShapeDtypeStruct((P, PAGE_SIZE, 2048, H), jnp.float32)
    reason = "MiB of VMEM for their smallest token block"
    changes = {"kv_pages": pool, "k": new, "v": new}
    _refused(NotImplementedError, op, None, reason, backend="mosaic_tpu", **changes)


def _vmapped(op, jitted):
    arguments = _arguments(op)
    wrap = jax.jit if jitted else lambda f: f
    call = wrap(lambda pool, rest: getattr(pallas_paged, op)(pool, **rest))
    pool = arguments.pop("kv_pages")
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), (pool, arguments))
    return jax.vmap(call)(*stack)


def _differentiated(op, jitted):
    arguments = _arguments(op, kv_pages=_pool(dtype=jnp.float32))
    wrap = jax.jit if jitted else lambda f: f
    call = wrap(lambda pool, rest: getattr(pallas_paged, op)(pool, **rest).sum())
    pool = arguments.pop("kv_pages")
    return jax.grad(call)(pool, arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("jitted", [False, True], ids=["plain", "through_jit"])
@pytest.mark.parametrize(
    ("transform", "hint"),
    [(_vmapped, "vmap is not supported"), (_differentiated, "no derivative is defined")],
    ids=["vmap", "grad"],
)
def test_transformations(op, transform, hint, jitted):
    _refused(NotImplementedError, op, None, hint, call=lambda op: transform(op, jitted))


@pytest.mark.parametrize("op", WRITES)
def test_derivative_by_k(op):
    """Not only the pool: k and v come out of a model whose loss somebody may differentiate."""

    def loss(k, arguments):
        return getattr(pallas_paged, op)(**arguments | {"k": k}).astype(jnp.float32).sum()

    arguments = _arguments(op)
    _refused(
        NotImplementedError,
        op,
        None,
        "no derivative",
        lambda op: jax.grad(loss)(arguments["k"], arguments),
    )


ALONE = [
    *((op, name) for op in WRITES for name in ("k", "v", "k_scale", "v_scale")),
    ("page_write", "page_ids"),
    ("page_write", "token_starts"),
    ("slice_write", "slices"),
    ("slice_write", "num_slices"),
    ("token_write", "slots"),
    ("copy_pages", "src_ids"),
    ("copy_pages", "dst_ids"),
]


@pytest.mark.parametrize(("op", "argument"), ALONE)
def test_vmap_of_one_argument(op, argument):
    """No argument is left out of the refusal."""
    arguments = _arguments(op, kv_pages=_pool(dtype=jnp.int8))
    if op != "copy_pages":
        arguments |= {"k_scale": jnp.ones(()), "v_scale": jnp.ones(())}
    if op == "page_write":
        arguments |= {"token_starts": _ids(2)}

    def call(x):
        return getattr(pallas_paged, op)(**arguments | {argument: x})

    x = arguments[argument]
    _refused(
        NotImplementedError,
        op,
        None,
        "vmap is not supported",
        lambda op: jax.vmap(call)(jnp.stack([x, x])),
    )


MAKE = {
    "no_pages": ({"num_pages": 0}, "num_pages is 0; wanted an integer >= 1"),
    "float_page": ({"page_size": 16.0}, "page_size is 16.0; wanted an integer >= 1"),
    "negative_heads": ({"num_kv_heads": -1}, "num_kv_heads is -1; wanted an integer >= 1"),
    "no_head_dim": ({"head_dim": 0}, "head_dim is 0; wanted an integer >= 1"),
    "large_head_dim": ({"head_dim": 257}, "wanted at most 256: split the head"),
    "dtype": ({"dtype": jnp.int32}, "dtype is int32; wanted one of float32, bfloat16"),
    "slots": ({"num_pages": 2**20, "page_size": 2**11}, "use fewer pages or multiple pools"),
}


@pytest.mark.parametrize(("changes", "sentence"), MAKE.values(), ids=MAKE)
def test_make_kv_pages(changes, sentence):
    good = {"num_pages": 2, "page_size": 4, "num_kv_heads": 1, "head_dim": 64}
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        pallas_paged.make_kv_pages(**good | changes)
    assert str(caught.value).startswith("make_kv_pages: ")
