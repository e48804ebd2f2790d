# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The adapters of docs/adapters.md run as they stand there, in stand-ins for the projects."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    ragged_paged_attention as jax_attention,
)
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    ref_ragged_paged_attention as jax_reference,
)

from tests.package import adapter_checks as checks
from tests.package import adapter_stand_ins as stand_ins
from tests.package.adapter_batch import make_batch


def run(monkeypatch, check, planted=None, **options):
    sections, make_modules = checks.PROJECTS[check]
    modules = make_modules()
    check(checks.adapter(monkeypatch, sections, modules, planted), modules, **options)


@pytest.mark.parametrize("check", checks.PROJECTS, ids=lambda check: check.__name__)
def test_the_adapter_gives_what_the_project_asks_for(check, monkeypatch):
    run(monkeypatch, check)


@pytest.mark.parametrize(
    "check",
    [checks.check_levanter, checks.check_tpu_inference, checks.check_ejkernel_v3],
    ids=lambda c: c.__name__,
)
def test_heads_of_64(check, monkeypatch):
    run(monkeypatch, check, head_dim=64)


PLANTED = [
    (checks.check_jax, ("kv_pages.shape[2] // 2", "1")),
    (checks.check_levanter, ("jnp.where(is_new & is_valid(slots), slots, -1)", "slots")),
    (checks.check_levanter, (" & is_valid(slots)", "")),
    (checks.check_levanter, ("is_new & ", "")),
    (checks.check_levanter, ("sm_scale=sm_scale", "sm_scale=None")),
    (checks.check_levanter, ("q = q.rearrange", "q.rearrange")),
    (checks.check_tpu_inference, ('"sm_scale": sm_scale', '"sm_scale": sm_scale * q_scale')),
    (checks.check_tpu_inference, ("distribution[2:]", "distribution[:1]")),
    (checks.check_tpu_inference, ('"sinks": sinks', '"sinks": None')),
    (checks.check_tpu_inference_fp8, ('"k_scale": k_scale', '"k_scale": None')),
    (checks.check_tpu_inference_fp8, ('"causal": use_causal_mask', '"causal": True')),
    (checks.check_tpu_inference_sharded, ('"sinks": sinks', '"sinks": sinks[::-1]')),
    (
        checks.check_maxtext,
        ("            attention_chunk_size,\n            q", "            None,\n            q"),
    ),
    (checks.check_sglang, ("sm_scale=sm_scale", "sm_scale=sm_scale * q_scale")),
    (checks.check_sglang, ("page_indices, cu_kv_lens,", "page_indices, cu_q_lens,")),
    (checks.check_sglang, ("sinks=attention_sink", "sinks=None")),
    (checks.check_sglang_fp8, ("v_scale=v_scale", "v_scale=None")),
    (checks.check_ejkernel_v2, ("        num_seqs,\n        sm", "        1,\n        sm")),
    (checks.check_ejkernel_v2, ("priority=1", "priority=-1")),
    (checks.check_ejkernel_v3, ("distribution[2:]", "distribution[1:2]")),
    (checks.check_ejkernel_v3, ("sm_scale=softmax_scale", "sm_scale=softmax_scale * q_scale")),
    (checks.check_ejkernel_v3, ("sinks=softmax_aux", "sinks=None")),
    (checks.check_torch_xla, ("@functools.cache\n", "")),
    (checks.check_torch_xla, ("sliding_window=sliding_window", "sliding_window=None")),
    (checks.check_torch_xla, ("_attention(sm_scale, ", "_attention(1.0, ")),
]


@pytest.mark.parametrize(
    ("check", "planted"), PLANTED, ids=[f"{check.__name__}: {new}" for check, (_, new) in PLANTED]
)
def test_a_planted_fault_is_seen(check, planted, monkeypatch):
    with pytest.raises((AssertionError, NotImplementedError)):
        run(monkeypatch, check, planted)


SIGNATURES = [
    (checks.JAX, "ragged_paged_attention", stand_ins.jax_op),
    (checks.LEVANTER, "ragged_paged_attention", stand_ins.levanter_attention),
    (checks.TPU_INFERENCE, "sharded_ragged_paged_attention", stand_ins.tpu_inference_attention),
    (checks.MAXTEXT, "curried", stand_ins.older_tpu_inference_attention),
    (checks.SGLANG, "ragged_paged_attention_v3", stand_ins.sglang_attention),
    (checks.EJKERNEL, "ragged_page_attention_v2", stand_ins.ejkernel_v2),
    (checks.EJKERNEL, "ragged_page_attention_v3", stand_ins.ejkernel_v3),
    (checks.TORCH_XLA, "ragged_paged_attention", stand_ins.torch_xla_op),
]


@pytest.mark.parametrize(
    ("project", "name", "wanted"), SIGNATURES, ids=[f"{w.__name__}-{n}" for _, n, w in SIGNATURES]
)
def test_an_adapter_has_the_signature_of_what_it_replaces(project, name, wanted, monkeypatch):
    sections, make_modules = project
    found = checks.adapter(monkeypatch, sections, make_modules())[name]
    assert inspect.signature(found) == inspect.signature(wanted)


def test_jax_has_the_signature_of_its_stand_in_and_gives_the_same(monkeypatch):
    """jax's reference runs everywhere; what it gives to the rows behind the last is its own."""
    wanted = inspect.signature(stand_ins.jax_op).parameters
    assert list(inspect.signature(jax_attention).parameters) == list(wanted)
    names = checks.adapter(monkeypatch, *checks.JAX[:1], {})
    b = make_batch()
    table = np.where((b.table >= 0) & (b.table < len(b.after)), b.table, 0)  # it reads all entries
    arrays = [b.q, np.nan_to_num(b.after), b.kv_lens, table, b.cu_q_lens]
    arrays = [jnp.asarray(x) for x in arrays]
    arrays.append(jnp.array([b.num_seqs], jnp.int32))
    options = {"sm_scale": 0.1, "sliding_window": 6, "soft_cap": 5.0}
    by_jax = jax_reference(*arrays, **options)
    found = names["ragged_paged_attention"](*arrays, **options)
    np.testing.assert_allclose(found[: len(by_jax)], by_jax, atol=2e-5, rtol=2e-5)


def test_scales_of_a_pool_that_has_none_are_refused(monkeypatch):
    modules = stand_ins.make_tpu_inference()
    checks.adapter(monkeypatch, ["tpu-inference"], modules)
    b = make_batch(dtype=checks.BFLOAT16)
    k, v = map(jnp.asarray, (b.k, b.v))
    with pytest.raises(ValueError, match="k_scale"):
        checks.call_tpu_inference(modules, b, b.five(b.before), k, v, sm_scale=0.1, k_scale=0.5)


def test_what_an_adapter_cannot_do_is_refused(monkeypatch):
    modules = stand_ins.make_tpu_inference()
    checks.adapter(monkeypatch, ["tpu-inference"], modules)
    b = make_batch(dtype=checks.BFLOAT16)
    k, v = map(jnp.asarray, (b.k, b.v))
    with pytest.raises(NotImplementedError, match="data-parallel"):
        checks.call_tpu_inference(
            modules, b, b.five(b.before), k, v, mesh=checks.mesh_of(2, "data"), sm_scale=0.1
        )
    modules = stand_ins.make_sglang()
    checks.adapter(monkeypatch, ["sglang-jax"], modules)
    with pytest.raises(NotImplementedError, match="custom masks"):
        checks.call_sglang(modules, b, pool=b.five(b.before), custom_mask=jnp.zeros(9, jnp.int32))
