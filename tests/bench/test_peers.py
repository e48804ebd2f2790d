# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The comparisons with other libraries: what they compute, how they are timed, what they refuse.

PyTorch's attention runs here on the CPU where torch is installed; FlashInfer and the recording of
kernels only against stand-ins.
"""

import dataclasses
import importlib.util
import math
import operator
import sys
import types

import pytest
from absl import app

from bench import clock
from bench.cases.attention import Call, Case
from bench.peers import attention as attention_peers
from bench.peers import child as peers

CALL = Call(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


def _case(*runs, **changes):
    return Case("own", "v6e", runs, dataclasses.replace(CALL, **changes))


# ---- The flag


def test_a_child_runs_functions():
    with peers.Child() as run:
        assert run(operator.add, 2, 3) == 5
        with pytest.raises(ZeroDivisionError):
            run(operator.truediv, 1, 0)


@pytest.mark.parametrize(
    ("names", "on_gpu", "sentence"),
    [
        (["cuda"], True, "--peers has 'cuda'; wanted some of torch, flashinfer"),
        (["torch"], False, "--peers are measured on a GPU, and there is none"),
        (["flashinfer"], True, "--peers has 'flashinfer', and the package 'nothing_of_this_name'"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(monkeypatch, names, on_gpu, sentence):
    monkeypatch.setitem(peers.MODULES, "flashinfer", ("json", "nothing_of_this_name"))
    with pytest.raises(app.UsageError, match=sentence):
        peers.require(names, on_gpu=on_gpu)


def test_no_peers_need_nothing():
    peers.require([], on_gpu=False)


# ---- The clock


class _Torch:
    """Kernels as torch.profiler records them: an eviction's of 80 us, a step's two."""

    def __init__(self):
        self.events = []
        self.autograd = types.SimpleNamespace(DeviceType=types.SimpleNamespace(CUDA="cuda"))
        self.cuda = types.SimpleNamespace(synchronize=lambda: None)
        self.profiler = types.SimpleNamespace(
            profile=self._profile, ProfilerActivity=types.SimpleNamespace(CUDA="cuda")
        )

    def run(self, name, microseconds):
        start = self.events[-1].time_range.end + 1 if self.events else 0
        span = types.SimpleNamespace(start=start, end=start + microseconds)
        self.events.append(types.SimpleNamespace(name=name, device_type="cuda", time_range=span))

    def ones(self, size, device):
        assert 4 * size == clock.EVICT_BYTES and device == "cuda"
        return types.SimpleNamespace(max=lambda: self.run("reduce_kernel", 80))

    def _profile(self, activities):
        torch = self
        torch.events = []

        class Profile:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def events(self):
                host = types.SimpleNamespace(name="cudaLaunchKernel", device_type="cpu")
                return [host, *reversed(torch.events)]

        assert activities == ["cuda"]
        return Profile()


def test_steps_in_torch_are_added_up_between_evictions():
    torch = _Torch()

    def step():
        torch.run("flash_fwd", 5)
        torch.run("combine", 2)

    timing = peers.time_kernels(torch, step)
    assert timing == clock.Timing(7.0, 7.0, 7.0, 20, clock.KERNEL_TIME)


# ---- The attention


def _kept_inputs(monkeypatch):
    """What `_normal` draws from now on."""
    kept, normal = [], attention_peers._normal

    def keep(*args):
        kept.append(normal(*args))
        return kept[-1]

    monkeypatch.setattr(attention_peers, "_normal", keep)
    return kept


def _attend(torch, q, k, v):
    """Attention of [L, N, H] over [S, K, H], the queries being the last of the keys."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q.float(), k) / math.sqrt(q.shape[2])
    late = torch.ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
    weights = scores.masked_fill(late, -math.inf).softmax(-1)
    return torch.einsum("nqk,knh->qnh", weights, v)


@needs_torch
@pytest.mark.filterwarnings("ignore")  # torch's own, which differ with its versions
@pytest.mark.parametrize(
    "run", [(3, 1, 50), (2, 40, 40), (2, 16, 40)], ids=["decode", "prefill", "chunk"]
)
def test_torch_computes_the_case(monkeypatch, run):
    """The mask of a chunk is aligned to the last key, and query heads share KV heads."""
    import torch

    kept = _kept_inputs(monkeypatch)
    step = attention_peers.PEERS["torch flash"].make_step(torch, _case(run), "cpu")
    out = step()
    q, k, v = kept
    wanted = torch.cat([_attend(torch, *x) for x in zip(q, k, v, strict=True)])
    assert out.shape == wanted.shape == (run[0] * run[1], 4, 64)
    assert (out.float() - wanted).abs().max() < 0.02


