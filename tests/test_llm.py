# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""LLM: what is generated, streamed, stopped and taken back, from a folder made here."""

import dataclasses

import numpy as np
import pytest

from reference_engine import LLM, EngineConfig, FinishReason, SamplingParams, compiles
from reference_engine import engine as engine_lib
from tests.checkpoints import MODEL, byte_tokenizer, write_checkpoint

CONFIG = EngineConfig(
    page_size=8, num_pages=64, max_model_len=128, max_num_batched_tokens=32, max_num_seqs=4,
    token_buckets=(32,), seq_buckets=(4,),
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
    whole = llm.tokenizer.decode(ids)[len(PROMPTS[0]):]
    assert completion.text == whole.rstrip("\N{REPLACEMENT CHARACTER}")
    assert completion.logprobs is None and completion.stop_reason is None


def test_prompts_of_both_kinds_come_back_in_order_as_if_they_were_alone(llm):
    prompts = [*PROMPTS, llm.tokenizer.encode(PROMPTS[1])]
    params = [SamplingParams(max_tokens=n, temperature=t, seed=9)
              for n, t in ((20, 0.0), (9, 1.0), (15, 0.7), (9, 1.0))]
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


def test_stop_ids_and_the_models_own(llm, folder):
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=4)
    free = of(llm.generate(PROMPTS[0], params)[0])
    token = next(t for t in free.token_ids[3:] if t not in free.token_ids[:3])
    at = free.token_ids.index(token)
    got = of(llm.generate(PROMPTS[0], dataclasses.replace(params, stop_token_ids=(token,)))[0])
    assert got.token_ids == free.token_ids[: at + 1]
    assert (got.finish_reason, got.stop_reason) == (FinishReason.STOP, token)
    before = llm.tokenizer.decode([*llm.tokenizer.encode(PROMPTS[0]), *free.token_ids[:at]])
    assert got.text == before[len(PROMPTS[0]):].rstrip("\N{REPLACEMENT CHARACTER}")

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
    params = [SamplingParams(max_tokens=9, temperature=t, logprobs=n, min_tokens=2)
              for t, n in ((0.0, None), (1.0, 2), (0.0, 0))]
    llm.generate(PROMPTS, params)
    llm.generate(PROMPTS[0], params[0])
    assert stats.num_steps > 10 and stats.num_recompiles == 0
    # The counter counts: one shape less, and it shows.
    engine_lib.jitted_step("cpu").clear_cache()
    llm.generate(PROMPTS[0], params[0])
    assert stats.num_recompiles > 0


def test_the_persistent_cache_spares_the_next_process_its_compiles(folder, tmp_path):
    import jax

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")
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
