# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""bench.kernel_digest: what it calls a difference, and which cases it goes through."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from bench import kernel_digest
from bench.kernel_digest import Digest, compare
from bench.tpu_model.compile import as_if_on
from pallas_paged import tuned

TPU = Digest(modules=("a1",), program="p1", bundles=(100,), xla_bundles=(7, 9))
GPU = Digest(modules=("a1", "b1"), program="p1")


@pytest.mark.parametrize(
    "before, change, differences, remarks",
    [
        (TPU, {}, [], []),
        (TPU, {"bundles": (101,)}, ["x: 100 bundles before, 101 after"], []),
        (TPU, {"bundles": ()}, [], []),
        (TPU, {"bundles": (), "modules": ("a2",)}, ["x: the lowered module is another one"], []),
        (TPU, {"modules": ("a2",)}, [], ["x: the lowered module is another one, its bundles"]),
        (TPU, {"program": "p2", "xla_bundles": ()}, [], ["x: the program around the kernel"]),
        (GPU, {}, [], []),
        (GPU, {"modules": ("a1", "b2")}, ["x: the lowered module is another one"], []),
        (GPU, {"modules": ("b1", "a1")}, ["x: the lowered module is another one"], []),
        (GPU, {"program": "p2"}, [], ["x: the program around the kernel differs"]),
    ],
)
def test_compare(before, change, differences, remarks):
    found = compare({"x": before}, {"x": dataclasses.replace(before, **change)})
    for lines, wanted in zip(found, (differences, remarks), strict=True):
        assert len(lines) == len(wanted)
        assert all(line.startswith(begin) for line, begin in zip(lines, wanted, strict=True))


def test_a_case_of_one_run_alone_is_a_difference():
    differences, remarks = compare({"x": TPU, "old": TPU}, {"x": TPU, "new": GPU})
    assert differences == ["old: only before", "new: only after"] and not remarks


def test_every_tuned_shape_is_a_case():
    names = [case.name for case in kernel_digest.all_cases()]
    assert len(set(names)) == len(names)
    for generation, kind in (("v5e", "TPU v5 lite"), ("v6e", "TPU v6 lite"), ("tpu7x", "TPU7x")):
        for e in tuned.entries(kind, "ragged_paged_attention"):
            shape = f"{e['num_heads']}/{e['num_kv_heads']}/{e['head_dim']} page {e['page_size']}"
            for op in ("attend", "write_and_attend"):
                assert f"{generation} {op} {shape}" in names
        # Calls of one grid step and of more; tokens do not know the page size.
        assert sum(name.startswith(f"{generation} page page ") for name in names) >= 5
        assert sum(name.startswith(f"{generation} token ") for name in names) == 2
    gpu = [name for name in names if name.startswith("gpu ")]
    is_there = jax.__version_info__ >= (0, 11, 2)
    entries = tuned.entries("NVIDIA H100 80GB HBM3", "ragged_paged_attention")
    assert sum("attend" in name for name in gpu) == 2 * len(entries) * is_there


def _double(name, offset=1):
    """A kernel, lowered for a TPU."""

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2 + offset

    def call(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name=name)(
            x
        )

    with as_if_on("v6e"):
        traced = jax.jit(call).trace(jax.ShapeDtypeStruct((8, 128), jnp.float32))
        return traced.lower(lowering_platforms=("tpu",))


def test_a_digest_sees_the_kernel_and_not_its_name():
    first, names = kernel_digest.digest_lowered(_double("first"))
    again, other_names = kernel_digest.digest_lowered(_double("again"))
    assert first == again
    assert names == ("first",) and other_names == ("again",)
    changed, _ = kernel_digest.digest_lowered(_double("first", offset=3))
    assert changed.modules != first.modules and changed.program == first.program


def test_a_program_without_a_kernel_is_refused():
    traced = jax.jit(lambda x: x + 1).trace(jax.ShapeDtypeStruct((8,), jnp.float32))
    with pytest.raises(ValueError, match="has no Pallas kernel"):
        kernel_digest.digest_lowered(traced.lower(lowering_platforms=("tpu",)))


def test_a_planted_difference_is_named_and_exits_with_1(tmp_path):
    """One small kernel, compiled; then the same against itself, and against a wrong file."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"

    def run(*flags_):
        command = [sys.executable, "-m", "bench.kernel_digest", "--only=v6e token page 1 tokens 65"]
        return subprocess.run([*command, *flags_], capture_output=True, text=True)

    done = run(f"--out={before}")
    assert done.returncode == 0, done.stderr
    record = json.loads(before.read_text())
    (digest,) = record["digests"].values()
    assert digest["bundles"][0] > 100
    done = run(f"--out={after}", f"--against={before}")
    assert done.returncode == 0 and "no kernel differs" in done.stdout
    assert json.loads(after.read_text())["digests"] == record["digests"]
    digest["bundles"][0] += 1
    before.write_text(json.dumps(record))
    done = run(f"--out={after}", f"--against={before}", "--compile=all")
    assert done.returncode == 1
    assert "DIFFERS: v6e token page 1 tokens 65536" in done.stdout
