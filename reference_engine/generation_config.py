# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Reads generation_config.json as SamplingParams."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from reference_engine.json_fields import read_object
from reference_engine.sampling_params import SamplingParams

# generation_config.json's field -> SamplingParams' field. Those of _SAMPLED, which have the same
# names in both, count only if `do_sample` is true.
_ALWAYS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
} | {name: name for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")}
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
# The fields of transformers that would change the tokens and are not served, with the values that
# change nothing; None and empty values change nothing either. Not listed are fields that concern
# only speed, other outputs, the scores of beams, or encoders. Nor is max_length, for which
# EngineConfig has a bound.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "typical_p": (1,),
    "top_h": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "token_healing": (False,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "min_length": (0, 1),
    "max_time": (),
}


def sampling_params(path: str | pathlib.Path, generation: Mapping[str, Any]) -> SamplingParams:
    """What generation_config.json asks for, as transformers understands it; greedy without a file.

    Args:
      path: the model's folder.
      generation: what `read_generation_config` has read there.

    Raises:
      ValueError: it asks for something that is not served; the message names the file and field.
    """
    file = pathlib.Path(path) / "generation_config.json"
    given = {name: value for name, value in generation.items() if value is not None}
    for name, neutral in _NEUTRAL.items():
        value = given.get(name)
        if not (value is None or value in ([], {}) or value in neutral):
            raise ValueError(
                f"{file}: `{name}` is {value!r}, which is not served; leave it out, or give"
                " SamplingParams with each call"
            )
    is_sampled = given.get("do_sample", False)
    if not isinstance(is_sampled, bool):
        raise ValueError(f"{file}: `do_sample` is {is_sampled!r}; wanted true or false")
    names = _ALWAYS | ({name: name for name in _SAMPLED} if is_sampled else {})
    params = SamplingParams(temperature=1.0 if is_sampled else 0.0)
    for name, field in names.items():
        if name in given:
            try:
                params = dataclasses.replace(params, **{field: given[name]})
            except ValueError as error:
                raise ValueError(f"{file}: `{name}` is {given[name]!r}: {error}") from error
    return params


def read_generation_config(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads generation_config.json; {} if there is none.

    `eos_token_id` is a tuple of ids in any case. If the file has none, they are config.json's.

    Raises:
      OSError: there is no config.json either.
      ValueError: the file is no JSON, or `eos_token_id` is wrong; the message names the file.
    """
    folder = pathlib.Path(path)
    file = folder / "generation_config.json"
    raw = read_object(file) if file.exists() else {}
    eos = raw.get("eos_token_id")
    if eos is None:
        file = folder / "config.json"
        eos = read_object(file).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"{file}: `eos_token_id` is {eos!r}; wanted an id >= 0 or a list of them")
    return raw | {"eos_token_id": tuple(ids)}
