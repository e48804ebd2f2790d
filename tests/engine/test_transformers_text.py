# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Token ids, texts and laid-out conversations are those that transformers makes of the folder."""

import json
import warnings

import pytest

from reference_engine.tokenizer import Tokenizer
from tests.engine.chat_templates import CONVERSATIONS, FAMILIES, IN_PARTS
from tests.engine.checkpoints import TEXT, byte_tokenizer, sentencepiece_tokenizer, write_tokenizer

transformers = pytest.importorskip(
    "transformers", reason="the test extra brings it for Python 3.11 alone"
)

NEW = byte_tokenizer().get_vocab_size()
ALL_FLAGS = {"lstrip": True, "rstrip": True, "single_word": True, "normalized": True}
TYPED = {"__type": "AddedToken", "content": "<pad>", "lstrip": True}
TEXTS = [
    *TEXT,
    "",
    "the quick <x> dog <y y><IMG> <s>the</s>  <pad> owl [MASK] \u00e9the <img> <|user|> dog",
    "dog , it 's . ' n't ? DOG adog dogs <X> <x>dog",
]
PADDING = {
    "strategy": {"Fixed": 90},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<filler>",
}
TRUNCATION = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 2}
LOWER = {"normalizer": {"type": "Lowercase"}}
# What stands in tokenizer.json (beside the vocabulary), and the files beside it.
FOLDERS = {
    "alone": {},
    "truncation": {"tokenizer": {"truncation": TRUNCATION}},
    "padding": {"tokenizer": {"padding": PADDING}},
    "padding of a named token": {
        "tokenizer": {"padding": PADDING}, "tokenizer_config": {"pad_token": "<x>"}},
    "no post-processor": {"tokenizer": {"post_processor": None},
                          "tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}},
    "Llama's switches": {"tokenizer_config": {"add_bos_token": False, "add_eos_token": True,
                                              "eos_token": "</s>", "add_prefix_space": True}},
    "named": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "dog", "pad_token": TYPED,
                                   "image_token": "<IMG>", "unk_token": None}},
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<x>", "<y y>", "dog"]}},
    "extra": {"tokenizer_config": {"extra_special_tokens": ["<x>"]}},
    "extra by name": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<IMG>"}}},
    "decoder": {"tokenizer_config": {"pad_token": "<pad>", "added_tokens_decoder": {
        str(NEW + 1): {"content": "<y y>", "special": True},
        str(NEW): {"content": "<x>", "special": False},
        str(NEW + 5): {"content": "<pad>", "rstrip": True}}}},
    "decoder hides older files": {
        "tokenizer_config": {"added_tokens_decoder": {str(NEW): {"content": "<x>"}}},
        "special_tokens_map": {"pad_token": "<pad>"}, "added_tokens": {"<y y>": NEW}},
    "flags": {"tokenizer": LOWER, "tokenizer_config": {"added_tokens_decoder": {
        str(NEW): {"content": "<x>", **ALL_FLAGS}, str(NEW + 1): {"content": "dog", **ALL_FLAGS},
        str(NEW + 2): {"content": "<IMG>", "normalized": False, "special": True}}}},
    "single words": {"tokenizer_config": {"added_tokens_decoder": {
        str(NEW): {"content": "dog", "single_word": True}}}},
    "additional by object": {"tokenizer_config": {"additional_special_tokens": [
        "<x>", TYPED, {"__type": "AddedToken", "content": "<IMG>", "special": True}]}},
    "additional by object in older files": {
        "tokenizer_config": {"additional_special_tokens": ["<x>", TYPED]},
        "added_tokens": {"<pad>": NEW, "<x>": NEW + 1}},
    "a model's own": {"tokenizer_config": {
        "image_token": "<IMG>", "audio_token": TYPED, "extra_special_tokens": {"x_token": "[MASK]"},
        "added_tokens_decoder": {str(NEW): {"content": "<x>"}}}},
    "special map takes away": {
        "tokenizer_config": {"eos_token": "<x>", "image_token": TYPED, "audio_token": "<IMG>"},
        "special_tokens_map": {"eos_token": None, "image_token": None, "audio_token": None}},
    "special map": {"tokenizer_config": {"bos_token": "<s>", "image_token": "<IMG>"},
                    "special_tokens_map": {
                        "bos_token": {"content": "<y y>", "lstrip": True}, "audio_token": "[MASK]",
                        "image_token": "<x>", "additional_special_tokens": ["<pad>"]}},
    "older": {"tokenizer": LOWER, "special_tokens_map": {"unk_token": "<x>"},
              "added_tokens": {"<IMG>": NEW + 2, "<x>": NEW, "<y y>": NEW + 1}},
    "split": {"tokenizer_config": {"split_special_tokens": True, "pad_token": "<pad>"}},
    "cleaned": {"tokenizer_config": {"clean_up_tokenization_spaces": True}},
    "cleaned all the same": {"tokenizer_config": {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}},
}  # fmt: skip


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def parts(request):
    """tokenizer.json of each kind."""
    made = {"bytes": byte_tokenizer, "pieces": sentencepiece_tokenizer}[request.param]()
    return json.loads(made.to_str())


