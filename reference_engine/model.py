# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A dense decoder of the Llama family over a paged pool.

All layers share one flat pool of L * P pages: layer l has the pages [l*P, (l+1)*P).

The layers are unrolled. A loop over stacked weights would launch the slices of each layer's weights
and metadata, and it could not be replayed as one graph: 64 decodes of Qwen3-0.6B take 4.1 ms on an
H100 in place of 4.8. One layer is a jitted function, which is traced and lowered once for all of
them, so that 28 layers compile in 8 seconds.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

import pallas_paged
from pallas_paged import dispatch, settings
from reference_engine import rope
from reference_engine.batch import Array, Batch, Spec, num_logit_rows, unpack
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.weights import Params

Rotation = tuple[jax.Array, jax.Array]  # cos and sin of the rotary angles, f32[T, H/2] each


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step writes and attends. It is static: each value has a program of its own.

    Attributes:
      kv_write: the form of the writes, see EngineConfig.
      write_backend: the backend of the writes; not read where kv_write is "fused".
      attention_backend: the backend of the attention; with "fused", of the writes too.
      is_decode: whether no sequence has more than one new token, so that a GPU needs no prefill
        kernel.
    """

    kv_write: str
    write_backend: str
    attention_backend: str
    is_decode: bool = False

    @classmethod
    def of(cls, config: EngineConfig, *, is_decode: bool) -> StepOptions:
        """Those of an engine's step."""
        return cls(config.kv_write, config.write_backend, config.attention_backend, is_decode)


def make_pool(config: ModelConfig, num_pages: int, page_size: int) -> jax.Array:
    """An empty pool with `num_pages` pages for each layer, [L*P, page_size, R, C]."""
    return pallas_paged.make_kv_pages(
        config.num_layers * num_pages,
        page_size,
        config.num_kv_heads,
        config.head_dim,
        jnp.dtype(config.dtype),
    )


def forward(
    params: Params,
    kv_pages: jax.Array,
    batch: Batch,
    *,
    config: ModelConfig,
    options: StepOptions,
) -> tuple[jax.Array, jax.Array]:
    """Runs one step. It is meant to be traced with `kv_pages` donated.

    Args:
      params: see weights.param_shapes.
      kv_pages: [L*P, page_size, R, C].
      batch: see batch.Batch.
      config: the shape of the parameters.
      options: how the step writes and attends.

    Returns:
      The logits of each sequence's last new token, f32[rows, vocab_size] with
      `batch.num_logit_rows(S)` rows, and the pool.
    """
    pages_per_layer = kv_pages.shape[0] // config.num_layers
    batch = batch._replace(page_indices=batch.page_indices[batch.table_rows])  # [S, M]
    rotation = _rotation(batch.positions, config)
    x = params["embedding"][batch.token_ids]
    for index, weights in enumerate(params["layers"]):
        x, kv_pages = _layer(
            x,
            weights,
            kv_pages,
            in_layer(batch, index * pages_per_layer, kv_pages.shape[1]),
            rotation,
            config=config,
            options=options,
        )
    last_rows = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)  # [S]
    num_seqs = last_rows.shape[0]
    last_rows = jnp.pad(last_rows, (0, num_logit_rows(num_seqs) - num_seqs))
    x = _rms_norm(x[last_rows], params["norm"], config)
    unembedding = params["unembedding" if "unembedding" in params else "embedding"]  # [V, D]
    logits = _matmul(x, unembedding.T, preferred_element_type=jnp.float32)
    return logits, kv_pages


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _layer(
    x: jax.Array,
    weights: Params,
    kv_pages: jax.Array,
    batch: Batch,
    rotation: Rotation,
    *,
    config: ModelConfig,
    options: StepOptions,
) -> tuple[jax.Array, jax.Array]:
    """One decoder layer; x [T, D] -> [T, D], and the pool. `batch` has the layer's own page ids."""
    attended, kv_pages = _attention(
        _rms_norm(x, weights["attention_norm"], config),
        weights,
        kv_pages,
        batch,
        rotation,
        config,
        options=options,
    )
    x += attended
    return x + _mlp(_rms_norm(x, weights["mlp_norm"], config), weights), kv_pages


