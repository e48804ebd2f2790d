# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a chat template is given, which messages are refused, and in what words."""

import dataclasses
import enum
import json
import types

import numpy as np
import pytest

from reference_engine.llm import LLM
from reference_engine.tokenizer import Tokenizer
from tests.engine.chat_templates import CONVERSATIONS, FAMILIES, QWEN3, TOOLS
from tests.engine.checkpoints import byte_tokenizer, write_checkpoint, write_tokenizer

USER = {"role": "user", "content": "hi"}
PARTS = [{"type": "text", "text": "a "}, "b", {"type": "input_text", "text": "c"}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tokenizer without a template of its own."""
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("plain")))


def lay_out(tokenizer, template, messages=(USER,), **options):
    return tokenizer.apply_chat_template(messages, chat_template=template, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_template_lays_out_parts(plain, name):
    options = {"bos_token": "<s>", "date_string": "today"}
    got = lay_out(plain, FAMILIES[name], [{"role": "user", "content": PARTS}], **options)
    joined = {"gemma": "abc", "parts": "a |b|c"}.get(name, "a \nb\nc")
    assert joined in got
    if name not in ("gemma", "parts"):
        same = [{"role": "user", "content": "a \nb\nc"}]
        assert got == lay_out(plain, FAMILIES[name], same, **options)


@pytest.mark.parametrize(
    "template, is_aware",
    [
        ("{% for p in messages[0].content %}{{ p }}{% endfor %}", True),
        ("{% for p in messages[0]['content'][1:] %}{{ p }}{% endfor %}", True),
        ("{% set c = messages[0].content or [] %}{% for p in c | list %}{{ p }}{% endfor %}", True),
        (
            "{% macro f(x, c) %}{% for p in c %}{{ p }}{% endfor %}{% endmacro %}"
            "{{ f(1, c=messages[0].content) }}",
            True,
        ),
        ("{{ messages[0].content | map(attribute='text') | join }}", True),
        ("{{ messages[0].content[0].text }}", True),
        ("{{ messages | tojson }}", True),
        ("{{ messages[0].content | tojson }}", True),
        ("{{ messages[0].content }}", False),
        ("{{ messages[0].content[0] }}", False),
        (
            "{% set c = messages[0].content | trim %}{% for w in c.split() %}{{ w }}{% endfor %}",
            False,
        ),
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}", False),
    ],
)
def test_a_template_that_goes_through_parts_gets_them(plain, template, is_aware):
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2}]
    got = lay_out(plain, template, messages)
    text = lay_out(plain, template, [{"role": "user", "content": "x\nx"}])
    assert (got != text) == is_aware
    assert lay_out(plain, template, messages, chat_template_content_format="string") == text


def test_the_form_of_contents_can_be_said(plain):
    template = "{{ messages | tojson }}"
    for form, content in (
        ("auto", "hi"),
        ("string", "hi"),
        ("openai", [{"type": "text", "text": "hi"}]),
    ):
        got = lay_out(plain, template, chat_template_content_format=form)
        assert json.loads(got) == [{"role": "user", "content": content}]


class Role(enum.StrEnum):
    USER = "user"


@dataclasses.dataclass
class Turn:
    role: str
    content: str
    weight: np.ndarray


def test_messages_become_plain_data(plain):
    model = types.SimpleNamespace(model_dump=lambda: {"role": "tool", "content": "t", "name": None})
    turn = Turn(Role.USER, "x", np.float32(0.5))
    message = {"role": "assistant", "content": None, "id": np.int64(7), "ok": np.True_}
    message["thinking"] = "hm"
    got = lay_out(plain, "{{ messages | tojson }}", (m for m in (model, turn, message)))
    assert json.loads(got) == [
        {"role": "tool", "content": "t"},
        {"role": "user", "content": "x", "weight": 0.5},
        {"role": "assistant", "id": 7, "ok": True, "thinking": "hm", "reasoning_content": "hm"},
    ]
    assert message["content"] is None and "reasoning_content" not in message


def test_the_callers_messages_are_left_alone(plain):
    given = [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    template = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}"
    assert lay_out(plain, template, given, continue_final_message=True) == "x"
    assert given == [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages is empty"),
        ("hi", "messages is a str; wanted a list of messages"),
        (USER, "messages is a dict; wanted a list of messages"),
        (None, "messages is a NoneType; wanted"),
        ([[USER]], r"messages\[0\] is a list; .* one conversation at a time"),
        ([USER, "hi"], r"messages\[1\] is a str; wanted an object"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[0\] is of type 'image_url'; only text is served",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is None; wanted"),
        ([{"role": "user", "content": [3]}], r"content\[0\] is 3; wanted an object"),
        ([{"role": "tool", "content": [{"type": "image"}]}], "is of type 'image'; only text"),
        ([USER | {"when": object()}], r"messages\[0\].when is a object; wanted what JSON has"),
        ([USER | {"x": np.zeros(3)}], r"messages\[0\].x is a ndarray"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_messages_that_are_none_are_refused(plain, messages, message):
    with pytest.raises(ValueError, match=f"^chat: .*{message}"):
        lay_out(plain, "{{ messages }}{% for p in messages[0].content %}{% endfor %}", messages)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tools": [print]}, r"tools\[0\] is a builtin_function.*a tool is its JSON schema"),
        ({"tools": {"type": "function"}}, "tools is .*wanted a list of objects"),
        ({"tools": ["weather"]}, r"tools\[0\] is 'weather'; wanted an object"),
        ({"documents": ["text"]}, r"documents\[0\] is 'text'; wanted an object"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
        ({"chat_template_content_format": "xml"}, "format is 'xml'; wanted one of auto, "),
        ({"chat_template_kwargs": {"messages": []}}, "has `messages`"),
        ({"chat_template_kwargs": {"when": object()}}, r"chat_template_kwargs.when is a object"),
        ({"chat_template_kwargs": ["thinking"]}, r"kwargs is \['thinking'\]; wanted a dict"),
        ({"tokenize": True}, "`tokenize` is not served"),
        ({"return_tensors": "np"}, "`return_tensors` is not served"),
        ({"chat_template": "tool_use"}, "no chat template 'tool_use'; wanted a template's text"),
        ({"chat_template": 3}, "chat_template is 3; wanted a template's name"),
        ({"continue_final_message": "reasoning"}, "`reasoning` is None; wanted a text"),
        ({"chat_template": "{{ 1 }}", "continue_final_message": True}, "leaves the last message"),
        (
            {"chat_template": "{{ messages[0].content | upper }}", "continue_final_message": True},
            "or changes it",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_options_that_are_wrong_are_refused(plain, options, message):
    with pytest.raises(ValueError, match=f"^chat: .*{message}"):
        plain.apply_chat_template([USER], **({"chat_template": "{{ messages }}"} | options))


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ 'a' + 1 }}", "TypeError: "),
        ("{{ nothing | tojson }}", "TypeError: "),
        ("{{ nothing.more }}", "'nothing' is undefined"),
        ("{{ messages[0].function.name }}", "no attribute 'function'"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{% break %}", "SyntaxError: "),
        ("{% generation %}", "Unexpected end of template"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ x | nofilter }}", "No filter named 'nofilter'"),
        ("{{ raise_exception('T\u00e9mplate says no') }}", "T\u00e9mplate says no"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ messages[0].update(a=1) }}", "access to attribute 'update'"),
        ("{{ ''.__class__.mro() }}", "access to attribute '__class__'"),
        ("{% set ns = namespace() %}{% set ns.__call__ = 1 %}", "a namespace takes no '__call__'"),
        ("{{ namespace(_x=1) }}", "a namespace takes no '_x'"),
        ("{{ range(10000000) | list }}", "OverflowError: "),
    ],
)
def test_whatever_fails_in_a_template_is_a_value_error(plain, template, message):
    with pytest.raises(ValueError) as refusal:
        lay_out(plain, template)
    assert str(refusal.value).startswith("chat: the template of chat_template says: ")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "template, want",
    [
        ("{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}{{ x is defined }}", "a1False"),
        (
            "{% for m in messages * 3 %}{%- generation -%} {{ loop.index }} {%- endgeneration -%}"
            "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
            "12",
        ),
        ("{{ {'b': '\u00e9<', 'a': none} | tojson }}", '{"b": "\u00e9<", "a": null}'),
        (
            "{{ {'b': '\u00e9', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True) }}",
            '{"a": 1, "b": "\\u00e9"}',
        ),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{{ enable_thinking is defined }}{{ enable_thinking }}", "False"),
        ("{{ strftime_now is defined }}{{ strftime_now('%%') }}", "True%"),
        ("{% set ns = namespace(self=1, n=2) %}{% set ns.n = 3 %}{{ ns.self }}{{ ns.n }}", "13"),
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n\n", "x\n"),
        ("{{ dict(a=1).a }}{{ dict.fromkeys('a') }}", "1{'a': None}"),
    ],
)
def test_a_template_finds_what_transformers_gives_it(plain, template, want):
    assert lay_out(plain, template) == want


def test_variables_come_by_name_or_in_a_dict(plain):
    kwargs = {"enable_thinking": False, "add_generation_prompt": True}
    direct = lay_out(plain, QWEN3, tools=TOOLS, tokenize=False, **kwargs)
    assert direct.endswith("<think>\n\n</think>\n\n") and "ma\u00f1ana" in direct
    assert direct == lay_out(plain, QWEN3, tools=TOOLS, chat_template_kwargs=kwargs)
    assert direct == lay_out(
        plain, QWEN3, chat_template_kwargs=kwargs | {"tools": TOOLS}, enable_thinking=True
    )
    assert lay_out(
        plain,
        "{{ folder }}{{ templates }}{{ self is defined }}{{ special_tokens }}",
        folder=1,
        templates=2,
        special_tokens=3,
        chat_template_kwargs={"self": 0},
    ).startswith("12")


@pytest.mark.parametrize("field", [True, "thinking", "reasoning_content", "reasoning"])
@pytest.mark.parametrize("strips", [False, True])
def test_a_message_is_left_open_where_it_ends(plain, field, strips):
    name = "content" if field is True else "reasoning_content"
    template = f"<{{{{ messages[-1].{name}{' | trim' if strips else ''} }}}}></end>"
    message = {"role": "assistant", "content": "so far " if field is True else "x"}
    if field is not True:
        message[field] = "so far "
    want = "<so far" if strips else "<so far "
    assert lay_out(plain, template, [USER, message], continue_final_message=field) == want


def test_a_processors_template_is_read_where_there_is_no_other(tmp_path):
    write_tokenizer(tmp_path, chat_template={"chat_template": "of a processor"})
    assert Tokenizer(tmp_path).apply_chat_template([USER]) == "of a processor"
    write_tokenizer(tmp_path, tokenizer_config={"chat_template": "of the config"})
    assert Tokenizer(tmp_path).apply_chat_template([USER]) == "of the config"


@pytest.mark.parametrize(
    "name, where",
    [
        ("tokenizer_config.json", r"tokenizer_config\.json \(`chat_template` 'default'\)"),
        ("chat_template.jinja", r"chat_template\.jinja"),
        ("additional_chat_templates/default.jinja", r"additional_chat_templates/default\.jinja"),
        ("chat_template.json", r"chat_template\.json \(`chat_template` 'default'\)"),
    ],
)
def test_errors_name_the_template_that_refuses(tmp_path, name, where):
    write_tokenizer(tmp_path)
    text = "{{ raise_exception('no') }}"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(
        json.dumps({"chat_template": text}) if name.endswith("json") else text
    )
    with pytest.raises(ValueError, match=f"the template of .*/{where} says: no$"):
        Tokenizer(tmp_path).apply_chat_template([USER])


def test_a_chat_of_an_llm_takes_all_of_it(tmp_path):
    write_checkpoint(tmp_path, tokenizer=byte_tokenizer(), template=QWEN3)
    llm = LLM(tmp_path, use_tqdm=False)
    messages, options = CONVERSATIONS["call"]
    options = options | {"chat_template_kwargs": {"enable_thinking": False}}
    text = llm.tokenizer.apply_chat_template(messages, **options)
    assert "<tools>" in text and text.endswith("</think>\n\n")
    assert llm.tokenizer.encode(text, add_special_tokens=False) == llm.chat_prompt(
        messages, **options
    )
    with pytest.raises(ValueError, match="only text is served"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}])
