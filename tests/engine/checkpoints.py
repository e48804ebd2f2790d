# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Small model folders as Hugging Face has them, made without transformers."""

import functools
import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from reference_engine.config import ModelConfig
from reference_engine.weights import random_params

TEXT = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on",
    "naïve café — 東京タワーへようこそ 🦊🦊 ünïcödé ½ ≠ ¼",
    "user assistant system: STOP END stop end\n\nnew line",
]
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    max_position=256,
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role not in ['user', 'assistant'] %}\n"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}\n"
    "<|{{ m.role }}|>{{ m.content }}\n{%- endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def byte_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with few merges, so that characters are cut; as Llama 3 and Qwen have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """Pieces that carry their space, and bytes for what is unknown; as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁quick", "▁dog", "the", "o", "g", "s", "é", ",", "▁a"]
    scores = [(piece, -10.0 if "<" in piece else -1.0) for piece in pieces]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def write_tokenizer(
    folder: pathlib.Path, *, tokenizer: dict | None = None, **files
) -> pathlib.Path:
    """Writes the files of a tokenizer, and returns the folder.

    Args:
      folder: where to.
      tokenizer: what tokenizer.json has beside or instead of `byte_tokenizer`'s parts.
      **files: content, or text, of other JSON files by name, without .json.
    """
    raw = json.loads(byte_tokenizer().to_str()) | (tokenizer or {})
    for name, content in {"tokenizer": raw, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def hf_config(config: ModelConfig = MODEL) -> dict:
    """config.json of a Qwen3 of that shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "attention_bias": config.qkv_bias,
        "use_sliding_window": False,
    }


def hf_tensors(params) -> dict[str, np.ndarray]:
    """Name -> tensor as checkpoints have them."""
    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["norm"],
    }
    if "unembedding" in params:
        tensors["lm_head.weight"] = params["unembedding"]
    for index, layer in enumerate(params["layers"]):
        for name, tensor in hf_layer(layer).items():
            tensors[f"model.layers.{index}.{name}.weight"] = tensor.T
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def hf_layer(layer) -> dict[str, np.ndarray]:
    """Name -> tensor of one layer without biases, [in, out]."""
    width = len(layer["o"])  # of all query heads
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "o": "self_attn.o_proj",
        "down": "mlp.down_proj",
    }
    tensors = {name: layer[key] for key, name in names.items()}
    q, k_and_v = np.split(np.asarray(layer["qkv"]), [width], axis=1)
    for name, tensor in zip("qkv", (q, *np.split(k_and_v, 2, axis=1)), strict=True):
        tensors[f"self_attn.{name}_proj"] = tensor
    gate_up = np.split(np.asarray(layer["gate_up"]), 2, axis=1)
    for name, tensor in zip(("gate", "up"), gate_up, strict=True):
        tensors[f"mlp.{name}_proj"] = tensor
    if "head_norm" in layer:  # every head has the same one
        norms = np.asarray(layer["head_norm"])
        first_key = width // norms.shape[1]
        tensors["self_attn.q_norm"], tensors["self_attn.k_norm"] = norms[[0, first_key]]
    return tensors


def write_checkpoint(
    folder: pathlib.Path,
    config: ModelConfig = MODEL,
    *,
    seed: int = 0,
    num_shards: int = 1,
    tokenizer: tokenizers.Tokenizer | None = None,
    template: str | None = TEMPLATE,
) -> dict:
    """Writes a model folder and returns its parameters."""
    params = random_params(config, seed)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    tensors = list(hf_tensors(params).items())
    if num_shards == 1:
        safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
    else:
        weight_map = {}
        for i in range(num_shards):
            name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
            safetensors.numpy.save_file(dict(tensors[i::num_shards]), folder / name)
            weight_map |= {key: name for key, _ in tensors[i::num_shards]}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
        if template is not None:
            settings["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return params
