# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""LLM: what is generated, streamed, stopped and taken back, from a folder made here."""

import dataclasses
import types

import numpy as np
import pytest

from reference_engine import LLM, EngineConfig, FinishReason, SamplingParams, compiles
from reference_engine import engine as engine_lib
from reference_engine import model as model_lib
from reference_engine.completions import Job, Stream
from reference_engine.outputs import Output
from tests.engine.checkpoints import MODEL, byte_tokenizer, write_checkpoint

CONFIG = EngineConfig(
    page_size=8,
    num_pages=64,
    max_model_len=128,
    max_num_batched_tokens=32,
    max_num_seqs=4,
    token_buckets=(32,),
    seq_buckets=(4,),
)
PROMPTS = ["the quick brown fox", "naïve café 東京", "jumps over the lazy dog, and the dog sleeps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, seed=3, tokenizer=byte_tokenizer())
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, CONFIG)


@pytest.fixture(autouse=True)
def _nothing_is_left(llm):
    yield
    assert not llm.engine.has_work and not llm._streams
    assert llm.engine.scheduler.pool.num_free == CONFIG.num_pages


def of(output):
    return output.outputs[0]


def test_a_prompt_is_completed(llm):
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12))
    completion = of(output)
    assert output.prompt == PROMPTS[0]
    assert output.prompt_token_ids == tuple(llm.tokenizer.encode(PROMPTS[0]))
    assert len(completion.token_ids) == 12 and completion.finish_reason == "length"
    ids = [*output.prompt_token_ids, *completion.token_ids]
    whole = llm.tokenizer.decode(ids)[len(PROMPTS[0]) :]
    assert completion.text == whole.rstrip("\N{REPLACEMENT CHARACTER}")
    assert completion.logprobs is None and completion.stop_reason is None


def test_prompts_of_both_kinds_come_back_in_order_as_if_they_were_alone(llm):
    prompts = [*PROMPTS, llm.tokenizer.encode(PROMPTS[1])]
    params = [
        SamplingParams(max_tokens=n, temperature=t, seed=9)
        for n, t in ((20, 0.0), (9, 1.0), (15, 0.7), (9, 1.0))
    ]
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, param)[0] for prompt, param in zip(prompts, params, strict=True)]
    assert [of(a).token_ids for a in together] == [of(b).token_ids for b in alone]
    assert [of(a).text for a in together] == [of(b).text for b in alone]
    assert together[3].prompt is None and of(together[3]).text == of(together[1]).text
    assert len({of(a).token_ids for a in together}) == 3


def test_token_ids_may_be_numpys(llm):
    ids, params = np.array(llm.tokenizer.encode(PROMPTS[0])), SamplingParams(max_tokens=4)
    want = llm.generate(PROMPTS[0], params)[0].outputs
    assert llm.generate(ids, params)[0].outputs == want
    assert llm.generate([ids, PROMPTS[0]], params)[0].outputs == want


def test_seeds(llm):
    def tokens(**fields):
        params = SamplingParams(max_tokens=16, temperature=1.0, **fields)
        return of(llm.generate(PROMPTS[0], params)[0]).token_ids

    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)
    assert tokens() != tokens()  # the engine's seed and the request's number


def test_an_engine_with_the_same_seed_draws_the_same(folder, llm):
    params = SamplingParams(max_tokens=8, temperature=1.0)

    def tokens(seed):
        fresh = LLM(folder, CONFIG, seed=seed)
        return [of(output).token_ids for output in fresh.generate(PROMPTS, params)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_a_stream_adds_up_and_cuts_no_character(llm):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, logprobs=2)
    want = llm.generate(PROMPTS, params)
    got = {i: [] for i in range(3)}
    for delta in llm.stream(PROMPTS, params):
        got[delta.prompt_index].append(delta)
    for i, deltas in got.items():
        assert "".join(delta.text for delta in deltas) == of(want[i]).text
        assert tuple(t for delta in deltas for t in delta.token_ids) == of(want[i]).token_ids
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason is of(want[i]).finish_reason
        assert tuple(x for delta in deltas for x in delta.logprobs) == of(want[i]).logprobs
        assert len({delta.request_id for delta in deltas}) == 1
        assert sum(bool(delta.text) for delta in deltas) > 10


