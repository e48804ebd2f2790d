# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a Hugging Face model folder says: its config, its end-of-text ids, where its tensors are.

Everything here reads headers and small JSON files: whatever is wrong with a checkpoint is refused,
by name, before a parameter is read or memory for one allocated.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from reference_engine.config import DTYPES, ModelConfig
from reference_engine.rope import KINDS, RopeScaling

# model_type -> (biases on q, k and v; norms on the heads of q and k). None: as the config says.
_FAMILIES: dict[str, tuple[bool | None, bool]] = {
    "llama": (None, False),
    "qwen2": (True, False),
    "qwen3": (None, True),
}
_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints hold beside their parameters.
_IGNORED = "rotary_emb.inv_freq"


def read_model_config(path: str | pathlib.Path, dtype: str = "auto") -> ModelConfig:
    """Reads config.json of a dense Llama, Qwen2 or Qwen3.

    Args:
      path: the model's folder.
      dtype: of parameters, activations and pool; "auto" for the checkpoint's.

    Raises:
      OSError: there is no such folder or file.
      ValueError: it is no JSON, or a model that is not served; the message names the field.
    """
    file = pathlib.Path(path) / "config.json"
    raw = _read_json(file)

    def get(name: str, default: Any = None, kind: type | tuple[type, ...] = int) -> Any:
        value = raw.get(name, default)
        if value is None:
            value = default
        if value is None:
            _fail(file, f"`{name}` is missing")
        if not isinstance(value, kind) or isinstance(value, bool) and kind is int:
            _fail(file, f"`{name}` is {value!r}, which is no {getattr(kind, '__name__', 'number')}")
        return value

    family = _family(raw, file)
    for name, wanted in (
        ("hidden_act", ("silu",)), ("quantization_config", (None,)),
        ("use_sliding_window", (None, False)), ("partial_rotary_factor", (None, 1, 1.0)),
    ):
        if raw.get(name) not in wanted and not (name == "hidden_act" and name not in raw):
            _fail(file, f"`{name}` is {raw[name]!r}; only {wanted[-1]!r} is served")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        _fail(file, "`layer_types` has layers of other kinds than full_attention")
    qkv_bias, qk_norm = _FAMILIES[family]
    has_bias = get("attention_bias", False, bool)
    heads, width = get("num_attention_heads"), get("hidden_size")
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return ModelConfig(
        vocab_size=get("vocab_size"),
        hidden_size=width,
        intermediate_size=get("intermediate_size"),
        num_layers=get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", heads),
        head_dim=get("head_dim", width // max(heads, 1)),
        **_rope(raw, file),
        rms_norm_eps=get("rms_norm_eps", 1e-6, (int, float)),
        qkv_bias=has_bias if qkv_bias is None else qkv_bias,
        o_bias=has_bias if qkv_bias is None else False,
        mlp_bias=get("mlp_bias", False, bool) if family == "llama" else False,
        qk_norm=qk_norm,
        tie_embeddings=get("tie_word_embeddings", False, bool),
        max_position=get("max_position_embeddings", 2048),
        dtype=(stored if stored in DTYPES else "float32") if dtype == "auto" else dtype,
    )


def read_generation_config(path: str | pathlib.Path) -> dict[str, Any]:
    """generation_config.json, or {} without one; `eos_token_id` is a tuple, from config.json if
    it is not here."""
    folder = pathlib.Path(path)
    file = folder / "generation_config.json"
    raw = _read_json(file) if file.exists() else {}
    eos = raw.get("eos_token_id")
    if eos is None:
        eos = _read_json(folder / "config.json").get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in ids):
        _fail(file, f"`eos_token_id` is {eos!r}; wanted an id or a list of them")
    return raw | {"eos_token_id": tuple(ids)}


