# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Checks of the attention's arguments, from which its options are made."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged import checks, layout
from pallas_paged.attention.gpu.config import GpuAttentionConfig
from pallas_paged.attention.options import AttentionOptions, Factors
from pallas_paged.attention.tpu.config import TpuAttentionConfig

AttentionConfig = TpuAttentionConfig | GpuAttentionConfig


def refuse_block_sizes(
    op: str, num_kv_pages_per_block: Any, num_queries_per_block: Any, vmem_limit_bytes: Any
) -> None:
    """Refuses keywords of JAX's own TPU kernel, which are fields of a kernel's config here."""
    for name, value in (
        ("num_kv_pages_per_block", num_kv_pages_per_block),
        ("num_queries_per_block", num_queries_per_block),
        ("vmem_limit_bytes", vmem_limit_bytes),
    ):
        checks.require(
            value is None,
            op,
            name,
            got=checks.describe(value),
            wanted="None",
            hint="leave it out, and the kernel chooses its blocks and its memory; or pass config="
            " with the backend's block sizes",
        )


def heads_of_new(op: str, q: jax.Array, k: jax.Array) -> int | None:
    """K from the shape of k: a dimension of it, or its width over q's H; None if k says nothing."""
    for name, x in (("q", q), ("k", k)):
        checks.require_array(op, name, x)
    if k.ndim == 3:
        return k.shape[1]
    if k.ndim != 2 or q.ndim != 3 or 0 in (k.shape[1], q.shape[2]):
        return None
    checks.require(
        k.shape[1] % q.shape[2] == 0,
        op,
        "k",
        got=checks.describe(k),
        wanted=f"[T, K*H] with the H = {q.shape[2]} of q",
        hint="q, k and v are of the same tokens, and their heads of the same size",
    )
    return k.shape[1] // q.shape[2]


def queries_in(op: str, q: Any, num_heads: Any) -> Any:
    """The type of the first `num_heads` heads of q, or q itself if that is None."""
    if num_heads is None:
        return q
    checks.require_array(op, "q", q)
    count = checks.require_heads(op, num_heads, "a static count of query heads", "num_heads")
    checks.require(
        q.ndim == 3 and q.shape[1] >= count,
        op,
        "num_heads",
        got=count,
        wanted=f"at most the heads of q {checks.describe(q)}, [T, N or more, H]",
        hint="leave it out if all heads of q are queries",
    )
    return jax.ShapeDtypeStruct((q.shape[0], count, q.shape[2]), q.dtype)


def queries_and_keys(op: str, q: Any, k: Any, v: Any, num_kv_heads: Any) -> tuple[Any, Any]:
    """q and k, or the types of both in a packed QKV, [T, N + 2K, H], where k and v are None."""
    checks.require(
        (k is None) == (v is None),
        op,
        "v",
        got=checks.describe(v),
        wanted="None, as k is" if k is None else f"{checks.describe(k)}, as k",
        hint="pass both k and v, or neither and a packed QKV as q",
    )
    if k is not None:
        return q, k
    keys = checks.require_packed(op, "q", q, num_kv_heads)
    num_tokens, num_kv_heads, head_dim = keys.shape
    num_heads = q.shape[1] - 2 * num_kv_heads
    checks.require(
        num_heads >= 1,
        op,
        "q",
        got=checks.describe(q),
        wanted=f"[T, N + 2K, H] with N >= 1 heads beside 2 * {num_kv_heads}, because k is None",
        hint="pass k and v, or the packed QKV",
    )
    return jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), q.dtype), keys


def check_arrays(op: str, q: jax.Array, kv_pages: jax.Array, num_kv_heads: int | None) -> int:
    """Checks q against the pool, of four dimensions, and returns K."""
    checks.require_pool(op, kv_pages)
    checks.require_array(op, "q", q)
    checks.require(
        q.dtype in (jnp.float32, jnp.bfloat16, jnp.float16),
        op,
        "q",
        got=checks.describe(q),
        wanted="float32, bfloat16 or float16",
        hint="queries are not quantised: leave them in the model's dtype",
    )
    checks.require(
        q.ndim == 3 and 0 not in q.shape[1:],
        op,
        "q",
        got=checks.describe(q),
        wanted="[T, N, H]",
        hint="pack the batch's tokens into one leading dimension",
    )
    num_heads, head_dim = q.shape[1:]
    num_rows, num_lanes = kv_pages.shape[2:]
    checks.require(
        layout.num_lanes(head_dim) == num_lanes,
        op,
        "q",
        got=f"{checks.describe(q)} (head_dim {head_dim})",
        wanted=f"a head_dim whose pool has C = {num_lanes}, as kv_pages"
        f" {checks.describe(kv_pages)}",
        hint=f"a pool for this head_dim has C = {layout.num_lanes(head_dim)}",
    )
    if num_kv_heads is None:
        return checks.heads_of_pool(op, kv_pages, num_heads, head_dim)
    hint = "pass the number of KV heads that the pool was made for"
    num_kv_heads = checks.require_heads(op, num_kv_heads, hint)
    checks.require(
        layout.num_rows_used(num_kv_heads, head_dim) <= num_rows,
        op,
        "num_kv_heads",
        got=num_kv_heads,
        wanted=f"an int >= 1 whose rows fit the R = {num_rows} of kv_pages"
        f" {checks.describe(kv_pages)}",
        hint=hint,
    )
    checks.require(
        num_heads % num_kv_heads == 0,
        op,
        "q",
        got=f"{checks.describe(q)} ({num_heads} query heads)",
        wanted=f"a multiple of the {num_kv_heads} KV heads",
        hint="every KV head serves the same number of query heads",
    )
    return num_kv_heads


def make_options(
    op: str,
    q: jax.Array,
    num_kv_heads: int,
    *,
    sm_scale: Any,
    causal: Any,
    sliding_window: Any,
    soft_cap: Any,
    mask_value: Any,
    k_scale: Any,
    v_scale: Any,
    sinks: Any,
    return_lse: Any,
    max_seqlen_q: Any,
    config: Any,
) -> tuple[Factors, AttentionOptions]:
    """Checks all options but the scales, which are checked already; returns them as two objects."""
    checks.require(
        config is None or isinstance(config, AttentionConfig),
        op,
        "config",
        got=checks.describe(config),
        wanted="None or the block sizes of an attention",
        hint="pass a pallas_paged.TpuAttentionConfig or a pallas_paged.GpuAttentionConfig",
    )
    num_heads, head_dim = q.shape[1:]
    factors = Factors(
        sm_scale=checks.require_sm_scale(op, sm_scale, head_dim),
        sliding_window=checks.require_window(op, sliding_window),
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=checks.require_sinks(op, sinks, num_heads),
    )
    options = AttentionOptions(
        num_kv_heads=num_kv_heads,
        causal=checks.require_bool(op, "causal", causal),
        soft_cap=checks.require_soft_cap(op, soft_cap),
        mask_value=checks.require_mask_value(op, mask_value),
        return_lse=checks.require_bool(op, "return_lse", return_lse),
        max_seqlen_q=checks.require_max_seqlen_q(op, max_seqlen_q),
        has_window=factors.sliding_window is not None,
        has_scales=factors.has_scales,
        has_sinks=factors.sinks is not None,
        is_scale_positive=_is_positive(factors.sm_scale),
    )
    return factors, options


def _is_positive(sm_scale: jax.Array | np.number) -> bool:
    """Whether a factor is known to be above 0, also on a chip that turns subnormal numbers to 0."""
    return isinstance(sm_scale, np.number) and bool(sm_scale >= np.finfo(np.float32).tiny)
