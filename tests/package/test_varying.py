# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Under a shard_map that checks what varies, any one argument may be a shard's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import pallas_paged

T, N, K, H = 4, 2, 1, 128
BATCH = ("kv_lens", "page_indices", "cu_q_lens", "num_seqs")
NUMBERS = ("sm_scale", "sliding_window", "k_scale", "v_scale", "sinks")
WRITE = ("kv_pages", "k", "v", "k_scale", "v_scale")
OPS = {
    "ragged_paged_attention": ("q", "kv_pages", *BATCH, *NUMBERS),
    "write_and_attend": ("q", "k", "v", "kv_pages", *BATCH, *NUMBERS),
    "page_write": (*WRITE, "page_ids", "token_starts"),
    "slice_write": (*WRITE, "slices", "num_slices"),
    "token_write": (*WRITE, "slots"),
    "copy_pages": ("kv_pages", "src_ids", "dst_ids"),
    "gather_pages": ("kv_pages", "page_ids"),
    "scatter_pages": ("kv_pages", "page_ids", "pages"),
}


@functools.cache
def _arguments():
    """Two values of every argument: each of the two shards has its own."""
    rng = np.random.default_rng(0)

    def new(*shape):
        return jnp.asarray(rng.normal(size=(2, *shape)), jnp.bfloat16)

    def ids(*values):
        return jnp.asarray(values, jnp.int32)

    return {
        "q": new(T, N, H),
        "k": new(T, K, H),
        "v": new(T, K, H),
        "kv_pages": new(4, 8, 4, H).astype(jnp.float8_e4m3fn),
        "kv_lens": ids([3, 9], [6, 10]),
        "page_indices": ids([[1, 0], [2, 3]], [[0, 1], [3, 2]]),
        "cu_q_lens": ids([0, 3, 4], [0, 2, 4]),
        "num_seqs": ids([2], [1]),
        "sm_scale": jnp.array([0.1, 0.3], jnp.float32),
        "sliding_window": ids(4, 2),
        "k_scale": jnp.array([0.5, 2.0], jnp.float32),
        "v_scale": jnp.array([[0.5], [2.0]], jnp.float32),
        "sinks": jnp.array([[0.0, 1.0], [2.0, -1.0]], jnp.float32),
        "page_ids": ids([1], [2]),
        "token_starts": ids([0], [-1]),
        "slices": ids([[0, 9], [0, 1], [1, 2]], [[5, 9], [2, 1], [1, 2]]),
        "num_slices": ids([2], [1]),
        "slots": ids([0, 1, 2, 9], [3, 1, 8, -1]),
        "pages": new(1, 8, 4, H).astype(jnp.float8_e4m3fn),
        "src_ids": ids([0], [1]),
        "dst_ids": ids([3], [2]),
    }


@pytest.mark.parametrize("op", OPS)
def test_one_argument_that_varies(op):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    names = OPS[op]
    num_kv_heads = {} if op.endswith("_pages") else {"num_kv_heads": K}
    # A page takes eight tokens.
    if op == "page_write":
        arguments = _arguments() | {n: jnp.tile(_arguments()[n], (1, 2, 1, 1)) for n in "kv"}
    else:
        arguments = _arguments()

    def call(backend, values):
        results = getattr(pallas_paged, op)(**values, **num_kv_heads, backend=backend)
        return jax.tree.map(lambda x: x[None], results)

    oracle = jax.jit(functools.partial(call, "oracle"))
    same = {name: arguments[name][0] for name in names}
    # An attention is slow to compile: an array of each kind.
    few = ("page_indices", "sm_scale")
    for name in few if "q" in names else names:
        own = [same | {name: arguments[name][shard]} for shard in range(2)]
        wanted = [oracle(jax.tree.map(jnp.copy, values)) for values in own]

        def shard(x, rest, name=name):
            return call("oracle", rest | {name: x[0]})

        spec = PartitionSpec("x")
        sharded = jax.shard_map(shard, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
        found = jax.jit(sharded)(arguments[name], same)
        for got, *want in zip(*map(jax.tree.leaves, (found, *wanted)), strict=True):
            np.testing.assert_array_equal(
                np.asarray(got, np.float32), np.concatenate(want).astype(np.float32), name
            )
    # And a kernel's result varies, too, of which jax sees no more than is said: one replicated is
    # refused. (Once an op, as each is a trace.)
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(
            jax.shard_map(
                lambda x, rest: call("mosaic_tpu", rest | {names[-1]: x[0]}),
                mesh=mesh,
                in_specs=(PartitionSpec("x"), PartitionSpec()),
                out_specs=PartitionSpec(),
            ),
            arguments[names[-1]],
            same,
        )
