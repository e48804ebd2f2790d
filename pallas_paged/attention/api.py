# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The public attention ops: their signatures, docstrings, checks and dispatch. No kernel code."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged import checks, dispatch, forms, settings, transforms
from pallas_paged.attention import arguments, oracle
from pallas_paged.attention.arguments import AttentionConfig
from pallas_paged.attention.gpu import launch as mosaic_gpu
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from pallas_paged.attention.tpu import launch as mosaic_tpu
from pallas_paged.attention.xla import launch as xla
from pallas_paged.dispatch import Backend
from pallas_paged.kv_write import api as kv_write

_KERNELS: dict[str, tuple[Any, Any]] = {
    "mosaic_tpu": (mosaic_tpu, mosaic_tpu.TpuAttentionConfig),
    "mosaic_gpu": (mosaic_gpu, mosaic_gpu.GpuAttentionConfig),
}

_OP = "ragged_paged_attention"
# A mask value below this one leaves a score no weight in float32.
_LEAVES_OUT = -1e9


def ragged_paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    sm_scale: jax.Array | float | None = 1.0,
    causal: bool = True,
    sliding_window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    sinks: jax.Array | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    config: AttentionConfig | None = None,
    backend: Backend = "auto",
    num_kv_pages_per_block: None = None,
    num_queries_per_block: None = None,
    vmem_limit_bytes: None = None,
) -> jax.Array | Any:  # with return_lse a tuple; Any, so that callers need no cast
    """Attention of new tokens over the pages of their sequences, prefill and decode in one batch.

    The queries of sequence s are rows `cu_q_lens[s] .. cu_q_lens[s + 1]` of the packed batch. They
    belong to the last of the sequence's `kv_lens[s]` tokens, whose keys and values are all in the
    pool already. Query head n reads KV head `n // (N // K)`. The score of a query at position i and
    a key at position j is `q . k * sm_scale`; a soft cap makes it
    `soft_cap * tanh(score / soft_cap)`. The key counts if `j <= i` (with `causal`) and if
    `j > i - sliding_window` (with a window). Accumulator, maximum and sum are float32.

    Args:
      q: [T, N, H], float32, bfloat16 or float16.
      kv_pages: [P, page_size, R, C], the pool, which is only read; or [P, page_size, R / p, p, C],
        as in `page_write`. Rows and pages that no sequence uses may hold anything, NaN included.
        The values V of a sequence's own tokens should be finite: in a prefill all backends but the
        oracle may pass a NaN on to earlier rows that do not see its token.
      kv_lens: int32[S], the number of tokens of each sequence, the new ones included.
      page_indices: int32[S, M] or int32[S * M], the page table. Entry m of a row is the page that
        holds positions `m * page_size .. (m + 1) * page_size` of the sequence. Entries after a
        sequence's last token may hold anything.
      cu_q_lens: int32[S + 1], the prefix sums of the numbers of new tokens.
      num_seqs: int32[1], int32[] or an int, how many of the S rows are sequences.
      sm_scale: the factor on `q . k`, a finite number, which may be traced. None means `H ** -0.5`,
        the usual one. The default is 1, as in JAX's own TPU kernel. On a GPU a number that is known
        to be above 0 when the call is traced is the fastest: without that a prefill takes 4 to 10%
        longer.
      causal: whether a query only sees keys up to its own position.
      sliding_window: how many keys a query looks back on, its own included. None sets no limit. It
        is an int >= 1, or an integer scalar that may be traced. An int that is too large for int32
        sets no limit either. A traced one sets none if it is at least kv_len, for example the
        largest int32; if it is below 1, a causal query sees no key, and its row is 0.
      soft_cap: the bound on the scores, a static number > 0; None sets no bound.
      mask_value: a static number that is added to the scores of keys that the mask hides; None or
        -inf leaves those keys out.
      k_scale, v_scale: what the stored values of an fp8 or int8 pool are multiplied by: a number or
        float32[K], > 0. None means 1.
      sinks: [N], float32 or another float dtype: one more score per head, which takes its share of
        the softmax and has no value. It is -inf for a head without a sink.
      num_heads: N, an int, where q has more heads, as a packed QKV has: its first N heads are the
        queries. On a GPU the kernels read them where they are; elsewhere they are copied out of it.
        None means all heads of q.
      num_kv_heads: K, an int. None takes it from the pool, if there is one K only that divides N
        and makes a pool of R rows (see `make_kv_pages`). With 12 query heads and R = 8 in bfloat16,
        for example, K may be 3 or 4, and has to be given.
      max_seqlen_q: a promise that no sequence has more new tokens than this static int. With 1, as
        in a step of decodes, a GPU runs no prefill kernel. The rows of a sequence that has more are
        NaN if a kernel was left out. None promises nothing.
      return_lse: whether to return the log-sum-exp too.
      config: the kernel's block sizes, a `TpuAttentionConfig` or a `GpuAttentionConfig`, whichever
        belongs to the backend that runs. None lets the kernel choose.
      backend: "auto", "oracle", "xla", "mosaic_tpu" or "mosaic_gpu", as in `page_write`.
      num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes: leave these out. JAX's own
        TPU kernel has them; here `config` takes their place, and they must be None.

    A number may be Python's, numpy's or jax's, and a scalar may have the shape [1]. Its value is
    checked, unless it is traced or lies on an accelerator, because no call waits for an accelerator
    to check a value. Only a static argument is read from there.

    Returns:
      the output, q's dtype [T, N, H]. With `return_lse` also the log-sum-exp, f32[T, N]: the
      natural logarithm of the sum of the exponentials of the scores, the sink included. A row
      without work, of no sequence or of one with kv_len 0, is 0, and its log-sum-exp is -inf.

    Raises:
      ValueError: an argument has the wrong form.
      NotImplementedError: the named backend cannot run this call.

    In this example a sequence has 3 tokens in pages 2 and 0, of 2 tokens each, and the last two are
    new. All keys are equal, so a query averages the values that it sees:

    >>> import jax.numpy as jnp
    >>> import pallas_paged
    >>> pool = pallas_paged.make_kv_pages(3, 2, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> pool = pool.at[2, :, 1].set(jnp.array([[3.0], [5.0]])).at[0, 0, 1].set(10.0)  # V
    >>> out = ragged_paged_attention(
    ...     jnp.ones((2, 1, 128)), pool, jnp.array([3], jnp.int32), jnp.array([[2, 0]], jnp.int32),
    ...     jnp.array([0, 2], jnp.int32), jnp.array([1], jnp.int32))
    >>> out[:, 0, 0].tolist()
    [4.0, 6.0]
    """
    arguments.refuse_block_sizes(
        _OP, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes
    )
    pool = forms.pool_in_rows(_OP, kv_pages)
    queries = arguments.queries_in(_OP, q, num_heads)
    num_kv_heads = arguments.check_arrays(_OP, queries, pool, num_kv_heads)
    forms.require_rows(_OP, kv_pages, num_kv_heads, q.shape[2])
    batch = Batch(*forms.require_batch(_OP, kv_lens, page_indices, cu_q_lens, num_seqs))
    k_scale = checks.require_scale(_OP, "k_scale", k_scale, num_kv_heads, pool)
    v_scale = checks.require_scale(_OP, "v_scale", v_scale, num_kv_heads, pool)
    factors, options = arguments.make_options(
        _OP,
        queries,
        num_kv_heads,
        sm_scale=sm_scale,
        causal=causal,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=sinks,
        return_lse=return_lse,
        max_seqlen_q=max_seqlen_q,
        config=config,
    )
    chosen, spec = dispatch.choose(
        _OP, backend, lambda name: _plan(name, queries, pool, batch, factors, options, config)
    )
    q = _unpacked(q, queries.shape[1], chosen)
    out, lse = _attention(
        q,
        kv_pages,
        batch,
        factors,
        options=options,
        spec=spec,
        backend=chosen,
        is_auto=backend == "auto",
    )
    return (out, lse) if options.return_lse else out


