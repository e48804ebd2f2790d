# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Counts the compilations of XLA, and sets jax's persistent cache."""

from __future__ import annotations

import os
import pathlib
import threading
import warnings
from typing import Any

import jax

_counts = threading.local()  # threads that compile in the background do not count


def _count_compile(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _counts.num_compiles = num_compiles() + 1


# jax has no counter to read, but it reports the duration of every compilation to listeners.
jax.monitoring.register_event_duration_secs_listener(_count_compile)


def num_compiles() -> int:
    """The programs that this thread has compiled or read from the persistent cache.

    They count from the import of this module on.
    """
    return getattr(_counts, "num_compiles", 0)


def default_cache_folder() -> pathlib.Path:
    """Where compiled programs are kept by default: pallas_paged/xla in the user's cache folder.

    That is $XDG_CACHE_HOME, or ~/.cache.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "pallas_paged" / "xla"


def use_default_cache() -> None:
    """Keeps compiled programs in `default_cache_folder`, unless the caller has configured jax.

    Where jax has a folder already, or must not use its cache, nothing is changed. Where the folder
    cannot be made, a warning says so, and nothing is kept.
    """
    config: Any = jax.config  # its flags are attributes, which not every jax declares
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        use_persistent_cache(default_cache_folder())
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        warnings.warn(
            f"the default folder of compiled programs cannot be made ({error}), so that each"
            " process compiles anew; name another by compilation_cache",
            stacklevel=2,
        )


def use_persistent_cache(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, for this process and for later ones.

    The folder is made if it is missing. The cache is jax's own; from now on it keeps everything
    that the process compiles, however small.
    """
    os.makedirs(folder, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
