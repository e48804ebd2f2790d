# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a caller gives to the attention and the writes: numbers of every kind, and numbers of heads.

A number is the same from Python, numpy and jax; one that no kernel can serve is a sentence. How
many KV heads there are is read off the arrays or asked for, never guessed.
"""

import functools
import importlib
import math
import sys
from decimal import Decimal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_paged
from pallas_paged import checks, layout, scalars
from tests.attention.cases import by_loops, make_case

api = importlib.import_module("pallas_paged.attention.api")  # a function hides it
INF, NAN = math.inf, math.nan
HUGE = 10**400  # no float holds it
K, N, H, T = 2, 4, 64, 8
ATTENTION = ("ragged_paged_attention", "write_and_attend")
NAMES = ("q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs")


@functools.cache
def _case():
    return make_case([(3, 7), (1, 6)], head_dim=H, pool_dtype="float8_e4m3fn", num_tokens=T)


# A call in which every number counts.
BASE = {
    "sm_scale": 0.25,
    "sliding_window": 4,
    "soft_cap": 2.0,
    "mask_value": -1.5,
    "k_scale": 0.5,
    "v_scale": 2.0,
    "sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32),
    "num_kv_heads": K,
}


def _arguments(op, **changes):
    arguments = dict(zip(NAMES, _case().arrays, strict=True)) | BASE
    if op == "write_and_attend":
        new = jnp.ones((T, K, H))
        arguments |= {"k": new, "v": new, "kv_pages": jnp.copy(_case().kv_pages)}
    return arguments | changes


def _call(op, **changes):
    return getattr(pallas_paged, op)(**_arguments(op, **changes))


def _refused(op, argument, hint="", call=_call, **changes):
    with pytest.raises(ValueError) as caught:
        call(op, **changes)
    message = str(caught.value).split("\n---")[0]  # jax appends a remark about its frames
    assert message.startswith(f"{op}: argument `{argument}` is "), message
    assert "; wanted " in message and hint in message and "\n" not in message, message
    return message


# ---- Numbers that are refused


class OfAnotherLibrary:
    """Has a shape and a dtype of its own, as torch's tensors, and one value."""

    shape = ()
    dtype = "other.float32"

    def __float__(self):
        return 1.0


NO_NUMBERS = {
    "list": [1.0], "tuple": (1,), "string": "1", "bytes": b"1", "bool": True,
    "numpy_bool": np.bool_(True), "jax_bool": jnp.bool_(True), "complex": 1j,
    "jax_complex": jnp.complex64(1), "decimal": Decimal(1), "object": np.array(None),
    "text": np.array("1"), "function": len, "dict": {}, "matrix": np.ones((1, 1)),
    "two": np.ones(2, np.int32), "none": np.zeros(0), "nan": NAN, "numpy_nan": np.float64(NAN),
    "jax_nan": jnp.float32(NAN), "another's": OfAnotherLibrary(), "class": OfAnotherLibrary,
    "duration": np.timedelta64(1, "s"),
}  # fmt: skip
BEYOND = {"inf": INF, "numpy_inf": np.float32(INF), "jax_inf": jnp.float32(INF)}
LARGE = {"1e300": 1e300, "huge": HUGE}
BELOW = {
    "0": 0,
    "0.0": 0.0,
    "numpy_0": np.float32(0),
    "jax_0": jnp.float32(0),
    "-1": -1,
    "numpy_-1": np.int64(-1),
    "jax_-1": jnp.int32(-1),
    "-inf": -INF,
    "-huge": -HUGE,
}
TINY = {"1e-50": 1e-50, "1e-40": np.float64(1e-40), "jax_1e-40": jnp.float32(1e-40)}
MINUS_INF = {"-inf": -INF, "-1e300": -1e300}
BAD = {
    "soft_cap": (NO_NUMBERS | BEYOND | LARGE | BELOW | TINY, "None turns it off"),
    "sliding_window": (
        NO_NUMBERS | BEYOND | BELOW | {"float": 4.0, "numpy": np.float64(4), "jax": jnp.float32(4)},
        "None turns it off",
    ),
    "sm_scale": (
        NO_NUMBERS | BEYOND | LARGE | MINUS_INF | {"by_head": np.ones(N)},
        "None means head_dim ** -0.5",
    ),
    "mask_value": (NO_NUMBERS | BEYOND | LARGE, "None leaves hidden keys out"),
    "sinks": (
        {name: x for name, x in NO_NUMBERS.items() if name != "nan"}
        | {
            "number": 1.0,
            "short": np.ones(N - 1, np.float32),
            "ints": np.ones(N, np.int32),
            "nan": np.array([0, 0, NAN, 0]),
            "jax_nan": jnp.array([0, 0, NAN, 0]),
            "inf": np.array([0, INF, 0, 0]),
            "1e300": np.array([0, 0, 0, 1e300]),
            "bools": np.ones(N, bool),
        },
        "-inf is a head without one",
    ),
    "num_kv_heads": (
        NO_NUMBERS
        | BELOW
        | {"float": 2.0, "numpy": np.float64(2), "jax": jnp.float32(2), "one": np.array([2])},
        "pass the number of KV heads that the pool was made for",
    ),
}
SCALE_HINT = "one scale for the tensor or one per KV head; None means 1"
BAD_SCALES = (
    {name: x for name, x in NO_NUMBERS.items() if name != "two"}
    | BEYOND
    | LARGE
    | BELOW
    | TINY
    | {
        "ints": np.ones(K, np.int32),
        "three": np.ones(3),
        "by_query_head": np.ones(N),
        "one_0": np.array([1.0, 0.0]),
        "one_nan": jnp.array([NAN, 1.0]),
        "one_negative": np.array([1.0, -1.0], np.float32),
        "one_tiny": np.array([1.0, 1e-50]),
        "one_large": np.array([1e300, 1.0]),
        "inverse": 3e38,
    }
)
for name in ("k_scale", "v_scale"):
    BAD[name] = (BAD_SCALES, SCALE_HINT)
