# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The public attention: signature, docstring, checks and dispatch. No kernel code."""

import functools

import jax
import jax.numpy as jnp

from pallas_paged import checks, dispatch, layout
from pallas_paged.dispatch import Backend
from pallas_paged.ragged_paged_attention import oracle

_REASONS = {
    "oracle": None,
    "mosaic_tpu": "the Mosaic TPU attention kernel is not written yet; the oracle runs on a TPU",
    "mosaic_gpu": "the Mosaic GPU attention kernels are not written yet; the oracle runs on a GPU",
}
_OP = "ragged_paged_attention"


def ragged_paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    sm_scale: float = 1.0,
    causal: bool = True,
    sliding_window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    sinks: jax.Array | None = None,
    num_kv_heads: int | None = None,
    return_lse: bool = False,
    config: None = None,
    backend: Backend = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of new tokens over the pages of their sequences, prefill and decode in one batch.

    Sequence s has its queries in rows `cu_q_lens[s] .. cu_q_lens[s + 1]` of the packed batch; they
    are the last of its `kv_lens[s]` tokens, whose keys and values are in the pool already. Query
    head n reads KV head `n // (N // K)`. The score of a query at position i and a key at position
    j is `q . k * sm_scale`, then `soft_cap * tanh(score / soft_cap)`; it counts where `j <= i` (if
    causal) and `j > i - sliding_window`. Accumulation, maximum and sum are float32.

    Args:
      q: [T, N, H], float32, bfloat16 or float16.
      kv_pages: [P, page_size, R, C], the pool; read only. Rows and pages that no sequence uses may
        hold anything, NaN included.
      kv_lens: int32[S], tokens of each sequence, the new ones included.
      page_indices: int32[S, M], page table; entry m of a row holds positions
        `m * page_size .. + page_size`. Entries past a sequence's tokens may hold anything.
      cu_q_lens: int32[S + 1], prefix sums of the new tokens.
      num_seqs: int32[1], how many of the S rows are sequences.
      sm_scale: factor on q . k; the usual one is `H ** -0.5`.
      causal: whether a query sees no later key.
      sliding_window: an int, or an int32 scalar that may be traced: how many keys, its own
        included, a query looks back on. None for all.
      soft_cap: bound on the scores, > 0.
      mask_value: added to the scores of keys that the mask hides; None leaves them out.
      k_scale, v_scale: float32[] or float32[K], for fp8 and int8 pools: what the stored values are
        multiplied by. None means 1.
      sinks: float32[N], one more score per head, which takes its share of the softmax and has no
        value.
      num_kv_heads: K; None means that all rows of the pool are in use.
      return_lse: whether to return the log-sum-exp too.
      config: block sizes of the kernel; no backend takes one yet.
      backend: "auto" or "oracle".

    Returns:
      q's dtype [T, N, H]; with `return_lse` also the natural log of the sum of the exponentials of
      the scores, sinks included, f32[T, N]. Rows without work (of no sequence, or of one with
      kv_len 0) are 0, their log-sum-exp -inf.

    Raises:
      ValueError: an argument has the wrong form.
      NotImplementedError: the named backend cannot run this call.

    One sequence of 3 tokens in pages 2 and 0 (of 2 tokens each); the last two are new. With equal
    keys a query averages the values that it sees:

    >>> pool = layout.make_kv_pages(3, 2, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> pool = pool.at[2, :, 1].set(jnp.array([[3.0], [5.0]])).at[0, 0, 1].set(10.0)  # V
    >>> out = ragged_paged_attention(
    ...     jnp.ones((2, 1, 128)), pool, jnp.array([3], jnp.int32), jnp.array([[2, 0]], jnp.int32),
    ...     jnp.array([0, 2], jnp.int32), jnp.array([1], jnp.int32))
    >>> out[:, 0, 0].tolist()
    [4.0, 6.0]
    """
    num_kv_heads = _check_arrays(q, kv_pages, num_kv_heads)
    _check_metadata(kv_lens, page_indices, cu_q_lens, num_seqs)
    _check_options(q, sliding_window, soft_cap, sinks, config)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        checks.require_scale(_OP, name, scale, num_kv_heads, kv_pages)
    dispatch.choose(_OP, backend, _REASONS)  # the oracle, or a refusal
    out, lse = _attention(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale, sliding_window, k_scale,
        v_scale, sinks, causal=causal, soft_cap=soft_cap, mask_value=mask_value,
        num_kv_heads=num_kv_heads,
    )
    return (out, lse) if return_lse else out


@functools.partial(
    jax.jit, static_argnames=("causal", "soft_cap", "mask_value", "num_kv_heads")
)
def _attention(
    q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale, sliding_window, k_scale,
    v_scale, sinks, *, causal, soft_cap, mask_value, num_kv_heads,
):
    q, kv_pages = checks.refuse_transforms(_OP, (q, kv_pages, kv_lens, page_indices))[:2]
    return oracle.ragged_paged_attention(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=sm_scale, causal=causal,
        sliding_window=sliding_window, soft_cap=soft_cap, mask_value=mask_value, k_scale=k_scale,
        v_scale=v_scale, sinks=sinks, num_kv_heads=num_kv_heads,
    )


def _check_arrays(q, kv_pages, num_kv_heads) -> int:
    """Checks q against the pool and returns K."""
    checks.require_pool(_OP, kv_pages)
    checks.require_array(_OP, "q", q)
    checks.require(
        q.ndim == 3 and 0 not in q.shape[1:]
        and q.dtype in (jnp.float32, jnp.bfloat16, jnp.float16),
        _OP, "q", got=checks.describe(q), wanted="float32, bfloat16 or float16 [T, N, H]",
        hint="pack the batch's tokens into one leading dimension",
    )
    num_heads, head_dim = q.shape[1:]
    num_rows, num_lanes = kv_pages.shape[2:]
    checks.require(
        layout.num_lanes(head_dim) == num_lanes,
        _OP, "q", got=f"{checks.describe(q)} (head_dim {head_dim})",
        wanted=f"a head_dim whose pool has C = {num_lanes}, as kv_pages"
        f" {checks.describe(kv_pages)}",
        hint=f"a pool for this head_dim has C = {layout.num_lanes(head_dim)}",
    )
    if num_kv_heads is None:
        num_kv_heads = num_rows // layout.num_rows_used(1, head_dim)
    checks.require(
        isinstance(num_kv_heads, int) and num_kv_heads >= 1
        and layout.num_rows_used(num_kv_heads, head_dim) <= num_rows,
        _OP, "num_kv_heads", got=num_kv_heads,
        wanted=f"an int >= 1 whose rows fit the R = {num_rows} of kv_pages"
        f" {checks.describe(kv_pages)}",
        hint="pass the number of KV heads that the pool was made for",
    )
    checks.require(
        num_heads % num_kv_heads == 0,
        _OP, "q", got=f"{checks.describe(q)} ({num_heads} query heads)",
        wanted=f"a multiple of the {num_kv_heads} KV heads",
        hint="where not all rows of the pool are in use, pass num_kv_heads",
    )
    return num_kv_heads


def _check_metadata(kv_lens, page_indices, cu_q_lens, num_seqs):
    checks.require_int32(_OP, "kv_lens", kv_lens, 1, "[S]")
    checks.require_int32(_OP, "page_indices", page_indices, 2, "[S, M]")
    checks.require_int32(_OP, "cu_q_lens", cu_q_lens, 1, "[S + 1]")
    checks.require_int32(_OP, "num_seqs", num_seqs, 1, "[1]")
    checks.require(
        0 not in page_indices.shape,
        _OP, "page_indices", got=checks.describe(page_indices), wanted="int32[S, M], neither 0",
        hint="give the table one row per sequence slot and one column per page",
    )
    max_seqs = page_indices.shape[0]
    for name, array, size in (
        ("kv_lens", kv_lens, max_seqs), ("cu_q_lens", cu_q_lens, max_seqs + 1),
        ("num_seqs", num_seqs, 1),
    ):
        checks.require(
            array.shape[0] == size,
            _OP, name, got=checks.describe(array), wanted=f"int32[{size}]",
            hint=f"page_indices {checks.describe(page_indices)} has S = {max_seqs}",
        )


def _check_options(q, sliding_window, soft_cap, sinks, config):
    is_array = hasattr(sliding_window, "dtype")
    checks.require(
        sliding_window is None
        or (is_array and sliding_window.shape == ()
            and jnp.issubdtype(sliding_window.dtype, jnp.integer))
        or (isinstance(sliding_window, int) and sliding_window >= 1),
        _OP, "sliding_window", got=checks.describe(sliding_window),
        wanted="None, an int >= 1 or an int32 scalar",
        hint="a query always sees its own key, so the smallest window is 1",
    )
    checks.require(
        soft_cap is None or soft_cap > 0,
        _OP, "soft_cap", got=soft_cap, wanted="None or a number > 0",
        hint="None turns it off",
    )
    num_heads = q.shape[1]
    checks.require(
        sinks is None or (getattr(sinks, "shape", None) == (num_heads,)
                          and sinks.dtype == jnp.float32),
        _OP, "sinks", got=checks.describe(sinks), wanted=f"None or float32[{num_heads}]",
        hint="one sink per query head",
    )
    checks.require(
        config is None, _OP, "config", got=checks.describe(config), wanted="None",
        hint="no backend of this op takes a config yet",
    )