def find_tensors(
    path: str | pathlib.Path, wanted: Mapping[str, tuple[int, ...]], *, optional: Iterable[str] = ()
) -> dict[pathlib.Path, list[str]]:
    """Which file holds which tensor, after checking all of their headers.

    Args:
      path: the model's folder, with model.safetensors.index.json or *.safetensors files.
      wanted: name -> shape of every tensor that the model has.
      optional: names that may be there as well and are not read.

    Returns:
      File -> names of the wanted tensors in it, in the file's order.

    Raises:
      OSError: there is no such folder or file.
      ValueError: a file is corrupt, or a tensor is missing, misshapen, of no float dtype, in two
        files, or not known; the message names it.
    """
    folder, optional = pathlib.Path(path), set(optional)
    placed: dict[str, pathlib.Path] = {}
    files: dict[pathlib.Path, list[str]] = {}
    for file in _shards(folder):
        with open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(_IGNORED) or name in optional:
                    continue
                if name not in wanted:
                    _fail(file, f"tensor `{name}` is not part of this model")
                if name in placed:
                    _fail(file, f"tensor `{name}` is in {placed[name].name} too")
                view = tensors.get_slice(name)
                if tuple(view.get_shape()) != wanted[name]:
                    _fail(file, f"tensor `{name}` has shape {tuple(view.get_shape())}; the config"
                                f" makes it {wanted[name]}")
                if view.get_dtype() not in _FLOAT_DTYPES:
                    _fail(file, f"tensor `{name}` is {view.get_dtype()}; wanted one of"
                                f" {', '.join(_FLOAT_DTYPES)}")
                placed[name] = file
                files.setdefault(file, []).append(name)
    missing = [name for name in wanted if name not in placed]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        _fail(folder, f"tensor `{missing[0]}` is missing{more}")
    return files


def open_safetensors(file: pathlib.Path) -> Any:
    """A memory-mapped safetensors file, as a context manager.

    Raises:
      ValueError: it is corrupt or cut short.
      ImportError: safetensors is not installed.
    """
    safetensors = import_extra("safetensors")
    try:
        return safetensors.safe_open(str(file), framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file, or cut short: {error}") from error


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            _fail(index, "`weight_map` is missing or empty")
        shards = [folder / name for name in dict.fromkeys(weight_map.values())]
    else:
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise FileNotFoundError(2, "no *.safetensors file", str(folder))
    for file in shards:
        if not file.is_file():
            raise FileNotFoundError(2, "the index names it, but there is no such file", str(file))
    return shards


def _family(raw: Mapping[str, Any], file: pathlib.Path) -> str:
    family = raw.get("model_type")
    architectures = raw.get("architectures") or []
    known = [name for name in architectures if name in _ARCHITECTURES]
    if family not in _FAMILIES or architectures and not known:
        _fail(file, f"`model_type` is {family!r} and `architectures` {architectures!r}; served are"
                    f" {', '.join(_ARCHITECTURES)}")
    return family


def _rope(raw: Mapping[str, Any], file: pathlib.Path) -> dict[str, Any]:
    """rope_theta and rope_scaling, from either of the forms that configs have."""
    old = raw.get("rope_scaling") or {}
    new = raw.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        _fail(file, f"`rope_scaling` is {raw.get('rope_scaling')!r}; wanted an object")
    given = old | new
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        _fail(file, f"RoPE of type {kind!r} is not served; {', '.join(KINDS)} are")
    if given.get("partial_rotary_factor", 1) != 1:
        _fail(file, "RoPE over a part of the head (partial_rotary_factor) is not served")
    if given.get("mscale") and given.get("mscale_all_dim"):
        _fail(file, "RoPE with `mscale` and `mscale_all_dim` is not served")
    names = {"original_max_position": "original_max_position_embeddings"} | {
        name: name for name in (
            "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
            "attention_factor", "truncate",
        )
    }
    fields = {
        field: given[name] for field, name in names.items() if given.get(name) is not None
    }
    if kind == "yarn":
        fields.setdefault("original_max_position", raw.get("max_position_embeddings", 0))
    theta = given.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    for name, value in (fields | {"rope_theta": theta}).items():
        if not isinstance(value, int | float):
            _fail(file, f"RoPE's `{name}` is {value!r}, which is no number")
    return {"rope_theta": float(theta), "rope_scaling": RopeScaling(kind, **fields)}


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    if not isinstance(raw, dict):
        _fail(file, "no JSON object")
    return raw


def import_extra(name: str) -> Any:
    """A package of the extra `models`.

    Raises:
      ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"a model folder needs {name}, which is not installed: pip install"
            " 'pallas-paged[models]'"
        ) from error


def _fail(where: pathlib.Path, what: str) -> NoReturn:
    raise ValueError(f"{where}: {what}")
