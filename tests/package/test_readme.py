# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The Python blocks of the READMEs run as they stand, and what they compute is right."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def blocks(file, **smaller):
    """The README's Python blocks, as code whose line numbers are the file's.

    `smaller` says of numbers by their names what stands in their place, for a test to be quick.
    """
    text = (ROOT / file).read_text()
    for name, value in smaller.items():
        text, count = re.subn(rf"\b{name}=\d+", f"{name}={value}", text)
        assert count, name
    return [
        compile("\n" * text[: found.start(1)].count("\n") + found[1], file, "exec")
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def names_of_batch(num_heads, num_kv_heads, head_dim):
    """What the examples take for granted: two sequences, one a prefill, one a chunk of it."""
    rng = np.random.default_rng(0)
    kv_lens, q_lens = np.array([37, 50]), np.array([37, 21])
    num_tokens = int(q_lens.sum())
    q, k, v = (
        jnp.asarray(rng.standard_normal((num_tokens, heads, head_dim)), jnp.bfloat16)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    table = rng.permutation(16)[:10].reshape(2, 5)
    metadata = {
        "kv_lens": kv_lens,
        "page_indices": table,
        "cu_q_lens": np.append(0, np.cumsum(q_lens)),
        "num_seqs": np.array([2]),
    }
    metadata = {name: jnp.asarray(x, jnp.int32) for name, x in metadata.items()}
    return {"q": q, "k": k, "v": v, "T": num_tokens} | metadata


def run(block, names):
    """The names after the block, whose arrays are the arguments of one program."""
    arrays = {name: x for name, x in names.items() if isinstance(x, jax.Array)}

    def program(arrays):
        after = names | arrays
        exec(block, after)
        return {name: x for name, x in after.items() if isinstance(x, jax.Array)}

    return names | jax.jit(program)(arrays)


def error(names, scale):
    """How far the first sequence's rows are from its softmax, by plain float32 numpy."""
    count = int(names["kv_lens"][0])
    q, k, v = (np.asarray(names[x][:count], np.float32) for x in "qkv")
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qnh,knh->nqk", q, k) * scale
    scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)
    return np.abs(np.asarray(names["out"][:count], np.float32) - want).max()


def is_right(names):
    """Whether the scale is a model's, and not the default 1, by which it would be off."""
    return error(names, names["q"].shape[2] ** -0.5) < 0.02 < 0.5 < error(names, 1.0)


def test_every_block_is_run():
    """Here is one test for each; whoever adds a block adds its test."""
    assert [len(blocks(file)) for file in ("README.md", "pallas_paged/README.md")] == [3, 3]


def test_write_a_batch():
    fused, write, _ = blocks("README.md", num_pages=16)
    names = run(write, names_of_batch(32, 8, 128))
    assert is_right(names)
    again = run(fused, names_of_batch(32, 8, 128))
    assert is_right(again)
    assert np.array_equal(again["pool"], names["pool"]) and names["pool"].any()


def test_in_place_of_others():
    _, token_write, attention = blocks("pallas_paged/README.md")
    names = names_of_batch(4, 2, 128) | {"pallas_paged": pallas_paged, "K": 2, "H": 128}
    names["kv_pages"] = jnp.zeros((16, 16, 4, 128), jnp.bfloat16)
    slots = [
        names["page_indices"][seq, position // 16] * 16 + position % 16
        for seq, (kv_len, q_len) in enumerate(((37, 37), (50, 21)))
        for position in range(kv_len - q_len, kv_len)
    ]
    names["slots"] = jnp.asarray(slots, jnp.int32)
    scattered = np.zeros((256, 4, 128), np.float32)
    scattered[slots] = np.stack([names["k"], names["v"]], 2).reshape(-1, 4, 128)
    names = run(token_write, names)
    written = np.asarray(names["kv_pages"], np.float32)
    assert np.array_equal(written.reshape(scattered.shape), scattered)
    assert is_right(run(attention, names))


def test_export_for_a_tpu():
    export, *_ = blocks("pallas_paged/README.md")
    shapes = (
        jax.ShapeDtypeStruct((4, 16, 2, 128), jnp.float32),
        *([jax.ShapeDtypeStruct((2,), jnp.int32)] * 2),
    )
    names = {"jax": jax, "step": pallas_paged.copy_pages, "shapes": shapes}
    exec(export, names)
    assert "tpu_custom_call" in names["exported"].mlir_module()


@pytest.mark.skipif(
    jax.default_backend() != "cpu" and importlib.util.find_spec("safetensors") is None,
    reason="model folders need safetensors",
)
def test_serve_a_model(tmp_path, monkeypatch, capsys):
    from tests.engine import checkpoints

    folder = tmp_path / "path/to/Qwen3-0.6B"
    folder.mkdir(parents=True)
    checkpoints.write_checkpoint(folder, tokenizer=checkpoints.byte_tokenizer())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks("README.md")[2], names)
    printed = capsys.readouterr().out
    (output,) = names["llm"].generate(
        ["The capital of France is"], names["SamplingParams"](max_tokens=32)
    )
    assert printed.startswith(output.outputs[0].text + "\n") and len(output.outputs[0].text) > 1
    assert len(printed) > len(output.outputs[0].text) + 1  # the stream's
