# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Where block sizes that a benchmark found go: `pallas_paged/tuned/`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_paged import tuned


def write(device_kind: str, op: str, entry: Mapping[str, Any], shape: Sequence[str]) -> None:
    """Puts an entry into a device's file, in place of the one for the same shape.

    Args:
      device_kind: as jax names it.
      op: the op's name.
      entry: see `pallas_paged.tuned`.
      shape: the entry's fields that say what it is for.
    """
    path = pathlib.Path(tuned.__file__).parent / tuned.file_name(device_kind)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in shape)

    others = [old for old in table.get(op, []) if key(old) != key(entry)]
    table[op] = sorted([*others, entry], key=key)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
