# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Paged KV-cache kernels for JAX: write keys and values into pages, attend over them."""

from pallas_paged.attention.api import ragged_paged_attention, write_and_attend
from pallas_paged.attention.gpu.launch import GpuAttentionConfig
from pallas_paged.attention.merge import merge_attention_states
from pallas_paged.attention.tpu.launch import TpuAttentionConfig
from pallas_paged.convert import (
    from_separate_caches,
    merge_kv,
    page_table_from_flat,
    split_kv,
    to_separate_caches,
)
from pallas_paged.dispatch import BackendChoice, explain_backend
from pallas_paged.kv_write.api import (
    WriteIndices,
    page_write,
    slice_write,
    token_write,
    write_indices,
)
from pallas_paged.kv_write.gpu.launch import GpuWriteConfig
from pallas_paged.kv_write.page_api import copy_pages, gather_pages, scatter_pages
from pallas_paged.kv_write.tpu.launch import TpuWriteConfig
from pallas_paged.layout import make_kv_pages
from pallas_paged.validation.api import validate

__version__ = "0.1.0"

__all__ = [
    "BackendChoice",
    "GpuAttentionConfig",
    "GpuWriteConfig",
    "TpuAttentionConfig",
    "TpuWriteConfig",
    "WriteIndices",
    "__version__",
    "copy_pages",
    "explain_backend",
    "from_separate_caches",
    "gather_pages",
    "make_kv_pages",
    "merge_attention_states",
    "merge_kv",
    "page_table_from_flat",
    "page_write",
    "ragged_paged_attention",
    "scatter_pages",
    "slice_write",
    "split_kv",
    "to_separate_caches",
    "token_write",
    "validate",
    "write_and_attend",
    "write_indices",
]
