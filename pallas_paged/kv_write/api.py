# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The public writes: signatures, docstrings, checks and dispatch. No kernel code.

Every op takes the pool, donates it, and returns it updated in place. An entry that is out of range
anywhere (its page or slot outside the pool, -1 included, or its source outside the batch) is
skipped whole; nothing is clamped. Two entries for one slot: either may win, on a GPU each in a part
(`validate` refuses).
"""

import functools

import jax

from pallas_paged import checks, dispatch, settings
from pallas_paged.dispatch import Backend
from pallas_paged.kv_write import oracle
from pallas_paged.kv_write.gpu import launch as mosaic_gpu
from pallas_paged.kv_write.indices import WriteIndices, write_indices
from pallas_paged.kv_write.tpu import launch as mosaic_tpu

__all__ = [
    "WriteIndices",
    "copy_pages",
    "page_write",
    "slice_write",
    "token_write",
    "write_indices",
]

Config = mosaic_tpu.TpuWriteConfig | mosaic_gpu.GpuWriteConfig
_KERNELS = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}
_CONFIGS = {"mosaic_tpu": mosaic_tpu.TpuWriteConfig, "mosaic_gpu": mosaic_gpu.GpuWriteConfig}


def page_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_ids: jax.Array,
    token_starts: jax.Array | None = None,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    num_kv_heads: int | None = None,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Writes whole pages: page `page_ids[i]` gets tokens `token_starts[i] .. + page_size`.

    Args:
      kv_pages: [P, page_size, R, C], the pool; donated.
      k, v: [T, K, H] or [T, K*H], float32 or bfloat16 (float16 on a GPU and in the oracle), any T;
        or the dtype of an 8-bit pool, which are stored as they are, whatever the scales.
      page_ids: int32[n]; -1 skips.
      token_starts: int32[n], the first token of each page in the packed batch, in any order (in
        ascending order the batch is read once); None means `i * page_size`.
      k_scale, v_scale: a number or float32[K], for fp8 and int8 pools: the pool stores
        `x / scale` (rounding: `kv_write.oracle.quantize`). None means 1. Any float dtype, taken as
        float32; [1] is a number too. Each is > 0 and has an inverse in float32, which is checked
        unless it is traced or lies on an accelerator.
      num_kv_heads: K, an int; needed where k is [T, K*H], unless one K alone makes such a pool of
        k's width (of 128 lanes hardly ever: R rows are R/2 heads of 128 or R heads of 64).
      config: block sizes of the kernel, the Config of the backend that runs; None lets it choose.
      backend: "auto", "oracle", "mosaic_tpu" or "mosaic_gpu".

    Returns:
      the pool, [P, page_size, R, C].

    Raises:
      ValueError: an argument has the wrong form.
      NotImplementedError: the named backend cannot run this call.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import make_kv_pages, page_write
    >>> pool = make_kv_pages(4, 2, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> k = jnp.arange(1.0, 6.0)[:, None, None] * jnp.ones((5, 1, 128))  # 5 tokens
    >>> starts = jnp.array([1, 3], jnp.int32)  # tokens 1 and 2, tokens 3 and 4
    >>> pool = page_write(pool, k, -k, jnp.array([3, 0], jnp.int32), starts)
    >>> pool[:, :, :2, 0].tolist()  # K and V of both rows of each page
    ... # doctest: +NORMALIZE_WHITESPACE
    [[[4.0, -4.0], [5.0, -5.0]], [[0.0, 0.0], [0.0, 0.0]],
     [[0.0, 0.0], [0.0, 0.0]], [[2.0, -2.0], [3.0, -3.0]]]
    """
    op = "page_write"
    heads, head_dim, k_scale, v_scale = checks.require_write(
        op, kv_pages, k, v, k_scale, v_scale, num_kv_heads
    )
    checks.require_int32(op, "page_ids", page_ids, 1, "[n]")
    if token_starts is not None:
        _require_same_form(op, "token_starts", token_starts, "page_ids", page_ids)
    chosen = _choose(op, backend, kv_pages, k, heads, head_dim, config)
    return _page_write(
        kv_pages,
        k,
        v,
        page_ids,
        token_starts,
        k_scale,
        v_scale,
        heads,
        config,
        chosen,
        backend == "auto",
    )