def test_two_streams_and_a_generate_go_on_side_by_side(llm):
    params = SamplingParams(max_tokens=10)
    want = [of(output).text for output in llm.generate(PROMPTS, params)]
    first, second = llm.stream(PROMPTS[0], params), llm.stream(PROMPTS[1], params)
    texts = [next(first).text, next(second).text]
    whole = llm.generate(PROMPTS[2], params)
    texts[1] += "".join(delta.text for delta in second)
    texts[0] += "".join(delta.text for delta in first)
    assert [*texts, of(whole[0]).text] == want


def test_no_delta_is_lost_when_others_step_between_two_of_them(llm):
    params = SamplingParams(max_tokens=6)
    want = [of(output) for output in llm.generate(PROMPTS[:2], params)]
    got = {0: [], 1: []}
    for delta in llm.stream(PROMPTS[:2], params):
        got[delta.prompt_index].append(delta)
        if delta.prompt_index == 1:  # the first prompt's may be complete before the next `next`
            llm.generate(PROMPTS[2], params)
    for index, deltas in got.items():
        assert deltas[-1].finish_reason == "length"
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        text = "".join(delta.text for delta in deltas)
        assert (tokens, text) == (want[index].token_ids, want[index].text)


def test_a_stream_that_is_closed_ends_its_requests(llm):
    stream = llm.stream(PROMPTS, SamplingParams(max_tokens=50))
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work


def test_an_abort_ends_one_stream_and_leaves_the_others_alone(llm):
    params = SamplingParams(max_tokens=12)
    want = [of(output).text for output in llm.generate(PROMPTS, params)]
    texts, ends = ["", "", ""], {}
    for delta in llm.stream(PROMPTS, params):
        texts[delta.prompt_index] += delta.text
        if delta.prompt_index == 1 and len(ends) == 0 and delta.token_ids:
            assert llm.abort(delta.request_id)
            assert not llm.abort(delta.request_id)
        if delta.finish_reason is not None:
            ends[delta.prompt_index] = delta.finish_reason
    assert ends == {0: "length", 1: "abort", 2: "length"}
    assert [texts[0], texts[2]] == [want[0], want[2]]
    assert want[1].startswith(texts[1]) and len(texts[1]) < len(want[1])


def test_stop_strings_end_the_text_before_them(llm):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4)
    free = of(llm.generate(PROMPTS[0], params)[0])
    assert len(free.text) > 20
    stop = free.text[11:14]  # across tokens
    cut = free.text.index(stop)
    stopping = dataclasses.replace(params, stop=("never there", stop))
    got = of(llm.generate(PROMPTS[0], stopping)[0])
    assert got.text == free.text[:cut]
    assert (got.finish_reason, got.stop_reason) == (FinishReason.STOP, stop)
    assert free.token_ids[: len(got.token_ids)] == got.token_ids
    assert len(got.token_ids) < len(free.token_ids)
    streamed = "".join(delta.text for delta in llm.stream(PROMPTS[0], stopping))
    assert streamed == got.text
    # Before min_tokens it does not count.
    late = dataclasses.replace(stopping, min_tokens=len(got.token_ids) + 1)
    assert len(of(llm.generate(PROMPTS[0], late)[0]).token_ids) > len(got.token_ids)


def pieces_of(llm, free, prompt):
    """The text that each token of a completion adds."""
    (prompt_ids, ids), texts = (llm.tokenizer.encode(prompt), free.token_ids), []
    for i in range(len(ids) + 1):
        text = llm.tokenizer.decode([*prompt_ids, *ids[:i]]).rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(prompt) :])
    return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]


def test_a_stop_string_may_begin_before_min_tokens_and_end_behind(llm):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4)
    free = of(llm.generate(PROMPTS[0], params)[0])
    pieces = pieces_of(llm, free, PROMPTS[0])
    i = next(i for i in range(3, 30) if all(pieces[i - 2 : i + 3]))
    before = "".join(pieces[: i - 1])
    stop = "".join(pieces[i - 1 : i + 2])  # three tokens, the last of them number i + 2
    assert stop not in "".join(pieces[: i + 1])
    for min_tokens in (0, i - 1, i, i + 1):
        stopping = dataclasses.replace(params, stop=["never there", stop], min_tokens=min_tokens)
        got = of(llm.generate(PROMPTS[0], stopping)[0])
        assert got.text == before and got.stop_reason == stop
        assert got.token_ids == free.token_ids[: i + 2] and got.finish_reason == "stop"
        deltas = list(llm.stream(PROMPTS[0], stopping))
        assert "".join(delta.text for delta in deltas) == before
    # One that ends in the first min_tokens tokens does not count, as a stop id among them does not.
    late = dataclasses.replace(params, stop=stop, min_tokens=i + 2)
    assert len(of(llm.generate(PROMPTS[0], late)[0]).token_ids) > i + 2
    # The last token may complete it; then it is no matter of length.
    last = dataclasses.replace(params, stop=stop, min_tokens=i, max_tokens=i + 2)
    got = of(llm.generate(PROMPTS[0], last)[0])
    assert (got.text, got.finish_reason, got.stop_reason) == (before, "stop", stop)
    short = dataclasses.replace(params, stop=stop, max_tokens=i + 1)
    got = of(llm.generate(PROMPTS[0], short)[0])
    assert (got.text, got.finish_reason) == ("".join(pieces[: i + 1]), "length")


