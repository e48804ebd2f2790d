# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Runs small calls of the GPU kernels one by one, for NVIDIA's sanitizer to watch."""

import sys
from collections.abc import Callable, Mapping

import jax


def run(checks: Mapping[str, Callable[[], str | None]]) -> int:
    """The status to end with: 0 where all is right, 1 where not, 2 without a GPU.

    Args:
      checks: name -> makes a call and says what is wrong with its result, None if nothing is.
    """
    if jax.default_backend() != "gpu":
        print("this needs a GPU", file=sys.stderr)
        return 2
    status = 0
    for name, check in checks.items():
        found = check()
        print(f"{name}: {found or 'right'}", flush=True)
        status |= found is not None
    return status
