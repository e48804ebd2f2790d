# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Traced here, lowered for another machine: by that one's kernels, or refused by a sentence."""

import jax
import jax.numpy as jnp
import pytest

import pallas_paged
from bench.tpu_model.compile import as_if_on

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2"
)
Struct = jax.ShapeDtypeStruct
POOL, NEW = Struct((5, 8, 2, 128), jnp.bfloat16), Struct((8, 1, 128), jnp.bfloat16)
BATCH = [Struct(shape, jnp.int32) for shape in ((2,), (2, 2), (3,), (1,))]
CALLS = {
    "page_write": (POOL, NEW, NEW, Struct((1,), jnp.int32)),
    "slice_write": (POOL, NEW, NEW, Struct((3, 2), jnp.int32), Struct((1,), jnp.int32)),
    "token_write": (POOL, NEW, NEW, Struct((8,), jnp.int32)),
    "copy_pages": (POOL, Struct((1,), jnp.int32), Struct((1,), jnp.int32)),
    "gather_pages": (POOL, Struct((2,), jnp.int32)),
    "scatter_pages": (POOL, Struct((2,), jnp.int32), Struct((2, 8, 2, 128), jnp.bfloat16)),
    "ragged_paged_attention": (NEW, POOL, *BATCH),
    "write_and_attend": (NEW, NEW, NEW, POOL, *BATCH),
}


def _export(op, backend, *platforms):
    call = jax.jit(lambda *args: getattr(pallas_paged, op)(*args, backend=backend))
    kernels = ("tpu_custom_call", "mosaic_gpu_v2")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    exported = jax.export.export(call, platforms=platforms, disabled_checks=allowed)
    return exported(*CALLS[op]).mlir_module()


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("platforms", [("tpu",), ("cuda",), ("cpu", "tpu")], ids="-".join)
def test_auto_is_refused_for_another_platform(op, platforms):
    with pytest.raises(NotImplementedError, match=f'^{op}: backend "auto" chose .xla. because'):
        _export(op, "auto", *platforms)
    assert "custom_call" not in _export(op, "auto", "cpu")
    assert "custom_call" not in _export(op, "oracle", *platforms)  # who names it gets it


@pytest.mark.parametrize("op", CALLS)
def test_a_tpu_without_a_generation_is_refused(op):
    with pytest.raises(NotImplementedError, match=f"^{op}: .*generation.*use_abstract_mesh"):
        _export(op, "mosaic_tpu", "tpu")


@pytest.mark.parametrize("op", ["page_write", "copy_pages", "ragged_paged_attention"])
@pytest.mark.parametrize("backend", ["auto", "mosaic_tpu"])
def test_a_named_generation(op, backend):
    """ "auto" follows the device of the abstract mesh, too."""
    with as_if_on("v6e"):
        assert "@tpu_custom_call" in _export(op, backend, "tpu")


@needs_new_jax
@pytest.mark.parametrize("op", CALLS)
def test_for_cuda(op):
    assert "@mosaic_gpu_v2" in _export(op, "mosaic_gpu", "cuda")
    with pytest.raises(NotImplementedError, match=f"^{op}: .*for another kind of chip"):
        _export(op, "mosaic_gpu", "tpu")


def test_a_tpu_kernel_is_refused_for_a_gpu():
    with pytest.raises(NotImplementedError, match="for another kind of chip"):
        _export("copy_pages", "mosaic_tpu", "cuda")
