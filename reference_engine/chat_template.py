# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Chat templates: a conversation as the model was taught to read it.

A template is a Jinja program of the model's folder. It finds the variables, filters, tags and
globals that transformers gives it, for it may test for each of them, and it runs in a sandbox.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from reference_engine.added_tokens import CONFIG
from reference_engine.checkpoint import read_object
from reference_engine.extras import import_extra

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, the usual first
_SPEAKERS = ("system", "developer", "user", "assistant")
_FORMATS = ("auto", "string", "openai")
_OF_PARTS = ("map", "selectattr", "rejectattr")  # filters that only a list of parts has use for
_OF_LISTS = ("list", "select", "reject", "reverse", "default", "d")
# Arguments of transformers' method that have no meaning for one that returns a text.
_NOT_SERVED = (
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
)
# Stands behind the message that is to go on, until the text has been cut there. The space at its
# end says whether the template strips the message.
_CUT = "<<the-message-goes-on-here>> "


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template's text, and where it stands, for errors."""

    text: str
    where: str


def read_templates(folder: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """The chat templates of a folder by their names; "default" is the one for no name.

    Files (chat_template.jinja, additional_chat_templates/NAME.jinja) take the place of whatever
    tokenizer_config.json has. chat_template.json, of processors, is read where there is no other.

    Args:
      folder: the model's.
      settings: tokenizer_config.json.

    Raises:
      ValueError: a file has no template where one should be; the message names it.
    """
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_template(file) for name, file in sorted(files.items())}
    found = _templates_in(folder / CONFIG, settings)
    processor = folder / "chat_template.json"
    if not found and processor.exists():
        found = _templates_in(processor, read_object(processor))
    return found


