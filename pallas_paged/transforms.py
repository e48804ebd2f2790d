# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Transformations of an op: vmap and derivatives are refused, shard_map sees what varies."""

from typing import Any, NoReturn

import jax


def refuse_transforms(op: str, arrays: Any) -> Any:
    """Returns `arrays` as they are; differentiating or vmapping through them raises an error.

    `arrays` is a pytree of all that the op is given: a transformation of what is left out might go
    unnoticed. The rules belong to an identity function in front of the op, so that they also hold
    where the caller's own jit stands between the transformation and the op. Under a shard_map that
    checks what varies, all arrays vary alike afterwards.
    """

    @jax.custom_batching.custom_vmap
    def batched(arrays: Any) -> Any:
        return arrays

    @batched.def_vmap
    def _refuse_vmap(axis_size: int, in_batched: Any, arrays: Any) -> NoReturn:
        del axis_size, in_batched, arrays
        raise NotImplementedError(
            f"{op}: vmap is not supported: the op is batched already; pack the sequences into one "
            "ragged batch and the layers into one flat pool, or make one call after another in "
            "jax.lax.map"
        )

    @jax.custom_jvp
    def differentiated(arrays: Any) -> Any:
        return batched(arrays)

    @differentiated.defjvp
    def _refuse_jvp(primals: Any, tangents: Any) -> NoReturn:
        del primals, tangents
        raise NotImplementedError(
            f"{op}: no derivative is defined, it serves inference: keep it out of the function "
            "that is differentiated, or pass jax.lax.stop_gradient of its arguments (of its result "
            "it comes too late)"
        )

    return _vary_alike(differentiated(arrays))


def _vary_alike(arrays: Any) -> Any:
    """The arrays, each varying over every axis of a shard_map over which any of them varies.

    The results then vary over these axes too: where, say, only the page table differs from shard to
    shard, the results differ as well.
    """

    def axes_of(x: jax.Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(axes_of, jax.tree.leaves(arrays)))

    def vary(x: jax.Array) -> jax.Array:
        missing = axes - axes_of(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, arrays)
