# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a Hugging Face model folder says: its config, its end-of-text ids, where its tensors are.

Everything here reads headers and small JSON files: whatever is wrong with a checkpoint is refused,
by name of the file and the field, before a parameter is read or memory for one allocated. Which
files are read, and what a field that is missing means, is as in transformers.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from reference_engine.config import DTYPES, ModelConfig
from reference_engine.extras import import_extra
from reference_engine.rope import KINDS, RopeScaling


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a model_type means; None where the config says it.

    `num_kv_heads`, `head_dim` and `max_position` stand for fields that the config lacks; None: as
    many as query heads, and the share of one head in the width.
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
_FLOAT_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that old checkpoints hold beside their parameters.
_IGNORED = "rotary_emb.inv_freq"


class _Fields:
    """The fields of one JSON object of a file; every error names both."""

    def __init__(self, file: pathlib.Path, raw: Mapping[str, Any], name: str | None = None):
        self.file, self.raw, self._where = file, raw, f" (in `{name}`)" if name else ""

    def __contains__(self, name: str) -> bool:
        return name in self.raw

    def fail(self, name: str, wanted: str, fault: str = "") -> NoReturn:
        value = self.raw.get(name)
        got = "is missing" if value is None else f"is {repr(value)[:200]}{fault}"
        raise ValueError(f"{self.file}: `{name}` {got}; wanted {wanted}{self._where}")

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number >= 1; null and nothing mean the default."""
        value: Any = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, "an int >= 1", ", which is no int >= 1")
        return value

    def number(self, name: str, default: float | None = None, *, low: float = 0.0) -> float:
        """A finite number >= `low`; null and nothing mean the default."""
        value: Any = self.raw.get(name)
        value = default if value is None else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= sys.float_info.max:
            kind = "finite number" if is_number else "number"
            self.fail(name, f"a finite number >= {low:g}", f", which is no {kind} >= {low:g}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def only(self, name: str, *served: Any) -> None:
        """Refuses what is not served; None among `served`: it may be missing."""
        value = self.raw.get(name)
        kind = isinstance(value, bool)
        if not any(value == one and kind == isinstance(one, bool) for one in served):
            raise ValueError(
                f"{self.file}: `{name}` is {repr(value)[:200]}; only {served[0]!r} is served"
                f"{self._where}"
            )


def read_model_config(path: str | pathlib.Path, dtype: str = "auto") -> ModelConfig:
    """Reads config.json of a dense Llama, Qwen2 or Qwen3.

    Args:
      path: the model's folder.
      dtype: of parameters, activations and pool; "auto" for the config's or, where it names none
        that is served, that of the first tensor by name, as transformers does; float64 becomes
        float32, which also is what a folder without tensors means.

    Raises:
      OSError: there is no such folder or file.
      ValueError: it is no JSON, or a model that is not served; the message names file and field.
    """
    folder = pathlib.Path(path)
    file = folder / "config.json"
    fields = _Fields(file, read_object(file))
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


def read_generation_config(path: str | pathlib.Path) -> dict[str, Any]:
    """generation_config.json, or {} without one; `eos_token_id` is a tuple, from config.json if
    it is not here."""
    folder = pathlib.Path(path)
    file = folder / "generation_config.json"
    raw = read_object(file) if file.exists() else {}
    eos = raw.get("eos_token_id")
    if eos is None:
        file = folder / "config.json"
        eos = read_object(file).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"{file}: `eos_token_id` is {eos!r}; wanted an id >= 0 or a list of them")
    return raw | {"eos_token_id": tuple(ids)}


def find_tensors(
    path: str | pathlib.Path,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    twins: Mapping[str, str] | None = None,
) -> dict[pathlib.Path, list[str]]:
    """Which file holds which tensor, after checking all of their headers.

    Args:
      path: the model's folder, with model.safetensors or, without it, the files that
        model.safetensors.index.json names; others in the folder are not looked at.
      wanted: name -> shape of every tensor that the model has.
      twins: name -> another name for the same tensor; either may be there, or both.

    Returns:
      File -> names of the wanted tensors in it, twins included, in the file's order.

    Raises:
      OSError: there is no such folder or file.
      ValueError: a file is corrupt, or a tensor is missing, misshapen, of no float dtype, in two
        files, or not known; the message names it.
    """
    folder, twins = pathlib.Path(path), twins or {}
    shapes = dict(wanted) | {twin: wanted[name] for name, twin in twins.items()}
    placed: dict[str, pathlib.Path] = {}
    files: dict[pathlib.Path, list[str]] = {}
    index = _weight_map(folder)
    for file in index.files:
        with open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(_IGNORED):
                    continue
                if name not in shapes:
                    raise ValueError(f"{file}: tensor `{name}` is not part of this model")
                if name in placed:
                    raise ValueError(f"{file}: tensor `{name}` is in {placed[name].name} too")
                view = tensors.get_slice(name)
                if tuple(view.get_shape()) != shapes[name]:
                    raise ValueError(
                        f"{file}: tensor `{name}` has shape {tuple(view.get_shape())}; the config"
                        f" makes it {shapes[name]}",
                    )
                if view.get_dtype() not in _FLOAT_DTYPES:
                    raise ValueError(
                        f"{file}: tensor `{name}` is {view.get_dtype()}; wanted one of"
                        f" {', '.join(_FLOAT_DTYPES)}",
                    )
                placed[name] = file
                files.setdefault(file, []).append(name)
    missing = [name for name in wanted if name not in placed and twins.get(name) not in placed]
    if missing:
        _fail_missing(index, missing)
    return files


def _fail_missing(index: _WeightMap, missing: list[str]) -> NoReturn:
    name, source = missing[0], index.source
    what = f"tensor `{name}` is missing"
    if name in index.places:  # the index is right or the file, but not both
        source, what = index.places[name], f"{what}, though {source.name} says that it is here"
    if len(missing) > 1:
        what += f", and {len(missing) - 1} more"
    if name == "lm_head.weight":
        what += "; without it, config.json's `tie_word_embeddings` must be true"
    raise ValueError(f"{source}: {what}")


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
        raise ValueError(
            f"{file}: no safetensors file, cut short, or a Git LFS pointer in place of one: {error}"
        ) from error


class _WeightMap(NamedTuple):
    """The file that says which tensors there are, where it says they are, and these files."""

    source: pathlib.Path
    places: dict[str, pathlib.Path]
    files: list[pathlib.Path]


def _weight_map(folder: pathlib.Path) -> _WeightMap:
    """Looks where transformers looks: for the file that config.json names, or model.safetensors,
    or the index of a model in several files."""
    config = folder / "config.json"
    named = read_object(config).get("transformers_weights") if config.is_file() else None
    if named is not None and not _is_inside(named):
        raise ValueError(
            f"{config}: `transformers_weights` is {named!r}; wanted the name of a file"
        )
    weights, index = folder / _WEIGHTS, folder / _INDEX
    if named is not None:
        weights = index = folder / named
        if not weights.is_file():
            raise FileNotFoundError(
                2,
                "config.json's `transformers_weights` names it, but there is no such file",
                str(weights),
            )
    if weights.is_file() and weights.suffix != ".json":
        return _WeightMap(weights, {}, [weights])
    if not index.is_file():
        kinds = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        found = sorted(file.name for file in folder.iterdir() if file.suffix in kinds)
        raise FileNotFoundError(
            2,
            f"no {_WEIGHTS} and no {_INDEX}, which alone are read; there is"
            f" {', '.join(found) or 'no *.safetensors file'}",
            str(folder),
        )
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: `weight_map` is missing or empty, or no object")
    for tensor, name in weight_map.items():
        if not _is_inside(name):
            raise ValueError(
                f"{index}: `weight_map` has {name!r} for `{tensor}`; wanted the name of a file"
            )
    places = {tensor: folder / name for tensor, name in weight_map.items()}
    files = sorted(set(places.values()))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                2, f"{index.name} names it, but there is no such file", str(file)
            )
    return _WeightMap(index, places, files)


def _is_inside(name: Any) -> bool:
    """Whether it names a file in the folder or below."""
    path = pathlib.PurePath(name) if isinstance(name, str) else pathlib.PurePath("..")
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _dtype(fields: _Fields, folder: pathlib.Path) -> str:
    """The config's or, where that is none of ours, that of the first tensor by name."""
    stored = fields.raw.get("dtype")
    stored = fields.raw.get("torch_dtype") if stored is None else stored
    if _torch_name(stored) in DTYPES:
        return _torch_name(stored)
    try:
        files = _weight_map(folder).files
    except FileNotFoundError:
        return "float32"  # a config alone, for parameters that come from elsewhere
    for file in files:
        with open_safetensors(file) as tensors:
            for name in sorted(tensors.keys()):
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _FLOAT_DTYPES and not name.endswith(_IGNORED):
                    return _FLOAT_DTYPES[dtype]
    raise ValueError(f"{files[0]}: no tensor is one of {', '.join(_FLOAT_DTYPES)}")


