# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What LLM takes where nobody has said: a server's limits, and the memory that is left."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_paged.checks import require
from reference_engine.config import EngineConfig, ModelConfig, num_pages_for
from reference_engine.model import make_pool
from reference_engine.weights import param_shapes

# The fields of EngineConfig on a GPU or a TPU. On a CPU they are EngineConfig's own. The fused form
# of the writes is the fastest on both: one kernel of a TPU, and on a GPU one launch beside it.
_SERVER: dict[str, Any] = {
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 256,
    "kv_write": "fused",
    "compile_in_background": True,
}
_CPU_POOL_TOKENS = 16_384  # in all pages together; a CPU does not say how much memory is free

# What a step has beside parameters and pool, as multiples of the logits in float32: those of two
# steps, and the sampler's copies.
_LOGITS = 6
_OTHER_BYTES = 64 << 20  # the kernels' own workspaces, metadata, what the allocator cannot use


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """The memory of a device.

    Attributes:
      limit: the bytes that jax may use. On a GPU that is three quarters of the memory, unless
        XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
      in_use: the bytes that the process has taken already.
    """

    limit: int
    in_use: int


def device_memory() -> DeviceMemory | None:
    """The memory of the default device; None if it does not say."""
    (device,) = jnp.zeros(()).devices()
    stats = device.memory_stats() or {}
    if not stats.get("bytes_limit"):
        return None
    return DeviceMemory(stats["bytes_limit"], stats.get("bytes_in_use", 0))


def default_fields(model: ModelConfig, platform: str) -> dict[str, Any]:
    """The fields of EngineConfig that LLM takes on a platform, if nobody gives others.

    The longest request is as long as the model can reach, if that is shorter than the default.

    >>> model = ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=1,
    ...                     num_heads=2, num_kv_heads=1, head_dim=8, max_position=4096)
    >>> default_fields(model, "cpu")
    {'max_model_len': 1024, 'num_pages': None}
    >>> fields = default_fields(model, "gpu")
    >>> fields["max_model_len"], fields["max_num_batched_tokens"], fields["max_num_seqs"]
    (4096, 8192, 256)
    """
    fields: dict[str, Any] = {"max_model_len": EngineConfig.max_model_len}
    if platform != "cpu":
        fields |= _SERVER
    fields["max_model_len"] = min(fields["max_model_len"], model.max_position or 2**31 - 1)
    return fields | {"num_pages": None}


def resolve(
    config: EngineConfig, model: ModelConfig, platform: str, memory: DeviceMemory | None
) -> EngineConfig:
    """The config with a number of pages, if it has none: as many as the memory has room for.

    On a GPU or TPU that is `gpu_memory_utilization` of the memory, less what is in use, the
    parameters, and what a step needs at most. On a CPU the pages hold 16,384 tokens, or one request
    of max_model_len if that is more.

    Args:
      config: the engine's.
      model: the shape of the model, whose parameters are not on the device yet.
      platform: "cpu", "gpu" or "tpu".
      memory: the device's; None if it does not say. Not read on a CPU.

    Raises:
      ValueError: the device does not say its memory, or one request of max_model_len does not fit.
    """
    if config.num_pages is not None:
        return config
    if platform == "cpu":
        most = max(_CPU_POOL_TOKENS, config.max_model_len)
        return dataclasses.replace(config, num_pages=num_pages_for(most, config.page_size))
    if memory is None:
        raise ValueError(
            "EngineConfig: argument `num_pages` is None, and the device does not say how much"
            " memory it has; wanted a number of pages: give num_pages"
        )
    pool = jax.eval_shape(lambda: make_pool(model, 1, config.page_size))
    page_bytes, params_bytes = _num_bytes(pool), _num_bytes(param_shapes(model))
    step = step_bytes(config, model)
    left = int(config.gpu_memory_utilization * memory.limit) - memory.in_use - params_bytes - step
    num_pages = left // page_bytes
    needed = config.max_pages_per_seq
    require(
        num_pages >= needed,
        "EngineConfig",
        "num_pages",
        got=f"None, and {max(left, 0):,} bytes are left for the pool: gpu_memory_utilization="
        f"{config.gpu_memory_utilization} of {memory.limit:,}, less {memory.in_use:,} in use,"
        f" {params_bytes:,} of parameters and {step:,} for a step",
        wanted=f"{needed:,} pages of {page_bytes:,} bytes, one request of max_model_len",
        hint="lower max_model_len, max_num_batched_tokens or max_num_seqs, or raise"
        " gpu_memory_utilization",
    )
    return dataclasses.replace(config, num_pages=num_pages)


def step_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """The most bytes that a step needs beside parameters and pool, by a bound.

    Of a layer, either the MLP is there, with its gates, its products and two residual streams, or
    the attention, with q, k and v before and after the rotation. Then there are the logits.
    """
    width, inner = model.hidden_size, model.intermediate_size
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    row = 2 * width + 3 * max(inner, heads)
    activations = config.max_step_tokens * row * jnp.dtype(model.dtype).itemsize
    logits = config.max_num_seqs * model.vocab_size * 4
    return activations + _LOGITS * logits + _OTHER_BYTES


def _num_bytes(tree: Any) -> int:
    """The bytes of the arrays of a tree, whose shapes are enough."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