@pytest.mark.parametrize("is_included", [False, True])
@pytest.mark.parametrize(
    "text, stops, shown",
    [
        ("ab🐙c", ["🐙"], "ab"),  # several tokens a character
        ("ab🐙🦊c", ["x", "🐙🦊"], "ab"),
        ("ab\n\nab", ["\n\nab", "b\n\nx"], "ab"),
        ("the dogs", ["dogs"], "the "),
    ],
)
def test_nothing_of_a_stop_string_is_streamed(llm, text, stops, shown, is_included):
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    stop = next(stop for stop in stops if stop in text)
    ends_at = next(n for n in range(len(ids) + 1) if stop in llm.tokenizer.decode(ids[:n]))
    for min_tokens in range(len(ids)):
        params = SamplingParams(
            max_tokens=len(ids),
            stop=stops,
            min_tokens=min_tokens,
            include_stop_str_in_output=is_included,
        )
        stream = Stream(0, Job(0, 0, None, (1,), params), llm.tokenizer, True)
        for i, token in enumerate(ids):
            is_last = i == len(ids) - 1
            ended = stream.push(Output(0, token, FinishReason.LENGTH if is_last else None))
            so_far = "".join(delta.text for delta in stream.deltas)
            if ended:
                break
            assert ends_at <= min_tokens or shown.startswith(so_far)
        if ends_at > min_tokens:
            assert ended and i + 1 == ends_at
            assert so_far == shown + (stop if is_included else "")
            assert stream.deltas[-1].stop_reason == stop
            assert stream.deltas[-1].finish_reason is FinishReason.STOP
        else:
            assert not ended and so_far == text
            assert stream.deltas[-1].finish_reason is FinishReason.LENGTH


def test_a_stop_string_may_be_in_the_output(llm):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4)
    free = of(llm.generate(PROMPTS[0], params)[0])
    stop = free.text[11:14]
    with_it = dataclasses.replace(params, stop=stop, include_stop_str_in_output=True)
    got = of(llm.generate(PROMPTS[0], with_it)[0])
    assert got.text == free.text[: free.text.index(stop) + len(stop)] and got.stop_reason == stop
    assert "".join(delta.text for delta in llm.stream(PROMPTS[0], with_it)) == got.text


def test_special_tokens_and_a_stop_tokens_text_are_shown_where_asked(llm):
    special = llm.tokenizer.encode("</s><|user|>", add_special_tokens=False)
    params = SamplingParams(max_tokens=3, logit_bias=dict.fromkeys(special, 60.0))

    def text(**fields):
        return of(llm.generate(PROMPTS[0], dataclasses.replace(params, **fields))[0]).text

    assert text() == ""
    shown = text(skip_special_tokens=False)
    assert shown.count("</s>") + shown.count("<|user|>") == 3
    (user,) = llm.tokenizer.encode("<|user|>", add_special_tokens=False)
    forced = {"logit_bias": {user: 90.0}, "stop_token_ids": [user], "skip_special_tokens": False}
    assert text(**forced) == ""
    assert text(**forced, include_stop_str_in_output=True) == "<|user|>"
    shown = dataclasses.replace(params, **forced, include_stop_str_in_output=True)
    assert "".join(delta.text for delta in llm.stream(PROMPTS[0], shown)) == "<|user|>"
    word = llm.tokenizer.encode("the", add_special_tokens=False)[0]
    shown = {"logit_bias": {word: 90.0}, "stop_token_ids": [word]}
    assert text(**shown) == "" != text(**shown, include_stop_str_in_output=True)