for name in ("causal", "return_lse"):
    BAD[name] = (
        {k: x for k, x in NO_NUMBERS.items() if "bool" not in k}
        | {"1": 1, "0": 0, "None": None, "numpy_1": np.int64(1), "bools": np.ones(1, bool)},
        "it is compiled into the kernel",
    )

ON_ACCELERATOR = jax.default_backend() != "cpu"


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("argument", BAD)
def test_a_number_that_cannot_be_served_is_a_sentence(op, argument):
    values, hint = BAD[argument]
    for name, value in values.items():
        if ON_ACCELERATOR and isinstance(value, jax.Array):
            continue  # its value is not read
        try:
            _refused(op, argument, hint, **{argument: value})
        except BaseException as error:
            raise AssertionError(f"{argument}={name}") from error


def _write(op, **changes):
    """A small write to an 8-bit pool."""
    new = jnp.ones((T, K, H))
    arguments = {"kv_pages": jnp.copy(_case().kv_pages), "k": new, "v": new} | {
        "page_write": {"page_ids": jnp.zeros(1, jnp.int32)},
        "slice_write": {
            "slices": jnp.zeros((3, 1), jnp.int32),
            "num_slices": jnp.zeros(1, jnp.int32),
        },
        "token_write": {"slots": jnp.full(T, -1, jnp.int32)},
    }[op]
    return getattr(pallas_paged, op)(**arguments | changes)


WRITES = ("page_write", "slice_write", "token_write")


@pytest.mark.parametrize("op", WRITES)
@pytest.mark.parametrize("argument", ["k_scale", "v_scale", "num_kv_heads"])
def test_a_number_of_a_write_that_cannot_be_served_is_a_sentence(op, argument):
    if argument == "num_kv_heads":
        values, hint = BAD[argument][0], "a static count of heads"
    else:
        values, hint = BAD[argument]
    for name, value in values.items():
        if ON_ACCELERATOR and isinstance(value, jax.Array):
            continue  # its value is not read
        try:
            _refused(op, argument, hint, _write, **{argument: value})
        except BaseException as error:
            raise AssertionError(f"{argument}={name}") from error


def test_the_sentence_says_what_came():
    message = _refused(ATTENTION[0], "k_scale", k_scale=np.array([1.0, 1e-50]))
    assert "is 1e-50 at index 1 of float64[2]; wanted a number or float32[2], > 0" in message
    assert "is inf; wanted" in _refused(ATTENTION[0], "soft_cap", soft_cap=INF)
    if not ON_ACCELERATOR:
        assert "is int32[] -1; wanted" in _refused(
            ATTENTION[0], "sliding_window", sliding_window=jnp.int32(-1)
        )
    assert "is True of type bool; wanted" in _refused(ATTENTION[0], "soft_cap", soft_cap=True)
    assert len(_refused(ATTENTION[0], "sm_scale", sm_scale=[1.0] * 10**5)) < 400


