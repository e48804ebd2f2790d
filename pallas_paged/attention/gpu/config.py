# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The block sizes of the GPU attention: what they are, and which ones a call gets."""

import dataclasses

from pallas_paged import dispatch, tuned


@dataclasses.dataclass(frozen=True)
class GpuAttentionConfig:
    """The block sizes of the GPU attention.

    Attributes:
      prefill_block_kv, decode_block_kv: the keys that are attended to at a time, 64 or 128.
      prefill_stages, decode_stages: the pipeline stages in shared memory, at least 2. Each holds a
        KV block, which is read or on its way.
      prefill_raw_stages, decode_raw_stages: the stages for the blocks of a quantised pool on their
        way, at least 1. Other pools have none.
      decode_pipelines: the pipelines of the decode kernel that share a multiprocessor, 1 or 2, and
        1 for a quantised pool. Each has the given number of stages.
    """

    prefill_block_kv: int
    prefill_stages: int
    decode_block_kv: int
    decode_stages: int
    prefill_raw_stages: int = 2
    decode_raw_stages: int = 2
    decode_pipelines: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("block_kv"):
                is_right, wanted = value in (64, 128), "64 or 128"
            elif field.name == "decode_pipelines":
                is_right, wanted = value in (1, 2), "1 or 2"
            else:
                is_right, wanted = isinstance(value, int) and value >= 1, "an int >= 1"
                if field.name == "prefill_stages" or field.name == "decode_stages":
                    is_right, wanted = is_right and value >= 2, "an int >= 2"
            if not is_right:
                raise ValueError(f"GpuAttentionConfig: {field.name} is {value!r}; wanted {wanted}")


def default_config(
    head_dim: int, is_quantized: bool, max_seqs: int, page_size: int
) -> GpuAttentionConfig:
    """The block sizes that were measured to be best on the device, else those of `formula`.

    The former are in `pallas_paged.tuned`.
    """
    found = tuned.find(
        dispatch.gpu_device_kind(),
        "ragged_paged_attention",
        page_size=page_size,
        head_dim=head_dim,
        is_quantized=is_quantized,
        has_few_seqs=has_few_seqs(max_seqs),
    )
    return GpuAttentionConfig(**found) if found else formula(head_dim, is_quantized, max_seqs)


def has_few_seqs(max_seqs: int) -> bool:
    """Whether a call has room for so few sequences that it is better to split each less."""
    return max_seqs < 32


def formula(head_dim: int, is_quantized: bool, max_seqs: int) -> GpuAttentionConfig:
    """Block sizes with as many stages as shared memory has room for.

    Where many sequences begin and end, two pipelines decode on a multiprocessor, so that one works
    during the latencies of the other. Where few do, one pipeline splits heads less.
    """
    prefill_block_kv = 64 if head_dim == 256 else 128
    if is_quantized:
        prefill_stages = {64: 4, 128: 2, 256: 2}[head_dim]
        if head_dim == 256:
            block_kv, stages, raw_stages = 64, 2, 2
        elif has_few_seqs(max_seqs):
            block_kv, stages, raw_stages = 64, 3, {64: 12, 128: 7}[head_dim]
        else:
            block_kv, stages, raw_stages = 128, 2, {64: 6, 128: 3}[head_dim]
        return GpuAttentionConfig(
            prefill_block_kv,
            prefill_stages,
            block_kv,
            stages,
            prefill_raw_stages=2,
            decode_raw_stages=raw_stages,
        )
    prefill_stages = {64: 6, 128: 3, 256: 2}[head_dim]
    if head_dim == 256:
        return GpuAttentionConfig(prefill_block_kv, prefill_stages, 64, 3)
    decode_stages = {64: 6, 128: 3}[head_dim]
    if has_few_seqs(max_seqs):
        return GpuAttentionConfig(prefill_block_kv, prefill_stages, 128, decode_stages)
    return GpuAttentionConfig(
        prefill_block_kv, prefill_stages, 64, decode_stages, decode_pipelines=2
    )