FLAT = dict.fromkeys(range(70, 80), 8.0)  # so that ids come again, and penalties matter
PENALISED = [
    SamplingParams(max_tokens=24, repetition_penalty=1.4, logit_bias=FLAT),
    SamplingParams(max_tokens=24, presence_penalty=1.5, frequency_penalty=0.5, logit_bias=FLAT),
    SamplingParams(
        max_tokens=24, temperature=1.0, seed=5, repetition_penalty=1.2, logit_bias={5: 2.0, 7: -100}
    ),
    SamplingParams(max_tokens=24, temperature=0.7, seed=6),
]


def test_penalised_tokens_are_the_same_in_any_batch_and_after_a_recompute(llm):
    alone = [of(llm.generate(PROMPTS[0], params)[0]).token_ids for params in PENALISED]
    unpenalised = SamplingParams(max_tokens=24, logit_bias=FLAT)
    flat = of(llm.generate(PROMPTS[0], unpenalised)[0]).token_ids
    assert len({*alone, flat}) == 5
    tokens = {i: [] for i in range(4)}
    for delta in llm.stream([PROMPTS[0]] * 4, PENALISED):
        tokens[delta.prompt_index] += delta.token_ids
        if delta.prompt_index == 3 and len(tokens[3]) in (5, 11):
            llm.engine.scheduler.preempt_all()  # their tokens so far come back as a prompt
    assert [tuple(tokens[i]) for i in range(4)] == alone


def test_penalties_choose_what_their_definition_chooses(folder):
    llm = LLM(folder, dataclasses.replace(CONFIG, return_logits=True))
    prompt = llm.tokenizer.encode(PROMPTS[2])
    flat = SamplingParams(
        max_tokens=30,
        logit_bias={9: 1.5},
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logprobs=0,
    )
    llm.engine.add_request(prompt, flat)
    output, differences = [], 0
    while llm.engine.has_work:
        for step in llm.engine.step():
            logits = step.logits.copy()
            own = logits[step.token_id] - np.log(np.exp(logits).sum())  # before bias and penalties
            assert step.logprobs == {step.token_id: pytest.approx(own, rel=1e-4)}
            logits[9] += np.float32(1.5)
            for token in {*prompt, *output}:
                logits[token] *= np.float32(1.3) if logits[token] <= 0 else 1 / np.float32(1.3)
            for token in set(output):
                logits[token] -= np.float32(0.4) + output.count(token) * np.float32(0.2)
            assert logits[step.token_id] >= logits.max() - 1e-4
            differences += step.token_id != step.logits.argmax()
            output.append(step.token_id)
    assert len(output) == 30 and differences > 3


def test_bad_words_do_not_come_at_the_start_or_behind_a_space(llm):
    free = of(llm.generate(PROMPTS[0], SamplingParams(max_tokens=24))[0])
    pieces = [piece.strip() for piece in pieces_of(llm, free, PROMPTS[0])]
    words = [piece for piece in pieces if piece.isalpha() and piece.isascii()][:3]
    got = of(llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, bad_words=words))[0])
    assert got.token_ids != free.token_ids
    ids = llm._with_word_ids(SamplingParams(bad_words=words)).bad_words
    for word in words:
        for text in (word, " " + word):
            row = tuple(llm.tokenizer.encode(text, add_special_tokens=False))
            assert row in ids
            assert row not in [got.token_ids[i : i + len(row)] for i in range(24)]
    # A word of several tokens forbids none of them alone.
    (row,) = llm._with_word_ids(SamplingParams(bad_words=[free.token_ids[4:7]])).bad_words
    long = of(llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, bad_words=[row]))[0])
    assert long.token_ids[:6] == free.token_ids[:6] and long.token_ids[6] != free.token_ids[6]


