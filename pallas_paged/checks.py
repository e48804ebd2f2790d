# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Static checks that the ops share. Each raises a ValueError with what came and what was wanted."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged import layout, scalars

# A number that is divided by, or whose inverse a kernel takes, must lie between these: then both it
# and its inverse are normal float32 numbers. Chips may treat others as 0 or as infinite.
_LEAST, _MOST = 2.0**-126, 2.0**126


def require(condition: bool, op: str, argument: str, *, got: Any, wanted: str, hint: str) -> None:
    """Raises the ValueError of a caller's mistake unless `condition` holds.

    >>> require(False, "page_write", "slots", got="float32[4]", wanted="int32[T]", hint="cast it")
    Traceback (most recent call last):
      ...
    ValueError: page_write: argument `slots` is float32[4]; wanted int32[T]: cast it
    """
    if not condition:
        raise ValueError(f"{op}: argument `{argument}` is {got}; wanted {wanted}: {hint}")


def describe(x: Any) -> str:
    """The dtype[shape] of an array, or the value itself, in one line that is not too long.

    >>> describe(jnp.zeros((2, 3)))
    'float32[2,3]'
    """
    text = scalars.show(x)
    return text if scalars.is_array(x) else f"{text} of type {type(x).__name__}"


def require_array(op: str, argument: str, x: Any) -> None:
    """Refuses what is not an array: lists, None, Python numbers, tensors of other libraries."""
    require(
        scalars.is_array(x),
        op,
        argument,
        got=describe(x),
        wanted="an array of jax or numpy",
        hint="pass it through jnp.asarray with the dtype that the op takes",
    )


def require_int32(op: str, argument: str, x: Any, ndim: int, shape: str) -> None:
    """Refuses all but int32 of `ndim` dimensions. A silent cast would let int64 ids wrap."""
    require_array(op, argument, x)
    require(
        x.dtype == jnp.int32 and x.ndim == ndim,
        op,
        argument,
        got=describe(x),
        wanted=f"int32{shape}",
        hint="metadata is int32; convert it on the host, where an overflow can be seen",
    )


def require_pool(op: str, kv_pages: Any) -> None:
    """Refuses what cannot be a pool, made by `make_kv_pages` or by the caller in its form."""
    require_array(op, "kv_pages", kv_pages)
    require(
        kv_pages.ndim == 4 and 0 not in kv_pages.shape,
        op,
        "kv_pages",
        got=describe(kv_pages),
        wanted="[P, page_size, R, C], none of them 0",
        hint="make it with make_kv_pages; a stack of layers is one flat pool of L*P pages",
    )
    require(
        kv_pages.dtype in layout.POOL_DTYPES,
        op,
        "kv_pages",
        got=describe(kv_pages),
        wanted=f"one of {', '.join(map(str, layout.POOL_DTYPES))}",
        hint="make it with make_kv_pages",
    )
    require(
        kv_pages.shape[3] % layout.LANES == 0,
        op,
        "kv_pages",
        got=describe(kv_pages),
        wanted=f"C a multiple of {layout.LANES}",
        hint="make it with make_kv_pages, which pads a head to whole lanes",
    )
    require(
        kv_pages.shape[0] * kv_pages.shape[1] < 2**31,
        op,
        "kv_pages",
        got=describe(kv_pages),
        wanted="P * page_size below 2**31",
        hint="a slot is an int32: use fewer pages or multiple pools",
    )