def theirs(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_are_those_of_transformers(tmp_path, parts, name):
    files = dict(FOLDERS[name])
    files["tokenizer"] = parts | files.get("tokenizer", {})
    folder = write_tokenizer(tmp_path, **files)
    reference, tokenizer = theirs(folder), Tokenizer(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = reference.encode(text, add_special_tokens=special)
            assert tokenizer.encode(text, add_special_tokens=special) == ids
        for skipped in (True, False):
            want = reference.decode(ids, skip_special_tokens=skipped)
            assert tokenizer.decode(ids, skip_special_tokens=skipped) == want
            stream = tokenizer.detokenizer((), skip_special_tokens=skipped)
            assert "".join(stream.push([i]) for i in ids) + stream.finish() == want.rstrip("\ufffd")
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ audio_token }}"
    template += "{{ add_bos_token }}{{ additional_special_tokens is defined }}"
    chat = [{"role": "user", "content": "x"}]
    want = reference.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert tokenizer.apply_chat_template(chat, chat_template=template) == want


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family's name, and both tokenizers with its template."""
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "pad_token": "</s>",
        "image_token": "<img>",
        "add_bos_token": True,
        "chat_template": FAMILIES[request.param],
    }
    folder = write_tokenizer(tmp_path_factory.mktemp("family"), tokenizer_config=config)
    return request.param, theirs(folder), Tokenizer(folder)


@pytest.mark.parametrize("conversation", CONVERSATIONS | IN_PARTS)
def test_conversations_are_laid_out_as_transformers_does(family, conversation):
    name, reference, tokenizer = family
    messages, options = (CONVERSATIONS | IN_PARTS)[conversation]
    if conversation in IN_PARTS and name not in ("gemma", "parts"):
        # There transformers fails, prints a Python list, or drops the text; here it is a text.
        messages = [
            message
            if isinstance(message["content"], str)
            else message | {"content": "\n".join(part["text"] for part in message["content"])}
            for message in messages
        ]
    try:
        want = reference.apply_chat_template(
            messages, tokenize=False, **({"add_generation_prompt": True} | options)
        )
    except Exception as error:  # of the template
        with pytest.raises(ValueError) as refusal:
            tokenizer.apply_chat_template(messages, **options)
        assert " says: " in str(refusal.value) and str(refusal.value).endswith(str(error))
        return
    given = (CONVERSATIONS | IN_PARTS)[conversation][0]
    assert tokenizer.apply_chat_template(given, **options) == want
    ids = reference(want, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(want, add_special_tokens=False) == ids


def write_templates(folder, config=None, file=None, **others):
    settings = {} if config is None else {"chat_template": config}
    write_tokenizer(folder, tokenizer_config=settings)
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    if others:
        (folder / "additional_chat_templates").mkdir()
    for name, text in others.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return folder


NAMED = [
    {"name": "default", "template": "D"},
    {"name": "tool_use", "template": "T"},
    {"name": "rag", "template": "R{{ documents | length }}"},
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": []},
        {"tools": [{"type": "function"}]},
        {"chat_template": "rag", "documents": []},
        {"chat_template": "{{ messages | length }}"},
    ],
    ids=str,
)
@pytest.mark.parametrize("places", [
    {"config": "C"}, {"config": NAMED}, {"config": NAMED[1:]}, {"config": "C", "file": "F"},
    {"config": NAMED, "file": "F"}, {"config": "C", "tool_use": "A"},
    {"config": NAMED, "file": "F", "tool_use": "A"}, {"file": "F\n", "rag": "\n{% if 1 %}\nA\n"
                                                     "{% endif %}\n"},
    {"config": {"default": "D", "tool_use": "T"}}, {},
], ids=str)  # fmt: skip
def test_the_same_template_is_chosen(tmp_path, places, options):
    folder = write_templates(tmp_path, **places)
    chat = [{"role": "user", "content": "x"}]
    reference, tokenizer = theirs(folder), Tokenizer(folder)
    try:
        want = reference.apply_chat_template(chat, tokenize=False, **options)
    except ValueError:
        with pytest.raises(ValueError, match="chat: .* has no (default )?chat template"):
            tokenizer.apply_chat_template(chat, **options)
        return
    if want == options.get("chat_template"):  # transformers takes a name that it has not as a text
        with pytest.raises(ValueError, match="has no chat template 'rag'; wanted"):
            tokenizer.apply_chat_template(chat, **options)
        return
    assert tokenizer.apply_chat_template(chat, **options) == want
