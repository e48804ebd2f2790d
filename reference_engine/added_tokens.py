# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The tokens that the files beside tokenizer.json add to it, and the names of the special ones.

transformers reads them from four files, and one file decides whether another counts: if
tokenizer_config.json has `added_tokens_decoder`, the older special_tokens_map.json and
added_tokens.json are not read. This module follows PreTrainedTokenizerFast of its version 5.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from reference_engine.extras import import_extra
from reference_engine.json_fields import read_object

CONFIG = "tokenizer_config.json"
# The names that every tokenizer may have, in the order in which transformers adds their tokens.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class AddedTokens:
    """What the files of a folder say about tokens.

    Attributes:
      named: name -> special token; names are "bos_token", "image_token", ...
      extra: the special tokens without a name.
      declared: the tokens that have all of their flags, special or not, in the order of their ids.
    """

    named: Mapping[str, Any]
    extra: tuple[Any, ...]
    declared: tuple[Any, ...]

    @property
    def template_variables(self) -> dict[str, str]:
        """Name -> text of the named tokens, as variables for chat templates."""
        return {name: token.content for name, token in self.named.items()}

    def add_to(self, tokenizer: Any) -> None:
        """Adds the tokens that a `tokenizers.Tokenizer` lacks, and makes the named ones special.

        A token of the vocabulary keeps its id, and a new one gets the next id. As in transformers,
        an id that a file gives to a new token decides only its order among the new tokens.
        """
        special = {token.content for token in self.named.values()}
        tokens = list(self.declared)
        for token in tokens:
            token.special = token.special or token.content in special
        present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        present |= {token.content for token in tokens}
        for token in (*self.named.values(), *self.extra):
            if token.content not in present and token not in tokens:
                tokens.append(token)
        if tokens:
            tokenizer.add_tokens(tokens)


def read_added_tokens(
    folder: pathlib.Path, settings: Mapping[str, Any], tokenizer: Any
) -> AddedTokens:
    """Reads what the files of a folder add to its tokenizer.

    Args:
      folder: the folder; special_tokens_map.json and added_tokens.json may be missing.
      settings: the content of tokenizer_config.json.
      tokenizer: the `tokenizers.Tokenizer` of tokenizer.json.

    Raises:
      ValueError: a field is no token; the message names the file and the field.
    """
    file = folder / CONFIG
    named, extra = _special_tokens(file, settings)
    declared: dict[int, Any] = {}
    if settings.get("added_tokens_decoder") is not None:
        for index, value in _object(file, settings, "added_tokens_decoder").items():
            where = f"`added_tokens_decoder`[{index!r}]"
            if not str(index).isdecimal():
                raise ValueError(f"{file}: {where}: the key is no token id")
            declared[int(index)] = _token(file, where, value, special=False)
    else:
        file = folder / "special_tokens_map.json"
        raw = read_object(file) if file.exists() else {}
        more, tokens = _special_tokens(file, raw)
        if "extra_special_tokens" in raw:
            extra, tokens = [*(extra or ()), *(tokens or ())], None
        special = [token for name, token in (named | more).items() if name in NAMES]
        special += [token for token in extra or () if token.special]
        declared |= _older_tokens(folder / "added_tokens.json", special)
        declared |= tokenizer.get_added_tokens_decoder()
        extra = tokens if extra is None else extra
        # special_tokens_map.json decides on the names in NAMES, but not on those of the model's own
        # names whose values are plain texts.
        named = named | more | _own(settings, named)
    if "pad_token" not in named and tokenizer.padding is not None:
        file = folder / "tokenizer.json"
        named["pad_token"] = _token(file, "`padding`", tokenizer.padding["pad_token"])
    own = _own(settings, named)
    order = (*NAMES, *(name for name in named if name not in own), *own)
    named = dict.fromkeys(order) | named
    return AddedTokens(
        named={name: token for name, token in named.items() if token is not None},
        extra=tuple(extra or ()),
        declared=tuple(declared[index] for index in sorted(declared)),
    )


def _special_tokens(
    file: pathlib.Path, raw: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Any] | None]:
    """The named tokens of a file (None for a name that has no token there), and the others."""
    named: dict[str, Any] = {}
    for name, value in raw.items():
        if name in NAMES:
            named[name] = None if value is None else _token(file, f"`{name}`", value)
        elif name.endswith("_token") and (
            isinstance(value, str | None) or isinstance(value, dict) and "content" in value
        ):  # a name of this model's own; add_bos_token is not such a name
            named[name] = None if value is None else _token(file, f"`{name}`", value)
    field = "extra_special_tokens"
    if isinstance(raw.get(field), dict):
        named |= {
            name: _token(file, f"`{field}`[{name!r}]", value) for name, value in raw[field].items()
        }
    if "additional_special_tokens" in raw and (not raw.get(field) or isinstance(raw[field], dict)):
        field = "additional_special_tokens"  # the field's older name
    values = raw.get(field)
    if values is None or isinstance(values, dict):
        return named, None
    if not isinstance(values, list):
        raise ValueError(f"{file}: `{field}` is {values!r}; wanted a list of tokens")
    # Objects say whether they are special; in the older file's list, all of them are.
    is_older = file.name != CONFIG and field == "extra_special_tokens"
    return named, [
        _token(
            file,
            f"`{field}`[{i}]",
            value,
            special=is_older or not isinstance(value, dict) or "__type" not in value,
        )
        for i, value in enumerate(values)
    ]


def _own(settings: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own names that tokenizer_config.json gives as plain texts or as extra tokens.

    These tokens are added last, and no other file changes them.
    """
    extra = settings.get("extra_special_tokens")
    names = {name for name, value in settings.items() if isinstance(value, str)}
    names |= set(extra) if isinstance(extra, dict) else set()
    return {name: token for name, token in named.items() if name in names - set(NAMES)}


def _older_tokens(file: pathlib.Path, special_tokens: Iterable[Any]) -> dict[int, Any]:
    """The tokens of added_tokens.json, which maps texts to ids; here by their ids."""
    special = {token.content for token in special_tokens if token is not None}
    tokens = {}
    for text, index in (read_object(file) if file.exists() else {}).items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"{file}: `{text}` is {index!r}; wanted a token id")
        value = {"content": text, "normalized": text not in special}
        tokens[index] = _token(file, f"`{text}`", value, special=text in special)
    return tokens


def _token(file: pathlib.Path, where: str, value: Any, *, special: bool = True) -> Any:
    """A token made of its text, or of an object with `content` and flags."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(
            f"{file}: {where} is {value!r}; wanted a text, or an object with `content`"
        )
    flags = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{file}: {where}: `{name}` is {flag!r}; wanted true or false")
    flags["special"] = special or flags.get("special", False)
    return import_extra("tokenizers").AddedToken(value["content"], **flags)


def _object(file: pathlib.Path, raw: Mapping[str, Any], field: str) -> dict[str, Any]:
    if not isinstance(raw[field], dict):
        raise ValueError(f"{file}: `{field}` is {raw[field]!r}; wanted an object")
    return raw[field]
