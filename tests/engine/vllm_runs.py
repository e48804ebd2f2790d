# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Runs of vLLM's scheduler and of ours, one step at a time, without a model. Imports vLLM.

Each token is a function of its request's prompt and of its position, so that requests that share a
prompt share their outputs, in both schedulers.
"""

import copy
import dataclasses
import functools
import json
import tempfile
import warnings

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched import async_scheduler, scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
)
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from reference_engine import vllm_plugin
from reference_engine.page_pool import PagePool
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams
from reference_engine.scheduler import Scheduler
from tests.engine.test_scheduler import Scenario

_MODEL = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 512,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
_FOLDER = tempfile.TemporaryDirectory()  # vLLM reads it again for each configuration


@dataclasses.dataclass
class Step:
    """What one step scheduled: (request, start, end) in order, who lost its pages, who waits.

    num_drafts: the drafts among the scheduled tokens.
    """

    chunks: list[tuple[int, int, int]]
    preempted: set[int]
    deferrals: dict[int, int]
    num_free: int
    num_drafts: int = 0


def token_of(prompt, position):
    return 1 + hash((prompt, position)) % 500


def prompts_of(scenario: Scenario) -> list[tuple[int, ...]]:
    return [
        tuple(
            1 + (position if position < job.num_common else hash((i, position))) % 500
            for position in range(job.num_prompt)
        )
        for i, job in enumerate(scenario.jobs)
    ]


class OurRun:
    """The reference engine's scheduler."""

    def __init__(self, scenario: Scenario):
        # vLLM's steps have no more tokens than its budget, so nothing may be left over for them.
        most = scenario.config.max_num_batched_tokens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            config = dataclasses.replace(scenario.config, token_buckets=(most,))
        self.pool = PagePool(config.num_pages)
        self.scheduler = Scheduler(config, self.pool)
        self.live: dict[int, Request] = {}

    def add(self, i, prompt, max_tokens):
        self.live[i] = Request(i, prompt, SamplingParams(max_tokens))
        self.scheduler.add(self.live[i])

    def abort(self, i):
        if self.live.pop(i, None) is not None:
            self.scheduler.abort(i)

    def step(self) -> Step:
        self.plan = plan = self.scheduler.schedule()
        new_tokens = [token_of(self.live[s.request_id].prompt_ids, s.end) for s in plan.segments]
        num_free = self.pool.num_free
        self.scheduler.begin(plan)
        for _, request in self.scheduler.commit(plan, new_tokens):
            if request.finish_reason is not None:
                self.scheduler.release(request)
                del self.live[request.request_id]
        return Step(
            [(s.request_id, s.start, s.end) for s in plan.segments],
            set(plan.preempted),
            {i: r.num_deferrals for i, r in self.live.items() if r.num_deferrals},
            num_free,
        )


