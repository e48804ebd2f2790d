# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Integer division that rounds up."""

from __future__ import annotations

from typing import Any


def ceil_div(a: Any, b: Any) -> Any:
    """The quotient of integers, or of arrays of them, rounded up.

    >>> ceil_div(33, 16)
    3
    """
    return -(-a // b)
