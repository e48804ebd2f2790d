# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Each program of examples/ runs on a CPU as its docstring says, and finds its own result right."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
# What each one says when its result is right.
VERDICTS = {
    "attention_layer": "agree with plain attention over whole sequences",
    "serve_checkpoint": "gave the same text as in the batch",
    "shard_over_heads": "devices computed what one computes, without a collective",
    "spread_a_long_context": "devices computed what one computes, each from a quarter of the pages",
    "write_a_batch": "wrote the same pool, bit for bit",
}


def test_there_is_a_verdict_for_each_and_the_readme_names_it():
    assert list(VERDICTS) == EXAMPLES
    readme = (ROOT / "examples/README.md").read_text()
    assert re.findall(r"\]\((\w+)\.py\)", readme) and set(
        re.findall(r"\]\((\w+)\.py\)", readme)
    ) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    if name == "serve_checkpoint" and jax.default_backend() != "cpu":
        if importlib.util.find_spec("safetensors") is None:
            pytest.skip("model folders need safetensors")
    # A newcomer's environment: the flags for several CPU devices are this test process's own.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", f"examples.{name}"]
    assert f"    python -m examples.{name}" in (ROOT / f"examples/{name}.py").read_text()
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert VERDICTS[name] in done.stdout.splitlines()[-1]


def test_a_wrong_result_is_found():
    """The attention layer with another scale than the model's fails."""
    source = (ROOT / "examples/attention_layer.py").read_text()
    planted = source.replace("sm_scale=HEAD_DIM**-0.5", "sm_scale=1.0")
    assert planted != source
    names = {"__name__": "planted"}
    exec(compile(planted, "attention_layer.py", "exec"), names)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        names["main"]()
