# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""bench.tune_attention_gpu: what it tries, keeps, writes; and that the kernels read it."""

import dataclasses
import functools
import importlib.resources
import json

import jax
import pytest
from absl import app, flags
from absl.testing import flagsaver

from bench import clock, report, tuning
from bench import tune_attention_gpu as tune
from pallas_paged import dispatch, tuned
from pallas_paged.attention.gpu import config as gpu_config

_OP = "ragged_paged_attention"
_KIND = "NVIDIA H100 80GB HBM3"
KINDS = [(d, p) for d in (64, 128, 256) for p in ("bfloat16", "float8_e4m3fn")]
needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU needs jax 0.11.2"
)


@pytest.fixture(autouse=True)
def flags_are_parsed():
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
        yield


def _room(call, name):
    runs = list(tune.SEARCHES[name].values())
    return dataclasses.replace(call, **tune.room_for(runs, call.page_size, is_exact=True))


@needs_new_jax
@pytest.mark.parametrize("name", tune.SEARCHES)
@pytest.mark.parametrize(("head_dim", "pool_dtype"), KINDS)
def test_candidates_fit_and_begin_with_the_formula(head_dim, pool_dtype, name):
    call = _room(tune.call_of(head_dim, pool_dtype), name)
    found = tune.candidates(call, name, None)
    formula = gpu_config.formula(head_dim, pool_dtype != "bfloat16", call.max_seqs)
    assert found[0] == formula and 1 <= len(found) == len(set(found)) <= 8
    assert len(found) >= 3 or head_dim == 256  # whose blocks fill shared memory
    assert all(tune.fits(call, config) for config in found)
    kernel = name.split(",")[0]
    others = [f.name for f in dataclasses.fields(formula) if not f.name.startswith(kernel)]
    assert len({tuple(getattr(c, f) for f in others) for c in found}) == 1


@needs_new_jax
def test_decodes_are_tried_with_the_best_prefill():
    call = _room(tune.call_of(128, "bfloat16"), "decode, few")
    best = gpu_config.GpuAttentionConfig(64, 2, 64, 2)
    for config in tune.candidates(call, "decode, few", best):
        assert (config.prefill_block_kv, config.prefill_stages) == (64, 2)


def _trial(slots, *times):
    config = gpu_config.GpuAttentionConfig(128, 3, 64, slots)
    return tune.Trial(config, dict(zip("ab", times, strict=False)))


def test_the_formula_stays_unless_another_is_faster_by_more_than_a_hundredth():
    formula, equal, faster = _trial(2, 100, 50), _trial(3, 99, 50), _trial(4, 90, 50)
    refused = tune.Trial(formula.config, refusal="it does not compile")
    assert tune.choose([formula, equal]) is formula
    assert tune.choose([formula, equal, faster]) is faster
    assert tune.choose([refused, equal]) is equal
    with pytest.raises(ValueError, match="no candidate ran: .'it does not compile'"):
        tune.choose([refused])


