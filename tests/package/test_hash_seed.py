# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A traced program does not depend on Python's hash seed, which differs from process to process.

The order of a set of names does. A program whose order of operations came from such a set would be
another one in each process, and never be found in jax's compilation cache.
"""

import hashlib
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_paged import TpuAttentionConfig, make_kv_pages, write_and_attend

_ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# Prints the program, and the order of a set.
_CHILD = "from tests.package.test_hash_seed import program; print(program(), *{'rows', 'columns'})"


def program() -> str:
    """A digest of the fused attention's program for a TPU: the op and the kernel."""
    device = AbstractDevice("TPU7x", 1, "tpu")
    q, k = (jax.ShapeDtypeStruct((16, *width), jnp.bfloat16) for width in ((2, 128), (128,)))
    pool = jax.eval_shape(
        lambda: make_kv_pages(4, 128, num_kv_heads=1, head_dim=128, dtype=jnp.bfloat16)
    )
    metadata = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, 1), (2,), (1,))]

    def step(*operands):
        config = TpuAttentionConfig(128, 128, 2, 1)
        return write_and_attend(*operands, sliding_window=9, config=config, backend="mosaic_tpu")

    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = str(jax.make_jaxpr(step)(q, k, k, pool, *metadata))
    assert "pallas_call" in text
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", text).encode()).hexdigest()


def test_the_program_is_the_same_for_every_hash_seed():
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            cwd=_ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(_ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    (first, *order), (second, *other_order) = (c.communicate()[0].split() for c in children)
    assert [child.returncode for child in children] == [0, 0]
    assert order == other_order[::-1] != other_order  # the seeds do change the order of a set
    assert first == second