def test_n_outputs_of_a_prompt(llm):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=2**63 - 2, n=3)
    seeds = (2**63 - 2, 2**63 - 1, -(2**63))
    want = [
        of(llm.generate(PROMPTS[0], dataclasses.replace(params, n=1, seed=seed))[0]).token_ids
        for seed in seeds
    ]
    assert len(set(want)) == 3
    first, second = llm.generate(PROMPTS[:2], [params, SamplingParams(max_tokens=3)])
    assert [(each.index, each.token_ids) for each in first.outputs] == list(enumerate(want))
    assert (first.prompt, second.prompt) == (PROMPTS[0], PROMPTS[1])
    assert len(second.outputs) == 1
    tokens, ids = {}, set()
    for delta in llm.stream([PROMPTS[1], PROMPTS[0]], [SamplingParams(max_tokens=3), params]):
        tokens.setdefault((delta.prompt_index, delta.index), []).extend(delta.token_ids)
        ids.add(delta.request_id)
    assert tokens.pop((0, 0)) == list(second.outputs[0].token_ids) and len(ids) == 4
    assert tokens == {(1, i): list(row) for i, row in enumerate(want)}
    free = llm.generate(PROMPTS[0], dataclasses.replace(params, seed=None))[0].outputs
    assert len({each.token_ids for each in free}) == 3  # each draws a seed of its own
    with pytest.raises(ValueError, match="argument `n` is 3; wanted 1: LLM.generate returns n"):
        llm.engine.add_request([1, 2], params)


def test_stop_ids_and_the_models_own(llm, folder):
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=4)
    free = of(llm.generate(PROMPTS[0], params)[0])
    token = next(t for t in free.token_ids[3:] if t not in free.token_ids[:3])
    at = free.token_ids.index(token)
    got = of(llm.generate(PROMPTS[0], dataclasses.replace(params, stop_token_ids=(token,)))[0])
    assert got.token_ids == free.token_ids[: at + 1]
    assert (got.finish_reason, got.stop_reason) == (FinishReason.STOP, token)
    before = llm.tokenizer.decode([*llm.tokenizer.encode(PROMPTS[0]), *free.token_ids[:at]])
    assert got.text == before[len(PROMPTS[0]) :].rstrip("\N{REPLACEMENT CHARACTER}")

    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{token}, 1]}}')
    other = LLM(folder, CONFIG)
    assert of(other.generate(PROMPTS[0], params)[0]).token_ids == got.token_ids
    ignoring = dataclasses.replace(params, ignore_eos=True)
    assert of(other.generate(PROMPTS[0], ignoring)[0]).token_ids == free.token_ids
    forced = of(other.generate(PROMPTS[0], dataclasses.replace(params, min_tokens=20))[0])
    assert len(forced.token_ids) >= 20 and token not in forced.token_ids[:19]
    (folder / "generation_config.json").unlink()


def test_logprobs_are_those_of_the_logits(folder):
    llm = LLM(folder, dataclasses.replace(CONFIG, return_logits=True))
    params = SamplingParams(max_tokens=5, temperature=0.8, seed=1, top_k=7, logprobs=3)
    completion = of(llm.generate(PROMPTS[0], params)[0])
    llm.engine.add_request(llm.tokenizer.encode(PROMPTS[0]), params)
    rows = []
    while llm.engine.has_work:
        rows += [output.logits for output in llm.engine.step()]
    for token, found, row in zip(completion.token_ids, completion.logprobs, rows, strict=True):
        want = row - np.log(np.exp(row).sum())
        top = np.argsort(-want, kind="stable")[:3].tolist()
        assert next(iter(found)) == token and set(found) == {token, *top}
        for key, value in found.items():
            assert value == pytest.approx(want[key], rel=1e-4)
    own = of(llm.generate(PROMPTS[0], dataclasses.replace(params, logprobs=0))[0])
    assert [list(found) for found in own.logprobs] == [[token] for token in own.token_ids]