@pytest.mark.parametrize("argument", ["soft_cap", "mask_value", "num_kv_heads", "causal"])
@pytest.mark.parametrize("op", ATTENTION)
def test_what_is_static_cannot_be_traced(op, argument):
    value = {"num_kv_heads": jnp.int32(2), "causal": jnp.bool_(True)}.get(argument, jnp.float32(2))
    with pytest.raises(ValueError, match=f"{op}: argument `{argument}` is .*, traced; wanted"):
        jax.eval_shape(lambda x: _call(op, **{argument: x}), value)


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize(
    "argument", ["num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes"]
)
def test_block_sizes_of_jaxs_kernel(op, argument):
    for value in (8, 0, 64 * 2**20, "auto"):
        _refused(op, argument, "leave it out", **{argument: value})
    assert jax.eval_shape(lambda: _call(op, **{argument: None}))


# ---- Numbers that are taken


@functools.cache
def _base_result():
    return np.asarray(_call(ATTENTION[0]))


TAKEN = {
    "sm_scale": [np.float64(0.25), np.array(0.25), jnp.float32(0.25), jnp.bfloat16(0.25),
                 ml_dtypes.bfloat16(0.25), jnp.array([0.25]), np.float16([0.25])],
    "sliding_window": [np.int64(4), np.uint8(4), jnp.int32(4), np.array(4), jnp.array([4]),
                       jnp.uint32(4)],
    "soft_cap": [2, np.float32(2), np.int8(2), jnp.float32(2), jnp.int32(2), jnp.array([2.0]),
                 np.array(2.0), jnp.bfloat16(2)],
    "mask_value": [np.float64(-1.5), jnp.float32(-1.5), np.array([-1.5])],
    "k_scale": [np.float64(0.5), jnp.bfloat16(0.5), np.array([0.5]), jnp.array([0.5]),
                np.full(K, 0.5), jnp.full(K, 0.5, jnp.bfloat16), jnp.full(K, 0.5)],
    "v_scale": [2, np.int64(2), jnp.int32(2), np.float16(2), np.array([2.0]), np.full(K, 2.0)],
    "sinks": [BASE["sinks"].astype(np.float64), jnp.asarray(BASE["sinks"], jnp.bfloat16),
              BASE["sinks"].astype(np.float16)],
    "num_kv_heads": [np.int64(2), np.uint8(2), np.array(2), jnp.int32(2)],
    "causal": [np.bool_(True), jnp.bool_(True), np.array(True)],
    "return_lse": [np.bool_(False), jnp.bool_(False)],
}  # fmt: skip


@pytest.mark.parametrize("argument", TAKEN)
def test_numpys_and_jaxs_numbers_are_taken_like_pythons(argument):
    for value in TAKEN[argument]:
        out = _call(ATTENTION[0], **{argument: value})
        assert np.array_equal(out, _base_result(), equal_nan=True), repr(value)


def test_the_base_call_is_right_and_every_number_counts():
    case = _case()
    options = {name: x for name, x in BASE.items() if name != "num_kv_heads"}
    want, _ = by_loops(case, **options)
    np.testing.assert_allclose(_base_result(), want, rtol=1e-4, atol=1e-4)
    for name, value in options.items():
        other = 2 if name == "sliding_window" else value * 1.5
        out, _ = by_loops(case, **options | {name: other})
        assert np.abs(out - want).max() > 1e-3, name


def test_all_keys():
    """However large a window is, and from where, it is no window."""
    want = _call(ATTENTION[0], sliding_window=None)
    assert np.abs(want - _base_result()).max() > 1e-3
    for window in (7, 2**31 - 1, 2**31, sys.maxsize, HUGE, np.uint64(2**64 - 1), np.int64(2**40),
                   jnp.uint32(2**32 - 1), np.array([2**63 - 1])):  # fmt: skip
        np.testing.assert_allclose(
            _call(ATTENTION[0], sliding_window=window), want, rtol=1e-6, atol=1e-6
        )
    for window in (np.int32([7]), np.uint32(2**32 - 1), np.int8(7)):  # traced: an operand as well
        taken = jax.jit(functools.partial(checks.require_window, "op"))(window)
        assert taken.dtype == jnp.int32 and taken.shape == () and taken in (7, 2**31 - 1)


