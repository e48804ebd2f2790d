# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Places in a program where a call of an op may stand, and every op as a function of its arrays.

Sizes make every slice of a layer a multiple of 128 bytes, which is what XLA for GPUs fuses.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_paged as pp

NUM_LAYERS = 3
NUM_PAGES, PAGE_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 24, 16, 4, 2, 128
NUM_TOKENS, MAX_SEQS, TABLE_WIDTH = 64, 32, 8


def make_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Every array of every op, stacked over layers; each layer's values are its own.

    Sequences: a decode, a prefill of 37 tokens, a decode that opens a page, and rows of nobody.
    """
    rng = np.random.default_rng(seed)
    num = NUM_LAYERS
    q_lens, kv_lens = [1, 37, 1], [50, 70, 17]
    pages_of = rng.permuted(np.tile(np.arange(NUM_PAGES), (num, 1)), axis=1)
    lens = np.zeros((num, MAX_SEQS), np.int32)
    lens[:, :3] = kv_lens
    table = np.full((num, MAX_SEQS, TABLE_WIDTH), -1, np.int32)
    for seq, first in enumerate((0, 8, 16)):
        table[:, seq] = pages_of[:, first : first + TABLE_WIDTH]
    cu_q_lens = np.zeros((num, MAX_SEQS + 32), np.int32)[:, : MAX_SEQS + 1]
    cu_q_lens[:, 1:4] = np.cumsum(q_lens)
    num_slots = NUM_PAGES * PAGE_SIZE
    slots = np.stack([rng.permutation(num_slots)[:NUM_TOKENS] for _ in range(num)])
    page_ids = np.full((num, 32), -1)
    page_ids[:, :4] = pages_of[:, :4]
    slices = np.zeros((num, 3, 32))
    slices[:, 0, :4] = pages_of[:, :4] * PAGE_SIZE + 3
    slices[:, 1, :4] = [0, 20, 30, 50]
    slices[:, 2, :4] = [5, 9, 1, 13]
    src_ids, dst_ids = np.full((2, num, 32), -1)
    src_ids[:, :3], dst_ids[:, :3] = pages_of[:, :3], pages_of[:, 5:8]

    def values(*shape):
        return jnp.asarray(rng.standard_normal((num, *shape)), jnp.bfloat16)

    arrays = {
        "kv_pages": values(NUM_PAGES, PAGE_SIZE, 2 * NUM_KV_HEADS, HEAD_DIM),
        "q": values(NUM_TOKENS, NUM_HEADS, HEAD_DIM),
        "k": values(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM),
        "v": values(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM),
        "metadata": tuple(
            jnp.asarray(x, jnp.int32) for x in (lens, table, cu_q_lens, np.full((num, 1), 3))
        ),
        "slots": jnp.asarray(slots, jnp.int32),
        "page_ids": jnp.asarray(page_ids, jnp.int32),
        "slices": jnp.asarray(slices, jnp.int32),
        "num_slices": jnp.full((num, 1), 4, jnp.int32),
        "src_ids": jnp.asarray(src_ids, jnp.int32),
        "dst_ids": jnp.asarray(dst_ids, jnp.int32),
    }
    qkv = jnp.concatenate([arrays["q"], arrays["k"], arrays["v"]], axis=2)
    return arrays | {"qkv": qkv}


def ops(backend: str) -> dict[str, tuple[tuple[str, ...], Callable[..., Any]]]:
    """Name -> (names of the arrays that it takes, the call)."""
    options: dict[str, Any] = {"num_kv_heads": NUM_KV_HEADS, "backend": backend}
    attention = {"sm_scale": 0.1, **options}

    def attend(q, kv_pages, metadata, **more):
        return pp.ragged_paged_attention(q, kv_pages, *metadata, **attention, **more)

    def write_and_attend(q, k, v, kv_pages, metadata):
        return pp.write_and_attend(q, k, v, kv_pages, *metadata, **attention)

    def packed(qkv, kv_pages, metadata):
        return write_and_attend(qkv, None, None, kv_pages, metadata)

    def move(kv_pages, src_ids, dst_ids):
        pages = pp.gather_pages(kv_pages, src_ids, backend=backend)
        return pp.scatter_pages(kv_pages, dst_ids, pages, backend=backend)

    new = ("kv_pages", "k", "v")
    batch = ("q", "kv_pages", "metadata")
    return {
        "attention": (batch, attend),
        "attention_lse": (batch, functools.partial(attend, return_lse=True)),
        "write_and_attend": (("q", "k", "v", "kv_pages", "metadata"), write_and_attend),
        "packed_qkv": (("qkv", "kv_pages", "metadata"), packed),
        "token_write": ((*new, "slots"), functools.partial(pp.token_write, **options)),
        "page_write": ((*new, "page_ids"), functools.partial(pp.page_write, **options)),
        "slice_write": (
            (*new, "slices", "num_slices"),
            functools.partial(pp.slice_write, **options),
        ),
        "copy_pages": (
            ("kv_pages", "src_ids", "dst_ids"),
            functools.partial(pp.copy_pages, backend=backend),
        ),
        "gather_and_scatter": (("kv_pages", "src_ids", "dst_ids"), move),
    }


# ---- Places. Each is `place(call, stacked arrays) -> stacked results`.


def _layer(arrays, i):
    return jax.tree.map(lambda x: x[i], arrays)


def plain(call, arrays):
    """A layer after another, each of arrays of its own: what all others are compared with."""
    copies = [jax.tree.map(lambda x, i=i: jnp.array(x[i]), arrays) for i in range(NUM_LAYERS)]
    results = [call(*copy) for copy in copies]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


def _scan_of_stacked(call, arrays):
    return lax.scan(lambda c, x: (c, call(*x)), 0, arrays)[1]


def _scan_of_one(call, arrays):
    """ys alone are slices; layer 0's arrays are closed over."""
    first = _layer(arrays, 0)
    results = lax.scan(lambda c, _: (c, call(*first)), 0, jnp.arange(NUM_LAYERS))[1]
    # The other layers plainly, so that the results are those of every layer.
    rest = [call(*_layer(arrays, i)) for i in range(1, NUM_LAYERS)]
    return jax.tree.map(lambda x, *y: jnp.stack([x[-1], *y]), results, *rest)


