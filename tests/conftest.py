# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What the process must know before jax is imported: a CPU with 4 devices and a quiet libtpu."""

import gc
import importlib.util
import os
import pathlib
import sys

if "jax" in sys.modules:
    raise RuntimeError("tests/conftest.py must run before jax is imported: jax reads these once")

# A caller on a machine with an accelerator chooses by JAX_PLATFORMS; all else runs on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# bench.tpu_model.compile.COMPILE_ENV and test_conftest_sets_what_compiling_needs say the same; it
# is not imported here because it imports jax.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not ask a cloud metadata server which TPU this is
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # a second process would die on the lock file
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu warns that it is unset
# Threads of XLA's CPU client: interpreted devices hold one each while they wait for one another.
os.environ.setdefault("NPROC", "16")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
    ).strip()

# Tracing keeps most of what it makes: collecting after every 700 objects takes a tenth of the time.
gc.set_threshold(50_000, 20, 100)

# Test files import `tests.kv_write.cases`; `python -m pytest` has the root on its path, `pytest`
# has not.
_ROOT = pathlib.Path(__file__).resolve().parent.parent
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))
from tests import jax_lines  # noqa: E402

# What some tests need beside jax. With an accelerator, where the kernels' tests are what is run,
# they are left out where that is missing; elsewhere it is an error.
_FILES_WITH = {
    "hypothesis": (
        "engine/test_interruptions.py",
        "engine/test_page_pool.py",
        "test_planted.py",
        "engine/test_scheduler.py",
        "engine/test_vllm_scheduler.py",
        "package/test_validate.py",
        "kv_write/test_indices.py",
        "engine/test_write_plan.py",
    ),
    "sphinx": ("package/test_docs.py",),
    "safetensors": (
        "engine/checkpoints.py",
        "engine/test_checkpoint.py",
        "engine/test_cli.py",
        "engine/test_interruptions.py",
        "engine/test_llm.py",
        "engine/test_tokenizer.py",
    ),
}
collect_ignore = [
    file
    for library, files in _FILES_WITH.items()
    if os.environ["JAX_PLATFORMS"] != "cpu" and importlib.util.find_spec(library) is None
    for file in files
]


def pytest_collection_modifyitems(items):
    for item in items:
        if jax_lines.is_on_any_jax(item.path, item.name):
            item.add_marker("any_jax")
