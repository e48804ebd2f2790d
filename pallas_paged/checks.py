# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Static checks shared by the ops: a ValueError names op, argument, what came, what was wanted."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged import layout


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
    """dtype[shape] of an array, or the value itself.

    >>> describe(jnp.zeros((2, 3)))
    'float32[2,3]'
    """
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"{x!r} of type {type(x).__name__}"


def require_array(op: str, argument: str, x: Any) -> None:
    """Refuses what is no array (lists, None, Python numbers)."""
    require(
        hasattr(x, "shape") and hasattr(x, "dtype"),
        op,
        argument,
        got=describe(x),
        wanted="an array",
        hint="pass it through jnp.asarray with the dtype that the op takes",
    )


def require_int32(op: str, argument: str, x: Any, ndim: int, shape: str) -> None:
    """Refuses anything but int32 of `ndim` dimensions (no silent cast: int64 ids would wrap)."""
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
    """Refuses what `make_kv_pages` or a caller's own pool of that form could not be."""
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
        hint="a slot is an int32: use fewer pages or several pools",
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
            require(
                num_lanes > layout.LANES and num_rows % 2 == 0,
                op,
                "num_kv_heads",
                got=None,
                wanted="the number of KV heads where k is [T, K*H] and C is 128",
                hint="R rows of 128 lanes are R/2 heads of 128 or R heads of 64: say which",
            )
            num_kv_heads = num_rows // 2
        require(
            num_kv_heads >= 1 and k.shape[1] % num_kv_heads == 0,
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


def require_write(
    op: str,
    kv_pages: Any,
    k: Any,
    v: Any,
    k_scale: Any,
    v_scale: Any,
    num_kv_heads: int | None,
) -> tuple[int, int]:
    """Checks what every write shares; returns K and H."""
    require_pool(op, kv_pages)
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
        k.dtype in (jnp.float32, jnp.bfloat16, jnp.float16),
        op,
        "k",
        got=describe(k),
        wanted="float32, bfloat16 or float16",
        hint="the write quantises by itself: pass unquantised k and v with k_scale and v_scale",
    )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require_scale(op, name, scale, heads, kv_pages)
    return heads, head_dim


def require_scale(op: str, argument: str, scale: Any, num_kv_heads: int, kv_pages: Any) -> None:
    """A scale is None, a number, or a float32 array: scalar or one a KV head; 8-bit pools only."""
    if scale is None:
        return
    require(
        layout.is_quantized(kv_pages.dtype),
        op,
        argument,
        got=describe(scale),
        wanted=f"None for a {kv_pages.dtype} pool",
        hint="only fp8 and int8 pools are scaled",
    )
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    require(
        is_number or (hasattr(scale, "shape") and scale.shape in ((), (num_kv_heads,))
                      and jnp.issubdtype(scale.dtype, jnp.floating)),
        op,
        argument,
        got=describe(scale),
        wanted=f"a float or float32[] or float32[{num_kv_heads}]",
        hint="one scale for the tensor or one a KV head",
    )


def refuse_transforms(op: str, arrays: Any) -> Any:
    """Returns `arrays` as they are; differentiating or vmapping through it is a sentence.

    `arrays` is a pytree of all that the op is given: what is left out may lower without a word.
    The rules sit on an identity in front of the op, so that they also hold where the caller's own
    jit stands between the transformation and the op.
    """

    @jax.custom_batching.custom_vmap
    def batched(arrays):
        return arrays

    @batched.def_vmap
    def _refuse_vmap(axis_size, in_batched, arrays):
        del axis_size, in_batched, arrays
        raise NotImplementedError(
            f"{op}: vmap is not supported: the op is batched already; pack the sequences into one "
            "ragged batch and the layers into one flat pool, or call it once after another in "
            "jax.lax.map"
        )

    @jax.custom_jvp
    def differentiated(arrays):
        return batched(arrays)

    @differentiated.defjvp
    def _refuse_jvp(primals, tangents):
        del primals, tangents
        raise NotImplementedError(
            f"{op}: no derivative is defined, it serves inference: keep it out of the function "
            "that is differentiated, or pass jax.lax.stop_gradient of its arguments (of its result "
            "it comes too late)"
        )

    return differentiated(arrays)
