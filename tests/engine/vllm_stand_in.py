# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What reference_engine/vllm_plugin.py sees of vLLM, for machines without vLLM.

It schedules nothing: it only has the names, the constructor's values and the method that vLLM's
scheduler asks for the length of a chunk. test_vllm_scheduler.py runs the real scheduler.
"""

import importlib
import sys
import types

import reference_engine

VERSION = "1.2.3"
NAME = "reference_engine.vllm_plugin"


def four(
    self,
    request,
    num_new_tokens,
    num_new_local_computed_tokens=0,
    num_external_computed_tokens=0,
):
    cached = num_new_local_computed_tokens, num_external_computed_tokens
    return ("vllm", request, num_new_tokens, *cached)


def five(
    self,
    request,
    num_new_tokens,
    num_new_local_computed_tokens=0,
    num_external_computed_tokens=0,
    num_uncached_common_prefix_tokens=0,
):
    cached = num_new_local_computed_tokens, num_external_computed_tokens
    return (*four(self, request, num_new_tokens, *cached), num_uncached_common_prefix_tokens)


# Each form of the method, and what vLLM gives to it behind the first four arguments.
METHODS = ((four, ()), (five, (7,)))


def other(self, request, num_computed_tokens, num_new_tokens):
    return num_new_tokens


def install(monkeypatch, *, method=four, sets_flag=True):
    """Puts the stand-in in vLLM's place; the plugin, imported anew over it."""

    class Scheduler:
        def __init__(
            self, *, block_size=16, budget=256, num_seqs=8, threshold=0, is_async=False, **features
        ):
            self.scheduler_config = types.SimpleNamespace(
                async_scheduling=is_async, long_prefill_token_threshold=threshold
            )
            model_config = types.SimpleNamespace(is_diffusion=features.pop("is_diffusion", False))
            self.vllm_config = types.SimpleNamespace(model_config=model_config)
            self.block_size = block_size
            self.max_model_len = 4096
            self.max_num_scheduled_tokens = budget
            self.max_num_running_reqs = num_seqs
            self.max_num_encoder_input_tokens = 0
            self.requests = {}
            self.outputs = []
            model_aligns = features.pop("model_aligns", False)
            if sets_flag:
                self.need_mamba_block_aligned_split = model_aligns
                assert self.need_mamba_block_aligned_split is model_aligns
            for name, value in features.items():
                setattr(self, name, value)

        def _update_after_schedule(self, scheduler_output):
            self.outputs.append(scheduler_output)

    if method is not None:
        Scheduler._mamba_block_aligned_split = method

    class AsyncScheduler(Scheduler):
        pass

    modules = {name: types.ModuleType(name) for name in _MODULES}
    modules["vllm"].__version__ = VERSION
    modules["vllm.v1.core.sched.scheduler"].Scheduler = Scheduler
    modules["vllm.v1.core.sched.async_scheduler"].AsyncScheduler = AsyncScheduler
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    # Gone after the test: a later import must not find the plugin over the stand-in.
    monkeypatch.setattr(reference_engine, "vllm_plugin", None, raising=False)
    monkeypatch.setitem(sys.modules, NAME, types.ModuleType(NAME))
    del sys.modules[NAME]
    return importlib.import_module(NAME)


_MODULES = (
    "vllm",
    "vllm.v1",
    "vllm.v1.core",
    "vllm.v1.core.sched",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.sched.async_scheduler",
)