def slice_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slices: jax.Array,
    num_slices: jax.Array,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    num_kv_heads: int | None = None,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Writes runs of tokens, each inside one page.

    Args:
      kv_pages: [P, page_size, R, C], the pool; donated.
      k, v: [T, K, H] or [T, K*H], float32 or bfloat16 (float16 on a GPU and in the oracle), any T;
        or the dtype of an 8-bit pool, which are stored as they are, whatever the scales.
      slices: int32[3, max_slices], rows: first slot (`page * page_size + row`), first token,
        length. A slice whose length is below 1 or that would leave its page is skipped. Any order
        of the tokens is right; in ascending order the batch is read once.
      num_slices: int32[1], how many of the columns are slices; clamped to [0, max_slices].
      k_scale, v_scale, num_kv_heads, config, backend: as in `page_write`.

    Returns:
      the pool, [P, page_size, R, C].

    Raises:
      ValueError: an argument has the wrong form.
      NotImplementedError: the named backend cannot run this call.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import make_kv_pages, slice_write
    >>> pool = make_kv_pages(2, 4, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> k = jnp.arange(1.0, 6.0)[:, None, None] * jnp.ones((5, 1, 128))
    >>> slices = jnp.array([[2, 5], [0, 3], [2, 1]], jnp.int32)
    >>> pool = slice_write(pool, k, -k, slices, jnp.array([2], jnp.int32))
    >>> pool[:, :, 0, 0].tolist()
    [[0.0, 0.0, 1.0, 2.0], [0.0, 4.0, 0.0, 0.0]]
    """
    op = "slice_write"
    heads, head_dim, k_scale, v_scale = checks.require_write(
        op, kv_pages, k, v, k_scale, v_scale, num_kv_heads
    )
    checks.require_int32(op, "slices", slices, 2, "[3, max_slices]")
    checks.require(
        slices.shape[0] == 3,
        op,
        "slices",
        got=checks.describe(slices),
        wanted="int32[3, max_slices]",
        hint="rows are first slot, first token, length",
    )
    checks.require_int32(op, "num_slices", num_slices, 1, "[1]")
    checks.require(
        num_slices.shape == (1,),
        op,
        "num_slices",
        got=checks.describe(num_slices),
        wanted="int32[1]",
        hint="it counts the columns of slices that are in use",
    )
    chosen = _choose(op, backend, kv_pages, k, heads, head_dim, config)
    return _slice_write(
        kv_pages,
        k,
        v,
        slices,
        num_slices,
        k_scale,
        v_scale,
        heads,
        config,
        chosen,
        backend == "auto",
    )


def token_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    num_kv_heads: int | None = None,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Writes token by token: slot `slots[t]` (`page * page_size + row`) gets token t.

    Args:
      kv_pages: [P, page_size, R, C], the pool; donated.
      k, v: [T, K, H] or [T, K*H], float32 or bfloat16 (float16 on a GPU and in the oracle), any T;
        or the dtype of an 8-bit pool, which are stored as they are, whatever the scales.
      slots: int32[T]; -1 skips.
      k_scale, v_scale, num_kv_heads, config, backend: as in `page_write`.

    Returns:
      the pool, [P, page_size, R, C].

    Raises:
      ValueError: an argument has the wrong form.
      NotImplementedError: the named backend cannot run this call.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import make_kv_pages, token_write
    >>> pool = make_kv_pages(2, 2, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> k = jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((3, 1, 128))
    >>> token_write(pool, k, -k, jnp.array([3, -1, 0], jnp.int32))[:, :, 0, 0].tolist()
    [[3.0, 0.0], [0.0, 1.0]]
    """
    op = "token_write"
    heads, head_dim, k_scale, v_scale = checks.require_write(
        op, kv_pages, k, v, k_scale, v_scale, num_kv_heads
    )
    checks.require_int32(op, "slots", slots, 1, "[T]")
    checks.require(
        slots.shape[0] == k.shape[0],
        op,
        "slots",
        got=checks.describe(slots),
        wanted=f"int32[{k.shape[0]}]",
        hint=f"one slot for each token of k {checks.describe(k)}; -1 skips one",
    )
    chosen = _choose(op, backend, kv_pages, k, heads, head_dim, config)
    return _token_write(
        kv_pages, k, v, slots, k_scale, v_scale, heads, config, chosen, backend == "auto"
    )


def copy_pages(
    kv_pages: jax.Array,
    src_ids: jax.Array,
    dst_ids: jax.Array,
    *,
    config: Config | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Copies pages inside the pool (copy on write): page `dst_ids[i]` gets page `src_ids[i]`.

    Args:
      kv_pages: [P, page_size, R, C], the pool; donated.
      src_ids, dst_ids: int32[n]. A pair with either id outside the pool is skipped. No page may be
        written twice, nor both read and written: the order of the copies is undefined.
      config: the Config of the backend that runs; of its fields a copy reads `block_tokens`, the
        most tokens of a page that it moves at once. None lets the kernel choose.
      backend: as in `page_write`.

    Returns:
      the pool, [P, page_size, R, C].

    Raises:
      ValueError: an argument has the wrong form.
      NotImplementedError: the named backend cannot run this call.

    >>> import jax.numpy as jnp
    >>> from pallas_paged import copy_pages
    >>> pool = jnp.arange(3.0).reshape(3, 1, 1, 1) * jnp.ones((3, 1, 2, 128))
    >>> copy_pages(pool, jnp.array([2], jnp.int32), jnp.array([0], jnp.int32))[:, 0, 0, 0].tolist()
    [2.0, 1.0, 2.0]
    """
    op = "copy_pages"
    checks.require_pool(op, kv_pages)
    checks.require_int32(op, "src_ids", src_ids, 1, "[n]")
    _require_same_form(op, "dst_ids", dst_ids, "src_ids", src_ids)
    chosen, _ = dispatch.choose(
        op, backend, lambda name: dispatch.Plan(refusal=_KERNELS[name].unsupported_pool(kv_pages))
    )
    _require_config(op, config, chosen)
    return _copy_pages(kv_pages, src_ids, dst_ids, config, chosen, backend == "auto")


def _require_same_form(op, argument, x, other_argument, other):
    checks.require_int32(op, argument, x, 1, "[n]")
    checks.require(
        x.shape == other.shape,
        op,
        argument,
        got=checks.describe(x),
        wanted=f"{checks.describe(other)}, as {other_argument}",
        hint="the two are read in pairs",
    )


def _require_config(op, config, backend):
    """A Config is of the backend that runs; the oracle has none and takes any."""
    configs = (_CONFIGS[backend],) if backend in _CONFIGS else tuple(_CONFIGS.values())
    checks.require(
        config is None or isinstance(config, configs),
        op,
        "config",
        got=checks.describe(config),
        wanted="None or the block sizes of a write",
        hint="pass a " + " or a ".join(f"pallas_paged.{c.__name__}" for c in configs),
    )


def _choose(op, backend, kv_pages, k, num_kv_heads, head_dim, config):
    chosen, _ = dispatch.choose(
        op,
        backend,
        lambda name: dispatch.Plan(
            refusal=_KERNELS[name].unsupported(kv_pages, k, num_kv_heads, head_dim)
        ),
    )
    _require_config(op, config, chosen)
    return chosen


# The jitted halves. The pool alone is donated; what is static is keyed by value.
_jit_write = functools.partial(
    jax.jit,
    static_argnames=("num_kv_heads", "config", "backend", "is_auto"),
    donate_argnames="kv_pages",
)
_independent = settings.independent()


@_independent
@_jit_write
def _page_write(
    kv_pages,
    k,
    v,
    page_ids,
    token_starts,
    k_scale,
    v_scale,
    num_kv_heads,
    config,
    backend,
    is_auto,
):
    kv_pages, k, v, page_ids, token_starts, k_scale, v_scale = checks.refuse_transforms(
        "page_write", (kv_pages, k, v, page_ids, token_starts, k_scale, v_scale)
    )
    kv_pages = dispatch.require_lowering("page_write", backend, is_auto, kv_pages)
    scales = {"k_scale": k_scale, "v_scale": v_scale, "num_kv_heads": num_kv_heads}
    if backend == "oracle":
        return oracle.page_write(kv_pages, k, v, page_ids, token_starts, **scales)
    return _KERNELS[backend].page_write(
        kv_pages, k, v, page_ids, token_starts, **scales, config=config
    )


@_independent
@_jit_write
def _slice_write(
    kv_pages,
    k,
    v,
    slices,
    num_slices,
    k_scale,
    v_scale,
    num_kv_heads,
    config,
    backend,
    is_auto,
):
    kv_pages, k, v, slices, num_slices, k_scale, v_scale = checks.refuse_transforms(
        "slice_write", (kv_pages, k, v, slices, num_slices, k_scale, v_scale)
    )
    kv_pages = dispatch.require_lowering("slice_write", backend, is_auto, kv_pages)
    scales = {"k_scale": k_scale, "v_scale": v_scale, "num_kv_heads": num_kv_heads}
    if backend == "oracle":
        return oracle.slice_write(kv_pages, k, v, slices, num_slices, **scales)
    return _KERNELS[backend].slice_write(
        kv_pages, k, v, slices, num_slices, **scales, config=config
    )


@_independent
@_jit_write
def _token_write(kv_pages, k, v, slots, k_scale, v_scale, num_kv_heads, config, backend, is_auto):
    kv_pages, k, v, slots, k_scale, v_scale = checks.refuse_transforms(
        "token_write", (kv_pages, k, v, slots, k_scale, v_scale)
    )
    kv_pages = dispatch.require_lowering("token_write", backend, is_auto, kv_pages)
    scales = {"k_scale": k_scale, "v_scale": v_scale, "num_kv_heads": num_kv_heads}
    if backend == "oracle":
        return oracle.token_write(kv_pages, k, v, slots, **scales)
    return _KERNELS[backend].token_write(kv_pages, k, v, slots, **scales, config=config)


@_independent
@functools.partial(
    jax.jit, static_argnames=("config", "backend", "is_auto"), donate_argnames="kv_pages"
)
def _copy_pages(kv_pages, src_ids, dst_ids, config, backend, is_auto):
    kv_pages, src_ids, dst_ids = checks.refuse_transforms(
        "copy_pages", (kv_pages, src_ids, dst_ids)
    )
    kv_pages = dispatch.require_lowering("copy_pages", backend, is_auto, kv_pages)
    if backend == "oracle":
        return oracle.copy_pages(kv_pages, src_ids, dst_ids)
    return _KERNELS[backend].copy_pages(kv_pages, src_ids, dst_ids, config=config)
