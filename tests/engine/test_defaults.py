# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What LLM takes where nobody has said: limits by the platform, pages by the memory."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference_engine import compiles, defaults
from reference_engine import llm as llm_lib
from reference_engine.batch import batch_shapes, make_batch_of, pack
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.defaults import DeviceMemory, default_fields, resolve, step_bytes
from reference_engine.engine import Engine
from reference_engine.llm import LLM
from reference_engine.model import StepOptions, make_pool, model_step
from reference_engine.weights import param_shapes, random_params
from tests.engine.checkpoints import write_checkpoint

GIB = 1 << 30
QWEN3_0P6B = ModelConfig(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    qk_norm=True,
    tie_embeddings=True,
    max_position=40_960,
    dtype="bfloat16",
)
LLAMA3_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
)
TINY = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def server(model, **fields):
    return EngineConfig(**default_fields(model, "gpu") | fields)


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("model", [QWEN3_0P6B, LLAMA3_8B])
def test_the_pool_takes_what_the_memory_has_left(model, page_size):
    memory = DeviceMemory(limit=60 * GIB, in_use=3 * GIB)
    config = server(model, page_size=page_size)
    resolved = resolve(config, model, "gpu", memory)
    assert resolved == dataclasses.replace(config, num_pages=resolved.num_pages)
    params = sum(2 * x.size for x in jax.tree.leaves(param_shapes(model)))
    page = model.num_layers * page_size * 2 * model.num_kv_heads * model.head_dim * 2
    taken = params + step_bytes(config, model) + resolved.num_pages * page
    assert 0.9 * 60 * GIB - 3 * GIB - page < taken <= 0.9 * 60 * GIB - 3 * GIB
    half = resolve(dataclasses.replace(config, gpu_memory_utilization=0.5), model, "gpu", memory)
    assert half.num_pages == pytest.approx(resolved.num_pages - 0.4 * 60 * GIB / page, abs=1)


def test_a_number_of_pages_stays():
    config = server(QWEN3_0P6B, num_pages=77)
    assert resolve(config, QWEN3_0P6B, "gpu", None) is config


@pytest.mark.parametrize(
    "memory, message",
    [
        (None, "the device does not say how much memory it has; wanted a number of pages"),
        (DeviceMemory(16 * GIB, 0), "None, and 0 bytes are left for the pool: .* lower max_model_"),
        # The parameters and a step fit, and so do pages, but not one request.
        (DeviceMemory(19 * GIB, 0), "wanted 512 pages of 2,097,152 bytes, one request of max_mod"),
    ],
)
def test_what_does_not_fit_is_refused(memory, message):
    with pytest.raises(ValueError, match=message):
        resolve(server(LLAMA3_8B), LLAMA3_8B, "tpu", memory)


def test_on_a_cpu_the_pool_is_of_one_size():
    config = EngineConfig(**default_fields(TINY, "cpu"))
    assert resolve(config, TINY, "cpu", None) == EngineConfig()
    long = dataclasses.replace(config, max_model_len=20_000, page_size=32)
    assert resolve(long, TINY, "cpu", None).num_pages == 625


def test_a_server_has_a_servers_limits():
    fields = default_fields(QWEN3_0P6B, "tpu")
    assert fields["max_num_seqs"] == 256 and fields["max_num_batched_tokens"] == 8192
    assert fields["max_model_len"] == 8192 and fields["compile_in_background"]
    assert (
        default_fields(dataclasses.replace(TINY, max_position=500), "gpu")["max_model_len"] == 500
    )


@pytest.mark.parametrize("shape", [-1, 0])
def test_a_step_needs_no_more_than_the_bound(shape):
    """By XLA's own account, on a CPU; nothing runs. For an H100 BUILD_NOTES.md has the figures."""
    model = dataclasses.replace(
        QWEN3_0P6B, num_layers=2, vocab_size=4096, dtype="float32", hidden_size=256
    )
    config = server(model, num_pages=600, max_num_batched_tokens=2048, max_num_seqs=64)
    pool = jax.eval_shape(lambda: make_pool(model, config.num_pages, config.page_size))
    batch = make_batch_of(batch_shapes(config)[shape], (), config)
    packed, spec = pack(batch[:-1])
    step = jax.jit(
        lambda *arrays: model_step(
            *arrays,
            spec=spec,
            model=model,
            options=StepOptions("tokens", "oracle", "xla"),
        ),
        donate_argnums=(1, 2),
    )
    table_shape = (64, config.max_pages_per_seq)
    table, packed, last_tokens = (
        jax.ShapeDtypeStruct(n, jnp.int32) for n in (table_shape, packed.shape, (64,))
    )
    used = (
        step.lower(param_shapes(model), pool, table, packed, last_tokens)
        .compile()
        .memory_analysis()
    )
    needed = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    assert needed < step_bytes(config, model)


def test_an_engine_asks_for_a_number_of_pages():
    with pytest.raises(ValueError, match="argument `num_pages` is None; wanted a number of pages"):
        Engine(random_params(TINY, seed=0), TINY, EngineConfig(num_pages=None))


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), "0.9", None, True])
def test_a_share_of_the_memory_is_checked(share):
    with pytest.raises(ValueError, match="argument `gpu_memory_utilization` is"):
        EngineConfig(gpu_memory_utilization=share)
    assert EngineConfig(gpu_memory_utilization=np.float32(0.5)).gpu_memory_utilization == 0.5


def test_an_llm_on_an_accelerator_is_a_server(tmp_path, monkeypatch):
    """With the memory and the name of a GPU, and all else as on this machine."""
    write_checkpoint(tmp_path)
    made = []

    class Stop(Exception):
        pass

    def engine(params, model, config, **options):
        made.append(config)
        raise Stop

    monkeypatch.setattr(llm_lib, "Engine", engine)
    monkeypatch.setattr(llm_lib.dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(llm_lib, "device_memory", lambda: DeviceMemory(GIB, 0))
    caches = []
    monkeypatch.setattr(llm_lib, "use_default_cache", lambda: caches.append(True))
    for options in ({}, {"max_num_seqs": 8, "compilation_cache": False}):
        with pytest.raises(Stop):
            LLM(tmp_path, **options)
    with pytest.raises(Stop):
        LLM(tmp_path, EngineConfig(max_model_len=64))
    assert len(caches) == 2
    assert [config.max_num_seqs for config in made] == [256, 8, 16]
    assert [config.compile_in_background for config in made] == [True, True, False]
    assert made[0].num_pages > made[2].num_pages == 1024
    assert made[0].num_pages < made[1].num_pages  # fewer logits


def test_the_default_cache_is_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiles.default_cache_folder() == tmp_path / "pallas_paged" / "xla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    home = pathlib.Path.home()
    assert compiles.default_cache_folder() == home / ".cache" / "pallas_paged" / "xla"


def test_the_default_cache_gives_way_to_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    used = []
    monkeypatch.setattr(compiles, "use_persistent_cache", used.append)
    assert jax.config.jax_compilation_cache_dir is None
    compiles.use_default_cache()
    assert used == [tmp_path / "cache" / "pallas_paged" / "xla"]
    for name, value in (
        ("jax_compilation_cache_dir", str(tmp_path)),
        ("jax_enable_compilation_cache", False),
    ):
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            compiles.use_default_cache()
        finally:
            jax.config.update(name, before)
    assert len(used) == 1


def test_a_folder_that_cannot_be_made_is_announced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiles anew; name another by compilation_cache"):
        compiles.use_default_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_the_memory_of_a_cpu_is_not_known():
    assert defaults.device_memory() is None
