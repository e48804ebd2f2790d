# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the public writes and the moves of pages share: backends, configs, the jitted halves."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from pallas_paged import checks, dispatch, forms, settings, transforms
from pallas_paged.kv_write import oracle
from pallas_paged.kv_write.gpu import launch as mosaic_gpu
from pallas_paged.kv_write.options import WriteOptions
from pallas_paged.kv_write.tpu import launch as mosaic_tpu

Config = mosaic_tpu.TpuWriteConfig | mosaic_gpu.GpuWriteConfig
_KERNELS: dict[str, ModuleType] = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}
# XLA's scatter, by which the oracle says what a write means, is also the best that XLA does.
BACKENDS: dict[str, ModuleType] = {"oracle": oracle, "xla": oracle, **_KERNELS}
_CONFIGS = {"mosaic_tpu": mosaic_tpu.TpuWriteConfig, "mosaic_gpu": mosaic_gpu.GpuWriteConfig}


def require_same_form(op: str, argument: str, x: Any, other_argument: str, other: Any) -> None:
    """Refuses an argument that is no int32[n], or has another n than the other argument."""
    checks.require_int32(op, argument, x, 1, "[n]")
    checks.require(
        x.shape == other.shape,
        op,
        argument,
        got=checks.describe(x),
        wanted=f"{checks.describe(other)}, as {other_argument}",
        hint="the two are read in pairs",
    )


def plan(name: str, refusal_of: Callable[[ModuleType], str | None]) -> dispatch.Plan:
    """Whether a backend runs a write; those without kernels run every write."""
    return dispatch.Plan(refusal=refusal_of(_KERNELS[name]) if name in _KERNELS else None)


def require_config(op: str, config: Any, backend: str) -> None:
    """Refuses a Config of another backend than the one that runs; the oracle takes any."""
    configs = (_CONFIGS[backend],) if backend in _CONFIGS else tuple(_CONFIGS.values())
    checks.require(
        config is None or isinstance(config, configs),
        op,
        "config",
        got=checks.describe(config),
        wanted="None or the block sizes of a write",
        hint="pass a " + " or a ".join(f"pallas_paged.{c.__name__}" for c in configs),
    )


# The jitted halves of the ops. The options are static, so that a call is compiled anew for each
# value of them; jax's own settings change nothing about it.


def in_place(half: Any) -> Any:
    """Jits a half that returns the pool that it takes, and donates that alone."""

    @functools.wraps(half)
    def in_rows(kv_pages: jax.Array, *args: Any) -> jax.Array:
        return forms.split_rows(half(forms.merge_rows(kv_pages), *args), kv_pages)

    jitted = jax.jit(in_rows, static_argnames="options", donate_argnames="kv_pages")
    return settings.independent()(jitted)


def reading(half: Any) -> Any:
    """Jits a half that returns pages of the pool that it takes; nothing is donated."""

    @functools.wraps(half)
    def in_rows(kv_pages: jax.Array, *args: Any) -> jax.Array:
        pages = half(forms.merge_rows(kv_pages), *args)
        return pages.reshape(pages.shape[0], *kv_pages.shape[1:])

    return settings.independent()(jax.jit(in_rows, static_argnames="options"))


def refuse(op: str, options: WriteOptions, *arrays: Any) -> tuple[Any, ...]:
    """The arrays as they are; gradients, vmap and a lowering for another platform are refused."""
    kv_pages, *rest = transforms.refuse_transforms(op, arrays)
    return dispatch.require_lowering(op, options.backend, options.is_auto, kv_pages), *rest
