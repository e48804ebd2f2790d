# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that transformers writes come to what transformers makes of them."""

import dataclasses
import json
import random
import warnings

import numpy as np
import pytest

from reference_engine.config import EngineConfig
from reference_engine.engine import Engine
from reference_engine.hf_config import read_model_config
from reference_engine.llm import LLM
from reference_engine.rope import RopeScaling, frequencies
from reference_engine.sampling_params import SamplingParams
from reference_engine.weights import load_params

torch = pytest.importorskip(
    "torch", reason="the test extra brings torch for Python 3.11 alone: elsewhere it is gigabytes"
)
transformers = pytest.importorskip(
    "transformers", reason="the test extra brings it, as torch, for Python 3.11 alone"
)
safetensors_torch = pytest.importorskip("safetensors.torch")
torch.set_num_threads(1)  # the models are tiny

SIZES = {
    "vocab_size": 151,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    # One whose tokens end nothing, so that 64 steps are 64 tokens.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
CASES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-biases-llama3": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-linear-biases": ("Qwen3", {"rope_parameters": LINEAR, "attention_bias": True}),
}
ENGINE = EngineConfig(
    page_size=8,
    num_pages=64,
    max_model_len=160,
    max_num_batched_tokens=32,
    max_num_seqs=4,
    token_buckets=(32,),
    seq_buckets=(4,),
    return_logits=True,
    async_scheduling=False,  # a call of `step` returns the tokens of its own batch
)
PROMPTS = [
    [int(token) for token in np.random.default_rng(n).integers(151, size=n)] for n in (8, 37, 61)
]
NUM_STEPS = 64


def write_checkpoint(folder, name):
    """Writes a random model of a case, in shards, and returns it."""
    family, fields = CASES[name]
    sizes = SIZES if family != "Qwen2" else SIZES | {"head_dim": 12}  # it has no such field
    config = getattr(transformers, f"{family}Config")(
        **{
            key: value
            for key, value in (sizes | fields).items()
            if key != "head_dim" or family != "Qwen2"
        }
    )
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # what transformers starts at 0 or 1 must matter too
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif key.endswith("norm.weight"):
                parameter.normal_(1, 0.2)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def run(engine):
    """Tokens and logits of every prompt, NUM_STEPS each."""
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=NUM_STEPS)) for prompt in PROMPTS]
    tokens, logits = {i: [] for i in ids}, {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
            logits[output.request_id].append(output.logits)
    return [tokens[i] for i in ids], [np.stack(logits[i]) for i in ids]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of their own deprecations
        model = write_checkpoint(tmp_path, name)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    llm = LLM(tmp_path, ENGINE, dtype="float32")
    tokens, logits = run(llm.engine)
    for prompt, ours, rows in zip(PROMPTS, tokens, logits, strict=True):
        with torch.no_grad():  # every step's logits, in one pass over what was generated
            theirs = model(torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :]
        np.testing.assert_allclose(rows, theirs.numpy(), rtol=0, atol=1e-4)
        assert ours == theirs.argmax(-1).tolist()
        assert np.std(rows) > 0.5
    with torch.no_grad():  # and what transformers generates by itself
        generated = model.generate(
            torch.tensor(PROMPTS[1:2]),
            max_new_tokens=NUM_STEPS,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(PROMPTS[1]), dtype=torch.long),
        )
    assert tokens[1] == generated[0, len(PROMPTS[1]) :].tolist()
    assert len({token for ours in tokens for token in ours}) > 20, "repetition shows little"