def test_a_chat_is_a_prompt_laid_out(llm):
    messages = [{"role": "user", "content": "the dog"}]
    prompt = llm.chat_prompt(messages)
    assert llm.tokenizer._tokenizer.decode(prompt, skip_special_tokens=False) == (
        "<s><|user|>the dog<|assistant|>"
    )
    assert prompt.count(0) == 1  # the template has it, the tokenizer adds none
    params = SamplingParams(max_tokens=5)
    (got,) = llm.chat(messages, params)
    assert of(got).token_ids == of(llm.generate(prompt, params)[0]).token_ids
    message = types.SimpleNamespace(model_dump=lambda: messages[0])  # as pydantic's models
    assert llm.chat([message], params)[0].prompt_token_ids == tuple(prompt)
    assert len(llm.chat([[message], messages], params)) == 2
    # Several, with vLLM's arguments.
    other = [{"role": "user", "content": "quick"}]
    several = llm.chat(
        messages=[messages, other, messages],
        use_tqdm=False,
        lora_request=None,
        sampling_params=[params, params, SamplingParams(max_tokens=2)],
        add_generation_prompt=False,
    )
    assert [len(of(each).token_ids) for each in several] == [5, 5, 2]
    assert several[0].prompt_token_ids == tuple(prompt[:-1])
    assert several[1].prompt_token_ids == tuple(llm.chat_prompt(other, add_generation_prompt=False))
    for wrong, message in (
        (("x",), "argument `messages\\[0\\]` is 'x'; wanted a list of messages"),
        ("x", "argument `messages` is 'x'"),
        (None, "`messages` is None"),
        ([["x"]], "messages"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.chat(wrong, params)
    with pytest.raises(ValueError, match="LLM.chat: argument `lora_request` is 1, which is not"):
        llm.chat(messages, params, lora_request=1)


def test_the_models_own_defaults(folder):
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 7}'
    )
    llm = LLM(folder, CONFIG)
    want = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=7)
    assert llm.get_default_sampling_params() == want
    assert len(of(llm.generate(PROMPTS[0])[0]).token_ids) == 7
    (folder / "generation_config.json").unlink()
    assert LLM(folder, CONFIG).get_default_sampling_params() == SamplingParams()
    # What is not served is refused where it is asked for, and stands in nobody else's way.
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    beams = LLM(folder, CONFIG)
    assert len(of(beams.generate(PROMPTS[0], SamplingParams(max_tokens=2))[0]).token_ids) == 2
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="generation_config.json: `num_beams` is 4, which is not"):
        beams.generate(PROMPTS[0])


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path, llm, folder):
    write_checkpoint(tmp_path, seed=3)
    bare = LLM(tmp_path, CONFIG)
    ids = llm.tokenizer.encode(PROMPTS[0])
    params = SamplingParams(max_tokens=6)
    completion = of(bare.generate(ids, params)[0])
    assert completion.token_ids == of(llm.generate(ids, params)[0]).token_ids
    assert completion.text == ""
    for call, what in (
        (lambda: bare.generate("text", params), "text prompts"),
        (lambda: bare.generate(ids, SamplingParams(stop="x")), "stop strings"),
        (lambda: bare.generate(ids, SamplingParams(bad_words=["x"])), "bad_words"),
        (lambda: bare.chat([{"role": "user", "content": "x"}]), "chat"),
    ):
        with pytest.raises(ValueError, match=f"{what} need a tokenizer, and .* no tokenizer.json"):
            call()


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[1, 2], []], "prompt 1: Engine.add_request: argument `prompt_ids` is empty"),
        ([], "prompt 0: .* is empty"),
        ([[1, 2], [5, MODEL.vocab_size]], "prompt 1: .* is 320 at index 1"),
        (["ok", "the dog " * 99], r"prompt 1: .* tokens long; wanted fewer than max_model_len=128"),
        (None, "argument `prompts` is None; wanted a text, token ids, a dict, or a list"),
        (b"text", "argument `prompts` is b'text'"),
        (7.5, "argument `prompts` is 7.5"),
        (np.array(3), r"argument `prompts` is array\(3\)"),
        ({3, 4}, "argument `prompts` is {3, 4}"),
        ([1.5, 2.5], r"argument `prompts\[0\]` is 1.5; wanted a text, token ids, or a dict"),
        ([[1, 2.0]], "prompt 0: .* is 2.0 at index 1"),
        ([True, False], "prompt 0: .* is True at index 0"),
        ([[3, 2**40]], "prompt 0: .* is 1099511627776 at index 1"),
        (["a", None], r"argument `prompts\[1\]` is None"),
        ([[3], 4], r"argument `prompts\[1\]` is 4"),
        (["a\ud800"], "no text, because UTF-8 cannot encode it"),
        ({"prompt": 5}, r"argument `prompts\[0\]` is {'prompt': 5}"),
        ({"prompt": "x", "prompt_token_ids": "x"}, r"argument `prompts\[0\]` is {"),
        ({"text": "x"}, r"`prompts\[0\]` is a dict with \['text'\]; wanted no other keys than"),
        ({"prompt": "x", "multi_modal_data": {}}, r"is a dict with \['multi_modal_data'\]"),
        ([{}], r"argument `prompts\[0\]` is {}; wanted"),
        ([{"prompt_token_ids": []}], "prompt 0: .* is empty"),
    ],
)
def test_bad_prompts_are_named_and_nothing_else_is_lost(llm, prompts, message):
    params = SamplingParams(max_tokens=8)
    want = of(llm.generate(PROMPTS[0], params)[0]).text
    other = llm.stream(PROMPTS[0], params)
    text = next(other).text
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=message):
            call(prompts, params)
    assert text + "".join(delta.text for delta in other) == want


