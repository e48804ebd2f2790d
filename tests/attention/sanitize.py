# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A small case of each GPU attention kernel, to be run under NVIDIA's sanitizer, from the root:

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m tests.attention.sanitize

(See tests/kv_write/sanitize.py for the allocator.) The exit status is 1 where a result differs from
that of the loops. A GPU has so many thread blocks that even these decodes are split and combined.
"""

import functools
import sys

from tests import sanitizing
from tests.attention.cases import by_loops, mismatch
from tests.attention.test_gpu import SCALES, SMALL, Call, options_of, run_kernels

# Each with rows and a sequence without work.
DECODES = ((1, 300), (3, 0), (1, 5), (2, 130))
PREFILLS = ((140, 203), (3, 0), (70, 300))  # blocks with and without a mask, a tile's rest
CALLS = {
    "decode, split and combined": Call(DECODES),
    "prefill, masked and unmasked": Call(PREFILLS),
    "window, heads of 64": Call(
        (*DECODES, *PREFILLS), (3, 3), 64, 24, options=options_of(sliding_window=40)
    ),
    "fp8 pool with scales, sinks": Call(
        (*DECODES, *PREFILLS), pool_dtype="float8_e4m3fn", options=(*SCALES, ("sinks", True))
    ),
    "heads of 256, float16, soft cap": Call(
        (*DECODES, (70, 100)), (2, 1), 256, 8, "float16", options=options_of(soft_cap=5.0)
    ),
    "not causal, one KV head, small blocks": Call(
        (*DECODES, (70, 100)),
        (5, 1),
        page_size=136,
        options=options_of(causal=False),
        config=SMALL,
    ),
}


def _check(call: Call) -> str | None:
    case, options = call.make()
    out, lse = run_kernels(case, options, call.config)
    options.pop("num_kv_heads")
    return mismatch(out, lse, *by_loops(case, **options))


if __name__ == "__main__":
    sys.exit(sanitizing.run({name: functools.partial(_check, c) for name, c in CALLS.items()}))
