# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Model folders are read exactly, or refused by the name of what is wrong, before anything is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from reference_engine import weights
from reference_engine.generation_config import read_generation_config
from reference_engine.hf_config import read_model_config
from reference_engine.rope import RopeScaling
from tests.engine.checkpoints import MODEL, hf_config, hf_tensors, write_checkpoint

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
    assert read_model_config(tmp_path) == config
    names = []
    assert_same(weights.load_params(tmp_path, config, on_tensor=names.append), params)
    assert len(names) == len(set(names)) == 2 * 11 + 3 - tied


def test_weights_are_cast_and_stray_buffers_left_out(tmp_path):
    params = write_checkpoint(tmp_path, SMALL)
    tensors = hf_tensors(params)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = read_model_config(tmp_path, dtype="bfloat16")
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
    del tensors["model.embed_tokens.weight"]  # of the two either will do
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(weights.load_params(tmp_path, tied), params)
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor `model.embed_tokens.weight` is missing$"):
        weights.load_params(tmp_path, tied)


def test_a_head_that_differs_is_used_whatever_the_config_says(tmp_path):
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    params = write_checkpoint(tmp_path, SMALL)
    assert_same(weights.load_params(tmp_path, tied), params)
    tensors = hf_tensors(params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor `lm_head.weight` has shape \(39, 32\)"):
        weights.load_params(tmp_path, tied)


@pytest.mark.parametrize(
    "stored, want",
    [("F64", "float32"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")],
)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_config_without_a_dtype_means_the_tensors_own(tmp_path, stored, want, num_shards):
    params = write_checkpoint(tmp_path, SMALL, num_shards=num_shards)
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    for file in tmp_path.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file(
            {name: tensor.astype(kinds[stored]) for name, tensor in tensors.items()}, file
        )
    raw = hf_config(SMALL)
    for name in ("torch_dtype", "dtype"):
        for odd in (None, "auto", "float64", "int8", "torch.float64", "bf16", "", 16, ["x"], {}):
            raw = {key: value for key, value in raw.items() if "dtype" not in key} | {name: odd}
            (tmp_path / "config.json").write_text(json.dumps(raw))
            assert read_model_config(tmp_path).dtype == want
    del raw["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_model_config(tmp_path)
    assert config.dtype == want
    loaded = weights.load_params(tmp_path, config)
    assert_same(
        loaded, jax.tree.map(lambda x: np.asarray(x).astype(kinds[stored]).astype(want), params)
    )
    for name, value, meant in (
        ("dtype", "torch.bfloat16", "bfloat16"),
        ("torch_dtype", "torch.float16", "float16"),
        ("torch_dtype", "float32", "float32"),
        ("torch_dtype", "half", "float16"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | {name: value}))
        assert read_model_config(tmp_path).dtype == meant
        for name in ("float16", "half", "torch.float16"):
            assert read_model_config(tmp_path, name).dtype == "float16"
    (tmp_path / "config.json").write_text(
        json.dumps(raw | {"dtype": "bfloat16", "torch_dtype": "float16"})
    )
    assert read_model_config(tmp_path).dtype == "bfloat16"


def test_of_several_dtypes_the_first_tensors_by_name_counts(tmp_path):
    params = write_checkpoint(tmp_path, SMALL)
    tensors = {name: x.astype(jnp.bfloat16) for name, x in hf_tensors(params).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["a.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    raw = hf_config(SMALL) | {"torch_dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_model_config(tmp_path).dtype == "bfloat16"
    safetensors.numpy.save_file({"x": np.ones(3, np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: no tensor is one of F64, F32"):
        read_model_config(tmp_path)


def _change(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


def _with_int(tensors):
    tensors["model.norm.weight"] = np.ones(SMALL.hidden_size, np.int32)


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "tensor `model.layers.1.mlp.up_proj.weight` is missing$",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1" in name],
            r"tensor `model.layers.1.\S+` is missing, and 10 more",
        ),
        (lambda t: t.pop("lm_head.weight"), "tensor `lm_head.weight` is missing"),
        (
            _change("model.layers.0.self_attn.k_proj.weight", lambda x: x[:-1]),
            r"tensor `model.layers.0.self_attn.k_proj.weight` has shape \(31, 32\); the config "
            r"makes"
            r" it \(32, 32\)",
        ),
        (_with_int, "tensor `model.norm.weight` is I32; wanted one of F64, F32, F16, BF16"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)}),
            "tensor `model.layers.2.mlp.up_proj.weight` is not part of this model",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}),
            "tensor `model.layers.0.self_attn.q_proj.bias` is not part of this model",
        ),
    ],
)
def test_tensors_are_refused_by_name_before_any_is_read(tmp_path, monkeypatch, edit, message):
    params = write_checkpoint(tmp_path, SMALL)
    tensors = hf_tensors(params)
    edit(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")

    def allocate(*args, **kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr(weights.jnp, "full", allocate)
    monkeypatch.setattr(weights.jnp, "asarray", allocate)
    with pytest.raises(ValueError, match=message):
        weights.load_params(tmp_path, SMALL)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    params = write_checkpoint(tmp_path, SMALL, num_shards=2)
    tensors = hf_tensors(params)
    for i in (1, 2):  # whichever of them has it by right
        file = tmp_path / f"model-0000{i}-of-00002.safetensors"
        held = safetensors.numpy.load_file(file)
        held["model.norm.weight"] = tensors["model.norm.weight"]
        safetensors.numpy.save_file(held, file)
    with pytest.raises(
        ValueError,
        match="00002-of-00002.safetensors: tensor `model.norm.weight` is"
        " in model-00001-of-00002.safetensors too",
    ):
        weights.load_params(tmp_path, SMALL)


def test_only_the_files_of_the_model_are_read(tmp_path):
    """Others lie beside them in many folders: whole models under other names, adapters, parts."""
    others = {
        "consolidated.safetensors": {"tok_embeddings.weight": np.ones((3, 3), np.float32)},
        "adapter_model.safetensors": {"base_model.lora_A.weight": np.ones(3, np.float32)},
        "model-00001-of-00099.safetensors": {"model.norm.weight": np.ones(32, np.float32)},
        "model.fp16.safetensors": {"model.norm.weight": np.ones(32, np.float16)},
    }
    for num_shards in (1, 3):
        folder = tmp_path / str(num_shards)
        folder.mkdir()
        params = write_checkpoint(folder, SMALL, num_shards=num_shards)
        for name, tensors in others.items():
            safetensors.numpy.save_file(tensors, folder / name)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(b"?")
        (folder / "broken.safetensors").write_bytes(b"?")
        assert_same(weights.load_params(folder, SMALL), params)


def test_one_file_goes_before_an_index_and_a_named_file_before_both(tmp_path):
    write_checkpoint(tmp_path, SMALL, seed=1, num_shards=2)
    params = write_checkpoint(tmp_path, SMALL, seed=2)
    assert_same(weights.load_params(tmp_path, SMALL), params)
    tensors = hf_tensors(weights.random_params(SMALL, 3))
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    for name, seed in (("other.safetensors", 3), ("model.safetensors.index.json", 1)):
        raw = hf_config(SMALL) | {"transformers_weights": name}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert_same(weights.load_params(tmp_path, SMALL), weights.random_params(SMALL, seed))
    for name, error in (("none.safetensors", FileNotFoundError), ("../x", ValueError)):
        raw = hf_config(SMALL) | {"transformers_weights": name}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(error, match="`transformers_weights`"):
            weights.load_params(tmp_path, SMALL)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_a_folder_without_the_models_file_is_refused_by_what_it_has(tmp_path, name):
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"no model.safetensors and no .*; there is {name}"):
        weights.load_params(tmp_path, SMALL)


def test_an_index_and_its_files_must_agree(tmp_path):
    write_checkpoint(tmp_path, SMALL, num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    name, shard = "model.norm.weight", raw["weight_map"]["model.norm.weight"]
    tensors = safetensors.numpy.load_file(tmp_path / shard)
    del tensors[name]
    safetensors.numpy.save_file(tensors, tmp_path / shard)
    with pytest.raises(
        ValueError,
        match=rf"{shard}: tensor `{name}` is missing, though"
        r" model.safetensors.index.json says that it is here$",
    ):
        weights.load_params(tmp_path, SMALL)
    del raw["weight_map"][name]
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"index.json: tensor `{name}` is missing$"):
        weights.load_params(tmp_path, SMALL)
    for wrong in (7, None, "", "../model.safetensors", "/etc/passwd", ["x"]):
        index.write_text(json.dumps({"weight_map": raw["weight_map"] | {name: wrong}}))
        with pytest.raises(ValueError, match=rf"index.json: `weight_map` has .* for `{name}`"):
            weights.load_params(tmp_path, SMALL)
    for wrong in ([], "x", {}, None):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match="index.json: `weight_map` is missing or empty"):
            weights.load_params(tmp_path, SMALL)
    index.write_text("[]")
    with pytest.raises(ValueError, match="index.json: no JSON object"):
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
        read_model_config(tmp_path)
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
    with pytest.raises(FileNotFoundError, match="there is no \\*.safetensors file"):
        weights.load_params(tmp_path, SMALL)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            "`model_type` is 'mixtral' and `architectures` \\['MixtralForCausalLM'\\]; served are",
        ),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "`architectures` \\['Qwen3ForSeq"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; only 'silu' is served"),
        (
            {"use_sliding_window": True, "max_window_layers": 1},
            "`use_sliding_window` is True; wanted false, or a `max_window_layers` of all 2 layers",
        ),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9}, "is True; wan"),
        ({"use_sliding_window": "yes"}, "`use_sliding_window` is 'yes'; wanted true or false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types` has layers of"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config` is {'bits': 4}"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic' is not"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE of type 'longrope' is not served"),
        ({"rope_scaling": "yarn"}, "`rope_scaling` is 'yarn'; wanted an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "`factor` is '2', which is no"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            r"`factor` is 0.5, which is no finite number >= 1; .* \(in `rope_scaling`\)",
        ),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "`factor` is True, which is no num"),
        (
            {"rope_parameters": {"type": "linear"}},
            r"`factor` is missing; .* \(in `rope_parameters`\)",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "`factor` is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "`factor` is inf, which is"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "`factor` is 1000"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 2.5,
                }
            },
            "`original_max_position_embeddings` is 2.5, which is no int >= 1; .* `rope_scaling`",
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2},
                "original_max_position_embeddings": "8",
            },
            "`original_max_position_embeddings` is '8', which is no int >= 1; wanted an int >= 1$",
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": None},
                "original_max_position_embeddings": 257,
            },
            "`original_max_position_embeddings` is 257; wanted at most "
            "`max_position_embeddings`, 2",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "32"}}, "`beta_fast` is '32'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "`truncate` is 1; w"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": [1]}}, r"`mscale` is \[1\]"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": -1}},
            "`attention_factor` is -1",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "rope_theta": 1}}, "`rope_theta` is 1; w"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "`low_freq_factor` is missing"),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "`high_freq_factor` is 4; wanted more than",
        ),
        ({"rope_scaling": {"type": ["yarn"]}}, r"RoPE of type \['yarn'\] is not served"),
        (
            {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            r"`partial_rotary_factor` is 0.5; only 1 is served \(in `rope_scaling`\)",
        ),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is 0.5; only 1 is served$"),
        ({"rope_scaling": []}, r"`rope_scaling` is \[\]; wanted an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "RoPE that differs by layer is not served",
        ),
        ({"rope_theta": 0}, "`rope_theta` is 0; wanted a number above 0"),
        ({"rope_theta": None}, "`rope_theta` is missing"),
        ({"rope_theta": "10000"}, "`rope_theta` is '10000', which is no number"),
        ({"rope_theta": float("nan")}, "`rope_theta` is nan, which is no finite number"),
        ({"rms_norm_eps": "1e-6"}, "`rms_norm_eps` is '1e-6', which is no number"),
        ({"rms_norm_eps": True}, "`rms_norm_eps` is True, which is no number"),
        ({"rms_norm_eps": -1e-6}, "`rms_norm_eps` is -1e-06, which is no finite number >= 0"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"hidden_size": "32"}, "`hidden_size` is '32', which is no int"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` is True"),
        ({"hidden_size": 64.0}, "`hidden_size` is 64.0, which is no int"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0, which is no int >= 1"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0"),
        ({"vocab_size": [40]}, r"`vocab_size` is \[40\], which is no int"),
        ({"intermediate_size": -3}, "`intermediate_size` is -3"),
        ({"max_position_embeddings": "256"}, "`max_position_embeddings` is '256'"),
        ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` is 'false'; wanted true or"),
        ({"attention_bias": 0}, "`attention_bias` is 0; wanted true or false"),
        (
            {"num_key_value_heads": 3},
            "`num_key_value_heads` is 3; wanted a divisor of `num_attention_heads`, 4",
        ),
        ({"num_key_value_heads": "2"}, "`num_key_value_heads` is '2', which is no int"),
        ({"head_dim": 15}, "`head_dim` is 15; wanted one that makes heads even"),
        ({"head_dim": "16"}, "`head_dim` is '16', which is no int"),
        ({"head_dim": None, "num_attention_heads": 6}, "`head_dim` is missing; .* `hidden_size`"),
        ({"head_dim": None, "hidden_size": 36}, "`hidden_size` is 36; wanted one that makes"),
        ({"layer_types": 5}, "`layer_types` is 5; wanted a list"),
        ({"architectures": 5}, "`architectures` 5; served are"),
        ({"architectures": "LlamaForCausalLM"}, "`architectures` 'LlamaForCausalLM'; served are"),
        ({"model_type": ["qwen3"]}, r"`model_type` is \['qwen3'\]"),
        ({"hidden_act": None}, "`hidden_act` is None; only 'silu' is served"),
    ],
)
def test_models_that_are_not_served_are_refused_by_field(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SMALL) | fields))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_model_config(tmp_path)


def test_what_a_missing_field_means_depends_on_the_family(tmp_path):
    raw = hf_config(dataclasses.replace(SMALL, num_heads=64, num_kv_heads=32))
    for name in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "hidden_act",
        "tie_word_embeddings",
        "rms_norm_eps",
        "attention_bias",
        "architectures",
    ):
        del raw[name]

    def read(family, **fields):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": family} | fields))
        return read_model_config(tmp_path)

    for family, num_kv_heads, head_dim, longest in (
        ("llama", 64, 2, 2048),
        ("qwen2", 32, 2, 32_768),
        ("qwen3", 32, 128, 32_768),
    ):
        got = read(family, hidden_size=128)
        assert (got.num_kv_heads, got.head_dim, got.max_position) == (
            num_kv_heads,
            head_dim,
            longest,
        )
        assert not got.tie_embeddings and got.rms_norm_eps == 1e-6
        null = read(family, hidden_size=128, num_key_value_heads=None, head_dim=None)
        assert (null.num_kv_heads, null.head_dim) == (64, 2)
    with pytest.raises(
        ValueError,
        match="`num_key_value_heads` is missing; wanted a divisor of"
        " `num_attention_heads`, 4, or 32 as qwen2 has them",
    ):
        read("qwen2", num_attention_heads=4)
    assert read("llama", hidden_act="swish", hidden_size=128)


@pytest.mark.parametrize(
    "rope, longest",
    [
        (None, 256),
        ({"type": "default"}, 256),
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"type": "linear", "factor": 2.5}, 640),
        ({"type": "yarn", "factor": 4.0}, 1024),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}, 1024),
        ({"type": "yarn", "factor": None, "original_max_position_embeddings": 64}, 256),
        (
            {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 32,
            },
            256,
        ),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_the_longest_context_is_what_rope_reaches(tmp_path, rope, longest, name):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SMALL) | {name: rope}))
    assert read_model_config(tmp_path).max_position == longest


@pytest.mark.parametrize(
    "fields",
    [
        {"max_window_layers": 2},
        {"max_window_layers": 0, "sliding_window": None},
        {},
        {"max_window_layers": 0, "layer_types": ["full_attention"] * 2},
        {"max_window_layers": 0, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    ],
    ids=str,
)
def test_a_window_that_no_layer_has_is_none(tmp_path, fields):
    raw = hf_config(SMALL) | {"use_sliding_window": True} | fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_model_config(tmp_path).num_layers == 2


def test_a_config_that_is_no_json_is_refused(tmp_path):
    for text in ("{", "[1]", "", "null", "7", "\x00", "[" * 99_999):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: no JSON"):
            read_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match="config.json: no JSON"):
        read_model_config(tmp_path)


def test_families_and_forms_of_rope(tmp_path):
    raw = hf_config(SMALL)
    yarn = {"rope_type": "yarn", "factor": 2.0, "attention_factor": None}

    def read(**fields):
        (tmp_path / "config.json").write_text(json.dumps(raw | fields))
        return read_model_config(tmp_path)

    assert read(rope_scaling=yarn).rope_scaling == RopeScaling("yarn", 2.0, 256)
    got = read(rope_parameters={"rope_type": "linear", "factor": 3, "rope_theta": 7.0})
    assert (got.rope_scaling, got.rope_theta) == (RopeScaling("linear", 3), 7.0)
    qwen2 = read(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    llama = read(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=None,
        head_dim=None,
    )
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (1, 1, 1, 0)
    assert (llama.num_kv_heads, llama.head_dim) == (4, 8)
    assert read(torch_dtype="float64").dtype == "float32"
    with pytest.raises(ValueError, match="argument `dtype` is 'int8'"):
        read_model_config(tmp_path, dtype="int8")


def test_end_of_text_ids_are_found(tmp_path):
    def eos(generation, config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_generation_config(tmp_path)["eos_token_id"]

    assert eos(None, {"eos_token_id": 7}) == (7,)
    assert eos(None, {}) == ()
    assert eos({"eos_token_id": [3, 4]}, {"eos_token_id": 7}) == (3, 4)
    assert eos({}, {"eos_token_id": 7}) == (7,)
    for wrong in ("x", True, -1, 2.0, [[3]], [3, None], {"id": 3}):
        with pytest.raises(ValueError, match="generation_config.json: `eos_token_id` is"):
            eos({"eos_token_id": wrong}, {"eos_token_id": 7})
        with pytest.raises(ValueError, match=r"/config.json: `eos_token_id` is"):
            eos({}, {"eos_token_id": wrong})
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="generation_config.json: no JSON object"):
        read_generation_config(tmp_path)