def test_prompts_may_be_dicts_and_arguments_vllms(llm):
    params = SamplingParams(max_tokens=6)
    want = [of(output).token_ids for output in llm.generate(PROMPTS, params)]
    ids = llm.tokenizer.encode(PROMPTS[1])
    got = llm.generate(
        prompts=[
            {"prompt": PROMPTS[0]},
            {"prompt_token_ids": ids, "prompt": "its text"},
            {"prompt": PROMPTS[2], "multi_modal_data": None},
        ],
        sampling_params=params,
        use_tqdm=False,
        lora_request=None,
    )
    assert [of(output).token_ids for output in got] == want
    assert [output.prompt for output in got] == [PROMPTS[0], "its text", PROMPTS[2]]
    assert of(llm.generate({"prompt_token_ids": np.array(ids)}, params)[0]).token_ids == want[1]
    deltas = llm.stream(prompts={"prompt": PROMPTS[0]}, sampling_params=[params])
    assert tuple(token for delta in deltas for token in delta.token_ids) == want[0]
    longest = llm.generate(prompts=PROMPTS[0], sampling_params=SamplingParams(max_tokens=None))[0]
    assert len(longest.prompt_token_ids) + len(of(longest).token_ids) == CONFIG.max_model_len
    assert of(longest).token_ids[:6] == want[0] and of(longest).finish_reason == "length"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampling_params": {"n": 1}}, "`sampling_params` is {'n': 1}; wanted SamplingParams"),
        ({"sampling_params": [None]}, "`sampling_params` is None; wanted SamplingParams"),
        ({"sampling_params": 3}, "`sampling_params` is 3; wanted SamplingParams"),
        ({"lora_request": 3}, "`lora_request` is 3, which is not served; wanted None: LoRA is"),
        ({"priority": [1]}, r"`priority` is \[1\], which is not served"),
        ({"params": 3}, "there is no argument `params`; it is 3"),
        ({"sampling_params": SamplingParams(stop_token_ids=[320])}, "prompt 0: .* is 320; wanted"),
        ({"sampling_params": SamplingParams(logit_bias={-1: 1})}, "prompt 0: .*logit_bias` is -1"),
        ({"sampling_params": SamplingParams(bad_words=["\ud800"])}, "no text, because UTF-8"),
    ],
)
def test_arguments_that_are_not_served_are_a_sentence(llm, arguments, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPTS[0], **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tensor_parallel_size": 2}, "LLM: argument `tensor_parallel_size` is 2, which is not"),
        ({"trust_remote_code": True}, "no code in a model's folder is ever run; leave it out"),
        ({"quantization": "awq"}, "quantised weights are left out on purpose"),
        ({"block_size": 16}, "it is page_size here"),
        ({"gpu_memory_utilization": 1.5}, "wanted a number above 0 and at most 1"),
        ({"max_tokens": 3}, "LLM: there is no argument `max_tokens`; it is 3"),
        ({"attention": "oracle"}, "there is no argument `attention`; it is 'oracle'"),
        ({"page_size": 0}, "argument `page_size` is 0"),
        ({"seed": -1}, "argument `seed` is -1; wanted an int >= 0"),
        ({"seed": 1.5}, "argument `seed` is 1.5"),
        ({"tokenizer": "another"}, "the folder's own is used"),
        ({"runner": "pooling"}, "`runner` is 'pooling', which is not served"),
    ],
)
def test_what_an_llm_does_not_take_is_a_sentence(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, **arguments)


def test_each_prompt_is_checked_once(llm, monkeypatch):
    checked, real = [], engine_lib.check_request

    def check_request(prompt, *args, **kwargs):
        checked.append(list(prompt))
        return real(prompt, *args, **kwargs)

    monkeypatch.setattr(engine_lib, "check_request", check_request)
    llm.generate([[1, 2], [3]], SamplingParams(max_tokens=1, n=2, temperature=1.0))
    assert checked == [[1, 2], [3]]


