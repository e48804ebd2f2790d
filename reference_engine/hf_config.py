# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""config.json of a Hugging Face folder as a ModelConfig.

What a missing field means is as in transformers. Whatever is not served is refused by the name of
the file and of the field.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from reference_engine.checkpoint import first_dtype
from reference_engine.config import DTYPES, ModelConfig
from reference_engine.json_fields import Fields, read_object
from reference_engine.rope import KINDS, RopeScaling


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a model_type means.

    Attributes:
      qkv_bias: whether q, k and v have biases and o has none; None if the config says it.
      qk_norm: whether each head of queries and keys is normalised.
      num_kv_heads: their number where the config has no such field; None for that of the query
        heads.
      head_dim: the width of a head where the config has no such field; None for the hidden size
        divided by the number of heads.
      max_position: the longest context where the config has no such field.
    """

    qkv_bias: bool | None = None
    qk_norm: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position: int = 32_768


_FAMILIES = {
    "llama": _Family(max_position=2048),
    "qwen2": _Family(qkv_bias=True, num_kv_heads=32),
    "qwen3": _Family(qk_norm=True, num_kv_heads=32, head_dim=128),
}
_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def read_model_config(path: str | pathlib.Path, dtype: str = "auto") -> ModelConfig:
    """Reads config.json of a dense Llama, Qwen2 or Qwen3.

    Args:
      path: the model's folder.
      dtype: the dtype of parameters, activations and pool. "auto" takes the config's dtype. If the
        config names none that is served, it takes the dtype of the first tensor by name, as
        transformers does (float32 for float64), and float32 if the folder has no tensors.

    Raises:
      OSError: there is no such folder or file.
      ValueError: the file is no JSON, or the model is not served; the message names file and field.
    """
    folder = pathlib.Path(path)
    file = folder / "config.json"
    fields = Fields(file, read_object(file))
    name, family = _family(fields)
    for field, *served in (
        ("hidden_act", "silu", "swish", *(() if "hidden_act" in fields else (None,))),
        ("quantization_config", None),
        ("partial_rotary_factor", 1, None),
    ):
        fields.only(field, *served)
    _refuse_windows(fields, name, fields.whole("num_hidden_layers"))
    has_bias = fields.flag("attention_bias", False)
    max_position = fields.whole("max_position_embeddings", family.max_position)
    heads, width = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    scaling, theta = _rope(fields)
    config: dict[str, Any] = dict(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(fields, heads, name, family),
        head_dim=_head_dim(fields, width, heads, family),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        qkv_bias=has_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=has_bias if family.qkv_bias is None else False,
        mlp_bias=fields.flag("mlp_bias", False) if name == "llama" else False,
        qk_norm=family.qk_norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=_longest(max_position, scaling),
    )
    dtype = _dtype(fields, folder) if dtype == "auto" else _torch_name(dtype)
    return ModelConfig(**config, dtype=dtype)


def _dtype(fields: Fields, folder: pathlib.Path) -> str:
    """The config's dtype or, if that is not served, the dtype of the first tensor by name."""
    stored = fields.raw.get("dtype")
    stored = fields.raw.get("torch_dtype") if stored is None else stored
    if _torch_name(stored) in DTYPES:
        return _torch_name(stored)
    return first_dtype(folder) or "float32"  # without tensors, parameters come from elsewhere


def _torch_name(dtype: Any) -> Any:
    """The name of a dtype for which torch has other names, such as "torch.float16" and "half"."""
    if not isinstance(dtype, str):
        return dtype
    name = dtype.removeprefix("torch.")
    return {"half": "float16", "float": "float32"}.get(name, name)


def _family(fields: Fields) -> tuple[str, _Family]:
    name, architectures = fields.raw.get("model_type"), fields.raw.get("architectures")
    architectures = [] if architectures is None else architectures
    is_known = isinstance(architectures, list) and (
        not architectures or any(one in _ARCHITECTURES for one in architectures)
    )
    if not isinstance(name, str) or name not in _FAMILIES or not is_known:
        raise ValueError(
            f"{fields.file}: `model_type` is {name!r} and `architectures` {architectures!r}; served"
            f" are {', '.join(_ARCHITECTURES)}",
        )
    return name, _FAMILIES[name]


def _refuse_windows(fields: Fields, name: str, num_layers: int) -> None:
    """Refuses layers with a sliding window. Llama has none, whatever its config says."""
    layer_types = fields.raw.get("layer_types")
    if not isinstance(layer_types, list | None):
        fields.fail("layer_types", "a list")
    if any(kind != "full_attention" for kind in layer_types or ()):
        raise ValueError(
            f"{fields.file}: `layer_types` has layers of other kinds than full_attention"
        )
    has_window = fields.raw.get("sliding_window", 4096) is not None
    if name == "llama" or layer_types or not has_window:
        return
    # If nothing names the kinds of the layers, those from `max_window_layers` on have the window.
    first = fields.number("max_window_layers", 28)
    if fields.flag("use_sliding_window", False) and first < num_layers:
        fields.fail(
            "use_sliding_window", f"false, or a `max_window_layers` of all {num_layers} layers"
        )