def infer_heads(op: str, kv_pages: Any, k: Any, num_kv_heads: int | None) -> tuple[int, int]:
    """K and H of a write's k, from its shape and `num_kv_heads`, checked against the pool."""
    require_array(op, "k", k)
    require(
        k.ndim in (2, 3) and 0 not in k.shape[1:],
        op,
        "k",
        got=describe(k),
        wanted="[T, K, H] or [T, K*H]",
        hint="pack the batch's tokens into one leading dimension",
    )
    num_rows, num_lanes = kv_pages.shape[2:]
    if num_kv_heads is not None:
        hint = "a static count of heads; k is [T, K*H] or [T, K, H]"
        num_kv_heads = require_heads(op, num_kv_heads, hint)
    if k.ndim == 3:
        require(
            num_kv_heads in (None, k.shape[1]),
            op,
            "num_kv_heads",
            got=num_kv_heads,
            wanted=f"{k.shape[1]}, as k {describe(k)} says",
            hint="leave it out for [T, K, H]",
        )
        heads, head_dim = k.shape[1:]
    else:
        if num_kv_heads is None:
            num_kv_heads = _heads_of_flat(op, kv_pages, k)
        require(
            k.shape[1] % num_kv_heads == 0,
            op,
            "num_kv_heads",
            got=num_kv_heads,
            wanted=f"a divisor of k's width {k.shape[1]}",
            hint="k is [T, K*H]",
        )
        heads, head_dim = num_kv_heads, k.shape[1] // num_kv_heads
    require(
        layout.num_lanes(head_dim) == num_lanes,
        op,
        "k",
        got=f"{describe(k)} (head_dim {head_dim})",
        wanted=f"a head_dim whose pool has C = {num_lanes}, as kv_pages {describe(kv_pages)}",
        hint=f"a pool for this head_dim has C = {layout.num_lanes(head_dim)}",
    )
    require(
        layout.num_rows_used(heads, head_dim) <= num_rows,
        op,
        "k",
        got=f"{describe(k)} ({heads} KV heads of {head_dim})",
        wanted=f"heads that fit the R = {num_rows} rows of kv_pages {describe(kv_pages)}",
        hint=f"these need R >= {layout.num_rows_used(heads, head_dim)}",
    )
    return heads, head_dim


def _heads_of_flat(op: str, kv_pages: Any, k: Any) -> int:
    """K of k [T, K*H] where exactly one K and H make such a pool."""
    found = layout.heads_of_width(k.shape[1], kv_pages.shape[2], kv_pages.shape[3], kv_pages.dtype)
    pools = " or ".join(f"{n} head{'s' * (n > 1)} of {head_dim}" for n, head_dim in found)
    require(
        len(found) == 1,
        op,
        "num_kv_heads",
        got=None,
        wanted=f"the number of KV heads of k {describe(k)}",
        hint=f"kv_pages {describe(kv_pages)} is the pool of {pools or 'other heads'}: say which",
    )
    return found[0][0]


def heads_of_pool(op: str, kv_pages: Any, num_heads: int, head_dim: int) -> int:
    """K of a pool where exactly one K that divides the N query heads makes its R."""
    made = layout.heads_of_rows(kv_pages.shape[2], head_dim, kv_pages.dtype)
    found = [heads for heads in made if num_heads % heads == 0]
    fault = f", and {num_heads} is a multiple of none" if made and not found else ""
    require(
        len(found) == 1,
        op,
        "num_kv_heads",
        got=None,
        wanted=f"the number of KV heads for {num_heads} query heads",
        hint=f"kv_pages {describe(kv_pages)} is the pool of "
        f"{' or '.join(map(str, made)) or 'no whole number of'} KV heads of {head_dim}{fault}: "
        "say which",
    )
    return found[0]


def require_packed(op: str, argument: str, qkv: Any, num_kv_heads: Any) -> jax.ShapeDtypeStruct:
    """The type of the keys, and of the values, in a packed QKV."""
    require_array(op, argument, qkv)
    require(
        num_kv_heads is not None,
        op,
        "num_kv_heads",
        got=describe(num_kv_heads),
        wanted=f"an int, because v is None and {argument} a packed QKV",
        hint="its last 2 * num_kv_heads heads are the keys and the values",
    )
    heads = require_heads(op, num_kv_heads, "a static count of heads")
    require(
        qkv.ndim == 3 and qkv.shape[1] >= 2 * heads,
        op,
        argument,
        got=describe(qkv),
        wanted=f"[T, A, H] with at least 2 * {heads} heads, because v is None",
        hint="pass v, or the packed QKV whose last heads are the keys and the values",
    )
    return jax.ShapeDtypeStruct((qkv.shape[0], heads, qkv.shape[2]), qkv.dtype)


