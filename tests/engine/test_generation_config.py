# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""generation_config.json becomes SamplingParams, or is refused by file and field."""

import json

import pytest

from reference_engine.generation_config import read_generation_config, sampling_params
from reference_engine.sampling_params import SamplingParams


def sampling(tmp_path, **generation):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return sampling_params(tmp_path, read_generation_config(tmp_path))


@pytest.mark.parametrize(
    "generation, want",
    [
        ({}, {}),
        ({"temperature": 0.7, "top_p": 0.0, "top_k": 5}, {}),  # without do_sample, greedy
        # As Qwen2.5 has it.
        (
            {
                "bos_token_id": 1,
                "pad_token_id": 1,
                "do_sample": True,
                "eos_token_id": [3, 1],
                "repetition_penalty": 1.1,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
                "transformers_version": "4.37.0",
            },
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
        ),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_k": None}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {}),
        ({"do_sample": True, "top_k": -1, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"max_new_tokens": 99, "min_new_tokens": 20}, {"max_tokens": 99, "min_tokens": 20}),
        ({"min_new_tokens": 20, "max_new_tokens": 99}, {"max_tokens": 99, "min_tokens": 20}),
        ({"stop_strings": "x", "num_return_sequences": 2}, {"stop": ("x",), "n": 2}),
        ({"stop_strings": ["x", "y"]}, {"stop": ("x", "y")}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        ),
        # transformers' own defaults, what concerns speed and other outputs, and what nobody knows.
        (
            {
                "max_length": 20,
                "min_length": 0,
                "use_cache": True,
                "early_stopping": False,
                "num_beams": 1,
                "typical_p": 1.0,
                "repetition_penalty": 1.0,
                "length_penalty": 1.0,
                "no_repeat_ngram_size": 0,
                "encoder_no_repeat_ngram_size": 0,
                "bad_words_ids": None,
                "num_return_sequences": 1,
                "output_scores": False,
                "forced_bos_token_id": None,
                "forced_eos_token_id": None,
                "remove_invalid_values": False,
                "exponential_decay_length_penalty": None,
                "suppress_tokens": None,
                "begin_suppress_tokens": [],
                "epsilon_cutoff": 0.0,
                "eta_cutoff": 0.0,
                "encoder_repetition_penalty": 1.0,
                "num_beam_groups": 1,
                "diversity_penalty": 0.0,
                "guidance_scale": 1.0,
                "top_h": None,
                "sequence_bias": {},
                "token_healing": False,
                "watermarking_config": None,
                "penalty_alpha": 0,
                "max_time": None,
                "dola_layers": None,
                "cache_implementation": "static",
                "renormalize_logits": True,
                "prompt_lookup_num_tokens": 3,
                "chat_format": "chatml",
                "_from_model_config": True,
            },
            {},
        ),
    ],
    ids=range(14),
)
def test_generation_config_is_served(tmp_path, generation, want):
    assert sampling(tmp_path, **generation) == SamplingParams(**want)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_beams", 4),
        ("num_beam_groups", 2),
        ("diversity_penalty", 0.5),
        ("typical_p", 0.9),
        ("epsilon_cutoff", 3e-4),
        ("eta_cutoff", 3e-4),
        ("top_h", 0.4),
        ("penalty_alpha", 0.6),
        ("no_repeat_ngram_size", 3),
        ("encoder_no_repeat_ngram_size", 2),
        ("max_time", 1.5),
        ("encoder_repetition_penalty", 1.2),
        ("bad_words_ids", [[3]]),
        ("suppress_tokens", [3, 4]),
        ("begin_suppress_tokens", [3]),
        ("forced_bos_token_id", 0),
        ("forced_eos_token_id", [2]),
        ("exponential_decay_length_penalty", [5, 1.1]),
        ("sequence_bias", [[[3], -1.0]]),
        ("token_healing", True),
        ("guidance_scale", 1.5),
        ("watermarking_config", {"bias": 2}),
        ("min_length", 5),
        ("dola_layers", "high"),
        ("constraints", ["x"]),
        ("force_words_ids", [[1]]),
        ("typical_p", "x"),
        # What is served, out of its range.
        ("repetition_penalty", 0),
        ("repetition_penalty", "1.1"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -7),
        ("top_k", 2.5),
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("min_p", 2),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("min_new_tokens", -1),
        ("min_new_tokens", 17),
        ("num_return_sequences", 0),
        ("stop_strings", [""]),
        ("presence_penalty", 3),
        ("frequency_penalty", True),
        ("do_sample", "yes"),
    ],
)
def test_what_generation_config_asks_for_and_is_not_served_names_file_and_field(
    tmp_path, field, value
):
    with pytest.raises(ValueError, match=f"generation_config.json: `{field}` is "):
        sampling(tmp_path, **({"do_sample": True} | {field: value}))
