# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What XLA makes of the GPU kernels' programs for an H100, compiled on a machine without one."""

import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest


def _why_not() -> str | None:
    if jax.__version_info__ < (0, 11, 2):
        return "Mosaic GPU needs jax 0.11.2"
    if os.environ["JAX_PLATFORMS"] != "cpu":
        return "a libcuda that does nothing would stand before the real one"
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed"
        if found != importlib.metadata.version("jaxlib"):
            return f"{package} is {found}, jaxlib another version"
    return None if shutil.which("cc") else "there is no C compiler"


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "")


@functools.cache
def _compiled(*flags):
    root = pathlib.Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-m", "tests.package.compile_for_gpu", *flags]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_no_kernel_is_fused_with_a_slice():
    """Such a fusion forgets that the kernel updates an operand in place."""
    programs = _compiled()
    assert all(program["calls"] >= 1 for program in programs.values()), programs
    assert not any(program["fused"] for program in programs.values()), programs


def test_without_the_barriers_one_would_be():
    """When this fails, XLA fuses no such call any more: `pallas_paged.unfused` can go."""
    (program,) = _compiled("--planted").values()
    assert program["fused"]


def test_the_barriers_copy_no_pool():
    """Layers that write to a donated flat pool and read it: the temporaries are smaller than it."""
    pool_bytes = 2400 * 16 * 4 * 128 * 2
    assert _compiled()["flat pool"]["temp_bytes"] < pool_bytes
