# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The prompts and conversations that a call of LLM is given, in all of their forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pallas_paged.checks import require
from pallas_paged.scalars import read_int
from reference_engine.chat_messages import is_object
from reference_engine.sampling_params import SamplingParams
from reference_engine.tokenizer import Tokenizer


def listed(values: Any) -> list[Any] | None:
    """The items of a sequence; None for a text, a dict, a set, or anything that is no sequence."""
    is_text = isinstance(values, str | bytes | bytearray | Mapping | set | frozenset)
    if is_text or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return None
    return list(values)


def split_prompts(given: Any) -> list[Any]:
    """The prompts of a call, which was given one prompt or a sequence of them."""
    if isinstance(given, str | Mapping):
        return [given]
    many = listed(given)
    require(
        many is not None,
        "LLM.generate",
        "prompts",
        got=f"{given!r}",
        wanted="a text, token ids, a dict, or a list of such",
        hint="see LLM.generate",
    )
    assert many is not None
    is_one = not many or read_int(many[0]) is not None or isinstance(many[0], bool | np.bool_)
    return [many] if is_one else many


def text_and_ids(index: int, prompt: Any) -> tuple[str | None, list[Any] | None]:
    """The text and the token ids of a prompt; one of them may be None."""
    given = prompt if isinstance(prompt, Mapping) else {}
    served = ("prompt", "prompt_token_ids")
    others = [name for name in given if name not in served and given[name] is not None]
    require(
        not others,
        "LLM.generate",
        f"prompts[{index}]",
        got=f"a dict with {others}",
        wanted=f"no other keys than {' and '.join(served)}",
        hint="multimodal prompts, embeddings and cache salts are not served",
    )
    if isinstance(prompt, Mapping):
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
    else:
        text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    found = None if ids is None else listed(ids)
    is_right = (text is None or isinstance(text, str)) and (ids is None) == (found is None)
    require(
        is_right and not (text is None and ids is None),
        "LLM.generate",
        f"prompts[{index}]",
        got=f"{prompt!r}",
        wanted="a text, token ids, or a dict with `prompt`, a text, or `prompt_token_ids`, a list",
        hint="see LLM.generate",
    )
    return text, found


def conversations(messages: Any) -> list[Any]:
    """The conversations of a call, which was given the messages of one, or a list of them."""
    many = listed(messages)
    require(
        many is not None,
        "LLM.chat",
        "messages",
        got=f"{messages!r}",
        wanted="a list of messages, which are dicts, or a list of such lists",
        hint='as [{"role": "user", "content": "..."}]',
    )
    assert many is not None
    if not many or is_object(many[0]):
        many = [many]
    for i, each in enumerate(many):
        found = listed(each)
        require(
            found is not None and all(map(is_object, found)),
            "LLM.chat",
            f"messages[{i}]",
            got=f"{each!r}",
            wanted="a list of messages, which are dicts",
            hint='as [{"role": "user", "content": "..."}]',
        )
    return many


def word_ids(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    """The tokens of a word at the start of a text, and those of the word after a space."""
    bare = word.lstrip() or word
    found = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, " " + bare)]
    require(
        all(found),
        "LLM.generate",
        "bad_words",
        got=f"{word!r}, which has no tokens",
        wanted="words of which the tokenizer makes tokens",
        hint="leave it out",
    )
    return found


def each_completion(params: SamplingParams) -> list[SamplingParams]:
    """The params of each of the `n` completions; the first has the seed that was given."""
    if params.n == 1:
        return [params]
    seeds: list[int | None] = [None] * params.n
    if params.seed is not None:  # the sums wrap around, as those of 64-bit integers do
        seeds = [(params.seed + i + 2**63) % 2**64 - 2**63 for i in range(params.n)]
    return [dataclasses.replace(params, n=1, seed=seed) for seed in seeds]
