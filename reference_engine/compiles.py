# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Counts the compilations of XLA in this process, and sets jax's persistent cache."""

from __future__ import annotations

import os

import jax

_num_compiles = 0


def _count_compile(event: str, duration_secs: float, **_: str | int) -> None:
    global _num_compiles
    _num_compiles += event == "/jax/core/compile/backend_compile_duration"


# jax has no counter to read, but it reports the duration of every compilation to listeners.
jax.monitoring.register_event_duration_secs_listener(_count_compile)


def num_compiles() -> int:
    """The programs compiled, or read from the persistent cache, since this module was imported."""
    return _num_compiles


def use_persistent_cache(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, for this process and for later ones.

    The folder is made if it is missing. The cache is jax's own; from now on it keeps everything
    that the process compiles, however small.
    """
    os.makedirs(folder, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
