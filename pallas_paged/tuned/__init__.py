# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Block sizes that a benchmark chose, in one JSON file per kind of device, with their figures.

A file is `{op: [entry, ...]}`. An entry has the shape that it is for, its `config`, and what chose
it: predicted or measured figures, the versions of jax and libtpu, the commit and the date. Two
commands write the files: `python -m bench.tune_attention --write` for TPUs, and on a GPU
`python -m bench.tune_attention_gpu --write`.
"""

import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from typing import Any


def file_name(device_kind: str) -> str:
    """The name of the file for a kind of device, as jax names it.

    >>> file_name("TPU v5 lite")
    'TPU_v5_lite.json'
    """
    return device_kind.replace(" ", "_") + ".json"


@functools.cache
def entries(device_kind: str, op: str) -> tuple[Mapping[str, Any], ...]:
    """All entries of an op on a kind of device; none if there is no file."""
    file = importlib.resources.files(__name__).joinpath(file_name(device_kind))
    if not file.is_file():
        return ()
    return tuple(json.loads(file.read_text(encoding="utf-8")).get(op, ()))


def find(
    device_kind: str | None, op: str, *, page_size: int, **shape: Any
) -> Mapping[str, int] | None:
    """The block sizes of the entry for a shape, the one whose page size is nearest as a ratio.

    Args:
      device_kind: as jax names it; None finds nothing.
      op: the op's name.
      page_size: tokens in a page.
      shape: all other fields that the entry must have, with their values.

    Returns:
      The fields of the kernel's Config, or None if there is no such entry.
    """
    if device_kind is None:
        return None
    found = [
        entry
        for entry in entries(device_kind, op)
        if all(entry[name] == value for name, value in shape.items())
    ]
    if not found:
        return None
    nearest = min(found, key=lambda entry: abs(math.log2(entry["page_size"] / page_size)))
    return nearest["config"]