def write_and_attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    sm_scale: jax.Array | float | None = 1.0,
    causal: bool = True,
    sliding_window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    sinks: jax.Array | None = None,
    num_kv_heads: int | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    config: AttentionConfig | None = None,
    backend: Backend = "auto",
    num_kv_pages_per_block: None = None,
    num_queries_per_block: None = None,
    vmem_limit_bytes: None = None,
) -> tuple[jax.Array, ...]:
    """Writes a batch's new keys and values into its pages, then attends over the pages.

    The new tokens of sequence s are rows `cu_q_lens[s] .. cu_q_lens[s + 1]` of q, k and v, and the
    last of its `kv_lens[s]` tokens. No sequence may read a page that another one writes in the same
    call.

    On a TPU this is one kernel, which does not read back the pages that it fills, if VMEM has room
    for the new tokens; the support matrix says for how many it has. Else, and on other backends,
    the two ops run one after the other.

    Args:
      q: [T, N, H], as in `ragged_paged_attention`.
      k, v: [T, K, H] or [T, K*H], as in `page_write`. None for both if q is a packed QKV, as one
        product yields it: [T, N + 2K, H], the heads of the queries, the keys and the values. On a
        GPU the kernels read it where it is.
      kv_pages: the pool, as in `page_write`, which is donated.
      kv_lens, page_indices, cu_q_lens, num_seqs: as in `ragged_paged_attention`.
      sm_scale, causal, sliding_window, soft_cap, mask_value, sinks: as there.
      k_scale, v_scale: as there; new keys and values are divided by them as they are written.
      num_kv_heads: K, an int. None takes it from k and from the H of q; a packed QKV needs it.
      max_seqlen_q, return_lse, config, backend: as there.
      num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes: leave these out, as there.

    Returns:
      `(out, kv_pages)`, and with `return_lse` `(out, kv_pages, lse)`.

    Raises:
      ValueError: an argument has the wrong form.
      NotImplementedError: the named backend cannot run this call.

    In this example a sequence has 2 tokens, both new, in page 1. All keys are equal, so the second
    query averages the two values:

    >>> import jax.numpy as jnp
    >>> import pallas_paged
    >>> pool = pallas_paged.make_kv_pages(3, 2, num_kv_heads=1, head_dim=128, dtype=jnp.float32)
    >>> v = jnp.array([3.0, 5.0])[:, None, None] * jnp.ones((2, 1, 128))
    >>> out, pool = write_and_attend(
    ...     jnp.ones((2, 1, 128)), jnp.ones((2, 1, 128)), v, pool, jnp.array([2], jnp.int32),
    ...     jnp.array([[1]], jnp.int32), jnp.array([0, 2], jnp.int32), jnp.array([1], jnp.int32))
    >>> out[:, 0, 0].tolist(), pool[1, :, 1, 0].tolist()
    ([3.0, 4.0], [3.0, 5.0])
    """
    op = "write_and_attend"
    arguments.refuse_block_sizes(
        op, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes
    )
    queries, new = arguments.queries_and_keys(op, q, k, v, num_kv_heads)
    if num_kv_heads is None:
        num_kv_heads = arguments.heads_of_new(op, q, new)
    pool = forms.pool_in_rows(op, kv_pages)
    num_kv_heads = arguments.check_arrays(op, queries, pool, num_kv_heads)
    heads, head_dim, k_scale, v_scale = checks.require_write(
        op, pool, new, new if k is None else v, k_scale, v_scale, num_kv_heads
    )
    forms.require_rows(op, kv_pages, heads, head_dim)
    checks.require(
        (new.shape[0], head_dim) == (q.shape[0], q.shape[2]),
        op,
        "k",
        got=f"{checks.describe(new)} ({heads} heads of {head_dim})",
        wanted=f"{q.shape[0]} tokens and heads of {q.shape[2]}, as q {checks.describe(q)}",
        hint="q, k and v are of the same tokens",
    )
    batch = Batch(*forms.require_batch(op, kv_lens, page_indices, cu_q_lens, num_seqs))
    factors, options = arguments.make_options(
        op,
        queries,
        num_kv_heads,
        sm_scale=sm_scale,
        causal=causal,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=sinks,
        return_lse=return_lse,
        max_seqlen_q=max_seqlen_q,
        config=config,
    )
    chosen, spec = dispatch.choose(
        op, backend, lambda name: _plan(name, queries, pool, batch, factors, options, config, new)
    )
    if k is None and (chosen != "mosaic_gpu" or q.shape[0] == 0):
        q, k, v = jnp.split(q, [queries.shape[1], queries.shape[1] + num_kv_heads], axis=1)
    out, lse, kv_pages = _write_and_attend(
        q,
        k,
        v,
        kv_pages,
        batch,
        factors,
        options=options,
        spec=spec,
        backend=chosen,
        is_auto=backend == "auto",
    )
    return (out, kv_pages, lse) if options.return_lse else (out, kv_pages)