def require_write(
    op: str,
    kv_pages: Any,
    k: Any,
    v: Any,
    k_scale: Any,
    v_scale: Any,
    num_kv_heads: int | None,
) -> tuple[int, int, Any, Any]:
    """Checks what every write shares; returns K, H and the two scales."""
    require_pool(op, kv_pages)
    if v is None:
        k = v = require_packed(op, "k", k, num_kv_heads)
    heads, head_dim = infer_heads(op, kv_pages, k, num_kv_heads)
    require_array(op, "v", v)
    require(
        v.shape == k.shape and v.dtype == k.dtype,
        op,
        "v",
        got=describe(v),
        wanted=f"{describe(k)}, as k",
        hint="k and v of a token have the same form",
    )
    require(
        k.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        or (layout.is_quantized(kv_pages.dtype) and k.dtype == kv_pages.dtype),
        op,
        "k",
        got=describe(k),
        wanted="float32, bfloat16 or float16, or the dtype of an 8-bit pool",
        hint="pass unquantised k and v with k_scale and v_scale, or what the pool is to hold",
    )
    k_scale = require_scale(op, "k_scale", k_scale, heads, kv_pages)
    v_scale = require_scale(op, "v_scale", v_scale, heads, kv_pages)
    return heads, head_dim, k_scale, v_scale


# ---- Numbers that a caller passes. Those of Python, numpy and jax are treated alike. A value is
# checked unless it is traced or lies on an accelerator: no call waits for a device to check one.


def require_heads(op: str, heads: Any, hint: str, argument: str = "num_kv_heads") -> int:
    """A number of heads as a static int."""
    count = scalars.read_int(heads)
    if count is None or count < 1:
        _refuse(op, argument, heads, "an int >= 1", hint)
    return count


def require_max_seqlen_q(op: str, max_seqlen_q: Any) -> int | None:
    """The most new tokens of a sequence as a static int, or None."""
    if max_seqlen_q is None:
        return None
    value = scalars.read_int(max_seqlen_q)
    if value is None or value < 1:
        hint = "the most new tokens of a sequence, which chooses the kernels; None promises nothing"
        _refuse(op, "max_seqlen_q", max_seqlen_q, "None or a static int >= 1", hint)
    return value


def require_bool(op: str, argument: str, x: Any) -> bool:
    """A static switch."""
    value = scalars.read_bool(x)
    if value is None:
        hint = "it is compiled into the kernel, so it can be neither traced nor a number"
        _refuse(op, argument, x, "True or False", hint)
    return value


def require_scale(op: str, argument: str, scale: Any, num_kv_heads: int, kv_pages: Any) -> Any:
    """A scale as None, float32[] or float32[K]; only 8-bit pools have one."""
    if scale is None:
        return None
    if not layout.is_quantized(kv_pages.dtype):
        hint = "only fp8 and int8 pools are scaled"
        _refuse(op, argument, scale, f"None for a {kv_pages.dtype} pool", hint)
    return _require_floats(
        op,
        argument,
        scale,
        (num_kv_heads,),
        lambda x: (x >= _LEAST) & (x <= _MOST),
        wanted=f"a number or float32[{num_kv_heads}], > 0, of which float32 holds the inverse too",
        hint="one scale for the tensor or one per KV head; None means 1",
    )


def require_sm_scale(op: str, sm_scale: Any, head_dim: int) -> Any:
    """The factor on q . k as float32[]; None means `head_dim ** -0.5`."""
    if sm_scale is None:
        return np.float32(head_dim**-0.5)
    return _require_floats(
        op,
        "sm_scale",
        sm_scale,
        (),
        np.isfinite,
        wanted="None or a finite number",
        hint="one factor for all heads, a number or float32[]; None means head_dim ** -0.5",
    )


