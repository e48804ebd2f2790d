# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Text to token ids, and token ids back to text while they are still coming."""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reference_engine.checkpoint import import_extra

_CONTEXT = 6  # tokens of the prompt that the first token's text can depend on
_MOST_BYTES = 4  # of a character
_MOST_WAITING = 16  # tokens; so many are no text, whatever comes
_HALF = "\N{REPLACEMENT CHARACTER}"

Message = Mapping[str, Any]


class Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json and what stands beside it."""

    def __init__(self, path: str | pathlib.Path):
        """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja if they exist.

        Raises:
          OSError: there is no tokenizer.json.
          ValueError: it is corrupt.
        """
        folder = pathlib.Path(path)
        file = folder / "tokenizer.json"
        text = file.read_text(encoding="utf-8")
        try:
            self._tokenizer = import_extra("tokenizers").Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file}: no tokenizer: {error}") from error
        settings = folder / "tokenizer_config.json"
        self._settings = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
        template = folder / "chat_template.jinja"
        self._template = (
            template.read_text("utf-8") if template.exists()
            else _default_template(self._settings.get("chat_template"))
        )
        self._where = str(folder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around one unless told not to.

        Raises:
          ValueError: the text has half a character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r}: no text, because UTF-8 has none of it: {error}") from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, special tokens left out unless they are asked for."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """What makes text of the tokens that follow a prompt, while they come."""
        decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
        return Detokenizer(decode, prompt_ids)

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """A conversation as the model was taught to read it, ready for the assistant's turn.

        Args:
          messages: `{"role": ..., "content": ...}` each.
          **options: for the template: `tools`, `enable_thinking` and what else it knows.

        Raises:
          ValueError: the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise ValueError(
                f"chat: {self._where} has no chat template; wanted `chat_template` in"
                " tokenizer_config.json or chat_template.jinja: use generate with a prompt"
            )
        jinja2 = import_extra("jinja2")
        sandbox = import_extra("jinja2.sandbox").ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.filters["tojson"] = lambda x, indent=None: json.dumps(
            x, ensure_ascii=False, indent=indent
        )
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in self._settings.items() if name.endswith("_token") and value
        }
        try:
            return sandbox.from_string(self._template, globals={
                "raise_exception": _refuse,
                "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            }).render(
                **(special | {"messages": list(messages), "add_generation_prompt": True} | options)
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"chat: the template of {self._where} says: {error}") from error


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

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]):
        self._decode = decode
        count = _CONTEXT
        while _HALF in decode(prompt_ids[-count:]) and count < _CONTEXT + _MOST_BYTES:
            count += 1  # it begins inside a character
        self._ids = list(prompt_ids[-count:])  # what was said last, and what waits
        self._num_said = len(self._ids)
        self._said = decode(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._ids += token_ids
        text = self._decode(self._ids)
        is_half = text.endswith(_HALF) and len(self._ids) - self._num_said < _MOST_WAITING
        if is_half or len(text) <= len(self._said):
            return ""
        new = text[len(self._said):]
        self._ids = self._ids[self._num_said:]
        self._num_said = len(self._ids)
        self._said = self._decode(self._ids)
        return new

    def finish(self, token_ids: Sequence[int] = ()) -> str:
        """All that is left, with these last tokens, without the half character at its end."""
        return self._decode([*self._ids, *token_ids])[len(self._said):].rstrip(_HALF)


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
        self._kept = text[len(shown):]
        self._num_free = max(0, self._num_free - len(shown))
        return shown, None

    def finish(self) -> str:
        """What was kept back and has become no stop string."""
        return self._kept


def _default_template(found: Any) -> str | None:
    """A template is a string, or one of a list of named ones."""
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _refuse(message: str) -> None:
    raise import_extra("jinja2").TemplateError(message)
