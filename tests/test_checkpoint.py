# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Model folders are read exactly, or refused by the name of what is wrong, before anything is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from reference_engine import checkpoint, weights
from reference_engine.rope import RopeScaling
from tests.checkpoints import MODEL, hf_config, hf_tensors, write_checkpoint

SMALL = dataclasses.replace(MODEL, num_layers=2, vocab_size=40)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_written_is_read(tmp_path, num_shards, tied, dtype):
    config = dataclasses.replace(SMALL, tie_embeddings=tied, dtype=dtype)
    params = write_checkpoint(tmp_path, config, num_shards=num_shards)
    assert checkpoint.read_model_config(tmp_path) == config
    names = []
    assert_same(weights.load_params(tmp_path, config, on_tensor=names.append), params)
    assert len(names) == len(set(names)) == 2 * len(params["layers"]) + 3 - tied


def test_weights_are_cast_and_stray_buffers_left_out(tmp_path):
    params = write_checkpoint(tmp_path, SMALL)
    tensors = hf_tensors(params)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = checkpoint.read_model_config(tmp_path, dtype="bfloat16")
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_same(weights.load_params(tmp_path, config), want)


def test_parameters_are_in_memory_once_and_one_tensor_beside_them(tmp_path):
    config = dataclasses.replace(SMALL, num_layers=6, hidden_size=64)
    params = write_checkpoint(tmp_path, config, num_shards=2)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(x.nbytes for x in hf_tensors(params).values())
    del params
    before = sum(x.nbytes for x in jax.live_arrays())
    seen = []

    def look(name):
        seen.append(sum(x.nbytes for x in jax.live_arrays()) - before)

    loaded = weights.load_params(tmp_path, config, on_tensor=look)
    assert largest < size / 20
    assert max(seen) <= size + largest
    assert seen[-1] >= size == sum(x.nbytes for x in jax.tree.leaves(loaded))


def test_a_tied_head_may_be_stored(tmp_path):
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    params = write_checkpoint(tmp_path, tied)
    tensors = hf_tensors(params)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(weights.load_params(tmp_path, tied), params)


def _change(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


def _with_int(tensors):
    tensors["model.norm.weight"] = np.ones(SMALL.hidden_size, np.int32)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
         "tensor `model.layers.1.mlp.up_proj.weight` is missing$"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name],
         r"tensor `model.layers.1.\S+` is missing, and 10 more"),
        (lambda t: t.pop("lm_head.weight"), "tensor `lm_head.weight` is missing"),
        (_change("model.layers.0.self_attn.k_proj.weight", lambda x: x[:-1]),
         r"tensor `model.layers.0.self_attn.k_proj.weight` has shape \(31, 32\); the config makes"
         r" it \(32, 32\)"),
        (_with_int, "tensor `model.norm.weight` is I32; wanted one of F64, F32, F16, BF16"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)}),
         "tensor `model.layers.2.mlp.up_proj.weight` is not part of this model"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}),
         "tensor `model.layers.0.self_attn.q_proj.bias` is not part of this model"),
    ],
)
def test_tensors_are_refused_by_name_before_any_is_read(tmp_path, monkeypatch, edit, message):
    params = write_checkpoint(tmp_path, SMALL)
    tensors = hf_tensors(params)
    edit(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")

    def allocate(*args, **kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr(weights.jnp, "zeros", allocate)
    monkeypatch.setattr(weights.jnp, "asarray", allocate)
    with pytest.raises(ValueError, match=message):
        weights.load_params(tmp_path, SMALL)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    params = write_checkpoint(tmp_path, SMALL)
    one = {"model.norm.weight": hf_tensors(params)["model.norm.weight"]}
    safetensors.numpy.save_file(one, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="`model.norm.weight` is in model.safetensors too"):
        weights.load_params(tmp_path, SMALL)


@pytest.mark.parametrize("keep", [0, 4, 100, -7])
def test_a_file_that_is_cut_short_is_refused(tmp_path, keep):
    write_checkpoint(tmp_path, SMALL, num_shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: no safetensors file"):
        weights.load_params(tmp_path, SMALL)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        checkpoint.read_model_config(tmp_path)
    write_checkpoint(tmp_path, SMALL, num_shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002"):
        weights.load_params(tmp_path, SMALL)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="`weight_map` is missing or empty"):
        weights.load_params(tmp_path, SMALL)
    index.unlink()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors file"):
        weights.load_params(tmp_path, SMALL)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
         "`model_type` is 'mixtral' and `architectures` \\['MixtralForCausalLM'\\]; served are"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "`architectures` \\['Qwen3ForSeq"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; only 'silu' is served"),
        ({"use_sliding_window": True}, "`use_sliding_window` is True; only False is served"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types` has layers of"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config` is {'bits': 4}"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic' is not"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE of type 'longrope' is not served"),
        ({"rope_scaling": "yarn"}, "`rope_scaling` is 'yarn'; wanted an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "`factor` is '2', which is no"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "argument `factor` is 0.5"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "argument `original_max_position`"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"hidden_size": "32"}, "`hidden_size` is '32', which is no int"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` is True"),
        ({"num_key_value_heads": 3}, "argument `num_heads` is 4; wanted a multiple"),
    ],
)
def test_models_that_are_not_served_are_refused_by_field(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SMALL) | fields))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_model_config(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: no JSON"):
            checkpoint.read_model_config(tmp_path)


def test_families_and_forms_of_rope(tmp_path):
    raw = hf_config(SMALL)
    yarn = {"rope_type": "yarn", "factor": 2.0, "attention_factor": None}

    def read(**fields):
        (tmp_path / "config.json").write_text(json.dumps(raw | fields))
        return checkpoint.read_model_config(tmp_path)

    assert read(rope_scaling=yarn).rope_scaling == RopeScaling("yarn", 2.0, 256)
    got = read(rope_parameters={"rope_type": "linear", "factor": 3, "rope_theta": 7.0})
    assert (got.rope_scaling, got.rope_theta) == (RopeScaling("linear", 3), 7.0)
    qwen2 = read(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    llama = read(model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=True,
                 mlp_bias=True, num_key_value_heads=None, head_dim=None)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (1, 1, 1, 0)
    assert (llama.num_kv_heads, llama.head_dim) == (4, 8)
    assert read(torch_dtype="float64").dtype == "float32"
    with pytest.raises(ValueError, match="argument `dtype` is 'int8'"):
        checkpoint.read_model_config(tmp_path, dtype="int8")


def test_end_of_text_ids_are_found(tmp_path):
    def eos(generation, config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return checkpoint.read_generation_config(tmp_path)["eos_token_id"]

    assert eos(None, {"eos_token_id": 7}) == (7,)
    assert eos(None, {}) == ()
    assert eos({"eos_token_id": [3, 4]}, {"eos_token_id": 7}) == (3, 4)
    assert eos({}, {"eos_token_id": 7}) == (7,)
    with pytest.raises(ValueError, match="`eos_token_id` is 'x'"):
        eos({"eos_token_id": "x"}, {})
