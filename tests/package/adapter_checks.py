# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Checks of the adapters of docs/adapters.md, one a project and kind of call.

Each calls what the adapter has put into a stand-in for the project, as the project does. It raises
an AssertionError where the pool or the attention is not what numpy says.
"""

import dataclasses
import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    ragged_paged_attention as jax_attention,
)

from tests.package import adapter_stand_ins as stand_ins
from tests.package.adapter_batch import make_batch
from tests.package.adapter_stand_ins import Axis, NamedArray

PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / "docs/adapters.md"
BFLOAT16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def adapter(monkeypatch, sections, modules, planted=None):
    """The names after the code blocks of these sections.

    A planted fault (old, new) is put where `old` stands last.
    """
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    blocks = [
        block
        for section in sections
        for block in re.findall(r"^```python\n(.*?)^```$", texts[section], re.M | re.DOTALL)
    ]
    if len(blocks) != len(sections):
        raise LookupError(sections)
    code = "\n".join(blocks)
    if planted:
        old, new = planted
        before, found, after = code.rpartition(old)
        if not found:
            raise LookupError(old)
        code = before + new + after
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


SINKS = np.array([0.5, -np.inf, 2.0, 0.0], np.float32)


def check_jax(names, modules):
    b = make_batch(num_heads=4)
    found = names["ragged_paged_attention"](
        *map(jnp.asarray, (b.q, b.after, b.kv_lens, b.table, b.cu_q_lens)),
        jnp.array([b.num_seqs], jnp.int32),
        sm_scale=0.1,
        sliding_window=6,
        soft_cap=5.0,
        mask_value=inspect.signature(jax_attention).parameters["mask_value"].default,
        num_kv_pages_per_block=2,
        num_queries_per_block=8,
        vmem_limit_bytes=2**20,
    )
    b.expect(found, sm_scale=0.1, window=6, cap=5.0)


def check_levanter(names, modules, head_dim=128):
    b = make_batch(head_dim=head_dim)
    cache_type = modules["levanter.layers.kv_cache"].KvPageCache
    num_pages, page_size = b.before.shape[:2]
    spec = stand_ins.PageTableSpec(num_pages, page_size)
    cache = cache_type.init(spec, Axis("kv_head", 2), Axis("head_size", head_dim), jnp.float32)
    axes = cache.kv_pages.axes
    assert cache.kv_pages.array.shape == b.before.shape and axes[:3] == ("page", "slot", "kv_head")
    cache = dataclasses.replace(cache, kv_pages=NamedArray(jnp.array(b.before), axes))
    # A token that has no slot, and one behind the last that still has the slot of another token.
    dests = b.slots.copy()
    dests[0], dests[-1] = stand_ins.INVALID, dests[0]
    info = stand_ins.PageBatchInfo(
        NamedArray(jnp.asarray(b.table), ("seq", "page")),
        NamedArray(jnp.asarray(b.kv_lens), ("seq",)),
        NamedArray(jnp.asarray(b.cu_q_lens), ("seq",)),
        jnp.int32(b.num_seqs),
        NamedArray(jnp.asarray(dests), ("position",)),
        page_size,
    )
    new_axes = ("position", "kv_head", "head_size")
    cache = cache.update(info, *(NamedArray(jnp.asarray(x), new_axes) for x in (b.k, b.v)))
    page, row = divmod(b.slots[0], page_size)
    first, b.after[page, row] = b.after[page, row].copy(), b.before[page, row]
    b.expect_pool(cache.kv_pages.array)
    assert cache.kv_pages.axes == axes
    b.after[page, row] = first
    q = jnp.asarray(b.q).reshape(len(b.q), 2, 2, head_dim).swapaxes(1, 2)  # axes in another order
    out = modules["levanter.layers.attention"].ragged_paged_attention(
        NamedArray(q, ("position", "q_heads_per_group", "kv_head", "head_size")),
        NamedArray(jnp.asarray(b.after), axes),
        info.seq_lens,
        info.page_indices,
        info.cu_q_lens,
        info.num_seqs,
        sm_scale=0.1,
        soft_cap=5.0,
    )
    assert out.axes == ("position", "kv_head", "q_heads_per_group", "head_size")
    b.expect(out.array.reshape(b.q.shape), sm_scale=0.1, cap=5.0)


def mesh_of(num_devices, axis="model"):
    return jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), (axis,))


def call_tpu_inference(modules, b, pool, k, v, sinks=None, mesh=None, **options):
    """As its `attention` calls: positional up to the sinks, then by keyword."""
    interface = modules["tpu_inference.layers.common.attention_interface"]
    distribution = jnp.array([1, 1, b.num_seqs], jnp.int32)
    metadata = map(jnp.asarray, (b.kv_lens, b.table.reshape(-1), b.cu_q_lens))
    return interface.sharded_ragged_paged_attention(
        mesh or mesh_of(1), jnp.asarray(b.q), k, v, pool, *metadata, distribution, sinks, **options
    )


def check_tpu_inference(names, modules, head_dim=128):
    """A bfloat16 pool of five dimensions, sinks, a window; q_scale, which nothing may change."""
    b = make_batch(dtype=BFLOAT16, head_dim=head_dim)
    k, v = map(jnp.asarray, (b.k, b.v))
    pool = b.five(b.before)
    options = {"sm_scale": 0.1, "attention_chunk_size": 6, "q_scale": 0.25}
    out, found = call_tpu_inference(modules, b, pool, k, v, jnp.asarray(SINKS), **options)
    assert found.shape == b.five(b.after).shape
    b.expect_pool(found)
    b.expect(out, sm_scale=0.1, window=6, sinks=SINKS)


def check_tpu_inference_fp8(names, modules):
    """k and v are quantised before the call; then a call that only reads, without a mask."""
    scales = {"k_scale": 0.25, "v_scale": 0.5}
    b = make_batch(dtype=FP8, **scales)
    k, v = (
        jnp.asarray((x * np.float32(1 / scale)).astype(FP8))
        for x, scale in ((b.k, 0.25), (b.v, 0.5))
    )
    options = {"sm_scale": 0.1, "q_scale": 0.5, **scales}
    out, pool = call_tpu_inference(modules, b, b.five(b.before), k, v, **options)
    b.expect_pool(pool)
    b.expect(out, sm_scale=0.1)
    options |= {"update_kv_cache": False, "use_causal_mask": False}
    out, pool = call_tpu_inference(modules, b, pool, k * 0, v, **options)
    b.expect_pool(pool)
    b.expect(out, sm_scale=0.1, causal=False)


def check_tpu_inference_sharded(names, modules):
    """Two devices and one KV head, of which each gets a copy."""
    b = make_batch(num_kv_heads=2)
    b.k[:, 1], b.v[:, 1] = b.k[:, 0], b.v[:, 0]
    for pool in (b.before, b.after):
        pool[:, :, 2:] = pool[:, :, :2]
    for s, (num_new, length) in enumerate(b.lens):
        for x, new in zip(b.stored[s], (b.k, b.v), strict=True):
            x[:, 1] = x[:, 0]
            rows = slice(b.cu_q_lens[s], b.cu_q_lens[s + 1])
            np.testing.assert_array_equal(x[length - num_new :, 0], new[rows, 0])
    k, v = (jnp.asarray(x[:, :1]) for x in (b.k, b.v))
    options = {"sinks": jnp.asarray(SINKS), "mesh": mesh_of(2), "sm_scale": 0.1}
    out, pool = call_tpu_inference(modules, b, b.five(b.before), k, v, **options)
    b.expect_pool(pool)
    b.expect(out, sm_scale=0.1, sinks=SINKS)


def check_maxtext(names, modules):
    """As `forward_serve_vllm` calls the older function; its queries are scaled already."""
    b = make_batch(dtype=BFLOAT16)
    older = modules["tpu_inference.layers.jax.attention_interface"]
    rpa = older.sharded_ragged_paged_attention(1.0, mesh_of(1), 6, None, None, None)
    out, pool = rpa(
        jnp.asarray(b.q * np.float32(0.1)),
        *map(jnp.asarray, (b.k, b.v)),
        b.five(b.before),
        *map(jnp.asarray, (b.kv_lens, b.table.reshape(-1), b.cu_q_lens)),
        jnp.array([0, 0, b.num_seqs], jnp.int32),
    )
    b.expect_pool(pool)
    b.expect(out, sm_scale=0.1, window=6)


def call_sglang(modules, b, *, pool, sinks=None, custom_mask=None, **options):
    """As its backend: a flat list without gaps, with zeros behind it; lengths in whole pages."""
    page_size = b.before.shape[1]
    num_pages = [-(-length // page_size) for _, length in b.lens]
    flat = np.concatenate([b.table[s, :n] for s, n in enumerate(num_pages)])
    flat = np.pad(flat, (0, 16 - len(flat)))
    empty = np.zeros(len(b.table) - b.num_seqs, np.int32)  # sequences behind the last one
    kv_lens = np.concatenate([b.kv_lens[: b.num_seqs], empty])
    aligned = np.concatenate([np.array(num_pages) * page_size, empty])
    q_lens = np.concatenate([[n for n, _ in b.lens], empty])
    cu_q_lens, cu_kv_lens = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (q_lens, aligned))
    backend = modules["sgl_jax.srt.layers.attention.flashattention_backend"]
    return backend.ragged_paged_attention_v3(
        *map(jnp.asarray, (b.q, b.k, b.v)),
        pool,
        *map(jnp.asarray, (kv_lens, flat, cu_q_lens, cu_kv_lens)),
        jnp.array([0, b.num_seqs, b.num_seqs], jnp.int32),
        custom_mask,
        sinks,
        xai_temperature_len=None,
        softmax_dtype=jnp.bfloat16,
        mask_aligned_to_cu_kv=False,
        m_block_sizes=None,
        **options,
    )


def check_sglang(names, modules):
    assert names["MAX_PAGES"] == 2048
    names["MAX_PAGES"] = 4
    b = make_batch(dtype=BFLOAT16)
    options = {"causal": 1, "sm_scale": 1 / jnp.sqrt(128), "sliding_window": 6, "soft_cap": 5.0}
    out, pool = call_sglang(
        modules, b, pool=b.five(b.before), sinks=jnp.asarray(SINKS), q_scale=0.5, **options
    )
    assert pool.shape == b.five(b.after).shape
    b.expect_pool(pool)
    b.expect(out, sm_scale=128**-0.5, window=6, cap=5.0, sinks=SINKS)


def check_sglang_fp8(names, modules):
    """k and v come as the model made them. An encoder, whose window and cap of 0 mean none."""
    names["MAX_PAGES"] = 4
    b = make_batch(dtype=FP8, k_scale=0.25, v_scale=0.5)
    options = {"sm_scale": 0.1, "k_scale": 0.25, "v_scale": 0.5}
    options |= {"causal": 0, "sliding_window": 0, "soft_cap": 0.0}
    out, pool = call_sglang(modules, b, pool=b.five(b.before), **options)
    b.expect_pool(pool)
    b.expect(out, sm_scale=0.1, causal=False)


def entry(modules, name, platform, backend):
    registry = modules["ejkernel.kernels._registry"]
    return registry.kernel_registry.get(name, registry.Platform[platform], backend)


def check_ejkernel_v2(names, modules):
    b = make_batch()
    kernel = entry(modules, "ragged_page_attention_v2", "XLA", "cpu")
    arrays = tuple(map(jnp.asarray, (b.q, b.after, b.kv_lens, b.table, b.cu_q_lens)))
    sinks = jnp.asarray(SINKS)
    for count in (b.num_seqs, jnp.int32(b.num_seqs), jnp.array([b.num_seqs], jnp.int32)):
        out = kernel(*arrays, count, sliding_window=6, softmax_aux=sinks, logits_soft_cap=5.0)
        b.expect(out, sm_scale=128**-0.5, window=6, cap=5.0, sinks=SINKS)


def check_ejkernel_v3(names, modules, head_dim=128):
    b = make_batch(dtype=BFLOAT16, head_dim=head_dim)
    kernel = entry(modules, "ragged_page_attention_v3", "PALLAS", "tpu")
    out, pool = kernel(
        *map(jnp.asarray, (b.q, b.k, b.v)),
        b.five(b.before),
        *map(jnp.asarray, (b.kv_lens, b.table.reshape(-1), b.cu_q_lens)),
        jnp.array([1, 1, b.num_seqs], jnp.int32),
        jnp.asarray(SINKS),
        softmax_scale=0.1,
        sliding_window=6,
        logits_soft_cap=5.0,
        q_scale=0.5,
        chunk_prefill_size=8,
    )
    b.expect_pool(pool)
    b.expect(out, sm_scale=0.1, window=6, cap=5.0, sinks=SINKS)


TPU_INFERENCE = (["tpu-inference"], stand_ins.make_tpu_inference)
SGLANG = (["sglang-jax"], stand_ins.make_sglang)
EJKERNEL = (["EasyDeL and ejkernel"], stand_ins.make_ejkernel)
LEVANTER = (["Levanter"], stand_ins.make_levanter)


def check_torch_xla(names, modules):
    b = make_batch(num_heads=4)
    arrays = map(jnp.asarray, (b.q, b.after, b.kv_lens, b.table, b.cu_q_lens))
    arrays = [*arrays, jnp.array([b.num_seqs], jnp.int32)]
    arrays = [stand_ins.TorchTensor(x) for x in arrays]
    options = {"sm_scale": 0.1, "sliding_window": 6, "soft_cap": 5.0, "mask_value": -1e30}
    for _ in range(2):
        found = names["ragged_paged_attention"](*arrays, **options, num_queries_per_block=8)
        b.expect(found.array, sm_scale=0.1, window=6, cap=5.0)
    assert len(modules["torch_xla.core.xla_builder"].traced) == 1
    b.expect(names["ragged_paged_attention"](*arrays).array, sm_scale=1.0)


JAX = (["jax's own op"], dict)
TORCH_XLA = (["torch_xla"], stand_ins.make_torch_xla)
MAXTEXT = (["tpu-inference", "MaxText"], stand_ins.make_tpu_inference)
PROJECTS = {
    check_jax: JAX,
    check_levanter: LEVANTER,
    check_tpu_inference: TPU_INFERENCE,
    check_tpu_inference_fp8: TPU_INFERENCE,
    check_tpu_inference_sharded: TPU_INFERENCE,
    check_maxtext: MAXTEXT,
    check_sglang: SGLANG,
    check_sglang_fp8: SGLANG,
    check_ejkernel_v2: EJKERNEL,
    check_ejkernel_v3: EJKERNEL,
    check_torch_xla: TORCH_XLA,
}