def _torch_name(dtype: Any) -> Any:
    """The name of a dtype that torch calls otherwise, as "torch.float16" or "half"."""
    if not isinstance(dtype, str):
        return dtype
    name = dtype.removeprefix("torch.")
    return {"half": "float16", "float": "float32"}.get(name, name)


def _family(fields: _Fields) -> tuple[str, _Family]:
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


def _refuse_windows(fields: _Fields, name: str, num_layers: int) -> None:
    """Refuses layers that see a sliding window. Llama has none, whatever its config says."""
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
    # Where nothing names the layers' kinds, those from `max_window_layers` on have the window.
    first = fields.number("max_window_layers", 28)
    if fields.flag("use_sliding_window", False) and first < num_layers:
        fields.fail(
            "use_sliding_window", f"false, or a `max_window_layers` of all {num_layers} layers"
        )


def _num_kv_heads(fields: _Fields, heads: int, name: str, family: _Family) -> int:
    default = heads if "num_key_value_heads" in fields else family.num_kv_heads or heads
    num_kv_heads = fields.whole("num_key_value_heads", default)
    if heads % num_kv_heads:
        of_family = "" if "num_key_value_heads" in fields else f", or {default} as {name} has them"
        fields.fail(
            "num_key_value_heads", f"a divisor of `num_attention_heads`, {heads}{of_family}"
        )
    return num_kv_heads