def test_no_scale_is_that_of_the_heads_and_no_sink_is_minus_infinity():
    call = functools.partial(_call, ATTENTION[0])
    assert np.array_equal(call(sm_scale=None), call(sm_scale=H**-0.5))
    assert not np.array_equal(call(sm_scale=None), call(sm_scale=1.0))
    without = call(sinks=np.full(N, -INF, np.float32))
    np.testing.assert_allclose(without, call(sinks=None), rtol=1e-6, atol=1e-6)
    for value in (-INF, -1e300, -HUGE, jnp.float32(-INF)):
        assert checks.require_mask_value("op", value) is None
    assert np.isfinite(call(sm_scale=-0.25)).all() and np.isfinite(call(sm_scale=0)).all()


@pytest.mark.parametrize("op", ATTENTION)
def test_a_scale_whose_sign_is_known_is_known_to_the_kernel(op, monkeypatch):
    """It saves a GPU kernel a product a score; whatever the number is a number of."""
    seen = []

    def record(*args, options, **rest):
        seen.append(options.is_scale_positive)
        return None, None, None

    monkeypatch.setattr(api, "_write_and_attend", record)
    monkeypatch.setattr(api, "_attention", lambda *args, **rest: record(*args, **rest)[:2])
    positive = [None, 0.5, 1, np.float32(2), np.float64(0.5), np.array(0.5), np.array([0.5])]
    others = [0, -0.5, np.float32(-1), np.array([-0.5]), 1e-40]
    for sm_scale in positive + others:
        _call(op, sm_scale=sm_scale)
    assert seen == [True] * len(positive) + [False] * len(others)


def test_scales_at_the_ends_of_their_range_are_served():
    for scale in (2.0**-126, 2.0**126):
        pool = _write(
            "token_write",
            slots=jnp.arange(T, dtype=jnp.int32),
            k_scale=scale,
            k=jnp.full((T, K, H), np.float32(scale)),
            v=jnp.ones((T, K, H)),
        )
        k, _ = layout.split_kv(layout.flatten_slots(pool)[:T], K, H)
        assert (np.asarray(k, np.float32) == 1).all()


def test_a_scale_that_is_traced_is_not_looked_at():
    def call(scale, sm_scale):
        return _call("write_and_attend", k_scale=scale, v_scale=scale, sm_scale=sm_scale)[0]

    for shape in ((), (1,), (K,)):
        for dtype in (jnp.float32, jnp.bfloat16):
            scale = jax.ShapeDtypeStruct(shape, dtype)
            assert jax.eval_shape(call, scale, jax.ShapeDtypeStruct((), dtype)).shape == (T, N, H)


def test_an_accelerators_values_are_not_fetched(monkeypatch):
    """No call waits for a device to have a number checked; only its form is."""
    monkeypatch.setattr(scalars, "_lies_on_host", lambda x: False)
    nan = jnp.float32(NAN)
    _call(
        ATTENTION[0],
        k_scale=nan,
        v_scale=jnp.full(K, NAN),
        sm_scale=nan,
        sinks=jnp.full(N, NAN),
        sliding_window=jnp.int32(-1),
    )
    _refused(ATTENTION[0], "k_scale", k_scale=NAN)
    _refused(ATTENTION[0], "k_scale", k_scale=jnp.ones((K, 1)))
    _refused(ATTENTION[0], "soft_cap", soft_cap=nan)  # which is compiled in, so it is read


# ---- How many heads there are


def _pool(num_kv_heads, head_dim, dtype, num_rows=None):
    *shape, rows, lanes = layout.pool_shape(5, 4, num_kv_heads, head_dim, dtype)
    return jax.ShapeDtypeStruct((*shape, num_rows or rows, lanes), dtype)


def _attend(op, num_heads, head_dim, pool, **options):
    """The shape that the op would return, by tracing alone."""
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    q = jax.ShapeDtypeStruct((T, num_heads, head_dim), jnp.bfloat16)
    new = [options.pop("k"), options.pop("v")] if "k" in options else []
    metadata = [int32((2,)), int32((2, 3)), int32((3,)), int32((1,))]
    call = functools.partial(getattr(pallas_paged, op), **options)
    return jax.eval_shape(call, q, *new, pool, *metadata)