def render(
    templates: Mapping[str, ChatTemplate],
    folder: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Message],
    /,
    *,
    chat_template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    chat_template_content_format: str = "auto",
    **variables: Any,
) -> str:
    """A conversation as one text; see `Tokenizer.apply_chat_template`."""
    template = _choose(templates, folder, chat_template, tools)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "chat: add_generation_prompt and continue_final_message exclude each other: the model"
            " begins a message or goes on with the last one; leave one of them out"
        )
    if chat_template_content_format not in _FORMATS:
        raise ValueError(
            f"chat: chat_template_content_format is {chat_template_content_format!r}; wanted one"
            f" of {', '.join(_FORMATS)}"
        )
    for name in _NOT_SERVED:
        if variables.pop(name, False):
            raise ValueError(
                f"chat: `{name}` is not served: the result is a text; Tokenizer.encode(text,"
                " add_special_tokens=False) makes token ids of it"
            )
    if "messages" in variables:
        raise ValueError("chat: chat_template_kwargs has `messages`; wanted them as messages alone")
    form = chat_template_content_format
    if form == "auto":
        form = "as it came" if _takes_parts(template) else "string"
    chat = _messages(messages, form)
    marked = _mark_final(chat, continue_final_message) if continue_final_message else ""
    text = _run(
        template,
        dict(special_tokens)
        | _plain(variables, "chat_template_kwargs")
        | {
            "messages": chat,
            "tools": _objects(tools, "tools"),
            "documents": _objects(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _cut(text, marked, template) if continue_final_message else text


def _choose(
    templates: Mapping[str, ChatTemplate], folder: str, wanted: str | None, tools: Any
) -> ChatTemplate:
    """The template of that name, or that text, or the folder's own for tools or for none."""
    if wanted is not None:
        if not isinstance(wanted, str):
            raise ValueError(
                f"chat: chat_template is {wanted!r}; wanted a template's name or its text"
            )
        if wanted not in templates and "{" not in wanted:  # a name, then
            raise ValueError(
                f"chat: {folder} has no chat template {wanted!r}; wanted a template's text, or one"
                f" of its names: {', '.join(sorted(templates)) or 'it has none'}"
            )
        return templates.get(wanted) or ChatTemplate(wanted, "chat_template")
    if not templates:
        raise ValueError(
            f"chat: {folder} has no chat template; wanted `chat_template` in"
            f" {CONFIG} or chat_template.jinja: use generate with a prompt, or pass chat_template"
        )
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name not in templates:
        raise ValueError(
            f"chat: {folder} has no default chat template, but {', '.join(sorted(templates))};"
            " pass one of these names as chat_template"
        )
    return templates[name]


def _run(template: ChatTemplate, variables: Mapping[str, Any]) -> str:
    try:
        return _compile(template.text).render(variables)
    except Exception as error:  # a template is a program, which fails in every way
        is_its_own = isinstance(error, import_extra("jinja2").TemplateError)
        kind = "" if is_its_own else f"{type(error).__name__}: "
        raise ValueError(f"chat: the template of {template.where} says: {kind}{error}") from error


@functools.lru_cache(maxsize=32)
def _compile(text: str) -> Any:
    return _environment().from_string(text)


@functools.cache
def _environment() -> Any:
    """What a template finds beside its variables."""
    jinja2 = import_extra("jinja2")
    nodes = import_extra("jinja2.nodes")

    class Generation(import_extra("jinja2.ext").Extension):  # type: ignore[misc]
        """`{% generation %}`: what the assistant says, which only training asks for."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(import_extra("jinja2.utils").Namespace):  # type: ignore[misc]
        """Without names that the sandbox would take for Python's own."""

        def __init__(*args: Any, **attributes: Any):  # noqa: N805 - `self` may be an attribute
            self, *given = args
            super(Namespace, self).__init__()
            for name, value in dict(*given, **attributes).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")
            super().__setitem__(name, value)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes what HTML must escape.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    sandbox = import_extra("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": Namespace,
    }
    return sandbox


def _messages(messages: Any, form: str) -> list[dict[str, Any]]:
    """A copy of the conversation: plain data, without fields that are None.

    Args:
      messages: as they came.
      form: of each `content`: "string", "openai" (a list of parts) or "as it came".
    """
    if isinstance(messages, str | Mapping) or not hasattr(messages, "__iter__"):
        raise ValueError(
            f"chat: messages is a {type(messages).__name__}; wanted a list of messages, such as"
            ' [{"role": "user", "content": "..."}]'
        )
    chat = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        message = _plain(message, where)
        if not isinstance(message, dict):
            raise ValueError(
                f"chat: {where} is a {type(message).__name__}; wanted an object with `role` and"
                " `content`, and one conversation at a time"
            )
        message = {name: value for name, value in message.items() if value is not None}
        content: Any = message.get("content")
        if _is_in_parts(message):
            parts = [_text_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
            message["content"] = parts
            if form == "string":
                message["content"] = "\n".join(part["text"] for part in parts)
        elif isinstance(content, str) and form == "openai":
            message["content"] = [{"type": "text", "text": content}]
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
        chat.append(message)
    if not chat:
        raise ValueError("chat: messages is empty; wanted a message or more")
    return chat


def _is_in_parts(message: Mapping[str, Any]) -> bool:
    """Whether a message's content is a list of parts: what a tool returns may be any list."""
    content = message.get("content")
    return isinstance(content, list | tuple) and (
        message.get("role") in _SPEAKERS
        or any(isinstance(part, dict) and "type" in part for part in content)
    )


def _text_part(part: Any, where: str) -> dict[str, Any]:
    """A part of a message in the form that templates know: of type "text", with a `text`."""
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
    """Whether it becomes an object as JSON has it: a dict, a dataclass or a pydantic model."""
    return (
        isinstance(value, Mapping)
        or callable(getattr(value, "model_dump", None))
        or dataclasses.is_dataclass(value)
    ) and not isinstance(value, type)


def _plain(value: Any, where: str) -> Any:
    """A copy out of JSON's types alone: a template can neither change nor call what it sees."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # enums, NumPy's strings and floats
        if isinstance(value, kind):
            return getattr(kind, "__str__" if kind is str else f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), f"{where}.{name}") for name in names}
    for method in ("model_dump", "item"):  # pydantic's models, NumPy's scalars
        if callable(getattr(value, method, None)) and getattr(value, "shape", ()) == ():
            return _plain(getattr(value, method)(), where)
    raise ValueError(
        f"chat: {where} is a {type(value).__name__}; wanted what JSON has: texts, numbers, lists"
        " and objects (a tool is its JSON schema)"
    )


def _objects(value: Any, where: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise ValueError(f"chat: {where} is {value!r}; wanted a list of objects")
    plain = _plain(list(value), where)
    for i, item in enumerate(plain):
        if not isinstance(item, dict):
            raise ValueError(f"chat: {where}[{i}] is {item!r}; wanted an object")
    return plain


def _mark_final(chat: list[dict[str, Any]], field: bool | str) -> str:
    """Puts the mark behind the last message's text; returns that text."""
    name = field if isinstance(field, str) else "content"
    final = chat[-1]
    value = final.get(name)
    if name == "content" and value and _is_in_parts(final):  # its last part
        *parts, last = value
        final[name] = [*parts, last | {"text": last["text"] + _CUT}]
        return last["text"]
    if not isinstance(value, str):
        raise ValueError(
            f"chat: continue_final_message: the last message's `{name}` is {value!r}; wanted a"
            " text to go on with"
        )
    names = [n for n in _REASONING if final.get(n) == value] if name in _REASONING else [name]
    for n in names:  # a template may read it under any of its names
        final[n] = value + _CUT
    return value


def _cut(text: str, marked: str, template: ChatTemplate) -> str:
    """The text up to the mark."""
    at = text.rfind(_CUT.rstrip())
    if at < 0 or marked.strip() not in text:
        raise ValueError(
            f"chat: continue_final_message: the template of {template.where} leaves the last"
            " message out, or changes it; wanted one that ends with it: leave"
            " continue_final_message out"
        )
    return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()


def _read_template(file: pathlib.Path) -> ChatTemplate:
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no chat template: {error}") from error


def _templates_in(file: pathlib.Path, raw: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """`chat_template`: one text, or texts by name."""
    found = raw.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(text, str) for name, text in found.items()
    ):
        raise ValueError(
            f"{file}: `chat_template` is {str(raw['chat_template'])[:80]!r}; wanted a text, or a"
            " list of objects with `name` and `template`"
        )
    return {
        name: ChatTemplate(text, f"{file} (`chat_template` {name!r})")
        for name, text in found.items()
    }


@functools.lru_cache(maxsize=32)
def _takes_parts(template: ChatTemplate) -> bool:
    """Whether a template goes through a message's content part by part.

    One that does not would print Python's form of a list, fail, or leave the content out. Seen are
    loops over a message's `content`, filters that take its parts' attributes and parts taken by
    number, also by way of a variable or a macro's argument. One that never looks at a content, or
    only puts it into JSON, takes it as it comes.
    """
    nodes = import_extra("jinja2.nodes")
    try:
        tree = _environment().parse(template.text)
    except import_extra("jinja2").TemplateError:
        return False  # which `_run` reports
    names: set[str] = set()  # of variables that hold a message's content

    def is_content(node: Any) -> bool:
        if isinstance(node, nodes.Filter):
            return node.name in (*_OF_PARTS, *_OF_LISTS) and is_content(node.node)
        if isinstance(node, nodes.CondExpr):
            return is_content(node.expr1) or is_content(node.expr2)
        if isinstance(node, nodes.And | nodes.Or):
            return is_content(node.left) or is_content(node.right)
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                return is_content(node.node)
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in names

    def is_part(node: Any) -> bool:
        return (
            isinstance(node, nodes.Getitem)
            and isinstance(node.arg, nodes.Const)
            and type(node.arg.value) is int
            and is_content(node.node)
        )

    pairs = list(_bindings(tree, nodes))
    for _ in pairs:  # at the most so many steps
        names |= {name for name, value in pairs if is_content(value)}
    filters = list(tree.find_all(nodes.Filter))
    accesses = list(tree.find_all((nodes.Getattr, nodes.Getitem)))
    is_dumped = sum(f.name == "tojson" and is_content(f.node) for f in filters)
    return (
        any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
        or any(f.name in _OF_PARTS and is_content(f.node) for f in filters)
        or any(is_part(access.node) for access in accesses)
        or is_dumped == sum(is_content(access) for access in accesses)  # `messages | tojson`, too
    )


def _bindings(tree: Any, nodes: Any) -> Iterator[tuple[str, Any]]:
    """Every name with a value that it may get: by `set`, or as a macro's argument."""
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node
    arguments = {m.name: [a.name for a in m.args] for m in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in arguments:
            yield from zip(arguments[call.node.name], call.args, strict=False)
            yield from ((pair.key, pair.value) for pair in call.kwargs)