def require_sinks(op: str, sinks: Any, num_heads: int) -> Any:
    """None or float32[N]."""
    if sinks is None:
        return None
    wanted = f"None or float32[{num_heads}], none of it NaN or inf"
    hint = "one sink per query head, as an array of floats; -inf is a head without one"
    if scalars.shape_of(sinks) != (num_heads,):
        _refuse(op, "sinks", sinks, wanted, hint)
    shape = (num_heads,)
    return _require_floats(
        op, "sinks", sinks, shape, lambda x: x < np.inf, wanted=wanted, hint=hint
    )


def require_soft_cap(op: str, soft_cap: Any) -> float | None:
    """None or a static float."""
    if soft_cap is None:
        return None
    value = scalars.read_real(soft_cap)
    if value is None or not _LEAST <= value <= _MOST:
        hint = "None turns it off; it is compiled into the kernel, so it cannot be traced"
        _refuse(op, "soft_cap", soft_cap, "None or a number > 0 that float32 holds", hint)
    return value


def require_mask_value(op: str, mask_value: Any) -> float | None:
    """None or a static float. One that is -inf in float32 leaves hidden keys out, as None does."""
    if mask_value is None:
        return None
    value = scalars.read_real(mask_value)
    largest = float(np.finfo(np.float32).max)
    if value is None or not value <= largest:
        hint = "None leaves hidden keys out; it is compiled into the kernel, so it cannot be traced"
        _refuse(op, "mask_value", mask_value, "None or a number that is not NaN or inf", hint)
    return value if value >= -largest else None


def require_window(op: str, sliding_window: Any) -> Any:
    """None or int32[]. A window too large for int32 shows all keys, as the largest int32 does."""
    if sliding_window is None:
        return None
    is_scalar = scalars.shape_of(sliding_window) in ((), (1,))
    is_good = scalars.is_integer(sliding_window) and is_scalar
    if is_good:
        values = scalars.host_values(sliding_window)
        is_good = values is None or bool((values >= 1).all())
    if not is_good:
        hint = "None turns it off; a query always sees its own key, so the smallest window is 1"
        wanted = "None or an int >= 1 or an int32 scalar"
        _refuse(op, "sliding_window", sliding_window, wanted, hint)
    return scalars.as_scalar(scalars.as_int32(sliding_window))


def _require_floats(
    op: str,
    argument: str,
    x: Any,
    shape: tuple[int, ...],
    is_good: Callable[[Any], Any],
    *,
    wanted: str,
    hint: str,
) -> Any:
    """float32[] of a number, or float32 of an array of floats of `shape`.

    `is_good` says which float32 values are taken; it gets those that can be read without a wait.
    """
    came = scalars.shape_of(x)
    is_number = came == () or (came == (1,) and shape != (1,))
    if not (scalars.is_real(x) and (is_number or came == shape and not scalars.is_integer(x))):
        _refuse(op, argument, x, wanted, hint)
    values = scalars.host_values(x)
    if values is not None:
        is_bad = ~np.asarray(is_good(scalars.to_float32(values)))
        if is_bad.any():
            _refuse(op, argument, x, wanted, hint, is_bad)
    x = scalars.as_float32(x)
    return scalars.as_scalar(x) if is_number else x


def _refuse(
    op: str, argument: str, x: Any, wanted: str, hint: str, is_bad: np.ndarray | None = None
) -> NoReturn:
    """Raises the error, with the value if it can be read; of an array, with the first bad one."""
    is_array = scalars.is_array(x)
    got = scalars.show(x) if scalars.is_real(x) else describe(x)
    if isinstance(x, jax.core.Tracer):
        got += ", traced"
    elif is_array and scalars.is_real(x) and (values := scalars.host_values(x)) is not None:
        if values.ndim == 0:
            got += f" {values}"
        elif is_bad is not None:
            index = int(np.flatnonzero(is_bad)[0])
            got = f"{values[index]} at index {index} of {got}"
    require(False, op, argument, got=got, wanted=wanted, hint=hint)
    raise AssertionError("require(False, ...) raises")
