# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""JSON objects of files, whose fields are checked where they are read."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NoReturn


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file holds no JSON object; the message names the file.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: no JSON object: it is {str(raw)[:80]!r}")
    return raw


class Fields:
    """The fields of one JSON object of a file. Every error names the file and the field.

    A field that is null counts as missing.

    Attributes:
      file: the file.
      raw: the object.
    """

    def __init__(self, file: pathlib.Path, raw: Mapping[str, Any], name: str | None = None) -> None:
        """Reads nothing yet; `name` is the object's own field if it is inside another object."""
        self.file, self.raw, self._where = file, raw, f" (in `{name}`)" if name else ""

    def __contains__(self, name: str) -> bool:
        return name in self.raw

    def fail(self, name: str, wanted: str, fault: str = "") -> NoReturn:
        """Raises the ValueError that says what the field is and what was wanted."""
        value = self.raw.get(name)
        got = "is missing" if value is None else f"is {repr(value)[:200]}{fault}"
        raise ValueError(f"{self.file}: `{name}` {got}; wanted {wanted}{self._where}")

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number >= 1; the default if the field is missing."""
        value: Any = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, "an int >= 1", ", which is no int >= 1")
        return value

    def number(self, name: str, default: float | None = None, *, low: float = 0.0) -> float:
        """A finite number >= `low`; the default if the field is missing."""
        value: Any = self.raw.get(name)
        value = default if value is None else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= sys.float_info.max:
            kind = "finite number" if is_number else "number"
            self.fail(name, f"a finite number >= {low:g}", f", which is no {kind} >= {low:g}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false; the default if the field is missing."""
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def only(self, name: str, *served: Any) -> None:
        """Refuses values that are not among `served`; None there lets the field be missing."""
        value = self.raw.get(name)
        kind = isinstance(value, bool)
        if not any(value == one and kind == isinstance(one, bool) for one in served):
            raise ValueError(
                f"{self.file}: `{name}` is {repr(value)[:200]}; only {served[0]!r} is served"
                f"{self._where}"
            )
