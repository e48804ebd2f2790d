# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""However a request is scheduled, written and interrupted, it comes to the same bits."""

import dataclasses
import functools
import hashlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_paged
from pallas_paged.attention.tpu import launch as attention_tpu
from reference_engine import batch as batch_lib
from reference_engine import engine as engine_lib
from reference_engine import model as model_lib
from reference_engine import replay as replay_lib
from reference_engine import rope
from reference_engine import sampler as sampler_lib
from reference_engine import scheduler as scheduler_lib
from reference_engine.config import KV_WRITES, EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.replay import Job, compare, replay
from reference_engine.request import FinishReason
from reference_engine.rope import RopeScaling
from reference_engine.sampling_params import SamplingParams
from reference_engine.weights import random_params

MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
# One shape for every budget, and one extent (128 tokens) for every page size: the oracle's bits
# depend on nothing else.
CONFIG = EngineConfig(
    attention_backend="oracle",
    page_size=8,
    num_pages=96,
    max_model_len=128,
    max_num_batched_tokens=40,
    max_num_seqs=6,
    token_buckets=(64,),
    seq_buckets=(8,),
    return_logits=True,
)


@functools.cache
def params():
    return random_params(MODEL, seed=1)


@functools.cache
def jobs():
    rng = np.random.default_rng(2)
    lengths = [70, 1, 33, 8, 90, 17, 40, 64, 5, 23]
    return tuple(
        Job(tuple(rng.integers(97, size=n).tolist()), int(rng.integers(3, 30)), 2 * i)
        for i, n in enumerate(lengths)
    )


@functools.cache
def undisturbed():
    return replay(jobs(), params(), MODEL, CONFIG)


@pytest.fixture(autouse=True, scope="module")
def _undisturbed_first():
    """The cached run is made before any planted bug, whichever test comes first."""
    undisturbed()


def run(**changes):
    return replay(jobs(), params(), MODEL, dataclasses.replace(CONFIG, **changes))


def assert_same_bits(result):
    comparison = compare(undisturbed(), result)
    assert comparison.is_equal, comparison
    assert comparison.num_requests == len(jobs())


def test_outputs_are_diverse():
    result = undisturbed()
    for request_id, job in enumerate(jobs()):
        assert len(result.outputs[request_id]) == job.max_tokens
    comparison = compare(result, result)
    assert comparison.num_distinct_outputs == len(jobs())
    assert comparison.num_distinct_tokens > 50
    longest = max(result.outputs.values(), key=len)
    assert len(set(longest)) > len(longest) // 2


@pytest.mark.parametrize(
    "changes",
    [
        {"page_aligned_scheduling": False},
        {"kv_write": "slices"},
        {"kv_write": "tokens"},
        {"kv_write": "tokens", "page_aligned_scheduling": False},
        {"kv_write": "fused"},
        {"kv_write": "fused", "page_aligned_scheduling": False},
        {"max_num_batched_tokens": 64},
        {"max_num_batched_tokens": 14},
        {"max_num_batched_tokens": 9, "max_num_seqs": 1},
        {"long_prefill_token_threshold": 16, "max_deferrals": 0},
        {"page_size": 4, "num_pages": 192},
        {"page_size": 16, "num_pages": 48, "page_aligned_scheduling": False},
    ],
    ids=str,
)
def test_scheduling_and_writes_change_nothing(changes):
    result = run(**changes)
    assert_same_bits(result)
    assert (result.num_deferrals > 0) <= CONFIG.page_aligned_scheduling


def test_the_tpu_kernels_write_what_the_oracle_writes():
    """The engine through the interpreted TPU writes: whole pages and slices, bit for bit."""
    want, got = run_few(), run_few_interpreted(write_backend="mosaic_tpu")
    assert compare(want, got).is_equal
    assert got.num_whole_pages > 0 and got.num_slices > got.num_whole_pages


