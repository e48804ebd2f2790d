# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Chat templates: a conversation as one text, in the form on which the model was trained.

A template is a Jinja program in the model's folder. It runs in a sandbox, and gets the variables,
filters, tags and globals that transformers gives it, because it may test for any of them.
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
from reference_engine.chat_messages import (
    REASONING,
    Message,
    is_in_parts,
    plain,
    plain_messages,
    plain_objects,
)
from reference_engine.extras import import_extra
from reference_engine.json_fields import read_object

_FORMATS = ("auto", "string", "openai")
_OF_PARTS = ("map", "selectattr", "rejectattr")  # filters that are only useful on a list of parts
_OF_LISTS = ("list", "select", "reject", "reverse", "default", "d")
# Arguments of transformers' method that mean nothing where the result is a text.
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
# A mark that is appended to the message that is to go on; the text is cut there afterwards. If the
# space at its end is missing, the template has stripped the message.
_CUT = "<<the-message-goes-on-here>> "


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template's text, and the file that holds it, for errors."""

    text: str
    where: str


def read_templates(folder: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """The chat templates of a folder by their names; "default" is the one that has no name.

    If there are files (chat_template.jinja, additional_chat_templates/NAME.jinja), the templates of
    tokenizer_config.json are ignored. The file of processors, chat_template.json, is read if there
    is no other template.

    Args:
      folder: the model's folder.
      settings: the content of tokenizer_config.json.

    Raises:
      ValueError: a file has no template where one should be; the message names the file.
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
    """A conversation as one text; see `Tokenizer.apply_chat_template`.

    Args:
      templates: what `read_templates` has read.
      folder: the name of the model's folder, for errors.
      special_tokens: name -> text of the special tokens.
      messages, chat_template, tools, documents, add_generation_prompt, continue_final_message,
        chat_template_content_format: see `Tokenizer.apply_chat_template`.
      **variables: variables for the template.
    """
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
    chat = plain_messages(messages, form)
    marked = _mark_final(chat, continue_final_message) if continue_final_message else ""
    text = _run(
        template,
        dict(special_tokens)
        | plain(variables, "chat_template_kwargs")
        | {
            "messages": chat,
            "tools": plain_objects(tools, "tools"),
            "documents": plain_objects(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _cut(text, marked, template) if continue_final_message else text


def _choose(
    templates: Mapping[str, ChatTemplate], folder: str, wanted: str | None, tools: Any
) -> ChatTemplate:
    """The template with the wanted name or text; without one, the folder's own for these tools."""
    if wanted is not None:
        if not isinstance(wanted, str):
            raise ValueError(
                f"chat: chat_template is {wanted!r}; wanted a template's name or its text"
            )
        if wanted not in templates and "{" not in wanted:  # it is a name
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
    except Exception as error:  # a template is a program, and may fail in any way
        is_its_own = isinstance(error, import_extra("jinja2").TemplateError)
        kind = "" if is_its_own else f"{type(error).__name__}: "
        raise ValueError(f"chat: the template of {template.where} says: {kind}{error}") from error


@functools.lru_cache(maxsize=32)
def _compile(text: str) -> Any:
    return _environment().from_string(text)


@functools.cache
def _environment() -> Any:
    """The sandbox in which templates run, with all that they get beside their variables."""
    jinja2 = import_extra("jinja2")
    nodes = import_extra("jinja2.nodes")

    class Generation(import_extra("jinja2.ext").Extension):  # type: ignore[misc]
        """`{% generation %}` marks what the assistant says; only training needs the mark."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(import_extra("jinja2.utils").Namespace):  # type: ignore[misc]
        """A namespace that refuses names which the sandbox would take for Python's own."""

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
        # Jinja's own filter also escapes characters for HTML.
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


def _mark_final(chat: list[dict[str, Any]], field: bool | str) -> str:
    """Appends the mark to the text of the last message; returns the text without it."""
    name = field if isinstance(field, str) else "content"
    final = chat[-1]
    value = final.get(name)
    if name == "content" and value and is_in_parts(final):  # the mark goes to the last part
        *parts, last = value
        final[name] = [*parts, last | {"text": last["text"] + _CUT}]
        return last["text"]
    if not isinstance(value, str):
        raise ValueError(
            f"chat: continue_final_message: the last message's `{name}` is {value!r}; wanted a"
            " text to go on with"
        )
    names = [n for n in REASONING if final.get(n) == value] if name in REASONING else [name]
    for n in names:  # a template may read it under any of its names
        final[n] = value + _CUT
    return value


def _cut(text: str, marked: str, template: ChatTemplate) -> str:
    """The text before the mark."""
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
    """The templates of the field `chat_template`, which is one text or has texts by name."""
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
    """Whether a template reads a message's content part by part.

    If it does not, a list of parts would make it print Python's form of the list, fail, or leave
    the content out. It does if it loops over a message's `content`, applies a filter to attributes
    of the parts, or takes a part by its number, also through a variable or a macro's argument. A
    template that never reads a content, or only writes it as JSON, accepts parts as well.
    """
    nodes = import_extra("jinja2.nodes")
    try:
        tree = _environment().parse(template.text)
    except import_extra("jinja2").TemplateError:
        return False  # which `_run` reports
    names: set[str] = set()  # the variables that hold a message's content

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
    for _ in pairs:  # a chain of variables is at most this long
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
    """Every name with each value that it may get, by `set` or as a macro's argument."""
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node
    arguments = {m.name: [a.name for a in m.args] for m in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in arguments:
            yield from zip(arguments[call.node.name], call.args, strict=False)
            yield from ((pair.key, pair.value) for pair in call.kwargs)
