# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which backend runs an op: their names, their order per platform, and the only platform test."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_paged import scalars

Backend = Literal["auto", "oracle", "mosaic_tpu", "mosaic_gpu"]

BACKENDS = ("oracle", "mosaic_tpu", "mosaic_gpu")

# What "auto" tries, first to last. The oracle is plain jax.numpy and ends every list.
_AUTO_ORDER = {
    "tpu": ("mosaic_tpu", "oracle"),
    "gpu": ("mosaic_gpu", "oracle"),
    "cpu": ("oracle",),
}


def platform() -> str:
    """The platform that a call made now would run on: "tpu", "gpu" or "cpu"."""
    config: Any = jax.config  # has its flags as attributes that not every jax declares
    device = config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def tpu_generation() -> int | None:
    """The generation of the TPU that a call is traced for (7 for tpu7x), None elsewhere."""
    return pltpu.get_tpu_info().generation if pltpu.is_tpu_device() else None


def tpu_vmem_bytes() -> int | None:
    """VMEM of a core of the TPU that a call is traced for, None elsewhere."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else None


def tpu_device_kind() -> str | None:
    """What jax calls the TPU that a call is traced for ("TPU v6 lite"), None elsewhere."""
    if not pltpu.is_tpu_device():
        return None
    # Inside an ahead-of-time trace the mesh has the device and jax.devices() another.
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        config: Any = jax.config
        device = config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device.device_kind


def why_no_mosaic_gpu() -> str | None:
    """Why Mosaic GPU kernels cannot run a call made now, as a sentence; None if they can."""
    if jax.__version_info__ < (0, 11, 2):
        return (
            f"jax is {jax.__version__}, and a kernel can update a pool in place on a GPU (through "
            "jax.new_ref) from 0.11.2 on; update jax"
        )
    if platform() != "gpu":
        return None  # lowered for another machine, or interpreted
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        return (
            f"the GPU has compute capability {capability}, and the kernels are written for Hopper "
            "(9.0)"
        )
    return None


def gpu_device_kind() -> str | None:
    """What jax calls the GPU that a call is made for ("NVIDIA H100 80GB HBM3"), None elsewhere."""
    return jax.devices()[0].device_kind if platform() == "gpu" else None


def num_multiprocessors() -> int:
    """Multiprocessors of the GPU that a call is made for; those of an H100 elsewhere."""
    return jax.devices()[0].core_count if platform() == "gpu" else 132


def choose(op: str, backend: str, reasons: Mapping[str, str | None]) -> str:
    """Picks the backend of one call.

    Args:
      op: the op's name, for the message.
      backend: "auto" or the name of a backend. A named backend is used or refused, never replaced.
      reasons: for every backend, None where it runs this call or the sentence why it cannot.

    Returns:
      the backend's name.

    Raises:
      ValueError: `backend` is no backend's name.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> choose("page_write", "oracle", {"oracle": None})
    'oracle'
    """
    if isinstance(backend, str) and backend == "auto":
        order = _AUTO_ORDER.get(platform(), ("oracle",))
        return next(name for name in order if reasons.get(name) is None and name in reasons)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(
            f'{op}: backend is {scalars.show(backend)}; wanted "auto" or one of '
            f"{', '.join(map(repr, BACKENDS))}"
        )
    reason = reasons[backend]
    if reason is not None:
        raise NotImplementedError(f"{op}: backend {backend!r} cannot run this call: {reason}")
    return backend