REFUSED = {
    "several lengths": (_case((2, 1, 9), (1, 4, 4)), "sequences of one length"),
    "8-bit keys": (_case((2, 1, 9), pool_dtype="int8"), "no int8 keys"),
    "window": (_case((2, 1, 9), sliding_window=4), "no sliding window"),
    "chunk by cuDNN": (_case((2, 3, 9)), "aligned to the first key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_does_not_run_is_a_sentence(monkeypatch, name):
    case, sentence = REFUSED[name]
    _fake_torch(monkeypatch, has_gpu=True)
    result = attention_peers.measure("torch cuDNN", case)
    assert isinstance(result, str) and sentence in result


def _fake_torch(monkeypatch, *, has_gpu):
    for name in ("torch", "torch.nn", "torch.nn.attention"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torch"].__version__ = "2.15+cpu"
    sys.modules["torch"].cuda = types.SimpleNamespace(is_available=lambda: has_gpu)


def test_a_torch_without_a_gpu_is_an_error_and_no_refusal(monkeypatch):
    _fake_torch(monkeypatch, has_gpu=False)
    with pytest.raises(app.UsageError, match="a PyTorch with CUDA, and 2.15.cpu has no GPU"):
        attention_peers.measure("torch flash", _case((2, 1, 9)))


class _Wrapper:
    """FlashInfer's batch wrappers, by the page table's documented meaning."""

    made: list["_Wrapper"] = []

    def __init__(self, workspace, layout, **options):
        assert layout == "NHD" and workspace.numel() > 2**27
        self.options, self.plans = options, []
        _Wrapper.made.append(self)

    def plan(self, *args, **options):
        self.args, self.plan_options = args, options

    def run(self, q, cache, **scales):
        import torch

        self.scales = scales
        *new, indptr, indices, last, heads, kv_heads, head_dim, page_size = self.args
        assert (heads, kv_heads, head_dim) == (4, 2, 64)
        assert cache.shape[1:] == (2, page_size, kv_heads, head_dim)
        rows = new[0].tolist() if new else list(range(len(last) + 1))
        out = []
        for s in range(len(last)):
            pages = indices[indptr[s] : indptr[s + 1]]
            length = (len(pages) - 1) * page_size + int(last[s])
            k, v = cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]
            out.append(_attend(torch, q[rows[s] : rows[s + 1]], k, v))
        return torch.cat(out)


@needs_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("runs", "wrapper"),
    [(((3, 1, 50), (1, 1, 16)), "BatchDecode"), (((2, 1, 40), (1, 9, 33)), "BatchPrefill")],
)
def test_flashinfer_is_given_the_case(monkeypatch, runs, wrapper):
    """Lengths, pages and options as the wrappers' documentation names them."""
    import torch

    flashinfer = types.ModuleType("flashinfer")
    setattr(flashinfer, f"{wrapper}WithPagedKVCacheWrapper", _Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setattr(_Wrapper, "made", [])
    case = _case(*runs, sliding_window=None, soft_cap=30.0)
    out = attention_peers.PEERS["FlashInfer"].make_step(torch, case, "cpu")()
    assert out.shape == (case.num_tokens, 4, 64)
    [made] = _Wrapper.made
    assert made.plan_options["window_left"] == -1 and made.plan_options["logits_soft_cap"] == 30.0
    assert made.plan_options.get("causal", wrapper == "BatchDecode")
    assert made.plan_options["kv_data_type"] == torch.bfloat16 and not made.scales
    indptr, indices, last = made.args[-7:-4]
    assert sorted(indices.tolist()) == list(range(int(indptr[-1])))
    count = indptr.diff().tolist()
    lengths = [(n - 1) * 16 + rest for n, rest in zip(count, last.tolist(), strict=True)]
    assert lengths == [keys for _, keys in case.lens]
    quantised = dataclasses.replace(case, call=dataclasses.replace(case.call, pool_dtype="int8"))
    attention_peers.PEERS["FlashInfer"].make_step(torch, quantised, "cpu")()
    assert _Wrapper.made[-1].scales == {"k_scale": 0.03, "v_scale": 0.03}
