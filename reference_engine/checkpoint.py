# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The tensors of a Hugging Face folder: which file holds which, and whether all are right.

Only headers and small JSON files are read here. Whatever is wrong is refused, by the name of the
file and of the tensor, before a parameter is read or memory is allocated for one. Which files are
read is as in transformers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from reference_engine.extras import import_extra
from reference_engine.json_fields import read_object

_FLOAT_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# The ending of buffers that old checkpoints hold beside their parameters.
_IGNORED = "rotary_emb.inv_freq"


def find_tensors(
    path: str | pathlib.Path,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    twins: Mapping[str, str] | None = None,
) -> dict[pathlib.Path, list[str]]:
    """Finds out which file holds which tensor, and checks the headers of all files.

    Args:
      path: the model's folder. It has model.safetensors or, without it, the files that
        model.safetensors.index.json names; other files in the folder are not read.
      wanted: name -> shape of every tensor that the model has.
      twins: name -> another name for the same tensor; the files may have either name, or both.

    Returns:
      File -> the names of the wanted tensors in it, twins included, in the file's order.

    Raises:
      OSError: there is no such folder or file.
      ValueError: a file is corrupt; or a tensor is missing, has another shape, has no float dtype,
        is in two files, or is not part of the model. The message names it.
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
    if name in index.places:  # either the index or the file is wrong
        source, what = index.places[name], f"{what}, though {source.name} says that it is here"
    if len(missing) > 1:
        what += f", and {len(missing) - 1} more"
    if name == "lm_head.weight":
        what += "; without it, config.json's `tie_word_embeddings` must be true"
    raise ValueError(f"{source}: {what}")


def open_safetensors(file: pathlib.Path) -> Any:
    """A context manager of a memory-mapped safetensors file.

    Raises:
      ValueError: the file is corrupt or cut short.
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
    """Where the tensors are."""

    source: pathlib.Path  # the file that says which tensors there are
    places: dict[str, pathlib.Path]  # tensor -> file, as an index says; empty without an index
    files: list[pathlib.Path]  # the files that hold the tensors


def _weight_map(folder: pathlib.Path) -> _WeightMap:
    """Finds the files as transformers does.

    The first that exists counts: the file that config.json names, model.safetensors, or the index
    of a model in multiple files.
    """
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
    """Whether this is the name of a file in the folder or below it."""
    path = pathlib.PurePath(name) if isinstance(name, str) else pathlib.PurePath("..")
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def first_dtype(folder: pathlib.Path) -> str | None:
    """The dtype of the first parameter by name, as transformers chooses it; None without a file.

    float64 means float32.

    Raises:
      ValueError: a file is corrupt, or no tensor has a float dtype.
    """
    try:
        files = _weight_map(folder).files
    except FileNotFoundError:
        return None
    for file in files:
        with open_safetensors(file) as tensors:
            for name in sorted(tensors.keys()):
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _FLOAT_DTYPES and not name.endswith(_IGNORED):
                    return _FLOAT_DTYPES[dtype]
    raise ValueError(f"{files[0]}: no tensor is one of {', '.join(_FLOAT_DTYPES)}")