# (K, N, H), pool dtype: what the sentence lists.
OPEN = {
    (1, 8, 64, "bfloat16"): "1 or 2",
    (2, 8, 64, "bfloat16"): "1 or 2",
    (3, 12, 128, "bfloat16"): "3 or 4",
    (4, 12, 128, "bfloat16"): "3 or 4",
    (5, 40, 128, "bfloat16"): "5 or 6 or 7 or 8",
    (1, 8, 128, "float8_e4m3fn"): "1 or 2",
    (1, 8, 128, "int8"): "1 or 2",
    (3, 12, 256, "float32"): "3 or 4",
    (9, 90, 64, "bfloat16"): "9 or 10 or 11 or 12 or 13 or 14 or 15 or 16",
    (3, 12, 64, "bfloat16"): "3 or 4",
    (1, 4, 40, "int8"): "1 or 2 or 3 or 4",
    (2, 6, 64, "float16"): "1 or 2",
}


@pytest.mark.parametrize("sizes", OPEN, ids=str)
def test_heads_that_the_padding_leaves_open_are_asked_for(sizes):
    num_kv_heads, num_heads, head_dim, dtype = sizes
    pool, op = _pool(num_kv_heads, head_dim, dtype), "ragged_paged_attention"
    hint = f"is the pool of {OPEN[sizes]} KV heads of {head_dim}: say which"
    call = functools.partial(_attend, op, num_heads, head_dim, pool)
    _refused(op, "num_kv_heads", hint, lambda op: call())
    assert call(num_kv_heads=num_kv_heads).shape == (T, num_heads, head_dim)


# (K, N, H), pool dtype, R of a pool that make_kv_pages would not make.
KNOWN = [
    (1, 8, 128, "bfloat16", None), (2, 8, 128, "bfloat16", None), (4, 32, 128, "bfloat16", None),
    (8, 32, 128, "bfloat16", None), (3, 15, 128, "bfloat16", None), (7, 7, 128, "bfloat16", None),
    (8, 64, 256, "float32", None), (8, 32, 64, "bfloat16", None), (1, 7, 64, "bfloat16", None),
    (3, 12, 128, "bfloat16", 6), (5, 40, 128, "bfloat16", 10), (5, 40, 64, "bfloat16", 5),
    (1, 8, 128, "int8", 2), (1, 8, 64, "bfloat16", 1), (6, 12, 128, "bfloat16", 12),
]  # fmt: skip


@pytest.mark.parametrize("sizes", KNOWN, ids=str)
def test_heads_that_one_number_alone_fits_are_read_off_the_pool(sizes, monkeypatch):
    num_kv_heads, num_heads, head_dim, dtype, num_rows = sizes
    seen = []

    def record(q, *args, options, **rest):
        seen.append(options.num_kv_heads)
        return q, q[..., 0]

    monkeypatch.setattr(api, "_attention", record)
    pool = _pool(num_kv_heads, head_dim, dtype, num_rows)
    _attend("ragged_paged_attention", num_heads, head_dim, pool)
    assert seen == [num_kv_heads]


def test_query_heads_that_no_number_divides():
    op, pool = "ragged_paged_attention", _pool(4, 128, "bfloat16")
    hint = "is the pool of 3 or 4 KV heads of 128, and 7 is a multiple of none: say which"
    _refused(op, "num_kv_heads", hint, lambda op: _attend(op, 7, 128, pool))
    odd = _pool(4, 128, "bfloat16", 7)  # K and V of a head are a pair of rows
    hint = "is the pool of no whole number of KV heads of 128"
    _refused(op, "num_kv_heads", hint, lambda op: _attend(op, 7, 128, odd))


def _flat_write(op, width, pool, **options):
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    new = jax.ShapeDtypeStruct((T, width), jnp.bfloat16)
    metadata = {
        "page_write": [int32((2,))],
        "slice_write": [int32((3, 2)), int32((1,))],
        "token_write": [int32((T,))],
    }[op]
    call = functools.partial(getattr(pallas_paged, op), **options)
    return jax.eval_shape(call, pool, new, new, *metadata)


