# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The same appends by other libraries on the same GPU: PyTorch's index_put_, FlashInfer's append.

See bench/peers/child.py for where they run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from bench import clock
from bench.cases.kv_write import WriteCase
from bench.cases.rounding import ceil_div
from bench.peers import child as peers

NAMES = {"torch": "torch index_put_", "flashinfer": "FlashInfer append"}


def measure(peer: str, case: WriteCase) -> clock.Timing:
    """A peer's kernel time from a cold L2. Runs in a process that has no jax backend."""
    torch = peers.import_torch()
    return peers.time_kernels(torch, _STEPS[peer](torch, case))


def _new(torch: Any, case: WriteCase) -> Iterator[Any]:
    shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
    return (torch.randn(shape, device="cuda").to(getattr(torch, case.dtype)) for _ in "kv")


def _torch_step(torch: Any, case: WriteCase) -> Callable[[], Any]:
    """Two in-place scatters, K and V, into one [slots, 2, K, H] cache."""
    num_slots = 2 * ceil_div(case.num_tokens, case.page_size) * case.page_size
    k, v = _new(torch, case)
    cache = torch.zeros(
        (num_slots, 2, case.num_kv_heads, case.head_dim), dtype=k.dtype, device="cuda"
    )
    slots = torch.randperm(num_slots, device="cuda")[: case.num_tokens]
    keys, values = cache[:, 0], cache[:, 1]

    def step() -> None:
        keys.index_put_((slots,), k)
        values.index_put_((slots,), v)

    return step


def _flashinfer_step(torch: Any, case: WriteCase) -> Callable[[], Any]:
    """append_paged_kv_cache of one sequence, its pages in random order; no index conversion."""
    flashinfer: Any = importlib.import_module("flashinfer")
    pages = ceil_div(case.num_tokens, case.page_size)
    k, v = _new(torch, case)
    cache = torch.zeros(
        (2 * pages, 2, case.page_size, case.num_kv_heads, case.head_dim),
        dtype=k.dtype,
        device="cuda",
    )

    def int32(values: Any) -> Any:
        return torch.as_tensor(values, dtype=torch.int32, device="cuda")

    arguments = (
        int32([0]).expand(case.num_tokens).contiguous(),  # batch_indices
        torch.arange(case.num_tokens, dtype=torch.int32, device="cuda"),  # positions
        cache,
        int32(torch.randperm(2 * pages)[:pages]),  # kv_indices
        int32([0, pages]),  # kv_indptr
        int32([(case.num_tokens - 1) % case.page_size + 1]),  # kv_last_page_len
    )
    return lambda: flashinfer.append_paged_kv_cache(k, v, *arguments)


_STEPS: dict[str, Callable[[Any, WriteCase], Callable[[], Any]]] = {
    "torch": _torch_step,
    "flashinfer": _flashinfer_step,
}