def model_step(
    params: Params,
    kv_pages: jax.Array,
    page_table: jax.Array,
    packed: jax.Array,
    last_tokens: jax.Array,
    *,
    spec: Spec,
    model: ModelConfig,
    options: StepOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `forward`, for a packed batch, so that a step has one input from the host.

    Args:
      params: see weights.param_shapes.
      kv_pages: [L*P, page_size, R, C].
      page_table: the page table after the step before, i32[R, M].
      packed: a packed Batch without its page table, i32[n]. A token id of -1 - r stands for
        `last_tokens[r]`.
      last_tokens: the tokens of the step before, which the host may not have read yet, i32[R].
      spec: the spec that `batch.pack` has returned with it.
      model: the shape of the parameters.
      options: see `forward`.

    Returns:
      The logits of each sequence's last new token, f32[rows, vocab_size] with
      `batch.num_logit_rows(S)` rows, the pool, and the page table with the batch's changes.
    """
    batch = Batch._make([*unpack(packed, spec), page_table])
    rows, columns, pages = batch.page_changes
    rows = jnp.where(rows < 0, page_table.shape[0], rows)  # outside, so that it is dropped
    page_table = page_table.at[rows, columns].set(pages, mode="drop")
    ids = batch.token_ids
    token_ids = jnp.where(ids < 0, last_tokens[jnp.maximum(-1 - ids, 0)], ids)
    batch = batch._replace(token_ids=token_ids, page_indices=page_table)
    logits, kv_pages = forward(params, kv_pages, batch, config=model, options=options)
    return logits, kv_pages, page_table


# cuBLAS's products: 64 decodes of Qwen3-0.6B have 4.11 ms of kernels on an H100 with them, and 4.19
# with XLA's own, which each shape would choose among when it is compiled. Rematerialization counts
# a pool that is updated in place twice, finds no room for it, and recomputes what it need not.
_COMPILER_OPTIONS = {
    "gpu": {
        "xla_gpu_enable_triton_gemm": False,
        "xla_disable_hlo_passes": "rematerialization,hlo-rematerialization",
    }
}


@functools.cache
def jitted_step(platform: str) -> Any:
    """`model_step`, compiled with a platform's best options; it donates the pool and the table."""
    return jax.jit(
        model_step,
        static_argnames=("spec", "model", "options"),
        donate_argnames=("kv_pages", "page_table"),
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


@settings.defaults()
def run_step(
    params: Params,
    kv_pages: jax.Array,
    page_table: jax.Array,
    packed: Array,
    last_tokens: Array,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs `model_step` on the current device, and donates the pool and the page table."""
    step = jitted_step(dispatch.platform())
    return step(params, kv_pages, page_table, packed, last_tokens, **options)


@settings.defaults()
def lower_step(
    params: Params, kv_pages: Any, page_table: Any, packed: Any, last_tokens: Any, **options: Any
) -> Any:
    """`run_step` lowered and not yet compiled, from the shapes of its arrays."""
    step = jitted_step(dispatch.platform())
    return step.lower(params, kv_pages, page_table, packed, last_tokens, **options)


def in_layer(batch: Batch, first_page: int | jax.Array, page_size: int) -> Batch:
    """The batch with the page ids and slots of one layer; what is skipped stays skipped.

    Args:
      batch: with the ids of the first layer.
      first_page: the layer's first page in the pool.
      page_size: tokens in a page.
    """

    def shift(ids: Array, by: int | jax.Array) -> jax.Array:
        return jnp.where(ids >= 0, ids + by, ids)

    first_slot = first_page * page_size
    return batch._replace(
        page_indices=shift(batch.page_indices, first_page),
        page_ids=shift(batch.page_ids, first_page),
        slices=jnp.concatenate([shift(batch.slices[:1], first_slot), batch.slices[1:]]),
        slots=shift(batch.slots, first_slot),
    )


def _attention(
    x: jax.Array,
    weights: Params,
    kv_pages: jax.Array,
    batch: Batch,
    rotation: Rotation,
    config: ModelConfig,
    *,
    options: StepOptions,
) -> tuple[jax.Array, jax.Array]:
    """Writes the new keys and values, then attends; x [T, D] -> [T, D], and the pool."""
    q, k, v = _heads(_project(x, weights, "qkv"), weights, rotation, config)
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.num_seqs)
    attend: dict[str, Any] = {
        "sm_scale": config.head_dim**-0.5,
        "num_kv_heads": config.num_kv_heads,
        "max_seqlen_q": 1 if options.is_decode else None,
        "backend": options.attention_backend,
    }
    out: Any  # neither op is asked for the log-sum-exp
    if options.kv_write == "fused":
        both: Any = pallas_paged.write_and_attend(q, k, v, kv_pages, *metadata, **attend)
        out, kv_pages = both
    else:
        new = (q, None) if k is None else (k, v)
        kv_pages = write_kv(kv_pages, *new, batch, config, options.write_backend)
        attend["num_heads"] = config.num_heads
        out = pallas_paged.ragged_paged_attention(q, kv_pages, *metadata, **attend)
    return _project(out.reshape(x.shape[0], -1), weights, "o"), kv_pages


def write_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    batch: Batch,
    config: ModelConfig,
    backend: str,
) -> jax.Array:
    """Writes a layer's new keys and values in every form that the batch has.

    They are [T, K*H] each, or k is a packed QKV and v None.
    """
    options: dict[str, Any] = {"num_kv_heads": config.num_kv_heads, "backend": backend}
    if batch.page_ids.size:
        kv_pages = pallas_paged.page_write(
            kv_pages, k, v, batch.page_ids, batch.token_starts, **options
        )
    if batch.slices.size:
        kv_pages = pallas_paged.slice_write(
            kv_pages, k, v, batch.slices, batch.num_slices, **options
        )
    if batch.slots.size:
        kv_pages = pallas_paged.token_write(kv_pages, k, v, batch.slots, **options)
    return kv_pages


def _mlp(x: jax.Array, weights: Params) -> jax.Array:
    """SwiGLU; x [T, D] -> [T, D]."""
    gate, up = jnp.split(_project(x, weights, "gate_up"), 2, axis=1)
    return _project(jax.nn.silu(gate) * up, weights, "down")


def _project(x: jax.Array, weights: Params, name: str) -> jax.Array:
    """A projection of the layer, with its bias if it has one."""
    out = _matmul(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return out if bias is None else out + bias


def _matmul(
    x: jax.Array, matrix: jax.Array, preferred_element_type: DTypeLike | None = None
) -> jax.Array:
    # float32 operands are multiplied in full precision, as the attention multiplies them.
    return jnp.dot(
        x,
        matrix,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=preferred_element_type,
    )


# From this number of tokens on, the heads' sums of squares are a kernel of their own on a GPU. One
# kernel for both takes 116 us for 8,192 tokens of 32 heads on an H100, three times what reading and
# writing them takes.
_MANY_ROWS = 1024


def _rms_norm(
    x: jax.Array, scale: jax.Array, config: ModelConfig, *, is_apart: bool = False
) -> jax.Array:
    """The norm over the last axis; `is_apart` keeps XLA from fusing its two passes into one."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    factor = lax.rsqrt(mean_square + config.rms_norm_eps)
    if is_apart:
        factor = lax.optimization_barrier(factor)
    return (x32 * factor).astype(x.dtype) * scale


def _rotation(positions: Array, config: ModelConfig) -> Rotation:
    frequencies, factor = rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _heads(
    qkv: jax.Array, weights: Params, rotation: Rotation, config: ModelConfig
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The heads of a projection [T, (N + 2K) * H], normalised and rotated.

    Returns:
      On a TPU q [T, N, H], and k and v [T, K*H]; elsewhere a packed QKV, [T, N + 2K, H], None and
      None.
    """
    num_tokens, q_width = qkv.shape[0], config.num_heads * config.head_dim
    norm = weights.get("head_norm")
    if dispatch.platform() != "tpu":
        packed = qkv.reshape(num_tokens, -1, config.head_dim)
        return _rotate_packed(packed, norm, rotation, config), None, None
    kv_width = config.num_kv_heads * config.head_dim
    q_and_k, v = jnp.split(qkv, [q_width + kv_width], axis=1)
    q, k = jnp.split(_rotate_lanes(q_and_k, norm, rotation, config), [q_width], axis=1)
    return q.reshape(num_tokens, config.num_heads, config.head_dim), k, v


def _rotate_packed(
    qkv: jax.Array, norm: jax.Array | None, rotation: Rotation, config: ModelConfig
) -> jax.Array:
    """Rotates the two halves of the heads of a packed QKV [T, N + 2K, H], but those of values.

    If there is a norm, [N + 2K, H], each of these heads is normalised first. On a GPU all of that
    is one kernel or two, where heads of three arrays would take five.
    """
    x = qkv if norm is None else _rms_norm(qkv, norm, config, is_apart=len(qkv) > _MANY_ROWS)
    cos, sin = (table[:, None] for table in rotation)  # [T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=2)
    x = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)
    first_value = config.num_heads + config.num_kv_heads
    is_value = lax.broadcasted_iota(jnp.int32, (1, qkv.shape[1], 1), 1) >= first_value
    return jnp.where(is_value, qkv, x.astype(qkv.dtype))


def _rotate_lanes(
    x: jax.Array, norm: jax.Array | None, rotation: Rotation, config: ModelConfig
) -> jax.Array:
    """As `_rotate_packed`, head after head on the lanes of the projection; x [T, (N + K) * H].

    Through a view [T, heads, H], XLA would copy k twice on a TPU.
    """
    cos, sin = rotation
    num_heads = x.shape[1] // config.head_dim
    heads = jnp.split(x, num_heads, axis=1)
    if norm is not None:
        # One product sums the squares of all heads; sums and roots by themselves would be a launch
        # for each head.
        wide = x.astype(jnp.float32)
        is_of_head = np.repeat(np.eye(num_heads, dtype=np.float32), config.head_dim, axis=0)
        sums = _matmul(wide * wide, jnp.asarray(is_of_head))  # [T, heads]
        factors = lax.rsqrt(sums / config.head_dim + config.rms_norm_eps)  # [T, heads]
        heads = [
            (head.astype(jnp.float32) * factors[:, i : i + 1]).astype(x.dtype) * norm[i]
            for i, head in enumerate(heads)
        ]
    rotated = []
    for head in heads:
        first, second = jnp.split(head.astype(jnp.float32), 2, axis=1)
        rotated += [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=1).astype(x.dtype)
