# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The same appends by other libraries on the same GPU: PyTorch's index_put_, FlashInfer's append.

They are imported when they are asked for and are no dependency of the project.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from bench import _clock
from bench._kv_write_model import Case

_EVICT_BYTES = 2**28
_REPEATS, _WARMUP = 20, 3


class Peer:
    """One library's append.

    Attributes:
      name: what the tables call it.
    """

    def __init__(self, name: str, module: str, make_step: Callable[[Any, Case], Callable]):
        self.name = name
        self._torch: Any = importlib.import_module("torch")
        importlib.import_module(module)
        self._make_step = make_step

    def measure(self, case: Case) -> _clock.Timing:
        """Kernel time from a cold L2, as `_clock.time_kernels` takes it."""
        torch = self._torch
        step = self._make_step(torch, case)
        filler = torch.ones(_EVICT_BYTES // 4, device="cuda")
        for _ in range(_WARMUP):
            step()
        evicting = frozenset(name for name, _ in self._record(filler.max, 1))

        def one():
            filler.max()
            step()

        return _clock.summarise_kernels(self._record(one, _REPEATS), evicting, _REPEATS)

    def _record(self, call, repeats) -> list[tuple[str, float]]:
        torch = self._torch
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                call()
                torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda e: e.time_range.start)
        return [(e.name, float(e.time_range.end - e.time_range.start)) for e in events]


def _new(torch, case: Case):
    shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
    return (torch.randn(shape, device="cuda").to(getattr(torch, case.dtype)) for _ in "kv")


def _torch_step(torch, case: Case):
    """Two in-place scatters, K and V, into one [slots, 2, K, H] cache."""
    num_slots = 2 * -(-case.num_tokens // case.page_size) * case.page_size
    k, v = _new(torch, case)
    cache = torch.zeros(
        (num_slots, 2, case.num_kv_heads, case.head_dim), dtype=k.dtype, device="cuda"
    )
    slots = torch.randperm(num_slots, device="cuda")[: case.num_tokens]
    keys, values = cache[:, 0], cache[:, 1]

    def step():
        keys.index_put_((slots,), k)
        values.index_put_((slots,), v)

    return step


def _flashinfer_step(torch, case: Case):
    """append_paged_kv_cache of one sequence, its pages in random order; no index conversion."""
    flashinfer: Any = importlib.import_module("flashinfer")
    pages = -(-case.num_tokens // case.page_size)
    k, v = _new(torch, case)
    cache = torch.zeros(
        (2 * pages, 2, case.page_size, case.num_kv_heads, case.head_dim),
        dtype=k.dtype,
        device="cuda",
    )

    def int32(values):
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


PEERS: dict[str, Callable[[], Peer]] = {
    "torch": lambda: Peer("torch index_put_", "torch", _torch_step),
    "flashinfer": lambda: Peer("FlashInfer append", "flashinfer", _flashinfer_step),
}
