# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a part of `bench.engine` hands to the command."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part found.

    Attributes:
      record: its rows, for the JSON.
      rows: of the verdict.
      note: a sentence for the verdict: how the numbers came about.
      details: its rows, as tables.
    """

    record: Any
    rows: Sequence[dict[str, str]]
    note: str
    details: str
