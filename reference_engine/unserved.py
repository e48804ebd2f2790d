# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The arguments of vLLM that are not served here.

Each name has the values that ask for nothing, which are accepted, and a hint on what to do instead
of giving another value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pallas_paged.checks import require

Unserved = Mapping[str, tuple[tuple[Any, ...], str]]

# Fields of vLLM's SamplingParams. sampling_params.SamplingParams lists them in the same order.
SAMPLING_PARAMS: Unserved = {
    "best_of": ((None, 1), "give n, and choose among its outputs"),
    "use_beam_search": ((None, False), "beam search is left out on purpose"),
    "length_penalty": ((None, 1.0), "beam search is left out on purpose"),
    "early_stopping": ((None, False), "beam search is left out on purpose"),
    "prompt_logprobs": ((None,), "logprobs are reported only for generated tokens"),
    "logprob_token_ids": ((None,), "give logprobs, the number of the likeliest ids"),
    "flat_logprobs": ((None, False), "logprobs are one dict per token"),
    "detokenize": ((None, True), "read token_ids, and ignore the text"),
    "spaces_between_special_tokens": ((None, True), "join the texts yourself"),
    "logits_processors": ((None, (), []), "give logit_bias or bad_words"),
    "allowed_token_ids": ((None,), "give logit_bias or bad_words"),
    "structured_outputs": ((None,), "guided decoding is left out on purpose"),
    "guided_decoding": ((None,), "guided decoding is left out on purpose"),
    "truncate_prompt_tokens": ((None,), "cut the prompt yourself"),
    "output_kind": (
        (None,),
        "generate returns whole outputs, and stream returns what each step adds",
    ),
    "extra_args": ((None,), "leave it out"),
    "skip_reading_prefix_cache": ((None, False), "give EngineConfig.enable_prefix_caching"),
    "thinking_token_budget": ((None,), "give max_tokens"),
    "repetition_detection": ((None,), "give repetition_penalty or frequency_penalty"),
}
# Arguments of vLLM's LLM.
LLM: Unserved = {
    "tokenizer": ((None,), "the folder's own is used; to use another, give its token ids"),
    "tokenizer_mode": ((None, "auto"), "tokenizer.json is read"),
    "skip_tokenizer_init": ((None, False), "remove tokenizer.json from the folder"),
    "trust_remote_code": ((None, False), "no code in a model's folder is ever run; leave it out"),
    "tensor_parallel_size": ((None, 1), "one device serves a model"),
    "pipeline_parallel_size": ((None, 1), "one device serves a model"),
    "data_parallel_size": ((None, 1), "one device serves a model"),
    "quantization": ((None,), "quantised weights are left out on purpose"),
    "kv_cache_dtype": ((None, "auto"), "the pool has the dtype of the parameters; give dtype"),
    "load_format": ((None, "auto", "safetensors"), "the folder's safetensors files are read"),
    "config_format": ((None, "auto", "hf"), "the folder's config.json is read"),
    "hf_config_path": ((None,), "the folder's config.json is read"),
    "hf_token": ((None, False), "download the model, and give its folder"),
    "model_impl": ((None, "auto"), "the engine runs its own model"),
    "runner": ((None, "auto", "generate"), "models only generate here"),
    "task": ((None, "auto", "generate"), "models only generate here"),
    "convert": ((None, "auto", "none"), "models only generate here"),
    "device": ((None, "auto"), "jax chooses it: set JAX_PLATFORMS or jax_default_device"),
    "distributed_executor_backend": ((None,), "one device serves a model"),
    "disable_custom_all_reduce": ((None, False, True), "one device serves a model"),
    "served_model_name": ((None,), "outputs do not name the model"),
    "max_logprobs": ((None, 20), "it is always 20"),
    "logits_processors": ((None, [], ()), "give SamplingParams logit_bias or bad_words"),
    "override_generation_config": ((None, {}), "give SamplingParams with each call"),
    "compilation_config": ((None, {}), "every step is a compiled program; leave it out"),
    "enable_sleep_mode": ((None, False), "delete the LLM to free its memory"),
    "revision": ((None,), "download the revision, and give its folder"),
    "tokenizer_revision": ((None,), "download the revision, and give its folder"),
    "download_dir": ((None,), "download the model, and give its folder"),
    "hf_overrides": ((None, {}), "change the folder's config.json"),
    "generation_config": ((None, "auto"), "give SamplingParams with each call"),
    "kv_cache_memory_bytes": ((None,), "give num_pages, the pages of the pool"),
    "num_gpu_blocks_override": ((None,), "it is num_pages here"),
    "block_size": ((None,), "it is page_size here"),
    "swap_space": ((None, 0), "a request that loses its pages is computed again"),
    "cpu_offload_gb": ((None, 0), "parameters and pool are on the device"),
    "enforce_eager": ((None, False), "every step is a compiled program; leave it out"),
    "enable_chunked_prefill": ((None, True), "prefills are always chunked"),
    "enable_lora": ((None, False), "LoRA is left out on purpose"),
    "limit_mm_per_prompt": ((None, {}), "multimodal prompts are left out on purpose"),
    "speculative_config": ((None,), "drafts are not served"),
    "disable_log_stats": ((None, True), "read engine.stats"),
}
# Arguments of vLLM's LLM.generate and LLM.chat.
LLM_CALLS: Unserved = {
    "lora_request": ((None,), "LoRA is left out on purpose"),
    "guided_options_request": ((None,), "guided decoding is left out on purpose"),
    "priority": ((None,), "requests are served in the order of their arrival"),
    "prompt_token_ids": ((None,), "give them as prompts"),
    "tokenization_kwargs": ((None, {}), "encode the text yourself, and give token ids"),
    "mm_processor_kwargs": ((None, {}), "multimodal prompts are left out on purpose"),
}


def refuse_unserved(op: str, given: Mapping[str, Any], unserved: Unserved) -> None:
    """Refuses arguments that vLLM has and this engine does not have.

    Args:
      op: the function or class that was called.
      given: name -> value of the arguments that were given.
      unserved: one of the tables above.

    Raises:
      ValueError: an argument asks for something, or vLLM does not have it either.
    """
    for name, value in given.items():
        if name not in unserved:
            raise ValueError(f"{op}: there is no argument `{name}`; it is {value!r}")
        neutral, hint = unserved[name]
        is_neutral = any(
            value is one or type(value) is type(one) and value == one for one in neutral
        )
        require(
            is_neutral,
            op,
            name,
            got=f"{value!r}, which is not served",
            wanted=f"{neutral[-1]!r}",
            hint=hint,
        )