class VllmRun:
    """vLLM's scheduler: its own, or the plugin's where the scenario is page-aligned.

    Args:
      scenario: its config holds for vLLM, too. vLLM takes one block for itself.
      is_async: whether a step is scheduled before the tokens of the step before it are known.
      num_drafts: how many tokens are drafted for each decode; every other one is accepted.
      has_mamba: whether the model has Mamba layers whose states vLLM aligns itself.
      loads: "sync" or "async" if a connector loads the first tokens of prompts: StoredPrefixes.
      same_pages: None, or our run of the same scenario. Then vLLM's pool is made to do as ours does
        in the points in which they differ, see `_share_our_rules`.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        is_async=False,
        num_drafts=0,
        has_mamba=False,
        loads: str | None = None,
        same_pages: OurRun | None = None,
    ):
        config = scenario.config
        names = ("PageAlignedScheduler", "PageAlignedAsyncScheduler")
        stock = (scheduler.Scheduler, async_scheduler.AsyncScheduler)
        cls = stock[is_async]
        if config.page_aligned_scheduling:
            cls = getattr(vllm_plugin, names[is_async])
        vllm_config, kv_cache_config = _configs(config, is_async, num_drafts, has_mamba, loads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # soft alignment is what is tested
            self.scheduler = cls(
                vllm_config=vllm_config,
                kv_cache_config=kv_cache_config,
                structured_output_manager=StructuredOutputManager(vllm_config),
                block_size=config.page_size,
                log_stats=False,
            )
        self.hasher = None
        if config.enable_prefix_caching:
            self.hasher = kv_cache_utils.get_request_block_hasher(config.page_size, sha256)
        self.is_async = is_async
        self.num_drafts = num_drafts
        self.pending: list[tuple[object, list[tuple[int, int, int]]]] = []
        self.same_pages = same_pages
        if same_pages is not None:
            _share_our_rules(self.scheduler, same_pages)

    @property
    def live(self):
        return {int(i) for i, r in self.scheduler.requests.items() if not r.is_finished()}

    def add(self, i, prompt, max_tokens):
        params = VllmSamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        request = VllmRequest(
            request_id=str(i),
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.scheduler.add_request(request)

    def abort(self, i):
        self.scheduler.finish_requests([str(i)], RequestStatus.FINISHED_ABORTED)

    def step(self) -> Step:
        output = self.scheduler.schedule()
        chunks = []
        for request_id, n in output.num_scheduled_tokens.items():
            end = self.scheduler.requests[request_id].num_computed_tokens
            chunks.append((int(request_id), end - n, end))
        step = Step(
            chunks,
            {int(i) for i in output.preempted_req_ids or ()},
            {int(i): n for i, n in getattr(self.scheduler, "_page_deferrals", {}).items()},
            self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            sum(map(len, output.scheduled_spec_decode_tokens.values())),
        )
        self.pending.append((output, chunks))
        if not self.is_async or len(self.pending) > 1:
            self.end_step()
        return step

    def end_step(self):
        """Gives the tokens of the oldest pending step to the scheduler."""
        output, chunks = self.pending.pop(0)
        requests = self.scheduler.requests
        if self.same_pages is not None:
            for i, _, _ in chunks:
                request = requests[str(i)]
                self.scheduler.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
        sampled = []
        for i, _, end in chunks:
            request = requests.get(str(i))
            is_last = request is not None and end >= request.num_tokens
            num_drafts = len(output.scheduled_spec_decode_tokens.get(str(i), ()))
            position = end - num_drafts
            num_sampled = (1 + (position + i) % (1 + num_drafts)) * is_last
            sampled.append(
                [
                    token_of(tuple(request.prompt_token_ids), position + j)
                    for j in range(num_sampled)
                ]
            )
        ids = [str(i) for i, _, _ in chunks]
        indices = {i: index for index, i in enumerate(ids)}
        loaded = None
        if self.scheduler.connector is not None:
            loading = self.scheduler.connector.loading
            loaded = KVConnectorOutput(finished_recving={i for i in loading if i in requests})
            loading.clear()
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index=indices,
                sampled_token_ids=sampled,
                kv_connector_output=loaded,
            ),
        )
        if self.num_drafts:
            drafts = DraftTokenIds(ids, [[7] * self.num_drafts for _ in ids])
            self.scheduler.update_draft_token_ids(drafts)


def _share_our_rules(vllm_scheduler, ours: OurRun):
    """Makes vLLM's pool do as ours does, where they differ. Its scheduler stays as it is.

    1. A request gets pages for all its known tokens when it is admitted, not chunk by chunk.
    2. A page is found by others after the step that fills it, not in it: `end_step` publishes.
    3. Free pages are allocated in the order in which they were freed. vLLM first takes those that
       no request can find.
    4. A request that finds too few pages does not count as deferred. vLLM asks for the length of a
       chunk before it looks at the pages, so the length is left as it is where our scheduler, which
       has made this step already, was short of pages. If vLLM has enough then, the chunks differ.
    """
    manager = vllm_scheduler.kv_cache_manager
    allocate = manager.allocate_slots
    parent = type(vllm_scheduler)._mamba_block_aligned_split

    def allocate_slots(request, num_new_tokens, num_new_computed_tokens=0, *args, **kwargs):
        end = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
        kwargs["num_lookahead_tokens"] = max(0, request.num_tokens - end)
        kwargs["delay_cache_blocks"] = True
        return allocate(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)

    def split(request, num_new_tokens, *cached):
        blocked = ours.plan.blocked
        if blocked is not None and str(blocked.request_id) == request.request_id:
            return num_new_tokens
        return parent(vllm_scheduler, request, num_new_tokens, *cached)

    manager.allocate_slots = allocate_slots
    queue = manager.block_pool.free_block_queue
    queue.prepend_n = queue.append_n
    vllm_scheduler._mamba_block_aligned_split = split


@functools.cache
def _model_config() -> ModelConfig:
    with open(f"{_FOLDER.name}/config.json", "w") as file:
        json.dump(_MODEL, file)
    return ModelConfig(model=_FOLDER.name, skip_tokenizer_init=True, dtype="float16", seed=0)


def _configs(config, is_async, num_drafts, has_mamba, loads):
    model_config = copy.copy(_model_config())
    model_config.max_model_len = config.max_model_len
    cache_config = CacheConfig(
        block_size=config.page_size, enable_prefix_caching=config.enable_prefix_caching
    )
    cache_config.num_gpu_blocks = config.num_pages + 1
    speculative_config = None
    if num_drafts:
        speculative_config = SpeculativeConfig(
            method="ngram", num_speculative_tokens=num_drafts, prompt_lookup_max=2
        )
    kv_transfer_config = None
    if loads:
        kv_transfer_config = KVTransferConfig(
            kv_connector="StoredPrefixes",
            kv_connector_module_path="tests.engine.vllm_connector",
            kv_role="kv_both",
            kv_connector_extra_config={"loads_async": loads == "async"},
        )
    vllm_config = VllmConfig(
        model_config=model_config,
        cache_config=cache_config,
        device_config=DeviceConfig(device="cpu"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=is_async,
            disable_hybrid_kv_cache_manager=True if loads else None,
        ),
        speculative_config=speculative_config,
        kv_transfer_config=kv_transfer_config,
    )
    vllm_config.scheduler_config.async_scheduling = is_async  # a CPU has turned it off
    spec = FullAttentionSpec(
        block_size=config.page_size, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    groups = [KVCacheGroupSpec(["layer"], spec)]
    if has_mamba:
        cache_config.mamba_cache_mode = "align"
        state = MambaSpec(
            block_size=config.page_size,
            shapes=((1, 1),),
            dtypes=(torch.float32,),
            mamba_cache_mode="align",
        )
        groups.append(KVCacheGroupSpec(["state"], state))
    kv_cache_config = KVCacheConfig(
        num_blocks=config.num_pages + 1, kv_cache_tensors=[], kv_cache_groups=groups
    )
    kv_cache_utils.init_none_hash(sha256)
    return vllm_config, kv_cache_config
