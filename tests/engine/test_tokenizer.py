# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a folder's files make of a text, and text that comes in pieces: whole characters, no stop
string."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from reference_engine.tokenizer import Detokenizer, StopStrings, Tokenizer
from tests.engine.checkpoints import (
    TEMPLATE,
    byte_tokenizer,
    sentencepiece_tokenizer,
    write_checkpoint,
    write_tokenizer,
)

TOKENIZERS = {"bytes": byte_tokenizer(), "pieces": sentencepiece_tokenizer()}
CHARACTERS = st.text(alphabet="the quickdog,aé東タ🦊🐙½\n \N{REPLACEMENT CHARACTER}", max_size=40)
SETTINGS = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=150)


@pytest.mark.parametrize("name", TOKENIZERS)
@SETTINGS
@hypothesis.given(prompt=CHARACTERS, text=CHARACTERS, sizes=st.lists(st.integers(1, 3), max_size=9))
def test_pieces_add_up_to_the_whole_text(name, prompt, text, sizes):
    tokenizer = TOKENIZERS[name]

    def decode(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    ids = tokenizer.encode(prompt + text, add_special_tokens=False).ids
    start = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
    prompt_ids, ids = ids[:start], ids[start:]
    whole = decode(prompt_ids + ids)[len(decode(prompt_ids)) :]
    hypothesis.assume(not decode(prompt_ids).endswith("\N{REPLACEMENT CHARACTER}"))
    detokenizer, pieces = Detokenizer(decode, prompt_ids), []
    while ids:
        size = sizes.pop() if sizes else 1
        pieces.append(detokenizer.push(ids[:size]))
        ids = ids[size:]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    got = "".join(pieces) + detokenizer.finish()
    assert got == whole or got == whole.rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("name", TOKENIZERS)
@SETTINGS
@hypothesis.given(data=st.data())
def test_no_sequence_of_tokens_is_lost_or_held_for_ever(name, data):
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=60))
    detokenizer = Detokenizer(tokenizer.decode, ids[:3])
    pieces = [detokenizer.push([token]) for token in ids[3:]]
    waiting = 0
    for token, piece in zip(ids[3:], pieces, strict=True):
        says_nothing = not tokenizer.decode([token], skip_special_tokens=True)
        waiting = 0 if piece or says_nothing else waiting + 1
        assert waiting <= 20
    detokenizer.finish()


def test_a_cut_character_waits_for_its_last_byte():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("a🐙b", add_special_tokens=False).ids
    assert len(ids) > 3  # the octopus is several tokens
    detokenizer = Detokenizer(tokenizer.decode, ())
    pieces = [detokenizer.push([token]) for token in ids]
    assert [piece for piece in pieces if piece] == ["a", "🐙", "b"]
    cut = Detokenizer(tokenizer.decode, ())
    assert "".join(cut.push([token]) for token in ids[:-2]) + cut.finish() == "a"


def test_a_space_before_the_first_token_is_kept():
    tokenizer = TOKENIZERS["pieces"]
    ids = tokenizer.encode("the quick dog", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer.decode, ids[:1])
    assert [detokenizer.push([token]) for token in ids[1:]] == [" quick", " dog"]


@SETTINGS
@hypothesis.given(
    text=st.text(alphabet=" .?!,'ntmsverxé", max_size=40), sizes=st.lists(st.integers(1, 3))
)
def test_text_that_is_cleaned_in_pieces_is_the_text_that_is_cleaned_whole(text, sizes):
    whole = text
    for found in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        whole = whole.replace(found, found.strip())
    detokenizer = Detokenizer(lambda ids: "".join(map(chr, ids)), (), cleans=True)
    ids, pieces = [ord(character) for character in text], []
    for size in sizes:
        pieces.append(detokenizer.push(ids[:size]))
        ids = ids[size:]
    assert "".join(pieces) + detokenizer.finish(ids) == whole
    assert (
        Detokenizer(lambda ids: "".join(map(chr, ids)), (), cleans=True).finish(
            [ord(character) for character in text]
        )
        == whole
    )


def test_what_cleaning_cannot_change_any_more_does_not_wait():
    detokenizer = Detokenizer(lambda ids: "".join(map(chr, ids)), (), cleans=True)
    pieces = [detokenizer.push([ord(character)]) for character in "a b it is"]
    assert pieces == ["a", "", " b", "", " i", "", "", "t i", ""]


def test_without_the_tokens_before_it_a_space_would_be_lost():
    tokenizer = TOKENIZERS["pieces"]
    ids = tokenizer.encode("the quick dog", add_special_tokens=False).ids
    assert tokenizer.decode(ids[1:2]) == "quick"  # what a naive stream would say


STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3)


@SETTINGS
@hypothesis.given(pieces=st.lists(st.text(alphabet="abc", max_size=3), max_size=20), stops=STOPS)
def test_stop_strings_end_the_text_before_the_first_of_them(pieces, stops):
    checker, shown, stopped, num_pushed = StopStrings(stops), "", None, 0
    for piece in pieces:
        text, stopped = checker.push(piece)
        shown += text
        num_pushed += 1
        assert not any(stop in shown for stop in stops), "a stop string leaked"
        if stopped is not None:
            break
    whole = "".join(pieces)
    if stopped is None:
        assert not any(stop in whole for stop in stops)
        assert shown + checker.finish() == whole
    else:
        seen = "".join(pieces[:num_pushed])
        first = min(seen.index(stop) for stop in stops if stop in seen)
        assert shown == seen[:first] and seen[first:].startswith(stopped)
        assert not any(stop in "".join(pieces[: num_pushed - 1]) for stop in stops), "too late"


@SETTINGS
@hypothesis.given(
    pieces=st.lists(st.text(alphabet="abc", max_size=3), max_size=20),
    stops=STOPS,
    min_tokens=st.integers(0, 8),
    is_included=st.booleans(),
)
def test_a_stop_string_may_begin_before_min_tokens_and_must_end_behind(
    pieces, stops, min_tokens, is_included
):
    checker = StopStrings(stops, is_included=is_included)
    free = len("".join(pieces[:min_tokens]))  # where a stop string must not end yet
    whole, shown, stopped = "", "", None
    for i, piece in enumerate(pieces):
        text, stopped = checker.push(piece, may_stop=i >= min_tokens)
        whole, shown = whole + piece, shown + text
        ends = [
            (at, len(stop), stop)
            for stop in stops
            for at in range(len(whole))
            if whole.startswith(stop, at) and at + len(stop) > free
        ]
        if i < min_tokens or not ends:
            assert stopped is None and whole.startswith(shown)
            continue
        at, length, stop = min(ends)
        assert stopped == stop and shown == whole[: at + length if is_included else at]
        break
    if stopped is None:
        assert shown + checker.finish() == "".join(pieces)


def test_nothing_is_kept_back_that_cannot_become_a_stop_string():
    checker = StopStrings(["ab", "bcd"])
    assert [checker.push(text)[0] for text in ("xa", "c", "b", "b", "c", "c")] == [
        "x",
        "ac",
        "",
        "b",
        "",
        "bcc",
    ]


def folder_with(tmp_path, **fields):
    write_checkpoint(tmp_path, tokenizer=TOKENIZERS["bytes"], **fields)
    return tmp_path


def test_a_chat_is_laid_out_by_its_template(tmp_path):
    tokenizer = Tokenizer(folder_with(tmp_path))
    messages = [{"role": "user", "content": "the <dog>"}, {"role": "assistant", "content": "é"}]
    want = "<s><|user|>the <dog><|assistant|>é<|assistant|>"
    assert tokenizer.apply_chat_template(messages) == want
    want = want.removesuffix("<|assistant|>")
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == want
    ids = tokenizer.encode("the dog")
    assert ids[0] == 0 and tokenizer.encode("the dog", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "the dog"


def test_a_template_may_stand_in_a_file_of_its_own_or_in_a_list(tmp_path):
    folder = folder_with(tmp_path, template=[{"name": "default", "template": "listed"}])
    assert Tokenizer(folder).apply_chat_template([{"content": "é"}]) == "listed"
    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}{{ strftime_now('%%') }}")
    assert Tokenizer(folder).apply_chat_template([{"content": "é"}]) == '[{"content": "é"}]%'


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template"),
        (TEMPLATE, "the template of .* says: no role system"),
        ("{{ messages[0].__class__.__mro__ }}", "says: access to attribute '__class__'"),
        ("{% if %}", "says: "),
    ],
)
def test_templates_that_refuse_are_quoted(tmp_path, template, message):
    tokenizer = Tokenizer(folder_with(tmp_path, template=template))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


LONG = " ".join(["the quick brown fox jumps over the lazy dog"] * 4)