# (K, H) of the pool, its dtype, k's width: what the sentence lists.
OPEN_WIDTHS = {
    (3, 256, "bfloat16", 768): "3 heads of 256 or 4 heads of 192",
    (4, 192, "float32", 768): "3 heads of 256 or 4 heads of 192",
    (2, 128, "bfloat16", 256): "2 heads of 128 or 4 heads of 64",
    (1, 128, "bfloat16", 128): "1 head of 128 or 2 heads of 64",
    (3, 200, "float8_e5m2", 600): "3 heads of 200 or 4 heads of 150",
    (6, 256, "int8", 1536): "6 heads of 256 or 8 heads of 192",
    (1, 64, "bfloat16", 64): "1 head of 64 or 2 heads of 32",
    (3, 80, "float16", 240): "3 heads of 80 or 5 heads of 48 or 6 heads of 40 or 8 heads of 30",
    (2, 256, "bfloat16", 1024): "other heads",
}
KNOWN_WIDTHS = [
    (4, 256, "bfloat16", 1024),
    (1, 256, "int8", 256),
    (8, 256, "float32", 2048),
    (2, 127, "bfloat16", 254),
    (1, 192, "bfloat16", 192),
    (3, 250, "float8_e4m3fn", 750),
]


@pytest.mark.parametrize("op", WRITES)
@pytest.mark.parametrize("sizes", OPEN_WIDTHS, ids=str)
def test_a_flat_k_whose_heads_are_open(op, sizes):
    num_kv_heads, head_dim, dtype, width = sizes
    pool = _pool(num_kv_heads, head_dim, dtype)
    hint = f"is the pool of {OPEN_WIDTHS[sizes]}: say which"
    _refused(op, "num_kv_heads", hint, lambda op: _flat_write(op, width, pool))
    if width == num_kv_heads * head_dim:
        assert _flat_write(op, width, pool, num_kv_heads=num_kv_heads).shape == pool.shape


@pytest.mark.parametrize("sizes", KNOWN_WIDTHS, ids=str)
def test_a_flat_k_that_says_its_heads(sizes):
    """The same bytes as with the number of heads, or with k in its other form."""
    num_kv_heads, head_dim, dtype, width = sizes
    k, v = np.random.default_rng(0).standard_normal((2, T, width)).astype(np.float32)
    slots = jnp.arange(T, dtype=jnp.int32)
    results = [
        pallas_paged.token_write(
            layout.make_kv_pages(5, 4, num_kv_heads, head_dim, dtype), k, v, slots
        )
        for k, v in ((k, v), (x.reshape(T, num_kv_heads, head_dim) for x in (k, v)))
    ]
    assert np.any(results[0]) and np.array_equal(*(np.asarray(x, np.float32) for x in results))


@pytest.mark.parametrize(
    ("sizes", "num_heads"),
    [
        ((3, 128, "bfloat16"), 12),
        ((1, 64, "bfloat16"), 8),
        ((5, 128, "bfloat16"), 40),
        ((1, 128, "float8_e4m3fn"), 8),
        ((3, 256, "bfloat16"), 12),
    ],
    ids=str,
)
def test_write_and_attend_reads_the_heads_off_k_and_q(sizes, num_heads, monkeypatch):
    """k's width over q's head_dim leaves nothing open, whatever the pool's padding does."""
    num_kv_heads, head_dim, dtype = sizes
    seen = []

    def record(q, k, v, kv_pages, *args, options, **rest):
        seen.append(options.num_kv_heads)
        return q, q[..., 0], kv_pages

    monkeypatch.setattr(api, "_write_and_attend", record)
    pool = _pool(num_kv_heads, head_dim, dtype)
    for shape in ((T, num_kv_heads * head_dim), (T, num_kv_heads, head_dim)):
        new = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        _attend("write_and_attend", num_heads, head_dim, pool, k=new, v=new)
    assert seen == [num_kv_heads] * 2


def test_write_and_attend_of_heads_that_do_not_fit_together():
    op, pool = "write_and_attend", _pool(3, 128, "bfloat16")
    for shape, argument, hint in (
        ((T, 200), "k", "their heads of the same size"),
        ((T, 3, 64), "k", "has C = 128"),
        ((T, 5 * 128), "num_kv_heads", "that the pool was made for"),
        ((T,), "k", "one leading dimension"),
        ((T, 0), "k", "one leading dimension"),
    ):
        new = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        options = {"num_kv_heads": 3} if len(shape) == 1 or shape[1] == 0 else {}
        with pytest.raises(ValueError, match=f"{op}: argument `{argument}` is ") as caught:
            _attend(op, 12, 128, pool, k=new, v=new, **options)
        assert hint in str(caught.value) or argument == "k"


# ---- The other ops' numbers


