# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A small case of each GPU write, to be run under NVIDIA's sanitizer on a GPU.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize_kv_write.py

Ends with 1 where a pool differs from the plain loop's. Every id that is out of range is in it.
"""

import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tests.cases import Case, difference, expected, make  # noqa: E402

CASES = [
    Case("page_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("slice_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("token_write", 70, 16, 2, 128, entries="any", block_tokens=4),
    Case("token_write", 33, 4, 3, 64, "float8_e4m3fn", "any", scale="head", block_tokens=4),
    Case("copy_pages", 5, 4, 2, 128, entries="holes"),
]


def main() -> int:
    """Runs the cases; 0 where all are right."""
    if jax.default_backend() != "gpu":
        print("this needs a GPU", file=sys.stderr)
        return 2
    status = 0
    for case in CASES:
        call = make(case)
        found = difference(call.run("mosaic_gpu"), expected(call))
        print(f"{case.id}: {found or 'right'}")
        status |= found is not None
    return status


if __name__ == "__main__":
    sys.exit(main())