@pytest.mark.parametrize("direction", ["Left", "Right"])
@pytest.mark.parametrize(
    "saved",
    [
        {"truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0}},
        {"truncation": {"max_length": 8, "strategy": "OnlySecond", "stride": 3}},
        {"truncation": {"max_length": 2, "strategy": "OnlyFirst", "stride": 5}},
        {"padding": {"strategy": {"Fixed": 400}}},
        {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 64}},
    ],
    ids=str,
)
def test_a_saved_truncation_or_padding_changes_no_ids(tmp_path, saved, direction):
    filler = {"pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"}
    saved = {
        name: (filler if name == "padding" else {}) | value | {"direction": direction}
        for name, value in saved.items()
    }
    want = TOKENIZERS["bytes"].encode(LONG).ids
    tokenizer = Tokenizer(write_tokenizer(tmp_path, tokenizer=saved))
    assert len(want) > 64 and tokenizer.encode(LONG) == want
    assert tokenizer.encode("dog") == TOKENIZERS["bytes"].encode("dog").ids


def test_a_saved_dropout_changes_no_ids(tmp_path):
    model = json.loads(TOKENIZERS["bytes"].to_str())["model"] | {"dropout": 0.9}
    tokenizer = Tokenizer(write_tokenizer(tmp_path, tokenizer={"model": model}))
    assert tokenizer.encode(LONG) == TOKENIZERS["bytes"].encode(LONG).ids


NEW = TOKENIZERS["bytes"].get_vocab_size()  # the id of the first token that a file adds


@pytest.mark.parametrize(
    "files, text, want",
    [
        ({"tokenizer_config": {"pad_token": "<pad>"}}, "<pad>", [NEW]),
        ({"tokenizer_config": {"pad_token": {"content": "<pad>"}}}, "<pad>", [NEW]),
        ({"tokenizer_config": {"image_token": "<img>"}}, "<img>", [NEW]),
        ({"tokenizer_config": {"additional_special_tokens": ["<a>", "<b>"]}}, "<b><a>",
         [NEW + 1, NEW]),
        ({"tokenizer_config": {"extra_special_tokens": {"video_token": "<v>"}}}, "<v>", [NEW]),
        ({"tokenizer_config": {"eos_token": "dog"}}, "dog", [NEW]),
        ({"tokenizer_config": {"eos_token": "og"}}, "dog", [71, NEW]),
        ({"tokenizer_config": {"eos_token": "do"}}, "doog", [265, 82, 74]),
        ({"special_tokens_map": {"unk_token": {"content": "<unk>", "lstrip": True}}}, "  <unk>",
         [NEW]),
        ({"special_tokens_map": {"additional_special_tokens": ["<a>"]}}, "<a>", [NEW]),
        ({"added_tokens": {"<y>": NEW + 1, "<x>": NEW}}, "<x><y>", [NEW, NEW + 1]),
        ({"tokenizer_config": {"added_tokens_decoder": {
            str(NEW): {"content": "<x>", "rstrip": True, "special": False}}}}, "<x>  ", [NEW]),
        ({"tokenizer_config": {"added_tokens_decoder": {
            str(NEW): {"content": "ox", "single_word": True}}}}, "ox", [NEW]),
        # Where there is an added_tokens_decoder, the older files say nothing.
        ({"tokenizer_config": {"added_tokens_decoder": {}}, "added_tokens": {"<x>": NEW},
          "special_tokens_map": {"pad_token": "<x>"}}, "<x>", [31, 91, 33]),
        ({"tokenizer_config": {"split_special_tokens": True}}, "</s>", [31, 18, 86, 33]),
        # What stands around a text is tokenizer.json's.
        ({"tokenizer_config": {"add_bos_token": False, "add_eos_token": True}}, "dog", [265, 74]),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_every_file_may_add_tokens(tmp_path, files, text, want):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, **files))
    assert tokenizer.encode(text, add_special_tokens=False) == want
    ids = tokenizer.encode(text)
    assert ids[0] == 0 and ids[1:] == want


def test_special_tokens_are_left_out_of_the_text(tmp_path):
    folder = write_tokenizer(
        tmp_path,
        tokenizer_config={
            "added_tokens_decoder": {
                str(NEW): {"content": "<x>", "special": True},
                str(NEW + 1): {"content": "<y>"},
            }
        },
    )
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("dog<x>fox<y>")
    assert tokenizer.decode(ids) == "dogfox<y>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>dog<x>fox<y>"
    shown = tokenizer.detokenizer((), skip_special_tokens=False)
    assert shown.push(ids) + shown.finish() == "<s>dog<x>fox<y>"


CLEANS = "clean_up_tokenization_spaces"
FOR_BPE = f"{CLEANS}_for_bpe_even_though_it_will_corrupt_output"