def test_sizes_may_be_numpys_and_jaxs():
    sizes = [np.int64(3), np.int32(4), np.uint8(2), jnp.int32(64)]
    pool = pallas_paged.make_kv_pages(*sizes, "float32")
    assert pool.shape == (3, 4, 2, 128) and pool.dtype == jnp.float32
    metadata = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, 3), (2,), (3,), (1,))]
    indices = jax.eval_shape(
        lambda *arrays: pallas_paged.write_indices(*arrays, np.int64(4), num_tokens=np.int32(8)),
        *metadata,
    )
    assert indices.slots.shape == (8,) and indices.page_ids.shape == (2,)
    pallas_paged.validate(pool, num_tokens=np.int64(8), page_ids=np.array([-1, 1]))


NO_SIZES = NO_NUMBERS | {"inf": INF, "huge": HUGE, "float": 2.0, "zero": 0, "minus": -1}


@pytest.mark.parametrize("value", NO_SIZES.values(), ids=NO_SIZES)
def test_sizes_that_are_none(value):
    sizes = {"num_pages": 3, "page_size": 4, "num_kv_heads": 2, "head_dim": 64}
    for name in sizes:
        with pytest.raises(ValueError, match=f"^make_kv_pages: {name} is .*; wanted") as caught:
            pallas_paged.make_kv_pages(**sizes | {name: value})
        assert "\n" not in str(caught.value)
    metadata = [jnp.zeros(shape, jnp.int32) for shape in ((2, 3), (2,), (3,), (1,))]
    _refused(
        "write_indices",
        "page_size",
        "static shapes",
        lambda op: pallas_paged.write_indices(*metadata, value, num_tokens=8),
    )
    if not (isinstance(value, int) and value == 0):
        _refused(
            "write_indices",
            "num_tokens",
            "static",
            lambda op: pallas_paged.write_indices(*metadata, 4, num_tokens=value),
        )
    if not (isinstance(value, int) and value in (0, HUGE)):
        pool = _case().kv_pages
        _refused(
            "validate",
            "num_tokens",
            "it is T",
            lambda op: pallas_paged.validate(pool, num_tokens=value),
        )


@pytest.mark.parametrize(
    "dtype",
    [None, 3, "float33", [1], jnp.ones(2), np.float32(1), jnp.bool_, complex, "int64"],
    ids=repr,
)
def test_what_is_no_dtype_of_a_pool(dtype):
    with pytest.raises(ValueError, match="^make_kv_pages: dtype is .*; wanted one of float32"):
        pallas_paged.make_kv_pages(3, 4, 2, 64, dtype)


@pytest.mark.parametrize("op", ["ragged_paged_attention", "page_write"])
@pytest.mark.parametrize("backend", [None, ["auto"], 1, jnp.ones((2, 2)), b"auto"], ids=range(5))
def test_what_is_no_backend(op, backend):
    call = _call if op in ATTENTION else _write
    with pytest.raises(ValueError, match=f'^{op}: backend is .*; wanted "auto" or one of'):
        call(op, backend=backend)


ARRAYS = {
    "ragged_paged_attention": NAMES,
    "write_and_attend": (*NAMES, "k", "v"),
    "page_write": ("kv_pages", "k", "v", "page_ids"),
    "slice_write": ("kv_pages", "k", "v", "slices", "num_slices"),
    "token_write": ("kv_pages", "k", "v", "slots"),
}
NO_ARRAYS = {
    "list": [1], "none": None, "str": "1", "bool": True, "int": 1, "float": 1.0, "nan": NAN,
    "huge": HUGE, "numpy_scalar": np.float32(1), "numpy_0d": np.array(1),
    "complex": np.ones(8) * 1j,
    "int64": np.ones(8, np.int64), "object": np.array([None] * 8), "text": np.array(["a"] * 8),
    "bools": np.ones(8, bool), "random_key": jax.random.key(0), "another's": OfAnotherLibrary(),
}  # fmt: skip


@pytest.mark.parametrize("op", ARRAYS)
def test_an_array_of_another_kind(op):
    call = _call if op in ATTENTION else _write
    for argument in ARRAYS[op]:
        for name, value in NO_ARRAYS.items():
            if name == "int" and argument in ("num_seqs", "num_slices"):
                continue  # they may be ints
            if value is None and argument in ("k", "v"):
                continue  # a packed QKV: see test_packed
            _refused(op, argument, call=call, **{argument: value})
