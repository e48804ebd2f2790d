# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Gradients and vmap are refused by a sentence through every argument; empty batches are served."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged

BACKENDS = ["oracle", "mosaic_tpu"]
if jax.__version_info__ >= (0, 11, 2):
    BACKENDS.append("mosaic_gpu")
T, N, K, H = 4, 2, 1, 128


@functools.cache
def _arguments():
    """Of write_and_attend, every one that may be traced; an 8-bit pool, so that scales may be."""
    ids = functools.partial(jnp.asarray, dtype=jnp.int32)
    return {
        "q": jnp.ones((T, N, H), jnp.bfloat16),
        "k": jnp.ones((T, K, H), jnp.bfloat16),
        "v": jnp.ones((T, K, H), jnp.bfloat16),
        "kv_pages": jnp.ones((3, 8, 4, H), jnp.float8_e4m3fn),
        "kv_lens": ids([3, 0]),
        "page_indices": ids([[1], [2]]),
        "cu_q_lens": ids([0, 3, 3]),
        "num_seqs": ids([1]),
        "sm_scale": jnp.float32(0.1),
        "sliding_window": jnp.int32(2),
        "k_scale": jnp.float32(0.5),
        "v_scale": jnp.ones(K, jnp.float32),
        "sinks": jnp.zeros(N, jnp.float32),
    }


def _loss(op, name, backend):
    arguments = dict(_arguments())
    if op == "ragged_paged_attention":
        del arguments["k"], arguments["v"]

    def loss(x):
        call = getattr(pallas_paged, op)
        results = call(**arguments | {name: x}, num_kv_heads=K, backend=backend)
        return sum(y.astype(jnp.float32).sum() for y in jax.tree.leaves(results))

    return loss, arguments[name]


ATTENTION = ["ragged_paged_attention", "write_and_attend"]
ARGUMENTS = [
    (op, name)
    for op in ATTENTION
    for name in _arguments()
    if op == "write_and_attend" or name not in ("k", "v")
]
_INEXACT = ("q", "k", "v", "sm_scale", "k_scale", "v_scale", "sinks")
FLOATS = [(op, name) for op, name in ARGUMENTS if name in _INEXACT]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op, name", ARGUMENTS)
def test_vmap_of_one_argument(op, name, backend):
    loss, x = _loss(op, name, backend)
    with pytest.raises(NotImplementedError, match=f"^{op}: vmap is not supported: .*jax.lax.map"):
        jax.vmap(loss)(jnp.stack([x, x]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op, name", FLOATS)
def test_derivative_by_one_argument(op, name, backend):
    loss, x = _loss(op, name, backend)
    with pytest.raises(NotImplementedError, match=f"^{op}: no derivative is defined"):
        jax.grad(loss)(x)


def _in_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, length=2)[0]


WAYS = {
    "vjp": lambda f, x: jax.vjp(f, x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "hessian": lambda f, x: jax.hessian(f)(x),
    "grad of jit": lambda f, x: jax.grad(jax.jit(f))(x),
    "grad of scan": lambda f, x: jax.grad(_in_scan(f))(x),
    "grad of remat": lambda f, x: jax.grad(jax.checkpoint(f))(x),
    "grad of cond": lambda f, x: jax.grad(lambda x: jax.lax.cond(True, f, lambda _: 0.0, x))(x),
    "stopped too late": lambda f, x: jax.grad(lambda x: jax.lax.stop_gradient(f(x)))(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_derivative(way):
    loss, x = _loss("ragged_paged_attention", "sinks", "oracle")
    with pytest.raises(NotImplementedError, match="stop_gradient of its arguments"):
        WAYS[way](loss, x)


def test_what_the_sentences_advise_works():
    loss, x = _loss("ragged_paged_attention", "q", "oracle")
    stopped = jax.grad(lambda x: loss(jax.lax.stop_gradient(x)) + 3 * x.sum().astype(jnp.float32))
    assert (stopped(x) == 3).all() and (jax.jit(stopped)(x) == 3).all()
    stack = jnp.stack([x, 2 * x])
    wanted = [loss(y) for y in stack]
    assert jax.lax.map(loss, stack).tolist() == wanted
    assert jax.vmap(jax.custom_batching.sequential_vmap(loss))(stack).tolist() == wanted


@pytest.mark.parametrize("num_tokens, num_seqs", [(0, 0), (0, 1), (T, 0)])
@pytest.mark.parametrize("op", ATTENTION)
def test_batches_without_work(op, num_tokens, num_seqs):
    arguments = dict(_arguments()) | {"num_seqs": jnp.array([num_seqs], jnp.int32)}
    arguments |= {name: arguments[name][:num_tokens] for name in "qkv"}
    pool = jnp.array(arguments.pop("kv_pages"))
    before = np.asarray(pool).tobytes()
    if op == "ragged_paged_attention":
        del arguments["k"], arguments["v"]
    out, *rest, lse = getattr(pallas_paged, op)(
        kv_pages=pool, **arguments, num_kv_heads=K, return_lse=True, backend="oracle"
    )
    assert out.shape == (num_tokens, N, H) and out.dtype == jnp.bfloat16 and not out.any()
    assert lse.shape == (num_tokens, N) and jnp.isneginf(lse).all()
    assert all(np.asarray(x).tobytes() == before for x in rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("return_lse", [False, True])
def test_no_token_launches_nothing(op, backend, return_lse):
    arguments = dict(_arguments())
    arguments |= {name: arguments[name][:0] for name in "qkv"}
    if op == "ragged_paged_attention":
        del arguments["k"], arguments["v"]

    def call(arguments):
        return getattr(pallas_paged, op)(
            **arguments, num_kv_heads=K, return_lse=return_lse, backend=backend
        )

    jaxpr = str(jax.make_jaxpr(call)(arguments))
    assert "pallas_call" not in jaxpr and "mpmd_map" not in jaxpr
