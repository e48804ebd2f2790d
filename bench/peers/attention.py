# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The same attention by other libraries on the same GPU.

PyTorch's scaled_dot_product_attention by two of its backends, over contiguous keys of one length;
FlashInfer's batch wrappers over pages in random order. See bench/peers/child.py for where they run.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from bench import clock
from bench.cases.attention import SCALES, Case
from bench.cases.rounding import ceil_div
from bench.peers import child as peers

_WORKSPACE_BYTES = 2**28  # FlashInfer's partial results


@dataclasses.dataclass(frozen=True)
class Peer:
    """One library's way.

    Attributes:
      library: a key of `peers.MODULES`.
      is_paged: whether its time depends on the page size.
      make_step: (torch, case, device) -> a function that runs the call and returns [T, N, H].
    """

    library: str
    is_paged: bool
    make_step: Callable[[Any, Case, str], Callable[[], Any]]


def measure(name: str, case: Case) -> clock.Timing | str:
    """A peer's kernel time from a cold L2, or why it does not run the case, as a sentence.

    Runs in a process that has no jax backend.
    """
    torch = peers.import_torch()
    try:
        step = PEERS[name].make_step(torch, case, "cuda")
        step()
        torch.cuda.synchronize()
    except (RuntimeError, ValueError) as e:
        return (str(e).strip().splitlines() or [repr(e)])[0]
    return peers.time_kernels(torch, step)


def _torch_step(backend: str) -> Callable[[Any, Case, str], Callable[[], Any]]:
    """scaled_dot_product_attention by a member of SDPBackend; tokens before heads in memory."""

    def make_step(torch: Any, case: Case, device: str) -> Callable[[], Any]:
        attention: Any = importlib.import_module("torch.nn.attention")
        call = case.call
        if len(case.runs) > 1:
            raise NotImplementedError("PyTorch takes sequences of one length in a call")
        if call.pool_dtype not in (None, call.dtype):
            raise NotImplementedError(f"PyTorch takes no {call.pool_dtype} keys")
        if call.sliding_window or call.soft_cap:
            raise NotImplementedError("PyTorch has no sliding window and no soft cap")
        [(count, num_new, num_keys)] = case.runs
        options = {}
        if num_new == num_keys:
            options["is_causal"] = True
        elif num_new > 1:
            if backend != "FLASH_ATTENTION":
                raise NotImplementedError(
                    "PyTorch's causal mask is aligned to the first key there, and a chunk's to the "
                    "last"
                )
            bias: Any = importlib.import_module("torch.nn.attention.bias")
            options["attn_mask"] = bias.causal_lower_right(num_new, num_keys)
        q, k, v = (
            _normal(torch, (count, tokens, heads, call.head_dim), call.dtype, device).transpose(
                1, 2
            )
            for tokens, heads in (
                (num_new, call.num_heads),
                (num_keys, call.num_kv_heads),
                (num_keys, call.num_kv_heads),
            )
        )

        def step() -> Any:
            with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    scale=call.head_dim**-0.5,
                    enable_gqa=call.num_heads != call.num_kv_heads,
                    **options,
                )
            return out.transpose(1, 2).flatten(0, 1)

        return step

    return make_step


def _flashinfer_step(torch: Any, case: Case, device: str) -> Callable[[], Any]:
    """The decode wrapper where all sequences are decodes, else the one for prefills."""
    flashinfer: Any = importlib.import_module("flashinfer")
    call = case.call
    dtype = call.pool_dtype or call.dtype
    pages = [ceil_div(keys, call.page_size) for _, keys in case.lens]

    def int32(values: Any) -> Any:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    def sums(values: Any) -> Any:
        return int32([0, *torch.tensor(values).cumsum(0).tolist()])

    cache = _normal(
        torch, (sum(pages), 2, call.page_size, call.num_kv_heads, call.head_dim), dtype, device
    )
    q = _normal(torch, (case.num_tokens, call.num_heads, call.head_dim), call.dtype, device)
    paged = (
        sums(pages),
        int32(torch.randperm(sum(pages))),
        int32([(keys - 1) % call.page_size + 1 for _, keys in case.lens]),
        call.num_heads,
        call.num_kv_heads,
        call.head_dim,
        call.page_size,
    )
    options = {
        "q_data_type": q.dtype,
        "kv_data_type": cache.dtype,
        "sm_scale": call.head_dim**-0.5,
        "window_left": (call.sliding_window or 0) - 1,
        "logits_soft_cap": call.soft_cap or 0.0,
    }
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    if case.num_decodes == len(case.lens):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=call.num_heads >= 4 * call.num_kv_heads
        )
        wrapper.plan(*paged, **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto")
        wrapper.plan(sums([new for new, _ in case.lens]), *paged, causal=True, **options)
    scales = {}
    if dtype in SCALES:
        scales["k_scale"], scales["v_scale"] = SCALES[dtype]
    return lambda: wrapper.run(q, cache, **scales)


def _normal(torch: Any, shape: tuple[int, ...], dtype: str, device: str) -> Any:
    """Normal values; of a torch dtype of jax's name."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16).to(getattr(torch, dtype))


PEERS: dict[str, Peer] = {
    "torch flash": Peer("torch", False, _torch_step("FLASH_ATTENTION")),
    "torch cuDNN": Peer("torch", False, _torch_step("CUDNN_ATTENTION")),
    "FlashInfer": Peer("flashinfer", True, _flashinfer_step),
}
