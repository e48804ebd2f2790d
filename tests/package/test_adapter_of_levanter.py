# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Levanter itself, from its wheel where it is installed, with and without the adapter of its page.

pip install marin-levanter gitpython
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_paged
from tests.package.adapter_batch import make_batch
from tests.package.adapter_checks import adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # Levanter and its dependencies warn


@pytest.fixture(scope="module")
def levanter():
    """Its modules, imported here, where warnings are no errors."""
    reason = "pip install marin-levanter gitpython"
    names = "layers.kv_cache", "layers.attention", "inference.page_table", "inference.utils"
    modules = [
        pytest.importorskip(f"levanter.{name}", reason=reason, exc_type=ImportError)
        for name in names
    ]
    return dict(zip(("kv_cache", "attention", "page_table", "utils"), modules, strict=True))


def install(levanter, monkeypatch, planted=None):
    """Runs the page's lines; what they replace is put back after the test."""
    cache_type = levanter["kv_cache"].KvPageCache
    monkeypatch.setattr(cache_type, "init", staticmethod(cache_type.init))
    monkeypatch.setattr(cache_type, "update", cache_type.update)
    attention = levanter["attention"]
    monkeypatch.setattr(attention, "ragged_paged_attention", attention.ragged_paged_attention)
    adapter(monkeypatch, ["Levanter"], {}, planted)


def batch_info(levanter, b):
    """The step as Levanter describes it, with its own sentinel wherever nothing is."""
    import haliax

    invalid = levanter["utils"].INVALID
    table = np.full_like(b.table, invalid)
    kv_lens = np.full_like(b.kv_lens, invalid)
    for s, (_, length) in enumerate(b.lens):
        used = -(-length // b.before.shape[1])
        table[s, :used], kv_lens[s] = b.table[s, :used], length
    dests = np.where(np.arange(len(b.slots)) < b.cu_q_lens[b.num_seqs], b.slots, invalid)
    named = haliax.named
    return levanter["page_table"].PageBatchInfo(
        slot_ids=named(jnp.arange(len(table), dtype=jnp.int32), ("seq",)),
        page_indices=named(jnp.asarray(table), ("seq", "page")),
        seq_lens=named(jnp.asarray(kv_lens), ("seq",)),
        cu_q_lens=named(jnp.asarray(b.cu_q_lens), ("seq",)),
        num_seqs=jnp.int32(b.num_seqs),
        new_token_dests=named(jnp.asarray(dests.astype(np.int32)), ("position",)),
        page_size=b.before.shape[1],
    )


def step(levanter, b, head_dim):
    """What a layer does: fill a cache with the older tokens, write the new ones, attend."""
    import haliax

    cache_type = levanter["kv_cache"].KvPageCache
    num_pages, page_size = b.before.shape[:2]
    spec = levanter["page_table"].PageTableSpec(num_pages, page_size)
    axes = haliax.Axis("kv_head", 2), haliax.Axis("head_size", head_dim)
    cache = cache_type.init(spec, *axes, dtype=jnp.float32)
    old = pallas_paged.split_kv(jnp.nan_to_num(jnp.asarray(b.before)), 2, head_dim)
    if cache.kv_pages.array.shape[-1] == head_dim and head_dim < 128:  # its own form
        pool = jnp.stack(old, axis=3).reshape(num_pages, page_size, 4, head_dim)
    else:
        pool = pallas_paged.merge_kv(*old)
    cache = dataclasses.replace(cache, kv_pages=haliax.named(pool, cache.kv_pages.axes))
    info = batch_info(levanter, b)
    new_axes = ("position", "kv_head", "head_size")
    cache = cache.update(info, *(haliax.named(jnp.asarray(x), new_axes) for x in (b.k, b.v)))
    q = jnp.asarray(b.q).reshape(len(b.q), 2, -1, head_dim)
    out = levanter["attention"].ragged_paged_attention(
        haliax.named(q, ("position", "kv_head", "q_heads_per_group", "head_size")),
        cache.kv_pages,
        info.seq_lens,
        info.page_indices,
        info.cu_q_lens,
        info.num_seqs,
        sm_scale=0.1,
        soft_cap=5.0,
    )
    return cache.kv_pages.array, out.array


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_layer_gives_the_same(head_dim, levanter, monkeypatch):
    b = make_batch(head_dim=head_dim)
    wanted_pool, wanted = step(levanter, b, head_dim)
    install(levanter, monkeypatch)
    pool, out = step(levanter, b, head_dim)
    k, v = pallas_paged.split_kv(pool, 2, head_dim)
    np.testing.assert_array_equal(k, wanted_pool[:, :, 0::2])
    np.testing.assert_array_equal(v, wanted_pool[:, :, 1::2])
    np.testing.assert_allclose(out, wanted, atol=2e-5, rtol=2e-5)
    b.expect(out.reshape(b.q.shape), sm_scale=0.1, cap=5.0)
    install(levanter, monkeypatch, ("sm_scale=sm_scale", "sm_scale=None"))
    assert np.abs(step(levanter, b, head_dim)[1] - wanted).max() > 1e-3


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_model_gives_the_same(head_dim, levanter, monkeypatch):
    """Its Llama, two layers with random weights, for the steps of two batches."""
    import haliax
    from levanter.models.llama import LlamaConfig, LlamaLMHeadModel

    config = LlamaConfig(
        max_seq_len=64,
        hidden_dim=64,
        intermediate_dim=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        gradient_checkpointing=False,
    )
    vocab = haliax.Axis("vocab", 97)
    model = LlamaLMHeadModel.init(vocab, config, key=jax.random.PRNGKey(0))
    b = make_batch([(13, 13), (5, 5)], head_dim=head_dim)
    b2 = make_batch([(1, 14), (1, 6)], head_dim=head_dim)
    b2.table[:2] = b.table[:2]
    for s, (_, length) in enumerate(b2.lens):
        page, row = divmod(length - 1, b.before.shape[1])
        b2.slots[s] = b.table[s, page] * b.before.shape[1] + row

    def logits():
        spec = levanter["page_table"].PageTableSpec(*b.before.shape[:2])
        cache = model.initial_cache(spec, dtype=jnp.float32)
        found = []
        for batch in (b, b2):
            num_tokens = batch.cu_q_lens[batch.num_seqs]
            positions = np.zeros(len(batch.q), np.int32)
            for s, (new, length) in enumerate(batch.lens):
                positions[batch.cu_q_lens[s] : batch.cu_q_lens[s + 1]] = range(length - new, length)
            ids = np.random.default_rng(1).integers(97, size=len(batch.q)).astype(np.int32)
            out, cache = model.decode(
                haliax.named(jnp.asarray(ids), ("position",)),
                cache,
                batch_info(levanter, batch),
                haliax.named(jnp.asarray(positions), ("position",)),
            )
            found.append(np.asarray(out.array)[:num_tokens])
        return np.concatenate(found)

    wanted = logits()
    assert wanted.std(axis=1).min() > 1e-3
    install(levanter, monkeypatch)
    calls = []
    write = pallas_paged.token_write
    monkeypatch.setattr(pallas_paged, "token_write", lambda *x: calls.append(1) or write(*x))
    np.testing.assert_allclose(logits(), wanted, atol=1e-4, rtol=1e-4)
    assert calls
    install(levanter, monkeypatch, ("slots = jnp.where", "slots = 1 + jnp.where"))
    assert np.abs(logits() - wanted).max() > 1e-2
