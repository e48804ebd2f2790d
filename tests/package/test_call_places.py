# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A call is right wherever it stands in a program, and what was not donated stays as it was.

On a GPU the kernels run there (`JAX_PLATFORMS=cuda pytest tests/package/test_call_places.py`); on a
CPU the oracle.
"""

import functools

import jax
import numpy as np
import pytest

from tests.package import call_places

ON_GPU = jax.default_backend() == "gpu"
BACKEND = "mosaic_gpu" if ON_GPU else "oracle"
OPS = call_places.ops(BACKEND)
PLACES = dict(call_places.PLACES)
if not ON_GPU:  # the oracle is plain XLA, which no place has ever spoiled: one of each kind
    PLACES = {name: PLACES[name] for name in ("scan_of_stacked", "fori")}


@functools.cache
def _arrays():
    return call_places.make_arrays()


def _bits(tree):
    return [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(tree)]


@functools.cache
def _wanted(op):
    names, call = OPS[op]
    return _bits(call_places.plain(call, tuple(_arrays()[name] for name in names)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_as_plain_calls(op, place):
    names, call = OPS[op]
    arrays = tuple(_arrays()[name] for name in names)
    before = _bits(arrays)
    results = jax.jit(functools.partial(PLACES[place], call))(arrays)
    for found, wanted in zip(_bits(results), _wanted(op), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(_bits(arrays), before, strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg="an input changed")


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op][0][0] == "kv_pages"])
def test_donated_stack_of_pools(op):
    """The stack itself may be given away: the results are the same."""
    names, call = OPS[op]
    arrays = tuple(_arrays()[name] for name in names)
    stack = jax.numpy.array(arrays[0])
    run = jax.jit(
        lambda stack, *rest: PLACES["scan_of_stacked"](call, (stack, *rest)), donate_argnums=0
    )
    for found, wanted in zip(_bits(run(stack, *arrays[1:])), _wanted(op), strict=True):
        np.testing.assert_array_equal(found, wanted)