@pytest.mark.parametrize("kv_write", ["pages", "fused"])
def test_the_tpu_attention_yields_the_oracles_tokens(monkeypatch, kv_write):
    """Its sums have another order, so the last bits of logits and of later layers' keys may go."""
    # The default blocks would hold thirty times these contexts, and take thrice as long to compile.
    small = attention_tpu.TpuAttentionConfig(block_kv=128, block_q=128)
    monkeypatch.setattr(attention_tpu, "default_config", lambda *args: small)
    want, got = run_few(), run_few_interpreted(attention_backend="mosaic_tpu", kv_write=kv_write)
    comparison = compare(want, got)
    assert comparison.num_equal_tokens == comparison.num_outputs == 6
    assert comparison.num_distinct_tokens > 3
    # Not 0: another backend computed them.
    assert 0 < comparison.max_logit_difference < 1e-4


def run_few(**changes):
    """Two requests in four steps: a prefill, one beside a decode, decodes."""
    few = [Job(job.prompt_ids[:n], 3, 0) for job, n in zip(jobs()[::2], (21, 13), strict=False)]
    config = dataclasses.replace(CONFIG, max_num_batched_tokens=24, max_num_seqs=2, **changes)
    return replay(few, params(), MODEL, config)


def run_few_interpreted(**changes):
    with pltpu.force_tpu_interpret_mode():
        return run_few(**changes)


@pytest.mark.parametrize("kv_write", KV_WRITES)
def test_each_form_calls_its_ops_with_the_backends_asked_for(monkeypatch, kv_write):
    calls = {}

    def recording(name, real):
        def op(*args, backend, **kwargs):
            calls[name] = backend
            return real(*args, backend="oracle", **kwargs)

        return op

    for name in (
        "page_write",
        "slice_write",
        "token_write",
        "write_and_attend",
        "ragged_paged_attention",
    ):
        monkeypatch.setattr(pallas_paged, name, recording(name, getattr(pallas_paged, name)))
    config = dataclasses.replace(CONFIG, kv_write=kv_write)
    segments = [batch_lib.Segment(0, 0, (1,) * 20, (0, 1, 2), samples=True, is_decode=False)]
    jax.eval_shape(
        functools.partial(
            model_lib.forward,
            config=MODEL,
            options=model_lib.StepOptions(kv_write, "W", "A"),
        ),
        params(),
        model_lib.make_pool(MODEL, config.num_pages, config.page_size),
        batch_lib.make_batch(segments, config),
    )
    assert (
        calls
        == {
            "tokens": {"token_write": "W", "ragged_paged_attention": "A"},
            "slices": {"slice_write": "W", "ragged_paged_attention": "A"},
            "pages": {"page_write": "W", "slice_write": "W", "ragged_paged_attention": "A"},
            "fused": {"write_and_attend": "A"},
        }[kv_write]
    )


@pytest.mark.parametrize("kv_write", ["pages", "fused"])
@pytest.mark.parametrize("aligned", [True, False])
def test_preemption_changes_nothing(aligned, kv_write):
    result = run(num_pages=16, page_aligned_scheduling=aligned, kv_write=kv_write)
    assert result.num_preemptions > 0
    assert_same_bits(result)


@functools.cache
def jobs_with_common_fronts():
    """Requests that begin alike, for a while, some of them twice the same."""
    front = jobs()[4].prompt_ids
    lengths = [0, 9, 40, 40, 41, 72, 90, 90]
    return tuple(
        Job((*front[:n], *jobs()[i % 7].prompt_ids[:20]), 5 + i, 3 * i)
        for i, n in enumerate(lengths)
    )


@functools.cache
def uncached():
    config = dataclasses.replace(CONFIG, enable_prefix_caching=False)
    return replay(jobs_with_common_fronts(), params(), MODEL, config)