def _scan_unrolled(call, arrays):
    return lax.scan(lambda c, x: (c, call(*x)), 0, arrays, unroll=NUM_LAYERS)[1]


def _map(call, arrays):
    return lax.map(lambda x: call(*x), arrays)


def _empty_results(call, arrays):
    results = jax.eval_shape(call, *_layer(arrays, 0))
    return jax.tree.map(lambda x: jnp.zeros((NUM_LAYERS, *x.shape), x.dtype), results)


def _set_layer(results, i, new):
    return jax.tree.map(lambda x, y: x.at[i].set(y), results, new)


def _fori(call, arrays):
    """Traced indices in and out."""

    def body(i, results):
        return _set_layer(results, i, call(*_layer(arrays, i)))

    return lax.fori_loop(0, NUM_LAYERS, body, _empty_results(call, arrays))


def _while(call, arrays):
    def body(state):
        i, results = state
        return i + 1, _set_layer(results, i, call(*_layer(arrays, i)))

    start = jnp.int32(0), _empty_results(call, arrays)
    return lax.while_loop(lambda state: state[0] < NUM_LAYERS, body, start)[1]


def _cond(call, arrays):
    """Each layer in one of two branches, inside of a scan."""

    def body(carry, x):
        i, arrays = x
        return carry, lax.cond(i % 2 == 0, call, lambda *y: call(*y), *arrays)

    return lax.scan(body, 0, (jnp.arange(NUM_LAYERS), arrays))[1]


def _constant_indices(call, arrays):
    results = _empty_results(call, arrays)
    for i in range(NUM_LAYERS):
        results = _set_layer(results, i, call(*_layer(arrays, i)))
    return results


def _shard_map(call, arrays):
    """Every device has all layers and scans over them."""
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    spec = jax.sharding.PartitionSpec()
    scan = functools.partial(_scan_of_stacked, call)
    return jax.shard_map(scan, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(arrays)


def _dynamic_update_slice(call, arrays):
    results = _empty_results(call, arrays)
    for i in range(NUM_LAYERS):
        new = call(*(jax.tree.map(lambda x, i=i: lax.dynamic_index_in_dim(x, i, 0, False), arrays)))
        results = jax.tree.map(
            lambda x, y, i=i: lax.dynamic_update_index_in_dim(x, y, i, 0), results, new
        )
    return results


PLACES = {
    "scan_of_stacked": _scan_of_stacked,
    "scan_of_one": _scan_of_one,
    "scan_unrolled": _scan_unrolled,
    "map": _map,
    "fori": _fori,
    "while": _while,
    "cond": _cond,
    "constant_indices": _constant_indices,
    "shard_map": _shard_map,
    "dynamic_update_slice": _dynamic_update_slice,
}