def test_an_llm_takes_vllms_names_and_the_fields_of_its_config(folder):
    llm = LLM(
        model=folder,
        max_model_len=64,
        max_num_seqs=2,
        page_size=8,
        num_pages=16,
        seed=None,
        tensor_parallel_size=1,
        trust_remote_code=False,
        quantization=None,
        tokenizer=str(folder),
        tokenizer_mode="auto",
        runner="generate",
        max_num_batched_tokens=None,
        enable_prefix_caching=None,
    )
    assert llm.engine.config == EngineConfig(
        max_model_len=64, max_num_seqs=2, page_size=8, num_pages=16
    )
    changed = LLM(folder, CONFIG, num_pages=32).engine.config
    assert changed == dataclasses.replace(CONFIG, num_pages=32)


def test_params_must_be_as_many_as_prompts(llm):
    with pytest.raises(ValueError, match="is 2 SamplingParams; wanted one for each of the 3"):
        llm.generate(PROMPTS, [SamplingParams()] * 2)


def test_too_many_stop_ids_for_min_tokens_are_refused(llm):
    with pytest.raises(ValueError, match="is 33 ids, the model's own included; wanted at most 32"):
        llm.generate(
            PROMPTS[0], SamplingParams(min_tokens=2, stop_token_ids=tuple(range(100, 133)))
        )


def test_a_context_beyond_the_models_is_refused(folder):
    with pytest.raises(ValueError, match="`max_model_len` is 512; wanted at most the model's 256"):
        LLM(folder, EngineConfig(max_model_len=512))
    assert LLM(folder).engine.config.max_model_len == 256


def test_an_error_in_a_step_passes_on_and_takes_only_its_own_requests(llm, monkeypatch):
    params = SamplingParams(max_tokens=8)
    want = of(llm.generate(PROMPTS[0], params)[0]).text
    stream = llm.stream(PROMPTS[0], params)
    text = next(stream).text

    def fail(*args, **kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine_lib, "run_step", fail)
        with pytest.raises(RuntimeError, match="planted"):
            llm.generate(PROMPTS[1], params)
    assert text + "".join(delta.text for delta in stream) == want


def test_nothing_is_compiled_after_warm_up(folder):
    config = dataclasses.replace(CONFIG, token_buckets=(16, 32))
    llm = LLM(folder, config, warm_up=True)
    stats = llm.engine.stats
    assert stats.num_steps == 0
    params = [
        SamplingParams(max_tokens=9, temperature=t, logprobs=n, min_tokens=2)
        for t, n in ((0.0, None), (1.0, 2), (0.0, 0))
    ]
    llm.generate(PROMPTS, params)
    llm.generate(PROMPTS[0], params[0])
    llm.generate(PROMPTS, SamplingParams(max_tokens=3, repetition_penalty=1.1, bad_words=["dog"]))
    assert stats.num_steps > 10 and stats.num_recompiles == 0
    # The counter counts: one shape less, and it shows.
    model_lib.jitted_step("cpu").clear_cache()
    llm.generate(PROMPTS[0], params[0])
    assert stats.num_recompiles > 0


def test_the_persistent_cache_spares_the_next_process_its_compiles(folder, tmp_path):
    import jax

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.clear_caches()
        llm = LLM(folder, CONFIG, compilation_cache=tmp_path / "cache")
        want = llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))
        kept = {file.name for file in (tmp_path / "cache").iterdir()}
        assert any("model_step" in name for name in kept)
        jax.clear_caches()  # as a new process has none
        again = LLM(folder, CONFIG, compilation_cache=tmp_path / "cache")
        assert of(again.generate(PROMPTS[0], SamplingParams(max_tokens=3))[0]) == of(want[0])
        new = {file.name for file in (tmp_path / "cache").iterdir()} - kept
        assert not any("model_step" in name and not name.endswith("atime") for name in new)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()


def test_progress_is_drawn_on_a_terminal_alone(llm, monkeypatch, capsys):
    import sys

    params = SamplingParams(max_tokens=2)
    llm.generate(PROMPTS, params)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    llm.generate(PROMPTS, params)
    drawn = capsys.readouterr().err
    assert "generating" in drawn and "0/3" in drawn and "tokens computed" in drawn
    llm.generate(PROMPTS, params, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_compiles_are_counted():
    import jax

    before = compiles.num_compiles()
    jax.jit(lambda x: x * 17.5 + 3)(np.float32(2))
    assert compiles.num_compiles() > before