def _num_kv_heads(fields: Fields, heads: int, name: str, family: _Family) -> int:
    default = heads if "num_key_value_heads" in fields else family.num_kv_heads or heads
    num_kv_heads = fields.whole("num_key_value_heads", default)
    if heads % num_kv_heads:
        of_family = "" if "num_key_value_heads" in fields else f", or {default} as {name} has them"
        fields.fail(
            "num_key_value_heads", f"a divisor of `num_attention_heads`, {heads}{of_family}"
        )
    return num_kv_heads


def _head_dim(fields: Fields, width: int, heads: int, family: _Family) -> int:
    default = family.head_dim
    if default is None or "head_dim" in fields:
        default = width // heads
        if fields.raw.get("head_dim") is None and width % heads:
            fields.fail(
                "head_dim",
                f"a number, as `hidden_size`, {width}, is no multiple of"
                f" `num_attention_heads`, {heads}",
            )
    head_dim = fields.whole("head_dim", default)
    if head_dim % 2:
        name = "hidden_size" if fields.raw.get("head_dim") is None else "head_dim"
        fields.fail(name, f"one that makes heads even: RoPE rotates two halves of {head_dim} lanes")
    return head_dim


def _rope(fields: Fields) -> tuple[RopeScaling, float]:
    """How frequencies are scaled, and their base, from either form that configs have.

    transformers 5 writes `rope_parameters`; version 4 wrote `rope_scaling` and `rope_theta`. If a
    config has both forms, the older one counts.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.raw.get(name), dict | None):
            fields.fail(name, "an object")
    inside = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    given = fields.raw.get(inside) or {}
    if any(isinstance(value, dict) for value in given.values()):
        fields.fail(inside, "one for all layers: RoPE that differs by layer is not served")
    inner = Fields(fields.file, given, inside)
    kind_name = "type" if given.get("rope_type") is None else "rope_type"
    kind = "default" if given.get(kind_name) is None else given[kind_name]
    if kind not in KINDS:
        raise ValueError(
            f"{fields.file}: RoPE of type {kind!r} is not served; {', '.join(KINDS)} are"
            f" (`{kind_name}` in `{inside}`)",
        )
    inner.only("partial_rotary_factor", 1, None)
    holder = inner if "rope_theta" in inner else fields
    theta = float(holder.number("rope_theta", None if "rope_theta" in holder else 10_000.0))
    if theta == 0 or theta == 1 and kind == "yarn":
        holder.fail("rope_theta", "a number above 0, and not 1 with yarn")
    return RopeScaling(kind, **_scaling_numbers(kind, fields, inner)), theta


def _scaling_numbers(kind: str, fields: Fields, inner: Fields) -> dict[str, Any]:
    """The numbers that a kind of RoPE reads; its other fields may be anything."""
    if kind == "default":
        return {}
    numbers: dict[str, Any] = {}
    if kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        longest = fields.whole("max_position_embeddings", _family(fields)[1].max_position)
        holder = inner if fields.raw.get(name) is None else fields
        numbers["original_max_position"] = original = holder.whole(name, longest)
    if kind == "yarn" and "factor" in inner and inner.raw["factor"] is None:
        numbers["factor"] = longest / original
        if longest < original:
            holder.fail(name, f"at most `max_position_embeddings`, {longest}, as `factor` is null")
    else:
        numbers["factor"] = inner.number("factor", low=1.0)
    if kind == "llama3":
        low, high = (inner.number(f"{name}_freq_factor") for name in ("low", "high"))
        if not 0 < low < high:
            inner.fail("high_freq_factor", f"more than `low_freq_factor`, {low}, and that above 0")
        numbers |= {"low_freq_factor": low, "high_freq_factor": high}
    return numbers | (_yarn(inner) if kind == "yarn" else {})


def _yarn(inner: Fields) -> dict[str, Any]:
    """The optional fields of "yarn", as far as the config has them."""
    numbers: dict[str, Any] = {}
    for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
        if inner.raw.get(name) is None:
            continue
        value = inner.number(name)
        if value or name == "attention_factor":  # 0 means the default, as null does
            numbers[name] = value
    if "truncate" in inner:
        numbers["truncate"] = inner.flag("truncate", False)
    return numbers


def _longest(max_position: int, scaling: RopeScaling) -> int:
    """The longest context that the scaled frequencies reach, as vLLM counts it.

    A linear factor multiplies max_position_embeddings, and yarn's multiplies the original context.
    With llama3, max_position_embeddings is the scaled length already.
    """
    if scaling.kind == "linear":
        return int(max_position * scaling.factor)
    if scaling.kind == "yarn":
        return int(scaling.original_max_position * scaling.factor)
    return max_position
