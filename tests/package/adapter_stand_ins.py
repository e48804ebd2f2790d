# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Stand-ins for the projects of docs/adapters.md: their names, signatures and ways to call.

Each `make_*` returns modules by name. The functions that an adapter replaces raise here.
"""

import dataclasses
import enum
import types
import weakref
from typing import Any

import jax
import jax.numpy as jnp


def _modules(**by_name: Any) -> dict[str, types.ModuleType]:
    """Modules with these attributes, and their parents; a `__` in a name stands for a dot."""
    modules: dict[str, types.ModuleType] = {}
    for name, attributes in by_name.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in modules:
                modules[path] = types.ModuleType(path)
                if i > 1:
                    setattr(modules[".".join(parts[: i - 1])], parts[i - 1], modules[path])
        vars(modules[".".join(parts)]).update(attributes)
    return modules


# jax


def jax_op(
    q,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    *,
    sm_scale=1.0,
    sliding_window=None,
    soft_cap=None,
    mask_value=None,
    k_scale=None,
    v_scale=None,
    num_kv_pages_per_block=None,
    num_queries_per_block=None,
    vmem_limit_bytes=None,
):
    raise NotImplementedError


# Levanter

INVALID = 7  # Levanter's is 2,000,000; this one is a slot of the tests' pools


@dataclasses.dataclass(frozen=True)
class NamedArray:
    array: Any
    axes: tuple[str, ...]

    def rearrange(self, axes):
        order = [self.axes.index(axis) for axis in axes]
        return NamedArray(jnp.transpose(self.array, order), tuple(axes))


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int


@dataclasses.dataclass(frozen=True)
class PageTableSpec:
    num_pages: int
    page_size: int


@dataclasses.dataclass(frozen=True)
class PageBatchInfo:
    page_indices: NamedArray
    seq_lens: NamedArray
    cu_q_lens: NamedArray
    num_seqs: Any  # int32[]
    new_token_dests: NamedArray
    page_size: int

    @property
    def num_new_tokens(self):
        return self.cu_q_lens.array[self.num_seqs]


def levanter_attention(
    q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=1.0, soft_cap=None
):
    raise NotImplementedError


def make_levanter():
    @dataclasses.dataclass(frozen=True)
    class KvPageCache:
        kv_pages: NamedArray

        @staticmethod
        def init(spec, kv_heads, head_size, dtype=jnp.float32):
            raise NotImplementedError

        def update(self, batch_info, new_k, new_v):
            raise NotImplementedError

    def is_valid(x, invalid=INVALID):
        return (x >= 0) & (x != invalid)

    return _modules(
        haliax={"NamedArray": NamedArray, "named": NamedArray},
        levanter__inference__utils={"INVALID": INVALID, "is_valid": is_valid},
        levanter__layers__attention={"ragged_paged_attention": levanter_attention},
        levanter__layers__kv_cache={"KvPageCache": KvPageCache},
    )


# tpu-inference and MaxText


def tpu_inference_attention(
    mesh,
    q,
    k,
    v,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    attention_sink,
    sm_scale,
    attention_chunk_size=None,
    q_scale=None,
    k_scale=None,
    v_scale=None,
    update_kv_cache=True,
    use_causal_mask=True,
):
    raise NotImplementedError


def older_tpu_inference_attention(
    sm_scale, mesh, attention_chunk_size=None, q_scale=None, k_scale=None, v_scale=None
):
    raise NotImplementedError


def make_tpu_inference():
    class ShardingAxisName:
        ATTN_DATA = ("data",)
        ATTN_HEAD = ("model",)
        KV_HEAD = ("model",)

    def get_mesh_shape_product(mesh, axes):
        product = 1
        for axis in axes:
            product *= mesh.shape.get(axis, 1)
        return product

    return _modules(
        tpu_inference__layers__common__attention_interface={
            "sharded_ragged_paged_attention": tpu_inference_attention
        },
        tpu_inference__layers__common__sharding={"ShardingAxisName": ShardingAxisName},
        tpu_inference__layers__jax__attention_interface={
            "sharded_ragged_paged_attention": older_tpu_inference_attention
        },
        tpu_inference__utils={"get_mesh_shape_product": get_mesh_shape_product},
    )


# sglang-jax


def sglang_attention(
    queries,
    keys,
    values,
    kv_cache_fused,
    kv_lens,
    page_indices,
    cu_q_lens,
    cu_kv_lens,
    distribution,
    custom_mask,
    attention_sink=None,
    *,
    causal=1,
    sm_scale=1.0,
    sliding_window=None,
    soft_cap=None,
    q_scale=None,
    k_scale=None,
    v_scale=None,
    xai_temperature_len=None,
    softmax_dtype=None,
    mask_aligned_to_cu_kv=False,
    m_block_sizes=None,
):
    raise NotImplementedError


def make_sglang():
    return _modules(
        sgl_jax__srt__layers__attention__flashattention_backend={
            "ragged_paged_attention_v3": sglang_attention
        }
    )


# torch_xla


def torch_xla_op(
    q,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    sm_scale=1.0,
    sliding_window=None,
    soft_cap=None,
    mask_value=None,
    use_kernel=True,
    num_kv_pages_per_block=None,
    num_queries_per_block=None,
    vmem_limit_bytes=None,
):
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """No array of jax: only `call_jax` makes one of it."""

    array: Any


def make_torch_xla():
    traced = weakref.WeakKeyDictionary()  # as torch_xla's cache: by function, weakly

    def call_jax(jax_func, args, kwargs=None, name=None):
        assert not kwargs and all(isinstance(x, TorchTensor) for x in args)
        jitted = traced.setdefault(jax_func, jax.jit(jax_func))
        return TorchTensor(jitted(*(x.array for x in args)))

    return _modules(torch_xla__core__xla_builder={"call_jax": call_jax, "traced": traced})


# ejkernel


def ejkernel_v2(
    queries,
    kv_pages,
    context_lens,
    block_tables,
    query_start_loc,
    num_seqs,
    *,
    softmax_scale=None,
    logits_soft_cap=None,
    compute_dtype=jnp.bfloat16,
    optimized=False,
    sliding_window=None,
    softmax_aux=None,
    mask_value=None,
    num_kv_pages_per_block=None,
    num_queries_per_block=None,
    vmem_limit_bytes=None,
    num_warps=None,
    num_stages=None,
):
    raise NotImplementedError


def ejkernel_v3(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    block_tables,
    query_start_loc,
    distribution,
    softmax_aux=None,
    *,
    softmax_scale=1.0,
    sliding_window=None,
    logits_soft_cap=None,
    q_scale=None,
    k_scale=None,
    v_scale=None,
    chunk_prefill_size=None,
    num_kv_pages_per_block=None,
    num_queries_per_block=None,
    vmem_limit_bytes=None,
):
    raise NotImplementedError


class Registry:
    """Of several entries that fit, the one with the highest priority is taken."""

    def __init__(self):
        self.entries = []

    def register(self, algorithm, platform, backend, priority=0):
        def add(function):
            self.entries.append((priority, algorithm, platform, backend, function))
            self.entries.sort(key=lambda entry: -entry[0])
            return function

        return add

    def get(self, algorithm, platform, backend):
        for _, name, its_platform, its_backend, function in self.entries:
            if (
                name == algorithm
                and its_platform == platform
                and its_backend.value in (backend, "any")
            ):
                return function
        raise ValueError(algorithm)


def make_ejkernel():
    platforms = enum.Enum("Platform", ["TRITON", "CUDA", "PALLAS", "XLA"])
    backends = enum.Enum("Backend", {"GPU": "gpu", "TPU": "tpu", "ANY": "any"})
    registry = Registry()
    for name, function in (
        ("ragged_page_attention_v2", ejkernel_v2),
        ("ragged_page_attention_v3", ejkernel_v3),
    ):
        registry.register(name, platforms.PALLAS, backends.TPU)(function)
        registry.register(name, platforms.TRITON, backends.GPU)(function)
        registry.register(name, platforms.XLA, backends.ANY)(function)
    return _modules(
        ejkernel__kernels___registry={
            "Backend": backends,
            "Platform": platforms,
            "kernel_registry": registry,
        }
    )
