# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The options of a write: api.py makes them once, and every backend takes them whole."""

import dataclasses
from typing import Any, NamedTuple

import jax


class WriteScales(NamedTuple):
    """The traced options: by what K and V are divided before an 8-bit pool stores them.

    Each is float32[] or float32[K]. None means 1.
    """

    k: jax.Array | None
    v: jax.Array | None


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """The static options: a call is compiled anew for each value of them.

    Attributes:
      backend: the name of the backend that runs the call.
      is_auto: whether `backend="auto"` chose it.
      config: the Config of that backend; None lets the backend choose its block sizes.
      num_kv_heads: K. A copy of pages has no k and v, and leaves it 0.
    """

    backend: str
    is_auto: bool
    config: Any
    num_kv_heads: int = 0