def _unpacked(q: jax.Array, num_heads: int, backend: str) -> jax.Array:
    """The queries in a packed QKV, unless the backend reads them where they are."""
    reads_packed = backend == "mosaic_gpu" and q.shape[0] > 0
    return q if reads_packed or q.shape[1] == num_heads else q[:, :num_heads]


def _plan(
    backend: str,
    q: jax.Array,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
    options: AttentionOptions,
    config: AttentionConfig | None,
    k: jax.Array | None = None,
) -> dispatch.Plan:
    """What a backend would run for a call, which also writes new keys if `k` is given."""
    if options.mask_value is not None and options.mask_value > _LEAVES_OUT:
        return dispatch.Plan(
            refusal=f"mask_value {options.mask_value} would let hidden keys count, and their pages "
            "may not be there; the kernel leaves them out: pass None or a number below "
            f"{_LEAVES_OUT:.0e}"
        )
    if backend == "xla":  # it has no block sizes to choose
        return xla.plan(q, kv_pages, batch.page_indices, options, factors.sm_scale)
    kernels, config_type = _KERNELS[backend]
    if config is not None and not isinstance(config, config_type):
        return dispatch.Plan(
            refusal=f"its block sizes are a {config_type.__name__}, and config is {config!r}"
        )
    return kernels.plan(q, kv_pages, batch.page_indices, options, config, k)


