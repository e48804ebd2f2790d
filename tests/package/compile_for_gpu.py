# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Whole programs compiled by XLA for an H100 on a machine that has no GPU, and what XLA fused.

`python -m tests.package.compile_for_gpu` is a process of its own: it loads a libcuda whose
functions only succeed before jax looks for one. It needs the packages jax-cuda13-plugin and
jax-cuda13-pjrt of the installed jax, without NVIDIA's libraries, and a C compiler. It prints a
dictionary as JSON: program -> {"fused": kernels inside a fusion with a slice, "calls": kernels,
"temp_bytes": of the program}.
`--planted` compiles without the barriers of `pallas_paged.unfused`, to show what they prevent.
"""

import ctypes
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# What the compiler asks of a driver: that its functions are there and that the chip is a Hopper
# (attributes 75 and 76 are the compute capability, 16 the multiprocessors).
_LIBCUDA = r"""
#define SUCCEEDS(name) int name(void) { return 0; }
SUCCEEDS(cuInit) SUCCEEDS(cuDeviceGet) SUCCEEDS(cuCtxGetCurrent) SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuModuleLoadData) SUCCEEDS(cuModuleLoadDataEx) SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuModuleGetFunction) SUCCEEDS(cuFuncSetAttribute) SUCCEEDS(cuFuncGetAttribute)
SUCCEEDS(cuLibraryLoadData) SUCCEEDS(cuLibraryUnload) SUCCEEDS(cuLibraryGetKernel)
SUCCEEDS(cuKernelGetFunction) SUCCEEDS(cuKernelSetAttribute)
SUCCEEDS(cuDevicePrimaryCtxRetain) SUCCEEDS(cuDevicePrimaryCtxRelease)
SUCCEEDS(cuCtxPushCurrent_v2) SUCCEEDS(cuCtxPopCurrent_v2)
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 16 ? 132 : 0;
  return 0;
}
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
"""
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def load_stub(folder: str) -> None:
    """Builds and loads the libcuda; later requests for `libcuda.so.1` find it by its name."""
    source, library = pathlib.Path(folder, "cuda.c"), pathlib.Path(folder, "libcuda.so.1")
    source.write_text(_LIBCUDA)
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def compile_for_h100(fn: Callable, arrays: Any, donate: tuple[int, ...] = ()) -> Any:
    """The compiled program of `fn(*arrays)`; arrays are anything with shape and dtype."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    chip = topologies.get_topology_desc(
        "1x1x1", "cuda", topology="1x1x1", target_config=_H100
    ).devices[0]
    sharding = NamedSharding(Mesh(np.array([chip]), ("x",)), PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
    )
    traced = jax.jit(fn, donate_argnums=donate).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).compile()


def report(compiled: Any) -> dict[str, Any]:
    """What is asked of a program, from its optimised HLO."""
    text = compiled.as_text()
    computations = re.split(r"\n(?=%|ENTRY)", text)
    return {
        "fused": [
            computation.split(" ")[0]
            for computation in computations
            if "mosaic_gpu" in computation and computation.startswith("%dynamic-slice-fusion")
        ],
        "calls": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def _programs() -> dict[str, tuple[Callable, Any, tuple[int, ...]]]:
    """Name -> (function, arguments, what is donated)."""
    import jax
    import jax.numpy as jnp

    from tests.package import call_places

    ops, arrays = call_places.ops("mosaic_gpu"), call_places.make_arrays()
    programs: dict[str, tuple[Callable, Any, tuple[int, ...]]] = {}
    for place, op in (
        ("scan_of_stacked", "attention_lse"),
        ("scan_of_stacked", "write_and_attend"),
        ("scan_of_stacked", "copy_pages"),
        ("constant_indices", "attention"),
        ("constant_indices", "token_write"),
        ("map", "slice_write"),
    ):
        names, call = ops[op]
        put = functools.partial(call_places.PLACES[place], call)
        stacked = tuple(arrays[name] for name in names)
        programs[f"{place} {op}"] = (lambda *stacked, put=put: put(stacked)), stacked, ()

    # A model's layers: one flat pool, donated, carried through the scan.
    _, write_and_attend = ops["write_and_attend"]
    shape = (100 * call_places.NUM_PAGES, *arrays["kv_pages"].shape[2:])
    pool = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def layers(pool, q, k, v, metadata):
        def layer(pool, x):
            out, pool = write_and_attend(*x[:3], pool, x[3])
            return pool, out

        return jax.lax.scan(layer, pool, (q, k, v, metadata))

    programs["flat pool"] = layers, (pool, *(arrays[x] for x in ("q", "k", "v", "metadata"))), (0,)
    return programs


def main(planted: bool) -> None:
    import pallas_paged.kv_write.gpu.launch as writes
    from pallas_paged.attention.api import mosaic_gpu as attention

    programs = _programs()
    if planted:
        for module in (writes, attention):
            vars(module)["unfused"] = lambda arrays: arrays
        programs = {name: programs[name] for name in ("constant_indices token_write",)}
    print(json.dumps({name: report(compile_for_h100(*x)) for name, x in programs.items()}))


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu"}
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # there is nothing to time it on
    with tempfile.TemporaryDirectory() as folder:
        load_stub(folder)
        main("--planted" in sys.argv)
