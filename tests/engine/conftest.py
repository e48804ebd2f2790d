# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Compiles the engine's steps quickly, because each test needs programs of its own.

With jax 0.10 they compile in 0.4 of the time; see FAST_COMPILE for what is lost.
"""

import jax

from reference_engine import model
from tests.kv_write.cases import FAST_COMPILE

if jax.default_backend() == "cpu":
    model._COMPILER_OPTIONS["cpu"] = FAST_COMPILE
