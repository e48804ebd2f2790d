# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer: text to token ids, and token ids to text while they are generated."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reference_engine import chat_template
from reference_engine.added_tokens import CONFIG, read_added_tokens
from reference_engine.chat_messages import Message
from reference_engine.extras import import_extra
from reference_engine.json_fields import read_object

_CONTEXT = 6  # the last tokens of the prompt, on which the text of the first new token can depend
_MOST_BYTES = 4  # of one character in UTF-8
_MOST_WAITING = 16  # tokens; this many that end in half a character are no text
_HALF = "\N{REPLACEMENT CHARACTER}"
# The replacements that `clean_up_tokenization_spaces` asks for, in this order.
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
# No replacement matches across a character that occurs in none, or across three without a space.
_SETTLED = re.compile(r"[^ .?!,'ntmsver]|[^ ]{3}")


class Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json and the files beside it.

    For every text, it gives the ids that transformers' PreTrainedTokenizerFast gives.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Reads the files.

        They are tokenizer.json and, if they exist, tokenizer_config.json, the older
        special_tokens_map.json and added_tokens.json, and the chat templates. Settings for training
        are ignored: truncation, padding and dropout. `add_bos_token` and `add_eos_token` are not
        read either, because tokenizer.json says which tokens surround a text.

        Args:
          path: the folder.

        Raises:
          OSError: there is no tokenizer.json.
          ValueError: a file is corrupt; the message names the file and the field.
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
        # Byte-pair tokens contain their spaces, so cleaning would remove spaces of the text itself.
        # transformers therefore asks for it by another name.
        self._cleans = _flag(file, settings, "clean_up_tokenization_spaces") and (
            not is_bpe or _flag(file, settings, _CLEANS_BPE)
        )
        self._special_tokens = added.template_variables
        self._templates = chat_template.read_templates(folder, settings)
        self._where = str(folder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
          text: any str that UTF-8 can encode.
          add_special_tokens: whether to add the tokens that the tokenizer adds around a text.

        Raises:
          ValueError: the text is no str, or has half a character.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode: {text!r} is a {type(text).__name__}; wanted a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{text!r}: no text, because UTF-8 cannot encode it: {error}"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, without special tokens unless they are asked for."""
        text = self._decode(token_ids, skip_special_tokens)
        return _clean(text) if self._cleans else text

    def detokenizer(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A Detokenizer for the tokens that follow a prompt."""
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
        """A conversation as one text, in the form on which the model was trained.

        The text contains special tokens: `encode(text, add_special_tokens=False)` gives its ids.

        Args:
          messages: dicts `{"role": ..., "content": ...}`, with any other field that the template
            reads, such as `tool_calls` (whose `arguments` are objects, because templates write them
            as JSON) and `reasoning_content`. `content` is a text or a list of parts,
            `{"type": "text", "text": ...}`. A template that does not loop over parts gets their
            texts, joined by line breaks.
          chat_template_kwargs: variables for the template, such as `enable_thinking`. It may hold
            any of the options as well.
          **options: options by the names of vLLM and transformers, and variables for the template.
            `chat_template`: the name of one of the folder's templates, or the text of another one.
            `tools`: a list of JSON schemas.
            `documents`: a list of objects.
            `add_generation_prompt`: whether to begin the assistant's message. The default is True,
            unless the next option is given.
            `continue_final_message`: leave the last message open, so that the model goes on with
            it; the name of the field to go on with, or True for `content`.
            `chat_template_content_format`: "string" or "openai" gives the template every `content`
            as a text or as parts; "auto" is as described above.

        Raises:
          ValueError: the model has no template, an argument is wrong, or the template refuses the
            messages; then the error names the template, and says what it says.
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
    """The text of tokens while they are generated, never with half a character.

    The text of a token depends on the tokens before it: on whether it begins with a space, and on
    the bytes of a character. So a token is decoded together with the tokens before it, and their
    own text is removed. Text that ends in half a character waits for the rest. Hugging Face's
    text-generation-inference and vLLM do it in this way.

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
    ) -> None:
        """Begins after a prompt.

        Args:
          decode: a function from token ids to text.
          prompt_ids: the prompt's token ids.
          cleans: whether to remove spaces before punctuation, as `clean_up_tokenization_spaces`
            asks for. Text that could still change with the next character waits.
        """
        self._decode = decode
        self._cleans = cleans
        self._unclean = ""  # text that waits to be cleaned
        count = _CONTEXT
        while _HALF in decode(prompt_ids[-count:]) and count < _CONTEXT + _MOST_BYTES:
            count += 1  # these tokens begin inside a character
        # The tokens whose text was returned last (the first _num_said), then those that wait.
        self._ids = list(prompt_ids[-count:])
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
        """The rest of the text with these last tokens, without half a character at its end."""
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
    """Passes text on until a stop string is complete, and keeps back what may become one.

    >>> stop = StopStrings(["END"])
    >>> [stop.push(text) for text in ("an E", "N", "D.")]
    [('an ', None), ('', None), ('', 'END')]
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        """Begins a text.

        Args:
          stops: the stop strings.
          is_included: whether the text ends after the stop string, and not before it.
        """
        self._stops = stops
        self._is_included = is_included
        self._kept = ""
        self._num_free = 0  # kept characters in which no stop string may end the text

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text to show now, and the stop string that ends it there, or None.

        If not `may_stop`, a stop string that ends in this text does not end it; one that begins in
        it may end the text later.
        """
        text = self._kept + text
        if not may_stop:
            self._num_free = len(text)
        starts = [text.find(stop, max(0, self._num_free + 1 - len(stop))) for stop in self._stops]
        found = [
            (at, len(stop), stop) for at, stop in zip(starts, self._stops, strict=True) if at >= 0
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
        """The text that was kept back and has not become a stop string."""
        return self._kept


def _clean(text: str) -> str:
    for found, replacement in _CLEANING:
        text = text.replace(found, replacement)
    return text


def _tokenizer_file(settings: Mapping[str, Any]) -> str:
    """tokenizer.json, or the newest of the files that a folder has for versions of transformers."""
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
        tokenizer.encode("")  # fails if a token that surrounds every text does not exist
    except (ImportError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library's panics derive only from BaseException
        raise ValueError(f"{file}: no tokenizer: {error}") from error
    return tokenizer


def _flag(file: pathlib.Path, settings: Mapping[str, Any], name: str) -> bool:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{file}: `{name}` is {value!r}; wanted true or false")
    return bool(value)
