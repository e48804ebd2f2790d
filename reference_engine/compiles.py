# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""How often XLA has compiled in this process, and where it keeps what it compiled."""

from __future__ import annotations

import os

import jax

_num_compiles = 0


def _count_compile(event: str, duration_secs: float, **_: str | int) -> None:
    global _num_compiles
    _num_compiles += event == "/jax/core/compile/backend_compile_duration"


# jax has no counter that could be read; every backend compile reports its duration here.
jax.monitoring.register_event_duration_secs_listener(_count_compile)


def num_compiles() -> int:
    """Programs compiled, or read from the persistent cache, since this module was imported."""
    return _num_compiles


def use_persistent_cache(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, for this process and later ones; made if missing.

    jax's own cache, for everything that the process compiles from here on, however small.
    """
    os.makedirs(folder, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
