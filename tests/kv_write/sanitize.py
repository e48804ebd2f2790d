# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A small case of each GPU write, to be run under NVIDIA's sanitizer on a GPU, from the root:

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m tests.kv_write.sanitize

(With jax's own allocator all arrays lie in one allocation, and a step out of one is seen by
nobody.) Ends with 1 where a pool differs from the plain loop's. Every id that is out of range is in
it.
"""

import functools
import sys

from tests import sanitizing
from tests.kv_write.cases import Case, difference, expected, make

CASES = [
    Case("page_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("slice_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("token_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("token_write", 33, 4, 3, 64, "float8_e4m3fn", "any", scale="head", block_tokens=4),
    Case("copy_pages", 5, 4, 2, 128, entries="holes"),
]


def _check(case: Case) -> str | None:
    call = make(case)
    return difference(call.run("mosaic_gpu"), expected(call))


if __name__ == "__main__":
    sys.exit(sanitizing.run({case.id: functools.partial(_check, case) for case in CASES}))
