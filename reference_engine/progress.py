# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Progress bars on a terminal."""

from __future__ import annotations

import sys
from typing import Any


class _NoBar:
    """Takes the place of a bar where none is drawn."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int = 1) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


def bar(total: int, what: str, unit: str, *, shown: bool = True) -> Any:
    """A tqdm bar on standard error: a context manager with `update` and `set_postfix_str`.

    Nothing is drawn if standard error is not a terminal, or if tqdm (from the extra `models`) is
    not installed.

    Args:
      total: the number of units of work.
      what: the text before the bar.
      unit: the name of one unit.
      shown: False draws nothing.
    """
    if not shown or not sys.stderr.isatty():
        return _NoBar()
    try:
        import tqdm
    except ImportError:
        return _NoBar()
    return tqdm.tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False)
