# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Serve a model folder with the reference engine.

    python -m examples.serve_checkpoint [MODEL_FOLDER]

The folder is one as Hugging Face has it, of a dense Llama, Qwen2 or Qwen3 model: config.json,
safetensors, tokenizer.json. Without an argument the program makes a tiny one with random weights,
whose text means nothing. It needs `pip install -e '.[models]'`.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from reference_engine import LLM, EngineConfig, SamplingParams

PROMPTS = ["The capital of France is", "Pages of keys and values", "One two three four five six"]


def make_tiny_model(folder: pathlib.Path) -> pathlib.Path:
    """Writes a random Llama of two layers, and a byte-level tokenizer trained on the prompts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        PROMPTS,
        trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet),
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    vocab_size = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))

    # The names and shapes of the tensors in a checkpoint; matrices are [out, in].
    width, inner, q_width, kv_width = 32, 64, 4 * 16, 2 * 16
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, width)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (q_width, width),
            layer + "self_attn.k_proj.weight": (kv_width, width),
            layer + "self_attn.v_proj.weight": (kv_width, width),
            layer + "self_attn.o_proj.weight": (width, q_width),
            layer + "mlp.gate_proj.weight": (inner, width),
            layer + "mlp.up_proj.weight": (inner, width),
            layer + "mlp.down_proj.weight": (width, inner),
            layer + "input_layernorm.weight": (width,),
            layer + "post_attention_layernorm.weight": (width,),
        }
    shapes["model.norm.weight"] = (width,)
    rng = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def serve(folder: pathlib.Path) -> None:
    """Generates for all prompts together, streams one of them, and compares the two."""
    # page_size and num_pages make the pool. With one bucket for tokens and one for sequences every
    # step has one shape, so a request's logits do not depend on what else is in its batch.
    llm = LLM(
        folder,
        EngineConfig(
            page_size=16,
            num_pages=64,
            max_model_len=128,
            max_num_batched_tokens=64,
            max_num_seqs=4,
            token_buckets=(64,),
            seq_buckets=(4,),
        ),
    )
    greedy = SamplingParams(max_tokens=16)  # temperature is 0 unless it is given
    outputs = llm.generate(PROMPTS, greedy)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"{prompt!r} -> {output.outputs[0].text!r}")

    # A stream yields the text as it comes.
    streamed = "".join(delta.text for delta in llm.stream(PROMPTS[0], greedy))
    assert streamed == outputs[0].outputs[0].text, (streamed, outputs[0].outputs[0].text)
    assert all(1 <= len(output.outputs[0].token_ids) <= 16 for output in outputs)
    print("The first prompt alone, as a stream, gave the same text as in the batch.")


def main() -> None:
    if len(sys.argv) > 1:
        serve(pathlib.Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        serve(make_tiny_model(pathlib.Path(folder)))


if __name__ == "__main__":
    main()