def test_without_a_gpu_it_is_a_sentence(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(app.UsageError, match="measured on a GPU, and there is none"):
        tune.main(["tune"])
    with flagsaver.flagsaver(head_dims=["96"]):
        with pytest.raises(app.UsageError, match="--head_dims has '96'; wanted some of 64"):
            tune.main(["tune"])


@pytest.fixture
def as_on_a_gpu(monkeypatch, tmp_path):
    """The command with the oracle in the kernels' place, small cases, and times by config."""
    step = functools.cache(tune.Call.step)  # so that jit compiles the oracle once for all configs
    configs = []

    def of_backend(call, backend):
        if backend != "oracle":
            configs.append(call.config)
        return step(dataclasses.replace(call, config=None), "oracle")

    def time_kernels(step, states, inputs, **_):
        config = configs[-1]
        if config.decode_block_kv == 128 and config.decode_stages == 2:
            raise RuntimeError("out of registers\nand more")
        microseconds = 100.0 - 20 * (config.prefill_stages == 2) - 30 * (config.decode_stages == 5)
        return clock.Timing(microseconds, 1, 1, 1, "")

    monkeypatch.setattr(report, "start_backends", lambda: "gpu")
    monkeypatch.setattr(tune.Call, "step", of_backend)
    monkeypatch.setattr(tune, "step_of_inputs", functools.cache(tune.step_of_inputs))
    monkeypatch.setattr(dispatch, "why_no_mosaic_gpu", lambda: None)
    monkeypatch.setattr(clock, "time_kernels", time_kernels)
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(
        tune,
        "SEARCHES",
        {
            "prefill": {"p": ((2, 20, 40),)},
            "decode, few": {"f": ((2, 1, 50),)},
            "decode, many": {"m": ((40, 1, 20),)},
        },
    )
    device = type("Device", (), {"device_kind": _KIND, "platform": "cpu"})
    monkeypatch.setattr(tune.jax, "devices", lambda *_: [device])
    where = {"device_kind": _KIND, "jax": "0.11.2", "commit": "c", "date": "d"}
    monkeypatch.setattr(report, "environment", lambda: where)
    return tmp_path / "NVIDIA_H100_80GB_HBM3.json"


def test_the_best_are_written(as_on_a_gpu, capsys):
    with flagsaver.flagsaver(head_dims=["128"], pool_dtypes=["bfloat16"], write=True, all=True):
        tune.main(["tune"])
    text, told = capsys.readouterr()
    assert told.count("head_dim 128, pool bfloat16, ") == 3
    assert "out of registers" in text and "and more" not in text
    assert sum(line.endswith("  best") for line in text.splitlines()) == 3
    few, many = json.loads(as_on_a_gpu.read_text())[_OP]
    if few["has_few_seqs"] is False:
        few, many = many, few
    for entry, case in ((few, "f"), (many, "m")):
        assert set(entry["measured_us"]) == {"p", case}
        assert entry["head_dim"] == 128 and not entry["is_quantized"]
        config = gpu_config.GpuAttentionConfig(**entry["config"])
        assert (config.prefill_stages, config.decode_stages) == (2, 5)
        assert entry["measured_us"][case] == 50.0
    assert few["has_few_seqs"] and not many["has_few_seqs"]


def test_no_search_begins_when_the_time_is_over(as_on_a_gpu, capsys):
    with flagsaver.flagsaver(head_dims=["128"], max_minutes=0.0, write=True):
        tune.main(["tune"])
    out, told = capsys.readouterr()
    assert out.count("not tried") == told.count("not tried") == 6
    assert not as_on_a_gpu.exists()


def test_an_entry_takes_the_place_of_its_like(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "__init__.py"))
    for size, value in ((16, 1), (8, 2), (16, 3)):
        tuning.write("A GPU", "op", {"page_size": size, "config": value}, ["page_size"])
    table = json.loads((tmp_path / "A_GPU.json").read_text())
    assert [entry["config"] for entry in table["op"]] == [2, 3]


# ---- That they are read


def test_an_entry_takes_the_place_of_the_formula(monkeypatch):
    found = gpu_config.GpuAttentionConfig(64, 2, 128, 2)
    entry = {
        "head_dim": 128,
        "is_quantized": False,
        "has_few_seqs": True,
        "page_size": 16,
        "config": dataclasses.asdict(found),
    }
    monkeypatch.setattr(
        tuned, "entries", lambda kind, op: (entry,) if (kind, op) == (_KIND, _OP) else ()
    )
    arguments = {"head_dim": 128, "is_quantized": False, "max_seqs": 31, "page_size": 64}
    formula = gpu_config.formula(128, False, 31)
    monkeypatch.setattr(dispatch, "gpu_device_kind", lambda: None)
    assert gpu_config.default_config(**arguments) == formula != found
    monkeypatch.setattr(dispatch, "gpu_device_kind", lambda: _KIND)
    assert gpu_config.default_config(**arguments) == found
    for changed in ({"head_dim": 64}, {"is_quantized": True}, {"max_seqs": 32}):
        assert gpu_config.default_config(**arguments | changed) != found


def _gpu_entries():
    for file in importlib.resources.files(tuned).iterdir():
        if file.name.startswith("NVIDIA"):
            for entry in json.loads(file.read_text(encoding="utf-8"))[_OP]:
                yield file.name, entry


def test_every_tuned_entry_is_read(monkeypatch):
    """And its blocks fit shared memory beside each other."""
    for name, entry in _gpu_entries():
        kind = entry["device_kind"]
        assert tuned.file_name(kind) == name
        monkeypatch.setattr(dispatch, "gpu_device_kind", lambda kind=kind: kind)
        max_seqs = 1 if entry["has_few_seqs"] else 64
        shape = {name: entry[name] for name in ("head_dim", "is_quantized", "page_size")}
        config = gpu_config.default_config(max_seqs=max_seqs, **shape)
        assert config == gpu_config.GpuAttentionConfig(**entry["config"])
        pool_dtype = "float8_e4m3fn" if entry["is_quantized"] else "bfloat16"
        call = tune.call_of(entry["head_dim"], pool_dtype)
        assert dispatch.why_no_mosaic_gpu() or tune.fits(call, config)


@needs_new_jax
def test_a_config_whose_pipelines_share_a_multiprocessor_must_fit_together():
    call = tune.call_of(128, "bfloat16")
    config = gpu_config.GpuAttentionConfig(128, 3, 128, 2)
    assert tune.fits(call, config)
    assert not tune.fits(call, dataclasses.replace(config, decode_pipelines=2))
