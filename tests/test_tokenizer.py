# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Text that comes in pieces is the text of the whole: whole characters, no stop string."""

import hypothesis
import pytest
from hypothesis import strategies as st

from reference_engine.tokenizer import Detokenizer, StopStrings, Tokenizer
from tests.checkpoints import TEMPLATE, byte_tokenizer, sentencepiece_tokenizer, write_checkpoint

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
    whole = decode(prompt_ids + ids)[len(decode(prompt_ids)):]
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
    pieces=st.lists(st.text(alphabet="abc", max_size=3), max_size=20), stops=STOPS,
    min_tokens=st.integers(0, 8), is_included=st.booleans(),
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
        ends = [(at, len(stop), stop) for stop in stops for at in range(len(whole))
                if whole.startswith(stop, at) and at + len(stop) > free]
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
        "x", "ac", "", "b", "", "bcc",
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
    assert Tokenizer(folder).apply_chat_template([]) == "listed"
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


def test_half_a_character_is_refused_by_a_sentence(tmp_path):
    tokenizer = Tokenizer(folder_with(tmp_path))
    with pytest.raises(ValueError, match="no text, because UTF-8 has none of it"):
        tokenizer.encode("a\ud800b")


def test_a_corrupt_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: no tokenizer: "):
        Tokenizer(tmp_path)
