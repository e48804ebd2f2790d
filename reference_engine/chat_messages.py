# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The messages of a conversation as plain data, in the forms that chat templates read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the usual first
_SPEAKERS = ("system", "developer", "user", "assistant")


def plain_messages(messages: Any, form: str) -> list[dict[str, Any]]:
    """A copy of the conversation as plain data, without fields that are None.

    Args:
      messages: the messages as they were given.
      form: the form of each `content`: "string", "openai" (a list of parts), or "as it came".

    Raises:
      ValueError: a message is no object, or is not a text; the error names it.
    """
    if isinstance(messages, str | Mapping) or not hasattr(messages, "__iter__"):
        raise ValueError(
            f"chat: messages is a {type(messages).__name__}; wanted a list of messages, such as"
            ' [{"role": "user", "content": "..."}]'
        )
    chat = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        message = plain(message, where)
        if not isinstance(message, dict):
            raise ValueError(
                f"chat: {where} is a {type(message).__name__}; wanted an object with `role` and"
                " `content`, and one conversation at a time"
            )
        message = {name: value for name, value in message.items() if value is not None}
        content: Any = message.get("content")
        if is_in_parts(message):
            parts = [_text_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
            message["content"] = parts
            if form == "string":
                message["content"] = "\n".join(part["text"] for part in parts)
        elif isinstance(content, str) and form == "openai":
            message["content"] = [{"type": "text", "text": content}]
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
        chat.append(message)
    if not chat:
        raise ValueError("chat: messages is empty; wanted a message or more")
    return chat


def is_in_parts(message: Mapping[str, Any]) -> bool:
    """Whether a message's content is a list of parts. A tool may return any other list."""
    content = message.get("content")
    return isinstance(content, list | tuple) and (
        message.get("role") in _SPEAKERS
        or any(isinstance(part, dict) and "type" in part for part in content)
    )


def _text_part(part: Any, where: str) -> dict[str, Any]:
    """A part of a message in the form that templates read: of type "text", with a `text`."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise ValueError(f"chat: {where} is {part!r}; wanted an object with `type` and `text`")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise ValueError(
            f"chat: {where} is of type {kind!r}; only text is served: wanted"
            ' {"type": "text", "text": "..."}'
        )
    name = "refusal" if kind == "refusal" else "text"
    if not isinstance(part.get(name), str):
        raise ValueError(f"chat: {where}.{name} is {part.get(name)!r}; wanted a text")
    return part if kind == "text" else {"type": "text", "text": part[name]}


def is_object(value: Any) -> bool:
    """Whether a value becomes a JSON object: a dict, a dataclass or a pydantic model."""
    return (
        isinstance(value, Mapping)
        or callable(getattr(value, "model_dump", None))
        or dataclasses.is_dataclass(value)
    ) and not isinstance(value, type)


def plain(value: Any, where: str) -> Any:
    """A copy that has only JSON's types, so that a template can neither change nor call it."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # enums, and numpy's strings and floats
        if isinstance(value, kind):
            return getattr(kind, "__str__" if kind is str else f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name), f"{where}.{name}") for name in names}
    for method in ("model_dump", "item"):  # pydantic's models, numpy's scalars
        if callable(getattr(value, method, None)) and getattr(value, "shape", ()) == ():
            return plain(getattr(value, method)(), where)
    raise ValueError(
        f"chat: {where} is a {type(value).__name__}; wanted what JSON has: texts, numbers, lists"
        " and objects (a tool is its JSON schema)"
    )


def plain_objects(value: Any, where: str) -> list[dict[str, Any]] | None:
    """A copy of a list of objects, None for None; `where` names it in errors."""
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise ValueError(f"chat: {where} is {value!r}; wanted a list of objects")
    objects = plain(list(value), where)
    for i, item in enumerate(objects):
        if not isinstance(item, dict):
            raise ValueError(f"chat: {where}[{i}] is {item!r}; wanted an object")
    return objects
