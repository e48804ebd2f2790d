# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a step of the engine launches on a TPU, from the program compiled ahead of time.

`python -m bench.engine_study.tpu_step GENERATION SHAPE` is a process of its own, because libtpu
wants an environment that the caller may not have. It prints one JSON object; `launches` starts it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from bench.engine_study.cost import LLAMA3_8B
from bench.engine_study.serve import QWEN3_0_6B
from bench.tpu_model.compile import COMPILE_ENV, aot_compile
from reference_engine.config import ModelConfig

SHAPES = {"qwen3-0.6b": QWEN3_0_6B, "llama3-8b": LLAMA3_8B}
_NUM_DECODES = 64
_OPCODES = ("fusion", "custom-call", "copy", "transpose", "convolution")
# "%name = type opcode(", of which the type has no parenthesis before the opcode unless it is a
# tuple.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([\w-]+)\(")
_KERNEL = 'custom_call_target="tpu_custom_call"'


def launches(generation: str, shape: str) -> dict[str, Any]:
    """What `measure` returns, from a child process.

    Raises:
      RuntimeError: the child failed; the message ends with what it wrote.
    """
    command = [sys.executable, "-P", "-m", "bench.engine_study.tpu_step", generation, shape]
    child = subprocess.run(
        command, env=os.environ | COMPILE_ENV, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise RuntimeError(
            f"compiling a step of {shape} for {generation} failed:\n{child.stderr[-2000:]}"
        )
    return json.loads(child.stdout.splitlines()[-1])


def measure(generation: str, model: ModelConfig) -> dict[str, Any]:
    """Compiles steps of 64 decodes with two and with three layers; the difference is a layer.

    Returns:
      Opcode -> its number in a layer, "pool_copies": copies of the pool, and "temp_bytes" of the
      step with three layers.
    """
    few, more = (_compile(generation, model, num_layers) for num_layers in (2, 3))
    counts = _count(more["text"])
    counts.subtract(_count(few["text"]))
    return {
        **{opcode: counts[opcode] for opcode in _OPCODES},
        "pool_copies": more["pool_copies"],
        "temp_bytes": more["temp_bytes"],
    }


def _compile(generation: str, model: ModelConfig, num_layers: int) -> dict[str, Any]:
    import jax
    import numpy as np

    from reference_engine import model as model_lib
    from reference_engine.batch import choose_shape, make_batch_of, pack
    from reference_engine.config import EngineConfig
    from reference_engine.weights import param_shapes

    model = dataclasses.replace(model, num_layers=num_layers)
    config = EngineConfig(
        num_pages=4096,
        max_model_len=1024,
        max_num_batched_tokens=2 * _NUM_DECODES,
        max_num_seqs=_NUM_DECODES,
        kv_write="fused",
    )
    shape = choose_shape(_NUM_DECODES, _NUM_DECODES, config)
    batch = make_batch_of(shape, (), config)
    packed, spec = pack(batch[:-1])
    pool = jax.eval_shape(lambda: model_lib.make_pool(model, config.pool_pages, config.page_size))
    options = model_lib.StepOptions.of(config, is_decode=shape.is_decode)

    def step(*arrays: Any) -> Any:
        return model_lib.model_step(*arrays, spec=spec, model=model, options=options)

    inputs = (
        param_shapes(model),
        pool,
        jax.ShapeDtypeStruct(batch.page_indices.shape, np.int32),
        jax.ShapeDtypeStruct(packed.shape, packed.dtype),
        jax.ShapeDtypeStruct((_NUM_DECODES,), np.int32),
    )
    compiled: Any = aot_compile(step, inputs, generation, jit_kwargs={"donate_argnums": (1, 2)})
    text = compiled.as_text()
    dims = ",".join(map(str, pool.shape))
    return {
        "text": text,
        "pool_copies": len(re.findall(rf"\[{dims}\]\S* copy\(", text)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def _count(text: str) -> collections.Counter[str]:
    """The instructions of the program's entry by opcode; of the custom calls the kernels alone."""
    entry = text[text.index("\nENTRY") :]
    counts: collections.Counter[str] = collections.Counter()
    for line in entry.splitlines():
        match = _INSTRUCTION.match(line)
        # Others, as libtpu's ConcatBitcast, are names for memory and launch nothing.
        if match and (match.group(2) != "custom-call" or _KERNEL in line):
            counts[match.group(2)] += 1
    return counts


def as_row(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of a table, of what `launches` returns with its "generation" and "model"."""
    return {
        "chip": row["generation"],
        "model": row["model"],
        "fusions": f"{row['fusion'] + row['convolution']}",
        "kernels": f"{row['custom-call']}",
        "copies": f"{row['copy'] + row['transpose']}",
        "copies of the pool": f"{row['pool_copies']}",
        "temporaries, MB": f"{row['temp_bytes'] / 1e6:.1f}",
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], SHAPES[sys.argv[2]])))