def _head_dim(fields: _Fields, width: int, heads: int, family: _Family) -> int:
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


def _rope(fields: _Fields) -> tuple[RopeScaling, float]:
    """How frequencies are stretched, and their base, from either of the forms that configs have.

    Transformers 5 writes `rope_parameters`, 4 wrote `rope_scaling` and `rope_theta`. Where a config
    has both, the older one counts.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.raw.get(name), dict | None):
            fields.fail(name, "an object")
    inside = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    given = fields.raw.get(inside) or {}
    if any(isinstance(value, dict) for value in given.values()):
        fields.fail(inside, "one for all layers: RoPE that differs by layer is not served")
    inner = _Fields(fields.file, given, inside)
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
    return RopeScaling(kind, **_stretch(kind, fields, inner)), theta


def _stretch(kind: str, fields: _Fields, inner: _Fields) -> dict[str, Any]:
    """The numbers of a kind of RoPE; what it does not read may be anything."""
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


def _yarn(inner: _Fields) -> dict[str, Any]:
    """The optional fields of "yarn" that are there."""
    numbers: dict[str, Any] = {}
    for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
        if inner.raw.get(name) is None:
            continue
        value = inner.number(name)
        if value or name == "attention_factor":  # 0 means the default, as null
            numbers[name] = value
    if "truncate" in inner:
        numbers["truncate"] = inner.flag("truncate", False)
    return numbers


def _longest(max_position: int, scaling: RopeScaling) -> int:
    """The longest context: what the stretched frequencies reach, as vLLM counts it.

    A linear factor stretches max_position_embeddings; yarn's stretches the original context; with
    llama3 max_position_embeddings is the stretched one already.
    """
    if scaling.kind == "linear":
        return int(max_position * scaling.factor)
    if scaling.kind == "yarn":
        return int(scaling.original_max_position * scaling.factor)
    return max_position


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no JSON object; the message names the file.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: no JSON object: it is {str(raw)[:80]!r}")
    return raw
