# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which backend a call takes, that it can be asked for, and that a slower one is announced."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_paged
from pallas_paged import dispatch
from tests.attention.cases import make_case


def on(kind, platform):
    """A context in which calls are traced for a device that need not be there."""
    device = AbstractDevice(kind, 1, platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


V6E, H100 = ("TPU v6 lite", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu")


def explain(page_size=16, dtype="bfloat16", device=None, **options):
    case = make_case([(1, 17)], page_size=page_size, head_dim=128, dtype=dtype, pool_dtype=dtype)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.arrays)
    op = pallas_paged.ragged_paged_attention
    with on(*device) if device else contextlib.nullcontext():
        return pallas_paged.explain_backend(op, *arrays, num_kv_heads=2, **options)


def test_a_cpu_takes_xla():
    choice = explain()
    assert choice.backend == "xla"
    assert choice.reasons["oracle"] == '"auto" prefers xla'
    assert "for a tpu, and the call is traced for a cpu" in choice.reasons["mosaic_tpu"]
    assert str(choice).splitlines()[0] == "xla runs this call."


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernels need jax 0.11.2")
def test_an_accelerator_takes_its_kernels():
    assert explain(device=H100).backend == "mosaic_gpu"


def test_a_tpu_takes_its_kernels():
    choice = explain(device=V6E)
    assert choice.backend == "mosaic_tpu" and '"auto" prefers mosaic_tpu' in choice.reasons["xla"]


@pytest.mark.parametrize("device", [V6E, H100], ids=lambda x: x[1])
def test_a_slower_backend_is_announced_once_per_reason(device):
    """float16 has no kernel on a TPU, and pages of 5 tokens have none on a GPU."""
    page_size, dtype = (16, "float16") if device is V6E else (5, "bfloat16")
    kernels = f"mosaic_{device[1]}"
    choice = explain(page_size, dtype, device)
    assert choice.backend == "xla" and choice.reasons[kernels]
    with on(*device):
        refusal = dispatch.Plan(refusal=choice.reasons[kernels])
        plans = {kernels: refusal, "xla": dispatch.Plan(spec="spec")}
        dispatch._warn_once.cache_clear()
        with pytest.warns(
            UserWarning, match=f"backend '{kernels}' cannot run this call, and 'xla'"
        ):
            assert dispatch.choose("an_op", "auto", plans.__getitem__) == ("xla", "spec")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch.choose("an_op", "auto", plans.__getitem__)


def test_what_is_named_is_explained():
    choice = explain(backend="oracle")
    assert choice.backend == "oracle" and choice.reasons["xla"] == "backend='oracle' was named"
    refused = explain(page_size=16, backend="mosaic_gpu", dtype="float32")
    assert refused.backend is None and str(refused).startswith("Nothing runs this call.")


def test_a_gradual_mask_leaves_the_oracle():
    choice = explain(mask_value=-5.0)
    assert choice.backend == "oracle" and "hidden keys count" in choice.reasons["xla"]


def test_nothing_is_donated_or_computed():
    pool = pallas_paged.make_kv_pages(4, 16, num_kv_heads=1, head_dim=128)
    ids = jnp.array([1], jnp.int32)
    pallas_paged.explain_backend(pallas_paged.copy_pages, pool, ids, ids)
    assert not pool.is_deleted()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (pool, ids, ids))
    assert pallas_paged.explain_backend(pallas_paged.copy_pages, *shapes).backend == "xla"


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="argument `op` is .*wanted an op of pallas_paged"):
        pallas_paged.explain_backend(pallas_paged.make_kv_pages, 4, 16, 1, 128)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        explain(backend="cuda")
