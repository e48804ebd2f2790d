# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""How long a user waits for `LLM(folder)`, and for its first token, in a new process.

Every measurement has a process of its own, because a process keeps what it has compiled, and
because only one at a time can hold most of a GPU's memory: the process that measures must not have
started its own backend. Imports, and the start of jax's backend, come before the clock's. The files
of the folder have just been written or read, so that the operating system has them in memory.
"""

from __future__ import annotations

import json
import math
import pathlib
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench import report
from bench.peers.child import Child
from reference_engine.config import ModelConfig
from reference_engine.llm import LLM
from reference_engine.sampling_params import SamplingParams

_PROMPT = 100  # tokens
_DRAWN = 1 << 20  # random numbers, from which every tensor takes its own, in turns


def measure(folder: pathlib.Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two rows: with an empty cache of compiled programs, and with what the first has left in it.

    Args:
      folder: the model's.
      fields: of EngineConfig, beside LLM's defaults.
    """
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty", "full"):
            with Child() as run:
                row = run(_start, str(folder), cache, dict(fields))
            rows.append({"cache": name, **row})
    return rows


def _start(folder: str, cache: str, fields: dict[str, Any]) -> dict[str, Any]:
    """In a child: starts, takes a token, and waits for what compiles in the background."""
    report.start_backends()
    began = time.perf_counter()
    llm = LLM(folder, compilation_cache=cache, use_tqdm=False, **fields)
    ready = time.perf_counter()
    length = min(_PROMPT, llm.engine.config.max_model_len - 1)
    prompt = [token % llm.engine.model_config.vocab_size for token in range(length)]
    next(llm.stream([prompt], SamplingParams(max_tokens=1, ignore_eos=True)))
    first = time.perf_counter()
    llm.engine.warm_up()
    compiled = time.perf_counter()
    return {
        "ready_s": ready - began,
        "first_token_s": first - began,
        "all_compiled_s": compiled - began,
        "num_pages": llm.engine.config.pool_pages,
    }


def write_folder(folder: pathlib.Path, model: ModelConfig) -> None:
    """Writes a model's folder with random weights: config.json and model.safetensors.

    Args:
      folder: an empty one.
      model: a Llama, or with `qk_norm` a Qwen3; without biases.
    """
    (folder / "config.json").write_text(json.dumps(_hf_config(model)))
    dtype = jnp.dtype(model.dtype)
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    shapes = _tensors(model)
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": names[model.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(_DRAWN, np.float32)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            scale = 1.0 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
            values = np.roll(drawn, int(rng.integers(_DRAWN))) * np.float32(scale)
            values = np.ones_like(values) if len(shape) == 1 else values
            data = values.astype(dtype)
            left = math.prod(shape)
            while left > 0:
                file.write(data[: min(left, _DRAWN)].tobytes())
                left -= _DRAWN


def _tensors(model: ModelConfig) -> dict[str, Sequence[int]]:
    """Name -> shape of a checkpoint's tensors."""
    width, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer: dict[str, Sequence[int]] = {
        "input_layernorm": [width],
        "self_attn.q_proj": [q, width],
        "self_attn.k_proj": [kv, width],
        "self_attn.v_proj": [kv, width],
        "self_attn.o_proj": [width, q],
        "post_attention_layernorm": [width],
        "mlp.gate_proj": [inner, width],
        "mlp.up_proj": [inner, width],
        "mlp.down_proj": [width, inner],
    }
    if model.qk_norm:
        layer |= {f"self_attn.{name}_norm": [model.head_dim] for name in "qk"}
    tensors: dict[str, Sequence[int]] = {"model.embed_tokens.weight": [model.vocab_size, width]}
    for index in range(model.num_layers):
        tensors |= {f"model.layers.{index}.{name}.weight": s for name, s in layer.items()}
    tensors["model.norm.weight"] = [width]
    if not model.tie_embeddings:
        tensors["lm_head.weight"] = [model.vocab_size, width]
    return tensors


def _hf_config(model: ModelConfig) -> dict[str, Any]:
    name = "qwen3" if model.qk_norm else "llama"
    return {
        "architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
        "model_type": name,
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.max_position or 40_960,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "use_sliding_window": False,
        "torch_dtype": model.dtype,
    }