def run_common(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return replay(jobs_with_common_fronts(), params(), MODEL, config)


@pytest.mark.parametrize("kv_write", ["pages", "fused"])
@pytest.mark.parametrize(
    "changes", [{}, {"page_aligned_scheduling": False}, {"num_pages": 20}], ids=str
)
def test_the_prefix_cache_changes_nothing(kv_write, changes):
    assert uncached().num_cached == 0
    result = run_common(kv_write=kv_write, **changes)
    comparison = compare(uncached(), result)
    assert comparison.is_equal, comparison
    assert comparison.num_distinct_outputs > 4
    assert result.num_cached > 100
    if not changes:
        assert result.num_tokens == uncached().num_tokens - result.num_cached


def _hash_of_the_page_alone(parent, token_ids):
    return token_ids[-1].to_bytes()


def test_a_planted_hash_is_seen(monkeypatch):
    uncached()
    monkeypatch.setattr(scheduler_lib, "page_hash", _hash_of_the_page_alone)
    comparison = compare(uncached(), run_common())
    assert comparison.num_equal_tokens < comparison.num_outputs
    assert comparison.num_equal_pools < comparison.num_requests


def drawn_tokens(**changes):
    """Tokens of requests that sample, each with its seed."""
    engine = Engine(params(), MODEL, dataclasses.replace(CONFIG, **changes))
    for i, job in enumerate(jobs()):
        engine.add_request(
            job.prompt_ids, SamplingParams(job.max_tokens, temperature=1.0, top_p=0.9, seed=i)
        )
    return engine.run(), engine.stats


def test_sampled_tokens_do_not_depend_on_scheduling_either():
    want, stats = drawn_tokens()
    assert stats.num_preemptions == 0
    assert want != undisturbed().outputs
    for changes in (
        {"num_pages": 16},
        {"page_aligned_scheduling": False, "max_num_batched_tokens": 14},
        {"max_num_seqs": 2, "kv_write": "fused", "enable_prefix_caching": False},
    ):
        got, stats = drawn_tokens(**changes)
        assert got == want
        assert (stats.num_preemptions > 0) == ("num_pages" in changes)


def test_no_request_reads_a_page_that_another_writes(monkeypatch):
    """What write_and_attend asks of its caller, in every batch, with pages changing hands."""
    real, batches = engine_lib.make_batch_of, []

    def recording(*args):
        batch = real(*args)
        batches.append(batch._replace(page_indices=batch.page_indices[batch.table_rows]))
        return batch

    monkeypatch.setattr(engine_lib, "make_batch_of", recording)
    result = run(num_pages=16, kv_write="fused")
    assert result.num_preemptions > 0 and len(batches) == result.num_steps
    assert run_common(num_pages=20, kv_write="fused").num_cached > 100
    pool = jax.eval_shape(lambda: model_lib.make_pool(MODEL, 20, CONFIG.page_size))
    for batch in batches:
        validate_table(pool, batch)
    largest = max(batches, key=lambda batch: batch.num_seqs[0])
    own = largest.page_indices
    shared = largest._replace(page_indices=own.copy())
    shared.page_indices[0, 0] = own[1, 0]
    with pytest.raises(ValueError, match="argument `page_indices`"):
        validate_table(pool, shared)


def validate_table(pool, batch):
    pallas_paged.validate(
        pool,
        num_tokens=batch.token_ids.shape[0],
        page_indices=batch.page_indices,
        kv_lens=batch.kv_lens,
        cu_q_lens=batch.cu_q_lens,
        num_seqs=batch.num_seqs,
    )


def test_other_shapes_change_the_last_bits_at_most():
    result = run(token_buckets=(16, 40), seq_buckets=(2, 6))
    comparison = compare(undisturbed(), result)
    assert comparison.num_equal_tokens == comparison.num_outputs
    assert comparison.max_logit_difference < 1e-4


def test_no_shape_is_compiled_that_was_not_announced():
    config = dataclasses.replace(CONFIG, token_buckets=(16, 64), seq_buckets=(8,))
    model_lib.jitted_step("cpu").clear_cache()
    replay(jobs(), params(), MODEL, config)
    assert model_lib.jitted_step("cpu")._cache_size() <= len(batch_lib.batch_shapes(config)) == 2


def test_the_model_is_the_dense_one():
    """Against a Llama without pages, batches or chunks, in float64."""
    result = undisturbed()
    for request_id in (0, 1, 4):
        prompt, output = jobs()[request_id].prompt_ids, result.outputs[request_id]
        want = dense_logits([*prompt, *output[:-1]], MODEL, params())[len(prompt) - 1 :]
        np.testing.assert_allclose(result.logits[request_id], want, rtol=1e-4, atol=1e-4)


def test_biases_head_norms_tied_embeddings_and_stretched_rope():
    """What Llama, Qwen2 and Qwen3 have beyond that, all in one."""
    model = dataclasses.replace(
        MODEL,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=True,
        tie_embeddings=True,
        rope_scaling=RopeScaling("yarn", factor=4.0, original_max_position=32),
    )
    few = [dataclasses.replace(job, max_tokens=3) for job in jobs()[:2]]
    weights = random_params(model, seed=2)
    heads = model.num_heads + 2 * model.num_kv_heads
    for layer in weights["layers"]:  # not the norms that all begin with
        layer["head_norm"] = 1 + 0.3 * jnp.sin(jnp.arange(16.0 * heads)).reshape(heads, 16)
    result = replay(few, weights, model, CONFIG)
    for request_id, job in enumerate(few):
        tokens = [*job.prompt_ids, *result.outputs[request_id][:-1]]
        want = dense_logits(tokens, model, weights)[len(job.prompt_ids) - 1 :]
        np.testing.assert_allclose(result.logits[request_id], want, rtol=1e-4, atol=1e-4)


def dense_logits(token_ids, model, weights):
    """f64[n, vocab_size], every position's logits."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    x = p["embedding"][token_ids]
    n, head_dim = len(token_ids), model.head_dim
    frequencies, factor = rope.frequencies(head_dim, model.rope_theta, model.rope_scaling)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model.rms_norm_eps) * scale

    def rotate(x):  # [n, heads, H], the two halves as one complex number
        half = head_dim // 2
        angle = np.arange(n)[:, None] * frequencies.astype(float)
        turned = factor * (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    for w in p["layers"]:

        def project(y, name, w=w):
            return y @ w[name] + w.get(f"{name}_bias", 0)

        qkv = project(norm(x, w["attention_norm"]), "qkv").reshape(n, -1, head_dim)
        q_and_k, v = np.split(qkv, [model.num_heads + model.num_kv_heads], axis=1)
        if "head_norm" in w:
            q_and_k = norm(q_and_k, w["head_norm"][: q_and_k.shape[1]])
        q, k = np.split(rotate(q_and_k), [model.num_heads], axis=1)
        group = model.num_heads // model.num_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(head_dim)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + project(np.einsum("nqk,knh->qnh", weights, v).reshape(n, -1), "o")
        y = norm(x, w["mlp_norm"])
        gate, up = np.split(project(y, "gate_up"), 2, axis=1)
        x = x + project(gate / (1 + np.exp(-gate)) * up, "down")
    unembedding = p["embedding" if model.tie_embeddings else "unembedding"]
    return norm(x, p["norm"]) @ unembedding.T


@pytest.mark.parametrize("qk_norm", [True, False])
def test_heads_on_lanes_are_those_of_a_packed_qkv(monkeypatch, qk_norm):
    """What a TPU computes, on a CPU."""
    model = dataclasses.replace(MODEL, num_heads=6, num_kv_heads=2, head_dim=16, qk_norm=qk_norm)
    keys = jax.random.split(jax.random.key(0), 2)
    qkv = jax.random.normal(keys[0], (5, 10 * 16))
    weights = {"head_norm": jax.random.normal(keys[1], (10, 16))} if qk_norm else {}
    rotation = model_lib._rotation(jnp.arange(5) * 3, model)
    packed, *_ = model_lib._heads(qkv, weights, rotation, model)
    monkeypatch.setattr(model_lib.dispatch, "platform", lambda: "tpu")
    q, k, v = model_lib._heads(qkv, weights, rotation, model)
    got = jnp.concatenate([q.reshape(5, -1), k, v], axis=1)
    np.testing.assert_allclose(got, packed.reshape(5, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_write", ["pages", "fused"])
def test_the_pool_is_not_copied(kv_write):
    """The flat pool goes through the layers in place: no temporary of its size."""
    config = dataclasses.replace(CONFIG, num_pages=4096, kv_write=kv_write)
    pool = jax.eval_shape(lambda: model_lib.make_pool(MODEL, config.num_pages, config.page_size))
    segments = [batch_lib.Segment(0, 0, (1,) * 20, (0, 1, 2), samples=True, is_decode=False)]
    forward = functools.partial(
        model_lib.forward,
        config=MODEL,
        options=model_lib.StepOptions(kv_write, "oracle", "oracle"),
    )
    compiled = (
        jax.jit(forward, donate_argnums=1)
        .lower(params(), pool, batch_lib.make_batch(segments, config))
        .compile()
    )
    pool_bytes = pool.size * pool.dtype.itemsize
    assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 4


# Planted bugs: what makes the runs equal is not that nothing matters.


def _wrong_page(plan, page_size):
    page_ids = plan.page_ids.copy()
    page_ids[:1] = (page_ids[:1] + 1) % CONFIG.num_pages
    slots = plan.slots.copy()
    slots[:1] = (slots[:1] + page_size) % (CONFIG.num_pages * page_size)
    slices = plan.slices.copy()
    slices[0, :1] = (slices[0, :1] + page_size) % (CONFIG.num_pages * page_size)
    return page_ids, plan.token_starts, slices, slots


def _wrong_token(plan, page_size):
    return (
        plan.page_ids,
        np.maximum(plan.token_starts - 1, 0),
        plan.slices,
        np.roll(plan.slots, 1),
    )


@pytest.mark.parametrize("kv_write", ["pages", "slices", "tokens"])
@pytest.mark.parametrize("plant", [_wrong_page, _wrong_token])
def test_a_planted_write_is_seen(monkeypatch, kv_write, plant):
    real = batch_lib.plan_writes

    def planted(segments, page_size):
        return batch_lib_write_plan(*plant(real(segments, page_size), page_size))

    batch_lib_write_plan = type(real([], 1))
    monkeypatch.setattr(batch_lib, "plan_writes", planted)
    assert_plant_is_seen(run(kv_write=kv_write))


def _wrong_table_row(batch):
    batch.table_rows[0] = batch.table_rows[1]


def _wrong_table_entry(batch):
    pages = batch.page_changes[2]
    pages[:1] = (pages[:1] + 1) % CONFIG.num_pages


def _change_is_lost(batch):
    batch.page_changes[0] = -1


@pytest.mark.parametrize("plant", [_wrong_table_row, _wrong_table_entry, _change_is_lost])
def test_a_planted_page_table_is_seen_by_the_fused_form(monkeypatch, plant):
    real = engine_lib.make_batch_of

    def planted(*args):
        batch = real(*args)
        plant(batch)
        return batch

    monkeypatch.setattr(engine_lib, "make_batch_of", planted)
    assert_plant_is_seen(run(kv_write="fused"))


def test_a_planted_token_is_seen_by_the_fused_form(monkeypatch):
    real = pallas_paged.write_and_attend

    def planted(q, k, v, *args, **kwargs):
        return real(jnp.roll(q, 1, axis=0), k, v, *args, **kwargs)

    monkeypatch.setattr(pallas_paged, "write_and_attend", planted)
    assert_plant_is_seen(run_anew(kv_write="fused"))


def assert_plant_is_seen(result):
    comparison = compare(undisturbed(), result)
    assert comparison.num_equal_pools < comparison.num_requests
    assert comparison.num_equal_tokens < comparison.num_outputs
    assert comparison.max_logit_difference > 0.1


def run_anew(**changes):
    """A run of which no function comes from the cache of the jitted model, nor stays there."""
    programs = (model_lib.jitted_step("cpu"), model_lib._layer)
    for program in programs:
        program.clear_cache()
    try:
        return run(**changes)
    finally:
        for program in programs:
            program.clear_cache()


def _layers_share_their_pages(batch, first_page, page_size):
    return batch


def _skipped_ids_are_shifted(batch, first_page, page_size):
    shifted = _real_in_layer(batch, first_page, page_size)
    return shifted._replace(slots=batch.slots + first_page * page_size)


_real_in_layer = model_lib.in_layer


@pytest.mark.parametrize(
    "kv_write, bug",
    [
        ("tokens", _layers_share_their_pages),
        ("tokens", _skipped_ids_are_shifted),
        ("fused", _layers_share_their_pages),
    ],
)
def test_a_planted_layer_offset_is_seen(monkeypatch, kv_write, bug):
    monkeypatch.setattr(model_lib, "in_layer", bug)
    comparison = compare(undisturbed(), run_anew(num_pages=16, kv_write=kv_write))
    assert comparison.num_equal_pools < comparison.num_requests
    assert comparison.max_logit_difference > 0.01


# Interruptions.


class ModelError(Exception):
    pass


def _raise_before(*args, **kwargs):
    raise ModelError


def _raise_after_the_pool_is_gone(*args, **kwargs):
    _real_run_step(*args, **kwargs)
    raise ModelError


_real_run_step = engine_lib.run_step


@pytest.mark.parametrize(
    "module, name, failing",
    [
        (engine_lib, "run_step", _raise_before),
        (engine_lib, "run_step", _raise_after_the_pool_is_gone),
        # As an error of the device, which shows when its result is read.
        (sampler_lib, "greedy", _raise_before),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_raises_loses_nothing(monkeypatch, module, name, failing, ahead):
    config = dataclasses.replace(CONFIG, num_pages=32, async_scheduling=ahead)
    engine = Engine(params(), MODEL, config)
    for job in jobs():
        engine.add_request(job.prompt_ids, SamplingParams(job.max_tokens))
    tokens = {request_id: [] for request_id in range(len(jobs()))}
    step = num_errors = 0
    while engine.has_work:
        step += 1
        if step % 5 == 2:
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing)
                try:
                    for output in engine.step():  # a step ahead that dispatches nothing
                        tokens[output.request_id].append(output.token_id)
                except ModelError:
                    num_errors += 1
            assert_books_balance(engine)
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
    assert tokens == undisturbed().outputs and num_errors > 5
    assert engine.scheduler.pool.num_free == 32


@pytest.mark.parametrize("kv_write", KV_WRITES)
@pytest.mark.parametrize("num_pages", [16, 96])
def test_one_step_ahead_every_form_writes_the_same_bits(kv_write, num_pages):
    config = dataclasses.replace(CONFIG, kv_write=kv_write, num_pages=num_pages)
    digests, tokens, logits, now = {}, {}, {}, 0

    def keep_digest(request):
        kv = np.ascontiguousarray(engine.read_kv(request))
        digests[request.request_id] = hashlib.sha256(kv.tobytes()).hexdigest()

    engine = Engine(params(), MODEL, config, on_finish=keep_digest)
    arriving = list(jobs())
    while arriving or engine.has_work:
        while arriving and arriving[0].arrival_step <= now:
            job = arriving.pop(0)
            engine.add_request(job.prompt_ids, SamplingParams(job.max_tokens))
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)
            logits.setdefault(output.request_id, []).append(output.logits.tobytes())
        now += 1
    want = undisturbed()
    assert tokens == want.outputs and digests == want.kv_digests
    assert logits == {i: [row.tobytes() for row in rows] for i, rows in want.logits.items()}
    assert (engine.stats.num_preemptions > 0) == (num_pages == 16)


def assert_books_balance(engine):
    held = [page for request in engine.scheduler.running for page in request.page_ids]
    assert len(held) == len(set(held))
    assert all(engine.scheduler.pool.references(page) == 1 for page in held)  # no common fronts
    assert len(held) + engine.scheduler.pool.num_free == engine.config.num_pages


@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_any_time_leave_the_others_alone(seed):
    rng = random.Random(seed)
    config = dataclasses.replace(CONFIG, num_pages=20, async_scheduling=seed % 2 == 1)
    engine = Engine(params(), MODEL, config)
    for job in jobs():
        engine.add_request(job.prompt_ids, SamplingParams(job.max_tokens))
    alive = set(range(len(jobs())))
    tokens = {request_id: [] for request_id in alive}
    while engine.has_work:
        if rng.random() < 0.15:
            victim = rng.choice(sorted(alive))
            assert (engine.abort(victim) is not None) == (victim in alive)
            alive.discard(victim)
            assert not engine.abort(victim)
            assert_books_balance(engine)
        for output in engine.step():
            assert output.request_id in alive
            tokens[output.request_id].append(output.token_id)
            if output.finish_reason is not None:
                assert tokens[output.request_id] == undisturbed().outputs[output.request_id]
                alive.discard(output.request_id)
        if not alive:
            assert not engine.has_work
    assert not alive
    assert engine.scheduler.pool.num_free == 20
    for request_id, generated in tokens.items():  # also of those that were cut short
        assert generated == undisturbed().outputs[request_id][: len(generated)]


def test_an_on_finish_that_raises_leaks_no_page():
    def raise_always(request):
        raise ModelError

    engine = Engine(params(), MODEL, CONFIG, on_finish=raise_always)
    engine.add_request([1, 2, 3], SamplingParams(1))
    assert engine.step() == []  # a step ahead
    with pytest.raises(ModelError):
        engine.step()
    assert not engine.has_work
    assert engine.scheduler.pool.num_free == CONFIG.num_pages


# Ends and refusals.


def finish_of(prompt, sampling, **changes):
    engine = Engine(params(), MODEL, dataclasses.replace(CONFIG, **changes))
    engine.add_request(prompt, sampling)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert all(output.finish_reason is None for output in outputs[:-1])
    return [output.token_id for output in outputs], outputs[-1].finish_reason


def test_finish_reasons():
    prompt = jobs()[0].prompt_ids
    tokens, reason = finish_of(prompt, SamplingParams(9))
    assert (tokens, reason) == (undisturbed().outputs[0][:9], FinishReason.LENGTH)
    stop = next(i for i in range(1, 9) if tokens[i] not in tokens[:i])
    got = finish_of(prompt, SamplingParams(9, stop_token_ids=(tokens[stop],)))
    assert got == (tokens[: stop + 1], FinishReason.STOP)
    got = finish_of(prompt, SamplingParams(99), max_model_len=len(prompt) + 4)
    assert len(got[0]) == 4 and got[1] is FinishReason.LENGTH


@pytest.mark.parametrize(
    "prompt, max_tokens, message",
    [
        ([], 4, "argument `prompt_ids` is empty; wanted at least one token id"),
        ([5, 97], 4, "is 97 at index 1; wanted whole numbers in \\[0, 97\\)"),
        ([5, 6.5], 4, "is 6.5 at index 1"),
        ("text", 4, "is 't' at index 0"),
        ([5, 6, -1], 4, "is -1 at index 2"),
        ([5, True], 4, "is True at index 1"),
        (b"text", 4, "is b'text'; wanted a list of token ids"),
        (5, 4, "argument `prompt_ids` is 5; wanted a list of token ids"),
        ([1] * 128, 4, "is 128 tokens long; wanted fewer than max_model_len=128"),
        ([1] * 30, 52, "up to 11 pages; wanted at most the pool's 10 pages"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_and_nothing_is_lost(
    prompt, max_tokens, message
):
    engine = Engine(params(), MODEL, dataclasses.replace(CONFIG, num_pages=10))
    kept = engine.add_request(jobs()[2].prompt_ids, SamplingParams(jobs()[2].max_tokens))
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt, SamplingParams(max_tokens))
    assert engine.run() == {kept: undisturbed().outputs[2]}


def test_a_request_may_fill_the_pool_to_its_last_row():
    engine = Engine(params(), MODEL, dataclasses.replace(CONFIG, num_pages=10))
    engine.add_request([1] * 30, SamplingParams(51))  # the 51st token is never written
    assert len(engine.run()[0]) == 51


def test_an_engines_numbers_are_checked():
    for fields, message in (
        ({"seed": -1}, "argument `seed` is -1; wanted an int >= 0"),
        ({"eos_token_ids": (-1,)}, r"argument `eos_token_ids` is \(-1,\); wanted ids in"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(params(), MODEL, CONFIG, **fields)
    with pytest.raises(ValueError, match="argument `params` is 5; wanted SamplingParams"):
        Engine(params(), MODEL, CONFIG).add_request([1], 5)


def test_sampling_params_are_checked():
    with pytest.raises(ValueError, match="argument `max_tokens` is 0; wanted an int >= 1"):
        SamplingParams(max_tokens=0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_heads": 3}, "argument `num_heads` is 3; wanted a multiple of num_kv_heads=2"),
        ({"head_dim": 15}, "argument `head_dim` is 15; wanted an even number"),
        ({"num_layers": 0}, "argument `num_layers` is 0; wanted an int >= 1"),
    ],
)
def test_model_configs_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"kv_write": "rows"},
            r"argument `kv_write` is 'rows'; wanted one of "
            r"\('tokens', 'slices', 'pages', 'fused'\)",
        ),
        ({"kv_write": None}, "argument `kv_write` is None"),
        (
            {"attention_backend": "flash"},
            r"argument `attention_backend` is 'flash'; wanted one of "
            r"\('auto', 'oracle', 'xla', 'mosaic_tpu'",
        ),
        ({"write_backend": "cuda"}, "argument `write_backend` is 'cuda'; wanted one of"),
        (
            {"kv_write": "fused", "write_backend": "mosaic_tpu"},
            "argument `write_backend` is 'mosaic_tpu'; wanted 'auto' or attention_backend='oracle'",
        ),
        (
            {"kv_write": "fused", "write_backend": "oracle", "attention_backend": "mosaic_tpu"},
            "argument `write_backend` is 'oracle'; wanted 'auto' or attention_backend='mosaic_tpu'",
        ),
    ],
)
def test_ways_to_write_and_attend_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_a_backend_that_cannot_run_is_refused_and_never_replaced():
    engine = Engine(params(), MODEL, dataclasses.replace(CONFIG, attention_backend="mosaic_gpu"))
    engine.add_request([1, 2, 3])
    with pytest.raises(NotImplementedError, match="backend 'mosaic_gpu' cannot run this call"):
        engine.step()


def test_replay_jumps_over_idle_steps():
    sparse = [dataclasses.replace(job, arrival_step=1000 * i) for i, job in enumerate(jobs()[:3])]
    result = replay(sparse, params(), MODEL, CONFIG)
    assert result.num_steps < 200
    assert max(result.ttft.values()) < 5
    assert result.outputs == {i: undisturbed().outputs[i] for i in range(3)}
    assert replay_lib.compare(result, undisturbed()).num_equal_pools == 3
