# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The parameters of a model, from a checkpoint or random.

The parameters in `layers` are stacked, [L, ...]. Matrices are [in, out], except for the two
embeddings, which are [vocab_size, D].
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import settings
from reference_engine import checkpoint
from reference_engine.config import ModelConfig

Params = dict[str, Any]

# A parameter of a layer -> its name in a checkpoint.
_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkvo"},
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"{name}_bias": f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")},
}
_TOP_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
}


def param_shapes(config: ModelConfig) -> Params:
    """The shapes and the dtype of the parameters, as `jax.ShapeDtypeStruct`s."""
    layers, width, inner = config.num_layers, config.hidden_size, config.intermediate_size
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    matrices = {
        "q": (width, q_width),
        "k": (width, kv_width),
        "v": (width, kv_width),
        "o": (q_width, width),
        "gate": (width, inner),
        "up": (width, inner),
        "down": (inner, width),
    }
    layer: dict[str, tuple[int, ...]] = {"attention_norm": (width,), "mlp_norm": (width,)}
    layer |= matrices
    biased = ["q", "k", "v"] * config.qkv_bias + ["o"] * config.o_bias
    biased += ["gate", "up", "down"] * config.mlp_bias
    layer |= {f"{name}_bias": matrices[name][1:] for name in biased}
    if config.qk_norm:
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    top: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, width), "norm": (width,)}
    if not config.tie_embeddings:
        top["unembedding"] = (config.vocab_size, width)

    def struct(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))

    return {name: struct(shape) for name, shape in top.items()} | {
        "layers": {name: struct((layers, *shape)) for name, shape in layer.items()}
    }


def load_params(
    path: str | pathlib.Path, config: ModelConfig, *, on_tensor: Callable[[str], None] | None = None
) -> Params:
    """Reads a checkpoint's parameters onto the default device.

    The files are memory-mapped, and the tensors are read one at a time, each into its layer of a
    parameter that is allocated already. So at most one tensor is in memory beside the parameters.

    Args:
      path: the model's folder.
      config: what its config.json says.
      on_tensor: called with the name of every tensor after it was read.

    Raises:
      OSError, ValueError: see checkpoint.find_tensors; nothing has been allocated then.
    """
    shapes = param_shapes(config)
    places = _places(shapes)
    wanted = {name: shape for name, (_, _, shape) in places.items()}
    embedding, unembedding = _TOP_NAMES["embedding"], _TOP_NAMES["unembedding"]
    twins = {embedding: unembedding} if config.tie_embeddings else {}
    files = checkpoint.find_tensors(path, wanted, twins=twins)
    places.setdefault(unembedding, ("unembedding", None, wanted[embedding]))
    shapes.setdefault("unembedding", shapes["embedding"])
    layers = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes["layers"].items()}
    params: Params = {"layers": layers}
    for file, names in files.items():
        with checkpoint.open_safetensors(file) as tensors:
            for name in names:
                key, layer, _ = places[name]
                tensor = jnp.asarray(tensors.get_tensor(name))
                if layer is None:
                    params[key] = tensor.astype(shapes[key].dtype)
                else:
                    layers[key] = _put(layers[key], tensor, layer)
                if on_tensor is not None:
                    on_tensor(name)
    return _tied(params) if config.tie_embeddings else params


def _tied(params: Params) -> Params:
    """Makes one embedding of two that the config ties, if they are equal or one is missing.

    An output projection that differs is kept, as transformers keeps it: the checkpoint's author
    computed with it, whatever the config says.
    """
    if "embedding" not in params:
        params["embedding"] = params.pop("unembedding")
    elif "unembedding" in params and jnp.array_equal(params["embedding"], params["unembedding"]):
        del params["unembedding"]
    return params


@settings.defaults()
def random_params(config: ModelConfig, seed: int) -> Params:
    """Random parameters with which greedy decoding yields diverse tokens, made on the device.

    In the residual stream, the attention must not be small beside the token's own embedding.
    Otherwise the next token depends on the last token alone, and generation falls into a short
    cycle. Hence queries and keys are large enough for uneven attention, and the output projection
    does not shrink the attention's result.

    Args:
      config: see ModelConfig.
      seed: fixes every number.
    """
    shapes = param_shapes(config)
    gains = {"q": 2.0, "k": 2.0, "o": 2.0, "down": 2.0}

    def make(path: Any, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "embedding":
            scale = 1.0
        elif name == "unembedding":
            scale = leaf.shape[-1] ** -0.5
        elif name.endswith("bias"):
            scale = 0.1
        else:
            scale = gains.get(name, 1.0) * leaf.shape[-2] ** -0.5
        return _normal(key, scale, leaf.shape, leaf.dtype)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, made)


def _places(shapes: Params) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Name in a checkpoint -> the parameter, its layer or None, and its shape in the checkpoint."""
    places: dict[str, tuple[str, int | None, tuple[int, ...]]] = {}
    for key, name in _TOP_NAMES.items():
        if key in shapes:
            places[name] = (key, None, shapes[key].shape)
    for key, struct in shapes["layers"].items():
        for layer in range(struct.shape[0]):  # a checkpoint's matrices are [out, in]
            places[f"model.layers.{layer}.{_LAYER_NAMES[key]}"] = (
                key,
                layer,
                struct.shape[:0:-1],
            )
    return places


@functools.partial(jax.jit, donate_argnums=0)
def _put(parameter: jax.Array, tensor: jax.Array, layer: int) -> jax.Array:
    """The layers' parameter [L, ...] with the transposed tensor of a checkpoint in one layer."""
    return lax.dynamic_update_index_in_dim(parameter, tensor.T.astype(parameter.dtype), layer, 0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(key: jax.Array, scale: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape) * scale).astype(dtype)