_STATIC = ("options", "spec", "backend", "is_auto")


@settings.independent(checks_nans=True)
@functools.partial(jax.jit, static_argnames=_STATIC)
def _attention(
    q: jax.Array,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
    *,
    options: AttentionOptions,
    spec: Any,
    backend: str,
    is_auto: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the chosen backend; returns the output and the log-sum-exp."""
    q, kv_pages, batch, factors = transforms.refuse_transforms(_OP, (q, kv_pages, batch, factors))
    q = dispatch.require_lowering(_OP, backend, is_auto, q)
    if q.shape[0] == 0:
        return _no_rows(q)
    kv_pages = forms.merge_rows(kv_pages)
    if backend == "oracle":
        return oracle.attend(q, kv_pages, batch, factors, options)
    if backend == "xla":
        return xla.attend(spec, q, kv_pages, batch, factors)
    kernels, _ = _KERNELS[backend]
    out, lse, _ = kernels.attend(spec, q, None, kv_pages, batch, factors)
    return out, lse


@settings.independent()
@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="kv_pages")
def _write_and_attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_pages: jax.Array,
    batch: Batch,
    factors: Factors,
    *,
    options: AttentionOptions,
    spec: Any,
    backend: str,
    is_auto: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Runs one kernel if there is one, else the two ops; returns output, log-sum-exp and pool."""
    op = "write_and_attend"
    q, k, v, kv_pages, batch, factors = transforms.refuse_transforms(
        op, (q, k, v, kv_pages, batch, factors)
    )
    q = dispatch.require_lowering(op, backend, is_auto, q)
    if q.shape[0] == 0:
        return *_no_rows(q), kv_pages
    if backend == "mosaic_tpu" and spec.writes:
        out, lse, pool = mosaic_tpu.attend(
            spec, q, (k, v), forms.merge_rows(kv_pages), batch, factors
        )
        return out, lse, forms.split_rows(pool, kv_pages)
    indices = kv_write.write_indices(
        batch.page_indices,
        batch.kv_lens,
        batch.cu_q_lens,
        batch.num_seqs,
        kv_pages.shape[1],
        num_tokens=q.shape[0],
    )
    write: dict[str, Any] = {
        "k_scale": factors.k_scale,
        "v_scale": factors.v_scale,
        "num_kv_heads": options.num_kv_heads,
        "backend": backend,
    }
    k = q if k is None else k
    if backend in ("mosaic_gpu", "xla"):  # there one launch is as fast as writing whole pages
        kv_pages = kv_write.token_write(kv_pages, k, v, indices.slots, **write)
    else:
        kv_pages = kv_write.page_write(
            kv_pages, k, v, indices.page_ids, indices.token_starts, **write
        )
        kv_pages = kv_write.slice_write(kv_pages, k, v, indices.slices, indices.num_slices, **write)
    out, lse = _attention(
        q, kv_pages, batch, factors, options=options, spec=spec, backend=backend, is_auto=False
    )
    return out, lse, kv_pages


def _no_rows(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp of a batch without a token, for which nothing is launched."""
    return q, jnp.zeros_like(q[..., 0], jnp.float32)