@pytest.mark.parametrize(
    "name, settings, want",
    [
        ("pieces", {}, "the dog ,"),
        ("pieces", {CLEANS: True}, "the dog,"),
        ("bytes", {CLEANS: True}, "the dog ,"),
        ("bytes", {CLEANS: True, FOR_BPE: True}, "the dog,"),
        ("bytes", {FOR_BPE: True}, "the dog ,"),
    ],
)
def test_spaces_are_cleaned_where_the_files_ask_for_it(tmp_path, name, settings, want):
    raw = json.loads(TOKENIZERS[name].to_str())
    tokenizer = Tokenizer(write_tokenizer(tmp_path, tokenizer=raw, tokenizer_config=settings))
    ids = tokenizer.encode("the dog ,", add_special_tokens=False)
    assert tokenizer.decode(ids) == want
    stream = tokenizer.detokenizer(())
    assert "".join(stream.push([token]) for token in ids) + stream.finish() == want


def test_the_newest_of_versioned_tokenizers_is_read(tmp_path):
    names = ["tokenizer.json", "tokenizer.4.9.0.json", "tokenizer.4.10.0.json"]
    folder = write_tokenizer(tmp_path, tokenizer_config={"fast_tokenizer_files": names})
    for name, kind in zip(names[1:], ("bytes", "pieces"), strict=True):
        TOKENIZERS[kind].save(str(folder / name))
    assert Tokenizer(folder).encode("the dog") == TOKENIZERS["pieces"].encode("the dog").ids


def test_half_a_character_is_refused_by_a_sentence(tmp_path):
    tokenizer = Tokenizer(folder_with(tmp_path))
    with pytest.raises(ValueError, match="no text, because UTF-8 cannot encode it"):
        tokenizer.encode("a\ud800b")


def test_a_corrupt_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: no tokenizer: "):
        Tokenizer(tmp_path)


TEMPLATE_OF_NOTHING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<gone>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer": {"post_processor": TEMPLATE_OF_NOTHING}}, r"/tokenizer\.json: no tokenizer"),
        ({"tokenizer_config": "{"}, r"/tokenizer_config\.json: no JSON: "),
        ({"tokenizer_config": "[1]"}, r"/tokenizer_config\.json: no JSON object: it is '\[1\]'"),
        ({"tokenizer_config": {"bos_token": 3}}, r"/tokenizer_config\.json: `bos_token` is 3"),
        ({"tokenizer_config": {"bos_token": {"lstrip": True}}}, r"_config\.json: `bos_token` is "),
        ({"tokenizer_config": {"bos_token": {"content": "x", "lstrip": 1}}}, "`lstrip` is 1; "),
        ({"tokenizer_config": {"additional_special_tokens": "x"}}, "`additional_special_tokens`"),
        ({"tokenizer_config": {"extra_special_tokens": ["x", 1]}}, r"_special_tokens`\[1\] is 1"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "`added_tokens_decoder` is "),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "y"}}}, r"decoder`\['x'\]: the key"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": 1}}}, r"decoder`\['7'\] is 1; wanted"),
        ({"tokenizer_config": {"split_special_tokens": "no"}}, "`split_special_tokens` is 'no'"),
        ({"tokenizer_config": {"chat_template": 1}}, r"_config\.json: `chat_template` is '1'"),
        ({"tokenizer_config": {"chat_template": [{"name": "x"}]}}, "`chat_template` is "),
        ({"special_tokens_map": "x"}, r"/special_tokens_map\.json: no JSON: "),
        ({"special_tokens_map": {"eos_token": []}}, r"_map\.json: `eos_token` is \[\]; wanted"),
        ({"added_tokens": "["}, r"/added_tokens\.json: no JSON: "),
        ({"added_tokens": {"<x>": "7"}}, r"/added_tokens\.json: `<x>` is '7'; wanted a token id"),
        ({"chat_template": "{"}, r"/chat_template\.json: no JSON: "),
        ({"chat_template": {"chat_template": {"default": 1}}}, r"_template\.json: `chat_template`"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_errors_name_the_file_and_the_field(tmp_path, files, message):
    folder = write_tokenizer(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        Tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_no_utf8_are_named(tmp_path, name):
    (write_tokenizer(tmp_path) / name).write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=f"{name}: no "):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("half of a pair: \ud83e", "no text, because UTF-8 cannot encode it"),
        (None, "wanted a str"),
        (b"dog", "wanted a str"),
        (3, "wanted a str"),
    ],
    ids=repr,
)
def test_what_is_no_text_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(write_tokenizer(tmp_path)).encode(text)
