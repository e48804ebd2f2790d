# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Packages that only some uses need; pyproject's and setup.cfg's extras install them."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(name: str, *, extra: str = "models", needed_by: str = "a model folder") -> Any:
    """Imports a module of a package that an extra installs.

    Args:
      name: the module, such as "tokenizers" or "jinja2.sandbox".
      extra: the extra of pallas-paged that installs it.
      needed_by: what needs it, for the error.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{needed_by} needs {package}, which is not installed:"
            f" pip install 'pallas-paged[{extra}]'"
        ) from error