@pytest.mark.parametrize(
    "name, fields",
    [
        ("llama-biases-llama3", {"rope_scaling": RopeScaling()}),
        ("qwen2-yarn", {"rope_scaling": RopeScaling("linear", factor=4.0)}),
        ("qwen2-yarn", {"rope_scaling": RopeScaling("yarn", 4.0, 64, attention_factor=1.0)}),
        ("llama", {"rope_theta": 20_000.0}),
        ("llama", {"rms_norm_eps": 1e-2}),
    ],
    ids=str,
)
def test_a_wrong_config_is_seen(tmp_path, name, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = write_checkpoint(tmp_path, name)
    config = read_model_config(tmp_path, "float32")
    wrong = dataclasses.replace(config, **fields)
    engine = Engine(load_params(tmp_path, wrong), wrong, ENGINE)
    engine.add_request(PROMPTS[1], SamplingParams(max_tokens=1))
    rows = [output.logits for _ in range(2) for output in engine.step()]
    with torch.no_grad():
        theirs = model(torch.tensor([PROMPTS[1]])).logits[0, -1]
    assert np.abs(rows[0] - theirs.numpy()).max() > 1e-3


def random_rope(rng):
    """A config with one of the many ways to write RoPE down, some of them wrong."""
    family = rng.choice(("Llama", "Qwen2", "Qwen3"))
    raw = {
        "model_type": family.lower(),
        "architectures": [f"{family}ForCausalLM"],
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": rng.choice((8, 16, 128)),
        "max_position_embeddings": rng.choice((256, 4096, 131072)),
    }
    kind = rng.choice(("default", "linear", "llama3", "yarn", "yarn", "yarn"))
    rope = {rng.choice(("type", "rope_type")): kind, "factor": rng.choice((1, 2.0, 8.5, 40))}
    if kind == "llama3":
        rope |= {"low_freq_factor": rng.choice((1, 2.0)), "high_freq_factor": rng.choice((4, 8.0))}
    choices = {
        "original_max_position_embeddings": (32, 64, 256),
        "beta_fast": (0, 16, 32.0, None),
        "beta_slow": (0, 1, 2.0, None),
        "attention_factor": (None, 1.0, 1.5, 2),
        "mscale": (0, 1, 0.707, None),
        "mscale_all_dim": (0, 1.0, 0.5, None),
        "truncate": (True, False, None),
        "rope_theta": (500.0, 10000, 1e6),
    }
    rope |= {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.4}
    newer = rng.random() < 0.5
    raw["rope_parameters" if newer else "rope_scaling"] = rope
    if rng.random() < 0.5:
        raw["rope_theta"] = rng.choice((500000.0, 10000))
    if rng.random() < 0.1:
        raw["original_max_position_embeddings"] = rng.choice((32, 128))
    if rng.random() < 0.2:  # both forms at once
        raw["rope_scaling" if newer else "rope_parameters"] = rng.choice(
            ({}, None, {"rope_type": "linear", "factor": 3.0})
        )
    for name in ("factor", "low_freq_factor", "head_dim", "max_position_embeddings"):
        if rng.random() < 0.1:
            (rope if name.endswith("factor") else raw).pop(name, None)
    if kind == "yarn" and rng.random() < 0.1:
        rope["factor"] = None
    return raw


def test_every_way_to_write_rope_down_means_what_it_means_to_transformers(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    rng, num_refused, kinds = random.Random(0), 0, set()
    for _ in range(400):
        raw = random_rope(rng)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = transformers.AutoConfig.from_pretrained(tmp_path)
                theirs = LlamaRotaryEmbedding(config)
            except (KeyError, TypeError) as error:  # a number is missing
                with pytest.raises(ValueError, match=r"config.json: `\w*factor` is missing"):
                    read_model_config(tmp_path)
                num_refused += 1
                assert "factor" in str(error) or "NoneType" in str(error)
                continue
        ours = read_model_config(tmp_path)
        got, factor = frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling)
        np.testing.assert_allclose(got, theirs.inv_freq.numpy(), rtol=2e-5, err_msg=str(raw))
        assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6), raw
        assert ours.num_kv_heads == config.num_key_value_heads
        kinds.add(ours.rope_scaling.kind)
    assert num_refused > 5 and len(kinds) == 4
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("stored", ["both", "equal", "head", "embedding"])
def test_tied_embeddings_are_what_transformers_makes_of_the_files(tmp_path, stored):
    """Two that differ are two, whatever the config says; of two names for one, either will do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_checkpoint(tmp_path, "llama-tied")
        tensors = {}
        for file in tmp_path.glob("*.safetensors"):
            tensors |= safetensors_torch.load_file(file)
            file.unlink()
        (tmp_path / "model.safetensors.index.json").unlink()
        head = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = head.flip(0) if stored == "both" else head
        if stored in ("head", "embedding"):
            unread = {"head": "model.embed_tokens", "embedding": "lm_head"}[stored]
            del tensors[f"{unread}.weight"]
        safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        # The order of looking: neither of these is the model.
        safetensors_torch.save_file({"x": head}, tmp_path / "consolidated.safetensors")
        safetensors_torch.save_file({"x": head}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text("stale")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    llm = LLM(tmp_path, ENGINE, dtype="float32")
    llm.engine.add_request(PROMPTS[0], SamplingParams(max_tokens=1))
    (output,) = llm.engine.step()
    with torch.no_grad():
        theirs = model(torch.tensor(PROMPTS[:1])).logits[0, -1].numpy()
    np.testing.assert_allclose(output.logits, theirs, rtol=0, atol=1e-4)


def test_older_configs_say_the_same(tmp_path):
    """rope_theta and rope_scaling at the top, torch_dtype: what transformers 4 wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_checkpoint(tmp_path, "llama-biases-llama3")
    new = read_model_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    raw["torch_dtype"] = raw.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_model_config(tmp_path) == new
