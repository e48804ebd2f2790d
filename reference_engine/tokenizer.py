# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Text to token ids, and token ids back to text while they are still coming."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reference_engine import chat_template
from reference_engine.added_tokens import CONFIG, read_added_tokens
from reference_engine.chat_template import Message
from reference_engine.checkpoint import read_object
from reference_engine.extras import import_extra

_CONTEXT = 6  # tokens of the prompt that the first token's text can depend on
_MOST_BYTES = 4  # of a character
_MOST_WAITING = 16  # tokens; so many are no text, whatever comes
_HALF = "\N{REPLACEMENT CHARACTER}"
# What `clean_up_tokenization_spaces` means, in this order.
_CLEANING = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
# No replacement reaches over a character that it does not know, or over three without a space.
_SETTLED = re.compile(r"[^ .?!,'ntmsver]|[^ ]{3}")


class Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json and what stands beside it.

    It makes of a text the ids that transformers' PreTrainedTokenizerFast makes of it.
    """

    def __init__(self, path: str | pathlib.Path):
        """Reads tokenizer.json and, where they exist, tokenizer_config.json, the older
        special_tokens_map.json and added_tokens.json, and the chat templates.

        Settings that serve training are left aside: truncation, padding, dropout. `add_bos_token`
        and `add_eos_token` are not read either: what stands around a text is tokenizer.json's.

        Raises:
          OSError: there is no tokenizer.json.
          ValueError: a file is corrupt; the message names it, and the field.
        """
        folder = pathlib.Path(path)
        file = folder / CONFIG
        settings = read_object(file) if file.exists() else {}
        self._tokenizer = _read_tokenizer(folder / _tokenizer_file(settings))
        added = read_added_tokens(folder, settings, self._tokenizer)
        added.add_to(self._tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = _flag(file, settings, "split_special_tokens")
        model = self._tokenizer.model
        is_bpe = type(model).__name__ == "BPE"
        if is_bpe:
            model.dropout = None
        # Byte-pair tokens carry their spaces, and cleaning would take what is no artefact of
        # theirs: transformers asks for it by another name.
        self._cleans = _flag(file, settings, "clean_up_tokenization_spaces") and (
            not is_bpe or _flag(file, settings, _CLEANS_BPE)
        )
        self._special_tokens = added.template_variables
        self._templates = chat_template.read_templates(folder, settings)
        self._where = str(folder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around one unless told not to.

        Raises:
          ValueError: it is no text, or has half a character.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode: {text!r} is a {type(text).__name__}; wanted a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r}: no text, because UTF-8 has none of it: {error}") from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, special tokens left out unless told not to."""
        text = self._decode(token_ids, skip_special_tokens)
        return _clean(text) if self._cleans else text

    def detokenizer(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """What makes text of the tokens that follow a prompt, while they come."""
        return Detokenizer(
            lambda ids: self._decode(ids, skip_special_tokens), prompt_ids, cleans=self._cleans
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """A conversation as the model was taught to read it, ready for the assistant's turn.

        Special tokens are in the text: `encode(text, add_special_tokens=False)` makes ids of it.

        Args:
          messages: `{"role": ..., "content": ...}` each, and what else the template knows, such as
            `tool_calls` (with `arguments` as objects: templates write them as JSON) and
            `reasoning_content`. `content` is a text or a list of parts, `{"type": "text", "text":
            ...}`; a template that does not go through parts gets their texts, joined by a line
            break.
          chat_template_kwargs: variables for the template, such as `enable_thinking`; it may hold
            any of the options as well.
          **options: the names of vLLM and transformers, and variables for the template.
            `chat_template`: the name of one of the folder's templates, or the text of another.
            `tools`: JSON schemas, in a list.
            `documents`: objects, in a list.
            `add_generation_prompt`: begin the assistant's message. True, but for the next.
            `continue_final_message`: leave the last message open, for the model to go on with; the
            name of its field, or True for `content`.
            `chat_template_content_format`: "string" or "openai" to give the template every
            `content` as a text or as parts; "auto" as described.

        Raises:
          ValueError: the model has no template, an argument is wrong, or the template refuses the
            messages; the message says which template, and what it says.
        """
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise ValueError(
                f"chat: chat_template_kwargs is {chat_template_kwargs!r}; wanted a dict"
            )
        return chat_template.render(
            self._templates,
            self._where,
            self._special_tokens,
            messages,
            **(options | dict(chat_template_kwargs or {})),
        )

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Text of tokens as they come, never half a character.

    The text of a token depends on those before it (a space, the bytes of one character), so each is
    decoded behind the last ones and what they say alone is taken off: the way of Hugging Face's
    text-generation-inference and of vLLM. What ends in half a character waits for the rest.

    >>> say = {1: "a", 2: "\\N{REPLACEMENT CHARACTER}", 3: "b"}
    >>> detokenizer = Detokenizer(lambda ids: "".join(say[i] for i in ids), ())
    >>> [detokenizer.push([i]) for i in (1, 2, 3)], detokenizer.finish()
    (['a', '', '\\ufffdb'], '')
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_ids: Sequence[int],
        *,
        cleans: bool = False,
    ):
        """
        Args:
          decode: token ids to text.
          prompt_ids: what the tokens follow.
          cleans: take away spaces before punctuation, as `clean_up_tokenization_spaces` means it;
            text that a space more could change waits.
        """
        self._decode = decode
        self._cleans = cleans
        self._unclean = ""  # text that waits to be cleaned
        count = _CONTEXT
        while _HALF in decode(prompt_ids[-count:]) and count < _CONTEXT + _MOST_BYTES:
            count += 1  # it begins inside a character
        self._ids = list(prompt_ids[-count:])  # what was said last, and what waits
        self._num_said = len(self._ids)
        self._said = decode(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        if not self._cleans:
            return self._push(token_ids)
        self._unclean += self._push(token_ids)
        end = max((found.end() for found in _SETTLED.finditer(self._unclean)), default=0)
        settled, self._unclean = self._unclean[:end], self._unclean[end:]
        return _clean(settled)

    def finish(self, token_ids: Sequence[int] = ()) -> str:
        """All that is left, with these last tokens, without the half character at its end."""
        text = self._decode([*self._ids, *token_ids])[len(self._said) :].rstrip(_HALF)
        return _clean(self._unclean + text) if self._cleans else text

    def _push(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        text = self._decode(self._ids)
        is_half = text.endswith(_HALF) and len(self._ids) - self._num_said < _MOST_WAITING
        if is_half or len(text) <= len(self._said):
            return ""
        new = text[len(self._said) :]
        self._ids = self._ids[self._num_said :]
        self._num_said = len(self._ids)
        self._said = self._decode(self._ids)
        return new


class StopStrings:
    """Passes text on until a stop string is complete; keeps back what may become one.

    >>> stop = StopStrings(["END"])
    >>> [stop.push(text) for text in ("an E", "N", "D.")]
    [('an ', None), ('', None), ('', 'END')]
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool = False):
        """Takes the strings, and whether the text is to end behind the one that ends it."""
        self._stops = stops
        self._is_included = is_included
        self._kept = ""
        self._num_free = 0  # of what is kept: characters in which no stop string ends the text

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text to show now, and the stop string that ends it there.

        Without `may_stop` none does that ends in this text; one that begins in it still may later.
        """
        text = self._kept + text
        if not may_stop:
            self._num_free = len(text)
        places = [text.find(stop, max(0, self._num_free + 1 - len(stop))) for stop in self._stops]
        found = [
            (at, len(stop), stop) for at, stop in zip(places, self._stops, strict=True) if at >= 0
        ]
        if found:
            at, length, stop = min(found)
            self._kept = ""
            return text[: at + length if self._is_included else at], stop
        length = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        shown = text[: len(text) - length]
        self._kept = text[len(shown) :]
        self._num_free = max(0, self._num_free - len(shown))
        return shown, None

    def finish(self) -> str:
        """What was kept back and has become no stop string."""
        return self._kept


def _clean(text: str) -> str:
    for found, put in _CLEANING:
        text = text.replace(found, put)
    return text


def _tokenizer_file(settings: Mapping[str, Any]) -> str:
    """tokenizer.json, or the newest of those that a folder keeps for versions of transformers."""
    names = settings.get("fast_tokenizer_files")
    names = names if isinstance(names, list) else []
    found = [re.fullmatch(r"tokenizer\.(\d+(?:\.\d+)*)\.json", str(name)) for name in names]
    newest = max(
        filter(None, found), key=lambda match: [int(n) for n in match[1].split(".")], default=None
    )
    return newest[0] if newest else "tokenizer.json"


def _read_tokenizer(file: pathlib.Path) -> Any:
    text = file.read_bytes()
    try:
        tokenizer = import_extra("tokenizers").Tokenizer.from_buffer(text)
        tokenizer.no_truncation()
        tokenizer.encode("")  # what stands around a text may name a token that there is not
    except (ImportError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library raises nothing narrower; its panics are this wide
        raise ValueError(f"{file}: no tokenizer: {error}") from error
    return tokenizer


def _flag(file: pathlib.Path, settings: Mapping[str, Any], name: str) -> bool:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{file}: `{name}` is {value!r}; wanted true or false")
    return bool(value)
