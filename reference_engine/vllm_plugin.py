# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Page-aligned scheduling in vLLM: `vllm serve ... --scheduler-cls` with a class of this module.

vLLM's scheduler can ask a method for the length of a chunk, `_mamba_block_aligned_split`. It asks
after its own limits, both for running and for waiting requests, and 0 means that the request waits.
vLLM itself does so for Mamba models alone. Here the method is answered by `limit`, the rule of the
reference engine, for every model.

Nothing else imports this module, because it imports vLLM, which this package does not depend on.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from pallas_paged.checks import require
from reference_engine.config import EngineConfig
from reference_engine.scheduler import limit

_METHOD = "_mamba_block_aligned_split"
_FLAG = "need_mamba_block_aligned_split"
# Versions add parameters behind these.
_PARAMETERS = [
    "self",
    "request",
    "num_new_tokens",
    "num_new_local_computed_tokens",
    "num_external_computed_tokens",
]


@dataclasses.dataclass(slots=True)
class _TokenCounts:
    """See reference_engine.scheduler.TokenCounts."""

    num_prompt: int
    num_tokens: int
    num_deferrals: int


class PageAlignedScheduler(Scheduler):
    """vLLM's scheduler, with every chunk of a prefill but the last ending on a block boundary.

    A boundary is a multiple of vLLM's scheduler block size, where a block of every KV cache group
    ends. As in the reference engine, ends are rounded as positions, the outputs that a preempted
    request computes again count as prefill, and a request waits for a boundary at most
    `EngineConfig.max_deferrals` steps in a row. A request that finds too few free blocks in the
    same step counts as deferred, too, because vLLM looks at the blocks afterwards.

    Decodes, and the drafts behind them, are left as they are. So are Mamba models whose states vLLM
    aligns itself (`mamba_cache_mode="align"`).

    Raises:
      NotImplementedError: this version of vLLM has no such method, or vLLM changes chunks for this
        model in a way that `limit` does not know.
      ValueError: the class does not fit vLLM's `async_scheduling`, or the budget or the threshold
        of long prefills is below a block.
    """

    _page_config: EngineConfig | None = None  # None until vLLM's own constructor has ended
    _model_aligns: bool | None = None  # what vLLM has set its flag to

    # The arguments of vLLM's constructor, which differ between its versions.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        method = getattr(Scheduler, _METHOD, None)
        if method is None or list(inspect.signature(method).parameters)[:5] != _PARAMETERS:
            raise _unserved(f"has no Scheduler.{_METHOD} with the parameters {_PARAMETERS}")
        super().__init__(*args, **kwargs)
        if self._model_aligns is None:
            raise _unserved(f"does not set Scheduler.{_FLAG}")
        _check_class(self)
        _check_model(self)
        self._page_config = _read_config(self)
        self._page_deferrals: dict[str, int] = {}  # of the requests that wait now

    @property
    def need_mamba_block_aligned_split(self) -> bool:
        """Whether vLLM asks for the length of each chunk: always, once it runs."""
        return bool(self._model_aligns) or self._page_config is not None

    @need_mamba_block_aligned_split.setter
    def need_mamba_block_aligned_split(self, value: bool) -> None:
        self._model_aligns = value

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        *more: Any,
    ) -> int:
        """The length of the request's next chunk, at most `num_new_tokens`; 0 if it must wait."""
        cached = (num_new_local_computed_tokens, num_external_computed_tokens)
        if self._model_aligns:  # vLLM also stops where states must be kept inside a block
            return super()._mamba_block_aligned_split(request, num_new_tokens, *cached, *more)
        if num_new_tokens == 0 and num_external_computed_tokens:
            raise _unserved("aligns KV that is still to be loaded, which would never be loaded")
        request_id, config = request.request_id, self._page_config
        assert config is not None
        counts = _TokenCounts(
            num_prompt=request.num_prompt_tokens,
            num_tokens=request.num_tokens,
            num_deferrals=self._page_deferrals.get(request_id, 0),
        )
        start = request.num_computed_tokens + sum(cached)
        n = limit(counts, start, num_new_tokens, contended=False, config=config)
        if start + n >= request.num_tokens:
            # The chunk has every known token. Behind them vLLM counts drafts, and placeholders for
            # tokens that a step before this one is still to sample.
            return num_new_tokens
        if n == 0:
            self._page_deferrals[request_id] = counts.num_deferrals + 1
        return n

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """vLLM's own, and an end to the waiting of requests that got tokens or are gone."""
        super()._update_after_schedule(scheduler_output)
        self._page_deferrals = {
            request_id: count
            for request_id, count in self._page_deferrals.items()
            if request_id in self.requests
            and request_id not in scheduler_output.num_scheduled_tokens
        }


class PageAlignedAsyncScheduler(PageAlignedScheduler, AsyncScheduler):
    """PageAlignedScheduler for vLLM's `async_scheduling`, which is its default."""


def _unserved(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"{__name__}: vLLM {vllm.__version__} {reason}; use another version of vLLM (0.24.0 and"
        " 0.33.0 were tested), or leave --scheduler-cls out"
    )


def _check_class(scheduler: Any) -> None:
    is_async = bool(scheduler.scheduler_config.async_scheduling)
    fitting = PageAlignedAsyncScheduler if is_async else PageAlignedScheduler
    require(
        isinstance(scheduler, AsyncScheduler) == is_async,
        __name__,
        "--scheduler-cls",
        got=f"{type(scheduler).__name__}",
        wanted=f"{__name__}.{fitting.__name__}, because async_scheduling is {is_async}",
        hint="name that class, or change async_scheduling",
    )


def _check_model(scheduler: Any) -> None:
    """Refuses the models for which vLLM changes a chunk after it was aligned, or its start."""
    is_diffusion = getattr(scheduler.vllm_config.model_config, "is_diffusion", False)
    # vLLM 0.18 has neither of these.
    num_lookahead = getattr(scheduler, "num_prefill_lookahead", 0)
    num_replayed = getattr(scheduler, "prefix_replay_tokens", 0)
    refused = (
        # Where an item does not fit the chunk, vLLM ends the chunk before the item. The boundary
        # can lie inside the item in every step, and then the request would wait for ever.
        (
            scheduler.max_num_encoder_input_tokens > 0,
            "the model takes images, audio or video, which vLLM does not split where a block ends;"
            " --language-model-only serves its text",
        ),
        (
            num_lookahead > 1,
            "multi-token prediction with multiple modules moves the ends of chunks after they were"
            " aligned; leave --speculative-config out",
        ),
        (
            num_replayed > 0,
            "the model computes the end of a cached prefix again, from a start that vLLM does not"
            " tell; leave --scheduler-cls out",
        ),
        (is_diffusion, "vLLM has its own scheduler for diffusion; leave --scheduler-cls out"),
    )
    for is_refused, reason in refused:
        if is_refused:
            raise NotImplementedError(f"{__name__}: {reason}")


def _read_config(scheduler: Any) -> EngineConfig:
    """The limits by which chunks are aligned; EngineConfig checks that they can work."""
    try:
        return EngineConfig(
            page_size=scheduler.block_size,
            max_model_len=scheduler.max_model_len,
            max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
            max_num_seqs=scheduler.max_num_running_reqs,
            long_prefill_token_threshold=scheduler.scheduler_config.long_prefill_token_threshold,
        )
    except ValueError as error:
        error.add_note(
            "page_size is vLLM's block size here, and page_aligned_scheduling is turned off by"
            " leaving --scheduler-cls out."
        )
        raise
